"""Instruments: functions that look at a user's model, and leave it as it was."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posterity._checks import needs
from posterity.testing._agreement import accelerators, floats, global_state, placed, same, untouched
from posterity.testing._low_precision import check_low_precision

__all__ = ["check_instrument"]

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip


def check_instrument(
    look: Callable[..., Any],
    model: nn.Module,
    *inputs: Any,
    rtol: float = 1e-3,
    slack: float = 64,
    chooses: bool = False,
) -> None:
    """Check a function that looks at a model: what it leaves behind, modes, failures, dtypes, devices, results.

    Parameters
    ----------
    look : callable
        ``look(model, *inputs)`` returns a tensor, numbers, or a frozen dataclass of them; it gives
        the same each time, so that what it draws comes from a generator made inside.
    model : nn.Module
        In float32, without dropout.
    *inputs
        Float tensors in the dtype of the model.
    rtol : float, default=1e-3
        How far results in float32 and float64 may be apart, and those of devices.
    slack : float, default=64
        How many roundings of a narrow dtype they may be away from what float32 gives on the
        same numbers, if the dtype is not refused.
    chooses : bool, default=False
        Whether it chooses, so that another precision may give another result.
    """
    model = copy.deepcopy(model).eval()
    usual = look(*copy.deepcopy((model, *inputs)))
    _well_formed(usual)
    expected = _numbers(usual)
    _leaves_alone(look, model, inputs, expected)
    _fails_clean(look, model, inputs)
    for what, setting in (
        ("torch.no_grad", torch.no_grad()),
        ("inference mode", torch.inference_mode()),
        ("autocast", torch.autocast("cpu", dtype=torch.bfloat16)),
    ):
        with setting:
            got = _numbers(look(model, *inputs))
        _agree(got, expected, f"under {what} the result is another", 1e-6)

    double = copy.deepcopy(model).double()
    before = _portrait(double)
    exact = _numbers(look(double, *floats(inputs, lambda x: x.detach().double())))
    _same_portrait(double, before, "in float64 ")
    if not chooses:
        _agree(expected, exact, "float32 and float64 agree", rtol)

    def narrow(net: nn.Module, *values: Any) -> tuple[Tensor, ...]:
        kinds = [
            x.dtype for x in (*values, *net.parameters()) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        return tuple(x.to(kinds[0]) for x in _numbers(look(net, *values)))

    check_low_precision(narrow, model, inputs, slack=slack, chooses=chooses, gradient=False)
    for device in accelerators():
        there = copy.deepcopy(double).to(device)
        values = placed(device, floats(inputs, lambda x: x.detach().double()))
        before = _portrait(there)
        far = look(there, *values)
        _same_portrait(there, before, f"on {device} ")
        _well_formed(far)
        _agree(_numbers(far), exact, f"{device} agrees with the CPU", rtol)


def _leaves_alone(look: Callable[..., Any], model: nn.Module, inputs: Any, expected: list[Tensor]) -> None:
    for k, module in enumerate(model.modules()):
        module.training = k % 2 == 0
        module.register_forward_hook(lambda *_: None)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    kept = [x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x) for x in inputs]
    before, around = _portrait(model), global_state()
    got = _numbers(look(model, *inputs))
    untouched(around, "the function")
    _same_portrait(model, before, "")
    _agree(got, expected, "the result depends on the mode, or on gradients, of the model", 1e-6)
    for x, copied in zip(inputs, kept, strict=True):
        if isinstance(x, Tensor):
            assert torch.equal(x.nan_to_num(), copied.nan_to_num()), "the inputs are changed"


class _Fuse(Exception):
    """A user's model fails in the middle of a look."""


def _fails_clean(look: Callable[..., Any], model: nn.Module, inputs: Any) -> None:
    """Let the model fail at its first and at its last call: it is left as one that does not."""
    calls, limit = [0], [0]

    def fuse(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == limit[0]:
            raise _Fuse

    model.register_forward_pre_hook(fuse)  # copies of the model have it too
    look(model, *inputs)
    for at in sorted({1, calls[0]} if calls[0] else ()):
        calls[0], limit[0] = 0, at
        before = _portrait(model)
        try:
            look(model, *inputs)
        except _Fuse:
            pass
        _same_portrait(model, before, f"after a failure at the model's call {at} ")
    limit[0] = 0


def _portrait(model: nn.Module) -> dict[str, Any]:
    """Return all that a look must leave as it is, values as copies and objects by their identity."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"the mode of {name or 'the model'}"] = module.training
        seen[f"the attributes of {name or 'the model'}"] = sorted(vars(module))
        for kind in HOOKS:
            hooks = getattr(module, kind, None) or {}
            seen[f"{kind} of {name or 'the model'}"] = [id(hook) for hook in hooks.values()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, x in tensors:
        seen[f"the identity of {name}"] = id(x), x.data_ptr(), x.dtype, x.device, x.requires_grad
        seen[f"the values of {name}"] = x.detach().clone()
        seen[f"the gradient of {name}"] = None if x.grad is None else x.grad.clone()
        seen[f"hooks of {name}"] = len(getattr(x, "_backward_hooks", None) or ())
    return seen


def _same_portrait(model: nn.Module, before: dict[str, Any], when: str) -> None:
    after = _portrait(model)
    assert after.keys() == before.keys(), f"{when}the model has other parts than before"
    for what, value in before.items():
        now = after[what]
        if isinstance(value, Tensor) and isinstance(now, Tensor):
            kept = torch.equal(value.nan_to_num(), now.nan_to_num())
        else:
            kept = type(value) is type(now) and value == now
        assert kept, f"{when}{what} is changed"


def _well_formed(result: Any) -> None:
    """Results keep no graph; a dataclass is frozen, holds CPU tensors, and draws itself where it says so."""
    for x in _tensors(result):
        assert not x.requires_grad, "the result has no gradient"
        assert x.device.type == "cpu" or not is_dataclass(result), "tensors of a result are on the CPU"
    if is_dataclass(result):
        assert type(result).__dataclass_params__.frozen, "the result is a frozen dataclass"  # type: ignore[attr-defined]
    draw: Any = getattr(result, "plot", None)
    if draw is not None:
        pyplot = needs("matplotlib.pyplot", "plot")
        _, axes = pyplot.subplots(1, 2)
        try:
            assert draw(ax=axes[1]) is axes[1], "plot(ax) returns the Axes that it was given"
            assert axes[1].has_data() and not axes[0].has_data(), (
                "plot(ax) draws on the Axes given, and only there"
            )
            own = draw()
            assert own not in list(axes) and own.has_data(), "plot() draws on a figure of its own"
            pyplot.close(own.figure)
        finally:
            pyplot.close(axes[0].figure)


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield the tensors of a result, numbers among them; modules and words do not count."""
    if isinstance(result, Tensor):
        yield result
    elif is_dataclass(result):
        for field in fields(result):
            yield from _tensors(getattr(result, field.name))
    elif isinstance(result, dict):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from _tensors(value)
    elif isinstance(result, bool | int | float):
        yield torch.tensor(result, dtype=torch.float64)
    elif hasattr(result, "__array__") and not isinstance(result, nn.Module):
        yield torch.as_tensor(result)


def _numbers(result: Any) -> list[Tensor]:
    return [x.detach().cpu().double() for x in _tensors(result)]


def _agree(got: list[Tensor], expected: list[Tensor], what: str, rtol: float) -> None:
    assert len(got) == len(expected), what
    for ours, theirs in zip(got, expected, strict=True):
        size = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
        same(ours, theirs, what, rtol=rtol, atol=rtol * size, equal_nan=True)
