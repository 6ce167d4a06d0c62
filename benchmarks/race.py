"""Several ways to do the same work on one device, timed in turns, so that all meet the same clocks and noise."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from benchmarks.attention_gpu_measure import call_times, synchronize
from benchmarks.report_file import Report, failure

KERNELS_LISTED = 40
# An entrant whose calls have taken longer together has had enough of them after five.
LONG_MS, ENOUGH = 3000.0, 5


class Entrant(NamedTuple):
    """One way to do the work.

    Attributes:
        call: what is timed.
        tokens: tokens of one step.
        steps: steps that one call takes.
        facts: what else its row says; a function, because some of it is known only after the timing.
        rewind: makes the next round start where the first did; not timed.
    """

    call: Callable[[], object]
    tokens: int
    steps: int = 1
    facts: Callable[[], dict] = dict
    rewind: Callable[[], object] = lambda: None


class Rounds(NamedTuple):
    """``rounds`` turns of ``calls`` calls each; the quartiles are those of all calls.

    Attributes:
        profile: list the longest kernels, too.
        versions: of one function that may be compiled; an entrant that needs more fails, where torch.compile would
            silently go on without compiling. All models of transformers pass through one and the same function.
    """

    rounds: int = 7
    calls: int = 3
    profile: bool = False
    versions: int = 16


def race(
    report: Report,
    section: str,
    names: dict,
    builders: dict[str, Callable[[], Entrant]],
    device: torch.device,
    rounds: Rounds,
) -> None:
    """A row for each of ``builders``, measured in one interleaved run.

    Nothing is measured where an earlier result has all rows; else all are measured again, because only times of one run
    are compared. When the time is over no further entrant is built; those that are there are still measured.
    """
    wanted = {name: names | {"variant": name} for name in builders}
    earlier = [report.earlier(section, row) for row in wanted.values()]
    if all(row is not None for row in earlier):
        report.result[section] += earlier
        return
    with torch._dynamo.config.patch(recompile_limit=rounds.versions, fail_on_recompile_limit_hit=True):
        _race(report, section, wanted, builders, device, rounds)


def _race(report, section, wanted, builders, device, rounds) -> None:
    ready: dict[str, tuple[Entrant, dict]] = {}
    release(device)
    for name, build in builders.items():
        if report.is_over():
            report.leave_out(section, wanted[name])
            continue
        try:
            ready[name] = warm(build, device)
        except Exception as error:  # a row too; the others go on
            report.put(section, wanted[name] | failure(error))
            error.__traceback__ = None  # its frames hold the memory of what failed
            release(device, compiled=False)
    times = take_turns(report, section, wanted, {name: entrant for name, (entrant, _) in ready.items()}, device, rounds)
    for name, milliseconds in times.items():
        entrant, cost = ready[name]
        try:
            row = wanted[name] | speed(entrant, milliseconds) | cost | entrant.facts()
            if rounds.profile:
                entrant.rewind()
                row["profile"] = profile(entrant.call, device, entrant.steps * row["ms"][0])
        except Exception as error:
            row = wanted[name] | failure(error)
        report.put(section, row)
    ready.clear()
    release(device)


def warm(build: Callable[[], Entrant], device: torch.device) -> tuple[Entrant, dict]:
    """An entrant after some calls; seconds until the first had ended, and memory of a call with all that it holds."""
    cuda, began = device.type == "cuda", time.perf_counter()
    before = torch.cuda.memory_allocated() if cuda else 0
    entrant = build()
    entrant.rewind()
    entrant.call()
    synchronize(device)
    ready_s = time.perf_counter() - began
    entrant.rewind()
    began = time.perf_counter()
    entrant.call()
    synchronize(device)
    if time.perf_counter() - began < 1:
        entrant.rewind()
        entrant.call()
    entrant.rewind()
    synchronize(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    entrant.call()
    synchronize(device)
    peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1) if cuda else None
    return entrant, {"ready_s": round(ready_s, 2), "peak_MiB": peak}


def take_turns(
    report: Report, section: str, wanted: dict, entrants: dict[str, Entrant], device: torch.device, rounds: Rounds
) -> dict[str, list[float]]:
    """Milliseconds of every call by entrant; one that fails on the way has its row written and is out."""
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(rounds.rounds):
        for name in list(times):
            if len(times[name]) >= ENOUGH and sum(times[name]) > LONG_MS:
                continue
            try:
                entrants[name].rewind()
                synchronize(device)
                times[name] += call_times(entrants[name].call, device, rounds.calls)
            except Exception as error:
                report.put(section, wanted[name] | failure(error))
                del times[name]
    return times


def speed(entrant: Entrant, milliseconds: list[float]) -> dict:
    """Milliseconds of a step (median, quartiles), and tokens a second at the median."""
    low, middle, high = statistics.quantiles([ms / entrant.steps for ms in milliseconds], n=4)
    return {
        "ms": [round(value, 4) for value in (middle, low, high)],
        "tokens_per_s": round(1e3 * entrant.tokens / middle, 1),
        "repeats": len(milliseconds),
    }


def profile(call: Callable[[], object], device: torch.device, call_ms: float) -> dict:
    """Kernels of one call that take most time, and the share of ``call_ms``, measured before, in which none runs.

    The recording slows the caller down, not the kernels: hence the earlier time.
    On a CPU, where the harness is tested, operators stand for kernels, and the share means nothing.
    """
    activity = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as recorded:
        call()
        synchronize(device)
    times: dict[str, list[float]] = {}
    for event in recorded.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA  # pyright: ignore[reportAttributeAccessIssue]
        if on_device == cuda and not event.is_user_annotation:
            spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            times.setdefault(event.name, []).append(spent)
    total_ms = sum(sum(found) for found in times.values()) / 1e3
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:KERNELS_LISTED]
    return {
        "call_ms": round(call_ms, 3),
        "kernels_ms": round(total_ms, 3),
        "outside_kernels": round(max(0.0, 1 - total_ms / call_ms), 3),
        "top": [[name[:100], len(found), round(sum(found) / 1e3, 3)] for name, found in longest],
    }


def release(device: torch.device, compiled: bool = True) -> None:
    """Give back what the last entrants held; the number of compiled versions of one function is limited, too."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after a kernel has failed
            torch.cuda.empty_cache()


def compiled(function: Any, options: dict) -> Any:
    """torch.compile for the one shape that is measured."""
    return torch.compile(function, dynamic=False, **options)
