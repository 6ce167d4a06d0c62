"""From what a pass has kept to the values of the head: one solve.

Shapes: N rows, D features, C targets.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linpass.errors import InputError
from linpass.singlepass.arguments import SinglePassArguments
from linpass.singlepass.batch_aware import batch_aware
from linpass.singlepass.classification import discriminant, fit_temperature, log_loss
from linpass.singlepass.collection import Collection, estimator_for
from linpass.singlepass.criteria import leave_one_out_errors
from linpass.singlepass.descent import gradient_descent
from linpass.singlepass.logistic import choose_logistic, logistic_regression
from linpass.singlepass.solver import RidgeSolution, leave_one_out, solve_ridge
from linpass.singlepass.statistics import GroupedStatistics, RidgeStatistics
from linpass.singlepass.tasks import head_targets

FEWEST_TO_CALIBRATE = 10
FORGOTTEN = 1e-12  # the share of a class that rounding leaves when its rows have been taken out
MOST_LOGITS = 1 << 24  # 134 MB of them in float64: of a vocabulary of 50,257, 333 rows


@dataclass(frozen=True)
class Fit:
    """A solution; ``temperature`` divides it.

    ``loss`` is what was minimised, per row that it was fitted to: half the squared error, or the cross-entropy.
    """

    solution: RidgeSolution
    temperature: float | None
    loss: float | None


def fit_head(collection: Collection, arguments: SinglePassArguments, intercept: bool) -> Fit:
    """Solve for the head, by what the arguments ask for.

    Raises:
        InputError: no rows, one class only, or settings that the collection was not made for.
    """
    epochs = arguments.num_train_epochs
    if collection.sgd is not None:
        check_classes(collection.sgd.classes, collection.sgd.rows, collection.task.kind)
        return Fit(collection.sgd.finish().solve(int(epochs)), None, None)
    statistics = weighted_total(collection, arguments)
    check_targets(statistics, collection.task.kind)
    match arguments.match:
        case "gd":
            solution = gradient_descent(
                statistics, int(epochs), arguments.learning_rate, intercept, weight_decay=arguments.weight_decay
            )
        case "batch_aware":
            solution = batch_aware(
                statistics,
                epochs,
                arguments.train_batch_size * arguments.gradient_accumulation_steps,
                arguments.learning_rate,
                float(arguments.regularization),
                fit_intercept=intercept,
            )
        case _:
            solution = _estimated(collection, statistics, arguments, intercept)
    temperature = None
    if _wants_temperature(collection, arguments):
        temperature = calibration(collection, statistics, arguments, solution, intercept)
    if solution.method in ("logistic", "discriminant"):
        return Fit(solution, temperature, _cross_entropy(collection, arguments, statistics, solution, temperature))
    return Fit(solution, temperature, squared_loss(statistics, solution))


def _wants_temperature(collection: Collection, arguments: SinglePassArguments) -> bool:
    """A head that imitates a procedure stays as it left it; logistic regression was calibrated where it was chosen."""
    own = arguments.match == "ridge" and estimator_for(arguments, collection.task) != "logistic"
    return own and arguments.calibrate and collection.task.kind != "regression"


def _estimated(
    collection: Collection, statistics: RidgeStatistics, arguments: SinglePassArguments, intercept: bool
) -> RidgeSolution:
    estimator = estimator_for(arguments, collection.task)
    if estimator == "logistic":
        rows = kept_rows(collection, arguments, statistics)
        looked_at = (rows["features_ND"], rows["targets"], statistics.spectrum(intercept))
        if not isinstance(arguments.regularization, float):
            return choose_logistic(*looked_at, rows["weights_N"], calibrate=arguments.calibrate)
        share = rows["weights_N"].sum().item() / statistics.weight  # of the rows, where only a sample was kept
        return logistic_regression(*looked_at, arguments.regularization * share, rows["weights_N"])
    solution = _ridge(collection, statistics, arguments, intercept)
    if estimator == "discriminant":
        return discriminant(statistics, solution.regularization)  # pyright: ignore[reportArgumentType]
    return solution


def _ridge(
    collection: Collection, statistics: RidgeStatistics, arguments: SinglePassArguments, intercept: bool
) -> RidgeSolution:
    if arguments.regularization == "loo":
        rows = kept_rows(collection, arguments, statistics)
        return leave_one_out(
            statistics, rows["features_ND"], rows["targets"], rows["weights_N"], fit_intercept=intercept
        )
    if arguments.regularization == "kfold":
        if not isinstance(collection.statistics, GroupedStatistics) or collection.by_class:
            raise InputError("regularization='kfold' needs the sums per fold of a pass with the same setting")
        return solve_ridge(collection.statistics, "kfold", fit_intercept=intercept)
    chosen_by = "gcv" if arguments.regularization == "auto" else arguments.regularization
    return solve_ridge(statistics, chosen_by, fit_intercept=intercept)


def weighted_total(collection: Collection, arguments: SinglePassArguments) -> RidgeStatistics:
    """The moments of all rows, classes weighted as asked for."""
    if not arguments.class_weight:
        return collection.total()
    groups = collection.statistics
    if not isinstance(groups, GroupedStatistics) or not collection.by_class:
        raise InputError("class_weight needs the sums per class of a pass that had class_weight set as well")
    return groups.total(class_weights(groups, arguments))


def class_weights(groups: GroupedStatistics, arguments: SinglePassArguments) -> Tensor:
    """[C]: what was given, or W / (C W_c) of the weights W_c of the classes, as scikit-learn's "balanced"."""
    return weights_of_classes(torch.tensor([group.weight for group in groups.groups]), arguments.class_weight)


def weights_of_classes(weight_C: Tensor, wanted: Any) -> Tensor:
    """[C] from the sums of the rows' weights by class, for "balanced" or numbers; classes without rows get 0."""
    if wanted != "balanced":
        return torch.tensor(wanted, dtype=torch.float64)
    weight_C = weight_C.double()
    seen_C = weight_C > 0
    return torch.where(seen_C, weight_C.sum() / (seen_C.sum() * weight_C.clamp(min=1e-300)), 0.0)


def check_targets(statistics: RidgeStatistics, kind: str) -> None:
    """Raise InputError for no rows, or rows of one class."""
    if statistics.rows == 0:
        raise InputError("train_dataset must hold at least one row with a label, got none")
    check_classes((statistics.target_mean_C > FORGOTTEN).nonzero()[:, 0], statistics.rows, kind)


def check_classes(classes: Tensor, rows: int, kind: str) -> None:
    """Raise InputError for rows of one class only, by those that have a weight."""
    if kind != "single_label_classification" or len(classes) > 1:
        return
    if not len(classes):
        raise InputError(f"all {rows:,} rows have weight 0: some row must weigh more")
    raise InputError(
        f"all {rows:,} rows have label {int(classes[0])}: a classifier needs rows of two classes, with weights above 0"
    )


def kept_rows(collection: Collection, arguments: SinglePassArguments, statistics: RidgeStatistics) -> dict[str, Tensor]:
    """The rows that a pass has kept, their weights with the class weights in them."""
    store = collection.rows if collection.rows is not None else collection.sample
    if store is None:
        raise InputError("this setting needs rows in memory: train with regularization='loo'")
    rows = store.all()
    if rows and arguments.class_weight and isinstance(collection.statistics, GroupedStatistics):
        weight_C = class_weights(collection.statistics, arguments)
        rows["weights_N"] = rows["weights_N"].double() * weight_C[rows["targets"]]
    return {name: tensor.to(statistics.device) for name, tensor in rows.items()}


def calibration(
    collection: Collection,
    statistics: RidgeStatistics,
    arguments: SinglePassArguments,
    solution: RidgeSolution,
    intercept: bool,
) -> float | None:
    """The temperature under which leave-one-out predictions of the kept rows are the best probabilities.

    Of a discriminant, which leaves no row out, its own predictions. None with fewer than FEWEST_TO_CALIBRATE usable
    rows. Cost: O(m D (D + C)) for m rows.
    """
    rows: dict[str, Any] = kept_rows(collection, arguments, statistics)
    count = min(len(rows.get("keys", ())), max(FEWEST_TO_CALIBRATE, MOST_LOGITS // statistics.num_targets))
    if count < FEWEST_TO_CALIBRATE:
        return None
    features, targets, weights = (rows[name][:count] for name in ("features_ND", "targets", "weights_N"))
    if solution.method == "discriminant":
        logits_NC = solution.predict(features)
    else:
        spectrum = statistics.spectrum(intercept)
        (errors_NC,) = leave_one_out_errors(spectrum, features, targets, weights, [solution.regularization])
        logits_NC = head_targets(targets, statistics.num_targets) - errors_NC
    usable_N = logits_NC.isfinite().all(1)
    if int(usable_N.sum()) < FEWEST_TO_CALIBRATE:
        return None
    logits_NC, targets, weights = logits_NC[usable_N], targets[usable_N], weights[usable_N]
    return best_temperature(logits_NC, targets, weights)


def best_temperature(logits_NC: Tensor, targets: Tensor, weights_N: Tensor) -> float:
    """:func:`fit_temperature` for class ids, or for the labels -1 and 1 of several classes per row."""
    if not targets.is_floating_point():
        return fit_temperature(logits_NC, targets, weights_N)
    # each label on its own: the sigmoid of z is the softmax of (0, z)
    pairs = torch.stack((torch.zeros_like(logits_NC), logits_NC), -1).flatten(0, 1)
    return fit_temperature(pairs, targets.flatten() > 0, weights_N[:, None].expand_as(targets).flatten())


def _cross_entropy(
    collection: Collection,
    arguments: SinglePassArguments,
    statistics: RidgeStatistics,
    solution: RidgeSolution,
    temperature: float | None,
) -> float | None:
    """Of the kept rows, nats per row."""
    if collection.rows is None and collection.sample is None:
        return None
    rows = kept_rows(collection, arguments, statistics)
    return log_loss(solution.predict(rows["features_ND"]) / (temperature or 1.0), rows["targets"], rows["weights_N"])


def squared_loss(statistics: RidgeStatistics, solution: RidgeSolution) -> float:
    r"""Half the weighted mean squared error over the rows of the moments, summed over targets.

    .. math::  \tfrac{1}{2 \sum s} \sum_c S_{yy} - 2 w^\top S_{xy} + w^\top S_{xx} w + \Big(\sum s\Big)
        (\bar y - w^\top \mu - b)^2
    """
    if statistics.precision == "tsqr":
        spectrum = statistics.spectrum()
        weight_CD = solution.weight_CD @ spectrum.vectors_DD
        explained_C = 2 * (weight_CD.T * spectrum.projections_DC).sum(0) - weight_CD.square() @ spectrum.eigenvalues_D
    else:
        product_CD = solution.weight_CD @ statistics.scatter_DD
        explained_C = 2 * (solution.weight_CD.T * statistics.cross_DC).sum(0) - (product_CD * solution.weight_CD).sum(1)
    offset_C = statistics.target_mean_C - solution.predict(statistics.mean_D[None])[0]
    error_C = (statistics.target_scatter_C - explained_C).clamp(min=0) / statistics.weight + offset_C.square()
    return error_C.sum().item() / 2
