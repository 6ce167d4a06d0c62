"""Losses along the way of a training, and how far they are from those of full attention with the same seed."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.experiments import Run

Curve = tuple[Run, list[list[Any]]]  # a run and the lines of its log, [step, training loss, validation loss]
TRAINING, VALIDATION = 1, 2  # columns of a line


def over_tokens(run: Run, log: list[list[Any]], column: int) -> list[tuple[float, float]]:
    """[million tokens, loss], where the column has one."""
    scale = run.tokens / run.flags["max_steps"] / 1e6
    return [(entry[0] * scale, entry[column]) for entry in log if entry[column] is not None]


def apart_along_the_way(curves: Sequence[Curve], column: int) -> list[tuple[Run, list[tuple[float, float]]]]:
    """Losses of each run of our class less those of its reference with the same seed, where both were measured."""
    known = {(run.side, run.flags["seed"]): dict(over_tokens(run, log, column)) for run, log in curves}
    found = []
    for run, log in curves:
        reference = reference_of(run)
        if run.side == reference or not run.theme.is_ours(run.side):
            continue
        beside = known.get((reference, run.flags["seed"]), {})
        points = [(at, value - beside[at]) for at, value in over_tokens(run, log, column) if at in beside]
        found += [(run, points)] if points else []
    return found


def reference_of(run: Run) -> str:
    """Of the references of its theme the one that has QK-norm if the run has it; the first, where none is like it."""
    theme = run.theme
    norms = {
        side: {**theme.flags, **theme.sides[side]}.get("qk_norm") for side in [theme.reference, *theme.also_against]
    }
    alike = [side for side, norm in norms.items() if norm == run.flags.get("qk_norm")]
    return run.side if run.side in norms else [*alike, theme.reference][0]


def since_the_last(points: Sequence[tuple[float, float]], ends: Sequence[float]) -> list[float | None]:
    """Means of the values behind the end before and up to each of the ends; None where there is none."""
    starts = [0.0, *ends[:-1]]
    values = [[value for at, value in points if start < at <= end] for start, end in zip(starts, ends, strict=True)]
    return [statistics.mean(found) if found else None for found in values]
