"""Classes of whole series: the features of all steps, flattened, give one label.

Series may end early, in NaN: there the input and the features are 0, so that a label
depends on no padding. Training is by cross-entropy, with RAdam and clipped gradients.
"""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional as F

from posterity._random import drawn_seed, seeded
from posterity.timeseries.timesnet_training import SeriesEstimator

__all__ = ["TimesNetClassifier"]


class TimesNetClassifier(ClassifierMixin, SeriesEstimator):
    """Classes of whole series by `TimesNet`.

    Parameters
    ----------
    d_model, d_ff, n_layers, top_k, n_kernels, dropout
        See `TimesNet`.
    max_epochs : int, default=30
        Passes over the series, at most.
    batch_size : int, default=16
        Series in a step.
    lr : float, default=1e-3
        Rate of RAdam; gradients are clipped at norm 4.
    patience : int, default=10
        Epochs without improvement on the validation part before training stops.
    validation_fraction : float, default=0.1
        Share of each class, drawn at random, held out for stopping; 0, or classes too
        small for it: no early stopping.
    device : str, default="cpu"
        As torch names it.
    random_state : int, RandomState instance or None, default=None
        Decides initial weights, the validation part, batches and dropout.

    Attributes
    ----------
    net_ : TimesNet
        The trained network; it chooses periods for each series alone.
    losses_ : list of float
        Cross-entropy on the training series, by epoch.
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    mean_, scale_ : ndarray of shape (n_variables,)
        Mean and deviation of each variable over all training series.
    n_features_in_ : int
        Length of the second axis of the training series.

    Raises
    ------
    ValueError
        If a parameter is out of range, there are fewer than two classes, or a series has
        NaN before its end.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.timeseries import TimesNetClassifier
    >>> t, y = np.arange(24), np.arange(40) % 2
    >>> X = np.sin(2 * np.pi * t / 12 + y[:, None] * np.pi)
    >>> model = TimesNetClassifier(d_model=4, d_ff=4, n_kernels=2, max_epochs=5, lr=0.02, random_state=0)
    >>> float(model.fit(X, y).score(X, y))
    1.0
    """

    def __init__(
        self, *, d_model: int = 16, d_ff: int = 32, n_layers: int = 2, top_k: int = 3, n_kernels: int = 6,
        dropout: float = 0.1, max_epochs: int = 30, batch_size: int = 16, lr: float = 1e-3,
        patience: int = 10, validation_fraction: float = 0.1, device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.d_model = d_model
        self.d_ff = d_ff
        self.n_layers = n_layers
        self.top_k = top_k
        self.n_kernels = n_kernels
        self.dropout = dropout
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = True
        return tags

    def _read(self, X: Any, y: Any = "no_validation", *, reset: bool) -> tuple[ndarray, ndarray, Any]:
        """Return series (n, T, c), where they are real (n, T), and y."""
        X = validate_data(
            self, X, y, reset=reset, dtype=np.float64, allow_nd=True, ensure_all_finite="allow-nan"
        )
        X, y = X if isinstance(X, tuple) else (X, None)
        X = X[..., None] if X.ndim == 2 else X
        if X.ndim != 3 or X.shape[2] == 0:
            raise ValueError(f"X must be (n, time, variables) or (n, time), got shape {X.shape}")
        if X.shape[1] < 2:
            raise ValueError("X must have at least 2 time steps, got n_features = 1")
        real = ~np.isnan(X).any(2)
        ended = ~np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1]
        if (broken := ~real & ~ended).any() or ended.all(1).any():
            row = int(np.flatnonzero(broken.any(1) | ended.all(1))[0])
            raise ValueError(f"X must have NaN at the end of a series only, got others in series {row}")
        if not reset and X.shape[2] != len(self.mean_):
            raise ValueError(f"X must have the {len(self.mean_)} variables of fit, got {X.shape[2]}")
        return np.where(real[..., None], X, np.nan), real, y

    @torch.inference_mode(False)  # grad mode too
    def fit(self, X: Any, y: Any) -> "TimesNetClassifier":
        """Train on labelled series.

        Parameters
        ----------
        X : array-like of shape (n, time, n_variables) or (n, time)
            Series; shorter ones end in NaN.
        y : array-like of shape (n,)
            Labels, at least two different ones.

        Returns
        -------
        TimesNetClassifier
            Itself.
        """
        X, real, y = self._read(X, y, reset=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got {len(self.classes_)} class")
        self._standardise(X)
        series, real = self._tensor(X), torch.as_tensor(real, device=self.device)
        target = torch.as_tensor(codes, device=self.device)
        with seeded(drawn_seed(self.random_state), self.device):
            net = self._network(X.shape[2], X.shape[1], "classify", n_classes=len(self.classes_))
            order = torch.randperm(len(codes))
            of = [order[target[order].cpu() == code] for code in range(len(self.classes_))]
            cuts = [round(self.validation_fraction * len(rows)) for rows in of]
            held_out = torch.cat([rows[:cut] for rows, cut in zip(of, cuts, strict=True)])
            train = torch.cat([rows[cut:] for rows, cut in zip(of, cuts, strict=True)])

            def loss(rows: Tensor) -> Tensor:
                return F.cross_entropy(net(series[rows], padding_mask=real[rows]), target[rows])

            self._train(net, loss, train, held_out, torch.optim.RAdam, decay=1.0, clip=4.0)
        return self

    def predict_proba(self, X: Any) -> ndarray:
        """Return the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n, time, n_variables) or (n, time)
            Series as long as those of ``fit``; shorter ones end in NaN.

        Returns
        -------
        ndarray of shape (n, n_classes), float32
            Columns in the order of ``classes_``.
        """
        check_is_fitted(self)
        X, real, _ = self._read(X, reset=False)
        logits = self._predict(self._tensor(X), padding_mask=torch.as_tensor(real, device=self.device))
        return torch.as_tensor(logits).softmax(1).numpy()

    def predict(self, X: Any) -> ndarray:
        """Return the most probable label of each series.

        Parameters
        ----------
        X : array-like of shape (n, time, n_variables) or (n, time)
            As for ``predict_proba``.

        Returns
        -------
        ndarray of shape (n,)
            Labels.
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
