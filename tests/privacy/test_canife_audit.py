"""CANIFE's audit: what a canary crafted on digits does, scores by hand, and half of the noise is caught."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from posterity.privacy import (
    Canary,
    audit_round,
    canary_loss,
    canary_score,
    client_updates,
    craft_canary,
    empirical_epsilon,
    gaussian_epsilon,
)
from posterity.testing import check_private


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(*layers, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(*(layer() for layer in layers))
    return made


# A canary crafted on digits.


@pytest.fixture(scope="module")
def federation():
    """A network after 200 steps on digits, updates of 224 clients of eight, and a canary crafted on 60 of them."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    model = network(lambda: nn.Linear(64, 64), nn.ReLU, lambda: nn.Linear(64, 10))
    adam, draw = torch.optim.Adam(model.parameters(), lr=1e-3), rng()
    for _ in range(200):
        some = torch.randint(len(x), (64,), generator=draw)
        adam.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        adam.step()
    order = torch.randperm(1792, generator=draw).split(8)
    updates = client_updates(model, [(x[some], y[some]) for some in order])
    start = torch.rand(1, 64, generator=draw)
    canary = craft_canary(model, updates[:60], start, torch.tensor([3]), n_steps=400, lr=0.05)
    return model, updates, canary


def test_crafting_lowers_what_clients_send_along_the_gradient_fifty_fold(federation):
    model, updates, canary = federation
    before, after = (
        float(canary_loss(g, updates[:60], norm_floor=0.0)) for g in (canary.initial_grad, canary.grad)
    )
    assert after < before / 50
    assert canary.health > 0.98
    assert float(canary.losses[0]) == pytest.approx(
        float(canary_loss(canary.initial_grad, updates[:60])), rel=1e-5
    )
    loss = F.cross_entropy(model(canary.x), canary.y)
    exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(canary.grad, exact)


def test_on_other_clients_scores_spread_little_more_than_the_noise(federation):
    _, updates, canary = federation
    spread = {
        name: audit_round(
            updates[60:],
            g,
            clip=1.0,
            noise_multiplier=0.3,
            clients_per_round=50,
            n_tests=2000,
            generator=rng(),
        ).scores_without.std()
        for name, g in (("random", canary.initial_grad), ("crafted", canary.grad))
    }
    assert 0.3 * 0.95 < spread["crafted"] < 0.3 * 1.2
    assert spread["random"] > 0.6


def test_health_is_the_share_of_the_loss_that_is_gone():
    one = torch.ones(1, 2)
    canary = Canary(one, one, one[0], one, one[0], torch.tensor([4.0, 2.0, 1.0]))
    assert canary.health == 0.75
    assert Canary(one, one, one[0], one, one[0], torch.zeros(3)).health == 1


# The audit.


def test_the_score_is_the_projection_in_clips():
    g, aggregate = torch.randn(9, generator=rng()), torch.randn(9, generator=rng(1))
    expected = float(np.dot(g.numpy() / np.linalg.norm(g.numpy()), aggregate.numpy())) / 0.4
    assert canary_score(g, aggregate, clip=0.4) == pytest.approx(expected, rel=1e-5)
    assert canary_score(1e25 * g, aggregate, clip=0.4) == pytest.approx(expected, rel=1e-5)


def audit(updates, canary, noise, n_tests=100, seed=0, **options):
    given = {"clip": 1.0, "clients_per_round": 20, "generator": rng(seed), **options}
    return audit_round(updates, canary, noise_multiplier=noise, n_tests=n_tests, **given)


def test_whole_sums_and_projections_are_the_same_rounds(federation):
    _, updates, canary = federation
    short, whole = (audit(updates[60:], canary, 0.0, exact=exact) for exact in (False, True))
    torch.testing.assert_close(short.scores_with, whole.scores_with, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short.scores_without, whole.scores_without, rtol=1e-4, atol=1e-5)
    assert whole.theoretical == math.inf
    few, g = updates[60:, :4000:100].contiguous(), canary.grad[:4000:100]
    assert few.any()
    for part in ("scores_with", "scores_without"):  # with noise, in distribution
        scores = [getattr(audit(few, g, 0.3, 500, 1, exact=exact), part) for exact in (False, True)]
        assert ks_2samp(*(each.numpy() for each in scores)).pvalue > 1e-3


def test_clients_are_drawn_without_replacement_and_alike():
    updates = torch.diag(torch.arange(1.0, 9.0) / 8)  # scores along (1, .., 1) name who took part
    found = audit(updates, torch.ones(8), 0.0, 4000, clients_per_round=3)
    sums = (found.scores_without * 8**0.5 * 8).round()
    assert sums.min() >= 6
    assert sums.max() <= 21
    assert float(sums.mean()) == pytest.approx(13.5, abs=4 * (3 * 5.25 * 5 / 7) ** 0.5 / 2000**0.5)
    everyone = audit(updates, torch.ones(8), 0.0, clients_per_round=8)
    assert everyone.scores_without.std() < 1e-6
    torch.testing.assert_close(everyone.scores_with, everyone.scores_without + 1)


def test_a_short_gradient_counts_as_far_as_its_client_sends_it():
    found = audit(torch.zeros(30, 2), torch.tensor([0.0, 0.5]), 0.0, lr=0.4, clip=2.0)
    torch.testing.assert_close(found.scores_with, torch.full((50,), 0.1, dtype=torch.float64))
    assert not found.scores_without.any()


def test_a_perfect_canary_is_seen_up_to_the_promise_and_half_of_the_noise_is_caught():
    """The audit by `check_private`: it stays below the promise, comes near it, and finds a server that cheats."""
    updates, g, delta = torch.zeros(30, 2), torch.tensor([0.0, 3.0]), 1e-2
    for noise in (1.0, 2.0):
        promised = gaussian_epsilon(noise, delta)
        honest = audit(updates, g, noise, 20_000, delta=delta)
        assert honest.theoretical == promised
        assert float(honest.scores_with.mean()) == pytest.approx(1, abs=0.04)
        assert float(honest.scores_without.std()) == pytest.approx(noise, rel=0.03)
        scores = honest.scores_with.numpy(), honest.scores_without.numpy()
        assert promised > check_private(*scores, epsilon=promised, delta=delta) > 0.5 * promised
        best = 0.5 + noise**2 * promised
        own = empirical_epsilon(*scores, delta=delta, confidence=0.99, threshold=best)
        assert promised > own.lower > 0.5 * promised
        half = audit(updates, g, noise / 2, 20_000, delta=delta)
        with pytest.raises(AssertionError, match="told apart"):
            check_private(
                half.scores_with.numpy(), half.scores_without.numpy(), epsilon=promised, delta=delta
            )
        threshold = 0.5 + noise
        shown = empirical_epsilon(
            half.scores_with, half.scores_without, delta=delta, confidence=0.99, threshold=threshold
        )
        assert shown.lower > promised


def test_a_real_canary_stays_below_the_promise(federation):
    _, updates, canary = federation
    found = audit(updates[60:], canary, 1.0, 10_000, clients_per_round=50, delta=1e-2)
    scores = found.scores_with.numpy(), found.scores_without.numpy()
    assert check_private(*scores, epsilon=found.theoretical, delta=1e-2) > 0.4 * found.theoretical
    same = audit(updates[60:], canary, 1.0, 10_000, clients_per_round=50, delta=1e-2)
    assert torch.equal(same.scores_with, found.scores_with)
