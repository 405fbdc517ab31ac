"""Ensembles against plain descent, the parts of their error against loops, onsets and polynomials against closed forms."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from posterity.dynamics import (
    NTKMLP,
    PowerLaw,
    initialization_variance,
    onset_exponent,
    sphere_polynomial,
    train_ensemble,
    variance_onset,
)
from posterity.testing import check_instrument


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


X, Y, X_TEST = randn(6, 4), randn(6, 2, seed=1), randn(3, 4, seed=2)


class Mixed(nn.Module):
    """A tied matrix, a frozen one, and running statistics."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.c.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.norm.register_buffer("running_var", torch.full((4,), 2.0))

    def forward(self, x):
        return self.c(self.norm(self.b(self.a(x).tanh())))


KINDS = {
    "row of layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
    "NTKMLP": lambda: NTKMLP(4, 8, out_features=2),
    "mixed": Mixed,
}


def maker(kind):
    return lambda seed: seeded(KINDS[kind], seed)


def by_hand(model, lr, steps, momentum, scale, center):
    """One network, torch.optim.SGD."""
    model = copy.deepcopy(model).eval()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)
    first, first_test = (model(x).detach() if center else 0.0 for x in (X, X_TEST))
    for _ in range(steps):
        sgd.zero_grad()
        (scale * (model(X) - first) - Y).square().mean().backward()
        sgd.step()
    loss = (scale * (model(X) - first) - Y).square().mean()
    return scale * (model(X_TEST) - first_test).detach(), loss.detach(), model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectorize", [True, False])
def test_each_member_is_trained_as_by_torch_alone(kind, vectorize):
    make = maker(kind)
    for momentum, scale, center in ((0.0, 1.0, True), (0.7, 2.5, False)):
        found = train_ensemble(make, X, Y, X_TEST, n_models=3, lr=0.02, n_steps=15, tol=0.0, momentum=momentum,
                               output_scale=scale, center=center, vectorize=vectorize)  # fmt: skip
        assert found.n_steps.tolist() == [15] * 3
        for seed in range(3):
            predictions, loss, model = by_hand(make(seed), 0.02, 15, momentum, scale, center)
            torch.testing.assert_close(found.predictions[seed], predictions, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(found.train_loss[seed], loss, rtol=1e-8, atol=1e-8)
            for name, p in model.named_parameters():
                if p.requires_grad:
                    torch.testing.assert_close(found.params[name][seed], p.detach(), rtol=1e-8, atol=1e-8)
            start = dict(make(seed).named_parameters())
            assert all(torch.equal(p[seed], start[name]) for name, p in found.params0.items())


@pytest.mark.parametrize("kind", ["NTKMLP", "mixed"])
def test_a_member_depends_on_no_other_and_stops_when_it_has_converged(kind):
    lr, tol = (None, 0.1) if kind == "NTKMLP" else (0.1, 0.3)
    options = {"lr": lr, "n_steps": 100, "tol": tol}
    together = train_ensemble(maker(kind), X, Y, X_TEST, n_models=3, **options)
    assert together.n_steps.unique().numel() > 1, "they stop at different steps"
    assert torch.equal(together.converged, together.train_loss < tol)
    for seed in range(3):
        alone = train_ensemble(lambda _, seed=seed: maker(kind)(seed), X, Y, X_TEST, n_models=1, **options)
        assert alone.n_steps[0] == together.n_steps[seed]
        torch.testing.assert_close(alone.predictions[0], together.predictions[seed], rtol=1e-8, atol=1e-8)
    looped = train_ensemble(maker(kind), X, Y, X_TEST, n_models=3, vectorize=False, **options)
    torch.testing.assert_close(looped.predictions, together.predictions, rtol=1e-8, atol=1e-8)
    assert torch.equal(looped.n_steps, together.n_steps)


def test_who_is_content_does_not_move():
    found = train_ensemble(maker("mixed"), X, Y, X_TEST, n_models=2, lr=0.1, tol=1e9)
    assert found.n_steps.tolist() == [0, 0]
    assert not found.predictions.any()
    assert all(torch.equal(p, found.params0[name]) for name, p in found.params.items())


def test_the_default_rate_is_that_of_the_official_code_and_halved_where_it_is_too_high():
    def make(seed):
        return seeded(lambda: NTKMLP(4, 16, depth=4, out_features=2, alpha=0.5), seed)

    lr = 4 / (0.09 + 10 / 16 + 0.25 * 4)  # alpha times the output scale is 1
    found = train_ensemble(make, X / 4, Y, X_TEST, n_models=2, n_steps=5, tol=0.0, output_scale=2.0)
    given = train_ensemble(make, X / 4, Y, X_TEST, n_models=2, n_steps=5, tol=0.0, output_scale=2.0, lr=lr)
    torch.testing.assert_close(found.predictions, given.predictions)
    with pytest.raises(ValueError, match=r"lr must be lower than .*: training diverged at step"):
        train_ensemble(make, 20 * X, Y, X_TEST, n_models=2, lr=lr, n_steps=200)
    start = Y.square().mean()
    found = train_ensemble(make, 20 * X, Y, X_TEST, n_models=2, n_steps=200)
    assert (found.train_loss < start / 2).all()


def test_models_that_are_handed_out_stay_as_they_are():
    net = seeded(Mixed).train()
    before = copy.deepcopy(net.state_dict())

    def drawn_anew(seed):
        with torch.no_grad():
            for p, value in zip(net.parameters(), seeded(Mixed, seed).parameters(), strict=True):
                p.copy_(value)
        return net

    found = train_ensemble(drawn_anew, X, Y, X_TEST, n_models=3, lr=0.02, n_steps=15, tol=0.0)
    expected = train_ensemble(maker("mixed"), X, Y, X_TEST, n_models=3, lr=0.02, n_steps=15, tol=0.0)
    torch.testing.assert_close(found.predictions, expected.predictions)
    assert all(module.training for module in net.modules())
    drawn_anew(0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_conforms_to_its_kind(as_a_user, kind):
    def look(model, x, y, x_test):
        found = train_ensemble(lambda _: model, x, y, x_test, n_models=2, lr=0.01, n_steps=3)
        return (
            found.predictions,
            found.train_loss,
            found.params["c.weight"] if kind == "mixed" else found.n_steps,
        )

    check_instrument(look, seeded(KINDS[kind]).float(), X.float(), Y.float(), X_TEST.float())


# Parts of the error.


def test_the_parts_are_those_of_loops():
    f, y = randn(5, 7, 2) + 0.5, randn(7, 2, seed=1)
    found = initialization_variance(f, y)
    single = np.mean([[(f[e, i, a] - y[i, a]) ** 2 for i in range(7) for a in range(2)] for e in range(5)])
    spread = np.mean(
        [np.var([float(f[e, i, a]) for e in range(5)], ddof=1) for i in range(7) for a in range(2)]
    )
    average = np.mean([(f[:, i, a].mean() - y[i, a]) ** 2 for i in range(7) for a in range(2)])
    for got, expected in (
        (found.error, single), (found.variance, spread), (found.ensemble_error, average),
        (found.infinite_ensemble_error, single - spread), (found.fraction, spread / single),
        (found.ensemble(1), single), (found.ensemble(5), average),
    ):  # fmt: skip
        np.testing.assert_allclose(float(got), expected, rtol=0, atol=1e-12)
    assert found.n_models == 5


def test_the_error_of_averages_of_pairs_is_on_average_that_of_an_ensemble_of_two():
    f, y = randn(5, 7, 1), randn(7, 1, seed=1)
    pairs = [((f[i] + f[j]) / 2 - y).square().mean() for i in range(5) for j in range(i)]
    torch.testing.assert_close(initialization_variance(f, y).ensemble(2), torch.stack(pairs).mean())


def test_equal_members_have_no_variance_and_no_error_has_no_share():
    f = randn(1, 7, 2).expand(4, 7, 2)
    found = initialization_variance(f, randn(7, 2, seed=1))
    assert found.variance == found.fraction == 0
    assert initialization_variance(f, f[0]).fraction == 0


def test_chance_does_not_carry_the_share_beyond_one():
    found = initialization_variance(torch.tensor([[[-1.0]], [[1.0]]]), torch.zeros(1, 1))
    assert found.variance == 2 * found.error
    assert found.infinite_ensemble_error < 0
    assert found.fraction == 1


def test_parts_conform_to_their_kind(as_a_user):
    check_instrument(
        lambda _, f, y: initialization_variance(f, y), nn.Linear(1, 1), randn(3, 6, 2).float(), Y.float()
    )


def test_far_values_do_not_lose_their_variance():
    y = torch.full((4, 1), 1000.0)
    f = y + torch.tensor([0.0, 0.25])[:, None, None]
    assert initialization_variance(f, y).variance == 0.03125


# Onsets.


def test_the_onset_is_at_the_crossing():
    shares = [0.1, 0.3, 0.7, 0.9]
    assert variance_onset([10, 20, 40, 80], shares) == pytest.approx(20 * math.sqrt(2), rel=1e-12)
    assert variance_onset([10, 20, 40, 80], shares, threshold=0.7) == pytest.approx(40)
    assert variance_onset([10, 20, 40], list(torch.tensor([0.1, 0.9, 0.2]))) == pytest.approx(
        10 * math.sqrt(2)
    )
    assert variance_onset([10, 20], [0.5, 0.4]) == 10
    assert math.isnan(variance_onset([10, 20], [0.1, 0.4]))


def test_exact_powers_are_found_and_onsets_that_were_not_reached_do_not_count():
    widths = [16, 32, 64, 128]
    law = onset_exponent(widths, [3 * n**0.7 for n in widths])
    assert (law.exponent, law.prefactor, law.r2) == pytest.approx((0.7, 3.0, 1.0))
    assert law.stderr < 1e-6
    assert onset_exponent([16, 32, 64], [4, math.nan, 8]).exponent == pytest.approx(0.5)
    assert math.isnan(onset_exponent([16, 64], [4, 8]).stderr)
    flat = onset_exponent([16, 32, 64], [4, 4, 4])
    assert flat.exponent == 0
    assert math.isnan(flat.r2)


def test_the_line_is_that_of_numpy():
    x, y = [2, 3, 7, 20], [1.0, 5.0, 4.0, 9.0]
    law = onset_exponent(x, y)
    (slope, intercept), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert isinstance(law, PowerLaw)
    assert (law.exponent, math.log(law.prefactor)) == pytest.approx((slope, intercept))
    assert law.stderr == pytest.approx(math.sqrt(covariance[0, 0]))
    assert law.r2 == pytest.approx(np.corrcoef(np.log(x), np.log(y))[0, 1] ** 2)


@pytest.mark.parametrize(("dim", "degree"), [(2, 3), (3, 2), (6, 0), (6, 2), (10, 4)])
def test_the_polynomial_is_gegenbauers_and_has_mean_square_one(dim, degree):
    beta = randn(dim)
    x, y = sphere_polynomial(50, dim, degree, direction=7 * beta, generator=torch.Generator().manual_seed(0))
    t = (x @ beta / beta.norm()).numpy()
    harmonics = math.comb(dim + degree - 1, degree) - (
        math.comb(dim + degree - 3, degree - 2) if degree > 1 else 0
    )
    if dim == 2:
        shape = special.eval_chebyt(degree, t)
    else:
        order = dim / 2 - 1
        shape = special.eval_gegenbauer(degree, order, t) / special.eval_gegenbauer(degree, order, 1.0)
    np.testing.assert_allclose(y[:, 0], math.sqrt(harmonics) * shape, atol=1e-10)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(50).double())
    nodes, weights = special.roots_jacobi(40, (dim - 3) / 2, (dim - 3) / 2)  # the first coordinate's law
    line = special.eval_chebyt(degree, nodes) if dim == 2 else (
        special.eval_gegenbauer(degree, dim / 2 - 1, nodes) / special.eval_gegenbauer(degree, dim / 2 - 1, 1.0)
    )  # fmt: skip
    assert harmonics * (weights @ line**2) / weights.sum() == pytest.approx(1)


def test_points_are_uniform_and_two_draws_are_of_one_function():
    generator = torch.Generator().manual_seed(0)
    x, y = sphere_polynomial(20_000, 3, 2, generator=generator)
    assert (x.mean(0).abs() < 5 / math.sqrt(60_000)).all()
    assert abs(y.square().mean() - 1) < 0.05
    torch.testing.assert_close(y[:, 0], math.sqrt(5) * (3 * x[:, 0] ** 2 - 1) / 2, rtol=1e-4, atol=1e-5)
    state = torch.get_rng_state()
    sphere_polynomial(3, 3, 2, generator=generator)
    assert torch.equal(state, torch.get_rng_state())


LINEAR = nn.Linear(4, 2).double()


def train(make=lambda _: LINEAR, x=X, y=Y, x_test=X_TEST, **options):
    return train_ensemble(make, x, y, x_test, **{"lr": 0.1, "n_steps": 2, "n_models": 2, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train(y=Y[:, 0]), r"give y\[:, None\]\), got \(6,\)"),
        (lambda: train(y=Y[:5]), r"y must have shape \(6, any\)"),
        (lambda: train(y=Y[:, :1]), r"y must have the shape of the models' values: \(n, 1\) came for \(1, 2\)"),
        (lambda: train(x=X[:0]), "x must be a tensor with at least one row"),
        (lambda: train(x=X / 0), "x must be finite"),
        (lambda: train(x_test=X_TEST[:, :3]), "x_test must have shape"),
        (lambda: train(lr=None), "lr must be given for a model other than NTKMLP, got None for Linear"),
        (lambda: train(lr=0.0), "lr must be greater than 0"),
        (lambda: train(lr=1e6, n_steps=50), r"lr must be lower than 1e\+06: training diverged at step"),
        (lambda: train(n_models=0), "n_models must be an integer of at least 1"),
        (lambda: train(n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: train(tol=-1.0), "tol must be at least 0"),
        (lambda: train(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: train(output_scale=0.0), "output_scale must be greater than 0"),
        (lambda: train(make=lambda _: torch.relu), "make_model must return an nn.Module, got builtin"),
        (lambda: train(make=lambda _: nn.ReLU()), "make_model must return models with something to train"),
        (lambda: train(make=lambda seed: nn.Sequential(nn.Linear(4, 2 + seed), nn.Linear(2 + seed, 2))), "one architecture, that of seed 1 differs"),
        (lambda: initialization_variance(Y, Y), r"predictions must have shape \(any, any, any\), got \(6, 2\)"),
        (lambda: initialization_variance(Y[None], Y), "predictions must be of at least 2 networks, got 1"),
        (lambda: initialization_variance(torch.stack([Y, Y]), Y[:5]), r"y must have shape \(6, 2\) for predictions"),
        (lambda: initialization_variance(torch.stack([Y, Y / 0]), Y), "predictions must be finite"),
        (lambda: initialization_variance(torch.full((2, 1, 1), 1e30), torch.zeros(1, 1)), "predictions must have squared errors that torch.float32"),
        (lambda: initialization_variance(torch.stack([Y, Y]), Y).ensemble(0), "size must be an integer of at least 1"),
        (lambda: variance_onset([10, 10], [0.1, 0.2]), r"sizes must be positive and increase, got \[10.0, 10.0\]"),
        (lambda: variance_onset([0, 10], [0.1, 0.2]), "sizes must be positive and increase"),
        (lambda: variance_onset([10, 20], [0.1, 1.2]), r"fraction must be in \[0, 1\], got \[0.1, 1.2\]"),
        (lambda: variance_onset([10, 20], [0.1, math.nan]), r"fraction must be in \[0, 1\]"),
        (lambda: variance_onset([10, 20], [0.1]), "fraction must have one value a size, got 1 for 2"),
        (lambda: variance_onset([], []), "sizes must have at least one size"),
        (lambda: variance_onset([10], [0.1], threshold=0.0), r"threshold must be in \(0, 1\), got 0.0"),
        (lambda: onset_exponent([8, 16], [4, math.nan]), "onsets must be finite at two widths or more, got 1"),
        (lambda: onset_exponent([8, 8], [4, 5]), "onsets must be finite at two widths or more, got 1"),
        (lambda: onset_exponent([8, 16], [4, -1]), "onsets must be positive"),
        (lambda: onset_exponent([0, 16], [4, 5]), "widths must be positive"),
        (lambda: onset_exponent([8, 16], [4]), "onsets must have one value a width, got 1 for 2"),
        (lambda: sphere_polynomial(0, 3, 1), "n must be an integer of at least 1"),
        (lambda: sphere_polynomial(5, 1, 1), "dim must be an integer of at least 2"),
        (lambda: sphere_polynomial(5, 3, -1), "degree must be an integer of at least 0"),
        (lambda: sphere_polynomial(5, 3, 1, direction=torch.zeros(3)), "direction must not be 0"),
        (lambda: sphere_polynomial(5, 3, 1, direction=torch.ones(2)), r"direction must have shape \(3\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
