"""Sizes of images, as a user gives them."""

from numbers import Integral
from typing import Any

from posterity._checks import integer

__all__ = ["height_width"]


def height_width(size: Any, low: int = 1) -> tuple[int, int]:
    """Return height and width, each at least ``low``, from both or the side of a square."""
    if isinstance(size, Integral):
        size = (size, size)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size must be height and width or an integer, got {size!r}")
    return integer("size", size[0], low), integer("size", size[1], low)
