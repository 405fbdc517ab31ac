"""Correlation clustering on a budget of questions: a cheap signal says whom to ask about, an expensive one is asked.

Two items belong together or not, which only an expensive oracle knows (a cross-encoder, a
language model, a person). A cheap similarity w (embeddings) is always there. The pivot
algorithm joins each item to a pivot that the oracle says it belongs to; KwikBucks asks about
pivots in decreasing order of

    w(v, p) + boost * |{u among the nearest neighbours of v : u was joined to p}|,       (1)

so that the first question is mostly the last. Few pivots are sampled, those that belong to an
earlier pivot are no pivots, the items nearest to a pivot come first, and what is left of the
budget tests whether clusters that w holds alike are one. The budget is never passed, and the
number of clusters is not given.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.utils import check_random_state

from posterity._checks import at_least, integer, within
from posterity.clustering.correlation_clustering import KwikBucksResult, Oracle, Strong, by_appearance
from posterity.clustering.weak_signals import WeakSignal, as_signal, blocks, cross_sums, neighbours

__all__ = ["kwikbucks"]


def kwikbucks(
    weak: Shaped[ndarray, "n n"] | WeakSignal,
    strong: Strong,
    *,
    budget: int,
    n_pivots: int | None = None,
    pivots: Sequence[int] | Int[ndarray, " c"] | None = None,
    max_neighbors: int = 100,
    batch_size: int = 100,
    order_points: bool = True,
    boost_neighbors: bool = True,
    boost_weight: float = 0.1,
    n_boost_neighbors: int = 10,
    merge: bool = True,
    merge_budget: int = 0,
    merge_pairs: int = 20,
    merge_threshold: float = 0.5,
    merge_neighbors: int = 20,
    random_state: Any = None,
) -> KwikBucksResult:
    """Cluster items by few questions to an expensive oracle, led by a cheap similarity.

    Parameters
    ----------
    weak : ndarray of shape (n, n) or WeakSignal
        The cheap similarity, such as `EmbeddingSignal`, on the scale of ``boost_weight``. Where
        two are equal, the item with the smaller index comes first.
    strong : callable or ndarray of shape (n, n), bool
        The oracle: maps pairs of items (q, 2) to whether they belong together (q,). No pair is
        ever sent twice.
    budget : int
        Most pairs to ask, 0 or more.
    n_pivots : int, optional
        Candidates that are drawn, at most n; by default a tenth of the budget, at least 1.
    pivots : sequence of int, optional
        The candidates, in the order in which they are taken, instead of drawing them.
    max_neighbors : int, default=100
        Most pivots that an item asks about.
    batch_size : int, default=100
        Items whose order of questions is decided together, by what was joined before.
    order_points : bool, default=True
        Whether items that are similar to a candidate come first; else they come by index.
    boost_neighbors : bool, default=True
        Whether Equation 1 counts neighbours.
    boost_weight : float, default=0.1
        What a neighbour adds to a similarity.
    n_boost_neighbors : int, default=10
        How many nearest neighbours may.
    merge : bool, default=True
        Whether clusters are tested for being one.
    merge_budget : int, default=0
        Most pairs to ask for that, beside what is left of ``budget``.
    merge_pairs : int, default=20
        Pairs that a test of two clusters draws, one item from each, with replacement.
    merge_threshold : float, default=0.5
        Share of them, in [0, 1], that must belong together.
    merge_neighbors : int, default=20
        Two clusters are tested if an item of one is among so many nearest neighbours of
        an item of the other.
    random_state : int, RandomState or None, default=None
        Draws candidates, and the pairs of tests.

    Returns
    -------
    KwikBucksResult
        Labels, pivots, and how many questions were asked.

    Raises
    ------
    ValueError
        If an argument is out of range, sizes differ, ``weak`` is not finite, a matrix of
        answers is not symmetric, or the oracle returns anything but a truth value a pair.

    Notes
    -----
    1. The budget is hard in every step: in the official program the choice of pivots may pass it.
    2. Ties go to the smaller index; there, to the larger.
    3. A callable is asked for several items at once where the budget allows each of them
       every question that it could have; so answers do not depend on it.

    References
    ----------
    .. [1] Silwal, Ahmadian, Nystrom, McCallum, Ramachandran, Kazemi. KwikBucks: Correlation
       Clustering with Cheap-Weak and Expensive-Strong Signals. ICLR 2023. Section 3.

    Examples
    --------
    Six points in two heaps, and an oracle that knows them:

    >>> import numpy as np
    >>> from posterity.clustering import EmbeddingSignal, kwikbucks
    >>> angles = np.array([0.0, 0.1, 0.2, 1.5, 1.6, 1.7])
    >>> heap = np.array([0, 0, 0, 1, 1, 1])
    >>> signal = EmbeddingSignal(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    >>> ask = lambda pairs: heap[pairs[:, 0]] == heap[pairs[:, 1]]
    >>> result = kwikbucks(signal, ask, budget=20, n_pivots=4, random_state=0)
    >>> result.labels, result.n_queries <= 20
    (array([0, 0, 0, 1, 1, 1]), True)
    """
    signal = as_signal(weak)
    n = len(signal)
    oracle = Oracle(strong, n, integer("budget", budget, 0))
    rng = check_random_state(random_state)
    candidates = _candidates(pivots, n_pivots, n, budget, rng)
    limit = integer("max_neighbors", max_neighbors, 1)
    integer("batch_size", batch_size, 1)
    integer("n_boost_neighbors", n_boost_neighbors, 1)
    at_least("boost_weight", boost_weight, 0)
    integer("merge_budget", merge_budget, 0)
    integer("merge_pairs", merge_pairs, 1)
    within("merge_threshold", merge_threshold, 0, 1)
    integer("merge_neighbors", merge_neighbors, 1)

    alike = np.concatenate([signal(rows, candidates) for rows in blocks(n, len(candidates))])
    if not np.isfinite(alike).all():
        raise ValueError("weak must be finite, got NaN or infinity")
    home = np.full(n, -1)  # the pivot, by its place, that an item is joined to
    accepted = _independent(candidates, alike, oracle, limit, home)
    chosen = candidates[accepted]
    rest = np.setdiff1d(np.arange(n), candidates)
    if order_points:
        rest = rest[np.argsort(-alike[rest].max(1), kind="stable")]
    wanted = max(n_boost_neighbors * boost_neighbors, merge_neighbors * merge)
    near = neighbours(signal, wanted)
    joined = np.full(n, -1)  # as home, of the items that were assigned; pivots do not vote
    for start in range(0, len(rest), batch_size):
        if oracle.exhausted:
            break
        items = rest[start : start + batch_size]
        score = alike[np.ix_(items, accepted)]
        if boost_neighbors:
            votes = joined[near[items, :n_boost_neighbors]]
            counts = np.zeros(score.shape)
            np.add.at(counts, (np.nonzero(votes >= 0)[0], votes[votes >= 0]), 1)
            score = score + boost_weight * counts
        order = np.argsort(-score, axis=1, kind="stable")[:, :limit]
        home[items] = joined[items] = _assign(items, order, chosen, oracle)
    own = np.where(home >= 0, chosen[home], np.arange(n))  # each item's cluster, by its pivot or itself
    n_queries, exhausted = oracle.n_queries, oracle.exhausted
    if merge:
        oracle.budget += merge_budget
        own = _merge(
            signal, own, chosen, near[:, :merge_neighbors], oracle, rng, merge_pairs, merge_threshold
        )
    labels = by_appearance(own)
    return KwikBucksResult(labels, chosen, n_queries, oracle.n_queries - n_queries, exhausted)


def _independent(candidates: ndarray, alike: ndarray, oracle: Oracle, limit: int, home: ndarray) -> ndarray:
    """Return the candidates, by their place, that belong to no earlier pivot; the others find their home."""
    accepted = np.arange(len(candidates))  # the first n_pivots are
    n_pivots, home[candidates[0]] = 1, 0
    for place, item in enumerate(candidates[1:], start=1):
        pivots = accepted[:n_pivots]
        order = np.argsort(-alike[item, pivots], kind="stable")[:limit]
        pairs = np.stack([np.broadcast_to(item, order.shape), candidates[pivots[order]]], axis=1)
        for pair, pivot in zip(pairs[:, None], order, strict=True):
            if not oracle.left:
                oracle.exhausted = True
                return pivots
            if oracle.ask(pair)[0]:
                home[item] = pivot
                break
        else:
            home[item], accepted[n_pivots] = n_pivots, place
            n_pivots += 1
    return accepted[:n_pivots]


def _assign(items: ndarray, order: ndarray, pivots: ndarray, oracle: Oracle) -> ndarray:
    """Ask each item about pivots in its order until a yes; return the place of that pivot, or -1.

    As many items go on together as the budget would allow to ask everything: so none is asked
    that would not be if they came one after the other.
    """
    found = np.full(len(items), -1)
    start, depth = 0, order.shape[1]
    while start < len(items):
        together = max(1, oracle.left // depth)
        open_ = np.arange(start, min(start + together, len(items)))
        for turn in range(depth):
            if len(open_) > oracle.left:  # one item that has used the budget up
                oracle.exhausted = True
                return found
            yes = oracle.ask(np.stack([items[open_], pivots[order[open_, turn]]], axis=1))
            found[open_[yes]] = order[open_[yes], turn]
            open_ = open_[~yes]
            if not len(open_):
                break
        start += together
    return found


def _merge(
    signal: WeakSignal, own: ndarray, pivots: ndarray, near: ndarray, oracle: Oracle, rng: Any,
    n_pairs: int, threshold: float,
) -> ndarray:  # fmt: skip
    """Return each item's cluster after tests of pairs of clusters, the most alike first."""
    n = len(own)
    if oracle.left <= 0 or n < 2:
        return own
    heads = np.concatenate([pivots, np.setdiff1d(own, pivots)])  # clusters of pivots, then of one item
    number = np.empty(n, dtype=np.int64)
    number[heads] = np.arange(len(heads))
    cluster = number[own]
    ends = np.stack([np.repeat(cluster, near.shape[1]), cluster[near].ravel()])
    ends = np.unique(np.sort(ends[:, ends[0] != ends[1]], axis=0), axis=1)
    total = cross_sums(signal, cluster, ends)
    by_cluster = np.argsort(cluster, kind="stable")
    members = np.split(by_cluster, np.cumsum(np.bincount(cluster, minlength=len(heads)))[:-1])
    alive, known = np.ones(len(heads), dtype=bool), oracle.answers()
    into = np.arange(len(heads))
    for a, b in ends[:, np.argsort(-total, kind="stable")].T:
        if not (alive[a] and alive[b]):
            continue
        drawn = np.stack(
            [side[rng.randint(len(side), size=n_pairs)] for side in (members[a], members[b])], axis=1
        )
        keys = oracle.keys(drawn)
        new = {key: k for k, key in enumerate(keys) if key not in known}
        if len(new) > oracle.left:
            break
        known.update(zip(new, oracle.ask(drawn[list(new.values())]).tolist(), strict=True))
        if np.mean([known[key] for key in keys]) >= threshold:
            alive[b], into[b] = False, a
    _, joined = connected_components(
        coo_array((np.ones(len(into)), (np.arange(len(into)), into)), shape=(len(into), len(into))),
        directed=False,
    )
    return joined[cluster]


def _candidates(pivots: Any, n_pivots: int | None, n: int, budget: int, rng: Any) -> ndarray:
    if pivots is None:
        most = min(n, max(1, budget // 10)) if n_pivots is None else integer("n_pivots", n_pivots, 1)
        if most > n:
            raise ValueError(f"n_pivots must be at most the {n} items, got {most}")
        return rng.permutation(n)[:most]
    if n_pivots is not None:
        raise ValueError("n_pivots must not be given beside pivots")
    chosen = np.asarray(pivots)
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"pivots must be integers of shape (p,), at least one, got {chosen.dtype} {chosen.shape}"
        )
    outside = chosen[(chosen < 0) | (chosen >= n)]
    if len(outside):
        raise ValueError(f"pivots must be items from 0 to {n - 1}, got {outside[0]}")
    if len(np.unique(chosen)) < len(chosen):
        raise ValueError(f"pivots must be different, got {chosen.tolist()}")
    return chosen.astype(np.int64)
