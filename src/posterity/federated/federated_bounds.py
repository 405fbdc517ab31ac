"""How far a model trained on m clients with n rows each may be from its error on future rows and unseen clients.

Clients are drawn from a distribution of clients, rows from each client's own. Between the mean
loss on the m n rows that were trained on and the risk L on a client drawn anew stands the risk
L_m on new rows of the same m clients:

    L - empirical = (L - L_m) + (L_m - empirical),                                           (1)

a participation gap, a mean of m independent terms, and a mean of m n. Each part is bounded, for
every model of a class H together, with half of the failure probability delta: slowly,

    L_m <= empirical + D(m n),   L <= L_m + D(m),   D(k) of order sqrt(log(|H| / delta) / k),   (2)

for bounded losses and for those with heavier tails; or, for losses in [0, 1], through

    q = kl^-1(empirical, c / (m n)),   L <= kl^-1(q, c / m),   c = log(2 |H| / delta),       (3)

where kl^-1(a, e) is the largest b with kl(a || b) <= e. At an empirical loss of 0 this falls like
1 / (m n) + 1 / m. However many rows, the gap between clients stays.

The orders are the paper's; the constants are this library's, each from a textbook inequality.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammaln

from posterity._checks import at_least, integer, within

__all__ = [
    "Bounded", "FederatedBound", "SubExponential", "SubWeibull", "deviation", "fast_rate_bound", "linear_rademacher",
    "two_level_bound",
]  # fmt: skip


@dataclass(frozen=True)
class Bounded:
    """Losses in [0, max].

    Attributes
    ----------
    max : float, default=1.0
        Positive.
    """

    max: float = 1.0

    def __post_init__(self) -> None:
        at_least("max", self.max, 0.0, strict=True)


@dataclass(frozen=True)
class SubExponential:
    """Losses l with ``E exp(|l| / scale) <= 2``, as those with an exponential tail.

    Attributes
    ----------
    scale : float
        Positive.
    """

    scale: float

    def __post_init__(self) -> None:
        at_least("scale", self.scale, 0.0, strict=True)


@dataclass(frozen=True)
class SubWeibull:
    """Losses l with ``P(|l| > t) <= 2 exp(-(t / scale)^(1 / theta))``: the larger theta, the heavier the tail.

    Attributes
    ----------
    theta : float
        Positive: 1/2 is a Gaussian's tail, 1 an exponential one.
    scale : float
        Positive.
    """

    theta: float
    scale: float

    def __post_init__(self) -> None:
        at_least("theta", self.theta, 0.0, strict=True)
        at_least("scale", self.scale, 0.0, strict=True)


Tail = Bounded | SubExponential | SubWeibull


@dataclass(frozen=True)
class FederatedBound:
    """What holds, with probability at least 1 - delta, for every model of the class together.

    Attributes
    ----------
    participating : float
        Bound on the risk on new rows of the clients that took part.
    participation_gap : float
        What is added for clients that did not.
    unparticipating : float
        Bound on the risk on a client drawn anew: the sum of the two. A bound above the largest
        loss says nothing.
    """

    participating: float
    participation_gap: float

    @property
    def unparticipating(self) -> float:
        """The sum."""
        return self.participating + self.participation_gap


def deviation(n: int, delta: float, tail: Tail) -> float:
    """Return how far the mean of n independent losses may be from its expectation, on one side.

    Parameters
    ----------
    n : int
        At least 1. The losses need not have one distribution.
    delta : float
        In (0, 1): the probability that it is farther.
    tail : Bounded, SubExponential or SubWeibull
        What is known of each loss.

    Returns
    -------
    float
        In units of the loss. Bounded: Hoeffding's ``max sqrt(u / (2 n))`` with ``u = log(1 /
        delta)``. Sub-exponential: Bernstein's ``4 K sqrt(u / n) + 2 K u / n``. Sub-Weibull: the least
        over p >= 2 of ``2 K sqrt((p - 1) / n) (2 Gamma(theta p + 1) / delta)^(1 / p)``, by the moments of the
        tail, Rio's inequality and Markov's.

    Raises
    ------
    ValueError
        For n below 1, or delta outside (0, 1).

    References
    ----------
    Hoeffding 1963; Boucheron, Lugosi, Massart, "Concentration Inequalities", 2013, Theorem 2.10;
    Rio 2009, Theorem 2.1.

    Examples
    --------
    >>> from posterity.federated import Bounded, deviation
    >>> round(deviation(200, 0.05, Bounded(max=1.0)), 4)
    0.0865
    """
    integer("n", n, 1)
    within("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    return _deviation(float(n), -math.log(delta), tail)


def _deviation(n: float, u: float, tail: Tail) -> float:
    """Return the deviation at a failure probability of exp(-u), which may be too small for a float."""
    if isinstance(tail, Bounded):
        return tail.max * math.sqrt(u / (2 * n))
    if isinstance(tail, SubExponential):
        return 4 * tail.scale * math.sqrt(u / n) + 2 * tail.scale * u / n
    if isinstance(tail, SubWeibull):
        return 2 * tail.scale * _moment_factor(tail.theta, u) / math.sqrt(n)
    raise ValueError(f"tail must be Bounded, SubExponential or SubWeibull, got {tail!r}")


@lru_cache(maxsize=256)
def _moment_factor(theta: float, u: float) -> float:
    """Return the least of sqrt(p - 1) (2 Gamma(theta p + 1) exp(u))^(1/p) over p; each p gives a bound."""
    low, high = math.log(2.0), math.log(1e9)
    for _ in range(4):  # ever finer grids in log p
        log_p = np.linspace(low, high, 101)
        p = np.exp(log_p)
        p[0] = max(p[0], 2.0)
        value = 0.5 * np.log(p - 1) + (math.log(2) + gammaln(theta * p + 1) + u) / p
        best = int(value.argmin())
        low, high = log_p[max(best - 1, 0)], log_p[min(best + 1, 100)]
    return float(np.exp(value.min()))


def two_level_bound(
    empirical_risk: float,
    m: int,
    n: int,
    *,
    delta: float,
    tail: Tail,
    log_class_size: float | None = None,
    rademacher: tuple[float, float] | None = None,
) -> FederatedBound:
    """Bound the risk on clients that took part and on others, equation (2).

    Parameters
    ----------
    empirical_risk : float
        Mean loss on the m n rows; in [0, max] for bounded losses.
    m, n : int
        Clients, and rows of each; at least 1.
    delta : float
        In (0, 1).
    tail : Bounded, SubExponential or SubWeibull
        Of every client's losses. Their means over a client have the moments of that tail too.
    log_class_size : float, optional
        Natural logarithm of the number of models among which the trained one was chosen, or of
        a cover of them; at least 0.
    rademacher : tuple of float, optional
        In its place, for bounded losses: Rademacher complexities of the losses over m n rows
        and over m clients, as `linear_rademacher` gives them.

    Returns
    -------
    FederatedBound
        In units of the loss.

    Raises
    ------
    ValueError
        If not exactly one of the two sizes of the class is given, for Rademacher complexities with
        unbounded losses, or for a value out of range.

    Notes
    -----
    The paper's family: bounds of order 1/sqrt(m n) + 1/sqrt(m) for bounded, sub-exponential and
    sub-Weibull losses. Constants: this library.

    References
    ----------
    Hu, Li, Liu, "Generalization Bounds for Federated Learning: Fast Rates, Unparticipating
    Clients and Unbounded Losses", ICLR 2023.

    Examples
    --------
    >>> from posterity.federated import Bounded, two_level_bound
    >>> found = two_level_bound(0.1, m=100, n=50, delta=0.05, tail=Bounded(), log_class_size=0.0)
    >>> round(found.participating, 3), round(found.participation_gap, 3)
    (0.119, 0.136)
    """
    _federation(empirical_risk, m, n, delta, tail.max if isinstance(tail, Bounded) else None)
    if (log_class_size is None) == (rademacher is None):
        raise ValueError(
            f"give one of log_class_size and rademacher, got {'neither' if rademacher is None else 'both'}"
        )
    if rademacher is not None:
        if not isinstance(tail, Bounded):
            raise ValueError(
                "rademacher needs bounded losses: the step from complexity to risk is McDiarmid's, which unbounded "
                f"losses do not fulfil; got {tail!r}"
            )
        if len(rademacher) != 2:
            raise ValueError(
                f"rademacher must be two numbers, over m n rows and over m clients, got {rademacher}"
            )
        within_rows, over_clients = (at_least("rademacher", each, 0.0) for each in rademacher)
        u = math.log(2 / delta)
        rows = 2 * within_rows + _deviation(float(m) * n, u, tail)
        clients = 2 * over_clients + _deviation(float(m), u, tail)
    else:
        u = math.log(2 / delta) + at_least("log_class_size", log_class_size, 0.0)
        rows, clients = _deviation(float(m) * n, u, tail), _deviation(float(m), u, tail)
    return FederatedBound(empirical_risk + rows, clients)


def fast_rate_bound(
    empirical_risk: float, m: int, n: int, *, delta: float, log_class_size: float, loss_max: float = 1.0
) -> FederatedBound:
    """Bound the risk the better, the smaller the empirical risk is, equation (3).

    Parameters
    ----------
    empirical_risk : float
        Mean loss on the m n rows, in [0, loss_max].
    m, n : int
        Clients, and rows of each; at least 1.
    delta : float
        In (0, 1).
    log_class_size : float
        Natural logarithm of the number of models, or of a cover of them; at least 0.
    loss_max : float, default=1.0
        Losses lie in [0, loss_max].

    Returns
    -------
    FederatedBound
        In units of the loss.

    Raises
    ------
    ValueError
        For a value out of range.

    Notes
    -----
    The paper's family: fast rates of order 1/(m n) + 1/m, there by local Rademacher complexities
    under a Bernstein condition. Here by the Chernoff-Hoeffding bound at both levels; constants:
    this library.

    References
    ----------
    Hu, Li, Liu, "Generalization Bounds for Federated Learning: Fast Rates, Unparticipating
    Clients and Unbounded Losses", ICLR 2023.

    Examples
    --------
    >>> from posterity.federated import fast_rate_bound
    >>> found = fast_rate_bound(0.0, m=100, n=50, delta=0.05, log_class_size=0.0)
    >>> round(found.participating, 5), round(found.unparticipating, 3)
    (0.00074, 0.04)
    """
    at_least("loss_max", loss_max, 0.0, strict=True)
    _federation(empirical_risk, m, n, delta, loss_max)
    c = math.log(2 / delta) + at_least("log_class_size", log_class_size, 0.0)
    q = _kl_inverse(empirical_risk / loss_max, c / (float(m) * n))
    return FederatedBound(loss_max * q, loss_max * (_kl_inverse(q, c / m) - q))


def linear_rademacher(
    m: int, n: int, *, radius: float, feature_radius: float, lipschitz: float = 1.0
) -> tuple[float, float]:
    """Return Rademacher complexities of the losses of linear predictors, over rows and over clients.

    Parameters
    ----------
    m, n : int
        Clients, and rows of each; at least 1.
    radius : float
        Largest Euclidean norm of the weights.
    feature_radius : float
        Largest Euclidean norm of a row.
    lipschitz : float, default=1.0
        Of the loss in the prediction.

    Returns
    -------
    tuple of float
        ``lipschitz radius feature_radius / sqrt(N)`` for N = m n and for N = m: the mean loss of a client is
        at most as complex as that of one of its rows.

    Examples
    --------
    >>> from posterity.federated import linear_rademacher
    >>> linear_rademacher(100, 4, radius=2.0, feature_radius=1.0)
    (0.1, 0.2)
    """
    integer("m", m, 1)
    integer("n", n, 1)
    size = at_least("lipschitz", lipschitz, 0.0) * at_least("radius", radius, 0.0)
    size *= at_least("feature_radius", feature_radius, 0.0)
    return size / math.sqrt(m * n), size / math.sqrt(m)


def _federation(empirical_risk: float, m: int, n: int, delta: float, loss_max: float | None) -> None:
    integer("m", m, 1)
    integer("n", n, 1)
    within("delta", delta, 0.0, 1.0, open_low=True, open_high=True)
    if loss_max is None:
        at_least("empirical_risk", empirical_risk, -math.inf)
    else:
        within("empirical_risk", empirical_risk, 0.0, loss_max)


def _kl(a: float, b: float) -> float:
    """Return kl(a || b) of two coins, for 0 < a < 1 and a <= b < 1."""
    return -a * math.log1p((b - a) / a) - (1 - a) * math.log1p((a - b) / (1 - a))


def _kl_inverse(a: float, e: float) -> float:
    """Return the largest b in [a, 1] with kl(a || b) <= e, from above.

    Newton's steps on a convex function, begun where it is positive, fall onto its root.
    """
    if a <= 0:
        return -math.expm1(-e)
    if a >= 1:
        return 1.0
    # kl >= 2 (b - a)^2, and kl >= (1 - a) (log((1 - a) / (1 - b)) - 1) as a log a >= a - 1
    b = min(a + math.sqrt(e / 2), 1 - (1 - a) * math.exp(-1 - e / (1 - a)))
    for _ in range(200):
        if b >= 1 or b <= a:
            break
        step = (_kl(a, b) - e) * b * (1 - b) / (b - a)
        if not step > 1e-16 * b:
            break
        b -= step
    return min(max(a, b), 1.0)
