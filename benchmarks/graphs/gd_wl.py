"""Race colours, resistances and biconnectivity with plain loops, pseudo-inverses and networkx.

Run from the repository root: ``python -m benchmarks.graphs.gd_wl``.
"""

import networkx as nx
import torch

from benchmarks.timing import race
from posterity.graphs import biconnectivity, gd_wl_colors, resistance_distance, shortest_path_distance


def edges(graph):
    half = torch.tensor(list(graph.edges)).T
    return torch.cat([half, half.flip(0)], 1), len(graph)


def dictionary_colors(distance):
    """Refine with a dictionary of sorted tuples."""
    rows = [[round(d, 6) for d in row] for row in distance.tolist()]
    now, classes = [0] * len(rows), 1
    while True:
        keys = [tuple(sorted(zip(row, now, strict=True))) for row in rows]
        names = {key: k for k, key in enumerate(dict.fromkeys(keys))}
        if len(names) == classes:
            return now
        now, classes = [names[key] for key in keys], len(names)


def pseudo_inverse(laplacian):
    """Resistances of one connected graph by the pseudo-inverse, as the official code takes it."""
    inverse = torch.linalg.pinv(laplacian, hermitian=False)
    diagonal = inverse.diagonal()
    return diagonal[:, None] + diagonal[None] - 2 * inverse


def laplacian(edge_index, n):
    out = torch.zeros(n, n, dtype=torch.float64)
    out[edge_index[0], edge_index[1]] = -1
    return out - torch.diag(out.sum(1))


def connected(n, p, seed):
    graph = nx.gnp_random_graph(n, p, seed=seed)
    return graph if nx.is_connected(graph) else connected(n, p, seed + 1000)


def main() -> None:
    torch.set_num_threads(1)
    ring = nx.connected_watts_strogatz_graph(400, 4, 0.1, seed=0)
    e, n = edges(ring)
    hops = shortest_path_distance(e, n).double()
    race("colours of 400 nodes from hops, against a dictionary of tuples",
         lambda: gd_wl_colors(e, n, distance=hops), lambda: dictionary_colors(hops), target=20, rounds=5)  # fmt: skip
    many = [edges(connected(25, 0.2, seed)) for seed in range(1000)]
    whole = torch.cat([part + 25 * k for k, (part, _) in enumerate(many)], 1)
    batch = torch.arange(1000).repeat_interleave(25)
    matrices = [laplacian(*one) for one in many]
    race("resistances of 1,000 graphs of 25 nodes, against a loop of pseudo-inverses",
         lambda: resistance_distance(whole, 25_000, batch=batch),
         lambda: [pseudo_inverse(m) for m in matrices], target=5, rounds=5)  # fmt: skip
    large, size = edges(nx.connected_watts_strogatz_graph(1000, 6, 0.2, seed=1))
    matrix = laplacian(large, size)
    race("resistances of 1,000 nodes, against the pseudo-inverse",
         lambda: resistance_distance(large, size), lambda: pseudo_inverse(matrix), target=5, rounds=3)  # fmt: skip
    graph = nx.connected_watts_strogatz_graph(300, 6, 0.2, seed=2)
    e, n = edges(graph)
    race("resistances of 300 nodes, against networkx",
         lambda: resistance_distance(e, n), lambda: nx.resistance_distance(graph), target=20, rounds=3)  # fmt: skip
    sparse = nx.gnm_random_graph(5_000, 7_000, seed=3)
    e, n = edges(sparse)

    def theirs() -> None:
        list(nx.articulation_points(sparse)), list(nx.bridges(sparse))
        list(nx.biconnected_component_edges(sparse))

    race("biconnectivity of 5,000 nodes and 7,000 edges, against networkx", lambda: biconnectivity(e, n), theirs,
         target=1, rounds=5)  # fmt: skip


if __name__ == "__main__":
    main()
