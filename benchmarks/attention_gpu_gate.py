"""Is our attention right? Checked before it is timed: values, every gradient, causality, and equal bits of equal runs.

Truth is the formula in float64 on the same rounded inputs; the limits are those of the tests.
"""

import importlib.util
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.attention_gpu_cases import WINDOW
from linpass.attention_linformer import (
    BlockLayout,
    attend_blocks_reference,
    mix_blocks,
    packed_grid,
    rotary_angles,
    rotate,
    slot_centres,
)

_TABLE = Path(__file__).resolve().parent.parent / "tests" / "tolerances.py"
_spec = importlib.util.spec_from_file_location("tolerances", _TABLE)
assert _spec is not None
assert _spec.loader is not None
tolerances = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tolerances)


class Case(NamedTuple):
    """One call. ``slots`` a block; ``visible`` blocks in view, None: all; ``sets`` of weights, for all blocks or each.

    ``score`` is what all scores are near to. Far from 0 the gradient of the queries is a difference of large numbers,
    so that only numbers that are not finite count.
    """

    name: str
    tokens: int = 512
    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    heads: int = 8
    groups: int = 8
    block: int = 32
    slots: int = 4
    window: int = WINDOW
    visible: int | None = None
    convolution: bool = False
    packed: bool = False
    rotary: bool = False
    score: float = 0.0


# The first two are the short gate, before every timing.
CASES = (
    Case("n = 512", 512, slots=8),
    Case("odd n 999", 999),
    Case("n = 2048", 2048),
    Case("n = 2048, b = 128, r = 1", 2048, block=128, slots=1),
    Case("no complete block, n = 31", 31),
    Case("16 heads of 128", 2048, heads=16, groups=16, dim=128),
    Case("heads of 32, float16, odd n 999", 999, torch.float16, dim=32),
    Case("heads of 256", 512, dim=256, heads=2, groups=2),
    Case("float16, n = 2048", 2048, torch.float16),
    Case("float32, odd n 999", 999, torch.float32),
    Case("float32, heads of 128", 512, torch.float32, dim=128),
    Case("grouped heads, odd n 777", 777, groups=2),
    Case("packed documents, n = 1000", 1000, packed=True),
    Case("packed, grouped, float16, odd n 999", 999, torch.float16, groups=2, packed=True),
    Case("past the view of 5 blocks, odd n 999", 999, visible=5),
    Case("convolution, rotary, past the view of 6 blocks", 1000, visible=6, convolution=True, rotary=True),
    Case("scores near -120, n = 704", 704, score=-120.0),
)
SHORT = CASES[:2]


def make(case: Case, device: torch.device) -> tuple[dict[str, Tensor], BlockLayout, dict]:
    """Leaves by name, the layout, and the other arguments of ``mix_and_attend``."""
    like = {"device": device, "dtype": case.dtype}
    batch, blocks = 2, -(-case.tokens // case.block)
    layout = BlockLayout(case.block, case.window, case.slots, case.visible or blocks)
    heads = {"query": case.heads, "key": case.groups, "value": case.groups}
    if case.rotary:
        heads["rotated key"] = case.groups
    leaves = {name: torch.randn(batch, case.tokens, h, case.dim, **like).transpose(1, 2) for name, h in heads.items()}
    size = (case.groups, 1) if case.convolution else (1, blocks)
    for name in ("E", "F"):
        leaves[name] = torch.randn(*size, case.block, case.slots, **like) / case.block**0.5
    if case.score:
        for states in leaves.values():
            states *= 0.1
        leaves["query"][..., 0], leaves["key"][..., 0] = 1, case.score * case.dim**0.5
        leaves["E"][:] = 1 / case.block
    arguments = {}
    if case.rotary:
        centres = slot_centres(torch.arange(case.tokens // case.block, device=device), case.block, case.slots)
        arguments["slot_angles"] = rotary_angles(centres[None], case.dim, 10000.0, case.dtype)
    if case.packed:  # documents of five blocks in one row, one document in the other
        token = torch.arange(case.tokens, device=device)
        grid = packed_grid(torch.stack((token // (5 * case.block), token * 0)), case.block)
        arguments |= {"first_block_BC": grid.first_block_BC, "block_BC": grid.block_numbers(case.block)}
    return leaves, layout, arguments


def composed(
    query, key, value, weights, layout, rotated_key_BGND=None, slot_angles=None, block_BC=None, first_block_BC=None
) -> Tensor:
    """What ``mix_and_attend`` computes, composed of the readable functions."""
    slot_key, slot_value = (mix_blocks(x, w, block_BC) for x, w in zip((key, value), weights, strict=True))
    if slot_angles is not None:
        slot_key = rotate(slot_key, slot_angles)
    near = key if rotated_key_BGND is None else rotated_key_BGND
    return attend_blocks_reference(query, near, value, slot_key, slot_value, layout, first_block_BC)[0]


def run(mix_and_attend: Callable, leaves: dict[str, Tensor], layout, arguments: dict, weight: Tensor) -> list[Tensor]:
    """The output, and the gradient of its product with ``weight`` by every leaf."""
    query, key, value, *rotated, key_weight, value_weight = leaves.values()

    def forward(query, key, value, key_weight, value_weight, rotated_key=None):
        return mix_and_attend(query, key, value, (key_weight, value_weight), layout, rotated_key, **arguments)

    inputs = [query, key, value, key_weight, value_weight, *rotated]
    output, *gradients = gradients_of(forward, inputs, weight)
    return [output, *gradients[:3], *gradients[5:], *gradients[3:5]]


def gradients_of(forward: Callable[..., Tensor], leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = forward(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


def errors(
    got: list[Tensor],
    wanted: list[Tensor],
    names: tuple[str, ...],
    dtype: torch.dtype,
    not_judged: tuple[str, ...] = (),
) -> dict:
    """Errors relative in the Frobenius norm, and whether all are within the table of the tests; NaN never is."""
    found = {name: tolerances.relative_error(a, b) for name, a, b in zip(("output", *names), got, wanted, strict=True)}
    limits = {name: (tolerances.VALUE if name == "output" else tolerances.GRADIENT)[dtype] for name in found}
    passed = all(error < limits[name] for name, error in found.items() if name not in not_judged)
    row = {"errors": {name: float(f"{error:.1e}") for name, error in found.items()}, "passed": passed}
    return row | ({"not_judged": list(not_judged)} if not_judged else {})


@contextmanager
def poisoned_memory():
    """Memory that nobody has written to holds NaN."""
    # warn_only: PyTorch's own matrix products else want a setting of cuBLAS from before the start of the process.
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def check(mix_and_attend: Callable, case: Case, device: torch.device, must_agree: bool = True) -> dict:
    """Errors, numbers that are not finite, and whether three more runs agree to the bit, which not all promise."""
    leaves, layout, arguments = make(case, device)
    weight = torch.randn(2, case.heads, case.tokens, case.dim, device=device, dtype=case.dtype)
    with poisoned_memory():
        got = run(mix_and_attend, leaves, layout, arguments, weight)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    angles = arguments.get("slot_angles")
    exact_arguments = arguments | ({"slot_angles": tuple(x.double() for x in angles)} if angles else {})
    wanted = run(composed, exact, layout, exact_arguments, weight)
    runs = [run(mix_and_attend, leaves, layout, arguments, weight) for _ in range(3)]
    not_judged = ("query",) if case.score else ()  # a difference of large numbers
    row = errors(got, wanted, tuple(leaves), case.dtype, not_judged)
    row["not_finite"] = sum(int((~x.isfinite()).sum()) for x in got)
    row["runs_agree"] = all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    return row | {"passed": row["passed"] and row["not_finite"] == 0 and (row["runs_agree"] or not must_agree)}


def check_causality(mix_and_attend: Callable, device: torch.device, tokens: int = 1000) -> dict:
    """Outputs, at and around borders of blocks and tiles, that have a gradient by, or change with, later tokens."""
    leaves, layout, _ = make(Case("causality", tokens, heads=2, groups=2), device)
    *states, key_weight, value_weight = leaves.values()
    states = torch.stack(states).requires_grad_()

    def forward(states):
        return mix_and_attend(*states, (key_weight, value_weight), layout)

    output, found, looked_at = forward(states), [], (0, 30, 31, 32, 127, 128, 255, 256, 300, 511, 512, tokens - 2)
    for t in (t for t in looked_at if t < tokens - 1):
        (gradient,) = torch.autograd.grad(output[:, :, t].float().sum(), states, retain_graph=True)
        changed = states.detach().clone()
        changed[:, :, :, t + 1 :] += 1
        same = torch.equal(forward(changed)[:, :, : t + 1], output[:, :, : t + 1])
        if gradient[:, :, :, t + 1 :].any() or not gradient[2, :, :, : t + 1].any() or not same:
            found.append(t)
    return {"future_enters_at": found, "passed": not found}
