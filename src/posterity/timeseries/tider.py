"""TIDER: gaps of many series filled by trend, season and what all channels do at a time.

The factors of `TiderFactors` are fitted to the observed entries Omega of a table of
standardised series,

    mean over Omega of (X - X_hat)^2  +  norms of the factors, of the bias less its
    autoregression, and of the steps of the trend,                                        (1)

by Adam, until entries that were held out are predicted no better. A gap is filled by
X_hat, of which `components_` says how much is trend, how much season, how much bias.

Time steps are parameters: what is fitted fills this table, and no other.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from posterity._checks import at_least, integer, one_of, within
from posterity._random import drawn_seed
from posterity._stopping import Best
from posterity.timeseries.tider_factors import TiderComponents, TiderFactors, checked_lags, checked_periods

__all__ = ["TIDER"]


class TIDER(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Gaps of a table of series filled by disentangled factors of time.

    Parameters
    ----------
    period : float, sequence of float or "auto", default="auto"
        Steps of a cycle, each in (1, n_timesteps]; ``"auto"`` takes that whose
        amplitude, averaged over channels, stands out most from the octaves around it, among
        cycles seen twice at least.
    rank : int, default=10
        Columns of the factors that trend and season share, at least 1; it may exceed the
        channels.
    bias_rank : int, default=3
        Columns of the bias, at least 1.
    n_harmonics : int, default=8
        Frequencies of each period, at least 1.
    lags : sequence of int, default=(1, 2, 3)
        Steps back that the bias is predicted from, at least 1, each once.
    l2, ar, trend : float, default=1e-3, 0.02, 0.01
        Weights of the norms: of the factors, of the bias less its autoregression, of the
        steps of the trend; at least 0. Worth a search: l2 and trend ten times as large, with
        ar twice trend.
    lr : float, default=0.05
        Rate of Adam, positive.
    max_epochs : int, default=500
        Passes over the channels, at most.
    patience : int, default=100
        Epochs without improvement on the entries held out before training stops.
    batch_size : int, optional
        Channels in a step; all by default.
    validation_fraction : float, default=0.1
        Share of the observed entries held out for stopping, in [0, 1); with none the last
        epoch counts. One entry of each channel is always trained on.
    standardize : bool, default=True
        Whether each channel is fitted less its observed mean, over its observed deviation.
    device : str, default="cpu"
        As torch names it.
    random_state : int, RandomState instance or None, default=None
        Decides the start, what is held out and the batches.

    Attributes
    ----------
    reconstruction_ : ndarray of shape (n_timesteps, n_features_in_)
        X_hat, in the units of the data.
    components_ : TiderComponents of ndarray of shape (n_timesteps, n_features_in_)
        Trend, with the mean of each channel, season and bias, in the units of the data; they
        add up to ``reconstruction_``.
    weights_ : ndarray of shape (2,)
        Of trend and season, positive, of sum 1.
    period_ : ndarray of shape (n_periods,)
        Steps of each cycle.
    channel_factors_ : ndarray of shape (n_features_in_, rank)
        Loadings of the channels; channels alike have rows alike.
    n_iter_ : int
        Epochs run.
    best_epoch_ : int
        The epoch whose factors are kept, from 1.
    history_ : ndarray of shape (n_iter_, 2)
        Objective (1), and squared error of the entries held out (NaN without), by epoch.
    n_features_in_ : int
        Channels.

    Raises
    ------
    ValueError
        If a parameter is out of range, X is infinite, too short or unevenly spaced, a
        channel has no observed value, or what is transformed has another shape.

    Notes
    -----
    1. Each channel is standardised, and the factors start at a tenth of the official scale.
    2. The steps of the trend are differences in time; a version of the official code takes
       them between columns.
    3. Lags start at 1; the official 0 lets each bias predict itself.
    4. Entries held out decide by their plain squared error; the official code adds norms.
    5. ``"auto"`` compares an amplitude with those around it: the largest is that of a trend.

    References
    ----------
    .. [1] Liu, Li, Cong, Chen, Jiang. Multivariate Time-series Imputation with Disentangled
       Temporal Representations. ICLR 2023. Methodology.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.timeseries import TIDER
    >>> X = np.sin(np.arange(96) * 2 * np.pi / 24)[:, None] * [1.0, 10.0, 5.0]
    >>> gaps = X.copy()
    >>> gaps[40:50, 1] = np.nan
    >>> filled = TIDER(period=24, max_epochs=200, random_state=0).fit_transform(gaps)
    >>> bool(np.abs(filled - X).max() < 0.5)
    True
    """

    def __init__(
        self, period: float | Sequence[float] | Literal["auto"] = "auto", *, rank: int = 10, bias_rank: int = 3,
        n_harmonics: int = 8, lags: Sequence[int] = (1, 2, 3), l2: float = 1e-3, ar: float = 0.02,
        trend: float = 0.01, lr: float = 0.05, max_epochs: int = 500, patience: int = 100,
        batch_size: int | None = None, validation_fraction: float = 0.1, standardize: bool = True,
        device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.period = period
        self.rank = rank
        self.bias_rank = bias_rank
        self.n_harmonics = n_harmonics
        self.lags = lags
        self.l2 = l2
        self.ar = ar
        self.trend = trend
        self.lr = lr
        self.max_epochs = max_epochs
        self.patience = patience
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @torch.inference_mode(False)
    def fit(self, X: Any, y: Any = None) -> "TIDER":
        """Fit the factors to the observed entries.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_channels)
            Rows in order of time, evenly spaced, at least ``max(lags) + 2``; NaN where missing.
        y : None
            Ignored.

        Returns
        -------
        TIDER
            Itself.
        """
        least = max(checked_lags(self.lags)) + 2
        _evenly_spaced(X)
        X = self._read(X, reset=True)
        if len(X) < least:
            raise ValueError(
                f"X must have at least max(lags) + 2 = {least} rows (time steps), got n_samples = {len(X)}"
            )
        known = ~np.isnan(X)
        if len(empty := np.flatnonzero(~known.any(0))):
            column = getattr(self, "feature_names_in_", range(X.shape[1]))[empty[0]]
            raise ValueError(f"X must have an observed value in each column, got none in {column!r}")
        one_of("standardize", self.standardize, (True, False))
        mean, scale = _moments(X) if self.standardize else (np.zeros(X.shape[1]), np.ones(X.shape[1]))
        Z = (X - mean) / np.where(scale > 0, scale, 1)
        period: Any = _strongest_period(Z) if self.period == "auto" else self.period
        periods = checked_periods(period, len(X))
        if max(periods) > len(X) / 2:
            warnings.warn(
                f"period {max(periods):g} is seen less than twice in {len(X)} rows", UserWarning, stacklevel=2
            )
        rng = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(drawn_seed(rng))
        model = TiderFactors(
            *X.shape, rank=self.rank, bias_rank=self.bias_rank, n_harmonics=self.n_harmonics, period=periods,
            lags=self.lags, generator=generator,
        ).to(self.device)  # fmt: skip
        held = _held_out(
            known, within("validation_fraction", self.validation_fraction, 0, 1, open_high=True), rng
        )
        self.history_, self.best_epoch_ = train_factors(
            model, torch.as_tensor(np.nan_to_num(Z), dtype=torch.float32, device=self.device),
            torch.as_tensor(known & ~held, device=self.device), torch.as_tensor(held, device=self.device),
            penalties={"l2": self.l2, "ar": self.ar, "trend": self.trend}, lr=self.lr, max_epochs=self.max_epochs,
            patience=self.patience, batch_size=self.batch_size, generator=generator,
        )  # fmt: skip
        self.n_iter_, self.period_ = len(self.history_), np.array(periods)
        self._read_off(model, mean, scale)
        return self

    def _read(self, X: Any, *, reset: bool) -> Any:
        return validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan")

    def _read_off(self, model: TiderFactors, mean: ndarray, scale: ndarray) -> None:
        """Keep the components in units of the data, and their sum."""
        with torch.no_grad():
            model = model.cpu().double()
            trend, seasonal, bias = (part.numpy() for part in model.components())
            self.weights_ = model.mix.softmax(0).numpy()
            self.channel_factors_ = model.channel.detach().numpy()
        self.components_ = TiderComponents(trend * scale + mean, seasonal * scale, bias[:, None] * scale)
        self.reconstruction_: ndarray = np.sum(self.components_, axis=0)

    def transform(self, X: Any) -> ndarray:
        """Fill the gaps of the table that was fitted, or of one with its shape.

        Parameters
        ----------
        X : array-like of shape (n_timesteps, n_channels)
            The rows and columns of ``fit``; NaN where missing, which may be elsewhere.

        Returns
        -------
        ndarray of shape (n_timesteps, n_channels)
            The table, observed values as they were, gaps from ``reconstruction_``.
        """
        check_is_fitted(self)
        X = self._read(X, reset=False)
        if len(X) != len(self.reconstruction_):
            raise ValueError(
                f"X must have the {len(self.reconstruction_)} rows of fit, whose time steps are parameters, "
                f"got {len(X)}: fit it"
            )
        return np.where(np.isnan(X), self.reconstruction_, X)


@torch.enable_grad()
def train_factors(
    model: TiderFactors, X: Tensor, observed: Tensor, held_out: Tensor, *, penalties: Mapping[str, Any], lr: float,
    max_epochs: int, patience: int, batch_size: int | None, generator: torch.Generator,
) -> tuple[ndarray, int]:  # fmt: skip
    """Fit factors to the entries observed; keep those of the epoch that is best on entries held out.

    Returns
    -------
    history : ndarray of shape (epochs, 2)
        Objective, and squared error of the entries held out, NaN if there are none.
    best_epoch : int
        From 1.
    """
    at_least("lr", lr, 0, strict=True)
    integer("max_epochs", max_epochs, 1)
    integer("patience", patience, 1)
    n_channels = X.shape[1]
    size = n_channels if batch_size is None else integer("batch_size", batch_size, 1)
    model.penalty(**penalties)  # refuses weights before any step
    opt = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    rows, columns = held_out.nonzero(as_tuple=True)
    hidden = X[rows, columns]
    by_channel, weight = X.T.contiguous(), observed.T.to(X.dtype).contiguous()  # a batch is rows of them
    best, history, epoch = Best(model, patience), [], 0
    for epoch in range(1, max_epochs + 1):
        total = torch.zeros((), device=X.device)
        order = torch.randperm(n_channels, generator=generator).to(X.device)
        for batch in order.split(size) if size < n_channels else [slice(None)]:
            V, U = model.factors()
            seen = weight[batch]
            error = (U[batch] @ V.T - by_channel[batch]) * seen
            loss = error.square().sum() / seen.sum() + model.penalty(**penalties, factors=(V, U))
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.detach() * len(error) / n_channels
        score = math.nan
        if len(hidden):
            with torch.no_grad():
                V, U = model.factors()
                score = float(((V[rows] * U[columns]).sum(1) - hidden).square().mean())
        history.append((float(total), score))
        if not math.isfinite(history[-1][0]):
            raise ValueError(
                f"lr must be lower, or standardize True: the loss is {float(total)} in epoch {epoch}"
            )
        if len(hidden) and best.stop(score):
            break
    best.restore()
    with torch.no_grad():
        V, U = model.factors()
        end = best.score if len(hidden) else float((U @ V.T).square().mean())
    if not math.isfinite(end):  # the last step alone may diverge
        raise ValueError(f"lr must be lower, or standardize True: the loss is {end} after epoch {epoch}")
    return np.array(history), epoch - best.idle


def _moments(X: ndarray) -> tuple[ndarray, ndarray]:
    """Return mean and deviation of the observed values of each channel; deviation 0 of what is constant."""
    unit = np.nanmax(np.abs(X), axis=0)  # squares of what is huge or tiny would not be numbers
    unit = np.where(unit > 0, unit, 1)
    mean, scale = np.nanmean(X / unit, axis=0), np.nanstd(X / unit, axis=0)
    constant = scale <= 10 * np.finfo(float).eps * np.abs(mean)  # but for rounding
    return mean * unit, np.where(constant, 0, scale) * unit


def _strongest_period(Z: ndarray) -> float:
    """Return the period whose amplitude, averaged over channels, stands out most.

    The spectrum of a trend falls as 1 / f, and its first frequencies are high without being
    a rhythm; so each amplitude counts less the mean of the octaves around it.
    """
    if (np.nanmax(Z, axis=0) == np.nanmin(Z, axis=0)).all():
        raise ValueError("period must be given for a table without variation, got 'auto'")
    amplitude = np.abs(np.fft.rfft(np.nan_to_num(Z - np.nanmean(Z, axis=0)), axis=0)).mean(1)
    f = np.arange(min(2, len(amplitude) - 1), len(amplitude))  # one cycle in all is no rhythm
    low, high = (f + 1) // 2, np.minimum(2 * f, len(amplitude) - 1)
    total = np.concatenate([[0.0], amplitude.cumsum()])
    around = (total[high + 1] - total[low]) / (high + 1 - low)
    return len(Z) / int(f[(amplitude[f] - around).argmax()])


def _held_out(known: ndarray, share: float, rng: np.random.RandomState) -> ndarray:
    """Return a random share of the known entries, but never all of a channel."""
    chance = np.where(known, rng.random_sample(known.shape), np.inf)
    count = round(share * known.sum())
    held = chance <= np.partition(chance, count - 1, axis=None)[count - 1] if count else np.zeros_like(known)
    held[np.where(known, chance, -1).argmax(0), np.arange(known.shape[1])] = False
    return held


def _evenly_spaced(X: Any) -> None:
    """Refuse a table whose index says that rows are not evenly spaced in time."""
    index = getattr(X, "index", None)
    times = getattr(index, "asi8", None)  # of an index of times, in pandas
    if index is None or times is None or len(times) < 3:
        return
    steps = np.diff(times)
    values, counts = np.unique(steps, return_counts=True)
    usual = int(np.flatnonzero(steps == values[counts.argmax()])[0])
    odd = int(np.argmax(steps != steps[usual])) if len(values) > 1 else 0
    if (steps > 0).all():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if len(values) == 1 or getattr(index, "inferred_freq", None):  # months differ in days
                return
    raise ValueError(
        f"X must be evenly spaced in time, got {index[odd]} and then {index[odd + 1]} where the usual step is "
        f"{index[usual + 1] - index[usual]}: sort it and use asfreq, which makes the gaps rows of NaN"
    )
