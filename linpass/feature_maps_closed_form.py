r"""Feature maps: what stands between a pooled row and the linear layer of a closed-form head.

A module with buffers (they travel in safetensors) that turns rows [N, D] into features [N, F]:

- :class:`RandomFeatures`: F random features whose products approximate a kernel; drawn before any data is seen.
- :class:`KernelFeatures`: the kernel against M landmarks, whitened (Nystroem) or plain (the dual form, M = all rows).

Shapes: N, M rows (M of them landmarks), D width of a row, F features, C targets.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels_closed_form import make_kernel

# Kernel values that exist at one time, 67 MB in float32.
VALUES_PER_BLOCK = 2**24
# Rows whose pairwise distances give the bandwidth: half a million pairs, the median is good to a percent.
ROWS_FOR_BANDWIDTH = 1000


class RandomFeatures(nn.Module):
    r"""Random features whose products have a kernel as their expectation: a non-linear head from one pass.

    ``relu``: :math:`\phi(x) = \sqrt{2/F}\,\mathrm{relu}(W x / b + c)` with :math:`W, c \sim N(0, 1)`, so that
    :math:`\mathbb{E}[\phi(x)\phi(y)]` is the arc-cosine kernel of order 1 of the rows :math:`(x / b, 1)`.
    ``rff``: :math:`\phi(x) = \sqrt{2/F}\,[\cos(W x / b), \sin(W x / b)]` with F/2 rows in W; the expectation is
    the kernel rbf with bandwidth b. Pairs of cosine and sine have a lower variance than cosines with a random phase.

    The rows of W are orthogonal within each block of as many rows as columns, which keeps the expectation and lowers
    the variance. Sources: Cho and Saul 2009, "Kernel Methods for Deep Learning", section 2; Rahimi and Recht 2007,
    "Random Features for Large-Scale Kernel Machines", section 3; Sutherland and Schneider 2015, "On the Error of Random
    Fourier Features" (the pairs); Yu et al. 2016, "Orthogonal Random Features", section 3.

    Args:
        kind: "relu" or "rff".
        num_features: F, even for "rff".
        bandwidth: b. None: :meth:`fit` measures it, 1 until then.
        seed: of W and c; one seed gives the same features on every device.
    Cost: O(N·F·D) time, O(F·D) memory.
    Invariants: products approach the kernel as 1/sqrt(F); a seed gives one map; orthogonal rows err less.
    """

    weight: Tensor
    bias: Tensor | None
    bandwidth: Tensor

    def __init__(self, kind: str, in_features: int, num_features: int, bandwidth: float | None = None, seed: int = 0):
        super().__init__()
        if kind not in ("relu", "rff"):
            raise ValueError(f"kind={kind!r} must be relu or rff")
        if kind == "rff" and num_features % 2:
            raise ValueError(f"num_features={num_features} must be even for rff: a cosine and a sine per frequency")
        self.kind, self.in_features, self.num_features, self.seed = kind, in_features, num_features, seed
        self.fixed_bandwidth = bandwidth
        directions = num_features if kind == "relu" else num_features // 2
        self.register_buffer("weight", torch.empty(directions, in_features))
        self.register_buffer("bias", torch.empty(directions) if kind == "relu" else None)
        self.register_buffer("bandwidth", torch.empty(()))
        _fill(self, self.initial_buffers())

    def initial_buffers(self, seed: int | None = None) -> dict[str, Tensor]:
        """The buffers of a map that has seen no rows, in float64 on the CPU."""
        generator = torch.Generator("cpu").manual_seed(self.seed if seed is None else seed)
        columns = self.in_features + (self.kind == "relu")
        drawn = _orthogonal_gaussian(self.weight.shape[0], columns, generator)
        buffers = {"weight": drawn[:, : self.in_features], "bandwidth": _as_scalar(self.fixed_bandwidth)}
        return buffers | ({"bias": drawn[:, -1]} if self.kind == "relu" else {})

    def fit(self, rows_ND: Tensor, seed: int | None = None) -> "RandomFeatures":
        """Draw W and c from ``seed`` (None: the map's) and, unless the bandwidth was given, measure it on the rows.

        relu: the root mean square of the norms, so that a row weighs as much as the constant beside it. rff: the median
        distance between rows.

        Raises:
            ValueError: rows of another width, none, or not finite.
        """
        _check_rows(rows_ND, self.in_features)
        buffers = self.initial_buffers(seed)
        if self.fixed_bandwidth is None:
            rows_ND = rows_ND.detach().double()
            if self.kind == "rff":
                buffers["bandwidth"] = median_distance(rows_ND, 2, self.seed if seed is None else seed)
            else:
                buffers["bandwidth"] = _positive_or_one(rows_ND.square().sum(1).mean().sqrt())
        return _fill(self, buffers)

    def forward(self, rows_ND: Tensor) -> Tensor:
        angles_NF = F.linear(rows_ND / self.bandwidth, self.weight, self.bias)
        scale = (2 / self.num_features) ** 0.5
        if self.kind == "relu":
            return scale * angles_NF.relu()
        return scale * torch.cat((angles_NF.cos(), angles_NF.sin()), 1)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, num_features={self.num_features}, seed={self.seed}"


class KernelFeatures(nn.Module):
    r"""The kernel against M landmarks: :math:`\phi(x) = k(x, L)\,W`.

    Whitened, :math:`W = K_{LL}^{-1/2}` (Nystroem): :math:`\phi(x) \cdot \phi(y)` is k on the landmarks and its best
    approximation from their span elsewhere. Eigenvalues of :math:`K_{LL}` below eps (of the buffers' dtype) times the
    largest are left out: what float32 rounds away must not be blown up by its inverse square root. Plain, W = I: a
    linear layer on it is the dual form of kernel ridge regression when the landmarks are the training rows.

    Source: Williams and Seeger 2001, "Using the Nystroem Method to Speed Up Kernel Machines"; scikit-learn's
    ``Nystroem`` is the same map.

    Args:
        kernel: name and parameters as :func:`make_kernel` takes them.
        bandwidth: of rbf and laplace. None: :meth:`fit` measures it, 1 until then.
    Cost: O(N·M·(D + M)) whitened, O(N·M·D) plain; beside the features, VALUES_PER_BLOCK kernel values at a time.
    Invariants: whitened, products are exact on the landmarks; blocks change nothing.
    """

    landmarks: Tensor
    whitening: Tensor | None
    bandwidth: Tensor

    def __init__(
        self,
        kernel: str,
        in_features: int,
        num_landmarks: int,
        *,
        whiten: bool,
        bandwidth: float | None = None,
        seed: int = 0,
        **parameters: float | int,
    ):
        super().__init__()
        make_kernel(kernel, **parameters)  # type: ignore[arg-type]
        self.kernel_name, self.kernel_parameters, self.seed = kernel, parameters, seed
        self.fixed_bandwidth = bandwidth
        self.register_buffer("landmarks", torch.empty(num_landmarks, in_features))
        self.register_buffer("whitening", torch.empty(num_landmarks, num_landmarks) if whiten else None)
        self.register_buffer("bandwidth", torch.empty(()))
        _fill(self, self.initial_buffers())

    def initial_buffers(self) -> dict[str, Tensor]:
        """The buffers of a map that has seen no rows: nothing but zeros for features."""
        buffers = {"landmarks": torch.zeros(self.landmarks.shape), "bandwidth": _as_scalar(self.fixed_bandwidth)}
        return buffers | ({} if self.whitening is None else {"whitening": torch.zeros(self.whitening.shape)})

    def fit(self, rows_ND: Tensor, seed: int | None = None) -> "KernelFeatures":
        """Measure the bandwidth (rbf, laplace: the median distance), draw landmarks without replacement, whiten.

        As many rows as landmarks are all taken, in their order. Float64 inside.

        Raises:
            ValueError: rows of another width, not finite, or fewer than landmarks.
        """
        landmarks, width = self.landmarks.shape
        _check_rows(rows_ND, width)
        if len(rows_ND) < landmarks:
            raise ValueError(f"{len(rows_ND)} rows cannot give {landmarks} landmarks: num_features is at most the rows")
        seed = self.seed if seed is None else seed
        chosen = torch.randperm(len(rows_ND), generator=torch.Generator("cpu").manual_seed(seed))[:landmarks]
        rows_ND = rows_ND.detach()
        buffers = {"landmarks": rows_ND[chosen.sort().values.to(rows_ND.device)]}
        if self.fixed_bandwidth is None and self.kernel_name in ("rbf", "laplace"):
            buffers["bandwidth"] = median_distance(rows_ND, 1 if self.kernel_name == "laplace" else 2, seed)
        _fill(self, buffers)
        if self.whitening is not None:
            _fill(self, {"whitening": self._landmark_kernel_power(-0.5)})
        return self

    def kernel(self, x_ND: Tensor, y_MD: Tensor) -> Tensor:
        """The kernel with this map's bandwidth and parameters, [N, M]."""
        return make_kernel(self.kernel_name, bandwidth=self.bandwidth, **self.kernel_parameters)(x_ND, y_MD)  # type: ignore[arg-type]

    def weight_from_dual(self, dual_MC: Tensor) -> Tensor:
        r"""Weight [C, M] of a linear layer on these features that predicts :math:`k(x, L)\,\alpha`.

        Plain: the transposed dual. Whitened: :math:`\alpha^\top K_{LL}^{1/2}`, up to the eigenvalues left out.
        """
        if self.whitening is None:
            return dual_MC.T
        return dual_MC.double().T @ self._landmark_kernel_power(0.5)

    def forward(self, rows_ND: Tensor) -> Tensor:
        block = max(1, VALUES_PER_BLOCK // len(self.landmarks))
        return torch.cat([self._features(rows) for rows in rows_ND.split(block)])

    def _features(self, rows_ND: Tensor) -> Tensor:
        kernel_NM = self.kernel(rows_ND, self.landmarks)
        return kernel_NM if self.whitening is None else kernel_NM @ self.whitening

    def _landmark_kernel_power(self, power: float) -> Tensor:
        """K_LL to a power, in float64, without the eigenvalues that are left out."""
        # Of the landmarks as they are stored: those that were rounded are another kernel matrix.
        landmarks_MD = self.landmarks.double()
        values_M, vectors_MM = torch.linalg.eigh(self.kernel(landmarks_MD, landmarks_MD))
        kept_M = values_M > torch.finfo(self.landmarks.dtype).eps * values_M[-1]
        vectors_MM, values_M = vectors_MM[:, kept_M], values_M[kept_M]
        return (vectors_MM * values_M**power) @ vectors_MM.T

    def extra_repr(self) -> str:
        landmarks, width = self.landmarks.shape
        form = "plain" if self.whitening is None else "whitened"
        return f"{self.kernel_name} {self.kernel_parameters}, in_features={width}, landmarks={landmarks}, {form}"


def median_distance(rows_ND: Tensor, p: int, seed: int) -> Tensor:
    """Median distance (norm ``p``) between up to ROWS_FOR_BANDWIDTH random rows; their mean, else 1, where it is 0."""
    chosen = torch.randperm(len(rows_ND), generator=torch.Generator("cpu").manual_seed(seed))[:ROWS_FOR_BANDWIDTH]
    distances = F.pdist(rows_ND[chosen.to(rows_ND.device)].double(), p)
    if not len(distances):
        return _as_scalar(None)
    median = distances.median()
    return median if median > 0 else _positive_or_one(distances.mean())


def _orthogonal_gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns]; each row is N(0, I), and the rows of one block of ``columns`` are orthogonal."""
    blocks = []
    for _ in range(0, rows, columns):
        first, second = torch.randn(2, columns, columns, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(first)
        q = q * r.diagonal().sign()  # without this Q would not be uniform over the rotations
        blocks.append(q * second.norm(dim=1, keepdim=True))
    return torch.cat(blocks)[:rows]


@torch.no_grad()
def _fill(feature_map, buffers: dict[str, Tensor]):
    """Copy values into the buffers, in their dtype and on their device; on the meta device there is nothing to fill."""
    for name, value in buffers.items():
        getattr(feature_map, name).copy_(value)
    return feature_map


def _as_scalar(value: float | None) -> Tensor:
    return torch.tensor(1.0 if value is None else value, dtype=torch.float64, device="cpu")


def _positive_or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))


def _check_rows(rows_ND: Tensor, width: int) -> None:
    if rows_ND.dim() != 2 or rows_ND.shape[1] != width or not len(rows_ND):
        raise ValueError(
            f"rows have shape {list(rows_ND.shape)}; this feature map takes [rows, {width}], one row or more"
        )
    finite_N = rows_ND.isfinite().all(1)
    if not finite_N.all():
        raise ValueError(f"row {int(finite_N.int().argmin())} holds NaN or infinity; features must be finite")
