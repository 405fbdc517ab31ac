"""The gap of two thresholds' true quantiles: how often it exceeds alpha, without any data.

The k-th smallest of n continuous scores has a true quantile U that is Beta(k, n + 1 - k),
whatever the distribution. For thresholds at rank k_a of n_a scores in groups a = 0, 1

    P(U_0 - U_1 > alpha) = int_alpha^1 F_1(u - alpha) f_0(u) du,              (1)

and the other way round; f and F are the betas' densities and distribution functions. For
all pairs of ranks at once this is one matrix product over the nodes of Gauss's rule.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.special import gammaln

from posterity._checks import at_least

__all__ = ["violation_probability"]


def violation_probability(k0: Any, n0: Any, k1: Any, n1: Any, alpha: float) -> ndarray | float:
    """Return the probability that the true gap at a pair of ranks exceeds alpha: exact.

    Parameters
    ----------
    k0, n0, k1, n1 : int or array of int
        Rank of the threshold, from 1 to n, and number of scores of either group; they
        broadcast.
    alpha : float
        The gap, at least 0.

    Returns
    -------
    float or ndarray
        ``P(|U0 - U1| > alpha)`` for independent ``Ua ~ Beta(ka, na + 1 - ka)``, with an
        error below 1e-9; an array where an argument is one.

    Raises
    ------
    ValueError
        If an argument is no integer, a rank is not in 1 to n, or alpha is negative.

    References
    ----------
    .. [1] Li, Zou, Zhang. FaiREE: fair classification with finite-sample and
       distribution-free guarantee. ICLR 2023. Proposition 1.

    Examples
    --------
    One score a group: both quantiles are uniform, and their gap exceeds a half in a quarter
    of the cases.

    >>> from posterity.fairness import violation_probability
    >>> round(violation_probability(1, 1, 1, 1, alpha=0.5), 9)
    0.25
    """
    at_least("alpha", alpha, 0)
    arrays = [np.asarray(value) for value in (k0, n0, k1, n1)]
    for name, array in zip(("k0", "n0", "k1", "n1"), arrays, strict=True):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got dtype {array.dtype}")
    sizes = {*zip(*(n.ravel().tolist() for n in np.broadcast_arrays(arrays[1], arrays[3])), strict=True)}
    k0, n0, k1, n1 = np.broadcast_arrays(*arrays)
    for name, k, n in (("k0", k0, n0), ("k1", k1, n1)):
        if (bad := (k < 1) | (k > n)).any():
            raise ValueError(f"{name} must be in 1 to n, got rank {k[bad][0]} of n={n[bad][0]}")
    out = np.empty(k0.shape)
    for size0, size1 in sizes:
        here = (n0 == size0) & (n1 == size1)
        rows, row = np.unique(k0[here], return_inverse=True)
        columns, column = np.unique(k1[here], return_inverse=True)
        out[here] = _violation(rows, size0, columns, size1, alpha)[row, column]
    return out if out.ndim else float(out)


def _violation(k0: ndarray, n0: int, k1: ndarray, n1: int, alpha: float) -> ndarray:
    """Return P(|U0 - U1| > alpha) for all pairs of ranks."""
    return np.minimum(_exceeds(k0, n0, k1, n1, alpha) + _exceeds(k1, n1, k0, n0, alpha).T, 1.0)


def _exceeds(k0: ndarray, n0: int, k1: ndarray, n1: int, alpha: float) -> ndarray:
    """Return P(U0 - U1 > alpha) for all pairs of ranks, U(0) = 0 and U(n + 1) = 1 included.

    It is the integral of F1(u - alpha) f0(u) over u from alpha to 1. For whole ranks that is a
    polynomial of degree n0 + n1 - 1, so Gauss's rule is exact at (n0 + n1) / 2 nodes. Fewer
    do: the nodes crowd at both ends as the betas narrow there, and in the angle of the
    nodes the integrand is no narrower than (n0 + n1)^(-1/2).
    """
    if alpha >= 1:
        return np.zeros((len(k0), len(k1)))
    nodes = min((n0 + n1) // 2 + 1, 16 + math.ceil(5 * math.sqrt(n0 + n1)))
    x, weight = _gauss(nodes)
    x, weight = (1 - alpha) * (x + 1) / 2, (1 - alpha) * weight / 2
    measure = n0 * _binomial(k0 - 1, n0 - 1, x + alpha) * weight
    measure[k0 == 0] = 0.0
    # the last node is for the rank n0 + 1 alone, whose mass is at 1
    tail = np.cumsum(_binomial(np.arange(n1, -1, -1), n1, np.append(x, 1 - alpha)), 0)[::-1]
    tail = np.vstack([tail, np.zeros(nodes + 1)])[k1]
    measure[k0 == n0 + 1] = 0.0
    last = np.zeros((len(k0), 1))
    last[k0 == n0 + 1] = 1.0
    return np.clip(np.hstack([measure, last]) @ tail.T, 0.0, 1.0)


@cache
def _gauss(nodes: int) -> tuple[ndarray, ndarray]:
    return np.polynomial.legendre.leggauss(nodes)


def _binomial(k: ndarray, n: int, p: ndarray) -> ndarray:
    """Return the probability of k successes in n, for all pairs of k and p."""
    k = np.clip(k, 0, n)[:, None]
    p = np.minimum(p, 1 - np.finfo(float).epsneg)  # log1p(-1) times no failures would be NaN
    out = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * np.log(p) + (n - k) * np.log1p(-p)
    return np.exp(out, out=out)
