"""Predicting links, also of nodes that come later: the split, the decoder, the metric.

A share of the nodes and of the links is hidden from training. A decoder on frozen embeddings
scores a pair by a small network on the product of its two, and Hits@k is the share of hidden
links that score above the k-th best of random pairs without one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, within
from posterity._precision import wide
from posterity._random import draw_device
from posterity._stopping import Best
from posterity.graphs._graph import check_edges, check_undirected, ordinary

__all__ = ["InductiveLinkSplit", "LinkDecoder", "fit_link_decoder", "hits_at_k", "inductive_link_split"]


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
    n = len(has_shape("x", finite("x", floating("x", x)), (None, None)))
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
            raise ValueError(
                f"{name} is empty: of {links.shape[1]} links in edge_index {among} are among observed nodes"
            )
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
        has_shape("z", floating("z", z), (None, self.in_channels), "this network")
        return self._scores(z, check_edges(edge_index, len(z), source="z"))

    def _scores(self, z: Tensor, pairs: Tensor) -> Tensor:
        return self.net(z[pairs[0]] * z[pairs[1]])[:, 0]


@torch.inference_mode(False)  # with gradients, wherever it is called from
@torch.enable_grad()
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
        With the weights of the best epoch, in the dtype of ``z``; trained in float32 at least.

    Raises
    ------
    ValueError
        If a parameter is out of range, the arguments do not fit, ``z`` is not finite or has fewer
        than two rows, or there are no links.
    """
    for name, value in (("max_epochs", max_epochs), ("patience", patience), ("k", k)):
        integer(name, value, 1)
    at_least("lr", lr, 0, strict=True)
    has_shape("z", finite("z", floating("z", z)), (None, None))
    if len(z) < 2 or not z.shape[1]:
        raise ValueError(f"z must have at least two rows and a column, got {tuple(z.shape)}")
    train_pos, val_pos, val_neg = (
        ordinary(check_edges(pairs, len(z), name=name, source="z", read=True))
        for name, pairs in (("train_pos", train_pos), ("val_pos", val_pos), ("val_neg", val_neg))
    )
    for name, pairs in (("train_pos", train_pos), ("val_pos", val_pos)):
        if not pairs.shape[1]:
            raise ValueError(f"{name} must not be empty")
    z, dtype = wide(ordinary(z.detach())), z.dtype
    decoder = LinkDecoder(z.shape[1], hidden_channels).to(draw_device(generator) or "cpu")
    for layer in decoder.net:
        if isinstance(layer, nn.Linear):  # as torch draws them, but from the generator
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    decoder = decoder.to(z)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=lr)
    best = Best(decoder, patience)
    label = torch.cat([z.new_ones(train_pos.shape[1]), z.new_zeros(train_pos.shape[1])])
    for _ in range(max_epochs):
        u = torch.randint(len(z), (train_pos.shape[1],), generator=generator, device=draw_device(generator))
        # v is another node
        v = (u + torch.randint(1, len(z), u.shape, generator=generator, device=u.device)) % len(z)
        pairs = torch.cat([train_pos, torch.stack([u, v]).to(train_pos)], 1)
        loss = F.binary_cross_entropy_with_logits(wide(decoder._scores(z, pairs)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            hits = hits_at_k(decoder._scores(z, val_pos), decoder._scores(z, val_neg), k)
        if best.stop(-hits):
            break
    best.restore()
    return decoder.to(dtype)


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

    Raises
    ------
    ValueError
        If ``k`` is out of range, scores are no floating-point vectors, or ``pos`` is empty.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import hits_at_k
    >>> hits_at_k(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.5, 0.2]), k=1)
    0.3333333333333333
    """
    integer("k", k, 1)
    for name, scores in (("pos", pos), ("neg", neg)):
        has_shape(name, floating(name, scores), (None,))
    if len(pos) == 0:
        raise ValueError("pos must not be empty")
    if len(neg) < k:
        return 1.0
    return float((pos > neg.topk(k).values[-1]).double().mean())


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
