"""Triggers: the small marks on images that a backdoor answers to."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide

__all__ = ["PatchTrigger", "PeriodicTrigger"]


class PeriodicTrigger:
    """A faint wave along one axis of an image, the same in all channels and rows.

    Parameters
    ----------
    strength : float, default=6/255
        Amplitude, positive; 1 is the full range.
    frequency : float, default=16.0
        Half waves across the image, positive.
    dim : {-1, -2}, default=-1
        The axis along which it varies: width or height.

    Raises
    ------
    ValueError
        If a parameter is out of range, or images do not fit.

    References
    ----------
    .. [1] Barni, Kallas, Tondi. A New Backdoor Attack in CNNs by Training Set Corruption without
       Label Poisoning. ICIP 2019. Equation 1.
    .. [2] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import PeriodicTrigger
    >>> PeriodicTrigger(strength=0.2, frequency=2)(torch.full((1, 1, 1, 5), 0.5))
    tensor([[[[0.5000, 0.7000, 0.5000, 0.3000, 0.5000]]]])
    """

    def __init__(self, strength: float = 6 / 255, frequency: float = 16.0, *, dim: int = -1) -> None:
        self.strength = at_least("strength", strength, 0, strict=True)
        self.frequency = at_least("frequency", frequency, 0, strict=True)
        self.dim = one_of("dim", dim, (-1, -2))

    def __call__(
        self, images: Float[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n channels height width"]:
        """Return images with the wave added, clipped to [0, 1]."""
        x = _images(images)
        angle = torch.linspace(0, self.frequency * math.pi, x.shape[self.dim], dtype=torch.float64)
        wave = (self.strength * angle.sin()).to(x)
        return (x + (wave if self.dim == -1 else wave[:, None])).clamp(0, 1).to(images.dtype)


class PatchTrigger:
    """A small checkerboard, added at a place drawn for each image.

    Parameters
    ----------
    amplitude : float, default=1.0
        Added to one colour of its fields and taken from the other, in (0, 1].
    size : int, default=2
        Its height and width in pixels, at least 1.
    generator : torch.Generator, optional
        Decides the places, drawn anew at each call. By default one of its own, from seed 0.

    Raises
    ------
    ValueError
        If a parameter is out of range, or images do not fit or are smaller than the patch.

    Notes
    -----
    1. The published program takes from every field: its sign is -1 to a power, without brackets.

    References
    ----------
    .. [1] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import PatchTrigger
    >>> PatchTrigger(0.25)(torch.full((1, 1, 2, 2), 0.5))
    tensor([[[[0.7500, 0.2500],
              [0.2500, 0.7500]]]])
    """

    def __init__(
        self, amplitude: float = 1.0, size: int = 2, *, generator: torch.Generator | None = None
    ) -> None:
        self.amplitude = within("amplitude", amplitude, 0, 1, open_low=True)
        self.size = integer("size", size, 1)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def __call__(
        self, images: Float[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n channels height width"]:
        """Return images with the patch added, clipped to [0, 1]."""
        x = _images(images)
        n, _, height, width = x.shape
        if min(height, width) < self.size:
            raise ValueError(
                f"images must be at least {self.size} x {self.size} for size, got {height} x {width}"
            )
        inside = []
        for extent in (height, width):  # one where the patch is: (n, extent), and its fields' colour
            start = torch.randint(extent - self.size + 1, (n, 1), generator=self.generator,
                                  device=self.generator.device).to(x.device)  # fmt: skip
            offset = torch.arange(extent, device=x.device) - start
            inside.append(((offset >= 0) & (offset < self.size)) * (1 - 2 * (offset % 2)))
        board = inside[0][:, None, :, None] * inside[1][:, None, None, :]
        return (x + self.amplitude * board.to(x)).clamp(0, 1).to(images.dtype)


def _images(images: Tensor) -> Tensor:
    x = wide(has_shape("images", floating("images", images), (None,) * 4))
    if not bool(((x >= 0) & (x <= 1)).all()):
        low, high = x.aminmax()
        raise ValueError(f"images must be in [0, 1], got values from {low:g} to {high:g}")
    return x
