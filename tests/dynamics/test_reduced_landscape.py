"""The reduced landscape against loops by hand, ridge regression on a sphere and curves drawn by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

from posterity.dynamics import (
    ReducedLandscape,
    reduced_landscape,
    scale_weights_,
)
from posterity.testing import check_instrument


def mlp(seed=0, dtype=torch.float64, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(3, 8, bias), nn.ReLU(), nn.Linear(8, 6, bias), nn.ReLU(), nn.Linear(6, 2, bias)
        )
    return net.to(dtype)


def data(n=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def as_vector(net):
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


# --- the landscape ---


def test_without_steps_at_alpha_one_losses_are_the_models_own():
    net, (x, y), (a, b) = mlp(), data(), data(30, seed=1)
    with torch.no_grad():
        expected = [F.cross_entropy(net(x), y), F.cross_entropy(net(a), b)]
        fits = [(net(x).argmax(1) == y).double().mean(), (net(a).argmax(1) == b).double().mean()]
    found = reduced_landscape(net, x, y, a, b, alphas=[1.0], n_steps=0)
    got = [found.train_loss, found.test_loss, found.train_metric, found.test_metric]
    torch.testing.assert_close(torch.cat(got), torch.stack(expected + fits))
    torch.testing.assert_close(found.norm[0], as_vector(net).norm())


@pytest.mark.parametrize("loss", ["cross-entropy", "squares", "own"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_together_and_one_after_the_other_are_a_loop_by_hand(loss, batch_size):
    net, (x, y), (a, b) = mlp(), data(), data(30, seed=1)
    own = None
    if loss == "squares":
        y, b = F.one_hot(y, 2).double(), F.one_hot(b, 2).double()
    elif loss == "own":
        own = lambda out, y: F.multi_margin_loss(out, y)  # noqa: E731
    settings = {"alphas": [0.5, 3.0, 1.0], "loss_fn": own, "n_steps": 13, "lr": 1e-2, "betas": (0.8, 0.95)}
    settings["batch_size"] = batch_size
    before = as_vector(net)
    results = [
        reduced_landscape(
            net, x, y, a, b, **settings, vectorize=way, generator=torch.Generator().manual_seed(3)
        )
        for way in (True, False)
    ]
    assert torch.equal(as_vector(net), before)
    loss_fn = own or (F.mse_loss if loss == "squares" else F.cross_entropy)
    by_hand = []
    for alpha in settings["alphas"]:
        generator = torch.Generator().manual_seed(3)
        copied = scale_weights_(copy.deepcopy(net), alpha)
        norm = as_vector(copied).norm()
        optimizer = torch.optim.Adam(copied.parameters(), lr=1e-2, betas=(0.8, 0.95))
        rows = []
        for _ in range(13):
            if not rows:
                rows = (
                    list(torch.randperm(12, generator=generator).split(batch_size))
                    if batch_size
                    else [slice(None)]
                )
            chosen = rows.pop(0)
            optimizer.zero_grad()
            loss_fn(copied(x[chosen]), y[chosen]).backward()
            grad = torch.cat([p.grad.flatten() for p in copied.parameters()])
            along = grad @ as_vector(copied) / norm**2
            for p in copied.parameters():
                p.grad -= along * p.detach()
            optimizer.step()
            scale_weights_(copied, norm / as_vector(copied).norm())
        with torch.no_grad():
            by_hand.append([loss_fn(copied(x), y), loss_fn(copied(a), b)])
    for found in results:
        got = torch.stack([found.train_loss, found.test_loss], 1)
        torch.testing.assert_close(got, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.norm, torch.tensor([0.5, 3.0, 1.0]).double() * before.norm())
    torch.testing.assert_close(results[0].test_metric, results[1].test_metric)


def test_permuted_alphas_permute_the_curves():
    net, (x, y) = mlp(), data()
    there = reduced_landscape(net, x, y, x, y, alphas=[0.5, 1.0, 4.0], n_steps=20, lr=1e-2)
    back = reduced_landscape(net, x, y, x, y, alphas=torch.tensor([4.0, 1.0, 0.5]), n_steps=20, lr=1e-2)
    for name in ("alpha", "norm", "train_loss", "test_loss", "train_metric"):
        torch.testing.assert_close(getattr(there, name), getattr(back, name).flip(0))
    assert there.best_norm() == pytest.approx(back.best_norm())


def test_linear_least_squares_is_ridge_regression_on_the_sphere():
    """The least loss at norm w is at (A + mu)^-1 b with mu such that the norm is w: the secular equation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator).double()
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]).double() + 0.3 * torch.randn(
        30, 1, generator=generator
    )
    values, vectors = np.linalg.eigh((x.T @ x / 30).numpy())
    b = vectors.T @ (x.T @ y / 30)[:, 0].numpy()
    whole = np.linalg.norm(b / values)

    def exact(w):
        mu = brentq(lambda mu: np.linalg.norm(b / (values + mu)) - w, -values[0] + 1e-9, 1e6)
        theta = torch.from_numpy(vectors @ (b / (values + mu)))
        return float((x @ theta - y[:, 0]).square().mean())

    net = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, 0.5, -1.0, 0.7]]))
    radii = [0.3 * whole, 0.6 * whole, whole, 1.5 * whole]
    alphas = [w / float(net.weight.detach().norm()) for w in radii]
    found = reduced_landscape(net, x, y, x, y, alphas=alphas, lr=1e-1, n_steps=150).train_loss
    torch.testing.assert_close(
        found[:3], torch.tensor([exact(w) for w in radii[:3]]).double(), rtol=0, atol=1e-4
    )
    least = float(np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[1][0]) / 30
    assert float(found[2]) == pytest.approx(least, abs=2e-5)
    assert (found[:3].diff() < 0).all() and found[3] > found[2]


def test_the_best_of_each_curve_is_that_of_the_evaluations_on_the_way():
    net, (x, y), (a, b) = mlp(), data(), data(30, seed=1)
    settings = {"alphas": [0.5, 1.0, 8.0], "lr": 0.1}
    lasts = [reduced_landscape(net, x, y, a, b, **settings, n_steps=n) for n in (0, 4, 8, 10)]
    best = reduced_landscape(net, x, y, a, b, **settings, n_steps=10, eval_every=4, select="best")
    for name, pick in (
        ("train_loss", torch.amin),
        ("test_loss", torch.amin),
        ("train_metric", torch.amax),
        ("test_metric", torch.amax),
    ):
        torch.testing.assert_close(
            getattr(best, name), pick(torch.stack([getattr(last, name) for last in lasts]), 0)
        )


def test_a_model_that_vmap_does_not_take_is_named_and_runs_one_after_the_other():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(dtype=torch.float32)

        def forward(self, x):
            out = self.body(x)
            return out if out.sum().item() > 0 else -out

    x, y = data(dtype=torch.float32)
    with pytest.raises(ValueError, match="vectorize must be False"):
        reduced_landscape(Branching(), x, y, x, y, n_steps=2)
    found = reduced_landscape(Branching(), x, y, x, y, n_steps=2, vectorize=False)
    assert found.train_loss.shape == (11,) and bool(found.train_loss.isfinite().all())
    torch.testing.assert_close(found.alpha[[0, 5, 10]], torch.tensor([0.1, 1.0, 10.0]).double())


def test_a_parameter_that_is_not_used_counts_in_the_norm():
    net = mlp()
    net.spare = nn.Parameter(torch.full((3,), 2.0).double())
    x, y = data()
    found = reduced_landscape(net, x, y, x, y, alphas=[1.0], n_steps=3)
    torch.testing.assert_close(found.norm[0], as_vector(net).norm())


def made(norm, train, test, fit=None, score=None):
    norm, train, test = (torch.tensor(values, dtype=torch.float64) for values in (norm, train, test))
    fit = -train if fit is None else torch.tensor(fit, dtype=torch.float64)
    score = -test if score is None else torch.tensor(score, dtype=torch.float64)
    return ReducedLandscape(norm, norm, train, test, fit, score)


NORMS = [1.0, 10.0, 100.0, 1000.0]


def test_best_and_critical_norm_of_curves_drawn_by_hand():
    found = made(NORMS, [1, 0, 0, 0], [1.0, 0.2, 0.4, 2.0], score=[0.1, 0.9, 0.8, 0.4])
    assert found.best_norm() == 10
    assert found.critical_norm(0.6) == pytest.approx(10**2.5)  # halfway from 0.8 to 0.4
    assert found.critical_norm(0.8) == pytest.approx(100)
    assert found.critical_norm(0.4) == pytest.approx(1000)
    assert math.isnan(found.critical_norm(0.95))
    mixed = made(
        [100.0, 1.0, 1000.0, 10.0], [0, 1, 0, 0], [0.4, 1.0, 2.0, 0.2], score=[0.8, 0.1, math.nan, 0.9]
    )
    assert mixed.best_norm() == 10 and mixed.critical_norm(0.6) == pytest.approx(100)
    assert math.isnan(made([1.0], [math.nan], [math.nan]).best_norm())


@pytest.mark.parametrize(
    ("train", "test", "fit", "expected"),
    [
        ([1, 0, 0, 0], [1, 0.1, 0.5, 1], None, True),
        ([1, 0, 0.02, 0], [1, 0.1, 0.5, 1], None, True),
        ([1, 0, 0.2, 0], [1, 0.1, 0.5, 1], [0, 1, 1, 1], False),  # no L: it rises, though it fits
        ([1, 0, 0, 3], [1, 0.1, 0.5, 9], [0, 1, 1, 0.5], True),  # the last one did not train
        ([1, 0, 0, math.nan], [1, 0.1, 0.5, math.inf], [0, 1, 1, 0], True),
        ([1, 0, 2, 3], [1, 0.1, 5, 9], [0, 1, 0.2, 0.5], False),  # none beyond did
        ([1, 0.5, 0, 0], [1, 0.5, 0.2, 0.1], None, False),  # no U
        ([0, 0, 0, 0], [0.1, 0.5, 1, 2], None, False),
        ([1, 1, 1, 1], [1, 0.1, 0.5, 1], None, False),  # no L: it does not fall
        ([1, 0, 0, 0], [1, 0, 0.5, 1], None, True),
    ],
)
def test_an_l_and_a_u_are_told_from_other_curves(train, test, fit, expected):
    assert made(NORMS, train, test, fit).is_lu() is expected
    shuffled = [2, 0, 3, 1]
    parts = [[values[k] for k in shuffled] if values else values for values in (NORMS, train, test, fit)]
    assert made(*parts).is_lu() is expected


def test_the_networks_of_a_landscape_conform_to_their_kind(as_a_user):
    net, (x, y), (a, b) = (
        mlp(dtype=torch.float32),
        data(dtype=torch.float32),
        data(20, seed=1, dtype=torch.float32),
    )
    for way in (True, False):
        check_instrument(
            lambda net, x, a, way=way: reduced_landscape(
                net, x, y.to(x.device), a, b.to(x.device), alphas=[0.5, 2.0], n_steps=3, lr=1e-3, batch_size=5,
                vectorize=way, generator=torch.Generator().manual_seed(0),
            ),
            net, x, a,
        )  # fmt: skip


# --- bad input ---

NET, X, Y = mlp(dtype=torch.float32), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])


def zero():
    return scale_weights_(mlp(), 1.0).apply(
        lambda m: [nn.init.zeros_(p) for p in m.parameters(recurse=False)]
    )


def look(net=NET, x=X, y=Y, x_test=X, y_test=Y, **settings):
    return reduced_landscape(net, x, y, x_test, y_test, **{"n_steps": 1, **settings})


@pytest.mark.parametrize(("call", "words"), [
    (lambda: look(alphas=[]), "alphas must be a sequence of at least one real number"),
    (lambda: look(alphas=[1.0, 0.0]), "alphas must be finite and greater than 0"),
    (lambda: look(alphas=[math.nan]), "alphas must be finite and greater than 0"),
    (lambda: look(y=Y[:3]), "y must have a row for each of the 4 of x, got 3"),
    (lambda: look(x_test=X[:3]), "y_test must have a row for each of the 3 of x_test, got 4"),
    (lambda: look(x=X[:0], y=Y[:0]), "x must be a tensor of at least one row"),
    (lambda: look(x=X * math.nan), "x must be finite"),
    (lambda: look(net=nn.Linear(3, 1)), "model must return two or more columns for y of class indices"),
    (lambda: look(net=nn.Linear(3, 1), loss_fn=lambda out, y: out.sum()), "else give loss_fn and metric"),
    (lambda: look(y_test=Y + 1), r"y_test must be in 0\.\.1"),
    (lambda: look(y=Y.float()), "y_test must hold what y does"),
    (lambda: look(y=Y.float(), y_test=Y.float()), r"y must have the shape of the outputs, \(4, 2\), got \(4,\)"),
    (lambda: look(y=Y > 0), "y must hold class indices or real values, got dtype torch.bool"),
    (lambda: look(select="first"), "select must be one of 'last', 'best'"),
    (lambda: look(n_steps=-1), "n_steps must be an integer of at least 0"),
    (lambda: look(eval_every=0), "eval_every must be an integer of at least 1"),
    (lambda: look(batch_size=0), "batch_size must be an integer of at least 1"),
    (lambda: look(lr=0.0), "lr must be greater than 0"),
    (lambda: look(betas=(0.9, 1.0)), "betas must be in"),
    (lambda: look(betas=0.9), "betas must be two numbers"),
    (lambda: look(loss_fn=lambda out, y: out), "loss_fn must return a scalar tensor, got .*4, 2"),
    (lambda: look(loss_fn=lambda out, y: out.detach().sum()), "loss_fn must be differentiable"),
    (lambda: look(metric=lambda out, y: "good"), "metric must return a number, got 'good'"),
    (lambda: look(net=zero().float()), "model must have parameters that are not all zero"),
    (lambda: look(net=scale_weights_(mlp(dtype=torch.float32), 1e38)), "nor infinite times alphas"),
    (lambda: look(net=mlp(dtype=torch.float32).requires_grad_(False)), "model must have at least one trainable"),
    (lambda: made(NORMS, NORMS, NORMS).is_lu(-0.1), "tol must be in"),
])  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, words):
    with pytest.raises(ValueError, match=words):
        call()
