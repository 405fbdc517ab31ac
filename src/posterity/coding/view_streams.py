"""One view as bytes: networks in integers, and distributions that camera and receiver make alike to the last bit.

A latent is coded by a Gaussian about its mean, ``y = symbol + mean``. Mean and scale come from a hyperprior and, in an
order that both ends walk, from latents that are known by then. All of it is integers in units of 2^-12 (`_integers`), the
scale only an index into 64 fixed ones: so no sum of floats is in the file, whatever the batch or the number of threads.
"""

import decimal
import functools
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn

from posterity._files import seal, unseal
from posterity._precision import widened
from posterity.coding._integers import LIMIT, UNIT, integer_network, to_units
from posterity.coding._stacks import Rows, frequencies, pack_shape, stack, unpack_shape, words
from posterity.coding.view_transfer import anchors

__all__: list[str] = []

VIEW_MARK = b"PLDM"
VIEW_HEAD = struct.Struct("<II")  # checksums of the model and of the latents
PRECISION = 24  # bits of a frequency
LARGEST, SIDE = 1023, 63  # of a latent's symbol and of a hyper-latent, in magnitude
N_SCALES, FINEST, COARSEST = 64, "0.11", "256"
FARTHEST = 2.0**22  # of a mean, in units: latents stay within what float32 holds exactly
REACH = 2  # of a context: 5 x 5
AT_ONCE = 2**23  # numbers of a batch that a network takes at once
LOWEST = 1e-2  # of the normalisation's constant


class GDN(nn.Module):
    """Divisive normalisation, ``x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)``, or its approximate inverse.

    Parameters
    ----------
    channels : int
    inverse : bool, default=False
        Multiply instead.

    References
    ----------
    .. [1] Ballé, Laparra, Simoncelli. Density Modeling of Images Using a Generalized Normalization Transformation. ICLR 2016.
    """

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.root_beta = nn.Parameter(torch.ones(channels))
        self.root_gamma = nn.Parameter((0.1 * torch.eye(channels) + 1e-3).sqrt())

    def rates(self) -> tuple[Tensor, Tensor]:
        """Return beta and gamma, positive as squares."""
        return self.root_beta.square() + LOWEST, self.root_gamma.square()

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, *self.rates(), self.inverse)


@widened
def _normalised(x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool) -> Tensor:
    norm = F.conv2d(x.square(), gamma[..., None, None], beta).sqrt()
    return x * norm if inverse else x / norm


class _IntegerGDN(nn.Module):
    """Divisive normalisation of units: sums of squares are exact, IEEE 754 fixes the root and the quotient."""

    def __init__(self, layer: GDN) -> None:
        super().__init__()
        beta, gamma = (value.detach() for value in layer.rates())
        self.sums = integer_network([plain_conv(gamma[..., None, None], beta)])

    def forward(self, x: Tensor) -> Tensor:
        norm = self.sums(torch.floor(x * x / UNIT).clamp_max(LIMIT)).clamp_min(1.0)
        return torch.floor(x * math.sqrt(UNIT) / norm.sqrt()).clamp(-LIMIT, LIMIT)


def plain_conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a convolution of these numbers, without padding; no generator is asked for others first."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], device="meta")  # type: ignore[arg-type]
    conv.weight = nn.Parameter(weight.detach())
    conv.bias = None if bias is None else nn.Parameter(bias.detach())
    return conv


def integers(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return layers, normalisation among them, as an integer network."""
    return nn.Sequential(
        *(_IntegerGDN(layer) if isinstance(layer, GDN) else integer_network([layer]) for layer in layers)
    )


Pick = Callable[[Tensor], Tensor]


class Window(NamedTuple):
    """A convolution of 5 x 5 at some places only, by those of its taps that are not 0.

    Attributes
    ----------
    rows, columns : Tensor of shape (taps,)
        Of the window.
    net : nn.Module
        Of the numbers at the taps, channel by channel: 1 x 1.
    """

    rows: Tensor
    columns: Tensor
    net: nn.Module

    @classmethod
    def of(cls, seen: nn.Conv2d, *, whole: bool) -> "Window":
        """Return the window of a convolution, in floats or in whole units."""
        taps = (seen.weight != 0).any(0).any(0)
        taps[0, 0] |= ~taps.any()  # one at least
        weight = seen.weight[..., taps].detach().flatten(1)[..., None, None]
        net = plain_conv(weight, seen.bias)
        rows, columns = taps.nonzero().unbind(1)
        return cls(rows, columns, integers([net]) if whole else net)

    def at(self, padded: Tensor, corners: Tensor) -> Tensor:
        """Return what is seen (n, out, places) in windows whose first number has these places of the flat grid."""
        around = (self.rows * padded.shape[3] + self.columns)[:, None] + corners

        def net(x: Tensor) -> Tensor:
            return self.net(x[..., around].flatten(1, 2)[..., None])[..., 0]

        return at_rest(net, padded.flatten(2))


class Predictor(NamedTuple):
    """What gives means and scales of latents: of the hyperprior alone, or also of latents that are known.

    Attributes
    ----------
    context : str
        "none", "checkerboard" or "autoregressive".
    seen : Window, optional
        Of the context.
    parameters : nn.Module, optional
        Of what is seen and the hyperprior.
    unit : float
        What 1 is: 1.0, or 2^12 in integers.
    """

    context: str
    seen: Window | None
    parameters: nn.Module | None
    unit: float

    @torch.no_grad()
    def walk(self, hyper: Tensor, symbols: Callable[[Tensor, Tensor, Pick], Tensor]) -> Tensor:
        """Return latents, which are symbols and means.

        ``symbols(mean, raw, pick)`` says which symbols stand at some places (n, latent, places), where means and raw
        scales are these; ``pick`` takes the places from any grid.
        """
        n, width, h, w = hyper.shape
        padded = hyper.new_zeros(n, width // 2, h + 2 * REACH, w + 2 * REACH)
        flat, across = padded.flatten(2), padded.shape[3]
        for places, blind in self._order(h, w, hyper.device):
            corners = places // w * across + places % w

            def pick(x: Tensor, places: Tensor = places) -> Tensor:
                return x.flatten(2)[..., places]

            seen = None if blind or self.seen is None else self.seen.at(padded, corners)
            mean, raw = self._predicted(pick(hyper), seen)
            flat[..., corners + REACH * (across + 1)] = symbols(mean, raw, pick) * self.unit + mean
        return padded[..., REACH:-REACH, REACH:-REACH]

    def _order(self, h: int, w: int, device: torch.device) -> Iterator[tuple[Tensor, bool]]:
        """Yield which places of the flat grid are next, and whether by the hyperprior alone."""
        every = torch.arange(h * w, device=device)
        if self.context == "checkerboard":
            first = anchors(h, w).flatten().to(device)
            if h * w > 1:  # else there are no anchors
                yield every[first], True
            yield every[~first], False
        else:
            for places in every.split(1 if self.context == "autoregressive" else h * w):
                yield places, self.context == "none"

    def _predicted(self, hyper: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and raw scale at some places (n, latent, places), of the hyperprior and what is seen there."""
        if self.parameters is not None:
            seen = torch.zeros_like(hyper) if seen is None else seen
            hyper = at_rest(self.parameters, torch.cat([seen, hyper], 1)[..., None])[..., 0]
        mean, raw = hyper.chunk(2, 1)
        return mean.clamp(-FARTHEST, FARTHEST), raw


@widened
def gaussian_nats(away: Tensor, raw: Tensor) -> Tensor:
    """Return the nats (m,) of unit intervals about numbers that are so far from their mean: ``-log P``."""
    scale = F.softplus(raw) + float(FINEST)
    far = away.abs()
    above, below = torch.special.log_ndtr((0.5 - far) / scale), torch.special.log_ndtr(-(0.5 + far) / scale)
    inside = (above - below).clamp_min(torch.finfo(away.dtype).tiny)
    return -(above + torch.log(-torch.expm1(-inside))).flatten(1).sum(1)


@widened
def mixture_log_p(z: Tensor, mixture: Tensor) -> Tensor:
    logits, centre, log_scale = (part[:, None, :, None, None] for part in mixture.unbind())
    away, narrow = z - centre, (-log_scale).clamp_max(4.0).exp()
    above, below = (away + 0.5) * narrow, (away - 0.5) * narrow
    # s(b) - s(a) = s(b) s(-a) (1 - e^(a - b)), which does not cancel far out
    each = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-narrow))
    return (logits.log_softmax(0) + each).logsumexp(0)


def at_rest(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return what a network makes of a batch, so many at once as memory likes."""
    step = max(1, AT_ONCE // max(1, 25 * x[0].numel()))
    return net(x) if len(x) <= step else torch.cat([net(part) for part in x.split(step)])


class FrozenViews(NamedTuple):
    """The networks of one view as they code, and its tables."""

    encoder: nn.Module
    hyper_encoder: nn.Module
    hyper_decoder: nn.Module
    predictor: Predictor
    hyper_rows: Rows
    rows: Rows
    hash: int

    @classmethod
    def of(
        cls, encoder: nn.Sequential, hyper_encoder: nn.Sequential, hyper_decoder: nn.Sequential, context: str,
        seen: nn.Conv2d | None, parameters: nn.Sequential | None, freqs: ndarray, about: tuple[Any, ...],
    ) -> "FrozenViews":  # fmt: skip
        """Return the integers of networks, and of a table of hyper-latents (channels, 2 SIDE + 1)."""
        predictor = Predictor(
            context, None if seen is None else Window.of(seen, whole=True),
            None if parameters is None else integers(parameters), UNIT,
        )  # fmt: skip
        reader = integers(hyper_decoder)
        rows, hyper_rows = gaussian_rows(), Rows(freqs, PRECISION)
        check = zlib.crc32(repr((about, context, rows.checksum(), hyper_rows.checksum())).encode())
        for net in (
            reader,
            None if seen is None else integers([seen]),
            predictor.parameters,
        ):  # not the encoder: cameras may have others
            for name, value in net.state_dict().items() if net is not None else ():
                check = zlib.crc32(value.numpy().astype("<f8").tobytes(), zlib.crc32(name.encode(), check))
        return cls(integers(encoder), integers(hyper_encoder), reader, predictor, hyper_rows, rows, check)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[ndarray, ndarray]]]:
        """Return latents in units and hyper-latents of padded images in [0, 1], and symbols and rows in their order."""
        y = at_rest(self.encoder, to_units(x))
        z = torch.floor(at_rest(self.hyper_encoder, y) / UNIT + 0.5).clamp(-SIDE, SIDE)
        kept: list[tuple[ndarray, ndarray]] = []

        def symbols(mean: Tensor, raw: Tensor, pick: Pick) -> Tensor:
            found = torch.floor((pick(y) - mean) / UNIT + 0.5).clamp(-LARGEST, LARGEST)
            kept.append((_whole(found) + LARGEST, _scale_rows(raw)))
            return found

        return self.predictor.walk(self._hyper(z, y.shape), symbols), z, kept

    def bits(self, z: Tensor, kept: list[tuple[ndarray, ndarray]]) -> ndarray:
        """Return the bits of each image of a batch, by the tables."""
        every = [(self.rows, *pair) for pair in kept]
        every.append((self.hyper_rows, _whole(z) + SIDE, _channels(z.shape)))
        parts = [table.freqs[rows, found].reshape(len(z), -1) for table, found, rows in every]
        return np.sum([(PRECISION - np.log2(part)).sum(1) for part in parts], 0)

    def write(self, x: Tensor, shape: Sequence[int]) -> bytes:
        """Return a view as a stream, for images of ``shape`` that are padded."""
        y, z, kept = self.latents(x)
        ans = stack()
        for found, rows in reversed(kept):
            self.rows.push(ans, found, rows)
        self.hyper_rows.push(ans, _whole(z) + SIDE, _channels(z.shape))
        return seal(
            VIEW_MARK, VIEW_HEAD.pack(self.hash, _latent_checksum(y)) + pack_shape(shape) + words(ans)
        )

    def read(self, data: bytes, name: str, places: int, downsample: int) -> tuple[Tensor, tuple[int, ...]]:
        """Return the latents of a stream in units, and the shape (n, h, w) of its images."""
        try:
            payload = unseal(VIEW_MARK, data)
            if len(payload) < VIEW_HEAD.size:
                raise ValueError("data must have a header, got less")
            model, checksum = VIEW_HEAD.unpack_from(payload)
            if model != self.hash:
                raise ValueError("data must be of this codec, got another's: weights or tables differ")
            shape, at = unpack_shape(payload, VIEW_HEAD.size, 3)
            if not math.prod(shape):
                raise ValueError(f"data must have images with pixels, got (n, h, w) = {shape}")
            grid = (shape[0], places, *(-(-side // downsample) for side in shape[1:]))
            deep = (shape[0], len(self.hyper_rows.freqs), *(-(-side // 4) for side in grid[2:]))
            ans = stack(payload[at:], (math.prod(deep), self.hyper_rows.least), (math.prod(grid), self.rows.least))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        z = torch.from_numpy(self.hyper_rows.pop(ans, _channels(deep))).double().reshape(deep) - SIDE

        def symbols(mean: Tensor, raw: Tensor, pick: Pick) -> Tensor:
            found = self.rows.pop(ans, _scale_rows(raw))
            return torch.from_numpy(found).double().reshape(raw.shape) - LARGEST

        y = self.predictor.walk(self._hyper(z, grid), symbols)
        if _latent_checksum(y) != checksum:
            raise ValueError(f"{name}: data must give the latents that its checksum says, got others: it is damaged")  # fmt: skip
        return y, shape

    def _hyper(self, z: Tensor, grid: Sequence[int]) -> Tensor:
        return at_rest(self.hyper_decoder, z * UNIT)[..., : grid[2], : grid[3]]


def _whole(x: Tensor) -> ndarray:
    return x.numpy().astype(np.int32).ravel()


def _channels(shape: Sequence[int]) -> ndarray:
    """Return the row of each number of a grid: its channel."""
    return np.broadcast_to(np.arange(shape[1], dtype=np.int32)[:, None, None], shape).ravel()


def _latent_checksum(y: Tensor) -> int:
    return zlib.crc32(y.numpy().astype("<i4").tobytes())


def _scale_rows(raw: Tensor) -> ndarray:
    return np.searchsorted(_thresholds(), raw.numpy().ravel(), side="right").astype(np.int32)


@functools.cache
def _scales() -> list[decimal.Decimal]:
    """Return 64 scales, each the same multiple of the one before."""
    with decimal.localcontext() as context:
        context.prec = 40
        low, high = decimal.Decimal(FINEST), decimal.Decimal(COARSEST)
        return [low * (high / low) ** (decimal.Decimal(i) / (N_SCALES - 1)) for i in range(N_SCALES)]


@functools.cache
def _thresholds() -> ndarray:
    """Return where, in units of the raw scale, one scale ends and the next begins: half way in logarithms."""
    with decimal.localcontext() as context:
        context.prec = 40
        middle = [
            (a * b).sqrt() - decimal.Decimal(FINEST) for a, b in zip(_scales(), _scales()[1:], strict=False)
        ]
        raw = [value + (1 - (-value).exp()).ln() for value in middle]  # of softplus the inverse
        return np.array([float((value * int(UNIT)).to_integral_value()) for value in raw])


@functools.cache
def gaussian_rows() -> Rows:
    """Return the table of Gaussian distributions of whole numbers, one a scale, the same on every machine.

    The density is a product of correctly rounded exponentials, its integral Simpson's rule with 32 steps or more a
    standard deviation: products, quotients and sums, in an order that is given.
    """
    table = np.zeros((N_SCALES, 2 * LARGEST + 1))
    for i, scale in enumerate(_scales()):
        half = 2 * math.ceil(8 / float(scale)) + 2  # steps of half a unit, even
        with decimal.localcontext() as context:
            context.prec = 40
            small = (decimal.Decimal(1) / (2 * half) / scale) ** 2  # squared step, in standard deviations
            first, ratio = float((-small / 2).exp()), float((-small).exp())
        last = min(LARGEST, math.ceil(9 * float(scale)) + 1)
        factors = np.multiply.accumulate(np.concatenate([[first], np.full((2 * last + 1) * half - 1, ratio)]))
        density = np.multiply.accumulate(np.concatenate([[1.0], factors]))
        pairs = density[:-2:2] + 4 * density[1:-1:2] + density[2::2]
        edges = np.add.accumulate(pairs)[half // 2 - 1 :: half]  # at 1/2, 3/2, ...
        mass = np.concatenate([[2 * edges[0]], np.diff(edges)])
        table[i, LARGEST : LARGEST + len(mass)] = mass
        table[i, LARGEST - len(mass) + 1 : LARGEST + 1] = mass[::-1]
    return Rows(frequencies(table, PRECISION), PRECISION)
