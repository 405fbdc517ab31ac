"""The layer, the collapse of strong edges with its error and bound, gains and heat kernels on the karate club."""

import numpy as np
import torch

from posterity.graphs import ResolventConv, apply_filter, collapse_bound, collapse_strong_edges, filter_gain

AGAINST = "explicit inverses, eigenvalues and matrix exponentials"
SHIFT = 2.0


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    edges, weight, mu, strong, x = (
        torch.tensor(stored[name]) for name in ("edges", "edge_weight", "node_weight", "strong", "x")
    )
    n = len(mu)
    edge_index, weight, strong = torch.cat([edges, edges.flip(0)], 1), weight.repeat(2), strong.repeat(2)

    conv = make(stored["weight"], stored["bias"], identity=True)
    yield "layer with identity", conv(x, edge_index, weight, mu), stored["y_identity"], 1e-8
    yield "gain", filter_gain(conv), stored["gain"], 1e-9
    spectrum = torch.tensor(stored["spectrum"])
    yield "gain on a spectrum", filter_gain(conv, spectrum=spectrum), stored["gain_on_spectrum"], 1e-9
    conv = make(stored["weight"], stored["bias"])
    yield "layer without", conv(x, edge_index, weight, mu), stored["y"], 1e-8

    coarse = collapse_strong_edges(edge_index, n, weight, strong, node_weight=mu)
    first = np.unique(stored["cluster"], return_index=True)[1]
    order = coarse.cluster[first]  # our names of the stored clusters
    yield "clusters", coarse.cluster, order[stored["cluster"]], 0
    yield "coarse node weights", coarse.node_weight[order], stored["coarse_node_weight"], 1e-9
    adjacency = torch.zeros(coarse.num_nodes, coarse.num_nodes, dtype=x.dtype)
    adjacency[tuple(coarse.edge_index)] = coarse.edge_weight
    yield "coarse edge weights", adjacency[order][:, order], stored["coarse_adjacency"], 1e-9
    coarse_graph = coarse.edge_index, coarse.edge_weight, coarse.node_weight
    low = resolvent(*coarse_graph)
    yield "coarse resolvent", low[order][:, order], stored["coarse_resolvent"], 1e-8
    lifted = coarse.lift(low @ coarse.project(torch.eye(n, dtype=x.dtype)))
    for k, strength in enumerate(stored["strength"]):
        stiff = torch.where(strong, weight * strength, weight)
        high = resolvent(edge_index, stiff, mu)
        yield f"resolvent at strength {strength:g}", high, stored["resolvent"][k], 1e-8
        error = torch.linalg.matrix_norm(mu[:, None].sqrt() * (high - lifted) / mu.sqrt(), 2)
        yield f"error at strength {strength:g}", error, stored["error"][k], 1e-6
        bound = collapse_bound(edge_index, n, stiff, strong, node_weight=mu, shift=SHIFT).value
        yield f"bound at strength {strength:g}", bound, stored["bound"][k], 1e-8

    for method in ("eig", "contour"):
        heat = apply_filter(lambda z: (-0.3 * z).exp(), x, edge_index, weight, mu, method=method)
        yield f"heat kernel, {method}", heat, stored["heat"], 1e-6
    one_way = torch.tensor(stored["one_way"])
    heat = apply_filter(lambda z: (-0.5 * z).exp(), x[:4], one_way, method="contour")
    yield "heat kernel, directed", heat, stored["heat_one_way"], 1e-6


def make(weight, bias, identity=False):
    conv = ResolventConv(5, 3, len(weight) - identity, shift=SHIFT, identity=identity).double()
    conv.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return conv


def resolvent(edge_index, edge_weight, node_weight):
    """Return what a layer of order 1 and unit weight makes of the unit vectors."""
    unit = torch.eye(len(node_weight), dtype=torch.float64)
    conv = ResolventConv(len(unit), len(unit), shift=SHIFT, bias=False).double()
    conv.weight.copy_(unit[None])
    return conv(unit, edge_index, edge_weight, node_weight)
