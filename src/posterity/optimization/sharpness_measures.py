r"""Which sharpness? The worst direction's, the ascent direction's and the average direction's.

A loss L around x, on a ball of radius rho, rises by

.. math:: R_{\max} = \max_{\lVert v\rVert \le 1} L(x + \rho v) - L(x), \quad
          R_{\text{asc}} = L\!\left(x + \rho \tfrac{\nabla L(x)}{\lVert\nabla L(x)\rVert}\right) - L(x), \quad
          R_{\text{avg}} = \mathbb E_{v}\, L(x + \rho v) - L(x),

v uniform on the unit sphere. On the manifold of minimisers they become, divided by rho^2 as rho -> 0,

.. math:: \lambda_1(H)/2, \qquad \lambda_M(H)/2, \qquad \operatorname{Tr}(H)/(2D),

of the Hessian H of rank M at x: the largest eigenvalue, the smallest that is not zero (the least rise over
all ways to come near x), and the mean of all D. They are different functions of x, and optimisers that
look alike lower different ones.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of, scalar
from posterity._precision import widened
from posterity._random import draw_device
from posterity.optimization._krylov import ritz, tridiagonal
from posterity.optimization.sam_sharpness import _direction, _plain

__all__ = ["alignment", "limiting_sharpness", "sharpness", "top_eigenpair"]

Kind = Literal["worst", "ascent", "average"]
Loss = Callable[[Tensor], Tensor]
KINDS = ("worst", "ascent", "average")
LARGEST = 2_000  # parameters of a Hessian that is written out
DIRECTIONS_AT_ONCE = 2**22  # numbers in directions looked along together


@torch.inference_mode(False)  # grad mode too
@widened
def sharpness(
    loss_fn: Loss,
    params: Float[Tensor, " d"],
    kind: Kind,
    *,
    rho: float,
    n_samples: int = 256,
    n_starts: int = 8,
    n_steps: int = 200,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return by how much the loss rises at a distance rho.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params)`` is a scalar, made of operations that ``torch.func.vmap`` takes.
    params : Tensor of shape (d,)
        x, a flat vector.
    kind : {"worst", "ascent", "average"}
        The direction. "worst" is a lower bound: the best of a search within the ball, by gradients from
        several starts; for d of at most 3 also from a grid. "ascent" is 0 where the gradient is.
    rho : float
        The distance, at least 0. The rise is a difference of losses: use float64 where it is small.
    n_samples : int, default=256
        Directions for "average", at least 2: pairs of opposite ones, orthogonal by up to d, so that a
        quadratic's average is exact where ``n_samples`` is a multiple of 2 d.
    n_starts : int, default=8
        Starts for "worst", at least 1: the gradient, the top eigenvector of the Hessian and its opposite, then random ones.
    n_steps : int, default=200
        Steps from each start, at least 1.
    generator : torch.Generator, optional
        For random directions; by default torch's global one.

    Returns
    -------
    Tensor of shape ()
        R_max, R_asc or R_avg.

    Raises
    ------
    ValueError
        If an argument is out of its range, or ``loss_fn`` returns no scalar or nothing finite at ``params``.

    References
    ----------
    Wen, Ma, Li. How Sharpness-Aware Minimization Minimizes Sharpness? ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import sharpness
    >>> curvatures = torch.tensor([4.0, 1.0])
    >>> bowl = lambda x: (curvatures * x**2).sum() / 2
    >>> sharpness(bowl, torch.zeros(2), "worst", rho=0.1)  # 0.1^2 * 4 / 2
    tensor(0.0200)
    >>> sharpness(bowl, torch.zeros(2), "average", rho=0.1)  # 0.1^2 * 5 / (2 * 2)
    tensor(0.0125)
    """
    one_of("kind", kind, KINDS)
    at_least("rho", rho, 0.0)
    integer("n_samples", n_samples, 2)
    integer("n_starts", n_starts, 1)
    integer("n_steps", n_steps, 1)
    loss_fn, x, here = _point(loss_fn, params)
    if kind == "ascent":
        there = loss_fn(x + rho * _direction(torch.func.grad(loss_fn)(x), 0.0))
        return (there - here).detach()
    if kind == "average":
        total, n = torch.zeros_like(here), (n_samples + 1) // 2
        for v in _frames(n, x, generator):
            both = torch.vmap(lambda v: loss_fn(x + rho * v) + loss_fn(x - rho * v))(v)
            total += (both - 2 * here).sum()
        return (total / (2 * n)).detach()
    starts = _starts(loss_fn, x, rho, n_starts, generator)
    return _climb(lambda v: loss_fn(x + rho * v) - here, starts, n_steps).clamp_min(0.0).detach()


@torch.inference_mode(False)  # grad mode too
@widened
def limiting_sharpness(
    loss_fn: Loss,
    params: Float[Tensor, " d"],
    kind: Kind,
    *,
    method: Literal["exact", "lanczos"] = "exact",
    tol: float = 1e-6,
    n_probes: int = 64,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return `sharpness` at a minimiser divided by rho^2, as rho goes to 0.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params)`` is a scalar, twice differentiable, made of operations that ``torch.func.vmap`` takes.
    params : Tensor of shape (d,)
        A minimiser, a flat vector. Whether it is one is not asked.
    kind : {"worst", "ascent", "average"}
        lambda_1 / 2, lambda_M / 2 or Tr / (2 d) of the Hessian.
    method : {"exact", "lanczos"}, default="exact"
        Whether the Hessian is written out (d of at most 2,000), or only multiplied with vectors.
    tol : float, default=1e-6
        Eigenvalues of at most ``tol * lambda_1`` count as zero; rounding adds to it in float32.
    n_probes : int, default=64
        Products with the Hessian that "lanczos" makes, at most (d at least). "ascent" is then at least the true
        value, and equal to it where the rank is at most ``n_probes``; "average" is an estimate by random vectors.
    generator : torch.Generator, optional
        For "lanczos"; by default torch's global one.

    Returns
    -------
    Tensor of shape ()
        The limit, with its factor of 1/2.

    Raises
    ------
    ValueError
        If an argument is out of its range, ``loss_fn`` returns no scalar or nothing finite at ``params``,
        "exact" is asked of more than 2,000 parameters, or "ascent" where no eigenvalue is positive.

    References
    ----------
    Wen, Ma, Li. How Sharpness-Aware Minimization Minimizes Sharpness? ICLR 2023. Section 3, Table 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import limiting_sharpness
    >>> curvatures = torch.tensor([4.0, 1.0, 0.0])
    >>> valley = lambda x: (curvatures * x**2).sum() / 2
    >>> [round(limiting_sharpness(valley, torch.zeros(3), kind).item(), 3) for kind in ("worst", "ascent", "average")]
    [2.0, 0.5, 0.833]
    """
    one_of("kind", kind, KINDS)
    one_of("method", method, ("exact", "lanczos"))
    at_least("tol", tol, 0.0)
    integer("n_probes", n_probes, 1)
    loss_fn, x, _ = _point(loss_fn, params)
    if method == "exact":
        hessian = _hessian(loss_fn, x)
        if kind == "average":
            return hessian.diagonal().mean() / 2
        values = torch.linalg.eigvalsh(hessian)
    else:
        product = _product(loss_fn, x)
        if kind == "average":
            sums = [(v * torch.vmap(product)(v)).sum() for v in _frames(n_probes, x, generator)]
            return (torch.stack(sums).sum() / (2 * n_probes)).detach()
        start = _normal(x, generator)
        if kind == "ascent":  # from within the Hessian's range, where zero is no eigenvalue
            start = product(start)
        found = bool(torch.linalg.vector_norm(start) > 0)
        values = ritz(*tridiagonal(product, start, n_probes)[:2])[0] if found else torch.zeros_like(x[:1])
    if kind == "worst":
        return values[-1] / 2
    above = values[values > max(tol, 16 * torch.finfo(x.dtype).eps) * values[-1].clamp_min(0.0)]
    if not len(above):
        raise ValueError(
            "params must be where the Hessian has a positive eigenvalue for kind 'ascent', found none"
        )
    return above[0] / 2


@torch.inference_mode(False)  # grad mode too
@widened
def top_eigenpair(
    loss_fn: Loss,
    params: Float[Tensor, " d"],
    *,
    method: Literal["exact", "lanczos"] = "lanczos",
    n_iter: int = 50,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " d"]]:
    """Return the largest eigenvalue of the Hessian and its eigenvector.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params)`` is a scalar, twice differentiable.
    params : Tensor of shape (d,)
        A flat vector.
    method : {"exact", "lanczos"}, default="lanczos"
        Whether the Hessian is written out (d of at most 2,000), or only multiplied with vectors.
    n_iter : int, default=50
        Products that "lanczos" makes, at most; where d is no more it is exact. At least 1.
    generator : torch.Generator, optional
        For the vector from which "lanczos" starts; by default torch's global one.

    Returns
    -------
    value : Tensor of shape ()
        lambda_1.
    vector : Tensor of shape (d,)
        Of length 1, its largest entry positive.

    Raises
    ------
    ValueError
        If an argument is out of its range, ``loss_fn`` returns no scalar or nothing finite at ``params``,
        or "exact" is asked of more than 2,000 parameters.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import top_eigenpair
    >>> top_eigenpair(lambda x: x[0] ** 2 + 3 * x[1] ** 2, torch.ones(2), method="exact")
    (tensor(6.), tensor([0., 1.]))
    """
    one_of("method", method, ("exact", "lanczos"))
    integer("n_iter", n_iter, 1)
    loss_fn, x, _ = _point(loss_fn, params)
    if method == "exact":
        values, vectors = torch.linalg.eigh(_hessian(loss_fn, x))
        value, vector = values[-1], vectors[:, -1]
    else:
        value, vector = _top(loss_fn, x, n_iter, generator)
    sign = torch.where(vector[vector.abs().argmax()] < 0, -1.0, 1.0)
    return value, vector * sign + 0.0


@torch.inference_mode(False)  # grad mode too
@widened
def alignment(loss_fn: Loss, params: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    """Return how far the gradient points along the Hessian's top eigenvector, ``|<g, v_1>| / ||g||``.

    Under full-batch SAM it goes to 1 - O(rho), which is why a step along the gradient finds the worst direction.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params)`` is a scalar, twice differentiable.
    params : Tensor of shape (d,)
        A flat vector, where the gradient is not zero.

    Returns
    -------
    Tensor of shape ()
        In [0, 1]. The eigenvector is that of 50 products with the Hessian from a fixed start.

    Raises
    ------
    ValueError
        If ``params`` is not a floating-point vector, the gradient there is zero, or ``loss_fn`` returns no scalar or
        nothing finite.

    References
    ----------
    Wen, Ma, Li. How Sharpness-Aware Minimization Minimizes Sharpness? ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import alignment
    >>> alignment(lambda x: x[0] ** 2 / 2 + x[1] ** 2, torch.tensor([3.0, 2.0]))  # gradient (3, 4), top (0, 1)
    tensor(0.8000)
    """
    loss_fn, x, _ = _point(loss_fn, params)
    unit = _direction(torch.func.grad(loss_fn)(x), 0.0)
    if not bool((unit != 0).any()):
        raise ValueError("params must be where the gradient is not zero, it has no direction")
    _, vector = _top(loss_fn, x, 50, torch.Generator().manual_seed(0))
    return (unit @ vector).abs().clamp_max(1.0).detach()


# --- the point, its Hessian and directions ---


def _point(function: Any, params: Tensor) -> tuple[Loss, Tensor, Tensor]:
    """Return a loss whose values are checked, the parameters as autograd may keep them, and the loss there."""

    def loss_fn(x: Tensor) -> Tensor:
        return floating("what loss_fn returns", scalar("loss_fn", function(x)))

    x = _plain(has_shape("params", floating("params", params), (None,)))
    if not len(x):
        raise ValueError("params must hold at least one number, got none")
    here = loss_fn(finite("params", x)).detach()
    gradient = torch.func.grad(loss_fn)(x)
    if not (bool(here.isfinite()) and bool(gradient.isfinite().all())):
        raise ValueError(f"loss_fn and its gradient must be finite at params, got a loss of {float(here):g}")
    return loss_fn, x, here


def _product(loss_fn: Loss, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return v -> H v: the gradient is recorded once, and each product is one pass back through it."""
    pull = torch.func.vjp(torch.func.grad(loss_fn), x)[1]
    return lambda v: pull(v)[0].detach()


def _at_once(x: Tensor) -> int:
    return max(1, DIRECTIONS_AT_ONCE // len(x))


def _hessian(loss_fn: Loss, x: Tensor) -> Tensor:
    if len(x) > LARGEST:
        raise ValueError(
            f"params must hold at most {LARGEST} numbers to write the Hessian out, got {len(x)}: use method='lanczos'"
        )
    rows = torch.vmap(_product(loss_fn, x), chunk_size=_at_once(x))(torch.eye(len(x)).to(x))
    if not bool(rows.isfinite().all()):
        raise ValueError("loss_fn must have a finite Hessian at params, got NaN or infinity")
    return (rows + rows.mT) / 2


def _top(loss_fn: Loss, x: Tensor, n_iter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    alpha, beta, basis = tridiagonal(_product(loss_fn, x), _normal(x, generator), n_iter)
    values, vectors = ritz(alpha, beta)
    vector = vectors[:, -1] @ basis
    return values[-1].detach(), (vector / torch.linalg.vector_norm(vector)).detach()


def _normal(x: Tensor, generator: torch.Generator | None, *shape: int) -> Tensor:
    device = draw_device(generator, x.device)
    return torch.randn(*(shape or x.shape), dtype=x.dtype, device=device, generator=generator).to(x.device)


def _frames(n: int, x: Tensor, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield n uniform directions in blocks (size, d) of orthonormal ones."""
    while n:
        size = min(n, len(x), _at_once(x))
        yield torch.linalg.qr(_normal(x, generator, len(x), size))[0].mT
        n -= size


# --- the worst direction ---


def _starts(loss_fn: Loss, x: Tensor, rho: float, n: int, generator: torch.Generator | None) -> Tensor:
    """Return starts (n or more, d) in the unit ball."""
    chosen = []
    uphill = _direction(torch.func.grad(loss_fn)(x), 0.0)
    if bool((uphill != 0).any()):
        chosen.append(uphill)
    if len(chosen) < n:
        top = _top(loss_fn, x, 50, generator)[1]
        chosen += [top, -top]
    starts = torch.stack(chosen[:n]).detach()
    if len(starts) < n:
        more = _normal(x, generator, n - len(starts), len(x))
        starts = torch.cat([starts, torch.stack([_direction(v, 0.0) for v in more])])
    if len(x) <= 3:  # the best of a grid of the cube, whose corners are moved to the sphere
        line = torch.linspace(-1, 1, (1025, 33, 11)[len(x) - 1]).to(x)
        grid = _into_ball(torch.cartesian_prod(*[line] * len(x)).reshape(-1, len(x)))
        best = torch.vmap(lambda v: loss_fn(x + rho * v))(grid).topk(min(n, len(grid))).indices
        starts = torch.cat([starts, grid[best].detach()])
    return starts


def _into_ball(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1.0)


def _climb(rise: Loss, v: Tensor, n_steps: int) -> Tensor:
    """Return the largest rise found: each step doubles after a success, and is halved after a failure."""
    both = torch.vmap(torch.func.grad_and_value(rise), chunk_size=_at_once(v[0]))
    slope, best = both(v)
    step = torch.ones_like(best)
    for _ in range(n_steps):
        size = torch.linalg.vector_norm(slope, dim=1)
        unit = slope / torch.where(size > 0, size, 1.0)[:, None]
        tried = _into_ball(v + step[:, None] * unit)
        new_slope, new = both(tried)
        up = (new > best) & new.isfinite()
        v, slope = torch.where(up[:, None], tried, v), torch.where(up[:, None], new_slope, slope)
        best = torch.where(up, new, best)
        step = torch.where(up, 2 * step, step / 2).clamp_max(1e6)
        if bool((step < 1e-8).all()):
            break
    return torch.where(best.isnan(), 0.0, best).max()
