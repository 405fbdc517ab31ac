"""SignNet and BasisNet: networks on eigenvectors that no choice of sign or basis can change.

An eigensolver returns v or -v, and of a repeated eigenvalue any orthonormal basis V of its
eigenspace. A network that must not depend on that choice is built from parts that do not:

    SignNet:   f(v_1, ..., v_k) = rho( [phi(v_i) + phi(-v_i)]_i ),                       (1)
    BasisNet:  f(V_1, ..., V_l) = rho( [phi_{d_j}(V_j V_j^T)]_j ).                       (2)

phi(v) + phi(-v) is even in v, and every continuous even function can be written so;
V V^T, the projector onto the eigenspace, is the same for every basis V Q of it.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, needs, one_of, within
from posterity.graphs._graph import adjacency, check_edges

__all__ = [
    "AddLaplacianEigs",
    "BasisNet",
    "Equivariant1to1",
    "Equivariant2to1",
    "SignNet",
    "eigenspaces",
    "ign_2to1",
    "laplacian_eigs",
]


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
    check_edges(edge_index, n)
    weight = np.ones(edge_index.shape[1])
    if edge_weight is not None:
        has_shape("edge_weight", floating("edge_weight", edge_weight), (edge_index.shape[1],), "edge_index")
        weight = finite("edge_weight", edge_weight).double().cpu().numpy()
        if (weight < 0).any():
            raise ValueError(f"edge_weight must be at least 0, got {weight.min()}")

    ends = edge_index.cpu().numpy()
    keep = ends[0] != ends[1]
    pairs, inverse = np.unique(np.sort(ends[:, keep], axis=0), axis=1, return_inverse=True)
    largest = np.zeros(pairs.shape[1])
    np.maximum.at(largest, inverse.ravel(), weight[keep])
    half = coo_array((largest, (pairs[0], pairs[1])), shape=(n, n)).tocsc()
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
    dtype = torch.get_default_dtype() if edge_weight is None else edge_weight.dtype
    return values.clamp_min(0).to(dtype), vectors.to(dtype).contiguous()  # rounding goes below 0


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
        n = int(data.num_nodes)
        values, vectors = laplacian_eigs(
            data.edge_index,
            n,
            min(self.k, n),
            edge_weight=data.get("edge_weight"),
            normalization=self.normalization,
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
        A new eigenspace starts where the gap to the eigenvalue before exceeds this; at least 0.

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
    gaps = eigvals.diff()
    if eigvals.device.type == "cpu" and not bool((gaps >= -tol).all()):  # NaN is neither
        raise ValueError("eigvals must be in ascending order and not NaN")
    return F.pad((gaps > tol).long(), (1, 0)).cumsum(0)[: len(eigvals)]


class SignNet(nn.Module):
    """Sign-invariant network on eigenvectors, equation 1: an encoding for each node.

    One phi is shared by all eigenvectors; rho combines the k results of each node. Flipping
    any eigenvector leaves the output as it is, in training mode too: phi sees v and -v in
    one call, so that batch statistics are those of both.

    SignNet is *not* invariant to another basis of a repeated eigenvalue (cycles, grids and
    other symmetric graphs have many): use `BasisNet` there.

    Parameters
    ----------
    k : int
        How many eigenvectors.
    hidden_channels : int
        Width of phi and rho.
    out_channels : int
        Width of the encoding.
    phi : {"gin", "deepsets", "mlp"} or nn.Module, default="gin"
        Message passing along the edges; sums with the mean over the nodes of the graph; or
        each entry alone. A module is called as ``phi(v, edge_index, batch)`` with v of shape
        (nodes, 2k, 1) and returns (nodes, 2k, hidden_channels).
    num_layers : int, default=3
        Layers of phi.
    rho : {"mlp", "sum", "transformer"} or nn.Module, default="mlp"
        An MLP of the k results side by side; of their sum, which fits any k; or of the sum
        behind a transformer over them. A module gets (nodes, k * hidden_channels), with
        ``use_eigvals`` k columns more, and returns (nodes, out_channels).
    rho_layers : int, default=2
        Linear layers of the MLP, or transformer layers before an MLP of two.
    use_eigvals : bool, default=True
        Whether rho sees the eigenvalues.
    norm : {"batch", "layer"} or None, default="batch"
        Normalisation in phi; batch statistics are taken over what the mask keeps.
    num_heads : int, default=4
        Heads of the transformer; they divide ``hidden_channels``.
    dropout : float, default=0.0
        In rho only, where the signs are gone: in [0, 1).

    Attributes
    ----------
    phi, rho : nn.Module
        The two networks.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.

    Notes
    -----
    1. The official code calls phi once on v and once on -v: with batch norm, the flip of
       one eigenvector then changes the output in training mode.
    2. With a cut through an eigenspace (k between its first and last index), even the span
       of the eigenvectors is arbitrary.
    3. In the sum of "sum", which eigenvalue belongs to which eigenvector is lost.
    4. Values inside tensors (NaN, order of ``batch``) are checked on the CPU only.

    References
    ----------
    .. [1] Lim et al. Sign and Basis Invariant Networks for Spectral Graph Representation
       Learning. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import SignNet, laplacian_eigs
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> eigvals, eigvecs = laplacian_eigs(path, 3)
    >>> net = SignNet(3, 16, 8)
    >>> signs = torch.tensor([1.0, -1.0, -1.0])
    >>> encoding, flipped = net(eigvecs, eigvals, path), net(eigvecs * signs, eigvals, path)
    >>> bool(torch.allclose(encoding, flipped, atol=1e-5))
    True
    """

    def __init__(
        self, k: int, hidden_channels: int, out_channels: int, *,
        phi: Literal["gin", "deepsets", "mlp"] | nn.Module = "gin", num_layers: int = 3,
        rho: Literal["mlp", "sum", "transformer"] | nn.Module = "mlp", rho_layers: int = 2,
        use_eigvals: bool = True, norm: Literal["batch", "layer"] | None = "batch", num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k = integer("k", k, 1)
        self.hidden_channels = hidden = integer("hidden_channels", hidden_channels, 1)
        self.out_channels = out = integer("out_channels", out_channels, 1)
        integer("num_layers", num_layers, 1)
        integer("rho_layers", rho_layers, 1)
        integer("num_heads", num_heads, 1)
        one_of("norm", norm, ("batch", "layer", None))
        within("dropout", dropout, 0, 1, open_high=True)
        self.use_eigvals = use_eigvals
        if not isinstance(phi, nn.Module):
            phi_kind = one_of("phi", phi, ("gin", "deepsets", "mlp"))
            phi = _Phi(phi_kind, hidden, num_layers, norm)
        self.phi = phi
        if isinstance(rho, nn.Module):
            self.rho = rho
        elif one_of("rho", rho, ("mlp", "sum", "transformer")) == "mlp":
            self.rho = _mlp(k * (hidden + use_eigvals), hidden, out, rho_layers, dropout)
        else:
            if rho == "transformer" and hidden % num_heads:
                raise ValueError(
                    f"hidden_channels must be divisible by num_heads, got {hidden} and {num_heads}"
                )
            self.rho = _SumRho(hidden, out, rho == "transformer", rho_layers, use_eigvals, num_heads, dropout)

    def forward(
        self,
        eigvecs: Float[Tensor, "nodes k"],
        eigvals: Float[Tensor, "*graphs k"],
        edge_index: Int[Tensor, "2 edges"],
        batch: Int[Tensor, " nodes"] | None = None,
        mask: Bool[Tensor, "*graphs k"] | None = None,
    ) -> Float[Tensor, "nodes out"]:
        """Return the encoding of each node.

        Parameters
        ----------
        eigvecs : Tensor of shape (nodes, k)
            Eigenvectors, in ascending order of eigenvalue.
        eigvals : Tensor of shape (k,) or (graphs, k)
            Eigenvalues.
        edge_index : Tensor of shape (2, edges)
            Edges, which only "gin" uses; an undirected graph lists both directions.
        batch : Tensor of shape (nodes,), optional
            The graph of each node, sorted; by default all are of one.
        mask : Tensor like ``eigvals``, optional
            False where a graph of fewer than k nodes is padded.

        Returns
        -------
        Tensor
            Shape (nodes, out_channels).
        """
        n = len(eigvecs)
        _check_eigs(eigvecs, eigvals, self.k)
        check_edges(edge_index, n)
        if batch is not None:
            _check_batch(batch, n, None if eigvals.ndim == 1 else len(eigvals))
        elif eigvals.ndim == 2 and len(eigvals) != 1:
            raise ValueError(f"eigvals must have one row where batch is not given, got {len(eigvals)}")
        keep = None
        if mask is not None:
            has_shape("mask", mask, eigvals.shape, "eigvals")
            keep = _per_node(mask.bool(), batch, n)[..., None].to(eigvecs.dtype)  # (n, k, 1)
            eigvecs = eigvecs * keep[..., 0]
        # v and -v go through phi as 2k signals of one call: batch statistics are even in v.
        both = torch.cat([eigvecs, -eigvecs], 1)[..., None]
        if isinstance(self.phi, _Phi):
            graphs = len(eigvals) if eigvals.ndim == 2 or batch is None or not n else int(batch[-1]) + 1
            h = self.phi(both, edge_index, batch, graphs, None if keep is None else keep.repeat(1, 2, 1))
        else:
            h = self.phi(both, edge_index, batch)
            has_shape("phi(v, edge_index, batch)", h, (n, 2 * self.k, self.hidden_channels), "this network")
        h = h[:, : self.k] + h[:, self.k :]
        if keep is not None:
            h = h * keep
        values = _per_node(eigvals.to(h.dtype), batch, n)  # (n, k)
        if isinstance(self.rho, _SumRho):
            return self.rho(h, values, keep)
        flat = h.flatten(1)
        if self.use_eigvals:
            flat = torch.cat([flat, values if keep is None else values * keep[..., 0]], 1)
        return has_shape("rho", self.rho(flat), (n, self.out_channels), "this network")


class BasisNet(nn.Module):
    """Basis-invariant network on eigenspaces, equation 2: an encoding for each node of one graph.

    phi_d maps the projector V V^T of an eigenspace of dimension d to d channels a node:
    `Equivariant2to1`, two `Equivariant1to1`, an MLP. The projector, of nodes^2 numbers, is
    never built: what the first layer needs of it are sums over the columns of V.

    Parameters
    ----------
    multiplicities : sequence of int
        Dimensions of the eigenspaces in ascending order of eigenvalue; their sum is k.
    hidden_channels : int
        Width of phi and rho.
    out_channels : int
        Width of the encoding.
    shared : bool, default=False
        Whether the dimensions share one phi, each with a linear map of its own at the end,
        or each has its own phi.
    use_eigvals : bool, default=True
        Whether rho sees the eigenvalues.
    tol : float, default=1e-5
        What `eigenspaces` tells eigenvalues apart by.

    Raises
    ------
    ValueError
        If a parameter is out of range, the input does not fit, or the eigenvalues have
        other multiplicities.

    Notes
    -----
    1. The official script reshapes phi's output (eigenspaces, d, nodes) to (nodes,
       eigenspaces * d) without moving the axes, which mixes nodes; here they are moved.
    2. All k eigenvectors must make whole eigenspaces; a cut one has no projector of its own.
    3. Where all nodes look alike (cycles, tori), batch norm in training mode has no variance
       to divide by and blows up rounding; in evaluation mode it does not.
    4. Values inside tensors (NaN, multiplicities) are checked on the CPU only.

    References
    ----------
    .. [1] Lim et al. Sign and Basis Invariant Networks for Spectral Graph Representation
       Learning. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import BasisNet, laplacian_eigs
    >>> square = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    >>> eigvals, eigvecs = laplacian_eigs(square, 4)
    >>> BasisNet([1, 2, 1], 16, 8)(eigvecs, eigvals).shape
    torch.Size([4, 8])
    """

    group: Tensor
    column: Tensor

    def __init__(
        self, multiplicities: Sequence[int], hidden_channels: int, out_channels: int, *, shared: bool = False,
        use_eigvals: bool = True, tol: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.multiplicities = [integer("multiplicities", d, 1) for d in multiplicities]
        if not self.multiplicities:
            raise ValueError("multiplicities must name at least one eigenspace, got none")
        hidden = integer("hidden_channels", hidden_channels, 1)
        integer("out_channels", out_channels, 1)
        self.use_eigvals = use_eigvals
        self.tol = within("tol", tol, 0, float("inf"))
        sizes = torch.tensor(self.multiplicities)
        self.k = int(sizes.sum())
        self.dims = sorted(set(self.multiplicities))
        self.members = {d: [j for j, e in enumerate(self.multiplicities) if e == d] for d in self.dims}
        self.register_buffer("group", torch.arange(len(sizes)).repeat_interleave(sizes), persistent=False)
        # phi's channels come dimension by dimension; where each eigenvector's stands among them
        starts = (sizes.cumsum(0) - sizes).tolist()
        order = [starts[j] + c for d in self.dims for j in self.members[d] for c in range(d)]
        self.register_buffer("column", torch.tensor(order).argsort(), persistent=False)
        if shared:
            self.trunk: nn.Module | None = _Projector(hidden, 1)
            self.heads = nn.ModuleList(nn.Linear(1, d) for d in self.dims)
        else:
            self.trunk = None
            self.heads = nn.ModuleList(_Projector(hidden, d) for d in self.dims)
        self.rho = _mlp(self.k * (1 + use_eigvals), hidden, out_channels, 2, 0.0)

    def forward(
        self, eigvecs: Float[Tensor, "nodes k"], eigvals: Float[Tensor, " k"]
    ) -> Float[Tensor, "nodes out"]:
        """Return the encoding of each node.

        Parameters
        ----------
        eigvecs : Tensor of shape (nodes, k)
            Orthonormal eigenvectors, in ascending order of eigenvalue.
        eigvals : Tensor of shape (k,)
            Eigenvalues.

        Returns
        -------
        Tensor
            Shape (nodes, out_channels).
        """
        has_shape("eigvals", floating("eigvals", eigvals), (self.k,), "the multiplicities")
        _check_eigs(eigvecs, eigvals, self.k)
        if eigvals.device.type == "cpu":
            found = torch.bincount(eigenspaces(eigvals, tol=self.tol)).tolist()
            if found != self.multiplicities:
                raise ValueError(
                    f"multiplicities must be those of eigvals, {found}, got {self.multiplicities}"
                )
        n, ops = len(eigvecs), self._operations(eigvecs)
        if self.trunk is not None:
            ops = self.trunk(ops).movedim(1, 2)  # (spaces, nodes, 1)
        parts = []
        for d, head in zip(self.dims, self.heads, strict=True):
            own = head(ops[self.members[d]])  # (b, d, nodes), shared: (b, nodes, d)
            nodes_first = own.movedim(1, 0) if self.trunk is not None else own.movedim(2, 0)
            parts.append(nodes_first.reshape(n, -1))
        z = torch.cat(parts, 1)[:, self.column]
        if self.use_eigvals:
            z = torch.cat([z, eigvals.to(z.dtype).expand(n, -1)], 1)
        return self.rho(z)

    def _operations(self, eigvecs: Tensor) -> Tensor:
        """Return `ign_2to1` of every projector, (spaces, 1, 5, nodes), in O(nodes * k).

        With s = V^T 1, the diagonal of V V^T is the row sums of V * V, the sums of its rows
        and columns are V s, and its total is s . s.
        """
        V = eigvecs.T.contiguous()  # a segment sum over rows runs along memory
        k, n = V.shape
        spaces = len(self.multiplicities)
        s = V.sum(1, keepdim=True)
        diag = V.new_zeros(spaces, n).index_add(0, self.group, V * V)
        row = V.new_zeros(spaces, n).index_add(0, self.group, V * (s / n))
        total = V.new_zeros(spaces, 1).index_add(0, self.group, (s / n).square())
        trace = diag.mean(1, keepdim=True)
        return torch.stack([diag, trace.expand(-1, n), row, row, total.expand(-1, n)], 1)[:, None]


def ign_2to1(p: Float[Tensor, "batch channels n n"]) -> Float[Tensor, "batch channels 5 n"]:
    """Return the five linear maps from matrices to vectors that commute with relabelling.

    Parameters
    ----------
    p : Tensor of shape (batch, channels, n, n)
        Square matrices over the nodes.

    Returns
    -------
    Tensor
        Shape (batch, channels, 5, n): the diagonal, its mean on every node, the means of the
        rows, the means of the columns, the mean of all entries on every node.

    Raises
    ------
    ValueError
        If ``p`` is no batch of square matrices.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import ign_2to1
    >>> ign_2to1(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0]
    tensor([[1.0000, 4.0000],
            [2.5000, 2.5000],
            [1.5000, 3.5000],
            [2.0000, 3.0000],
            [2.5000, 2.5000]])
    """
    has_shape("p", floating("p", p), (None, None, None, p.shape[-1]))
    n = p.shape[-1]
    has_shape("p", p, (None, None, n, n))
    diag = p.diagonal(dim1=2, dim2=3)
    row = p.mean(3)
    trace, total = diag.mean(2, keepdim=True), row.mean(2, keepdim=True)
    return torch.stack([diag, trace.expand_as(diag), row, p.mean(2), total.expand_as(diag)], 2)


class Equivariant2to1(nn.Module):
    """Linear layer from matrices to vectors over the nodes: any mix of `ign_2to1`.

    Parameters
    ----------
    in_channels : int
        Matrices in.
    out_channels : int
        Vectors out.

    Attributes
    ----------
    coeffs : nn.Parameter
        Shape (in_channels, out_channels, 5).
    bias : nn.Parameter
        Shape (1, out_channels, 1).

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coeffs, self.bias = _equivariant(in_channels, out_channels, 5)

    def forward(self, p: Float[Tensor, "batch n_in n n"]) -> Float[Tensor, "batch n_out n"]:
        """Return the vectors.

        Parameters
        ----------
        p : Tensor of shape (batch, in_channels, n, n)
            Square matrices over the nodes.

        Returns
        -------
        Tensor
            Shape (batch, out_channels, n).
        """
        has_shape("p", floating("p", p), (None, len(self.coeffs), None, None), "this layer")
        return self._mix(ign_2to1(p))

    def _mix(self, ops: Tensor) -> Tensor:
        """Return sum over channels and maps of coeffs * ops, plus bias."""
        weight = self.coeffs.movedim(1, 0).flatten(1)  # (out, in * 5)
        return _mix_channels(weight, ops.flatten(1, 2), self.bias)


class Equivariant1to1(nn.Module):
    """Linear layer from vectors to vectors over the nodes: of each node, and of their mean.

    Parameters
    ----------
    in_channels : int
        Vectors in.
    out_channels : int
        Vectors out.

    Attributes
    ----------
    coeffs : nn.Parameter
        Shape (in_channels, out_channels, 2): for the identity and for the mean.
    bias : nn.Parameter
        Shape (1, out_channels, 1).

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coeffs, self.bias = _equivariant(in_channels, out_channels, 2)

    def forward(self, x: Float[Tensor, "batch n_in n"]) -> Float[Tensor, "batch n_out n"]:
        """Return the vectors.

        Parameters
        ----------
        x : Tensor of shape (batch, in_channels, n)
            Vectors over the nodes.

        Returns
        -------
        Tensor
            Shape (batch, out_channels, n).
        """
        has_shape("x", floating("x", x), (None, len(self.coeffs), None), "this layer")
        own, mean = self.coeffs.movedim(1, 0).unbind(2)  # (out, in)
        return _mix_channels(own, x, _mix_channels(mean, x.mean(2, keepdim=True), self.bias))


def _mix_channels(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Return weight @ x + bias on (b, in, n); a broadcast ``@`` would copy x to turn its axes."""
    return torch.baddbmm(bias, weight.expand(len(x), -1, -1), x)


def _equivariant(in_channels: int, out_channels: int, basis: int) -> tuple[nn.Parameter, nn.Parameter]:
    n_in, n_out = integer("in_channels", in_channels, 1), integer("out_channels", out_channels, 1)
    std = 2**0.5 / (n_in + n_out)
    return nn.Parameter(std * torch.randn(n_in, n_out, basis)), nn.Parameter(torch.zeros(1, n_out, 1))


class _Projector(nn.Module):
    """phi_d behind the five maps of the projector: (b, 1, 5, nodes) to (b, out, nodes)."""

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        self.first = Equivariant2to1(1, hidden)
        self.layers = nn.ModuleList(Equivariant1to1(hidden, hidden) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(3))
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, out)

    def forward(self, ops: Tensor) -> Tensor:
        h = self.norms[0](self.first._mix(ops).relu_())
        for layer, norm in zip(self.layers, list(self.norms)[1:], strict=True):
            h = norm(layer(h).relu_())
        h = _mix_channels(self.inner.weight, h, self.inner.bias[:, None]).relu_()
        return _mix_channels(self.outer.weight, h, self.outer.bias[:, None])


class _Phi(nn.Module):
    """The built-in phi: layers on (nodes, signals, channels), every signal apart."""

    def __init__(self, kind: str, hidden: int, num_layers: int, norm: str | None) -> None:
        super().__init__()
        self.kind = kind
        widths = [1] + [hidden] * num_layers
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        gin = kind == "gin"
        self.layers = nn.ModuleList(_mlp(a, b, b, 2) if gin else nn.Linear(a, b) for a, b in pairs)
        # "gin" normalises behind each layer, the others between layers
        make = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, None: nn.Identity}[norm]
        self.norms = nn.ModuleList(make(hidden) for _ in range(num_layers if gin else num_layers - 1))
        if gin:
            self.eps = nn.Parameter(torch.zeros(num_layers))
        elif kind == "deepsets":
            self.means = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)

    def forward(
        self, h: Tensor, edge_index: Tensor, batch: Tensor | None, graphs: int, keep: Tensor | None
    ) -> Tensor:
        near = _neighbours(edge_index, h) if self.kind == "gin" else None
        for i, layer in enumerate(self.layers):
            if near is not None:
                z = layer(_Aggregate.apply(h.flatten(1), 1 + self.eps[i], *near).view_as(h))
                z = _normalise(self.norms[i], z, keep).relu_()
                h = h + z if i else z
            else:
                z = layer(h)
                if self.kind == "deepsets":
                    mean = self.means[i](_graph_mean(h, batch, graphs))
                    z = z + (mean if batch is None else mean[batch])
                h = _normalise(self.norms[i], z.relu_(), keep) if i < len(self.norms) else z
            if keep is not None:
                h = h * keep
        return h


class _SumRho(nn.Module):
    """rho on the masked sum over eigenvectors, with a transformer over them before it or not."""

    def __init__(
        self, hidden: int, out: int, transformer: bool, rho_layers: int, use_eigvals: bool, num_heads: int,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = _mlp(1, hidden, hidden, 2) if use_eigvals else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, num_heads, 2 * hidden, dropout, batch_first=True, norm_first=True
            )
            for _ in range(rho_layers if transformer else 0)
        )
        self.norm = nn.LayerNorm(hidden) if transformer else nn.Identity()
        self.mlp = _mlp(hidden, hidden, out, 2 if transformer else rho_layers, dropout)

    def forward(self, h: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
        if self.embed is not None:
            h = h + self.embed(values[..., None])
        hidden = None if keep is None else keep[..., 0] == 0
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=hidden)
        h = self.norm(h)
        if keep is not None:
            h = torch.where(keep > 0, h, 0.0)
        return self.mlp(h.sum(1))


class _Aggregate(torch.autograd.Function):
    """scale * x plus the sum over senders, by CSR; the gradient by the transposed CSR."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.transposed = transposed
        return _product(matrix, x).addcmul_(x, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = _product(ctx.transposed, gradient).addcmul_(gradient, scale)
        return to_x, torch.dot(gradient.reshape(-1), x.reshape(-1)), None, None


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix @ x if matrix.values().numel() else torch.zeros_like(x)


def _neighbours(edge_index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the adjacency by receiver and by sender, as CSR."""
    (sender, receiver), n = edge_index, len(like)
    ones = like.new_ones(len(sender))
    return adjacency(sender, receiver, ones, n), adjacency(receiver, sender, ones, n)


def _normalise(norm: nn.Module, h: Tensor, keep: Tensor | None) -> Tensor:
    """Apply a norm to (nodes, signals, channels); batch statistics leave out what is masked."""
    if not isinstance(norm, nn.BatchNorm1d):
        return norm(h)
    if keep is None or not norm.training:
        return norm(h.flatten(0, 1)).view_as(h)
    # Weighted sums and no boolean index, whose size an accelerator would have to report first.
    count = keep.sum().clamp_min(1)
    mean = (h * keep).sum((0, 1)) / count
    var = ((h - mean).square() * keep).sum((0, 1)) / count
    with torch.no_grad():
        momentum = norm.momentum or 0.0
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        norm.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
        norm.running_var.lerp_(var * count / (count - 1).clamp_min(1), momentum)  # type: ignore[union-attr]
    return (h - mean) * (norm.weight * (var + norm.eps).rsqrt()) + norm.bias


def _graph_mean(h: Tensor, batch: Tensor | None, graphs: int) -> Tensor:
    """Return the mean over the nodes of each graph, (graphs, signals, channels)."""
    if batch is None:
        return h.mean(0, keepdim=True)
    count = torch.bincount(batch, minlength=graphs).clamp_min(1)
    return h.new_zeros(graphs, *h.shape[1:]).index_add(0, batch, h) / count[:, None, None]


def _mlp(n_in: int, hidden: int, out: int, n_layers: int, dropout: float = 0.0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(n_layers - 1):
        layers += [nn.Linear(hidden if i else n_in, hidden), nn.ReLU(inplace=True)]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(hidden if n_layers > 1 else n_in, out))


def _per_node(values: Tensor, batch: Tensor | None, n: int) -> Tensor:
    """Return the (graphs, k) or (k,) values of each node's graph, (nodes, k)."""
    if values.ndim == 2 and batch is not None:
        return values[batch]
    return values.reshape(1, -1).expand(n, -1)


def _check_eigs(eigvecs: Any, eigvals: Any, k: int) -> None:
    has_shape("eigvecs", floating("eigvecs", eigvecs), (None, k), "this network")
    floating("eigvals", eigvals)
    if eigvals.ndim not in (1, 2) or eigvals.shape[-1] != k:
        raise ValueError(
            f"eigvals must have shape ({k}) or (graphs, {k}) for eigvecs, got {tuple(eigvals.shape)}"
        )
    if eigvecs.device.type == "cpu":
        finite("eigvecs", eigvecs)


def _check_batch(batch: Any, n: int, graphs: int | None) -> None:
    has_shape("batch", batch, (n,), "eigvecs")
    if batch.device.type == "cpu" and n:
        if bool((batch.diff() < 0).any()) or int(batch[0]) < 0:
            raise ValueError("batch must be sorted and at least 0")
        if graphs is not None and int(batch[-1]) >= graphs:
            raise ValueError(
                f"batch must name graphs in 0..{graphs - 1}, the rows of eigvals, got {int(batch[-1])}"
            )
