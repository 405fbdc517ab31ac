"""Viewpoints by four numbers, azimuth, elevation, in-plane rotation and distance, in the convention of PASCAL3D+.

The object stands at the origin with z up. The camera centre is C = d (cos e sin a, -cos e cos a, sin e), and a point X
of the world is at R (X - C) for the camera, whose x goes right, whose y goes up, and which looks along -z:

    R = Rz(theta) Rx(-(pi / 2 - e)) Rz(-a).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import finite, floating, integer, within
from posterity._precision import widened
from posterity._random import draw_device

__all__ = ["Pose", "pose_error", "rotation", "sample_poses"]

NEAREST = 1.05  # the camera stays outside the unit sphere


class Pose(NamedTuple):
    """Where cameras stand and how they are turned, one number of each a view.

    Attributes
    ----------
    azimuth : Tensor
        Of shape (n,), in radians, around the vertical axis.
    elevation : Tensor
        Of shape (n,), in radians, above the ground plane.
    theta : Tensor
        Of shape (n,), in radians, about the line of sight.
    distance : Tensor
        Of shape (n,), from the origin, in radii of the object's sphere.
    """

    azimuth: Tensor
    elevation: Tensor
    theta: Tensor
    distance: Tensor


def sample_poses(
    n: int,
    *,
    azimuth: tuple[float, float] = (0.0, 2 * math.pi),
    elevation: tuple[float, float] = (-math.pi / 12, math.pi / 2.5),
    theta: tuple[float, float] = (-math.pi / 36, math.pi / 36),
    distance: tuple[float, float] = (3.5, 5.5),
    generator: torch.Generator | None = None,
) -> Pose:
    """Draw viewpoints, each number evenly between two ends.

    Parameters
    ----------
    n : int
        How many, at least 0.
    azimuth, elevation, theta : tuple of float
        Lowest and highest angle in radians, by default all around, from a little below the horizon to 72 degrees, and
        5 degrees to either side.
    distance : tuple of float, default=(3.5, 5.5)
        Lowest, greater than 1.05, and highest.
    generator : torch.Generator, optional
        Draws them, on its device.

    Returns
    -------
    Pose
        Of n views, in the default dtype, on the generator's device.

    Raises
    ------
    ValueError
        If ends are not in order, or a camera could be inside the unit sphere.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import sample_poses
    >>> pose = sample_poses(100, elevation=(0.5, 0.5), generator=torch.Generator().manual_seed(0))
    >>> pose.azimuth.shape, float(pose.elevation.min()), bool((pose.distance >= 3.5).all())
    (torch.Size([100]), 0.5, True)
    """
    count = integer("n", n, 0)
    ends = {"azimuth": azimuth, "elevation": elevation, "theta": theta, "distance": distance}
    for name, pair in ends.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{name} must be two numbers, lowest and highest, got {pair!r}")
        low = within(f"the lowest {name}", pair[0], -math.inf, math.inf, open_low=True, open_high=True)
        within(f"the highest {name}", pair[1], low, math.inf, open_high=True)
    within("the lowest distance", distance[0], NEAREST, math.inf, open_low=True)
    drawn = torch.rand(4, count, generator=generator, device=draw_device(generator))
    return Pose(
        *(low + (high - low) * u for (low, high), u in zip(ends.values(), drawn.unbind(), strict=True))
    )


def rotation(pose: Pose) -> Float[Tensor, "n 3 3"]:
    """Return the rotations from the world to the cameras.

    Parameters
    ----------
    pose : Pose
        Of n views.

    Returns
    -------
    Tensor
        Of shape (n, 3, 3), in the dtype of ``pose``, differentiable.

    Raises
    ------
    ValueError
        If the angles are not floating-point tensors of one length.

    Examples
    --------
    From the front, at the height of the object, the world's z is the camera's y:

    >>> import torch
    >>> from posterity.generative import Pose, rotation
    >>> zero, four = torch.zeros(1), torch.tensor([4.0])
    >>> (rotation(Pose(zero, zero, zero, four))[0] @ torch.tensor([0.0, 0.0, 1.0])).round()
    tensor([0., 1., 0.])
    """
    require_pose("pose", pose)
    return _rotation(pose.azimuth, pose.elevation, pose.theta)


@widened
def _rotation(
    azimuth: Float[Tensor, " n"], elevation: Float[Tensor, " n"], theta: Float[Tensor, " n"]
) -> Float[Tensor, "n 3 3"]:
    ca, sa, ce, se = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    ct, st = theta.cos(), theta.sin()
    rows = torch.stack(  # Rx(e - pi/2) Rz(-a)
        [ca, sa, 0 * ca, -se * sa, se * ca, ce, ce * sa, -ce * ca, se], dim=1
    ).view(-1, 3, 3)
    x, y, z = rows.unbind(1)
    return torch.stack([ct[:, None] * x - st[:, None] * y, st[:, None] * x + ct[:, None] * y, z], dim=1)


def pose_error(a: Pose | Float[Tensor, "n 3 3"], b: Pose | Float[Tensor, "n 3 3"]) -> Float[Tensor, " n"]:
    r"""Return the angle of the rotation between two orientations, :math:`\|\log R_a^T R_b\|_F / \sqrt 2`.

    It is :math:`\operatorname{atan2}(\|R - R^T\|_F / \sqrt 8, (\operatorname{tr} R - 1) / 2)` for R of
    :math:`R_a^T R_b`, which neither loses digits near 0 nor near a half turn, where the arc cosine does.

    Parameters
    ----------
    a, b : Pose or Tensor
        Viewpoints, whose distances do not matter, or rotations of shape (n, 3, 3).

    Returns
    -------
    Tensor
        Of shape (n,), in radians from 0 to pi.

    Raises
    ------
    ValueError
        If they are of another form, or of different lengths.

    References
    ----------
    .. [1] Tulsiani and Malik. Viewpoints and Keypoints. CVPR 2015. Section 4.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import Pose, pose_error
    >>> zero, four = torch.zeros(2), torch.full((2,), 4.0)
    >>> turned = Pose(torch.tensor([0.25, 0.0]), zero, zero, four)
    >>> pose_error(Pose(zero, zero, zero, four), turned)
    tensor([0.2500, 0.0000])
    """
    first, second = _as_rotation("a", a), _as_rotation("b", b)
    if len(first) != len(second):
        raise ValueError(f"a and b must have one length, got {len(first)} and {len(second)}")
    return _angle(first, second)


@widened
def _angle(a: Float[Tensor, "n 3 3"], b: Float[Tensor, "n 3 3"]) -> Float[Tensor, " n"]:
    # sums of products, not a matrix product: these would be rounded to ten bits where TF32 is on
    between = (a.transpose(1, 2)[..., None] * b[:, None]).sum(2)
    skew = torch.stack([between[:, i, j] - between[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], dim=1)
    trace = between.diagonal(dim1=1, dim2=2).sum(1)
    return torch.atan2(skew.norm(dim=1) / 2, (trace - 1) / 2)


def _as_rotation(name: str, value: Pose | Tensor) -> Tensor:
    if isinstance(value, Pose):
        require_pose(name, value)
        return rotation(value)
    if floating(name, value).ndim != 3 or value.shape[1:] != (3, 3):
        raise ValueError(f"{name} must be a Pose or rotations of shape (n, 3, 3), got {tuple(value.shape)}")
    return value


def require_pose(name: str, pose: Pose, *, values: bool = False) -> Pose:
    """Return a pose whose four parts are vectors of one length; ``values`` asks for finite ones outside the sphere."""
    if not isinstance(pose, Pose):
        raise ValueError(f"{name} must be a Pose, got {type(pose).__name__}")
    for part, value in zip(pose._fields, pose, strict=True):
        if floating(f"{name}.{part}", value).ndim != 1:
            raise ValueError(f"{name}.{part} must have shape (n,), got {tuple(value.shape)}")
        if values:
            finite(f"{name}.{part}", value)
    lengths = {part: len(value) for part, value in zip(pose._fields, pose, strict=True)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{name} must have parts of one length, got {lengths}")
    if values and len(pose.distance) and float(pose.distance.min()) <= NEAREST:
        raise ValueError(
            f"{name}.distance must be greater than {NEAREST}, got {float(pose.distance.min()):g}: "
            "the camera would be in the unit sphere"
        )
    return pose
