"""Interval bounds: the box that holds whatever a network makes of a box.

A box has a center c and a radius r in each coordinate. A linear map, a convolution and the
sums inside a Runge-Kutta step send it to

    W c + b,  |W| r;          y + h sum a_j k_j:  r_y + |h| sum |a_j| r_j,               (1)

a ReLU to the box between the values at its ends. Where bounds are a proof they are computed in
float64, and each box is widened by 1e-9 of its largest magnitude before it is used: some million
times what rounding can do.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import finite, floating
from posterity._precision import NARROW
from posterity.robustness.neural_ode import NeuralODEBlock, TimeConv2d, TimeLinear
from posterity.robustness.ode_solver import Step, Tableau

__all__ = []

SLACK = 1e-9
AFFINE = (nn.Linear, nn.Conv2d, TimeLinear, TimeConv2d)
PLAIN = (nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d)  # linear, without weights


class Box(NamedTuple):
    """All x with |x - center| <= radius, coordinate by coordinate."""

    center: Tensor
    radius: Tensor

    @property
    def lower(self) -> Tensor:
        """The least corner."""
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        """The greatest corner."""
        return self.center + self.radius


def between(lower: Tensor, upper: Tensor) -> Box:
    """Return the box of two corners."""
    return Box((lower + upper) / 2, (upper - lower) / 2)


def widen(box: Box, slack: float) -> Box:
    """Return a box that also holds what rounding may have done to it."""
    return Box(box.center, box.radius + slack * (box.center.abs() + box.radius)) if slack else box


def affine(layer: nn.Module, t: float, x: Tensor) -> Tensor:
    """Return what a layer without a kink makes of a point, at time ``t``."""
    return layer(t, x) if isinstance(layer, (TimeLinear, TimeConv2d)) else layer(x)


def state_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer on the state alone, without the time."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight[:, :-1] if isinstance(layer, (TimeLinear, TimeConv2d)) else weight


def through_layer(layer: nn.Module, box: Box, t: float = 0.0, slack: float = 0.0) -> Box:
    """Return the box after one layer."""
    if isinstance(layer, nn.ReLU):
        return between(box.lower.relu(), box.upper.relu())
    box = widen(box, slack)
    center = affine(layer, t, box.center)
    if isinstance(layer, PLAIN):
        return Box(center, layer(box.radius))
    weight = state_weight(layer).abs()
    if weight.ndim == 2:
        return Box(center, F.linear(box.radius, weight))
    if isinstance(layer, TimeConv2d):
        return Box(center, F.conv2d(box.radius, weight, padding=layer.padding))
    assert isinstance(layer, nn.Conv2d)
    radius = F.conv2d(box.radius, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return Box(center, radius)


Kinks = list[tuple[Tensor, Tensor]]  # the ends of what comes to each ReLU


def through_field(func: nn.Sequential, t: float, box: Box, slack: float, kinks: Kinks | None) -> Box:
    """Return the box of the slopes on a box; ``kinks`` collects what comes to each ReLU."""
    for layer in func:
        if kinks is not None and isinstance(layer, nn.ReLU):
            kinks.append((box.lower, box.upper))
        box = through_layer(layer, box, t, slack)
    return widen(box, slack)


def through_step(
    func: nn.Sequential, step: Step, box: Box, tableau: Tableau, slack: float = 0.0, *, keep: bool = False
) -> tuple[Box, Box, list[Kinks]]:
    """Return the boxes of the state after a step and of its error, and each stage's kinks if kept."""
    t, h = float(step.t), float(step.h)
    box, stages, slopes, state = widen(box, slack), [], [], box
    for c, row in zip(tableau.c, ((), *tableau.a), strict=True):
        state = _combined(box, row, slopes, h)
        kinks: Kinks = []
        slopes.append(through_field(func, t + c * h, state, slack, kinks if keep else None))
        stages.append(kinks)
    nothing = Box(torch.zeros_like(box.center), torch.zeros_like(box.radius))
    return state, _combined(nothing, tableau.error, slopes, h), stages


def _combined(box: Box, weights: Sequence[float], slopes: list[Box], h: float) -> Box:
    center, radius = box
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            center = torch.add(center, slope.center, alpha=h * weight)
            radius = torch.add(radius, slope.radius, alpha=abs(h * weight))
    return Box(center, radius)


def error_bounds(error: Box, atol: float, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest error of each sample, in units of the tolerance."""
    size = error.center.abs()
    least = (size - error.radius).clamp_min(0).flatten(1).sum(1) / atol
    most = (size + error.radius).flatten(1).sum(1) / atol
    return least * (1 - slack), most * (1 + slack)


def check_network(net: nn.Module) -> None:
    """Refuse a network in which a layer has no bounds here, or whose dtype is narrow."""
    if not isinstance(net, nn.Sequential) or not len(net):
        raise ValueError(f"net must be an nn.Sequential with layers, got {type(net).__name__}")
    for index, layer in enumerate(net):
        what = f"got {type(layer).__name__} at {index}"
        if type(layer) not in (nn.Linear, nn.Conv2d, nn.ReLU, NeuralODEBlock, *PLAIN):
            raise ValueError(
                "net must be of Linear, Conv2d, ReLU, Flatten, Identity, AdaptiveAvgPool2d(1) and "
                f"NeuralODEBlock, {what}"
            )
        for part in layer.modules():
            if isinstance(part, nn.Conv2d) and (
                part.padding_mode != "zeros" or isinstance(part.padding, str)
            ):
                raise ValueError(f"net must pad its convolutions with a number of zeros, {what}")
        if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
            raise ValueError(f"net must average over all of an image, {what} of size {layer.output_size}")
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
            raise ValueError(
                f"net must flatten all but the batch, {what} of {layer.start_dim} to {layer.end_dim}"
            )
    for name, value in net.named_parameters():
        if value.dtype in NARROW or not value.is_floating_point():
            raise ValueError(f"net must be in float32 or float64, got {value.dtype} in {name}")


def exact(net: nn.Module, example: Tensor, name: str) -> nn.Sequential:
    """Return a checked network in float64 and eval mode, after one sample has gone through it."""
    check_network(net)
    twin = copy.deepcopy(net).double().eval().requires_grad_(False)
    try:
        out = twin(example[:1].double())
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{name} must fit net, got shape {tuple(example.shape)}: {error}") from error
    if out.ndim != 2:
        raise ValueError(f"net must return a vector a sample, got shape {tuple(out.shape)} of one")
    return twin  # type: ignore[return-value]


def check_box(lower: Tensor, upper: Tensor, *, one: bool = False) -> tuple[Tensor, Tensor]:
    """Return the corners of boxes in float64."""
    for name, value in (("lower", lower), ("upper", upper)):
        finite(name, floating(name, value))
    if lower.ndim < 2 or not lower.numel():
        raise ValueError(f"lower must have samples and features, got shape {tuple(lower.shape)}")
    if lower.shape != upper.shape:
        raise ValueError(
            f"upper must have the shape of lower, {tuple(lower.shape)}, got {tuple(upper.shape)}"
        )
    if one and len(lower) != 1:
        raise ValueError(f"lower must be one sample, since a proof is of one, got {len(lower)}")
    lower, upper = lower.detach().double(), upper.detach().double()
    if not bool((lower <= upper).all()):
        raise ValueError("lower must be at most upper in every coordinate")
    return lower, upper
