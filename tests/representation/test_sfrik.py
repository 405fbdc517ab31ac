import math

import numpy as np
import pytest
import torch
from scipy.special import eval_chebyu, eval_gegenbauer, eval_legendre, roots_chebyt, roots_gegenbauer
from torch.nn import functional as F

from posterity.representation import SFRIKLoss, kernel_weights, legendre, mmd_to_uniform
from posterity.testing import check_embedding_loss


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def by_pairs(z, weights):
    """Definition (1), a polynomial of each pair by scipy."""
    u, q = F.normalize(z, dim=1).numpy(), z.shape[1]
    total = 0.0
    for degree, b in enumerate(weights, 1):
        index = q / 2 - 1
        scale = eval_gegenbauer(degree, index, 1.0)
        total += b * np.mean([eval_gegenbauer(degree, index, x @ y) / scale for x in u for y in u])
    return total


# Polynomials.


@pytest.mark.parametrize("degree", range(8))
def test_polynomials_are_legendres_in_three_dimensions_and_chebyshevs_in_two_and_four(degree):
    t = torch.linspace(-1, 1, 41, dtype=torch.float64)
    expected = {
        2: np.cos(degree * np.arccos(t.numpy())),
        3: eval_legendre(degree, t.numpy()),
        4: eval_chebyu(degree, t.numpy()) / (degree + 1),
    }
    for dim, values in expected.items():
        torch.testing.assert_close(legendre(t, degree, dim), torch.from_numpy(values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 7, 64])
def test_polynomials_are_one_at_one_and_orthogonal(dim):
    nodes, w = roots_chebyt(40) if dim == 2 else roots_gegenbauer(40, dim / 2 - 1)
    t = torch.from_numpy(nodes)
    values = torch.stack([legendre(t, degree, dim) for degree in range(7)])
    gram = values @ (torch.from_numpy(w / w.sum()) * values).T
    off = gram - gram.diagonal().diag()
    assert (off.abs() / (gram.diagonal()[:, None] * gram.diagonal()[None]).sqrt()).max() < 1e-10
    assert values.abs().max() <= 1 + 1e-12
    one = torch.ones(1, dtype=torch.float64)
    assert [float(legendre(one, degree, dim)) for degree in range(7)] == pytest.approx([1.0] * 7, rel=1e-12)


# The weights of a kernel.


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_weights_rebuild_the_kernel(dim):
    t = torch.linspace(-1, 1, 33, dtype=torch.float64)
    for phi in (lambda t: torch.exp(-5 * (1 - t)), lambda t: torch.exp(-(1 - t))):
        b = kernel_weights(phi, dim, 24)
        rest = phi(t) - sum(b[k] * legendre(t, k + 1, dim) for k in range(24))
        assert (rest - rest.mean()).abs().max() < 1e-8
        assert b.dtype == torch.float64 and b.min() > -1e-9  # of a positive definite kernel none is negative


def test_weights_of_a_polynomial_are_those_that_it_is_made_of():
    for dim in (2, 5, 300, 8192):
        b = kernel_weights(lambda t, q=dim: 2 * legendre(t, 1, q) + 3 * legendre(t, 2, q), dim, 3)
        torch.testing.assert_close(
            b,
            torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64),
            atol=1e-14 * math.comb(dim + 2, 3),
            rtol=1e-12,
        )


def test_a_gaussian_kernels_discrepancy_is_its_mean_up_to_a_constant():
    """Alignment and uniformity (Wang and Isola) in other words."""
    b = kernel_weights(lambda t: torch.exp(-5 * (1 - t)), 5, 40).clamp_min(0).tolist()
    gaps = []
    for seed in range(3):
        u = F.normalize(randn(12, 5, seed=seed), dim=1)
        gaps.append(torch.exp(-2.5 * torch.cdist(u, u).square()).mean() - mmd_to_uniform(u, b))
    torch.testing.assert_close(torch.stack(gaps), gaps[0].expand(3), rtol=0, atol=1e-9)


# The discrepancy.


@pytest.mark.parametrize(
    "weights", [(2.0,), (1.0, 3.0), (0.0, 3.0), (1.0, 40.0, 40.0), (1, 2, 3, 4, 5), (1, 0, 2, 0)]
)
@pytest.mark.parametrize("shape", [(7, 3), (4, 9), (1, 2)])
def test_the_discrepancy_is_the_mean_over_all_pairs(weights, shape):
    z = randn(*shape) if shape[1] > 2 else torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    if shape[1] == 2:
        assert float(mmd_to_uniform(z, weights)) == pytest.approx(sum(weights))
    else:
        assert float(mmd_to_uniform(z, weights)) == pytest.approx(by_pairs(z, weights), abs=1e-11)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_both_routes_agree_in_value_and_gradient(shape):
    z = randn(*shape).requires_grad_()
    found = [mmd_to_uniform(z, (1.0, 40.0), route=route) for route in ("gram", "moment", "auto")]
    grads = [torch.autograd.grad(value, z)[0] for value in found]
    for value, grad in zip(found[1:], grads[1:], strict=True):
        torch.testing.assert_close(value, found[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, grads[0], rtol=1e-12, atol=1e-12)


def test_designs_collapse_and_random_points_have_the_values_that_theory_says():
    axes = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    assert float(mmd_to_uniform(axes)) == pytest.approx(0, abs=1e-12)
    simplex = torch.eye(5, dtype=torch.float64) - 1 / 5
    simplex = torch.linalg.svd(simplex).U[:, :4] * torch.linalg.svd(simplex).S[:4]
    assert float(mmd_to_uniform(simplex, (1.0, 40.0))) == pytest.approx(0, abs=1e-12)
    assert float(mmd_to_uniform(simplex)) > 0.1
    assert float(mmd_to_uniform(torch.ones(9, 4, dtype=torch.float64))) == pytest.approx(81, rel=1e-12)
    draws = torch.func.vmap(mmd_to_uniform)(randn(500, 10, 6))
    assert abs(float(draws.mean()) - 81 / 10) < 5 * float(draws.std()) / math.sqrt(500)


def test_rotations_lengths_and_order_do_not_matter_and_it_is_never_negative():
    z = randn(11, 5)
    q = torch.linalg.qr(randn(5, 5, seed=1)).Q
    value = mmd_to_uniform(z)
    for other in (z @ q, z * torch.arange(1, 12)[:, None], z[torch.randperm(11, generator=rng())]):
        torch.testing.assert_close(mmd_to_uniform(other), value)
    for seed in range(21):
        z = randn(3 + seed % 7, 4, seed=seed)
        for weights in ((1.0, 40.0, 40.0), (1.0, 40.0), (0.0, 0.0, 1.0), (0, 0, 0, 1, 1)):
            assert mmd_to_uniform(z, weights) >= -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_wide_spaces_what_nearly_cancels_is_kept(dtype):
    """At q = 4096 the squares of cosines are 1 / q beside a mean of 1 / q: a difference of small numbers."""
    z = randn(64, 4096).to(dtype)
    exact = mmd_to_uniform(z.double())
    torch.testing.assert_close(
        mmd_to_uniform(z).double(), exact, rtol=1e-3 if dtype == torch.float32 else 1e-2, atol=0
    )


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 40.0), (1.0, 40.0, 40.0), (1, 2, 3, 4, 5)])
def test_on_the_circle_each_degree_is_a_fourier_coefficient(weights):
    angle = 6 * torch.rand(9, dtype=torch.float64, generator=rng())
    z = torch.stack([angle.cos(), angle.sin()], 1)
    expected = sum(b * abs(np.exp(1j * k * angle.numpy()).mean()) ** 2 for k, b in enumerate(weights, 1))
    assert float(mmd_to_uniform(z, weights)) == pytest.approx(expected, abs=1e-12)


def test_gradients_of_a_stack_of_batches_are_those_of_each():
    z = randn(3, 4, 5)
    grad = torch.func.grad(mmd_to_uniform)
    torch.testing.assert_close(torch.func.vmap(grad)(z), torch.stack([grad(part) for part in z]))


# The loss.


def test_the_loss_is_alignment_and_the_mean_of_both_discrepancies():
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    u = [F.normalize(z, dim=1) for z in (z1, z2)]
    expected = 0.7 * (u[0] - u[1]).square().sum(1).mean() + (by_pairs(z1, (1, 5)) + by_pairs(z2, (1, 5))) / 2
    torch.testing.assert_close(SFRIKLoss((1, 5), alignment_weight=0.7)(z1, z2), expected)


def test_more_crops_are_compared_with_the_first_two_and_not_spread():
    views = [randn(6, 4, seed=seed) for seed in range(4)]
    u = [F.normalize(z, dim=1) for z in views]
    pairs = [
        np.mean([float((u[g] - u[k]).square().sum(1).mean()) for k in range(4) if k != g]) for g in (0, 1)
    ]
    terms = SFRIKLoss().terms(*views)
    assert float(terms.alignment) == pytest.approx(np.mean(pairs))
    torch.testing.assert_close(terms.uniformity, SFRIKLoss().terms(*views[:2]).uniformity)


@pytest.mark.parametrize(
    "loss", [SFRIKLoss(), SFRIKLoss((1, 2), route="moment"), SFRIKLoss((1,)), SFRIKLoss((1, 2, 3, 4))]
)
def test_it_is_a_loss_of_two_views(as_a_user, loss):
    check_embedding_loss(loss, n=4, dim=5, on_sphere=True, compiles=len(loss.weights) == 3)


def test_equal_views_have_a_gradient():
    z = randn(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: SFRIKLoss()(z, z), z)
    assert torch.autograd.gradgradcheck(lambda z: SFRIKLoss()(z, z), z)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SFRIKLoss(()), "weights must name"),
        (lambda: SFRIKLoss((1, -1)), r"weights\[1\]"),
        (lambda: SFRIKLoss((0, 0)), "weights must not all be 0"),
        (lambda: SFRIKLoss(3.0), "weights must be a sequence"),
        (lambda: SFRIKLoss((1, 2, 3), route="moment"), 'route="moment"'),
        (lambda: SFRIKLoss(route="pairs"), "route must be one of"),
        (lambda: SFRIKLoss(alignment_weight=-1), "alignment_weight"),
        (lambda: mmd_to_uniform(torch.ones(3, 1)), "at least 2 columns"),
        (lambda: mmd_to_uniform(torch.ones(3, 2, dtype=torch.int64)), "z must be a floating"),
        (lambda: SFRIKLoss()(torch.ones(3, 1), torch.ones(3, 1)), "at least 2 columns"),
        (lambda: SFRIKLoss()(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 2)), r"more\[0\]"),
        (lambda: SFRIKLoss()(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 3)), r"more\[0\]"),
        (lambda: legendre(torch.ones(2), -1, 3), "degree"),
        (lambda: legendre(torch.ones(2), 1, 1), "dim"),
        (lambda: legendre(torch.ones(2, dtype=torch.int64), 1, 3), "t must be"),
        (lambda: kernel_weights(torch.exp, 3, 0), "max_degree"),
        (lambda: kernel_weights(lambda t: t[:2], 3, 2), "phi must return"),
        (lambda: kernel_weights(lambda t: t / 0, 3, 2), "phi must be finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_row_of_zeros_has_no_direction_and_a_finite_gradient():
    z = randn(4, 5)
    z[1] = 0
    z = z.requires_grad_()
    SFRIKLoss()(z, 2 * z).backward()
    assert z.grad.isfinite().all()


def test_two_samples_have_a_finite_value_and_gradient():
    z1, z2 = (randn(2, 5, seed=seed).requires_grad_() for seed in range(2))
    for weights in ((1.0,), (1.0, 40.0), (1.0, 40.0, 40.0), (1, 2, 3, 4)):
        value = SFRIKLoss(weights)(z1, z2)
        assert value.isfinite()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (z1, z2)))


def test_a_row_of_zeros_is_orthogonal_to_all_by_either_route():
    z = torch.cat([randn(6, 3), torch.zeros(1, 3, dtype=torch.float64)])
    u = F.normalize(z, dim=1)
    gram = u @ u.T
    expected = 2 * gram.mean() + 5 * legendre(gram, 2, 3).mean()
    for route in ("gram", "moment"):
        torch.testing.assert_close(mmd_to_uniform(z, (2, 5), route=route), expected)


def test_rows_may_be_of_a_length_whose_square_overflows():
    z1, z2 = (randn(8, 4, seed=k, dtype=torch.float32) for k in (1, 2))
    torch.testing.assert_close(mmd_to_uniform(1e25 * z1), mmd_to_uniform(z1))
    torch.testing.assert_close(SFRIKLoss()(1e25 * z1, 1e25 * z2), SFRIKLoss()(z1, z2))
