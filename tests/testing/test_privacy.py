"""The attack on private releases finds what is there, and no more."""

import numpy as np
import pytest

from posterity.testing import check_private


def laplace(value: float, scale: float, seed: int, runs: int = 20_000) -> np.ndarray:
    return value + np.random.default_rng(seed).laplace(scale=scale, size=runs)


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_laplace_noise_keeps_its_promise_and_the_attack_comes_near(epsilon):
    bound = check_private(laplace(0, 1 / epsilon, 1), laplace(1, 1 / epsilon, 2), epsilon=epsilon)
    assert bound > 0.6 * epsilon


@pytest.mark.parametrize("swap", [False, True])
def test_half_the_noise_is_caught(swap):
    pair = [laplace(0, 0.5, 1), laplace(1, 0.5, 2)]
    with pytest.raises(AssertionError, match="at least"):
        check_private(*pair[:: -1 if swap else 1], epsilon=1.0)


def test_the_same_data_lose_nothing():
    assert check_private(laplace(0, 1, 1), laplace(0, 1, 2), epsilon=0.0) == 0


def test_what_fails_in_more_than_delta_of_the_cases_is_caught_and_what_does_not_is_not():
    rng = np.random.default_rng(0)
    told = np.where(rng.random(20_000) < 0.02, 9.0, 0.0)  # one in fifty says all
    assert check_private(told, np.zeros(20_000), epsilon=0.0, delta=0.03) == 0
    with pytest.raises(AssertionError, match="told apart"):
        check_private(told, np.zeros(20_000), epsilon=1.0, delta=0.005)


def test_the_bound_is_wrong_as_rarely_as_it_says():
    runs = [
        (laplace(0, 1, 2 * k, 400), laplace(1, 1, 2 * k + 1, 400)) for k in range(150)
    ]  # 95 %: at most 15 of 150 but for one case in a hundred
    wrong = sum(check_private(a, b, epsilon=np.inf, confidence=0.95) > 1.0 for a, b in runs)
    assert wrong <= 15


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"here": []}, "here must be at least 4 scores without NaN, got 0"),
        ({"there": [1.0, 2.0, np.nan, 3.0]}, "there must be at least 4 scores without NaN"),
        ({"delta": 1.0}, "delta must be in"),
        ({"confidence": 1.0}, "confidence must be in"),
    ],
)
def test_what_cannot_be_judged_is_refused(as_a_user, change, said):
    with pytest.raises(ValueError, match=said):
        check_private(**{"here": [0.0] * 9, "there": [1.0] * 9, "epsilon": 1.0, **change})


def test_infinite_scores_and_counts_are_scores():
    assert check_private([np.inf, *range(9)], [-np.inf, *range(9)], epsilon=5.0) == 0
