"""PolyGCL's scores and loss against loops over nodes, its training against its own record."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.graphs import PolyGCL, fit_polygcl
from posterity.testing import check_graph_network

NONE = torch.empty(2, 0, dtype=torch.long)
RING = torch.stack([torch.arange(9), (torch.arange(9) + 1) % 9])
CHORDS = torch.tensor([[0, 2, 5], [4, 7, 8]])
EDGES = torch.cat([RING, CHORDS, RING.flip(0), CHORDS.flip(0)], 1)  # connected, 9 nodes, 12 edges


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(in_channels=4, hidden=6, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PolyGCL(in_channels, hidden, **{"K": 3, **options}).double()


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


def test_embedding_leaves_the_mode_and_needs_no_gradient():
    net, x = model(), draw(9, 4)
    z = net.embed(x, EDGES)
    assert net.training and net.encoder.training and not z.requires_grad
    torch.testing.assert_close(z, net.embed(x, EDGES))
    assert not net.eval().embed(x, EDGES).requires_grad and not net.training


def test_a_graph_without_edges_has_a_finite_embedding():
    assert torch.isfinite(model().embed(draw(3, 4), NONE)).all()


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


class Views(nn.Module):
    """Both views of a model as one output."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, edge_index):
        return torch.cat(self.part.views(x, edge_index), 1)


@pytest.mark.parametrize("options", [{"K": 4}, {"K": 2, "act": "prelu", "batch_norm": True}])
def test_conforms_to_its_kind(as_a_user, options):
    net = model(3, 8, **options).float()
    for name in ("alpha", "beta"):  # the views come before the mixing and the scores
        getattr(net, name).requires_grad_(False)
    net.disc.requires_grad_(False)
    net.encoder.bn.requires_grad_(net.encoder.batch_norm)
    check_graph_network(Views(net), torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), EDGES)


def test_embedding_leaves_each_part_in_its_mode():
    net = model(4, 6)
    net.encoder.bn.eval()  # as a user freezes statistics
    net.embed(draw(9, 4), EDGES)
    assert net.training and net.encoder.training and not net.encoder.bn.training


def quick(seed=0, **options):
    net = model(4, 6, seed=seed)
    return net, fit_polygcl(net, draw(9, 4), EDGES, generator=torch.Generator().manual_seed(1), **options)


def test_training_restores_the_weights_of_the_lowest_loss():
    _, losses = quick(max_epochs=60, patience=60, lr=0.1)
    worse = next(k for k in range(5, 60) if losses[k] > min(losses[:k]))  # stop at a step that is no best
    best = int(np.argmin(losses[:worse]))
    net, long = quick(max_epochs=worse + 1, patience=60, lr=0.1)
    again, short = quick(max_epochs=best + 1, patience=60, lr=0.1)  # its last loss is the lowest
    assert long == losses[: worse + 1] and short == losses[: best + 1] and not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_patience_counts_steps_without_a_lower_loss():
    _, losses = quick(max_epochs=200, patience=3, lr=0.1)
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
        max_epochs=40,
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
    optimizer_steps = {"max_epochs": 60, "patience": 60, "lr": 1e-2, "filter_lr": 1e-2}
    fit_polygcl(
        net, draw(9, 4), EDGES, generator=torch.Generator().manual_seed(2), **optimizer_steps, **options
    )
    return net


def test_a_loss_that_is_not_finite_is_said(as_a_user):
    with pytest.raises(ValueError, match="the loss is nan after 0 steps: lower lr"):
        fit_polygcl(model(), torch.full((9, 4), torch.nan, dtype=torch.float64), EDGES, max_epochs=2)


X = torch.randn(9, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, max_epochs=0), "max_epochs must be an integer of at least 1"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, patience=0), "patience must be an integer of at least 1"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, lr=0.0), "lr must be greater than 0"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, filter_lr=0.0), "filter_lr must be greater than 0"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: fit_polygcl(PolyGCL(4, 8), X, EDGES, filter_weight_decay=-1.0), "filter_weight_decay must be at least 0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
