"""Rows of a data set that are named by their numbers, to be forgotten."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from linpass.errors import InputError


class ChosenRows(torch.utils.data.Dataset):
    """Some rows of a data set, in the order of their numbers' list."""

    def __init__(self, dataset: Any, numbers: Sequence[int]):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Any:
        return self.dataset[self.numbers[place]]


def row_numbers(rows: Any) -> list[int] | None:
    """The numbers, where ``rows`` are numbers and not a data set; those of a set in ascending order."""
    if hasattr(rows, "tolist") and getattr(rows, "ndim", 0) == 1:  # a tensor, or an array
        rows = rows.tolist()
    if isinstance(rows, (set, frozenset)):
        rows = sorted(rows)
    if isinstance(rows, (list, tuple, range)) and all(isinstance(row, Integral) for row in rows):
        return [int(row) for row in rows]
    return None


def check_numbers(numbers: list[int], count: int, seen: set[int], forgotten: set[int]) -> None:
    """Raise InputError unless each is the number of another row that was seen and has not been forgotten.

    Args:
        count: rows of the data set.
    """
    gone = set(forgotten)
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(f"forget: row {number} must be from 0 to {count - 1}")
        if number not in seen:
            raise InputError(f"forget: row {number} must be one that the pass has seen; it stopped before")
        if number in gone:
            raise InputError(f"forget: row {number} has been forgotten already, or is named twice")
        gone.add(number)
