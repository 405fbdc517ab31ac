"""Dependence by kernels: the Hilbert-Schmidt independence criterion, and HSCIC, its conditional form.

The criterion of two samples is the squared norm of the covariance of their kernel features, estimated from Gram matrices,

    HSIC = | E[ phi(X) (x) psi(Y) ] - E[phi(X)] (x) E[psi(Y)] |^2,                                  (1)

and 0 where X and Y are independent. HSCIC is its mean under the weights with which kernel ridge regression on a third
sample predicts at each of its points. `CIRCE` uses the first and is compared with the second.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, has_shape
from posterity._precision import widened

__all__ = ["gaussian_kernel", "hscic", "hsic"]


@widened
def gaussian_kernel(a: Float[Tensor, "n p"], b: Float[Tensor, "m p"], sigma2: float) -> Float[Tensor, "n m"]:
    """Return ``exp(-|a_i - b_j|^2 / sigma2)``, without a factor 2.

    Parameters
    ----------
    a, b : Tensor of shape (n, p), (m, p)
        Points, a row each.
    sigma2 : float
        Positive.

    Returns
    -------
    Tensor of shape (n, m)
        In (0, 1], 0 where it is below the dtype.

    Raises
    ------
    ValueError
        If the points do not fit or ``sigma2`` is not positive.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import gaussian_kernel
    >>> round(float(gaussian_kernel(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 1.0)), 4)
    0.3679
    """
    has_shape("a", floating("a", a), (None, None))
    has_shape("b", floating("b", b), (None, a.shape[1]), "a")
    at_least("sigma2", sigma2, 0, strict=True)
    return gaussian(a, b, sigma2)


@widened
def hsic(kx: Float[Tensor, "n n"], ky: Float[Tensor, "n n"], *, biased: bool = False) -> Float[Tensor, ""]:
    """Return the Hilbert-Schmidt independence criterion of two Gram matrices.

    Parameters
    ----------
    kx, ky : Tensor of shape (n, n)
        Symmetric.
    biased : bool, default=False
        The biased estimate is never negative; the unbiased one leaves diagonals out and needs four samples.

    Returns
    -------
    Tensor of shape ()
        About 0 where the samples are independent.

    Raises
    ------
    ValueError
        If the matrices are not square and of one size, or too small.

    References
    ----------
    .. [1] Song, Smola, Gretton, Bedo, Borgwardt. Feature Selection via Dependence Maximization. JMLR 2012.
       Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import hsic
    >>> float(hsic(torch.ones(5, 5), torch.eye(5), biased=True))
    0.0
    """
    has_shape("kx", floating("kx", kx), (None, None))
    has_shape("kx", kx, (len(kx), len(kx)))
    has_shape("ky", floating("ky", ky), tuple(kx.shape), "kx")
    n = len(kx)
    enough("kx", n, biased)
    if biased:
        rows = ky.mean(1)
        return (kx * (ky - rows - rows[:, None] + rows.mean())).mean()
    # one matrix centred so that its rows and its diagonal are 0: the sums that nearly cancel are never made
    ky = ky.clone().fill_diagonal_(0)
    rows = ky.sum(1) / (n - 2)
    centred = (ky - rows - rows[:, None] + rows.sum() / (n - 1)).fill_diagonal_(0)
    return (kx * centred).sum() / (n * (n - 3))


@widened
def hscic(
    x: Float[Tensor, "n dx"], z: Float[Tensor, "n dz"], y: Float[Tensor, "n dy"], *, ridge: float, sigma2_x: float,
    sigma2_z: float, sigma2_y: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the earlier penalty, HSCIC, that regresses on Y anew in every batch.

    Parameters
    ----------
    x, z, y : Tensor of shape (n, d)
        Features, distractor and target of a batch; ``(n,)`` counts as ``(n, 1)``.
    ridge : float
        Positive; added to the Gram matrix of y.
    sigma2_x, sigma2_z, sigma2_y : float
        As `gaussian_kernel` takes them.

    Returns
    -------
    Tensor of shape ()
        The mean over the batch's targets of a biased criterion under weights.

    Raises
    ------
    ValueError
        If an argument does not fit.

    References
    ----------
    .. [1] Park, Muandet. A Measure-Theoretic Approach to Kernel Conditional Mean Embeddings. NeurIPS 2020.
       Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import hscic
    >>> x, y, z = torch.randn(3, 32, 1)
    >>> bool(hscic(x, z, y, ridge=0.1, sigma2_x=1.0, sigma2_z=1.0, sigma2_y=1.0) >= 0)
    True
    """
    x, z, y = (columns(name, value) for name, value in (("x", x), ("z", z), ("y", y)))
    same_length(len(x), z=z, y=y)
    at_least("ridge", ridge, 0, strict=True)
    widths = {"sigma2_x": sigma2_x, "sigma2_z": sigma2_z, "sigma2_y": sigma2_y}
    for name, width in widths.items():
        at_least(name, width, 0, strict=True)
    kx, kz, ky = (gaussian(v, v, width) for v, width in zip((x, z, y), widths.values(), strict=True))
    weights = torch.linalg.solve(ky + ridge * torch.eye(len(y), dtype=ky.dtype, device=ky.device), ky)
    of_x, of_z = kx @ weights, kz @ weights
    joint = (weights * ((kx * kz) @ weights)).sum()
    cross = (weights * of_x * of_z).sum()
    return (joint - 2 * cross + (weights * of_x).sum(0) @ (weights * of_z).sum(0)) / len(x)


# Distances, and what is asked of data.


def exponent(a: Tensor, b: Tensor, sigma2: Tensor | float) -> Tensor:
    """Return ``-|a_i - b_j|^2 / sigma2`` by one product, of points moved to the middle, where least cancels."""
    middle = b.detach().mean(0)
    a, b = a - middle, b - middle
    left = torch.cat([2 * a, -a.square().sum(1, keepdim=True), -torch.ones_like(a[:, :1])], 1) / sigma2
    right = torch.cat([b, torch.ones_like(b[:, :1]), b.square().sum(1, keepdim=True)], 1)
    return left @ right.T


def gaussian(a: Tensor, b: Tensor, sigma2: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    return exponent(a, b, sigma2).to(dtype or a.dtype).clamp_max(0).exp_()


def median_distance(x: Tensor) -> Tensor:
    """Return the median squared distance of different points, 1 where that is 0; no device waits."""
    apart, n = -exponent(x, x, 1.0).clamp_max(0), len(x)
    found = apart.fill_diagonal_(torch.inf).flatten().kthvalue(max((n * n - n + 1) // 2, 1)).values
    return torch.where((found > 0) & found.isfinite(), found, 1.0)


def columns(name: str, value: Tensor) -> Tensor:
    floating(name, value, "one-hot codes of classes, or a cast to float")
    value = value[:, None] if value.ndim == 1 else value
    return has_shape(name, value, (None, None))


def same_length(n: int, of: str = "x", **others: Tensor) -> None:
    for name, value in others.items():
        if len(value) != n:
            raise ValueError(f"{name} must have as many rows as {of}, {n}, got {len(value)}")


def enough(name: str, n: int, biased: bool) -> None:
    least, why = (1, "") if biased else (4, " where biased=False")
    if n < least:
        raise ValueError(f"{name} must have at least {least} rows{why}, got {n}")
