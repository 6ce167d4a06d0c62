"""Model FLOPs against PyTorch's counter of what really ran, and the table of devices."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from linpass import LinformerForCausalLM, LinformerForMaskedLM
from linpass.training.flops import flops_per_token, matrix_entries, peak_flops

ROWS, TOKENS = 2, 32
# The counts are the same whole numbers, but for the rotary angles of transformers 5.17: a product of 4 FLOPs per token.
TOLERANCE = 1e-4


def counted(model, tokens=TOKENS):
    """FLOPs per token of the matrix products of one forward and backward pass."""
    input_ids = torch.randint(1, 50, (ROWS, tokens))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    return counter.get_total_flops() / (ROWS * tokens)


def masked_scores(layers, width, computed, visible):
    """FLOPs per token that eager attention spends on keys that it computes and masks out."""
    return 12 * layers * width * (computed - visible)


def gpt2():
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4, attn_implementation="eager")
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("build_model", [gpt2, llama])
def test_full_causal_attention(build_model):
    model = build_model()
    above_the_diagonal = masked_scores(3, 32, TOKENS, (TOKENS + 1) / 2)
    assert counted(model) == pytest.approx(flops_per_token(model, TOKENS) + above_the_diagonal, rel=TOLERANCE)


def test_full_bidirectional_attention_computes_nothing_in_vain():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes, attn_implementation="eager"))
    assert counted(model) == pytest.approx(flops_per_token(model, TOKENS), rel=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 16, "attention_rank": 8},
        {"projection": "convolution", "position_embedding": "rotary", "num_key_value_heads": 2},
        {"projection_sharing": "none"},
        {"projection": "pooling"},
        {"k": [8, 0]},
    ],
    ids=str,
)
def test_a_causal_linformer(tiny_config, changes):
    config = tiny_config(**changes, attn_implementation="eager")
    model = LinformerForCausalLM(config)
    expected = flops_per_token(model, TOKENS)
    for layer in range(2):
        slots = config.slots_per_block(layer)
        # Counted by hand: 32 queries, blocks of 8, a window of 12.
        visible = sum(min(t + 1, 12) + (t + 1) // 8 * slots for t in range(TOKENS)) / TOKENS
        expected += masked_scores(1, 32, TOKENS + TOKENS // 8 * slots, visible)
    assert counted(model) == pytest.approx(expected, rel=TOLERANCE)


def test_past_seq_length_the_view_stays_as_it_is(tiny_config):
    model = LinformerForCausalLM(tiny_config(projection="convolution", position_embedding="rotary"))
    far, farther = (flops_per_token(model, tokens) for tokens in (32 * 64, 32 * 640))
    assert farther == pytest.approx(far, rel=0.01)
    # The last token of a long row sees 8 slots and 12 tokens and enters 2 slots, in each of the 2 layers.
    limit = 6 * matrix_entries(model) + 2 * (12 * 32 * (8 + 12) + 12 * 32 * 2)
    assert farther == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 8},
        {"k": 8, "projection": "convolution"},
        {"k": 8, "projection": "pooling"},
        {"k": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [16, 32])
def test_an_encoder_computes_nothing_in_vain(tiny_config, changes, tokens):
    config = tiny_config(causal=False, attn_implementation="eager", **changes)
    model = LinformerForMaskedLM(config)
    assert counted(model, tokens) == pytest.approx(flops_per_token(model, tokens), rel=TOLERANCE)


def test_attention_without_slots_costs_as_much_as_another_models(tiny_config):
    config = tiny_config(k=0, window_size=TOKENS)
    linformer, other = LinformerForCausalLM(config), llama()
    attention = [flops_per_token(model, TOKENS) - 6 * matrix_entries(model) for model in (linformer, other)]
    assert attention[0] / 2 == pytest.approx(attention[1] / 3)  # 2 and 3 layers


def test_a_head_counts_tied_or_not_and_a_look_up_never(tiny_config):
    tied, untied = (LinformerForCausalLM(tiny_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.num_parameters() < untied.num_parameters()
    assert matrix_entries(tied) == matrix_entries(untied)
    larger = LinformerForCausalLM(tiny_config(vocab_size=150))
    assert matrix_entries(larger) - matrix_entries(untied) == 100 * 32


def test_recomputed_activations_are_no_model_flops(tiny_config):
    model = LinformerForCausalLM(tiny_config()).train()
    before = flops_per_token(model, TOKENS), counted(model)
    new_name = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.2x
    (model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable)()
    assert flops_per_token(model, TOKENS) == before[0]
    assert counted(model) > 1.2 * before[1]


def test_a_row_has_a_token(tiny_config):
    with pytest.raises(ValueError, match="seq_length=0 must be 1 or more"):
        flops_per_token(LinformerForCausalLM(tiny_config()), 0)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)
def test_known_devices(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize("name", ["", "NVIDIA A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Some Device 4090"])
def test_unknown_devices(name):
    assert peak_flops(name) is None
