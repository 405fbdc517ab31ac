"""A codec in integers: networks whose sums are exact, and tables of pixels that are the same on every machine."""

import copy
import decimal
import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from posterity.coding._integers import UNIT, integer_network, to_units
from posterity.coding._stacks import Rows, family, frequencies
from posterity.coding.finite_state import FiniteStateCoder

__all__: list[str] = []

CATEGORICAL = 32  # up to so many levels each has a probability of its own
PIXEL_BITS = 16  # of a frequency of pixels
SCALES, FINEST = 36, 10  # of the logistic distribution: 2^((i - 10) / 4) levels
SHARP, TOP, FLOOR = (
    32,
    2**20,
    64,
)  # logits in steps of 1/32, weights up to 2^20 above a floor of 2^-14 of that
SPREAD = 0.25  # standard deviation of a vector's entries, beside the commitment's variance of 1
SLAB = 2**18  # pixels that pass the networks at once
CLIP = 2.0**19  # of vectors and codes, whose squares must sum exactly


@dataclass
class FrozenCodec:
    """Networks and tables of a codec, as they code."""

    encoder: nn.Sequential
    decoder: nn.Sequential
    codebook: Tensor  # (C, K, dim) in units
    bonus: Tensor  # (K,) logarithms of the codes' weights
    coder: FiniteStateCoder
    n_levels: int
    in_channels: int

    @classmethod
    def of(cls, codec: Any, precision: int) -> "FrozenCodec":
        """Return the integers of an `FSARCodec` whose table is known; normalisation becomes part of the encoder."""
        *layers, last = copy.deepcopy(codec.encoder).cpu().double()
        norm = codec.norm
        share = SPREAD * (norm.running_var.cpu().double() + norm.eps).rsqrt()
        last.weight.data *= share[:, None, None, None]
        last.bias.data = (last.bias.data - norm.running_mean.cpu().double()) * share
        kept = codec.active.nonzero()[:, 0]
        weights = codec.prior.code_weights()
        bonus = torch.zeros(len(kept)) if weights is None else weights[kept].detach().log()
        codebook = to_units(codec.quantizer.codebook.detach()[:, kept].cpu()).clamp(-CLIP, CLIP)
        coder = FiniteStateCoder(codec.freqs, codec.prior.offsets, precision=precision)
        return cls(
            integer_network([*layers, last]), integer_network(copy.deepcopy(codec.decoder).cpu()), codebook,
            bonus.cpu().double(), coder, codec.n_levels, codec.in_channels,
        )  # fmt: skip

    def __post_init__(self) -> None:
        self.hash = zlib.crc32(repr((self.coder.hash, self.n_levels, self.in_channels)).encode())
        for tensor in [*self.decoder.state_dict().values(), self.codebook]:
            self.hash = zlib.crc32(tensor.numpy().astype("<f8").tobytes(), self.hash)
        self.rows = None if self.n_levels <= CATEGORICAL else _logistic_rows(self.n_levels)
        most = (TOP + FLOOR) / (TOP + FLOOR * self.n_levels)
        self.least = -math.log2(most) if self.rows is None else self.rows.least

    def indices(self, scaled: Tensor) -> ndarray:
        """Return the nearest codes of padded images, exact sums throughout: (n, C, h, w)."""
        channels, k, dim = self.codebook.shape
        z = self.encoder(to_units(scaled)).clamp(-CLIP, CLIP)
        places = z.unflatten(1, (channels, dim)).permute(1, 0, 3, 4, 2)
        product = places.flatten(1, 3) @ self.codebook.mT
        offset = torch.floor(2 * UNIT**2 * self.bonus) - self.codebook.square().sum(-1)
        best = (2 * product + offset[:, None]).numpy().argmax(-1)  # numpy's is the first among equals
        return best.reshape(places.shape[:-1]).swapaxes(0, 1)

    def _out(self, indices: ndarray) -> Tensor:
        """Return what the decoder says of pixels, in units: (n, c, numbers of a pixel, h, w)."""
        at = torch.from_numpy(np.ascontiguousarray(indices))
        codes = self.codebook[torch.arange(len(self.codebook))[:, None, None], at]
        return self.decoder(codes.movedim(-1, 2).flatten(1, 2)).unflatten(1, (self.in_channels, -1))

    def _some(self, indices: ndarray, shape: Sequence[int]) -> ndarray:
        """Return the rows of pixels (n,) or, if they are categorical, their probabilities (n, n_levels)."""
        out = self._out(indices)[..., : shape[2], : shape[3]]
        if self.rows is None:
            logits = torch.floor(out * SHARP / UNIT).movedim(2, -1).flatten(0, 3).numpy()
            weights = _weights()[np.minimum(logits.max(-1, keepdims=True) - logits, len(_weights()) - 1).astype(np.int64)]  # fmt: skip
            return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
        first, step, sides = _logistic_grid(self.n_levels)
        scale = torch.floor(4 * (2 * out[:, :, 1] / UNIT + self.n_levels.bit_length() - 6) + 0.5) + FINEST
        scale = scale.clamp(0, SCALES - 1).long().numpy()
        mean = (self.n_levels - 1) * (UNIT + out[:, :, 0].numpy()) / (2 * UNIT)
        place = np.clip(np.floor(mean / step[scale] + 0.5), 0, sides[scale] - 1)
        return (first[scale] + place).astype(np.int32).ravel()

    def _distributions(self, indices: ndarray, shape: Sequence[int]) -> ndarray:
        step = max(1, SLAB // (shape[2] * shape[3]))
        return np.concatenate([self._some(indices[at : at + step], shape) for at in range(0, shape[0], step)])

    def push(self, ans: Any, pixels: ndarray, indices: ndarray) -> None:
        """Put pixels on a stack."""
        how = self._distributions(indices, pixels.shape)
        symbols = pixels.ravel().astype(np.int32)
        if self.rows is not None:
            self.rows.push(ans, symbols, how)
        else:
            ans.encode_reverse(symbols, family(), how)

    def pop(self, ans: Any, indices: ndarray, shape: Sequence[int]) -> ndarray:
        """Take pixels from a stack."""
        how = self._distributions(indices, shape)
        found = self.rows.pop(ans, how) if self.rows is not None else ans.decode(family(), how)
        return found.reshape(shape).astype(np.int64)


@functools.cache
def _weights() -> ndarray:
    """Return 2^20 exp(-d / 32) + 64 for d = 0, 1, ..., as integers that are the same everywhere."""
    with decimal.localcontext() as context:
        context.prec = 40
        every = [TOP * (decimal.Decimal(-d) / SHARP).exp() for d in range(SHARP * 15)]
    return np.array([int(each) + FLOOR for each in every], np.float64)


@functools.cache
def _logistic_grid(n_levels: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return for each scale its first row, the step of its means in levels, and their number."""
    step = 2.0 ** np.clip((np.arange(SCALES) - FINEST) // 4 - 1, -3, None)
    sides = np.floor((n_levels - 1) / step).astype(np.int64) + 1
    return np.cumsum(sides) - sides, step, sides


@functools.lru_cache(maxsize=2)
def _logistic_rows(n_levels: int) -> Rows:
    """Return the table of all logistic distributions, by scale and mean, the same everywhere.

    Powers of one correctly rounded exponential a scale, then sums and quotients, which IEEE 754 fixes.
    """
    _, steps, sides = _logistic_grid(n_levels)
    made = []
    for i, (step, n) in enumerate(zip(steps, sides, strict=True)):
        unit = min(step, 0.5)  # all edges less all means are multiples of it
        with decimal.localcontext() as context:
            context.prec = 40
            scale = decimal.Decimal(2) ** (decimal.Decimal(i - FINEST) / 4)
            base = float((-decimal.Decimal(unit) / scale).exp())
        powers = np.multiply.accumulate(np.full(int((n_levels + step + 1) / unit) + 1, base))
        powers = np.concatenate([[1.0], powers])
        away = (np.arange(n_levels - 1) + 0.5 - step * np.arange(n)[:, None]) / unit
        tail = powers[np.abs(away).astype(np.int64)]
        inside = np.where(away < 0, tail, 1) / (1 + tail)
        edges = np.concatenate([np.zeros((n, 1)), inside, np.ones((n, 1))], 1)
        made.append(frequencies(np.maximum(np.diff(edges), 0), PIXEL_BITS))
    return Rows(np.concatenate(made), PIXEL_BITS)
