"""Kernel ridge regression against scikit-learn, refits row by row, and the direct Nystroem solution."""

import functools

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

import linpass.singlepass.kernel_ridge
from linpass.errors import InputError
from linpass.kernels_closed_form import linear, make_kernel, rbf
from linpass.singlepass.kernel_ridge import kernel_ridge, nystrom_conjugate_gradient

# Two float64 solutions of one system with a condition number up to 1e6.
SOLUTION = 1e-9
# Conjugate gradient stops at a residual of 1e-12; times the condition number of the preconditioned system, near 10.
ITERATED = 1e-8
KERNELS = ("linear", "rbf", "laplace", "polynomial", "arc_cosine", "deep")
kernel = functools.partial(rbf, bandwidth=2.0)


@pytest.fixture
def data():
    """60 rows of 5 features, 3 targets with an offset, positive weights."""
    x = torch.randn(60, 5, dtype=torch.float64)
    y = torch.stack((x[:, 0].sin(), x[:, 1] * x[:, 2], x.sum(1).cos()), 1) + 7
    return x, y + 0.1 * torch.randn(60, 3, dtype=torch.float64), 0.2 + torch.rand(60, dtype=torch.float64)


def close(actual, expected, tolerance=SOLUTION):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_to_kernel_ridge_of_scikit_learn(name, weighted, data):
    x, y, weights = data
    kernel = make_kernel(name)
    solution = kernel_ridge(kernel, x, y, 0.3, weights_N=weights if weighted else None, fit_intercept=False)
    reference = KernelRidge(alpha=0.3, kernel="precomputed")
    reference.fit(kernel(x, x).numpy(), y.numpy(), weights.numpy() if weighted else None)
    close(solution.dual_NC, reference.dual_coef_)
    assert torch.equal(solution.intercept_C, torch.zeros(3, dtype=torch.float64))
    close(solution.predict(kernel(x[:7], x)), reference.predict(kernel(x[:7], x).numpy()))


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_the_linear_kernel_is_ridge(fit_intercept, data):
    x, y, weights = data
    solution = kernel_ridge(linear, x, y, 0.3, weights_N=weights, fit_intercept=fit_intercept)
    reference = Ridge(alpha=0.3, fit_intercept=fit_intercept).fit(x.numpy(), y.numpy(), weights.numpy())
    close((x.T @ solution.dual_NC).T, reference.coef_)
    close(solution.intercept_C, torch.as_tensor(reference.intercept_) * torch.ones(3))


def test_an_offset_of_the_targets_is_the_intercepts(data):
    x, y, _ = data
    solution, moved = (kernel_ridge(kernel, x, targets, 0.1) for targets in (y, y + 100))
    close(moved.intercept_C, solution.intercept_C + 100)
    close(moved.dual_NC, solution.dual_NC)


def test_a_whole_weight_is_that_many_rows(data):
    x, y, _ = data
    counts = torch.randint(0, 4, (60,))
    solution = kernel_ridge(kernel, x, y, 0.1, weights_N=counts)
    repeated = kernel_ridge(kernel, x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0), 0.1)
    at = torch.randn(9, 5, dtype=torch.float64)
    close(solution.predict(kernel(at, x)), repeated.predict(kernel(at, x.repeat_interleave(counts, 0))))


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_leave_one_out_is_n_fits_without_one_row(fit_intercept, weighted, data):
    x, y, weights = (part[:20] for part in data)
    weights = weights if weighted else torch.ones(20, dtype=torch.float64)
    grid = [1e-3, 0.1, 10.0]
    options = {"fit_intercept": fit_intercept}
    chosen = kernel_ridge(kernel, x, y, "loo", weights_N=weights, grid=grid, **options)
    for value in grid:
        errors = []
        for row in range(20):
            rest = torch.arange(20) != row
            fitted = kernel_ridge(kernel, x[rest], y[rest], value, weights_N=weights[rest], **options)
            missed = y[row] - fitted.predict(kernel(x[row : row + 1], x[rest]))[0]
            errors.append(weights[row] * missed.square().sum())
        close(chosen.criterion[value], sum(errors) / weights.sum())
    assert chosen.regularization == min(grid, key=chosen.criterion.get)
    close(chosen.dual_NC, kernel_ridge(kernel, x, y, chosen.regularization, weights_N=weights, **options).dual_NC)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_gcv_is_its_definition(fit_intercept, data):
    x, y, _ = data
    chosen = kernel_ridge(kernel, x, y, "gcv", grid=[1e-3, 0.1, 10.0], fit_intercept=fit_intercept)
    for value, score in chosen.criterion.items():
        fitted = kernel_ridge(kernel, x, torch.eye(60), value, fit_intercept=fit_intercept)
        hat = fitted.predict(kernel(x, x))  # column j: the predictions for a target that is 1 in row j
        expected = 60 * (y - hat @ y).square().sum() / (60 - hat.trace()) ** 2
        close(score, expected)


def test_the_default_grid_brackets_the_best(data):
    x, y, _ = data
    for criterion in ("gcv", "loo"):
        chosen = kernel_ridge(kernel, x, y, criterion)
        grid = list(chosen.criterion)
        assert len(grid) == 40
        assert grid[0] < chosen.regularization < grid[-1]


def test_a_singular_kernel_matrix_needs_regularization(data):
    x, y, _ = data
    twice = torch.cat((x, x[:1]))
    with pytest.raises(InputError, match="regularization=0: the kernel matrix of 61 rows is singular"):
        kernel_ridge(kernel, twice, torch.cat((y, y[:1])), 0)
    with pytest.raises(InputError, match="singular"):
        kernel_ridge(linear, x, y, 0)
    interpolated = kernel_ridge(make_kernel("laplace"), x, y, 0)
    close(interpolated.predict(make_kernel("laplace")(x, x)), y)


def test_too_many_rows_are_refused_before_a_kernel_value_exists(data):
    def never(_x, _y):
        raise AssertionError

    x, y, _ = data
    with pytest.raises(InputError, match=r"60 rows: 2 matrices .* take 57,600 bytes, 50,000 are there"):
        kernel_ridge(never, x, y, 1.0, memory_limit=50_000)
    with pytest.raises(InputError, match="60 rows: 5 matrices"):
        kernel_ridge(never, x, y, "loo", memory_limit=60_000)
    # Without a limit of one's own it is the machine's memory.
    many = torch.zeros(1, 1).expand(3_000_000, 1)
    with pytest.raises(InputError, match="144,000,000,000,000 bytes"):
        kernel_ridge(never, many, many, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regularization": -1.0}, "regularization=-1.0 must be"),
        ({"regularization": float("nan")}, "regularization=nan must be"),
        ({"regularization": "best"}, "regularization='best'"),
        ({"grid": [1.0, -1.0], "regularization": "gcv"}, "regularization=-1.0 must be"),
        ({"features_ND": torch.zeros(0, 5)}, r"features have shape \[0, 5\]"),
        ({"targets_NC": torch.zeros(60)}, r"targets have shape \[60\]"),
        ({"features_ND": torch.zeros(60, 5).index_fill(0, torch.tensor(41), float("nan"))}, "features of row 41 hold"),
        ({"targets_NC": torch.zeros(60, 1).index_fill(0, torch.tensor(3), float("inf"))}, "targets of row 3 hold"),
        ({"weights_N": torch.linspace(-1, 1, 60)}, "weights go from -1 to 1"),
        ({"weights_N": torch.zeros(60)}, "weights go from 0 to 0"),
        ({"weights_N": torch.ones(59)}, r"weights have shape \[59\]"),
    ],
)
def test_bad_input_is_named(change, words, data):
    x, y, _ = data
    with pytest.raises(InputError, match=words):
        kernel_ridge(kernel, **{"features_ND": x, "targets_NC": y, "regularization": 1.0, **change})


def direct_nystrom(x, y, landmarks, value, weights, fit_intercept, at):
    """Predictions at new rows of ridge regression on Nystroem features, from the whole matrices."""
    values, vectors = torch.linalg.eigh(kernel(landmarks, landmarks))
    kept = values > 1e-13 * values[-1]
    whitening = vectors[:, kept] / values[kept].sqrt()
    model = Ridge(alpha=value, fit_intercept=fit_intercept, solver="cholesky")
    model.fit((kernel(x, landmarks) @ whitening).numpy(), y.numpy(), weights.numpy())
    return torch.from_numpy(model.predict((kernel(at, landmarks) @ whitening).numpy())).reshape(len(at), -1)


@pytest.mark.parametrize("value", [1e-3, 1.0])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_conjugate_gradient_reaches_the_direct_nystrom_solution(value, fit_intercept, weighted, data):
    x, y, weights = data
    weights = weights if weighted else torch.ones(60, dtype=torch.float64)
    landmarks, at = x[::3], torch.randn(9, 5, dtype=torch.float64)
    solution = nystrom_conjugate_gradient(
        kernel, x, y, landmarks, value, weights_N=weights, fit_intercept=fit_intercept, tolerance=1e-12, block_rows=7
    )
    assert 0 < solution.iterations < 60
    assert 0 < solution.residual < 1e-11
    expected = direct_nystrom(x, y, landmarks, value, weights, fit_intercept, at)
    close(solution.predict(kernel(at, landmarks)), expected, ITERATED)


def test_all_rows_as_landmarks_are_exact_kernel_ridge(data):
    x, y, weights = data
    at = torch.randn(9, 5, dtype=torch.float64)
    iterated = nystrom_conjugate_gradient(kernel, x, y, x, 0.1, weights_N=weights, tolerance=1e-12)
    exact = kernel_ridge(kernel, x, y, 0.1, weights_N=weights)
    close(iterated.predict(kernel(at, x)), exact.predict(kernel(at, x)), ITERATED)


def test_equal_landmarks_and_a_constant_target_do_no_harm(data):
    x, y, weights = data
    landmarks, at = x[::3], torch.randn(9, 5, dtype=torch.float64)
    y = torch.cat((y, torch.full((60, 1), 4.0, dtype=torch.float64)), 1)
    once, twice = (
        nystrom_conjugate_gradient(kernel, x, y, some, 0.1, weights_N=weights, tolerance=1e-12).predict(
            kernel(at, some)
        )
        for some in (landmarks, torch.cat((landmarks, landmarks)))
    )
    close(once, twice, ITERATED)
    close(once[:, 3], torch.full((9,), 4.0), ITERATED)


def test_blocks_bound_the_kernel_values_and_change_nothing(data):
    x, y, _ = data
    largest = []

    def counted(a, b):
        largest.append(len(a))
        return kernel(a, b)

    whole, blocks = (
        nystrom_conjugate_gradient(counted, x, y, x[:10], 0.1, tolerance=1e-12, block_rows=rows) for rows in (60, 16)
    )
    assert 60 in largest
    largest.clear()
    nystrom_conjugate_gradient(counted, x, y, x[:10], 0.1, block_rows=16)
    assert max(largest) == 16
    close(whole.dual_NC, blocks.dual_NC, ITERATED)
    assert whole.iterations == blocks.iterations


def test_the_preconditioner_saves_nine_iterations_of_ten(monkeypatch):
    x = torch.randn(600, 3, dtype=torch.float64)
    y, landmarks = x.sin().sum(1, keepdim=True), x[::5]

    def iterations(most):
        return nystrom_conjugate_gradient(kernel, x, y, landmarks, 3.0, iterations=most).iterations

    ours = iterations(15)
    nothing = lambda matrix, *_: torch.eye(len(matrix), dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(linpass.singlepass.kernel_ridge, "_preconditioner", nothing)
    with pytest.raises(InputError, match=f"iterations={10 * ours}: the residual"):
        iterations(10 * ours)


def test_an_intercept_costs_no_iterations():
    x = torch.randn(600, 3, dtype=torch.float64)
    y = x.sin().sum(1, keepdim=True)
    with_one, without = (
        nystrom_conjugate_gradient(kernel, x, y, x[::5], 0.3, fit_intercept=fit_intercept).iterations
        for fit_intercept in (True, False)
    )
    assert with_one <= without + 2  # a preconditioner that is not centred takes half as many more


def test_no_convergence_is_said(data):
    x, y, _ = data
    with pytest.raises(InputError, match=r"iterations=2: the residual is \d.*, tolerance=1e-12 was asked for"):
        nystrom_conjugate_gradient(kernel, x, y, x[:10], 0.1, iterations=2, tolerance=1e-12)
    with pytest.raises(InputError, match="regularization=0"):
        nystrom_conjugate_gradient(kernel, x, y, x[:10], 0)
    with pytest.raises(InputError, match=r"landmarks have shape \[10, 4\]"):
        nystrom_conjugate_gradient(kernel, x, y, x[:10, :4], 1.0)
