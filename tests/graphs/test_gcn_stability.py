"""Resolvent filters against explicit inverses, their certificates against what they bound."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve

from posterity.graphs import (
    ResolventConv,
    StableGCN,
    collapse_bound,
    collapse_strong_edges,
    filter_gain,
    stability_bound,
)
from posterity.testing import check_graph_network, check_layer

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_graph(n=9, seed=0, directed=False):
    """A ring with chords, weights from 0.5 to 2, node weights from 0.5 to 3."""
    generator = rng(seed)
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    chords = torch.stack([torch.arange(n), (torch.arange(n) + 3) % n])[:, ::2]
    edges = torch.cat([ring, chords], 1)
    weight = 0.5 + 1.5 * torch.rand(edges.shape[1], generator=generator, dtype=F64)
    mu = 0.5 + 2.5 * torch.rand(n, generator=generator, dtype=F64)
    if directed:
        return edges, weight, mu
    return torch.cat([edges, edges.flip(0)], 1), torch.cat([weight, weight]), mu


def clustered(delta, seed=0):
    """A random graph in which the edges of {0, 1, 2} and {5, 6} are scaled by 1/delta."""
    edges, weight, mu = random_graph(seed=seed)
    group = torch.tensor([1, 1, 1, 2, 3, 4, 4, 5, 6])
    strong = group[edges[0]] == group[edges[1]]
    return edges, torch.where(strong, weight / delta, weight), mu, strong


def laplacian(edges, weight, mu):
    """L by a loop over edges."""
    L = torch.zeros(len(mu), len(mu), dtype=F64)
    for (j, i), w in zip(edges.T.tolist(), weight.tolist(), strict=True):
        L[i, i] += w / mu[i]
        L[i, j] -= w / mu[i]
    return L


def resolvent(edges, weight, mu, shift=1.0):
    L = laplacian(edges, weight, mu)
    return shift * torch.linalg.inv(L + shift * torch.eye(len(L), dtype=F64))


def norm(f, mu):
    return float((mu[:, None] * f.detach().square()).sum().sqrt())


def operator_norm(M, mu):
    root = mu.sqrt()
    return float(torch.linalg.matrix_norm(root[:, None] * M / root, 2))


def make(kind=ResolventConv, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = kind(*args, **options).double()
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return net


def by_hand(conv, x, R):
    weights = list(conv.weight)
    y = x @ weights.pop(0) if conv.identity else 0
    for k, W in enumerate(weights, 1):
        y = y + torch.linalg.matrix_power(R, k) @ x @ W
    return y if conv.bias is None else y + conv.bias


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("channels", [(3, 5), (5, 3)])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_the_layer_is_explicit_inverses_and_powers(monkeypatch, directed, identity, channels, large, lead):
    if large:
        monkeypatch.setattr("posterity.graphs.resolvent.LARGEST_DENSE", 1)
    edges, weight, mu = random_graph(directed=directed)
    conv = make(ResolventConv, *channels, 3, shift=0.7, identity=identity)
    x = torch.randn(*lead, 9, channels[0], generator=rng(1), dtype=F64)
    R = resolvent(edges, weight, mu, 0.7)
    torch.testing.assert_close(conv(x, edges, weight, mu), by_hand(conv, x, R), rtol=1e-10, atol=1e-10)
    ones = torch.ones(9, dtype=F64)
    expected = by_hand(conv, x, resolvent(edges, torch.ones_like(weight), ones, 0.7))
    torch.testing.assert_close(conv(x, edges), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize(("large", "lead"), [(False, ()), (False, (3,)), (True, ())])
def test_gradients_are_those_of_differences_and_of_any_order(monkeypatch, directed, large, lead):
    if large:
        monkeypatch.setattr("posterity.graphs.resolvent.LARGEST_DENSE", 1)
    edges, weight, mu = random_graph(4, directed=directed)
    conv = make(ResolventConv, 2, 2, 2, shift=0.7)
    x = torch.randn(*lead, 4, 2, generator=rng(1), dtype=F64)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, mu)]
    assert torch.autograd.gradcheck(lambda x, w, m: conv(x, edges, w, m), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w, m: conv(x, edges, w, m), leaves)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("strength", [1.0, 1e8])
def test_the_resolvent_averages(directed, strength):
    edges, weight, mu = random_graph(directed=directed)
    weight = torch.where(torch.arange(len(weight)) % 3 == 0, strength * weight, weight)
    conv = make(ResolventConv, 9, 9, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(9))
        R = conv(torch.eye(9, dtype=F64), edges, weight, mu)
    assert (R >= 0).all()
    torch.testing.assert_close(R.sum(1), torch.ones(9, dtype=F64), rtol=0, atol=1e-12 * max(strength, 10))


def test_a_large_directed_graph_is_solved_as_by_scipy():
    n = 2_100
    generator = rng(2)
    edges = torch.randint(n, (2, 3 * n), generator=generator)
    weight = torch.rand(3 * n, generator=generator) * 100 + 1e-3
    conv = make(ResolventConv, 2, 3, 2).float()
    x = torch.randn(n, 2, generator=generator)
    got = conv(x, edges, weight)
    assert got.dtype == torch.float32
    W = sparse.coo_matrix((weight.double().numpy(), edges.flip(0).numpy()), (n, n))
    B = (sparse.diags_array(1 + np.asarray(W.sum(1)).ravel()) - W).tocsc()
    once = spsolve(B, x.double().numpy())
    first, second = conv.weight.detach().double().numpy()
    expected = once @ first + spsolve(B, once) @ second + conv.bias.detach().double().numpy()
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


def test_projecting_undoes_lifting_and_is_its_adjoint():
    edges, weight, mu, strong = clustered(1e-3)
    coarse = collapse_strong_edges(edges, 9, weight, strong, node_weight=mu)
    assert coarse.cluster.tolist() == [0, 0, 0, 1, 2, 3, 3, 4, 5]
    assert coarse.num_nodes == 6
    f = torch.randn(6, 2, generator=rng(1), dtype=F64)
    h = torch.randn(9, 2, generator=rng(2), dtype=F64)
    torch.testing.assert_close(coarse.project(coarse.lift(f)), f)
    fine = (mu[:, None] * h * coarse.lift(f)).sum()
    torch.testing.assert_close((coarse.node_weight[:, None] * coarse.project(h) * f).sum(), fine)
    assert norm(coarse.lift(f), mu) == pytest.approx(norm(f, coarse.node_weight))


def test_the_coarse_laplacian_is_the_weak_one_between_lifted_signals():
    edges, weight, mu, strong = clustered(1e-3)
    edges = torch.cat([edges, torch.tensor([[0, 2], [2, 0]])], 1)  # a weak edge inside a cluster
    weight, strong = torch.cat([weight, torch.ones(2, dtype=F64)]), torch.cat([strong, torch.zeros(2) > 0])
    coarse = collapse_strong_edges(edges, 9, weight, strong, node_weight=mu)
    J = coarse.lift(torch.eye(6, dtype=F64))
    weak = laplacian(edges[:, ~strong], weight[~strong], mu)
    expected = coarse.project(weak @ J)
    got = laplacian(coarse.edge_index, coarse.edge_weight, coarse.node_weight)
    torch.testing.assert_close(got, expected)
    assert (coarse.edge_index[0] != coarse.edge_index[1]).all()
    assert len(coarse.edge_index.T.unique(dim=0)) == coarse.edge_index.shape[1]


def test_collapsing_nothing_changes_nothing():
    edges, weight, mu = random_graph()
    coarse = collapse_strong_edges(edges, 9, weight, 1e3, node_weight=mu)
    assert coarse.cluster.tolist() == list(range(9))
    got = laplacian(coarse.edge_index, coarse.edge_weight, coarse.node_weight)
    torch.testing.assert_close(got, laplacian(edges, weight, mu))
    assert collapse_bound(edges, 9, weight, 1e3, node_weight=mu).value == 0


def test_a_connected_graph_of_strong_edges_is_one_node():
    edges, weight, mu = random_graph()
    coarse = collapse_strong_edges(edges, 9, None, 1.0)
    assert coarse.num_nodes == 1
    assert coarse.edge_index.shape == (2, 0)
    assert coarse.node_weight.item() == 9
    bound = collapse_bound(edges, 9, 100 * weight, 1.0, node_weight=mu)
    far = resolvent(edges, 100 * weight, mu) - (mu / mu.sum()).expand(9, 9)
    assert bound.coupling == 0
    assert operator_norm(far, mu) == pytest.approx(bound.value, rel=1e-6)  # 1/(1 + gap), attained


def collapse_error(delta, seed, shift=1.0):
    edges, weight, mu, strong = clustered(delta, seed)
    coarse = collapse_strong_edges(edges, 9, weight, strong, node_weight=mu)
    J = coarse.lift(torch.eye(6, dtype=F64))
    R_c = resolvent(coarse.edge_index, coarse.edge_weight, coarse.node_weight, shift)
    error = resolvent(edges, weight, mu, shift) - J @ R_c @ coarse.project(torch.eye(9, dtype=F64))
    bound = collapse_bound(edges, 9, weight, strong, node_weight=mu, shift=shift)
    return operator_norm(error, mu), bound


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_the_collapse_changes_the_resolvent_by_at_most_the_bound_and_in_proportion(seed, shift):
    errors = []
    for delta in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):
        error, bound = collapse_error(delta, seed, shift)
        assert error <= bound.value
        d = 1 / (1 + bound.gap)
        assert bound.value == pytest.approx(d * ((1 + bound.coupling) ** 2 + bound.coupling**2 * d))
        errors.append(error)
    assert 7 <= errors[3] / errors[4] <= 13


def test_gap_and_coupling_are_what_they_say():
    edges, weight, mu, strong = clustered(1e-2)
    _, bound = collapse_error(1e-2, 0, shift=2.0)
    root = mu.sqrt()
    scaled = [root[:, None] * laplacian(edges[:, k], weight[k], mu) / root / 2.0 for k in (strong, ~strong)]
    spectrum = torch.linalg.eigvalsh(scaled[0])
    coarse = collapse_strong_edges(edges, 9, weight, strong, node_weight=mu)
    P = coarse.lift(coarse.project(torch.eye(9, dtype=F64)))
    P = root[:, None] * P / root
    assert bound.gap == pytest.approx(float(spectrum[spectrum > 1e-6].min()))
    off = (torch.eye(9, dtype=F64) - P) @ scaled[1] @ P
    assert bound.coupling == pytest.approx(float(torch.linalg.matrix_norm(off, 2)))


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_gain_is_that_of_a_fine_grid(identity, order, seed):
    conv = make(ResolventConv, 2, 2, order, identity=identity, seed=seed)
    inside = seed % 2 == 1 and order > 1
    if inside:  # alternating signs, nothing at either end
        signs = (-1.0) ** torch.arange(len(conv.weight))
        signs[0] *= not identity
        with torch.no_grad():
            conv.weight.copy_(conv.weight[:1].abs() * signs[:, None, None])
    r = torch.linspace(0, 1, 100_001, dtype=F64)
    powers = range(0 if identity else 1, order + 1)
    G = sum(r[:, None, None] ** k * W for k, W in zip(powers, conv.weight.detach(), strict=True))
    grid, where = (float(value) for value in G.flatten(1).norm(dim=1).max(0))
    assert 0 < where < len(r) - 1 or not inside
    assert grid <= filter_gain(conv) * (1 + 1e-12)
    assert filter_gain(conv) == pytest.approx(grid, rel=1e-8)
    some = torch.tensor([0.0, 0.5, 7.0], dtype=F64)
    G = sum(
        (1 / (1 + some))[:, None, None] ** k * W for k, W in zip(powers, conv.weight.detach(), strict=True)
    )
    assert filter_gain(conv, some) == pytest.approx(float(G.flatten(1).norm(dim=1).max()))


@pytest.mark.parametrize("seed", range(5))
def test_the_gain_bounds_differences_of_outputs_and_is_attained(seed):
    edges, weight, mu = random_graph(seed=seed)
    spectrum = torch.linalg.eigvals(laplacian(edges, weight, mu)).real.clamp_min(0)
    conv = make(ResolventConv, 3, 4, 3, identity=True, seed=seed)
    gain, over_all = filter_gain(conv, spectrum), filter_gain(conv)
    assert gain <= over_all
    f, h = torch.randn(2, 9, 3, generator=rng(seed), dtype=F64)
    assert norm(conv(f, edges, weight, mu) - conv(h, edges, weight, mu), mu) <= gain * norm(f - h, mu)
    # With one channel in, the eigenvector of the right eigenvalue attains the gain.
    one = make(ResolventConv, 1, 4, 3, seed=seed)
    values, vectors = torch.linalg.eig(laplacian(edges, weight, mu))
    stretched = [
        norm(one(v[:, None], edges, weight, mu) - one(0 * v[:, None], edges, weight, mu), mu)
        / norm(v[:, None], mu)
        for v in vectors.real.T
    ]
    assert max(stretched) == pytest.approx(filter_gain(one, values.real.clamp_min(0)), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act", ["relu", "tanh", "abs"])
@pytest.mark.parametrize(
    "options", [{}, {"pool": "mean"}, {"identity": True}, {"max_gain": 0.5, "pool": "mean"}]
)
def test_networks_on_fine_and_coarse_graphs_differ_by_at_most_the_bound(seed, act, options):
    edges, weight, mu, strong = clustered(1e-2, seed)
    coarse = collapse_strong_edges(edges, 9, weight, strong, node_weight=mu)
    bound = collapse_bound(edges, 9, weight, strong, node_weight=mu)
    net = make(StableGCN, 3, 6, 2, 3, act=act, seed=seed, **options)
    f = torch.randn(6, 3, generator=rng(seed), dtype=F64)
    noise = 0.01 * torch.randn(9, 3, generator=rng(seed + 9), dtype=F64)
    low = net(f, coarse.edge_index, coarse.edge_weight, coarse.node_weight)
    for change in (0 * noise, noise):
        high = net(coarse.lift(f) + change, edges, weight, mu)
        error = float((high - low).detach().norm()) if net.pool else norm(high - coarse.lift(low), mu)
        limit = stability_bound(
            net,
            bound.value,
            norm(f, coarse.node_weight),
            input_error=norm(change, mu),
            measure=float(mu.sum()),
        )
        assert 0 < error <= limit


def test_the_bound_of_one_layer_is_the_formula():
    net = make(StableGCN, 2, 3, 2, 1, order=2)
    net.requires_grad_(False)
    (conv,) = net.convs
    change = sum(k * float(torch.linalg.svdvals(W)[0]) for k, W in enumerate(conv.weight, 1))
    stretch = float(torch.linalg.svdvals(net.readout.weight)[0])
    expected = (filter_gain(conv) * 0.2 + 0.1 * change * 3.0) * stretch
    assert stability_bound(net, 0.1, 3.0, input_error=0.2, measure=9.0) == pytest.approx(expected)
    net.pool = "mean"
    assert stability_bound(net, 0.1, 3.0, input_error=0.2, measure=9.0) == pytest.approx(expected / 3)
    two = make(StableGCN, 2, 3, 2, 2, order=1).requires_grad_(False)
    gains = [filter_gain(conv) for conv in two.convs]
    sizes = [float(torch.linalg.svdvals(conv.weight[0])[0]) for conv in two.convs]
    second = gains[0] * 3.0 + float(two.convs[0].bias.norm()) * 3.0
    error = gains[1] * 0.1 * sizes[0] * 3.0 + 0.1 * sizes[1] * second
    stretch = float(torch.linalg.svdvals(two.readout.weight)[0])
    assert stability_bound(two, 0.1, 3.0, measure=9.0) == pytest.approx(error * stretch)


@pytest.mark.parametrize("seed", range(5))
def test_changing_weights_changes_the_resolvent_by_at_most_the_laplacians_change(seed):
    edges, weight, mu = random_graph(seed=seed)
    half = len(weight) // 2
    other = weight * (1 + 0.3 * torch.rand(half, generator=rng(seed), dtype=F64).repeat(2))
    epsilon = operator_norm(laplacian(edges, weight, mu) - laplacian(edges, other, mu), mu) / 2.0
    R, S = resolvent(edges, weight, mu, 2.0), resolvent(edges, other, mu, 2.0)
    assert operator_norm(R - S, mu) <= epsilon
    net = make(StableGCN, 3, 5, 2, shift=2.0, seed=seed)
    f = torch.randn(9, 3, generator=rng(seed), dtype=F64)
    error = norm(net(f, edges, weight, mu) - net(f, edges, other, mu), mu)
    assert error <= stability_bound(net, epsilon, norm(f, mu), measure=float(mu.sum()))


def test_max_gain_caps_every_layer_and_leaves_smaller_ones():
    edges, weight, mu = random_graph()
    x = torch.randn(9, 3, generator=rng(), dtype=F64)
    free, loose, tight = (make(StableGCN, 3, 6, 2, max_gain=gain) for gain in (None, 1e3, 0.5))
    torch.testing.assert_close(free(x, edges, weight, mu), loose(x, edges, weight, mu))
    for conv in tight.convs:
        assert filter_gain(conv) > 0.5
        conv.weight.data.mul_(0.5 / filter_gain(conv))
    for conv, own in zip(free.convs, tight.convs, strict=True):
        conv.weight.data.copy_(own.weight)
    torch.testing.assert_close(free(x, edges, weight, mu), tight(x, edges, weight, mu))
    edges, weight, mu = random_graph(4)
    net, x = make(StableGCN, 1, 2, 1, 1, max_gain=0.3, act="tanh"), x[:4, :1]

    def out(value):
        return torch.func.functional_call(net, {"convs.0.weight": value}, (x, edges, weight, mu))

    assert torch.autograd.gradcheck(out, net.convs[0].weight.detach().clone().requires_grad_())


def test_zero_weights_have_no_gain_and_a_finite_gradient():
    net = make(StableGCN, 2, 3, 1, max_gain=1.0)
    for conv in net.convs:
        conv.weight.data.zero_()
        assert filter_gain(conv) == 0
    edges, weight, mu = random_graph(5)
    net(torch.ones(5, 2, dtype=F64), edges, weight, mu).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_network_is_its_layers_activation_mean_and_readout():
    edges, weight, mu = random_graph()
    x = torch.randn(9, 3, generator=rng(), dtype=F64)
    batch = torch.tensor([0] * 4 + [1] * 3 + [3] * 2)  # graph 2 has no nodes
    net = make(StableGCN, 3, 5, 2, 3, order=2, act="abs", pool="mean", identity=True)
    h = x
    for conv in net.convs:
        h = conv(h, edges, weight, mu).abs()
    rows = [torch.zeros(5, dtype=F64)] * 4
    for k in (0, 1, 3):
        own = batch == k
        rows[k] = (mu[own, None] * h[own]).sum(0) / mu[own].sum()
    torch.testing.assert_close(net(x, edges, weight, mu, batch), net.readout(torch.stack(rows)))
    whole = (mu[:, None] * h).sum(0, keepdim=True) / mu.sum()
    torch.testing.assert_close(net(x, edges, weight, mu), net.readout(whole))
    net.pool = None
    torch.testing.assert_close(net(x, edges, weight, mu), net.readout(h))


def test_one_graph_is_factored_once_for_all_layers(monkeypatch):
    calls = []
    plain = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda B: calls.append(B) or plain(B))
    edges, weight, _ = random_graph()
    make(StableGCN, 3, 5, 2, 4, order=3)(torch.ones(9, 3, dtype=F64), edges, weight).sum().backward()
    assert len(calls) == 1


def test_a_cached_graph_is_used_again_until_reset(monkeypatch):
    monkeypatch.setattr("posterity.graphs.resolvent.LARGEST_DENSE", 1)
    edges, weight, mu = random_graph()
    conv = make(ResolventConv, 3, 3, cached=True)
    x = torch.randn(9, 3, generator=rng(), dtype=F64)
    first = conv(x, edges, weight.requires_grad_(), mu)
    torch.testing.assert_close(conv(x, edges[:, :2]), first)
    for _ in range(2):
        conv(x, edges, weight, mu).sum().backward()
    assert weight.grad is None
    with pytest.raises(ValueError, match="x must have 9 nodes as the cached graph, got 8"):
        conv(x[:8], edges)
    twin = pickle.loads(pickle.dumps(conv))  # without the factorisation
    assert not torch.allclose(twin(x, edges[:, :2]), first)
    torch.testing.assert_close(copy.deepcopy(conv)(x, edges, weight, mu), first)
    state = conv.state_dict()
    conv.reset_parameters()
    conv.load_state_dict(state)
    assert not torch.allclose(conv(x, edges[:, :2]), first)


def test_edges_that_repeat_add_up_and_loops_do_nothing():
    edges, weight, mu = random_graph()
    conv = make(ResolventConv, 3, 3)
    x = torch.randn(9, 3, generator=rng(), dtype=F64)
    loops = torch.tensor([[4, 4], [4, 4]])
    twice = torch.cat([edges, edges, loops], 1)
    halves = torch.cat([weight / 4, 3 * weight / 4, torch.ones(2, dtype=F64)])
    torch.testing.assert_close(conv(x, twice, halves, mu), conv(x, edges, weight, mu))


CYCLE = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])  # directed, with a chord
UNDIRECTED = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [1, 2, 3, 4, 0, 2, 4]])
UNDIRECTED = torch.cat([UNDIRECTED, UNDIRECTED.flip(0)], 1)


@pytest.mark.parametrize(
    "network",
    [
        ResolventConv(3, 4), ResolventConv(3, 2, 3, shift=0.5, identity=True, bias=False), StableGCN(3, 8, 2),
        StableGCN(3, 8, 2, 3, act="tanh", max_gain=0.7), StableGCN(3, 8, 2, act="abs", identity=True, order=1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("edges", [UNDIRECTED, CYCLE])
def test_conforms_to_its_kind(as_a_user, network, edges):
    check_graph_network(network, torch.randn(5, 3, generator=rng()), edges)


def test_graph_level_conforms_and_leading_axes_share_the_graph(as_a_user):
    x = torch.randn(4, 5, 3, generator=rng())
    network = StableGCN(3, 8, 2, pool="mean")
    check_graph_network(network, x[0], UNDIRECTED, level="graph")
    check_layer(network, x, UNDIRECTED, shape=(4, 1, 2))
    torch.testing.assert_close(network(x, UNDIRECTED)[2], network(x[2], UNDIRECTED))
    assert repr(network.convs[0]) == "ResolventConv(3, 8, order=2, shift=1.0, identity=False)"


X, PAIR = torch.randn(3, 4, generator=rng()), torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResolventConv(0, 1), "in_channels must be an integer of at least 1"), (lambda: ResolventConv(1, 0), "out_channels must be an integer of at least 1"),
        (lambda: ResolventConv(1, 1, 0), "order must be an integer of at least 1, got 0"),
        (lambda: ResolventConv(1, 1, shift=0.0), "shift must be greater than 0, got 0.0"), (lambda: StableGCN(1, 1, 1, 0), "num_layers must be an integer of at least 1"),
        (lambda: StableGCN(1, 1, 1, order=0), "order must be an integer of at least 1"),
        (lambda: StableGCN(1, 1, 1, shift=-1.0), "shift must be greater than 0, got -1.0"),
        (lambda: StableGCN(1, 1, 1, act="gelu"), "act must be one of 'relu', 'tanh', 'abs', got 'gelu'"),
        (lambda: StableGCN(1, 1, 1, pool="sum"), "pool must be one of 'mean', None, got 'sum'"),
        (lambda: StableGCN(1, 1, 1, max_gain=0.0), "max_gain must be greater than 0"),
        (lambda: ResolventConv(5, 1)(X, PAIR), r"x must have shape \(..., nodes, 5\), got \(3, 4\)"),
        (lambda: ResolventConv(4, 1)(X[0], PAIR), r"x must have shape \(..., nodes, 4\), got \(4,\)"),
        (lambda: ResolventConv(4, 1)(X.long(), PAIR), "x must be a floating-point tensor"),
        (lambda: ResolventConv(4, 1)(X, PAIR.T[:1]), r"edge_index must have shape \(2, any\), got \(1, 2\)"),
        (lambda: ResolventConv(4, 1)(X, PAIR.float()), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: ResolventConv(4, 1)(X, PAIR + 2), r"edge_index must name nodes in 0\.\.2, got 3"),
        (lambda: ResolventConv(4, 1)(X, PAIR - 1), r"edge_index must name nodes in 0\.\.2, got -1"),
        (lambda: ResolventConv(4, 1)(X, PAIR, torch.ones(3)), r"edge_weight must have shape \(2\) for edge_index"),
        (lambda: ResolventConv(4, 1)(X, PAIR, torch.tensor([1.0, 0.0])), r"edge_weight must be positive and finite, got 0.0 at edge 1 \(1 -> 0\)"),
        (lambda: StableGCN(4, 1, 1)(X, PAIR, torch.tensor([1.0, -2.0])), r"got -2.0 at edge 1 \(1 -> 0\)"),
        (lambda: ResolventConv(4, 1)(X, PAIR, torch.tensor([math.inf, 1.0])), r"got inf at edge 0 \(0 -> 1\)"),
        (lambda: ResolventConv(4, 1)(X, PAIR, torch.tensor([math.nan, 1.0])), r"got nan at edge 0 \(0 -> 1\)"),
        (lambda: ResolventConv(4, 1)(X, PAIR, None, torch.ones(2)), r"node_weight must have shape \(3\) for the nodes"),
        (lambda: ResolventConv(4, 1)(X, PAIR, None, torch.tensor([1.0, 1.0, 0.0])), "node_weight must be positive and finite, got 0.0 at node 2"),
        (lambda: StableGCN(4, 1, 1)(X, PAIR, batch=torch.zeros(2).long()), r"batch must have shape \(3\) for x"),
        (lambda: filter_gain(ResolventConv(1, 1), torch.tensor([-1.0])), "spectrum must hold eigenvalues of at least 0"),
        (lambda: filter_gain(ResolventConv(1, 1), torch.tensor([])), "spectrum must hold eigenvalues of at least 0"),
        (lambda: filter_gain(ResolventConv(1, 1), torch.tensor([math.nan])), "spectrum must be finite"),
        (lambda: stability_bound(StableGCN(1, 1, 1), -1.0, 1.0, measure=1.0), "epsilon must be at least 0"),
        (lambda: stability_bound(StableGCN(1, 1, 1), 1.0, -1.0, measure=1.0), "input_norm must be at least 0"),
        (lambda: stability_bound(StableGCN(1, 1, 1), 1.0, 1.0, input_error=-1.0, measure=1.0), "input_error must be"),
        (lambda: stability_bound(StableGCN(1, 1, 1), 1.0, 1.0, measure=0.0), "measure must be greater than 0"),
        (lambda: StableGCN(4, 1, 1)(X[:0], PAIR[:, :0]), r"x must have at least one node, got shape \(0, 4\)"),
        (lambda: StableGCN(4, 1, 1, pool="mean")(X, PAIR, batch=torch.tensor([0, 0, -1])), "batch must not be negative, got -1"),
        (lambda: StableGCN(4, 1, 1, pool="mean")(X, PAIR, batch=torch.zeros(3)), "batch must hold integers"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
