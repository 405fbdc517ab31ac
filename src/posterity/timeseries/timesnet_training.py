"""What the four estimators of TimesNet share: a series standardised, cut into windows, trained on.

Each window of the standardised series is an example. A network trains with periods shared
by a batch, as the paper does, and predicts with those of each series, so that a prediction
does not depend on its batch. The last part of time is held out: training stops when it has
not improved for a while, and the best weights are kept.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data
from torch import Tensor, nn

from posterity._checks import at_least, integer, within
from posterity._random import drawn_seed, seeded
from posterity._stopping import Best
from posterity.timeseries.timesnet import TimesNet

__all__: list[str] = []


class SeriesEstimator(BaseEstimator):
    """Sizes, standardisation, windows and training of a `TimesNet`."""

    d_model: int
    d_ff: int
    n_layers: int
    top_k: int
    n_kernels: int
    dropout: float
    max_epochs: int
    batch_size: int
    lr: float
    patience: int
    validation_fraction: float
    device: str
    random_state: Any
    n_features_in_: int

    def _network(self, n_channels: int, seq_len: int, task: Any, **options: Any) -> TimesNet:
        integer("max_epochs", self.max_epochs, 1)
        integer("batch_size", self.batch_size, 1)
        at_least("lr", self.lr, 0, strict=True)
        integer("patience", self.patience, 1)
        within("validation_fraction", self.validation_fraction, 0, 1, open_high=True)
        net = TimesNet(
            n_channels, seq_len, task, d_model=self.d_model, d_ff=self.d_ff, n_layers=self.n_layers,
            top_k=self.top_k, n_kernels=self.n_kernels, dropout=self.dropout, **options,
        )  # fmt: skip
        return net.to(self.device)

    def _read_series(self, X: Any, *, reset: bool, least: int, missing: bool = False) -> ndarray:
        X = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan" if missing else True
        )
        if len(X) < least:
            raise ValueError(f"X must have at least {least} rows (time steps), got n_samples = {len(X)}")
        if reset:
            if len(empty := np.flatnonzero(np.isnan(X).all(0))):
                column = getattr(self, "feature_names_in_", range(X.shape[1]))[empty[0]]
                raise ValueError(f"X must have an observed value in each column, got none in {column!r}")
            self._standardise(X)
        return X

    def _standardise(self, X: ndarray) -> None:
        rows = X.reshape(-1, X.shape[-1])
        # squares of what is huge or tiny would not be numbers; a power of two rounds nothing
        unit = np.ldexp(1.0, np.frexp(np.nanmax(np.abs(rows), axis=0))[1].clip(-1022, 1023))
        rows = rows / unit
        self.mean_, scale = np.nanmean(rows, axis=0) * unit, np.nanstd(rows, axis=0) * unit
        constant = scale <= 10 * np.finfo(float).eps * np.abs(self.mean_)  # but for rounding
        # what is constant takes the smallest unit of the others: 1 has no meaning for data of 1e-12
        self.scale_ = np.where(constant, 1.0 if constant.all() else scale[~constant].min(), scale)

    def _tensor(self, X: ndarray) -> Tensor:
        """Return the series standardised, 0 where missing, on the device."""
        scaled = np.nan_to_num((X - self.mean_) / self.scale_)
        return torch.as_tensor(scaled, dtype=torch.float32, device=self.device)

    def _by_time(self, time: int, seq_len: int, horizon: int = 0) -> tuple[Tensor, Tensor]:
        """Return where windows for training and for validation begin.

        Training never sees the last ``validation_fraction`` of time; validation predicts
        nothing else. A series too short for both is all for training.
        """
        held = max(round(self.validation_fraction * time), horizon or seq_len)
        train = torch.arange(max(0, time - held - seq_len - horizon + 1))
        first = time - held - (seq_len if horizon else 0)
        if self.validation_fraction == 0 or len(train) == 0:
            return torch.arange(time - seq_len - horizon + 1), torch.arange(0)
        return train, torch.arange(first, time - seq_len - horizon + 1)

    @torch.inference_mode(False)  # grad mode too: parameters made inside could not be trained
    def _fit_windows(
        self, task: Any, loss: Callable[..., Tensor], seq_len: int, *series: Tensor, horizon: int = 0
    ) -> None:
        """Minimise ``loss(net, window, ...)`` over all windows of series of equal length."""
        time, n_channels = series[0].shape
        steps = torch.arange(seq_len + horizon, device=self.device)
        with seeded(drawn_seed(self.random_state), self.device):
            net = self._network(n_channels, seq_len, task, horizon=horizon)
            self._train(
                net,
                lambda rows: loss(net, *(each[rows[:, None] + steps] for each in series)),
                *self._by_time(time, seq_len, horizon),
            )

    def _train(
        self, net: TimesNet, loss: Callable[[Tensor], Tensor], train: Tensor, held_out: Tensor,
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, decay: float = 0.5, clip: float = math.inf,
    ) -> None:  # fmt: skip
        """Minimise ``loss(rows)``; keep the weights that were best on rows held out."""
        self.net_, self.losses_ = net, []
        opt = optimizer(net.parameters(), lr=self.lr)  # type: ignore[call-arg]
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, decay)
        best, score = Best(net, self.patience), math.nan
        for epoch in range(self.max_epochs):
            self._mode("batch").train()
            total = torch.zeros((), device=self.device)
            for rows in train[torch.randperm(len(train))].split(self.batch_size):
                value = loss(rows.to(self.device))
                opt.zero_grad()
                value.backward()
                if clip < math.inf:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                opt.step()
                total += len(rows) * value.detach()
            schedule.step()
            self.losses_.append(float(total) / len(train))
            if not math.isfinite(self.losses_[-1]):
                raise ValueError(f"lr must be lower: the loss is {self.losses_[-1]} in epoch {epoch + 1}")
            if len(held_out) == 0:
                continue
            self._mode("sample").eval()
            score = self._score(loss, held_out)
            if best.stop(score):
                break
        best.restore()
        self._mode("sample").eval()
        if not best.state:  # the last step alone may diverge
            if len(held_out) == 0:
                score = self._score(loss, rows)
            if not math.isfinite(score):
                raise ValueError(f"lr must be lower: the loss is {score} after epoch {epoch + 1}")

    def _score(self, loss: Callable[[Tensor], Tensor], rows: Tensor) -> float:
        with torch.no_grad(), seeded(0, self.device):  # the same entries are hidden each time
            parts = rows.to(self.device).split(self.batch_size)
            return sum(len(part) * float(loss(part)) for part in parts) / len(rows)

    def _mode(self, periods: Literal["batch", "sample"]) -> TimesNet:
        for block in self.net_.blocks:
            block.periods = periods
        return self.net_

    def _predict(self, x: Tensor, **inputs: Tensor) -> ndarray:
        """Return what the trained network makes of its inputs, batch after batch."""
        with torch.no_grad():
            out = [
                self.net_(x[rows], **{name: value[rows] for name, value in inputs.items()})
                for rows in torch.arange(len(x), device=x.device).split(self.batch_size)
            ]
        return torch.cat(out).cpu().numpy()
