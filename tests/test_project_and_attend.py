"""Causal attention with its projections as one function each way: against the same steps apart, in float64.

Without a CUDA device small cases run in Triton's interpreter, which has no bfloat16.
"""

from dataclasses import asdict, dataclass

import pytest
import torch
from test_kernels_linformer import DEVICE, RUNS, Dispatches, arguments, assert_within_the_table, make_grid, oracle
from test_kernels_linformer import Case as Attention
from tolerances import GRADIENT, VALUE, relative_error
from torch import library
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

import linpass.operators_linformer
from linpass import LinformerConfig, LinformerForCausalLM, LinformerForMaskedLM
from linpass.attention_linformer import rotary_angles, rotate

PROJECTIONS, MIXING = ("q", "k", "v"), ("E", "F")


@dataclass(frozen=True)
class Case(Attention):
    """One call. Two rows of 50 tokens, 24 numbers wide."""

    batch: int = 2
    width: int = 24
    angles: str = "shared"  # by the rows; or each row its own, or more of them than tokens
    tokens_last: bool = False  # in memory of the hidden states
    fixed: str = ""  # leaves without a gradient


REAL = Case(333, torch.bfloat16, 2, 4, 2, 64, 32, 100, 4, 99, stored=32, width=256)
SMALL = [
    {},
    {"dtype": torch.float16},
    {"groups": 2, "rotary": False},
    {"heads": 4, "groups": 2, "angles": "each its own"},
    {"angles": "longer", "slots": 8},
    *({"tokens": tokens} for tokens in (1, 7, 8, 63, 100)),
    *({"dim": dim, "tokens": 40} for dim in (32, 64)),
    {"view": 2, "window": 8, "block": 24, "slots": 3, "tokens": 100},
    {"mixing": "pooling", "per_group": False},
    {"mixing": "convolution", "one_weight": True, "groups": 2},
    {"weight_dtype": torch.float32, "dtype": torch.float16},
    {"packed": "each"},
    {"packed": "all", "rotary": False},
    {"tokens_last": True},
    {"fixed": "hidden"},
    {"fixed": "qkv"},
    *({"fixed": weights} for weights in ("E", "F", "EF")),
]
ON_A_GPU = [
    {},
    {"dtype": torch.float16},
    {"dtype": torch.float32},
    {"rotary": False},
    {"groups": 4, "per_group": False},
    {"angles": "each its own"},
    *({"tokens": tokens} for tokens in (1, 7, 63, 1000)),
    *({"dim": dim} for dim in (16, 32, 128, 256)),
    *({"dim": dim, "dtype": torch.float32} for dim in (128, 256)),
    {"mixing": "convolution", "tokens": 5000, "per_group": False},
    {"mixing": "pooling"},
    {"block": 128, "slots": 8, "window": 128, "tokens": 1000},
    {"view": 2},
    {"one_weight": True},
    {"packed": "each"},
    {"tokens_last": True},
]
CASES = [pytest.param(Case(**changes), id=str(changes)) for changes in SMALL] + [
    pytest.param(Case(**asdict(REAL) | changes), id=f"real-{changes}", marks=pytest.mark.gpu) for changes in ON_A_GPU
]


@pytest.fixture
def calls(kernels, monkeypatch):
    """The arguments that the operator was called with."""
    found, operator = [], kernels.project_and_attend_op
    monkeypatch.setattr(kernels, "project_and_attend_op", lambda *call: found.append(call) or operator(*call))
    return found


def make_leaves(case):
    """What gradients are wanted of, by name; weights such that queries, keys and values are of order one."""
    sizes = (case.width, case.tokens) if case.tokens_last else (case.tokens, case.width)
    leaves = {"hidden": torch.randn(case.batch, *sizes, device=DEVICE)}
    for part, heads in {"q": case.heads, "k": case.groups, "v": case.groups}.items():
        leaves[part] = torch.randn(heads * case.dim, case.width, device=DEVICE) / case.width**0.5
    leaves = {part: leaf.to(case.dtype) for part, leaf in leaves.items()}
    if case.mixing != "pooling":
        stored = case.stored if case.mixing == "learned" else 1
        for part in ("E",) if case.one_weight else MIXING:
            weight = torch.randn(case.groups if case.per_group else 1, stored, case.block, case.slots, device=DEVICE)
            leaves[part] = (weight / case.block**0.5).to(case.weight_dtype or case.dtype)
    return {part: leaf.requires_grad_(part not in case.fixed) for part, leaf in leaves.items()}


def hidden_states(case, leaves):
    return leaves["hidden"].mT if case.tokens_last else leaves["hidden"]


def angles_of(case):
    """cos and sin of the tokens."""
    if not case.rotary:
        return None
    rows = case.batch if case.angles == "each its own" else 1
    longer = 5 if case.angles == "longer" else 0
    places = torch.arange(case.tokens + longer, device=DEVICE) + 3 * torch.arange(rows, device=DEVICE)[:, None]
    return rotary_angles(places, case.dim, 1e4, case.dtype)


def apart(case, leaves):
    """Leaves of `mix_and_attend`, as they lie in memory: what the projections give, turned."""
    hidden, angles = hidden_states(case, leaves), angles_of(case)
    query, key, value = (F.linear(hidden, leaves[part]).unflatten(-1, (-1, case.dim)) for part in PROJECTIONS)
    states = {"query": query, "key": key, "value": value}
    if angles is not None:
        angles = tuple(part.to(hidden.dtype) for part in angles)
        turned = {"query": query, "near": key}
        states |= {part: rotate(each.transpose(1, 2), angles).transpose(1, 2) for part, each in turned.items()}
    return states | {part: leaves[part] for part in MIXING if part in leaves}


def together(kernels, case, leaves, grid):
    a = arguments(case, apart(case, leaves), grid)
    return kernels.project_and_attend(
        hidden_states(case, leaves),
        tuple(leaves[part] for part in PROJECTIONS),
        case.heads,
        case.dim,
        angles_of(case),
        a.weights,
        a.layout,
        a.angles,
        a.blocks,
        a.first_block,
    )


def gradients(output, leaves, gradient):
    """The output, and by name the gradients of the leaves that have one."""
    wanted = {part: leaf for part, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(output, list(wanted.values()), gradient.to(output.dtype), materialize_grads=True)
    return {"output": output} | dict(zip(wanted, found, strict=True))


def output_gradient(case):
    return torch.randn(case.batch, case.heads, case.tokens, case.dim, device=DEVICE).to(case.dtype)


def in_float64(case, leaves, grid, gradient):
    """`gradients` of every step apart, with every score in memory."""
    truths = {part: leaf.detach().double().requires_grad_(leaf.requires_grad) for part, leaf in leaves.items()}
    return gradients(oracle(case, apart(case, truths), grid), truths, gradient)


def assert_near(dtype, got, expected):
    assert_within_the_table(dtype, got["output"], got, expected.pop("output"), expected)


@pytest.mark.parametrize("case", CASES)
def test_value_and_every_gradient_are_within_the_table(case, kernels, recorded_launches):
    launches = recorded_launches(lambda kernel, _tensors: kernel.__name__)
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    got = gradients(together(kernels, case, leaves, grid), leaves, gradient)
    assert {part: each.dtype for part, each in got.items() if part in leaves}.items() <= {
        (part, leaf.dtype) for part, leaf in leaves.items()
    }
    turned, mixed = ["normalise_and_rotate_kernel"] * case.rotary, case.tokens >= case.block
    forward = [*turned, *["mix_kernel"] * mixed, "forward_kernel"]
    backward = ["query_gradient_kernel", *["slot_gradient_kernel"] * mixed, "token_gradient_kernel"]
    assert launches == forward + backward
    assert_near(case.dtype, got, in_float64(case, leaves, grid, gradient))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, kernels):
    """Products in the low precision; gradients in float32, within the table of the low one."""
    case = Case(**asdict(REAL) | {"dtype": torch.float32})
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    with torch.autocast(DEVICE.type, dtype):
        output = together(kernels, case, leaves, grid)
    got = gradients(output, leaves, gradient)
    assert {got[part].dtype for part in leaves} == {torch.float32}
    assert_near(dtype, got, in_float64(case, leaves, grid, gradient))


@pytest.mark.parametrize("case", [Case(), Case(rotary=False), pytest.param(REAL, marks=pytest.mark.gpu)])
def test_fixed_leaves_and_further_runs_change_no_bit(case, kernels, poisoned_memory):
    """Nor does NaN in memory to begin with."""
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    first, *others = (gradients(together(kernels, case, leaves, grid), leaves, gradient) for _ in range(RUNS))
    for fixed in (("hidden",), PROJECTIONS, MIXING):
        some = {part: leaf.detach() if part in fixed else leaf for part, leaf in leaves.items()}
        others.append(gradients(together(kernels, case, some, grid), some, gradient))
        assert not others[-1].keys() & set(fixed)
    for again in others:
        for part, found in again.items():
            assert found.isfinite().all(), part
            assert torch.equal(found, first[part]), part


@pytest.mark.parametrize("fixed", [(), ("hidden",), PROJECTIONS, MIXING])
def test_what_nobody_wants_is_not_computed_nor_kept(fixed, kernels, monkeypatch):
    case, empty, operator = Case(), [], kernels.project_and_attend_backward_op
    leaves, grid = make_leaves(case), make_grid(case)
    some = {part: leaf.detach() if part in fixed else leaf for part, leaf in leaves.items()}

    def record(*call):
        results = operator(*call)
        empty.append([result.numel() == 0 for result in results] + [call[1] is None])
        return results

    monkeypatch.setattr(kernels, "project_and_attend_backward_op", record)
    gradients(together(kernels, case, some, grid), some, output_gradient(case))
    assert empty == [[fixed == ("hidden",), fixed == PROJECTIONS, fixed == MIXING, fixed == PROJECTIONS]]


@pytest.mark.parametrize("how", ["expanded", "features first", "every other"])
def test_gradients_may_lie_in_memory_as_they_like(how, kernels):
    case = Case()
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    gradient = gradient[:, :1, :1].expand_as(gradient) if how == "expanded" else gradient
    lies = {
        "expanded": gradient,
        "features first": gradient.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "every other": gradient.repeat_interleave(2, -1)[..., ::2],
    }[how]
    assert not lies.is_contiguous()
    wanted, got = (
        gradients(together(kernels, case, leaves, grid), leaves, flow) for flow in (gradient.contiguous(), lies)
    )
    for part, expected in wanted.items():
        assert torch.equal(got[part], expected), part


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_backward_pass_inside_autocast_keeps_its_dtype(dtype, kernels):
    case = Case(**asdict(REAL) | {"dtype": torch.float32})
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    outside, inside = (together(kernels, case, leaves, grid) for _ in range(2))
    wanted = gradients(outside, leaves, gradient)
    with torch.autocast(DEVICE.type, dtype):
        got = gradients(inside, leaves, gradient)
    for part, expected in wanted.items():
        assert torch.equal(got[part], expected), part


def test_one_call_each_way(kernels):
    case = Case()
    leaves, grid = make_leaves(case), make_grid(case)
    call = {part: leaf.detach().requires_grad_() for part, leaf in leaves.items()}
    with Dispatches() as calls:
        output = together(kernels, case, call, grid)
        output.backward(torch.ones_like(output))
    ours = [call for call in calls.names if call.startswith("linpass")]
    assert ours == [f"{kernels.project_and_attend_op}", f"{kernels.project_and_attend_backward_op}"]


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.parametrize(
    "case", [Case(), Case(mixing="pooling"), Case(fixed="qkv"), pytest.param(REAL, marks=pytest.mark.gpu)]
)
def test_a_compiled_graph_gives_the_same_bits(case, kernels, monkeypatch):
    torch.compiler.reset()
    leaves, grid, gradient = make_leaves(case), make_grid(case), output_gradient(case)
    wanted = gradients(together(kernels, case, leaves, grid), leaves, gradient)
    compiled = torch.compile(kernels.project_and_attend, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(kernels, "project_and_attend", compiled)
    got = gradients(together(kernels, case, leaves, grid), leaves, gradient)
    for part, expected in wanted.items():
        assert torch.equal(got[part], expected), part


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=20),
        Case(tokens=20, rotary=False, one_weight=True),
        Case(tokens=7, dtype=torch.float16),
        Case(tokens=20, tokens_last=True, groups=2),
        pytest.param(REAL, marks=pytest.mark.gpu),
    ],
)
def test_the_operators_keep_their_promises(case, kernels, calls):
    """Schema, and shapes, dtypes and strides that torch.compile is told."""
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    together(kernels, case, make_leaves(case), make_grid(case))
    given = [part.detach() if isinstance(part, torch.Tensor) else part for part in calls[0]]
    operator = linpass.operators_linformer.project_and_attend_op
    library.opcheck(operator, given, **tests)
    results = operator(*given)
    for needs in ([True] * 3, [False, True, False], [True, False, False]):
        kept = given[0] if needs[1] else None
        backward = (output_gradient(case), kept, *given[1:], *results, needs)
        library.opcheck(kernels.project_and_attend_backward_op, backward, **tests)


@pytest.mark.parametrize(
    "case",
    [Case(dtype=torch.float64), Case(dim=24), Case(dim=512, tokens=9), Case(slots=129, block=256, tokens=9)],
)
def test_what_no_kernel_takes_is_left_to_others(case, kernels, recorded_launches):
    launches = recorded_launches(lambda kernel, _tensors: kernel.__name__)
    leaves, grid = make_leaves(case), make_grid(case)
    assert together(kernels, case, leaves, grid) is None
    with torch.no_grad():
        assert together(kernels, case, leaves, grid) is None
    assert not launches


@pytest.mark.parametrize("case", [Case(), Case(rotary=False, groups=2), pytest.param(REAL, marks=pytest.mark.gpu)])
def test_without_gradients_the_bits_are_the_same(case, kernels):
    """Activation checkpointing computes both and takes them for one."""
    leaves, grid = make_leaves(case), make_grid(case)
    wanted = together(kernels, case, leaves, grid)
    with torch.no_grad():
        assert torch.equal(together(kernels, case, leaves, grid), wanted)


@pytest.mark.gpu
def test_under_autocast_float64_is_left_to_others(kernels):
    """PyTorch casts no float64 there, and refuses to multiply two dtypes."""
    case = Case(**asdict(REAL) | {"dtype": torch.float32})
    leaves = make_leaves(case) | {"k": make_leaves(case)["k"].detach().double()}
    a = arguments(case, apart(case, make_leaves(case)), make_grid(case))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        projections = tuple(leaves[part] for part in PROJECTIONS)
        given = (leaves["hidden"], projections, case.heads, case.dim, angles_of(case), a.weights, a.layout)
        assert kernels.project_and_attend(*given) is None


@pytest.mark.parametrize("which", ["angles", "slot_angles", "sine of angles"])
def test_too_few_angles_are_refused(which, kernels, monkeypatch):
    case, given = Case(), kernels.project_and_attend
    place = {"slot_angles": 7}.get(which, 4)

    def with_fewer(*call):
        cos, sin = call[place]
        fewer = (cos if which.startswith("sine") else cos[..., 1:, :], sin[..., 1:, :])
        return given(*call[:place], fewer, *call[place + 1 :])

    monkeypatch.setattr(kernels, "project_and_attend", with_fewer)
    name = which.removeprefix("sine of ")
    with pytest.raises(ValueError, match=f"{name} has [0-9]+ rows; [0-9]+ (tokens|slots) need one each"):
        together(kernels, case, make_leaves(case), make_grid(case))


def test_without_triton_it_is_left_to_others(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    case = Case()
    assert together(kernels, case, make_leaves(case), make_grid(case)) is None


def make_model(causal=True, **changes):
    fields = {"embed_dim": 32, "heads": 2, "seq_length": 32, "k": 8, "block_size": 8, "window_size": 12}
    fields |= {"vocab_size": 100, "depth": 2, "dropout": 0.0, "qk_norm": False, "position_embedding": "rotary"}
    config = LinformerConfig(causal=causal, **fields | changes)
    return (LinformerForCausalLM if causal else LinformerForMaskedLM)(config).to(DEVICE)


def train(model, ids, documents=None):
    """Gradients by name of one batch, of ``documents``, or of rows of which the second has padding on the left."""
    model.zero_grad()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    more = {"attention_mask": mask} if documents is None else {"document_ids": documents}
    more |= {"use_cache": False} if model.config.causal else {}
    model(ids, labels=ids, **more).loss.backward()
    return {part: parameter.grad.clone() for part, parameter in model.named_parameters()}


def with_a_hook(linear):
    linear.register_forward_hook(lambda *_: None)


def with_a_hook_before(linear):
    linear.register_forward_pre_hook(lambda *_: None)


def with_a_hook_on_the_way_back(linear):
    linear.register_full_backward_hook(lambda *_: None)


def with_a_hook_before_the_way_back(linear):
    linear.register_full_backward_pre_hook(lambda *_: None)


def with_a_parametrization(linear):
    register_parametrization(linear, "weight", torch.nn.Identity())


def with_a_weight_of_another_kind(linear):
    """As quantised ones are: the module stays what it was."""
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Quantised))


class Quantised(torch.Tensor):
    pass


def with_another_class(linear):
    linear.__class__ = type("Adapter", (torch.nn.Linear,), {})


def with_another_forward(linear):
    linear.forward = type(linear).forward.__get__(linear)


def with_a_bias(linear):
    linear.bias = torch.nn.Parameter(torch.zeros(len(linear.weight), device=DEVICE))


CHANGES = [
    *(with_a_hook, with_a_hook_before, with_a_hook_on_the_way_back, with_a_hook_before_the_way_back),
    *(with_a_parametrization, with_a_weight_of_another_kind, with_another_class, with_another_forward, with_a_bias),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_a_layer_whose_projections_were_changed_calls_them(change, projection, calls):
    """Adapters, quantised weights, hooks of parallel training: they are asked, and the gradients stay the same."""
    model, ids = make_model(), torch.randint(1, 100, (2, 30), device=DEVICE)
    wanted = train(model, ids)
    assert len(calls) == 2
    change(getattr(model.model.layers[0].attention, projection))
    got = train(model, ids)
    assert len(calls) == 3
    for part, expected in wanted.items():
        found = got[part if part in got else part.replace("weight", "parametrizations.weight.original")]
        assert relative_error(found, expected) < GRADIENT[torch.float32], part


MODELS = [
    {},
    {"position_embedding": "learned"},
    {"projection_sharing": "layerwise"},
    {"projection": "convolution", "num_key_value_heads": 2, "heads": 4, "embed_dim": 64},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_models_give_the_gradients_of_float64(packed, changes, calls):
    """Of documents that start elsewhere in each row, too."""
    model, ids = make_model(**changes), torch.randint(1, 100, (2, 30), device=DEVICE)
    blocks = torch.arange(30, device=DEVICE) // 8
    documents = torch.stack((blocks // 2, blocks.clamp(max=1))) if packed else None
    got = train(model, ids, documents)
    assert len(calls) == 2
    wanted = train(model.double(), ids, documents)
    assert len(calls) == 2
    for part, expected in wanted.items():
        assert relative_error(got[part], expected) < 10 * GRADIENT[torch.float32], part


def test_a_model_of_two_dtypes_is_refused_as_ever(calls):
    model, ids = make_model(), torch.randint(1, 100, (2, 30), device=DEVICE)
    model.model.layers[0].attention.q_proj.half()
    with pytest.raises(RuntimeError, match="dtype"):
        train(model, ids)
    assert not calls


@pytest.mark.filterwarnings("ignore:::torch", "ignore:.*should not be instantiated:DeprecationWarning")  # of torch
def test_a_compiled_model_trains_through_it_too(calls):
    torch.compiler.reset()
    model, ids = make_model(), torch.randint(1, 100, (2, 30), device=DEVICE)
    wanted = model(ids, use_cache=False).logits
    assert len(calls) == 2
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    assert len(calls) == 4
    assert torch.equal(got, wanted)


OTHERS = [{"qk_norm": True}, {"attn_implementation": "eager"}, {"attention_rank": 8}, {"k": 0}, {"causal": False}]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_other_models_do_not(changes, calls):
    train(make_model(**changes), torch.randint(1, 100, (2, 30), device=DEVICE))
    assert not calls


def test_a_model_that_is_fixed_keeps_nothing_for_gradients(calls):
    model, ids = make_model(), torch.randint(1, 100, (2, 30), device=DEVICE)
    wanted = model(ids, use_cache=False).logits
    found = model.requires_grad_(False)(ids, use_cache=False).logits
    assert len(calls) == 4
    assert wanted.requires_grad
    assert not found.requires_grad
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_prompt_that_leaves_a_cache_does_not(recorded, calls):
    """Step by step it takes a processor less time, compiled above all."""
    model, ids = make_model(), torch.randint(1, 100, (2, 30), device=DEVICE)
    with torch.set_grad_enabled(recorded):
        found = model(ids, use_cache=True).logits
        assert not calls
        wanted = model(ids, use_cache=False).logits
    assert len(calls) == 2
    assert relative_error(found, wanted) < 10 * VALUE[torch.float32]
