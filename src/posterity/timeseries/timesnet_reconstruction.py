"""Gaps filled and anomalies found: what the rhythm of a series says should be there.

The imputer hides entries that were observed and learns to give them back; a gap is filled
by the mean over the windows that cover it. The detector learns to reproduce windows of
what is mostly normal; a step scores minus its squared error,

    score_t = -|x_t - net(x)_t|^2 / c,

and is an anomaly below the quantile of the training scores that `contamination` names.
"""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import OneToOneFeatureMixin, OutlierMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import integer, within
from posterity.timeseries.timesnet import TimesNet
from posterity.timeseries.timesnet_training import SeriesEstimator

__all__ = ["TimesNetDetector", "TimesNetImputer"]


class TimesNetImputer(OneToOneFeatureMixin, TransformerMixin, SeriesEstimator):
    """Gaps of a multivariate series filled by `TimesNet`, which learns by hiding more.

    Parameters
    ----------
    mask_rate : float, default=0.25
        Share of the observed entries hidden for training, in (0, 1).
    seq_len : int, default=96
        Steps of a window, at least 2.
    d_model, d_ff, n_layers, top_k, n_kernels, dropout
        See `TimesNet`.
    max_epochs : int, default=10
        Passes over the windows, at most; the rate is halved after each.
    batch_size : int, default=32
        Windows in a step.
    lr : float, default=1e-3
        First rate of Adam.
    patience : int, default=3
        Epochs without improvement on the validation part before training stops.
    validation_fraction : float, default=0.1
        The last part of time, held out for stopping; 0, or a series too short for it: no
        early stopping.
    device : str, default="cpu"
        As torch names it.
    random_state : int, RandomState instance or None, default=None
        Decides initial weights, batches, hidden entries and dropout.

    Attributes
    ----------
    net_ : TimesNet
        The trained network; it chooses periods for each window alone.
    losses_ : list of float
        Mean squared error of the entries hidden in training, by epoch.
    mean_, scale_ : ndarray of shape (n_features_in_,)
        Mean and deviation of the observed training entries.
    n_features_in_ : int
        Variables of the training series.

    Raises
    ------
    ValueError
        If a parameter is out of range, a series is too short or infinite, or a column of
        the training series has no observed value.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.timeseries import TimesNetImputer
    >>> X = np.sin(np.arange(200) * 2 * np.pi / 12)[:, None]
    >>> X[50:55] = np.nan
    >>> model = TimesNetImputer(seq_len=24, d_model=4, n_kernels=2, max_epochs=1, random_state=0)
    >>> bool(np.isnan(model.fit_transform(X)).any())
    False
    """

    def __init__(
        self, *, mask_rate: float = 0.25, seq_len: int = 96, d_model: int = 16, d_ff: int = 32,
        n_layers: int = 2, top_k: int = 3, n_kernels: int = 6, dropout: float = 0.1, max_epochs: int = 10,
        batch_size: int = 32, lr: float = 1e-3, patience: int = 3, validation_fraction: float = 0.1,
        device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.mask_rate = mask_rate
        self.seq_len = seq_len
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
        return tags

    def fit(self, X: Any, y: Any = None) -> "TimesNetImputer":
        """Train on all windows of a series with gaps.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            Rows in order of time, evenly spaced, at least ``seq_len``; NaN where missing.
        y : None
            Ignored.

        Returns
        -------
        TimesNetImputer
            Itself.
        """
        seq_len = integer("seq_len", self.seq_len, 2)
        within("mask_rate", self.mask_rate, 0, 1, open_low=True, open_high=True)
        X = self._read_series(X, reset=True, least=seq_len, missing=True)
        observed = torch.as_tensor(~np.isnan(X), device=self.device)
        self._fit_windows("impute", self._hidden_error, seq_len, self._tensor(X), observed)
        return self

    def _hidden_error(self, net: TimesNet, window: Tensor, known: Tensor) -> Tensor:
        """Hide some entries that are known; return the mean squared error there."""
        hidden = known & (torch.rand_like(window) < self.mask_rate)
        error = net(window, mask=known & ~hidden) - window
        return (error.square() * hidden).sum() / hidden.sum().clamp(min=1)

    def transform(self, X: Any) -> ndarray:
        """Fill the gaps of a series; overlapping windows are averaged.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            At least ``seq_len`` rows in order of time; NaN where missing.

        Returns
        -------
        ndarray of shape (n_timesteps, n_variables)
            The series, observed values as they were.
        """
        check_is_fitted(self)
        seq_len = self.net_.seq_len
        X = self._read_series(X, reset=False, least=seq_len, missing=True)
        at = _starts(len(X), seq_len, seq_len // 2)[:, None] + np.arange(seq_len)
        known = torch.as_tensor(~np.isnan(X), device=self.device)
        out = self._predict(self._tensor(X)[at], mask=known[at])
        filled, count = np.zeros_like(X), np.zeros((len(X), 1))
        np.add.at(filled, at, out)
        np.add.at(count, at, 1.0)
        return np.where(np.isnan(X), filled / count * self.scale_ + self.mean_, X)


class TimesNetDetector(OutlierMixin, SeriesEstimator):
    """Anomalies of a multivariate series: steps that `TimesNet` cannot reconstruct.

    Parameters
    ----------
    contamination : float, default=0.01
        Share of the training steps taken for anomalies, in (0, 0.5]; sets the threshold.
    seq_len : int, default=96
        Steps of a window, at least 2.
    d_model, d_ff, n_layers, top_k, n_kernels, dropout
        See `TimesNet`.
    max_epochs : int, default=10
        Passes over the windows, at most; the rate is halved after each.
    batch_size : int, default=32
        Windows in a step.
    lr : float, default=1e-3
        First rate of Adam.
    patience : int, default=3
        Epochs without improvement on the validation part before training stops.
    validation_fraction : float, default=0.1
        The last part of time, held out for stopping; 0, or a series too short for it: no
        early stopping.
    device : str, default="cpu"
        As torch names it.
    random_state : int, RandomState instance or None, default=None
        Decides initial weights, batches and dropout.

    Attributes
    ----------
    net_ : TimesNet
        The trained network; it chooses periods for each window alone.
    losses_ : list of float
        Mean squared error of the reconstruction, by epoch.
    mean_, scale_ : ndarray of shape (n_features_in_,)
        Mean and deviation of the training series.
    offset_ : float
        The score below which a step is an anomaly.
    n_features_in_ : int
        Variables of the training series.

    Raises
    ------
    ValueError
        If a parameter is out of range, or a series is too short or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.timeseries import TimesNetDetector
    >>> X = np.sin(np.arange(400) * 2 * np.pi / 12)[:, None]
    >>> model = TimesNetDetector(seq_len=24, d_model=4, n_kernels=2, max_epochs=1, random_state=0).fit(X)
    >>> X[200] = 8.0
    >>> int(model.score_samples(X).argmin())
    200
    """

    def __init__(
        self, *, contamination: float = 0.01, seq_len: int = 96, d_model: int = 16, d_ff: int = 32,
        n_layers: int = 2, top_k: int = 3, n_kernels: int = 6, dropout: float = 0.1, max_epochs: int = 10,
        batch_size: int = 32, lr: float = 1e-3, patience: int = 3, validation_fraction: float = 0.1,
        device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.contamination = contamination
        self.seq_len = seq_len
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

    def fit(self, X: Any, y: Any = None) -> "TimesNetDetector":
        """Train on all windows of a series, and set the threshold.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            Rows in order of time, evenly spaced, at least ``seq_len``.
        y : None
            Ignored.

        Returns
        -------
        TimesNetDetector
            Itself.
        """
        seq_len = integer("seq_len", self.seq_len, 2)
        within("contamination", self.contamination, 0, 0.5, open_low=True)
        X = self._read_series(X, reset=True, least=seq_len)
        self._fit_windows("detect", lambda net, x: F.mse_loss(net(x), x), seq_len, self._tensor(X))
        self.offset_ = float(np.quantile(self._scores(X), self.contamination))
        return self

    def _scores(self, X: ndarray) -> ndarray:
        seq_len = self.net_.seq_len
        at = _starts(len(X), seq_len, seq_len)[:, None] + np.arange(seq_len)
        windows = self._tensor(X)[at]
        errors = (self._predict(windows) - windows.cpu().numpy().astype(np.float64)) ** 2
        scores = np.empty(len(X))
        scores[at[::-1].ravel()] = -errors.mean(2)[::-1].ravel()  # an earlier window goes before the last
        return scores

    def score_samples(self, X: Any) -> ndarray:
        """Return minus the reconstruction error of each step; high is normal.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            At least ``seq_len`` rows in order of time.

        Returns
        -------
        ndarray of shape (n_timesteps,)
            Minus the squared error of the standardised series, averaged over variables.
        """
        check_is_fitted(self)
        return self._scores(self._read_series(X, reset=False, least=self.net_.seq_len))

    def decision_function(self, X: Any) -> ndarray:
        """Return the score of each step less the threshold; negative is an anomaly.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            As for ``score_samples``.

        Returns
        -------
        ndarray of shape (n_timesteps,)
            ``score_samples(X) - offset_``.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> ndarray:
        """Return -1 for anomalies and +1 for the rest.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            As for ``score_samples``.

        Returns
        -------
        ndarray of shape (n_timesteps,), int
            The labels.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)


def _starts(time: int, seq_len: int, stride: int) -> ndarray:
    """Return where windows begin; the last one ends with the series."""
    return np.unique([*range(0, time - seq_len, stride), time - seq_len])
