"""One positive definite system for many right sides at once, from products with the matrix alone.

    A z_k = r_k,      A = (sum over blocks of the data of J' H J) + precision,               (1)

by conjugate gradients, preconditioned by the diagonal of A; or, where a product over all data is
dear, by Nesterov's momentum over the blocks, with a moving average as the solution. What
iterations leave of the right side is returned, and is warned of where it is above ``tol``.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

__all__: list[str] = []

Product = Callable[[Tensor], Tensor]
Block = tuple[float, Product, Tensor | float]  # one over how many blocks, its J' H J and J' H eps


class _Solution(NamedTuple):
    z: Tensor
    residual: Tensor
    n_iter: int


def _cg(
    product: Product, right: Tensor, start: Tensor, diagonal: Tensor, tol: float, max_iter: int
) -> _Solution:
    """Solve for all rows at once by conjugate gradients, preconditioned by the diagonal."""
    z, limit = start.clone(), tol * right.norm(dim=1)
    r = right - product(z)
    d = q = r / diagonal
    rho, n_iter = (r * q).sum(1), 0
    while n_iter < max_iter and not bool((r.norm(dim=1) <= limit).all()):
        image = product(d)
        slope = (d * image).sum(1)
        step = torch.where(slope > 0, rho / slope, 0)[:, None]  # a row that is solved stands still
        z += step * d
        r -= step * image
        q = r / diagonal
        new = (r * q).sum(1)
        d = q + torch.where(rho > 0, new / rho, 0)[:, None] * d
        rho, n_iter = new, n_iter + 1
    _warn(_relative(r, right), tol, max_iter, "conjugate gradients")
    return _Solution(z, r, n_iter)


def _sgd(
    blocks: Callable[[], Iterator[Block]], right: Tensor, start: Tensor, precision: Tensor | float,
    diagonal: Tensor, tol: float, max_iter: int,
) -> _Solution:  # fmt: skip
    """Minimise by Nesterov's momentum over blocks of the data; the solution is a moving average."""

    def gradient(block: Block, z: Tensor, right: Tensor | float) -> Tensor:
        share, product, noise = block
        return ((product(z) - noise) / share + precision * z - right) / diagonal

    def residual(z: Tensor) -> Tensor:
        r = right - precision * z
        for _, product, noise in blocks():
            r = r + noise - product(z)
        return r

    top = 1.0  # the largest curvature that a block can show, by power iterations
    for share, product, _ in blocks():
        v = right[:1] / diagonal
        for _ in range(8):
            v = gradient((share, product, 0.0), v / v.norm().clamp_min(1e-30), 0.0)
        top = max(top, float(v.norm()))
    z, average, velocity, n_iter = start.clone(), start.clone(), torch.zeros_like(start), 0
    r = residual(average)
    full = right + sum((noise for _, _, noise in blocks()), start=torch.zeros_like(right))
    while n_iter < max_iter and _relative(r, full) > tol:
        rate = 0.5 / top * (1 - n_iter / max_iter)
        for block in blocks():
            velocity = 0.9 * velocity - rate * gradient(block, z + 0.9 * velocity, right)
            z = z + velocity
            average += 0.01 * (z - average)
        n_iter += 1
        if n_iter % 10 == 0 or n_iter == max_iter:
            r = residual(average)
    _warn(_relative(r, full), tol, max_iter, "stochastic gradients")
    return _Solution(average, r, n_iter)


def _relative(r: Tensor, right: Tensor) -> float:
    return float((r.norm(dim=1) / right.norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny)).max())


def _warn(residual: float, tol: float, max_iter: int, solver: str) -> None:
    if residual > tol:
        warnings.warn(
            f"{solver} left a relative residual of {residual:.2g} after at most {max_iter} passes, "
            f"tol is {tol:g}: raise max_iter or tol", ConvergenceWarning, stacklevel=2,
        )  # fmt: skip
