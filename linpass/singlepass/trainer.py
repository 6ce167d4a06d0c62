"""A Trainer that fits a head in closed form: one pass over the data through a frozen encoder, then one solve."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics
from transformers.utils import logging

from linpass.errors import InputError
from linpass.singlepass.arguments import SinglePassArguments, parse_class_weight, parse_regularization
from linpass.singlepass.card import write_card
from linpass.singlepass.chosen_rows import ChosenRows, check_numbers, row_numbers
from linpass.singlepass.collection import Collection
from linpass.singlepass.features import find_head
from linpass.singlepass.fit import fit_head
from linpass.singlepass.heads import with_head, write_head
from linpass.singlepass.kernel_heads import fit_kernel_head
from linpass.singlepass.loading import Batch, RowCollator, batches, count_steps, knows_its_length, order_of
from linpass.singlepass.pass_checkpoint import find_pass, read_pass, resume_pass, save_pass, write_pass
from linpass.singlepass.reading import RowReader, rows_for_map
from linpass.singlepass.tasks import Task
from linpass.training.checkpoints import StopSignals

logger = logging.get_logger(__name__)

# What refit may change: nothing that another pass would be needed for.
OF_THE_SOLVE = (
    "regularization",
    "class_weight",
    "match",
    "estimator",
    "calibrate",
    "num_train_epochs",
    "learning_rate",
    "weight_decay",
)


class SinglePassTrainer(Trainer):
    """A ``transformers.Trainer`` whose ``train`` visits every row once and then solves for the head.

    The encoder is frozen, in eval mode, and not wrapped. With ``kernel="linear"`` the solution is written into the
    model's own final ``nn.Linear``: the checkpoint is an ordinary one. Other kernels, ``normalize``, ``pooling`` and
    encoders without a head turn ``trainer.model`` into a :class:`ClosedFormForSequenceClassification`.

    Every row counts once, whatever the batch size, ``dataloader_drop_last``, accumulation or the number of processes;
    these share out the rows and merge their sums once. Rows are visited in the order of the data set, except that for
    the maps that are fitted to the first rows (``nystrom``, ``rff``, ``relu``) a map-style data set is visited in an
    order drawn from the seed.

    Attributes:
        solution: the :class:`RidgeSolution` of the last fit, before the temperature; None before.
        temperature: what it was divided by in the model; None for 1.
        collection: the sums (and rows) of the pass, see :class:`Collection`.
        rows: how many rows of data sets they hold.

    Raises:
        InputError: arguments, a model, rows or labels that cannot be used.
    """

    args: SinglePassArguments
    model: PreTrainedModel

    def __init__(self, model: Any = None, args: SinglePassArguments | None = None, *arguments: Any, **keywords: Any):
        args = SinglePassArguments("tmp_trainer") if args is None else args
        if not isinstance(args, SinglePassArguments):
            raise InputError(f"args={type(args).__name__} must be SinglePassArguments")
        if isinstance(model, nn.Module):
            model = with_head(model, args)
        max_steps, args.max_steps = args.max_steps, max(args.max_steps, 1)
        try:  # transformers asks how many steps a stream has; a pass ends with its rows
            super().__init__(model, args, *arguments, **keywords)
        finally:
            args.max_steps = max_steps
        # Each batch's loss is its own mean: with several processes transformers would otherwise expect the model to
        # divide by all rows, and multiply the losses of one that does not by the number of processes.
        self.model_accepts_loss_kwargs = False
        if args.auto_find_batch_size and args.world_size > 1:  # one process alone would share out the rows anew
            raise InputError(f"auto_find_batch_size=True needs one process, not {args.world_size}")
        if args.match == "sgd" and args.world_size > 1:
            raise InputError(f"match='sgd' follows one order of the rows: {args.world_size} processes must be 1")
        self.solution: Any = None
        self.temperature: float | None = None
        self.loss: float | None = None
        self.collection: Collection | None = None
        self.task: Task | None = None
        self.rows = self.rows_seen = self.rows_added = 0
        self.forgotten: set[int] = set()

    def call_model_init(self, trial: Any = None) -> Any:
        return with_head(super().call_model_init(trial), self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> TrainOutput:
        """One pass, and the solve; True goes on from the last complete checkpoint in ``output_dir``, a path from that.

        A signal to stop ends it with a checkpoint and without a solution.

        Raises:
            InputError: rows or settings that cannot be used; no checkpoint, a damaged one, or one of another pass.
        """
        return super().train(find_pass(self, resume_from_checkpoint), *arguments, **keywords)

    def update(self, rows: Any) -> dict[str, Any]:
        """Add a data set's rows to those of ``train`` and solve again; the encoder sees only the new ones.

        Returns: what is logged: rows, regularization, temperature, train_loss.
        """
        self._check_trained("update")
        assert self.collection is not None
        self.collection.check_grows()
        more, count = self._read(rows, range(self._next_number(), sys.maxsize))
        return self._add(more, count)

    def save_statistics(self, path: str | Path) -> None:
        """Write what the pass has kept to one file, for :meth:`load_statistics` of a trainer on another machine."""
        self._check_trained("save_statistics")
        write_pass(self, path)

    def load_statistics(self, path: str | Path) -> dict[str, Any]:
        """Add the rows of another trainer's :meth:`save_statistics` to those of this one, if any, and solve again.

        Raises:
            InputError: a broken file, or one of other features or settings; nothing has changed then.
        """
        more, task, count = read_pass(self, path)
        if self.collection is None:
            self.task = task
        elif self.collection.sgd is None:
            more.renumber(self._next_number())
        return self._add(more, count)

    def forget(self, rows: Any) -> dict[str, Any]:
        """Take rows out of the sums, as if they had never been seen, and solve again.

        Args:
            rows: a data set of the same rows with the same labels, or numbers of rows of ``train_dataset``. With
                ``regularization="kfold"`` it must be numbers: a row has to leave the fold that it was in.
        """
        self._check_trained("forget")
        assert self.collection is not None
        self.collection.check_forgets()
        numbers = row_numbers(rows)
        if numbers is None and self.collection.by_fold:
            raise InputError("forget(rows) needs row numbers with regularization='kfold', not a data set")
        if numbers is None:
            gone, count = self._read(rows, range(sys.maxsize), every_row=True)
        else:
            if not knows_its_length(self.train_dataset):
                raise InputError("forget(rows) needs a data set of the rows: those of train_dataset have no numbers")
            total = len(self.train_dataset)  # type: ignore[arg-type]
            seen = order_of(total, self.args, self._shuffles())[: self.rows_seen]
            check_numbers(numbers, total, set(seen.tolist()), self.forgotten)
            gone, count = self._read(ChosenRows(self.train_dataset, numbers), numbers, every_row=True)
        left = self.collection.copy()
        left.subtract(gone, by_number=numbers is not None)
        metrics = self._replace(left, self.rows - count)
        self.forgotten |= set(numbers or ())
        return metrics

    def refit(self, **changes: Any) -> dict[str, Any]:
        """Solve again from what the pass has kept, with other arguments; the encoder is not run.

        Args:
            changes: those fields of :class:`SinglePassArguments` that are named in ``OF_THE_SOLVE``.
        """
        self._check_trained("refit")
        assert self.collection is not None
        for name in changes:
            if name not in OF_THE_SOLVE:
                raise InputError(
                    f"refit({name}=...) must be one of {', '.join(OF_THE_SOLVE)}; others need another pass"
                )
        parsers: dict[str, Any] = {"regularization": parse_regularization, "class_weight": parse_class_weight}
        before = {name: getattr(self.args, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(self.args, name, parsers[name](value) if name in parsers else value)
            self.args.check_closed_form()
            self.collection.check_fits(self.args)
            self._fit()
        except Exception:
            for name, value in before.items():
                setattr(self.args, name, value)
            raise
        self.log(self._described())
        return self._described()

    def create_model_card(self, **facts: Any) -> None:  # type: ignore[override]
        """Write ``README.md`` into ``output_dir``; ``facts`` are the arguments of ``Trainer.create_model_card``."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self, **facts)

    # --- The pass, in the place of the optimizer's loop -------------------------------------------------------------

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """``train`` calls this; again, with a smaller batch, when memory ran out with ``auto_find_batch_size``."""
        if self.train_dataset is None:
            raise InputError("train_dataset must be given: the pass needs rows")
        started = time.time()
        batch_size = batch_size or self._train_batch_size
        self._train_batch_size = batch_size
        self.collection, self.solution, self.temperature, self.forgotten = None, None, None, set()
        self.rows = self.rows_seen = self.rows_added = 0
        reader = RowReader(self, fit_map=True)
        self._begin_state(batch_size)
        if resume_from_checkpoint is not None:
            resume_pass(self, reader, resume_from_checkpoint)
        first_step, first_row = self.state.global_step, self.rows_seen
        self._set_length(batch_size)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self.evaluate(ignore_keys=ignore_keys_for_eval)
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        with StopSignals() as signals:
            stopped = self._visit(reader, batch_size, signals, ignore_keys_for_eval)
        metrics: dict[str, Any] = {}
        if stopped:
            self.solution = None  # an evaluation in the middle may have found one of fewer rows
        else:
            if self.collection is None:  # a callback has stopped the pass, or no row was left of it
                self._solve(reader)
            rows, steps = self.rows_seen - first_row, self.state.global_step - first_step
            metrics = self._described() | speed_metrics("train", started, num_samples=rows, num_steps=steps)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._evaluate_and_save(reader, ignore_keys_for_eval)
            self._memory_tracker.stop_and_update_metrics(metrics)
            self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        self.is_in_train = False
        return TrainOutput(self.state.global_step, metrics.get("train_loss", float("nan")), metrics)

    def _begin_state(self, batch_size: int) -> None:
        callbacks = [*self.callback_handler.callbacks, self.control]
        stateful: Any = [c for c in callbacks if isinstance(c, ExportableState)]
        self.state = TrainerState(stateful_callbacks=stateful)
        self.state.train_batch_size = batch_size
        self.state.num_train_epochs = 1
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.callback_handler.model = self.model

    def _set_length(self, batch_size: int) -> None:
        """How many steps there will be: for the progress bar, and for intervals given as shares."""
        steps = count_steps(self.train_dataset, self.args, batch_size, self.rows_seen)
        self.state.max_steps = sys.maxsize if steps is None else self.state.global_step + steps
        if self.args.max_steps > 0:
            self.state.max_steps = min(self.state.max_steps, self.args.max_steps)
        self.state.compute_steps(self.args, self.state.max_steps)

    def _visit(self, reader: RowReader, batch_size: int, signals: StopSignals, ignore_keys: list[str] | None) -> bool:
        """Read ``train_dataset`` to its end and solve; True when a signal ended it before, with a checkpoint.

        The callbacks hear of the end of the last step when the head is there.
        """
        started, first_row = time.time(), self.rows_seen
        total = len(self.train_dataset) if knows_its_length(self.train_dataset) else None  # type: ignore[arg-type]
        stream = self._batches(self.train_dataset, batch_size, self.rows_seen, self._shuffles())
        batch = next(stream, None) if self.state.global_step < self.state.max_steps else None
        while batch is not None:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            reader.take(batch)
            self.rows = self.rows_seen = batch.seen
            self.state.global_step += 1
            self.state.epoch = self.rows_seen / total if total else 0.0
            batch = next(stream, None) if self.state.global_step < self.state.max_steps else None
            if batch is None:
                self.state.max_steps = self.state.global_step
                self._solve(reader)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            if self.control.should_log:
                rate = (self.rows_seen - first_row) / max(time.time() - started, 1e-9)
                self.log({"rows": self.rows_seen, "rows_per_second": round(rate, 1)})
            if batch is None:
                return False
            if self._any_process(signals.requested):
                save_pass(self, reader)
                return True
            self._evaluate_and_save(reader, ignore_keys)
            if self.control.should_training_stop or self.control.should_epoch_stop:
                return False
        return False

    def _evaluate_and_save(self, reader: RowReader, ignore_keys: list[str] | None) -> None:
        """What the callbacks have asked for; an evaluation in the middle is of the head that the rows so far give."""
        if self.control.should_evaluate and (self.collection is not None or self._solve_so_far(reader)):
            self.evaluate(ignore_keys=ignore_keys)
        if self.control.should_save:
            save_pass(self, reader)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _batches(self, dataset: Any, batch_size: int, start: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        keep = None
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            keep = self._signature_columns
        collator = RowCollator(self.data_collator, keep, self.args.sample_weight_column)
        return batches(dataset, collator, self.args, batch_size, start, shuffle)

    def _read(self, dataset: Any, numbers: Sequence[int], every_row: bool = False) -> tuple[Collection, int]:
        """The collection of another data set, whose rows are called ``numbers``, and how many they are."""
        assert self.collection is not None
        reader = RowReader(self, fit_map=False, like=self.collection.empty(every_row))
        seen = 0
        for batch in self._batches(dataset, self._train_batch_size):
            names = torch.tensor([numbers[int(number)] for number in batch.row_ids], dtype=torch.long)
            reader.take(Batch(batch.inputs, names, batch.weights, batch.seen))
            seen = batch.seen
        if not seen:
            raise InputError("rows must hold at least one row")
        return reader.finish(), seen

    def _shuffles(self) -> bool:
        """Whether the first rows, which the feature map is fitted to, have to be like the others."""
        return rows_for_map(self.model) > 0

    def _next_number(self) -> int:
        """What the next row is called that is not one of ``train_dataset``."""
        first = len(self.train_dataset) if knows_its_length(self.train_dataset) else self.rows_seen  # type: ignore[arg-type]
        return first + self.rows_added

    # --- The solve ----------------------------------------------------------------------------------------------------

    def _solve(self, reader: RowReader) -> None:
        self.collection, self.task = reader.finish(), reader.task
        self._fit()

    def _solve_so_far(self, reader: RowReader) -> bool:
        """Put the head of the rows so far into the model, if they give one."""
        problem = "the feature map waits for more rows"
        if not reader.waits:
            try:
                self.collection, self.task = reader.merged(), reader.task
                self._fit()
                return True
            except InputError as error:
                problem = str(error)
            finally:
                self.collection = None
        logger.warning("step %d: nothing to evaluate yet: %s", self.state.global_step, problem)
        return False

    def _add(self, more: Collection, count: int) -> dict[str, Any]:
        """Solve with the rows of another collection as well; ``count`` rows of its data set."""
        if self.collection is None:
            both = more
        else:
            both = self.collection.copy()
            both.merge(more)
        metrics = self._replace(both, self.rows + count)
        self.rows_added += count
        return metrics

    def _replace(self, collection: Collection, rows: int) -> dict[str, Any]:
        """Solve with other sums, which stay if they have a solution."""
        before = self.collection, self.rows
        self.collection, self.rows = collection, rows
        try:
            return self.refit()
        except Exception:
            self.collection, self.rows = before
            raise

    def _fit(self) -> None:
        """Solve, and write the solution into the head."""
        assert self.collection is not None
        if self.args.streamed:
            head = find_head(self.model)[1]
            fit = fit_head(self.collection, self.args, head.bias is not None)
            write_head(self.model, head, fit.solution, fit.temperature)
        else:
            fit = fit_kernel_head(self.model, self.collection, self.args)  # type: ignore[arg-type]
        if self.task is not None and not self.task.every_token:
            self.model.config.problem_type = self.task.kind  # pyright: ignore[reportAttributeAccessIssue]
        self.solution, self.temperature, self.loss = fit.solution, fit.temperature, fit.loss

    def _described(self) -> dict[str, Any]:
        """What is logged of the solution."""
        regularization = self.solution.regularization
        if isinstance(regularization, torch.Tensor):
            regularization = regularization.tolist()
        described = {"rows": self.rows, "regularization": regularization}
        described |= {"temperature": self.temperature, "train_loss": self.loss}
        return {name: value for name, value in described.items() if value is not None}

    def _check_trained(self, verb: str) -> None:
        if self.collection is None:
            raise InputError(f"{verb}() needs a pass first: call train()")

    def _any_process(self, requested: bool) -> bool:
        if self.args.world_size == 1:
            return requested
        asked = torch.tensor(float(requested), device=self.args.device)
        count: Any = self.accelerator.reduce(asked, reduction="sum")
        return bool(count > 0)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the encoder is the one that was given, and the head comes from the sums."""
