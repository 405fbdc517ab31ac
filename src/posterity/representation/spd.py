"""Symmetric positive definite matrices: the affine-invariant geometry of covariances, and layers that stay within it.

The distance of A and B is the norm of log eig(A^-1 B), which no change of coordinates A -> G A G' alters. At a mean
M a matrix S has the coordinates log(M^-1/2 S M^-1/2), a symmetric matrix whose norm is its distance from M.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity._precision import wide, widened

__all__ = ["BiMap", "ReEig", "SPDEncoder", "frechet_mean", "spd_distance", "spd_log", "tangent_vectors"]

CLOSE = 1e-7  # eigenvalues nearer than this, of the largest, count as equal in a gradient
Scalar = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, tuple[Scalar, Scalar, float]] = {  # with its slope, and a scale on which it changes
    "log": (torch.log, torch.reciprocal, 0.0),
    "exp": (torch.exp, torch.exp, 1.0),
    "root": (torch.sqrt, lambda w: 0.5 * w.rsqrt(), 0.0),
    "inverse root": (torch.rsqrt, lambda w: -0.5 * w**-1.5, 0.0),
}


class _Spectral(torch.autograd.Function):
    """A function of the eigenvalues, with the gradient of divided differences, which equal eigenvalues do not upset."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, f: Scalar, slope: Scalar, scale: float) -> Tensor:
        w, u = torch.linalg.eigh((s + s.mT) / 2)
        ctx.slope, ctx.scale = slope, scale
        value = f(w)
        ctx.save_for_backward(w, u, value)
        return (u * value[..., None, :]) @ u.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        w, u, value = ctx.saved_tensors
        apart = w[..., :, None] - w[..., None, :]
        equal = apart.abs() <= CLOSE * w.abs().amax(-1).clamp_min(ctx.scale)[..., None, None]
        middle = ctx.slope((w[..., :, None] + w[..., None, :]) / 2)
        quotient = (value[..., :, None] - value[..., None, :]) / torch.where(equal, 1.0, apart)
        inner = u.mT @ ((grad + grad.mT) / 2) @ u
        return u @ (torch.where(equal, middle, quotient) * inner) @ u.mT, None, None, None


def spectral(s: Tensor, name: str) -> Tensor:
    """Return a function of the eigenvalues of symmetric matrices: "log", "exp", "root" or "inverse root"."""
    return _Spectral.apply(s, *FUNCTIONS[name])  # type: ignore[return-value]


@widened
def spd_log(s: Float[Tensor, "*batch c c"]) -> Float[Tensor, "*batch c c"]:
    """Return the matrix logarithm of symmetric positive definite matrices.

    Parameters
    ----------
    s : Tensor of shape (..., c, c)
        Symmetric positive definite.

    Returns
    -------
    Tensor of shape (..., c, c)
        Symmetric; differentiable once, also where eigenvalues are equal.

    Raises
    ------
    ValueError
        If matrices are not square, symmetric to 1e-6, and positive definite.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import spd_log
    >>> spd_log(torch.eye(2)).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    return spectral(check_spd("s", s), "log")


@widened
def spd_distance(a: Float[Tensor, "*a c c"], b: Float[Tensor, "*b c c"]) -> Float[Tensor, "*ab"]:
    """Return the affine-invariant distance: the norm of the logarithms of the eigenvalues of ``a^-1 b``.

    Parameters
    ----------
    a, b : Tensor of shape (..., c, c)
        Symmetric positive definite, of shapes that broadcast.

    Returns
    -------
    Tensor of shape (...)
        Differentiable where it is not 0; the gradient is 0 there.

    Raises
    ------
    ValueError
        As for `spd_log`.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import spd_distance
    >>> round(float(spd_distance(torch.eye(2), 2.718281828 * torch.eye(2))), 4)
    1.4142
    """
    a, b = check_spd("a", a), check_spd("b", b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"b must have matrices of {a.shape[-1]} rows as a has, got {tuple(b.shape)}")
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(
            f"b must broadcast with a, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        ) from None
    root = spectral(a, "inverse root")
    inner = root @ b.to(a.dtype) @ root
    square = torch.linalg.eigvalsh((inner + inner.mT) / 2).log().square().sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def frechet_mean(
    s: Float[Tensor, "n c c"], weights: Float[Tensor, " n"] | None = None, *, max_iter: int = 100, tol: float = 1e-12
) -> Float[Tensor, "c c"]:  # fmt: skip
    """Return the matrix with the least mean squared affine-invariant distance.

    Parameters
    ----------
    s : Tensor of shape (n, c, c)
        Symmetric positive definite.
    weights : Tensor of shape (n,), optional
        Not negative, not all 0; by default equal.
    max_iter : int, default=100
        Newton steps; a handful are enough.
    tol : float, default=1e-12
        Norm of the mean logarithm to reach.

    Returns
    -------
    Tensor of shape (c, c)
        In the dtype of ``s``, computed in float64. The gradient is that of the last step alone, from a mean that
        counts as constant.

    Raises
    ------
    ValueError
        As for `spd_log`, or if weights do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import frechet_mean
    >>> frechet_mean(torch.stack([torch.eye(2), 4 * torch.eye(2)])).round(decimals=4).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    has_shape("s", floating("s", s), (None, None, None))
    if len(s) == 0:
        raise ValueError("s must have at least one matrix, got none")
    integer("max_iter", max_iter, 1)
    at_least("tol", tol, 0)
    exact = check_spd("s", s).to(torch.float32 if s.device.type == "mps" else torch.float64)
    if weights is None:
        share = exact.new_full((len(s),), 1 / len(s))
    else:
        share = finite("weights", has_shape("weights", floating("weights", weights), (len(s),), "s")).to(
            exact
        )
        if bool((share < 0).any()) or float(share.sum()) == 0:
            raise ValueError("weights must not be negative, nor all 0")
        share = share / share.sum()
    with torch.no_grad(), torch.autocast(s.device.type, enabled=False):
        mean = _karcher(exact.detach(), share, max_iter, tol)
    if s.requires_grad:
        mean = _moved(mean, _mean_log(exact, mean, share))
    return mean.to(s.dtype)


@widened
def tangent_vectors(s: Float[Tensor, "n c c"], mean: Float[Tensor, "c c"]) -> Float[Tensor, "n d"]:
    """Return coordinates of matrices in the tangent space at a mean.

    Parameters
    ----------
    s : Tensor of shape (n, c, c)
        Symmetric positive definite.
    mean : Tensor of shape (c, c)
        Symmetric positive definite.

    Returns
    -------
    Tensor of shape (n, c (c + 1) / 2)
        The upper triangle of log(mean^-1/2 s mean^-1/2), row by row, off-diagonals times sqrt(2): the norm of a row is
        the distance from the mean.

    Raises
    ------
    ValueError
        As for `spd_log`.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import tangent_vectors
    >>> tangent_vectors(torch.eye(2)[None], torch.eye(2)).tolist()
    [[0.0, 0.0, 0.0]]
    """
    has_shape("s", check_spd("s", s), (None, None, None))
    return coordinates(s, has_shape("mean", check_spd("mean", mean), tuple(s.shape[1:]), "s"))


class BiMap(nn.Module):
    """``W S W'`` with orthonormal rows of W: fewer channels, still positive definite.

    Parameters
    ----------
    c_in, c_out : int
        Channels; not more out than in.

    Raises
    ------
    ValueError
        If the sizes do not fit.

    References
    ----------
    .. [1] Huang, Van Gool. A Riemannian Network for SPD Matrix Learning. AAAI 2017.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import BiMap
    >>> BiMap(5, 2)(torch.eye(5).expand(3, 5, 5)).shape
    torch.Size([3, 2, 2])
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        if integer("c_out", c_out, 1) > integer("c_in", c_in, 1):
            raise ValueError(f"c_out must be at most c_in={c_in}, got {c_out}")
        self.raw = nn.Parameter(torch.linalg.qr(torch.randn(c_in, c_out)).Q.T.contiguous())

    @property
    def weight(self) -> Tensor:
        """W (c_out, c_in): the orthonormal rows nearest to the parameter ``raw``, so that any optimiser serves."""
        return _nearest_orthonormal(self.raw)

    def forward(self, s: Float[Tensor, "*batch c_in c_in"]) -> Float[Tensor, "*batch c_out c_out"]:
        """Return matrices of shape (..., c_out, c_out)."""
        weight = self.weight
        floating("s", s)
        if s.ndim < 2 or s.shape[-2:] != (weight.shape[1], weight.shape[1]):
            raise ValueError(
                f"s must have shape (..., {weight.shape[1]}, {weight.shape[1]}), got {tuple(s.shape)}"
            )
        return weight @ s @ weight.mT


class ReEig(nn.Module):
    """Lifts eigenvalues to a threshold, as ReLU does numbers.

    Parameters
    ----------
    threshold : float, default=1e-4
        Positive.

    Raises
    ------
    ValueError
        If the threshold is not positive.

    References
    ----------
    .. [1] Huang, Van Gool. A Riemannian Network for SPD Matrix Learning. AAAI 2017.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import ReEig
    >>> ReEig(0.5)(torch.diag(torch.tensor([2.0, 0.1]))).round(decimals=4).tolist()
    [[2.0, 0.0], [0.0, 0.5]]
    """

    def __init__(self, threshold: float = 1e-4) -> None:
        super().__init__()
        self.threshold = at_least("threshold", threshold, 0, strict=True)

    @widened
    def forward(self, s: Float[Tensor, "*batch c c"]) -> Float[Tensor, "*batch c c"]:
        """Return matrices of the shape of ``s``."""
        floating("s", s)
        if s.ndim < 2 or s.shape[-1] != s.shape[-2]:
            raise ValueError(f"s must have square matrices, got shape {tuple(s.shape)}")
        finite("s", s.detach())
        return _Spectral.apply(s, self._lift, self._slope, 0.0)  # type: ignore[return-value]

    def _lift(self, w: Tensor) -> Tensor:
        return w.clamp_min(self.threshold)

    def _slope(self, w: Tensor) -> Tensor:
        return (w > self.threshold).to(w)


class SPDEncoder(nn.Module):
    """`BiMap` and `ReEig` in turns: from covariances of many channels to small ones.

    Parameters
    ----------
    c_in : int
        Channels.
    hidden : sequence of int, default=()
        Channels between, not rising.
    c_out : int, default=4
        Channels of the latents.

    Raises
    ------
    ValueError
        If the sizes do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import SPDEncoder
    >>> SPDEncoder(8, (6,), 3)(torch.eye(8).expand(2, 8, 8)).shape
    torch.Size([2, 3, 3])
    """

    def __init__(self, c_in: int, hidden: Sequence[int] = (), c_out: int = 4) -> None:
        super().__init__()
        sizes = [c_in, *hidden, c_out]
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [BiMap(a, b), ReEig()]
        self.layers = nn.Sequential(*layers)

    def forward(self, s: Float[Tensor, "n c c"]) -> Float[Tensor, "n c_out c_out"]:
        """Return matrices of shape (n, c_out, c_out)."""
        return self.layers(s)


@widened
def _nearest_orthonormal(raw: Tensor) -> Tensor:
    return spectral(raw @ raw.T, "inverse root") @ raw


# Steps on the manifold, and what is asked of matrices.


def geodesic(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return the point at a share of the way from a to b."""
    with torch.autocast(a.device.type, enabled=False):
        root, inverse = spectral(a, "root"), spectral(a, "inverse root")
        return root @ spectral(share * spectral(inverse @ b @ inverse, "log"), "exp") @ root


@widened
def coordinates(s: Tensor, mean: Tensor) -> Tensor:
    """Return tangent vectors of matrices that were checked."""
    root = spectral(mean.to(s.dtype), "inverse root")
    return _upper(spectral(root @ s @ root, "log"))


def _karcher(s: Tensor, share: Tensor, max_iter: int, tol: float) -> Tensor:
    """Return the mean by Newton steps, in coordinates in which the arithmetic mean is the identity.

    They start halfway, on the geodesic, from the arithmetic to the harmonic mean: of two matrices that is the mean.
    """
    axes = torch.linalg.cholesky(_averaged(s, share))
    w = torch.linalg.solve_triangular(axes, s, upper=False)
    w = torch.linalg.solve_triangular(axes, w.mT, upper=False)
    away, last, step = -0.5 * spectral(_averaged(torch.linalg.inv(w), share), "log"), math.inf, 1.0
    for _ in range(max_iter):
        axes, back = axes @ spectral(step / 2 * away, "exp"), spectral(-step / 2 * away, "exp")
        w = (w @ back).mT @ back
        values, vectors = torch.linalg.eigh((w + w.mT) / 2)
        rows = vectors.mT.contiguous()  # for products of (n c, c) matrices, which are the fast ones
        weighted = (share[:, None, None] * rows).flatten(0, 1)
        slope = weighted.T @ (values.log()[..., None] * rows).flatten(0, 1)
        size = float(slope.norm())
        if size <= tol:
            break
        step, last = step / 2 if size > last else step, size
        least = max(tol, torch.finfo(s.dtype).eps)
        away = _newton(values, vectors, rows, weighted, slope, least)
        if size < 0.3 * least**0.5:  # what is left is its square, or rounding
            axes = axes @ spectral(away / 2, "exp")
            break
    return axes @ axes.mT


def _newton(
    values: Tensor, vectors: Tensor, rows: Tensor, weighted: Tensor, slope: Tensor, least: float
) -> Tensor:
    """Return the Newton step by conjugate gradients: all curvatures, x coth x, are 1 or little more."""
    apart, both = (op(values[..., :, None], values[..., None, :]) for op in (torch.sub, torch.add))
    logs = values.log() / 2
    equal = apart.abs() <= 1e-6 * both
    curvature = (logs[..., :, None] - logs[..., None, :]) * both / apart.masked_fill_(equal, 1.0)
    curvature.masked_fill_(equal, 1.0)
    x, rest = torch.zeros_like(slope), slope
    direction, square = rest, float(rest.square().sum())
    goal = max(square**0.5 * min(0.1, square**0.5), 0.1 * least) ** 2
    for _ in range(20):
        bent = weighted.T @ ((curvature * (rows @ direction @ vectors)) @ rows).flatten(0, 1)
        length = square / float((direction * bent).sum())
        x, rest = x + length * direction, rest - length * bent
        last, square = square, float(rest.square().sum())
        if square <= goal:
            break
        direction = rest + square / last * direction
    return (x + x.mT) / 2


def _averaged(s: Tensor, share: Tensor) -> Tensor:
    return torch.tensordot(share, s, 1)


def _mean_log(s: Tensor, mean: Tensor, share: Tensor) -> Tensor:
    root = spectral(mean, "inverse root")
    return _averaged(spectral(root @ s @ root, "log"), share)


def _moved(mean: Tensor, direction: Tensor) -> Tensor:
    root = spectral(mean, "root")
    return root @ spectral(direction, "exp") @ root


def _upper(s: Tensor) -> Tensor:
    c = s.shape[-1]
    rows, columns = torch.triu_indices(c, c, device=s.device)
    return s[..., rows, columns] * s.new_full((len(rows),), 2.0).sqrt().masked_fill(rows == columns, 1.0)


def check_spd(name: str, s: Tensor) -> Tensor:
    """Return symmetric positive definite matrices, after a look at each."""
    floating(name, s)
    if s.ndim < 2 or s.shape[-1] != s.shape[-2] or s.shape[-1] == 0:
        raise ValueError(f"{name} must have square matrices, got shape {tuple(s.shape)}")
    plain = wide(finite(name, s.detach()))
    tolerance = max(1e-6, 4 * torch.finfo(s.dtype).eps)
    off = (plain - plain.mT).abs().amax((-2, -1)) > tolerance * plain.abs().amax((-2, -1))
    if bool(off.any()):
        raise ValueError(f"{name} must be symmetric, matrix {int(off.flatten().nonzero()[0])} is not")
    # an eigenvalue within rounding of 0 is noise, whose logarithm would be the largest of all
    least = torch.finfo(plain.dtype).eps * plain.diagonal(dim1=-2, dim2=-1).sum(-1)
    lower = (plain + plain.mT) / 2 - torch.diag_embed(least[..., None].expand(plain.shape[:-1]))
    bad = torch.linalg.cholesky_ex(lower).info.flatten().nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"{name} must be positive definite, {len(bad)} of {least.numel()} are not, the first is matrix "
            f"{int(bad[0])}: shrink covariances of few samples, S + 1e-3 tr(S) / c I"
        )
    return s
