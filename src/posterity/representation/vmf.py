"""The normalising constant of the von Mises-Fisher law, to twelve digits for any dimension, and its mixture's logits.

The density exp(kappa mu.y) C_p(kappa) on the unit sphere of R^p has, with nu = p/2 - 1,

    log C_p(kappa) = nu log kappa - (nu + 1) log(2 pi) - log I_nu(kappa) .

I_N is taken from Debye's uniform expansion, whose logarithm is summed and differentiated as a polynomial, at an order
N of 32 or more. From p = 66 on N is nu itself; orders below come by the recurrence of the ratios r_m = I_{m+1} / I_m,
downwards, where it is stable: r_{m-1} = kappa / (2 m + kappa r_m). The ratio at nu is minus the derivative, so that
both come at once; the derivative of the ratio is 1 - r^2 - (p - 1) r / kappa. All powers of kappa cancel before
anything is evaluated, so that small and large ones need no series of their own.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import wide

__all__ = ["vmf_log_normalizer", "vmf_logits"]

ORDER = 32  # from which on the expansion is exact to rounding
SMALL = 1e-6  # below which the ratio is kappa / p
PART = 2**15  # numbers at a time, whose temporaries stay in the cache
DEBYE = (  # of the logarithm's term k: coefficients of t^k, t^(k + 2), ..., t^(3 k)
    (1 / 8, -5 / 24),
    (1 / 16, -3 / 8, 5 / 16),
    (25 / 384, -531 / 640, 221 / 128, -1105 / 1152),
    (13 / 128, -71 / 32, 531 / 64, -339 / 32, 565 / 128),
    (1073 / 5120, -50049 / 7168, 186821 / 4608, -44899 / 512, 82825 / 1024, -82825 / 3072),
    (103 / 192, -405 / 16, 1677 / 8, -5389 / 8, 65385 / 64, -11805 / 16, 19675 / 96),
)


def vmf_log_normalizer(kappa: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """Return the logarithm of the normalising constant of the von Mises-Fisher law, elementwise.

    Parameters
    ----------
    kappa : Tensor
        Precisions, at least 0.
    dim : int
        p, of the space whose unit sphere it is, at least 2.

    Returns
    -------
    Tensor
        Computed in float64, in the dtype of ``kappa``; differentiable twice and more. It falls with kappa.

    Raises
    ------
    ValueError
        If ``kappa`` is not a floating-point tensor or, on the CPU, has negative numbers, or ``dim`` is below 2.

    References
    ----------
    .. [1] Govindarajan, Siden, Roll, Lindsten. DINO as a von Mises-Fisher mixture model. ICLR 2023. Section 3.
    .. [2] NIST Digital Library of Mathematical Functions, 10.41.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import vmf_log_normalizer
    >>> round(float(vmf_log_normalizer(torch.tensor(2.0), 3)), 3)  # log(2 / (4 pi sinh 2))
    -3.126
    """
    floating("kappa", kappa)
    integer("dim", dim, 2)
    if kappa.device.type == "cpu" and bool((kappa.detach() < 0).any()):
        raise ValueError(f"kappa must not be negative, got {float(kappa.detach().min())}")
    exact = kappa.float() if kappa.device.type == "mps" else kappa.double()
    if torch.is_grad_enabled() and exact.requires_grad:
        return _LogNormalizer.apply(exact, dim)[0].to(kappa.dtype)  # type: ignore[index]
    return _in_parts(exact, dim, slope=False)[0].to(kappa.dtype)  # as for a teacher


def vmf_logits(
    y: Float[Tensor, "n p"], weight: Float[Tensor, "k p"], temperature: float
) -> Float[Tensor, "n k"]:
    """Return the logits of a mixture of von Mises-Fisher laws: ``y w_k / t + log C_p(|w_k| / t)``.

    Parameters
    ----------
    y : Tensor of shape (n, p)
        Unit rows.
    weight : Tensor of shape (K, p)
        Prototypes: the direction is that of a law's mean, the norm over the temperature is its precision.
    temperature : float
        t, positive.

    Returns
    -------
    Tensor of shape (n, K)
        In float32 at least: the constants are some hundreds, of which bfloat16 keeps no digit after the point.

    Raises
    ------
    ValueError
        If an argument does not fit, or on the CPU a row of ``y`` is not of norm 1.

    References
    ----------
    .. [1] Govindarajan, Siden, Roll, Lindsten. DINO as a von Mises-Fisher mixture model. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import vmf_logits
    >>> y = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    >>> vmf_logits(y, torch.randn(3, 4), temperature=0.1).softmax(1).shape
    torch.Size([5, 3])
    """
    if floating("y", y).ndim != 2 or y.shape[1] < 2:
        raise ValueError(f"y must have two columns at least, and rows of norm 1, got shape {tuple(y.shape)}")
    has_shape("weight", floating("weight", weight), (None, y.shape[1]), "y")
    at_least("temperature", temperature, 0, strict=True)
    if y.device.type == "cpu":
        off = (wide(y.detach()).norm(dim=1) - 1).abs()
        if bool((off > max(1e-3, 4 * torch.finfo(y.dtype).eps)).any()):
            raise ValueError(f"y must have rows of norm 1, one is {float(off.max()):.2g} off")
    with torch.autocast(y.device.type, enabled=False):
        y, weight = wide(y), wide(weight).to(wide(y).dtype)
        constant = vmf_log_normalizer(weight.norm(dim=1) / temperature, weight.shape[1])
        return torch.addmm(constant, y, weight.T, alpha=1 / temperature)


class _LogNormalizer(torch.autograd.Function):
    """log C_p and the mean length of the law, I_{nu+1} / I_nu, which gives the derivatives of both."""

    @staticmethod
    def forward(kappa: Tensor, dim: int) -> tuple[Tensor, ...]:
        return _in_parts(kappa, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
        kappa, ctx.dim = inputs
        ctx.save_for_backward(kappa, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor | None, of_ratio: Tensor | None) -> tuple[Tensor | None, None]:
        kappa, ratio = ctx.saved_tensors
        grad = None if of_value is None else -of_value * ratio
        if of_ratio is not None:  # a second derivative
            small = kappa < SMALL
            per = torch.where(small, 1 / ctx.dim, ratio / torch.where(small, 1.0, kappa))
            slope = of_ratio * (1 - ratio**2 - (ctx.dim - 1) * per)
            grad = slope if grad is None else grad + slope
        return grad, None


def _in_parts(kappa: Tensor, dim: int, slope: bool = True) -> tuple[Tensor, ...]:
    parts = [_evaluated(part, dim, slope) for part in kappa.flatten().split(PART)]
    return tuple(torch.cat(each).view(kappa.shape) for each in zip(*parts, strict=True))


def _evaluated(kappa: Tensor, dim: int, slope: bool) -> tuple[Tensor, ...]:
    """Return log C_p and, for a slope, I_{nu+1} / I_nu."""
    nu = dim / 2 - 1
    steps = max(0, math.ceil(ORDER - nu))
    order = nu + steps
    coefficients = [0.0] * (3 * len(DEBYE) + 1)
    for k, row in enumerate(DEBYE, 1):
        for j, c in enumerate(row):
            coefficients[k + 2 * j] += c / order**k
    z = kappa / order
    root = torch.hypot(z, torch.ones_like(z))
    t, above = 1 / root, 1 + root
    # log I_N = N (root + log(z / (1 + root))) - log(2 pi N root) / 2 + P(t): N log z cancels with nu log kappa
    constant = nu * math.log(order) + 0.5 * math.log(2 * math.pi * order) - (nu + 1) * math.log(2 * math.pi)
    value = above.log().sub_(root).mul_(order).sub_(_polynomial(t, coefficients)).add_(constant)
    value.add_(root.log(), alpha=0.5 - steps)
    if not steps and not slope:
        return (value,)
    bend = _polynomial(t, [0.5, *(j * c for j, c in enumerate(coefficients) if j)])
    zt = z * t
    ratio = (z / above).sub_(bend.mul_(t).mul_(zt), alpha=1 / order)
    if steps:
        product = torch.ones_like(t)
        for m in range(steps, 0, -1):  # 2 m + kappa r over N root, which is of order 1 at every kappa
            below = (zt * ratio).add_(t, alpha=2 * (nu + m) / order)
            product.mul_(below)
            ratio = zt / below
        value.sub_(product.log())
    return value, ratio


def _polynomial(t: Tensor, coefficients: list[float]) -> Tensor:
    """Return the polynomial with these coefficients, of the lowest power first."""
    value = t * coefficients[-1]
    for c in reversed(coefficients[1:-1]):
        value.add_(c).mul_(t)
    return value.add_(coefficients[0])
