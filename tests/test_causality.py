"""Nothing of the future enters: exact zeros, in float64, for every setting."""

import pytest
import torch

from linpass import LinformerForCausalLM

SETTINGS = [
    (position, projection, sharing)
    for position in ("learned", "rotary")
    for projection in ("learned", "convolution", "pooling")
    for sharing in ("none", "headwise", "key-value", "layerwise")
]


def assert_no_leak(model, tokens, changed, **kwargs):
    """Changing token t changes no logit before t, to the bit, and does change the logits at t."""
    ids = torch.randint(0, 50, (2, tokens))
    with torch.no_grad():
        before = model(ids, **kwargs).logits
        for t in changed:
            other = ids.clone()
            other[:, t] = (other[:, t] + 1 + torch.randint(0, 48, (2,))) % 50
            after = model(other, **kwargs).logits
            assert torch.equal(after[:, :t], before[:, :t]), f"token {t} changes a logit before it"
            assert not torch.equal(after[:, t], before[:, t])


def assert_no_gradient(model, tokens, outputs, **kwargs):
    """The gradient of an output by every later embedding is exactly zero."""
    embeds = torch.randn(1, tokens, 32, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=embeds, **kwargs).logits
    for t in outputs:
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embeds, retain_graph=True)
        assert not gradient[0, t + 1 :].any(), f"the output at {t} has a gradient by a later token"
        assert gradient[0, t].any()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("position", "projection", "sharing"), SETTINGS)
def test_no_leak(position, projection, sharing, attn_implementation, build, tiny_config):
    config = tiny_config(position_embedding=position, projection=projection, projection_sharing=sharing)
    model = build(LinformerForCausalLM, config)
    model.set_attn_implementation(attn_implementation)
    # Block borders (7, 8, 15, 16, 23, 24), the last token, an odd length that is no multiple of the block.
    assert_no_leak(model, 29, [1, 7, 8, 15, 16, 20, 23, 24, 28])
    assert_no_gradient(model, 29, [0, 6, 7, 8, 15, 16, 27])


@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 8, 9, 31, 32])
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "num_key_value_heads": 2}, {"k": 32}, {"k": 0}, {"k": [8, 0]}]
)
def test_no_leak_at_every_length(tokens, changes, build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(projection_sharing="none", **changes))
    assert_no_leak(model, tokens, range(tokens))
    assert_no_gradient(model, tokens, range(tokens))


@pytest.mark.parametrize("projection", ["convolution", "pooling"])
def test_no_leak_past_seq_length(projection, build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(position_embedding="rotary", projection=projection))
    assert_no_leak(model, 75, [30, 31, 32, 33, 39, 40, 63, 64, 71, 72, 74])
    assert_no_gradient(model, 75, [31, 32, 39, 40, 71])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_no_leak_in_long_rows(attn_implementation, build, tiny_config):
    """Over several chunks of queries."""
    config = tiny_config(position_embedding="rotary", projection="convolution", seq_length=512, k=128, window_size=20)
    model = build(LinformerForCausalLM, config)
    model.set_attn_implementation(attn_implementation)
    assert_no_leak(model, 400, [127, 128, 129, 255, 256, 300, 399])
    assert_no_gradient(model, 400, [126, 127, 128, 255, 256, 398])


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("position", "projection", "sharing"), SETTINGS)
def test_no_leak_under_padding(position, projection, sharing, attn_implementation, build, tiny_config):
    """At no place, padding included: the shifted loss predicts a first token from the padding before it."""
    config = tiny_config(position_embedding=position, projection=projection, projection_sharing=sharing)
    model = build(LinformerForCausalLM, config)
    model.set_attn_implementation(attn_implementation)
    mask = torch.ones(3, 29, dtype=torch.long)
    mask[0, :6], mask[1, [1, 2, 14]], mask[2, 20:] = 0, 0, 0
    ids = torch.randint(0, 50, (3, 29))
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        for t in range(29):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1) % 50
            after = model(other, attention_mask=mask).logits
            assert torch.equal(after[:, :t], before[:, :t])
            masked = mask[:, t] == 0  # padding changes nothing but its own place
            assert torch.equal(after[masked, t + 1 :], before[masked, t + 1 :])
    embeds = torch.randn(3, 29, 32, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    for t in (0, 2, 5, 6, 7, 14, 15, 22, 27):
        (gradient,) = torch.autograd.grad(logits[:, t].sum(), embeds, retain_graph=True)
        assert not gradient[:, t + 1 :].any()


def test_not_a_number_at_padding_stays_there(build, tiny_config):
    model = build(LinformerForCausalLM, tiny_config(projection_sharing="none"))
    embeds, mask = torch.randn(2, 20, 32, dtype=torch.float64), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6], mask[1, [3, 11]] = 0, 0
    expected = model(inputs_embeds=embeds, attention_mask=mask).logits
    poisoned = embeds.masked_fill(mask[..., None] == 0, float("nan"))
    logits = model(inputs_embeds=poisoned, attention_mask=mask).logits
    assert torch.equal(logits[mask == 1], expected[mask == 1])


def test_no_leak_in_packed_rows(build, tiny_config):
    """Neither from later tokens nor from other documents."""
    model = build(LinformerForCausalLM, tiny_config(projection_sharing="none"))
    documents = torch.tensor([0] * 16 + [1] * 8 + [2] * 20)[None]
    starts = [0] * 16 + [16] * 8 + [24] * 20
    embeds = torch.randn(1, 44, 32, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=embeds, document_ids=documents).logits
    for t in range(44):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embeds, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen[starts[t] : t + 1].all()
        assert not seen[: starts[t]].any()
        assert not seen[t + 1 :].any()


def test_every_past_token_is_in_sight(build, tiny_config):
    """The other side: an output depends on every token up to it, through window or slots."""
    model = build(LinformerForCausalLM, tiny_config(window_size=8, depth=1, k=4))
    embeds = torch.randn(1, 32, 32, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=embeds).logits
    for t in range(32):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embeds, retain_graph=True)
        assert gradient[0, : t + 1].abs().sum(-1).gt(0).all()
