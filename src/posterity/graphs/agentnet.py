"""AgentNet: neural agents walk a graph, read and write where they stand, and vote.

K agents start at random nodes. In every step each scores the neighbours of its node p by
attention, less what it has visited,

    logits(c) = q(a)' k([n_c, n_p]) / sqrt(h) + bias(was c visited by this agent, when),   (1)

moves by a hard Gumbel choice (a weight of 1 carries the gradient of the soft one), writes
into the node that it reaches, reads the node's neighbourhood, and updates itself. Only nodes
that an agent touches have a state, so the cost is that of the walks, K T (degree + h^2),
whatever the size of the graph; and agents that walk in circles see what message passing
cannot.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide
from posterity._random import draw_device
from posterity.graphs._graph import check_batch, check_edges, check_index, csr_order, uncompiled
from posterity.graphs.segments import _aggregate, _choose

__all__ = ["AgentNet", "AgentTrace"]


@dataclass(frozen=True)
class AgentTrace:
    """Where the agents went.

    Attributes
    ----------
    positions : Tensor of shape (steps + 1, agents)
        The node of each agent; row 0 is the start.
    """

    positions: Int[Tensor, "times agents"]


class AgentNet(nn.Module):
    """Classifier of graphs by agents that walk them.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int
        Width of the states of nodes and agents, even.
    out_channels : int
        Outputs of a graph.
    num_agents : int, default=16
        Agents a graph.
    num_steps : int, default=16
        Moves.
    mode : {"learned", "simple", "random"}, default="learned"
        Moves by attention and biases, by four biases alone, or uniformly.
    edge_dim : int, optional
        Features of an edge.
    self_loops : bool, default=True
        Whether an agent may stay.
    reduce : {"log", "mean", "sum"}, default="log"
        How neighbours and agents of a node are gathered, see `log_aggregate`.
    visited_decay : float, default=0.9
        In (0, 1]: how a visit fades with each step.
    temperature : float, default=2/3
        See `straight_through_choice`.
    global_pool : bool, default=True
        Whether nodes hear the mean of all agents of their graph.
    mlp_width : int, default=2
        Hidden width of the networks, in units of ``2 hidden_channels``.
    dropout : float, default=0.0
        Within the networks.

    Attributes
    ----------
    move_bias : nn.Parameter of shape (4,)
        What is added for going back, staying, and going where the agent has and has not
        been; not there for ``"random"``.

    Raises
    ------
    ValueError
        If a parameter is out of range or the input does not fit.

    Notes
    -----
    1. Evaluation is random too: for a prediction average the logits of some generators.
    2. Start nodes are uniform; the official draw never takes the last node of the largest
       graph of a batch. Its option ``test_argmax`` changes only the temperature, which does
       not change a hard choice, and is left out.
    3. The official code embeds all nodes and convolves the whole graph in each step; here
       only what agents touch is computed.

    References
    ----------
    .. [1] Martinkus, Papp, Schesch, Wattenhofer. Agent-based Graph Neural Networks. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import AgentNet
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> net = AgentNet(4, 16, 2, num_agents=3, num_steps=5)
    >>> logits, trace = net(torch.randn(3, 4), edge_index, return_trace=True)
    >>> logits.shape, trace.positions.shape
    (torch.Size([1, 2]), torch.Size([6, 3]))
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, *, num_agents: int = 16, num_steps: int = 16,
        mode: Literal["learned", "simple", "random"] = "learned", edge_dim: int | None = None, self_loops: bool = True,
        reduce: Literal["log", "mean", "sum"] = "log", visited_decay: float = 0.9, temperature: float = 2 / 3,
        global_pool: bool = True, mlp_width: int = 2, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels),
                            ("num_agents", num_agents), ("num_steps", num_steps), ("mlp_width", mlp_width)):  # fmt: skip
            integer(name, value, 1)
        if integer("hidden_channels", hidden_channels, 1) % 2:
            raise ValueError(f"hidden_channels must be even, got {hidden_channels}")
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.num_agents, self.num_steps = num_agents, num_steps
        self.mode = one_of("mode", mode, ("learned", "simple", "random"))
        self.reduce = one_of("reduce", reduce, ("log", "mean", "sum"))
        self.visited_decay = within("visited_decay", visited_decay, 0, 1, open_low=True)
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        within("dropout", dropout, 0, 1, open_high=True)
        self.edge_dim = None if edge_dim is None else integer("edge_dim", edge_dim, 1)
        self.self_loops, self.global_pool = self_loops, global_pool
        h, edge = hidden_channels, 0 if edge_dim is None else hidden_channels
        m = h * mlp_width
        self.encoder = nn.Sequential(nn.Linear(in_channels, 2 * h), nn.LeakyReLU(), nn.Linear(2 * h, h))
        self.agents = nn.Embedding(num_agents, h)
        self.time = nn.Sequential(nn.Linear(h, m), nn.LeakyReLU(), nn.Linear(m, m))
        if edge_dim is not None:
            self.edge_encoder = nn.Sequential(nn.Linear(edge_dim, 2 * h), nn.LeakyReLU(), nn.Linear(2 * h, h))
            self.message = nn.Sequential(nn.LayerNorm(2 * h), nn.Linear(2 * h, h), nn.LeakyReLU(0.2))
        if mode != "random":
            self.move_bias = nn.Parameter(torch.tensor([0.0, -1.0, 0.0, 5.0]))
        if mode == "learned":
            self.query = nn.Sequential(nn.LayerNorm(h), nn.Linear(h, h))
            self.key = nn.Sequential(nn.LayerNorm(2 * h + edge), nn.Linear(2 * h + edge, h))
        self.write = _Update(2 * h + edge + (h if global_pool else 0), h, m, mlp_width, dropout, timed=True)
        self.gather = _Update(2 * h, h, m, mlp_width, dropout, timed=False)
        self.read = _Update(2 * h + edge, h, m, mlp_width, dropout, timed=True)
        self.readout_time = nn.Sequential(nn.LeakyReLU(), nn.Linear(m, h))
        self.vote = nn.Sequential(nn.LayerNorm(h), nn.Linear(h, 2 * h))
        self.head = nn.Linear(4 * h, out_channels)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.kaiming_uniform_(part.weight, a=0.01)
                nn.init.zeros_(part.bias)

    @staticmethod
    def csr(
        edge_index: Int[Tensor, "2 edges"], num_nodes: int, self_loops: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return where agents may go from each node, to be given to `forward` again and again.

        Parameters
        ----------
        edge_index : Tensor
            Edges; for ``csr`` of `forward` both directions of each.
        num_nodes : int
            How many nodes.
        self_loops : bool, default=True
            As for the network.

        Returns
        -------
        tuple of Tensor
            ``rowptr`` (nodes + 1,) and ``col`` (moves,).
        """
        edge_index = check_edges(edge_index, integer("num_nodes", num_nodes, 0), source="num_nodes")
        rowptr, col, _ = _moves(edge_index, num_nodes, self_loops)
        return rowptr, col

    @uncompiled  # what is computed depends on where agents stand
    def forward(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"],
        batch: Int[Tensor, " nodes"] | None = None, edge_attr: Float[Tensor, "edges channels"] | None = None, *,
        start: Int[Tensor, " agents"] | None = None, generator: torch.Generator | None = None,
        csr: tuple[Tensor, Tensor] | None = None, return_trace: bool = False,
    ) -> Float[Tensor, "graphs out"] | tuple[Float[Tensor, "graphs out"], AgentTrace]:  # fmt: skip
        """Return logits of each graph.

        Parameters
        ----------
        x : Tensor
            Features of nodes.
        edge_index : Tensor
            Row 0 sends, row 1 receives; agents move along edges.
        batch : Tensor, optional
            Sorted graph of each node.
        edge_attr : Tensor, optional
            Features of edges, if and only if the network has an ``edge_dim``.
        start : Tensor, optional
            First node of each agent, those of graph b in slots b K to b K + K - 1; by
            default uniform.
        generator : torch.Generator, optional
            Decides starts and moves.
        csr : tuple of Tensor, optional
            What `csr` returned for this graph, whose edges all have a reverse; then nothing
            looks at all edges.
        return_trace : bool, default=False
            Whether to return where the agents went as well.

        Returns
        -------
        Tensor or tuple of Tensor and AgentTrace
        """
        edge_index, graph, position = self._begin(x, edge_index, batch, edge_attr, start, generator, csr)
        moves = (*csr, None) if csr is not None else _moves(edge_index, len(x), self.self_loops)
        arrivals = moves if csr is not None else csr_order(*edge_index.flip(0), len(x))
        n_graphs, k, h = len(position) // self.num_agents, self.num_agents, self.hidden_channels
        edges = None if edge_attr is None else wide(self.edge_encoder(edge_attr))
        nodes = _States(x, self.encoder, dense=len(x) <= 4 * len(position))
        agents = wide(self.agents.weight).repeat(n_graphs, 1)  # states grow step by step: they are not narrow
        times = self.time(_sinusoids(self.num_steps + 1, h).to(x))
        weight = agents.new_ones(len(position))
        taken = None if edges is None else agents.new_zeros(len(position), h)
        trace, logits = [position], agents.new_zeros(n_graphs, self.head.out_features)
        for t in range(self.num_steps + 1):
            if t:
                position, weight, taken = self._move(t, agents, nodes, moves, trace, edges, generator)
                trace.append(position)
            held, at = torch.unique(position, return_inverse=True)
            heard = [agents] if taken is None else [agents, taken]
            parts = [nodes[held], _aggregate(torch.cat(heard, 1), at, len(held), weight, self.reduce)]
            if self.global_pool:
                of = graph[held] if graph is not None else torch.zeros_like(held)
                parts.append(agents.view(n_graphs, k, h).mean(1)[of])
            nodes[held] = parts[0] + self.write(torch.cat(parts, 1), times[t])
            nodes[held] = nodes[held] + self.gather(
                torch.cat([nodes[held], self._near(held, nodes, arrivals, edges)], 1)
            )
            parts = [agents, nodes[position] * weight[:, None], *([] if taken is None else [taken])]
            agents = agents + self.read(torch.cat(parts, 1), times[t])
            ready = (agents + self.readout_time(times[t])).to(self.agents.weight.dtype)
            votes = self.vote(ready).view(n_graphs, k, -1)
            logits = logits + self.head(torch.cat([votes.amax(1), votes.mean(1)], 1))
        logits = (logits / (self.num_steps + 1)).to(x.dtype)
        return (logits, AgentTrace(torch.stack(trace))) if return_trace else logits

    def _begin(
        self, x: Tensor, edge_index: Tensor, batch: Tensor | None, edge_attr: Tensor | None, start: Tensor | None,
        generator: torch.Generator | None, csr: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """Check the input; return edges, the graph of each node and the first node of each agent."""
        has_shape("x", floating("x", x), (None, self.in_channels))
        edge_index = check_edges(edge_index, len(x), read=None if csr is None else False)
        if (edge_attr is None) != (self.edge_dim is None):
            given = "not given" if edge_attr is None else "given"
            raise ValueError(
                f"edge_attr must be given if and only if edge_dim is, edge_dim={self.edge_dim}, edge_attr {given}"
            )
        if edge_attr is not None:
            has_shape("edge_attr", floating("edge_attr", edge_attr), (edge_index.shape[1], self.edge_dim))
            if csr is not None:
                raise ValueError("csr knows no edge features: give edge_attr without it")
        if csr is not None:
            check_index("csr[0]", csr[0], (len(x) + 1,), source="the nodes", read=False)
            check_index("csr[1]", csr[1], (None,), read=False)
        if batch is None:
            sizes, first = x.new_tensor([len(x)], dtype=torch.int64), x.new_zeros(1, dtype=torch.int64)
        else:
            batch = check_batch(batch, len(x), source="x")
            sizes = torch.bincount(batch)
            first = sizes.cumsum(0) - sizes
        if len(x) == 0 or (sizes.device.type == "cpu" and bool((sizes == 0).any())):
            raise ValueError("batch must not hold a graph without nodes")
        sizes, first = sizes.repeat_interleave(self.num_agents), first.repeat_interleave(self.num_agents)
        if start is None:
            where = draw_device(generator, x.device)
            share = torch.rand(len(sizes), generator=generator, dtype=torch.float64, device=where).to(
                x.device
            )
            return edge_index, batch, first + (share * sizes).long().clamp_max(sizes - 1)
        start = check_index("start", start, (len(sizes),), source="num_agents for each graph")
        if start.device.type == "cpu":
            outside = (start < first) | (start >= first + sizes)
            if bool(outside.any()):
                slot = int(outside.nonzero()[0])
                raise ValueError(
                    f"start must place agents in their own graph, slot {slot} is at node {int(start[slot])}"
                )
        return edge_index, batch, start

    def _move(
        self, t: int, agents: Tensor, nodes: "_States", moves: tuple[Tensor, Tensor, Tensor | None],
        trace: list[Tensor], edges: Tensor | None, generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Return where each agent goes, the weight of its choice, and the edge that it takes."""
        here = trace[-1]
        rowptr, col, numbers = moves
        mover, slot = _segments(rowptr, here)
        candidate, origin = col[slot], here[mover]
        edge = None if edges is None or numbers is None else _padded(edges, numbers[slot])
        logits = agents.new_zeros(len(candidate))
        if self.mode == "learned":
            looked = (
                [nodes[candidate], nodes[origin]] if edge is None else [nodes[candidate], edge, nodes[origin]]
            )
            dtype = self.agents.weight.dtype
            query, key = self.query(agents.to(dtype)), self.key(torch.cat(looked, 1).to(dtype))
            logits = (wide(query)[mover] * wide(key)).sum(1) / math.sqrt(agents.shape[1])
        if self.mode != "random":
            back, stay, explored, unexplored = wide(self.move_bias)
            past = torch.stack(trace)[:, mover] == candidate  # (t, candidates)
            last = (past * torch.arange(1, t + 1, device=past.device)[:, None]).amax(0) - 1
            known = (self.visited_decay ** (t - 2 - last).to(logits)) * (last >= 0)
            logits = logits + torch.where(
                candidate == origin, stay, known * explored + (1 - known) * unexplored
            )
            if t >= 2:
                logits = logits + back * past[t - 2]
        chosen, weight = _choose(logits, mover, len(here), self.temperature, generator)
        if self.mode == "random":
            weight = torch.ones_like(weight)
        return candidate[chosen], weight, None if edge is None else edge[chosen]

    def _near(
        self,
        held: Tensor,
        nodes: "_States",
        arrivals: tuple[Tensor, Tensor, Tensor | None],
        edges: Tensor | None,
    ) -> Tensor:
        """Return what the senders of a node's incoming edges say together, without itself."""
        rowptr, col, numbers = arrivals
        group, slot = _segments(rowptr, held)
        other = col[slot] != held[group]
        group, slot = group[other], slot[other]
        values = nodes[col[slot]]
        if edges is not None and numbers is not None:
            values = torch.cat([values, _padded(edges, numbers[slot])], 1)
            values = wide(self.message(values.to(self.agents.weight.dtype)))
        return _aggregate(values, group, len(held), None, self.reduce)


class _Update(nn.Module):
    """A pre-normalised two-layer network; a projection of the time is added to its input."""

    def __init__(self, wide: int, h: int, m: int, mlp_width: int, dropout: float, *, timed: bool) -> None:
        super().__init__()
        if timed:
            self.time = nn.Sequential(nn.LeakyReLU(), nn.Linear(m, wide))
        hidden = 2 * h * mlp_width
        self.net = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.LeakyReLU(), nn.Dropout(dropout), nn.Linear(hidden, h),
            nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Return (rows, h)."""
        dtype = self.net[1].weight.dtype
        return self.net((x if time is None else x + self.time(time)).to(dtype))  # type: ignore[arg-type]


class _States:
    """States of nodes, not narrow: encoded when first looked at, in a table where that is small."""

    def __init__(self, x: Tensor, encoder: nn.Module, *, dense: bool) -> None:
        self.x, self.encoder = x, encoder
        self.table = wide(encoder(x)) if dense else None
        self.ids = torch.empty(0, dtype=torch.int64, device=x.device)  # sorted nodes that have been written
        self.written: Tensor | None = None

    def __getitem__(self, nodes: Tensor) -> Tensor:
        if self.table is not None:
            return self.table[nodes]
        unique, inverse = torch.unique(nodes, return_inverse=True)
        states = wide(self.encoder(self.x[unique]))
        if self.written is not None:
            place = torch.searchsorted(self.ids, unique).clamp_max(len(self.ids) - 1)
            known = self.ids[place] == unique
            states = torch.where(known[:, None], self.written[place], states)
        return states[inverse]

    def __setitem__(self, nodes: Tensor, states: Tensor) -> None:
        """Write states of sorted, different nodes."""
        if self.table is not None:
            self.table = self.table.index_copy(0, nodes, states)
            return
        if self.written is None:
            self.ids, self.written = nodes, states
            return
        place = torch.searchsorted(nodes, self.ids).clamp_max(len(nodes) - 1)
        old = nodes[place] != self.ids
        ids = torch.cat([self.ids[old], nodes])
        order = ids.argsort()
        self.ids, self.written = ids[order], torch.cat([self.written[old], states])[order]


def _moves(edge_index: Tensor, num_nodes: int, self_loops: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return CSR of moves and the number of each one's edge, -1 for a stay.

    A node stays possible for all if ``self_loops``, else where no edge leaves.
    """
    number = torch.arange(edge_index.shape[1], device=edge_index.device)
    if self_loops:
        kept = edge_index[0] != edge_index[1]
        edge_index, number = edge_index[:, kept], number[kept]
        stay = torch.arange(num_nodes, device=edge_index.device)
    else:
        stay = (torch.bincount(edge_index[0], minlength=num_nodes) == 0).nonzero()[:, 0]
    edge_index = torch.cat([edge_index, stay.expand(2, -1)], 1)
    number = torch.cat([number, torch.full_like(stay, -1)])
    rowptr, col, order = csr_order(*edge_index, num_nodes)
    return rowptr, col, number[order]


def _segments(rowptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each entry of these rows of a CSR, which row it is of and its slot."""
    first = rowptr[rows]
    count = rowptr[rows + 1] - first
    owner = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    within_row = torch.arange(len(owner), device=rows.device) - (count.cumsum(0) - count)[owner]
    return owner, first[owner] + within_row


def _padded(edges: Tensor, numbers: Tensor) -> Tensor:
    """Return rows of edges, zeros for number -1."""
    if len(edges) == 0:
        return edges.new_zeros(len(numbers), edges.shape[1])
    return edges[numbers.clamp_min(0)] * (numbers >= 0)[:, None].to(edges)


def _sinusoids(times: int, width: int) -> Tensor:
    """Return (times, width): sine and cosine in turns at falling frequencies."""
    angle = torch.arange(times)[:, None] * 10000.0 ** (-2 * torch.arange(width // 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
