"""Intervals, and what a process must know of any domain of values to end inside it.

For Z_1 | z ~ N(z, v I), conditioned on Z_1 in the set, all that is needed is the mean m(z, v), since

    grad_z log P(Z_1 in set | z) = (m(z, v) - z) / v.                          (1)

It has a closed form for an interval (the mean of a truncated normal law), a finite set of
points (a softmax over them), one-hot vectors (a softmax of z / v), and for products of
these column by column. As v falls to 0 it becomes the nearest member.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posterity._checks import at_least, floating
from posterity._precision import widened

__all__ = ["Interval"]

LEAST_VAR = 1e-12  # below, the mean is the nearest member
REACH = 40.0  # standard deviations beyond which a normal tail is nothing, also in float64

Values = Float[Tensor, " *shape"]
Leading = Float[Tensor, "..."]


class _Domain:
    """What all domains answer; each computes ``_mean``, ``_log_h`` and ``_project``."""

    dim: int = 1
    _columnwise = False  # whether it acts on each coordinate, and so on any shape

    @widened
    def endpoint_mean(self, z: Values, var: Leading) -> Values:
        """Return E[Z_1 | Z_1 in the domain] for Z_1 ~ N(z, var I).

        Parameters
        ----------
        z : Tensor
            Where the process is; the domain's columns are on the last axis.
        var : Tensor
            Variance still to come, broadcastable to ``z``, at least 0; below 1e-12 it counts as that.

        Returns
        -------
        Tensor
            Shape of ``z``.

        Raises
        ------
        ValueError
            If the shape of ``z`` does not fit, or ``var`` is negative or does not broadcast.
        """
        return self._mean(z, self._checked(z, var))

    @widened
    def log_h(self, z: Values, var: Leading) -> Leading:
        """Return the log of the mass of the domain under N(z, var I), summed over columns.

        Of a discrete set it is the sum of the normal density over its members. Its gradient
        is ``(endpoint_mean(z, var) - z) / var``.

        Parameters
        ----------
        z, var : Tensor
            As `endpoint_mean` takes them.

        Returns
        -------
        Tensor
            Shape of ``z`` without its last axis.

        Raises
        ------
        ValueError
            As `endpoint_mean`.
        """
        return self._log_h(z, self._checked(z, var))

    @widened
    def project(self, z: Values) -> Values:
        """Return the nearest member; of equally near ones that of the lowest index. NaN stays.

        Parameters
        ----------
        z : Tensor
            Values, the domain's columns on the last axis.

        Returns
        -------
        Tensor
            Shape of ``z``.

        Raises
        ------
        ValueError
            If the shape of ``z`` does not fit.
        """
        self._fits("z", floating("z", z, "cast to float first").shape)
        return torch.where(z.isnan(), z, self._project(z))

    def contains(self, z: Values, atol: float = 1e-6) -> Bool[Tensor, "..."]:
        """Return whether values are members, to within ``atol`` in each coordinate.

        Parameters
        ----------
        z : Tensor
            Values, the domain's columns on the last axis.
        atol : float, default=1e-6
            At least 0.

        Returns
        -------
        Tensor of bool
            Shape of ``z`` without its last axis.

        Raises
        ------
        ValueError
            If the shape of ``z`` does not fit or ``atol`` is negative.
        """
        at_least("atol", atol, 0)
        return ((z - self.project(z)).abs() <= atol).all(-1)

    def _checked(self, z: Any, var: Any) -> Tensor:
        self._fits("z", floating("z", z, "cast to float first").shape)
        floating("var", var)
        if var.ndim > z.ndim or any(
            n not in (1, of) for n, of in zip(reversed(var.shape), reversed(z.shape), strict=False)
        ):
            raise ValueError(f"var must be broadcastable to {tuple(z.shape)} of z, got {tuple(var.shape)}")
        # Values are read on the CPU only, where that is free.
        if var.device.type == "cpu" and not bool((var >= 0).all()):
            raise ValueError(f"var must be at least 0, got values down to {float(var.min()):g}")
        return var.to(z).clamp_min(LEAST_VAR)

    def _fits(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a shape on which this domain cannot act."""
        if not shape or (self.dim != shape[-1] and not self._columnwise):
            raise ValueError(
                f"{name} must have a last axis of {self.dim} columns for {self!r}, got {tuple(shape)}"
            )

    def _mean(self, z: Tensor, var: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_h(self, z: Tensor, var: Tensor) -> Tensor:
        raise NotImplementedError

    def _project(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Interval(_Domain):
    """The numbers from low to high, each coordinate for itself; without ends, the whole line.

    Parameters
    ----------
    low, high : float or Tensor, default=-inf and inf
        The ends, which belong to it; ``low`` is below ``high``. Tensors are broadcast to the values.

    Raises
    ------
    ValueError
        If ``low`` is not below ``high``.

    References
    ----------
    .. [1] Liu, Wu, Ye, Liu. Learning Diffusion Bridges on Constrained Domains. ICLR 2023.
       Product of intervals.

    Examples
    --------
    A half-normal law has mean sqrt(2 / pi), and half of the mass:

    >>> import torch
    >>> from posterity.generative import Interval
    >>> positive = Interval(0.0)
    >>> positive.endpoint_mean(torch.zeros(1), torch.ones(1))
    tensor([0.7979])
    >>> positive.log_h(torch.zeros(1), torch.ones(1)).exp()
    tensor(0.5000)
    """

    _columnwise = True

    def __init__(self, low: float | Tensor = -math.inf, high: float | Tensor = math.inf) -> None:
        for name, end in (("low", low), ("high", high)):
            if isinstance(end, bool | complex | str) or not isinstance(end, Tensor | int | float):
                raise ValueError(f"{name} must be a number or a tensor of them, got {end!r}")
        ends = [torch.as_tensor(end, dtype=torch.float64).detach().cpu() for end in (low, high)]
        try:
            self.low, self.high = torch.broadcast_tensors(*ends)
        except RuntimeError:
            shapes = " and ".join(str(tuple(end.shape)) for end in ends)
            raise ValueError(f"low and high must broadcast to each other, got shapes {shapes}") from None
        wrong = ~(self.low < self.high)  # NaN is neither
        if wrong.any():
            raise ValueError(
                f"low must be below high, got {self.low[wrong][0]:g} and {self.high[wrong][0]:g}"
            )
        lines = self.low.isinf() & self.high.isinf()
        self._lines, self._whole = bool(lines.any()), bool(lines.all())

    def __repr__(self) -> str:
        if self.low.ndim:
            return f"Interval(bounds of shape {tuple(self.low.shape)})"
        return f"Interval({self.low:g}, {self.high:g})"

    def _fits(self, name: str, shape: Sequence[int]) -> None:
        super()._fits(name, shape)
        bounds = self.low.shape
        if len(bounds) > len(shape) or any(
            n not in (1, of) for n, of in zip(reversed(bounds), reversed(shape), strict=False)
        ):
            raise ValueError(f"{name} must have a shape to which {self!r} broadcasts, got {tuple(shape)}")

    def _tails(self, z: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        """Return s, side, A and W: the interval is [A, A + W] in units of s from z, mirrored to lie on the right."""
        low, high, s = self.low.to(z), self.high.to(z), var.sqrt()
        below, above = (low - z) / s, (high - z) / s
        mirrored = below + above < 0
        near, width = torch.where(mirrored, -above, below), (high - low) / s
        if self._lines:  # symmetric, and long enough to be the line
            whole = low.isinf() & high.isinf()
            near, width = torch.where(whole, -REACH, near), torch.where(whole, 2 * REACH, width)
        # An infinite end is moved to where nothing is left of the tail: erfcx has no derivative at infinity.
        return s, 1 - 2 * mirrored.to(z), near, torch.minimum(width, 2 * near.abs() + REACH)

    def _masses(self, near: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return 1 - E and masses for z outside and inside: that outside is in units of exp(-A^2 / 2)."""
        outside, inside = near.clamp_min(0), near.clamp(-REACH, 0)
        tiny, root = torch.finfo(near.dtype).tiny, math.sqrt(0.5)
        fall_out = -torch.expm1(-width * (outside + width / 2))
        fall_in = -torch.expm1(-width * (inside + width / 2))
        first, last = (torch.special.erfcx(root * x) for x in (outside, outside + width))
        out = ((first - last + last * fall_out) / 2).clamp_min(tiny)  # of two tails that may both be 1e-300
        within = (torch.erf(root * (inside + width)) - torch.erf(root * inside)) / 2
        return fall_out, out, fall_in * (-0.5 * inside.square()).exp(), within.clamp_min(tiny)

    def _mean(self, z: Tensor, var: Tensor) -> Tensor:
        if self._whole:
            return z
        s, side, near, width = self._tails(z, var)
        fall_out, out, fall_in, within = self._masses(near, width)
        shift = torch.where(near > 0, fall_out / out, fall_in / within) / math.sqrt(2 * math.pi)
        return torch.clamp(z + side * s * shift, self.low.to(z), self.high.to(z))

    def _log_h(self, z: Tensor, var: Tensor) -> Tensor:
        _, _, near, width = self._tails(z, var)
        _, out, _, within = self._masses(near, width)
        outside = near.clamp_min(0)
        return torch.where(near > 0, out.log() - 0.5 * outside.square(), within.log()).sum(-1)

    def _project(self, z: Tensor) -> Tensor:
        return torch.clamp(z, self.low.to(z), self.high.to(z))
