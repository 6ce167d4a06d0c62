"""Batches on their way into statistics, checked before anything changes.

Shape suffixes: N rows, D features, C targets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linpass.errors import InputError

# Magnitudes up to which a block's products stay finite, by precision.
LARGEST = {"mixed": 1e16, "float64": 1e150, "tsqr": 1e150}


def check_batch(
    features_ND: Tensor,
    targets: Tensor,
    weights_N: Tensor | None,
    *,
    num_features: int,
    num_targets: int,
    precision: str,
    row_name: Callable[[int], object],
) -> None:
    """Raise InputError, naming the first bad row, unless every number can be used.

    Cost: one pass over the numbers and one wait for the device.
    """
    _check_shapes(features_ND, targets, weights_N, num_features, num_targets)
    if not len(features_ND):
        return
    largest = LARGEST[precision]
    bounds = [("features", features_ND, -largest, largest)]
    if targets.ndim == 1:
        bounds.append(("targets", targets, 0, num_targets - 1))
    else:
        bounds.append(("targets", targets, -largest, largest))
    if weights_N is not None:
        bounds.append(("weights", weights_N, 0, 1e150))
    extremes = [value.to(features_ND.device, torch.float64) for _, values, *_ in bounds for value in _extremes(values)]
    numbers = iter(torch.stack(extremes).tolist())
    for (name, values, low, high), least, most in zip(bounds, numbers, numbers, strict=True):
        if not (least >= low and most <= high):  # false for NaN
            raise InputError(_describe_bad_row(name, values, low, high, precision, row_name))


def check_group_ids(groups_N: Tensor, rows: int, num_groups: int, row_name: Callable[[int], object]) -> None:
    """Raise InputError unless there is an id from 0 to num_groups - 1 for every row."""
    if not isinstance(groups_N, Tensor) or not _is_integer(groups_N) or groups_N.shape != (rows,):
        raise InputError(f"groups: {_shape_of(groups_N)} must be integers of shape ({rows},)")
    bad_N = (groups_N < 0) | (groups_N >= num_groups)
    if bad_N.any():
        first = int(bad_N.nonzero()[0])
        value = groups_N[first].item()
        raise InputError(f"groups: row {row_name(first)} holds {value}; must be from 0 to {num_groups - 1}")


def row_names(row_ids: Sequence | Tensor | None, features_ND: Tensor, first_row: int) -> Callable[[int], object]:
    """What a row is called in an error: its id, or its number in the order of arrival."""
    if row_ids is None:
        return lambda index: first_row + index
    if len(row_ids) != len(features_ND):
        raise InputError(f"row_ids: {len(row_ids)} ids for {len(features_ND)} rows; must be as many")
    names = row_ids
    return lambda index: names[index].item() if isinstance(names, Tensor) else names[index]


def _check_shapes(features_ND, targets, weights_N, num_features: int, num_targets: int) -> None:
    if not isinstance(features_ND, Tensor) or not features_ND.is_floating_point() or features_ND.ndim != 2:
        raise InputError(f"features: {_shape_of(features_ND)} must be a floating-point tensor [rows, {num_features}]")
    rows = len(features_ND)
    if features_ND.shape[1] != num_features:
        raise InputError(f"features: rows of width {features_ND.shape[1]} must be {num_features} wide")
    ids = isinstance(targets, Tensor) and targets.ndim == 1 and _is_integer(targets)
    values = isinstance(targets, Tensor) and targets.ndim == 2 and not targets.is_complex()
    if not (ids or values) or tuple(targets.shape) not in ((rows,), (rows, num_targets)):
        raise InputError(
            f"targets: {_shape_of(targets)} must be class ids of shape ({rows},) or values of shape "
            f"({rows}, {num_targets})"
        )
    if weights_N is not None and (
        not isinstance(weights_N, Tensor) or weights_N.shape != (rows,) or weights_N.is_complex()
    ):
        raise InputError(f"weights: {_shape_of(weights_N)} must be a tensor of shape ({rows},)")


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    if values.numel() == 0:
        return values.new_zeros(()), values.new_zeros(())
    least, most = torch.aminmax(values.to(torch.uint8) if values.dtype == torch.bool else values)
    return least, most


def _describe_bad_row(name: str, values: Tensor, low, high, precision: str, row_name) -> str:
    rows = values.reshape(len(values), -1).double()
    bad = ~((rows >= low) & (rows <= high))
    first = int(bad.any(1).nonzero()[0])
    value = rows[first][bad[first]][0].item()
    if name == "targets" and values.ndim == 1:
        value = int(value)
    finite = float("-inf") < value < float("inf")
    if name == "targets" and values.ndim == 1:
        rule = f"a class id must be from 0 to {high}"
    elif name == "weights":
        rule = "must be finite and at least 0"
    elif finite:
        rule = f"precision={precision!r} takes magnitudes up to {high:g}; scale them" + (
            ' or use precision="float64"' if precision == "mixed" else ""
        )
    else:
        rule = "must be finite"
    return f"{name}: row {row_name(first)} holds {value}; {rule}"


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _shape_of(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
