"""Draws from the posterior of a linear model: solutions of least squares with random data.

A linear model with Jacobian J, curvature H of its data and prior N(0, I / lam) has the posterior
N(0, A^-1), A = J' H J + lam I. The solution of

    A z = sqrt(lam) a + J' H^(1/2) e,      a, e ~ N(0, I),                                  (1)

is a draw from it, since the right side has covariance A. No square root of A is needed, nor A
itself where a solver takes products.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import rounding, widened
from posterity._random import draw_device
from posterity.uncertainty.block_solvers import Block, _cg, _sgd

__all__ = ["sample_posterior"]

_JITTER = 1e-6  # of the largest curvature

Generator = torch.Generator | None


def sample_posterior(
    jacobian: Float[Tensor, "n o p"], curvature: Float[Tensor, "n o o"],
    prior_precision: float | Float[Tensor, " p"], n_samples: int, *,
    objective: Literal["low-variance", "standard"] = "low-variance",
    solver: Literal["cg", "cholesky", "sgd"] = "cg", tol: float = 1e-6, max_iter: int = 1_000,
    generator: Generator = None,
) -> Float[Tensor, "n_samples p"]:  # fmt: skip
    """Return draws from the posterior of a linear model whose Jacobian is given.

    Parameters
    ----------
    jacobian : Tensor
        J, of each data point's outputs.
    curvature : Tensor
        H, of each point's negative log-likelihood in its outputs: symmetric, no negative
        eigenvalue.
    prior_precision : float or Tensor
        Positive, one for all parameters or one each.
    n_samples : int
        How many draws.
    objective : {"low-variance", "standard"}, default="low-variance"
        Where the noise of a draw is put: all in the regulariser, or in targets of the data,
        where minibatches see it. Both have the same minimiser up to a jitter of 1e-6 of the
        largest entry on H.
    solver : {"cg", "cholesky", "sgd"}, default="cg"
        Conjugate gradients; dense algebra of size min(p, n o); or minibatches with momentum.
    tol : float, default=1e-6
        Residual at which iterations stop, relative to the right side of (1).
    max_iter : int, default=1000
        Most passes over the data.
    generator : torch.Generator, optional
        Decides the draws.

    Returns
    -------
    Tensor
        Draws from ``N(0, (sum_n J_n' H_n J_n + diag(prior_precision))^-1)``.

    Raises
    ------
    ValueError
        If shapes do not fit, the curvature is not positive semi-definite, or a number is out
        of range.

    Warns
    -----
    ConvergenceWarning
        If ``max_iter`` passes do not reach ``tol``.

    References
    ----------
    .. [1] Antoran et al. Sampling-based inference for large linear models, with application
       to linearised Laplace. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import sample_posterior
    >>> J, H = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 1)  # one point, sees one weight
    >>> z = sample_posterior(J, H, 1.0, 100_000, generator=torch.Generator().manual_seed(0))
    >>> (z.T @ z / 100_000).round(decimals=1)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    n, o, p = has_shape("jacobian", floating("jacobian", jacobian), (None, None, None)).shape
    if o == 0 or p == 0:
        raise ValueError(f"jacobian must have outputs and parameters, got shape {tuple(jacobian.shape)}")
    has_shape("curvature", floating("curvature", curvature), (n, o, o), "jacobian")
    integer("n_samples", n_samples, 1)
    one_of("objective", objective, ("low-variance", "standard"))
    one_of("solver", solver, ("cg", "cholesky", "sgd"))
    at_least("tol", tol, 0, strict=True)
    integer("max_iter", max_iter, 1)
    if isinstance(prior_precision, Tensor):
        precision = has_shape("prior_precision", prior_precision, (p,), "jacobian").to(jacobian)
        if not bool((finite("prior_precision", precision) > 0).all()):
            raise ValueError(f"prior_precision must be positive, got {float(precision.min())}")
    else:
        value = at_least("prior_precision", prior_precision, 0, strict=True)
        precision = jacobian.new_full((p,), value, dtype=torch.promote_types(jacobian.dtype, torch.float32))
    finite("jacobian", jacobian)
    slack = rounding(finite("curvature", curvature).dtype, 1e-4)
    return _draws(
        jacobian.detach(), curvature, precision, slack, n_samples, objective, solver, tol, max_iter, generator
    )


@widened
def _draws(
    jacobian: Tensor, curvature: Tensor, precision: Tensor, slack: float, n_samples: int, objective: str,
    solver: str, tol: float, max_iter: int, generator: Generator,
) -> Tensor:  # fmt: skip
    (n, o, p), curvature = jacobian.shape, curvature.to(jacobian)
    values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
    scale = curvature.abs().max() if n else 0.0
    if bool(((curvature - curvature.mT).abs() > slack * scale).any() or (values < -slack * scale).any()):
        raise ValueError("curvature must be symmetric without negative eigenvalues")
    values, tiny = values.clamp_min(0), torch.finfo(values.dtype).tiny
    low = objective == "low-variance"
    root = values.sqrt() if low else values / (values + max(_JITTER * scale, tiny)).sqrt()

    prior = _randn((n_samples, p), jacobian, generator) * precision.sqrt()  # lam w0
    e = _randn((n_samples, n, o), jacobian, generator)
    noise = torch.einsum("nij,nj,nkj,snk->sni", vectors, root, vectors, e)  # H eps or H^(1/2) e
    data = torch.einsum("nop,sno->sp", jacobian, noise)
    factor = (values.sqrt()[:, :, None] * vectors.mT @ jacobian).flatten(0, 1)  # J' H J = factor' factor
    if solver == "cholesky":
        return _cholesky(factor, precision, prior + data)
    diagonal = factor.square().sum(0) + precision
    start = torch.zeros_like(prior)
    if solver == "cg" or n == 0:
        return _cg(
            lambda z: z @ factor.T @ factor + precision * z, prior + data, start, diagonal, tol, max_iter
        ).z

    standard, rows = objective == "standard", -(-n // 8)

    def blocks() -> Iterator[Block]:
        for first in range(0, n, rows):
            part, own = factor[first * o : (first + rows) * o], slice(first, first + rows)
            targets = torch.einsum("nop,sno->sp", jacobian[own], noise[:, own]) if standard else 0.0
            yield 1 / -(-n // rows), lambda z, part=part: z @ part.T @ part, targets

    right = prior if standard else prior + data
    return _sgd(blocks, right, start, precision, diagonal, tol, max_iter).z


def _cholesky(factor: Tensor, precision: Tensor, right: Tensor) -> Tensor:
    """Solve with factor' factor + diag(precision), or with the dual matrix if that is smaller."""
    rows, p = factor.shape
    if rows >= p:
        chol = torch.linalg.cholesky(factor.T @ factor + precision.diag())
        return torch.cholesky_solve(right.T, chol).T
    z = right / precision
    dual = factor / precision @ factor.T
    chol = torch.linalg.cholesky(dual + torch.eye(rows, dtype=dual.dtype, device=dual.device))
    return z - torch.cholesky_solve(factor @ z.T, chol).T @ factor / precision


def _randn(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    where = draw_device(generator, like.device)
    return torch.randn(shape, dtype=like.dtype, device=where, generator=generator).to(like.device)
