"""A high-pass and a low-pass filter of a graph's frequencies, both learned and both monotone.

A filter is a polynomial of the graph's Laplacian L = I - D^-1/2 A D^-1/2, whose
frequencies lie in [0, 2],

    H x = sum_k c_k T_k(L - I) x,   c_k = 2 / (K + 1) sum_j v_j T_k(t_j)   (c_0 halved),   (1)

the Chebyshev interpolant through the values v_j at the K + 1 Chebyshev nodes t_j. Values
that only rise make a high-pass filter, values that only fall a low-pass one; what is
trained is by how much. The terms T_k(L - I) x do not depend on v, so one recurrence of K
sparse products serves both filters.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, integer
from posterity._precision import wide, widened
from posterity.graphs._graph import adjacency, check_graph, uncompiled

__all__ = ["PolynomialFilter"]


class PolynomialFilter(nn.Module):
    """A high-pass and a low-pass filter of a graph's frequencies, equation 1.

    Parameters
    ----------
    K : int, default=10
        Degree, at least 1: how many hops a filter sees.
    init_low : float, default=2.0
        Value of the low-pass filter at the lowest node, at least 0.
    init_high : float, default=0.0
        Value of the high-pass filter at the lowest node, at least 0.
    value_range : float, default=2.0
        By how much the high-pass values rise and the low-pass values fall at the start,
        at least 0.
    learn_ends : bool, default=False
        Whether the two values at the lowest node are trained, and passed through relu.
    nonnegative : bool, default=False
        Whether low-pass values are passed through relu; if not, they may fall below 0.
    max_elements : int, default=2**27
        The K + 1 terms of equation 1 are kept while they have at most so many numbers;
        beyond that they are summed one by one, and computed again for the gradient.

    Attributes
    ----------
    initial_val_low, initial_val_high : nn.Parameter
        Scalars; without a gradient unless ``learn_ends``.
    temp_low, temp_high : nn.Parameter
        Shape (K,): the steps from value to value before relu.

    Raises
    ------
    ValueError
        If a parameter is out of range or the graph does not fit.

    Notes
    -----
    1. The steps start equal in the angle of the nodes, so the high-pass filter starts near
       1 + (2 / pi) arcsin(lambda - 1), which is within 0.22 of lambda; high and low sum to
       ``init_low + init_high`` where nothing was trained.
    2. A step that relu has cut to 0 gets no gradient and stays, as published; so does
       ``init_high=0`` with ``learn_ends``.
    3. Self-loops are removed, as from PyG's Laplacian, and an isolated node has the middle
       frequency 1. Edge weights get no gradient.

    References
    ----------
    .. [1] Chen, Lei, Wei. PolyGCL: Graph Contrastive Learning via Learnable Spectral
       Polynomial Filters. ICLR 2024.

    Examples
    --------
    Two joined nodes have the frequencies 0 (their mean) and 2 (their difference):

    >>> import torch
    >>> from posterity.graphs import PolynomialFilter
    >>> edge_index = torch.tensor([[0, 1], [1, 0]])
    >>> filters = PolynomialFilter(K=1)
    >>> filters.values(highpass=True).detach()
    tensor([0., 2.])
    >>> high, low = filters.both(torch.tensor([[1.0], [1.0]]), edge_index)
    >>> high.detach().flatten() + low.detach().flatten()
    tensor([2., 2.])
    """

    table: Tensor

    def __init__(
        self,
        K: int = 10,
        *,
        init_low: float = 2.0,
        init_high: float = 0.0,
        value_range: float = 2.0,
        learn_ends: bool = False,
        nonnegative: bool = False,
        max_elements: int = 2**27,
    ) -> None:
        super().__init__()
        self.K = integer("K", K, 1)
        at_least("init_low", init_low, 0)
        at_least("init_high", init_high, 0)
        at_least("value_range", value_range, 0)
        self.learn_ends, self.nonnegative = learn_ends, nonnegative
        self.max_elements = integer("max_elements", max_elements, 0)
        self.initial_val_low = nn.Parameter(torch.tensor(float(init_low)), requires_grad=learn_ends)
        self.temp_low = nn.Parameter(torch.full((K,), value_range / K))
        self.temp_high = nn.Parameter(torch.full((K,), value_range / K))
        self.initial_val_high = nn.Parameter(torch.tensor(float(init_high)), requires_grad=learn_ends)
        self.register_buffer("table", _interpolation(K).to(wide(self.temp_low)), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "PolynomialFilter":
        super()._apply(fn, recurse)
        with torch.inference_mode(False):  # training may follow
            # cast up it would keep its rounding, cast down it would get one
            self.table = _interpolation(self.K).to(wide(self.temp_low.detach()))
        return self

    def values(self, *, highpass: bool) -> Float[Tensor, " points"]:
        """Return the filter's values at the nodes, in ascending frequency.

        Parameters
        ----------
        highpass : bool
            Which of the two filters.

        Returns
        -------
        Tensor
            Shape (K + 1,), at the frequencies ``1 + cos((K - j + 1/2) pi / (K + 1))``.
        """
        return self._values(highpass).to(self.temp_low.dtype)

    def _values(self, highpass: bool) -> Tensor:
        start, temp = (
            (self.initial_val_high, self.temp_high) if highpass else (self.initial_val_low, self.temp_low)
        )
        start, temp = wide(start), wide(temp)
        if self.learn_ends:
            start = start.relu()
        steps = F.pad(temp.relu().cumsum(0), (1, 0))
        values = start + steps if highpass else start - steps
        return values.relu() if self.nonnegative and not highpass else values

    def coefficients(self, *, highpass: bool) -> Float[Tensor, " points"]:
        """Return the Chebyshev coefficients c_k of equation 1.

        Parameters
        ----------
        highpass : bool
            Which of the two filters.

        Returns
        -------
        Tensor
            Shape (K + 1,), as ``numpy.polynomial.chebyshev.chebval`` takes them.
        """
        return _product(self.table, self._values(highpass)).to(self.temp_low.dtype)

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        *,
        highpass: bool = True,
    ) -> Float[Tensor, "nodes features"]:
        """Return the features after one of the filters."""
        edge_index = _check_weighted(x, edge_index, edge_weight)
        return self._filter(x, _Laplacian(x, edge_index, edge_weight), (highpass,))[0]

    def both(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> tuple[Float[Tensor, "nodes features"], Float[Tensor, "nodes features"]]:
        """Return the features after either filter, for the work of one.

        Parameters
        ----------
        x : Tensor of shape (nodes, features)
            Features.
        edge_index : Tensor of shape (2, edges)
            Edges.
        edge_weight : Tensor of shape (edges,), optional
            Their weights, at least 0.

        Returns
        -------
        high, low : Tensor
            Of the shape of ``x``.
        """
        edge_index = _check_weighted(x, edge_index, edge_weight)
        high, low = self._filter(x, _Laplacian(x, edge_index, edge_weight), (True, False))
        return high, low

    @uncompiled
    def _filter(self, x: Tensor, graph: "_Laplacian", which: Sequence[bool]) -> Tensor:
        rows = torch.stack([_product(self.table, self._values(highpass)) for highpass in which])
        features = wide(x)
        out = _ChebyshevSeries.apply(features, rows.to(features.dtype), graph, self.max_elements)
        return out.to(x.dtype)  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        return f"K={self.K}, learn_ends={self.learn_ends}, nonnegative={self.nonnegative}"


class _Laplacian:
    """M = L - I = -D^-1/2 A D^-1/2, sparse by receiver; by sender once a gradient asks for it."""

    def __init__(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> None:
        self.n = len(x)
        self.sender, self.receiver = edge_index
        dtype = torch.promote_types(x.dtype, torch.float32)
        ones = torch.ones(edge_index.shape[1], dtype=dtype, device=x.device)
        weight = ones if edge_weight is None else edge_weight.detach().to(ones)
        weight = torch.where(self.sender == self.receiver, 0.0, weight)  # self-loops do not count
        degree = ones.new_zeros(self.n).index_add(0, self.sender, weight)
        scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
        self.weight = -scale[self.sender] * weight * scale[self.receiver]
        self.matrix = adjacency(self.sender, self.receiver, self.weight, self.n)

    @cached_property
    def transposed(self) -> Tensor:
        return adjacency(self.receiver, self.sender, self.weight, self.n)


class _ChebyshevSeries(torch.autograd.Function):
    """Sums over k of c_k T_k(M) x for several rows of coefficients c: (rows, nodes, features).

    All are in float32 at least, and outside autocast, which may be on in the backward pass alone.
    The terms do not depend on c, so they are computed once for all rows. The gradient to c
    is their product with the gradient; that to x is a series in the transposed M, by
    Clenshaw's recurrence.
    """

    @staticmethod
    @widened
    def forward(ctx: Any, x: Tensor, rows: Tensor, graph: _Laplacian, max_elements: int) -> Tensor:
        x = x.detach().contiguous()
        K = rows.shape[1] - 1
        ctx.graph, ctx.stacked = graph, x.numel() * (K + 1) <= max_elements
        if ctx.stacked:
            terms = x.new_empty(K + 1, *x.shape)
            for _ in _terms(x, graph.matrix, K, out=terms):
                pass
            ctx.save_for_backward(rows, terms)
            return (rows @ terms.flatten(1)).unflatten(1, x.shape)
        ctx.save_for_backward(rows, x)
        total = x.new_zeros(len(rows), *x.shape)
        for k, term in enumerate(_terms(x, graph.matrix, K)):
            for row, sum_ in zip(rows, total, strict=True):
                sum_.addcmul_(row[k], term)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    @widened
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, kept = ctx.saved_tensors
        K = rows.shape[1] - 1
        to_x, to_rows = None, None
        flat = gradient.flatten(1)
        if ctx.needs_input_grad[1]:
            if ctx.stacked:
                to_rows = flat @ kept.flatten(1).T
            else:
                to_rows = torch.stack([flat @ t.flatten() for t in _terms(kept, ctx.graph.matrix, K)], 1)
        if ctx.needs_input_grad[0]:
            M = ctx.graph.transposed
            after, now = torch.zeros_like(gradient[0]), torch.zeros_like(gradient[0])
            for k in range(K, 0, -1):
                own = torch.tensordot(rows[:, k], gradient, 1) - after
                after, now = now, torch.addmm(own, M, now, alpha=2)
            to_x = torch.addmm(torch.tensordot(rows[:, 0], gradient, 1) - after, M, now)
        return to_x, to_rows, None, None


def _terms(x: Tensor, M: Tensor, K: int, out: Tensor | None = None) -> Iterator[Tensor]:
    """Yield T_0(M) x to T_K(M) x, written to ``out`` where that is given."""
    place: Any = [None] * (K + 1) if out is None else out
    before = x if out is None else out[0].copy_(x)
    yield before
    now = torch.mm(M, x, out=place[1])
    yield now
    for k in range(2, K + 1):
        before, now = now, torch.addmm(before, M, now, beta=-1, alpha=2, out=place[k])
        yield now


@widened
def _product(table: Tensor, values: Tensor) -> Tensor:
    return table @ values


def _interpolation(K: int) -> Tensor:
    """Return what maps values at ascending Chebyshev nodes to coefficients, in float64."""
    k = torch.arange(K + 1, dtype=torch.float64)
    table = 2 / (K + 1) * torch.cos(k[:, None] * (K - k + 0.5) * math.pi / (K + 1))  # T_k(cos a) = cos k a
    table[0] /= 2
    return table


def _check_weighted(x: Any, edge_index: Any, edge_weight: Any) -> Tensor:
    edge_index = check_graph(x, edge_index, edge_weight)
    if edge_weight is None:
        return edge_index
    if edge_weight.requires_grad:
        raise ValueError("edge_weight must not require a gradient, which this filter does not give it")
    if edge_weight.device.type == "cpu" and edge_weight.numel() and not bool((edge_weight >= 0).all()):
        raise ValueError(f"edge_weight must be at least 0, got {float(edge_weight.min()):g}")
    return edge_index
