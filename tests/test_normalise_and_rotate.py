"""Norm and rotation of queries and keys as one kernel each way: against the functions of PyTorch in float64.

Without a CUDA device small cases run in Triton's interpreter, which has no bfloat16.
"""

from dataclasses import asdict, dataclass

import pytest
import torch
from tolerances import GRADIENT, ORACLE, VALUE, relative_error
from torch import library

from linpass import LinformerForCausalLM, LinformerForMaskedLM, attention_linformer, operators_linformer
from linpass.attention_linformer import rotary_angles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """Three rows of 37 tokens; with heads of 16 a program holds 128 of them."""

    tokens: int = 37
    dtype: torch.dtype = torch.float32
    batch: int = 3
    heads: int = 4
    groups: int = 2
    dim: int = 16
    norm: bool = True
    rotary: bool = True
    rotates_key: bool = True
    angles: str = "shared"  # by the rows; or each row its own, or more of them than tokens
    angle_dtype: torch.dtype | None = None
    memory: str = "own"  # or "fused": slices of one tensor; or "strided": every other feature
    scale: float = 1.0


SMALL = [
    {},
    {"dtype": torch.float16},
    *({"tokens": tokens, "batch": 1} for tokens in (2, 128, 129)),
    *({"dim": dim} for dim in (18, 32, 34, 64)),
    {"dim": 256, "tokens": 9, "batch": 1},
    {"norm": False},
    {"rotary": False},
    {"rotary": False, "dim": 17},
    {"rotates_key": False},
    {"norm": False, "rotates_key": False},
    {"groups": 4, "angles": "each its own"},
    {"angles": "longer", "norm": False},
    {"dtype": torch.float16, "angle_dtype": torch.float32},
    {"memory": "fused"},
    {"memory": "strided", "norm": False},
    {"scale": 1e-4},
    {"scale": 1e3, "dtype": torch.float16},
]
REAL = Case(1000, torch.bfloat16, 2, 8, 2, 64)
CASES = [pytest.param(Case(**changes), id=str(changes)) for changes in SMALL] + [
    pytest.param(Case(**asdict(REAL) | changes), id=f"real-{changes}", marks=pytest.mark.gpu)
    for changes in (
        {},
        {"dtype": torch.float16, "groups": 8},
        {"dtype": torch.float32, "tokens": 999},
        {"norm": False, "tokens": 4097, "angles": "each its own"},
        {"rotary": False, "dim": 128},
        {"rotates_key": False, "dim": 256},
        {"norm": False, "rotates_key": False},
        {"dim": 40, "memory": "fused"},
        {"dim": 128, "angle_dtype": torch.float32, "angles": "longer"},
    )
]


def make(case):
    """Leaves, [B, T, H, D] to the function; the function's other arguments."""
    heads = {"query": case.heads, "key": case.groups}
    if case.memory == "fused":
        shape = (case.batch, case.tokens, sum(heads.values()) * case.dim)
        leaves = {"projected": torch.randn(shape, device=DEVICE)}
    else:
        step = 2 if case.memory == "strided" else 1
        shapes = {part: (case.batch, case.tokens, count, case.dim * step) for part, count in heads.items()}
        leaves = {part: torch.randn(shape, device=DEVICE) for part, shape in shapes.items()}
    leaves = {part: (leaf * case.scale).to(case.dtype).requires_grad_() for part, leaf in leaves.items()}
    angles = None
    if case.rotary:
        rows = case.batch if case.angles == "each its own" else 1
        columns = case.tokens + 5 * (case.angles == "longer")
        position = torch.arange(columns, device=DEVICE) + 100 * torch.arange(rows, device=DEVICE)[:, None]
        angles = rotary_angles(position, case.dim, 1e4, case.angle_dtype or case.dtype)
    return leaves, (EPS * case.scale**2 if case.norm else None, angles, case.rotates_key)


def given(case, leaves):
    """Queries and keys, from the leaves."""
    if case.memory == "fused":
        return leaves["projected"].unflatten(-1, (-1, case.dim)).split((case.heads, case.groups), 2)
    return [leaves[part][..., :: 2 if case.memory == "strided" else 1] for part in ("query", "key")]


def values_and_gradients(function, case, leaves, arguments, gradients):
    """Of queries, keys, and rotated keys; keys alone are given twice where they are not rotated."""
    outputs = function(*given(case, leaves), *arguments)
    grads = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return dict(zip(("queries", "keys", "rotated"), outputs, strict=True)), dict(zip(leaves, grads, strict=True))


def random_gradients(case):
    shapes = [(case.batch, heads, case.tokens, case.dim) for heads in (case.heads, case.groups, case.groups)]
    return [torch.randn(shape, device=DEVICE).to(case.dtype) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_pytorch_in_float64(case, kernels, poisoned_memory):
    leaves, (eps, angles, *wants) = make(case)
    gradients = random_gradients(case)
    got, got_gradients = values_and_gradients(
        kernels.normalise_and_rotate, case, leaves, (eps, angles, *wants), gradients
    )
    again, gradients_again = values_and_gradients(
        kernels.normalise_and_rotate, case, leaves, (eps, angles, *wants), gradients
    )
    exact = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    angles = None if angles is None else tuple(part.double() for part in angles)
    wanted, wanted_gradients = values_and_gradients(
        attention_linformer.normalise_and_rotate,
        case,
        exact,
        (eps, angles, *wants),
        [gradient.double() for gradient in gradients],
    )
    for found, expected, table in ((got, wanted, VALUE), (got_gradients, wanted_gradients, GRADIENT)):
        for part, value in found.items():
            assert value.dtype == case.dtype
            assert value.isfinite().all(), part
            assert relative_error(value, expected[part]) < table[case.dtype], part
    for one, other in ((got, again), (got_gradients, gradients_again)):
        assert all(torch.equal(value, other[part]) for part, value in one.items())


def test_the_oracle_is_the_formula():
    """Written out once more, by loops."""
    case = Case(tokens=3, batch=1, heads=1, groups=1, dim=4, dtype=torch.float64)
    leaves, (eps, angles, *_) = make(case)
    queries, keys, rotated = attention_linformer.normalise_and_rotate(*given(case, leaves), eps, angles)
    cos, sin = (part[0, 0] for part in angles)
    for source, plain, turned in ((leaves["query"], None, queries), (leaves["key"], keys, rotated)):
        for t in range(3):
            x = source[0, t, 0]
            x = x / (x.square().mean() + eps).sqrt()
            if plain is not None:
                torch.testing.assert_close(plain[0, 0, t], x, rtol=0, atol=ORACLE)
            for i in range(2):
                wanted = x[i] * cos[t, i] - x[i + 2] * sin[t, i], x[i + 2] * cos[t, i] + x[i] * sin[t, i]
                torch.testing.assert_close(turned[0, 0, t, i], wanted[0], rtol=0, atol=ORACLE)
                torch.testing.assert_close(turned[0, 0, t, i + 2], wanted[1], rtol=0, atol=ORACLE)


@pytest.mark.parametrize("used", ["queries", "keys", "rotated", "queries and keys"])
def test_what_is_not_used_adds_nothing(used, kernels, poisoned_memory):
    """And where nothing is used there is no gradient, as with PyTorch's functions."""
    case = Case()
    leaves, arguments = make(case)
    exact = {part: leaf.detach().double().requires_grad_() for part, leaf in leaves.items()}
    gradients = dict(zip(("queries", "keys", "rotated"), random_gradients(case), strict=True))
    found = []
    for function, each in ((kernels.normalise_and_rotate, leaves), (attention_linformer.normalise_and_rotate, exact)):
        outputs = zip(gradients.items(), function(*given(case, each), *arguments), strict=True)
        sum((output * gradient).sum() for (part, gradient), output in outputs if part in used).backward()
        found.append(each)
    for part, leaf in found[0].items():
        wanted = found[1][part].grad
        assert (leaf.grad is None) == (wanted is None), part
        assert wanted is None or relative_error(leaf.grad, wanted) < GRADIENT[torch.float32], part


def weighted_sum(outputs, gradients):
    return sum((output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True))


@pytest.mark.parametrize("frozen", ["query", "key"])
def test_what_is_frozen_needs_no_gradient(frozen, kernels):
    """Nor does what becomes of it: it may enter a cache."""
    case = Case()
    leaves, arguments = make(case)
    leaves[frozen].requires_grad_(False)
    outputs = kernels.normalise_and_rotate(*given(case, leaves), *arguments)
    wanted = attention_linformer.normalise_and_rotate(*given(case, leaves), *arguments)
    assert [output.requires_grad for output in outputs] == [output.requires_grad for output in wanted]
    (other,) = leaves.keys() - {frozen}
    gradients = random_gradients(case)
    found, expected = (torch.autograd.grad(weighted_sum(each, gradients), leaves[other]) for each in (outputs, wanted))
    assert relative_error(*found, *expected) < GRADIENT[torch.float32]


@pytest.mark.parametrize("how", ["one number", "heads first", "tokens last", "far apart"])
def test_gradients_may_lie_anywhere(how, kernels):
    """One number for all, as of a sum; or in any order."""
    case = Case()
    leaves, arguments = make(case)
    gradients = random_gradients(case)
    if how == "one number":
        gradients = [gradient[:1, :1, :1, :1].expand_as(gradient) for gradient in gradients]
    elif how == "heads first":
        gradients = [gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in gradients]
    elif how == "tokens last":
        gradients = [gradient.mT.contiguous().mT for gradient in gradients]
    else:
        gradients = [torch.stack((gradient, gradient), 2)[:, :, 1] for gradient in gradients]
    _, found = values_and_gradients(kernels.normalise_and_rotate, case, leaves, arguments, gradients)
    _, wanted = values_and_gradients(attention_linformer.normalise_and_rotate, case, leaves, arguments, gradients)
    for part, gradient in found.items():
        assert relative_error(gradient, wanted[part]) < GRADIENT[torch.float32], part


def test_heads_may_lie_beyond_32_bits(kernels):
    """Offsets of heads are counted in 64."""
    apart = 2**30 + 64
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 9 * 2**30:
        pytest.skip("needs 8 GiB")
    storage = torch.empty(3 * apart + 64, dtype=torch.float16, device=DEVICE)  # on a CPU untouched pages take no memory
    gradient = storage.as_strided((1, 4, 3, 16), (0, apart, 16, 1)).normal_()
    query, key = (torch.randn(1, 3, heads, 16, device=DEVICE).half().requires_grad_() for heads in (4, 1))
    found = torch.autograd.grad(kernels.normalise_and_rotate(query, key, EPS, None)[0], query, gradient)
    wanted = torch.autograd.grad(
        attention_linformer.normalise_and_rotate(query.double(), key.double(), EPS, None)[0], query, gradient.double()
    )
    assert relative_error(*found, *wanted) < GRADIENT[torch.float16]


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.float64),
        Case(dim=8),
        Case(norm=False, rotary=False),
        Case(tokens=4, dim=300),
        Case(tokens=1),
    ],
)
def test_what_no_kernel_takes_is_left_to_pytorch(case, kernels, monkeypatch):
    monkeypatch.setattr(operators_linformer, "launch", None)
    leaves, arguments = make(case)
    found = kernels.normalise_and_rotate(*given(case, leaves), *arguments)
    wanted = attention_linformer.normalise_and_rotate(*given(case, leaves), *arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert (found[1] is found[2]) == (not case.rotary)


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize("used", ["all", "queries", "rotated"])
@pytest.mark.parametrize("changes", [{}, {"norm": False}, {"rotary": False}, {"rotates_key": False}], ids=str)
def test_it_compiles(changes, used, kernels):
    """Into one graph, which may use some of what it gives."""
    case = Case(**changes)
    leaves, arguments = make(case)
    gradients = dict(zip(("queries", "keys", "rotated"), random_gradients(case), strict=True))
    torch.compiler.reset()
    compiled = torch.compile(kernels.normalise_and_rotate, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, attention_linformer.normalise_and_rotate):
        outputs = dict(zip(gradients, function(*given(case, leaves), *arguments), strict=True))
        parts = [part for part in gradients if used in ("all", part)]
        inputs = [leaf for part, leaf in leaves.items() if used == "all" or (part == "query") == (used == "queries")]
        wanted = [outputs[part] for part in parts], inputs, [gradients[part] for part in parts]
        found.append((*outputs.values(), *torch.autograd.grad(*wanted)))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < GRADIENT[torch.float32]


@pytest.mark.parametrize("case", CASES[:1] + CASES[9:15] + CASES[-9:])
def test_the_operators_keep_their_promises(case, kernels):
    """Schema, and shapes, dtypes and strides that torch.compile is told."""
    leaves, (eps, angles, *_) = make(case)
    rotates_key = case.rotates_key and case.rotary
    states = [states.detach().transpose(1, 2) for states in given(case, leaves)]
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    arguments = (*states, *(angles or (None, None)))
    library.opcheck(kernels.normalise_and_rotate_op, (*arguments, eps, rotates_key), **tests)
    grad_query, grad_key, grad_rotated = random_gradients(case)
    for given_query, given_key in ((grad_query, grad_key), (grad_query, None), (None, grad_key)):
        kept = (None, None) if eps is None else states
        gradients = (given_query, given_key, grad_rotated if rotates_key else None)
        library.opcheck(kernels.normalise_and_rotate_backward_op, (*gradients, *kept, *arguments[2:], eps), **tests)


@pytest.mark.parametrize("norm", [True, False])
def test_no_more_is_kept_for_the_gradients_than_by_pytorch(norm, kernels):
    """Without a norm nothing but the angles."""
    case, kept = Case(norm=norm), []

    def bytes_kept(function):
        leaves, arguments = make(case)
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = function(*given(case, leaves), *arguments)
        kept.append(outputs)  # so that no address is used again
        return sum(storages.values())

    assert bytes_kept(kernels.normalise_and_rotate) <= bytes_kept(attention_linformer.normalise_and_rotate)


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal_k", [16, 0])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_layer_starts_one_kernel_each_way(qk_norm, causal_k, compiled, kernels, recorded_launches, tiny_config):
    """Compiled none: torch.compile makes kernels as fast of PyTorch's functions. Without slots none.

    Without the norm rotation is part of attention with its projections, compiled too, and so is its gradient.
    """
    names = recorded_launches(lambda kernel, _tensors: kernel.__name__)
    config = tiny_config(
        heads=2, k=causal_k, seq_length=64, window_size=64, position_embedding="rotary", qk_norm=qk_norm
    )
    model = LinformerForCausalLM(config).to(DEVICE)
    ids = torch.randint(0, 50, (1, 20), device=DEVICE)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    run(ids, labels=ids, use_cache=False).loss.backward()
    ours = [name for name in names if name.startswith("normalise")]
    forward, backward = ["normalise_and_rotate_kernel"] * 2, ["normalise_and_rotate_gradient_kernel"] * 2
    apart = [] if compiled else forward + backward
    assert ours == ([] if not causal_k else apart if qk_norm else forward)


@pytest.mark.parametrize("causal", [True, False])
def test_full_attention_has_gradients_of_gradients(causal, kernels, tiny_config):
    """As PyTorch's attention has them, through which it goes."""
    config = tiny_config(heads=2, k=0, window_size=32, causal=causal, position_embedding="rotary", qk_norm=True)
    model = (LinformerForCausalLM if causal else LinformerForMaskedLM)(config).to(DEVICE)
    ids = torch.randint(0, 50, (1, 20), device=DEVICE)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(
            model(ids, labels=ids).loss, model.model.layers[0].attention.k_proj.weight, create_graph=True
        )
        gradient.square().sum().backward()
    assert model.model.layers[0].attention.q_proj.weight.grad.abs().max() > 0
