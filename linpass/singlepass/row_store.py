"""Rows that a pass keeps in memory beside its sums: all of them, or a sample that is the same in whatever order.

Shapes: N rows, D features.
"""

from functools import reduce

import torch
from torch import Tensor

from linpass.singlepass.tasks import Rows

# A key is a row's number times this, plus its place among the rows of that number (the tokens of a text).
PLACES = 1 << 24
# The same row from another batch: sums of another length of padding, relative to the largest feature of the row.
SAME_ROW = 1e-5
# Rows that are put into one tensor when others are dropped: tensors of one row each take as much again.
CHUNK = 4096


class RowStore:
    """Rows kept in the memory of the processor, in float32 or what they came in; all of them, or a fixed sample.

    A row's hash is made of its key when it comes in and stays with it: rows that were chosen elsewhere and have other
    numbers now (:meth:`renumber`) compete on the same terms, so each part of a merged sample has its share of rows.

    Args:
        limit: keep the rows whose hash of (row id, place among the rows of that id) is lowest, of equal ones those with
            the lowest keys: a sample that does not depend on the order of the rows or on the process that saw them.
    Memory: of ``limit`` rows and a quarter, and one batch; :meth:`all` needs that of its result besides.
    """

    def __init__(self, limit: int | None = None, seed: int = 0):
        self.limit, self.seed = limit, seed
        self._parts: list[dict[str, Tensor]] = []
        self._in_order = False  # one part, which all() has made
        # Once there have been `limit` rows: no row with a higher hash comes in, not even after others were removed.
        self._highest: int | None = None

    @property
    def rows_held(self) -> int:
        """Rows in memory: those of the sample, and at most a quarter more that are not yet dropped."""
        return sum(len(part["keys"]) for part in self._parts)

    def __len__(self) -> int:
        return self.rows_held if self.limit is None else min(self.rows_held, self.limit)

    def add(self, rows: Rows | dict[str, Tensor]) -> None:
        """Take in rows, or what :meth:`all` of another store gave."""
        part = self._chosen(rows if isinstance(rows, dict) else self._part(rows))
        if not part or (self._parts and not len(part["keys"])):
            return
        self._parts.append({name: tensor.cpu() for name, tensor in part.items()})
        self._in_order = False
        self._drop_if_full()

    def all(self) -> dict[str, Tensor]:
        """``features_ND``, ``targets``, ``weights_N``, ``keys`` and ``hashes``, in the order of the keys.

        The tensors are those of the store: not to be changed.
        """
        if not self._parts:
            return {}
        if not self._in_order:
            if self.limit is not None and self.rows_held > self.limit:
                self._drop()
            self._parts, self._in_order = [self._joined()], True
        return dict(self._parts[0])

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
        return int(gone_N.sum())

    def renumber(self, first: int) -> None:
        """Count the numbers of the rows from another one on; what was chosen of them, by hash, stays chosen."""
        for part in self._parts:
            part["keys"] = part["keys"] + first * PLACES

    def copy(self) -> "RowStore":
        """Another store of the same rows, whose tensors are shared."""
        result = RowStore(self.limit, self.seed)
        result._parts = [dict(part) for part in self._parts]
        result._in_order, result._highest = self._in_order, self._highest
        return result

    def state_dict(self) -> dict[str, Tensor]:
        return self.all()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._parts = [dict(state)] if state else []
        self._in_order, self._highest = False, None
        self._drop_if_full()

    def _part(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of new rows; what is large is still on its device."""
        features_ND = rows.features_ND.detach()
        weights_N = torch.ones(len(features_ND)) if rows.weights_N is None else rows.weights_N
        keys = _occurrence_keys(rows.row_ids.cpu())
        part = {"features_ND": features_ND, "targets": rows.targets, "weights_N": weights_N}
        return part | {"keys": keys, "hashes": hashed(keys, self.seed)}

    def _chosen(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of new rows that may be in the sample."""
        if self.limit is None or not part:
            return part
        chosen_N = _lowest(part["hashes"], part["keys"], self.limit)
        if self._highest is not None:
            chosen_N &= part["hashes"] <= self._highest
        return part if bool(chosen_N.all()) else _rows(part, chosen_N)

    def _drop_if_full(self) -> None:
        if self.limit is None or self.rows_held < self.limit:
            return
        if self._highest is None or self.rows_held > 1.25 * self.limit:
            self._drop()

    def _drop(self) -> None:
        """Keep ``limit`` rows, and copy a few parts at a time: what was copied is freed."""
        assert self.limit is not None
        hashes_N, keys_N = (torch.cat([part[name] for part in self._parts]) for name in ("hashes", "keys"))
        kept_N = _lowest(hashes_N, keys_N, self.limit)
        self._highest = int(hashes_N[kept_N].max()) if self.limit else -1
        masks = list(kept_N.split([len(part["keys"]) for part in self._parts]))
        first = 0
        while first < len(masks):
            end, rows = first, 0
            while end < len(masks) and rows < CHUNK:
                rows += int(masks[end].sum())
                end += 1
            few = [_rows(part, mask) for part, mask in zip(self._parts[first:end], masks[first:end], strict=True)]
            self._parts[first:end] = [{name: torch.cat([part[name] for part in few]) for name in few[0]}]
            masks[first:end] = [kept_N[:0]]
            first += 1

    def _joined(self) -> dict[str, Tensor]:
        """All parts in the order of their keys, each row copied once."""
        places_N = torch.cat([part["keys"] for part in self._parts]).argsort(stable=True).argsort()
        joined = {}
        for name, first in self._parts[0].items():
            dtype = reduce(torch.promote_types, (part[name].dtype for part in self._parts))
            joined[name] = torch.empty(len(places_N), *first.shape[1:], dtype=dtype)
            for part, places in zip(
                self._parts, places_N.split([len(part["keys"]) for part in self._parts]), strict=True
            ):
                joined[name][places] = part[name].to(dtype)
        return joined


def _rows(part: dict[str, Tensor], chosen_N: Tensor) -> dict[str, Tensor]:
    return {name: tensor[chosen_N.to(tensor.device)] for name, tensor in part.items()}


def _lowest(hashes_N: Tensor, keys_N: Tensor, count: int) -> Tensor:
    """[N]: which rows have the lowest hashes; of equal ones, the lowest keys."""
    if len(hashes_N) <= count:
        return torch.ones(len(hashes_N), dtype=torch.bool)
    by_key_N = keys_N.argsort(stable=True)
    order_N = by_key_N[hashes_N[by_key_N].argsort(stable=True)]
    chosen_N = torch.zeros(len(hashes_N), dtype=torch.bool)
    chosen_N[order_N[:count]] = True
    return chosen_N


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
