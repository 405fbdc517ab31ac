"""Integer tables: sums, floors, nearness, order among equals."""

import numpy as np
import pytest

from posterity._tables import integer_tables


@pytest.mark.parametrize(("n", "precision"), [(1, 0), (2, 1), (5, 12), (64, 6), (100, 24)])
def test_rows_sum_and_are_near(n: int, precision: int):
    probs = np.random.default_rng(0).dirichlet(np.full(n, 0.1), size=(3, 7)) * 5
    got = integer_tables(probs, precision)
    assert got.dtype == np.int64 and got.shape == probs.shape
    assert (got >= 1).all() and (got.sum(-1) == 2**precision).all()
    assert (np.abs(got - probs / 5 * (2**precision - n) - 1) < 1).all()


def test_remainders_go_to_the_largest_loss_and_the_first_among_equals():
    assert integer_tables(np.ones(3), 3).tolist() == [3, 3, 2]
    assert integer_tables(np.array([0.5, 0.3, 0.2]), 3).tolist() == [4, 2, 2]  # shares 2.5, 1.5, 1
    assert integer_tables(np.zeros((1, 4)), 4).tolist() == [[4, 4, 4, 4]]
    assert integer_tables(np.zeros((0, 4)), 4).shape == (0, 4)


@pytest.mark.parametrize("bad", [[-0.1, 1], [np.nan, 1], [np.inf, 1]])
def test_bad_rows(bad: list[float]):
    with pytest.raises(ValueError, match="finite and not negative"):
        integer_tables(np.array(bad), 8)
    with pytest.raises(ValueError, match="5 symbols"):
        integer_tables(np.ones(5), 2)
