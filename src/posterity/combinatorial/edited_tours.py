"""Directed tours, and edits of their costs that cannot worsen the best one: cheaper arcs.

A tour of n cities costs the sum of its arcs,

    c(tour) = sum over arcs (i, j) of the tour of d_ij.                                       (1)

To multiply the cost of one arc by a factor below 1 lowers every tour that uses it and leaves the others, so the
cheapest one falls or stays. Where the arc is not on the tour in hand, that tour keeps its cost: a solver that answers
with a dearer one has been misled.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from numpy import ndarray
from torch import Tensor

from posterity._checks import within

__all__ = ["ATSP"]

LONGEST = 3  # cities of a stretch that Or-opt moves
GAIN = 1e-12  # of the cost of a tour, that a move must save


class ATSP:
    """Tours through cities with directed costs; an edit makes one arc cheaper that is not on the solver's tour.

    An instance is an array (n, n) of costs from row to column, whose diagonal is ignored; a solution is a permutation
    of 0 .. n - 1, closed implicitly; an edit is an arc (i, j).

    Parameters
    ----------
    factor : float, default=0.5
        What the cost of an arc is multiplied by, in (0, 1). An arc may be chosen more than once.

    Attributes
    ----------
    sense : str
        "min".
    solvers : mapping
        "nearest" (from city 0 always to the nearest city left), "farthest-insertion" (the city farthest from the
        tour goes where it costs least) and "insertion+or-opt" (then stretches of up to three cities are moved while that
        pays): functions from costs to a tour that begins at city 0. Of equals they take the lower number.

    Raises
    ------
    ValueError
        If ``factor`` is out of range; of a method, if an instance, a tour or an arc is not what it must be.

    Notes
    -----
    1. The authors' code leaves out both directions of a tour's arcs, and arcs of cost up to 1; the guarantee
       needs neither.

    References
    ----------
    .. [1] Lu et al. ROCO: A general framework for evaluating robustness of combinatorial optimization solvers
       on graphs. ICLR 2023. The no-worse guarantee and the edits of each problem.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.combinatorial import ATSP
    >>> problem, costs = ATSP(), np.array([[0, 2, 9], [9, 0, 3], [4, 9, 0]])
    >>> tour = problem.solvers["nearest"](costs)
    >>> tour, problem.value(costs, tour), problem.edits(costs, tour).tolist()
    ([0, 1, 2], 9.0, [[0, 2], [1, 0], [2, 1]])
    >>> problem.apply(costs, (0, 2))[0].tolist()
    [0.0, 2.0, 4.5]
    """

    sense: Literal["min", "max"] = "min"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = float(within("factor", factor, 0, 1, open_low=True, open_high=True))

    @property
    def solvers(self) -> Mapping[str, Callable[..., list[int]]]:
        """Simple solvers by name."""
        return TOURS

    def validate(self, instance: Num[ndarray, "n n"]) -> None:
        """Raise ``ValueError`` if costs are not square, of fewer than 3 cities, negative or not finite."""
        _between(instance)

    def value(self, instance: Num[ndarray, "n n"], solution: Sequence[int] | Int[ndarray, " k"]) -> float:
        """Return the cost of a tour, rounded once."""
        costs = _costs(instance)
        tour = _tour(solution, len(costs))
        stops = np.array(tour + tour[:1])
        return added("instance must have costs whose sum is finite", costs[stops[:-1], stops[1:]])

    def edits(
        self, instance: Num[ndarray, "n n"], solution: Sequence[int] | Int[ndarray, " k"]
    ) -> Int[ndarray, "m 2"]:
        """Return the arcs that are not on a tour."""
        n = len(_costs(instance))
        tour = _tour(solution, n)
        allowed = np.ones((n, n), dtype=bool)
        stops = np.array(tour + tour[:1])
        allowed.ravel()[:: n + 1] = False
        allowed[stops[:-1], stops[1:]] = False
        return np.argwhere(allowed)

    def apply(self, instance: Num[ndarray, "n n"], edit: tuple[int, int]) -> Float[ndarray, "n n"]:
        """Return new costs with one arc cheaper, in float32 at least."""
        costs = _costs(instance)
        i, j = two_of(edit, len(costs), len(costs))
        if i == j:
            raise ValueError(f"edit must be an arc between two cities, got {(i, j)}")
        return self._edited(costs, [(i, j)])

    def graph(
        self, instance: Num[ndarray, "n n"], solution: Sequence[int] | Int[ndarray, " k"]
    ) -> tuple[Float[Tensor, "n 4"], Int[Tensor, "2 e"], Float[Tensor, " e"]]:
        """Return mean and least cost out of and into each city, all arcs, and their costs, in units of the mean cost."""
        costs = _between(instance)
        n = len(costs)
        _tour(solution, n)
        unit = float(costs.sum()) / (n * (n - 1)) or 1.0
        np.fill_diagonal(costs, np.inf)
        least = np.stack([costs.min(1), costs.min(0)], 1)
        np.fill_diagonal(costs, 0)
        costs, least = costs / unit, least / unit
        x = np.stack([costs.sum(1) / (n - 1), least[:, 0], costs.sum(0) / (n - 1), least[:, 1]], 1)
        source, goal = np.nonzero(~np.eye(n, dtype=bool))
        edges = torch.from_numpy(np.stack([source, goal]))
        return torch.from_numpy(x).float(), edges, torch.from_numpy(costs[source, goal]).float()

    def _edited(self, instance: ndarray, edits: Iterable[tuple[int, int]]) -> ndarray:
        """Return costs after edits that are arcs, in one copy."""
        costs = np.array(instance, dtype=np.result_type(instance, np.float32))
        for i, j in edits:
            costs[i, j] *= self.factor
        return costs


def nearest(instance: Num[ndarray, "n n"]) -> list[int]:
    """Return the tour that goes from city 0 to the nearest city left, and so on."""
    costs = _between(instance)
    city, tour = 0, [0]
    costs[:, 0] = np.inf
    for _ in range(len(costs) - 1):
        city = int(costs[city].argmin())
        costs[:, city] = np.inf
        tour.append(city)
    return tour


def farthest_insertion(instance: Num[ndarray, "n n"]) -> list[int]:
    """Return the tour into which the city farthest from it goes where it costs least, from city 0 on."""
    costs = _between(instance)
    tour, away = [0], costs[0].copy()  # the least cost from a city of the tour
    away[0] = -np.inf
    for _ in range(len(costs) - 1):
        city = int(away.argmax())
        stops = np.array(tour)
        after = np.append(stops[1:], 0)
        extra = costs[stops, city] + costs[city, after] - (costs[stops, after] if len(tour) > 1 else 0)
        tour.insert(int(extra.argmin()) + 1, city)
        np.minimum(away, costs[city], out=away)
        away[tour] = -np.inf
    return tour


def insertion_and_or_opt(instance: Num[ndarray, "n n"]) -> list[int]:
    """Return the tour of `farthest_insertion` after the best moves of stretches of up to three cities."""
    costs = _between(instance)
    tour = np.array(farthest_insertion(costs))
    n, total = len(tour), _length(costs, tour)
    at, least = np.arange(n), GAIN * total
    while True:
        after, before = np.roll(tour, -1), np.roll(tour, 1)
        arcs, best = costs[tour, after], (-least, 0, 0, 0)
        for length in range(1, min(LONGEST, n - 2) + 1):
            last, rest = tour[(at + length - 1) % n], tour[(at + length) % n]
            freed = costs[before, tour] + costs[last, rest] - costs[before, rest]
            change = costs[tour, tour[:, None]] + costs[last[:, None], after] - arcs - freed[:, None]
            change[(at - at[:, None] + 1) % n <= length] = np.inf  # the arcs of the stretch and at its ends
            k = int(change.argmin())
            if change.flat[k] < best[0]:
                best = float(change.flat[k]), length, *divmod(k, n)
        _, length, p, q = best
        turned = np.roll(tour, -p)
        stretch, others = turned[:length], turned[length:]
        k = int(np.flatnonzero(others == tour[q])[0]) + 1 if length else 0
        moved = np.concatenate([others[:k], stretch, others[k:]])
        now = _length(costs, moved)
        if now >= total - least:  # nothing is left, or rounding beside dear arcs has feigned it
            return np.roll(tour, -int(np.flatnonzero(tour == 0)[0])).tolist()
        tour, total = moved, now


TOURS = MappingProxyType(
    {"nearest": nearest, "farthest-insertion": farthest_insertion, "insertion+or-opt": insertion_and_or_opt}
)


def two_of(edit: Any, rows: int, columns: int) -> tuple[int, int]:
    """Return an edit as two numbers below those of rows and columns."""
    try:
        i, j = (operator.index(end) for end in edit)
    except (TypeError, ValueError) as error:
        raise ValueError(f"edit must be two integers, got {edit!r}") from error
    if not (0 <= i < rows and 0 <= j < columns):
        raise ValueError(f"edit must be in 0..{rows - 1} and 0..{columns - 1}, got {(i, j)}")
    return i, j


def integers(name: str, values: Any) -> list[int]:
    """Return numbers of a sequence, an array or a tensor as ints."""
    try:
        each = values.tolist() if isinstance(values, ndarray | Tensor) else values
        return list(map(operator.index, each))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers, got {_short(values)}") from error


def added(rule: str, numbers: ndarray) -> float:
    """Return an exact sum, rounded once, so that it falls where a number does; else the rule is the error."""
    try:
        total = math.fsum(numbers.tolist())
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{rule}, got one that is not") from error
    if not math.isfinite(total):
        raise ValueError(f"{rule}, got {total}")
    return total


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _costs(instance: Any) -> ndarray:
    if not isinstance(instance, ndarray) or instance.dtype.kind not in "fiu":
        raise ValueError(
            f"instance must be an array of numbers, got {getattr(instance, 'dtype', type(instance).__name__)}"
        )
    if instance.ndim != 2 or instance.shape[0] != instance.shape[1] or len(instance) < 3:
        raise ValueError(f"instance must have shape (n, n) with n at least 3, got {instance.shape}")
    return instance


def _between(instance: Any) -> ndarray:
    """Return a copy of costs in float64, 0 on the diagonal, which must be finite and not negative."""
    costs = np.array(_costs(instance), dtype=np.float64)
    costs.ravel()[:: len(costs) + 1] = 0
    low, high = float(costs.min()), float(costs.max())
    if not high <= np.finfo(float).max / costs.size:  # NaN too
        raise ValueError(f"instance must have finite costs of a finite sum, got {high}")
    if low < 0:
        raise ValueError(f"instance must have costs of at least 0, got {low}")
    return costs


def _length(costs: ndarray, tour: ndarray) -> float:
    return math.fsum(costs[tour, np.roll(tour, -1)].tolist())


def _tour(solution: Any, n: int) -> list[int]:
    tour = integers("solution", solution)
    if len(tour) != n or len(set(tour)) != n or min(tour) != 0 or max(tour) != n - 1:
        odd = next((city for city in tour if not 0 <= city < n), None)
        if odd is not None:
            raise ValueError(f"solution must visit cities in 0..{n - 1}, got {odd}")
        odd, times = next((c, k) for c in range(n) if (k := tour.count(c)) != 1)
        raise ValueError(f"solution must visit every city once: city {odd} is visited {times} times")
    return tour
