"""What gradient descent would have found, computed without its epochs, and a formula that only looks like it.

Everywhere the loss is 1/2 the mean over rows, summed over targets, of the squared error, and the model an ``nn.Linear``
whose bias is a weight like the others: descended, decayed, and zero at the start.

Shapes: B rows of a batch, D features, C targets; A = D + 1 with the bias's column of ones in front (D without a bias).
"""

import torch
from torch import Tensor, nn

from linpass.errors import InputError
from linpass.singlepass.solver import RidgeSolution, check_nonnegative, check_rows
from linpass.singlepass.statistics import RidgeStatistics


def gradient_descent(
    statistics: RidgeStatistics,
    steps: int,
    learning_rate: float,
    fit_intercept: bool = True,
    weight_decay: float = 0.0,
) -> RidgeSolution:
    r"""The ``nn.Linear`` after so many full-batch steps of ``torch.optim.SGD`` from zero, without taking them.

    .. math::  \theta_T = V\, f(s)\, V^\top \frac{1}{\sum w} \sum w\, x y^\top, \qquad
        f(s) = \frac{1 - (1 - \eta s)^T}{s}

    with rows x = [1, features] of weight w, not centred, since torch does not centre them; s and V are the
    eigenvalues, plus the weight decay, and eigenvectors of their mean square. Source: Ali, Kolter and Tibshirani 2019
    (early stopping as a spectral filter).

    Returns: a solution with ``regularization`` = weight decay times the weight of all rows: the lambda of the ridge
        regression, bias included, that infinitely many steps would reach.
    Raises:
        InputError: no rows, steps not a positive whole number, or a learning rate with which the steps diverge.
    Cost: O(D^3), whatever the number of steps.
    Invariants: equal to the loop of ``torch.optim.SGD``; many steps are least squares.
    """
    check_rows(statistics)
    check_count("steps", steps)
    check_rates(learning_rate, weight_decay)
    square_AA, cross_AC = _augmented_moments(statistics, fit_intercept)
    eigenvalues_A, vectors_AA = torch.linalg.eigh(square_AA)
    decayed_A = eigenvalues_A.clamp(min=0) + weight_decay
    if learning_rate * decayed_A[-1] >= 2:
        raise InputError(
            f"learning_rate={learning_rate} diverges on these features: it must be below {2 / decayed_A[-1].item():.6g}"
        )
    filter_A = _descent_filter(decayed_A, steps, learning_rate)
    parameter_AC = vectors_AA @ (filter_A[:, None] * (vectors_AA.T @ cross_AC))
    return _from_parameter(parameter_AC, fit_intercept, weight_decay * statistics.weight, "gd")


def _augmented_moments(statistics: RidgeStatistics, fit_intercept: bool) -> tuple[Tensor, Tensor]:
    """Weighted means of x x^T and x y^T for rows x = [1, features]."""
    mean_D, target_mean_C = statistics.mean_D, statistics.target_mean_C
    square_DD = statistics.scatter_DD / statistics.weight + torch.outer(mean_D, mean_D)
    cross_DC = statistics.cross_DC / statistics.weight + torch.outer(mean_D, target_mean_C)
    if not fit_intercept:
        return square_DD, cross_DC
    top_1A = torch.cat([mean_D.new_ones(1), mean_D])[None]
    square_AA = torch.cat([top_1A, torch.cat([mean_D[:, None], square_DD], 1)])
    return square_AA, torch.cat([target_mean_C[None], cross_DC])


def _descent_filter(eigenvalues_A: Tensor, steps: int, learning_rate: float) -> Tensor:
    rate_A = learning_rate * eigenvalues_A
    # Below 1 the logarithm keeps the digits of small eigenvalues; from 1 on it does not exist, and nothing cancels.
    slow_A = -torch.expm1(steps * torch.log1p(-rate_A.clamp(max=0.5)))
    reached_A = torch.where(rate_A < 0.5, slow_A, 1 - (1 - rate_A) ** steps)
    return torch.where(rate_A > 0, reached_A / eigenvalues_A, steps * learning_rate)


def _from_parameter(parameter_AC: Tensor, fit_intercept: bool, regularization: float, method: str) -> RidgeSolution:
    if fit_intercept:
        bias_C, weight_DC = parameter_AC[0].clone(), parameter_AC[1:]
    else:
        bias_C, weight_DC = parameter_AC.new_zeros(parameter_AC.shape[1]), parameter_AC
    return RidgeSolution(weight_DC.T.contiguous(), bias_C, regularization, None, method)


class SGDMap:
    r"""Mini-batch SGD over many epochs, exactly, from one pass over the batches in their order.

    With squared loss a step is affine in the parameters, and so is an epoch: theta becomes M theta + c. One pass
    multiplies the steps together; :meth:`solve` composes the epoch with itself by repeated squaring. The map is found
    by running the steps of SGD on an identity matrix beside a zero start:

    .. math::  [M \mid c] \leftarrow (1 - \eta\,\mathrm{wd})\, [M \mid c]
        - \frac{\eta}{B} X_b^\top \big( X_b [M \mid c] - [0 \mid Y_b] \big)

    With momentum the state is (theta, velocity), twice as tall. The same as ``torch.optim.SGD(lr, momentum,
    dampening=0, weight_decay, nesterov)`` on an ``nn.Linear``, when every epoch visits the same batches in the same
    order: an epoch that shuffles anew is another map. Maps of different rows do not commute, so two workers' passes
    cannot be merged and rows cannot be forgotten or weighted.

    Cost: per batch O(B A (A + C)), 4 A^2 B flop at least, 2 times that with momentum; memory O(A^2 + A C), 4 times
        that with momentum, independent of the rows and epochs. Everything is float64.
    Invariants: equal to ``torch.optim.SGD`` after many epochs; resuming from a state changes no bit.
    """

    FIELDS = ("num_features", "num_targets", "learning_rate", "weight_decay", "momentum", "fit_intercept", "nesterov")

    def __init__(
        self,
        num_features: int,
        num_targets: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        fit_intercept: bool = True,
        nesterov: bool = False,
        device: torch.device | str | None = None,
    ):
        check_count("num_features", num_features)
        check_count("num_targets", num_targets)
        check_rates(learning_rate, weight_decay)
        check_nonnegative("momentum", momentum)
        if nesterov and not momentum:
            raise InputError(f"nesterov=True needs momentum > 0, got momentum={momentum}")
        self.num_features, self.num_targets = num_features, num_targets
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.momentum, self.fit_intercept, self.nesterov = momentum, fit_intercept, nesterov
        self.rows = 0
        self.size = num_features + int(fit_intercept)
        # Columns: the parameters that an epoch starts from, with momentum then its velocity, then the offset c.
        states = self.size * (2 if momentum else 1)
        self.parameter_AZ = torch.eye(self.size, states + num_targets, dtype=torch.float64, device=device)
        self.parameter_AZ[:, states:] = 0
        self.velocity_AZ = torch.zeros_like(self.parameter_AZ) if momentum else None
        if self.velocity_AZ is not None:
            self.velocity_AZ[:, self.size : states] = torch.eye(self.size, dtype=torch.float64)

    def update(self, features_BD: Tensor, targets: Tensor) -> "SGDMap":
        """One step of SGD on these rows; call once per batch, in the order of training.

        Args:
            targets: [B, C], or class ids [B], which stand for one-hot rows.
        Raises:
            InputError: no rows, another width, features or targets that are not finite, ids out of range.
        """
        self._check_batch(features_BD, targets)
        with torch.autocast(self.parameter_AZ.device.type, enabled=False):
            rows_BA = features_BD.detach().to(self.parameter_AZ)
            if self.fit_intercept:
                rows_BA = torch.cat([rows_BA.new_ones(len(rows_BA), 1), rows_BA], 1)
            error_BZ = rows_BA @ self.parameter_AZ
            offset_BC = error_BZ[:, -self.num_targets :]
            if targets.is_floating_point():
                offset_BC -= targets.detach().to(offset_BC)
            else:
                ids_B = targets.to(offset_BC.device, torch.long)
                offset_BC[torch.arange(len(ids_B), device=offset_BC.device), ids_B] -= 1
            self._step(rows_BA, error_BZ)
        self.rows += len(features_BD)
        return self

    def _step(self, rows_BA: Tensor, error_BZ: Tensor) -> None:
        rate, decay = self.learning_rate, self.weight_decay
        if self.velocity_AZ is None:
            self.parameter_AZ.mul_(1 - rate * decay).addmm_(rows_BA.T, error_BZ, alpha=-rate / len(rows_BA))
            return
        gradient_AZ = torch.addmm(self.parameter_AZ, rows_BA.T, error_BZ, beta=decay, alpha=1 / len(rows_BA))
        self.velocity_AZ.mul_(self.momentum).add_(gradient_AZ)
        direction_AZ = gradient_AZ.add_(self.velocity_AZ, alpha=self.momentum) if self.nesterov else self.velocity_AZ
        self.parameter_AZ.sub_(direction_AZ, alpha=rate)

    def _check_batch(self, features_BD: Tensor, targets: Tensor) -> None:
        if features_BD.ndim != 2 or features_BD.shape[1] != self.num_features or not len(features_BD):
            raise InputError(f"features have shape {list(features_BD.shape)}: must be [rows, {self.num_features}]")
        shape = (len(features_BD), self.num_targets) if targets.is_floating_point() else (len(features_BD),)
        if targets.shape != shape:
            raise InputError(f"targets have shape {list(targets.shape)}: must be {list(shape)} for {targets.dtype}")
        wrong_B = ~features_BD.isfinite().all(1)
        if targets.is_floating_point():
            wrong_B |= ~targets.isfinite().all(1).to(wrong_B.device)
        else:
            wrong_B |= ((targets < 0) | (targets >= self.num_targets)).to(wrong_B.device)
        if wrong_B.any():
            row = self.rows + int(wrong_B.nonzero()[0])
            rule = (
                "finite" if targets.is_floating_point() else f"finite, and its class from 0 to {self.num_targets - 1}"
            )
            raise InputError(f"row {row}: features and target must be {rule}")

    def solve(self, epochs: int, initial: nn.Linear | None = None) -> RidgeSolution:
        """The layer after so many epochs over the batches seen so far, starting at zero or at ``initial``.

        Raises:
            InputError: no batches yet, epochs not a positive whole number, an initial layer of another shape, or
                steps that diverge beyond float64.
        Cost: O(A^3 log epochs), 8 times that with momentum.
        """
        check_count("epochs", epochs)
        if not self.rows:
            raise InputError("rows=0: SGD needs at least one batch")
        state = self._start(initial)
        parts = [self.parameter_AZ] if self.velocity_AZ is None else [self.parameter_AZ, self.velocity_AZ]
        matrix, offset = torch.cat(parts).tensor_split([len(parts) * self.size], 1)
        # Powers of one affine map commute, so the binary digits of `epochs` can be applied from the smallest on.
        remaining = epochs
        while remaining:
            if remaining & 1:
                state = matrix @ state + offset
            remaining >>= 1
            if remaining:
                matrix, offset = matrix @ matrix, matrix @ offset + offset
        if not state.isfinite().all():
            raise InputError(f"learning_rate={self.learning_rate} diverges within {epochs} epochs: it must be smaller")
        return _from_parameter(state[: self.size], self.fit_intercept, 0.0, "sgd")

    def _start(self, initial: nn.Linear | None) -> Tensor:
        state = self.parameter_AZ.new_zeros(self.parameter_AZ.shape[1] - self.num_targets, self.num_targets)
        if initial is None:
            return state
        shape = (self.num_targets, self.num_features)
        if initial.weight.shape != shape or (initial.bias is not None) != self.fit_intercept:
            raise InputError(
                f"initial={initial}: must have in_features={self.num_features}, out_features={self.num_targets} "
                f"and bias={self.fit_intercept}"
            )
        first = int(self.fit_intercept)
        state[first : self.size] = initial.weight.detach().T
        if self.fit_intercept:
            state[0] = initial.bias.detach()
        return state

    def _settings(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in self.FIELDS}

    def state_dict(self) -> dict[str, Tensor]:
        """The map so far and the settings it was made with, all as tensors."""
        state = {"parameter": self.parameter_AZ.clone(), "rows": torch.tensor(self.rows)}
        if self.velocity_AZ is not None:
            state["velocity"] = self.velocity_AZ.clone()
        return state | {name: torch.tensor(value, dtype=torch.float64) for name, value in self._settings().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict()`` of a map with the same settings.

        Raises:
            InputError: the state was made with another setting; steps of two kinds are no SGD.
        """
        for name, value in self._settings().items():
            if name not in state or state[name].item() != value:
                found = state[name].item() if name in state else "missing"
                raise InputError(f"{name}={value:g}: the saved SGD steps were made with {found}")
        self.parameter_AZ = state["parameter"].to(self.parameter_AZ, copy=True)
        if self.velocity_AZ is not None:
            self.velocity_AZ = state["velocity"].to(self.velocity_AZ, copy=True)
        self.rows = int(state["rows"])


def check_count(field: str, value: int) -> None:
    """Raises InputError unless it is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{field}={value} must be a whole number, 1 or more")


def check_rates(learning_rate: float, weight_decay: float) -> None:
    """Raises InputError unless one is positive and the other not negative, both finite."""
    check_nonnegative("learning_rate", learning_rate)
    if not learning_rate > 0:
        raise InputError(f"learning_rate={learning_rate} must be above 0")
    check_nonnegative("weight_decay", weight_decay)
