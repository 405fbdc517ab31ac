"""A network's loss as a function of one vector: its free parameters, flat in the order of ``model.parameters()``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from posterity._checks import floating, scalar
from posterity._precision import NARROW, wide

__all__: list[str] = []

Batch = tuple[Tensor, ...] | list[Tensor]


class _Flat:
    """A function of a network and a batch, as one of the network's free parameters in one vector theta.

    Narrow weights are read in float32: second derivatives have no digit left in their own dtype.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
        free = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        if not sum(p.numel() for p in free.values()):
            raise ValueError("model must have a parameter that requires a gradient, got none")
        _refuse_noise(model)
        self.names, self.shapes = list(free), [p.shape for p in free.values()]
        self.sizes = [p.numel() for p in free.values()]
        self.whole = _Whole(model, function)
        named = [*self.whole.named_parameters(), *self.whole.named_buffers()]
        self.fixed = {name: wide(v.detach()) for name, v in named if name not in free and v.dtype in NARROW}
        with torch.inference_mode(False), torch.no_grad():
            self.theta = torch.cat([wide(p.detach()).reshape(-1) for p in free.values()])

    def read(self, batch: Batch) -> list[Tensor]:
        """Return a batch in float32 at least, where it may take part in gradients."""
        if not isinstance(batch, (tuple, list)) or not batch:
            raise ValueError(f"batch must be a tuple of tensors, got {batch!r:.80}")
        if not all(isinstance(x, Tensor) for x in batch):
            raise ValueError(f"batch must hold tensors, got {[type(x).__name__ for x in batch]}")
        if any(x.ndim and not len(x) for x in batch):
            raise ValueError(f"batch must hold samples, got shapes {[tuple(x.shape) for x in batch]}")
        return [wide(x.clone() if x.is_inference() else x.detach()) for x in batch]

    def call(self, theta: Tensor, *batch: Tensor) -> Any:
        """Return the function's value."""
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        free = {name: part.view(shape) for name, part, shape in parts}
        return functional_call(self.whole, {**self.fixed, **free}, batch)

    def __call__(self, theta: Tensor, *batch: Tensor) -> Tensor:
        """Return the function's value, which must be a scalar."""
        return _scalar("loss_fn", self.call(theta, *batch))


class _Whole(nn.Module):
    """A network with what is made of it, so that the network's parameters can be replaced in a call."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, [function]  # in a list: a module would bring parameters of its own

    def forward(self, *batch: Tensor) -> Any:
        return self.function[0](self.model, *batch)


def _scalar(name: str, loss: Any) -> Tensor:
    return floating(f"the value of {name}", scalar(name, loss))


def _refuse_noise(model: nn.Module) -> None:
    """Refuse a model whose loss is random, or whose samples see each other."""
    for name, part in model.named_modules():
        dropout = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        dropout = dropout or (isinstance(part, nn.MultiheadAttention | nn.RNNBase) and part.dropout > 0)
        if part.training and (dropout or isinstance(part, nn.modules.batchnorm._BatchNorm)):
            what = "dropout" if dropout else "batch statistics"
            raise ValueError(f"model must be in eval mode, got active {what} in {name or 'it'}")


@contextmanager
def _exactly(like: Tensor) -> Iterator[None]:
    """Compute outside autocast and inference mode, on the device of a tensor."""
    with torch.autocast(like.device.type, enabled=False), torch.inference_mode(False):
        yield
