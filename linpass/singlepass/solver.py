"""Ridge regression from streamed moments: the solution, and the choice of its regularisation.

Nothing here sees a row: the moments of :mod:`linpass.singlepass.statistics` are all that is needed, except for
:func:`leave_one_out`, which looks at the features a second time. All mathematics is float64.

Shapes: N rows, D features, C targets, L values of the regularisation (a grid). s is a row's weight, mu and ybar are
weighted means, S = sum s (x - mu)(x - mu)^T is the scatter with eigenvalues e and eigenvectors V, and
q = V^T sum s (x - mu)(y - ybar)^T. Without an intercept, mu and ybar are zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linpass.errors import InputError
from linpass.singlepass.criteria import gcv_scores, inverse, kfold_scores, leave_one_out_errors, origin
from linpass.singlepass.statistics import GroupedStatistics, RidgeStatistics, Spectrum

# The grid in units of the mean eigenvalue: from far below what a float32 Gram matrix resolves ...
SMALLEST = 1e-9
# ... to, times D, a hundred times the sum of all eigenvalues, where nothing but the intercept is left.
LARGEST = 100.0
# Rows of the second look at a time, so that memory does not grow with N.
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class RidgeSolution:
    """The head y = W x + b, and how it was chosen.

    ``weight_CD`` and ``bias_C`` (zeros without an intercept) are float64 and fit an ``nn.Linear``. ``regularization``
    is lambda, one number or one per target; ``criterion`` maps each lambda of the grid to its score, the squared error
    per row that it predicts, summed over targets, or is None where nothing was chosen.
    """

    weight_CD: Tensor
    bias_C: Tensor
    regularization: float | Tensor
    criterion: dict[float, float] | None
    method: str

    def predict(self, features_ND: Tensor) -> Tensor:
        """[N, C] in float64."""
        return features_ND.to(self.weight_CD) @ self.weight_CD.T + self.bias_C


def solve_ridge(
    statistics: RidgeStatistics | GroupedStatistics,
    regularization: float | Tensor | str = "gcv",
    *,
    fit_intercept: bool = True,
    grid: Sequence[float] | Tensor | None = None,
    per_target: bool = False,
    floor: float | None = None,
) -> RidgeSolution:
    r"""The weights that minimise squared error plus :math:`\lambda` times their squared norm; the bias is free.

    .. math::  W^\top = (S + \lambda I)^{-1} S_{xy} = V\, \frac{q}{e + \lambda}, \qquad b = \bar y - W \mu

    :math:`\lambda` is added to the *sum* of squares, as scikit-learn's ``Ridge(alpha)``: twice the rows, or twice the
    weights, need twice the :math:`\lambda`. Source: Hoerl and Kennard 1970; Golub, Heath and Wahba 1979 for "gcv".

    Args:
        regularization: a number, a tensor [C] with one per target, or how to choose from the grid:
            "gcv": generalized cross-validation, from the one eigendecomposition (:func:`gcv_scores`);
            "kfold": exact squared error on held-out groups of a ``GroupedStatistics`` (:func:`kfold_scores`).
        grid: values to choose from; None is :func:`default_grid`.
        per_target: choose one per target instead of one for their sum.
        floor: smallest value that may be chosen, in units of the mean squared norm of a centred row,
            :math:`\operatorname{tr}(S) / N`: about 1 per unit for rows of unit norm. None: :func:`few_shot_floor`
            with the default grid, and 0 with a grid of one's own. A regularization that is given is never raised.

    Returns: with 0 and dependent features, the solution of smallest norm. A constant target gives zero weights.
    Raises:
        InputError: no rows, a negative or nan regularization, an empty grid, "kfold" without two groups of rows.
    Cost: O(D^3 + D^2 C + L D C) time, once per fold more with "kfold"; memory O(D^2 + D C).
    Invariants: equal to scikit-learn's Ridge; scaling features by c and lambda by c^2 changes no prediction.
    """
    total = statistics.total() if isinstance(statistics, GroupedStatistics) else statistics
    check_rows(total)
    check_nonnegative("floor", 0.0 if floor is None else floor)
    if not isinstance(regularization, str):
        check_lambda(regularization, total.num_targets)
        return _solution(total.spectrum(fit_intercept), regularization, None, "fixed")
    if regularization == "kfold" and not isinstance(statistics, GroupedStatistics):
        raise InputError("regularization='kfold' needs a GroupedStatistics with one group of rows per fold")
    if regularization not in ("gcv", "kfold"):
        raise InputError(f"regularization={regularization!r} must be a number, one per target, 'gcv' or 'kfold'")

    spectrum = total.spectrum(fit_intercept)
    grid_L = candidates(spectrum, grid, floor)
    if regularization == "gcv":
        scores_LC = gcv_scores(spectrum, grid_L)
    else:
        assert isinstance(statistics, GroupedStatistics)
        scores_LC = kfold_scores(statistics, grid_L, fit_intercept)
    return choose(spectrum, grid_L, scores_LC, per_target, regularization)


def default_grid(spectrum: Spectrum, points: int = 40) -> Tensor:
    r"""Values from :math:`10^{-9}` to :math:`100 D` times the mean eigenvalue, equally far apart in the logarithm.

    Relative to the mean eigenvalue because :math:`\lambda` has the unit of the eigenvalues: features, rows or weights
    in another unit choose the same solution. The upper end is a hundred times the trace, so at least that of the
    largest eigenvalue: less than 1 % of the fit to pure noise is left. At the lower end all directions down to a
    condition number of about 30,000 of the features are fitted as by least squares. 40 points lie a factor of 2.3 apart
    for 400 features; near its minimum the squared error changes with the square of the step in log lambda.
    """
    trace = spectrum.eigenvalues_D.sum().item()
    unit = trace / len(spectrum.eigenvalues_D) or 1.0
    largest = LARGEST * len(spectrum.eigenvalues_D)
    exponents = torch.linspace(math.log10(SMALLEST), math.log10(largest), points, dtype=torch.float64)
    return unit * 10.0**exponents


def few_shot_floor(spectrum: Spectrum) -> float:
    r"""Smallest factor of :math:`\operatorname{tr}(S)/N` worth choosing: 1 with no more rows than features, else 0.

    With N <= D the features can interpolate any target, and generalized cross-validation compares what is left of
    the error with what is left of the degrees of freedom: two numbers near zero, whose ratio now and then is lowest at
    no regularization at all, with several times the error. The price is more shrinkage than is best where few rows
    already separate the classes well. Above N = D the criterion is reliable, and a floor would only bias it.
    """
    return 1.0 if spectrum.rows <= len(spectrum.eigenvalues_D) else 0.0


def candidates(spectrum: Spectrum, grid: Sequence[float] | Tensor | None, floor: float | None) -> Tensor:
    """The ascending values [L] to choose from; those below the floor are replaced by the floor."""
    if grid is None:
        grid_L, factor = default_grid(spectrum), few_shot_floor(spectrum) if floor is None else floor
    else:
        grid_L, factor = torch.as_tensor(grid, dtype=torch.float64).flatten().cpu(), floor or 0.0
    if not len(grid_L):
        raise InputError("grid is empty: it must hold at least one regularization to choose from")
    check_nonnegative("grid", grid_L)
    return grid_L.clamp(min=factor * spectrum.eigenvalues_D.sum().item() / spectrum.rows).unique()


def leave_one_out(
    statistics: RidgeStatistics,
    features_ND: Tensor,
    targets: Tensor,
    weights_N: Tensor | None = None,
    *,
    grid: Sequence[float] | Tensor | None = None,
    fit_intercept: bool = True,
    per_target: bool = False,
    floor: float | None = None,
) -> RidgeSolution:
    """The ridge solution whose lambda has the least exact leave-one-out error, as scikit-learn's ``RidgeCV(cv=None)``.

    A second look: the rows must be the ones that the statistics have seen, in any order, with the same weights.
    Its criterion is the weighted sum of squared errors over N. Targets, grid and floor as in :func:`solve_ridge`.
    Cost: O(N D^2 + L N D C); memory O(D^2 + D C) and CHUNK_ROWS rows.
    """
    check_rows(statistics)
    seen = (statistics.rows, statistics.num_features)
    if features_ND.shape != seen:
        raise InputError(f"features have shape {list(features_ND.shape)}: must be the rows seen before, {list(seen)}")
    for field, values in (("targets", targets), ("weights", weights_N)):
        if values is not None and len(values) != statistics.rows:
            raise InputError(f"{field} have {len(values)} rows: must be {statistics.rows}, one per row of the features")
    spectrum = statistics.spectrum(fit_intercept)
    grid_L = candidates(spectrum, grid, floor)
    scores_LC = spectrum.projections_DC.new_zeros(len(grid_L), spectrum.projections_DC.shape[1])
    for start in range(0, len(features_ND), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        weights = None if weights_N is None else weights_N[part]
        errors = leave_one_out_errors(spectrum, features_ND[part], targets[part], weights, grid_L.tolist())
        for row, error_NC in enumerate(errors):
            squares_NC = error_NC.square() if weights is None else weights.to(error_NC)[:, None] * error_NC.square()
            scores_LC[row] += squares_NC.sum(0)
    return choose(spectrum, grid_L, scores_LC / statistics.rows, per_target, "loo")


def choose(spectrum: Spectrum, grid_L: Tensor, scores_LC: Tensor, per_target: bool, method: str) -> RidgeSolution:
    """The solution at the lowest score of the targets' sum, or of each; of equal scores the largest lambda's."""
    criterion = dict(zip(grid_L.tolist(), scores_LC.sum(1).tolist(), strict=True))
    descending_LC = (scores_LC if per_target else scores_LC.sum(1, keepdim=True)).flip(0)
    best_C = grid_L.flip(0).to(scores_LC)[descending_LC.argmin(0)]
    return _solution(spectrum, best_C if per_target else best_C.item(), criterion, method)


def solution_from(
    spectrum: Spectrum,
    coefficients_DC: Tensor,
    regularization: float | Tensor,
    method: str,
    criterion: dict[float, float] | None = None,
) -> RidgeSolution:
    """The head with these coefficients in the eigenbasis, and the bias that is best for them."""
    weight_CD = (spectrum.vectors_DD @ coefficients_DC).T.contiguous()
    mean_D, target_mean_C = origin(spectrum)
    bias_C = target_mean_C - weight_CD @ mean_D
    return RidgeSolution(weight_CD, bias_C, regularization, criterion, method)


def _solution(
    spectrum: Spectrum, regularization: float | Tensor, criterion: dict[float, float] | None, method: str
) -> RidgeSolution:
    coefficients_DC = spectrum.projections_DC * inverse(spectrum, regularization)
    return solution_from(spectrum, coefficients_DC, regularization, method, criterion)


def check_rows(statistics: RidgeStatistics) -> None:
    """Raises InputError if there is nothing to fit."""
    if statistics.rows == 0 or not statistics.weight > 0:
        raise InputError(f"rows={statistics.rows} of weight {statistics.weight:g}: a fit needs rows of positive weight")


def check_lambda(regularization: float | Tensor, num_targets: int) -> None:
    """Raises InputError unless it is one non-negative number, or one per target."""
    shape = torch.as_tensor(regularization).shape
    if shape not in ((), (num_targets,)):
        raise InputError(f"regularization has shape {list(shape)}: must be a number, or [{num_targets}]")
    check_nonnegative("regularization", regularization)


def check_nonnegative(field: str, values: float | Tensor) -> None:
    """Raises InputError naming the first value that is negative, infinite or nan."""
    for value in torch.as_tensor(values, dtype=torch.float64).flatten().tolist():
        if not 0 <= value < math.inf:
            raise InputError(f"{field}={value} must be a finite number, 0 or more")
