"""Classes from squared error: the discriminant in the ridge's moments, and probabilities that mean what they say.

Squared error on one-hot targets needs no second look at the features, but of many classes some hide behind others, and
its outputs are not probabilities. The discriminant repairs part of the first from the same moments, a temperature the
second; :mod:`linpass.singlepass.logistic` repairs both.

Shapes: N rows, D features, C classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from linpass.errors import InputError
from linpass.singlepass.criteria import inverse
from linpass.singlepass.solver import RidgeSolution, check_nonnegative, check_rows
from linpass.singlepass.statistics import RidgeStatistics

# Temperatures outside would make probabilities of 0 and 1, or all equal, in float32.
COLDEST, HOTTEST = 1e-4, 1e4


def discriminant(statistics: RidgeStatistics, regularization: float) -> RidgeSolution:
    r"""Linear discriminant analysis, log-probabilities up to a constant per row, from the moments alone.

    .. math::  W = n (S_w + \lambda I)^{-1} M^\top, \quad
        b_c = \log\frac{n_c}{n} - w_c^\top \Big(\mu + \frac{m_c}{2}\Big)

    of n rows (by weight), with class means mu + m_c and the scatter S_w within classes. One-hot targets have
    S_xy = M^T diag(n_c), and S_w is S less C terms of rank one, so this is the ridge solution times a C x C matrix
    (Woodbury). Source: Hastie, Buja and Tibshirani 1995, section 3 (penalized discriminant analysis).

    Args:
        statistics: with class ids or one-hot targets. A class without rows is never predicted.
        regularization: lambda, added to the *sum* of squares within classes.

    Raises:
        InputError: no rows, a negative lambda.
    Cost: one eigendecomposition, O(D^3 + D^2 C + C^3).
    Invariants: equal to scikit-learn's LinearDiscriminantAnalysis(solver="lsqr").
    """
    check_rows(statistics)
    check_nonnegative("regularization", regularization)
    spectrum, weight = statistics.spectrum(), statistics.weight
    count_C = weight * statistics.target_mean_C
    ridge_DC = spectrum.vectors_DD @ (spectrum.projections_DC * inverse(spectrum, regularization))
    within_CC = count_C.diag() - statistics.cross_DC.T @ ridge_DC
    weight_CD = weight * (ridge_DC @ torch.linalg.pinv(within_CC, hermitian=True)).T
    seen_C = count_C > 0
    mean_CD = statistics.cross_DC.T / count_C.where(seen_C, 1.0)[:, None]
    bias_C = (count_C / weight).log() - (weight_CD * (statistics.mean_D + mean_CD / 2)).sum(1)
    never = torch.finfo(torch.float32).min  # finite also in a float32 layer
    return RidgeSolution(weight_CD, bias_C.where(seen_C, never), regularization, None, "discriminant")


def fit_temperature(logits_NC: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> float:
    r"""T > 0 with the least log loss of softmax(logits / T): one number, which changes no prediction.

    The loss is convex in beta = 1 / T, so its derivative has one root: Newton steps in log beta, bisection where they
    leave the bracket. Take rows that the logits were not fitted to. Source: Guo et al. 2017, section 4.2.

    Returns: between COLDEST and HOTTEST; towards an end, as far as float64 tells, where the logits tell all or nothing.
    Raises:
        InputError: no rows, other shapes, labels out of range, values that are not finite.
    Invariants: logits times c have c times the temperature.
    """
    check_labels(logits_NC, labels_N, logits_NC.shape[1])
    # Against the logit of the row's own class, so that the derivative is a mean of p d without cancellation.
    difference_NC = logits_NC.double() - logits_NC.double().gather(1, labels_N.long()[:, None])
    weights_N = difference_NC.new_ones(len(labels_N)) if weights_N is None else weights_N.double()
    low, high, current = math.log(1 / HOTTEST), math.log(1 / COLDEST), 0.0
    scale = difference_NC.abs().max().item() or 1.0
    current = min(max(-math.log(scale / 10), low), high)
    while high - low > 1e-6:
        beta = math.exp(current)
        probability_NC = (beta * difference_NC).softmax(1)
        mean_N = (probability_NC * difference_NC).sum(1)
        variance_N = (probability_NC * difference_NC.square()).sum(1) - mean_N.square()
        slope, bend = ((weights_N * each_N).sum().item() for each_N in (mean_N, variance_N))
        low, high = (low, current) if slope > 0 else (current, high)
        # In log beta the second derivative is beta^2 bend + beta slope; without the second term where it is negative.
        step = -slope / max(beta * bend + max(slope, 0.0), 1e-300)
        if abs(step) < 1e-6:
            break
        current = current + step if low < current + step < high else (low + high) / 2
    return math.exp(-current)


def log_loss(logits_NC: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> float:
    """Mean negative log-probability of the labels, nats per row."""
    loss_N = F.cross_entropy(logits_NC.double(), labels_N.long(), reduction="none")
    return (
        loss_N.mean().item()
        if weights_N is None
        else torch.sum(loss_N * weights_N.double() / weights_N.double().sum()).item()
    )


def expected_calibration_error(probabilities_NC: Tensor, labels_N: Tensor, bins: int = 15) -> float:
    r"""How far the confidence in the predicted class is from how often it is right, mean over rows, from 0 to 1.

    .. math::  \sum_b \frac{n_b}{N}\, \big|\mathrm{acc}_b - \mathrm{conf}_b\big|

    over bins of equal width (b - 1, b] / bins. Source: Guo et al. 2017, equation 3.

    Raises:
        InputError: as :func:`fit_temperature`; fewer than one bin.
    """
    check_labels(probabilities_NC, labels_N, probabilities_NC.shape[1])
    if bins < 1:
        raise InputError(f"bins={bins} must be at least 1")
    confidence_N, predicted_N = probabilities_NC.double().max(1)
    bin_N = ((confidence_N * bins).ceil().long() - 1).clamp(0, bins - 1)
    excess_N = confidence_N - (predicted_N == labels_N).double()
    return excess_N.new_zeros(bins).index_add_(0, bin_N, excess_N).abs().sum().item() / len(labels_N)


def check_labels(values: Tensor, labels_N: Tensor, num_labels: int) -> None:
    """Values, one row per label, and labels that are class ids."""
    if labels_N.is_floating_point() or labels_N.shape != values.shape[:1] or not len(labels_N):
        kind = f"{labels_N.dtype} {list(labels_N.shape)}"
        raise InputError(f"labels: {kind} must be class ids, one for each of {len(values)} rows, at least one")
    # A row with nan or infinity has no finite sum; looking at every value would take longer than a product.
    wide = torch.promote_types(values.dtype, torch.float32)
    wrong_N = ~values.sum(1, dtype=wide).isfinite() | (labels_N < 0) | (labels_N >= num_labels)
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0])
        raise InputError(f"row {row}: must be finite, and its label {labels_N[row].item()} from 0 to {num_labels - 1}")
