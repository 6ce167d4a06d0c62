"""The solve of a pass against scikit-learn: estimators, weights, choices of the regularisation, probabilities."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifierCV, RidgeCV
from torch import nn

from linpass.errors import InputError
from linpass.singlepass import SinglePassArguments
from linpass.singlepass.collection import Collection
from linpass.singlepass.fit import FEWEST_TO_CALIBRATE, fit_head
from linpass.singlepass.row_store import fold_of
from linpass.singlepass.tasks import Rows, Task

# Two float64 solutions of one well-conditioned system.
EXACT = 1e-9
CLASSES, FEATURES = 3, 7
LABELS = Task("single_label_classification", CLASSES)


def data(rows=90, task=LABELS, seed=0):
    """Features of class means that overlap; class 0 is rarer than the others."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(1, 2 * CLASSES, (rows,), generator=generator) // 2
    means_CD = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    features_ND = means_CD[labels_N] + torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    if task.kind == "regression":
        labels_N = features_ND[:, : task.num_targets] ** 2
    return features_ND, labels_N


def arguments(tmp_path, **fields):
    fields = {"estimator": "ridge", "precision": "float64", "calibrate": False, "report_to": []} | fields
    return SinglePassArguments(str(tmp_path), **fields)


def collected(args, features_ND, targets, weights_N=None, task=LABELS, intercept=True):
    collection = Collection(args, features_ND.shape[1], task, intercept, "cpu")
    for part in torch.arange(len(features_ND)).split(16):
        weights = None if weights_N is None else weights_N[part]
        collection.add(Rows(features_ND[part], targets[part], weights, part))
    return collection


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_is_scikit_learns(tmp_path, intercept):
    features_ND, labels_N = data()
    args = arguments(tmp_path, regularization="0.7")
    fit = fit_head(collected(args, features_ND, labels_N, intercept=intercept), args, intercept)
    expected = Ridge(alpha=0.7, fit_intercept=intercept).fit(features_ND, nn.functional.one_hot(labels_N))
    np.testing.assert_allclose(fit.solution.weight_CD, expected.coef_, atol=EXACT)
    np.testing.assert_allclose(fit.solution.bias_C, np.broadcast_to(expected.intercept_, CLASSES), atol=EXACT)
    error = nn.functional.one_hot(labels_N).numpy() - expected.predict(features_ND)
    assert fit.loss == pytest.approx((error**2).sum(1).mean() / 2, abs=EXACT)


@pytest.mark.parametrize("weights", ["balanced", [1.0, 2.5, 0.5]])
def test_class_weights_after_the_pass_are_sample_weights_before(tmp_path, weights):
    features_ND, labels_N = data()
    args = arguments(tmp_path, regularization="0.3", class_weight=weights)
    fit = fit_head(collected(args, features_ND, labels_N), args, True)
    counts_C = np.bincount(labels_N)
    weight_C = len(labels_N) / (CLASSES * counts_C) if weights == "balanced" else np.array(weights)
    expected = Ridge(alpha=0.3).fit(features_ND, nn.functional.one_hot(labels_N), sample_weight=weight_C[labels_N])
    np.testing.assert_allclose(fit.solution.weight_CD, expected.coef_, atol=EXACT)


def test_one_class_weight_too_few_is_named(tmp_path):
    features_ND, labels_N = data()
    args = arguments(tmp_path, class_weight=[1.0, 2.0])
    with pytest.raises(InputError, match=r"class_weight=\[1.0, 2.0\] has 2 numbers; it must have one per class, 3"):
        fit_head(collected(args, features_ND, labels_N), args, True)


def test_loo_chooses_as_ridge_cv(tmp_path):
    task = Task("regression", 2)
    features_ND, targets_NC = data(task=task)
    args = arguments(tmp_path, regularization="loo")
    fit = fit_head(collected(args, features_ND, targets_NC, task=task), args, True)
    grid = sorted(fit.solution.criterion)
    expected = RidgeCV(grid).fit(features_ND, targets_NC)
    assert fit.solution.regularization == pytest.approx(expected.alpha_)
    np.testing.assert_allclose(fit.solution.weight_CD, expected.coef_, atol=EXACT)


def test_kfold_scores_the_folds_of_the_pass(tmp_path):
    features_ND, labels_N = data()
    args = arguments(tmp_path, regularization="kfold", folds=4)
    fit = fit_head(collected(args, features_ND, labels_N), args, True)
    fold_N = fold_of(torch.arange(len(labels_N)), args.seed, 4)
    onehot_NC = nn.functional.one_hot(labels_N).double()
    for value, score in list(fit.solution.criterion.items())[::13]:
        squares = 0.0
        for fold in range(4):
            held_N = (fold_N == fold).numpy()
            model = Ridge(alpha=value, solver="svd").fit(features_ND[~held_N], onehot_NC[~held_N])
            squares += ((model.predict(features_ND[held_N]) - onehot_NC[held_N].numpy()) ** 2).sum()
        assert score == pytest.approx(squares / len(labels_N), rel=1e-7)


def test_gcv_predicts_what_ridge_classifier_cv_predicts(tmp_path):
    features_ND, labels_N = data(300)
    args = arguments(tmp_path, regularization="gcv")
    fit = fit_head(collected(args, features_ND, labels_N), args, True)
    expected = RidgeClassifierCV([fit.solution.regularization]).fit(features_ND, labels_N)
    decision = 2 * fit.solution.predict(features_ND) - 1  # of one-hot rows: scikit-learn's are -1 and 1
    np.testing.assert_allclose(decision, expected.decision_function(features_ND), atol=EXACT)


def test_logistic_predicts_like_scikit_learns(tmp_path):
    features_ND, labels_N = data(400)
    args = arguments(tmp_path, estimator="logistic", regularization="1.0")
    fit = fit_head(collected(args, features_ND, labels_N), args, True)
    expected = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(features_ND, labels_N)
    # the fit stops when a look gains less than 1e-4 nats a row
    np.testing.assert_allclose(
        fit.solution.predict(features_ND).softmax(1), expected.predict_proba(features_ND), atol=0.02
    )
    assert fit.loss == pytest.approx(
        -expected.predict_log_proba(features_ND)[np.arange(400), labels_N].mean(), abs=2e-3
    )


@pytest.mark.parametrize("estimator", ["ridge", "discriminant", "logistic"])
def test_probabilities_are_calibrated_on_new_rows(tmp_path, estimator):
    features_ND, labels_N = data(2000)
    new_ND, new_N = features_ND[1000:], labels_N[1000:]
    args = arguments(tmp_path, estimator=estimator, regularization="auto", calibrate=True)
    fit = fit_head(collected(args, features_ND[:1000], labels_N[:1000]), args, True)
    logits_NC = fit.solution.predict(new_ND) / (fit.temperature or 1.0)
    assert (fit.temperature is None) == (estimator == "logistic")  # that was calibrated where it was chosen
    own = nn.functional.cross_entropy(logits_NC, new_N)
    assert own < nn.functional.cross_entropy(1.3 * logits_NC, new_N)
    assert own < nn.functional.cross_entropy(logits_NC / 1.3, new_N)


def test_several_labels_a_row_are_calibrated_too(tmp_path):
    task = Task("multi_label_classification", 2)
    features_ND, _labels = data(2000)
    noise_NC = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    labels_NC = (features_ND[:, :2] + noise_NC > 0).double()
    args = arguments(tmp_path, regularization="gcv", calibrate=True)
    fit = fit_head(collected(args, features_ND[:1000], 2 * labels_NC[:1000] - 1, task=task), args, True)
    logits_NC = fit.solution.predict(features_ND[1000:]) / fit.temperature
    own = nn.functional.binary_cross_entropy_with_logits(logits_NC, labels_NC[1000:])
    for factor in (0.7, 1.4):
        assert own < nn.functional.binary_cross_entropy_with_logits(factor * logits_NC, labels_NC[1000:])


def test_too_few_rows_are_not_calibrated(tmp_path):
    features_ND, labels_N = data(FEWEST_TO_CALIBRATE - 1)
    labels_N[:2] = torch.tensor([0, 1])
    args = arguments(tmp_path, regularization="1.0", calibrate=True)
    assert fit_head(collected(args, features_ND, labels_N), args, True).temperature is None


def test_one_class_only_is_refused(tmp_path):
    features_ND, labels_N = data()
    args = arguments(tmp_path)
    with pytest.raises(InputError, match="all 90 rows have label 2: a classifier needs rows of two classes"):
        fit_head(collected(args, features_ND, torch.full_like(labels_N, 2)), args, True)


def test_rows_without_any_weight_are_refused(tmp_path):
    features_ND, labels_N = data()
    args = arguments(tmp_path)
    with pytest.raises(InputError, match="all 90 rows have weight 0"):
        fit_head(collected(args, features_ND, labels_N, torch.zeros(90, dtype=torch.float64)), args, True)


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "polynomial", "arc_cosine", "deep"])
def test_kernel_heads_predict_what_kernel_ridge_predicts(tmp_path, kernel):
    from transformers import BertConfig, BertModel

    from linpass.singlepass.heads import with_head
    from linpass.singlepass.kernel_heads import fit_kernel_head

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, num_labels=CLASSES)
    args = arguments(tmp_path, kernel=kernel, estimator="auto", regularization="0.2", bandwidth=2.0, calibrate=True)
    model = with_head(BertModel(config).double(), args)
    features_ND = torch.cat((data()[0], torch.ones(90, 1, dtype=torch.float64)), 1)
    labels_N = data()[1]
    fit = fit_kernel_head(model, collected(args, features_ND, labels_N), args)
    gram_NN = model.feature_map.kernel(features_ND, features_ND)
    targets_NC = nn.functional.one_hot(labels_N) - fit.solution.bias_C
    expected = KernelRidge(alpha=0.2, kernel="precomputed").fit(gram_NN, targets_NC)
    predicted_NC = model.classifier(model.feature_map(features_ND)).detach() * fit.temperature - fit.solution.bias_C
    np.testing.assert_allclose(predicted_NC, expected.predict(gram_NN), atol=1e-8)
