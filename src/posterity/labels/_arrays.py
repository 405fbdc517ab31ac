"""What the domain's papers share: numbers, whatever holds them."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

__all__ = ["array", "numbers"]


def array(name: str, value: Any) -> tuple[ndarray, float]:
    """Return an array, whatever holds it, and the rounding of its dtype."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise ValueError(f"{name} must be dense where it is a tensor, got layout {value.layout}")
        value = value.detach().cpu()
        floats = value.is_floating_point()  # numpy has no bfloat16
        return (value.double() if floats else value).numpy(), torch.finfo(value.dtype).eps if floats else 0.0
    try:
        value = np.asarray(value)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise ValueError(f"{name} must be an array: {error}") from error
    return value, float(np.finfo(value.dtype).eps) if value.dtype.kind == "f" else 0.0


def numbers(name: str, value: Any) -> tuple[ndarray, float]:
    """Return finite real numbers in float64, and the rounding of their dtype."""
    found, eps = array(name, value)
    if found.dtype.kind not in "fiubO":
        raise ValueError(f"{name} must hold real numbers, got {found.dtype}")
    try:
        found = found.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold real numbers: {error}") from error
    if not (finite := np.isfinite(found)).all():
        row = f" in row {np.argwhere(~finite)[0][0]}" if found.ndim else ""
        raise ValueError(f"{name} must be finite, got NaN or infinity{row}")
    return found, eps
