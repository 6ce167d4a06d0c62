"""The ways to train a classifier that ``linpass compare`` sets side by side; each is a function of the same rows.

A contestant gets a dictionary of tensors and returns logits of the test rows [N, C] and how many passes over the
training rows it made, in words. Tensors: ``train_features``, ``test_features`` float32 [N, D]; ``train_ids``,
``test_ids`` [N, T] and ``train_lengths``, ``test_lengths`` [N] of the tokens; ``train_labels`` [N].

Shapes: N rows, D features, C classes, F random features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linpass.errors import InputError
from linpass.feature_maps_closed_form import KernelFeatures, RandomFeatures
from linpass.singlepass.batch_aware import batch_aware
from linpass.singlepass.classification import fit_temperature
from linpass.singlepass.criteria import leave_one_out_errors
from linpass.singlepass.descent import SGDMap, gradient_descent
from linpass.singlepass.kernel_ridge import kernel_ridge
from linpass.singlepass.logistic import choose_logistic
from linpass.singlepass.simple_transformer import SimpleTransformer, predict, train_simple_transformer
from linpass.singlepass.solver import RidgeSolution, solve_ridge
from linpass.singlepass.statistics import RidgeStatistics

RANDOM_FEATURES = 1024
BLOCK = 1024  # rows of random features that exist at one time
FEATURES, TOKENS = ("train_features", "test_features"), ("train_ids", "test_ids", "train_lengths", "test_lengths")


@dataclass(frozen=True)
class Settings:
    """What all contestants are given: the settings of the gradient descents, and what the data has.

    ``scratch_epochs`` are those of the transformer from scratch, ``epochs`` those of the heads.
    """

    epochs: int
    scratch_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    classes: int
    vocab_size: int
    quiet: bool = False


Fit = Callable[[dict[str, Tensor], Settings], tuple[Tensor, str]]


@dataclass(frozen=True)
class Contestant:
    """A row of the comparison.

    Args:
        group: what the picture tells apart: "gradient descent", "scikit-learn" or "single pass".
        inputs: names of the tensors that it needs beside the labels.
        warm_up: imports that are not counted as its time.
    """

    name: str
    group: str
    fit: Fit
    inputs: tuple[str, ...] = FEATURES
    warm_up: tuple[str, ...] = ()

    @property
    def on_features(self) -> bool:
        """Whether it needs the encoder's features."""
        return self.inputs == FEATURES

    @property
    def missing(self) -> str:
        """The package that has to be installed first; empty where nothing is missing."""
        tops = (name.partition(".")[0] for name in self.warm_up)
        return next((name for name in tops if find_spec(name) is None), "")


def contestants() -> list[Contestant]:
    """All of them, in the order of the table."""
    descent, closed = "gradient descent", "single pass"
    return [
        Contestant("SimpleTransformer from scratch, AdamW", descent, simple_transformer, TOKENS),
        Contestant("linear head, Adam", descent, adam_head),
        Contestant(
            "logistic regression, scikit-learn", "scikit-learn", sklearn_logistic, warm_up=("sklearn.linear_model",)
        ),
        Contestant("ridge, gcv", closed, ridge),
        Contestant(f"ridge on {RANDOM_FEATURES} relu features, gcv", closed, relu_ridge),
        Contestant("logistic polish of the ridge (default)", closed, logistic_polish),
        Contestant("match=sgd: the same epochs of SGD", closed, partial(matched, "sgd")),
        Contestant("match=gd: as many full steps", closed, partial(matched, "gd")),
        Contestant("match=batch_aware, lambda 1", closed, partial(matched, "batch_aware")),
        Contestant("exact rbf kernel ridge, gcv", closed, rbf_ridge),
    ]


def simple_transformer(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """A :class:`SimpleTransformer` trained from scratch on the token ids."""
    torch.manual_seed(settings.seed)
    model = SimpleTransformer(settings.vocab_size, settings.classes, rows["train_ids"].shape[1])
    train_simple_transformer(
        model,
        rows["train_ids"],
        rows["train_lengths"],
        rows["train_labels"],
        epochs=settings.scratch_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        quiet=settings.quiet,
    )
    return predict(model, rows["test_ids"], rows["test_lengths"]), str(settings.scratch_epochs)


def adam_head(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """A linear layer on the features, cross-entropy, Adam, a new order of the rows in each epoch."""
    torch.manual_seed(settings.seed)
    features_ND, labels_N = rows["train_features"], rows["train_labels"]
    head = nn.Linear(features_ND.shape[1], settings.classes)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate)
    for _epoch in range(settings.epochs):
        for chosen in torch.randperm(len(features_ND)).split(settings.batch_size):
            loss = F.cross_entropy(head(features_ND[chosen]), labels_N[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head(rows["test_features"]).detach(), str(settings.epochs)


def sklearn_logistic(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """scikit-learn's ``LogisticRegression`` at its default settings, but for enough iterations to converge."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=10_000)
    model.fit(rows["train_features"].numpy(), rows["train_labels"].numpy())
    probabilities_NC: Any = model.predict_proba(rows["test_features"].numpy())
    if len(model.classes_) != settings.classes:
        raise InputError("every class must have a training row")
    return torch.from_numpy(probabilities_NC).log(), str(model.n_iter_.max())


def ridge(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """Streamed ridge regression on one-hot targets; one temperature from leave-one-out predictions."""
    statistics = RidgeStatistics(rows["train_features"].shape[1], settings.classes)
    statistics.update(rows["train_features"], rows["train_labels"])
    solution = solve_ridge(statistics)
    return _calibrated(solution, statistics, rows["train_features"], rows), "1"


def relu_ridge(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """The same on random relu features, made block by block."""
    features_ND = rows["train_features"]
    random = RandomFeatures("relu", features_ND.shape[1], RANDOM_FEATURES, seed=settings.seed).fit(features_ND)
    statistics = RidgeStatistics(RANDOM_FEATURES, settings.classes)
    for block_ND, labels_N in zip(features_ND.split(BLOCK), rows["train_labels"].split(BLOCK), strict=True):
        statistics.update(random(block_ND), labels_N)
    solution = solve_ridge(statistics)
    mapped = rows | {"test_features": random(rows["test_features"])}
    return _calibrated(solution, statistics, random(features_ND[:BLOCK]), mapped), "1"


def logistic_polish(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """Logistic regression that starts from the ridge's moments and looks at the features some more times."""
    statistics = RidgeStatistics(rows["train_features"].shape[1], settings.classes)
    statistics.update(rows["train_features"], rows["train_labels"])
    solution = choose_logistic(rows["train_features"], rows["train_labels"], statistics.spectrum())
    return solution.predict(rows["test_features"]), "1 + looks"


def matched(match: str, rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """The head that SGD, full gradient descent or the batch-aware formula give, from one pass.

    Its outputs are fitted to 0 and 1 and are no logits; one temperature from the training rows makes them some.
    """
    features_ND, labels_N = rows["train_features"], rows["train_labels"]
    epochs, size, rate = settings.epochs, settings.batch_size, settings.learning_rate
    if match == "sgd":
        epoch = SGDMap(features_ND.shape[1], settings.classes, rate)
        for batch_BD, labels_B in zip(features_ND.split(size), labels_N.split(size), strict=True):
            epoch.update(batch_BD, labels_B)
        solution = epoch.solve(epochs)
    else:
        statistics = RidgeStatistics(features_ND.shape[1], settings.classes).update(features_ND, labels_N)
        if match == "gd":
            solution = gradient_descent(statistics, epochs, rate)
        else:
            solution = batch_aware(statistics, epochs, size, rate, 1.0)
    temperature = fit_temperature(solution.predict(features_ND), labels_N)
    return solution.predict(rows["test_features"]) / temperature, "1"


def rbf_ridge(rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, str]:
    """Exact kernel ridge regression with all rows in memory; one temperature from leave-one-out predictions."""
    features_ND, labels_N = rows["train_features"], rows["train_labels"]
    section = KernelFeatures("rbf", features_ND.shape[1], len(features_ND), whiten=False, seed=settings.seed)
    section.fit(features_ND)
    targets_NC = F.one_hot(labels_N, settings.classes).double()
    solution = kernel_ridge(section.kernel, features_ND, targets_NC)
    # Of row i of a kernel ridge, what all other rows say of it misses by alpha_i over the inverse's diagonal.
    system_NN = section.kernel(features_ND.double(), features_ND.double())
    system_NN.diagonal().add_(solution.regularization)
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(system_NN))
    row_sum_N = inverse_NN.sum(1)
    diagonal_N = inverse_NN.diagonal() - row_sum_N.square() / row_sum_N.sum()
    left_out_NC = targets_NC - solution.dual_NC / diagonal_N[:, None]
    temperature = fit_temperature(left_out_NC, labels_N)
    return solution.predict(section.kernel(rows["test_features"].double(), features_ND.double())) / temperature, "1"


def _calibrated(
    solution: RidgeSolution, statistics: RidgeStatistics, kept_ND: Tensor, rows: dict[str, Tensor]
) -> Tensor:
    """Logits of the test rows: the outputs over the temperature that fits what the *other* rows say of the kept ones.

    Args:
        kept_ND: features of the first training rows, or of all.
    """
    labels_N = rows["train_labels"][: len(kept_ND)]
    (errors_NC,) = leave_one_out_errors(statistics.spectrum(), kept_ND, labels_N, None, [solution.regularization])
    left_out_NC = F.one_hot(labels_N, errors_NC.shape[1]) - errors_NC
    return solution.predict(rows["test_features"]) / fit_temperature(left_out_NC, labels_N)
