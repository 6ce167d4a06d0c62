"""Fused kernels against the float64 oracle: values and every gradient; at real sizes on a CUDA device.

Without one, small cases run in Triton's interpreter, which has no bfloat16.
"""

import copy
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import GRADIENT, ORACLE, VALUE, relative_error
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

import linpass.kernels_linformer
from linpass import (
    LinformerConfig,
    LinformerForCausalLM,
    LinformerForMaskedLM,
    attention_linformer,
    operators_linformer,
)
from linpass.attention_linformer import (
    BlockLayout,
    attend_blocks_reference,
    attend_visible,
    held_slots,
    mix_blocks,
    packed_grid,
    pooling_weight,
    rotary_angles,
    rotate,
    sequence_centres,
    slot_centres,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = 2 if DEVICE.type == "cpu" else 5  # that must be equal


@dataclass(frozen=True)
class Case:
    """One call. The defaults are small; queries and tokens still take two tiles, and slots do where r is 8."""

    tokens: int = 50
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    groups: int = 1
    dim: int = 16
    block: int = 8
    window: int = 20
    slots: int = 2  # of a block
    view: int = 99  # blocks
    mixing: str = "learned"  # or convolution, pooling
    stored: int = 9  # blocks that have learned weights
    per_group: bool = True  # every group has weights of its own
    one_weight: bool = False  # E is F
    weight_dtype: torch.dtype | None = None
    rotary: bool = True  # the window sees keys that are not those of the mixing, and slots are turned
    packed: str = ""  # documents in "each" row its own, or in "all" rows the same
    memory: str = "tokens first"
    parts: int = 0  # that the queries of a slot are cut in; 0: as many as the kernels choose


REAL = Case(333, torch.bfloat16, 2, 4, 2, 64, 32, 100, 4, 99, stored=32)
# How q, k and v lie in memory, as an order of [B, H, N, D].
MEMORY = {"tokens first": (0, 2, 1, 3), "heads first": (0, 1, 2, 3), "features first": (0, 3, 1, 2)}


def name(changes):
    words = (f"{key}={str(value).removeprefix('torch.')}".replace(" ", "-") for key, value in changes.items())
    return "-".join(words) or "default"


def small(**changes):
    return pytest.param(Case(**changes), id=name(changes))


def real(**changes):
    return pytest.param(Case(**asdict(REAL) | changes), id="real-" + name(changes), marks=pytest.mark.gpu)


def uniform(case, *shape, dtype=None):
    """Normal, of order one."""
    return torch.randn(*shape, device=DEVICE).to(dtype or case.dtype)


def memory_order(case):
    return MEMORY.get(case.memory, MEMORY["tokens first"])


def in_memory(case, *shape):
    """What is [B, H, N, D] to a caller, as it lies in memory."""
    return uniform(case, *(shape[i] for i in memory_order(case)))


def as_called(case, leaf):
    """[B, H, N, D] again."""
    order = memory_order(case)
    return leaf.permute([order.index(i) for i in range(4)])


def split_projection(case, projected):
    """Queries, keys and values, slices of one tensor."""
    heads = projected.unflatten(-1, (-1, case.dim)).transpose(1, 2)
    return heads.split((case.heads, case.groups, case.groups), 1)


def make_leaves(case):
    """What gradients are wanted of, by name."""
    leaves, heads = {}, {"query": case.heads, "key": case.groups, "value": case.groups}
    if case.memory == "fused":
        leaves["projected"] = uniform(case, case.batch, case.tokens, sum(heads.values()) * case.dim)
        heads = {}
    if case.rotary:
        heads["near"] = case.groups
    for part, count in heads.items():
        leaves[part] = in_memory(case, case.batch, count, case.tokens, case.dim)
    if case.mixing != "pooling":
        sets = case.groups if case.per_group else 1
        stored = case.stored if case.mixing == "learned" else 1
        for part in ("E",) if case.one_weight else ("E", "F"):
            weight = uniform(case, sets, stored, case.block, case.slots) / case.block**0.5
            leaves[part] = weight.to(case.weight_dtype or case.dtype)
    return {part: leaf.requires_grad_() for part, leaf in leaves.items()}


def arguments(case, leaves, grid):
    """Arguments of mix_and_attend, from the leaves; in their dtype."""
    given = (part for part in ("query", "key", "value", "near") if part in leaves)
    states = {part: as_called(case, leaves[part]) for part in given}
    if case.memory == "fused":
        states |= zip(("query", "key", "value"), split_projection(case, leaves["projected"]), strict=True)
    dtype = states["query"].dtype
    if case.mixing == "pooling":
        key_weight = pooling_weight(case.block, case.slots, dtype, DEVICE)[None, None]
    else:
        key_weight = leaves["E"]
    blocks, angles = grid.block_numbers(case.block), None
    if case.rotary:
        count = case.tokens // case.block
        if blocks is None and key_weight.shape[1] > 1:
            count = min(count, key_weight.shape[1])
        numbers = torch.arange(count, device=DEVICE)[None] if blocks is None else blocks[:, :count]
        angles = rotary_angles(slot_centres(numbers, case.block, case.slots), case.dim, 1e4, case.dtype)
        angles = tuple(part.to(dtype) for part in angles)
    return SimpleNamespace(
        **{"near": None} | states,
        weights=(key_weight, leaves.get("F", key_weight)),
        layout=BlockLayout(case.block, case.window, case.slots, case.view),
        angles=angles,
        blocks=blocks,
        first_block=grid.first_block_BC,
    )


def make_grid(case):
    """Documents of 3 blocks, in the second row of one and of all others."""
    if not case.packed:
        return SimpleNamespace(block_numbers=lambda _: None, first_block_BC=None)
    block = torch.arange(case.tokens, device=DEVICE) // case.block
    rows = torch.stack((block // 3, block.clamp(max=1)))[: case.batch if case.packed == "each" else 1]
    return packed_grid(rows, case.block)


def fused(kernels, case, leaves, grid):
    a = arguments(case, leaves, grid)
    return kernels.mix_and_attend(
        a.query, a.key, a.value, a.weights, a.layout, a.near, a.angles, a.blocks, a.first_block
    )


def oracle(case, leaves, grid):
    """With every score in memory."""
    a = arguments(case, leaves, grid)
    slot_key, slot_value = mix_blocks(a.key, a.weights[0], a.blocks), mix_blocks(a.value, a.weights[1], a.blocks)
    slot_key = slot_key if a.angles is None else rotate(slot_key, a.angles)
    near = a.key if a.near is None else a.near
    return attend_blocks_reference(a.query, near, a.value, slot_key, slot_value, a.layout, a.first_block)[0]


def output_gradient(case):
    if case.memory == "expanded gradient":  # as of output.sum()
        return torch.ones((), device=DEVICE, dtype=case.dtype).expand(case.batch, case.heads, case.tokens, case.dim)
    return uniform(case, case.batch, case.heads, case.tokens, case.dim)


def assert_within_the_table(dtype, output, gradients, truth, true_gradients):
    """``gradients`` and ``true_gradients`` by name."""
    assert output.dtype == dtype
    assert relative_error(output, truth) < VALUE[dtype]
    for part, expected in true_gradients.items():
        got = gradients[part]
        assert got.shape == expected.shape, part
        if expected.numel() and expected.abs().max() > 1e-12:
            error = relative_error(got, expected)
        else:  # zero in exact arithmetic: one key in view, or weights of blocks that are not there
            error = got.abs().sum().item() / max(1, got.numel())
        assert error < GRADIENT[dtype], f"{part}: {error:.1e}"


def check(kernels, case, launches):
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    truths = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    launches.clear()
    output = fused(kernels, case, leaves, grid)
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient)
    assert {"forward_kernel", "query_gradient_kernel", "token_gradient_kernel"} <= set(launches)
    assert ("slot_gradient_kernel" in launches) == (case.tokens >= case.block)
    truth = oracle(case, truths, grid)
    expected = torch.autograd.grad(truth, list(truths.values()), gradient.double(), materialize_grads=True)
    for part, leaf in leaves.items():
        assert dict(zip(leaves, gradients, strict=True))[part].dtype == leaf.dtype
    named = (dict(zip(leaves, parts, strict=True)) for parts in (gradients, expected))
    assert_within_the_table(case.dtype, output, next(named), truth, next(named))


@pytest.fixture
def launches(kernels, recorded_launches):
    """Names of the kernels of attention that were started, in order."""
    before = {"angles_kernel", "normalise_and_rotate_kernel", "normalise_and_rotate_gradient_kernel"}
    return recorded_launches(lambda kernel, _tensors: None if kernel.__name__ in before else kernel.__name__)


CASES = [
    small(),
    small(dtype=torch.float16),
    *(small(tokens=tokens) for tokens in (1, 7, 8, 9, 63, 100)),
    *(small(dim=dim, tokens=40) for dim in (24, 32, 48)),
    small(dim=80, tokens=40, dtype=torch.float16),
    small(groups=2),
    small(heads=4, groups=2, dtype=torch.float16),
    small(block=24, slots=3),
    small(block=16, slots=16, window=16),
    small(block=32, slots=8, window=33),
    *(small(slots=slots) for slots in (1, 3, 8)),
    *(small(window=window) for window in (8, 999)),
    small(window=1),
    small(view=2),
    small(view=2, window=8, dtype=torch.float16, parts=3),
    small(mixing="convolution", heads=4, groups=2),
    small(mixing="pooling"),
    small(per_group=False, heads=4, groups=2),
    small(one_weight=True),
    small(one_weight=True, per_group=False, mixing="convolution", dtype=torch.float16, batch=2),
    small(stored=6),
    *(small(stored=4, view=view) for view in (4, 1, 99)),
    small(rotary=False),
    small(packed="each", batch=2),
    small(packed="each", batch=2, per_group=False, rotary=False, groups=2),
    small(packed="all", batch=2, dtype=torch.float16, mixing="convolution"),
    small(packed="all", stored=2),
    *(small(memory=memory) for memory in ("fused", "heads first", "features first", "expanded gradient")),
    small(dtype=torch.float16, weight_dtype=torch.float32),
    real(),
    real(dtype=torch.float16),
    real(dtype=torch.float32),
    *(real(tokens=tokens) for tokens in (1, 7, 63, 100, 1000)),
    real(tokens=1000, stored=31),
    *(real(tokens=1000, stored=20, view=view) for view in (20, 2, 99)),
    real(tokens=5000, mixing="convolution", per_group=False),
    *(real(dim=dim) for dim in (32, 48, 80, 96, 128, 256)),
    *(real(dim=dim, dtype=torch.float32, mixing="convolution") for dim in (48, 128, 256)),
    *(real(groups=groups) for groups in (4, 1)),
    real(block=16, window=16),
    real(block=24, slots=3, window=90),
    real(block=128, slots=8, window=128, tokens=1000),
    *(real(slots=slots) for slots in (1, 3, 8, 32)),
    *(real(window=window) for window in (32, 1, 333, 4096)),
    real(view=2),
    real(mixing="convolution"),
    real(mixing="pooling"),
    real(per_group=False),
    real(one_weight=True),
    real(rotary=False),
    real(packed="each"),
    real(packed="each", tokens=1000, view=2, per_group=False),
    real(packed="all", mixing="convolution"),
    real(packed="all", stored=4),
    *(real(memory=memory) for memory in ("fused", "heads first", "features first", "expanded gradient")),
    real(weight_dtype=torch.float32),
]


@pytest.mark.parametrize("case", CASES)
def test_value_and_every_gradient_are_within_the_table(case, kernels, launches, monkeypatch):
    if case.parts:
        monkeypatch.setattr(operators_linformer, "_fold_parts", lambda *_: case.parts)
    check(kernels, case, launches)
    assert ("mix_kernel" in launches) == (case.tokens >= case.block)


@pytest.mark.parametrize(
    "case",
    [small(tokens=100, block=48, slots=48, dtype=torch.float16), real(block=48, slots=48), real(block=96, slots=96)],
)
def test_mixing_to_many_slots_is_a_product_of_pytorch(case, kernels, launches):
    """A tile of tokens that enters more slots than a program can hold: attention alone is fused."""
    check(kernels, case, launches)
    assert "mix_kernel" not in launches


@settings(deadline=None, max_examples=6, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, kernels, launches):
    choices = {
        "groups": (1, 2),
        "block": (8, 12),
        "slots": (1, 3),
        "dim": (16, 20),
        "mixing": ("learned", "convolution"),
    }
    check(kernels, Case(**draw_shape(data, 40, 4, **choices)), launches)


@pytest.mark.gpu
@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_real_shape(data, kernels, launches):
    case = draw_shape(data, 1500, 16, block=(24, 32))
    check(kernels, Case(**asdict(REAL) | case), launches)


def draw_shape(data, longest, stored, **choices):
    """``choices`` of fields whose every value is compiled anew."""
    drawn = {part: data.draw(st.sampled_from(values), part) for part, values in choices.items()}
    return drawn | {
        "tokens": data.draw(st.integers(1, longest), "tokens"),
        "batch": data.draw(st.integers(1, 2), "batch"),
        "view": data.draw(st.integers(1, stored), "view"),
        "window": data.draw(st.integers(2, longest + 10), "window"),
        "packed": data.draw(st.sampled_from(["", "each", "all"]), "packed"),
        "per_group": data.draw(st.booleans(), "per_group"),
        "stored": stored,
    }


def test_loops_over_single_tokens_agree(kernels):
    """An oracle that shares no code: one head, n = 27 of 32 tokens, blocks of 8 with 2 slots, a window of 11."""
    case = Case(tokens=27, heads=1, window=11, stored=4)
    leaves = make_leaves(case)
    del leaves["near"]  # here it is the key, rotated
    truths = {part: leaf.detach().double().cpu().requires_grad_() for part, leaf in leaves.items()}
    position = rotary_angles(torch.arange(case.tokens, device=DEVICE)[None], case.dim, 1e4, torch.float64)
    query, key = (leaves[part].transpose(1, 2) for part in ("query", "key"))
    turned = {"query": rotate(query, position), "near": rotate(key, position)}
    moved = leaves | {part: states.transpose(1, 2) for part, states in turned.items()}
    output = fused(kernels, case, moved, make_grid(case))

    config = {"seq_length": 32, "block_size": 8, "window_size": 11, "causal": True}
    config |= {"position_embedding": "rotary", "rotary_base": 1e4}
    truth = torch.stack(
        reference.head_attention(
            *(list(truths[part][0, :, 0]) for part in ("query", "key", "value")),
            *(lambda j, part=part: truths[part][0, j // 8, j % 8] for part in ("E", "F")),
            k=8,
            config=config,
        )
    )[None, None]
    gradient = output_gradient(case)
    got = torch.autograd.grad(output, list(leaves.values()), gradient)
    expected = torch.autograd.grad(truth, list(truths.values()), gradient.double().cpu())
    got = {part: g.cpu() for part, g in zip(leaves, got, strict=True)}
    assert_within_the_table(case.dtype, output.cpu(), got, truth, dict(zip(truths, expected, strict=True)))


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float32, torch.float64]
)
@pytest.mark.parametrize("dim", [2, 20, pytest.param(64, marks=pytest.mark.gpu), 256])
def test_angles_are_those_of_the_oracle(dim, dtype, kernels):
    """The last bit, where two results lie on different sides of a rounding; float64 by the angle's own last bits."""
    tokens = torch.cat((torch.arange(70), torch.randint(0, 2**20, (63,)), torch.tensor([2**20])))
    for position in (tokens[None], tokens.reshape(2, 67).double() + 0.5):
        position = position.to(DEVICE)
        got = kernels.rotary_angles(position, dim, 1e4, dtype)
        wanted = rotary_angles(position, dim, 1e4, dtype)
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-7, torch.float64: 1e-9}[dtype]
        for one, other in zip(got, wanted, strict=True):
            assert (one.shape, one.dtype) == (other.shape, dtype)
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
            assert (one != other).double().mean() < 0.01 or dtype == torch.float64


def test_angles_are_an_operator(kernels):
    position = torch.arange(50, device=DEVICE).reshape(2, 25)
    library.opcheck(kernels.rotary_angles_op, (position, 16, 1e4, torch.float32))


@pytest.mark.parametrize("case", [small(), small(packed="each"), small(rotary=False, groups=2), real(groups=2)])
def test_a_cache_gets_the_slots_that_were_attended_to(case, kernels, launches):
    """Without a gradient from the kernels, with one from PyTorch; both within the table."""
    leaves, grid = make_leaves(case), make_grid(case)
    truths = {part: leaf.detach().double() for part, leaf in leaves.items()}
    a, true = arguments(case, leaves, grid), arguments(case, truths, grid)
    wanted = attention_linformer.mix_keys_and_values(true.key, true.value, true.weights, true.angles, true.blocks)
    wanted = (oracle(case, truths, grid), *wanted)
    given = (a.query, a.key, a.value, a.weights, a.layout, a.near, a.angles, a.blocks, a.first_block)
    for recorded in (False, True):
        launches.clear()
        with torch.set_grad_enabled(recorded):
            got = kernels.mix_and_attend_with_slots(*given)
        assert launches == ["mix_kernel", "forward_kernel"][recorded:]
        for one, other in zip(got, wanted, strict=True):
            assert one.requires_grad is recorded
            assert relative_error(one, other) < VALUE[case.dtype]
    got[1].sum().backward()  # through a slot


def attention_call(case, past=False):
    """Tensors and layout of `attend_blocks`; ``past``: a window and all visible blocks before the first query."""
    past_tokens, past_blocks = (case.window, case.view) if past else (0, 0)
    tokens, slots = past_tokens + case.tokens, (past_blocks + case.tokens // case.block) * case.slots
    rows = {"query": (case.heads, case.tokens), "key": (case.groups, tokens), "value": (case.groups, tokens)}
    rows |= {"slot key": (case.groups, slots), "slot value": (case.groups, slots)}
    layout = BlockLayout(case.block, case.window, case.slots, case.view, past_tokens, past_blocks)
    tensors = {part: uniform(case, case.batch, *shape, case.dim) for part, shape in rows.items()}
    return tensors, layout


def check_attention(kernels, case, past=False, first_block=None):
    tensors, layout = attention_call(case, past)
    first_block = make_grid(case).first_block_BC if first_block is None else first_block
    leaves = {part: tensor.requires_grad_() for part, tensor in tensors.items()}
    truths = {part: tensor.detach().double().requires_grad_() for part, tensor in tensors.items()}
    output = kernels.attend_blocks(*leaves.values(), layout, first_block)
    truth = attend_blocks_reference(*truths.values(), layout, first_block)[0]
    gradient = output_gradient(case)
    got = torch.autograd.grad(output, list(leaves.values()), gradient)
    expected = torch.autograd.grad(truth, list(truths.values()), gradient.double(), materialize_grads=True)
    named = (dict(zip(leaves, parts, strict=True)) for parts in (got, expected))
    assert_within_the_table(case.dtype, output, next(named), truth, next(named))


@pytest.mark.parametrize(
    "case",
    [
        small(),
        small(slots=0),
        small(slots=0, packed="each", batch=2),
        small(tokens=7),
        small(block=24, slots=3, groups=2, view=1, dtype=torch.float16),
        small(packed="all", batch=2, dtype=torch.float16),
        real(),
        real(slots=0),
        real(slots=0, packed="each"),
        real(tokens=7),
        real(block=24, slots=3, groups=4, view=3, dtype=torch.float16),
        real(packed="all", tokens=1000),
        real(tokens=5000, view=20, groups=1),
        real(dim=256, dtype=torch.float32),
    ],
)
def test_attention_over_given_slots_is_within_the_table(case, kernels, launches):
    check_attention(kernels, case)
    assert {"forward_kernel", "query_gradient_kernel", "token_gradient_kernel"} <= set(launches)
    assert ("slot_gradient_kernel" in launches) == (case.slots > 0 and case.tokens >= case.block)


@pytest.mark.parametrize(
    "case",
    [
        small(tokens=24, batch=2, view=4),
        small(tokens=40, batch=2, view=5, window=7, dtype=torch.float16),
        small(tokens=16, batch=2, slots=0),
        small(tokens=5, batch=2, view=4, groups=2),
        real(tokens=320, view=8),
        real(tokens=64, view=32, window=128, dtype=torch.float16),
        real(tokens=32, slots=0, dtype=torch.float32),
    ],
)
def test_queries_after_a_cache(case, kernels, launches):
    """Rows that remember one and three blocks, as the layers call it with a cache; only without gradients."""
    first_block = torch.tensor([[-1], [-3]], device=DEVICE).expand(-1, -(-case.tokens // case.block))
    tensors, layout = attention_call(case, past=True)
    with torch.no_grad():
        output = kernels.attend_blocks(*tensors.values(), layout, first_block)
    truth = attend_blocks_reference(*(tensor.double() for tensor in tensors.values()), layout, first_block)[0]
    assert relative_error(output, truth) < VALUE[case.dtype]
    assert set(launches) == {"forward_kernel"}
    launches.clear()
    check_attention(kernels, case, True, first_block)
    assert not launches


def gradients_by_name(output, leaves, gradient):
    got = torch.autograd.grad(output, list(leaves.values()), gradient)
    return {"output": output.detach()} | dict(zip(leaves, got, strict=True))


# Queries from 128 on see tokens from 113 and slots of the blocks from 7 on, which are those of the tokens from 112 on:
# r = b, so that row i of slots and token i lie in the same tile, of 64 rows at most.
FAR = {"tokens": 192, "block": 16, "slots": 16, "window": 16, "view": 1}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # NumPy, meant
@pytest.mark.parametrize("case", [small(**FAR), real(**FAR), real(**FAR, dtype=torch.float32)])
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_is_out_of_sight_is_never_read(case, where, kernels):
    """NaN in every row that is whole tiles away: a mask alone would let it through, 0 * NaN is NaN."""
    tensors, layout = attention_call(case)
    gone, kept = (slice(0, 64), slice(128, None)) if where == "before" else (slice(128, None), slice(0, 64))
    gradient, runs = output_gradient(case), []
    for poison in (False, True):
        leaves = {part: tensor.detach().clone() for part, tensor in tensors.items()}
        for tensor in leaves.values():
            tensor[:, :, gone] = float("nan") if poison else 1.0
        leaves = {part: tensor.requires_grad_() for part, tensor in leaves.items()}
        runs.append(gradients_by_name(kernels.attend_blocks(*leaves.values(), layout), leaves, gradient))
    for part, expected in runs[0].items():
        assert expected[:, :, kept].isfinite().all(), part
        assert torch.equal(runs[1][part][:, :, kept], expected[:, :, kept]), part


UNWRITTEN = [
    small(stored=20),
    small(packed="each", batch=2, dtype=torch.float16, dim=24),
    small(tokens=7),
    small(parts=3, tokens=100, view=3),
    real(),
    real(dim=80, packed="each"),
    real(tokens=7),
    real(tokens=5000, mixing="convolution"),
]


@pytest.mark.parametrize("case", UNWRITTEN)
def test_every_result_is_written(case, kernels, monkeypatch, request):
    """And so are all tensors between the kernels: the same bits when memory is NaN to begin with."""
    if case.parts:
        monkeypatch.setattr(operators_linformer, "_fold_parts", lambda *_: case.parts)
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    clean = gradients_by_name(fused(kernels, case, leaves, grid), leaves, gradient)
    request.getfixturevalue("poisoned_memory")
    assert torch.empty(3, device=DEVICE).isnan().all()
    poisoned = gradients_by_name(fused(kernels, case, leaves, grid), leaves, gradient)
    for part, expected in clean.items():
        assert expected.isfinite().all(), part
        assert torch.equal(poisoned[part], expected), part


@pytest.mark.parametrize(
    "case",
    [
        small(packed="each", batch=2),
        real(tokens=1000),
        real(tokens=1000, packed="each"),
        real(tokens=5000, mixing="convolution", per_group=False, groups=1),
        real(dtype=torch.float32, dim=128, mixing="convolution"),
    ],
)
def test_two_runs_give_the_same_bits(case, kernels):
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    first, *others = (gradients_by_name(fused(kernels, case, leaves, grid), leaves, gradient) for _ in range(RUNS))
    for again in others:
        assert all(torch.equal(again[part], expected) for part, expected in first.items())


def test_heads_may_lie_further_apart_than_32_bits_count(kernels):
    """Three heads, 2^30 numbers from one to the next: the last starts at 2^31. Most of the memory is never touched."""
    case = Case(heads=3, groups=3, dtype=torch.float16, rotary=False)
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    apart, size = 2**30, case.tokens * case.dim
    storage = torch.empty(2 * apart + 3 * size, dtype=case.dtype, device=DEVICE)
    far = dict(leaves)
    for number, part in enumerate(("query", "key", "value")):
        view = storage[number * size :].as_strided((1, 3, case.tokens, case.dim), (size, apart, case.dim, 1))
        far[part] = view.copy_(leaves[part].detach().transpose(1, 2)).transpose(1, 2).detach().requires_grad_()
    near, away = (gradients_by_name(fused(kernels, case, x, grid), x, gradient) for x in (leaves, far))
    assert all(torch.equal(away[part], expected) for part, expected in near.items())


def test_linux_has_triton():
    """Or the tests of the kernels would all be skipped, and nobody would know: make setup installs it."""
    assert sys.platform != "linux" or linpass.kernels_linformer.triton is not None


def test_a_second_derivative_is_refused(kernels):
    """The gradients have no graph: better no gradient than zero."""
    case = Case(tokens=20)
    leaves = make_leaves(case)
    output = fused(kernels, case, leaves, make_grid(case))
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable|not have been used"):
        torch.autograd.grad(gradient.square().sum(), leaves["key"])


@pytest.mark.parametrize("case", [small(batch=2), real(tokens=1000), real(tokens=5000, mixing="convolution")])
def test_a_row_alone_gives_the_same_bits(case, kernels):
    """Output and gradient of the queries always; of keys and values where slots are not summed in parts.

    How many parts there are depends on the rows of the batch, from 2048 tokens on. E and F sum over the batch.
    """
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    whole = gradients_by_name(fused(kernels, case, leaves, grid), leaves, gradient)
    alone = {part: leaf if part in "EF" else leaf.detach()[:1].requires_grad_() for part, leaf in leaves.items()}
    row = gradients_by_name(fused(kernels, case, alone, grid), alone, gradient[:1])
    for part in ("output", "query", "near") + (("key", "value") if case.tokens < 2048 else ()):
        assert torch.equal(row[part], whole[part][:1]), part


@pytest.mark.parametrize(
    ("case", "places"),
    [
        (Case(tokens=45), (0, 6, 7, 8, 31, 44)),
        (Case(tokens=45, packed="each", batch=2, dtype=torch.float16), (23, 24, 39)),
        pytest.param(REAL, (0, 30, 31, 32, 255, 256, 300, 319, 332), marks=pytest.mark.gpu),
        pytest.param(Case(**asdict(REAL) | {"packed": "each"}), (95, 96, 127, 300), marks=pytest.mark.gpu),
    ],
    ids=["small", "small-packed", "real", "real-packed"],
)
def test_nothing_of_the_future_enters(case, places, kernels):
    """Exact zeros: by later tokens, by weights of blocks that are not complete; equal bits after they changed."""
    leaves, grid = make_leaves(case), make_grid(case)
    numbers = grid.block_numbers(case.block)
    output = fused(kernels, case, leaves, grid)
    for t in places:
        loss = output[:, :, t].float().sum()
        got = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))
        for part in ("query", "key", "value", "near"):
            assert not got[part][:, t + 1 :].any(), (part, t)
        assert got["value"][:, t].any(-1).all()
        assert not got["query"][:, :t].any()
        complete = torch.arange((t + 1) // case.block, device=DEVICE)
        if numbers is not None:
            complete = numbers[:, : (t + 1) // case.block].flatten()
        unseen = torch.ones(case.stored, dtype=torch.bool, device=DEVICE)
        unseen[complete] = False
        for part in ("E", "F"):
            assert not got[part][:, unseen].any(), (part, t)
            if numbers is None and t + 1 >= case.block:
                assert got[part][:, ~unseen].flatten(2).any(-1).all(), (part, t)
    t = places[-2]
    changed = {part: leaf.detach().clone() for part, leaf in leaves.items()}
    for part in ("query", "key", "value", "near"):
        changed[part][:, t + 1 :] += 1
    with torch.no_grad():
        assert torch.equal(fused(kernels, case, changed, grid)[:, :, : t + 1], output[:, :, : t + 1])


def test_weights_of_blocks_that_nobody_sees_have_no_gradient(kernels):
    """Block 6 is not complete, 7 and 8 hold no token."""
    case = Case()
    leaves = make_leaves(case)
    got = gradients_by_name(fused(kernels, case, leaves, make_grid(case)), leaves, output_gradient(case))
    for part in ("E", "F"):
        assert got[part][:, :6].flatten(2).any(-1).all()
        assert not got[part][:, 6:].any()


def test_weights_of_another_precision_are_rounded_before_the_mixing(kernels, recorded_launches):
    """As under autocast. A kernel that rounds them, tile by tile, is slower by far."""

    def dtypes(kernel, tensors):
        is_mixing = kernel is operators_linformer.kernels.mix_kernel
        return [tensor.dtype for tensor in tensors[:4]] if is_mixing else None

    given = recorded_launches(dtypes)
    case = Case(dtype=torch.float16, weight_dtype=torch.float32)
    leaves, grid = make_leaves(case), make_grid(case)
    rounded = {part: leaf.detach().half() for part, leaf in leaves.items()}
    output, exact = (fused(kernels, case, each, grid) for each in (leaves, rounded))
    assert given == [[torch.float16] * 4] * 2
    assert torch.equal(output, exact)
    output.sum().backward()
    assert leaves["E"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    "case", [small(dtype=torch.float64), small(dim=300, tokens=20), small(dim=8), small(batch=65536, tokens=1)]
)
def test_calls_that_no_kernel_takes_are_those_of_pytorch(case, kernels, launches):
    check_fallback(kernels, case)
    assert not launches


def test_without_triton_all_is_pytorch(kernels, launches, monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    check_fallback(kernels, Case())
    assert not launches


def test_on_a_cpu_all_is_pytorch(monkeypatch):
    """Outside of the interpreter."""
    monkeypatch.setitem(globals(), "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(operators_linformer, "launch", None)
    check_fallback(linpass.kernels_linformer, Case())


def check_fallback(kernels, case):
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    got = gradients_by_name(fused(kernels, case, leaves, grid), leaves, gradient)
    expected = gradients_by_name(fused(attention_linformer, case, leaves, grid), leaves, gradient)
    for part, wanted in expected.items():
        assert relative_error(got[part], wanted) < (VALUE if part == "output" else GRADIENT)[case.dtype], part
    tensors, layout = attention_call(case)
    leaves = {part: tensor.requires_grad_() for part, tensor in tensors.items()}
    got = gradients_by_name(kernels.attend_blocks(*leaves.values(), layout), leaves, gradient)
    expected = gradients_by_name(attention_linformer.attend_blocks(*leaves.values(), layout), leaves, gradient)
    for part, wanted in expected.items():
        assert relative_error(got[part], wanted) < (VALUE if part == "output" else GRADIENT)[case.dtype], part


def model_call(projection, dtype=torch.float32, **changes):
    fields = {"embed_dim": 128, "heads": 4, "seq_length": 256, "k": 32, "block_size": 32, "window_size": 64} | changes
    config = LinformerConfig(
        vocab_size=100, depth=2, projection=projection, position_embedding="rotary", rank=None, dropout=0.0, **fields
    )
    model = LinformerForCausalLM(config).to(DEVICE, dtype)
    return model, torch.randint(0, 100, (2, config.seq_length - 6), device=DEVICE)


def check_model(model, ids, launches, autocast=None):
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        logits = model(ids, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    backward = ("query_gradient_kernel", "slot_gradient_kernel", "token_gradient_kernel")
    assert launches == ["mix_kernel", "forward_kernel"] * 2 + [*backward] * 2
    launches.clear()
    half = ids.shape[1] // 2
    with torch.no_grad():
        past = model(ids[:, :half], use_cache=True).past_key_values
        model(ids[:, half:], past_key_values=past)
    assert launches == ["mix_kernel", "forward_kernel"] * 2 + ["forward_kernel"] * 2


@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value", "layerwise"])
def test_models_take_the_kernels(sharing, kernels, launches):
    changes = {"embed_dim": 32, "heads": 2, "seq_length": 32, "k": 8, "block_size": 8, "window_size": 12}
    check_model(*model_call("learned", projection_sharing=sharing, **changes), launches)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.float32, torch.bfloat16)],
    ids=["bfloat16", "float16", "float32", "autocast"],
)
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_real_models_take_the_kernels(projection, dtype, autocast, kernels, launches):
    check_model(*model_call(projection, dtype), launches, autocast)


@dataclass(frozen=True)
class Encoder:
    """One call of `attend_slots`. Queries and slots take two tiles each."""

    tokens: int = 50
    slots: int = 40
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    groups: int = 1
    dim: int = 16
    count: tuple[int, ...] | None = None
    memory: str = "tokens first"
    parts: int = 0


def both_ways(**changes):
    return pytest.param(Encoder(**changes), id=name(changes))


def real_both_ways(**changes):
    fields = {"tokens": 333, "slots": 256, "dtype": torch.bfloat16, "heads": 4, "groups": 2, "dim": 64} | changes
    return pytest.param(Encoder(**fields), id="real-" + name(changes), marks=pytest.mark.gpu)


def make_slots(case):
    """Query, slot key, slot value, as leaves by name, and the count."""
    leaves = {}
    for part, heads, rows in (
        ("query", case.heads, case.tokens),
        ("slot key", case.groups, case.slots),
        ("slot value", case.groups, case.slots),
    ):
        leaves[part] = in_memory(case, case.batch, heads, rows, case.dim).requires_grad_()
    return leaves, None if case.count is None else torch.tensor(case.count, device=DEVICE)


def over_slots(attend, case, leaves, count):
    return attend(*(as_called(case, leaf) for leaf in leaves.values()), count)


def oracle_over_slots(query, slot_key, slot_value, count):
    return attend_visible(query, slot_key, slot_value, None if count is None else held_slots(count, slot_key.shape[2]))[
        0
    ]


def check_slots(kernels, case, launches, stretch=1.0):
    leaves, count = make_slots(case)
    if stretch != 1:  # all scores far below zero
        with torch.no_grad():
            leaves["query"].abs_().mul_(stretch)
            leaves["slot key"].abs_().neg_()
    truths = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    gradient = output_gradient(case)
    got = gradients_by_name(over_slots(kernels.attend_slots, case, leaves, count), leaves, gradient)
    expected = gradients_by_name(over_slots(oracle_over_slots, case, truths, count), truths, gradient.double())
    assert launches == ["forward_kernel", "query_gradient_kernel", "slot_gradient_kernel"]
    assert_within_the_table(case.dtype, got["output"], got, expected.pop("output"), expected)


@pytest.mark.parametrize(
    "case",
    [
        both_ways(),
        both_ways(dtype=torch.float16),
        *(both_ways(tokens=tokens, batch=1) for tokens in (1, 7, 63, 100)),
        *(both_ways(slots=slots, batch=1) for slots in (1, 7, 32, 63, 100)),
        *(both_ways(dim=dim, batch=1) for dim in (24, 48)),
        both_ways(dim=80, batch=1, dtype=torch.float16),
        both_ways(groups=2),
        both_ways(heads=4, groups=2, dtype=torch.float16, count=(40, 17)),
        both_ways(count=(1, 32)),
        both_ways(count=(7,)),
        both_ways(parts=3, tokens=100, count=(33, 2)),
        *(both_ways(memory=memory) for memory in ("heads first", "features first", "expanded gradient")),
        real_both_ways(),
        real_both_ways(dtype=torch.float16),
        real_both_ways(dtype=torch.float32),
        *(real_both_ways(tokens=tokens) for tokens in (1, 7, 63, 100, 333, 512, 1000, 5000)),
        *(real_both_ways(slots=slots) for slots in (1, 7, 63, 100, 128, 333, 512)),
        real_both_ways(tokens=5000, batch=1, heads=2, slots=100),
        *(real_both_ways(dim=dim) for dim in (16, 32, 48, 80, 96, 128, 256)),
        *(real_both_ways(dim=dim, slots=100, count=(3, 99)) for dim in (32, 128, 256)),
        *(real_both_ways(dim=dim, dtype=torch.float32) for dim in (48, 128, 256)),
        *(real_both_ways(groups=groups) for groups in (4, 1)),
        real_both_ways(count=(256, 17)),
        real_both_ways(count=(1, 64), tokens=5000),
        real_both_ways(count=(100,)),
        *(real_both_ways(memory=memory) for memory in ("heads first", "features first", "expanded gradient")),
    ],
)
def test_attention_over_all_slots_is_within_the_table(case, kernels, launches, monkeypatch):
    if case.parts:
        monkeypatch.setattr(operators_linformer, "_fold_parts", lambda *_: case.parts)
    check_slots(kernels, case, launches)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # NumPy, meant
@pytest.mark.parametrize(
    "case",
    [
        both_ways(slots=33, count=(33, 5), dtype=torch.float16),
        both_ways(tokens=33, slots=33, dtype=torch.float16),
        real_both_ways(slots=100, count=(70, 5), dtype=torch.float16),
        real_both_ways(slots=100, tokens=100, dtype=torch.float16),
    ],
)
def test_scores_far_below_zero(case, kernels, launches):
    """The rows that fill a tile up have scores of 0: their probabilities would overflow."""
    check_slots(kernels, case, launches, stretch=40.0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # NumPy, meant
@pytest.mark.parametrize(
    "case",
    [both_ways(slots=70, count=(33, 2), parts=2), real_both_ways(count=(100, 7)), real_both_ways(count=(1, 256))],
)
def test_slots_behind_the_count_are_never_read(case, kernels, monkeypatch, request):
    """NaN there, and in memory to begin with; and two more runs: the same bits, gradients of zero."""
    if case.parts:
        monkeypatch.setattr(operators_linformer, "_fold_parts", lambda *_: case.parts)
    leaves, count = make_slots(case)
    gradient, runs = output_gradient(case), []
    for poison in (False, True, True):
        if poison:
            request.getfixturevalue("poisoned_memory")
            with torch.no_grad():
                for part in ("slot key", "slot value"):
                    for row, held in zip(leaves[part], case.count, strict=True):
                        row[held:] = float("nan")
        runs.append(gradients_by_name(over_slots(kernels.attend_slots, case, leaves, count), leaves, gradient))
    for part, expected in runs[0].items():
        assert expected.isfinite().all(), part
        assert all(torch.equal(run[part], expected) for run in runs[1:]), part
    for part in ("slot key", "slot value"):
        for row, held in zip(runs[0][part], case.count, strict=True):
            assert not row[held:].any()
            assert row[:held].flatten(1).any(-1).all()


@pytest.mark.parametrize(
    "case",
    [
        both_ways(),
        *(real_both_ways(tokens=tokens, slots=slots) for tokens, slots in ((512, 128), (333, 100), (9000, 512))),
    ],
)
def test_two_runs_over_all_slots_give_the_same_bits(case, kernels, poisoned_memory):
    leaves, count = make_slots(case)
    gradient = output_gradient(case)
    first, *others = (
        gradients_by_name(over_slots(kernels.attend_slots, case, leaves, count), leaves, gradient) for _ in range(RUNS)
    )
    for part, expected in first.items():
        assert expected.isfinite().all(), part
        assert all(torch.equal(again[part], expected) for again in others), part


@pytest.mark.parametrize(
    "case",
    [
        both_ways(dtype=torch.float64, count=(40, 3), groups=2),
        both_ways(dtype=torch.float64, heads=4, groups=2),
        both_ways(dim=8),
        both_ways(dim=300, tokens=5),
    ],
)
def test_slots_that_no_kernel_takes(case, kernels, launches):
    leaves, count = make_slots(case)
    truths = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    gradient = output_gradient(case)
    got = gradients_by_name(over_slots(kernels.attend_slots, case, leaves, count), leaves, gradient)
    expected = gradients_by_name(over_slots(oracle_over_slots, case, truths, count), truths, gradient.double())
    assert_within_the_table(case.dtype, got["output"], got, expected.pop("output"), expected)
    assert not launches


@dataclass(frozen=True)
class Row:
    """One call of `mix_sequence_and_attend`. Queries and slots take two tiles each."""

    tokens: int = 50
    stored: int = 60  # rows of E and F
    slots: int = 40
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 2
    groups: int = 1
    dim: int = 16
    per_group: bool = False  # every group has weights of its own
    one_weight: bool = False  # E is F
    weight_dtype: torch.dtype | None = None
    rotary: bool = True
    memory: str = "tokens first"  # or fused: of one projection; or keys and values "shared by" heads, rows
    weights: str = "whole"  # or slices, turned: parts of larger tensors
    parts: int = 0


def row(**changes):
    return pytest.param(Row(**changes), id=name(changes))


def real_row(**changes):
    fields = {"tokens": 333, "stored": 512, "slots": 128, "dtype": torch.bfloat16, "heads": 4, "groups": 2, "dim": 64}
    return pytest.param(Row(**fields | changes), id="real-" + name(changes), marks=pytest.mark.gpu)


def make_row(case):
    """Leaves by name, and cos and sin of the slots."""
    leaves, heads = {}, {"query": case.heads, "key": case.groups, "value": case.groups}
    if case.memory == "fused":
        leaves["projected"] = uniform(case, case.batch, case.tokens, sum(heads.values()) * case.dim)
        heads = {}
    for part, count in heads.items():
        shared = case.memory if part != "query" else ""
        rows = 1 if shared == "shared by rows" else case.batch
        count = 1 if shared == "shared by heads" else count
        leaves[part] = in_memory(case, rows, count, case.tokens, case.dim)
    size = [case.groups if case.per_group else 1, case.stored, case.slots]
    if case.weights != "whole":
        size = [size[0], case.stored + 3, case.slots + 5]
    if case.weights == "turned":
        size[1:] = size[:0:-1]
    for part in ("E",) if case.one_weight else ("E", "F"):
        leaves[part] = (uniform(case, *size) / case.tokens**0.5).to(case.weight_dtype or case.dtype)
    leaves = {part: leaf.requires_grad_() for part, leaf in leaves.items()}
    if not case.rotary:
        return leaves, None
    return leaves, rotary_angles(sequence_centres(case.stored, case.slots, DEVICE), case.dim, 1e4, case.dtype)


def row_arguments(case, leaves, angles):
    """Arguments of `mix_sequence_and_attend`, from the leaves; in their dtype."""
    if case.memory == "fused":
        states = split_projection(case, leaves["projected"])
    else:
        query, *mixed = (as_called(case, leaves[part]) for part in ("query", "key", "value"))
        states = (query, *(each.expand(case.batch, case.groups, -1, -1) for each in mixed))
    weights = [leaves[part] for part in ("E", "F") if part in leaves]
    if case.weights == "turned":
        weights = [weight.mT for weight in weights]
    if case.weights != "whole":  # rows from 2 on, slots from 3 on
        weights = [weight[:, 2 : 2 + case.stored, 3 : 3 + case.slots] for weight in weights]
    return *states, (weights[0], weights[-1]), angles


def over_row(attend, case, leaves, angles):
    return attend(*row_arguments(case, leaves, angles))


def oracle_over_row(query, key, value, weights, angles):
    both = min(key.shape[2], weights[0].shape[1])
    slot_key, slot_value = (
        weight[:, :both].transpose(1, 2).to(states.dtype) @ states[:, :, :both]
        for states, weight in zip((key, value), weights, strict=True)
    )
    return attend_visible(query, slot_key if angles is None else rotate(slot_key, angles), slot_value)[0]


def check_row(kernels, case):
    leaves, angles = make_row(case)
    truths = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    gradient = output_gradient(case)
    got = gradients_by_name(over_row(kernels.mix_sequence_and_attend, case, leaves, angles), leaves, gradient)
    angles = angles and tuple(part.double() for part in angles)
    expected = gradients_by_name(over_row(oracle_over_row, case, truths, angles), truths, gradient.double())
    for part, leaf in leaves.items():
        assert got[part].dtype == leaf.dtype, part
    assert_within_the_table(case.dtype, got["output"], got, expected.pop("output"), expected)
    return got


@pytest.mark.parametrize(
    "case",
    [
        row(),
        row(dtype=torch.float16),
        row(per_group=True, groups=2, heads=4),
        row(per_group=True, groups=2, dtype=torch.float16, one_weight=True),
        row(rotary=False),
        row(rotary=False, per_group=True, groups=2, batch=1),
        row(one_weight=True, groups=2, slots=8),
        row(one_weight=True, batch=1, rotary=False),
        *(row(tokens=tokens, batch=1) for tokens in (1, 7, 60)),
        row(tokens=63),
        row(tokens=61, per_group=True, groups=2, one_weight=True),
        *(row(slots=slots) for slots in (2, 33)),
        row(dim=24, batch=1),
        row(parts=3, tokens=100, dtype=torch.float16),
        row(dtype=torch.float16, weight_dtype=torch.float32),
        *(row(memory=memory, groups=2, batch=1) for memory in ("heads first", "features first", "expanded gradient")),
        row(memory="features first", per_group=True, groups=2),
        *(row(memory="fused", groups=2, per_group=sets, rotary=sets) for sets in (False, True)),
        row(memory="fused", groups=2, tokens=63, heads=4, one_weight=True, dtype=torch.float16),
        *(row(memory=memory, groups=2, rotary=False) for memory in ("shared by heads", "shared by rows")),
        *(row(weights=weights, groups=2, rotary=False) for weights in ("slices", "turned")),
        row(weights="turned", memory="fused", groups=2, tokens=63, rotary=False),
        row(weights="slices", memory="fused", groups=2, per_group=True, rotary=False),
        real_row(),
        real_row(dtype=torch.float16),
        real_row(dtype=torch.float32),
        *(real_row(per_group=True, tokens=tokens) for tokens in (333, 513, 5000)),
        *(real_row(tokens=tokens) for tokens in (1, 7, 512, 513, 5000)),
        *(real_row(slots=slots, rotary=False) for slots in (2, 63, 100, 512)),
        *(real_row(dim=dim) for dim in (32, 48, 128, 256)),
        real_row(one_weight=True, batch=1),
        real_row(weight_dtype=torch.float32),
        *(real_row(memory=memory) for memory in ("heads first", "features first", "expanded gradient")),
        *(real_row(memory="fused", per_group=sets) for sets in (False, True)),
        real_row(memory="fused", tokens=513, one_weight=True),
        *(real_row(memory=memory) for memory in ("shared by heads", "shared by rows")),
        *(real_row(weights=weights, memory="fused") for weights in ("slices", "turned")),
    ],
)
def test_mixing_a_row_and_attention_are_within_the_table(case, kernels, launches, monkeypatch):
    """Gradients of keys and values lie in memory as their projections want them, whatever the weights."""
    if case.parts:
        monkeypatch.setattr(operators_linformer, "_fold_parts", lambda *_: case.parts)
    got = check_row(kernels, case)
    assert launches == ["forward_kernel", "query_gradient_kernel", "slot_gradient_kernel"]
    if case.memory == "tokens first":
        assert all(got[part].is_contiguous() for part in ("query", "key", "value"))
        for part in ("key", "value"):
            assert not got[part][:, case.stored :].any()
    for part in {"E", "F"} & got.keys() if case.weights == "whole" else ():
        assert not got[part][:, case.tokens :].any()


@pytest.mark.parametrize("case", [row(dtype=torch.float64), row(dim=8, per_group=True), row(dim=300, tokens=5)])
def test_rows_that_no_kernel_takes(case, kernels, launches):
    check_row(kernels, case)
    assert not launches


@pytest.mark.parametrize(
    "case",
    [
        row(tokens=20, slots=8),
        row(tokens=20, slots=8, per_group=True, groups=2),
        real_row(),
        real_row(per_group=True),
        real_row(tokens=9000),
    ],
)
def test_weights_that_are_fixed_change_no_other_gradient(case, kernels, poisoned_memory):
    """Nor do further runs, nor NaN in memory to begin with: the same bits."""
    leaves, angles = make_row(case)
    gradient = output_gradient(case)
    fixed = leaves | {part: leaves[part].detach() for part in ("E", "F")}
    states = {part: leaves[part] for part in ("query", "key", "value")}
    first, *others = (
        gradients_by_name(over_row(kernels.mix_sequence_and_attend, case, leaves, angles), leaves, gradient)
        for _ in range(RUNS)
    )
    others.append(gradients_by_name(over_row(kernels.mix_sequence_and_attend, case, fixed, angles), states, gradient))
    assert others[-1].keys() < first.keys()
    for again in others:
        for part, found in again.items():
            assert found.isfinite().all(), part
            assert torch.equal(found, first[part]), part


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [real_row(dtype=torch.float32), real_row(dtype=torch.float32, per_group=True)])
def test_a_row_under_autocast(case, dtype, kernels, launches):
    """Products in the low precision; gradients in float32, within the table of the low one."""
    leaves, angles = make_row(case)
    truths = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    gradient = output_gradient(case).to(dtype)
    with torch.autocast(DEVICE.type, dtype):
        output = over_row(kernels.mix_sequence_and_attend, case, leaves, angles)
    got = gradients_by_name(output, leaves, gradient)
    assert {got[part].dtype for part in leaves} == {torch.float32}
    angles = tuple(part.double() for part in angles)
    expected = gradients_by_name(over_row(oracle_over_row, case, truths, angles), truths, gradient.double())
    assert_within_the_table(dtype, output, got, expected.pop("output"), expected)
    assert launches == ["forward_kernel", "query_gradient_kernel", "slot_gradient_kernel"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in (Row(batch=2, groups=2), Row(per_group=True, groups=2))),
        pytest.param(Row(333, 512, 128, heads=4, groups=2, dim=64), torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(
            Row(333, 512, 128, torch.bfloat16, heads=4, groups=2, dim=64), torch.float16, marks=pytest.mark.gpu
        ),
    ],
)
def test_a_backward_pass_inside_autocast_keeps_its_dtype(case, dtype, kernels):
    """Of a forward pass outside: the same bits as outside."""
    leaves, angles = make_row(case)
    gradient = output_gradient(case)
    outside, inside = (over_row(kernels.mix_sequence_and_attend, case, leaves, angles) for _ in range(2))
    wanted = gradients_by_name(outside, leaves, gradient)
    with torch.autocast(DEVICE.type, dtype):
        got = gradients_by_name(inside, leaves, gradient)
    for part, expected in wanted.items():
        assert got[part].dtype == expected.dtype, part
        assert torch.equal(got[part], expected), part


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize("how", ["a row", "blocks", "blocks, rotated", "given slots", "given blocks"])
def test_one_tensor_may_be_keys_and_values_in_a_compiled_graph(how, kernels):
    torch.compiler.reset()
    query, key = (torch.randn(1, 16, heads, 16, device=DEVICE).transpose(1, 2).requires_grad_() for heads in (2, 1))
    row_weight, block_weight = (
        torch.randn(*size, device=DEVICE).requires_grad_() for size in ((1, 16, 4), (1, 1, 8, 2))
    )
    layout = BlockLayout(8, 12, 2, 99)
    calls = {
        "a row": lambda: kernels.mix_sequence_and_attend(query, key, key, (row_weight, row_weight)),
        "blocks": lambda: kernels.mix_and_attend(query, key, key, (block_weight, block_weight), layout),
        "blocks, rotated": lambda: kernels.mix_and_attend(query, key, key, (block_weight, block_weight), layout, key),
        "given slots": lambda: kernels.attend_slots(query, key, key),
        "given blocks": lambda: kernels.attend_blocks(query, key, key, key[:, :, :4], key[:, :, :4], layout),
    }
    runs = []
    for call in (calls[how], torch.compile(calls[how], fullgraph=True, backend="aot_eager")):
        output = call()
        runs.append([output, *torch.autograd.grad(output, [query, key], torch.ones_like(output))])
    for one, other in zip(*runs, strict=True):
        if how == "a row":  # mixed by other calls of the same products
            assert relative_error(other, one) < GRADIENT[torch.float32]
        else:
            assert torch.equal(one, other)


def test_the_opposite_angles_turn_a_gradient_back():
    states = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_angles(torch.arange(5)[None] + 0.5, 8, 1e4, torch.float64)
    gradient = torch.randn_like(states)
    (wanted,) = torch.autograd.grad(rotate(states, (cos, sin)), states, gradient)
    torch.testing.assert_close(rotate(gradient, (cos, -sin)), wanted, rtol=0, atol=ORACLE)


class Dispatches(TorchDispatchMode):
    """Names of the operators that a caller calls and waits for, one after the other."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("per_group", [False, True])
def test_mixing_a_row_and_attention_are_one_call_each_way(per_group, kernels):
    """Of a short row the caller's time is the time of a step."""
    case = Row(tokens=20, slots=8, groups=2, per_group=per_group)
    leaves, angles = make_row(case)
    with Dispatches() as calls:
        output = kernels.mix_sequence_and_attend(
            *(leaves[part].transpose(1, 2) for part in ("query", "key", "value")), (leaves["E"], leaves["F"]), angles
        )
        torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))
    ours = [call for call in calls.names if call.startswith("linpass")]
    assert ours == [f"{kernels.mix_sequence_and_attend_op}", f"{kernels.mix_sequence_and_attend_backward_op}"]
    views = {"aten.transpose.int", "aten.detach.default", "aten.ones_like.default"}
    assert set(calls.names) <= views | set(ours)


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize("case", [row(groups=2), row(groups=2, per_group=True), real_row(), real_row(per_group=True)])
def test_a_compiled_graph_has_the_mixing_apart(case, kernels, launches, monkeypatch):
    """Where it can be joined with what stands beside it; attention over the slots stays a kernel."""
    torch.compiler.reset()
    monkeypatch.setattr(kernels, "_MixSequenceAndAttend", None)
    with pytest.raises(AttributeError):
        check_row(kernels, case)
    attend = torch.compile(kernels.mix_sequence_and_attend, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(kernels, "mix_sequence_and_attend", attend)
    check_row(kernels, case)
    assert launches == ["forward_kernel", "query_gradient_kernel", "slot_gradient_kernel"]


@pytest.mark.parametrize(
    "case",
    [
        row(tokens=7, stored=9, slots=3, groups=2),
        row(tokens=7, stored=9, slots=3, rotary=False, dtype=torch.float16),
        row(tokens=7, stored=9, slots=3, groups=2, per_group=True),
        row(tokens=9, stored=7, slots=3, groups=2, per_group=True, batch=1, rotary=False),
        row(tokens=9, stored=7, slots=3, memory="features first"),
        *(row(tokens=7, stored=9, slots=3, groups=2, memory="fused", per_group=sets) for sets in (False, True)),
        *(row(tokens=7, stored=9, slots=3, groups=2, memory=f"shared by {what}") for what in ("heads", "rows")),
        *(row(tokens=7, stored=9, slots=3, groups=2, weights=weights) for weights in ("slices", "turned")),
        real_row(),
        real_row(per_group=True),
        *(real_row(memory="fused", per_group=sets) for sets in (False, True)),
        real_row(memory="fused", weights="turned"),
    ],
)
def test_the_operators_of_a_row_keep_their_promises(case, kernels):
    """Schema, and shapes, dtypes and strides that torch.compile is told."""
    leaves, angles = make_row(case)
    leaves = {part: leaf.detach() for part, leaf in leaves.items()}
    *states, weights, angles = row_arguments(case, leaves, angles)
    arguments = (*states, *weights, *(angles or (None, None)))
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    library.opcheck(kernels.mix_sequence_and_attend_op, arguments, **tests)
    results = kernels.mix_sequence_and_attend_op(*arguments)
    for needs_weight in (True, False):
        backward = (output_gradient(case), *arguments, *results, needs_weight)
        library.opcheck(kernels.mix_sequence_and_attend_backward_op, backward, **tests)


def encoder_call(projection, **changes):
    """Model, tokens, and a mask that pads the second row on the left."""
    fields = {"embed_dim": 128, "heads": 4, "seq_length": 256, "k": 32, "position_embedding": "rotary"} | changes
    config = LinformerConfig(
        vocab_size=100, depth=2, causal=False, projection=projection, rank=None, dropout=0.0, tie_word_embeddings=False,
        block_size=8, window_size=8, **fields,
    )  # fmt: skip
    model = LinformerForMaskedLM(config).to(DEVICE).eval()
    ids = torch.randint(0, 100, (2, config.seq_length - 6), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] * 2 // 3] = 0
    return model, ids, mask


def check_encoder(projection, launches, mask_given, **changes):
    """Logits and gradients against the same model in float64, with all scores in memory."""
    model, ids, mask = encoder_call(projection, **changes)
    oracle_model = copy.deepcopy(model).double()
    oracle_model.set_attn_implementation("eager")
    runs = []
    for each in (model, oracle_model):
        logits = each(ids, attention_mask=mask if mask_given else None).logits
        logits = logits * mask[..., None] if mask_given else logits
        logits.square().mean().backward()
        gradients = {part: parameter.grad for part, parameter in each.named_parameters() if parameter.grad is not None}
        runs.append({"logits": logits.detach()} | gradients)
    assert launches == ["forward_kernel"] * 2 + ["query_gradient_kernel", "slot_gradient_kernel"] * 2
    got, expected = runs
    assert got.keys() == expected.keys()
    for part, wanted in expected.items():  # two layers: errors of the parts around attention add to its own
        assert relative_error(got[part], wanted) < 4 * GRADIENT[torch.float32], part


@pytest.mark.parametrize("mask_given", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_encoders_take_the_kernels(projection, mask_given, kernels, launches):
    fields = {"embed_dim": 32, "heads": 2, "seq_length": 64, "k": 16, "projection_sharing": "none"}
    check_encoder(projection, launches, mask_given, **fields)


@pytest.mark.gpu
@pytest.mark.parametrize("mask_given", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("sharing", ["none", "key-value", "layerwise"])
@pytest.mark.parametrize("projection", ["learned", "convolution", "pooling"])
def test_real_encoders_take_the_kernels(projection, sharing, mask_given, kernels, launches):
    fields = {"seq_length": 512, "k": 64, "num_key_value_heads": 2, "projection_sharing": sharing}
    check_encoder(projection, launches, mask_given, **fields)
