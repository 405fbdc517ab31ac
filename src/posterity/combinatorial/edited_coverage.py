"""Choosing sets that cover the most weight, and edits that cannot worsen the best choice: larger sets.

    f(chosen) = sum of the weights of the elements in a chosen set,  at most ``limit`` chosen.       (1)

One more element in a set raises what some choices cover and leaves the others, so the most that can be covered
rises or stays. Where the set is not chosen, the choice in hand keeps its value.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from posterity._checks import integer
from posterity.combinatorial.edited_tours import added, integers, two_of

__all__ = ["Coverage", "Sets"]


class Sets(NamedTuple):
    """An instance of `Coverage`.

    Attributes
    ----------
    member : ndarray of shape (sets, elements), bool
        Which element is in which set.
    weight : ndarray of shape (elements,)
        Finite, at least 0.
    limit : int
        How many sets may be chosen, in 1 .. sets.
    """

    member: Bool[ndarray, "sets elements"]
    weight: Float[ndarray, " elements"]
    limit: int


class Coverage:
    """Choices of sets whose elements weigh the most; an edit puts one more element into a set that is not chosen.

    An instance is a `Sets`; a solution is a list of at most ``limit`` different sets; an edit is a pair (set, element).

    Attributes
    ----------
    sense : str
        "max".
    solvers : mapping
        "greedy": the set that adds the most weight to those chosen, of equals the lower number, until ``limit`` or
        nothing is left to add.

    Raises
    ------
    ValueError
        Of a method, if an instance, a choice or an edit is not what it must be.

    References
    ----------
    .. [1] Lu et al. ROCO: A general framework for evaluating robustness of combinatorial optimization solvers
       on graphs. ICLR 2023. The no-worse guarantee and the edits of each problem.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.combinatorial import Coverage, Sets
    >>> member = np.array([[True, True, False], [False, False, True]])
    >>> problem, instance = Coverage(), Sets(member, np.array([1.0, 2.0, 4.0]), limit=1)
    >>> chosen = problem.solvers["greedy"](instance)
    >>> chosen, problem.value(instance, chosen), problem.edits(instance, chosen).tolist()
    ([1], 4.0, [[0, 2]])
    """

    sense: Literal["min", "max"] = "max"

    @property
    def solvers(self) -> Mapping[str, Callable[..., list[int]]]:
        """Simple solvers by name."""
        return CHOICES

    def validate(self, instance: Sets) -> None:
        """Raise ``ValueError`` if arrays do not fit, a weight is negative or not finite, or ``limit`` is out of range."""
        member, weight, limit = _sets(instance)
        _weights(weight)
        if limit > len(member):
            raise ValueError(f"limit must be at most the number of sets, {len(member)}, got {limit}")

    def value(self, instance: Sets, solution: Sequence[int] | Int[ndarray, " k"]) -> float:
        """Return the weight that chosen sets cover, rounded once."""
        sets = _sets(instance)
        covered = sets.member[_chosen(sets, solution)].any(0)
        return added("weight must have a finite sum", sets.weight[covered])

    def edits(self, instance: Sets, solution: Sequence[int] | Int[ndarray, " k"]) -> Int[ndarray, "m 2"]:
        """Return sets that are not chosen with the elements that they lack."""
        sets = _sets(instance)
        lacking = ~sets.member
        lacking[_chosen(sets, solution)] = False
        return np.argwhere(lacking)

    def apply(self, instance: Sets, edit: tuple[int, int]) -> Sets:
        """Return new sets, one of them with one more element."""
        sets = _sets(instance)
        i, e = two_of(edit, *sets.member.shape)
        if sets.member[i, e]:
            raise ValueError(f"edit must be an element that the set lacks, got {(i, e)}")
        member = sets.member.copy()
        member[i, e] = True
        return sets._replace(member=member)

    def graph(
        self, instance: Sets, solution: Sequence[int] | Int[ndarray, " k"]
    ) -> tuple[Float[Tensor, "n 4"], Int[Tensor, "2 e"], Float[Tensor, " e"]]:
        """Return sets, then elements, that are joined where one is in the other.

        Of each: whether it is a set, whether it is chosen or covered, its weight over the mean of its sort, and its
        degree over the largest there can be.
        """
        sets = _sets(instance)
        member, weight = sets.member, _weights(sets.weight)
        chosen = np.zeros(len(member))
        chosen[_chosen(sets, solution)] = 1
        covered = member[chosen > 0].any(0)
        weight = weight / (weight.max() or 1.0)
        heavy = member @ weight
        columns = [
            np.repeat([1.0, 0.0], member.shape),
            np.concatenate([chosen, covered]),
            np.concatenate([each / (each.mean() or 1.0) for each in (heavy, weight)]),
            np.concatenate([member.mean(1), member.mean(0)]),
        ]
        edges = np.stack(np.nonzero(member))
        edges[1] += len(member)
        return (
            torch.from_numpy(np.stack(columns, 1)).float(),
            torch.from_numpy(edges),
            torch.ones(edges.shape[1]),
        )

    def nodes(self, instance: Sets, edits: Int[ndarray, "m 2"]) -> Int[ndarray, "m 2"]:
        """Return edits as pairs of nodes of `graph`, where elements come after the sets."""
        return np.asarray(edits) + np.array([0, len(_sets(instance).member)])


def greedy(instance: Sets) -> list[int]:
    """Return the sets that add the most weight, one after the other."""
    member, weight, limit = _sets(instance)
    left, chosen = _weights(weight), []
    for _ in range(limit):
        gains = member @ left
        k = int(gains.argmax())
        if gains[k] <= 0:
            break
        chosen.append(k)
        left[member[k]] = 0
    return chosen


CHOICES = MappingProxyType({"greedy": greedy})


def _sets(instance: Any) -> Sets:
    """Return an instance whose arrays fit together."""
    if not isinstance(instance, tuple) or len(instance) != 3:
        raise ValueError(f"instance must be Sets(member, weight, limit), got {type(instance).__name__}")
    member, weight, limit = instance
    if not isinstance(member, ndarray) or member.dtype != bool or member.ndim != 2 or not member.size:
        raise ValueError(
            "member must be a bool array (sets, elements) with at least one of each, got "
            f"{getattr(member, 'dtype', type(member).__name__)} {getattr(member, 'shape', '')}"
        )
    if not isinstance(weight, ndarray) or weight.dtype.kind not in "fiu" or weight.shape != member.shape[1:]:
        raise ValueError(
            f"weight must be an array of {member.shape[1]} numbers, one an element, got "
            f"{getattr(weight, 'dtype', type(weight).__name__)} {getattr(weight, 'shape', '')}"
        )
    return Sets(member, weight, integer("limit", limit, 1))


def _weights(weight: ndarray) -> ndarray:
    """Return a copy of weights in float64, which must be finite and not negative."""
    weight = weight.astype(np.float64)
    if not weight.max() <= np.finfo(float).max / len(weight):  # NaN too
        raise ValueError(f"weight must be finite, and so its sum, got {weight.max()}")
    if weight.min() < 0:
        raise ValueError(f"weight must be at least 0, got {weight.min()} for element {weight.argmin()}")
    return weight


def _chosen(sets: Sets, solution: Any) -> list[int]:
    chosen, n = integers("solution", solution), len(sets.member)
    odd = next((k for k in chosen if not 0 <= k < n), None)
    if odd is not None:
        raise ValueError(f"solution must have sets in 0..{n - 1}, got {odd}")
    if len(chosen) > sets.limit:
        raise ValueError(f"solution must have at most {sets.limit} sets, got {len(chosen)}")
    if len(set(chosen)) < len(chosen):
        odd = next(k for k in chosen if chosen.count(k) > 1)
        raise ValueError(f"solution must have different sets, has set {odd} {chosen.count(odd)} times")
    return chosen
