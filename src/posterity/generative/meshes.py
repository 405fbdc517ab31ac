"""Triangle meshes of objects: nine kinds of simple ones, and those of OBJ files, all in the unit sphere."""

import math
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import finite, floating, one_of
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["Mesh", "load_obj", "primitive"]

Kind = Literal["box", "wedge", "cylinder", "cone", "torus", "chair", "car", "plane", "mug"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROUND = 16  # corners of what is round


class Mesh(NamedTuple):
    """Triangles in space, z up.

    What `primitive` and `load_obj` return lies in the unit sphere about the middle of its bounding box.

    Attributes
    ----------
    vertices : Tensor
        Of shape (v, 3).
    faces : Tensor
        Of shape (f, 3), int64: three rows of ``vertices`` each, in either order.
    """

    vertices: Tensor
    faces: Tensor


def primitive(kind: Kind, *, generator: torch.Generator | None = None) -> Mesh:
    """Return a simple object whose proportions are drawn anew.

    Parameters
    ----------
    kind : {"box", "wedge", "cylinder", "cone", "torus", "chair", "car", "plane", "mug"}
        What it is: of 12 to about 400 triangles. A car drives, and a plane flies, towards -y.
    generator : torch.Generator, optional
        Draws the proportions.

    Returns
    -------
    Mesh
        In the default dtype, on the CPU.

    Raises
    ------
    ValueError
        If ``kind`` is unknown.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import primitive
    >>> mesh = primitive("box", generator=torch.Generator().manual_seed(0))
    >>> mesh.vertices.shape, mesh.faces.shape
    (torch.Size([8, 3]), torch.Size([12, 3]))
    >>> bool((mesh.vertices.norm(dim=1) - 1).abs().max() < 1e-6)  # a box's corners are on its sphere
    True
    """
    one_of("kind", kind, KINDS)
    u = torch.rand(8, generator=generator, device=draw_device(generator), dtype=torch.float64).tolist()
    parts = _parts(kind, u)
    faces, start = [], 0
    for vertices, own in parts:
        faces.append(own + start)
        start += len(vertices)
    vertices = torch.cat([vertices for vertices, _ in parts])
    return _normalised(vertices.to(torch.get_default_dtype()), torch.cat(faces), kind)


Part = tuple[Tensor, Tensor]


def _parts(kind: str, u: list[float]) -> list[Part]:
    """Return the pieces of an object; ``u`` are eight numbers in [0, 1)."""
    w, d, h = 0.6 + 0.8 * u[0], 0.6 + 0.8 * u[1], 0.6 + 0.8 * u[2]
    if kind == "box":
        return [_box((0, 0, 0), (w, d, h))]
    if kind == "wedge":
        return [_prism([(-0.7 * d, -h / 2), (0.7 * d, -h / 2), (0.7 * d, h / 2)], w)]
    if kind == "cylinder":
        return [_tube([(0, -h), (0.7 * w, -h), (0.7 * w, h), (0, h)])]
    if kind == "cone":
        return [_tube([(0, -h), (w, -h), (0, h)])]
    if kind == "torus":
        thick = 0.15 + 0.25 * u[0]
        angles = [2 * math.pi * k / 8 for k in range(9)]
        return [_tube([(1 + thick * math.cos(a), thick * math.sin(a)) for a in angles])]
    if kind == "chair":
        leg = 0.06 + 0.08 * u[3]
        legs = [
            _box((x * (w / 2 - leg), y * (d / 2 - leg), -h / 2), (2 * leg, 2 * leg, h))
            for x in (-1, 1)
            for y in (-1, 1)
        ]
        back = 0.5 + 0.7 * u[4]
        return [*legs, _box((0, 0, 0.06), (w, d, 0.12)), _box((0, d / 2 - 0.06, back / 2), (w, 0.12, back))]
    if kind == "car":
        long, wide_, low, high = 1.8 + 0.6 * u[0], 0.8 + 0.2 * u[1], 0.35 + 0.15 * u[2], 0.3 + 0.15 * u[3]
        cabin, back = long * (0.42 + 0.16 * u[4]), long * (0.04 + 0.12 * u[5])
        radius = 0.17 + 0.05 * u[6]
        wheels = [
            _turned(_tube([(0, -0.08), (radius, -0.08), (radius, 0.08), (0, 0.08)], 10), "x",
                    (x * wide_ / 2, y * long * 0.31, -low / 2))
            for x in (-1, 1) for y in (-1, 1)
        ]  # fmt: skip
        return [
            _box((0, 0, 0), (wide_, long, low)),
            _box((0, back, (low + high) / 2), (0.88 * wide_, cabin, high), front=0.6, rear=0.85),
            *wheels,
        ]
    if kind == "plane":
        span, chord, sweep = 1.6 + 0.8 * u[0], 0.3 + 0.2 * u[1], 0.5 * u[2]
        body = _turned(_tube([(0, -1.1), (0.14, -0.8), (0.14, 0.7), (0, 1.1)]), "y", (0, 0, 0))
        fin = _box((0, 0.85, 0.25 + 0.1 * u[3]), (0.06, 0.25, 0.4 + 0.2 * u[3]))
        return [
            body, fin, _wing(span, chord, sweep, -0.1), _wing(0.4 * span, 0.6 * chord, sweep / 3, 0.85),
        ]  # fmt: skip
    tall, wide_ = 0.7 + 0.5 * u[0], 0.45 + 0.2 * u[1]  # a mug, open above, its handle a ring half inside
    wall = wide_ * 0.85
    cup = _tube(
        [(0, -tall), (wide_, -tall), (wide_, tall), (wall, tall), (wall, -0.85 * tall), (0, -0.85 * tall)]
    )
    thick = 0.07 + 0.05 * u[2]
    big = tall * (0.45 + 0.2 * u[3])
    ring = _tube([(big + thick * math.cos(a), thick * math.sin(a)) for a in (0, 2.1, 4.2, 2 * math.pi)])
    return [cup, _turned(ring, "y", (wide_, 0, 0))]


def _box(
    centre: tuple[float, float, float],
    size: tuple[float, float, float],
    front: float = 1.0,
    rear: float = 1.0,
) -> Part:
    """Return a box; its top is cut to a share ``front`` of its depth towards -y, ``rear`` towards y, from the middle."""
    corners = []
    for z in (-0.5, 0.5):
        for x, y in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)):
            share = 1.0 if z < 0 else front if y < 0 else rear
            corners.append([x * size[0], y * share * size[1], z * size[2]])
    vertices = torch.tensor(corners, dtype=torch.float64) + torch.tensor(centre, dtype=torch.float64)
    quads = [(0, 3, 2, 1), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return vertices, torch.tensor(faces)


def _tube(profile: list[tuple[float, float]], n: int = ROUND) -> Part:
    """Return what a line of (radius, height) makes when it turns about z; where its radius is 0 it ends in a point."""
    angles = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    vertices = torch.cat(
        [torch.stack([r * angles.cos(), r * angles.sin(), torch.full_like(angles, z)], 1) for r, z in profile]
    )
    faces = []
    for k in range(len(profile) - 1):
        for i in range(n):
            a, b = k * n + i, k * n + (i + 1) % n
            if profile[k][0] > 0:
                faces.append((a, b, b + n))
            if profile[k + 1][0] > 0:
                faces.append((a, b + n, a + n))
    return vertices, torch.tensor(faces)


def _prism(outline: list[tuple[float, float]], width: float) -> Part:
    """Return what a convex outline of (y, z) makes when it is drawn along x."""
    n = len(outline)
    vertices = torch.tensor(
        [[x, y, z] for x in (-width / 2, width / 2) for y, z in outline], dtype=torch.float64
    )
    fan = [(0, k, k + 1) for k in range(1, n - 1)]
    sides = [
        face for k in range(n) for face in ((k, (k + 1) % n, n + (k + 1) % n), (k, n + (k + 1) % n, n + k))
    ]  # fmt: skip
    return vertices, torch.tensor([*fan, *((a + n, b + n, c + n) for a, b, c in fan), *sides])


def _wing(span: float, chord: float, sweep: float, y: float) -> Part:
    """Return a flat wing, swept towards y."""
    half = [(0, y - chord), (span / 2, y + sweep), (span / 2, y + sweep + chord / 2), (0, y + chord)]
    vertices, faces = _prism([*half, *((-a, b) for a, b in half[2:0:-1])], 0.06)
    return vertices[:, [1, 2, 0]], faces


def _turned(part: Part, axis: str, centre: tuple[float, float, float]) -> Part:
    """Return a piece whose z axis is laid along another axis, moved."""
    vertices, faces = part
    order = [2, 0, 1] if axis == "x" else [0, 2, 1]
    return vertices[:, order] + torch.tensor(centre, dtype=torch.float64), faces


def load_obj(path: str | Path) -> Mesh:
    r"""Read a mesh from a Wavefront OBJ file, and bring it into the unit sphere.

    Lines ``v`` and ``f`` are read: polygons become fans of triangles, indices count from 1, negative ones back from
    the last vertex. Textures, normals, groups and materials are passed over.

    Parameters
    ----------
    path : str or Path
        Of the file.

    Returns
    -------
    Mesh
        In the default dtype, on the CPU, as the file has its axes: most have y up, and
        ``mesh.vertices[:, [0, 2, 1]] * vertices.new_tensor([1, -1, 1])`` puts z up.

    Raises
    ------
    ValueError
        If a line cannot be read, which is named by its number; if there are no faces; or if the mesh has no extent.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from posterity.generative import load_obj
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "square.obj"
    ...     _ = path.write_text("v 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nf 1 2 3 -1\n")
    ...     load_obj(path).faces
    tensor([[0, 1, 2],
            [0, 2, 3]])
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"path must be a path of an OBJ file, got {path!r}")
    points: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        word, *rest = line.split("#")[0].split() or [""]
        try:
            if word == "v":
                x, y, z = map(float, rest[:3])
                points.append([x, y, z])
            elif word == "f":
                around = [_index(text, len(points)) for text in rest]
                if len(around) < 3:
                    raise ValueError("a face has three corners at least")
                faces += [(around[0], around[k], around[k + 1]) for k in range(1, len(around) - 1)]
        except ValueError as error:
            raise ValueError(
                f"path: line {number} of {path} cannot be read, {line.strip()!r}: {error}"
            ) from error
    if not faces:
        raise ValueError(f"path must be an OBJ file with faces, {path} has {len(points)} vertices and none")
    return _normalised(torch.tensor(points), torch.tensor(faces), str(path))


def _index(text: str, n: int) -> int:
    """Return a corner ``vertex/texture/normal`` as a row of the n vertices so far; faces may name later ones."""
    k = int(text.split("/")[0])
    if k == 0 or k < -n:
        raise ValueError(f"there is no vertex {k}")
    return k - 1 if k > 0 else n + k


def _normalised(vertices: Tensor, faces: Tensor, name: str) -> Mesh:
    """Return a mesh in the unit sphere about its bounding box's middle; what no face uses does not count."""
    require_mesh(name, Mesh(vertices, faces))
    used = vertices[faces.unique()]
    centre = (used.amin(0) + used.amax(0)) / 2
    radius = (used - centre).norm(dim=1).max()
    return Mesh((vertices - centre) / radius, faces)


def require_mesh(name: str, mesh: Mesh) -> Mesh:
    """Return a mesh whose faces fit its vertices, and which has an extent."""
    if not isinstance(mesh, Mesh):
        raise ValueError(f"{name} must be a Mesh, got {type(mesh).__name__}")
    vertices: Float[Tensor, "v 3"] = floating(f"{name}.vertices", mesh.vertices)
    faces: Int[Tensor, "f 3"] = mesh.faces
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"{name}.vertices must have shape (v, 3), got {tuple(vertices.shape)}")
    if not isinstance(faces, Tensor) or faces.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}.faces must be a tensor of int64, got {getattr(faces, 'dtype', type(faces).__name__)}"
        )
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"{name}.faces must have shape (f, 3), got {tuple(faces.shape)}")
    if not len(faces):
        raise ValueError(f"{name}.faces must hold a face at least, got none")
    low, high = (int(end) for end in faces.aminmax())
    if low < 0 or high >= len(vertices):
        raise ValueError(f"{name}.faces must be in 0..{len(vertices) - 1}, got values from {low} to {high}")
    used = wide(finite(f"{name}.vertices", vertices))[faces.unique().long()]
    if float((used.amax(0) - used.amin(0)).max()) == 0:
        raise ValueError(f"{name} must have an extent, all its {len(used)} vertices are one point")
    return mesh
