"""Neural processes: sets without order, padding without effect, empty contexts."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity.testing._agreement import accelerators, alike, global_state, placed, same, untouched
from posterity.testing._low_precision import check_low_precision

__all__ = ["check_neural_process"]


def check_neural_process(model: nn.Module, *, dim_x: int, dim_y: int, latent: bool = False) -> None:
    """Check a neural process: sets without order, padding without effect, empty contexts.

    Parameters
    ----------
    model : nn.Module
        ``model(x_context, y_context, x_target, context_mask=)`` returns a ``Normal`` of
        shape (tasks, m, dim_y), or (samples, tasks, m, dim_y) for latent variables; with
        ``log_likelihood(x_context, y_context, x_target, y_target, context_mask=,
        target_mask=)`` of shape (tasks,), and ``loss`` of the same arguments.
    dim_x, dim_y : int
        Sizes of inputs and outputs.
    latent : bool, default=False
        Whether it draws latent variables, from a ``generator=`` that it takes.
    """
    model = copy.deepcopy(model).double().eval()
    rng = torch.Generator().manual_seed(0)
    close = {"rtol": 0.0, "atol": 1e-9}

    def draws() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(1)} if latent else {}

    def points(n: int, size: int) -> Tensor:
        return torch.randn(3, n, size, dtype=torch.float64, generator=rng)

    def predict(*args: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        out = model(*args, **masks, **draws())
        return out.loc, out.scale

    x, y, x_new, y_new = points(6, dim_x), points(6, dim_y), points(5, dim_x), points(5, dim_y)
    x_new[0, :2] = 5 * torch.tensor(
        [[-1.0], [1.0]]
    )  # beyond the context: a grid is the same with and without it
    before = global_state()
    loc, scale = predict(x, y, x_new)
    untouched(before, "the model in eval mode")
    assert loc.shape[-3:] == (3, 5, dim_y) and loc.ndim == 3 + latent, f"loc has shape {tuple(loc.shape)}"
    assert loc.dtype == torch.float64, f"float64 in, float64 out, got {loc.dtype}"
    assert bool((scale > 0).all()), "scales are positive"

    order = torch.randperm(6, generator=rng)
    same(predict(x[:, order], y[:, order], x_new), (loc, scale), "the order of the context matters", **close)
    turn = torch.randperm(5, generator=rng)
    moved = loc[..., turn, :], scale[..., turn, :]
    same(predict(x, y, x_new[:, turn]), moved, "permuting the targets", **close)
    for wild in (1e3, -1e3):
        more = (torch.cat([part, torch.full_like(part[:, :2], wild)], dim=1) for part in (x, y))
        real = torch.arange(8).expand(3, 8) < 6
        same(predict(*more, x_new, context_mask=real), (loc, scale), "padding has an effect", **close)
    few = torch.arange(6) < torch.tensor([[4], [6], [0]])
    mixed = predict(x, y, x_new, context_mask=few)
    alone = predict(x[:, :4], y[:, :4], x_new)
    same([part[..., 0, :, :] for part in mixed], [part[..., 0, :, :] for part in alone],
          "a masked task is not the task without the masked points", **close)  # fmt: skip
    empty = predict(x[:, :0], y[:, :0], x_new)
    assert all(torch.isfinite(part).all() for part in empty), "an empty context is finite"
    same([part[..., 2, :, :] for part in mixed], [part[..., 2, :, :] for part in empty],
          "a masked context is not the empty context", **close)  # fmt: skip
    assert not alike(empty[0], loc), "the context does not matter"

    each = torch.distributions.Normal(loc, scale).log_prob(y_new)
    whole = each.sum((-2, -1))
    n_samples = {"n_samples": len(loc)} if latent else {}
    if latent:
        whole = whole.logsumexp(0) - np.log(len(loc))
    got = model.log_likelihood(x, y, x_new, y_new, **n_samples, **draws())
    assert got.shape == (3,), f"one log-likelihood a task, got shape {tuple(got.shape)}"
    same(got, whole, "log_likelihood is the log-density of forward", **close)
    real = torch.arange(5) < torch.tensor([[5], [3], [1]])
    part = each.masked_fill(~real[..., None], 0).sum((-2, -1))
    part = part.logsumexp(0) - np.log(len(loc)) if latent else part
    wild_new = torch.where(real[..., None], y_new, 1e30), torch.where(real[..., None], x_new, 1e30)
    masked = model.log_likelihood(x, y, wild_new[1], wild_new[0], target_mask=real, **n_samples, **draws())
    same(masked, part, "masked targets count", **close)
    if not latent:
        same(model.loss(x, y, x_new, y_new), -whole.mean() / 5, "loss is the mean a target", **close)
        normalised = -(part / real.sum(1)).mean()
        same(
            model.loss(x, y, *wild_new[::-1], target_mask=real), normalised, "loss of masked targets", **close
        )

    def everything(net: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = net(*tensors[:3], **draws())
        likelihood = net.log_likelihood(*tensors, target_mask=real, **n_samples, **draws())
        return out.loc, out.scale, likelihood, net.loss(*tensors, **draws())

    check_low_precision(everything, model, (x, y, x_new, y_new), slack=16, follows=False)
    if not latent:  # a generator of another device draws other latent variables
        for device in accelerators():
            there = placed(device, (x, y, x_new, y_new))
            far = copy.deepcopy(model).to(device)
            on = {"context_mask": few.to(device), "target_mask": real.to(device)}
            assert far.loss(*there).device.type == device.type, f"on {device} the loss is elsewhere"
            same(far.loss(*there, **on).cpu(), model.loss(x, y, x_new, y_new, context_mask=few, target_mask=real),
                  f"{device} agrees with the CPU")  # fmt: skip
    model.train()
    model.zero_grad()
    value = model.loss(x, y, x_new, y_new, context_mask=few, target_mask=real, **draws())
    assert value.shape == (), f"a loss is a scalar, got shape {tuple(value.shape)}"
    value.backward()
    for name, parameter in model.named_parameters():
        good = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        assert good and bool((parameter.grad != 0).any()), f"no finite gradient reaches {name}"  # type: ignore[union-attr]
