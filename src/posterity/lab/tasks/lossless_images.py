"""Lossless images: train is a list of pictures (channels, height, width), predict is two functions.

They are ``compress(pictures) -> bytes`` and ``decompress(bytes) -> pictures``, of the pictures of the test part, which
must come back as they are, or the entry fails. What a codec learned from the training part is at both ends and is not
counted. Beside the bits stand megabytes of pixels a second, in and out, by the clock of this machine: ask for
``--workers 1`` where they matter.

Ordinary choices are what one has without learning: PNG, lossless WebP, zstd, and JPEG XL where Pillow can write it
(``pip install pillow-jxl-plugin``).
"""

import io
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from posterity._checks import needs
from posterity.lab.data import Pictures, load_pictures, split
from posterity.lab.tasks import Task, entry

__all__ = ["by_file"]

Codec = tuple[Callable[[list[ndarray]], bytes], Callable[[bytes], list[ndarray]]]


def _score(fit: Callable[..., Any], seed: int, data: str, target: str | None) -> dict[str, float]:
    pictures = load_pictures(data).pictures
    train, test = split(len(pictures), (0.75, 0.25), seed)
    shown = [pictures[row] for row in test]
    compress, decompress = fit([pictures[row].copy() for row in train], seed)
    started = time.perf_counter()
    packed = compress([x.copy() for x in shown])
    written = time.perf_counter()
    back = decompress(packed)
    read = time.perf_counter()
    same = len(back) == len(shown) and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(back, shown, strict=True)
    )
    if not same:
        raise ValueError("entry must give back the pictures that it was given, gave others")
    megabytes = sum(x.size for x in shown) / 1e6
    return {
        "bits a pixel": 8 * len(packed) / sum(x.shape[1] * x.shape[2] for x in shown),
        "MB/s in": megabytes / (written - started),
        "MB/s out": megabytes / (read - written),
    }


TASK = Task("lossless-images", Pictures, "bits a pixel", "lower", "photo-tiles", _score)


def by_file(write: Callable[[ndarray], bytes], read: Callable[[bytes], ndarray]) -> Codec:
    """Return a codec of many pictures from one that makes a file of each.

    Parameters
    ----------
    write, read : callable
        A picture (channels, height, width) to bytes, and back.

    Returns
    -------
    tuple of callable
        Four bytes a picture say how long its file is.
    """

    def compress(pictures: list[ndarray]) -> bytes:
        files = [write(x) for x in pictures]
        return struct.pack(f"<{len(files) + 1}I", len(files), *map(len, files)) + b"".join(files)

    def decompress(data: bytes) -> list[ndarray]:
        (n,) = struct.unpack_from("<I", data)
        ends = np.cumsum([4 * (n + 1), *struct.unpack_from(f"<{n}I", data, 4)])
        return [read(data[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)]

    return compress, decompress


def _by_pillow(kind: str, **options: Any) -> Codec:
    pillow = needs("PIL.Image", "images")

    def write(x: ndarray) -> bytes:
        file = io.BytesIO()
        pillow.fromarray(x[0] if len(x) == 1 else np.moveaxis(x, 0, 2)).save(file, kind, **options)
        return bytes([len(x)]) + file.getvalue()

    def read(data: bytes) -> ndarray:
        grey = data[0] == 1
        x = np.array(pillow.open(io.BytesIO(data[1:])).convert("L" if grey else "RGB"))
        return x[None] if grey else np.ascontiguousarray(np.moveaxis(x, 2, 0))

    return by_file(write, read)


@entry("lossless-images", "PNG")
def png(train: Sequence[ndarray], seed: int) -> Codec:
    """Return PNG, searching for the best filters."""
    return _by_pillow("PNG", optimize=True)


@entry("lossless-images", "WebP, lossless")
def webp(train: Sequence[ndarray], seed: int) -> Codec:
    """Return lossless WebP at its slowest."""
    return _by_pillow("WEBP", lossless=True, quality=100, method=6)


@entry("lossless-images", "zstd")
def zstd(train: Sequence[ndarray], seed: int) -> Codec:
    """Return zstd at level 19 of the pixels, of all pictures at once."""
    zstandard = needs("zstandard", "coding")

    def compress(pictures: list[ndarray]) -> bytes:
        shapes = np.array([x.shape for x in pictures], np.uint32)
        plain = struct.pack("<I", len(pictures)) + shapes.tobytes() + b"".join(x.tobytes() for x in pictures)
        return zstandard.ZstdCompressor(level=19).compress(plain)

    def decompress(data: bytes) -> list[ndarray]:
        plain = zstandard.ZstdDecompressor().decompress(data)
        (n,) = struct.unpack_from("<I", plain)
        shapes = np.frombuffer(plain, np.uint32, 3 * n, 4).reshape(n, 3).astype(int)
        pixels = np.split(np.frombuffer(plain, np.uint8, offset=4 + 12 * n), np.cumsum(shapes.prod(1))[:-1])
        return [flat.reshape(shape) for flat, shape in zip(pixels, shapes, strict=True)]

    return compress, decompress


def jpeg_xl(train: Sequence[ndarray], seed: int) -> Codec:
    """Return lossless JPEG XL at effort 7."""
    return _by_pillow("JXL", lossless=True, effort=7)


try:
    import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError:
    pass
else:
    entry("lossless-images", "JPEG XL, lossless")(jpeg_xl)
