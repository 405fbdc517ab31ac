"""TIDER against the official way of an epoch, outer products and all, and against imputers on sensors."""

import math
import time
import warnings

import numpy as np
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.claims.timeseries.tider import made
from posterity.lab.tasks.imputation import hide
from posterity.timeseries import TIDER, TiderFactors, TimesNetImputer
from posterity.timeseries.tider import train_factors

TIME, CHANNELS, RANK, BIAS, HARMONICS, PERIOD, LAGS = 2_000, 200, 50, 5, 30, 168.0, (1, 2, 3, 4, 5)
WEIGHTS = {"l2": 1e-2, "ar": 0.2, "trend": 0.1}


class Outer(nn.Module):
    """The same factors; the season is a sum of outer products, made for the fit and again for the norm."""

    channel: Tensor
    trend: Tensor
    season: Tensor
    bias: Tensor
    ar: Tensor
    mix: Tensor

    def __init__(self, like: TiderFactors) -> None:
        super().__init__()
        for name, value in like.named_parameters():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def time_factor(self) -> Tensor:
        t, season = torch.arange(TIME), torch.zeros(TIME, RANK)
        for n in range(HARMONICS):
            season = season + torch.outer(torch.sin(2 * math.pi * n * t / PERIOD), self.season[2 * n])
            season = season + torch.outer(torch.cos(2 * math.pi * n * t / PERIOD), self.season[2 * n + 1])
        weight = self.mix.softmax(0)
        return torch.cat([weight[0] * self.trend + weight[1] * season, self.bias], 1)

    def loss(self, X: Tensor, known: Tensor, batch: Tensor) -> Tensor:
        U = torch.cat([self.channel, torch.ones(CHANNELS, BIAS)], 1)
        error = ((self.time_factor() @ U[batch].T - X[:, batch]) * known[:, batch]).square().sum()
        first = max(LAGS)
        off = -self.bias[first:]
        for k, lag in enumerate(LAGS):
            off = off + self.bias[first - lag : TIME - lag] @ self.ar[k].T
        return (
            error / known[:, batch].sum()
            + WEIGHTS["l2"] * (U.norm() + self.time_factor().norm())
            + WEIGHTS["ar"] * off.norm()
            + WEIGHTS["trend"] * self.trend.diff(dim=0).norm()
        )


def epochs() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(TIME, CHANNELS, generator=generator)
    known = torch.rand(X.shape, generator=generator) < 0.7
    ours = TiderFactors(
        TIME, CHANNELS, rank=RANK, bias_rank=BIAS, n_harmonics=HARMONICS, period=PERIOD, lags=LAGS,
        generator=generator,
    )  # fmt: skip
    peer = Outer(ours)
    whole = ((ours() - X)[known].square().mean() + ours.penalty(**WEIGHTS)).item()
    assert abs(peer.loss(X, known, torch.arange(CHANNELS)).item() - whole) < 1e-4 * whole
    opt = torch.optim.Adam(peer.parameters(), lr=0.05)

    def official() -> None:
        for batch in torch.randperm(CHANNELS).split(32):
            opt.zero_grad()
            peer.loss(X, known, batch).backward()
            opt.step()

    def epoch(batch_size: int | None) -> None:
        train_factors(
            ours, X, known, torch.zeros_like(known), penalties=WEIGHTS, lr=0.05, max_epochs=1, patience=1,
            batch_size=batch_size, generator=generator,
        )  # fmt: skip

    for size, target in ((32, 5.0), (None, 5.0)):
        name = f"an epoch of {'all channels at once' if size is None else f'batches of {size}'}"
        race(f"{name}, against the official way", lambda s=size: epoch(s), official, target=target, rounds=9)


def imputers() -> None:
    X = made(0)[0]
    hidden = hide(X.shape, "points", 0, 0.5)
    gaps = np.where(hidden, np.nan, X)
    ours, net = TIDER(24, ar=0.2, trend=0.1, random_state=0), TimesNetImputer(random_state=0)
    race("a fit to sensors, against TimesNetImputer", lambda: ours.fit(gaps), lambda: net.fit(gaps), target=20, rounds=1)  # fmt: skip
    for model in (ours, net, IterativeImputer(random_state=0), KNNImputer()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            filled = np.asarray(model.fit_transform(gaps))
        error = np.sqrt(np.mean((filled - X)[hidden] ** 2))
        print(
            f"  {type(model).__name__}: {time.perf_counter() - start:.2f} s, root mean squared error {error:.3f}"
        )


def million() -> None:
    generator = np.random.default_rng(0)
    X = generator.normal(size=(5_000, 200))
    X[generator.random(X.shape) < 0.3] = np.nan
    start = time.perf_counter()
    TIDER(24, patience=500, random_state=0).fit(X)
    print(f"a million cells, 500 epochs: {time.perf_counter() - start:.1f} s (target under 60 s)")


def main() -> None:
    epochs()
    imputers()
    million()


if __name__ == "__main__":
    main()
