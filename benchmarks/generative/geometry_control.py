"""Race the renderer with a dense test of all pixels against all triangles, pose errors with scipy's logarithm, and the line
with the generator's calls alone.

Run from the repository root: ``python -m benchmarks.generative.geometry_control``.
"""

import math
import time

import numpy as np
import torch
from scipy.linalg import logm
from torch import Tensor

from benchmarks.timing import race
from posterity.generative import (
    GeometryControl,
    Mesh,
    TinyControlNet,
    pose_error,
    primitive,
    render,
    rotation,
    sample_poses,
)

N_VIEWS, SIZE, FOV = 1_000, 64, 40.0


def ring(around: int = 25, along: int = 10) -> Mesh:
    """Return a torus of 500 triangles in the unit sphere."""
    a, b = torch.meshgrid(
        2 * math.pi * torch.arange(around) / around, 2 * math.pi * torch.arange(along) / along, indexing="ij"
    )
    r = 0.7 + 0.3 * b.cos()
    vertices = torch.stack([r * a.cos(), r * a.sin(), 0.3 * b.sin()], -1).flatten(0, 1)
    i, j = torch.meshgrid(torch.arange(around), torch.arange(along), indexing="ij")
    p, q = i * along + j, (i + 1) % around * along + j
    p1, q1 = i * along + (j + 1) % along, (i + 1) % around * along + (j + 1) % along
    faces = torch.cat([torch.stack([p, q, q1], -1), torch.stack([p, q1, p1], -1)])
    return Mesh(vertices, faces.flatten(0, 1))


def dense(mesh: Mesh, turn: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Return depth and face of one view: every pixel is tested against every triangle."""
    camera = mesh.vertices @ turn.T - torch.tensor([0.0, 0.0, 1.0]) * distance
    focal = SIZE / 2 / math.tan(math.radians(FOV) / 2)
    inverse = -1 / camera[:, 2]
    x, y = SIZE / 2 + focal * camera[:, 0] * inverse, SIZE / 2 - focal * camera[:, 1] * inverse
    (x0, x1, x2), (y0, y1, y2) = x[mesh.faces].unbind(1), y[mesh.faces].unbind(1)
    q0, q1, q2 = inverse[mesh.faces].unbind(1)
    u = (torch.arange(SIZE) + 0.5)[None, :, None]
    v = (torch.arange(SIZE) + 0.5)[:, None, None]
    area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
    a = ((x1 - u) * (y2 - v) - (x2 - u) * (y1 - v)) / area
    b = ((x2 - u) * (y0 - v) - (x0 - u) * (y2 - v)) / area
    c = 1 - a - b
    near = torch.where((a >= 0) & (b >= 0) & (c >= 0), a * q0 + b * q1 + c * q2, 0)
    front, face = near.max(2)
    return 1 / front, torch.where(front > 0, face, -1)


def main() -> None:
    torch.set_num_threads(1)
    mesh, pose = ring(), sample_poses(N_VIEWS, generator=torch.Generator().manual_seed(0))
    some = type(pose)(*(part[:50] for part in pose))
    turns = rotation(some)

    def ours() -> Tensor:
        return render(mesh, some, size=SIZE).depth

    def naive() -> Tensor:
        return torch.stack([dense(mesh, *view)[0] for view in zip(turns, some.distance, strict=True)])

    found, expected = ours()[:, 0], naive()
    same = (found == expected) | ((found - expected).abs() < 1e-3)
    print(f"  the two agree on {float(same.float().mean()):.5f} of the pixels")
    race(
        "50 views of 500 triangles at 64 x 64, against all pixels x all triangles",
        ours,
        naive,
        target=20,
        rounds=5,
    )
    a, b = (
        sample_poses(1_000, theta=(-3.0, 3.0), generator=torch.Generator().manual_seed(k)) for k in (1, 2)
    )
    between = (rotation(a).mT @ rotation(b)).double().numpy()
    race(
        "pose errors of 1,000 pairs, against scipy's logm in a loop",
        lambda: pose_error(a, b),
        lambda: [np.linalg.norm(logm(each)) / math.sqrt(2) for each in between],
        target=100,
        rounds=5,
    )
    model, car = TinyControlNet.pretrained(), primitive("car")
    control = GeometryControl(model)
    made = control.generate(car, "car", 32, batch_size=32)
    race(
        "32 annotated images, against the generator's calls alone",
        lambda: control.generate(car, "car", 32, batch_size=32, generator=torch.Generator().manual_seed(0)),
        lambda: model(made.edges, made.prompts, [""] * 32, torch.Generator().manual_seed(0)),
        target=0.95,
        rounds=7,
    )
    start = time.perf_counter()
    render(mesh, pose, size=SIZE)
    print(
        f"  {N_VIEWS} views of 500 triangles at {SIZE} x {SIZE}: {time.perf_counter() - start:.2f} s (at most 3)"
    )


if __name__ == "__main__":
    main()
