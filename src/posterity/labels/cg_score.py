"""Complexity-gap score: which labelled examples are probably wrong, or redundant, without training.

A two-layer ReLU network of infinite width, its first layer trained, sees samples of unit norm
u_i through the kernel

    H_ij = u_i.u_j (pi - arccos u_i.u_j) / (2 pi),                                 (1)

and how far its parameters move to fit labels +1 and -1, like its error on new data, is bounded
by the complexity y' H^-1 y. The score of an example is how much of that goes when it is left out,

    CG_i = y' H^-1 y - y_-i' (H_-i)^-1 y_-i = a_i^2 / G_ii,   G = H^-1, a = G y:   (2)

by the Schur complement one factorisation gives all of them. An example whose neighbours agree
with its label adds little; one among others of another label adds much. With y_i taken out of
a_i the score is G_ii, how far the example is from all others, plus twice y_i sum_j G_ij y_j,
negative where labels agree, plus what is left. Of several classes each is scored against
random examples of the others, as many as it has.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.linalg.lapack import dtrtri
from sklearn.utils import check_random_state
from torch import Tensor

from posterity._checks import at_least, integer, one_of, within
from posterity.labels._arrays import array, numbers

__all__ = ["cg_scores", "prune_by_score", "relu_ntk_gram"]

Samples = Shaped[ndarray, "n *shape"] | Shaped[Tensor, "n *shape"] | ArrayLike
Values = Shaped[ndarray, " n"] | Shaped[Tensor, " n"] | ArrayLike
ONCE = 10_000  # points of which the whole Gram matrix is kept
AT_ONCE = 2**16  # numbers of a block, half a megabyte
NEAR = 1e-6  # where 1 - |cosine| is smaller, the arccosine loses half its digits
ALIKE = 1e-12  # angle below which H no longer tells two points apart
TERMS = ("self", "cross", "rest")


def relu_ntk_gram(X: Samples, *, jitter: float = 0.0) -> Float64[ndarray, "n n"]:
    """Return the kernel of equation 1 between all pairs of samples.

    Parameters
    ----------
    X : array or Tensor of shape (n, ...)
        Finite numbers, no row all zero; each sample is flattened. Its scale does not matter.
    jitter : float, default=0.0
        Added to the diagonal, which is 1/2; at least 0.

    Returns
    -------
    ndarray of shape (n, n)
        Symmetric, in float64. Positive definite if no two samples have one direction.

    Raises
    ------
    ValueError
        If ``X`` or ``jitter`` does not fit.

    References
    ----------
    .. [1] Arora et al. Fine-Grained Analysis of Optimization and Generalization for
       Overparameterized Two-Layer Neural Networks. ICML 2019. Section 3.

    Examples
    --------
    Right angles, and half of one (0.7071 times 3/8):

    >>> from posterity.labels import relu_ntk_gram
    >>> relu_ntk_gram([[2, 0], [0, 1], [3, 3]]).round(4)
    array([[0.5   , 0.    , 0.2652],
           [0.    , 0.5   , 0.2652],
           [0.2652, 0.2652, 0.5   ]])
    """
    return _gram(_directions(X), at_least("jitter", jitter, 0))


def cg_scores(
    X: Samples,
    y: Values,
    *,
    ratio: float | None = 1.0,
    n_repeats: int = 10,
    jitter: float = 0.0,
    random_state: Any = None,
    return_terms: bool = False,
) -> Float64[ndarray, " n"] | tuple[Float64[ndarray, " n"], dict[str, Float64[ndarray, " n"]]]:
    """Score each example by how much complexity goes with it, equation 2.

    High scores are probably mislabelled or odd, low ones redundant: hand them to `prune_by_score`.

    Parameters
    ----------
    X : array or Tensor of shape (n, ...)
        Pixels or features, finite, no row all zero; each sample is flattened. Its scale does not
        matter; shifting all samples, as centring does, changes the scores.
    y : array or Tensor of shape (n,)
        Labels of any type, two classes or more.
    ratio : float, optional, default=1.0
        How many examples of other classes a class of n_c is scored against: ``floor(ratio * n_c)``,
        or all if there are fewer; positive. None takes all, and nothing is random.
    n_repeats : int, default=10
        Draws of those examples over which scores are averaged, at least 1; a class that is scored
        against all others needs none.
    jitter : float, default=0.0
        Added to the diagonal of H, at least 0. Examples of one direction need it; 1e-8 will do.
    random_state : int, RandomState or None, default=None
        Decides the draws.
    return_terms : bool, default=False
        Whether to return the terms too.

    Returns
    -------
    ndarray of shape (n,)
        Scores, at least 0, in float64.
    dict of str to ndarray of shape (n,)
        If ``return_terms``: "self", "cross" and "rest"; the score is self + 2 cross + rest. Cross
        is lowest where labels agree, and near 0 or positive for mislabelled examples.

    Raises
    ------
    ValueError
        If an argument is out of range, shapes do not fit, there is one class only, or two rows of
        ``X`` have one direction (H is then singular) and ``jitter`` is 0.

    Notes
    -----
    1. The paper removes one example after the other; equation 2 needs no removal.
    2. The number of draws is ours; the official default is one.
    3. For pairs near 0 and 180 degrees the angle is taken from the difference or the sum of the
       directions, which the arccosine of their rounded product does not give.
    4. Time grows with the cube of the largest class (of all examples, where all enter), memory
       with its square; up to 10,000 examples H is computed once, and all pairs are checked for
       one direction; beyond that, those that meet.

    References
    ----------
    .. [1] Ki, Choi, Chung. Data Valuation Without Training of a Model. ICLR 2023. Section 3.

    Examples
    --------
    The third point lies among points of the other class:

    >>> import numpy as np
    >>> from posterity.labels import cg_scores
    >>> angle = np.radians([0, 10, 85, 80, 90, 100])
    >>> X = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    >>> scores = cg_scores(X, ["a", "a", "a", "b", "b", "b"], ratio=None)
    >>> int(scores.argmax())
    2
    """
    if ratio is not None:
        at_least("ratio", ratio, 0, strict=True)
    integer("n_repeats", n_repeats, 1)
    at_least("jitter", jitter, 0)
    rng = check_random_state(random_state)
    directions = _directions(X)
    n = len(directions)
    classes, codes = _classes(y, n)
    if len(classes) < 2:
        raise ValueError(f"y must have at least 2 classes, got {len(classes)}")
    counts = np.bincount(codes)
    others = n - counts
    drawn = others if ratio is None else np.minimum(np.floor(ratio * counts), others).astype(np.int64)
    # where all are drawn, one matrix serves all classes, and is overwritten
    block = _blocks(directions, jitter, n <= ONCE and bool((drawn < others).any()))
    total, all_in = np.zeros((len(TERMS) + 1, n)), np.flatnonzero(drawn == others)
    if len(all_in):
        signs = np.where(codes[:, None] == all_in, 1.0, -1.0)
        gaps = _gaps(block, np.arange(n), signs, jitter, 0)
        for k, c in enumerate(all_in):
            total[:, codes == c] = gaps[:, codes == c, k]
    for c in np.flatnonzero(drawn < others):
        inside, outside, m = np.flatnonzero(codes == c), np.flatnonzero(codes != c), int(drawn[c])
        signs = np.repeat([-1.0, 1.0], [m, len(inside)])[:, None]
        for _ in range(n_repeats):
            rows = np.concatenate([rng.choice(outside, m, replace=False), inside])
            total[:, inside] += _gaps(block, rows, signs, jitter, m)[..., 0] / n_repeats
    scores, *terms = total
    return (scores, dict(zip(TERMS, terms, strict=True))) if return_terms else scores


def prune_by_score(
    scores: Values,
    y: Values,
    fraction: float,
    *,
    drop: Literal["low", "high"] = "low",
    stratify: bool = True,
) -> Int[ndarray, " kept"]:
    """Return the examples that are kept when a fraction of them is dropped by score.

    Parameters
    ----------
    scores : array or Tensor of shape (n,)
        Finite, such as those of `cg_scores`.
    y : array or Tensor of shape (n,)
        Labels of any type.
    fraction : float
        Share to drop, in [0, 1).
    drop : {"low", "high"}, default="low"
        Whether the lowest scores go, redundant examples, or the highest, probably mislabelled
        ones. Of equal scores the first goes.
    stratify : bool, default=True
        Whether the fraction is dropped of each class, of which ``floor(n_c * (1 - fraction))``
        remain, possibly none, or of all together.

    Returns
    -------
    ndarray
        Sorted indices.

    Raises
    ------
    ValueError
        If an argument is out of range or shapes do not fit.

    References
    ----------
    .. [1] Ki, Choi, Chung. Data Valuation Without Training of a Model. ICLR 2023. Section 5.

    Examples
    --------
    >>> from posterity.labels import prune_by_score
    >>> prune_by_score([5, 1, 2, 9], ["a", "a", "b", "b"], 0.5)
    array([0, 3])
    >>> prune_by_score([5, 1, 2, 9], ["a", "a", "b", "b"], 0.5, drop="high", stratify=False)
    array([1, 2])
    """
    scores, _ = numbers("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (n,), got {scores.shape}")
    _, codes = _classes(y, len(scores), "scores")
    within("fraction", fraction, 0, 1, open_high=True)
    one_of("drop", drop, ("low", "high"))
    one_of("stratify", stratify, (True, False))
    order = np.argsort(scores if drop == "low" else -scores, kind="stable")
    groups = [order[codes[order] == c] for c in np.unique(codes)] if stratify else [order]
    # 10 * (1 - 0.9) is a little less than 1
    kept = [group[len(group) - math.floor(len(group) * (1 - fraction) + 1e-9) :] for group in groups]
    return np.sort(np.concatenate([order[:0], *kept]))


def _directions(X: Any) -> ndarray:
    """Return samples as rows of unit norm."""
    X, _ = numbers("X", X)
    if X.ndim < 2:
        raise ValueError(f"X must have a row a sample, of shape (n, ...), got {X.shape}")
    X = X.reshape(len(X), math.prod(X.shape[1:]))
    largest = np.abs(X).max(1, initial=0.0)
    if len(zero := np.flatnonzero(largest == 0)):
        raise ValueError(f"X must have no row of zeros, row {zero[0]} has no direction")
    X = X / largest[:, None]  # whose squares neither overflow nor vanish
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def _classes(y: Any, n: int, source: str = "X") -> tuple[ndarray, ndarray]:
    """Return the classes and each label's code."""
    y, _ = array("y", y)
    if y.shape != (n,):
        raise ValueError(f"y must have shape ({n},) for {source}, got {y.shape}")
    try:
        missing = np.flatnonzero(y != y)
        if len(missing):
            raise ValueError(f"y must have a label a row, row {missing[0]} is NaN")
        return np.unique(y, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"y must have labels of one type: {error}") from error


def _gram(directions: ndarray, jitter: float) -> ndarray:
    """Return H, worked out in place, some rows at a time."""
    n, d = directions.shape
    gram = directions @ directions.T
    rows = max(1, AT_ONCE // max(n, 1))
    angles = np.empty((min(rows, n), n))
    for start in range(0, n, rows):
        cosine = gram[start : start + rows]
        np.clip(cosine, -1, 1, out=cosine)
        angle = np.arccos(cosine, out=angles[: len(cosine)])
        near = np.flatnonzero(np.abs(cosine) > 1 - NEAR)
        for part in np.split(near, range(step := max(1, AT_ONCE // d), len(near), step)):
            i, j = np.divmod(part, n)
            side = np.sign(cosine[i, j])
            gap = np.linalg.norm(directions[start + i] - side[:, None] * directions[j], axis=1)
            small = 2 * np.arcsin(gap / 2)  # of the chord: nothing cancels
            angle[i, j] = np.where(side > 0, small, np.pi - small)
            cosine[i, j] = side * np.cos(small)
        cosine *= np.subtract(np.pi, angle, out=angle)
        cosine /= 2 * np.pi
    np.fill_diagonal(gram, 0.5 + jitter)
    return gram


def _blocks(directions: ndarray, jitter: float, once: bool) -> Callable[[ndarray], ndarray]:
    """Return what gives H of some rows, to be overwritten."""
    if not once:
        return lambda rows: _told_apart(_gram(directions[rows], jitter), rows, jitter)
    gram = _told_apart(_gram(directions, jitter), np.arange(len(directions)), jitter)
    return lambda rows: gram[np.ix_(rows, rows)]


def _told_apart(gram: ndarray, rows: ndarray, jitter: float) -> ndarray:
    """Return H unless two rows of it are equal: near angle 0 it is 1/2 less angle / (2 pi)."""
    if jitter == 0:
        first, second = np.divmod(np.flatnonzero(gram > 0.5 - ALIKE / (2 * np.pi)), len(gram))
        if len(apart := np.flatnonzero(first != second)):
            i, j = sorted(rows[[first[apart[0]], second[apart[0]]]].tolist())
            raise ValueError(
                f"X must have no two rows of one direction, rows {i} and {j} have it: remove one, or give "
                "jitter=1e-8"
            )
    return gram


def _gaps(
    block: Callable[[ndarray], ndarray], rows: ndarray, signs: ndarray, jitter: float, first: int
) -> ndarray:
    """Return scores and their three terms of rows from ``first`` on, for each column of signs."""
    try:
        factor = cholesky(block(rows).T, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError as error:
        gram = block(rows)
        np.fill_diagonal(gram, 0)
        i, j = sorted(rows[list(np.unravel_index(gram.argmax(), gram.shape))].tolist())
        raise ValueError(
            f"X must have rows whose directions differ by more than rounding, the nearest are rows {i} and "
            f"{j}: remove one, or give a jitter above {jitter:g}, such as {max(1e-8, 10 * jitter):g}"
        ) from error
    half = solve_triangular(factor, signs, lower=True, check_finite=False)
    a = solve_triangular(factor, half, lower=True, trans=1, check_finite=False)[first:]
    # the last rows and columns of the inverse of L are the inverse of its own last block
    inverse, _ = dtrtri(factor[first:, first:], lower=1, overwrite_c=1)
    own = np.einsum("ij,ij->j", inverse, inverse)[:, None]  # G_ii
    signs = signs[first:]
    others = a - signs * own
    return np.stack([a * a / own, np.broadcast_to(own, a.shape), signs * others, others * others / own])
