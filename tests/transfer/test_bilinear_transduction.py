"""Bilinear transduction against products written out, brute force over pairs, and functions of known rank."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPRegressor

from posterity.testing import check_estimator, check_layer
from posterity.transfer import (
    BilinearPredictor,
    BilinearTransductionRegressor,
    pairwise_deltas,
    select_anchors,
)
from posterity.transfer import bilinear_transduction as module


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# the predictor


@pytest.mark.parametrize("hidden", [(), (7,), (6, 5)])
def test_the_network_conforms_to_its_kind(as_a_user, hidden):
    model = BilinearPredictor(4, 3, n_embed=5, hidden=hidden).double()
    check_layer(model, draw(9, 4), draw(9, 4, seed=1), shape=(9, 3))
    assert [type(layer).__name__ for layer in model.anchor_net] == ["Linear", "ReLU"] * len(hidden) + [
        "Linear"
    ]


def test_an_output_is_the_product_of_a_row_of_the_anchor_and_a_column_of_the_difference():
    model, x, dx = BilinearPredictor(4, 3, n_embed=5, hidden=(6,)).double(), draw(9, 4), draw(9, 4, seed=1)
    a, b = model.anchor_net(x).reshape(9, 3, 5), model.delta_net(dx).reshape(9, 5, 3)
    expected = [[sum(a[n, o, e] * b[n, e, o] for e in range(5)) for o in range(3)] for n in range(9)]
    torch.testing.assert_close(model(x, dx), torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize("net", ["anchor_net", "delta_net"])
def test_a_prediction_is_linear_in_either_embedding(net):
    model, x, dx = BilinearPredictor(4, 3, n_embed=5, hidden=(6,)).double(), draw(9, 4), draw(9, 4, seed=1)
    scaled = copy.deepcopy(model)
    for parameter in getattr(scaled, net)[-1].parameters():
        parameter.data *= -2.5
    torch.testing.assert_close(scaled(x, dx), -2.5 * model(x, dx))


def test_without_hidden_layers_it_is_a_bilinear_form():
    model, x, dx = BilinearPredictor(4, n_embed=6, hidden=()).double(), draw(9, 4), draw(9, 4, seed=1)
    for layer in (model.anchor_net[0], model.delta_net[0]):
        layer.bias.data.zero_()
    form = model.anchor_net[0].weight.T @ model.delta_net[0].weight
    torch.testing.assert_close(model(x, dx)[:, 0], (x @ form * dx).sum(1))


# differences


def test_all_pairs_are_every_ordered_pair_once():
    x = draw(5, 3)
    expected = [x[j] - x[i] for i in range(5) for j in range(5)]
    assert torch.equal(pairwise_deltas(x), torch.stack(expected))
    labels = ["b", "a", "b", "b", "a"]
    own = [x[j] - x[i] for i in range(5) for j in range(5) if labels[i] == labels[j]]
    assert torch.equal(pairwise_deltas(x, groups=labels), torch.stack(own))
    assert torch.equal(pairwise_deltas(x.numpy()), pairwise_deltas(x))


@pytest.mark.parametrize("labels", [None, [3, 1, 3, 3]])
def test_drawn_pairs_are_uniform_over_first_points_and_then_over_the_group(labels):
    x = torch.tensor([[0.0], [1.0], [10.0], [100.0]])
    found = pairwise_deltas(x, 40_000, groups=labels, generator=seeded())
    share = {}
    for i in range(4):
        mates = [j for j in range(4) if labels is None or labels[i] == labels[j]]
        for j in mates:
            value = float(x[j] - x[i])
            share[value] = share.get(value, 0) + 1 / 4 / len(mates)
    values, counts = found.unique(return_counts=True)
    assert set(values.tolist()) == set(share)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        assert abs(count / 40_000 - share[value]) < 0.012
    assert torch.equal(found, pairwise_deltas(x, 40_000, groups=labels, generator=seeded()))


# anchors


def brute(x, x_train, deltas):
    """Return the distance of each query's difference from each point to the nearest of deltas."""
    x, x_train, deltas = (np.asarray(each, dtype=float) for each in (x, x_train, deltas))
    steps = x[:, None] - x_train[None]
    return np.linalg.norm(steps[:, :, None] - deltas, axis=-1).min(-1)


@pytest.mark.parametrize("d", [2, 15, 16])  # both sides of where the tree ends
@pytest.mark.parametrize("n_anchors", [1, 4, 50])
def test_anchors_are_those_of_brute_force_over_all_pairs(d, n_anchors):
    x, x_train, deltas = 2 * draw(25, d), draw(60, d, seed=1), draw(300, d, seed=2)
    expected = brute(x, x_train, deltas).argsort(1, kind="stable")[:, :n_anchors]
    for chunk_size in (4096, 70):
        found = select_anchors(x, x_train, deltas, n_anchors=n_anchors, chunk_size=chunk_size)
        assert np.array_equal(found.numpy(), expected)
    found = select_anchors(x.numpy(), x_train.numpy(), deltas.numpy(), n_anchors=n_anchors)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [2, 20])
def test_a_training_point_is_its_own_anchor_and_other_points_have_zero_distance_too_if_seen(d, dtype):
    x_train = (draw(40, d) + 3).to(dtype)
    found = select_anchors(x_train, x_train, torch.zeros(1, d, dtype=dtype))[:, 0]
    assert torch.equal(found, torch.arange(40))
    every = pairwise_deltas(x_train)
    assert every.dtype == dtype
    assert not select_anchors(x_train, x_train, every).any()  # all are equally near: the lowest index


@pytest.mark.parametrize("d", [3, 18])
def test_translation_changes_nothing_and_neither_does_a_unit(d):
    x, x_train = (draw(20, d) * 256).round() / 256, (draw(30, d, seed=1) * 256).round() / 256
    deltas = pairwise_deltas(x_train, 100, generator=seeded())
    assert torch.equal(pairwise_deltas(x_train + 64), pairwise_deltas(x_train))
    found = select_anchors(x, x_train, deltas, n_anchors=3)
    assert torch.equal(select_anchors(x + 64, x_train + 64, deltas, n_anchors=3), found)
    for unit in (2.0**-600, 2.0**600):
        assert torch.equal(select_anchors(x * unit, x_train * unit, deltas * unit, n_anchors=3), found)


def test_an_anchor_is_of_the_querys_group_and_the_best_of_it():
    x, x_train, deltas = draw(25, 3), draw(60, 3, seed=1), draw(100, 3, seed=2)
    mine, theirs = np.arange(25) % 3, np.arange(60) % 4
    found = select_anchors(x, x_train, deltas, n_anchors=2, groups=mine, groups_train=theirs).numpy()
    distance = np.where(mine[:, None] == theirs, brute(x, x_train, deltas), np.inf)
    assert np.array_equal(found, distance.argsort(1)[:, :2])
    names = np.array(list("abcd"))
    named = select_anchors(
        x, x_train, deltas, n_anchors=2, groups=names[mine], groups_train=list(names[theirs])
    )
    assert np.array_equal(named.numpy(), found)


def test_with_a_radius_anchors_are_uniform_among_the_near_and_the_nearest_where_too_few_are():
    x, x_train, deltas = draw(3, 2), draw(12, 2, seed=1), draw(20, 2, seed=2)
    distance = brute(x, x_train, deltas)
    radius = float(np.sort(distance[0])[4] * 1.0001)  # five of the first query
    generator, counts = seeded(), np.zeros((3, 12))
    for _ in range(200):
        pair = select_anchors(x, x_train, deltas, n_anchors=2, radius=radius, generator=generator)
        assert (pair[:, 0] != pair[:, 1]).all()
        np.add.at(counts, (np.arange(3)[:, None], pair.numpy()), 1)
    near = distance <= radius
    assert near[0].sum() == 5
    for row in range(3):
        if near[row].sum() >= 2:
            assert not counts[row, ~near[row]].any()
            assert np.abs(counts[row, near[row]] / 200 - 2 / near[row].sum()).max() < 0.15
    tiny = select_anchors(x, x_train, deltas, n_anchors=2, radius=1e-9, generator=seeded())
    assert np.array_equal(tiny.numpy(), distance.argsort(1)[:, :2])
    for size in (1, 4096):
        again = select_anchors(x, x_train, deltas, radius=radius, chunk_size=size, generator=seeded(5))
        assert torch.equal(again, select_anchors(x, x_train, deltas, radius=radius, generator=seeded(5)))


def test_no_query_has_no_anchor_and_strided_points_are_as_others():
    x_train, deltas = draw(6, 4), draw(9, 4, seed=1)
    assert select_anchors(x_train[:0], x_train, deltas, n_anchors=2).shape == (0, 2)
    strided = draw(4, 12).T
    expected = select_anchors(strided.contiguous(), x_train, deltas)
    assert torch.equal(select_anchors(strided, x_train, deltas), expected)
    assert torch.equal(select_anchors(strided.flip(0), x_train, deltas), expected.flip(0))


# the regressor

X = np.random.default_rng(0).uniform(0, 1, (120, 2))
Y = np.exp(X @ [1.5, 1.0])
QUICK = {"hidden": (16,), "n_embed": 3, "n_steps": 20, "lr": 1e-2, "n_deltas": 300, "random_state": 0}


def fitted(**options):
    return BilinearTransductionRegressor(**{**QUICK, **options})


def test_the_estimator_conforms_to_its_kind(as_a_user):
    quick = BilinearTransductionRegressor(
        (), 4, n_steps=20, batch_size=256, lr=0.1, n_deltas=100, random_state=0
    )
    check_estimator(quick, invariant=["shift X", "scale X", "shift y", "scale y"])


def every_pair(n):
    pairs = [(i, j) for i in range(n) for j in range(n)]
    return tuple(torch.tensor(side) for side in zip(*pairs, strict=True))


@pytest.mark.parametrize("loss", ["norm", "squared"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_fit_is_adam_on_the_errors_of_pairs(monkeypatch, loss, schedule):
    """All pairs in each step, against the whole product and its diagonal, from the same start."""
    monkeypatch.setattr(module._Pairs, "draw", lambda self, m: every_pair(self.n))
    x, y = X[:9], np.stack([Y[:9], X[:9, 0]], 1)
    options = {"loss": loss, "schedule": schedule, "lr": 1e-2}
    start = fitted(**{**options, "lr": 1e-40, "n_steps": 1}).fit(x, y).predictor_
    found = fitted(**options, n_steps=7).fit(x, y)
    z, t = (torch.from_numpy((v - v.mean(0)) / v.std(0)) for v in (x, y))
    i, j = every_pair(9)
    optimizer, curve = torch.optim.Adam(start.parameters(), lr=1e-2), []
    for step in range(7):
        if schedule == "cosine":
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + np.cos(np.pi * step / 7)) / 2
        a = start.anchor_net(z[i]).reshape(-1, 2, 3)
        b = start.delta_net(z[j] - z[i]).reshape(-1, 3, 2)
        error = torch.diagonal(a @ b, dim1=1, dim2=2) - t[j]
        value = error.norm(dim=1).mean() if loss == "norm" else error.square().sum(1).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
    np.testing.assert_allclose(found.loss_curve_, curve, rtol=1e-9)
    for mine, theirs in zip(found.predictor_.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_learned_weights_are_a_softmax_over_the_other_points_of_a_batch():
    x, y = X[:7], Y[:7]
    model = fitted(pairing="learned", loss="squared", n_steps=1, lr=1e-40, batch_size=99).fit(x, y)
    z, t = torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy((y - y.mean()) / y.std())
    total = 0.0
    for j in range(7):
        others = [i for i in range(7) if i != j]
        score = torch.stack([model._scorer(torch.cat([z[i], z[j] - z[i]])[None])[0, 0] for i in others])
        error = [model.predictor_(z[i][None], (z[j] - z[i])[None])[0, 0] - t[j] for i in others]
        total += float((score.softmax(0) * torch.stack(error).square()).sum().detach())
    np.testing.assert_allclose(model.loss_curve_, [total / 7])


def test_learned_anchors_are_those_of_best_score_among_the_tenth_that_is_nearest():
    model = fitted(pairing="learned", n_anchors=2, batch_size=16).fit(X, Y)
    query = np.random.default_rng(1).uniform(0.5, 1.5, (6, 2))
    found, far = model.anchors(query)
    z, train = torch.from_numpy((query - X.mean(0)) / X.std(0)), torch.from_numpy(model.x_train_)
    distance = brute(z, train, model.train_deltas_)
    for k in range(6):
        near = distance[k].argsort(kind="stable")[:12]
        score = model._scorer(torch.cat([train[near], z[k] - train[near]], 1))[:, 0].detach().numpy()
        assert distance[k][found[k]].max() <= np.sort(distance[k])[11] * (1 + 1e-9)
        best = model._scorer(torch.cat([train[found[k]], z[k] - train[found[k]]], 1))[:, 0].detach().numpy()
        np.testing.assert_allclose(best, np.sort(score)[::-1][:2])
        np.testing.assert_allclose(far[k], distance[k][found[k]], atol=1e-12)
    assert model.predict(query).shape == (6,)


def test_a_prediction_is_the_mean_over_the_anchors_of_least_distance():
    y = np.stack([Y, X[:, 0]], 1)
    model = fitted(n_anchors=3).fit(X, y)
    query = np.random.default_rng(1).uniform(0.5, 1.5, (8, 2))
    indices, far = model.anchors(query)
    z, train = torch.from_numpy((query - X.mean(0)) / X.std(0)), torch.from_numpy(model.x_train_)
    distance = brute(z, train, model.train_deltas_)
    np.testing.assert_allclose(far, np.sort(distance, 1)[:, :3], atol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(distance, indices, 1), far, atol=1e-12)
    each = [model.predictor_(train[indices[:, k]], z - train[indices[:, k]]) for k in range(3)]
    expected = torch.stack(each).mean(0).detach().numpy() * y.std(0) + y.mean(0)
    np.testing.assert_allclose(model.predict(query), expected)


def test_the_distance_is_zero_for_what_was_seen_and_grows_from_one_further_width_on():
    for n_deltas in (200, 20_000, None):
        model = fitted(n_steps=1, n_deltas=n_deltas).fit(X, Y)
        assert len(model.train_deltas_) == (200 if n_deltas == 200 else 120**2)
        assert not model.anchors(X)[1].any()
    seen = X[3] + (X[5] - X[8])
    assert model.anchors(seen[None])[1] < 1e-12
    far = model.anchors([[2.0, 0.5], [3.0, 0.5], [5.0, 0.5]])[1][:, 0] * X.std(0)[0]
    assert far[0] < 0.1
    np.testing.assert_allclose(far[1:], [1.0, 3.0], atol=0.15)  # 3 and 5 are 1 and 3 beyond 2


def test_a_function_of_rank_one_is_extrapolated_where_a_network_of_the_same_size_is_not():
    test = np.random.default_rng(1).uniform(0.9, 1.4, (300, 2))
    truth = np.exp(test @ [1.5, 1.0])
    model = BilinearTransductionRegressor(
        n_embed=2, loss="squared", n_steps=400, batch_size=64, lr=1e-2, schedule="cosine", random_state=0
    ).fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spread = Y.std()
        net = MLPRegressor(
            hidden_layer_sizes=(32, 32), max_iter=300, learning_rate_init=1e-2, random_state=0
        ).fit(X, Y / spread)
    line = LinearRegression().fit(X, Y)
    error = {
        name: float(np.sqrt(np.mean((guess - truth) ** 2)))
        for name, guess in {
            "transduction": model.predict(test), "network": spread * net.predict(test), "line": line.predict(test)
        }.items()
    }  # fmt: skip
    assert (
        np.sqrt(np.mean((spread * net.predict(X) - Y) ** 2)) < 0.1 * spread
    )  # it has learned what it was shown
    assert error["transduction"] < 0.5 * error["network"]
    assert error["transduction"] < 0.5 * error["line"]


def test_pairs_and_anchors_stay_in_the_group_where_it_is_known():
    groups = np.where(X[:, 0] > 0.5, "right", "left")
    model = fitted(pairing="groups", n_anchors=2).fit(X, Y, groups=groups)
    query = np.random.default_rng(1).uniform(0, 1.5, (10, 2))
    asked = np.array(["left", "right"] * 5)
    own, _ = model.anchors(query, groups=asked)
    assert (groups[own] == asked[:, None]).all()
    anyone, _ = model.anchors(query)
    z = (query - X.mean(0)) / X.std(0)
    distance = brute(z, model.x_train_, model.train_deltas_)
    np.testing.assert_allclose(np.take_along_axis(distance, anyone, 1), np.sort(distance, 1)[:, :2])
    assert np.isfinite(model.predict(query, groups=list(asked))).all()
    widths = [np.ptp(X[groups == name, 0]) / X.std(0)[0] for name in ("left", "right")]
    assert np.abs(model.train_deltas_[:, 0]).max() <= max(widths) + 1e-9  # none crosses the border


def test_the_same_random_state_gives_the_same_bytes_pickling_keeps_them_and_no_gpu_is_reseeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    before = torch.get_rng_state()
    for options in ({}, {"pairing": "learned"}, {"radius": 0.5, "n_anchors": 2}):
        options = {**options, "n_steps": 8}
        model, twin = fitted(**options).fit(X, Y), fitted(**options).fit(X, Y)
        assert model.predict(X + 0.4).tobytes() == twin.predict(X + 0.4).tobytes()
        kept = pickle.loads(pickle.dumps(model))
        assert kept.predict(X + 0.4).tobytes() == model.predict(X + 0.4).tobytes()
        assert np.array_equal(kept.loss_curve_, twin.loss_curve_)
    assert not np.array_equal(fitted(random_state=1, n_steps=8).fit(X, Y).loss_curve_, twin.loss_curve_)
    assert torch.equal(before, torch.get_rng_state())


def test_numbers_in_single_precision_stay_so_and_a_constant_column_or_target_is_no_harm():
    model = fitted().fit(X.astype(np.float32), Y)
    assert model.predict(X.astype(np.float32)).dtype == np.float32
    assert next(model.predictor_.parameters()).dtype == torch.float32
    flat = np.column_stack([X, np.full(120, 7.0)])
    assert np.isfinite(fitted().fit(flat, Y).predict(flat + 0.1)).all()
    still = fitted(n_steps=1).fit(X, np.full(120, 3.0)).predict(X)
    assert np.isfinite(still).all()


def test_without_standardising_distances_are_in_the_units_of_the_data():
    model = fitted(standardize=False, n_steps=1).fit(10 * X, Y)
    assert np.array_equal(model.x_train_, 10 * X)
    np.testing.assert_allclose(model.anchors([[30.0, 5.0]])[1], [[10.0]], atol=1.5)


# bad input

NET = BilinearPredictor(3)
P, D = torch.ones(5, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BilinearPredictor(0), "in_features must be an integer of at least 1, got 0"),
        (lambda: BilinearPredictor(3, 0), "out_features must be an integer of at least 1"),
        (lambda: BilinearPredictor(3, n_embed=0), "n_embed must be an integer of at least 1, got 0"),
        (lambda: BilinearPredictor(3, hidden=8), "hidden must be a sequence of widths, got 8"),
        (lambda: BilinearPredictor(3, hidden=(8, 0)), "hidden must be an integer of at least 1, got 0"),
        (lambda: BilinearPredictor(3, hidden="ab"), "hidden must be a sequence of widths, got 'ab'"),
        (lambda: NET(P.long(), P), "anchor must be a floating-point tensor, got dtype torch.int64"),
        (lambda: NET(P, P.long()), "delta must be a floating-point tensor, got dtype torch.int64"),
        (lambda: NET(P[:, :2], P), r"anchor must have shape \(any, 3\), got \(5, 2\)"),
        (lambda: NET(P, P[:2]), r"delta must have shape \(5, 3\) for anchor, got \(2, 3\)"),
        (lambda: pairwise_deltas(P.long()), "x must be a floating-point tensor, got dtype torch.int64"),
        (lambda: pairwise_deltas(P.long().numpy()), "x must be of a floating-point dtype, got an array of int64"),
        (lambda: pairwise_deltas(None), "x must be a floating-point tensor, got NoneType"),
        (lambda: pairwise_deltas(P[:0]), r"x must have rows and columns, got shape \(0, 3\)"),
        (lambda: pairwise_deltas(P, 0), "n_deltas must be an integer of at least 1, got 0"),
        (lambda: pairwise_deltas(P, groups=[1, 2]), r"groups must have a label for each of 5 rows, got shape \(2,\)"),
        (lambda: select_anchors(P[:, :2], P, D), r"x must have shape \(any, 3\) for x_train, got \(5, 2\)"),
        (lambda: select_anchors(P, P, D[:, :2]), r"deltas must have shape \(any, 3\) for x_train, got \(2, 2\)"),
        (lambda: select_anchors(P, P, D[:0]), "deltas must have rows and columns"),
        (lambda: select_anchors(P, P, D.double()), "deltas must have the dtype and device of x_train"),
        (lambda: select_anchors(P, P, D / 0), "deltas must be finite"),
        (lambda: select_anchors(P / 0, P, D), "x must be finite"),
        (lambda: select_anchors(P, P / 0, D), "x_train must be finite"),
        (lambda: select_anchors(P, P, D, n_anchors=0), "n_anchors must be an integer of at least 1, got 0"),
        (lambda: select_anchors(P, P, D, n_anchors=6), "n_anchors must be at most the 5 rows of x_train, got 6"),
        (lambda: select_anchors(P, P, D, radius=0.0), "radius must be greater than 0, got 0.0"),
        (lambda: select_anchors(P, P, D, chunk_size=0), "chunk_size must be an integer of at least 1, got 0"),
        (lambda: select_anchors(P, P, D, groups=[1] * 5), "groups and groups_train must both be given"),
        (lambda: select_anchors(P, P, D, groups=[1] * 4, groups_train=[1] * 5), "groups must have a label for each of 5"),
        (lambda: select_anchors(P, P, D, groups=[2] * 5, groups_train=[1] * 5), "groups must be among those of training, got"),
        (lambda: select_anchors(P, P, D, n_anchors=3, groups=[1] * 5, groups_train=[1, 1, 2, 2, 2]), "at most the 2 rows of group"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embed": 0}, "n_embed must be an integer of at least 1, got 0"),
        ({"hidden": (0,)}, "hidden must be an integer of at least 1, got 0"),
        ({"hidden": None}, "hidden must be a sequence of widths, got None"),
        ({"pairing": "all"}, "pairing must be one of 'uniform', 'groups', 'learned', got 'all'"),
        ({"loss": "l1"}, "loss must be one of"),
        ({"schedule": None}, "schedule must be one of"),
        ({"n_steps": 0}, "n_steps must be an integer of at least 1"),
        ({"batch_size": 0.5}, "batch_size must be an integer of at least 1"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"n_deltas": 0}, "n_deltas must be an integer of at least 1"),
        ({"n_anchors": 0}, "n_anchors must be an integer of at least 1"),
        ({"n_anchors": 121}, "n_anchors must be at most the 120 training rows, got 121"),
        ({"radius": 0}, "radius must be greater than 0"),
        ({"radius": 1.0, "pairing": "learned"}, 'radius must be None with pairing="learned", got 1.0'),
        ({"device": "nowhere"}, "device must be one that torch has here, got 'nowhere'"),
        ({"pairing": "groups"}, "groups must have a label for each row"),
        ({"lr": 1e200}, r"the loss is (nan|inf) after \d+ steps: lower lr=1e\+200"),
    ],
)  # fmt: skip
def test_refuses_bad_parameters_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        fitted(**options).fit(X, Y)


def test_refuses_data_that_do_not_fit(as_a_user):
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        fitted().fit(X[:1], Y[:1])
    with pytest.raises(ValueError, match="y contains NaN"):
        fitted().fit(X, np.where(Y > 2, np.nan, Y))
    model = fitted(n_steps=1).fit(X, Y)
    with pytest.raises(ValueError, match="3 features"):
        model.predict(np.ones((2, 3)))
    with pytest.raises(ValueError, match="groups may be given where fit had them"):
        model.predict(X[:2], groups=[1, 2])
    with pytest.raises(ValueError, match="groups must be None but with pairing"):
        fitted().fit(X, Y, groups=np.ones(120))
    with pytest.raises(ValueError, match=r"groups must have a label for each of 120 rows, got shape \(3,\)"):
        fitted(pairing="groups").fit(X, Y, groups=[1, 2, 3])
    model = fitted(pairing="groups", n_steps=1).fit(X, Y, groups=np.arange(120) % 2)
    with pytest.raises(ValueError, match="groups must be among those of training, got"):
        model.anchors(X[:2], groups=[0, 2])
    with pytest.raises(ValueError, match=r"groups must have a label for each of 2 rows, got shape \(1,\)"):
        model.predict(X[:2], groups=[0])
