"""TukeyEM's guarantee exactly in one and two dimensions, and under attack; planted bugs break it."""

import math

import numpy as np
import pytest
from scipy import stats

from posterity.privacy import TukeyMechanism, tukey_depth
from posterity.privacy.tukey_em import _batch_models, _jittered
from posterity.testing import check_private


def mechanism(x, *, epsilon=2.0, delta=1e-3, jitter=0.0, **options):
    return TukeyMechanism(x, epsilon=epsilon, delta=delta, jitter=jitter, **options)


def cells(*sets):
    """Return middles and volumes of the cells that the coordinates of all models cut out: depth is constant in each."""
    edges = [np.unique(np.concatenate([x[:, j] for x in sets])) for j in range(sets[0].shape[1])]
    middles = np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij")
    volumes = np.meshgrid(*[np.diff(e) for e in edges], indexing="ij")
    return np.column_stack([each.ravel() for each in middles]), np.prod(volumes, axis=0).ravel()


# the guarantee, exactly

BUDGETS = ((4.0, 1e-2, 48), (4.0, 1e-2, 64), (2.0, 1e-3, 140))
GAP = {"growth": 1.2, "gap": 1.5}


def two_gaps(m, *, growth, gap):
    """Return models whose middle is a gap of 1 with a wider one at its right; the next set has it in the middle.

    The right tail grows, so that a model that goes from the left end to the right also moves k.
    """
    half = m // 2
    right = 1 + gap * growth ** np.arange(m - half - 1)
    x = np.r_[1e-3 * np.arange(1 - half, 1), 1.0, right]
    return x[:, None], np.r_[x[1:], 1e9][:, None]


def neighbours_of(m):
    """Yield pairs of sets of m models that differ in one."""
    rng = np.random.default_rng(m)
    sets = [
        rng.normal(size=m), rng.standard_cauchy(m), rng.exponential(size=m),
        np.r_[rng.normal(-5, 1, m // 2), rng.normal(5, 1, m - m // 2)],
        np.r_[rng.normal(0, 1e-4, 2 * m // 3), rng.normal(0, 1e3, m - 2 * m // 3)],
        np.where(np.arange(m) % 2, 1, -1) + rng.normal(0, 0.02, m),
    ]  # fmt: skip
    for x in map(np.sort, sets):
        quarter, middle = m // 4, m // 2
        for place, value in (
            (0, 1e6), (middle, 1e6), (m - 1, -1e6), (0, x[middle]), (quarter - 1, 1e6), (3 * quarter, -1e6),
            (quarter, x[quarter - 1] - 1e-3), (m - 1, x[middle] + 1e-6), (middle, x[quarter] - 1e-9),
        ):  # fmt: skip
            y = x.copy()
            y[place] = value
            yield x[:, None], y[:, None]
    yield two_gaps(m, **GAP)


def outcomes(made, middles, volumes, bug=""):
    """Return the probability of each cell, and last of no release, with a bug planted or without."""
    e = made._half_epsilon
    noise = stats.laplace(scale=(0.5 if bug == "half the noise" else 1.0) / e)
    passed = noise.sf(made.threshold - made.distance)
    density = np.exp(made.log_density(middles))
    if bug == "one level deeper":  # what the official code does: depth i is chosen, shell i + 1 is drawn from
        half, depth = made.n_models // 2, tukey_depth(middles, made._sorted)
        shell = np.minimum(depth, half)
        size = np.bincount(shell, volumes, minlength=half + 1)
        chosen = np.zeros(half + 1)
        chosen[made.depths] = np.exp(made.depth_log_probs)
        drawn = np.r_[0, chosen[:-1]]
        drawn[half] += chosen[half]
        density = np.where(depth > made.restricted_depth, drawn[shell] / size[shell], 0)
    return np.append(passed * density * volumes, 1 - passed)


def hockey_stick(x, y, *, epsilon, delta, promised=0.0, bug="", **options):
    """Return the larger of both hockey-stick divergences at what is promised, in deltas."""
    middles, volumes = cells(x, y)
    here, there = (
        outcomes(mechanism(z, epsilon=epsilon, delta=delta, **options), middles, volumes, bug) for z in (x, y)
    )
    factor = math.exp(promised or epsilon)
    return max(np.maximum(a - factor * b, 0).sum() for a, b in ((here, there), (there, here))) / delta


@pytest.mark.parametrize(("epsilon", "delta", "m"), BUDGETS)
def test_a_replaced_model_is_not_told_beyond_the_promise(epsilon, delta, m):
    moved = partial = 0
    for x, y in neighbours_of(m):
        assert hockey_stick(x, y, epsilon=epsilon, delta=delta) <= 1
        made = [mechanism(z, epsilon=epsilon, delta=delta) for z in (x, y)]
        moved += made[0].distance != made[1].distance
        partial += 0.02 < made[0].pass_probability < 0.98
        assert abs(made[0].distance - made[1].distance) <= 1
        if min(each.distance for each in made) < 0:  # unsafe sets hardly ever pass
            assert min(each.pass_probability for each in made) < delta
    assert moved > 5 and partial > 5  # else nothing was asked


@pytest.mark.parametrize(("epsilon", "delta", "m"), BUDGETS[1:])
def test_a_replaced_model_is_not_told_in_two_dimensions(epsilon, delta, m):
    rng, (x, y) = np.random.default_rng(0), two_gaps(m, **GAP)
    other = rng.permutation(np.sort(rng.standard_cauchy((m, 1))))
    for new in (other, np.r_[other[1:], [[1e6]]]):
        assert hockey_stick(np.c_[x, other], np.c_[y, new], epsilon=epsilon, delta=delta) <= 1


@pytest.mark.parametrize("m", [48, 140])
def test_a_model_added_or_taken_away_is_not_told_with_the_larger_exponent(m):
    for x, y in list(neighbours_of(m))[::3]:
        assert (m + 1) // 4 == m // 4
        for added in (
            1e7,
            -1e7,
            (x[m // 2 - 1, 0] + x[m // 2, 0]) / 2,
            (x[m // 4, 0] + x[m // 4 + 1, 0]) / 2,
        ):
            assert hockey_stick(x, np.r_[x, [[added]]], epsilon=2.0, delta=1e-3, neighbors="add-remove") <= 1
        assert hockey_stick(x, y, epsilon=2.0, delta=1e-3, promised=3.0, neighbors="add-remove") <= 1


BUGS = {
    "half the noise": {"bug": "half the noise"},
    "the exponent doubled": {"neighbors": "add-remove"},
    "one level deeper": {"bug": "one level deeper"},
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_planted_bug_breaks_the_promise(bug):
    worst = hockey_stick(*two_gaps(184, **GAP), epsilon=2.0, delta=1e-3, **BUGS[bug])
    assert worst > 10


def test_one_row_is_in_one_model_whatever_it_says():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(8, 20, 3)), rng.normal(size=(8, 20))
    for row, label in ((X[0, 0], 1e9), (np.array([1e300, -1e300, 0]), 1e300), (np.zeros(3), 0.0)):
        X2, y2 = X.copy(), y.copy()
        X2[3, 5], y2[3, 5] = row, label
        here, there = (
            _jittered(*_batch_models(*each, True), np.random.RandomState(0)) for each in ((X, y), (X2, y2))
        )
        np.testing.assert_array_equal(np.delete(here, 3, 0), np.delete(there, 3, 0))
        assert np.isfinite(there).all()


# the attack

AUDIT = {"epsilon": 2.0, "delta": 1e-3}


def attacked(bug="", runs=20_000, **options):
    """Return scores of releases on two neighbours: the logarithm of how much likelier each is here."""
    sets = two_gaps(184, **GAP)
    middles, volumes = cells(*sets)
    edges = np.unique(np.concatenate(sets))
    made = [mechanism(z, **AUDIT, **options) for z in sets]
    masses = [outcomes(each, middles, volumes, bug) for each in made]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.log(masses[0] / masses[1]), posinf=50, neginf=-50)
    scores = []
    for number, each in enumerate(made):
        draw = np.random.RandomState(number)
        passed, points = each._releases(runs, draw)
        if bug == "half the noise":
            passed = each.distance + draw.laplace(scale=0.5 / each._half_epsilon, size=runs) > each.threshold
        if bug == "one level deeper":
            points = middles[
                draw.choice(len(middles), runs, p=masses[number][:-1] / masses[number][:-1].sum())
            ]
        cell = np.clip(np.searchsorted(edges, points[:, 0]) - 1, 0, len(middles) - 1)
        scores.append(np.where(passed, ratio[cell], -100.0))
    return scores


def test_releases_are_not_told_apart_beyond_the_promise():
    assert 0.5 < check_private(*attacked(), **AUDIT) < AUDIT["epsilon"]  # the attack is no weak one


@pytest.mark.parametrize("bug", BUGS)
def test_the_attack_finds_each_planted_bug(bug):
    with pytest.raises(AssertionError, match=r"told apart with epsilon at least \d\.\d+, promised is 2"):
        check_private(*attacked(runs=60_000, **BUGS[bug]), **AUDIT)
