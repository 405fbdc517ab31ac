"""Indices of 32 bits do what those of 64 do, and of nothing comes nothing: empty inputs, empty results."""

import pytest
import torch

from posterity import graphs

HALF = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 3]])
EDGES = torch.cat([HALF, HALF.flip(0)], 1)
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
BATCH, Y = torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(6) % 2
LINKS = torch.tensor([[0, 1, 2], [1, 2, 3]])


def rng():
    return torch.Generator().manual_seed(0)


def made(name, *args, **options):
    torch.manual_seed(0)
    return getattr(graphs, name)(*args, **options).eval()


def split(part):
    return torch.arange(6) // 2 == part


def decoder(edges):
    fitted = graphs.fit_link_decoder(X, edges, edges, edges, max_epochs=2, k=1, generator=rng())
    return fitted(X, edges)


def eigs(edges, *batch):
    eigvals, eigvecs = graphs.laplacian_eigs(edges, 6, 3)
    return made("SignNet", 3, 4, 2)(eigvecs, eigvals, edges, *batch)


CALLS = {
    "ADGN": lambda e, b, y: made("ADGN", 4, 8, 2, 2, level="graph")(X, e, batch=b),
    "ACMP": lambda e, b, y: made("ACMP", 4, 8, 2, method="rk4")(X, e),
    "AgentNet": lambda e, b, y: made("AgentNet", 4, 8, 2, num_steps=2, num_agents=2)(X, e[:, :0], b, generator=rng()),
    "AgentNet.csr": lambda e, b, y: graphs.AgentNet.csr(e, 6),
    "log_aggregate": lambda e, b, y: graphs.log_aggregate(X, b, 2),
    "straight_through_choice": lambda e, b, y: graphs.straight_through_choice(X[:, 0], b, 2, generator=rng()),
    "StableGCN": lambda e, b, y: made("StableGCN", 4, 8, 2, pool="mean")(X, e, batch=b),
    "collapse_bound": lambda e, b, y: torch.tensor(graphs.collapse_bound(e, 6, None, 0.5)),
    "gd_wl_colors": lambda e, b, y: graphs.gd_wl_colors(e, 6, colors=y),
    "shortest_path_distance": lambda e, b, y: graphs.shortest_path_distance(e[:, :0], 6, batch=b),
    "biconnectivity": lambda e, b, y: graphs.biconnectivity(e, 6).block,
    "GraphormerGD": lambda e, b, y: made("GraphormerGD", 4, 8, num_layers=1, num_heads=2, level="edge")(X, e),
    "HeterophilyGNN": lambda e, b, y: made("HeterophilyGNN", 4, 8, 2, model="GAT")(X, e),
    "adjusted_homophily": lambda e, b, y: torch.tensor(graphs.adjusted_homophily(e, y)),
    "find_duplicate_nodes": lambda e, b, y: graphs.find_duplicate_nodes(e, 6, y=y),
    "fit_node_classifier": lambda e, b, y: torch.tensor(
        graphs.fit_node_classifier(made("HeterophilyGNN", 4, 8, 3, dropout=0), X, e, y + split(2), *map(split, range(3)), num_steps=2).test
    ),
    "PolyGCL": lambda e, b, y: made("PolyGCL", 4, 8, K=2).embed(X, e),
    "attack_candidates": lambda e, b, y: graphs.attack_candidates(X, y, e, 0),
    "propagate_labels": lambda e, b, y: graphs.propagate_labels(X, y, b + torch.arange(6, dtype=b.dtype) - b, e),
    "SignNet": lambda e, b, y: eigs(e),
    "GCNEncoder": lambda e, b, y: made("GCNEncoder", 4, 8, 2)(X, e),
    "fit_link_decoder": lambda e, b, y: decoder(e),
    "inductive_link_split": lambda e, b, y: graphs.inductive_link_split(X, e, node_ratio=0.1, val_ratio=0.5, generator=rng()).val_pos,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_indices_of_other_widths_do_the_same(as_a_user, name, dtype):
    given = EDGES, BATCH, Y
    want, got = (CALLS[name](*(part.to(kind) for part in given)) for kind in (torch.int64, dtype))
    torch.testing.assert_close(got, want, check_dtype=False)


def test_edges_of_32_bits_join_many_nodes():
    n = 70_000  # n^2 exceeds what 32 bits hold
    edges = torch.tensor([[0, n - 1, n - 2, 1], [n - 1, 0, 1, n - 2]], dtype=torch.int32)
    assert graphs.biconnectivity(edges, n).bridge.all()
    assert int(graphs.propagate_labels(torch.zeros(n, 2), Y[:2], Y[:2], edges)[n - 1].argmax()) == 0


NOTHING, NO_EDGES, NONE = torch.zeros(0, 4), torch.zeros(2, 0).long(), torch.zeros(0).long()
EMPTY = {
    "ADGN": (lambda: made("ADGN", 4, 8, 2, 2)(NOTHING, NO_EDGES), (0, 2)),
    "ADGN of a graph": (lambda: made("ADGN", 4, 8, 2, 2, level="graph")(NOTHING, NO_EDGES), (1, 2)),
    "ACMP": (lambda: made("ACMP", 4, 8, 2)(NOTHING, NO_EDGES), (0, 2)),
    "dirichlet_energy": (lambda: graphs.dirichlet_energy(NOTHING, NO_EDGES), ()),
    "log_aggregate": (lambda: graphs.log_aggregate(NOTHING, NONE, 3), (3, 4)),
    "resistance_distance": (lambda: graphs.resistance_distance(NO_EDGES, 0), (0, 0)),
    "resistance_distance of no graphs": (lambda: graphs.resistance_distance(NO_EDGES, 0, batch=NONE), (0, 0, 0)),
    "gd_wl_colors": (lambda: graphs.gd_wl_colors(NO_EDGES, 0), (0,)),
    "GDAttention": (lambda: made("GDAttention", 4, 2)(*[torch.zeros(1, 0, 4), *[torch.zeros(1, 2, 0, 0)] * 2]), (1, 0, 4)),
    "GraphormerGD": (lambda: made("GraphormerGD", 4, 8, num_layers=1, num_heads=2)(NOTHING, NO_EDGES), (0, 1)),
    "GAT": (lambda: made("HeterophilyGNN", 4, 8, 2, model="GAT")(NOTHING, NO_EDGES), (0, 2)),
    "GT": (lambda: made("HeterophilyGNN", 4, 8, 2, model="GT")(NOTHING, NO_EDGES), (0, 2)),
    "PolyGCL": (lambda: made("PolyGCL", 4, 8, K=2).embed(NOTHING, NO_EDGES), (0, 8)),
    "propagate_labels": (lambda: graphs.propagate_labels(NOTHING, NONE, NONE, NO_EDGES), (0, 4)),
    "propagate_labels of no classes": (lambda: graphs.propagate_labels(X[:, :0], NONE, NONE, EDGES), (6, 0)),
    "BasisNet": (lambda: made("BasisNet", [1, 1], 4, 2)(torch.zeros(0, 2), torch.tensor([0.0, 1.0])), (0, 2)),
    "SignNet": (lambda: made("SignNet", 3, 4, 2)(torch.zeros(0, 3), torch.zeros(3), NO_EDGES), (0, 2)),
    "GCNEncoder": (lambda: made("GCNEncoder", 4, 8, 2)(NOTHING, NO_EDGES), (0, 2)),
    "augment_graph": (lambda: graphs.augment_graph(NOTHING, NO_EDGES, drop_edge=0.1, drop_feature=0.1)[1], (2, 0)),
    "corrupt_graph": (lambda: graphs.corrupt_graph(NOTHING, NO_EDGES)[1], (2, 0)),
    "LinkDecoder": (lambda: made("LinkDecoder", 4)(X, NO_EDGES), (0,)),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_of_nothing_comes_nothing(as_a_user, name):
    call, shape = EMPTY[name]
    assert call().shape == shape
