"""Batches of all processes: what a loss compares within a batch, it compares within all of it.

Where ``torch.distributed`` is initialised each process holds some of the rows. Every one of them then
computes the loss of the joint batch, in which its own rows alone carry a gradient, once for each
process: averaged over processes, as ``DistributedDataParallel`` does, that is the gradient of the joint batch.
"""

import torch
from torch import Tensor, distributed

__all__ = ["all_rows", "n_processes"]


def n_processes() -> int:
    """Return how many processes share a batch: 1 where ``torch.distributed`` is not initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def all_rows(*batches: Tensor) -> list[Tensor]:
    """Return each batch with the rows of all processes, in the order of ranks; they may differ in number.

    Every process must call this with as many batches, of the same dtypes and trailing shapes.
    """
    n = n_processes()
    return list(batches) if n == 1 else [_joint(x, n) for x in batches]


def _joint(x: Tensor, n: int) -> Tensor:
    counts = torch.empty(n, dtype=torch.int64, device=x.device)
    distributed.all_gather_into_tensor(counts, counts.new_tensor([len(x)]))
    sizes = counts.tolist()
    padded = x.detach().new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    if x.requires_grad:
        rows[distributed.get_rank()] = x.detach() + n * (x - x.detach())
    return torch.cat(rows)
