"""Grids as fields: the values of images, maps of a globe and volumes, and where each of them lies.

A grid of cells is a list of pairs (coordinate, value), one a cell centre. In the plane and in
space centres lie evenly in [-1, 1], the j-th of w at (2 j + 1) / w - 1: twice as many fill the
same square. On the sphere a cell is the unit vector to its centre, so that there is no seam
where the longitude starts again, and no pole.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import floating, has_shape, integer

__all__ = ["field_image", "image_field", "sphere_field", "volume_field"]


def image_field(
    images: Float[Tensor, "n c h w"],
) -> tuple[Float[Tensor, "n points c"], Float[Tensor, "1 points 2"]]:
    """Return images as fields in the plane.

    Parameters
    ----------
    images : Tensor of shape (n, c, h, w)
        Floating-point images; the longer side also spans [-1, 1].

    Returns
    -------
    values : Tensor of shape (n, h * w, c)
        Row by row.
    coords : Tensor of shape (1, h * w, 2)
        Pixel centres (x, y) in [-1, 1], x to the right and y down, in float32 at least.

    Raises
    ------
    ValueError
        If ``images`` has another shape, whole numbers or no pixel.

    References
    ----------
    .. [1] Zhuang et al. Diffusion Probabilistic Fields. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import image_field
    >>> values, coords = image_field(torch.tensor([[[[1.0, 2.0]]]]))
    >>> values.squeeze(), coords.squeeze()
    (tensor([1., 2.]), tensor([[-0.5000,  0.0000],
            [ 0.5000,  0.0000]]))
    """
    _, _, h, w = _grid("images", images, 2)
    return images.flatten(2).transpose(1, 2), _box(images, h, w)


def field_image(values: Float[Tensor, "n points c"], height: int, width: int) -> Float[Tensor, "n c h w"]:
    """Return the images of fields at the coordinates of ``image_field``.

    Parameters
    ----------
    values : Tensor of shape (n, height * width, c)
        Row by row.
    height, width : int
        Pixels, at least 1.

    Returns
    -------
    Tensor of shape (n, c, height, width)
        Images.

    Raises
    ------
    ValueError
        If ``values`` has not ``height * width`` points.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import field_image
    >>> field_image(torch.arange(6.0).reshape(1, 6, 1), 2, 3).squeeze()
    tensor([[0., 1., 2.],
            [3., 4., 5.]])
    """
    size = integer("height", height, 1) * integer("width", width, 1)
    has_shape("values", floating("values", values), (None, size, None), f"height {height} and width {width}")
    return values.transpose(1, 2).reshape(len(values), values.shape[2], height, width)


def sphere_field(
    maps: Float[Tensor, "n c lat lon"],
) -> tuple[Float[Tensor, "n points c"], Float[Tensor, "1 points 3"]]:
    """Return maps of a globe, on a grid even in latitude and longitude, as fields on the sphere.

    A cell's share of the area is as the cosine of its latitude, the square root of x^2 + y^2.

    Parameters
    ----------
    maps : Tensor of shape (n, c, lat, lon)
        Values at cell centres, north first; the first column begins at longitude 0.

    Returns
    -------
    values : Tensor of shape (n, lat * lon, c)
        Row by row.
    coords : Tensor of shape (1, lat * lon, 3)
        Unit vectors, z to the north, in float32 at least.

    Raises
    ------
    ValueError
        If ``maps`` has another shape, whole numbers or no cell.

    References
    ----------
    .. [1] Zhuang et al. Diffusion Probabilistic Fields. ICLR 2023. Section 5, data on the sphere.

    Examples
    --------
    One row of four cells lies on the equator:

    >>> import torch
    >>> from posterity.generative import sphere_field
    >>> values, coords = sphere_field(torch.zeros(1, 1, 1, 4))
    >>> coords[0, 0]
    tensor([0.7071, 0.7071, 0.0000])
    """
    _, _, lat, lon = _grid("maps", maps, 2)
    latitude = _centres(lat).flip(0) * (math.pi / 2)
    longitude = (_centres(lon) + 1) * math.pi
    around = torch.stack([longitude.cos(), longitude.sin()], -1)
    x_y = latitude.cos()[:, None, None] * around
    z = latitude.sin()[:, None, None].expand(lat, lon, 1)
    return maps.flatten(2).transpose(1, 2), _points(torch.cat([x_y, z], -1), maps)


def volume_field(
    volumes: Float[Tensor, "n c d h w"],
) -> tuple[Float[Tensor, "n points c"], Float[Tensor, "1 points 3"]]:
    """Return volumes as fields in space.

    Parameters
    ----------
    volumes : Tensor of shape (n, c, d, h, w)
        Values at voxels.

    Returns
    -------
    values : Tensor of shape (n, d * h * w, c)
        Slice by slice, row by row.
    coords : Tensor of shape (1, d * h * w, 3)
        Voxel centres (x, y, z) in [-1, 1], along w, h and d, in float32 at least.

    Raises
    ------
    ValueError
        If ``volumes`` has another shape, whole numbers or no voxel.

    References
    ----------
    .. [1] Zhuang et al. Diffusion Probabilistic Fields. ICLR 2023. Section 5, occupancy.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import volume_field
    >>> values, coords = volume_field(torch.zeros(1, 1, 2, 1, 1))
    >>> coords.squeeze()
    tensor([[ 0.0000,  0.0000, -0.5000],
            [ 0.0000,  0.0000,  0.5000]])
    """
    _, _, *sides = _grid("volumes", volumes, 3)
    return volumes.flatten(2).transpose(1, 2), _box(volumes, *sides)


def _grid(name: str, x: Tensor, axes: int) -> torch.Size:
    has_shape(name, floating(name, x, "scale to floats first"), (None,) * (2 + axes))
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have channels and cells, got shape {tuple(x.shape)}")
    return x.shape


def _centres(size: int) -> Tensor:
    return (2 * torch.arange(size, dtype=torch.float64) + 1 - size) / size  # exact in the middle


def _box(like: Tensor, *sides: int) -> Tensor:
    """Return the centres of a grid in [-1, 1], the last axis first: x, y, z."""
    return _points(torch.stack(torch.meshgrid(*map(_centres, sides), indexing="ij")[::-1], -1), like)


def _points(grid: Tensor, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)  # neighbours must not fall together
    return grid.flatten(0, -2)[None].to(like.device, dtype)
