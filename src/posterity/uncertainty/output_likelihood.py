"""How targets scatter around a network's outputs: by the classes of a softmax, or by Gaussians.

A posterior around trained weights knows a likelihood by the curvature of minus its logarithm in
the outputs,

    H = diag(p) - p p'   (softmax, p its probabilities),       H = I / variance   (Gaussian),  (1)

and its draws need a root of it, which both have in closed form: R R' = H with
R = diag(sqrt p) - p sqrt(p)', and R = I / sqrt(variance).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from posterity._checks import finite, floating, has_shape

__all__: list[str] = []


class _Likelihood(NamedTuple):
    """Of classes or of Gaussian targets, as `SampledLaplace` takes them."""

    kind: str
    noise_variance: float

    @property
    def gaussian(self) -> bool:
        return self.kind == "regression"

    def check(self, y: Tensor | None, n: int, n_outputs: int) -> None:
        """Refuse targets that do not fit n points and their outputs."""
        if y is None:
            return
        if self.gaussian:
            has_shape("y", finite("y", floating("y", y)), (n, n_outputs), "X and the model")
            return
        if y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(f"y must hold class indices, got dtype {y.dtype}")
        low, high = has_shape("y", y, (n,), "X").aminmax() if n else (0, 0)
        if int(low) < 0 or int(high) >= n_outputs:
            raise ValueError(f"y must be in 0..{n_outputs - 1}, got {int(low)} to {int(high)}")

    def curve(self, f: Tensor, u: Tensor) -> Tensor:
        """Return H u."""
        if self.gaussian:
            return u / self.noise_variance
        p = f.softmax(-1)
        return p * u - p * (p * u).sum(-1, keepdim=True)

    def root(self, f: Tensor, e: Tensor) -> Tensor:
        """Return R e."""
        if self.gaussian:
            return e / math.sqrt(self.noise_variance)
        p = f.softmax(-1)
        e = p.sqrt() * e
        return e - p * e.sum(-1, keepdim=True)

    def log_density(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the log-density of targets of m points under draws of outputs: (draws, m)."""
        if not self.gaussian:
            return f.log_softmax(-1).gather(-1, y.long().expand(len(f), -1)[..., None])[..., 0]
        square = (y - f).square() / self.noise_variance
        return -0.5 * (square + math.log(2 * math.pi * self.noise_variance)).sum(-1)
