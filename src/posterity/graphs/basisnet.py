"""BasisNet: a network on eigenspaces that no choice of basis can change.

Of a repeated eigenvalue an eigensolver returns any orthonormal basis V of its eigenspace. The
projector V V^T is the same for every basis V Q of it, so a network of projectors,

    f(V_1, ..., V_l) = rho( [phi_{d_j}(V_j V_j^T)]_j ),                                  (1)

with one phi for each dimension d, is invariant. phi is made of the linear layers between
matrices and vectors over the nodes that commute with relabelling.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer, within
from posterity._precision import wide
from posterity.graphs.equivariant_layers import Equivariant1to1, Equivariant2to1, _mix_channels
from posterity.graphs.laplacian import _check_eigs, eigenspaces

__all__ = ["BasisNet"]


class BasisNet(nn.Module):
    """Basis-invariant network on eigenspaces, equation 1: an encoding for each node of one graph.

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
        self.rho = nn.Sequential(
            nn.Linear(self.k * (1 + use_eigvals), hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_channels),
        )

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
            parts.append(nodes_first.flatten(1))
        z = torch.cat(parts, 1)[:, self.column]
        if self.use_eigvals:
            z = torch.cat([z, eigvals.to(z.dtype).expand(n, -1)], 1)
        return self.rho(z)

    def _operations(self, eigvecs: Tensor) -> Tensor:
        """Return `ign_2to1` of every projector, (spaces, 1, 5, nodes), in O(nodes * k).

        With s = V^T 1, the diagonal of V V^T is the row sums of V * V, the sums of its rows
        and columns are V s, and its total is s . s.
        """
        V = wide(eigvecs).T.contiguous()  # a segment sum over rows runs along memory
        k, n = V.shape
        spaces = len(self.multiplicities)
        s = V.sum(1, keepdim=True)
        diag = V.new_zeros(spaces, n).index_add(0, self.group, V * V)
        row = V.new_zeros(spaces, n).index_add(0, self.group, V * (s / n))
        total = V.new_zeros(spaces, 1).index_add(0, self.group, (s / n).square())
        trace = diag.mean(1, keepdim=True)
        ops = torch.stack([diag, trace.expand(-1, n), row, row, total.expand(-1, n)], 1)
        return ops[:, None].to(eigvecs.dtype)


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
