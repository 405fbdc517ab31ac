"""Forward gradients: a gradient from forward passes alone, unbiased, and how noisy it is.

A forward-mode pass along a random direction v, a dual forward pass, gives the number g^T v. With
E[v v^T] = I,

    E[(g^T v) v] = g,    E||(g^T v) v - g||^2 = (D + 1) ||g||^2,                              (1)

for normal v; D - 1 for signs (Rademacher). D is how many numbers are perturbed together, and m
draws divide it by m. Nothing is stored for a backward pass. What makes the estimate train is a
small D: perturb activations in the place of weights, each sample with noise of its own that only
its own loss is paired with,

    (dl_n / dz_n . v_n) v_n,                                                                  (2)

and D falls from the number of weights to the number of units; pair parts of z with losses of their
own, and it falls to the size of a part.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, one_of, scalar
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["activity_gradient", "estimator_variance", "forward_gradient"]

Distribution = Literal["normal", "rademacher"]


@torch.inference_mode(False)
@torch.no_grad()  # no graph, which would store what a forward pass need not
def forward_gradient(
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    params: dict[str, Tensor],
    *,
    n_samples: int = 1,
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return a loss and an unbiased estimate of its gradient by weight perturbation, equation 1.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params) -> scalar``; for a module
        ``lambda params: loss(torch.func.functional_call(net, params, x), y)``.
    params : dict of str to Tensor
        Floating-point tensors, at least one; left as they are.
    n_samples : int, default=1
        At least 1: directions, each a forward pass, whose estimates are averaged.
    distribution : {"normal", "rademacher"}, default="normal"
        Of the directions; signs have the lower variance.
    generator : torch.Generator, optional
        By default torch's global generator is read.

    Returns
    -------
    tuple of Tensor and dict of str to Tensor
        The loss, and for each name an estimate of the shape and dtype of its parameter.

    Raises
    ------
    ValueError
        If ``params`` is empty or holds an integer tensor, ``loss_fn`` returns no finite scalar, or an
        option is out of range.

    References
    ----------
    .. [1] Baydin, Pearlmutter, Syme, Wood, Torr. Gradients without Backpropagation. 2022. Theorem 1.
    .. [2] Ren, Kornblith, Liao, Hinton. Scaling Forward Gradient With Local Losses. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import forward_gradient
    >>> params = {"w": torch.tensor([3.0])}
    >>> forward_gradient(lambda p: p["w"].square().sum(), params, distribution="rademacher")  # D = 1: exact
    (tensor(9.), {'w': tensor([6.])})
    """
    _options(n_samples, distribution)
    if not isinstance(params, dict) or not params:
        raise ValueError("params must be a dictionary with at least one tensor, got none")
    point = {name: floating(f"params[{name!r}]", value).detach() for name, value in params.items()}
    loss = torch.zeros(())
    total = {name: torch.zeros_like(wide(value)) for name, value in point.items()}
    for _ in range(n_samples):
        v = {name: _draw(value, value.shape, distribution, generator) for name, value in point.items()}
        along = {name: v[name].to(value) for name, value in point.items()}
        loss, slope = jvp(partial(_scalar, loss_fn), (point,), (along,))[:2]
        finite("loss_fn(params)", loss)
        for name, each in v.items():
            total[name] += each * (wide(slope) / n_samples).to(each)
    return loss, {name: total[name].to(value.dtype) for name, value in point.items()}


@torch.inference_mode(False)
@torch.no_grad()
def activity_gradient(
    loss_fn: Callable[[Tensor], Tensor],
    z: Float[Tensor, " batch *rest"],
    *,
    n_samples: int = 1,
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " batch *lead"], Float[Tensor, " batch *rest"]]:
    """Return losses and an unbiased estimate of their gradients by activity perturbation, equation 2.

    Each loss is paired with the slice of ``z`` at its own index alone, so the estimate is unbiased
    for the gradient of a loss in its own slice, whatever it also depends on; the variance is that of
    equation 1 with D the size of a slice. A layer ``z = x @ w`` then has the gradient
    ``x.T @ estimate / len(x)`` of the mean loss, without a backward pass.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(z) -> losses`` of shape (batch, *lead), lead being the first axes of ``rest``, or none.
    z : Tensor of shape (batch, *rest)
        Activations, at least one sample; left as they are.
    n_samples : int, default=1
        At least 1: directions, each a forward pass, whose estimates are averaged.
    distribution : {"normal", "rademacher"}, default="normal"
        Of the directions; signs have the lower variance.
    generator : torch.Generator, optional
        By default torch's global generator is read.

    Returns
    -------
    tuple of Tensor
        The losses, and the estimate, of the shape and dtype of ``z``.

    Raises
    ------
    ValueError
        If ``z`` is no floating-point tensor with a sample, ``loss_fn`` returns losses whose shape is no
        prefix of that of ``z`` or that are not finite, or an option is out of range.

    References
    ----------
    .. [1] Ren, Kornblith, Liao, Hinton. Scaling Forward Gradient With Local Losses. ICLR 2023. Sections 3
       and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import activity_gradient
    >>> z = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> activity_gradient(lambda z: z.square(), z, distribution="rademacher")  # a loss each: exact
    (tensor([[ 1.,  4.],
            [ 9., 16.]]), tensor([[2., 4.],
            [6., 8.]]))
    """
    _options(n_samples, distribution)
    if floating("z", z).ndim == 0 or z.numel() == 0:
        raise ValueError(f"z must have a batch axis and at least one value, got shape {tuple(z.shape)}")
    z, losses = z.detach(), z
    total = torch.zeros_like(wide(z))
    for _ in range(n_samples):
        v = _draw(z, z.shape, distribution, generator)
        losses, slope = jvp(partial(_own, loss_fn), (z,), (v.to(z),))[:2]
        finite("loss_fn(z)", losses)
        total += v * (wide(slope) / n_samples).reshape(*slope.shape, *[1] * (z.ndim - slope.ndim))
    return losses, total.to(z.dtype)


def estimator_variance(
    estimate: Callable[[torch.Generator], Tensor],
    true: Float[Tensor, "*shape"],
    *,
    n_draws: int = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Measure bias and variance of an estimator over independent draws.

    Parameters
    ----------
    estimate : callable
        ``estimate(generator) -> Tensor`` of the shape of ``true``.
    true : Tensor
        What it should be on average.
    n_draws : int, default=256
        At least 2.
    generator : torch.Generator, optional
        Handed on; by default torch's global generator.

    Returns
    -------
    dict of str to Tensor
        Scalars, in float32 at least: ``"bias"``, the norm of the mean less ``true``, which for an unbiased
        estimator is about the root of variance / n_draws; ``"variance"``, E||estimate - its mean||^2
        without bias; ``"cosine"``, that of the mean with ``true``.

    Raises
    ------
    ValueError
        If ``n_draws`` is below 2, or ``estimate`` does not return the shape of ``true``.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import estimator_variance
    >>> rng = torch.Generator().manual_seed(0)
    >>> coin = lambda rng: 2.0 * torch.randint(2, (1,), generator=rng)  # 0 or 2
    >>> found = estimator_variance(coin, torch.ones(1), n_draws=1000, generator=rng)
    >>> round(float(found["variance"]), 1), round(float(found["bias"]), 1)
    (1.0, 0.0)
    """
    integer("n_draws", n_draws, 2)
    true = wide(floating("true", true).detach())
    rng = torch.default_generator if generator is None else generator
    mean, squares = torch.zeros_like(true), true.new_zeros(())
    for k in range(1, n_draws + 1):  # Welford: the squares about the mean so far
        draw = wide(floating("estimate(generator)", estimate(rng)).detach())
        apart = has_shape("estimate(generator)", draw, true.shape, "true").to(true) - mean
        mean = mean + apart / k
        squares = squares + apart.square().sum() * ((k - 1) / k)
    cosine = F.cosine_similarity(mean.flatten(), true.flatten(), dim=0)
    return {
        "bias": (mean - true).square().sum().sqrt(),
        "variance": squares / (n_draws - 1),
        "cosine": cosine,
    }


def _draw(
    like: Tensor, shape: tuple[int, ...], distribution: Distribution, generator: torch.Generator | None
) -> Tensor:
    """Return noise of mean 0 and covariance I on the device of a tensor, in float32 at least."""
    device, dtype = draw_device(generator, like.device), wide(like.new_empty(0)).dtype
    if distribution == "normal":
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).to(like.device)
    sign = torch.randint(2, shape, generator=generator, device=device, dtype=dtype)
    return sign.mul_(2).sub_(1).to(like.device)


def _options(n_samples: int, distribution: str) -> None:
    integer("n_samples", n_samples, 1)
    one_of("distribution", distribution, ("normal", "rademacher"))


def _scalar(loss_fn: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> Tensor:
    return floating("what loss_fn returns", scalar("loss_fn", loss_fn(params)))


def _own(loss_fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    value = loss_fn(z)
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
    if not fits or value.shape != z.shape[: value.ndim]:
        raise ValueError(
            "loss_fn must return floating-point losses whose shape begins that of z, "
            f"{tuple(z.shape)}, got {_shown(value)}"
        )
    return value


def _shown(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
