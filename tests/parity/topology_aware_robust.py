"""Projections, priors of graphs, and weights along thirty steps in the settings of the official experiments."""

import torch

from posterity.transfer import TopologyAwareDRO, project_simplex, topology_prior

AGAINST = "the authors' code (github.com/joffery/TRO) in float64, without its rounding to three decimals"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    yield "projection", project_simplex(torch.tensor(stored["v"])), stored["projected"], 1e-12
    for graph, every, some in zip(stored["graphs"], stored["all"], stored["sources"], strict=True):
        adjacency = torch.tensor(graph).double()
        yield "prior", topology_prior(adjacency), every, 1e-12
        yield "prior of sources", topology_prior(adjacency, sources=range(6)), some, 1e-12
    for name, eta, strength in (("dg15", 1.0, 100.0), ("dg60", 0.1, 0.001), ("calm", 0.1, 2.0)):
        loss = TopologyAwareDRO(torch.tensor(stored["prior"]), eta=eta, strength=strength)
        for means, weights, value in zip(
            torch.tensor(stored["losses"]), stored[f"{name} weights"], stored[f"{name} values"], strict=True
        ):
            yield f"{name}, loss", loss(means), value, 1e-9
            yield f"{name}, weights", loss.weights, weights, 1e-9
