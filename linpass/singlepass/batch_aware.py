"""The printed formula of "batch-aware" kernel ridge regression, in its dual and its primal form."""

import torch
from torch import Tensor

from linpass.errors import InputError
from linpass.singlepass.descent import check_count, check_rates
from linpass.singlepass.solver import RidgeSolution, check_nonnegative, check_rows, solution_from
from linpass.singlepass.statistics import RidgeStatistics


def compute_batch_aware_solution(
    K: Tensor, y: Tensor, num_epochs: float, batch_size: int, learning_rate: float, lambda_reg: float
) -> Tensor:
    r"""The printed formula of "batch-aware" kernel ridge regression, as printed.

    .. math::  c = \lfloor n / B \rfloor\, \eta\, E, \qquad \alpha = \big((K + \lambda I)\, c + \lambda I\big)^{-1} y

    What it is: identically :math:`\frac{1}{c} \big(K + \lambda (1 + \frac{1}{c}) I\big)^{-1} y`, kernel ridge
    regression with a slightly larger lambda whose output is then divided by c. So more epochs mostly shrink the
    predictions towards zero instead of fitting closer, and with fewer rows than a batch c is 0 and
    :math:`\alpha = y / \lambda`, whatever the kernel. It is not what training for E epochs gives: that is
    :func:`gradient_descent`, or exactly :class:`SGDMap`.

    Args:
        K: kernel matrix [n, n], symmetric. y: targets [n] or [n, C].
    Returns: alpha, shaped like y, float64; predictions are k(x, rows) alpha.
    Raises:
        InputError: K not square, symmetric and finite, y of another length, lambda < 0, or a singular system, such as
            lambda = 0 with fewer rows than a batch.
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or not len(K):
        raise InputError(f"K has shape {list(K.shape)}: must be square, one row and column per row of the data")
    if y.ndim not in (1, 2) or len(y) != len(K):
        raise InputError(f"y has shape {list(y.shape)}: must have the {len(K)} rows of K")
    kernel_NN, targets = K.double(), y.double()
    if not kernel_NN.isfinite().all() or not targets.isfinite().all():
        raise InputError("K and y must be finite")
    # Rounding of the dtype that the kernel was computed in.
    rounding = torch.finfo(K.dtype).eps ** 0.5 if K.is_floating_point() else 0.0
    if (kernel_NN - kernel_NN.T).abs().max() > rounding * kernel_NN.abs().max():
        raise InputError("K must be symmetric: K[i, j] = K[j, i]")
    c = _visits(len(K), num_epochs, batch_size, learning_rate, lambda_reg)
    identity_NN = torch.eye(len(K), dtype=torch.float64, device=K.device)
    system_NN = (kernel_NN + lambda_reg * identity_NN) * c + lambda_reg * identity_NN
    alpha, info = torch.linalg.solve_ex(system_NN, targets)
    if info or not alpha.isfinite().all():
        raise InputError(f"lambda_reg={lambda_reg} leaves a singular system: use a larger one")
    return alpha


def batch_aware(
    statistics: RidgeStatistics,
    num_epochs: float,
    batch_size: int,
    learning_rate: float,
    lambda_reg: float,
    fit_intercept: bool = True,
) -> RidgeSolution:
    r"""The head of :func:`compute_batch_aware_solution` for the linear kernel, from moments.

    .. math::  W^\top = X^\top \alpha = \big(c\, S + \lambda (1 + c) I\big)^{-1} S_{xy}

    With an intercept X and y are centred first, and the bias is free.
    """
    check_rows(statistics)
    c = _visits(statistics.rows, num_epochs, batch_size, learning_rate, lambda_reg)
    spectrum = statistics.spectrum(fit_intercept)
    if not lambda_reg > 0:
        raise InputError(f"lambda_reg={lambda_reg} must be above 0")
    filter_D1 = 1 / (c * spectrum.eigenvalues_D[:, None] + lambda_reg * (1 + c))
    return solution_from(spectrum, spectrum.projections_DC * filter_D1, lambda_reg, "batch_aware")


def _visits(rows: int, num_epochs: float, batch_size: int, learning_rate: float, lambda_reg: float) -> float:
    """The c of the formula: full batches in all epochs, times the learning rate."""
    check_nonnegative("num_epochs", num_epochs)
    check_count("batch_size", batch_size)
    check_rates(learning_rate, 0.0)
    check_nonnegative("lambda_reg", lambda_reg)
    return rows // batch_size * learning_rate * num_epochs
