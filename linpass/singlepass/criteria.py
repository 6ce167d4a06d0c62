"""How well a regularisation would predict, from moments: the criteria that choose it, and the filter 1 / (e + lambda).

Shapes and symbols: see :mod:`linpass.singlepass.solver`.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from linpass.errors import InputError
from linpass.singlepass.statistics import GroupedStatistics, RidgeStatistics, Spectrum

# A leverage of 1 is computed with an error of up to this times D.
ROUNDING = torch.finfo(torch.float64).eps


def gcv_scores(spectrum: Spectrum, grid_L: Tensor) -> Tensor:
    r"""Generalized cross-validation [L, C]: squared error per row, corrected for the degrees of freedom spent.

    .. math::  \frac{N\,\mathrm{RSS}}{(N - \mathrm{df})^2}, \quad
        \mathrm{RSS} = \mathrm{RSS}_0 + \sum \frac{q^2}{e} \Big(\frac{\lambda}{e + \lambda}\Big)^2, \quad
        \mathrm{df} = 1 + \sum \frac{e}{e + \lambda}

    Source: Golub, Heath and Wahba 1979, on rows times the root of their weight: RSS is weighted, df is
    the trace of the hat matrix, N counts rows of a weight above 0. RSS_0 is what no linear fit explains; sums run over
    directions that the data has, 1 is the intercept. Both differences are written so that nothing cancels. With
    N = df(0) the fit interpolates, RSS_0 is 0 and the ratio is that of its limit: lambda^2 divides out.
    """
    rank = numerical_rank(spectrum)
    if not rank:  # every value of the grid gives the same fit
        spare = max(spectrum.rows - int(spectrum.fit_intercept), 1)
        return (spectrum.rows * spectrum.target_scatter_C / spare**2).expand(len(grid_L), -1)
    e_D, q_DC = spectrum.eigenvalues_D[-rank:], spectrum.projections_DC[-rank:]
    grid_L1 = grid_L.to(e_D)[:, None]
    spare = spectrum.rows - int(spectrum.fit_intercept) - rank
    shrink_LD = 1 / (e_D + grid_L1) if spare == 0 else grid_L1 / (e_D + grid_L1)
    rss_LC = shrink_LD.square() @ (q_DC.square() / e_D[:, None])
    if spare:
        rss_LC = rss_LC + spectrum.residual_C
    return spectrum.rows * rss_LC / (spare + shrink_LD.sum(1, keepdim=True)).square()


def kfold_scores(statistics: GroupedStatistics, grid_L: Tensor, fit_intercept: bool = True) -> Tensor:
    r"""Squared error per row [L, C] on the groups held out in turn, exact, from their moments alone.

    .. math::  \sum_{\text{fold}} s (y - W x - b)^2
        = S_{yy} - 2 W S_{xy} + W S W^\top + \Big(\sum s\Big) (\bar y - W \mu - b)^2

    with the fold's own moments and the head of all other folds. Cost: one eigendecomposition per fold, and
    O(L D^2 C). Groups without rows are left out.
    """
    folds = [g for g, group in enumerate(statistics.groups) if group.rows and group.weight > 0]
    if len(folds) < 2:
        raise InputError(f"regularization='kfold' needs rows in at least 2 groups, got {len(folds)}")
    errors = [
        _held_out_error(statistics.without(fold).spectrum(fit_intercept), statistics.groups[fold], grid_L)
        for fold in folds
    ]
    return torch.stack(errors).sum(0) / sum(statistics.groups[fold].rows for fold in folds)


def _held_out_error(train: Spectrum, fold: RidgeStatistics, grid_L: Tensor) -> Tensor:
    vectors_DD = train.vectors_DD
    scatter_DD = vectors_DD.T @ fold.scatter_DD @ vectors_DD
    cross_DC = vectors_DD.T @ fold.cross_DC
    mean_D, target_mean_C = origin(train)
    shift_D, offset_C = vectors_DD.T @ (fold.mean_D - mean_D), fold.target_mean_C - target_mean_C
    errors = []
    for value in grid_L.tolist():
        coefficients_DC = train.projections_DC * inverse(train, value)
        explained_C = (coefficients_DC * (2 * cross_DC - scatter_DD @ coefficients_DC)).sum(0)
        bias_C = offset_C - shift_D @ coefficients_DC
        errors.append(fold.target_scatter_C - explained_C + fold.weight * bias_C.square())
    return torch.stack(errors).clamp(min=0)


def leave_one_out_errors(
    spectrum: Spectrum, features_ND: Tensor, targets: Tensor, weights_N: Tensor | None, grid: Iterable[float | Tensor]
) -> Iterator[Tensor]:
    r"""Per lambda, what the fit to all *other* rows misses of each row [N, C]; it predicts ``targets - errors``.

    .. math::  \frac{y_i - \hat y_i}{1 - h_i}, \qquad
        h_i = s_i \Big(\frac{1}{\sum s} + (x_i - \mu)^\top (S + \lambda I)^{-1} (x_i - \mu)\Big)

    without an intercept, no 1 / sum s and no mu. Source: Allen 1974 (PRESS); Rifkin and Lippert 2007. A row
    that alone determines a direction has h = 1; its error is then infinite.
    """
    mean_D, target_mean_C = origin(spectrum)
    rotated_ND = (features_ND.to(mean_D) - mean_D) @ spectrum.vectors_DD
    if not targets.is_floating_point():
        targets = F.one_hot(targets.long(), len(target_mean_C))
    targets_NC = targets.to(rotated_ND) - target_mean_C
    weights_N = rotated_ND.new_ones(len(rotated_ND)) if weights_N is None else weights_N.to(rotated_ND)
    constant = 1 / spectrum.weight if spectrum.fit_intercept else 0.0
    for value in grid:
        inverse_D1 = inverse(spectrum, value)
        residual_NC = targets_NC - rotated_ND @ (spectrum.projections_DC * inverse_D1)
        left_N = 1 - weights_N * (constant + rotated_ND.square() @ inverse_D1[:, 0])
        left_N = left_N.where(left_N > ROUNDING * len(inverse_D1), 0.0)
        yield (residual_NC / left_N[:, None]).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def inverse(spectrum: Spectrum, regularization: float | Tensor) -> Tensor:
    r""":math:`1 / (e + \lambda)` as [D, 1], or [D, C] with one lambda per target; 0 where the sum is rounding noise.

    With lambda = 0 this is the pseudo-inverse, which gives the solution of smallest norm.
    """
    e_D1 = spectrum.eigenvalues_D[:, None]
    denominator = e_D1 + torch.as_tensor(regularization, dtype=e_D1.dtype, device=e_D1.device)
    return (1 / denominator).where(denominator > spectrum.noise, 0.0)


def numerical_rank(spectrum: Spectrum) -> int:
    """Directions that the rows have; N rows span at most N, and about their mean one less."""
    resolved = int((spectrum.eigenvalues_D > spectrum.noise).sum())
    return min(resolved, spectrum.rows - int(spectrum.fit_intercept))


def origin(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """What features and targets are measured from: their means, or zero without an intercept."""
    if spectrum.fit_intercept:
        return spectrum.mean_D, spectrum.target_mean_C
    return torch.zeros_like(spectrum.mean_D), torch.zeros_like(spectrum.target_mean_C)
