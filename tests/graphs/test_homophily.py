"""Measures of homophily against plain counting, PyG, scikit-learn and the published values."""

import itertools
import math
from collections import defaultdict
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from posterity.graphs import (
    adjusted_homophily,
    edge_homophily,
    label_informativeness,
    node_homophily,
)

PUBLIC = Path(__file__).parents[3] / "shared/data/graphs/heterophilous"

MEASURES = [edge_homophily, node_homophily, adjusted_homophily, label_informativeness]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def both_ways(edges):
    return torch.cat([edges, edges.flip(0)], 1)


def random_graph(n=12, m=30, classes=3, seed=0):
    return torch.randint(n, (2, m), generator=seeded(seed)), torch.randint(
        classes, (n,), generator=seeded(seed + 1)
    )


def by_loops(edge_index, y):
    """Return the four measures from a set of edges and plain counting."""
    edges = {frozenset(edge) for edge in edge_index.T.tolist() if edge[0] != edge[1]}
    near = defaultdict(list)
    for u, v in map(tuple, edges):
        near[u].append(v)
        near[v].append(u)
    label = y.tolist()
    inside = sum(label[u] == label[v] for u, v in map(tuple, edges)) / len(edges)
    node = np.mean([np.mean([label[u] == label[v] for v in near[u]]) for u in near])
    share, joint = defaultdict(float), defaultdict(float)
    for u in near:
        for v in near[u]:
            share[label[u]] += 1 / (2 * len(edges))
            joint[label[u], label[v]] += 1 / (2 * len(edges))
    chance = sum(p**2 for p in share.values())
    entropy = -sum(p * math.log(p) for p in share.values())
    mutual = sum(p * math.log(p / (share[c] * share[d])) for (c, d), p in joint.items())
    return inside, node, (inside - chance) / (1 - chance), mutual / entropy


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_plain_counting(seed):
    graph = random_graph(seed=seed)
    for measure, expected in zip(MEASURES, by_loops(*graph), strict=True):
        assert measure(*graph) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_see_neither_names_nor_directions_nor_repeats_nor_loops(measure):
    edges, y = random_graph(seed=3)
    order = torch.randperm(12, generator=seeded())
    place = torch.empty_like(order)
    place[order] = torch.arange(12)
    value = pytest.approx(measure(edges, y), abs=1e-12)
    assert measure(place[edges], y[order]) == value
    assert measure(both_ways(edges), y) == value
    assert measure(torch.cat([edges, edges[:, :9]], 1), y) == value
    assert measure(torch.cat([edges, torch.arange(12).expand(2, 12)], 1), y) == value
    assert measure(edges.flip(0).int(), 7 * y + 2) == value


@pytest.mark.parametrize("name", ["homophily of edges", "homophily of nodes"])
def test_homophily_is_pygs(name):
    pyg = pytest.importorskip("torch_geometric.utils")
    graph = nx.gnp_random_graph(20, 0.3, seed=1)
    edges, y = torch.tensor(list(graph.edges)).T, random_graph(20)[1]
    kind = name.split()[-1].rstrip("s")
    ours = {"edge": edge_homophily, "node": node_homophily}[kind](edges, y)
    assert ours == pytest.approx(pyg.homophily(both_ways(edges), y, method=kind), abs=1e-6)


def test_informativeness_is_mutual_information_over_entropy():
    edges = torch.tensor(list(nx.gnp_random_graph(20, 0.3, seed=1).edges)).T
    y = random_graph(20)[1]
    ends = y[both_ways(edges)].numpy()
    assert label_informativeness(edges, y) == pytest.approx(normalized_mutual_info_score(*ends))


@pytest.mark.parametrize("n", [4, 10])
def test_a_complete_graph_of_balanced_classes_is_as_homophilous_as_chance_without_return(n):
    edges = torch.tensor(list(itertools.combinations(range(n), 2))).T
    assert adjusted_homophily(edges, torch.arange(n) % 2) == pytest.approx(-1 / (n - 1), abs=1e-12)


def test_cliques_one_a_class_are_homophilous_by_every_measure():
    clique = torch.tensor(list(itertools.combinations(range(4), 2))).T
    edges, y = torch.cat([clique + 4 * k for k in range(3)], 1), torch.arange(12) // 4
    assert [measure(edges, y) for measure in MEASURES] == pytest.approx([1, 1, 1, 1], abs=1e-12)


def test_informativeness_sees_in_a_bipartite_graph_what_homophily_misses():
    edges, y = torch.cartesian_prod(torch.arange(3), torch.arange(3, 6)).T, torch.arange(6) // 3
    assert [measure(edges, y) for measure in MEASURES] == pytest.approx([0, 0, -1, 1], abs=1e-12)


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="needs the public files")
@pytest.mark.parametrize(
    ("name", "published"), [("minesweeper", (0.68, 0.01, 0.00)), ("tolokers", (0.59, 0.09, 0.01))]
)
def test_measures_of_public_graphs_are_the_published_ones(name, published):
    with np.load(PUBLIC / f"{name}.npz") as file:
        edges, y = torch.from_numpy(file["edges"]).T, torch.from_numpy(file["node_labels"])
    measures = edge_homophily, adjusted_homophily, label_informativeness
    assert [m(edges, y) for m in measures] == pytest.approx(published, abs=0.0051)


EDGES, Y = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[(lambda m=m: m(EDGES, Y.float()), "y must hold integers, got dtype torch.float32") for m in MEASURES],
        *[(lambda m=m: m(EDGES, Y - 1), "y must not be negative, got -1") for m in MEASURES],
        *[(lambda m=m: m(EDGES, Y[:3]), r"edge_index must name nodes in 0\.\.2 of y, got 3") for m in MEASURES],
        *[(lambda m=m: m(EDGES[:, :0], Y), "edge_index must hold an edge between two nodes") for m in MEASURES],
        *[(lambda m=m: m(EDGES[:1].expand(2, 3), Y), "edge_index must hold an edge") for m in MEASURES],
        *[(lambda m=m: m(EDGES, 0 * Y + 3), "y must have at least 2 classes at the ends of edges, got 1") for m in MEASURES[2:]],
        (lambda: adjusted_homophily(EDGES[:, :1], torch.tensor([0, 0, 1, 1])), "at least 2 classes"),
        (lambda: edge_homophily(EDGES.float(), Y), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: edge_homophily(EDGES[:1], Y), r"edge_index must have shape \(2, any\), got \(1, 3\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
