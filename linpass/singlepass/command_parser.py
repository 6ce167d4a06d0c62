"""The command lines of ``linpass compare`` and ``linpass train --method single-pass``."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from linpass.errors import InputError
from linpass.singlepass.arguments import SinglePassArguments
from linpass.singlepass.command_arguments import CompareArguments, SourceArguments
from linpass.training.arguments import nearest


@dataclass
class SinglePassRunArguments(SinglePassArguments):
    """:class:`SinglePassArguments` with a folder for the finished model and short flags, as ``linpass train`` has them.

    ``output_dir`` is the finished model, which appears when the run is complete. What the Trainer leaves on its way
    (``save_strategy``) goes to ``checkpoint_dir``, by default ``trainer_output/NAME`` beside it.
    """

    output_dir: str = field(default="./final_model", metadata={"help": "the finished model; complete or not there"})
    checkpoint_dir: str = field(
        default="", metadata={"help": "checkpoints of the pass; at its default: trainer_output/NAME beside output_dir"}
    )
    num_train_epochs: float = field(
        default=3.0, metadata={"aliases": ["--epochs"], "help": "of match=gd, sgd, batch_aware; else without meaning"}
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"aliases": ["--batch_size"], "help": "rows that go through the encoder at a time"}
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "the same for the test rows"})
    save_strategy: str = field(default="no", metadata={"help": "no, steps: checkpoints of the pass"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()  # else torch warns
        if not self.checkpoint_dir:
            final = Path(self.output_dir)
            self.checkpoint_dir = str(final.parent / "trainer_output" / final.name)


class CommandParser(HfArgumentParser):
    """``HfArgumentParser`` of one command; what is wrong is an :class:`InputError` instead of an exit.

    Args:
        command: as it is typed, for the messages.
        groups: the dataclasses of its arguments.
    """

    def __init__(self, command: str, *groups: Any) -> None:
        super().__init__(groups, prog=command, allow_abbrev=False)
        self.names = [f.name for group in groups for f in fields(group) if f.init]

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse(self, flags: list[str]) -> tuple[Any, ...]:
        """One object per group.

        Raises:
            InputError: an unknown flag, or a value that breaks a rule.
        """
        unknown = self.parse_known_args(flags)[1]
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
            raise InputError(f"{unknown[0]} is no flag of {self.prog}; {nearest(name, self.names)}")
        try:
            return self.parse_args_into_dataclasses(flags, look_for_args_file=False)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # raised by transformers.TrainingArguments
            raise InputError(str(error)) from error


def compare_parser() -> CommandParser:
    """The parser of ``linpass compare``."""
    return CommandParser("linpass compare", SourceArguments, CompareArguments)


def single_pass_parser() -> CommandParser:
    """The parser of ``linpass train --method single-pass``, ``--method`` already taken out."""
    return CommandParser("linpass train --method single-pass", SourceArguments, SinglePassRunArguments)
