"""A user's model as what looks at it takes it: at rest, and as a function of its tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

__all__ = [
    "at_rest",
    "by_sample",
    "call",
    "evaluating",
    "frozen",
    "held",
    "not_batched",
    "resize_buffers",
    "state",
]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode; afterwards every submodule has the mode that it had, also after an error.

    Attention goes by its ordinary path inside: the fast one, which torch takes in eval mode, has no derivative.
    """
    modes, fast = (
        [(module, module.training) for module in model.modules()],
        torch.backends.mha.get_fastpath_enabled(),
    )
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield model.eval()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:  # not by train(), which would set all of them alike
            module.training = training


@contextmanager
def at_rest(*parts: Any) -> Iterator[None]:
    """Put what is a module among some parts into eval mode, as `evaluating` does; functions need nothing."""
    with ExitStack() as stack:
        for part in parts:
            if isinstance(part, nn.Module):
                stack.enter_context(evaluating(part))
        yield


@contextmanager
def frozen(*parts: Any) -> Iterator[None]:
    """Take the parameters of modules among some parts for constants; flags are as before afterwards, also after an error."""
    models = [part for part in parts if isinstance(part, nn.Module)]
    trained = [p for model in models for p in model.parameters() if p.requires_grad and p.is_leaf]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def held(*parts: Any) -> Iterator[None]:
    """Keep modules at rest and their parameters constant."""
    with frozen(*parts), at_rest(*parts):
        yield


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return trainable parameters, detached, and copies of all else, by name as `call` takes them.

    A tied parameter has one name. Frozen parameters and buffers are copies, so that what a call
    writes to them does not reach the model.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    return params, rest | {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def call(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """Call a model with these tensors for its parameters and buffers, those that are tied under their first name.

    ``functional_call`` ties names itself, but leaves a model changed that has one module in two places.
    """
    first = {id(own): name for name, own in chain(model.named_parameters(), model.named_buffers())}
    every = {}
    for where, module in model.named_modules():  # each once
        held = chain(module.named_parameters(recurse=False, remove_duplicate=False),
                     module.named_buffers(recurse=False, remove_duplicate=False))  # fmt: skip
        every.update({f"{where}.{name}".lstrip("."): tensors[first[id(own)]] for name, own in held})
    return functional_call(model, every, args, tie_weights=False)


def by_sample(function: Callable[..., Any], *batches: Any) -> Any:
    """Return ``vmap(function)(*batches)``; sample by sample where vmap cannot follow, as an RNN.

    Running out of memory is no reason for the loop: that error is raised.
    """
    try:
        return vmap(function)(*batches)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # any other error the loop meets again
        each = [function(*sample) for sample in zip(*batches, strict=True)]
    return tree_map(lambda *parts: torch.stack(parts), each[0], *each[1:])


def resize_buffers(
    module: nn.Module, names: Sequence[str], state_dict: Mapping[str, Any], prefix: str
) -> None:
    """Give buffers whose size only what was saved knows its shapes and dtypes, before it is loaded into them."""
    for name in names:
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor):
            setattr(module, name, saved.new_empty(saved.shape, device=getattr(module, name).device))


def not_batched(error: RuntimeError) -> bool:
    """Return whether an error says that ``torch.func.vmap`` cannot take a model: an RNN, or control flow on values."""
    return "vmap" in str(error) or "Batching rule" in str(error)
