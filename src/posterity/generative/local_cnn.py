"""Denoisers that look at a few pixels and know no scale: convolutions without any bias.

A network whose receptive field is r x r pixels can only use what those say: the score that it
learns is that of a Markov field with such neighbourhoods, the same everywhere. Without a bias,

    net(a v) = a net(v)   for a > 0,                                          (1)

so it need not be told the level of the noise: what it learned at one, it does at others. The
norm between the layers keeps (1) at rest: it divides by a deviation and subtracts no mean.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer, one_of
from posterity._models import at_rest
from posterity._precision import wide

__all__ = ["LocalCNN"]

Blind = Callable[[Tensor], Tensor]  # noisy values, and what they are conditioned on, to noise


class ScaleNorm(nn.Module):
    """Divide each channel by its standard deviation over the batch, times a gain; no mean, no bias."""

    running_std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter((torch.randn(width) * 2 / (9 * width)).clamp(-0.025, 0.025))
        self.register_buffer("running_std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        std = self.running_std
        if self.training:
            std = (wide(x).var((0, 2, 3), correction=0) + 1e-5).sqrt()
            with torch.no_grad():
                self.running_std.lerp_(std.to(self.running_std.dtype), 0.1)
        return x * self.factor(std).to(x.dtype)[:, None, None]

    def factor(self, std: Tensor) -> Tensor:
        return wide(self.gain) / wide(std)


class LocalCNN(nn.Module):
    """A blind denoiser with a small receptive field, which returns the noise that it sees.

    Layers of 3 x 3, as many as the field needs, are spread evenly between layers of 1 x 1. The
    first and the last are linear, 3 x 3; each other is followed by the norm and a ReLU.

    Parameters
    ----------
    in_channels : int
        Channels of the input, at least 1; what the noise is conditioned on comes first.
    out_channels : int
        Channels of the noise, at least 1.
    receptive_field : int, default=13
        Side of the square of pixels that one output depends on: odd, from 5 to ``2 n_layers + 1``.
    n_layers : int, default=21
        Layers, at least 2.
    width : int, default=64
        Channels between the layers, at least 1.
    norm : bool, default=True
        Whether to divide by deviations, of the batch in training and of the past at rest.
        Without it a short training does better.
    predict : {"noise", "clean"}, default="noise"
        What the layers estimate. With "clean" the last ``out_channels`` of the input, less that
        estimate, are returned: noise either way. It learns faster, for noise is hard to pass
        through a stack of ReLUs.

    Raises
    ------
    ValueError
        If a size is out of range, or "clean" has fewer channels coming in than going out.

    Notes
    -----
    1. The 3 x 3 layers of any depth stand where those of the official 21 do; of the official
       field 9, which is no divisor, they stand within one layer.
    2. The official gains are drawn for a width of 64; here for any.

    References
    ----------
    .. [1] Kadkhodaie et al. Learning multi-scale local conditional probability models of images.
       ICLR 2023. Section 3 and Appendix.
    .. [2] Mohan et al. Robust and interpretable blind image denoising via bias-free convolutional
       neural networks. ICLR 2020.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import LocalCNN
    >>> net = LocalCNN(1, 1, receptive_field=5, n_layers=3, width=8, norm=False)
    >>> v = torch.zeros(1, 1, 9, 9)
    >>> v[0, 0, 4, 4] = 1.0  # one pixel reaches 5 x 5 others
    >>> int((net(v) != 0).sum())
    25
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, receptive_field: int = 13, n_layers: int = 21,
        width: int = 64, norm: bool = True, predict: Literal["noise", "clean"] = "noise",
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        integer("n_layers", n_layers, 2)
        integer("width", width, 1)
        self.receptive_field = _field(receptive_field, n_layers)
        self.predict = one_of("predict", predict, ("noise", "clean"))
        if predict == "clean" and out_channels > in_channels:
            raise ValueError(f"out_channels must be at most in_channels, {in_channels}, for predict='clean', got {out_channels}")  # fmt: skip
        reach = (self.receptive_field - 1) // 2
        large = {round(k * (n_layers - 1) / (reach - 1)) for k in range(reach)}
        sizes = [in_channels, *[width] * (n_layers - 1), out_channels]
        kernels = [3 if layer in large else 1 for layer in range(n_layers)]
        self.convs = nn.ModuleList(
            nn.Conv2d(sizes[k], sizes[k + 1], kernel, padding=kernel // 2, bias=False)
            for k, kernel in enumerate(kernels)
        )
        self.norms = nn.ModuleList(ScaleNorm(width) if norm else nn.Identity() for _ in range(n_layers - 2))
        if not norm:
            for conv in self.convs:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type]
            with torch.no_grad():
                self.convs[-1].weight.mul_(0.05)  # type: ignore[operator]

    def forward(self, v: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n out height width"]:
        """Return the noise in the last ``out_channels`` of the input.

        Parameters
        ----------
        v : Tensor of shape (n, in_channels, h, w)
            Conditions, then noisy values; of any size.

        Returns
        -------
        Tensor of shape (n, out_channels, h, w)
            Estimated noise.
        """
        has_shape("v", floating("v", v), (None, self.in_channels, None, None), "in_channels")
        if 0 in v.shape:
            raise ValueError(f"v must have images and pixels, got shape {tuple(v.shape)}")
        x = self.convs[0](v)
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):  # type: ignore[arg-type]
            x = norm(conv(x)).relu_()
        return self._noise(v, self.convs[-1](x))

    def _noise(self, v: Tensor, estimate: Tensor) -> Tensor:
        return estimate if self.predict == "noise" else v[:, -self.out_channels :] - estimate


def _field(receptive_field: Any, n_layers: int) -> int:
    largest = 2 * n_layers + 1
    value = integer("receptive_field", receptive_field)
    if value % 2 == 0 or not 5 <= value <= largest:
        raise ValueError(
            f"receptive_field must be odd, from 5 to {largest} with n_layers={n_layers}, got {value}"
        )
    return value


@contextmanager
def _resting(*nets: Any) -> Iterator[list[Blind]]:
    """Yield networks in eval mode, as functions as fast as they can be; modules get their modes back."""
    with at_rest(*nets):
        yield [_folded(net) for net in nets]


def _folded(net: Any) -> Blind:
    """Return a network at rest as a function, norms multiplied into the convolutions before them.

    Only where nobody would notice: no hooks, and none of the layers replaced.
    """
    if type(net) is not LocalCNN:
        return net
    for module in net.modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        plain = type(module) in (LocalCNN, nn.ModuleList, nn.Conv2d, ScaleNorm, nn.Identity)
        if hooked or not plain:
            return net
    weights: list[Any] = [conv.weight for conv in net.convs]
    for k, norm in enumerate(net.norms, 1):
        if isinstance(norm, ScaleNorm):
            factor = norm.factor(norm.running_std)[:, None, None, None]
            weights[k] = (wide(weights[k]) * factor).to(weights[k].dtype)

    def call(v: Tensor) -> Tensor:
        x = v
        for k, weight in enumerate(weights):
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
            x = x.relu_() if 0 < k < len(weights) - 1 else x
        return net._noise(v, x)

    return call
