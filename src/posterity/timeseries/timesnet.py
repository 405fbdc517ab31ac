"""TimesNet: layers that fold a series by its own periods, and a head for each of four tasks.

The series is centred and scaled by itself, embedded, read by blocks that lay a day under
a day (`posterity.timeseries.period_folding`), and mapped back:

    x_0 = embed((x - mean) / std) + positions,
    x_l = norm(block_l(x_{l-1})),    l = 1, ..., L,                          (1)
    out = head(x_L) std + mean.

A forecast lets a linear map along time make T + horizon steps of the T of x_0; to fill
gaps, mean and std are those of what is observed, and the rest is 0; to classify, nothing
is scaled, and the head reads all steps at once.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, one_of, within
from posterity._precision import wide
from posterity.timeseries.period_folding import Periods, TimesBlock, _fits

__all__ = ["TimesNet"]

TASKS = ("forecast", "impute", "detect", "classify")


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
        dtype = x.dtype
        if self.task == "classify":
            mean = std = None
        else:
            x, mean, std = _normalise(wide(x), mask)
            x = x.to(dtype)
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
        return (x * std[..., -self.n_outputs :] + mean[..., -self.n_outputs :]).to(dtype)

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
