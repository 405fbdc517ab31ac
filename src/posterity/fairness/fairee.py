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

from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray
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

from posterity._checks import within
from posterity.fairness.group_thresholds import Constraint, _cells, fair_thresholds

__all__ = ["FaiREE"]


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
        self.classes_, positive, self.groups_, group = _cells(y, groups, "sensitive_features")
        scorer: Any = LogisticRegression(max_iter=10_000) if self.estimator is None else self.estimator
        rows = np.arange(len(y))
        if self.prefit:
            check_is_fitted(scorer)
            self.estimator_ = scorer
        else:
            within("calibration_size", self.calibration_size, 0, 1, open_low=True, open_high=True)
            cell = 2 * positive + group
            if min(np.bincount(cell)) < 2:
                raise ValueError(
                    "sensitive_features must give each group two rows of each class to be split, got one"
                )
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
            raise ValueError(f"sensitive_features must be among {self.groups_.tolist()}, got {new.tolist()}")
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
            groups = column_or_1d(sensitive_features)
        elif self.sensitive_column is not None:
            try:
                groups = column_or_1d(_safe_indexing(X, self.sensitive_column, axis=1))
            except (IndexError, KeyError) as error:
                raise ValueError(
                    f"sensitive_column must name a column of X, got {self.sensitive_column!r}"
                ) from error
        else:
            raise ValueError("sensitive_features must be given where sensitive_column is None, got None")
        if len(missing := np.flatnonzero(pd.isna(groups))):
            raise ValueError(f"sensitive_features must not be missing, got none in row {missing[0]}")
        return groups

    def _scores(self, X: Any) -> ndarray:
        if hasattr(self.estimator_, "predict_proba"):
            return np.asarray(self.estimator_.predict_proba(X)[:, 1], dtype=np.float64)
        return np.asarray(self.estimator_.decision_function(X), dtype=np.float64)
