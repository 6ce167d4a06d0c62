"""One pass: each row once, whatever reads it; update and forget; what callbacks and logs see of it."""

import logging

import datasets
import numpy as np
import pytest
import torch
import transformers
from singlepass_run import CLASSES, ROWS, Stream, Texts, accuracy, head_of, make_model, make_trainer, moments
from transformers.trainer_callback import ProgressCallback

from linpass.errors import InputError
from linpass.singlepass import RidgeStatistics
from linpass.singlepass.loading import RowCollator
from linpass.singlepass.row_store import RowStore, fold_of

SUMS = 1e-12  # the same rows in float64, added in another order
HEADS = 1e-10  # a solve of such sums
MIXED = 2.5e-7  # products in float32, which round at 6e-8, of the same rows in other blocks: two such errors
OTHER_BATCH = 1e-9  # the logistic iteration stops where its loss has settled, from sums in another order


def features_of(model, inputs):
    """What the final layer is given, all rows in one batch."""
    model.eval()
    with torch.no_grad():
        if hasattr(model, "bert"):
            return model.bert(**inputs).pooler_output
        hidden = model.transformer(**inputs).last_hidden_state
        return hidden[torch.arange(len(hidden)), inputs["attention_mask"].sum(1) - 1]


def expected_moments(features_ND, labels_N, weights_N=None):
    """Written out, two passes over everything."""
    one_hot_NC = torch.eye(CLASSES, dtype=torch.float64)[labels_N]
    weights_N = torch.ones(len(labels_N), dtype=torch.float64) if weights_N is None else weights_N
    share_N = weights_N / weights_N.sum()
    mean_D, target_mean_C = share_N @ features_ND, share_N @ one_hot_NC
    left_ND, right_NC = (features_ND - mean_D) * weights_N[:, None], one_hot_NC - target_mean_C
    return {
        "rows": torch.tensor(float(len(labels_N)), dtype=torch.float64),
        "weight": weights_N.sum(),
        "mean_D": mean_D,
        "target_mean_C": target_mean_C,
        "scatter_DD": left_ND.T @ (features_ND - mean_D),
        "cross_DC": left_ND.T @ right_NC,
        "target_scatter_C": weights_N @ right_NC.square(),
    }


def assert_same(got, expected, tolerance=SUMS):
    got, expected = (part if isinstance(part, dict) else moments(part) for part in (got, expected))
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=tolerance * max(1, value.abs().max().item()), msg=name
        )


def assert_heads(trainer, other, tolerance=HEADS):
    for got, expected in zip(head_of(trainer), head_of(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


def trained(folder, rows=None, **changes):
    trainer = make_trainer(folder, rows=rows, **changes)
    trainer.train()
    return trainer


# -- each row once

READERS = {
    "one by one": {"per_device_train_batch_size": 1},
    "three": {"per_device_train_batch_size": 3},
    "all": {"per_device_train_batch_size": ROWS},
    "more than all": {"per_device_train_batch_size": 100},
    "drop_last": {"dataloader_drop_last": True},
    "accumulation": {"gradient_accumulation_steps": 4},
    "three epochs": {"num_train_epochs": 3},
    "mixed columns": {"remove_unused_columns": False},
    "other sampler": {"train_sampling_strategy": "group_by_length"},
    "accelerate's sharding": {"accelerator_config": {"split_batches": True, "dispatch_batches": True}},
}


@pytest.mark.parametrize("changes", READERS.values(), ids=READERS.keys())
def test_every_row_is_read_once_and_the_sums_are_those_of_one_batch(tmp_path, changes):
    rows = Texts()
    model = make_model("gpt2" if "gradient_accumulation_steps" in changes else "bert")
    trainer = make_trainer(tmp_path, model, rows, **changes)
    trainer.train()
    assert rows.reads == [1] * ROWS
    inputs, labels_N = rows.stacked()
    assert_same(trainer.collection.statistics, expected_moments(features_of(model, inputs), labels_N))


def test_workers_of_the_loader_share_out_the_rows(tmp_path):
    trainer, expected = trained(tmp_path, dataloader_num_workers=2), trained(tmp_path)
    assert_same(trainer.collection.statistics, expected.collection.statistics, 0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out_starts_the_sums_anew(tmp_path, error):
    rows, model, sizes = Texts(), make_model(), []

    def refuse(module, arguments, inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 18 and len(sizes) > 1:  # not the first batch: its sums must not stay
            raise error("CUDA out of memory. Tried to allocate 20.00 MiB.")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    trainer = make_trainer(tmp_path, model, rows, per_device_train_batch_size=20, auto_find_batch_size=True)
    trainer.train()
    assert sizes == [20, 20, 18, 18, 17]
    assert (trainer.state.train_batch_size, trainer.state.global_step, trainer.rows) == (18, 3, ROWS)
    trainer.update(Texts(20, first=ROWS))  # reads with the size that was found
    hook.remove()
    inputs, labels_N = Texts(ROWS + 20).stacked()
    assert_same(trainer.collection.statistics, expected_moments(features_of(model, inputs), labels_N))


def test_max_steps_ends_the_pass_and_reads_no_row_more(tmp_path):
    rows = Texts()
    trainer = trained(tmp_path, rows, max_steps=3)
    assert rows.reads == [1] * 12 + [0] * (ROWS - 12)
    assert trainer.rows == 12
    assert_same(trainer.collection.statistics, trained(tmp_path, Texts(12)).collection.statistics)
    with pytest.raises(InputError, match="row 12 must be one that the pass has seen"):
        trainer.forget([12])


@pytest.mark.parametrize("changes", [{}, {"max_steps": 100}, {"dataloader_num_workers": 2}], ids=str)
def test_streams_are_read_to_their_end(tmp_path, changes):
    rows = Texts()
    trainer = trained(tmp_path, Stream(rows), **changes)
    assert rows.reads == [1] * ROWS
    assert trainer.state.max_steps == trainer.state.global_step == 14
    assert_same(trainer.collection.statistics, trained(tmp_path).collection.statistics)


def columns():
    rows = [Texts(weighted=True)[number] for number in range(ROWS)]
    table = {name: [torch.as_tensor(row[name]).tolist() for row in rows] for name in rows[0]}
    table["weight"] = [row["weight"] for row in rows]
    return datasets.Dataset.from_dict(table | {"text": [str(number) for number in range(ROWS)]})


@pytest.mark.parametrize("streamed", [False, True])
def test_datasets_with_columns_that_the_model_does_not_take(tmp_path, streamed):
    rows = columns().to_iterable_dataset() if streamed else columns()
    trainer = trained(tmp_path, rows, sample_weight_column="weight")
    texts = Texts(weighted=True)
    inputs, labels_N = texts.stacked()
    expected = expected_moments(features_of(trainer.model, inputs), labels_N, texts.weights)
    assert_same(trainer.collection.statistics, expected)
    unweighted = trained(tmp_path, rows)
    assert_same(unweighted.collection.statistics, expected_moments(features_of(unweighted.model, inputs), labels_N))


def test_a_weight_column_that_is_not_there(tmp_path):
    rows = r"\['attention_mask', 'input_ids', 'labels'\]"
    with pytest.raises(InputError, match=f"sample_weight_column='heft' must be a column; row 0 has {rows}"):
        make_trainer(tmp_path, sample_weight_column="heft").train()
    with pytest.raises(InputError, match="row 3 has"):
        RowCollator(list, None, "heft")([(3, ["no", "mapping"])])


ONE_PASS = {
    "linear": {},
    "logistic": {"estimator": "auto", "calibrate": True},
    "kfold": {"regularization": "kfold"},
    "balanced": {"class_weight": "balanced"},
    "loo": {"regularization": "loo"},
    "calibrated": {"calibrate": True, "calibration_rows": 20},
    "relu": {"kernel": "relu", "num_features": 12},
    "nystrom": {"kernel": "nystrom", "num_features": 9},
    "rbf": {"kernel": "rbf", "regularization": 0.1},
}


@pytest.mark.parametrize("changes", ONE_PASS.values(), ids=ONE_PASS.keys())
def test_the_batch_size_changes_nothing(tmp_path, changes):
    first = trained(tmp_path, per_device_train_batch_size=ROWS, **changes)
    for size in (7, 20):
        other = trained(tmp_path, per_device_train_batch_size=size, **changes)
        assert_heads(other, first, OTHER_BATCH if "estimator" in changes else HEADS)


def test_the_order_changes_nothing(tmp_path):
    rows, order = Texts(), torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    trainer = trained(tmp_path, torch.utils.data.Subset(rows, order), class_weight="balanced")
    assert_heads(trainer, trained(tmp_path, class_weight="balanced"))


def test_the_generators_of_the_program_are_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, kernel="nystrom", num_features=9, calibrate=True)
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.grad is not None for parameter in trainer.model.parameters())


def test_no_rows_and_rows_without_labels(tmp_path):
    for rows in (Texts(0), Stream(Texts(0))):
        with pytest.raises(InputError, match="at least one row"):
            make_trainer(tmp_path, rows=rows).train()
    ignored = [row | {"labels": -100} for row in Texts()]
    with pytest.raises(InputError, match="at least one row with a label"):
        make_trainer(tmp_path, rows=ignored).train()


# -- update and forget

GROWING = {
    **ONE_PASS,
    "mixed": {"precision": "mixed", "regularization": 1.0},
    "gd": {"match": "gd", "learning_rate": 0.01},
}
del GROWING["relu"], GROWING["nystrom"]  # maps fitted to the first rows are those of another pass


@pytest.mark.parametrize("changes", GROWING.values(), ids=GROWING.keys())
def test_update_is_one_pass_over_both(tmp_path, changes):
    trainer = trained(tmp_path, Texts(30), **changes)
    trainer.update(Texts(20, first=30))
    metrics = trainer.update(Texts(3, first=50))
    expected = trained(tmp_path, **changes)
    if trainer.collection.statistics is not None:
        exact = "precision" not in changes
        assert_same(trainer.collection.total(), expected.collection.total(), SUMS if exact else MIXED)
    assert_heads(trainer, expected, {"logistic": OTHER_BATCH, "mixed": 1e-5}.get(_name(changes), HEADS))
    assert trainer.rows == metrics["rows"] == ROWS
    assert trainer.state.log_history[-1]["rows"] == ROWS
    trainer.refit()


def _name(changes):
    return next(name for name, value in GROWING.items() if value is changes)


def test_a_fitted_map_is_used_for_the_rows_that_come_later(tmp_path):
    trainer = trained(tmp_path, Texts(30), kernel="nystrom", num_features=9, regularization=1.0)
    landmarks = trainer.model.feature_map.landmarks.clone()
    trainer.update(Texts(23, first=30))
    assert torch.equal(trainer.model.feature_map.landmarks, landmarks)
    inputs, labels_N = Texts().stacked()
    trainer.model.eval()
    with torch.no_grad():
        features_ND = trainer.model.feature_map(trainer.model.embed(**inputs))
    assert_same(trainer.collection.statistics, expected_moments(features_ND, labels_N))


FORGETTING = {name: value for name, value in GROWING.items() if name not in ("mixed", "calibrated")}
GONE = [0, 7, 8, 30, 52]


def without_gone():
    return torch.utils.data.Subset(Texts(), [number for number in range(ROWS) if number not in GONE])


@pytest.mark.parametrize("by_number", [True, False])
@pytest.mark.parametrize("changes", FORGETTING.values(), ids=FORGETTING.keys())
def test_forget_is_never_seen(tmp_path, changes, by_number):
    trainer = trained(tmp_path, **changes)
    rows = GONE if by_number else torch.utils.data.Subset(Texts(), GONE)
    if changes.get("regularization") == "kfold":
        if not by_number:
            with pytest.raises(InputError, match="forget.rows. needs row numbers with regularization='kfold'"):
                trainer.forget(rows)
            return
        changes = {}  # the numbers, and so the folds, of the others would be different ones
        trainer.args.regularization = 0.5
        changes = {"regularization": 0.5}
    metrics = trainer.forget(rows)
    expected = trained(tmp_path, without_gone(), **changes)
    if trainer.collection.statistics is not None:
        assert_same(trainer.collection.total(), expected.collection.total(), HEADS)
    kept, other = (
        [] if c.rows is None else c.rows.all()["features_ND"] for c in (trainer.collection, expected.collection)
    )
    torch.testing.assert_close(torch.as_tensor(kept), torch.as_tensor(other), rtol=0, atol=SUMS)
    assert_heads(trainer, expected, 1e-7 if "estimator" in changes else 1e-8)
    assert metrics["rows"] == trainer.rows == ROWS - len(GONE)
    trainer.refit()


def test_what_the_folds_hold_after_forgetting(tmp_path):
    trainer = trained(tmp_path, regularization="kfold", folds=4)
    trainer.forget(torch.tensor(GONE))
    inputs, labels_N = Texts().stacked()
    features_ND = features_of(trainer.model, inputs)
    numbers = torch.tensor([number for number in range(ROWS) if number not in GONE])
    fold_N = fold_of(numbers, trainer.args.seed, 4)
    for fold, group in enumerate(trainer.collection.statistics.groups):
        rows = numbers[fold_N == fold]
        assert_same(group, expected_moments(features_ND[rows], labels_N[rows]), HEADS)


def test_numbers_of_every_kind_name_rows(tmp_path):
    trainer = trained(tmp_path)
    for rows in ([1], (2,), range(3, 4), {4}, np.array([5]), torch.tensor([6]), [np.int64(7)]):
        trainer.forget(rows)
    assert trainer.forgotten == set(range(1, 8))
    stream = trained(tmp_path, Stream(Texts()))
    with pytest.raises(InputError, match="those of train_dataset have no numbers"):
        stream.forget([1])
    stream.forget(Texts(2))
    assert stream.rows == ROWS - 2


def test_a_sample_forgets_too(tmp_path):
    gone = list(range(13, ROWS))  # more than a sample of them would hold
    for rows in (gone, torch.utils.data.Subset(Texts(), gone)):
        trainer = trained(tmp_path, calibrate=True, calibration_rows=15)
        sample = trainer.collection.sample.all()["keys"]
        trainer.forget(rows)
        left = trainer.collection.sample.all()["keys"]
        assert set(left.tolist()) == {key for key in sample.tolist() if key >> 24 not in gone}
        assert 0 < len(left) < len(sample) == 15


def snapshot(trainer):
    state = trainer.collection.state_dict()
    tensors = {f"{part}.{name}": t.clone() for part, values in state.items() for name, t in values.items()}
    return tensors, [values.clone() for values in head_of(trainer)], trainer.rows, set(trainer.forgotten)


def assert_unchanged(trainer, before):
    after = snapshot(trainer)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


class Strange(Texts):
    """Rows of the same kind that no pass has seen."""

    def __init__(self):
        super().__init__(3, first=200)


NOT_TO_FORGET = {
    "all by number": (range(ROWS), "rows: all would be forgotten; at least one must stay"),
    "all by data": (Texts(), "rows: all would be forgotten"),
    "more than all": (Texts(ROWS + 3), "rows"),
    "twice": ([3, 3], "forget: row 3 has been forgotten already, or is named twice"),
    "no such row": ([5, ROWS], f"forget: row {ROWS} must be from 0 to {ROWS - 1}"),
    "negative": ([-1], "forget: row -1 must be from 0"),
    "none": ([], "at least one row"),
    "one class left": ([n for n in range(ROWS) if Texts().labels[n] != 1], "all .* rows have label 1"),
}


@pytest.mark.parametrize("name", ["linear", "logistic", "rbf", "balanced"])
def test_what_cannot_be_forgotten_changes_nothing(tmp_path, name):
    trainer = trained(tmp_path, **ONE_PASS[name])
    before = snapshot(trainer)
    for rows, message in NOT_TO_FORGET.values():
        with pytest.raises(InputError, match=message):
            trainer.forget(rows)
        assert_unchanged(trainer, before)
    trainer.refit()
    trainer.forget([3])
    before = snapshot(trainer)
    with pytest.raises(InputError, match="row 3 has been forgotten already"):
        trainer.forget([2, 3])
    assert_unchanged(trainer, before)


def test_after_another_solve_rows_come_and_go_as_in_the_pass(tmp_path):
    trainer = trained(tmp_path, Texts(40), regularization="kfold", folds=3)
    trainer.refit(regularization=0.5)
    trainer.update(Texts(13, first=40))
    trainer.refit(regularization="kfold")
    trainer.forget([50 - 20])
    trainer.update(torch.utils.data.Subset(Texts(), [50 - 20]))  # in another fold now
    assert_same(trainer.collection.total(), trained(tmp_path).collection.total(), HEADS)


@pytest.mark.parametrize("name", ["logistic", "rbf", "loo"])
def test_where_all_rows_are_kept_others_are_not_forgotten_nor_the_same_twice(tmp_path, name):
    trainer = trained(tmp_path, **ONE_PASS[name])
    before = snapshot(trainer)
    with pytest.raises(InputError, match="3 of the 3 to forget must be rows of the pass that are still there"):
        trainer.forget(Strange())
    assert_unchanged(trainer, before)
    some = torch.utils.data.Subset(Texts(), GONE)
    trainer.forget(some)
    with pytest.raises(InputError, match="5 of the 5 to forget must be rows"):
        trainer.forget(some)


def test_rows_that_were_added_can_be_forgotten_by_what_they_hold(tmp_path):
    trainer, more = trained(tmp_path, **ONE_PASS["logistic"]), Texts(9, first=ROWS)
    before = [values.clone() for values in head_of(trainer)]
    trainer.update(more)
    trainer.forget(more)
    for got, expected in zip(head_of(trainer), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    assert trainer.rows == ROWS


def test_bad_rows_change_nothing(tmp_path):
    trainer = trained(tmp_path, **ONE_PASS["logistic"])
    before = snapshot(trainer)
    rows = Texts(20, first=ROWS)
    rows.labels[11] = CLASSES
    with pytest.raises(InputError, match=f"row {ROWS + 11}: "):
        trainer.update(rows)
    assert_unchanged(trainer, before)


def test_sgd_neither_grows_nor_forgets_and_is_solved_again(tmp_path):
    changes = {"match": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 4, "num_train_epochs": 3}
    trainer = trained(tmp_path, **changes)
    before = snapshot(trainer)
    for act in (lambda: trainer.update(Texts(5)), lambda: trainer.forget([1]), lambda: trainer.forget(Texts(5))):
        with pytest.raises(InputError, match="match='sgd' depends on the order of all rows"):
            act()
    for wrong in ({"learning_rate": 0.2}, {"weight_decay": 0.1}, {"match": "ridge"}):
        with pytest.raises(InputError, match="needs another pass"):
            trainer.refit(**wrong)
    assert_unchanged(trainer, before)
    trainer.refit(num_train_epochs=5)
    assert_heads(trainer, trained(tmp_path, **changes | {"num_train_epochs": 5}), SUMS)


def test_sgd_is_not_disturbed_by_an_evaluation_in_the_middle(tmp_path):
    changes = {"match": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 4}
    looked_at = trained(tmp_path, evaluate=Texts(9), eval_strategy="steps", eval_steps=1, **changes)
    assert_heads(looked_at, trained(tmp_path, **changes), 0)


def test_refits_that_need_another_pass(tmp_path):
    trainer = trained(tmp_path, calibrate=True, calibration_rows=20)
    before = snapshot(trainer)
    wrong = {"match": "sgd", "regularization": "kfold", "class_weight": "balanced", "estimator": "logistic"}
    for name, value in [*wrong.items(), ("regularization", "loo"), ("kernel", "rbf")]:
        with pytest.raises(InputError, match=f"need|{name}"):
            trainer.refit(**{name: value})
        assert_unchanged(trainer, before)
    assert trainer.args.regularization == "auto"
    trainer.refit(regularization=2.0, estimator="discriminant")


def test_verbs_need_a_pass(tmp_path):
    trainer = make_trainer(tmp_path)
    for act in (trainer.refit, lambda: trainer.update(Texts(3)), lambda: trainer.forget([0])):
        with pytest.raises(InputError, match="needs a pass first: call train"):
            act()


# -- kept rows


def kept(features_ND, labels, keys):
    targets, keys = torch.tensor(labels), torch.tensor(keys)
    return {"features_ND": features_ND, "targets": targets, "weights_N": torch.ones(len(labels)), "keys": keys}


@pytest.mark.parametrize(
    ("labels", "left"), [([1], [0, 0, 0]), ([0], [0, 0, 1]), ([0, 0, 0], [0, 1]), ([2], [0, 0, 0, 1])]
)
def test_the_same_features_with_another_label_are_another_row(labels, left):
    features_ND = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 1.0], [1.0, 2.0]])
    store = RowStore()
    store.add(kept(features_ND, [0, 1, 0, 0], [0, 1, 2, 3]))
    again_ND = features_ND[:1].expand(len(labels), 2) * (1 + 1e-7)  # of another batch
    found = store.remove(kept(again_ND, labels, [70 + number for number in range(len(labels))]), by_key=False)
    assert sorted(store.all()["targets"].tolist()) == left
    assert len(store) == 4 - found == len(left)


# -- what others see of a pass


class Recorder(transformers.TrainerCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args, state, control, **keywords):
            self.events.append((name[3:], state.global_step))

        return record


def test_callbacks_hear_what_a_trainers_hear(tmp_path):
    recorder = Recorder()
    changes = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, Texts(12), callbacks=[recorder], evaluate=Texts(8), per_device_eval_batch_size=8, **changes)
    expected = [
        *[("init_end", 0), ("train_begin", 0), ("epoch_begin", 0)],
        *[("step_begin", 0), ("step_end", 1)],
        *[
            ("step_begin", 1),
            ("step_end", 2),
            ("log", 2),
            ("prediction_step", 2),
            ("log", 2),
            ("evaluate", 2),
            ("save", 2),
        ],
        *[("step_begin", 2), ("step_end", 3), ("epoch_end", 3)],
        *[("prediction_step", 3), ("log", 3), ("evaluate", 3), ("save", 3), ("log", 3), ("train_end", 3)],
    ]
    assert [event for event in recorder.events if event[0] != "substep_end"] == expected


def test_the_log_tells_rows_and_their_rate(tmp_path):
    trainer = trained(tmp_path, logging_steps=5, logging_first_step=True)
    *lines, last = trainer.state.log_history
    assert [(line["step"], line["rows"]) for line in lines] == [(1, 4), (5, 20), (10, 40)]
    assert all(line["rows_per_second"] > 0 for line in lines)
    assert [line["epoch"] for line in lines] == pytest.approx([4 / ROWS, 20 / ROWS, 40 / ROWS])
    assert {"rows", "regularization", "train_loss", "train_runtime", "train_samples_per_second"} <= last.keys()
    assert (last["rows"], last["step"], last["epoch"]) == (ROWS, 14, 1.0)
    every = trained(tmp_path, logging_steps=1).state.log_history
    assert [line["rows"] for line in every] == [*range(4, ROWS, 4), ROWS, ROWS]


def test_evaluations_are_of_the_head_so_far(tmp_path):
    changes = {"evaluate": Texts(30), "metrics": accuracy, "eval_strategy": "steps", "eval_steps": 5}
    trainer = trained(tmp_path, **changes)
    lines = {line["step"]: line for line in trainer.state.log_history if "eval_loss" in line}
    assert list(lines) == [5, 10, 14]
    for step, line in lines.items():
        alone = trained(tmp_path, Texts(min(4 * step, ROWS)), evaluate=Texts(30), metrics=accuracy)
        expected = alone.evaluate()
        assert line["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
        assert line["eval_accuracy"] == expected["eval_accuracy"]
    assert_heads(trainer, trained(tmp_path), SUMS)


def test_an_epoch_is_the_pass(tmp_path):
    trainer = trained(
        tmp_path, evaluate=Texts(30), eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch"
    )
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [14]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-14"]


def test_evaluation_on_start_is_of_the_untrained_head(tmp_path):
    untrained = make_trainer(tmp_path, evaluate=Texts(30)).evaluate()["eval_loss"]
    trainer = trained(tmp_path, evaluate=Texts(30), eval_strategy="epoch", eval_on_start=True)
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 14]
    assert lines[0]["eval_loss"] == untrained


@pytest.mark.parametrize(
    "changes",
    [{"kernel": "nystrom", "num_features": 9}, {"rows": torch.utils.data.Subset(Texts(), [])}],
    ids=["map", "class"],
)
def test_without_a_head_so_far_there_is_nothing_to_evaluate(tmp_path, changes, caplog):
    if "rows" in changes:  # sorted by class: the first have one
        changes = {"rows": torch.utils.data.Subset(Texts(), Texts().labels.argsort().tolist())}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    logging.getLogger("linpass").addHandler(caplog.handler)
    try:
        trainer = trained(tmp_path, evaluate=Texts(30), eval_strategy="steps", eval_steps=3, **changes)
    finally:
        logger.removeHandler(caplog.handler)
        logging.getLogger("linpass").removeHandler(caplog.handler)
    assert any("step 3: nothing to evaluate yet: " in record.getMessage() for record in caplog.records)
    steps = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    assert 3 not in steps
    assert steps[-1] == 14


class Bar(ProgressCallback):
    def on_train_end(self, args, state, control, **keywords):
        self.seen = (self.training_bar.total, self.training_bar.n)
        super().on_train_end(args, state, control, **keywords)


@pytest.mark.parametrize(
    ("changes", "total"), [({}, 14), ({"max_steps": 5}, 5), ({"gradient_accumulation_steps": 4}, 14)]
)
def test_the_progress_bar_counts_the_steps_of_the_pass(tmp_path, changes, total):
    bar = Bar()
    trained(tmp_path, callbacks=[bar], disable_tqdm=True, **changes)
    assert bar.seen == (total, total)


def test_a_progress_bar_of_a_stream(tmp_path):
    bar = Bar()
    trained(tmp_path, Stream(Texts()), callbacks=[bar])
    assert bar.seen[1] == 14


def test_a_callback_may_stop_the_pass_and_the_head_is_that_of_the_rows_seen(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **keywords):
            control.should_training_stop = state.global_step == 6

    recorder, rows = Recorder(), Texts()
    changes = {"eval_strategy": "epoch", "save_strategy": "epoch", "evaluate": Texts(8)}
    trainer = trained(tmp_path, rows, callbacks=[Stop(), recorder], **changes)
    assert trainer.rows == 24
    assert_heads(trainer, trained(tmp_path, Texts(24)))
    names = [name for name, step in recorder.events if step == 6]
    assert names[0] == "step_end"
    assert names.count("step_end") == names.count("epoch_end") == names.count("evaluate") == names.count("save") == 1


def test_a_pass_can_be_made_again(tmp_path):
    trainer = trained(tmp_path, **ONE_PASS["logistic"])
    head = [values.clone() for values in head_of(trainer)]
    trainer.update(Texts(10, first=ROWS))
    trainer.forget([4])
    trainer.train()
    assert trainer.rows == ROWS
    assert all(torch.equal(one, other) for one, other in zip(head_of(trainer), head, strict=True))


def test_model_init_and_the_return_value(tmp_path):
    trainer = make_trainer(tmp_path)
    made = type(trainer)(
        model_init=lambda: make_model(),
        args=trainer.args,
        train_dataset=Texts(),
        eval_dataset=Texts(8),
        compute_metrics=accuracy,
    )
    result = made.train()
    trainer.train()
    assert_heads(made, trainer, 0)
    assert result.global_step == 14
    assert result.training_loss == result.metrics["train_loss"] == trainer.loss
    assert made.predict(Texts(8)).predictions.shape == (8, CLASSES)


# -- statistics on their way between machines


@pytest.mark.parametrize("name", ["linear", "logistic", "kfold", "balanced", "loo", "rbf"])
def test_statistics_of_another_machine_are_one_pass_with_these(tmp_path, name):
    changes = ONE_PASS[name] if name != "kfold" else {"regularization": "kfold", "folds": 2}
    other = trained(tmp_path, Texts(23, first=30), **changes)
    other.save_statistics(tmp_path / "other.safetensors")
    trainer = trained(tmp_path, Texts(30), **changes)
    metrics = trainer.load_statistics(tmp_path / "other.safetensors")
    assert metrics["rows"] == ROWS
    expected = trained(tmp_path, **changes)
    if trainer.collection.statistics is not None:
        assert_same(trainer.collection.total(), expected.collection.total())
    if name != "kfold":  # rows of two machines have numbers, and so folds, of their own
        assert_heads(trainer, expected, OTHER_BATCH)
    if name == "logistic":
        trainer.forget([2])
        assert trainer.collection.rows.all()["keys"].tolist() == [n << 24 for n in range(ROWS) if n != 2]


def test_statistics_of_another_machine_without_a_pass_here(tmp_path):
    other = trained(tmp_path)
    other.save_statistics(tmp_path / "other.safetensors")
    trainer = make_trainer(tmp_path)
    trainer.load_statistics(tmp_path / "other.safetensors")
    assert_heads(trainer, other, 0)
    trainer.update(Texts(5, first=ROWS))
    assert trainer.rows == ROWS + 5


def test_statistics_of_other_features_are_refused_and_nothing_changes(tmp_path):
    trainer = trained(tmp_path)
    before = snapshot(trainer)
    map_ = {"kernel": "relu", "num_features": 8}
    others = {
        "features=": trained(tmp_path, model=make_model(seed=2)),
        "kernel='linear' must be 'relu'": trained(tmp_path, **map_),
        "normalize=False must be True": trained(tmp_path, normalize=True),
        "precision='float64' must be 'mixed'": trained(tmp_path, precision="mixed"),
        "regularization=": trained(tmp_path, regularization="kfold"),
        "labels=3 must be 4": trained(tmp_path, model=make_model(classes=4)),
    }
    for message, other in others.items():
        other.save_statistics(tmp_path / "other.safetensors")
        with pytest.raises(InputError, match=message):
            trainer.load_statistics(tmp_path / "other.safetensors")
        assert_unchanged(trainer, before)
    mapped = trained(tmp_path, **map_)
    trained(tmp_path, Texts(20), **map_).save_statistics(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="features="):  # its map was fitted to other rows
        mapped.load_statistics(tmp_path / "other.safetensors")
    again = trained(tmp_path, **map_)
    again.save_statistics(tmp_path / "same.safetensors")
    mapped.load_statistics(tmp_path / "same.safetensors")


def test_files_that_are_no_statistics_of_a_pass(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_statistics(tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    RidgeStatistics(3, 2).save(tmp_path / "plain.safetensors")
    before = snapshot(trainer)
    for name, message in (("missing", "no such file"), ("cut", "safetensors"), ("plain", "RidgeStatistics")):
        with pytest.raises(InputError, match=message):
            trainer.load_statistics(tmp_path / f"{name}.safetensors")
    assert_unchanged(trainer, before)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
