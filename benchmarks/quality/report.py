"""Tables of what is finished: ``report.md`` beside the results, with the pictures."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality import figures
from benchmarks.quality.along import Curve
from benchmarks.quality.data import CHOOSING, UNTOUCHED
from benchmarks.quality.experiments import LINPASS
from benchmarks.quality.results import CURVES, SAMPLES, Finished, Results, finished, loss, scores
from benchmarks.quality.tables import (
    LEGEND,
    along_table,
    differences_by_position,
    leaking_table,
    loss_table,
    mean_over_seeds,
    position_tables,
    rates_table,
    speed_table,
)
from linpass.errors import InputError

THEMES = ("claim_1024", "claim_4096", "long", "designs_1024", "designs_4096", "designs_300", "ablations")
SWEEPS, SPEEDS = ("rates_1024", "rates_4096", "batch_4096"), ("speed_1024", "speed_4096")


def write_report(folder: Path, with_untouched: bool, themes: Sequence[str] = (*SWEEPS, *THEMES, *SPEEDS)) -> str:
    """Write report.md and pictures to the folder of results; returns the text.

    Args:
        with_untouched: read that half too. It is for the end, when nothing is left to choose.

    Raises:
        InputError: the report there shows the untouched half, and this one would not.
    """
    path = folder / "report.md"
    if not with_untouched and path.is_file() and f"On the {UNTOUCHED} half" in path.read_text(encoding="utf-8"):
        raise InputError(f"{path} shows the untouched half; go on with --untouched")
    results = Results(folder)
    untouched = {row["key"]: row[UNTOUCHED] for row in results.read(UNTOUCHED)} if with_untouched else {}
    logs = {row["key"]: row["log"] for row in results.read(CURVES) if "unfinished" not in row}
    found = [finished(name, results) for name in themes]
    lines = ["# Quality at equal budget", *conditions(results), "", LEGEND]
    for part in (part for part in found if part.runs):
        lines += ["", f"## {part.theme.name}: {part.theme.question}", ""]
        lines += [f"{len(part.runs)} of {part.planned} runs, {part.runs[0][0].tokens:,} tokens each."]
        if part.theme.least:
            lines[-1] += f" Sides that differ by less than {part.theme.least:g} with the first seed have no other."
        if not part.theme.evaluate:
            lines += speed_table(part)
        elif part.theme.learning_rates:
            lines += rates_table(part)
        else:
            lines += waiting(part) if part.theme.name != "ablations" else []
            halves = [CHOOSING, *([UNTOUCHED] if untouched and part.theme.untouched else [])]
            for half in halves:
                lines += loss_table(part, half, untouched)
            lines += position_tables(part) if part.theme.name != "ablations" else []
            lines += along_table(curves_of(part, logs)) if part.theme.parts > 1 else []
            lines += leaking_table(part)
    lines += pictures(folder, found, logs, untouched)
    lines += sample(results)
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def waiting(part: Finished) -> list[str]:
    """Sides that have no rate yet; runs of theirs, made with an earlier grid, are in runs.jsonl."""
    run_sides = {run.side for run, _row in part.runs}
    sides = [side for side in part.theme.sides if side not in run_sides]
    return ["", f"Without a run at the rate that their sweep chose: {'; '.join(sides)}."] if sides else []


def conditions(results: Results) -> list[str]:
    """Machines, versions and settings, each kind once."""
    kinds = {}
    for row in results.runs.values():
        where = row.get("environment", {})
        names = {name: where.get(name) for name in ("hardware", "torch", "transformers", "linpass", "commit")}
        kinds[json.dumps(names | row["settings"])] = names | row["settings"]
    lines = [f"- {', '.join(f'{name} {value}' for name, value in kind.items())}" for kind in kinds.values()]
    torn = [f"- {count} lines of {name}.jsonl cannot be read" for name, count in results.unreadable.items()]
    return ["", *lines, *torn]


def curves_of(part: Finished, logs: dict[str, list]) -> list[Curve]:
    """Runs with their logs, by key, of what ``linpass train`` trained."""
    return [(run, logs[row["key"]]) for run, row in part.runs if run.program == LINPASS and row["key"] in logs]


def pictures(
    folder: Path, found: Sequence[Finished], logs: dict[str, list], untouched: dict[str, dict[str, Any]]
) -> list[str]:
    """Draw what there is to draw; lines that show it. What is claimed, on the untouched half, where it is given."""
    half = UNTOUCHED if untouched else CHOOSING
    drawn: list[tuple[str, Callable[[Path], Any]]] = []
    rows = [row for part in found for row in answer_rows(part, half, untouched)]
    if rows:
        claimed = [part for part in found if part.theme.name in figures.CLAIMED and part.theme.parts > 1]
        long = {run.key: (run, log) for part in claimed for run, log in curves_of(part, logs)}  # some are of two themes
        drawn.append(("answer.png", lambda path: figures.draw_answer(path, rows, list(long.values()), half)))
    claims = [part for part in found if part.theme.name.startswith("claim") and part.sides()]
    if claims:
        points = {part.theme.flags["seq_length"]: losses_of(part, half, untouched) for part in claims}
        goals = {part.theme.flags["seq_length"]: part.theme.goal for part in claims}
        drawn.append(("claim.png", lambda path: figures.draw_claim(path, points, goals, half)))
        apart = {
            part.theme.flags["seq_length"]: of_our_class(
                part, mean_over_seeds(differences_by_position(part, part.theme.reference))
            )
            for part in claims
        }
        apart = {n: sides for n, sides in apart.items() if sides}
        if apart:
            drawn.append(("positions.png", lambda path: figures.draw_positions(path, apart, claims[0].theme.reference)))
    for part in found:
        if part.runs and part.theme.name in (*SWEEPS, *THEMES) and part.theme.name != "ablations":
            curves = curves_of(part, logs)
            drawn.append((f"curves_{part.theme.name}.png", lambda path, c=curves: figures.draw_curves(path, c)))
    for part in (part for part in found if part.theme.name == "ablations" and part.sides()):
        losses = losses_of(part, CHOOSING, {})
        draw = partial(figures.draw_ablations, sides=losses, base="base", least=part.theme.least)
        drawn.append(("ablations.png", draw))
    lines = []
    for name, draw in drawn:
        draw(folder / name)
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return ["", "## Pictures", *lines] if lines else []


def answer_rows(part: Finished, half: str, untouched: dict[str, dict[str, Any]]) -> list[tuple]:
    """For ``figures.draw_answer``: the pairs of a theme that is claimed, as far as both sides have run."""
    losses, theme = losses_of(part, half, untouched), part.theme
    rows = []
    for ours, theirs in figures.CLAIMED.get(theme.name, []):
        apart = figures.seed_by_seed(losses.get(ours, {}), losses.get(theirs, {}))
        label = f"{theme.tokens / 1e6:.0f} M tokens, n = {theme.flags['seq_length']}, {figures.CALLED[ours]}"
        rows += [(label, ours, apart, theme.goal)] if apart else []
    return rows


def of_our_class(part: Finished, found: dict[str, Any]) -> dict[str, Any]:
    """The sides of our own class."""
    return {side: values for side, values in found.items() if part.theme.is_ours(side)}


def losses_of(part: Finished, half: str, untouched: dict[str, dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Losses on a half, {side: {seed: loss}}."""
    found = {side: scores(rows, half, untouched) for side, rows in part.sides().items()}
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
