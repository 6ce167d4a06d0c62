"""What a piece of work costs: wall time, CPU time and memory, each piece in a process of its own.

In one process the second piece would find warm caches, freed memory to use again and the first one's peak.
"""

import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import torch

from linpass.errors import InputError

# What every piece needs is imported once: the processes are copies of one that has done so and nothing else.
PRELOADED = ["torch._dynamo", "torch.optim", "transformers", "linpass.singlepass.measurement"]


@dataclass(frozen=True)
class Cost:
    """What a piece of work took.

    Args:
        seconds: wall time.
        cpu_seconds: of all threads together, user and system.
        peak_bytes: most resident memory above what the process had when the work began, its inputs already loaded;
            as the kernel counts it (``ru_maxrss``), not sampled. None where the system does not say.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def measured(load: Callable[[], Any], work: Callable[[Any], Any]) -> tuple[Any, Cost]:
    """``work(load())`` in a fresh process, and what ``work`` cost; ``load`` is not counted.

    Both are functions of a module, or ``functools.partial`` of such; what ``work`` returns must be picklable. The
    process uses as many threads as this one.

    Raises:
        InputError: ``work`` raised it, with the same message.
        RuntimeError: anything else went wrong there.
    """
    context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, torch.get_num_threads(), load, work))
    process.start()
    sender.close()
    try:
        kind, value = pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the measured process ended with exit code {process.exitcode}; -9 is a lack of memory"
        ) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        receiver.close()
        process.join()
    if kind == "refused":
        raise InputError(value)
    if kind == "failed":
        raise RuntimeError(value)
    return value


def resident_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int | None:
    """Most resident memory that this process has had; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(sender: Any, threads: int, load: Callable[[], Any], work: Callable[[Any], Any]) -> None:
    torch.set_num_threads(threads)
    try:
        message = ("done", _timed(load, work))
    except InputError as error:
        message = ("refused", str(error))
    except Exception:
        import traceback

        message = ("failed", traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    sender.close()


def _timed(load: Callable[[], Any], work: Callable[[Any], Any]) -> tuple[Any, Cost]:
    loaded = load()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, behind what loading took
    before = resident_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work(loaded)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = peak_resident_bytes()
    peak = None if before is None or after is None else max(0, after - before)
    return result, Cost(wall, cpu, peak)
