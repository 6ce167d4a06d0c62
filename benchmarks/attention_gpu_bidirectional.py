"""The encoder's attention, all queries over k slots that mix the whole row: its shapes, its rivals, and its gate.

The function is the one that ``LinformerAttention`` uses where ``causal=False`` and ``projection="learned"``,
``mix_sequence_and_attend``. Shapes have one block of all n tokens and no window. The cases with counts check
``attend_slots``, which other projections use.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import attention_gpu_cases as cases
from benchmarks import attention_gpu_gate as gate
from linpass import attention_linformer, kernels_linformer
from linpass.attention_linformer import attend_visible, mix_sequences

SLOTS = {512: 128, 65536: 512, 2048: 256, 8192: 256, 32768: 256, 256: 64, 1024: 128}  # n: k; with a target first
SHAPES = tuple(
    cases.Shape(heads, dim, n, SLOTS[n], block=n, window=0) for heads, dim in ((8, 64), (16, 128)) for n in SLOTS
)


class Case(NamedTuple):
    """One call. ``counts``: slots that each of two rows sees, None: all."""

    name: str
    tokens: int = 512
    slots: int = 128
    dtype: torch.dtype = torch.bfloat16
    dim: int = 64
    heads: int = 8
    groups: int = 8
    sets: int = 1
    counts: tuple[int, int] | None = None


# The first two are the short gate, before every timing.
CASES = (
    Case("n = 512"),
    Case("odd n 999, k = 100", 999, 100),
    Case("n = 2048, k = 256", 2048, 256),
    Case("n = 1, k = 16", 1, 16),
    Case("k = 2", 333, 2),  # with one slot the gradients of queries and keys are zero: no relative error
    Case("E and F for every head", 777, 96, sets=8),
    Case("some slots held", 999, 100, counts=(100, 37)),
    Case("one slot held, float16", 512, 128, torch.float16, counts=(1, 128)),
    Case("16 heads of 128", 2048, 256, dim=128, heads=16, groups=16),
    Case("heads of 32, float16", 999, 100, torch.float16, dim=32),
    Case("heads of 256", 512, dim=256, heads=2, groups=2),
    Case("float32, odd n 999", 999, 100, torch.float32),
    Case("float32, heads of 128", 512, 64, torch.float32, dim=128),
    Case("grouped heads, odd n 777", 777, 100, groups=2),
)


def of_one_block(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[X, 1, n, k], as ``SequenceProjection`` gives them, to [X, n, k]."""
    return tuple([weight.squeeze(1) for weight in weights])


def truth(query: Tensor, key: Tensor, value: Tensor, *weights: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""The formula with all scores in memory, :math:`\mathrm{softmax}(Q(E^\top K)^\top/\sqrt d)\,F^\top V`."""
    slot_key, slot_value = (
        weight[:, 0].transpose(-1, -2) @ states for states, weight in zip((key, value), weights, strict=True)
    )
    visible = None
    if counts is not None:
        visible = (torch.arange(slot_key.shape[2], device=query.device) < counts[:, None])[:, None, None]
    return attend_visible(query, slot_key, slot_value, visible)[0]


def from_weights(module: ModuleType) -> Callable[..., Tensor]:
    """Mixing and attention of the module, with the arguments of :func:`truth`."""
    attend = module.mix_sequence_and_attend

    def forward(query, key, value, *weights):
        return attend(query, key, value, of_one_block(weights))

    return forward


def with_module(module: ModuleType):
    """Our attention: the kernels, or the PyTorch functions they replace."""

    def build(shape: cases.Shape, inputs: list[Tensor]) -> cases.Attention:
        return cases.Attention(from_weights(module), inputs, cases.MIXED, truth)

    return build


def check(module: ModuleType, case: Case, device: torch.device, must_agree: bool = True) -> dict:
    """Errors against float64, numbers that are not finite, and whether three more runs agree to the bit."""
    like = {"device": device, "dtype": case.dtype}
    leaves = [
        torch.randn(2, case.tokens, heads, case.dim, **like).transpose(1, 2)
        for heads in (case.heads, case.groups, case.groups)
    ]
    size = (case.sets, 1, case.tokens, case.slots)
    leaves += [torch.randn(*size, **like) / case.tokens**0.5 for _ in range(2)]
    weight = torch.randn(2, case.heads, case.tokens, case.dim, **like)
    counts = None if case.counts is None else torch.tensor(case.counts, device=device)

    def held(query, key, value, *weights):
        return module.attend_slots(query, *mix_sequences(key, value, of_one_block(weights)), counts)

    forward = from_weights(module) if counts is None else held

    def exact(*leaves):
        return truth(*leaves, counts=counts)

    with gate.poisoned_memory():
        got = gate.gradients_of(forward, leaves, weight)
    runs = [gate.gradients_of(forward, leaves, weight) for _ in range(3)]
    wanted = gate.gradients_of(exact, [leaf.double() for leaf in leaves], weight)
    row = gate.errors(got, wanted, cases.MIXED, case.dtype)
    row["not_finite"] = sum(int((~x.isfinite()).sum()) for x in got)
    row["runs_agree"] = all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    return row | {"passed": row["passed"] and row["not_finite"] == 0 and (row["runs_agree"] or not must_agree)}


OURS = cases.Variant(cases.OURS.name, with_module(kernels_linformer))
CORE = (
    OURS,
    cases.Variant("cuDNN full", cases.with_backend(SDPBackend.CUDNN_ATTENTION)),
    cases.Variant("flash full", cases.with_backend(SDPBackend.FLASH_ATTENTION)),
)
OTHERS = (
    cases.Variant(cases.OURS_IN_PYTORCH.name, with_module(attention_linformer)),
    cases.Variant("linformer (lucidrains)", cases.linformer_of_lucidrains),
)
