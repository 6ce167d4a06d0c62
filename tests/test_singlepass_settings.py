"""Settings that must have their part in the head, and those that are refused before a row is read."""

import pytest
import torch
from singlepass_run import CLASSES, Texts, head_of, make_model, make_trainer

from linpass import ClosedFormForSequenceClassification
from linpass.errors import InputError


def trained(folder, model=None, rows=None, **changes):
    trainer = make_trainer(folder, model, rows, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"estimator": "discriminant"}, "gpt2", "estimator='discriminant' needs a head with a bias"),
        ({"class_weight": [1.0, 2.0]}, "bert", "class_weight=.* has 2 numbers; it must have one per class"),
    ],
)
def test_what_the_solve_would_refuse_is_refused_after_one_batch(tmp_path, changes, kind, match):
    rows = Texts()
    trainer = make_trainer(tmp_path, make_model(kind), rows, per_device_train_batch_size=4, **changes)
    with pytest.raises(InputError, match=match):
        trainer.train()
    assert sum(rows.reads) <= 8  # the batch, and the one that the loader had ahead


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"match": "sdg"}, "match='sdg' must be one of ridge"),
        ({"estimator": "logit"}, "estimator='logit' must be one of auto"),
        ({"estimator": "logistic", "regularization": "gcv"}, "estimator='logistic' needs regularization auto or"),
        ({"estimator": "logistic", "regularization": 0.0}, "estimator='logistic' needs regularization auto or"),
    ],
)
def test_refit_checks_what_the_arguments_check(tmp_path, changes, match):
    trainer = trained(tmp_path, estimator="logistic", regularization="auto")
    before = head_of(trainer)
    with pytest.raises(InputError, match=match):
        trainer.refit(**changes)
    assert torch.equal(head_of(trainer)[0], before[0])


def test_another_regularization_makes_another_head_of_the_default(tmp_path):
    trainer = trained(tmp_path, estimator="auto", regularization="auto")
    assert trainer.solution.method == "logistic"
    logistic = head_of(trainer)[0].clone()
    trainer.refit(regularization="loo")
    assert trainer.solution.method == "loo"
    assert not torch.allclose(head_of(trainer)[0], logistic)


def test_a_default_head_is_calibrated_only_where_that_is_asked_for(tmp_path):
    rows = Texts(240)
    options = {"estimator": "logistic", "regularization": "auto"}
    plain = trained(tmp_path / "a", rows=rows, calibrate=False, **options)
    calibrated = trained(tmp_path / "b", rows=rows, calibrate=True, **options)
    ratio = head_of(plain)[0] / head_of(calibrated)[0]
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-3)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)


def test_sgd_needs_rows_of_two_classes_too(tmp_path):
    rows = [{**row, "labels": 1} for row in (Texts()[n] for n in range(12))]
    with pytest.raises(InputError, match="all 12 rows have label 1"):
        trained(tmp_path, rows=rows, match="sgd", estimator="auto")


def test_a_sample_of_the_rows_has_the_penalty_of_all(tmp_path):
    options = {"estimator": "logistic", "regularization": 20.0}
    whole = head_of(trained(tmp_path / "a", rows=Texts(400), **options))[0]
    sampled = head_of(trained(tmp_path / "b", rows=Texts(400), kept_rows=100, **options))[0]
    unscaled = head_of(trained(tmp_path / "c", rows=Texts(100), **options))[0]
    # the weights of a hundred rows differ by chance; a penalty that is four times too strong shrinks them further
    assert abs(sampled.norm() / whole.norm() - 1) < 0.5 * abs(unscaled.norm() / whole.norm() - 1)


@pytest.mark.parametrize("feature_map", ["nystrom", "relu"])
def test_the_map_of_a_model_of_ours_is_fitted(tmp_path, feature_map):
    encoder = make_model().base_model
    fields = {"feature_map": feature_map, "num_features": 8, "num_labels": CLASSES, "pooling": "first"}
    model = ClosedFormForSequenceClassification.from_encoder(encoder, **fields)
    trainer = trained(tmp_path, model)
    ids, mask = (
        torch.stack([torch.as_tensor(Texts()[n][name]) for n in range(2)]) for name in Texts()[0] if name != "labels"
    )
    features = trainer.model.feature_map(trainer.model.embed(input_ids=ids, attention_mask=mask))
    assert features.std() > 0
    assert trainer.model.feature_map.bandwidth != 1


def test_a_kernels_sum_over_its_rows_cannot_be_fitted_again(tmp_path):
    model = ClosedFormForSequenceClassification.from_encoder(
        make_model().base_model, feature_map="kernel", num_features=3, num_labels=CLASSES
    )
    with pytest.raises(InputError, match="give its encoder, and the kernel"):
        make_trainer(tmp_path, model)
