"""Texts with a class each: the rows that a classifier is trained on and measured on, read from files or data sets."""

import csv
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from linpass.errors import InputError
from linpass.training.documents import open_dataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class LabelledText:
    """Rows of text and the number of each row's class.

    Args:
        texts: one a row.
        labels: as many numbers, each a place in ``classes``.
        classes: the names.
    """

    texts: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, chosen: Sequence[int]) -> "LabelledText":
        """The rows with these numbers, in this order."""
        return LabelledText([self.texts[n] for n in chosen], [self.labels[n] for n in chosen], self.classes)

    def split(self, test_fraction: float, seed: int) -> tuple["LabelledText", "LabelledText"]:
        """Rows for training and rows for testing: of each class the same share, at least one, drawn by ``seed``.

        Equal texts stay on one side, so that no test row has been trained on.

        Raises:
            InputError: a class has fewer than two different texts.
        """
        generator = np.random.default_rng(seed)
        held_out: set[str] = set()
        for label, name in enumerate(self.classes):
            own = sorted({text for text, number in zip(self.texts, self.labels, strict=True) if number == label})
            free = [text for text in own if text not in held_out]
            if len(own) < 2 or not free:
                raise InputError(f"class {name!r} must have at least two different texts, one to test on; it has 1")
            share = min(max(1, round(test_fraction * len(own))), len(free), len(own) - 1)
            held_out.update(free[n] for n in generator.permutation(len(free))[:share])
        numbers = range(len(self))
        train = [n for n in numbers if self.texts[n] not in held_out]
        return self.rows(train), self.rows([n for n in numbers if self.texts[n] in held_out])


def check_labelled_files(paths: Sequence[str], flag: str) -> None:
    """Raise InputError, before anything is read, for a file that is missing, of unknown kind, or needs a package."""
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise InputError(f"{flag}={name!r} must be a file; {'it is a folder' if path.is_dir() else 'none there'}")
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(f"{flag}={name!r} must end in one of {', '.join(SUFFIXES)}: each row a text and its label")
        if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
            raise InputError(f"{flag}={name!r} (.parquet) needs pyarrow: pip install 'linpass[train]'")


def read_labelled_files(
    paths: Sequence[str],
    text_column: str,
    label_column: str,
    flag: str = "text_files",
    classes: list[str] | None = None,
) -> LabelledText:
    """The rows of files; a label is whatever text or whole number stands there, a class is a label.

    Args:
        paths: files with one of SUFFIXES.
        flag: named in errors.
        classes: of the training rows; None: those found, whole numbers in their order, others in alphabetical order.

    Raises:
        InputError: not to be read as what the suffix says, a column missing, a text that is none, a label that is
            neither text nor a whole number, one class only, or a class that is not among ``classes``.
    """
    texts, labels = [], []
    for name in paths:
        try:
            for number, record in enumerate(_records(Path(name)), start=1):
                where = f"{flag}={name!r} row {number}"
                text, label = _cells(record, (text_column, label_column), where)
                texts.append(_text(text, text_column, where))
                labels.append(_label(label, label_column, where))
        except InputError:
            raise
        except UnicodeDecodeError as error:
            raise InputError(f"{flag}={name!r} must be UTF-8: {error.reason} at byte {error.start}") from None
        except Exception as error:  # each reader raises its own kinds for a damaged file
            raise InputError(f"{flag}={name!r} could not be read: {' '.join(str(error).split())}") from error
    return number_classes(texts, labels, flag, classes)


def read_labelled_dataset(
    name: str, split: str, text_column: str, label_column: str, classes: list[str] | None = None
) -> LabelledText:
    """The rows of a data set of the Hub or of a local folder that ``datasets.load_dataset`` reads.

    Raises:
        InputError: as :func:`linpass.training.documents.open_dataset` and :func:`read_labelled_files`.
    """
    rows = open_dataset(name, split, text_column).rows
    if label_column not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise InputError(f"dataset={name!r} must have the column label_column={label_column!r}; there is: {there}")
    where = f"dataset={name!r}"
    names = getattr(rows.features[label_column], "names", None)
    texts = [_text(text, text_column, where) for text in rows[text_column]]
    if names is not None and min(rows[label_column]) >= 0:  # -1 stands for a label that is not given
        return LabelledText(texts, list(rows[label_column]), list(names))
    labels = [_label(label, label_column, where) for label in rows[label_column]]
    return number_classes(texts, labels, where.partition("=")[0], classes)


def number_classes(texts: list[str], labels: list[str], flag: str, classes: list[str] | None = None) -> LabelledText:
    """Rows whose labels are numbers of classes; see :func:`read_labelled_files` for the order and the errors."""
    found = sorted(set(labels), key=lambda label: (0, int(label), "") if _is_whole(label) else (1, 0, label))
    if classes is None and len(found) < 2:
        raise InputError(f"{flag} must hold rows of two classes or more; the labels are: {', '.join(found) or 'none'}")
    classes = found if classes is None else classes
    unknown = [label for label in found if label not in classes]
    if unknown:
        raise InputError(f"{flag} must hold classes of the training rows only; {unknown[0]!r} is none of them")
    numbers = {label: number for number, label in enumerate(classes)}
    return LabelledText(texts, [numbers[label] for label in labels], list(classes))


def _records(path: Path) -> Iterator[Any]:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        return
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
        if ".csv" in path.suffixes[-2:]:
            yield from csv.DictReader(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def _cells(record: Any, columns: tuple[str, str], where: str) -> tuple[Any, Any]:
    there = [str(name) for name in record] if isinstance(record, dict) else []
    for flag, column in zip(("text_column", "label_column"), columns, strict=True):
        if column not in there:
            raise InputError(f"{where} must have the column {flag}={column!r}; there is: {', '.join(there) or 'none'}")
    return record[columns[0]], record[columns[1]]


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {column!r} must hold text, not {value!r}")
    return value


def _label(value: Any, column: str, where: str) -> str:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # what a table makes of whole numbers when a cell is empty
    if isinstance(value, (str, int)) and str(value).strip():
        return str(int(value)) if isinstance(value, bool) else str(value).strip()
    raise InputError(f"{where}: {column!r} must hold a class, text or a whole number, not {value!r}")


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
