"""Rows of measurements as they come, on the screen and in a JSON file, within a limit of time; their command line."""

import argparse
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

EARLIER = "; earlier rows: "  # between the commits of a result
# A row that is begun has so long, though the time for all of them ends before.
LEAST_SECONDS = 60.0


class Report:
    """Sections of rows; no row is begun when the time is over, and a row that fails says why and ends nothing.

    Rows that ``done``, an earlier result, holds are not measured again, except those that failed for another reason
    than memory. Rows of a run after the first have its number, ``run``; ``environment`` then lists ``runs``.

    Args:
        path: JSON file, written anew after every row.
        seconds: after so long nothing is begun.
        line: a row, as text for the screen.
        row_seconds: a row that takes longer has failed; None: it may take as long as it likes. What the end of the
            time cuts off was left out.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        theme: str,
        environment: dict,
        sections: tuple[str, ...],
        line: Callable[[dict], str],
        done: dict | None = None,
        row_seconds: float | None = None,
    ):
        self.path, self.line, self.ends = path, line, time.perf_counter() + seconds
        self.row_seconds = row_seconds
        runs = []
        if done:
            commits = [environment["commit"], *done["environment"]["commit"].split(EARLIER)]
            runs = [*(done["environment"].get("runs") or [_described(done["environment"])]), _described(environment)]
            environment = environment | {"commit": EARLIER.join(dict.fromkeys(commits)), "runs": runs}
        self.number = {"run": len(runs)} if runs else {}
        self.result = {"theme": theme, "environment": environment}
        self.result |= {section: [] for section in (*sections, "left_out")}
        self.done = done or {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, names: dict, compute: Callable[[], dict]) -> dict | None:
        """One row: an earlier one, or what ``compute`` returns; None where the time is over."""
        row = self.earlier(section, names)
        if row is not None:
            self.result[section].append(row)
            return row
        if self.is_over():
            self.leave_out(section, names)
            return None
        room = max(self.ends - time.perf_counter(), LEAST_SECONDS)
        try:
            with at_most(None if self.row_seconds is None else min(self.row_seconds, room)):
                row = names | compute()
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # what fails on the device fails here, not in the next row
        except Exception as error:  # one variant that this version or device cannot run must not end the others
            if isinstance(error, TimeoutError) and self.is_over():
                self.leave_out(section, names)
                return None
            row = names | failure(error)
        row |= self.number
        self.put(section, row)
        return row

    def put(self, section: str, row: dict) -> None:
        self.result[section].append(row)
        self.write()
        print(self.line(row), flush=True)

    def leave_out(self, section: str, names: dict) -> None:
        self.result["left_out"].append({"section": section} | names)
        self.write()

    def earlier(self, section: str, names: dict) -> dict | None:
        """The row of an earlier result that need not be measured again."""
        rows = [row for row in self.done.get(section) or [] if names.items() <= row.items()]
        return next((row for row in rows if "failed" not in row or has_no_room(row)), None)

    def is_over(self) -> bool:
        return time.perf_counter() > self.ends

    def write(self) -> None:
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")

    def close(self, page: Callable[[dict], str]) -> dict:
        """Write the result, and what ``page`` makes of it beside it, with .md; returns the result."""
        self.write()
        text = page(self.result) + "".join(f"{line}\n" for line in runs_table(self.result))
        self.path.with_suffix(".md").write_text(text, encoding="utf-8")
        return self.result


def _described(environment: dict) -> dict:
    """What tells one run from another."""
    return {name: environment.get(name) for name in ("commit", "date", "hardware", "threads", "command")}


def machine(environment: dict) -> str:
    """The device, and the processor that launches its kernels where a result names it."""
    hardware, processor = environment["hardware"], environment.get("processor")
    return hardware if processor in (None, hardware) else f"{hardware}, host {processor}"


def runs_table(result: dict) -> list[str]:
    """Lines that say which rows are of which run, where a result was resumed."""
    runs = result["environment"].get("runs")
    if not runs:
        return []
    sections = {name: rows for name, rows in result.items() if isinstance(rows, list) and name != "left_out"}
    rows = [{"section": section} | row for section, rows in sections.items() for row in rows]
    text = "Runs may be of several machines: compare their times with care. Rows that are not named are of run 1."
    body = []
    for number, run in enumerate(runs, 1):
        own = grouped(row for row in rows if row.get("run") == number)
        named = "; ".join(f"{who}: {', '.join(what)}" for who, what in own.items())
        body.append([number, run["commit"], run["date"], run["threads"], f"`{run['command']}`", named])
    return ["", "## Runs", "", text, *table(["run", "commit", "date", "threads", "command", "its rows"], body)]


def grouped(rows: Iterable[dict]) -> dict[str, list[str]]:
    """What is special about each row, by what it shares with others: section, variant and heads."""
    found: dict[str, list[str]] = {}
    for row in rows:
        shared = [row[name] for name in ("section", "variant", "model", "attention") if name in row]
        shared += [f"{row['heads']}x{row['dim']}"] if "heads" in row else []
        own = [row["case"]] if "case" in row else []
        own += [f"{name} = {row[name]}" for name in ("n", "context", "batch") if name in row]
        found.setdefault(", ".join(shared), []).append(" ".join(own))
    return found


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, as soon as that is in Python, as a compiler often is; main thread."""
    if seconds is None:
        yield
        return

    def stop(*_):
        raise TimeoutError(f"took more than {seconds:g} s")

    began, (left, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        rest = max(left - (time.monotonic() - began), 1e-3) if left else 0  # somebody else's, who has set one, too
        signal.setitimer(signal.ITIMER_REAL, rest)


def norm_of(described: dict) -> str:
    """Whether a Linformer had QK-norm; results of before that was written down had it."""
    return "with QK-norm" if described.get("qk_norm", True) else "without QK-norm"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """``result``, ``--seconds`` and ``--resume``."""
    parser.add_argument("result", type=Path, help="JSON file to write; the tables go beside it, with .md")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after so long (default: 540)")
    parser.add_argument(
        "--resume", type=Path, help="an earlier RESULT.json of the same version and device: its rows are kept"
    )


def add_smoke(parser: argparse.ArgumentParser) -> None:
    """``--smoke``, for :func:`device_of`."""
    parser.add_argument("--smoke", action="store_true", help="tiny models on a CPU: tests the program, not the speed")


def device_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The GPU, or the CPU for ``--smoke``; the parser ends the program where there is no GPU."""
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("needs a CUDA device, or --smoke")
    return torch.device("cpu" if arguments.smoke else "cuda")


def earlier_result(path: Path | None, theme: str, parser: argparse.ArgumentParser) -> dict | None:
    """What ``--resume`` names; the parser ends the program where that is of another theme."""
    done = json.loads(path.read_text(encoding="utf-8")) if path else None
    if done and done["theme"] != theme:
        parser.error(f"--resume {path} is a result of {done['theme']}, not of {theme}")
    return done


def command_line(module: str, words: list[str] | None) -> str:
    """The command as it is written into a result: files without their folders."""
    words = sys.argv[1:] if words is None else words
    return shlex.join(["python", "-m", module, *(Path(w).name if w.endswith(".json") else w for w in words)])


def failure(error: Exception) -> dict:
    """Why a row failed; of a device without room how much was asked for, not who else is on it."""
    said = " ".join(str(error).split())
    asked = re.search(r"Tried to allocate [\d.]+ \w+", said) if isinstance(error, torch.OutOfMemoryError) else None
    return {"failed": f"{type(error).__name__}: {asked[0] if asked else said[:300]}"}


def has_no_room(row: dict) -> bool:
    """Whether the device's memory was too small for a row."""
    return row.get("failed", "").startswith(torch.OutOfMemoryError.__name__)


def table(head: list, body: list[list]) -> list[str]:
    """Lines of a Markdown table behind an empty one; None is an empty cell."""
    rows = [head, ["---"] * len(head), *body]
    return ["", *("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows)]
