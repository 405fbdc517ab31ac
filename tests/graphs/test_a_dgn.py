"""A-DGN against the ODE it discretises, its spectrum, and PyG's layer."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from posterity.graphs import ADGN, AntiSymmetricConv, euler_step_limit, local_jacobian_eigenvalues
from posterity.testing import check_graph_network

NONE = torch.empty(2, 0, dtype=torch.long)


def make(channels=4, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AntiSymmetricConv(channels, **options).double()


@pytest.fixture
def graph():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [4, 0], [5, 5], [2, 4], [1, 3]]).T
    return x, edges, torch.rand(8, dtype=torch.float64, generator=generator) + 0.5


def field(conv, x, edges, weight):
    """What act is applied to, by loops over edges."""
    A = conv.W - conv.W.T - conv.gamma * torch.eye(len(conv.W), dtype=x.dtype)
    z = x @ A.T
    if conv.bias is not None:
        z = z + conv.bias
    edges, weight = edges.T.tolist(), list(weight)
    if conv.phi == "gcn":
        looped = {s for s, r in edges if s == r}
        edges, weight = (
            edges + [[u, u] for u in range(len(x)) if u not in looped],
            weight + [1.0] * (len(x) - len(looped)),
        )
        degree = [sum(w for (s, r), w in zip(edges, weight, strict=True) if r == u) for u in range(len(x))]
        weight = [w / (degree[s] * degree[r]) ** 0.5 for (s, r), w in zip(edges, weight, strict=True)]
    rows = [torch.zeros(x.shape[1], dtype=x.dtype) for _ in x]
    for (s, r), w in zip(edges, weight, strict=True):
        rows[r] = rows[r] + w * conv.V @ x[s]
    return z + torch.stack(rows)


@pytest.mark.parametrize("phi", ["sum", "gcn"])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_equation_1_in_value_and_gradients(graph, phi, bias):
    x, edges, weight = graph
    conv = make(num_iters=3, epsilon=0.3, gamma=0.2, phi=phi, bias=bias)
    results = []
    for fast in (True, False):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        state = leaves[0]
        if fast:
            state = conv(state, edges, leaves[1])
        else:
            for _ in range(3):
                state = state + 0.3 * torch.tanh(field(conv, state, edges, leaves[1]))
        loss = (state * torch.arange(28, dtype=x.dtype).reshape(7, 4)).sum()
        results.append((state, *torch.autograd.grad(loss, [*leaves, *conv.parameters()])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighted", [True, False])
def test_gcn_is_pygs_layer_in_value_and_gradients(graph, weighted):
    pyg = pytest.importorskip("torch_geometric.nn")
    x, edges, weight = graph
    weight = weight if weighted else None
    conv = make(num_iters=4, epsilon=0.2, gamma=0.3, phi="gcn")
    peer = pyg.AntiSymmetricConv(4, num_iters=4, epsilon=0.2, gamma=0.3).double()
    with torch.no_grad():
        peer.W.copy_(conv.W)
        peer.phi.lin.weight.copy_(conv.V)
        peer.bias.copy_(conv.bias)
    ours, theirs = conv(x, edges, weight), peer(x, edges, weight)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    a = torch.autograd.grad(ours.square().sum(), [conv.W, conv.V, conv.bias])
    b = torch.autograd.grad(theirs.square().sum(), [peer.W, peer.phi.lin.weight, peer.bias])
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_without_damping_a_linear_step_grows_by_the_known_amount_and_never_shrinks():
    conv = make(epsilon=0.3, gamma=0.0, act=None, bias=False)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A = conv.W - conv.W.T
    after = conv(x, NONE)
    torch.testing.assert_close(
        after.square().sum(), x.square().sum() + 0.09 * (x @ A.T).square().sum(), rtol=0, atol=1e-10
    )
    for _ in range(20):
        before, x = x, conv(x, NONE)
        assert x.norm() >= before.norm()


@pytest.mark.parametrize("act", ["tanh", "relu", None])
@pytest.mark.parametrize("phi", ["sum", "gcn"])
def test_real_parts_lie_where_the_damping_puts_them(graph, act, phi):
    x, edges, weight = graph
    for gamma in (0.0, 0.4):
        conv = make(gamma=gamma, act=act, phi=phi)
        real = local_jacobian_eigenvalues(conv, x, edges, weight).real
        z = field(conv, x, edges, weight).detach()
        slope = {"tanh": 1 - z.tanh() ** 2, "relu": (z > 0).double(), None: torch.ones_like(z)}[act]
        if gamma == 0:
            assert real.abs().max() < 1e-6
        assert (real >= -gamma * slope.max(1).values[:, None] - 1e-6).all()
        assert (real <= -gamma * slope.min(1).values[:, None] + 1e-6).all()


def test_eigenvalues_are_those_of_the_differentiated_field():
    conv = make(gamma=0.3)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = local_jacobian_eigenvalues(conv, x, NONE)
    for u in range(3):
        J = torch.autograd.functional.jacobian(
            lambda row: (conv(row[None], NONE)[0] - row) / conv.epsilon, x[u]
        )
        expected = np.linalg.eigvals(J.numpy())
        np.testing.assert_allclose(np.sort_complex(got[u].numpy()), np.sort_complex(expected), atol=1e-8)


def test_thirty_steps_lose_no_volume():
    conv = make(num_iters=30, epsilon=0.2, gamma=0.0)
    for seed in range(5):
        x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        J = torch.autograd.functional.jacobian(lambda row: conv(row[None], NONE)[0], x)
        assert torch.linalg.det(J).abs() >= 1 - 1e-9


def test_sharing_weights_is_tying_them(graph):
    x, edges, _ = graph
    shared = ADGN(4, 6, 2, 5, weight_sharing=True).double()
    apart = ADGN(4, 6, 2, 5, weight_sharing=False).double()
    apart.encoder.load_state_dict(shared.encoder.state_dict())
    apart.readout.load_state_dict(shared.readout.state_dict())
    for conv in apart.convs:
        conv.load_state_dict(shared.convs[0].state_dict())
    torch.testing.assert_close(shared(x, edges), apart(x, edges))
    assert len(shared.convs) == 1
    assert len(apart.convs) == 5


def test_the_error_against_the_ode_is_of_first_order(graph):
    x, edges, weight = graph
    conv = make(gamma=0.1)

    def slope(t, state):
        with torch.no_grad():
            return (
                torch.tanh(field(conv, torch.from_numpy(state).reshape(7, 4), edges, weight)).numpy().ravel()
            )

    exact = solve_ivp(slope, (0, 1), x.numpy().ravel(), rtol=1e-10, atol=1e-10).y[:, -1]
    errors = []
    for steps in (40, 80):
        conv.epsilon, conv.num_iters = 1 / steps, steps
        with torch.no_grad():
            errors.append(np.abs(conv(x, edges, weight).numpy().ravel() - exact).max())
    assert 1.8 <= errors[0] / errors[1] <= 2.2


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_a_linear_step_is_stable_up_to_the_limit_and_not_beyond(gamma):
    conv = make(gamma=gamma, act=None, bias=False)
    x = torch.randn(2, 4, dtype=torch.float64)
    limit = euler_step_limit(conv, x, NONE)
    A = conv.W.detach() - conv.W.detach().T - gamma * torch.eye(4, dtype=torch.float64)
    for factor, stable in ((0.999, True), (1.001, False)):
        radius = torch.linalg.eigvals(torch.eye(4) + factor * limit * A).abs().max()
        assert (radius <= 1) == stable


def test_without_damping_no_step_is_stable_unless_nothing_moves():
    conv = make(gamma=0.0)
    assert euler_step_limit(conv, torch.randn(3, 4).double(), NONE) == 0
    with torch.no_grad():
        conv.W.zero_()
    assert euler_step_limit(conv, torch.randn(3, 4).double(), NONE) == float("inf")


CONFORMING = [
    lambda: AntiSymmetricConv(3, 4), lambda: AntiSymmetricConv(3, 4, phi="gcn", bias=False),
    lambda: AntiSymmetricConv(3, act="relu", epsilon=0.5), lambda: ADGN(3, 8, 2, 5),
    lambda: ADGN(3, None, 2, 5, phi="gcn", weight_sharing=False), lambda: ADGN(3, 8, 2, 3, head="mlp"),
]  # fmt: skip


@pytest.mark.parametrize("network", CONFORMING)
def test_conforms_to_its_kind(as_a_user, network):
    torch.manual_seed(0)  # a relu may start dead
    network = network()
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2], [1, 4]]).T
    check_graph_network(network, torch.randn(5, 3, generator=generator), torch.cat([edges, edges.flip(0)], 1))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_graph_level_conforms_and_pools_by_sum_maximum_and_mean(as_a_user, head):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    network = ADGN(3, 8, 2, 4, level="graph", head=head)
    check_graph_network(network, x, edges, level="graph")
    state = network.convs[0](network.encoder(x), edges)
    pooled = torch.cat([state.sum(0), state.max(0).values, state.mean(0)])
    torch.testing.assert_close(network(x, edges), network.readout(pooled)[None])


def test_a_module_aggregates_and_sees_the_weights(graph):
    x, edges, weight = graph

    class Twice(nn.Module):
        def forward(self, x, edge_index, edge_weight=None):
            return 2 * x if edge_weight is None else 3 * x

    conv = make(phi=Twice(), act=None, bias=False, epsilon=1.0, gamma=0.0)
    A = conv.W - conv.W.T
    assert not hasattr(conv, "V")
    torch.testing.assert_close(conv(x, edges), 3 * x + x @ A.T)
    torch.testing.assert_close(conv(x, edges, weight), 4 * x + x @ A.T)


def test_frozen_weights_get_no_gradient_but_what_is_around_them_does(graph):
    x, edges, _ = graph
    net = ADGN(4, 6, 2, 3, train_weights=False).double()
    net(x, edges).sum().backward()
    assert net.encoder.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in net.convs.parameters())


def test_a_cached_graph_is_used_again_until_reset(graph):
    x, edges, _ = graph
    conv = make(phi="gcn", cached=True)
    first = conv(x, edges)
    torch.testing.assert_close(conv(x, edges[:, :2]), first)
    conv(x, edges).sum().backward()
    conv(x, edges).sum().backward()
    state = conv.state_dict()
    conv.reset_parameters()
    conv.load_state_dict(state)
    assert not torch.allclose(conv(x, edges[:, :2]), first)


GOOD = torch.randn(3, 4), torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AntiSymmetricConv(0), "channels must be an integer of at least 1"),
        (lambda: AntiSymmetricConv(4, 0), "num_iters must be an integer of at least 1"),
        (lambda: AntiSymmetricConv(4, epsilon=0.0), "epsilon must be greater than 0"),
        (lambda: AntiSymmetricConv(4, gamma=-0.1), "gamma must be at least 0"),
        (lambda: AntiSymmetricConv(4, gamma=float("inf")), "gamma must be at least 0, got inf"),
        (lambda: AntiSymmetricConv(4, phi="mean"), "phi must be one of 'sum', 'gcn', got 'mean'"),
        (lambda: AntiSymmetricConv(4, act="swoosh"), "act must name a function of torch"),
        (lambda: ADGN(4, 4, 2, 0), "num_layers must be"), (lambda: ADGN(4, 4, 2, 1, level="edge"), "level must be one of"),
        (lambda: ADGN(4, 4, 2, 1, head="deep"), "head must be one of"), (lambda: ADGN(4, 0, 2, 1), "hidden_channels must be"),
        (lambda: AntiSymmetricConv(4)(GOOD[0][0], GOOD[1]), r"x must have shape \(any, 4\)"),
        (lambda: AntiSymmetricConv(5)(*GOOD), r"x must have shape \(any, 5\) for this layer, got \(3, 4\)"),
        (lambda: AntiSymmetricConv(4)(GOOD[0].long(), GOOD[1]), "x must be a floating-point tensor"),
        (lambda: AntiSymmetricConv(4)(GOOD[0], torch.zeros(3, 2).long()), r"edge_index must have shape \(2, any\), got \(3, 2\)"),
        (lambda: AntiSymmetricConv(4)(GOOD[0], GOOD[1].float()), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: AntiSymmetricConv(4)(GOOD[0], GOOD[1] + 1), r"edge_index must name nodes in 0\.\.2, got 3"),
        (lambda: AntiSymmetricConv(4)(GOOD[0], GOOD[1] - 1), r"edge_index must name nodes in 0\.\.2, got -1"),
        (lambda: AntiSymmetricConv(4)(*GOOD, torch.ones(3)), r"edge_weight must have shape \(2\) for edge_index"),
        (lambda: ADGN(4, 4, 2, 1, level="graph")(*GOOD, batch=torch.zeros(2).long()), r"batch must have shape \(3\) for x"),
        (lambda: local_jacobian_eigenvalues(AntiSymmetricConv(4, act="sigmoid"), *GOOD), "act of the layer must be one of"),
        (lambda: ADGN(4, 4, 2, 1, level="graph")(*GOOD, batch=torch.zeros(3)), "batch must hold integers, got dtype torch.float32"),
        (lambda: ADGN.pool(GOOD[0], torch.tensor([0, -1, 0])), "batch must not be negative, got -1"),
        (lambda: ADGN.pool(GOOD[0].long(), None), "x must be a floating-point tensor"),
        (lambda: local_jacobian_eigenvalues(AntiSymmetricConv(4), GOOD[0] / 0, GOOD[1]), "x must be finite"),
        (lambda: local_jacobian_eigenvalues(AntiSymmetricConv(4), *GOOD, torch.ones(2) / 0), "edge_weight must be finite"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_module_that_changes_the_width_is_refused(as_a_user):
    class Wide(nn.Module):
        def forward(self, x, edge_index):
            return torch.cat([x, x], 1)

    with pytest.raises(
        ValueError, match=r"phi\(x, edge_index\) must have shape \(3, 4\) for x, got \(3, 8\)"
    ):
        AntiSymmetricConv(4, phi=Wide())(*GOOD)
