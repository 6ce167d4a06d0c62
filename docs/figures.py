"""Draw the pictures of the documentation: ``python docs/figures.py`` (needs matplotlib).

``attention.png`` is what the attention function really lets through; ``speed_cpu.png`` is drawn from the newest results
file of ``python -m benchmarks.run attention``, ``speed_gpu.png`` from that of ``python -m benchmarks.attention_gpu``.
"""

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from linpass.attention_linformer import BlockLayout, attend_blocks_reference, mix_blocks

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
COLOURS = ["#ffffff", "#f2b134", "#2a6f97", "#1b3a4b"]


def visibility(tokens: int, block: int, window: int, slots_per_block: int) -> torch.Tensor:
    """How query t sees token j, [tokens, tokens]: 0 not at all, 1 through slots, 2 exactly, 3 both.

    Read off the gradient of the attention output by the values, once with each of the two ways cut.
    """
    seen = []
    for through_slots in (True, False):
        query, key = torch.zeros(1, 1, tokens, 1), torch.zeros(1, 1, tokens, 1)
        value = torch.eye(tokens)[None, None]
        weight = torch.full((1, 1, block, slots_per_block), 1 / block)
        slot_key, slot_value = mix_blocks(key, weight), mix_blocks(value, weight)
        kept = (torch.zeros_like(value), slot_value) if through_slots else (value, torch.zeros_like(slot_value))
        layout = BlockLayout(block, window, slots_per_block, tokens // block)
        seen.append(attend_blocks_reference(query, key, kept[0], slot_key, kept[1], layout)[0][0, 0] > 0)
    return seen[0].int() + 2 * seen[1].int()


def draw_attention(path: Path) -> None:
    tokens, block, window = 48, 8, 12
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    axes.imshow(
        visibility(tokens, block, window, 2), cmap=ListedColormap(COLOURS), vmin=0, vmax=3, interpolation="none"
    )
    axes.set_xticks(range(0, tokens + 1, block))
    axes.set_yticks(range(0, tokens + 1, block))
    axes.set_xlim(-0.5, tokens - 0.5)
    axes.set_ylim(tokens - 0.5, -0.5)
    axes.set_xlabel("token j")
    axes.set_ylabel("query t")
    axes.set_title("What query t sees: blocks of 8 tokens, 2 slots each, a window of 12", fontsize=10)
    names = ["the future: nothing", "through slots of complete blocks", "exactly, in the window", "both"]
    patches = [Patch(facecolor=c, edgecolor="#888888", label=n) for c, n in zip(COLOURS, names, strict=True)]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_speed(path: Path) -> None:
    newest = max(RESULTS.glob("attention_cpu_*.json"))
    result = json.loads(newest.read_text())
    rows, where = result["rows"], result["environment"]
    figure, (times, memory) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for name, label, colour in (("sdpa", "SDPA, causal", "#9a9a9a"), ("linformer", "linpass", "#2a6f97")):
        n = [row["n"] for row in rows]
        median, low, high = ([row[f"{name}_ms"][i] / row["n"] * 1000 for row in rows] for i in range(3))
        times.plot(n, median, marker="o", color=colour, label=label)
        times.fill_between(n, low, high, color=colour, alpha=0.2)
        memory.plot(n, [row[f"{name}_MiB"] for row in rows], marker="o", color=colour, label=label)
    for axes, label in ((times, "µs per token, forward + backward"), (memory, "peak memory, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([row["n"] for row in rows], [str(row["n"]) for row in rows])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
        axes.set_xlabel("tokens n")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.suptitle(
        f"Attention alone, k = {rows[0]['k']}, w = {rows[0]['w']}, 8 heads of 64, float32; "
        f"{where['threads']} CPU threads, torch {where['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


FROM_GRAPH = ", from a CUDA graph"
VARIANTS = {  # colour and line of each variant of benchmarks.attention_gpu
    "linpass": ("#2a6f97", "-"),
    "linpass" + FROM_GRAPH: ("#2a6f97", "-."),
    "cuDNN causal": ("#4d4d4d", "-"),
    "flash causal": ("#9a9a9a", "-"),
    "FlexAttention": ("#f2b134", "--"),
    "linpass, PyTorch": ("#7fb3d5", "--"),
    "chunk_gsa, 64 slots": ("#b5651d", ":"),
    "linformer (lucidrains, leaks)": ("#c0392b", ":"),
}


def newest_gpu_result(folder: Path = RESULTS) -> dict:
    """The newest result, with the rows of all files of its day: widths of heads may have been measured one by one.

    Raises:
        ValueError: two of these files hold the same width, so that one picture would mix two measurements.
    """
    results = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("attention_*_*.json"))}
    ours = {name: result for name, result in results.items() if result.get("theme") == "attention_gpu"}
    newest = max(result["environment"]["date"] for result in ours.values())
    found = {name: result for name, result in ours.items() if result["environment"]["date"] == newest}
    holders = {}
    for name, result in found.items():
        for heads, dim in {(row["heads"], row["dim"]) for row in result["timing"]}:
            holder = holders.setdefault((heads, dim), name)
            if holder != name:
                raise ValueError(
                    f"{holder} and {name}, both of {newest}, hold {heads} heads of {dim}: keep one of them"
                )
    return next(iter(found.values())) | {"timing": [row for result in found.values() for row in result["timing"]]}


def crossing(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """The n from which ours stays below theirs, between two measured lengths on log-log lines; the first n if always.

    None where ours is not below at the longest row.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    logs = [math.log(ours[n] / theirs[n]) for n in lengths]
    if not logs or logs[-1] > 0:
        return None
    behind = max((i for i, log in enumerate(logs) if log > 0), default=None)
    if behind is None:
        return lengths[0]
    share = logs[behind] / (logs[behind] - logs[behind + 1])
    return lengths[behind] * (lengths[behind + 1] / lengths[behind]) ** share


def draw_gpu_speed(path: Path, result: dict | None = None) -> None:
    """Forward and backward of every variant over n, a panel for each size; ``result``: None is the newest file."""
    result = newest_gpu_result() if result is None else result
    rows = [row for row in result["timing"] if "both_ms" in row]
    sizes = list(dict.fromkeys((row["heads"], row["dim"]) for row in rows))
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(4.6 * len(sizes) + 0.4, 4.4), layout="constrained", squeeze=False
    )
    for axes, (heads, dim) in zip(panels[0], sizes, strict=True):
        lines = {name: {} for name in VARIANTS}
        for row in rows:
            if (row["heads"], row["dim"]) == (heads, dim):
                lines[row["variant"]][row["n"]] = row["both_ms"][0]
        replayed = {"linpass": {}, "cuDNN causal": {}}
        for row in result.get("graphs", ()):
            if (row["heads"], row["dim"]) == (heads, dim) and row["variant"] in replayed and "graph_ms" in row:
                replayed[row["variant"]][row["n"]] = row["graph_ms"][0]
        lines["linpass" + FROM_GRAPH] = replayed["linpass"]
        draw_variants(axes, {name: line for name, line in lines.items() if line}, crossing(*replayed.values()))
        axes.set_title(f"{heads} heads of {dim}", fontsize=10)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    where = result["environment"]
    figure.suptitle(
        f"Causal attention alone, bfloat16, {where['batch_tokens']:,} tokens a batch; {where['hardware']}, torch "
        f"{where['torch'].split('+')[0]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_variants(axes, lines: dict[str, dict[int, float]], crossing_of_graphs: float | None = None) -> None:
    """Milliseconds over n, {variant: {n: ms}}, both logarithmic."""
    for name, line in lines.items():
        (colour, style), width = VARIANTS[name], 2.2 if name == "linpass" else 1.4
        n, times = zip(*sorted(line.items()), strict=True)
        axes.plot(n, times, style, marker="o", ms=3.5, color=colour, lw=width, label=name)
    mark_crossing(axes, lines.get("linpass", {}), lines.get("cuDNN causal", {}), crossing_of_graphs)
    lengths = sorted({n for line in lines.values() for n in line})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths], fontsize=8)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens n of a row")
    axes.set_ylabel("ms, forward + backward")
    axes.grid(alpha=0.3)


def mark_crossing(
    axes, ours: dict[int, float], theirs: dict[int, float], crossing_of_graphs: float | None = None
) -> None:
    """A line where linpass passes cuDNN, with its n, that of CUDA graphs, and the ratio at the longest row."""
    n = crossing(ours, theirs)
    if n is None:
        return
    always, longest = n == min(ours.keys() & theirs.keys()), max(ours.keys() & theirs.keys())
    text = f"ahead of cuDNN\nat every n, from {n:g}" if always else f"ahead of cuDNN\nfrom n ≈ {_two_digits(n)}"
    if crossing_of_graphs is not None:
        text += f";\nboth from graphs: {_two_digits(crossing_of_graphs)}"
    axes.axvline(n, color="#2a6f97", lw=1, ls=":")
    text += f";\n{theirs[longest] / ours[longest]:.0f} × at {longest:,}"
    axes.annotate(
        text,
        (n, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(6, 0),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color="#2a6f97",
    )


def _two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):,.0f}"


if __name__ == "__main__":
    draw_attention(DOCS / "attention.png")
    draw_speed(DOCS / "speed_cpu.png")
    draw_gpu_speed(DOCS / "speed_gpu.png")
