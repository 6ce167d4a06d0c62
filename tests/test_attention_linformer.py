"""Attention functions: fast against reference against single-token loops, values and every gradient."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GRADIENT, ORACLE, VALUE, relative_error

from linpass import attention_linformer as attention
from linpass.attention_linformer import (
    BlockLayout,
    attend_blocks,
    attend_blocks_fused,
    attend_blocks_reference,
    attend_visible,
    continued_grid,
    mix_blocks,
    mix_sequence,
    packed_grid,
    plain_grid,
    pooling_weight,
    rotary_angles,
    rotate,
)


def random_case(
    tokens, batch=2, heads=4, groups=2, dim=8, block=8, window=12, slots_per_block=2, visible=4, past=False
):
    """Tensors and layout of one call; ``past`` puts a window and all visible blocks before the first query."""
    past_tokens, past_blocks = (window, visible) if past else (0, 0)
    layout = BlockLayout(block, window, slots_per_block, visible, past_tokens, past_blocks)
    slots = (past_blocks + tokens // block) * slots_per_block
    shapes = [
        (heads, tokens),
        (groups, past_tokens + tokens),
        (groups, past_tokens + tokens),
        (groups, slots),
        (groups, slots),
    ]
    return [torch.randn(batch, *shape, dim, dtype=torch.float64) for shape in shapes], layout


def values_and_gradients(function, tensors, *args, weight=None):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves, *args)
    output = output[0] if isinstance(output, tuple) else output
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape) if weight is None else weight
    gradients = torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves, allow_unused=True)
    return output, [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


NAMES = ["query", "key", "value", "slot_key", "slot_value"]
both = pytest.mark.parametrize("attend", [attend_blocks, attend_blocks_fused])


@both
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 64, 100])
@pytest.mark.parametrize(("slots_per_block", "visible"), [(0, 0), (1, 4), (2, 4), (2, 99), (8, 2)])
@pytest.mark.parametrize("past", [False, True])
def test_chunks_equal_reference_with_every_gradient(attend, tokens, slots_per_block, visible, past, monkeypatch):
    for size in ("CHUNK_CPU", "CHUNK_FUSED"):
        monkeypatch.setattr(attention, size, 20)  # not a multiple of the block: chunks end inside blocks
    tensors, layout = random_case(tokens, slots_per_block=slots_per_block, visible=visible, past=past)
    first_block = torch.tensor([[-1], [-3]]).expand(-1, -(-tokens // 8)) if past else None
    fast, fast_gradients = values_and_gradients(attend, tensors, layout, first_block)
    slow, slow_gradients = values_and_gradients(attend_blocks_reference, tensors, layout, first_block)
    assert (fast - slow).abs().max() < ORACLE
    for name, got, expected in zip(NAMES, fast_gradients, slow_gradients, strict=True):
        assert got.shape == expected.shape
        assert got.numel() == 0 or (got - expected).abs().max() < ORACLE, name


@both
@pytest.mark.parametrize("one_mask", [False, True])
def test_packed_documents_see_themselves_alone(attend, one_mask, monkeypatch):
    """Documents of 3, 1 and 4 blocks in one row, of 8 in the other; or the same documents in both."""
    for size in ("CHUNK_CPU", "CHUNK_FUSED"):
        monkeypatch.setattr(attention, size, 16)
    tensors, layout = random_case(61, visible=99)
    first_block = torch.tensor([[0, 0, 0, 3, 4, 4, 4, 4], [0] * 8])
    first_block = first_block[:1] if one_mask else first_block
    fast, fast_gradients = values_and_gradients(attend, tensors, layout, first_block)
    slow, slow_gradients = values_and_gradients(attend_blocks_reference, tensors, layout, first_block)
    assert (fast - slow).abs().max() < ORACLE
    for name, got, expected in zip(NAMES, fast_gradients, slow_gradients, strict=True):
        assert (got - expected).abs().max() < ORACLE, name


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_is_within_the_table(attend, dtype):
    tensors, layout = random_case(300, window=40, block=16, dim=32, visible=8)
    tensors = [tensor.to(dtype) for tensor in tensors]
    fast, fast_gradients = values_and_gradients(attend, tensors, layout)
    truth, true_gradients = values_and_gradients(attend_blocks_reference, [t.double() for t in tensors], layout)
    assert fast.dtype == dtype
    assert relative_error(fast, truth) < VALUE[dtype]
    for name, got, expected in zip(NAMES, fast_gradients, true_gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) < GRADIENT[dtype], name


@both
def test_sums_over_many_chunks_keep_their_precision(attend, monkeypatch):
    """A slot is seen from 64 chunks, a token from 33: summed one by one in bfloat16 the error is 6e-3, not 2e-3."""
    for size in ("CHUNK_CPU", "CHUNK_FUSED"):
        monkeypatch.setattr(attention, size, 8)
    monkeypatch.setattr(attention, "CHUNKS_IN_VIEW", 999)  # or chunks grow with the window
    tensors, layout = random_case(512, window=257, slots_per_block=1, visible=99)
    tensors, weight = [tensor.bfloat16() for tensor in tensors], torch.ones(2, 4, 512, 8)
    _, gradients = values_and_gradients(attend, tensors, layout, weight=weight)
    _, expected = values_and_gradients(attend_blocks_reference, [t.double() for t in tensors], layout, weight=weight)
    for name, got, wanted in zip(NAMES[1:], gradients[1:], expected[1:], strict=True):
        assert relative_error(got, wanted) < 4e-3, name


@both
def test_numerical_gradient(attend):
    tensors, layout = random_case(19, batch=1, heads=2, groups=1, dim=3)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, layout), leaves)


@both
def test_nothing_of_the_future_enters(attend, monkeypatch):
    """Exact zeros, and equal bits, across the borders of blocks and chunks."""
    for size in ("CHUNK_CPU", "CHUNK_FUSED"):
        monkeypatch.setattr(attention, size, 16)
    (query, key, value, *_), layout = random_case(53, visible=99)
    weight = torch.rand(1, 1, 8, 2, dtype=torch.float64)
    states = torch.stack((query[:, :2], key, value)).requires_grad_()

    def forward(states):
        query, key, value = states
        return attend(query, key, value, mix_blocks(key, weight), mix_blocks(value, weight), layout)

    output = forward(states)
    for t in (0, 6, 7, 8, 15, 16, 31, 40, 47, 52):
        (gradient,) = torch.autograd.grad(output[:, :, t].sum(), states, retain_graph=True)
        assert not gradient[:, :, :, t + 1 :].any()
        assert gradient[2, :, :, : t + 1].any(-1).all()
        changed = states.detach().clone()
        changed[:, :, :, t + 1 :] += 1
        assert torch.equal(forward(changed)[:, :, : t + 1], output[:, :, : t + 1])


@both
def test_two_runs_are_identical(attend):
    tensors, layout = random_case(100)
    first, first_gradients = values_and_gradients(attend, tensors, layout)
    again, again_gradients = values_and_gradients(attend, tensors, layout)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, again_gradients, strict=True))


def test_every_output_is_written(monkeypatch):
    """Uninitialised memory filled with NaN must not come through."""
    tensors, layout = random_case(53)
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    output, gradients = values_and_gradients(attend_blocks, tensors, layout)
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_score_is_kept_for_the_backward_pass():
    """Saved for backward: the inputs; nothing that grows with k or w times n."""
    tensors, layout = random_case(256, window=64, block=16, visible=16)
    saved = []
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend_blocks(*leaves, layout)
    assert sum(saved) <= sum(t.numel() for t in tensors)


@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_call_keeps_copies_of_the_keys_and_one_mask_for_all_heads(packed, monkeypatch):
    """Saved for backward: what `attend_blocks_fused` says under Cost, and no score."""
    monkeypatch.setattr(attention, "CHUNK_FUSED", 64)
    tensors, layout = random_case(256, batch=3, heads=16, groups=16, window=64, block=16, visible=16)
    saved = {}
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def remember(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    first_block = torch.zeros(3, 16, dtype=torch.long) if packed else None
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        attend_blocks_fused(*leaves, layout, first_block)
    keys = 256  # 32 slots, 63 tokens before, 64 of the chunk, filled up
    elements = 2 * 3 * 16 * 4 * keys * 8  # keys and values of 4 chunks
    elements += 2 * 3 * 16 * 256 * 8 + 3 * 16 * 256  # queries, output, logsumexp
    elements += (3 if packed else 1) * 256 * keys
    assert sum(saved.values()) <= 8 * elements


@pytest.mark.parametrize("past", [False, True])
def test_the_fused_call_compiles_into_one_graph(past, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_FUSED", 16)
    tensors, layout = random_case(50, past=past)
    first_block = torch.tensor([[-1], [-3]]).expand(-1, 7) if past else None
    compiled = torch.compile(attend_blocks_fused, backend="aot_eager", fullgraph=True, dynamic=False)
    fast, fast_gradients = values_and_gradients(compiled, tensors, layout, first_block)
    slow, slow_gradients = values_and_gradients(attend_blocks_reference, tensors, layout, first_block)
    assert (fast - slow).abs().max() < ORACLE
    for name, got, expected in zip(NAMES, fast_gradients, slow_gradients, strict=True):
        assert (got - expected).abs().max() < ORACLE, name


@both
@pytest.mark.parametrize("window", [40, 64])
def test_no_slots_and_a_wide_window_is_ordinary_causal_attention(attend, window):
    (query, key, value, slot_key, slot_value), layout = random_case(40, window=window, slots_per_block=0, visible=0)
    fast, gradients = values_and_gradients(attend, [query, key, value, slot_key, slot_value], layout)

    def sdpa(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    expected, expected_gradients = values_and_gradients(sdpa, [query, key, value])
    assert (fast - expected).abs().max() < ORACLE
    for got, wanted in zip(gradients[:3], expected_gradients, strict=True):
        assert (got - wanted).abs().max() < ORACLE


def test_identity_mixing_with_k_equal_n_is_full_attention():
    query, key, value = (torch.randn(2, 3, 24, 8, dtype=torch.float64) for _ in range(3))
    identity = torch.eye(24, dtype=torch.float64)[None]
    output, _ = attend_visible(query, mix_sequence(key, identity), mix_sequence(value, identity))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert (output - expected).abs().max() < ORACLE


def test_a_window_of_one_block_leaves_no_past_token_out_of_sight():
    """With identity mixing inside blocks and w = b, slots and window together cover every token up to the query."""
    tensors, _ = random_case(40, groups=4, window=8)
    query, key, value = (
        tensors[0],
        torch.zeros_like(tensors[1]),
        torch.eye(40, 8, dtype=torch.float64).expand(2, 4, -1, -1),
    )
    value = torch.eye(40, dtype=torch.float64).expand(2, 4, -1, -1)
    identity = torch.eye(8, dtype=torch.float64)[None, None]
    layout = BlockLayout(8, 8, 8, 5)
    slot_key, slot_value = mix_blocks(key, identity), mix_blocks(value, identity)
    output, _ = attend_blocks_reference(query, key, value, slot_key, slot_value, layout)
    seen = output[0, 0] > 0
    assert torch.equal(seen, torch.ones(40, 40, dtype=torch.bool).tril())


def test_rotation_equals_loops():
    states = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    position = torch.tensor([[0.0, 3.0, 7.5, 100.0, 1e6]], dtype=torch.float64)
    turned = rotate(states, rotary_angles(position, 6, 10000.0, torch.float64))
    for token in range(5):
        expected = reference.rotate(states[0, 1, token], position[0, token].item(), 10000.0)
        assert (turned[0, 1, token] - expected).abs().max() < ORACLE


def test_pooling_weight_averages_neighbours():
    assert torch.equal(
        pooling_weight(4, 2, torch.float64), torch.tensor([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]).double()
    )
    uneven = pooling_weight(7, 3, torch.float64)
    assert torch.allclose(uneven.sum(0), torch.ones(3, dtype=torch.float64))
    assert (uneven > 0).sum(1).eq(1).all()


masks = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(mask=masks)
def test_plain_grid_puts_real_tokens_first_and_back(mask):
    keep = torch.tensor(mask)
    grid = plain_grid(9, keep.device, keep)
    tokens = torch.arange(1, keep.numel() + 1).view(keep.shape)[..., None]
    placed = grid.place(tokens)
    for row in range(len(keep)):
        count = int(keep[row].sum())
        assert placed[row, :count, 0].tolist() == tokens[row][keep[row]][:, 0].tolist()
        assert not placed[row, count:].any()
        assert grid.index_BT[row][keep[row]].tolist() == list(range(count))
        assert grid.keep_BN[row].tolist() == [True] * count + [False] * (9 - count)
    assert torch.equal(grid.restore(placed), tokens * keep[..., None])


@settings(deadline=None, max_examples=60)
@given(mask=masks, seen=st.lists(st.integers(0, 40), min_size=3, max_size=3), block=st.sampled_from([1, 2, 4, 8]))
def test_continued_grid_stands_on_the_blocks(mask, seen, block):
    keep = torch.tensor(mask)
    seen = torch.tensor(seen[: len(mask)])
    grid = continued_grid(9, seen, block, keep)
    tokens = torch.arange(1, keep.numel() + 1).view(keep.shape)[..., None]
    placed, restored = grid.place(tokens), grid.restore(grid.place(tokens))
    for row in range(len(keep)):
        start, count = int(seen[row]) // block * block, int(keep[row].sum())
        columns = [index - start for index in range(int(seen[row]), int(seen[row]) + count)]
        assert grid.start_B[row] == start
        assert grid.total_B[row] == seen[row] + count
        assert grid.keep_BN[row].nonzero()[:, 0].tolist() == columns
        assert placed[row, columns, 0].tolist() == tokens[row][keep[row]][:, 0].tolist()
        assert torch.equal(restored[row], tokens[row] * keep[row][:, None])
        assert grid.index_BT[row][keep[row]].tolist() == list(range(int(seen[row]), int(seen[row]) + count))


@pytest.mark.parametrize(
    ("documents", "mask"),
    [
        ([0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]),  # the second document starts inside a block
        ([0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1]),  # a gap inside a block
        ([0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1]),  # the document goes on after padding
    ],
)
def test_packed_grid_refuses_what_does_not_stand_on_blocks(documents, mask):
    with pytest.raises(ValueError, match="multiple of block_size=4"):
        packed_grid(torch.tensor([documents]), 4, torch.tensor([mask]) == 1)


@both
def test_autocast_leaves_the_softmax_alone(attend):
    tensors, layout = random_case(64)
    tensors = [tensor.float() for tensor in tensors]
    plain, gradients = values_and_gradients(attend, tensors, layout)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_gradients = values_and_gradients(attend, tensors, layout)
    assert torch.equal(plain, mixed)
    assert all(torch.equal(a, b) for a, b in zip(gradients, mixed_gradients, strict=True))


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("memory", ["tokens first", "heads first"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("tokens", "stored"), [(9, 12), (12, 12), (14, 12)])
def test_mixing_a_whole_row_is_its_sum(tokens, stored, batch, memory, sets):
    """Value and gradients; rows of E behind the tokens, and tokens behind the rows of E, do not enter."""
    states = torch.randn(batch, tokens, 2, 4, dtype=torch.float64).transpose(1, 2)
    states = (states if memory == "tokens first" else states.contiguous()).requires_grad_()
    weight = torch.randn(sets, stored, 5, dtype=torch.float64, requires_grad=True)
    mixed = mix_sequence(states, weight)
    n = min(tokens, stored)
    expected = torch.einsum("bgnd,gnk->bgkd", states[:, :, :n], weight[:, :n].expand(2, -1, -1))
    gradient = torch.randn_like(expected)
    assert relative_error(mixed, expected) < ORACLE
    got = torch.autograd.grad(mixed, (states, weight), gradient)
    for part, wanted in zip(got, torch.autograd.grad(expected, (states, weight), gradient), strict=True):
        assert relative_error(part, wanted) < ORACLE


def test_an_assertion_that_does_not_wait_is_short_enough_for_a_gpu(monkeypatch):
    """CUDA takes up to 254 characters."""
    said = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "_assert_async", lambda _condition, message: said.append(message))
    attention.require(torch.tensor(True), "why " * 100)
    assert said == [("why " * 100)[:254]]
