"""Any function of a graph's Laplacian: by its eigenvectors, or by an integral around its spectrum.

A symmetric L has a basis of eigenvectors v_k and g(L) = sum_k g(lambda_k) v_k v_k*. On a
directed graph there may be none, and for g holomorphic on a disc around c that holds the
spectrum

    g(L) = (1 / 2 pi i) int g(z) (z - L)^(-1) dz = mean over the circle of g(z) (z - c) (z - L)^(-1).  (1)

Equally spaced points converge geometrically; their number is doubled until nothing changes.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, one_of
from posterity.graphs.resolvent import _check_features, _check_symmetric, _Graph

__all__ = ["apply_filter"]


def apply_filter(
    g: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*lead nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
    node_weight: Float[Tensor, " nodes"] | None = None,
    *,
    method: Literal["eig", "contour"] = "eig",
    center: float | None = None,
    radius: float | None = None,
    tol: float = 1e-9,
) -> Float[Tensor, "*lead nodes features"]:
    """Return g(L) x for a function g of the Laplacian.

    On directed graphs L may have no basis of eigenvectors; there g(L) is the mean of
    g(z) (z - c) (z - L)^(-1) over a circle around c that encloses the spectrum.

    Parameters
    ----------
    g : callable
        From a tensor of points (k,) to values (k,), real for real points. "eig" gives it
        eigenvalues, "contour" complex points; there g is holomorphic on the disc.
    x : Tensor of shape (..., nodes, features)
        Signals.
    edge_index : Tensor of shape (2, edges)
        Edges.
    edge_weight : Tensor of shape (edges,), optional
        Positive; ones by default.
    node_weight : Tensor of shape (nodes,), optional
        Positive; ones by default.
    method : {"eig", "contour"}, default="eig"
        "eig" for symmetric graphs, "contour" for any.
    center : float, optional
        Of the circle; by default the largest weighted in-degree over node weight, so that
        the disc by Gershgorin's theorem has the same centre, and this radius.
    radius : float, optional
        Of the circle, larger than that disc; by default 1.25 times what encloses it, or 0.1
        around a single point.
    tol : float, default=1e-9
        Largest change, relative to the largest value, at which doubling the points of the
        circle stops; rounding of what they sum to always may remain.

    Returns
    -------
    Tensor
        As ``x``; computed in float64.

    Raises
    ------
    ValueError
        If the graph does not fit or (for "eig") is not symmetric, the circle does not
        enclose the disc, or g returns another shape.
    RuntimeError
        If 4,096 points on the circle are not enough.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import apply_filter
    >>> edge_index = torch.tensor([[0, 1], [1, 0]])
    >>> apply_filter(lambda z: z, torch.tensor([[1.0], [3.0]]), edge_index)
    tensor([[-2.],
            [ 2.]])
    """
    one_of("method", method, ("eig", "contour"))
    at_least("tol", tol, 0, strict=True)
    _check_features(x)
    graph = _Graph.of(edge_index, x.shape[-2], edge_weight, node_weight, x.device)
    f = x.double().movedim(-2, 0).reshape(graph.n, -1)
    if method == "eig":
        _check_symmetric(graph)
        root = graph.mu.sqrt()[:, None]
        spectrum, basis = torch.linalg.eigh(graph.stiffness() / (root * root.T))
        points = spectrum.clamp_min(0)  # rounding may leave the zero below zero
        y = basis @ (_values(g, points).real[:, None] * (basis.T @ (root * f))) / root
    else:
        y = _contour(g, f, graph.stiffness() / graph.mu[:, None], center, radius, tol)
    return y.reshape(graph.n, *x.shape[:-2], x.shape[-1]).movedim(0, -2).to(x.dtype)


def _values(g: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    values = g(points)
    if not isinstance(values, Tensor) or values.shape != points.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"g must return a tensor of the shape it is given, {tuple(points.shape)}, got {got}")
    return values


def _contour(
    g: Callable[[Tensor], Tensor],
    f: Tensor,
    L: Tensor,
    center: float | None,
    radius: float | None,
    tol: float,
) -> Tensor:
    disc = float(L.detach().diagonal().max())  # centre and radius of Gershgorin's disc
    center = disc if center is None else at_least("center", center, -math.inf)
    least = abs(center - disc) + disc
    if radius is None:
        radius = 1.25 * least or 0.1
    elif at_least("radius", radius, 0, strict=True) <= least:
        raise ValueError(
            f"radius must be greater than {least:g} to enclose the spectrum from {center:g}, got {radius}"
        )
    eye = torch.eye(len(L), dtype=torch.complex128, device=L.device)

    def mean(count: int, offset: float) -> tuple[Tensor, float]:
        """Return the mean over points of the circle, and how large what is summed is."""
        angle = 2 * math.pi * (torch.arange(count, dtype=L.dtype, device=L.device) + offset) / count
        step = radius * torch.exp(1j * angle)
        points = center + step
        share = _values(g, points).to(eye) * step / count
        total, bulk = torch.zeros_like(f, dtype=eye.dtype), torch.zeros_like(f)
        size = max(1, 2**22 // L.numel())  # points whose systems fit into 64 MB together
        for z, c in zip(points.split(size), share.split(size), strict=True):
            solved = torch.linalg.solve(z[:, None, None] * eye - L, f.to(eye).expand(len(z), *f.shape))
            total = total + torch.einsum("k,kij->ij", c, solved)
            bulk += torch.einsum("k,kij->ij", c.detach().abs(), solved.detach().abs())
        return total.real, float(bulk.max())

    count, (y, bulk) = 32, mean(32, 0.0)
    while count < 4096:  # the points of the next rule are the old ones and those halfway
        (halfway, bulk), before = mean(count, 0.5), y
        y, count = (y + halfway) / 2, 2 * count
        change = float((y - before).detach().abs().max())
        if change <= max(tol * float(y.detach().abs().max()), 64 * torch.finfo(f.dtype).eps * bulk):
            return y
    raise RuntimeError(f"4096 points on the circle do not reach tol={tol:g}: is g holomorphic on the disc?")
