"""Layers and networks: shape, gradients to every parameter, every dtype, state_dict."""

import copy
import io
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posterity.testing._agreement import accelerators, floats, global_state, placed, same, untouched
from posterity.testing._low_precision import check_low_precision

__all__ = ["check_layer"]


def check_layer(
    layer: nn.Module,
    *inputs: Any,
    shape: Sequence[int] | None = None,
    dead: Iterable[str] = (),
    chooses: bool = False,
    **options: Any,
) -> None:
    """Check a layer or network: shape, gradients to every parameter, dtype, state_dict.

    Parameters
    ----------
    layer : nn.Module
    *inputs
        What it is called with; float tensors in the dtype of its parameters.
    shape : sequence of int, optional
        The shape of its output.
    dead : iterable of str
        Parameters that rightly get no gradient.
    chooses : bool, default=False
        Whether it draws or chooses, so that another precision may give another result.
    **options
        Further keyword arguments of the call.
    """
    layer = copy.deepcopy(layer).eval()
    before = global_state()
    out = layer(*inputs, **options)
    untouched(before, "the layer in eval mode")
    assert isinstance(out, Tensor) and torch.isfinite(out).all(), "the output is a finite tensor"
    if shape is not None:
        assert out.shape == tuple(shape), f"the output has shape {tuple(shape)}, got {tuple(out.shape)}"
    same(layer(*inputs, **options), out, "two calls in eval mode differ")

    probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    layer.zero_grad()
    (out * probe).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and name not in set(dead):
            reached = parameter.grad is not None and bool((parameter.grad != 0).any())
            assert reached, f"no gradient reaches {name}"

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    same(twin(*inputs, **options), out, "a state_dict round trip changes the output")
    same(pickle.loads(pickle.dumps(layer))(*inputs, **options), out, "pickling changes the output")

    double = copy.deepcopy(layer).double()
    got = double(*floats(inputs, lambda x: x.detach().double()), **options)
    assert got.dtype == torch.float64, f"float64 in, float64 out, got {got.dtype}"
    same(got.to(out.dtype), out.detach(), "float64 agrees with the dtype given", rtol=1e-3, atol=1e-4)

    def call(net: nn.Module, *values: Any) -> Tensor:
        return net(*values[: len(inputs)], **dict(zip(options, values[len(inputs) :], strict=True)))

    check_low_precision(call, layer, (*inputs, *options.values()), slack=8, follows=False, chooses=chooses)
    for device in accelerators():
        there = placed(device, floats(inputs, lambda x: x.detach().double()))
        moved = {name: placed(device, [value])[0] for name, value in options.items()}
        far = copy.deepcopy(double).to(device)(*there, **moved)
        assert far.device.type == device.type, f"on {device} the output is on {far.device}"
        same(far.cpu(), got, f"{device} agrees with the CPU")
