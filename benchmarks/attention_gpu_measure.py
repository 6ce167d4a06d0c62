"""Times, memory and errors of one way to attend on one device, and the rates of the device itself.

On a CPU, where the harness is tested, device events become the clock and memory is not measured.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import attention_gpu_gate as gate
from benchmarks.attention_gpu_cases import Attention, Shape

ALL_HEADS_CHECKED_TO = 65536  # beyond, two heads of the row are enough for the memory of float64
LONG_MS = 100.0  # a call that takes longer is repeated five times


class Repeats(NamedTuple):
    """At least ``least`` repeats, up to five times as many where they take less than ``seconds``."""

    least: int = 20
    seconds: float = 0.3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], device: torch.device, repeats: Repeats) -> list[float]:
    """Median, lower and upper quartile after a warm-up; of five repeats where one takes more than LONG_MS."""
    call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - began
    for _ in range(min(repeats.least, int(0.05 / once))):  # clocks rise under load
        call()
    count = min(5 * repeats.least, max(repeats.least, int(repeats.seconds / once)))
    times = call_times(call, device, 5 if 1e3 * once > LONG_MS else count)
    low, middle, high = statistics.quantiles(times, n=4)
    return [round(value, 4) for value in (middle, low, high)]


def call_times(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Milliseconds of each of ``count`` calls."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (stop - start) for start, stop in pairwise(marks)]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    synchronize(device)
    return [start.elapsed_time(stop) for start, stop in events]


def milliseconds_to_enqueue(call: Callable[[], object], device: torch.device) -> float:
    """How long the caller is busy with one call while the device has nothing else to do; the median of ten."""
    times = []
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 4)


def both_passes(attention: Attention) -> Callable[[], object]:
    """Forward and backward, with the gradient of every leaf."""
    leaves = [leaf.detach().requires_grad_() for leaf in attention.leaves]
    with torch.no_grad():
        weight = torch.randn_like(attention.forward(*leaves))
    return lambda: torch.autograd.grad(attention.forward(*leaves), leaves, weight)


def measure(attention: Attention, device: torch.device, repeats: Repeats) -> dict:
    """Times of the forward pass and of both passes; memory at the peak of both, beyond inputs and their gradients."""
    both = both_passes(attention)
    both()
    peak = None
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        synchronize(device)
        beyond = torch.cuda.max_memory_allocated() - before - sum(leaf.nbytes for leaf in attention.leaves)
        peak = round(beyond / 2**20, 1)
    with torch.no_grad():
        forward_ms = milliseconds(lambda: attention.forward(*attention.leaves), device, repeats)
    both_ms = milliseconds(both, device, repeats)
    return {
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "host_ms": milliseconds_to_enqueue(both, device) if both_ms[0] < LONG_MS else None,
        "peak_MiB": peak,
    }


def measure_graph(attention: Attention, device: torch.device, repeats: Repeats) -> dict:
    """Both passes, captured once in a CUDA graph and replayed."""
    both, side = both_passes(attention), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    return {"graph_ms": milliseconds(graph.replay, device, repeats)}


def measure_errors(attention: Attention, shape: Shape) -> dict:
    """Errors of output and gradients against float64, of the call that is timed.

    The truth is that of the last row of the batch alone: the gradient that enters is zero in all other rows, so that
    they add nothing to the gradients of E and F.
    """
    if attention.truth is None:
        return {}
    heads = shape.heads if shape.tokens <= ALL_HEADS_CHECKED_TO else 2

    def checked(tensors: list[Tensor], states: int) -> list[Tensor]:
        return [tensor[-1:, -heads:] for tensor in tensors[:states]] + tensors[states:]

    weight = torch.zeros_like(attention.leaves[0])
    weight[-1:, -heads:].normal_()
    got = gate.gradients_of(attention.forward, attention.leaves, weight)
    exact = [leaf.double() for leaf in checked(attention.leaves, 3)]
    wanted = gate.gradients_of(attention.truth, exact, weight[-1:, -heads:])
    return gate.errors(checked(got, 4), wanted, attention.names, weight.dtype)


def measure_ceilings(device: torch.device, repeats: Repeats, matmul: int, copied: int) -> dict:
    """Rates of a matrix product of order ``matmul`` on random numbers, and of a copy of so many bytes on the device."""
    a, b = (torch.randn(matmul, matmul, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    product_ms = milliseconds(lambda: torch.mm(a, b, out=c), device, repeats)[0]
    source = torch.randint(0, 255, (copied,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), device, repeats)[0]
    return {
        "matmul_tflop_per_s": float(f"{2 * matmul**3 / product_ms / 1e9:.7g}"),
        "copy_tbyte_per_s": float(f"{2 * copied / copy_ms / 1e9:.5g}"),  # read and written
    }
