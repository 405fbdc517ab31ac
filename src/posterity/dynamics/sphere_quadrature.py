r"""Quadrature on the sphere at points that nobody chose: weights that make sums over them integrals.

For points x_i on :math:`S^{d-1}`, of area :math:`A_d = 2 \pi^{d/2} / \Gamma(d/2)`,

.. math:: \int f \approx \sum_i c_i f(x_i), \qquad c_i \ge 0, \quad \sum_i c_i = A_d.

A point counts for the part of the sphere that is nearest to it. With equal weights a sum is an integral under the
density of the points instead, which mixes frequencies that the sphere keeps apart.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree, SphericalVoronoi
from torch import Tensor

from posterity._checks import finite, floating, has_shape, integer, one_of
from posterity._precision import rounding
from posterity.dynamics._harmonics import area, count, zonal

__all__ = ["quadrature_weights"]

UNIT = 1e-4  # how far the length of a row may be from 1
SAME = 1e-6  # distance below which points are one
MOST = 64  # dimensions: the area, of which weights are parts, falls faster than exponentially
LARGEST = 10_000  # degree
BLOCK = 2**20  # bytes of cosines at a time: they stay in the cache for all degrees
RIDGE = 1e-8  # towards equal weights, which settles what moments leave open


def quadrature_weights(
    x: Float[Tensor, "n d"],
    *,
    method: Literal["auto", "voronoi", "nnls"] = "auto",
    max_degree: int | None = None,
) -> Float[Tensor, " n"]:
    """Return a weight for each point of a sphere, so that weighted sums are integrals over it.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Unit vectors, 2 <= d <= 64. Those that coincide share their weight.
    method : {"auto", "voronoi", "nnls"}, default="auto"
        ``"voronoi"``: the part of the sphere nearest to a point, by arcs (d = 2) or spherical polygons (d = 3).
        ``"nnls"``: those, none negative, that fit the moments of all harmonics up to ``max_degree`` best, any d.
        ``"auto"``: the first where d is 2 or 3, but for points of a plane, else the second.
    max_degree : int, optional
        Of ``"nnls"``: by default the largest for which there are at most n / 2 harmonics.

    Returns
    -------
    Tensor of shape (n,)
        Not negative, their sum the area of the sphere, 2 pi or 4 pi; in the dtype and on the device of ``x``.

    Raises
    ------
    ValueError
        If ``x`` is not of unit vectors, or the method is not to be had for them.

    Notes
    -----
    Moments of fewer harmonics than points leave weights open: of those that fit alike, what is returned is nearest
    to equal ones. It takes n^2 memory and n^3 time; polygons and arcs take n log n.

    References
    ----------
    .. [1] Yu, Yang, Townsend. Tuning Frequency Bias in Neural Network Training with Nonuniform Data. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import quadrature_weights
    >>> angles = torch.tensor([0.0, 0.5, 1.0, 1.5]) * torch.pi
    >>> x = torch.stack([angles.cos(), angles.sin()], 1)
    >>> quadrature_weights(x) / torch.pi
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    >>> quadrature_weights(x[[0, 0, 2]]) / torch.pi
    tensor([0.5000, 0.5000, 1.0000])
    """
    points = on_sphere("x", x)
    one_of("method", method, ("auto", "voronoi", "nnls"))
    d = points.shape[1]
    if max_degree is not None:
        integer("max_degree", max_degree, 0)
    found = points.cpu().numpy()
    same = _coinciding(found)
    _, first, sharing = np.unique(same, return_index=True, return_counts=True)
    distinct = found[first]
    cells = d == 2 or (d == 3 and len(distinct) > 3 and not _flat(distinct))
    if method == "voronoi" and not cells:
        raise ValueError(
            f"method must be 'nnls' or 'auto' for {len(distinct)} distinct points in {d} dimensions: polygons "
            "need 3 dimensions and points that are not of one plane"
        )
    if method == "nnls" or not cells:
        weights = _by_moments(torch.from_numpy(distinct), max_degree)
    elif max_degree is not None:
        raise ValueError(f"max_degree must be None but for method 'nnls', got {max_degree}")
    elif d == 2:
        weights = _arcs(distinct)
    else:
        weights = SphericalVoronoi(distinct, threshold=SAME / 10).calculate_areas()
    weights = weights * (area(d) / weights.sum()) / sharing
    return torch.from_numpy(weights[same]).to(x)


def on_sphere(name: str, x: Tensor, columns: int | None = None, most: int | None = MOST) -> Tensor:
    """Return points in float64, of length 1 to its last digit, or refuse what is further from it than rounding."""
    n, d = has_shape(name, floating(name, x), (None, columns)).shape
    if n == 0 or d < 2:
        raise ValueError(f"{name} must have a row and at least 2 columns, got shape {(n, d)}")
    if most is not None and d > most:
        raise ValueError(
            f"{name} must have at most {most} columns, got {d}: a sphere of more has hardly any area, "
            "and n points tell few of its harmonics apart; project it first"
        )
    with torch.inference_mode(False):
        # not of inference mode, where autograd could not use what is made of it
        found = finite(name, x.detach()).to("cpu" if x.device.type == "mps" else x.device, copy=True).double()
        lengths = found.norm(dim=1)
        off = (lengths - 1).abs()
        if bool((off > rounding(x.dtype, UNIT)).any()):
            row = int(off.argmax())
            raise ValueError(
                f"{name} must have rows of length 1, row {row} has {float(lengths[row]):.4g}: divide by the length, "
                "x / x.norm(dim=1, keepdim=True), or append a column of ones before to keep it"
            )
        return found / lengths[:, None]


def settled_degree(max_degree: int | None, n: int, d: int) -> int:
    """Return a degree that was asked for, or the largest for which there are at most n / 2 harmonics."""
    if max_degree is None:
        degree, harmonics = 0, 1 + count(1, d)
        while 2 * harmonics <= n and degree < LARGEST:
            degree += 1
            harmonics += count(degree + 1, d)
        return degree
    if integer("max_degree", max_degree, 0) > LARGEST:
        raise ValueError(f"max_degree must be at most {LARGEST}, got {max_degree}")
    if sum(count(degree, d) for degree in range(max_degree + 1)) > n:
        warnings.warn(
            f"max_degree={max_degree} asks for more harmonics than the {n} points can tell apart",
            stacklevel=3,
        )
    return max_degree


def settled_weights(weights: Tensor | None, x: Tensor) -> Tensor:
    """Return weights that were given, in float64, or those of quadrature; ``x`` as `on_sphere` returns it."""
    if weights is None:
        return quadrature_weights(x)
    has_shape("weights", floating("weights", weights), (len(x),), "x")
    with torch.inference_mode(False):
        found = finite("weights", weights.detach()).to(x, copy=True)
    if bool((found < 0).any()) or not bool(found.sum() > 0):
        raise ValueError(f"weights must not be negative, nor all 0, got values from {float(found.min()):.3g}")
    return found


def cosine_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows, and their cosines with themselves and all later ones."""
    n = len(x)
    size = max(1, BLOCK // (8 * n))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n)), (x[start : start + size] @ x[start:].T).clamp_(-1, 1)


def zonal_sum(x: Tensor, factors: Sequence[float]) -> Tensor:
    """Return sum_l factors[l] sum_p Y_lp(x_i) Y_lp(x_j) for all pairs of points."""
    n, d = x.shape
    scaled = [factor * count(degree, d) / area(d) for degree, factor in enumerate(factors)]
    total = x.new_empty(n, n)
    for rows, cosines in cosine_blocks(x):
        part = torch.zeros_like(cosines)
        for factor, polynomial in zip(scaled, zonal(cosines, len(scaled) - 1, d), strict=True):
            part.add_(polynomial, alpha=factor)
        total[rows, rows.start :] = part
        total[rows.start :, rows] = part.T
    return total


def _coinciding(x: np.ndarray) -> np.ndarray:
    """Return for each point the number of the group of those that it coincides with."""
    pairs = KDTree(x).query_pairs(SAME, output_type="ndarray")
    near = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(x), len(x)))
    return connected_components(near, directed=False)[1]


def _flat(x: np.ndarray) -> bool:
    """Return whether all points are of one plane."""
    return bool(np.linalg.svd(x - x.mean(0), compute_uv=False)[-1] < SAME * len(x) ** 0.5)


def _arcs(x: np.ndarray) -> np.ndarray:
    """Return half of the two arcs to the neighbours on the circle."""
    angles = np.arctan2(x[:, 1], x[:, 0])
    order = angles.argsort()
    after = np.diff(angles[order], append=angles[order[0]] + 2 * np.pi)
    weights = np.empty_like(angles)
    weights[order] = (after + np.roll(after, 1)) / 2
    return weights


def _by_moments(x: Tensor, max_degree: int | None) -> np.ndarray:
    """Return weights c >= 0 of least sum_l>0 |moments of degree l|^2 + (sum c - area)^2 + ridge |c - equal|^2."""
    n, d = x.shape
    degree = settled_degree(max_degree, n, d)
    system = zonal_sum(x, [0.0] + [1.0] * degree).numpy() + 1.0
    ridge = RIDGE * np.trace(system) / n
    system[np.diag_indices(n)] += ridge
    factor = cholesky(system)
    side = solve_triangular(factor, np.full(n, area(d) * (1 + ridge / n)), trans=1)
    free = solve_triangular(factor, side)
    return free if free.min() >= 0 else nnls(factor, side)[0]
