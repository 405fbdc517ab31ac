"""Lanczos: the extremes and the density of a symmetric operator's spectrum, from its products alone.

After m steps from a unit vector v the operator A, seen from the Krylov space of v, is the
tridiagonal T = V A V^T with diagonal alpha and off-diagonal beta. T's eigenvalues (Ritz values)
are the nodes, its eigenvectors' squared first components the weights, of the quadrature of
v^T f(A) v, exact for polynomials of degree 2m - 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Matvec", "ritz", "tridiagonal"]

Matvec = Callable[[Tensor], Tensor]


def tridiagonal(
    matvec: Matvec, start: Tensor, n_iter: int, *, reorthogonalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha (m,), beta (m - 1,) and the basis V (m, dim) of at most ``n_iter`` Lanczos steps.

    Stops early, m < n_iter, when the Krylov space is exhausted. ``start`` need not have length 1.
    """
    n_iter = min(n_iter, len(start))
    basis = start.new_empty(n_iter, len(start))
    alpha, beta = start.new_empty(n_iter), start.new_empty(n_iter)
    tiny = max(1e-10, 32 * torch.finfo(start.dtype).eps)
    torch.div(start, torch.linalg.vector_norm(start), out=basis[0])
    size = 0.0
    for k in range(n_iter):
        vector = basis[k]
        image = matvec(vector)
        if image.shape != start.shape:
            raise ValueError(
                f"matvec must return shape {tuple(start.shape)} as it is given, got {tuple(image.shape)}"
            )
        alpha[k] = image @ vector
        near, known = basis[max(0, k - 1) : k + 1], basis[: k + 1]
        image = torch.addmv(image, near.T, near @ image, alpha=-1)  # all there is but for rounding
        beta[k] = torch.linalg.vector_norm(image)
        found, length = float(alpha[k]), float(beta[k])
        if not (abs(found) < float("inf") and length < float("inf")):
            raise ValueError(f"matvec must return finite products, got NaN or infinity in iteration {k + 1}")
        for _ in range(2 if reorthogonalize else 0):
            before = length
            image.addmv_(known.T, known @ image, alpha=-1)
            beta[k] = torch.linalg.vector_norm(image)
            length = float(beta[k])
            if length > 0.7 * before:  # else rounding was most of it, and what is left goes once more
                break
        size = max(size, abs(found), length)
        if length <= tiny * size:
            return alpha[: k + 1], beta[:k], basis[: k + 1]
        if k + 1 < n_iter:
            torch.div(image, length, out=basis[k + 1])
    return alpha, beta[:-1], basis


def ritz(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (m,) of T, ascending, and its eigenvectors (m, m) as columns."""
    return torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
