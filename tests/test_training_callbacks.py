"""Callbacks in plain Trainer runs: the log, the picture, samples of text, speed."""

import json
import math
import random
import resource
import time
from contextlib import contextmanager
from functools import partial

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import fully_shard
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from linpass import LinformerForCausalLM
from linpass.errors import InputError
from linpass.training.callbacks import LossLoggerCallback, SampleTextCallback, ThroughputCallback, plot_losses
from linpass.training.flops import peak_flops

PNG = b"\x89PNG\r\n\x1a\n"
BATCH, TOKENS = 4, 32
CLOCKS = ("runtime", "per_second", "seconds_left", "memory", "utilisation")


class Rows(torch.utils.data.Dataset):
    """Counting modulo 50 from random starts: a little to learn."""

    def __init__(self, rows):
        start = torch.randint(50, (rows, 1), generator=torch.Generator().manual_seed(5))
        self.ids = (start + torch.arange(TOKENS)) % 50

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class Bigram(torch.nn.Module):
    """The least that a Trainer can train: no transformers model, no configuration."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Embedding(50, 50)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, input_ids, labels):
        logits = self.dropout(self.logits(input_ids[:, :-1]))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def build_trainer(folder, callbacks=(), build_model=Bigram, **changes):
    """12 steps, a log each 2, an evaluation each 4."""
    torch.manual_seed(3)
    values = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": BATCH,
        "max_steps": 12,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
    }
    arguments = TrainingArguments(**values | changes)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on a machine of several, one: torch's DataParallel warns
    return Trainer(
        model=build_model(),
        args=arguments,
        train_dataset=Rows(64),
        eval_dataset=Rows(8),
        callbacks=list(callbacks),
    )


@pytest.fixture
def make_trainer(tmp_path):
    return partial(build_trainer, tmp_path)


@pytest.fixture(scope="module")
def linformer(tiny_config):
    return lambda: LinformerForCausalLM(tiny_config(dropout=0.1, depth=1))


@pytest.fixture(scope="module")
def tokenizer():
    """Words "w0" to "w49", and no padding token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="right")


def lines(path):
    """The log, read by a strict parser."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def without_clocks(entries):
    """What two runs of the same steps share; the summary tells of one session, so only its place is compared."""
    return [
        {"step": entry["step"], "summary": True}
        if "train_loss" in entry
        else {key: value for key, value in entry.items() if not any(clock in key for clock in CLOCKS)}
        for entry in entries
    ]


class StopAt(TrainerCallback):
    """Dies at the end of a step, as a killed process would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Spy(TrainerCallback):
    """What a reporter gets to see."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


@contextmanager
def disk_full_at(size):
    """Files cannot grow beyond ``size`` bytes: writes fail half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# LossLoggerCallback


def test_the_file_is_the_trainers_log(make_trainer, tmp_path):
    log = tmp_path / "runs" / "log.jsonl"
    trainer = make_trainer([LossLoggerCallback(log)])
    trainer.train()
    trainer.evaluate()
    assert lines(log) == trainer.state.log_history
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= lines(log)[0].keys()
    assert [line["step"] for line in lines(log) if "eval_loss" in line] == [4, 8, 12, 12]
    assert "train_runtime" in lines(log)[-2]
    assert not list(log.parent.glob(".*"))


def test_each_line_is_there_as_soon_as_it_is_logged(make_trainer, tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make_trainer([LossLoggerCallback(log), StopAt(5)]).train()
    assert [(line["step"], "loss" in line) for line in lines(log)] == [(2, True), (4, True), (4, False)]


def test_what_is_not_finite_becomes_null(make_trainer, tmp_path):
    log = tmp_path / "log.jsonl"
    trainer = make_trainer([LossLoggerCallback(log, tmp_path / "loss.png")], max_steps=2, eval_strategy="no")
    trainer.train()
    trainer.log({"loss": math.nan, "grad_norm": torch.tensor(math.inf), "scores": numpy.array([1.0, math.nan])})
    last = lines(log)[-1]
    assert (last["loss"], last["grad_norm"], last["scores"]) == (None, None, [1.0, None])
    plot_losses(trainer.state.log_history[:1] + [{"step": 3, "loss": math.nan}], tmp_path / "loss.png")


def interrupted(make_trainer, callbacks, step=7):
    """A run that saves a checkpoint at step 4 and dies after step ``step``."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer([*callbacks, StopAt(step)], save_strategy="steps", save_steps=4, save_total_limit=1).train()


def resumed(make_trainer, callbacks, tmp_path, checkpoint=4, **changes):
    trainer = make_trainer(callbacks, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"trainer/checkpoint-{checkpoint}"))
    return trainer


@pytest.fixture(scope="module")
def whole_log(tmp_path_factory):
    """The log of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    build_trainer(folder, [LossLoggerCallback(folder / "log.jsonl")]).train()
    return without_clocks(lines(folder / "log.jsonl"))


def nothing(log):
    pass


def half_a_line(log):
    with log.open("ab") as file:
        file.write(b'{"step": 6, "lo\xc3')


def lost_lines(log):
    kept = log.read_text().splitlines(keepends=True)
    log.write_text("".join(kept[1:2]))


def lost_file(log):
    log.unlink()


def garbage(log):
    log.write_bytes(b"\x00" * 64 + b"\n[1]\n" + log.read_bytes())


@pytest.mark.parametrize("damage", [nothing, half_a_line, lost_lines, lost_file, garbage])
def test_a_resumed_run_leaves_the_log_of_a_whole_one(make_trainer, tmp_path, whole_log, damage):
    log = tmp_path / "log.jsonl"
    interrupted(make_trainer, [LossLoggerCallback(log)])
    assert lines(log)[-1]["step"] == 6
    damage(log)
    resumed(make_trainer, [LossLoggerCallback(log)], tmp_path)
    assert without_clocks(lines(log)) == whole_log
    assert not (tmp_path / "log.jsonl.previous").exists()


def test_a_resumed_run_drops_later_lines_before_its_first_step(make_trainer, tmp_path):
    log = tmp_path / "log.jsonl"
    interrupted(make_trainer, [LossLoggerCallback(log)])
    with pytest.raises(KeyboardInterrupt):
        resumed(make_trainer, [LossLoggerCallback(log), StopAt(5)], tmp_path)
    assert [line["step"] for line in lines(log)] == [2, 4, 4]


def test_an_evaluation_after_the_checkpoint_of_the_same_step_stays(make_trainer, tmp_path):
    log, arguments = tmp_path / "log.jsonl", {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    make_trainer([LossLoggerCallback(log)], **arguments, save_strategy="steps", save_steps=16).train()
    before = lines(log)
    state = json.loads((tmp_path / "trainer/checkpoint-16/trainer_state.json").read_text())
    assert not [entry for entry in state["log_history"] if "eval_loss" in entry]  # saved first, then evaluated
    resumed(make_trainer, [LossLoggerCallback(log)], tmp_path, 16, **arguments)
    assert [(line["step"], "loss" in line) for line in lines(log)] == [
        (line["step"], "loss" in line) for line in before
    ]
    assert lines(log)[:9] == before[:9]


def test_a_finished_run_that_is_resumed_repeats_nothing(make_trainer, tmp_path):
    log, arguments = tmp_path / "log.jsonl", {"max_steps": -1, "num_train_epochs": 1}  # 16 steps
    trainer = make_trainer([LossLoggerCallback(log)], **arguments, save_strategy="steps", save_steps=16)
    trainer.train()
    trainer.evaluate()
    before = lines(log)
    assert [line["step"] for line in before if "eval_loss" in line] == [4, 8, 12, 16, 16]
    trainer = resumed(make_trainer, [LossLoggerCallback(log)], tmp_path, 16, **arguments)
    trainer.evaluate()
    entries = lines(log)
    assert [line for line in entries if "loss" in line] == [line for line in before if "loss" in line]
    assert [line for line in entries if "train_loss" in line] == [line for line in before if "train_loss" in line]
    assert [line["step"] for line in entries if "eval_loss" in line] == [4, 8, 12, 16]


def test_a_run_that_goes_on_past_its_end_has_one_summary(make_trainer, tmp_path):
    log = tmp_path / "log.jsonl"
    make_trainer([LossLoggerCallback(log)], save_strategy="steps", save_steps=12).train()
    resumed(make_trainer, [LossLoggerCallback(log)], tmp_path, 12, max_steps=16)
    assert [line["step"] for line in lines(log) if "train_loss" in line] == [16]
    assert [line["step"] for line in lines(log) if "loss" in line] == list(range(2, 17, 2))


def test_a_new_run_sets_an_older_log_aside(make_trainer, tmp_path):
    log = tmp_path / "log.jsonl"
    make_trainer([LossLoggerCallback(log)]).train()
    first = log.read_text()
    make_trainer([LossLoggerCallback(log)], max_steps=2).train()
    assert (tmp_path / "log.jsonl.previous").read_text() == first
    assert {line["step"] for line in lines(log)} == {2}


def test_a_resumed_run_does_not_go_on_in_the_log_of_another(make_trainer, tmp_path, whole_log):
    log = tmp_path / "log.jsonl"
    interrupted(make_trainer, [])
    make_trainer([LossLoggerCallback(log)], learning_rate=1e-4).train()
    other = log.read_text()
    resumed(make_trainer, [LossLoggerCallback(log)], tmp_path)
    assert without_clocks(lines(log)) == whole_log
    assert (tmp_path / "log.jsonl.previous").read_text() == other


def test_other_processes_write_nothing(make_trainer, tmp_path):
    callback = LossLoggerCallback(tmp_path / "log.jsonl", tmp_path / "loss.png")
    state = TrainerState(max_steps=2, is_world_process_zero=False)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.0})
    callback.on_evaluate(None, state, None)
    callback.on_train_end(None, state, None)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_stops_nothing_and_leaves_no_hole(tmp_path, caplog):
    log, picture = tmp_path / "log.jsonl", tmp_path / "loss.png"
    callback, state = LossLoggerCallback(log, picture), TrainerState(max_steps=9)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback.on_train_begin(None, state, None)
    for step in range(1, 10):
        state.global_step = step
        room = disk_full_at(130) if 4 <= step <= 6 else disk_full_at(resource.RLIM_INFINITY)
        with room:
            callback.on_log(None, state, None, logs={"loss": 1 / step, "epoch": 0.0})
            callback.on_evaluate(arguments, state, None)
        if step == 6:
            assert [line["step"] for line in lines(log)[:3]] == [1, 2, 3]
            assert picture.read_bytes().startswith(PNG)
            assert not list(tmp_path.glob(".*"))
    assert [line["step"] for line in lines(log)] == list(range(1, 10))
    assert [record.message.split(" cannot be")[0] for record in caplog.records] == [
        str(log),
        "The picture of the losses",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "loss.png"]


def test_what_is_evaluated_before_the_training_is_of_no_run(make_trainer, tmp_path):
    log = tmp_path / "log.jsonl"
    trainer = make_trainer([LossLoggerCallback(log, tmp_path / "loss.png")])
    trainer.evaluate()
    assert not log.exists()


class PictureSteps(TrainerCallback):
    """Steps at whose end there is a new picture."""

    def __init__(self, path):
        self.path, self.seen, self.steps = path, None, []

    def on_step_begin(self, args, state, control, **kwargs):
        picture = self.path.stat().st_mtime_ns if self.path.exists() else None
        if picture != self.seen:
            self.steps.append(state.global_step)
        self.seen = picture


@pytest.mark.parametrize(("interval", "steps"), [(None, [4, 8]), (3, [3, 6, 9])])
def test_pictures_at_an_interval_or_at_evaluations_and_at_the_end(make_trainer, tmp_path, interval, steps):
    picture = tmp_path / "pictures" / "loss.png"
    watch = PictureSteps(picture)
    make_trainer([LossLoggerCallback(tmp_path / "log.jsonl", picture, interval), watch], logging_steps=1).train()
    assert watch.steps == steps
    assert picture.stat().st_mtime_ns > watch.seen
    assert picture.read_bytes().startswith(PNG)
    assert [path.name for path in picture.parent.iterdir()] == ["loss.png"]


def test_the_axis_may_be_logarithmic(tmp_path):
    history = [{"step": step, "loss": 5 / step - 0.05, "eval_a_loss": 6 / step} for step in range(1, 200)]
    for scale in ("linear", "log"):
        plot_losses(history, tmp_path / f"{scale}.png", scale)
    assert (tmp_path / "linear.png").read_bytes() != (tmp_path / "log.png").read_bytes()
    plot_losses([], tmp_path / "empty.png", "log")
    assert (tmp_path / "empty.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"y_scale": "sqrt"}, "y_scale='sqrt' must be one of 'linear', 'log'"),
        ({"plot_interval": 0}, "plot_interval=0 must be a whole number, 1 or more"),
        ({"plot_interval": 2.5}, "plot_interval=2.5 must be"),
        ({"log_path": "/"}, "log_path='/' must be a file"),
    ],
)
def test_a_logger_refuses(values, message):
    with pytest.raises(InputError, match=message):
        LossLoggerCallback(**{"log_path": "log.jsonl"} | values)


# SampleTextCallback

PROMPTS = ["w1 w2 w3 w4 w5", "w7", "w20 w21"]


def gpt2():
    ids = {"bos_token_id": 0, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=1, n_head=4, **ids))


@pytest.mark.parametrize("architecture", ["linformer", "gpt2"])
def test_samples_leave_no_trace_in_the_training(make_trainer, tokenizer, linformer, capsys, architecture):
    runs = []
    build_model = linformer if architecture == "linformer" else gpt2
    new_name = hasattr(TrainingArguments, "activation_checkpointing")  # since transformers 5.2x
    checkpointing = {"activation_checkpointing" if new_name else "gradient_checkpointing": True}
    arguments = {"logging_steps": 1, "max_steps": 5} | checkpointing
    for callbacks in ([], [SampleTextCallback(tokenizer, PROMPTS, interval=2, max_new_tokens=6, top_k=10)]):
        trainer = make_trainer(callbacks, build_model, **arguments)
        trainer.train()
        runs.append((without_clocks(trainer.state.log_history), [w.clone() for w in trainer.model.parameters()]))
        assert trainer.model.config.use_cache is False
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    assert capsys.readouterr().out.count(">>>") == 2 * len(PROMPTS)
    assert tokenizer.padding_side == "right"


class Draws(TrainerCallback):
    """Draws from every generator; holds a part of the model in evaluation mode."""

    def __init__(self):
        self.draws, self.modes = [], []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].eval()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        on_device = torch.rand((), device=args.device).item()
        self.draws.append((torch.rand(()).item(), on_device, random.random(), numpy.random.rand()))
        self.modes.append([module.training for module in model.modules()])


class DrawingProcessor(LogitsProcessor):
    """Part of a generation that draws from Python's and NumPy's generators."""

    def __call__(self, input_ids, scores):
        return scores + random.random() + numpy.random.rand()


def draws_behind_samples(make_trainer, tokenizer, linformer, **arguments):
    seen = []
    for interval in (1, 100):
        behind = Draws()
        draw = {"logits_processor": LogitsProcessorList([DrawingProcessor()])}
        callbacks = [SampleTextCallback(tokenizer, PROMPTS, interval, 4, **draw), behind]
        make_trainer(callbacks, linformer, max_steps=3, **arguments).train()
        seen.append((behind.draws, behind.modes))
    return seen


def test_modes_and_generators_are_put_back(make_trainer, tokenizer, linformer, capsys):
    sampled, plain = draws_behind_samples(make_trainer, tokenizer, linformer)
    assert sampled == plain
    assert set(plain[1][0]) == {True, False}


@pytest.mark.gpu
def test_the_generators_of_the_gpu_are_put_back(make_trainer, tokenizer, linformer, device, capsys):
    sampled, plain = draws_behind_samples(make_trainer, tokenizer, linformer, use_cpu=False)
    assert sampled == plain


@pytest.mark.gpu
def test_memory_and_peak_are_the_gpus(make_trainer, device):
    throughput = ThroughputCallback(BATCH * TOKENS, flops_per_token=1e6)
    trainer = make_trainer([throughput], use_cpu=False)
    trainer.train()
    summary = trainer.state.log_history[-1]
    assert 0 < summary["peak_memory_gib"] <= torch.cuda.max_memory_allocated() / 2**30
    known = peak_flops(torch.cuda.get_device_name())
    assert throughput.peak_flops == known
    assert ("model_flops_utilisation" in summary) == (known is not None)


def test_a_sample_is_the_models_continuation_of_each_prompt_alone(make_trainer, tokenizer, linformer, tmp_path, capsys):
    path = tmp_path / "samples" / "text.jsonl"
    callback = SampleTextCallback(tokenizer, PROMPTS, 2, 5, output_path=path, do_sample=False)
    trainer = make_trainer([callback], linformer, max_steps=4)
    trainer.train()
    printed, samples = capsys.readouterr().out, lines(path)
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(s, p) for s in (2, 4) for p in PROMPTS]
    for sample in samples[3:]:
        ids = torch.tensor([tokenizer(sample["prompt"])["input_ids"]])
        alone = trainer.model.eval().generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert sample["text"] == tokenizer.decode(alone, skip_special_tokens=True)
        assert f"step 4: {sample['prompt']} >>> {sample['text']}\n" in printed


def test_the_seed_decides_what_is_drawn(make_trainer, tokenizer, linformer, tmp_path, capsys):
    texts = []
    for seed in (0, 0, 1):
        path = tmp_path / "text.jsonl"
        callback = SampleTextCallback(tokenizer, PROMPTS, 1, 8, seed, path)
        make_trainer([callback], linformer, max_steps=2, learning_rate=0.0).train()
        texts.append([sample["text"] for sample in lines(path)])
        assert texts[-1][:3] == texts[-1][3:]  # drawn anew each time: the model has not changed
    assert texts[0] == texts[1] != texts[2]


def test_samples_stop_where_the_model_is_full(make_trainer, tokenizer, linformer, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    callback = SampleTextCallback(tokenizer, [" ".join(["w1"] * 30), "w2"], 2, 100, output_path=path)
    make_trainer([callback], linformer, max_steps=2).train()
    assert [len(sample["text"].split()) for sample in lines(path)] == [2, 2]  # the model holds 32


def test_samples_of_a_resumed_run_have_no_duplicates(make_trainer, tokenizer, linformer, tmp_path, capsys):
    make = partial(make_trainer, build_model=linformer)
    path, prompts = tmp_path / "text.jsonl", PROMPTS[:2]
    interrupted(make, [SampleTextCallback(tokenizer, prompts, 2, 4, output_path=path)])
    assert [sample["step"] for sample in lines(path)] == [2, 2, 4, 4, 6, 6]
    resumed(make, [SampleTextCallback(tokenizer, prompts, 2, 4, output_path=path)], tmp_path, max_steps=6)
    assert [sample["step"] for sample in lines(path)] == [2, 2, 4, 4, 6, 6]
    assert not (tmp_path / "text.jsonl.previous").exists()


def test_other_processes_sample_nothing(linformer, tokenizer, tmp_path, capsys):
    callback = SampleTextCallback(tokenizer, PROMPTS, 1, 4, output_path=tmp_path / "text.jsonl")
    state, model = TrainerState(global_step=1, is_world_process_zero=False), linformer()
    callback.on_train_begin(None, state, None, model=model)
    callback.on_step_end(None, state, None, model=model)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_a_sharded_model_is_skipped_with_a_warning(linformer, tokenizer, caplog, capsys):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(linformer(), mesh=mesh)
        callback = SampleTextCallback(tokenizer, PROMPTS, 1, 4)
        callback.on_train_begin(None, TrainerState(), None, model=model)
        callback.on_step_end(None, TrainerState(global_step=1), None, model=model)
    finally:
        torch.distributed.destroy_process_group()
    assert "spread over processes" in caplog.text
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": "w1"}, "prompts='w1' must be a list of one text or more"),
        ({"prompts": []}, "must be a list of one text or more"),
        ({"interval": 0}, "interval=0 must be a whole number, 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
        ({"prompts": ["w1", ""]}, "'' must give one token or more"),
        ({"prompts": ["w1 " * 32]}, "one of 32 tokens must be less than 32 tokens"),
    ],
)
def test_samples_refuse_before_the_first_step(make_trainer, tokenizer, linformer, values, message):
    with pytest.raises(InputError, match=message):
        make_trainer(
            [SampleTextCallback(**{"tokenizer": tokenizer, "prompts": PROMPTS, "interval": 1} | values)], linformer
        ).train()


def test_a_model_that_cannot_write_is_refused(make_trainer, tokenizer):
    with pytest.raises(InputError, match="needs a model that can generate; Bigram cannot"):
        make_trainer([SampleTextCallback(tokenizer, PROMPTS, 1)]).train()


# ThroughputCallback


class Slow(TrainerCallback):
    """Steps that take 30 ms at least, evaluations that take half a second and checkpoints that take another."""

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.03)

    def on_prediction_step(self, args, state, control, **kwargs):
        time.sleep(0.5)

    def on_save(self, args, state, control, **kwargs):
        time.sleep(0.5)


def speeds(history, key="tokens_per_second"):
    return {entry["step"]: entry[key] for entry in history if key in entry and "loss" in entry}


def test_speed_is_of_the_training_alone(make_trainer):
    positions = BATCH * TOKENS
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    trainer = make_trainer([Slow(), ThroughputCallback(positions)], **saving)
    trainer.train()
    measured = speeds(trainer.state.log_history)
    assert list(measured) == [4, 6, 8, 10, 12]  # the first two steps are left out
    seconds_per_step = [positions / speed for speed in measured.values()]
    assert min(seconds_per_step) >= 0.03
    # With 3 evaluations and checkpoints of half a second each it would be 0.28 and more on average.
    assert sum(seconds_per_step) / 5 < 0.2
    summary = trainer.state.log_history[-1]
    assert 0.03 <= positions / summary["tokens_per_second"] < 0.2


def test_time_left_is_by_the_clock_on_the_wall(make_trainer):
    trainer = make_trainer([Slow(), ThroughputCallback(BATCH * TOKENS)])
    trainer.train()
    left = speeds(trainer.state.log_history, "seconds_left")
    assert left[12] == 0
    assert left[10] >= 2 * (0.03 + 0.5 * 2 / 8)  # 8 steps so far with two evaluations, 2 to go


class Clock(TrainerCallback):
    """When its turn came, at the beginning and end of each step."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    on_step_end = on_step_begin


@pytest.mark.parametrize("work", ["samples", "pictures"])
@pytest.mark.parametrize("behind", [False, True])
def test_samples_and_pictures_are_no_training(make_trainer, tokenizer, linformer, tmp_path, capsys, work, behind):
    positions, before, after = BATCH * TOKENS, Clock(), Clock()
    if work == "samples":
        callback = SampleTextCallback(tokenizer, PROMPTS, 1, 20)
    else:
        callback = LossLoggerCallback(tmp_path / "log.jsonl", tmp_path / "loss.png", plot_interval=1)
    callbacks = [before, callback, after]
    # Logs and evaluations come at other steps, so that the work also falls between a step and its evaluation.
    callbacks.insert(3 if behind else 0, ThroughputCallback(positions, warmup_steps=0))
    trainer = make_trainer(callbacks, linformer, logging_steps=3, eval_steps=2, max_steps=5)
    start = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - start
    spent = sum(after.times) - sum(before.times)
    training = 5 * positions / trainer.state.log_history[-1]["tokens_per_second"]
    # From the last callback of a step's beginning to the first of its end, in the same run: machines have slow moments.
    steps = sum(end - begin for begin, end in zip(after.times[::2], before.times[1::2], strict=True))
    assert spent > 0.1 * elapsed
    assert 0.9 * steps < training < elapsed - 0.9 * spent


def test_utilisation_is_achieved_over_possible_flops(make_trainer):
    trainer = make_trainer([ThroughputCallback(BATCH * TOKENS, flops_per_token=5e6, peak_flops=1e12)])
    trainer.train()
    for entry in trainer.state.log_history[2:]:
        if "tokens_per_second" in entry:
            assert entry["model_flops_utilisation"] == pytest.approx(entry["tokens_per_second"] * 5e6 / 1e12)
    assert len(speeds(trainer.state.log_history, "model_flops_utilisation")) == 5


def test_tokens_are_the_trainers_count_or_unknown(make_trainer):
    trainer = make_trainer([ThroughputCallback()], include_num_input_tokens_seen=True)
    trainer.train()
    assert len(speeds(trainer.state.log_history)) == 5
    trainer = make_trainer([ThroughputCallback(flops_per_token=1.0, peak_flops=1.0)])
    trainer.train()
    first = trainer.state.log_history[1]
    assert not first.keys() & {"tokens_per_second", "model_flops_utilisation"}
    assert first["peak_memory_gib"] > 0.01
    assert first["seconds_left"] > 0


def test_the_interval_is_the_fewest_steps_of_a_measurement(make_trainer):
    trainer = make_trainer([ThroughputCallback(BATCH * TOKENS, interval=5, warmup_steps=1)], logging_steps=1)
    trainer.train()
    assert list(speeds(trainer.state.log_history)) == [6, 11]


def test_in_front_of_the_reporters_they_get_the_numbers_too(make_trainer, tmp_path):
    reporter, throughput, log = Spy(), ThroughputCallback(BATCH * TOKENS), tmp_path / "log.jsonl"
    trainer = make_trainer([reporter, LossLoggerCallback(log)])
    throughput.add_to(trainer)
    trainer.train()
    assert reporter.logs == trainer.state.log_history == lines(log)
    assert len(speeds(reporter.logs)) == 5
    evaluations = [entry for entry in reporter.logs if "eval_loss" in entry]
    assert not [key for entry in evaluations for key in entry if key in ("tokens_per_second", "seconds_left")]


def test_a_resumed_run_measures_its_own_steps(make_trainer, tmp_path):
    interrupted(make_trainer, [])
    throughput = ThroughputCallback(BATCH * TOKENS)
    log = LossLoggerCallback(tmp_path / "log.jsonl")
    trainer = resumed(make_trainer, [throughput, log], tmp_path)
    assert list(speeds(trainer.state.log_history)) == [8, 10, 12]


@pytest.mark.parametrize(
    "values", [{"tokens_per_step": 0}, {"peak_flops": -1.0}, {"interval": 0}, {"warmup_steps": -1}]
)
def test_throughput_refuses(values):
    with pytest.raises(InputError, match="must be"):
        ThroughputCallback(**values)
