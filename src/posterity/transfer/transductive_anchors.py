"""Differences and anchors: which training point lets a query be reached by a step that was seen.

A query x is x' + (x - x') for every training point x', its anchor. The difference x - x' is as good as seen
where it is near one between two training points, so that the anchor is

    argmin over x' of  min over pairs (i, j) of  | (x - x') - (x_j - x_i) | ,                          (1)

and the minimum says how far the step is from all that were seen. Training points of an interval of width w
differ by at most w: nothing beyond one further w is x' plus a step that was seen, and the minimum then grows
as the distance from there.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.spatial import cKDTree
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer
from posterity._random import draw_device

__all__ = ["pairwise_deltas", "select_anchors"]

TREE = 15  # columns up to which a k-d tree is quicker than all distances
PROBES = 64  # differences of a query that are looked up first


def pairwise_deltas(
    x: Float[Tensor, "n d"] | Float[ndarray, "n d"],
    n_deltas: int | None = None,
    *,
    groups: Any = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "m d"]:
    """Return differences x_j - x_i of pairs of points.

    Parameters
    ----------
    x : Tensor or ndarray of shape (n, d)
        Points, at least one.
    n_deltas : int, optional
        How many pairs to draw, uniformly from all ordered pairs, i = j among them, with repeats: at least 1.
        None takes every pair once, n * n of them, the first point with all, then the second.
    groups : sequence of n labels, optional
        Pairs are then of one group: i is uniform, j uniform in its group.
    generator : torch.Generator, optional
        Draws the pairs; torch's own where it is None.

    Returns
    -------
    Tensor of shape (m, d)
        In the dtype of ``x`` and on its device.

    Raises
    ------
    ValueError
        If ``x`` is no floating-point matrix with rows, ``n_deltas`` less than 1, or ``groups`` has not n labels.

    References
    ----------
    .. [1] Netanyahu, Gupta, Simchowitz, Zhang, Agrawal. Learning to Extrapolate: A Transductive Approach.
       ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import pairwise_deltas
    >>> x = torch.tensor([[0.0], [1.0], [5.0]])
    >>> pairwise_deltas(x).T
    tensor([[ 0.,  1.,  5., -1.,  0.,  4., -5., -4.,  0.]])
    >>> pairwise_deltas(x, groups=["a", "a", "b"]).T
    tensor([[ 0.,  1., -1.,  0.,  0.]])
    """
    x = _points("x", x)
    codes = None if groups is None else np.unique(_labels("groups", groups, len(x)), return_inverse=True)[1]
    if n_deltas is not None:
        i, j = _Pairs(len(x), codes, generator, x.device).draw(integer("n_deltas", n_deltas, 1))
    elif codes is None:
        return (x[None] - x[:, None]).flatten(0, 1)
    else:
        i, j = (torch.from_numpy(side).to(x.device) for side in np.nonzero(codes[:, None] == codes))
    return x[j] - x[i]


def select_anchors(
    x: Float[Tensor, "n d"] | Float[ndarray, "n d"],
    x_train: Float[Tensor, "n_train d"] | Float[ndarray, "n_train d"],
    deltas: Float[Tensor, "m d"] | Float[ndarray, "m d"],
    *,
    n_anchors: int = 1,
    radius: float | None = None,
    groups: Any = None,
    groups_train: Any = None,
    chunk_size: int = 4096,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "n n_anchors"]:
    """Return for each query the training points from which it differs as they do among each other.

    Parameters
    ----------
    x, x_train : Tensor or ndarray of shape (n, d), (n_train, d)
        Queries and training points.
    deltas : Tensor or ndarray of shape (m, d)
        Training differences, at least one, as of `pairwise_deltas`.
    n_anchors : int, default=1
        How many, at least 1 and at most the training points (of a query's group).
    radius : float, optional
        Positive. Anchors are then drawn uniformly from all whose difference is at most so far from one of
        ``deltas``; a query that has fewer than ``n_anchors`` of these gets the nearest.
    groups, groups_train : sequence of n and n_train labels, optional
        Both or none: anchors are then of the query's group.
    chunk_size : int, default=4096
        Differences that are compared at a time, at least 1; decides memory, not the result.
    generator : torch.Generator, optional
        Draws what ``radius`` leaves open; torch's own where it is None.

    Returns
    -------
    Tensor of shape (n, n_anchors), int64
        Rows of ``x_train``, those of the nearest differences first, among equals the lowest; in the order of
        drawing where ``radius`` lets them be drawn.

    Raises
    ------
    ValueError
        If an argument does not fit, or points are not finite.

    Notes
    -----
    Up to 15 columns ``scipy.spatial.cKDTree`` finds the nearest difference, beyond them blocks of distances do.

    References
    ----------
    .. [1] Netanyahu, Gupta, Simchowitz, Zhang, Agrawal. Learning to Extrapolate: A Transductive Approach.
       ICLR 2023.

    Examples
    --------
    Steps of 0 and 1 were seen: 3 is reached from 2, and 1 from itself, then from 0.

    >>> import torch
    >>> from posterity.transfer import select_anchors
    >>> x_train, deltas = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    >>> select_anchors(torch.tensor([[3.0]]), x_train, deltas)
    tensor([[2]])
    >>> select_anchors(torch.tensor([[1.0]]), x_train, deltas, n_anchors=2)
    tensor([[0, 1]])
    """
    if (groups is None) != (groups_train is None):
        raise ValueError("groups and groups_train must both be given, or none, got one of them")
    search = _Search(_points("x_train", x_train), _points("deltas", deltas), groups_train, chunk_size)
    return search.nearest(_points("x", x, 0), n_anchors, radius, groups, generator)[0]


class _Pairs:
    """Draws ordered pairs of n points, of one group where codes are given, two calls a draw."""

    def __init__(
        self,
        n: int,
        codes: ndarray | None,
        generator: torch.Generator | None,
        device: torch.device | None = None,
    ) -> None:
        self.n, self.generator, self.device = n, generator, device
        self.on = draw_device(generator)
        self.order: Tensor | None = None
        if codes is not None:  # points of a group are neighbours in `order`, from `begin` on
            counts = np.bincount(codes)
            begin = np.cumsum(counts) - counts
            places = np.argsort(codes, kind="stable"), begin[codes], counts[codes]
            self.order, self.begin, self.count = (torch.from_numpy(each).to(self.on) for each in places)

    def draw(self, m: int) -> tuple[Tensor, Tensor]:
        """Return the first and the second points of m pairs."""
        i = torch.randint(self.n, (m,), generator=self.generator, device=self.on)
        if self.order is None:
            j = torch.randint(self.n, (m,), generator=self.generator, device=self.on)
        else:
            place = torch.randint(2**62, (m,), generator=self.generator, device=self.on)
            j = self.order[self.begin[i] + place % self.count[i]]
        return i.to(self.device), j.to(self.device)


class _Search:
    """Training points and differences, prepared once for any number of queries."""

    def __init__(self, x_train: Tensor, deltas: Tensor, labels: Any = None, chunk_size: int = 4096) -> None:
        has_shape("deltas", deltas, (None, x_train.shape[1]), "x_train")
        _same_dtype("deltas", deltas, x_train)
        if not len(deltas):
            raise ValueError("deltas must have at least one row, got none")
        self.x_train, self.chunk = x_train, integer("chunk_size", chunk_size, 1)
        self.labels = None if labels is None else _labels("groups_train", labels, len(x_train))
        # squares must neither overflow nor vanish; a power of two leaves every digit as it is
        largest = max(float(finite(name, each).detach().abs().amax())
                      for name, each in (("x_train", x_train), ("deltas", deltas)))  # fmt: skip
        self.unit = float(2.0 ** np.clip(np.frexp(largest)[1], -1000, 1000)) if largest else 1.0
        self.deltas = deltas.detach().to(_exact(deltas)) / self.unit
        self.tree: Any = cKDTree(self.deltas.cpu().numpy()) if deltas.shape[1] <= TREE else None

    def nearest(
        self, x: Tensor, n_anchors: int = 1, radius: float | None = None, groups: Any = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return anchors of queries, and the distance of each of their differences from those of training."""
        x_train, n_train = self.x_train, len(self.x_train)
        has_shape("x", x, (None, x_train.shape[1]), "x_train")
        _same_dtype("x", x, x_train)
        if integer("n_anchors", n_anchors, 1) > n_train:
            raise ValueError(f"n_anchors must be at most the {n_train} rows of x_train, got {n_anchors}")
        if radius is not None:
            at_least("radius", radius, 0, strict=True)
        allowed = self._allowed(groups, len(x), n_anchors)
        finite("x", x)
        draws = None
        if radius is not None:  # by rows, so that chunks do not change what is drawn
            seed = torch.randint(2**62, (), generator=generator, device=draw_device(generator))
            draws = np.random.default_rng(int(seed))
        found, far = np.empty((len(x), n_anchors), np.int64), np.empty((len(x), n_anchors))
        step = max(1, self.chunk // n_train)
        for begin in range(0, len(x), step):
            rows = slice(begin, begin + step)
            distance = self._distances(x[rows], None if allowed is None else allowed(rows), n_anchors, radius)
            if n_anchors == 1:
                order = distance.argmin(1)[:, None]
            else:
                order = distance.argsort(1, kind="stable")[:, :n_anchors]
            if draws is not None:
                for k, row in enumerate(distance):
                    near = np.flatnonzero(row <= radius)
                    if len(near) >= n_anchors:
                        order[k] = draws.choice(near, n_anchors, replace=False)
            found[rows], far[rows] = order, np.take_along_axis(distance, order, 1)
        return torch.from_numpy(found).to(x.device), torch.from_numpy(far)

    def _distances(self, x: Tensor, allowed: ndarray | None, n_anchors: int, radius: float | None) -> ndarray:
        """Return how far each query's difference from each training point is from the nearest seen.

        Infinite for those that are not allowed, and may be for those that cannot be chosen.
        """
        # in the dtype of the points, as the training differences were: what was seen is then at 0 exactly
        steps = x.detach()[:, None] - self.x_train.detach()
        steps = finite("x minus x_train", steps).to(self.deltas) / self.unit
        least = np.full(steps.shape[:2], np.inf)
        if self.tree is not None:
            reach = 0.0 if radius is None else radius / self.unit
            for k, own in enumerate(steps.cpu().numpy()):
                some = slice(None) if allowed is None else allowed[k]
                least[k, some] = self._by_tree(own[some], n_anchors, reach)
        else:
            flat = [self._by_blocks(some) for some in steps.flatten(0, 1).split(self.chunk)]
            least.flat[:] = torch.cat(flat).cpu()
            if allowed is not None:
                least[~allowed] = np.inf
        return least * self.unit

    def _by_blocks(self, steps: Tensor) -> Tensor:
        """Return distances of differences, from a running minimum over blocks of those of training."""
        best, place = torch.full_like(steps[:, 0], torch.inf), torch.zeros_like(steps[:, 0], dtype=torch.long)
        for begin in range(0, len(self.deltas), self.chunk):
            some = self.deltas[begin : begin + self.chunk]
            # half the square of the distance, but for that of the step
            score, at = torch.addmm(some.square().sum(1) / 2, steps, some.mT, alpha=-1).min(1)
            place = torch.where(score < best, at + begin, place)
            best = best.minimum(score)
        return torch.linalg.vector_norm(
            steps - self.deltas[place], dim=1
        )  # the product cancels where it is 0

    def _by_tree(self, steps: ndarray, n_anchors: int, reach: float) -> ndarray:
        """Return distances of one query's differences; a few say beyond which the others need no search."""
        probes = steps[:: max(1, len(steps) // max(PROBES, 2 * n_anchors))]
        enough = np.partition(self.tree.query(probes)[0], n_anchors - 1)[n_anchors - 1]
        bound = max(float(enough), reach) * (1 + 1e-9) + 1e-150  # what is as near as that is found too
        return self.tree.query(steps, distance_upper_bound=bound)[0]

    def _allowed(self, groups: Any, n: int, n_anchors: int) -> Any:
        """Return what says of a slice of the queries which anchors are of their groups."""
        if groups is None:
            return None
        labels = _labels("groups", groups, n)
        for label in np.unique(labels):
            count = int((self.labels == label).sum())
            if not count:
                raise ValueError(f"groups must be among those of training, got {label!r}, which is not")
            if count < n_anchors:
                raise ValueError(
                    f"n_anchors must be at most the {count} rows of group {label!r}, got {n_anchors}"
                )
        return lambda rows: labels[rows, None] == self.labels


def _points(name: str, value: Any, least: int = 1) -> Tensor:
    """Return a matrix with columns, and at least so many rows, as a tensor."""
    if isinstance(value, ndarray) and value.dtype in (np.float16, np.float32, np.float64):
        value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    elif isinstance(value, ndarray):
        raise ValueError(f"{name} must be of a floating-point dtype, got an array of {value.dtype}")
    value = has_shape(name, floating(name, value), (None, None))
    if len(value) < least or not value.shape[1]:
        raise ValueError(f"{name} must have rows and columns, got shape {tuple(value.shape)}")
    return value


def _labels(name: str, value: Any, n: int) -> ndarray:
    """Return n labels, one a row."""
    labels = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if labels.shape != (n,):
        raise ValueError(f"{name} must have a label for each of {n} rows, got shape {labels.shape}")
    return labels.astype(str) if labels.dtype == object else labels


def _same_dtype(name: str, value: Tensor, x_train: Tensor) -> None:
    if value.dtype != x_train.dtype or value.device != x_train.device:
        raise ValueError(
            f"{name} must have the dtype and device of x_train, {x_train.dtype} on {x_train.device}, "
            f"got {value.dtype} on {value.device}"
        )


def _exact(x: Tensor) -> torch.dtype:
    """Return the dtype in which distances are compared: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
