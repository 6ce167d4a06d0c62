"""The log of a run in a file that survives whatever stops the run, and the picture of its losses."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

logger = logging.getLogger(__name__)


class RunLog:
    """A file of JSON objects with a "step", one a line, and the same in memory.

    Memory is what the file should hold: after a line that could not be written, the next one writes the whole file.
    A disk that fails is warned of once per run.

    Args:
        path: its folder is made when the log begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self.has_begun = self.is_behind = self.has_warned = False

    def begin(self, step: int, history: Sequence[dict[str, Any]] = ()) -> None:
        """Start a file, or go on in it behind ``step`` when that is not 0.

        Args:
            history: the Trainer's log up to ``step``, where it keeps one of what is written here.
        """
        self.has_begun = self.is_behind = True
        self.has_warned, self.begun_at = False, step
        found: list[dict[str, Any]] = []
        with self._unless_disk_fails():
            found = self._read()
        known = [_plain(entry) for entry in history]
        self.entries, is_same_run = _up_to(step, found, known) if step else ([], False)
        self.earlier = len(self.entries)
        with self._unless_disk_fails():
            if found and not is_same_run:
                self.path.replace(self.path.with_name(f"{self.path.name}.previous"))
            self._write_all()

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line. Nothing before the training begins: it would be of no run."""
        if not self.has_begun:
            return
        entry = _plain(entry)
        if not self._takes_its_place(entry):
            return
        self.entries.append(entry)
        with self._unless_disk_fails():
            if self.is_behind:
                self._write_all()
                return
            self.is_behind = True  # until the line is complete
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))
            self.is_behind = False

    def _takes_its_place(self, entry: dict[str, Any]) -> bool:
        """Remove what an earlier session logged of the same thing: the evaluation of the step where this one began.

        A summary takes the place of an earlier one, unless it is of a session that did not train.
        """
        if entry["step"] > self.begun_at and "train_loss" not in entry:
            return True
        same = [old for old in self.entries[: self.earlier] if _identity(old) == _identity(entry)]
        if same and "train_loss" in entry and entry["step"] == self.begun_at:
            return False
        for old in same:
            self.entries.remove(old)
            self.earlier -= 1
            self.is_behind = True
        return True

    def _read(self) -> list[dict[str, Any]]:
        """The lines that are whole."""
        if not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # of a run that was killed while it wrote
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
        return entries

    def _write_all(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as partial:
            partial.write_text("".join(map(_line, self.entries)), encoding="utf-8")
        self.is_behind = False

    @contextmanager
    def _unless_disk_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.has_warned:
                logger.warning("%s cannot be written, the training goes on: %s", self.path, error)
            self.has_warned = True


def plot_losses(
    log_history: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    y_scale: str = "linear",
    title: str = "Training loss",
) -> None:
    """Write a PNG of the losses in a Trainer's log.

    Args:
        log_history: ``trainer.state.log_history``, or the lines of a log; entries with "step" and "loss" or
            "eval_loss" ("eval_NAME_loss" where there are several evaluation sets). What is not finite is left out.
        path: written through a temporary sibling, so that no reader meets half a picture.
        y_scale: "linear" or "log".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    keys = {key for entry in log_history for key in entry if key.startswith("eval_") and key.endswith("_loss")}
    for key in ["loss", *sorted(keys)]:
        values = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        points = [(step, loss) for step, loss in values if math.isfinite(loss) and (loss > 0 or y_scale == "linear")]
        if points:
            steps, losses = zip(*points, strict=True)
            label = "training" if key == "loss" else f"validation {key[5:-5]}".rstrip()
            marker = "" if key == "loss" and len(points) > 1 else "o"
            final = f"{label}, last {losses[-1]:.3f}"
            axes.plot(steps, losses, label=final, marker=marker, markersize=4, linewidth=1)
    axes.set_yscale(y_scale)
    if y_scale == "log":  # 6, not 6 * 10^0
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    with replacing(Path(path)) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _up_to(step: int, found: list[dict[str, Any]], history: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a run up to ``step`` from its file and from its checkpoint; False when the file is another run's.

    The file's lines are preferred, because other callbacks may have added to them; it may also have lines that the
    checkpoint lacks: an evaluation at the same step, but after it. Of what was logged twice, the last is kept.
    """
    found = [line for line in found if line["step"] <= step]
    lines = {_identity(line): line for line in found}
    known = {_identity(entry): entry for entry in history}
    if any(lines.get(identity, entry).get("loss") != entry.get("loss") for identity, entry in known.items()):
        return list(known.values()), False
    entries = [lines.get(identity, entry) for identity, entry in known.items()]
    entries += [line for line in found if _identity(line) not in known]
    return sorted(entries, key=lambda entry: entry["step"]), True


def _identity(entry: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """What two entries share that tell of the same thing: the step, and which losses or, without any, which keys.

    A run has one summary, whatever the step.
    """
    losses = sorted(key for key in entry if key == "loss" or key.endswith("_loss"))
    return -1 if "train_loss" in entry else entry["step"], tuple(losses or sorted(entry))


def _plain(value: Any) -> Any:
    """What strict JSON can say: no NaN, no infinity, no scalars of NumPy or PyTorch."""
    if isinstance(value, (torch.Tensor, numpy.ndarray, numpy.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when it is complete."""
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
