"""One of many models chosen privately: a deep one, by a test and an exponential mechanism.

The depth of a point y among models x_1, ..., x_m is the number of models on its poorer side in
its worst coordinate,

    d(y) = min_j min( #{i: x_ij <= y_j}, #{i: x_ij >= y_j} ).                    (1)

Points of depth at least i fill a box between order statistics, of volume V_i. A release has a
density proportional to

    exp(c d(y))    on the box of depth at least t = floor(m / 4),                (2)

so it lies where models agree, and no bound on them is needed. One model moves a depth by at
most 1, but also the box. Therefore a test comes first: k is the largest number for which some
g >= 1 has, with e = epsilon / 2,

    V_{t-k-1} / V_{t+k+g+1} <= exp(e g / 2) delta / (8 exp(e)),                  (3)

so that more than k models must change before the edge of the box weighs something; only if
k + Laplace(1 / e) exceeds log(1 / (2 delta)) / e is anything released. Half of epsilon pays for
the test, half for the choice.
"""

import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from sklearn.utils import check_random_state

from posterity._checks import at_least, one_of, within

__all__ = ["TukeyMechanism", "tukey_depth"]

Points = Shaped[ndarray, "q p"] | ArrayLike
Models = Shaped[ndarray, "m p"] | ArrayLike
EXPONENT = {"replace": 0.5, "add-remove": 1.0}  # c / e: how far one model moves a density, at most
LEAST = 4  # models: fewer have no depth at which to cut
LARGE = 1e6  # epsilon beyond which nothing is private, and numbers overflow


def tukey_depth(points: Points, models: Models) -> Int64[ndarray, " q"]:
    """Return the approximate Tukey depth of points among models, equation 1.

    Parameters
    ----------
    points : array of shape (q, p)
        Finite.
    models : array of shape (m, p)
        Finite, m at least 1.

    Returns
    -------
    ndarray of shape (q,)
        Integers from 0, outside the models' box, to about m / 2 in their middle.

    Raises
    ------
    ValueError
        If an argument is no finite matrix, there is no model, or columns differ in number.

    References
    ----------
    .. [1] Amin, Joseph, Ribero, Vassilvitskii. Easy Differentially Private Linear Regression.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.privacy import tukey_depth
    >>> models = np.array([[0, 0], [1, 10], [2, 20], [3, 30], [4, 40]])
    >>> tukey_depth(np.array([[1.5, 15], [2, 20], [1.5, 5], [9, 20]]), models)
    array([2, 3, 1, 0])
    """
    x = _matrix("models", models)
    if len(x) == 0:
        raise ValueError("models must have at least 1 row, got 0")
    return _depth(_matrix("points", points, x.shape[1]), np.sort(x, axis=0))


class TukeyMechanism:
    """The private choice among models, each made from the data of other people.

    Only `release` is private, and one call spends all of epsilon and delta: repeated calls are
    for audits, on data that need no protection. **All else is a diagnostic for whoever holds the
    data: publishing any attribute, or a value of log_density, voids the guarantee.**

    With ``neighbors="replace"`` a release, "nothing" among its outcomes, is (epsilon,
    delta)-differentially private where one model is replaced by another. With ``"add-remove"``
    it is so where one is added or taken away and floor(m / 4) stays the same, and only (1.5
    epsilon, delta) where one is replaced. How many models there are is public. The proofs are
    about real numbers: sampling in floating point, and the time that it takes, are outside them.

    Parameters
    ----------
    models : array of shape (m, p)
        Finite, m at least 4.
    epsilon : float
        Greater than 0; beyond 1e6 it counts as 1e6.
    delta : float
        In (0, 1): far less than one over the number of people.
    neighbors : {"replace", "add-remove"}, default="replace"
        Between which collections a release must not tell: c = e / 2 or c = e in equation 2.
    jitter : float, default=1e-10
        Uniform noise in [0, jitter) is added to each number of the models, so that equal ones
        span a box too; at least 0. At 0 a coordinate in which all models agree is refused, a
        refusal that depends on the data and is not private.
    random_state : int, RandomState or None, default=None
        None takes fresh numbers from the operating system to seed numpy's Mersenne Twister. **The
        guarantee does not hold against whoever knows the seed**, and the generator is no
        cryptographic one.

    Attributes
    ----------
    n_models : int
        m.
    restricted_depth : int
        t.
    log_volumes : ndarray of shape (m // 2,)
        log V_i of i = 1, ..., m // 2.
    distance : int
        k, or -1 where equation 3 holds for none.
    threshold : float
        log(1 / (2 delta)) / e.
    pass_probability : float
        With which something is released.
    depths : ndarray of shape (m // 2 - t + 1,)
        t, ..., m // 2.
    depth_log_probs : ndarray of shape (m // 2 - t + 1,)
        Logarithms of the probabilities of these depths, if the test is passed.

    Raises
    ------
    ValueError
        If a parameter is out of range, models are fewer than 4 or not finite, or with
        ``jitter=0`` agree in a coordinate.

    Notes
    -----
    1. The noise of the test has the scale 1 / e; the official code has e, which breaks the
       promise.
    2. The point is drawn at the depth that was chosen; the official code draws it one level
       deeper, with the sides of the inner box for all coordinates.
    3. The exponent e of the official code is ``neighbors="add-remove"``; by default one model
       may be replaced, with e / 2.
    4. Where the box of depth t has no volume nothing is released; k is then -1 for all
       neighbours too.

    References
    ----------
    .. [1] Amin, Joseph, Ribero, Vassilvitskii. Easy Differentially Private Linear Regression.
       ICLR 2023. Section 3.
    .. [2] Brown, Gaboardi, Smith, Ullman, Zakynthinou. Covariance-Aware Private Mean Estimation
       Without Private Covariance Estimation. NeurIPS 2021. The test.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.privacy import TukeyMechanism
    >>> models = np.random.default_rng(0).normal(5.0, 1.0, size=(1_000, 2))  # one of each hospital
    >>> mechanism = TukeyMechanism(models, epsilon=1.0, delta=1e-6, random_state=0)
    >>> mechanism.pass_probability > 0.999
    True
    >>> bool(np.abs(mechanism.release() - 5).max() < 0.5)
    True
    """

    def __init__(
        self, models: Models, *, epsilon: float, delta: float,
        neighbors: Literal["replace", "add-remove"] = "replace", jitter: float = 1e-10, random_state: Any = None,
    ) -> None:  # fmt: skip
        _check_budget(epsilon, delta, neighbors)
        at_least("jitter", jitter, 0)
        x = _matrix("models", models)
        if len(x) < LEAST:
            raise ValueError(f"models must have at least {LEAST} rows, got {len(x)}")
        self._draw = _generator(random_state)
        with np.errstate(over="ignore"):
            x = np.minimum(x + jitter * self._draw.uniform(size=x.shape), np.finfo(np.float64).max)
        x = np.sort(x, axis=0)
        agreed = np.flatnonzero(x[0] == x[-1])
        if jitter == 0 and len(agreed):
            raise ValueError(
                f"models must take two values or more with jitter=0, got {x[0, agreed[0]]:g} alone in column "
                f"{agreed[0]}"
            )
        self._sorted = x
        self.n_models = len(x)
        half, t = len(x) // 2, len(x) // 4
        self.restricted_depth = t
        self._half_epsilon = min(epsilon, LARGE) / 2
        self._hurdle = -math.log(2 * delta)  # of e (k + noise)
        self.threshold = 2 * self._hurdle / min(epsilon, LARGE)

        # boxes of depth 1, ..., m // 2, and inside the last one an empty one
        self._low = np.append(x[:half], x[half - 1 : half], axis=0)
        self._high = np.append(x[::-1][:half], x[half - 1 : half], axis=0)
        with np.errstate(divide="ignore"):
            sides = np.log(_half_length(self._low, self._high)) + math.log(2)
            shells = np.log(
                _half_length(self._low[:-1], self._low[1:]) + _half_length(self._high[1:], self._high[:-1])
            )
        shells += math.log(2)
        self.log_volumes = sides[:half].sum(1)
        self.distance = _distance(self.log_volumes, t, self._half_epsilon, delta)

        self.depths = np.arange(t, half + 1)
        # points of depth i exactly, by their first coordinate that is no deeper: those before it
        # are in the box inside, those after it anywhere in the box of depth i
        before = _sums_before(sides[t:])
        after = _sums_before(sides[t - 1 : -1, ::-1])[:, ::-1]
        self._by_coordinate = before + shells[t - 1 :] + after
        c = EXPONENT[neighbors] * self._half_epsilon
        weights = np.asarray(logsumexp(self._by_coordinate, axis=1)) + c * (self.depths - half)
        self._log_mass = float(np.asarray(logsumexp(weights)))  # of exp(c (d - m // 2)) over the box
        self._c, self._empty = c, self._log_mass == -np.inf
        self.depth_log_probs = weights if self._empty else weights - self._log_mass
        self.pass_probability = 0.0 if self._empty else self._passes()

    def log_density(self, points: Points) -> Float64[ndarray, " q"]:
        """Return the logarithm of the density of a release, given that the test is passed.

        Parameters
        ----------
        points : array of shape (q, p)
            Finite.

        Returns
        -------
        ndarray of shape (q,)
            -inf outside the box of depth t.
        """
        depth = _depth(_matrix("points", points, self._sorted.shape[1]), self._sorted)
        half = self.n_models // 2
        inside = (depth >= self.restricted_depth) & (not self._empty)
        return np.where(inside, self._c * (np.minimum(depth, half) - half) - self._log_mass, -np.inf)

    def release(self, random_state: Any = None) -> Float64[ndarray, " p"] | None:
        """Return a private point, or None if the test is not passed.

        Parameters
        ----------
        random_state : int, RandomState or None, default=None
            None goes on with the mechanism's own generator.

        Returns
        -------
        ndarray of shape (p,) or None
        """
        draw = self._draw if random_state is None else _generator(random_state)
        (passed,), (point,) = self._releases(1, draw)
        return point if passed else None

    def _passes(self) -> float:
        """Return P(k + Laplace(1 / e) > threshold)."""
        over = self._hurdle - self._half_epsilon * self.distance
        return 0.5 * math.exp(-over) if over >= 0 else 1 - 0.5 * math.exp(over)

    def _releases(self, count: int, draw: np.random.RandomState) -> tuple[ndarray, ndarray]:
        """Return whether each of so many tests is passed, and points, those of the others not to be used."""
        p = self._sorted.shape[1]
        passed = self._half_epsilon * self.distance + draw.laplace(size=count) > self._hurdle
        if self._empty:
            return np.zeros(count, dtype=bool), np.zeros((count, p))
        level = (self.depth_log_probs + draw.gumbel(size=(count, len(self.depths)))).argmax(1)
        first = (self._by_coordinate[level] + draw.gumbel(size=(count, p))).argmax(1)[:, None]
        outer, column = self.restricted_depth - 1 + level[:, None], np.arange(p)
        inner = outer + 1
        box = np.where(column < first, inner, outer)
        low, high = self._low[box, column], self._high[box, column]
        # of the first coordinate, one of the two pieces that the inner box leaves of the outer one
        left = _half_length(self._low[outer, column], self._low[inner, column])
        right = _half_length(self._high[inner, column], self._high[outer, column])
        lower = draw.uniform(size=(count, 1)) * (left + right) < left
        at_first = column == first
        high = np.where(at_first & lower, self._low[inner, column], high)
        low = np.where(at_first & ~lower, self._high[inner, column], low)
        share = draw.uniform(size=(count, p))
        return passed, low * (1 - share) + high * share


def _distance(log_volumes: ndarray, t: int, e: float, delta: float) -> int:
    """Return the largest k of equation 3, or -1: it holds below k if it holds at k."""
    half = len(log_volumes)
    k = np.arange(t - 1)  # V_{t-k-1} is index t - k - 2
    reached = log_volumes + e / 2 * np.arange(1, half + 1)  # log V_i + e i / 2
    best = np.maximum.accumulate(reached[::-1])[::-1][t + k + 1]  # over i = t + k + g + 1, g >= 1
    with np.errstate(invalid="ignore"):  # of -inf less -inf: volumes of 0 show nothing
        excess = log_volumes[t - k - 2] + e / 2 * (t + k + 1) - best
    holds = np.isfinite(best) & (excess <= math.log(delta / 8) - e)
    return int(holds.sum()) - 1


def _least_models(epsilon: float, delta: float) -> int:
    """Return the number of models below which no data pass the test more often than not."""
    e = min(epsilon, LARGE) / 2
    k = max(-1, math.ceil(-math.log(2 * delta) / e))
    if k < 0:
        return LEAST
    g = max(2, math.ceil(2 * (math.log(8 / delta) / e + 1)))  # where all volumes are equal
    return 4 * (k + g) + 2  # the first with m // 2 - m // 4 >= k + g + 1


def _half_length(low: ndarray, high: ndarray) -> ndarray:
    """Return half the length of each interval: the whole may overflow."""
    return high / 2 - low / 2


def _sums_before(values: ndarray) -> ndarray:
    """Return for each entry the sum of those before it in its row."""
    return np.cumsum(np.column_stack([np.zeros(len(values)), values[:, :-1]]), axis=1)


def _depth(points: ndarray, ordered: ndarray) -> ndarray:
    """Return equation 1, of models that are sorted in each column."""
    depth = np.full(len(points), len(ordered))
    for y, x in zip(points.T, ordered.T, strict=True):
        below = np.searchsorted(x, y, side="right")
        above = len(x) - np.searchsorted(x, y, side="left")
        depth = np.minimum(depth, np.minimum(below, above))
    return depth


def _matrix(name: str, value: Any, columns: int | None = None) -> ndarray:
    """Return a finite matrix of float64."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0 or columns not in (None, array.shape[1]):
        wanted = f"{columns} columns, as models has" if columns else "at least 1 column"
        raise ValueError(f"{name} must be a matrix with {wanted}, got shape {array.shape}")
    array = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(array).all(1))
    if len(wrong):
        raise ValueError(f"{name} must be finite, row {wrong[0]} is not")
    return array


def _check_budget(epsilon: float, delta: float, neighbors: str) -> None:
    at_least("epsilon", epsilon, 0, strict=True)
    within("delta", delta, 0, 1, open_low=True, open_high=True)
    one_of("neighbors", neighbors, tuple(EXPONENT))


def _generator(random_state: Any) -> np.random.RandomState:
    """Return a generator; without a seed a fresh one, not the global one that others may have seeded."""
    return np.random.RandomState() if random_state is None else check_random_state(random_state)
