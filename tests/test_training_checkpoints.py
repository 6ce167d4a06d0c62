"""Runs that are killed, stopped, short of disk space or poisoned: what is left, and what the next run makes of it."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
import warnings
from functools import partial

import pytest
import torch
import transformers
from checkpoint_run import (
    STEPS,
    BrokenWeight,
    Interrupted,
    Overflowing,
    Poisoned,
    PoisonedAtASave,
    allow_fsdp_on_cpu,
    kill_at,
    kill_inside_torch_save,
    limit_file_size,
    send,
    start,
    start_together,
    train,
)

from linpass.errors import InputError
from linpass.training import checkpoints
from linpass.training.checkpoints import (
    CrashSafeTrainer,
    StopSignals,
    check_checkpoint,
    clean_up,
    compare_runs,
    describe_run,
    find_damage,
    last_complete_checkpoint,
    publish,
    read_manifest,
    rotate,
    seal,
)


def outcome(tmp_path, rank=0):
    return json.loads((tmp_path / f"result.{rank}").read_text())


def wait_for(processes):
    """Exit statuses; processes that wait for each other are ended after two minutes, and theirs is not 0."""
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run(tmp_path, **keywords):
    """Exit status of a run whose checkpoints are in tmp_path/run."""
    return wait_for([start(train, tmp_path / "run", tmp_path / "result", **keywords)])[0]


def run_together(tmp_path, **keywords):
    return wait_for(start_together(2, train, tmp_path / "run", tmp_path / "result", **keywords))


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def names(folder):
    return {path.name for path in folder.iterdir()}


def assert_all_complete(folder):
    assert {path.name: find_damage(path) for path in folder.glob("checkpoint-*") if find_damage(path)} == {}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nobody stopped, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, save_total_limit=None) == 0
    return folder


@pytest.fixture
def assert_as_undisturbed(undisturbed):
    """Losses, gradient norms, mean loss and weights are the undisturbed run's, to the bit."""

    def compare(tmp_path):
        expected, got = outcome(undisturbed), outcome(tmp_path)
        assert got["error"] is None
        assert [got[k] for k in ("log", "weights", "step")] == [expected[k] for k in ("log", "weights", "step")]

    return compare


# -- killed

KILLED = {
    "first file": partial(kill_at, "open", ".incomplete/checkpoint-6/config.json"),
    "in the optimizer": partial(kill_inside_torch_save, "checkpoint-6/optimizer.pt"),
    "generator states": partial(kill_at, "open", "checkpoint-6/running_loss_0.json"),
    "no manifest": partial(kill_at, "open", "checkpoint-6/manifest.json"),
    "before the rename": partial(kill_at, "os.rename", ".incomplete/checkpoint-6"),
    "before the rotation": partial(kill_at, "os.rename", "run/checkpoint-3"),
    "in the rotation": partial(kill_at, "os.rmdir", ".discarded/checkpoint-3"),
}


@pytest.mark.parametrize("before", KILLED.values(), ids=KILLED.keys())
def test_killed_while_saving_and_resumed_to_the_same_bits(tmp_path, before, assert_as_undisturbed):
    assert run(tmp_path, before=before) == -signal.SIGKILL
    assert_all_complete(tmp_path / "run")
    assert steps(tmp_path / "run") in ([3], [3, 6], [6])  # save_total_limit=1: one is always there
    assert run(tmp_path, resume=True) == 0
    assert_as_undisturbed(tmp_path)
    assert names(tmp_path / "run") == {"checkpoint-10"}


def test_killed_again_and_again_at_any_moment(tmp_path, assert_as_undisturbed):
    folder, kills, delays = tmp_path / "run", 0, random.Random(0)
    for attempt in range(6):
        found = last_complete_checkpoint(folder)
        process = start(train, folder, tmp_path / "result", resume=found is not None)
        while process.is_alive() and not (folder / ".incomplete").exists():
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.25) if attempt else 0)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert_all_complete(folder)
        assert found is None or steps(folder)
    assert kills
    assert run(tmp_path, resume=last_complete_checkpoint(folder) is not None) == 0
    assert_as_undisturbed(tmp_path)


def test_killed_while_a_checkpoint_is_written_a_second_time(tmp_path, undisturbed, assert_as_undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    for step in (9, 10):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    again = {"resume": str(tmp_path / "run/checkpoint-3"), "save_total_limit": None}
    # the older checkpoint-6 has been moved away, the new one has no name yet
    assert run(tmp_path, before=partial(kill_at, "os.rename", ".incomplete/checkpoint-6"), **again) == -signal.SIGKILL
    assert steps(tmp_path / "run") == [3]
    clean_up(tmp_path / "run")
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-6"
    assert run(tmp_path, **again) == 0
    assert steps(tmp_path / "run") == [3, 6, 9, 10]
    assert_all_complete(tmp_path / "run")
    assert_as_undisturbed(tmp_path)


def test_a_finished_run_resumed_takes_no_step_more(tmp_path, undisturbed, assert_as_undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    assert run(tmp_path, resume=True) == 0
    result = outcome(tmp_path)
    assert result["step"] == STEPS
    assert result["log"][-1] == outcome(undisturbed)["log"][-1]
    assert result["weights"] == outcome(undisturbed)["weights"]


def test_the_same_global_batch_in_other_pieces_may_go_on(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "run/checkpoint-6", tmp_path / "run/checkpoint-6")
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "dropout": 0.1}
    assert run(tmp_path, resume=True, **sizes) == 0
    assert outcome(tmp_path)["error"] is None
    expected = [entry["loss"] for entry in outcome(undisturbed)["log"] if "loss" in entry]
    got = [entry["loss"] for entry in outcome(tmp_path)["log"] if "loss" in entry]
    assert got == pytest.approx(expected, rel=0.02)  # dropout draws other numbers


# -- damaged


def small_checkpoint(folder, step, size=1000):
    path = folder / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    for name in ("model.safetensors", "scheduler.pt", "shards/0.distcp"):
        (path / name).write_bytes(bytes(size))
    seal(path, step, {"training": {"seed": 1}})
    return path


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "model.safetensors has 400 bytes of 1,000": lambda path: os.truncate(path / "model.safetensors", 400),
    "model.safetensors has other contents than were written": lambda path: flip_a_bit(path / "model.safetensors"),
    "shards/0.distcp is missing": lambda path: (path / "shards/0.distcp").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda path: os.truncate(path / "manifest.json", 40),
}


@pytest.mark.parametrize(("words", "damage"), DAMAGE.items(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, words, damage):
    older, newest = small_checkpoint(tmp_path, 9), small_checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == newest
    check_checkpoint(newest)
    damage(newest)
    with pytest.warns(UserWarning, match=f"checkpoint-10 is skipped: {words}"):
        assert last_complete_checkpoint(tmp_path) == older
    with pytest.raises(InputError, match=f"resume_from_checkpoint=.*checkpoint-10' must be .* complete .*{words}"):
        check_checkpoint(str(newest))


def test_what_is_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(InputError, match="nowhere' must be a folder with a checkpoint"):
        check_checkpoint(tmp_path / "nowhere")
    path = small_checkpoint(tmp_path, 8)
    (path / "scheduler.pt").unlink()
    seal(path, 8)
    with pytest.raises(InputError, match="save_only_model"):
        check_checkpoint(path)


def test_a_run_goes_on_from_the_one_before_a_truncated_one(tmp_path, undisturbed, assert_as_undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    for step in (9, 10):
        os.truncate(tmp_path / f"run/checkpoint-{step}/optimizer.pt", 100)
    with pytest.warns(UserWarning, match="is skipped: optimizer.pt has 100 bytes") as caught:
        assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-6"
    assert len(caught) == 2
    assert run(tmp_path, resume=True, save_total_limit=2) == 0
    assert_as_undisturbed(tmp_path)
    assert_all_complete(tmp_path / "run")
    assert steps(tmp_path / "run") == [9, 10]


def test_rotation_keeps_the_new_the_best_and_whole_ones(tmp_path):
    paths = {step: small_checkpoint(tmp_path, step) for step in (1, 2, 3, 4, 20)}
    os.truncate(paths[4] / "model.safetensors", 10)
    rotate(paths[3], None)
    assert steps(tmp_path) == [1, 2, 3, 4, 20]
    rotate(paths[3], 3, best=str(paths[1]))  # 20 is of an earlier run, 3 has just been written
    assert steps(tmp_path) == [1, 3, 20]
    rotate(paths[3], 1, best=str(paths[1]))
    assert steps(tmp_path) == [1, 3]
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-3"}


def test_publish_replaces_a_checkpoint_of_the_same_name(tmp_path):
    small_checkpoint(tmp_path, 5)
    staged = small_checkpoint(tmp_path / ".incomplete", 5, size=2000)
    publish(staged, tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5/model.safetensors").stat().st_size == 2000
    assert names(tmp_path) == {"checkpoint-5"}


# -- stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_bits(tmp_path, number, assert_as_undisturbed):
    stop = Interrupted(5, partial(send, number))  # between two logs and between two checkpoints
    assert run(tmp_path, callbacks=[stop]) == 0
    result = outcome(tmp_path)
    assert result["stopped"]
    assert result["error"] is None
    assert steps(tmp_path / "run") == [result["step"]] == [5]
    assert result["handlers"] == [str(signal.SIG_DFL), str(signal.default_int_handler)]
    assert run(tmp_path, resume=True) == 0
    assert not outcome(tmp_path)["stopped"]
    assert_as_undisturbed(tmp_path)


def test_a_stopped_run_is_resumed_even_when_an_earlier_checkpoint_was_better(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
    best |= {"learning_rate": 0.5}  # starts with a loss far above the later ones
    assert run(tmp_path, callbacks=[Interrupted(7, partial(send, signal.SIGTERM))], **best) == 0
    state = json.loads((tmp_path / "run/checkpoint-7/trainer_state.json").read_text())
    assert state["best_global_step"] == 3
    assert state["best_model_checkpoint"] == str(tmp_path / "run/checkpoint-3")
    assert steps(tmp_path / "run") == [3, 7]


def test_the_second_ctrl_c_is_immediate():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_transformers_own_way_of_stopping_is_refused(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, enable_jit_checkpoint=True)
    with pytest.raises(InputError, match="enable_jit_checkpoint=True must be False"):
        CrashSafeTrainer(torch.nn.Linear(2, 2), arguments)


def test_two_processes_stop_at_one_step_and_go_on_to_the_same_bits(tmp_path):
    rare = {"save_strategy": "no", "logging_steps": 4}  # the processes need not wait for a number in step 5 or 6
    assert run_together(tmp_path, **rare) == [0, 0]
    expected = outcome(tmp_path)
    stop = Interrupted(5, partial(send, signal.SIGTERM, rank=1))
    assert run_together(tmp_path, callbacks=[stop], **rare) == [0, 0]
    for rank in range(2):
        assert [outcome(tmp_path, rank)[k] for k in ("step", "stopped")] == [6, True]
    assert steps(tmp_path / "run") == [6]
    assert names(tmp_path / "run/checkpoint-6") >= {"rng_state_0.pth", "rng_state_1.pth", "running_loss_1.json"}
    assert run_together(tmp_path, resume=True, **rare) == [0, 0]
    assert outcome(tmp_path) == expected


SHARDED = {
    "before": allow_fsdp_on_cpu,
    "fsdp": "full_shard",
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LinformerBlock"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def test_two_processes_that_share_one_model_go_on_to_the_same_bits(tmp_path):
    kinds = SHARDED | {"logging_steps": 4}
    assert run_together(tmp_path, **kinds) == [0, 0]
    expected = outcome(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert run_together(tmp_path, callbacks=[Interrupted(7, partial(send, signal.SIGTERM))], **kinds) == [0, 0]
    assert steps(tmp_path / "run") == [8]
    assert {"pytorch_model_fsdp_0", "optimizer_0"} <= names(tmp_path / "run/checkpoint-8")
    assert run_together(tmp_path, resume=True, **kinds) == [0, 0]
    assert outcome(tmp_path) == expected


# -- full disk


@pytest.mark.parametrize("size", [20_000, 100_000, 300_000], ids=["code", "weights", "optimizer"])
def test_a_full_disk_leaves_what_was_complete(tmp_path, size):
    full = Interrupted(4, partial(limit_file_size, size))
    assert run(tmp_path, callbacks=[full], embed_dim=64, dropout=0.1) == 0
    folder = tmp_path / "run"
    assert outcome(tmp_path)["error"].startswith(f"InputError: checkpoint-6 could not be written to '{folder}': ")
    assert f"the last complete checkpoint is '{folder / 'checkpoint-3'}'" in outcome(tmp_path)["error"]
    assert "free space, then go on with linpass train --resume" in outcome(tmp_path)["error"]
    assert names(folder) == {"checkpoint-3"}
    assert_all_complete(folder)


@pytest.mark.parametrize("kind", [{}, SHARDED], ids=["DDP", "FSDP"])
def test_a_full_disk_of_one_process_ends_both(tmp_path, kind):
    assert run_together(tmp_path, callbacks=[Interrupted(4, partial(limit_file_size, 2000, rank=1))], **kind) == [0, 0]
    for rank in range(2):
        assert "checkpoint-6 could not be written" in outcome(tmp_path, rank)["error"]
    assert names(tmp_path / "run") == {"checkpoint-3"}
    assert_all_complete(tmp_path / "run")


# -- another run


def test_another_configuration_is_refused_with_names(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "run/checkpoint-6", tmp_path / "run/checkpoint-6")
    changes = {"learning_rate": 0.5, "gradient_accumulation_steps": 4, "dropout": 0.2}
    assert run(tmp_path, resume=True, save_steps=5, **changes) == 0
    assert outcome(tmp_path)["error"] == (
        "InputError: resume: dropout=0.2 must be 0.1, the value of checkpoint-6; "
        "global_batch_size=8 must be 4; learning_rate=0.5 must be 0.01"
    )
    assert outcome(tmp_path)["step"] == 0
    assert names(tmp_path / "run") == {"checkpoint-6"}


def test_resume_leaves_out_the_checkpoints_of_an_earlier_run_with_other_settings(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")  # up to step 10
    stop = Interrupted(5, partial(send, signal.SIGTERM))
    slower = {"learning_rate": 1e-3, "save_total_limit": None}
    assert run(tmp_path, callbacks=[stop], **slower) == 0
    current = read_manifest(tmp_path / "run/checkpoint-5")["run"]
    with pytest.warns(UserWarning, match="checkpoint-(10|9|6) is skipped: it belongs to a run with other settings"):
        assert last_complete_checkpoint(tmp_path / "run", current) == tmp_path / "run/checkpoint-5"
    assert run(tmp_path, resume=True, **slower) == 0
    assert [entry["learning_rate"] for entry in outcome(tmp_path)["log"][:-1]] == pytest.approx(
        [entry["learning_rate"] / 10 for entry in outcome(undisturbed)["log"][:-1]]
    )
    assert outcome(tmp_path)["step"] == STEPS


def test_every_kind_of_difference(tiny_config, tmp_path):
    def describe(config=None, data=None, **arguments):
        values = {"output_dir": str(tmp_path), "use_cpu": True, **arguments}
        return describe_run(config or tiny_config(), transformers.TrainingArguments(**values), data or {"files": "ab"})

    first = describe()
    compare_runs(first, describe(output_dir="elsewhere", logging_steps=7, report_to="none", eval_strategy="steps"))
    compare_runs(first, describe(per_device_train_batch_size=2, gradient_accumulation_steps=4))
    different = {
        "depth=3 must be 2|num_hidden_layers=3 must be 2": describe(tiny_config(depth=3)),
        "files='c' must be 'ab'": describe(data={"files": "c"}),
        "noise=0.1 must be None": describe(data={"files": "ab", "noise": 0.1}),
        "seed=1 must be 42, the value of checkpoint-8": describe(seed=1),
        "lr_scheduler_type='cosine' must be 'linear'": describe(lr_scheduler_type="cosine"),
        "global_batch_size=16 must be 8": describe(gradient_accumulation_steps=2),
    }
    for words, other in different.items():
        with pytest.raises(InputError, match=f"^resume: ({words})"):
            compare_runs(first, other, "checkpoint-8")


def test_what_may_differ_are_real_fields():
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    own = {"checkpoint_dir", "plot_scale", "plot_steps", "resume", "sample_prompts", "sample_steps"}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # transformers 5.2x
    assert known | own | newer >= checkpoints.MAY_DIFFER
    assert not checkpoints.MAY_DIFFER & {"learning_rate", "seed", "optim", "num_train_epochs", "bf16", "fsdp"}


def test_resume_without_a_checkpoint(tmp_path):
    assert run(tmp_path, resume=True) == 0
    assert outcome(tmp_path)["error"] == f"InputError: resume: '{tmp_path / 'run'}' holds no complete checkpoint"


# -- not finite


@pytest.mark.parametrize("trainer", [Poisoned, PoisonedAtASave])
def test_a_nan_loss_names_step_and_batch_and_is_not_saved(tmp_path, trainer):
    assert run(tmp_path, trainer=trainer) == 0
    result, step = outcome(tmp_path), trainer.step
    batch = 2 * step - 1
    assert result["error"] == (
        f"DivergedError: step {step}: the loss is not finite; in epoch 0 batch {batch} "
        f"(documents of epoch 0, batch {batch}) has loss nan; "
        f"the last complete checkpoint is '{tmp_path / 'run/checkpoint-3'}'"
    )
    assert steps(tmp_path / "run") == [3]
    assert_all_complete(tmp_path / "run")
    losses = [entry["loss"] for entry in result["log"] if "loss" in entry]
    assert losses
    assert all(loss == loss for loss in losses)


def test_an_infinite_gradient_is_not_saved(tmp_path):
    assert run(tmp_path, trainer=Overflowing) == 0
    assert "DivergedError: step 6: the gradient norm is not finite" in outcome(tmp_path)["error"]
    assert "batch 10 (documents of epoch 0, batch 10) has loss 1." in outcome(tmp_path)["error"]
    assert steps(tmp_path / "run") == [3]


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    assert run(tmp_path, callbacks=[BrokenWeight()]) == 0
    assert outcome(tmp_path)["error"] == (
        f"DivergedError: step 6: a weight is not finite; the last complete checkpoint is "
        f"'{tmp_path / 'run/checkpoint-3'}'"
    )
    assert steps(tmp_path / "run") == [3]


def test_a_nan_in_one_of_two_processes_ends_both(tmp_path):
    assert run_together(tmp_path, trainer=Poisoned) == [0, 0]
    for rank in range(2):
        error = outcome(tmp_path, rank)["error"]
        assert "DivergedError: step 5: the loss is not finite; in epoch 1 batch 3 of process 1" in error
    assert steps(tmp_path / "run") == [3]


def test_a_whole_run_warns_of_nothing(tmp_path, undisturbed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_complete_checkpoint(undisturbed / "run") == undisturbed / "run/checkpoint-10"
