r"""Kernel ridge regression in its dual form: exact for n up to memory, Nystroem with conjugate gradient beyond.

A kernel is any function k(x_ND, y_MD) -> [N, M]. All mathematics is float64. :math:`\lambda` is added to the *sum* of
squares, as scikit-learn's ``KernelRidge(alpha)``; where a paper writes :math:`\lambda n`, :math:`\lambda` stands here.

Shapes: N rows, M landmarks, D features, C targets, R directions that the landmarks span. s is a row's weight.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linpass.errors import InputError

Kernel = Callable[[Tensor, Tensor], Tensor]

# The grid, in units of the trace of the kernel matrix, which bounds its eigenvalues.
GRID_FROM, GRID_TO, GRID_POINTS = 1e-10, 10.0, 40
# n x n matrices that exist at one time: two for a Cholesky factor; five for eigenvectors and their workspace.
CHOLESKY_COPIES, EIGENVECTOR_COPIES = 2, 5
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class KernelRidgeSolution:
    r"""The function :math:`f(x) = \sum_i k(x, x_i)\,\alpha_i + b`, and how it was found.

    ``dual_NC`` and ``intercept_C`` (zeros without an intercept) are float64; one row of ``dual_NC`` per training row
    (:func:`kernel_ridge`) or per landmark (:func:`nystrom_conjugate_gradient`). ``criterion`` maps each lambda of the
    grid to the squared error per row that it predicts, None where nothing was chosen. ``iterations`` and ``residual``
    (relative, of the worst target) are those of conjugate gradient, 0 for a direct solution.
    """

    dual_NC: Tensor
    intercept_C: Tensor
    regularization: float
    criterion: dict[float, float] | None = None
    iterations: int = 0
    residual: float = 0.0

    def predict(self, kernel_BN: Tensor) -> Tensor:
        """[B, C] in float64, from the kernel between new rows and training rows (or landmarks)."""
        return kernel_BN.to(self.dual_NC) @ self.dual_NC + self.intercept_C


def kernel_ridge(
    kernel: Kernel,
    features_ND: Tensor,
    targets_NC: Tensor,
    regularization: float | str = "gcv",
    *,
    weights_N: Tensor | None = None,
    fit_intercept: bool = True,
    grid: Sequence[float] | Tensor | None = None,
    memory_limit: int | None = None,
) -> KernelRidgeSolution:
    r"""The function that minimises :math:`\sum_i s_i (y_i - f(x_i))^2 + \lambda \|f - b\|_k^2`; the intercept is free.

    .. math::  (K + \lambda\,diag(s)^{-1})\,\alpha + \mathbf{1} b = Y, \qquad \mathbf{1}^\top \alpha = 0

    Without an intercept b = 0 and the second equation falls away. Solved with :math:`\sqrt{s}` on both sides of K, so
    that a weight may be 0. Sources: Saunders, Gammerman and Vovk 1998, "Ridge Regression Learning Algorithm in Dual
    Variables"; with an intercept, Suykens and Vandewalle 1999, "Least Squares Support Vector Machine Classifiers".

    Args:
        regularization: :math:`\lambda`, or how to choose it from the grid, one eigendecomposition for all values:
            "gcv": generalized cross-validation, :math:`N\,RSS / (N - df)^2`;
            "loo": the exact squared error at each row when it is left out, residual / (1 - leverage).
        weights_N: s; None is one each.
        grid: values to choose from; None: GRID_POINTS values, GRID_FROM to GRID_TO times the trace of the matrix.
        memory_limit: bytes that n x n matrices may take; None: what GPU, system or container have left.
    Raises:
        InputError: shapes that do not fit, values that are not finite, a negative regularization or weight; n x n
            matrices over the limit; no or too little regularization for a singular kernel matrix.
    Cost: O(N^2 D + N^3 / 3) time with a number, about 10 N^3 with a choice; 16 and 40 bytes per pair of rows.
    Invariants: equal to scikit-learn's KernelRidge; with a linear kernel equal to Ridge; "loo" equals n fits, each
    without one row; an integer weight is that many rows.
    """
    choose = isinstance(regularization, str)
    if choose and regularization not in ("gcv", "loo"):
        raise InputError(f"regularization={regularization!r} must be a number, 'gcv' or 'loo'")
    weight_N = _checked_weights(features_ND, targets_NC, weights_N)
    candidates = [_checked_regularization(value) for value in ([] if grid is None else grid)]
    if not choose:
        candidates = [_checked_regularization(regularization)]
    _check_memory(len(features_ND), EIGENVECTOR_COPIES if choose else CHOLESKY_COPIES, memory_limit, features_ND.device)

    features_ND, root_N1 = features_ND.double(), weight_N.sqrt()[:, None]
    targets_NC = targets_NC.to(features_ND)
    scaled_NN = kernel(features_ND, features_ND) * root_N1
    scaled_NN *= root_N1.T
    criterion = None
    if choose:
        if grid is None:
            steps = torch.linspace(0, 1, GRID_POINTS, dtype=torch.float64)
            trace = scaled_NN.diagonal().sum().item()
            candidates = (trace * GRID_FROM * (GRID_TO / GRID_FROM) ** steps).tolist()
        criterion = _scores(scaled_NN, root_N1 * targets_NC, root_N1, candidates, fit_intercept, str(regularization))
        candidates = [min(criterion, key=criterion.__getitem__)]
    factor_NN = _factor(scaled_NN, candidates[0])
    dual_NC = root_N1 * torch.cholesky_solve(root_N1 * targets_NC, factor_NN)
    intercept_C = torch.zeros_like(targets_NC[0])
    if fit_intercept:
        ones_N1 = root_N1 * torch.cholesky_solve(root_N1, factor_NN)
        intercept_C = dual_NC.sum(0) / ones_N1.sum()
        dual_NC = dual_NC - ones_N1 * intercept_C
    return KernelRidgeSolution(dual_NC, intercept_C, candidates[0], criterion)


def _scores(scaled_NN, targets_NC, root_N1, candidates, fit_intercept: bool, name: str) -> dict[float, float]:
    """Squared error per row that each regularization predicts, summed over targets; all arguments scaled by sqrt(s)."""
    mean_N1 = root_N1 / root_N1.norm() if fit_intercept else torch.zeros_like(root_N1)
    # Centring in feature space: the constant, here the unit vector mean_N1, is projected out on both sides.
    centred_NN = scaled_NN - mean_N1 @ (mean_N1.T @ scaled_NN)
    centred_NN -= (centred_NN @ mean_N1) @ mean_N1.T
    values_N, vectors_NN = torch.linalg.eigh(centred_NN)
    values_N = values_N.clamp(min=0)
    projected_NC = vectors_NN.T @ (targets_NC - mean_N1 @ (mean_N1.T @ targets_NC))
    rows, total = (root_N1 > 0).sum(), root_N1.square().sum()
    scores = {}
    for value in candidates:
        left_N = value / (values_N + value) if value else (values_N <= len(values_N) * EPS * values_N[-1]).double()
        residual_NC = vectors_NN @ (left_N[:, None] * projected_NC)
        if name == "gcv":
            free = left_N.sum() - (len(root_N1) - rows) - int(fit_intercept)  # N - df
            score = rows * residual_NC.square().sum() / free.square() * rows / total
        else:
            free_N1 = vectors_NN.square() @ left_N[:, None] - mean_N1.square()  # 1 - leverage
            score = (residual_NC / free_N1).square().sum() / total
        scores[value] = score.item() if score.isfinite() else float("inf")
    return scores


def _factor(scaled_NN: Tensor, regularization: float) -> Tensor:
    """Cholesky factor of the matrix plus regularization, which is added in place."""
    scaled_NN.diagonal().add_(regularization)
    largest = scaled_NN.diagonal().max()
    factor_NN, info = torch.linalg.cholesky_ex(scaled_NN)
    # A matrix that is singular but for rounding may pass: its last pivots are rounding errors.
    if info.item() or factor_NN.diagonal().min() ** 2 <= len(factor_NN) * EPS * largest:
        raise InputError(
            f"regularization={regularization:g}: the kernel matrix of {len(factor_NN)} rows is singular with it "
            "(equal rows, more rows than the kernel has features, or a kernel that is not positive definite); it needs "
            f"more, {1e-10 * largest:.1g} for example"
        )
    return factor_NN


def nystrom_conjugate_gradient(
    kernel: Kernel,
    features_ND: Tensor,
    targets_NC: Tensor,
    landmarks_MD: Tensor,
    regularization: float,
    *,
    weights_N: Tensor | None = None,
    fit_intercept: bool = True,
    iterations: int = 100,
    tolerance: float = 1e-6,
    block_rows: int = 4096,
) -> KernelRidgeSolution:
    r"""Kernel ridge regression restricted to functions of the landmarks, without the N x M matrix.

    .. math::
        f(x) = k(x, L)\,\beta + b, \qquad
        (K_{NM}^\top S K_{NM} + \lambda K_{MM})\,\beta = K_{NM}^\top S\,(Y - b)

    Conjugate gradient on :math:`B^\top H B`, H the matrix on the left, with the preconditioner
    :math:`B B^\top = (\tfrac{\sum s}{M} K_{MM}^2 + \lambda K_{MM})^{-1}`, which is :math:`H^{-1}` up to the landmarks
    standing for all rows. Source: Rudi, Carratino and Rosasco 2017, "FALKON: An Optimal Large Scale Kernel Method",
    section 3. Different here: :math:`\lambda` is not multiplied by N; :math:`K_{MM}` is factored by its eigenvectors,
    so that equal landmarks do no harm; rows have weights, and there is an intercept (features and preconditioner are
    centred).

    Args:
        features_ND: any device; blocks are copied to the device of the landmarks.
        iterations: most iterations. More are needed as the regularization falls and fewer with more landmarks: 6 to 60
            from 100 to 0.01 with 400 landmarks for 4,000 rows.
        tolerance: norm of the preconditioned residual over that of the right-hand side at which a target is solved.
            The residual that is carried along says when; the true one, computed at the end, is reported. Rounding keeps
            it above 1e-7 or so in directions that hardly matter to a prediction; above sqrt(tolerance) is an error.
        block_rows: rows whose kernel values exist at one time, M * 8 bytes each.
    Raises:
        InputError: as :func:`kernel_ridge`; a regularization of 0; no convergence within ``iterations``.
    Cost: O(N M (D + C)) time per iteration and 2 passes more; O(M^3 + N M D) once; O(M^2 + block_rows M) memory.
    Invariants: equal to the direct Nystroem solution; with all rows as landmarks equal to :func:`kernel_ridge`; blocks
    change nothing; a tenth of the iterations without a preconditioner, or less.
    """
    weight_N = _checked_weights(features_ND, targets_NC, weights_N)
    if _checked_regularization(regularization) == 0:
        raise InputError("regularization=0: conjugate gradient needs more than 0")
    if landmarks_MD.dim() != 2 or landmarks_MD.shape[1] != features_ND.shape[1] or not len(landmarks_MD):
        raise InputError(
            f"landmarks have shape {list(landmarks_MD.shape)}; they need [landmarks, {features_ND.shape[1]}]"
        )
    landmarks_MD = landmarks_MD.double()
    total = weight_N.sum()

    def blocks() -> Iterator[tuple[Tensor, Tensor, slice]]:
        for start in range(0, len(features_ND), block_rows):
            rows = slice(start, start + block_rows)
            yield kernel(features_ND[rows].to(landmarks_MD), landmarks_MD), weight_N[rows, None].to(landmarks_MD), rows

    # One pass for the means and the right-hand side.
    mean_1C = torch.zeros_like(targets_NC[:1]).to(landmarks_MD)
    if fit_intercept:
        mean_1C = ((weight_N[:, None] * targets_NC.double()).sum(0, keepdim=True) / total).to(landmarks_MD)
    mean_1M, right_MC = landmarks_MD.new_zeros(1, len(landmarks_MD)), 0
    for kernel_BM, weights_B1, rows in blocks():
        if fit_intercept:
            mean_1M += (weights_B1 * kernel_BM).sum(0, keepdim=True) / total
        right_MC = right_MC + kernel_BM.T @ (weights_B1 * (targets_NC[rows].to(landmarks_MD) - mean_1C))

    kernel_MM = kernel(landmarks_MD, landmarks_MD)
    precondition_MR = _preconditioner(kernel_MM, total.item(), regularization, fit_intercept)

    def normal_matrix(direction_RC: Tensor) -> Tensor:
        dual_MC = precondition_MR @ direction_RC
        product_MC = regularization * (kernel_MM @ dual_MC)
        for kernel_BM, weights_B1, _ in blocks():
            product_MC += kernel_BM.T @ (weights_B1 * (kernel_BM @ dual_MC - mean_1M @ dual_MC))
        return precondition_MR.T @ product_MC

    right_RC = precondition_MR.T @ right_MC
    solution_RC, done, residual = _conjugate_gradient(normal_matrix, right_RC, iterations, tolerance)
    if residual > tolerance**0.5:
        raise InputError(
            f"regularization={regularization:g}: rounding leaves a residual of {residual:.1e} where {tolerance:g} was "
            "asked for; give more regularization or fewer landmarks"
        )
    dual_MC = precondition_MR @ solution_RC
    return KernelRidgeSolution(dual_MC, (mean_1C - mean_1M @ dual_MC)[0], float(regularization), None, done, residual)


def _preconditioner(kernel_MM: Tensor, total: float, regularization: float, centre: bool) -> Tensor:
    """B [M, R] such that B B^T inverts the normal matrix of the landmarks, each weighing total / M."""
    values_M, vectors_MM = torch.linalg.eigh(kernel_MM)
    kept_M = values_M > len(values_M) * EPS * values_M[-1]
    values_R, vectors_MR = values_M[kept_M], vectors_MM[:, kept_M]
    features_MR = vectors_MR * values_R.sqrt()  # the landmarks in coordinates where their kernel is a dot product
    if centre:
        features_MR = features_MR - features_MR.mean(0)
    normal_RR = total / len(kernel_MM) * features_MR.T @ features_MR
    normal_RR.diagonal().add_(regularization)
    factor_RR = torch.linalg.cholesky(normal_RR)
    return torch.linalg.solve_triangular(factor_RR, (vectors_MR / values_R.sqrt()).T, upper=False).T


def _conjugate_gradient(
    matrix: Callable[[Tensor], Tensor], right_RC: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, int, float]:
    """Solution of matrix x = right for each column, iterations, and its true relative residual, the worst."""
    norms_C = right_RC.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    solution_RC, residual_RC, direction_RC = torch.zeros_like(right_RC), right_RC.clone(), right_RC.clone()
    squares_C, done = residual_RC.square().sum(0), 0
    while (squares_C.sqrt() > tolerance * norms_C).any():
        if done == iterations:
            residual = (squares_C.sqrt() / norms_C).max().item()
            raise InputError(
                f"iterations={iterations}: the residual is {residual:.1e}, tolerance={tolerance:g} was asked for; give "
                "more iterations, more landmarks or more regularization"
            )
        product_RC = matrix(direction_RC)
        # A column that is solved has a direction of zero: 0 / 0.
        step_C = (squares_C / (direction_RC * product_RC).sum(0)).nan_to_num(nan=0.0, posinf=0.0)
        solution_RC += step_C * direction_RC
        residual_RC -= step_C * product_RC
        previous_C, squares_C = squares_C, residual_RC.square().sum(0)
        direction_RC = residual_RC + (squares_C / previous_C).nan_to_num(nan=0.0, posinf=0.0) * direction_RC
        done += 1
    residual_C = (right_RC - matrix(solution_RC)).norm(dim=0) / norms_C
    return solution_RC, done, residual_C.max().item()


def _checked_weights(features_ND: Tensor, targets_NC: Tensor, weights_N: Tensor | None) -> Tensor:
    """Weights in float64, after a check of everything that was given."""
    if features_ND.dim() != 2 or not len(features_ND):
        raise InputError(f"features have shape {list(features_ND.shape)}; they need [rows, features], one row or more")
    if targets_NC.dim() != 2 or len(targets_NC) != len(features_ND):
        raise InputError(f"targets have shape {list(targets_NC.shape)}; they need [{len(features_ND)}, targets]")
    ones_N = features_ND.new_ones(len(features_ND), dtype=torch.float64)
    weight_N: Tensor = ones_N if weights_N is None else weights_N
    if weight_N.shape != features_ND.shape[:1]:
        raise InputError(f"weights have shape {list(weight_N.shape)}; they need [{len(features_ND)}]")
    for name, values in (("features", features_ND), ("targets", targets_NC), ("weights", weight_N[:, None])):
        finite_N = values.isfinite().all(1)
        if not finite_N.all():
            raise InputError(f"{name} of row {int(finite_N.int().argmin())} hold NaN or infinity; they must be finite")
    if (weight_N < 0).any() or not weight_N.sum() > 0:
        raise InputError(f"weights go from {weight_N.min():g} to {weight_N.max():g}; none below 0, one above 0")
    return weight_N.double()


def _checked_regularization(value: float | str | Tensor) -> float:
    if not 0 <= float(value) < float("inf"):
        raise InputError(f"regularization={value} must be a number, 0 or more")
    return float(value)


def _free_memory() -> int | None:
    """Bytes that this process may still take: what the system says is available, or what its container is left."""
    free = []
    available = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    if available:
        free.append(int(available[1]) * 1024)
    most, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if most.isdigit() and used.isdigit():
        free.append(max(int(most) - int(used), 0))
    return min(free, default=None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def _check_memory(rows: int, copies: int, limit: int | None, device: torch.device) -> None:
    """Refuse before anything of n x n is made: a system that swaps says nothing."""
    needed = copies * rows * rows * 8
    if limit is None and device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[0]
    elif limit is None:
        limit = _free_memory()
    if limit is not None and needed > limit:
        raise InputError(
            f"{rows} rows: {copies} matrices of rows x rows in float64 take {needed:,} bytes, {limit:,} are there; "
            "take fewer rows, random features, or Nystroem with conjugate gradient"
        )
