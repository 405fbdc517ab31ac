"""Sampling with a blind denoiser: climb the score it implies, with steps set by the noise it sees.

The residual of a least-squares denoiser is the score of the noisy density: y - E[x | y] =
-sigma^2 grad log p(y). It also tells sigma. From noise y_0,

    y_t = y_{t-1} - h f(y_{t-1}) + gamma z,   sigma = ||f|| / sqrt(N),
    gamma = sigma sqrt((1 - beta h)^2 - (1 - h)^2),                           (1)

so that the noise left in y falls by 1 - beta h a step. With beta = 1 nothing is added, and the
ascent goes to a mode; a small beta is slow and its samples differ.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer, within
from posterity._precision import wide
from posterity.generative._network import normal, steps
from posterity.generative.local_cnn import _resting

__all__ = ["Ascent", "ascend"]

DIVERGED = 1.5  # times the noise at the start, or 1


class Ascent(NamedTuple):
    """What `ascend` found.

    Attributes
    ----------
    sample : Tensor
        Samples, shape ``(n, *shape)``.
    sigmas : list of Tensor
        Of each sample, the noise that the network saw at each of its steps.
    n_steps : Tensor
        Steps of each sample, shape (n,).
    """

    sample: Float[Tensor, " n *shape"]
    sigmas: list[Float[Tensor, " steps"]]
    n_steps: Int[Tensor, " n"]


@torch.no_grad()
def ascend(
    net: Callable[[Tensor], Tensor], y0: Float[Tensor, " n *shape"], *,
    cond: Float[Tensor, " n *cond_shape"] | None = None, h0: float = 0.01, beta: float = 0.01,
    sigma_end: float = 0.01, fixed_step: bool = False, max_steps: int = 5000,
    generator: torch.Generator | None = None,
) -> Ascent:  # fmt: skip
    """Turn noise into samples of the density whose denoiser a network is, without gradients.

    Each sample stops when its noise is ``sigma_end`` of its deviation, and is then denoised once.

    Parameters
    ----------
    net : callable
        Returns the noise in what it is given, in its shape. A module is used in eval mode.
    y0 : Tensor of shape (n, *shape)
        Where to start: noise of a deviation that the network knows, two values a sample or more.
    cond : Tensor, optional
        What the samples are conditioned on, handed to the network in front of them along
        dimension 1.
    h0 : float, default=0.01
        First step, in (0, 1). Steps grow as ``h0 t / (1 + h0 (t - 1))``, towards 1.
    beta : float, default=0.01
        In (0, 1]: 1 for no fresh noise.
    sigma_end : float, default=0.01
        Noise at the end, a positive part of a sample's standard deviation.
    fixed_step : bool, default=False
        Whether every step is ``h0``.
    max_steps : int, default=5000
        Most steps, at least 1. Samples that are not done by then are denoised as they are.
    generator : torch.Generator, optional
        Source of randomness for the fresh noise.

    Returns
    -------
    Ascent
        Samples, the noise at their steps, and how many those were.

    Raises
    ------
    ValueError
        If an argument is out of range, not finite, or shapes do not fit.
    RuntimeError
        If the noise of a sample grows beyond 1.5 (or that times its deviation at the start,
        where this is greater than 1), or is NaN.

    Warns
    -----
    RuntimeWarning
        If samples are unfinished after ``max_steps``.

    References
    ----------
    .. [1] Kadkhodaie, Simoncelli. Stochastic solutions for linear inverse problems using the
       prior implicit in a denoiser. NeurIPS 2021. Algorithm 1.
    .. [2] Kadkhodaie et al. Learning multi-scale local conditional probability models of images.
       ICLR 2023. Section 4.

    Examples
    --------
    The denoiser of a single image:

    >>> import torch
    >>> from posterity.generative import ascend
    >>> image = torch.tensor([[0.0, 1.0, 2.0]])
    >>> found = ascend(lambda y: y - image, torch.zeros(1, 3), h0=0.5, beta=1.0)
    >>> found.sample
    tensor([[0., 1., 2.]])
    """
    within("h0", h0, 0, 1, open_low=True, open_high=True)
    within("beta", beta, 0, 1, open_low=True)
    at_least("sigma_end", sigma_end, 0, strict=True)
    integer("max_steps", max_steps, 1)
    finite("y0", floating("y0", y0, "start from noise"))
    if y0.ndim < 2 or math.prod(y0.shape[1:]) < 2:
        raise ValueError(
            f"y0 must have shape (n, *shape) with two values a sample or more, got {tuple(y0.shape)}"
        )
    if cond is not None:
        finite("cond", floating("cond", cond, "scale images to floats in [0, 1]"))
        has_shape("cond", cond, (len(y0), None, *y0.shape[2:]), "y0")

    n, dtype, y = len(y0), y0.dtype, wide(y0).clone()
    limit = DIVERGED * _deviation(y).clamp_min(1) if n else y.new_zeros(0)
    n_steps = torch.full((n,), max_steps, device=y.device)
    going, seen = torch.arange(n, device=y.device), []  # samples that are not done, and their noise

    with _resting(net) as (field,):

        def residual(rows: Tensor) -> Tensor:
            return _noise_in("net", field, y[rows], None if cond is None else cond[rows], dtype)

        for t in steps(max_steps):
            if not len(going):
                break
            h = h0 if fixed_step else h0 * (t + 1) / (1 + h0 * t)
            noise = residual(going)
            sigma = noise.flatten(1).square().mean(1).sqrt()
            if not bool((sigma <= limit[going]).all()):  # NaN is not, either
                worst = float(sigma.nan_to_num(torch.inf).max())
                raise RuntimeError(f"the ascent diverges at step {t + 1}: the noise of a sample is {worst:.3g}; lower h0, or train the network on more noise")  # fmt: skip
            state = y[going] - h * noise
            if beta < 1:
                gamma = sigma * math.sqrt((1 - beta * h) ** 2 - (1 - h) ** 2)
                state += gamma.view(-1, *[1] * (y.ndim - 1)) * normal(
                    state.shape, state.dtype, state.device, generator
                )
            y[going] = state
            seen.append(sigma.new_zeros(n).index_copy_(0, going, sigma))
            done = sigma <= sigma_end * _deviation(state)
            n_steps[going[done]] = t + 1
            going = going[~done]
        sample = y - residual(torch.arange(n, device=y.device)) if n else y

    if len(going):
        warnings.warn(f"{len(going)} of {n} samples are unfinished after max_steps={max_steps}", RuntimeWarning, stacklevel=2)  # fmt: skip
    sigmas = [torch.stack(seen)[:k, i] for i, k in enumerate(n_steps.tolist())]
    return Ascent(sample.to(dtype), sigmas, n_steps)


def _deviation(y: Tensor) -> Tensor:
    return y.flatten(1).std(1)


def _noise_in(name: str, net: Any, noisy: Tensor, cond: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what a network of this dtype says, in float32 at least."""
    v = noisy.to(dtype) if cond is None else torch.cat([cond.to(dtype), noisy.to(dtype)], 1)
    noise = floating(f"{name}(v)", net(v))
    return wide(has_shape(f"{name}(v)", noise, noisy.shape, f"the noise in v of shape {tuple(v.shape)}"))
