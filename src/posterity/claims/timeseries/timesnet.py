"""Claims about TimesNet: folding by periods beats the same network on the flat series."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from scipy.signal import lfilter
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, NotNegative, PartOfAll, Several, Trial, comparison
from posterity.lab import nets, training
from posterity.lab.data import Series, SeriesData, load_series
from posterity.lab.data.needs import require_rows
from posterity.lab.tasks import HISTORY, HORIZON, entry
from posterity.timeseries import TimesNet, TimesNetForecaster, TimesNetImputer

SIZE = {"d_model": 16, "d_ff": 32, "top_k": 3}


def _parts(data: str, seed: int) -> tuple[ndarray, ndarray]:
    """Return the first 60 % and the last 20 % of time, standardised by the first."""
    values = load_series(data, seed=seed).values
    train, test = _cut(
        values[:14_400] if data == "etth1" else values
    )  # twenty months, as the paper splits them
    mean, scale = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
    scale[scale == 0] = 1.0
    return (train - mean) / scale, (test - mean) / scale


def _cut(values: ndarray) -> tuple[ndarray, ndarray]:
    return values[: round(0.6 * len(values))], values[round(0.8 * len(values)) :]


def _fits(data: SeriesData, seq_len: int, horizon: int = 0, **_: Any) -> None:
    """Refuse a series whose parts hold no window, or in which a column was not observed."""
    length = seq_len + horizon
    require_rows(len(data.values), f"rows (windows of {length} in the last fifth)", 5 * length)
    train, test = (np.isfinite(part).sum(0) for part in _cut(data.values))
    for column, seen, later in zip(data.columns, train, test, strict=True):
        if seen < 2 or later < 1:
            raise ValueError(
                f"column {column!r} must be observed in the first three fifths and in the last fifth of "
                f"time, has {seen} and {later} values there"
            )


def _windows(series: ndarray, length: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Return windows (n, length, c), 0 where missing, and where they are observed."""
    view = np.lib.stride_tricks.sliding_window_view(series, length, axis=0)[::stride].swapaxes(1, 2)
    windows = torch.as_tensor(view.astype(np.float32))
    return windows.nan_to_num(), ~windows.isnan()


def _train(
    trial: Trial, task: Any, shape: Sequence[int], loss: Callable[..., Tensor], data: tuple[Tensor, ...],
    batch_size: int, steps: int, n_kernels: int, **options: int,
) -> dict[str, TimesNet]:  # fmt: skip
    """Train both arms from the same weights on the same batches; the 1-D one never folds."""
    seq_len, c = shape
    trained: dict[str, TimesNet] = {}
    for arm, periods in (("1-D", [seq_len + options.get("horizon", 0)]), ("2-D", "batch")):
        with nets.seeded(trial.seed):
            net = TimesNet(c, seq_len, task, **SIZE, n_kernels=n_kernels, periods=periods, **options)
        training.fit(
            net, loss, data, steps=steps, batch_size=batch_size, lr=1e-3, schedule="cosine", seed=trial.seed,
            device=trial.device, callback=lambda step, value, arm=arm: trial.track(arm, step, value),
        )  # fmt: skip
        if periods == "batch":  # an output should not depend on its batch
            for block in net.blocks.children():
                block.periods = "sample"  # type: ignore[assignment]
        trained[arm] = net
    return trained


def _apply(net: nn.Module, trial: Trial, x: Tensor, **inputs: Tensor) -> Tensor:
    out = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(64):
            others = {name: value[rows].to(trial.device) for name, value in inputs.items()}
            out.append(net(x[rows].to(trial.device), **others))
    return torch.cat(out).cpu()


@comparison(
    paper="timesnet",
    says="A network that folds a series by its periods fills gaps better than the same network left flat.",
    where="Wu et al., Section 4.3 and Table 4",
    arms=("1-D", "2-D"),
    metric="mean squared error of hidden entries, standardised",
    better="lower",
    smallest={"steps": 1, "seq_len": 48, "n_kernels": 1},
    check=_fits,
)
def imputation(
    trial: Trial,
    data: Series = "two-rhythms",
    mask_rate: PartOfAll = 0.25,
    steps: Count = 300,
    seq_len: Several = 96,
    n_kernels: Count = 3,
    batch_size: Count = 16,
) -> dict[str, float]:
    """Train one network twice, folded and flat, to fill what is hidden, and test it later in time.

    The arms have equal parameters, initial weights, batches, hidden entries and steps; in
    the flat one each kernel sees a single row. The last fifth of time is the test;
    interpolation by straight lines is reported beside. 300 steps suffice where rhythms
    are strong; ``data="etth1"`` needs thousands.
    """
    train, test = _parts(data, trial.seed)

    def loss(net: nn.Module, x: Tensor, observed: Tensor) -> Tensor:
        hidden = observed & (torch.rand_like(x) < mask_rate)
        return ((net(x, mask=observed & ~hidden) - x).square() * hidden).sum() / hidden.sum().clamp(min=1)

    shape = (seq_len, train.shape[1])
    arms = _train(trial, "impute", shape, loss, _windows(train, seq_len), batch_size, steps, n_kernels)
    x, observed = _windows(test, seq_len, seq_len // 4)
    chance = torch.rand(x.shape, generator=torch.Generator().manual_seed(trial.seed))
    hidden = observed & (chance < mask_rate)
    known = observed & ~hidden
    straight = _interpolate(x, known)
    trial.record("linear interpolation", float((straight - x)[hidden].square().mean()))
    return {
        arm: float((_apply(net, trial, x, mask=known) - x)[hidden].square().mean())
        for arm, net in arms.items()
    }


def _interpolate(x: Tensor, known: Tensor) -> Tensor:
    """Return straight lines between the known entries of each window, 0 if there are none."""
    filled, steps = torch.zeros_like(x), np.arange(x.shape[1])
    for i in range(len(x)):
        for k in range(x.shape[2]):
            at = known[i, :, k].numpy()
            if at.any():
                line = np.interp(steps, steps[at], x[i, at, k].numpy())
                filled[i, :, k] = torch.as_tensor(line, dtype=x.dtype)
    return filled


@comparison(
    paper="timesnet",
    says="The same backbone forecasts better folded than flat.",
    where="Wu et al., Section 4.2 and Table 2",
    arms=("1-D", "2-D"),
    metric="mean squared error of the forecast, standardised",
    better="lower",
    smallest={"steps": 1, "seq_len": 48, "n_kernels": 1},
    check=_fits,
)
def forecasting(
    trial: Trial,
    data: Series = "two-rhythms",
    horizon: Count = 24,
    steps: Count = 300,
    seq_len: Several = 96,
    n_kernels: Count = 3,
    batch_size: Count = 16,
) -> dict[str, float]:
    """Train one network twice, folded and flat, to forecast, and test it later in time.

    As in ``imputation``; the layers see ``seq_len + horizon`` steps, of which a linear map
    makes up the last. Repeating the last day is reported beside.
    """
    train, test = _parts(data, trial.seed)

    def loss(net: nn.Module, x: Tensor, observed: Tensor) -> Tensor:
        error = (net(x[:, :seq_len]) - x[:, seq_len:]).square() * observed[:, seq_len:]
        return error.sum() / observed[:, seq_len:].sum().clamp(min=1)

    shape = (seq_len, train.shape[1])
    windows = _windows(train, seq_len + horizon)
    arms = _train(trial, "forecast", shape, loss, windows, batch_size, steps, n_kernels, horizon=horizon)
    x, observed = _windows(test, seq_len + horizon, horizon)
    past, future, seen = x[:, :seq_len], x[:, seq_len:], observed[:, seq_len:]
    if seq_len >= 24:
        day = past[:, -24:].repeat(1, -(-horizon // 24), 1)[:, :horizon]
        trial.record("the last day again", float((day - future)[seen].square().mean()))
    return {
        arm: float((_apply(net, trial, past) - future)[seen].square().mean()) for arm, net in arms.items()
    }


@comparison(
    paper="timesnet",
    says="The same backbone tells spikes from what is normal better folded than flat.",
    where="Wu et al., Section 4.5 and Table 5",
    arms=("1-D", "2-D"),
    metric="area under the ROC curve of spiked steps",
    better="higher",
    smallest={"steps": 1, "seq_len": 48, "n_kernels": 1},
    check=_fits,
)
def detection(
    trial: Trial,
    data: Series = "two-rhythms",
    spike: NotNegative = 1.5,
    share: Annotated[float, Between(0, 0.5, above=True)] = 0.02,
    steps: Count = 300,
    seq_len: Several = 96,
    n_kernels: Count = 3,
    batch_size: Count = 16,
) -> dict[str, float]:
    """Train one network twice, folded and flat, to reconstruct, and test it on spikes put in.

    In the last fifth of time a ``share`` of the steps has ``spike`` deviations added to or
    taken from one variable; a step's score is its squared error, averaged over variables.
    Nothing forbids a network to copy its input, spikes included, and one that copies
    better detects less: the paper's own test adjusts predictions by the labels, this does not.
    """
    train, test = _parts(data, trial.seed)

    def loss(net: nn.Module, x: Tensor, observed: Tensor) -> Tensor:
        return ((net(x) - x).square() * observed).sum() / observed.sum()

    shape = (seq_len, train.shape[1])
    arms = _train(trial, "detect", shape, loss, _windows(train, seq_len), batch_size, steps, n_kernels)
    rng = np.random.default_rng(trial.seed)
    spiked = rng.random(len(test)) < share
    used = len(test) // seq_len * seq_len  # of a short series, where one spike at least must be seen
    if not spiked[:used].any():
        spiked[rng.integers(used)] = True
    test = test.copy()
    test[spiked, rng.integers(test.shape[1], size=spiked.sum())] += spike * rng.choice([-1, 1], spiked.sum())
    x, observed = _windows(test, seq_len, seq_len)
    label = spiked[: x.shape[0] * seq_len]
    area = {}
    for arm, net in arms.items():
        error = ((_apply(net, trial, x) - x).square() * observed).mean(2).flatten()
        area[arm] = float(roc_auc_score(label, error.numpy()))
    return area


@comparison(
    paper="timesnet",
    says="The same backbone tells series apart by their second rhythm better folded than flat.",
    where="Wu et al., Section 4.4 and Figure 5",
    arms=("1-D", "2-D"),
    metric="accuracy",
    better="higher",
    smallest={"steps": 1, "seq_len": 48, "n_kernels": 1, "n_train": 32, "n_test": 64},
)
def classification(
    trial: Trial,
    noise: NotNegative = 1.0,
    n_train: Count = 256,
    n_test: Count = 1_000,
    steps: Count = 300,
    seq_len: Several = 96,
    n_kernels: Count = 3,
    batch_size: Count = 16,
) -> dict[str, float]:
    """Train one network twice, folded and flat, to tell two generators apart.

    A series has a rhythm of 24 steps that begins anywhere and one of 8 steps locked to it;
    the classes differ in the phase of the second relative to the first, by half a turn.
    """
    rng = np.random.default_rng(trial.seed)
    n = n_train + n_test
    label = rng.integers(2, size=n)
    turns = (np.arange(seq_len) + rng.integers(24, size=(n, 1)))[..., None] / 24
    clean = np.sin(2 * np.pi * turns) + 0.5 * np.sin(2 * np.pi * (3 * turns + 0.5 * label[:, None, None]))
    series = clean + lfilter([0.44 * noise], [1, -0.9], rng.normal(size=(n, seq_len, 3)), axis=1)
    x, y = torch.as_tensor(series, dtype=torch.float32), torch.as_tensor(label)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    parts = (x[:n_train], y[:n_train])
    arms = _train(trial, "classify", x.shape[1:], loss, parts, batch_size, steps, n_kernels, n_classes=2)
    return {
        arm: float((_apply(net, trial, x[n_train:]).argmax(1) == y[n_train:]).float().mean())
        for arm, net in arms.items()
    }


@entry("forecasting", "TimesNet", paper="timesnet")
def forecast_entry(train: ndarray, seed: int) -> Callable[[ndarray], ndarray]:
    """Return a forecaster with kernels up to 5, stopped by the last tenth of time."""
    model = TimesNetForecaster(horizon=HORIZON, seq_len=HISTORY, n_kernels=3, max_epochs=5, random_state=seed)
    return model.fit(train).predict


@entry("imputation", "TimesNet", paper="timesnet")
def impute_entry(train: ndarray, seed: int) -> Callable[[ndarray], ndarray]:
    """Return an imputer with kernels up to 5, stopped by the last tenth of time."""
    model = TimesNetImputer(seq_len=HISTORY, n_kernels=3, max_epochs=5, random_state=seed)
    return model.fit(train).transform
