"""Universal limits: against every class of small spaces, the class that reaches them, and their orders in n."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from posterity.robustness import (
    MajorityClass,
    audit_classifier,
    boundary_distance,
    perturbation_for_fraction,
    robust_fraction_bound,
    robust_profile,
)

NS = [8, 16, 32, 64, 128, 256]


def slope(values):
    return np.polyfit(np.log(NS), np.log(values), 1)[0]


# distances


@pytest.mark.parametrize(("levels", "n_values"), [(2, 10), (4, 5), (3, 6)])
def test_distances_to_the_next_class_are_those_of_brute_force(levels, n_values):
    rng = np.random.default_rng(0)
    images = np.array(list(itertools.product(range(levels), repeat=n_values)), dtype=np.int8)
    for classes, rare in ((2, 0.5), (7, 0.5), (2, 0.01)):
        labels = (
            rng.integers(0, classes, len(images))
            if rare == 0.5
            else (rng.random(len(images)) < rare).astype(int)
        )
        want = np.empty(len(images), dtype=int)
        for start in range(0, len(images), 128):
            apart = (images[start : start + 128, None] != images[None]).sum(2)
            apart[labels[start : start + 128, None] == labels[None]] = n_values + 1
            want[start : start + 128] = apart.min(1)
        np.testing.assert_array_equal(boundary_distance(labels, levels=levels), want)


def test_a_profile_is_the_share_of_each_class_beyond_each_distance():
    labels = np.random.default_rng(1).integers(0, 3, 2**9)
    distance = boundary_distance(labels)
    profile = robust_profile(labels)
    assert profile.keys() == {0, 1, 2}
    for k, shares in profile.items():
        want = [(distance[labels == k] > t).mean() for t in range(10)]
        np.testing.assert_allclose(shares, want)
    assert robust_profile(labels * 5 - 3).keys() == {-3, 2, 7}


def test_the_first_value_is_the_most_significant():
    labels = (np.arange(2**4) >= 8).astype(int)  # by the first value alone
    assert boundary_distance(labels).tolist() == [1] * 16
    last = np.arange(2**4) % 2 * (np.arange(2**4) >= 14)
    assert boundary_distance(last)[0b0001] == 3


# the bound


def test_no_class_of_the_two_by_two_space_is_more_robust_than_the_bound():
    """All 65,535 classes, but those above half of the space, at every size."""
    images = np.arange(16)
    distance = np.array([[bin(a ^ b).count("1") for b in images] for a in images])
    sets = np.arange(1, 2**16)
    inside = (sets[:, None] >> images) & 1  # (sets, images)
    fraction = inside.sum(1) / 16
    kept = (fraction <= 0.5) & (fraction > 0)
    inside, fraction = inside[kept].astype(bool), fraction[kept]
    nearest = np.full(inside.shape, 99)
    for k in range(16):  # distance to image k, where it is outside
        nearest = np.where(~inside[:, [k]], np.minimum(nearest, distance[k]), nearest)
    attained = 0
    for t in range(5):
        share = ((nearest > t) & inside).sum(1) / inside.sum(1)
        bounds = {c: robust_fraction_bound(t, 2, class_fraction=c) for c in np.unique(fraction).tolist()}
        limit = np.array([bounds[c] for c in fraction.tolist()])
        assert (share <= limit + 1e-12).all()
        attained += int((np.abs(share - limit) < 1e-12).sum())
    assert attained > 0


def test_a_bound_that_is_somewhat_too_small_is_found_out_by_these_classes():
    """With one change more than there is, the best class passes it."""
    majority = MajorityClass(3)
    passed = [
        majority.robust_fraction(t, 0) > robust_fraction_bound(t + 1, 3, class_fraction=0.5) + 1e-12
        for t in range(4)
    ]
    assert all(passed)


@pytest.mark.parametrize("n", [1, 3, 5, 15])
def test_the_majority_reaches_the_bound_at_every_size(n):
    majority = MajorityClass(n)
    for t in range(n * n + 1):
        found = majority.robust_fraction(t, 0)
        assert found == pytest.approx(robust_fraction_bound(t, n), abs=1e-12)


def test_each_bound_is_its_closed_form():
    N, c = 25, 0.3
    r = next(k for k in range(N + 1) if binom.cdf(k, N, 0.5) >= c)
    value, method = robust_fraction_bound(4, 5, class_fraction=c, return_method=True)
    tau = 5 / 5 - math.sqrt(math.log(1 / 0.7) / 2)
    harper, mcdiarmid = binom.cdf(r - 4, N, 0.5) / c, math.exp(-2 * tau**2) / c
    assert (value, method) == (pytest.approx(min(harper, mcdiarmid)), "H")
    # many bits, changes counted: bounded differences win
    tau = (30 + 1) / 20 - math.sqrt(math.log(2) / 2)
    value, method = robust_fraction_bound(30, 20, bit_depth=16, return_method=True)
    assert (value, method) == (pytest.approx(min(1, 2 * math.exp(-2 * tau**2))), "M")
    # many bits, length: the Gaussian
    q = 2.0**16
    for p, power in ((2, 0.0), (1, -0.5), (1.5, 0.5 - 1 / 1.5), (math.inf, 0.0)):
        size = 1.2 * 400 ** (-power)
        size = min(size, 0.9) if p == math.inf else size
        s = ((q - 1) * size - 400 ** (1 / p)) / q
        value, method = robust_fraction_bound(size, 20, bit_depth=16, p=p, return_method=True)
        assert method == "G"
        assert value == pytest.approx(2 * norm.cdf(-math.sqrt(2 * math.pi) * s * 400**power))


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize(("n", "bits", "c"), [(4, 1, 0.5), (5, 8, 0.2), (16, 3, 0.01)])
def test_bounds_are_shares_that_never_grow_with_the_size(p, n, bits, c):
    sizes = np.concatenate([np.linspace(0, 1.2, 60), np.arange(2, n * n + 3)])
    values = [robust_fraction_bound(float(s), n, bit_depth=bits, p=p, class_fraction=c) for s in sizes]
    assert values[0] == 1 and min(values) >= 0 and max(values) <= 1
    assert (np.diff(values) <= 1e-15).all()
    assert values[-1] == 0, "all values may change"


def test_a_length_of_t_changes_is_no_weaker_than_t_changes():
    for p in (1, 2, 3, 7.5):
        for t in range(26):
            by_length = robust_fraction_bound(t ** (1 / p), 5, bit_depth=4, p=p)
            assert by_length <= robust_fraction_bound(t, 5, bit_depth=4) + 1e-15


def test_with_many_bits_a_constant_length_breaks_every_classifier():
    for size in (0.5, 1.0, 1.5):
        small, large = (robust_fraction_bound(size, n, bit_depth=16, p=2) for n in (16, 64))
        assert small == pytest.approx(large, rel=0.02)
    sizes = [perturbation_for_fraction(0.01, n, bit_depth=16, p=2) for n in NS]
    assert max(sizes) / min(sizes) < 1.2


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 4])
def test_with_one_bit_the_size_grows_as_a_root_of_n(p):
    assert slope([perturbation_for_fraction(0.01, n, p=p) for n in NS]) == pytest.approx(
        1 / max(p, 1), abs=0.05
    )


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 5, math.inf])
@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("fraction", [0.5, 1e-2, 1e-6])
def test_the_size_for_a_share_is_the_least_at_which_the_bound_is_as_small(p, bits, fraction):
    for n, c in ((3, 0.5), (12, 0.1)):
        size = perturbation_for_fraction(fraction, n, bit_depth=bits, p=p, class_fraction=c)
        options = {"bit_depth": bits, "p": p, "class_fraction": c}
        assert robust_fraction_bound(size, n, **options) <= fraction
        less = size - 1 if p == 0 else size * (1 - 1e-9)
        assert robust_fraction_bound(less, n, **options) > fraction


def test_tiny_shares_are_not_lost():
    assert 0 < robust_fraction_bound(500, 40) < 1e-80
    assert perturbation_for_fraction(1e-200, 224, channels=3, bit_depth=8, p=2) < 20


# the majority


def brute(image, p, bits, n):
    """Return the least perturbation to the other class, over all images."""
    q = 2**bits
    best = math.inf
    dark = (image >= 0.5).sum() <= (n * n - 1) // 2
    for other in itertools.product(np.arange(q) / (q - 1), repeat=n * n):
        other = np.array(other)
        if ((other >= 0.5).sum() <= (n * n - 1) // 2) != dark:
            d = np.abs(other - image)
            size = (
                (d > 0).sum()
                if p == 0
                else d.max()
                if p == math.inf
                else (d**p).sum() ** (1 if p < 1 else 1 / p)
            )
            best = min(best, size)
    return best


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, math.inf])
@pytest.mark.parametrize("bits", [1, 2])
def test_distances_of_the_majority_are_those_of_brute_force(p, bits):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2**bits, (12, 4)) / (2**bits - 1)
    majority = MajorityClass(2, bit_depth=bits)
    want = [brute(image, p, bits, 2) for image in images]
    np.testing.assert_allclose(majority.distance(images, p), want)


def test_the_majority_of_all_small_images_is_as_robust_as_it_says():
    images = np.array(list(itertools.product([0, 1], repeat=9)))
    majority = MajorityClass(3)
    labels = majority.predict(images)
    assert (labels == 0).sum() == 256
    profile = robust_profile(labels)[0]
    np.testing.assert_allclose([majority.robust_fraction(t, 0) for t in range(10)], profile)
    dark = images[labels == 0]
    for p in (0.5, 1, 2, 3):
        for size in (0.5, 1.0, 1.5, 2.0):
            share = (majority.distance(dark, p) > size * (1 + 1e-12)).mean()
            assert majority.robust_fraction(size, p) == pytest.approx(share)


@pytest.mark.parametrize("p", [0, 0.5, 1, 2])
def test_of_deep_images_the_share_is_a_lower_bound(p):
    levels = np.arange(4) / 3
    images = np.array(list(itertools.product(levels, repeat=4)))
    majority = MajorityClass(2, bit_depth=2)
    dark = images[majority.predict(images) == 0]
    for size in np.linspace(0, 3, 31):
        assert (
            majority.robust_fraction(size, p)
            <= (majority.distance(dark, p) > size * (1 + 1e-12)).mean() + 1e-12
        )


# the audit


def test_a_search_moves_what_the_limit_says_of_the_majority():
    for size, p, bits in ((10, 0, 1), (3.0, 2, 1), (1.2, 2, 4)):
        majority = MajorityClass(9, bit_depth=bits)
        report = audit_classifier(
            majority.predict, 9, size=size, p=p, bit_depth=bits, n_images=300, random_state=0
        )
        assert [row.label for row in report.classes] in ([0, 1], [1, 0])
        for row in report.classes:
            assert row.interval[0] <= row.movable <= row.interval[1]
            if row.share <= 0.5 and p == 0:
                assert row.movable >= row.limit - 0.1
        assert sum(row.n_images for row in report.classes) == 300


def test_what_a_search_finds_is_never_nearer_than_the_exact_distance():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=9)
    images = np.array(list(itertools.product([0, 1], repeat=9)))
    labels = (images @ weights > weights.sum() / 2).astype(int)

    def predict(x):
        return labels[x.reshape(len(x), 9).astype(int) @ 2 ** np.arange(8, -1, -1)]

    profile = robust_profile(labels)
    for size in (1, 2, 3):
        report = audit_classifier(predict, 3, size=size, n_images=400, random_state=size)
        for row in report.classes:
            movable = 1 - profile[row.label][size]  # of the whole class
            low, high = row.interval
            assert low <= movable + 1e-12, "no more is moved than can be"
            assert high >= movable - 0.15, "and nearly as much"


def test_a_classifier_that_says_one_thing_has_no_limit():
    report = audit_classifier(lambda x: np.zeros(len(x), int), 4, size=3, n_images=50, random_state=0)
    (row,) = report.classes
    assert (row.movable, row.limit) == (0, 0) and "One class holds all" in report.note
    rare = audit_classifier(
        lambda x: (x.sum((1, 2, 3)) > 15).astype(int), 4, size=3, n_images=50, random_state=0
    )
    assert rare.classes[0].limit == 0


def test_a_weak_search_is_called_weak_and_no_violation():
    def audit(predict):
        return audit_classifier(predict, 8, size=13, n_images=400, n_probes=1, random_state=3)

    strong = audit(lambda x: (x.reshape(len(x), -1) @ np.arange(64) > 1040).astype(int))
    assert all(row.movable >= row.limit for row in strong.classes) and "weaker" not in strong.note
    weak = audit(lambda x: (x.sum((1, 2, 3)) % 7 > 3).astype(int))
    assert any(row.movable < row.limit for row in weak.classes)
    assert "weaker than the limit: it is no violation" in weak.note


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: robust_fraction_bound(1, 5, class_fraction=0.6), "class_fraction must be in .0, 0.5., got 0.6: the theorem needs"),
        (lambda: robust_fraction_bound(1, 5, class_fraction=0.0), "at most half of the images"),
        (lambda: robust_fraction_bound(-1, 5), "size must be at least 0"),
        (lambda: robust_fraction_bound(math.nan, 5), "size"),
        (lambda: robust_fraction_bound(1, 0), "n must be an integer of at least 1"),
        (lambda: robust_fraction_bound(1, 5, channels=0), "channels"),
        (lambda: robust_fraction_bound(1, 5, bit_depth=0), "bit_depth"),
        (lambda: robust_fraction_bound(1, 5, bit_depth=65), "bit_depth must be an integer from 1 to 64"),
        (lambda: robust_fraction_bound(1, 5, p=-1), "p must be at least 0"),
        (lambda: robust_fraction_bound(1, 5, p=math.nan), "p must be"),
        (lambda: perturbation_for_fraction(0.0, 5), "fraction must be in"),
        (lambda: perturbation_for_fraction(1.0, 5), "fraction must be in"),
        (lambda: boundary_distance(np.zeros(6, int)), "power of levels=2, got 6"),
        (lambda: boundary_distance(np.zeros(1, int)), "power of levels=2, got 1"),
        (lambda: boundary_distance(np.zeros(8, int)), "two classes at least, got 0 alone"),
        (lambda: boundary_distance(np.zeros(8)), "labels must be integers"),
        (lambda: boundary_distance(np.zeros(2**23, int)), "at most 4,194,304 images"),
        (lambda: boundary_distance([0, 1], levels=1), "levels must be an integer of at least 2"),
        (lambda: MajorityClass(0), "n must be"),
        (lambda: MajorityClass(2, bit_depth=33), "bit_depth"),
        (lambda: MajorityClass(2).predict(np.zeros((3, 5))), "images of 4 values"),
        (lambda: MajorityClass(2).predict(np.full((3, 4), np.nan)), r"x must be in \[0, 1\]"),
        (lambda: audit_classifier(lambda x: [0], 3, size=1, n_images=4), "predict must return 4 integer labels"),
        (lambda: audit_classifier(lambda x: np.zeros(len(x)), 3, size=1), "integer labels"),
        (lambda: audit_classifier(lambda x: x.argmax(dim=1), 3, size=1), "predict must take arrays of float64, here .*: argmax"),
        (lambda: audit_classifier(lambda x: np.zeros(len(x), int), 3, size=-1.0), "size must be at least 0"),
        (lambda: audit_classifier(lambda x: np.zeros(len(x), int), 3, size=1, n_probes=0), "n_probes"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()
