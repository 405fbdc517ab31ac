"""Where and under what seed to draw: torch's own state is never touched."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["draw_device", "drawn_seed", "seed_from", "seeded"]


def draw_device(
    generator: torch.Generator | None, default: torch.device | None = None
) -> torch.device | None:
    """Return the device of a generator, from which draws are moved to the data, else ``default``."""
    return default if generator is None else generator.device


def drawn_seed(random_state: Any) -> int:
    """Return a seed for torch drawn from ``random_state``."""
    from sklearn.utils import check_random_state  # here, since most that draw do without scikit-learn

    return int(check_random_state(random_state).randint(2**31 - 1))


def seed_from(generator: torch.Generator | None) -> int:
    """Return a seed drawn by a generator, by default torch's global one."""
    return int(torch.randint(2**31, (), generator=generator, device=draw_device(generator)))


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run a block under a seed, for what takes no generator; the state of torch and of every device stays.

    ``torch.manual_seed`` would also reseed GPUs that are not saved here, and wake them.
    """
    place = torch.device(device)
    devices = [] if place.type == "cpu" else [place]
    with torch.random.fork_rng(devices=devices, device_type="cuda" if place.type == "cpu" else place.type):
        torch.default_generator.manual_seed(seed)
        if devices:
            of = getattr(torch, place.type)
            with getattr(of, "device", nullcontext)(place):  # seeds the current one
                of.manual_seed(seed)
        yield
