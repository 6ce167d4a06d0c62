"""Heads of the kernels that need every row: the solution in its dual form, over the rows or over landmarks.

Shapes: N rows, M landmarks, D features, C targets.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linpass.errors import InputError
from linpass.feature_maps_closed_form import KernelFeatures
from linpass.modeling_closed_form import ClosedFormForSequenceClassification
from linpass.singlepass.arguments import SinglePassArguments
from linpass.singlepass.collection import Collection
from linpass.singlepass.fit import FEWEST_TO_CALIBRATE, Fit, best_temperature, check_classes, weights_of_classes
from linpass.singlepass.kernel_ridge import KernelRidgeSolution, kernel_ridge, nystrom_conjugate_gradient
from linpass.singlepass.row_store import hashed
from linpass.singlepass.solver import RidgeSolution
from linpass.singlepass.tasks import head_targets

CHOICE_ROWS = 4096  # rows that the regularisation is chosen on where there are more than exact_rows
HELD_OUT = 5  # one row in so many is held out for the temperature


def fit_kernel_head(
    model: ClosedFormForSequenceClassification, collection: Collection, arguments: SinglePassArguments
) -> Fit:
    """Solve for the dual coefficients and make them the model's feature map (k(x, landmarks)) and linear layer.

    Up to ``exact_rows`` rows the landmarks are all rows and the system is solved exactly. Above, ``num_features`` rows
    drawn with the seed are the landmarks, the head's map is the whitened kernel against them, and the system is solved
    by preconditioned conjugate gradient; "gcv" or "loo" then choose the regularisation on CHOICE_ROWS rows, and it is
    scaled with the number of rows. For probabilities the same system is solved once more without a fifth of the rows.

    Raises:
        InputError: no rows, one class only, a system that is too large or singular.
    """
    assert collection.rows is not None
    rows = collection.rows.all()
    if not rows:
        raise InputError("train_dataset must hold at least one row with a label, got none")
    if not rows["targets"].is_floating_point():
        check_classes(rows["targets"].unique(), len(rows["targets"]), collection.task.kind)
    device = model.classifier.weight.device
    features_ND = rows["features_ND"].to(device, torch.float64)
    targets_NC = head_targets(rows["targets"], model.num_labels).to(device, torch.float64)
    weights_N = rows["weights_N"].double()
    if arguments.class_weight:
        by_class_C = torch.zeros(model.num_labels, dtype=torch.float64).index_add_(0, rows["targets"], weights_N)
        weights_N = weights_N * weights_of_classes(by_class_C, arguments.class_weight)[rows["targets"]]
    weights_N = weights_N.to(device)
    feature_map = _feature_map(model, features_ND, arguments)
    solution = _solve(feature_map, features_ND, targets_NC, weights_N, arguments)
    temperature = None
    held_N = (hashed(rows["keys"], arguments.seed) % HELD_OUT == 0).to(device)
    if arguments.calibrate and collection.task.kind != "regression" and int(held_N.sum()) >= FEWEST_TO_CALIBRATE:
        left_N = torch.where(held_N, 0.0, weights_N)
        apart = _solve(feature_map, features_ND, targets_NC, left_N, arguments, solution.regularization)
        logits_NC = _predict(feature_map, apart, features_ND[held_N])
        temperature = best_temperature(logits_NC, rows["targets"].to(device)[held_N], weights_N[held_N])
    _write(model, feature_map, solution, temperature)
    error_NC = targets_NC - _predict(feature_map, solution, features_ND)
    loss = (weights_N @ error_NC.square()).sum().item() / weights_N.sum().item() / 2
    head = RidgeSolution(
        solution.dual_NC.T, solution.intercept_C, solution.regularization, solution.criterion, arguments.kernel
    )
    return Fit(head, temperature, loss)


def _feature_map(model: Any, features_ND: Tensor, arguments: SinglePassArguments) -> KernelFeatures:
    config = model.config
    exact = len(features_ND) <= arguments.exact_rows
    landmarks = len(features_ND) if exact else min(arguments.num_features, len(features_ND))
    parameters = {name: getattr(config, name) for name in ("degree", "scale", "offset", "order", "depth")}
    feature_map = KernelFeatures(
        config.kernel,
        config.pooled_width,
        landmarks,
        whiten=not exact,  # raw dual coefficients of landmarks are large and cancel in float32
        bandwidth=config.bandwidth,
        seed=arguments.seed,
        **parameters,
    )
    weight = model.classifier.weight
    return feature_map.to(weight.device, weight.dtype).fit(features_ND, arguments.seed)


def _solve(
    feature_map: KernelFeatures,
    features_ND: Tensor,
    targets_NC: Tensor,
    weights_N: Tensor,
    arguments: SinglePassArguments,
    regularization: Any = None,
) -> KernelRidgeSolution:
    kernel = feature_map.kernel
    wanted = arguments.regularization if regularization is None else regularization
    wanted = "gcv" if wanted == "auto" else wanted
    if len(feature_map.landmarks) == len(features_ND):
        return kernel_ridge(kernel, features_ND, targets_NC, wanted, weights_N=weights_N)
    if isinstance(wanted, str):
        wanted = _choose_on_some(kernel, features_ND, targets_NC, weights_N, wanted, arguments.seed)
    landmarks_MD = feature_map.landmarks.double()
    return nystrom_conjugate_gradient(kernel, features_ND, targets_NC, landmarks_MD, wanted, weights_N=weights_N)


def _choose_on_some(
    kernel: Any, features_ND: Tensor, targets_NC: Tensor, weights_N: Tensor, criterion: str, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(features_ND), generator=generator)[:CHOICE_ROWS].to(features_ND.device)
    chosen = kernel_ridge(kernel, features_ND[some], targets_NC[some], criterion, weights_N=weights_N[some])
    return chosen.regularization * len(features_ND) / len(some)


def _predict(feature_map: KernelFeatures, solution: KernelRidgeSolution, features_ND: Tensor) -> Tensor:
    landmarks_MD = feature_map.landmarks.double()
    parts = [solution.predict(feature_map.kernel(part, landmarks_MD)) for part in features_ND.split(4096)]
    return torch.cat(parts)


@torch.no_grad()
def _write(model: Any, feature_map: KernelFeatures, solution: KernelRidgeSolution, temperature: float | None) -> None:
    old = model.classifier
    model.config.num_features = len(feature_map.landmarks)
    model.config.feature_map = "kernel" if feature_map.whitening is None else "nystrom"
    model.feature_map = feature_map
    model.classifier = nn.Linear(
        len(feature_map.landmarks), model.num_labels, device=old.weight.device, dtype=old.weight.dtype
    )
    scale = 1.0 if temperature is None else 1 / temperature
    model.classifier.weight.copy_(feature_map.weight_from_dual(solution.dual_NC) * scale)
    model.classifier.bias.copy_(solution.intercept_C * scale)
