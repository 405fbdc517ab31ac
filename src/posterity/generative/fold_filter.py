"""Which images do not show the pose of their label: those that a network trained on the others gets wrong."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import finite, floating, integer, within
from posterity._random import draw_device
from posterity.generative.viewpoints import Pose, pose_error, require_pose

__all__ = ["FilterResult", "consistency_filter"]


class FilterResult(NamedTuple):
    """What the filter found out of n images.

    Attributes
    ----------
    loss : Tensor
        Of shape (n,): radians between the label and what a network says that never saw the image.
    keep : Tensor
        Of shape (n,), bool: all but those of the largest loss.
    fold : Tensor
        Of shape (n,), int64: the part in which the image was held out.
    """

    loss: Tensor
    keep: Tensor
    fold: Tensor


@torch.inference_mode(False)
def consistency_filter(
    images: Float[Tensor, "n c h w"],
    pose: Pose,
    fit: Callable[[Tensor, Pose], Callable[[Tensor], Tensor]],
    *,
    n_folds: int = 5,
    keep: float = 0.9,
    fold: Int[Tensor, " n"] | None = None,
    generator: torch.Generator | None = None,
) -> FilterResult:
    """Score every image by a network that was trained without it, and keep those of small loss.

    Parameters
    ----------
    images : Tensor
        Of shape (n, c, h, w).
    pose : Pose
        Their labels.
    fit : callable
        ``fit(images, pose)`` trains a network on some of them, and returns a function of images: the rotations
        (m, 3, 3) that it reads off them, or angles (m, 3): azimuth, elevation and theta.
    n_folds : int, default=5
        Parts of equal size, the remainder in the last; from 2 to n.
    keep : float, default=0.9
        Share that is kept, in (0, 1].
    fold : Tensor, optional
        Of shape (n,), integers from 0 to ``n_folds - 1``, each at least once: which part an image is in, as where all
        views of a mesh should be held out together. Default: drawn.
    generator : torch.Generator, optional
        Draws the parts.

    Returns
    -------
    FilterResult
        On the device of ``images``; of equal losses the first are kept.

    Raises
    ------
    ValueError
        If there are no labels for some images, a number is out of range, or ``fit`` returns something else.

    Notes
    -----
    Two departures from the official code: it trains a classifier of bins of the three angles and stores its
    cross-entropy, here the loss is the angle between rotations, of any network; and it leaves the threshold open, here
    it is a share.

    References
    ----------
    .. [1] Ma et al. Generating Images with 3D Annotations Using Diffusion Models. ICLR 2024. Section 3.4.

    Examples
    --------
    A network that has learned the right azimuth, which one image in five does not have:

    >>> import torch
    >>> from posterity.generative import Pose, consistency_filter
    >>> truth, zero = torch.arange(5.0), torch.zeros(5)
    >>> wrong = Pose(truth + torch.tensor([0, 0, 2.0, 0, 0]), zero, zero, zero + 4)
    >>> images = truth[:, None, None, None]
    >>> def fit(images, pose):
    ...     return lambda x: torch.stack([x.flatten(), 0 * x.flatten(), 0 * x.flatten()], dim=1)
    >>> consistency_filter(images, wrong, fit, keep=0.8).keep
    tensor([ True,  True, False,  True,  True])
    """
    if floating("images", images).ndim != 4:
        raise ValueError(f"images must have shape (n, c, h, w), got {tuple(images.shape)}")
    require_pose("pose", pose)
    for part, value in zip(pose._fields, pose, strict=True):
        finite(f"pose.{part}", value)
    n = len(images)
    if len(pose.azimuth) != n:
        raise ValueError(f"pose must have one view an image, got {len(pose.azimuth)} for {n}")
    if not callable(fit):
        raise ValueError(f"fit must be a function (images, pose), got {fit!r}")
    if integer("n_folds", n_folds, 2) > n:
        raise ValueError(f"n_folds must be at most the number of images, {n}, got {n_folds}")
    within("keep", keep, 0, 1, open_low=True)
    part = _folds(n, n_folds, fold, generator).to(images.device)
    loss = pose.azimuth.new_zeros(n, dtype=torch.promote_types(pose.azimuth.dtype, torch.float32))
    for k in range(n_folds):
        held_out = part == k
        rows = (~held_out).to(pose.azimuth.device), held_out.to(pose.azimuth.device)
        others, own = (Pose(*(value[row] for value in pose)) for row in rows)
        with torch.enable_grad():
            read = fit(images[~held_out], others)
        if not callable(read):
            raise ValueError(f"fit must return a function of images, got {type(read).__name__}")
        with torch.no_grad():
            loss[rows[1]] = pose_error(_rotations(read(images[held_out]), own), own).to(loss)
    kept = torch.zeros(n, dtype=torch.bool, device=loss.device)
    kept[loss.argsort(stable=True)[: max(1, round(keep * n))]] = True
    return FilterResult(loss.to(images.device), kept.to(images.device), part)


def _folds(n: int, n_folds: int, fold: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if fold is None:
        order = torch.randperm(n, generator=generator, device=draw_device(generator)).cpu()
        part = torch.empty(n, dtype=torch.long)
        part[order] = (torch.arange(n) // (n // n_folds)).clamp_max(n_folds - 1)
        return part
    if not isinstance(fold, Tensor) or fold.dtype not in (torch.int64, torch.int32) or fold.shape != (n,):
        came = tuple(fold.shape) if isinstance(fold, Tensor) else type(fold).__name__
        raise ValueError(f"fold must be {n} integers, one an image, got {came}")
    if fold.unique().tolist() != list(range(n_folds)):
        raise ValueError(f"fold must hold each of 0..{n_folds - 1}, got {fold.unique().tolist()}")
    return fold.long()


def _rotations(said: Tensor, own: Pose) -> Tensor | Pose:
    """Return what a network says as something that has an angle to a pose."""
    m = len(own.azimuth)
    if not isinstance(said, Tensor) or not said.is_floating_point() or said.shape not in ((m, 3, 3), (m, 3)):
        came = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(
            f"fit must return a function to rotations ({m}, 3, 3) or angles ({m}, 3) of {m} images, got {came}"
        )
    said = finite("what the function from fit returns", said.detach()).to(own.azimuth)
    return said if said.ndim == 3 else Pose(said[:, 0], said[:, 1], said[:, 2], own.distance)
