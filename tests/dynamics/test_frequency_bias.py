"""Sobolev losses and energies against explicit harmonics and Fourier sums, and quadrature weights against cells and moments."""

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y
from scipy.stats import special_ortho_group
from torch.nn import functional as F

from posterity.dynamics import ImageSobolevLoss, SobolevLoss, frequency_energy, quadrature_weights
from posterity.testing import check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def sphere(n, d, seed=0):
    """Points that crowd on one side."""
    x = torch.randn(n, d, dtype=torch.float64, generator=rng(seed))
    x[:, 0] += 0.5
    return x / x.norm(dim=1, keepdim=True)


def circle(angles):
    return torch.stack([angles.cos(), angles.sin()], 1)


def even(n):
    return 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n


def values(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def explicit(x, c, s, degree):
    """P_s as the sum of outer products of complex harmonics."""
    polar, around = np.arccos(x[:, 2].numpy()), np.arctan2(x[:, 1].numpy(), x[:, 0].numpy())
    total = np.zeros((len(x), len(x)), dtype=complex)
    for each in range(degree + 1):
        for m in range(-each, each + 1):
            y = c.numpy() * sph_harm_y(each, m, polar, around)
            total += (1 + each) ** (2 * s) * np.outer(y, y.conj())
    return torch.from_numpy(total.real)


# --- the loss on the sphere ---


@pytest.mark.parametrize("s", [-1.0, 0.0, 1.5])
def test_the_matrix_is_the_sum_of_explicit_spherical_harmonics(s):
    x, c = sphere(60, 3), torch.rand(60, dtype=torch.float64, generator=rng(2))
    expected = explicit(x, c, s, 6)
    for loss, theirs in (
        (SobolevLoss(x, s, max_degree=6, weights=c), expected),
        (SobolevLoss(x, s, max_degree=6), explicit(x, quadrature_weights(x), s, 6)),
    ):
        torch.testing.assert_close(loss.matrix, theirs, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(loss.matrix, loss.matrix.T, atol=1e-14, rtol=1e-14)
        assert loss.spectral_norm() == pytest.approx(np.linalg.eigvalsh(theirs.numpy())[-1])


def test_the_gradient_is_the_matrix_times_the_residual():
    loss = SobolevLoss(sphere(20, 4), 0.5)
    pred, target = values(20, 3).requires_grad_(), values(20, 3, seed=2)
    value = loss(pred, target)
    residual = (pred - target).detach()
    torch.testing.assert_close(torch.autograd.grad(value, pred)[0], loss.matrix @ residual)
    torch.testing.assert_close(value, sum(r @ loss.matrix @ r for r in residual.T) / 2)
    torch.testing.assert_close(value, sum(loss(pred[:, k], target[:, k]) for k in range(3)))


@pytest.mark.parametrize("shape", [(12,), (12, 2)])
@pytest.mark.parametrize("s", [-1.0, 1.5])
def test_the_loss_conforms_to_its_kind(as_a_user, shape, s):
    loss = SobolevLoss(sphere(12, 3), s)
    check_loss(loss, values(*shape).requires_grad_(), values(*shape, seed=2), batch_of_one=False)


def test_on_an_even_circle_the_matrix_is_diagonal_in_the_fourier_basis():
    n, s = 31, 0.75
    loss = SobolevLoss(circle(even(n)), s, max_degree=10)
    torch.testing.assert_close(loss.weights, torch.full((n,), 2 * math.pi / n).double())
    for k in range(16):
        for wave in (torch.cos(k * even(n)), torch.sin(k * even(n))):
            weight = (1 + k) ** (2 * s) * 2 * math.pi / n if k <= 10 else 0.0
            torch.testing.assert_close(loss.matrix @ wave, weight * wave)


def test_by_default_half_as_many_harmonics_as_points_are_kept():
    for n, d, degree in (
        (128, 2, 31),
        (1, 2, 0),
        (3, 3, 0),
        (8, 3, 1),
        (200, 3, 9),
        (200, 4, 5),
        (9, 5, 0),
    ):
        assert SobolevLoss(sphere(n, d), weights=torch.ones(n)).max_degree == degree


@pytest.mark.parametrize("d", [2, 3, 5])
def test_rotations_change_nothing_and_permutations_permute(d):
    x, r = sphere(60, d), values(60, 2)
    turned = x @ torch.from_numpy(special_ortho_group(d, seed=0).rvs()).reshape(d, d)
    order = torch.randperm(60, generator=rng(3))
    weights, loss, energy = (
        quadrature_weights(x),
        SobolevLoss(x, 1.0)(r, torch.zeros_like(r)),
        frequency_energy(r, x),
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(quadrature_weights(turned), weights, **close)
    torch.testing.assert_close(quadrature_weights(x[order]), weights[order], **close)
    for points, residual in ((turned, r), (x[order], r[order])):
        again = SobolevLoss(points, 1.0)(residual, torch.zeros_like(residual))
        torch.testing.assert_close(again, loss, **close)
        torch.testing.assert_close(frequency_energy(residual, points), energy, **close)


@pytest.mark.parametrize(("d", "n"), [(2, 300), (3, 90), (6, 90)])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_energies_are_not_negative_and_weighed_they_are_twice_the_loss(monkeypatch, d, n, shape):
    monkeypatch.setattr("posterity.dynamics.sphere_quadrature.BLOCK", 8 * n * 37)  # rows do not divide evenly
    x, r, c = sphere(n, d), values(n, *shape), torch.rand(n, dtype=torch.float64, generator=rng(4))
    for s in (-0.5, 2.0):
        loss = SobolevLoss(x, s, weights=c)
        energy = frequency_energy(r, x, weights=c)
        assert (energy >= 0).all()
        degree = torch.arange(loss.max_degree + 1)
        torch.testing.assert_close(
            loss(r, torch.zeros_like(r)), ((1.0 + degree) ** (2 * s) * energy).sum() / 2
        )


def test_energies_of_a_harmonic_are_in_its_degree_if_points_are_weighed():
    angles = 2 * torch.pi * torch.rand(4000, dtype=torch.float64, generator=rng()).square()
    x, wave = circle(angles), torch.sin(5 * angles)
    weighed, equal = (frequency_energy(wave, x, max_degree=8, weights=c) for c in (None, torch.full((4000,), 2 * math.pi / 4000)))  # fmt: skip
    expected = torch.zeros(9, dtype=torch.float64)
    expected[5] = math.pi
    torch.testing.assert_close(weighed, expected, atol=0.05, rtol=0.02)
    assert (equal[:5].sum() > 0.3).all()


def test_data_kept_in_other_dtypes_and_modes_give_the_same():
    x, pred, target = sphere(30, 3), values(30), values(30, seed=2)
    loss = SobolevLoss(x, 1.0)(pred, target)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            made = SobolevLoss(x.to(dtype), 1.0)
            energy = frequency_energy(pred.to(dtype), x.to(dtype))
        assert made.matrix.dtype == torch.float32
        assert energy.dtype == torch.float64
        leaf = pred.to(dtype).requires_grad_()  # made in inference mode, it still trains
        value = made(leaf, target.to(dtype))
        value.backward()
        assert value.dtype == dtype
        assert torch.isfinite(leaf.grad).all()
        slack = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(value.double(), loss, rtol=slack, atol=0.0)
        torch.testing.assert_close(energy, frequency_energy(pred, x), rtol=0.2, atol=slack)
    torch.testing.assert_close(
        SobolevLoss(x.mT.contiguous().mT, 1.0)(pred.float(), target.float()), loss.float()
    )
    moved = SobolevLoss(x.float(), 1.0)(pred, target)
    assert moved.dtype == torch.float64


# --- weights ---


def test_arcs_are_half_way_to_both_neighbours():
    angles = torch.tensor([0.1, 3.0, 1.0, -2.0], dtype=torch.float64)
    full = 2 * math.pi
    expected = torch.tensor(
        [(1.0 - -2.0) / 2, (full - 2.0 - 1.0) / 2, (3.0 - 0.1) / 2, (0.1 + full - 3.0) / 2]
    )
    torch.testing.assert_close(quadrature_weights(circle(angles)), expected.double())


def test_cells_are_what_is_nearest_to_a_point():
    x = sphere(12, 3)
    drawn = values(200_000, 3)
    nearest = (drawn @ x.T).argmax(1).bincount(minlength=12) / 200_000
    weights = quadrature_weights(x) / (4 * math.pi)
    error = (nearest * (1 - nearest) / 200_000).sqrt()
    assert ((weights - nearest).abs() < 5 * error).all()
    crowd = torch.tensor([[1.0, 0, 9], [-1, 0, 9], [0, 1, 9], [0, -1, 9], [0, 0, 1]]).double()
    crowd /= crowd.norm(dim=1, keepdim=True)  # outer cells reach to the other pole
    torch.testing.assert_close(quadrature_weights(crowd)[:4], quadrature_weights(crowd)[:1].expand(4))
    assert quadrature_weights(crowd)[0] > 0.95 * math.pi


@pytest.mark.parametrize(("d", "n"), [(3, 120), (4, 150), (6, 150)])
def test_moments_of_low_degrees_are_exact(d, n):
    x = sphere(n, d)
    c = quadrature_weights(x, method="nnls", max_degree=2)
    area = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
    assert (c >= 0).all()
    assert float(c.sum()) == pytest.approx(area)
    torch.testing.assert_close(c @ x, torch.zeros(d).double(), atol=1e-5 * area, rtol=0)
    torch.testing.assert_close((x.T * c) @ x, torch.eye(d).double() * area / d, atol=1e-5 * area, rtol=0)


def test_moments_that_no_weights_fit_are_fitted_as_well_as_nonnegative_weights_can():
    x = sphere(14, 4)
    x[:, 0] = x[:, 0].abs() + 0.2  # of one side only
    x /= x.norm(dim=1, keepdim=True)
    c = quadrature_weights(x, method="nnls", max_degree=1)
    assert (c == 0).any()
    area = 2 * math.pi**2
    moments = 4 / area * x @ x.T  # N = 4 harmonics of degree 1
    # at a minimum under c >= 0 the gradient pushes no weight, and those at 0 not inwards; scaling is undone by its factor
    directions = moments @ c
    free = c > 0
    assert directions[free].std() < 1e-5
    assert (directions[~free] > directions[free].mean() - 1e-5).all()


def test_even_points_have_equal_weights():
    corners = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    for d in (2, 3, 5):
        x = torch.cat([corners[:5, :d], corners[5:, :d]])
        x = x[x.norm(dim=1) > 0]
        for method in ("nnls", "auto"):
            weights = quadrature_weights(x, method=method)
            torch.testing.assert_close(weights, weights.mean().expand(2 * d), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_points_that_coincide_share_one_weight(d):
    x = sphere(30, d)
    again = torch.cat([x, x[:1], x[:1] + 1e-9, x[3:4]])
    expected = quadrature_weights(x)
    found = quadrature_weights(again)
    torch.testing.assert_close(found[[1, 2]], expected[[1, 2]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[[0, 30, 31]], (expected[0] / 3).expand(3), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[[3, 32]], (expected[3] / 2).expand(2), rtol=1e-4, atol=1e-6)


def test_few_points_and_points_of_a_plane_are_weighed_by_moments():
    for d in (2, 3, 4):
        area = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
        for n in (1, 2, 3):
            assert float(quadrature_weights(sphere(n, d)).sum()) == pytest.approx(area)
    flat = F.pad(circle(even(8)), (0, 1))
    torch.testing.assert_close(quadrature_weights(flat), torch.full((8,), math.pi / 2).double())
    narrow = quadrature_weights(flat.bfloat16())
    assert narrow.dtype == torch.bfloat16


# --- images ---


def test_without_an_index_it_is_the_mean_squared_error():
    for shape, dims in (
        ((4, 3, 8, 6), 2),
        ((5, 7), 2),
        ((3, 9), 1),
        ((3, 2, 8), 1),
        ((4, 1, 1), 2),
        ((1,), 1),
    ):
        pred, target = values(*shape), values(*shape, seed=2)
        expected = F.mse_loss(pred, target)
        for normalize in (False, True):
            value = ImageSobolevLoss(dims=dims, normalize=normalize)(pred, target)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(3, 6, 8), (3, 7, 5), (3, 1, 4)])
def test_it_is_the_weighted_sum_over_the_whole_spectrum(s, shape):
    pred, target = values(*shape), values(*shape, seed=2)
    h, w = shape[1:]
    spectrum = np.fft.fft2((pred - target).numpy(), norm="ortho")
    k = np.fft.fftfreq(h)[:, None] * h, np.fft.fftfreq(w) * w
    weight = (1 + k[0] ** 2 + k[1] ** 2) ** s
    for normalize, used in ((False, weight), (True, weight / weight.mean())):
        expected = torch.from_numpy((used * abs(spectrum) ** 2).mean((1, 2)))
        loss = ImageSobolevLoss(s, normalize=normalize, reduction="none")
        torch.testing.assert_close(loss(pred, target), expected)
        loss.reduction = "mean"
        torch.testing.assert_close(loss(pred, target), expected.mean())
    line = ImageSobolevLoss(s, dims=1)(pred, target)
    spectrum = np.fft.fft((pred - target).numpy(), norm="ortho")
    assert float(line) == pytest.approx(((1 + k[1] ** 2) ** s * abs(spectrum) ** 2).mean())


def test_a_pure_cosine_has_half_the_weight_of_its_frequency():
    at = torch.arange(12, dtype=torch.float64)
    for a, b in ((0, 3), (2, 0), (2, 5), (4, 1)):
        wave = torch.cos(2 * math.pi * (a * at[:, None] + b * at) / 12)
        for s in (-1.5, 0.0, 1.0):
            value = ImageSobolevLoss(s)(wave, torch.zeros_like(wave))
            assert float(value) == pytest.approx((1 + a * a + b * b) ** s / 2)


def test_shifting_both_images_round_changes_nothing():
    pred, target = values(2, 8, 9), values(2, 8, 9, seed=2)
    for s in (-1.0, 1.0):
        loss = ImageSobolevLoss(s)
        shifted = [x.roll((3, 4), dims=(-2, -1)) for x in (pred, target)]
        torch.testing.assert_close(loss(*shifted), loss(pred, target))


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"s": -1.0}, (4, 5, 6)), ({"s": 1.5, "normalize": True, "reduction": "sum"}, (4, 2, 4, 4)), ({"s": 1.0, "dims": 1}, (5, 7))],
)  # fmt: skip
def test_the_image_loss_conforms_to_its_kind(as_a_user, options, shape):
    loss = ImageSobolevLoss(**options)
    check_loss(loss, values(*shape).requires_grad_(), values(*shape, seed=2), symmetric=True)


# --- bad input ---

X = sphere(6, 3)
R, IMAGE = torch.zeros(6), torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SobolevLoss(X[0]), r"x must have shape \(any, any\)"),
        (lambda: SobolevLoss(X[:, :1]), "x must have a row and at least 2 columns"),
        (lambda: SobolevLoss(X[:0]), "x must have a row"),
        (lambda: SobolevLoss(2 * X), "x must have rows of length 1, row . has 2: divide by .* append a column of ones"),
        (lambda: SobolevLoss(1.001 * X), "x must have rows of length 1"),
        (lambda: SobolevLoss(X * math.nan), "x must be finite"),
        (lambda: SobolevLoss(X.long()), "x must be a floating-point tensor"),
        (lambda: SobolevLoss(sphere(3, 65)), "x must have at most 64 columns"),
        (lambda: SobolevLoss(X, math.nan), r"s must be in \[-8.0, 8.0\]"),
        (lambda: SobolevLoss(X, math.inf), "s must be in"),
        (lambda: SobolevLoss(X, max_degree=-1), "max_degree must be an integer of at least 0"),
        (lambda: SobolevLoss(X, max_degree=10**9), "max_degree must be at most 10000"),
        (lambda: SobolevLoss(X, weights=torch.ones(5)), r"weights must have shape \(6\) for x"),
        (lambda: SobolevLoss(X, weights=-torch.ones(6)), "weights must not be negative"),
        (lambda: SobolevLoss(X, weights=torch.zeros(6)), "weights must not be negative, nor all 0"),
        (lambda: SobolevLoss(X, weights=torch.full((6,), math.inf)), "weights must be finite"),
        (lambda: SobolevLoss(X)(R[:3], R[:3]), "needs all points of x; for minibatches use ImageSobolevLoss or build one"),
        (lambda: SobolevLoss(X)(R, R[:3]), r"target must have the shape of pred, \(6,\), got \(3,\)"),
        (lambda: SobolevLoss(X)(R, R[:, None]), "target must have the shape of pred"),
        (lambda: SobolevLoss(X)(R.long(), R), "pred must be a floating-point"),
        (lambda: SobolevLoss(X)(R.view(6, 1, 1), R.view(6, 1, 1)), r"pred must have shape \(6,\) or \(6, k\)"),
        (lambda: quadrature_weights(X, method="cells"), "method must be one of"),
        (lambda: quadrature_weights(X, max_degree=2), "max_degree must be None but for method 'nnls'"),
        (lambda: quadrature_weights(sphere(6, 4), method="voronoi"), "method must be 'nnls' or 'auto'"),
        (lambda: quadrature_weights(X[:3], method="voronoi"), "method must be 'nnls' or 'auto' for 3 distinct points"),
        (lambda: frequency_energy(R[:3], X), r"residual must have shape \(6,\) or \(6, k\) for x, got \(3,\)"),
        (lambda: frequency_energy(R.long(), X), "residual must be a floating-point"),
        (lambda: frequency_energy(R, X, max_degree=-1), "max_degree must be an integer"),
        (lambda: ImageSobolevLoss(dims=3), "dims must be one of 1, 2, got 3"),
        (lambda: ImageSobolevLoss(math.inf), "s must be in"),
        (lambda: ImageSobolevLoss(reduction="max"), "reduction must be one of"),
        (lambda: ImageSobolevLoss()(IMAGE.byte(), IMAGE.byte()), "pred must be a floating-point tensor, got dtype torch.uint8: scale images to floats, x / 255"),
        (lambda: ImageSobolevLoss()(IMAGE, IMAGE.int()), "target must be a floating-point"),
        (lambda: ImageSobolevLoss()(IMAGE, IMAGE[:1]), "target must have the shape of pred"),
        (lambda: ImageSobolevLoss()(IMAGE[0, 0], IMAGE[0, 0]), "pred must have 2 or more axes"),
        (lambda: ImageSobolevLoss()(IMAGE[:0], IMAGE[:0]), "no empty one"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_harmonics_than_points_are_warned_of():
    with pytest.warns(UserWarning, match="max_degree=3 asks for more harmonics than the 6 points"):
        SobolevLoss(X, max_degree=3)
