"""Draws and precision of sampled Laplace against dense linear algebra and explicit Jacobians."""

import copy
import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from posterity.uncertainty import SampledLaplace, sampled_laplace


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def dense_covariance(J, H, precision):
    G = torch.einsum("nop,noq,nqr->pr", J, H, J)
    return torch.linalg.inv(G + torch.as_tensor(precision, dtype=J.dtype).expand(J.shape[2]).diag())


def net(*sizes, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def jacobian(model, x, fixed=()):
    """The Jacobian (n, o, p) of a model in eval mode, from explicit reverse differentiation."""
    model = copy.deepcopy(model).eval()
    free = {k: v.detach() for k, v in model.named_parameters() if v.requires_grad and k not in fixed}
    parts = jacrev(lambda values: functional_call(model, values, (x,)))(free)
    return torch.cat([parts[name].flatten(2) for name in free], 2)


# Networks.


class Line(nn.Module):
    """Linear in its parameters: features (m, d) to two outputs, without a shared weight."""

    def __init__(self, d=4):
        super().__init__()
        self.weight = nn.Parameter(randn(2, d, seed=9))

    def forward(self, x):
        return x @ self.weight.T


def test_a_linear_model_is_bayesian_linear_regression():
    x, test, variance, lam = randn(30, 4, seed=1), randn(6, 4, seed=2), 0.3, 0.8
    model = SampledLaplace(Line(), "regression", n_samples=10_000, prior_precision=lam, noise_variance=variance,
                           g_prior=False, n_em_steps=0, tol=1e-9, generator=rng(3)).fit(x)  # fmt: skip
    posterior = torch.linalg.inv(x.T @ x / variance + lam * torch.eye(4))
    want = test @ posterior @ test.T  # the same for both outputs, which are independent
    mean, covariance = model.predict(test)
    assert torch.equal(mean, Line()(test))
    scale = want.diag()
    for k in range(2):
        assert ((covariance[:, k, k] / scale - 1).abs() < 0.05).all()  # a standard error is 0.014
    assert (covariance[:, 0, 1].abs() < 0.05 * scale).all()
    deviation = model.sample(test) - mean
    joint = torch.einsum("kmo,klo->ml", deviation, deviation) / (2 * len(deviation))
    assert ((joint - want).abs() < 0.04 * (scale[:, None] * scale).sqrt()).all()


def dense_em(J, y, likelihood, f, g_prior, steps, lam=1.0, variance=0.5):
    """MacKay's recursion with the whole matrix; the linear mode comes from scipy."""
    n, o, p = J.shape
    if likelihood == "regression":
        H = torch.eye(o, dtype=J.dtype).expand(n, o, o) / variance
    else:
        prob = f.softmax(1)
        H = torch.diag_embed(prob) - prob[:, :, None] * prob[:, None, :]
    G = torch.einsum("nop,noq,nqr->pr", J, H, J)
    s = G.diag().clamp_min(1e-6).rsqrt() if g_prior else torch.ones(p, dtype=J.dtype)
    G, J = s[:, None] * G * s, J * s
    for _ in range(steps):
        A = G + lam * torch.eye(p, dtype=J.dtype)
        if likelihood == "regression":
            w = torch.linalg.solve(A, torch.einsum("nop,no->p", J, y) / variance)
        else:

            def objective(w, lam=lam):
                w = torch.from_numpy(w).requires_grad_()
                loss = F.cross_entropy(J @ w, y, reduction="sum") + lam / 2 * w.square().sum()
                loss.backward()
                return loss.item(), w.grad.numpy()

            found = scipy.optimize.minimize(objective, np.zeros(p), jac=True, method="L-BFGS-B",
                                            options={"ftol": 1e-15, "gtol": 1e-8, "maxiter": 5_000})  # fmt: skip
            w = torch.from_numpy(found.x)
        gamma = float(torch.trace(torch.linalg.solve(A, G)))
        lam = gamma / float(w.square().sum())
    A = G + lam * torch.eye(p, dtype=J.dtype)
    return lam, float(torch.trace(torch.linalg.solve(A, G))), w


@pytest.mark.parametrize("g_prior", [True, False])
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_em_follows_the_dense_recursion(likelihood, g_prior):
    model, x = net(3, 4, 3), randn(24, 3, seed=1)
    with torch.no_grad():
        teacher = net(3, 8, 3, seed=5)(x) * 3
    y = teacher.argmax(1) if likelihood == "classification" else teacher + 0.7 * randn(24, 3, seed=2)
    found = SampledLaplace(model, likelihood, n_samples=600, noise_variance=0.5, g_prior=g_prior, n_em_steps=4,
                           batch_size=24, tol=1e-4, generator=rng(3)).fit(x, y)  # fmt: skip
    lam, gamma, w = dense_em(jacobian(model, x), y, likelihood, model(x).detach(), g_prior, 4)
    assert abs(found.prior_precision_ / lam - 1) < 0.1
    assert abs(found.effective_dimension_ / gamma - 1) < 0.1
    torch.testing.assert_close(found.linear_mode_, w, atol=0.05 * float(w.abs().max()), rtol=0)
    assert len(found.history_) == 4 and found.history_[-1]["prior_precision"] == found.prior_precision_
    assert set(found.history_[0]) == {"prior_precision", "effective_dimension", "n_iter"}


def test_at_the_fixed_point_nothing_is_left_to_solve():
    """The noise is reused and solvers start from the last solution: steps end, without jitter."""
    model, x, y = problem()
    found = SampledLaplace(model, "classification", n_em_steps=16, generator=rng(3)).fit(x, y)
    assert found.history_[0]["n_iter"] > 1 and found.history_[-1]["n_iter"] <= 1
    assert abs(found.history_[-1]["prior_precision"] / found.history_[-2]["prior_precision"] - 1) < 1e-3


class Tied(nn.Module):
    """One weight used twice, one frozen, dropout between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.out.bias.requires_grad_(False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.out(self.drop(self.b(self.a(x).tanh()).tanh()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x.view(len(x), 3, 4)).mean(1))


class Unmappable(nn.Module):
    """Looks at a value, which vmap over inputs does not allow."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x) * (2.0 if float(x.abs().max()) > 0 else 1.0)


class TooLarge(nn.Module):
    """Runs out of memory where many samples come at once."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        try:
            float(x.detach().sum())  # which vmap refuses
        except RuntimeError as error:
            raise torch.OutOfMemoryError("out of memory") from error
        return self.net(x)


def make(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "convolution":
            model = nn.Sequential(nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3),
                                  nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))  # fmt: skip
            model(torch.randn(50, 36))  # statistics other than the first ones
            return model.double(), 36, ("2.weight", "2.bias")
        if name == "attention":
            fixed = [f"layer.norm{k}.{part}" for k in (1, 2) for part in ("weight", "bias")]
            return Attention().double(), 12, tuple(fixed)
        return {"tied": Tied, "unmappable": Unmappable}[name]().double(), 4, ()


def test_running_out_of_memory_is_said_and_no_reason_for_the_slow_loop():
    model = TooLarge(nn.Linear(4, 3)).double()
    with pytest.raises(torch.OutOfMemoryError):
        SampledLaplace(model, "classification", n_samples=2).fit(randn(6, 4), torch.arange(6) % 3)


@pytest.mark.parametrize("name", ["convolution", "tied", "attention", "unmappable"])
def test_any_network_meets_its_explicit_jacobian(name):
    model, width, fixed = make(name)
    model.train()
    next(model.children()).eval()  # modes are put back one by one
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    x, test = randn(12, width, seed=1), randn(5, width, seed=2)
    found = SampledLaplace(
        model, "classification", n_samples=7, n_em_steps=1, tol=1e-2, batch_size=8, generator=rng(3)
    )
    found.fit(x, torch.arange(12) % 3)
    mean, covariance = found.predict(test)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(v.grad is None for v in model.parameters())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        quiet = copy.deepcopy(model).eval()
        torch.testing.assert_close(mean, quiet(test).detach())
        J = jacobian(model, x, fixed)
        p = quiet(x).detach().softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        diagonal = torch.einsum("nop,noq,nqp->p", J, H, J)
        torch.testing.assert_close(found.scale_, diagonal.clamp_min(1e-6).rsqrt())
        draws = torch.einsum("mop,kp->kmo", jacobian(model, test, fixed), found.scale_ * found.samples_)
    torch.testing.assert_close(found.sample(test) - mean, draws)
    torch.testing.assert_close(covariance, torch.einsum("kmi,kmj->mij", draws, draws) / 7)


def problem(n=30):
    x = randn(n, 3, seed=1)
    return net(3, 5, 3), x, net(3, 8, 3, seed=5)(x).argmax(1)


def test_how_a_layer_is_parametrised_does_not_matter_under_the_g_prior():
    class Hundredfold(nn.Module):
        def __init__(self, first, rest):
            super().__init__()
            self.weight, self.bias, self.rest = nn.Parameter(first.weight.detach() / 100), first.bias, rest

        def forward(self, x):
            return self.rest(F.linear(x, 100 * self.weight, self.bias))

    model, x, y = problem()
    other = Hundredfold(model[0], model[1:])
    probabilities = {}
    for g_prior in (True, False):  # without it EM is slow, and not needed to see the difference
        options = {"g_prior": g_prior, "n_em_steps": int(g_prior), "tol": 1e-8, "max_iter": 5_000}
        a, b = (
            SampledLaplace(m, "classification", n_samples=4, generator=rng(2), **options).fit(x, y).predict_proba(x)
            for m in (model, other)
        )  # fmt: skip
        probabilities[g_prior] = float((a - b).abs().max())
    assert probabilities[True] < 1e-6 and probabilities[False] > 1e-3


def test_loaders_memory_and_diagonal_choose_the_way_and_not_the_result(monkeypatch):
    model, x, y = problem()

    def fitted(*data, **options):
        options = {"n_em_steps": 1, "tol": 1e-2, "batch_size": 15, **options}
        return SampledLaplace(model, "classification", generator=rng(2), **options).fit(*data)

    plain = fitted(x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=15)
    torch.testing.assert_close(fitted(loader).samples_, plain.samples_)
    assert torch.equal(fitted(x, y.int()).samples_, plain.samples_)
    monkeypatch.setattr(sampled_laplace, "_KEEP_BYTES", 0)
    torch.testing.assert_close(fitted(x, y).samples_, plain.samples_)
    monkeypatch.setattr(sampled_laplace, "_EXACT", 0)
    estimated = fitted(x, y, n_samples=5_000, n_em_steps=0, tol=1.0)  # its scale is all that is asked for
    torch.testing.assert_close(estimated.scale_, plain.scale_, rtol=0.05, atol=0)


def test_stochastic_gradients_find_the_draws_of_conjugate_gradients():
    """And the linear mode with them, which the precision is chosen by."""
    model, x, y = problem(20)
    loader = DataLoader(TensorDataset(x, F.one_hot(y, 3).double()), batch_size=10)
    options = {"n_samples": 4, "noise_variance": 0.6, "n_em_steps": 1, "max_iter": 200}
    a = SampledLaplace(model, "regression", tol=1e-6, generator=rng(2), **options).fit(loader)
    b = SampledLaplace(model, "regression", tol=1e-2, generator=rng(2), solver="sgd", **options).fit(loader)
    assert abs(b.prior_precision_ / a.prior_precision_ - 1) < 0.05
    assert abs(b.effective_dimension_ / a.effective_dimension_ - 1) < 0.05
    assert (a.samples_ - b.samples_).norm() < 0.03 * a.samples_.norm()


def test_without_steps_the_precision_stays_and_labels_are_not_needed():
    model, x, y = problem()
    options = {"prior_precision": 3.0, "n_em_steps": 0, "n_samples": 1_000, "tol": 1e-5}
    a = SampledLaplace(model, "classification", generator=rng(1), **options).fit(x)
    b = SampledLaplace(model, "classification", generator=rng(1), **options).fit(x, y)
    assert torch.equal(a.samples_, b.samples_)
    assert a.prior_precision_ == 3.0 and a.history_ == [] and a.linear_mode_ is None
    J, p = jacobian(model, x), model(x).detach().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    covariance = dense_covariance(J * a.scale_, H, 3.0)
    assert abs(a.effective_dimension_ / (len(covariance) - 3.0 * float(covariance.trace())) - 1) < 0.05
    z = a.samples_
    assert (z.T @ z / len(z) - covariance).norm() < 0.25 * covariance.norm()


def test_one_generator_one_posterior():
    model, x, y = problem()
    a, b, c = (
        SampledLaplace(model, "classification", n_em_steps=1, tol=1e-2, generator=rng(s)).fit(x, y)
        for s in (1, 1, 2)
    )
    assert torch.equal(a.samples_, b.samples_) and not torch.equal(a.samples_, c.samples_)
    single = SampledLaplace(copy.deepcopy(model).float(), "classification", n_samples=1, n_em_steps=1,
                            generator=rng(1)).fit(x.float(), y)  # fmt: skip
    assert single.samples_.dtype == single.predict_proba(x.float()).dtype == torch.float32
    torch.testing.assert_close(single.predict(x.float())[0], model.float()(x.float()).detach())


def test_probabilities_and_likelihoods_are_their_formulas():
    model, x, y = problem()
    found = SampledLaplace(
        model, "classification", n_em_steps=1, tol=1e-2, batch_size=16, generator=rng(1)
    ).fit(x, y)
    draws, (mean, covariance) = found.sample(x), found.predict(x)
    torch.testing.assert_close(found.predict_proba(x), draws.softmax(-1).mean(0))
    shrunk = mean / (1 + math.pi / 8 * torch.diagonal(covariance, dim1=1, dim2=2)).sqrt()
    torch.testing.assert_close(found.predict_proba(x, link="probit"), shrunk.softmax(1))
    each = draws.softmax(-1)[:, torch.arange(30), y]
    torch.testing.assert_close(found.log_likelihood(x, y), each.mean(0).log())
    torch.testing.assert_close(found.log_likelihood(x, y, joint=True), each.prod(1).mean().log())
    assert found.log_likelihood(x, y, joint=True).shape == ()

    t = randn(30, 3, seed=8)
    found = SampledLaplace(
        model, "regression", noise_variance=0.4, n_em_steps=1, tol=1e-2, generator=rng(1)
    ).fit(x, t)
    normal = torch.distributions.Normal(found.sample(x), math.sqrt(0.4))
    each = normal.log_prob(t).sum(-1).exp()
    torch.testing.assert_close(found.log_likelihood(x, t), each.mean(0).log())
    torch.testing.assert_close(
        found.log_likelihood(x[:3], t[:3], joint=True), each[:, :3].prod(1).mean().log()
    )


def test_leaves_global_state_alone():
    model, x, y = problem()
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = SampledLaplace(model, "classification", n_em_steps=1, solver="sgd", tol=0.5, generator=rng(1))
    found.fit(x, y).predict_proba(x)
    assert torch.equal(torch.rand(1), want)
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()


def test_targets_of_zero_and_a_single_parameter_are_finite():
    model = SampledLaplace(nn.Linear(1, 1, bias=False), "regression", generator=rng(1))
    model.fit(torch.ones(3, 1), torch.zeros(3, 1))
    assert math.isfinite(model.prior_precision_) and bool(torch.isfinite(model.samples_).all())


def test_warns_when_the_linear_mode_is_not_reached():
    model, x, y = problem()
    with pytest.warns(ConvergenceWarning, match="L-BFGS"):
        SampledLaplace(model, "classification", n_em_steps=1, max_iter=2, generator=rng(1)).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        SampledLaplace(model, "classification", n_em_steps=1, generator=rng(1)).fit(x, y)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"prior_precision": 0}, "prior_precision must be greater than 0"),
        ({"noise_variance": -1.0}, "noise_variance must be greater than 0"),
        ({"n_samples": 0}, "n_samples must be an integer of at least 1"),
        ({"n_em_steps": -1}, "n_em_steps must be an integer of at least 0"),
        ({"g_prior": "yes"}, "g_prior must be one of"),
        ({"solver": "cholesky"}, "solver must be one of 'cg', 'sgd'"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"tol": 0.0}, "tol must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"model": lambda x: x}, "model must be an nn.Module"),
        ({"model": nn.ReLU()}, "model must have a trainable parameter"),
        ({"model": nn.BatchNorm1d(3)}, "outside normalisation layers"),
        ({"model": nn.Linear(3, 3).requires_grad_(False)}, "model must have a trainable parameter"),
    ],
)
def test_refuses_bad_options(as_a_user, change, message):
    with pytest.raises(ValueError, match=message):
        SampledLaplace(**{"model": nn.Linear(3, 3), "likelihood": "classification", **change})


@pytest.mark.parametrize(
    ("likelihood", "data", "message"),
    [
        ("classification", lambda x, y: (x, y + 1), r"y must be in 0..2, got 1 to 3"),
        ("classification", lambda x, y: (x, y - 1), r"y must be in 0..2, got -1 to 1"),
        ("classification", lambda x, y: (x, y.double()), "y must hold class indices"),
        ("classification", lambda x, y: (x, y[:-1]), "a row for each of the 6"),
        ("classification", lambda x, y: (x, y[:, None]), r"y must have shape \(6\)"),
        ("classification", lambda x, y: (x, None), "y must be given to choose"),
        ("classification", lambda x, y: (x[:0], y[:0]), "at least one point"),
        ("classification", lambda x, y: ([], None), "at least one batch"),
        (
            "classification",
            lambda x, y: (iter([(x, y)]), None),
            "a loader that can restart, got list_iterator",
        ),
        ("classification", lambda x, y: ([(x, y)], y), "y must be None"),
        (
            "classification",
            lambda x, y: (x[:, None], y),
            r"must map n inputs to \(n, outputs\), got \(6, 1, 3\)",
        ),
        ("regression", lambda x, y: (x, x[:, :2]), r"y must have shape \(6, 3\)"),
        ("regression", lambda x, y: (x, y[:, None].expand(6, 3)), "y must be a floating-point tensor"),
        ("regression", lambda x, y: (x, x / 0), "y must be finite"),
    ],
)
def test_refuses_data_that_do_not_fit(as_a_user, likelihood, data, message):
    x, y = randn(6, 3), torch.arange(6) % 3
    with pytest.raises(ValueError, match=message):
        SampledLaplace(net(3, 3), likelihood).fit(*data(x, y))


def test_refuses_calls_out_of_place(as_a_user):
    model, x, y = problem()
    found = SampledLaplace(model, "classification", n_em_steps=1, tol=1e-2, generator=rng(1))
    with pytest.raises(ValueError, match="call fit first"):
        found.predict(x)
    found.fit(x, y)
    with pytest.raises(ValueError, match="link must be one of"):
        found.predict_proba(x, link="logit")
    with pytest.raises(ValueError, match=r"y must have shape \(30\)"):
        found.log_likelihood(x, y[:3])
    with pytest.raises(ValueError, match="likelihood must be 'classification' for predict_proba"):
        SampledLaplace(model, "regression", n_em_steps=0).fit(x).predict_proba(x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_is_refused(as_a_user, bad):
    x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    x[0, 0] = bad
    with pytest.raises(ValueError, match="X must be finite, got NaN or infinity"):
        SampledLaplace(torch.nn.Linear(3, 2), "classification").fit(x, y)
