"""From a batch's labels to the rows of a regression: what is predicted, and from which features.

Shapes: B rows of a batch, T tokens, N rows of the regression, D features, C targets.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linpass.errors import InputError
from linpass.singlepass.features import is_language_model, is_token_classifier

IGNORED = -100  # the label of what is not to be learned


@dataclass(frozen=True)
class Rows:
    """Rows of a regression: ``targets`` are class ids [N] or numbers [N, C]; ``row_ids`` say where they come from."""

    features_ND: Tensor
    targets: Tensor
    weights_N: Tensor | None
    row_ids: Tensor


@dataclass(frozen=True)
class Task:
    """What a model's head predicts.

    ``kind`` is "single_label_classification", "multi_label_classification" or "regression", transformers' names of
    ``problem_type``. With ``every_token`` each token is a row; with ``shifted`` its target is the next token.
    """

    kind: str
    num_targets: int
    every_token: bool = False
    shifted: bool = False

    def rows(self, features: Tensor, labels: Tensor, weights_B: Tensor | None, row_ids_B: Tensor) -> Rows:
        """The rows of a batch, those with label -100 left out.

        Args:
            features: [B, D], or [B, T, D] with ``every_token``.
            labels: [B], [B, C] or [B, T], as the model takes them.

        Raises:
            InputError: labels that do not fit the features or the head, a feature or a target that is not finite; the
                row is named by its id.
        """
        device = features.device
        labels, row_ids = labels.to(device), row_ids_B.to(device)
        weights = None if weights_B is None else weights_B.to(device)
        if self.every_token:
            _check_shape(labels, features.shape[:2])
            if self.shifted:
                features, labels = features[:, :-1], labels[:, 1:]
            row_ids = row_ids[:, None].expand(labels.shape).flatten()
            weights = None if weights is None else weights[:, None].expand(labels.shape).flatten()
            features, labels = features.flatten(0, 1), labels.flatten()
        if self.kind == "single_label_classification":
            rows = self._classes(features, labels, weights, row_ids)
        else:
            rows = Rows(features, self._numbers(features, labels, row_ids), weights, row_ids)
        _check_rows(
            rows.features_ND.isfinite().all(1), rows.row_ids, "the features must be finite, not NaN or infinite"
        )
        return rows

    def _classes(self, features_ND: Tensor, labels: Tensor, weights_N: Tensor | None, row_ids_N: Tensor) -> Rows:
        """Rows whose target is a class id."""
        if labels.is_floating_point():
            raise InputError(f"labels of dtype {labels.dtype} must be whole numbers for problem_type={self.kind!r}")
        labels = labels.squeeze(-1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
        _check_shape(labels, features_ND.shape[:1])
        learned_N = labels != IGNORED
        if not bool(learned_N.all()):
            features_ND, labels, row_ids_N = features_ND[learned_N], labels[learned_N], row_ids_N[learned_N]
            weights_N = None if weights_N is None else weights_N[learned_N]
        most = self.num_targets - 1
        _check_rows((labels >= 0) & (labels <= most), row_ids_N, f"a label must be from 0 to {most}", labels)
        return Rows(features_ND, labels.long(), weights_N, row_ids_N)

    def _numbers(self, features_ND: Tensor, labels: Tensor, row_ids_N: Tensor) -> Tensor:
        """[N, C] targets of a regression, or -1 and 1 of several labels: a logit of 0 is a probability of one half."""
        labels = labels[:, None] if labels.dim() == 1 else labels
        _check_shape(labels, (len(features_ND), self.num_targets))
        targets_NC = labels.double()
        if self.kind == "regression":
            _check_rows(targets_NC.isfinite().all(1), row_ids_N, "labels must be finite numbers")
            return targets_NC
        if not labels.is_floating_point():  # the loss of transformers takes no others: evaluate would fail
            raise InputError(f"labels of dtype {labels.dtype} must be floating point for problem_type={self.kind!r}")
        binary_N = ((targets_NC == 0) | (targets_NC == 1)).all(1)
        _check_rows(binary_N, row_ids_N, f"labels must be 0 or 1 for problem_type={self.kind!r}")
        return 2 * targets_NC - 1


def _check_shape(labels: Tensor, expected: Any) -> None:
    if tuple(labels.shape) != tuple(expected):
        raise InputError(f"labels of shape {tuple(labels.shape)} must have shape {tuple(expected)}")


def _check_rows(right_N: Tensor, row_ids_N: Tensor, rule: str, values_N: Tensor | None = None) -> None:
    """Raise InputError naming the first row where ``right_N`` is False."""
    if not bool(right_N.all()):
        place = int((~right_N).int().argmax())
        got = "" if values_N is None else f", not {values_N[place].item()}"
        raise InputError(f"row {int(row_ids_N[place])}: {rule}{got}")


def task_of(model: nn.Module, outputs: int, labels: Tensor) -> Task:
    """The task of a model whose head has so many outputs.

    A ``problem_type`` that is not set follows from the first labels, by the rule of transformers.
    """
    config: Any = model.config
    if is_language_model(model) or is_token_classifier(model):
        return Task("single_label_classification", outputs, every_token=True, shifted=is_language_model(model))
    if config.problem_type is not None:
        return Task(config.problem_type, outputs)
    if config.num_labels == 1:
        return Task("regression", outputs)
    return Task("multi_label_classification" if labels.is_floating_point() else "single_label_classification", outputs)


def head_targets(targets: Tensor, num_targets: int) -> Tensor:
    """[N, C] numbers: the one-hot rows of class ids, numbers as they are."""
    if targets.is_floating_point():
        return targets
    return nn.functional.one_hot(targets, num_targets).to(torch.float64)
