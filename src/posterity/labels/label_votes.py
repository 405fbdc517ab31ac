"""Votes of labelling rules: what class they speak for together, and which examples they see alike.

A rule votes for a class or abstains. With one accuracy a_j for each rule, its mistakes spread
evenly over the other classes, and shares pi of the classes, the rules' votes v say

    p(c | v) prop. to pi_c prod_{j: v_j = c} a_j prod_{j: v_j another} (1 - a_j) / (C - 1),     (1)

and a_j is how often, by these p, rule j was right. Repeating the two in turns, from the
majority, is EM for the model of Dawid and Skene: rules that agree with the others weigh more.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.special import softmax
from torch import Tensor

from posterity._checks import integer, one_of
from posterity.labels._arrays import array

__all__ = ["aggregate_votes", "vote_graph"]

Votes = Int[ndarray, "n m"] | Int[Tensor, "n m"] | ArrayLike
ROUNDS = 100  # of EM
FEW = 50  # votes below which a cosine above 0.99 is 1
PRODUCTS = 2**22  # products held at once


def aggregate_votes(
    votes: Votes, n_classes: int, *, method: Literal["em", "majority"] = "em"
) -> Float64[ndarray, "n c"]:
    """Return the probability of each class given the votes of unreliable rules.

    Parameters
    ----------
    votes : array or Tensor of shape (n, m), integer
        The class in 0..c-1 that each of m rules votes for, -1 where it abstains. That it
        abstains is no information.
    n_classes : int
        c, at least 2.
    method : {"em", "majority"}, default="em"
        Equation 1 after 100 rounds of EM; or the class with the most votes, shared where
        several have them.

    Returns
    -------
    ndarray of shape (n, c)
        Rows of probabilities; 1 / c each where every rule abstains.

    Raises
    ------
    ValueError
        If an argument is not as above.

    Notes
    -----
    1. The authors use the label model of Snorkel. Accuracies and shares of classes are here
       estimated with one vote more for right and one for wrong, and an example more of each class.
    2. Rules that err together count as often as they are.

    References
    ----------
    .. [1] Dawid, Skene. Maximum Likelihood Estimation of Observer Error-Rates Using the EM
       Algorithm. Applied Statistics 28, 1979.
    .. [2] Ratner et al. Snorkel: Rapid Training Data Creation with Weak Supervision. VLDB 2017.

    Examples
    --------
    >>> from posterity.labels import aggregate_votes
    >>> aggregate_votes([[0, 0, 1], [1, -1, -1], [-1, -1, -1], [0, 1, -1]], 2, method="majority")
    array([[1. , 0. ],
           [0. , 1. ],
           [0.5, 0.5],
           [0.5, 0.5]])
    """
    n_classes = integer("n_classes", n_classes, 2)
    one_of("method", method, ("em", "majority"))
    patterns, which, counts = np.unique(
        _votes(votes, n_classes), axis=0, return_inverse=True, return_counts=True
    )
    shape = (len(patterns), n_classes)
    row, rule = np.nonzero(patterns >= 0)
    told = sparse.csr_array(  # a row for each pattern and class, the rules that say so
        (np.ones(len(row)), (row * n_classes + patterns[row, rule], rule)),
        shape=(len(patterns) * n_classes, patterns.shape[1]),
    )
    tally = told.sum(1).reshape(shape)
    first = (tally == tally.max(1, keepdims=True)).astype(np.float64)
    share = first / first.sum(1, keepdims=True)  # where none voted, all have as many
    if method == "em":
        voted = tally.sum(1) > 0
        weight = np.where(voted, counts, 0)[:, None]
        n_votes = told.T @ np.repeat(weight, n_classes)
        for _ in range(ROUNDS):
            right = told.T @ (weight * share).ravel()
            accuracy = (1 + right) / (2 + n_votes)
            classes = (1 + (weight * share).sum(0)) / (n_classes + weight.sum())
            odds = np.log(accuracy) + np.log(n_classes - 1) - np.log1p(-accuracy)
            share = softmax(np.log(classes) + (told @ odds).reshape(shape), axis=1)
        share[~voted] = 1 / n_classes
    return share[which.reshape(-1)]


def vote_graph(
    votes: Votes, *, confident: Bool[ndarray, " n"] | Bool[Tensor, " n"] | ArrayLike | None = None
) -> sparse.csr_matrix:
    """Return the graph of examples on which the rules vote alike: cosine distance below 0.01.

    Votes of two classes count as -1 and +1, of more as one-hot vectors; abstaining as 0.
    Up to 49 votes an example, only those with the same votes are joined.

    Parameters
    ----------
    votes : array or Tensor of shape (n, m), integer
        Classes, -1 where a rule abstains.
    confident : array or Tensor of shape (n,), bool, optional
        Which examples may have edges; by default all.

    Returns
    -------
    csr_matrix of shape (n, n)
        Edges of weight 1, both ways, none of an example to itself. Examples on which all rules
        abstain have none. It has an entry for each pair that votes alike.

    Raises
    ------
    ValueError
        If an argument is not as above.

    References
    ----------
    .. [1] Pukdee et al. Label Propagation with Weak Supervision. ICLR 2023.

    Examples
    --------
    >>> from posterity.labels import vote_graph
    >>> vote_graph([[0, 1], [0, 1], [0, -1], [-1, -1]]).toarray()
    array([[0., 1., 0., 0.],
           [1., 0., 0., 0.],
           [0., 0., 0., 0.],
           [0., 0., 0., 0.]])
    """
    members, alike = _alike(votes, confident)
    graph = sparse.csr_matrix(members @ (sparse.eye_array(members.shape[1]) + alike) @ members.T)
    graph.setdiag(0)
    graph.eliminate_zeros()
    graph.sort_indices()
    return graph


def _alike(votes: Any, confident: Any) -> tuple[Any, Any]:
    """Return which examples (n) share which votes (g), and the pairs of different votes (g, g) alike."""
    votes = _votes(votes)
    take = (votes >= 0).any(1)
    if confident is not None:
        mask, _ = array("confident", confident)
        if mask.shape != take.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"confident must be bool of shape ({len(votes)},) for votes, got {mask.dtype} of shape {mask.shape}"
            )
        take = take & mask
    rows = np.flatnonzero(take)
    patterns, which = np.unique(votes[rows], axis=0, return_inverse=True)
    members = sparse.csr_array(
        (np.ones(len(rows)), (rows, which.reshape(-1))), shape=(len(votes), len(patterns))
    )
    return members, _pairs(patterns, 2 if votes.max() <= 1 else int(votes.max()) + 1)


def _pairs(patterns: ndarray, n_classes: int) -> sparse.csr_array:
    """Return which different vectors have a cosine above 0.99, in whole numbers."""
    many = np.flatnonzero((patterns >= 0).sum(1) >= FEW)
    at, rule = np.nonzero(patterns[many] >= 0)
    vote = patterns[many][at, rule]
    column = rule if n_classes == 2 else rule * n_classes + vote
    value = 2 * vote - 1 if n_classes == 2 else np.ones_like(vote)
    vectors = sparse.csr_array(
        (value, (at, column)), shape=(len(many), patterns.shape[1] * n_classes), dtype=np.int64
    )
    squares = vectors.multiply(vectors).sum(1)
    found = [np.zeros((2, 0), dtype=np.int64)]
    step = max(1, PRODUCTS // max(len(many), 1))
    for start in range(0, len(many), step):
        product = (vectors[start : start + step] @ vectors.T).toarray()
        bound = 99**2 * squares[start : start + step, None] * squares
        i, j = np.nonzero((product > 0) & (100**2 * product**2 > bound))
        found.append(many[np.stack([i + start, j])[:, i + start != j]])
    i, j = np.concatenate(found, axis=1)
    return sparse.csr_array((np.ones(len(i)), (i, j)), shape=(len(patterns), len(patterns)))


def _votes(votes: Any, n_classes: int | None = None) -> ndarray:
    """Return votes as whole numbers from -1 on."""
    found, _ = array("votes", votes)
    if found.ndim != 2 or 0 in found.shape:
        raise ValueError(f"votes must have shape (n, m), n and m at least 1, got {found.shape}")
    if found.dtype.kind not in "iu" and not (found.dtype.kind == "f" and (found == np.rint(found)).all()):
        raise ValueError(f"votes must be whole numbers, -1 where a rule abstains, got {found.dtype}")
    low, high = found.min(), found.max()
    if low < -1 or (n_classes is not None and high >= n_classes) or high >= 2**31:
        rule = "of at least -1" if n_classes is None else f"in -1..{n_classes - 1}"
        raise ValueError(f"votes must be {rule}, got {low if low < -1 else high}")
    return found.astype(np.int64)
