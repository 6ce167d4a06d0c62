"""Rows that a pass keeps in memory beside its sums: all of them, or a sample that is the same in whatever order.

Shapes: N rows, D features.
"""

import torch
from torch import Tensor

from linpass.singlepass.tasks import Rows

# A key is a row's number times this, plus its place among the rows of that number (the tokens of a text).
PLACES = 1 << 24
# The same row from another batch: sums of another length of padding, relative to the largest feature of the row.
SAME_ROW = 1e-5


class RowStore:
    """Rows kept in the memory of the processor, in float32 or what they came in; all of them, or a fixed sample.

    Args:
        limit: keep the rows whose hash of (row id, place among the rows of that id) is lowest: a sample that does not
            depend on the order of the rows or on the process that saw them.
    """

    def __init__(self, limit: int | None = None, seed: int = 0):
        self.limit, self.seed = limit, seed
        self._parts: list[dict[str, Tensor]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count if self.limit is None else min(self._count, self.limit)

    def add(self, rows: Rows | dict[str, Tensor]) -> None:
        """Take in rows, or what :meth:`all` of another store gave."""
        part = rows if isinstance(rows, dict) else self._part(rows)
        if not part:
            return
        self._parts.append(part)
        self._count += len(part["keys"])
        if self.limit is not None and self._count > max(2 * self.limit, 1024):
            self._parts = [self._lowest(self.all())]
            self._count = len(self._parts[0]["keys"])

    def all(self) -> dict[str, Tensor]:
        """``features_ND``, ``targets``, ``weights_N`` and ``keys``, in the order of the keys."""
        if not self._parts:
            return {}
        joined = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        order = joined["keys"].argsort(stable=True)
        return self._lowest({name: tensor[order] for name, tensor in joined.items()})

    def remove(self, rows: dict[str, Tensor], by_key: bool) -> int:
        """Drop the same rows, each once; how many of them were here.

        Args:
            by_key: rows are the same when their keys are; else when target and weight are, and the features up to the
                rounding of another batch.
        Cost: O(N log N + N D), and O(D) for each row to drop.
        """
        mine = self.all()
        if not mine or not rows:
            return 0
        gone_N = torch.isin(mine["keys"], rows["keys"]) if by_key else _alike(mine, rows)
        self._parts = [{name: tensor[~gone_N] for name, tensor in mine.items()}]
        self._count = int((~gone_N).sum())
        return int(gone_N.sum())

    def renumber(self, first: int) -> None:
        """Count the numbers of the rows from another one on."""
        for part in self._parts:
            part["keys"] = part["keys"] + first * PLACES

    def copy(self) -> "RowStore":
        """Another store of the same rows, whose tensors are shared."""
        result = RowStore(self.limit, self.seed)
        result._parts, result._count = [dict(part) for part in self._parts], self._count
        return result

    def state_dict(self) -> dict[str, Tensor]:
        return self.all()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._parts = [dict(state)] if state else []
        self._count = len(state["keys"]) if state else 0

    def _part(self, rows: Rows) -> dict[str, Tensor]:
        features_ND = rows.features_ND.detach()
        weights_N = torch.ones(len(features_ND)) if rows.weights_N is None else rows.weights_N
        keys = _occurrence_keys(rows.row_ids.cpu())
        part = {"features_ND": features_ND, "targets": rows.targets, "weights_N": weights_N}
        part = {name: tensor.cpu() for name, tensor in part.items()} | {"keys": keys}
        return part if self.limit is None else self._lowest(part)

    def _lowest(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.limit is None or len(part["keys"]) <= self.limit:
            return part
        chosen = hashed(part["keys"], self.seed).argsort(stable=True)[: self.limit].sort().values
        return {name: tensor[chosen] for name, tensor in part.items()}


def _alike(mine: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
    """[N]: which of my rows are the others, each of which takes one of mine.

    A projection on a random line leaves few rows to compare with.
    """
    features_ND = mine["features_ND"]
    line_D = torch.randn(features_ND.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places_N, order_N = torch.cat([part.double() @ line_D for part in features_ND.split(4096)]).sort()
    tolerance = max(SAME_ROW, 8 * torch.finfo(features_ND.dtype).eps)
    taken_N = torch.zeros(len(features_ND), dtype=torch.bool)
    for number, row_D in enumerate(rows["features_ND"]):
        near = tolerance * row_D.abs().max().double().clamp(min=1e-30)
        place, reach = row_D.double() @ line_D, near * line_D.abs().sum()
        first, end = torch.searchsorted(places_N, torch.stack((place - reach, place + reach))).tolist()
        candidates = order_N[first : end + 1]
        same = ~taken_N[candidates] & (features_ND[candidates].double() - row_D.double()).abs().amax(1).le(near)
        for name in ("targets", "weights_N"):
            same &= (mine[name][candidates] == rows[name][number]).reshape(len(candidates), -1).all(1)
        if bool(same.any()):
            taken_N[candidates[int(same.int().argmax())]] = True
    return taken_N


def _occurrence_keys(row_ids_N: Tensor) -> Tensor:
    """One number per row of the regression: its row's id, and its place among the neighbours with the same id."""
    _ids, counts = torch.unique_consecutive(row_ids_N, return_counts=True)
    starts_N = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return row_ids_N * PLACES + torch.arange(len(row_ids_N)) - starts_N


def fold_of(row_ids_N: Tensor, seed: int, folds: int) -> Tensor:
    """The fold of each row, from its number alone; tokens of one row are in one fold."""
    return hashed(row_ids_N, seed) % folds


def hashed(numbers_N: Tensor, seed: int) -> Tensor:
    """Evenly spread 31-bit numbers (the finaliser of SplitMix64: Steele, Lea and Flood 2014, figure 16)."""
    state = numbers_N + (seed + 1) * 0x1E3779B97F4A7C15 % (1 << 63)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (state ^ ((state >> 31) & ((1 << 33) - 1))) >> 33 & 0x7FFFFFFF
