"""The arguments of single-pass training: those of transformers' Trainer, and what a closed-form head needs."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from linpass.errors import InputError

KERNELS = ("linear", "relu", "rff", "nystrom", "rbf", "laplace", "polynomial", "arc_cosine", "deep")
STREAMED = ("linear", "relu", "rff", "nystrom")  # one pass, and memory that does not grow with the rows
ESTIMATORS = ("auto", "ridge", "discriminant", "logistic")
MATCHES = ("ridge", "gd", "sgd", "batch_aware")
PRECISIONS = ("mixed", "float64", "tsqr")
POOLINGS = ("mean", "first", "last")
CRITERIA = ("auto", "gcv", "kfold", "loo")


@dataclass
class SinglePassArguments(TrainingArguments):
    """Arguments of :class:`linpass.singlepass.SinglePassTrainer`.

    ``num_train_epochs``, ``learning_rate``, ``weight_decay`` and the batch size have a part in the result with the
    ``match`` that imitates them, and with no other; the batch size sets how many rows go through the encoder at a time.

    Raises:
        InputError: a value breaks its rule.
    """

    kernel: str = field(
        default="linear",
        metadata={
            "help": "linear: the model's own nn.Linear, an ordinary checkpoint. One pass too: relu, rff (random "
            "features), nystrom (landmarks). With all features in memory: rbf, laplace, polynomial, arc_cosine, deep."
        },
    )
    num_features: int = field(
        default=2048, metadata={"help": "Random features, or landmarks (also of nystrom's large relative, see below)."}
    )
    bandwidth: float | None = field(
        default=None, metadata={"help": "Length scale of rff, nystrom, rbf and laplace; none: the median distance."}
    )
    degree: int = field(default=3, metadata={"help": "Of the polynomial kernel."})
    depth: int = field(default=2, metadata={"help": "Layers of the deep kernel."})
    exact_rows: int = field(
        default=10_000,
        metadata={
            "help": "rbf, laplace, polynomial, arc_cosine, deep: up to so many rows the system is solved exactly, "
            "above them on num_features landmarks by preconditioned conjugate gradient."
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "mean, first or last token, into a head of this package; none: what the model's own head is given; "
            "of an encoder without a head, or with another kernel than linear, mean, or last if it is a decoder."
        },
    )
    normalize: bool = field(default=False, metadata={"help": "Scale every row of features to norm one."})
    regularization: str = field(
        default="auto",
        metadata={
            "help": "A number as scikit-learn's alpha, or how to choose one: gcv, kfold (fold statistics of the same "
            "pass), loo (a second look at the features, which are kept in memory); auto: gcv, and the loss of held-out "
            "rows for estimator=logistic."
        },
    )
    folds: int = field(default=5, metadata={"help": "Of regularization=kfold."})
    match: str = field(
        default="ridge",
        metadata={
            "help": "What the solution equals: ridge regression; gd: num_train_epochs steps of gradient descent; "
            "sgd: that many epochs of mini-batch SGD in the order of the data, exactly; batch_aware: the formula of "
            "compute_batch_aware_solution."
        },
    )
    estimator: str = field(
        default="auto",
        metadata={
            "help": "Of match=ridge. ridge: squared error; discriminant: the linear discriminant in the same sums; "
            "logistic: logistic regression started and preconditioned by them, on rows kept in memory; auto: logistic "
            "where a row has one label, the kernel is linear and the regularization auto, else ridge."
        },
    )
    kept_rows: int = field(
        default=100_000, metadata={"help": "Rows that estimator=logistic keeps at most; of more, a random sample."}
    )
    momentum: float = field(default=0.0, metadata={"help": "Of match=sgd."})
    class_weight: str | None = field(
        default=None, metadata={"help": "balanced, or one weight per class; none: every row counts the same."}
    )
    sample_weight_column: str | None = field(default=None, metadata={"help": "Column with the weight of a row."})
    precision: str = field(
        default="mixed",
        metadata={
            "help": "Of the sums: mixed (float32 products, float64 sums), float64, or tsqr (a streamed QR "
            "factorisation, for features that are nearly dependent)."
        },
    )
    calibrate: bool = field(
        default=True,
        metadata={
            "help": "Scale the logits by one temperature, so that their softmax is a probability: from leave-one-out "
            "predictions of calibration_rows rows. Changes no prediction. Classification with match=ridge."
        },
    )
    calibration_rows: int = field(default=2048, metadata={"help": "Rows of features kept for calibrate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regularization = parse_regularization(self.regularization)  # pyright: ignore[reportAttributeAccessIssue]
        self.class_weight = parse_class_weight(self.class_weight)  # pyright: ignore[reportAttributeAccessIssue]
        self.check_closed_form()

    def check_closed_form(self) -> None:
        """Raise InputError for fields out of their range, or that do not fit each other."""
        choices = {"kernel": KERNELS, "match": MATCHES, "precision": PRECISIONS, "estimator": ESTIMATORS}
        if self.pooling is not None:
            choices["pooling"] = POOLINGS
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        least = {"num_features": 1, "degree": 1, "depth": 1, "exact_rows": 1, "folds": 2, "kept_rows": 2}
        least |= {"calibration_rows": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise InputError(f"{name}={getattr(self, name)} must be {bound} or more")
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise InputError(f"bandwidth={self.bandwidth} must be more than 0")
        regularization: Any = self.regularization
        positive = isinstance(regularization, float) and regularization > 0
        whole_epochs = float(self.num_train_epochs).is_integer() and self.num_train_epochs >= 0
        streamed = ", ".join(STREAMED)
        rules = {
            "match='batch_aware' needs a number above 0 as regularization": (self.match != "batch_aware" or positive),
            "match='gd' needs num_train_epochs of 1 or more": self.match != "gd" or self.num_train_epochs >= 1,
            f"estimator='logistic' needs regularization auto or a number above 0, not {self.regularization!r}": (
                self.estimator != "logistic" or self.regularization == "auto" or positive
            ),
            f"match={self.match!r} needs a kernel of one pass: {streamed}": self.match == "ridge" or self.streamed,
            "match='sgd' weighs every row the same: class_weight, sample_weight_column must not be set": (
                self.match != "sgd" or not (self.class_weight or self.sample_weight_column)
            ),
            f"match='sgd' needs momentum from 0 to below 1, not {self.momentum}": (
                self.match != "sgd" or 0 <= self.momentum < 1
            ),
            f"match={self.match!r} needs whole num_train_epochs, not {self.num_train_epochs}": (
                self.match == "ridge" or whole_epochs
            ),
            f"estimator={self.estimator!r} needs match='ridge'": (
                self.match == "ridge" or self.estimator in ("auto", "ridge")
            ),
            f"estimator={self.estimator!r} needs a kernel of one pass: {streamed}": (
                self.streamed or self.estimator in ("auto", "ridge")
            ),
            "class_weight needs regularization auto, gcv, loo or a number": (
                not self.class_weight or self.regularization != "kfold"
            ),
            f"regularization='kfold' needs a kernel of one pass: {streamed}": (
                self.streamed or self.regularization != "kfold"
            ),
            "load_best_model_at_end=True has no meaning in a single pass": not self.load_best_model_at_end,
            "fsdp and deepspeed must not be set: a pass wraps no model": not self.fsdp and not self.deepspeed,
        }
        for rule, holds in rules.items():
            if not holds:
                raise InputError(rule)

    @property
    def streamed(self) -> bool:
        """Whether the pass keeps sums only, and not the rows."""
        return self.kernel in STREAMED

    @property
    def own_head(self) -> bool:
        """Whether the solution does not fit an ordinary linear layer on the model's own features."""
        return self.kernel != "linear" or self.normalize or self.pooling is not None


def parse_regularization(value: Any) -> str | float:
    """A criterion's name or a number.

    Raises:
        InputError: neither, or a number below 0.
    """
    if value in CRITERIA:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"regularization={value!r} must be a number, 0 or more, or one of {', '.join(CRITERIA)}")
    return number


def parse_class_weight(value: Any) -> None | str | list[float]:
    """None, "balanced" or positive numbers, also given as "1,2.5"."""
    if value in (None, "balanced", "none", ""):
        return "balanced" if value == "balanced" else None
    try:
        parts = value.split(",") if isinstance(value, str) else value
        weights = [float(part) for part in parts]
    except (TypeError, ValueError):
        weights = [math.nan]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise InputError(f"class_weight={value!r} must be balanced, or numbers, 0 or more, one per class")
    return weights
