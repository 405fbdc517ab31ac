"""Class indices as papers of this domain take them."""

import torch
from torch import Tensor

from posterity._checks import has_shape

__all__ = ["class_indices"]


def class_indices(name: str, value: Tensor, n: int, n_classes: int | None = None) -> Tensor:
    """Return integers, one a sample, in 0 .. n_classes - 1; values are read on the CPU, where that is free."""
    dtype = value.dtype if isinstance(value, Tensor) else None
    if dtype is None or dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise ValueError(f"{name} must hold class indices, got {dtype or type(value).__name__}")
    has_shape(name, value, (n,), "one class a sample")
    if n_classes is not None and n and value.device.type == "cpu":
        low, high = (int(end) for end in value.aminmax())
        if low < 0 or high >= n_classes:
            raise ValueError(f"{name} must be in 0..{n_classes - 1}, got values from {low} to {high}")
    return value
