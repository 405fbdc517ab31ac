"""T-BGRL: link prediction without negative samples, repelled by a corrupted graph.

Two augmented views of a graph go through an online encoder with a predictor (q) and a slowly
following target encoder (y). Bootstrapping pulls q of one view to y of the other; a third,
corrupted view n, sent through the target alone, pushes away and needs no pairs:

    loss = lambda (cos(q1, n) + cos(q2, n)) - (1 - lambda) (cos(q1, y2) + cos(q2, y1)),  (1)

cos being the mean cosine over nodes. At lambda = 0 it is BGRL's loss less 2. What it buys is
that embeddings of nodes which come after training can still be told apart.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of, within
from posterity._random import draw_device
from posterity.graphs._graph import adjacency, check_edges, check_undirected

__all__ = [
    "TBGRL",
    "GCNEncoder",
    "InductiveLinkSplit",
    "LinkDecoder",
    "augment_graph",
    "bgrl_loss",
    "corrupt_graph",
    "cosine_schedule",
    "fit_link_decoder",
    "fit_tbgrl",
    "hits_at_k",
    "inductive_link_split",
    "tbgrl_loss",
]

CORRUPTIONS = (
    "shuffle-features", "random-features", "random-edges", "shuffle-features+random-edges",
    "random-features+random-edges", "random-features+random-count-edges", "sparsify",
)  # fmt: skip
Corruption = Literal[
    "shuffle-features", "random-features", "random-edges", "shuffle-features+random-edges",
    "random-features+random-edges", "random-features+random-count-edges", "sparsify",
]  # fmt: skip
View = tuple[Any, Tensor]  # features, edges


def bgrl_loss(
    q1: Float[Tensor, "nodes d"], y2: Float[Tensor, "nodes d"], q2: Float[Tensor, "nodes d"],
    y1: Float[Tensor, "nodes d"],
) -> Float[Tensor, ""]:  # fmt: skip
    """Return ``2 - cos(q1, y2) - cos(q2, y1)``, BGRL's loss.

    Parameters
    ----------
    q1, y2, q2, y1 : Tensor
        Predictions q and targets y of the two views.

    Returns
    -------
    Tensor
        A scalar in [0, 4].

    References
    ----------
    .. [1] Thakoor et al. Large-scale representation learning on graphs via bootstrapping.
       ICLR 2022.
    """
    _same_shape(q1=q1, y2=y2, q2=q2, y1=y1)
    return 2 - _cosine(q1, y2) - _cosine(q2, y1)


def tbgrl_loss(
    q1: Float[Tensor, "nodes d"], y2: Float[Tensor, "nodes d"], q2: Float[Tensor, "nodes d"],
    y1: Float[Tensor, "nodes d"], negative: Float[Tensor, "nodes d"], *, neg_lambda: float = 0.12,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the loss (1).

    Parameters
    ----------
    q1, y2, q2, y1 : Tensor
        Predictions q and targets y of the two views.
    negative : Tensor
        Target of the corrupted view.
    neg_lambda : float, default=0.12
        Weight of the repulsion, in [0, 1].

    Returns
    -------
    Tensor
        A scalar in [-2, 2].

    References
    ----------
    .. [1] Shiao et al. Link Prediction with Non-Contrastive Learning. ICLR 2023. Section 5.
    """
    _same_shape(q1=q1, y2=y2, q2=q2, y1=y1, negative=negative)
    within("neg_lambda", neg_lambda, 0, 1)
    apart = _cosine(q1, negative) + _cosine(q2, negative)
    return neg_lambda * apart - (1 - neg_lambda) * (_cosine(q1, y2) + _cosine(q2, y1))


class TBGRL(nn.Module):
    """Online encoder, predictor and target encoder, trained by (1).

    Parameters
    ----------
    encoder : nn.Module
        ``encoder(x, edge_index)`` returns (nodes, out_channels); it or parts of it have
        ``reset_parameters``, by which the target starts from weights of its own.
    out_channels : int
        Width of embeddings.
    predictor_hidden : int, default=512
        Width of the predictor's hidden layer.
    neg_lambda : float, default=0.12
        Weight of the repulsion, in [0, 1].

    Attributes
    ----------
    online_encoder, target_encoder : nn.Module
        The first is trained and embeds; the second follows it, see `update_target`.
    predictor : nn.Sequential
        Linear, PReLU, Linear.

    Raises
    ------
    ValueError
        If nothing in the encoder has ``reset_parameters``, or a parameter is out of range.

    References
    ----------
    .. [1] Shiao et al. Link Prediction with Non-Contrastive Learning. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import GCNEncoder, TBGRL, augment_graph, corrupt_graph
    >>> x, edge_index = torch.rand(4, 5), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    >>> model = TBGRL(GCNEncoder(5, 8, 8), 8)
    >>> views = [augment_graph(x, edge_index, drop_edge=0.5, drop_feature=0.2) for _ in range(2)]
    >>> model.loss(*views, corrupt_graph(x, edge_index)).backward()
    """

    def __init__(
        self, encoder: nn.Module, out_channels: int, *, predictor_hidden: int = 512, neg_lambda: float = 0.12
    ) -> None:
        super().__init__()
        integer("out_channels", out_channels, 1)
        integer("predictor_hidden", predictor_hidden, 1)
        self.neg_lambda = within("neg_lambda", neg_lambda, 0, 1)
        self.online_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder)
        _reset(self.target_encoder)
        for parameter in self.target_encoder.parameters():
            parameter.requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(out_channels, predictor_hidden), nn.PReLU(), nn.Linear(predictor_hidden, out_channels)
        )

    def loss(self, view1: View, view2: View, corrupted: View | None = None) -> Float[Tensor, ""]:
        """Return the loss of two views, repelled by a third.

        Parameters
        ----------
        view1, view2 : tuple of Tensor
            ``(x, edge_index)`` of two augmented graphs.
        corrupted : tuple of Tensor, optional
            A corrupted graph; without it the loss is BGRL's.

        Returns
        -------
        Tensor
            A scalar.
        """
        q1, q2 = (self.predictor(self.online_encoder(*view)) for view in (view1, view2))
        with torch.no_grad():
            y1, y2 = self.target_encoder(*view1), self.target_encoder(*view2)
            negative = None if corrupted is None else self.target_encoder(*corrupted)
        if negative is None:
            return bgrl_loss(q1, y2, q2, y1)
        return tbgrl_loss(q1, y2, q2, y1, negative, neg_lambda=self.neg_lambda)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target's parameters: ``momentum * target + (1 - momentum) * online``.

        Buffers, such as the statistics of batch normalisation, are left to the target.

        Parameters
        ----------
        momentum : float
            In [0, 1].
        """
        within("momentum", momentum, 0, 1)
        pairs = zip(self.target_encoder.parameters(), self.online_encoder.parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online, 1 - momentum)

    @torch.no_grad()
    def embed(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes out"]:
        """Return embeddings of the online encoder, in eval mode, without gradient.

        Parameters
        ----------
        x, edge_index : Tensor
            Any graph, also one with nodes that training has not seen.

        Returns
        -------
        Tensor
        """
        was = self.online_encoder.training
        self.online_encoder.eval()
        try:
            return self.online_encoder(x, edge_index)
        finally:
            self.online_encoder.train(was)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimiser should train: online encoder and predictor.

        Yields
        ------
        nn.Parameter
        """
        yield from self.online_encoder.parameters()
        yield from self.predictor.parameters()


class GCNEncoder(nn.Module):
    """Graph convolutions, each with batch normalisation and a PReLU.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int, default=256
        Width between layers.
    out_channels : int, default=128
        Width of embeddings.
    num_layers : int, default=2
        Layers.
    norm_momentum : float, default=0.99
        Of the running statistics, as torch means it: near 1 they are those of the last batch.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int = 256, out_channels: int = 128, *, num_layers: int = 2,
        norm_momentum: float = 0.99,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("in_channels", in_channels), ("hidden_channels", hidden_channels),
                            ("out_channels", out_channels), ("num_layers", num_layers)):  # fmt: skip
            integer(name, value, 1)
        within("norm_momentum", norm_momentum, 0, 1)
        self.in_channels = in_channels
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(a, b)) for a, b in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(b)) for _, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b, momentum=norm_momentum) for _, b in pairs)
        self.acts = nn.ModuleList(nn.PReLU() for _ in pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight, bias, norm, act in zip(self.weights, self.biases, self.norms, self.acts, strict=True):
            nn.init.xavier_uniform_(weight)
            nn.init.zeros_(bias)
            norm.reset_parameters()  # type: ignore[operator]
            nn.init.constant_(act.weight, 0.25)  # type: ignore[arg-type]

    def forward(
        self, x: "Float[Tensor, 'nodes features'] | _SparseFeatures", edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes out"]:
        """Return embeddings.

        Parameters
        ----------
        x : Tensor
            Features.
        edge_index : Tensor
            Row 0 sends, row 1 receives.

        Returns
        -------
        Tensor
        """
        if not isinstance(x, _SparseFeatures):
            has_shape("x", x, (None, self.in_channels))
        matrices = _gcn(check_edges(edge_index, len(x)), len(x), x.dtype)
        states: Any = x
        for weight, bias, norm, act in zip(self.weights, self.biases, self.norms, self.acts, strict=True):
            sparse = isinstance(states, _SparseFeatures)
            states = states.times(weight) if sparse else states @ weight
            states = act(norm(_Product.apply(states, *matrices) + bias))
        return states


def augment_graph(
    x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *, drop_edge: float,
    drop_feature: float, generator: torch.Generator | None = None,
) -> View:  # fmt: skip
    """Return a view of a graph: some edges gone, some feature columns zero.

    Parameters
    ----------
    x : Tensor
        Features.
    edge_index : Tensor
        Edges; each listed direction is dropped on its own.
    drop_edge, drop_feature : float
        Probabilities, in [0, 1).
    generator : torch.Generator, optional
        Decides what is dropped.

    Returns
    -------
    tuple of Tensor
        ``(x, edge_index)``.
    """
    within("drop_edge", drop_edge, 0, 1, open_high=True)
    within("drop_feature", drop_feature, 0, 1, open_high=True)
    return _augment(x, edge_index, drop_edge, drop_feature, generator)


def corrupt_graph(
    x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *,
    kind: Corruption = "shuffle-features+random-edges", generator: torch.Generator | None = None,
) -> View:  # fmt: skip
    """Return a graph that has little to do with the one given, for the repulsion.

    Parameters
    ----------
    x : Tensor
        Features.
    edge_index : Tensor
        Edges.
    kind : str, default="shuffle-features+random-edges"
        Features are shuffled among nodes or drawn from [0, 1); edges drawn uniformly, as
        many as before or up to a quarter more or fewer (``random-count-edges``);
        ``sparsify`` drops 95 % of edges and columns.
    generator : torch.Generator, optional
        Decides all of it.

    Returns
    -------
    tuple of Tensor
        ``(x, edge_index)``.
    """
    one_of("kind", kind, CORRUPTIONS)
    return _corrupt(x, edge_index, kind, generator)


def cosine_schedule(step: int, max_value: float, warmup_steps: int, total_steps: int) -> float:
    """Return a value that rises linearly to its maximum and falls to 0 along a half cosine.

    Parameters
    ----------
    step : int
        In [0, total_steps].
    max_value : float
        Reached after the warm-up.
    warmup_steps, total_steps : int
        The first may be 0 and is below the second.

    Returns
    -------
    float
        The value at ``step``.

    Examples
    --------
    >>> from posterity.graphs import cosine_schedule
    >>> [round(cosine_schedule(step, 1.0, 2, 6), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    integer("warmup_steps", warmup_steps, 0)
    if not integer("total_steps", total_steps) > warmup_steps:
        raise ValueError(f"total_steps must be above warmup_steps, got {total_steps} and {warmup_steps}")
    if not 0 <= integer("step", step) <= total_steps:
        raise ValueError(f"step must be in [0, {total_steps}], got {step}")
    if step < warmup_steps:
        return max_value * step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return max_value * (1 + math.cos(math.pi * done)) / 2


def fit_tbgrl(
    model: TBGRL, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *, epochs: int = 10_000,
    lr: float = 0.015, warmup: int = 1000, momentum: float = 0.91, weight_decay: float = 1e-5,
    drop_edge: tuple[float, float] = (0.8, 0.8), drop_feature: tuple[float, float] = (0.8, 0.1),
    corruption: Corruption | None = "shuffle-features+random-edges", patience: int | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:  # fmt: skip
    """Train a model in place on one graph and return its losses.

    Parameters
    ----------
    model : TBGRL
        On the device of the graph.
    x, edge_index : Tensor
        The graph that training sees.
    epochs : int, default=10_000
        Steps, each on the whole graph.
    lr : float, default=0.015
        Of AdamW; it warms up and falls along a cosine.
    warmup : int, default=1000
        Steps of the warm-up, fewer than ``epochs``.
    momentum : float, default=0.91
        Of the target at the start, from where it rises to 1.
    weight_decay : float, default=1e-5
        Of AdamW.
    drop_edge, drop_feature : tuple of float
        Probabilities for the two views, see `augment_graph`.
    corruption : str or None, default="shuffle-features+random-edges"
        See `corrupt_graph`; None is plain BGRL.
    patience : int, optional
        Stop after so many steps without a loss lower by 0.01.
    generator : torch.Generator, optional
        Decides views and corruptions.

    Returns
    -------
    list of float
        One a step.

    Notes
    -----
    The authors' settings for Cora are the defaults; CiteSeer: lr 0.008, momentum 0.94,
    ``neg_lambda=0.24``, edges (0.7, 0.3), features (0.9, 0.4), random features and edges.
    Features should have rows that sum to 1.
    """
    integer("epochs", epochs, 1)
    at_least("lr", lr, 0, strict=True)
    at_least("weight_decay", weight_decay, 0)
    within("momentum", momentum, 0, 1)
    if not integer("warmup", warmup, 0) < epochs:
        raise ValueError(f"warmup must be below epochs, got {warmup} and {epochs}")
    if corruption is not None:
        one_of("corruption", corruption, CORRUPTIONS)
    if patience is not None:
        integer("patience", patience, 1)
    for name, pair in (("drop_edge", drop_edge), ("drop_feature", drop_feature)):
        for value in pair:
            within(name, value, 0, 1, open_high=True)
    finite("x", floating("x", x))
    features: Any = x
    if (
        isinstance(model.online_encoder, GCNEncoder)
        and x.device.type == "cpu"
        and (x != 0).float().mean() < 0.1
    ):
        features = _SparseFeatures.of(x)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr, weight_decay=weight_decay)
    losses, best, idle = [], math.inf, 0
    model.train()
    for step in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, lr, warmup, epochs)
        first, second = (
            _augment(features, edge_index, edge, feature, generator)
            for edge, feature in zip(drop_edge, drop_feature, strict=True)
        )
        third = None if corruption is None else _corrupt(features, edge_index, corruption, generator)
        loss = model.loss(first, second, third)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(1 - cosine_schedule(step, 1 - momentum, 0, epochs))
        losses.append(float(loss.detach()))
        idle = 0 if losses[-1] < best - 0.01 else idle + 1
        best = losses[-1] if idle == 0 else best
        if patience is not None and idle >= patience:
            break
    model.eval()
    return losses


@dataclass(frozen=True)
class InductiveLinkSplit:
    """A graph cut for link prediction with nodes that training never sees.

    Message graphs list both directions of a link, lists of links one. What is for training
    numbers the observed nodes in their old order, what is for testing all nodes.

    Attributes
    ----------
    observed : Tensor of shape (nodes,), bool
        Nodes that training sees.
    train_x, train_edge_index : Tensor
        The graph for training.
    train_pos, val_pos, val_neg : Tensor of shape (2, any)
        Links among observed nodes, and as many pairs without a link as ``val_pos``.
    inference_edge_index : Tensor
        All links but those of the test, over all nodes.
    test_oo, test_ou, test_uu : Tensor of shape (2, any)
        Test links by whether both ends, one or none were observed.
    test_neg : Tensor of shape (2, any)
        Pairs without a link in the whole graph.
    """

    observed: Bool[Tensor, " nodes"]
    train_x: Float[Tensor, "observed features"]
    train_edge_index: Int[Tensor, "2 train_edges"]
    train_pos: Int[Tensor, "2 train"]
    val_pos: Int[Tensor, "2 val"]
    val_neg: Int[Tensor, "2 val"]
    inference_edge_index: Int[Tensor, "2 inference"]
    test_oo: Int[Tensor, "2 oo"]
    test_ou: Int[Tensor, "2 ou"]
    test_uu: Int[Tensor, "2 uu"]
    test_neg: Int[Tensor, "2 neg"]

    @property
    def test_pos(self) -> Int[Tensor, "2 test"]:
        """All test links."""
        return torch.cat([self.test_oo, self.test_ou, self.test_uu], 1)


def inductive_link_split(
    x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *, node_ratio: float = 0.3,
    edge_ratio: float = 0.3, val_ratio: float = 0.3, extra_ratio: float = 0.1,
    generator: torch.Generator | None = None,
) -> InductiveLinkSplit:  # fmt: skip
    """Hide nodes and links of a graph, so that embeddings of newcomers can be tested.

    Parameters
    ----------
    x : Tensor
        Features.
    edge_index : Tensor
        Undirected links in both directions; self-loops and repetitions are dropped.
    node_ratio : float, default=0.3
        Share of nodes that training does not see; the paper has 0.2 on large graphs.
    edge_ratio : float, default=0.3
        Share of the links of each class (both ends observed, one, none) that is for the test.
    val_ratio : float, default=0.3
        Share for validation of the links among observed nodes that are left.
    extra_ratio : float, default=0.1
        Share of the links among observed nodes that is known at inference only.
    generator : torch.Generator, optional
        Decides all of it.

    Returns
    -------
    InductiveLinkSplit
        Its parts are disjoint.

    Raises
    ------
    ValueError
        If a link lacks its reverse, or a part that is needed is empty.
    """
    for name, value in (("node_ratio", node_ratio), ("edge_ratio", edge_ratio), ("val_ratio", val_ratio),
                        ("extra_ratio", extra_ratio)):  # fmt: skip
        within(name, value, 0, 1, open_low=True, open_high=True)
    n = len(finite("x", floating("x", x)))
    links = _links(edge_index, n)
    observed = torch.ones(n, dtype=torch.bool)
    observed[
        torch.randperm(n, generator=generator, device=draw_device(generator))[: round(node_ratio * n)].cpu()
    ] = False
    ends = observed[links].sum(0)
    classes = []
    for seen in (2, 1, 0):
        members = links[:, ends == seen]
        order = torch.randperm(members.shape[1], generator=generator, device=draw_device(generator))
        members = members[:, order.cpu()]
        n_test = int(edge_ratio * members.shape[1])
        classes.append((members[:, :n_test], members[:, n_test:]))
    (test_oo, inside), (test_ou, rest_ou), (test_uu, rest_uu) = classes
    n_extra = int(extra_ratio * (test_oo.shape[1] + inside.shape[1]))
    extra, inside = inside[:, :n_extra], inside[:, n_extra:]
    n_val = int(val_ratio * inside.shape[1])
    place = torch.full((n,), -1)
    place[observed] = torch.arange(int(observed.sum()))
    val_pos, train_pos = place[inside[:, :n_val]], place[inside[:, n_val:]]
    for name, part in (("test_oo", test_oo), ("val_pos", val_pos), ("train_pos", train_pos)):
        if not part.shape[1]:
            among = int((ends == 2).sum())
            raise ValueError(f"{name} is empty: of {links.shape[1]} links {among} are among observed nodes")
    known = torch.cat([extra, inside, rest_ou, rest_uu], 1)
    val_neg = _non_links(place[inside], int(observed.sum()), n_val, generator)
    test_neg = _non_links(links, n, round(edge_ratio * links.shape[1]), generator)
    parts = (
        _both(train_pos), train_pos, val_pos, val_neg, _both(known), test_oo, test_ou, test_uu, test_neg
    )  # fmt: skip
    observed = observed.to(x.device)
    return InductiveLinkSplit(observed, x[observed], *(part.to(edge_index) for part in parts))


class LinkDecoder(nn.Module):
    """A small network on the product of two embeddings, which says whether they are linked.

    Parameters
    ----------
    in_channels : int
        Width of embeddings.
    hidden_channels : int, default=256
        Width of the hidden layer.
    """

    def __init__(self, in_channels: int, hidden_channels: int = 256) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        integer("hidden_channels", hidden_channels, 1)
        self.net = nn.Sequential(
            nn.Linear(in_channels, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, 1)
        )

    def forward(
        self, z: Float[Tensor, "nodes channels"], edge_index: Int[Tensor, "2 pairs"]
    ) -> Float[Tensor, " pairs"]:
        """Return a logit a pair; its order does not matter.

        Parameters
        ----------
        z : Tensor
            Embeddings.
        edge_index : Tensor
            Pairs of nodes.

        Returns
        -------
        Tensor
        """
        has_shape("z", z, (None, self.in_channels))
        return self.net(z[edge_index[0]] * z[edge_index[1]])[:, 0]


def fit_link_decoder(
    z: Float[Tensor, "nodes channels"], train_pos: Int[Tensor, "2 train"], val_pos: Int[Tensor, "2 val"],
    val_neg: Int[Tensor, "2 val_neg"], *, hidden_channels: int = 256, lr: float = 0.01, max_epochs: int = 5000,
    patience: int = 50, k: int = 50, generator: torch.Generator | None = None,
) -> LinkDecoder:  # fmt: skip
    """Return a decoder trained on frozen embeddings against fresh random pairs in every epoch.

    Parameters
    ----------
    z : Tensor
        Embeddings.
    train_pos, val_pos, val_neg : Tensor
        Links, and pairs without one.
    hidden_channels : int, default=256
        As for `LinkDecoder`.
    lr : float, default=0.01
        Of Adam.
    max_epochs : int, default=5000
        Most steps, each on all links.
    patience : int, default=50
        Stop after so many without a better Hits@k on the validation pairs.
    k : int, default=50
        See `hits_at_k`.
    generator : torch.Generator, optional
        Decides the weights and the random pairs.

    Returns
    -------
    LinkDecoder
        With the weights of the best epoch.
    """
    integer("max_epochs", max_epochs, 1)
    integer("patience", patience, 1)
    at_least("lr", lr, 0, strict=True)
    z = finite("z", floating("z", z)).detach()
    decoder = LinkDecoder(z.shape[1], hidden_channels).to(draw_device(generator) or "cpu")
    for layer in decoder.net:
        if isinstance(layer, nn.Linear):  # as torch draws them, but from the generator
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    decoder = decoder.to(z)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr)
    best, state, idle = -1.0, decoder.state_dict(), 0
    label = torch.cat([z.new_ones(train_pos.shape[1]), z.new_zeros(train_pos.shape[1])])
    for _ in range(max_epochs):
        u = torch.randint(len(z), (train_pos.shape[1],), generator=generator, device=draw_device(generator))
        # v is another node
        v = (u + torch.randint(1, len(z), u.shape, generator=generator, device=u.device)) % len(z)
        pairs = torch.cat([train_pos, torch.stack([u, v]).to(train_pos)], 1)
        loss = F.binary_cross_entropy_with_logits(decoder(z, pairs), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            hits = hits_at_k(decoder(z, val_pos), decoder(z, val_neg), k)
        idle += 1
        if hits > best:
            best, idle = hits, 0
            state = {name: value.clone() for name, value in decoder.state_dict().items()}
        if idle >= patience:
            break
    decoder.load_state_dict(state)
    return decoder


def hits_at_k(pos: Float[Tensor, " pos"], neg: Float[Tensor, " neg"], k: int = 50) -> float:
    """Return the share of positives that score above the k-th best negative.

    Parameters
    ----------
    pos, neg : Tensor
        Scores.
    k : int, default=50
        At least 1.

    Returns
    -------
    float
        In [0, 1]; 1 if there are fewer than k negatives, by OGB's rule.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import hits_at_k
    >>> hits_at_k(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.5, 0.2]), k=1)
    0.3333333333333333
    """
    integer("k", k, 1)
    if len(pos) == 0:
        raise ValueError("pos must not be empty")
    if len(neg) < k:
        return 1.0
    return float((pos > neg.topk(k).values[-1]).double().mean())


class _SparseFeatures:
    """Features of few nonzeros: a fixed sparse matrix, rows in another order, some columns out.

    ``(P X D) W = P (X (D W))``, so views need no new matrix, and the transposed one, for the
    gradient, is made once.
    """

    def __init__(
        self, base: Tensor, across: Tensor, order: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        self.base, self.across, self.order, self.kept = base, across, order, kept
        self.shape, self.dtype, self.device, self.ndim = base.shape, base.dtype, base.device, 2

    @classmethod
    def of(cls, x: Tensor) -> "_SparseFeatures":
        with warnings.catch_warnings():  # torch calls its CSR tensors beta
            warnings.simplefilter("ignore")
            return cls(x.to_sparse_csr(), x.T.contiguous().to_sparse_csr())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, order: Tensor) -> "_SparseFeatures":
        return _SparseFeatures(
            self.base, self.across, order if self.order is None else self.order[order], self.kept
        )

    def without_columns(self, kept: Tensor) -> "_SparseFeatures":
        kept = kept if self.kept is None else kept & self.kept
        return _SparseFeatures(self.base, self.across, self.order, kept)

    def times(self, weight: Tensor) -> Tensor:
        if self.kept is not None:
            weight = weight * self.kept[:, None].to(weight)
        out = _Product.apply(weight, self.base, self.across)
        return out if self.order is None else out[self.order]


class _Product(torch.autograd.Function):
    """A sparse matrix times a dense one; its transposed comes along for the gradient."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transposed @ grad, None, None


def _gcn(edge_index: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normalised adjacency with self-loops, rows receiving, and its transposed, as CSR."""
    loops = torch.arange(n, device=edge_index.device)
    kept = edge_index[:, edge_index[0] != edge_index[1]]
    send, receive = torch.cat([kept[0], loops]), torch.cat([kept[1], loops])
    scale = torch.bincount(receive, minlength=n).to(dtype).rsqrt()
    weight = scale[send] * scale[receive]
    return adjacency(send, receive, weight, n), adjacency(receive, send, weight, n)


def _augment(
    x: Any, edge_index: Tensor, drop_edge: float, drop_feature: float, generator: torch.Generator | None
) -> View:
    kept, columns = (
        torch.rand(size, generator=generator, device=draw_device(generator)).to(edge_index.device) >= share
        for size, share in ((edge_index.shape[1], drop_edge), (x.shape[1], drop_feature))
    )
    view = x.without_columns(columns) if isinstance(x, _SparseFeatures) else x * columns.to(x)
    return view, edge_index[:, kept]


def _corrupt(x: Any, edge_index: Tensor, kind: str, generator: torch.Generator | None) -> View:
    if kind == "sparsify":
        return _augment(x, edge_index, 0.95, 0.95, generator)
    n, count = len(x), edge_index.shape[1]
    if "shuffle-features" in kind:
        x = x[torch.randperm(n, generator=generator, device=draw_device(generator)).to(x.device)]
    elif "random-features" in kind:
        x = torch.rand(x.shape, generator=generator, device=draw_device(generator), dtype=x.dtype).to(
            x.device
        )
    if "count" in kind:
        low, high = math.ceil(0.75 * count), math.ceil(1.25 * count)
        count = int(torch.randint(low, high + 1, (), generator=generator, device=draw_device(generator)))
    if "edges" in kind:
        edge_index = torch.randint(n, (2, count), generator=generator, device=draw_device(generator)).to(
            edge_index
        )
    return x, edge_index


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1, eps=1e-8).mean()


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(floating(name, tensor).shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"predictions and targets must have one shape, got {shapes}")


def _reset(encoder: nn.Module) -> None:
    if hasattr(encoder, "reset_parameters"):
        encoder.reset_parameters()  # type: ignore[operator]
        return
    parts = [part for part in encoder.modules() if hasattr(part, "reset_parameters")]
    if not parts:
        raise ValueError(
            f"encoder must have reset_parameters, or parts that have, so that the target starts apart; got {type(encoder).__name__}"
        )
    for part in parts:
        part.reset_parameters()  # type: ignore[operator]


def _links(edge_index: Tensor, n: int) -> Tensor:
    """Return each undirected link once, smaller node first."""
    u, v = check_undirected(edge_index, n).cpu()
    key = (u * n + v)[u < v].unique()
    return torch.stack([key // n, key % n])


def _both(links: Tensor) -> Tensor:
    return torch.cat([links, links.flip(0)], 1)


def _non_links(links: Tensor, n: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Return ``count`` different pairs u < v that are no links, uniformly."""
    taken = links.min(0).values * n + links.max(0).values
    free = n * (n - 1) // 2 - len(taken)
    if free < count:
        raise ValueError(f"edge_index leaves {free} pairs without a link, {count} are needed")
    found = taken.new_zeros(0)
    while len(found) < count:
        pair = torch.randint(n, (2, 2 * count + 16), generator=generator, device=draw_device(generator)).to(
            links
        )
        key = pair.min(0).values * n + pair.max(0).values
        key = key[(pair[0] != pair[1]) & ~torch.isin(key, taken)]
        both = torch.cat([found, key])
        values, inverse = torch.unique(both, return_inverse=True)
        first = torch.full_like(values, len(both)).scatter_reduce(0, inverse, torch.arange(len(both)), "amin")
        found = both[first.sort().values][:count]  # in the order in which they were drawn, so uniform
    return torch.stack([found // n, found % n])
