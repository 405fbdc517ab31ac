"""Metrics of seen and unseen compositions against a sweep of biases by hand, cases known by thought, invariances."""

import math
from importlib import import_module

import pytest
import torch

from posterity.testing import check_metric
from posterity.transfer import composition_metrics


def draw(n=60, seed=0, lift=1.0, dtype=torch.float64):
    """Scores of 12 candidates that favour the true one and, by ``lift``, seen ones."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    pairs = every[torch.randperm(20, generator=generator)[:12]]
    seen = torch.arange(12) < 7
    target = torch.randint(12, (n,), generator=generator)
    scores = torch.randn(n, 12, generator=generator, dtype=dtype)
    scores[torch.arange(n), target] += 1.5
    scores[:, seen] += lift
    order = torch.randperm(12, generator=generator)
    return scores[:, order], order.argsort()[target], pairs[order], seen[order]


def sweep(scores, target, pairs, seen, n_biases):
    """Return curve points and summaries by one argmax over all candidates a bias."""

    def accuracies(bias):
        biased = scores.clone()
        biased[:, ~seen] += bias
        right = biased.argmax(1) == target
        of_seen = seen[target]
        return float(right[of_seen].double().mean()), float(right[~of_seen].double().mean()), right

    last = accuracies(1000.0)
    rows = [i for i in range(len(target)) if not seen[target[i]] and last[2][i]]
    biases = sorted(float(scores[i][seen].max() - scores[i, target[i]]) - 1e-4 for i in rows)
    if n_biases is not None:
        biases = biases[:: max(len(biases) // n_biases, 1)]
    else:
        biases.append(biases[-1] + 2e-4)
    points = [accuracies(bias)[:2] for bias in biases] + [last[:2]]
    s, u = ([point[k] for point in points] for k in (0, 1))
    auc = sum((u[k + 1] - u[k]) * (s[k] + s[k + 1]) / 2 for k in range(len(s) - 1))
    harmonic = max(2 * a * b / (a + b) if a + b else 0.0 for a, b in points)
    parts = (pairs[scores.argmax(1)] == pairs[target]).double().mean(0).tolist()
    return (auc, max(s), max(u), harmonic, *parts), s, u


@pytest.mark.parametrize("n_biases", [None, 1, 3, 20])
@pytest.mark.parametrize(("seed", "lift"), [(0, 0.0), (1, 1.0), (2, 4.0), (3, -1.0)])
def test_is_the_sweep_over_biases(n_biases, seed, lift):
    data = draw(seed=seed, lift=lift)
    found = composition_metrics(*data, n_biases=n_biases)
    summary, s, u = sweep(*data, n_biases)
    assert found[:6] == pytest.approx(summary, abs=1e-12)
    assert found.seen_curve.tolist() == pytest.approx(s, abs=1e-12)
    assert found.unseen_curve.tolist() == pytest.approx(u, abs=1e-12)


def test_all_biases_take_the_samples_of_unseen_pairs_one_by_one():
    data = draw(n=200, seed=4)
    found = composition_metrics(*data, n_biases=None)
    steps = found.unseen_curve.diff() * (~data[3][data[1]]).sum()
    right = round(float(steps.sum()))
    assert steps[:-1].tolist() == pytest.approx([1.0] * right)
    assert steps[-1] == found.unseen_curve[0] == 0
    assert (found.seen_curve.diff() <= 0).all()


def test_perfect_scores_give_one_everywhere_however_seen_pairs_are_favoured():
    scores, target, pairs, seen = draw(n=2_000)
    for lift in (0.0, 3.0):
        perfect = torch.full_like(scores, -5.0)
        perfect[torch.arange(len(target)), target] = 5.0
        found = composition_metrics(perfect + lift * seen, target, pairs, seen, n_biases=None)
        assert found[:6] == (1.0,) * 6
        unlike = perfect + lift * seen + 0.01 * scores
        assert composition_metrics(unlike, target, pairs, seen, n_biases=None)[:6] == (1.0,) * 6
        # the last bias but 1000 misses up to a fortieth
        published = composition_metrics(unlike, target, pairs, seen)
        assert published[1:3] + published[4:6] == (1.0,) * 4
        assert 0.97 < published.auc < 1
        assert 0.97 < published.best_harmonic < 1


def test_scores_that_never_find_an_unseen_pair_have_no_area():
    scores, target, pairs, seen = draw()
    scores = scores.clone()
    rows = ~seen[target]
    scores[rows, target[rows]] = -9.0
    found = composition_metrics(scores, target, pairs, seen)
    assert (found.auc, found.best_unseen, found.best_harmonic, len(found.seen_curve)) == (0, 0, 0, 1)


def test_neither_order_of_candidates_or_samples_nor_a_constant_matters():
    scores, target, pairs, seen = draw(seed=5)
    expected = composition_metrics(scores, target, pairs, seen)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    for data in (
        (scores[:, order], order.argsort()[target], pairs[order], seen[order]),
        (scores[rows], target[rows], pairs, seen),
        (scores + 7.0, target, pairs, seen),
        (scores.repeat_interleave(2, 0)[::2].T.contiguous().T, target.int(), pairs.int(), seen),
    ):
        found = composition_metrics(*data)
        assert found[:6] == pytest.approx(expected[:6], abs=1e-12)


def test_what_is_ruled_out_is_never_answered_and_one_block_is_as_many(monkeypatch):
    scores, target, pairs, seen = draw(seed=6)
    out = (~seen).nonzero()[0, 0]
    ruled = scores.clone()
    ruled[:, out] = -math.inf
    low = scores.clone()
    low[:, out] = -300.0
    found = composition_metrics(ruled, target, pairs, seen)
    assert found[:6] == pytest.approx(composition_metrics(low, target, pairs, seen)[:6], abs=1e-12)
    assert found.best_unseen < composition_metrics(scores, target, pairs, seen).best_unseen
    whole = composition_metrics(scores, target, pairs, seen)
    monkeypatch.setattr(import_module("posterity.transfer.composition_metrics"), "BLOCK", 30)
    assert composition_metrics(scores, target, pairs, seen)[:6] == whole[:6]
    lone = ruled.clone()
    lone[0, ~seen] = -math.inf  # a sample to which only seen candidates are left
    assert math.isfinite(composition_metrics(lone, target, pairs, seen).auc)


@pytest.mark.parametrize("name", ["auc", "best_harmonic", "attribute"])
def test_conforms_to_its_kind(as_a_user, name):
    _, _, pairs, seen = draw()
    scores, target = torch.full((4, 12), -1.0), torch.tensor([0, 1, 2, 3])
    scores[torch.arange(4), target] = 1.0
    sides = torch.tensor([True, True, False, False]).repeat(3)
    known = [((scores, target), 1.0)]
    drawn, labels, *_ = draw(seed=7)

    def metric(scores, target):
        return getattr(composition_metrics(scores, target, pairs, sides, n_biases=None), name)

    check_metric(metric, (drawn * 4).round() / 4 + torch.arange(12) / 64, labels, known=known)


def good(**options):
    scores, target, pairs, seen = draw()
    return {"scores": scores, "target": target, "pairs": pairs, "seen": seen, **options}


SEEN = draw()[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": torch.ones(60, 12).long()}, "scores must be a floating-point tensor"),
        ({"scores": torch.ones(60)}, r"scores must have shape \(any, any\)"),
        ({"scores": torch.full((60, 12), math.nan)}, "scores must be finite or -inf, row 0 is not"),
        ({"scores": torch.full((60, 12), math.inf)}, "scores must be finite or -inf, row 0 is not"),
        ({"scores": torch.full((60, 12), -math.inf)}, "scores must leave a candidate to each sample, row 0 is -inf"),
        ({"target": torch.zeros(60)}, "target must hold class indices, got torch.float32"),
        ({"target": torch.zeros(59).long()}, r"target must have shape \(60\)"),
        ({"target": torch.full((60,), 12)}, r"target must be in 0\.\.11"),
        ({"target": None}, "target must hold class indices, got NoneType"),
        ({"pairs": torch.zeros(12, 2)}, "pairs must hold integers, got torch.float32"),
        ({"pairs": torch.zeros(11, 2).long()}, r"pairs must have shape \(12, 2\) for the candidates of scores"),
        ({"pairs": torch.zeros(12, 2).long()}, "pairs must be different"),
        ({"seen": torch.zeros(12)}, "seen must be a bool tensor, got torch.float32"),
        ({"seen": torch.zeros(12).bool()}, "seen must leave both sides, no candidate is seen"),
        ({"seen": torch.ones(12).bool()}, "seen must leave both sides, no candidate is unseen"),
        ({"target": SEEN.int().argmax().expand(60)}, "target must have samples of both sides, none is of a candidate that is unseen"),
        ({"target": SEEN.int().argmin().expand(60)}, "none is of a candidate that is seen"),
        ({"n_biases": 0}, "n_biases must be an integer of at least 1"),
        ({"scores": torch.ones(0, 12), "target": torch.ones(0).long()}, "target must have samples of both sides"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        composition_metrics(**good(**options))
