"""Bounds for federations: closed forms, limits, and that they hold as often as they say."""

import functools
import math

import mpmath
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import gamma
from scipy.stats import beta, binom

from posterity.federated import (
    Bounded,
    SubExponential,
    SubWeibull,
    deviation,
    estimate_gaps,
    fast_rate_bound,
    linear_rademacher,
    plan,
    two_level_bound,
)
from posterity.federated.federated_bounds import _kl_inverse

TAILS = [Bounded(2.0), SubExponential(0.7), SubWeibull(1.5, 0.7)]


def kl(a, b):
    terms = [(a, b), (1 - a, 1 - b)]
    return math.fsum(p * math.log(p / q) for p, q in terms if p > 0)


@pytest.mark.parametrize(("n", "delta"), [(1, 0.5), (37, 0.05), (10**6, 1e-9)])
def test_deviations_are_their_closed_forms(n, delta):
    u = math.log(1 / delta)
    assert deviation(n, delta, Bounded(3.0)) == pytest.approx(3 * math.sqrt(u / (2 * n)))
    assert deviation(n, delta, SubExponential(2.0)) == pytest.approx(8 * math.sqrt(u / n) + 4 * u / n)


@pytest.mark.parametrize("theta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.3, 1e-2, 1e-8])
def test_a_heavy_tail_costs_the_least_that_a_moment_gives(theta, delta):
    p = np.exp(np.linspace(math.log(2), math.log(169 / theta), 20_001))
    factor = gamma(theta * p + 1) ** (1 / p) * (2 / delta) ** (1 / p)
    least = (2 * np.sqrt((p - 1) / 50) * factor).min()
    assert deviation(50, delta, SubWeibull(theta, 1.0)) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("a", [0.0, 1e-12, 1e-3, 0.2, 0.5, 0.97, 1 - 1e-9])
@pytest.mark.parametrize("e", [1e-12, 1e-4, 0.1, 2.0, 30.0])
def test_the_inverse_of_kl_is_its_inverse_from_above(a, e):
    b = _kl_inverse(a, e)
    assert a <= b <= 1
    with mpmath.workdps(60):
        x, root = mpmath.mpf(a), mpmath.mpf(b)

        def exact(b):
            near = x * mpmath.log(x / b) if a else mpmath.mpf(0)
            return near + (1 - x) * mpmath.log((1 - x) / (1 - b))

        if b < 1:
            assert abs(exact(root) - e) <= 1e-9 * e + 1e-15 * (1 + abs(mpmath.diff(exact, root)))
        else:
            assert exact(1 - mpmath.mpf(10) ** -16) <= e * (1 + 1e-9)
    if 1e-4 < e < 1 and 1e-4 < a < 0.9:
        assert b == pytest.approx(brentq(lambda t: kl(a, t) - e, a, 1 - 1e-16, xtol=1e-15), rel=1e-9)


def test_at_no_empirical_risk_the_inverse_of_kl_is_an_exponential():
    for e in (1e-20, 1e-3, 1.0, 700.0):
        assert _kl_inverse(0.0, e) == pytest.approx(-math.expm1(-e), rel=1e-15)
    assert _kl_inverse(1.0, 0.5) == 1


def slow(risk=0.1, m=60, n=20, delta=0.05, size=2.0, tail=TAILS[0]):
    return two_level_bound(risk, m, n, delta=delta, tail=tail, log_class_size=size)


def fast(risk=0.1, m=60, n=20, delta=0.05, size=2.0):
    return fast_rate_bound(risk, m, n, delta=delta, log_class_size=size, loss_max=2.0)


def test_a_finite_class_is_a_union_bound_at_each_level():
    for tail in TAILS:
        found = slow(tail=tail)
        level = 0.05 / (2 * math.exp(2.0))
        assert found.participating == pytest.approx(0.1 + deviation(1200, level, tail))
        assert found.participation_gap == pytest.approx(deviation(60, level, tail))
        assert found.unparticipating == found.participating + found.participation_gap
    assert math.isfinite(slow(size=5000.0).unparticipating), "a class too large for a float"


def test_a_class_of_linear_predictors_is_bounded_by_its_complexity():
    complexity = linear_rademacher(60, 20, radius=2.0, feature_radius=3.0, lipschitz=0.5)
    assert complexity == pytest.approx((3 / math.sqrt(1200), 3 / math.sqrt(60)))
    found = two_level_bound(0.1, 60, 20, delta=0.05, tail=Bounded(2.0), rademacher=complexity)
    root = math.sqrt(math.log(40) / 2)
    assert found.participating == pytest.approx(0.1 + 2 * complexity[0] + 2 * root / math.sqrt(1200))
    assert found.participation_gap == pytest.approx(2 * complexity[1] + 2 * root / math.sqrt(60))


def test_complexities_of_linear_predictors_are_above_those_that_are_measured():
    """The supremum over the ball of a Rademacher average is radius times the norm of a signed mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    radius = np.linalg.norm(x, axis=1).max()
    signs = rng.choice([-1.0, 1.0], size=(2000, 200))
    measured = 2.0 * np.linalg.norm(signs @ x / 200, axis=1).mean()
    rows, _ = linear_rademacher(20, 10, radius=2.0, feature_radius=radius)
    assert 0.2 * rows < measured <= rows


@pytest.mark.parametrize("bound", [slow, fast])
def test_bounds_move_the_way_that_they_should(bound):
    base = bound().unparticipating
    assert bound(m=61).unparticipating < base and bound(n=21).unparticipating < base
    assert bound(risk=0.11).unparticipating > base and bound(size=2.1).unparticipating > base
    assert bound(delta=0.04).unparticipating > base
    many = bound(n=10**15)
    assert many.participating == pytest.approx(0.1, abs=1e-5)
    assert many.participation_gap > 0.1 * base, "rows alone leave the gap between clients"


@pytest.mark.parametrize("risk", [0.0, 0.01, 0.3, 1.0, 1.7])
def test_the_fast_bound_is_never_above_the_slow_one_on_clients_that_took_part(risk):
    assert fast(risk).participating <= slow(risk).participating
    if risk <= 0.01:
        assert fast(risk).unparticipating < slow(risk).unparticipating


def test_four_times_the_clients_quarter_the_fast_bound_and_halve_the_slow_one():
    few, many = fast(0.0, m=500, n=10**6), fast(0.0, m=2000, n=10**6)
    assert few.unparticipating / many.unparticipating == pytest.approx(4, rel=0.05)
    few, many = slow(0.0, m=500), slow(0.0, m=2000)
    assert few.unparticipating / many.unparticipating == pytest.approx(2, rel=1e-12)


def federations(draw_clients, draw_losses, bound, m=15, n=10, runs=300):
    """Return in how many federations the true risk of some hypothesis passes its bound."""
    failures = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        clients, truth = draw_clients(rng, m)  # (12, m), (12,)
        empirical = draw_losses(rng, clients, n).mean(axis=(1, 2))
        failures += any(t > bound(float(e)).unparticipating for t, e in zip(truth, empirical, strict=True))
    return failures


A = np.linspace(0.5, 3.0, 12)


@pytest.mark.parametrize("rate", ["slow", "fast"])
def test_of_twelve_models_none_is_above_its_bound_but_in_a_tenth_of_the_federations(rate):
    """Risks of clients are Beta, losses are coins; the true risk is the mean of the Beta."""
    bounds = {
        "slow": lambda e: two_level_bound(e, 15, 10, delta=0.1, tail=Bounded(), log_class_size=math.log(12)),
        "fast": lambda e: fast_rate_bound(e, 15, 10, delta=0.1, log_class_size=math.log(12)),
    }
    run = functools.partial(
        federations,
        lambda rng, m: (rng.beta(A[:, None], 3.0, size=(12, m)), A / (A + 3)),
        lambda rng, p, n: rng.random((*p.shape, n)) < p[..., None],
    )
    allowed = binom.ppf(0.999, 300, 0.1)
    assert run(bounds[rate]) <= allowed
    # planted: a bound that forgets the class, or the clients, fails
    forgetful = {
        "slow": lambda e: two_level_bound(e, 1500, 10, delta=0.1, tail=Bounded(), log_class_size=0.0),
        "fast": lambda e: fast_rate_bound(e, 1500, 10, delta=0.1, log_class_size=0.0),
    }
    assert run(forgetful[rate]) > allowed


@pytest.mark.parametrize("tail", [SubExponential(2.0), SubWeibull(1.5, 1.0)])
def test_losses_with_tails_keep_their_bound(tail):
    """Laplace losses of scale 1 have E exp(|l| / 2) = 2; |normal|^3 has the tail of theta 3/2."""
    scale = 1.0 if isinstance(tail, SubExponential) else 2.0**-1.5
    mean = 0.0 if isinstance(tail, SubExponential) else math.sqrt(8 / math.pi) * scale

    def losses(rng, clients, n):
        if isinstance(tail, SubExponential):
            return rng.laplace(scale=scale, size=(*clients.shape, n))
        return np.abs(rng.normal(size=(*clients.shape, n))) ** 3 * scale

    failures = federations(
        lambda rng, m: (np.zeros((12, m)), np.full(12, mean)), losses,
        lambda e: two_level_bound(e, 15, 10, delta=0.1, tail=tail, log_class_size=math.log(12)),
    )  # fmt: skip
    assert failures <= binom.ppf(0.999, 300, 0.1)


def test_tails_are_what_they_say_of_these_losses():
    with mpmath.workdps(20):
        assert mpmath.quad(lambda t: mpmath.e ** (t / 2 - t), [0, mpmath.inf]) == pytest.approx(2)
    t = np.linspace(0.01, 30, 1000)
    tail = 2 * beta.sf(0, 1, 1) * np.exp(-(t ** (1 / 1.5)))
    normal = np.array([math.erfc(float((x * 2**1.5) ** (1 / 3)) / math.sqrt(2)) for x in t])
    assert (normal <= tail + 1e-15).all()


def test_gaps_are_differences_of_means_over_clients():
    rng = np.random.default_rng(0)
    train, test, unseen = ([rng.random(rng.integers(1, 9)) for _ in range(k)] for k in (7, 7, 4))
    found = estimate_gaps(train, test, unseen)
    means = [np.array([part.mean() for part in parts]) for parts in (train, test, unseen)]
    gap = means[1] - means[0]
    assert found.out_of_sample == pytest.approx((gap.mean(), gap.std(ddof=1) / math.sqrt(7)))
    error = math.sqrt(means[1].var(ddof=1) / 7 + means[2].var(ddof=1) / 4)
    assert found.participation == pytest.approx((means[2].mean() - means[1].mean(), error))
    error = math.sqrt(means[0].var(ddof=1) / 7 + means[2].var(ddof=1) / 4)
    assert found.unparticipating == pytest.approx((means[2].mean() - means[0].mean(), error))
    assert found.out_of_sample.value + found.participation.value == pytest.approx(found.unparticipating.value)
    one = estimate_gaps([[1.0]], [[2.0]], [[3.0]])
    assert one.participation.value == 1 and math.isnan(one.participation.standard_error)
    whole = estimate_gaps(np.ones((3, 4)), np.zeros((3, 2)), np.ones((5, 1), dtype=int))
    assert whole.out_of_sample == (-1, 0)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"log_class_size": 3.0}, slow),
        ({"log_class_size": 3.0, "rate": "fast"}, fast),
        ({"log_class_size": 3.0, "tail": SubWeibull(2.0, 0.01)}, slow),
        ({"rademacher": linear_rademacher(50, 30, radius=1.0, feature_radius=0.3)}, slow),
    ],
)
@pytest.mark.parametrize("clients", ["participating", "unparticipating"])
def test_a_plan_is_the_least_that_reaches_the_target(options, bound, clients):
    def value(m, n):
        size, tail = options.get("log_class_size"), options.get("tail", Bounded())
        if bound is fast:
            found = fast_rate_bound(0.02, m, n, delta=0.1, log_class_size=size)
        else:
            given = "rademacher" in options
            complexity = linear_rademacher(m, n, radius=1.0, feature_radius=0.3) if given else None
            found = two_level_bound(
                0.02, m, n, delta=0.1, tail=tail, log_class_size=size, rademacher=complexity
            )
        return getattr(found, clients)

    found = plan(50, 30, target=0.07, empirical_risk=0.02, delta=0.1, clients=clients, **options)
    assert found.m is not None
    assert value(found.m, 30) <= 0.07
    assert found.m == 1 or value(found.m - 1, 30) > 0.07
    if found.n is None:
        assert value(50, 2**60) > 0.07 and "no number of rows does" in found.message
    else:
        assert value(50, found.n) <= 0.07 and (found.n == 1 or value(50, found.n - 1) > 0.07)
    assert found.n is not None or clients == "unparticipating"


def test_what_is_below_the_empirical_risk_cannot_be_reached():
    found = plan(50, 30, target=0.02, empirical_risk=0.02, delta=0.1, log_class_size=0.0)
    assert (found.m, found.n) == (None, None)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: deviation(0, 0.1, Bounded()), "n must be an integer of at least 1"),
        (lambda: deviation(3, 1.0, Bounded()), "delta must be in"),
        (lambda: deviation(3, 0.1, 1.0), "tail must be Bounded, SubExponential or SubWeibull"),
        (lambda: Bounded(0.0), "max must be greater than 0"),
        (lambda: SubExponential(-1.0), "scale must be greater than 0"),
        (lambda: SubWeibull(0.0, 1.0), "theta must be greater than 0"),
        (lambda: SubWeibull(1.0, math.nan), "scale"),
        (lambda: slow(risk=2.1), "empirical_risk must be in"),
        (lambda: slow(risk=math.nan), "empirical_risk"),
        (lambda: slow(risk=math.nan, tail=TAILS[1]), "empirical_risk"),
        (lambda: slow(m=0), "m must be"),
        (lambda: fast(n=0), "n must be"),
        (lambda: fast(delta=0.0), "delta"),
        (lambda: fast(size=-0.1), "log_class_size must be at least 0"),
        (lambda: two_level_bound(0.1, 3, 3, delta=0.1, tail=Bounded()), "got neither"),
        (lambda: two_level_bound(0.1, 3, 3, delta=0.1, tail=Bounded(), log_class_size=1.0, rademacher=(0.1, 0.1)), "got both"),
        (lambda: two_level_bound(0.1, 3, 3, delta=0.1, tail=TAILS[1], rademacher=(0.1, 0.1)), "needs bounded losses: the step"),
        (lambda: two_level_bound(0.1, 3, 3, delta=0.1, tail=Bounded(), rademacher=(-0.1, 0.1)), "rademacher must be at least 0"),
        (lambda: linear_rademacher(3, 3, radius=-1.0, feature_radius=1.0), "radius must be at least 0"),
        (lambda: estimate_gaps([], [], [[1.0]]), "train_losses must hold at least one client"),
        (lambda: estimate_gaps([[1.0]], [[1.0], [2.0]], [[1.0]]), "the same clients, got 1 and 2"),
        (lambda: estimate_gaps([[1.0]], [[1.0]], [[1.0], []]), "unseen_losses must hold a sequence of losses a client, client 1"),
        (lambda: estimate_gaps([[1.0], [2.0, math.nan]], [[1.0]] * 2, [[1.0]]), "train_losses must be finite, client 1"),
        (lambda: estimate_gaps([[1.0]], [[1.5]], [[1.0]], loss_max=1.0), "test_losses must be at most loss_max 1.0, got 1.5"),
        (lambda: plan(5, 5, target=0.1, delta=0.1, log_class_size=1.0, rate="fast", tail=TAILS[1]), "needs bounded losses"),
        (lambda: plan(5, 5, target=0.1, delta=0.1, rate="fast"), "takes log_class_size"),
        (lambda: plan(5, 5, target=math.nan, delta=0.1, log_class_size=1.0), "target"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()
