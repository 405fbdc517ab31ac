"""The evidence of several outputs whose kernels mix the same components.

Latent process j has mean m_j and squared exponential kernel k_j; output i mixes all of them with
weights a_ij, so its observations have

    mean  sum_j a_ij m_j,        covariance  K_i = sum_j a_ij^2 k_j + noise_i I.             (1)

All K_i are one matrix product of squared weights and components, and are factorised in one batch.
The gradient of an evidence, in closed form, costs one inverse from the factor it has anyway.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from posterity.uncertainty.output_attention import _attention
from posterity.uncertainty.sinh_arcsinh import _warp

__all__: list[str] = []

NOISE_FLOOR = 1e-4
ONE = math.log(math.e - 1)  # softplus(ONE) = 1


class _Prior(NamedTuple):
    """All that a fit learns; ``flows`` is None without a transform."""

    attention: Tensor
    lengthscale: Tensor
    outputscale: Tensor
    mean: Tensor
    noise: Tensor
    flows: Tensor | None


def _start(s: int, d: int | None, n_flows: int, seed: int, like: Tensor) -> dict[str, Tensor]:
    """Return the unconstrained parameters: W Xavier uniform, B standard normal, all else 0."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(s, s, s, generator=generator, dtype=torch.float64)
    raw = {
        "weight": 1.414 * math.sqrt(3 / s) * (2 * uniform - 1),
        "bias": torch.randn(s, s, s, generator=generator, dtype=torch.float64),
        "lengthscale": torch.zeros(s) if d is None else torch.zeros(s, d),
        **{name: torch.zeros(s) for name in ("outputscale", "mean", "noise")},
    }
    if n_flows:
        raw["flows"] = torch.zeros(n_flows, 4, s)
    return {name: value.to(like).requires_grad_() for name, value in raw.items()}


def _constrain(raw: dict[str, Tensor], gram: Float[Tensor, "s s"]) -> _Prior:
    flows = raw.get("flows")
    if flows is not None:  # at 0 each map is the identity, and weight decay leads back to it
        a, b, c, d = flows.unbind(1)
        flows = torch.stack([a, F.softplus(b + ONE), c, F.softplus(d + ONE)], 1)
    return _Prior(
        _attention(gram, raw["weight"], raw["bias"], 0.2),
        F.softplus(raw["lengthscale"]),
        F.softplus(raw["outputscale"]),
        raw["mean"],
        F.softplus(raw["noise"]) + NOISE_FLOOR,
        flows,
    )


def _squared_distances(a: Float[Tensor, "*s n d"], b: Float[Tensor, "*s m d"]) -> Float[Tensor, "*s n m"]:
    center = b.mean(-2, keepdim=True)  # squares of centred inputs do not cancel
    a, b = a - center, b - center
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (squares - 2 * a @ b.mT).clamp_min(0)


def _bases(
    prior: _Prior, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], squared: Tensor | None = None
) -> Float[Tensor, "s n m"]:
    """Return the kernel of each latent process at variance 1."""
    scale = prior.lengthscale
    if scale.ndim == 2:
        return (-0.5 * _squared_distances(a / scale[:, None], b / scale[:, None])).exp()
    squared = _squared_distances(a, b) if squared is None else squared
    return (squared * (-0.5 * scale.pow(-2))[:, None, None]).exp()


def _mixed(prior: _Prior, bases: Float[Tensor, "s n m"]) -> Float[Tensor, "s n m"]:
    """Return the covariance of each output without noise: sum_j a_ij^2 k_j, one matrix product."""
    return ((prior.attention.square() * prior.outputscale) @ bases.flatten(1)).view_as(bases)


def _variance(prior: _Prior) -> Float[Tensor, " s"]:
    return prior.attention.square() @ prior.outputscale


def _evidence(
    prior: _Prior, x: Float[Tensor, "n d"], y: Float[Tensor, "s n"], mask: Bool[Tensor, "s n"],
    squared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the log-density of each output, the Cholesky factors, and K^-1 (y - mean)."""
    z, stretch = y, y.new_zeros(())
    if prior.flows is not None:
        z, stretch = _warp(prior.flows, y)
    covariance = _mixed(prior, _bases(prior, x, x, squared))
    noise = prior.noise[:, None].expand_as(z)
    residual = z - (prior.attention @ prior.mean)[:, None]
    if not bool(mask.all()):  # a row not observed is alone, with variance 1 and residual 0
        covariance = covariance * (mask[:, :, None] & mask[:, None, :])
        noise = torch.where(mask, noise, 1 - covariance.diagonal(dim1=1, dim2=2))
        residual, stretch = residual * mask, stretch * mask
    density, factor, alpha = _Gaussian.apply(covariance, noise, residual)
    constant = 0.5 * math.log(2 * math.pi) * mask.to(y.dtype).sum(1)
    return density - constant + stretch.sum(-1), factor, alpha


class _Gaussian(torch.autograd.Function):
    """Log-density of residuals under N(0, covariance + diag(noise)), without its constant.

    The gradient in closed form, (alpha alpha' - K^-1) / 2, costs one inverse from the factor;
    autograd would solve with the factor several times.
    """

    @staticmethod
    def forward(
        ctx: Any, covariance: Tensor, noise: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor = _cholesky(covariance, noise)
        alpha = torch.cholesky_solve(residual[:, :, None], factor)[:, :, 0]
        ctx.save_for_backward(factor, alpha)
        ctx.mark_non_differentiable(factor, alpha)
        logdet = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return -0.5 * (residual * alpha).sum(1) - logdet, factor, alpha

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        factor, alpha = ctx.saved_tensors
        slope = torch.cholesky_inverse(factor).neg_()
        slope.baddbmm_(alpha[:, :, None], alpha[:, None]).mul_(0.5 * grads[0][:, None, None])
        return slope, slope.diagonal(dim1=1, dim2=2), -grads[0][:, None] * alpha


def _cholesky(covariance: Float[Tensor, "s n n"], noise: Float[Tensor, "s n"]) -> Float[Tensor, "s n n"]:
    """Factorise covariance + diag(noise), with jitter on the diagonal only if it is needed."""
    for jitter in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        matrix = covariance.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(noise + jitter)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info.any()):
            return factor
    raise ValueError("a covariance is not positive definite, even with a jitter of 1e-4: lower lr")
