"""A small renderer of meshes: shaded image, depth, mask, normals and faces, of many views at once.

Every triangle of every view is cut into rows of pixels: where the row's line crosses its edges, between which 1 / z is
linear. Of all that cover a pixel the nearest counts, by a minimum over the (row, pixel) pairs. Nothing has the size of
pixels times triangles: a view of 500 triangles at 64 x 64 makes some 3,000 pairs.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posterity._checks import finite, floating, integer, within
from posterity._precision import wide
from posterity.generative._canny import canny
from posterity.generative._sizes import height_width
from posterity.generative.meshes import Mesh, require_mesh
from posterity.generative.viewpoints import Pose, require_pose, rotation

__all__ = ["Rendering", "edge_map", "render"]

NEAR = 0.05  # in front of the camera, at least
GREY = 0.75  # of a surface that has no albedo of its own: its outline shows before white
PAIRS = 2**15  # triangles of views that are looked at together, about: what they make stays in the cache


class Rendering(NamedTuple):
    """What cameras see of a mesh, n views of h x w pixels.

    Attributes
    ----------
    image : Tensor
        Of shape (n, 3, h, w), in [0, 1], white where nothing is.
    depth : Tensor
        Of shape (n, 1, h, w): distance along the camera's axis, inf where nothing is.
    mask : Tensor
        Of shape (n, 1, h, w), bool: where something is.
    normals : Tensor
        Of shape (n, 3, h, w): of length 1, towards the camera, in its coordinates; 0 where nothing is.
    faces : Tensor
        Of shape (n, 1, h, w), int64: the face that is seen, -1 where nothing is.
    """

    image: Float[Tensor, "n 3 h w"]
    depth: Float[Tensor, "n 1 h w"]
    mask: Bool[Tensor, "n 1 h w"]
    normals: Float[Tensor, "n 3 h w"]
    faces: Int[Tensor, "n 1 h w"]


def render(
    mesh: Mesh,
    pose: Pose,
    *,
    size: int | tuple[int, int] = 64,
    fov: float = 40.0,
    light: tuple[float, float, float] = (0.3, 0.5, 1.0),
    ambient: float = 0.35,
    albedo: Float[Tensor, "f 3"] | None = None,
    chunk_size: int | None = None,
) -> Rendering:
    """Render a mesh from n viewpoints, flat shaded before white.

    Pixel (u, v) of the image sees along u = w / 2 - F x / z, v = h / 2 + F y / z with F = h / (2 tan(fov / 2)); pixel
    centres are at halves. A pixel belongs to a triangle if its centre does, edges included, whichever way the triangle
    goes round. The shade is ``albedo (ambient + (1 - ambient) max(0, n . l))``, in the camera's coordinates. The result
    has no gradient.

    Parameters
    ----------
    mesh : Mesh
        In the unit sphere, or wherever the cameras have it before them.
    pose : Pose
        Of n views, on the device of the mesh.
    size : int or tuple of int, default=64
        Height and width, at least 8.
    fov : float, default=40.0
        Vertical angle of view in degrees, in (0, 170).
    light : tuple of float, default=(0.3, 0.5, 1.0)
        Direction towards the light, in the camera's coordinates, of any length but 0.
    ambient : float, default=0.35
        Share of the light that comes from everywhere, in [0, 1].
    albedo : Tensor, optional
        Of shape (f, 3), in [0, 1]: what each face reflects. Default: 0.75 of all.
    chunk_size : int, optional
        Views at once, at least 1. Default: by the number of faces. The result does not depend on it.

    Returns
    -------
    Rendering
        In the dtype and on the device of the mesh.

    Raises
    ------
    ValueError
        If the mesh is empty, degenerate, not finite, or not wholly before a camera; if the parts of ``pose`` differ in
        length, or a camera stands within 1.05 of the origin; or if another argument is out of range.

    Examples
    --------
    A box from the front is a rectangle, whose rows have equally many pixels:

    >>> import torch
    >>> from posterity.generative import Pose, primitive, render
    >>> zero, four = torch.zeros(1), torch.tensor([4.0])
    >>> seen = render(primitive("box"), Pose(zero, zero, zero, four), size=32)
    >>> rows = seen.mask[0, 0].sum(1)
    >>> len(rows[rows > 0].unique()), bool(seen.depth[seen.mask].min() > 3)
    (1, True)
    """
    require_mesh("mesh", mesh)
    require_pose("pose", pose, values=True)
    height, width = height_width(size, 8)
    within("fov", fov, 0, 170, open_low=True, open_high=True)
    within("ambient", ambient, 0, 1)
    if chunk_size is not None:
        integer("chunk_size", chunk_size, 1)
    dtype, device = mesh.vertices.dtype, mesh.vertices.device
    if not isinstance(light, tuple | list) or len(light) != 3:
        raise ValueError(f"light must be three numbers, got {light!r}")
    for value in light:
        within("light", value, -1e6, 1e6)
    towards = torch.tensor([float(value) for value in light], device=device, dtype=torch.float64)
    if not bool(towards.any()):
        raise ValueError("light must have a direction, got (0, 0, 0)")
    n_faces = len(mesh.faces)
    if albedo is None:
        colour = torch.full((n_faces, 3), GREY, device=device)
    else:
        if floating("albedo", albedo).shape != (n_faces, 3):
            raise ValueError(
                f"albedo must have shape ({n_faces}, 3), a row a face, got {tuple(albedo.shape)}"
            )
        if finite("albedo", albedo).min() < 0 or albedo.max() > 1:
            raise ValueError(
                f"albedo must be in [0, 1], got values from {albedo.min():g} to {albedo.max():g}"
            )
        colour = albedo.detach().to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        vertices = wide(mesh.vertices.detach())
        pose = Pose(*(wide(part.detach()).to(vertices) for part in pose))
        faces = mesh.faces.long()
        order = _canonical(vertices, faces)
        step = chunk_size or max(1, PAIRS // n_faces)
        parts = []
        for start in range(0, len(pose.azimuth), step):
            views = Pose(*(part[start : start + step] for part in pose))
            camera = _camera(vertices, views)
            parts.append(_chunk(camera, faces[order], height, width, fov))
        if not parts:
            parts = [_nothing(vertices, height, width)]
        depth, which, normals = (torch.cat(part) for part in zip(*parts, strict=True))
        mask = which >= 0
        shade = ambient + (1 - ambient) * (
            normals * (towards / towards.norm()).to(normals)[:, None, None]
        ).sum(1, keepdim=True).clamp_min(0)
        seen = torch.where(mask, order[which.clamp_min(0)], -1)
        surface = colour.to(normals)[seen.clamp_min(0)[:, 0]].movedim(3, 1)
        image = torch.where(mask, shade * surface, 1)
    return Rendering(image.clamp(0, 1).to(dtype), depth.to(dtype), mask, normals.to(dtype), seen)


def _canonical(vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"]) -> Int[Tensor, " f"]:
    """Return an order of the faces by where they are: of two at one depth the first counts, whatever their rows."""
    corners = vertices[faces].flatten(1)
    order = torch.arange(len(faces), device=faces.device)
    for k in range(corners.shape[1]):
        order = order[corners[order, k].argsort(stable=True)]
    return order


def _camera(vertices: Float[Tensor, "v 3"], pose: Pose) -> Float[Tensor, "n v 3"]:
    """Return the vertices as the cameras see them: R X - (0, 0, d), since C is at (0, 0, d) for R."""
    turned = (rotation(pose)[:, None] * vertices[None, :, None]).sum(3)
    turned[..., 2] -= pose.distance[:, None]
    nearest = float(turned[..., 2].max())
    if nearest > -NEAR:
        raise ValueError(
            f"mesh must lie before the cameras by {NEAR} at least, a vertex has camera z {nearest:g}: "
            "bring it into the unit sphere, or raise pose.distance"
        )
    return turned


def _nothing(like: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    one = like.new_zeros(0, 1, height, width)
    return one, one.long(), like.new_zeros(0, 3, height, width)


def _chunk(
    camera: Float[Tensor, "n v 3"], faces: Int[Tensor, "f 3"], height: int, width: int, fov: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return depth, face and normals of some views."""
    n = len(camera)
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    inverse = -1 / camera[..., 2]
    x = width / 2 + focal * camera[..., 0] * inverse
    y = height / 2 - focal * camera[..., 1] * inverse
    corner = [(x[:, faces[:, k]].flatten(), y[:, faces[:, k]].flatten(), inverse[:, faces[:, k]].flatten())
              for k in range(3)]  # fmt: skip
    corners = camera[:, faces]  # (n, f, 3, 3)
    normal = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    length = normal.norm(dim=2, keepdim=True)
    pair, u, v, near = _covered(corner, length.flatten() > 0, height, width)
    pixel = (pair // len(faces) * height + v) * width + u
    front = near.new_zeros(n * height * width).scatter_reduce(0, pixel, near, "amax")
    first = near == front[pixel]
    which = torch.full((n * height * width,), len(faces), device=pair.device)
    which = which.scatter_reduce(0, pixel[first], (pair % len(faces))[first], "amin")
    mask = which < len(faces)
    which = torch.where(mask, which, -1).view(n, 1, height, width)
    depth = torch.where(mask, 1 / front, torch.inf).view(n, 1, height, width)
    normal = normal / length
    away = (normal * corners.mean(2)).sum(2, keepdim=True) > 0
    normal = torch.where(away, -normal, normal)
    view = torch.arange(n, device=pair.device)[:, None, None]
    normals = normal[view, which[:, 0].clamp_min(0)].movedim(3, 1)
    return depth, which, torch.where(which >= 0, normals, 0)


def _covered(
    corner: list[tuple[Tensor, Tensor, Tensor]], solid: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return triangle, column, row and 1 / depth of all pixels whose centres lie in triangles of (x, y, 1 / depth)."""
    (x0, y0, q0), (x1, y1, q1), (x2, y2, q2) = corner
    area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
    top = torch.minimum(torch.minimum(y0, y1), y2)
    bottom = torch.maximum(torch.maximum(y0, y1), y2)
    first = (top - 0.5).ceil().clamp(0, height).long()
    last = (bottom - 0.5).floor().clamp(-1, height - 1).long()
    count = (last - first + 1).clamp_min(0)
    count = torch.where((area != 0) & solid, count, 0)
    triangle = torch.arange(len(area), device=area.device).repeat_interleave(count)
    row = first[triangle] + _within(count)
    line = row + 0.5
    left = torch.full_like(q0[triangle], torch.inf)
    right = -left
    for (xa, ya, _), (xb, yb, _) in ((corner[0], corner[1]), (corner[1], corner[2]), (corner[2], corner[0])):
        # from its upper end: two triangles that share an edge find the same crossing, to the last bit
        swap = (ya > yb) | ((ya == yb) & (xa > xb))
        xs, ys = torch.where(swap, xb, xa), torch.where(swap, yb, ya)
        xe, ye = torch.where(swap, xa, xb), torch.where(swap, ya, yb)
        slope = torch.where(ye > ys, (xe - xs) / (ye - ys), 0)
        xs, ys, xe, ye, slope = (part[triangle] for part in (xs, ys, xe, ye, slope))
        meets = (line >= ys) & (line <= ye)
        cross = torch.minimum(
            torch.maximum(xs + (line - ys) * slope, torch.minimum(xs, xe)), torch.maximum(xs, xe)
        )
        level = meets & (ys == ye)  # an edge along the row: both its ends
        left = torch.where(meets, torch.minimum(left, torch.where(level, xs, cross)), left)
        right = torch.where(meets, torch.maximum(right, torch.where(level, xe, cross)), right)
    start = (left - 0.5).ceil().clamp(0, width).long()
    count = ((right - 0.5).floor().clamp(-1, width - 1).long() - start + 1).clamp_min(0)
    # 1 / depth is linear on the screen; thin triangles' slopes are rough, hence the ends
    safe = torch.where(area == 0, 1, area)
    across = ((q1 - q0) * (y2 - y0) - (q2 - q0) * (y1 - y0)) / safe
    down = ((q2 - q0) * (x1 - x0) - (q1 - q0) * (x2 - x0)) / safe
    at = (q0 + down * (-y0) - across * x0)[triangle] + down[triangle] * line + across[triangle] * 0.5
    run = torch.arange(len(row), device=row.device).repeat_interleave(count)
    pair = triangle[run]
    u = start[run] + _within(count)
    near = at[run] + across[pair] * u
    low, high = torch.minimum(torch.minimum(q0, q1), q2), torch.maximum(torch.maximum(q0, q1), q2)
    return pair, u, row[run], torch.minimum(torch.maximum(near, low[pair]), high[pair])


def _within(count: Int[Tensor, " m"]) -> Int[Tensor, " total"]:
    """Return 0, 1, ..., count - 1 for each count."""
    ends = count.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return torch.arange(total, device=count.device) - (ends - count).repeat_interleave(count)


def edge_map(
    image: Float[Tensor, "n c h w"],
    *,
    low: float = 100 / 255,
    high: float = 200 / 255,
    sigma: float | None = None,
) -> Float[Tensor, "n 1 h w"]:
    """Return Canny's edges, with the thresholds that edge-conditioned networks are trained with.

    Parameters
    ----------
    image : Tensor
        Of shape (n, c, h, w), in [0, 1].
    low, high : float, default=100/255 and 200/255
        A line's slope, as the sum of both unscaled 3 x 3 Sobel filters, is above ``low`` everywhere and above ``high``
        somewhere.
    sigma : float, optional
        Of a Gaussian, in pixels, that smooths first. Default: none does.

    Returns
    -------
    Tensor
        Of shape (n, 1, h, w): 1 at edges, else 0. Of images of eight bits it is ``cv2.Canny(image, 100, 200)``.

    Raises
    ------
    ValueError
        If the image has another shape or range, or thresholds are negative or not in order.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import edge_map
    >>> image = torch.zeros(1, 1, 4, 6)
    >>> image[..., 3:] = 1.0
    >>> edge_map(image)[0, 0, 1]
    tensor([0., 0., 1., 0., 0., 0.])
    """
    return canny(image, low=low, high=high, sigma=sigma)
