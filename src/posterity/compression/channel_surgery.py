"""Cut channels out of the layers of a network, by a plan that is saved beside the weights.

A plan says which channels each layer keeps: ``{"conv1": {"out": [0, 2]}, "conv2": {"in": [0, 2]}}``.
It is all that is needed to give a fresh instance of the user's class the shapes of a pruned one, into
which the saved ``state_dict`` then loads.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin

__all__ = ["shrink"]

Inputs = Tensor | tuple[Tensor, ...] | list[Tensor]
WRONG = (RuntimeError, ValueError, TypeError, IndexError)  # what torch says of inputs that do not fit
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Layout(NamedTuple):
    """Where a layer keeps its channels: the axis of each tensor for "out" and "in", and the attributes."""

    tensors: dict[str, dict[str, int]]
    sizes: dict[str, str]
    mixes: bool  # whether an output channel reads many input channels; else it carries one along


def layout(module: nn.Module) -> Layout | None:
    """Return the layout of a layer whose channels can be cut, None of any other module."""
    both = {"out_channels": "out", "in_channels": "in"}
    if isinstance(module, CONVS) and module.groups == 1:
        return Layout({"weight": {"out": 0, "in": 1}, "bias": {"out": 0}}, both, True)
    if isinstance(module, CONVS) and module.groups == module.in_channels:  # depthwise
        return Layout({"weight": {"out": 0}, "bias": {"out": 0}}, both | {"groups": "in"}, False)
    if isinstance(module, TRANSPOSED) and module.groups == 1:
        return Layout({"weight": {"out": 1, "in": 0}, "bias": {"out": 0}}, both, True)
    if isinstance(module, nn.Linear):
        sizes = {"out_features": "out", "in_features": "in"}
        return Layout({"weight": {"out": 0, "in": 1}, "bias": {"out": 0}}, sizes, True)
    if isinstance(module, nn.Embedding):
        return Layout({"weight": {"out": 1}}, {"embedding_dim": "out"}, True)
    if isinstance(module, _BatchNorm):
        names = ("weight", "bias", "running_mean", "running_var")
        return Layout({name: {"out": 0} for name in names}, {"num_features": "out"}, False)
    if isinstance(module, nn.PReLU):
        return Layout({"weight": {"out": 0}}, {"num_parameters": "out"}, False)
    return None


@torch.inference_mode(False)
def shrink(model: nn.Module, plan: Mapping[str, Mapping[str, list[int]]]) -> nn.Module:
    """Return a copy of an unpruned network with the shapes of a pruned one.

    Parameters
    ----------
    model : nn.Module
        An instance of the class, built as the one that was pruned; left as it is.
    plan : dict
        Of `PrunedModel`: for each layer the indices that it keeps, ascending, of its "out" and "in"
        channels.

    Returns
    -------
    nn.Module
        Of the same class. Its tensors are those that are kept, so that of a trained network it is
        the pruned one; dtypes, devices, ``requires_grad``, hooks and ties between weights stay.

    Raises
    ------
    ValueError
        If ``plan`` does not fit the model; the layer is named.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.compression import shrink
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> shrink(net, {"0": {"out": [0, 2]}, "2": {"in": [0, 2]}})
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(plan, Mapping):
        raise ValueError(f"plan must be a dict of layers, got {type(plan).__name__}")
    _fits(model, plan)
    with torch.no_grad():
        return _cut(copy.deepcopy(model), plan)


def _fits(model: nn.Module, plan: Mapping[str, Any]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, sides in plan.items():
        if name not in modules:
            raise ValueError(f"plan must name layers of the model, got {name!r}, which it has not")
        form = layout(modules[name])
        if form is None:
            raise ValueError(
                f"plan must name layers with channels, got {name!r}, a {type(modules[name]).__name__}"
            )
        if not isinstance(sides, Mapping) or not set(sides) <= set(form.sizes.values()):
            raise ValueError(
                f"plan must give {name!r} {' and '.join(sorted(set(form.sizes.values())))}, got {sides!r:.60}"
            )
        for side, kept in sides.items():
            size = next(getattr(modules[name], attribute) for attribute, s in form.sizes.items() if s == side)
            whole = isinstance(kept, list) and all(type(k) is int for k in kept) and len(kept) > 0
            if not whole or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < size:
                raise ValueError(
                    f"plan must keep ascending indices of the {size} {side} channels of {name!r}, got {kept!r:.60}"
                )
        if "groups" in form.sizes:
            module: Any = modules[name]
            depth = module.out_channels // module.in_channels
            if sides.get("out") != [depth * k + j for k in sides.get("in", ()) for j in range(depth)]:
                raise ValueError(
                    f"plan must keep all outputs of the kept inputs of {name!r}, which is depthwise"
                )


def _cut(model: nn.Module, plan: Mapping[str, Mapping[str, list[int]]]) -> nn.Module:
    """Cut the layers of a plan in place, once a tensor, so that what was tied stays tied."""
    new: dict[int, Tensor] = {}
    done: set[int] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    old: list[Tensor] = []  # kept alive: no other tensor may get the id of one
    for name, sides in plan.items():
        module = modules[name]
        form = layout(module)
        if id(module) in done or form is None:
            continue
        done.add(id(module))
        for tensor, axes in form.tensors.items():
            own: Any = module._parameters if tensor in module._parameters else module._buffers
            value = own.get(tensor)
            if value is None or (isinstance(module, nn.PReLU) and value.numel() == 1):
                continue
            if id(value) not in new:
                old.append(value)
                kept = value.detach()
                for side, axis in axes.items():
                    if side in sides:
                        kept = kept.index_select(axis, torch.tensor(sides[side], device=value.device))
                if isinstance(value, nn.Parameter):
                    kept = nn.Parameter(kept.clone(), requires_grad=value.requires_grad)
                new[id(value)] = kept
            own[tensor] = new[id(value)]
        for attribute, side in form.sizes.items():
            if side in sides:
                setattr(module, attribute, len(sides[side]))
    return model


# Runs of a copy


def first_sample(example_inputs: Any) -> tuple[Tensor, ...]:
    """Return inputs as a tuple, cut to one sample where all have the same first axis."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, (tuple, list)) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kind = type(example_inputs).__name__
        raise ValueError(
            f"example_inputs must be a tensor or a tuple of tensors with a batch axis, got {kind}"
        )
    for x in inputs:
        if x.ndim == 0 or not len(x):
            raise ValueError(
                f"example_inputs must have a batch axis of at least 1, got shape {tuple(x.shape)}"
            )
    if len({len(x) for x in inputs}) == 1:
        inputs = [x[:1] for x in inputs]
    return tuple(x.detach().clone() for x in inputs)


def duplicate(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode, or say why there is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedTensorMixin) or tensor.is_meta:
            raise ValueError(f"model must have values, {name!r} has none yet: run it once, or load them")
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(f"model must be one that copy.deepcopy copies, got {error!r:.200}") from error


@contextmanager
def alone(inputs: Iterable[Tensor]) -> Iterator[None]:
    """Run outside autocast, and leave random numbers as they were."""
    kinds = {"cpu"} | {x.device.type for x in inputs}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of whatever a model returned."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (list, tuple)) else []


def does_not_run(error: Exception) -> ValueError:
    return ValueError(
        f"example_inputs must be what model takes, with a batch axis in front, its first sample gave: {error!r:.300}"
    )
