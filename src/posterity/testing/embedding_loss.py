"""Losses of two views: what `check_loss` asks, pairs that may stand in any order, and refusals that name z1 or z2."""

from typing import Any

import torch
from torch import Tensor, nn

from posterity.testing._agreement import same
from posterity.testing.loss import check_loss

__all__ = ["check_embedding_loss"]


def check_embedding_loss(
    loss: nn.Module, *, n: int = 6, dim: int = 5, least: int = 2, on_sphere: bool = False, compiles: bool = True,
    extremes: float = 1e4, detaches: bool = False,
) -> None:  # fmt: skip
    """Check a loss called as ``loss(z1, z2)``, two views of a batch after the projector.

    Parameters
    ----------
    loss : nn.Module
    n, dim : int
        Size of the batch that it is tried on.
    least : int, default=2
        Rows that it needs; fewer must raise ``ValueError``.
    on_sphere : bool, default=False
        Whether it normalises rows, so that their lengths must not matter.
    compiles, extremes, detaches
        As for `check_loss`.
    """
    rng = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(n, dim, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(2))
    check_loss(
        loss,
        z1,
        z2,
        batch_of_one=least < 2,
        symmetric=True,
        compiles=compiles,
        extremes=extremes,
        detaches=detaches,
    )
    value = loss(z1, z2).detach()
    order = torch.randperm(dim, generator=rng)
    same(loss(z1[:, order].contiguous(), z2[:, order].contiguous()), value, "the order of dimensions matters")
    apart = torch.stack([z1.detach(), z2.detach()], 2)
    same(loss(apart[..., 0], apart[..., 1]), value, "non-contiguous views")
    if on_sphere:
        length = torch.rand(n, 1, dtype=torch.float64, generator=rng) + 0.5
        same(loss(length * z1, 3 * z2), value, "the length of a row matters")
    plain = z1.detach(), z2.detach()
    bad: list[tuple[str, tuple[Any, Any]]] = [
        ("z1", (plain[0][0], plain[1][0])),
        ("z1", (plain[0][None], plain[1][None])),
        ("z2", (plain[0], plain[1][:-1])),
        ("z2", (plain[0], plain[1][:, :-1])),
        ("z1", (plain[0].long(), plain[1])),
        ("z2", (plain[0], plain[1].long())),
        ("z1", (plain[0][: least - 1], plain[1][: least - 1])),
        ("z1", (plain[0].numpy(), plain[1])),
    ]
    for name, views in bad:
        shapes = [tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in views]
        said = ""
        try:
            loss(*views)
        except ValueError as error:
            said = str(error)
        assert name in said, f"views of {shapes} should raise ValueError that names {name}, got {said!r}"
