"""The whole model against loops over single tokens, with all gradients; padded and packed rows against lone rows."""

import pytest
import reference
import torch
from tolerances import ORACLE

from linpass import LinformerForCausalLM, LinformerForMaskedLM

SETTINGS = [
    (causal, position, projection, sharing)
    for causal in (True, False)
    for position in ("learned", "rotary")
    for projection in ("learned", "convolution", "pooling")
    for sharing in ("none", "headwise", "key-value", "layerwise")
    if projection != "pooling" or sharing == "none"
]


def make(build, tiny_config, causal, **changes):
    config = tiny_config(causal=causal, heads=2, **changes)
    return build(LinformerForCausalLM if causal else LinformerForMaskedLM, config)


def assert_equals_loops(model, tokens):
    """Logits of one row, and the gradient of a weighted sum of them by every parameter."""
    ids = torch.randint(0, 50, (tokens,))
    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = reference.logits_row(state, model.config.to_dict(), ids.tolist())
    actual = model(ids[None]).logits[0]
    scale = expected.abs().max().item()
    assert (actual - expected).abs().max() / scale < ORACLE

    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    largest = max(leaf.grad.abs().max().item() for leaf in state.values() if leaf.grad is not None)
    for name, parameter in model.named_parameters():
        wanted = state[name].grad
        got = parameter.grad
        if wanted is None:
            assert got is None or not got.any(), name
        else:
            assert got is not None, name
            assert (got - wanted).abs().max() / largest < ORACLE, name


@pytest.mark.parametrize(("causal", "position", "projection", "sharing"), SETTINGS)
def test_logits_and_gradients_equal_loops(causal, position, projection, sharing, build, tiny_config):
    model = make(
        build, tiny_config, causal, position_embedding=position, projection=projection, projection_sharing=sharing
    )
    assert_equals_loops(model, tokens=29 if causal else 27)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 32])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_equal_loops(tokens, causal, build, tiny_config):
    model = make(build, tiny_config, causal, position_embedding="rotary", projection="convolution")
    assert_equals_loops(model, tokens)


@pytest.mark.parametrize("projection", ["convolution", "pooling"])
def test_past_seq_length_equals_loops(projection, build, tiny_config):
    model = make(build, tiny_config, True, position_embedding="rotary", projection=projection)
    assert_equals_loops(model, tokens=53)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "projection_sharing": "none"},
        {"qk_norm": True, "position_embedding": "rotary"},
        {"rank": 5, "attention_rank": 3},
        {"k": [8, 0]},
        {"k": 0},
        {"k": 16, "tie_word_embeddings": True},
        {"k": 32, "projection_sharing": "headwise"},
    ],
    ids=str,
)
def test_other_fields_equal_loops(causal, changes, build, tiny_config):
    model = make(build, tiny_config, causal, **changes)
    if changes.get("tie_word_embeddings"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equals_loops(model, tokens=21)


def test_encoder_slots_need_not_divide_the_sequence(build, tiny_config):
    assert_equals_loops(make(build, tiny_config, False, k=5, position_embedding="rotary"), tokens=30)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("causal", "position", "projection", "sharing"), SETTINGS)
def test_a_padded_row_equals_the_row_alone(
    causal, position, projection, sharing, attn_implementation, build, tiny_config
):
    model = make(
        build,
        tiny_config,
        causal,
        position_embedding=position,
        projection=projection,
        projection_sharing=sharing,
        k=[8, 0] if sharing != "layerwise" else 8,
    )
    model.set_attn_implementation(attn_implementation)
    tokens = 29
    ids = torch.randint(0, 50, (5, tokens))
    mask = torch.ones(5, tokens, dtype=torch.long)
    mask[0, :9] = 0  # left
    mask[1, 20:] = 0  # right
    mask[2, [0, 3, 4, 11, 28]] = 0  # gaps
    mask[3, :28] = 0  # one token
    mask[4, :] = 0  # nothing at all: meaningless, but finite, and no concern of the others
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row in range(4):
        real = mask[row] == 1
        alone = model(ids[row : row + 1, real]).logits[0]
        assert (logits[row, real] - alone).abs().max() < ORACLE
        of_one = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0, real]
        assert (of_one - alone).abs().max() < ORACLE


@pytest.mark.parametrize("causal", [True, False])
def test_what_stands_at_padding_changes_nothing_not_even_gradients(causal, build, tiny_config):
    model = make(build, tiny_config, causal, position_embedding="rotary", projection="convolution")
    ids = torch.randint(0, 50, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6], mask[1, 15:] = 0, 0
    other = torch.where(mask == 1, ids, (ids + 7) % 50)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # the shifted loss predicts it from the padding before it, from nothing but that id
    gradients = []
    for inputs in (ids, other):
        model.zero_grad()
        model(inputs, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("position", "projection", "sharing"), [s[1:] for s in SETTINGS if s[0]], ids=lambda value: str(value)
)
def test_packed_equals_separate(position, projection, sharing, attn_implementation, build, tiny_config):
    model = make(
        build, tiny_config, True, position_embedding=position, projection=projection, projection_sharing=sharing
    )
    model.set_attn_implementation(attn_implementation)
    ids = torch.randint(0, 50, (2, 56))
    documents, mask = torch.full((2, 56), -1), torch.zeros(2, 56, dtype=torch.long)
    spans = [[(0, 13), (16, 32), (32, 33), (40, 55)], [(0, 32), (32, 56)]]
    for row, starts in enumerate(spans):
        for number, (start, stop) in enumerate(starts):
            documents[row, start:stop], mask[row, start:stop] = number, 1
    packed = model(ids, attention_mask=mask, document_ids=documents).logits
    for row, starts in enumerate(spans):
        for start, stop in starts:
            alone = model(ids[row : row + 1, start:stop]).logits[0]
            assert (packed[row, start:stop] - alone).abs().max() < ORACLE


@pytest.mark.parametrize("window", [32, 40])
def test_causal_model_without_slots_is_ordinary_attention(window, build, tiny_config):
    """The baseline is the same class: whatever computes it, k = 0 with a wide window is softmax over the past."""
    model = build(LinformerForCausalLM, tiny_config(k=0, window_size=window, heads=2))
    wide = build(LinformerForCausalLM, tiny_config(k=0, window_size=31, heads=2))  # goes through the window's own code
    ids = torch.randint(0, 50, (2, 31))
    assert (model(ids).logits - wide(ids[:, :31]).logits).abs().max() < ORACLE
    assert_equals_loops(model, tokens=31)


def test_output_attentions_are_slots_then_tokens(build, tiny_config):
    model = make(build, tiny_config, True)
    ids, mask = torch.randint(0, 50, (2, 21)), torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    model.set_attn_implementation("eager")
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 2, 21, 8 + 21)] * 2
    real = mask[:, None, :].expand(-1, 2, -1) == 1
    assert (attentions[0].sum(-1)[real] - 1).abs().max() < ORACLE
    assert not attentions[0][0, :, 4:, 8 : 8 + 4].any()  # nothing looks at padding
    alone = model(ids[:1, 4:], output_attentions=True).attentions
    longer = make(build, tiny_config, True, position_embedding="rotary", projection="convolution")
    longer.set_attn_implementation("eager")
    past_the_end = longer(torch.randint(0, 50, (1, 75)), output_attentions=True).attentions
    assert [a.shape for a in past_the_end] == [(1, 2, 75, 8 + 75)] * 2
    assert (past_the_end[0].sum(-1) - 1).abs().max() < ORACLE
    assert (attentions[1][0, :, 4:, 12:] - alone[1][0, :, :, 8:]).abs().max() < ORACLE
    assert (attentions[1][0, :, 4:, :8] - alone[1][0, :, :, :8]).abs().max() < ORACLE
    model.set_attn_implementation("sdpa")
    assert model(ids, attention_mask=mask, output_attentions=True).attentions is None
