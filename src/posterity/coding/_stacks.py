"""A stack of bits, symbols that are put on it by integer distributions, and the sizes in front of it.

The stack is rANS of the package constriction: what is put on last is taken off first. A model is made of a row of
frequencies when it is first needed; where rows are too many for their symbols, their probabilities are handed over.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from posterity._checks import needs
from posterity._tables import integer_tables

__all__ = ["Rows", "pack_shape", "stack", "unpack_shape", "words"]

ENTRIES = 2**20  # entries handled at once
FEW = 6  # symbols a row, below which rows of probabilities are handed over and not models
FIRST = (0, 2**31)  # on an empty stack symbols of low number would cost nothing, and a length say nothing
MOST = 2**28  # symbols of a file that cost nothing


class Rows:
    """Distributions in integers, one a row, and the calls that put symbols on a stack by them and take them off."""

    def __init__(self, freqs: ndarray, precision: int) -> None:
        self.freqs, self.precision = np.ascontiguousarray(freqs, np.int32), precision
        self.models: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "models": {}}  # they cannot be copied, and are soon made

    @property
    def least(self) -> float:
        """Bits of a symbol at the very least."""
        return self.precision - math.log2(int(self.freqs.max()))

    def checksum(self) -> int:
        """Return the CRC-32 of the table."""
        return zlib.crc32(self.freqs.astype("<i4").tobytes(), self.precision)

    def push(self, ans: Any, symbols: ndarray, rows: ndarray) -> None:
        """Put symbols on the stack, each by its row; rows are taken in order, equal ones by place."""
        if self.freqs.shape[1] == 1 or not len(rows):
            return
        order, rows, starts = _sorted(rows)
        symbols = symbols[order].astype(np.int32, copy=False)
        if len(starts) * FEW > len(rows):
            for start in reversed(range(0, len(rows), self._slab)):
                part = slice(start, start + self._slab)
                ans.encode_reverse(symbols[part], family(), self._probs(rows[part]))
            return
        put, ends = ans.encode_reverse, [*starts[1:], len(rows)]
        for start, end, model in zip(starts[::-1], ends[::-1], self._models(rows[starts[::-1]]), strict=True):
            put(symbols[start:end], model)

    def pop(self, ans: Any, rows: ndarray) -> ndarray:
        """Take the symbols of rows from the stack."""
        found = np.zeros(len(rows), np.int32)
        if self.freqs.shape[1] == 1 or not len(rows):
            return found
        order, rows, starts = _sorted(rows)
        if len(starts) * FEW > len(rows):
            taken = np.empty(len(rows), np.int32)
            for start in range(0, len(rows), self._slab):
                part = slice(start, start + self._slab)
                taken[part] = ans.decode(family(), self._probs(rows[part]))
        else:
            take, sizes = ans.decode, np.diff([*starts, len(rows)]).tolist()
            models = self._models(rows[starts])
            taken = np.concatenate([take(model, n) for model, n in zip(models, sizes, strict=True)])
        found[order] = taken
        return found

    @property
    def _slab(self) -> int:
        return max(1, ENTRIES // self.freqs.shape[1])

    def _probs(self, rows: Any) -> ndarray:
        """Return probabilities, exact in float32: at most 24 bits."""
        return self.freqs[rows].astype(np.float32) * np.float32(0.5**self.precision)

    def _models(self, rows: ndarray) -> list[Any]:
        """Return the models of rows, made where they are new."""
        known, wanted = self.models, rows.tolist()
        new = [row for row in wanted if row not in known]
        if new:
            categorical = needs("constriction", "coding").stream.model.Categorical
            known.update((row, categorical(self._probs(row), perfect=False)) for row in new)
        return [known[row] for row in wanted]


def _sorted(rows: ndarray) -> tuple[ndarray, ndarray, list[int]]:
    """Return the stable order of rows, rows in it, and where a new one begins."""
    if rows.max() < 2**16:
        rows = rows.astype(np.uint16)  # sorted by radix
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    return order, rows, [0, *(np.flatnonzero(rows[1:] != rows[:-1]) + 1).tolist()]


def stack(data: bytes | None = None, *parts: tuple[int, float]) -> Any:
    """Return an empty stack, or one of data, which must be long enough for (number, least bits) of symbols."""
    ans = needs("constriction", "coding").stream.stack.AnsCoder
    if data is None:
        return ans(np.array(FIRST, np.uint32))
    short = sum(n * least for n, least in parts) > 8 * len(data) + 64
    if short or len(data) % 4 or any(n > MOST for n, least in parts if least == 0):
        raise ValueError(f"data must be long enough for its shape, got {len(data)} bytes")
    found = np.frombuffer(data, "<u4").astype(np.uint32)
    if len(found) and found[-1] == 0:
        raise ValueError("data must end in a word that is not 0")
    return ans(found)


def words(ans: Any) -> bytes:
    """Return what is on a stack."""
    return ans.get_compressed().astype("<u4").tobytes()


def family() -> Any:
    return needs("constriction", "coding").stream.model.Categorical(perfect=False)


def pack_shape(shape: Sequence[int]) -> bytes:
    """Return sizes, seven bits a byte."""
    out = bytearray()
    for size in shape:
        while size > 127:
            out.append(size & 127 | 128)
            size >>= 7
        out.append(size)
    return bytes(out)


def unpack_shape(data: bytes, at: int, n_axes: int) -> tuple[tuple[int, ...], int]:
    """Return sizes and where they end."""
    shape = []
    for _ in range(n_axes):
        size, shift = 0, 0
        while True:
            if at >= len(data) or shift > 35:
                raise ValueError("data must have a shape, got one that is cut short")
            size |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        shape.append(size)
    if math.prod(max(size, 1) for size in shape) > 2**40:
        raise ValueError(f"data must have a shape of moderate size, got {tuple(shape)}")
    return tuple(shape), at


def frequencies(probs: ndarray, precision: int) -> ndarray:
    """Return a table of integers, slab by slab."""
    flat = probs.reshape(-1, probs.shape[-1])
    out = np.empty(flat.shape, np.int32)
    step = max(1, ENTRIES // flat.shape[1])
    for start in range(0, len(flat), step):
        out[start : start + step] = integer_tables(flat[start : start + step], precision)
    return out.reshape(probs.shape)
