"""What the Trainer calls along the way: the picture of the losses."""

import math
from pathlib import Path

from matplotlib.figure import Figure
from transformers import TrainerCallback


class LossPlot(TrainerCallback):
    """Draws the training and validation loss, at each evaluation and at the end.

    Args:
        path: the PNG file; always complete, an older one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            plot_losses(state.log_history, self.path)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            plot_losses(state.log_history, self.path)


def plot_losses(log_history: list[dict[str, float]], path: Path) -> None:
    """Write a PNG of the losses in a Trainer's log.

    Args:
        log_history: ``trainer.state.log_history``; entries with "loss" or "eval_loss", and "step".
        path: written through a temporary sibling, so that no reader meets half a picture.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = (("loss", "training", "tab:blue", ""), ("eval_loss", "validation", "tab:orange", "o"))
    for key, label, colour, marker in curves:
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry and math.isfinite(entry[key])]
        if points:
            steps, losses = zip(*points, strict=True)
            final = f"{label}, last {losses[-1]:.3f}"
            axes.plot(steps, losses, label=final, color=colour, marker=marker or ("" if len(points) > 1 else "o"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Causal Linformer: next-token loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    partial = path.with_name(f".{path.name}.incomplete")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
