"""Fold a series by its own periods, so that a day lies under a day, and convolve in two dimensions.

A series whose spectrum A = |rfft(x)| peaks at frequencies f_1, ..., f_k is written k
times as an image of T / p_i rows (cycles) and p_i = T // f_i columns (phases); one stack
of 2-D convolutions reads all of them, and

    block(x) = x + sum_i softmax(A_f)_i  unfold(conv2d(fold_{p_i}(x))).      (1)

The entry below a value is the same phase one cycle later, 24 steps away for a daily
rhythm of hourly data, where a 1-D kernel of that reach would need 24 times the weights.

The convolution is a mean of kernels of sizes 1, 3, 5, ...; a mean of convolutions is the
convolution with the mean of the kernels, so it is computed as one.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer, one_of
from posterity._precision import wide

__all__ = ["TimesBlock", "dominant_periods"]

Periods = Literal["batch", "sample"] | Sequence[int]


def dominant_periods(
    x: Float[Tensor, "n time channels"], k: int
) -> tuple[Int64[Tensor, " k"], Float[Tensor, "n k"]]:
    """Return the periods of the k strongest frequencies of a batch.

    Frequency 0 takes no part, so that neither a constant nor a scale matters.

    Parameters
    ----------
    x : Tensor of shape (n, time, channels)
        Evenly spaced series.
    k : int
        How many, from 1 to ``time // 2``.

    Returns
    -------
    periods : Tensor of shape (k,), int64
        ``time // f`` of the frequencies f with the largest amplitude, averaged over batch
        and channels; strongest first. Neighbouring frequencies may share a period.
    amplitudes : Tensor of shape (n, k)
        ``|rfft(x)|`` at these frequencies, averaged over channels.

    Raises
    ------
    ValueError
        If ``x`` is not a floating-point tensor with three axes, or ``k`` does not fit.

    References
    ----------
    .. [1] Wu et al. TimesNet: Temporal 2D-Variation Modeling for General Time Series
       Analysis. ICLR 2023. Equation 1.

    Examples
    --------
    >>> import math, torch
    >>> from posterity.timeseries import dominant_periods
    >>> t = torch.arange(96) * 2 * math.pi
    >>> x = 3 * torch.sin(t / 24) + torch.sin(t / 8)
    >>> periods, amplitudes = dominant_periods(x[None, :, None], k=2)
    >>> periods, amplitudes.round()  # 3 * 96 / 2 and 1 * 96 / 2
    (tensor([24,  8]), tensor([[144.,  48.]]))
    """
    has_shape("x", floating("x", x), (None, None, None))
    _fits("k", k, x.shape[1])
    periods, amplitudes = _strongest(x, k)
    return periods, amplitudes.to(x.dtype)


class TimesBlock(nn.Module):
    """Residual block (1): fold by each period, convolve, unfold, add by amplitude.

    Parameters
    ----------
    d_model : int
        Channels of the series, at least 1.
    d_ff : int
        Channels between the two convolutions, at least 1.
    top_k : int, default=5
        How many periods, from 1 to half of the time steps; unused where they are given.
    n_kernels : int, default=6
        How many kernels each convolution averages, at least 1; the largest spans
        ``2 * n_kernels - 1`` phases and cycles.
    periods : {"batch", "sample"} or sequence of int, default="batch"
        Where the periods come from. ``"batch"``, as in the paper, chooses them for the
        whole batch, so that an output depends on its batchmates; ``"sample"`` chooses for
        each series alone; numbers from 2 to the time steps fix them, weighted by the
        amplitude at the nearest frequency.

    Raises
    ------
    ValueError
        If a number is out of range, ``periods`` is neither, or the input does not fit.

    References
    ----------
    .. [1] Wu et al. TimesNet: Temporal 2D-Variation Modeling for General Time Series
       Analysis. ICLR 2023. Equations 2 to 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.timeseries import TimesBlock
    >>> TimesBlock(d_model=16, d_ff=32, top_k=3)(torch.randn(4, 96, 16)).shape
    torch.Size([4, 96, 16])
    """

    def __init__(
        self, d_model: int, d_ff: int, *, top_k: int = 5, n_kernels: int = 6, periods: Periods = "batch"
    ) -> None:
        super().__init__()
        self.d_model, d_ff = integer("d_model", d_model, 1), integer("d_ff", d_ff, 1)
        self.top_k = integer("top_k", top_k, 1)
        self.periods = periods
        if isinstance(periods, str):
            one_of("periods", periods, ("batch", "sample"))
        else:
            self.periods = [integer("periods", p, 2) for p in periods]
            if not self.periods:
                raise ValueError("periods must not be empty")
        integer("n_kernels", n_kernels, 1)
        self.up, self.down = _Inception(self.d_model, d_ff, n_kernels), _Inception(d_ff, d_model, n_kernels)

    def forward(self, x: Float[Tensor, "n time d_model"]) -> Float[Tensor, "n time d_model"]:
        """Return ``x`` plus what the convolutions read in its folded forms.

        Parameters
        ----------
        x : Tensor of shape (n, time, d_model)
            The series.

        Returns
        -------
        Tensor of shape (n, time, d_model)
            Equation (1).
        """
        has_shape("x", floating("x", x), (None, None, self.d_model), "this d_model")
        time = x.shape[1]
        out = x.clone()
        up, down = self.up.merged(), self.down.merged()
        if self.periods == "sample":
            amplitudes, top = _spectrum(x).topk(_fits("top_k", self.top_k, time), dim=1)
            share, periods = amplitudes.softmax(1).to(x.dtype), time // (top + 1)
            chosen = periods.tolist()  # the one read by the host: sizes of images must be known
            for p in sorted({p for row in chosen for p in row}):  # each period is run once
                rows = torch.tensor([i for i, row in enumerate(chosen) if p in row], device=x.device)
                weight = (share * (periods == p))[rows].sum(1)
                out.index_add_(0, rows, weight[:, None, None] * self._vary(x[rows], p, up, down))
            return out
        if isinstance(self.periods, str):
            found, amplitudes = _strongest(x, _fits("top_k", self.top_k, time))
            chosen = found.tolist()  # the one read
        else:
            chosen = list(self.periods)
            if max(chosen) > time:
                raise ValueError(f"periods must be at most the {time} time steps, got {max(chosen)}")
            amplitudes = _spectrum(x)[:, [min(round(time / p), time // 2) - 1 for p in chosen]]
        share = amplitudes.softmax(1).to(x.dtype)
        for p in sorted(set(chosen)):
            weight = share[:, [j for j, other in enumerate(chosen) if other == p]].sum(1)
            out += weight[:, None, None] * self._vary(x, p, up, down)
        return out

    def _vary(self, x: Tensor, period: int, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
        """Return (n, time, d_model): fold by a period, convolve twice, unfold."""
        n, time, d_model = x.shape
        cycles = -(-time // period)
        image = F.pad(x, (0, 0, 0, cycles * period - time)).view(n, cycles, period, d_model)
        image = _convolve(F.gelu(_convolve(image.permute(0, 3, 1, 2), *up)), *down)
        return image.permute(0, 2, 3, 1).reshape(n, -1, d_model)[:, :time]


def _spectrum(x: Tensor) -> Tensor:
    """Return the amplitudes (n, T // 2) of frequencies 1, 2, ..., averaged over channels."""
    if not x.numel():
        raise ValueError(f"x must hold at least one series, step and channel, got {tuple(x.shape)}")
    return torch.fft.rfft(wide(x), dim=1).abs()[:, 1:].mean(2)  # rfft has no half precision


def _strongest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `dominant_periods` does, amplitudes in float32 at least: their exponentials count."""
    amplitudes = _spectrum(x)
    top = amplitudes.detach().mean(0).topk(k).indices
    return x.shape[1] // (top + 1), amplitudes[:, top]


def _fits(name: str, k: int, time: int) -> int:
    if integer(name, k, 1) > time // 2:
        raise ValueError(f"{name} must be at most half of the {time} time steps, got {k}")
    return k


class _Inception(nn.Module):
    """The mean of convolutions with kernels of size 1, 3, ..., held apart, applied as one."""

    def __init__(self, n_in: int, n_out: int, n_kernels: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(n_in, n_out, 2 * j + 1, padding=j) for j in range(n_kernels))
        for conv in self.kernels:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return kernel and bias of the one convolution that the mean is."""
        m = len(self.kernels)
        weights = [F.pad(conv.weight, [m - 1 - j] * 4) for j, conv in enumerate(self.kernels)]
        return torch.stack(weights).mean(0), torch.stack([conv.bias for conv in self.kernels]).mean(0)


def _convolve(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with padding "same", without the taps that could only meet the padding."""
    reach = weight.shape[-1] // 2
    h, w = (min(reach, size - 1) for size in image.shape[2:])
    weight = weight[:, :, reach - h : reach + h + 1, reach - w : reach + w + 1]
    return F.conv2d(image, weight, bias, padding=(h, w))
