"""A network that says which edit of an instance will mislead a solver.

An edit is a pair of nodes of the instance's graph. Nodes pass through graph convolutions and are joined with a pooled
vector of the whole; the first end is picked among the nodes that have an edit, the second among those allowed with it:

    log p(i, j) = log softmax_i a(h_i) + log softmax_j tanh(W h_i) . h_j.                      (1)

`posterity.combinatorial.fit_edit_policy` trains it by the solver's answers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from posterity._checks import floating, has_shape, indices, integer
from posterity._precision import wide

__all__ = ["EditPolicy"]


class _Graphs(NamedTuple):
    """Graphs joined into one without edges between them."""

    x: Tensor  # (nodes, in_features)
    edge_index: Tensor  # (2, edges)
    edge_weight: Tensor  # (edges,)
    edits: Tensor  # (edits, 2), numbers of nodes
    owner: Tensor  # (nodes,): whose a node is
    count: int


class EditPolicy(nn.Module):
    """The probability of each edit of an instance, and the worsening to expect.

    Parameters
    ----------
    in_features : int, default=4
        Numbers that describe a node, at least 1; the problems here have 4.
    width : int, default=16
        Of the convolutions, at least 1.
    n_layers : int, default=3
        Convolutions, at least 1.

    Raises
    ------
    ValueError
        If a number is out of range; of a call, if shapes do not fit, or an edge or an edit names no node.

    Notes
    -----
    1. Each layer has weights of its own for a node, for what comes along edges and for what comes against them; that of
       the authors' code has one and no directions.
    2. Sums of pooling are means, so that larger instances do not have larger logits.

    References
    ----------
    .. [1] Lu et al. ROCO: A general framework for evaluating robustness of combinatorial optimization solvers
       on graphs. ICLR 2023. The learned attacker.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import EditPolicy
    >>> x, edge_index = torch.rand(3, 4), torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> edits = torch.tensor([[0, 2], [1, 0], [2, 1]])
    >>> log_p, value = EditPolicy()(x, edge_index, torch.ones(3), edits)
    >>> round(float(log_p.exp().sum().detach()), 4), value.shape
    (1.0, torch.Size([]))
    """

    def __init__(self, in_features: int = 4, width: int = 16, n_layers: int = 3) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        integer("width", width, 1)
        integer("n_layers", n_layers, 1)
        sizes = [in_features, *[width] * n_layers]
        self.layers = nn.ModuleList(nn.Linear(3 * a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.pool = nn.Linear(width, width, bias=False)
        self.first = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1, bias=False))
        self.second = nn.Linear(2 * width, 2 * width, bias=False)
        self.critic = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(
        self,
        x: Float[Tensor, "n d"],
        edge_index: Int[Tensor, "2 e"],
        edge_weight: Float[Tensor, " e"],
        edits: Int[Tensor, "m 2"],
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, ""]]:
        """Return the log-probabilities of edits, which are pairs of nodes, and the value of the instance."""
        has_shape("x", floating("x", x), (None, self.in_features), "the in_features of the policy")
        indices("edge_index", edge_index, (2, None), len(x))
        has_shape("edge_weight", floating("edge_weight", edge_weight), (edge_index.shape[1],), "edge_index")
        indices("edits", edits, (None, 2), len(x))
        if not len(x):
            raise ValueError("x must have at least one node, got none")
        owner = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        log_p, value, _ = self._score(_Graphs(x, edge_index.long(), edge_weight, edits.long(), owner, 1))
        return log_p.to(x.dtype), value[0].to(x.dtype)

    def _score(self, graphs: _Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of all edits, a value a graph and an entropy a graph; sums in float32 at least."""
        dtype, n = self.second.weight.dtype, len(graphs.x)
        (source, goal), weight = graphs.edge_index, wide(graphs.edge_weight.to(dtype))
        out, into = (
            weight.new_ones(n).index_add(0, ends, weight.abs()) for ends in (source, goal)
        )  # a loop at each node
        weight = (weight / (out[source] * into[goal]).sqrt())[:, None]
        h = wide(graphs.x.to(dtype))
        for k, layer in enumerate(self.layers):
            along = torch.zeros_like(h).index_add(0, goal, weight * h[source])
            against = torch.zeros_like(h).index_add(0, source, weight * h[goal])
            new = wide(layer(torch.cat([h, along, against], 1).to(dtype))).relu()
            h = h + new if k else new
        size = h.new_zeros(graphs.count).index_add(0, graphs.owner, h.new_ones(n))[:, None]

        def mean(each: Tensor) -> Tensor:
            return each.new_zeros(graphs.count, each.shape[1]).index_add(0, graphs.owner, each) / size

        center = wide(self.pool(mean(h).to(dtype))).tanh()
        pooled = mean((h * center[graphs.owner]).sum(1, keepdim=True).sigmoid() * h)
        state = torch.cat([h, pooled[graphs.owner]], 1)
        i, j = graphs.edits.T
        nodes = torch.unique(i)
        first = wide(self.first(state[nodes].to(dtype)))[:, 0]
        log_first = h.new_zeros(n).index_put((nodes,), _log_softmax(first, graphs.owner[nodes], graphs.count))
        query = wide(self.second(state[nodes].to(dtype))).tanh()
        query = h.new_zeros(n, state.shape[1]).index_put((nodes,), query)
        second = (query[i] * state[j]).sum(1)
        log_p = log_first[i] + _log_softmax(second, i, n)
        entropy = h.new_zeros(graphs.count).index_add(0, graphs.owner[i], -log_p.exp() * log_p)
        return log_p, wide(self.critic(pooled.to(dtype)))[:, 0], entropy


def _log_softmax(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """Return logarithms of shares within groups."""
    top = scores.new_full((count,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
    scores = scores - top[group]
    total = scores.new_zeros(count).index_add(0, group, scores.exp())
    return scores - total[group].log()


def log_probabilities(policy: EditPolicy, problem: Any, states: Sequence[Any]) -> list[ndarray]:
    """Return the log-probabilities of the allowed edits of each state, in one pass."""
    with torch.autocast(policy.second.weight.device.type, enabled=False):
        log_p, _, _ = policy._score(joined([seen_by(policy, problem, state) for state in states], policy))
    return [part.double().cpu().numpy() for part in log_p.split([len(state.allowed) for state in states])]


def seen_by(policy: EditPolicy, problem: Any, state: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the graph of a state, and its edits as pairs of nodes."""
    x, edge_index, edge_weight = problem.graph(state.instance, state.solution)
    if x.shape[1] != policy.in_features:
        raise ValueError(
            f"policy must have the in_features of the problem's graph, {x.shape[1]}, got {policy.in_features}"
        )
    nodes = getattr(problem, "nodes", None)
    pairs = state.allowed if nodes is None else nodes(state.instance, state.allowed)
    return x, edge_index, edge_weight, torch.from_numpy(np.ascontiguousarray(pairs))


def joined(graphs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], policy: EditPolicy) -> _Graphs:
    """Return graphs side by side, where the policy is."""
    sizes = torch.tensor([len(graph[0]) for graph in graphs])
    shifts = (sizes.cumsum(0) - sizes).tolist()
    like = policy.second.weight
    return _Graphs(
        torch.cat([graph[0] for graph in graphs]).to(like),
        torch.cat([graph[1] + shift for graph, shift in zip(graphs, shifts, strict=True)], 1).to(like.device),
        torch.cat([graph[2] for graph in graphs]).to(like),
        torch.cat([graph[3] + shift for graph, shift in zip(graphs, shifts, strict=True)]).to(like.device),
        torch.arange(len(graphs)).repeat_interleave(sizes).to(like.device),
        len(graphs),
    )
