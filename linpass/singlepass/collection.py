"""What one pass keeps of the rows it sees: sums, and rows only where a method cannot do without.

Shapes: N rows, D features, C targets.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from linpass.errors import InputError
from linpass.singlepass.arguments import SinglePassArguments
from linpass.singlepass.descent import SGDMap
from linpass.singlepass.row_store import RowStore, fold_of
from linpass.singlepass.statistics import GroupedStatistics, RidgeStatistics
from linpass.singlepass.tasks import Rows, Task

BYTES_OF_CLASS_SUMS = 4 << 30  # most memory for one Gram matrix per class


# Settings that decide whether a pass keeps something.
ASKS_FOR = {
    "statistics": ("kernel", "match"),
    "sgd": ("kernel", "match"),
    "rows": ("estimator", "regularization"),
    "sample": ("calibrate", "match"),
}


class Collection:
    """The state of a pass; grows by :meth:`add`, by :meth:`merge` of another process's, shrinks by :meth:`subtract`.

    ``statistics`` are the moments, in groups with ``regularization="kfold"`` (by fold) and ``class_weight`` (by class);
    ``sgd`` is the map of ``match="sgd"``; ``rows`` are all rows, for the kernels that need them and for
    ``regularization="loo"``; ``sample`` is the ``calibration_rows`` with the lowest hash of their number.
    What a setting does not need is None.

    Args:
        every_row: keep no samples but all rows where rows are kept: what is to be forgotten may be in any sample.
    """

    def __init__(
        self,
        arguments: SinglePassArguments,
        num_features: int,
        task: Task,
        intercept: bool,
        device: Any,
        every_row: bool = False,
    ):
        kind, num_targets = task.kind, task.num_targets
        # Settings may be changed for a later solve; the rows of a later reading are kept as those of the pass were.
        self.arguments = copy.copy(arguments)
        self._sizes, self.every_row = (num_features, task, intercept, device), every_row
        self.seed, self.task, self.estimator = arguments.seed, task, estimator_for(arguments, task)
        self.statistics: RidgeStatistics | GroupedStatistics | None = None
        self.by_class = arguments.class_weight is not None
        self._check_settings(arguments)
        if arguments.match == "sgd":
            self.sgd = SgdBatches(
                SGDMap(
                    num_features,
                    num_targets,
                    arguments.learning_rate,
                    weight_decay=arguments.weight_decay,
                    momentum=arguments.momentum,
                    fit_intercept=intercept,
                    device=device,
                ),
                arguments.train_batch_size * arguments.gradient_accumulation_steps,
            )
        else:
            self.sgd = None
        if arguments.streamed and self.sgd is None:
            options: dict[str, Any] = {"precision": arguments.precision, "device": device}
            groups = arguments.folds if arguments.regularization == "kfold" else 0
            if self.by_class:
                _check_class_sums(kind, num_targets, num_features)
                groups = num_targets
            self.statistics = (
                GroupedStatistics(groups, num_features, num_targets, **options)
                if groups
                else RidgeStatistics(num_features, num_targets, **options)
            )
        keep = not arguments.streamed or arguments.regularization == "loo"
        self.rows = RowStore() if keep else None
        if self.rows is None and self.estimator == "logistic":
            self.rows = RowStore(None if every_row else arguments.kept_rows, arguments.seed)
        self.sample = None
        if arguments.calibrate and kind != "regression" and arguments.match == "ridge" and self.rows is None:
            self.sample = RowStore(None if every_row else arguments.calibration_rows, arguments.seed)

    def _check_settings(self, arguments: SinglePassArguments) -> None:
        """Raise InputError for what the solve would refuse, before any row is read."""
        _features, task, intercept, _device = self._sizes
        given = arguments.class_weight
        if isinstance(given, list) and len(given) != task.num_targets:
            raise InputError(
                f"class_weight={given} has {len(given)} numbers; it must have one per class, {task.num_targets}"
            )
        if estimator_for(arguments, task) == "discriminant" and not intercept:
            raise InputError("estimator='discriminant' needs a head with a bias; this model's has none")

    def add(self, rows: Rows) -> None:
        """Take in rows.

        Raises:
            InputError: a row has a feature, a label or a weight that cannot be used; nothing has changed then.
        """
        if self.sgd is not None:
            self.sgd.add(rows)
        if isinstance(self.statistics, GroupedStatistics):
            groups_N = rows.targets if self.by_class else fold_of(rows.row_ids, self.seed, len(self.statistics.groups))
            self.statistics.update(rows.features_ND, rows.targets, rows.weights_N, groups_N, row_ids=rows.row_ids)
        elif self.statistics is not None:
            self.statistics.update(rows.features_ND, rows.targets, rows.weights_N, row_ids=rows.row_ids)
        for store in (self.rows, self.sample):
            if store is not None:
                store.add(rows)

    def empty(self, every_row: bool = False) -> "Collection":
        """Another one, for more rows of the same kind."""
        return Collection(self.arguments, *self._sizes, every_row=every_row)

    @property
    def by_fold(self) -> bool:
        """Whether the number of a row decides where it is counted."""
        return isinstance(self.statistics, GroupedStatistics) and not self.by_class

    def check_fits(self, arguments: SinglePassArguments) -> None:
        """Raise InputError for settings of a solve that this pass did not keep what is needed for."""
        self._check_settings(arguments)
        if (self.sgd is None) == (arguments.match == "sgd"):
            raise InputError(f"match={arguments.match!r} needs another pass: match='sgd' keeps steps, the others sums")
        if self.sgd is not None:
            for name in ("learning_rate", "weight_decay"):
                if getattr(arguments, name) != getattr(self.sgd.map, name):
                    raise InputError(
                        f"{name}={getattr(arguments, name)} needs another pass: its steps were made with "
                        f"{getattr(self.sgd.map, name)}"
                    )
        if estimator_for(arguments, self.task) == "logistic" and self.rows is None:
            raise InputError("estimator='logistic' needs another pass, which keeps rows; or give estimator='ridge'")
        if arguments.regularization == "loo" and (self.rows is None or not self._holds_all(self.rows)):
            raise InputError("regularization='loo' needs another pass, which keeps all rows")

    def check_grows(self) -> None:
        """Raise InputError where rows of another pass cannot be added or taken out."""
        if self.sgd is not None:
            raise InputError("match='sgd' depends on the order of all rows: train again with the others")

    def check_forgets(self) -> None:
        """Raise InputError where rows cannot be taken out again."""
        self.check_grows()
        if self.arguments.precision == "tsqr" and self.statistics is not None:
            raise InputError("precision='tsqr' takes no rows back: train with mixed or float64 to forget")

    def merge(self, other: "Collection") -> None:
        """Take in what another collection of the same settings has seen."""
        self.check_grows()
        if self.statistics is not None:
            self.statistics.merge(other.statistics)  # type: ignore[arg-type]
        for mine, others in self._stores(other):
            mine.add(others.all())

    def subtract(self, other: "Collection", by_number: bool) -> None:
        """Forget what another collection (of ``every_row``) has seen, as if it had never been here.

        A sample that has lost rows stays that much smaller.

        Args:
            by_number: the rows have the numbers that they had here; else they are known by what they hold.
        Raises:
            InputError: nothing would be left, or more is to be forgotten than there is. Something may have changed
                then: see :meth:`copy`.
        """
        self.check_grows()
        complete = [self._holds_all(mine) for mine, _others in self._stores(other)]
        if self.statistics is not None:
            self.statistics.subtract(other.statistics)  # type: ignore[arg-type]
        for (mine, others), is_complete in zip(self._stores(other), complete, strict=True):
            found = mine.remove(others.all(), by_number)
            if is_complete and found < len(others):
                raise InputError(
                    f"rows: {len(others) - found} of the {len(others)} to forget must be rows of the pass that are "
                    "still there; they are not"
                )
        if not (self.statistics.rows if self.statistics is not None else len(self.rows or ())):
            raise InputError("rows: all would be forgotten; at least one must stay")

    def copy(self) -> "Collection":
        """Another collection of the same rows; kept rows share their memory."""
        result = copy.copy(self)
        result.statistics, result.sgd = copy.deepcopy(self.statistics), copy.deepcopy(self.sgd)
        result.rows = None if self.rows is None else self.rows.copy()
        result.sample = None if self.sample is None else self.sample.copy()
        return result

    def renumber(self, first: int) -> None:
        """Count the numbers of the kept rows from another one on, so that they are not those of other rows."""
        for store in (self.rows, self.sample):
            if store is not None:
                store.renumber(first)

    def _stores(self, other: "Collection") -> list[tuple[RowStore, RowStore]]:
        pairs = ((self.rows, other.rows), (self.sample, other.sample))
        return [(mine, others) for mine, others in pairs if mine is not None and others is not None]

    def _holds_all(self, store: RowStore) -> bool:
        return self.statistics is None or len(store) == self.statistics.rows

    def total(self) -> RidgeStatistics:
        """The moments of all rows; classes count as they come."""
        if self.statistics is None:
            raise InputError("no sums were kept with these settings: match='sgd', or a kernel that keeps all rows")
        return self.statistics.total() if isinstance(self.statistics, GroupedStatistics) else self.statistics

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, by part."""
        parts = {"statistics": self.statistics, "sgd": self.sgd, "rows": self.rows, "sample": self.sample}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what :meth:`state_dict` was taken of; rows that these settings do not keep are left out.

        Raises:
            InputError: of a pass that kept other sums, or not the rows that these settings need.
        """
        for name in ("statistics", "sgd", "rows", "sample"):
            part = getattr(self, name)
            if part is None:
                continue
            if name not in state:
                given = " and ".join(f"{field}={getattr(self.arguments, field)!r}" for field in ASKS_FOR[name])
                raise InputError(f"{given} ask for {name}, of which the pass kept none: its settings were others")
            part.load_state_dict(state[name])


def estimator_for(arguments: SinglePassArguments, task: Task) -> str:
    """ "ridge", "discriminant" or "logistic".

    Raises:
        InputError: the one that is asked for needs one label per row.
    """
    one_label = task.kind == "single_label_classification"
    if arguments.estimator == "auto":
        suits = one_label and not task.every_token and arguments.kernel == "linear"
        free = arguments.match == "ridge" and arguments.regularization == "auto"
        return "logistic" if suits and free else "ridge"
    if arguments.estimator != "ridge" and not one_label:
        raise InputError(f"estimator={arguments.estimator!r} needs one label per row, not problem_type={task.kind!r}")
    return arguments.estimator


def _check_class_sums(kind: str, num_targets: int, num_features: int) -> None:
    if kind != "single_label_classification":
        raise InputError(f"class_weight needs one label per row, not problem_type={kind!r}")
    needed = 8 * num_targets * num_features * (num_features + num_targets)
    if needed > BYTES_OF_CLASS_SUMS:
        raise InputError(
            f"class_weight keeps one matrix per class: {num_targets} classes of {num_features} features need "
            f"{needed / 2**30:.1f} GiB, more than {BYTES_OF_CLASS_SUMS >> 30}; give sample_weight_column instead"
        )


class SgdBatches:
    """Rows in their order, handed to an :class:`SGDMap` in batches of the size that is imitated."""

    def __init__(self, sgd_map: SGDMap, batch_size: int):
        self.map, self.batch_size = sgd_map, batch_size
        self._features: list[Tensor] = []
        self._targets: list[Tensor] = []
        self.rows = 0
        self.classes = torch.empty(0, dtype=torch.long)  # that were seen, where targets are classes

    def add(self, rows: Rows) -> None:
        """Take in the next rows; those that do not fill a batch wait."""
        self._features.append(rows.features_ND)
        self._targets.append(rows.targets)
        self.rows += len(rows.targets)
        if not rows.targets.is_floating_point():
            self.classes = torch.cat((self.classes, rows.targets.cpu())).unique()
        features_ND, targets = torch.cat(self._features), torch.cat(self._targets)
        whole = len(features_ND) // self.batch_size * self.batch_size
        for start in range(0, whole, self.batch_size):
            self.map.update(features_ND[start : start + self.batch_size], targets[start : start + self.batch_size])
        self._features, self._targets = [features_ND[whole:]], [targets[whole:]]

    def finish(self) -> SGDMap:
        """The map with the last, smaller batch in it; more rows may come here afterwards."""
        if not self._features or not len(self._features[0]):
            return self.map
        finished = copy.deepcopy(self.map)
        return finished.update(torch.cat(self._features), torch.cat(self._targets))

    def state_dict(self) -> dict[str, Tensor]:
        waiting = {"waiting_features": self._features, "waiting_targets": self._targets}
        state = {f"map.{name}": tensor for name, tensor in self.map.state_dict().items()}
        state |= {"rows": torch.tensor(self.rows), "classes": self.classes}
        return state | {n: torch.cat(parts) for n, parts in waiting.items() if parts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rows, self.classes = int(state["rows"]), state["classes"]
        self.map.load_state_dict({k.removeprefix("map."): v for k, v in state.items() if k.startswith("map.")})
        self._features = [state["waiting_features"]] if "waiting_features" in state else []
        self._targets = [state["waiting_targets"]] if "waiting_targets" in state else []
