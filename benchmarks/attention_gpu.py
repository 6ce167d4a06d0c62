"""Causal attention on one GPU, bfloat16: ``python -m benchmarks.attention_gpu RESULT.json``, about a minute.

First the errors of every variant against float64 on the same inputs, what of the future enters, and whether two runs
agree; then milliseconds, medians of 20, and peak memory, with 65,536 tokens a batch and 8 heads of 64, beside cuDNN's
causal attention. Variants: the loop over chunks, one fused call (chunk size and backend), the same compiled,
FlexAttention over slots and tokens. A variant that fails has its error in the table; whatever is left to do when
``--seconds`` are over is left out, and said. The result is written after every row.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from linpass import attention_linformer as attention
from linpass.attention_linformer import BlockLayout, attend_blocks_fused, attend_blocks_reference, mix_blocks

HEADS, DIM, TOKENS, WINDOW, REPEATS = 8, 64, 65536, 128, 20
SHAPES = {  # n: k, b; the most telling first
    65536: (512, 128),
    512: (128, 32),
    2048: (256, 32),
    8192: (256, 128),
    1024: (128, 32),
    4096: (256, 64),
    32768: (512, 128),
}
CHUNKS = (128, 256, 512)
BACKENDS = {"default": None, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
COMPILED_AT = (512, 2048, 65536)  # every shape is a compilation
LEAVES = ("query", "key", "value", "slot_key", "slot_value")


class Variant(NamedTuple):
    """A way to attend: ``attend(query, key, value, slot_key, slot_value, layout, first_block)``."""

    name: str
    attend: Callable[..., Tensor]
    chunk: int = 256
    backend: str = "default"

    def __call__(self, *arguments) -> Tensor:
        backend = BACKENDS[self.backend]
        attention.CHUNK_FUSED = self.chunk
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return self.attend(*arguments)


def loop(query, key, value, slot_key, slot_value, layout, first_block=None) -> Tensor:
    return attention._AttendBlocks.apply(query, key, value, slot_key, slot_value, layout, first_block)


def fused_variants() -> list[Variant]:
    return [Variant(f"fused C={c} {name}", attend_blocks_fused, c, name) for name in BACKENDS for c in CHUNKS]


def compiled_variants() -> list[Variant]:
    compiled = torch.compile(attend_blocks_fused, dynamic=False, fullgraph=True)
    return [Variant("fused C=256 default compiled", compiled)]


def flex_variant(tokens: int, layout: BlockLayout, device: torch.device) -> Variant:
    """FlexAttention over slots, then tokens; its block mask is made once, outside of the time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, r, w = layout.block_size, layout.slots_per_block, layout.window_size
    slots = tokens // b * r

    def sees(_batch, _head, query, key):
        token = key - slots
        in_window = (key >= slots) & (token <= query) & (token > query - w)
        return in_window | ((key < slots) & (key // r < (query + 1) // b))

    mask = torch.compile(create_block_mask)(sees, None, None, tokens, slots + tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query, key, value, slot_key, slot_value, _layout, _first_block=None):
        keys, values = torch.cat((slot_key, key), 2), torch.cat((slot_value, value), 2)
        return compiled(query.contiguous(), keys, values, block_mask=mask)

    return Variant("flex compiled", attend)


class Case(NamedTuple):
    """Inputs of one call, and its output and gradients in float64."""

    name: str
    leaves: list[Tensor]
    layout: BlockLayout
    first_block: Tensor | None
    weight: Tensor
    expected: list[Tensor]


def make_leaves(batch: int, tokens: int, groups: int, layout: BlockLayout, device: torch.device, dtype) -> list[Tensor]:
    """Queries, keys, values as a model has them, [B, N, H, D] in memory, and the slots of complete blocks."""
    heads = (HEADS, groups, groups)
    states = [torch.randn(batch, tokens, h, DIM, device=device, dtype=dtype).transpose(1, 2) for h in heads]
    weight = torch.rand(groups, 1, layout.block_size, layout.slots_per_block, device=device, dtype=dtype)
    weight = weight / layout.block_size
    return [*states, mix_blocks(states[1], weight), mix_blocks(states[2], weight)]


def gradients(attend: Callable, leaves: list[Tensor], layout, first_block, weight: Tensor) -> list[Tensor]:
    """Output and the gradient by every leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = attend(*leaves, layout, first_block)
    output = output[0] if isinstance(output, tuple) else output
    return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


def make_cases(device: torch.device) -> list[Case]:
    plain = BlockLayout(32, WINDOW, 4, 64)
    packed = torch.arange(32, device=device)
    packed = torch.stack((packed // 5 * 5, packed // 32))
    cases = []
    for name, tokens, groups, first_block, shift in (
        ("1024", 1024, HEADS, None, 0),
        ("odd n 999", 999, HEADS, None, 0),
        ("packed 1000", 1000, HEADS, packed, 0),
        ("grouped keys 777", 777, 2, None, 0),
        ("grouped, packed 512", 512, 2, packed[:, :16], 0),
        # Where a kernel scores absent keys as 0, exponentials overflow here. Only `not_finite` counts: the gradient of
        # the queries is a difference of large numbers.
        ("scores near -120", 704, HEADS, None, -120),
    ):
        leaves = make_leaves(2, tokens, groups, plain, device, torch.float64)
        if shift:
            leaves = [leaf * 0.1 for leaf in leaves]
            leaves[0][..., 0], leaves[1][..., 0], leaves[3][..., 0] = 1, shift * DIM**0.5, shift * DIM**0.5
        leaves = [leaf.bfloat16() for leaf in leaves]
        weight = torch.randn(2, HEADS, tokens, DIM, device=device).bfloat16()
        truth = gradients(attend_blocks_reference, [leaf.double() for leaf in leaves], plain, first_block, weight)
        cases.append(Case(name, leaves, plain, first_block, weight, truth))
    return cases


def check(variant: Variant, case: Case, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Relative errors (Frobenius), numbers that are not finite, and whether three runs give the same bits."""
    arguments = ([leaf.to(dtype) for leaf in case.leaves], case.layout, case.first_block, case.weight)
    runs = [gradients(variant, *arguments) for _ in range(3)]
    pairs = list(zip(("output", *LEAVES), runs[0], case.expected, strict=True))
    return {
        "errors": {name: float(f"{relative_error(got, wanted):.1e}") for name, got, wanted in pairs},
        "not_finite": sum(int((~got.isfinite()).sum()) for _, got, _ in pairs),
        "output_repeats": all(torch.equal(runs[0][0], run[0]) for run in runs),
        "gradients_repeat": all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True)),
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def leaks(variant: Variant, device: torch.device) -> int:
    """Of 12 outputs, how many have a gradient by a later token that is not zero, or change with later tokens."""
    layout = BlockLayout(32, WINDOW, 4, 64)
    states = torch.randn(3, 2, HEADS, 1000, DIM, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.rand(1, 1, 32, 4, device=device, dtype=torch.bfloat16) / 32

    def forward(states):
        query, key, value = states
        return variant(query, key, value, mix_blocks(key, weight), mix_blocks(value, weight), layout, None)

    output, found = forward(states), 0
    for t in (0, 30, 31, 32, 127, 128, 255, 256, 300, 511, 512, 998):
        (gradient,) = torch.autograd.grad(output[:, :, t].float().sum(), states, retain_graph=True)
        changed = states.detach().clone()
        changed[:, :, :, t + 1 :] += 1
        same = torch.equal(forward(changed)[:, :, : t + 1], output[:, :, : t + 1])
        found += bool(gradient[:, :, :, t + 1 :].any()) or not same
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """Median of 20 after a warm-up; of fewer where one takes long."""
    for _ in range(3):
        call()
    times = []
    began = time.perf_counter()
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        times.append((start, stop))
        if time.perf_counter() - began > 0.3:
            torch.cuda.synchronize()
            if time.perf_counter() - began > 1:
                break
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(stop) for start, stop in times), 3)


def measure(forward: Callable[..., Tensor], leaves: list[Tensor]) -> dict:
    """Time of the forward pass and of both passes, and what both need at their peak beyond inputs and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = forward(*leaves)
    weight = torch.randn_like(output)
    del output

    def both() -> None:
        torch.autograd.grad(forward(*leaves), leaves, weight)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(leaf.nbytes for leaf in leaves)
    with torch.no_grad():
        forward_ms = milliseconds(lambda: forward(*leaves))
    return {"forward_ms": forward_ms, "both_ms": milliseconds(both), "peak_MiB": round(peak / 2**20)}


class Report:
    """Rows as they come, on the screen and in the file; no row is begun when the time is over."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.ends = path, time.perf_counter() + seconds
        self.result = {"environment": environment(), "correctness": [], "timing": [], "left_out": []}

    def add(self, section: str, names: dict, compute: Callable[[], dict]) -> None:
        if time.perf_counter() > self.ends:
            self.result["left_out"].append([section, *names.values()])
            return
        try:
            row = names | compute()
        except Exception as error:  # one variant that this version or device cannot run must not end the others
            row = names | {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        torch.cuda.synchronize()
        self.result[section].append(row)
        self.path.write_text(json.dumps(self.result, indent=1))
        print(" ".join(str(value) for value in row.values()), flush=True)


def environment() -> dict:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "heads": HEADS,
        "dim": DIM,
        "tokens": TOKENS,
        "window": WINDOW,
        "repeats": REPEATS,
    }


def check_all(report: Report, device: torch.device) -> None:
    cases = make_cases(device)
    variants = [Variant("loop", loop), *fused_variants()]
    for variant in variants:
        for case in cases if variant.chunk == 256 else cases[1:3]:
            names = {"variant": variant.name, "case": case.name}
            report.add("correctness", names, lambda v=variant, c=case: check(v, c))
        report.add("correctness", {"variant": variant.name}, lambda v=variant: {"leaks": leaks(v, device)})
    for variant in (Variant("loop", loop), Variant("fused C=256 default", attend_blocks_fused)):
        names = {"variant": variant.name, "case": "float32, odd n 999"}
        report.add("correctness", names, lambda v=variant: check(v, cases[1], torch.float32))


def time_all(report: Report, device: torch.device, late: bool) -> None:
    """All shapes; ``late`` for the variants that are compiled first."""
    for tokens, (slots, block) in SHAPES.items():
        if late and tokens not in COMPILED_AT:
            continue
        blocks = tokens // block
        layout = BlockLayout(block, WINDOW, slots // blocks, blocks)
        leaves = make_leaves(TOKENS // tokens, tokens, HEADS, layout, device, torch.bfloat16)
        names = {"n": tokens, "k": slots, "b": block, "r": slots // blocks}
        weight = torch.full((HEADS, 1, block, slots // blocks), 1 / block, device=device, dtype=torch.bfloat16)

        def timed(variant: Variant, leaves=leaves, layout=layout) -> dict:
            return measure(lambda *tensors: variant(*tensors, layout, None), leaves)

        def causal(query, key, value):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        def mixing(key, value, weight):
            return mix_blocks(key, weight) + mix_blocks(value, weight)

        if late:
            for variant in compiled_variants():
                report.add("timing", names | {"variant": variant.name}, lambda v=variant: timed(v))
            flex = names | {"variant": "flex compiled"}
            report.add("timing", flex, lambda n=tokens, la=layout, t=timed: t(flex_variant(n, la, device)))
            continue
        for name, function, inputs in (
            ("cudnn full causal", causal, leaves[:3]),
            ("mixing into slots, not in the rows below", mixing, [*leaves[1:3], weight]),
        ):
            report.add("timing", names | {"variant": name}, lambda f=function, i=inputs: measure(f, i))
        for variant in (Variant("loop", loop), *fused_variants()):
            report.add("timing", names | {"variant": variant.name}, lambda v=variant: timed(v))


def table(rows: list[dict]) -> str:
    """Milliseconds of both passes (and of the forward pass): a line for each variant, a column for each n."""
    lengths = sorted({row["n"] for row in rows})
    lines = ["| variant | " + " | ".join(f"n={n}" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for n in lengths:
            row = next((row for row in rows if (row["variant"], row["n"]) == (variant, n)), {})
            cells.append(f"{row['both_ms']} ({row['forward_ms']})" if "both_ms" in row else "failed" if row else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Causal attention on one GPU, bfloat16: errors, times, memory.")
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=70, help="begin nothing after so long (default: 70)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    warnings.simplefilter("ignore")  # a backend that is asked for and refuses says why in warnings, row by row
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device, report = torch.device("cuda"), Report(arguments.result, arguments.seconds)
    check_all(report, device)
    time_all(report, device, late=False)
    time_all(report, device, late=True)
    if report.result["timing"]:
        print(table(report.result["timing"]))
    print("left out for want of time:", report.result["left_out"] or "nothing")
    arguments.result.write_text(json.dumps(report.result, indent=1))


if __name__ == "__main__":
    main()
