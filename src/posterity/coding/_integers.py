"""A network in integer arithmetic: the same numbers on every machine, at any batch size and thread count.

A decoder must come to the distributions that the encoder had, to the last bit; sums of floats depend on the
order of summation, sums of integers do not. Numbers are held as float64 integers in units of 2^-12, weights
likewise; a layer's sums stay below 2^53, so each is exact in whatever order it is made. Then they are
shifted right, rounding down, and clipped to +-2^24 (4,096 in magnitude).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNIT", "integer_network", "to_units"]

UNIT = 2.0**12
LIMIT = 2.0**24
EXACT = 2.0**53


def to_units(x: Tensor) -> Tensor:
    """Return a tensor in integers of 2^-12, rounded and clipped, as float64."""
    return torch.floor(x.double() * UNIT + 0.5).clamp(-LIMIT, LIMIT)


def integer_network(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return layers as an integer network: units in, units out (batch, channels, height, width).

    Takes Conv2d and ConvTranspose2d (zero padding, one group), ReLU, LeakyReLU, and what only moves numbers:
    PixelShuffle, nearest Upsample, Identity, Flatten; Dropout goes. Raises ValueError for another layer, and
    for weights so large that sums would not be exact. What comes back has no parameters.
    """
    made: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            made.append(_IntegerConv(layer))
        elif isinstance(layer, nn.ReLU):
            made.append(nn.ReLU())
        elif isinstance(layer, nn.LeakyReLU):
            made.append(_IntegerLeaky(layer.negative_slope))
        elif isinstance(layer, nn.PixelShuffle | nn.Identity | nn.Flatten) or (
            isinstance(layer, nn.Upsample) and layer.mode == "nearest"
        ):
            made.append(layer)
        elif not isinstance(layer, nn.Dropout | nn.Dropout2d):
            raise ValueError(f"layers must have an exact integer form, got {layer}")
    return nn.Sequential(*made).eval()


class _IntegerConv(nn.Module):
    """A convolution of units: windows as columns, multiplied in float64, shifted right by 12 bits."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"layers must have one group and zero padding in numbers, got {conv}")
        self.conv = {
            "kernel_size": conv.kernel_size, "stride": conv.stride,
            "padding": conv.padding, "dilation": conv.dilation,
        }  # fmt: skip
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        self.output_padding = conv.output_padding
        weight = conv.weight.detach().double()
        if self.transposed:  # (in, out, *kernel): columns to fold
            weight = weight.flatten(1).mT
        self.register_buffer("weight", torch.floor(weight.flatten(1) * UNIT + 0.5))
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", torch.floor(bias.double() * UNIT**2 + 0.5)[:, None])
        bound = float(self.weight.abs().sum()) if self.transposed else float(self.weight.abs().sum(1).max())
        if not bound * LIMIT + float(self.bias.abs().max()) < EXACT:  # NaN is not
            raise ValueError(f"layers must have finite weights of moderate size, got {conv}: sums would not be exact")  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        sums = self._spread(x) if self.transposed else self._gathered(x)
        # in place, since each of these is a pass over memory
        return sums.add_(self.bias[..., None]).div_(UNIT).floor_().clamp_(-LIMIT, LIMIT)

    def _gathered(self, x: Tensor) -> Tensor:
        """Return sums over windows: views of x, copied once into columns (`F.unfold` takes several times as long)."""
        (down, right), steps, gaps = self.conv["padding"], self.conv["stride"], self.conv["dilation"]
        windows = F.pad(x, (right, right, down, down)) if down or right else x
        for axis, side in enumerate(self.conv["kernel_size"]):
            windows = windows.unfold(2 + axis, gaps[axis] * (side - 1) + 1, steps[axis])
        windows = windows[..., :: gaps[0], :: gaps[1]]  # (batch, channels, *places, *kernel)
        columns = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
        return (self.weight @ columns).unflatten(2, windows.shape[2:4])

    def _spread(self, x: Tensor) -> Tensor:
        """Return sums where the windows of all places overlap."""
        size = [
            (side - 1) * step - 2 * pad + gap * (kernel - 1) + 1 + extra
            for side, step, pad, gap, kernel, extra in zip(
                x.shape[2:], self.conv["stride"], self.conv["padding"], self.conv["dilation"],
                self.conv["kernel_size"], self.output_padding, strict=True,
            )
        ]  # fmt: skip
        return F.fold(self.weight @ x.flatten(2), size, **self.conv)  # pyright: ignore


class _IntegerLeaky(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = float(round(slope * UNIT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, torch.floor(x * self.slope / UNIT), x)
