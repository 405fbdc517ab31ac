"""Evaluation under heterophily: tell learning from leaked duplicates and from weak baselines.

Three questions about a graph where unlike nodes connect, and what answers them:

- What can labels say of their neighbours' labels? The share of edges inside classes depends
  on how many classes there are and how large. With p_k the share of edge ends in class k,

      adjusted homophily = (h_edge - sum_k p_k^2) / (1 - sum_k p_k^2)               (1)

  is 0 when ends are independent, and label informativeness I(y_u; y_v) / H(y_u) is 1 also
  where unlike labels determine each other.
- Has the test been seen? Nodes with equal neighbours and label, one of them in training.
- Does a plain network do as well? Any aggregation, in blocks x <- x + module(norm(x)), with
  a node's own features kept apart from its neighbours'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, needs, one_of, within
from posterity._random import draw_device
from posterity.graphs._graph import check_edges, csr

__all__ = [
    "DuplicateReport",
    "HeterophilyGNN",
    "NodeResult",
    "ProtocolResult",
    "adjacency_features",
    "adjusted_homophily",
    "duplicate_leakage",
    "edge_homophily",
    "find_duplicate_nodes",
    "fit_node_classifier",
    "label_informativeness",
    "minesweeper",
    "node_homophily",
    "remove_duplicate_nodes",
    "run_protocol",
    "sgc_features",
]

Model = Literal["ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"]
Direction = Literal["out", "in", "both"]


def edge_homophily(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return the share of edges whose ends have one label.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Read as undirected: each edge once or in both directions, self-loops ignored.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If there is no edge, or ``edge_index`` or ``y`` does not fit.
    """
    return float(_joint(edge_index, y).trace())


def node_homophily(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return the mean over nodes with neighbours of the share of these that have the node's label.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        As for `edge_homophily`.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        As for `edge_homophily`.
    """
    u, v, label = _undirected(edge_index, y)
    ends = np.concatenate([u, v])
    degree = np.bincount(ends)
    same = np.bincount(ends, np.tile(label[u] == label[v], 2))
    return float((same[degree > 0] / degree[degree > 0]).mean())


def adjusted_homophily(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return edge homophily less what chance gives, equation 1.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        As for `edge_homophily`.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        At most 1, which means that no edge leaves a class; may be negative.

    Raises
    ------
    ValueError
        As for `edge_homophily`, or if all edges join one class to itself.

    References
    ----------
    .. [1] Platonov et al. A critical look at the evaluation of GNNs under heterophily. ICLR 2023.

    Examples
    --------
    Two edges inside classes, one between them, and equal shares of edge ends:

    >>> import torch
    >>> from posterity.graphs import adjusted_homophily, edge_homophily
    >>> path, y = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 0, 1, 1])
    >>> round(edge_homophily(path, y), 4), round(adjusted_homophily(path, y), 4)
    (0.6667, 0.3333)
    """
    joint = _joint(edge_index, y, classes=2)
    chance = float(np.square(joint.sum(axis=1)).sum())
    return (float(joint.trace()) - chance) / (1 - chance)


def label_informativeness(edge_index: Int[Tensor, "2 edges"], y: Int[Tensor, " nodes"]) -> float:
    """Return how much of a label's entropy its neighbour's label removes.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        As for `edge_homophily`.
    y : Tensor of shape (nodes,)
        Labels, not negative.

    Returns
    -------
    float
        In [0, 1] up to rounding: 0 for independent ends, 1 if each label determines the other.

    Raises
    ------
    ValueError
        As for `adjusted_homophily`.

    Examples
    --------
    Ends that always differ are as informative as ends that always agree:

    >>> import torch
    >>> from posterity.graphs import label_informativeness
    >>> label_informativeness(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 1, 0, 1]))
    1.0
    """
    joint = _joint(edge_index, y, classes=2)
    return 2 - _entropy(joint.data) / _entropy(joint.sum(axis=1))


@dataclass(frozen=True)
class DuplicateReport:
    """What duplicates there are, and how many of the test's answers they give away.

    Attributes
    ----------
    num_groups : int
        Groups of more than one node.
    num_nodes : int
        Nodes in them.
    num_surplus : int
        Nodes that would go if each group kept one.
    leaked_share : float or Tensor
        Share of test nodes with a twin in training; one value a split.
    """

    num_groups: int
    num_nodes: int
    num_surplus: int
    leaked_share: float | Tensor


def find_duplicate_nodes(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    *,
    y: Int[Tensor, " nodes"] | None = None,
    x: Float[Tensor, "nodes features"] | None = None,
    direction: Direction = "out",
) -> Int[Tensor, " nodes"]:
    """Return the group of each node: equal neighbour sets, and equal labels and features if given.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges as listed, row 0 to row 1; repeats count once, a self-loop makes a node its own neighbour.
    num_nodes : int
        How many nodes there are.
    y : Tensor of shape (nodes,), optional
        Labels that must agree.
    x : Tensor of shape (nodes, features), optional
        Features that must agree bit for bit.
    direction : {"out", "in", "both"}, default="out"
        Whether to compare the nodes a node sends to, those it receives from, or both.

    Returns
    -------
    Tensor
        Shape (nodes,): ids from 0 in the order of first members. A node without neighbours
        in ``direction`` is alone.

    Raises
    ------
    ValueError
        If the arguments do not fit or ``direction`` is unknown.

    Examples
    --------
    Nodes 0 and 1 both send to 2 and 3:

    >>> import torch
    >>> from posterity.graphs import find_duplicate_nodes
    >>> find_duplicate_nodes(torch.tensor([[0, 0, 1, 1, 2], [2, 3, 3, 2, 3]]), 4)
    tensor([0, 0, 1, 2])
    """
    n = integer("num_nodes", num_nodes, 1)
    check_edges(edge_index, n, source="num_nodes", read=True)
    one_of("direction", direction, ("out", "in", "both"))
    node = torch.arange(n, device=edge_index.device)
    # All that must agree becomes one set of codes a node: neighbours, label, features.
    sender, receiver = edge_index.long()
    rows = {"out": [sender], "in": [receiver], "both": [sender, receiver]}[direction]
    codes = {"out": [receiver], "in": [sender], "both": [receiver, sender + n]}[direction]
    alone = torch.bincount(torch.cat(rows), minlength=n) == 0
    rows.append(node[alone])
    codes.append(2 * n + node[alone])
    if y is not None:
        rows.append(node)
        codes.append(3 * n + torch.unique(_check_labels(y, n), return_inverse=True)[1])
    if x is not None and has_shape("x", floating("x", x), (n, None), "num_nodes").shape[1]:
        rows.append(node)
        bits = x.detach().contiguous().view(torch.uint8)
        codes.append(4 * n + torch.unique(bits, dim=0, return_inverse=True)[1].to(node.device))
    pairs = torch.unique(torch.cat(rows) * (5 * n) + torch.cat(codes))
    row = pairs // (5 * n)
    code = pairs - row * (5 * n)
    size = torch.bincount(row, minlength=n)
    start = size.cumsum(0) - size

    # Equal sets have equal sums of random weights; the rare false friends are told apart below.
    hashes = _random_weights(5 * n, row.device).index_select(0, code)
    a, b = size.new_zeros(n, 2).index_add_(0, row, hashes).T
    a, b = torch.unique(a, return_inverse=True)[1], torch.unique(b, return_inverse=True)[1]
    bucket = torch.unique(a * n + b, return_inverse=True)[1]
    first, left = node.clone(), node
    while len(left):
        lowest = node.new_full((n,), n).scatter_reduce(0, bucket[left], left, "amin")[bucket[left]]
        same = size[left] == size[lowest]
        a, b = left[same], lowest[same]
        place = torch.arange(int(size[a].sum()), device=a.device)
        owner = torch.arange(len(a), device=a.device).repeat_interleave(size[a])
        place = place - (size[a].cumsum(0) - size[a])[owner]
        differ = (
            code[start[a].index_select(0, owner) + place] != code[start[b].index_select(0, owner) + place]
        )
        same[same.clone()] = torch.bincount(owner[differ], minlength=len(a)) == 0
        first[left[same]] = lowest[same]
        left = left[~same]
    return torch.unique(first, return_inverse=True)[1]


def duplicate_leakage(
    groups: Int[Tensor, " nodes"], train_mask: Bool[Tensor, "*splits nodes"], test_mask: Bool[Tensor, "*splits nodes"]
) -> DuplicateReport:  # fmt: skip
    """Return what duplicates there are and the share of test nodes with a training twin.

    Parameters
    ----------
    groups : Tensor of shape (nodes,)
        Of `find_duplicate_nodes`.
    train_mask : Tensor of shape (nodes,) or (splits, nodes)
        The nodes whose labels are trained on.
    test_mask : Tensor of the same shape
        The nodes that are tested.

    Returns
    -------
    DuplicateReport
        Its ``leaked_share`` is a float for one split, else a tensor of shape (splits,).

    Raises
    ------
    ValueError
        If shapes do not fit, or masks overlap or are empty.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import duplicate_leakage
    >>> train, test = torch.tensor([True, False, True, False]), torch.tensor([False, True, False, True])
    >>> duplicate_leakage(torch.tensor([0, 0, 1, 2]), train, test)
    DuplicateReport(num_groups=1, num_nodes=2, num_surplus=1, leaked_share=0.5)
    """
    has_shape("groups", groups, (None,))
    splits = train_mask.shape[:-1] if train_mask.ndim == 2 else ()
    train, test = _check_masks({"train_mask": train_mask, "test_mask": test_mask}, (*splits, len(groups)))
    _, group, count = torch.unique(groups, return_inverse=True, return_counts=True)
    train, test = train.view(-1, len(group)), test.view(-1, len(group))
    seen = torch.zeros(len(train), len(count), device=group.device).index_add_(1, group, train.float())
    share = ((seen[:, group] > 0) & test).sum(1) / test.sum(1)
    twins = count[count > 1]
    return DuplicateReport(
        len(twins), int(twins.sum()), len(group) - len(count), share if splits else float(share)
    )


def remove_duplicate_nodes(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    *,
    y: Int[Tensor, " nodes"] | None = None,
    x: Float[Tensor, "nodes features"] | None = None,
    direction: Direction = "out",
) -> tuple[Int[Tensor, " kept"], Int[Tensor, "2 kept_edges"]]:
    """Return the nodes that stay when each group keeps its best connected, and their edges.

    Parameters
    ----------
    edge_index, num_nodes, y, x, direction
        As for `find_duplicate_nodes`.

    Returns
    -------
    kept : Tensor of shape (kept,)
        Of each group the node of largest degree, in and out, or the first of several; ascending.
    edge_index : Tensor of shape (2, kept_edges)
        The edges among them, which count the kept nodes from 0.

    Raises
    ------
    ValueError
        As for `find_duplicate_nodes`.

    Notes
    -----
    Where others are connected to a removed node, they lose a neighbour and may become equal
    in turn: then call it again. A node that only repeats another's neighbours is sent to by none.
    """
    groups = find_duplicate_nodes(edge_index, num_nodes, y=y, x=x, direction=direction)
    once = torch.unique(edge_index, dim=1)
    degree = torch.bincount(once.flatten(), minlength=num_nodes)
    top = degree.new_zeros(num_nodes).scatter_reduce(0, groups, degree, "amax")
    best = (degree == top[groups]).nonzero()[:, 0]
    kept = groups.new_full((num_nodes,), num_nodes).scatter_reduce(0, groups[best], best, "amin")
    kept = kept[kept < num_nodes].sort().values
    place = edge_index.new_full((num_nodes,), -1)
    place[kept] = torch.arange(len(kept), dtype=place.dtype, device=place.device)
    edges = place[edge_index]
    return kept, edges[:, (edges >= 0).all(0)]


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
        check_edges(edge_index, len(x), source="x")
        graph = None
        if self.model != "ResNet":
            graph = _graph(edge_index, len(x), loops=self.model in ("GCN", "GAT", "GT"), heads=self.num_heads)
            if self.model in ("GCN", "SAGE"):
                graph = _weighted(graph, x.dtype, symmetric=self.model == "GCN")
        x = F.gelu(self.dropout(self.input_linear(x)))
        for module in self.residual_modules:
            x = module(x, graph)
        return self.output_linear(self.output_normalization(x))


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
    check_edges(edge_index, len(x), source="x")
    graph = _weighted(_graph(edge_index, len(x), loops=True), x.dtype, symmetric=True)
    for _ in range(integer("num_props", num_props, 1)):
        x = _product(graph.weight, x, graph)
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
    check_edges(edge_index, integer("num_nodes", num_nodes, 1), source="num_nodes", read=True)
    dense = torch.zeros(num_nodes, num_nodes, device=edge_index.device)
    dense[edge_index[0], edge_index[1]] = 1
    return dense.fill_diagonal_(0)


@dataclass(frozen=True)
class NodeResult:
    """How a trained node classifier does.

    Attributes
    ----------
    metric : {"roc_auc", "accuracy"}
        For two classes, and for more.
    val : float
        Its best value on validation nodes.
    test : float
        Its value on test nodes at that step.
    best_step : int
        The first step with this value, from 1.
    """

    metric: str
    val: float
    test: float
    best_step: int


def fit_node_classifier(
    model: nn.Module,
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    y: Int[Tensor, " nodes"],
    train_mask: Bool[Tensor, " nodes"],
    val_mask: Bool[Tensor, " nodes"],
    test_mask: Bool[Tensor, " nodes"],
    *,
    lr: float = 3e-5,
    weight_decay: float = 0.0,
    num_steps: int = 1000,
    warmup_steps: int = 0,
    eval_every: int = 1,
) -> NodeResult:
    """Train a network on one split by AdamW, full batches, and test it where validation is best.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(x, edge_index)``; returns (nodes, 1) for two classes, which are
        ranked, else (nodes, classes). It is left in eval mode with the weights of the best
        step. Its dropout draws from torch's global generator.
    x : Tensor of shape (nodes, features)
        Features.
    edge_index : Tensor of shape (2, edges)
        Edges.
    y : Tensor of shape (nodes,)
        Labels from 0.
    train_mask, val_mask, test_mask : Tensor of shape (nodes,)
        Disjoint parts, none empty.
    lr : float, default=3e-5
        Learning rate, positive.
    weight_decay : float, default=0.0
        Of weights; biases and normalisations are spared.
    num_steps : int, default=1000
        Steps.
    warmup_steps : int, default=0
        Steps over which the learning rate grows linearly.
    eval_every : int, default=1
        Steps between evaluations; the last step is always evaluated.

    Returns
    -------
    NodeResult
        Area under the ROC curve for two classes, else accuracy.

    Raises
    ------
    ValueError
        If an argument does not fit, masks overlap or are empty, for two classes a part has
        only one, or the network's outputs stop being finite.
    """
    _check_task(x, edge_index, y, train_mask, val_mask, test_mask)
    at_least("lr", lr, 0, strict=True)
    at_least("weight_decay", weight_decay, 0)
    for name, value, low in (("num_steps", num_steps, 1), ("warmup_steps", warmup_steps, 0), ("eval_every", eval_every, 1)):  # fmt: skip
        integer(name, value, low)
    classes = int(y.max()) + 1
    binary = classes <= 2
    learn = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learn if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learn if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / (warmup_steps + 1)))
    train_y = y[train_mask]
    result = NodeResult("roc_auc" if binary else "accuracy", -1.0, -1.0, 0)
    state: dict[str, Tensor] = {}
    for step in range(1, num_steps + 1):
        model.train()
        scores = model(x, edge_index)
        if step == 1:
            wanted = 1 if binary else max(classes, scores.shape[-1])
            has_shape("model(x, edge_index)", scores, (len(x), wanted), f"{classes} classes")
        if binary:
            loss = F.binary_cross_entropy_with_logits(scores[train_mask, 0], train_y.to(scores.dtype))
        else:
            loss = F.cross_entropy(scores[train_mask], train_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        if step % eval_every and step != num_steps:
            continue
        model.eval()
        with torch.no_grad():
            scores = model(x, edge_index)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"model(x, edge_index) must be finite, got NaN or infinity after {step} steps, lr {lr}"
            )
        val = _value(scores[val_mask], y[val_mask])
        if val > result.val:
            result = NodeResult(result.metric, val, _value(scores[test_mask], y[test_mask]), step)
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return result


@dataclass(frozen=True)
class ProtocolResult:
    """How a kind of network does over splits, its depth chosen by validation.

    Attributes
    ----------
    best_num_layers : int
        The depth of the best mean validation value; of equal ones the first.
    mean, std : float
        Of the test values at this depth; std with ddof 1, NaN for one split.
    values : Tensor of shape (splits,)
        The test values at this depth.
    val_means : dict of int to float
        The mean validation value of each depth.
    """

    best_num_layers: int
    mean: float
    std: float
    values: Tensor
    val_means: dict[int, float]


def run_protocol(
    make_model: Callable[[int], nn.Module],
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    y: Int[Tensor, " nodes"],
    train_masks: Bool[Tensor, "splits nodes"],
    val_masks: Bool[Tensor, "splits nodes"],
    test_masks: Bool[Tensor, "splits nodes"],
    *,
    num_layers: Sequence[int] = (1, 2, 3, 4, 5),
    **fit: Any,
) -> ProtocolResult:
    """Train a network of each depth on each split; report the depth that validates best.

    Parameters
    ----------
    make_model : callable
        ``make_model(num_layers)`` returns a fresh network, called once a depth and split.
    x, edge_index, y
        As for `fit_node_classifier`.
    train_masks, val_masks, test_masks : Tensor of shape (splits, nodes)
        The parts of each split.
    num_layers : sequence of int, default=(1, 2, 3, 4, 5)
        Depths.
    **fit
        Options of `fit_node_classifier`.

    Returns
    -------
    ProtocolResult
        Test values at one depth for all splits.

    Raises
    ------
    ValueError
        As for `fit_node_classifier`, with the number of the split.
    """
    has_shape("train_masks", train_masks, (None, len(y)), "y")
    for name, masks in (("val_masks", val_masks), ("test_masks", test_masks)):
        has_shape(name, masks, train_masks.shape, "train_masks")
    if not len(num_layers) or not len(train_masks):
        raise ValueError(
            f"there must be a depth and a split, got {len(num_layers)} depths and {len(train_masks)} splits"
        )
    splits = list(zip(train_masks, val_masks, test_masks, strict=True))
    for k, parts in enumerate(splits):
        _check_task(x, edge_index, y, *parts, where=f" of split {k}")
    results = {
        depth: [fit_node_classifier(make_model(depth), x, edge_index, y, *parts, **fit) for parts in splits]
        for depth in num_layers
    }
    val_means = {depth: float(np.mean([r.val for r in found])) for depth, found in results.items()}
    best = max(val_means, key=lambda depth: val_means[depth])
    values = torch.tensor([r.test for r in results[best]], dtype=torch.float64)
    std = float(values.std()) if len(values) > 1 else float("nan")
    return ProtocolResult(best, float(values.mean()), std, values, val_means)


def minesweeper(
    height: int = 100,
    width: int = 100,
    *,
    mine_rate: float = 0.2,
    unknown_rate: float = 0.5,
    generator: torch.Generator | None = None,
) -> Any:
    """Return a board of Minesweeper as a graph: find the mines from the numbers.

    Parameters
    ----------
    height, width : int, default=100
        Size of the board.
    mine_rate : float, default=0.2
        Share of fields that are mines.
    unknown_rate : float, default=0.5
        Share of fields whose number is hidden.
    generator : torch.Generator, optional
        Decides both.

    Returns
    -------
    torch_geometric.data.Data
        ``x`` of shape (nodes, 7): one-hot, column 0 for a hidden number, column 1 + k for
        k mines around, 5 for more than 5. ``edge_index`` joins a field to its up to eight
        neighbours, both ways; ``y`` is 1 for a mine. Fields are counted row by row.

    Raises
    ------
    ValueError
        If a size or rate is out of range.

    Examples
    --------
    >>> from posterity.graphs import minesweeper
    >>> board = minesweeper(10, 10)
    >>> int(board.y.sum()), int(board.x[:, 0].sum()), board.edge_index.shape
    (20, 50, torch.Size([2, 684]))
    """
    n = integer("height", height, 1) * integer("width", width, 1)
    mines = round(within("mine_rate", mine_rate, 0, 1) * n)
    hidden = round(within("unknown_rate", unknown_rate, 0, 1) * n)
    data = needs("torch_geometric.data", "graphs").Data
    order, again = (
        torch.randperm(n, generator=generator, device=draw_device(generator)).cpu() for _ in range(2)
    )
    y = torch.zeros(n, dtype=torch.long)
    y[order[:mines]] = 1
    field = torch.arange(n).view(height, width)
    ways = [
        (field[:, :-1], field[:, 1:]), (field[:-1], field[1:]),
        (field[:-1, :-1], field[1:, 1:]), (field[:-1, 1:], field[1:, :-1]),
    ]  # fmt: skip
    half = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in ways], 1)
    edge_index = torch.cat([half, half.flip(0)], 1)
    around = y.new_zeros(n).index_add_(0, edge_index[1], y[edge_index[0]])
    column = 1 + around.clamp_max(5)
    column[again[:hidden]] = 0
    return data(x=F.one_hot(column, 7).to(torch.get_default_dtype()), edge_index=edge_index, y=y)


class _FeedForward(nn.Module):
    def __init__(self, in_channels: int, inner: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_channels, inner), nn.Linear(inner, out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, graph: "_Graph | None") -> Tensor:
        return self.dropout(self.linear_2(F.gelu(self.dropout(self.linear_1(x)))))


class _Residual(nn.Module):
    def __init__(self, normalization: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.normalization, self.module = normalization, module

    def forward(self, x: Tensor, graph: "_Graph | None") -> Tensor:
        return x + self.module(self.normalization(x), graph)


class _Convolution(nn.Module):
    """A sum over neighbours with the graph's weights; kept apart from the node's own for SAGE."""

    def __init__(self, feed_forward: nn.Module, apart: bool) -> None:
        super().__init__()
        self.feed_forward_module, self.apart = feed_forward, apart

    def forward(self, x: Tensor, graph: "_Graph") -> Tensor:
        message = _product(graph.weight, x, graph)
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

    def forward(self, x: Tensor, graph: "_Graph") -> Tensor:
        z = self.input_linear(x)
        u, v = self.attn_linear_u(z).T.flatten(), self.attn_linear_v(z).T.flatten()
        scores = F.leaky_relu(u.index_select(0, graph.sender) + v.index_select(0, graph.receiver), 0.2)
        rows = z.view(len(z), -1, self.heads).permute(2, 0, 1).reshape(len(u), -1)  # the head is last
        message = _attend(scores, rows, graph)
        message = message.view(self.heads, len(z), -1).permute(1, 2, 0).reshape(z.shape)
        return self.feed_forward_module(torch.cat([z, message], 1) if self.apart else message, graph)


class _Transformer(nn.Module):
    """Attention of transformers along edges, in which the sender gives the query."""

    def __init__(self, width: int, heads: int, dropout: float, apart: bool) -> None:
        super().__init__()
        self.heads, self.apart = heads, apart
        self.attn_query, self.attn_key, self.attn_value = (nn.Linear(width, width) for _ in range(3))
        self.output_linear = nn.Linear(width * (2 if apart else 1), width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, graph: "_Graph") -> Tensor:
        n, width = x.shape
        q, k, v = (
            part(x).view(n, self.heads, -1).transpose(0, 1).reshape(n * self.heads, -1)
            for part in (self.attn_query, self.attn_key, self.attn_value)
        )
        scores = _dots(q / (width // self.heads) ** 0.5, k, graph)
        message = _attend(scores, v, graph).view(self.heads, n, -1).transpose(0, 1).reshape(n, width)
        return self.dropout(self.output_linear(torch.cat([x, message], 1) if self.apart else message))


class _Graph(NamedTuple):
    """Edges sorted by receiver, one copy of the graph a head, as the parts of CSR matrices."""

    sender: Tensor
    receiver: Tensor
    pointers: Tensor  # where each receiver's edges begin
    turn: Tensor  # from the order by receiver to that by sender
    turned_pointers: Tensor
    weight: Tensor


def _graph(edge_index: Tensor, n: int, *, loops: bool, heads: int = 1) -> _Graph:
    sender, receiver = edge_index[:, edge_index[0] != edge_index[1]]
    if loops:
        node = torch.arange(n, dtype=sender.dtype, device=sender.device)
        sender, receiver = torch.cat([sender, node]), torch.cat([receiver, node])
    order = receiver.argsort(stable=True)
    sender, receiver = sender[order], receiver[order]
    turn = sender.argsort(stable=True)
    copy = torch.arange(heads, device=turn.device)[:, None]
    sender, receiver = (sender + n * copy).flatten(), (receiver + n * copy).flatten()
    turn = (turn + turn.numel() * copy).flatten()
    pointers = [
        F.pad(torch.bincount(ends, minlength=heads * n).cumsum(0), (1, 0)) for ends in (receiver, sender)
    ]
    return _Graph(sender, receiver, pointers[0], turn, pointers[1], turn.new_zeros(0))


def _weighted(graph: _Graph, dtype: torch.dtype, *, symmetric: bool) -> _Graph:
    """Return the graph with 1/sqrt(d_u d_v) or 1/d_v as the weight of an edge from u to v."""
    scale = graph.pointers.diff().to(dtype).pow(-0.5)
    other = graph.sender if symmetric else graph.receiver
    return graph._replace(weight=scale[graph.receiver] * scale[other])


class _Product(torch.autograd.Function):
    """Sum over a node's incoming edges of weight times the sender's row, as a CSR product."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(weight, x)
        return csr(graph.pointers, graph.sender, weight) @ x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (weight, x), graph = ctx.saved_tensors, ctx.graph
        to_weight = _edge_dots(x, gradient, graph) if ctx.needs_input_grad[0] else None
        to_x = _turned(weight, graph) @ gradient if ctx.needs_input_grad[1] else None
        return to_weight, to_x, None


class _Dots(torch.autograd.Function):
    """Product of the sender's row of q and the receiver's row of k, for each edge."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(q, k)
        return _edge_dots(q, k, graph)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (q, k), graph = ctx.saved_tensors, ctx.graph
        return _turned(gradient, graph) @ k, csr(graph.pointers, graph.sender, gradient) @ q, None


def _edge_dots(q: Tensor, k: Tensor, graph: _Graph) -> Tensor:
    sent = q.index_select(0, graph.sender)  # copies whole rows, which indexing by [] does not on CPU
    return sent.mul_(k.index_select(0, graph.receiver)).sum(1)


def _product(weight: Tensor, x: Tensor, graph: _Graph) -> Tensor:
    return _Product.apply(weight, x, graph) if len(graph.sender) else torch.zeros_like(x)  # type: ignore[return-value]


def _dots(q: Tensor, k: Tensor, graph: _Graph) -> Tensor:
    return _Dots.apply(q, k, graph) if len(graph.sender) else q.new_zeros(0)  # type: ignore[return-value]


def _attend(scores: Tensor, x: Tensor, graph: _Graph) -> Tensor:
    """Return the mean of the senders' rows under the softmax of the scores of incoming edges."""
    top = scores.new_full((len(x),), -torch.inf).scatter_reduce(0, graph.receiver, scores.detach(), "amax")
    weight = (scores - top.index_select(0, graph.receiver)).exp()
    total = _product(weight, torch.cat([x, torch.ones_like(x[:, :1])], 1), graph)
    return total[:, :-1] / total[:, -1:].clamp_min(1)  # the largest weight is 1; 0 where no edge comes in


def _turned(weight: Tensor, graph: _Graph) -> Tensor:
    return csr(graph.turned_pointers, graph.receiver[graph.turn], weight[graph.turn])


def _undirected(edge_index: Tensor, y: Tensor) -> tuple[ndarray, ndarray, ndarray]:
    """Return both ends of each undirected edge, once, and the labels counted from 0."""
    label = np.unique(_check_labels(y).cpu().numpy(), return_inverse=True)[1]
    check_edges(edge_index, len(y), source="y", read=True)
    u, v = edge_index.long().cpu().numpy()
    pairs = (np.minimum(u, v) * len(y) + np.maximum(u, v))[u != v]
    if not len(pairs):
        raise ValueError("edge_index must hold an edge between two nodes, got none")
    pairs, _ = np.unique(pairs, return_counts=True)  # asked for counts, numpy sorts; else it hashes, slowly
    u = pairs // len(y)
    return u, pairs - u * len(y), label


def _joint(edge_index: Tensor, y: Tensor, classes: int = 1) -> Any:
    """Return the shares of pairs of labels over the ordered ends of edges, sparse."""
    u, v, label = _undirected(edge_index, y)
    k = int(label.max()) + 1
    code, count = np.unique(label[u] * k + label[v], return_counts=True)
    pairs = sparse.csr_array((count / (2 * len(u)), (code // k, code % k)), shape=(k, k))
    joint = pairs + pairs.T
    present = int((joint.sum(axis=1) > 0).sum())
    if present < classes:
        raise ValueError(f"y must have at least {classes} classes at the ends of edges, got {present}")
    return joint


def _entropy(shares: ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _random_weights(n: int, device: torch.device) -> Tensor:
    """Return two 64-bit numbers for each code; what is exact is decided elsewhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (n, 2), generator=generator).to(device)


def _value(scores: Tensor, y: Tensor) -> float:
    """Return accuracy, or for one column of scores the area under the ROC curve by ranks."""
    if scores.shape[1] > 1:
        return float((scores.argmax(1) == y).double().mean())
    _, place, count = torch.unique(scores[:, 0], return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place].double()  # ties share their mean rank
    positive = int(y.sum())
    wins = float(rank[y == 1].sum()) - positive * (positive + 1) / 2
    return wins / (positive * (len(y) - positive))


def _check_labels(y: Any, n: int | None = None) -> Tensor:
    has_shape("y", y, (n,), "" if n is None else "the nodes")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"y must hold integers, got dtype {y.dtype}")
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"y must not be negative, got {int(y.min())}")
    return y


def _check_masks(masks: dict[str, Tensor], shape: tuple[int, ...], where: str = "") -> list[Tensor]:
    taken: Tensor | None = None
    for name, mask in masks.items():
        has_shape(f"{name}{where}", mask, shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}{where} must be a mask of bool, got dtype {mask.dtype}")
        if not bool(mask.any(-1).all()):
            raise ValueError(f"{name}{where} must not be empty")
        if taken is not None and bool((taken & mask).any()):
            raise ValueError(f"{name}{where} must not overlap the other masks")
        taken = mask if taken is None else taken | mask
    return list(masks.values())


def _check_task(
    x: Any, edge_index: Any, y: Any, train: Tensor, val: Tensor, test: Tensor, where: str = ""
) -> None:
    has_shape("x", floating("x", x), (None, None))
    check_edges(edge_index, len(x), source="x", read=True)
    _check_labels(y, len(x))
    _check_masks({"train_mask": train, "val_mask": val, "test_mask": test}, (len(x),), where)
    if int(y.max()) <= 1:
        for name, mask in (("val_mask", val), ("test_mask", test)):
            if len(y[mask].unique()) < 2:
                raise ValueError(f"{name}{where} must hold both classes for the ROC curve, got one")
