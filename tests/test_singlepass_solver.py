"""Ridge solutions and the choice of lambda, against numpy, loops over rows and scikit-learn."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifierCV, RidgeCV

from linpass.errors import InputError
from linpass.singlepass.criteria import gcv_scores, leave_one_out_errors
from linpass.singlepass.solver import default_grid, few_shot_floor, leave_one_out, solve_ridge
from linpass.singlepass.statistics import GroupedStatistics, RidgeStatistics

# float64 on a few hundred rows; the condition number of the scatter (up to 1e4 here) multiplies 1e-16.
EXACT = 1e-9
# Features about a mean of 1e4 are themselves rounded at 1e-12, and both ways divide by the smallest singular value.
OFFSET = 1e-7
# Without an intercept nothing may be centred: the scatter of those features has a condition number of 1e10.
OFFSET_UNCENTRED = 1e-5
# The default mode: float32 products, 6e-8 each, times the condition number of the regularised scatter, about 100.
MIXED = 1e-4
GRID = [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3]


def problem(rows=60, features=9, targets=3, noise=1.0, seed=0):
    """Features of unequal scale and mean, targets that depend on them, weights."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x_ND = randn(rows, features) * torch.linspace(0.3, 3, features, dtype=torch.float64) + randn(features)
    y_NC = x_ND @ randn(features, targets) + noise * randn(rows, targets) + 2
    weights_N = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.2
    return x_ND, y_NC, weights_N


def statistics_of(x_ND, y, weights_N=None, targets=None, precision="float64"):
    targets = targets or y.shape[1]
    return RidgeStatistics(x_ND.shape[1], targets, precision=precision).update(x_ND, y, weights_N)


def folds_of(x_ND, y_NC, weights_N, folds_N, count):
    grouped = GroupedStatistics(count, x_ND.shape[1], y_NC.shape[1], precision="float64")
    grouped.update(x_ND, y_NC, weights_N, folds_N)
    return grouped


def close(actual, expected, tolerance=EXACT):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- a given lambda


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(60, 9), (8, 20)], ids=["tall", "wide"])
def test_ridge_is_scikit_learns(fit_intercept, weighted, shape):
    x_ND, y_NC, weights_N = problem(*shape)
    weights_N = weights_N if weighted else None
    solution = solve_ridge(statistics_of(x_ND, y_NC, weights_N), 0.7, fit_intercept=fit_intercept)
    theirs = Ridge(alpha=0.7, fit_intercept=fit_intercept)
    theirs.fit(x_ND.numpy(), y_NC.numpy(), None if weights_N is None else weights_N.numpy())
    close(solution.weight_CD, theirs.coef_)
    close(solution.bias_C, np.broadcast_to(theirs.intercept_, 3).copy())
    close(solution.predict(x_ND), theirs.predict(x_ND.numpy()))
    assert (solution.regularization, solution.criterion, solution.method) == (0.7, None, "fixed")


def test_one_lambda_per_target():
    x_ND, y_NC, _ = problem()
    lambda_C = torch.tensor([0.1, 3.0, 50.0])
    solution = solve_ridge(statistics_of(x_ND, y_NC), lambda_C)
    theirs = Ridge(alpha=lambda_C.double().numpy()).fit(x_ND.numpy(), y_NC.numpy())
    close(solution.weight_CD, theirs.coef_)


def test_a_fit_of_folds_is_the_fit_of_all_rows():
    x_ND, y_NC, weights_N = problem()
    grouped = folds_of(x_ND, y_NC, weights_N, torch.arange(60) % 4, 4)
    close(solve_ridge(grouped, 0.5).weight_CD, solve_ridge(statistics_of(x_ND, y_NC, weights_N), 0.5).weight_CD)


def least_squares(x_ND, y_NC, fit_intercept=True):
    """numpy's minimum-norm weights [C, D] about the means, and the bias."""
    x, y = x_ND.numpy(), y_NC.numpy()
    mean, target_mean = (x.mean(0), y.mean(0)) if fit_intercept else (0 * x[0], 0 * y[0])
    # Below 1e-7 of the largest singular value a Gram matrix in float64 cannot tell a direction from rounding.
    weight = np.linalg.lstsq(x - mean, y - target_mean, rcond=1e-7)[0].T
    return weight, target_mean - weight @ mean


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("spoil", ["nothing", "duplicated", "rank", "constant", "offset", "wide", "one_row"])
def test_zero_lambda_is_the_least_squares_of_smallest_norm(spoil, fit_intercept):
    x_ND, y_NC, _ = problem()
    if spoil == "duplicated":
        x_ND = torch.cat([x_ND, x_ND[:, :4]], 1)
    elif spoil == "rank":
        x_ND = x_ND[:, :5] @ torch.randn(5, 9, dtype=torch.float64)
    elif spoil == "constant":
        x_ND[:, 3] = 7.0
    elif spoil == "offset":
        x_ND = x_ND + 1e4
    elif spoil == "wide":
        x_ND, y_NC, _ = problem(8, 20)
    elif spoil == "one_row":
        x_ND, y_NC = x_ND[:1], y_NC[:1]
    solution = solve_ridge(statistics_of(x_ND, y_NC), 0.0, fit_intercept=fit_intercept)
    weight, bias = least_squares(x_ND, y_NC, fit_intercept)
    tolerance = EXACT if spoil != "offset" else OFFSET if fit_intercept else OFFSET_UNCENTRED
    close(solution.weight_CD, weight, tolerance)
    close(solution.predict(x_ND), x_ND.numpy() @ weight.T + bias, tolerance)


@pytest.mark.parametrize("regularization", [0.0, 1e-30, 0.1, "gcv"])
def test_no_information_gives_the_mean(regularization):
    """A constant target, and features that are all constant."""
    x_ND, y_NC, _ = problem()
    y_NC[:, 1] = 3.5
    constant = solve_ridge(statistics_of(x_ND, y_NC), regularization, per_target=regularization == "gcv")
    assert constant.weight_CD.isfinite().all()
    close(constant.weight_CD[1], torch.zeros(9))
    close(constant.bias_C[1], 3.5)
    flat = solve_ridge(statistics_of(torch.full((60, 9), 0.1), y_NC), regularization)
    close(flat.weight_CD, torch.zeros(3, 9))
    close(flat.bias_C, y_NC.mean(0))


@pytest.mark.parametrize("regularization", [0.0, 5.0, "gcv"])
@pytest.mark.parametrize("shape", [(60, 9), (8, 20)], ids=["tall", "wide"])
def test_the_default_precision_is_near(shape, regularization):
    """Also where float32 turns eigenvalues of 0 into noise, which must not be divided by."""
    x_ND, y_NC, weights_N = problem(*shape)
    x_ND = torch.cat([x_ND, x_ND[:, :4]], 1) + 1e4
    near, exact = (
        solve_ridge(statistics_of(x_ND, y_NC, weights_N, precision=precision), regularization).predict(x_ND)
        for precision in ("mixed", "float64")
    )
    assert (near - exact).norm() < MIXED * (exact - exact.mean(0)).norm()


def test_a_streamed_factor_reaches_condition_numbers_that_moments_do_not():
    left_ND, right_DD = torch.linalg.qr(torch.randn(60, 9).double())[0], torch.linalg.qr(torch.randn(9, 9).double())[0]
    x_ND = left_ND * torch.logspace(0, -9, 9, dtype=torch.float64) @ right_DD
    truth_CD = torch.randn(3, 9, dtype=torch.float64)
    solution = solve_ridge(statistics_of(x_ND, x_ND @ truth_CD.T, precision="tsqr"), 0.0)
    close(solution.weight_CD, truth_CD, 1e-5)
    from_moments = solve_ridge(statistics_of(x_ND, x_ND @ truth_CD.T), 0.0)
    assert (from_moments.weight_CD - truth_CD).abs().max() > 0.1


# -------------------------------------------------------------------------------------------------------- gcv


def hat_matrix(x_ND, weights_N, regularization, fit_intercept):
    """[N, N] of all rows' fits to all rows' targets, by solving the augmented normal equations."""
    ones = x_ND.new_ones(len(x_ND), 1)
    rows = torch.cat([ones, x_ND], 1) if fit_intercept else x_ND
    penalty = regularization * torch.eye(rows.shape[1], dtype=torch.float64)
    if fit_intercept:
        penalty[0, 0] = 0
    return rows @ torch.linalg.solve(rows.T @ (weights_N[:, None] * rows) + penalty, rows.T * weights_N)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("shape", [(60, 9), (10, 9), (9, 20)], ids=["tall", "no_spare_row", "wide"])
def test_gcv_is_the_hat_matrixs(fit_intercept, shape):
    x_ND, y_NC, weights_N = problem(*shape)
    spectrum = statistics_of(x_ND, y_NC, weights_N).spectrum(fit_intercept)
    grid = GRID[1:]
    for row, regularization in zip(gcv_scores(spectrum, torch.tensor(grid, dtype=torch.float64)), grid, strict=True):
        hat = hat_matrix(x_ND, weights_N, regularization, fit_intercept)
        squares_NC = weights_N[:, None] * (y_NC - hat @ y_NC) ** 2
        expected = len(x_ND) * squares_NC.sum(0) / (len(x_ND) - hat.trace()) ** 2
        close(row, expected, 1e-8 if shape[0] == 9 else EXACT)  # the hat matrix itself nears the identity


def test_rows_of_weight_zero_choose_nothing():
    """By GCV as by leaving one out: they are as if they were not there. So are classes of weight zero."""
    x, y, _ = problem(rows=90)
    weights = torch.ones(90, dtype=torch.float64)
    weights[30:] = 0
    alone = solve_ridge(statistics_of(x[:30], y[:30]), "gcv")
    beside = solve_ridge(statistics_of(x, y, weights), "gcv")
    assert beside.regularization == pytest.approx(alone.regularization, rel=1e-6)
    groups = GroupedStatistics(2, x.shape[1], y.shape[1], precision="float64")
    groups.update(x, y, None, (torch.arange(90) >= 30).long())
    left = solve_ridge(groups.total([1.0, 0.0]), "gcv")
    assert left.regularization == pytest.approx(alone.regularization, rel=1e-6)


def test_gcv_of_an_interpolating_fit_has_a_limit_at_zero():
    x_ND, y_NC, _ = problem(9, 20)
    spectrum = statistics_of(x_ND, y_NC).spectrum()
    at_zero, nearly = gcv_scores(spectrum, torch.tensor([0.0, 1e-9], dtype=torch.float64))
    assert at_zero.isfinite().all()
    close(at_zero, nearly, 1e-7)


def test_gcv_chooses_its_minimum():
    x_ND, y_NC, weights_N = problem(noise=6.0)
    statistics = statistics_of(x_ND, y_NC, weights_N)
    solution = solve_ridge(statistics, "gcv")
    assert len(solution.criterion) == 40
    assert solution.regularization == min(solution.criterion, key=solution.criterion.get)
    assert min(solution.criterion) < solution.regularization < max(solution.criterion)
    close(solution.weight_CD, solve_ridge(statistics, solution.regularization).weight_CD, 1e-14)


def test_per_target_chooses_as_each_target_alone():
    x_ND, y_NC, _ = problem()
    y_NC[:, 1] = torch.randn(60)  # wants far more regularisation
    together = solve_ridge(statistics_of(x_ND, y_NC), "gcv", grid=GRID, per_target=True)
    for target in range(3):
        alone = solve_ridge(statistics_of(x_ND, y_NC[:, target : target + 1]), "gcv", grid=GRID)
        assert together.regularization[target].item() == alone.regularization
        close(together.weight_CD[target], alone.weight_CD[0])
    assert together.regularization[1] > together.regularization[0]


@pytest.mark.parametrize("method", ["gcv", "kfold"])
@pytest.mark.parametrize("rows", [60, 7])
def test_units_of_features_and_weights_choose_the_same_predictions(method, rows):
    """Features times c want lambda times c^2, weights times a want lambda times a; the floor follows both."""
    x_ND, y_NC, weights_N = problem(rows)
    folds_N = torch.arange(rows) % 3
    plain = solve_ridge(folds_of(x_ND, y_NC, weights_N, folds_N, 3), method)
    scaled = solve_ridge(folds_of(1e3 * x_ND, y_NC, 7 * weights_N, folds_N, 3), method)
    close(scaled.predict(1e3 * x_ND), plain.predict(x_ND), 1e-8)
    assert scaled.regularization == pytest.approx(7e6 * plain.regularization)


def test_default_grid_reaches_both_ends():
    x_ND, y_NC, _ = problem()
    statistics = statistics_of(x_ND, y_NC)
    grid_L = default_grid(statistics.spectrum())
    assert len(grid_L) == 40
    close(solve_ridge(statistics, grid_L[0]).weight_CD, solve_ridge(statistics, 0.0).weight_CD, 1e-6)
    assert solve_ridge(statistics, grid_L[-1]).predict(x_ND).std(0).max() < 0.01 * y_NC.std(0).max()
    assert (grid_L[1:] / grid_L[:-1]).max() < 2.5


# ------------------------------------------------------------------------------------------------------ k folds


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_kfold_is_the_squared_error_of_rows_held_out(fit_intercept):
    x_ND, y_NC, weights_N = problem()
    folds_N = torch.randint(0, 5, (60,))
    folds_N[folds_N == 3] = 4  # one group stays empty
    solution = solve_ridge(folds_of(x_ND, y_NC, weights_N, folds_N, 5), "kfold", grid=GRID, fit_intercept=fit_intercept)
    for regularization, score in solution.criterion.items():
        expected = 0.0
        for fold in (0, 1, 2, 4):
            inside, model = folds_N == fold, Ridge(alpha=regularization, fit_intercept=fit_intercept)
            model.fit(x_ND[~inside].numpy(), y_NC[~inside].numpy(), weights_N[~inside].numpy())
            misses = y_NC[inside].numpy() - model.predict(x_ND[inside].numpy())
            expected += (weights_N[inside].numpy()[:, None] * misses**2).sum()
        assert score == pytest.approx(expected / 60, rel=EXACT)
    assert solution.regularization == min(solution.criterion, key=solution.criterion.get)
    assert solution.method == "kfold"


def test_kfold_of_a_constant_target_is_finite():
    x_ND, y_NC, _ = problem()
    y_NC[:] = 2.0
    solution = solve_ridge(folds_of(x_ND, y_NC, None, torch.arange(60) % 5, 5), "kfold")
    assert all(math.isfinite(score) for score in solution.criterion.values())
    close(solution.predict(x_ND), y_NC)


# ------------------------------------------------------------------------------------------------- leave one out


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(60, 9), (8, 20)], ids=["tall", "wide"])
def test_leave_one_out_is_scikit_learns(fit_intercept, weighted, shape):
    x_ND, y_NC, weights_N = problem(*shape, noise=4.0)
    weights_N = weights_N if weighted else None
    solution = leave_one_out(
        statistics_of(x_ND, y_NC, weights_N), x_ND, y_NC, weights_N, grid=GRID, fit_intercept=fit_intercept
    )
    theirs = RidgeCV(alphas=GRID, fit_intercept=fit_intercept, store_cv_results=True)
    theirs.fit(x_ND.numpy(), y_NC.numpy(), None if weights_N is None else weights_N.numpy())
    close(list(solution.criterion.values()), theirs.cv_results_.mean(0).sum(0))
    assert solution.regularization == theirs.alpha_
    close(solution.weight_CD, theirs.coef_)
    close(solution.bias_C, np.broadcast_to(theirs.intercept_, 3).copy())


def test_leave_one_out_per_target_is_scikit_learns():
    x_ND, y_NC, _ = problem(noise=4.0)
    y_NC[:, 1] = torch.randn(60)
    solution = leave_one_out(statistics_of(x_ND, y_NC), x_ND, y_NC, grid=GRID, per_target=True)
    theirs = RidgeCV(alphas=GRID, alpha_per_target=True).fit(x_ND.numpy(), y_NC.numpy())
    close(solution.regularization, theirs.alpha_)
    close(solution.weight_CD, theirs.coef_)


def test_leave_one_out_errors_are_those_of_refits(monkeypatch):
    x_ND, _, weights_N = problem(12)
    ids_N = torch.arange(12) % 3
    statistics = statistics_of(x_ND, ids_N, weights_N, targets=3)
    (error_NC,) = leave_one_out_errors(statistics.spectrum(), x_ND, ids_N, weights_N, [0.3])
    one_hot_NC = torch.eye(3, dtype=torch.float64)[ids_N]
    for row in range(12):
        rest = torch.arange(12) != row
        refit = solve_ridge(statistics_of(x_ND[rest], ids_N[rest], weights_N[rest], targets=3), 0.3)
        close(error_NC[row], one_hot_NC[row] - refit.predict(x_ND[row : row + 1])[0])
    monkeypatch.setattr("linpass.singlepass.solver.CHUNK_ROWS", 5)
    (score,) = leave_one_out(statistics, x_ND, ids_N, weights_N, grid=[0.3]).criterion.values()
    assert score == pytest.approx(((weights_N[:, None] * error_NC**2).sum() / 12).item(), rel=EXACT)


def test_leave_one_out_of_a_row_that_alone_has_a_feature_is_never_chosen_blindly():
    x_ND, y_NC, _ = problem()
    x_ND[:, 0] = 0
    x_ND[5, 0] = 1.0
    solution = leave_one_out(statistics_of(x_ND, y_NC), x_ND, y_NC, grid=[0.0, 1.0])
    assert solution.criterion[0.0] == math.inf
    assert solution.regularization == 1.0


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_leave_one_out_is_ridge_classifier_cv(classes, class_weight):
    """Targets {0, 1} are half of {-1, 1} plus 1/2: the same lambda, a quarter of the error, the same classes."""
    x_ND, scores_NC, _ = problem(80, 9, classes, noise=4.0)
    labels_N = (scores_NC - torch.linspace(0, 3, classes)).argmax(1)
    theirs = RidgeClassifierCV(alphas=GRID, class_weight=class_weight, store_cv_results=True)
    theirs.fit(x_ND.numpy(), labels_N.numpy())
    counts_C = labels_N.bincount(minlength=classes).double()
    weights_N = (80 / (classes * counts_C))[labels_N] if class_weight else None
    solution = leave_one_out(
        statistics_of(x_ND, labels_N, weights_N, targets=classes), x_ND, labels_N, weights_N, grid=GRID
    )
    assert solution.regularization == theirs.alpha_
    columns = slice(1, None) if classes == 2 else slice(None)
    decision_NC = 2 * solution.predict(x_ND)[:, columns] - 1
    close(decision_NC.squeeze(1), theirs.decision_function(x_ND.numpy()))
    assert torch.equal(solution.predict(x_ND).argmax(1), torch.as_tensor(theirs.predict(x_ND.numpy())))
    twice = 2.0 if classes == 2 else 1.0  # they fit one column of two that mirror each other
    close([4 * score for score in solution.criterion.values()], twice * theirs.cv_results_.mean(0).sum(0))


# ---------------------------------------------------------------------------------------------------- few shots


def unit_rows(rows, seed, features=64):
    """Two classes of unit rows that overlap, spread less and less from feature to feature as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(rows) % 2
    x_ND = torch.randn(rows, features, generator=generator, dtype=torch.float64) + 0.1 * (2 * labels_N[:, None] - 1)
    x_ND = x_ND * torch.arange(1, features + 1) ** -0.5
    return x_ND / x_ND.norm(dim=1, keepdim=True), labels_N


def test_the_few_shot_floor_keeps_gcv_from_collapsing():
    """48 rows of 64 features, 40 draws: without a floor the worst has far more error than a constant, 0.25."""
    test_ND, test_N = unit_rows(1000, 999)
    errors = {None: [], 0.0: []}
    for seed in range(40):
        x_ND, labels_N = unit_rows(48, seed)
        statistics = statistics_of(x_ND, labels_N, targets=2)
        for floor, found in errors.items():
            solution = solve_ridge(statistics, "gcv", floor=floor)
            found.append((solution.predict(test_ND)[:, 1] - test_N).square().mean().item())
    assert max(errors[0.0]) > 0.4
    assert max(errors[None]) < 0.28
    assert sum(errors[None]) < sum(errors[0.0])


def test_the_floor_is_relative_and_only_limits_choices():
    x_ND, y_NC, _ = problem(8, 20, noise=0.0)
    statistics = statistics_of(x_ND, y_NC)
    squared_norm = (x_ND - x_ND.mean(0)).square().sum(1).mean().item()
    assert few_shot_floor(statistics.spectrum()) == 1.0
    assert min(solve_ridge(statistics, "gcv").criterion) == pytest.approx(squared_norm)
    assert min(solve_ridge(statistics, "gcv", floor=2.0).criterion) == pytest.approx(2 * squared_norm)
    assert min(solve_ridge(statistics, "gcv", grid=GRID).criterion) == GRID[0]
    assert solve_ridge(statistics, 1e-3).regularization == 1e-3
    assert few_shot_floor(statistics_of(*problem()[:2]).spectrum()) == 0.0


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"regularization": -1.0}, "regularization=-1.0 must be"),
        ({"regularization": math.nan}, "regularization=nan must be"),
        ({"regularization": math.inf}, "regularization=inf must be"),
        ({"regularization": torch.tensor([1.0, -2.0, 3.0])}, "regularization=-2.0 must be"),
        ({"regularization": torch.ones(2)}, r"shape \[2\]"),
        ({"regularization": "best"}, "regularization='best' must be"),
        ({"regularization": "kfold"}, "needs a GroupedStatistics"),
        ({"grid": []}, "grid is empty"),
        ({"grid": [1.0, -1.0]}, "grid=-1.0 must be"),
        ({"floor": -1.0}, "floor=-1.0 must be"),
    ],
)
def test_unusable_choices_are_named(arguments, words):
    x_ND, y_NC, _ = problem()
    with pytest.raises(InputError, match=words):
        solve_ridge(statistics_of(x_ND, y_NC), **arguments)


def test_missing_rows_are_named():
    with pytest.raises(InputError, match="rows=0"):
        solve_ridge(RidgeStatistics(3, 2), 1.0)
    x_ND, y_NC, weights_N = problem()
    with pytest.raises(InputError, match="weight 0"):
        solve_ridge(statistics_of(x_ND, y_NC, 0 * weights_N), 1.0)
    one_group = folds_of(x_ND, y_NC, None, torch.zeros(60, dtype=torch.long), 3)
    with pytest.raises(InputError, match="at least 2 groups, got 1"):
        solve_ridge(one_group, "kfold")
    statistics = statistics_of(x_ND, y_NC)
    with pytest.raises(InputError, match=r"features have shape \[59, 9\]"):
        leave_one_out(statistics, x_ND[:-1], y_NC[:-1])
    with pytest.raises(InputError, match="targets have 59 rows"):
        leave_one_out(statistics, x_ND, y_NC[:-1])
    with pytest.raises(InputError, match="weights have 59 rows"):
        leave_one_out(statistics, x_ND, y_NC, weights_N[:-1])


def test_a_solution_is_not_changed_by_accident():
    x_ND, y_NC, _ = problem()
    with pytest.raises(dataclasses.FrozenInstanceError):
        solve_ridge(statistics_of(x_ND, y_NC), 1.0).method = "another"
