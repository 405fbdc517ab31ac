"""The affine layer at the end of a network as a matrix: what comes in, a row a sample, position or pixel.

A linear layer acts on the last axis, so everything before it are rows; a convolution acts on
patches, so every pixel of its output is a row. With a bias, each row ends in a one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from posterity._models import call, evaluating
from posterity._precision import wide

__all__: list[str] = []

_Affine = nn.Linear | nn.Conv2d
_PATCHES = 2**24  # numbers that unfolded pixels may fill at once
_MARK = 1000.0  # size of what the last layer is made to give, to see what becomes of it


class _Network:
    """A model as a function in float32 at least; it is not changed."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
        if any(is_lazy(p) for p in (*model.parameters(), *model.buffers())):
            raise ValueError("model must be initialised: call it once before")
        self.model = model
        held = {**dict(model.named_parameters()), **{name: b.clone() for name, b in model.named_buffers()}}
        self.tensors = {name: wide(_plain(v)) for name, v in held.items()}
        first = next((v for v in self.tensors.values() if v.is_floating_point()), torch.zeros(()))
        self.dtype, self.device = first.dtype, first.device
        self.solver_device = torch.device("cpu") if first.device.type == "mps" else first.device

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Run a block in eval mode without gradients, autocast or inference mode, attention differentiable."""
        with (
            evaluating(self.model), sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False), torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):  # fmt: skip
            yield

    def __call__(self, x: Tensor, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the prediction for inputs as `to` returns them, with some of the parameters changed."""
        out = call(self.model, {**self.tensors, **(changed or {})}, x)
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.shape[:1] != x.shape[:1]:
            got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model must return a floating-point tensor, {len(x)} samples first, got {got}")
        return out

    def to(self, x: Tensor) -> Tensor:
        """Return inputs as the model takes them."""
        x = _plain(x)
        return x.to(self.device, self.dtype) if x.is_floating_point() else x.to(self.device)

    def aim(self, y: Tensor) -> Tensor:
        """Return labels as solvers take them, in float64."""
        return _exactly(_plain(y)).to(self.solver_device)

    def predict(self, x: Tensor) -> Tensor:
        """Return the prediction in float64."""
        return self.checked(self(self.to(x)))

    def checked(self, out: Tensor) -> Tensor:
        """Return what the model makes in float64, or refuse it."""
        if not bool(out.isfinite().all()):
            raise ValueError("model must give finite numbers for these samples, got NaN or infinity")
        return _exactly(out)


class _LastLayer(_Network):
    """A model whose output is that of an affine layer of it."""

    def __init__(self, model: Any, layer: Any, n_layers: int = 1) -> None:
        super().__init__(model)
        every = {module: name for name, module in model.named_modules() if isinstance(module, _Affine)}
        if layer is None:
            if not every:
                raise ValueError("layer must be an nn.Linear or nn.Conv2d, model has none")
            layer = list(every)[-1]
        if not isinstance(layer, _Affine):
            raise ValueError(f"layer must be an nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        if layer not in every:
            raise ValueError(f"layer must be a part of model, got another {layer}")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"layer must be a convolution of one group, got groups={layer.groups}")
        up_to = list(every)[: list(every).index(layer) + 1]
        if n_layers > len(up_to):
            raise ValueError(
                f"n_layers must be at most {len(up_to)}, the affine layers of model up to layer, got {n_layers}"
            )
        self.layers = {every[part]: part for part in up_to[-n_layers:]}
        for name, part in self.layers.items():
            _own(model, name, part)
        self.layer: _Affine = layer
        self.name = every[layer]
        self.title = f"layer {self.name!r}" if self.name else "layer, the model itself,"
        weight = self.tensors[_join(self.name, "weight")]
        self.dtype, self.device = weight.dtype, weight.device
        self.columns, self.outputs = weight[0].numel() + (layer.bias is not None), len(weight)

    def examine(self, x: Tensor, y: Tensor) -> int:
        """Return the rows that a sample has, after a look at what becomes of what the last layer gives."""
        seen: list[Tensor] = []

        def mark(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            seen.append(out)
            n = out.numel()
            marks = _MARK * (n // 2 - 0.5 - torch.arange(n, device=out.device, dtype=out.dtype))
            return marks.view(out.shape)

        handle = self.layer.register_forward_hook(mark)
        try:
            out = self(self.to(x[:2]))
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(
                f"{self.title} must be used once in a forward pass of model, was {len(seen)} times"
            )
        same = out.numel() == seen[0].numel() and torch.equal(
            out.flatten(), mark(self.layer, None, seen[0]).flatten()
        )
        if not same:
            raise ValueError(
                f"{self.title} must give the output of model, reshaped at most: it gives {tuple(seen[0].shape)}, "
                f"from which model makes {tuple(out.shape)}"
            )
        _fits(out, y)
        return out.numel() // (self.outputs * len(x[:2]))

    def look(self, x: Tensor, changed: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return what comes into the layer, and the prediction, in float64."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], __: Any) -> None:
            seen.append(self.checked(args[0] if args else named["input"]))

        handle = self.layer.register_forward_hook(keep, with_kwargs=True)
        try:
            out = self.checked(self(self.to(x), changed))
        finally:
            handle.remove()
        return seen[0], out

    def rows(self, latent: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of rows: what the layer's matrix multiplies, and values of the shape of predictions."""
        if isinstance(self.layer, nn.Linear):
            yield self._with_ones(latent.reshape(-1, latent.shape[-1])), value.reshape(-1, self.outputs)
            return
        latent = latent if latent.ndim == 4 else latent[None]
        value = value.reshape(len(latent), self.outputs, -1)
        size = max(1, _PATCHES // max(1, self.columns * value.shape[2]))
        for images, aims in zip(latent.split(size), value.split(size), strict=True):
            patches = _unfolded(self.layer, images).mT
            yield self._with_ones(patches.flatten(0, 1)), aims.mT.flatten(0, 1)

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if self.layer.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)

    def parameters(self, change: Tensor) -> dict[str, Tensor]:
        """Return a change of the matrix (columns, outputs) as one of the layer's weight and bias."""
        weight = change[: self.columns - 1] if self.layer.bias is not None else change
        parts = {_join(self.name, "weight"): weight.mT.reshape(self.layer.weight.shape)}
        if self.layer.bias is not None:
            parts[_join(self.name, "bias")] = change[-1]
        return {name: part.to(self.device, self.dtype) for name, part in parts.items()}


def _fits(out: Tensor, y: Tensor) -> None:
    """Refuse labels of another shape than predictions."""
    if out.shape[1:] != y.shape[1:]:
        wanted = (len(y), *out.shape[1:])
        raise ValueError(f"y_target must have the shape of the prediction, {wanted}, got {tuple(y.shape)}")


def _join(module: str, kind: str) -> str:
    """Return the name of a module's parameter."""
    return f"{module}.{kind}" if module else kind


def _derivative(
    function: Callable[..., Tensor], point: Sequence[Tensor], way: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a function's value and its derivative along a way.

    Two passes back are one forward, J v being linear in what J' u is pulled with; ``torch.func.jvp``
    takes seconds to load and, on the CPU, longer for each product.
    """
    with torch.enable_grad():
        point = [p.detach().requires_grad_() for p in point]
        out = function(*point)
        if not out.requires_grad:
            return out, torch.zeros_like(out)
        weight = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, point, weight, create_graph=True, materialize_grads=True)
        used = [(g, v) for g, v in zip(pulled, way, strict=True) if g.requires_grad]
        (slope,) = torch.autograd.grad([g for g, _ in used], weight, [v for _, v in used])
    return out.detach(), slope


def _plain(x: Tensor) -> Tensor:
    """Return a tensor without a graph, of which derivatives can be taken."""
    return x.clone() if x.is_inference() else x.detach()


def _exactly(x: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _unfolded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the patches that a convolution sees: (images, numbers of a patch, pixels)."""
    if isinstance(layer.padding, str):
        reach = [d * (k - 1) if layer.padding == "same" else 0
                 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]  # fmt: skip
        around = [(r // 2, r - r // 2) for r in reach]
    else:
        around = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [*around[1], *around[0]], mode=mode)
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)


def _own(model: nn.Module, name: str, layer: _Affine) -> None:
    """Refuse a layer whose weight is not its own to change."""
    where = f"layer {name!r}"
    for kind in ("weight", "bias"):
        value = layer._parameters.get(kind)
        if value is None:
            if kind == "weight" or getattr(layer, kind, None) is not None:
                raise ValueError(f"{where} must hold its {kind} as a parameter: remove parametrizations")
            continue
        if not value.is_floating_point():
            raise ValueError(f"{where} must have a floating-point {kind}, got {value.dtype}")
        held = [module for module in model.modules() if any(p is value for p in module._parameters.values())]
        if len(held) > 1:
            raise ValueError(f"{where} must not share its {kind}, which {type(held[0]).__name__} has as well")
