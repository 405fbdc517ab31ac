"""Views of a batch: a weak one that changes next to nothing, and a strong one of the same class.

Images are (n, channels, height, width) in [0, 1]; rows of features, standardised, are images
of a single pixel. Every example of a batch is distorted in its own way, all at once.
"""

import torch
from torch import Tensor

__all__ = ["strong_view", "weak_view"]

GREY = 0.3  # what is cut out becomes


def weak_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch with a little noise, of standard deviation 0.05.

    Parameters
    ----------
    x : Tensor of shape (n, channels, height, width)
    generator : torch.Generator
        On any device; what it draws is moved to the data.

    Returns
    -------
    Tensor
    """
    return x + 0.05 * _normal(x, generator)


def strong_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch strongly distorted.

    Images are moved by up to an eighth of their height (at least a pixel), their contrast is
    multiplied by 0.6 to 1.4, a square of three eighths becomes grey, and noise of standard
    deviation 0.15 is added. Of features a fifth becomes 0, their mean; the noise has 0.3.

    Parameters
    ----------
    x : Tensor of shape (n, channels, height, width)
    generator : torch.Generator
        On any device; what it draws is moved to the data.

    Returns
    -------
    Tensor
    """
    if x.shape[2:] == (1, 1):
        kept = _uniform(x.shape, x, generator) >= 0.2
        return (x + 0.3 * _normal(x, generator)) * kept
    n, _, height, width = x.shape
    contrast = 0.6 + 0.8 * _uniform((n, 1, 1, 1), x, generator)
    mean = x.mean((1, 2, 3), keepdim=True)
    moved = mean + contrast * (_moved(x, generator) - mean)
    side = max(1, round(3 * min(height, width) / 8))
    top, left = (_whole(size - side + 1, n, x, generator) for size in (height, width))
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & (
        (columns >= left) & (columns < left + side)
    )[:, None]
    return moved.masked_fill(inside[:, None], GREY) + 0.15 * _normal(x, generator)


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images moved by whole pixels; what enters at an edge repeats it."""
    n, _, height, width = x.shape
    reach = max(1, min(height, width) // 8)
    down, right = (_whole(2 * reach + 1, n, x, generator) - reach for _ in range(2))  # (n, 1)
    rows = (torch.arange(height, device=x.device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + right).clamp(0, width - 1)
    each = torch.arange(n, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x)


def _uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(x)


def _whole(below: int, n: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return an integer an example, from 0 to ``below`` - 1, of shape (n, 1)."""
    return torch.randint(below, (n, 1), generator=generator, device=generator.device).to(x.device)
