"""Robust means, compressors and attacks by definition."""

import functools
import math

import numpy as np
import pytest
import torch

from posterity.federated import (
    alie,
    bit_flip,
    bucketing,
    coordinate_median,
    geometric_median,
    ipm,
    krum,
    mimic,
    quantize_l2,
    rand_k,
    trimmed_mean,
)

AGGREGATORS = {
    "coordinate median": coordinate_median,
    "geometric median": geometric_median,
    "trimmed mean": functools.partial(trimmed_mean, n_trim=4),
    "krum": functools.partial(krum, n_byzantine=4),
    "krum of three": functools.partial(krum, n_byzantine=4, n_selected=3),
}
robust = pytest.mark.parametrize("aggregate", AGGREGATORS.values(), ids=AGGREGATORS)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(n=11, d=4, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=rng(seed), dtype=dtype) + 3


# robust means


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_the_coordinate_median_is_numpys(n):
    x = vectors(n)
    assert coordinate_median(x).numpy() == pytest.approx(np.median(x.numpy(), axis=0))


@pytest.mark.parametrize(("n", "d"), [(3, 1), (10, 2), (11, 5), (20, 50)])
def test_at_the_geometric_median_unit_vectors_sum_to_zero_or_to_less_than_one_at_a_vector(n, d):
    for seed in range(5):
        x = vectors(n, d, seed)
        z = geometric_median(x, max_iter=2000)
        away = x - z
        distance = away.norm(dim=1)
        here = distance < 1e-7
        pull = (away[~here] / distance[~here, None]).sum(0).norm()
        assert pull < 1e-6 or (here.any() and pull <= here.sum() + 1e-6)


def test_the_geometric_median_stays_at_a_vector_that_is_the_answer_and_leaves_one_that_is_not():
    tied = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    assert geometric_median(tied).tolist() == [0, 0]
    # the coordinate median, where the iteration begins, is a vector but not the answer
    x = torch.tensor([[0.0, 0], [4, 1], [-1, 4], [-4, -1], [1, -4.5], [9, 0], [0, 9]], dtype=torch.float64)
    start = coordinate_median(x)
    assert (x == start).all(1).any()
    z = geometric_median(x, max_iter=5000)
    sums = [(x - point).norm(dim=1).sum() for point in (z, start)]
    grid = torch.cartesian_prod(*[torch.linspace(-1, 2, 301, dtype=torch.float64)] * 2)
    assert sums[0] <= torch.cdist(grid, x).sum(1).min() + 1e-9 and sums[0] < sums[1]
    assert geometric_median(torch.ones(4, 3)).tolist() == [1, 1, 1]


@robust
def test_moving_all_vectors_moves_the_robust_mean_alike(aggregate):
    x, shift = vectors(), torch.tensor([5.0, -3.0, 100.0, 0.5], dtype=torch.float64)
    assert torch.allclose(aggregate(x + shift), aggregate(x) + shift, atol=1e-6)
    assert torch.allclose(aggregate(1e30 * x), 1e30 * aggregate(x), rtol=1e-6)
    assert torch.allclose(aggregate(1e-30 * x), 1e-30 * aggregate(x), rtol=1e-6)
    assert torch.allclose(aggregate(x[torch.randperm(11, generator=rng())]), aggregate(x), atol=1e-6)


@pytest.mark.parametrize("aggregate", [geometric_median, AGGREGATORS["krum"]])
def test_turning_all_vectors_turns_what_depends_on_distances_alone(aggregate):
    x = vectors()
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng(1), dtype=torch.float64))
    assert torch.allclose(aggregate(x @ turn), aggregate(x) @ turn, atol=1e-6)


@robust
@pytest.mark.parametrize("far", [1e3, 1e12])
def test_fewer_than_half_cannot_move_a_robust_mean_far(aggregate, far):
    x = vectors()
    moved = x.clone()
    moved[:4] = far * torch.tensor([1.0, -1.0, 1.0, 1.0])
    honest = x[4:]
    reach = (honest - honest.mean(0)).norm(dim=1).max()
    assert (aggregate(moved) - honest.mean(0)).norm() < 4 * reach
    assert (moved.mean(0) - honest.mean(0)).norm() > 0.1 * far, "the mean goes with them"


def test_the_trimmed_mean_is_that_of_the_middle_and_without_trimming_the_mean():
    x = vectors()
    ordered = np.sort(x.numpy(), axis=0)
    assert trimmed_mean(x, 3).numpy() == pytest.approx(ordered[3:-3].mean(0))
    assert torch.allclose(trimmed_mean(x, 0), x.mean(0))
    assert torch.allclose(trimmed_mean(x, 5), coordinate_median(x))


def test_krum_takes_the_vectors_with_the_nearest_neighbours_by_definition():
    for seed in range(5):
        x = vectors(9, 3, seed)
        scores = []
        for i in range(9):
            others = sorted(float(((x[i] - x[j]) ** 2).sum()) for j in range(9) if j != i)
            scores.append(sum(others[: 9 - 2 - 2]))
        order = np.argsort(scores)
        assert torch.allclose(krum(x, 2), x[order[0]])
        assert torch.allclose(krum(x, 2, 4), x[torch.tensor(order[:4])].mean(0))


def test_distances_of_long_vectors_are_those_of_short_ones():
    long = torch.zeros(6, 5000, dtype=torch.float64)
    long[:, :3] = vectors(6, 3)
    for f in (1, 2):
        assert torch.allclose(krum(long, f)[:3], krum(long[:, :3], f))


def test_krum_tells_near_vectors_apart_that_are_far_from_zero():
    x = torch.tensor([[1e6], [1e6 + 1], [1e6 + 3], [1e6 + 30], [0.0]])
    assert krum(x, 1).item() == 1e6 + 1


@pytest.mark.parametrize(
    ("s", "sizes"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (7, [7]), (100, [7])]
)
def test_buckets_are_means_of_consecutive_vectors_in_the_order_given(s, sizes):
    x = vectors(7)
    order = torch.randperm(7, generator=rng(3))
    want = torch.stack([part.mean(0) for part in x[order].split(sizes)])
    assert torch.allclose(bucketing(x, s, permutation=order), want)


def test_buckets_are_in_random_order_by_the_generator():
    x = vectors(7)
    drawn = [bucketing(x, 2, generator=rng(k)) for k in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert sorted(bucketing(x, 1, generator=rng(5))[:, 0].tolist()) == sorted(x[:, 0].tolist())


@robust
def test_vectors_with_nan_or_infinity_are_counted_or_dropped_when_asked(aggregate):
    x = vectors()
    broken = x.clone()
    broken[1, 2], broken[3] = math.nan, math.inf
    with pytest.raises(ValueError, match="vectors must be finite, 2 of 11 hold NaN or infinity"):
        aggregate(broken)
    kept = x[[0, 2, *range(4, 11)]]
    found = aggregate(broken, nonfinite="drop")
    assert torch.isfinite(found).all()
    if aggregate in (coordinate_median, geometric_median):
        assert torch.allclose(found, aggregate(kept))
    with pytest.raises(ValueError, match="11 of 11"):
        aggregate(torch.full_like(x, math.nan), nonfinite="drop")


def test_what_is_dropped_counts_among_the_liars():
    x = vectors()
    broken = torch.cat([x, torch.full((2, 4), math.nan, dtype=torch.float64)])
    assert torch.allclose(trimmed_mean(broken, 3, nonfinite="drop"), trimmed_mean(x, 1))
    assert torch.allclose(krum(broken, 3, nonfinite="drop"), krum(x, 1))
    for aggregate in (trimmed_mean, krum):
        with pytest.raises(ValueError, match="must be at least the 2 of vectors with NaN or infinity, got 1"):
            aggregate(broken, 1, nonfinite="drop")


@robust
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_vectors_are_aggregated_in_float32(aggregate, dtype):
    x = (100 * vectors(dtype=torch.float32)).to(dtype)
    for found in (aggregate(x), bucketing(x, 11, permutation=torch.arange(11))[0]):
        assert found.dtype == dtype
    assert torch.equal(aggregate(x), aggregate(x.float()).to(dtype))


# compressors


def test_rand_k_keeps_k_numbers_of_each_row_and_is_right_in_the_mean():
    x, k, draws = vectors(1, 10)[0], 3, 20_000
    sent = rand_k(x.expand(draws, -1), k, generator=rng())
    assert ((sent != 0).sum(1) == k).all()
    assert torch.allclose(sent[sent != 0], (10 / 3 * x).expand(draws, -1)[sent != 0])
    error = (10 / 3) * x.abs() * math.sqrt(0.3 * 0.7 / draws)
    assert ((sent.mean(0) - x).abs() < 5 * error).all()
    variance = ((sent - x) ** 2).sum(1).mean() / (x**2).sum()
    assert variance.item() == pytest.approx(10 / 3 - 1, rel=0.02)
    together = ((sent[:, 0] != 0) & (sent[:, 1] != 0)).double().mean()
    assert together.item() == pytest.approx(3 * 2 / (10 * 9), rel=0.1), "without replacement"
    assert torch.equal(rand_k(x, 10), x)


def test_quantised_rows_are_right_in_the_mean_and_on_the_grid():
    x, draws = vectors(1, 10)[0], 20_000
    sent = quantize_l2(x.expand(draws, -1), 4, generator=rng())
    place = sent / x.norm() * 4
    assert torch.allclose(place, place.round(), atol=1e-9)
    assert ((sent.mean(0) - x).abs() < 5 * (x.norm() / 8) / math.sqrt(draws)).all()
    variance = ((sent - x) ** 2).sum(1).mean() / (x**2).sum()
    assert variance <= min(10 / 16, math.sqrt(10) / 4)
    assert quantize_l2(torch.zeros(2, 3), 4).abs().sum() == 0


# attacks


def test_attacks_are_what_their_papers_say():
    good = vectors(17, 3)
    mean, std = good.mean(0), good.std(0)
    z = 0.0  # 20 workers, 3 liars: s = 11 - 3 = 8, (17 - 8) / 17
    with_z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(9 / 17, dtype=torch.float64))
    assert torch.allclose(alie(good, 3), (mean - with_z * std).expand(3, 3))
    assert torch.allclose(alie(good, 3, z=z), mean.expand(3, 3))
    assert torch.allclose(ipm(good, 2, epsilon=0.3), (-0.3 * mean).expand(2, 3))
    assert torch.allclose(bit_flip(good, 2), (-mean).expand(2, 3))
    assert torch.equal(mimic(good, 2, index=4), good[4].expand(2, 3))
