"""An image prior out of small networks: a global one for a tiny image, local ones for each detail.

The density of an image is split over the levels of a Haar pyramid, x_j its means at level j and
d_j the details that they lack,

    p(x) = p(x_J) prod_j p(d_j | x_{j+1}),                                    (1)

and each condition is taken to reach a few pixels only, which span 2^{j+1} times as many of the
image: more than a network of the same field on pixels can see. Each factor is learned as its
least-squares denoiser,

    min_f  E || f(x_{j+1}, d_j + s z) - s z ||^2,                             (2)

with the means clean. One denoises from the small image to the large, enlarges by drawing details
for an image taken as means, and synthesises by drawing the means too.

A network is any ``net(v)`` that returns the noise in v and is not told its level; details come
behind their conditions: ``net(cat([low, noisy_detail], 1))``. Noise s is s / 2^{j+1} in those of level j.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, integer, one_of, within
from posterity._precision import wide
from posterity.generative._network import normal, uniform
from posterity.generative.haar_pyramid import Pictures, _halved, _pictured, _smallest, haar, inverse_haar
from posterity.generative.local_cnn import Blind, LocalCNN, _resting
from posterity.generative.score_ascent import _noise_in, ascend

__all__ = ["MultiscaleDenoiser"]


class MultiscaleDenoiser:
    """Denoise, enlarge and synthesise images by networks for the levels of a pyramid.

    It trains none of your networks: minimise ``loss`` at each level, in any order, for they share
    nothing. Images are in [0, 1] by convention; nothing is clipped.

    Parameters
    ----------
    low_net : callable
        ``low_net(v)`` of c channels returns the noise in the smallest image.
    detail_nets : sequence of callable
        ``detail_nets[j](v)`` takes 4c channels, clean means and noisy details, and returns the 3c
        of the noise in the details. Level 0 is the finest; none is a plain denoiser.
    channels : int, default=1
        Channels c of an image, at least 1.
    noise : tuple of float, default=(0.0, 1.0)
        Range of the noise to train for, as standard deviations in the full image, from 0 up.
        Levels are drawn as squares of uniform ones, so that more are small.
    rescale : bool, default=True
        Whether the smallest image is multiplied by a number from U[0, 1] in training. For a
        network without biases that makes up for noise beyond the range.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    Departures from the official code:

    1. One range of noise, in units of the image, serves all levels; the official range at a level
       is a multiple of the largest detail coefficient.
    2. Details start at ``sigma_start / 2^{j+1}``, the same noise in units of the image.
    3. A sampled low-pass is not stretched to [0, 0.8] before it is enlarged.

    References
    ----------
    .. [1] Kadkhodaie et al. Learning multi-scale local conditional probability models of images.
       ICLR 2023. Equations 3 to 8.

    Examples
    --------
    Networks that call all of the details, and none of the means, noise:

    >>> import torch
    >>> from posterity.generative import MultiscaleDenoiser
    >>> model = MultiscaleDenoiser(torch.zeros_like, [lambda v: v[:, 1:]])
    >>> model.denoise(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
    tensor([[[[0.2500, 0.2500],
              [0.2500, 0.2500]]]])
    """

    def __init__(
        self, low_net: Blind, detail_nets: Sequence[Blind], *, channels: int = 1,
        noise: tuple[float, float] = (0.0, 1.0), rescale: bool = True,
    ) -> None:  # fmt: skip
        if not isinstance(detail_nets, (Sequence, nn.ModuleList)):
            raise ValueError(f"detail_nets must be a sequence of networks, got {type(detail_nets).__name__}")
        self.low_net, self.detail_nets = low_net, list(detail_nets)
        for level in ("low", *range(len(self.detail_nets))):
            name, net = self._net(level)
            if not callable(net):
                raise ValueError(f"{name} must be callable, got {type(net).__name__}")
        if not isinstance(noise, Sequence) or len(noise) != 2:
            raise ValueError(f"noise must be two standard deviations, got {noise!r}")
        at_least("noise[1]", noise[1], at_least("noise[0]", noise[0], 0))
        self.channels = integer("channels", channels, 1)
        self.noise, self.rescale = (noise[0], noise[1]), rescale

    @classmethod
    def build(
        cls, n_scales: int = 3, *, channels: int = 1, receptive_field: int = 13,
        low_receptive_field: int = 43, n_layers: int = 21, width: int = 64, norm: bool = True,
        predict: Literal["noise", "clean"] = "noise", noise: tuple[float, float] = (0.0, 1.0),
        rescale: bool = True,
    ) -> "MultiscaleDenoiser":  # fmt: skip
        """Return a cascade of untrained `LocalCNN`.

        Parameters
        ----------
        n_scales : int, default=3
            Levels of details, at least 0.
        channels, noise, rescale
            As above.
        receptive_field, low_receptive_field : int, default=13 and 43
            Fields of the networks for details and for the smallest image.
        n_layers, width, norm, predict
            As in `LocalCNN`, the same for all.

        Returns
        -------
        MultiscaleDenoiser
        """
        c, levels = integer("channels", channels, 1), range(integer("n_scales", n_scales, 0))
        options: dict[str, Any] = {"n_layers": n_layers, "width": width, "norm": norm, "predict": predict}
        low = LocalCNN(c, c, receptive_field=low_receptive_field, **options)
        details = [LocalCNN(4 * c, 3 * c, receptive_field=receptive_field, **options) for _ in levels]
        return cls(low, details, channels=c, noise=noise, rescale=rescale)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the networks that are modules, each once, the low-pass first.

        Yields
        ------
        nn.Parameter
        """
        modules = [net for net in (self.low_net, *self.detail_nets) if isinstance(net, nn.Module)]
        yield from dict.fromkeys(chain.from_iterable(module.parameters() for module in modules))

    def loss(
        self, x: Pictures, level: int | Literal["low"], *, reduction: Literal["mean", "sum", "none"] = "mean",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:  # fmt: skip
        """Return the squared error of one network's noise, equation 2.

        Parameters
        ----------
        x : Tensor of shape (n, c, h, w)
            Clean images at full size.
        level : int or "low"
            Whose network: of the details at level 0 (finest) to J - 1, or of the smallest image.
        reduction : {"mean", "sum", "none"}, default="mean"
            Over images and their values; "none" keeps each image's mean.
        generator : torch.Generator, optional
            Source of randomness for the noise.

        Returns
        -------
        Tensor
            A scalar, or shape (n,) for "none".

        Raises
        ------
        ValueError
            If an argument is out of range, or ``x`` does not fit.
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        at_low = isinstance(level, str) and level == "low"
        if not at_low and (isinstance(level, (bool, str)) or level not in range(len(self.detail_nets))):
            raise ValueError(f"level must be 'low' or in 0..{len(self.detail_nets) - 1}, got {level!r}")
        depth = len(self.detail_nets) if at_low else int(level) + 1
        clean, condition = wide(_halved("x", x, self.channels, depth)), None
        for _ in range(depth):
            condition, detail = haar(clean if condition is None else condition)
            clean = condition if at_low else detail
        condition = None if at_low else condition
        if at_low and self.rescale:
            clean = clean * uniform((len(x), 1, 1, 1), clean, generator)
        least, most = self.noise
        sigma = (least + (most - least) * uniform((len(x), 1, 1, 1), clean, generator).square()) / 2**depth
        noise = sigma * normal(clean.shape, clean.dtype, clean.device, generator)
        seen = _noise_in(*self._net(level), clean + noise, condition, x.dtype)
        error = F.mse_loss(seen, noise, reduction=reduction)
        return (error.flatten(1).mean(1) if reduction == "none" else error).to(x.dtype)

    def denoise(
        self, y: Pictures, *, return_scales: bool = False, use_details: bool = True
    ) -> Pictures | list[Float[Tensor, "n c _ _"]]:
        """Remove white noise of any level, from the smallest image to the largest.

        Parameters
        ----------
        y : Tensor of shape (n, c, h, w)
            Noisy images, h and w multiples of 2^J. Gradients pass.
        return_scales : bool, default=False
            Whether to return the denoised images of all sizes.
        use_details : bool, default=True
            Whether to denoise the details; if not, they are zero: what the smallest image tells.

        Returns
        -------
        Tensor, or list of Tensor
            Denoised images; of all sizes, the largest first.

        Raises
        ------
        ValueError
            If ``y`` does not fit, or has NaN or infinity.
        """
        finite("y", _halved("y", y, self.channels, len(self.detail_nets)))
        low, details = wide(y), []
        for _ in self.detail_nets:
            low, detail = haar(low)
            details.append(detail)
        with _resting(self.low_net, *self.detail_nets) as (low_net, *nets):
            scales = [low - _noise_in("low_net", low_net, low, None, y.dtype)]
            for j in reversed(range(len(nets))):
                noise = details[j]  # all of it, if they are left out
                if use_details:
                    noise = _noise_in(f"detail_nets[{j}]", nets[j], noise, scales[0], y.dtype)
                scales.insert(0, inverse_haar(scales[0], details[j] - noise))
        scales = [x.to(y.dtype) for x in scales]
        return scales if return_scales else scales[0]

    def score(self, y: Pictures, sigma: float) -> Pictures:
        """Return the gradient of the log density of images with noise, as the cascade has it.

        Parameters
        ----------
        y : Tensor of shape (n, c, h, w)
            Noisy images.
        sigma : float
            Their noise, positive.

        Returns
        -------
        Tensor
            ``(denoise(y) - y) / sigma^2``, of the shape of ``y``.

        Raises
        ------
        ValueError
            If an argument does not fit.
        """
        at_least("sigma", sigma, 0, strict=True)
        clean: Any = self.denoise(y)
        return ((wide(clean) - wide(y)) / sigma / sigma).to(y.dtype)

    @torch.no_grad()
    def super_resolve(
        self, low: Pictures, *, levels: int | None = None, h0: float = 0.01, beta: float = 0.1,
        sigma_start: float = 1.0, sigma_end: float = 0.01, max_steps: int = 2000,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n c large_height large_width"]:  # fmt: skip
        """Draw the details of images, doubling their sides at every level, without gradients.

        Parameters
        ----------
        low : Tensor of shape (n, c, h, w)
            Images that become the block means of the result.
        levels : int, optional
            How often to double, at most J: ``low`` is at this level of the pyramid. Default: J.
        h0, beta, sigma_end, max_steps, generator
            As in `ascend`. With ``beta=1`` the details are those of a mode.
        sigma_start : float, default=1.0
            Noise that details start from, in units of the full image, positive.

        Returns
        -------
        Tensor of shape (n, c, 2^levels h, 2^levels w)
            Images.

        Raises
        ------
        ValueError
            If an argument is out of range or does not fit.
        """
        most = len(self.detail_nets)
        if (levels := integer("levels", most if levels is None else levels, 1)) > most:
            raise ValueError(f"levels must be at most {most}, that of detail_nets, got {levels}")
        at_least("sigma_start", sigma_start, 0, strict=True)
        x = finite("low", _pictured("low", low, self.channels))
        for level in reversed(range(levels)):
            shape = (len(x), 3 * self.channels, *x.shape[2:])
            noise = normal(shape, x.dtype, x.device, generator) * (sigma_start / 2 ** (level + 1))
            detail = ascend(self.detail_nets[level], noise, cond=x, h0=h0, beta=beta, sigma_end=sigma_end,
                            max_steps=max_steps, generator=generator).sample  # fmt: skip
            x = inverse_haar(x, detail)
        return x

    @torch.no_grad()
    def sample(
        self, n: int, shape: Sequence[int], *, h0: float = 0.01, beta: float = 0.1, beta_low: float = 0.01,
        sigma_start: float = 1.0, sigma_end: float = 0.01, sigma_end_low: float = 0.25,
        max_steps: int = 2000, generator: torch.Generator | None = None,
    ) -> Pictures:  # fmt: skip
        """Draw images, without gradients: the smallest image from noise, then its details.

        Parameters
        ----------
        n : int
            How many, at least 1.
        shape : tuple of int
            Height and width, multiples of 2^J.
        h0, beta, sigma_end, max_steps, generator
            As in `ascend`, for the details.
        beta_low, sigma_end_low : float, default=0.01 and 0.25
            As in `ascend`, for the smallest image, whose steps are all ``h0``.
        sigma_start : float, default=1.0
            Noise at the start, positive: in the smallest image, and as in `super_resolve`.

        Returns
        -------
        Tensor of shape (n, c, height, width)
            Images, in the dtype and on the device of the networks.

        Raises
        ------
        ValueError
            If an argument is out of range, or a side is no multiple of 2^J.
        """
        integer("n", n, 1)
        sides = _smallest("shape", shape, len(self.detail_nets))
        at_least("sigma_start", sigma_start, 0, strict=True)
        for end, drift, stop in (("", beta, sigma_end), ("_low", beta_low, sigma_end_low)):  # before any work
            within(f"beta{end}", drift, 0, 1, open_low=True)
            at_least(f"sigma_end{end}", stop, 0, strict=True)
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        start = sigma_start * normal((n, self.channels, *sides), like.dtype, like.device, generator)
        low = ascend(self.low_net, start, h0=h0, beta=beta_low, sigma_end=sigma_end_low, fixed_step=True,
                     max_steps=max_steps, generator=generator).sample  # fmt: skip
        if not self.detail_nets:
            return low
        return self.super_resolve(low, h0=h0, beta=beta, sigma_start=sigma_start, sigma_end=sigma_end,
                                  max_steps=max_steps, generator=generator)  # fmt: skip

    def _net(self, level: int | str) -> tuple[str, Blind]:
        """Return a network, and what messages call it."""
        if level == "low":
            return "low_net", self.low_net
        return f"detail_nets[{level}]", self.detail_nets[int(level)]
