"""Forecasts of a multivariate series: the next steps, from the last ``seq_len`` of them.

The network sees seq_len steps, extends them by a linear map to seq_len + horizon, and
is trained by the squared error of the last horizon, over all windows of the series.
"""

from typing import Any

import numpy as np
from numpy import ndarray
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import integer
from posterity.timeseries.timesnet import TimesNet
from posterity.timeseries.timesnet_training import SeriesEstimator

__all__ = ["TimesNetForecaster"]


class TimesNetForecaster(SeriesEstimator):
    """Forecasts of a multivariate series by `TimesNet`.

    Parameters
    ----------
    horizon : int, default=24
        Steps to forecast, at least 1.
    seq_len : int, default=96
        Steps to forecast from, at least 2.
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
        The trained network; it chooses periods for each series alone.
    losses_ : list of float
        Mean squared error on the training windows, by epoch.
    mean_, scale_ : ndarray of shape (n_features_in_,)
        Mean and deviation of the training series.
    history_ : ndarray of shape (seq_len, n_features_in_)
        The last steps of the training series.
    n_features_in_ : int
        Variables of the training series.

    Raises
    ------
    ValueError
        If a parameter is out of range, or a series is too short or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.timeseries import TimesNetForecaster
    >>> X = np.sin(np.arange(200) * 2 * np.pi / 12)[:, None]
    >>> model = TimesNetForecaster(horizon=6, seq_len=24, d_model=4, n_kernels=2, max_epochs=1, random_state=0)
    >>> model.fit(X).predict().shape
    (6, 1)
    """

    def __init__(
        self, *, horizon: int = 24, seq_len: int = 96, d_model: int = 16, d_ff: int = 32, n_layers: int = 2,
        top_k: int = 5, n_kernels: int = 6, dropout: float = 0.1, max_epochs: int = 10, batch_size: int = 32,
        lr: float = 1e-3, patience: int = 3, validation_fraction: float = 0.1, device: str = "cpu",
        random_state: Any = None,
    ) -> None:  # fmt: skip
        self.horizon = horizon
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

    def fit(self, X: Any, y: Any = None) -> "TimesNetForecaster":
        """Train on all windows of a series.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables)
            Rows in order of time, evenly spaced, at least ``seq_len + horizon``.
        y : None
            Ignored.

        Returns
        -------
        TimesNetForecaster
            Itself.
        """
        seq_len, horizon = integer("seq_len", self.seq_len, 2), integer("horizon", self.horizon, 1)
        X = self._read_series(X, reset=True, least=seq_len + horizon)
        self.history_ = X[-seq_len:].copy()
        self._fit_windows("forecast", _forecast_error, seq_len, self._tensor(X), horizon=horizon)
        return self

    def predict(self, X: Any = None) -> ndarray:
        """Forecast the next ``horizon`` steps.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_variables) or (n, seq_len, n_variables), optional
            The series to go on from, at least ``seq_len`` steps, or n windows of exactly
            as many. Default: the training series.

        Returns
        -------
        ndarray of shape (horizon, n_variables) or (n, horizon, n_variables)
            The forecast.
        """
        check_is_fitted(self)
        seq_len = len(self.history_)
        if X is None:
            windows = self.history_[None]
        elif np.ndim(X) == 3:
            windows = np.asarray(X, dtype=np.float64)
            if windows.shape[1:] != self.history_.shape or len(windows) == 0:
                raise ValueError(
                    f"X must be (n, {seq_len}, {self.n_features_in_}) or a series, got {windows.shape}"
                )
        else:
            windows = self._read_series(X, reset=False, least=seq_len)[None, -seq_len:]
        if not np.isfinite(windows).all():
            raise ValueError("X must be finite, got NaN or infinity")
        out = self._predict(self._tensor(windows)) * self.scale_ + self.mean_  # float64 again
        return out if X is not None and np.ndim(X) == 3 else out[0]


def _forecast_error(net: TimesNet, window: Tensor) -> Tensor:
    """Return the mean squared error of the forecast of a window's last steps from the others."""
    past, future = window.split([net.seq_len, net.horizon], dim=1)
    return F.mse_loss(net(past), future)
