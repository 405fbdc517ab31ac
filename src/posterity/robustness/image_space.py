"""Small spaces of images, all of them: exact distances to the next class, and a class that is as robust as can be.

The Hamming distance of every image to the nearest one of another class comes axis by axis: with d
= 0 outside the class and infinity inside, each axis in turn does

    d <- min(d, min over the axis of d, plus 1),                                            (1)

after which d counts the values that must change. So whatever a bound says of all classifiers can be
checked on any one of them, with nothing left out.
"""

import math

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.stats import binom

from posterity._checks import at_least, integer
from posterity.robustness.robustness_limits import changes_within, norm_order

__all__ = ["MajorityClass", "boundary_distance", "robust_profile"]

MOST = 2**22  # images that are enumerated


def boundary_distance(labels: ArrayLike, *, levels: int = 2) -> Int64[ndarray, " images"]:
    """Return for every image how many values must change to reach another class.

    Parameters
    ----------
    labels : array_like of shape (levels**N,), integer
        The class of each image of N values; image i has the digits of i to the base ``levels``, the first
        value the most significant (``np.unravel_index``). Two classes at least.
    levels : int, default=2
        Values that a pixel may take.

    Returns
    -------
    ndarray of shape (levels**N,), int64
        From 1 to N.

    Raises
    ------
    ValueError
        If the length is no power of ``levels`` or beyond 2^22, or there is one class only.

    Examples
    --------
    >>> from posterity.robustness import boundary_distance
    >>> boundary_distance([0, 0, 0, 1])  # images 00, 01, 10, 11
    array([2, 1, 1, 1])
    """
    codes, N, count = _codes(labels, levels)
    distance = np.zeros(len(codes), dtype=np.uint8)
    first = N // 2
    for k in range(count):
        own = codes == k
        d = np.where(own, np.uint8(N + 1), np.uint8(0))
        # the later values are made the first ones for their axes, so that memory is read in long rows
        d = _along(d, levels, first).reshape(levels**first, -1).T
        d = _along(d, levels, N - first).reshape(levels ** (N - first), -1).T.ravel()
        distance[own] = d[own]
    return distance.astype(np.int64)


def _along(d: ndarray, levels: int, axes: int) -> ndarray:
    """Return what (1) makes of distances along the first axes."""
    d = np.ascontiguousarray(d).reshape(-1)
    for axis in range(axes):
        view = d.reshape(levels**axis, levels, -1)
        least = view.min(axis=1, keepdims=True)
        least += np.uint8(1)
        np.minimum(view, least, out=view)
    return d


def robust_profile(labels: ArrayLike, *, levels: int = 2) -> dict[int, Float64[ndarray, " sizes"]]:
    """Return for each class the exact share of it that is robust against t changed values, t = 0..N.

    Parameters
    ----------
    labels, levels
        As for `boundary_distance`.

    Returns
    -------
    dict of int to ndarray of shape (N + 1,)
        Share of the class at a distance beyond t from all others.

    Examples
    --------
    >>> from posterity.robustness import robust_profile
    >>> robust_profile([0, 0, 0, 1])
    {0: array([1.        , 0.33333333, 0.        ]), 1: array([1., 0., 0.])}
    """
    distance = boundary_distance(labels, levels=levels)
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    N = _values(len(codes), levels)
    profile = {}
    for k, name in enumerate(names):
        counts = np.bincount(distance[codes == k], minlength=N + 1)
        profile[int(name)] = 1 - counts.cumsum() / counts.sum()
    return profile


def _values(length: int, levels: int) -> int:
    """Return N of levels^N, or -1."""
    N = round(math.log(length, levels)) if length else 0
    return N if levels**N == length and N >= 1 else -1


def _codes(labels: ArrayLike, levels: int) -> tuple[ndarray, int, int]:
    """Return classes as 0, 1, .., how many values an image has, and how many classes there are."""
    integer("levels", levels, 2)
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(f"labels must be integers of shape (levels**N,), got {array.dtype} {array.shape}")
    if len(array) > MOST:
        raise ValueError(
            f"labels must be of at most {MOST:,} images, that many can be enumerated, got {len(array):,}"
        )
    N = _values(len(array), levels)
    if N < 0:
        raise ValueError(f"labels must have a length that is a power of levels={levels}, got {len(array)}")
    low, high = int(array.min()), int(array.max())
    if low == high:
        raise ValueError(f"labels must hold two classes at least, got {low} alone")
    if high - low < 256:  # without sorting
        present = np.bincount((array - low).astype(np.intp)) > 0
        return (present.cumsum() - 1)[array - low], N, int(present.sum())
    names, codes = np.unique(array, return_inverse=True)
    return codes, N, len(names)


class MajorityClass:
    """The classifier that asks whether most values are bright: no class of its size is more robust, in order.

    Class 0 holds the images with at most floor((N - 1) / 2) values of 1/2 or more. With one bit and
    an odd number of values it reaches bound (1) of `robust_fraction_bound` at every size.

    Parameters
    ----------
    n : int
        Pixels in a row.
    channels : int, default=1
        Values of a pixel.
    bit_depth : int, default=1
        Bits of a value.

    Raises
    ------
    ValueError
        If a number is below 1.

    References
    ----------
    .. [1] Dai, Gifford. Fundamental Limits on the Robustness of Image Classifiers. ICLR 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.robustness import MajorityClass
    >>> majority = MajorityClass(3)
    >>> dark = np.zeros((1, 9))
    >>> majority.predict(dark), majority.distance(dark, p=0), majority.distance(dark, p=2)
    (array([0]), array([5.]), array([2.23606798]))
    """

    def __init__(self, n: int, *, channels: int = 1, bit_depth: int = 1) -> None:
        self.n, self.channels = integer("n", n, 1), integer("channels", channels, 1)
        self.bit_depth = integer("bit_depth", bit_depth, 1)
        if bit_depth > 32:
            raise ValueError(f"bit_depth must be an integer from 1 to 32, got {bit_depth}")
        self.n_values = n**2 * channels
        self._most = (self.n_values - 1) // 2  # bright values of class 0

    def _images(self, x: ArrayLike) -> ndarray:
        array = np.asarray(x)
        if array.dtype.kind not in "biuf" or array.ndim < 2 or array[:1].size not in (0, self.n_values):
            raise ValueError(
                f"x must be images of {self.n_values} values, (k, {self.n_values}) or (k, channels, n, n), "
                f"got {array.dtype} {array.shape}"
            )
        array = array.reshape(len(array), self.n_values).astype(np.float64)
        if not ((array >= 0) & (array <= 1)).all():  # NaN is neither
            raise ValueError("x must be in [0, 1]")
        return array

    def predict(self, x: Shaped[ndarray, "k ..."]) -> Int64[ndarray, " k"]:
        """Return 0 for mostly dark images, 1 for the others.

        Parameters
        ----------
        x : ndarray of shape (k, N) or (k, channels, n, n)
            Values in [0, 1].

        Returns
        -------
        ndarray of shape (k,)
        """
        return ((self._images(x) >= 0.5).sum(1) > self._most).astype(np.int64)

    def distance(self, x: Shaped[ndarray, "k ..."], p: float) -> Float64[ndarray, " k"]:
        """Return the size of the least perturbation to an image of the other class.

        Parameters
        ----------
        x : ndarray of shape (k, N) or (k, channels, n, n)
            Images of this bit depth.
        p : float
            As for `robust_fraction_bound`.

        Returns
        -------
        ndarray of shape (k,)
            Exact: so many values as are needed cross the middle where that costs least.
        """
        norm_order(p)
        x = self._images(x)
        q = 2.0**self.bit_depth
        bright = x >= 0.5
        count = bright.sum(1)
        out = count <= self._most  # must gain bright values, the others must lose some
        needed = np.where(out, self._most + 1 - count, count - self._most)
        cost = np.where(out[:, None], q / 2 / (q - 1) - x, x - (q / 2 - 1) / (q - 1))
        cost = np.sort(np.where(bright == out[:, None], np.inf, cost), axis=1)
        taken = np.where(np.arange(self.n_values) < needed[:, None], cost, 0.0)
        if p == 0:
            return needed.astype(np.float64)
        if math.isinf(p):
            return taken.max(1)
        total = (taken**p).sum(1)
        return total if p < 1 else total ** (1 / p)

    def robust_fraction(self, size: float, p: float) -> float:
        """Return the share of class 0 that no perturbation of a size moves out.

        Parameters
        ----------
        size, p : float
            As for `robust_fraction_bound`.

        Returns
        -------
        float
            Exact for one bit, else a lower bound: a value that crosses the middle costs at least a level.
        """
        at_least("size", size, 0)
        norm_order(p)
        level = 1 / (2.0**self.bit_depth - 1)
        if p == 0:
            crossed = changes_within(size, self.n_values, 0)
        elif p < 1:
            crossed = changes_within(size / level**p, self.n_values, 1)
        else:
            crossed = changes_within(size / level, self.n_values, p)
        law = binom(self.n_values, 0.5)
        return float(law.cdf(self._most - crossed) / law.cdf(self._most))
