"""Eigenvectors and eigenspaces against known spectra, networkx and each other."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from posterity.graphs import AddLaplacianEigs, SignNet, eigenspaces, laplacian_eigs


def edges_of(graph):
    pairs = torch.tensor(list(graph.edges), dtype=torch.long).reshape(-1, 2).T
    return torch.cat([pairs, pairs.flip(0)], 1)


def random_graph(n=9, seed=0):
    return edges_of(nx.gnp_random_graph(n, 0.4, seed=seed))


@pytest.mark.parametrize("n", [3, 4, 7, 12])
def test_the_spectrum_of_a_cycle_is_known(n):
    eigvals, eigvecs = laplacian_eigs(edges_of(nx.cycle_graph(n)), n)
    expected = torch.tensor(sorted(1 - math.cos(2 * math.pi * j / n) for j in range(n)))
    torch.testing.assert_close(eigvals, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(eigvecs.T @ eigvecs, torch.eye(n), rtol=0, atol=1e-5)
    sizes = torch.bincount(eigenspaces(eigvals)).tolist()
    assert sizes == [1] + [2] * ((n - 1) // 2) + [1] * (n % 2 == 0)


@pytest.mark.parametrize("normalization", ["sym", None])
@pytest.mark.parametrize("weighted", [True, False])
def test_eigenpairs_solve_the_laplacian_of_networkx(normalization, weighted):
    graph = nx.gnp_random_graph(11, 0.3, seed=3)
    graph.add_node(11)  # isolated
    rng = np.random.default_rng(0)
    for u, v in graph.edges:
        graph[u][v]["weight"] = rng.uniform(0.1, 2) if weighted else 1.0
    weight = torch.tensor([graph[u][v]["weight"] for u, v in graph.edges])
    edges = edges_of(graph)
    make = nx.normalized_laplacian_matrix if normalization else nx.laplacian_matrix
    laplacian = torch.from_numpy(make(graph).toarray()).float()
    eigvals, eigvecs = laplacian_eigs(
        edges, 12, edge_weight=weight.repeat(2) if weighted else None, normalization=normalization
    )
    torch.testing.assert_close(eigvecs @ eigvals.diag() @ eigvecs.T, laplacian, rtol=0, atol=1e-5)
    assert (eigvals.diff() >= 0).all()
    part = laplacian_eigs(edges, 12, 4, edge_weight=weight.repeat(2), normalization=normalization)
    torch.testing.assert_close(part[0], eigvals[:4])
    assert part[1].shape == (12, 4)
    assert part[0].dtype == part[1].dtype == torch.float32


def test_loops_do_not_count_and_directions_and_repeats_count_once():
    edges = random_graph()
    plain = laplacian_eigs(edges, 9)
    one_way = edges[:, edges[0] < edges[1]]
    messy = torch.cat([one_way, one_way[:, :3], torch.tensor([[2, 2, 5], [2, 2, 5]])], 1)
    for got in (laplacian_eigs(one_way, 9), laplacian_eigs(messy, 9)):
        torch.testing.assert_close(got[0], plain[0], rtol=0, atol=1e-6)
    weights = torch.tensor([1.0, 3.0, 2.0])  # the largest of a pair
    pair = laplacian_eigs(torch.tensor([[0, 1, 0], [1, 0, 1]]), 2, edge_weight=weights, normalization=None)
    torch.testing.assert_close(pair[0], torch.tensor([0.0, 6.0]))


def test_without_edges_every_eigenvalue_is_zero():
    eigvals, eigvecs = laplacian_eigs(torch.empty(2, 0, dtype=torch.long), 4)
    assert (eigvals == 0).all()
    torch.testing.assert_close(eigvecs.T @ eigvecs, torch.eye(4))


@pytest.mark.parametrize("normalization", ["sym", None])
def test_sparse_and_dense_find_the_same_eigenspaces(normalization):
    graph = nx.disjoint_union(nx.grid_2d_graph(7, 7, periodic=True), nx.path_graph(11))
    edges = edges_of(graph)
    dense = laplacian_eigs(edges, 60, 11, normalization=normalization, method="dense")
    sparse = laplacian_eigs(edges, 60, 11, normalization=normalization, method="sparse")
    torch.testing.assert_close(sparse[0], dense[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(sparse[1].T @ sparse[1], torch.eye(11), rtol=0, atol=1e-5)
    group = eigenspaces(dense[0])
    for j in range(int(group.max())):  # the last may be cut
        ours, theirs = (v[:, group == j] @ v[:, group == j].T for v in (sparse[1], dense[1]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    again = laplacian_eigs(edges, 60, 11, normalization=normalization, method="sparse")
    assert torch.equal(again[1], sparse[1])


def test_auto_takes_the_sparse_way_for_few_eigenvalues_of_many_nodes(monkeypatch):
    from posterity.graphs import laplacian

    calls = []
    monkeypatch.setattr(
        laplacian, "eigsh", lambda *a, **o: calls.append(o) or (np.ones(2), np.ones((2001, 2)))
    )
    path = edges_of(nx.path_graph(2001))
    laplacian_eigs(path, 2001, 2)
    assert calls[0]["k"] == 2
    laplacian_eigs(edges_of(nx.path_graph(50)), 50, 2)
    assert len(calls) == 1


def test_eigenspaces_start_where_the_gap_to_the_one_before_exceeds_tol():
    eigvals = torch.tensor([0.0, 0.06, 0.12, 0.5, 0.5])
    assert eigenspaces(eigvals, tol=0.1).tolist() == [0, 0, 0, 1, 1]  # a chain of small gaps
    assert eigenspaces(eigvals, tol=0.01).tolist() == [0, 1, 2, 3, 3]
    assert eigenspaces(eigvals, tol=0.0).tolist() == [0, 1, 2, 3, 3]
    assert eigenspaces(eigvals[:0]).tolist() == []


def test_the_transform_pads_and_its_batches_fit_the_network():
    data = pytest.importorskip("torch_geometric.data")
    transforms = pytest.importorskip("torch_geometric.transforms")
    graphs = [
        data.Data(edge_index=edges_of(nx.path_graph(3)), num_nodes=3),
        data.Data(edge_index=edges_of(nx.cycle_graph(6)), num_nodes=6),
    ]
    transform = AddLaplacianEigs(5)
    assert isinstance(transform, transforms.BaseTransform)
    assert repr(transform) == "AddLaplacianEigs(5, normalization='sym')"
    done = [transforms.Compose([transform])(graph) for graph in graphs]
    assert "eigvecs" not in graphs[0]
    assert done[0].eig_mask.tolist() == [[True] * 3 + [False] * 2]
    assert (done[0].eigvecs[:, 3:] == 0).all() and (done[0].eigvals[0, 3:] == 0).all()
    torch.testing.assert_close(done[0].eigvals[0, :3], torch.tensor([0.0, 1.0, 2.0]))
    batch = data.Batch.from_data_list(done)
    assert batch.eigvecs.shape == (9, 5)
    assert batch.eigvals.shape == batch.eig_mask.shape == (2, 5)
    net = SignNet(5, 8, 4)
    assert net(batch.eigvecs, batch.eigvals, batch.edge_index, batch.batch, batch.eig_mask).shape == (9, 4)
    weighted = data.Data(edge_index=edges_of(nx.path_graph(2)), num_nodes=2, edge_weight=torch.ones(2) * 3)
    plain = AddLaplacianEigs(2, normalization=None)(weighted)
    torch.testing.assert_close(plain.eigvals, torch.tensor([[0.0, 6.0]]))


PATH = edges_of(nx.path_graph(3))
W = laplacian_eigs(PATH, 3)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laplacian_eigs(PATH, 3, 0), "k must be an integer of at least 1, got 0"),
        (lambda: laplacian_eigs(PATH, 3, 4), "k must be at most the number of nodes, 3, got 4"),
        (lambda: laplacian_eigs(PATH, 0), "num_nodes must be an integer of at least 1"),
        (lambda: laplacian_eigs(PATH, 2), r"edge_index must name nodes in 0\.\.1, got 2"),
        (lambda: laplacian_eigs(PATH.float(), 3), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: laplacian_eigs(PATH, 3, normalization="rw"), "normalization must be one of 'sym', None"),
        (lambda: laplacian_eigs(PATH, 3, method="fast"), "method must be one of"),
        (lambda: laplacian_eigs(PATH, 3, method="sparse"), "k must be less than the number of nodes, 3"),
        (lambda: laplacian_eigs(PATH, 3, edge_weight=-torch.ones(4)), "edge_weight must be at least 0, got -1.0"),
        (lambda: laplacian_eigs(PATH, 3, edge_weight=torch.ones(3)), r"edge_weight must have shape \(4\)"),
        (lambda: laplacian_eigs(PATH, 3, edge_weight=torch.full((4,), float("nan"))), "edge_weight must be finite"),
        (lambda: AddLaplacianEigs(0), "k must be an integer of at least 1, got 0"),
        (lambda: AddLaplacianEigs(2, normalization="rw"), "normalization must be one of"),
        (lambda: eigenspaces(W.flip(0)), "eigvals must be in ascending order"),
        (lambda: eigenspaces(W * float("nan")), "eigvals must be in ascending order and not NaN"),
        (lambda: eigenspaces(W[None]), r"eigvals must have shape \(any\), got \(1, 3\)"),
        (lambda: eigenspaces(W, tol=-1.0), "tol must be in"),
        (lambda: AddLaplacianEigs(2)(Data(edge_index=PATH - 1, num_nodes=3)), r"data.edge_index must name nodes in 0\.\.2, got -1"),
        (lambda: AddLaplacianEigs(2)(Data(edge_index=PATH[:, :0], num_nodes=0)), "data.num_nodes must be an integer of at least 1, got 0"),
        (lambda: AddLaplacianEigs(2)(Data(edge_index=PATH, num_nodes=3, edge_weight=-torch.ones(4))), "data.edge_weight must be at least 0, got -1.0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
