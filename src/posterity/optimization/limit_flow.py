r"""The path that SAM takes along minimisers, from theory: a gradient flow of sharpness on their manifold.

For small eta and rho, after :math:`\tau / (\eta \rho^2)` steps SAM is near

.. math:: \mathrm dX/\mathrm d\tau = -\tfrac12 P(X)\, \nabla \Lambda(X),

P the projection on the kernel of the Hessian H, which is the manifold's tangent space. What is lowered,

.. math:: \Lambda = \lambda_1(H), \quad \operatorname{Tr}(H), \quad \lambda_M(H),

is said by the samples that share a perturbation: the largest eigenvalue for the whole batch, the trace for single
samples; the smallest nonzero one is what descent on the perturbed loss itself, differentiated through, would lower.
An eigenvalue's gradient is that of :math:`v^\top H(x) v` with its eigenvector held fixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, integer, one_of
from posterity._precision import widened
from posterity.optimization.sharpness_measures import KINDS, Kind, Loss, _at_once, _hessian, _point

__all__ = ["FlowResult", "limit_flow"]

ZERO = 1e-6  # eigenvalues of at most so much of the largest count as zero
GAP = 1e-8  # the theorem needs the eigenvalue to be simple
NEWTON = 50  # steps back to the manifold, at most


class FlowResult(NamedTuple):
    """A path along minimisers.

    Attributes
    ----------
    params : Tensor of shape (d,)
        Its end.
    path : Tensor of shape (points, d)
        All of it, n_steps + 1 points.
    values : Tensor of shape (points,)
        What it lowers: lambda_1, Tr or lambda_M of the Hessian.
    """

    params: Float[Tensor, " d"]
    path: Float[Tensor, "points d"]
    values: Float[Tensor, " points"]


@torch.inference_mode(False)  # grad mode too
@widened
def limit_flow(
    loss_fn: Loss,
    params: Float[Tensor, " d"],
    kind: Kind,
    *,
    time: float,
    n_steps: int = 200,
    tol: float = 1e-8,
) -> FlowResult:
    """Follow the flow that SAM's limit is, by Euler's steps, each followed by Newton's back to the manifold.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params)`` is a scalar, three times differentiable, made of operations that ``torch.func.vmap`` takes.
    params : Tensor of shape (d,)
        A flat vector, d at most 2,000; it is brought to a minimiser first. float64 is advised.
    kind : {"worst", "ascent", "average"}
        What is lowered: lambda_1 (full-batch SAM), lambda_M, or the trace (SAM with single samples).
    time : float
        tau, at least 0: eta rho^2 times the steps of SAM.
    n_steps : int, default=200
        Euler's steps, at least 1; each writes out the Hessian.
    tol : float, default=1e-8
        Length of the gradient at which a point counts as a minimiser, greater than 0; what rounding leaves of it is added.

    Returns
    -------
    FlowResult
        The path, its end, and what was lowered at each of its points.

    Raises
    ------
    ValueError
        If an argument is out of its range, ``loss_fn`` returns no scalar or nothing finite, no minimiser is found
        within 50 steps of Newton, or the eigenvalue that is followed meets another.

    Notes
    -----
    1. "average" is the trace itself, not its mean over directions: the speed is that of SAM with single samples.

    References
    ----------
    Wen, Ma, Li. How Sharpness-Aware Minimization Minimizes Sharpness? ICLR 2023. Theorems of Sections 4 and 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import limit_flow
    >>> def valley(x):  # minimisers at x[1] = 0, whose curvature 4 + (x[0] - 1)^2 differs
    ...     return (4 + (x[0] - 1) ** 2) * x[1] ** 2 / 2
    >>> flow = limit_flow(valley, torch.zeros(2, dtype=torch.float64), "worst", time=1.0, n_steps=20)
    >>> round(flow.params[0].item(), 1)  # 1 - 1 / e, by large steps
    0.6
    """
    one_of("kind", kind, KINDS)
    at_least("time", time, 0.0)
    integer("n_steps", n_steps, 1)
    at_least("tol", tol, 0.0, strict=True)
    loss_fn, x, _ = _point(loss_fn, params)
    x, spectrum = _to_manifold(loss_fn, x, tol)
    path, values = [x], []
    for step in range(n_steps + 1):
        eigenvalues, vectors, normal = spectrum
        values.append(eigenvalues.sum() if kind == "average" else eigenvalues[_followed(kind, normal)])
        if step == n_steps:
            break
        if kind == "average":
            slope = _slope_of_trace(loss_fn, x)
        else:
            which = _followed(kind, normal)
            _is_simple(eigenvalues, which)
            slope = torch.func.grad(_curvature(loss_fn, vectors[:, which]))(x).detach()
        tangent = vectors[:, ~normal]
        x = x - time / n_steps / 2 * tangent @ (tangent.mT @ slope)
        x, spectrum = _to_manifold(loss_fn, x, tol)
        path.append(x)
    return FlowResult(x, torch.stack(path), torch.stack(values))


def _followed(kind: str, normal: Tensor) -> int:
    """Return the index of the eigenvalue: the last, or the first that is not zero."""
    return len(normal) - 1 if kind == "worst" else int(normal.nonzero()[0])


def _is_simple(values: Tensor, which: int) -> None:
    others = torch.cat([values[:which], values[which + 1 :]])
    if len(others) and bool((others - values[which]).abs().min() < GAP * values[-1]):
        raise ValueError(
            f"loss_fn must have a simple eigenvalue to follow, got {float(values[which]):g} twice: "
            "the flow is not defined there"
        )


def _curvature(loss_fn: Loss, v: Tensor) -> Callable[[Tensor], Tensor]:
    """Return x -> v^T H(x) v."""

    def along(x: Tensor) -> Tensor:
        return v @ torch.func.grad(loss_fn)(x)

    return lambda x: v @ torch.func.grad(along)(x)


def _slope_of_trace(loss_fn: Loss, x: Tensor) -> Tensor:
    def some(v: Tensor) -> Tensor:
        return torch.func.grad(lambda x: torch.vmap(lambda v: _curvature(loss_fn, v)(x))(v).sum())(x)

    return sum((some(v) for v in torch.eye(len(x)).to(x).split(_at_once(x))), torch.zeros_like(x)).detach()


def _to_manifold(loss_fn: Loss, x: Tensor, tol: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return a minimiser near x by Newton's steps in the normal space, and the Hessian's spectrum there.

    The spectrum is eigenvalues, eigenvectors, and which of them span the normal space.
    """
    for _ in range(NEWTON + 1):
        gradient = torch.func.grad(loss_fn)(x).detach()
        values, vectors = torch.linalg.eigh(_hessian(loss_fn, x))
        largest = values[-1]
        normal = values > ZERO * largest
        rest = 16 * torch.finfo(x.dtype).eps * largest.abs() * torch.linalg.vector_norm(x).clamp_min(1.0)
        if bool(torch.linalg.vector_norm(gradient) <= tol + rest):
            if not bool(largest > 0) or bool(values[0] < -1e-3 * largest):
                raise ValueError(
                    "params must lead to a minimiser with a positive curvature, got eigenvalues of the "
                    f"Hessian from {float(values[0]):g} to {float(largest):g}"
                )
            return x, (values, vectors, normal)
        span = vectors[:, normal]
        x = x - span @ ((span.mT @ gradient) / values[normal])
        if not (bool(normal.any()) and bool(x.isfinite().all())):
            break
    raise ValueError(
        f"params must be near a minimiser of loss_fn, found none within {NEWTON} steps of Newton"
    )
