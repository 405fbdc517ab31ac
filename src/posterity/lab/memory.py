"""Peak memory of a step: bytes of tensors alive at once, counted where torch makes them.

The count is of tensors, not of the allocator: it is the same on every machine and device, and
leaves out what a kernel needs inside itself.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed", "peak_bytes"]


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return how many bytes of tensors that a step makes are alive at once, at most.

    What was alive before the step does not count, what it leaves behind (gradients, states) does.

    Parameters
    ----------
    step : callable
        Called once, without arguments.

    Returns
    -------
    int

    Examples
    --------
    >>> x = torch.zeros(1000)
    >>> peak_bytes(lambda: x + 1 + 1 + 1)  # of three results two are alive at once
    8000
    """
    with _Counting() as count:
        step()
    return count.peak


def checkpointed(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Return what layers make of x one after the other, keeping only what passes between them.

    Parameters
    ----------
    layers : iterable of nn.Module
        Each is run again when the gradient comes back.
    x : Tensor

    Returns
    -------
    Tensor
    """
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
    return x


class _Counting(TorchDispatchMode):
    """Follows the storages that operations return, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _key(x) not in given | self._seen:
                self._follow(x.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.alive += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _key(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
