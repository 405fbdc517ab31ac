"""Two views of a batch, as losses of this domain take them: ``loss(z1, z2)``, row i of one beside row i of the other."""

from torch import Tensor

from posterity._checks import floating, has_shape
from posterity._processes import all_rows

__all__ = ["joint_views", "matching_views"]


def matching_views(*views: Tensor, least: int = 2, names: tuple[str, ...] = ("z1", "z2")) -> None:
    """Refuse views that are not floating-point tensors of one shape (batch, dim), with at least ``least`` rows."""
    for name, z in zip(names, views, strict=True):
        floating(name, z)
        has_shape(name, z, (None, None))
        has_shape(name, z, views[0].shape, names[0])
    if len(views[0]) < least:
        raise ValueError(f"{names[0]} must have at least {least} rows, got {len(views[0])}")


def joint_views(*views: Tensor, least: int = 2, names: tuple[str, ...] = ("z1", "z2")) -> list[Tensor]:
    """Return views with the rows of all processes; of these there must be at least ``least``."""
    matching_views(*views, least=0, names=names)
    joint = all_rows(*views)
    matching_views(*joint, least=least, names=names)
    return joint
