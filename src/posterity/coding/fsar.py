"""A learned lossless image codec whose latents are coded autoregressively, by looking up a table.

An encoder makes of an image a small grid of codes; a decoder makes of them a distribution of every pixel. The file
holds the codes, each by the distribution that its neighbours select (`finite_state`), and then the pixels by theirs:

    loss = -log p(x | codes)  -  log p(codes)  +  sum |z - e|^2 / 2                                       (1)
             data                rate             commitment

All parts are trained together. `FSARCodec.freeze` turns them into integers: whoever reads a file must come to the
writer's distributions to the last bit, at any batch size, on any machine.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Integer
from numpy import ndarray
from torch import Tensor, nn

from posterity._checks import integer
from posterity._files import seal, unseal
from posterity._models import resize_buffers
from posterity._precision import wide
from posterity.coding._stacks import frequencies, pack_shape, stack, unpack_shape, words
from posterity.coding.finite_state import check_offsets, n_rows
from posterity.coding.finite_state_prior import FiniteStatePrior, HardmaxQuantizer
from posterity.coding.frozen_codec import CATEGORICAL, FINEST, SCALES, SLAB, SPREAD, FrozenCodec

__all__ = ["CodecLoss", "FSARCodec"]

CODEC_MARK = b"PFSC"
CODEC_HEAD = struct.Struct("<BII")  # dtype, checksums of the codec and of the pixels
PIXEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
HIGHEST = 512  # levels of a pixel


class CodecLoss(NamedTuple):
    """What a batch costs.

    Attributes
    ----------
    loss : Tensor
        The mean over images of data + rate + commitment: a scalar to minimise.
    data, rate : Tensor of shape (n,)
        Nats of the pixels given the codes, and of the codes.
    commitment : Tensor of shape (n,)
        What draws codes and vectors to each other; not in the file.
    bits_per_dim : Tensor of shape (n,)
        ``(data + rate) / (dimensions ln 2)``: what the file will come to.
    """

    loss: Tensor
    data: Tensor
    rate: Tensor
    commitment: Tensor
    bits_per_dim: Tensor


class FSARCodec(nn.Module):
    """Lossless codec of images with discrete latents and a finite-state autoregressive prior.

    Train it by Adam with clipped gradients on ``codec(x).loss``; then `freeze`, `compress` and `decompress`. Its
    ``state_dict`` after `freeze` is all that a reader of its files needs.

    Parameters
    ----------
    in_channels : int, default=3
        Of the images: 1 for grey, 3 for colours.
    n_levels : int, default=256
        Values of a pixel, in 2 .. 512. Above 32 a pixel is a discretised logistic variable, else a categorical one.
    channels : int, default=2
        Codes at a place of the latent grid, each with a codebook.
    n_codes : int, default=256
        K, at least 1.
    dim : int, default=32
        Entries of a code.
    hidden : int, default=64
        Channels of the convolutions.
    downsample : int, default=4
        Pixels a latent place, along a side: a power of two. Other sizes are padded inside.
    offsets : sequence of sequence of int, default=((0, -1, 0), (0, 0, -1))
        Neighbours over (channel, row, column) by which a code is predicted, as of `FiniteStateCoder`.
    reduce_states : bool, default=False
        Whether to learn how many codes there are.
    autoregressive : bool, default=True
        False leaves the offsets out: an independent prior.

    Raises
    ------
    ValueError
        If an argument is out of range, or pixels are not integers in ``0 .. n_levels - 1``.

    Notes
    -----
    1. Encoder and decoder are plain convolutional networks, which have an exact integer form, where the paper has
       residual ones with attention.
    2. Entropies are coded by rANS of the package constriction, where the official code has a tANS of 10 bits.

    References
    ----------
    .. [1] Zhang, Yu, Li, Lin. Finite-State Autoregressive Entropy Coding for Efficient Learned Lossless Compression.
       ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import FSARCodec
    >>> _ = torch.manual_seed(0)
    >>> codec = FSARCodec(1, n_levels=16, channels=1, n_codes=4, dim=4, hidden=8)
    >>> x = torch.arange(16).repeat(2, 1, 9, 1)  # two images of 9 x 16 pixels
    >>> codec(x).loss.backward()
    >>> data = codec.freeze().compress(x)
    >>> torch.equal(codec.decompress(data), x)
    True
    """

    freqs: Tensor
    active: Tensor
    started: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        *,
        n_levels: int = 256,
        channels: int = 2,
        n_codes: int = 256,
        dim: int = 32,
        hidden: int = 64,
        downsample: int = 4,
        offsets: Sequence[Sequence[int]] = ((0, -1, 0), (0, 0, -1)),
        reduce_states: bool = False,
        autoregressive: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.n_levels = integer("n_levels", n_levels, 2)
        if n_levels > HIGHEST:
            raise ValueError(f"n_levels must be at most {HIGHEST}, got {n_levels}")
        self.channels, self.dim = integer("channels", channels, 1), integer("dim", dim, 1)
        hidden = integer("hidden", hidden, 1)
        self.downsample = integer("downsample", downsample, 1)
        if downsample & (downsample - 1):
            raise ValueError(f"downsample must be a power of two, got {downsample}")
        offsets = check_offsets(offsets, 3)
        n_rows(self.channels, integer("n_codes", n_codes, 1), offsets)
        stages = self.downsample.bit_length() - 1
        self.categorical = self.n_levels <= CATEGORICAL
        self.encoder = _encoder(self.in_channels, hidden, self.channels * dim, stages)
        self.norm = nn.BatchNorm2d(self.channels * dim, affine=False)
        self.decoder = _decoder(self.channels * dim, hidden, self.in_channels * self._wide_out, stages)
        self.quantizer = HardmaxQuantizer(n_codes, dim, self.channels)
        self.prior = FiniteStatePrior(
            n_codes, dim, self.channels, offsets if autoregressive else (), reduce_states=reduce_states
        )
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("freqs", torch.zeros(0, dtype=torch.int32))  # of the table, once frozen
        self.register_buffer("active", torch.zeros(n_codes, dtype=torch.bool))
        self._tools: FrozenCodec | None = None

    def forward(
        self, x: Integer[Tensor, "n c h w"], *, generator: torch.Generator | None = None
    ) -> CodecLoss:
        """Return what a batch costs, equation 1.

        Parameters
        ----------
        x : integer Tensor of shape (n, in_channels, h, w)
            In ``0 .. n_levels - 1``. The first batch in training mode also sets the codes.
        generator : torch.Generator, optional
            For the samples of the quantiser in training.

        Returns
        -------
        CodecLoss
        """
        self._check(x)
        if not x.numel():
            raise ValueError(f"x must have pixels, got shape {tuple(x.shape)}")
        if self.training:
            self.freqs, self._tools = self.freqs[:0], None  # what is frozen is about to be old
        padded = self._padded(x)
        if self.training and padded.shape[0] * padded[0, 0].numel() == self.downsample**2:
            raise ValueError(f"x must have more than one latent place in training, got shape {tuple(x.shape)}")  # fmt: skip
        z = SPREAD * self.norm(self.encoder(self._scaled(padded).to(self.quantizer.codebook.dtype)))
        z = wide(z).unflatten(1, (self.channels, self.dim)).movedim(2, -1)
        if self.training and not self.started:
            self.quantizer.init_from(z.detach(), generator=generator)
            self.started.fill_(True)
        made = self.quantizer(z, weights=self.prior.code_weights(), generator=generator)
        out = self.decoder(made.output.movedim(-1, 2).flatten(1, 2).to(self.quantizer.codebook.dtype))
        out = wide(out[..., : x.shape[2], : x.shape[3]]).unflatten(1, (self.in_channels, self._wide_out))
        data = (self._categorical if self.categorical else self._logistic)(out, x.long()).flatten(1).sum(1)
        rate = self.prior.rate(made.one_hot, self.quantizer.codebook)
        bits = (data + rate) / (x[0].numel() * math.log(2))
        return CodecLoss((data + rate + made.commitment).mean(), data, rate, made.commitment, bits.detach())

    @torch.no_grad()
    def freeze(self) -> "FSARCodec":
        """Fix the integer table and networks by which `compress` codes; `forward` in training mode undoes it.

        Returns
        -------
        FSARCodec
            Itself, with the table in its ``state_dict``.

        Raises
        ------
        ValueError
            If weights are not finite or too large for exact sums.
        """
        self.active = self.prior.active_states().to(self.active.device)
        table = self.prior.table_of(self.quantizer.codebook, self.active.nonzero()[:, 0])
        if not bool(torch.isfinite(table).all()):
            raise ValueError("codec must have finite weights before freeze, got NaN or infinity")
        freqs = frequencies(table.cpu().numpy(), self._precision(table.shape[-1]))
        self.freqs = torch.from_numpy(freqs).to(self.freqs.device)
        self._tools = None
        self._frozen()
        return self

    def compress(self, x: Integer[Tensor, "n c h w"]) -> bytes:
        """Return images as bytes, the same at any number of threads.

        Parameters
        ----------
        x : integer Tensor of shape (n, in_channels, h, w)
            In ``0 .. n_levels - 1``, of any integer dtype and size.

        Returns
        -------
        bytes
            With version, shape, and checksums of codec and pixels.
        """
        tools = self._frozen()
        self._check(x)
        if len(x) and not x.numel():
            raise ValueError(f"x must have pixels, got shape {tuple(x.shape)}")
        pixels = x.detach().cpu().to(torch.int64)
        ans = stack()
        if len(x):
            step = max(1, SLAB // x[0, 0].numel())
            parts = [tools.indices(self._scaled(self._padded(part))) for part in pixels.split(step)]
            indices = np.concatenate(parts)
            tools.push(ans, pixels.numpy(), indices)
            tools.coder.push(ans, indices)
        head = CODEC_HEAD.pack(PIXEL_DTYPES.index(x.dtype), tools.hash, _pixel_checksum(pixels.numpy()))
        return seal(CODEC_MARK, head + pack_shape(x.shape) + words(ans))

    def decompress(self, data: bytes) -> Integer[Tensor, "n c h w"]:
        """Return the images of `compress`, in the dtype that they had.

        Parameters
        ----------
        data : bytes
            Of this codec, frozen as it was. Safe to read from elsewhere.

        Returns
        -------
        Tensor of shape (n, in_channels, h, w)

        Raises
        ------
        ValueError
            If data are cut, damaged, of another kind or version, or of another codec.
        """
        tools = self._frozen("data")
        payload = unseal(CODEC_MARK, data)
        if len(payload) < CODEC_HEAD.size:
            raise ValueError("data must have a header, got less")
        dtype, codec, checksum = CODEC_HEAD.unpack_from(payload)
        if codec != tools.hash:
            raise ValueError("data must be of this codec, got another's: weights or table differ")
        shape, at = unpack_shape(payload, CODEC_HEAD.size, 4)
        if dtype >= len(PIXEL_DTYPES) or shape[1] != self.in_channels or (shape[0] and not math.prod(shape)):
            raise ValueError(f"data must have images of {self.in_channels} channels, got shape {shape}")
        if not shape[0]:
            return torch.zeros(shape, dtype=PIXEL_DTYPES[dtype])
        grid = (shape[0], self.channels, *(-(-side // self.downsample) for side in shape[2:]))
        ans = stack(payload[at:], (math.prod(shape), tools.least), (math.prod(grid), tools.coder.least))
        indices = tools.coder.pop(ans, grid)
        pixels = tools.pop(ans, indices, shape)
        if _pixel_checksum(pixels) != checksum:
            raise ValueError("data must give the pixels that its checksum says, got others: it is damaged")
        return torch.from_numpy(pixels).to(PIXEL_DTYPES[dtype])

    @property
    def _wide_out(self) -> int:
        return self.n_levels if self.categorical else 2

    def _precision(self, k: int) -> int:
        return max(12, min(24, k.bit_length() + 4))

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.dtype not in PIXEL_DTYPES:
            raise ValueError(f"x must hold integers, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")  # fmt: skip
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (n, {self.in_channels}, h, w), got {tuple(x.shape)}")
        if x.numel() and (x.device.type == "cpu" or self._tools is not None):
            low, high = (int(end) for end in x.to(torch.int64).aminmax())
            if low < 0 or high >= self.n_levels:
                raise ValueError(f"x must be in 0..{self.n_levels - 1}, got values from {low} to {high}")

    def _padded(self, x: Tensor) -> Tensor:
        """Return images with their last row and column repeated up to a multiple of the latent places."""
        down, right = (-side % self.downsample for side in x.shape[2:])
        return F.pad(x.double(), (0, right, 0, down), mode="replicate")

    def _scaled(self, x: Tensor) -> Tensor:
        return (2 * x - (self.n_levels - 1)) / (self.n_levels - 1)

    def _categorical(self, out: Tensor, x: Tensor) -> Tensor:
        return -out.log_softmax(2).gather(2, x[:, :, None])[:, :, 0]

    def _logistic(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the nats of pixels; the tails beyond the levels belong to the outermost."""
        log_scale = (out[:, :, 1] * 2 + self.n_levels.bit_length() - 6) * math.log(2)
        log_scale = log_scale.clamp(-FINEST / 4 * math.log(2), (SCALES - 1 - FINEST) / 4 * math.log(2))
        away = x - (self.n_levels - 1) / 2 * (1 + out[:, :, 0])
        narrow = (-log_scale).exp()
        below, above = (away - 0.5) * narrow, (away + 0.5) * narrow
        # s(b) - s(a) = s(b) s(-a) (1 - e^(a - b)), which does not cancel far out
        log_p = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-narrow))
        log_p = torch.where(x == 0, F.logsigmoid(above), log_p)
        return -torch.where(x == self.n_levels - 1, F.logsigmoid(-below), log_p)

    def _frozen(self, name: str = "x") -> FrozenCodec:
        """Return what codes in integers, made of the weights when it is first asked for."""
        if not self.freqs.numel():
            raise ValueError(
                f"{name} must come after freeze(), which fixes the table, and again after training"
            )
        if self._tools is None:
            self._tools = FrozenCodec.of(self, self._precision(self.freqs.shape[-1]))
        return self._tools

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        resize_buffers(self, ["freqs"], state_dict, prefix)
        self._tools = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _encoder(c: int, hidden: int, out: int, stages: int) -> nn.Sequential:
    layers: list[nn.Module] = [] if stages else [_conv(c, hidden), nn.ReLU()]
    for stage in range(stages):
        layers += [_conv(hidden if stage else c, hidden, 4, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, _conv(hidden, hidden), nn.ReLU(), _conv(hidden, out))


def _decoder(c: int, hidden: int, out: int, stages: int) -> nn.Sequential:
    layers = [_conv(c, hidden), nn.ReLU(), _conv(hidden, hidden), nn.ReLU()]
    for _ in range(stages - 1):
        layers += [_conv(hidden, 4 * hidden), nn.PixelShuffle(2), nn.ReLU()]
    last = [_conv(hidden, 4 * out), nn.PixelShuffle(2)] if stages else [_conv(hidden, out)]
    return nn.Sequential(*layers, *last)


def _conv(c: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the size of what passes it and a ReLU: torch's own start shrinks it."""
    conv = nn.Conv2d(c, out, kernel, stride=stride, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _pixel_checksum(pixels: ndarray) -> int:
    return zlib.crc32(pixels.astype("<u2").tobytes())
