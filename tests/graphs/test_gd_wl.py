"""Distances, colours, biconnectivity and attention against networkx, einsum and the theorems."""

import itertools
from math import inf

import networkx as nx
import numpy as np
import pytest
import torch
from networkx.generators.atlas import graph_atlas_g

from posterity.graphs import (
    DistanceBias,
    GDAttention,
    GraphormerGD,
    biconnectivity,
    gd_wl_colors,
    gd_wl_equivalent,
    resistance_distance,
    shortest_path_distance,
)
from posterity.testing import check_graph_network, check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def double():
    """Distances come in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def edges(graph):
    graph = nx.convert_node_labels_to_integers(graph)
    if not graph.number_of_edges():
        return torch.zeros(2, 0, dtype=torch.int64), len(graph)
    half = torch.tensor([(u, v) for u, v in graph.edges if u != v]).T
    return torch.cat([half, half.flip(0)], 1), len(graph)


def rook():
    return nx.convert_node_labels_to_integers(nx.line_graph(nx.complete_bipartite_graph(4, 4)))


def shrikhande():
    graph = nx.Graph()
    for i, j in itertools.product(range(4), repeat=2):
        for a, b in ((0, 1), (1, 0), (1, 1)):
            graph.add_edge((i, j), ((i + a) % 4, (j + b) % 4))
    return nx.convert_node_labels_to_integers(graph)


SOME = {
    "random": nx.gnp_random_graph(14, 0.25, seed=3),
    "lesmis": nx.convert_node_labels_to_integers(nx.les_miserables_graph()),
    "barbell": nx.barbell_graph(4, 3),
    "tree": nx.random_labeled_tree(15, seed=1),
    "two pieces": nx.disjoint_union(nx.cycle_graph(5), nx.path_graph(4)),
    "isolated": nx.disjoint_union(nx.complete_graph(3), nx.empty_graph(3)),
    "one node": nx.empty_graph(1),
    "long path": nx.path_graph(80),
}


# Distances.


@pytest.mark.parametrize("name", SOME)
def test_distances_are_networkxs(name):
    graph = nx.Graph(nx.convert_node_labels_to_integers(SOME[name]).edges)
    graph.add_nodes_from(range(len(SOME[name])))
    e, n = edges(SOME[name])
    hops, resistance = shortest_path_distance(e, n), resistance_distance(e, n)
    lengths = dict(nx.all_pairs_shortest_path_length(graph))
    for part in nx.connected_components(graph):
        exact = nx.resistance_distance(graph.subgraph(part))
        for u, v in itertools.product(part, repeat=2):
            assert float(resistance[u, v]) == pytest.approx(exact[u][v], abs=1e-8)
    for u, v in itertools.product(range(n), repeat=2):
        assert float(hops[u, v]) == lengths[u].get(v, inf)
    assert torch.equal(torch.isinf(hops), torch.isinf(resistance))


def test_conductances_and_repeated_edges_and_loops():
    e = torch.tensor([[0, 1, 1, 2, 0, 1, 2], [1, 0, 2, 1, 1, 0, 2]])
    w = torch.tensor([2.0, 2.0, 0.5, 0.5, 3.0, 3.0, 9.0])
    r = resistance_distance(e, 3, edge_weight=w)
    assert r[0].tolist() == pytest.approx([0, 1 / 5, 1 / 5 + 2])


@pytest.mark.parametrize("name", ["random", "lesmis", "two pieces", "barbell"])
def test_fosters_theorem_with_weights(name):
    e, n = edges(SOME[name])
    half = torch.rand(e.shape[1] // 2, generator=rng()) + 0.1
    w = torch.cat([half, half])
    r = resistance_distance(e, n, edge_weight=w)
    pieces = nx.number_connected_components(SOME[name])
    assert float((w * r[e[0], e[1]]).sum() / 2) == pytest.approx(n - pieces)
    bridge = biconnectivity(e, n).bridge
    unit = resistance_distance(e, n)[e[0], e[1]]
    assert torch.equal(bridge, (unit - 1).abs() < 1e-9), "an edge is a bridge iff its resistance is 1 / w"


def test_on_a_tree_resistance_is_hops():
    e, n = edges(SOME["tree"])
    torch.testing.assert_close(resistance_distance(e, n), shortest_path_distance(e, n))


def test_resistance_is_differentiable_in_conductances():
    e, n = edges(nx.cycle_graph(5))
    half = (torch.rand(5, generator=rng()) + 0.5).requires_grad_()

    def pairs(half):
        return resistance_distance(e, n, edge_weight=torch.cat([half, half])).triu(1)

    assert torch.autograd.gradcheck(pairs, (half,))


def test_batches_are_padded_with_inf_and_are_their_graphs():
    graphs = [SOME[name] for name in ("random", "one node", "two pieces", "tree")]
    sizes = torch.tensor([len(g) for g in graphs])
    parts = [edges(g)[0] + int(sizes[:k].sum()) for k, g in enumerate(graphs)]
    batch = torch.arange(4).repeat_interleave(sizes)
    for distance in (resistance_distance, shortest_path_distance):
        out = distance(torch.cat(parts, 1), len(batch), batch=batch)
        assert out.shape == (4, 15, 15)
        for k, graph in enumerate(graphs):
            n = len(graph)
            torch.testing.assert_close(out[k, :n, :n], distance(*edges(graph)))
            assert torch.isinf(out[k, n:]).all() and torch.isinf(out[k, :, n:]).all()


def test_results_come_in_the_default_dtype():
    torch.set_default_dtype(torch.float32)
    assert resistance_distance(*edges(nx.path_graph(3))).dtype == torch.float32


# Colours.


@pytest.fixture(scope="module")
def atlas():
    graphs = [g for g in graph_atlas_g() if 3 <= len(g) <= 7 and nx.is_connected(g)]
    assert len(graphs) == 994
    sizes = torch.tensor([len(g) for g in graphs])
    starts = sizes.cumsum(0) - sizes
    e = torch.cat([edges(g)[0] + int(start) for g, start in zip(graphs, starts, strict=True)], 1)
    batch = torch.arange(len(graphs)).repeat_interleave(sizes)
    return e, batch, biconnectivity(e, len(batch))


def merged(keys, property_):
    """How many classes of equal keys hold both things that have the property and things that do not."""
    seen = {}
    for key, value in zip(keys, property_.tolist(), strict=True):
        seen.setdefault(key, set()).add(value)
    return sum(len(values) == 2 for values in seen.values())


def test_all_994_small_graphs_as_the_theorems_say(atlas):
    e, batch, truth = atlas
    spd = gd_wl_colors(e, len(batch), distance="spd", batch=batch)
    rd = gd_wl_colors(e, len(batch), distance="rd", batch=batch)
    assert (int(spd.max()) + 1, int(rd.max()) + 1) == (4747, 4785)
    pairs = [tuple(sorted(pair)) for pair in spd[e].T.tolist()]
    assert merged(pairs, truth.bridge) == 0
    assert merged(rd.tolist(), truth.cut_vertex) == 0
    assert merged(spd.tolist(), truth.cut_vertex) == 1


def test_both_distances_are_at_least_as_fine_as_each(atlas):
    e, batch, _ = atlas
    both = gd_wl_colors(e, len(batch), distance="both", batch=batch)
    for distance in ("spd", "rd"):
        coarse = gd_wl_colors(e, len(batch), distance=distance, batch=batch)
        assert len(set(zip(both.tolist(), coarse.tolist(), strict=True))) == int(both.max()) + 1


def test_what_is_told_apart():
    dodecahedron, desargues = edges(nx.dodecahedral_graph()), edges(nx.desargues_graph())
    assert gd_wl_equivalent(*dodecahedron, *desargues, distance="spd")
    assert not gd_wl_equivalent(*dodecahedron, *desargues, distance="rd")
    for distance in ("spd", "rd", "both"):
        assert gd_wl_equivalent(*edges(rook()), *edges(shrikhande()), distance=distance)
    six, triangles = edges(nx.cycle_graph(6)), edges(nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3)))
    for distance in ("spd", "rd"):
        assert not gd_wl_equivalent(*six, *triangles, distance=distance)
    assert not gd_wl_equivalent(*six, *edges(nx.cycle_graph(7)))


@pytest.mark.parametrize("distance", ["spd", "rd", "both"])
def test_renaming_nodes_renames_colours(distance):
    e, n = edges(SOME["lesmis"])
    order = torch.randperm(n, generator=rng())
    colors = gd_wl_colors(e, n, distance=distance)
    assert torch.equal(gd_wl_colors(order[e], n, distance=distance)[order], colors)
    assert gd_wl_equivalent(e, n, order[e], n, distance=distance)


def naive_colors(distance, first=None):
    now = [0] * len(distance) if first is None else first
    for _ in now:
        keys = [tuple(sorted((round(d, 6), c) for d, c in zip(row, now, strict=True))) for row in distance]
        names = {key: k for k, key in enumerate(sorted(set(keys)))}
        now = [names[key] for key in keys]
    return now


@pytest.mark.parametrize("name", ["random", "lesmis", "two pieces", "isolated"])
def test_colours_are_those_of_a_dictionary_of_tuples(name):
    e, n = edges(SOME[name])
    for own in (None, torch.arange(n) % 2):
        got = gd_wl_colors(e, n, colors=own)
        want = naive_colors(resistance_distance(e, n).tolist(), None if own is None else own.tolist())
        assert len(set(zip(got.tolist(), want, strict=True))) == len(set(want)) == int(got.max()) + 1


def test_own_distances_first_colours_and_rounds():
    e, n = edges(nx.path_graph(5))
    hops = shortest_path_distance(e, n)
    assert torch.equal(gd_wl_colors(e, n, distance=hops), gd_wl_colors(e, n, distance="spd"))
    assert torch.equal(
        gd_wl_colors(e, n, distance=hops + 1e-9 * (hops > 2)), gd_wl_colors(e, n, distance="spd")
    )
    assert gd_wl_colors(e, n, max_iter=0).tolist() == [0] * 5
    assert gd_wl_colors(e, n, colors=torch.tensor([7, 3, 3, 3, 9]), max_iter=0).tolist() == [1, 0, 0, 0, 2]
    noisy = torch.full((3, 3), 1 / 128) + torch.tensor([[0, 1, -1], [1, 0, 0], [-1, 0, 0]]) * 1e-12
    noisy.fill_diagonal_(0)
    assert gd_wl_colors(torch.zeros(2, 0, dtype=torch.int64), 3, distance=noisy).tolist() == [0, 0, 0]


# Biconnectivity.


@pytest.mark.parametrize("name", SOME)
def test_biconnectivity_is_networkxs(name):
    graph = nx.convert_node_labels_to_integers(SOME[name])
    e, n = edges(graph)
    loops = torch.tensor([[0], [0]])
    e = torch.cat([e, loops, e[:, :1], e[:, :1].flip(0)], 1)  # a loop, and an edge twice
    got = biconnectivity(e, n)
    assert set(got.cut_vertex.nonzero()[:, 0].tolist()) == set(nx.articulation_points(graph))
    pairs = [tuple(sorted(pair)) for pair in e.T.tolist()]
    assert {p for p, b in zip(pairs, got.bridge.tolist(), strict=True) if b} == {
        tuple(sorted(p)) for p in nx.bridges(graph)
    }
    blocks = {}
    for pair, block in zip(pairs, got.block.tolist(), strict=True):
        if pair[0] != pair[1]:
            blocks.setdefault(block, set()).add(pair)
        else:
            assert block == -1
    want = {frozenset(tuple(sorted(p)) for p in block) for block in nx.biconnected_component_edges(graph)}
    assert {frozenset(block) for block in blocks.values()} == want
    components = {}
    for node, component in enumerate(got.edge_component.tolist()):
        components.setdefault(component, set()).add(node)
    assert {frozenset(c) for c in components.values()} == {
        frozenset(c) for c in nx.k_edge_components(graph, 2)
    }
    assert got.bridge_tree.shape[1] == 2 * len(list(nx.bridges(graph)))
    tree = nx.Graph(got.bridge_tree.T.tolist())
    assert not len(tree) or nx.is_forest(tree)
    tree = nx.Graph(got.block_cut_tree.T.tolist())
    assert not len(tree) or nx.is_forest(tree)
    for cut, node in enumerate(sorted(nx.articulation_points(graph))):
        held = {block for block, members in blocks.items() if any(node in pair for pair in members)}
        assert set(tree[len(want) + cut]) == held


# The transformer.


def attention_inputs(graphs=2, n=5, channels=8, heads=2):
    x = torch.randn(graphs, n, channels, generator=rng())
    return (
        x,
        torch.randn(graphs, heads, n, n, generator=rng(1)),
        torch.randn(graphs, heads, n, n, generator=rng(2)),
    )


@pytest.mark.parametrize("relu_mul", [False, True])
def test_attention_is_its_formula(relu_mul):
    x, bias, mul = attention_inputs()
    layer = GDAttention(8, 2, relu_mul=relu_mul)
    q, k, v = (part(x).view(2, 5, 2, 4) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2 + bias
    weight = logits.softmax(-1) * (mul.relu() if relu_mul else mul)
    want = layer.out_proj(torch.einsum("bhij,bjhd->bihd", weight, v).reshape(2, 5, 8))
    torch.testing.assert_close(layer(x, bias, mul), want)
    check_layer(layer, x, bias, mul, shape=(2, 5, 8), dead=["k_proj.bias"])


def test_without_bias_and_scale_attention_is_torchs():
    x, bias, _ = attention_inputs()
    layer = GDAttention(8, 2)
    q, k, v = (
        part(x).view(2, 5, 2, 4).transpose(1, 2) for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    want = layer.out_proj(plain.transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(layer(x, 0 * bias, torch.ones_like(bias)), want)


def test_masked_nodes_do_not_matter():
    x, bias, mul = attention_inputs()
    layer, mask = GDAttention(8, 2), torch.tensor([[True] * 5, [True, True, True, False, False]])
    out = layer(x, bias, mul, mask)
    other = x.clone()
    other[1, 3:] = 100
    torch.testing.assert_close(layer(other, bias, mul, mask)[1, :3], out[1, :3])
    torch.testing.assert_close(out[1, :3], layer(x[1:, :3], bias[1:, :, :3, :3], mul[1:, :, :3, :3])[0])


@pytest.mark.parametrize("options", [{}, {"use_spd": False}, {"use_rd": False}])
def test_infinite_distances_are_a_value_of_their_own_without_nan(options):
    spd = torch.tensor([[[0.0, 1, inf], [1, 0, 99], [inf, 99, 0]]])
    layer = DistanceBias(4, num_kernels=8, max_hops=10, **options)
    bias, mul = layer(spd, spd / 2)
    assert bias.shape == mul.shape == (1, 4, 3, 3)
    (bias.square().sum() + mul.square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert not torch.equal(bias[..., 0, 2], bias[..., 0, 1])
    near = spd.clone()
    near[near == 99] = 10
    if not options:
        torch.testing.assert_close(layer(near, spd / 2)[0], bias)


def small(**options):
    torch.manual_seed(0)
    settings = {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "ffn_channels": 16, "num_kernels": 8}
    return GraphormerGD(3, out_channels=2, **{**settings, **options}).eval()


@pytest.mark.parametrize("distances", ["spd", "rd", "both"])
@pytest.mark.parametrize("level", ["node", "graph"])
def test_conformance(level, distances, as_a_user):
    e, n = edges(nx.gnp_random_graph(8, 0.35, seed=2))
    x = torch.randn(n, 3, generator=rng())
    dead = [f"blocks.{k}.attention.k_proj.bias" for k in range(2)]
    check_graph_network(small(level=level, distances=distances), x, e, level=level, local=False, dead=dead)


def test_edge_outputs_are_symmetric_and_follow_the_edges():
    e, n = edges(SOME["random"])
    x, net = torch.randn(n, 3, generator=rng()), small(level="edge")
    out = net(x, e)
    half = e.shape[1] // 2
    torch.testing.assert_close(out[:half], out[half:])
    order = torch.randperm(n, generator=rng(1))
    place = torch.empty_like(order)
    place[order] = torch.arange(n)
    torch.testing.assert_close(net(x[order], place[e]), out)


def test_given_distances_are_used_and_a_batch_is_its_graphs():
    graphs = [edges(SOME[name]) for name in ("random", "one node", "tree")]
    sizes = torch.tensor([n for _, n in graphs])
    e = torch.cat([part + int(sizes[:k].sum()) for k, (part, _) in enumerate(graphs)], 1)
    batch, x = torch.arange(3).repeat_interleave(sizes), torch.randn(int(sizes.sum()), 3, generator=rng())
    net = small()
    out = net(x, e, batch)
    known = shortest_path_distance(e, len(x), batch=batch), resistance_distance(e, len(x), batch=batch)
    torch.testing.assert_close(net(x, e, batch, distances=known), out)
    start = 0
    for part, n in graphs:
        torch.testing.assert_close(net(x[start : start + n], part), out[start : start + n])
        start += n


def test_nodes_that_the_colours_merge_get_equal_outputs():
    graphs = [nx.dodecahedral_graph(), nx.desargues_graph(), SOME["barbell"], rook(), shrikhande()]
    parts = [edges(g) for g in graphs]
    sizes = torch.tensor([n for _, n in parts])
    e = torch.cat([part + int(sizes[:k].sum()) for k, (part, _) in enumerate(parts)], 1)
    batch = torch.arange(len(parts)).repeat_interleave(sizes)
    colors = gd_wl_colors(e, len(batch), distance="both", batch=batch)
    out = small()(torch.ones(len(batch), 3), e, batch).detach()
    assert int(colors.max()) > 5
    for color in colors.unique():
        rows = out[colors == color]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows), atol=1e-8, rtol=0)
    apart = gd_wl_colors(e, len(batch), batch=batch)
    assert float((out[apart == apart[0]][0] - out[apart == apart[20]][0]).abs().max()) > 1e-6


# Bad input.


def test_wrong_arguments_are_refused(as_a_user):
    e, n = edges(nx.path_graph(4))
    one_way = torch.tensor([[0, 1, 2], [1, 0, 3]])
    net, spd, heads = small(), shortest_path_distance(e, 4)[None], (torch.ones(1, 2, 3, 3),) * 2
    for call, message in [
        (lambda: resistance_distance(one_way, 4), "2 -> 3 lacks its reverse"),
        (lambda: shortest_path_distance(one_way, 4), "lacks its reverse"),
        (lambda: biconnectivity(one_way, 4), "lacks its reverse"),
        (lambda: gd_wl_colors(one_way, 4), "lacks its reverse"),
        (lambda: gd_wl_equivalent(e, n, one_way, 4), "lacks its reverse"),
        (lambda: resistance_distance(e, 3), r"nodes in 0\.\.2"),
        (lambda: resistance_distance(e - 1, 4), "nodes in"),
        (lambda: resistance_distance(e.double(), 4), "integers"),
        (lambda: resistance_distance(e[0], 4), "edge_index must have shape"),
        (
            lambda: resistance_distance(e, 4, edge_weight=torch.zeros(6)),
            "positive and finite, got 0.0 for edge 0",
        ),
        (lambda: resistance_distance(e, 4, edge_weight=torch.arange(6.0) + 1), "same in both directions"),
        (lambda: resistance_distance(e, 4, edge_weight=torch.ones(5)), "edge_weight must have shape"),
        (lambda: resistance_distance(e, 4, batch=torch.tensor([0, 1, 0, 1])), "sorted"),
        (lambda: resistance_distance(e, 4, batch=torch.tensor([0, 0, 1, 1])), "joins two"),
        (lambda: gd_wl_colors(e, 4, distance="hops"), "distance must be one of"),
        (lambda: gd_wl_colors(e, 4, distance=torch.zeros(3, 4)), "distance must have shape"),
        (lambda: gd_wl_colors(e, 4, distance=torch.arange(16.0).view(4, 4)), "symmetric"),
        (lambda: gd_wl_colors(e, 4, distance=torch.full((4, 4), float("nan"))), "NaN"),
        (lambda: gd_wl_colors(e, 4, decimals=-1), "decimals"),
        (lambda: gd_wl_colors(e, 4, max_iter=-1), "max_iter"),
        (lambda: gd_wl_colors(e, 4, colors=torch.zeros(3, dtype=torch.int64)), "colors"),
        (lambda: GDAttention(10, 3), "divide"),
        (lambda: DistanceBias(2, use_spd=False, use_rd=False), "use_spd or use_rd"),
        (lambda: GraphormerGD(3, 20, num_heads=8), "divide"),
        (lambda: GraphormerGD(0), "in_channels"),
        (lambda: GraphormerGD(3, level="pair"), "level"),
        (lambda: GraphormerGD(3, distances="all"), "distances"),
        (lambda: GraphormerGD(3, dropout=1.0), "dropout"),
        (lambda: net(torch.ones(4, 2), e), "x must have shape"),
        (lambda: net(torch.ones(4, 3), e, distances=(torch.ones(1, 3, 3),) * 2), r"distances\[0\]"),
        (lambda: net(torch.ones(4, 3), e, distances=(-spd, spd)), r"distances\[0\] must be at least 0"),
        (lambda: resistance_distance(e, -1), "num_nodes must be an integer of at least 0, got -1"),
        (lambda: resistance_distance(e, 4, batch=torch.zeros(4)), "batch must hold integers"),
        (
            lambda: resistance_distance(e, 4, batch=torch.zeros(4).long() - 1),
            "batch must not be negative, got -1",
        ),
        (lambda: biconnectivity(e, 2.5), "num_nodes must be an integer"),
        (
            lambda: gd_wl_colors(e[:, [0, 0, 3]], 2),
            "edge_index must list an edge as often in both directions, got [12] and [12]",
        ),
        (lambda: gd_wl_colors(e, 4, colors=torch.zeros(4)), "colors must hold integers"),
        (lambda: gd_wl_equivalent(e, n, one_way, 4), "edge_index_b must list both directions: 2 -> 3"),
        (lambda: gd_wl_equivalent(e, 3, e, n), r"edge_index_a must name nodes in 0\.\.2, got 3"),
        (lambda: gd_wl_equivalent(e, n, e, -1), "num_nodes_b must be an integer of at least 0, got -1"),
        (
            lambda: gd_wl_equivalent(e, n, e[:, [0, 0, 3]], 2),
            "edge_index_b must list an edge as often in both directions",
        ),
        (
            lambda: net(torch.ones(4, 3), e[:, [0, 0, 3]]),
            "edge_index must list an edge as often in both directions",
        ),
        (lambda: DistanceBias(2)(spd - 1, spd), "spd must be at least 0, got -1"),
        (lambda: DistanceBias(2)(spd[..., :3], spd), r"spd must have shape \(any, 3, 3\)"),
        (lambda: DistanceBias(2)(spd, spd[0]), r"rd must have shape \(1, 4, 4\) for spd"),
        (
            lambda: GDAttention(4, 2)(torch.ones(1, 3, 2), *heads),
            r"x must have shape \(any, any, 4\) for this layer",
        ),
        (
            lambda: GDAttention(4, 2)(torch.ones(1, 3, 4), heads[0][:, :1], heads[0]),
            r"bias must have shape \(1, 2, 3, 3\)",
        ),
        (
            lambda: GDAttention(4, 2)(torch.ones(1, 3, 4), heads[0], heads[0][..., :2]),
            r"mul must have shape \(1, 2, 3, 3\)",
        ),
        (
            lambda: GDAttention(4, 2)(torch.ones(1, 3, 4), *heads, torch.ones(1, 3)),
            "mask must be a mask of bool",
        ),
        (
            lambda: GDAttention(4, 2)(torch.ones(1, 3, 4), *heads, torch.ones(1, 2) > 0),
            r"mask must have shape \(1, 3\) for x",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_graph_without_nodes_in_a_batch_is_no_nan():
    e, n = edges(nx.path_graph(3))
    batch = torch.tensor([0, 0, 2])
    net = small()
    out = net(torch.ones(3, 3), e[:, :0], batch)
    out.sum().backward()
    assert torch.isfinite(out).all() and all(
        p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters()
    )
    assert np.isfinite(small(level="graph")(torch.ones(3, 3), e[:, :0], batch).detach().numpy()).all()
