"""Claims about T-BGRL: a cheap corruption makes embeddings generalise to nodes that come later."""

import numpy as np
import torch

from posterity.claims import Count, NotNegative, Several, Share, Trial, comparison
from posterity.graphs import (
    TBGRL,
    GCNEncoder,
    InductiveLinkSplit,
    fit_link_decoder,
    fit_tbgrl,
    hits_at_k,
    inductive_link_split,
)
from posterity.lab.data import Graph, GraphData, dataset, load_graph
from posterity.lab.data.graph import graph_data
from posterity.lab.nets import weights


@dataset(Graph, "communities")
def communities(seed: int, n: int = 2_000, n_groups: int = 20, n_words: int = 600) -> GraphData:
    """Return a social network of 20 communities with uneven popularity and 18 words a node."""
    rng = np.random.default_rng(seed)
    group = rng.integers(n_groups, size=n)
    popular = np.minimum(rng.pareto(2.5, n) + 1, 10)

    def ends(size: int, groups: np.ndarray | None) -> np.ndarray:
        if groups is None:
            return rng.choice(n, size, p=popular / popular.sum())
        out = np.empty(size, dtype=int)
        for g in np.unique(groups):
            members = np.flatnonzero(group == g)
            rows = np.flatnonzero(groups == g)
            out[rows] = rng.choice(members, len(rows), p=popular[members] / popular[members].sum())
        return out

    n_edges = 5 * n // 2
    inside = int(0.8 * n_edges)
    u = ends(n_edges, None)
    v = np.concatenate([ends(inside, group[u[:inside]]), ends(n_edges - inside, None)])
    edges = np.stack([u, v], 1)[u != v]
    topics = rng.random((n_groups, n_words)) ** 8
    background = rng.random(n_words) ** 4
    x = np.zeros((n, n_words), np.float32)
    for node in range(n):
        for law in (topics[group[node]], background):
            x[node, rng.choice(n_words, 9, p=law / law.sum())] = 1
    return graph_data(x / x.sum(1, keepdims=True), edges, group)


def _both_ways(graph: GraphData) -> torch.Tensor:
    return torch.cat([graph.edge_index, graph.edge_index.flip(0)], 1)


def _fits(data: GraphData, **_: object) -> None:
    """Refuse a graph with too few links to hold some of each kind out, as only a small one has."""
    if data.edge_index.shape[1] < 100_000:
        inductive_link_split(data.x, _both_ways(data), generator=torch.Generator().manual_seed(0))


@comparison(
    paper="t-bgrl",
    says="The cheap corruption makes non-contrastive embeddings generalise to new nodes.",
    where="Shiao et al., Section 5",
    arms=("bgrl", "t-bgrl"),
    metric="Hits@50 of test links in the inductive setting",
    better="higher",
    smallest={"epochs": 4, "decoder_epochs": 4, "n_splits": 1},
    check=_fits,
)
def newcomers(
    trial: Trial,
    data: Graph = "communities",
    neg_lambda: NotNegative = 0.3,
    hidden: Count = 64,
    width: Count = 32,
    norm_momentum: Share = 0.01,
    epochs: Several = 150,
    decoder_epochs: Count = 200,
    n_splits: Count = 6,
) -> dict[str, float]:
    """Train on part of a graph, then predict links of nodes and links that were not there.

    Both arms have the same split, initial weights, augmentation, optimiser and budget, and
    a decoder of their own; the second arm adds the corrupted view. On Cora the authors have
    hidden 256, width 128, ``norm_momentum=0.99``, ``neg_lambda=0.12`` and 10,000 epochs;
    a trial is the mean over ``n_splits`` splits, as they differ much. The records have Hits@50 by
    how many ends of a link were observed.
    """
    graph = load_graph(data, seed=trial.seed)
    undirected = _both_ways(graph)
    x = graph.x / graph.x.sum(1, keepdim=True).clamp_min(1e-12) if bool((graph.x >= 0).all()) else graph.x
    hits: dict[str, list[float]] = {"bgrl": [], "t-bgrl": []}
    parts: dict[str, list[float]] = {}
    for k in range(n_splits):
        seed = 1000 * k + trial.seed
        split = inductive_link_split(x, undirected, generator=torch.Generator().manual_seed(seed))
        for arm in hits:
            encoder = weights(GCNEncoder, x.shape[1], hidden, width, norm_momentum=norm_momentum, seed=seed)
            model = weights(
                TBGRL, encoder, width, predictor_hidden=2 * width, neg_lambda=neg_lambda, seed=seed
            )
            generator = torch.Generator().manual_seed(seed)
            corruption = None if arm == "bgrl" else "shuffle-features+random-edges"
            losses = fit_tbgrl(
                model, split.train_x, split.train_edge_index, max_epochs=epochs, warmup_steps=max(1, epochs // 10),
                corruption=corruption, generator=generator,
            )  # fmt: skip
            for step in range(0, len(losses), 10):
                trial.track(f"loss, {arm}", step, losses[step])
            for name, value in _test(model, x, split, decoder_epochs, seed).items():
                (hits[arm] if name == "all" else parts.setdefault(f"Hits@50 {name}, {arm}", [])).append(value)
    for name, values in parts.items():
        trial.record(name, np.mean(values))
    return {arm: float(np.mean(values)) for arm, values in hits.items()}


def _test(
    model: TBGRL, x: torch.Tensor, split: InductiveLinkSplit, epochs: int, seed: int
) -> dict[str, float]:
    """Return Hits@50 of all test links and of those with both ends, one and none observed."""
    z = model.embed(split.train_x, split.train_edge_index)
    decoder = fit_link_decoder(
        z, split.train_pos, split.val_pos, split.val_neg, max_epochs=epochs,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    z = model.embed(x, split.inference_edge_index)
    with torch.no_grad():
        negative = decoder(z, split.test_neg)
        parts = {
            "all": split.test_pos,
            "both observed": split.test_oo,
            "one": split.test_ou,
            "none": split.test_uu,
        }
        return {
            name: hits_at_k(decoder(z, links), negative) for name, links in parts.items() if links.shape[1]
        }
