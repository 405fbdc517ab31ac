"""Finite sets of values: numbers of a grid, points of R^k, one-hot vectors of classes.

Conditioned on one of finitely many members e, Z_1 ~ N(z, v I) has the mean

    m(z, v) = sum_e w_e e,   w = softmax(-|z - e|^2 / (2 v)),

for one-hot vectors simply softmax(z / v): far from the end a blend of all members, near it
the nearest one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import finite, has_shape, integer
from posterity.generative.intervals import _Domain

__all__ = ["Categorical", "Grid", "Points"]

WINDOW = 8.0  # standard deviations about z of which a grid's values matter


class Grid(_Domain):
    """Finitely many numbers, each coordinate for itself: integers, levels of grey.

    Parameters
    ----------
    values : Tensor of shape (m,)
        In increasing order.

    Raises
    ------
    ValueError
        If ``values`` are not finite numbers in strictly increasing order.

    Examples
    --------
    Halfway between its two values the mean is there; what is near to one of them ends at it:

    >>> import torch
    >>> from posterity.generative import Grid
    >>> bits = Grid(torch.tensor([0.0, 1.0]))
    >>> bits.endpoint_mean(torch.tensor([0.5, 0.9]), torch.tensor(0.01))
    tensor([0.5000, 1.0000])
    >>> bits.project(torch.tensor([-3.0, 0.5, 0.6]))
    tensor([0., 0., 1.])
    """

    _columnwise = True

    def __init__(self, values: Float[Tensor, " m"]) -> None:
        self.values = _numbers("values", values)
        has_shape("values", self.values, (None,), "one number each")
        if not len(self.values):
            raise ValueError("values must hold at least one number, got none")
        gaps = self.values.diff()
        if not bool((gaps > 0).all()):
            k = int((gaps <= 0).nonzero()[0])
            pair = f"{self.values[k]:g} before {self.values[k + 1]:g}"
            raise ValueError(f"values must be in strictly increasing order, got {pair}")
        even = len(gaps) >= 32 and bool(torch.allclose(gaps, gaps.mean().expand_as(gaps), rtol=1e-4, atol=0))
        self._step = float(gaps.mean()) if even else 0.0

    def __repr__(self) -> str:
        return f"Grid({len(self.values)} values)"

    def _nearest(self, z: Tensor) -> Tensor:
        middles = (self.values[1:] + self.values[:-1]) / 2
        return torch.searchsorted(middles.to(z), z.detach().contiguous())  # a middle goes to the lower one

    def _logits(self, z: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest value, offsets of the values that matter from it, and their log weights."""
        values, index = self.values.to(z), self._nearest(z)
        near, m = values[index], len(values)
        if self._step:
            needed = float(2 * WINDOW * var.max().sqrt() / self._step) + 3
            if needed < m:
                width = int(needed)
                index = (index - width // 2).clamp(0, m - width)
                values = values[index[..., None] + torch.arange(width, device=z.device)]
        offset = values - near[..., None]
        # About the nearest value, nothing cancels wherever the grid lies.
        return near, offset, ((z - near)[..., None] * offset - offset.square() / 2) / var[..., None]

    def _mean(self, z: Tensor, var: Tensor) -> Tensor:
        near, offset, logits = self._logits(z, var)
        return near + (logits.softmax(-1) * offset).sum(-1)

    def _log_h(self, z: Tensor, var: Tensor) -> Tensor:
        near, _, logits = self._logits(z, var)
        away = (z - near).square() / var + (2 * math.pi * var).log()
        return (logits.logsumexp(-1) - away / 2).sum(-1)

    def _project(self, z: Tensor) -> Tensor:
        return self.values.to(z)[self._nearest(z)]


class Points(_Domain):
    """Finitely many points of R^k, on the last axis.

    Parameters
    ----------
    points : Tensor of shape (m, k)
        All different.

    Raises
    ------
    ValueError
        If ``points`` are not finite, or one is there twice.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import Points
    >>> corners = Points(torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]]))
    >>> corners.project(torch.tensor([[0.4, 1.5], [3.0, 1.0]]))
    tensor([[0., 2.],
            [2., 0.]])
    >>> corners.endpoint_mean(torch.tensor([[1.0, 1.0]]), torch.tensor(1.0))  # all are as near
    tensor([[0.6667, 0.6667]])
    """

    def __init__(self, points: Float[Tensor, "m k"]) -> None:
        self.points = _numbers("points", points)
        has_shape("points", self.points, (None, None), "one a row")
        if not self.points.numel():
            raise ValueError(f"points must hold at least one point, got shape {tuple(self.points.shape)}")
        found, counts = self.points.unique(dim=0, return_counts=True)
        if bool((counts > 1).any()):
            twice = found[counts > 1][0].tolist()
            raise ValueError(f"points must be all different, got {twice} {int(counts.max())} times")
        self.dim = self.points.shape[1]
        self._centre = self.points.mean(0)

    def __repr__(self) -> str:
        return f"Points({len(self.points)} points, {self.dim} columns)"

    def _logits(self, z: Tensor, var: Tensor) -> Tensor:
        centre = self._centre.to(z)
        offset = (self.points - self._centre).to(z)
        return ((z - centre) / var) @ offset.T - (0.5 / var).expand_as(z) @ offset.square().T

    def _mean(self, z: Tensor, var: Tensor) -> Tensor:
        return self._logits(z, var).softmax(-1) @ self.points.to(z)

    def _log_h(self, z: Tensor, var: Tensor) -> Tensor:
        away = (z - self._centre.to(z)).square() / var + (2 * math.pi * var).log()
        return self._logits(z, var).logsumexp(-1) - away.sum(-1) / 2

    def _project(self, z: Tensor) -> Tensor:
        points, flat = self.points.to(z), z.reshape(-1, self.dim)
        away = torch.cdist(flat, points, compute_mode="donot_use_mm_for_euclid_dist")  # exact where they tie
        return points[away.argmin(-1)].view(z.shape)


class _OneHots(_Domain):
    """Several one-hot vectors side by side, those of fewer classes padded so that one softmax serves all."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.dim = sum(self.sizes)
        self._index: Tensor | None = None
        if len(set(self.sizes)) > 1:
            most, starts = max(self.sizes), torch.tensor([0, *self.sizes]).cumsum(0)[:-1, None]
            within = torch.arange(most) < torch.tensor(self.sizes)[:, None]
            self._index = torch.where(
                within, starts + torch.arange(most), self.dim
            )  # the last is a column of -inf
            self._back = within.flatten().nonzero()[:, 0]

    def _blocks(self, x: Tensor) -> Tensor:
        """Return (..., groups, classes)."""
        if self._index is None:
            return x.unflatten(-1, (len(self.sizes), self.sizes[0]))
        index = self._index.to(x.device)
        return F.pad(x, (0, 1), value=-math.inf).index_select(-1, index.flatten()).unflatten(-1, index.shape)

    def _flat(self, blocks: Tensor) -> Tensor:
        flat = blocks.flatten(-2)
        return flat if self._index is None else flat.index_select(-1, self._back.to(flat.device))

    def _mean(self, z: Tensor, var: Tensor) -> Tensor:
        return self._flat(self._blocks((z - 0.5) / var).softmax(-1))

    def _log_h(self, z: Tensor, var: Tensor) -> Tensor:
        away = z.square() / var + (2 * math.pi * var).log()
        return self._blocks((z - 0.5) / var).logsumexp(-1).sum(-1) - away.sum(-1) / 2

    def _project(self, z: Tensor) -> Tensor:
        blocks = self._blocks(z)
        return self._flat(torch.zeros_like(blocks).scatter(-1, blocks.argmax(-1, keepdim=True), 1.0))


class Categorical(_OneHots):
    """The one-hot vectors of a number of classes, on the last axis.

    Parameters
    ----------
    n_classes : int
        At least 2.

    Raises
    ------
    ValueError
        If ``n_classes`` is less.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import Categorical
    >>> z = torch.tensor([[0.0, 0.6931]])  # log 1 and log 2
    >>> Categorical(2).endpoint_mean(z, torch.tensor(1.0))
    tensor([[0.3333, 0.6667]])
    """

    def __init__(self, n_classes: int) -> None:
        self.n_classes = integer("n_classes", n_classes, 2)
        super().__init__((n_classes,))

    def __repr__(self) -> str:
        return f"Categorical({self.n_classes})"


def _numbers(name: str, value: Any) -> Tensor:
    """Return finite real numbers in float64 on the CPU."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        raise ValueError(
            f"{name} must be a tensor of numbers, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    return finite(name, value.detach().cpu().double())
