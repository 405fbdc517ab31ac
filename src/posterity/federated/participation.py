"""Gaps that were measured, and what more clients or more rows would buy.

The decomposition of a federated model's error, out of sample and between clients, is estimated
from losses by client; and a bound is turned round: how many clients, at so many rows each, or how
many rows, at so many clients, bring it down to a target.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from posterity._checks import at_least, integer, one_of
from posterity.federated.federated_bounds import (
    Bounded,
    FederatedBound,
    Tail,
    fast_rate_bound,
    two_level_bound,
)

__all__ = ["GapEstimate", "Plan", "estimate_gaps", "plan"]

MOST = 2**60  # clients or rows that are looked at
Losses = ArrayLike | Sequence[ArrayLike]


class Estimate(NamedTuple):
    """A value with its standard error by clients, NaN where one client cannot give it."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class GapEstimate:
    """The measured parts of equation (1) of `federated_bounds`, each with its standard error.

    Attributes
    ----------
    out_of_sample : Estimate
        Risk on new rows of the clients that took part, less the loss on their training rows.
    participation : Estimate
        Risk on clients that did not take part, less that on new rows of those that did.
    unparticipating : Estimate
        The sum of the two.
    """

    out_of_sample: Estimate
    participation: Estimate
    unparticipating: Estimate


@dataclass(frozen=True)
class Plan:
    """What brings a bound down to a target.

    Attributes
    ----------
    m : int or None
        The fewest clients at the given rows of each; None where no number does.
    n : int or None
        The fewest rows of each client at the given number of clients; None where no number does,
        as rows alone never close the gap between clients.
    message : str
        The two in words.
    """

    m: int | None
    n: int | None
    message: str


def estimate_gaps(
    train_losses: Losses, test_losses: Losses, unseen_losses: Losses, *, loss_max: float | None = None
) -> GapEstimate:
    """Return how far a trained model's losses are apart: in training, out of sample, on other clients.

    Parameters
    ----------
    train_losses : array_like of shape (m, n), or m sequences
        Losses of the rows that were trained on, by client.
    test_losses : array_like of shape (m, n'), or m sequences
        Of other rows of the same clients, in the same order.
    unseen_losses : array_like of shape (m', n''), or m' sequences
        Of clients that took no part.
    loss_max : float, optional
        What no loss may pass.

    Returns
    -------
    GapEstimate
        Every client counts alike, however many rows it has.

    Raises
    ------
    ValueError
        If a client has no loss, a loss is NaN or above ``loss_max``, or train and test losses are of
        different numbers of clients.

    Examples
    --------
    >>> from posterity.federated import estimate_gaps
    >>> found = estimate_gaps([[0.0, 0.2], [0.4]], [[0.3], [0.5]], [[0.9, 0.7], [1.0], [0.6]])
    >>> round(found.out_of_sample.value, 3), round(found.participation.value, 3)
    (0.15, 0.4)
    """
    named = {"train_losses": train_losses, "test_losses": test_losses, "unseen_losses": unseen_losses}
    train, test, unseen = (_client_means(name, losses, loss_max) for name, losses in named.items())
    if len(train) != len(test):
        raise ValueError(
            f"train_losses and test_losses must be of the same clients, got {len(train)} and {len(test)}"
        )
    over = [_variance(values) / len(values) for values in (test - train, train, test, unseen)]
    gap, other = float((test - train).mean()), float(unseen.mean() - test.mean())
    return GapEstimate(
        Estimate(gap, math.sqrt(over[0])),
        Estimate(other, math.sqrt(over[2] + over[3])),
        Estimate(gap + other, math.sqrt(over[1] + over[3])),
    )


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else math.nan


def _client_means(name: str, losses: Losses, loss_max: float | None) -> np.ndarray:
    """Return the mean loss of each client."""
    try:
        rows = [np.asarray(each, dtype=float) for each in losses]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be losses by client, (m, n) or m sequences of numbers: {error}"
        ) from error
    if not rows:
        raise ValueError(f"{name} must hold at least one client, got none")
    lengths = np.array([each.size if each.ndim == 1 else 0 for each in rows])
    if not lengths.all():
        raise ValueError(
            f"{name} must hold a sequence of losses a client, client {int(lengths.argmin())} has none"
        )
    flat = np.concatenate(rows)
    if not np.isfinite(flat).all():
        client = int(np.searchsorted(lengths.cumsum(), np.flatnonzero(~np.isfinite(flat))[0], side="right"))
        raise ValueError(f"{name} must be finite, client {client} has NaN or infinity")
    if loss_max is not None and flat.max() > loss_max:
        raise ValueError(f"{name} must be at most loss_max {loss_max}, got {flat.max()}")
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    return np.add.reduceat(flat, starts) / lengths


def plan(
    m: int,
    n: int,
    *,
    target: float,
    delta: float,
    empirical_risk: float = 0.0,
    tail: Tail | None = None,
    log_class_size: float | None = None,
    rademacher: tuple[float, float] | None = None,
    rate: Literal["slow", "fast"] = "slow",
    clients: Literal["unparticipating", "participating"] = "unparticipating",
) -> Plan:
    """Return how many clients, or how many rows, bring a bound down to a target.

    Parameters
    ----------
    m, n : int
        Clients, and rows of each, as they are; one is kept while the other is found.
    target : float
        What the bound should be at most.
    delta : float
        In (0, 1).
    empirical_risk : float, default=0.0
        Taken to stay as it is.
    tail : Bounded, SubExponential or SubWeibull, optional
        Of the losses; by default `Bounded` by 1. The fast rate needs bounded losses.
    log_class_size : float, optional
        As `two_level_bound` takes it.
    rademacher : tuple of float, optional
        In its place, as `two_level_bound` takes it for ``m`` and ``n``; taken to fall like one over the
        roots of m n and of m.
    rate : {"slow", "fast"}, default="slow"
        Of `two_level_bound` or of `fast_rate_bound`.
    clients : {"unparticipating", "participating"}, default="unparticipating"
        Whose risk is bounded.

    Returns
    -------
    Plan
        The least numbers, or None.

    Raises
    ------
    ValueError
        For what the bounds refuse.

    Examples
    --------
    >>> from posterity.federated import plan
    >>> print(plan(40, 25, target=0.2, empirical_risk=0.05, delta=0.05, log_class_size=3.0).message)
    215 clients of 25 rows; with 40 clients no number of rows does: 0.339 stay
    """
    tail = Bounded() if tail is None else tail
    one_of("rate", rate, ("slow", "fast"))
    one_of("clients", clients, ("unparticipating", "participating"))
    at_least("target", target, -math.inf)
    integer("m", m, 1)
    integer("n", n, 1)
    if rate == "fast" and (rademacher is not None or log_class_size is None):
        raise ValueError("rate='fast' takes log_class_size and no rademacher")
    if rate == "fast" and not isinstance(tail, Bounded):
        raise ValueError(f"rate='fast' needs bounded losses, got tail {tail!r}")

    here = (m, n)

    def bound(m: int, n: int) -> float:
        found: FederatedBound
        if rate == "fast":
            assert isinstance(tail, Bounded) and log_class_size is not None
            found = fast_rate_bound(
                empirical_risk, m, n, delta=delta, log_class_size=log_class_size, loss_max=tail.max
            )
        else:
            complexity = rademacher
            if rademacher is not None and len(rademacher) == 2:
                fewer = math.sqrt(math.prod(here) / (m * n)), math.sqrt(here[0] / m)
                complexity = (rademacher[0] * fewer[0], rademacher[1] * fewer[1])
            found = two_level_bound(
                empirical_risk,
                m,
                n,
                delta=delta,
                tail=tail,
                log_class_size=log_class_size,
                rademacher=complexity,
            )
        return found.unparticipating if clients == "unparticipating" else found.participating

    more_clients = _least(lambda k: bound(k, n) <= target)
    more_rows = _least(lambda k: bound(m, k) <= target)
    said = (
        f"{more_clients:,} clients of {n:,} rows"
        if more_clients is not None
        else f"with {n:,} rows a client no number of clients does: {bound(MOST, n):.3g} stay"
    )
    said += (
        f"; {more_rows:,} rows of {m:,} clients"
        if more_rows is not None
        else f"; with {m:,} clients no number of rows does: {bound(m, MOST):.3g} stay"
    )
    return Plan(more_clients, more_rows, said)


def _least(enough: Callable[[int], bool]) -> int | None:
    """Return the least number from 1 on that is enough, where more is never worse."""
    if not enough(MOST):
        return None
    high = 1
    while not enough(high):
        high *= 8
    low = high // 8
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
