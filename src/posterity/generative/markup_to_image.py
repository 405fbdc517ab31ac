"""Scheduled sampling for diffusion: train on inputs that the network itself has made.

Noise is added in steps k = 0 to T - 1, and the network says which,

    y_k = a_k x + s_k noise,   a_k^2 = prod_{j <= k} (1 - beta_j),   s_k^2 = 1 - a_k^2.        (1)

Trained on (1) alone it never sees what it meets when it samples: a y_k that its own steps have led to,
with their errors. Scheduled sampling starts m steps earlier, at y_{k+m}, lets the network come down to k
without gradient, and asks for the noise that explains the place where it arrived by the true image,

    || net(y_k) - (y_k - a_k x) / s_k ||^2,                                                    (2)

so that it learns to turn back. At m = 0 this is ordinary training; the share of m >= 1 rises while training goes on.

A network is any ``net(x, t, **cond)``: x of shape (n, *shape), t = 1 - (k + 1) / T of shape (n,), 0 where all
is noise; it returns the noise. ``cond`` is the markup, for example ``{"tokens": (n, l), "mask": (n, l)}``.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide
from posterity._random import draw_device
from posterity.generative._network import Cond, Net, Samples, call, check_cond, normal, starts, steps

__all__ = ["ScheduledSamplingDiffusion", "sampling_weights"]

MOST_STEPS = 100_000
LEAST_SIGNAL = 1e-12  # of the data at the last step, by which the network's answer is divided

Grid = Int[Tensor, " n"]


class ScheduledSamplingDiffusion:
    """A diffusion process whose network is trained, for a share of the batches, on its own steps.

    It holds no network: ``loss`` trains yours, ``sample`` draws with it. Neither touches its train or eval
    mode, also while it rolls back, and neither holds averaged weights.

    Parameters
    ----------
    shape : int or sequence of int
        Shape of one sample, such as (channels, height, width); d stands for (d,).
    n_steps : int, default=1000
        Steps T of noise, in 1..100,000.
    beta_start, beta_end : float, default=1e-4 and 0.02
        First and last share of noise a step, in (0, 1), on a line between. Made for 1,000 steps: multiply both by
        1000 / n_steps for others.
    clip : tuple of float, optional
        Where data lie, default (-1, 1): what the network takes for the image is clipped to it while sampling.
        None does not clip.
    rollback : {"renoise", "posterior"}, default="renoise"
        How training comes down a step: the image that the network sees, with fresh noise, as in the official code;
        or a step of the sampler.

    Raises
    ------
    ValueError
        If an argument is out of range, or nothing of the data is left at the last step.

    Notes
    -----
    Departures from the official code:

    1. Where k + m is beyond the last step, the way is shortened for that image alone. The official code lowers m
       for the whole batch, so that in a large batch m seldom has its value.
    2. ``rollback="posterior"`` is ours.
    3. Sampling with fewer steps has them at equal distances from the last to the first.

    References
    ----------
    .. [1] Deng, Kojima, Rush. Markup-to-Image Diffusion Models with Scheduled Sampling. ICLR 2023. Section 4.
    .. [2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. NeurIPS 2020. Equations 4, 7 and 14.

    Examples
    --------
    A network that knows the image: it turns back from wherever its steps have led, and samples it.

    >>> import torch
    >>> from posterity.generative import ScheduledSamplingDiffusion
    >>> process, x = ScheduledSamplingDiffusion(2), torch.tensor([[0.5, -1.0]])
    >>> def net(y, t):
    ...     signal = process.alpha_bar((1000 * (1 - t) - 1).round().long())[:, None]
    ...     return (y - signal.sqrt() * x) / (1 - signal).sqrt()
    >>> bool(process.loss(net, x, m=5, generator=torch.Generator().manual_seed(0)) < 1e-4)
    True
    >>> process.sample(net, 1, n_steps=10, generator=torch.Generator().manual_seed(0))
    tensor([[ 0.5000, -1.0000]])
    """

    def __init__(
        self, shape: int | Sequence[int], *, n_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
        clip: tuple[float, float] | None = (-1.0, 1.0), rollback: Literal["renoise", "posterior"] = "renoise",
    ) -> None:  # fmt: skip
        sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
        if not sizes:
            raise ValueError(f"shape must have at least one dimension, got {shape!r}")
        self.shape = tuple(integer("shape", size, 1) for size in sizes)
        self.n_steps = integer("n_steps", n_steps, 1)
        if n_steps > MOST_STEPS:
            raise ValueError(f"n_steps must be at most {MOST_STEPS}, got {n_steps}")
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            within(name, beta, 0, 1, open_low=True, open_high=True)
        self.clip = _range(clip)
        self.rollback = one_of("rollback", rollback, ("renoise", "posterior"))
        betas = torch.linspace(beta_start, beta_end, n_steps, dtype=torch.float64)
        self._log_signal = torch.log1p(-betas).cumsum(0)  # of abar, which may be 1 - 1e-9
        if self._log_signal[-1] < 2 * math.log(LEAST_SIGNAL):
            raise ValueError(
                f"n_steps = {n_steps} with beta_start = {beta_start} and beta_end = {beta_end} leave nothing of the "
                f"data: multiply both by 1000 / n_steps"
            )
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def alpha_bar(self, k: Grid) -> Float[Tensor, " n"]:
        """Return the share of the data, by variance, that is left after step k.

        Parameters
        ----------
        k : Tensor
            Steps in 0..n_steps - 1, integers of shape (n,).

        Returns
        -------
        Tensor
            Shape (n,), in torch's default dtype, on the device of ``k``.
        """
        k = self._grid("k", k, None)
        return self._log_signal.exp().to(k.device, torch.get_default_dtype())[k]

    def add_noise(
        self, x: Samples, k: Grid, *, noise: Samples | None = None, generator: torch.Generator | None = None
    ) -> Samples:
        """Return data with the noise of step k, equation 1.

        Parameters
        ----------
        x : Tensor
            Data, shape ``(n, *shape)``.
        k : Tensor
            Steps in 0..n_steps - 1, integers of shape (n,).
        noise : Tensor, optional
            Standard normal draws to use, shape ``(n, *shape)``.
        generator : torch.Generator, optional
            Source of randomness where ``noise`` is not given.

        Returns
        -------
        Tensor
            Shape ``(n, *shape)``.
        """
        k = self._grid("k", k, len(self._check("x", x)))
        if noise is None:
            noise = normal(x.shape, wide(x).dtype, x.device, generator)
        has_shape("noise", floating("noise", noise), x.shape, "x")
        a, s = self._signal(k, wide(x))
        return (a * wide(x) + s * noise.to(wide(x))).to(x.dtype)

    def roll_back(
        self, net: Net, y: Samples, k: Grid, m: int | Grid, *, cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Samples:  # fmt: skip
        """Let the network come down from step k + m to step k, without gradient.

        Parameters
        ----------
        net : callable
            The network, called as often as the largest ``m``.
        y : Tensor
            States at step k + m, shape ``(n, *shape)``.
        k : Tensor
            Where to arrive, integers of shape (n,).
        m : int or Tensor
            How many steps, at least 0; for each image its own, integers of shape (n,). k + m is in the grid.
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        generator : torch.Generator, optional
            Source of randomness for the noise of each step.

        Returns
        -------
        Tensor
            States at step k, shape ``(n, *shape)``.

        Raises
        ------
        ValueError
            If an argument does not fit, or k + m is beyond the grid.
        """
        n = len(self._check("y", y))
        k = self._grid("k", k, n)
        if isinstance(m, Tensor):
            m = self._grid("m", m, n)
            most = int(m.max()) if n else 0
        else:
            most = integer("m", m, 0)
        self._grid("k + m", k + m, n)
        check_cond(cond, n)
        return self._come_down(net, wide(y), k, m + torch.zeros_like(k), most, cond, y.dtype, generator).to(
            y.dtype
        )

    @torch.no_grad()
    def _come_down(
        self, net: Net, y: Tensor, k: Tensor, m: Tensor, most: int, cond: Cond, dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        """Take the steps of each image, whose numbers differ; those that have arrived stay where they are."""
        for done in range(most):
            moving = self._spread(done < m)
            here = k + (m - done).clamp_min(0)
            there = (here - 1).clamp_min(0)
            clean = self._clean(net, y, here, cond, dtype)
            noise = normal(y.shape, y.dtype, y.device, generator)
            if self.rollback == "renoise":
                a, s = self._signal(there, y)
                lower = a * clean + s * noise
            else:
                mean, std = self._posterior(y, self._clipped(clean), here, there)
                lower = mean + std * noise
            y = torch.where(moving, lower, y)
        return y

    def loss(
        self, net: Net, x: Samples, *, m: int | None = None, weights: Sequence[float] | None = None,
        k: Grid | None = None, cond: Cond = None, reduction: Literal["mean", "sum", "none"] = "mean",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:  # fmt: skip
        """Return the squared error of the network's noise at inputs m steps of its own making, equation 2.

        The gradient is that of the last call alone.

        Parameters
        ----------
        net : callable
            The network, called m + 1 times.
        x : Tensor
            Data in [-1, 1], shape ``(n, *shape)``.
        m : int, optional
            How many steps to take, in 0..n_steps - 1; an image whose k + m is beyond the grid takes those that fit.
        weights : sequence of float, optional
            In the place of ``m``: probabilities of m = 0, 1, ..., of which one is drawn for the batch, as
            `sampling_weights` gives them. Default of both: m = 0.
        k : Tensor, optional
            Steps, integers of shape (n,). Default: uniform over the grid.
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        reduction : {"mean", "sum", "none"}, default="mean"
            Over samples and coordinates; "none" keeps each sample's mean over coordinates.
        generator : torch.Generator, optional
            Source of randomness for k, the noise, m where it is drawn, and the steps, in this order.

        Returns
        -------
        Tensor
            A scalar, or shape (n,) for "none".

        Raises
        ------
        ValueError
            If shapes, dtypes, steps, ``m``, ``weights``, ``cond`` or ``reduction`` do not fit.
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        n, dtype = len(self._check("x", x)), x.dtype
        shares = self._shares(m, weights)
        if m is not None:
            m = self._length("m", integer("m", m, 0))
        check_cond(cond, n)
        where = draw_device(generator, x.device)
        if k is None:
            k = torch.randint(self.n_steps, (n,), device=where, generator=generator).to(x.device)
        else:
            k = self._grid("k", k, n)
        noise = normal(x.shape, wide(x).dtype, x.device, generator)
        if shares is not None:
            by = draw_device(generator, torch.device("cpu"))
            m = int(torch.multinomial(torch.tensor(shares, device=by), 1, generator=generator))
        x, most = wide(x), min(m or 0, self.n_steps - 1)
        fits = (self.n_steps - 1 - k).clamp_max(most)
        a, s = self._signal(k + fits, x)
        y = a * x + s * noise
        if most:
            y = self._come_down(net, y, k, fits, most, cond, dtype, generator)
            a, s = self._signal(k, x)
            noise = (y - a * x) / s
        said = call(net, y, self._clock(k, x), cond, dtype)
        if reduction == "none":
            return (said - noise).square().flatten(1).mean(1).to(dtype)
        return F.mse_loss(said, noise, reduction=reduction).to(dtype)

    @torch.no_grad()
    def sample(
        self, net: Net, n: int | None = None, *, x0: Samples | None = None, n_steps: int | None = None,
        cond: Cond = None, return_clean: bool = False, generator: torch.Generator | None = None,
    ) -> Samples | tuple[Samples, list[Samples]]:  # fmt: skip
        """Draw samples, step by step from noise.

        Parameters
        ----------
        net : callable
            The network.
        n : int, optional
            How many. Exactly one of ``n`` and ``x0`` is given.
        x0 : Tensor, optional
            Standard normal noise to start from, shape ``(n, *shape)``.
        n_steps : int, optional
            Steps to take, at equal distances, in 1..n_steps of the process. Default: all.
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        return_clean : bool, default=False
            Whether to return what the network took for the image at each step as well.
        generator : torch.Generator, optional
            Source of randomness for starts and noise.

        Returns
        -------
        Tensor or tuple
            Samples, shape ``(n, *shape)``; with ``return_clean`` also a list of as many images for every step.

        Raises
        ------
        ValueError
            If neither or both of ``n`` and ``x0`` are given, or another argument is wrong.
        """
        few = self.n_steps if n_steps is None else integer("n_steps", n_steps, 1)
        if few > self.n_steps:
            raise ValueError(f"n_steps must be at most the {self.n_steps} of the process, got {n_steps}")
        start = starts(net, n, x0, self._check, self._draw, generator)
        check_cond(cond, len(start))
        dtype, y, clean = start.dtype, wide(start), []
        grid = torch.linspace(self.n_steps - 1, 0, few, dtype=torch.float64).round().long().tolist()
        for step in steps(few):
            here = torch.full((len(y),), grid[step], device=y.device)
            image = self._clipped(self._clean(net, y, here, cond, dtype))
            if return_clean:
                clean.append(image.to(dtype))
            if step == few - 1:
                y = image  # what comes before step 0 is the data
            else:
                mean, std = self._posterior(y, image, here, torch.full_like(here, grid[step + 1]))
                y = mean + std * normal(y.shape, y.dtype, y.device, generator)
        return (y.to(dtype), clean) if return_clean else y.to(dtype)

    def _clean(self, net: Net, y: Tensor, k: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """Return what the network takes for the image, at steps k."""
        a, s = self._signal(k, y)
        return (y - s * call(net, y, self._clock(k, y), cond, dtype)) / a

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(*self.clip)

    def _posterior(self, y: Tensor, image: Tensor, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the state at lower steps, given that at these and the image."""
        a, s = self._signal(here, y)
        lower_a, lower_s = self._signal(there, y)
        kept = a / lower_a
        # 1 - kept^2, the noise added in between, without cancellation
        logs = self._table(y)[2]
        added = self._spread(-torch.expm1(logs[here] - logs[there]))
        mean = lower_a * added / s.square() * image + kept * (lower_s / s).square() * y
        return mean, lower_s / s * added.sqrt()

    def _signal(self, k: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_k and s_k, of shape (n, 1, ..., 1)."""
        a, s, _ = self._table(like)
        return self._spread(a[k]), self._spread(s[k])

    def _table(self, like: Tensor) -> Tensor:
        """Return a, s and log abar of all steps, made in float64 once for a device and dtype."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            log = self._log_signal
            rows = torch.stack([(log / 2).exp(), (-torch.expm1(log)).sqrt(), log])
            self._tables[key] = rows.to(like.device, like.dtype)
        return self._tables[key]

    def _clock(self, k: Tensor, like: Tensor) -> Tensor:
        return 1 - (k + 1).to(like.dtype) / self.n_steps

    def _spread(self, part: Tensor) -> Tensor:
        return part.reshape(-1, *[1] * len(self.shape))

    def _check(self, name: str, x: Any) -> Tensor:
        return has_shape(name, floating(name, x, "scale to [-1, 1]"), (None, *self.shape), "shape")

    def _grid(self, name: str, k: Any, n: int | None) -> Tensor:
        """Return steps as int64; values are read on the CPU only, where that is free."""
        if not isinstance(k, Tensor) or k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
            got = f"dtype {k.dtype}" if isinstance(k, Tensor) else type(k).__name__
            raise ValueError(f"{name} must be a tensor of integers, got {got}")
        has_shape(name, k, (n,), "one step a sample")
        if k.device.type == "cpu" and k.numel():
            low, high = (int(end) for end in k.aminmax())
            if low < 0 or high >= self.n_steps:
                raise ValueError(f"{name} must be in 0..{self.n_steps - 1}, got values from {low} to {high}")
        return k.long()

    def _length(self, name: str, m: int) -> int:
        if m >= self.n_steps:
            raise ValueError(f"{name} must be less than the {self.n_steps} steps, got {m}")
        return m

    def _shares(self, m: int | None, weights: Sequence[float] | None) -> list[float] | None:
        if weights is None:
            return None
        if m is not None:
            raise ValueError(f"m and weights exclude each other, got m = {m} and weights = {weights!r}")
        shares = [at_least("weights", share, 0) for share in _several("weights", weights)]
        if not shares or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"weights must sum to 1, as those of sampling_weights do, got {weights!r}")
        self._length("the largest m of weights", len(shares) - 1)
        return shares

    def _draw(
        self, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        return normal((n, *self.shape), dtype, device, generator)


def sampling_weights(
    step: int, total: int, start: Sequence[float] = (0.0,), end: Sequence[float] = (0.8,)
) -> list[float]:
    """Return the probabilities of m = 0, 1, ..., at a step of training, on the line from start to end.

    Parameters
    ----------
    step : int
        Steps done, in 0..total.
    total : int
        Steps of the whole training, at least 1.
    start, end : sequence of float, default=(0.0,) and (0.8,)
        Probabilities of m = 1, 2, ... at the beginning and at the end; as many of both, at least 0 and
        together at most 1.

    Returns
    -------
    list of float
        One more than ``start`` has, the first that of m = 0; they sum to 1.

    Raises
    ------
    ValueError
        If an argument is out of range, or start and end differ in length.

    References
    ----------
    .. [1] Deng, Kojima, Rush. Markup-to-Image Diffusion Models with Scheduled Sampling. ICLR 2023. Section 4.

    Examples
    --------
    >>> from posterity.generative import sampling_weights
    >>> [sampling_weights(step, 100) for step in (0, 50, 100)]
    [[1.0, 0.0], [0.6, 0.4], [0.19999999999999996, 0.8]]
    """
    total = integer("total", total, 1)
    if integer("step", step, 0) > total:
        raise ValueError(f"step must be in 0..{total}, which is total, got {step}")
    ends = []
    for name, given in (("start", start), ("end", end)):
        ends.append([within(name, share, 0, 1) for share in _several(name, given)])
        if sum(ends[-1]) > 1 + 1e-9:
            raise ValueError(f"{name} must sum to at most 1, got {given!r}")
    if len(ends[0]) != len(ends[1]):
        raise ValueError(f"start and end must be of one length, got {len(ends[0])} and {len(ends[1])}")
    later = [(1 - step / total) * first + step / total * last for first, last in zip(*ends, strict=True)]
    return [max(1 - sum(later), 0.0), *later]


def _several(name: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
    return values


def _range(clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    if len(_several("clip", clip)) != 2 or not all(
        isinstance(end, int | float) and math.isfinite(end) for end in clip
    ):
        raise ValueError(f"clip must be two numbers or None, got {clip!r}")
    if not clip[0] < clip[1]:
        raise ValueError(f"clip must be two numbers, the lower first, got {clip!r}")
    return (float(clip[0]), float(clip[1]))
