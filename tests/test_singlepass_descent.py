"""Descent without its epochs against torch.optim.SGD, and the printed batch-aware formula against its identities."""

import math

import pytest
import torch
from torch import nn

from linpass.errors import InputError
from linpass.singlepass.batch_aware import batch_aware, compute_batch_aware_solution
from linpass.singlepass.descent import SGDMap, gradient_descent
from linpass.singlepass.solver import solve_ridge
from linpass.singlepass.statistics import RidgeStatistics

# float64, up to some thousand steps one after the other against a few products of matrices.
STEPS = 1e-10
# Two ways to one linear system of condition number up to 1e4.
EXACT = 1e-10


def problem(rows=37, features=5, targets=3):
    """Features with a mean, targets that depend on them; the last of five batches of 8 has 5 rows."""
    x_ND = torch.randn(rows, features, dtype=torch.float64) + 0.5
    y_NC = x_ND @ torch.randn(features, targets, dtype=torch.float64) + torch.randn(rows, targets, dtype=torch.float64)
    return x_ND, y_NC


def train(x_ND, y_NC, epochs, batch_size, bias=True, initial=None, weights_N=None, **settings):
    """The layer that torch.optim.SGD reaches from zero or the initial one, row batches in their order."""
    layer = nn.Linear(x_ND.shape[1], y_NC.shape[1], bias=bias, dtype=torch.float64)
    if initial is None:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    else:
        layer.load_state_dict(initial.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), **settings)
    weights_N = torch.ones(len(x_ND), dtype=torch.float64) if weights_N is None else weights_N
    for _ in range(epochs):
        for x, y, w in zip(*(part.split(batch_size) for part in (x_ND, y_NC, weights_N)), strict=True):
            optimizer.zero_grad()
            (0.5 * (w * (layer(x) - y).square().sum(1)).sum() / w.sum()).backward()
            optimizer.step()
    return layer


def mapped(x_ND, targets, batch_size, num_targets=3, **settings):
    sgd = SGDMap(x_ND.shape[1], num_targets, **settings)
    for x, y in zip(x_ND.split(batch_size), targets.split(batch_size), strict=True):
        sgd.update(x, y)
    return sgd


def statistics_of(x_ND, y, weights_N=None, precision="float64", num_targets=3):
    return RidgeStatistics(x_ND.shape[1], num_targets, precision=precision).update(x_ND, y, weights_N)


def assert_layer(solution, layer, tolerance=STEPS):
    bias_C = torch.zeros(len(solution.bias_C), dtype=torch.float64) if layer.bias is None else layer.bias
    torch.testing.assert_close(solution.weight_CD, layer.weight.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(solution.bias_C, bias_C.detach(), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- gradient descent


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("steps", [1, 2, 150])
@pytest.mark.parametrize("part_of_largest", [0.01, 0.4, 0.95])
def test_gradient_descent_is_torchs(bias, weight_decay, steps, part_of_largest):
    """Learning rates on both sides of 1 / s, where the logarithm of the filter ends."""
    x_ND, y_NC = problem()
    weights_N = torch.rand(37, dtype=torch.float64) + 0.1
    statistics = statistics_of(x_ND, y_NC, weights_N)
    rate = part_of_largest * largest_rate(x_ND, weights_N, bias, weight_decay)
    solution = gradient_descent(statistics, steps, rate, bias, weight_decay)
    layer = train(x_ND, y_NC, steps, len(x_ND), bias=bias, weights_N=weights_N, lr=rate, weight_decay=weight_decay)
    assert_layer(solution, layer)
    assert (solution.method, solution.criterion) == ("gd", None)
    assert solution.regularization == pytest.approx(weight_decay * weights_N.sum().item())


def largest_rate(x_ND, weights_N, bias, weight_decay):
    rows = torch.cat([x_ND.new_ones(len(x_ND), 1), x_ND], 1) if bias else x_ND
    curvature = torch.linalg.eigvalsh(rows.T @ (weights_N[:, None] * rows) / weights_N.sum())[-1].item()
    return 2 / (curvature + weight_decay)


def test_gradient_descent_from_a_factor_instead_of_moments():
    x_ND, y_NC = problem()
    solution = gradient_descent(statistics_of(x_ND, y_NC, precision="tsqr"), 50, 0.05)
    assert_layer(solution, train(x_ND, y_NC, 50, len(x_ND), lr=0.05))


def test_gradient_descent_with_dependent_features():
    """Directions without rows stay at zero."""
    x_ND, y_NC = problem()
    x_ND = torch.cat([x_ND, x_ND[:, :2], torch.zeros(37, 1, dtype=torch.float64)], 1)
    solution = gradient_descent(statistics_of(x_ND, y_NC), 300, 0.05)
    assert_layer(solution, train(x_ND, y_NC, 300, len(x_ND), lr=0.05))


def test_many_steps_are_least_squares():
    x_ND, y_NC = problem()
    statistics = statistics_of(x_ND, y_NC)
    forever, exact = gradient_descent(statistics, 10**9, 0.1), solve_ridge(statistics, 0.0)
    torch.testing.assert_close(forever.weight_CD, exact.weight_CD, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(forever.bias_C, exact.bias_C, rtol=EXACT, atol=EXACT)


def test_the_largest_stable_learning_rate_is_named():
    x_ND, y_NC = problem()
    statistics = statistics_of(x_ND, y_NC)
    limit = largest_rate(x_ND, torch.ones(37, dtype=torch.float64), True, 0.0)
    with pytest.raises(InputError, match=f"learning_rate=.* must be below {limit:.6g}"):
        gradient_descent(statistics, 10, limit * (1 + 1e-9))
    assert gradient_descent(statistics, 10, limit * (1 - 1e-9)).weight_CD.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.1), "steps=0 must be"),
        ((2.5, 0.1), "steps=2.5 must be"),
        ((5, 0.0), "learning_rate=0.0 must be"),
        ((5, math.nan), "learning_rate=nan must be"),
        ((5, 0.1, True, -1.0), "weight_decay=-1.0 must be"),
    ],
)
def test_unusable_steps_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        gradient_descent(statistics_of(*problem()), *arguments)


def test_descent_needs_rows():
    with pytest.raises(InputError, match="rows=0"):
        gradient_descent(RidgeStatistics(5, 3), 10, 0.1)


# ----------------------------------------------------------------------------------------------------- SGD's map


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_map_is_torch_sgd_after_50_epochs(bias, weight_decay, momentum, nesterov):
    x_ND, y_NC = problem()
    settings = {"weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
    solution = mapped(x_ND, y_NC, 8, learning_rate=0.02, fit_intercept=bias, **settings).solve(50)
    assert_layer(solution, train(x_ND, y_NC, 50, 8, bias=bias, lr=0.02, **settings))
    assert (solution.method, solution.regularization, solution.criterion) == ("sgd", 0.0, None)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 8])
def test_every_number_of_epochs(epochs):
    x_ND, y_NC = problem()
    solution = mapped(x_ND, y_NC, 8, learning_rate=0.05).solve(epochs)
    assert_layer(solution, train(x_ND, y_NC, epochs, 8, lr=0.05))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_the_map_from_an_initial_layer(momentum, bias):
    x_ND, y_NC = problem()
    initial = nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    sgd = mapped(x_ND, y_NC, 8, learning_rate=0.02, momentum=momentum, fit_intercept=bias)
    layer = train(x_ND, y_NC, 20, 8, bias=bias, initial=initial, lr=0.02, momentum=momentum)
    assert_layer(sgd.solve(20, initial), layer)
    assert_layer(sgd.solve(20), train(x_ND, y_NC, 20, 8, bias=bias, lr=0.02, momentum=momentum))


def test_class_ids_are_one_hot_rows():
    x_ND, _ = problem()
    ids_N = torch.randint(0, 3, (37,))
    one_hot_NC = torch.eye(3, dtype=torch.float64)[ids_N]
    from_ids, from_rows = (mapped(x_ND, y, 8, learning_rate=0.05).solve(9) for y in (ids_N, one_hot_NC))
    assert torch.equal(from_ids.weight_CD, from_rows.weight_CD)


def test_one_batch_of_all_rows_is_gradient_descent():
    x_ND, y_NC = problem()
    solution = mapped(x_ND, y_NC, 37, learning_rate=0.05).solve(200)
    descended = gradient_descent(statistics_of(x_ND, y_NC), 200, 0.05)
    torch.testing.assert_close(solution.weight_CD, descended.weight_CD, rtol=STEPS, atol=STEPS)


def test_the_order_of_batches_matters():
    """Why maps of two workers cannot be merged."""
    x_ND, y_NC = problem()
    forward = mapped(x_ND, y_NC, 8, learning_rate=0.1).solve(3).weight_CD
    backward = mapped(x_ND.flip(0), y_NC.flip(0), 8, learning_rate=0.1).solve(3).weight_CD
    assert (forward - backward).abs().max() > 1e-3
    assert not hasattr(SGDMap, "merge")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resuming_changes_no_bit(momentum):
    x_ND, y_NC = problem()
    whole = mapped(x_ND, y_NC, 8, learning_rate=0.02, momentum=momentum)
    first = mapped(x_ND[:16], y_NC[:16], 8, learning_rate=0.02, momentum=momentum)
    state = first.state_dict()
    saved = state["parameter"].clone()
    first.update(x_ND[16:24], y_NC[16:24])
    resumed = SGDMap(5, 3, 0.02, momentum=momentum)
    resumed.load_state_dict(state)
    for x, y in zip(x_ND[16:].split(8), y_NC[16:].split(8), strict=True):
        resumed.update(x, y)
    assert resumed.rows == 37
    assert torch.equal(state["parameter"], saved)  # it follows neither the map it is of nor the one it went into
    assert torch.equal(resumed.solve(50).weight_CD, whole.solve(50).weight_CD)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_the_state_does_not_grow_with_rows():
    """(D + 1) (D + 1 + C) numbers, with momentum 4 (D + 1)^2 + 2 (D + 1) C."""
    for momentum, numbers in ((0.0, 6 * (6 + 3)), (0.9, 2 * 6 * (12 + 3))):
        sgd = mapped(*problem(rows=400), 8, learning_rate=0.01, momentum=momentum)
        state = sgd.state_dict()
        assert sum(state[name].numel() for name in ("parameter", "velocity") if name in state) == numbers


def test_a_state_of_other_settings_is_refused():
    state = mapped(*problem(), 8, learning_rate=0.02).state_dict()
    other = SGDMap(5, 3, 0.03)
    with pytest.raises(InputError, match="learning_rate=0.03: .* made with 0.02"):
        other.load_state_dict(state)
    assert other.rows == 0
    del state["momentum"]
    with pytest.raises(InputError, match="momentum=0: .* missing"):
        SGDMap(5, 3, 0.02).load_state_dict(state)


def test_half_precision_rows_under_autocast_are_computed_in_float64():
    x_ND, y_NC = problem()
    x_ND = x_ND.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = mapped(x_ND, y_NC, 8, learning_rate=0.02).solve(5)
    assert_layer(solution, train(x_ND.double(), y_NC, 5, 8, lr=0.02))


def test_divergence_is_an_error():
    sgd = mapped(*problem(), 8, learning_rate=10.0)
    with pytest.raises(InputError, match="learning_rate=10.0 diverges within 1000 epochs"):
        sgd.solve(1000)


def test_unusable_settings_and_batches_are_named():
    for arguments, words in (
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be"),
        ({"learning_rate": 0.1, "momentum": -1.0}, "momentum=-1.0 must be"),
        ({"learning_rate": 0.1, "weight_decay": math.nan}, "weight_decay=nan must be"),
        ({"learning_rate": 0.1, "nesterov": True}, "nesterov=True needs momentum"),
    ):
        with pytest.raises(InputError, match=words):
            SGDMap(5, 3, **arguments)
    x_ND, y_NC = problem()
    sgd = mapped(x_ND, y_NC, 8, learning_rate=0.02)
    before = sgd.state_dict()
    spoiled_ND = x_ND.clone()
    spoiled_ND[4, 2] = math.nan
    for x, y, words in (
        (x_ND[:, :4], y_NC, r"features have shape \[37, 4\]"),
        (x_ND[:0], y_NC[:0], r"features have shape \[0, 5\]"),
        (x_ND, y_NC[:-1], r"targets have shape \[36, 3\]"),
        (spoiled_ND, y_NC, "row 41: .* finite"),
        (x_ND, y_NC / 0, "row 37: .* finite"),
        (x_ND, torch.full((37,), 3), "row 37: .* class from 0 to 2"),
    ):
        with pytest.raises(InputError, match=words):
            sgd.update(x, y)
    assert all(torch.equal(before[name], value) for name, value in sgd.state_dict().items())
    with pytest.raises(InputError, match="epochs=0 must be"):
        sgd.solve(0)
    with pytest.raises(InputError, match="in_features=5, out_features=3 and bias=True"):
        sgd.solve(5, nn.Linear(5, 2))
    with pytest.raises(InputError, match="rows=0"):
        SGDMap(5, 3, 0.1).solve(5)


# ---------------------------------------------------------------------------------------- the batch-aware formula

FORMULA = {"num_epochs": 50, "batch_size": 8, "learning_rate": 1e-2, "lambda_reg": 0.7}
TIMES = 37 // 8 * 1e-2 * 50


def test_the_formula_is_as_printed():
    x_ND, y_NC = problem()
    kernel_NN, identity_NN = x_ND @ x_ND.T, torch.eye(37, dtype=torch.float64)
    alpha_NC = compute_batch_aware_solution(kernel_NN, y_NC, **FORMULA)
    expected = torch.linalg.inv((kernel_NN + 0.7 * identity_NN) * TIMES + 0.7 * identity_NN) @ y_NC
    torch.testing.assert_close(alpha_NC, expected, rtol=EXACT, atol=EXACT)
    one_N = compute_batch_aware_solution(kernel_NN, y_NC[:, 0], **FORMULA)
    torch.testing.assert_close(one_N, expected[:, 0], rtol=EXACT, atol=EXACT)


def test_the_formula_is_a_ridge_divided_by_c():
    x_ND, y_NC = problem()
    kernel_NN, identity_NN = x_ND @ x_ND.T, torch.eye(37, dtype=torch.float64)
    alpha_NC = compute_batch_aware_solution(kernel_NN, y_NC, **FORMULA)
    ridge_NC = torch.linalg.solve(kernel_NN + 0.7 * (1 + 1 / TIMES) * identity_NN, y_NC)
    torch.testing.assert_close(alpha_NC, ridge_NC / TIMES, rtol=EXACT, atol=EXACT)


def test_more_epochs_shrink_the_formulas_predictions():
    x_ND, y_NC = problem()
    kernel_NN = x_ND @ x_ND.T
    sizes = [
        (kernel_NN @ compute_batch_aware_solution(kernel_NN, y_NC, **{**FORMULA, "num_epochs": epochs})).norm()
        for epochs in (5, 50, 500, 5000)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.02 * y_NC.norm()


def test_fewer_rows_than_a_batch_ignore_the_kernel():
    x_ND, y_NC = problem()
    settings = {**FORMULA, "batch_size": 38}
    for scale in (1.0, 100.0):
        alpha_NC = compute_batch_aware_solution(scale * x_ND @ x_ND.T, y_NC, **settings)
        torch.testing.assert_close(alpha_NC, y_NC / 0.7, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("batch_size", [8, 38])
@pytest.mark.parametrize("bias", [True, False])
def test_the_primal_formula_is_the_dual_one(bias, batch_size):
    x_ND, y_NC = problem()
    settings = {**FORMULA, "batch_size": batch_size}
    solution = batch_aware(statistics_of(x_ND, y_NC), **settings, fit_intercept=bias)
    mean_D, target_mean_C = (x_ND.mean(0), y_NC.mean(0)) if bias else (0.0, 0.0)
    centred_ND = x_ND - mean_D
    alpha_NC = compute_batch_aware_solution(centred_ND @ centred_ND.T, y_NC - target_mean_C, **settings)
    fitted_NC = centred_ND @ centred_ND.T @ alpha_NC + target_mean_C
    torch.testing.assert_close(solution.predict(x_ND), fitted_NC, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(solution.weight_CD, (centred_ND.T @ alpha_NC).T, rtol=EXACT, atol=EXACT)
    assert (solution.method, solution.regularization) == ("batch_aware", 0.7)


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        (torch.eye(4)[:3], {}, r"K has shape \[3, 4\]"),
        (torch.eye(3), {}, r"y has shape \[4\]"),
        (torch.eye(4).index_fill(0, torch.tensor([1]), math.nan), {}, "K and y must be finite"),
        (torch.eye(4) + torch.ones(4, 4).triu(1), {}, "K must be symmetric"),
        (torch.eye(4), {"lambda_reg": -1.0}, "lambda_reg=-1.0 must be"),
        (torch.eye(4), {"lambda_reg": 0.0, "batch_size": 5}, "lambda_reg=0.0 leaves a singular system"),
        (torch.zeros(4, 4), {"lambda_reg": 0.0, "batch_size": 2}, "lambda_reg=0.0 leaves a singular system"),
        (torch.eye(4), {"batch_size": 0}, "batch_size=0 must be"),
        (torch.eye(4), {"num_epochs": -1}, "num_epochs=-1.0 must be"),
        (torch.eye(4), {"learning_rate": 0.0}, "learning_rate=0.0 must be"),
    ],
)
def test_unusable_formula_input_is_named(kernel, changes, words):
    with pytest.raises(InputError, match=words):
        compute_batch_aware_solution(kernel, torch.ones(4), **{**FORMULA, **changes})


def test_the_primal_formula_needs_a_positive_lambda_and_rows():
    with pytest.raises(InputError, match="lambda_reg=0 must be above 0"):
        batch_aware(statistics_of(*problem()), **{**FORMULA, "lambda_reg": 0})
    with pytest.raises(InputError, match="rows=0"):
        batch_aware(RidgeStatistics(5, 3), **FORMULA)
