"""SignNet: a network on eigenvectors that no choice of sign can change.

An eigensolver returns v or -v, at random. A network that must not depend on that choice adds
what it makes of either,

    f(v_1, ..., v_k) = rho( [phi(v_i) + phi(-v_i)]_i ).                                  (1)

phi(v) + phi(-v) is even in v, and every continuous even function can be written so. What no
choice of basis of a repeated eigenvalue's space can change is `BasisNet`.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posterity._checks import has_shape, integer, one_of, within
from posterity._precision import wide
from posterity.graphs._graph import check_batch, check_edges
from posterity.graphs._sparse import Adjacency, edge_pattern, times
from posterity.graphs.laplacian import _check_eigs

__all__ = ["SignNet"]


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
        edge_index = check_edges(edge_index, n)
        if batch is not None:
            graphs = None if eigvals.ndim == 1 else len(eigvals)
            batch = check_batch(batch, n, graphs, source="eigvecs", of="eigvals")
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
        near = None
        if self.kind == "gin":
            sender, receiver = edge_index
            near = Adjacency(edge_pattern(sender, receiver, len(h)), h.new_ones(len(sender)))
        for i, layer in enumerate(self.layers):
            if near is not None:
                z = layer(_Aggregate.apply(h.flatten(1), 1 + self.eps[i], near).view_as(h))
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
    def forward(ctx: Any, x: Tensor, scale: Tensor, adjacency: Adjacency) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.adjacency = adjacency
        rows = wide(x)
        return times(adjacency.matrix, rows).addcmul_(rows, wide(scale)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, scale = ctx.saved_tensors
        to_x, gradient = None, wide(gradient)
        if ctx.needs_input_grad[0]:
            to_x = times(ctx.adjacency.transposed, gradient).addcmul_(gradient, wide(scale)).to(x.dtype)
        return to_x, torch.dot(gradient.reshape(-1), wide(x).reshape(-1)).to(scale.dtype), None


def _normalise(norm: nn.Module, h: Tensor, keep: Tensor | None) -> Tensor:
    """Apply a norm to (nodes, signals, channels); batch statistics leave out what is masked."""
    if not isinstance(norm, nn.BatchNorm1d):
        return norm(h)
    if keep is None or not norm.training:
        return norm(h.flatten(0, 1)).view_as(h)
    # Weighted sums and no boolean index, whose size an accelerator would have to report first.
    dtype, h, keep = h.dtype, wide(h), wide(keep)
    count = keep.sum().clamp_min(1)
    mean = (h * keep).sum((0, 1)) / count
    var = ((h - mean).square() * keep).sum((0, 1)) / count
    with torch.no_grad():
        momentum = norm.momentum or 0.0
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, seen in (
            (norm.running_mean, mean), (norm.running_var, var * count / (count - 1).clamp_min(1))
        ):  # fmt: skip
            running.lerp_(seen.to(running.dtype), momentum)  # type: ignore[union-attr, operator]
    return ((h - mean) * (norm.weight * (var + norm.eps).rsqrt()) + norm.bias).to(dtype)


def _graph_mean(h: Tensor, batch: Tensor | None, graphs: int) -> Tensor:
    """Return the mean over the nodes of each graph, (graphs, signals, channels)."""
    if batch is None:
        return h.mean(0, keepdim=True)
    count, rows = torch.bincount(batch, minlength=graphs).clamp_min(1), wide(h)
    total = rows.new_zeros(graphs, *h.shape[1:]).index_add(0, batch, rows)
    return (total / count[:, None, None]).to(h.dtype)


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
