r"""What nearest neighbours on fixed features can reach: the best kernel, and a bound for all of them.

Words fall into concepts of equal size, and which word is in which is not known to who chooses the
features. At best they then compare sentences by how many partitions make them alike,

.. math:: K^*(x, y) = |\{\varphi : \varphi(x_l) = \varphi(y_l) \text{ for all } l\}|,

and for every feature map chosen without the partition, the expected accuracy of nearest neighbours on
sentences whose concepts were seen n* times is at most :math:`c\, n^* + 1/R` (Theorem 7), with

.. math:: c = \min_\ell \Big[ 1 - \sum_{k \in S_\ell} f(k)\, g(k) + \max_{k \in S_\ell} \frac{f(k)}{2R} \Big].

A pair of sentences is a graph on words with an edge between those in the same place. Only the sizes of its
components count: f(k) is the normalised kernel of sizes k, g(k) the probability of a forest with them.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import indices, integer
from posterity.dynamics._plots import axes

__all__ = ["SuccessBound", "equipartition_kernel", "success_bound"]

PAIRS = 2**26  # bytes of the labels of pairs that are held at once
Sizes = tuple[int, ...]  # of components with two words or more, largest first


@dataclass(frozen=True)
class SuccessBound:
    """How often fixed features can succeed on the tail, at most.

    Attributes
    ----------
    coefficient : float
        c, the least of ``per_ell``.
    ell : int
        Where it is least.
    n_categories : int
        R.
    per_ell : dict of int to float
        The bracket for each ell.
    """

    coefficient: float
    ell: int
    n_categories: int
    per_ell: dict[int, float]

    def limit(self, n_unfamiliar: int) -> float:
        """Return the highest expected accuracy where each tail has so many training sentences: c n* + 1/R, at most 1.

        Parameters
        ----------
        n_unfamiliar : int
            n*, at least 0.

        Returns
        -------
        float
        """
        n_unfamiliar = integer("n_unfamiliar", n_unfamiliar, 0)
        return min(1.0, self.coefficient * n_unfamiliar + 1 / self.n_categories)

    def plot(self, ax: Any = None) -> Any:
        """Draw the highest accuracy against the number of training sentences a tail, up to where it says nothing.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default of a new figure.

        Returns
        -------
        matplotlib.axes.Axes
        """
        ax = axes(ax)
        last = min(1000, math.ceil(1 / max(self.coefficient, 1e-12)))
        numbers = sorted({round(last * step / 100) for step in range(101)})
        ax.plot(numbers, [self.limit(n) for n in numbers])
        ax.set(xlabel="training sentences of a tail", ylabel="accuracy on it, at most", ylim=(0, 1.02))
        return ax


def equipartition_kernel(
    x: Int[Tensor, "n length"],
    y: Int[Tensor, "m length"],
    *,
    n_words: int,
    n_concepts: int,
    normalize: bool = True,
) -> Float[Tensor, "n m"]:
    r"""Return the best kernel that does not know the concepts of words.

    .. math:: K^*(x, y) = \frac{n_c^L}{|\Phi|} |\{\varphi \in \Phi : \varphi(x_l) = \varphi(y_l), l = 1 \dots L\}|,

    Phi all ways to give n_words words to n_c labelled concepts of equal size. It is positive semi-definite,
    n_c^L where x = y, and 1 on average over independent sentences.

    Parameters
    ----------
    x, y : Tensor of shapes (n, length) and (m, length)
        Sentences: words in 0 .. n_words - 1.
    n_words, n_concepts : int
        The first a multiple of the second.
    normalize : bool, default=True
        If not, the number of partitions itself.

    Returns
    -------
    Tensor of shape (n, m)
        In float64, on the device of ``x``. A pair costs time in length squared, the memory of pairs that are
        looked at together is at most 64 MiB; each new set of sizes, of which there are fewer than 100 for
        length 9, is counted once in exact integers.

    Raises
    ------
    ValueError
        If words are out of range or no integers, lengths differ, the partition is not even, or a number is
        beyond 1e308.

    References
    ----------
    .. [1] Laurent, von Brecht, Bresson. Long-Tailed Learning Requires Feature Learning. ICLR 2023. Section 4.

    Examples
    --------
    Two different words of six are in the same one of three concepts in 18 of the 90 partitions:

    >>> import torch
    >>> from posterity.dynamics import equipartition_kernel
    >>> x = torch.tensor([[0], [1]])
    >>> equipartition_kernel(x, x, n_words=6, n_concepts=3, normalize=False)
    tensor([[90., 18.],
            [18., 90.]], dtype=torch.float64)
    """
    n_words, n_concepts = even("n_words", n_words, n_concepts)
    words("x", x, n_words)
    words("y", y, n_words)
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(f"x and y must have the same length, at least 1, got {x.shape[1]} and {y.shape[1]}")
    y = y.to(x.device)
    values = x.new_zeros((len(x), len(y)), dtype=torch.float64)
    rows = max(1, PAIRS // (192 * x.shape[1] * max(1, len(y))))  # a dozen tensors of labels at a time
    for start in range(0, len(x), rows):
        some = x[start : start + rows]
        sizes = _component_sizes(some.repeat_interleave(len(y), 0), y.repeat(len(some), 1))
        kinds, which = sizes.unique(dim=0, return_inverse=True)
        found = [
            _value(tuple(s for s in kind if s > 1), n_words, n_concepts, x.shape[1], normalize)
            for kind in kinds.tolist()
        ]
        values[start : start + rows] = x.new_tensor(found, dtype=torch.float64)[which].view(len(some), -1)
    return values


def success_bound(
    length: int, n_words: int, n_concepts: int, n_categories: int, *, ell: int | None = None
) -> SuccessBound:
    """Return what no fixed feature map, with nearest neighbours, can surpass on the tail.

    Parameters
    ----------
    length : int
        Words in a sentence, at least 2.
    n_words, n_concepts : int
        The first a multiple of the second.
    n_categories : int
        R, at least 1.
    ell : int, optional
        2 .. length: the bracket there alone. By default the best of all.

    Returns
    -------
    SuccessBound
        From exact integers, rounded once. The time grows as the number of partitions of ``length``: milliseconds at 9,
        seconds at 20.

    Raises
    ------
    ValueError
        If a number is out of its range.

    References
    ----------
    .. [1] Laurent, von Brecht, Bresson. Long-Tailed Learning Requires Feature Learning. ICLR 2023. Theorem 7.

    Examples
    --------
    With 150 words in 5 concepts, one sentence in a thousand categories helps in 15 of 1,000 cases at most:

    >>> from posterity.dynamics import success_bound
    >>> bound = success_bound(9, 150, 5, 1000)
    >>> bound.ell, round(bound.coefficient, 4), round(bound.limit(1), 4)
    (7, 0.0143, 0.0153)
    """
    length = integer("length", length, 2)
    n_words, n_concepts = even("n_words", n_words, n_concepts)
    n_categories = integer("n_categories", n_categories, 1)
    if ell is not None and not 2 <= integer("ell", ell) <= length:
        raise ValueError(f"ell must be in 2..{length}, got {ell}")
    every = _partitions((), n_words, n_concepts)
    covered = highest = 0  # numerators of the sum of f g, and of the largest f
    per_ell: dict[int, float] = {}
    for edges in range(length, 1, -1):  # S_ell holds the forests with ell edges or more
        drawn = _draws(length, edges, n_words)
        for sizes in _forests(edges, n_words):
            alike = _partitions(sizes, n_words, n_concepts)
            covered += alike * _labelled(sizes, n_words) * drawn
            highest = max(highest, alike)
        if ell in (None, edges):
            rest = Fraction(highest, 2 * n_categories) - Fraction(covered, n_words ** (2 * length))
            per_ell[edges] = float(1 + rest * n_concepts**length / every)
    best = min(sorted(per_ell), key=per_ell.__getitem__)
    return SuccessBound(per_ell[best], best, n_categories, dict(sorted(per_ell.items())))


def even(name: str, n_words: int, n_concepts: int) -> tuple[int, int]:
    """Return the numbers of words and of concepts, if the first is a multiple of the second."""
    n_concepts = integer("n_concepts", n_concepts, 1)
    if integer(name, n_words, 1) % n_concepts:
        raise ValueError(f"{name} must be a multiple of n_concepts={n_concepts}, got {n_words}")
    return int(n_words), n_concepts


def words(name: str, value: Tensor, n_words: int | None = None) -> Tensor:
    """Return sentences, (n, length), of words in 0 .. n_words - 1."""
    indices(name, value, (None, None), source="sentences of words")
    if n_words is not None and value.numel():
        low, high = (int(end) for end in value.aminmax())
        if low < 0 or high >= n_words:
            raise ValueError(f"{name} must be in 0..{n_words - 1}, got words from {low} to {high}")
    return value


def _component_sizes(x: Tensor, y: Tensor) -> Tensor:
    """Return the numbers of words in the components of each pair's graph, (pairs, 2 length), largest first."""
    slots = torch.cat([x, y], 1).long()
    length, width = x.shape[1], slots.shape[1]
    first = torch.zeros_like(slots)
    for k in range(width - 1, -1, -1):  # the first slot with the same word
        first = torch.where(slots == slots[:, k : k + 1], k, first)
    label = first.clone()
    for k in range(length):
        mine, other = label[:, k : k + 1], label[:, length + k : length + k + 1]
        label = torch.where(label == other, mine, label)
    counted = (
        first == torch.arange(width, device=x.device)
    ).long()  # a word once, however often it stands there
    return (
        torch.zeros_like(label)
        .scatter_add_(1, label, counted)
        .sort(1, descending=True)
        .values.to(torch.int16)
    )


@lru_cache(4096)
def _partitions(sizes: Sizes, n_words: int, n_concepts: int) -> int:
    """Return in how many equipartitions each component is in one concept.

    Loads of concepts that are permutations of one another are taken together, with their number.
    """
    room = n_words // n_concepts
    loads: Counter[Sizes] = Counter({(0,) * n_concepts: 1})
    for size in sizes:
        after: Counter[Sizes] = Counter()
        for load, ways in loads.items():
            for held, alike in Counter(load).items():
                if held + size <= room:
                    more = list(load)
                    more[more.index(held)] += size
                    after[tuple(sorted(more))] += ways * alike
        loads = after
    free = math.factorial(n_words - sum(sizes))
    return sum(
        ways * free // math.prod(math.factorial(room - held) for held in load) for load, ways in loads.items()
    )


def _normalised(sizes: Sizes, n_words: int, n_concepts: int, length: int) -> Fraction:
    """Return f of Theorem 7: the kernel of a pair whose graph has these components."""
    return Fraction(
        n_concepts**length * _partitions(sizes, n_words, n_concepts), _partitions((), n_words, n_concepts)
    )


def _value(sizes: Sizes, n_words: int, n_concepts: int, length: int, normalize: bool) -> float:
    exact = (_normalised(sizes, n_words, n_concepts, length) if normalize
             else _partitions(sizes, n_words, n_concepts))  # fmt: skip
    try:
        return float(exact)
    except OverflowError:
        more = "fewer words or concepts" if normalize else "normalize=True"
        raise ValueError(f"the kernel for n_words={n_words} is beyond 1e308: take {more}") from None


def _forests(edges: int, n_words: int) -> Iterator[Sizes]:
    """Yield the component sizes of forests with so many edges, which n_words words have room for."""

    def parts(left: int, largest: int) -> Iterator[Sizes]:
        if left == 0:
            yield ()
        for part in range(min(left, largest), 0, -1):
            for rest in parts(left - part, part):
                yield (part, *rest)

    for each in parts(edges, edges):
        if edges + len(each) <= n_words:
            yield tuple(part + 1 for part in each)


def _labelled(sizes: Sizes, n_words: int) -> int:
    """Return how many forests on the words have these components, by Cayley's formula for trees."""
    alike = math.prod(math.factorial(times) for times in Counter(sizes).values())
    inside = math.prod(math.factorial(size) for size in sizes)
    free = math.factorial(n_words - sum(sizes))
    trees = math.prod(size ** (size - 2) for size in sizes)
    return math.factorial(n_words) // (inside * alike * free) * trees


def _draws(length: int, edges: int, n_words: int) -> int:
    """Return how many pairs of sentences have exactly the edges of a given forest, out of n_words^(2 length).

    Of the places that are no self-loop each has an edge, in one of two orientations, and each edge a place.
    """
    return sum(
        math.comb(length, places) * _surjections(places, edges) * 2**places * n_words ** (length - places)
        for places in range(edges, length + 1)
    )


def _surjections(places: int, edges: int) -> int:
    """Return in how many ways every edge gets a place: edges! S(places, edges)."""
    return sum((-1) ** k * math.comb(edges, k) * (edges - k) ** places for k in range(edges + 1))
