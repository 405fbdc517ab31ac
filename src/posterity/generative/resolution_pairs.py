"""Images at two resolutions: what a continuous image learns from, and what it is then asked for.

From an image of side S a low and a high version are made, both by antialiased reduction. The
network sees the low one and is asked for single pixels of the high one, at their centres: so it
learns to undo the reduction by the factor that is between them, at any size it is met with.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer, one_of
from posterity._models import at_rest
from posterity._precision import wide
from posterity._random import draw_device
from posterity.generative._sizes import height_width
from posterity.generative.image_interpolation import pixel_grid

__all__ = ["funknn_pairs", "upsample"]

LEAST = 16  # pixels a side of images to learn from


def funknn_pairs(
    images: Float[Tensor, "n c h w"], *, mode: Literal["factor", "continuous", "single"] = "factor",
    factor: int = 2, n_coords: int = 512, generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "n c low_h low_w"], Float[Tensor, "n m 2"], Float[Tensor, "n m c"]]:  # fmt: skip
    """Return small images, coordinates, and the values that larger ones have there.

    One random size serves all images of a call; coordinates are drawn for each image, pixel
    centres of its larger version, with replacement. Train on
    ``F.l1_loss(net(low, coords), target)``.

    Parameters
    ----------
    images : Tensor of shape (n, c, h, w)
        Floats, 16 pixels a side or more. S below is the shorter side; both shrink alike.
    mode : {"factor", "continuous", "single"}, default="factor"
        The low side is uniform in [S/(4 factor), S/factor) and the high one ``factor`` times
        that; or uniform in [S/4, S/2) with the images themselves for the high one; or S/2
        with the images themselves. "factor" is made to be applied recursively.
    factor : int, default=2
        Ratio of "factor", from 2 to less than S/2.
    n_coords : int, default=512
        Coordinates an image m, at least 1.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    low : Tensor of shape (n, c, low_h, low_w)
        In the dtype of the images.
    coords : Tensor of shape (n, n_coords, 2)
        (x, y) in [-1, 1], in float32 at least.
    target : Tensor of shape (n, n_coords, c)
        In the dtype of the images.

    Raises
    ------
    ValueError
        If images are too small or whole numbers, or an argument is out of range.

    Notes
    -----
    The official program draws one set of coordinates for all images of a batch.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 3.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import funknn_pairs
    >>> low, coords, target = funknn_pairs(torch.ones(4, 3, 32, 32), mode="single", n_coords=5)
    >>> low.shape, coords.shape, target.mean().item()
    (torch.Size([4, 3, 16, 16]), torch.Size([4, 5, 2]), 1.0)
    """
    has_shape("images", floating("images", images, "scale to floats in [0, 1]"), (None,) * 4)
    n, c, h, w = images.shape
    side = min(h, w)
    if side < LEAST or c < 1:
        raise ValueError(
            f"images must have channels and at least {LEAST} pixels a side, got shape {tuple(images.shape)}"
        )
    one_of("mode", mode, ("factor", "continuous", "single"))
    if integer("factor", factor, 2) * 2 >= side:
        raise ValueError(f"factor must be less than half the shorter side, {side}, got {factor}")
    integer("n_coords", n_coords, 1)

    where = draw_device(generator)
    least, end = {"factor": (side / (4 * factor), side / factor), "continuous": (side / 4, side / 2)}.get(
        mode, (side // 2, side // 2 + 1)
    )
    first = max(2, -int(-least // 1))
    drawn = int(torch.randint(first, max(first + 1, -int(-end // 1)), (), generator=generator, device=where))
    low_sides = [max(2, round(size * drawn / side)) for size in (h, w)]
    high_sides = [factor * size for size in low_sides] if mode == "factor" else [h, w]
    high = _reduced(images, high_sides)
    picked = torch.randint(high_sides[0] * high_sides[1], (n, n_coords), generator=generator, device=where)
    picked = picked.to(images.device)
    coords = pixel_grid(
        *high_sides, device=images.device, dtype=torch.promote_types(images.dtype, torch.float32)
    )
    target = high.flatten(2).gather(2, picked[:, None].expand(n, c, n_coords)).transpose(1, 2)
    return _reduced(images, low_sides), coords[0][picked], target


def _reduced(images: Tensor, sides: Sequence[int]) -> Tensor:
    if list(images.shape[2:]) == list(sides) or not len(images):
        return images.new_zeros(*images.shape[:2], *sides) if not len(images) else images
    with torch.autocast(images.device.type, enabled=False):
        small = F.interpolate(wide(images), tuple(sides), mode="bilinear", antialias=True)
    return small.to(images.dtype)


@torch.no_grad()
def upsample(
    net: Callable[..., Any], image: Float[Tensor, "n c h w"], size: int | tuple[int, int], *,
    recursive: bool = False, factor: int = 2, chunk_size: int = 16384,
) -> Float[Tensor, "n channels height width"]:  # fmt: skip
    """Return an image at another size, read off a continuous image at the centres of pixels.

    Without gradients. A smaller size is sampled, not averaged.

    Parameters
    ----------
    net : callable
        ``net(image, coords)`` of shape (n, m, channels), such as a ``FunkNN``. A module is used
        in eval mode.
    image : Tensor of shape (n, c, h, w)
        Two pixels a side or more, for a ``FunkNN``.
    size : int or tuple of int
        Height and width, or the side of a square, at least 1.
    recursive : bool, default=False
        Whether to enlarge by ``factor`` as often as it fits, each time from the result, and
        then once to the size: for networks trained on that factor.
    factor : int, default=2
        At least 2.
    chunk_size : int, default=16384
        Coordinates at once, over all images, at least 1: less needs less memory.

    Returns
    -------
    Tensor of shape (n, channels, height, width)
        The image at that size.

    Raises
    ------
    ValueError
        If shapes do not fit or an argument is out of range.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 3.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import FunkNN, upsample
    >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    >>> upsample(FunkNN(1), ramp, 16)[0, 0, 8, 6:10]  # two pixels for each
    tensor([2.7500, 3.2500, 3.7500, 4.2500])
    """
    has_shape("image", floating("image", image, "scale to floats first"), (None,) * 4)
    if 0 in image.shape[2:]:
        raise ValueError(f"image must have pixels, got shape {tuple(image.shape)}")
    sides = height_width(size)
    integer("factor", factor, 2)
    integer("chunk_size", chunk_size, 1)
    with at_rest(net):
        return _enlarged(net, image, sides, factor if recursive else None, chunk_size)


def _enlarged(net: Any, image: Tensor, size: tuple[int, int], factor: int | None, chunk_size: int) -> Tensor:
    while factor and all(factor * have <= want for have, want in zip(image.shape[2:], size, strict=True)):
        image = _at(net, image, (factor * image.shape[2], factor * image.shape[3]), chunk_size)
        if tuple(image.shape[2:]) == size:
            return image
    return _at(net, image, size, chunk_size)


def _at(net: Any, image: Tensor, size: tuple[int, int], chunk_size: int) -> Tensor:
    grid = pixel_grid(*size, device=image.device, dtype=torch.promote_types(image.dtype, torch.float32))
    parts = []
    for coords in grid.split(max(1, chunk_size // max(1, len(image))), 1):
        part = floating("net(image, coords)", net(image, coords))
        parts.append(
            has_shape("net(image, coords)", part, (len(image), coords.shape[1], None), "image and coords")
        )
    found = torch.cat(parts, 1)
    return (
        found.transpose(1, 2).reshape(len(image), -1, *size)
        if len(image)
        else found.new_zeros(0, found.shape[2], *size)
    )
