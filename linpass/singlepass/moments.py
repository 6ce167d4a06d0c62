r"""Weighted centred moments of features and targets, and the spectrum in which ridge regression is solved.

Shape suffixes: N rows, D features, C targets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Spectrum:
    r"""The moments in the eigenvectors of the scatter, where every ridge solution is one division.

    .. math::  S_{xx} = V \operatorname{diag}(e) V^\top, \quad W(\lambda)^\top = V \frac{V^\top S_{xy}}{e + \lambda}

    All tensors are float64. Without an intercept the moments are about zero: :math:`S_{xx} = \sum s x x^\top` and so
    on; the means stay what they are.

    Attributes:
        eigenvalues_D: :math:`e \ge 0`, ascending.
        vectors_DD: the eigenvectors, in columns.
        projections_DC: :math:`V^\top S_{xy}`.
        target_scatter_C: :math:`\sum s (y - \bar y)^2`.
        rows, weight: how many rows of a weight above 0, and the sum of their weights.
        residual_C: weighted sum of squares that no linear fit explains, at least 0. Directions whose eigenvalue is at
            most ``noise`` explain nothing.
        noise: the largest eigenvalue that rounding alone can make out of 0.
    """

    eigenvalues_D: Tensor
    vectors_DD: Tensor
    projections_DC: Tensor
    mean_D: Tensor
    target_mean_C: Tensor
    target_scatter_C: Tensor
    rows: int
    weight: float
    residual_C: Tensor
    fit_intercept: bool
    noise: float


class CentredMoments:
    r"""Moments about the running means, accumulated in float64.

    Blocks of rows are centred at their own mean (in float64), multiplied in ``product_dtype``, and merged by

    .. math::  \delta = \mu_b - \mu_a, \quad S = S_a + S_b + \frac{w_a w_b}{w_a + w_b} \delta \delta^\top

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1, for matrices and with
    weights. The same formula with a negative weight :math:`w_b` and :math:`-S_b` takes rows out again.

    The cross moments are kept as :math:`\sum s (x - o) y^\top` about a fixed origin o near the data, the mean of the
    first block: a block of class ids then touches the classes it holds and no others. Centring them at the end costs
    one rounding of :math:`\mu - o`, not of :math:`\mu`.

    Attributes:
        rows, counted: how many rows came, and those of a weight above 0, which a criterion counts.
        offset_D: the mean of the features minus the origin.
        cross_CD: :math:`\sum s\, y (x - o)^\top`, a row for each class so that a class is contiguous.
    """

    def __init__(self, num_features: int, num_targets: int, product_dtype: torch.dtype, device=None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.product_dtype = product_dtype
        self.rows = 0
        self.weight, self.counted = zeros(), zeros()
        self.origin_D, self.offset_D, self.target_mean_C = zeros(num_features), zeros(num_features), zeros(num_targets)
        self.scatter_DD, self.cross_CD = zeros(num_features, num_features), zeros(num_targets, num_features)
        self.target_scatter_C = zeros(num_targets)
        self._scratch: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds; the tensors themselves, not copies."""
        names = ("weight", "counted", "origin_D", "offset_D", "target_mean_C")
        names += ("scatter_DD", "cross_CD", "target_scatter_C")
        return {name: getattr(self, name) for name in names}

    @property
    def mean_D(self) -> Tensor:
        return self.origin_D + self.offset_D

    @property
    def cross_DC(self) -> Tensor:
        r""":math:`\sum s (x - \mu)(y - \bar y)^\top`."""
        return torch.addr(self.cross_CD.T, self.offset_D, self.weight * self.target_mean_C, alpha=-1)

    def add(self, rows_ND: Tensor, targets: Tensor, weights_N: Tensor | None) -> None:
        """One block of rows, float64; ``rows_ND`` and targets that are no class ids are overwritten."""
        if not self.rows:
            self.origin_D.copy_(rows_ND.mean(0))
        rows_ND.sub_(self.origin_D)
        share_N = rows_ND.new_ones(len(rows_ND)) if weights_N is None else weights_N
        weight = share_N.sum()
        share_N = share_N / weight.clamp(min=TINY)
        offset_D = share_N @ rows_ND
        if targets.ndim == 1:
            self.cross_CD.index_add_(0, targets, rows_ND if weights_N is None else rows_ND * weights_N[:, None])
            target_mean_C = torch.zeros_like(self.target_mean_C).index_add_(0, targets, share_N)
            target_scatter_C = weight * target_mean_C * (1 - target_mean_C)
        else:
            target_mean_C = share_N @ targets
            target_scatter_C = weight * (share_N @ targets.sub_(target_mean_C).square())
        peak = root_N1 = None
        if weights_N is not None:
            peak = weights_N.amax().clamp(min=TINY)
            root_N1 = (weights_N / peak).sqrt_()[:, None]
        deviations_ND = self._deviations(rows_ND, offset_D, root_N1)
        with full_float32(rows_ND.device):
            _accumulate(self.scatter_DD, deviations_ND.T @ deviations_ND, peak)
            if targets.ndim == 2:
                targets = (targets if root_N1 is None else targets.mul_(root_N1)).to(self.product_dtype)
                _accumulate(self.cross_CD, targets.T @ deviations_ND, peak)
        if targets.ndim == 2:
            self.cross_CD.addr_(weight * target_mean_C, offset_D)
        self._shift_means(weight, offset_D, target_mean_C, target_scatter_C)
        self.rows += len(rows_ND)
        self.counted += len(rows_ND) if weights_N is None else (weights_N > 0).sum()

    def merge(self, other: "CentredMoments", sign: int = 1) -> None:
        """As if the rows of ``other`` had come here (sign 1), or had never come (sign -1); ``other`` stays."""
        if not self.rows:
            self.origin_D.copy_(other.origin_D)
        shift_D = other.origin_D - self.origin_D
        self.cross_CD.add_(other.cross_CD, alpha=sign)
        self.cross_CD.addr_(sign * other.weight * other.target_mean_C, shift_D)
        self.scatter_DD.add_(other.scatter_DD, alpha=sign)
        self._shift_means(
            sign * other.weight, other.offset_D + shift_D, other.target_mean_C, sign * other.target_scatter_C
        )
        self.rows += sign * other.rows
        self.counted += sign * other.counted

    def scale(self, factor: float) -> None:
        """Every weight times ``factor``."""
        self.counted *= factor > 0
        for tensor in (self.weight, self.scatter_DD, self.cross_CD, self.target_scatter_C):
            tensor.mul_(factor)

    def spectrum(self, fit_intercept: bool) -> Spectrum:
        """One eigendecomposition; see :class:`Spectrum`."""
        scatter_DD, cross_DC, target_scatter_C = self.scatter_DD, self.cross_DC, self.target_scatter_C
        if not fit_intercept:
            scatter_DD = torch.addr(scatter_DD, self.weight * self.mean_D, self.mean_D)
            cross_DC = cross_DC.addr_(self.weight * self.mean_D, self.target_mean_C)
            target_scatter_C = target_scatter_C + self.weight * self.target_mean_C.square()
        values_D, vectors_DD = torch.linalg.eigh(scatter_DD)
        values_D.clamp_(min=0)
        # Only the scatter about the mean comes from products in low precision.
        spread = torch.linalg.matrix_norm(self.scatter_DD).clamp(max=values_D[-1])
        noise = (self._rounding(self.product_dtype) * spread + self._rounding(torch.float64) * values_D[-1]).item()
        projections_DC = vectors_DD.T @ cross_DC
        inverse_D = (1 / values_D).where(values_D > noise, 0.0)
        residual_C = target_scatter_C - inverse_D @ projections_DC.square()
        return Spectrum(
            eigenvalues_D=values_D,
            vectors_DD=vectors_DD,
            projections_DC=projections_DC,
            mean_D=self.mean_D,
            target_mean_C=self.target_mean_C.clone(),
            target_scatter_C=target_scatter_C.clone(),
            rows=int(self.counted.item()),
            weight=self.weight.item(),
            residual_C=residual_C.clamp_(min=0),
            fit_intercept=fit_intercept,
            noise=noise,
        )

    def _deviations(self, rows_ND: Tensor, offset_D: Tensor, root_N1: Tensor | None) -> Tensor:
        """Rows minus their mean, times the roots of the weights, in the dtype of the products.

        The weights are relative to the largest, so that float32 can hold their products. The float32 copy is kept: the
        system would have to zero new memory for every block.
        """
        rows_ND.sub_(offset_D)
        if root_N1 is not None:
            rows_ND.mul_(root_N1)
        if self.product_dtype == rows_ND.dtype:
            return rows_ND
        scratch = self._scratch
        if scratch is None or len(scratch) < len(rows_ND):
            self._scratch = scratch = torch.empty_like(rows_ND, dtype=self.product_dtype)
        return scratch[: len(rows_ND)].copy_(rows_ND)

    def _shift_means(self, weight: Tensor, offset_D: Tensor, target_mean_C: Tensor, target_scatter_C: Tensor) -> None:
        """The parts of the merge that the difference of the means brings."""
        total = self.weight + weight
        share = weight / torch.where(total == 0, 1.0, total)
        between = self.weight * share
        delta_D, delta_C = offset_D - self.offset_D, target_mean_C - self.target_mean_C
        self.scatter_DD.addr_(between * delta_D, delta_D)
        self.target_scatter_C.add_(target_scatter_C).addcmul_(between * delta_C, delta_C)
        self.offset_D.add_(share * delta_D)
        self.target_mean_C.add_(share * delta_C)
        self.weight.add_(weight)

    def _rounding(self, dtype: torch.dtype) -> float:
        """The largest eigenvalue that rounding makes out of 0, relative to the largest of all; thrice what was seen."""
        return torch.finfo(dtype).eps * len(self.origin_D) ** 0.5


def _accumulate(total: Tensor, product: Tensor, peak: Tensor | None) -> None:
    total.add_(product if peak is None else product.double().mul_(peak))


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32: no autocast, no TF32, no bfloat16, whatever the process has set.

    TF32 alone would cost an error of 2e-4. The settings are the process's, so another thread sees them change.
    """
    backends: Any = torch.backends
    setting = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul
    before = setting.fp32_precision
    lowered = before in ("tf32", "bf16")
    if lowered:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if lowered:
            setting.fp32_precision = before
