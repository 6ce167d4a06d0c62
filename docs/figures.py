"""Draw the pictures of the documentation: ``python docs/figures.py`` (needs matplotlib).

``attention.png`` is what the attention function really lets through; ``speed_cpu.png`` is drawn from the newest results
file of ``python -m benchmarks.run attention``.
"""

import json
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


if __name__ == "__main__":
    draw_attention(DOCS / "attention.png")
    draw_speed(DOCS / "speed_cpu.png")
