"""Streaming the moments of generated rows, each precision in a process of its own, beside the bare products.

Blocks of rows are generated once and used again with another offset each time, so that memory does not grow with the
rows. Neither the generation nor the offset is in the seconds.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

BLOCKS = 4
# What the relative error of scatter and cross moments may be; past it nothing is reported.
LARGEST_ERROR = {"mixed": 1e-6, "float64": 1e-11, "tsqr": 1e-11}
DTYPES = {"mixed": torch.float32, "float64": torch.float64, "tsqr": torch.float64}


def measure(arguments) -> dict:
    """One row per precision, and on a GPU the rate of plain matrix products as a bound."""
    rows = []
    for precision in arguments.precisions:
        command = [sys.executable, "-m", "benchmarks.singlepass", "stream", "--measure", precision]
        for name in ("rows", "features", "targets", "batch", "device"):
            command += [f"--{name}", str(getattr(arguments, name))]
        print(f"{precision} ...", flush=True)
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]

        rows.append(json.loads(output))
        print(output, flush=True)
    sizes = {name: getattr(arguments, name) for name in ("rows", "features", "targets", "batch")}
    return {"sizes": sizes, "bounds": bounds(arguments), "rows": rows}


def generated(arguments) -> Iterator[tuple[Tensor, Tensor]]:
    """Features with unequal scales, correlations and a mean, and targets; float32, ``batch`` rows at a time."""
    generator = torch.Generator(arguments.device).manual_seed(0)
    options = {"generator": generator, "device": arguments.device}
    width = arguments.features
    mixing = torch.randn(width, width, **options) / width**0.5
    blocks = [torch.randn(arguments.batch, width, **options) @ mixing + 1 for _block in range(BLOCKS)]
    head = torch.randn(width, arguments.targets, **options) / width**0.5
    targets = [block @ head for block in blocks]
    for number, start in enumerate(range(0, arguments.rows, arguments.batch)):
        rows = min(arguments.batch, arguments.rows - start)
        offset = 0.01 * (number % 97)
        yield blocks[number % BLOCKS][:rows] + offset, targets[number % BLOCKS][:rows] - offset


def measure_one(arguments) -> dict:
    """Seconds, memory and error of one precision; raises if the error is too large."""
    from linpass.singlepass.statistics import RidgeStatistics

    precision, width, values = arguments.measure, arguments.features, arguments.targets
    warm = RidgeStatistics(width, values, precision=precision, device=arguments.device)
    for _round in range(2):
        warm.update(*next(generated(arguments))).scatter_DD.sum().item()
    batches = generated(arguments)
    first = next(batches)  # the blocks exist from here on
    before = reset_peak(arguments.device)
    statistics = RidgeStatistics(width, values, precision=precision, device=arguments.device)
    seconds = timed(arguments.device, lambda: statistics.update(*first))
    for features, targets in batches:
        seconds += timed(arguments.device, lambda: statistics.update(features, targets))  # noqa: B023
    seconds += timed(arguments.device, lambda: statistics.scatter_DD)  # what waits in a block
    peak = peak_bytes(arguments.device) - before
    scatter, cross, _seconds = products(arguments, torch.float64)
    bare_seconds = products(arguments, DTYPES[precision])[2]
    errors = [
        ((found - true).norm() / true.norm()).item()
        for found, true in ((statistics.scatter_DD, scatter), (statistics.cross_DC, cross))
    ]
    if not max(errors) < LARGEST_ERROR[precision]:
        raise AssertionError(f"{precision}: relative errors {errors}; nothing is reported")
    operations = 2 * arguments.rows * width * (width + values)
    return {
        "precision": precision,
        "seconds": round(seconds, 3),
        "bare_seconds": round(bare_seconds, 3),
        "over_bare": round(seconds / bare_seconds, 3),
        "flop_per_s": operations / seconds,
        "bare_flop_per_s": operations / bare_seconds,
        "peak_bytes": peak,
        "scatter_error": errors[0],
        "cross_error": errors[1],
    }


def products(arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """X'X and X'Y batch by batch, and nothing else in the seconds; moments about the mean of the first batch's columns.

    With float64 they are the truth: the shift takes the mean out of the products, so that nothing cancels.
    """
    width, values = arguments.features, arguments.targets
    options = {"dtype": dtype, "device": arguments.device}
    square, cross = torch.zeros(width, width, **options), torch.zeros(width, values, **options)
    sums, shifts, seconds = [0.0, 0.0], None, 0.0
    for features, targets in generated(arguments):
        pair = [features.to(dtype), targets.to(dtype)]
        shifts = shifts or [each.mean(0) for each in pair]
        pair = [each - shift for each, shift in zip(pair, shifts, strict=True)]
        sums = [total + each.sum(0) for total, each in zip(sums, pair, strict=True)]

        def multiply(rows=pair[0], targets=pair[1]):
            square.addmm_(rows.T, rows)
            cross.addmm_(rows.T, targets)

        seconds += timed(arguments.device, multiply)
    square -= torch.outer(sums[0], sums[0]) / arguments.rows
    cross -= torch.outer(sums[0], sums[1]) / arguments.rows
    return square, cross, seconds


def timed(device: str, work) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def reset_peak(device: str) -> int:
    """Bytes in use now; the peak begins anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    from benchmarks.run import status_bytes

    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    from benchmarks.run import status_bytes

    return status_bytes("VmHWM")


def bounds(arguments) -> dict:
    """Rates of X'X, flop per second, in batches of this shape: median of 20."""
    rates = {}
    cases = {"float32": torch.float32, "float64": torch.float64}
    if arguments.device != "cpu":
        cases["tf32"] = torch.float32
    for name, dtype in cases.items():
        rows = torch.randn(arguments.batch, arguments.features, device=arguments.device, dtype=dtype)
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        times = sorted(timed(arguments.device, lambda: rows.T @ rows) for _round in range(23))  # noqa: B023
        rates[name] = 2 * arguments.batch * arguments.features**2 / times[10]
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates
