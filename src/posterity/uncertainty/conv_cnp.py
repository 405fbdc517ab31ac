"""Convolutional conditional neural process: the context as a signal on a grid of the line.

A Gaussian kernel k spreads the points on a grid t, as a density and as data over density,

    d(t) = sum_n k(t - x_n),        c(t) = sum_n k(t - x_n) y_n / (d(t) + 1e-4),            (1)

a convolutional network maps these channels to others, and a kernel reads those at the targets.
No layer knows where zero is, so the predictions move with the inputs: a pattern that was learned
at one place is known at every other.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from posterity._checks import at_least, integer, one_of
from posterity._precision import wide
from posterity.uncertainty._neural_process import Tasks
from posterity.uncertainty.cnp import _normal, _Sums

__all__ = ["ConvCNP"]

MAX_GRID = 100_000


class ConvCNP(_Sums):
    """Convolutional conditional neural process on the line: equivariant to shifts of x.

    Points are spread on a grid by a Gaussian kernel, as a density and a data channel for
    each output; a convolutional network maps the grid, and the kernel reads it at targets.

    Parameters
    ----------
    dim_y : int
        Outputs of the functions; inputs have one dimension.
    points_per_unit : int, default=64
        Of the grid. It should resolve the functions' finest detail.
    channels : sequence of int, default=(64, 64, 64, 64, 64, 64)
        Of each level or layer.
    kernel_size : int, default=5
        Odd.
    margin : float, default=0.1
        By which the grid reaches beyond the points, in units of x.
    architecture : {"unet", "conv"}, default="unet"
        Levels of stride 2 with skips, or residual layers at full resolution.

    Raises
    ------
    ValueError
        If a size does not fit, inputs have another dimension than 1, there is no point, or
        the points' range needs more than 100,000 grid points.

    Notes
    -----
    1. The grid covers the real points of a call, context and target of all its tasks. Its
       border is seen by the network, so a prediction near it depends a little on the call.

    References
    ----------
    .. [1] Gordon et al. Convolutional Conditional Neural Processes. ICLR 2020.
    .. [2] Bruinsma et al. Autoregressive Conditional Neural Processes. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import ConvCNP
    >>> model = ConvCNP(dim_y=1, points_per_unit=16, channels=(32, 32), architecture="conv")
    >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)
    >>> model(x[:, :6], y[:, :6], x[:, 6:]).loc.shape
    torch.Size([4, 4, 1])
    """

    def __init__(
        self, dim_y: int, *, points_per_unit: int = 64, channels: Sequence[int] = (64,) * 6, kernel_size: int = 5,
        margin: float = 0.1, architecture: Literal["unet", "conv"] = "unet",
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim_x, self.dim_y = 1, integer("dim_y", dim_y, 1)
        self.points_per_unit = integer("points_per_unit", points_per_unit, 1)
        self.margin = at_least("margin", margin, 0)
        channels = [integer("each of channels", each, 1) for each in channels]
        if integer("kernel_size", kernel_size, 1) % 2 == 0 or not channels:
            raise ValueError(
                f"kernel_size must be odd and channels not empty, got {kernel_size} and {channels}"
            )
        make = {"unet": _UNet, "conv": _Residual}[one_of("architecture", architecture, ("unet", "conv"))]
        self.network = make(1 + dim_y, 2 * dim_y, channels, kernel_size)
        self.stride = 2 ** len(channels) if architecture == "unet" else 1
        start = -torch.log(torch.tensor(float(points_per_unit)))
        self.encoder_log_scale, self.decoder_log_scale = (
            nn.Parameter(start.clone()),
            nn.Parameter(start.clone()),
        )

    def _place(self, batch: Tasks) -> Tensor:
        """Return the grid of a call, of shape (points,)."""
        x = torch.cat([batch.x_context[batch.context_mask], batch.x_target[batch.target_mask]])
        if len(x) == 0:
            raise ValueError("x_context and x_target must have a real point, got none: there is no grid")
        low, high = (float(end) for end in x.aminmax())
        step = 1 / self.points_per_unit
        need = (high - low + 2 * (self.margin + step)) / step + 1
        if need > MAX_GRID:
            raise ValueError(
                f"x must span few units: from {low:g} to {high:g} the grid needs {need:,.0f} points "
                f"at {self.points_per_unit} a unit, more than {MAX_GRID:,}: rescale x"
            )
        count = -(-int(need + 1) // self.stride) * self.stride
        start = (low - self.margin - step) * self.points_per_unit - (count - need) / 2
        first = torch.floor(x.new_tensor(start, dtype=torch.float64) + 0.5)
        return ((first + torch.arange(count, device=x.device)) * step).to(wide(x).dtype)

    def _kernel(self, x: Tensor, place: Tensor, log_scale: Tensor) -> Tensor:
        """Return weights between points and grid: (tasks, points, grid)."""
        return torch.exp(-0.5 * ((x - place) / wide(log_scale).exp()).square())

    def _weights(self, x: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        return self._kernel(x, place, self.encoder_log_scale) * mask[..., None]

    def _points(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        assert place is not None
        return self._weights(x, mask, place)[:, :, None] * F.pad(wide(y), (1, 0), value=1.0)[..., None]

    def _sum(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        assert place is not None
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(wide(y), (1, 0), value=1.0).mT @ self._weights(x, mask, place)

    def _at(self, total: Tensor, x: Tensor, place: Tensor | None) -> Normal:
        assert place is not None
        density, data = total[:, :1], total[:, 1:]
        grid = self.network(torch.cat([density, data / (density + 1e-4)], dim=1).to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            read = self._kernel(x, place, self.decoder_log_scale) @ wide(grid).mT
        return _normal(*read.to(x.dtype).chunk(2, dim=-1))


class _Residual(nn.Module):
    """Residual convolutions at full resolution."""

    def __init__(self, n_in: int, n_out: int, channels: Sequence[int], kernel_size: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(n_in, channels[0], 1), nn.Conv1d(channels[-1], n_out, 1)
        pairs = list(zip([channels[0], *channels[:-1]], channels, strict=True))
        self.convs = nn.ModuleList(nn.Conv1d(a, b, kernel_size, padding=kernel_size // 2) for a, b in pairs)
        self.skips = nn.ModuleList(nn.Identity() if a == b else nn.Conv1d(a, b, 1) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv, skip in zip(self.convs, self.skips, strict=True):
            x = skip(x) + conv(x.relu())
        return self.last(x.relu())


class _UNet(nn.Module):
    """Levels of stride 2, down and up again, with skips by concatenation."""

    def __init__(self, n_in: int, n_out: int, channels: Sequence[int], kernel_size: int) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.first, self.last = nn.Conv1d(n_in, channels[0], 1), nn.Conv1d(2 * channels[0], n_out, 1)
        wide = [channels[0], *channels]
        pairs = list(zip(wide[:-1], wide[1:], strict=True))
        self.down = nn.ModuleList(nn.Conv1d(a, b, kernel_size, stride=2, padding=pad) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(b if k == len(pairs) - 1 else 2 * b, a, kernel_size, stride=2, padding=pad,
                               output_padding=1)
            for k, (a, b) in enumerate(pairs)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        kept = []
        for conv in self.down:
            kept.append(x)
            x = conv(x).relu()
        for conv in reversed(self.up):
            x = torch.cat([conv(x).relu(), kept.pop()], dim=1)
        return self.last(x)
