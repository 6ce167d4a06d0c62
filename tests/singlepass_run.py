"""Small single passes, also in processes of their own. See test_singlepass_pass.py, _resume.py and _distributed.py."""

import copy
import functools
import json
import os
import resource
import signal
import time
from pathlib import Path

import torch
import transformers
from checkpoint_run import limit_file_size, start, start_together  # noqa: F401  for the tests
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from linpass.errors import InputError
from linpass.singlepass import SinglePassArguments, SinglePassTrainer

ROWS, TOKENS, CLASSES, VOCABULARY = 53, 6, 3, 40


class Texts(torch.utils.data.Dataset):
    """Rows of tokens, some padded, with a label that the tokens tell and noise disturbs; counts how often it is read.

    Args:
        first: the number of the first row; the rows from 0 to 52 and those from 53 on are what 0 to 60 are.
    """

    def __init__(self, rows=ROWS, first=0, classes=CLASSES, weighted=False):
        draws = torch.Generator().manual_seed(5)
        count = first + rows
        self.labels = torch.randint(classes, (400,), generator=draws)[first:count]
        noise = torch.randint(1, VOCABULARY, (400, TOKENS), generator=draws)[first:count]
        self.tokens = torch.where(noise % 3 == 0, 1 + self.labels[:, None], noise)
        self.lengths = torch.randint(2, TOKENS + 1, (400,), generator=draws)[first:count]
        self.weights = torch.rand(400, generator=draws, dtype=torch.float64)[first:count] if weighted else None
        self.reads = [0] * rows

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        self.reads[number] += 1
        mask = (torch.arange(TOKENS) < self.lengths[number]).long()
        row = {"input_ids": self.tokens[number] * mask, "attention_mask": mask, "labels": self.labels[number]}
        return row if self.weights is None else row | {"weight": self.weights[number].item()}

    def stacked(self):
        """One batch of everything, and no row is counted as read."""
        mask = (torch.arange(TOKENS) < self.lengths[:, None]).long()
        return {"input_ids": self.tokens * mask, "attention_mask": mask}, self.labels


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        for number in range(len(self.texts)):
            yield self.texts[number]


@functools.cache
def _model(kind, classes, dtype, seed):
    """A classifier whose every parameter is random."""
    if kind == "bert":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, num_labels=classes, **sizes)
        model = BertForSequenceClassification(config)
    else:
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": TOKENS}
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=VOCABULARY, num_labels=classes, pad_token_id=0, **sizes)
        )
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.5)
    return model.to(dtype)


def make_model(kind="bert", classes=CLASSES, dtype=torch.float64, seed=1):
    """A copy of it."""
    return copy.deepcopy(_model(kind, classes, dtype, seed))


def make_trainer(folder, model=None, rows=None, callbacks=(), evaluate=None, metrics=None, **changes):
    """Ridge regression in float64 on a small BERT, 4 rows at a time."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "precision": "float64",
        "estimator": "ridge",
        "calibrate": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return SinglePassTrainer(
        model=make_model() if model is None else model,
        args=SinglePassArguments(**{**values, **changes}),
        train_dataset=Texts() if rows is None else rows,
        eval_dataset=evaluate,
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )


def head_of(trainer):
    """The weight and bias in the model's final layer."""
    head = getattr(trainer.model, "classifier", None)
    head = trainer.model.score if head is None else head
    return [parameter.detach() for parameter in (head.weight, head.bias) if parameter is not None]


def moments(statistics):
    names = ("rows", "weight", "mean_D", "target_mean_C", "scatter_DD", "cross_DC", "target_scatter_C")
    return {name: torch.as_tensor(getattr(statistics, name), dtype=torch.float64) for name in names}


# -- in processes of their own


class Act(transformers.TrainerCallback):
    """Does something to the process at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == self.step:
            self.action()


class Pause(transformers.TrainerCallback):
    """Every step takes so many seconds at least: a pass of some rows is over before anybody could disturb it."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **keywords):
        time.sleep(self.seconds)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop(rank=0):
    """SIGTERM to the process of this rank."""
    if int(os.environ.get("RANK", 0)) == rank:
        os.kill(os.getpid(), signal.SIGTERM)


def kill_inside_save(ending):
    """SIGKILL when half of this file has been written."""
    from linpass.singlepass import pass_checkpoint

    save = pass_checkpoint.save_file

    def half(tensors, path, *arguments, **keywords):
        save(tensors, path, *arguments, **keywords)
        if str(path).endswith(ending):
            os.truncate(path, os.path.getsize(path) // 2)
            kill()

    pass_checkpoint.save_file = half


def run_pass(folder, result, resume=None, before=None, callbacks=(), work=None, kind="bert", **changes):
    """One pass; what it found goes to the file ``result``.

    Args:
        work: a function of the trainer, run after the pass; what it gives goes to the file too.
    """
    if before is not None:
        before()
    outcome = {"error": None, "work": None}
    try:
        trainer = make_trainer(folder, make_model(kind), callbacks=callbacks, **changes)
        trainer.train(resume_from_checkpoint=resume)
        if work is not None and trainer.solution is not None:
            outcome["work"] = work(trainer)
        outcome |= describe(trainer)
    except InputError as error:
        outcome["error"] = str(error)
    limit_file_size(resource.RLIM_INFINITY, int(os.environ.get("RANK", 0)))
    name = f"{result}.{os.environ.get('RANK', 0)}"
    Path(name).write_text(json.dumps(outcome), encoding="utf-8")


def run_several(folder, result, settings):
    """A pass for each of the settings; what they found goes to one file."""
    found = {}
    for name, changes in settings.items():
        changes = dict(changes)
        texts = Texts(changes.pop("rows", ROWS))
        rows = Stream(texts) if changes.pop("stream", False) else texts
        trainer = make_trainer(Path(folder) / name, rows=rows, evaluate=Texts(32), metrics=accuracy, **changes)
        trainer.train()
        found[name] = describe(trainer) | {"reads": list(texts.reads)}
        if name == "logistic":
            found[name]["later"] = change_and_save(trainer, Path(folder) / "saved")
    Path(f"{result}.{os.environ.get('RANK', 0)}").write_text(json.dumps(found), encoding="utf-8")


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def change_and_save(trainer, folder):
    trainer.update(Texts(9, first=ROWS))
    later = {"updated": [values.tolist() for values in head_of(trainer)]}
    trainer.forget([7, 50])
    later["forgotten"] = [values.tolist() for values in head_of(trainer)]
    later |= {name: value for name, value in trainer.evaluate().items() if name in ("eval_loss", "eval_accuracy")}
    save, wrote = trainer.model.save_pretrained, []
    trainer.model.save_pretrained = lambda *arguments, **keywords: wrote.append(save(*arguments, **keywords))
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    return later | {"rows": trainer.rows, "saved": str(folder), "wrote": len(wrote)}


def run_refused(folder):
    """Settings that two processes cannot work with, and what they are told."""
    refused = {
        "sgd": {"match": "sgd"},
        "batch": {"auto_find_batch_size": True},
        "none": {"rows": Texts(0)},
    }
    told = {}
    for name, changes in refused.items():
        try:
            make_trainer(folder, **changes).train()
        except InputError as error:
            told[name] = str(error)
    Path(folder, f"result.{os.environ.get('RANK', 0)}").write_text(json.dumps(told), encoding="utf-8")


def describe(trainer):
    collection = trainer.collection
    sums = None
    if collection is not None and collection.statistics is not None:
        sums = {name: value.tolist() for name, value in moments(collection.total()).items()}
    return {
        "sums": sums,
        "head": [values.tolist() for values in head_of(trainer)],
        "map": {name: values.tolist() for name, values in fitted_map(trainer).items()},
        "rows": trainer.rows,
        "step": trainer.state.global_step,
        "solved": trainer.solution is not None,
        "temperature": trainer.temperature,
        "reads": getattr(trainer.train_dataset, "reads", None),
        "log": trainer.state.log_history,
    }


def fitted_map(trainer):
    feature_map = getattr(trainer.model, "feature_map", None)
    return {} if feature_map is None else feature_map.state_dict()


def outcome(folder, rank=0):
    return json.loads((folder / f"result.{rank}").read_text())


def wait_for(processes):
    """Exit statuses; processes that wait for each other are ended after a minute, and theirs is not 0."""
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
