"""A user's model as what looks at it takes it: at rest, and as a function of its tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["call", "evaluating", "not_batched", "state"]


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


def not_batched(error: RuntimeError) -> bool:
    """Return whether an error says that ``torch.func.vmap`` cannot take a model: an RNN, or control flow on values."""
    return "vmap" in str(error) or "Batching rule" in str(error)
