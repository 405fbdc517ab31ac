"""Where to draw: a CPU generator serves data on every device, and so does any other."""

import torch

__all__ = ["draw_device"]


def draw_device(
    generator: torch.Generator | None, default: torch.device | None = None
) -> torch.device | None:
    """Return the device of a generator, from which draws are moved to the data, else ``default``."""
    return default if generator is None else generator.device
