"""Layers that carry tangents: a forward pass that can be moved along, and its gradient from noise.

A layer is normalise, multiply, normalise, [noise], ReLU, on activations (batch, patches, groups,
channels). Its normalisations have no parameters; for deviation s and normalised values y of C
channels their Jacobian

    J = (I - 1 1^T / C - y y^T / C) / s                                                       (1)

is symmetric, so one fused kernel takes tangents forward and gradients back. Noise on the
pre-activation, times the tangent of the losses that it reaches, estimates the gradient there, and
J and an outer product with the layer's input make it that of the weight: nothing else is stored.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._precision import wide
from posterity.optimization.local_forward_gradient import _draw

__all__: list[str] = []

EPS = 1e-5  # of every normalisation


class _Normal(NamedTuple):
    """A normalisation at its input, to move along."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    axes: int

    def tangent(self, d: Tensor) -> Tensor:
        """Return the Jacobian times a tangent; it is symmetric, so times a gradient as well."""
        return torch.ops.aten.native_layer_norm_backward(
            d.contiguous(), self.x, self.x.shape[-self.axes :], self.mean, self.rstd, None, None, [True, False, False]
        )[0]  # fmt: skip


def _normalized(x: Tensor, axes: int) -> tuple[Tensor, _Normal]:
    """Normalise over the last axes: 2 is all channels, 1 those of the own group."""
    x = x.contiguous()
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-axes:], None, None, EPS)
    return y, _Normal(x, mean, rstd, axes)


class _Layer(nn.Module):
    """Normalise, multiply, normalise: what comes before the noise and the ReLU."""

    axes = 2  # that are normalised
    own = False  # whether a group of the output is seen by the losses of that group alone

    def __init__(
        self, weight: tuple[int, ...], bias: tuple[int, ...], fan_in: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        std = min(2 / math.sqrt(fan_in), 0.1)  # of the official code
        self.bias = nn.Parameter(torch.zeros(bias))  # of axes that broadcast to activations
        self.weight = nn.Parameter(
            std * _draw(self.bias.detach(), weight, "normal", generator).to(self.bias.dtype)
        )

    def product(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return the product with a weight, or with a direction of its shape."""
        raise NotImplementedError

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the weight, given that of the product."""
        raise NotImplementedError


class _Patches(_Layer):
    """A linear layer over patches that all channels share.

    Its bias is one for each channel: one for each patch would vanish in the normalisation.
    """

    def __init__(self, n_patches: int, groups: int, channels: int, generator: torch.Generator | None) -> None:
        super().__init__((n_patches, n_patches), (groups, channels), n_patches, generator)

    def product(self, y: Tensor, weight: Tensor) -> Tensor:
        return wide(weight @ y.flatten(2).to(weight.dtype)).view_as(y)

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        return (grad.flatten(2) @ y.flatten(2).mT).sum(0)


class _Depthwise(_Layer):
    """A convolution over the grid of patches, with a kernel for each channel."""

    def __init__(self, size: int, groups: int, channels: int, generator: torch.Generator | None) -> None:
        super().__init__((groups * channels, 1, size, size), (groups, channels), size**2, generator)

    def product(self, y: Tensor, weight: Tensor) -> Tensor:
        out = F.conv2d(_grid(y).to(weight.dtype), weight, padding=weight.shape[-1] // 2, groups=len(weight))
        return wide(out).flatten(2).mT.reshape(y.shape)

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        shape = self.weight.shape
        return torch.nn.grad.conv2d_weight(
            _grid(y), shape, _grid(grad), padding=shape[-1] // 2, groups=shape[0]
        )


class _Channels(_Layer):
    """A linear layer over all channels."""

    own = True

    def __init__(self, inputs: int, outputs: int, groups: int, generator: torch.Generator | None) -> None:
        super().__init__((inputs, outputs), (groups, outputs // groups), inputs, generator)

    def product(self, y: Tensor, weight: Tensor) -> Tensor:
        return wide(y.flatten(2).to(weight.dtype) @ weight).unflatten(2, self.bias.shape)

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        return y.flatten(0, 1).flatten(1).mT @ grad.flatten(0, 1).flatten(1)


class _Grouped(_Layer):
    """A linear layer for each group."""

    axes = 1
    own = True

    def __init__(self, inputs: int, outputs: int, groups: int, generator: torch.Generator | None) -> None:
        inputs, outputs = inputs // groups, outputs // groups
        super().__init__((groups, inputs, outputs), (groups, outputs), inputs, generator)

    def product(self, y: Tensor, weight: Tensor) -> Tensor:
        return wide(_by_group(y).to(weight.dtype) @ weight).transpose(0, 1).unflatten(0, y.shape[:2])

    def gradient(self, y: Tensor, grad: Tensor) -> Tensor:
        return _by_group(y).mT @ _by_group(grad)


class _Pass(NamedTuple):
    """What a layer went through in a forward pass."""

    layer: _Layer
    before: _Normal
    y: Tensor  # the layer's normalised input
    after: _Normal
    out: Tensor
    skips: bool  # whether the block's input was added

    def noise(self, by_weight: bool, draw: Callable[..., Tensor]) -> list[Tensor]:
        """Return noise on weight and bias, or on the pre-activation: there 0 where the gradient is."""
        if by_weight:
            return [draw(each, each.shape) for each in (self.layer.weight, self.layer.bias)]
        return [self.through(draw(self.after.x, self.after.x.shape))]

    def push(self, d: Tensor | None, skip: Tensor | None, noise: list[Tensor]) -> Tensor:
        """Return the tangent of the output, from that of the input and of the block's input."""
        if len(noise) == 1:
            if d is None:
                return noise[0]
            out = self.after.tangent(self.layer.product(self.before.tangent(d), self.layer.weight)).add_(
                noise[0]
            )
        else:
            out = self.layer.product(self.y, noise[0]) + noise[1]
            if d is not None:
                out += self.layer.product(self.before.tangent(d), self.layer.weight)
            out = self.after.tangent(out)
        if self.skips and skip is not None:
            out += skip
        return self.through(out)

    def through(self, d: Tensor) -> Tensor:
        """Return a tangent or gradient behind the ReLU: 0 where that is off."""
        return torch.ops.aten.threshold_backward(d, self.out, 0)

    def paired(self, noise: list[Tensor], t: Tensor) -> list[Tensor]:
        """Return noise times the tangents of those losses that it reaches."""
        if len(noise) == 1:
            return [noise[0].mul_((t if self.layer.own else t.sum(-1, keepdim=True))[..., None])]
        t = t.sum((0, 1))  # of each group
        if self.layer.axes == 2:  # normalising over all channels carries a weight's noise to every group
            t = t.sum(0, keepdim=True)
        return [each.mul_(t.view(-1, *[1] * (each.ndim - 1))) for each in noise]

    def gradients(self, paired: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        """Return those of weight and bias."""
        layer = self.layer
        if len(paired) == 1:
            grad = self.after.tangent(paired[0])
            paired = [layer.gradient(self.y, grad), grad.sum_to_size(layer.bias.shape)]
        return dict(zip((layer.weight, layer.bias), paired, strict=True))


class _Block(nn.ModuleList):
    """Layers with a ReLU each; before that of the last the block's input is added."""

    def __init__(self, layers: Sequence[_Layer], residual: bool) -> None:
        super().__init__(layers)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, list[_Pass]]:
        """Return the features, and what each layer went through."""
        start, passes = x, []
        for k, layer in enumerate(self):
            skips = self.residual and k == len(self) - 1
            y, before = _normalized(x, layer.axes)
            x, after = _normalized(layer.product(y, layer.weight) + layer.bias, layer.axes)
            x = F.relu(x + start if skips else x)
            passes.append(_Pass(layer, before, y, after, x, skips))
        return x, passes


def _perturbed(
    runs: list[list[_Pass]],
    tangent: Callable[[Tensor], Tensor],
    by_weight: bool,
    n_samples: int,
    draw: Callable[..., Tensor],
) -> dict[nn.Parameter, Tensor]:
    """Return estimated gradients of blocks: the noise, paired with the tangents that it causes."""
    passes = [each for run in runs for each in run]
    total: list[list[Tensor]] = []
    for _ in range(n_samples):
        noise = [each.noise(by_weight, draw) for each in passes]
        d, drawn = None, iter(noise)
        for run in runs:
            start = d
            for each in run:
                d = each.push(d, start, next(drawn))
        assert d is not None
        t = tangent(d) / (n_samples * len(d))  # losses are means over the batch
        noise = [each.paired(v, t) for each, v in zip(passes, noise, strict=True)]
        total = (
            [[a + b for a, b in zip(*both, strict=True)] for both in zip(total, noise, strict=True)]
            if total
            else noise
        )
    return {
        key: value for each, v in zip(passes, total, strict=True) for key, value in each.gradients(v).items()
    }


def _by_group(y: Tensor) -> Tensor:
    """Return (batch, patches, groups, channels) as (groups, batch * patches, channels)."""
    return y.flatten(0, 1).transpose(0, 1)


def _grid(y: Tensor) -> Tensor:
    """Return (batch, patches, groups, channels) as (batch, all channels, side, side)."""
    side = math.isqrt(y.shape[1])
    return y.flatten(2).mT.unflatten(2, (side, side))
