"""Pictures of the results: losses over tokens, the claim as points with their spread, ablations as differences."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.quality.along import TRAINING, VALIDATION, Curve, apart_along_the_way, over_tokens

COLOURS = {
    "linformer": "#2a6f97",
    "full": "#4d4d4d",
    "gpt2": "#b5651d",
    "llama": "#f2b134",
    "window": "#9a9a9a",
    "window of k + w": "#c4c4c4",
    "full, no QK-norm": "#7b5ea7",
    "linformer, no QK-norm": "#61a5c2",
    "window, no QK-norm": "#d9a5b3",
    "w = 256": "#8ab17d",
    "w = 512": "#4f7942",
    "k = 512, r = 16": "#e76f51",
    "slots and full attention": "#2a9d8f",
    "window of 512, no slots": "#9a9a9a",
}
NAMES = {
    "linformer": "Linformer",
    "full": "full attention, same class",
    "gpt2": "GPT-2",
    "llama": "Llama",
    "window": "window only",
    "window of k + w": "window only, of k + w",
    "full, no QK-norm": "full attention, no QK-norm",
    "linformer, no QK-norm": "Linformer, no QK-norm",
    "window, no QK-norm": "window only, no QK-norm",
    # Designs, which have no QK-norm; the picture of ablations, which have it, gives sides their own names.
    "w = 256": "Linformer, w = 256, no QK-norm",
    "w = 512": "Linformer, w = 512, no QK-norm",
    "k = 512, r = 16": "Linformer, 512 slots, no QK-norm",
    "slots and full attention": "slots and full attention, no QK-norm",
    "window of 512, no slots": "window only, w = 512, no QK-norm",
}
PAIRS = {"A": ("linformer", "full"), "B": ("linformer, no QK-norm", "full, no QK-norm")}
# What the answer is about, by theme: pairs, and how they are called in docs/quality.md by their first side.
CLAIMED = dict.fromkeys(("claim_1024", "claim_4096", "long"), [*PAIRS.values()])
CLAIMED |= {"designs_300": [("k = 512, r = 16", "full, no QK-norm")]}
CALLED = {"linformer": "A, QK-norm", "linformer, no QK-norm": "B, no QK-norm", "k = 512, r = 16": "B, 512 slots"}
LINES = ("-", "--", ":", "-.")
# Of the picture of ablations: most differences are a few thousandths of a nat, some a hundred times as large.
LINEAR, TICKS = 0.02, (0.01, 0.02, 0.05, 0.1, 0.5)


def draw_claim(
    path: Path, points: dict[int, dict[str, dict[int, float]]], goals: dict[int, float | None], half: str
) -> None:
    """Two panels for each n, {n: {side: {seed: loss}}} on a half: every seed a point, the mean a line.

    The lower one has the differences of the pairs that are claimed, seed by seed, beside the goal.
    """
    rows = max(map(len, points.values()))
    figure = Figure(figsize=(5 * len(points), 2.6 + 0.36 * rows), layout="constrained")
    panels = figure.subplots(2, len(points), squeeze=False, height_ratios=[rows, len(PAIRS) + 0.6])
    for axes, (n, sides) in zip(panels[1], sorted(points.items()), strict=True):
        draw_pairs(axes, sides, goals.get(n))
    for axes, (n, sides) in zip(panels[0], sorted(points.items()), strict=True):
        for place, (side, found) in enumerate(sides.items()):
            losses = list(found.values())
            colour, mean = COLOURS.get(side, "#888888"), statistics.mean(losses)
            axes.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, lw=2)
            shifts = [(number - (len(losses) - 1) / 2) * 0.16 for number in range(len(losses))]
            axes.plot(losses, [place + shift for shift in shifts], "o", color=colour, ms=5, alpha=0.7)
            beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{mean:.3f}", (max(losses), place), **beside)
        axes.set_yticks(range(len(sides)), [NAMES.get(side, side) for side in sides], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.18, y=0.06)
        axes.set_title(f"n = {n}", fontsize=10)
        axes.set_xlabel("validation loss, nats per token")
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{half.capitalize()} half: every seed a point; line and number: mean", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_pairs(axes: Axes, sides: dict[str, dict[int, float]], goal: float | None) -> None:
    """Linformer less full attention of the same pair and seed."""
    for place, (ours, theirs) in enumerate(PAIRS.values()):
        apart = seed_by_seed(sides.get(ours, {}), sides.get(theirs, {}))
        if not apart:
            continue
        axes.plot([statistics.mean(apart)] * 2, [place - 0.3, place + 0.3], color=COLOURS[ours], lw=2)
        axes.plot(apart, [place] * len(apart), "o", color=COLOURS[ours], ms=5, alpha=0.7)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "fontsize": 8}
        axes.annotate(f"{statistics.mean(apart):+.3f}", (0.99, place), **where)
    axes.axvline(0, color="#000000", lw=0.8)
    if goal is not None:
        axes.axvline(goal, color="#000000", lw=0.8, ls=":")
        axes.annotate("goal", (goal, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", fontsize=8)
    axes.set_yticks(range(len(PAIRS)), [f"pair {name}" for name in PAIRS], fontsize=8)
    axes.set_ylim(len(PAIRS) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("Linformer less full attention, same seed")
    axes.grid(alpha=0.3, axis="x")


def seed_by_seed(losses: dict[int, float], others: dict[int, float]) -> list[float]:
    """Differences of two sides, {seed: loss} each, for the seeds that both have."""
    return [loss - others[seed] for seed, loss in losses.items() if seed in others]


def draw_answer(
    path: Path, rows: Sequence[tuple[str, str, list[float], float | None]], curves: Sequence[Curve], half: str
) -> None:
    """Linformer less full attention: at the end, a row for each pair, and along the way of the longest runs.

    Args:
        rows: what is compared, its side, the differences of the seeds, the goal.
        curves: of the longest runs, with those of their references.
        half: of the rows; along the way it is the choosing one.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (_label, side, apart, goal) in enumerate(rows):
        colour, mean = COLOURS[side], statistics.mean(apart)
        left.barh(place, mean, color=colour, alpha=0.35)
        left.plot(apart, [place] * len(apart), "o", color=colour, ms=4)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "fontsize": 8}
        left.annotate(f"{mean:+.3f}", (0.99, place), **where)
        if goal is not None:
            left.plot([goal] * 2, [place - 0.4, place + 0.4], color="#000000", ls=":", lw=1.2)
    left.plot([], [], color="#000000", ls=":", lw=1.2, label="goal")
    left.set_yticks(range(len(rows)), [label for label, *_values in rows], fontsize=8)
    left.invert_yaxis()
    left.margins(x=0.25)
    left.set_title(f"at the end, {half} half; every seed a point", fontsize=10)
    named = set()
    for run, points in apart_along_the_way(curves, VALIDATION):
        style = {"color": COLOURS[run.side], "ls": LINES[run.flags["seed"] % 2], "lw": 1.4, "marker": "o", "ms": 3}
        right.plot(*zip(*points, strict=True), label=None if run.side in named else CALLED[run.side], **style)
        named.add(run.side)
    right.axhline(0, color="#000000", lw=0.8)
    right.set_title("long runs along the way, choosing half; dashed: second seed", fontsize=10)
    for axes, across in ((left, "x"), (right, "y")):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc=f"lower {'left' if axes is left else 'right'}")
        axes.set(**{f"{across}label": "Linformer less full attention, nats per token"})
    left.axvline(0, color="#000000", lw=0.8)
    right.set_xlabel("million tokens")
    figure.savefig(path, dpi=120)


def draw_positions(path: Path, apart: dict[int, dict[str, list[tuple[int, float]]]], reference: str) -> None:
    """A panel for each n, {n: {side: [last position of a range, difference to the reference]}}."""
    figure = Figure(figsize=(5 * len(apart), 4), layout="constrained")
    panels = figure.subplots(1, len(apart), squeeze=False)[0]
    lines = {}
    for axes, (n, sides) in zip(panels, sorted(apart.items()), strict=True):
        for number, (side, values) in enumerate(sides.items()):
            colour = COLOURS.get(side, f"C{number}")
            (lines[NAMES.get(side, side)],) = axes.plot(*zip(*values, strict=True), marker="o", ms=3.5, color=colour)
        axes.axhline(0, color="#000000", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("position in the window, up to")
        axes.set_ylabel(f"loss less that of {reference}, nats")
        axes.set_title(f"n = {n}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle("Choosing half, mean over seeds, at every position", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Losses over tokens: validation along the way, and training, smoothed, thin. A line for each rate or seed.

    Beside them, where no rates are compared, how far validation is from that of full attention with the same seed.
    """
    sides = dict.fromkeys(run.side for run, _log in curves)
    colours = {side: COLOURS.get(side, f"C{number}") for number, side in enumerate(sides)}
    swept = bool(curves and curves[0][0].theme.learning_rates)
    flag, word = ("learning_rate", "rate") if swept else ("seed", "seed")
    values = sorted({run.flags[flag] for run, _log in curves})
    told_apart = swept or 1 < len(values) <= len(LINES)
    styles = {value: LINES[number % len(LINES)] if told_apart else "-" for number, value in enumerate(values)}
    apart = [] if swept else apart_along_the_way(curves, VALIDATION)
    figure = Figure(figsize=(12 if apart else 7.2, 4.4), layout="constrained")
    axes: Axes = (panels := figure.subplots(1, 2 if apart else 1, squeeze=False)[0])[0]
    for run, log in curves:
        colour, style = colours[run.side], styles[run.flags[flag]]
        training, validation = over_tokens(run, log, TRAINING), over_tokens(run, log, VALIDATION)
        if len(training) > 1:
            axes.plot(*zip(*smoothed(training), strict=True), color=colour, ls=style, lw=0.8, alpha=0.5)
        if validation:
            axes.plot(*zip(*validation, strict=True), color=colour, ls=style, lw=1.4, marker="o", ms=3.5, alpha=0.8)
    lowest = [value for _run, log in curves for entry in log for value in entry[1:] if value is not None]
    if lowest:  # what happens in the first steps is not what is compared
        late = [value for _run, log in curves for entry in log[len(log) // 8 :] for value in entry[1:] if value]
        axes.set_ylim(min(lowest) - 0.1, max(late) + 0.1)
    for side, colour in colours.items():
        axes.plot([], [], color=colour, label=NAMES.get(side, side))
    for value, style in styles.items() if told_apart else ():
        axes.plot([], [], color="#000000", ls=style, lw=0.8, label=f"{word} {value:g}")
    axes.set_ylabel("loss, nats per token")
    name = curves[0][0].theme.name if curves else ""
    axes.set_title(f"{name}: validation (dots), training, smoothed (thin lines)", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    for run, points in apart:
        colour, style = colours[run.side], styles[run.flags[flag]]
        panels[1].plot(*zip(*points, strict=True), color=colour, ls=style, lw=1.4, marker="o", ms=3.5, alpha=0.8)
    for panel in panels[1:]:
        panel.axhline(0, color="#000000", lw=0.8)
        panel.set_ylabel("nats per token")
        panel.set_title("validation less full attention's, alike in QK-norm and seed", fontsize=10)
    for panel in panels:
        panel.set_xlabel("million tokens")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Running means over ``share`` of the points."""
    width = max(1, math.ceil(len(points) * share))
    means = []
    for end in range(width, len(points) + 1):
        window = points[end - width : end]
        means.append((statistics.mean(x for x, _y in window), statistics.mean(y for _x, y in window)))
    return means


def widened(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that hold the values and some of both directions."""
    return min(-LINEAR, 1.3 * min(values, default=0)), max(LINEAR, 1.3 * max(values, default=0))


def draw_ablations(path: Path, sides: dict[str, dict[int, float]], base: str, least: float) -> None:
    """Losses less those of ``base`` with the same seed, from {side: {seed: loss}}; bars are means.

    The band is what does not count, differences below ``least``.
    """
    against = sides.get(base, {})
    apart = {
        side: differences
        for side, losses in sides.items()
        if side != base and (differences := seed_by_seed(losses, against))
    }
    figure = Figure(figsize=(7.2, 0.24 * len(apart) + 1.2), layout="constrained")
    axes: Axes = figure.subplots()
    names = list(apart)[::-1]
    for place, name in enumerate(names):
        colour = COLOURS["full"] if name.startswith("full") else COLOURS["linformer"]
        axes.barh(place, statistics.mean(apart[name]), color=colour, alpha=0.35)
        axes.plot(apart[name], [place] * len(apart[name]), "o", color=colour, ms=4)
    axes.axvspan(-least, least, color=COLOURS["window"], alpha=0.2, lw=0)
    axes.axvline(0, color="#000000", lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.suptitle(
        f"Every seed a point, bars: means; grey bars: full attention; band: less than {least:g}, does not count",
        fontsize=9,
    )
    axes.set_xlabel(f"loss less that of {base}, same seed, choosing half; logarithmic beyond {LINEAR:g}", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=1.2)
    axes.set_xticks([sign * size for sign in (-1, 1) for size in TICKS] + [0])
    axes.set_xlim(*widened([value for values in apart.values() for value in values]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, axis="x")
    axes.margins(y=0.01)
    figure.savefig(path, dpi=120)
