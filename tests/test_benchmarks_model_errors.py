"""The errors of whole models are those that they have: small where nothing is wrong, large where something is."""

import itertools
import json

import pytest
import torch

from benchmarks import model_errors
from linpass import layers_linformer

SIZES = model_errors.SMOKE
CPU = torch.device("cpu")


def test_every_computation_stands_beside_float64(tmp_path):
    result = model_errors.run(tmp_path / "errors.json", SIZES, CPU, seconds=600)
    assert json.loads((tmp_path / "errors.json").read_text()) == json.loads(json.dumps(result))
    rows = result["errors"]
    assert len(rows) == 12
    for row in rows:
        assert row["same_bits"]
        learns, limit = row["case"] == "training", 1e-5 if row["precision"] == "float32" else 0.03
        assert 0 < row["outputs"] < limit
        assert ("gradients" in row) == learns
        if learns:
            assert 0 < row["gradients"] <= row["worst"] < limit
    page = (tmp_path / "errors.md").read_text()
    assert page.count("| yes |") == 12
    assert "20 tokens behind a prompt" in page
    again = model_errors.run(tmp_path / "again.json", SIZES, CPU, seconds=0, done=result)
    assert again["errors"] == rows  # nothing is measured twice


@pytest.mark.parametrize("number", [2, 4, 5])
def test_attention_that_is_wrong_or_changes_is_seen(number, monkeypatch):
    """In one way alone: the truth is PyTorch's."""
    case, factors = model_errors.all_cases(SIZES)[number], itertools.count(3)
    attend = layers_linformer.LinformerAttention.forward

    def changed(self, *given, **named):
        output, *rest = attend(self, *given, **named)
        return output * (next(factors) if self.config._attn_implementation == "sdpa" else 1), *rest

    monkeypatch.setattr(layers_linformer.LinformerAttention, "forward", changed)
    row = model_errors.compare(case, "kernels", 1, CPU)
    assert row["outputs"] > 0.01
    assert not row["same_bits"]
    assert model_errors.compare(case, "PyTorch", 1, CPU)["outputs"] < 0.03


def test_a_gpu_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        model_errors.main([str(tmp_path / "errors.json")])
    assert "needs a CUDA device, or --smoke" in capsys.readouterr().err
