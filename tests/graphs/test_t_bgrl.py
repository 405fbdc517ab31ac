"""Losses, target, views, split and decoder of T-BGRL against definitions, PyG and counting."""

import math

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv

from posterity.graphs import (
    TBGRL,
    GCNEncoder,
    LinkDecoder,
    augment_graph,
    bgrl_loss,
    corrupt_graph,
    cosine_schedule,
    fit_link_decoder,
    fit_tbgrl,
    hits_at_k,
    inductive_link_split,
    tbgrl_loss,
)
from posterity.graphs.graph_views import CORRUPTIONS, _augment, _corrupt, _SparseFeatures
from posterity.testing import check_graph_network, check_layer, check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def graph(n=80, links=300, features=12, seed=0):
    half = torch.randint(n, (2, links), generator=rng(seed))
    half = half[:, half[0] != half[1]]
    x = (torch.rand(n, features, generator=rng(seed + 1)) < 0.2).float()
    return x, torch.cat([half, half.flip(0)], 1).unique(dim=1)


def several(count, d=4, n=6):
    return [torch.randn(n, d, dtype=torch.float64, generator=rng(k)).requires_grad_() for k in range(count)]


def model(features=12, **options):
    torch.manual_seed(0)
    return TBGRL(GCNEncoder(features, 8, 6), 6, predictor_hidden=5, **options)


# Losses.


def cosine(a, b):
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_its_equation(weight):
    q1, y2, q2, y1, n = several(5)
    want = weight * (cosine(q1, n) + cosine(q2, n)) - (1 - weight) * (cosine(q1, y2) + cosine(q2, y1))
    got = tbgrl_loss(q1, y2, q2, y1, n, neg_lambda=weight)
    torch.testing.assert_close(got, want)
    assert -2 <= float(got) <= 2
    torch.testing.assert_close(bgrl_loss(q1, y2, q2, y1), 2 - cosine(q1, y2) - cosine(q2, y1))
    if weight == 0:
        torch.testing.assert_close(got, bgrl_loss(q1, y2, q2, y1) - 2)


def test_only_directions_matter():
    parts = several(5)
    scaled = [part * (k + 2) for k, part in enumerate(parts)]
    torch.testing.assert_close(tbgrl_loss(*scaled), tbgrl_loss(*parts))
    torch.testing.assert_close(bgrl_loss(*scaled[:4]), bgrl_loss(*parts[:4]))


class Five(nn.Module):
    def forward(self, *parts):
        return tbgrl_loss(*parts) + bgrl_loss(*parts[:4])


def test_conformance_of_the_losses(as_a_user):
    parts = several(5)
    assert torch.autograd.gradcheck(tbgrl_loss, tuple(parts))
    assert torch.autograd.gradcheck(bgrl_loss, tuple(parts[:4]))
    check_loss(Five(), *parts, extremes=1e3, symmetric=True)


# The model.


def test_the_target_gets_no_gradient_and_starts_from_other_weights():
    net = model()
    x, e = graph()
    views = [augment_graph(x, e, drop_edge=0.3, drop_feature=0.2, generator=rng(k)) for k in (0, 1)]
    net.loss(*views, corrupt_graph(x, e, generator=rng())).backward()
    assert all(p.grad is None and not p.requires_grad for p in net.target_encoder.parameters())
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in net.online_encoder.weights)
    online, target = net.online_encoder.weights[0], net.target_encoder.weights[0]
    assert not torch.equal(online, target)
    trainable = {id(p) for p in net.trainable_parameters()}
    assert trainable == {id(p) for part in (net.online_encoder, net.predictor) for p in part.parameters()}
    assert [type(part).__name__ for part in net.predictor] == ["Linear", "PReLU", "Linear"]
    assert net.predictor[1].num_parameters == 1


@pytest.mark.parametrize("corrupted", [False, True])
def test_the_loss_of_views_is_the_functions(corrupted):
    net = model(neg_lambda=0.4).eval()
    x, e = graph()
    one, two, third = (x, e), (x * 2 + 1, e[:, ::2]), (x.flip(0), e)
    q1, q2 = net.predictor(net.online_encoder(*one)), net.predictor(net.online_encoder(*two))
    y1, y2, n = (net.target_encoder(*view) for view in (one, two, third))
    if corrupted:
        torch.testing.assert_close(net.loss(one, two, third), tbgrl_loss(q1, y2, q2, y1, n, neg_lambda=0.4))
    else:
        torch.testing.assert_close(net.loss(one, two), bgrl_loss(q1, y2, q2, y1))


def test_the_target_follows_geometrically_and_keeps_its_statistics():
    net = model()
    before = [p.clone() for p in net.target_encoder.parameters()]
    statistics = net.target_encoder.norms[0].running_mean.clone()
    net.online_encoder.norms[0].running_mean += 5
    net.update_target(1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.target_encoder.parameters(), strict=True))
    for _ in range(4):
        net.update_target(0.7)
    for old, new, online in zip(
        before, net.target_encoder.parameters(), net.online_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.7**4 * old + (1 - 0.7**4) * online)
    net.update_target(0)
    for new, online in zip(net.target_encoder.parameters(), net.online_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, online)
    assert torch.equal(net.target_encoder.norms[0].running_mean, statistics)


def test_any_encoder_whose_parts_reset_will_do():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 6)

        def forward(self, x, edge_index):
            return self.a(x)

    x, e = graph()
    net = TBGRL(Mine(), 6)
    losses = fit_tbgrl(net, x, e, max_epochs=5, warmup_steps=1, generator=rng())
    assert len(losses) == 5 and not torch.equal(net.target_encoder.a.weight, net.online_encoder.a.weight)
    assert net.embed(x, e).shape == (80, 6) and not net.embed(x, e).requires_grad


def test_embedding_leaves_each_part_in_its_mode():
    net = model().train()
    net.online_encoder.norms[0].eval()  # as a user freezes statistics
    x, e = graph()
    first = net.embed(x, e)
    assert net.online_encoder.training and torch.equal(first, net.embed(x, e))
    assert not net.online_encoder.norms[0].training and net.online_encoder.norms[1].training


# The encoder.


def test_the_encoder_is_gcn_normalisation_and_prelu():
    x, e = graph()
    e = torch.cat([e, torch.tensor([[0, 3], [0, 5]])], 1)  # a loop, and an edge of one direction
    net = GCNEncoder(12, 8, 6).train()
    states = x
    for k in range(2):
        conv = GCNConv(states.shape[1], net.weights[k].shape[1])
        conv.lin.weight.data, conv.bias.data = net.weights[k].T.contiguous(), net.biases[k]
        states = net.acts[k](nn.functional.batch_norm(conv(states, e), None, None, training=True))
    torch.testing.assert_close(net(x, e), states)


def test_conformance_of_the_encoder(as_a_user):
    x, e = graph(10, 15)
    torch.manual_seed(0)
    net = GCNEncoder(12, 8, 6)
    net(x, e)
    check_graph_network(net, x, e)


def test_sparse_features_are_the_dense_ones_in_every_view():
    x, e = graph()
    sparse, weight = _SparseFeatures.of(x), torch.randn(12, 5, generator=rng()).requires_grad_()

    def thinned(f):
        return _augment(f, e, 0.4, 0.5, rng(2))[0]

    def shuffled(f):
        return _corrupt(f, e, "shuffle-features", rng(3))[0]

    for make in (
        lambda f: f,
        thinned,
        shuffled,
        lambda f: shuffled(thinned(f)),
        lambda f: thinned(shuffled(shuffled(f))),
        lambda f: _corrupt(thinned(f), e, "sparsify", rng(4))[0],
    ):
        probe = torch.randn(80, 5, generator=rng(5))
        got, want = make(sparse).times(weight), make(x) @ weight
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad((out * probe).sum(), weight)[0] for out in (got, want)]
        torch.testing.assert_close(*grads)


def test_training_on_sparse_features_is_training_on_dense_ones(monkeypatch):
    x, e = graph(features=40)
    x = x * (torch.rand(x.shape, generator=rng(9)) < 0.3)
    torch.manual_seed(0)
    first, second = model(40), model(40)
    a = fit_tbgrl(first, x, e, max_epochs=4, warmup_steps=1, generator=rng())
    monkeypatch.setattr(_SparseFeatures, "of", classmethod(lambda cls, x: x))
    b = fit_tbgrl(second, x, e, max_epochs=4, warmup_steps=1, generator=rng())
    assert a == pytest.approx(b, abs=1e-5)


# Views.


def test_views_drop_edges_and_whole_columns():
    x, e = torch.rand(500, 400, generator=rng()) + 0.1, torch.randint(500, (2, 4000), generator=rng(1))
    view, edges = augment_graph(x, e, drop_edge=0.3, drop_feature=0.6, generator=rng(2))
    assert abs(edges.shape[1] / 4000 - 0.7) < 5 * math.sqrt(0.21 / 4000)
    dead = (view == 0).all(0)
    assert torch.equal((view == 0).any(0), dead) and abs(float(dead.float().mean()) - 0.6) < 5 * math.sqrt(
        0.24 / 400
    )
    assert torch.equal(view[:, ~dead], x[:, ~dead])
    again, same = augment_graph(x, e, drop_edge=0.3, drop_feature=0.6, generator=rng(2))
    assert torch.equal(view, again) and torch.equal(edges, same)
    whole, all_edges = augment_graph(x, e, drop_edge=0.0, drop_feature=0.0)
    assert torch.equal(whole, x) and torch.equal(all_edges, e)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_do_what_their_names_say(kind):
    x, e = graph(60, 400, 50)
    fx, fe = corrupt_graph(x, e, kind=kind, generator=rng(1))
    again = corrupt_graph(x, e, kind=kind, generator=rng(1))
    assert torch.equal(fx, again[0]) and torch.equal(fe, again[1])
    count = e.shape[1]
    if "shuffle" in kind:
        assert not torch.equal(fx, x)
        assert sorted(map(tuple, fx.tolist())) == sorted(map(tuple, x.tolist()))
    if "random-features" in kind:
        assert fx.min() >= 0 and fx.max() <= 1 and fx.unique().numel() > 1000
    if "features" not in kind and kind != "sparsify":
        assert torch.equal(fx, x)
    if "count" in kind:
        sizes = [corrupt_graph(x, e, kind=kind, generator=rng(k))[1].shape[1] for k in range(60)]
        assert (
            min(sizes) >= math.ceil(0.75 * count)
            and max(sizes) <= math.ceil(1.25 * count)
            and len(set(sizes)) > 20
        )
    elif "edges" in kind:
        assert fe.shape == e.shape and set(fe.unique().tolist()) == set(range(60)), "the last node too"
    elif kind == "sparsify":
        assert fe.shape[1] < 0.15 * count and int((fx != 0).any(0).sum()) < 15
    else:
        assert torch.equal(fe, e)


def test_the_schedule_rises_peaks_and_falls():
    values = [cosine_schedule(step, 3.0, 10, 50) for step in range(51)]
    assert values[0] == 0 and values[10] == 3 and values[50] == pytest.approx(0, abs=1e-15)
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)
    assert values[30] == pytest.approx(1.5)
    assert cosine_schedule(0, 2.0, 0, 5) == 2


# The split.


@pytest.fixture(scope="module")
def whole():
    x, e = graph(200, 1500, 3)
    x = torch.arange(200.0)[:, None].expand(200, 3).contiguous()
    return x, e, inductive_link_split(x, e, generator=rng(4))


def pairs(links):
    return {tuple(sorted(pair)) for pair in links.T.tolist()}


def test_parts_are_disjoint_and_their_union_is_the_graph(whole):
    x, e, split = whole
    ids = split.observed.nonzero()[:, 0]
    assert int((~split.observed).sum()) == 60
    assert torch.equal(split.train_x, x[ids]), "observed nodes keep their order"
    train, val = pairs(ids[split.train_pos]), pairs(ids[split.val_pos])
    test = [pairs(part) for part in (split.test_oo, split.test_ou, split.test_uu)]
    every, inference = pairs(e), pairs(split.inference_edge_index)
    assert pairs(ids[split.train_edge_index]) == train
    assert split.train_edge_index.shape[1] == 2 * len(train)
    assert inference | set().union(*test) == every and not inference & set().union(*test)
    assert train | val < inference and not train & val
    for part, seen in zip(test, (2, 1, 0), strict=True):
        mine = {p for p in every if sum(bool(split.observed[v]) for v in p) == seen}
        assert part < mine and len(part) == int(0.3 * len(mine))
    both = {p for p in every if bool(split.observed[list(p)].all())}
    left = len(both) - len(test[0]) - int(0.1 * len(both))
    assert len(val) == int(0.3 * left) and len(train) == left - len(val)
    assert split.test_pos.shape[1] == sum(map(len, test))


def test_negatives_are_different_pairs_without_a_link(whole):
    _, e, split = whole
    every, ids = pairs(e), split.observed.nonzero()[:, 0]
    test, val = pairs(split.test_neg), pairs(split.val_neg)
    assert len(test) == split.test_neg.shape[1] == round(0.3 * len(every)) and not test & every
    assert len(val) == split.val_neg.shape[1] == split.val_pos.shape[1]
    assert not val & (pairs(split.train_pos) | pairs(split.val_pos))
    assert all(u != v for u, v in test | val) and max(max(p) for p in val) < len(ids)


def test_the_same_generator_gives_the_same_split(whole):
    x, e, split = whole
    again = inductive_link_split(x, e, generator=rng(4))
    assert torch.equal(again.test_neg, split.test_neg) and torch.equal(again.train_pos, split.train_pos)


def test_negatives_of_a_nearly_full_graph_are_found_uniformly():
    from posterity.graphs.link_prediction import _non_links

    links = torch.combinations(torch.arange(6)).T[:, :-4]
    counts = torch.zeros(6, 6)
    for seed in range(300):
        u, v = _non_links(links, 6, 2, rng(seed))
        counts[u, v] += 1
    free = counts[counts > 0]
    assert len(free) == 4 and float((free - 150).abs().max()) < 5 * math.sqrt(300 * 0.25)


# Decoder and metric.


def test_the_decoder_is_symmetric_and_conforms(as_a_user):
    torch.manual_seed(0)
    z, links = torch.randn(9, 4, generator=rng()), torch.tensor([[0, 3, 5], [1, 8, 5]])
    decoder = LinkDecoder(4, 7)
    torch.testing.assert_close(decoder(z, links), decoder(z, links.flip(0)))
    check_layer(decoder, z, links, shape=(3,))


def test_a_decoder_learns_links_of_clusters():
    z = torch.cat([torch.randn(50, 4, generator=rng(k)) * 0.3 + 3 * torch.eye(4)[k] for k in range(2)])
    both = torch.randint(50, (2, 400), generator=rng(3)) + 50 * torch.randint(2, (1, 400), generator=rng(4))
    across = torch.stack(
        [torch.randint(50, (100,), generator=rng(5)), torch.randint(50, 100, (100,), generator=rng(6))]
    )
    decoder = fit_link_decoder(z, both[:, :300], both[:, 300:], across, max_epochs=150, k=10, generator=rng())
    assert hits_at_k(decoder(z, both[:, 300:]), decoder(z, across), 10) > 0.95
    again = fit_link_decoder(z, both[:, :300], both[:, 300:], across, max_epochs=150, k=10, generator=rng())
    assert torch.equal(again.net[0].weight, decoder.net[0].weight)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_hits_are_counted_as_by_sorting(k):
    pos, neg = (torch.randint(20, (size,), generator=rng(size)).float() for size in (40, 60))
    kth = sorted(neg.tolist(), reverse=True)[k - 1]
    assert hits_at_k(pos, neg, k) == pytest.approx(sum(p > kth for p in pos.tolist()) / 40)
    assert hits_at_k(pos, neg[: k - 1], k) == 1.0


# Training.


def test_patience_stops_and_the_same_seed_repeats():
    x, e = graph()
    a = fit_tbgrl(model(), x, e, max_epochs=60, warmup_steps=2, patience=3, lr=1e-9, generator=rng())
    assert len(a) < 60
    runs = [fit_tbgrl(model(), x, e, max_epochs=6, warmup_steps=2, generator=rng(1)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert all(
        math.isfinite(loss)
        for loss in fit_tbgrl(model(), x, e, max_epochs=3, warmup_steps=1, corruption=None)
    )


# Bad input.


def test_wrong_arguments_are_refused(as_a_user):
    x, e = graph()
    q = [torch.ones(3, 2)] * 5
    net = model()
    one_way = torch.tensor([[0, 1, 2], [1, 0, 3]])
    for call, message in [
        (lambda: tbgrl_loss(*q, neg_lambda=1.5), "neg_lambda"),
        (lambda: model(neg_lambda=-0.1), "neg_lambda"),
        (lambda: tbgrl_loss(*q[:4], torch.ones(2, 2)), "one shape"),
        (lambda: bgrl_loss(*q[:3], torch.ones(3, 1)), "one shape"),
        (lambda: TBGRL(nn.ReLU(), 3), "encoder must have reset_parameters"),
        (lambda: TBGRL(GCNEncoder(3), 0), "out_channels"),
        (lambda: GCNEncoder(0), "in_channels"),
        (lambda: GCNEncoder(3, norm_momentum=2), "norm_momentum"),
        (lambda: GCNEncoder(3)(x, e), "x must have shape"),
        (lambda: net.update_target(1.1), "momentum"),
        (lambda: augment_graph(x, e, drop_edge=1.0, drop_feature=0), "drop_edge"),
        (lambda: augment_graph(x, e, drop_edge=0, drop_feature=-0.1), "drop_feature"),
        (lambda: corrupt_graph(x, e, kind="noise"), "kind must be one of"),
        (lambda: cosine_schedule(6, 1.0, 2, 5), r"step must be in \[0, 5\]"),
        (lambda: cosine_schedule(1, 1.0, 5, 5), "total_steps"),
        (lambda: inductive_link_split(x, one_way), "2 -> 3 lacks its reverse"),
        (lambda: inductive_link_split(x, e + 70), "nodes in"),
        (lambda: inductive_link_split(x, e, node_ratio=1.0), "node_ratio"),
        (lambda: inductive_link_split(x, e, val_ratio=0.0), "val_ratio"),
        (lambda: inductive_link_split(x, e[:, :0]), "test_oo is empty"),
        (lambda: inductive_link_split(x, e, val_ratio=0.001), "val_pos is empty"),
        (lambda: inductive_link_split(x * math.nan, e), "finite"),
        (
            lambda: inductive_link_split(
                torch.ones(5, 1), torch.combinations(torch.arange(5)).T.repeat(1, 1), generator=rng()
            ),
            "reverse",
        ),
        (lambda: fit_tbgrl(net, x * math.nan, e), "finite"),
        (lambda: fit_tbgrl(net, x, e, max_epochs=5), "warmup_steps must be below max_epochs"),
        (lambda: fit_tbgrl(net, x, e, corruption="noise"), "corruption"),
        (lambda: fit_tbgrl(net, x, e, drop_edge=(0.1, 1.0)), "drop_edge"),
        (lambda: fit_tbgrl(net, x, e, momentum=2), "momentum"),
        (lambda: fit_tbgrl(net, x, e, patience=0), "patience"),
        (lambda: hits_at_k(torch.ones(0), torch.ones(3)), "pos"),
        (lambda: hits_at_k(torch.ones(2), torch.ones(3), 0), "k must be"),
        (lambda: LinkDecoder(3)(torch.ones(4, 2), e), "z must have shape"),
        (lambda: bgrl_loss(*[torch.ones(3, 0)] * 4), "at least one feature, got {'q1'"),
        (lambda: GCNEncoder(5)(x.long(), e), "x must be a floating-point tensor"),
        (lambda: augment_graph(x[0], e, drop_edge=0, drop_feature=0), r"x must have shape \(any, any\)"),
        (
            lambda: augment_graph(x, e + 70, drop_edge=0, drop_feature=0),
            r"edge_index must name nodes in 0\.\.\d+ of x",
        ),
        (lambda: corrupt_graph(x, e.float()), "edge_index must hold integers"),
        (lambda: net.loss((4, e), (x, e)), r"view1\[0\] must be a floating-point tensor, got int"),
        (lambda: net.loss((x, e), (x, e + 70)), r"view2\[1\] must name nodes in"),
        (
            lambda: TBGRL(GCNEncoder(x.shape[1], 4, 4), 3).loss((x, e), (x, e)),
            r"encoder\(x, edge_index\) must have shape \(\d+, 3\) for out_channels",
        ),
        (lambda: fit_tbgrl(net, x, e + 70), "edge_index must name nodes in"),
        (lambda: LinkDecoder(5)(x[:, :5].long(), e), "z must be a floating-point tensor"),
        (lambda: LinkDecoder(2)(torch.ones(4, 2), e + 70), r"edge_index must name nodes in 0\.\.3 of z"),
        (
            lambda: fit_link_decoder(x[:1], e[:, :1] * 0, e[:, :1] * 0, e[:, :1] * 0),
            r"z must have at least two rows and a column, got \(1, \d+\)",
        ),
        (lambda: fit_link_decoder(x, e + 70, e, e), "train_pos must name nodes in"),
        (lambda: fit_link_decoder(x, e, e[:, :0], e), "val_pos must not be empty"),
        (lambda: fit_link_decoder(x, e, e, e - 1), r"val_neg must name nodes in 0\.\.\d+ of z, got -1"),
        (lambda: fit_link_decoder(x, e, e, e, k=0), "k must be"),
        (lambda: hits_at_k(torch.ones(2).long(), torch.ones(3)), "pos must be a floating-point tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_full_graph_has_no_negatives():
    both = torch.combinations(torch.arange(30)).T
    with pytest.raises(ValueError, match=r"leaves 0 pairs|pairs without a link"):
        inductive_link_split(torch.ones(30, 2), torch.cat([both, both.flip(0)], 1), generator=rng())
