"""The folder of the finished model: complete or not there, and never in the place of something else."""

import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import Trainer

from linpass.errors import InputError
from linpass.training.checkpoints import explain_write_error

PLOT_NAME = "training_loss_plot.png"
LOG_NAME = "training_log.jsonl"
SAMPLES_NAME = "training_samples.jsonl"

# What a finished model consists of: a folder that holds anything else is not replaced.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("*_linformer.py", "*_closed_form.py"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template.jinja", "README.md", PLOT_NAME, LOG_NAME, SAMPLES_NAME),
)


def check_output_folder(output: Path) -> None:
    """Raise InputError when the finished model could not be put at ``output``, or would destroy other files there."""
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir={str(output)!r} must be a folder; a file is in the way")
    if Path.cwd().is_relative_to(output):
        raise InputError(f"output_dir={str(output)!r} must not be the current folder or one above it")
    files = sorted(output.iterdir()) if output.is_dir() else []
    others = [file.name for file in files if not any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)]
    if others or (files and not holds_model(output)):
        held = others or [file.name for file in files]
        raise InputError(
            f"output_dir={str(output)!r} must be new, empty or a saved model to replace; it holds {', '.join(held[:3])}"
        )
    _check_writable("output_dir", output.parent)
    if (output.parent / PLOT_NAME).is_dir():
        raise InputError(f"output_dir={str(output)!r}: {PLOT_NAME} beside it must not be a folder")


def holds_model(folder: Path) -> bool:
    """Whether a model was saved there."""
    return (folder / "config.json").is_file()


def check_checkpoint_folder(folder: Path) -> None:
    """Raise InputError when the Trainer could not write checkpoints to ``folder``."""
    _check_writable("checkpoint_dir", folder)


def _check_writable(name: str, folder: Path) -> None:
    nearest = next(f for f in (folder, *folder.parents) if f.exists())
    if not nearest.is_dir():
        raise InputError(f"{name}: {str(folder)!r} must be a folder; {str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name}: {str(nearest)!r} must be writable")


def save_finished_model(trainer: Trainer, output: Path, files: list[Path], write_card: Callable[[Path], Any]) -> None:
    """Write model, tokenizer, card and ``files`` to a sibling of ``output``, then put it in the place of an older one.

    Args:
        files: log, picture and samples of the run; those that do not exist are left out.
        write_card: called with the folder when all else is there.

    Raises:
        InputError: the disk is full; an older model and the checkpoints stay.
    """
    partial = output.with_name(f".{output.name}.incomplete")
    older = output.with_name(f".{output.name}.older")
    if trainer.is_world_process_zero():
        if not output.exists() and older.exists():
            older.rename(output)  # of a run that was killed between the two names
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(partial))
        if not trainer.is_world_process_zero():
            return
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that no reader of the model needs
        for file in files:
            if file.is_file():
                shutil.copy(file, partial / file.name)
        write_card(partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = explain_write_error(error)
        if reason is None:
            raise
        raise InputError(
            f"output_dir={str(output)!r} could not be written: {reason}; the checkpoints in "
            f"{str(trainer.args.output_dir)!r} are complete: free space, then linpass train --resume"
        ) from error
    if output.exists():
        output.rename(older)
    partial.rename(output)
    shutil.rmtree(older, ignore_errors=True)
