"""The Laplacian eigenvectors of a graph, and which of them share an eigenspace.

They solve L v = lambda v for L = I - D^(-1/2) A D^(-1/2) or D - A. Small eigenvalues have
eigenvectors that vary slowly along edges, which is what makes them positions of nodes. Each is
given up to its sign, and those of one eigenvalue up to a rotation of their eigenspace.
"""

import copy
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, needs, one_of, within
from posterity._precision import wide
from posterity.graphs._graph import check_edges

__all__ = ["AddLaplacianEigs", "eigenspaces", "laplacian_eigs"]


@torch.no_grad()
def laplacian_eigs(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, k: int | None = None, *,
    edge_weight: Float[Tensor, " edges"] | None = None, normalization: Literal["sym"] | None = "sym",
    method: Literal["auto", "dense", "sparse"] = "auto",
) -> tuple[Float[Tensor, " k"], Float[Tensor, "nodes k"]]:  # fmt: skip
    """Return the smallest eigenvalues of a graph's Laplacian, and orthonormal eigenvectors.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges; listed one way or both, they count as undirected. Self-loops are ignored.
    num_nodes : int
        How many nodes.
    k : int, optional
        How many eigenvalues, from 1 to ``num_nodes``, counted from the smallest with the
        trivial one; by default all.
    edge_weight : Tensor of shape (edges,), optional
        Weights, at least 0; by default 1. Of a pair listed more than once, in whichever
        direction, the largest counts.
    normalization : {"sym"} or None, default="sym"
        I - D^(-1/2) A D^(-1/2), with a row of zeros for an isolated node, or D - A.
    method : {"auto", "dense", "sparse"}, default="auto"
        A full decomposition or, for ``k < num_nodes``, shift-and-invert Lanczos; "auto" is
        dense for up to 2,000 nodes or more than a quarter of all eigenvalues.

    Returns
    -------
    tuple of Tensor
        Eigenvalues of shape (k,), ascending, and eigenvectors of shape (nodes, k). They are
        solved for in float64 and returned in the dtype of ``edge_weight``, or without it in
        torch's default dtype; without a gradient.

    Raises
    ------
    ValueError
        If ``k`` is out of range, a weight negative, or the edges do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import laplacian_eigs
    >>> triangle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> laplacian_eigs(triangle, 3, normalization=None)[0].round(decimals=4)
    tensor([0., 3., 3.])
    """
    n = integer("num_nodes", num_nodes, 1)
    k = n if k is None else integer("k", k, 1)
    if k > n:
        raise ValueError(f"k must be at most the number of nodes, {n}, got {k}")
    one_of("normalization", normalization, ("sym", None))
    if one_of("method", method, ("auto", "dense", "sparse")) == "sparse" and k == n:
        raise ValueError(f'k must be less than the number of nodes, {n}, for method="sparse", got {k}')
    edge_index = check_edges(edge_index, n, read=True)
    weight = np.ones(edge_index.shape[1])
    if edge_weight is not None:
        weight = _check_weight("edge_weight", edge_weight, edge_index).double().cpu().numpy()

    ends = edge_index.cpu().numpy()
    keep = ends[0] != ends[1]
    pairs, inverse = np.unique(np.sort(ends[:, keep], axis=0), axis=1, return_inverse=True)
    largest = np.zeros(pairs.shape[1])
    np.maximum.at(largest, inverse.ravel(), weight[keep])
    # In units of a power of two near the largest weight, which no entry is rounded by, the
    # shift below is small beside the eigenvalues and not beside rounding.
    unit = np.exp2(np.floor(np.log2(largest.max(initial=0)))) if largest.any() else 1.0
    half = coo_array((largest / unit, (pairs[0], pairs[1])), shape=(n, n)).tocsc()
    adjacency = half + half.T
    degree = np.asarray(adjacency.sum(axis=0)).ravel()
    if normalization == "sym":
        root = np.divide(1.0, np.sqrt(degree), out=np.zeros(n), where=degree > 0)
        scale = diags_array(root)
        laplacian = diags_array((degree > 0).astype(float)) - scale @ adjacency @ scale
    else:
        laplacian = diags_array(degree) - adjacency

    if method == "dense" or (method == "auto" and (n <= 2000 or 4 * k > n)):
        matrix = torch.from_numpy(laplacian.toarray()).to(edge_index.device)
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[:k], vectors[:, :k]
    else:
        # The shift below zero makes the matrix positive definite; the start is fixed, so that
        # two calls agree.
        start = np.random.default_rng(0).standard_normal(n)
        found = eigsh(laplacian.tocsc(), k=k, sigma=-1e-3, which="LM", v0=start)
        order = found[0].argsort()
        values, vectors = (
            torch.from_numpy(a).to(edge_index.device) for a in (found[0][order], found[1][:, order])
        )
    values = values.clamp_min(0) * (1.0 if normalization else unit)  # rounding goes below 0
    dtype = torch.get_default_dtype() if edge_weight is None else edge_weight.dtype
    return values.to(dtype), vectors.to(dtype).contiguous()


class AddLaplacianEigs:
    """PyG transform: write a graph's Laplacian eigenvectors beside it, ready for batches.

    ``data.eigvecs`` of shape (nodes, k), ``data.eigvals`` and ``data.eig_mask`` of shape
    (1, k); graphs of fewer than k nodes are padded with zeros, where the mask is False.
    PyG's batches stack them to what `SignNet` takes. ``data.edge_weight`` is used if there.

    Parameters
    ----------
    k : int
        How many eigenvectors, the trivial one included.
    normalization : {"sym"} or None, default="sym"
        As for `laplacian_eigs`.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.data import Data
    >>> from posterity.graphs import AddLaplacianEigs
    >>> pair = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
    >>> AddLaplacianEigs(3)(pair).eig_mask
    tensor([[ True,  True, False]])
    """

    def __init__(self, k: int, *, normalization: Literal["sym"] | None = "sym") -> None:
        self.k = integer("k", k, 1)
        self.normalization: Literal["sym"] | None = one_of("normalization", normalization, ("sym", None))
        # A virtual subclass, so that the module loads without PyG.
        needs("torch_geometric.transforms", "graphs").BaseTransform.register(type(self))

    def __call__(self, data: Any) -> Any:
        """Return a shallow copy of ``data`` with eigenvectors, eigenvalues and mask.

        Parameters
        ----------
        data : torch_geometric.data.Data
            A graph.

        Returns
        -------
        torch_geometric.data.Data
            The copy.
        """
        return self.forward(copy.copy(data))

    def forward(self, data: Any) -> Any:
        """Return ``data`` itself with eigenvectors, eigenvalues and mask.

        Parameters
        ----------
        data : torch_geometric.data.Data
            A graph; written to.

        Returns
        -------
        torch_geometric.data.Data
            The same object.
        """
        n, weight = integer("data.num_nodes", int(data.num_nodes), 1), data.get("edge_weight")
        edge_index = check_edges(data.edge_index, n, name="data.edge_index", read=True)
        if weight is not None:
            _check_weight("data.edge_weight", weight, edge_index)
        values, vectors = laplacian_eigs(
            edge_index, n, min(self.k, n), edge_weight=weight, normalization=self.normalization
        )
        missing = self.k - len(values)
        data.eigvecs = F.pad(vectors, (0, missing))
        data.eigvals = F.pad(values, (0, missing))[None]
        data.eig_mask = (torch.arange(self.k, device=values.device) < n)[None]
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.k}, normalization={self.normalization!r})"


def eigenspaces(eigvals: Float[Tensor, " k"], *, tol: float = 1e-5) -> Int[Tensor, " k"]:
    """Return the eigenspace that each eigenvector belongs to.

    Parameters
    ----------
    eigvals : Tensor of shape (k,)
        Eigenvalues in ascending order.
    tol : float, default=1e-5
        A new eigenspace starts where the gap to the eigenvalue before exceeds this, and one
        rounding of its dtype; at least 0.

    Returns
    -------
    Tensor
        Ids of shape (k,) that start at 0 and never decrease.

    Raises
    ------
    ValueError
        If ``eigvals`` is no ascending vector or ``tol`` negative.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import eigenspaces
    >>> eigenspaces(torch.tensor([0.0, 0.5, 0.5, 1.5]))
    tensor([0, 1, 1, 2])
    """
    within("tol", tol, 0, float("inf"))
    has_shape("eigvals", floating("eigvals", eigvals), (None,))
    values = wide(eigvals)
    gaps, least = values.diff(), (torch.finfo(eigvals.dtype).eps * values[1:].abs()).clamp_min(tol)
    if eigvals.device.type == "cpu" and not bool((gaps >= -least).all()):  # NaN is neither
        raise ValueError("eigvals must be in ascending order and not NaN")
    return F.pad((gaps > least).long(), (1, 0)).cumsum(0)[: len(eigvals)]


def _check_weight(name: str, edge_weight: Any, edge_index: Tensor) -> Tensor:
    has_shape(name, finite(name, floating(name, edge_weight)), (edge_index.shape[1],), "the edges")
    if bool((edge_weight < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {float(edge_weight.min())}")
    return edge_weight


def _check_eigs(eigvecs: Any, eigvals: Any, k: int) -> None:
    has_shape("eigvecs", floating("eigvecs", eigvecs), (None, k), "this network")
    floating("eigvals", eigvals)
    if eigvals.ndim not in (1, 2) or eigvals.shape[-1] != k:
        raise ValueError(
            f"eigvals must have shape ({k}) or (graphs, {k}) for eigvecs, got {tuple(eigvals.shape)}"
        )
    if eigvecs.device.type == "cpu":
        finite("eigvecs", eigvecs)
