"""Entropy coding by finite state: what an autoregressive model saves, at the price of looking up a table.

A symbol's distribution depends on its M decoded neighbours alone, whose states are few: s_j = 0 outside the grid,
else symbol + 1. So all distributions there can be are the rows of one table,

    row = sum_j s_j (K + 1)^(M - 1 - j),        bits = -log2(freqs[channel, row, symbol] / 2^precision),   (1)

computed once, in integers, and the same for whoever writes and whoever reads. Symbols on one wavefront, at an
equal sum of coordinates, do not see each other: they are coded together, sorted by their row, over the whole batch.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from numpy import ndarray
from torch import Tensor

from posterity._checks import at_least, integer
from posterity._files import seal, unseal
from posterity.coding._stacks import Rows, frequencies, pack_shape, stack, unpack_shape, words

__all__ = ["FiniteStateCoder"]

CODER_MARK = b"PFSA"
LARGEST = 2**28  # entries of a table
CODER_HEAD = struct.Struct("<BBIII")  # axes, precision, K, checksums of table and symbols


class FiniteStateCoder:
    """Code integer symbols by a table of distributions, one for each state of their neighbours.

    Parameters
    ----------
    freqs : ndarray or Tensor of shape (C, (K + 1)^M, K)
        For each channel and row (equation 1) the frequencies of K symbols: integers of at least 1 that sum to
        ``2**precision``.
    offsets : sequence of sequence of int
        M offsets over (channel, *spatial) of the neighbours that are looked at, the first most significant: entries
        at most 0, one at least negative. ``(0, 0, -1)`` is the left neighbour, ``(0, -1, 0)`` the top one,
        ``(-1, 0, 0)`` the previous channel. Without offsets symbols are coded independently.
    precision : int, default=12
        Bits of a frequency, in 1 .. 24.

    Raises
    ------
    ValueError
        If ``freqs`` has a zero, a row of another sum or the wrong shape, an offset is not causal or comes twice,
        ``precision`` is out of range, or the table would have more than 2^28 entries.

    References
    ----------
    .. [1] Zhang, Yu, Li, Lin. Finite-State Autoregressive Entropy Coding for Efficient Learned Lossless Compression.
       ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.coding import FiniteStateCoder
    >>> x = torch.arange(4096).reshape(1, 1, 64, 64) // 16 % 4  # runs of 16
    >>> coder = FiniteStateCoder.from_counts(x, 4, [(0, 0, -1)])
    >>> data = coder.compress(x)
    >>> torch.equal(coder.decompress(data), x)
    True
    >>> plain = FiniteStateCoder.from_counts(x, 4, [])
    >>> len(plain.compress(x)) > 2.3 * len(data)
    True
    """

    def __init__(self, freqs: Any, offsets: Sequence[Sequence[int]], *, precision: int = 12) -> None:
        self.precision = check_precision(precision)
        self.offsets = check_offsets(offsets)
        freqs = freqs.detach().cpu().numpy() if isinstance(freqs, Tensor) else freqs
        if not isinstance(freqs, ndarray) or freqs.dtype.kind not in "iu":
            kind = freqs.dtype if isinstance(freqs, ndarray) else type(freqs).__name__
            raise ValueError(f"freqs must be an array of integers, got {kind}")
        self.channels, self.n_symbols = _table_shape("freqs", freqs.shape, self.offsets)
        if 2**self.precision < self.n_symbols:
            raise ValueError(f"precision must give each of {self.n_symbols} symbols a share, got {precision}")
        if freqs.min() < 1:
            raise ValueError(f"freqs must be at least 1, got {freqs.min()}")
        sums = freqs.sum(-1, dtype=np.int64)
        if (sums != 2**self.precision).any():
            wrong = int(sums.ravel()[np.argmax(sums.ravel() != 2**self.precision)])
            raise ValueError(f"freqs must have rows that sum to {2**self.precision}, got {wrong}")
        self._rows = Rows(freqs.reshape(-1, self.n_symbols), self.precision)
        self.hash = zlib.crc32(repr((self.offsets, freqs.shape)).encode(), self._rows.checksum())

    @classmethod
    def from_probs(
        cls,
        probs: Float[ndarray, "channels rows k"] | Float[Tensor, "channels rows k"],
        offsets: Sequence[Sequence[int]],
        *,
        precision: int = 12,
    ) -> "FiniteStateCoder":
        """Return the coder of a table of probabilities, rounded to integers.

        Parameters
        ----------
        probs : ndarray or Tensor of shape (C, (K + 1)^M, K)
            Not negative; rows need not sum to 1.
        offsets, precision
            As of the class.

        Returns
        -------
        FiniteStateCoder
        """
        precision, offsets = check_precision(precision), check_offsets(offsets)
        probs = probs.detach().cpu().double().numpy() if isinstance(probs, Tensor) else np.asarray(probs)
        if probs.dtype.kind != "f":
            raise ValueError(f"probs must be floating-point, got {probs.dtype}")
        _table_shape("probs", probs.shape, offsets)
        if not (np.isfinite(probs).all() and (probs >= 0).all()):
            raise ValueError("probs must be finite and not negative")
        return cls(frequencies(probs, precision), offsets, precision=precision)

    @classmethod
    def from_counts(
        cls,
        symbols: Integer[Tensor, "n channels *spatial"],
        n_symbols: int,
        offsets: Sequence[Sequence[int]],
        *,
        smoothing: float = 1.0,
        precision: int = 12,
    ) -> "FiniteStateCoder":
        """Return the coder of the frequencies in training symbols.

        Parameters
        ----------
        symbols : integer Tensor of shape (n, C, *spatial)
        n_symbols : int
            K, at least 1.
        offsets, precision
            As of the class.
        smoothing : float, default=1.0
            Added to each count, at least 0. A row that was never seen is uniform.

        Returns
        -------
        FiniteStateCoder
        """
        n_symbols = integer("n_symbols", n_symbols, 1)
        smoothing = at_least("smoothing", smoothing, 0)
        precision, offsets = check_precision(precision), check_offsets(offsets)
        grid = check_symbols(symbols, n_symbols, None, offsets)
        rows = n_rows(grid.shape[1], n_symbols, offsets)
        states = _states(grid)
        place = _Places(grid.shape[1:], offsets)
        row = place.rows(states, slice(None), n_symbols, rows).astype(np.int64)
        flat = (row * n_symbols + states[:-1] - 1).ravel()
        counts = np.bincount(flat, minlength=grid.shape[1] * rows * n_symbols) + float(smoothing)
        counts = counts.reshape(grid.shape[1], rows, n_symbols)
        return cls(frequencies(counts, precision), offsets, precision=precision)

    @property
    def least(self) -> float:
        """Bits of a symbol at the very least."""
        return self._rows.least

    @property
    def freqs(self) -> Int[Tensor, "channels rows k"]:
        """The table, int32."""
        return torch.from_numpy(self._rows.freqs.reshape(self.channels, -1, self.n_symbols))

    def contexts(self, symbols: Integer[Tensor, "n channels *spatial"]) -> Int[Tensor, "n channels *spatial"]:
        """Return the row of its channel's table that each symbol is coded by, int64.

        Parameters
        ----------
        symbols : integer Tensor of shape (n, C, *spatial)
            In 0 .. K - 1.

        Returns
        -------
        Tensor
        """
        grid = self._check(symbols)
        rows = self._rows_of(grid) % (len(self._rows.freqs) // self.channels)
        return torch.from_numpy(rows.T.reshape(grid.shape).astype(np.int64))

    def code_length(self, symbols: Integer[Tensor, "n channels *spatial"]) -> Float[Tensor, " n"]:
        """Return the bits of each sample by the table, float64: what `compress` comes to, but for its header.

        Parameters
        ----------
        symbols : integer Tensor of shape (n, C, *spatial)
            In 0 .. K - 1.

        Returns
        -------
        Tensor of shape (n,)
        """
        grid = self._check(symbols)
        bits = self.precision - np.log2(self._rows.freqs[self._rows_of(grid), _states(grid)[:-1] - 1])
        return torch.from_numpy(np.asarray(bits.sum(0), np.float64))

    def compress(self, symbols: Integer[Tensor, "n channels *spatial"]) -> bytes:
        """Return symbols as bytes.

        Parameters
        ----------
        symbols : integer Tensor of shape (n, C, *spatial)
            In 0 .. K - 1, of any integer dtype.

        Returns
        -------
        bytes
            With version, shape, and checksums of table and symbols.
        """
        grid = self._check(symbols)
        ans = stack()
        self.push(ans, grid)
        head = CODER_HEAD.pack(grid.ndim, self.precision, self.n_symbols, self.hash, _grid_checksum(grid))
        return seal(CODER_MARK, head + pack_shape(grid.shape) + words(ans))

    def decompress(self, data: bytes) -> Int[Tensor, "n channels *spatial"]:
        """Return the symbols of `compress`, int64.

        Parameters
        ----------
        data : bytes
            Made by a coder of the same table. Safe to read from elsewhere.

        Returns
        -------
        Tensor of shape (n, C, *spatial)

        Raises
        ------
        ValueError
            If data are cut, damaged, of another kind or version, or of another table.
        """
        payload = unseal(CODER_MARK, data)
        if len(payload) < CODER_HEAD.size:
            raise ValueError("data must have a header, got less")
        n_axes, precision, n_symbols, table, checksum = CODER_HEAD.unpack_from(payload)
        for name, got, own in (("K", n_symbols, self.n_symbols), ("precision", precision, self.precision)):
            if got != own:
                raise ValueError(f"data must have the coder's {name} = {own}, got {got}")
        if table != self.hash:
            raise ValueError(
                "data must be of the coder's table, got another's: frequencies or offsets differ"
            )
        shape, at = unpack_shape(payload, CODER_HEAD.size, n_axes)
        if n_axes < 2 or shape[1] != self.channels or any(len(o) != n_axes - 1 for o in self.offsets):
            raise ValueError(f"data must have symbols of {self.channels} channels that fit the offsets, got shape {shape}")  # fmt: skip
        ans = stack(payload[at:], (math.prod(shape), self.least))
        grid = self.pop(ans, shape)
        if _grid_checksum(grid) != checksum:
            raise ValueError("data must give the symbols that its checksum says, got others: it is damaged")
        return torch.from_numpy(grid)

    def state_dict(self) -> dict[str, Any]:
        """Return what the class is made with: ``FiniteStateCoder(**coder.state_dict())``.

        Returns
        -------
        dict
            ``freqs`` (int32), ``offsets``, ``precision``.
        """
        return {"freqs": self.freqs.clone(), "offsets": self.offsets, "precision": self.precision}

    def push(self, ans: Any, grid: ndarray) -> None:
        """Put checked symbols (n, C, *spatial) on a stack; `pop` gives them back.

        Parameters
        ----------
        ans : constriction.stream.stack.AnsCoder
        grid : ndarray
        """
        states, place = _states(grid), _Places(grid.shape[1:], self.offsets)
        for wave in reversed(place.waves if grid.size else []):
            rows = place.rows(states, wave, self.n_symbols, len(self._rows.freqs) // self.channels)
            self._rows.push(ans, (states[wave] - 1).ravel(), rows.ravel())

    def pop(self, ans: Any, shape: Sequence[int]) -> ndarray:
        """Take symbols of a shape from a stack, int64.

        Parameters
        ----------
        ans : constriction.stream.stack.AnsCoder
        shape : sequence of int

        Returns
        -------
        ndarray
        """
        if not math.prod(shape):
            return np.zeros(shape, np.int64)
        place = _Places(shape[1:], self.offsets)
        states = np.zeros((math.prod(shape[1:]) + 1, shape[0]), np.int32)
        for wave in place.waves:
            rows = place.rows(states, wave, self.n_symbols, len(self._rows.freqs) // self.channels)
            states[wave] = self._rows.pop(ans, rows.ravel()).reshape(rows.shape) + 1
        return np.ascontiguousarray((states[:-1].T - 1).reshape(shape), dtype=np.int64)

    def _check(self, symbols: Any) -> ndarray:
        return check_symbols(symbols, self.n_symbols, self.channels, self.offsets)

    def _rows_of(self, grid: ndarray) -> ndarray:
        """Return the row in the whole table of each symbol: (positions, n)."""
        place = _Places(grid.shape[1:], self.offsets)
        return place.rows(_states(grid), slice(None), self.n_symbols, len(self._rows.freqs) // self.channels)


class _Places:
    """Positions of a grid (C, *spatial) in wavefronts, and where each has its neighbours."""

    def __init__(self, shape: Sequence[int], offsets: tuple[tuple[int, ...], ...]) -> None:
        size = math.prod(shape)
        at = np.indices(shape, np.int32).reshape(len(shape), -1)
        self.channel = at[0]
        touched = [axis for axis in range(len(shape)) if any(o[axis] for o in offsets)]
        wave = at[touched].sum(0) if touched else np.zeros(size, np.int32)
        order = np.argsort(wave, kind="stable")
        self.waves = np.split(order, np.flatnonzero(np.diff(wave[order])) + 1) if size else []
        self.neighbours = []
        for offset in offsets:
            seen = at + np.asarray(offset, np.int32)[:, None]
            place = np.zeros(size, np.int64)
            for axis, side in enumerate(shape):
                place = place * side + seen[axis]
            self.neighbours.append(
                np.where((seen >= 0).all(0), place, size)
            )  # the last state is that outside

    def rows(self, states: ndarray, wave: Any, k: int, n_rows: int) -> ndarray:
        """Return the row of each position of a wave in the tables of all channels: (positions, n), int32."""
        row = np.zeros((len(self.channel[wave]), states.shape[1]), np.int32)
        for place in self.neighbours:
            row *= k + 1
            row += states[place[wave]]
        row += (self.channel[wave] * n_rows)[:, None]
        return row


def _states(grid: ndarray) -> ndarray:
    """Return symbols + 1 as (positions + 1, n); the last row is the state outside."""
    flat = grid.reshape(len(grid), math.prod(grid.shape[1:]))
    states = np.zeros((flat.shape[1] + 1, len(flat)), np.int32)
    states[:-1] = flat.T + 1
    return states


def _grid_checksum(grid: ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(grid, "<i8").data)


def check_precision(precision: Any) -> int:
    """Return the bits of a frequency."""
    if not 1 <= integer("precision", precision) <= 24:
        raise ValueError(f"precision must be in 1..24, got {precision}")
    return int(precision)


def check_offsets(offsets: Any, n_axes: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Return offsets as tuples of int: causal, different, of one length."""
    try:
        made = tuple(tuple(integer("offsets", entry) for entry in offset) for offset in offsets)
    except TypeError:
        raise ValueError(f"offsets must be sequences of integers, got {offsets!r}") from None
    for offset in made:
        if not offset or max(offset) > 0 or min(offset) >= 0 or min(offset) < -(2**15):
            raise ValueError(f"offsets must be causal, with no entry above 0 and one below, got {offset}")
        if len(offset) != (n_axes or len(made[0])):
            raise ValueError(f"offsets must have {n_axes or len(made[0])} entries (channel, *spatial), got {offset}")  # fmt: skip
    if len(set(made)) != len(made):
        raise ValueError(f"offsets must be different, got {made}")
    return made


def n_rows(channels: int, k: int, offsets: Sequence[Any]) -> int:
    """Return the rows of a channel's table, if it is not too large."""
    rows = (k + 1) ** len(offsets)
    if channels * rows * k > LARGEST:
        raise ValueError(
            f"offsets must give a table of at most 2^28 entries, got {channels} x {rows} x {k}: lower the number of "
            f"symbols (K = {k}), for which reduce_states is, or of offsets (M = {len(offsets)})"
        )
    return rows


def _table_shape(name: str, shape: tuple[int, ...], offsets: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """Return channels and K of a table that fits the offsets."""
    if len(shape) != 3 or 0 in shape or shape[1] != (shape[2] + 1) ** len(offsets):
        raise ValueError(
            f"{name} must have shape (C, (K + 1)^M, K) with M = {len(offsets)} offsets, got {shape}"
        )
    n_rows(shape[0], shape[2], offsets)
    return shape[0], shape[2]


def check_symbols(symbols: Any, k: int, channels: int | None, offsets: Sequence[Sequence[int]]) -> ndarray:
    """Return symbols as int64."""
    if not isinstance(symbols, Tensor) or symbols.is_floating_point() or symbols.is_complex() or symbols.dtype == torch.bool:  # fmt: skip
        kind = symbols.dtype if isinstance(symbols, Tensor) else type(symbols).__name__
        raise ValueError(f"symbols must be an integer tensor, got {kind}")
    n_axes = len(offsets[0]) + 1 if offsets else symbols.ndim
    if symbols.ndim != n_axes or n_axes < 2 or symbols.shape[1] != (channels or symbols.shape[1]) or not symbols.shape[1]:  # fmt: skip
        raise ValueError(
            f"symbols must have shape (n, {channels or 'channels'}, *spatial) with {n_axes - 2} spatial axes, "
            f"got {tuple(symbols.shape)}"
        )
    grid = symbols.detach().cpu().to(torch.int64).numpy()
    if grid.size and not (grid.min() >= 0 and grid.max() < k):
        value = grid.min() if grid.min() < 0 else grid.max()
        raise ValueError(f"symbols must be in 0..{k - 1}, got {value}")
    return grid
