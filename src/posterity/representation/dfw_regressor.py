"""DFW as an estimator: a task is a label of each row."""

from collections.abc import Hashable
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from posterity._checks import integer
from posterity.representation.dfw import dfw

__all__ = ["DFWRegressor"]

RIDGE = 1e-8  # of the mean diagonal of the Gram matrix: for constant columns, and parts of fewer rows than features


class DFWRegressor(TransformerMixin, MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Linear regression of several tasks through a representation that they share.

    Parameters
    ----------
    n_components : int, default=5
        Dimension of the representation; at most as many as features, and as outputs of all tasks together, are used.
    max_iter, lr, debias, whiten, partition, gap, random_state
        As for `dfw`.

    Attributes
    ----------
    components_ : ndarray of shape (r, n_features)
        Orthonormal rows.
    heads_ : dict of task to ndarray of shape (n_outputs, r)
    tasks_ : list
        Labels of the tasks, sorted.
    n_iter_ : int

    Notes
    -----
    There is no intercept: centre each task, or add a column of ones.

    References
    ----------
    .. [1] Zhang, Toso, Anderson, Matni. Sample-Efficient Linear Representation Learning from Non-IID
       Non-Isotropic Data. ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.representation import DFWRegressor
    >>> rng = np.random.default_rng(0)
    >>> X, task = rng.normal(size=(300, 6)), np.repeat(["a", "b", "c"], 100)
    >>> y = X[:, :2] @ rng.normal(size=(2, 4))
    >>> model = DFWRegressor(2, random_state=0).fit(X, y, task)
    >>> model.components_.shape, model.predict(X[:2], ["a", "b"]).shape
    ((2, 6), (2, 4))
    """

    def __init__(
        self, n_components: int = 5, *, max_iter: int = 200, lr: float | Literal["auto"] = "auto", debias: bool = True,
        whiten: bool = True, partition: Literal["fixed", "shuffle", "blocks"] = "shuffle", gap: int = 0,
        random_state: int | None = None,
    ) -> None:  # fmt: skip
        self.n_components = n_components
        self.max_iter = max_iter
        self.lr = lr
        self.debias = debias
        self.whiten = whiten
        self.partition = partition
        self.gap = gap
        self.random_state = random_state

    @torch.inference_mode(False)
    def fit(self, X: Any, y: Any, task: Any = None) -> "DFWRegressor":
        """Fit the representation and the heads.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
        y : array-like of shape (n,) or (n, n_outputs)
        task : array-like of shape (n,), optional
            Label of each row's task; None: one task.

        Returns
        -------
        DFWRegressor
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        integer("n_components", self.n_components, 1)
        self._one = y.ndim == 1
        y = np.asarray(y, dtype=np.float64).reshape(len(X), -1)
        labels, code = self._labels(task, len(X))
        each = [X[code == k] for k in range(len(labels))], [y[code == k] for k in range(len(labels))]
        norms = [_norm(rows) for rows in each[0]]
        # a whitened round is the same in any unit of a task, so that the ridge can mean the same to all
        units = norms if self.whiten else [1.0] * len(norms)
        ridge = RIDGE / X.shape[1] * max(norm / unit for norm, unit in zip(norms, units, strict=True)) ** 2
        x, y = ([torch.from_numpy(v / unit) for v, unit in zip(side, units, strict=True)] for side in each)
        r = min(self.n_components, X.shape[1], len(labels) * each[1][0].shape[1])
        with torch.no_grad():
            found = dfw(x, y, r, max_iter=self.max_iter, lr=self.lr,
                        debias=self.debias, whiten=self.whiten, partition=self.partition, gap=self.gap,
                        ridge=ridge, random_state=self.random_state)  # fmt: skip
        self.components_ = found.phi.numpy()
        self.tasks_ = labels
        self.heads_ = dict(zip(labels, found.weights.numpy(), strict=True))
        self.n_iter_ = found.n_iter
        return self

    def transform(self, X: Any) -> ndarray:
        """Return features.

        Parameters
        ----------
        X : array-like of shape (n, n_features)

        Returns
        -------
        ndarray of shape (n, r)
        """
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.components_.T

    def fit_head(self, X: Any, y: Any) -> ndarray:
        """Return the head of a new task: least squares on its features.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
        y : array-like of shape (n,) or (n, n_outputs)

        Returns
        -------
        ndarray of shape (n_outputs, r)
            ``transform(X) @ head.T`` predicts.
        """
        z = self.transform(X)
        y = np.asarray(y, dtype=np.float64)
        if y.ndim not in (1, 2) or len(y) != len(z):
            raise ValueError(f"y must have a row for each of the {len(z)} of X, got shape {y.shape}")
        if not np.isfinite(y).all():
            raise ValueError("y must be finite, got NaN or infinity")
        return np.linalg.lstsq(z, y.reshape(len(z), -1), rcond=None)[0].T

    def predict(self, X: Any, task: Any = None) -> ndarray:
        """Return predictions of the heads.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
        task : array-like of shape (n,), or one label, optional
            May be left out where there is one task.

        Returns
        -------
        ndarray of shape (n,) or (n, n_outputs)
            As ``y`` was.
        """
        z = self.transform(X)
        if task is None and len(self.tasks_) > 1:
            raise ValueError(f"task must say which of the {len(self.tasks_)} tasks each row is of")
        if task is None:
            out = z @ self.heads_[self.tasks_[0]].T
            return out[:, 0] if self._one else out
        labels, code = self._labels([task] * len(z) if np.ndim(task) == 0 else task, len(z))
        out = np.empty((len(z), next(iter(self.heads_.values())).shape[0]))
        for k, label in enumerate(labels):
            if label not in self.heads_:
                raise ValueError(
                    f"task {label!r} was not fitted: fit_head(X, y) gives a head for transform(X)"
                )
            out[code == k] = z[code == k] @ self.heads_[label].T
        return out[:, 0] if self._one else out

    def _labels(self, task: Any, n: int) -> tuple[list[Hashable], ndarray]:
        if task is None:
            return [None], np.zeros(n, dtype=int)
        task = np.asarray(task)
        if task.shape != (n,):
            raise ValueError(f"task must have a label for each of the {n} rows of X, got shape {task.shape}")
        labels, code = np.unique(task, return_inverse=True)
        return labels.tolist(), code


def _norm(X: ndarray) -> float:
    """Return the Frobenius norm, also where squares would overflow; 1 where it is 0."""
    most = float(np.abs(X).max())
    return most * float(np.linalg.norm(X / most)) if most else 1.0
