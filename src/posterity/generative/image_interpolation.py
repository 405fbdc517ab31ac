"""Differentiable interpolation: a patch of any image around any point, with exact derivatives.

Around a coordinate, p x p values are read off the image by a kernel k of compact support,

    patch[r, q] = sum_ij k(y_r - i) k(x_q - j) image[i, j],                    (1)

at positions x_q, y_r in pixels, p on each axis. Keys' cubic kernel is once continuously
differentiable and reproduces quadratics, so that gradients and Laplacians are those of the
function, not differences of it. Since (1) is a product of two axes, a coordinate costs one block
of pixels and two small matrix products, where pixel by pixel each of p^2 values reads 16 others.

Coordinates are (x, y) = (column, row) in [-1, 1], the image's outer edges: the centre of pixel
(i, j) of h x w lies at ((2 j + 1) / w - 1, (2 i + 1) / h - 1), as in ``grid_sample`` with
``align_corners=False``. Beyond the edges the image is mirrored in them.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import floating, has_shape, integer, one_of
from posterity._models import not_batched
from posterity._precision import widened

__all__ = ["image_patches", "pixel_grid"]

# Of the kernel at a distance u from 0: coefficients of 1, u, u^2, u^3 on [0, 1), [1, 2), [2, 3).
KERNELS = {
    "bilinear": ((1.0, -1.0, 0.0, 0.0),),
    "cubic": ((1.0, 0.0, -2.5, 1.5), (2.0, -4.0, 2.5, -0.5)),
    "cubic6": (
        (1.0, 0.0, -7 / 3, 4 / 3),
        (5 / 2, -59 / 12, 3.0, -7 / 12),
        (-3 / 2, 7 / 4, -2 / 3, 1 / 12),
    ),
}
FARTHEST = 3.0  # coordinates up to one image beyond the edges


def pixel_grid(
    height: int, width: int | None = None, *, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "1 points 2"]:  # fmt: skip
    """Return the centres of an image's pixels, row by row.

    Parameters
    ----------
    height : int
        Rows, at least 1.
    width : int, optional
        Columns, at least 1; as many as rows by default.
    device : device, optional
        Where to make it.
    dtype : dtype, optional
        A floating-point dtype; torch's default by default. Below float32 neighbours of a large
        image fall together.

    Returns
    -------
    Tensor of shape (1, height * width, 2)
        Coordinates (x, y) in [-1, 1].

    Raises
    ------
    ValueError
        If a side is smaller than 1, or the dtype not floating-point.

    Examples
    --------
    >>> from posterity.generative import pixel_grid
    >>> pixel_grid(1, 4)
    tensor([[[-0.7500,  0.0000],
             [-0.2500,  0.0000],
             [ 0.2500,  0.0000],
             [ 0.7500,  0.0000]]])
    """
    sides = integer("height", height, 1), integer("width", height if width is None else width, 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    y, x = ((2 * torch.arange(side, dtype=torch.float64) + 1 - side) / side for side in sides)
    grid = torch.stack([x.expand(sides), y[:, None].expand(sides)], -1).reshape(1, -1, 2)
    return grid.to(device, dtype or torch.get_default_dtype())


def image_patches(
    image: Float[Tensor, "n c h w"], coords: Float[Tensor, "#n m 2"], patch_size: int = 9, *,
    scale: Float[Tensor, "2"] | None = None, kernel: Literal["cubic", "cubic6", "bilinear"] = "cubic",
) -> Float[Tensor, "n m c p p"]:  # fmt: skip
    """Return the patches of an image around coordinates, interpolated.

    Differentiable in the image, the coordinates and the scale. The value in the middle is the
    interpolated image at the coordinate itself, so that a patch of 1 is interpolation. Entry
    (r, q) lies ``(q - (p - 1) / 2) scale_x (p - 1) / p w / (w - 1)`` pixels to the right of the
    coordinate, and likewise below it: neighbours are 8/9 of a pixel apart for p = 9 [1]_.

    Parameters
    ----------
    image : Tensor of shape (n, c, h, w)
        Two pixels a side or more.
    coords : Tensor of shape (n, m, 2) or (1, m, 2)
        (x, y), [-1, 1] is the image; up to one image beyond the edges is mirrored.
    patch_size : int, default=9
        Values a side p, odd, at least 1.
    scale : Tensor of shape (2,), optional
        Factor (x, y) on the spacing, 1 by default. Its size is read, for which an accelerator
        waits.
    kernel : {"cubic", "cubic6", "bilinear"}, default="cubic"
        Keys' kernel of 4 x 4 pixels, one of 6 x 6 of higher order, or linear interpolation,
        which has a first derivative only.

    Returns
    -------
    Tensor of shape (n, m, c, patch_size, patch_size)
        Patches, rows before columns, in the dtype of the image.

    Raises
    ------
    ValueError
        If shapes do not fit, an argument is out of range, or a coordinate is NaN or beyond
        [-3, 3] (on the CPU, where looking is free).

    Notes
    -----
    1. The official program uses the height for both axes; here each has its own side.
    2. Its coordinates are edges of pixels where they should be centres, half a pixel off, and
       the argument of its kernel is shifted by 1e-6; neither is copied.
    3. On a line through pixel centres, where a cubic kernel's second derivative jumps, it is
       that towards greater coordinates.

    References
    ----------
    .. [1] Khorashadizadeh et al. FunkNN: Neural interpolation for functional generation.
       ICLR 2023. Section 2.
    .. [2] Keys. Cubic convolution interpolation for digital image processing. IEEE Transactions
       on Acoustics, Speech, and Signal Processing, 1981. Equations 15 and 25.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import image_patches
    >>> image = torch.arange(8.0).square().expand(1, 1, 8, 8)  # j^2
    >>> at = torch.tensor([[[0.0, 0.0], [0.125, 0.0]]])  # columns 3.5 and 4
    >>> image_patches(image, at, 1).squeeze()
    tensor([12.2500, 16.0000])
    """
    check_image(image, coords)
    p = integer("patch_size", patch_size, 1)
    if p % 2 == 0:
        raise ValueError(f"patch_size must be odd, got {p}")
    one_of("kernel", kernel, tuple(KERNELS))
    factors = [1.0, 1.0]
    if scale is not None:
        has_shape("scale", floating("scale", scale), (2,), "(x, y)")
        factors = [abs(factor) for factor in scale.detach().tolist()]
        if not all(map(math.isfinite, factors)):
            raise ValueError(f"scale must be finite, got {scale.detach().tolist()}")
    return _patches(image, coords, scale, p, kernel, factors)


def check_image(image: Any, coords: Any, channels: int | None = None) -> None:
    """Refuse an image that is none, and coordinates that do not fit it."""
    said = None if channels is None else "channels"
    has_shape(
        "image", floating("image", image, "scale to floats first"), (None, channels, None, None), said or ""
    )
    n, c, h, w = image.shape
    if min(h, w) < 2 or c < 1:
        raise ValueError(
            f"image must have channels and at least 2 pixels a side, got shape {tuple(image.shape)}"
        )
    has_shape("coords", floating("coords", coords), (None, None, 2), "(x, y)")
    if coords.shape[0] not in (n, 1):
        raise ValueError(f"coords must be of {n} images, or 1 for all, got {coords.shape[0]}")
    if coords.numel() and coords.device.type == "cpu":
        try:
            inside = bool(coords.detach().abs().max() <= FARTHEST)  # NaN is not
        except RuntimeError as error:  # within torch.func.vmap there is no looking
            if not not_batched(error):
                raise
            inside = True
        if not inside:
            low, high = coords.detach().aminmax()
            raise ValueError(
                f"coords must be in [-3, 3], where [-1, 1] is the image, got values from {low:g} to {high:g}: "
                "pixel indices are made coordinates by (2 j + 1) / width - 1"
            )


def patch_jet(
    image: Tensor, coords: Tensor, patch_size: int, scale: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return patches, their derivatives along x and y, and their Laplacian, with respect to coordinates."""
    factors = [abs(factor) for factor in scale.detach().tolist()]
    found = _orders(image, coords, scale, patch_size, kernel, factors, 3)  # (n, m, 3, p, c, 3, p)
    value, x, xx, y, yy = (
        found[:, :, down, :, :, across].transpose(2, 3)
        for down, across in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))
    )
    return value, x, y, xx + yy


@widened
def _patches(
    image: Tensor, coords: Tensor, scale: Tensor | None, p: int, kernel: str, factors: list[float]
) -> Tensor:
    found = _orders(image, coords, scale, p, kernel, factors, 1)[:, :, 0, :, :, 0]
    return found.transpose(2, 3).to(image.dtype)


def _orders(
    image: Tensor,
    coords: Tensor,
    scale: Tensor | None,
    p: int,
    kernel: str,
    factors: list[float],
    orders: int,
) -> Tensor:
    """Return patches and their derivatives, shape (n, m, orders in y, p, c, orders in x, p)."""
    n, c, h, w = image.shape
    m = coords.shape[1]
    dtype = torch.promote_types(image.dtype, coords.dtype)
    xy = coords.to(dtype)
    rows, down = _axis(xy[..., 1], h, p, kernel, factors[1], None if scale is None else scale[1], orders)
    columns, across = _axis(xy[..., 0], w, p, kernel, factors[0], None if scale is None else scale[0], orders)
    a, b = rows.shape[-1], columns.shape[-1]
    plane = torch.arange(c, device=image.device) * (h * w)
    at = (rows * w)[..., None, None] + plane[:, None] + columns[..., None, None, :]  # (n or 1, m, a, c, b)
    block = image.reshape(n, c * h * w).gather(1, at.reshape(len(at), m * a * c * b).expand(n, -1)).to(dtype)
    block = block.view(n, m, a * c, b) @ across.mT  # (n, m, a * c, orders * p)
    found = down @ block.view(n, m, a, c * orders * p)
    return found.view(n, m, orders, p, c, orders, p)


def _axis(
    x: Tensor, size: int, p: int, kernel: str, factor: float, scale: Tensor | None, orders: int
) -> tuple[Tensor, Tensor]:
    """Return which pixels (b, m, k) of an axis patches read, and each entry's weights (b, m, orders * p, k)."""
    step = (p - 1) / p * size / (size - 1)
    offsets = torch.arange(p, device=x.device, dtype=x.dtype) - (p - 1) // 2
    offsets = offsets * step if scale is None else offsets * (step * scale.to(x.dtype))
    places = ((x + 1) * (size / 2) - 0.5)[..., None] + offsets
    cells = places.detach().floor()
    weights = [_weights(places - cells, kernel, order) * (size / 2) ** order for order in range(orders)]
    taps = weights[0].shape[-1]
    reach = torch.arange(taps, device=x.device) - (taps // 2 - 1)
    pixels = cells.long()[..., None] + reach  # (b, m, p, taps)
    width = math.floor((p - 1) * step * factor + 1e-3) + 1 + taps  # of the block in which all of them lie
    if width < p * taps:
        first = pixels.amin((-2, -1))[..., None]
        read = first + torch.arange(width, device=x.device)
        slots = pixels - first[..., None]
    else:  # entries far apart share no pixels
        read = pixels.flatten(-2)
        slots = torch.arange(p * taps, device=x.device).view(p, taps).expand(pixels.shape)
    blank = x.new_zeros(*pixels.shape[:-1], read.shape[-1])
    dense = torch.cat([blank.scatter(-1, slots, each) for each in weights], -2)
    read = read.remainder(2 * size)
    return torch.where(read < size, read, 2 * size - 1 - read), dense


def _weights(part: Tensor, kernel: str, order: int) -> Tensor:
    """Return the weights of the pixels around a point ``part`` of a pixel to the right of one, or a derivative of them.

    A polynomial in ``part`` for each pixel: of a distance, |x|, the second derivative at 0 would be lost.
    """
    pieces = torch.tensor(KERNELS[kernel], dtype=torch.float64)
    half = len(pieces)
    which = [*reversed(range(half)), *range(half)]
    sign = part.new_tensor([1.0] * half + [-1.0] * half)
    u = part.new_tensor([*reversed(range(half)), *range(1, half + 1)]) + sign * part[..., None]
    powers = torch.arange(4, dtype=torch.float64)
    for _ in range(order):  # in u, which is sign * part and a constant
        pieces = torch.cat([(pieces * powers)[:, 1:], torch.zeros(half, 1, dtype=torch.float64)], 1)
    c0, c1, c2, c3 = (c.to(part) for c in pieces[which].T)
    return sign**order * (((c3 * u + c2) * u + c1) * u + c0)
