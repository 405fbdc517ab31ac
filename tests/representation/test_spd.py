import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm, fractional_matrix_power, logm, sqrtm

from posterity.representation import (
    BiMap,
    ReEig,
    SPDEncoder,
    frechet_mean,
    spd_distance,
    spd_log,
    tangent_vectors,
)
from posterity.representation.spd import geodesic
from posterity.testing import check_layer


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def spd(n, c, seed=0):
    a = randn(n, c, 2 * c, seed=seed)
    return a @ a.mT / c


# Functions.


def test_the_logarithm_is_scipys_and_undoes_the_exponential():
    s = spd(4, 5)
    for ours, matrix in zip(spd_log(s), s.numpy(), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(logm(matrix).real))
        np.testing.assert_allclose(expm(ours.numpy()), matrix, rtol=1e-10, atol=1e-10)


def test_the_gradient_holds_at_different_and_at_equal_eigenvalues():
    for s in (spd(2, 3), torch.eye(3, dtype=torch.float64)[None].clone(),
              torch.diag(torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64))[None].clone()):  # fmt: skip
        s = s.requires_grad_()
        assert torch.autograd.gradcheck(lambda s: spd_log((s + s.mT) / 2), s)
        assert torch.autograd.gradcheck(lambda s: ReEig(0.5)((s + s.mT) / 2), s)
        mean = spd(1, 3, seed=4)[0]
        assert torch.autograd.gradcheck(lambda s, m=mean: tangent_vectors((s + s.mT) / 2, m), s)
    near = torch.diag(torch.tensor([1.0, 1 + 1e-9], dtype=torch.float64))[None].requires_grad_()
    (slope,) = torch.autograd.grad(spd_log(near).sum(), near)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=0, atol=1e-6)


def test_the_distance_is_that_of_generalised_eigenvalues_and_affine_invariant():
    a, b, g = spd(6, 4), spd(6, 4, seed=1), randn(4, 4, seed=2)
    expected = [
        math.sqrt((np.log(np.linalg.eigvals(np.linalg.solve(x, y)).real) ** 2).sum())
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    torch.testing.assert_close(spd_distance(a, b), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(spd_distance(b, a), spd_distance(a, b))
    torch.testing.assert_close(spd_distance(g @ a @ g.T, g @ b @ g.T), spd_distance(a, b))
    torch.testing.assert_close(
        spd_distance(torch.linalg.inv(a), torch.linalg.inv(b)), spd_distance(a, b), rtol=1e-6, atol=1e-8
    )
    same = a[0].clone().requires_grad_()
    spd_distance(same, a[0]).backward()
    assert same.grad.isfinite().all()


# The mean.


def test_the_mean_of_two_is_the_middle_of_the_geodesic():
    a, b = spd(2, 4)
    root = sqrtm(a.numpy()).real
    inverse = np.linalg.inv(root)
    middle = root @ fractional_matrix_power(inverse @ b.numpy() @ inverse, 0.5).real @ root
    torch.testing.assert_close(frechet_mean(torch.stack([a, b])), torch.from_numpy(middle))
    torch.testing.assert_close(geodesic(a, b, 0.5), torch.from_numpy(middle))
    torch.testing.assert_close(geodesic(a, b, 0.0), a)
    torch.testing.assert_close(geodesic(a, b, 1.0), b)


def test_the_mean_is_where_logarithms_cancel_and_moves_with_coordinates():
    s, g = spd(20, 4), randn(4, 4, seed=2)
    mean = frechet_mean(s)
    assert float(tangent_vectors(s, mean).mean(0).norm()) < 1e-11
    torch.testing.assert_close(frechet_mean(g @ s @ g.T), g @ mean @ g.T)
    torch.testing.assert_close(tangent_vectors(s, mean).norm(dim=1), spd_distance(s, mean))
    logs = spd_log(s)
    by_row = torch.stack(
        [logs[:, i, j] * (1 if i == j else 2**0.5) for i in range(4) for j in range(i, 4)], 1
    )
    torch.testing.assert_close(tangent_vectors(s, torch.eye(4, dtype=torch.float64)), by_row)
    cost = spd_distance(s, mean).square().mean()
    for seed in range(20):
        other = mean + 0.1 * spd(1, 4, seed=seed)[0]
        assert spd_distance(s, other).square().mean() > cost
    diagonal = torch.diag_embed(randn(9, 3).exp())
    torch.testing.assert_close(
        frechet_mean(diagonal), torch.diag(diagonal.diagonal(dim1=1, dim2=2).log().mean(0).exp())
    )


def test_weights_are_repeats_and_far_apart_matrices_have_a_mean():
    s = spd(3, 3)
    weighted = frechet_mean(s, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(weighted, frechet_mean(s[[0, 0, 2]]))
    weighted = frechet_mean(s, torch.tensor([0.02, 0.0, 0.01], dtype=torch.float64))
    torch.testing.assert_close(weighted, frechet_mean(s[[0, 0, 2]]))
    far = torch.stack(
        [s[0] * 1e-6, s[1] * 1e6, torch.diag(torch.tensor([1e-4, 1.0, 1e5], dtype=torch.float64))]
    )
    assert float(tangent_vectors(far, frechet_mean(far)).mean(0).norm()) < 1e-8
    low = frechet_mean(s.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), frechet_mean(s.float().double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_a_mean_takes_few_steps_whatever_the_units(monkeypatch, spread):
    from posterity.representation import spd as module

    units = torch.logspace(-3, 3, 5, dtype=torch.float64)
    s = spd(30, 5, seed=1) * (spread * randn(30, 1, 1, seed=2)).exp()
    calls, newton = [], module._newton
    monkeypatch.setattr(module, "_newton", lambda *args: calls.append(1) or newton(*args))
    mean = frechet_mean(units[:, None] * s * units)
    assert len(calls) <= 5
    mean = mean / units[:, None] / units
    assert float(tangent_vectors(s, mean).mean(0).norm()) < 1e-11
    assert not torch.allclose(frechet_mean(s, max_iter=1), mean, rtol=1e-9, atol=0)


def test_a_newton_step_solves_for_the_second_derivative():
    from posterity.representation.spd import _newton

    s = spd(7, 3)
    values, vectors = torch.linalg.eigh(s)
    rows, slope = vectors.mT.contiguous(), torch.stack([spd_log(m) for m in s]).mean(0)
    x = _newton(values, vectors, rows, (rows / 7).flatten(0, 1), 1e-6 * slope, 1e-16)

    def moved(x):
        half = torch.linalg.matrix_exp(-x / 2)
        return torch.stack([spd_log(half @ m @ half) for m in s]).mean(0)

    torch.testing.assert_close((moved(x) - moved(-x)) / 2, -1e-6 * slope, rtol=1e-4, atol=1e-12)


def test_the_gradient_of_a_mean_is_that_of_its_last_step():
    s = spd(5, 3).requires_grad_()
    (ours,) = torch.autograd.grad(frechet_mean(s).square().sum(), s)
    mean = frechet_mean(s.detach())
    root, inverse = (torch.from_numpy(fractional_matrix_power(mean.numpy(), p).real) for p in (0.5, -0.5))

    def step(s):
        away = torch.stack([spd_log(inverse @ m @ inverse) for m in s]).mean(0)
        return root @ torch.linalg.matrix_exp(away) @ root

    (theirs,) = torch.autograd.grad(step(s).square().sum(), s)
    torch.testing.assert_close(ours, (theirs + theirs.mT) / 2, rtol=1e-6, atol=1e-9)


# Layers.


def test_bimap_keeps_orthonormal_rows_through_training_and_its_output_positive():
    torch.manual_seed(0)
    net = SPDEncoder(6, (5,), 3).double()
    x, target = spd(16, 6), spd(16, 3, seed=5)
    opt = torch.optim.Adam(net.parameters(), lr=0.05)
    start = float((net(x) - target).square().mean().detach())
    for _ in range(100):
        opt.zero_grad()
        (net(x) - target).square().mean().backward()
        opt.step()
    assert float((net(x) - target).square().mean().detach()) < start
    for layer in net.layers:
        if isinstance(layer, BiMap):
            torch.testing.assert_close(
                layer.weight @ layer.weight.T,
                torch.eye(len(layer.weight), dtype=torch.float64),
                atol=1e-5,
                rtol=0,
            )
    out = net(x)
    torch.testing.assert_close(out, out.mT)
    assert torch.linalg.eigvalsh(out).min() > 0
    w = net.layers[0].weight
    torch.testing.assert_close(net.layers[0](x), w @ x @ w.T)


def test_reeig_lifts_small_eigenvalues_alone():
    s = spd(3, 4)
    w, u = torch.linalg.eigh(s)
    torch.testing.assert_close(ReEig(0.7)(s), u @ torch.diag_embed(w.clamp_min(0.7)) @ u.mT)


@pytest.mark.parametrize("make", [lambda: BiMap(4, 2), lambda: ReEig(0.1), lambda: SPDEncoder(4, (3,), 2)])
def test_they_are_layers(as_a_user, make):
    torch.manual_seed(0)
    check_layer(make(), spd(5, 4).float().requires_grad_())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: spd_log(torch.ones(2, 3)), "s must have square matrices"),
        (lambda: spd_log(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "s must be symmetric, matrix 0"),
        (lambda: spd_log(torch.stack([torch.eye(2), -torch.eye(2)])), "1 of 2 are not, the first is matrix 1: shrink"),
        (lambda: spd_log(torch.ones(2, 2) + 1e-17 * torch.eye(2).double()), "1 of 1 are not"),
        (lambda: spd_log(torch.eye(2).long()), "s must be a floating"),
        (lambda: spd_log(torch.eye(2) + 0j), "s must be a floating"),
        (lambda: spd_log(torch.full((2, 2), torch.nan)), "s must be finite"),
        (lambda: spd_distance(torch.eye(2), torch.eye(3)), "b must have matrices of 2"),
        (lambda: spd_distance(torch.eye(2).expand(4, 2, 2), torch.eye(2).expand(3, 2, 2)), "b must broadcast with a"),
        (lambda: ReEig()(torch.full((2, 2), torch.nan)), "s must be finite"),
        (lambda: frechet_mean(torch.eye(2)), "s must have shape"),
        (lambda: frechet_mean(torch.zeros(0, 2, 2)), "at least one matrix"),
        (lambda: frechet_mean(torch.eye(2)[None], torch.tensor([-1.0])), "weights must not be negative"),
        (lambda: frechet_mean(torch.eye(2)[None], torch.ones(2)), "weights must have shape"),
        (lambda: tangent_vectors(torch.eye(2)[None], torch.eye(3)), "mean must have shape"),
        (lambda: BiMap(3, 4), "c_out must be at most"),
        (lambda: BiMap(3, 2)(torch.eye(4)), "s must have shape"),
        (lambda: ReEig(0), "threshold"),
        (lambda: SPDEncoder(4, (5,), 2), "c_out must be at most c_in=4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_symmetry_is_asked_to_a_millionth_of_the_largest_entry(unit):
    s = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    off = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(spd_log(unit * (s + 9e-7 * off)), spd_log(unit * s), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="s must be symmetric"):
        spd_log(unit * (s + 1.1e-6 * off))
