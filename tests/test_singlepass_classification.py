"""Discriminant, logistic regression, temperature and calibration error against scikit-learn, scipy and loops."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from linpass.errors import InputError
from linpass.singlepass import logistic
from linpass.singlepass.classification import discriminant, expected_calibration_error, fit_temperature, log_loss
from linpass.singlepass.logistic import choose_logistic, logistic_regression, stratified_folds
from linpass.singlepass.solver import solve_ridge
from linpass.singlepass.statistics import RidgeStatistics

# A linear system of condition number 1e2 in float64, solved in two ways.
LINEAR = 1e-8
# Two iterative solvers: scikit-learn's Newton's, ours when nothing is gained in float64. Its L-BFGS, the default, stops
# at a gradient of 7e-5 on some processors, a hundred times ours.
OPTIMUM = 1e-5
NEWTON = {"solver": "newton-cg", "tol": 1e-10, "max_iter": 1000}
# One number, found to 1e-6 of its logarithm.
SCALAR = 1e-5
# float32 features against float64, relative to the spread of the logits: steps of the square root of float32's
# rounding, 2.4e-4, lower the objective by less than it can show; times the condition of the problem.
SINGLE = 5e-3
UNCHOSEN = {"passes": 400, "tolerance": 0.0}


def rows(classes=4, count=300, width=6, offset=3.0):
    """Overlapping Gaussian classes of unequal size and unequal feature scales, far from the origin."""
    labels_N = torch.multinomial(torch.arange(1.0, classes + 1), count, replacement=True)
    centre_CD = torch.randn(classes, width, dtype=torch.float64)
    noise_ND = torch.randn(count, width, dtype=torch.float64)
    features_ND = (centre_CD[labels_N] + noise_ND) * torch.linspace(0.3, 2, width) + offset
    return features_ND, labels_N


def moments(features_ND, labels_N, classes=4, weights_N=None):
    statistics = RidgeStatistics(features_ND.shape[1], classes, precision="float64")
    return statistics.update(features_ND, labels_N, weights_N)


def objective(head, features_ND, labels_N, penalty, weights_N=None):
    """Penalised cross-entropy as a loop over rows."""
    weights_N = torch.ones(len(labels_N)) if weights_N is None else weights_N
    total = 0.5 * penalty * head.weight_CD.square().sum().item()
    for row, label, weight in zip(features_ND, labels_N, weights_N, strict=True):
        logits = head.weight_CD @ row + head.bias_C
        total += weight.item() * (logits.logsumexp(0) - logits[label]).item()
    return total


@pytest.mark.parametrize("shrinkage", [None, 0.3])
def test_discriminant_is_scikit_learns(shrinkage):
    features_ND, labels_N = rows()
    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features_ND, labels_N)
    share = shrinkage or 0.0
    within = sum(
        (features_ND[labels_N == c] - features_ND[labels_N == c].mean(0)).square().sum().item() for c in range(4)
    )
    # Their covariance (1 - share) S_w / n + share tr(S_w) / (n D) I is (1 - share) / n (S_w + lambda I).
    head = discriminant(moments(features_ND, labels_N), share / (1 - share) * within / features_ND.shape[1])
    # Theirs hold the common mean too, which adds the same to every class.
    theirs = (1 - share) * (expected.coef_ - expected.coef_.mean(0))
    np.testing.assert_allclose((head.weight_CD - head.weight_CD.mean(0)).numpy(), theirs, atol=LINEAR)
    if shrinkage is None:
        ours, theirs = head.predict(features_ND).softmax(1), expected.predict_proba(features_ND.numpy())
        np.testing.assert_allclose(ours, theirs, atol=LINEAR)


def test_discriminant_beats_the_ridge_that_hides_a_class():
    """Three classes on a line: squared error never predicts the middle one."""
    labels_N = torch.arange(3).repeat(200)
    features_ND = labels_N[:, None].double() * 4 + torch.randn(600, 1, dtype=torch.float64)
    statistics = moments(features_ND, labels_N, 3)
    ridge = solve_ridge(statistics, 1.0).predict(features_ND).argmax(1)
    assert (ridge == labels_N).double().mean() < 0.75
    assert (discriminant(statistics, 1.0).predict(features_ND).argmax(1) == labels_N).double().mean() > 0.93


def test_discriminant_never_predicts_a_class_without_rows():
    features_ND, labels_N = rows()
    head = discriminant(moments(features_ND, labels_N, 6), 1.0)
    assert head.weight_CD.isfinite().all()
    assert torch.nn.Linear(6, 6).weight.new_tensor(head.bias_C.tolist()).isfinite().all()
    assert head.predict(features_ND).argmax(1).max() < 4
    same = discriminant(moments(features_ND, labels_N), 1.0)
    torch.testing.assert_close(head.predict(features_ND)[:, :4], same.predict(features_ND), atol=LINEAR, rtol=0)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_regression_is_scikit_learns(classes, weighted):
    features_ND, labels_N = rows(classes)
    weights_N = torch.rand(300, dtype=torch.float64) + 0.1 if weighted else None
    head = logistic_regression(
        features_ND, labels_N, moments(features_ND, labels_N, classes, weights_N).spectrum(), 0.7, weights_N, **UNCHOSEN
    )
    # Two classes have two rows of weights here, one there: half the penalty on each is the same probability.
    factor = 2 / 0.7 if classes == 2 else 1 / 0.7
    expected = LogisticRegression(C=factor, **NEWTON).fit(features_ND, labels_N, weights_N)
    theirs = expected.predict_proba(features_ND.numpy())
    np.testing.assert_allclose(head.predict(features_ND).softmax(1), theirs, atol=OPTIMUM)
    if classes > 2:
        np.testing.assert_allclose(head.weight_CD, expected.coef_, atol=20 * OPTIMUM)


def test_without_intercept_the_bias_is_zero_and_the_optimum_scikit_learns():
    features_ND, labels_N = rows()
    spectrum = moments(features_ND, labels_N).spectrum(fit_intercept=False)
    head = logistic_regression(features_ND, labels_N, spectrum, 2.0, **UNCHOSEN)
    expected = LogisticRegression(C=0.5, fit_intercept=False, **NEWTON).fit(features_ND, labels_N)
    assert not head.bias_C.any()
    np.testing.assert_allclose(head.predict(features_ND).softmax(1), expected.predict_proba(features_ND), atol=OPTIMUM)


def test_the_objective_never_rises():
    features_ND, labels_N = rows()
    spectrum = moments(features_ND, labels_N).spectrum()
    values = [
        objective(
            logistic_regression(features_ND, labels_N, spectrum, 0.1, passes=passes, tolerance=0.0),
            *(features_ND, labels_N, 0.1),
        )
        for passes in range(1, 15)
    ]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert values[-1] < values[0] - 1


def test_no_more_looks_than_allowed(monkeypatch):
    features_ND, labels_N = rows()
    looks, look = [], logistic.Objective.look
    monkeypatch.setattr(logistic.Objective, "look", lambda self, at: looks.append(1) or look(self, at))
    logistic_regression(features_ND, labels_N, moments(features_ND, labels_N).spectrum(), 1e-3, passes=5, tolerance=0.0)
    assert len(looks) == 5


def test_another_spectrum_leads_to_the_same_optimum():
    features_ND, labels_N = rows()
    other = moments(features_ND[:100], labels_N[:100]).spectrum()
    heads = [
        logistic_regression(features_ND, labels_N, spectrum, 1.0, **UNCHOSEN)
        for spectrum in (other, moments(features_ND, labels_N).spectrum())
    ]
    ours, theirs = (head.predict(features_ND).softmax(1) for head in heads)
    torch.testing.assert_close(ours, theirs, atol=OPTIMUM, rtol=0)


def test_chunks_change_nothing(monkeypatch):
    features_ND, labels_N = rows()
    spectrum = moments(features_ND, labels_N).spectrum()
    whole = logistic_regression(features_ND, labels_N, spectrum, 1.0)
    monkeypatch.setattr(logistic, "CHUNK_ROWS", 7)
    parts = logistic_regression(features_ND, labels_N, spectrum, 1.0)
    torch.testing.assert_close(parts.weight_CD, whole.weight_CD, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_features(dtype):
    features_ND, labels_N = rows()
    features_ND = features_ND.to(dtype).double()
    spectrum = moments(features_ND, labels_N).spectrum()
    exact = logistic_regression(features_ND, labels_N, spectrum, 1.0, **UNCHOSEN).predict(features_ND)
    low = logistic_regression(features_ND.to(dtype), labels_N, spectrum, 1.0, **UNCHOSEN).predict(features_ND)
    assert (low - exact).abs().max() < SINGLE * exact.std()


def test_a_mean_far_from_the_origin_costs_no_digits():
    features_ND, labels_N = rows(offset=0.0)
    heads = []
    for offset in (0.0, 8192.0):  # float32 still holds features_ND + 8192 to 5e-4
        moved_ND = (features_ND + offset).float()
        head = logistic_regression(moved_ND, labels_N, moments(moved_ND, labels_N).spectrum(), 1.0, **UNCHOSEN)
        heads.append(head.predict(moved_ND))
    assert (heads[0] - heads[1]).abs().max() < SINGLE * heads[0].std()


def test_rows_of_weight_zero_choose_no_penalty():
    features_ND, labels_N = torch.randn(400, 5, dtype=torch.float64), torch.arange(400) % 3
    features_ND[:, 0] += labels_N
    weights_N = torch.ones(400, dtype=torch.float64)
    weights_N[150:] = 0
    spectrum = moments(features_ND[:150], labels_N[:150]).spectrum()
    alone = choose_logistic(features_ND[:150], labels_N[:150], spectrum)
    beside = choose_logistic(features_ND, labels_N, spectrum, weights_N=weights_N)
    assert beside.regularization == alone.regularization
    assert torch.allclose(beside.weight_CD, alone.weight_CD)


def test_a_class_without_rows_is_never_predicted():
    features_ND, labels_N = rows()
    head = choose_logistic(features_ND, labels_N, moments(features_ND, labels_N, 6).spectrum())
    assert head.predict(features_ND).isfinite().all()
    assert head.predict(features_ND).argmax(1).max() < 4


def test_the_chosen_penalty_has_the_least_calibrated_loss_on_held_out_rows(monkeypatch):
    """With every look allowed, the criterion is what scikit-learn's fits of the folds give, calibrated by a grid."""
    monkeypatch.setattr(logistic, "COARSE_PASSES", 100)
    monkeypatch.setattr(logistic, "COARSE", 0.0)
    features_ND, labels_N = rows()
    penalties = [30.0, 3.0, 0.3]
    head = choose_logistic(features_ND, labels_N, moments(features_ND, labels_N).spectrum(), grid=penalties)
    fold_N = stratified_folds(labels_N, 5)
    held_N = torch.cat([(fold_N == fold).nonzero()[:, 0] for fold in range(5)])
    expected, temperatures = {}, {}
    for penalty in penalties:
        logits = []
        for fold in range(5):
            rest_N = fold_N != fold
            fit = LogisticRegression(C=1 / penalty, **NEWTON).fit(features_ND[rest_N], labels_N[rest_N])
            logits.append(torch.tensor(fit.decision_function(features_ND[~rest_N])))
        logits_NC = torch.cat(logits)
        best = minimize_scalar(
            lambda beta, z=logits_NC: log_loss(z * beta, labels_N[held_N]), bounds=(0.01, 100), options={"xatol": 1e-9}
        )
        expected[penalty], temperatures[penalty] = best.fun, 1 / best.x
    assert head.criterion == pytest.approx(expected, abs=OPTIMUM)
    assert head.regularization == min(expected, key=expected.__getitem__)
    whole = logistic_regression(
        features_ND, labels_N, moments(features_ND, labels_N).spectrum(), head.regularization, **UNCHOSEN
    )
    ratio = whole.predict(features_ND).std() / head.predict(features_ND).std()
    assert ratio == pytest.approx(temperatures[head.regularization], rel=0.02)  # the last fit stops at FINE


@pytest.mark.parametrize("count", [60, 300, 12_000])
def test_the_unit_of_features_and_weights_changes_no_prediction(count):
    """Below FEW_ROWS rows, with five folds, and with one."""
    features_ND, labels_N = rows(count=count)
    weights_N = torch.rand(count, dtype=torch.float64) + 0.5
    predictions = [
        choose_logistic(
            *(features_ND * scale, labels_N),
            moments(features_ND * scale, labels_N, weights_N=weights_N * factor).spectrum(),
            weights_N * factor,
        )
        .predict(features_ND * scale)
        .softmax(1)
        for scale, factor in ((1.0, 1.0), (8.0, 1.0), (1.0, 4.0))
    ]
    torch.testing.assert_close(predictions[1], predictions[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(predictions[2], predictions[0], atol=1e-6, rtol=0)


def test_one_fold_stops_after_the_loss_rose_and_few_rows_choose_nothing():
    features_ND, labels_N = rows(count=12_000)
    spectrum = moments(features_ND, labels_N).spectrum()
    criterion = choose_logistic(features_ND, labels_N, spectrum, grid=[3e5, 3e4, 1.0, 1e-3, 1e-4, 1e-5]).criterion
    losses = list(criterion.values())
    assert losses.index(min(losses)) >= len(losses) - 2
    few = slice(0, logistic.FEW_ROWS - 1)
    assert choose_logistic(features_ND[few], labels_N[few], spectrum).criterion is None


def test_weights_are_repeated_rows():
    features_ND, labels_N = rows()
    weights_N = torch.randint(1, 4, (300,))
    again_N = torch.arange(300).repeat_interleave(weights_N)
    weighted = logistic_regression(
        *(features_ND, labels_N, moments(features_ND, labels_N, weights_N=weights_N.double()).spectrum(), 1.0),
        weights_N.double(),
        **UNCHOSEN,
    )
    repeated = logistic_regression(
        *(features_ND[again_N], labels_N[again_N]),
        *(moments(features_ND[again_N], labels_N[again_N]).spectrum(), 1.0),
        **UNCHOSEN,
    )
    torch.testing.assert_close(weighted.weight_CD, repeated.weight_CD, atol=OPTIMUM, rtol=0)


def test_folds_are_balanced_within_every_class():
    labels_N = torch.arange(5).repeat(20)  # a period of as many rows as there are folds
    fold_N = stratified_folds(labels_N, 5)
    for label in range(5):
        assert fold_N[labels_N == label].bincount(minlength=5).tolist() == [4] * 5
    assert stratified_folds(torch.arange(10), 5).bincount().tolist() == [2] * 5


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_temperature_is_scipys(scale, weighted):
    labels_N = torch.randint(5, (400,))
    logits_NC = (torch.randn(400, 5).double() + 1.5 * F.one_hot(labels_N, 5)) * scale
    weights_N = torch.rand(400) if weighted else None
    expected = minimize_scalar(
        lambda beta: log_loss(logits_NC * (beta / scale), labels_N, weights_N),
        bounds=(1e-3, 1e3),
        options={"xatol": 1e-10},
    )
    assert fit_temperature(logits_NC, labels_N, weights_N) == pytest.approx(scale / expected.x, rel=SCALAR)


def test_temperature_of_logits_that_tell_all_or_nothing():
    labels_N = torch.arange(4).repeat(5)
    certain_NC = F.one_hot(labels_N, 4).double()
    assert fit_temperature(certain_NC, labels_N) < 1e-2
    assert fit_temperature(-certain_NC, labels_N) > 1e3
    assert 1e-4 <= fit_temperature(torch.zeros(20, 4), labels_N) <= 1.01e4


def test_calibration_error_is_the_loops():
    labels_N = torch.randint(3, (500,))
    probability_NC = (torch.randn(500, 3) * 2).double().softmax(1)
    probability_NC[0] = torch.tensor([1.0, 0.0, 0.0])  # the upper end of the last bin
    total = 0.0
    for lower in range(15):
        confidences, hits = [], []
        for probability, label in zip(probability_NC, labels_N, strict=True):
            if lower / 15 < probability.max() <= (lower + 1) / 15:
                confidences.append(probability.max().item())
                hits.append(float(probability.argmax() == label))
        if hits:
            total += len(hits) / 500 * abs(np.mean(hits) - np.mean(confidences))
    assert expected_calibration_error(probability_NC, labels_N) == pytest.approx(total, abs=1e-12)


def test_log_loss_is_scikit_learns():
    from sklearn import metrics

    logits_NC, labels_N, weights_N = torch.randn(50, 4).double(), torch.arange(50) % 4, torch.rand(50)
    expected = metrics.log_loss(labels_N, logits_NC.softmax(1), sample_weight=weights_N)
    assert log_loss(logits_NC, labels_N, weights_N) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regularization": 0.0}, "regularization=0"),
        ({"regularization": -1.0}, "regularization=-1.0"),
        ({"labels_N": torch.full((300,), 4)}, "row 0: .* label 4 from 0 to 3"),
        ({"labels_N": torch.zeros(300)}, "must be class ids"),
        ({"labels_N": torch.zeros(299, dtype=torch.long)}, "one for each of 300 rows"),
        ({"features_ND": torch.zeros(300, 5)}, r"must be \[rows, 6\]"),
        ({"features_ND": torch.full((300, 6), float("nan"))}, "row 0: must be finite"),
        ({"weights_N": -torch.ones(300)}, "weights=-1.0"),
        ({"weights_N": torch.ones(299)}, "weights have shape"),
    ],
)
def test_input_that_cannot_be_used(changes, message):
    features_ND, labels_N = rows()
    arguments = {
        "features_ND": features_ND,
        "labels_N": labels_N,
        "spectrum": moments(features_ND, labels_N).spectrum(),
        "regularization": 1.0,
    }
    with pytest.raises(InputError, match=message):
        logistic_regression(**{**arguments, **changes})


def test_a_choice_needs_rows_and_penalties():
    features_ND, labels_N = rows()
    spectrum = moments(features_ND, labels_N).spectrum()
    with pytest.raises(InputError, match="0 penalties"):
        choose_logistic(features_ND, labels_N, spectrum, grid=[])
    with pytest.raises(InputError, match="1 rows"):
        choose_logistic(features_ND[:1], labels_N[:1], spectrum)
    with pytest.raises(InputError, match="bins=0"):
        expected_calibration_error(torch.ones(1, 1), torch.zeros(1, dtype=torch.long), 0)
    with pytest.raises(InputError, match="at least one"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="rows=0"):
        discriminant(RidgeStatistics(2, 2), 1.0)
