"""What the checks share: closeness with a reason, inputs on other devices, untouched global state."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def same(actual: Any, expected: Any, what: str, **tolerances: float) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{what}: {text}", **tolerances)


def floats(inputs: Sequence[Any], make: Callable[[Tensor], Tensor]) -> list[Any]:
    return [make(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def accelerators() -> list[torch.device]:
    """Return the devices beside the CPU on which a check is made again."""
    return [torch.device("cuda")] if torch.cuda.is_available() else []


def placed(device: torch.device, inputs: Sequence[Any]) -> list[Any]:
    return [
        x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
    ]


def global_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_default_dtype()  # type: ignore[index]


def untouched(before: tuple[Any, ...], what: str) -> None:
    after = global_state()
    assert torch.equal(before[0], after[0]), f"{what} drew from torch's global generator: take a generator"
    assert np.array_equal(before[1], after[1]), (
        f"{what} drew from numpy's global generator: take random_state"
    )
    assert before[2] == after[2], f"{what} changed torch's default dtype"


def alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-8)
