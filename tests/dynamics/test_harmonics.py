"""Sums of spherical harmonics against scipy's polynomials, and against harmonics built by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.special import eval_gegenbauer, eval_legendre, sph_harm_y

from posterity.dynamics._harmonics import area, count, zonal


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_zonal_polynomials_are_gegenbauers_with_value_1_at_1(dim):
    t = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for degree, found in enumerate(zonal(t, 12, dim)):
        if dim == 2:
            expected = np.cos(degree * np.arccos(t.numpy()))
        else:
            order = (dim - 2) / 2
            expected = eval_gegenbauer(degree, order, t.numpy()) / eval_gegenbauer(degree, order, 1.0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert len(list(zonal(t, 0, dim))) == 1


def test_the_addition_theorem_holds_for_explicit_harmonics_and_for_legendres_polynomials():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    polar, around = np.arccos(x[:, 2]), np.arctan2(x[:, 1], x[:, 0])
    for degree, found in enumerate(zonal(torch.from_numpy(x @ x.T), 5, 3)):
        orders = np.stack([sph_harm_y(degree, m, polar, around) for m in range(-degree, degree + 1)])
        np.testing.assert_allclose(
            (orders.T @ orders.conj()).real, count(degree, 3) / area(3) * found.numpy(), atol=1e-12
        )
        np.testing.assert_allclose(found.numpy(), eval_legendre(degree, x @ x.T), atol=1e-12)


def test_areas_and_numbers_of_harmonics():
    assert area(2) == pytest.approx(2 * math.pi)
    assert area(3) == pytest.approx(4 * math.pi)
    assert area(4) == pytest.approx(2 * math.pi**2)
    assert [count(degree, 2) for degree in range(4)] == [1, 2, 2, 2]
    assert [count(degree, 3) for degree in range(4)] == [1, 3, 5, 7]
    for dim in (4, 5, 8):  # polynomials of a degree, less those that |x|^2 divides
        for degree in range(2, 7):
            free = math.comb(degree + dim - 1, dim - 1) - math.comb(degree + dim - 3, dim - 1)
            assert count(degree, dim) == free
