"""Rows of a data set through the frozen encoder, and the feature map, into a collection."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer

from linpass.errors import InputError
from linpass.modeling_closed_form import ClosedFormForSequenceClassification
from linpass.singlepass.arguments import SinglePassArguments
from linpass.singlepass.collection import Collection
from linpass.singlepass.features import captured_input, find_head
from linpass.singlepass.loading import Batch
from linpass.singlepass.tasks import Rows, Task, task_of

MAP_ROWS = 2048  # rows that the scale of random features is measured on


class RowReader:
    """Takes batches and gives one :class:`Collection` of all processes' rows.

    A feature map that is fitted to rows (landmarks, scales) is fitted to the first rows of the pass, which wait for it:
    no row goes through the encoder twice. Every process fits it to the same rows, whatever their number.

    Args:
        trainer: of which model, arguments and contexts are used.
        fit_map: the feature map has yet to be fitted; False in later passes, which must use the same.
        like: an empty collection of the kind that is wanted, and of the task; None: what arguments and labels say.
    """

    def __init__(self, trainer: Trainer, fit_map: bool, like: Collection | None = None):
        self.trainer, self.like = trainer, like
        self.task: Task | None = None if like is None else like.task
        self.arguments: SinglePassArguments = trainer.args  # type: ignore[assignment]
        self.model: Any = trainer.model
        self.collection: Collection | None = None
        self.wanted = rows_for_map(self.model) if fit_map else 0
        self._waiting: list[Rows | None] = []

    @property
    def waits(self) -> bool:
        """Whether rows are still kept for the feature map to be fitted."""
        return self.wanted > 0

    def take(self, batch: Batch) -> None:
        """One batch of this process; every process takes one in every step, the last may hold no rows.

        Raises:
            InputError: labels or features that cannot be used, each named by row.
        """
        rows = None if batch.inputs is None else self._encode(batch)
        if not self.waits:
            self._collect(rows)
            return
        self._waiting.append(rows)
        if batch.seen >= self.wanted:
            self._fit_map()

    def finish(self) -> Collection:
        """The collection of all processes' rows.

        Raises:
            InputError: there was no row.
        """
        if self.waits:
            self._fit_map()
        return self.merged()

    def merged(self) -> Collection:
        """What all processes have collected so far, on each of them; this reader goes on with its own."""
        if self.arguments.world_size == 1:
            if self.collection is None:
                raise InputError("train_dataset must hold at least one row with a label, got none")
            return self.collection
        shares = _gather((None if self.collection is None else _on_cpu(self.collection.state_dict()), self.task))
        filled = [(state, task) for state, task in shares if state is not None]
        if not filled:
            raise InputError("train_dataset must hold at least one row with a label, got none")
        self.task = self.task or filled[0][1]
        result = None
        for state, _task in filled:  # in the order of the processes: the same sums on each of them
            part = self.new_collection()
            part.load_state_dict(state)
            if result is None:
                result = part
            else:
                result.merge(part)
        assert result is not None
        return result

    def new_collection(self) -> Collection:
        """An empty one, for the rows of this reader's task."""
        if self.like is not None:
            return self.like.empty(self.like.every_row)
        assert self.task is not None
        head = find_head(self.model)[1]
        width = head.in_features if self.arguments.streamed else self.model.config.pooled_width
        intercept = head.bias is not None
        return Collection(self.arguments, width, self.task, intercept, self.arguments.device)

    def _encode(self, batch: Batch) -> Rows:
        inputs = dict(self.trainer._prepare_inputs(batch.inputs))  # type: ignore[arg-type]
        name = self.trainer.label_names[0] if self.trainer.label_names else "labels"
        labels = inputs.pop(name, None)
        if labels is None:
            raise InputError(
                f"train_dataset must have a column {name!r} (or 'label'); the model is given {sorted(inputs)}"
            )
        if self.task is None:
            self.task = task_of(self.model, find_head(self.model)[1].out_features, labels)
        with (
            captured_input(self.model, self._source(), self.task.every_token) as features_of,
            self.trainer.compute_loss_context_manager(),
        ):
            features = features_of(inputs)
        return self.task.rows(features, labels, batch.weights, batch.row_ids)

    def _source(self) -> nn.Module:
        """The module whose input is a row's features before the feature map."""
        if isinstance(self.model, ClosedFormForSequenceClassification):
            return self.model.feature_map
        return find_head(self.model)[1]

    @torch.no_grad()
    def _collect(self, rows: Rows | None) -> None:
        if rows is None:
            return
        if isinstance(self.model, ClosedFormForSequenceClassification) and self.arguments.streamed:
            features_ND = self.model.feature_map(rows.features_ND.to(self.model.classifier.weight.dtype))
            rows = Rows(features_ND, rows.targets, rows.weights_N, rows.row_ids)
        if self.collection is None:
            self.collection = self.new_collection()
        self.collection.add(rows)

    def _fit_map(self) -> None:
        """Fit the feature map to the first rows of the pass, and let those that waited through it."""
        waiting, self._waiting = self._waiting, []
        mine = [None if rows is None else rows.features_ND.cpu() for rows in waiting]
        shares = [mine] if self.arguments.world_size == 1 else _gather(mine)
        in_order = [rows for step in range(len(mine)) for share in shares if (rows := share[step]) is not None]
        if not in_order:
            raise InputError("train_dataset must hold at least one row with a label, got none")
        device = self.model.classifier.weight.device
        try:
            self.model.feature_map.fit(torch.cat(in_order)[: self.wanted].to(device), self.arguments.seed)
        except ValueError as error:
            raise InputError(f"kernel={self.model.config.feature_map!r}: {error}") from error
        self.wanted = 0
        for rows in waiting:
            self._collect(rows)


def rows_for_map(model: Any) -> int:
    """How many rows the model's feature map is fitted to; 0 where nothing of it depends on rows."""
    config = model.config
    if not isinstance(model, ClosedFormForSequenceClassification):
        return 0
    if config.feature_map == "nystrom":
        return max(config.num_features, MAP_ROWS)
    return MAP_ROWS if config.feature_map in ("relu", "rff") and config.bandwidth is None else 0


def _gather(value: Any) -> list[Any]:
    """The value of every process, on each of them."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _on_cpu(part) for name, part in state.items()}
    return state.cpu()
