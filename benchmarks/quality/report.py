"""Tables of what is finished: ``report.md`` beside the results, with the pictures."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attention_gpu_report import table
from benchmarks.quality import figures
from benchmarks.quality.data import CHOOSING, UNTOUCHED
from benchmarks.quality.experiments import LINPASS, Run, Theme, read_theme, runs_of
from benchmarks.quality.results import SAMPLES, Results, Row, Spread, chosen_rates, difference, loss

THEMES = ("claim_1024", "claim_4096", "long", "ablations")
LEGEND = (
    "Losses in nats per token; *deviation* between seeds; *less* a side: the difference of runs with the same seed, "
    "and the standard error of its mean; *over documents*: the standard error of that difference over documents, paired "
    "by document; tokens per second while as many runs shared a GPU as `processes_per_gpu` says."
)
SWEEPS, SPEEDS = ("rates_1024", "rates_4096"), ("speed_1024", "speed_4096")


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
    return Finished(theme, rows, len(theme.seeds) * len(theme.sides) * max(1, len(theme.learning_rates)))


def scores(rows: Iterable[Row], half: str, untouched: dict[str, Row]) -> dict[int, Row]:
    """{seed: scores} of the rows that did not diverge, on a half of the validation documents."""
    kept = [row for row in rows if "diverged" not in row]
    if half == CHOOSING:
        return {row["flags"]["seed"]: row[CHOOSING] for row in kept}
    return {row["flags"]["seed"]: untouched[row["key"]] for row in kept if row["key"] in untouched}


def write_report(folder: Path, with_untouched: bool, themes: Sequence[str] = (*SWEEPS, *THEMES, *SPEEDS)) -> str:
    """Write report.md and pictures to the folder of results; returns the text.

    Args:
        with_untouched: read that half too. It is for the end, when nothing is left to choose.
    """
    results = Results(folder)
    untouched = {row["key"]: row[UNTOUCHED] for row in results.read(UNTOUCHED)} if with_untouched else {}
    found = [finished(name, results) for name in themes]
    lines = ["# Quality at equal budget", *conditions(results), "", LEGEND]
    for part in (part for part in found if part.runs):
        lines += ["", f"## {part.theme.name}: {part.theme.question}", ""]
        lines += [f"{len(part.runs)} of {part.planned} runs, {part.runs[0][0].tokens:,} tokens each."]
        if not part.theme.evaluate:
            lines += speed_table(part)
        elif part.theme.learning_rates:
            lines += rates_table(part)
        else:
            halves = [CHOOSING, *([UNTOUCHED] if untouched and part.theme.untouched else [])]
            for half in halves:
                lines += loss_table(part, half, untouched)
            lines += leaking_table(part)
    lines += pictures(folder, found, results)
    lines += sample(results)
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def conditions(results: Results) -> list[str]:
    """Machines, versions and settings, each kind once."""
    kinds = {}
    for row in results.runs.values():
        where = row.get("environment", {})
        names = {name: where.get(name) for name in ("hardware", "torch", "transformers", "linpass", "commit")}
        kinds[json.dumps(names | row["settings"])] = names | row["settings"]
    return ["", *(f"- {', '.join(f'{name} {value}' for name, value in kind.items())}" for kind in kinds.values())]


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


def pictures(folder: Path, found: Sequence[Finished], results: Results) -> list[str]:
    """Draw what there is to draw; lines that show it."""
    logs = {row["key"]: row["log"] for row in results.read("curves")}
    drawn: list[tuple[str, Callable[[Path], Any]]] = []
    claims = [part for part in found if part.theme.name.startswith("claim") and part.sides()]
    if claims:
        points = {part.theme.flags["seq_length"]: losses_of(part) for part in claims}
        drawn.append(("claim.png", lambda path: figures.draw_claim(path, points)))
    for part in found:
        if part.runs and part.theme.evaluate and part.theme.name in (*THEMES[:3], *SWEEPS):
            curves = [
                (run, logs[row["key"]]) for run, row in part.runs if run.program == LINPASS and row["key"] in logs
            ]
            drawn.append((f"curves_{part.theme.name}.png", lambda path, c=curves: figures.draw_curves(path, c)))
    for part in (part for part in found if part.theme.name == "ablations" and part.sides()):
        drawn.append(("ablations.png", lambda path, p=part: figures.draw_ablations(path, losses_of(p), "base")))
    lines = []
    for name, draw in drawn:
        draw(folder / name)
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return ["", "## Pictures", *lines] if lines else []


def losses_of(part: Finished) -> dict[str, dict[int, float]]:
    """Losses on the choosing half, {side: {seed: loss}}."""
    found = {side: scores(rows, CHOOSING, {}) for side, rows in part.sides().items()}
    return {side: {seed: own["loss"] for seed, own in rows.items()} for side, rows in found.items() if rows}


def sample(results: Results) -> list[str]:
    """What the model of the lowest loss on the choosing half wrote first."""
    texts = {row["key"]: row["sample"] for row in results.read(SAMPLES) if row["key"] in results.runs}
    if not texts:
        return []
    best = min(texts, key=lambda key: loss(results.runs[key]))
    row = results.runs[best]
    title = f"{row['theme']}, {row['side']}, seed {row['flags']['seed']}, loss {loss(row):.4f}"
    quoted = [f"> **{text['prompt']}**{text['text']}".replace("\n", "\n> ") for text in texts[best]]
    return ["", f"## First sample: {title}", "", "\n\n".join(quoted)]
