"""Least squares of minimum norm from blocks of rows, in float64 and in the memory of one block.

Of all D that make |Q - Z D| least, the one of least norm: its directions are those that the rows
of Z have, and only these. Rows come in blocks that add up to a Gram matrix where there are many and
it is well conditioned, else to a triangular factor, which loses no digits.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__: list[str] = []

_MANY = 20  # rows a column, from where on the Gram matrix is tried
_CONDITION = 1e10  # of a Gram matrix: six of float64's sixteen digits are left
_RANGE = (1e-100, 1e100)  # of its largest eigenvalue: beyond, squares leave float64


class _LeastSquares(NamedTuple):
    """D, the Frobenius norm of Q - Z D, and the numerical rank of Z."""

    change: Tensor
    residual_norm: Tensor
    rank: int


def _minimum_norm(
    blocks: Callable[[], Iterator[tuple[Tensor, Tensor]]], shape: tuple[int, int], *,
    ridge: float, rcond: float | None, eps: float,
) -> _LeastSquares:  # fmt: skip
    """Return the solution for blocks (Z, Q) of rows, which may be gone through twice.

    ``shape`` is that of all Z together. With a ridge nothing is dropped unless ``rcond`` asks for it.
    """
    cut = max(shape) * eps if rcond is None else rcond
    if shape[0] > _MANY * shape[1]:
        found = _by_gram(blocks(), cut, ridge, rcond is not None)
        if found is not None:
            return found
    return _by_factor(blocks(), shape[1], cut, ridge, rcond is not None)


def _shrunk(s: Tensor, cut: float, ridge: float, drop: bool) -> tuple[Tensor, int]:
    """Return s / (s^2 + ridge) of singular values, 0 for those that are dropped, and the rank; squares are not formed."""
    kept = (s > cut * s.max()) & (s > 0)
    used = kept if drop or ridge == 0 else s > 0
    safe = torch.where(used, s, 1.0)
    return torch.where(used, 1 / (safe + ridge / safe), 0.0), int(kept.sum())


def _by_gram(
    blocks: Iterator[tuple[Tensor, Tensor]], cut: float, ridge: float, drop: bool
) -> _LeastSquares | None:
    """Return the solution from Z'Z and Z'Q; None where they do not hold the digits that it needs."""
    gram: Tensor | float = 0.0
    right: Tensor | float = 0.0
    total: Tensor | float = 0.0
    for z, q in blocks:
        gram, right, total = gram + z.mT @ z, right + z.mT @ q, total + q.square().sum()
    assert isinstance(gram, Tensor) and isinstance(right, Tensor) and isinstance(total, Tensor)
    if not bool(gram.isfinite().all()):
        return None
    squares, axes = torch.linalg.eigh(gram)
    low, top = (float(end) for end in squares[[0, -1]])
    sure = cut**2 > 1 / _CONDITION and (drop or ridge == 0)  # what rounding blurs is dropped
    if not _RANGE[0] < top < _RANGE[1] or (not sure and low + ridge <= (top + ridge) / _CONDITION):
        return None
    s = squares.clamp_min(0).sqrt()
    shrunk, rank = _shrunk(s, cut, ridge, drop)
    inverse, along = torch.where(s > 0, shrunk / s, 0.0), axes.mT @ right
    explained = (along.square() * (2 * inverse - shrunk.square())[:, None]).sum()
    return _LeastSquares(axes @ (inverse[:, None] * along), (total - explained).clamp_min(0).sqrt(), rank)


def _by_factor(
    blocks: Iterator[tuple[Tensor, Tensor]], columns: int, cut: float, ridge: float, drop: bool
) -> _LeastSquares:
    """Return the solution from the triangular factor of Z, made anew whenever enough rows have come."""
    waiting: list[tuple[Tensor, Tensor]] = []
    lost: Tensor | float = 0.0  # squares of Q that no column of Z reaches

    def pack() -> None:
        nonlocal lost
        z, q = (torch.cat(part) for part in zip(*waiting, strict=True))
        if len(z) > columns:
            basis, z = torch.linalg.qr(z)
            inside = basis.mT @ q
            lost, q = lost + (q - basis @ inside).square().sum(), inside
        waiting[:] = [(z, q)]

    for block in blocks:
        waiting.append(block)
        if sum(len(z) for z, _ in waiting) > 4 * columns:
            pack()
    pack()
    z, q = waiting[0]
    left, s, right = torch.linalg.svd(z, full_matrices=False)
    shrunk, rank = _shrunk(s, cut, ridge, drop)
    change = right.mT @ (shrunk[:, None] * (left.mT @ q))
    return _LeastSquares(change, (lost + (q - z @ change).square().sum()).sqrt(), rank)
