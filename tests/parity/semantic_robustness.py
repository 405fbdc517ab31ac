"""A block model's densities, orders of attack and robustness counts at 24 new nodes; label propagation."""

import torch

from posterity.graphs import (
    CSBM,
    SemanticRobustness,
    attack_candidates,
    bayes_robustness,
    model_robustness,
    propagate_labels,
)

AGAINST = "the authors' code (github.com/saper0/revisiting_robustness), and of the measures' formulas"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    t = {name: torch.tensor(value) for name, value in stored.items()}
    x, edge_index, y = t["x"], t["edge_index"].long(), t["y"].long()
    n, labelled = len(x), torch.arange(len(x))
    csbm = CSBM(n, within_degree=3.16, between_degree=0.74, K=1.5, sigma=1.0)
    yield "p, q and features", [csbm.p, csbm.q, csbm.n_features], stored["parameters"], 1e-9
    yield "mean", csbm.mean, stored["mean"], 1e-6

    def network(x, edge_index):  # two graph convolutions, dense
        a = torch.eye(len(x), dtype=torch.float64)
        a[edge_index[0], edge_index[1]] = 1.0
        a = a / (a.sum(1, keepdim=True) * a.sum(1)).sqrt()
        return a @ ((a @ (x @ t["weight1"].double())).relu() @ t["weight2"].double())

    def with_labels(x, edge_index):
        return propagate_labels(network(x, edge_index), y, labelled, edge_index, num_layers=50, alpha=0.7)

    density, counts = [], {"bayes": [], "model": [], "model_with_labels": []}
    for i, new_x in enumerate(t["new_x"]):
        near = t["new_neighbors"][i]
        near = near[near >= 0].long()
        links = torch.stack([near, torch.full_like(near, n)])
        graph = torch.cat([x, new_x[None]]), torch.cat([edge_index, links, links.flip(0)], 1)
        labels = torch.cat([y, t["new_y"][i : i + 1].long()])
        density.append(csbm.log_likelihood(*graph, labels, n))
        farthest, nearest = (
            attack_candidates(graph[0], labels, graph[1], n, kind=kind) for kind in ("l2", "l2-weak")
        )
        for name, order in {"farthest_first": farthest, "nearest_first": nearest}.items():
            theirs = stored[name][i]
            yield f"{name.replace('_', ' ')}, node {i}", order, theirs[theirs >= 0], 0
        label = int(labels[n])
        counts["bayes"].append(bayes_robustness(csbm, *graph, labels, n, nearest))
        counts["model"].append(model_robustness(network, *graph, n, label, nearest))
        if i < 12:
            counts["model_with_labels"].append(model_robustness(with_labels, *graph, n, label, nearest))
    yield "log-likelihoods", torch.stack(density), stored["log_likelihood"], 1e-3
    for name, values in counts.items():
        yield f"robustness, {name.replace('_', ' ')}", values, stored[name][: len(values)], 0

    found = SemanticRobustness(
        degree=t["degree"].long(), model=torch.tensor(counts["model"]), bayes=torch.tensor(counts["bayes"])
    )
    yield "measures", [found.over, found.adversarial, found.f1], stored["measures"], 1e-6
    rates = [found.violation_rate(budget) for budget in (2, "deg", "deg+2")]
    yield "violation rates", rates, stored["violation_rates"], 1e-9

    known, scores = t["known"].long(), t["scores"]
    for name, factor, options in (
        ("propagated", 1, {"num_layers": 50, "alpha": 0.7}),
        ("clamped", 3, {"num_layers": 7, "alpha": 0.9, "clamp": True, "normalize": False}),
    ):
        ours = propagate_labels(factor * scores, y[known], known, edge_index, **options)
        yield name, ours, stored[name], 1e-4
