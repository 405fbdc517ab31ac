"""Choices, aggregation and walks of AgentNet against their laws, and what agents may not see."""

import math

import networkx as nx
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from posterity.graphs import AgentNet, log_aggregate, straight_through_choice
from posterity.graphs.agentnet import _States
from posterity.testing import check_layer


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def undirected(graph):
    half = torch.tensor(list(nx.convert_node_labels_to_integers(graph).edges)).T
    return torch.cat([half, half.flip(0)], 1)


def ring(n):
    """A directed cycle: without self-loops every move is forced."""
    node = torch.arange(n)
    return torch.stack([node, (node + 1) % n])


def make(*args, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"num_agents": 3, "num_steps": 5}
    return AgentNet(*(args or (4, 8, 2)), **{**settings, **options})


# Choosing and gathering.


@pytest.mark.parametrize("temperature", [0.1, 2 / 3, 5.0])
def test_choices_follow_the_softmax_at_every_temperature(temperature):
    logits, draws = torch.tensor([0.0, 1.0, -0.5, 2.0]), 20_000
    index = torch.arange(draws).repeat_interleave(4)
    chosen, weight = straight_through_choice(
        logits.repeat(draws), index, draws, temperature=temperature, generator=rng()
    )
    assert torch.equal(chosen // 4, torch.arange(draws)), "one of each group"
    counts = torch.bincount(chosen % 4)
    assert chisquare(counts, draws * logits.double().softmax(0)).pvalue > 1e-3
    assert torch.equal(weight, torch.ones(draws))


def test_weights_have_the_gradient_of_the_soft_choice():
    logits = torch.randn(9, dtype=torch.float64, generator=rng()).requires_grad_()
    index = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    chosen, weight = straight_through_choice(logits, index, 3, temperature=0.7, generator=rng(1))
    (grad,) = torch.autograd.grad(weight.sum(), logits)
    for group in range(3):
        assert abs(float(grad[index == group].sum())) < 1e-12
    assert bool((grad[chosen] > 0).all()) and bool((grad.abs() > 0).all())
    uniform = torch.rand(9, dtype=torch.float64, generator=rng(1))
    noisy = (logits - (-uniform.log()).log()) / 0.7
    soft = torch.cat([noisy[index == group].softmax(0) for group in range(3)])
    (want,) = torch.autograd.grad(soft[chosen].sum(), logits)
    torch.testing.assert_close(grad, want)
    assert torch.equal(
        chosen, torch.stack([(noisy + torch.where(index == g, 0, -1e9)).argmax() for g in range(3)])
    )


@pytest.mark.parametrize(("count", "factor"), [(1, 1), (3, 2 / 3), (7, 3 / 7)])
def test_log_aggregation_lies_between_mean_and_sum(count, factor):
    values = torch.randn(count, 5, generator=rng())
    torch.testing.assert_close(log_aggregate(values, torch.zeros(count).long(), 2)[0], factor * values.sum(0))
    assert not log_aggregate(values, torch.zeros(count).long(), 2)[1].any()


def test_weights_count_and_are_not_counted_in_the_gradient():
    values, weight = (
        torch.randn(4, 2, dtype=torch.float64, generator=rng()),
        torch.rand(4, dtype=torch.float64, generator=rng(1)) + 0.5,
    )
    weight.requires_grad_()
    index, total = torch.tensor([0, 1, 1, 1]), float(weight.detach()[1:].sum())
    out = log_aggregate(values, index, 2, weight)
    factor = torch.log2(torch.tensor(total + 1)) / total
    torch.testing.assert_close(out[1], factor * (weight[1:, None] * values[1:]).sum(0))
    (grad,) = torch.autograd.grad(out[1].sum(), weight)
    torch.testing.assert_close(grad[1:], factor * values[1:].sum(1))


# Walks.


def lesmis():
    graph = nx.convert_node_labels_to_integers(nx.les_miserables_graph())
    other = nx.star_graph(5)
    e = torch.cat([undirected(graph), undirected(other) + len(graph), torch.tensor([[3], [3]])], 1)
    return e, torch.tensor([0] * len(graph) + [1] * 6)


@pytest.mark.parametrize("mode", ["learned", "simple", "random"])
@pytest.mark.parametrize("self_loops", [True, False])
def test_every_move_follows_an_edge_or_stays_and_agents_keep_to_their_graph(mode, self_loops):
    e, batch = lesmis()
    net = make(mode=mode, self_loops=self_loops, num_agents=10, num_steps=12)
    _, trace = net(torch.randn(len(batch), 4, generator=rng()), e, batch, generator=rng(), return_trace=True)
    edges = set(map(tuple, e.T.tolist()))
    assert trace.positions.shape == (13, 20)
    assert torch.equal(batch[trace.positions], torch.arange(2).repeat_interleave(10).expand(13, 20))
    for before, after in zip(trace.positions[:-1].tolist(), trace.positions[1:].tolist(), strict=True):
        for u, v in zip(before, after, strict=True):
            assert (u, v) in edges or (self_loops and u == v)


def test_starts_are_uniform_over_the_graphs_own_nodes():
    batch = torch.tensor([0] * 3 + [1] * 7)
    e = torch.cat([ring(3), ring(7) + 3], 1)
    net = make(num_agents=2000, num_steps=1)
    with torch.no_grad():
        _, trace = net(torch.ones(10, 4), e, batch, generator=rng(), return_trace=True)
    counts = torch.bincount(trace.positions[0], minlength=10)
    assert chisquare(counts[:3]).pvalue > 1e-3 and chisquare(counts[3:]).pvalue > 1e-3
    assert int(counts[:3].sum()) == int(counts[3:].sum()) == 2000


def test_random_moves_are_uniform_over_candidates_and_have_no_bias():
    e = undirected(nx.star_graph(4))
    net = make(mode="random", num_agents=4000, num_steps=1)
    assert not hasattr(net, "move_bias")
    with torch.no_grad():
        _, trace = net(
            torch.ones(5, 4), e, start=torch.zeros(4000).long(), generator=rng(), return_trace=True
        )
    assert chisquare(torch.bincount(trace.positions[1], minlength=5)).pvalue > 1e-3


def explorer(**options):
    net = make(mode="simple", **options)
    net.move_bias.data = torch.tensor([-60.0, -60.0, -60.0, 60.0])
    return net


@pytest.mark.parametrize("n", [3, 4, 9])
def test_an_explorer_goes_round_a_cycle(n):
    net = explorer(num_agents=20, num_steps=n - 1)
    _, trace = net(torch.ones(n, 4), undirected(nx.cycle_graph(n)), generator=rng(), return_trace=True)
    for walk in trace.positions.T.tolist():
        assert sorted(walk) == list(range(n))


def test_an_explorer_turns_back_on_a_tree_only_at_a_leaf():
    tree = nx.random_labeled_tree(30, seed=2)
    net = explorer(num_agents=40, num_steps=12)
    _, trace = net(torch.ones(30, 4), undirected(tree), generator=rng(), return_trace=True)
    for walk in trace.positions.T.tolist():
        end = next((t for t, node in enumerate(walk) if tree.degree[node] == 1 and t), len(walk) - 1)
        assert len(set(walk[: end + 1])) == end + 1


def test_visits_fade():
    """On a path a - b - c with b left long ago: the bias of b is r explored + (1 - r) unexplored."""
    net = make(mode="simple", visited_decay=0.5, num_agents=20_000, num_steps=3)
    net.move_bias.data = torch.tensor([0.0, -60.0, -1.0, 1.0])
    # from node 0 all go to 1, then 2; node 2 leads to 0 (seen 3 steps before the choice) and 3 (new)
    e = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]])
    with torch.no_grad():
        _, trace = net(
            torch.ones(4, 4), e, start=torch.zeros(20_000).long(), generator=rng(), return_trace=True
        )
    assert bool((trace.positions[2] == 2).all())
    r = 0.5 ** (3 - 1 - 0) / 0.5
    want = torch.tensor([r * -1 + (1 - r) * 1, 1.0], dtype=torch.float64).softmax(0)
    counts = torch.bincount(trace.positions[3], minlength=4)[[0, 3]]
    assert int(counts.sum()) == 20_000 and chisquare(counts, 20_000 * want).pvalue > 1e-3


# What the network computes.


def test_on_forced_walks_names_of_nodes_do_not_matter():
    n, order = 9, torch.randperm(9, generator=rng(4))
    x, start = torch.randn(n, 4, generator=rng()), torch.tensor([0, 4, 4])
    net, place = make(self_loops=False), torch.empty(9, dtype=torch.int64)
    place[order] = torch.arange(n)
    out = net(x, ring(n), start=start)
    torch.testing.assert_close(net(x[order], place[ring(n)], start=place[start]), out)
    assert not torch.allclose(net(x, ring(n), start=start.roll(1)), out), "slots differ"


@pytest.mark.parametrize("n", [30, 3000])
def test_what_lies_beyond_one_hop_of_the_walk_has_no_influence(n):
    x = torch.randn(n, 4, generator=rng()).requires_grad_()
    start = torch.tensor([5, 6, 20])
    net = make(self_loops=False, num_steps=3)
    (grad,) = torch.autograd.grad(net(x, ring(n), start=start).square().sum(), x)
    walked = {int(s) + t for s in start for t in range(4)}
    seen = walked | {node - 1 for node in walked}
    assert set(grad.abs().sum(1).nonzero()[:, 0].tolist()) == seen


def test_a_batch_is_its_graphs():
    x = torch.randn(12, 4, generator=rng())
    e, batch = torch.cat([ring(5), ring(7) + 5], 1), torch.tensor([0] * 5 + [1] * 7)
    net, start = make(self_loops=False), torch.tensor([0, 3, 3, 5, 8, 11])
    both = net(x, e, batch, start=start)
    torch.testing.assert_close(both[:1], net(x[:5], ring(5), start=start[:3]))
    torch.testing.assert_close(both[1:], net(x[5:], ring(7), start=start[3:] - 5))


@pytest.mark.parametrize("mode", ["learned", "simple", "random"])
def test_tables_and_lists_of_states_agree_and_a_seed_repeats(mode, monkeypatch):
    e, batch = lesmis()
    x = torch.randn(len(batch), 4, generator=rng(), dtype=torch.float64)
    net = make(mode=mode, num_agents=6, num_steps=8).double()
    out, trace = net(x, e, batch, generator=rng(3), return_trace=True)
    again = net(x, e, batch, generator=rng(3))
    assert torch.equal(out, again)
    grads = torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True)
    init = _States.__init__
    monkeypatch.setattr(
        _States, "__init__", lambda self, x, encoder, dense: init(self, x, encoder, dense=False)
    )
    other, path = net(x, e, batch, generator=rng(3), return_trace=True)
    assert torch.equal(path.positions, trace.positions)
    torch.testing.assert_close(other, out)
    for a, b in zip(
        torch.autograd.grad(other.square().sum(), list(net.parameters()), allow_unused=True),
        grads,
        strict=True,
    ):
        if a is not None:
            torch.testing.assert_close(a, b)


def test_given_moves_are_those_found():
    e = undirected(nx.les_miserables_graph())
    x, net = torch.randn(77, 4, generator=rng()), make()
    out = net(x, e, generator=rng(1))
    torch.testing.assert_close(net(x, e, generator=rng(1), csr=AgentNet.csr(e, 77)), out)


@pytest.mark.parametrize("reduce", ["log", "mean", "sum"])
@pytest.mark.parametrize("edge_dim", [None, 3])
def test_gradients_reach_every_parameter(reduce, edge_dim):
    e, batch = lesmis()
    attr = None if edge_dim is None else torch.randn(e.shape[1], 3, generator=rng(2))
    net = make(edge_dim=edge_dim, reduce=reduce, num_agents=8, num_steps=8, temperature=2.0)
    net.move_bias.data = torch.zeros(4)
    net(
        torch.randn(len(batch), 4, generator=rng()), e, batch, attr, generator=rng(1)
    ).square().sum().backward()
    for name, parameter in net.named_parameters():
        if name != "key.1.bias":  # the same for all candidates
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_edge_features_enter_and_the_order_of_edges_does_not_matter():
    x, attr = torch.randn(7, 4, generator=rng()), torch.randn(7, 3, generator=rng(1))
    net, start = make(edge_dim=3, self_loops=False), torch.tensor([0, 2, 2])
    out = net(x, ring(7), None, attr, start=start)
    order = torch.randperm(7, generator=rng(2))
    torch.testing.assert_close(net(x, ring(7)[:, order], None, attr[order], start=start), out)
    changed = attr.clone()
    changed[3] += 1
    assert not torch.allclose(net(x, ring(7), None, changed, start=start), out)


def test_nodes_without_a_way_out_and_graphs_without_edges():
    for self_loops in (True, False):
        net, none = make(self_loops=self_loops), torch.zeros(2, 0, dtype=torch.int64)
        out, trace = net(torch.randn(1, 4), none, return_trace=True)
        assert torch.isfinite(out).all() and not trace.positions.any()
        edge = torch.tensor([[0], [1]])
        _, trace = make(self_loops=self_loops, num_steps=4)(
            torch.randn(2, 4), edge, start=torch.zeros(3).long(), return_trace=True
        )
        assert bool((trace.positions[-1] >= trace.positions[0]).all())
    net = make(edge_dim=2)
    assert torch.isfinite(net(torch.randn(2, 4), none, None, torch.zeros(0, 2))).all()


class Forced(nn.Module):
    """Forced walks from fixed nodes: a deterministic layer."""

    def __init__(self, **options):
        super().__init__()
        self.net = make(self_loops=False, mode="random", **options)

    def forward(self, x, edge_index):
        return self.net(x, edge_index, start=torch.tensor([0, 1, 4], device=x.device), generator=rng())


@pytest.mark.parametrize("options", [{}, {"global_pool": False}, {"mlp_width": 1, "reduce": "sum"}])
def test_conformance(options, as_a_user):
    check_layer(Forced(**options), torch.randn(6, 4, generator=rng()), ring(6), shape=(1, 2))


# Bad input.


def test_wrong_arguments_are_refused(as_a_user):
    x, e = torch.ones(5, 4), undirected(nx.path_graph(5))
    net, edged = make(), make(edge_dim=2)
    for call, message in [
        (lambda: AgentNet(0, 8, 2), "in_channels"),
        (lambda: AgentNet(4, 7, 2), "hidden_channels must be even"),
        (lambda: AgentNet(4, 8, 0), "out_channels"),
        (lambda: make(num_agents=0), "num_agents"),
        (lambda: make(num_steps=0), "num_steps"),
        (lambda: make(mlp_width=0), "mlp_width"),
        (lambda: make(edge_dim=0), "edge_dim"),
        (lambda: make(temperature=0.0), "temperature"),
        (lambda: make(visited_decay=0.0), "visited_decay"),
        (lambda: make(visited_decay=1.1), "visited_decay"),
        (lambda: make(mode="greedy"), "mode must be one of"),
        (lambda: make(reduce="max"), "reduce must be one of"),
        (lambda: make(dropout=1.0), "dropout"),
        (lambda: net(x[:, :3], e), "x must have shape"),
        (lambda: net(x, e + 1), r"nodes in 0\.\.4"),
        (lambda: net(x, e, start=torch.zeros(2).long()), "start must have shape"),
        (lambda: net(x, e, start=torch.tensor([0, 9, 0])), "slot 1 is at node 9"),
        (
            lambda: net(x, e[:, :0], torch.tensor([0, 0, 1, 1, 1]), start=torch.tensor([0, 1, 2, 2, 3, 4])),
            "slot 2",
        ),
        (lambda: net(x, e, torch.tensor([0, 1, 0, 1, 1])), "sorted"),
        (lambda: net(x, e[:, :0], torch.tensor([0, 0, 2, 2, 2])), "without nodes"),
        (lambda: net(x[:0], e[:, :0]), "without nodes"),
        (lambda: net(x, e, None, torch.ones(8, 2)), "edge_attr must be given if and only if"),
        (lambda: edged(x, e), "edge_attr must be given if and only if"),
        (lambda: edged(x, e, None, torch.ones(8, 3)), "edge_attr must have shape"),
        (lambda: edged(x, e, None, torch.ones(8, 2), csr=AgentNet.csr(e, 5)), "csr knows no edge features"),
        (
            lambda: straight_through_choice(torch.ones(2), torch.zeros(2).long(), 1, temperature=0.0),
            "temperature",
        ),
        (lambda: straight_through_choice(torch.ones(2), torch.zeros(3).long(), 1), "index must have shape"),
        (lambda: net(x, e, torch.zeros(5)), "batch must hold integers"),
        (lambda: net(x, e, torch.zeros(5).long() - 1), "batch must not be negative, got -1"),
        (lambda: net(x, e, start=torch.zeros(3)), "start must hold integers"),
        (lambda: net(x, e, csr=(e, e)), r"csr\[0\] must have shape \(6\) for the nodes"),
        (lambda: net(x, e, csr=(torch.zeros(6).long(), x)), r"csr\[1\] must hold integers"),
        (lambda: edged(x, e, None, torch.ones(8, 2).long()), "edge_attr must be a floating-point tensor"),
        (lambda: AgentNet.csr(e, -1), "num_nodes must be an integer of at least 0, got -1"),
        (lambda: AgentNet.csr(e, 4), r"edge_index must name nodes in 0\.\.3 of num_nodes, got 4"),
        (
            lambda: straight_through_choice(torch.ones(2), torch.tensor([0, 1]), 1),
            r"index must name groups in 0\.\.0, got 1",
        ),
        (
            lambda: straight_through_choice(torch.ones(2), torch.tensor([0, 2]), 3),
            "index must leave no group empty, got none of group 1",
        ),
        (lambda: log_aggregate(x, torch.arange(5), 4), r"index must name groups in 0\.\.3, got 4"),
        (
            lambda: log_aggregate(x, torch.arange(5), 2.5),
            "num_groups must be an integer of at least 0, got 2.5",
        ),
        (lambda: log_aggregate(x, torch.arange(4), 5), r"index must have shape \(5\) for values"),
        (lambda: log_aggregate(x.long(), torch.arange(5), 5), "values must be a floating-point tensor"),
        (
            lambda: log_aggregate(x, torch.arange(5), 5, torch.ones(4)),
            r"weight must have shape \(5\) for values",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_not_finite_walks_on_and_shows_in_the_result():
    x, e = torch.full((5, 4), math.nan), undirected(nx.path_graph(5))
    assert make()(x, e).isnan().all()
    chosen, weight = straight_through_choice(torch.tensor([0.0, math.nan]), torch.tensor([0, 1]), 2)
    assert chosen.tolist() == [0, 1] and weight[1].isnan()
