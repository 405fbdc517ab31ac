"""Priors: what an unconditional generative model expects of the image behind a noisy one, ``E[x_0 | x_t]``.

``x_t = sqrt(ab) x_0 + sqrt(1 - ab) noise`` with a schedule's ``ab`` in [0, 1], 1 at the image. A prior is any object
with ``denoise(x, alpha_bar)``; here are a user's diffusion network, and a mixture of Gaussians in closed form.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import wide, widened
from posterity._random import draw_device

__all__ = ["GaussianMixturePrior", "NetPrior"]

Alpha = Float[Tensor, ""]
BETAS = (0.1, 20.0)  # rates of noise of the default schedule, at the image and at the noise


class NetPrior(nn.Module):
    """A diffusion network as a prior.

    Parameters
    ----------
    net : callable
        ``net(x, t)`` with ``x`` of shape (n, *shape) and ``t`` of shape (n,), 0 at the noise and 1 at the data.
    prediction : {"epsilon", "x0", "v"}, default="epsilon"
        What it returns: the noise, the image, or ``sqrt(ab) noise - sqrt(1 - ab) image``.
    alpha_bar : callable, optional
        The schedule that it was trained on, ``alpha_bar(t)`` for ``t`` of shape (n,) in float64, rising in t. By
        default that of variance-preserving diffusion, whose rate of noise falls linearly from 20 to 0.1.

    Raises
    ------
    ValueError
        If ``prediction`` is unknown, or a schedule does not rise.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import NetPrior
    >>> prior = NetPrior(lambda x, t: torch.zeros_like(x))  # sees no noise
    >>> prior.denoise(torch.ones(1, 2), torch.tensor(0.25))
    tensor([[2., 2.]])
    """

    def __init__(
        self, net: Callable[..., Any], *, prediction: Literal["epsilon", "x0", "v"] = "epsilon",
        alpha_bar: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not callable(net):
            raise ValueError(f"net must be callable, got {type(net).__name__}")
        self.net = net
        self.prediction = one_of("prediction", prediction, ("epsilon", "x0", "v"))
        self.alpha_bar = _vp if alpha_bar is None else alpha_bar

    def denoise(self, x: Float[Tensor, " n *shape"], alpha_bar: Alpha) -> Float[Tensor, " n *shape"]:
        """Return the expected images behind noisy ones.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            At this level of noise; in no other range than the network was trained for.
        alpha_bar : Tensor
            A scalar in (0, 1].

        Returns
        -------
        Tensor of shape (n, *shape)
        """
        t = self._time(alpha_bar).to(x.device, x.dtype)
        found = self.net(x, t.expand(len(x)))
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"net must return the shape that it gets, {tuple(x.shape)}, got {got}")
        ab = alpha_bar.to(x.device, wide(x).dtype)
        if self.prediction == "x0":
            return found
        if self.prediction == "v":
            return (ab.sqrt() * x - (1 - ab).sqrt() * found).to(x.dtype)
        return ((x - (1 - ab).sqrt() * found) / ab.sqrt()).to(x.dtype)

    def _time(self, alpha_bar: Alpha) -> Tensor:
        """Return the time of a level of noise, by bisection of the schedule."""
        wanted = alpha_bar.detach().double().cpu()
        low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            reached = torch.as_tensor(self.alpha_bar(middle)).cpu() >= wanted
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        ends = [float(self.alpha_bar(torch.full((1,), end, dtype=torch.float64))) for end in (0.0, 1.0)]
        if not ends[0] < ends[1]:
            raise ValueError(
                f"alpha_bar must rise from noise to data, got {ends[0]:g} at 0 and {ends[1]:g} at 1"
            )
        return high


def _vp(t: Tensor) -> Tensor:
    s = 1 - t
    return torch.exp(-(BETAS[0] * s + (BETAS[1] - BETAS[0]) * s**2 / 2))


class GaussianMixturePrior(nn.Module):
    """A mixture of Gaussians, whose ``E[x_0 | x_t]`` is known: the posterior mean of each component, by its share.

    Parameters
    ----------
    means : Tensor of shape (K, *shape)
        Of K components.
    covariances : Tensor of shape (K, d, d)
        Positive semi-definite; d is the number of elements of a sample.
    weights : Tensor of shape (K,)
        Positive; scaled to sum to 1.

    Raises
    ------
    ValueError
        If shapes do not fit, weights are not positive, or a covariance is not positive semi-definite.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import GaussianMixturePrior
    >>> prior = GaussianMixturePrior(torch.zeros(1, 2), 3 * torch.eye(2)[None], torch.ones(1))
    >>> prior.denoise(torch.ones(1, 2), torch.tensor(0.25))  # 3 * 0.5 / (3 * 0.25 + 0.75)
    tensor([[1., 1.]])
    """

    mean: Tensor
    bases: Tensor
    spreads: Tensor
    log_weights: Tensor

    def __init__(
        self, means: Float[Tensor, " k *shape"], covariances: Float[Tensor, "k d d"], weights: Float[Tensor, " k"]
    ) -> None:  # fmt: skip
        super().__init__()
        means, covariances, weights = (
            finite(name, floating(name, value)).detach().double()
            for name, value in (("means", means), ("covariances", covariances), ("weights", weights))
        )
        if means.ndim < 2 or not means.numel():
            raise ValueError(f"means must have shape (components, *sample), got {tuple(means.shape)}")
        k, d = len(means), means[0].numel()
        has_shape("covariances", covariances, (k, d, d), "means")
        has_shape("weights", weights, (k,), "means")
        if not bool((weights > 0).all()):
            raise ValueError("weights must be positive, got one that is not")
        spreads, bases = torch.linalg.eigh((covariances + covariances.mT) / 2)
        if bool((spreads < -1e-9 * spreads.abs().amax(1, keepdim=True)).any()):
            raise ValueError("covariances must be positive semi-definite, got a negative eigenvalue")
        self.shape = means.shape[1:]
        self.register_buffer("mean", means.flatten(1))
        self.register_buffer("bases", bases)  # (K, d, d): columns are directions
        self.register_buffer("spreads", spreads.clamp_min(0))  # (K, d): variances along them
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    @classmethod
    def fit(
        cls, x: Float[Tensor, " n *shape"], n_components: int = 20, *, reg: float = 3e-2, random_state: int | None = None
    ) -> "GaussianMixturePrior":  # fmt: skip
        """Return a mixture fitted by scikit-learn's EM.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            At least ``n_components`` samples.
        n_components : int, default=20
        reg : float, default=3e-2
            Added to each variance, at least 0: images leave directions without any.
        random_state : int, optional
            Of the start.

        Returns
        -------
        GaussianMixturePrior
        """
        finite("x", floating("x", x))
        integer("n_components", n_components, 1)
        at_least("reg", reg, 0)
        if x.ndim < 2 or len(x) < max(2, n_components):
            raise ValueError(
                f"x must have at least {max(2, n_components)} samples, got shape {tuple(x.shape)}"
            )
        flat = x.detach().flatten(1).cpu().double().numpy()
        found = GaussianMixture(n_components, reg_covar=reg, random_state=random_state).fit(flat)
        made = (np.asarray(part) for part in (found.means_, found.covariances_, found.weights_))
        means, covariances, weights = (torch.from_numpy(part).to(x.device) for part in made)
        return cls(means.reshape(n_components, *x.shape[1:]), covariances, weights)

    @widened
    def denoise(self, x: Float[Tensor, " n *shape"], alpha_bar: Alpha) -> Float[Tensor, " n *shape"]:
        """Return the expected samples behind noisy ones.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
        alpha_bar : Tensor
            A scalar in [0, 1].

        Returns
        -------
        Tensor of shape (n, *shape)
        """
        mean, bases, spreads, _ = self._cast(x)
        s, along, noisy, share = self._parts(x, alpha_bar)
        gain = s * spreads / noisy.clamp_min(torch.finfo(spreads.dtype).tiny)
        gain = torch.where(noisy > 0, gain, 1.0)  # no noise, no spread: what is seen is what is there
        inside = torch.einsum("nke,kde->nkd", along * gain, bases)
        return torch.einsum("nk,nkd->nd", share, mean + inside).reshape(x.shape).to(x.dtype)

    @widened
    def log_prob(self, x: Float[Tensor, " n *shape"]) -> Float[Tensor, " n"]:
        """Return the log density of samples.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)

        Returns
        -------
        Tensor of shape (n,)
        """
        return self._log_parts(x, torch.ones((), dtype=torch.float64))[3].logsumexp(1).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, " n *shape"]:
        """Return independent samples.

        Parameters
        ----------
        n : int
            At least 0.
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape (n, *shape)
            In float64, on the device of the prior.
        """
        integer("n", n, 0)
        device = draw_device(generator)
        uniform = torch.rand(n, 1, generator=generator, dtype=torch.float64, device=device).to(
            self.mean.device
        )
        mean, bases, spreads, log_weights = self._cast(uniform)  # also where the module was cast to less
        which = (uniform > log_weights.exp().cumsum(0)[:-1]).sum(1)
        normal = torch.randn(n, self.mean.shape[1], generator=generator, dtype=torch.float64, device=device)
        stretched = normal.to(mean.device) * spreads[which].sqrt()
        return (mean[which] + torch.einsum("ne,nde->nd", stretched, bases[which])).reshape(n, *self.shape)

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = (self.mean, self.bases, self.spreads, self.log_weights)
        return tuple(part.to(wide(x).dtype) for part in parts)  # type: ignore[return-value]

    def _parts(self, x: Tensor, alpha_bar: Alpha) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sqrt(ab), deviations along each component's directions, their variances, and shares."""
        s, along, noisy, logs = self._log_parts(x, alpha_bar)
        return s, along, noisy, logs.softmax(1)

    def _log_parts(self, x: Tensor, alpha_bar: Alpha) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        has_shape("x", x, (None, *self.shape), "the prior")
        mean, bases, spreads, log_weights = self._cast(x)
        ab = alpha_bar.to(mean)
        s = ab.sqrt()
        # one product for all components, less what their means contribute
        along = torch.einsum("nd,kde->nke", wide(x).flatten(1), bases) - s * torch.einsum(
            "kd,kde->ke", mean, bases
        )
        noisy = ab * spreads + (1 - ab)
        safe = noisy.clamp_min(1e-30)
        logs = log_weights - 0.5 * (along.square() / safe + safe.log() + math.log(2 * math.pi)).sum(2)
        return s, along, noisy, logs
