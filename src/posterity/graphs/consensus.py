"""Do the nodes of an Allen-Cahn flow become alike: their energy, a bound, the growth of differences.

The Dirichlet energy, (1/N) sum over edges of w ||x_i - x_j||^2, is 0 once all nodes are alike.
`trapping_radius` bounds the states of `ACMPConv` for ever. Around consensus at the bottom of
a well, x = +-sqrt(b), a small difference e between nodes follows

    de/dt = -alpha L e - 2 delta b e,    L = diag(row sums) - (a - beta),              (1)

so that it grows where repulsion outweighs the well, and there nodes do not become alike.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigs
from torch import Tensor

from posterity._checks import finite
from posterity._precision import wide, widened
from posterity.graphs._graph import check_graph
from posterity.graphs.acmp import ACMPConv

__all__ = ["consensus_growth_rate", "dirichlet_energy", "trapping_radius"]

DENSE = 3_000  # nodes up to which all eigenvalues are computed
KRYLOV = 40  # vectors that the iteration keeps beyond


@widened
def dirichlet_energy(
    x: Float[Tensor, "nodes channels"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
) -> Float[Tensor, ""]:
    """Return (1/N) times the sum over listed edges of w ||x_i - x_j||^2: 0 once nodes are alike.

    Parameters
    ----------
    x : Tensor of shape (nodes, channels)
        States.
    edge_index : Tensor of shape (2, edges)
        Edges; one that is listed both ways counts twice.
    edge_weight : Tensor of shape (edges,), optional
        Their weights.

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    ValueError
        If the arguments do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import dirichlet_energy
    >>> dirichlet_energy(torch.tensor([[0.0], [3.0]]), torch.tensor([[0, 1], [1, 0]]))
    tensor(9.)
    """
    edge_index = check_graph(x, edge_index, edge_weight)
    gap = (x[edge_index[0]] - x[edge_index[1]]).square().sum(1)
    return (gap if edge_weight is None else gap * edge_weight.to(gap)).sum() / max(len(x), 1)


def trapping_radius(
    conv: ACMPConv,
    x: Float[Tensor, "nodes channels"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
) -> Float[Tensor, " channels"]:
    """Return R for each channel: the state never leaves max(R, max |x|) and ends within R.

    Where |x_i| is largest, attraction pulls inward and repulsion pushes outward at most at
    the rate alpha k |x_i|, k = max_i 2 sum_{j != i} (beta - a_ij)_+, so that the well wins
    beyond R = sqrt(b + (alpha k)_+ / delta). For "operator", k is the largest
    sum_{j != i} |a_ij - beta| + a_ii - beta - 1. With a source, alpha k gains
    |source_weight|, and R bounds the way only: the end may lie anywhere within
    max(R, max |x|).

    Parameters
    ----------
    conv : ACMPConv
        The layer.
    x : Tensor of shape (nodes, channels)
        The state at time 0.
    edge_index : Tensor of shape (2, edges)
        Edges.
    edge_weight : Tensor of shape (edges,), optional
        Their weights.

    Returns
    -------
    Tensor
        Shape (channels,); infinity without a well.

    Raises
    ------
    ValueError
        If the graph does not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import ACMPConv, trapping_radius
    >>> x, edge_index = torch.ones(2, 1), torch.tensor([[0, 1], [1, 0]])
    >>> trapping_radius(ACMPConv(1, beta=0.6, delta_init=0.5), x, edge_index)  # sqrt(1 + 2 * 0.1)
    tensor([1.0954])
    """
    edge_index = check_graph(x, edge_index, edge_weight, conv.channels)
    if not len(x):
        raise ValueError("x must have at least one node, got 0")
    with torch.no_grad():
        alpha, delta = conv._rates()
        if delta is None:
            return x.new_full((conv.channels,), math.inf)
        graph, forces = conv._forces(x, edge_index, edge_weight)
        if conv.interaction == "difference":
            push = torch.where(graph.loop, 0.0, 2 * (-forces).relu())
        else:
            push = torch.where(graph.loop, forces, forces.abs())
        k = push.new_zeros(len(x)).index_add(0, graph.pattern.receiver, push).amax()
        outward = alpha * (k if conv.interaction == "difference" else k - 1)
        if conv.source:
            outward = outward + wide(conv.source_weight).abs()
        return (conv.barrier + outward.relu() / delta).sqrt().to(x.dtype)


def consensus_growth_rate(
    conv: ACMPConv,
    x: Float[Tensor, "nodes channels"],
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None = None,
) -> Float[Tensor, " channels"]:
    """Return the rate at which a small difference between nodes grows around consensus.

    Around x = +-sqrt(b), perturbations orthogonal to constants follow -alpha L - 2 delta b,
    L = diag(row sums) - (a - beta). The rate is -alpha m - 2 delta b, m the smallest real
    part of the eigenvalues of L on that complement. Positive: nodes do not become alike from
    generic data. Negative: nearly alike nodes become alike. (Without a well, -alpha m.)

    Parameters
    ----------
    conv : ACMPConv
        A layer with ``interaction="difference"`` and no source.
    x : Tensor of shape (nodes, channels)
        The state from which "transformer" computes coefficients; at least two nodes.
    edge_index : Tensor of shape (2, edges)
        Edges of a connected graph.
    edge_weight : Tensor of shape (edges,), optional
        Their weights.

    Returns
    -------
    Tensor
        Shape (channels,). Up to 3,000 nodes from all eigenvalues, else by Arnoldi iteration.

    Raises
    ------
    ValueError
        If the layer or the graph is of another kind, or they do not fit.

    Examples
    --------
    Two nodes with a = 1/2 repel at beta 0.6: L has the eigenvalue 2 (0.5 - 0.6).

    >>> import torch
    >>> from posterity.graphs import ACMPConv, consensus_growth_rate
    >>> conv = ACMPConv(1, beta=0.6, alpha_init=0.5, delta_init=0.01)
    >>> consensus_growth_rate(conv, torch.ones(2, 1), torch.tensor([[0, 1], [1, 0]]))
    tensor([0.0800])
    """
    if conv.interaction != "difference" or conv.source:
        raise ValueError(
            'conv must have interaction "difference" and no source, '
            f"got {conv.interaction!r} and source={conv.source}"
        )
    edge_index = check_graph(x, edge_index, edge_weight, conv.channels)
    n = len(x)
    with torch.no_grad():
        operator = conv._operator(x, edge_index, edge_weight)
        entries = finite("x and edge_weight", operator.weight).double().cpu().numpy()
        where = operator.pattern.receiver.cpu().numpy(), operator.pattern.sender.cpu().numpy()
        parts, _ = connected_components(sparse.coo_array((np.ones(len(entries)), where), (n, n)), False)
        if n < 2 or parts > 1:
            raise ValueError(f"edge_index must connect all nodes, at least 2, got {n} in {parts} parts")
        m = _smallest(sparse.coo_array((-entries, where), (n, n)).tocsr(), n)
        alpha, delta = conv._rates()
        return (-alpha * m if delta is None else -alpha * m - 2 * delta * conv.barrier).to(x.dtype)


def _smallest(L: sparse.csr_array, n: int) -> float:
    """Return the smallest real part of the eigenvalues of L but for that of the constants, 0."""
    far = 1 + abs(L).sum(1).max()  # beyond the spectrum; L + far 11^T / n moves only the constants there
    if n <= DENSE:
        dense = L.toarray() + far / n
        if np.allclose(dense, dense.T, rtol=0, atol=1e-12 * far):
            return float(np.linalg.eigvalsh(dense)[0])
        return float(np.linalg.eigvals(dense).real.min())
    moved = LinearOperator((n, n), matvec=lambda v: L @ v + far * v.mean(), dtype=np.float64)
    start = np.random.default_rng(0).normal(size=n)
    found = eigs(
        moved, 1, which="SR", v0=start, ncv=KRYLOV, maxiter=50 * n, tol=1e-9, return_eigenvectors=False
    )
    return float(found[0].real)
