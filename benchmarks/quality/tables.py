"""The tables of a theme, as lines of Markdown."""

import math

from benchmarks.attention_gpu_report import table
from benchmarks.quality.results import Finished, Row, Spread, difference, loss, scores

LEGEND = (
    "Losses in nats per token; *deviation* between seeds; *less* a side: the difference of runs with the same seed, "
    "and the standard error of its mean; *over documents*: the standard error of that difference over documents, "
    "paired by document; tokens per second while as many runs shared a GPU as `processes_per_gpu` says."
)


def rates_table(part: Finished) -> list[str]:
    """Loss on the choosing half by side and rate; the lowest is the side's rate."""
    rates = sorted(part.theme.learning_rates)
    body, edges = [], []
    for side, rows in part.sides().items():
        losses = {row["flags"]["learning_rate"]: loss(row) for row in rows}
        best = min(losses, key=lambda rate: losses[rate])
        cells = [losses.get(rate) for rate in rates]
        body.append([side, *(mark(value, rate == best) for value, rate in zip(cells, rates, strict=True))])
        if len(losses) == len(rates) and best in (rates[0], rates[-1]):
            edges.append(side)
    lines = ["", "Loss on the choosing half:", *table(["side", *(f"{rate:g}" for rate in rates)], body)]
    if edges:
        lines += ["", f"Best at the edge of the grid, which should be widened for all sides: {', '.join(edges)}."]
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
                with_error(apart.seeds.mean, apart.seeds.standard_error, signed=True) if apart else None,
                number(apart.document_error) if apart else None,
                f"{Spread.of(speeds).mean:,.0f}" if speeds else None,
            ]
        )
    head = ["side", "parameters", "rate", "seeds", "loss ± deviation", f"less {reference} ± error", "± over documents"]
    return ["", f"On the {half} half:", *table([*head, "tokens/s"], body)]


def with_error(value: float, error: float | None, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.4f}" + ("" if error is None else f" ± {error:.4f}")


def number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def leaking_table(part: Finished) -> list[str]:
    rows = [(run, row) for run, row in part.runs if "leaking" in row]
    body = [
        [
            run.side,
            run.flags["seed"],
            *(f"{row['leaking'][n]:.4f}" for n in ("training", "whole_rows", "left_to_right")),
        ]
        for run, row in rows
    ]
    if not body:
        return []
    text = (
        "A Linformer that sees the future: its training loss, its loss on whole validation rows, and its loss on the "
        f"same {rows[0][1]['leaking']['places']:,} tokens of these when it is given only what stands before them:"
    )
    return ["", text, *table(["side", "seed", "training", "validation, whole rows", "left to right"], body)]


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
