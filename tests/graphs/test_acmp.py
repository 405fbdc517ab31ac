"""ACMP against loops over its equation, closed forms, scipy's integrator, and its certificates."""

import math

import networkx as nx
import pytest
import torch
from scipy.integrate import solve_ivp

from posterity.graphs import (
    ACMP,
    ACMPConv,
    consensus,
    consensus_growth_rate,
    dirichlet_energy,
    trapping_radius,
)
from posterity.testing import check_graph_network

NONE = torch.empty(2, 0, dtype=torch.long)
KARATE = torch.tensor(list(nx.karate_club_graph().edges)).T
KARATE = torch.cat([KARATE, KARATE.flip(0)], 1)
ATTENTIONS = ("gcn", "rw", "transformer")


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(channels=4, **options):
    """A layer whose parameters are all different and of ordinary size."""
    conv = ACMPConv(channels, **{"method": "rk4", **options}).double()
    with torch.no_grad():
        for k, parameter in enumerate(conv.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=k + 1))
    return conv


@pytest.fixture
def graph():
    """Directed and weighted, with a self-loop at 5 and node 6 alone."""
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [4, 0], [5, 5], [2, 4], [1, 3], [0, 5]]).T
    return normal(7, 4), edges, normal(9, seed=9).abs() + 0.5


def coefficients(conv, x, edges, weight):
    """{(sender, receiver): a}, with self-loops, by loops."""
    listed = {(s, r): w for (s, r), w in zip(edges.T.tolist(), weight, strict=True)}
    listed |= {(u, u): torch.ones((), dtype=x.dtype) for u in range(len(x)) if (u, u) not in listed}
    degree = [sum(w for (_, r), w in listed.items() if r == u) for u in range(len(x))]
    if conv.attention == "gcn":
        return {(s, r): w / (degree[s] * degree[r]) ** 0.5 for (s, r), w in listed.items()}
    if conv.attention == "rw":
        return {(s, r): w / degree[r] for (s, r), w in listed.items()}
    width = conv.query.out_features // conv.heads
    a = dict.fromkeys(listed, 0.0)
    for h in range(conv.heads):
        q, k = (f(x)[:, h * width : (h + 1) * width] for f in (conv.query, conv.key))
        for u in range(len(x)):
            senders = [s for s, r in listed if r == u]
            share = torch.stack([q[u] @ k[s] / width**0.5 for s in senders]).softmax(0)
            for s, value in zip(senders, share, strict=True):
                a[s, u] = a[s, u] + value / conv.heads
    return a


def velocity(conv, x, edges, weight, start):
    """Equation 1, or the official code's, by loops."""
    alpha, delta = conv.alpha_raw.sigmoid(), conv.delta_raw.sigmoid()
    a = coefficients(conv, x, edges, weight)
    rows = []
    for u in range(len(x)):
        pull = torch.zeros_like(x[u])
        for (s, r), value in a.items():
            if r == u:
                operator = conv.interaction == "operator"
                pull = pull + (value - conv.beta) * (x[s] if operator else x[s] - x[u])
        pull = pull - x[u] if conv.interaction == "operator" else pull
        row = alpha * pull
        row = row + delta * x[u] * (conv.barrier - x[u] ** 2) if conv.reaction else row
        rows.append(row + conv.source_weight * start[u] if conv.source else row)
    return torch.stack(rows)


@pytest.mark.parametrize("interaction", ["difference", "operator"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("extras", [{}, {"source": True, "barrier": 2.0}, {"reaction": False}])
def test_velocity_is_the_equation_in_value_and_gradients(graph, interaction, attention, extras):
    x, edges, weight = graph
    conv = make(beta=0.3, attention=attention, interaction=interaction, heads=2, attention_dim=6, **extras)
    results = []
    for call in (
        lambda x, w: conv.velocity(x, edges, w, source_state=2 * x),
        lambda x, w: velocity(conv, x, edges, w, 2 * x),
    ):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), *conv.parameters()]
        out = call(*leaves[:2])
        loss = (out * torch.arange(28, dtype=x.dtype).reshape(7, 4)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append((out, *grads))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_by_default_the_source_is_the_state_and_edges_weigh_one(graph):
    x, edges, _ = graph
    conv = make(beta=0.3, source=True)
    expected = velocity(conv, x, edges, torch.ones(9, dtype=x.dtype), x)
    torch.testing.assert_close(conv.velocity(x, edges), expected, rtol=1e-9, atol=1e-9)


def test_gcn_coefficients_are_pygs(graph):
    pyg = pytest.importorskip("torch_geometric.nn.conv.gcn_conv")
    x, edges, weight = graph
    conv = make(interaction="operator", reaction=False)
    where, a = pyg.gcn_norm(edges, weight, 7)
    expected = conv.alpha_raw.sigmoid() * (
        torch.zeros_like(x).index_add(0, where[1], a[:, None] * x[where[0]]) - x
    )
    torch.testing.assert_close(conv.velocity(x, edges, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_well_and_threshold_the_state_is_a_matrix_exponential(graph, attention):
    x, edges, weight = graph
    conv = make(attention=attention, reaction=False, time=1.0, step_size=0.01)
    L = torch.zeros(7, 7, dtype=x.dtype)
    for (s, r), value in coefficients(conv, x, edges, weight).items():
        L[r, s] -= value
        L[r, r] += value
    flow = [torch.matrix_exp(-rate * L) @ x[:, c] for c, rate in enumerate(conv.alpha_raw.sigmoid())]
    torch.testing.assert_close(conv(x, edges, weight), torch.stack(flow, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"method": "rk4"}, {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}])
def test_without_edges_each_coordinate_follows_the_scalar_flow(options):
    conv, x = make(time=3.0, **options), normal(5, 4)
    delta = conv.delta_raw.sigmoid()
    expected = x / (x**2 + (1 - x**2) * torch.exp(-2 * delta * 3.0)).sqrt()
    torch.testing.assert_close(conv(x, NONE), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(conv(x[:1], NONE), expected[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("interaction", ["difference", "operator"])
def test_the_state_is_that_of_scipys_integrator(graph, interaction):
    x, edges, weight = graph
    conv = make(beta=0.4, interaction=interaction, source=True, time=0.5, step_size=0.02)

    def slope(t, state):
        with torch.no_grad():
            return velocity(conv, torch.from_numpy(state).reshape(7, 4), edges, weight, x).numpy().ravel()

    exact = solve_ivp(slope, (0, 0.5), x.numpy().ravel(), rtol=1e-9, atol=1e-9).y[:, -1].reshape(7, 4)
    torch.testing.assert_close(conv(x, edges, weight), torch.from_numpy(exact), rtol=0, atol=1e-6)


def test_attention_is_computed_at_the_start_and_held_fixed(graph):
    x, edges, _ = graph
    conv = make(attention="transformer", time=0.2, step_size=0.1, method="euler")
    frozen = coefficients(conv, x, edges, torch.ones(9, dtype=x.dtype))
    alpha, delta = conv.alpha_raw.sigmoid(), conv.delta_raw.sigmoid()
    state = x
    for _ in range(2):
        pull = torch.zeros_like(x)
        for (s, r), value in frozen.items():
            pull[r] = pull[r] + value * (state[s] - state[r])
        state = state + 0.1 * (alpha * pull + delta * state * (1 - state**2))
    torch.testing.assert_close(conv(x, edges), state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("rk4", 4)])
def test_equal_steps_have_their_order(graph, method, order):
    x, edges, _ = graph
    with torch.no_grad():
        exact = make(beta=0.3, time=0.5, step_size=0.0025)(x, edges)
        errors = [
            (make(beta=0.3, time=0.5, step_size=h, method=method)(x, edges) - exact).abs().max()
            for h in (0.02, 0.01)  # small against the well's rate 3 delta x^2, which is about 10
        ]
    assert abs(float((errors[0] / errors[1]).log2()) - order) < 0.3


@pytest.mark.parametrize("attention", ["gcn", "transformer"])
def test_the_adjoint_gives_the_gradients_of_the_steps(graph, attention):
    x, edges, weight = graph
    grads = []
    for options in ({"adjoint": True}, {"adjoint": False}):
        tight = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}
        conv = make(attention=attention, beta=0.2, source=True, time=0.4, **tight, **options)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), *conv.parameters()]
        loss = conv(leaves[0], edges, leaves[1]).square().sum()
        forward = conv.num_evals
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        assert conv.num_evals == forward
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interaction", ["difference", "operator"])
@pytest.mark.parametrize("source", [False, True])
def test_the_state_stays_within_its_bound_and_ends_within_the_radius(interaction, source):
    conv = make(beta=0.2, interaction=interaction, source=source, time=0.5, step_size=0.02)
    with torch.no_grad():
        conv.delta_raw.clamp_(min=-1.0)
    state = x = 4 * normal(34, 4)
    radius = trapping_radius(conv, x, KARATE)
    bound = torch.maximum(radius, x.abs().amax(0))
    with torch.no_grad():
        for _ in range(14):
            if source:  # the source is that of time 0, so each span starts from there
                conv.time += 0.5
                if conv.time > 3:
                    break
            state = conv(x if source else state, KARATE)
            assert (state.abs().amax(0) <= bound).all()
    if not source:
        assert (state.abs().amax(0) < 1.001 * radius).all()


@pytest.mark.parametrize("interaction", ["difference", "operator"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_radius_is_its_formula_by_loops(graph, attention, interaction):
    x, edges, weight = graph
    conv = make(attention=attention, interaction=interaction, beta=0.3, barrier=1.5, source=True)
    ks = []
    for u in range(7):
        row = {s: v.item() - 0.3 for (s, r), v in coefficients(conv, x, edges, weight).items() if r == u}
        if interaction == "difference":
            ks.append(2 * sum(max(-v, 0) for s, v in row.items() if s != u))
        else:
            ks.append(sum(abs(v) for s, v in row.items() if s != u) + row[u] - 1)
    push = conv.alpha_raw.sigmoid() * max(ks) + conv.source_weight.abs()
    expected = (1.5 + push.relu() / conv.delta_raw.sigmoid()).sqrt()
    torch.testing.assert_close(trapping_radius(conv, x, edges, weight), expected)


def test_two_nodes_that_repel_rest_at_the_radius():
    edges = torch.tensor([[0, 1], [1, 0]])
    conv = ACMPConv(1, beta=0.9, delta_init=0.3, time=60.0, method="rk4", step_size=0.25).double()
    x = torch.tensor([[0.2], [-0.1]], dtype=torch.float64)
    radius = trapping_radius(conv, x, edges)
    assert radius.item() == pytest.approx(math.sqrt(1 + 2 * 0.5 / 0.3 * 0.4))
    torch.testing.assert_close(conv(x, edges), torch.stack([radius, -radius]), rtol=0, atol=1e-6)


def test_without_a_well_nothing_traps():
    assert (trapping_radius(make(reaction=False), normal(34, 4), KARATE) == math.inf).all()


@pytest.mark.parametrize("attention", ["gcn", "rw"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.2, 0.5])
def test_the_growth_rate_is_the_slope_of_a_small_perturbations_energy(attention, beta):
    conv = ACMPConv(2, beta=beta, attention=attention, delta_init=0.05, method="rk4", barrier=1.3).double()
    rate = float(consensus_growth_rate(conv, torch.ones(34, 2).double(), KARATE)[0])
    # perturb along the fastest direction that is not constant, from the Jacobian at consensus
    J = torch.autograd.functional.jacobian(
        lambda v: conv.velocity(v[:, None].expand(-1, 2), KARATE)[:, 0],
        torch.full((34,), 1.3**0.5, dtype=torch.float64),
    )
    values, vectors = torch.linalg.eig(J)
    constant = (vectors - vectors.mean(0)).abs().sum(0) < 1e-8 * vectors.abs().sum(0)
    top = int(torch.where(constant, -math.inf, values.real).argmax())
    assert rate == pytest.approx(float(values[top].real), abs=1e-8)
    direction = vectors[:, top].real / vectors[:, top].real.abs().max()
    state = 1.3**0.5 + 1e-3 * direction[:, None].expand(-1, 2)
    conv.time = 0.1 / max(1, abs(rate))
    conv.step_size = conv.time / 10
    with torch.no_grad():
        ratio = float(dirichlet_energy(conv(state, KARATE), KARATE) / dirichlet_energy(state, KARATE))
    assert math.log(ratio) / conv.time == pytest.approx(2 * rate, rel=0.05)
    assert (ratio > 1) == (rate > 0)


def test_a_negative_rate_pulls_to_consensus_and_a_positive_one_does_not():
    x = 1 + 1e-3 * normal(34, 4)
    for beta in (0.1, 0.2):
        conv = ACMPConv(4, beta=beta, delta_init=0.05, time=20.0, method="rk4", step_size=0.2).double()
        rate = float(consensus_growth_rate(conv, x, KARATE)[0].detach())
        grown = dirichlet_energy(conv(x, KARATE), KARATE) > dirichlet_energy(x, KARATE)
        assert (rate > 0) == bool(grown) == (beta == 0.2)


def test_without_a_well_the_rate_is_that_of_diffusion():
    conv = ACMPConv(2, reaction=False, alpha_init=0.25).double()
    ring = torch.stack([torch.arange(12), (torch.arange(12) + 1) % 12])
    ring = torch.cat([ring, ring.flip(0)], 1)
    rate = consensus_growth_rate(conv, normal(12, 2), ring)
    gap = 2 / 3 * (1 - math.cos(2 * math.pi / 12))  # a = 1/3 on a ring with self-loops
    torch.testing.assert_close(rate, torch.full((2,), -0.25 * gap, dtype=torch.float64))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("beta", [0.05, 0.3])
def test_large_graphs_give_the_rate_of_all_eigenvalues(monkeypatch, attention, beta):
    conv, x = make(attention=attention, beta=beta), normal(34, 4)
    dense = consensus_growth_rate(conv, x, KARATE)
    monkeypatch.setattr(consensus, "DENSE", 10)
    monkeypatch.setattr(consensus, "KRYLOV", 20)
    torch.testing.assert_close(consensus_growth_rate(conv, x, KARATE), dense, rtol=1e-6, atol=1e-8)


def test_energy_is_the_mean_over_nodes_of_weighted_squares(graph):
    x, edges, weight = graph
    pairs = zip(edges.T.tolist(), weight, strict=True)
    expected = sum(w * (x[s] - x[r]).square().sum() for (s, r), w in pairs) / 7
    torch.testing.assert_close(dirichlet_energy(x, edges, weight), expected)
    assert float(dirichlet_energy(torch.ones(7, 4), edges)) == 0
    assert float(dirichlet_energy(x, NONE)) == 0


@pytest.mark.parametrize("interaction", ["difference", "operator"])
def test_the_flow_is_odd_and_permutes_with_the_nodes(graph, interaction):
    x, edges, weight = graph
    conv = make(beta=0.3, interaction=interaction)
    out = conv(x, edges, weight)
    torch.testing.assert_close(conv(-x, edges, weight), -out, rtol=0, atol=1e-12)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = conv(x[order], order.argsort()[edges], weight)
    torch.testing.assert_close(moved, out[order], rtol=0, atol=1e-12)


def test_an_edge_that_is_listed_twice_counts_twice(graph):
    x, edges, weight = graph
    twice = torch.cat([edges, edges], 1)
    for attention in ("gcn", "rw"):
        conv = make(attention=attention, beta=0.0)
        keep = edges[0] != edges[1]
        doubled = conv(x, edges[:, keep], 2 * weight[keep])
        once = conv(x, twice[:, keep.repeat(2)], weight[keep].repeat(2))
        torch.testing.assert_close(once, doubled, rtol=0, atol=1e-10)


def test_first_values_are_what_was_asked_for():
    conv = ACMPConv(3, alpha_init=0.3, delta_init=0.02, source=True, attention="transformer", attention_dim=6)
    torch.testing.assert_close(conv.alpha_raw.sigmoid(), torch.full((3,), 0.3))
    torch.testing.assert_close(conv.delta_raw.sigmoid(), torch.full((3,), 0.02))
    assert conv.source_weight.shape == ()
    assert float(conv.source_weight) == 0
    assert conv.query.weight.shape == (6, 3)
    for linear in (conv.query, conv.key):
        assert (linear.weight == 1e-5).all()
        assert (linear.bias != 0).all()
    assert {name for name, _ in ACMPConv(3).named_parameters()} == {"alpha_raw", "delta_raw"}
    assert "beta=0.0" in repr(conv)


def test_the_network_is_encoder_flow_and_decoder(graph):
    x, edges, weight = graph
    net = ACMP(4, 6, 3, beta=0.2, method="rk4").double().eval()
    state = net.conv(net.encoder(x), edges, weight)
    torch.testing.assert_close(net(x, edges, weight), net.decoder(state.relu()))
    defaults = net.input_dropout.p, net.dropout.p
    assert defaults == (0.5, 0.0)
    net.train()
    assert not torch.equal(net(x, edges), net(x, edges))


@pytest.mark.parametrize("attention", ["gcn", "transformer"])
def test_a_cached_graph_is_used_again_until_reset(graph, attention):
    x, edges, weight = graph
    conv = make(attention=attention, beta=0.2, cached=True)
    first = conv(x, edges, weight.requires_grad_())
    torch.testing.assert_close(conv(x, edges[:, :2]), first)
    for _ in range(2):
        conv(x, edges).sum().backward()
    torch.testing.assert_close(conv.float()(x.float(), edges), first.float(), rtol=1e-4, atol=1e-5)
    state = conv.double().state_dict()
    conv.reset_parameters()
    conv.load_state_dict(state)
    assert not torch.allclose(conv(x, edges[:, :2]), first)


TIGHT = {"rtol": 1e-5, "atol": 1e-5}
CONFORMING = [
    ACMP(3, 8, 2, time=0.5, **TIGHT),
    ACMP(3, 8, 2, attention="transformer", heads=2, source=True, beta=0.2, method="rk4", time=1.0),
    ACMP(3, 8, 2, interaction="operator", attention="rw", beta=0.5, method="euler", time=1.0),
    ACMPConv(3, beta=0.3, method="rk4", time=1.0),
    ACMPConv(3, adjoint=True, time=0.5, **TIGHT),
]


@pytest.mark.parametrize("network", CONFORMING)
def test_conforms_to_its_kind(as_a_user, network):
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2], [1, 4]]).T
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    # a key's bias adds the same to all logits of a node, which softmax does not see
    dead = [name for name, _ in network.named_parameters() if name.endswith("key.bias")]
    check_graph_network(network, x, torch.cat([edges, edges.flip(0)], 1), dead=dead)


def test_stiffness_is_refused_with_advice():
    hub = torch.stack([torch.zeros(200, dtype=torch.long), torch.arange(1, 201)])
    hub, x = torch.cat([hub, hub.flip(0)], 1), normal(201, 4)
    with pytest.raises(RuntimeError, match=r"not finite before time 4: lower step_size, .* got beta 0.3"):
        make(beta=0.3, step_size=0.5)(x, hub)
    assert torch.isfinite(make(beta=0.3, method="dopri5")(x, hub)).all()
    with pytest.raises(RuntimeError, match="more than max_evals = 50 evaluations: raise max_evals or lower"):
        make(beta=0.3, method="dopri5", max_evals=50)(x, hub)
    with pytest.raises(RuntimeError, match="more than max_evals = 7 evaluations"):
        make(max_evals=7, step_size=1.0)(x, hub)
    x[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="not finite before time 4: lower beta"):
        make(method="dopri5")(x, hub)


GOOD = torch.randn(3, 4), torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ACMPConv(0), "channels must be an integer of at least 1"),
        (lambda: ACMPConv(4, time=0), "time must be greater than 0"),
        (lambda: ACMPConv(4, step_size=0.0), "step_size must be greater than 0"),
        (lambda: ACMPConv(4, barrier=-1), "barrier must be greater than 0"),
        (lambda: ACMPConv(4, alpha_init=1.0), r"alpha_init must be in \(0, 1\), got 1.0"),
        (lambda: ACMPConv(4, delta_init=0.0), r"delta_init must be in \(0, 1\), got 0.0"),
        (lambda: ACMPConv(4, heads=3), "heads must divide attention_dim, got 3 for 16"),
        (lambda: ACMPConv(4, heads=0), "heads must be an integer of at least 1"),
        (lambda: ACMPConv(4, attention_dim=0), "attention_dim must be an integer"),
        (lambda: ACMPConv(4, beta=math.inf), "beta must be a finite number, got inf"),
        (lambda: ACMPConv(4, beta=math.nan), "beta must be a finite number, got nan"),
        (lambda: ACMPConv(4, beta="0"), "beta must be a finite number, got '0'"),
        (lambda: ACMPConv(4, attention="gat"), "attention must be one of"),
        (lambda: ACMPConv(4, interaction="sum"), "interaction must be one of"),
        (lambda: ACMPConv(4, method="heun"), "method must be one of"),
        (lambda: ACMPConv(4, adjoint=True, method="rk4"), 'adjoint needs method "dopri5", got \'rk4\''),
        (lambda: ACMPConv(4, rtol=0), "rtol must be"), (lambda: ACMPConv(4, atol=-1), "atol must be"),
        (lambda: ACMPConv(4, max_evals=0), "max_evals must be"),
        (lambda: ACMP(4, 0, 2), "hidden_channels must be"), (lambda: ACMP(4, 4, 0), "out_channels must be"),
        (lambda: ACMP(4, 4, 2, input_dropout=1.0), r"input_dropout must be in \[0, 1\), got 1.0"),
        (lambda: ACMP(4, 4, 2, dropout=-0.1), "dropout must be in"),
        (lambda: ACMPConv(4)(GOOD[0][0], GOOD[1]), r"x must have shape \(any, 4\)"),
        (lambda: ACMP(5, 4, 2)(*GOOD), r"x must have shape \(any, 5\) for this layer, got \(3, 4\)"),
        (lambda: ACMPConv(4)(GOOD[0].long(), GOOD[1]), "x must be a floating-point tensor"),
        (lambda: ACMPConv(4)(GOOD[0], GOOD[1][0]), r"edge_index must have shape \(2, any\)"),
        (lambda: ACMPConv(4)(GOOD[0], GOOD[1].float()), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: ACMPConv(4)(GOOD[0], GOOD[1] + 1), r"edge_index must name nodes in 0\.\.2, got 3"),
        (lambda: ACMPConv(4)(GOOD[0], GOOD[1] - 1), r"edge_index must name nodes in 0\.\.2, got -1"),
        (lambda: ACMPConv(4)(*GOOD, torch.ones(3)), r"edge_weight must have shape \(2\) for edge_index"),
        (lambda: ACMPConv(4).velocity(*GOOD, source_state=torch.ones(3, 2)), r"source_state must have shape \(3, 4\) for x"),
        (lambda: dirichlet_energy(GOOD[0], GOOD[1], torch.ones(3)), r"edge_weight must have shape \(2\)"),
        (lambda: trapping_radius(ACMPConv(5), *GOOD), r"x must have shape \(any, 5\)"),
        (lambda: consensus_growth_rate(ACMPConv(5), *GOOD), r"x must have shape \(any, 5\)"),
        (lambda: consensus_growth_rate(ACMPConv(4, interaction="operator"), *GOOD), "got 'operator' and source=False"),
        (lambda: consensus_growth_rate(ACMPConv(4, source=True), *GOOD), "got 'difference' and source=True"),
        (lambda: consensus_growth_rate(ACMPConv(4), GOOD[0], GOOD[1][:, :1]), "must connect all nodes, at least 2, got 3 in 2 parts"),
        (lambda: consensus_growth_rate(ACMPConv(4), GOOD[0][:1], NONE), "at least 2, got 1 in 1 parts"),
        (lambda: consensus_growth_rate(ACMPConv(4), *GOOD, torch.ones(2) / 0), "x and edge_weight must be finite"),
        (lambda: trapping_radius(ACMPConv(4), GOOD[0][:0], NONE), "x must have at least one node"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
