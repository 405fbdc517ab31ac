"""Means that a few liars cannot move far, and ways to send fewer numbers that are right in the mean.

Of n vectors fewer than half may be anything. Their mean goes wherever one of them wants; the
median of each coordinate, the geometric median

    argmin_z  sum_i ||z - x_i||,                                                             (1)

the mean without the largest and smallest numbers, and the vector nearest to most others stay
near the honest ones. Alone they do not fall with the spread of the honest vectors as a robust
mean should, E ||out - mean||^2 <= c delta (mean squared distance); after *bucketing*, means of s
vectors at a time in random order, they do, as long as delta s < 1/2 for a share delta of liars.
"""

import itertools
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, floating, integer, one_of
from posterity._precision import rounding, widened
from posterity._random import draw_device

__all__ = [
    "bucketing", "coordinate_median", "geometric_median", "krum", "quantize_l2", "rand_k", "trimmed_mean",
]  # fmt: skip

Vectors = Float[Tensor, "n d"]
Vector = Float[Tensor, " d"]
NonFinite = Literal["raise", "drop"]
LONG = 4096  # numbers of a vector


def _vectors(name: str, value: Tensor, nonfinite: str = "raise") -> Tensor:
    """Return a matrix with a row at least, all finite: a vector that is not would decide alone."""
    one_of("nonfinite", nonfinite, ("raise", "drop"))
    if floating(name, value).ndim != 2 or len(value) == 0:
        raise ValueError(f"{name} must be of shape (n, d) with n at least 1, got {tuple(value.shape)}")
    if bool(torch.isfinite(torch.stack(value.detach().aminmax())).all() if value.numel() else True):
        return value
    good = torch.isfinite(value).all(1)
    bad = len(value) - int(good.sum())
    if bad and (nonfinite == "raise" or bad == len(value)):
        raise ValueError(f"{name} must be finite, {bad} of {len(value)} hold NaN or infinity")
    return value[good] if bad else value


def _dropped(vectors: Tensor, kept: Tensor, name: str, most: int) -> int:
    """Return how many vectors were left out, no more than were said to lie."""
    count = len(vectors) - len(kept)
    if count > most:
        raise ValueError(f"{name} must be at least the {count} of vectors with NaN or infinity, got {most}")
    return count


def _in_units(vectors: Tensor) -> tuple[Tensor, float]:
    """Return vectors in units in which no square overflows or vanishes, and the unit; mostly 1."""
    peak = max(map(abs, map(float, vectors.detach().aminmax()))) if vectors.numel() else 1.0
    return (vectors, 1.0) if peak == 0 or 1e-12 < peak < 1e15 else (vectors / peak, peak)


def _sorted(vectors: Tensor) -> Tensor:
    """Return each column in order; numpy's sort of short columns is several times torch's."""
    if vectors.device.type != "cpu" or vectors.requires_grad:
        return vectors.sort(dim=0).values
    return torch.from_numpy(np.sort(vectors.numpy(), axis=0))


@widened
def coordinate_median(vectors: Vectors, *, nonfinite: NonFinite = "raise") -> Vector:
    """Return the median of each coordinate, between the two middle ones if they are even in number.

    Parameters
    ----------
    vectors : Tensor of shape (n, d)
        What was sent, at least one.
    nonfinite : {"raise", "drop"}, default="raise"
        What becomes of vectors with NaN or infinity: an error that counts them, or they are left out.

    Returns
    -------
    Tensor of shape (d,)
        In the dtype of the vectors.

    Raises
    ------
    ValueError
        For another shape, or vectors that are not finite.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import coordinate_median
    >>> coordinate_median(torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, -1e9]]))
    tensor([2., 5.])
    """
    ordered = _sorted(_vectors("vectors", vectors, nonfinite))
    n = len(ordered)
    return ordered[n // 2].clone() if n % 2 else ordered[n // 2 - 1] / 2 + ordered[n // 2] / 2


@widened
def geometric_median(
    vectors: Vectors,
    *,
    max_iter: int = 100,
    tol: float = 1e-10,
    start: Vector | None = None,
    nonfinite: NonFinite = "raise",
) -> Vector:
    """Return the point with the least sum of distances, equation (1), by Weiszfeld's iteration.

    From the coordinate median on; where the iterate is one of the vectors, it leaves it by the
    step of Vardi and Zhang, or stays if that is the answer.

    Parameters
    ----------
    vectors : Tensor of shape (n, d)
        What was sent, at least one.
    max_iter : int, default=100
        At most so many passes over the vectors.
    tol : float, default=1e-10
        Stops when a step is shorter than this times the mean distance, or what rounding leaves.
    start : Tensor of shape (d,), optional
        Where to begin, such as the last round's result.
    nonfinite : {"raise", "drop"}, default="raise"
        What becomes of vectors with NaN or infinity: an error that counts them, or they are left out.

    Returns
    -------
    Tensor of shape (d,)
        In the dtype of the vectors.

    Raises
    ------
    ValueError
        For another shape, vectors that are not finite, or a number out of range.

    References
    ----------
    Vardi, Zhang, "The multivariate L1-median and associated data depth", PNAS 2000.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import geometric_median
    >>> geometric_median(torch.tensor([[0.0], [1.0], [1e6]]))
    tensor([1.])
    """
    vectors = _vectors("vectors", vectors, nonfinite)
    integer("max_iter", max_iter, 1)
    tol = rounding(vectors.dtype, at_least("tol", tol, 0.0))
    if start is not None and start.shape != vectors.shape[1:]:
        raise ValueError(f"start must have shape {tuple(vectors.shape[1:])}, got {tuple(start.shape)}")
    points, unit = _in_units(vectors)
    z = coordinate_median(points) if start is None else start.to(points) / unit
    buffer = None if points.requires_grad else torch.empty_like(points)
    for _ in range(max_iter):
        away = torch.sub(points, z, out=buffer)
        distance = torch.linalg.vector_norm(away, dim=1)
        here = distance <= torch.finfo(points.dtype).eps * distance.mean()
        weight = torch.where(here, 0.0, 1 / distance.clamp_min(torch.finfo(points.dtype).tiny))
        if not bool(weight.sum() > 0):
            break  # all vectors are here
        pull = weight @ away  # sum of unit vectors to the others
        share = 1.0
        if bool(here.any()):  # the vectors here hold it back
            share = 1 - min(1.0, float(here.sum() / torch.linalg.vector_norm(pull).clamp_min(1e-300)))
        step = share * pull / weight.sum()
        z = z + step
        if float(torch.linalg.vector_norm(step)) <= tol * float(distance.mean()):
            break
    return z * unit


@widened
def trimmed_mean(vectors: Vectors, n_trim: int, *, nonfinite: NonFinite = "raise") -> Vector:
    """Return the mean of each coordinate without its ``n_trim`` largest and smallest numbers.

    Parameters
    ----------
    vectors : Tensor of shape (n, d)
        What was sent, at least one.
    n_trim : int
        From 0, with some numbers left: less than n / 2.
    nonfinite : {"raise", "drop"}, default="raise"
        What becomes of vectors with NaN or infinity: an error that counts them, or they are left out, and
        count among the ``n_trim``.

    Returns
    -------
    Tensor of shape (d,)
        In the dtype of the vectors.

    Raises
    ------
    ValueError
        For another shape, vectors that are not finite, or a number out of range.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import trimmed_mean
    >>> trimmed_mean(torch.tensor([[0.0], [1.0], [3.0], [1e9]]), 1)
    tensor([2.])
    """
    kept = _vectors("vectors", vectors, nonfinite)
    if 2 * integer("n_trim", n_trim, 0) >= len(vectors):
        raise ValueError(f"n_trim must be less than half of {len(vectors)} vectors, got {n_trim}")
    n_trim -= _dropped(vectors, kept, "n_trim", n_trim)
    return _sorted(kept)[n_trim : len(kept) - n_trim].mean(0)


@widened
def krum(
    vectors: Vectors, n_byzantine: int, n_selected: int = 1, *, nonfinite: NonFinite = "raise"
) -> Vector:
    """Return the mean of the vectors that are nearest to their n - f - 2 nearest others.

    Parameters
    ----------
    vectors : Tensor of shape (n, d)
        What was sent, at least one.
    n_byzantine : int
        f, how many may be anything; from 0 to n - 3. The guarantee of Krum needs n > 2 f + 2.
    n_selected : int, default=1
        How many are averaged, from 1 to n - f.
    nonfinite : {"raise", "drop"}, default="raise"
        What becomes of vectors with NaN or infinity: an error that counts them, or they are left out, and
        count among the ``n_byzantine``.

    Returns
    -------
    Tensor of shape (d,)
        In the dtype of the vectors.

    Raises
    ------
    ValueError
        For another shape, vectors that are not finite, or a number out of range.

    References
    ----------
    Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries", NeurIPS 2017.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import krum
    >>> krum(torch.tensor([[0.0], [1.0], [3.0], [6.0], [1e9]]), n_byzantine=1)
    tensor([1.])
    """
    kept, n = _vectors("vectors", vectors, nonfinite), len(vectors)
    near = n - integer("n_byzantine", n_byzantine, 0) - 2
    _dropped(vectors, kept, "n_byzantine", n_byzantine)
    if near < 1:
        raise ValueError(f"n_byzantine must be at most {n - 3} for {n} vectors, got {n_byzantine}")
    most = min(n - n_byzantine, len(kept))
    if integer("n_selected", n_selected, 1) > most:
        raise ValueError(f"n_selected must be at most {most}, got {n_selected}")
    distance = _distances(_in_units(kept)[0])
    distance.fill_diagonal_(math.inf)
    score = distance.square().sort(dim=1).values[:, : min(near, max(1, len(kept) - 1))].sum(1)
    return kept[score.argsort(stable=True)[:n_selected]].mean(0)


def _distances(x: Tensor) -> Tensor:
    """Return distances between rows, not by dot products: near vectors that are far from 0 would cancel."""
    if x.shape[1] <= LONG or x.requires_grad:
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = x.new_zeros(len(x), len(x))
    for i, j in itertools.combinations(range(len(x)), 2):  # a pair at a time stays in the cache
        distance[i, j] = distance[j, i] = torch.linalg.vector_norm(x[i] - x[j])
    return distance


@widened
def bucketing(
    vectors: Vectors,
    s: int,
    *,
    permutation: Int[Tensor, " n"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "buckets d"]:
    """Return means of s vectors at a time, in random order; the last may be of fewer.

    Parameters
    ----------
    vectors : Tensor of shape (n, d)
        What was sent, at least one.
    s : int
        At least 1: with s = 1 vectors are only put in another order, from s = n on it is their mean.
    permutation : Tensor of shape (n,), optional
        The order; by default drawn.
    generator : torch.Generator, optional
        Draws it.

    Returns
    -------
    Tensor of shape (ceil(n / s), d)
        Means.

    Raises
    ------
    ValueError
        For another shape, s below 1, or an order that is none.

    References
    ----------
    Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import bucketing
    >>> bucketing(torch.tensor([[0.0], [2.0], [5.0]]), 2, permutation=torch.arange(3))
    tensor([[1.],
            [5.]])
    """
    if floating("vectors", vectors).ndim != 2 or len(vectors) == 0:
        raise ValueError(f"vectors must be of shape (n, d) with n at least 1, got {tuple(vectors.shape)}")
    n, d = vectors.shape
    s = min(integer("s", s, 1), n)
    if permutation is None:
        permutation = torch.randperm(n, generator=generator, device=draw_device(generator))
    elif permutation.shape != (n,) or not torch.equal(permutation.sort().values.cpu(), torch.arange(n)):
        raise ValueError(f"permutation must be an order of {n} vectors, got {permutation.tolist()}")
    mixed = vectors[permutation.to(vectors.device)]
    whole = n // s * s
    buckets = mixed[:whole].reshape(n // s, s, d).mean(1)
    return buckets if whole == n else torch.cat([buckets, mixed[whole:].mean(0, keepdim=True)])


def rand_k(
    x: Float[Tensor, "*batch d"], k: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch d"]:
    """Keep k coordinates of each row, drawn without replacement, times d / k: right in the mean.

    Parameters
    ----------
    x : Tensor of shape (..., d)
        Rows.
    k : int
        From 1 to d. The variance is omega = d / k - 1 times the squared length.
    generator : torch.Generator, optional
        Draws it.

    Returns
    -------
    Tensor of shape (..., d)
        0 elsewhere.

    Raises
    ------
    ValueError
        For k out of range.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import rand_k
    >>> kept = rand_k(torch.ones(2, 6), 2)
    >>> (kept != 0).sum(1), kept.max()
    (tensor([2, 2]), tensor(3.))
    """
    if floating("x", x).ndim < 1 or integer("k", k, 1) > x.shape[-1]:
        raise ValueError(
            f"k must be in [1, {x.shape[-1] if x.ndim else 0}] for x of shape {tuple(x.shape)}, got {k}"
        )
    d = x.shape[-1]
    if k == d:
        return x.clone()
    device = draw_device(generator, x.device)
    rank = torch.rand(x.shape, generator=generator, device=device, dtype=torch.float64).to(x.device)
    kept = rank.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept) * (d / k))


@widened
def quantize_l2(
    x: Float[Tensor, "*batch d"], levels: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch d"]:
    """Round each coordinate to one of ``levels`` parts of the row's length, up or down at random: right in the mean.

    Parameters
    ----------
    x : Tensor of shape (..., d)
        Finite.
    levels : int
        At least 1. The variance is at most ``min(d / levels^2, sqrt(d) / levels)`` times the squared length.
    generator : torch.Generator, optional
        Draws it.

    Returns
    -------
    Tensor of shape (..., d)
        Of the same dtype.

    Raises
    ------
    ValueError
        For levels below 1.

    References
    ----------
    Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD", NeurIPS 2017, Section 3.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import quantize_l2
    >>> set(quantize_l2(torch.tensor([3.0, 4.0]), 1).tolist()) <= {0.0, 5.0}
    True
    """
    if floating("x", x).ndim < 1:
        raise ValueError(f"x must be of shape (..., d), got {tuple(x.shape)}")
    integer("levels", levels, 1)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    place = torch.where(length > 0, x.abs() / length, 0.0) * levels
    drawn = torch.rand(x.shape, generator=generator, device=draw_device(generator, x.device)).to(place)
    return x.sign() * length * (place.floor() + (drawn < place.frac())) / levels
