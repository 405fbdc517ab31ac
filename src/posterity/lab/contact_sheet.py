"""Pictures of samples: a grid of small images, kept by a trial for its page.

A number says how far apart two arms are, a picture what a reader would see of it.
"""

import base64
import struct
import zlib
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from torch import Tensor

__all__ = ["Picture", "contact_sheet"]

CELL = 36  # pixels: small images are enlarged towards this side, larger ones reduced to it


class Picture(NamedTuple):
    """What ``Trial.picture`` keeps.

    Attributes
    ----------
    png : str
        The file, in base64.
    says : str
        What is seen, for who cannot see it.
    """

    png: str
    says: str


def contact_sheet(
    images: Tensor | ndarray, *, columns: int = 8, rows: int = 2, low: float = 0.0, high: float = 1.0
) -> Picture:
    """Return the first images as one picture, row by row.

    Parameters
    ----------
    images : Tensor or ndarray of shape (n, h, w), (n, 1, h, w) or (n, 3, h, w)
        Numbers outside [low, high] are clipped, NaN is black.
    columns, rows : int, default=8 and 2
        At most.
    low, high : float, default=0.0 and 1.0
        What is black and what is white.

    Returns
    -------
    Picture
    """
    found = (
        images.detach().float().cpu().numpy()
        if isinstance(images, Tensor)
        else np.asarray(images, dtype=float)
    )
    found = found[:, None] if found.ndim == 3 else found
    found = found[: columns * rows]
    n, c, h, w = found.shape
    if h > CELL or w > CELL:  # by the mean of blocks
        by = -(-max(h, w) // CELL)
        found = found[..., : h // by * by, : w // by * by]
        found = found.reshape(n, c, h // by, by, w // by, by).mean((3, 5))
    by = max(CELL // max(found.shape[2:]), 1)
    found = found.repeat(by, 2).repeat(by, 3)
    shown = np.nan_to_num((found - low) / (high - low), nan=0.0).clip(0, 1) * 255
    h, w = shown.shape[2] + 1, shown.shape[3] + 1  # a line between them
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * h - 1, columns * w - 1, c), 128, dtype=np.uint8)
    for k, image in enumerate(shown.round().astype(np.uint8)):
        top, left = k // columns * h, k % columns * w
        sheet[top : top + h - 1, left : left + w - 1] = image.transpose(1, 2, 0)
    size = f"{images.shape[-2]} x {images.shape[-1]} pixels"
    return Picture(_png(sheet), f"{n} image{'s' * (n > 1)} of {size} in {rows} row{'s' * (rows > 1)}")


def _png(sheet: ndarray) -> str:
    """Return an image (h, w, 1 or 3) of bytes as a PNG file in base64: no library of images is a dependency."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w, c = sheet.shape
    head = struct.pack(">IIBBBBB", w, h, 8, 0 if c == 1 else 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in sheet)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(file).decode()
