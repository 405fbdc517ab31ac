"""What integers cost: a learned density of each position, the norm that empties slices, and the entropy coder.

The density has a distribution function of four increasing layers, a sigmoid last; the price of an integer is the
mass of the unit interval around it,

    bits(q) = -log2( F(q + 1/2) - F(q - 1/2) ).                                                               (1)

With logits l < u of the two ends it is |sigmoid(s u) - sigmoid(s l)| for either sign s; the one that makes both small
loses no digits, however far out q lies. A file never holds the density: its columns are coded with integer frequencies,
counted or taken from the density, that stand in the file and are alike on every machine.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer, needs, within
from posterity._precision import wide, widened
from posterity._random import draw_device
from posterity._tables import integer_tables

__all__ = ["FactorizedPrior", "slice_norm"]

MOST_BITS = 50.0
LONGEST_RANGE = 1024  # symbols from the first to the last for which the learned density is asked
TABLE_BITS = (8, 12)  # its frequencies sum to 2**8 or 2**12
DENSE = 2**22  # symbols from the first to the last that are counted in place, not sorted


class FactorizedPrior(nn.Module):
    """A learned distribution of integer latents, one for each position of a slice.

    Parameters
    ----------
    channels : int
        Positions, at least 1.
    generator : torch.Generator, optional
        Draws the start, N(0, 0.01^2); by default torch's global one.

    Raises
    ------
    ValueError
        If ``channels`` is not a positive integer, or inputs are not floats of shape (n, channels).

    Notes
    -----
    1. The official price adds 1e-10 to the mass, so that it ends at 33.2 bits with no gradient beyond; here it is
       exact up to the clamp at 50 bits.

    References
    ----------
    .. [1] Girish, Gupta, Singh, Shrivastava. LilNetX. ICLR 2023. Section 3.
    .. [2] Balle, Minnen, Singh, Hwang, Johnston. Variational Image Compression with a Scale Hyperprior. ICLR 2018.
       Appendix 6.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import FactorizedPrior
    >>> prior = FactorizedPrior(9, generator=torch.Generator().manual_seed(0))
    >>> q = torch.arange(-200.0, 201.0)[:, None].expand(-1, 9)
    >>> prior.bits(q).neg().exp2().sum(0).round(decimals=4)  # probabilities of all integers
    tensor([1., 1., 1., 1., 1., 1., 1., 1., 1.], grad_fn=<RoundBackward1>)
    """

    def __init__(self, channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)

        def drawn(n: int) -> nn.ParameterList:
            return nn.ParameterList(
                0.01 * torch.randn(channels, generator=generator, device=draw_device(generator))
                for _ in range(n)
            )

        self.h, self.b, self.a = drawn(4), drawn(4), drawn(3)

    @widened
    def cdf(self, x: Float[Tensor, "n channels"]) -> Float[Tensor, "n channels"]:
        """Return F: increasing in x, in (0, 1)."""
        has_shape("x", floating("x", x), (None, self.channels))
        return self._logits(x.T).sigmoid().T

    @widened
    def bits(self, q: Float[Tensor, "n channels"]) -> Float[Tensor, "n channels"]:
        """Return what each value costs, equation 1, clamped to [0, 50] bits."""
        has_shape("q", floating("q", q), (None, self.channels))
        q = q.T.contiguous()  # positions first: parameters then stretch along long rows
        high, low = self._logits(torch.cat([q + 0.5, q - 0.5], 1)).chunk(2, 1)
        side = torch.where(
            high + low > 0, -1.0, 1.0
        )  # both ends to where the sigmoid is small: no digits are lost
        mass = (torch.sigmoid(side * high) - torch.sigmoid(side * low)).abs()
        return -torch.log2(mass.clamp_min(2**-MOST_BITS)).T

    def _logits(self, x: Tensor) -> Tensor:
        """Return the logit of F for x of shape (channels, n)."""
        for i in range(4):
            x = torch.addcmul(wide(self.b[i]).to(x.dtype)[:, None], x, nn.functional.softplus(wide(self.h[i])).to(x.dtype)[:, None])  # fmt: skip
            if i < 3:
                x = torch.addcmul(x, x.tanh(), wide(self.a[i]).to(x.dtype).tanh()[:, None])
        return x

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


@widened
def slice_norm(weight: Float[Tensor, "out in *k"], ord: float = 2) -> Float[Tensor, ""]:
    """Return the sum over (out, in) of the norm of each slice: a penalty that empties whole kernels.

    Parameters
    ----------
    weight : Tensor of shape (out, in, *k)
        Of a convolution; a Linear weight has slices of one entry. At a slice of zeros the gradient is 0.
    ord : float, default=2
        Of the norm over ``*k``, at least 1; ``math.inf`` is the largest entry.

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    ValueError
        If ``weight`` has fewer than two axes or is not of a floating dtype, or ``ord`` is below 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import slice_norm
    >>> slice_norm(torch.ones(2, 3, 2, 2))  # six slices of norm 2
    tensor(12.)
    """
    within("ord", ord, 1, math.inf)
    if floating("weight", weight).ndim < 2:
        raise ValueError(f"weight must have shape (out, in, *k), got {tuple(weight.shape)}")
    if not weight.numel():
        return weight.sum()
    return torch.linalg.vector_norm(
        weight.flatten(2) if weight.ndim > 2 else weight[..., None], ord, -1
    ).sum()


def encoded(columns: Sequence[ndarray], masses: Sequence[tuple[int, ndarray] | None]) -> tuple[bytes, bytes]:
    """Return the tables and the one ANS stream of columns of integers.

    ``masses`` has for each column the first integer of a range and the density's mass on it, or None.
    A column is coded with what is smaller, table and stream together: its counts, or that density's frequencies.
    """
    constriction = needs("constriction", "compression")
    coder = constriction.stream.stack.AnsCoder()
    tables, symbols = [], []
    for column, mass in zip(columns, masses, strict=True):
        values, counts, places = _counted(column)
        table, held = _table(values, counts), counts
        best = _bits(counts, counts, counts, table)
        for precision in TABLE_BITS:
            if mass is None or len(values) == 1 or 2 * len(mass[1]) > 2**precision:
                continue
            first, whole = mass[0], integer_tables(mass[1], precision)
            rival = _table(np.arange(len(whole)) + first, whole)
            if _bits(counts, whole[values - first], whole, rival) < best:
                best = _bits(counts, whole[values - first], whole, rival)
                table, held, places = rival, whole, (column - first).astype(np.int32)
        tables.append(table)
        symbols.append((places, held))
    for places, held in reversed(symbols):  # a stack: the first column is read first
        if len(held) > 1:
            coder.encode_reverse(places, _model(constriction, held))
    return _varints(np.concatenate(tables)), coder.get_compressed().astype("<u4").tobytes()


def decoded(tables: bytes, stream: bytes, lengths: Sequence[int]) -> list[ndarray]:
    """Return the columns of `encoded`, of these lengths. Raises ValueError for bytes that are not theirs."""
    constriction = needs("constriction", "compression")
    numbers = _from_varints(tables)
    if len(stream) % 4:
        raise ValueError(f"the stream has {len(stream)} bytes, not a multiple of 4")
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream, "<u4").astype(np.uint32))
    columns, at = [], 0
    for n in lengths:
        values, held, at = _from_table(numbers, at)
        if len(held) > 1:
            columns.append(values[coder.decode(_model(constriction, held), n)])
        else:
            columns.append(np.full(n, values[0]))
    if at != len(numbers) or not coder.is_empty():
        raise ValueError("something is left after the last latent")
    return columns


@torch.no_grad()
def masses(prior: FactorizedPrior, columns: ndarray) -> list[tuple[int, ndarray] | None]:
    """Return for each column of integers the first of them and the density's mass from there to the last."""
    ends = [(int(column.min()), int(column.max())) for column in columns]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if high - low >= LONGEST_RANGE:
        return [None] * len(columns)
    grid = torch.arange(low, high + 1, dtype=torch.float64)[:, None].expand(-1, prior.channels)
    mass = copy.deepcopy(prior).cpu().double().bits(grid).neg().exp2().numpy()
    if not np.isfinite(mass).all():
        return [None] * len(columns)
    return [(first, mass[first - low : last - low + 1, j]) for j, (first, last) in enumerate(ends)]


def _model(constriction: Any, frequencies: ndarray) -> Any:
    return constriction.stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)


def _counted(column: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Return sorted distinct integers, how often each occurs, and the place of each entry among them."""
    low, high = int(column.min()), int(column.max())
    if high - low >= DENSE:
        values, places, counts = np.unique(column, return_inverse=True, return_counts=True)
        return values.astype(np.int64), counts.astype(np.int64), places.astype(np.int32)
    shifted = column - low
    every = np.bincount(shifted)
    kept = every.nonzero()[0]
    if len(kept) == len(every):
        return kept + low, every, shifted.astype(np.int32, copy=False)
    place = np.zeros(len(every), np.int32)
    place[kept] = np.arange(len(kept), dtype=np.int32)
    return kept + low, every[kept], place[shifted]


def _bits(counts: ndarray, frequencies: ndarray, every: ndarray, table: ndarray) -> float:
    """Return what a column and its table take where integers have these frequencies of ``every``."""
    return float(-(counts * np.log2(frequencies / every.sum())).sum()) + 8 * len(_varints(table))


def _table(values: ndarray, frequencies: ndarray) -> ndarray:
    """Return a table as numbers: how it is written and how long, the first integer, then what follows.

    Either the frequencies of all integers from the first to the last, or gap and frequency of each that occurs.
    """
    first = int(values[0])
    sign = 2 * first if first >= 0 else -2 * first - 1
    span = int(values[-1]) - first + 1
    if span <= 2 * len(values):
        every = np.zeros(span, np.int64)
        every[values - first] = frequencies
        return np.concatenate([[2 * span, sign], every])
    pairs = np.stack([np.diff(values, prepend=first), frequencies], 1)
    return np.concatenate([[2 * len(values) + 1, sign], pairs.ravel()])


def _from_table(numbers: ndarray, at: int) -> tuple[ndarray, ndarray, int]:
    """Return integers, frequencies and where the next table begins."""
    if at + 2 > len(numbers):
        raise ValueError("a table is missing")
    n, sparse = divmod(int(numbers[at]), 2)
    sign = int(numbers[at + 1])
    first = sign // 2 if sign % 2 == 0 else -(sign + 1) // 2
    at, end = at + 2, at + 2 + n * (1 + sparse)
    body = numbers[at:end]
    if not n or len(body) < end - at:
        raise ValueError("a table is cut short")
    gaps, frequencies = (body[::2], body[1::2]) if sparse else (np.minimum(np.arange(n), 1), body)
    values = first + gaps.cumsum()
    values, frequencies = values[frequencies > 0], frequencies[frequencies > 0]
    if not len(values) or np.abs(values).max() >= 2**31 or frequencies.sum() >= 2**53:
        raise ValueError("a table has no integers of 32 bits")
    return values, frequencies, end


def _varints(numbers: ndarray) -> bytes:
    """Return numbers in seven bits a byte, the lowest first; the high bit says that more follow."""
    shifts = np.arange(0, 63, 7)
    parts = (numbers[:, None] >> shifts) & 127
    length = np.maximum(1, ((numbers[:, None] >> shifts) > 0).sum(1))
    place = np.arange(len(shifts))
    parts |= 128 * (place < length[:, None] - 1)
    return parts.astype(np.uint8)[place < length[:, None]].tobytes()


def _from_varints(data: bytes) -> ndarray:
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if not len(raw) or raw[-1] >= 128:
        raise ValueError("the tables are cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > 9:
        raise ValueError("a number of the tables is too long")
    shift = 7 * (np.arange(len(raw)) - np.repeat(starts, length))
    return np.add.reduceat((raw.astype(np.int64) & 127) << shift, starts)
