"""A pass that can be interrupted: its sums, how many rows they hold, and of which features they are."""

import json
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from linpass.errors import InputError
from linpass.modeling_closed_form import ClosedFormForSequenceClassification
from linpass.singlepass.collection import Collection
from linpass.singlepass.features import find_head
from linpass.singlepass.loading import knows_its_length
from linpass.singlepass.reading import RowReader
from linpass.singlepass.statistics_file import load_statistics, write_statistics
from linpass.singlepass.tasks import Task, task_of
from linpass.training.checkpoints import (
    STAGING,
    clean_up,
    compare_runs,
    explain_write_error,
    find_damage,
    last_complete_checkpoint,
    publish,
    read_manifest,
    rotate,
    seal,
)

if TYPE_CHECKING:
    from linpass.singlepass.trainer import SinglePassTrainer

logger = logging.get_logger(__name__)

SUMS_NAME = "collection.safetensors"
MAP_NAME = "feature_map.safetensors"
PASS_NAME = "pass.json"
STATE_NAME = "trainer_state.json"
PROBED = 1024  # values of each parameter that its fingerprint looks at
# What the features and the sums of a pass depend on, beside the model and the rows.
OF_THE_SUMS = ("kernel", "num_features", "bandwidth", "degree", "depth", "pooling", "normalize")
OF_THE_SUMS += ("precision", "bf16", "fp16", "calibrate", "calibration_rows", "estimator", "kept_rows")


def save_pass(trainer: "SinglePassTrainer", reader: RowReader) -> None:
    """Write ``checkpoint-STEP``: the sums, the row to go on from, and the model as well when it has its head.

    The folder is complete or not there, see :mod:`linpass.training.checkpoints`. While rows wait for the feature map
    to be fitted there is nothing to write yet.
    """
    if reader.waits:
        logger.warning(
            "no checkpoint: the first %d rows, which the feature map is fitted to, are not there yet", reader.wanted
        )
        return
    done = trainer.collection is not None
    collection, task = (trainer.collection, trainer.task) if done else (reader.merged(), reader.task)
    if trainer.is_world_process_zero():
        assert collection is not None
        assert task is not None
        output = Path(str(trainer.args.output_dir))
        clean_up(output)
        try:
            _write(trainer, collection, task, output, with_model=done)
        except Exception as error:
            problem = explain_write_error(error)
            shutil.rmtree(output / STAGING, ignore_errors=True)
            if problem is None:
                raise
            raise InputError(f"checkpoint-{trainer.state.global_step} could not be written: {problem}") from error
    trainer.accelerator.wait_for_everyone()


def _write(trainer: "SinglePassTrainer", collection: Collection, task: Task, output: Path, with_model: bool) -> None:
    folder = output / STAGING / f"checkpoint-{trainer.state.global_step}"
    folder.mkdir(parents=True)
    if with_model:
        trainer._save(str(folder))
    save_file(_flat(collection.state_dict()), folder / SUMS_NAME)
    if isinstance(trainer.model, ClosedFormForSequenceClassification):
        buffers = {name: value.contiguous() for name, value in trainer.model.feature_map.state_dict().items()}
        save_file(buffers, folder / MAP_NAME)
    described = {"rows_seen": trainer.rows_seen, "kind": task.kind, "num_targets": task.num_targets}
    (folder / PASS_NAME).write_text(json.dumps(described) + "\n", encoding="utf-8")
    trainer.state.save_to_json(str(folder / STATE_NAME))
    seal(folder, trainer.state.global_step, identity(trainer))
    publish(folder, output / folder.name)
    rotate(output / folder.name, trainer.args.save_total_limit)


def find_pass(trainer: "SinglePassTrainer", wish: str | Path | bool | None) -> str | None:
    """The checkpoint to go on from: the given one, the last complete one of ``output_dir`` for True, else None.

    Raises:
        InputError: there is none, or the given one is damaged or of the gradient's Trainer.
    """
    if not wish:
        return None
    if wish is True:
        output = Path(str(trainer.args.output_dir))
        if trainer.is_world_process_zero():
            clean_up(output)
        trainer.accelerator.wait_for_everyone()
        wish = last_complete_checkpoint(output)
        if wish is None:
            raise InputError(f"resume_from_checkpoint=True: {str(output)!r} must hold a complete checkpoint")
    folder = Path(wish)
    problem = None
    if not (folder / PASS_NAME).is_file():
        problem = f"of a single pass; {PASS_NAME} is missing"
    elif damage := find_damage(folder):
        problem = f"that is complete: {damage}"
    if problem is not None:
        raise InputError(f"resume_from_checkpoint={str(folder)!r} must be a checkpoint {problem}")
    return str(folder)


def resume_pass(trainer: "SinglePassTrainer", reader: RowReader, checkpoint: str | Path) -> None:
    """Put trainer and reader where :func:`save_pass` left them; any batch size and number of processes may go on.

    Raises:
        InputError: a pass with other features, settings or rows.
    """
    folder = Path(checkpoint)
    compare_runs(read_manifest(folder)["run"] or {}, identity(trainer), folder.name)
    described = json.loads((folder / PASS_NAME).read_text(encoding="utf-8"))
    if isinstance(trainer.model, ClosedFormForSequenceClassification) and trainer.args.streamed:
        trainer.model.feature_map.load_state_dict(load_file(folder / MAP_NAME))
    reader.wanted = 0
    reader.task = _task(trainer, described)
    if trainer.args.process_index == 0:  # the sums of all processes; the others begin with none
        reader.collection = reader.new_collection()
        reader.collection.load_state_dict(_nested(load_file(folder / SUMS_NAME)))
    trainer.rows = trainer.rows_seen = described["rows_seen"]
    state = TrainerState.load_from_json(str(folder / STATE_NAME))
    trainer.state.global_step, trainer.state.epoch = state.global_step, state.epoch
    trainer.state.log_history = state.log_history


class SumsOfPass:
    """The tensors in a file that :func:`write_pass` wrote."""

    def __init__(self, device: Any = None):
        self.device = device
        self.tensors: dict[str, Tensor] = {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tensors = state


def write_pass(trainer: "SinglePassTrainer", path: str | Path) -> None:
    """One file with everything that the last pass keeps, whole or not at all; see :func:`read_pass`."""
    assert trainer.collection is not None
    assert trainer.task is not None
    described = {"rows": trainer.rows, "kind": trainer.task.kind, "num_targets": trainer.task.num_targets}
    metadata = {"pass": json.dumps(described), "sums": json.dumps(identity_of_sums(trainer, fitted=True))}
    if trainer.is_world_process_zero():
        write_statistics(path, SumsOfPass.__name__, {}, _flat(trainer.collection.state_dict()), metadata)
    trainer.accelerator.wait_for_everyone()


def read_pass(trainer: "SinglePassTrainer", path: str | Path) -> tuple[Collection, Task, int]:
    """What :func:`write_pass` wrote, of the same features: the collection, its task and how many rows it has seen.

    Raises:
        InputError: no such file, a broken one, or one of other features or settings.
    """
    sums, metadata = load_statistics(SumsOfPass, path, None)
    compare_runs(json.loads(metadata["sums"]), identity_of_sums(trainer, fitted=True), str(path))
    described = json.loads(metadata["pass"])
    reader = RowReader(trainer, fit_map=False, like=None if trainer.collection is None else trainer.collection.empty())
    reader.task = _task(trainer, described)
    collection = reader.new_collection()
    collection.load_state_dict(_nested(sums.tensors))
    return collection, reader.task, described["rows"]


def identity(trainer: "SinglePassTrainer") -> dict[str, Any]:
    """What decides the sums of a pass, as plain JSON values."""
    run = identity_of_sums(trainer)
    rows = trainer.train_dataset
    run["data"]["rows"] = len(rows) if knows_its_length(rows) else None  # type: ignore[arg-type]
    for name in ("seed", "data_seed"):
        run["training"][name] = getattr(trainer.args, name)
    return run


def identity_of_sums(trainer: "SinglePassTrainer", fitted: bool = False) -> dict[str, Any]:
    """What two passes must have in common for their sums to be added.

    Args:
        fitted: compare feature maps as they have been fitted to rows, and not only how they are made.
    """
    arguments = trainer.args if trainer.collection is None else trainer.collection.arguments
    training = {name: getattr(arguments, name) for name in OF_THE_SUMS}
    training["sample_weight_column"] = arguments.sample_weight_column
    training["match"] = "sgd" if arguments.match == "sgd" else "ridge, gd or batch_aware"
    keeps = {"kfold": f"kfold of {arguments.folds}, seed {arguments.seed}", "loo": "loo"}
    training["regularization"] = keeps.get(str(arguments.regularization), "gcv or a number")
    training["class_weight"] = None if arguments.class_weight is None else "sums per class"
    if arguments.match == "sgd":
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
        training |= {"batch": batch, "learning_rate": arguments.learning_rate}
        training |= {"weight_decay": arguments.weight_decay, "momentum": arguments.momentum}
    head = find_head(trainer.model)[1]
    fingerprint = features_fingerprint(trainer.model, fitted and arguments.streamed)
    data = {"labels": head.out_features, "features": fingerprint}
    return {"model": {}, "training": training, "data": data}


def features_fingerprint(model: Any, fitted: bool = False) -> str:
    """A checksum of what the features come from: every parameter but the head's, by its shape and some of its values.

    Args:
        fitted: buffers as well, among them the feature map that was fitted to the rows; a checkpoint brings its own.
    """
    head = find_head(model)[0]
    checksum = 0
    for name, parameter in [*model.named_parameters(), *(model.named_buffers() if fitted else ())]:
        if not name.startswith(f"{head}."):
            values = parameter.detach().flatten()[:PROBED].float().cpu()
            checksum = zlib.crc32(f"{name}{tuple(parameter.shape)}".encode(), checksum)
            checksum = zlib.crc32(values.numpy().tobytes(), checksum)
    return f"{type(model).__name__}-{checksum:08x}"


def _task(trainer: "SinglePassTrainer", described: dict[str, Any]) -> Task:
    trainer.model.config.problem_type = trainer.model.config.problem_type or described["kind"]
    return task_of(trainer.model, described["num_targets"], torch.empty(0))


def _flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """One level of names, joined by a slash; safetensors has no other."""
    flat: dict[str, Tensor] = {}
    for name, part in state.items():
        flat |= _flat(part, f"{prefix}{name}/") if isinstance(part, dict) else {prefix + name: part.contiguous()}
    return flat


def _nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        part, _slash, rest = name.partition("/")
        nested.setdefault(part, {})[rest] = tensor
    return nested
