r"""The margin problem that a quasi-homogeneous linear model tends to: some coefficients cost, the others are free.

Hard-margin classification minimises the length of b. Where only some coordinates P scale at the largest rate,

.. math:: \min_b \tfrac12 \sum_{j \in P} b_j^2 \quad\text{subject to}\quad y_i\, b^\top x_i \ge 1,

so the solution leans on free coordinates F as far as they help, whatever its Euclidean margin 1/|b| becomes.

For two balls of radius r around :math:`\pm\mu`, whose penalised part has the length a and whose free part b,
the widest margin is :math:`\sqrt{a^2 + b^2} - r`; here it is

.. math:: \frac{(a - s)\, s}{r}, \qquad s = \sqrt{r^2 - b^2}, \qquad\text{direction } (s, b) / r, \qquad b < r,

which goes to 0 as b nears r: a cliff, behind which free coordinates do alone, with the margin b - r.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from scipy.optimize import nnls
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity._random import draw_device

__all__ = ["SeminormMargin", "seminorm_max_margin", "two_balls"]

NEARLY_FREE = (
    1e-2,
    1e-3,
    1e-4,
    1e-5,
    1e-6,
)  # weights of free coordinates, beside 1, at which solutions are tried
RANK = 1e-12  # singular values of at most so much of the largest count as 0


@dataclass(frozen=True)
class SeminormMargin:
    """The solution of the margin problem in a seminorm, float64 on the CPU.

    Attributes
    ----------
    coef : Tensor of shape (d,)
        Of the solutions the one of least Euclidean norm.
    value : float
        Half the sum of squared penalised coefficients.
    margin : float
        Euclidean distance of the closest sample to the boundary, 1/|coef|.
    support : Tensor of shape (n,)
        Samples at the margin.
    multipliers : Tensor of shape (n,)
        At least 0, and 0 off ``support``; their sum of y_i x_i is coef on penalised coordinates, 0 on free ones.
    degenerate : bool
        Whether free coordinates separate alone, so that nothing is penalised; multipliers are then 0.
    """

    coef: Float[Tensor, " d"]
    value: float
    margin: float
    support: Bool[Tensor, " n"]
    multipliers: Float[Tensor, " n"]
    degenerate: bool


@torch.inference_mode(False)
def seminorm_max_margin(
    x: Float[Tensor, "n d"],
    y: Shaped[Tensor, " n"],
    penalized: Sequence[bool] | Bool[Tensor, " d"],
    *,
    tol: float = 1e-9,
) -> SeminormMargin:
    """Solve the margin problem in which only some coefficients are penalised, without intercept.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Finite; a constant column makes an intercept.
    y : Tensor of shape (n,)
        -1 or 1.
    penalized : sequence of bool or Tensor of shape (d,)
        Which coefficients cost. With all of them it is the hard-margin linear classifier.
    tol : float, default=1e-9
        Greater than 0: how far optimality conditions may be missed, and the least margin, relative to the longest
        sample, that counts as one.

    Returns
    -------
    SeminormMargin
        The solution; where several are optimal, that of least Euclidean norm.

    Raises
    ------
    ValueError
        If shapes do not fit, ``x`` is not finite, ``y`` holds other labels or one alone, nothing is penalised, or ``x`` is not separable by ``tol``.
    RuntimeError
        If rounding leaves no solution that is optimal by ``tol``.

    Notes
    -----
    1. The route: least distance programming by nonnegative least squares (Lawson and Hanson, chapter 23), an active-set
       method whose cost grows linearly in n. It is asked first of free coordinates alone; then of all, the free ones
       at a small cost, to learn which samples are at the margin. With these, the problem is two least-squares ones,
       solved exactly, and the result is returned once it fulfils the optimality conditions.

    References
    ----------
    .. [1] Kunin et al. The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks. ICLR 2023.
       Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import seminorm_max_margin
    >>> x, y = torch.tensor([[2.0, 0.5], [-2.0, -0.5]]), torch.tensor([1, -1])
    >>> seminorm_max_margin(x, y, [True, True]).coef  # along the sample, 1 / |x|
    tensor([0.4706, 0.1176], dtype=torch.float64)
    >>> free = seminorm_max_margin(x, y, [True, False])  # the free one does alone
    >>> free.coef, free.margin
    (tensor([0., 2.], dtype=torch.float64), 0.5)
    """
    n, d = has_shape("x", floating("x", x), (None, None)).shape
    has_shape("y", y, (n,), "x")
    at_least("tol", tol, 0.0, strict=True)
    costs = torch.as_tensor(penalized).detach().cpu()
    if costs.shape != (d,) or (costs.dtype != torch.bool and d):
        raise ValueError(f"penalized must be {d} truth values, one a column of x, got {penalized}")
    if not n or not d:
        raise ValueError(f"x must have at least one row and one column, got {(n, d)}")
    if not bool(costs.any()):
        raise ValueError("penalized must have a True: without a cost there is no margin problem")
    finite("x", x)
    if y.dtype == torch.bool or y.is_complex() or not bool((y.abs() == 1).all()):
        raise ValueError("y must hold -1 and 1, got others")
    if not bool((y != y[0]).any()):
        raise ValueError(f"y must have both classes, got {int(y[0])} alone")
    A = (x.detach().cpu().double() * y.detach().cpu().double()[:, None]).numpy()
    scale = float(np.sqrt((A / (np.abs(A).max() or 1.0)) ** 2 @ np.ones(d)).max()) * float(np.abs(A).max())
    A = A / (scale or 1.0)
    P = np.asarray(costs)
    if not _separates(A, tol):
        raise ValueError(
            f"x must be linearly separable through the origin with a relative margin above {tol:g}"
        )
    b, u = np.zeros(d), np.zeros(n)
    degenerate = _separates(A[:, ~P], tol)
    if degenerate:  # nothing need be penalised: the shortest of the free ones
        b[~P], of_free = _optimum(A[:, ~P], np.ones(d - P.sum(), dtype=bool), tol)
    else:
        b, of_free = _optimum(A, P, tol)
        u = of_free
    return SeminormMargin(
        torch.from_numpy(b / scale),
        float(b[P] @ b[P]) / 2 / scale**2,
        scale / float(np.linalg.norm(b)),
        torch.from_numpy((A @ b <= 1 + 10 * tol) | (of_free > 0)),
        torch.from_numpy(u / scale**2),
        degenerate,
    )


def _active(A: np.ndarray) -> tuple[np.ndarray, float]:
    """Return multipliers of the shortest b with A b >= 1, up to a factor, and 0 where there is none.

    Few rows matter: they are taken in as they are found violated.
    """
    n, d = A.shape
    rows = np.argsort(A @ A.sum(0), kind="stable")[: 2 * d + 10]
    target = np.append(np.zeros(d), 1.0)
    while True:
        E = np.vstack([A[rows].T, np.ones(len(rows))])
        found, length = nnls(E, target, maxiter=30 * n + 100)
        residual = target - E @ found  # (-b, 1) times its length squared
        violated = A @ residual[:-1] + residual[-1]
        violated[rows] = 0.0
        more = np.argsort(-violated, kind="stable")[: d + 10]
        more = more[violated[more] > 1e-10 * residual[-1]]
        if length < 1e-14 or not len(more):
            u = np.zeros(n)
            u[rows] = found
            return u, length
        rows = np.concatenate([rows, more])


def _separates(A: np.ndarray, tol: float) -> bool:
    return A.size > 0 and _active(A)[1] > tol  # as long as the margin, where that is small


def _optimum(A: np.ndarray, P: np.ndarray, tol: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the b of least norm over P, then over the rest, with A b >= 1, and its multipliers."""
    least = np.inf
    for cost in NEARLY_FREE:
        b, u = _on_rows(A, P, _active(A / np.where(P, 1.0, cost))[0] > 0)
        size = max(1.0, float(np.abs(u).max()))
        missed = max(
            float((1 - A @ b).max()),
            float((-u).max()) / size,
            float(np.abs(A.T @ u - np.where(P, b, 0.0)).max()) / size,
        )
        if missed <= tol:
            return b, np.maximum(u, 0.0)
        least = min(least, missed)
    raise RuntimeError(
        f"no solution is optimal by tol={tol:g}, the best misses by {least:.2g}: scale x, or raise tol"
    )


def _on_rows(A: np.ndarray, P: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the b of least norm over P, then over the rest, with A b = 1 in some rows, and its multipliers.

    Free coordinates fulfil what they can; what is left, the part of the rows' space that they do not reach
    (spanned by N), is asked of penalised ones.
    """
    b, u, S, F = np.zeros(A.shape[1]), np.zeros(len(A)), A[rows], ~P
    N = np.eye(len(S))
    if F.any() and len(S):
        U, s, _ = np.linalg.svd(S[:, F])
        N = U[:, int((s > RANK * max(1.0, s[0])).sum()) :]
    b[P] = np.linalg.lstsq(N.T @ S[:, P], N.sum(0), rcond=RANK)[0]
    b[F] = np.linalg.lstsq(S[:, F], 1 - S[:, P] @ b[P], rcond=RANK)[0]
    u[rows] = N @ np.linalg.lstsq(S[:, P].T @ N, b[P], rcond=RANK)[0]
    return b, u


def two_balls(
    n: int,
    mu: Float[Tensor, " d"],
    radius: float = 1.0,
    *,
    surface: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, " rows"]]:
    """Draw two classes, balls around mu and -mu.

    Parameters
    ----------
    n : int
        Points a class, at least 1.
    mu : Tensor of shape (d,)
        Centre of the class 1.
    radius : float, default=1.0
        Greater than 0. The classes are separable through the origin where mu is longer.
    surface : bool, default=True
        Whether to draw from the spheres, which decide the margin, or from all of the balls; uniformly.
    generator : torch.Generator, optional
        Torch's own if None.

    Returns
    -------
    x : Tensor of shape (2 n, d)
        In the dtype and on the device of ``mu``.
    y : Tensor of shape (2 n,)
        1 for the first n, then -1.

    Raises
    ------
    ValueError
        If a number is out of its range, or ``mu`` is no finite vector.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import two_balls
    >>> x, y = two_balls(3, torch.tensor([2.0, 0.5]), generator=torch.Generator().manual_seed(0))
    >>> [round(r, 5) for r in (x - y[:, None] * torch.tensor([2.0, 0.5])).norm(dim=1).tolist()]
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    integer("n", n, 1)
    (d,) = has_shape("mu", floating("mu", mu), (None,)).shape
    at_least("radius", radius, 0.0, strict=True)
    if not d:
        raise ValueError("mu must have at least one element, got none")
    finite("mu", mu)
    drawn = torch.randn(2 * n, d, generator=generator, device=draw_device(generator), dtype=torch.float64)
    length = radius / drawn.norm(dim=1, keepdim=True)
    if not surface:
        share = torch.rand(2 * n, 1, generator=generator, device=draw_device(generator), dtype=torch.float64)
        length = length * share ** (1 / d)
    y = torch.ones(2 * n, 1, dtype=torch.float64, device=drawn.device)
    y[n:] = -1
    return (drawn * length + y * mu.detach().to(drawn)).to(mu), y[:, 0].to(mu)
