"""PolyGCL's filters against the eigendecomposition and PyG, its loss against loops over nodes."""

import copy
import math

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval
from torch import nn
from torch.nn import functional as F

from posterity.graphs import PolyGCL, PolynomialFilter, contextual_sbm, fit_polygcl
from posterity.testing import check_graph_network

NONE = torch.empty(2, 0, dtype=torch.long)
RING = torch.stack([torch.arange(9), (torch.arange(9) + 1) % 9])
CHORDS = torch.tensor([[0, 2, 5], [4, 7, 8]])
EDGES = torch.cat([RING, CHORDS, RING.flip(0), CHORDS.flip(0)], 1)  # connected, 9 nodes, 12 edges


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weigh(seed=1):
    half = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.cat([half, half])


def make(K=5, seed=0, **options):
    """Filters whose steps are drawn, some of them cut by relu."""
    filters = PolynomialFilter(K, **options).double()
    with torch.no_grad():
        filters.temp_low.copy_(draw(K, seed=seed) + 0.3)
        filters.temp_high.copy_(draw(K, seed=seed + 1) + 0.3)
    return filters


def model(in_channels=4, hidden=6, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PolyGCL(in_channels, hidden, **{"K": 3, **options}).double()


def laplacian(n, edges, weight):
    A = torch.zeros(n, n, dtype=torch.float64)
    A.index_put_((edges[1], edges[0]), weight, accumulate=True)
    A.fill_diagonal_(0)
    d = A.sum(1)
    scale = torch.where(d > 0, d, torch.inf).rsqrt()
    return torch.eye(n, dtype=torch.float64) - scale[:, None] * A * scale


@pytest.mark.parametrize("K", [1, 2, 5, 10])
@pytest.mark.parametrize("options", [{}, {"learn_ends": True, "nonnegative": True}])
def test_the_polynomial_goes_through_monotone_values(K, options):
    filters = make(K, init_high=0.5, **options)
    t = np.cos((K - np.arange(K + 1) + 0.5) * np.pi / (K + 1))
    assert (np.diff(t) > 0).all()
    for highpass, start, temp in ((True, 0.5, filters.temp_high), (False, 2.0, filters.temp_low)):
        values = filters.values(highpass=highpass).detach().numpy()
        steps = np.maximum(temp.detach().numpy(), 0).cumsum()
        expected = np.concatenate([[start], start + steps if highpass else start - steps])
        if options and not highpass:
            expected = np.maximum(expected, 0)
        np.testing.assert_allclose(values, expected, atol=1e-12)
        assert (np.diff(values) >= 0).all() if highpass else (np.diff(values) <= 0).all()
        np.testing.assert_allclose(
            chebval(t, filters.coefficients(highpass=highpass).detach().numpy()), values, atol=1e-12
        )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("max_elements", [0, 2**27])
def test_filters_are_those_of_the_eigendecomposition(weighted, K, max_elements):
    x, weight = draw(9, 3), weigh() if weighted else None
    filters = make(K, max_elements=max_elements)
    frequency, basis = torch.linalg.eigh(
        laplacian(9, EDGES, torch.ones(24).double() if weight is None else weight)
    )
    got = dict(zip((True, False), filters.both(x, EDGES, weight), strict=True))
    for highpass in (True, False):
        h = chebval(frequency.numpy() - 1, filters.coefficients(highpass=highpass).detach().numpy())
        expected = basis @ (torch.from_numpy(h)[:, None] * (basis.T @ x))
        torch.testing.assert_close(got[highpass], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            filters(x, EDGES, weight, highpass=highpass), got[highpass], rtol=0, atol=1e-12
        )


def test_filters_are_pygs_chebyshev_convolution_also_on_directed_and_broken_graphs():
    pyg = pytest.importorskip("torch_geometric.nn")
    # node 5 is isolated, 4 has a loop, 0 to 1 counts twice
    edges = torch.tensor([[0, 1, 2, 2, 3, 4, 4, 0], [1, 2, 0, 3, 4, 4, 0, 1]])
    x, weight = draw(6, 4), draw(8, seed=3).abs()
    filters = make(4)
    peer = pyg.ChebConv(4, 4, 5, bias=False).double()
    for highpass in (True, False):
        with torch.no_grad():
            for lin, c in zip(peer.lins, filters.coefficients(highpass=highpass), strict=True):
                lin.weight.copy_(c * torch.eye(4, dtype=torch.float64))
        got = filters(x, edges, weight, highpass=highpass)
        expected = peer(x, edges, weight, lambda_max=torch.tensor(2.0).double())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_without_steps_a_filter_is_a_multiple_of_the_identity():
    x = draw(9, 3)
    filters = PolynomialFilter(4, init_low=1.5, init_high=0.25, value_range=0.0).double()
    high, low = filters.both(x, EDGES)
    torch.testing.assert_close(high, 0.25 * x, rtol=0, atol=1e-12)
    torch.testing.assert_close(low, 1.5 * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("K", [1, 4, 10, 31])
def test_the_start_is_a_ramp_of_the_angle_and_high_and_low_sum_to_two(K):
    filters, x = PolynomialFilter(K).double(), draw(9, 3)
    t = np.linspace(-1, 1, 101)
    high, low = (
        chebval(t, filters.coefficients(highpass=highpass).detach().numpy()) for highpass in (True, False)
    )
    np.testing.assert_allclose(high + low, 2, atol=1e-12)
    if K >= 10:  # lambda = 1 + t; the ramp is 1 + (2 / pi) arcsin t, widened to the outer nodes
        widened = (K + 1) / K
        np.testing.assert_allclose(high, 1 + widened * 2 / np.pi * np.arcsin(t), atol=0.2)
        assert np.abs(high - (1 + t)).max() < 0.35
    total = sum(filters.both(x, EDGES))
    torch.testing.assert_close(total, 2 * x, rtol=0, atol=1e-12)


def test_at_start_a_regular_graphs_constant_passes_low_and_not_high():
    high, low = PolynomialFilter(10).double().both(torch.ones(9, 1, dtype=torch.float64), RING)
    assert high.abs().max() < 0.15
    torch.testing.assert_close(low, 2 - high, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_elements", [0, 2**27])
def test_gradients_reach_features_and_steps(max_elements):
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 0, 1, 3]])  # directed: the transpose is another matrix
    filters = PolynomialFilter(3, init_high=0.4, learn_ends=True, max_elements=max_elements).double()
    names = [name for name, _ in filters.named_parameters()]
    inputs = [p.detach().clone().requires_grad_() for p in filters.parameters()]
    x = draw(5, 2).requires_grad_()

    def run(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Both(filters), {f"filters.{k}": v for k, v in state.items()}, (x, edges)
        )

    assert torch.autograd.gradcheck(run, (x, *inputs))


class Both(nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.filters = filters

    def forward(self, x, edge_index):
        return torch.cat(self.filters.both(x, edge_index), 1)


@pytest.mark.parametrize("mix", ["free", "convex"])
def test_gradients_of_the_logits_are_right(mix):
    net = model(mix=mix, dropout=0.0, feature_dropout=0.0, act="prelu").eval()
    x = draw(9, 4)
    names = [
        n for n, p in net.named_parameters() if p.requires_grad and ("prop1" in n or n in ("alpha", "beta"))
    ]
    assert len(names) == (4 if mix == "free" else 3)
    values = [net.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(*values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x, x.flip(0), EDGES))

    assert torch.autograd.gradcheck(run, values)


def by_hand(net, x, shuffled, edges):
    """The logits by one call of each filter and of nn.Bilinear a view and node."""

    def view(x, highpass):
        z = net.encoder.prop1(x, edges, highpass=highpass)
        if net.encoder.batch_norm:
            z = net.encoder.bn(z)
        return net.encoder.act_fn(net.encoder.lin1(z))

    h1, h2, h3, h4 = view(x, True), view(x, False), view(shuffled, True), view(shuffled, False)
    if net.mix == "free":
        z = net.alpha * h1 + net.beta * h2
    else:
        z = net.alpha.sigmoid() * h1 + (1 - net.alpha.sigmoid()) * h2
    c = z.mean(0).relu()
    return torch.cat([net.disc.fn(row, c) for h in (h2, h1, h4, h3) for row in h]), (h1, h2), z


@pytest.mark.parametrize(
    "options",
    [{}, {"mix": "convex"}, {"batch_norm": True, "act": "prelu"}, {"learn_ends": True}, {"hidden": 3}],
)
def test_logits_are_the_loop_over_the_bilinear_map(options):
    net = model(**options).eval()
    with torch.no_grad():
        net.alpha.fill_(0.8)
        net.encoder.prop1.temp_low.mul_(draw(3).abs())
        net.encoder.bn.running_var.copy_(draw(4).abs() + 0.5)
    x, shuffled = draw(9, 4), draw(9, 4, seed=5)
    expected, (h1, h2), z = by_hand(net, x, shuffled, EDGES)
    torch.testing.assert_close(net(x, shuffled, EDGES), expected, rtol=0, atol=1e-12)
    high, low = net.views(x, EDGES)
    torch.testing.assert_close(high, h1, rtol=0, atol=1e-12)
    torch.testing.assert_close(low, h2, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.embed(x, EDGES), z.detach(), rtol=0, atol=1e-12)


def test_a_narrow_linear_map_before_the_filter_has_the_gradients_of_one_after_it():
    x, shuffled, gradients = draw(9, 4), draw(9, 4, seed=5), []
    for dropout in (0.0, 1e-300):  # the second keeps every entry, and the order
        net = model(hidden=3, dropout=dropout, feature_dropout=0.0, act="prelu")
        loss = net(x, shuffled, EDGES).square().sum()
        gradients.append(
            torch.autograd.grad(
                loss, [p for p in net.parameters() if p.requires_grad and p.ndim], allow_unused=True
            )
        )
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_the_loss_is_binary_cross_entropy_of_the_logits():
    net = model().eval()
    x = draw(9, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    logits = net(x, x[order], EDGES)
    target = torch.cat([torch.ones(18), torch.zeros(18)]).double()
    expected = F.binary_cross_entropy_with_logits(logits, target)
    got = net.loss(x, EDGES, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_features_that_are_not_shuffled_give_equal_logits_on_both_sides():
    net, x = model().eval(), draw(9, 4)
    real, false = net(x, x, EDGES).chunk(2)
    torch.testing.assert_close(real, false, rtol=0, atol=1e-12)


def test_permuting_nodes_permutes_each_block_of_logits():
    net, x, shuffled = model().eval(), draw(9, 4), draw(9, 4, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    place = order.argsort()
    moved = net(x[order], shuffled[order], place[EDGES]).view(4, 9)
    torch.testing.assert_close(moved, net(x, shuffled, EDGES).view(4, 9)[:, order], rtol=0, atol=1e-12)


def test_batch_norm_takes_each_view_by_itself_in_the_published_order():
    net = model(batch_norm=True, dropout=0.0, feature_dropout=0.0).train()
    twin = copy.deepcopy(net)
    x, shuffled = draw(9, 4), draw(9, 4, seed=1)
    got = net(x, shuffled, EDGES)
    expected, _, _ = by_hand(twin, x, shuffled, EDGES)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.encoder.bn.running_mean, twin.encoder.bn.running_mean)
    torch.testing.assert_close(net.encoder.bn.running_var, twin.encoder.bn.running_var)
    assert net.encoder.bn.num_batches_tracked == 4
    views = torch.cat(net.encoder.prop1.both(x, EDGES) + net.encoder.prop1.both(shuffled, EDGES)).view(
        4, 9, 4
    )
    mean = torch.zeros(4).double()
    for view in views.detach():
        mean = 0.99 * mean + 0.01 * view.mean(0)
    torch.testing.assert_close(net.encoder.bn.running_mean, mean)


def test_both_dropouts_keep_the_mean_and_obey_the_generator():
    x = torch.ones(4000, 3, dtype=torch.float64)
    for options in ({"dropout": 0.0, "feature_dropout": 0.4}, {"dropout": 0.4, "feature_dropout": 0.0}):
        net = model(3, 4, act="prelu", **options)
        with torch.no_grad():
            net.encoder.act_fn.weight.fill_(1.0)  # no activation: the mean passes through
            net.encoder.lin1.bias.zero_()
        graph = net._graph(x, NONE)
        generator = torch.Generator().manual_seed(0)
        noisy = net.encoder((x,), graph, generator)[0]
        exact = net.eval().encoder((x,), graph, generator)[0]
        torch.testing.assert_close(noisy.mean(1), exact.mean(1), rtol=0, atol=0.1)
        assert noisy.std(1).min() > 0.01
        net.train()
        draws = [net.loss(x, NONE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert draws[0] == draws[1] != draws[2]


def test_without_a_generator_the_global_one_decides():
    net, x = model(), draw(9, 4)
    with torch.random.fork_rng():
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(float(net.loss(x, EDGES).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_isolated_nodes_have_the_middle_frequency():
    filters, x = make(4), draw(5, 2)
    for highpass in (True, False):
        middle = chebval(0.0, filters.coefficients(highpass=highpass).detach().numpy())
        torch.testing.assert_close(filters(x, NONE, highpass=highpass), middle * x, rtol=0, atol=1e-12)
        loops = torch.arange(5).expand(2, 5)
        torch.testing.assert_close(filters(x, loops, highpass=highpass), middle * x, rtol=0, atol=1e-12)
    assert torch.isfinite(model().embed(draw(3, 4), NONE)).all()


def test_embedding_leaves_the_mode_and_needs_no_gradient():
    net, x = model(), draw(9, 4)
    z = net.embed(x, EDGES)
    assert net.training and net.encoder.training and not z.requires_grad
    torch.testing.assert_close(z, net.embed(x, EDGES))
    assert not net.eval().embed(x, EDGES).requires_grad and not net.training


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, {"alpha", "beta"}),
        ({"mix": "convex", "act": "prelu"}, {"alpha", "encoder.act_fn.weight"}),
    ],
)
def test_state_has_the_published_names(options, extra):
    names = {
        f"encoder.prop1.{end}" for end in ("initial_val_low", "temp_low", "temp_high", "initial_val_high")
    }
    names |= {
        f"encoder.bn.{part}"
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    names |= {"encoder.lin1.weight", "encoder.lin1.bias", "disc.fn.weight", "disc.fn.bias"}
    net = model(**options)
    state = net.state_dict()
    assert set(state) == names | extra
    assert (
        state["encoder.prop1.temp_low"].shape == (3,) and state["encoder.prop1.initial_val_low"].shape == ()
    )
    twin = model(seed=1, **options)
    twin.load_state_dict(state)
    x = draw(9, 4)
    assert torch.equal(twin.eval()(x, x.flip(0), EDGES), net.eval()(x, x.flip(0), EDGES))


def test_learned_ends_pass_through_relu():
    filters = make(3, learn_ends=True)
    with torch.no_grad():
        filters.initial_val_high.fill_(-0.7)
    assert filters.values(highpass=True)[0] == 0
    assert filters.values(highpass=False)[0] == 2


def test_ends_learn_only_if_asked():
    assert not PolynomialFilter(3).initial_val_low.requires_grad
    filters = PolynomialFilter(3, learn_ends=True, init_high=0.5)
    sum(part.square().sum() for part in filters.both(draw(9, 2).float(), EDGES)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in filters.parameters())


def test_casting_up_loses_no_digits():
    filters = PolynomialFilter(7).half().double()
    with torch.no_grad():
        filters.temp_high.fill_(2 / 7)
    torch.testing.assert_close(
        filters.coefficients(highpass=True),
        PolynomialFilter(7).double().coefficients(highpass=True),
        rtol=0,
        atol=1e-7,
    )
    assert filters.table.dtype == torch.float64 and "table" not in filters.state_dict()
    assert PolynomialFilter(7).table.dtype == torch.float32


class Views(nn.Module):
    """Both views as one output, of a model or of its filters."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, edge_index):
        views = self.part.views if isinstance(self.part, PolyGCL) else self.part.both
        return torch.cat(views(x, edge_index), 1)


@pytest.mark.parametrize(
    "part",
    [PolynomialFilter(4), PolynomialFilter(4, max_elements=0), PolynomialFilter(2, learn_ends=True, init_high=1.0),
     PolyGCL(3, 8, K=4), PolyGCL(3, 8, K=2, act="prelu", batch_norm=True)],
)  # fmt: skip
def test_conforms_to_its_kind(as_a_user, part):
    generator = torch.Generator().manual_seed(0)
    x, edges = torch.randn(9, 3, generator=generator), EDGES
    if isinstance(part, PolyGCL):
        part = copy.deepcopy(part)
        for name in ("alpha", "beta"):  # the views come before the mixing and the scores
            getattr(part, name).requires_grad_(False)
        part.disc.requires_grad_(False)
        part.encoder.bn.requires_grad_(part.encoder.batch_norm)
    check_graph_network(Views(part), x, edges)


def quick(seed=0, **options):
    net = model(4, 6, seed=seed)
    return net, fit_polygcl(net, draw(9, 4), EDGES, generator=torch.Generator().manual_seed(1), **options)


def test_training_restores_the_weights_of_the_lowest_loss():
    _, losses = quick(epochs=60, patience=60, lr=0.1)
    worse = next(k for k in range(5, 60) if losses[k] > min(losses[:k]))  # stop at a step that is no best
    best = int(np.argmin(losses[:worse]))
    net, long = quick(epochs=worse + 1, patience=60, lr=0.1)
    again, short = quick(epochs=best + 1, patience=60, lr=0.1)  # its last loss is the lowest
    assert long == losses[: worse + 1] and short == losses[: best + 1] and not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_patience_counts_steps_without_a_lower_loss():
    _, losses = quick(epochs=200, patience=3, lr=0.1)
    assert len(losses) < 200
    assert min(losses[-3:]) >= min(losses[:-3])
    lowest = np.minimum.accumulate(losses)
    stale = [k for k in range(3, len(losses)) if lowest[k] == lowest[k - 3]]
    assert stale == [len(losses) - 1]


def test_filters_and_mixing_have_their_own_rate():
    net = model(4, 6)
    before = {name: value.clone() for name, value in net.named_parameters()}
    x = draw(9, 4)
    losses = fit_polygcl(
        net,
        x,
        EDGES,
        epochs=40,
        patience=40,
        lr=1e-3,
        filter_lr=1e-9,
        generator=torch.Generator().manual_seed(0),
    )
    assert losses.index(min(losses)) > 0
    for name, value in net.named_parameters():
        own = name in ("alpha", "beta") or "prop1" in name
        moved = float((value - before[name]).detach().abs().max())
        assert moved < 1e-6 if own or ".bn." in name else moved > 1e-4, name


def test_weight_decay_pulls_only_its_group():
    plain = fit(), fit(weight_decay=10.0), fit(filter_weight_decay=10.0)
    lin = [net.encoder.lin1.weight for net in plain]
    temp = [net.encoder.prop1.temp_low for net in plain]
    assert lin[1].norm() < lin[0].norm() and torch.allclose(lin[2], lin[0], atol=2e-2)
    assert temp[2].norm() < temp[0].norm()
    assert not torch.equal(lin[1], lin[0])


def fit(**options):
    net = model(4, 6)
    optimizer_steps = {"epochs": 60, "patience": 60, "lr": 1e-2, "filter_lr": 1e-2}
    fit_polygcl(
        net, draw(9, 4), EDGES, generator=torch.Generator().manual_seed(2), **optimizer_steps, **options
    )
    return net


def test_a_loss_that_is_not_finite_is_said(as_a_user):
    with pytest.raises(ValueError, match="the loss is nan after 0 steps: lower lr"):
        fit_polygcl(model(), torch.full((9, 4), torch.nan, dtype=torch.float64), EDGES, epochs=2)


@pytest.mark.parametrize("phi", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_edges_of_the_block_model_have_their_expected_number_and_share(phi):
    n, degree = 3000, 6.0
    graph = contextual_sbm(
        n, degree=degree, n_features=2, phi=phi, generator=torch.Generator().manual_seed(0)
    )
    row, column = graph.edge_index
    assert (row != column).all()
    pairs = {tuple(pair) for pair in graph.edge_index.T.tolist()}
    assert len(pairs) == graph.edge_index.shape[1]  # none twice
    assert all((v, u) in pairs for u, v in pairs)
    signal = math.sqrt(4.25) * math.sin(phi * math.pi / 2)
    inside, across = (degree + math.sqrt(degree) * signal) / n, (degree - math.sqrt(degree) * signal) / n
    half = n // 2
    alike = graph.y[row] == graph.y[column]
    for count, cells, p in (
        (int(alike.sum()) // 2, half * (half - 1), inside),
        (int((~alike).sum()) // 2, half * half, across),
    ):
        assert abs(count - cells * p) < 5 * math.sqrt(cells * p * (1 - p)) + 1e-9
    if phi != 0:
        share = (degree + math.sqrt(degree) * signal) / (2 * degree)
        assert abs(float(alike.double().mean()) - share) < 0.03
    per_node = torch.bincount(row, minlength=n).double()
    assert abs(float(per_node[:half].mean() - per_node[half:].mean())) < 0.4
    assert abs(float(per_node.var() - degree)) < 1.0  # a Poisson's, as independent edges give


def test_a_block_model_at_probability_one_is_complete():
    graph = contextual_sbm(6, degree=6.0, n_features=2, phi=0.0)
    assert graph.edge_index.shape[1] == 30


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
def test_features_of_the_block_model_have_their_mean_and_noise(phi):
    n, p = 4000, 1000
    graph = contextual_sbm(n, n_features=p, phi=phi, generator=torch.Generator().manual_seed(1))
    assert int(graph.y.sum()) == n // 2 and (graph.y[: n // 2] == 1).all()
    mu = math.sqrt(n / p * 4.25) * math.cos(phi * math.pi / 2)
    gap = (graph.x[graph.y == 1].mean(0) - graph.x[graph.y == 0].mean(0)) / 2
    # mu |u|^2 and the noise's own 1, each give or take a share of sqrt(2 / p)
    assert abs(float(gap.square().sum()) * n - (mu + 1)) < 0.2 * (mu + 1)
    residual = graph.x - (2 * graph.y[:, None] - 1) * gap
    assert abs(float(residual.var()) * p - 1) < 0.01


def test_an_odd_block_model_and_its_generator():
    graphs = [
        contextual_sbm(11, n_features=3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert int(graphs[0].y.sum()) == 5
    assert torch.equal(graphs[0].x, graphs[1].x) and torch.equal(graphs[0].edge_index, graphs[1].edge_index)
    assert not torch.equal(graphs[0].x, graphs[2].x)


X = torch.randn(9, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PolynomialFilter(0), "K must be an integer of at least 1, got 0"),
        (lambda: PolynomialFilter(init_low=-1.0), "init_low must be at least 0, got -1.0"),
        (lambda: PolynomialFilter(init_high=-1.0), "init_high must be at least 0, got -1.0"),
        (lambda: PolynomialFilter(value_range=-1.0), "value_range must be at least 0, got -1.0"),
        (lambda: PolynomialFilter(max_elements=-1), "max_elements must be an integer of at least 0"),
        (lambda: PolynomialFilter()(X[0], EDGES), r"x must have shape \(any, any\), got \(4\,\)"),
        (lambda: PolynomialFilter()(X.long(), EDGES), "x must be a floating-point tensor"),
        (lambda: PolynomialFilter()(X, EDGES.float()), "edge_index must hold integers, got dtype torch.float32"),
        (lambda: PolynomialFilter()(X, EDGES.T), r"edge_index must have shape \(2, any\), got \(24, 2\)"),
        (lambda: PolynomialFilter()(X, EDGES + 1), r"edge_index must name nodes in 0\.\.8, got 9"),
        (lambda: PolynomialFilter()(X, EDGES - 1), r"edge_index must name nodes in 0\.\.8, got -1"),
        (lambda: PolynomialFilter()(X, EDGES, torch.ones(3)), r"edge_weight must have shape \(24\) for edge_index"),
        (lambda: PolynomialFilter().both(X, EDGES, -torch.ones(24)), "edge_weight must be at least 0, got -1"),
        (lambda: PolynomialFilter()(X, EDGES, torch.ones(24).requires_grad_()), "edge_weight must not require"),
        (lambda: PolyGCL(0), "in_channels must be an integer of at least 1"),
        (lambda: PolyGCL(4, 0), "hidden_channels must be an integer of at least 1, got 0"),
        (lambda: PolyGCL(4, act="elu"), "act must be one of 'relu', 'prelu', got 'elu'"),
        (lambda: PolyGCL(4, mix="sum"), "mix must be one of 'free', 'convex', got 'sum'"),
        (lambda: PolyGCL(4, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: PolyGCL(4, feature_dropout=-0.1), r"feature_dropout must be in \[0, 1\), got -0.1"),
        (lambda: PolyGCL(4, K=0), "K must be an integer of at least 1"),
        (lambda: PolyGCL(5, 8)(X, X, EDGES), r"x must have shape \(any, 5\) for this model, got \(9, 4\)"),
        (lambda: PolyGCL(5, 8).loss(X, EDGES), r"x must have shape \(any, 5\)"),
        (lambda: PolyGCL(5, 8).embed(X, EDGES), r"x must have shape \(any, 5\)"),
        (lambda: PolyGCL(4, 8)(X, X[:8], EDGES), r"shuffled must have shape \(9, 4\) for x, got \(8, 4\)"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, epochs=0), "epochs must be an integer of at least 1"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, patience=0), "patience must be an integer of at least 1"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, lr=0.0), "lr must be greater than 0"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, filter_lr=0.0), "filter_lr must be greater than 0"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, filter_weight_decay=-1.0), "filter_weight_decay must be at least 0"),
        (lambda: contextual_sbm(1), "n must be an integer of at least 2"),
        (lambda: contextual_sbm(n_features=0), "n_features must be an integer of at least 1"),
        (lambda: contextual_sbm(degree=0.0), "degree must be greater than 0"),
        (lambda: contextual_sbm(phi=1.5), r"phi must be in \[-1, 1\], got 1.5"),
        (lambda: contextual_sbm(epsilon=-0.5), "epsilon must be at least 0"),
        (lambda: contextual_sbm(degree=2.0, phi=-1.0), r"degree and phi must give edge probabilities in \[0, 1\]"),
        (lambda: contextual_sbm(8, degree=7.0, phi=0.5), r"for degree=7.0, phi=0.5, epsilon=3.25, n=8"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
