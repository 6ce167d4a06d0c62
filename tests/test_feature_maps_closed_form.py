"""Kernels against scikit-learn, closed forms and Monte Carlo; feature maps against the kernels that they stand for."""

import math

import pytest
import torch
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics import pairwise
from torch.func import jacrev

from linpass import feature_maps_closed_form
from linpass.feature_maps_closed_form import KernelFeatures, RandomFeatures, median_distance
from linpass.kernels_closed_form import arc_cosine, deep, laplace, linear, make_kernel, polynomial, rbf

# Sums of some ten products in float64.
EXACT = 1e-12
# K^{-1/2} of a kernel matrix with eigenvalues down to 1e-5: rounding times the inverse of the smallest.
WHITENED = 1e-9
KERNELS = ("linear", "rbf", "laplace", "polynomial", "arc_cosine", "deep")


@pytest.fixture
def rows():
    return torch.randn(30, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)


def close(actual, expected, tolerance=EXACT):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        (linear, pairwise.linear_kernel),
        (lambda x, y: rbf(x, y, bandwidth=1.7), lambda x, y: pairwise.rbf_kernel(x, y, gamma=1 / (2 * 1.7**2))),
        (lambda x, y: laplace(x, y, bandwidth=1.7), lambda x, y: pairwise.laplacian_kernel(x, y, gamma=1 / 1.7)),
        (
            lambda x, y: polynomial(x, y, degree=3, scale=0.3, offset=1.5),
            lambda x, y: pairwise.polynomial_kernel(x, y, degree=3, gamma=0.3, coef0=1.5),
        ),
    ],
    ids=["linear", "rbf", "laplace", "polynomial"],
)
def test_kernels_equal_those_of_scikit_learn(kernel, reference, rows):
    x, y = rows
    close(kernel(x, y), reference(x.numpy(), y.numpy()))
    close(kernel(x, x), reference(x.numpy(), x.numpy()))


def arc_cosine_by_pair(x, y, order):
    """Cho and Saul 2009, section 2, one pair at a time."""
    out = torch.empty(len(x), len(y), dtype=torch.float64)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            product = math.sqrt(a @ a) * math.sqrt(b @ b)
            angle = math.acos(max(-1, min(1, float(a @ b) / product)))
            cosine = math.cos(angle)
            out[i, j] = [math.pi - angle, product * (math.sin(angle) + (math.pi - angle) * cosine)][order] / math.pi
    return out


@pytest.mark.parametrize("order", [0, 1])
def test_arc_cosine_is_its_closed_form(order, rows):
    x, y = rows
    close(arc_cosine(x, y, order), arc_cosine_by_pair(x, y, order))
    # The angle to oneself: order 0 cannot be told better than sqrt(eps), as its docstring says.
    itself = arc_cosine(x, x, order).diagonal()
    close(itself, x.square().sum(1) if order else torch.ones(len(x)), EXACT if order else 1e-8)


@pytest.mark.parametrize("order", [0, 1])
def test_arc_cosine_is_the_expectation_over_units(order, rows):
    x, y = rows[0][:4], rows[1][:3]
    units = torch.randn(400_000, 7, dtype=torch.float64)
    unit = [lambda z: (z > 0).double(), lambda z: z.relu()][order]
    samples = 2 * unit(x @ units.T)[:, None] * unit(y @ units.T)[None]
    standard_error = samples.std(-1) / len(units) ** 0.5
    assert ((samples.mean(-1) - arc_cosine(x, y, order)).abs() < 4.5 * standard_error).all()


def test_deep_is_the_composition(rows):
    x, y = rows
    assert torch.equal(deep(x, y, depth=1), arc_cosine(x, y, order=1))
    both = torch.cat((x, y))
    kernel = both @ both.T
    for depth in (1, 2, 3):
        # Cho and Saul 2009: the next layer sees the kernel of this one as its dot products.
        norms = kernel.diagonal().sqrt()
        angle = torch.acos((kernel / norms[:, None] / norms).clamp(-1, 1))
        kernel = norms[:, None] * norms * (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi
        close(deep(x, y, depth), kernel[: len(x), len(x) :])
    assert torch.equal(deep(x, y, 3), deep(x, y, 3))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_symmetric_and_positive_semi_definite(name, rows):
    kernel = make_kernel(name)(rows[0], rows[0])
    close(kernel, kernel.T)
    values = torch.linalg.eigvalsh(kernel)
    assert values[0] > -1e-12 * values[-1]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_opposite_and_zero_rows_are_safe(name, dtype):
    row = torch.randn(5, dtype=dtype)
    x = torch.stack((row, row, -row, torch.zeros(5, dtype=dtype), 1e-30 * row)).requires_grad_()
    kernel = make_kernel(name)(x, x)
    kernel.sum().backward()
    assert kernel.isfinite().all()
    assert x.grad.isfinite().all()


def test_moving_all_rows_changes_no_distance():
    x, y = torch.randn(20, 6) + 1e3, torch.randn(9, 6) + 1e3
    # float32 products of rows of norm 2e3 would be wrong by whole units; those of centred rows are not.
    close(rbf(x, y), rbf(x.double(), y.double()), 1e-5)
    assert (rbf(100 * x, 100 * x) <= 1).all()  # no distance below 0, however the products round


@pytest.mark.parametrize("kind", ["relu", "rff"])
def test_products_of_random_features_approach_the_kernel(kind, rows):
    x, y = rows
    one = torch.ones(len(x) + len(y), 1, dtype=torch.float64)
    extended = torch.cat((torch.cat(rows) / 1.7, one), 1)
    exact = rbf(x, y, 1.7) if kind == "rff" else arc_cosine(extended[: len(x)], extended[len(x) :])

    def error(num_features):
        maps = [RandomFeatures(kind, 7, num_features, bandwidth=1.7, seed=seed).double() for seed in range(8)]
        errors = torch.stack([features(x) @ features(y).T - exact for features in maps])
        assert errors.mean().abs() < 0.1 * exact.abs().mean()
        return errors.square().mean().sqrt()

    coarse, fine = error(256), error(4096)
    assert 3 < coarse / fine < 5.3  # 1/sqrt(F) gives 4
    assert fine < 0.02 * exact.abs().max()


def test_cosine_and_sine_and_orthogonal_rows_err_less(rows):
    x, y = rows
    exact = rbf(x, y, 3.0)
    ours, phases, free = [], [], []
    for seed in range(40):
        features = RandomFeatures("rff", 7, 64, bandwidth=3.0, seed=seed).double()
        ours.append(features(x) @ features(y).T - exact)
        weight, phase = torch.randn(64, 7, dtype=torch.float64), 2 * math.pi * torch.rand(64, dtype=torch.float64)
        angles = [rows / 3.0 @ weight.T for rows in (x, y)]
        phases.append(2 / 64 * (angles[0] + phase).cos() @ (angles[1] + phase).cos().T - exact)
        angles = [angle[:, :32] for angle in angles]
        free.append(
            2 / 64 * (angles[0].cos() @ angles[1].cos().T + angles[0].sin() @ angles[1].sin().T) - exact,
        )
    ours, phases, free = (torch.stack(errors).square().mean() for errors in (ours, phases, free))
    assert ours < 0.9 * free < 0.9 * phases


@pytest.mark.parametrize("kind", ["relu", "rff"])
def test_a_seed_is_one_map(kind):
    first, again = (RandomFeatures(kind, 7, 20, seed=3) for _ in range(2))
    other = RandomFeatures(kind, 7, 20, seed=4)
    x = torch.randn(5, 7)
    assert torch.equal(first(x), again(x))
    assert not torch.allclose(first(x), other(x))
    assert torch.equal(other.fit(x, seed=3).weight, first.weight)
    assert first(x).shape == (5, 20)


def test_the_bandwidth_is_measured_on_the_rows(rows):
    x = 5 * rows[0]
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    for p in (1, 2):
        distances = torch.stack([(x[i] - x[j]).norm(p) for i, j in pairs])
        close(median_distance(x, p, seed=0), distances.median())
    assert RandomFeatures("rff", 7, 8).fit(x).bandwidth.item() == pytest.approx(median_distance(x, 2, 0).item(), 1e-6)
    assert RandomFeatures("relu", 7, 8).fit(x).bandwidth.item() == pytest.approx(x.norm().item() / 30**0.5, 1e-6)
    for kernel, p in (("rbf", 2), ("laplace", 1)):
        features = KernelFeatures(kernel, 7, 10, whiten=True).double().fit(x)
        close(features.bandwidth, median_distance(x, p, 0))
    assert KernelFeatures("polynomial", 7, 10, whiten=True).fit(x).bandwidth == 1
    for features in (RandomFeatures("rff", 7, 8, bandwidth=2.5), RandomFeatures("relu", 7, 8, bandwidth=2.5)):
        assert features.fit(x).bandwidth == 2.5
    # Rows that are mostly, or all, the same.
    few = torch.zeros(50, 2)
    assert median_distance(few, 2, 0) == 1
    few[0] = 1
    assert median_distance(few, 2, 0) == pytest.approx(2**0.5 * 49 / (25 * 49))
    assert median_distance(few[:1], 2, 0) == 1


@pytest.mark.parametrize("name", KERNELS)
def test_nystrom_is_the_kernel_on_its_landmarks_and_their_span_elsewhere(name, rows):
    x, y = rows
    features = KernelFeatures(name, 7, 20, whiten=True).double().fit(x)
    landmarks = features.landmarks
    close(features(landmarks) @ features(landmarks).T, features.kernel(landmarks, landmarks), WHITENED)
    between = features.kernel(y, landmarks)
    span = between @ torch.linalg.pinv(features.kernel(landmarks, landmarks), rtol=1e-13, hermitian=True) @ between.T
    close(features(y) @ features(y).T, span, WHITENED)


def test_nystrom_equals_that_of_scikit_learn(rows):
    x, y = rows
    features = KernelFeatures("rbf", 7, len(x), whiten=True, bandwidth=2.0).double().fit(x)
    reference = Nystroem(kernel="rbf", gamma=1 / 8, n_components=len(x), random_state=0).fit(x.numpy())
    other = torch.from_numpy(reference.transform(y.numpy()))
    close(features(y) @ features(y).T, other @ other.T, WHITENED)


def test_float32_does_not_blow_up_what_it_rounds_away():
    x = torch.randn(300, 2)  # eigenvalues fall below 1e-7 of the largest within a few dozen
    features = KernelFeatures("rbf", 2, 200, whiten=True).fit(x)
    assert torch.linalg.eigvalsh(features.kernel(*[features.landmarks.double()] * 2))[0] < 1e-12
    single = features(x)
    features = features.double()
    close(single, features(x.double()), 1e-3)
    landmarks = features.landmarks
    close(features(landmarks) @ features(landmarks).T, features.kernel(landmarks, landmarks), 1e-4)


def test_equal_landmarks_do_no_harm():
    x = torch.randn(5, 3, dtype=torch.float64).repeat(4, 1)
    features = KernelFeatures("rbf", 3, 20, whiten=True).double().fit(x)
    close(features(x) @ features(x).T, features.kernel(x, x), WHITENED)


def test_landmarks_are_drawn_without_replacement(rows):
    x = rows[0]
    features = KernelFeatures("rbf", 7, 12, whiten=False).double().fit(x)
    places = [int((x == landmark).all(1).nonzero()) for landmark in features.landmarks]
    assert len(set(places)) == 12
    assert places != list(range(12))
    assert not torch.equal(features.landmarks.clone(), features.fit(x, seed=1).landmarks)
    assert torch.equal(KernelFeatures("rbf", 7, 30, whiten=False).double().fit(x).landmarks, x)


@pytest.mark.parametrize("whiten", [True, False])
def test_blocks_change_nothing(whiten, rows, monkeypatch):
    features = KernelFeatures("laplace", 7, 10, whiten=whiten).double().fit(rows[0])
    whole, largest = features(rows[0]), []
    monkeypatch.setattr(feature_maps_closed_form, "VALUES_PER_BLOCK", 40)
    monkeypatch.setattr(features, "kernel", lambda x, y: largest.append(len(x)) or laplace(x, y, features.bandwidth))
    assert torch.allclose(features(rows[0]), whole, rtol=0, atol=1e-14)
    assert max(largest) == 4
    assert features(rows[0][:0]).shape == (0, 10)


@pytest.mark.parametrize("whiten", [True, False])
def test_a_dual_becomes_the_weight_of_a_linear_layer(whiten, rows):
    x, y = rows
    features = KernelFeatures("rbf", 7, 20, whiten=whiten).double().fit(x)
    dual = torch.randn(20, 3, dtype=torch.float64)
    close(features(y) @ features.weight_from_dual(dual).T, features.kernel(y, features.landmarks) @ dual, WHITENED)


@pytest.mark.parametrize(
    "features",
    [
        RandomFeatures("relu", 7, 6),
        RandomFeatures("rff", 7, 6),
        *(KernelFeatures(name, 7, 6, whiten=True) for name in KERNELS),
    ],
    ids=lambda features: getattr(features, "kernel_name", getattr(features, "kind", None)),
)
def test_gradients_flow_to_the_rows(features, rows):
    features = features.double().fit(rows[0])
    assert torch.autograd.gradcheck(features, rows[1][:2].clone().requires_grad_())
    assert jacrev(features)(rows[1][:1]).isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomFeatures("fourier", 7, 8), "kind='fourier'"),
        (lambda: RandomFeatures("rff", 7, 9), "num_features=9 must be even"),
        (lambda: KernelFeatures("gauss", 7, 8, whiten=True), "kernel='gauss'"),
        (lambda: KernelFeatures("rbf", 7, 8, whiten=True).fit(torch.ones(7, 7)), "7 rows cannot give 8 landmarks"),
        (lambda: KernelFeatures("rbf", 7, 2, whiten=True).fit(torch.ones(7, 6)), r"\[7, 6\]"),
        (lambda: RandomFeatures("rff", 7, 8).fit(torch.ones(0, 7)), r"\[0, 7\]"),
        (lambda: RandomFeatures("relu", 1, 8).fit(torch.tensor([[1.0], [math.nan]])), "row 1 holds NaN"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
