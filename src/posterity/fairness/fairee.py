"""FaiREE: one threshold a group, whose true gap is within alpha with probability 1 - delta.

The k-th smallest of n continuous scores has a true quantile that is Beta(k, n + 1 - k),
whatever the distribution. So with the k_a-th smallest score of the positives of group a
as threshold of group a, the true gap between the groups' true-positive rates is

    F_0(tau_0) - F_1(tau_1) = U_0 - U_1,    U_a ~ Beta(k_a, n_a + 1 - k_a),    (1)

independent, and P(|U_0 - U_1| > alpha) is a number known before any test data is seen.
Pairs of ranks (k_0, k_1) that keep it at delta or below are the candidates; of these the
one with the smallest estimated error is taken. With 35 positives in each group, the pair
of the largest scores breaks alpha = 0.1 with probability 0.024.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import gammaln
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.utils import _safe_indexing, check_random_state, indexable
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)  # fmt: skip

from posterity._checks import at_least, one_of, within

__all__ = ["FaiREE", "FairThresholds", "fair_thresholds", "violation_probability"]

Constraint = Literal["equal_opportunity", "predictive_equality", "equalized_odds", "demographic_parity"]
CONSTRAINTS = ("equal_opportunity", "predictive_equality", "equalized_odds", "demographic_parity")
CHUNK = 1 << 24  # probabilities held at once


def violation_probability(k0: Any, n0: Any, k1: Any, n1: Any, alpha: float) -> ndarray | float:
    """Return the probability that the true gap at a pair of ranks exceeds alpha: exact.

    Parameters
    ----------
    k0, n0, k1, n1 : int or array of int
        Rank of the threshold, from 1 to n, and number of scores of either group; they
        broadcast.
    alpha : float
        The gap, at least 0.

    Returns
    -------
    float or ndarray
        ``P(|U0 - U1| > alpha)`` for independent ``Ua ~ Beta(ka, na + 1 - ka)``, with an
        error below 1e-9; an array where an argument is one.

    Raises
    ------
    ValueError
        If an argument is no integer, a rank is not in 1 to n, or alpha is negative.

    References
    ----------
    .. [1] Li, Zou, Zhang. FaiREE: fair classification with finite-sample and
       distribution-free guarantee. ICLR 2023. Proposition 1.

    Examples
    --------
    One score a group: both quantiles are uniform, and their gap exceeds a half in a quarter
    of the cases.

    >>> from posterity.fairness import violation_probability
    >>> round(violation_probability(1, 1, 1, 1, alpha=0.5), 9)
    0.25
    """
    at_least("alpha", alpha, 0)
    arrays = [np.asarray(value) for value in (k0, n0, k1, n1)]
    for name, array in zip(("k0", "n0", "k1", "n1"), arrays, strict=True):
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got dtype {array.dtype}")
    sizes = {*zip(*(n.ravel().tolist() for n in np.broadcast_arrays(arrays[1], arrays[3])), strict=True)}
    k0, n0, k1, n1 = np.broadcast_arrays(*arrays)
    for name, k, n in (("k0", k0, n0), ("k1", k1, n1)):
        if (bad := (k < 1) | (k > n)).any():
            raise ValueError(f"{name} must be in 1 to n, got rank {k[bad][0]} of n={n[bad][0]}")
    out = np.empty(k0.shape)
    for size0, size1 in sizes:
        here = (n0 == size0) & (n1 == size1)
        rows, row = np.unique(k0[here], return_inverse=True)
        columns, column = np.unique(k1[here], return_inverse=True)
        out[here] = _violation(rows, size0, columns, size1, alpha)[row, column]
    return out if out.ndim else float(out)


@dataclass(frozen=True, eq=False)
class FairThresholds:
    """Two thresholds, and what is known about them.

    Attributes
    ----------
    thresholds : ndarray of shape (2,)
        Of each group; a case is positive if its score is greater.
    ranks : ndarray of shape (2,)
        Which order statistic each is, from 1: of the group's constrained cell, or for
        demographic parity of the whole group.
    probability : float
        Bound on the probability that the true gap exceeds alpha.
    error : float
        Estimated share of wrong decisions.
    n_candidates : int
        Pairs of ranks that satisfied the constraint.
    groups : ndarray of shape (2,)
        The groups, sorted.
    """

    thresholds: ndarray
    ranks: ndarray
    probability: float
    error: float
    n_candidates: int
    groups: ndarray


def fair_thresholds(
    scores: Float[ndarray, " n"], y: ndarray, groups: ndarray, *, alpha: float = 0.1, delta: float = 0.05,
    constraint: Constraint = "equal_opportunity",
) -> FairThresholds:  # fmt: skip
    """Choose the thresholds with the smallest estimated error among those known to be fair.

    Parameters
    ----------
    scores : ndarray of shape (n,)
        Of calibration cases that the scorer was not trained on; larger is more positive.
    y : ndarray of shape (n,)
        Two classes; the larger is positive.
    groups : ndarray of shape (n,)
        Two groups.
    alpha : float, default=0.1
        Largest gap allowed, in (0, 1).
    delta : float, default=0.05
        Probability with which the gap may be larger, in (0, 1).
    constraint : str, default="equal_opportunity"
        What must not differ by more than alpha: the true-positive rate; the false-positive
        rate ("predictive_equality"); both ("equalized_odds"); the rate of positive
        decisions ("demographic_parity").

    Returns
    -------
    FairThresholds
        Of equal errors the pair with the smallest ranks, group 0 first.

    Raises
    ------
    ValueError
        If there are not two classes and two groups in all four combinations, scores are not
        finite, lengths differ, an option is out of range, or no pair of ranks is fair.

    Warns
    -----
    UserWarning
        If constrained scores are tied; then equation 1 is not exact.

    Notes
    -----
    1. ``probability`` is exact for a pair of ranks fixed beforehand. The pair is chosen with
       the same data, which makes the promise optimistic where the error favours pairs at
       the edge of what is allowed. At ``delta=0.05`` the true gap exceeded alpha in 0.035 to
       0.052 of samples in five Gaussian settings, and in about a tenth of them for some
       scorers of the paper's synthetic design; a smaller delta buys a margin.
    2. For "equalized_odds" the ranks are of positives, and the negatives' quantile at a
       threshold is only known to lie between two order statistics: the bound takes the
       upper of one group less the lower of the other, a confidence bound of Clopper and
       Pearson's kind. The two probabilities are added and their sum is held to delta.
    3. Memory grows like n^1.5: about 1 GB for 20,000 scores in each constrained cell.

    References
    ----------
    .. [1] Li, Zou, Zhang. FaiREE: fair classification with finite-sample and
       distribution-free guarantee. ICLR 2023. Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.fairness import fair_thresholds
    >>> rng = np.random.default_rng(0)
    >>> y, groups = rng.integers(0, 2, (2, 600))
    >>> result = fair_thresholds(rng.normal(2.0 * y), y, groups, alpha=0.1, delta=0.05)
    >>> result.probability <= 0.05, result.thresholds.shape
    (True, (2,))
    """
    within("alpha", alpha, 0, 1, open_low=True, open_high=True)
    within("delta", delta, 0, 1, open_low=True, open_high=True)
    one_of("constraint", constraint, CONSTRAINTS)
    scores = column_or_1d(np.asarray(scores, dtype=np.float64))
    y, groups = column_or_1d(y), column_or_1d(groups)
    if not len(scores) == len(y) == len(groups):
        raise ValueError(
            f"scores, y and groups must have one length, got {len(scores)}, {len(y)} and {len(groups)}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    _, positive, names, group = _cells(y, groups)

    used = {"predictive_equality": (0,), "demographic_parity": (0, 1)}.get(constraint, (1,))
    pools, errors, below = [], [], []
    for a in (0, 1):
        cells = [np.sort(scores[(positive == c) & (group == a)]) for c in (0, 1)]
        pool, wrong = _order_statistics(cells, used)
        if len(np.unique(pool)) < len(pool):
            warnings.warn(
                f"scores of group {names.tolist()[a]!r} are tied, so the guarantee is not exact: "
                "add a tiny random jitter to them",
                UserWarning, stacklevel=2,
            )  # fmt: skip
        pools.append(pool)
        errors.append(wrong / len(y))
        below.append((np.searchsorted(cells[0], pool, "right"), len(cells[0])))

    m0, m1 = map(len, pools)
    best, n_candidates = (math.inf, 0, 0, 0.0), 0
    mean0, mean1 = np.arange(1, m0 + 1) / (m0 + 1), np.arange(1, m1 + 1) / (m1 + 1)
    # Beta(k, n + 1 - k) is sub-Gaussian with variance 1 / 4 (n + 2): means further apart than
    # this are a gap above alpha with a probability above delta
    reach = alpha + math.sqrt(-0.5 * math.log1p(-delta) * (1 / (m0 + 2) + 1 / (m1 + 2)))
    step = max(1, CHUNK // m1)
    for rows in (slice(low, min(low + step, m0)) for low in range(0, m0, step)):
        columns = slice(
            int(np.searchsorted(mean1, mean0[rows][0] - reach)),
            int(np.searchsorted(mean1, mean0[rows][-1] + reach, "right")),
        )
        k0, k1 = np.arange(m0)[rows] + 1, np.arange(m1)[columns] + 1
        risk = _violation(k0, m0, k1, m1, alpha)
        if constraint == "equalized_odds":
            (b0, n0), (b1, n1) = below
            b0, b1 = b0[rows], b1[columns]
            risk += _exceeds(b0 + 1, n0, b1, n1, alpha) + _exceeds(b1 + 1, n1, b0, n0, alpha).T
        allowed = risk <= delta
        n_candidates += int(allowed.sum())
        # rounded, so that equal errors are ties whatever the order in which they were added
        cost = np.where(allowed, np.round(errors[0][rows, None] + errors[1][columns], 12), np.inf)
        i, j = np.unravel_index(cost.argmin(), cost.shape) if cost.size else (0, 0)
        if cost.size and cost[i, j] < best[0]:
            best = float(cost[i, j]), int(k0[i]), int(k1[j]), float(risk[i, j])
    if not n_candidates:
        enough = math.ceil(math.log(delta / 2) / math.log1p(-alpha))
        of = ("negatives" if used == (0,) else "positives") if len(used) == 1 else "cases"
        alone = f" for the {of} alone" if constraint == "equalized_odds" else ""
        raise ValueError(
            f"no pair of thresholds keeps {constraint} within alpha={alpha} with probability "
            f"1 - delta={1 - delta:g}: groups {', '.join(map(repr, names.tolist()))} have {m0} and {m1} {of}, "
            f"{enough} in each are enough{alone}"
        )
    error, *ranks, probability = best
    taus = np.array([pool[k - 1] for pool, k in zip(pools, ranks, strict=True)])
    return FairThresholds(taus, np.array(ranks), probability, error, n_candidates, names)


class FaiREE(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """Any scorer, with one threshold a group that keeps the true gap below alpha.

    Parameters
    ----------
    estimator : classifier, optional
        The scorer, with ``predict_proba`` or ``decision_function``; by default
        ``LogisticRegression(max_iter=10_000)``.
    constraint, alpha, delta : optional
        See `fair_thresholds`.
    calibration_size : float, default=0.5
        Share of the rows that chooses the thresholds, in (0, 1); the others train the scorer.
    prefit : bool, default=False
        Whether the scorer is trained already; then all rows choose the thresholds.
    sensitive_column : int or str, optional
        The column of X that has the groups, where ``sensitive_features`` is not given; the
        scorer sees it too.
    random_state : int, RandomState or None, default=None
        Decides the split.

    Attributes
    ----------
    estimator_ : classifier
        The trained scorer.
    thresholds_ : dict
        The threshold of each group.
    result_ : FairThresholds
        What is known about them.
    classes_, groups_ : ndarray of shape (2,)
        Sorted; the second class is positive.
    n_features_in_ : int

    Raises
    ------
    ValueError
        At ``fit``, as `fair_thresholds` does, or if the groups are given nowhere; at
        ``predict``, if a group is new.
    NotFittedError
        If ``prefit`` is set and the scorer is not trained.

    References
    ----------
    .. [1] Li, Zou, Zhang. FaiREE: fair classification with finite-sample and
       distribution-free guarantee. ICLR 2023. Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.fairness import FaiREE
    >>> rng = np.random.default_rng(0)
    >>> y, groups = rng.integers(0, 2, (2, 1000))
    >>> X = rng.normal(size=(1000, 3)) + 2.0 * y[:, None]
    >>> model = FaiREE(random_state=0).fit(X, y, sensitive_features=groups)
    >>> model.predict(X, sensitive_features=groups).shape, model.result_.probability <= 0.05
    ((1000,), True)
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        constraint: Constraint = "equal_opportunity",
        alpha: float = 0.1,
        delta: float = 0.05,
        calibration_size: float = 0.5,
        prefit: bool = False,
        sensitive_column: int | str | None = None,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.constraint: Constraint = constraint
        self.alpha = alpha
        self.delta = delta
        self.calibration_size = calibration_size
        self.prefit = prefit
        self.sensitive_column = sensitive_column
        self.random_state = random_state

    def fit(self, X: Any, y: Any, *, sensitive_features: Any = None) -> "FaiREE":
        """Train the scorer on one part of the rows and choose the thresholds on the other.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Whatever the scorer takes.
        y : array of shape (n,)
            Two classes.
        sensitive_features : array of shape (n,), optional
            The group of each row.

        Returns
        -------
        FaiREE
            The fitted estimator.
        """
        validate_data(self, X, y, skip_check_array=True)
        (X,) = indexable(X)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        groups = self._groups(X, sensitive_features)
        check_consistent_length(X, y, groups)
        self.classes_, positive, self.groups_, group = _cells(y, groups)
        scorer: Any = LogisticRegression(max_iter=10_000) if self.estimator is None else self.estimator
        rows = np.arange(len(y))
        if self.prefit:
            check_is_fitted(scorer)
            self.estimator_ = scorer
        else:
            within("calibration_size", self.calibration_size, 0, 1, open_low=True, open_high=True)
            cell = 2 * positive + group
            if min(np.bincount(cell)) < 2:
                raise ValueError("each class of each group needs two rows to be split, got one")
            train, rows = train_test_split(
                rows,
                test_size=self.calibration_size,
                stratify=cell,
                random_state=check_random_state(self.random_state),
            )
            self.estimator_ = clone(scorer).fit(_safe_indexing(X, train), y[train])
        known = getattr(self.estimator_, "classes_", self.classes_)
        if not np.array_equal(known, self.classes_):
            raise ValueError(f"estimator must know the classes {list(self.classes_)}, got {list(known)}")
        self.result_ = fair_thresholds(
            self._scores(_safe_indexing(X, rows)), y[rows], groups[rows],
            alpha=self.alpha, delta=self.delta, constraint=self.constraint,
        )  # fmt: skip
        self.thresholds_ = dict(zip(self.groups_.tolist(), self.result_.thresholds.tolist(), strict=True))
        return self

    def decision_function(self, X: Any, *, sensitive_features: Any = None) -> ndarray:
        """Return score less threshold of the group.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Rows.
        sensitive_features : array of shape (n,), optional
            The group of each row.

        Returns
        -------
        ndarray of shape (n,)
            Positive where the decision is the second class.
        """
        check_is_fitted(self, "result_")
        validate_data(self, X, reset=False, skip_check_array=True)
        groups = self._groups(X, sensitive_features)
        check_consistent_length(X, groups)
        second = groups == self.groups_[1]
        if len(new := np.unique(groups[~second & (groups != self.groups_[0])])):
            raise ValueError(f"groups must be among {self.groups_.tolist()}, got {new.tolist()}")
        return self._scores(X) - self.result_.thresholds[second.astype(int)]

    def predict(self, X: Any, *, sensitive_features: Any = None) -> ndarray:
        """Return the class of each row: the second where the score exceeds the group's threshold.

        Parameters
        ----------
        X : array or DataFrame of shape (n, d)
            Rows.
        sensitive_features : array of shape (n,), optional
            The group of each row.

        Returns
        -------
        ndarray of shape (n,)
            Of ``classes_``.
        """
        positive = self.decision_function(X, sensitive_features=sensitive_features) > 0
        return self.classes_[positive.astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _groups(self, X: Any, sensitive_features: Any) -> ndarray:
        if sensitive_features is not None:
            return column_or_1d(sensitive_features)
        if self.sensitive_column is None:
            raise ValueError("sensitive_features must be given where sensitive_column is None, got None")
        return column_or_1d(_safe_indexing(X, self.sensitive_column, axis=1))

    def _scores(self, X: Any) -> ndarray:
        if hasattr(self.estimator_, "predict_proba"):
            return np.asarray(self.estimator_.predict_proba(X)[:, 1], dtype=np.float64)
        return np.asarray(self.estimator_.decision_function(X), dtype=np.float64)


def _cells(y: ndarray, groups: ndarray) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Return classes, codes of y, groups and codes of groups, all four cells being occupied."""
    (labels, positive), (names, group) = (np.unique(v, return_inverse=True) for v in (y, groups))
    for name, values, one, many in (("y", labels, "class", "classes"), ("groups", names, "group", "groups")):
        if (count := len(values)) != 2:
            shown = ", ".join(map(repr, values.tolist()[:10]))
            hint = "Only binary classification is supported. " if name == "y" and count > 2 else ""
            raise ValueError(
                f"{hint}{name} must have two {many}, got {count} {one if count == 1 else many}: {shown}"
            )
    for c, a in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if not ((positive == c) & (group == a)).any():
            raise ValueError(f"no case of group {names.tolist()[a]!r} has y = {labels.tolist()[c]!r}")
    return labels, positive, names, group


def _order_statistics(cells: list[ndarray], used: tuple[int, ...]) -> tuple[ndarray, ndarray]:
    """Return the sorted scores of some cells of a group, and how many errors each would make."""
    pool = np.concatenate([cells[c] for c in used])
    owner = np.repeat(used, [len(cells[c]) for c in used])
    order = np.argsort(pool, kind="stable")
    pool, owner = pool[order], owner[order]
    wrong = np.zeros(len(pool))
    for c in (0, 1):
        n, own = len(cells[c]), owner == c
        # the k-th of n scores has the quantile k / (n + 1), what lies between two the middle
        k = np.where(own, np.cumsum(own), np.searchsorted(cells[c], pool, "right") + 0.5)
        wrong += n * (k if c else n + 1 - k) / (n + 1)
    return pool, wrong


def _violation(k0: ndarray, n0: int, k1: ndarray, n1: int, alpha: float) -> ndarray:
    """Return P(|U0 - U1| > alpha) for all pairs of ranks."""
    return np.minimum(_exceeds(k0, n0, k1, n1, alpha) + _exceeds(k1, n1, k0, n0, alpha).T, 1.0)


def _exceeds(k0: ndarray, n0: int, k1: ndarray, n1: int, alpha: float) -> ndarray:
    """Return P(U0 - U1 > alpha) for all pairs of ranks, U(0) = 0 and U(n + 1) = 1 included.

    It is the integral of F1(u - alpha) f0(u) over u from alpha to 1. For whole ranks that is a
    polynomial of degree n0 + n1 - 1, so Gauss's rule is exact at (n0 + n1) / 2 nodes. Fewer
    do: the nodes crowd at both ends as the betas narrow there, and in the angle of the
    nodes the integrand is no narrower than (n0 + n1)^(-1/2).
    """
    if alpha >= 1:
        return np.zeros((len(k0), len(k1)))
    nodes = min((n0 + n1) // 2 + 1, 16 + math.ceil(5 * math.sqrt(n0 + n1)))
    x, weight = _gauss(nodes)
    x, weight = (1 - alpha) * (x + 1) / 2, (1 - alpha) * weight / 2
    measure = n0 * _binomial(k0 - 1, n0 - 1, x + alpha) * weight
    measure[k0 == 0] = 0.0
    # the last node is for the rank n0 + 1 alone, whose mass is at 1
    tail = np.cumsum(_binomial(np.arange(n1, -1, -1), n1, np.append(x, 1 - alpha)), 0)[::-1]
    tail = np.vstack([tail, np.zeros(nodes + 1)])[k1]
    measure[k0 == n0 + 1] = 0.0
    last = np.zeros((len(k0), 1))
    last[k0 == n0 + 1] = 1.0
    return np.clip(np.hstack([measure, last]) @ tail.T, 0.0, 1.0)


@cache
def _gauss(nodes: int) -> tuple[ndarray, ndarray]:
    return np.polynomial.legendre.leggauss(nodes)


def _binomial(k: ndarray, n: int, p: ndarray) -> ndarray:
    """Return the probability of k successes in n, for all pairs of k and p."""
    k = np.clip(k, 0, n)[:, None]
    p = np.minimum(p, 1 - np.finfo(float).epsneg)  # log1p(-1) times no failures would be NaN
    out = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * np.log(p) + (n - k) * np.log1p(-p)
    return np.exp(out, out=out)
