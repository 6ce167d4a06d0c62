"""Small training runs in processes of their own, so that they can be killed. See test_training_checkpoints.py.

The processes are forked from a server that has imported everything and trained nothing: a new interpreter would take
eight seconds, and autograd refuses to work in a fork of a process that has used it.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType, PartialState

from linpass import LinformerConfig, LinformerForCausalLM
from linpass.errors import InputError
from linpass.training.checkpoints import CrashSafeTrainer, describe_run

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers", "transformers.trainer", "linpass.training.checkpoints"])
ROWS, STEPS = 24, 10


class Interrupted(transformers.TrainerCallback):
    """Does something to the process at the end of a step, before that step is logged or saved."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = torch.randint(1, 50, (ROWS, 32), generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class NamedBatches(CrashSafeTrainer):
    def describe_batch(self, epoch, batch):
        return f"documents of epoch {epoch}, batch {batch}"


def make_trainer(folder, dropout=0.1, embed_dim=16, callbacks=(), trainer=NamedBatches, **changes):
    """Ten steps of two times two rows, six to an epoch; two steps to a log, three to a checkpoint, one checkpoint."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_steps": 3,
        "save_total_limit": 1,
        "seed": 3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(**{**values, **changes})
    transformers.set_seed(arguments.seed)
    sizes = {"vocab_size": 50, "depth": 1, "heads": 2, "seq_length": 32, "k": 8, "block_size": 8, "window_size": 8}
    config = LinformerConfig(embed_dim=embed_dim, dropout=dropout, **sizes)
    return trainer(
        LinformerForCausalLM(config),
        arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=list(callbacks),
        run_identity=describe_run(config, arguments, {"rows": ROWS}),
    )


def train(folder, result, resume=None, before=None, callbacks=(), **changes):
    """One run; its losses, last weights and how it ended go to the file ``result``."""
    if before is not None:
        before()
    trainer = make_trainer(folder, callbacks=callbacks, **changes)
    outcome = {"error": None}
    try:
        trainer.train(resume_from_checkpoint=resume)
    except InputError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    limit_file_size(resource.RLIM_INFINITY, int(os.environ.get("RANK", 0)))
    keys = ("step", "loss", "grad_norm", "learning_rate", "train_loss")
    log = [{k: entry[k] for k in keys if k in entry} for entry in trainer.state.log_history]
    weights = sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters())
    outcome |= {"log": log, "weights": weights, "stopped": trainer.stopped, "step": trainer.state.global_step}
    outcome["handlers"] = [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)]
    Path(f"{result}.{os.environ.get('RANK', 0)}").write_text(json.dumps(outcome), encoding="utf-8")


def call(function, *args, rank=None, **kwargs):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ.update({k: str(v) for k, v in (rank or {}).items()})
    function(*args, **kwargs)
    if rank:
        torch.distributed.destroy_process_group()


def start(function, *args, **kwargs):
    process = CONTEXT.Process(target=call, args=(function, *args), kwargs=kwargs)
    process.start()
    return process


def start_together(world_size, function, *args, **kwargs):
    """The processes of a run with several, connected by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return [start(function, *args, rank=rank, **kwargs) for rank in ranks]


# -- what happens to a run


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(event, ending):
    """SIGKILL just before the first file operation (open, os.rename, ...) on a path with this ending."""

    def hook(name, args):
        if name == event and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).endswith(ending):
            kill()

    sys.addaudithook(hook)


def kill_inside_torch_save(ending):
    """SIGKILL when half of this file has been written."""
    save = torch.save

    def half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if str(path).endswith(ending):
            os.truncate(path, os.path.getsize(path) // 2)
            kill()

    torch.save = half


def allow_fsdp_on_cpu():
    """accelerate shards models on GPUs only; the same code runs on gloo once it takes the processes for some."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    initialise = PartialState.__init__

    def call_it_gpu(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = call_it_gpu


def limit_file_size(size, rank=0):
    """A disk that is full for the process of this rank: files of more than ``size`` bytes cannot be written."""
    if int(os.environ.get("RANK", 0)) == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def send(number, rank=0):
    """A signal to this process, when it has this rank."""
    if int(os.environ.get("RANK", 0)) == rank:
        os.kill(os.getpid(), number)


class Poisoned(NamedBatches):
    """One batch has the loss NaN: the second of the given step, on the last process."""

    step = 5

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        last = self.args.process_index == self.args.world_size - 1
        second = len(self._losses) == 1
        return loss * float("nan") if self.state.global_step == self.step - 1 and last and second else loss


class PoisonedAtASave(Poisoned):
    step = 6


class Overflowing(NamedBatches):
    """The loss is finite, and its gradient is not, in the step after which a checkpoint is due."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.state.global_step == 5:
            next(model.parameters()).grad[0, 0] = float("inf")
        return loss


class BrokenWeight(transformers.TrainerCallback):
    """A weight is NaN after a step whose loss and gradient were finite."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 6:
            next(model.parameters()).data[0, 0] = float("nan")
