"""A black-box attack on fair clustering, and the two numbers that say how fair a clustering is.

With r_kg the share of group g in cluster k, and p_g its share overall,

    balance = min over clusters k and groups g of min(r_kg / p_g, p_g / r_kg),          (1)

which is 1 where every cluster mixes the groups as the data do, and 0 where a cluster lacks
one. A fair clustering trusts the groups that it is given. The adversary owns those of some
samples U, may set each to 0 or 1, sees nothing but the clustering that comes out, and wants
(1) on the other samples V, whose groups are true, as small as can be: a search over 2^|U|
vectors by a few dozen clusterings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray
from sklearn.utils import check_random_state

from posterity._checks import integer

__all__ = ["AttackResult", "cluster_balance", "cluster_group_entropy", "fairness_attack"]

PARENTS = 2  # best vectors so far, around which is searched


def cluster_balance(labels: ndarray, groups: ndarray) -> float:
    """Return how evenly the worst cluster mixes the groups, equation 1.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        The cluster of each sample: any names.
    groups : ndarray of shape (n,)
        The group of each sample: any names, at least two.

    Returns
    -------
    float
        In [0, 1], higher is fairer.

    Raises
    ------
    ValueError
        If lengths differ, nothing is given, a value is missing, or there is one group only.

    References
    ----------
    .. [1] Bera et al. Fair Algorithms for Clustering. NeurIPS 2019. Section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.fairness import cluster_balance
    >>> cluster_balance(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    1.0
    >>> cluster_balance(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 0, 1, 1]))  # 1/3 against 1/2
    0.6666666666666666
    """
    counts = _counts(labels, groups)
    # r / p of each cluster and group, in whole numbers until the division
    ratio = counts * counts.sum() / (counts.sum(1, keepdims=True) * counts.sum(0))
    return float(np.minimum(ratio, 1 / np.maximum(ratio, 1e-300)).min())


def cluster_group_entropy(labels: ndarray, groups: ndarray) -> float:
    """Return the mean over groups g of ``-sum_k r_kg log(r_kg + 1e-15)``.

    r_kg is the share of the group *within the cluster*, so this is no entropy of a
    distribution: it grows with the number of clusters, and compares clusterings of one k.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        The cluster of each sample: any names.
    groups : ndarray of shape (n,)
        The group of each sample: any names, at least two.

    Returns
    -------
    float
        At least 0 up to rounding, in nats; higher is fairer.

    Raises
    ------
    ValueError
        If lengths differ, nothing is given, a value is missing, or there is one group only.

    References
    ----------
    .. [1] Chhabra et al. Robust Fair Clustering. ICLR 2023. Section 2.

    Examples
    --------
    Two clusters of both groups alike cost ``2 * 0.5 log 2``:

    >>> import numpy as np
    >>> from posterity.fairness import cluster_group_entropy
    >>> round(cluster_group_entropy(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])), 4)
    0.6931
    """
    counts = _counts(labels, groups)
    share = counts / counts.sum(1, keepdims=True)
    return float(-(share * np.log(share + 1e-15)).sum(0).mean())


MEASURES: dict[str, Callable[[ndarray, ndarray], float]] = {
    "balance": cluster_balance,
    "entropy": cluster_group_entropy,
}


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack came to.

    Attributes
    ----------
    groups : ndarray of shape (n,)
        With the groups that did most harm at the attacked samples, 0 and 1.
    labels : ndarray of shape (n,)
        The clustering that they led to.
    value : float
        Its objective on the samples that were not attacked; at most ``clean_value``.
    clean_value : float
        The objective without an attack.
    history : ndarray of shape (budget,)
        The objective of each attempt, in order.
    """

    groups: ndarray
    labels: ndarray
    value: float
    clean_value: float
    history: ndarray


def fairness_attack(
    cluster: Callable[[ndarray], Int[ndarray, " n"]],
    groups: ndarray,
    attack_indices: Int[ndarray, " u"] | Sequence[int],
    eval_indices: Int[ndarray, " v"] | Sequence[int],
    *,
    objective: Any = "balance",
    budget: int = 20,
    random_state: Any = None,
) -> AttackResult:
    """Search for group labels of some samples that make a clustering unfair to the others.

    Parameters
    ----------
    cluster : callable
        ``cluster(groups)`` returns the labels, shape (n,), of a clustering that was given
        these groups. Give it a ``random_state`` of its own, lest the attack find luck.
    groups : ndarray of shape (n,)
        The true groups, 0 or 1; they stay as they are.
    attack_indices : sequence of int
        Samples whose groups the adversary sets, at least one, each once.
    eval_indices : sequence of int
        Samples on which the objective is measured, none of them attacked.
    objective : {"balance", "entropy"} or callable, default="balance"
        What is made small: `cluster_balance`, `cluster_group_entropy`, or a function
        ``(labels, groups)`` of the evaluated samples.
    budget : int, default=20
        Clusterings that the adversary sees, at least 1; that of the true groups is not
        counted. With 1, the groups are drawn at random once.
    random_state : int, RandomState or None, default=None
        Decides what is tried.

    Returns
    -------
    AttackResult
        Of the best attempt, or of the true groups where none does harm.

    Raises
    ------
    ValueError
        If groups are not 0 and 1, indices repeat, overlap or lie outside, an option is out of
        range, the evaluated samples have one group, or ``cluster`` returns no label a sample.

    Notes
    -----
    1. The search is of the kind of the official one, ZOOpt's RACOS. Half of the budget draws
       vectors uniformly. Then one of the best two so far is taken; bits are fixed to its
       values in random order until no worse vector agrees with all of them; a random number
       of those left is drawn anew.
    2. ``value`` never exceeds ``clean_value``: an adversary may leave the groups alone.

    References
    ----------
    .. [1] Chhabra et al. Robust Fair Clustering. ICLR 2023. Section 2, Algorithm 1.
    .. [2] Yu, Qian, Hu. Derivative-Free Optimization via Classification. AAAI 2016.

    Examples
    --------
    Against a clustering that does not look at groups nothing can be done:

    >>> import numpy as np
    >>> from posterity.fairness import fairness_attack
    >>> groups, labels = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 1, 1, 0, 0])
    >>> found = fairness_attack(lambda given: labels, groups, [4, 5], [0, 1, 2, 3], random_state=0)
    >>> found.value, found.clean_value, len(found.history)
    (1.0, 1.0, 20)
    """
    groups = _column("groups", groups)
    if groups.dtype.kind not in "iufb" or not np.isin(groups, (0, 1)).all():
        raise ValueError(f"groups must be 0 or 1, got {_some(np.unique(groups))}")
    groups = groups.astype(np.int64)
    attacked = _indices("attack_indices", attack_indices, len(groups))
    judged = _indices("eval_indices", eval_indices, len(groups))
    if len(both := np.intersect1d(attacked, judged)):
        raise ValueError(f"eval_indices must not be in attack_indices, got {_some(both)} in both")
    measure = MEASURES.get(objective) if isinstance(objective, str) else objective
    if not callable(measure):
        raise ValueError(f"objective must be 'balance', 'entropy' or a function, got {objective!r}")
    if isinstance(objective, str) and len(np.unique(groups[judged])) < 2:
        raise ValueError(f"eval_indices must hold both groups, got group {groups[judged][0]} only")
    budget = integer("budget", budget, 1)
    rng = check_random_state(random_state)

    def attempt(vector: ndarray) -> tuple[float, ndarray, ndarray]:
        poisoned = groups.copy()
        poisoned[attacked] = vector
        labels = np.asarray(cluster(poisoned.copy()))
        if labels.shape != groups.shape:
            raise ValueError(f"cluster must return labels of shape {groups.shape}, got {labels.shape}")
        value = float(measure(labels[judged], groups[judged]))
        if not np.isfinite(value):
            raise ValueError(f"objective must be finite, got {value}")
        return value, poisoned, labels

    best = clean = attempt(groups[attacked])
    tried = np.empty((budget, len(attacked)), dtype=np.int64)
    history = np.empty(budget)
    for turn in range(budget):
        if turn < (budget + 1) // 2:
            tried[turn] = rng.randint(0, 2, len(attacked))
        else:
            tried[turn] = _near_the_best(tried[:turn], history[:turn], rng)
        found = attempt(tried[turn])
        history[turn] = found[0]
        best = min(best, found, key=lambda each: each[0])  # the earlier of equals
    return AttackResult(best[1], best[2], best[0], clean[0], history)


def _near_the_best(tried: ndarray, values: ndarray, rng: Any) -> ndarray:
    """Return a vector of a random subcube that holds one of the best vectors and no worse one."""
    order = np.argsort(values, kind="stable")
    parent = tried[rng.choice(order[:PARENTS])]
    inside = tried[order[PARENTS:]]
    inside = inside[(inside != parent).any(1)]
    bits = rng.permutation(len(parent))
    fixed = 0
    while len(inside):
        inside = inside[inside[:, bits[fixed]] == parent[bits[fixed]]]
        fixed += 1
    free = bits[fixed:]
    if not len(free):
        return parent
    free = free[: rng.randint(1, len(free) + 1)]
    vector = parent.copy()
    vector[free] = rng.randint(0, 2, len(free))
    return vector


def _column(name: str, values: Any) -> ndarray:
    """Return an array of shape (n,), not empty; a column is one too."""
    values = np.asarray(values)
    if values.ndim != 1 and values.shape[1:] != (1,):
        raise ValueError(f"{name} must have shape (n,), got {values.shape}")
    if not len(values):
        raise ValueError(f"{name} must not be empty")
    return values.ravel()


def _codes(name: str, values: Any) -> tuple[ndarray, ndarray]:
    """Return codes from 0 in the order of appearance, and what they stand for; nothing may be missing."""
    codes, names = pd.factorize(_column(name, values))
    if len(missing := np.flatnonzero(codes < 0)):
        raise ValueError(f"{name} must not be missing, got no value in row {missing[0]}")
    return codes, np.asarray(names)


def _groups(name: str, values: Any, n: int | None = None) -> ndarray:
    """Return codes of at least two groups, of ``n`` samples where that is given."""
    if values is None:
        raise ValueError(f"{name} must be given: the protected group of each sample, got None")
    codes, names = _codes(name, values)
    if n is not None and len(codes) != n:
        raise ValueError(f"{name} must have a value for each of the {n} samples, got {len(codes)}")
    if len(names) < 2:
        raise ValueError(f"{name} must have at least two groups, got only {names.tolist()[0]!r}")
    return codes


def _counts(labels: Any, groups: Any) -> ndarray:
    """Return how many samples of each group a cluster has, shape (clusters, groups)."""
    cluster, _ = _codes("labels", labels)
    group = _groups("groups", groups)
    if len(cluster) != len(group):
        raise ValueError(f"groups must have the length of labels, {len(cluster)}, got {len(group)}")
    n_groups = int(group.max()) + 1
    cells = np.bincount(n_groups * cluster + group, minlength=n_groups * (int(cluster.max()) + 1))
    return cells.reshape(-1, n_groups)


def _indices(name: str, given: Any, n: int) -> ndarray:
    """Return indices of samples: integers in 0..n - 1, each once, at least one."""
    indices = _column(name, np.asarray(given))
    if indices.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got dtype {indices.dtype}")
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(f"{name} must be in 0..{n - 1}, got {indices.min()} to {indices.max()}")
    if len(np.unique(indices)) < len(indices):
        raise ValueError(
            f"{name} must not repeat, got {len(indices)} of which {len(np.unique(indices))} differ"
        )
    return indices


def _some(values: ndarray) -> str:
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")
