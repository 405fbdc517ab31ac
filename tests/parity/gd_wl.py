"""Colours, cut vertices and bridges of 1,003 graphs, all connected ones of 3 to 7 nodes among them.

Further resistance distances, weighted and of a graph in two parts, hops, and attention.
"""

import numpy as np
import torch

from posterity.graphs import (
    GDAttention,
    biconnectivity,
    gd_wl_colors,
    resistance_distance,
    shortest_path_distance,
)

AGAINST = "networkx 3.6.1, and for colours and attention of brute force"


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    size, n_edges = (stored[name].astype(int) for name in ("size", "n_edges"))
    n, begin = int(size.sum()), size.cumsum() - size
    edges = torch.tensor(stored["edges"] + begin.repeat(n_edges))
    edge_index, batch = both_ways(edges), torch.arange(len(size)).repeat_interleave(torch.tensor(size))
    for distance in ("spd", "rd"):
        colors = gd_wl_colors(edge_index, n, distance=distance, batch=batch)
        yield f"{distance} colours", renamed(colors), renamed(stored[f"colors_{distance}"]), 0
    found = biconnectivity(edge_index, n)
    yield "cut vertices", found.cut_vertex, stored["cut_vertex"], 0
    yield "bridges", found.bridge, np.tile(stored["bridge"], 2), 0

    karate = both_ways(edges[:, -n_edges[-1] :] - begin[-1])
    yield "resistance, karate club", resistance_distance(karate, 34), stored["karate"], 1e-4
    weighted, conductance = (torch.tensor(stored[name]) for name in ("weighted_edges", "conductance"))
    resistance = resistance_distance(both_ways(weighted), 7, edge_weight=conductance.repeat(2))
    yield "resistance, weighted", resistance, stored["weighted"], 1e-4
    mixed = torch.tensor(stored["mixed_edges"])
    for name, of in (("mixed", resistance_distance), ("mixed_hops", shortest_path_distance)):
        distance = of(mixed, 7)
        distance[distance.isinf()] = -1.0  # as stored: infinities have no difference
        yield f"{of.__name__}, two parts", distance, stored[name], 1e-4

    attention = GDAttention(8, 2).double().eval()
    for k, part in enumerate((attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)):
        part.load_state_dict({name: torch.tensor(stored[name][k]) for name in ("weight", "bias")})
    inputs = [torch.tensor(stored[f"attention_{name}"]) for name in ("x", "bias", "mul", "mask")]
    yield "attention", attention(*inputs)[inputs[-1]], stored["attention"], 1e-9


def both_ways(edges):
    return torch.cat([edges, edges.flip(0)], 1)


def renamed(colors):
    """Return colours numbered by first appearance, so that equal partitions are equal."""
    _, first, inverse = np.unique(np.asarray(colors), return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]
