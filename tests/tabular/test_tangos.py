"""TANGOS against exact gradients, every pair of units, and a training loop written out."""

import copy
import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from torch import nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

from posterity.tabular import (
    TangosClassifier,
    TangosPenalty,
    TangosRegressor,
    TangosTerms,
    latent_attributions,
    tangos_terms,
)
from posterity.testing import check_estimator, check_loss
from posterity.testing._low_precision import check_low_precision


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*layers, seed=0):
    """Return a Sequential in float64 whose weights a seed decides."""
    net = nn.Sequential(*layers).double()
    for number, parameter in enumerate(net.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + 100 * number) / 2
    return net


def exact(latent, x):
    return vmap(jacrev(lambda row: latent(row[None])[0]))(x).flatten(2)


def plain_terms(a):
    """Return both terms by loops over rows and pairs."""
    total, pairs = 0.0, list(itertools.combinations(range(a.shape[1]), 2))
    for row in a:
        for i, j in pairs:
            total = total + (row[i] @ row[j]).abs() / (row[i].norm() * row[j].norm()).clamp_min(1e-12)
    return a.abs().mean(), total / (len(a) * len(pairs))


PIECEWISE = {
    "relu": lambda: network(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()),
    "leaky and nested": lambda: network(
        nn.Sequential(nn.Linear(4, 7), nn.LeakyReLU(0.2)), nn.Identity(), nn.Linear(7, 5, bias=False)
    ),
    "three layers": lambda: network(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 5), nn.LeakyReLU()
    ),
    "slopes below": lambda: network(nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.LeakyReLU(0.5)),
    "dropout": lambda: network(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 5), nn.Dropout(0.4)),
}


@pytest.mark.parametrize("make", PIECEWISE.values(), ids=PIECEWISE)
def test_the_closed_form_is_the_batched_gradient_and_so_are_its_gradients(make):
    net, x, probe = make(), draw(9, 4), draw(9, 5, 4, seed=1)
    weights = [p for name, p in net.named_parameters() if "weight" in name]
    results = []
    for latent in (net, lambda x: net(x)):  # a function hides the layers: no closed form
        torch.manual_seed(3)  # one dropout mask for both routes
        a = latent_attributions(latent, x)
        results.append((a, *torch.autograd.grad((a * probe).sum(), weights)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert (results[0][0] != 0).any()
    net.eval()
    torch.testing.assert_close(latent_attributions(net, x), exact(net, x), rtol=0, atol=1e-12)


def test_layers_that_only_look_linear_take_the_general_route():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = network(nn.Linear(4, 5), nn.ReLU())
    hooked[0].register_forward_hook(lambda module, args, out: 3 * out)
    spectral = network(nn.Linear(4, 5))
    nn.utils.parametrizations.weight_norm(spectral[0])
    for net in (network(Twice(4, 5), nn.ReLU()), hooked, spectral.eval()):
        x = draw(6, 4)
        torch.testing.assert_close(latent_attributions(net, x), exact(net, x), rtol=0, atol=1e-12)


def test_a_smooth_network_agrees_with_central_differences():
    net, x, step = network(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh()), draw(5, 4), 1e-5
    a = latent_attributions(net, x)
    for j in range(4):
        move = step * torch.eye(4, dtype=torch.float64)[j]
        slope = (net(x + move) - net(x - move)) / (2 * step)
        torch.testing.assert_close(a[:, :, j], slope, rtol=0, atol=1e-6)
    torch.testing.assert_close(a, exact(net, x), rtol=0, atol=1e-12)


def test_images_flatten_and_rows_that_share_statistics_give_the_gradient_of_a_sum():
    image = network(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten())
    x = draw(4, 2, 3, 3)
    torch.testing.assert_close(latent_attributions(image, x), exact(image, x), rtol=0, atol=1e-12)
    norm, x = network(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).train(), draw(6, 4)
    full = torch.autograd.functional.jacobian(lambda x: norm(x).sum(0), x)  # (units, n, d)
    torch.testing.assert_close(latent_attributions(norm, x), full.movedim(1, 0), rtol=0, atol=1e-12)


def test_without_a_graph_the_values_are_the_same():
    for net in (PIECEWISE["relu"](), network(nn.Linear(4, 3), nn.Tanh())):
        with torch.no_grad():
            a = latent_attributions(net, draw(5, 4), create_graph=False)
        assert not a.requires_grad
        torch.testing.assert_close(a, latent_attributions(net, draw(5, 4)).detach())


def test_a_linear_latent_has_its_weights_for_attributions():
    net, x = network(nn.Linear(4, 3)), draw(7, 4)
    weight = net[0].weight
    torch.testing.assert_close(latent_attributions(net, x), weight.expand(7, 3, 4))
    torch.testing.assert_close(tangos_terms(net, x).specialization, weight.abs().mean())
    weight.data = torch.tensor([[1.0, 2, 0, 0], [0, 0, -3, 0], [0, 0, 0, 5]], dtype=torch.float64)
    assert tangos_terms(net, x).orthogonalization == 0
    weight.data = draw(1, 4).repeat(3, 1)
    torch.testing.assert_close(float(tangos_terms(net, x).orthogonalization.detach()), 1.0)
    weight.data = draw(3, 4, seed=5)
    before = tangos_terms(net, x)
    weight.data[1] *= -7
    after = tangos_terms(net, x)
    torch.testing.assert_close(after.orthogonalization, before.orthogonalization)
    assert after.specialization > 1.5 * before.specialization


@pytest.mark.parametrize("make", [PIECEWISE["relu"], lambda: network(nn.Linear(4, 5), nn.Tanh())])
def test_the_terms_are_the_means_over_rows_units_inputs_and_pairs(make):
    net, x = make(), draw(8, 4)
    torch.testing.assert_close(tuple(tangos_terms(net, x)), plain_terms(latent_attributions(net, x)))


def test_drawn_pairs_are_uniform_and_all_pairs_draw_nothing():
    net, x = network(nn.Linear(4, 5), nn.Tanh()), draw(6, 4)
    every = tangos_terms(net, x)
    generator = torch.Generator().manual_seed(0)
    sample = torch.stack(
        [tangos_terms(net, x, n_pairs=9, generator=generator).orthogonalization for _ in range(250)]
    )
    assert abs(sample.mean() - every.orthogonalization) < 5 * sample.std() / len(sample) ** 0.5
    state = generator.get_state()
    for n_pairs in (10, 11, None):
        assert tangos_terms(net, x, n_pairs=n_pairs, generator=generator) == every
    assert torch.equal(generator.get_state(), state)
    single = {
        round(float(tangos_terms(net, x, n_pairs=1, generator=generator)[1].detach()), 10) for _ in range(100)
    }
    cosine = F.cosine_similarity(*latent_attributions(net, x)[:, list(zip(*itertools.combinations(range(5), 2), strict=True))].unbind(1), dim=-1)  # fmt: skip
    assert single == {round(float(pair), 10) for pair in cosine.abs().mean(0).detach()}


def test_one_unit_is_orthogonal_and_a_dead_one_has_a_finite_gradient():
    assert tangos_terms(network(nn.Linear(4, 1)), draw(3, 4)).orthogonalization == 0
    net = network(nn.Linear(4, 3), nn.ReLU())
    net[0].bias.data[:2] = -1e3  # two of three units dead
    for latent in (net, lambda x: net(x)):
        penalty = TangosPenalty(1.0, 1.0, None)(latent, draw(1, 4))
        (grad,) = torch.autograd.grad(penalty, net[0].weight)
        assert torch.isfinite(grad).all()
        assert tangos_terms(latent, draw(5, 4)).orthogonalization == 0


def test_permuting_features_changes_nothing():
    net, x, order = PIECEWISE["relu"](), draw(8, 4), [2, 0, 3, 1]
    moved = copy.deepcopy(net)
    moved[0].weight.data = net[0].weight.data[:, order]
    torch.testing.assert_close(tuple(tangos_terms(net, x)), tuple(tangos_terms(moved, x[:, order])))


def smooth(x):  # far from where tanh is flat: the slope there is a difference that rounding takes
    return torch.tanh(torch.tanh(x @ draw(4, 6).to(x) / 4) @ draw(6, 5, seed=1).to(x))


@pytest.mark.parametrize("lambdas", [(10.0, 0.1), (0.0, 1.0)])
def test_the_penalty_conforms_to_its_kind(as_a_user, lambdas):
    check_loss(TangosPenalty(*lambdas, None), smooth, draw(6, 4).requires_grad_(), symmetric=True)


@pytest.mark.parametrize("name", PIECEWISE)
def test_products_of_narrow_weights_are_made_in_single_precision(as_a_user, name):
    net, x = PIECEWISE[name]().eval(), draw(300, 4)
    check_low_precision(lambda net, x: latent_attributions(net, x), net, (x,), slack=2)
    check_low_precision(lambda net, x: tuple(tangos_terms(net, x)), net, (x,), slack=2)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_cosines_know_no_unit_of_inputs(unit):
    net, x = PIECEWISE["relu"](), draw(8, 4)
    for n_pairs in (None, 7):
        terms = [
            tangos_terms(lambda x, by=by: net(by * x), x / by, n_pairs=n_pairs,
                         generator=torch.Generator().manual_seed(0))
            for by in (1.0, unit)
        ]  # fmt: skip
        torch.testing.assert_close(terms[1].orthogonalization, terms[0].orthogonalization)
        torch.testing.assert_close(terms[1].specialization / unit, terms[0].specialization)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_terms_can_be_read_inside_modes_without_gradients(as_a_user, mode):
    for latent in (PIECEWISE["relu"](), smooth):
        expected = tangos_terms(latent, draw(8, 4))
        with mode():
            torch.testing.assert_close(tuple(tangos_terms(latent, draw(8, 4))), tuple(expected))


def test_the_penalty_passes_gradcheck_in_the_weights():
    def penalty(first, second):
        return TangosPenalty(3.0, 0.7, None)(lambda x: torch.tanh(torch.tanh(x @ first) @ second), draw(3, 4))

    weights = draw(4, 5).requires_grad_(), draw(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(penalty, weights)


def test_the_penalty_weighs_the_terms_and_pairs_come_from_the_generator():
    net, x = network(nn.Linear(4, 9), nn.Tanh()), draw(6, 4)
    terms = tangos_terms(net, x, n_pairs=4, generator=torch.Generator().manual_seed(2))
    value = TangosPenalty(3.0, 0.5, 4)(net, x, generator=torch.Generator().manual_seed(2))
    assert isinstance(terms, TangosTerms)
    torch.testing.assert_close(value, 3 * terms.specialization + 0.5 * terms.orthogonalization)


# the estimators

X = draw(150, 8).numpy()
Y = 3 * X[:, 0] - 2 * X[:, 1] + 0.3 * draw(150, seed=9).numpy()
ROWS, VALUES = X[:50], Y[:50]


@pytest.mark.parametrize("kind", [TangosRegressor, TangosClassifier])
def test_estimators_conform_to_their_kind(as_a_user, kind):
    reason = "split and batches are drawn at random: a weight of 2 and a row that stands twice agree in law"
    failures = {"check_sample_weight_equivalence_on_dense_data": reason}
    quick = {"lr": 0.1, "max_epochs": 2, "batch_size": 128, "random_state": 0}
    invariant = ["shift X", "scale X"] + ["shift y", "scale y"] * (kind is TangosRegressor)
    check_estimator(kind([16], lambda_spec=0.1, **quick), expected_failures=failures, invariant=invariant)


@pytest.mark.parametrize("lambdas", [(0.0, 0.0), (2.0, 0.5)])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_fit_is_the_training_loop_that_the_paper_describes(lambdas, task):
    """Whole-batch Adam from the same start: vmap(jacrev) after one epoch, the best weights kept."""
    options = {"hidden": [7, 5], "batch_size": 200, "random_state": 4, "n_pairs": None, "warmup_epochs": 1}
    X, Y = ROWS, VALUES
    kind, target = (TangosRegressor, Y) if task == "regression" else (TangosClassifier, (Y > 0).astype(int))
    start = kind(**options, lr=1e-40, max_epochs=1).fit(X, target)  # a step too small to move a weight
    net, head = start.net_, start.head_
    fitted = kind(
        **options, lr=1e-2, max_epochs=4, lambda_spec=lambdas[0], lambda_orth=lambdas[1], weight_decay=0.01
    ).fit(X, target)

    stratify = None if task == "regression" else target
    rows, held = train_test_split(
        np.arange(50), test_size=10, stratify=stratify, random_state=check_random_state(4)
    )
    x = torch.from_numpy((X - X[rows].mean(0)) / X[rows].std(0))
    if task == "regression":
        y, criterion = (
            torch.from_numpy((target - target[rows].mean()) / target[rows].std())[:, None],
            F.mse_loss,
        )
    else:
        y, criterion = torch.from_numpy(target), F.cross_entropy
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.01)
    validation, weights = [], []
    for epoch in range(4):
        loss = criterion(head(net(x[rows])), y[rows])
        if epoch >= 1 and lambdas[0]:
            specialization, orthogonalization = plain_terms(exact(net, x[rows]))
            loss = loss + lambdas[0] * specialization + lambdas[1] * orthogonalization
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        validation.append(criterion(head(net(x[held])), y[held]).item())
        weights.append([parameter.detach().clone() for parameter in net.parameters()])
    np.testing.assert_allclose(fitted.history_["validation_loss"], validation, atol=1e-9)
    for mine, theirs in zip(fitted.net_.parameters(), weights[np.argmin(validation)], strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=1e-9)


def test_without_lambdas_it_is_bit_for_bit_the_plain_network():
    options = {"max_epochs": 8, "random_state": 0, "dropout": 0.2, "hidden": [12, 12]}
    plain, waiting, penalised = (
        TangosRegressor(**options, **more).fit(X, Y)
        for more in ({"lambda_spec": 0, "lambda_orth": 0}, {"warmup_epochs": 8}, {"lambda_spec": 1.0})
    )
    assert np.array_equal(plain.predict(X), waiting.predict(X))
    assert plain.history_["validation_loss"] == waiting.history_["validation_loss"]
    assert plain.history_["validation_loss"][:3] == penalised.history_["validation_loss"][:3]  # the warm-up's
    assert plain.history_["validation_loss"][3] != penalised.history_["validation_loss"][3]
    assert np.isnan(plain.history_["specialization"]).all()
    assert np.isfinite(penalised.history_["specialization"][3:]).all()


def test_the_penalty_does_what_it_is_for():
    options = {"max_epochs": 20, "random_state": 0, "n_pairs": None, "lr": 1e-2}
    plain = TangosRegressor(lambda_spec=0, lambda_orth=0, **options).fit(X, Y)
    fewer = TangosRegressor(lambda_spec=10, lambda_orth=0, **options).fit(X, Y)
    apart = TangosRegressor(lambda_spec=0, lambda_orth=1, **options).fit(X, Y)
    a, b, c = (
        [float(term) for term in plain_terms(torch.from_numpy(model.attributions(X[:40])))]
        for model in (plain, fewer, apart)
    )
    assert b[0] < 0.7 * a[0]
    assert c[1] < 0.7 * a[1]


def test_attributions_are_slopes_in_standardised_inputs():
    model = TangosRegressor(max_epochs=5, random_state=0).fit(X, Y)
    a = model.attributions(X[:6])
    assert a.shape == (6, 9, 8)
    assert a.dtype == np.float64
    step = 1e-6 * model.scaler_.scale_[2] * np.eye(8)[2]  # a millionth of a standard deviation
    with torch.no_grad():
        up, down = (model.net_(torch.from_numpy(model.scaler_.transform(X[:6] + s))) for s in (step, -step))
    np.testing.assert_allclose(a[:, :, 2], (up - down) / 2e-6, atol=1e-7)


def test_it_finds_the_two_columns_that_count():
    model = TangosRegressor(random_state=0, lr=2e-2, max_epochs=25).fit(X[:100], Y[:100])
    assert model.score(X[100:], Y[100:]) > 0.8
    both = np.column_stack([Y, 100 - 50 * Y])
    model = TangosRegressor(lambda_spec=1.0, lr=2e-2, max_epochs=15, random_state=0).fit(X, both)
    assert model.predict(X).shape == (150, 2)
    assert model.score(X, both) > 0.8


def test_the_best_weights_are_kept_and_patience_ends_the_run():
    noise = draw(150, seed=77).numpy()
    model = TangosRegressor(
        lambda_spec=0, lambda_orth=0, lr=1e-2, patience=5, max_epochs=200, random_state=0
    ).fit(X, noise)
    losses = model.history_["validation_loss"]
    assert model.n_iter_ == len(losses) == model.best_epoch_ + 6 < 200
    assert np.argmin(losses) == model.best_epoch_
    _, held = train_test_split(np.arange(150), test_size=30, random_state=check_random_state(0))
    scaled = (model.predict(X) - noise) / model.target_scaler_.scale_
    assert np.mean(scaled[held] ** 2) == pytest.approx(min(losses))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_seed_same_predictions_and_pickles_and_dtypes(dtype):
    labels = np.array(["low", "high"])[(Y > 0).astype(int)]
    models = [TangosClassifier(max_epochs=5, random_state=3).fit(X.astype(dtype), labels) for _ in range(2)]
    models.append(pickle.loads(pickle.dumps(models[0])))
    shares = [model.predict_proba(X.astype(dtype)) for model in models]
    assert shares[0].dtype == dtype
    np.testing.assert_array_equal(shares[0], shares[1])
    np.testing.assert_array_equal(shares[0], shares[2])
    np.testing.assert_allclose(shares[0].sum(1), 1, rtol=1e-5)
    assert list(models[0].classes_) == ["high", "low"]
    assert np.array_equal(models[0].predict(X), models[0].classes_[shares[0].argmax(1)])
    other = TangosClassifier(max_epochs=5, random_state=4).fit(X.astype(dtype), labels)
    assert not np.array_equal(other.predict_proba(X), shares[0])


def test_fitting_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    TangosRegressor(max_epochs=4, dropout=0.3, random_state=0).fit(X, Y)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_of_weight_zero_are_not_there_and_only_ratios_of_weights_count():
    options = {"max_epochs": 6, "random_state": 0}
    weight = np.r_[np.ones(100), np.zeros(50)]
    dirty = np.r_[Y[:100], np.full(50, 1e6)]
    fits = [TangosRegressor(**options).fit(X, dirty, weight), TangosRegressor(**options).fit(X, dirty, 8 * weight),
            TangosRegressor(**options).fit(X[:100], Y[:100])]  # fmt: skip
    for fit in fits[1:]:
        np.testing.assert_array_equal(fit.predict(X), fits[0].predict(X))
    heavy = np.where(Y > 0, 50.0, 1.0)
    shares = [
        TangosClassifier(max_epochs=10, random_state=0, lr=2e-2, lambda_spec=0)
        .fit(0 * X, (Y > 0).astype(int), w)
        .predict_proba(X)
        for w in (None, heavy)
    ]
    assert shares[1][0, 1] > shares[0][0, 1] + 0.2


def test_tiny_and_lopsided_tables_are_fitted():
    assert TangosRegressor(max_epochs=2).fit(X[:2], Y[:2]).predict(X).shape == (150,)
    labels = np.r_[np.zeros(20), np.ones(1)]  # a class of one cannot be stratified
    assert TangosClassifier(max_epochs=2).fit(X[:21], labels).predict_proba(X).shape == (150, 2)
    many = np.arange(20) // 2  # ten classes and four rows held out
    assert TangosClassifier(max_epochs=2).fit(X[:20], many).predict_proba(X).shape == (150, 10)
    constant = TangosRegressor(max_epochs=2).fit(np.ones((20, 3)), np.full(20, 4.0))
    np.testing.assert_allclose(constant.predict(np.ones((1, 3))), 4, atol=1)


def test_three_classes_of_wine_are_told_apart():
    data, labels = load_wine(return_X_y=True)
    model = TangosClassifier(max_epochs=12, lr=1e-2, lambda_spec=0, lambda_orth=0, random_state=0).fit(
        data, labels
    )
    assert model.score(data, labels) > 0.95


LATENT = nn.Sequential(nn.Linear(3, 4), nn.ReLU())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent_attributions(lambda x: x.sum(1), torch.ones(5, 3)), r"latent\(x\) must be \(5, units\), got \(5,\)"),
        (lambda: latent_attributions(lambda x: x[:2], torch.ones(5, 3)), r"must be \(5, units\), got \(2, 3\)"),
        (lambda: latent_attributions(lambda x: x.detach(), torch.ones(5, 3)), "depend on x"),
        (lambda: latent_attributions(LATENT, torch.ones(5, 3).long()), "x must be a floating-point tensor, got dtype torch.int64"),
        (lambda: latent_attributions(LATENT, torch.ones(0, 3)), r"x must be \(n, ...\) with n and all sizes of at least 1, got \(0, 3\)"),
        (lambda: latent_attributions(LATENT, torch.ones(3)), r"x must be \(n, ...\)"),
        (lambda: TangosPenalty(-1.0), "lambda_spec must be at least 0, got -1.0"),
        (lambda: TangosPenalty(1.0, -0.1), "lambda_orth must be at least 0, got -0.1"),
        (lambda: TangosPenalty(n_pairs=0), "n_pairs must be an integer of at least 1, got 0"),
        (lambda: tangos_terms(LATENT, torch.ones(5, 3), n_pairs=0), "n_pairs must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_spec": -1}, "lambda_spec must be at least 0, got -1"),
        ({"lambda_orth": float("nan")}, "lambda_orth must be at least 0, got nan"),
        ({"n_pairs": 0}, "n_pairs must be an integer of at least 1"),
        ({"validation_fraction": 0.0}, r"validation_fraction must be in \(0, 1\), got 0.0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \(0, 1\), got 1.0"),
        ({"hidden": []}, r"hidden must be a sequence of at least one width, got \[\]"),
        ({"hidden": [8, 0]}, "hidden must be an integer of at least 1, got 0"),
        ({"hidden": 8}, "hidden must be a sequence of at least one width, got 8"),
        ({"max_epochs": 0}, "max_epochs must be an integer of at least 1, got 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be an integer of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be"), ({"patience": 0}, "patience must be"),
        ({"lr": 0.0}, "lr must be greater than 0"), ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
    ],
)  # fmt: skip
def test_refuses_bad_parameters_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        TangosRegressor(**options).fit(X, Y)


FRAME = pd.DataFrame({"age": [20.0, 30, 40, 50], "city": ["a", "b", "a", "b"]})


@pytest.mark.parametrize(
    ("table", "y", "message"),
    [
        (FRAME, range(4), "column 'city' of X is not numeric: one-hot encode.*make_pipeline"),
        (FRAME.assign(city=[1, 2, np.nan, 4]), range(4), "NaN.*column 'city' of X has NaN or infinity"),
        (FRAME.assign(city=1.0, age=[1, np.inf, 2, 3]), range(4), "infinity.*column 'age' of X"),
        (FRAME.to_numpy(), range(4), "could not convert string to float.*one-hot"),
        (X, np.where(Y > 1, np.nan, Y), "y contains NaN"),
        (X[:1], Y[:1], "minimum of 2 is required"),
    ],
)  # fmt: skip
def test_refuses_data_that_are_no_numbers_and_names_the_column(as_a_user, table, y, message):
    with pytest.raises(ValueError, match=message):
        TangosRegressor(max_epochs=1).fit(table, y)


def test_refuses_one_class_other_columns_bad_weights_and_a_loss_that_explodes(as_a_user):
    with pytest.raises(ValueError, match="y must have at least 2 classes, got only"):
        TangosClassifier(max_epochs=1).fit(X, np.ones(150))
    frame = pd.DataFrame(X, columns=list("abcdefgh"))
    model = TangosRegressor(max_epochs=1).fit(frame, Y)
    assert list(model.feature_names_in_) == list("abcdefgh")
    with pytest.raises(ValueError, match=r"(?s)feature names.*Feature names unseen at fit time:\n- i"):
        model.predict(frame.rename(columns={"a": "i"}))
    with pytest.raises(ValueError, match="7 features"):
        TangosRegressor(max_epochs=1).fit(X, Y).predict(X[:, :7])
    with pytest.raises(ValueError, match="sample_weight must be positive for at least 2 rows, got 1"):
        TangosRegressor().fit(X, Y, np.eye(150)[0])
    with pytest.raises(ValueError, match=r"(?i)negative values in .*sample_weight"):
        TangosRegressor().fit(X, Y, -np.ones(150))
    with pytest.raises(ValueError, match=r"validation loss is (nan|inf) in epoch \d+: lower lr=1e\+200"):
        TangosRegressor(lr=1e200).fit(X, Y)
