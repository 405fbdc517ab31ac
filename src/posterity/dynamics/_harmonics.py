r"""Spherical harmonics of any dimension through their sums, without building one.

By the addition theorem, for harmonics orthonormal on the sphere :math:`S^{d-1}` of area :math:`A_d`,

.. math:: \sum_{p=1}^{N(d, l)} Y_{l,p}(x)\, Y_{l,p}(y) = \frac{N(d, l)}{A_d} P_{l,d}(x \cdot y),

P the Gegenbauer polynomial with P(1) = 1: Chebyshev's on the circle, Legendre's on the sphere.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["area", "count", "zonal"]


def area(dim: int) -> float:
    """Return the area of the unit sphere in ``dim`` dimensions: 2 pi, 4 pi, ..."""
    return 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)


def count(degree: int, dim: int) -> int:
    """Return how many independent harmonics of a degree there are."""
    if degree == 0:
        return 1
    if dim == 2:
        return 2
    return (2 * degree + dim - 2) * math.comb(degree + dim - 3, degree - 1) // degree


def zonal(cosines: Tensor, max_degree: int, dim: int) -> Iterator[Tensor]:
    """Yield P_0, P_1, ... of a tensor of cosines, by the recurrence in three terms."""
    last, now = torch.ones_like(cosines), cosines
    for degree in range(max_degree + 1):
        yield last
        # (l + d - 3) P_l = (2 l + d - 4) t P_{l-1} - (l - 1) P_{l-2}, here for l = degree + 2
        over = degree + dim - 1
        last, now = now, ((2 * degree + dim) * cosines * now - (degree + 1) * last) / over
