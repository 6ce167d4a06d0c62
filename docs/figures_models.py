"""Draw the pictures of whole models: ``python docs/figures_models.py`` (needs matplotlib).

``training_gpu.png`` is drawn from the newest results file of ``python -m benchmarks.models_gpu``, ``decoding_gpu.png``
from that of ``python -m benchmarks.decoding_gpu``; what has no results yet is left out.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
MODELS = {  # colour of each model of benchmarks.models_gpu, from left to right
    "bound: no attention": "#dddddd",
    "linpass": "#2a6f97",
    "linpass, full attention": "#7fb3d5",
    "GPT-2": "#9a9a9a",
    "Llama": "#f2b134",
}
WAYS = {  # colour and line of each way of benchmarks.decoding_gpu
    "linpass, CUDA graph": ("#2a6f97", "-"),
    "linpass, compiled": ("#2a6f97", "--"),
    "linpass, eager": ("#7fb3d5", "-"),
    "linpass, generate": ("#7fb3d5", ":"),
    "linpass, generate, compiled": ("#7fb3d5", "--"),
    "Llama, static cache, compiled": ("#f2b134", "-"),
    "Llama, dynamic cache": ("#b5651d", "--"),
    "Llama, generate": ("#b5651d", ":"),
}


def newest(theme: str, section: str) -> dict | None:
    """The newest result of a benchmark that has rows in a section, of one day that with the most of them.

    Parts are measured one by one, too.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    found = [result for result in results if isinstance(result, dict) and result.get("theme") == theme]
    found = [result for result in found if result[section]]
    return max(found, key=lambda result: (result["environment"]["date"], len(result[section])), default=None)


def draw_training(path: Path, result: dict) -> None:
    """Tokens per second of an optimizer step, each model in its faster mode of those measured, by n."""
    fastest: dict[tuple[int, str], dict] = {}
    for row in (row for row in result["training"] if "ms" in row):
        key = row["n"], row["variant"]
        if key not in fastest or row["tokens_per_s"] > fastest[key]["tokens_per_s"]:
            fastest[key] = row
    lengths = sorted({n for n, _ in fastest})
    names = [name for name in MODELS if any(name == variant for _, variant in fastest)]
    figure, axes = plt.subplots(figsize=(7.6, 4.0), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for group, n in enumerate(lengths):
            row = fastest.get((n, name))
            if row is None:
                continue
            x, height = group - 0.4 + (place + 0.5) * width, row["tokens_per_s"] / 1e3
            label = name if group == 0 else None
            axes.bar(x, height, width * 0.92, color=MODELS[name], label=label)
            axes.text(x, height, f"{height:,.0f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(lengths)), [f"n = {n:,}" for n in lengths])
    axes.set_ylabel("thousand tokens/s")
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8, handlelength=3)
    modes = {row["mode"] for row in fastest.values()}
    how = f"all models {modes.pop()}" if len(modes) == 1 else "each model in its faster mode"
    _title(figure, result, f"Training, an optimizer step, {how}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_decoding(path: Path, result: dict) -> None:
    """Latency of a token over the context, a panel for each batch, and bytes of the cache."""
    rows = [row for row in result["decoding"] if "ms" in row]
    batches = sorted({row["batch"] for row in rows})
    figure, panels = plt.subplots(1, len(batches) + 1, figsize=(3.9 * (len(batches) + 1), 4.0), layout="constrained")
    for axes, batch in zip(panels, batches, strict=False):
        for name, (colour, style) in WAYS.items():
            _line(axes, rows, batch, name, lambda row: row["ms"][0], color=colour, linestyle=style)
        axes.set_title(f"batch {batch}: milliseconds of a token", fontsize=10)
    for name in ("linpass, eager", "Llama, dynamic cache"):
        colour, style = WAYS[name]
        _line(panels[-1], rows, batches[0], name, lambda row: row["cache_bytes"] / 2**20, color=colour, linestyle=style)
    panels[-1].set_title(f"batch {batches[0]}: MiB of the cache", fontsize=10)
    contexts = sorted({row["context"] for row in rows})
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{n // 1024}k" if n >= 1024 else str(n) for n in contexts], fontsize=8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
        axes.tick_params(which="minor", labelsize=7)
        axes.set_xlabel("tokens of context")
        axes.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8, handlelength=3)
    _title(figure, result, "Decoding, bfloat16")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes, rows: list[dict], batch: int, name: str, value, **style) -> None:
    """One way over the contexts; nothing where it has no rows."""
    found = sorted((row["context"], value(row)) for row in rows if row["batch"] == batch and row["variant"] == name)
    if found:
        context, values = zip(*found, strict=True)
        axes.plot(context, values, marker="o", ms=3.5, lw=1.6, label=name, **style)


def _title(figure, result: dict, text: str) -> None:
    where = result["environment"]
    text = f"{text}; {where['hardware']}, torch {where['torch'].split('+')[0]}"
    if result["theme"] == "models_gpu" and not where.get("rivals_masks"):
        text += "\nGPT-2 and Llama, compiled, form a mask of n × n here, which slows their attention"
    figure.suptitle(text, fontsize=10)


if __name__ == "__main__":
    for theme, section, draw, name in (
        ("models_gpu", "training", draw_training, "training_gpu.png"),
        ("decoding_gpu", "decoding", draw_decoding, "decoding_gpu.png"),
    ):
        found = newest(theme, section)
        if found is not None:
            draw(DOCS / name, found)
