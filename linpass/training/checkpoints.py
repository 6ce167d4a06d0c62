"""A Trainer that can be killed at any moment: complete checkpoints or none, stops on signals and on NaN.

A checkpoint is written to ``.incomplete/checkpoint-N``. ``manifest.json`` is its last file: the size and CRC-32 of all
others, and what run this is. When everything has reached the disk (fsync) the folder is renamed to ``checkpoint-N``;
only then are older ones deleted, each moved to ``.discarded`` first. So a folder called ``checkpoint-N`` is complete,
whenever the process was killed; what a full disk or a bad copy did to it later, the manifest shows.
"""

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Trainer, TrainingArguments

from linpass.errors import InputError
from linpass.training.tokenization import tokenizer_fingerprint

MANIFEST = "manifest.json"
STAGING = ".incomplete"
DISCARDED = ".discarded"
HOW_TO_GO_ON = "linpass train --resume"


class DivergedError(InputError):
    """The loss, a gradient or a weight is NaN or infinite: training on would be of no use."""


# --- Folders ----------------------------------------------------------------------------------------------------------


def seal(folder: Path, step: int, run: dict[str, Any] | None = None) -> None:
    """Bring every file of ``folder`` to the disk and write the manifest that makes it a complete checkpoint.

    Cost: reads all files once; CRC-32 runs at about 3 GB/s from the page cache, fsync at the speed of the disk.

    Raises:
        OSError: the disk is full or fails; delayed writes are reported here at the latest.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files, "run": run}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(inner)


def publish(staged: Path, final: Path) -> None:
    """Give a sealed folder its final name; an older checkpoint of that name makes place in the same moment."""
    if final.exists():
        discarded = _set_aside(final)
        staged.rename(final)
        shutil.rmtree(discarded)
    else:
        staged.rename(final)
    _sync(final.parent)
    _remove_empty(final.parent)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; killed halfway, it leaves nothing that looks like one."""
    shutil.rmtree(_set_aside(checkpoint))
    _remove_empty(checkpoint.parent)


def clean_up(folder: str | Path) -> None:
    """Remove what a killed run left in ``folder``; a checkpoint that only lacked its final name gets it."""
    folder = Path(folder)
    for staged in _numbered(folder / STAGING):
        if find_damage(staged) is None and not (folder / staged.name).exists():
            staged.rename(folder / staged.name)
    for leftover in (STAGING, DISCARDED):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints beside ``newest`` until ``limit`` are left, damaged ones first.

    ``newest`` and ``best`` are never deleted, and a damaged checkpoint does not count as one that is left.
    """
    if not limit or limit < 1:
        return
    kept = {newest} | ({Path(best)} if best else set())
    others = [path for path in _numbered(newest.parent) if path not in kept]
    whole = [path for path in others if find_damage(path, contents=False) is None]
    spare = max(limit - len(kept), 0)
    kept |= set(whole[-spare:] if spare else [])
    for path in others:
        if path not in kept:
            discard(path)


def find_damage(checkpoint: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint in words, None when it is complete; ``contents=False`` compares sizes only."""
    try:
        files = read_manifest(checkpoint)["files"]
        for name, recorded in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != recorded["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes of {recorded['bytes']:,}"
            if contents and _crc32(path) != recorded["crc32"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """``step``, ``files`` (name -> bytes, crc32) and ``run`` (see :func:`describe_run`) of a checkpoint."""
    return json.loads((Path(checkpoint) / MANIFEST).read_text(encoding="utf-8"))


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise InputError unless training can go on from this folder.

    Cost: reads every file once.
    """
    name = f"resume_from_checkpoint={str(checkpoint)!r}"
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise InputError(f"{name} must be a folder with a checkpoint")
    damage = find_damage(checkpoint)
    if damage:
        raise InputError(f"{name} must be a complete checkpoint: {damage}")
    if "scheduler.pt" not in read_manifest(checkpoint)["files"]:
        raise InputError(f"{name} must hold the optimizer too; it was written with save_only_model")


def last_complete_checkpoint(folder: str | Path, run: dict[str, Any] | None = None) -> Path | None:
    """The complete checkpoint of the highest step in ``folder``, or None.

    Each one above it that is damaged or, when ``run`` is given, belongs to another run is named in a warning.

    Cost: reads every file of the checkpoints that it looks at once.
    """
    for checkpoint in reversed(_numbered(Path(folder))):
        problem = find_damage(checkpoint)
        if problem is None and run is not None:
            try:
                compare_runs(read_manifest(checkpoint)["run"] or {}, run)
            except InputError:
                problem = "it belongs to a run with other settings"
        if problem is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is skipped: {problem}", stacklevel=2)
    return None


def _numbered(folder: Path) -> list[Path]:
    """The folders ``checkpoint-N``, lowest N first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _set_aside(checkpoint: Path) -> Path:
    discarded = checkpoint.parent / DISCARDED / checkpoint.name
    shutil.rmtree(discarded, ignore_errors=True)
    discarded.parent.mkdir(exist_ok=True)
    return checkpoint.rename(discarded)


def _remove_empty(folder: Path) -> None:
    for inner in (STAGING, DISCARDED):
        with suppress(OSError):
            (folder / inner).rmdir()


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder; its files have been synced by then
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


# --- What run a checkpoint belongs to ---------------------------------------------------------------------------------

# Fields of TrainingArguments that may change between a checkpoint and the run that goes on from it: where things are
# written and when, what is reported, how batches are brought to the device, and how a step is spread over time and
# devices as long as global_batch_size stays.
_MAY_DIFFER = """
    output_dir checkpoint_dir plot_steps plot_scale sample_prompts sample_steps run_name project
    resume resume_from_checkpoint restore_callback_states_from_checkpoint
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node disable_tqdm report_to trackio_space_id trackio_bucket_id trackio_static_space_id
    include_num_input_tokens_seen skip_memory_metrics debug include_for_metrics local_rank do_train do_eval do_predict
    eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object batch_eval_metrics prediction_loss_only per_device_eval_batch_size bf16_full_eval
    fp16_full_eval
    save_strategy save_steps save_total_limit save_on_each_node save_only_model enable_jit_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order
    per_device_train_batch_size gradient_accumulation_steps
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cpu full_determinism use_cache
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
"""
MAY_DIFFER = frozenset(_MAY_DIFFER.split())
VOLATILE_CONFIG = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map")


def describe_run(
    config: PretrainedConfig,
    arguments: TrainingArguments,
    data: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """What decides the numbers of a run, as plain JSON values: kept in its checkpoints, compared on resume.

    Args:
        data: whatever identifies texts, chunks and noise.

    The number of processes, the batch per device and the accumulation count only through their product
    ``global_batch_size``: with the same product the same chunks are in the same optimizer step. Sums are then rounded
    in another order and dropout draws other numbers, so the losses agree closely, but not to the bit.
    """
    model = {k: v for k, v in config.to_dict().items() if k not in VOLATILE_CONFIG and not k.startswith("_")}
    training = {k: v for k, v in arguments.to_dict().items() if k not in MAY_DIFFER}
    training["global_batch_size"] = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    run = {"model": model, "training": training, "data": dict(data or {})}
    if tokenizer is not None:
        run["data"]["tokenizer_hash"] = tokenizer_fingerprint(tokenizer)
    return json.loads(json.dumps(run, default=_plain, sort_keys=True))


def compare_runs(saved: dict[str, Any], current: dict[str, Any], name: str = "the checkpoint") -> None:
    """Raise InputError with every field in which ``current`` differs from ``saved``, with both values.

    Fields of the model and the training that one of the two does not know are left out, so that a newer transformers
    can go on from a checkpoint of an older one.
    """
    differences = []
    for section in ("model", "training", "data"):
        before, now = saved.get(section, {}), current.get(section, {})
        fields = before.keys() | now.keys() if section == "data" else before.keys() & now.keys()
        differences += [
            f"{field}={_short(now.get(field))} must be {_short(before.get(field))}"
            for field in sorted(fields)
            if before.get(field) != now.get(field)
        ]
    if differences:
        first, *others = differences
        raise InputError("; ".join([f"resume: {first}, the value of {name}", *others]))


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- Signals ----------------------------------------------------------------------------------------------------------


class StopSignals:
    """While it is entered, SIGTERM and the first Ctrl-C only set ``requested``; a second Ctrl-C acts at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # of a command in the background, or nohup
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # print may be interrupted by this very handler and then refuses; os.write does not
        os.write(2, b"\nStopping after this step with a checkpoint; Ctrl-C again stops at once without one.\n")


# --- Trainer ----------------------------------------------------------------------------------------------------------


@dataclass
class StepReport:
    """What one optimizer step said about itself, on its way from the device: (stop, bad norm, bad loss, *losses)."""

    step: int
    epoch: int
    first_batch: int
    values: torch.Tensor
    copied: Any

    def read(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


class CrashSafeTrainer(Trainer):
    """``transformers.Trainer`` whose run survives ``kill -9``, SIGTERM, a full disk and a NaN.

    - ``checkpoint-N`` appears complete or not at all, also with several processes, DDP or FSDP; see the module.
    - A resumed run logs the same losses as one never stopped, also when the stop lay between two logs.
    - SIGTERM or Ctrl-C: a checkpoint after the current step (with several processes: the next), then ``train`` returns
      and ``stopped`` is True. transformers' own ``enable_jit_checkpoint`` waits three seconds in a thread, lets each
      process choose its own step and may save between the forward pass and the optimizer step, when dropout has drawn
      numbers that the resumed run draws again; it is refused.
    - A loss, gradient norm or weight that is NaN or infinite ends the run with :class:`DivergedError` before anything
      of it is saved. A step's loss is read while the next one runs, so the device is never waited for.
    - A checkpoint that cannot be written ends the run with InputError; those complete before stay.

    Args:
        run_identity: see :func:`describe_run`; kept in each checkpoint, and compared before a run goes on from one.

    Attributes:
        stopped: a signal ended the run before its time.
        saved_checkpoint: the last checkpoint that this run wrote or started from.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        run_identity: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        if args is not None and args.enable_jit_checkpoint:
            raise InputError("enable_jit_checkpoint=True must be False: SIGTERM writes a checkpoint anyway")
        self.run_identity = run_identity
        self.stopped = False
        self.saved_checkpoint: Path | None = None
        self._signals = StopSignals()
        self._losses: list[torch.Tensor] = []  # of the micro-batches of the current step
        self._reports: deque[StepReport] = deque()
        self._position = (0, 1)  # epoch, optimizer steps per epoch
        self._is_staging = False
        self._past_shards = False  # of this checkpoint: nothing that is left to write involves other processes
        self._push_later = False
        self._to_restore: Path | None = None
        self._checked: Path | None = None  # what find_checkpoint has read and found complete
        self._started = 0.0
        self._seconds_before = 0.0
        super().__init__(model, args, *positional, **keywords)
        self.args.logging_nan_inf_filter = False  # it would replace a NaN loss by the mean of the others

    def describe_batch(self, epoch: int, batch: int) -> str:
        """Which documents are in a batch of this process, in words, for error messages; for subclasses to override.

        Args:
            batch: index of the batch among those that this process gets in this epoch, from 0.
        """
        return ""

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; True resumes from :meth:`find_checkpoint`, a path from the checkpoint in that folder.

        Raises:
            InputError: no complete checkpoint, a damaged one, or one of another run; a full disk.
            DivergedError: a number is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.find_checkpoint()
            if resume_from_checkpoint is None:
                raise InputError(f"resume: {str(self.args.output_dir)!r} holds no complete checkpoint")
        wish = resume_from_checkpoint or None
        if wish is None or wish != self._checked:
            self._on_writers(lambda: self._check_start(wish))
        start = str(wish) if wish else None
        self.stopped = False
        self.saved_checkpoint = self._to_restore = Path(start) if start else None
        self._losses.clear()
        self._reports.clear()
        self._started, self._seconds_before = time.time(), 0.0
        with self._signals:
            return super().train(start, *args, **kwargs)

    def find_checkpoint(self) -> Path | None:
        """The checkpoint in ``args.output_dir`` that this run goes on from, the same on every process; None: none.

        Raises:
            InputError: there are checkpoints, all of another run.
        """
        self._checked = self._on_writers(self._look_for_checkpoint)
        return self._checked

    def _look_for_checkpoint(self) -> Path | None:
        folder = Path(str(self.args.output_dir))
        clean_up(folder)
        found = last_complete_checkpoint(folder, self.run_identity)
        if found is None and self.run_identity:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = last_complete_checkpoint(folder)
            if other is not None:
                compare_runs(read_manifest(other)["run"] or {}, self.run_identity, other.name)
        return found

    def _check_start(self, checkpoint: str | Path | None) -> None:
        clean_up(str(self.args.output_dir))
        if checkpoint is None:
            return
        check_checkpoint(checkpoint)
        saved = read_manifest(checkpoint)["run"]
        if saved and self.run_identity:
            compare_runs(saved, self.run_identity, Path(checkpoint).name)

    def _on_writers(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` on the process that writes (one per node with save_on_each_node); every process gets the result.

        An InputError is raised on every process, so that none waits for another that has given up.
        """
        result, problem = None, None
        if self.args.should_save:
            try:
                result = work()
            except InputError as error:
                problem = str(error)
        answers = gather_object([(result, problem)])
        for _, text in answers:
            if text:
                raise InputError(text)
        return answers[0][0]

    # -- saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._is_staging else folder

    @contextmanager
    def _staging(self):
        # Without a best step the Trainer looks for no folder of that name in the staging folder, and waits at no
        # barrier that a process with a full disk would never reach.
        best_step, self.state.best_global_step = self.state.best_global_step, None  # type: ignore[assignment]
        self._is_staging, self._past_shards = True, False
        try:
            yield
        finally:
            self._is_staging = False
            self.state.best_global_step = best_step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        staged = folder / STAGING / final.name
        problem = None
        self._on_writers(lambda: shutil.rmtree(staged.parent, ignore_errors=True))
        try:
            with self._staging():
                super()._save_checkpoint(model, trial)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            problem = explain_write_error(error)
            if problem is None:
                raise
            if self.is_fsdp_enabled and not self._past_shards and not isinstance(error, CheckpointException):
                # The others wait in a collective for this process; that it ends is what their launcher ends them for.
                raise self._not_written(final, problem) from error
        problem = next(filter(None, gather_object([problem])), None)
        problem = problem or self._on_writers(lambda: self._finish(staged, final))
        if problem:
            self._on_writers(lambda: shutil.rmtree(staged.parent, ignore_errors=True))
            raise self._not_written(final, problem)
        self._note_best(final)
        self.saved_checkpoint = final
        if self._push_later:
            self._push_later = False
            super()._push_from_checkpoint(str(final))
        self._on_writers(lambda: rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint))

    def _finish(self, staged: Path, final: Path) -> str | None:
        """Complete and name the checkpoint; what went wrong in words, or None."""
        try:
            self._note_best(final)
            self.state.save_to_json(str(staged / "trainer_state.json"))
            seal(staged, self.state.global_step, self.run_identity)
            publish(staged, final)
        except OSError as error:
            return explain_write_error(error)
        return None

    def _note_best(self, final: Path) -> None:
        """The state names the best checkpoint by its final path, never by the staging folder."""
        if not self.state.best_global_step:
            return
        best = final.parent / f"checkpoint-{self.state.best_global_step}"
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _not_written(self, final: Path, problem: str) -> InputError:
        free = shutil.disk_usage(next(f for f in (final, *final.parents) if f.exists())).free
        return InputError(
            f"{final.name} could not be written to {str(final.parent)!r}: {problem} ({free / 1e6:,.0f} MB free); "
            f"{self._last_complete(final.parent)}; free space, then go on with {HOW_TO_GO_ON}"
        )

    def _last_complete(self, folder: Path) -> str:
        whole = [path for path in _numbered(folder) if find_damage(path, contents=False) is None]
        return f"the last complete checkpoint is {str(whole[-1])!r}" if whole else "there is no complete checkpoint"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload goes on in the background, from a folder that must keep its name.
        self._push_later = True

    def _save_rng_state(self, output_dir: str) -> None:
        self._past_shards = True
        super()._save_rng_state(output_dir)
        running = {
            "loss_since_log": self._tr_loss.item(),
            "loss_before": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "seconds": self._seconds_before + time.time() - self._started,
        }
        path = Path(output_dir, f"running_loss_{self.args.process_index}.json")
        path.write_text(json.dumps(running), encoding="utf-8")

    def _restore_running_loss(self) -> None:
        """What the Trainer forgets: the losses since the last log, the sum of those before, and the time spent."""
        checkpoint, self._to_restore = self._to_restore, None
        files = sorted(checkpoint.glob("running_loss_*.json")) if checkpoint else []
        if not checkpoint or not files:
            return
        running = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        own = checkpoint / f"running_loss_{self.args.process_index}.json"
        if len(files) == self.args.world_size:
            since_log = running[files.index(own)]["loss_since_log"]
        else:
            since_log = sum(part["loss_since_log"] for part in running) / len(running)
        self._tr_loss.fill_(since_log)
        self._total_loss_scalar = running[0]["loss_before"]
        self._globalstep_last_logged = running[0]["last_logged_step"]
        self._seconds_before = running[0]["seconds"]
        self._initial_global_step = 0  # mean loss and speed at the end are of the whole run

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu" and self.args.world_size > 1:
            # transformers 5.17 asks for tensors on "cpu:0", a name that torch does not know as a place to load to
            torch.serialization.register_package(
                0, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    # -- training

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore_running_loss()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the Trainer would take one step more than the run has
            return
        self._position = (kwargs["epoch"], kwargs["num_update_steps_per_epoch"])
        self._losses.clear()
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self._losses:
            self._reports.append(self._report_step(grad_norm))
            self._losses.clear()
        control = self.control
        if self.stopped and self.state.epoch % 1:
            # The Trainer takes leaving an epoch in its middle for its end.
            control.should_evaluate = control.should_save = False
        stop = self._read_reports(control.should_log or control.should_evaluate or control.should_save)
        if stop and not self.stopped:
            self._read_reports(everything=True)
            self.stopped = True
            control.should_save = control.should_training_stop = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _report_step(self, grad_norm: Any) -> StepReport:
        """Start the copy of this step's losses to the host; with several processes they agree on what went wrong."""
        losses = torch.stack(self._losses).float()
        scaler = getattr(self.accelerator, "scaler", None)
        if grad_norm is None or (scaler is not None and scaler.is_enabled()):
            grad_norm = 0.0  # a scaler leaves out steps that overflow
        grad_norm = getattr(grad_norm, "_local_tensor", grad_norm)
        bad_norm = ~torch.isfinite(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm - grad_norm != 0
        # filled on the device: a copy of host numbers would wait for it
        flags = torch.zeros(3, device=losses.device)
        flags[0].fill_(float(self._signals.requested))
        flags[1].copy_(bad_norm) if isinstance(bad_norm, torch.Tensor) else flags[1].fill_(float(bad_norm))
        flags[2].copy_((~torch.isfinite(losses)).any())
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        values = torch.cat([flags, losses]).to("cpu", non_blocking=True)
        copied = None
        if losses.device.type != "cpu":
            copied = torch.Event(losses.device)
            copied.record()
        epoch, steps = self._position
        first_batch = (self.state.global_step - 1) % steps * self.args.gradient_accumulation_steps
        return StepReport(self.state.global_step, epoch, first_batch, values, copied)

    def _read_reports(self, everything: bool) -> bool:
        """Check all reports, or all but that of the step that the device may still work on; True: stop the run."""
        # One process knows at once; several decide on the number that all of them have got.
        stop = self._signals.requested if self.args.world_size == 1 else False
        while len(self._reports) > (0 if everything else 1):
            report = self._reports.popleft()
            asked, bad_norm, bad_loss, *losses = report.read()
            if bad_norm or bad_loss:
                raise self._diverged(report, losses, bool(bad_loss))
            stop = stop or bool(asked)
        return stop

    def _diverged(self, report: StepReport, losses: list[float], bad_loss: bool) -> DivergedError:
        batches = []
        for index, loss in enumerate(losses, start=report.first_batch):
            if bad_loss and loss - loss == 0:
                continue
            process = f" of process {self.args.process_index}" if self.args.world_size > 1 else ""
            described = self.describe_batch(report.epoch, index)
            batches.append(f"batch {index}{process}{f' ({described})' if described else ''} has loss {loss:g}")
        what = "the loss is not finite" if bad_loss else "the gradient norm is not finite"
        last = self._last_complete(Path(self._get_output_dir(None)))
        return DivergedError(
            f"step {report.step}: {what}; in epoch {report.epoch} {', '.join(gather_object(batches))}; {last}"
        )

    def _check_weights(self) -> None:
        local = [getattr(p, "_local_tensor", p).detach() for p in self.model.parameters()]  # type: ignore[union-attr]
        finite = torch.stack([torch.isfinite(p).all() for p in local if p.numel()]).all().item()
        if not all(gather_object([finite])):
            last = self._last_complete(Path(self._get_output_dir(None)))
            raise DivergedError(f"step {self.state.global_step}: a weight is not finite; {last}")

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._restore_running_loss()
        self._read_reports(everything=True)
        best = self.state.best_model_checkpoint
        if self.stopped:
            # Not the end of the run: with save_total_limit=1 the Trainer would delete all but the best checkpoint.
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)
        finally:
            self.state.best_model_checkpoint = best


def explain_write_error(error: BaseException) -> str | None:
    """Why a file could not be written, in words; None when the error is of another kind."""
    if isinstance(error, CheckpointException):
        failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
        return next(filter(None, (explain_write_error(failure[0]) for failure in failures.values())), None)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # torch's writer of zip files knows no error numbers
    if isinstance(error, SafetensorError) or re.search("PytorchStreamWriter|inline_container|iostream", str(error)):
        return " ".join(str(error).split("\n")[0].split())
    return explain_write_error(error.__context__) if error.__context__ else None
