"""Standard networks as they should be built, to compare with what is made for heterophily.

Any aggregation over neighbours, in residual blocks with normalisation and feed-forward parts,

    x <- x + module(norm(x)),                                                        (1)

in SAGE and where a name ends in "-sep" with a node's own features kept apart from its
neighbours': where unlike nodes connect, mixing the two is what plain networks lose by. The
measures of homophily, the search for leaked duplicates, the protocol of training and a
generator of graphs have files of their own.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide, widened
from posterity.graphs._graph import check_edges
from posterity.graphs._sparse import (
    Adjacency,
    EdgePattern,
    copies,
    edge_dots,
    edge_pattern,
    gcn_adjacency,
    normalised,
    one_self_loop,
    sparse_product,
)

__all__ = ["HeterophilyGNN", "adjacency_features", "sgc_features"]

Model = Literal["ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"]


class HeterophilyGNN(nn.Module):
    """A standard network as it should be built: residual blocks, normalisation, feed-forward parts.

    ``x <- x + module(norm(x))``, where the module is a feed-forward network of two maps,
    fed by the node alone ("ResNet"), by an aggregation over neighbours ("GCN", "GAT", "GT"),
    or by the node and its neighbours side by side ("SAGE", "GAT-sep", "GT-sep").

    Parameters
    ----------
    in_channels, hidden_channels, out_channels : int
        Features of a node, width of its state, outputs.
    model : {"ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"}, default="SAGE"
        The module: none, symmetric normalised sum, mean, graph attention, transformer.
    num_layers : int, default=2
        Modules; "GT" and "GT-sep" follow each by a feed-forward block of its own.
    hidden_multiplier : float, default=1.0
        Width inside the feed-forward networks, as a multiple of ``hidden_channels``.
    num_heads : int, default=8
        Attention heads, a divisor of ``hidden_channels``; for GAT and GT only.
    norm : {"layer", "batch"} or None, default="layer"
        Normalisation before each module and before the output.
    dropout : float, default=0.2
        After each map but the last.

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``x`` and ``edge_index`` do not fit.

    Notes
    -----
    1. The names in ``state_dict`` are those of the published code, whose weights load.
    2. Self-loops are dropped; "GCN", "GAT" and "GT" then add one a node.
    3. In "GT" the sender gives the query, as in the published code. Its query bias moves all
       scores of a receiver alike and has no effect.
    4. The GCN normalises by incoming edges; on an undirected graph there is no difference.

    References
    ----------
    .. [1] Platonov et al. A critical look at the evaluation of GNNs under heterophily. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import HeterophilyGNN
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> HeterophilyGNN(4, 16, 3, model="GAT-sep")(torch.randn(3, 4), edge_index).shape
    torch.Size([3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        model: Model = "SAGE",
        num_layers: int = 2,
        hidden_multiplier: float = 1.0,
        num_heads: int = 8,
        norm: Literal["layer", "batch"] | None = "layer",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        width = integer("hidden_channels", hidden_channels, 1)
        integer("out_channels", out_channels, 1)
        self.model = one_of("model", model, ("ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"))
        integer("num_layers", num_layers, 1)
        inner = int(width * at_least("hidden_multiplier", hidden_multiplier, 1 / width))
        self.num_heads = integer("num_heads", num_heads, 1) if model.startswith("G") and model != "GCN" else 1
        if width % self.num_heads:
            raise ValueError(
                f"hidden_channels must be a multiple of num_heads, got {width} and {self.num_heads}"
            )
        one_of("norm", norm, ("layer", "batch", None))
        within("dropout", dropout, 0, 1, open_high=True)
        norms: dict[str | None, Callable[[int], nn.Module]] = {
            "layer": nn.LayerNorm,
            "batch": nn.BatchNorm1d,
            None: nn.Identity,
        }
        apart = model == "SAGE" or model.endswith("-sep")

        def modules() -> list[nn.Module]:
            forward = _FeedForward(width * (2 if apart else 1), inner, width, dropout)
            if model == "ResNet":
                return [forward]
            if model in ("GCN", "SAGE"):
                return [_Convolution(forward, apart)]
            if model.startswith("GAT"):
                return [_Attention(forward, width, num_heads, apart)]
            return [
                _Transformer(width, num_heads, dropout, apart),
                _FeedForward(width, inner, width, dropout),
            ]

        self.input_linear = nn.Linear(in_channels, width)
        self.dropout = nn.Dropout(dropout)
        self.residual_modules = nn.ModuleList(
            _Residual(norms[norm](width), module) for _ in range(num_layers) for module in modules()
        )
        self.output_normalization = norms[norm](width)
        self.output_linear = nn.Linear(width, out_channels)

    def forward(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes out"]:
        """Return the outputs of each node."""
        has_shape("x", floating("x", x), (None, self.in_channels), "this network")
        edge_index = check_edges(edge_index, len(x), source="x")
        graph = None if self.model == "ResNet" else self._graph(edge_index, len(x), x.dtype)
        x = F.gelu(self.dropout(self.input_linear(x)))
        for module in self.residual_modules:
            x = module(x, graph)
        return self.output_linear(self.output_normalization(x))

    def _graph(self, edge_index: Tensor, n: int, dtype: torch.dtype) -> Adjacency | EdgePattern:
        """Return what the modules aggregate by: a matrix, or the edges of all heads, whose weights change."""
        if self.model == "GCN":
            return gcn_adjacency(edge_index, n, dtype)
        looped = self.model in ("GAT", "GT")
        ends = one_self_loop(edge_index, n) if looped else edge_index[:, edge_index[0] != edge_index[1]]
        pattern = edge_pattern(ends[0], ends[1], n, sort=True)
        if self.model != "SAGE":
            return copies(pattern, self.num_heads)
        ones = torch.ones_like(pattern.sender, dtype=dtype)
        return Adjacency(pattern, normalised(pattern.sender, pattern.receiver, ones, n, symmetric=False))


@widened
def sgc_features(
    x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *, num_props: int = 5
) -> Float[Tensor, "nodes features"]:
    """Return features averaged over the graph, which beside ``x`` turn "ResNet" into ResNet+SGC.

    Parameters
    ----------
    x : Tensor of shape (nodes, features)
        Features.
    edge_index : Tensor of shape (2, edges)
        Edges; self-loops are dropped and one a node is added.
    num_props : int, default=5
        How often to apply the symmetrically normalised sum, at least 1.

    Returns
    -------
    Tensor
        Of the shape of ``x``.

    Raises
    ------
    ValueError
        If the arguments do not fit.
    """
    has_shape("x", floating("x", x), (None, None))
    edge_index = check_edges(edge_index, len(x), source="x")
    graph = gcn_adjacency(edge_index, len(x), x.dtype)
    for _ in range(integer("num_props", num_props, 1)):
        x = sparse_product(graph, x)
    return x


def adjacency_features(edge_index: Int[Tensor, "2 edges"], num_nodes: int) -> Float[Tensor, "nodes nodes"]:
    """Return the dense adjacency, which beside ``x`` turns "ResNet" into ResNet+adj.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges; self-loops are dropped.
    num_nodes : int
        How many nodes there are.

    Returns
    -------
    Tensor
        Shape (nodes, nodes): 1 where the row's node sends to the column's, else 0.

    Raises
    ------
    ValueError
        If the arguments do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import adjacency_features
    >>> adjacency_features(torch.tensor([[0, 1], [1, 1]]), 2)
    tensor([[0., 1.],
            [0., 0.]])
    """
    edge_index = check_edges(edge_index, integer("num_nodes", num_nodes, 1), source="num_nodes", read=True)
    dense = torch.zeros(num_nodes, num_nodes, device=edge_index.device)
    dense[edge_index[0], edge_index[1]] = 1
    return dense.fill_diagonal_(0)


class _FeedForward(nn.Module):
    def __init__(self, in_channels: int, inner: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_channels, inner), nn.Linear(inner, out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        return self.dropout(self.linear_2(F.gelu(self.dropout(self.linear_1(x)))))


class _Residual(nn.Module):
    def __init__(self, normalization: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.normalization, self.module = normalization, module

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        return x + self.module(self.normalization(x), graph)


class _Convolution(nn.Module):
    """A sum over neighbours with the graph's weights; kept apart from the node's own for SAGE."""

    def __init__(self, feed_forward: nn.Module, apart: bool) -> None:
        super().__init__()
        self.feed_forward_module, self.apart = feed_forward, apart

    def forward(self, x: Tensor, graph: Adjacency) -> Tensor:
        message = sparse_product(graph, x)
        return self.feed_forward_module(torch.cat([x, message], 1) if self.apart else message, graph)


class _Attention(nn.Module):
    """Graph attention: the score of an edge is a LeakyReLU of a part for each end."""

    def __init__(self, feed_forward: nn.Module, width: int, heads: int, apart: bool) -> None:
        super().__init__()
        self.heads, self.apart = heads, apart
        self.input_linear = nn.Linear(width, width)
        self.attn_linear_u = nn.Linear(width, heads)
        self.attn_linear_v = nn.Linear(width, heads, bias=False)
        self.feed_forward_module = feed_forward

    def forward(self, x: Tensor, graph: EdgePattern) -> Tensor:
        z = self.input_linear(x)
        u, v = (wide(part(z)).T.flatten() for part in (self.attn_linear_u, self.attn_linear_v))
        scores = F.leaky_relu(u.index_select(0, graph.sender) + v.index_select(0, graph.receiver), 0.2)
        size = z.shape[1] // self.heads
        rows = z.view(len(z), size, self.heads).permute(2, 0, 1).reshape(len(u), size)  # the head is last
        message = _attend(scores, rows, graph)
        message = message.view(self.heads, len(z), size).permute(1, 2, 0).reshape(z.shape)
        return self.feed_forward_module(torch.cat([z, message], 1) if self.apart else message, graph)


class _Transformer(nn.Module):
    """Attention of transformers along edges, in which the sender gives the query."""

    def __init__(self, width: int, heads: int, dropout: float, apart: bool) -> None:
        super().__init__()
        self.heads, self.apart = heads, apart
        self.attn_query, self.attn_key, self.attn_value = (nn.Linear(width, width) for _ in range(3))
        self.output_linear = nn.Linear(width * (2 if apart else 1), width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, graph: EdgePattern) -> Tensor:
        n, width = x.shape
        size = width // self.heads
        q, k, v = (
            part(x).view(n, self.heads, size).transpose(0, 1).reshape(n * self.heads, size)
            for part in (self.attn_query, self.attn_key, self.attn_value)
        )
        scores = edge_dots(graph, wide(q) / size**0.5, k)
        message = _attend(scores, v, graph).view(self.heads, n, size).transpose(0, 1).reshape(n, width)
        return self.dropout(self.output_linear(torch.cat([x, message], 1) if self.apart else message))


def _attend(scores: Tensor, x: Tensor, graph: EdgePattern) -> Tensor:
    """Return the mean of the senders' rows under the softmax of the scores of incoming edges."""
    dtype, x = x.dtype, wide(x)
    top = scores.new_full((len(x),), -torch.inf).scatter_reduce(0, graph.receiver, scores.detach(), "amax")
    weight = (scores - top.index_select(0, graph.receiver)).exp()
    total = sparse_product(Adjacency(graph, weight), torch.cat([x, torch.ones_like(x[:, :1])], 1))
    mean = total[:, :-1] / total[:, -1:].clamp_min(1)  # the largest weight is 1; 0 where no edge comes in
    return mean.to(dtype)
