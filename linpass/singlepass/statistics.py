r"""Sufficient statistics of ridge regression, gathered in one pass and never growing with the rows.

:class:`RidgeStatistics` of all rows, and :class:`GroupedStatistics` of folds or classes from the same pass.

Shape suffixes: N rows, D features, C targets, G groups.
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from linpass.errors import InputError

from .batches import LARGEST, check_batch, check_group_ids, row_names
from .blocks import BLOCK_ROWS, FEWEST_ROWS, BlockSum
from .moments import Spectrum
from .statistics_file import load_statistics, write_statistics

__all__ = ["GroupedStatistics", "RidgeStatistics", "Spectrum"]


class RidgeStatistics:
    r"""Weighted moments of features and targets about their means, from which every ridge solution follows.

    .. math::
        S_{xx} = \sum_i s_i (x_i - \mu)(x_i - \mu)^\top, \quad S_{xy} = \sum_i s_i (x_i - \mu)(y_i - \bar y)^\top

    Rows are gathered into blocks of up to 4096 and used when a block is full or a result is asked for.

    Args:
        precision:
            "mixed": blocks centred at their mean in float64, multiplied in float32, summed in float64. The relative
                error of the scatter is about 3e-8, whatever the mean and the number of rows; for cond(X) up to 1e3.
            "float64": products in float64; for cond(X) up to 1e6.
            "tsqr": no products but a streamed QR of [1, X], for cond(X) up to 1e10. Takes no rows back; another
                O(D²·C) time per block.
        device: where the statistics live and the products run; batches may come from another.

    Attributes:
        rows: how many rows came, with those of weight 0.
        weight: the sum of the weights.
        mean_D, target_mean_C: weighted means; 0 before any row.
        scatter_DD, cross_DC: the moments above.
        target_scatter_C: :math:`\sum_i s_i (y_{ic} - \bar y_c)^2`. All tensors are float64, not to be written to.

    Cost: time O(N·D·(D + C)), O(N·D²) with class ids; memory O(D² + D·C) and one block. An update waits for the device
        once, to check its numbers.
    Invariants: the order and the sizes of batches change nothing but rounding; merged parts are one pass; forgotten
        rows were never seen; class ids are their one-hot rows; weights are repeated rows.

    >>> statistics = RidgeStatistics(num_features=1, num_targets=1, precision="float64")
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> statistics.update(x, 3 * x + 1).scatter_DD.item(), statistics.cross_DC.item()
    (2.0, 6.0)
    """

    def __init__(
        self,
        num_features: int,
        num_targets: int,
        *,
        precision: str = "mixed",
        device: torch.device | str | None = None,
    ) -> None:
        if precision not in LARGEST:
            raise InputError(f"precision={precision!r} must be one of {', '.join(LARGEST)}")
        for name, size in (("num_features", num_features), ("num_targets", num_targets)):
            if size < 1:
                raise InputError(f"{name}={size} must be at least 1")
        self.num_features, self.num_targets, self.precision = num_features, num_targets, precision
        self._sum = BlockSum(num_features, num_targets, precision, device)
        self._spectra: dict[tuple[bool, int], Spectrum] = {}  # by intercept and state of the sums

    def __repr__(self) -> str:
        sizes = f"num_features={self.num_features}, num_targets={self.num_targets}"
        return f"RidgeStatistics({sizes}, precision={self.precision!r}, rows={self.rows})"

    @property
    def device(self) -> torch.device:
        return self._sum.device

    @property
    def rows(self) -> int:
        return self._sum.rows

    @property
    def weight(self) -> float:
        return self._sum.flushed().weight.item()

    @property
    def mean_D(self) -> Tensor:
        return self._sum.flushed().mean_D

    @property
    def target_mean_C(self) -> Tensor:
        return self._sum.flushed().target_mean_C

    @property
    def scatter_DD(self) -> Tensor:
        return self._sum.flushed().scatter_DD

    @property
    def cross_DC(self) -> Tensor:
        return self._sum.flushed().cross_DC

    @property
    def target_scatter_C(self) -> Tensor:
        return self._sum.flushed().target_scatter_C

    def update(
        self,
        features_ND: Tensor,
        targets: Tensor,
        weights_N: Tensor | None = None,
        row_ids: Sequence | Tensor | None = None,
    ) -> "RidgeStatistics":
        """Add rows; returns itself.

        Args:
            features_ND: any floating dtype and device. Neither autocast nor the settings for TF32 have a say.
            targets: values [N, C], or integer class ids [N], which stand for their one-hot rows and are added class by
                class, without them ("tsqr" makes those of one block). No id is special: leave out ignored rows.
            weights_N: finite and at least 0; None for 1.
            row_ids: what errors call the rows; None for their numbers in the order of arrival, from 0.

        Raises:
            InputError: NaN, infinity, magnitudes whose products would overflow, class ids out of range, negative
                weights (each named by row), or wrong shapes. Nothing has changed then.
        """
        name = row_names(row_ids, features_ND, self.rows)
        check_batch(features_ND, targets, weights_N, row_name=name, **self._sum.sizes)
        self._sum.append(features_ND, targets, weights_N)
        return self

    def merge(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """Add the rows of other statistics, which stay as they are; returns itself.

        Raises:
            InputError: other sizes or another precision.
        """
        self._sum.merge(other._sum)
        return self

    def subtract(self, other: "RidgeStatistics") -> "RidgeStatistics":
        """Take out the rows of other statistics, which stay as they are; returns itself.

        Only counts, weights and sums of squares are left to tell that a row was never in; a row near the middle of the
        others passes. What remains carries the rounding of what there was.

        Raises:
            InputError: more rows, weight or scatter than there is, or precision "tsqr". Nothing has changed then.
        """
        self._sum.check_contains(other._sum)
        self._sum.subtract(other._sum)
        return self

    def forget(self, features_ND: Tensor, targets: Tensor, weights_N: Tensor | None = None) -> "RidgeStatistics":
        """Take out rows that were added before, with the same targets and weights; returns itself.

        Raises:
            InputError: as :meth:`update` and :meth:`subtract`.
        """
        self._sum.check_takes_back()
        return self.subtract(self._empty().update(features_ND, targets, weights_N))

    def scaled(self, factor: float) -> "RidgeStatistics":
        """New statistics with every weight multiplied; the number of rows stays."""
        if not (math.isfinite(factor) and factor >= 0):
            raise InputError(f"factor={factor} must be finite and at least 0")
        result = self._empty().merge(self)
        result._sum.scale(factor)
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def spectrum(self, fit_intercept: bool = True) -> Spectrum:
        """The moments in the eigenvectors of the scatter; O(D³ + D²·C) time.

        Raises:
            InputError: no rows, or none of positive weight.
        """
        if not self.weight > 0:
            raise InputError(f"statistics: {self.rows} rows of weight {self.weight:g}; some row must weigh more than 0")
        key = (fit_intercept, self._sum.changes)
        if key not in self._spectra:
            self._spectra = {old: kept for old, kept in self._spectra.items() if old[1] == key[1]}
            self._spectra[key] = self._sum.flushed().spectrum(fit_intercept)
        return self._spectra[key]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors; ``rows`` is one of them."""
        return self._sum.tensors()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Become what :meth:`state_dict` was taken of.

        Raises:
            InputError: of another size or precision. Nothing has changed then.
        """
        self._sum.load(state)

    def save(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all."""
        write_statistics(path, "RidgeStatistics", self._sum.sizes, self.state_dict(), metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: torch.device | str | None = None
    ) -> tuple["RidgeStatistics", dict[str, str]]:
        """The statistics and the metadata of a file, equal to the bit.

        Raises:
            InputError: the file is missing, broken or of something else; the message names it and what is wrong.
        """
        return load_statistics(cls, path, device)

    def _empty(self) -> "RidgeStatistics":
        return RidgeStatistics(**self._sum.sizes, device=self.device)


class GroupedStatistics:
    """Statistics of every fold or class apart, from the same pass.

    Folds for cross-validation, classes for class weights that are chosen after the pass. ``groups`` holds one
    :class:`RidgeStatistics` each.

    Cost: memory O(G·(D² + D·C)); one more copy of each batch, sorted by group.
    Invariants: the total is one pass over all rows; ``without`` is one pass over the rest.
    """

    def __init__(
        self,
        num_groups: int,
        num_features: int,
        num_targets: int,
        *,
        precision: str = "mixed",
        device: torch.device | str | None = None,
    ) -> None:
        if num_groups < 1:
            raise InputError(f"num_groups={num_groups} must be at least 1")
        self.groups = [
            RidgeStatistics(num_features, num_targets, precision=precision, device=device) for _ in range(num_groups)
        ]
        for group in self.groups:  # many small blocks, not many large ones
            group._sum.most_rows = max(FEWEST_ROWS, BLOCK_ROWS // num_groups)

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def weight(self) -> float:
        return sum(group.weight for group in self.groups)

    def update(
        self,
        features_ND: Tensor,
        targets: Tensor,
        weights_N: Tensor | None,
        groups_N: Tensor,
        row_ids: Sequence | Tensor | None = None,
    ) -> "GroupedStatistics":
        """Add rows, each to the group of its id; otherwise :meth:`RidgeStatistics.update`."""
        name = row_names(row_ids, features_ND, self.rows)
        check_batch(features_ND, targets, weights_N, row_name=name, **self.groups[0]._sum.sizes)
        check_group_ids(groups_N, len(features_ND), len(self.groups), name)
        order_N = groups_N.argsort(stable=True)
        sizes = groups_N.bincount(minlength=len(self.groups)).tolist()
        for group, rows in zip(self.groups, order_N.split(sizes), strict=True):
            if len(rows):
                weights = None if weights_N is None else weights_N[rows.to(weights_N.device)]
                group._sum.append(features_ND[rows.to(features_ND.device)], targets[rows.to(targets.device)], weights)
        return self

    def total(self, weights_G: Sequence[float] | Tensor | None = None) -> RidgeStatistics:
        """The statistics of all rows; every weight times that of its group."""
        if weights_G is not None and len(weights_G) != len(self.groups):
            raise InputError(f"weights: {len(weights_G)} numbers for {len(self.groups)} groups; must be as many")
        result = self.groups[0]._empty()
        for index, group in enumerate(self.groups):
            result.merge(group if weights_G is None else group.scaled(float(weights_G[index])))
        return result

    def without(self, group: int) -> RidgeStatistics:
        """The statistics of all rows but those of one group, merged of the others, so that no digits cancel."""
        if not 0 <= group < len(self.groups):
            raise InputError(f"group={group} must be from 0 to {len(self.groups) - 1}")
        result = self.groups[0]._empty()
        for index, other in enumerate(self.groups):
            if index != group:
                result.merge(other)
        return result

    def merge(self, other: "GroupedStatistics") -> "GroupedStatistics":
        """Add the rows of other groups, group by group; see :meth:`RidgeStatistics.merge`."""
        for mine, theirs in self._pairs(other):
            mine.merge(theirs)
        return self

    def subtract(self, other: "GroupedStatistics") -> "GroupedStatistics":
        """Take out the rows of other groups, group by group; see :meth:`RidgeStatistics.subtract`."""
        pairs = self._pairs(other)
        for mine, theirs in pairs:
            mine._sum.check_contains(theirs._sum)
        for mine, theirs in pairs:
            mine._sum.subtract(theirs._sum)
        return self

    def forget(
        self, features_ND: Tensor, targets: Tensor, weights_N: Tensor | None, groups_N: Tensor
    ) -> "GroupedStatistics":
        """Take out rows that were added before, with the same targets, weights and groups."""
        self.groups[0]._sum.check_takes_back()
        return self.subtract(self._empty().update(features_ND, targets, weights_N, groups_N))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors, named ``group.name``."""
        states = enumerate(group.state_dict() for group in self.groups)
        return {f"{index}.{name}": tensor for index, state in states for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Become what :meth:`state_dict` was taken of; see :meth:`RidgeStatistics.load_state_dict`."""
        loaded, numbers = self._empty(), {name.partition(".")[0] for name in state}
        if numbers != {str(index) for index in range(len(self.groups))}:
            raise InputError(f"groups: the state has {len(numbers)}; must be the {len(self.groups)} from 0 on")
        for index, group in enumerate(loaded.groups):
            prefix = f"{index}."
            group.load_state_dict({name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)})
        self.groups = loaded.groups

    def save(self, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all."""
        write_statistics(path, "GroupedStatistics", self._sizes(), self.state_dict(), metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: torch.device | str | None = None
    ) -> tuple["GroupedStatistics", dict[str, str]]:
        """The statistics and the metadata of a file; see :meth:`RidgeStatistics.load`."""
        return load_statistics(cls, path, device)

    def _sizes(self) -> dict:
        return {"num_groups": len(self.groups), **self.groups[0]._sum.sizes}

    def _empty(self) -> "GroupedStatistics":
        return GroupedStatistics(**self._sizes(), device=self.groups[0].device)

    def _pairs(self, other: "GroupedStatistics") -> list[tuple[RidgeStatistics, RidgeStatistics]]:
        if len(other.groups) != len(self.groups):
            raise InputError(f"num_groups: {len(other.groups)} cannot be combined with {len(self.groups)}")
        return list(zip(self.groups, other.groups, strict=True))
