"""Generative processes: loss, moments on a known target, determinism."""

import copy
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor, nn

from posterity.testing._agreement import accelerators, global_state, same, untouched
from posterity.testing._low_precision import check_low_precision

__all__ = ["check_generative"]


def check_generative(
    process: Any, net: nn.Module, target: Tensor, *, mean: Tensor | ndarray, std: Tensor | ndarray, n: int = 4000,
    atol: float = 0.1, **options: Any,
) -> None:  # fmt: skip
    """Check a generative process with an exact network: loss, moments, determinism, mode.

    Parameters
    ----------
    process : object
        With ``loss(net, x)`` and ``sample(net, n, generator=)``.
    net : nn.Module
        The exact solution for the target; it has at least one parameter.
    target : Tensor of shape (n, *shape)
        Samples of the target.
    mean, std : Tensor or ndarray
        The target's moments by coordinate.
    n : int, default=4000
        How many samples to draw.
    atol : float, default=0.1
        How far the sampled moments may be from them.
    **options
        Further keyword arguments of ``sample``.
    """

    def generator(seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    before = global_state()
    loss = process.loss(net, target, generator=generator())
    mode = net.training
    samples = process.sample(net, n, generator=generator(), **options)
    untouched(before, "the process with a generator")
    assert loss.shape == () and torch.isfinite(loss), f"the loss is a finite scalar, got {loss}"
    same(process.loss(net, target, generator=generator()), loss, "one generator, two losses")
    (grad,) = torch.autograd.grad(loss, [next(net.parameters())], allow_unused=False)
    assert torch.isfinite(grad).all(), "the loss has a gradient for the network"
    assert samples.shape == (n, *target.shape[1:]), f"n samples of the shape, got {tuple(samples.shape)}"
    assert not samples.requires_grad, "samples carry no gradient"
    assert net.training == mode, "sampling changed the network's mode"
    assert torch.equal(process.sample(net, n, generator=generator(), **options), samples), (
        "one generator, two samples"
    )
    other = process.sample(net, n, generator=generator(1), **options)
    assert not torch.equal(other, samples), "the generator does not matter"
    same(samples.mean(0), torch.as_tensor(mean).to(samples), "mean of the samples", rtol=0, atol=atol)
    same(
        samples.std(0),
        torch.as_tensor(std).to(samples),
        "standard deviation of the samples",
        rtol=0,
        atol=atol,
    )
    for device in accelerators():
        moved, far = copy.deepcopy(net).to(device), torch.Generator(device).manual_seed(0)
        theirs = process.sample(moved, n, generator=far, **options)
        assert theirs.device.type == device.type, f"on {device} the samples are on {theirs.device}"
        same(theirs.mean(0).cpu(), torch.as_tensor(mean).to(samples), f"mean on {device}", rtol=0, atol=atol)
        assert process.loss(moved, target.to(device), generator=far).device.type == device.type
    check_low_precision(lambda part, x: process.loss(part, x, generator=generator()), net, (target,), slack=8)
    for dtype in (torch.bfloat16, torch.float16):
        low = process.sample(copy.deepcopy(net).to(dtype), min(n, 1000), generator=generator(), **options)
        assert low.dtype == dtype, f"a network in {dtype} gives samples in {low.dtype}"
        for what, got, moment in (
            ("mean", low.double().mean(0), mean),
            ("deviation", low.double().std(0), std),
        ):
            wanted = torch.as_tensor(moment).to(got)
            same(got, wanted, f"{what} of the samples in {dtype}", rtol=0.05, atol=atol)
    double = copy.deepcopy(net).double()
    assert process.sample(double, 3, generator=generator(), **options).dtype == torch.float64, "float64 works"
