"""GMOGP against brute force, scikit-learn's Gaussian process, and a training loop written out."""

import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from posterity.testing import check_estimator
from posterity.uncertainty import GMOGPRegressor, attention_coefficients, gmogp, mixed_kernels

RNG = np.random.default_rng(0)
X = RNG.uniform(0, 3, (40, 2))
Y = np.column_stack([np.sin(3 * X[:, 0]), 5 + 3 * np.cos(2 * X[:, 1]), X[:, 0] * X[:, 1]])
Y += 0.1 * RNG.normal(size=Y.shape)
NEW = RNG.uniform(0, 3, (15, 2))
GAPS = Y.copy()
GAPS[:12, 0] = np.nan
GAPS[10:17, 2] = np.nan  # two rows lack both


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(X=X, Y=Y, **options):
    return GMOGPRegressor(**{"n_iter": 30, "random_state": 0, **options}).fit(X, Y)


def kernel(model, i, a, b):
    """Return the covariance of output i between rows a and b, component by component."""
    total = np.zeros((len(a), len(b)))
    for j, weight in enumerate(model.attention_[i]):
        scaled = (a[:, None] - b[None]) / model.lengthscale_[j]
        total += weight**2 * model.outputscale_[j] * np.exp(-0.5 * (scaled**2).sum(-1))
    return total


def closed_form(model, i, x, y, new):
    """Return mean, deviation of a new observation, evidence and covariance of output i."""
    seen = ~np.isnan(y)
    x, y = x[seen], (y[seen] - model.y_mean_[i]) / model.y_scale_[i]
    prior = model.attention_[i] @ model.mean_
    K = kernel(model, i, x, x) + model.noise_[i] * np.eye(len(x))
    c = kernel(model, i, new, x)
    mean = prior + c @ np.linalg.solve(K, y - prior)
    cov = kernel(model, i, new, new) - c @ np.linalg.solve(K, c.T) + model.noise_[i] * np.eye(len(new))
    evidence = multivariate_normal(np.full(len(x), prior), K).logpdf(y)
    scale = model.y_scale_[i]
    return model.y_mean_[i] + scale * mean, scale * np.sqrt(np.diag(cov)), evidence, scale**2 * cov


# The attention.


def plain_attention(targets, weight, bias, slope):
    """Return equation 2 in Python floats."""
    n, s = len(targets), len(targets[0])
    norms = [math.sqrt(sum(targets[r][k] ** 2 for r in range(n))) for k in range(s)]
    dot = [[sum(targets[r][k] * targets[r][m] for r in range(n)) / (norms[k] * norms[m]) for m in range(s)]
           for k in range(s)]  # fmt: skip
    rows = []
    for i in range(s):
        e = [sum(dot[i][m] * weight[i][m][j] for m in range(s)) + bias[i][i][j] for j in range(s)]
        e = [v if v > 0 else slope * v for v in e]
        total = 1 + sum(math.exp(e[j]) for j in range(s) if j != i)
        rows.append([1.0 if j == i else math.exp(e[j]) / total for j in range(s)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("slope", [0.2, 0.0, 1.0])
def test_attention_is_equation_2_and_leaves_room_for_no_parents(slope):
    y, w, b = draw(12, 5), 2 * draw(5, 5, 5, seed=1), draw(5, 5, 5, seed=2)
    a = attention_coefficients(y, w, b, slope)
    want = plain_attention(y.tolist(), w.tolist(), b.tolist(), slope)
    torch.testing.assert_close(a, want, atol=1e-12, rtol=0)
    assert torch.equal(a.diagonal(), torch.ones(5, dtype=torch.float64))
    assert bool((a.sum(1) < 2).all())


def test_attention_sees_directions_and_not_sizes_or_names():
    y, w, b = draw(12, 4), draw(4, 4, 4, seed=1), draw(4, 4, 4, seed=2)
    a = attention_coefficients(y, w, b)
    sizes = torch.tensor([3.0, 1e-5, 1.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(attention_coefficients(y * sizes, w, b), a)
    p = torch.tensor([2, 0, 3, 1])
    w, b = (part[p][:, p][:, :, p] for part in (w, b))
    torch.testing.assert_close(attention_coefficients(y[:, p], w, b), a[p][:, p])


def test_attention_at_extreme_scores_and_for_one_output():
    y, w = draw(6, 3), torch.zeros(3, 3, 3, dtype=torch.float64)
    low, high = (attention_coefficients(y, w, w + value) for value in (-1e9, 1e9))
    assert torch.equal(low, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(high, 0.5 + 0.5 * torch.eye(3, dtype=torch.float64))
    one = torch.zeros(1, 1, 1)
    assert torch.equal(attention_coefficients(torch.ones(4, 1), one, one), torch.ones(1, 1))
    silent = attention_coefficients(torch.zeros(4, 2), draw(2, 2, 2).float(), torch.zeros(2, 2, 2))
    torch.testing.assert_close(silent, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))


def test_attention_differentiates_and_only_row_i_of_graph_i_has_a_gradient():
    y, w, b = draw(7, 3), draw(3, 3, 3, seed=1).requires_grad_(), draw(3, 3, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(attention_coefficients, (y.requires_grad_(), w, b))
    grad = torch.autograd.grad((attention_coefficients(y, w, b) * draw(3, 3, seed=3)).sum(), b)[0]
    used = torch.eye(3, dtype=torch.bool)[:, :, None].expand(3, 3, 3)
    assert bool((grad[~used] == 0).all())
    assert int((grad[used] != 0).sum()) == 6  # all but the diagonal


# The estimator.


@pytest.mark.parametrize("options", [{}, {"ard": True}, {"normalize_y": False}, {"n_iter": 1}])
@pytest.mark.parametrize("targets", [Y, GAPS], ids=["full", "gaps"])
def test_attributes_give_mean_deviation_and_evidence_in_closed_form(options, targets):
    model = fitted(Y=targets, **options)
    mean, std = model.predict(NEW, return_std=True)
    for i in range(3):
        want = closed_form(model, i, X, targets[:, i], NEW)
        np.testing.assert_allclose(mean[:, i], want[0], rtol=0, atol=1e-8)
        np.testing.assert_allclose(std[:, i], want[1], rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.log_marginal_likelihood_[i], want[2], rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        model.log_marginal_likelihood(X, targets), model.log_marginal_likelihood_, rtol=0, atol=1e-8
    )
    np.testing.assert_array_equal(model.predict(NEW), mean)


def test_evidence_of_other_data_is_that_of_the_fitted_prior():
    model = fitted(Y=GAPS)
    other = GAPS[20:] * 1.1 + 0.3
    want = [closed_form(model, i, X[20:], other[:, i], NEW)[2] for i in range(3)]
    np.testing.assert_allclose(model.log_marginal_likelihood(X[20:], other), want, rtol=0, atol=1e-8)


def test_attention_and_scales_are_those_of_the_observed():
    model = fitted(Y=GAPS)
    np.testing.assert_allclose(model.y_mean_, np.nanmean(GAPS, 0))
    np.testing.assert_allclose(model.y_scale_, np.nanstd(GAPS, 0))
    inside = np.nan_to_num((GAPS - model.y_mean_) / model.y_scale_)
    want = attention_coefficients(*map(torch.from_numpy, (inside, model.weight_, model.bias_)))
    np.testing.assert_allclose(model.attention_, want)
    assert (model.lengthscale_.shape, fitted(ard=True).lengthscale_.shape) == ((3,), (3, 2))


def test_one_output_is_scikit_learns_gaussian_process():
    y = Y[:, 2]
    model = fitted(Y=y, n_iter=80)
    parts = (float(v[0]) for v in (model.outputscale_, model.lengthscale_, model.noise_))
    outputscale, lengthscale, noise = parts
    peer = GaussianProcessRegressor(
        ConstantKernel(outputscale) * RBF(lengthscale) + WhiteKernel(noise), optimizer=None, alpha=1e-15
    )
    inside = (y - model.y_mean_[0]) / model.y_scale_[0] - model.mean_[0]
    peer.fit(X, inside)
    mean, std = model.predict(NEW, return_std=True)
    want, spread = peer.predict(NEW, return_std=True)
    want = (want + model.mean_[0]) * model.y_scale_[0] + model.y_mean_[0]
    np.testing.assert_allclose(mean, want, atol=1e-8)
    np.testing.assert_allclose(std, spread * model.y_scale_[0], atol=1e-8)
    np.testing.assert_allclose(model.log_marginal_likelihood_, peer.log_marginal_likelihood_value_)
    assert mean.shape == std.shape == (15,)


@pytest.mark.parametrize("ard", [False, True])
def test_a_fit_is_adam_on_the_weighted_evidences(ard):
    """The same loop with torch's own density and autograd; the start is that of a fit that cannot move."""
    weights, steps = np.array([1.0, 0.2, 3.0]), 20 if ard else 104  # past the first drop of the rate
    start = fitted(n_iter=1, lr=1e-40)
    np.testing.assert_allclose(start.lengthscale_, np.log(2))
    model = fitted(n_iter=steps, output_weights=weights, ard=ard)
    x, y = torch.from_numpy(X), torch.from_numpy((Y - Y.mean(0)) / Y.std(0))
    W, B = (torch.from_numpy(part).requires_grad_() for part in (start.weight_, start.bias_))
    shape = (3, 2) if ard else (3, 1)
    length, scale, noise, mean = (
        torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in (shape, 3, 3, 3)
    )
    optimizer = torch.optim.Adam([W, B, length, scale, noise, mean], lr=0.08, weight_decay=5e-4)
    losses = []
    for step in range(steps):
        if step == 100:
            optimizer.param_groups[0]["lr"] *= 0.9
        A = attention_coefficients(y, W, B)
        k = [F.softplus(scale[j]) * torch.exp(-0.5 * (((x[:, None] - x) / F.softplus(length[j])) ** 2).sum(-1))
             for j in range(3)]  # fmt: skip
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(3):
            K = sum(A[i, j] ** 2 * k[j] for j in range(3))
            K = K + (F.softplus(noise[i]) + 1e-4) * torch.eye(40, dtype=torch.float64)
            prior = sum(A[i, j] * mean[j] for j in range(3)).expand(40)
            loss = loss - weights[i] * MultivariateNormal(prior, K).log_prob(y[:, i]) / (40 * 3)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(model.loss_curve_, losses, rtol=0, atol=1e-7)
    np.testing.assert_allclose(model.lengthscale_, F.softplus(length).detach().squeeze(), atol=1e-6)
    np.testing.assert_allclose(model.mean_, mean.detach(), atol=1e-6)
    np.testing.assert_allclose(model.bias_, B.detach(), atol=1e-6)


def test_the_density_and_its_gradient_pass_gradcheck():
    half = draw(2, 5, 5)
    covariance = half @ half.mT + 3 * torch.eye(5, dtype=torch.float64)
    noise, residual = draw(2, 5, seed=1).abs(), draw(2, 5, seed=2)
    inputs = [part.requires_grad_() for part in (covariance, noise, residual)]

    def density(covariance, noise, residual):
        return mixed_kernels._Gaussian.apply((covariance + covariance.mT) / 2, noise, residual)[0]

    assert torch.autograd.gradcheck(density, inputs)


def test_without_attention_outputs_are_independent(monkeypatch):
    real = mixed_kernels._attention
    monkeypatch.setattr(mixed_kernels, "_attention", lambda gram, w, b, slope: real(gram, w, b - 1e9, slope))
    options = {"weight_decay": 0.0, "n_iter": 20}
    together = fitted(Y=GAPS, **options)
    np.testing.assert_array_equal(together.attention_, np.eye(3))
    mean, std = together.predict(NEW, return_std=True)
    for i in range(3):
        alone = fitted(Y=GAPS[:, i], **options)  # the loss is a third; Adam does not see that
        for got, want in zip((mean, std), alone.predict(NEW, return_std=True), strict=True):
            np.testing.assert_allclose(got[:, i], want, atol=1e-4)


def test_evidence_grows_and_a_weight_favours_its_output():
    models = [fitted(output_weights=weights) for weights in ([1, 1, 1], [100, 1, 1], [0.01, 1, 1])]
    start = fitted(n_iter=1, lr=1e-40).log_marginal_likelihood_
    assert (models[0].log_marginal_likelihood_ > start).all()
    assert models[0].loss_curve_[-1] < models[0].loss_curve_[0]
    assert models[0].loss_curve_[0] == pytest.approx(-start.sum() / Y.size)
    assert models[1].log_marginal_likelihood_[0] > models[2].log_marginal_likelihood_[0]


def test_rows_without_any_observation_change_nothing():
    bare = np.vstack([X, NEW]), np.vstack([GAPS, np.full((15, 3), np.nan)])
    still = {"n_iter": 1, "lr": 1e-40}  # the loss counts all rows, which Adam's epsilon sees
    short, long = fitted(Y=GAPS, **still), fitted(*bare, **still)
    np.testing.assert_allclose(long.attention_, short.attention_, atol=1e-12)
    np.testing.assert_allclose(long.log_marginal_likelihood_, short.log_marginal_likelihood_, atol=1e-10)
    for got, want in zip(
        long.predict(NEW, return_std=True), short.predict(NEW, return_std=True), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-10)
    np.testing.assert_allclose(long.loss_curve_ * 55, short.loss_curve_ * 40)
    assert (long.alpha_[:, 40:] == 0).all()


def test_same_seed_same_result_and_it_pickles():
    one, two, other = fitted(), fitted(), fitted(random_state=1)
    for model in (two, pickle.loads(pickle.dumps(one))):
        for got, want in zip(
            model.predict(NEW, return_std=True), one.predict(NEW, return_std=True), strict=True
        ):
            np.testing.assert_array_equal(got, want)
    assert not np.array_equal(one.attention_, other.attention_)
    state = torch.get_rng_state()
    fitted(n_iter=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_units_of_an_output_change_predictions_alone():
    factor, shift = np.array([1e3, 0.1, 1]), np.array([5, 0, -1e4])
    plain, moved = fitted(), fitted(Y=Y * factor + shift)
    mean, std = plain.predict(NEW, return_std=True)
    got = moved.predict(NEW, return_std=True)
    np.testing.assert_allclose((got[0] - shift) / factor, mean, atol=1e-6)
    np.testing.assert_allclose(got[1] / factor, std, atol=1e-6)
    np.testing.assert_allclose(moved.lengthscale_, plain.lengthscale_, atol=1e-6)
    np.testing.assert_allclose(moved.log_marginal_likelihood_, plain.log_marginal_likelihood_, atol=1e-6)


def test_a_constant_output_is_predicted_as_it_is():
    model = fitted(Y=np.column_stack([Y[:, 0], np.full(40, 7.3)]), n_iter=60)
    mean, std = model.predict(NEW, return_std=True)
    assert model.y_scale_[1] == 1
    np.testing.assert_allclose(mean[:, 1], 7.3, atol=0.05)
    assert std[:, 1].max() < 0.5


def test_more_rows_than_a_chunk_are_predicted_alike(monkeypatch):
    model = fitted(Y=GAPS)
    whole = model.predict(NEW, return_std=True)
    monkeypatch.setattr(gmogp, "ROWS", 4)
    for got, want in zip(model.predict(NEW, return_std=True), whole, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
def test_samples_have_the_joint_law_of_new_observations(flat):
    y = GAPS[:, 0] if flat else GAPS
    model, few = fitted(Y=y), NEW[:4]
    draws = model.sample_y(few, 40_000, random_state=0)
    assert draws.shape == ((4, 40_000) if flat else (4, 3, 40_000))
    np.testing.assert_array_equal(draws, model.sample_y(few, 40_000, random_state=0))
    assert model.sample_y(few).shape == ((4, 1) if flat else (4, 3, 1))
    draws = draws.reshape(4, -1, 40_000)
    for i in range(draws.shape[1]):
        mean, std, _, cov = closed_form(model, i, X, GAPS[:, i], few)
        np.testing.assert_allclose(draws[:, i].mean(1), mean, atol=5 * std.max() / 200)
        np.testing.assert_allclose(np.cov(draws[:, i]), cov, atol=8 * std.max() ** 2 / 200)
    if not flat:
        between = np.corrcoef(draws[:, 0], draws[:, 1])[:4, 4:]
        assert abs(between).max() < 5 / 200


# The transform.

SKEWED = np.exp(Y[:, :2] / [1, 3])


def plain_warp(flows, i, y):
    for a, b, c, d in flows[:, :, i]:
        y = d * np.sinh(b * np.arcsinh(y) - a) + c
    return y


def test_at_the_start_the_transform_is_the_identity():
    models = [fitted(output_transform=kind, n_iter=1, lr=1e-40) for kind in (None, "sal")]
    np.testing.assert_allclose(models[1].flows_[:, :, 0], [[0, 1, 0, 1]] * 2, atol=1e-12)
    for plain, warped in zip(*(model.predict(NEW, return_std=True) for model in models), strict=True):
        np.testing.assert_allclose(warped, plain, atol=1e-10)
    np.testing.assert_allclose(*(model.log_marginal_likelihood_ for model in models), atol=1e-10)


@pytest.mark.parametrize("n_flows", [1, 3])
def test_the_warped_evidence_is_a_density_and_predictions_are_its_moments(n_flows):
    model = fitted(Y=SKEWED, output_transform="sal", n_flows=n_flows, n_iter=60)
    plain = fitted(Y=SKEWED, n_iter=60)
    assert model.flows_.shape == (n_flows, 4, 2)
    assert (model.log_marginal_likelihood_ > plain.log_marginal_likelihood_ + 1).all()
    for i in range(2):
        inside = (SKEWED[:, i] - model.y_mean_[i]) / model.y_scale_[i]
        step = 1e-6
        z = plain_warp(model.flows_, i, inside)
        slope = (plain_warp(model.flows_, i, inside + step) - plain_warp(model.flows_, i, inside - step)) / (
            2 * step
        )
        assert (slope > 0).all()
        prior = model.attention_[i] @ model.mean_
        K = kernel(model, i, X, X) + model.noise_[i] * np.eye(40)
        evidence = multivariate_normal(np.full(40, prior), K).logpdf(z) + np.log(slope).sum()
        assert model.log_marginal_likelihood_[i] == pytest.approx(evidence, abs=1e-4)

        # predictive density of one new observation, by the change of variables: total, mean, deviation
        c = kernel(model, i, NEW[:1], X)
        mean = prior + (c @ np.linalg.solve(K, z - prior))[0]
        sd = np.sqrt(kernel(model, i, NEW[:1], NEW[:1]) + model.noise_[i] - c @ np.linalg.solve(K, c.T))[0, 0]

        def density(y, mean=mean, sd=sd, i=i):
            stretch = (plain_warp(model.flows_, i, y + 1e-5) - plain_warp(model.flows_, i, y - 1e-5)) / 2e-5
            gap = (plain_warp(model.flows_, i, y) - mean) / sd
            return np.exp(-0.5 * gap**2) / np.sqrt(2 * np.pi) / sd * stretch

        ends = {"limit": 200, "points": np.linspace(-3, 6, 10)}
        moments = [quad(lambda y, p=p: y**p * density(y), -20, 20, **ends)[0] for p in range(3)]
        assert moments[0] == pytest.approx(1, abs=1e-5)
        m, s = (part[0, i] for part in model.predict(NEW[:1], return_std=True))
        assert (m - model.y_mean_[i]) / model.y_scale_[i] == pytest.approx(moments[1], abs=1e-4)
        assert s / model.y_scale_[i] == pytest.approx(np.sqrt(moments[2] - moments[1] ** 2), rel=1e-3)


def test_the_warped_fit_follows_the_gradient_of_its_evidence():
    flows = (0.3 * draw(2, 4, 2)).requires_grad_()
    gaps = torch.from_numpy(GAPS[:, :2].T.copy())
    x, mask, y = torch.from_numpy(X), ~gaps.isnan(), gaps.nan_to_num()
    raw = mixed_kernels._start(2, None, 2, 0, x)

    def evidence(flows):
        return mixed_kernels._evidence(
            mixed_kernels._constrain({**raw, "flows": flows}, gmogp._gram(y.T)), x, y, mask
        )[0]

    assert torch.autograd.gradcheck(evidence, (flows,))


def test_warped_samples_agree_with_the_predicted_moments():
    gaps = SKEWED.copy()
    gaps[:9, 0] = np.nan
    model = fitted(Y=gaps, output_transform="sal", n_iter=60)
    draws = model.sample_y(NEW[:5], 40_000, random_state=0)
    mean, std = model.predict(NEW[:5], return_std=True)
    np.testing.assert_allclose(draws.mean(2), mean, atol=6 * std.max() / 200)
    np.testing.assert_allclose(draws.std(2), std, rtol=0.1)
    np.testing.assert_array_equal(model.predict(NEW[:5]), mean)
    evidence = model.log_marginal_likelihood(X, gaps)
    np.testing.assert_allclose(evidence, model.log_marginal_likelihood_, atol=1e-8)
    bare = np.vstack([X, NEW]), np.vstack([gaps, np.full((15, 2), np.nan)])  # rows without any observation
    np.testing.assert_allclose(model.log_marginal_likelihood(*bare), evidence, atol=1e-8)


# Conformance and bad input.


@pytest.mark.parametrize("options", [{"n_iter": 5}, {"n_iter": 2, "ard": True, "output_transform": "sal"}])
def test_conforms_to_its_kind(as_a_user, options):
    # X is used as it is, so lengthscales begin in its units
    check_estimator(GMOGPRegressor(random_state=0, **options), invariant=["shift X", "shift y", "scale y"])


def test_jitter_comes_only_when_it_is_needed(as_a_user):
    ones, zero = torch.ones(1, 4, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)[None]
    assert torch.equal(mixed_kernels._cholesky(0 * ones, zero + 1), eye)
    factor = mixed_kernels._cholesky(ones - 2e-7 * eye, zero)
    torch.testing.assert_close(factor @ factor.mT, ones - 2e-7 * eye + 1e-6 * eye, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="not positive definite, even with a jitter of 1e-4: lower lr"):
        mixed_kernels._cholesky(-ones, zero)
    with pytest.raises(ValueError, match="lower lr"):
        fitted(lr=1e200, n_iter=5)


FRAME = pd.DataFrame(Y, columns=["hip", "knee", "ankle"])


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (X, Y[:39], "inconsistent numbers of samples"),
        (X, np.where([True, False, True], Y, np.nan), "at least 2 observed rows an output, got 0 for 1"),
        (X, FRAME.assign(knee=np.nan), "got 0 for 'knee'"),
        (X, FRAME.assign(knee=np.r_[1, np.full(39, np.nan)]), "got 1 for 'knee'"),
        (X, np.where(Y > 4, np.inf, Y), "contains infinity"),
        (np.where(X > 2, np.inf, X), Y, "X contains infinity"),
        (np.where(X > 2, np.nan, X), Y, "X contains NaN"),
        (X[:1], Y[:1], "minimum of 2 is required"),
    ],
)
def test_refuses_data_that_do_not_fit(as_a_user, X, Y, message):
    with pytest.raises(ValueError, match=message):
        GMOGPRegressor(n_iter=1).fit(X, Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_iter": 0}, "n_iter must be an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"output_transform": "log"}, "output_transform must be one of None, 'sal', got 'log'"),
        ({"n_flows": 0}, "n_flows must be"),
        ({"output_weights": [1, 0, 1]}, r"output_weights must be 3 positive numbers, got \[1, 0, 1\]"),
        ({"output_weights": [1, np.nan, 1]}, "output_weights must be 3 positive numbers"),
        ({"output_weights": [1, 1]}, r"output_weights must be 3 positive numbers, got \[1, 1\]"),
    ],
)
def test_refuses_parameters_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        GMOGPRegressor(**options).fit(X, Y)


def test_refuses_what_does_not_fit_a_fit(as_a_user):
    model = fitted(n_iter=1)
    for call, message in [
        (lambda: model.predict(NEW[:, :1]), "1 features"),
        (lambda: model.sample_y(NEW[:, :1]), "1 features"),
        (lambda: model.sample_y(NEW, 0), "n_samples must be an integer of at least 1"),
        (lambda: model.log_marginal_likelihood(X, Y[:, :2]), "Y must have the 3 outputs of fit, got 2"),
        (lambda: model.log_marginal_likelihood(X, Y[:9]), "inconsistent"),
        (lambda: model.log_marginal_likelihood(X, np.where(Y > 4, np.inf, Y)), "Y contains infinity"),
        (lambda: attention_coefficients(draw(5, 3), draw(3, 3), draw(3, 3, 3)), r"weight must have shape \(3, 3, 3\) for targets of 3 outputs"),
        (lambda: attention_coefficients(draw(5, 3), draw(3, 3, 3), draw(2, 3, 3)), "bias must have shape"),
        (lambda: attention_coefficients(draw(5), draw(3, 3, 3), draw(3, 3, 3)), "targets must have shape"),
        (lambda: attention_coefficients(draw(5, 3) * math.nan, draw(3, 3, 3), draw(3, 3, 3)), "targets must be finite"),
        (lambda: attention_coefficients(draw(5, 3).long(), draw(3, 3, 3), draw(3, 3, 3)), "targets must be a floating-point"),
        (lambda: attention_coefficients(draw(5, 3), draw(3, 3, 3), draw(3, 3, 3), -0.1), "negative_slope"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_many_rows_are_warned_of_with_the_memory_they_need(as_a_user):
    n = 20_001
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is computed
        with pytest.raises(UserWarning, match="20001 rows need 24 GiB for the covariances of 2 outputs"):
            GMOGPRegressor().fit(np.zeros((n, 1)), np.zeros((n, 2)))
