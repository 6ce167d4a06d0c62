"""What the commands ``linpass compare`` and ``linpass train --method single-pass`` can be told, and their help.

Standard library only, so that help answers at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from linpass.errors import InputError


def _flag(default: Any, text: str, alias: str | None = None) -> Any:
    return field(default=default, metadata={"help": text} | ({"aliases": [f"--{alias}"]} if alias else {}))


@dataclass
class SourceArguments:
    """Where rows and features come from; without any flag, the default text and an encoder trained on the spot.

    Raises:
        InputError: a value is out of its range, or two contradict each other.
    """

    model: str | None = _flag(None, "encoder, folder or Hub name; none: a small Linformer trained on the spot, cached")
    text_files: list[str] | None = _flag(None, "your rows: .jsonl, .csv, also .gz, .parquet, a text and a label each")
    test_files: list[str] | None = _flag(None, "files of rows to test on; none: test_fraction of text_files")
    test_fraction: float = _flag(0.2, "share of each class kept for testing where no test rows are given")
    dataset: str | None = _flag(None, "your rows: a data set of the Hub or a local folder, NAME or NAME:CONFIGURATION")
    dataset_split: str = _flag("train", "split of the data set to train on")
    test_split: str | None = _flag(None, "split of the data set to test on; none: test_fraction of dataset_split")
    text_column: str = _flag("text", "column or field with the text")
    label_column: str = _flag("label", "column or field with the class, text or a whole number")
    max_length: int = _flag(128, "tokens of a row; what is longer is cut")
    cache_dir: str | None = _flag(None, "for the default rows and encoder; none: linpass in Hugging Face's cache")

    def __post_init__(self) -> None:
        if not isinstance(self.test_fraction, float) or not 0 < self.test_fraction < 1:
            raise InputError(f"test_fraction={self.test_fraction} must be more than 0 and less than 1")
        if self.max_length < 1:
            raise InputError(f"max_length={self.max_length} must be 1 or more")
        if self.text_files and self.dataset:
            raise InputError("text_files and dataset exclude each other")
        for name, needed in (("test_files", "text_files"), ("test_split", "dataset")):
            if getattr(self, name) and not getattr(self, needed):
                raise InputError(f"{name} needs --{needed}")


@dataclass
class CompareArguments:
    """The settings of the gradient descents, and where the results go.

    Raises:
        InputError: a value is out of its range.
    """

    epochs: int | None = _flag(None, "of all that is trained; none: 50, and 10 for the transformer from scratch")
    batch_size: int = _flag(32, "rows of a step")
    learning_rate: float = _flag(1e-3, "of a step")
    seed: int = _flag(42, "of every draw")
    output_dir: str = _flag("./comparison", "for compare.json and compare.png")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate={self.learning_rate} must be more than 0, and finite")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be 0 or more and less than 2**32")


def compare_help() -> str:
    """The text of ``linpass compare --help``."""
    lines = [
        "usage: linpass compare [--text_files FILE ...] [--dataset NAME] [--model NAME] [any flag below]",
        "",
        "Train the same classifier by gradient descent and in a single pass, and say what each takes and gives: a",
        "small transformer from scratch; a linear head by Adam, by scikit-learn and in closed form, on one encoder's",
        "features.",
        *_DEFAULTS,
        "",
        *_help_lines((SourceArguments, CompareArguments)),
    ]
    return "\n".join(lines)


def single_pass_help() -> str:
    """The text of ``linpass train --method single-pass --help``."""
    lines = [
        "usage: linpass train --method single-pass [--text_files FILE ...] [--dataset NAME] [--model NAME] [any flag]",
        "",
        "Fit a classifier's head to a frozen encoder in one pass over the rows, and save it with its tokenizer.",
        *_DEFAULTS,
        "",
        *_help_lines((SourceArguments,)),
        "",
        "training (every flag of SinglePassArguments and transformers.TrainingArguments; --help_all lists them):",
        *map(_help_line, *zip(*_TRAINING, strict=True)),
    ]
    return "\n".join(lines)


_DEFAULTS = (
    "Without flags: does a passage come from the documentation of torch or of transformers? The encoder is a small",
    "Linformer, trained on the spot by masked tokens: under a minute on two cores, once, it is kept in the cache.",
)
_TRAINING = (
    ("kernel", "linear", "linear, relu, rff, nystrom, rbf, laplace, polynomial, arc_cosine, deep"),
    ("regularization", "auto", "a number, or how to choose one: auto, gcv, kfold, loo"),
    ("estimator", "auto", "of match=ridge: ridge, discriminant, logistic; auto: logistic with the linear kernel"),
    ("match", "ridge", "what the solution equals: ridge, gd, sgd, batch_aware"),
    ("output_dir", "./final_model", "the finished model; complete or not there"),
    ("epochs", 3, "short for --num_train_epochs; of match=gd, sgd, batch_aware, else without meaning"),
    ("batch_size", 32, "short for --per_device_train_batch_size; rows that go through the encoder at a time"),
    ("learning_rate", 5e-5, "of match=gd, sgd, batch_aware, else without meaning"),
    ("push_to_hub", False, "share the finished model, as --hub_model_id"),
)


def _help_lines(groups: Sequence[Any]) -> list[str]:
    return [_help_line(f.name, f.default, f.metadata["help"]) for group in groups for f in fields(group)]


def _help_line(name: str, default: Any, text: str) -> str:
    return f"  --{name:<16} {text} [{'none' if default is None else default}]"
