"""Graphormer-GD: a graph transformer that sees all distances, and so bridges and cut vertices.

Attention is shifted and scaled by functions of the distances D between nodes,

    A = softmax(Q K' / sqrt(d) + phi_1(D)) * phi_2(D).                                   (1)

With hops and resistance in D that is as expressive as the colour refinement by generalised
distances: the product is what makes attention able to sum, and not only to average.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer, one_of, within
from posterity._precision import wide
from posterity.graphs._graph import uncompiled
from posterity.graphs.graph_distances import Distance, _conductances, _hops, _Layout, _resistance

__all__ = ["DistanceBias", "GDAttention", "GraphormerGD"]


class GDAttention(nn.Module):
    """Self-attention whose weights are shifted and scaled by functions of the distance, (1).

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
        self.channels, self.num_heads = channels, integer("num_heads", num_heads, 1)
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
        has_shape("x", floating("x", x), (None, None, self.channels), "this layer")
        (graphs, n, channels), heads = x.shape, self.num_heads
        for name, each in (("bias", bias), ("mul", mul)):
            has_shape(name, floating(name, each), (graphs, heads, n, n), "x and num_heads")
        if mask is not None:
            _check_mask(mask, (graphs, n))
        q, k, v = (
            part(x).view(graphs, n, heads, channels // heads).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = wide(q @ k.mT) / math.sqrt(channels / heads) + bias
        if mask is not None:  # not -inf: a graph without nodes would be NaN
            logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        weight = self.dropout(logits.softmax(-1)) * (mul.relu() if self.relu_mul else mul)
        if mask is not None:
            weight = weight.masked_fill(~mask[:, None, None, :], 0)
        return self.out_proj((weight.to(v.dtype) @ v).transpose(1, 2).reshape(graphs, n, channels))


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
        has_shape("spd", floating("spd", spd), (None, spd.shape[-1], spd.shape[-1]))
        has_shape("rd", floating("rd", rd), spd.shape, "spd")
        if self.use_spd:
            _check_hops("spd", spd)
        bias, mul = torch.zeros((), dtype=rd.dtype, device=rd.device), None
        if self.use_spd:
            hops = torch.where(torch.isinf(spd), self.max_hops + 1, spd.clamp_max(self.max_hops)).long()
            bias, mul = self.bias_hops(hops), self.mul_hops(hops)
        else:
            mul = self.mul_base
        if self.use_rd:
            bias, mul = bias + self.bias_kernels(rd), mul + self.mul_kernels(rd)
        return bias.permute(0, 3, 1, 2), mul.permute(0, 3, 1, 2)


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a mask of bool, got dtype {mask.dtype}")
    has_shape("mask", mask, shape, "x")


@uncompiled
def _check_hops(name: str, spd: Tensor) -> None:
    if spd.device.type == "cpu" and not bool((spd >= 0).all()):  # NaN is neither
        raise ValueError(f"{name} must be at least 0, got {float(spd.min()):g}")


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
        width = wide(self.std).abs() + 0.01
        z = (torch.where(known, wide(distance)[..., None], 0) - wide(self.mean)) / width
        kernels = torch.exp(-z.square() / 2) / (math.sqrt(2 * math.pi) * width)
        return self.mlp((kernels * known).to(self.mean.dtype))


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
        dtype = torch.promote_types(x.dtype, torch.float32)
        layout, edge_index = _laid_out(edge_index, len(x), batch), edge_index.long()
        mask = torch.from_numpy(layout.mask).to(x.device)
        graph, place = (torch.from_numpy(part).to(x.device) for part in (layout.graph, layout.place))
        spd, rd = self._distances(layout) if distances is None else distances
        for name, each in (("distances[0]", spd), ("distances[1]", rd)):
            has_shape(name, each, (*mask.shape, mask.shape[1]), "the padded batch")
        if distances is not None and self.bias.use_spd:
            _check_hops("distances[0]", spd)
        bias, mul = self.bias(spd.to(x.device, dtype), rd.to(x.device, dtype))
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

    @uncompiled
    def _distances(self, layout: "_Layout") -> tuple[Tensor, Tensor]:
        """Return hops and resistance; the one that is not looked at is a copy of the other."""
        with torch.no_grad():
            spd = _hops(layout) if self.distances != "rd" else None
            rd = _resistance(layout, _conductances(layout, None)) if self.distances != "spd" else spd
            return (rd if spd is None else spd), rd  # type: ignore[return-value]


@uncompiled
def _laid_out(edge_index: Tensor, num_nodes: int, batch: Tensor | None) -> _Layout:
    return _Layout(edge_index, num_nodes, batch)


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


def _framed(values: Tensor, own: Tensor) -> Tensor:
    """Return (graphs, heads, n + 1, n + 1): the token's own value in the first row and column."""
    graphs, heads, n, _ = values.shape
    framed = own.to(values)[:, None, None].expand(graphs, heads, n + 1, n + 1).clone()
    framed[..., 1:, 1:] = values
    return framed
