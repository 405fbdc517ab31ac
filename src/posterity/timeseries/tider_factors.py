"""A table of series as one product of factors, its time factor split into trend, season and local bias.

Factorisation fills a table (time, channel) by X_hat = V U^T. Left free, a row of V may hold
anything; here it is made of parts that mean something,

    V = [w_0 trend + w_1 F season, bias],    U = [channel, 1],    w = softmax(mix),       (1)

with F the sines and cosines of a known period: the season is the same in every cycle, the
trend moves slowly, and the bias, which U's ones give to all channels alike, follows an
autoregression. What is learned in one cycle or one channel so fills a gap in another, and
each fill is a sum of three numbers that can be read.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, integer, within
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["TiderComponents", "TiderFactors"]


class TiderComponents(NamedTuple):
    """The three parts of a reconstruction, which add up to it.

    Attributes
    ----------
    trend : Tensor or ndarray of shape (n_timesteps, n_channels)
        What moves slowly.
    seasonal : Tensor or ndarray of shape (n_timesteps, n_channels)
        What comes again with the period.
    bias : Tensor of shape (n_timesteps,), or ndarray of shape (n_timesteps, n_channels)
        What all channels do at a time; from `TIDER` in the units of each channel.
    """

    trend: Any
    seasonal: Any
    bias: Any


class TiderFactors(nn.Module):
    """The factors of equation 1, as parameters for a training loop of one's own.

    Parameters
    ----------
    n_timesteps : int
        Rows of the table, at least ``max(lags) + 2``.
    n_channels : int
        Columns of the table, at least 1.
    rank : int, default=10
        Columns of the factors that trend and season share, at least 1.
    bias_rank : int, default=3
        Columns of the bias, at least 1.
    n_harmonics : int, default=8
        Frequencies of each period, K: multiples 0 to K - 1 of its first.
    period : float or sequence of float, default=24.0
        Steps of a cycle, each in (1, n_timesteps]; of several, each has its own harmonics.
    lags : sequence of int, default=(1, 2, 3)
        Steps back that the bias is predicted from, at least 1, each once.
    init_scale : float, default=0.1
        Deviation of the normal start, positive.
    generator : torch.Generator, optional
        Draws the start.

    Attributes
    ----------
    channel : Parameter of shape (n_channels, rank)
    trend : Parameter of shape (n_timesteps, rank)
    season : Parameter of shape (2 * n_harmonics * n_periods, rank)
        Weights of the waves: sine and cosine of multiple 0, of multiple 1, and so on.
    bias : Parameter of shape (n_timesteps, bias_rank)
    ar : Parameter of shape (n_lags, bias_rank, bias_rank)
        A matrix for each lag.
    mix : Parameter of shape (2,)
        Logits of the weights of trend and season, 0 at the start.
    waves : Tensor of shape (n_timesteps, 2 * n_harmonics * n_periods)
        F, in order of ``season``.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    References
    ----------
    .. [1] Liu et al. Multivariate Time-series Imputation with Disentangled Temporal
       Representations. ICLR 2023. Methodology.

    Examples
    --------
    >>> import torch
    >>> from posterity.timeseries import TiderFactors
    >>> model = TiderFactors(48, 3, generator=torch.Generator().manual_seed(0))
    >>> trend, seasonal, bias = model.components()
    >>> torch.allclose(trend + seasonal + bias[:, None], model(), atol=1e-6)
    True
    >>> torch.allclose(seasonal[:24], seasonal[24:], atol=1e-6)
    True
    """

    def __init__(
        self, n_timesteps: int, n_channels: int, *, rank: int = 10, bias_rank: int = 3, n_harmonics: int = 8,
        period: float | Sequence[float] = 24.0, lags: Sequence[int] = (1, 2, 3), init_scale: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lags = checked_lags(lags)
        time = integer("n_timesteps", n_timesteps, max(self.lags) + 2)
        integer("n_channels", n_channels, 1)
        integer("rank", rank, 1)
        integer("bias_rank", bias_rank, 1)
        integer("n_harmonics", n_harmonics, 1)
        at_least("init_scale", init_scale, 0, strict=True)
        self.periods = checked_periods(period, time)
        waves = torch.cat([_waves(time, each, n_harmonics) for each in self.periods], 1)
        self.waves: Tensor
        self.register_buffer("waves", waves.to(torch.get_default_dtype()), persistent=False)

        def draw(*size: int) -> nn.Parameter:
            start = torch.randn(size, generator=generator, device=draw_device(generator))
            return nn.Parameter((init_scale * start).to(waves.device))

        self.channel = draw(n_channels, rank)
        self.trend = draw(time, rank)
        self.season = draw(waves.shape[1], rank)
        self.bias = draw(time, bias_rank)
        self.ar = draw(len(self.lags), bias_rank, bias_rank)
        self.mix = nn.Parameter(torch.zeros(2))

    def factors(self) -> tuple[Float[Tensor, "time columns"], Float[Tensor, "channels columns"]]:
        """Return V and U of equation 1, ``rank + bias_rank`` columns each, in float32 at least.

        Returns
        -------
        V : Tensor of shape (n_timesteps, rank + bias_rank)
        U : Tensor of shape (n_channels, rank + bias_rank)
        """
        with torch.autocast(self.mix.device.type, enabled=False):
            weight = wide(self.mix).softmax(0)
            moving = weight[0] * wide(self.trend) + weight[1] * (wide(self.waves) @ wide(self.season))
            channel, bias = wide(self.channel), wide(self.bias)
            ones = channel.new_ones(len(channel), bias.shape[1])
            return torch.cat([moving, bias], 1), torch.cat([channel, ones], 1)

    def forward(self) -> Float[Tensor, "time channels"]:
        """Return the reconstruction, the sum of the components."""
        V, U = self.factors()
        with torch.autocast(V.device.type, enabled=False):
            return (V @ U.T).to(self.mix.dtype)

    def components(self) -> TiderComponents:
        """Return trend and season, (n_timesteps, n_channels), and the bias of all channels, (n_timesteps,).

        Returns
        -------
        TiderComponents
        """
        dtype = self.mix.dtype
        with torch.autocast(self.mix.device.type, enabled=False):
            weight, channel = wide(self.mix).softmax(0), wide(self.channel)
            trend = weight[0] * (wide(self.trend) @ channel.T)
            seasonal = weight[1] * (wide(self.waves) @ (wide(self.season) @ channel.T))
            return TiderComponents(trend.to(dtype), seasonal.to(dtype), wide(self.bias).sum(1).to(dtype))

    def penalty(
        self, *, l2: float = 1e-2, ar: float = 0.2, trend: float = 0.1,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return what is added to the mean squared error of the observed entries.

        With Frobenius norms that are not squared,

            l2 (|U| + |V|) + ar |sum_j bias_{t - l_j} A_j^T - bias_t| + trend |trend_{t + 1} - trend_t|.

        Parameters
        ----------
        l2, ar, trend : float
            Weights, at least 0.
        factors : tuple of Tensor, optional
            What ``factors()`` gave in this step, so that they are made once.

        Returns
        -------
        Tensor
            A scalar, in float32 at least.
        """
        at_least("l2", l2, 0)
        at_least("ar", ar, 0)
        at_least("trend", trend, 0)
        V, U = self.factors() if factors is None else factors
        with torch.autocast(V.device.type, enabled=False):
            bias, first = wide(self.bias), max(self.lags)
            past = torch.cat([bias[first - lag : len(bias) - lag] for lag in self.lags], 1)
            predicted = past @ wide(self.ar).transpose(1, 2).flatten(0, 1)
            return (
                l2 * (U.norm() + V.norm())
                + ar * (predicted - bias[first:]).norm()
                + trend * wide(self.trend).diff(dim=0).norm()
            )


def checked_lags(lags: Sequence[int]) -> tuple[int, ...]:
    """Return lags of at least 1, each once."""
    if np.ndim(lags) != 1 or len(lags) == 0:
        raise ValueError(f"lags must be a sequence of at least one integer, got {lags!r}")
    each = tuple(integer("lags", lag, 1) for lag in lags)  # at lag 0 every bias predicts itself
    if len(set(each)) < len(each):
        raise ValueError(f"lags must differ, got {lags!r}")
    return each


def checked_periods(period: float | Sequence[float], n_timesteps: int) -> tuple[float, ...]:
    """Return periods longer than a step and no longer than the series."""
    each = (period,) if isinstance(period, Real | str) or np.ndim(period) == 0 else tuple(period)  # type: ignore[arg-type]
    if not each:
        raise ValueError("period must not be empty")
    return tuple(float(within("period", p, 1, n_timesteps, open_low=True)) for p in each)


def _waves(n_timesteps: int, period: float, n_harmonics: int) -> Tensor:
    """Return sin_0, cos_0, sin_1, cos_1, ..., (n_timesteps, 2 * n_harmonics), in float64."""
    turns = torch.arange(n_timesteps, dtype=torch.float64)[:, None] * torch.arange(n_harmonics) / period
    angle = 2 * torch.pi * turns.frac()  # whole turns lose digits in a long series
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
