"""The rarity score against all pairs by differences, on lines and grids, far away, and in low precision."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from posterity.generative import (
    RarityManifold,
    RarityScore,
    knn_radii,
    rarity_score,
    realism_score,
)
from posterity.testing import check_metric

LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
QUERIES = torch.tensor([[0.5], [1.5], [2.5], [4.0], [10.9], [11.0], [-1.0]])


def clouds(n=100, m=80, d=6, seed=0, dtype=torch.float64):
    """Return real samples, denser in one half and some of them twice, and samples, some of them real."""
    rng = torch.Generator().manual_seed(seed)
    real = torch.randn(n, d, dtype=torch.float64, generator=rng)
    real[: n // 2] *= 0.3
    real[10:14] = real[9]
    samples = 1.2 * torch.randn(m, d, dtype=torch.float64, generator=rng)
    samples[:30] = real[:30]
    return real.to(dtype), samples.to(dtype)


def distances(a, b, metric="euclidean"):
    """All pairs by differences in float64, or by angles."""
    a, b = a.double(), b.double()
    if metric == "cosine":
        return 1 - nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    return (a[:, None] - b[None]).square().sum(2).sqrt()


def by_hand(real, samples, k, metric="euclidean"):
    """The definition: radii, then for each sample the smallest of the balls that contain it."""
    among = distances(real, real, metric)
    among.fill_diagonal_(math.inf)
    radii = among.sort(1).values[:, k - 1]
    apart = distances(samples, real, metric)
    scores, homes = [], []
    for row in apart:
        balls = (row < radii).nonzero()[:, 0].tolist()
        homes.append(min(balls, key=lambda ball: (radii[ball], ball), default=-1))
        scores.append(radii[homes[-1]] if balls else torch.tensor(math.nan).double())
    return radii, torch.stack(scores), torch.tensor(homes), apart


def same(found, scores, homes, rtol=1e-12):
    torch.testing.assert_close(found.score.double(), scores, rtol=rtol, atol=0, equal_nan=True)
    assert torch.equal(found.inside, homes >= 0)
    assert torch.equal(found.nearest, homes)


def test_on_a_line_it_is_what_one_counts_by_hand():
    assert knn_radii(LINE, 1).tolist() == [1, 1, 2, 4]
    found = rarity_score(LINE, QUERIES, 1)
    assert found.score[:5].tolist() == [1, 1, 2, 2, 4]
    assert found.score[5:].isnan().all()
    assert found.inside.tolist() == [True] * 5 + [False] * 2  # an edge is outside
    assert found.nearest.tolist() == [0, 1, 2, 2, 3, -1, -1]
    assert found.mean() == 2
    assert float(found.rate()) == pytest.approx(5 / 7)
    assert found.ranking().tolist() == [4, 2, 3, 0, 1]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_is_the_definition_over_all_pairs_whatever_the_block(k, metric):
    real, samples = clouds()
    radii, scores, homes, _ = by_hand(real, samples, k, metric)
    if metric == "cosine":  # by angles a copy is 1e-16 away: on one side of its edge or on the other
        samples, scores, homes = samples[30:], scores[30:], homes[30:]
    manifold = RarityManifold(real, k_max=5, metric=metric, batch_size=31)
    atol = 1e-14 if metric == "cosine" else 0
    torch.testing.assert_close(manifold.radii(k), radii, rtol=1e-12, atol=atol)
    same(manifold(samples, k), scores, homes, 1e-10)
    for batch_size in (13, 1024):
        torch.testing.assert_close(
            knn_radii(real, k, metric=metric, batch_size=batch_size), radii, rtol=1e-12, atol=atol
        )
        same(rarity_score(real, samples, k, metric=metric, batch_size=batch_size), scores, homes, 1e-10)


@pytest.mark.parametrize("change", ["float64 products", "outliers", "clusters", "far", "huge", "tiny"])
def test_is_the_definition_where_squares_cancel_or_overflow(change, monkeypatch):
    real, samples = clouds(d=3)
    unit = {"huge": 2.0**498, "tiny": 2.0**-530}.get(change, 1.0)
    if change == "float64 products":  # as where a user lets float32 be rounded
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    elif change == "outliers":
        real[7], real[8], samples[40] = 1e9, 1e9 + 1, 1e12
    elif change == "clusters":
        real, samples = (x + 1e7 * (torch.arange(len(x)) % 2)[:, None] for x in (real, samples))
    elif change == "far":
        real, samples = real + 1e8, samples + 1e8
    for k in (1, 4):
        radii, scores, homes, apart = by_hand(real, samples, k)
        same(rarity_score(real * unit, samples * unit, k, batch_size=50), scores * unit, homes)
        if unit == 1:
            kept = radii <= radii.quantile(0.5)
            realism = (radii / (apart + 1e-6))[:, kept].amax(1)
            torch.testing.assert_close(
                realism_score(real, samples, k, batch_size=50), realism, rtol=1e-9, atol=0
            )


def test_radii_are_those_of_scikit_learn():
    real = clouds()[0].unique(dim=0)
    found = NearestNeighbors(n_neighbors=5, algorithm="kd_tree").fit(real.numpy()).kneighbors(real.numpy())[0]
    np.testing.assert_allclose(knn_radii(real, 4), found[:, 4], rtol=1e-12)


def test_permuted_turned_moved_and_scaled_features_have_the_same_scores():
    real, samples = clouds()
    found = rarity_score(real, samples, 3)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    permuted = rarity_score(real[order], samples, 3)
    torch.testing.assert_close(permuted.score, found.score, rtol=0, atol=0, equal_nan=True)
    rows = torch.arange(30, len(samples))  # copies of real samples lie on edges, which a rotation rounds
    expected = found.score[rows]
    turn = torch.linalg.qr(
        torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]
    for move in (lambda x: x @ turn, lambda x: x + 1e4, lambda x: x - 1e4, lambda x: (x @ turn) * 0.1 + 1e4):
        scale = 0.1 if move(real).std() < real.std() / 2 else 1.0
        moved = rarity_score(move(real), move(samples[rows]), 3).score
        torch.testing.assert_close(moved, expected * scale, rtol=1e-9, atol=0, equal_nan=True)
    cosine = rarity_score(real, samples[rows], 3, metric="cosine").score
    scaled = rarity_score(7.3 * real, 0.1 * samples[rows], 3, metric="cosine").score
    torch.testing.assert_close(scaled, cosine, rtol=1e-9, atol=0, equal_nan=True)


def test_balls_grow_with_k_and_the_fraction_inside_is_improved_precision():
    real, samples = clouds()
    manifold, before, was = RarityManifold(real), torch.zeros(len(samples), dtype=torch.bool), 0.0
    for k in (1, 2, 3, 5, 10):
        found, radii = manifold(samples, k), manifold.radii(k)
        assert (radii >= was).all()
        assert (found.inside >= before).all()
        neighbours = NearestNeighbors(n_neighbors=k + 1, algorithm="kd_tree").fit(real.numpy())
        edge = neighbours.kneighbors(real.numpy())[0][:, k]
        precision = (distances(samples[30:], real).numpy() < edge).any(1).mean()
        assert float(manifold(samples[30:], k).rate()) == pytest.approx(precision)
        before, was = found.inside, radii


def test_a_real_sample_lies_in_a_ball_no_larger_than_its_own():
    real = clouds()[0].unique(dim=0)
    for k in (1, 3):
        found = rarity_score(real, real, k)
        assert found.inside.all()
        assert (found.score <= knn_radii(real, k)).all()


def test_a_sample_with_more_than_k_copies_has_an_empty_ball():
    real = torch.cat([torch.zeros(4, 2), 5 + torch.eye(2), 5 - torch.eye(2)])
    assert (knn_radii(real, 3)[:4] == 0).all()
    assert (knn_radii(real, 4)[:4] > 0).all()
    found = rarity_score(real, torch.zeros(1, 2) + 1e-3, 3)
    assert not found.inside.any()
    assert found.mean().isnan()
    assert found.rate() == 0
    assert len(found.ranking()) == 0


def test_on_a_grid_all_are_equally_rare_and_far_points_change_nothing():
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))
    samples = 3 + 6 * torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    found = rarity_score(grid, samples, 4)
    assert (found.score == 1).all()
    more = torch.cat([grid, torch.tensor([[1e6, 0.0], [1e6, 5e5]])])
    same(rarity_score(more, samples, 4), found.score.double(), found.nearest)


def test_realism_is_the_largest_ratio_over_the_smaller_balls():
    assert realism_score(LINE, torch.tensor([[2.0], [5.0], [1.0]]), 1).tolist() == pytest.approx(
        [1, 0.25, 1e6], rel=1e-5
    )
    real, samples = clouds()
    for k, metric, batch_size in ((1, "euclidean", 1024), (3, "euclidean", 31), (3, "cosine", 50)):
        radii, _, _, apart = by_hand(real, samples[30:], k, metric)
        kept = radii <= np.median(radii)
        expected = (radii / (apart + 1e-6))[:, kept].amax(1)
        torch.testing.assert_close(
            realism_score(real, samples[30:], k, metric=metric, batch_size=batch_size),
            expected,
            rtol=1e-9,
            atol=0,
        )


# radii are 3, 2, 3 and 6; -1.5 lies in the ball of 0, 2.5 in that of 1, 20 in none; realism drops that of 7
MEASURES = {
    "mean": (lambda real, samples: rarity_score(real, samples, 2).mean(), (3 + 2 + 2) / 3),
    "rate": (lambda real, samples: rarity_score(real, samples, 2).rate(), 3 / 4),
    "realism": (
        lambda real, samples: realism_score(real, samples, 2).mean(),
        (3 / 1.5 + 3 / 17 + 3 / 0.5 + 3 / 0.5) / 4,
    ),
}


@pytest.mark.parametrize("what", MEASURES)
def test_measures_conform_to_their_kind(as_a_user, what):
    real, samples = clouds(40, 70)
    measure, value = MEASURES[what]
    case = LINE.double(), torch.tensor([[-1.5], [20.0], [2.5], [0.5]]).double()
    check_metric(measure, real, samples[30:], known=[(case, value)], atol=1e-4)


def test_samples_beyond_all_scales_are_outside_and_unreal():
    real = clouds()[0]
    radii = by_hand(real, real, 3)[0]
    samples = torch.zeros(2, 6, dtype=torch.float64)
    samples[0, 0], samples[1, 0] = 1e25, 1e200  # whose square is beyond float64
    assert not rarity_score(real, samples, 3).inside.any()
    expected = radii[radii <= radii.quantile(0.5)].max() / 1e25
    torch.testing.assert_close(
        realism_score(real, samples, 3), torch.stack([expected, 0 * expected]), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_features_are_scored_as_the_same_numbers_in_float64(dtype):
    real, samples = clouds(dtype=dtype, d=4)
    _, scores, homes, _ = by_hand(real, samples, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        found = rarity_score(real, samples, 3)
    assert found.score.dtype == found.mean().dtype == found.rate().dtype == knn_radii(real).dtype == dtype
    same(found, scores, homes, rtol=torch.finfo(dtype).eps)
    assert realism_score(real, samples).dtype == dtype


def test_arrays_views_and_inference_mode_are_taken_and_inputs_left_alone(as_a_user):
    real, samples = clouds(dtype=torch.float32)
    found = rarity_score(real, samples)
    kept = copy.deepcopy((real, samples))
    wide = torch.stack([real, real], 2)[..., 0], torch.stack([samples, samples], 2)[..., 0]
    for pair in (
        (real.numpy(), samples.numpy()),
        wide,
        (real.requires_grad_(), samples),
        (real.detach().numpy()[::-1], samples),
    ):
        other = rarity_score(*pair)
        torch.testing.assert_close(other.score, found.score, rtol=0, atol=0, equal_nan=True)
        assert not other.score.requires_grad
    for kind in (np.longdouble, ">f8"):
        other = rarity_score(real.detach().numpy().astype(kind), samples)
        assert other.score.dtype == torch.float64
        torch.testing.assert_close(other.score.float(), found.score, rtol=1e-6, atol=0, equal_nan=True)
    with torch.inference_mode():
        torch.testing.assert_close(RarityManifold(real)(samples).score, found.score, equal_nan=True)
    assert torch.equal(real.detach(), kept[0])
    assert torch.equal(samples, kept[1])
    one = rarity_score(real, samples[:1])
    assert one.score.shape == one.inside.shape == (1,)


def test_memory_is_a_block_and_not_all_pairs():
    real = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    most = 0
    old = torch.Tensor.new_empty

    def watched(self, *size, **options):
        nonlocal most
        made = old(self, *size, **options)
        most = max(most, made.numel())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", watched)
        rarity_score(real, real + 0.1, batch_size=64)
    assert most == 64 * 600


class Extractor(nn.Module):
    """Pixels, and noise in training mode."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return x.flatten(1) * self.weight


def test_the_metric_over_uneven_batches_is_the_function():
    real, samples = clouds(dtype=torch.float32)
    found = rarity_score(real, samples, 2)
    net = Extractor().train()
    for metric, shape in ((RarityScore(k=2, batch_size=40), (6,)), (RarityScore(k=2, extractor=net), (2, 3))):
        for _ in range(2):
            for part in samples.view(-1, *shape).split([50, 1, 29]):
                metric.update(part, real=False)
            for part in real.view(-1, *shape).split([1, 99]):
                metric.update(part, real=True)
            got = pickle.loads(pickle.dumps(metric)).compute()
            torch.testing.assert_close(got["scores"], found.score, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got["mean"], found.mean())
            assert torch.equal(got["inside_rate"], found.rate())
            metric.reset()
            assert not metric.real
    assert set(net.seen) == {(False, False)}
    assert net.training
    assert list(RarityScore(extractor=net).parameters()) == []


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_computes_from_states_that_were_reduced():
    metric = RarityScore(k=1)
    metric.real, metric.samples = LINE, QUERIES
    assert metric.compute()["mean"] == 2


def test_an_extractor_that_fails_is_left_in_its_mode():
    class Broken(Extractor):
        def forward(self, x):
            raise RuntimeError("no")

    net = Broken().train()
    with pytest.raises(RuntimeError, match="no"):
        RarityScore(extractor=net).update(torch.ones(2, 3), real=True)
    assert net.training


def test_without_torchmetrics_the_metric_says_what_to_install(monkeypatch):
    import posterity.generative.realism as module

    monkeypatch.setattr(module, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match="torchmetrics is needed for RarityScore: pip install"):
        RarityScore()


REAL = torch.arange(12.0).view(6, 2)
ONE = torch.ones(1, 2)
BAD = torch.tensor([[1.0, 2.0], [1.0, math.nan]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rarity_score(REAL, torch.ones(1, 3)), "samples must have the 2 features of real, got 3"),
        (lambda: rarity_score(REAL, ONE, 0), "k must be an integer of at least 1, got 0"),
        (lambda: rarity_score(REAL, ONE, 1.5), "k must be an integer"),
        (lambda: rarity_score(REAL, ONE, 6), "real must have more rows than k=6, got 6"),
        (lambda: knn_radii(REAL, 6), "real must have more rows than k=6, got 6"),
        (lambda: realism_score(REAL, ONE, 6), "real must have more rows than k=6, got 6"),
        (lambda: RarityManifold(REAL), "real must have more rows than k_max=10, got 6"),
        (lambda: RarityManifold(REAL, k_max=2)(ONE, 3), "k must be at most k_max=2, got 3"),
        (lambda: RarityManifold(REAL, k_max=2).radii(3), "k must be at most k_max=2, got 3"),
        (lambda: rarity_score(BAD, ONE), "real must be finite, row 1 has NaN or infinity"),
        (lambda: rarity_score(REAL, BAD / 0), "samples must be finite, row 0 has NaN or infinity"),
        (lambda: rarity_score(REAL[None], ONE), r"real must be features of shape \(n, d\), got \(1, 6, 2\): pass images through"),
        (lambda: rarity_score(REAL, ONE[0]), r"samples must be features of shape \(n, d\), got \(2,\)"),
        (lambda: rarity_score(REAL, ONE[:0]), "samples must have at least one row"),
        (lambda: rarity_score(REAL.long(), ONE), "real must be floating-point features .* got dtype torch.int64"),
        (lambda: rarity_score(REAL, np.ones((1, 2), int)), "samples must be floating-point features .* got dtype int64"),
        (lambda: rarity_score(REAL, None), "samples must be floating-point features .* got NoneType"),
        (lambda: rarity_score("a", ONE), "real must be floating-point features .* got str"),
        (lambda: rarity_score(REAL, ONE, metric="l1"), "metric must be one of 'euclidean', 'cosine', got 'l1'"),
        (lambda: rarity_score(REAL, ONE, batch_size=0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: knn_radii(REAL, metric="l1"), "metric must be one of"),
        (lambda: rarity_score(REAL, 0 * ONE, metric="cosine"), "samples must have no zero row for the cosine, row 0 is"),
        (lambda: rarity_score(0 * REAL, ONE, metric="cosine"), "real must have no zero row for the cosine, row 0 is"),
        (lambda: rarity_score(0 * REAL, ONE), "real must have samples that differ: all radii are 0"),
        (lambda: RarityManifold(0 * REAL, k_max=2)(ONE, 1), "all radii are 0"),
        (lambda: realism_score(0 * REAL, ONE), "all radii are 0"),
        (lambda: RarityScore(k=0), "k must be an integer of at least 1"),
        (lambda: RarityScore(extractor=3), "extractor must be callable, got int"),
        (lambda: RarityScore(metric="l1"), "metric must be one of"),
        (lambda: RarityScore().update(REAL, real=1), "real must be True or False, got 1"),
        (lambda: RarityScore().update(REAL[None], real=True), "features must be features of shape"),
        (lambda: RarityScore(extractor=lambda x: x[None]).update(REAL, real=True), r"extractor\(features\) must be features of shape"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_needs_both_kinds_and_one_width(as_a_user):
    metric = RarityScore(k=1)
    for real, missing in ((None, "no real"), (True, "no samples")):
        if real:
            metric.update(REAL, real=True)
        with pytest.raises(
            ValueError, match=f"features of both kinds must be given before compute, got {missing}"
        ):
            metric.compute()
    with pytest.raises(ValueError, match="features must have the 2 features of batches before, got 3"):
        metric.update(torch.ones(1, 3), real=False)
