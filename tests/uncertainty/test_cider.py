"""CIDER's prototypes, losses and score against loops, closed forms and brute force."""

import math
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from posterity.testing import check_loss
from posterity.testing._low_precision import check_low_precision
from posterity.uncertainty import (
    CIDERLoss,
    KNNScore,
    compactness_loss,
    dispersion_loss,
    hypersphere_geometry,
    update_prototypes,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def units(n, d=5, seed=0):
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=rng(seed)), dim=1)


def classes(n, c, seed=0):
    return torch.randint(c, (n,), generator=rng(seed))


def loop(prototypes, z, y, momentum):
    rows = list(prototypes)
    for sample, label in zip(z, y.tolist(), strict=True):
        rows[label] = F.normalize(momentum * rows[label] + (1 - momentum) * sample, dim=0)
    return torch.stack(rows)


# Prototypes.


@pytest.mark.parametrize(("n", "c"), [(40, 4), (7, 12), (1, 2), (30, 1)])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_prototypes_move_sample_by_sample(n, c, momentum):
    mu, z, y = units(c), units(n, seed=1).requires_grad_(), classes(n, c)
    got, want = update_prototypes(mu, z, y, momentum), loop(mu, z, y, momentum)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(c, dtype=torch.float64))
    probe = torch.randn(c, 5, dtype=torch.float64, generator=rng(3))
    grads = [torch.autograd.grad((out * probe).sum(), z)[0] for out in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_absent_classes_stay_and_only_the_order_within_a_class_matters():
    mu, z, y = units(4), units(9, seed=1), torch.tensor([0, 2, 0, 2, 2, 0, 0, 2, 2])
    new = update_prototypes(mu, z, y, 0.8)
    assert torch.equal(new[[1, 3]], mu[[1, 3]])
    grouped = y.argsort(stable=True)
    torch.testing.assert_close(update_prototypes(mu, z[grouped], y[grouped], 0.8), new)
    assert not torch.allclose(update_prototypes(mu, z.flip(0), y.flip(0), 0.8), new)
    assert torch.equal(update_prototypes(mu, z[:0], y[:0], 0.8), mu)


# Losses.


def simplex(c, d):
    points = torch.eye(c, dtype=torch.float64) - 1 / c
    return F.normalize(F.pad(points, (0, d - c)), dim=1)


@pytest.mark.parametrize("c", [2, 3, 6])
def test_dispersion_is_least_at_the_regular_simplex(c):
    least = -1 / ((c - 1) * 0.1)
    torch.testing.assert_close(dispersion_loss(simplex(c, 8)), torch.tensor(least, dtype=torch.float64))
    for seed in range(60):
        assert float(dispersion_loss(units(c, 8, seed))) >= least
        near = F.normalize(simplex(c, 8) + 0.05 * units(c, 8, seed), dim=1)
        assert float(dispersion_loss(near)) >= least - 1e-12


def test_dispersion_does_not_know_axes_or_names():
    mu = units(5)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=rng(1)))[0]
    value = dispersion_loss(mu, 0.3)
    torch.testing.assert_close(dispersion_loss(mu @ turn, 0.3), value)
    torch.testing.assert_close(dispersion_loss(mu[torch.tensor([3, 0, 4, 1, 2])], 0.3), value)
    rows = [
        torch.log(torch.stack([torch.exp(mu[i] @ mu[j] / 0.3) for j in range(5) if j != i]).mean())
        for i in range(5)
    ]
    torch.testing.assert_close(value, torch.stack(rows).mean())


def test_compactness_is_cross_entropy_of_cosines():
    z, mu, y = units(20), units(4, seed=1), classes(20, 4)
    want = F.cross_entropy(z @ mu.T / 0.2, y)
    torch.testing.assert_close(compactness_loss(z, mu, y, 0.2), want, atol=1e-12, rtol=0)


def test_dispersion_reaches_the_embeddings_and_compactness_sees_fixed_prototypes():
    z, y = units(20, seed=1).requires_grad_(), classes(20, 3)
    loss = CIDERLoss(3, 5, momentum=0.7, compactness_weight=1.5).double()
    before = loss.prototypes.clone()
    value = loss(z, y)
    moved = loop(before, z, y, 0.7)
    want = dispersion_loss(moved) + 1.5 * compactness_loss(z, moved.detach(), y)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(
        torch.autograd.grad(value, z)[0], torch.autograd.grad(want, z, retain_graph=True)[0]
    )
    apart = torch.autograd.grad(dispersion_loss(moved), z)[0]
    assert bool((apart.abs().sum(1) > 0).any())
    torch.testing.assert_close(loss.prototypes, moved.detach())
    assert not loss.prototypes.requires_grad and "prototypes" in loss.state_dict()


def test_in_eval_mode_nothing_moves():
    loss = CIDERLoss(3, 5).double().eval()
    before = loss.prototypes.clone()
    z, y = units(10).requires_grad_(), classes(10, 3)
    value = loss(z, y)
    assert torch.equal(loss.prototypes, before)
    torch.testing.assert_close(value, dispersion_loss(before) + 2 * compactness_loss(z, before, y))


def test_a_state_dict_carries_on():
    first, second = CIDERLoss(3, 5).double(), CIDERLoss(3, 5).double()
    z, y = units(10), classes(10, 3)
    first(z, y)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(z, y), second(z, y)) and torch.equal(first.prototypes, second.prototypes)


def test_learned_prototypes_get_the_gradient_of_both_terms():
    loss = CIDERLoss(3, 5, prototypes="learned").double()
    with torch.no_grad():
        loss.prototypes.mul_(3)
    z, y = units(12), classes(12, 3)
    mu = F.normalize(loss.prototypes, dim=1)
    want = dispersion_loss(mu) + 2 * compactness_loss(z, mu, y)
    value = loss(z, y)
    torch.testing.assert_close(value, want)
    grads = [torch.autograd.grad(v, loss.prototypes, retain_graph=True)[0] for v in (value, want)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(
        lambda z: loss(F.normalize(z, dim=1), y), (units(12, seed=3).requires_grad_(),)
    )


def test_initialisation_takes_class_means_at_once_or_in_batches():
    z, y = units(30), classes(30, 3)
    want = torch.stack([F.normalize(z[y == k].mean(0), dim=0) for k in range(3)])
    for given in ((z, y), ([(z[:11], y[:11]), (z[11:], y[11:])],)):
        loss = CIDERLoss(3, 5).double()
        loss.initialize(*given)
        torch.testing.assert_close(loss.prototypes, want)


class OnTheSphere(nn.Module):
    """The loss of directions, its prototypes at rest so that two calls agree."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.loss = CIDERLoss(3, 5, prototypes=kind).double().eval()

    def forward(self, x, y):
        return self.loss.to(x.dtype)(F.normalize(x + 1e-3, dim=1), y)


@pytest.mark.parametrize("kind", ["ema", "learned"])
def test_conformance(kind, as_a_user):
    x = torch.randn(8, 5, dtype=torch.float64, generator=rng()).requires_grad_()
    check_loss(OnTheSphere(kind), x, classes(8, 3), extremes=1e3, compiles=kind == "ema", symmetric=True)


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        (lambda mu, z, y: update_prototypes(mu, z, y, 0.95), (units(4), units(300, seed=1), classes(300, 4))),
        (dispersion_loss, (units(30),)),
        (lambda z, mu, y: compactness_loss(z, mu, y), (units(300), units(4, seed=1), classes(300, 4))),
        (lambda known, x: KNNScore(5).fit(known).score(x), (units(40), units(20, seed=1))),
    ],
)  # fmt: skip
def test_low_precision_rounds_the_result_only(as_a_user, call, inputs):
    z = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    check_low_precision(call, None, z, slack=4, gradient=call(*z).requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moving_averages_do_not_stand_still_in_a_narrow_module(as_a_user, dtype):
    low, exact = CIDERLoss(3, 5).to(dtype), CIDERLoss(3, 5)
    exact.load_state_dict(low.state_dict())
    z, y = units(3, seed=1).to(dtype), torch.arange(3)
    for _ in range(100):
        assert low(z, y).dtype == dtype
        exact(z.float(), y)
    assert low.prototypes.dtype == torch.float32
    torch.testing.assert_close(low.prototypes, exact.prototypes)
    torch.testing.assert_close(low.prototypes, z.float(), rtol=0, atol=0.03)
    assert hypersphere_geometry(z, y, low.prototypes)["compactness"] < 2


@pytest.mark.parametrize("scale", [1e-200, 1e-12, 1e12, 1e200])
def test_only_directions_of_features_count_whatever_their_unit(scale):
    known, x = (torch.randn(20, 4, dtype=torch.float64, generator=rng(seed)) for seed in (0, 1))
    far = KNNScore(3).fit(known * scale).score(x * scale)
    torch.testing.assert_close(far, KNNScore(3).fit(known).score(x))


SECOND = """
import sys
from datetime import timedelta
import torch
from torch import distributed
from posterity.uncertainty import CIDERLoss

data = torch.load(sys.argv[1])
store = distributed.FileStore(sys.argv[2], 2)
distributed.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=60))
loss, z = CIDERLoss(3, 5, momentum=0.7).double(), data["z"][7:].requires_grad_()
loss(z, data["y"][7:]).backward()
torch.save({"prototypes": loss.prototypes, "gradient": z.grad}, sys.argv[3])
distributed.destroy_process_group()
"""


def test_two_processes_take_the_step_of_their_joint_batch(tmp_path):
    """Batches of 7 and 5: with the gradients of both averaged, that of all 12 rows by dispersion."""
    z, y = units(12), classes(12, 3)
    files = [str(tmp_path / name) for name in ("data", "store", "found")]
    torch.save({"z": z, "y": y}, files[0])
    alone, first = CIDERLoss(3, 5, momentum=0.7).double(), CIDERLoss(3, 5, momentum=0.7).double()
    first.load_state_dict(alone.state_dict())
    start = alone.prototypes.clone()
    other = subprocess.Popen([sys.executable, "-c", SECOND, *files])
    try:
        distributed.init_process_group(
            "gloo", store=distributed.FileStore(files[1], 2), rank=0, world_size=2,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        ours = z[:7].clone().requires_grad_()
        first(ours, y[:7]).backward()
        assert other.wait(60) == 0
    finally:
        other.kill()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    found = torch.load(files[2])
    whole = z.clone().requires_grad_()
    alone(whole, y)
    torch.testing.assert_close(first.prototypes, alone.prototypes)
    torch.testing.assert_close(found["prototypes"], alone.prototypes)
    mu = update_prototypes(start, whole, y, 0.7)
    near = [compactness_loss(whole[rows], mu.detach(), y[rows]) for rows in (slice(7), slice(7, 12))]
    (dispersion_loss(mu) + 2 * (near[0] + near[1]) / 2).backward()
    torch.testing.assert_close(torch.cat([ours.grad, found["gradient"]]) / 2, whole.grad)


def test_training_spreads_prototypes_to_the_simplex():
    x, y = torch.randn(32, 8, generator=rng()).requires_grad_(), torch.arange(32) % 4
    loss = CIDERLoss(4, 8)
    loss.initialize(F.normalize(x, dim=1), y)
    start = hypersphere_geometry(x.detach(), y, loss.prototypes)
    opt = torch.optim.SGD([x], lr=5.0)
    for _ in range(150):
        opt.zero_grad()
        loss(F.normalize(x, dim=1), y).backward()
        opt.step()
    geometry = hypersphere_geometry(x.detach(), y, loss.prototypes)
    assert geometry["dispersion"] > math.degrees(math.acos(-1 / 3)) - 2 > start["dispersion"]
    assert geometry["compactness"] < start["compactness"] - 10


# The score.


@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_score_is_the_kth_distance_of_directions(k):
    known, queries = torch.randn(20, 6, generator=rng()), torch.randn(13, 6, generator=rng(1))
    distance = torch.cdist(F.normalize(queries, dim=1), F.normalize(known, dim=1)).sort(1).values[:, k - 1]
    score = KNNScore(k, chunk_size=4).fit(known)
    torch.testing.assert_close(score.score(queries), distance)
    torch.testing.assert_close(score.score(queries * torch.rand(13, 1, generator=rng(2)) * 9), distance)
    torch.testing.assert_close(KNNScore(k).fit(known * 3).score(queries), distance)


def test_training_features_are_at_distance_zero_of_themselves():
    known = torch.randn(50, 6, generator=rng())
    assert float(KNNScore(1).fit(known).score(known).max()) < 1e-6


def test_the_threshold_keeps_its_share():
    known, held = torch.randn(100, 4, generator=rng()), torch.randn(200, 4, generator=rng(1))
    score = KNNScore(5).fit(known)
    for share in (0.5, 0.95, 1.0):
        kept = float((score.score(held) <= score.threshold(held, share)).double().mean())
        assert abs(kept - share) <= 0.006


def test_faiss_gives_the_same_distances():
    pytest.importorskip("faiss")
    known, queries = torch.randn(40, 6, generator=rng()), torch.randn(9, 6, generator=rng(1))
    want = KNNScore(4).fit(known).score(queries)
    torch.testing.assert_close(
        KNNScore(4, backend="faiss").fit(known).score(queries), want, atol=1e-3, rtol=0
    )


def test_geometry_in_degrees_of_known_arrangements():
    axes = torch.eye(3)
    found = hypersphere_geometry(
        axes[[0, 0, 1]], torch.tensor([0, 1, 1]), axes, ood=F.normalize(torch.ones(1, 3), dim=1)
    )
    assert found["dispersion"] == pytest.approx(90)
    assert found["compactness"] == pytest.approx((0 + (90 + 0) / 2) / 2)
    assert found["separability"] == pytest.approx(math.degrees(math.acos(1 / math.sqrt(3))))


# Bad input.


def test_wrong_arguments_are_refused(as_a_user):
    z, y, mu = units(6), classes(6, 3), units(3, seed=1)
    loss = CIDERLoss(3, 5).double()
    for call, message in [
        (lambda: CIDERLoss(1, 5), "n_classes"),
        (lambda: CIDERLoss(3, 0), "dim"),
        (lambda: CIDERLoss(3, 5, momentum=1.0), "momentum"),
        (lambda: CIDERLoss(3, 5, temperature=0), "temperature"),
        (lambda: CIDERLoss(3, 5, compactness_weight=-1), "compactness_weight"),
        (lambda: CIDERLoss(3, 5, prototypes="fixed"), "prototypes"),
        (lambda: loss(2 * z, y), "unit rows, got lengths .*normalise them first"),
        (lambda: loss(z * math.nan, y), "finite"),
        (lambda: loss(z, y + 1), r"target must be in 0\.\.2"),
        (lambda: loss(z, y.double()), "class indices"),
        (lambda: loss(z, y[:3]), "target must have shape"),
        (lambda: loss(z[:, :4], y), "embeddings must have shape"),
        (
            lambda: loss.initialize(z, torch.zeros(6, dtype=torch.int64)),
            "embeddings must hold each class, got none of class 1",
        ),
        (lambda: loss.initialize(z), "target must be given"),
        (lambda: update_prototypes(mu, z, y, 1.0), "momentum"),
        (lambda: dispersion_loss(mu[:1]), "at least two"),
        (lambda: dispersion_loss(mu, 0.0), "temperature"),
        (lambda: compactness_loss(z, mu, y, -1.0), "temperature"),
        (lambda: KNNScore(0), "k must be"),
        (lambda: KNNScore(backend="annoy"), "backend"),
        (lambda: KNNScore(7).fit(z), "k must be at most"),
        (lambda: KNNScore(2).score(z), "call fit first"),
        (lambda: KNNScore(2).fit(z).score(z[:, :2]), "features must have shape"),
        (lambda: KNNScore(2).fit(z * math.inf), "finite"),
        (lambda: KNNScore(2).fit(z).threshold(z, 0.0), "tpr"),
        (lambda: hypersphere_geometry(z, y, mu[:, :2]), "prototypes must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
