r"""Kernels k(x_ND, y_MD) -> [N, M] of closed-form heads: functions of two sets of rows, any floating dtype.

Shapes: N and M rows of D features.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]


def linear(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    r""":math:`x \cdot y`."""
    return x_ND @ y_MD.T


def rbf(x_ND: Tensor, y_MD: Tensor, bandwidth: float | Tensor = 1.0) -> Tensor:
    r""":math:`\exp(-\|x - y\|^2 / (2 b^2))`; scikit-learn's ``gamma`` is :math:`1 / (2 b^2)`.

    Invariants: moving all rows by one vector changes nothing, also in float32; gradients are finite where x = y.
    """
    centre_D = y_MD.mean(0)  # distances do not change, but the cancellation below is that of centred rows
    x_ND, y_MD = (x_ND - centre_D) / bandwidth, (y_MD - centre_D) / bandwidth
    squares_NM = x_ND.square().sum(1)[:, None] + y_MD.square().sum(1) - 2 * x_ND @ y_MD.T
    return torch.exp(squares_NM.clamp(min=0) / -2)


def laplace(x_ND: Tensor, y_MD: Tensor, bandwidth: float | Tensor = 1.0) -> Tensor:
    r""":math:`\exp(-\|x - y\|_1 / b)`; scikit-learn's ``gamma`` is :math:`1 / b`.

    Cost: O(N·M·D) time without a matrix product, O(N·M) memory.
    """
    return torch.exp(-torch.cdist(x_ND, y_MD, p=1) / bandwidth)


def polynomial(x_ND: Tensor, y_MD: Tensor, degree: int = 3, scale: float = 1.0, offset: float = 1.0) -> Tensor:
    r""":math:`(s\, x \cdot y + o)^d`; scikit-learn's ``gamma`` and ``coef0``."""
    return (scale * (x_ND @ y_MD.T) + offset) ** degree


def arc_cosine(x_ND: Tensor, y_MD: Tensor, order: int = 1) -> Tensor:
    r"""What an infinitely wide layer of step (order 0) or ReLU (order 1) units sees of two rows.

    .. math::
        k_n(x, y) = 2\,\mathbb{E}_{w \sim N(0, I)}\big[\Theta(w x)\Theta(w y)(w x)^n (w y)^n\big]
                  = \tfrac1\pi \|x\|^n \|y\|^n J_n(\theta), \quad J_0 = \pi - \theta,
                    J_1 = \sin\theta + (\pi - \theta)\cos\theta

    Source: Cho and Saul 2009, "Kernel Methods for Deep Learning", section 2.
    A zero row is orthogonal to every row. Accuracy: cosines stop at 1 - eps, so that gradients stay finite where x = y;
    order 1 loses nothing by that, order 0 is sqrt(2 eps) / pi below 1 there (7e-9 in float64, 2e-4 in float32).
    """
    cosine_NM, norms_NM = _cosines(x_ND, y_MD)
    return norms_NM**order * _arc(cosine_NM, order)


def deep(x_ND: Tensor, y_MD: Tensor, depth: int = 2) -> Tensor:
    r"""``depth`` infinitely wide ReLU layers without biases: the arc-cosine kernel of order 1, composed.

    .. math::  k_l(x, y) = \|x\| \|y\|\, c_l, \quad c_l = J_1(\arccos c_{l-1}) / \pi, \quad c_0 = \cos\angle(x, y)

    Source: Cho and Saul 2009, section 2. Norms are kept from layer to layer, so only the cosine is composed; with
    depth all cosines go to 1. Invariants: depth 1 is :func:`arc_cosine`; equal calls are equal.
    """
    cosine_NM, norms_NM = _cosines(x_ND, y_MD)
    for _ in range(depth):
        cosine_NM = _arc(cosine_NM, 1)
    return norms_NM * cosine_NM


def _cosines(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of the angle and product of the norms of each pair."""
    tiny = torch.finfo(x_ND.dtype).tiny ** 0.5
    x_norm_N1, y_norm_M1 = (rows.norm(dim=1, keepdim=True) for rows in (x_ND, y_MD))
    cosine_NM = (x_ND / x_norm_N1.clamp(min=tiny)) @ (y_MD / y_norm_M1.clamp(min=tiny)).T
    return cosine_NM, x_norm_N1 * y_norm_M1.T


def _arc(cosine_NM: Tensor, order: int) -> Tensor:
    """J_n(θ) / π of the cosine of θ."""
    eps = torch.finfo(cosine_NM.dtype).eps
    cosine_NM = cosine_NM.clamp(-1 + eps, 1 - eps)
    share_NM = 1 - torch.acos(cosine_NM) / math.pi
    if order == 0:
        return share_NM
    return ((1 - cosine_NM) * (1 + cosine_NM)).sqrt() / math.pi + share_NM * cosine_NM


def make_kernel(
    name: str,
    *,
    bandwidth: float | Tensor = 1.0,
    degree: int = 3,
    scale: float = 1.0,
    offset: float = 1.0,
    order: int = 1,
    depth: int = 2,
) -> Kernel:
    """The kernel of a configuration, with its parameters bound; those of the other kernels are not looked at.

    Raises:
        ValueError: no kernel of that name.
    """
    match name:
        case "linear":
            return linear
        case "rbf":
            return functools.partial(rbf, bandwidth=bandwidth)
        case "laplace":
            return functools.partial(laplace, bandwidth=bandwidth)
        case "polynomial":
            return functools.partial(polynomial, degree=degree, scale=scale, offset=offset)
        case "arc_cosine":
            return functools.partial(arc_cosine, order=order)
        case "deep":
            return functools.partial(deep, depth=depth)
    raise ValueError(f"kernel={name!r} must be one of linear, rbf, laplace, polynomial, arc_cosine, deep")
