"""Monotone maps under which a skewed or heavy-tailed output is Gaussian, and back.

A composition of

    T(y) = d sinh(b arcsinh(y) - a) + c,       b, d > 0,                                    (1)

where a makes the output skewed, b sets the weight of its tails, c and d shift and scale. T and its
inverse are in closed form, and so is log T', by which densities change.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__: list[str] = []


def _warp(flows: Float[Tensor, "k 4 s"], y: Float[Tensor, "s n"]) -> tuple[Tensor, Tensor]:
    """Return T(y) and log T'(y) for the composition of d sinh(b arcsinh(y) - a) + c."""
    stretch = torch.zeros_like(y)
    for a, b, c, d in flows[..., None]:
        inner = b * y.arcsinh() - a
        stretch = stretch + (b * d).log() + inner.cosh().log() - 0.5 * y.square().log1p()
        y = d * inner.sinh() + c
    return y, stretch


def _unwarp(flows: Float[Tensor, "k 4 s"], z: Float[Tensor, "s m p"]) -> Float[Tensor, "s m p"]:
    """Return the inverse of T, applied to each output's values."""
    for a, b, c, d in flows.flip(0)[..., None, None]:
        z = ((((z - c) / d).arcsinh() + a) / b).sinh()
    return z


def _moments(flows: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of T^-1 of a Gaussian, by 32 Gauss-Hermite points."""
    points, weights = (mean.new_tensor(part) for part in np.polynomial.hermite_e.hermegauss(32))
    y = _unwarp(flows, mean[:, :, None] + std[:, :, None] * points)
    weights = weights / weights.sum()
    center = y @ weights
    return center, ((y - center[:, :, None]).square() @ weights).sqrt()
