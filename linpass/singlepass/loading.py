"""The order in which a pass visits rows: each exactly once, shared out over processes, from any row on."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from linpass.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Rows of one step on one process: the model's ``inputs``, the rows' numbers and weights, and the number of rows
    that all processes have seen after this step. ``inputs`` is None where no row is left for this process."""

    inputs: dict[str, Any] | None
    row_ids: Tensor
    weights: Tensor | None
    seen: int


class RowCollator:
    """Batches of (row number, item): the collator's inputs from the fields that the model takes, and the weights.

    Args:
        collate: items -> inputs, such as ``DataCollatorWithPadding``.
        keep: names of the fields for ``collate``; None keeps all.
        weight_column: field with the weight of a row.
    """

    def __init__(self, collate: Callable[[list], Any], keep: Sequence[str] | None, weight_column: str | None):
        self.collate, self.keep, self.weight_column = collate, keep, weight_column

    def __call__(self, rows: list[tuple[int, Any]]) -> tuple[Any, Tensor, Tensor | None]:
        weights = None
        if self.weight_column is not None:
            weights = torch.tensor([self._weight(number, item) for number, item in rows], dtype=torch.float64)
        row_ids = torch.tensor([number for number, _item in rows])
        return self.collate([self._kept(item) for _number, item in rows]), row_ids, weights

    def _weight(self, number: int, item: Any) -> float:
        columns = sorted(item) if isinstance(item, Mapping) else []
        if self.weight_column not in columns:
            raise InputError(
                f"sample_weight_column={self.weight_column!r} must be a column; row {number} has {columns}"
            )
        try:
            return float(item[self.weight_column])
        except (TypeError, ValueError):
            raise InputError(
                f"{self.weight_column}={item[self.weight_column]!r} of row {number} must be a number"
            ) from None

    def _kept(self, item: Any) -> Any:
        if not isinstance(item, Mapping):
            return item
        kept = item.keys() if self.keep is None else [name for name in item if name in self.keep]
        return {name: item[name] for name in kept if name != self.weight_column}


class NumberedRows(torch.utils.data.Dataset):
    """A data set whose items are (number, item)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.dataset[number]

    def __getitems__(self, numbers: list[int]) -> list[tuple[int, Any]]:
        several = getattr(self.dataset, "__getitems__", None)
        items = several(numbers) if several else [self.dataset[number] for number in numbers]
        return list(zip(numbers, items, strict=True))


def batches(
    dataset: Any,
    collator: RowCollator,
    arguments: TrainingArguments,
    batch_size: int,
    start: int = 0,
    shuffle: bool = False,
) -> Iterator[Batch]:
    """Every row of ``dataset`` from the ``start``-th of the pass on, once, over all processes together.

    A step hands ``batch_size`` rows to each process; only the last may be short, and leave some without rows. So what
    has been seen is always a beginning of the pass, whatever batch size or number of processes saw it. Neither
    ``drop_last`` nor a sampler that repeats rows has a part in it.

    A data set without a length is read by every process from its beginning, in the program itself and not in workers,
    of which each would read all of it.

    Args:
        shuffle: visit the rows of a map-style data set in an order drawn from ``arguments.data_seed`` or ``seed``.
    """
    rank, world_size = arguments.process_index, arguments.world_size
    if not knows_its_length(dataset):
        yield from _stream_batches(dataset, collator, batch_size, rank, world_size, start)
        return
    order = order_of(len(dataset), arguments, shuffle)
    steps = list(order[start:].split(batch_size * world_size)) if start < len(order) else []
    mine = [step[rank * batch_size : (rank + 1) * batch_size].tolist() for step in steps]
    loader = DataLoader(
        NumberedRows(dataset),
        batch_sampler=[numbers for numbers in mine if numbers],
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory and torch.cuda.is_available(),
        prefetch_factor=arguments.dataloader_prefetch_factor,
        generator=torch.Generator(),  # its own: reading must not move the generator of the program around it
    )
    loaded = iter(loader)
    seen = start
    for step, numbers in zip(steps, mine, strict=True):
        seen += len(step)
        if not numbers:
            yield _no_rows(seen)
            continue
        inputs, row_ids, weights = next(loaded)
        yield Batch(inputs, row_ids, weights, seen)


def _stream_batches(
    dataset: Iterable, collator: RowCollator, batch_size: int, rank: int, world_size: int, start: int
) -> Iterator[Batch]:
    """Every process reads all of the stream and takes its share."""
    rows = itertools.islice(enumerate(dataset), start, None)
    while step := list(itertools.islice(rows, batch_size * world_size)):
        start += len(step)
        mine = step[rank * batch_size : (rank + 1) * batch_size]
        yield Batch(*collator(mine), start) if mine else _no_rows(start)


def _no_rows(seen: int) -> Batch:
    return Batch(None, torch.empty(0, dtype=torch.long), None, seen)


def order_of(count: int, arguments: TrainingArguments, shuffle: bool) -> Tensor:
    """The numbers of the rows in the order in which a pass visits them."""
    if not shuffle:
        return torch.arange(count)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def knows_its_length(dataset: Any) -> bool:
    """Whether rows can be asked for by their number."""
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def count_steps(dataset: Any, arguments: TrainingArguments, batch_size: int, start: int = 0) -> int | None:
    """Steps that :func:`batches` will make; None for a data set that does not know its length."""
    if not knows_its_length(dataset):
        return None
    return -(-(len(dataset) - start) // (batch_size * arguments.world_size))
