"""Squared norms of single samples' gradients by Linear and Conv weights, from one forward and one backward pass.

What enters a layer and the gradient of what leaves it make the gradient of each sample, ``G_i = g_i^T x_i``. Its
norm needs the product itself, or with few positions only the Gram form ``sum_tu (x_t . x_u)(g_t . g_u)``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import grad, vmap

from posterity._models import call, not_batched, state
from posterity._precision import wide
from posterity.compression._layers import WEIGHTED

__all__: list[str] = []

BLOCK = 2**24  # numbers that a block of patches, or of gradients, may hold


class Calls:
    """A pass through a model that keeps what enters and what leaves the layers (as a context: hooks are on)."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.model = model
        own = {id(p): name for name, p in model.named_parameters()}
        self.params = {layer: own[id(module.weight)] for layer, module in modules.items()}
        trained, rest = state(model)
        # all count as parameters, also frozen ones: an input depends on them
        self.tensors = {
            name: value.requires_grad_() if name in own.values() and value.is_floating_point() else value
            for name, value in (trained | rest).items()
        }
        self.layers = {own_name: layer for layer, own_name in self.params.items()}
        self.inputs: dict[str, list[Tensor]] = {layer: [] for layer in modules}
        self.depends: dict[str, bool] = dict.fromkeys(modules, False)
        self.outputs: dict[str, list[tuple[GradientEdge | None, Tensor]]] = {layer: [] for layer in modules}
        self.modules = dict(modules)
        self.elsewhere: set[str] = set()  # layers whose weight is also used in another way
        self.watched: list[tuple[nn.Module, str]] = []
        for module in model.modules():
            for attribute, p in module._parameters.items():
                layer = self.layers.get(own.get(id(p), ""))
                if layer is not None and attribute == "weight" and isinstance(module, WEIGHTED):
                    self.watched.append((module, layer))
                elif layer is not None:
                    self.elsewhere.add(layer)

    def __enter__(self) -> "Calls":
        self.handles = []
        for module, layer in self.watched:
            self.handles.append(module.register_forward_pre_hook(self._entering(layer), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leaving(layer)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _entering(self, layer: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            x, *rest = args or (kwargs.pop("input"),)
            if not x.is_floating_point():
                raise ValueError(
                    f"batches must be floating-point where a layer takes them, got {x.dtype} at {layer!r}"
                )
            self.depends[layer] |= x.requires_grad
            # a tensor of this layer's own: its gradient is what comes back through the layer, and no more
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self.inputs[layer].append(x)
            return (x, *rest), kwargs

        return hook

    def _leaving(self, layer: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            if output._is_view():  # a change in place of a view takes its place in the graph away
                output = output.clone()
            # of the output as it is now, also if a ReLU in place follows
            edge = get_gradient_edge(output) if output.requires_grad else None
            self.outputs[layer].append((edge, output.detach()))
            return output

        return hook

    def forward(self, x: Tensor) -> Any:
        return call(self.model, self.tensors, x)

    def backward(self, total: Tensor, *, weights: bool) -> None:
        """Compute the gradients of inputs, and of weights or else of outputs."""
        if not total.requires_grad:
            raise ValueError("loss must depend on the model's parameters, got one that does not")
        # of inputs only where they count: the gradient by the data itself is not computed
        places = [
            *(("input", site, x, x) for site in self._sites() for x in self.inputs[site]),
            *((("weight", layer, self.tensors[name], self.tensors[name]) for layer, name in self.params.items())
              if weights else (("output", layer, *at) for layer, calls in self.outputs.items() for at in calls)),
        ]  # fmt: skip
        wanted = [at for _, _, at, _ in places if at is not None]
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ())
        self.grads: dict[str, dict[str, list[Tensor]]] = {
            side: {layer: [] for layer in self.inputs} for side in ("input", "output", "weight")
        }
        for side, layer, at, value in places:
            g = None if at is None else next(found)
            self.grads[side][layer].append(torch.zeros_like(value) if g is None else g)

    def _sites(self) -> list[str]:
        return [layer for layer, depends in self.depends.items() if depends]

    def input_norms(self) -> dict[str, float]:
        """Return the squared gradients by what enters each layer, summed over samples."""
        return {site: sum(_squares(g) for g in self.grads["input"][site]) for site in self._sites()}

    def input_ranges(self) -> dict[str, float]:
        """Return largest less smallest value of what enters each layer."""
        ends = {site: [wide(x.detach()).aminmax() for x in self.inputs[site]] for site in self._sites()}
        return {
            site: max(float(e.max) for e in all_) - min(float(e.min) for e in all_)
            for site, all_ in ends.items()
        }

    def input_sizes(self) -> dict[str, int]:
        """Return the elements that enter each layer in this batch."""
        return {site: sum(x.numel() for x in self.inputs[site]) for site in self._sites()}


def squared_norms(
    calls: Calls, x: Tensor, y: Tensor, loss: Callable[[Any, Any], Tensor], *, each: bool
) -> dict[str, float]:
    """Return, for each layer, the squared norm of its weight's gradient: summed over samples, or n times the mean's."""
    n = len(x)
    if not each:
        return {layer: _squares(g) for layer, (g,) in calls.grads["weight"].items()}
    totals = {}
    for layer, module in calls.modules.items():
        pairs = list(zip(calls.inputs[layer], calls.grads["output"][layer], strict=True))
        if layer not in calls.elsewhere and pairs and all(_by_sample(module, a, n) for a, _ in pairs):
            totals[layer] = _from_calls(module, [(a.detach(), g) for a, g in pairs], n)
        else:
            totals[layer] = _one_by_one(calls, calls.params[layer], x, y, loss)
    return totals


def _by_sample(module: nn.Module, x: Tensor, n: int) -> bool:
    """Return whether the first axis of an input is surely that of the samples."""
    if isinstance(module, nn.Linear):  # (time, batch, features) with as many times as samples could be either
        return x.ndim >= 2 and len(x) == n and (x.ndim == 2 or n == 1 or x.shape[1] != n)
    return x.ndim == module.weight.ndim and len(x) == n  # type: ignore[union-attr]


def _from_calls(module: nn.Module, pairs: list[tuple[Tensor, Tensor]], n: int) -> float:
    """Return the sum over samples of ``|sum over calls of g^T x|^2``."""
    total = 0.0
    size = max(module.weight.numel(), max(_patch_count(module, x, g) for x, g in pairs))  # type: ignore[arg-type,operator]
    rows = max(1, BLOCK // size)
    for start in range(0, n, rows):
        block = [
            _positions(module, wide(x[start : start + rows]), wide(g[start : start + rows])) for x, g in pairs
        ]
        (a, b), *more = block
        positions, n_in, n_out = a.shape[2], a.shape[3], b.shape[3]
        if not more and positions * (n_in + n_out) <= n_in * n_out:
            total += float(((a @ a.mT) * (b @ b.mT)).double().sum())
        else:
            total += _squares(sum((b.mT @ a for a, b in more), b.mT @ a))
    return total


def _patch_count(module: nn.Module, x: Tensor, g: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return x[0].numel()
    return module.weight[0].numel() * module.groups * g[0, 0].numel()  # type: ignore[index,union-attr,operator]


def _positions(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is multiplied: (n, groups, positions, inputs) and (n, groups, positions, outputs)."""
    n = len(x)
    if isinstance(module, nn.Linear):
        return x.reshape(n, 1, -1, x.shape[-1]), g.reshape(n, 1, -1, g.shape[-1])
    conv: Any = module
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode).contiguous()
    out = g.shape[2:]
    steps = x.stride()[2:]
    # a view of every patch: kernel positions are `dilation` apart, output positions `stride`
    patches = x.as_strided(
        (n, conv.groups, x.shape[1] // conv.groups, *conv.kernel_size, *out),
        (x.stride(0), x.stride(1) * (x.shape[1] // conv.groups), x.stride(1),
         *(step * d for step, d in zip(steps, conv.dilation, strict=True)),
         *(step * s for step, s in zip(steps, conv.stride, strict=True))),
    )  # fmt: skip
    positions = out.numel()
    patches = patches.reshape(n, conv.groups, -1, positions)
    return patches.mT, g.reshape(n, conv.groups, -1, positions).mT


def _one_by_one(calls: Calls, name: str, x: Tensor, y: Tensor, loss: Callable[[Any, Any], Tensor]) -> float:
    """Return the sum of squared gradients of single samples, whatever the model does with the weight."""
    tensors = {key: value.detach() for key, value in calls.tensors.items()}

    def one(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss(call(calls.model, {**tensors, name: weight}, x[None]), y[None])

    gradient = grad(one)
    rows = max(1, BLOCK // tensors[name].numel())
    try:
        parts = [vmap(gradient, (None, 0, 0))(tensors[name], *block)
                 for block in zip(x.split(rows), y.split(rows), strict=True)]  # fmt: skip
    except RuntimeError as error:
        if not not_batched(error):
            raise
        parts = (gradient(tensors[name], *row) for row in zip(x, y, strict=True))
    return sum(_squares(part) for part in parts)


def _squares(x: Tensor) -> float:
    rows = wide(x.detach()).reshape(len(x), -1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
