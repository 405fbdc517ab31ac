"""Directions and sliced distances against closed forms, POT and the laws of large numbers."""

import math

import numpy as np
import ot
import pytest
import torch

from posterity.testing import check_loss, check_metric
from posterity.transport import QuasiSlicedWasserstein, sliced_wasserstein, sphere_points
from posterity.transport.quasi_sliced_wasserstein import _energy, _rotations, _spiral

METHODS = ["gaussian", "equal-area", "spiral", "distance", "coulomb", "random"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(n, *batch, seed=0, d=3):
    return torch.randn(*batch, n, d, generator=rng(seed), dtype=torch.float64)


# Point sets.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 37])
def test_points_are_unit_and_follow_the_dtype(method, n):
    points = sphere_points(n, method, generator=rng(), dtype=torch.float64)
    assert points.shape == (n, 3)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(n, dtype=torch.float64))
    assert sphere_points(n, method).dtype == torch.float32


def test_the_spiral_is_its_formula():
    for k, point in enumerate(sphere_points(10, dtype=torch.float64).tolist(), start=1):
        z = 1 - (2 * k - 1) / 10
        down, around = math.acos(z), (1.8 * math.sqrt(10) * math.acos(z)) % (2 * math.pi)
        assert point == pytest.approx(
            [math.sin(down) * math.cos(around), math.sin(down) * math.sin(around), z], abs=1e-12
        )


def test_equal_area_maps_the_square_and_starts_at_the_pole():
    points = sphere_points(16, "equal-area", dtype=torch.float64)
    assert points[0].tolist() == [0, 0, 1]
    u, v = torch.quasirandom.SobolEngine(2).draw(16, dtype=torch.float64).T
    torch.testing.assert_close(points[:, 2], 1 - 2 * v)
    radius = 2 * (v - v**2).sqrt()
    torch.testing.assert_close(points[:, 0], radius * (2 * math.pi * u).cos())
    torch.testing.assert_close(points[:, 1], radius * (2 * math.pi * u).sin())


def test_gaussian_inverts_the_normal_law_of_sobol_points():
    from scipy.stats import norm

    u = torch.quasirandom.SobolEngine(3).draw(16, dtype=torch.float64).numpy()
    x = norm.ppf(np.clip(u, 1e-6, 1 - 1e-6)) + 1e-6
    expected = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))
    torch.testing.assert_close(sphere_points(16, "gaussian", dtype=torch.float64), expected)


@pytest.mark.parametrize("method", ["distance", "coulomb"])
def test_optimised_sets_have_less_energy_than_the_spiral(method):
    points = sphere_points(30, method, dtype=torch.float64)
    assert float(_energy(points, method)) < float(_energy(_spiral(30), method))


def test_four_and_six_points_of_least_energy_are_tetrahedron_and_octahedron():
    four, six = (sphere_points(n, "coulomb", dtype=torch.float64) for n in (4, 6))
    torch.testing.assert_close(
        (four @ four.T)[0, 1:].sort().values, torch.full((3,), -1 / 3).double(), atol=1e-4, rtol=0
    )
    inner = (six @ six.T).triu(1)[torch.ones(6, 6).triu(1).bool()].sort().values
    torch.testing.assert_close(inner[:3], -torch.ones(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(inner[3:], torch.zeros(12).double(), atol=2e-3, rtol=0)


def test_rotations_are_uniform_and_not_those_of_bare_qr():
    turns = _rotations((4000,), rng())
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(turns @ turns.mT, eye.expand(4000, 3, 3))
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(4000, dtype=torch.float64))
    trace = turns.diagonal(dim1=1, dim2=2).sum(1)  # under the Haar measure mean 0, variance 1
    assert abs(float(trace.mean())) < 5 / math.sqrt(4000)
    assert abs(float(trace.var()) - 1) < 0.12


@pytest.mark.parametrize(
    ("method", "randomize"), [("spiral", "rotate"), ("equal-area", "scramble"), ("gaussian", "scramble")]
)
def test_every_direction_of_a_random_version_is_uniform(method, randomize):
    first = torch.stack(
        [
            sphere_points(4, method, randomize=randomize, generator=rng(k), dtype=torch.float64)[1]
            for k in range(1500)
        ]
    )
    assert float(first.mean(0).abs().max()) < 5 / math.sqrt(3 * 1500)
    moments = first.T @ first / 1500
    torch.testing.assert_close(moments, torch.eye(3).double() / 3, atol=0.05, rtol=0)


def test_the_same_generator_gives_the_same_points():
    for randomize, method in (("rotate", "spiral"), ("scramble", "gaussian"), (None, "random")):
        a, b = (sphere_points(9, method, randomize=randomize, generator=rng(3)) for _ in range(2))
        assert torch.equal(a, b)
        assert not torch.equal(a, sphere_points(9, method, randomize=randomize, generator=rng(4)))


# Distances.


def test_two_diracs_are_at_a_third_of_their_square():
    x, y = cloud(1), cloud(1, seed=1)
    value = sliced_wasserstein(x, y, sphere_points(1000, dtype=torch.float64)).square()
    assert float(value) == pytest.approx(float((x - y).square().sum() / 3), rel=1e-4)


def test_the_spiral_has_the_spheres_second_moments():
    points = sphere_points(1000, dtype=torch.float64)
    torch.testing.assert_close(points.T @ points / 1000, torch.eye(3).double() / 3, atol=3.5e-5, rtol=0)


@pytest.mark.parametrize("p", [1, 2, 3, 1.5])
def test_a_translation_moves_every_projection(p):
    x, t, theta = (
        cloud(20),
        torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64),
        sphere_points(50, dtype=torch.float64),
    )
    value = sliced_wasserstein(x, x + t, theta, p=p)
    torch.testing.assert_close(value, (theta @ t).abs().pow(p).mean().pow(1 / p))


def test_rotating_everything_changes_nothing_and_the_order_of_clouds_does_not_matter():
    x, y, theta, turn = (
        cloud(30),
        cloud(30, seed=1),
        sphere_points(20, dtype=torch.float64),
        _rotations((), rng()),
    )
    value = sliced_wasserstein(x, y, theta)
    torch.testing.assert_close(sliced_wasserstein(x @ turn, y @ turn, theta @ turn), value)
    torch.testing.assert_close(sliced_wasserstein(y, x, theta), value)
    torch.testing.assert_close(sliced_wasserstein(x, y, 7 * theta), value)
    assert float(sliced_wasserstein(x, x.flip(0), theta)) < 1e-12  # the product rounds by position


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(7, 5), (4, 12), (9, 9), (1, 6)])
def test_every_projection_is_pots_exact_distance(p, sizes):
    x, y, theta = cloud(sizes[0]), cloud(sizes[1], seed=1), sphere_points(11, dtype=torch.float64)
    each = [ot.wasserstein_1d(x @ t, y @ t, p=p) for t in theta]
    expected = torch.stack(each).mean() ** (1 / p)
    torch.testing.assert_close(sliced_wasserstein(x, y, theta, p=p), expected)


def test_doubling_every_point_changes_nothing():
    x, y, theta = cloud(6), cloud(10, seed=1), sphere_points(15, dtype=torch.float64)
    twice = x.repeat_interleave(2, 0)
    torch.testing.assert_close(sliced_wasserstein(twice, y, theta), sliced_wasserstein(x, y, theta))


def test_batches_and_dimensions_other_than_three():
    x, y = cloud(5, 2, 3, d=7), cloud(8, 2, 3, seed=1, d=7)
    shared, own = cloud(9, d=7, seed=2), cloud(9, 2, 3, d=7, seed=3)
    for theta in (shared, own):
        value = sliced_wasserstein(x, y, theta)
        for i in range(2):
            for j in range(3):
                each = theta if theta is shared else theta[i, j]
                torch.testing.assert_close(value[i, j], sliced_wasserstein(x[i, j], y[i, j], each))


def test_conformance_of_the_score(as_a_user):
    theta = sphere_points(40, dtype=torch.float64)
    x = cloud(8)
    shift = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    known = [((x, x), 0.0), ((x, x + shift), float((theta @ shift).square().mean().sqrt()))]
    check_metric(lambda a, b: sliced_wasserstein(a, b, theta), x, cloud(8, seed=1), known=known)


# The loss.


@pytest.mark.parametrize(("p", "size"), [(2, 6), (1, 6), (3, 6), (2, 4)])
def test_conformance_of_the_loss(p, size, as_a_user):
    x = cloud(6).requires_grad_()
    check_loss(QuasiSlicedWasserstein(8, p=p), x, cloud(size, seed=1), symmetric=True)


def test_at_equal_clouds_value_and_gradient_are_zero():
    x = cloud(6).requires_grad_()
    value = QuasiSlicedWasserstein(8)(x, x.detach())
    (grad,) = torch.autograd.grad(value, x)
    assert float(value.detach()) == 0 and not grad.any()


@pytest.mark.parametrize(
    ("method", "randomize"), [("spiral", "rotate"), ("gaussian", "scramble"), ("random", None)]
)
def test_squares_are_unbiased(method, randomize):
    x, y = cloud(40) * torch.tensor([1.0, 3.0, 0.2]), cloud(30, seed=1)
    truth = float(sliced_wasserstein(x, y, sphere_points(100_000, dtype=torch.float64)).square())
    distance = QuasiSlicedWasserstein(
        16, method=method, randomize=randomize, reduction="none", generator=rng()
    )
    draws = distance(x.expand(300, 40, 3), y.expand(300, 30, 3)).square()
    assert abs(float(draws.mean()) - truth) < 5 * float(draws.std()) / math.sqrt(300) + 1e-6 * truth


def test_a_rotated_spiral_has_a_twentieth_of_the_variance():
    x, y = cloud(40) * torch.tensor([1.0, 3.0, 0.2]), cloud(40, seed=1)
    both = x.expand(200, 40, 3), y.expand(200, 40, 3)
    random, spiral = (
        QuasiSlicedWasserstein(50, method=method, randomize=how, reduction="none", generator=rng())(*both)
        .square()
        .var()
        for method, how in (("random", None), ("spiral", "rotate"))
    )
    assert float(spiral) < float(random) / 20


def test_a_batch_gets_a_draw_a_pair_and_a_fixed_set_none():
    x, y = cloud(10).expand(3, 10, 3), cloud(10, seed=1).expand(3, 10, 3)
    for options in (
        {"randomize": "rotate"},
        {"method": "equal-area", "randomize": "scramble"},
        {"method": "random"},
    ):
        values = QuasiSlicedWasserstein(5, reduction="none", generator=rng(), **options)(x, y)
        assert len(values.unique()) == 3
    assert len(QuasiSlicedWasserstein(5, reduction="none")(x, y).unique()) == 1


@pytest.mark.parametrize("randomize", [None, "rotate", "scramble"])
def test_no_pairs_have_no_distances(randomize):
    loss = QuasiSlicedWasserstein(5, method="gaussian", randomize=randomize, reduction="none")
    assert loss(torch.zeros(0, 4, 3), torch.zeros(0, 6, 3)).shape == (0,)


def test_fixed_directions_are_a_buffer_that_needs_no_checkpoint():
    loss = QuasiSlicedWasserstein(5).float()
    assert loss.directions.dtype == torch.float32 and not loss.state_dict()


# Bad input.


def test_wrong_arguments_are_refused(as_a_user):
    x, theta = cloud(4), sphere_points(5, dtype=torch.float64)
    loss = QuasiSlicedWasserstein(5)
    for call, message in [
        (lambda: sphere_points(0), "n must be"),
        (lambda: sphere_points(3, "grid"), "method must be one of"),
        (lambda: sphere_points(3, randomize="flip"), "randomize must be one of"),
        *((lambda m=m: sphere_points(3, m, randomize="scramble"), "is for gaussian and equal-area")
          for m in ("spiral", "distance", "coulomb", "random")),
        (lambda: QuasiSlicedWasserstein(3, randomize="scramble"), "is for gaussian"),
        (lambda: QuasiSlicedWasserstein(0), "n_directions"),
        (lambda: QuasiSlicedWasserstein(3, p=0.5), "p must be"),
        (lambda: QuasiSlicedWasserstein(3, reduction="max"), "reduction"),
        (lambda: loss(x[:, :2], x[:, :2]), "use sliced_wasserstein"),
        (lambda: loss(x[:0], x), "at least one point"),
        (lambda: loss(x, x * float("nan")), "finite"),
        (lambda: sliced_wasserstein(x, x, theta, p=0), "p must be"),
        (lambda: sliced_wasserstein(x, x, theta[:, :2]), "one dimension, got 3, 3 and 2"),
        (lambda: sliced_wasserstein(x, x, 0 * theta), "length 0"),
        (lambda: sliced_wasserstein(x.expand(2, 4, 3), x.expand(3, 4, 3), theta), "same batch"),
        (lambda: sliced_wasserstein(x, x, theta.expand(2, 5, 3)), "same batch"),
        (lambda: sliced_wasserstein(x.long(), x, theta), "floating"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
