"""Baselines of the same size: parameters, fields, and that they learn by the same calls."""

import json

import pytest
import torch

from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM
from linpass.errors import InputError
from linpass.training.architectures import build_model, feed_forward_width
from linpass.training.arguments import PRESET_FOLDER, ModelArguments

BASELINES = ["gpt2", "llama"]


def preset_config(name, **changes):
    """The configuration of a preset, with GPT-2's vocabulary where it names none."""
    values = json.loads((PRESET_FOLDER / f"{name}.json").read_text())
    fields = {key: value for key, value in values.items() if key in LinformerConfig.__dataclass_fields__}
    defaults = {"vocab_size": ModelArguments.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LinformerConfig(**{**defaults, **fields, **changes})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", ["lumenspark", "base", "tiny", "debug"])
@pytest.mark.parametrize("architecture", BASELINES)
def test_as_many_parameters_as_the_linformer(architecture, preset, tied):
    config = preset_config(preset, tie_word_embeddings=tied)
    with torch.device("meta"):
        linformer, baseline = (build_model(name, config).num_parameters() for name in ("linformer", architecture))
    assert abs(baseline - linformer) <= 0.01 * linformer


@pytest.mark.parametrize("architecture", BASELINES)
def test_no_other_width_is_closer(architecture):
    config = preset_config("base")
    width = feed_forward_width(architecture, config)
    assert width % 8 == 0

    def distance(baseline_width):
        baseline = build_model(architecture, config).config
        baseline.n_inner = baseline.intermediate_size = baseline_width
        return abs(type(model)(baseline).num_parameters() - target)

    with torch.device("meta"):
        target = build_model("linformer", config).num_parameters()
        model = build_model(architecture, config)
        assert distance(width) == min(distance(width + step) for step in (-8, 0, 8))


@pytest.mark.parametrize("architecture", BASELINES)
def test_fields_are_the_linformers(architecture, tiny_config):
    config = tiny_config(dropout=0.25, tie_word_embeddings=True, eos_token_id=3, pad_token_id=2, bos_token_id=1)
    model = build_model(architecture, config)
    found = model.config
    assert (found.vocab_size, found.hidden_size, found.num_hidden_layers) == (50, 32, 2)
    assert (found.num_attention_heads, found.max_position_embeddings) == (4, 32)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 3, 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    dropouts = [value for name, value in found.to_dict().items() if name.endswith(("pdrop", "attention_dropout"))]
    assert dropouts
    assert set(dropouts) == {0.25}
    untied = build_model(architecture, tiny_config())
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def test_key_value_heads_of_llama(tiny_config):
    assert build_model("llama", tiny_config(num_key_value_heads=2)).config.num_key_value_heads == 2


@pytest.mark.parametrize("architecture", ["linformer", *BASELINES])
def test_every_architecture_learns_by_the_same_call(architecture, tiny_config):
    model = build_model(architecture, tiny_config()).train()
    ids = torch.randint(0, 50, (4, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _step in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(50.0).log().item(), abs=0.5)
    assert losses[-1] < losses[0] - 1


def test_objectives(tiny_config):
    assert type(build_model("linformer", tiny_config())) is LinformerForCausalLM
    assert type(build_model("linformer", tiny_config(causal=False), "masked")) is LinformerForMaskedLM


@pytest.mark.parametrize(
    ("architecture", "objective", "changes", "message"),
    [
        ("bert", "causal", {}, "architecture='bert' must be one of linformer, gpt2, llama"),
        ("gpt2", "prefix", {}, "objective='prefix' must be one of causal, masked"),
        ("gpt2", "masked", {"causal": False}, "objective='masked' needs architecture='linformer'"),
        ("linformer", "masked", {}, "objective='masked' needs causal=False; it is True"),
        ("linformer", "causal", {"causal": False}, "objective='causal' needs causal=True; it is False"),
        ("gpt2", "causal", {"rank": 1, "attention_rank": 1}, "cannot have the .* parameters"),
    ],
)
def test_refuses(architecture, objective, changes, message, tiny_config):
    with pytest.raises(InputError, match=message):
        build_model(architecture, tiny_config(**changes), objective)
