"""Rarity score: how uncommon a generated sample is among real ones, if it still looks real.

Around every real sample r_i lies the ball that reaches to its k-th nearest other real sample,
of radius NN_k(r_i): small where real samples crowd, large where they are few. A sample x has
the radius of the smallest ball that contains it,

    rarity(x) = min { NN_k(r_i) : |x - r_i| < NN_k(r_i) },                       (1)

so that one in a dense region is not called rare because the huge ball of an outlier covers it
too. In no ball it is off the real data and has no score: what is far from everything is not
rare but wrong, which a distance to the data cannot tell apart.

Distances are first looked at in one matrix product of float32, with a bound on its rounding.
What the bound leaves open, a few pairs, is decided by differences in float64.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from posterity._checks import integer, one_of
from posterity._precision import wide

__all__ = ["RarityManifold", "RarityScores", "knn_radii", "rarity_score"]

Features = Float[Tensor, "n d"] | Float[ndarray, "n d"]
Samples = Float[Tensor, "m d"] | Float[ndarray, "m d"]
Distance = Literal["euclidean", "cosine"]
AT_ONCE = 2**17  # numbers of a piece of differences, a megabyte
MORE = 8  # neighbours looked at beyond k


class RarityScores(NamedTuple):
    """Scores of m samples; those in no ball have none.

    Attributes
    ----------
    score : Tensor of shape (m,)
        Radius of the smallest real ball around the sample, NaN outside every ball.
    inside : Tensor of shape (m,), bool
        Whether the sample lies in a ball.
    nearest : Tensor of shape (m,), int64
        Row of the real sample in whose ball it lies, the first among equals; -1 outside.
    """

    score: Float[Tensor, " m"]
    inside: Bool[Tensor, " m"]
    nearest: Int64[Tensor, " m"]

    def mean(self) -> Float[Tensor, ""]:
        """Return the mean score of the samples inside, NaN if there are none."""
        return wide(self.score[self.inside]).mean().to(self.score.dtype)

    def rate(self) -> Float[Tensor, ""]:
        """Return the fraction of samples inside: the improved precision of Kynkäänniemi et al."""
        return wide(self.inside.to(self.score.dtype)).mean().to(self.score.dtype)

    def ranking(self) -> Int64[Tensor, " inside"]:
        """Return the indices of the samples inside, the rarest first."""
        rows = self.inside.nonzero()[:, 0]
        return rows[self.score[rows].argsort(descending=True, stable=True)]


def knn_radii(
    real: Features, k: int = 3, *, metric: Distance = "euclidean", batch_size: int = 1024
) -> Float[Tensor, " n"]:
    """Return the distance from each real sample to its k-th nearest other one.

    Parameters
    ----------
    real : Tensor or array of shape (n, d)
        Features of real samples, floating, finite, n greater than ``k``. A sample is left out of
        its own neighbours by its row, so duplicates are at distance 0 from each other.
    k : int, default=3
        Which neighbour, from 1 to n - 1.
    metric : {"euclidean", "cosine"}, default="euclidean"
        Cosine is 1 minus the cosine of the angle.
    batch_size : int, default=1024
        Rows that are compared with all others at once, at least 1: memory, not the result,
        depends on it.

    Returns
    -------
    Tensor of shape (n,)
        Radii, of the dtype and on the device of ``real``.

    Raises
    ------
    ValueError
        If ``real`` is not of shape (n, d), not floating, not finite, or has at most ``k`` rows;
        if a row is zero with the cosine; or a parameter is out of range.

    References
    ----------
    .. [1] Han, Choi, Choi, Kim, Ha, Choi. Rarity Score: A New Metric to Evaluate the Uncommonness
       of Synthesized Images. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import knn_radii
    >>> knn_radii(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), k=1)
    tensor([1., 1., 2., 4.])
    """
    real = _features("real", real)
    cloud, k = _Cloud(real, one_of("metric", metric, ("euclidean", "cosine"))), integer("k", k, 1)
    _more_than("k", k, real)
    return cloud.lengths(_neighbours(cloud, k, integer("batch_size", batch_size, 1))[:, k - 1])


def rarity_score(
    real: Features,
    samples: Samples,
    k: int = 3,
    *,
    metric: Distance = "euclidean",
    batch_size: int = 1024,
) -> RarityScores:
    """Score samples by the smallest real ball that contains them, equation 1.

    Compare two generators by their scores against one and the same ``real``, in features of one
    extractor, and by the fraction inside: a generator that leaves the data loses samples, not score.

    Parameters
    ----------
    real : Tensor or array of shape (n, d)
        Features of real samples, of any extractor; floating, finite, n greater than ``k``.
    samples : Tensor or array of shape (m, d)
        Features of the samples to score, m at least 1.
    k : int, default=3
        Neighbour that a ball reaches to, at least 1. Balls grow with it, and so does the set inside;
        the score of a sample may fall, when a smaller ball comes to contain it.
    metric : {"euclidean", "cosine"}, default="euclidean"
        Cosine is 1 minus the cosine of the angle.
    batch_size : int, default=1024
        Rows compared at once, at least 1: memory grows with it, the result does not depend on it.

    Returns
    -------
    RarityScores
        ``score``, ``inside`` and ``nearest``, on the device of ``real``, scores in its dtype. They
        have no gradient.

    Raises
    ------
    ValueError
        If features are not of shape (n, d), not floating or not finite, differ in d, or are too
        few; if a row is zero with the cosine; if all radii are 0; or a parameter is out of range.

    Notes
    -----
    1. A sample outside is NaN; the official code writes 0, which a mean takes for a score.
    2. Radii of the cosine are 1 - cos, not negative; the official code has -(1 + cos), of the
       same order and with the same balls.
    3. A sample on the edge of a ball is outside it, decided by differences in float64.

    References
    ----------
    .. [1] Han, Choi, Choi, Kim, Ha, Choi. Rarity Score: A New Metric to Evaluate the Uncommonness
       of Synthesized Images. ICLR 2023. Section 3.
    .. [2] Kynkäänniemi et al. Improved Precision and Recall Metric for Assessing Generative
       Models. NeurIPS 2019. Equations 1 and 2.

    Examples
    --------
    Radii are 1, 1, 2 and 4; 2.5 lies in the balls of 3 and of 7, and 12 in none:

    >>> import torch
    >>> from posterity.generative import rarity_score
    >>> real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> found = rarity_score(real, torch.tensor([[0.5], [2.5], [12.0]]), k=1)
    >>> found.score, found.nearest
    (tensor([1., 2., nan]), tensor([ 0,  2, -1]))
    >>> found.mean(), found.ranking()
    (tensor(1.5000), tensor([1, 0]))
    """
    real = _features("real", real)
    samples = _features("samples", samples, real, metric)  # asked before any work
    return RarityManifold(
        real, k_max=_more_than("k", integer("k", k, 1), real), metric=metric, batch_size=batch_size
    )(samples, k)


class RarityManifold:
    """The balls of one set of real samples, to score many sets of samples with.

    Parameters
    ----------
    real : Tensor or array of shape (n, d)
        Features of real samples, floating, finite, n greater than ``k_max``.
    k_max : int, default=10
        The largest k that may be asked for, at least 1.
    metric : {"euclidean", "cosine"}, default="euclidean"
        Cosine is 1 minus the cosine of the angle.
    batch_size : int, default=1024
        Rows compared at once, at least 1.

    Raises
    ------
    ValueError
        As `rarity_score`; if ``k`` is above ``k_max``.

    References
    ----------
    .. [1] Han, Choi, Choi, Kim, Ha, Choi. Rarity Score: A New Metric to Evaluate the Uncommonness
       of Synthesized Images. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import RarityManifold
    >>> manifold = RarityManifold(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), k_max=2)
    >>> manifold.radii(k=2)
    tensor([3., 2., 3., 6.])
    >>> manifold(torch.tensor([[2.0], [7.0]]), k=1).score
    tensor([2., 4.])
    """

    def __init__(
        self, real: Features, *, k_max: int = 10, metric: Distance = "euclidean", batch_size: int = 1024
    ) -> None:
        real = _features("real", real)
        self.k_max = _more_than("k_max", integer("k_max", k_max, 1), real)
        self.metric = one_of("metric", metric, ("euclidean", "cosine"))
        self.batch_size = integer("batch_size", batch_size, 1)
        self._cloud = _Cloud(real, metric)
        self._squares = _neighbours(self._cloud, self.k_max, self.batch_size)

    def radii(self, k: int = 3) -> Float[Tensor, " n"]:
        """Return the radii of the balls, as `knn_radii`."""
        return self._cloud.lengths(self._squares[:, self._at_most(k) - 1])

    def __call__(self, samples: Samples, k: int = 3) -> RarityScores:
        """Score samples, as `rarity_score`."""
        samples = _features("samples", samples, self._cloud.real, self.metric)
        squares = self._squares[:, self._at_most(k) - 1]
        _some_ball(squares)
        home = _smallest_balls(self._cloud, squares, samples, self.batch_size)
        inside = home >= 0
        score = self._cloud.lengths(squares)[home.clamp_min(0)].where(
            inside.to(self._cloud.real.device), math.nan
        )
        return RarityScores(score, inside.to(score.device), home.to(score.device))

    def _at_most(self, k: int) -> int:
        if integer("k", k, 1) > self.k_max:
            raise ValueError(f"k must be at most k_max={self.k_max}, got {k}")
        return k


def _features(name: str, value: Features, real: Tensor | None = None, metric: str = "euclidean") -> Tensor:
    """Return features as a tensor of no gradient, on the device of the real ones; refuse what are none."""
    if isinstance(value, ndarray) and value.dtype.kind == "f":
        kind = np.float64 if value.dtype.itemsize > 8 else value.dtype.newbyteorder("=")
        value = torch.from_numpy(np.array(value, dtype=kind, order="C"))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = f"dtype {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise ValueError(f"{name} must be floating-point features of shape (n, d), got {came}")
    value, shape = value.detach(), tuple(value.shape)
    if value.ndim != 2:
        raise ValueError(
            f"{name} must be features of shape (n, d), got {shape}: pass images through an extractor first"
        )
    if 0 in shape:
        raise ValueError(f"{name} must have at least one row and one feature, got shape {shape}")
    if real is not None and value.shape[1] != real.shape[1]:
        raise ValueError(f"{name} must have the {real.shape[1]} features of real, got {value.shape[1]}")
    if not all(math.isfinite(end) for end in value.aminmax()):
        bad = ~torch.isfinite(value).all(1)
        raise ValueError(f"{name} must be finite, row {int(bad.nonzero()[0])} has NaN or infinity")
    if metric == "cosine":
        _not_zero(name, value)
    return value if real is None else value.to(real.device)


def _not_zero(name: str, value: Tensor) -> None:
    zero = (value == 0).all(1)
    if bool(zero.any()):
        raise ValueError(f"{name} must have no zero row for the cosine, row {int(zero.nonzero()[0])} is")


def _more_than(name: str, k: int, real: Tensor) -> int:
    if len(real) <= k:
        raise ValueError(f"real must have more rows than {name}={k}, got {len(real)}")
    return k


def _some_ball(squares: Tensor) -> None:
    if not bool(squares.any()):
        raise ValueError("real must have samples that differ: all radii are 0, every sample is a duplicate")


class _Cloud:
    """Real features for exact distances, and centred for a first look by a matrix product.

    Everything is scaled by a power of two, without rounding, so that no square overflows. For two
    rows a and b of the first look, with squares A and B,

        | |a - b|^2 - (A + B - 2 a.b) | <= error (A' + B'),   A' = A + what may underflow,

    in whatever order the product sums.
    """

    def __init__(self, real: Tensor, metric: str) -> None:
        self.real, self.metric = real, metric
        if metric == "cosine":
            _not_zero("real", real)
        exact = self._precise(real)
        exponent = (
            math.frexp(max(abs(float(end)) for end in exact.aminmax()))[1] if metric == "euclidean" else 0
        )
        self.unit = 2.0 ** min(max(exponent, -1000), 1000)  # which, and whose inverse, float64 has
        self.exact = exact / self.unit
        self.centre = self.exact.mean(0)
        self.dtype = torch.float32 if _float32_products() else torch.float64
        rounding = torch.finfo(self.dtype).eps / 2
        self.error = (real.shape[1] + 32) * rounding
        self.lost = 32 * torch.finfo(self.dtype).tiny / rounding
        self.rows, self.square, self.size = self.look(self.exact)

    def _precise(self, features: Tensor) -> Tensor:
        """Return features in float64, of length 1 for the cosine, where the device has float64."""
        x = features.to("cpu" if features.device.type == "mps" else features.device).double()
        if self.metric == "cosine":
            x = x / x.abs().amax(1, keepdim=True)
            x = x / x.square().sum(1, keepdim=True).sqrt()
        return x

    def place(self, samples: Tensor) -> Tensor:
        """Return samples in the units of the cloud."""
        return self._precise(samples) / self.unit

    def look(self, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows for the first look, their squares, and those that the error grows with."""
        rows = (exact - self.centre).to(self.dtype)
        square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return rows, square.to(self.dtype), (square + self.lost).to(self.dtype)

    def between(self, x: Tensor, x_rows: Tensor, real_rows: Tensor) -> Tensor:
        """Return squared distances of pairs by their differences."""
        piece = max(1, AT_ONCE // x.shape[1])
        parts = [
            (x[i] - self.exact[j]).square().sum(1)
            for i, j in zip(x_rows.split(piece), real_rows.split(piece), strict=True)
        ]
        return torch.cat(parts)

    def distances(self, squares: Tensor) -> Tensor:
        """Return the distances of squares, in units of the cloud."""
        return squares / 2 if self.metric == "cosine" else squares.sqrt()  # |u - v|^2 = 2 (1 - cos)

    def lengths(self, squares: Tensor) -> Tensor:
        """Return the distances of squares, in the units, dtype and device of the real features."""
        return (self.distances(squares) * self.unit).to(self.real)


def _float32_products() -> bool:
    """Return whether products of float32 are that: a user may have let them be rounded to 10 bits or fewer."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by backend
        return False


def _beside(x: Tensor, column: Tensor | float) -> Tensor:
    """Return rows with one more column."""
    return torch.cat([x, torch.as_tensor(column, dtype=x.dtype, device=x.device).expand(len(x))[:, None]], 1)


class _Products:
    """Products x y' of float32, whose memory is used again."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        shape, kept = (len(x), len(y)), self._kept
        if kept is None or kept.numel() < len(x) * len(y):
            kept = self._kept = x.new_empty(len(x) * len(y))
        with torch.autocast(x.device.type, enabled=False):
            return torch.mm(x, y.T, out=kept[: len(x) * len(y)].view(shape))


def _neighbours(cloud: _Cloud, k: int, batch_size: int) -> Tensor:
    """Return the squared distances of each real sample to its k nearest others, ascending."""
    found, n, products = [], len(cloud.rows), _Products()
    width = 2 * cloud.error * cloud.size
    y = _beside(-2 * cloud.rows, cloud.square - cloud.error * cloud.size)
    for rows in torch.arange(n, device=y.device).split(batch_size):
        low = products(_beside(cloud.rows[rows], 1.0), y)  # |a - b|^2 is at least low + A's share
        low[torch.arange(len(rows), device=rows.device), rows] = math.inf
        value, index = low.topk(min(k + MORE, n), dim=1, largest=False)
        limit = (value + width[index])[:, :k].amax(1) + width[rows]  # k neighbours are at most this far
        if bool((value[:, -1] <= limit).any()):  # there may be yet more as near
            i, j = (low <= limit[:, None]).nonzero(as_tuple=True)
        else:
            i, place = (value <= limit[:, None]).nonzero(as_tuple=True)
            j = index[i, place]
        count = torch.bincount(i, minlength=len(rows))
        place = torch.arange(len(i), device=i.device) - (count.cumsum(0) - count)[i]
        squares = torch.full((len(rows), int(count.max())), math.inf, dtype=torch.float64, device=i.device)
        squares[i, place] = cloud.between(cloud.exact, rows[i], j)
        found.append(squares.topk(k, dim=1, largest=False, sorted=True).values)
    return torch.cat(found)


def _smallest_balls(cloud: _Cloud, squares: Tensor, samples: Tensor, batch_size: int) -> Tensor:
    """Return for each sample the real sample with the smallest ball around it, -1 where there is none.

    Balls come in order of their radius, and a sample that was found one sees no more of them.
    """
    order = squares.argsort(stable=True)
    order = order[squares[order] > 0]
    radius = squares[order].to(cloud.dtype)
    square, size = cloud.square[order], cloud.size[order]
    slack = 4 * torch.finfo(cloud.dtype).eps * radius  # rounding of the radius itself
    reach = radius + slack - square + cloud.error * size
    gap = 2 * cloud.error * size + 2 * slack
    y, products = _beside(2 * cloud.rows[order], reach), _Products()
    home = torch.full((len(samples),), -1, device=order.device)
    # a ball reaches at most twice the largest norm from its centre: beyond, squares need not be formed
    span = cloud.exact - cloud.centre
    far = 4 * float(span.square().sum(1).max().sqrt())
    for start in range(0, len(samples), batch_size):
        exact = cloud.place(samples[start : start + batch_size])
        alive = ((exact - cloud.centre).abs().amax(1) <= far).nonzero()[:, 0]
        x, x_square, x_size = cloud.look(exact[alive])
        x = _beside(x, 1.0)
        for first in range(0, len(order), batch_size):
            if not len(alive):
                break
            part = slice(first, first + batch_size)
            margin = products(x, y[part])  # r^2 - |a - b|^2 is at most margin - A's share
            maybe = margin > (x_square - cloud.error * x_size)[:, None]
            some = maybe.any(1).nonzero()[:, 0]
            if not len(some):
                continue
            sure = margin[some] > (x_square + cloud.error * x_size)[some, None] + gap[part]
            none = sure.shape[1]
            best = torch.where(sure.any(1), sure.byte().argmax(1), none)
            columns = torch.arange(none, device=best.device)
            i, j = (maybe[some] & (columns < best[:, None])).nonzero(as_tuple=True)
            ball = order[part][j]
            within = cloud.between(exact, alive[some[i]], ball) < squares[ball]
            best.scatter_reduce_(0, i[within], j[within], "amin")
            hit = best < none
            home[start + alive[some[hit]]] = order[part][best[hit]]
            left = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
            left[some[hit]] = False
            alive, x, x_square, x_size = alive[left], x[left], x_square[left], x_size[left]
    return home
