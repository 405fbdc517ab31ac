"""Solvers of linear costs over discrete sets, for a whole batch, as functions of the costs alone.

Each name makes a solver: a callable that maps costs c, an instance a row, to the indicators of

    argmin_{y in Y} <c, y>                                                    (1)

in the shape and dtype of the costs, without gradient: a tensor gives a tensor, an array an array.
`posterity.optimization.CombinatorialLayer` makes them trainable. A batch of grids, or of graphs, is
one graph whose parts are not joined: scipy solves it in one call.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csgraph, csr_matrix
from torch import Tensor

from posterity._checks import finite, floating, has_shape, integer, needs, one_of

__all__ = ["assignment", "grid_shortest_path", "ranking", "spanning_tree", "top_k", "travelling_salesman"]

Solver = Callable[..., Tensor | ndarray]
LARGEST_EXACT = 12  # cities: 2^11 subsets of them, each with a last one
TOGETHER, CELLS = 32, 4096  # tables, and cells of grids, at once: what stays in the cache


@dataclass(eq=False)
class _Solver:
    """A solver, and what a layer asks of it.

    Attributes
    ----------
    solve : callable
        Maps checked costs to decisions: a tensor to a tensor, or a float64 array to an array.
    fits : callable
        Raises ``ValueError`` for a shape of costs that it does not take.
    accepts : {"torch", "numpy"}
        What ``solve`` is given.
    by_instance : bool
        Whether the parts of a batch may be solved apart.
    invariant_to_shift : bool
        Whether a constant added to all costs of an instance changes nothing.
    positive : bool
        Whether negative costs are taken as 0, with one warning.
    """

    solve: Callable[[Any], Any]
    fits: Callable[[Tensor], object]
    accepts: Literal["torch", "numpy"] = "numpy"
    by_instance: bool = True
    invariant_to_shift: bool = True
    positive: bool = False
    warned: bool = False

    def __call__(self, costs: Tensor | ndarray) -> Any:
        if isinstance(costs, ndarray):
            if costs.dtype not in (np.float16, np.float32, np.float64):
                raise ValueError(f"costs must be floating-point, got dtype {costs.dtype}")
            return self(torch.from_numpy(costs.copy())).numpy()
        _with_a_batch(costs)
        self.fits(costs)
        if self.accepts == "torch":
            if costs.device.type == "cpu":
                finite("costs", costs)
            return self.solve(costs.detach())
        values = finite("costs", costs.detach()).to("cpu", torch.float64).numpy()
        # a power of two: nothing is rounded, and sums of huge costs stay finite
        largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
        values = np.ldexp(values, -np.frexp(largest)[1])
        if self.positive and (values < 0).any():
            if not self.warned:
                self.warned = True
                warnings.warn(
                    "negative costs are taken as 0: softplus keeps a network's positive", stacklevel=2
                )
            values = np.maximum(values, 0)
        return torch.from_numpy(self.solve(values)).to(costs)


def top_k(k: int) -> Solver:
    """Return the solver that chooses the k smallest costs.

    Parameters
    ----------
    k : int
        How many, from 1 to the number of costs.

    Returns
    -------
    callable
        Maps costs (batch, n) to 0 and 1, exactly k ones a row, also under ties. It works on
        tensors, on their device.

    Raises
    ------
    ValueError
        If ``k`` is less than 1; of a call, if ``costs`` do not fit or are fewer than k.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import top_k
    >>> top_k(2)(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]))
    tensor([[0., 1., 1.],
            [1., 1., 0.]])
    """
    k = integer("k", k, 1)
    return _Solver(partial(_smallest, k), partial(_at_least_k, k), accepts="torch", by_instance=False)


def ranking() -> Solver:
    """Return the solver that ranks: 0 for the largest cost, n - 1 for the smallest.

    Returns
    -------
    callable
        Maps costs (batch, n) to the ranks, a permutation of 0 to n - 1, that minimise
        ``<costs, ranks>``. It works on tensors, on their device.

    Raises
    ------
    ValueError
        Of a call, if ``costs`` do not fit, or there are more than their dtype can number: 257
        in bfloat16, 2049 in float16.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import ranking
    >>> ranking()(torch.tensor([[0.3, 0.9, 0.5]]))
    tensor([[2., 0., 1.]])
    """
    return _Solver(_ranks, _numbered, accepts="torch", by_instance=False)


def assignment() -> Solver:
    """Return the solver that gives each row a column of its own, by ``scipy.optimize.linear_sum_assignment``.

    Returns
    -------
    callable
        Maps costs (batch, r, c), r at most c, to 0 and 1 with a single one in each row and at
        most one in each column.

    Raises
    ------
    ValueError
        Of a call, if ``costs`` do not fit or there are more rows than columns.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import assignment
    >>> assignment()(torch.tensor([[[1.0, 2.0, 9.0], [1.0, 5.0, 9.0]]]))
    tensor([[[0., 1., 0.],
             [1., 0., 0.]]])
    """
    return _Solver(_assignments, _not_too_tall)


def grid_shortest_path(connectivity: Literal[4, 8] = 8) -> Solver:
    """Return the solver for the cheapest path from the top left to the bottom right of a grid.

    By ``scipy.sparse.csgraph.dijkstra``, a step having the cost of the cell that it enters.

    Parameters
    ----------
    connectivity : {4, 8}, default=8
        Whether a step may be diagonal.

    Returns
    -------
    callable
        Maps costs of the cells (batch, H, W) to 0 and 1, with ones at the cells of the path; both ends
        count. Costs are to be at least 0: negative ones are taken as 0, with one warning.

    Raises
    ------
    ValueError
        If ``connectivity`` is neither 4 nor 8; of a call, if ``costs`` do not fit.

    Notes
    -----
    Paths differ in length, so the projections "mean" and "std" would change the problem.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import grid_shortest_path
    >>> costs = torch.tensor([[[1.0, 9.0, 1.0], [1.0, 9.0, 1.0], [1.0, 1.0, 1.0]]])
    >>> grid_shortest_path(4)(costs)
    tensor([[[1., 0., 0.],
             [1., 0., 0.],
             [1., 1., 1.]]])
    >>> grid_shortest_path(8)(costs)
    tensor([[[1., 0., 0.],
             [1., 0., 0.],
             [0., 1., 1.]]])
    """
    one_of("connectivity", connectivity, (4, 8))
    return _Solver(
        partial(_paths, connectivity),
        partial(has_shape, "costs", shape=(None,) * 3),
        invariant_to_shift=False,
        positive=True,
    )


def spanning_tree(edge_index: Int[Tensor, "2 edges"], n_nodes: int) -> Solver:
    """Return the solver for the cheapest tree that joins all nodes of a graph.

    By ``scipy.sparse.csgraph.minimum_spanning_tree``, on the ranks of the costs: only they decide.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Both ends of each edge, from 0; edges have no direction. Of parallel edges the cheapest
        counts, and a loop is in no tree.
    n_nodes : int
        At least 1; the edges must connect them all.

    Returns
    -------
    callable
        Maps costs (batch, edges) to 0 and 1, with ones at the ``n_nodes - 1`` edges of the tree.

    Raises
    ------
    ValueError
        If ``edge_index`` does not fit ``n_nodes`` or leaves the graph in parts; of a call, if
        ``costs`` do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import spanning_tree
    >>> triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> spanning_tree(triangle, 3)(torch.tensor([[-1.0, 5.0, 0.0]]))
    tensor([[1., 0., 1.]])
    """
    n_nodes = integer("n_nodes", n_nodes, 1)
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int64, torch.int32):
        came = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise ValueError(f"edge_index must be a tensor of integers, got {came}")
    has_shape("edge_index", edge_index, (2, None))
    ends = np.sort(edge_index.cpu().numpy().astype(np.int64), axis=0)
    n_edges = ends.shape[1]
    if not n_edges:
        raise ValueError("edge_index must have at least one edge, got none")
    if ends.min() < 0 or ends.max() >= n_nodes:
        raise ValueError(
            f"edge_index must be in 0..{n_nodes - 1}, got values from {ends.min()} to {ends.max()}"
        )
    links, link = np.unique(ends[0] * n_nodes + ends[1], return_inverse=True)
    low, high = links // n_nodes, links % n_nodes
    parts = n_nodes - n_edges  # at least; counted where there may be one
    if parts < 2:
        joined = csr_matrix((np.ones(len(links)), (low, high)), shape=(n_nodes, n_nodes))
        parts = csgraph.connected_components(joined, directed=False)[0]
    if parts > 1:
        raise ValueError(f"edge_index must connect all n_nodes = {n_nodes}, got {parts} parts or more")
    solve = partial(_trees, n_nodes, link, low, high)
    return _Solver(solve, partial(has_shape, "costs", shape=(None, n_edges), source="edge_index"))


def travelling_salesman(method: Literal["auto", "exact", "ortools"] = "auto") -> Solver:
    """Return the solver for the shortest round trip through all cities.

    Parameters
    ----------
    method : {"auto", "exact", "ortools"}, default="auto"
        "exact" is Held and Karp's, for at most 12 cities; "ortools" a heuristic, the path of
        cheapest arcs and local search until nothing improves it; "auto" is exact up to 12.

    Returns
    -------
    callable
        Maps costs (batch, n, n), n at least 3, to symmetric 0 and 1, with ones at the n edges
        of the trip, both ways. An edge costs the mean of both directions; the diagonal is ignored.

    Raises
    ------
    ValueError
        If ``method`` is unknown; of a call, if ``costs`` do not fit, or are of more than 12
        cities for "exact".
    ModuleNotFoundError
        If OR-tools is wanted and not installed.

    References
    ----------
    .. [1] Held, Karp. A Dynamic Programming Approach to Sequencing Problems. SIAM 1962.

    Examples
    --------
    Four corners of a square: the trip goes round it.

    >>> import torch
    >>> from posterity.optimization import travelling_salesman
    >>> corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> travelling_salesman()(torch.cdist(corners, corners)[None])
    tensor([[[0., 1., 0., 1.],
             [1., 0., 1., 0.],
             [0., 1., 0., 1.],
             [1., 0., 1., 0.]]])
    """
    one_of("method", method, ("auto", "exact", "ortools"))
    return _Solver(partial(_trips, method), partial(_cities, method))


def _with_a_batch(costs: Tensor) -> None:
    floating("costs", costs)
    if costs.ndim < 2 or not costs.numel():
        raise ValueError(f"costs must have a batch axis, another axis and entries, got {tuple(costs.shape)}")


# --- subsets and ranks, on tensors; assignments ---


def _at_least_k(k: int, costs: Tensor) -> None:
    has_shape("costs", costs, (None, None))
    if k > costs.shape[1]:
        raise ValueError(f"k must be at most the number of costs, {costs.shape[1]}, got {k}")


def _smallest(k: int, costs: Tensor) -> Tensor:
    return torch.zeros_like(costs).scatter_(1, costs.topk(k, dim=1, largest=False, sorted=False).indices, 1.0)


def _numbered(costs: Tensor) -> None:
    has_shape("costs", costs, (None, None))
    most = int(2 / torch.finfo(costs.dtype).eps) + 1
    if costs.shape[1] > most:
        dtype = str(costs.dtype).removeprefix("torch.")
        raise ValueError(f"costs must be at most {most} to be numbered in {dtype}, got {costs.shape[1]}")


def _ranks(costs: Tensor) -> Tensor:
    ranks = torch.arange(costs.shape[1], dtype=costs.dtype, device=costs.device)
    order = costs.argsort(dim=1, descending=True)
    return torch.empty_like(costs).scatter_(1, order, ranks.expand_as(costs))


def _not_too_tall(costs: Tensor) -> None:
    r, c = has_shape("costs", costs, (None, None, None)).shape[1:]
    if r > c:
        raise ValueError(f"costs must have at most as many rows as columns, got {r} rows and {c} columns")


def _assignments(costs: ndarray) -> ndarray:
    decisions = np.zeros_like(costs)
    for instance, decision in zip(costs, decisions, strict=True):
        decision[linear_sum_assignment(instance)] = 1
    return decisions


# --- paths and trees ---


@lru_cache(maxsize=32)
def _grid(height: int, width: int, connectivity: int) -> tuple[ndarray, ndarray]:
    """Return the edges of a grid in CSR's order: indptr, and the cell that each enters."""
    cells = np.arange(height * width).reshape(height, width)
    padded = np.pad(cells, 1, constant_values=-1)
    steps = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    steps = [(i, j) for i, j in steps if connectivity == 8 or 1 in (i, j)]
    enters = np.stack([padded[i : i + height, j : j + width] for i, j in steps], -1).reshape(-1, len(steps))
    inside = enters >= 0
    return np.append(0, inside.sum(1).cumsum()), enters[inside]


def _side_by_side(indptr: ndarray, indices: ndarray, data: ndarray) -> csr_matrix:
    """Return graphs of one structure and the weights ``data`` (batch, edges) as one graph."""
    batch, n, n_edges = len(data), len(indptr) - 1, len(indices)
    copies = np.arange(batch)[:, None]
    starts = np.append(0, (indptr[1:] + n_edges * copies).ravel())
    return csr_matrix((data.ravel(), (indices + n * copies).ravel(), starts), shape=(batch * n, batch * n))


def _in_parts(solve: Callable[[ndarray], ndarray], costs: ndarray, size: int) -> ndarray:
    return np.concatenate([solve(costs[start : start + size]) for start in range(0, len(costs), size)])


def _paths(connectivity: int, costs: ndarray) -> ndarray:
    return _in_parts(partial(_shortest_paths, connectivity), costs, max(1, CELLS // costs[0].size))


def _shortest_paths(connectivity: int, costs: ndarray) -> ndarray:
    batch, height, width = costs.shape
    n = height * width
    indptr, enters = _grid(height, width, connectivity)
    graph = _side_by_side(indptr, enters, costs.reshape(batch, n)[:, enters])
    first = n * np.arange(batch)
    _, before, _ = csgraph.dijkstra(graph, indices=first, return_predecessors=True, min_only=True)
    decisions, cell = np.zeros(batch * n), first + n - 1
    decisions[cell] = 1
    while (cell != first).any():
        cell = np.where(cell == first, cell, before[cell])
        decisions[cell] = 1
    return decisions.reshape(costs.shape)


def _trees(n_nodes: int, link: ndarray, low: ndarray, high: ndarray, costs: ndarray) -> ndarray:
    """Span graphs whose edge e joins the nodes low and high of link[e]."""
    batch, n_edges = costs.shape
    order = costs.argsort(axis=1, kind="stable")
    # the ranks decide, no rank is 0, which scipy takes for no edge, and each names its instance and edge
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(1, batch * n_edges + 1).reshape(batch, n_edges), axis=1)
    best = np.full(batch * len(low), np.iinfo(rank.dtype).max)  # rank of the cheapest of parallel edges
    np.minimum.at(best, (link + len(low) * np.arange(batch)[:, None]).ravel(), rank.ravel())
    indptr = np.append(0, np.bincount(low, minlength=n_nodes).cumsum())
    tree = csgraph.minimum_spanning_tree(_side_by_side(indptr, high, best.reshape(batch, -1).astype(float)))
    instance, place = np.divmod(tree.data.astype(np.int64) - 1, n_edges)
    decisions = np.zeros_like(costs)
    decisions[instance, order[instance, place]] = 1
    return decisions


# --- round trips ---


def _cities(method: str, costs: Tensor) -> None:
    n, m = has_shape("costs", costs, (None, None, None)).shape[1:]
    if n != m or n < 3:
        raise ValueError(f"costs must be square matrices of at least 3 cities, got {n} x {m}")
    if method == "exact" and n > LARGEST_EXACT:
        raise ValueError(f"costs must be of at most {LARGEST_EXACT} cities for method 'exact', got {n}")


def _trips(method: str, costs: ndarray) -> ndarray:
    batch, n, _ = costs.shape
    lengths = costs / 2 + costs.transpose(0, 2, 1) / 2
    if n > LARGEST_EXACT or method == "ortools":
        trips = np.array([_by_routing(instance) for instance in lengths])
    else:
        trips = _in_parts(_held_karp, lengths, TOGETHER)
    decisions, rows = np.zeros_like(costs), np.arange(batch)[:, None]
    after = np.roll(trips, -1, axis=1)
    decisions[rows, trips, after] = decisions[rows, after, trips] = 1
    return decisions


def _held_karp(lengths: ndarray) -> ndarray:
    """Return shortest trips (batch, n) from city 0, by the best way through each set to each last city.

    ``best[s, j, b]`` is the length of the shortest path of instance b from city 0 through the cities of
    the bit set s, that ends in j, one of them; cities are numbered without the first.
    """
    batch, n, _ = lengths.shape
    m, everyone = n - 1, np.arange(batch)
    step = lengths[:, 1:, 1:].transpose(1, 2, 0)
    home = lengths[:, 0, 1:].T
    sets = np.arange(2**m)
    best = np.full((2**m, m, batch), np.inf)
    best[2 ** np.arange(m), np.arange(m)] = home
    for size in range(1, m):
        these = sets[np.bitwise_count(sets) == size]
        for j in range(m):
            without = these[these >> j & 1 == 0]
            best[without | 1 << j, j] = (best[without] + step[:, j]).min(1)
    left = np.full(batch, 2**m - 1)
    last = (best[-1] + home).argmin(0)
    trips = np.zeros((batch, n), dtype=np.int64)
    for place in range(m, 0, -1):
        trips[:, place] = last + 1
        left ^= 1 << last
        if place > 1:
            last = (best[left, :, everyone] + step[:, last, everyone].T).argmin(1)
    return trips


def _by_routing(lengths: ndarray) -> list[int]:
    """Return a short trip from city 0, by OR-tools' local search."""
    routing = needs("ortools.constraint_solver.pywrapcp", "optimization")
    names = needs("ortools.constraint_solver.routing_enums_pb2", "optimization")
    n = len(lengths)
    between = lengths[~np.eye(n, dtype=bool)]
    spread = np.ptp(between)
    whole = (lengths - between.min()) * ((2**31 if spread else 0) / (spread or 1))  # it takes integers
    np.fill_diagonal(whole, 0)
    manager = routing.RoutingIndexManager(n, 1, 0)
    model = routing.RoutingModel(manager)
    model.SetArcCostEvaluatorOfAllVehicles(model.RegisterTransitMatrix(whole.round().astype(int).tolist()))
    search = routing.DefaultRoutingSearchParameters()
    search.first_solution_strategy = names.FirstSolutionStrategy.PATH_CHEAPEST_ARC
    search.local_search_metaheuristic = names.LocalSearchMetaheuristic.GREEDY_DESCENT
    solution = model.SolveWithParameters(search)
    trip, place = [], model.Start(0)
    while not model.IsEnd(place):
        trip.append(manager.IndexToNode(place))
        place = solution.Value(model.NextVar(place))
    return trip
