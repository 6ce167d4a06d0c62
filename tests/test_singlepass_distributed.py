"""Several processes make one pass: each row once, the sums of one process, on each of them the same head (gloo)."""

import json
from functools import partial

import pytest
import torch
import transformers
from singlepass_run import (
    ROWS,
    Act,
    outcome,
    run_pass,
    run_refused,
    run_several,
    start_together,
    stop,
    wait_for,
)

# The same rows in float64, added in another order; the logistic iteration stops where its loss has settled.
SUMS, HEADS = 1e-12, 1e-9

SETTINGS = {
    "linear": {},
    "logistic": {"estimator": "auto"},
    "loo": {"regularization": "loo"},
    "kfold": {"regularization": "kfold", "folds": 3},
    "balanced": {"class_weight": "balanced", "calibrate": True, "calibration_rows": 30},
    "relu": {"kernel": "relu", "num_features": 12, "regularization": 1.0},
    "nystrom": {"kernel": "nystrom", "num_features": 9, "regularization": 1.0},
    "rbf": {"kernel": "rbf", "regularization": 0.1},
    "few rows": {"rows": 5, "regularization": 1.0},
    "one row": {"rows": 9, "kernel": "nystrom", "num_features": 4, "regularization": 1.0},
    "stream": {"stream": True},
    "accelerate's sharding": {
        "accelerator_config": {"split_batches": True, "dispatch_batches": True, "even_batches": True}
    },
}


def several(world_size, folder, *arguments, **keywords):
    assert wait_for(start_together(world_size, *arguments, **keywords)) == [0] * world_size
    return [json.loads((folder / f"result.{rank}").read_text()) for rank in range(world_size)]


def assert_same(got, expected):
    """Sums and head; nested lists of numbers."""
    for name in ("sums", "head", "temperature"):
        pairs = [(got[name], expected[name])]
        if isinstance(got[name], dict):
            pairs = [(got[name][part], expected[name][part]) for part in expected[name]]
        elif isinstance(got[name], list):
            pairs = list(zip(got[name], expected[name], strict=True))
        for one, other in pairs:
            if other is None:
                assert one is None
                continue
            one, other = torch.tensor(one), torch.tensor(other)
            tolerance = (SUMS if name == "sums" else HEADS) * max(1, other.abs().max().item())
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """name -> [result of process 0, of process 1], and the result of one process."""
    together, alone = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    both = several(2, together, run_several, together, together / "result", SETTINGS)
    run_several(alone, alone / "result", SETTINGS)
    single = outcome(alone)
    return {name: ([result[name] for result in both], single[name]) for name in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_give_the_sums_and_the_head_of_one(passes, name):
    both, single = passes[name]
    for result in both:
        assert_same(result, single)
        assert result["rows"] == single["rows"]
    assert both[0]["sums"] == both[1]["sums"]
    assert both[0]["head"] == both[1]["head"]
    assert both[0]["map"] == both[1]["map"]


@pytest.mark.parametrize("name", SETTINGS)
def test_each_row_is_read_by_one_process_once(passes, name):
    (first, second), single = passes[name]
    reads = [first["reads"], second["reads"]]
    if name == "stream":  # each reads the stream, and takes its share of it
        assert reads == [single["reads"]] * 2 == [[1] * ROWS] * 2
        return
    assert [sum(pair) for pair in zip(*reads, strict=True)] == single["reads"] == [1] * len(single["reads"])
    if name == "few rows":
        assert reads == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert first["step"] == second["step"] == -(-single["rows"] // 8)


def test_feature_maps_are_those_of_one_process(passes):
    for name in ("relu", "nystrom", "one row"):
        both, single = passes[name]
        for part, values in single["map"].items():
            torch.testing.assert_close(torch.tensor(both[0]["map"][part]), torch.tensor(values), rtol=0, atol=1e-10)


def test_update_forget_and_evaluation_are_those_of_one_process(passes):
    both, single = passes["logistic"]
    for result in both:
        assert result["later"]["rows"] == single["later"]["rows"] == ROWS + 9 - 2
        for name in ("updated", "forgotten"):
            for one, other in zip(result["later"][name], single["later"][name], strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-7)
        assert result["later"]["eval_loss"] == pytest.approx(single["later"]["eval_loss"], abs=1e-6)
        assert result["later"]["eval_accuracy"] == single["later"]["eval_accuracy"]


def test_the_model_is_saved_once_and_loads(passes, tmp_path):
    folder = passes["logistic"][0][0]["later"]["saved"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    expected = torch.tensor(passes["logistic"][0][0]["later"]["forgotten"][0], dtype=torch.float64)
    torch.testing.assert_close(model.classifier.weight.detach(), expected, rtol=0, atol=0)
    assert [result["later"]["wrote"] for result in passes["logistic"][0]] == [1, 0]


# -- checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 2}


def run(folder, processes, **changes):
    arguments = (run_pass, folder / "run", folder / "result")
    return several(processes, folder, *arguments, **{"estimator": "auto", "calibrate": True, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pass of two processes with checkpoints after 16, 32 and 48 rows and at the end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, 2, **SAVING)


def test_one_process_writes_the_checkpoints(whole):
    folder, results = whole
    assert sorted(path.name for path in (folder / "run").iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 6, 7)]
    assert results[0]["head"] == results[1]["head"]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_checkpoint_of_two_processes_goes_on_with_any_number(whole, tmp_path, processes):
    folder, expected = whole
    checkpoint = str(folder / "run/checkpoint-4")
    for result in run(tmp_path, processes, resume=checkpoint):
        assert_same(result, expected[0])
        assert result["rows"] == ROWS
    reads = [json.loads((tmp_path / f"result.{rank}").read_text())["reads"] for rank in range(processes)]
    assert [sum(row) for row in zip(*reads, strict=True)] == [0] * 32 + [1] * (ROWS - 32)


def test_a_signal_to_one_process_stops_all_at_one_step(whole, tmp_path):
    results = run(tmp_path, 2, callbacks=[Act(3, partial(stop, 1))])
    assert [(result["solved"], result["step"]) for result in results] == [(False, 3)] * 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
    for result in run(tmp_path, 2, resume=True):
        assert_same(result, whole[1][0])


def test_what_needs_one_process(tmp_path):
    results = several(2, tmp_path, run_refused, tmp_path)
    for result in results:
        assert "match='sgd' follows one order of the rows: 2 processes must be 1" in result["sgd"]
        assert "auto_find_batch_size=True needs one process, not 2" in result["batch"]
        assert "at least one row" in result["none"]
