"""Passes that are stopped or killed, and go on: to the same bits, from complete checkpoints of the same pass only."""

import json
import random
import re
import shutil
import signal
import time
from functools import partial

import pytest
import torch
import transformers
from checkpoint_run import kill_at, limit_file_size
from singlepass_run import (
    ROWS,
    Act,
    Pause,
    Stream,
    Texts,
    head_of,
    kill,
    kill_inside_save,
    make_model,
    make_trainer,
    outcome,
    run_pass,
    start,
    stop,
    wait_for,
)

from linpass.errors import InputError
from linpass.training.checkpoints import find_damage

# The same rows in float64, added in another order.
SUMS = 1e-12

KINDS = {
    "linear": {},
    "tsqr": {"precision": "tsqr"},
    "logistic": {"estimator": "auto", "calibrate": True},
    "loo": {"regularization": "loo"},
    "kfold": {"regularization": "kfold"},
    "balanced": {"class_weight": "balanced", "calibrate": True, "calibration_rows": 30},
    "relu": {"kernel": "relu", "num_features": 12, "bandwidth": 2.0},
    "rff": {"kernel": "rff", "num_features": 12, "bandwidth": 2.0, "calibrate": True},
    "rbf": {"kernel": "rbf", "regularization": 0.1},
    "sgd": {"match": "sgd", "learning_rate": 0.1, "momentum": 0.9, "gradient_accumulation_steps": 4},
}
SAVING = {"save_strategy": "steps", "save_steps": 5}


def resume(folder, checkpoint=True, **changes):
    trainer = make_trainer(folder, **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def whole(folder, **changes):
    trainer = make_trainer(folder, **SAVING, **changes)
    trainer.train()
    return trainer


def assert_equal_heads(trainer, other, tolerance=0.0):
    for got, expected in zip(head_of(trainer), head_of(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


# -- going on


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_a_resumed_pass_gives_the_same_bits_and_reads_only_what_is_left(tmp_path, changes):
    expected = whole(tmp_path, **changes)
    assert steps(tmp_path) == [5, 10, 14]
    shutil.rmtree(tmp_path / "checkpoint-14")
    rows = Texts()
    trainer = resume(tmp_path, rows=rows, **SAVING, **changes)  # from checkpoint-10
    assert sum(rows.reads) == ROWS - 40
    assert_equal_heads(trainer, expected)
    assert trainer.temperature == expected.temperature
    assert (trainer.rows, trainer.state.global_step) == (ROWS, 14)
    if not changes.keys() & {"match", "precision"}:  # those cannot forget
        trainer.forget([3, 45])
        assert_equal_heads(trainer, [expected.forget([3, 45]), expected][1])


@pytest.mark.parametrize("changes", [{}, KINDS["logistic"], KINDS["sgd"]], ids=["linear", "logistic", "sgd"])
def test_another_batch_size_and_no_further_checkpoints_change_the_order_of_sums_only(tmp_path, changes):
    expected = whole(tmp_path, **changes)
    other = {"per_device_train_batch_size": 9}
    if changes.get("match") == "sgd":  # the batches that are imitated stay: 16 rows
        other = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    trainer = resume(tmp_path, str(tmp_path / "checkpoint-5"), **changes | other)
    assert trainer.state.global_step == 5 + -(-(ROWS - 20) // other["per_device_train_batch_size"])
    assert_equal_heads(trainer, expected, 1e-9)


@pytest.mark.parametrize("kernel", ["nystrom", "relu"])
def test_a_map_that_was_fitted_to_the_first_rows_comes_back(tmp_path, kernel, monkeypatch):
    monkeypatch.setattr("linpass.singlepass.reading.MAP_ROWS", 24)
    changes = {"kernel": kernel, "num_features": 9, "regularization": 0.1}
    expected = whole(tmp_path, **changes)
    assert steps(tmp_path) == [10, 14]  # at step 5 rows were still waiting
    trainer = resume(tmp_path, str(tmp_path / "checkpoint-10"), **SAVING, **changes)
    for name, value in expected.model.feature_map.state_dict().items():
        assert torch.equal(trainer.model.feature_map.state_dict()[name], value)
    assert_equal_heads(trainer, expected)


def test_a_stream_goes_on_after_the_rows_that_were_seen(tmp_path):
    expected = whole(tmp_path, rows=Stream(Texts()))
    trainer = resume(tmp_path, str(tmp_path / "checkpoint-10"), rows=Stream(Texts()), **SAVING)
    assert_equal_heads(trainer, expected)


def test_a_finished_pass_resumed_reads_nothing_and_has_its_head(tmp_path):
    expected, rows = whole(tmp_path), Texts()
    trainer = resume(tmp_path, rows=rows, **SAVING)
    assert sum(rows.reads) == 0
    assert_equal_heads(trainer, expected)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-14")
    assert torch.equal(stock.classifier.weight.double(), expected.model.classifier.weight)


def test_a_pass_ended_by_max_steps_goes_on_with_more(tmp_path):
    whole(tmp_path, max_steps=7)
    trainer = resume(tmp_path, **SAVING)
    assert trainer.rows == ROWS
    assert_equal_heads(trainer, whole(tmp_path / "other"), SUMS * 1e3)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert steps(tmp_path) == [12, 14]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_log_goes_on(tmp_path):
    expected = whole(tmp_path, logging_steps=3).state.log_history
    got = resume(tmp_path, str(tmp_path / "checkpoint-10"), logging_steps=3).state.log_history
    lines = [[(line["step"], line["rows"], line["epoch"]) for line in log] for log in (got, expected)]
    assert lines[0] == lines[1]


# -- killed and stopped

KILLED = {
    "in the pass": ({"callbacks": [Act(7, kill)]}, [5]),
    "in the sums": ({"before": partial(kill_inside_save, "checkpoint-10/collection.safetensors")}, [5]),
    "before the manifest": ({"before": partial(kill_at, "open", "checkpoint-10/manifest.json")}, [5]),
    "before the rename": ({"before": partial(kill_at, "os.rename", ".incomplete/checkpoint-10")}, [5]),
}


def run(folder, **changes):
    changes = {**KINDS["logistic"], **SAVING, **changes}
    return wait_for([start(run_pass, folder / "run", folder / "result", **changes)])[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder) == 0
    return outcome(folder)


@pytest.mark.parametrize(("how", "left"), KILLED.values(), ids=KILLED.keys())
def test_killed_and_resumed_to_the_same_bits(tmp_path, undisturbed, how, left):
    assert run(tmp_path, **how) == -signal.SIGKILL
    assert steps(tmp_path / "run") == left
    assert all(find_damage(path) is None for path in (tmp_path / "run").glob("checkpoint-*"))
    assert run(tmp_path, resume=True) == 0
    result = outcome(tmp_path)
    assert [result[name] for name in ("error", "head", "sums", "temperature", "rows", "step")] == [
        undisturbed[name] for name in ("error", "head", "sums", "temperature", "rows", "step")
    ]
    # what only lacked its name when it was killed was gone on from
    first = 40 if "os.rename" in str(how) else 20
    assert result["reads"] == [0] * first + [1] * (ROWS - first)


def test_killed_at_any_moment(tmp_path, undisturbed):
    delays, changes = random.Random(0), {"save_steps": 1, "save_total_limit": 1}
    for _attempt in range(3):
        process = start(
            run_pass,
            tmp_path / "run",
            tmp_path / "result",
            resume=bool(steps(tmp_path / "run")),
            callbacks=[Pause(0.01)],
            **KINDS["logistic"],
            **{**SAVING, **changes},
        )
        while process.is_alive() and not (tmp_path / "run/.incomplete").exists():
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.1))
        process.kill()
        process.join()
        assert all(find_damage(path) is None for path in (tmp_path / "run").glob("checkpoint-*"))
    assert run(tmp_path, resume=bool(steps(tmp_path / "run")), **changes) == 0
    got, expected = (torch.tensor(result["head"][0]) for result in (outcome(tmp_path), undisturbed))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert outcome(tmp_path)["rows"] == ROWS


def test_a_whole_pass_has_all_its_rows_when_it_is_resumed(tmp_path, undisturbed):
    for resume in (False, True):
        assert run(tmp_path, resume=resume, save_steps=1) == 0
        result = outcome(tmp_path)
        assert result["rows"] == result["log"][-1]["rows"] == ROWS
        got, expected = (torch.tensor(found["head"][0]) for found in (result, undisturbed))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert result["log"][-1]["train_samples_per_second"] == 0  # of this run


def test_a_signal_ends_the_pass_with_a_checkpoint_and_without_a_head(tmp_path, undisturbed):
    assert run(tmp_path, callbacks=[Act(7, stop)], save_strategy="no") == 0
    result = outcome(tmp_path)
    assert (result["solved"], result["step"], result["rows"]) == (False, 7, 28)
    assert [line for line in result["log"] if "train_loss" in line] == []
    assert steps(tmp_path / "run") == [7]
    assert run(tmp_path, resume=True) == 0
    got, expected = (torch.tensor(found["head"][0]) for found in (outcome(tmp_path), undisturbed))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_a_signal_after_an_evaluation_leaves_no_solution_of_fewer_rows(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=Texts(8), eval_strategy="steps", eval_steps=2, callbacks=[Act(5, stop)])
    handler = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert trainer.solution is trainer.collection is None
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(InputError, match="needs a pass first"):
        trainer.refit()


def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoints_before(tmp_path):
    full = Act(8, partial(limit_file_size, 700))
    assert run(tmp_path, callbacks=[full]) == 0
    assert re.fullmatch("checkpoint-10 could not be written: .*File too large.*", outcome(tmp_path)["error"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-5"]


# -- checkpoints that cannot be gone on from


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """A folder with the checkpoints of an ordinary pass."""
    folder = tmp_path_factory.mktemp("passed")
    whole(folder)
    return folder


DAMAGE = {
    "collection.safetensors": "collection.safetensors has",
    "trainer_state.json": "trainer_state.json has",
    "pass.json": "pass.json has",
    "manifest.json": "manifest.json cannot be read",
}


@pytest.mark.parametrize(("name", "message"), DAMAGE.items())
def test_a_truncated_checkpoint_is_refused_and_passed_over(tmp_path, passed, name, message):
    for step in (5, 10):
        shutil.copytree(passed / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = Texts()
    with pytest.raises(InputError, match=f"resume_from_checkpoint='.*checkpoint-10' must be .* {message}"):
        resume(tmp_path, str(tmp_path / "checkpoint-10"), rows=rows)
    assert sum(rows.reads) == 0
    with pytest.warns(UserWarning, match="checkpoint-10 is skipped"):
        trainer = resume(tmp_path)
    assert trainer.rows == ROWS


OTHERS = {
    "features='BertForSequenceClassification-.*' must be": {"model": lambda: make_model(seed=2)},
    "rows=50 must be 53": {"rows": lambda: Texts(50)},
    "rows=None must be 53": {"rows": lambda: Stream(Texts())},
    "kernel='relu' must be 'linear'": {"kernel": "relu"},
    "precision='mixed' must be 'float64'": {"precision": "mixed"},
    "regularization='kfold of 5, seed 42' must be 'gcv or a number'": {"regularization": "kfold"},
    "regularization='loo' must be": {"regularization": "loo"},
    "estimator='auto' must be 'ridge'": {"estimator": "auto"},
    "match='sgd' must be": {"match": "sgd"},
    "class_weight='sums per class' must be None": {"class_weight": [1, 2, 3]},
    "calibrate=True must be False": {"calibrate": True},
    "labels=4 must be 3": {"model": lambda: make_model(classes=4)},
    "sample_weight_column='weight' must be None": {"sample_weight_column": "weight"},
    "seed=7 must be 42": {"seed": 7},
}


@pytest.mark.parametrize(("message", "changes"), OTHERS.items())
def test_a_checkpoint_of_another_pass_is_refused_by_its_field(tmp_path, passed, message, changes):
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    trainer = make_trainer(tmp_path, **changes)
    head = [values.clone() for values in head_of(trainer)]
    with pytest.raises(InputError, match=f"{message}.* the value of checkpoint-10"):
        trainer.train(resume_from_checkpoint=str(passed / "checkpoint-10"))
    assert all(torch.equal(one, other) for one, other in zip(head_of(trainer), head, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_map_is_refused_by_its_field(tmp_path):
    changes = {"kernel": "rff", "num_features": 8, "bandwidth": 2.0}
    whole(tmp_path, **changes)
    for name, value, expected in (("num_features", 10, 8), ("bandwidth", 3.0, 2.0), ("seed", 1, 42)):
        with pytest.raises(InputError, match=f"{name}={value} must be {expected}"):
            resume(tmp_path, **changes | {name: value})


def test_what_may_differ(tmp_path, passed):
    shutil.copytree(passed / "checkpoint-10", tmp_path / "checkpoint-10")
    other = {"regularization": 2.0, "match": "gd", "learning_rate": 0.01, "num_train_epochs": 9, "logging_steps": 2}
    assert resume(tmp_path, **other).solution.method == "gd"


NUMBER = {"estimator": "auto", "regularization": 2.0}
TOGETHER = {
    "estimator='auto' and regularization='auto' ask for rows": (NUMBER, {"estimator": "auto"}),
    "calibrate=True and match='ridge' ask for sample": (
        NUMBER | {"calibrate": True, "match": "gd", "learning_rate": 0.01},
        NUMBER | {"calibrate": True},
    ),
}


@pytest.mark.parametrize(("message", "settings"), TOGETHER.items())
def test_what_settings_ask_for_together_is_refused_by_their_fields(tmp_path, message, settings):
    """One label a row and regularization="auto" stand for a logistic head, which needs rows."""
    first, second = settings
    whole(tmp_path, **first)
    with pytest.raises(InputError, match=f"{message}, of which the pass kept none"):
        resume(tmp_path, str(tmp_path / "checkpoint-5"), **second)


def test_a_checkpoint_of_gradient_descent_is_refused(tmp_path):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    transformers.Trainer(make_model(), arguments, train_dataset=Texts()).train()
    assert steps(tmp_path) == [1]
    message = "checkpoint-1' must be a checkpoint of a single pass; pass.json is missing"
    with pytest.raises(InputError, match=message):
        resume(tmp_path, str(tmp_path / "checkpoint-1"))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(InputError, match="must hold a complete checkpoint"):
        resume(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="resume_from_checkpoint=True: '.*' must hold a complete checkpoint"):
        resume(tmp_path / "empty")
    with pytest.raises(InputError, match="nowhere' must be a checkpoint of a single pass"):
        resume(tmp_path, str(tmp_path / "nowhere"))


def test_a_checkpoint_holds_nothing_pickled_before_the_head_is_there(passed):
    names = {path.name for path in (passed / "checkpoint-10").iterdir()}
    assert names == {"collection.safetensors", "pass.json", "trainer_state.json", "manifest.json"}
    assert json.loads((passed / "checkpoint-10/pass.json").read_text())["rows_seen"] == 40
