import numpy as np
import pytest
import torch
from torch.nn import functional as F

from posterity.representation import (
    RankMonitor,
    RDMLoss,
    effective_rank,
    rank_difference,
    spectral_filter,
)
from posterity.testing import check_embedding_loss, check_metric


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def orthogonal(n, seed=0):
    return torch.linalg.qr(randn(n, n, seed=seed)).Q


GAINS = {
    "power": lambda s: s**0.7,
    "log": torch.log,
    "log1p": torch.log1p,
    "log1p-squared": lambda s: torch.log1p(s**2),
}


def by_svd(z, gain):
    """Definition (1)."""
    left, s, right = torch.linalg.svd(z, full_matrices=False)
    return left @ torch.diag(s * gain(s)) @ right


# The filter.


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (1, 3), (3, 1)])
def test_a_filter_multiplies_singular_values(name, shape):
    z = randn(*shape)
    torch.testing.assert_close(spectral_filter(z, name, sigma=0.7), by_svd(z, GAINS[name]))
    torch.testing.assert_close(spectral_filter(z, GAINS[name]), by_svd(z, GAINS[name]))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_powers_compose_and_have_their_special_cases(shape):
    z = randn(*shape)
    torch.testing.assert_close(spectral_filter(z, sigma=0), z, rtol=0, atol=0)
    root = torch.linalg.eigh(z.T @ z)
    square_root = root.eigenvectors @ torch.diag(root.eigenvalues.clamp_min(0).sqrt()) @ root.eigenvectors.T
    torch.testing.assert_close(spectral_filter(z, sigma=1), z @ square_root, rtol=1e-6, atol=1e-6)
    white = spectral_filter(z, sigma=-1)
    gram = white @ white.T
    torch.testing.assert_close(gram @ gram, gram)
    assert float(effective_rank(white)) == pytest.approx(min(shape))
    a, b = 0.4, -0.7  # s -> s^(1 + a) -> s^((1 + a)(1 + b))
    twice = spectral_filter(spectral_filter(z, sigma=a), sigma=b)
    torch.testing.assert_close(twice, spectral_filter(z, sigma=(1 + a) * (1 + b) - 1))


@pytest.mark.parametrize("sigma", [-1.0, -0.5, 1.0])
def test_what_a_batch_does_not_span_stays_finite(sigma):
    z = randn(6, 2) @ randn(2, 4, seed=1)  # rank 2 of 4
    out = spectral_filter(z.float(), sigma=sigma)
    assert out.isfinite().all()
    assert float(effective_rank(out)) <= 2.001
    assert spectral_filter(torch.ones(5, 3), sigma=sigma).isfinite().all()
    assert torch.equal(spectral_filter(torch.zeros(5, 3), sigma=sigma), torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_large_numbers_do_not_leave_the_range_on_the_way(shape):
    z = 1e25 * randn(*shape)
    torch.testing.assert_close(
        spectral_filter(z.float(), "log1p").double(), by_svd(z, torch.log1p), rtol=1e-3, atol=1e21
    )


def test_the_gradient_takes_the_filter_for_a_linear_predictor():
    z = randn(7, 4).requires_grad_()
    left, s, right = torch.linalg.svd(z.detach(), full_matrices=False)
    w = right.T @ torch.diag(torch.log1p(s)) @ right
    (ours,) = torch.autograd.grad(spectral_filter(z, "log1p").square().sum(), z)
    (theirs,) = torch.autograd.grad((z @ w).square().sum(), z)
    torch.testing.assert_close(ours, theirs)


# The rank.


def test_effective_rank_of_known_spectra():
    z = orthogonal(8)[:, :5]
    assert float(effective_rank(z)) == pytest.approx(5)
    assert float(effective_rank(torch.ones(6, 4, dtype=torch.float64))) == pytest.approx(1)
    s = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    for of, p in (("singular", s / 7), ("eigen", s**2 / 21)):
        found = effective_rank(orthogonal(5)[:, :3] @ torch.diag(s) @ orthogonal(3, 1), of=of)
        assert float(found) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    moved = z + 100 * randn(1, 5, seed=2)
    torch.testing.assert_close(effective_rank(moved, center=True), effective_rank(z, center=True))
    assert effective_rank(moved) < 2


@pytest.mark.parametrize("of", ["singular", "eigen"])
def test_effective_rank_is_between_one_and_the_rank(of):
    for seed in range(30):
        rank = 1 + seed % 4
        z = randn(9, rank, seed=seed) @ randn(rank, 6, seed=seed + 50)
        assert 1 - 1e-9 <= float(effective_rank(z, of=of)) <= rank + 1e-9


def test_effective_rank_is_a_metric_that_units_and_rotations_leave_alone(as_a_user):
    z = randn(9, 4)
    check_metric(effective_rank, z, known=[((torch.eye(3),), 3.0)])
    for other in (1e-200 * z, 1e200 * z, z @ orthogonal(4), orthogonal(9) @ z):
        torch.testing.assert_close(effective_rank(other), effective_rank(z))
    x = randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(effective_rank, x)


def test_rising_filters_lower_the_rank_and_falling_ones_raise_it():
    for seed in range(100):
        z = orthogonal(7, seed)[:, :4] @ torch.diag(
            torch.rand(4, dtype=torch.float64, generator=rng(seed)) + 0.1
        )
        for rising in ("power", "log1p", "log1p-squared"):
            assert rank_difference(spectral_filter(z, rising), z) > 0
        assert rank_difference(z, spectral_filter(z, sigma=-0.5)) > 0
        assert rank_difference(z, spectral_filter(z, sigma=0.5)) < 0
    flat = orthogonal(7)[:, :4]
    assert abs(float(rank_difference(spectral_filter(flat), flat))) < 1e-9


def test_a_monitor_keeps_the_ranks_of_both_branches():
    monitor = RankMonitor()
    assert monitor.result()["online"].shape == (0,)
    pairs = [(randn(8, 3, seed=k), randn(8, 3, seed=k + 9).requires_grad_()) for k in range(3)]
    for online, target in pairs:
        monitor.update(online, target)
    found = monitor.result()
    expected = [[float(effective_rank(z.detach())) for z in side] for side in zip(*pairs, strict=True)]
    np.testing.assert_allclose(found["online"], expected[0])
    np.testing.assert_allclose(found["target"], expected[1])
    np.testing.assert_allclose(found["difference"], np.subtract(expected[1], expected[0]))


# The loss.


@pytest.mark.parametrize("location", ["online", "target"])
def test_the_loss_is_minus_the_mean_cosine_with_the_other_view(location):
    z1, z2 = randn(8, 4), randn(8, 4, seed=1)
    f = [by_svd(z, torch.log1p) for z in (z1, z2)]
    pairs = [(f[0], z2), (f[1], z1)] if location == "online" else [(z1, f[1]), (z2, f[0])]
    expected = -sum(F.cosine_similarity(a, b).mean() for a, b in pairs) / 2
    loss = RDMLoss("log1p", location=location)
    torch.testing.assert_close(loss(z1, z2), expected)
    torch.testing.assert_close(RDMLoss("log1p", location=location, form="byol")(z1, z2), 4 + 4 * expected)


def test_a_momentum_branch_gives_targets_and_gets_no_gradient():
    views = [randn(8, 4, seed=seed).requires_grad_() for seed in range(4)]
    for location in ("online", "target"):
        loss = RDMLoss(sigma=0.5 if location == "online" else -0.5, location=location)
        value = loss(*views)
        value.backward()
        assert views[2].grad is None and views[3].grad is None
        own = loss(views[0], views[1], views[0], views[1])
        torch.testing.assert_close(own, loss(views[0], views[1]))
        assert not torch.isclose(value, own)


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_a_filtered_target_is_a_constant(shape):
    z1, z2 = (randn(*shape, seed=seed).requires_grad_() for seed in range(2))
    ours = torch.autograd.grad(RDMLoss(sigma=-0.5, location="target")(z1, z2), (z1, z2))
    targets = [by_svd(z.detach(), lambda s: s**-0.5) for z in (z1, z2)]
    by_hand = -(F.cosine_similarity(z1, targets[1]).mean() + F.cosine_similarity(z2, targets[0]).mean()) / 2
    for a, b in zip(ours, torch.autograd.grad(by_hand, (z1, z2)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_the_gradient_is_that_of_alignment_with_constants(shape):
    z1, z2 = (randn(*shape, seed=seed).requires_grad_() for seed in range(2))
    ours = torch.autograd.grad(RDMLoss()(z1, z2), (z1, z2))
    w = []
    for z in (z1, z2):
        _, s, right = torch.linalg.svd(z.detach(), full_matrices=False)
        w.append(right.T @ torch.diag(s) @ right)
    by_hand = -(
        F.cosine_similarity(z1 @ w[0], z2.detach()).mean() + F.cosine_similarity(z2 @ w[1], z1.detach()).mean()
    ) / 2  # fmt: skip
    for a, b in zip(ours, torch.autograd.grad(by_hand, (z1, z2)), strict=True):
        torch.testing.assert_close(a, b)


def test_rotations_and_for_powers_units_do_not_matter():
    z1, z2 = randn(8, 4), randn(8, 4, seed=1)
    q = orthogonal(4, 2)
    for loss in (RDMLoss(), RDMLoss("log1p"), RDMLoss(sigma=-1, location="target")):
        torch.testing.assert_close(loss(z1 @ q, z2 @ q), loss(z1, z2))
    for loss in (RDMLoss(), RDMLoss(sigma=-1, location="target"), RDMLoss(sigma=-0.5, location="target")):
        torch.testing.assert_close(loss(1e-3 * z1, 1e3 * z2), loss(z1, z2))


def test_a_power_of_zero_is_the_plain_symmetric_loss():
    z1, z2 = (randn(8, 4, seed=seed).requires_grad_() for seed in range(2))
    plain = -(F.cosine_similarity(z1, z2.detach()).mean() + F.cosine_similarity(z2, z1.detach()).mean()) / 2
    expected = torch.autograd.grad(plain, (z1, z2))
    for location in ("online", "target"):
        value = RDMLoss(sigma=0, location=location)(z1, z2)
        assert torch.equal(value, plain)
        for ours, theirs in zip(torch.autograd.grad(value, (z1, z2)), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "loss",
    [
        RDMLoss(), RDMLoss("log1p", form="byol"), RDMLoss("log"), RDMLoss(sigma=-1, location="target"),
        RDMLoss("log1p-squared"), RDMLoss(sigma=0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(6, 5), (4, 7)])
def test_it_is_a_loss_of_two_views(as_a_user, loss, shape):
    check_embedding_loss(loss, n=shape[0], dim=shape[1], compiles=False, detaches=True)


def test_a_collapsed_batch_has_a_finite_gradient():
    for loss in (RDMLoss(), RDMLoss(sigma=-1, location="target"), RDMLoss("log")):
        z = torch.ones(6, 4).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss(z, z).backward()
        assert z.grad.isfinite().all()


def test_a_falling_target_filter_raises_the_rank_of_what_is_aligned():
    """Descent on two views themselves, from a spectrum that falls steeply."""
    start = randn(64, 16) @ torch.diag(0.7 ** torch.arange(16, dtype=torch.float64))
    ranks = {}
    for sigma in (-1.0, 0.0, 1.0):
        z = [(start + 0.1 * randn(64, 16, seed=k)).requires_grad_() for k in (1, 2)]
        opt = torch.optim.SGD(z, lr=5.0)
        for _ in range(60):
            opt.zero_grad()
            RDMLoss(sigma=sigma, location="target")(*z).backward()
            opt.step()
        ranks[sigma] = float(effective_rank(F.normalize(z[0].detach(), dim=1)))
    assert ranks[-1.0] > ranks[0.0] + 0.5 > ranks[1.0] + 0.5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RDMLoss("square"), "filter must be one of"),
        (lambda: RDMLoss(location="both"), "location"),
        (lambda: RDMLoss(form="mse"), "form"),
        (lambda: RDMLoss(sigma=float("nan")), "sigma must be a finite number"),
        (lambda: RDMLoss(sigma=float("inf")), "sigma must be a finite number"),
        (lambda: spectral_filter(torch.ones(3, 2), sigma="1"), "sigma must be a finite number"),
        (lambda: RDMLoss()(*[torch.randn(4, 3)] * 2, torch.randn(3, 3), torch.randn(3, 3)), "target1 must have shape"),
        (lambda: rank_difference(torch.zeros(3, 2), torch.ones(3, 2)), "online must not be all 0"),
        (lambda: spectral_filter(torch.ones(3, 2), lambda s: s[:1]), "filter must return a tensor of the shape"),
        (lambda: spectral_filter(torch.ones(3, 2), lambda s: s / 0), "filter must return finite"),
        (lambda: spectral_filter(torch.ones(3)), "z must have shape"),
        (lambda: spectral_filter(torch.full((3, 2), torch.inf)), "z must be finite"),
        (lambda: RDMLoss()(torch.full((3, 2), torch.nan), torch.ones(3, 2)), "z1 must be finite"),
        (lambda: RDMLoss(location="target")(*[torch.ones(3, 2)] * 3, torch.full((3, 2), torch.nan)), "target2 must be finite"),
        (lambda: RDMLoss()(torch.ones(3, 0), torch.ones(3, 0)), "z1 must have a column"),
        (lambda: rank_difference(torch.ones(3, 2), torch.zeros(3, 2)), "target must not be all 0"),
        (lambda: RDMLoss()(*[torch.randn(4, 3)] * 3), "target2 is missing"),
        (lambda: RDMLoss()(*[torch.randn(4, 3)] * 2, target2=torch.randn(4, 3)), "target1 is missing"),
        (lambda: RDMLoss()(*[torch.randn(4, 3)] * 3, torch.randn(4, 2)), "target2 must have shape"),
        (lambda: effective_rank(torch.zeros(4, 3)), "z must not be all 0"),
        (lambda: effective_rank(torch.ones(4, 3), center=True), "once its mean is off"),
        (lambda: effective_rank(torch.full((4, 3), torch.nan)), "z must be finite"),
        (lambda: effective_rank(torch.ones(4, 3), of="both"), "of must be"),
        (lambda: RankMonitor().update(torch.ones(4, 3), torch.ones(4, 2)), "target must have shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
