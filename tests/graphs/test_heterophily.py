"""Measures by brute force, duplicates by sets, networks by dense formulas, the protocol by hand."""

import itertools
import math
from collections import defaultdict
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

from posterity.graphs import (
    HeterophilyGNN,
    adjacency_features,
    adjusted_homophily,
    duplicate_leakage,
    edge_homophily,
    find_duplicate_nodes,
    fit_node_classifier,
    heterophily,
    label_informativeness,
    minesweeper,
    node_homophily,
    remove_duplicate_nodes,
    run_protocol,
    sgc_features,
)
from posterity.lab.graphs import load_graph
from posterity.testing import check_graph_network

SHARED = Path(__file__).parents[3] / "shared/data"

MEASURES = [edge_homophily, node_homophily, adjusted_homophily, label_informativeness]
MODELS = ["ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"]


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


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public files")
@pytest.mark.parametrize(
    ("name", "published"), [("minesweeper", (0.68, 0.01, 0.00)), ("tolokers", (0.59, 0.09, 0.01))]
)
def test_measures_of_public_graphs_are_the_published_ones(monkeypatch, name, published):
    monkeypatch.setenv("POSTERITY_DATA", str(SHARED))
    graph = load_graph(name)
    measures = edge_homophily, adjusted_homophily, label_informativeness
    assert [m(graph.edge_index, graph.y) for m in measures] == pytest.approx(published, abs=0.0051)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the public files")
@pytest.mark.parametrize("name", ["chameleon", "squirrel"])
def test_public_duplicates_leak_and_the_cleaned_files_hardly_do(monkeypatch, name):
    monkeypatch.setenv("POSTERITY_DATA", str(SHARED))
    shares = []
    for version in (name, f"{name}_filtered"):
        graph = load_graph(version)
        n, near = len(graph.y), defaultdict(set)
        for u, v in graph.edge_index.T.tolist():
            near[u].add(v)
        keys = defaultdict(list)
        for node in range(n):
            keys[frozenset(near[node]) or node, int(graph.y[node])].append(node)
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
        monkeypatch.setattr(heterophily, "_random_weights", zeros)
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


def dense(model, x, edges, heads):
    """Return a network's output from adjacency matrices, without residual blocks' code."""
    n = len(x)
    count = x.new_zeros(n, n)
    for u, v in edges.T.tolist():
        if u != v:
            count[v, u] += 1
    if model.model in ("GCN", "GAT", "GT"):
        count = count + torch.eye(n, dtype=x.dtype)

    def softmax(scores):  # (n, n), receiver by sender
        weight = count * (scores - scores.max()).exp()
        return weight / weight.sum(1, keepdim=True).clamp_min(1e-300)

    def feed_forward(m, x):
        return m.linear_2(F.gelu(m.linear_1(x)))

    def apply(m, x):
        if hasattr(m, "attn_query"):
            q, k, v = (part(x).view(n, heads, -1) for part in (m.attn_query, m.attn_key, m.attn_value))
            scores = torch.einsum("uhd,vhd->hvu", q, k) / q.shape[2] ** 0.5
            message = torch.stack([softmax(s) @ v[:, h] for h, s in enumerate(scores)], 1).reshape(n, -1)
            return m.output_linear(torch.cat([x, message], 1) if model.model == "GT-sep" else message)
        if hasattr(m, "attn_linear_u"):
            z = m.input_linear(x)
            u, v, split = m.attn_linear_u(z), m.attn_linear_v(z), z.view(n, -1, heads)
            message = [
                softmax(F.leaky_relu(u[None, :, h] + v[:, None, h], 0.2)) @ split[:, :, h]
                for h in range(heads)
            ]
            message = torch.stack(message, 2).reshape(n, -1)
            both = torch.cat([z, message], 1) if model.model == "GAT-sep" else message
            return feed_forward(m.feed_forward_module, both)
        if model.model == "GCN":
            scale = count.sum(1).rsqrt()
            return feed_forward(m.feed_forward_module, (scale[:, None] * count * scale) @ x)
        if model.model == "SAGE":
            mean = count / count.sum(1, keepdim=True).clamp_min(1)
            return feed_forward(m.feed_forward_module, torch.cat([x, mean @ x], 1))
        return feed_forward(m, x)

    x = F.gelu(model.input_linear(x))
    for block in model.residual_modules:
        inside = block.normalization(x)
        x = x + (
            feed_forward(block.module, inside)
            if hasattr(block.module, "linear_1")
            else apply(block.module, inside)
        )
    return model.output_linear(model.output_normalization(x))


@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("model", MODELS)
def test_networks_are_their_dense_formulas_in_value_and_gradients(model, norm):
    edges = torch.randint(9, (2, 30), generator=seeded(4))
    edges[:, :2] = 3  # self-loops
    edges = edges[:, edges[1] != 8]  # a node that nothing is sent to
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    net = HeterophilyGNN(
        3, 12, 2, model=model, num_layers=2, hidden_multiplier=1.5, num_heads=4, norm=norm, dropout=0.0
    ).double()
    results = []
    for out in (
        net(a := x.clone().requires_grad_(), edges),
        dense(net, b := x.clone().requires_grad_(), edges, 4),
    ):
        inputs = [a if out is not None and not results else b, *net.parameters()]
        loss = (out * torch.arange(18.0, dtype=torch.float64).view(9, 2)).sum()
        results.append([out, *torch.autograd.grad(loss, inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_a_node_without_senders_gets_no_message():
    net = HeterophilyGNN(3, 8, 2, dropout=0.0).double()
    x = torch.randn(2, 3, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(dense(net, x[:1], torch.zeros(2, 0), 1), net(x, torch.tensor([[0], [1]]))[:1])


def test_a_gcn_is_a_feed_forward_network_where_all_neighbours_look_alike():
    edges = both_ways(torch.tensor(list(nx.random_regular_graph(4, 10, seed=0).edges)).T)
    gcn, plain = (HeterophilyGNN(3, 16, 2, model=model, dropout=0.0).double() for model in ("GCN", "ResNet"))
    weights = gcn.state_dict()
    plain.load_state_dict(
        {name.replace("feed_forward_module.", ""): value for name, value in weights.items()}
    )
    x = torch.randn(1, 3, generator=seeded(), dtype=torch.float64).expand(10, 3)
    torch.testing.assert_close(gcn(x, edges), plain(x, edges))


@pytest.mark.parametrize("model", MODELS)
def test_self_loops_of_the_input_do_not_count(model):
    edges = torch.randint(9, (2, 30), generator=seeded(4))
    net = HeterophilyGNN(3, 16, 2, model=model).double().eval()
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    looped = torch.cat([edges, torch.arange(9).expand(2, 9), torch.arange(4).expand(2, 4)], 1)
    torch.testing.assert_close(net(x, looped), net(x, edges))


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("model", MODELS[1:])
def test_conforms_to_its_kind(as_a_user, model, norm):
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2], [1, 4]]).T
    net = HeterophilyGNN(3, 16, 2, model=model, norm=norm)
    check_graph_network(net, torch.randn(5, 3, generator=seeded()), both_ways(edges))


FEED = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
DEEP = [f"feed_forward_module.{name}" for name in FEED]
GAT = [
    "input_linear.weight",
    "input_linear.bias",
    "attn_linear_u.weight",
    "attn_linear_u.bias",
    "attn_linear_v.weight",
    *DEEP,
]
GT = [
    f"{part}.{kind}"
    for part in ("attn_query", "attn_key", "attn_value", "output_linear")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        ("ResNet", [FEED]), ("GCN", [DEEP]), ("SAGE", [DEEP]), ("GAT", [GAT]), ("GAT-sep", [GAT]),
        ("GT", [GT, FEED]), ("GT-sep", [GT, FEED]),
    ],
)  # fmt: skip
def test_weights_are_named_as_the_published_ones(model, blocks):
    ends = ("weight", "bias")
    names = {
        f"{part}.{end}" for part in ("input_linear", "output_normalization", "output_linear") for end in ends
    }
    for i, block in enumerate(blocks * 2):
        names |= {f"residual_modules.{i}.normalization.{end}" for end in ends}
        names |= {f"residual_modules.{i}.module.{name}" for name in block}
    assert set(HeterophilyGNN(3, 16, 2, model=model, num_layers=2).state_dict()) == names


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_attention_weights_of_each_receiver_sum_to_1(scale):
    edges = torch.randint(9, (2, 40), generator=seeded(4))
    has_sender = torch.zeros(9).index_fill(0, edges[1, edges[0] != edges[1]], 1.0)
    graph = heterophily._graph(edges, 9, loops=False, heads=2)
    scores = (scale * torch.randn(len(graph.sender), generator=seeded())).requires_grad_()
    total = heterophily._attend(scores, torch.ones(18, 1), graph)[:, 0]
    torch.testing.assert_close(total, has_sender.repeat(2))
    (grad,) = torch.autograd.grad(total.sum(), scores)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_sgc_features_are_pygs_and_differentiable():
    nn_ = pytest.importorskip("torch_geometric.nn")
    edges = torch.tensor(list(nx.gnp_random_graph(9, 0.3, seed=1, directed=True).edges)).T
    x = torch.randn(9, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    peer = nn_.SGConv(3, 3, K=4, bias=False).double()
    with torch.no_grad():
        peer.lin.weight.copy_(torch.eye(3))
    torch.testing.assert_close(sgc_features(x, edges, num_props=4), peer(x, edges))
    assert torch.autograd.gradcheck(lambda x: sgc_features(x, edges), x)


def test_adjacency_features_have_the_sender_as_row_and_no_loops():
    graph = nx.gnp_random_graph(9, 0.3, seed=1, directed=True)
    graph.add_edges_from([(2, 2), (0, 5)])
    edges = torch.tensor(list(graph.edges)).T
    graph.remove_edge(2, 2)
    expected = torch.from_numpy(nx.to_numpy_array(graph, nodelist=range(9))).float()
    assert torch.equal(adjacency_features(torch.cat([edges, edges], 1), 9), expected)


def task(n=40, classes=3, seed=0):
    y = torch.arange(n) % classes
    x = F.one_hot(y, classes).double() + torch.randn(n, classes, generator=seeded(seed)).double()
    edges = torch.randint(n, (2, 3 * n), generator=seeded(seed))
    part = torch.arange(n) // classes % 4
    return x, edges, y, part < 2, part == 2, part == 3


class Alone(nn.Module):
    """A linear map of a node's own features, and what it was asked for."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear, self.norm = nn.Linear(n_in, n_out).double(), nn.LayerNorm(n_in).double()
        self.outputs = []

    def forward(self, x, edge_index):
        out = self.linear(self.norm(x))
        if not self.training:
            self.outputs.append(out.detach())
        return out


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("eval_every", [1, 4])
def test_the_test_value_is_that_of_the_first_best_validation_value(classes, eval_every):
    x, edges, y, *parts = task(n=60, classes=classes)
    net = Alone(classes, 1 if classes == 2 else classes)
    result = fit_node_classifier(net, x, edges, y, *parts, lr=0.05, num_steps=30, eval_every=eval_every)
    seen = net.outputs
    steps = [step for step in range(1, 31) if step % eval_every == 0 or step == 30]
    assert len(seen) == len(steps)

    def value(scores, mask):
        if classes == 2:
            return roc_auc_score(y[mask], scores[mask, 0])
        return float((scores[mask].argmax(1) == y[mask]).double().mean())

    values = [value(scores, parts[1]) for scores in seen]
    best = int(np.argmax(values))
    assert (result.metric, result.best_step) == ("roc_auc" if classes == 2 else "accuracy", steps[best])
    assert result.val == pytest.approx(values[best])
    assert result.test == pytest.approx(value(seen[best], parts[2]))
    assert not net.training
    torch.testing.assert_close(net(x, edges).detach(), seen[best])


def test_steps_are_adamws_with_warm_up_and_decay_of_weights_alone():
    x, edges, y, *parts = task()
    net, twin = Alone(3, 3), Alone(3, 3)
    twin.load_state_dict(net.state_dict())
    fit_node_classifier(
        net, x, edges, y, *parts, lr=0.1, weight_decay=0.5, num_steps=6, warmup_steps=3, eval_every=6
    )
    weights = [twin.linear.weight]
    spared = [twin.linear.bias, *twin.norm.parameters()]
    optimizers = [
        torch.optim.AdamW(weights, weight_decay=0.5),
        torch.optim.AdamW(spared, weight_decay=0.0),
    ]
    for lr in (0.025, 0.05, 0.075, 0.1, 0.1, 0.1):
        twin.zero_grad()
        F.cross_entropy(twin(x, edges)[parts[0]], y[parts[0]]).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    for ours, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_area_under_the_curve_counts_ties_as_half():
    y = torch.randint(2, (50,), generator=seeded(1))
    scores = torch.randint(6, (50, 1), generator=seeded(2)).float()
    assert heterophily._value(scores, y) == pytest.approx(roc_auc_score(y, scores[:, 0]))


def test_the_protocol_reports_one_depth_for_all_splits():
    x, edges, y, *_ = task()
    parts = torch.stack([torch.randperm(40, generator=seeded(k)) % 4 for k in range(3)])
    masks = parts < 2, parts == 2, parts == 3

    def make(depth):
        torch.manual_seed(depth)
        return HeterophilyGNN(3, 8, 3, model="SAGE", num_layers=depth, dropout=0.0).double()

    options = {"lr": 0.01, "num_steps": 8, "eval_every": 2}
    result = run_protocol(make, x, edges, y, *masks, num_layers=(1, 3), **options)
    table = {
        depth: [
            fit_node_classifier(make(depth), x, edges, y, *(m[k] for m in masks), **options) for k in range(3)
        ]
        for depth in (1, 3)
    }
    for depth, results in table.items():
        assert result.val_means[depth] == pytest.approx(np.mean([r.val for r in results]))
    best = max((1, 3), key=lambda depth: result.val_means[depth])
    tests = [r.test for r in table[best]]
    assert result.best_num_layers == best
    assert result.values.tolist() == pytest.approx(tests)
    assert (result.mean, result.std) == pytest.approx((np.mean(tests), np.std(tests, ddof=1)))
    one = run_protocol(make, x, edges, y, *(m[:1] for m in masks), num_layers=(2,), **options)
    assert math.isnan(one.std)


@pytest.mark.parametrize(("height", "width", "mine_rate"), [(7, 9, 0.2), (1, 6, 0.5), (8, 8, 0.9)])
def test_a_board_follows_its_rule_field_by_field(height, width, mine_rate):
    board = minesweeper(height, width, mine_rate=mine_rate, unknown_rate=0.3, generator=seeded(5))
    n, mines = height * width, board.y.view(height, width)
    assert int(mines.sum()) == round(mine_rate * n)
    assert int(board.x[:, 0].sum()) == round(0.3 * n)
    assert torch.equal(board.x.sum(1), torch.ones(n))
    near = defaultdict(set)
    for u, v in board.edge_index.T.tolist():
        near[u].add(v)
    assert board.edge_index.shape[1] == sum(map(len, near.values()))
    for row, column in itertools.product(range(height), range(width)):
        around = {
            (r, c)
            for r, c in itertools.product((row - 1, row, row + 1), (column - 1, column, column + 1))
            if 0 <= r < height and 0 <= c < width and (r, c) != (row, column)
        }
        field = row * width + column
        assert near[field] == {r * width + c for r, c in around}
        if board.x[field, 0] == 0:
            assert int(board.x[field].argmax()) == 1 + min(5, sum(int(mines[place]) for place in around))


def test_the_default_board_has_the_published_size():
    board = minesweeper(generator=seeded())
    assert board.edge_index.shape == (2, 2 * 39_402)
    assert (int(board.y.sum()), int(board.x[:, 0].sum())) == (2000, 5000)
    assert torch.equal(board.x, minesweeper(generator=seeded()).x)


EDGES, Y = torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 1, 0, 1])
X, HALVES = torch.randn(4, 3), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
MASK = torch.eye(6).bool().repeat_interleave(2, 1)[:3]
SIX = torch.randn(12, 3), torch.zeros(2, 0).long(), torch.arange(12) % 2
ONE_CLASS = torch.tensor([0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1])


def protocol(y=SIX[2], train=MASK[:1], val=MASK[1:2], test=MASK[2:3], x=SIX[0], out=1, **options):
    return run_protocol(
        lambda depth: HeterophilyGNN(3, 8, out), x, SIX[1], y, train, val, test, num_steps=1, **options
    )


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
        (lambda: HeterophilyGNN(3, 12, 2, model="GAT"), "hidden_channels must be a multiple of num_heads, got 12 and 8"),
        (lambda: HeterophilyGNN(3, 12, 2, model="MLP"), "model must be one of 'ResNet', .*got 'MLP'"),
        (lambda: HeterophilyGNN(3, 8, 2, norm="group"), "norm must be one of 'layer', 'batch', None, got 'group'"),
        (lambda: HeterophilyGNN(0, 8, 2), "in_channels must be"), (lambda: HeterophilyGNN(3, 0, 2), "hidden_channels must be"),
        (lambda: HeterophilyGNN(3, 8, 0), "out_channels must be"), (lambda: HeterophilyGNN(3, 8, 2, num_layers=0), "num_layers must be"),
        (lambda: HeterophilyGNN(3, 8, 2, hidden_multiplier=0.1), "hidden_multiplier must be at least 0.125, got 0.1"),
        (lambda: HeterophilyGNN(3, 8, 2, model="GT", num_heads=0), "num_heads must be"), (lambda: HeterophilyGNN(3, 8, 2, dropout=1.0), "dropout must be"),
        (lambda: HeterophilyGNN(4, 8, 2)(X, EDGES), r"x must have shape \(any, 4\) for this network, got \(4, 3\)"),
        (lambda: HeterophilyGNN(3, 8, 2)(X, EDGES + 1), r"edge_index must name nodes in 0\.\.3 of x, got 4"),
        (lambda: HeterophilyGNN(3, 8, 2)(X.long(), EDGES), "x must be a floating-point tensor"),
        (lambda: sgc_features(X, EDGES, num_props=0), "num_props must be"), (lambda: sgc_features(X[0], EDGES), "x must have shape"),
        (lambda: sgc_features(X, EDGES + 1), "edge_index must name nodes"), (lambda: adjacency_features(EDGES, 3), "edge_index must name nodes"),
        (lambda: minesweeper(0), "height must be"), (lambda: minesweeper(2, 0), "width must be"),
        (lambda: minesweeper(mine_rate=1.1), r"mine_rate must be in \[0, 1\], got 1.1"), (lambda: minesweeper(unknown_rate=-0.1), "unknown_rate must be"),
        (lambda: protocol(val=MASK[:1]), "val_mask of split 0 must not overlap the other masks"),
        (lambda: protocol(test=MASK[:1]), "test_mask of split 0 must not overlap the other masks"),
        (lambda: protocol(train=MASK[:1] & False), "train_mask of split 0 must not be empty"),
        (lambda: protocol(y=ONE_CLASS), "val_mask of split 0 must hold both classes"),
        (lambda: protocol(ONE_CLASS, MASK[1:], MASK[:2].flip(0) & False | MASK[[0, 0]], MASK[[2, 1]]), "test_mask of split 1 must hold both classes"),
        (lambda: protocol(val=MASK[:2]), r"val_masks must have shape \(1, 12\) for train_masks, got \(2, 12\)"),
        (lambda: protocol(train=MASK[0]), r"train_masks must have shape \(any, 12\) for y"),
        (lambda: protocol(num_layers=()), "there must be a depth and a split, got 0 depths and 1 splits"),
        (lambda: protocol(y=SIX[2][:5]), r"train_masks must have shape \(any, 5\) for y"),
        (lambda: protocol(y=SIX[2] - 1), "y must not be negative"), (lambda: protocol(y=SIX[2].double()), "y must hold integers"),
        (lambda: protocol(x=SIX[0][:5]), r"y must have shape \(5\) for the nodes"), (lambda: protocol(lr=0.0), "lr must be greater than 0"),
        (lambda: protocol(weight_decay=-1.0), "weight_decay must be"), (lambda: protocol(warmup_steps=-1), "warmup_steps must be"),
        (lambda: protocol(eval_every=0), "eval_every must be"), (lambda: protocol(out=2), r"must have shape \(12, 1\) for 2 classes, got \(12, 2\)"),
        (lambda: protocol(y=torch.arange(12) % 3), r"must have shape \(12, 3\) for 3 classes, got \(12, 1\)"),
        (lambda: protocol(x=SIX[0] * torch.inf), "must be finite, got NaN or infinity after 1 steps, lr 3e-05"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fitting_takes_at_least_one_step(as_a_user):
    with pytest.raises(ValueError, match="num_steps must be"):
        fit_node_classifier(HeterophilyGNN(3, 8, 1), *SIX, *MASK, num_steps=0)
