"""Layers whose weights have zero channels, made smaller: the same network with fewer multiplications."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from posterity.compression._layers import WEIGHTED, in_place_of

__all__: list[str] = []

READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # use a layer's weight without calling it
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.no_grad()
def without_zero_channels(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a model, changed in place, with smaller layers for the named ones that have zero channels.

    Plain stay grouped convolutions, layers with hooks, of classes of their own, and attention's. A layer that is all
    zero keeps one channel.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        layer: Any = modules[name]
        parent = modules[name.rpartition(".")[0]]
        if (
            type(layer) not in WEIGHTED
            or getattr(layer, "groups", 1) > 1
            or isinstance(parent, READS_WEIGHTS)
        ):
            continue
        if any(getattr(layer, hooks) for hooks in HOOKS):
            continue
        used = (layer.weight != 0).reshape(*layer.weight.shape[:2], -1).any(2)
        inputs, outputs = (_places(side) for side in (used.any(0), used.any(1)))
        if (len(outputs), len(inputs)) == used.shape:
            continue
        small = _smaller(layer, inputs, outputs)
        if not name:
            return small
        for where, module in modules.items():
            if module is layer:
                above, _, leaf = where.rpartition(".")
                setattr(modules[above], leaf, small)
    return model


def _places(used: Tensor) -> Tensor:
    return used.nonzero()[:, 0] if bool(used.any()) else used.new_zeros(1, dtype=torch.int64)


def _smaller(layer: Any, inputs: Tensor, outputs: Tensor) -> nn.Module:
    """Return a layer without zero channels between what picks its inputs and what places its outputs."""
    spatial = layer.weight.ndim - 2
    n_out, n_in = layer.weight.shape[:2]
    small = copy.deepcopy(layer)
    ends = ("in_channels", "out_channels") if spatial else ("in_features", "out_features")
    for end, kept in zip(ends, (inputs, outputs), strict=True):
        setattr(small, end, len(kept))
    small.weight = nn.Parameter(layer.weight[outputs][:, inputs].clone())
    root, graph = nn.Module(), fx.Graph()
    root.layer = small
    x = graph.placeholder("input")
    if len(inputs) < n_in:
        root.register_buffer("inputs", inputs)
        x = graph.call_method("index_select", (x, -1 - spatial, graph.get_attr("inputs")))
    x = graph.call_module("layer", (x,))
    if len(outputs) < n_out:  # one channel of zeros behind the others, which all that is skipped points to
        places = torch.full((n_out,), len(outputs), device=outputs.device)
        places[outputs] = torch.arange(len(outputs), device=outputs.device)
        root.register_buffer("outputs", places)
        x = graph.call_function(F.pad, (x, (0, 0) * spatial + (0, 1)))
        x = graph.call_method("index_select", (x, -1 - spatial, graph.get_attr("outputs")))
        if layer.bias is not None:
            root.register_parameter("bias", nn.Parameter(layer.bias.reshape(-1, *[1] * spatial).clone()))
            small.bias = None
            x = graph.call_function(torch.add, (x, graph.get_attr("bias")))
    graph.output(x)
    return in_place_of(layer, root, graph, "CompactLayer")
