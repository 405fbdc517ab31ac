"""What optimisers of this domain do alike with gradients: which there are, and how long they are together."""

# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["moving", "norms", "real", "total_norm"]


def real(params: Iterable[Tensor]) -> None:
    """Refuse complex parameters, whose descent has no sign."""
    for p in params:
        if p.is_complex():
            raise ValueError(f"params must be real, got a complex one of dtype {p.dtype}: use view_as_real")


def moving(params: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that have a gradient, and their gradients; sparse ones are refused."""
    found, grads = [], []
    for p in params:
        grad = p.grad
        if grad is None:
            continue
        if grad.is_sparse:
            raise ValueError(
                f"gradients must be dense, got a sparse one for a parameter of shape {tuple(p.shape)}: "
                "use sparse=False in the embedding"
            )
        found.append(p)
        grads.append(grad)
    return found, grads


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of all entries of all tensors as one vector, on the first one's device."""
    return torch.linalg.vector_norm(norms(tensors, order), order)


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of each tensor, of shape (n_tensors,), in float32 at least, on the first one's device.

    Squares of float32 may overflow or vanish where the norm does not: then it is float64. A CPU can tell
    without waiting; other devices use float64 from the start, but for those that have none.
    """
    kind = tensors[0].device.type
    if kind == "cpu":
        found = _norms(tensors, order, None)
        if found.dtype == torch.float64 or bool(((found > 1e-15) & (found < 1e15)).all()):
            return found
    return _norms(tensors, order, torch.float32 if kind == "mps" else torch.float64)


def _norms(tensors: Sequence[Tensor], order: float, dtype: torch.dtype | None) -> Tensor:
    """Return the norms as they are summed in a dtype, by default their own or float32."""
    kinds = {x.dtype for x in tensors}
    dtype = dtype or (torch.float64 if torch.float64 in kinds else torch.float32)
    if math.isinf(order):  # with a dtype this kernel is slow, and needs none
        each = [x.abs().max().to(dtype) if x.numel() else x.new_zeros((), dtype=dtype) for x in tensors]
    elif len(kinds) == 1:
        each = torch._foreach_norm(list(tensors), order, dtype=dtype)
    else:
        each = [torch.linalg.vector_norm(x, order, dtype=dtype) for x in tensors]
    if len({x.device for x in each}) > 1:
        each = [x.to(tensors[0].device) for x in each]
    return torch.stack(list(each))
