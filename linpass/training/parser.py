"""The command line of ``linpass train``: the Trainer's arguments, and flags over preset over defaults."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from linpass.errors import InputError
from linpass.training.arguments import DataArguments, ModelArguments, nearest, read_preset


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with a folder for the finished model and two short flags.

    ``output_dir`` is the finished model, which appears when the run is complete. What the Trainer leaves on its way
    (``save_strategy``) goes to ``checkpoint_dir``, by default ``trainer_output/NAME`` beside it.
    """

    output_dir: str = field(default="./final_model", metadata={"help": "the finished model; complete or not there"})
    checkpoint_dir: str = field(
        default="", metadata={"help": "checkpoints of the run; at its default: trainer_output/NAME beside output_dir"}
    )
    num_train_epochs: float = field(default=3.0, metadata={"aliases": ["--epochs"], "help": "passes over the text"})
    per_device_train_batch_size: int = field(
        default=8, metadata={"aliases": ["--batch_size"], "help": "chunks per step and device"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()  # else torch warns
        if not self.checkpoint_dir:
            final = Path(self.output_dir)
            self.checkpoint_dir = str(final.parent / "trainer_output" / final.name)


class TrainParser(HfArgumentParser):
    """``HfArgumentParser`` for the three dataclasses; what is wrong is an :class:`InputError` instead of an exit."""

    def __init__(self) -> None:
        groups: list[Any] = [ModelArguments, DataArguments, TrainingArguments]
        super().__init__(groups, prog="linpass train", allow_abbrev=False)
        self.names = [f.name for group in groups for f in fields(group) if f.init]

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse(self, flags: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
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
        return parsed
