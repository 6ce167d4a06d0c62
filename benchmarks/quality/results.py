"""The folder of results: a line of JSON for every finished run, and what the lines of a theme say together.

``runs.jsonl``       flags, parameters, losses on the choosing half, speed, environment
``curves.jsonl``     the training log of each, [step, training loss, validation loss]
``untouched.jsonl``  losses on the untouched half; read by ``report --untouched`` alone
``samples.jsonl``    what the models wrote first

Lines are only added, one write each, by one process. A run is known by its key, the digest of its flags. Folders that
several machines have written are joined by ``merge``.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.data import CHOOSING, UNTOUCHED
from benchmarks.quality.experiments import LINPASS, Run, Theme, read_theme, runs_of
from linpass.errors import InputError
from linpass.scoring import ratio_error

RUNS, CURVES, SAMPLES = "runs", "curves", "samples"
# Student's t at 97.5 %, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
Row = dict[str, Any]


class Results:
    """The lines of a folder, by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: dict[str, int] = {}  # lines by file
        self.runs: dict[str, Row] = {}
        for row in self.read(RUNS):  # of a key tried again, the last that did not fail
            if "failed" not in row or row["key"] not in self.runs:
                self.runs[row["key"]] = row

    def read(self, name: str) -> list[Row]:
        """The lines that are whole; how many are not stands in ``unreadable``."""
        path = self.folder / f"{name}.jsonl"
        rows = []
        self.unreadable.pop(name, None)
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:  # of a machine that went while it was written
                self.unreadable[name] = self.unreadable.get(name, 0) + 1
        return rows

    def add(self, run: Run, row: Row, answer: Row) -> None:
        """Write what a run answered; ``row`` is what the caller knows of it."""
        row = {"key": run.key, "theme": run.theme.name, "side": run.side, "program": run.program} | row
        row |= {"preset": run.theme.preset, "flags": run.flags, "tokens": run.tokens}
        parts = {UNTOUCHED: UNTOUCHED, CURVES: "log", SAMPLES: "sample"}
        for name, part in parts.items():
            if answer.get(part):
                self._append(name, {"key": run.key, "side": run.side, part: answer[part]})
        row |= {name: value for name, value in answer.items() if name not in parts.values()}
        row["untouched"] = UNTOUCHED in answer
        self._append(RUNS, row)
        self.runs[run.key] = row

    def add_unfinished(self, run: Run, log: list) -> None:
        """Write the log of a run that was stopped and goes on later; nothing counts it as finished."""
        self._append(CURVES, {"key": run.key, "side": run.side, "unfinished": True, "log": log})

    def _append(self, name: str, row: Row) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.jsonl"
        torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")

    def finished(self, run: Run) -> Row | None:
        """The row of a run that needs not be made again."""
        row = self.runs.get(run.key)
        if row is None or "failed" in row:
            return None
        lacks_half = run.theme.untouched and CHOOSING in row and not row["untouched"]
        return None if lacks_half else row

    def seconds(self, run: Run, assumed: float) -> float:
        """How long a run may take, from runs of its theme, else of all themes at its n; else ``assumed`` a token.

        Per token as the last of its side, or as the slowest: the first of a side compiles what the later ones find
        compiled. Themes differ in the tokens of a step, and so in the time of a token.
        """
        rows = [row for row in self.runs.values() if CHOOSING in row]
        rows = [row for row in rows if row["flags"]["seq_length"] == run.flags["seq_length"]]
        rows = [row for row in rows if row["theme"] == run.theme.name] or rows
        rates = [(row["seconds"] - row.get("stood_still", 0.0)) / row["tokens"] for row in rows]
        own = [rate for rate, row in zip(rates, rows, strict=True) if row["side"] == run.side]
        return (own[-1] if own else max(rates, default=assumed)) * run.tokens


def merge(folders: Sequence[Path], into: Path) -> dict[str, int]:
    """Add to a folder of results what others have; of each run and file the first finished one stays.

    Of a run that one theme measured on the untouched half and another did not, the one with both halves.

    Returns: lines of each file afterwards.
    Raises:
        InputError: a line cannot be read, or the runs had other settings.
    """
    kept: dict[str, dict[str, Row]] = {}
    settings = {}
    for folder in (into, *folders):
        results = Results(folder)
        for name in (RUNS, CURVES, UNTOUCHED, SAMPLES):
            for row in results.read(name):
                earlier = kept.setdefault(name, {}).get(row["key"])
                if earlier is None or is_better(row, earlier):
                    kept[name][row["key"]] = row
                if name == RUNS:
                    same = {key: value for key, value in row["settings"].items() if key != "processes_per_gpu"}
                    settings[json.dumps(same, sort_keys=True)] = same
        if results.unreadable:
            raise InputError(f"{folder} has lines that cannot be read: {results.unreadable}")
    if len(settings) > 1:
        raise InputError(f"the runs had other settings: {list(settings.values())}")
    into.mkdir(parents=True, exist_ok=True)
    for name, rows in kept.items():
        partial = into / f".{name}.jsonl"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        partial.replace(into / f"{name}.jsonl")
    return {name: len(rows) for name, rows in kept.items()}


def is_better(row: Row, earlier: Row) -> bool:
    """Of two rows of one run."""
    halves = row.get("untouched") is True and earlier.get("untouched") is False
    return halves or not earlier.keys().isdisjoint({"failed", "unfinished"})


def loss(row: Row | None) -> float:
    """On the choosing half; infinite where the training diverged."""
    if row is None or "diverged" in row:
        return math.inf
    return row[CHOOSING]["loss"]


def chosen_rates(sweep: Theme, runs: Sequence[Run], results: Results) -> dict[str, float]:
    """The rate of the lowest loss on the choosing half, of each side whose sweep is complete."""
    chosen = {}
    for side in sweep.sides:
        own = [run for run in runs if run.side == side]
        rows = [results.finished(run) for run in own]
        if own and all(rows) and min(map(loss, rows)) < math.inf:
            best = min(zip(own, rows, strict=True), key=lambda pair: loss(pair[1]))[0]
            chosen[side] = best.flags["learning_rate"]
    return chosen


def worth_their_time(theme: Theme, runs: Sequence[Run], results: Results) -> list[Run]:
    """Without the later seeds of sides that differ by less than ``theme.least`` with the first, or have not run.

    A difference counts where it is that large with every seed: theirs cannot.
    """
    if not theme.least:
        return list(runs)
    first = {run.side: results.finished(run) for run in runs if run.flags["seed"] == theme.seeds[0]}

    def is_worth(run: Run) -> bool:
        if run.flags["seed"] == theme.seeds[0]:
            return True
        row, reference = first.get(run.side), first.get(theme.reference)
        if not row or not reference:
            return False
        return run.side == theme.reference or not abs(loss(row) - loss(reference)) < theme.least

    return [run for run in runs if is_worth(run)]


@dataclass
class Finished:
    """A theme with the rows of its finished runs."""

    theme: Theme
    runs: list[tuple[Run, Row]]
    planned: int

    def sides(self) -> dict[str, list[Row]]:
        """Rows by side, in the theme's order; without those that another program trained."""
        found: dict[str, list[Row]] = {side: [] for side in self.theme.sides}
        for run, row in self.runs:
            if run.program == LINPASS:
                found[run.side].append(row)
        return {side: rows for side, rows in found.items() if rows}


def finished(name: str, results: Results) -> Finished:
    """A theme's finished runs; of one whose rates are not chosen yet, those of the sides whose rates are."""
    smoke = any(row["settings"]["smoke"] for row in results.runs.values())
    theme = read_theme(name, smoke)
    rates = {}
    if theme.rates_of:
        sweep = read_theme(theme.rates_of, smoke)
        rates = chosen_rates(sweep, runs_of(sweep, {}), results)
    runs = runs_of(theme, rates)
    rows = [(run, results.runs[run.key]) for run in runs if results.finished(run)]
    return Finished(theme, rows, theme.planned())


def scores(rows: Iterable[Row], half: str, untouched: dict[str, Row]) -> dict[int, Row]:
    """{seed: scores} of the rows that did not diverge, on a half of the validation documents."""
    kept = [row for row in rows if "diverged" not in row]
    if half == CHOOSING:
        return {row["flags"]["seed"]: row[CHOOSING] for row in kept}
    return {row["flags"]["seed"]: untouched[row["key"]] for row in kept if row["key"] in untouched}


@dataclass
class Spread:
    """Mean of some numbers, and the standard deviation between them, None of a single one."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def standard_error(self) -> float | None:
        """Of the mean."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)


@dataclass
class Difference:
    """A side's loss less that of the reference, both with the same seeds, hence the same rows in the same order.

    Args:
        seeds: the differences of pairs with one seed.
        document_error: standard error over documents of the mean difference, from each document's own difference;
            None for a single document.
        better: documents of a lower loss, mean over seeds, of so many ``documents``.
    """

    seeds: Spread
    document_error: float | None
    better: int
    documents: int

    @property
    def half_width(self) -> float | None:
        r"""Of a 95 % interval for other seeds and other documents, :math:`\sqrt{(t\,s_{seeds})^2 + (1.96\,s_{doc})^2}`.

        None for a single seed or document, and beyond the seeds of the table of Student's t.
        """
        quantile = T_QUANTILES.get(self.seeds.count - 1)
        if quantile is None or self.document_error is None or self.seeds.standard_error is None:
            return None
        return math.hypot(quantile * self.seeds.standard_error, 1.96 * self.document_error)


def difference(side: dict[int, Row], reference: dict[int, Row]) -> Difference | None:
    """From {seed: scores} of both, as :func:`~benchmarks.quality.single_run.score` gives them; None without a pair."""
    seeds = sorted(side.keys() & reference.keys())
    if not seeds:
        return None
    pairs = [(side[seed], reference[seed]) for seed in seeds]
    of_side, of_reference = (torch.tensor([pair[i]["document_nats"] for pair in pairs]).double() for i in (0, 1))
    tokens = torch.tensor(pairs[0][0]["document_tokens"]).double()
    apart = (of_side - of_reference).mean(0)
    return Difference(
        seeds=Spread.of([a["loss"] - b["loss"] for a, b in pairs]),
        document_error=ratio_error(apart, tokens),
        better=int((apart < 0).sum()),
        documents=len(tokens),
    )
