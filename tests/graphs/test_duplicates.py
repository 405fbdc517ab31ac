"""Groups of duplicate nodes against sets, planted copies, and the public graphs that have them."""

from collections import defaultdict
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch

from posterity.graphs import (
    duplicate_leakage,
    duplicates,
    find_duplicate_nodes,
    remove_duplicate_nodes,
)
from posterity.lab.data import load_graph

SHARED = Path(__file__).parents[3] / "shared/data"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public files")
@pytest.mark.parametrize("name", ["chameleon", "squirrel"])
def test_public_duplicates_leak_and_the_cleaned_files_hardly_do(monkeypatch, name):
    monkeypatch.setenv("POSTERITY_DATA", str(SHARED))
    shares = []
    for version in (name, f"{name}_filtered"):
        graph = load_graph(version)
        n, (senders, receivers) = len(graph.y), graph.edge_index.numpy()  # sorted by sender, then receiver
        near = np.split(receivers, np.searchsorted(senders, np.arange(1, n)))
        keys = defaultdict(list)
        for node, label in enumerate(graph.y.tolist()):
            keys[near[node].tobytes() or node, label].append(node)
        groups = find_duplicate_nodes(graph.edge_index, n, y=graph.y)
        report = duplicate_leakage(groups, graph.train, graph.test)
        assert report.num_groups == sum(len(members) > 1 for members in keys.values())
        assert report.num_surplus == n - len(keys)
        shares.append(float(report.leaked_share.mean()))
    assert shares[0] > 0.35
    assert shares[1] < 0.05


def groups_by_sets(edges, n, y, x, direction):
    keys = {}
    for node in range(n):
        out = frozenset(v for u, v in edges.T.tolist() if u == node)
        back = frozenset(u for u, v in edges.T.tolist() if v == node)
        near = {"out": (out,), "in": (back,), "both": (out, back)}[direction]
        key = (
            near if any(near) else node,
            None if y is None else int(y[node]),
            None if x is None else x[node].numpy().tobytes(),
        )
        keys.setdefault(key, []).append(node)
    groups = torch.empty(n, dtype=torch.long)
    for k, members in enumerate(keys.values()):
        groups[members] = k
    return groups


@pytest.mark.parametrize("direction", ["out", "in", "both"])
@pytest.mark.parametrize(("with_y", "with_x"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("colliding", [False, True])
def test_groups_are_those_of_sets_even_when_all_hashes_collide(
    monkeypatch, direction, with_y, with_x, colliding
):
    if colliding:
        zeros = lambda n, device: torch.zeros(n, 2, dtype=torch.long)  # noqa: E731
        monkeypatch.setattr(duplicates, "_random_weights", zeros)
    found = 0
    for seed in range(6):
        n = 24
        edges = torch.randint(4, (2, 30), generator=seeded(seed))
        edges[0] = (
            edges[0] + torch.randint(6, (30,), generator=seeded(seed + 50)) * 4
        )  # loops and repeats too
        edges = edges if seed % 2 else edges.flip(0)
        y = torch.randint(2, (n,), generator=seeded(seed)) if with_y else None
        x = torch.randint(2, (n, 1), generator=seeded(seed + 9)).float() if with_x else None
        groups = find_duplicate_nodes(edges, n, y=y, x=x, direction=direction)
        assert torch.equal(groups, groups_by_sets(edges, n, y, x, direction))
        found += n - int(groups.max()) - 1
    assert found or direction == "both"


def test_features_agree_bit_for_bit():
    edges = torch.tensor([[0, 1, 2, 3, 4], [5, 5, 5, 5, 5]])
    x = torch.tensor([0.0, -0.0, torch.nan, torch.nan, 0.0, 1.0])[:, None]
    assert find_duplicate_nodes(edges, 6, x=x).tolist() == [0, 1, 2, 2, 0, 3]
    assert find_duplicate_nodes(edges, 6, x=x[:, :0]).tolist() == [0, 0, 0, 0, 0, 1]


def test_nodes_without_neighbours_in_the_direction_are_alone():
    edges = torch.tensor([[0, 1], [2, 2]])
    assert find_duplicate_nodes(edges, 5).tolist() == [0, 0, 1, 2, 3]
    assert find_duplicate_nodes(edges, 5, direction="in").tolist() == [0, 1, 2, 3, 4]
    assert find_duplicate_nodes(edges[:, :0], 3, direction="both").tolist() == [0, 1, 2]


def planted(seed, copies=3):
    """Return edges, labels and the base of each node: copies of ten nodes that nothing is sent to."""
    n = 40
    edges = torch.tensor(list(nx.gnp_random_graph(n, 0.3, seed=seed, directed=True).edges)).T
    y = torch.randint(3, (n,), generator=seeded(seed))
    base = torch.cat([torch.arange(n), torch.arange(10).repeat(copies)])
    more = [torch.stack([torch.full_like(out, node), out])
            for node in range(n, len(base)) for out in [edges[1, edges[0] == base[node]]]]  # fmt: skip
    return torch.cat([edges, *more], 1), y[base], base, edges


@pytest.mark.parametrize("seed", range(3))
def test_planted_copies_are_found_and_their_removal_restores_the_base(seed):
    edges, y, base, bare = planted(seed)
    assert torch.equal(find_duplicate_nodes(edges, 70, y=y), base)
    kept, rest = remove_duplicate_nodes(edges, 70, y=y)
    assert torch.equal(kept, torch.arange(40))  # the base node has the incoming edges
    assert torch.equal(rest, bare)
    again, same = remove_duplicate_nodes(rest, len(kept), y=y[kept])
    assert torch.equal(again, torch.arange(40))
    assert torch.equal(same, rest)


def test_of_a_group_the_best_connected_stays_and_of_equals_the_first():
    edges = torch.tensor([[0, 1, 2, 3, 4, 4, 4], [5, 5, 6, 6, 1, 1, 6]])
    kept, rest = remove_duplicate_nodes(edges, 7)  # 0 and 1 send to 5; 2 and 3 to 6; 1 is sent to
    assert kept.tolist() == [1, 2, 4, 5, 6]
    assert rest.tolist() == [[0, 1, 2, 2, 2], [3, 4, 0, 0, 4]]
    repeated = torch.tensor([[0, 0, 0, 1, 3], [2, 2, 2, 2, 1]])
    assert remove_duplicate_nodes(repeated, 4)[0].tolist() == [1, 2, 3]  # a repeat adds no degree


def test_leakage_counts_test_nodes_with_a_training_twin():
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    train = torch.tensor([[1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1, 1]]).bool()
    test = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0, 0]]).bool()
    report = duplicate_leakage(groups, train, test)
    assert (report.num_groups, report.num_nodes, report.num_surplus) == (2, 5, 3)
    torch.testing.assert_close(report.leaked_share, torch.tensor([0.5, 0.25]))
    assert duplicate_leakage(groups, train[1], test[1]).leaked_share == 0.25


EDGES, Y = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 1, 0, 1])
X, HALVES = torch.randn(4, 3), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_duplicate_nodes(EDGES, 0), "num_nodes must be an integer of at least 1"),
        (lambda: find_duplicate_nodes(EDGES, 3), r"edge_index must name nodes in 0\.\.2 of num_nodes, got 3"),
        (lambda: find_duplicate_nodes(EDGES - 1, 4), r"edge_index must name nodes in 0\.\.3 of num_nodes, got -1"),
        (lambda: find_duplicate_nodes(EDGES, 4, direction="up"), "direction must be one of 'out', 'in', 'both', got 'up'"),
        (lambda: find_duplicate_nodes(EDGES, 4, y=Y[:2]), r"y must have shape \(4\) for the nodes, got \(2,\)"),
        (lambda: find_duplicate_nodes(EDGES, 4, y=Y.bool()), "y must hold integers, got dtype torch.bool"),
        (lambda: find_duplicate_nodes(EDGES, 4, x=X[:2]), r"x must have shape \(4, any\) for num_nodes"),
        (lambda: find_duplicate_nodes(EDGES, 4, x=Y[:, None]), "x must be a floating-point tensor"),
        (lambda: remove_duplicate_nodes(EDGES, 4, direction="up"), "direction must be one of"),
        (lambda: duplicate_leakage(Y, HALVES[0], HALVES[0]), "test_mask must not overlap"),
        (lambda: duplicate_leakage(Y, HALVES[0], HALVES[0] & False), "test_mask must not be empty"),
        (lambda: duplicate_leakage(Y, HALVES, HALVES.flip(0)[:, :3]), r"test_mask must have shape \(2, 4\)"),
        (lambda: duplicate_leakage(Y, HALVES[0].long(), HALVES[1]), "train_mask must be a mask of bool, got dtype torch.int64"),
        (lambda: duplicate_leakage(Y.float(), HALVES[0], HALVES[1]), "groups must hold integers, got dtype torch.float32"),
        (lambda: duplicate_leakage(Y - 9, HALVES[0], HALVES[1]), "groups must not be negative"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
