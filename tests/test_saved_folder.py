"""One saved folder opens (a) with linpass imported and (b) where linpass is not installed, with trust_remote_code."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import linpass
from linpass import LinformerForCausalLM

# Imports of linpass fail in this process as if it were not installed.
WITHOUT_LINPASS = """
    import sys
    sys.modules["linpass"] = None
    import torch
    from transformers import (
        AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification,
        AutoModelForTokenClassification, pipeline,
    )
    folder, ids = sys.argv[1], torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
"""


def run_without_linpass(body, folder, tmp_path):
    code = textwrap.dedent(WITHOUT_LINPASS) + textwrap.dedent(body)
    process = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def folder(build, tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    config = tiny_config(position_embedding="rotary", projection="convolution", projection_sharing="none", qk_norm=True)
    build(LinformerForCausalLM, config, dtype=torch.float32).save_pretrained(path)
    return path


def test_the_folder_holds_weights_configuration_and_code(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "configuration_linformer.py",
        "attention_linformer.py",
        "cache_linformer.py",
        "kernels_linformer.py",
        "launch_linformer.py",
        "layers_linformer.py",
        "modeling_linformer.py",
        "operators_linformer.py",
        "triton_linformer.py",
    }
    stored = json.loads((folder / "config.json").read_text())
    assert {"embed_dim", "depth", "heads", "seq_length"} <= stored.keys()
    assert {"hidden_size", "num_hidden_layers"}.isdisjoint(stored)
    assert len(stored["auto_map"]) == 6


def test_opens_with_linpass(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LinformerForCausalLM
    assert type(AutoConfig.from_pretrained(folder)) is linpass.LinformerConfig


def test_opens_without_linpass(folder, tmp_path):
    output = run_without_linpass(
        """
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules.")
        print(model(ids).logits.double().sum().item())
        print(model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist())
        for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification,
                     AutoModelForTokenClassification):
            other = auto.from_pretrained(folder, trust_remote_code=True).eval()
            base = other if auto is AutoModel else other.model
            assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 32
        model.save_pretrained("again")
        again = AutoModelForSequenceClassification.from_pretrained("again", trust_remote_code=True).eval()
        assert torch.equal(again.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert not any(name.startswith("linpass.") for name in sys.modules)
        """,
        folder,
        tmp_path,
    )
    total, generated = output.strip().splitlines()
    model = LinformerForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert float(total) == model(ids).logits.double().sum().item()
    assert json.loads(generated) == model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist()


def test_opens_without_linpass_and_triton(folder, tmp_path):
    """As on macOS or Windows; the code in the folder, whatever its name, takes its PyTorch path."""
    folder = shutil.copytree(folder, tmp_path / "my model (1), é")
    output = run_without_linpass(
        """
        sys.modules["triton"] = None
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        kernels = sys.modules[type(model).__module__.replace("modeling_linformer", "triton_linformer")]
        assert kernels.triton is None
        print(loss.item(), model.model.layers[0].attention.projection.key.grad.abs().sum().item())
        """,
        folder,
        tmp_path,
    )
    model = LinformerForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    expected = [loss.item(), model.model.layers[0].attention.projection.key.grad.abs().sum().item()]
    assert [float(number) for number in output.split()] == pytest.approx(expected, rel=1e-6)


def test_an_encoder_opens_without_linpass(build, tiny_config, tmp_path):
    model = build(linpass.LinformerForMaskedLM, tiny_config(causal=False), dtype=torch.float32)
    model.save_pretrained(tmp_path / "encoder")
    output = run_without_linpass(
        """
        for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
            model = auto.from_pretrained(folder, trust_remote_code=True).eval()
            base = model if auto is AutoModel else model.model
            print(base(ids).last_hidden_state.double().sum().item())
        """,
        tmp_path / "encoder",
        tmp_path,
    )
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    expected = model.model(ids).last_hidden_state.double().sum().item()
    assert [float(line) for line in output.split()] == [expected] * 3


def test_importing_linpass_registers_every_auto_class():
    code = """
        import linpass
        from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM,
            AutoModelForSequenceClassification, AutoModelForTokenClassification)
        config = AutoConfig.for_model("linformer", depth=1, embed_dim=32, vocab_size=50, rank=None)
        heads = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification,
            AutoModelForTokenClassification)
        print(*(type(auto.from_config(config)).__name__ for auto in (AutoModel, *heads)))
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert process.stdout.split() == [
        "LinformerModel",
        "LinformerForCausalLM",
        "LinformerForMaskedLM",
        "LinformerForSequenceClassification",
        "LinformerForTokenClassification",
    ], process.stderr
