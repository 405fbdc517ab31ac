"""Products of domains: columns side by side, each with values of its own kind.

The mass of a product, seen from z, is the product of the masses, so its logarithm is a sum and
the mean acts column by column.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posterity.generative.finite_sets import Categorical, Grid, Points, _OneHots
from posterity.generative.intervals import Interval, _Domain

__all__ = ["Product"]


class Product(_Domain):
    """Columns side by side, each of its own domain: a row of a table.

    All intervals are computed as one, all categories as one, and all grids of the same values.

    Parameters
    ----------
    factors : sequence of Interval, Grid, Points, Categorical or Product
        In the order of the columns on the last axis; an Interval or Grid has one column.

    Raises
    ------
    ValueError
        If there are no factors, or one is none of these.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import Categorical, Interval, Product
    >>> row = Product([Interval(0.0, 1.0), Categorical(3)])
    >>> row.project(torch.tensor([[1.2, 0.1, 0.7, 0.2]]))
    tensor([[1., 0., 1., 0.]])
    >>> row.contains(torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.5, 0.0, 0.9, 0.1]]))
    tensor([ True, False])
    """

    def __init__(self, factors: Sequence[Any]) -> None:
        if not isinstance(factors, Sequence) or isinstance(factors, str) or not factors:
            raise ValueError(f"factors must be a sequence of at least one domain, got {factors!r}")
        for factor in factors:
            if not isinstance(factor, _Domain):
                raise ValueError(f"factors must be domains such as Interval and Categorical, got {factor!r}")
            if isinstance(factor, Interval) and factor.low.numel() > 1:
                raise ValueError(
                    f"factors must have one column each where they are intervals, got {factor!r}"
                )
        self.factors: tuple[Any, ...] = tuple(
            part
            for factor in factors
            for part in (factor.factors if isinstance(factor, Product) else [factor])
        )
        self.dim = sum(factor.dim for factor in self.factors)
        self._groups = list(self._grouped())
        self._order = torch.tensor([c for _, columns in self._groups for c in columns.tolist()]).argsort()

    def __repr__(self) -> str:
        return f"Product({len(self.factors)} factors, {self.dim} columns)"

    def _grouped(self) -> Any:
        """Yield domains that act on several columns, and which those are."""
        kinds: dict[Any, list[tuple[Any, list[int]]]] = {}
        start = 0
        for k, factor in enumerate(self.factors):
            kind: Any = type(factor)
            if kind is Grid:
                kind = tuple(factor.values.tolist())
            elif kind is Points:
                kind = k
            kinds.setdefault(kind, []).append((factor, list(range(start, start + factor.dim))))
            start += factor.dim
        for kind, members in kinds.items():
            columns = torch.tensor([column for _, own in members for column in own])
            first = members[0][0]
            if kind is Interval:
                low, high = (
                    torch.cat([getattr(f, end).reshape(1) for f, _ in members]) for end in ("low", "high")
                )
                first = Interval(low, high)
            elif kind is Categorical:
                first = _OneHots([f.n_classes for f, _ in members])
            yield first, columns

    def _fits(self, name: str, shape: Sequence[int]) -> None:
        if shape and shape[-1] == self.dim:
            return
        end, width = 0, shape[-1] if shape else 0
        for k, factor in enumerate(self.factors):
            end += factor.dim
            if end > width or k == len(self.factors) - 1:
                raise ValueError(
                    f"{name} must have {self.dim} columns on the last axis for {self!r}, got {width}: "
                    f"they {'do not reach the end of' if end > width else 'go on behind'} factor {k}, {factor!r}"
                )

    def _mean(self, z: Tensor, var: Tensor) -> Tensor:
        parts = [
            domain._mean(_columns(z, own), _columns(var, own))  # pyright: ignore[reportPrivateUsage]
            for domain, own in self._groups
        ]
        return torch.cat(parts, -1).index_select(-1, self._order.to(z.device))

    def _log_h(self, z: Tensor, var: Tensor) -> Tensor:
        parts = [domain._log_h(_columns(z, own), _columns(var, own)) for domain, own in self._groups]
        return torch.stack(parts).sum(0)

    def _project(self, z: Tensor) -> Tensor:
        parts = [domain._project(_columns(z, own)) for domain, own in self._groups]
        return torch.cat(parts, -1).index_select(-1, self._order.to(z.device))


def _columns(x: Tensor, own: Tensor) -> Tensor:
    """Return some columns; what is the same in all of them as it is."""
    return x if x.ndim == 0 or x.shape[-1] == 1 else x.index_select(-1, own.to(x.device))
