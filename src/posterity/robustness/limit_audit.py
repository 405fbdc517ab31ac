"""How near a classifier of yours is to the universal limit: what a plain search moves out of its classes.

On uniform random images, each one is moved towards one of another class, values in random order until
the label changes, and then back as far as the label allows. What is found is a perturbation, so the
share that can be moved is at least so large; what is not found proves nothing. Beside it stands what
`robust_fraction_bound` says of every classifier.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.stats import beta
from sklearn.utils import check_random_state

from posterity._checks import at_least, integer
from posterity.robustness.robustness_limits import _space, norm_order, robust_fraction_bound

__all__ = ["ClassLimit", "LimitReport", "audit_classifier"]

PARTS = 64  # in which changes are taken back, and images that are asked for at a time


@dataclass(frozen=True)
class ClassLimit:
    """What was found of one class.

    Attributes
    ----------
    label : int
    share : float
        Of the random images.
    n_images : int
        How many of them.
    movable : float
        Share of these for which a perturbation within the size was found.
    interval : tuple of float
        Clopper-Pearson, 95 %, of the share for which the search finds one.
    limit : float
        Least share that can be moved, for any classifier with such a class; 0 for more than half of all
        images, of which nothing is known.
    """

    label: int
    share: float
    n_images: int
    movable: float
    interval: tuple[float, float]
    limit: float


@dataclass(frozen=True)
class LimitReport:
    """A classifier beside the limit of all classifiers.

    Attributes
    ----------
    classes : list of ClassLimit
        By share, the largest first.
    size, p : float
        Of the perturbation.
    note : str
        How to read it.
    """

    classes: list[ClassLimit]
    size: float
    p: float
    note: str


def audit_classifier(
    predict: Callable[[ndarray], Any],
    n: int,
    *,
    channels: int = 1,
    bit_depth: int = 1,
    p: float = 0,
    size: float,
    n_images: int = 500,
    n_probes: int = 64,
    random_state: Any = None,
) -> LimitReport:
    """Return how much of each class a search moves out, beside what can be moved out of any.

    Parameters
    ----------
    predict : callable
        ``predict(x (k, channels, n, n)) -> labels (k,)``, integers, for float64 values in [0, 1].
    n, channels, bit_depth : int
        Of the images, as for `robust_fraction_bound`.
    p, size : float
        Of the perturbation.
    n_images : int, default=500
        Uniform random images that are moved.
    n_probes : int, default=64
        Random images among which each looks for the nearest one of another class.
    random_state : int, RandomState or None, default=None
        Draws them.

    Returns
    -------
    LimitReport
        It never says that the limit is violated: shares are of samples, and a search may miss.

    Raises
    ------
    ValueError
        If a number is out of range, or ``predict`` returns something else.

    References
    ----------
    .. [1] Dai, Gifford. Fundamental Limits on the Robustness of Image Classifiers. ICLR 2023.

    Examples
    --------
    >>> from posterity.robustness import MajorityClass, audit_classifier
    >>> report = audit_classifier(MajorityClass(8).predict, 8, size=12, n_images=100, random_state=0)
    >>> bool(report.classes[-1].movable >= 0.9)
    True
    """
    N = _space(n, channels, bit_depth, p)
    norm_order(p)
    at_least("size", size, 0)
    integer("n_images", n_images, 1)
    integer("n_probes", n_probes, 1)
    draw, top = check_random_state(random_state), 2.0**bit_depth - 1

    def random_images(count: int) -> ndarray:
        return np.floor(draw.uniform(size=(count, N)) * (top + 1)).clip(0, top) / top

    def label(x: ndarray) -> ndarray:
        try:
            found = np.asarray(predict(x.reshape(len(x), channels, n, n)))
        except (AttributeError, TypeError) as error:  # as of a network that wants tensors
            raise ValueError(
                f"predict must take arrays of float64, here {(len(x), channels, n, n)}: {error}"
            ) from error
        if found.shape != (len(x),) or found.dtype.kind not in "iub":
            raise ValueError(
                f"predict must return {len(x)} integer labels for as many images, got {found.dtype} {found.shape}"
            )
        return found.astype(np.int64)

    x, probes = random_images(n_images), random_images(n_probes)
    y, classes_of = label(x), label(probes)
    best = _nearest_probe(x, y, probes, classes_of, p)
    moved = np.flatnonzero(best >= 0)
    distance = np.full(n_images, np.inf)
    if len(moved):
        found = _pulled_back(x[moved], y[moved], probes[best[moved]], label, p, top, draw)
        distance[moved] = _size(found - x[moved], p)
    rows = []
    for name, count in sorted(zip(*np.unique(y, return_counts=True), strict=True), key=lambda each: -each[1]):
        hits, share = int((distance[y == name] <= size * (1 + 1e-12)).sum()), count / n_images
        low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
        high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
        limit = 0.0
        if share <= 0.5:
            bound = robust_fraction_bound(
                size, n, channels=channels, bit_depth=bit_depth, p=p, class_fraction=float(share)
            )
            limit = 1 - bound
        rows.append(ClassLimit(int(name), float(share), int(count), float(hits / count), (low, high), limit))
    return LimitReport(rows, float(size), float(p), _note(rows))


def _note(rows: list[ClassLimit]) -> str:
    said = "Every image counts alike here, noise among it; photographs are a vanishing part."
    if len(rows) == 1:
        return f"One class holds all random images: nothing can be said of the others. {said}"
    if any(row.movable < row.limit for row in rows):
        said += " Where less was moved than the limit says, the attack is weaker than the limit: it is no violation."
    return said


def _size(d: ndarray, p: float) -> ndarray:
    """Return the size of each row of differences."""
    d = np.abs(d)
    if p == 0:
        return (d > 1e-12).sum(1).astype(float)
    if math.isinf(p):
        return d.max(1)
    total = (d**p).sum(1)
    return total if p < 1 else total ** (1 / p)


def _nearest_probe(x: ndarray, y: ndarray, probes: ndarray, classes: ndarray, p: float) -> ndarray:
    """Return for each image the nearest probe of another class, -1 where there is none."""
    best, least = np.full(len(x), -1), np.full(len(x), np.inf)
    for k, probe in enumerate(probes):
        size = np.where(classes[k] == y, np.inf, _size(probe - x, p))
        best, least = np.where(size < least, k, best), np.minimum(size, least)
    return best


def _pulled_back(
    x: ndarray,
    y: ndarray,
    other: ndarray,
    label: Callable[[ndarray], ndarray],
    p: float,
    top: float,
    draw: Any,
) -> ndarray:
    """Return images of another class than y, as near to x as the search gets."""
    rank = draw.uniform(size=x.shape).argsort(1).argsort(1)
    # the least number of changes in this order at which the label was seen to differ
    few, many = np.zeros(len(x), dtype=int), np.full(len(x), x.shape[1])
    while (many - few > 1).any():
        middle = (few + many) // 2
        left = label(np.where(rank < middle[:, None], other, x)) != y
        few, many = np.where(left, few, middle), np.where(left, middle, many)
    found = np.where(rank < many[:, None], other, x)
    for part in np.array_split(draw.permutation(x.shape[1]), min(PARTS, x.shape[1])):
        tried = found.copy()
        tried[:, part] = x[:, part]
        found = np.where((label(tried) != y)[:, None], tried, found)
    if top > 1 and p > 0:  # values may go a part of the way
        low, high = np.zeros(len(x)), np.ones(len(x))
        for _ in range(math.ceil(math.log2(top + 1)) + 1):
            middle = (low + high) / 2
            left = label(np.round((x + middle[:, None] * (found - x)) * top) / top) != y
            low, high = np.where(left, low, middle), np.where(left, middle, high)
        nearer = np.round((x + high[:, None] * (found - x)) * top) / top
        nearer = np.where((label(nearer) != y)[:, None], nearer, found)
        found = np.where((_size(nearer - x, p) < _size(found - x, p))[:, None], nearer, found)
    return found
