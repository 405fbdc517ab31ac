"""Epsilon from scores, by definition and valid; that of Gaussian noise, by integration."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binom, binomtest, norm

from posterity.privacy import empirical_epsilon, gaussian_epsilon


def by_definition(present, absent, delta, threshold="max"):
    """Return the point estimate by loops over thresholds."""
    best = (0.0, min([*present, *absent]))
    for t in sorted({*present, *absent}):
        fnr, fpr = np.mean([s < t for s in present]), np.mean([s >= t for s in absent])
        if fnr == 0 and fpr == 0:
            value = math.inf
        elif fnr == 0 or fpr == 0:
            continue
        else:
            value = math.log(max((1 - delta - fpr) / fnr, (1 - delta - fnr) / fpr, 1))
        if value > best[0]:
            best = (value, t)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_estimate_is_the_best_of_all_thresholds_with_exact_limits(seed):
    draw = np.random.default_rng(seed)
    present, absent = draw.normal(draw.uniform(0, 3), 1, 30).round(1), draw.normal(0, 1, 50).round(1)
    found = empirical_epsilon(present, absent, delta=0.02, confidence=0.9)
    value, at = by_definition(present, absent, 0.02)
    assert (found.value, found.threshold) == (pytest.approx(value), at)
    k, j = (present < at).sum(), (absent >= at).sum()
    assert (found.fnr, found.fpr) == (k / 30, j / 50)
    fnr, fpr = (
        binomtest(int(c), n).proportion_ci(0.9) for c, n in ((k, 30), (j, 50))
    )  # Clopper and Pearson's

    def epsilon(fpr, fnr):
        return math.log(max((0.98 - fpr) / fnr, (0.98 - fnr) / fpr, 1)) if fpr and fnr else math.inf

    assert found.lower == pytest.approx(epsilon(fpr.high, fnr.high))
    assert found.upper == pytest.approx(epsilon(fpr.low, fnr.low))
    assert found.lower <= found.value <= found.upper
    assert found == empirical_epsilon(present.tolist(), torch.from_numpy(absent), delta=0.02, confidence=0.9)


def test_scores_in_other_units_show_the_same():
    draw = np.random.default_rng(3)
    present, absent = draw.normal(1, 0.5, 60), draw.normal(0, 0.5, 40)
    for threshold in ("max", 0.5):
        one = empirical_epsilon(present, absent, threshold=threshold)
        moved = 8 * threshold - 3 if threshold != "max" else threshold
        other = empirical_epsilon(8 * present - 3, 8 * absent - 3, threshold=moved)
        assert (one.value, one.lower, one.upper) == (other.value, other.lower, other.upper)


def test_without_an_error_the_value_is_infinite_and_the_lower_limit_that_of_two_times_50_rounds():
    found = empirical_epsilon(torch.full((50,), 2.0), torch.zeros(50))
    assert (found.value, found.upper, found.threshold) == (math.inf, math.inf, 2.0)
    rate = 1 - 0.025 ** (1 / 50)  # of which none in fifty are seen with probability 0.025
    assert found.lower == pytest.approx(math.log((0.99 - rate) / rate), rel=1e-12)
    assert found.lower == pytest.approx(2.5588, abs=5e-5)


def test_where_nothing_is_told_apart_there_is_no_epsilon():
    for threshold in ("max", -5.0, 1.0, 5.0):
        found = empirical_epsilon([1.0, 1.0], [1.0, 1.0, 1.0], threshold=threshold)
        assert (found.value, found.lower) == (0, 0)


def test_sizes_differ_and_false_positives_are_shares_of_their_own():
    found = empirical_epsilon([1.0] * 9 + [0.0], [1.0] + [0.0] * 99, delta=0.0, threshold=0.5)
    assert found.value == pytest.approx(math.log(0.9 / 0.01))


@pytest.mark.parametrize(("s", "best"), [(0.3, False), (1.0, True)])
def test_the_lower_limit_is_valid_at_a_fixed_threshold(s, best):
    """At one half and at the best of all, it passes the truth in at most 5 % of 1000 repeats."""
    draw, delta, wrong = np.random.default_rng(0), 1e-2, 0
    epsilon = gaussian_epsilon(s, delta)
    threshold = 0.5 + s * s * epsilon if best else 0.5
    for _ in range(1000):
        present, absent = draw.normal(1, s, 200), draw.normal(0, s, 200)
        wrong += empirical_epsilon(present, absent, delta=delta, threshold=threshold).lower > epsilon
    assert wrong <= binom.ppf(0.999, 1000, 0.05)


def test_the_lower_limit_is_valid_and_not_idle_where_the_threshold_is_all_there_is():
    """Randomised response at epsilon 1: one rate alone decides, so a limit is wrong in up to 2.5 % of repeats."""
    draw, epsilon, wrong, lowers = np.random.default_rng(1), 1.0, 0, []
    lie = 1 / (1 + math.exp(epsilon))
    for _ in range(1000):
        present, absent = draw.random(4000) >= lie, draw.random(4000) < lie
        lowers.append(empirical_epsilon(present, absent, delta=0.0, threshold=0.5).lower)
        wrong += lowers[-1] > epsilon
    assert wrong <= binom.ppf(0.999, 1000, 0.05)
    assert np.mean(lowers) > 0.85


def test_the_usual_estimate_shows_something_where_there_is_nothing_and_the_lower_limit_does_not():
    """Which is why a threshold can be given, and why the value alone is no evidence."""
    draw, usual, certain = np.random.default_rng(2), [], 0
    for _ in range(300):
        present, absent = draw.normal(size=(2, 50))
        usual.append(empirical_epsilon(present, absent, delta=0.0).value)
        certain += empirical_epsilon(present, absent, delta=0.0, threshold=0.5).lower > 0
    assert np.median(usual) > 0.5
    assert certain <= binom.ppf(0.999, 300, 0.05)


# Epsilon of Gaussian noise.


def divergence(s, epsilon):
    """Return the hockey-stick divergence of N(1, s^2) from N(0, s^2), by integration."""

    def excess(x):
        return max(norm.pdf(x, 1, s) - math.exp(epsilon) * norm.pdf(x, 0, s), 0)

    from_here = 0.5 + s * s * epsilon
    return quad(excess, from_here, from_here + 12 * s, epsabs=0, epsrel=1e-11)[0]


@pytest.mark.parametrize("s", [0.3, 0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_gaussian_epsilon_is_where_the_integral_of_the_divergence_is_delta(s, delta):
    assert divergence(s, gaussian_epsilon(s, delta)) == pytest.approx(delta, rel=1e-7)


def test_gaussian_epsilon_falls_with_noise_and_with_delta():
    by_noise = [gaussian_epsilon(s, 1e-3) for s in np.geomspace(1e-3, 100, 60)]
    by_delta = [gaussian_epsilon(0.7, d) for d in np.geomspace(1e-300, 0.5, 60)]
    assert np.all(np.diff(by_noise) < 0)
    assert np.all(np.diff(by_delta) < 0)
    assert [round(gaussian_epsilon(s, 1e-2), 3) for s in (0.3, 0.5, 1.0, 2.0)] == [
        12.558,
        5.998,
        2.318,
        0.919,
    ]


def test_gaussian_epsilon_at_the_ends():
    assert (
        gaussian_epsilon(0.0, 0.1) == gaussian_epsilon(1.0, 0.0) == gaussian_epsilon(1e-200, 0.1) == math.inf
    )
    apart = 2 * norm.cdf(0.25) - 1  # total variation at s = 2: from there on nothing is told apart
    assert gaussian_epsilon(2.0, apart * (1 + 1e-9)) == 0 < gaussian_epsilon(2.0, apart * (1 - 1e-6)) < 1e-5


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_the_bound_by_renyi_is_that_of_opacus_and_not_below_the_exact_one(s):
    """With orders on a grid it is at most a little above the conversion at the best order, in closed form."""
    pytest.importorskip("opacus", reason="opacus is optional")
    found, order = gaussian_epsilon(s, 1e-2, accountant="rdp"), np.linspace(1.01, 60, 100_000)
    bounds = order / (2 * s * s) + np.log1p(-1 / order) - (math.log(1e-2) + np.log(order)) / (order - 1)
    assert bounds.min() * (1 - 1e-9) <= found <= 1.01 * bounds.min()
    assert found > gaussian_epsilon(s, 1e-2)


def test_opacus_is_asked_for_one_release_without_sampling(monkeypatch):
    class RDPAccountant:
        def get_epsilon(self, delta):
            return (self.history, delta) == ([(0.5, 1.0, 1)], 0.01)

    stand_in = types.SimpleNamespace(RDPAccountant=RDPAccountant)
    monkeypatch.setitem(sys.modules, "opacus", types.SimpleNamespace(accountants=stand_in))
    monkeypatch.setitem(sys.modules, "opacus.accountants", stand_in)
    assert gaussian_epsilon(0.5, 0.01, accountant="rdp") == 1.0
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ModuleNotFoundError, match="pip install opacus"):
        gaussian_epsilon(0.5, 0.01, accountant="rdp")
