"""One level of a Haar pyramid: an image is its half-size mean and what the mean leaves out.

A block [[a, b], [c, d]] of pixels becomes a mean and three details,

    l = (a + b + c + d)/4,  H = (a + b - c - d)/4,  V = (a - b + c - d)/4,  D = (a - b - c + d)/4,

and a = l + H + V + D, and so on, gives it back. The orthogonal transform is divided by 2, so that
every low-pass has the range of the image; white noise stays white at half its deviation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer
from posterity._precision import widened

__all__ = ["haar", "inverse_haar"]

Pictures = Float[Tensor, "n c height width"]


@widened
def haar(
    x: Pictures,
) -> tuple[Float[Tensor, "n c half_height half_width"], Float[Tensor, "n details half_height half_width"]]:
    """Split images into block means and details, differentiably.

    Parameters
    ----------
    x : Tensor of shape (n, c, h, w)
        Images, h and w even.

    Returns
    -------
    low : Tensor of shape (n, c, h/2, w/2)
        Means of blocks of 2 x 2 pixels.
    detail : Tensor of shape (n, 3c, h/2, w/2)
        Upper less lower pixels, left less right, one diagonal less the other, each with its
        c channels together.

    Raises
    ------
    ValueError
        If ``x`` is not of floating-point images, or has an odd side.

    References
    ----------
    .. [1] Kadkhodaie et al. Learning multi-scale local conditional probability models of images.
       ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import haar
    >>> low, detail = haar(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
    >>> low.item(), detail.flatten().tolist()
    (0.25, [0.25, 0.25, 0.25])
    """
    _pictured("x", x)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x must have even height and width, got {tuple(x.shape)}: pad or crop it")
    x = x * 0.25  # first: no sum of finite pixels overflows
    upper, lower = x[..., 0::2, :], x[..., 1::2, :]
    total, change = upper + lower, upper - lower
    (a, b), (c, d) = ((rows[..., 0::2], rows[..., 1::2]) for rows in (total, change))
    return a + b, torch.cat([c + d, a - b, c - d], 1)


@widened
def inverse_haar(
    low: Float[Tensor, "n c height width"], detail: Float[Tensor, "n details height width"]
) -> Float[Tensor, "n c double_height double_width"]:
    """Return the images whose block means and details these are.

    Parameters
    ----------
    low : Tensor of shape (n, c, h, w)
        Block means.
    detail : Tensor of shape (n, 3c, h, w)
        Details, in the order of `haar`.

    Returns
    -------
    Tensor of shape (n, c, 2h, 2w)
        Images; their block means are ``low``, whatever the details.

    Raises
    ------
    ValueError
        If the shapes or dtypes do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import haar, inverse_haar
    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> torch.equal(inverse_haar(*haar(x)), x)
    True
    """
    n, c, height, width = _pictured("low", low).shape
    has_shape("detail", floating("detail", detail), (n, 3 * c, height, width), "low")
    across, along, diagonal = detail.split(c, 1)
    upper, lower, left, right = low + across, low - across, along + diagonal, along - diagonal
    blocks = torch.stack([upper + left, upper - left, lower + right, lower - right], 2)
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)


def _pictured(name: str, value: Tensor, channels: int | None = None) -> Tensor:
    """Return images of floating-point pixels."""
    floating(name, value, "scale images to floats in [0, 1]")
    said_by = "images (n, channels, height, width)" if channels is None else "channels"
    has_shape(name, value, (None, channels, None, None), said_by)
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must have channels and pixels, got shape {tuple(value.shape)}")
    return value


def _halved(name: str, value: Tensor, channels: int, times: int) -> Tensor:
    """Return images whose sides can be halved so often."""
    sides = tuple(_pictured(name, value, channels).shape[2:])
    for level in range(times):
        if any(side % 2 ** (level + 1) for side in sides):
            raise ValueError(
                f"{name} must have even height and width at every level, got {sides}, odd at level {level}: "
                f"pad or crop to a multiple of {2**times}"
            )
    return value


def _smallest(name: str, sides: Any, times: int) -> tuple[int, int]:
    """Return height and width, halved so often."""
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise ValueError(f"{name} must be height and width, got {sides!r}")
    if any(integer(name, side, 1) % 2**times for side in sides):
        raise ValueError(f"{name} must be of multiples of {2**times}, for {times} levels, got {tuple(sides)}")
    return sides[0] // 2**times, sides[1] // 2**times
