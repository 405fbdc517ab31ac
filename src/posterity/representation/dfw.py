"""DFW: one linear representation of many tasks, with split samples and whitened features.

Task t has ``y = F_t Phi x + noise`` with rows of Phi (r, d_x) orthonormal and shared; inputs may be distributed
differently in each task, and be a dependent series. In a round each task splits its rows in two: from the first it
fits its head F_t on the features Phi x, with the second it takes a step

    Phi_t = Phi - lr F_t' (F_t Phi - M_t) ,     M_t  least squares of y on x ,                      (1)

and the mean over tasks is made orthonormal. The split keeps the noise of the step independent of the head (else it
is a bias that no number of tasks averages out), and M_t in the place of a gradient, which would be (1) times the
task's covariance, keeps tasks of unlike covariance from pulling the mean off (else the step is no contraction).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils import check_random_state
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of, within

__all__ = ["DFWResult", "DFWStep", "dfw", "dfw_step", "subspace_distance"]

PARTITIONS = ("fixed", "shuffle", "blocks")


class DFWStep(NamedTuple):
    """A round.

    Attributes
    ----------
    phi : Tensor of shape (r, d_x)
        The new representation, orthonormal rows.
    weights : Tensor of shape (T, d_y, r)
        Heads fitted with the old one.
    """

    phi: Tensor
    weights: Tensor


@dataclass(frozen=True)
class DFWResult:
    """A representation and the heads of its tasks.

    Attributes
    ----------
    phi : Tensor of shape (r, d_x)
        Orthonormal rows.
    weights : Tensor of shape (T, d_y, r)
        Heads, fitted on all rows with the final ``phi``.
    distances : Tensor of shape (n_iter,), optional
        Distance from ``phi_true`` after each round, where it was given.
    n_iter : int
        Rounds.
    converged : bool
        Whether a round changed the subspace by less than ``tol``.
    """

    phi: Tensor
    weights: Tensor
    distances: Tensor | None
    n_iter: int
    converged: bool


def subspace_distance(a: Float[Tensor, "r d"], b: Float[Tensor, "s d"]) -> Float[Tensor, ""]:
    """Return how far the rows of ``a`` reach out of the span of the rows of ``b``.

    Parameters
    ----------
    a, b : Tensor of shape (r, d), (s, d)
        Any bases.

    Returns
    -------
    Tensor of shape ()
        Largest singular value of P_a (I - P_b), in [0, 1]: the sine of the largest principal angle, symmetric where
        both have as many rows.

    Raises
    ------
    ValueError
        If an argument does not fit, or rows are not independent.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import subspace_distance
    >>> float(subspace_distance(torch.eye(3)[:2], torch.eye(3)[1:]))
    1.0
    """
    has_shape("a", finite("a", floating("a", a)), (None, None))
    has_shape("b", finite("b", floating("b", b)), (None, a.shape[1]), "a")
    return _distance(_basis("a", a), _basis("b", b)).to(a.dtype)


def dfw_step(
    phi: Float[Tensor, "r dx"], x: Float[Tensor, "t n dx"], y: Float[Tensor, "t n dy"], *, lr: float, split: float = 0.5,
    debias: bool = True, whiten: bool = True, ridge: float = 0.0,
) -> DFWStep:  # fmt: skip
    """Make one round, on rows in the order in which they are given.

    Parameters
    ----------
    phi : Tensor of shape (r, d_x)
        Orthonormal rows.
    x, y : Tensor of shape (T, N, d_x), (T, N, d_y)
        Inputs and outputs of each task.
    lr : float
        Positive.
    split, debias, whiten, ridge
        As for `dfw`.

    Returns
    -------
    DFWStep
        The new representation, and heads fitted with the old one.

    Raises
    ------
    ValueError
        If an argument does not fit, or a part has too few rows.

    References
    ----------
    .. [1] Zhang, Toso, Anderson, Matni. Sample-Efficient Linear Representation Learning from Non-IID
       Non-Isotropic Data. ICLR 2024. Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import dfw_step
    >>> x = torch.randn(3, 20, 4)
    >>> y = x @ torch.randn(3, 4, 2)
    >>> dfw_step(torch.eye(4)[:2], x, y, lr=0.1).weights.shape
    torch.Size([3, 2, 2])
    """
    tasks = _read(x, y)
    at_least("lr", lr, 0, strict=True)
    has_shape("phi", finite("phi", floating("phi", phi)), (None, tasks.x.shape[2]), "x")
    if not 1 <= len(phi) <= phi.shape[1]:
        raise ValueError(f"phi must have 1..{phi.shape[1]} rows, got {len(phi)}")
    _check(tasks, len(phi), split, 0, debias, whiten, ridge)
    first, second = tasks.parts(split) if debias else (tasks.sums(),) * 2
    factor = _factor(second.xx, ridge, "x") if whiten else None
    new, weights = _round(_exact(phi.detach()), first, second, factor, lr, ridge)
    return DFWStep(new.to(phi.dtype), weights.to(phi.dtype))


def dfw(
    x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], r: int, *, max_iter: int = 200,
    lr: float | Literal["auto"] = "auto", split: float = 0.5, debias: bool = True, whiten: bool = True,
    partition: Literal["fixed", "shuffle", "blocks"] = "shuffle", gap: int = 0,
    init: Tensor | Literal["random", "spectral"] = "random", ridge: float = 0.0, tol: float = 1e-8,
    phi_true: Tensor | None = None, random_state: int | None = None,
) -> DFWResult:  # fmt: skip
    """Find the representation that tasks share.

    Parameters
    ----------
    x, y : Tensor of shape (T, N, d_x), (T, N, d_y), or sequences of (N_t, d_x), (N_t, d_y)
        Inputs and outputs of each task; each task counts alike.
    r : int
        Dimension of the representation, at most d_x and T d_y.
    max_iter : int, default=200
        Rounds, at most.
    lr : float or "auto", default="auto"
        Rate of the step; "auto" is one over the largest eigenvalue of the mean of F_t' F_t, in every round; without
        whitening also over the largest of any task's covariance, which is safe.
    split : float, default=0.5
        Share of the rows that fit the heads, in (0, 1).
    debias : bool, default=True
        Whether head and step have different rows; without it and whitening this is alternating minimisation and
        descent (AMD, FedRep).
    whiten : bool, default=True
        Whether (1) is the step, which needs d_x rows in the second part, or the gradient.
    partition : {"shuffle", "fixed", "blocks"}, default="shuffle"
        A new random split in each round; the first rows and the rest; or, for series, contiguous parts that
        change places from round to round.
    gap : int, default=0
        Rows that "blocks" leaves out between the parts, so that these are nearly independent.
    init : Tensor of shape (r, d_x), "random" or "spectral", default="random"
        Where to start; "spectral" is the span of all tasks' least squares.
    ridge : float, default=0.0
        Added to the diagonal of both Gram matrices, sums over rows. A little of it allows parts of fewer rows than
        they need: directions that a task has not seen are then left to the others.
    tol : float, default=1e-8
        Change of the subspace in a round at which to stop.
    phi_true : Tensor of shape (r, d_x), optional
        Of which distances are kept.
    random_state : int, optional
        For the start and the splits.

    Returns
    -------
    DFWResult
        In the dtype of ``x``, computed in float64.

    Raises
    ------
    ValueError
        If an argument does not fit, a part has too few rows, or a Gram matrix is singular without a ridge.

    Notes
    -----
    Departures from the paper:

    1. The dimension may exceed the outputs of a task, up to those of all tasks together: the mean over tasks is
       what must be regular.
    2. The rate of the step is one over its curvature, taken anew in each round.

    References
    ----------
    .. [1] Zhang, Toso, Anderson, Matni. Sample-Efficient Linear Representation Learning from Non-IID
       Non-Isotropic Data. ICLR 2024. Algorithm 1.
    .. [2] Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated
       Learning. ICML 2021.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import dfw, subspace_distance
    >>> rng = torch.Generator().manual_seed(0)
    >>> phi, x = torch.eye(6)[:2], torch.randn(5, 40, 6, generator=rng)
    >>> y = x @ phi.T @ torch.randn(5, 2, 3, generator=rng)
    >>> float(subspace_distance(dfw(x, y, 2, random_state=0).phi, phi)) < 1e-4
    True
    """
    tasks = _read(x, y)
    r = integer("r", r, 1)
    integer("max_iter", max_iter, 1)
    if lr != "auto":
        at_least("lr", lr, 0, strict=True)
    at_least("tol", tol, 0)
    one_of("partition", partition, PARTITIONS)
    if integer("gap", gap, 0) and partition != "blocks":
        raise ValueError(f'gap={gap} needs partition="blocks", got {partition!r}')
    _check(tasks, r, split, gap, debias, whiten, ridge)
    shape = r, tasks.x.shape[2]
    truth = None if phi_true is None else _given("phi_true", phi_true, shape)
    draws = check_random_state(random_state)
    everything = tasks.sums()
    if isinstance(init, Tensor):
        phi = _given("init", init, shape)
    elif one_of("init", init, ("random", "spectral")) == "random":
        phi = _orthonormal(torch.from_numpy(draws.standard_normal(shape)).to(tasks.x))
    else:
        operators = torch.cholesky_solve(everything.xy, _factor(everything.xx, ridge, "x")).mT
        phi = torch.linalg.svd(operators.flatten(0, 1), full_matrices=False).Vh[:r]
    known: dict[bool, tuple[_Sums, _Sums, Tensor | None]] = {}  # all that later rounds need, where rows stay
    distances: list[Tensor] = []
    converged = False
    for step in range(max_iter):
        later = debias and partition == "blocks" and step % 2 == 1
        if later not in known:
            if not debias:
                first = second = everything
            elif partition == "shuffle":
                first, second = tasks.shuffled(split, draws, everything)
            else:
                first, second = tasks.parts(split, gap, later=later)
            known[later] = first, second, _factor(second.xx, ridge, "x") if whiten else None
        new, _ = _round(phi, *known[later], lr, ridge)
        if debias and partition == "shuffle":
            known.clear()
        change, phi = _distance(new, phi), new
        if truth is not None:
            distances.append(_distance(phi, truth))
        if bool(change < tol):
            converged = True
            break
    weights, kept = _heads(phi, everything, ridge), tasks.dtype
    path = torch.stack(distances).to(kept) if truth is not None else None
    return DFWResult(phi.to(kept), weights.to(kept), path, step + 1, converged)


# Sums over the rows of each task, which are all that a round needs.


class _Sums(NamedTuple):
    xx: Tensor  # (T, d_x, d_x)
    xy: Tensor  # (T, d_x, d_y)
    n: Tensor  # (T,)

    def less(self, part: "_Sums") -> "_Sums":
        """Return sums over the other rows."""
        return _Sums(self.xx - part.xx, self.xy - part.xy, self.n - part.n)


class _Tasks(NamedTuple):
    """Tasks padded to one length."""

    x: Tensor
    y: Tensor
    sizes: list[int]
    dtype: torch.dtype

    def order(self, draws: Any) -> Tensor:
        """Return a random order of the rows of each task (T, N), padding last."""
        n = self.x.shape[1]
        keys = draws.random_sample((len(self.sizes), n))
        keys[np.arange(n) >= np.array(self.sizes)[:, None]] = 2.0
        return torch.from_numpy(keys.argsort(1)).to(self.x.device)

    def sums(self) -> _Sums:
        """Return sums over all rows."""
        return _Sums(self.x.mT @ self.x, self.x.mT @ self.y, torch.tensor(self.sizes, device=self.x.device))

    def part(self, begin: Tensor, length: Tensor, order: Tensor | None = None) -> _Sums:
        """Return sums over so many rows of each task from ``begin`` on, as they are or in an order."""
        place = begin[:, None] + torch.arange(max(1, int(length.max())), device=begin.device)
        place = place.clamp_max(self.x.shape[1] - 1)
        rows = place if order is None else order.gather(1, place)
        flat = (rows + self.x.shape[1] * torch.arange(len(rows), device=rows.device)[:, None]).flatten()
        x, y = (v.flatten(0, 1).index_select(0, flat).view(*rows.shape, -1) for v in (self.x, self.y))
        if int(length.min()) < rows.shape[1]:
            x = x * (torch.arange(rows.shape[1], device=rows.device) < length[:, None])[..., None]
        return _Sums(x.mT @ x, x.mT @ y, length)

    def parts(self, split: float, gap: int = 0, *, later: bool = False) -> tuple[_Sums, _Sums]:
        """Return sums over the first part and the second, as rows are; with ``later`` the first is at the end."""
        first, second = self.lengths(split, gap).T
        zero = torch.zeros_like(first)
        return self.part(second + gap if later else zero, first), self.part(
            zero if later else first + gap, second
        )

    def shuffled(self, split: float, draws: Any, everything: _Sums) -> tuple[_Sums, _Sums]:
        """Return sums over a random first part and the rest."""
        length = self.lengths(split, 0)[:, 0]
        first = self.part(torch.zeros_like(length), length, self.order(draws))
        return first, everything.less(first)

    def lengths(self, split: float, gap: int) -> Tensor:
        """Return how many rows of each task are in the first part and in the second, (T, 2)."""
        found = [(k := math.floor(split * (n - gap)), n - gap - k) for n in self.sizes]
        return torch.tensor(found, device=self.x.device)


def _read(x: Any, y: Any) -> _Tasks:
    """Return tasks in float64, padded with zeros."""
    if isinstance(x, Tensor) != isinstance(y, Tensor):
        raise ValueError("x and y must both be tensors, or both sequences of tensors")
    if isinstance(x, Tensor):
        has_shape("x", floating("x", x), (None, None, None))
        has_shape("y", floating("y", y), (x.shape[0], x.shape[1], None), "x")
    pairs = list(zip(x, y, strict=False))
    if not pairs or len(x) != len(y):
        raise ValueError(f"x and y must have as many tasks, at least one, got {len(x)} and {len(y)}")
    for k, (a, b) in enumerate(pairs):
        first = pairs[0]
        has_shape(f"x[{k}]", floating(f"x[{k}]", a), (None, first[0].shape[-1] if first[0].ndim else None))
        has_shape(
            f"y[{k}]",
            floating(f"y[{k}]", b),
            (len(a), first[1].shape[-1] if first[1].ndim else None),
            f"x[{k}]",
        )
        if 0 in a.shape or 0 in b.shape:
            raise ValueError(
                f"x[{k}] and y[{k}] must have rows and columns, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        finite(f"x[{k}]", a)
        finite(f"y[{k}]", b)
    sizes = [len(a) for a, _ in pairs]
    stacks = [
        torch.nn.utils.rnn.pad_sequence([_exact(pair[side].detach()) for pair in pairs], batch_first=True)
        for side in (0, 1)
    ]
    return _Tasks(stacks[0], stacks[1], sizes, pairs[0][0].dtype)


def _exact(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _check(tasks: _Tasks, r: int, split: float, gap: int, debias: bool, whiten: bool, ridge: float) -> None:
    """Refuse what leaves directions open, and parts that are too short."""
    dx, outputs = tasks.x.shape[2], len(tasks.sizes) * tasks.y.shape[2]
    if not 1 <= r <= min(dx, outputs):
        raise ValueError(
            f"r must be in 1..{min(dx, outputs)}: at most the {dx} inputs, and the {outputs} outputs of all tasks "
            f"together, for else directions are left open; got {r}"
        )
    within("split", split, 0, 1, open_low=True, open_high=True)
    at_least("ridge", ridge, 0)
    if 2 * gap >= min(tasks.sizes):
        raise ValueError(f"gap must be less than half of a task's rows, {min(tasks.sizes)}, got {gap}")
    for k, (n, lengths) in enumerate(zip(tasks.sizes, tasks.lengths(split, gap).tolist(), strict=True)):
        for part, have, least in zip(
            ("first", "second"), lengths if debias else (n, n), (r, dx if whiten else 1), strict=True
        ):
            if have < least and not ridge:
                raise ValueError(
                    f"x must have at least {least} rows in the {part} part of each task where ridge=0, task {k} "
                    f"has {have}"
                )


def _given(name: str, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a basis that the caller gave."""
    return _basis(name, has_shape(name, finite(name, floating(name, rows)), shape))


def _basis(name: str, rows: Tensor) -> Tensor:
    """Return orthonormal rows of the same span, which must be as many."""
    if not 1 <= len(rows) <= rows.shape[1]:
        raise ValueError(f"{name} must have 1..{rows.shape[1]} rows, got {len(rows)}")
    rows = _exact(rows.detach())
    size = torch.linalg.svdvals(rows)
    if bool(size[-1] <= size[0] * max(rows.shape) * torch.finfo(rows.dtype).eps):
        raise ValueError(f"{name} must have independent rows")
    return _orthonormal(rows)


def _factor(gram: Tensor, ridge: float, what: str) -> Tensor:
    """Return Cholesky factors of Gram matrices, in which no column may lie in the span of those before it."""
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram)
    left, size = (m.diagonal(dim1=-2, dim2=-1) for m in (factor.square(), gram))
    regular = (left > size * gram.shape[-1] * torch.finfo(gram.dtype).eps).all(1)
    bad = ((info != 0) | ~regular).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"{what} must have a regular Gram matrix, that of task {int(bad[0])} is singular: set ridge"
        )
    return factor


def _heads(phi: Tensor, sums: _Sums, ridge: float) -> Tensor:
    """Return heads (T, d_y, r) by least squares on features."""
    return torch.cholesky_solve(phi @ sums.xy, _factor(phi @ sums.xx @ phi.T, ridge, "features of x")).mT


def _round(
    phi: Tensor, first: _Sums, second: _Sums, factor: Tensor | None, lr: float | str, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return the new representation, and the heads of the old one; with the factor of ``second.xx`` it is whitened."""
    heads = _heads(phi, first, ridge)
    square, n = heads.mT @ heads, second.n[:, None, None]
    slope = square @ phi @ second.xx - heads.mT @ second.xy.mT  # (r, d_x) of each task
    slope = slope / n if factor is None else torch.cholesky_solve(slope.mT, factor).mT
    if lr == "auto":
        steep = torch.linalg.eigvalsh(square.mean(0))[-1]
        if factor is None:
            steep = steep * torch.linalg.eigvalsh(second.xx / n)[:, -1].max()
        lr = 1 / float(steep) if float(steep) > 0 else 0.0
    return _orthonormal(phi - float(lr) * slope.mean(0)), heads


def _orthonormal(rows: Tensor) -> Tensor:
    """Return orthonormal rows of the same span, of which the first is along the first."""
    q, r = torch.linalg.qr(rows.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of spans of orthonormal rows."""
    return torch.linalg.matrix_norm(a - a @ b.T @ b, ord=2).clamp_max(1)
