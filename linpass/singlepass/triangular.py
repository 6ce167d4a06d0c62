r"""The same statistics as a streamed QR factorisation, for features too ill-conditioned for their scatter.

Shape suffixes: N rows, D features, A = 1 + D columns (the intercept, then the features), C targets.
"""

import torch
from torch import Tensor

from .moments import TINY, Spectrum


class TriangularFactor:
    r"""The triangular factor of the weighted rows, and the targets in its basis; everything float64.

    .. math::  \operatorname{diag}(\sqrt s)\,[1, X - o] = Q R, \qquad Q^\top \operatorname{diag}(\sqrt s)\,(Y - t)

    A block of rows is stacked under R and factored again; Q is never kept. The scatter, whose condition number is the
    square of that of the features, is not formed: solutions stand on :math:`\operatorname{cond}(X)`.

    Source: Demmel, Grigori, Hoemmen and Langou 2012, "Communication-optimal parallel and sequential QR and LU
    factorizations", section 4.2 (sequential TSQR) and section 3 for the merge of two factors.

    The origins o and t are the means of the first block. Class ids become one-hot rows of one block at a time: their
    residuals need them.

    Attributes:
        factor_AA: R, upper triangular; the signs of its rows are arbitrary.
        rotated_AC: the targets in the columns of Q.
        residual_C: weighted sum of squares of the targets outside the columns of Q.
    """

    def __init__(self, num_features: int, num_targets: int, device=None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.rows = 0
        self.weight, self.counted = zeros(), zeros()
        self.origin_D, self.target_origin_C = zeros(num_features), zeros(num_targets)
        self.factor_AA = zeros(1 + num_features, 1 + num_features)
        self.rotated_AC, self.residual_C = zeros(1 + num_features, num_targets), zeros(num_targets)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds; the tensors themselves, not copies."""
        names = ("weight", "counted", "origin_D", "target_origin_C", "factor_AA", "rotated_AC", "residual_C")
        return {name: getattr(self, name) for name in names}

    @property
    def mean_D(self) -> Tensor:
        return self.origin_D + self._per_row() * self.factor_AA[0, 1:]

    @property
    def target_mean_C(self) -> Tensor:
        return self.target_origin_C + self._per_row() * self.rotated_AC[0]

    @property
    def scatter_DD(self) -> Tensor:
        r""":math:`\sum s (x - \mu)(x - \mu)^\top`; the rows of R below the first are those of the centred features."""
        return self.factor_AA[1:, 1:].T @ self.factor_AA[1:, 1:]

    @property
    def cross_DC(self) -> Tensor:
        r""":math:`\sum s (x - \mu)(y - \bar y)^\top`."""
        return self.factor_AA[1:, 1:].T @ self.rotated_AC[1:]

    @property
    def target_scatter_C(self) -> Tensor:
        return self.residual_C + self.rotated_AC[1:].square().sum(0)

    def add(self, rows_ND: Tensor, targets: Tensor, weights_N: Tensor | None) -> None:
        """One block of rows, float64; ``rows_ND`` and targets that are no class ids are overwritten."""
        if targets.ndim == 1:
            ids_N, targets = targets, rows_ND.new_zeros(len(rows_ND), len(self.target_origin_C))
            targets.scatter_(1, ids_N[:, None], 1.0)
        if not self.rows:
            self.origin_D.copy_(rows_ND.mean(0))
            self.target_origin_C.copy_(targets.mean(0))
        root_N1 = rows_ND.new_ones(len(rows_ND), 1) if weights_N is None else weights_N.sqrt()[:, None]
        rows_NA = torch.cat([root_N1, rows_ND.sub_(self.origin_D).mul_(root_N1)], 1)
        self._stack(rows_NA, targets.sub_(self.target_origin_C).mul_(root_N1))
        self.weight += len(rows_ND) if weights_N is None else weights_N.sum()
        self.rows += len(rows_ND)
        self.counted += len(rows_ND) if weights_N is None else (weights_N > 0).sum()

    def merge(self, other: "TriangularFactor") -> None:
        """As if the rows of ``other`` had come here; ``other`` stays."""
        if not self.rows:
            self.origin_D.copy_(other.origin_D)
            self.target_origin_C.copy_(other.target_origin_C)
        ones_A = other.factor_AA[:, 0]
        factor_AA = other.factor_AA.clone()
        factor_AA[:, 1:].addr_(ones_A, other.origin_D - self.origin_D)
        self._stack(factor_AA, torch.addr(other.rotated_AC, ones_A, other.target_origin_C - self.target_origin_C))
        self.residual_C += other.residual_C
        self.weight += other.weight
        self.rows += other.rows
        self.counted += other.counted

    def scale(self, factor: float) -> None:
        """Every weight times ``factor``."""
        self.counted *= factor > 0
        for tensor, power in ((self.factor_AA, 0.5), (self.rotated_AC, 0.5), (self.residual_C, 1), (self.weight, 1)):
            tensor.mul_(factor**power)

    def spectrum(self, fit_intercept: bool) -> Spectrum:
        """One singular value decomposition of R; the eigenvalues are the squares of its singular values."""
        if fit_intercept:
            factor, rotated = self.factor_AA[1:, 1:], self.rotated_AC[1:]
        else:
            ones_A = self.factor_AA[:, 0]
            factor = torch.addr(self.factor_AA[:, 1:], ones_A, self.origin_D)
            rotated = torch.addr(self.rotated_AC, ones_A, self.target_origin_C)
        left, singular_D, right_DD = torch.linalg.svd(factor, full_matrices=False)
        left, singular_D, right_DD = left.flip(1), singular_D.flip(0), right_DD.flip(0)
        smallest = singular_D[-1].item() * torch.finfo(torch.float64).eps * len(singular_D) ** 0.5
        coordinates_DC = left.T @ rotated
        explained = (left * (singular_D > smallest)) @ coordinates_DC
        return Spectrum(
            eigenvalues_D=singular_D.square(),
            vectors_DD=right_DD.T,
            projections_DC=singular_D[:, None] * coordinates_DC,
            mean_D=self.mean_D,
            target_mean_C=self.target_mean_C,
            target_scatter_C=self.residual_C + rotated.square().sum(0),
            rows=int(self.counted.item()),
            weight=self.weight.item(),
            residual_C=self.residual_C + (rotated - explained).square().sum(0),
            fit_intercept=fit_intercept,
            noise=smallest**2,
        )

    def _stack(self, rows_NA: Tensor, targets_NC: Tensor) -> None:
        """Put rows under the factor and factor again."""
        stacked_targets = torch.cat([self.rotated_AC, targets_NC])
        basis, factor_AA = torch.linalg.qr(torch.cat([self.factor_AA, rows_NA]))
        rotated_AC = basis.T @ stacked_targets
        # Not the difference of two sums of squares: it would be noise, and negative, where the fit is perfect.
        self.residual_C += stacked_targets.addmm_(basis, rotated_AC, alpha=-1).square().sum(0)
        self.factor_AA.copy_(factor_AA)
        self.rotated_AC.copy_(rotated_AC)

    def _per_row(self) -> Tensor:
        """What turns the first row of R into means; 0 while the weights are 0."""
        root = self.factor_AA[0, 0]
        return torch.where(root.abs() > TINY, 1 / root, 0.0)
