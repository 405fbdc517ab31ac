"""The teacher against convolved geometric laws, the learner against plain loops, forgetting against N^3 cells."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.testing import check_loss, check_metric
from posterity.transfer import (
    BalancedMemory,
    ScheduledTeacher,
    ema_rates,
    gaussian_stream,
    knowledge_rates,
    prior_loss,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


# --- the teacher ---


def geometric(rate, n):
    return rate * (1 - rate) ** np.arange(n)


@pytest.mark.parametrize(("mean", "var"), [(20.0, 0.6), (12.0, 0.76), (30.0, 0.48)])
def test_an_impulse_of_the_student_weighs_as_two_geometric_laws_one_after_another(mean, var):
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.zero_()
    teacher = ScheduledTeacher(model, mean=mean, var=var)
    weight = []
    for k in range(800):
        model.weight.data.fill_(float(k == 0))
        teacher.update(model)
        weight.append(float(teacher.module.weight))
    weight, k = np.array(weight), np.arange(800)
    assert weight.sum() == pytest.approx(1, abs=1e-6)
    assert weight @ k == pytest.approx(mean - 1, rel=1e-6)
    assert weight @ (k - mean + 1) ** 2 == pytest.approx(var * mean**2, rel=1e-5)
    assert weight[0] == pytest.approx(0, abs=1e-12)  # nothing of the newest
    both = np.convolve(*(geometric(rate, 800) for rate in ema_rates(mean, var)))
    np.testing.assert_allclose(weight[1:], both[:799], atol=1e-12)


@pytest.mark.parametrize("mean", [2.5, 3.0, 7.0, 100.0, 10_000.0])
def test_rates_reach_from_equal_ones_to_a_fast_one_of_one(mean):
    low, high = 0.5 - 1 / mean, (1 - 1 / mean) * (1 - 2 / mean)
    for share in (0.01, 0.5, 1.0):
        var = low + share * (high - low)
        slow, fast = ema_rates(mean, var)
        assert 0 < slow < fast <= 1
        assert 1 / slow + 1 / fast == pytest.approx(mean)
        assert (1 - slow) / slow**2 + (1 - fast) / fast**2 == pytest.approx(var * mean**2)
    assert fast == pytest.approx(1)


def test_one_update_may_count_as_three_and_buffers_and_ties_come_along():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[3].weight = model[2].weight
    one, three = (ScheduledTeacher(model, mean=8.0, var=0.6) for _ in range(2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model(draw(6, 3))
    one.update(model, 3.0)
    for _ in range(3):
        three.update(model)
    for ours, theirs in zip(one.module.parameters(), three.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(one.module[1].running_mean, model[1].running_mean)
    assert one.module[3].weight is one.module[2].weight
    assert one(draw(2, 3)).requires_grad is False


def test_averages_of_a_model_in_bfloat16_move_by_less_than_it_can_tell():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    teacher = ScheduledTeacher(model, mean=10_000.0)
    model.weight.data.fill_(2.0)
    for _ in range(400):
        teacher.update(model)
    r1, r2 = ema_rates(10_000.0, 0.75)
    one, two = (2 - (1 - rate) ** 400 for rate in (r1, r2))
    assert float(teacher.slow[0]) == pytest.approx(one, abs=1e-4)
    assert float(teacher.module.weight) == pytest.approx((r2 * one - r1 * two) / (r2 - r1), abs=2**-8)


# --- the loss ---


class Whole(nn.Module):
    """The loss as a module, for the check of its kind."""

    def __init__(self, weight, y_mix=None):
        super().__init__()
        self.head = nn.Linear(3, 4).double()
        self.head.weight.data.copy_(draw(4, 3, seed=9))
        self.weight, self.y_mix = weight, y_mix

    def forward(self, f, target, y):
        mix = None if self.y_mix is None or len(y) < 6 else self.y_mix
        return prior_loss(f, target, self.head, y, weight=self.weight, y_mix=mix, lam=0.7)


FEATURES, TARGETS, Y = draw(6, 3), draw(6, 3, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(("weight", "mix"), [(0.0, None), (0.4, None), (0.4, Y.roll(1))])
def test_the_loss_conforms_to_its_kind(as_a_user, weight, mix):
    f = FEATURES.clone().requires_grad_()
    check_loss(Whole(weight, mix), f, TARGETS, Y, symmetric=mix is None, detaches=weight > 0, compiles=False)


def test_without_weight_it_is_cross_entropy_and_half_and_half_both_pull_equally_hard():
    head, f = Whole(0).head, FEATURES[:1].clone().requires_grad_()
    plain = F.cross_entropy(head(f), Y[:1])
    torch.testing.assert_close(prior_loss(f, TARGETS[:1], head, Y[:1], weight=0.0), plain)
    (g,) = torch.autograd.grad(plain, f)
    (pull,) = torch.autograd.grad(prior_loss(f, TARGETS[:1], head, Y[:1], weight=1.0), f)
    assert float(pull.norm()) == pytest.approx(float(g.norm()), rel=1e-6)
    torch.testing.assert_close(
        pull / pull.norm(), (f - TARGETS[:1]).detach() / (f - TARGETS[:1]).norm().detach()
    )
    (both,) = torch.autograd.grad(prior_loss(f, TARGETS[:1], head, Y[:1], weight=0.5), f)
    torch.testing.assert_close(both, (g + pull) / 2)


@pytest.mark.parametrize("lam", [1.0, 0.3, 0.0])
def test_mixed_labels_mix_cross_entropy_and_its_gradient(lam):
    head, other = Whole(0).head, Y.roll(1)
    f = FEATURES.clone().requires_grad_()
    each = lam * F.cross_entropy(head(f), Y, reduction="none") + (1 - lam) * F.cross_entropy(
        head(f), other, reduction="none"
    )
    (g,) = torch.autograd.grad(each.sum(), f, retain_graph=True)
    apart = (f - TARGETS).square().sum(1)
    beta = np.mean([(g[k].norm() / torch.sqrt(4 * apart[k] + 1e-8)).item() for k in range(6)])
    expected = (0.75 * each + 0.25 * beta * apart).mean()
    got = prior_loss(f, TARGETS, head, Y, weight=0.25, y_mix=other, lam=lam)
    torch.testing.assert_close(got, expected)
    wanted = [f, head.weight, head.bias]
    for ours, theirs in zip(
        torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_where_the_teacher_agrees_nothing_pulls():
    head, f = Whole(0).head, FEATURES.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(head(f), Y), f)
    (both,) = torch.autograd.grad(prior_loss(f, f.detach(), head, Y, weight=0.5), f)
    torch.testing.assert_close(both, g / 2)


# --- the memory ---


def test_the_memory_stays_full_and_even_and_holds_the_newest():
    memory = BalancedMemory(10, generator=rng())
    seen = Counter()
    for k, label in enumerate(torch.randint(4, (300,), generator=rng(1)).tolist()):
        memory.add(torch.tensor([float(k)]), label)
        seen[label] += 1
        assert len(memory) == min(k + 1, 10)
        assert float(k) in [float(x) for x in memory.x]
        counts = Counter(memory.labels)
        if min(seen.values()) >= 3 and len(seen) == 4:
            assert max(counts.values()) - min(counts.values()) <= 1
    assert all(float(x) == int(x) for x in memory.x)


def test_a_rare_class_keeps_all_it_has_and_members_leave_at_random():
    gone = Counter()
    for seed in range(400):
        memory = BalancedMemory(4, generator=rng(seed))
        for k, label in enumerate((0, 0, 0, 1, 2)):
            memory.add(torch.tensor(k), label)
        (left,) = {0, 1, 2, 3, 4} - {int(x) for x in memory.x}
        gone[left] += 1
    assert set(gone) == {0, 1, 2}
    assert max(abs(n - 400 / 3) for n in gone.values()) < 4 * math.sqrt(400 * 2 / 9)


def test_newcomers_of_more_classes_than_places_still_enter():
    memory = BalancedMemory(2, generator=rng())
    for label in range(6):
        memory.add(torch.zeros(1), label)
        assert memory.labels.count(label) == 1
    assert len(memory) == 2


def test_a_sample_of_the_memory_is_without_repeats_and_uniform():
    memory = BalancedMemory(5, generator=rng())
    for k in range(5):
        memory.add(torch.full((2, 2), float(k)), k)
    counts = Counter()
    for _ in range(500):
        x, y = memory.sample(3)
        assert x.shape == (3, 2, 2) and len(set(y.tolist())) == 3
        assert torch.equal(x[:, 0, 0].long(), y)
        counts.update(y.tolist())
    assert max(abs(n - 300) for n in counts.values()) < 4 * math.sqrt(500 * 0.24)
    assert len(memory.sample(9)[1]) == 5


# --- the stream ---


def test_classes_arrive_around_a_time_of_their_own():
    y = torch.arange(5).repeat(3000)
    stream = gaussian_stream(y, sigma=0.1, generator=rng())
    assert torch.equal(stream.index.sort().values, torch.arange(15_000))
    assert (stream.time.diff() >= 0).all()
    means = []
    for label in range(5):
        time = stream.time[y[stream.index] == label]
        means.append(float(time.mean()))
        assert float(time.std()) == pytest.approx(0.1, rel=0.03)
    np.testing.assert_allclose(sorted(means), np.arange(5) / 5, atol=0.03 * 0.1 + 0.003)
    assert means != sorted(means)  # in a random order
    assert stream.class_start.tolist() == [0] * 5


def test_each_class_has_a_hump_a_period():
    y = torch.arange(4).repeat(900)
    stream = gaussian_stream(y, sigma=0.02, n_repeats=3, generator=rng())
    for label in range(4):
        time = stream.time[y[stream.index] == label].numpy()
        own = np.round((time - np.median(time)) % 1 * 4) % 4
        assert (own == 0).all()  # around times one apart
        assert np.bincount(np.round(time - time.min()).astype(int)).min() > 240
    assert len(stream.index) == 3600


def test_without_spread_classes_come_in_blocks_in_any_order_within():
    y = torch.tensor([9, 4, 7]).repeat(20)
    index = gaussian_stream(y, sigma=0.0, generator=rng()).index
    assert len(list(itertools.groupby(y[index].tolist()))) == 3
    assert index[:20].tolist() != sorted(index[:20].tolist())


def test_later_classes_start_at_their_period_and_what_came_before_is_dropped():
    y = torch.arange(10).repeat(400)
    stream = gaussian_stream(y, sigma=0.0, n_repeats=4, initial_classes=0.2, generator=rng())
    exist = [round(10 * (0.2 + 0.8 * (p + 1) / 4)) for p in range(4)]  # 4, 6, 8, 10
    assert [int((stream.class_start <= p).sum()) for p in range(4)] == exist
    labels = y[stream.index]
    for label in range(10):
        start, time = int(stream.class_start[label]), stream.time[labels == label]
        assert int(time.min()) == start
        assert len(time) == pytest.approx(400 * (4 - start) / 4, abs=45)


# --- forgetting ---


def by_cells(y, y1, y2, n, n1, n2):
    """The joint law of class and answers, cell by cell, and the three informations of it."""
    y, y1, y2 = (each.numpy() for each in (y, y1, y2))
    joint = np.zeros((n, n1, n2))
    p1, p2 = (np.bincount(each, minlength=k) / len(y) for each, k in ((y1, n1), (y2, n2)))
    for g in range(n):
        own = y == g
        a, b, ab = (y1[own] == g).mean(), (y2[own] == g).mean(), ((y1[own] == g) & (y2[own] == g)).mean()
        u = 1 - (a + b - ab)
        for i in range(n1):
            for j in range(n2):
                m1 = (a - ab) / u if i == g else p1[i] / (1 - p1[g] if g < n1 else 1)
                m2 = (b - ab) / u if j == g else p2[j] / (1 - p2[g] if g < n2 else 1)
                joint[g, i, j] = own.mean() * (ab if i == j == g else u * m1 * m2)
    assert joint.sum() == pytest.approx(1)

    def information(p, given):  # of G and the other axis, given an axis, by the definition
        total = 0.0
        for g, i, j in np.ndindex(p.shape):
            if p[g, i, j]:
                one, two = (p[:, :, j], p[g, :, j]) if given == 2 else (p[:, i, :], p[g, i, :])
                total += p[g, i, j] * math.log(one.sum() * p[g, i, j] / (p[:, i, j].sum() * two.sum()))
        return total / math.log(n)

    before = information(joint.sum(2)[:, :, None], 2)
    loss, gain = information(joint, 2), information(joint, 1)
    return loss / before, gain / (math.log(n2) / math.log(n) - before), loss, gain, before


def answers(y, right, known, seed):
    generator = rng(seed)
    hit = (torch.rand(len(y), generator=generator) < right) & (y < known)
    return torch.where(hit, y, torch.randint(known, (len(y),), generator=generator))


@pytest.mark.parametrize(("n", "n1", "n2"), [(4, 4, 4), (5, 3, 4), (3, 2, 3), (6, 6, 6)])
def test_rates_are_those_of_all_cells(n, n1, n2):
    y = torch.arange(n).repeat(40)
    y1, y2 = answers(y, 0.6, n1, 0), answers(y, 0.5, n2, 1)
    got = knowledge_rates(y, y1, y2, n_classes=n, n_before=n1, n_after=n2)
    np.testing.assert_allclose(got, by_cells(y, y1, y2, n, n1, n2), rtol=1e-9)


def information(y, answer, n):
    """I(G; Y) of modelled answers: right with their frequency, else by the marginal of the wrong."""
    joint = np.zeros((n, n))
    p = np.bincount(answer, minlength=n) / len(y)
    for g in range(n):
        right = float((answer[y == g] == g).double().mean())
        for i in range(n):
            joint[g, i] = float((y == g).double().mean()) * (
                right if i == g else (1 - right) * p[i] / (1 - p[g])
            )
    return sum(
        v * math.log(v / joint[g].sum() / joint[:, i].sum()) for (g, i), v in np.ndenumerate(joint) if v
    )


def test_loss_less_gain_is_the_fall_of_information_and_names_do_not_matter():
    n, y = 6, torch.arange(6).repeat(50)
    y1, y2 = answers(y, 0.8, n, 2), answers(y, 0.4, n, 3)
    rates = knowledge_rates(y, y1, y2, n_classes=n)
    fall = (information(y, y1, n) - information(y, y2, n)) / math.log(n)
    assert rates.loss - rates.gain == pytest.approx(fall, abs=1e-6)
    name = torch.randperm(n, generator=rng())
    np.testing.assert_allclose(knowledge_rates(name[y], name[y1], name[y2], n_classes=n), rates, atol=1e-12)
    back = knowledge_rates(y, y2, y1, n_classes=n)
    assert (back.loss, back.gain) == pytest.approx((rates.gain, rates.loss))


def test_what_never_errs_loses_nothing_and_chance_loses_all():
    y = torch.arange(10).repeat(300)
    assert knowledge_rates(y, y, y, n_classes=10)[:4:2] == pytest.approx((0.0, 0.0), abs=1e-12)
    y1, chance = answers(y, 0.8, 10, 0), torch.randint(10, (3000,), generator=rng(1))
    assert knowledge_rates(y, y1, chance, n_classes=10).loss_rate == pytest.approx(1, abs=0.02)
    # learning what was not known loses nothing
    assert knowledge_rates(y, y1, y, n_classes=10).loss == pytest.approx(0, abs=1e-12)


def test_where_nothing_was_known_or_left_rates_are_not_defined():
    y = torch.tensor([0, 0, 1, 1])
    nothing = knowledge_rates(y, 0 * y, y, n_classes=2, n_before=1)
    assert math.isnan(nothing.loss_rate) and nothing.gain_rate == pytest.approx(1)
    assert math.isnan(knowledge_rates(y, y, y, n_classes=2).gain_rate)


def test_a_class_right_once_in_each_sample_still_counts():
    y = torch.tensor([0, 0, 1, 1])
    y1, y2 = torch.tensor([0, 1, 1, 1]), torch.tensor([1, 0, 1, 1])
    rates = knowledge_rates(y, y1, y2, n_classes=2)
    cells = np.zeros((2, 2, 2))  # what is wrong can only be the other class
    cells[0, 0, 1] = cells[0, 1, 0] = 0.25
    cells[1, 1, 1] = 0.5
    h = [
        -sum(v * math.log2(v) for v in cells.sum(axis).ravel() if v)
        for axis in ((), 0, 1, (0, 1), (1, 2), 2, (0, 2))
    ]
    whole, y1y2, gy2, only2, g, gy1, only1 = h
    assert rates.loss == pytest.approx(gy2 + y1y2 - only2 - whole)
    assert rates.before == pytest.approx(g + only1 - gy1)


def test_the_measure_conforms_to_its_kind(as_a_user):
    y = torch.arange(4).repeat(10)

    def loss(y, before, after):
        return knowledge_rates(y, before, after, n_classes=4).loss

    check_metric(
        loss, y, answers(y, 0.7, 4, 0), answers(y, 0.5, 4, 1), known=[((y, y, y), 0.0), ((y, y, 0 * y), 1.0)]
    )


# --- what is refused ---

HEAD = nn.Linear(3, 4)
F32, Y4 = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_rates(2.0, 0.3), "mean must be greater than 2"),
        (lambda: ema_rates(10.0, 0.4), r"var must be greater than 0.4 and at most 0.72 for mean 10, got 0.4"),
        (lambda: ema_rates(10.0, 0.9), "at most 0.72 for mean 10"),
        (lambda: ScheduledTeacher(nn.ReLU(), var=0.4), "var must be greater than 0.4999 and at most 0.9997"),
        (lambda: ScheduledTeacher(None), "module must be a torch module"),
        (lambda: ScheduledTeacher(HEAD).update(nn.Linear(2, 2)), "model must have the parameters"),
        (lambda: ScheduledTeacher(HEAD).update(HEAD, 0), "n_updates must be greater than 0"),
        (lambda: prior_loss(F32, F32, None, Y4, weight=0.5), "head must be a Linear"),
        (lambda: prior_loss(F32.long(), F32, HEAD, Y4, weight=0.5), "features must be a floating-point"),
        (lambda: prior_loss(F32[:, :2], F32, HEAD, Y4, weight=0.5), r"features must have shape \(any, 3\) for head"),
        (lambda: prior_loss(F32, F32[:2], HEAD, Y4, weight=0.5), "teacher_features must have shape"),
        (lambda: prior_loss(F32[:0], F32[:0], HEAD, Y4[:0], weight=0.5), "features must have at least one row"),
        (lambda: prior_loss(F32, F32, HEAD, Y4 + 3, weight=0.5), r"y must be in 0\.\.3"),
        (lambda: prior_loss(F32, F32, HEAD, Y4, weight=1.5), "weight must be in"),
        (lambda: prior_loss(F32, F32, HEAD, Y4, weight=0.5, y_mix=Y4.float()), "y_mix must hold class indices"),
        (lambda: prior_loss(F32, F32, HEAD, Y4, weight=0.5, lam=-0.1), "lam must be in"),
        (lambda: BalancedMemory(0), "size must be an integer of at least 1"),
        (lambda: BalancedMemory(2).sample(1), "n samples cannot be had"),
        (lambda: BalancedMemory(2).add([1.0], 1), "x must be a tensor, got list"),
        (lambda: BalancedMemory(2).add(F32, 0.5), "y must be an integer"),
        (lambda: BalancedMemory(2).load_state_dict({}), "state must be what"),
        (lambda: gaussian_stream(Y4, sigma=-1.0), "sigma must be at least 0"),
        (lambda: gaussian_stream(Y4, n_repeats=0), "n_repeats must be an integer of at least 1"),
        (lambda: gaussian_stream(Y4, initial_classes=1.1), "initial_classes must be in"),
        (lambda: gaussian_stream(Y4.float()), "y must hold class indices"),
        (lambda: gaussian_stream(Y4[:0]), "y must have at least one row"),
        (lambda: gaussian_stream(None), "y must hold class indices, got NoneType"),
        (lambda: knowledge_rates(Y4, Y4, Y4, n_classes=1), "n_classes must be an integer of at least 2"),
        (lambda: knowledge_rates(Y4 + 1, Y4, Y4, n_classes=2), r"y must be in 0\.\.1, got values from 1 to 2"),
        (lambda: knowledge_rates(Y4, Y4, Y4, n_classes=2, n_before=1), r"before must be in 0\.\.0"),
        (lambda: knowledge_rates(Y4, Y4, Y4 - 1, n_classes=2), r"after must be in 0\.\.1"),
        (lambda: knowledge_rates(Y4, Y4, Y4[:3], n_classes=2), r"after must have shape \(4\)"),
        (lambda: knowledge_rates(Y4, Y4, Y4, n_classes=2, n_after=3), "n_after must be at most the 2 classes"),
        (lambda: knowledge_rates(Y4, Y4, Y4, n_classes=3), "y must have a sample of each class of 3, class 2"),
        (lambda: knowledge_rates(Y4[:0], Y4[:0], Y4[:0], n_classes=2), "y must have a sample"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
