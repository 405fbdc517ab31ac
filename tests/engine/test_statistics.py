"""The verdict rule against scipy and by its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from posterity.engine.statistics import (
    describe_range,
    judge_bound,
    judge_comparison,
    judge_trend,
    seeds_to_settle,
    summary,
)

values = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(values)
def test_the_interval_is_students(xs):
    got = summary(xs)
    assert got["mean"] == pytest.approx(np.mean(xs))
    if np.std(xs) > 1e-9:
        low, high = stats.ttest_1samp(xs, 0).confidence_interval(0.95)
        assert got["ci95"] == pytest.approx([low, high])


@given(values, values)
def test_swapping_the_arms_swaps_the_verdict(a, b):
    n = min(len(a), len(b))
    swap = {"holds": "fails", "fails": "holds", "inconclusive": "inconclusive"}
    effect, verdict = judge_comparison(a[:n], b[:n], "lower")
    back, other = judge_comparison(b[:n], a[:n], "lower")
    assert other == swap[verdict]
    assert back["mean"] == pytest.approx(-effect["mean"])
    assert judge_comparison(a[:n], b[:n], "higher")[1] == swap[verdict]


def test_differences_are_paired():
    baseline = [1.0, 10.0, 100.0, 1000.0]
    method = [x - 0.1 for x in baseline]
    assert judge_comparison(baseline, method, "lower")[1] == "holds"
    assert judge_comparison(baseline, method[::-1], "lower")[1] == "inconclusive"


def test_no_difference_and_one_seed_are_inconclusive():
    assert judge_comparison([1.0, 2.0], [1.0, 2.0], "lower")[1] == "inconclusive"
    assert judge_comparison([1.0], [0.0], "lower")[1] == "inconclusive"
    assert judge_trend([0.5], 0, 1) == "inconclusive"


def test_a_bound_may_be_reached_but_never_passed():
    assert judge_bound([0.5, 1.0], 1.0, "lower") == "holds"
    assert judge_bound([0.5, 0.5, 1.0001], 1.0, "lower") == "fails"
    assert judge_bound([1.0, 2.0], 1.0, "higher") == "holds"
    assert judge_bound([0.9, 2.0], 1.0, "higher") == "fails"


def test_a_trend_holds_inside_fails_outside_and_else_is_inconclusive():
    assert judge_trend([0.4, 0.5, 0.6], 0.0, 1.0) == "holds"
    assert judge_trend([2.0, 2.1, 2.2], 0.0, 1.0) == "fails"
    assert judge_trend([0.8, 1.0, 1.2], 0.0, 1.0) == "inconclusive"
    assert judge_trend([-0.9, -1.0, -1.0], None, -0.8) == "holds"
    assert judge_trend([-0.9, -1.0, -1.0], -0.8, None) == "fails"
    assert describe_range([None, -0.8]) == "at most -0.8"
    assert describe_range([0, 1]) == "between 0 and 1"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_an_error_and_never_a_zero(bad):
    assert judge_comparison([1.0, bad], [0.0, 0.0], "lower")[1] == "error"
    assert judge_bound([bad, 0.0], 1.0, "lower") == "error"
    assert judge_trend([bad, 0.0], 0, 1) == "error"


@pytest.mark.parametrize("count", [2, 5, 31, 32, 200])
def test_the_quantile_is_students_with_and_without_the_table(count):
    xs = [float(value) for value in range(count)]
    low, high = stats.t.interval(0.95, count - 1, np.mean(xs), stats.sem(xs))
    assert summary(xs)["ci95"] == pytest.approx([low, high], rel=1e-12)


def test_as_many_seeds_as_would_settle_it_settle_it_and_one_fewer_do_not():
    """With the mean and spread of what was seen, the interval leaves the edge at that count."""
    seen, edges = [0.5, -0.4, 1.0, 0.1, 0.3], [0.0]
    count = seeds_to_settle(seen, edges)
    mean, spread = np.mean(seen), np.std(seen, ddof=1)
    for n, settled in ((count, True), (count - 1, False)):
        half = stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n)
        assert (half < mean) == settled
    assert seeds_to_settle(seen, [0.0, 0.4], most=10_000) > count, "the nearest edge decides"
    assert seeds_to_settle([1.0, -1.0], edges) is None
