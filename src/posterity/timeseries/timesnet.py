"""TimesNet: fold a series by its own periods, so that a day lies under a day, and convolve.

A series whose spectrum A = |rfft(x)| peaks at frequencies f_1, ..., f_k is written k
times as an image of T / p_i rows (cycles) and p_i = T // f_i columns (phases); one stack
of 2-D convolutions reads all of them, and

    block(x) = x + sum_i softmax(A_f)_i  unfold(conv2d(fold_{p_i}(x))).      (1)

The entry below a value is the same phase one cycle later, 24 steps away for a daily
rhythm of hourly data, where a 1-D kernel of that reach would need 24 times the weights.

The convolution is a mean of kernels of sizes 1, 3, 5, ...; a mean of convolutions is the
convolution with the mean of the kernels, so it is computed as one.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray
from sklearn.base import BaseEstimator, ClassifierMixin, OneToOneFeatureMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of, within

__all__ = [
    "TimesBlock",
    "TimesNet",
    "TimesNetClassifier",
    "TimesNetDetector",
    "TimesNetForecaster",
    "TimesNetImputer",
    "dominant_periods",
]

Periods = Literal["batch", "sample"] | Sequence[int]
TASKS = ("forecast", "impute", "detect", "classify")


def _spectrum(x: Tensor) -> Tensor:
    """Return the amplitudes (n, T // 2) of frequencies 1, 2, ..., averaged over channels."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # rfft has no half precision
    return torch.fft.rfft(wide, dim=1).abs()[:, 1:].mean(2)


def dominant_periods(
    x: Float[Tensor, "n time channels"], k: int
) -> tuple[Int64[Tensor, " k"], Float[Tensor, "n k"]]:
    """Return the periods of the k strongest frequencies of a batch.

    Frequency 0 takes no part, so that neither a constant nor a scale matters.

    Parameters
    ----------
    x : Tensor of shape (n, time, channels)
        Evenly spaced series.
    k : int
        How many, from 1 to ``time // 2``.

    Returns
    -------
    periods : Tensor of shape (k,), int64
        ``time // f`` of the frequencies f with the largest amplitude, averaged over batch
        and channels; strongest first. Neighbouring frequencies may share a period.
    amplitudes : Tensor of shape (n, k)
        ``|rfft(x)|`` at these frequencies, averaged over channels.

    Raises
    ------
    ValueError
        If ``x`` is not a floating-point tensor with three axes, or ``k`` does not fit.

    References
    ----------
    .. [1] Wu et al. TimesNet: Temporal 2D-Variation Modeling for General Time Series
       Analysis. ICLR 2023. Equation 1.

    Examples
    --------
    >>> import math, torch
    >>> from posterity.timeseries import dominant_periods
    >>> t = torch.arange(96) * 2 * math.pi
    >>> x = 3 * torch.sin(t / 24) + torch.sin(t / 8)
    >>> periods, amplitudes = dominant_periods(x[None, :, None], k=2)
    >>> periods, amplitudes.round()  # 3 * 96 / 2 and 1 * 96 / 2
    (tensor([24,  8]), tensor([[144.,  48.]]))
    """
    has_shape("x", floating("x", x), (None, None, None))
    _fits("k", k, x.shape[1])
    amplitudes = _spectrum(x)
    top = amplitudes.detach().mean(0).topk(k).indices
    return x.shape[1] // (top + 1), amplitudes[:, top]


def _fits(name: str, k: int, time: int) -> int:
    if integer(name, k, 1) > time // 2:
        raise ValueError(f"{name} must be at most half of the {time} time steps, got {k}")
    return k


class _Inception(nn.Module):
    """The mean of convolutions with kernels of size 1, 3, ..., held apart, applied as one."""

    def __init__(self, n_in: int, n_out: int, n_kernels: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(n_in, n_out, 2 * j + 1, padding=j) for j in range(n_kernels))
        for conv in self.kernels:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return kernel and bias of the one convolution that the mean is."""
        m = len(self.kernels)
        weights = [F.pad(conv.weight, [m - 1 - j] * 4) for j, conv in enumerate(self.kernels)]
        return torch.stack(weights).mean(0), torch.stack([conv.bias for conv in self.kernels]).mean(0)


def _convolve(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with padding "same", without the taps that could only meet the padding."""
    reach = weight.shape[-1] // 2
    h, w = (min(reach, size - 1) for size in image.shape[2:])
    weight = weight[:, :, reach - h : reach + h + 1, reach - w : reach + w + 1]
    return F.conv2d(image, weight, bias, padding=(h, w))


class TimesBlock(nn.Module):
    """Residual block (1): fold by each period, convolve, unfold, add by amplitude.

    Parameters
    ----------
    d_model : int
        Channels of the series, at least 1.
    d_ff : int
        Channels between the two convolutions, at least 1.
    top_k : int, default=5
        How many periods, from 1 to half of the time steps; unused where they are given.
    n_kernels : int, default=6
        How many kernels each convolution averages, at least 1; the largest spans
        ``2 * n_kernels - 1`` phases and cycles.
    periods : {"batch", "sample"} or sequence of int, default="batch"
        Where the periods come from. ``"batch"``, as in the paper, chooses them for the
        whole batch, so that an output depends on its batchmates; ``"sample"`` chooses for
        each series alone; numbers from 2 to the time steps fix them, weighted by the
        amplitude at the nearest frequency.

    Raises
    ------
    ValueError
        If a number is out of range, ``periods`` is neither, or the input does not fit.

    References
    ----------
    .. [1] Wu et al. TimesNet: Temporal 2D-Variation Modeling for General Time Series
       Analysis. ICLR 2023. Equations 2 to 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.timeseries import TimesBlock
    >>> TimesBlock(d_model=16, d_ff=32, top_k=3)(torch.randn(4, 96, 16)).shape
    torch.Size([4, 96, 16])
    """

    def __init__(
        self, d_model: int, d_ff: int, *, top_k: int = 5, n_kernels: int = 6, periods: Periods = "batch"
    ) -> None:
        super().__init__()
        self.d_model, d_ff = integer("d_model", d_model, 1), integer("d_ff", d_ff, 1)
        self.top_k = integer("top_k", top_k, 1)
        self.periods = periods
        if isinstance(periods, str):
            one_of("periods", periods, ("batch", "sample"))
        else:
            self.periods = [integer("periods", p, 2) for p in periods]
            if not self.periods:
                raise ValueError("periods must not be empty")
        integer("n_kernels", n_kernels, 1)
        self.up, self.down = _Inception(self.d_model, d_ff, n_kernels), _Inception(d_ff, d_model, n_kernels)

    def forward(self, x: Float[Tensor, "n time d_model"]) -> Float[Tensor, "n time d_model"]:
        """Return ``x`` plus what the convolutions read in its folded forms.

        Parameters
        ----------
        x : Tensor of shape (n, time, d_model)
            The series.

        Returns
        -------
        Tensor of shape (n, time, d_model)
            Equation (1).
        """
        has_shape("x", floating("x", x), (None, None, self.d_model), "this d_model")
        time = x.shape[1]
        out = x.clone()
        up, down = self.up.merged(), self.down.merged()
        if self.periods == "sample":
            amplitudes, top = _spectrum(x).topk(_fits("top_k", self.top_k, time), dim=1)
            share, periods = amplitudes.softmax(1).to(x.dtype), time // (top + 1)
            chosen = periods.tolist()  # the one read by the host: sizes of images must be known
            for p in sorted({p for row in chosen for p in row}):  # each period is run once
                rows = torch.tensor([i for i, row in enumerate(chosen) if p in row], device=x.device)
                weight = (share * (periods == p))[rows].sum(1)
                out.index_add_(0, rows, weight[:, None, None] * self._vary(x[rows], p, up, down))
            return out
        if isinstance(self.periods, str):
            found, amplitudes = dominant_periods(x, _fits("top_k", self.top_k, time))
            chosen = found.tolist()  # the one read
        else:
            chosen = list(self.periods)
            if max(chosen) > time:
                raise ValueError(f"periods must be at most the {time} time steps, got {max(chosen)}")
            amplitudes = _spectrum(x)[:, [min(round(time / p), time // 2) - 1 for p in chosen]]
        share = amplitudes.softmax(1).to(x.dtype)
        for p in sorted(set(chosen)):
            weight = share[:, [j for j, other in enumerate(chosen) if other == p]].sum(1)
            out += weight[:, None, None] * self._vary(x, p, up, down)
        return out

    def _vary(self, x: Tensor, period: int, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
        """Return (n, time, d_model): fold by a period, convolve twice, unfold."""
        n, time, d_model = x.shape
        cycles = -(-time // period)
        image = F.pad(x, (0, 0, 0, cycles * period - time)).view(n, cycles, period, d_model)
        image = _convolve(F.gelu(_convolve(image.permute(0, 3, 1, 2), *up)), *down)
        return image.permute(0, 2, 3, 1).reshape(n, -1, d_model)[:, :time]


class TimesNet(nn.Module):
    """A backbone of `TimesBlock` layers with a head for one of four tasks.

    Parameters
    ----------
    n_channels : int
        Variables of a series, at least 1.
    seq_len : int
        Time steps of a series, at least 2.
    task : {"forecast", "impute", "detect", "classify"}
        What the output is; "detect" reconstructs the input.
    horizon : int, default=0
        Steps to forecast, at least 1 for "forecast" and 0 else.
    n_classes : int, default=0
        Classes, at least 2 for "classify" and 0 else.
    n_outputs : int, optional
        Variables of the output: the last ``n_outputs`` of the input. Default: all. Not for
        "classify".
    d_model, d_ff : int, default=16, 32
        Channels of the layers, and between the two convolutions of a layer.
    n_layers : int, default=2
        Blocks, at least 1.
    top_k, n_kernels : int, default=5, 6
        See `TimesBlock`.
    dropout : float, default=0.1
        After the embedding, and before the head of "classify"; in [0, 1).
    n_time_features : int, default=0
        Features of the calendar that come with each step.
    periods : {"batch", "sample"} or sequence of int, default="batch"
        See `TimesBlock`; the layers see ``seq_len + horizon`` steps.

    Raises
    ------
    ValueError
        If an argument is out of range or does not go with the task, or an input does not
        fit. Values (NaN, a mask that is not 0 or 1) are looked at on the CPU only.

    Notes
    -----
    Departures from the authors' code: (1) frequency 0 is left out of the choice of
    periods, where their code gives it amplitude 0 and divides by it on a constant series;
    (2) entries that are not observed are replaced by zero rather than trusted to be zero;
    (3) padding at the end of the folded series is zero, as the paper has it;
    (4) the statistics of the normalisation are part of the derivative by ``x``.

    References
    ----------
    .. [1] Wu et al. TimesNet: Temporal 2D-Variation Modeling for General Time Series
       Analysis. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.timeseries import TimesNet
    >>> TimesNet(7, 96, "forecast", horizon=24)(torch.randn(2, 96, 7)).shape
    torch.Size([2, 24, 7])
    """

    def __init__(
        self, n_channels: int, seq_len: int, task: Literal["forecast", "impute", "detect", "classify"], *,
        horizon: int = 0, n_classes: int = 0, n_outputs: int | None = None, d_model: int = 16,
        d_ff: int = 32, n_layers: int = 2, top_k: int = 5, n_kernels: int = 6, dropout: float = 0.1,
        n_time_features: int = 0, periods: Periods = "batch",
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_channels, self.seq_len = integer("n_channels", n_channels, 1), integer("seq_len", seq_len, 2)
        self.task = one_of("task", task, TASKS)
        for name, size, of, low in (
            ("horizon", horizon, "forecast", 1),
            ("n_classes", n_classes, "classify", 2),
        ):
            if task == of:
                integer(f"{name} for {task}", size, low)
            elif size != 0:
                raise ValueError(f"{name} must be 0 for {task}, got {size}")
        self.horizon = horizon
        self.n_time_features = integer("n_time_features", n_time_features, 0)
        if n_outputs is not None and task == "classify":
            raise ValueError(f"n_outputs must be None for classify, got {n_outputs}")
        self.n_outputs = n_channels if n_outputs is None else integer("n_outputs", n_outputs, 1)
        if self.n_outputs > n_channels:
            raise ValueError(f"n_outputs must be at most n_channels = {n_channels}, got {n_outputs}")
        length = seq_len + horizon
        if isinstance(periods, str):
            _fits("top_k", top_k, length)
        elif any(p > length for p in periods):
            raise ValueError(f"periods must be at most the {length} time steps, got {max(periods)}")
        within("dropout", dropout, 0, 1, open_high=True)

        self.blocks = nn.ModuleList(
            TimesBlock(d_model, d_ff, top_k=top_k, n_kernels=n_kernels, periods=periods)
            for _ in range(integer("n_layers", n_layers, 1))
        )
        self.embed = nn.Conv1d(n_channels, d_model, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.embed.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.embed_time = nn.Linear(n_time_features, d_model, bias=False) if n_time_features else None
        self.extend = nn.Linear(seq_len, length) if task == "forecast" else None
        self.norm = nn.LayerNorm(d_model)  # one for all layers
        self.dropout = nn.Dropout(dropout)
        n_in, n_out = (d_model * seq_len, n_classes) if task == "classify" else (d_model, self.n_outputs)
        self.head = nn.Linear(n_in, n_out)
        angles = torch.arange(seq_len)[:, None] / 10_000.0 ** (torch.arange(0, d_model, 2) / d_model)
        positions = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d_model]
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "n seq_len n_channels"],
        *,
        mask: Shaped[Tensor, "n seq_len n_channels"] | None = None,
        time_features: Float[Tensor, "n seq_len n_time_features"] | None = None,
        padding_mask: Shaped[Tensor, "n seq_len"] | None = None,
    ) -> Float[Tensor, " n *output"]:
        """Return the forecast, the reconstruction or the logits.

        Parameters
        ----------
        x : Tensor of shape (n, seq_len, n_channels)
            The series; what it holds under ``mask == 0`` does not matter, NaN included.
        mask : Tensor of shape (n, seq_len, n_channels)
            1 or True where observed. Required by "impute", refused by other tasks.
        time_features : Tensor of shape (n, seq_len, n_time_features)
            Required if, and only if, ``n_time_features`` is positive.
        padding_mask : Tensor of shape (n, seq_len), optional
            1 or True where a series is real, for "classify". Also set ``x`` to 0 elsewhere:
            the layers read across the boundary.

        Returns
        -------
        Tensor
            "forecast": (n, horizon, n_outputs); "impute", "detect": (n, seq_len, n_outputs);
            "classify": logits (n, n_classes).
        """
        self._check(x, mask, time_features, padding_mask)
        if self.task == "classify":
            mean = std = None
        else:
            x, mean, std = _normalise(x, mask)
        x = self.embed(x.transpose(1, 2)).transpose(1, 2) + self.positions
        if self.embed_time is not None:
            x = x + self.embed_time(time_features)
        x = self.dropout(x)
        if self.extend is not None:
            x = self.extend(x.transpose(1, 2)).transpose(1, 2)  # (n, seq_len + horizon, d_model)
        for block in self.blocks:
            x = self.norm(block(x))
        if mean is None or std is None:
            x = self.dropout(F.gelu(x))
            if padding_mask is not None:
                x = x * padding_mask[..., None].to(x.dtype)
            return self.head(x.flatten(1))
        x = self.head(x[:, -self.horizon :])  # all steps if the horizon is 0
        return x * std[..., -self.n_outputs :] + mean[..., -self.n_outputs :]

    def _check(
        self, x: Tensor, mask: Tensor | None, time_features: Tensor | None, padding_mask: Tensor | None
    ) -> None:
        has_shape("x", floating("x", x), (None, self.seq_len, self.n_channels), "this network")
        for name, value, of in (("mask", mask, "impute"), ("padding_mask", padding_mask, "classify")):
            if value is not None and self.task != of:
                raise ValueError(f"{name} is for {of}, got one for {self.task}")
            if value is not None:
                has_shape(name, value, x.shape if name == "mask" else x.shape[:2], "this x")
                if value.device.type == "cpu" and not bool(((value == 0) | (value == 1)).all()):
                    raise ValueError(f"{name} must be 0 or 1 everywhere")
        if self.task == "impute" and mask is None:
            raise ValueError("mask must be given for impute: 1 where observed")
        if (time_features is None) != (self.n_time_features == 0):
            got = "none" if time_features is None else f"shape {tuple(time_features.shape)}"
            raise ValueError(f"time_features must go with n_time_features={self.n_time_features}, got {got}")
        if time_features is not None:
            has_shape("time_features", time_features, (*x.shape[:2], self.n_time_features), "this x")
        if x.device.type == "cpu":
            finite("x" if mask is None else "observed x", x if mask is None else x.masked_fill(mask == 0, 0))

    def load_tslib(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the weights of the authors' Time-Series-Library model of the same sizes.

        Parameters
        ----------
        state_dict : mapping of str to Tensor
            Their ``model.state_dict()``. Its table of positions is ignored, and so is its
            embedding of the calendar if ``n_time_features`` is 0.

        Raises
        ------
        ValueError
            If a name is missing or left over, or a shape differs.
        """
        own = {}
        for name, value in state_dict.items():
            for pattern, ours in _TSLIB:
                if match := re.fullmatch(pattern, name):
                    own[match.expand(ours)] = value
                    break
            else:
                calendar = name.startswith("enc_embedding.temporal_embedding.") and not self.n_time_features
                if not name.endswith("position_embedding.pe") and not calendar:
                    raise ValueError(f"state_dict has {name}, which this network has not")
        if not self.n_time_features:
            own.pop("embed_time.weight", None)
        try:
            self.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"state_dict does not fit: {error}") from error


_TSLIB = (  # a name in the authors' library, ours
    (r"enc_embedding\.value_embedding\.tokenConv\.(\w+)", r"embed.\1"),
    (r"enc_embedding\.temporal_embedding\.embed\.(\w+)", r"embed_time.\1"),
    (r"model\.(\d+)\.conv\.0\.kernels\.(\d+)\.(\w+)", r"blocks.\1.up.kernels.\2.\3"),
    (r"model\.(\d+)\.conv\.2\.kernels\.(\d+)\.(\w+)", r"blocks.\1.down.kernels.\2.\3"),
    (r"layer_norm\.(\w+)", r"norm.\1"),
    (r"predict_linear\.(\w+)", r"extend.\1"),
    (r"projection\.(\w+)", r"head.\1"),
)


def _normalise(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the series centred and scaled by what was observed, with mean and deviation."""
    if mask is None:
        mean = x.mean(1, keepdim=True)
        x = x - mean
        std = (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x / std, mean, std
    hidden = mask == 0
    count = (~hidden).sum(1, keepdim=True).clamp(min=1)
    mean = x.masked_fill(hidden, 0).sum(1, keepdim=True) / count
    x = (x - mean).masked_fill(hidden, 0)
    std = (x.square().sum(1, keepdim=True) / count + 1e-5).sqrt()
    return x / std, mean, std


@contextmanager
def _seeded(random_state: Any) -> Iterator[None]:
    """Run a block under a seed drawn from ``random_state``; torch's own state stays."""
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _starts(time: int, seq_len: int, stride: int) -> ndarray:
    """Return where windows begin; the last one ends with the series."""
    return np.unique([*range(0, time - seq_len, stride), time - seq_len])


class _Estimator(BaseEstimator):
    """What the four estimators share: sizes, standardisation, windows, training."""

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
        scale = np.nanstd(rows, axis=0)
        self.mean_, self.scale_ = np.nanmean(rows, axis=0), np.where(scale > 0, scale, 1.0)

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
        train = torch.arange(time - held - seq_len - horizon + 1 if held < time else 0)
        first = time - held - (seq_len if horizon else 0)
        if self.validation_fraction == 0 or len(train) == 0:
            return torch.arange(time - seq_len - horizon + 1), torch.arange(0)
        return train, torch.arange(first, time - seq_len - horizon + 1)

    def _train(
        self, net: TimesNet, loss: Callable[[Tensor], Tensor], train: Tensor, held_out: Tensor,
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam, decay: float = 0.5, clip: float = math.inf,
    ) -> None:  # fmt: skip
        """Minimise ``loss(rows)``; keep the weights that were best on rows held out."""
        self.net_, self.losses_ = net, []
        opt = optimizer(net.parameters(), lr=self.lr)  # type: ignore[call-arg]
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, decay)
        best, kept, bad = math.inf, None, 0
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
            with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(0)  # the same entries are hidden each time
                parts = held_out.to(self.device).split(self.batch_size)
                score = sum(len(rows) * float(loss(rows)) for rows in parts) / len(held_out)
            if score < best:
                best, bad = score, 0
                kept = {name: value.clone() for name, value in net.state_dict().items()}
            elif (bad := bad + 1) >= self.patience:
                break
        if kept is not None:
            net.load_state_dict(kept)
        self._mode("sample").eval()

    def _mode(self, periods: Literal["batch", "sample"]) -> TimesNet:
        for block in self.net_.blocks:
            block.periods = periods
        return self.net_

    def _predict(self, *inputs: Tensor, keys: Sequence[str] = ()) -> ndarray:
        """Return what the trained network makes of its inputs, batch after batch."""
        with torch.no_grad():
            parts = zip(*(tensor.split(self.batch_size) for tensor in inputs), strict=True)
            out = [self.net_(part[0], **dict(zip(keys, part[1:], strict=True))) for part in parts]
        return torch.cat(out).cpu().numpy()


class TimesNetForecaster(_Estimator):
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
    >>> model = TimesNetForecaster(horizon=6, seq_len=24, d_model=4, d_ff=4, max_epochs=1, random_state=0)
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
        series = self._tensor(X)
        steps = torch.arange(seq_len + horizon, device=self.device)
        with _seeded(self.random_state):
            net = self._network(X.shape[1], seq_len, "forecast", horizon=horizon)

            def loss(rows: Tensor) -> Tensor:
                window = series[rows[:, None] + steps]
                return F.mse_loss(net(window[:, :seq_len]), window[:, seq_len:])

            self._train(net, loss, *self._by_time(len(X), seq_len, horizon))
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
        out = self._predict(self._windows(windows)) * self.scale_ + self.mean_  # float64 again
        return out if X is not None and np.ndim(X) == 3 else out[0]

    def _windows(self, windows: ndarray) -> Tensor:
        if not np.isfinite(windows).all():
            raise ValueError("X must be finite, got NaN or infinity")
        return self._tensor(windows)


class TimesNetImputer(OneToOneFeatureMixin, TransformerMixin, _Estimator):
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
    >>> model = TimesNetImputer(seq_len=24, d_model=4, d_ff=4, max_epochs=1, random_state=0)
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
        series = self._tensor(X)
        observed = torch.as_tensor(~np.isnan(X), device=self.device)
        steps = torch.arange(seq_len, device=self.device)
        with _seeded(self.random_state):
            net = self._network(X.shape[1], seq_len, "impute")

            def loss(rows: Tensor) -> Tensor:
                at = rows[:, None] + steps
                window, known = series[at], observed[at]
                hidden = known & (torch.rand_like(window) < self.mask_rate)
                error = net(window, mask=known & ~hidden) - window
                return (error.square() * hidden).sum() / hidden.sum().clamp(min=1)

            self._train(net, loss, *self._by_time(len(X), seq_len))
        return self

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
        out = self._predict(self._tensor(X)[at], known[at], keys=("mask",))
        filled, count = np.zeros_like(X), np.zeros((len(X), 1))
        np.add.at(filled, at, out)
        np.add.at(count, at, 1.0)
        return np.where(np.isnan(X), filled / count * self.scale_ + self.mean_, X)


class TimesNetDetector(OutlierMixin, _Estimator):
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
    >>> model = TimesNetDetector(seq_len=24, d_model=4, d_ff=4, max_epochs=1, random_state=0).fit(X)
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
        series = self._tensor(X)
        steps = torch.arange(seq_len, device=self.device)
        with _seeded(self.random_state):
            net = self._network(X.shape[1], seq_len, "detect")

            def loss(rows: Tensor) -> Tensor:
                window = series[rows[:, None] + steps]
                return F.mse_loss(net(window), window)

            self._train(net, loss, *self._by_time(len(X), seq_len))
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


class TimesNetClassifier(ClassifierMixin, _Estimator):
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
    >>> model = TimesNetClassifier(d_model=4, d_ff=4, n_kernels=2, max_epochs=20, random_state=0)
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
        with _seeded(self.random_state):
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
        logits = self._predict(
            self._tensor(X), torch.as_tensor(real, device=self.device), keys=("padding_mask",)
        )
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
