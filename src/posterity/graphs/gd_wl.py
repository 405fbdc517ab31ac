"""Generalised distance Weisfeiler-Lehman: colours and a transformer that see all distances.

Refine the colour of each node by the multiset of distances and colours of *all* nodes of its
graph, not of its neighbours alone:

    c_{t+1}(u) = hash {{ (d(u, v), c_t(v)) : v in V }}.                                  (1)

With hops for d, colours tell bridges from other edges; with the resistance distance, cut
vertices from other nodes; ordinary message passing tells neither. Both lie strictly below
2-FWL. A transformer whose attention is shifted and scaled by functions of the distance,

    A = softmax(Q K' / sqrt(d) + phi_1(D)) * phi_2(D),                                   (2)

is as expressive as (1): the product is what makes it able to sum, and not only to average.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, shortest_path
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer, one_of, within
from posterity.graphs._graph import check_undirected

__all__ = [
    "Biconnectivity",
    "DistanceBias",
    "GDAttention",
    "GraphormerGD",
    "biconnectivity",
    "gd_wl_colors",
    "gd_wl_equivalent",
    "resistance_distance",
    "shortest_path_distance",
]

Distance = Literal["spd", "rd", "both"]


def resistance_distance(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, *, edge_weight: Float[Tensor, " edges"] | None = None,
    batch: Int[Tensor, " nodes"] | None = None,
) -> Float[Tensor, "*graphs n n"]:  # fmt: skip
    """Return the effective resistance of every pair of nodes.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions. Self-loops carry no current; conductances of
        repeated edges add.
    num_nodes : int
        How many nodes.
    edge_weight : Tensor, optional
        Conductances, positive and the same in both directions; by default 1.
    batch : Tensor, optional
        Sorted graph of each node; the result is then padded, ``(graphs, n_max, n_max)``.

    Returns
    -------
    Tensor
        In the default dtype (computed in float64), inf between components and on padding,
        0 on the diagonal; differentiable in ``edge_weight``.

    Raises
    ------
    ValueError
        If an edge lacks its reverse, an index is out of range or a conductance is not positive.

    References
    ----------
    .. [1] Klein, Randic. Resistance distance. Journal of Mathematical Chemistry 12, 1993.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import resistance_distance
    >>> triangle = torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]])
    >>> resistance_distance(triangle, 3)[0]
    tensor([0.0000, 0.6667, 0.6667])
    """
    layout = _Layout(edge_index, num_nodes, batch)
    out = _resistance(layout, _conductances(layout, edge_weight)).to(torch.get_default_dtype())
    return out if batch is not None else out[0]


def shortest_path_distance(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, *, batch: Int[Tensor, " nodes"] | None = None
) -> Float[Tensor, "*graphs n n"]:
    """Return the number of hops between every pair of nodes.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions.
    num_nodes : int
        How many nodes.
    batch : Tensor, optional
        Sorted graph of each node; the result is then padded, ``(graphs, n_max, n_max)``.

    Returns
    -------
    Tensor
        In the default dtype, inf where there is no path and on padding.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import shortest_path_distance
    >>> shortest_path_distance(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 4)[0]
    tensor([0., 1., 2., inf])
    """
    layout = _Layout(edge_index, num_nodes, batch)
    out = _hops(layout).to(torch.get_default_dtype())
    return out if batch is not None else out[0]


def gd_wl_colors(
    edge_index: Int[Tensor, "2 edges"], num_nodes: int, *, distance: Distance | Tensor = "rd",
    batch: Int[Tensor, " nodes"] | None = None, colors: Int[Tensor, " nodes"] | None = None,
    max_iter: int | None = None, decimals: int = 6,
) -> Int[Tensor, " nodes"]:  # fmt: skip
    """Return the stable colours of (1), comparable across the graphs of a batch.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions.
    num_nodes : int
        How many nodes.
    distance : {"spd", "rd", "both"} or Tensor, default="rd"
        Hops, resistance, the pair of them, or a symmetric matrix of one's own: for one graph
        ``(n, n)``, for a batch padded as `resistance_distance` pads; float64 is advised.
    batch : Tensor, optional
        Sorted graph of each node.
    colors : Tensor, optional
        First colours, such as labels; by default all are equal.
    max_iter : int, optional
        Most rounds; by default until no colour splits.
    decimals : int, default=6
        Distances that follow each other within ``10^-decimals`` are taken as equal.

    Returns
    -------
    Tensor
        Numbers from 0.

    References
    ----------
    .. [1] Zhang, Luo, Wang, He. Rethinking the Expressive Power of GNNs via Graph
       Biconnectivity. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import gd_wl_colors
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> gd_wl_colors(path, 3)
    tensor([1, 0, 1])
    """
    integer("decimals", decimals, 0)
    if max_iter is not None:
        integer("max_iter", max_iter, 0)
    layout = _Layout(edge_index, num_nodes, batch)
    if isinstance(distance, Tensor):
        codes = [_own_distance(distance, layout, batch is None)]
    else:
        one_of("distance", distance, ("spd", "rd", "both"))
        codes = [_hops(layout)] if distance != "rd" else []
        codes += [_resistance(layout, _conductances(layout, None))] if distance != "spd" else []
    pairs = layout.pairs
    ranks = [_ranked(code.detach().cpu().numpy(), pairs, decimals) for code in codes]
    code = ranks[0] if len(ranks) == 1 else ranks[0] * (int(ranks[1].max(initial=0)) + 1) + ranks[1]
    small = (int(code.max(initial=0)) + 1) * num_nodes < 2**31  # half the memory sorts in half the time
    code = code.astype(np.int32 if small else np.int64)
    now = np.zeros(num_nodes, np.int64)
    if colors is not None:
        now = _numbered(has_shape("colors", colors, (num_nodes,)).cpu().numpy())
    graph, place = layout.graph, layout.place
    rounds, classes = (
        max_iter if max_iter is not None else int(layout.sizes.max(initial=0)),
        now.max(initial=-1) + 1,
    )
    for _ in range(rounds):
        held = np.zeros(layout.mask.shape, code.dtype)
        held[graph, place] = now
        keys = np.where(pairs, code * code.dtype.type(classes) + held[:, None, :], code.dtype.type(-1))[
            graph, place
        ]  # (nodes, n_max)
        keys.sort(axis=1)
        refined = _numbered(
            np.ascontiguousarray(keys).view(np.dtype((np.void, keys.itemsize * keys.shape[1])))[:, 0]
        )
        if refined.max(initial=-1) + 1 == classes:
            break
        now, classes = refined, refined.max() + 1
    return torch.from_numpy(_numbered(now)).to(edge_index.device)


def gd_wl_equivalent(
    edge_index_a: Int[Tensor, "2 edges_a"], num_nodes_a: int, edge_index_b: Int[Tensor, "2 edges_b"],
    num_nodes_b: int, *, distance: Distance = "rd",
) -> bool:  # fmt: skip
    """Return whether the test cannot tell two graphs apart.

    Parameters
    ----------
    edge_index_a : Tensor
        Undirected edges of the first graph, in both directions.
    num_nodes_a : int
        How many nodes it has.
    edge_index_b : Tensor
        Edges of the second graph.
    num_nodes_b : int
        How many nodes it has.
    distance : {"spd", "rd", "both"}, default="rd"
        As for `gd_wl_colors`.

    Returns
    -------
    bool
        True for isomorphic graphs, and for those that the colours confuse.
    """
    one_of("distance", distance, ("spd", "rd", "both"))
    for edges, n in ((edge_index_a, num_nodes_a), (edge_index_b, num_nodes_b)):
        check_undirected(edges, n)
    both = torch.cat([edge_index_a, edge_index_b + num_nodes_a], 1)
    batch = torch.arange(2).repeat_interleave(torch.tensor([num_nodes_a, num_nodes_b]))
    colors = gd_wl_colors(both, num_nodes_a + num_nodes_b, distance=distance, batch=batch)
    return torch.equal(colors[:num_nodes_a].sort().values, colors[num_nodes_a:].sort().values)


@dataclass
class Biconnectivity:
    """Where a graph falls apart.

    Attributes
    ----------
    cut_vertex : Tensor of shape (nodes,), bool
        Nodes whose removal disconnects their component.
    bridge : Tensor of shape (edges,), bool
        Edges whose removal does, both directions of them.
    block : Tensor of shape (edges,), int64
        Vertex-biconnected component of each edge; -1 for a self-loop.
    edge_component : Tensor of shape (nodes,), int64
        2-edge-connected component of each node.
    bridge_tree : Tensor of shape (2, 2 * bridges)
        Its nodes are the edge components, joined by bridges.
    block_cut_tree : Tensor of shape (2, any)
        Nodes 0, 1, ... are the blocks, then come the cut vertices in increasing order.
    """

    cut_vertex: Bool[Tensor, " nodes"]
    bridge: Bool[Tensor, " edges"]
    block: Int[Tensor, " edges"]
    edge_component: Int[Tensor, " nodes"]
    bridge_tree: Int[Tensor, "2 tree_edges"]
    block_cut_tree: Int[Tensor, "2 block_edges"]


def biconnectivity(edge_index: Int[Tensor, "2 edges"], num_nodes: int) -> Biconnectivity:
    """Return cut vertices, bridges and blocks, by one depth-first search.

    Parameters
    ----------
    edge_index : Tensor
        Undirected edges in both directions; repetitions are merged, self-loops ignored.
    num_nodes : int
        How many nodes.

    Returns
    -------
    Biconnectivity
        Cut vertices, bridges, components and their trees.

    References
    ----------
    .. [1] Hopcroft, Tarjan. Efficient algorithms for graph manipulation. Communications of
       the ACM 16, 1973.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import biconnectivity
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> biconnectivity(path, 3).cut_vertex
    tensor([False,  True, False])
    """
    check_undirected(edge_index, num_nodes)
    send, receive = edge_index.cpu().numpy()
    low, high = np.minimum(send, receive), np.maximum(send, receive)
    keys, number = np.unique(low * num_nodes + high, return_inverse=True)
    low, high = keys // max(num_nodes, 1), keys % max(num_nodes, 1)
    cut, bridge, block = _search(low, high, num_nodes)
    joined = ~bridge & (low != high)
    matrix = csr_matrix((np.ones(joined.sum()), (low[joined], high[joined])), shape=(num_nodes, num_nodes))
    component = (
        connected_components(matrix, directed=False)[1].astype(np.int64)
        if num_nodes
        else np.zeros(0, np.int64)
    )
    ends = np.stack([component[low[bridge]], component[high[bridge]]])
    cuts = np.flatnonzero(cut)
    rows = np.full(num_nodes, -1)
    rows[cuts] = block.max(initial=-1) + 1 + np.arange(len(cuts))
    real = block >= 0
    pairs = np.concatenate([np.stack([block[real], rows[end[real]]]) for end in (low, high)], 1)
    pairs = np.unique(pairs[:, pairs[1] >= 0], axis=1)
    as_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(edge_index.device)  # noqa: E731
    return Biconnectivity(
        as_tensor(cut), as_tensor(bridge[number]), as_tensor(block[number]), as_tensor(component),
        as_tensor(np.concatenate([ends, ends[::-1]], 1)), as_tensor(np.concatenate([pairs, pairs[::-1]], 1)),
    )  # fmt: skip


class GDAttention(nn.Module):
    """Self-attention whose weights are shifted and scaled by functions of the distance, (2).

    Parameters
    ----------
    channels : int
        Width of states.
    num_heads : int
        Divides ``channels``.
    dropout : float, default=0.0
        Of the softmax's weights.
    relu_mul : bool, default=False
        Whether scales are cut at 0.

    References
    ----------
    .. [1] Zhang, Luo, Wang, He. Rethinking the Expressive Power of GNNs via Graph
       Biconnectivity. ICLR 2023. Section 4.2.
    """

    def __init__(
        self, channels: int, num_heads: int, *, dropout: float = 0.0, relu_mul: bool = False
    ) -> None:
        super().__init__()
        integer("channels", channels, 1)
        self.num_heads = integer("num_heads", num_heads, 1)
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels, got {num_heads} for {channels}")
        self.relu_mul = relu_mul
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(channels, channels) for _ in range(4)
        )
        self.dropout = nn.Dropout(within("dropout", dropout, 0, 1, open_high=True))

    def forward(
        self, x: Float[Tensor, "graphs n channels"], bias: Float[Tensor, "graphs heads n n"],
        mul: Float[Tensor, "graphs heads n n"], mask: Bool[Tensor, "graphs n"] | None = None,
    ) -> Float[Tensor, "graphs n channels"]:  # fmt: skip
        """Return new states.

        Parameters
        ----------
        x : Tensor
            States, padded.
        bias, mul : Tensor
            What is added to the logits, and what the softmax is multiplied by.
        mask : Tensor, optional
            True for nodes, False for padding, which nobody attends to.

        Returns
        -------
        Tensor
        """
        graphs, n, channels = x.shape
        q, k, v = (
            part(x).view(graphs, n, self.num_heads, -1).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = q @ k.mT / math.sqrt(channels / self.num_heads) + bias
        if mask is not None:  # not -inf: a graph without nodes would be NaN
            logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(x.dtype).min)
        weight = self.dropout(logits.softmax(-1)) * (mul.relu() if self.relu_mul else mul)
        if mask is not None:
            weight = weight.masked_fill(~mask[:, None, None, :], 0)
        return self.out_proj((weight @ v).transpose(1, 2).reshape(graphs, n, channels))


class DistanceBias(nn.Module):
    """Functions of hops and resistance that shift and scale attention, one a head.

    Each is an embedding of the hops plus a small network on Gaussian kernels of the
    resistance; shift and scale have parameters of their own.

    Parameters
    ----------
    num_heads : int
        Heads.
    num_kernels : int, default=128
        Gaussian kernels of the resistance, their centres and widths learned.
    max_hops : int, default=64
        Hops beyond count as this many; unreachable is one more.
    mul_init : float, default=1.0
        Where the scale of each hop starts; the official default starts near 0 and trains
        worse.
    use_spd, use_rd : bool, default=True
        Which distances are looked at, at least one.
    """

    def __init__(
        self, num_heads: int, *, num_kernels: int = 128, max_hops: int = 64, mul_init: float = 1.0,
        use_spd: bool = True, use_rd: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        integer("num_heads", num_heads, 1)
        integer("num_kernels", num_kernels, 1)
        self.max_hops = integer("max_hops", max_hops, 1)
        if not (use_spd or use_rd):
            raise ValueError("use_spd or use_rd must be True, got neither")
        self.use_spd, self.use_rd = use_spd, use_rd
        if use_spd:
            self.bias_hops, self.mul_hops = (nn.Embedding(max_hops + 2, num_heads) for _ in range(2))
            nn.init.normal_(self.bias_hops.weight, 0, 0.02)
            nn.init.constant_(self.mul_hops.weight, mul_init)
        else:
            self.mul_base = nn.Parameter(torch.full((num_heads,), float(mul_init)))
        if use_rd:
            self.bias_kernels, self.mul_kernels = (_Kernels(num_kernels, num_heads) for _ in range(2))

    def forward(
        self, spd: Float[Tensor, "graphs n n"], rd: Float[Tensor, "graphs n n"]
    ) -> tuple[Float[Tensor, "graphs heads n n"], Float[Tensor, "graphs heads n n"]]:
        """Return shift and scale.

        Parameters
        ----------
        spd, rd : Tensor
            Hops and resistance, inf where there is no path.

        Returns
        -------
        tuple of Tensor
            Bias and mul, ``(graphs, heads, n, n)``.
        """
        bias, mul = torch.zeros((), dtype=rd.dtype, device=rd.device), None
        if self.use_spd:
            hops = torch.where(torch.isinf(spd), self.max_hops + 1, spd.clamp_max(self.max_hops)).long()
            bias, mul = self.bias_hops(hops), self.mul_hops(hops)
        else:
            mul = self.mul_base
        if self.use_rd:
            bias, mul = bias + self.bias_kernels(rd), mul + self.mul_kernels(rd)
        return bias.permute(0, 3, 1, 2), mul.permute(0, 3, 1, 2)


class _Kernels(nn.Module):
    """A two-layer network on Gaussian kernels of a distance; an infinite one lights no kernel."""

    def __init__(self, num_kernels: int, num_heads: int) -> None:
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.empty(num_kernels).uniform_(0, 3)) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(num_kernels, num_kernels), nn.GELU(), nn.Linear(num_kernels, num_heads)
        )

    def forward(self, distance: Tensor) -> Tensor:
        """Return (..., heads)."""
        known = torch.isfinite(distance)[..., None]
        width = self.std.abs() + 0.01
        z = (torch.where(known, distance[..., None], 0) - self.mean) / width
        kernels = torch.exp(-z.square() / 2) / (math.sqrt(2 * math.pi) * width)
        return self.mlp(kernels * known)


class GraphormerGD(nn.Module):
    """Graph transformer with generalised distances, for nodes, graphs or edges.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int, default=80
        Width of states.
    out_channels : int, default=1
        Outputs.
    num_layers : int, default=12
        Blocks.
    num_heads : int, default=8
        Divides ``hidden_channels``.
    ffn_channels : int, default=80
        Width of the feed-forward part.
    num_kernels : int, default=128
        As for `DistanceBias`.
    distances : {"spd", "rd", "both"}, default="both"
        What attention sees.
    level : {"node", "graph", "edge"}, default="node"
        What has an output. For graphs one more token is read out; for edges the states of
        both ends, averaged over both orders.
    dropout, attention_dropout, activation_dropout : float
        After attention and feed-forward, of the softmax, after the GELU.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.

    Notes
    -----
    1. All pairs of nodes of a graph attend to each other: time and memory are quadratic in
       its nodes. Graphs of a ``batch`` do not see each other.
    2. Distances are computed at every call unless they are given; they carry no gradient.
    3. Scales start at 1, with the official flag for that and not its default.

    References
    ----------
    .. [1] Zhang, Luo, Wang, He. Rethinking the Expressive Power of GNNs via Graph
       Biconnectivity. ICLR 2023. Section 4.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import GraphormerGD
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> net = GraphormerGD(4, 16, num_layers=2, num_heads=2)
    >>> net(torch.randn(3, 4), edge_index).shape
    torch.Size([3, 1])
    """

    def __init__(
        self, in_channels: int, hidden_channels: int = 80, out_channels: int = 1, *, num_layers: int = 12,
        num_heads: int = 8, ffn_channels: int = 80, num_kernels: int = 128, distances: Distance = "both",
        level: Literal["node", "graph", "edge"] = "node", dropout: float = 0.0, attention_dropout: float = 0.1,
        activation_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        for name, value in (("hidden_channels", hidden_channels), ("out_channels", out_channels),
                            ("num_layers", num_layers), ("ffn_channels", ffn_channels)):  # fmt: skip
            integer(name, value, 1)
        self.distances = one_of("distances", distances, ("spd", "rd", "both"))
        self.level = one_of("level", level, ("node", "graph", "edge"))
        width = hidden_channels
        self.encoder, self.degree = nn.Linear(in_channels, width), nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        self.bias = DistanceBias(
            num_heads, num_kernels=num_kernels, use_spd=distances != "rd", use_rd=distances != "spd"
        )
        if level == "graph":
            self.token = nn.Parameter(torch.empty(width).normal_(0, 0.02))
            self.token_bias = nn.Parameter(torch.empty(num_heads).normal_(0, 0.02))
            self.token_mul = nn.Parameter(torch.ones(num_heads))
        self.blocks = nn.ModuleList(
            _Block(width, num_heads, ffn_channels, dropout, attention_dropout, activation_dropout)
            for _ in range(num_layers)
        )
        wide = 2 * width if level == "edge" else width
        self.head = nn.Sequential(
            nn.Linear(wide, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, out_channels)
        )

    def forward(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"],
        batch: Int[Tensor, " nodes"] | None = None, *, distances: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "rows out"]:  # fmt: skip
        """Return the outputs of nodes, graphs or edges.

        Parameters
        ----------
        x : Tensor
            Features.
        edge_index : Tensor
            Undirected edges in both directions.
        batch : Tensor, optional
            Sorted graph of each node.
        distances : tuple of Tensor, optional
            Hops and resistance, padded as with ``batch``, if they are known.

        Returns
        -------
        Tensor
        """
        has_shape("x", floating("x", x), (None, self.in_channels))
        layout = _Layout(edge_index, len(x), batch)
        mask = torch.from_numpy(layout.mask).to(x.device)
        graph, place = (torch.from_numpy(part).to(x.device) for part in (layout.graph, layout.place))
        spd, rd = self._distances(layout) if distances is None else distances
        for name, each in (("distances[0]", spd), ("distances[1]", rd)):
            has_shape(name, each, (*mask.shape, mask.shape[1]), "the padded batch")
        bias, mul = self.bias(spd.to(x), rd.to(x))
        degree = torch.bincount(edge_index[1], minlength=len(x)).clamp_max(63)
        states = self.norm(self.encoder(x) + self.degree(degree))
        padded = states.new_zeros(*mask.shape, states.shape[1]).index_put((graph, place), states)
        if self.level == "graph":
            padded = torch.cat([self.token.to(x).expand(len(mask), 1, -1), padded], 1)
            mask = nn.functional.pad(mask, (1, 0), value=True)
            bias, mul = _framed(bias, self.token_bias), _framed(mul, self.token_mul)
        for block in self.blocks:
            padded = block(padded, bias, mul, mask)
        if self.level == "graph":
            return self.head(padded[:, 0])
        states = padded[graph, place]
        if self.level == "node":
            return self.head(states)
        u, v = states[edge_index[0]], states[edge_index[1]]
        return (self.head(torch.cat([u, v], 1)) + self.head(torch.cat([v, u], 1))) / 2

    def _distances(self, layout: "_Layout") -> tuple[Tensor, Tensor]:
        """Return hops and resistance; the one that is not looked at is a copy of the other."""
        with torch.no_grad():
            spd = _hops(layout) if self.distances != "rd" else None
            rd = _resistance(layout, _conductances(layout, None)) if self.distances != "spd" else spd
            return (rd if spd is None else spd), rd  # type: ignore[return-value]


class _Block(nn.Module):
    """Attention and a feed-forward part, each added and then normalised."""

    def __init__(
        self, width: int, num_heads: int, ffn: int, dropout: float, attention: float, activation: float
    ) -> None:
        super().__init__()
        self.attention = GDAttention(width, num_heads, dropout=attention)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        within("dropout", dropout, 0, 1, open_high=True)
        within("activation_dropout", activation, 0, 1, open_high=True)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.GELU(), nn.Dropout(activation), nn.Linear(ffn, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor, mul: Tensor, mask: Tensor) -> Tensor:
        """Return new states."""
        x = self.first(x + self.dropout(self.attention(x, bias, mul, mask)))
        return self.second(x + self.dropout(self.ffn(x)))


class _Layout:
    """Where each node of a batch stands in padded arrays; checks the edges."""

    def __init__(self, edge_index: Tensor, num_nodes: int, batch: Tensor | None) -> None:
        check_undirected(edge_index, num_nodes)
        self.edges = edge_index.cpu().numpy()
        self.num_nodes, self.device = num_nodes, edge_index.device
        if batch is None:
            self.graph = np.zeros(num_nodes, np.int64)
            self.sizes = np.array([num_nodes])
        else:
            self.graph = has_shape("batch", batch, (num_nodes,)).cpu().numpy()
            if num_nodes and (self.graph[0] < 0 or (np.diff(self.graph) < 0).any()):
                raise ValueError("batch must be sorted and not negative")
            self.sizes = np.bincount(self.graph)
        starts = self.sizes.cumsum() - self.sizes
        self.place = np.arange(num_nodes) - starts[self.graph]
        across = self.graph[self.edges[0]] != self.graph[self.edges[1]]
        if across.any():
            raise ValueError(f"edge_index must stay inside graphs, edge {int(across.argmax())} joins two")
        self.mask = np.arange(self.sizes.max(initial=0)) < self.sizes[:, None]

    @property
    def pairs(self) -> ndarray:
        """Which entries of a padded matrix are pairs of nodes."""
        return self.mask[:, :, None] & self.mask[:, None, :]

    def at(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return graph, row (receiver) and column (sender) of each edge that is no loop, and which these are."""
        send, receive = self.edges
        parts = self.graph[send], self.place[receive], self.place[send]
        return tuple(torch.from_numpy(part).to(self.device) for part in parts)  # type: ignore[return-value]


def _conductances(layout: _Layout, edge_weight: Tensor | None) -> Tensor:
    """Return symmetric padded conductances, float64, without loops."""
    graph, row, column = layout.at()
    shape = (*layout.mask.shape, layout.mask.shape[1])
    if edge_weight is None:
        weight = torch.ones(len(graph), dtype=torch.float64, device=layout.device)
    else:
        weight = has_shape(
            "edge_weight", floating("edge_weight", edge_weight), (len(graph),), "edge_index"
        ).double()
        fixed = weight.detach()
        bad = ~((fixed > 0) & torch.isfinite(fixed))
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"edge_weight must be positive and finite, got {float(fixed[at])} for edge {at}")
    weight = weight * (row != column)
    out = torch.zeros(shape, dtype=torch.float64, device=layout.device)
    out = out.index_put((graph, row, column), weight, accumulate=True)
    fixed = out.detach()
    if torch.equal(fixed, fixed.mT):
        return out
    uneven = (fixed - fixed.mT).abs() > 1e-9 * fixed.abs()
    if bool(uneven.any()):
        g, i, j = uneven.nonzero()[0].tolist()
        raise ValueError(
            f"edge_weight must be the same in both directions, got {float(fixed[g, i, j]):g} and {float(fixed[g, j, i]):g}"
        )
    return out


def _components(layout: _Layout) -> Tensor:
    """Return the padded component of each node, -1 on padding."""
    send, receive = layout.edges
    n = layout.num_nodes
    matrix = csr_matrix((np.ones(len(send)), (send, receive)), shape=(n, n))
    out = np.full(layout.mask.shape, -1)
    if n:
        out[layout.graph, layout.place] = connected_components(matrix, directed=False)[1]
    return torch.from_numpy(out).to(layout.device)


def _resistance(layout: _Layout, conductance: Tensor) -> Tensor:
    """Return padded resistances: with M = (L + 1 1' / n of each component)^-1, M_ii + M_jj - 2 M_ij."""
    component = _components(layout)
    mask = component >= 0
    same = (component[:, :, None] == component[:, None, :]) & mask[:, :, None]
    size = same.sum(-1, keepdim=True).clamp_min(1)
    matrix = same / size - conductance
    matrix.diagonal(dim1=-2, dim2=-1).add_(conductance.sum(-1) + ~mask)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    return torch.where(same, diagonal[..., :, None] + diagonal[..., None, :] - 2 * inverse, torch.inf)


def _hops(layout: _Layout) -> Tensor:
    """Return padded hops, float64; small graphs all at once, large ones by searches from each node."""
    n = layout.mask.shape[1]
    mask = torch.from_numpy(layout.mask).to(layout.device)
    distance = torch.full((*mask.shape, n), torch.inf, dtype=torch.float64, device=layout.device)
    if n > 64:
        starts = layout.sizes.cumsum() - layout.sizes
        send, receive = layout.edges
        matrix = csr_matrix((np.ones(len(send)), (send, receive)), shape=(layout.num_nodes,) * 2)
        for g, (start, size) in enumerate(zip(starts, layout.sizes, strict=True)):
            part = matrix[start : start + size, start : start + size]
            distance[g, :size, :size] = torch.from_numpy(shortest_path(part, unweighted=True))
        return distance
    linked = torch.zeros(distance.shape, dtype=torch.float32, device=layout.device)
    linked[layout.at()] = 1
    reached = torch.diag_embed(mask.float())
    distance[reached > 0] = 0
    for hop in range(1, n):
        wider = ((reached @ linked + reached) > 0).float()
        fresh = wider > reached
        if not bool(fresh.any()):
            break
        distance[fresh] = hop
        reached = wider
    return distance


def _own_distance(distance: Tensor, layout: _Layout, single: bool) -> Tensor:
    floating("distance", distance)
    shape = (*layout.mask.shape, layout.mask.shape[1])
    padded = has_shape("distance", distance, shape[1:] if single else shape, "the nodes")
    padded = padded[None] if single else padded
    pairs = torch.from_numpy(layout.pairs).to(padded.device)
    if bool((torch.isnan(padded) & pairs).any()):
        raise ValueError("distance must not be NaN")
    if not torch.equal(torch.where(pairs, padded, 0), torch.where(pairs, padded, 0).mT):
        raise ValueError("distance must be symmetric")
    return padded.double()


def _ranked(distance: ndarray, pairs: ndarray, decimals: int) -> ndarray:
    """Return the rank of each distance; values in a row that are nearer than 10^-decimals share one."""
    values = np.unique(distance[pairs])
    with np.errstate(invalid="ignore"):  # inf - inf
        rank = np.cumsum(np.concatenate([[0], np.diff(values) > 10.0**-decimals]))[: len(values)]
    out = np.zeros(distance.shape, np.int64)
    out[pairs] = rank[np.searchsorted(values, distance[pairs])]
    return out


def _numbered(labels: ndarray) -> ndarray:
    """Return labels numbered 0, 1, ... in sorted order."""
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _search(low: ndarray, high: ndarray, n: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return cut vertices, bridges and the block of each undirected edge: Tarjan's lowlink, iterative."""
    near: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    for edge, (u, v) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if u != v:
            near[u].append((v, edge))
            near[v].append((u, edge))
    order, least = [-1] * n, [0] * n
    cut, bridge, block = np.zeros(n, bool), np.zeros(len(low), bool), np.full(len(low), -1, np.int64)
    clock = blocks = 0
    for root in range(n):
        if order[root] >= 0:
            continue
        order[root] = least[root] = clock
        clock += 1
        children, pending = 0, []
        stack: list[tuple[int, int, Any]] = [(root, -1, iter(near[root]))]
        while stack:
            u, entered, ahead = stack[-1]
            for v, edge in ahead:
                if edge == entered:
                    continue
                if order[v] < 0:
                    order[v] = least[v] = clock
                    clock += 1
                    pending.append(edge)
                    stack.append((v, edge, iter(near[v])))
                    break
                if order[v] < order[u]:
                    pending.append(edge)
                    least[u] = min(least[u], order[v])
            else:
                stack.pop()
                if not stack:
                    continue
                parent = stack[-1][0]
                least[parent] = min(least[parent], least[u])
                if least[u] >= order[parent]:  # nothing below u reaches above parent
                    bridge[entered] = least[u] > order[parent]
                    children += parent == root
                    cut[parent] |= parent != root
                    while True:
                        edge = pending.pop()
                        block[edge] = blocks
                        if edge == entered:
                            break
                    blocks += 1
        cut[root] = children > 1
    return cut, bridge, block


def _framed(values: Tensor, own: Tensor) -> Tensor:
    """Return (graphs, heads, n + 1, n + 1): the token's own value in the first row and column."""
    graphs, heads, n, _ = values.shape
    framed = own.to(values)[:, None, None].expand(graphs, heads, n + 1, n + 1).clone()
    framed[..., 1:, 1:] = values
    return framed
