"""SFRIK: embeddings kept apart by a truncated rotation-invariant kernel, at a cost linear in their dimension.

On the sphere of R^q a kernel that rotations leave alone is ``K(u, v) = sum_l b_l P_l(q; u.v)`` with b_l >= 0,
P_l the Legendre polynomial of dimension q. The squared maximum mean discrepancy of n points from the uniform law is

    MMD^2(u) = sum_{l >= 1} b_l  mean_{i,j} P_l(q; u_i . u_j),                                     (1)

over all pairs, an i with itself among them, and a self-supervised loss is

    L = w mean_i |u1_i - u2_i|^2 + (MMD^2(u1) + MMD^2(u2)) / 2.                                    (2)

Degree 1 asks for a mean of zero, degree 2 for an isotropic covariance, degree 3 for more than that. With the Gram
matrix (1) costs n^2 q; up to degree 2 it may also be taken from the covariance, at n q^2.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer, one_of
from posterity._precision import unit_rows, widened
from posterity._processes import all_rows
from posterity.representation._pairs import matching_views

__all__ = ["SFRIKLoss", "SFRIKTerms", "kernel_weights", "legendre", "mmd_to_uniform"]

NODES = 256  # of the quadrature, at least
ROUTES = ("auto", "gram", "moment")


class SFRIKTerms(NamedTuple):
    """The two sides of the loss ``alignment_weight * alignment + uniformity``.

    Attributes
    ----------
    alignment : Tensor of shape ()
        Mean squared distance of the views of a sample.
    uniformity : Tensor of shape ()
        Mean over the two views of the squared discrepancy from the uniform law.
    """

    alignment: Tensor
    uniformity: Tensor


@widened
def legendre(t: Float[Tensor, "*shape"], degree: int, dim: int) -> Float[Tensor, "*shape"]:
    """Return the Legendre polynomial of a dimension, elementwise: Gegenbauer's of index dim/2 - 1, 1 at 1.

    Parameters
    ----------
    t : Tensor
        Cosines, in [-1, 1].
    degree : int
        At least 0.
    dim : int
        Of the space whose sphere it is, at least 2: 2 gives Chebyshev's polynomials, 3 Legendre's own.

    Returns
    -------
    Tensor
        Of the shape of ``t``.

    Raises
    ------
    ValueError
        If ``t`` is not a floating-point tensor, or a number is out of range.

    References
    ----------
    .. [1] Zheng, Puy, Riccietti, Perez, Gribonval. Self-supervised learning with rotation-invariant kernels.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import legendre
    >>> legendre(torch.tensor([1.0, 0.5]), 2, 3).tolist()
    [1.0, -0.125]
    """
    floating("t", t)
    integer("degree", degree, 0)
    integer("dim", dim, 2)
    return _legendre(t, degree, dim)[-1]


def kernel_weights(phi: Callable[[Tensor], Tensor], dim: int, max_degree: int) -> Tensor:
    """Return the weights b_1 .. b_L of a kernel ``phi(u.v)`` in Legendre polynomials.

    Parameters
    ----------
    phi : callable
        Elementwise, of cosines (m,) in float64. ``exp(-2 s (1 - t))`` is the Gaussian kernel exp(-s |u - v|^2).
    dim : int
        Of the space, at least 2.
    max_degree : int
        L, at least 1.

    Returns
    -------
    Tensor of shape (L,), float64
        By Gauss-Gegenbauer quadrature. A weight is exact to about 1e-16 times the largest value of phi and the
        number of spherical harmonics of its degree, some dim^l / l!.

    Raises
    ------
    ValueError
        If phi returns another shape or what is not finite, or a number is out of range.

    References
    ----------
    .. [1] Zheng, Puy, Riccietti, Perez, Gribonval. Self-supervised learning with rotation-invariant kernels.
       ICLR 2023. Section 3, after Schoenberg's theorem.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import kernel_weights
    >>> kernel_weights(lambda t: t + t**2, dim=3, max_degree=3).round(decimals=6).tolist()
    [1.0, 0.666667, 0.0]
    """
    integer("dim", dim, 2)
    integer("max_degree", max_degree, 1)
    nodes, shares = _quadrature(dim, max(NODES, 2 * max_degree))
    values = phi(nodes)
    if not isinstance(values, Tensor) or values.shape != nodes.shape:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"phi must return a tensor of the shape that it gets, {tuple(nodes.shape)}, got {shape}"
        )
    values = values.detach().double().cpu()
    if not bool(values.isfinite().all()):
        raise ValueError("phi must be finite on [-1, 1], got NaN or infinity")
    basis = torch.stack(_legendre(nodes, max_degree, dim)[1:])
    return (basis @ (shares * values)) / (basis.square() @ shares)


def mmd_to_uniform(
    z: Float[Tensor, "n dim"], weights: Sequence[float] = (1.0, 40.0, 40.0), *,
    route: Literal["auto", "gram", "moment"] = "auto",
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the squared discrepancy of directions from the uniform law on the sphere.

    Parameters
    ----------
    z : Tensor of shape (n, dim)
        Rows of any length; a row of zeros has no direction and counts as orthogonal to all, itself included.
    weights : sequence of float, default=(1, 40, 40)
        b_1 .. b_L, none negative: of degree 1, 2, ...
    route : {"auto", "gram", "moment"}, default="auto"
        Through the (n, n) matrix of cosines, or the (dim, dim) matrix of second moments, which serves degrees 1
        and 2; by default the smaller that serves.

    Returns
    -------
    Tensor of shape ()
        At least 0 where no row is 0; ``sum(weights) / n`` is what n independent uniform directions have on average, and
        ``sum(weights)`` what equal ones have.

    Raises
    ------
    ValueError
        If ``z`` is not a floating-point matrix with a row and two columns, or the weights or the route do not fit.

    References
    ----------
    .. [1] Zheng, Puy, Riccietti, Perez, Gribonval. Self-supervised learning with rotation-invariant kernels.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import mmd_to_uniform
    >>> axes = torch.cat([torch.eye(3), -torch.eye(3)])
    >>> abs(float(mmd_to_uniform(axes))) < 1e-5
    True
    """
    weights = _weights(weights)
    has_shape("z", floating("z", z), (None, None))
    if len(z) < 1 or z.shape[1] < 2:
        raise ValueError(f"z must have a row and at least 2 columns, got shape {tuple(z.shape)}")
    return _discrepancy(unit_rows(z).to(z.dtype), weights, _route(route, weights))


class SFRIKLoss(nn.Module):
    """Views of a sample agree, and each view is spread over the sphere.

    Parameters
    ----------
    weights : sequence of float, default=(1, 40, 40)
        b_1 .. b_L of the kernel, none negative.
    alignment_weight : float, default=0.5
        w. The official coefficient over the dimension: 4,000 at 8,192 dimensions is 0.49 here, 40,000 at
        32,768 is 1.22; small dimensions want more, as 10 at 128.
    route : {"auto", "gram", "moment"}, default="auto"
        As for `mmd_to_uniform`.

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if the views are not (batch, dim) of one shape, with two rows
        and two columns at least.

    Notes
    -----
    1. Alignment is a sum over dimensions here, a mean in the official code: see ``alignment_weight``.
    2. With more crops than two, ``loss(z1, z2, *small)``, the first two are compared with all others, and
       they alone are spread.

    Where ``torch.distributed`` is initialised, a view is that of all processes.

    References
    ----------
    .. [1] Zheng, Puy, Riccietti, Perez, Gribonval. Self-supervised learning with rotation-invariant kernels.
       ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import SFRIKLoss
    >>> z1, z2 = torch.randn(2, 8, 32, requires_grad=True)
    >>> SFRIKLoss(alignment_weight=10)(z1, z2).backward()
    """

    def __init__(
        self, weights: Sequence[float] = (1.0, 40.0, 40.0), *, alignment_weight: float = 0.5,
        route: Literal["auto", "gram", "moment"] = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.weights = _weights(weights)
        self.alignment_weight = at_least("alignment_weight", alignment_weight, 0)
        self.route = _route(route, self.weights)

    def forward(
        self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], *more: Float[Tensor, "n dim"]
    ) -> Float[Tensor, ""]:
        """Return the loss of two views after the projector, and of further crops of the same samples."""
        terms = self.terms(z1, z2, *more)
        return self.alignment_weight * terms.alignment + terms.uniformity

    def terms(
        self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], *more: Float[Tensor, "n dim"]
    ) -> SFRIKTerms:
        """Return alignment and uniformity.

        Parameters
        ----------
        z1, z2 : Tensor of shape (n, dim)
            Two views, row i of one beside row i of the other.
        *more : Tensor of shape (n, dim)
            Further crops.

        Returns
        -------
        SFRIKTerms
        """
        names = ("z1", "z2", *(f"more[{k}]" for k in range(len(more))))
        matching_views(z1, z2, *more, least=0, names=names)
        if z1.shape[1] < 2:
            raise ValueError(f"z1 must have at least 2 columns, got shape {tuple(z1.shape)}")
        views = all_rows(z1, z2, *more)
        matching_views(*views, names=names)
        return SFRIKTerms(*self._terms(*views))

    @widened
    def _terms(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        u = [unit_rows(z) for z in views]
        ours, *others = [
            (u[a] - u[b]).square().sum(1).mean() for a, b in [(0, 1), *product((0, 1), range(2, len(u)))]
        ]  # the pair of the first two counts for both
        alignment = (2 * ours + sum(others, torch.zeros_like(ours))) / (2 * (len(u) - 1))
        both = [_discrepancy(z, self.weights, self.route) for z in u[:2]]
        return alignment, (both[0] + both[1]) / 2


# The discrepancy by either route, the polynomials, and their quadrature.


@widened
def _discrepancy(u: Tensor, weights: tuple[float, ...], route: str) -> Tensor:
    """Return the sum over degrees of weight times mean polynomial of cosines, of unit rows."""
    n, q = u.shape
    degree = max(k for k, b in enumerate(weights, 1) if b)
    first = u.mean(0).square().sum()
    if degree == 1:
        return weights[0] * first
    if route == "moment" or (route == "auto" and degree == 2 and q < n):
        second = (u.T @ u).square().sum() / n**2
        return weights[0] * first + weights[1] * (q * second - 1) / (q - 1)
    if degree > 3:
        polynomials = _legendre((u @ u.T).flatten(), degree, q)[2:]
        means = [b * p.mean() for b, p in zip(weights[1:], polynomials, strict=False)]
        return weights[0] * first + sum(means, torch.zeros_like(first))
    # P_2 = (q t^2 - 1) / (q - 1) and P_3 = ((q + 2) t^3 - 3 t) / (q - 1): means of powers first, then differences
    _, b2, b3 = (*weights, 0.0)[:3]
    a2, a3 = (b * scale / (q - 1) for b, scale in ((b2, q), (b3, q + 2)))
    powers, _ = _Powers.apply(u, a2 / n**2, a3 / n**2)  # type: ignore[misc]
    return (weights[0] - 3 * b3 / (q - 1)) * first + powers - b2 / (q - 1)


class _Powers(torch.autograd.Function):
    """The sum over all pairs of a2 t^2 + a3 t^3, t their product; its gradient needs one product of matrices, not two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, a2: float, a3: float) -> tuple[Tensor, Tensor]:
        gram = u @ u.T
        flat = gram.flatten()
        value = a2 * (flat @ flat)
        return (value + a3 * (flat.square() @ flat) if a3 else value), gram

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: tuple[Tensor, Tensor]) -> None:
        u, ctx.a2, ctx.a3 = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(u, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        u, gram = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the matrix depends on u
            gram = u @ u.T
        slope = 2 * ctx.a2 * gram if not ctx.a3 else gram * (2 * ctx.a2 + 3 * ctx.a3 * gram)
        return 2 * grad * (slope @ u), None, None


def _legendre(t: Tensor, degree: int, dim: int) -> list[Tensor]:
    """Return the polynomials of degrees 0 to ``degree``."""
    found = [torch.ones_like(t), t]
    for k in range(1, degree):
        found.append(((2 * k + dim - 2) * t * found[k] - k * found[k - 1]) / (k + dim - 2))
    return found[: degree + 1]


def _quadrature(dim: int, n: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, of sum 1, for (1 - t^2)^((dim - 3) / 2): by the recurrence, for any dimension."""
    a, k = dim / 2 - 1, np.arange(2, n)
    off = np.concatenate([[1 / (2 * (1 + a))], k * (k + 2 * a - 1) / (4 * (k + a) * (k + a - 1))])
    nodes, vectors = eigh_tridiagonal(np.zeros(n), np.sqrt(off))
    return torch.from_numpy(nodes), torch.from_numpy(vectors[0] ** 2)


def _weights(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        kept = tuple(weights)
    except TypeError:
        raise ValueError(f"weights must be a sequence of numbers, got {weights!r}") from None
    if not kept:
        raise ValueError("weights must name at least one degree, got none")
    kept = tuple(float(at_least(f"weights[{k}]", b, 0)) for k, b in enumerate(kept))
    if not any(kept):
        raise ValueError("weights must not all be 0")
    return kept


def _route(route: str, weights: tuple[float, ...]) -> str:
    one_of("route", route, ROUTES)
    if route == "moment" and any(weights[2:]):
        raise ValueError(f'route="moment" serves degrees 1 and 2, got weights up to degree {len(weights)}')
    return route
