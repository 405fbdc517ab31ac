"""Canny's edges: thin lines where the brightness changes fast, kept where they touch a strong one.

Sobel slopes g, |g| = |g_x| + |g_y|, of an image smoothed or not; a pixel is a ridge where |g| is largest across the
line; ridges above ``high`` stay, with all above ``low`` that are connected with them. The conventions are those of
OpenCV (Sobel 3 x 3 without scaling, replicated borders, the steepest channel), so that its thresholds, over 255, give
its edges.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from posterity._checks import at_least, finite, floating
from posterity._precision import wide

__all__ = ["canny"]

STEPS = (
    16 * 255
)  # slopes are rounded to 1 / STEPS: those of one straight edge tie, and 8-bit images are exact


def canny(
    image: Float[Tensor, "n c h w"], *, low: float, high: float, sigma: float | None
) -> Float[Tensor, "n 1 h w"]:
    """Return 1 at edges and 0 elsewhere, in the image's dtype; ``sigma`` in pixels smooths first."""
    if floating("image", image, "scale to [0, 1]").ndim != 4 or 0 in image.shape[1:]:
        raise ValueError(f"image must have shape (n, c, h, w), got {tuple(image.shape)}")
    at_least("low", low, 0)
    if not low <= at_least("high", high, 0):
        raise ValueError(f"low must be at most high, got {low} and {high}")
    if sigma is not None:
        at_least("sigma", sigma, 0, strict=True)
    finite("image", image)
    if len(image) and not (image.min() >= -1e-3 and image.max() <= 1.001):
        raise ValueError(f"image must be in [0, 1], got values in [{image.min():g}, {image.max():g}]")
    x = wide(image.detach())
    slope_x, slope_y, size = _slopes(x if sigma is None else _smooth(x, sigma))
    ridge = _ridges(slope_x, slope_y, size)
    kept = _connected(
        (ridge & (size > low * STEPS)).cpu().numpy(), (ridge & (size > high * STEPS)).cpu().numpy()
    )
    return torch.from_numpy(kept).to(image.device, image.dtype)[:, None]


def _smooth(x: Tensor, sigma: float) -> Tensor:
    """Blur rows and columns by a Gaussian, cut at three sigmas."""
    reach = max(1, math.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma) ** 2).to(x.dtype)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, -1)
    x = functional.pad(x, (reach,) * 4, mode="replicate")
    rows = functional.conv2d(x, weights[:, :, None], groups=x.shape[1])
    return functional.conv2d(rows, weights[..., None], groups=x.shape[1])


def _slopes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both slopes and the size, (n, h, w), in whole steps, of the steepest channel."""
    x = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    g_x = (STEPS * (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :])).round()
    g_y = (STEPS * (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:])).round()
    size, channel = (g_x.abs() + g_y.abs()).max(dim=1, keepdim=True)
    return g_x.gather(1, channel)[:, 0], g_y.gather(1, channel)[:, 0], size[:, 0]


def _ridges(g_x: Tensor, g_y: Tensor, size: Tensor) -> Tensor:
    """Return where the slope is largest along its own direction, of four; of equal neighbours the first."""
    around = functional.pad(size, (1, 1, 1, 1))

    def at(row: int, column: int) -> Tensor:
        return around[..., 1 + row : 1 + row + size.shape[-2], 1 + column : 1 + column + size.shape[-1]]

    tangent = math.tan(math.pi / 8)
    flat, steep = g_y.abs() < tangent * g_x.abs(), tangent * g_y.abs() > g_x.abs()
    across = (size > at(0, -1)) & (size >= at(0, 1))
    down = (size > at(-1, 0)) & (size >= at(1, 0))
    falling = (size > at(-1, -1)) & (size > at(1, 1))
    rising = (size > at(-1, 1)) & (size > at(1, -1))
    diagonal = torch.where(g_x * g_y < 0, rising, falling)
    return torch.where(flat, across, torch.where(steep, down, diagonal))


def _connected(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """Return the groups of weak pixels, joined also by corners, that hold a strong one."""
    touching = np.zeros((3, 3, 3), bool)
    touching[1] = True
    labelled: Any = ndimage.label(weak, touching)
    groups, n_groups = labelled
    keep = np.zeros(n_groups + 1, bool)
    keep[groups[strong]] = True
    keep[0] = False
    return keep[groups]
