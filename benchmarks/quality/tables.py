"""The tables of a theme, as lines of Markdown."""

import math
from collections.abc import Sequence

from benchmarks.attention_gpu_report import table
from benchmarks.quality.along import TRAINING, VALIDATION, Curve, apart_along_the_way, reference_of, since_the_last
from benchmarks.quality.data import CHOOSING
from benchmarks.quality.results import Difference, Finished, Row, Spread, difference, loss, scores

FIRST_END = 16  # of ranges of positions: those before have few tokens, one to eight of every window
NEAR, FAR = (16, 128), 256  # places before which all sides see much the same, and behind which they do not

LEGEND = (
    "Losses in nats per token; *deviation* between seeds; *less* a side: the difference of runs with the same seed, "
    "and the standard error of its mean; *over documents*: the standard error of that difference over documents, "
    "paired by document; *95 %*: from both errors, seeds by Student's t; *better in*: documents of a lower loss, mean "
    "over seeds; tokens per second while as many runs shared a GPU as `processes_per_gpu` says, so of different runs "
    "not to be compared."
)


def rates_table(part: Finished) -> list[str]:
    """Loss on the choosing half by side and rate; the lowest is the side's rate."""
    theme = part.theme
    rates = sorted({rate for side in theme.sides for rate in theme.rates(side)})
    body, edges = [], []
    for side, rows in part.sides().items():
        losses = {row["flags"]["learning_rate"]: loss(row) for row in rows}
        complete = losses.keys() >= set(theme.rates(side))
        best = min(losses, key=lambda rate: losses[rate]) if complete else None
        body.append([side, *(mark(losses.get(rate), rate == best) for rate in rates)])
        if best in (min(theme.rates(side)), max(theme.rates(side))):
            edges.append(side)
    lines = ["", "Loss on the choosing half:", *table(["side", *(f"{rate:g}" for rate in rates)], body)]
    if edges:
        lines += ["", f"Best at the edge of its grid: {', '.join(edges)}."]
    return lines


def mark(value: float | None, best: bool) -> str:
    if value is None:
        return ""
    text = "diverged" if math.isinf(value) else f"{value:.4f}"
    return f"**{text}**" if best else text


def loss_table(part: Finished, half: str, untouched: dict[str, Row]) -> list[str]:
    """A line for each side: parameters, rate, loss with its spread, difference to the reference, speed."""
    sides, reference = part.sides(), part.theme.reference
    against = scores(sides.get(reference, []), half, untouched)
    body = []
    for side, rows in sides.items():
        own = scores(rows, half, untouched)
        spread = Spread.of([found["loss"] for found in own.values()]) if own else None
        apart = difference(own, against) if side != reference else None
        diverged = sum("diverged" in row for row in rows)
        speeds = [row["speed"]["tokens_per_second"] for row in rows if row.get("speed", {}).get("tokens_per_second")]
        body.append(
            [
                side,
                f"{rows[0]['parameters']:,}" if "parameters" in rows[0] else None,
                f"{rows[0]['flags']['learning_rate']:g}",
                f"{len(own)}" + (f", {diverged} diverged" if diverged else ""),
                with_error(spread.mean, spread.deviation) if spread else None,
                *(difference_cells(apart) if apart else [None] * 4),
                f"{Spread.of(speeds).mean:,.0f}" if speeds else None,
            ]
        )
    head = ["side", "parameters", "rate", "seeds", "loss ± deviation", *difference_head(reference)]
    text = f"On the {half} half."
    if part.theme.goal is not None:
        text += f" The goal, set beforehand, is {part.theme.goal:+g} for a Linformer."
    lines = ["", text, *table([*head, "tokens/s"], body)]
    for other in part.theme.also_against:
        lines += difference_table({side: scores(rows, half, untouched) for side, rows in sides.items()}, other)
    return lines


def difference_table(sides: dict[str, dict[int, Row]], reference: str) -> list[str]:
    """A line for each side that has seeds in common with another reference."""
    against, body = sides.get(reference, {}), []
    for side, own in sides.items():
        apart = difference(own, against) if side != reference else None
        if apart:
            body.append([side, apart.seeds.count, *difference_cells(apart)])
    head = ["side", "seeds", *difference_head(reference)]
    return ["", f"Against {reference}, runs with the same seed:", *table(head, body)] if body else []


def difference_head(reference: str) -> list[str]:
    return [f"less {reference} ± error", "± over documents", "95 %", "better in"]


def difference_cells(apart: Difference) -> list[str | None]:
    """Under ``difference_head``."""
    with_seeds = with_error(apart.seeds.mean, apart.seeds.standard_error, signed=True)
    return [with_seeds, number(apart.document_error), interval(apart), f"{apart.better} of {apart.documents}"]


def interval(apart: Difference) -> str | None:
    if apart.half_width is None:
        return None
    return f"{apart.seeds.mean - apart.half_width:+.4f} to {apart.seeds.mean + apart.half_width:+.4f}"


def position_tables(part: Finished) -> list[str]:
    """For the reference and every other side that the others are compared with."""
    references = (part.theme.reference, *part.theme.also_against)
    return [line for reference in references for line in position_table(part, reference)]


def position_table(part: Finished, reference: str) -> list[str]:
    """Each side's loss less the reference's by position in the window, mean over seeds, on the choosing half."""
    seeds = differences_by_position(part, reference)
    apart = mean_over_seeds(seeds)
    if not apart:
        return []
    ends = [end for end, _value in next(iter(apart.values()))]
    body = []
    for side, values in apart.items():
        contrasts = [found for pairs in seeds[side] if (found := far_less_near(pairs)) is not None]
        contrast = Spread.of(contrasts) if contrasts else None
        cell = with_error(contrast.mean, contrast.standard_error, signed=True) if contrast else None
        body.append([side, *(f"{value:+.3f}" for _end, value in values), cell])
    text = f"On the {CHOOSING} half, less {reference}, by position in the window: up to there, from the one before:"
    return ["", text, *table(["side", *map(str, ends), f"beyond {FAR} less {NEAR[0] + 1} to {NEAR[1]} ± error"], body)]


def along_table(curves: Sequence[Curve]) -> list[str]:
    """A line for each measurement along the way: how far validation and training are from the reference's.

    Of training the mean since the line before, on the same rows as the reference's.
    """
    training = {(run.side, run.flags["seed"]): points for run, points in apart_along_the_way(curves, TRAINING)}
    columns, lines = [], {}
    for run, points in apart_along_the_way(curves, VALIDATION):
        own = training.get((run.side, run.flags["seed"]), [])
        means = since_the_last(own, [at for at, _value in points])
        columns.append(f"{run.side}, seed {run.flags['seed']}, less {reference_of(run)}")
        for (at, value), mean in zip(points, means, strict=True):
            cell = f"{value:+.4f}" + ("" if mean is None else f", {mean:+.4f}")
            lines.setdefault(at, {})[columns[-1]] = cell
    if not columns:
        return []
    text = "Along the way, after so many million tokens: difference in validation, in training since the line before."
    body = [[f"{at:.1f}", *(cells.get(column) for column in columns)] for at, cells in sorted(lines.items())]
    return ["", text, *table(["", *columns], body)]


def far_less_near(pairs: list[tuple[int, float]]) -> float | None:
    """Mean difference of the places beyond FAR less that of those of NEAR; None of windows without either."""
    starts = [0, *(end for end, _value in pairs)]
    ranges = [(end - start, end, value) for start, (end, value) in zip(starts, pairs, strict=False)]
    near = [(places, value) for places, end, value in ranges if NEAR[0] < end <= NEAR[1]]
    far = [(places, value) for places, end, value in ranges if end > FAR]
    return weighted_mean(far) - weighted_mean(near) if near and far else None


def weighted_mean(pairs: list[tuple[int, float]]) -> float:
    """Of values, each after its weight."""
    return sum(weight * value for weight, value in pairs) / sum(weight for weight, _value in pairs)


def differences_by_position(part: Finished, reference: str) -> dict[str, list[list[tuple[int, float]]]]:
    """{side: [[last position of the range, difference to the reference]]}, a list for each seed that both have."""
    sides = {side: scores(rows, CHOOSING, {}) for side, rows in part.sides().items()}
    against = sides.pop(reference, {})
    found = {}
    for side, own in sides.items():
        seeds = sorted(own.keys() & against.keys())
        pairs = [zip(own[seed]["by_position"], against[seed]["by_position"], strict=True) for seed in seeds]
        found[side] = [[(end, mine - other) for (end, mine), (_, other) in ranges] for ranges in pairs]
    return found


def mean_over_seeds(sides: dict[str, list[list[tuple[int, float]]]]) -> dict[str, list[tuple[int, float]]]:
    """Of :func:`differences_by_position`, from FIRST_END on, of the sides that have any."""
    found = {}
    for side, seeds in sides.items():
        values = [[(end, value) for end, value in pairs if end >= FIRST_END] for pairs in seeds]
        if values:
            found[side] = [(same[0][0], Spread.of([v for _end, v in same]).mean) for same in zip(*values, strict=True)]
    return found


def with_error(value: float, error: float | None, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.4f}" + ("" if error is None else f" ± {error:.4f}")


def number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def leaking_table(part: Finished) -> list[str]:
    """One model that leaks, and those that do not, at the same places."""
    found = [(run, losses) for run, row in part.runs if (losses := row.get("leaking", row.get("honest")))]
    if not found or not part.theme.left_to_right:
        return []
    text = (
        f"Losses at {found[0][1]['places']:,} places of validation rows: given whole rows, as in training, and given "
        "only what stands before each of them, as one writes. They are equal where nothing of the future is seen; "
        "*training*: the last loss of the training, of the model that leaks."
    )
    body = [
        [
            run.side,
            run.flags["seed"],
            f"{losses['training']:.4f}" if "training" in losses else None,
            *(f"{losses[way]:.4f}" for way in ("whole_rows", "left_to_right")),
        ]
        for run, losses in found
    ]
    return ["", text, *table(["side", "seed", "training", "whole rows", "left to right"], body)]


def speed_table(part: Finished) -> list[str]:
    sides = part.sides()
    speeds = {side: rows[0]["speed"] for side, rows in sides.items() if "tokens_per_second" in rows[0]["speed"]}
    full = speeds.get(part.theme.reference, {}).get("tokens_per_second")
    body = []
    for side, found in speeds.items():
        rate = found["tokens_per_second"]
        peak = found.get("peak_memory_gib") or None
        body.append([side, f"{rate:,.0f}", f"{rate / full:.2f}" if full else None, f"{peak:.1f}" if peak else None])
    head = ["side", "tokens/s", f"× {part.theme.reference}", "peak memory, GiB"]
    return ["", "Alone on a GPU, median of the logged intervals after the first:", *table(head, body)]
