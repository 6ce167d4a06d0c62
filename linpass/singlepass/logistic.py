"""Logistic regression in a few looks at the features, by the eigendecomposition that ridge regression has made.

:func:`choose_logistic` is the default head of classification; its moments are streamed, its features are kept or read
again.

Shapes: N rows, D features, C classes; A = D + 1, the bias in column 0. Softmax everywhere, of two classes too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linpass.errors import InputError
from linpass.singlepass.classification import check_labels, fit_temperature, log_loss
from linpass.singlepass.criteria import origin
from linpass.singlepass.solver import RidgeSolution, check_nonnegative
from linpass.singlepass.statistics import Spectrum

# Penalties to choose from, in units of the mean squared norm of a centred row. Under the Gaussian prior of the weights
# that a penalty stands for, the variance of a row's logit is 1 / this: standard deviations from 0.3, hardly an opinion,
# to 6, certainty; whatever the number of rows and the unit of the features.
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
# One fold in so many is held out, fold after fold until about so many rows were.
FOLDS, ENOUGH_ROWS = 5, 2000
# Fewer rows than this cannot choose: their held-out loss says more about the draw than about the penalty.
FEW_ROWS, FEW_ROWS_PENALTY = 200, 0.3
# A look that lowers the objective by less than so many nats per row is the last; penalties are compared coarsely.
COARSE, FINE = 1e-3, 1e-4
COARSE_PASSES, FINE_PASSES = 12, 20
# Rows whose features stay in a CPU's cache between the two products of a look.
CHUNK_ROWS = 1024
# L-BFGS: steps remembered, sufficient decrease, shortest step tried (Nocedal and Wright 2006, section 7.2).
MEMORY, SUFFICIENT, SHORTEST = 10, 1e-4, 1e-6


def choose_logistic(
    features_ND: Tensor,
    labels_N: Tensor,
    spectrum: Spectrum,
    weights_N: Tensor | None = None,
    *,
    grid: Sequence[float] | None = None,
    calibrate: bool = True,
) -> RidgeSolution:
    r"""Logistic regression with a penalty chosen on held-out rows, and probabilities calibrated on them.

    On each held-out fold the penalties are tried from strong to weak, each starting where the last one ended. The one
    with the least held-out loss *at its own best temperature* wins; then all rows are fitted with it, and the head is
    divided by that temperature. Without temperatures, few rows choose too weak a penalty, for its confident logits.

    Args: as :func:`logistic_regression`.
        calibrate: divide the head by the temperature.
        grid: penalties; None: PENALTIES times tr(S) / N, and below FEW_ROWS rows no choice and no temperature.

    Returns: a head whose ``criterion`` is the calibrated held-out loss of each penalty tried, nats per row. Where one
        fold is enough, no penalty is tried after the first whose loss rose.
    Raises:
        InputError: as :func:`logistic_regression`; an empty grid; fewer than two rows.
    Cost: at most 12 looks per penalty at the other folds (five times below 2,000 rows, once from 10,000 on) and 20 at
        all rows, O(N D C) each; memory: a copy of the rows that are not held out.
    Invariants: another unit of the features, or of all weights, changes no prediction.
    """
    unit = spectrum.eigenvalues_D.sum().item() / spectrum.rows or 1.0
    penalties = sorted(grid, reverse=True) if grid is not None else [unit * factor for factor in PENALTIES]
    _check(features_ND, labels_N, spectrum, penalties[-1] if penalties else unit, weights_N)
    if weights_N is not None and not weights_N.all():  # rows that weigh nothing are as if they were not there
        kept_N = weights_N.nonzero()[:, 0]
        features_ND, labels_N, weights_N = (part[kept_N.to(part.device)] for part in (features_ND, labels_N, weights_N))
    rows = len(labels_N)
    if not penalties or rows < 2:
        raise InputError(f"grid of {len(penalties)} penalties, {rows} rows: need at least 1 penalty and 2 rows")

    if grid is None and rows < FEW_ROWS:
        return _fit(features_ND, labels_N, spectrum, unit * FEW_ROWS_PENALTY, weights_N)

    fold_N = stratified_folds(labels_N, min(FOLDS, rows))
    tested = min(max(round(ENOUGH_ROWS * FOLDS / rows), 1), FOLDS)
    logits, solutions = [], []
    for fold in range(tested):
        held_N = fold_N == fold
        if held_N.any() and not held_N.all():
            held = (features_ND[held_N], labels_N[held_N], None if weights_N is None else weights_N[held_N])
            rest = (features_ND[~held_N], labels_N[~held_N], None if weights_N is None else weights_N[~held_N])
            path = _path(rest, held, spectrum, penalties, stop_early=tested == 1)
            solutions = solutions or path
            logits.append([solution.predict(held[0]) for solution in path])
    if not logits:  # no fold leaves rows on both sides
        return logistic_regression(features_ND, labels_N, spectrum, penalties[0], weights_N)
    held_N = torch.cat([(fold_N == fold).nonzero()[:, 0] for fold in range(tested)])
    weights = None if weights_N is None else weights_N[held_N]
    calibrated = [_calibrated(torch.cat(parts), labels_N[held_N], weights) for parts in zip(*logits, strict=True)]
    losses = [loss for _, loss in calibrated]
    best = losses.index(min(losses))
    head = _fit(features_ND, labels_N, spectrum, penalties[best], weights_N, solutions[best])
    temperature = calibrated[best][0] if calibrate else 1.0
    criterion = dict(zip(penalties, losses, strict=False))
    return RidgeSolution(
        head.weight_CD / temperature, head.bias_C / temperature, penalties[best], criterion, "logistic"
    )


def _path(rest: tuple, held: tuple, spectrum: Spectrum, penalties: list[float], stop_early: bool) -> list:
    """A head per penalty, fitted to the rest; early: up to the first whose loss on the held-out rows rose."""
    solutions: list[RidgeSolution] = []
    least = math.inf
    for penalty in penalties:
        initial = solutions[-1] if solutions else None
        features_ND, labels_N, weights_N = rest
        solutions.append(
            _fit(features_ND, labels_N, spectrum, penalty, weights_N, initial, passes=COARSE_PASSES, tolerance=COARSE)
        )
        if stop_early:
            loss = _calibrated(solutions[-1].predict(held[0]), *held[1:])[1]
            if loss > least:
                break
            least = loss
    return solutions


def _calibrated(logits_NC: Tensor, labels_N: Tensor, weights_N: Tensor | None) -> tuple[float, float]:
    """The best temperature, and the loss with it."""
    temperature = fit_temperature(logits_NC, labels_N, weights_N)
    return temperature, log_loss(logits_NC / temperature, labels_N, weights_N)


def stratified_folds(labels_N: Tensor, folds: int) -> Tensor:
    """Fold numbers [N]: the rows of a class go round the folds in their order, each class from another fold on."""
    order_N = labels_N.argsort(stable=True)
    counts = labels_N.bincount()
    first_N = (counts.cumsum(0) - counts)[labels_N[order_N]]
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(labels_N), device=labels_N.device) - first_N
    return (rank_N + labels_N) % folds


def logistic_regression(
    features_ND: Tensor,
    labels_N: Tensor,
    spectrum: Spectrum,
    regularization: float,
    weights_N: Tensor | None = None,
    *,
    initial: RidgeSolution | None = None,
    passes: int = FINE_PASSES,
    tolerance: float = FINE,
) -> RidgeSolution:
    r"""The head that minimises cross-entropy plus a penalty, in few looks at the features.

    .. math::  \min_{W, b} \sum_i s_i \big(-\log \mathrm{softmax}(W x_i + b)_{y_i}\big) + \frac{\lambda}{2} \|W\|^2

    L-BFGS whose initial inverse Hessian is, for class c, that of a ridge regression in the eigenvectors of S:

    .. math::  V \operatorname{diag}\frac{1}{e\,\kappa_c + \lambda} V^\top, \qquad
        \kappa_c = \frac{\sum s_i\, p_{ic} (1 - p_{ic})}{\sum s_i}

    The fixed curvature bound of Boehning 1992 (section 2: 1/2 in the place of kappa) needs no line search but takes
    more looks; with kappa the objective still never rises, since a step is halved until it falls enough.

    Args:
        features_ND: any floating dtype; float64 is used as it is, others in float32, CHUNK_ROWS rows at a time.
        spectrum: of these rows or of rows like them; it sets the steps and the origin of the features, not the optimum.
        regularization: lambda, as 1 / C of scikit-learn for three or more classes; for two, 2 / C gives the same
            probabilities.
        weights_N: sample weights s.
        initial: where to start; None is zero weights and the logarithm of the class frequencies.
        passes: the most looks at the features.
        tolerance: stop after a look that lowers the objective by less, nats per row; 0 goes on until nothing is gained.

    Raises:
        InputError: lambda not above 0, labels out of range, features or weights that are not finite or of other shapes.
    Cost: O(N D C + D^2 C) per look; memory O(D^2 + D C) and a chunk.
    Invariants: at convergence equal to scikit-learn's LogisticRegression; the objective never rises.
    """
    _check(features_ND, labels_N, spectrum, regularization, weights_N)
    return _fit(features_ND, labels_N, spectrum, regularization, weights_N, initial, passes, tolerance)


def _fit(
    features_ND: Tensor,
    labels_N: Tensor,
    spectrum: Spectrum,
    regularization: float,
    weights_N: Tensor | None,
    initial: RidgeSolution | None = None,
    passes: int = FINE_PASSES,
    tolerance: float = FINE,
) -> RidgeSolution:
    """:func:`logistic_regression` of rows that were checked."""
    objective = Objective(features_ND, labels_N, spectrum, regularization, weights_N)
    parameter_CA = objective.minimum(objective.start(initial), passes, tolerance).double()
    weight_CD = parameter_CA[:, 1:].contiguous()
    bias_C = parameter_CA[:, 0] - weight_CD @ origin(spectrum)[0]
    return RidgeSolution(weight_CD, bias_C, regularization, None, "logistic")


@dataclass
class Point:
    """Parameters, and what one look at the features says of them."""

    parameter_CA: Tensor
    value: float
    gradient_CA: Tensor
    curvature_C: Tensor


class Objective:
    """Penalised cross-entropy of features measured from their mean."""

    def __init__(self, features_ND, labels_N, spectrum: Spectrum, regularization: float, weights_N):
        self.features_ND, self.labels_N, self.weights_N = features_ND, labels_N.long(), weights_N
        self.regularization, self.fit_intercept = regularization, spectrum.fit_intercept
        self.dtype = torch.promote_types(features_ND.dtype, torch.float32)
        device = features_ND.device
        self.mean_D = origin(spectrum)[0].to(device, self.dtype)
        self.vectors_DD = spectrum.vectors_DD.to(device, self.dtype)
        self.total = float(len(labels_N)) if weights_N is None else weights_N.double().sum().item()
        # The spectrum may be of more rows than these, or of other weights: its eigenvalues as of these.
        self.eigenvalues_D = spectrum.eigenvalues_D.to(device, self.dtype) * (self.total / spectrum.weight)
        self.num_labels = len(spectrum.target_mean_C)

    def start(self, initial: RidgeSolution | None) -> Tensor:
        if initial is None:
            parameter_CA = self.mean_D.new_zeros(self.num_labels, len(self.mean_D) + 1)
            if self.fit_intercept:
                count_C = self.labels_N.bincount(minlength=self.num_labels) + 1.0  # finite for a class without rows
                parameter_CA[:, 0] = (count_C / count_C.sum()).log()
            return parameter_CA
        weight_CD = initial.weight_CD.to(self.mean_D)
        bias_C = initial.bias_C.to(self.mean_D) + weight_CD @ self.mean_D
        return torch.cat([bias_C[:, None], weight_CD], 1)

    def look(self, parameter_CA: Tensor) -> Point:
        """One look at all features."""
        bias_C, weight_CD = parameter_CA[:, 0], parameter_CA[:, 1:].contiguous()
        value = 0.5 * self.regularization * weight_CD.double().square().sum()
        gradient_CA = torch.cat([torch.zeros_like(bias_C)[:, None], self.regularization * weight_CD], 1)
        curvature_C = torch.zeros_like(bias_C)
        for start in range(0, len(self.labels_N), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            rows_ND = self.features_ND[part].to(self.dtype) - self.mean_D
            logits_NC, labels_N1 = torch.addmm(bias_C, rows_ND, weight_CD.T), self.labels_N[part, None]
            # Two classes make narrow products, for which log_softmax is slower than these few operations.
            normalizer_N1 = logits_NC.logsumexp(1, keepdim=True)
            loss_N1 = normalizer_N1 - logits_NC.gather(1, labels_N1)
            error_NC = logits_NC.sub_(normalizer_N1).exp_()
            variance_NC = error_NC - error_NC.square()
            error_NC.scatter_add_(1, labels_N1, -torch.ones_like(loss_N1))
            if self.weights_N is not None:
                weight_N1 = self.weights_N[part, None].to(error_NC)
                loss_N1, error_NC, variance_NC = (weight_N1 * each for each in (loss_N1, error_NC, variance_NC))
            value += loss_N1.double().sum()
            curvature_C += variance_NC.sum(0)
            gradient_CA[:, 0] += error_NC.sum(0)
            gradient_CA[:, 1:].addmm_(error_NC.T, rows_ND)
        if not self.fit_intercept:
            gradient_CA[:, 0] = 0
        return Point(parameter_CA, value.item(), gradient_CA, curvature_C / self.total)

    def minimum(self, parameter_CA: Tensor, passes: int, tolerance: float) -> Tensor:
        """L-BFGS from here."""
        point = self.look(parameter_CA)
        # A class that is nearly never or always predicted still gets steps of finite length.
        curvature_C1 = point.curvature_C[:, None].clamp(min=1e-4)
        inverse_CA = torch.cat(
            [1 / (self.total * curvature_C1), 1 / (curvature_C1 * self.eigenvalues_D + self.regularization)], 1
        )
        steps: list[tuple[Tensor, Tensor]] = []
        looks = 1
        while looks < passes:
            direction_CA = self._direction(point.gradient_CA, steps, inverse_CA)
            slope, length, found = (point.gradient_CA * direction_CA).sum().item(), 1.0, None
            while looks < passes and length >= SHORTEST and slope < 0:
                tried = self.look(point.parameter_CA + length * direction_CA)
                looks += 1
                if tried.value <= point.value + SUFFICIENT * length * slope:
                    found = tried
                    break
                # Where the parabola through both values and the slope has its minimum, neither far nor near.
                rise = tried.value - point.value - length * slope
                length *= min(max(-slope * length / (2 * rise), 0.1), 0.5)
            if found is None:
                break
            change_CA, turn_CA = found.parameter_CA - point.parameter_CA, found.gradient_CA - point.gradient_CA
            if (change_CA * turn_CA).sum() > 0:
                steps = [*steps[1 - MEMORY :], (change_CA, turn_CA)]
            gain, point = point.value - found.value, found
            if gain <= tolerance * self.total:
                break
        return point.parameter_CA

    def _direction(self, gradient_CA: Tensor, steps: list[tuple[Tensor, Tensor]], inverse_CA: Tensor) -> Tensor:
        """Minus the gradient, times the inverse Hessian that the last steps have shown (two-loop recursion)."""
        result_CA, factors = -gradient_CA, []
        for change_CA, turn_CA in reversed(steps):
            factors.append((change_CA * result_CA).sum() / (change_CA * turn_CA).sum())
            result_CA = result_CA - factors[-1] * turn_CA
        result_CA = self._preconditioned(result_CA, inverse_CA)
        if steps:
            change_CA, turn_CA = steps[-1]
            result_CA *= (change_CA * turn_CA).sum() / (turn_CA * self._preconditioned(turn_CA, inverse_CA)).sum()
        for (change_CA, turn_CA), factor in zip(steps, reversed(factors), strict=True):
            rest = factor - (turn_CA * result_CA).sum() / (change_CA * turn_CA).sum()
            result_CA = result_CA + rest * change_CA
        return result_CA

    def _preconditioned(self, gradient_CA: Tensor, inverse_CA: Tensor) -> Tensor:
        rotated_CD = gradient_CA[:, 1:] @ self.vectors_DD * inverse_CA[:, 1:]
        return torch.cat([gradient_CA[:, :1] * inverse_CA[:, :1], rotated_CD @ self.vectors_DD.T], 1)


def _check(features_ND: Tensor, labels_N: Tensor, spectrum: Spectrum, regularization: float, weights_N) -> None:
    check_nonnegative("regularization", regularization)
    if not regularization > 0:
        raise InputError("regularization=0: separable classes have no optimum without a penalty; it must be above 0")
    if features_ND.shape[1:] != spectrum.mean_D.shape:
        raise InputError(f"features have shape {list(features_ND.shape)}: must be [rows, {len(spectrum.mean_D)}]")
    check_labels(features_ND, labels_N, len(spectrum.target_mean_C))
    if weights_N is not None:
        if weights_N.shape != labels_N.shape:
            raise InputError(f"weights have shape {list(weights_N.shape)}: must be {list(labels_N.shape)}")
        check_nonnegative("weights", weights_N)
