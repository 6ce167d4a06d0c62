"""The command line of ``linpass train``: the Trainer's arguments, and flags over preset over defaults."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from linpass.errors import InputError
from linpass.training.arguments import (
    ARCHITECTURES,
    ChunkArguments,
    DataArguments,
    ModelArguments,
    nearest,
    read_preset,
)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with a folder for the finished model, a choice of model and short flags.

    ``output_dir`` is the finished model, which appears when the run is complete. What the Trainer leaves on its way
    (``save_strategy``) goes to ``checkpoint_dir``, by default ``trainer_output/NAME`` beside it.
    """

    output_dir: str = field(default="./final_model", metadata={"help": "the finished model; complete or not there"})
    checkpoint_dir: str = field(
        default="", metadata={"help": "checkpoints of the run; at its default: trainer_output/NAME beside output_dir"}
    )
    architecture: str = field(
        default="linformer", metadata={"help": "linformer, or a baseline with as many parameters: gpt2, llama"}
    )
    num_train_epochs: float = field(default=3.0, metadata={"aliases": ["--epochs"], "help": "passes over the text"})
    per_device_train_batch_size: int = field(
        default=8, metadata={"aliases": ["--batch_size"], "help": "rows per step and device"}
    )
    resume: bool = field(
        default=False, metadata={"help": "go on from the last complete checkpoint in checkpoint_dir, if there is one"}
    )
    plot_steps: int | None = field(
        default=None, metadata={"help": "draw the losses every so many steps; none: at each evaluation"}
    )
    plot_scale: str = field(default="linear", metadata={"help": "axis of the losses: linear or log"})
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "texts that the model continues along the way"}
    )
    sample_steps: int = field(default=500, metadata={"help": "steps between two samples"})
    # Every parameter takes part in every step: DDP need not look for unused ones.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "as in transformers; no model here needs it"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"architecture={self.architecture!r} must be one of {', '.join(ARCHITECTURES)}")
        if self.plot_scale not in ("linear", "log"):
            raise InputError(f"plot_scale={self.plot_scale!r} must be linear or log")
        if self.resume and self.resume_from_checkpoint:
            raise InputError("resume and resume_from_checkpoint exclude each other: the last checkpoint, or that one")
        self._n_gpu = min(self.n_gpu, 1)  # several in one process would be torch's DataParallel, which is slow
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()  # else torch warns
        if not self.checkpoint_dir:
            final = Path(self.output_dir)
            self.checkpoint_dir = str(final.parent / "trainer_output" / final.name)


@dataclass
class Run:
    """All arguments of a run, by group."""

    model: ModelArguments
    data: DataArguments
    chunks: ChunkArguments
    training: TrainingArguments


class TrainParser(HfArgumentParser):
    """``HfArgumentParser`` for the four dataclasses; what is wrong is an :class:`InputError` instead of an exit."""

    def __init__(self) -> None:
        groups: list[Any] = [ModelArguments, DataArguments, ChunkArguments, TrainingArguments]
        super().__init__(groups, prog="linpass train", allow_abbrev=False)
        self.names = [f.name for group in groups for f in fields(group) if f.init]

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse(self, flags: list[str]) -> Run:
        """The arguments of a run: flags over preset over defaults, in whatever order the flags stand.

        Raises:
            InputError: an unknown flag, preset or preset key, or a value that breaks a rule.
        """
        preset = self.parse_known_args(flags)[0].preset
        self.set_defaults(**read_preset(preset, self.names))
        unknown = self.parse_known_args(flags)[1]
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
            raise InputError(f"{unknown[0]} is no flag of linpass train; {nearest(name, self.names)}")
        try:
            parsed: Any = self.parse_args_into_dataclasses(flags, look_for_args_file=False)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # raised by transformers.TrainingArguments
            raise InputError(str(error)) from error
        return Run(*parsed)
