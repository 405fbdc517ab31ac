"""A user's model as what looks at it takes it: at rest, and as dictionaries for ``torch.func``."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["evaluating", "state"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode; afterwards every submodule has the mode that it had, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:  # not by train(), which would set all of them alike
            module.training = training


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return trainable parameters, detached, and copies of all else, by name as ``functional_call`` takes them.

    A tied parameter has one name. Frozen parameters and buffers are copies, so that what a call
    writes to them does not reach the model.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    return params, rest | {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
