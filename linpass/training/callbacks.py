"""What a Trainer calls along the way: a log of the losses and its picture, samples of text, speed.

They plug into any transformers Trainer: ``Trainer(..., callbacks=[LossLoggerCallback("log.jsonl", "loss.png")])``.
"""

import logging
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from linpass.errors import InputError
from linpass.generate import most_tokens
from linpass.training.flops import peak_flops as known_peak_flops
from linpass.training.run_log import RunLog, plot_losses

logger = logging.getLogger(__name__)

Y_SCALES = ("linear", "log")


class LossLoggerCallback(TrainerCallback):
    """Keeps the Trainer's log in a file, one JSON object a line, and draws the losses.

    A line is flushed as soon as it is logged: ``kill -9`` costs at most the line under way. A resumed run goes on in
    the file where its checkpoint stands: later lines are dropped, because those steps are done again, and lines that
    the checkpoint knows and the file lacks are filled in. A new run moves an older file to ``<log_path>.previous``,
    as does a resumed one that finds the log of another run. A disk that is full stops neither the training nor, once
    there is room again, the log: what could not be written is made up for.

    The last line is the Trainer's summary of the run (``train_runtime``, ``train_loss``); then follows what is
    evaluated after the training. The summary of a run that goes on past its end takes the place of the earlier one.

    Args:
        log_path: the log; each line holds "step", "epoch" and what was measured. NaN and infinity become null.
        plot_path: PNG of the training and evaluation losses; always complete. None: no picture.
        plot_interval: optimizer steps between pictures. None: one at every evaluation. One more at the end.
        y_scale: axis of the losses, "linear" or "log".

    Raises:
        InputError: a value breaks a rule, or there is a ``plot_path`` but no matplotlib.
    """

    def __init__(
        self,
        log_path: str | os.PathLike[str],
        plot_path: str | os.PathLike[str] | None = None,
        plot_interval: int | None = None,
        y_scale: str = "linear",
    ) -> None:
        if y_scale not in Y_SCALES:
            raise InputError(f"y_scale={y_scale!r} must be one of {', '.join(map(repr, Y_SCALES))}")
        if plot_interval is not None:
            _require_positive("plot_interval", plot_interval)
        if plot_path is not None and find_spec("matplotlib") is None:
            raise InputError(f"plot_path={str(plot_path)!r} needs matplotlib: pip install 'linpass[train]'")
        self.log = RunLog(_file("log_path", log_path))
        self.plot_path = None if plot_path is None else _file("plot_path", plot_path)
        self.plot_interval, self.y_scale = plot_interval, y_scale
        self.is_training = self.is_drawn = self.has_warned = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.is_training = True
        if state.is_world_process_zero:
            self.log.begin(state.global_step, state.log_history)
            self.is_drawn = False

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and logs:
            self.log.add({"step": state.global_step} | logs)
            self.is_drawn = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # Not at the end of a step: its losses are logged after that.
        if self.plot_interval and state.global_step and state.global_step % self.plot_interval == 0:
            self._draw(args, state)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if self.plot_interval is None or not self.is_training:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.is_training = False
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if self.plot_path is None or self.is_drawn or not (state.is_world_process_zero and self.log.has_begun):
            return
        try:
            with _beside_training(args.device):
                self.plot_path.parent.mkdir(parents=True, exist_ok=True)
                plot_losses(self.log.entries, self.plot_path, self.y_scale)
            self.is_drawn = True
        except OSError as error:
            if not self.has_warned:
                logger.warning("The picture of the losses cannot be written, the training goes on: %s", error)
            self.has_warned = True


class SampleTextCallback(TrainerCallback):
    """Lets the model continue prompts every ``interval`` optimizer steps, without a trace in the training.

    Generator states (Python, NumPy, PyTorch on CPU and CUDA), training modes and ``config.use_cache`` are put back, the
    tokenizer is left as it is: a run with samples has the losses of the run without, to the bit. The seed is set anew
    each time, so that samples differ by what the model has learned, not by chance.

    Only the first process samples, while the others wait for it at their next step. A model whose weights are spread
    over processes (FSDP, ZeRO-3, tensor parallel) would need all of them to generate: it is skipped with a warning.

    Args:
        tokenizer: of the model.
        prompts: texts to continue, in one batch, padded on the left.
        interval: optimizer steps between samples.
        max_new_tokens: most tokens to add; fewer where the model can hold no more.
        seed: of the draws.
        output_path: file to append ``{"step", "prompt", "text"}`` to, one a line, text being the continuation; on
            resume and on a new run treated as the log of :class:`LossLoggerCallback`. None: printed only.
        sampling: further arguments of ``generate``, such as temperature or top_k; ``do_sample`` is True by default.

    Raises:
        InputError: here, or when the training begins: a value breaks a rule, or a prompt fills the model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        interval: int,
        max_new_tokens: int = 64,
        seed: int = 0,
        output_path: str | os.PathLike[str] | None = None,
        **sampling: Any,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts={prompts!r} must be a list of one text or more")
        _require_positive("interval", interval)
        _require_positive("max_new_tokens", max_new_tokens)
        if sampling.get("num_return_sequences", 1) != 1:
            raise InputError(f"num_return_sequences={sampling['num_return_sequences']} must be 1: one text per prompt")
        self.tokenizer, self.prompts, self.interval = tokenizer, list(prompts), interval
        self.max_new_tokens, self.seed, self.sampling = max_new_tokens, seed, {"do_sample": True} | sampling
        self.samples = None if output_path is None else RunLog(_file("output_path", output_path))
        self.is_skipped = False

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs) -> None:
        if not hasattr(model, "generate"):
            raise InputError(f"SampleTextCallback needs a model that can generate; {type(model).__name__} cannot")
        self._new_tokens(model, self._encode())
        self.is_skipped = _is_sharded(model)
        if self.is_skipped and state.is_world_process_zero:
            logger.warning("No samples of text: the model's weights are spread over processes")
        elif self.samples is not None and state.is_world_process_zero:
            self.samples.begin(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.is_skipped or state.global_step % self.interval or not state.is_world_process_zero:
            return
        with _beside_training(args.device):
            texts = self._continue_prompts(model)
        for prompt, text in zip(self.prompts, texts, strict=True):
            print(f"step {state.global_step}: {prompt} >>> {text}", flush=True)
            if self.samples is not None:
                self.samples.add({"step": state.global_step, "prompt": prompt, "text": text})

    def _encode(self) -> list[list[int]]:
        rows = [self.tokenizer(prompt, verbose=False)["input_ids"] for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, rows, strict=True):
            if not ids:
                raise InputError(f"prompts: {prompt!r} must give one token or more")
        return rows

    def _new_tokens(self, model: Any, rows: list[list[int]]) -> int:
        """How many tokens fit behind the longest prompt, ``max_new_tokens`` at most."""
        longest, limit = max(map(len, rows)), most_tokens(model.config)
        if limit is not None and longest >= limit:
            raise InputError(
                f"prompts: one of {longest} tokens must be less than {limit} tokens, all that the model can hold"
            )
        return self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - longest)

    def _continue_prompts(self, model: Any) -> list[str]:
        rows = self._encode()
        longest = max(map(len, rows))
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in ids if token is not None)
        # Padded by hand: a tokenizer remembers the side and length that it padded to last.
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
        with _untouched(model):
            torch.manual_seed(self.seed)
            output = model.generate(
                input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                **{
                    "max_new_tokens": self._new_tokens(model, rows),
                    "pad_token_id": pad,
                    "use_cache": True,  # the Trainer switches it off in the configuration
                    **self.sampling,
                },
            )
        ends = model.generation_config.eos_token_id
        decode: Any = self.tokenizer.decode  # of one row: one text
        return [decode(_until(ends, row[longest:].tolist()), skip_special_tokens=True) for row in output]


class ThroughputCallback(TrainerCallback):
    r"""Adds speed and memory to the Trainer's training log: to what callbacks behind it get, and to ``log_history``.

    - ``tokens_per_second``: of all processes together, since the last measurement.
    - ``model_flops_utilisation``: tokens_per_second * flops_per_token / (peak_flops * devices), 1 at most.
    - ``peak_memory_gib``: most memory that this process has held, in GiB: allocated on the GPU, resident on a CPU.
    - ``seconds_left``: steps to go times the seconds per step so far, evaluations and checkpoints included.

    The summary at the end gets the mean over the whole training. The speed is that of the training alone, waiting for
    data included: the clock stands still from the end of a step to the end of the evaluation or checkpoint that
    follows it, and while samples and pictures are made; the first steps (compilation, caches) are left out.
    Devices are synchronised when a measurement begins and ends, not in between.

    The Trainer's reporters (TensorBoard, Weights & Biases, ...) come before a user's callbacks and would miss these
    numbers: ``callback.add_to(trainer)`` puts it in front of them. In ``callbacks=[...]`` it comes before
    :class:`LossLoggerCallback`.

    Args:
        tokens_per_step: positions that all processes train on in an optimizer step. None: the Trainer's count, where
            ``include_num_input_tokens_seen`` is on; otherwise no speed in tokens.
        flops_per_token: of the training, see :func:`linpass.training.flops.flops_per_token`. None: no utilisation.
        peak_flops: FLOP/s that one device can do. None: from the table, where it holds the device.
        interval: fewest optimizer steps of a measurement; logs in between get no speed.
        warmup_steps: first steps that are left out.

    Raises:
        InputError: a number is not more than 0.
    """

    def __init__(
        self,
        tokens_per_step: int | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        interval: int = 1,
        warmup_steps: int = 2,
    ) -> None:
        numbers = {"tokens_per_step": tokens_per_step, "flops_per_token": flops_per_token, "peak_flops": peak_flops}
        for name, value in (numbers | {"interval": interval}).items():
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value} must be more than 0")
        if warmup_steps < 0:
            raise InputError(f"warmup_steps={warmup_steps} must be 0 or more")
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.interval, self.warmup_steps = interval, warmup_steps

    def add_to(self, trainer: Trainer) -> None:
        """Put this callback before the reporters, behind the one that decides when to log, evaluate and save."""
        trainer.callback_handler.callbacks.insert(1, self)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.peak_flops is None and args.device.type == "cuda":
            self.peak_flops = known_peak_flops(torch.cuda.get_device_name(args.device))
        self.measure_from = state.global_step + self.warmup_steps
        self.seconds_aside, self.aside_since = 0.0, None
        self.whole = self.window = None
        if not self.warmup_steps:
            self.whole = self.window = self._reading(args, state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.whole is None and state.global_step >= self.measure_from:
            self.whole = self.window = self._reading(args, state)
        self._note_pause(args, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._note_pause(args, control)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._leave_out(args)

    def on_save(self, args, state, control, **kwargs) -> None:
        self._leave_out(args)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.aside_since = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not logs or not ("loss" in logs or "train_loss" in logs):
            return
        measured: dict[str, float] = {}
        is_summary = "train_loss" in logs
        since = self.whole if is_summary else self.window
        if since is not None and state.global_step - since.step >= (1 if is_summary else self.interval):
            now = self._reading(args, state)
            measured |= self._speed(args, since, now)
            if not is_summary:
                measured["seconds_left"] = self._seconds_left(state, now)
            self.window = now
            if self.aside_since is not None:
                self.aside_since = _training_clock(args.device)
        measured |= _peak_memory(args.device)
        logs.update(measured)
        state.log_history[-1].update(measured)  # the Trainer has put a copy there before it called

    def _note_pause(self, args, control) -> None:
        """An evaluation or a checkpoint may follow: what is left of the step on the device is still training."""
        if control.should_evaluate or control.should_save:
            _now(args.device)
        self.aside_since = time.perf_counter() - _Beside.seconds

    def _leave_out(self, args) -> None:
        if self.aside_since is not None:
            now = _training_clock(args.device)
            self.seconds_aside += now - self.aside_since
            self.aside_since = now

    def _reading(self, args, state) -> "_Reading":
        training = _training_clock(args.device) - self.seconds_aside
        return _Reading(time.perf_counter(), training, state.global_step, state.num_input_tokens_seen)

    def _speed(self, args, since: "_Reading", now: "_Reading") -> dict[str, float]:
        tokens = now.tokens_seen - since.tokens_seen
        if self.tokens_per_step is not None:
            tokens = (now.step - since.step) * self.tokens_per_step
        if not tokens:
            return {}
        speed = {"tokens_per_second": tokens / max(now.training - since.training, 1e-9)}
        if self.flops_per_token is not None and self.peak_flops is not None:
            devices = args.world_size * max(1, args.n_gpu)
            achieved = speed["tokens_per_second"] * self.flops_per_token
            speed["model_flops_utilisation"] = achieved / (self.peak_flops * devices)
        return speed

    def _seconds_left(self, state, now: "_Reading") -> float:
        first: Any = self.whole
        return (state.max_steps - now.step) * (now.clock - first.clock) / (now.step - first.step)


@dataclass(frozen=True)
class _Reading:
    """Seconds by the clock, the same less all that was no training, and how far the run was then."""

    clock: float
    training: float
    step: int
    tokens_seen: int


def _until(ends: int | list[int] | None, tokens: list[int]) -> list[int]:
    """A row up to its end of text; behind it stands padding, which need not be a special token."""
    stops = ends if isinstance(ends, list) else [ends]
    length = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:length]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; behind it modes, generators and ``config.use_cache`` are what they were."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    was_training = [module for module in model.modules() if module.training]
    config: Any = model.config
    had_cache = getattr(config, "use_cache", None)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module in was_training:
            module.training = True
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        if had_cache is not None:
            config.use_cache = had_cache


def _is_sharded(model: nn.Module) -> bool:
    """Whether weights are spread over processes: FSDP 1 wraps modules, FSDP 2 and ZeRO-3 mark parameters."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return True
    return any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in model.parameters())


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    if device.type != "cpu" or sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


class _Beside:
    """Seconds that the callbacks above have worked in this process while the training waited."""

    seconds = 0.0


@contextmanager
def _beside_training(device: torch.device) -> Iterator[None]:
    start = _now(device)
    try:
        yield
    finally:
        _Beside.seconds += _now(device) - start


def _training_clock(device: torch.device) -> float:
    return _now(device) - _Beside.seconds


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _file(name: str, path: str | os.PathLike[str]) -> Path:
    if Path(path).is_dir():
        raise InputError(f"{name}={str(path)!r} must be a file; a folder is in the way")
    return Path(path)


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} must be a whole number, 1 or more")
