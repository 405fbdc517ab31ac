"""ESD against its definition by loops, its unbiasedness over all subsamples, and its peers' formulas."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from posterity.claims.uncertainty.esd import _images
from posterity.lab.data import split
from posterity.testing import check_loss, check_metric
from posterity.uncertainty import (
    ESDLoss,
    ESDMetric,
    MMCELoss,
    SBECELoss,
    expected_squared_difference,
    interleave,
)


def draw(n, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, dtype=torch.float64, generator=generator)
    if ties:
        confidence = (4 * confidence).round() / 4
    return confidence, torch.rand(n, dtype=torch.float64, generator=generator) < 0.6


def by_loops(confidence, correct):
    """Equation 2, three loops."""
    n, total = len(confidence), 0.0
    for i in range(n):
        g = [(correct[j].double() - confidence[j]) * bool(confidence[j] <= confidence[i]) for j in range(n)]
        for j, k in itertools.permutations([m for m in range(n) if m != i], 2):
            total = total + g[j] * g[k]
    return total / (n * (n - 1) * (n - 2))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [3, 4, 5, 9, 30])
def test_is_the_triple_loop_in_value_and_gradient(n, ties):
    confidence, correct = draw(n, n, ties)
    fast, slow = confidence.clone().requires_grad_(), confidence.clone().requires_grad_()
    value, expected = expected_squared_difference(fast, correct), by_loops(slow, correct)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    value.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ties", [False, True])
def test_the_mean_over_all_subsamples_is_the_value_of_the_sample(ties):
    confidence, correct = draw(8, 1, ties)
    parts = [torch.tensor(rows) for rows in itertools.combinations(range(8), 4)]
    mean = torch.stack(
        [expected_squared_difference(confidence[rows], correct[rows]) for rows in parts]
    ).mean()
    torch.testing.assert_close(mean, expected_squared_difference(confidence, correct), rtol=0, atol=1e-12)


def test_on_calibrated_draws_it_is_zero_on_average_and_the_plug_in_is_not():
    generator = torch.Generator().manual_seed(0)
    values, plug_in = [], []
    for _ in range(2_000):
        confidence = torch.rand(16, dtype=torch.float64, generator=generator)
        correct = torch.rand(16, dtype=torch.float64, generator=generator) < confidence
        values.append(expected_squared_difference(confidence, correct))
        g = (confidence <= confidence[:, None]) * (correct.double() - confidence)
        g.fill_diagonal_(0)
        plug_in.append((g.sum(1) / 15).square().mean())
    for sample, unbiased in ((values, True), (plug_in, False)):
        sample = torch.stack(sample)
        assert (abs(sample.mean()) < 3 * sample.std() / math.sqrt(len(sample))) == unbiased


def test_order_does_not_matter_and_equal_confidences_see_each_other():
    confidence, correct = draw(12, 2, ties=True)
    value = expected_squared_difference(confidence, correct)
    for order in (torch.arange(12).flip(0), torch.randperm(12, generator=torch.Generator().manual_seed(0))):
        torch.testing.assert_close(expected_squared_difference(confidence[order], correct[order]), value)
    # all equal: every sample sees all others, so the value is the mean product of two gaps
    gaps = torch.tensor([1.0, 0.0, 0.0, 1.0]).double() - 0.7
    expected = (gaps.sum() ** 2 - gaps.square().sum()) / 12
    got = expected_squared_difference(torch.full((4,), 0.7).double(), torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(got, expected)


def test_perfect_confidence_costs_nothing():
    correct = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert expected_squared_difference(correct, correct) == 0
    logits = torch.tensor([[200.0, 0.0]]).repeat(5, 1).requires_grad_()
    loss = ESDLoss()(logits, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def negative():
    """A batch whose estimate is below zero."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(8, 3, dtype=torch.float64, generator=generator)
        target = torch.distributions.Categorical(logits=logits).probs.cumsum(1)
        target = (torch.rand(8, 1, dtype=torch.float64, generator=generator) > target).sum(1)
        if ESDLoss(root=False)(logits, target) < -1e-3:
            return logits, target
    raise AssertionError


def test_where_the_estimate_is_negative_the_other_loss_steps_alone():
    logits, target = negative()
    assert ESDLoss(root=False)(logits, target) < 0
    steps = []
    for weight in (0.0, 1.0):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, target) + weight * ESDLoss()(leaf, target)
        (gradient,) = torch.autograd.grad(loss, leaf)
        steps.append(leaf.detach() - 0.1 * gradient)
    assert torch.equal(*steps)


def batch(n=24, classes=4, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize(
    ("loss", "one"),
    [(ESDLoss(), False), (ESDLoss(root=False), False), (MMCELoss(), True), (MMCELoss(bandwidth=0.2), True),
     (SBECELoss(), True), (SBECELoss(n_bins=5, temperature=0.1), True)],
)  # fmt: skip
def test_losses_conform_to_their_kind(as_a_user, loss, one):
    check_loss(loss, *batch(scale=2.0), batch_of_one=one, symmetric=True)


def test_the_metric_conforms_to_its_kind(as_a_user):
    logits, target = batch(20, seed=3)
    sure = torch.tensor([[0.9, 0.1]]).double().log().repeat(4, 1)
    known = [((sure, torch.ones(4, dtype=torch.long)), 0.81)]
    check_metric(
        ESDLoss(root=False), logits.detach(), target, known=known, streaming=lambda: ESDMetric(root=False)
    )


def test_the_metric_takes_logits_or_probabilities_and_roots():
    logits, target = batch(40, seed=5, scale=3.0)
    values = []
    for preds in (logits.detach(), logits.detach().softmax(1)):
        metric = ESDMetric()
        metric.update(preds, target)
        values.append(metric.compute())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(values[0], ESDLoss()(logits.detach(), target))


def test_the_loss_is_the_root_of_the_estimate_of_its_top_labels():
    logits, target = batch(30, scale=3.0)
    confidence, label = logits.softmax(1).max(1)
    value = expected_squared_difference(confidence, label == target)
    assert value > 0
    torch.testing.assert_close(ESDLoss()(logits, target), value.sqrt())


def test_mmce_is_the_double_sum():
    logits, target = batch(7)
    confidence, label = logits.softmax(1).max(1)
    total = 0.0
    for i, j in itertools.product(range(7), repeat=2):
        gap = [confidence[k] - float(label[k] == target[k]) for k in (i, j)]
        total = total + gap[0] * gap[1] * torch.exp(-(confidence[i] - confidence[j]).abs() / 0.4)
    torch.testing.assert_close(MMCELoss()(logits, target), (total / 49).sqrt())


def test_sb_ece_is_the_sum_over_bins_and_sharp_bins_give_the_binned_error():
    logits, target = batch(9)
    confidence, label = logits.softmax(1).max(1)
    correct = (label == target).double()
    centres = [(b + 0.5) / 15 for b in range(15)]
    weight = torch.stack(
        [torch.softmax(torch.stack([-((c - m) ** 2) / 0.01 for m in centres]), 0) for c in confidence]
    )
    total = 0.0
    for b in range(15):
        accuracy = (weight[:, b] * correct).sum() / weight[:, b].sum()
        total = total + (weight[:, b] * (accuracy - confidence) ** 2).sum()
    torch.testing.assert_close(SBECELoss()(logits, target), (total / 9).sqrt())
    bins = (confidence * 15).long()
    hard = sum(((correct[bins == b].mean() - confidence[bins == b]) ** 2).sum() for b in bins.unique()) / 9
    torch.testing.assert_close(SBECELoss(temperature=1e-9)(logits, target), hard.sqrt())


def test_the_lines_of_the_readme_train():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 4, generator=generator), torch.randint(3, (90,), generator=generator)
    net = torch.nn.Linear(4, 3)
    loader = DataLoader(TensorDataset(x[:60], y[:60]), batch_size=10)
    cal_loader = DataLoader(TensorDataset(x[60:], y[60:]), batch_size=10, shuffle=True)
    seen = 0
    for (x, y), (x_cal, y_cal) in interleave(loader, cal_loader):
        loss = F.cross_entropy(net(x), y) + 1.0 * ESDLoss()(net(x_cal), y_cal)
        loss.backward()
        seen += 1
    assert seen == 6
    assert torch.isfinite(net.weight.grad).all()


def test_a_shuffling_calibration_loader_shuffles_anew():
    loader = DataLoader(
        torch.arange(8), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    first, second = (other.tolist() for _, other in interleave(range(2), loader))
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_large_batch_needs_little_memory():
    confidence, correct = draw(200_000)
    assert torch.isfinite(expected_squared_difference(confidence.float(), correct))


LOGITS, TARGET = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_squared_difference(torch.rand(2), torch.ones(2)), "at least 3 values, got 2"),
        (lambda: expected_squared_difference(torch.rand(4), torch.ones(3)), r"correct must have shape \(4\) for confidence"),
        (lambda: expected_squared_difference(torch.rand(4) + 1, torch.ones(4)), r"confidence must be in \[0, 1\]"),
        (lambda: expected_squared_difference(torch.full((4,), math.nan), torch.ones(4)), r"confidence must be in \[0, 1\]"),
        (lambda: expected_squared_difference(torch.ones(4).long(), torch.ones(4)), "confidence must be a floating-point"),
        (lambda: ESDLoss()(LOGITS[:2], TARGET[:2]), "logits must have at least 3 rows, got 2"),
        (lambda: ESDLoss()(LOGITS[:, :1], TARGET), "at least 2 classes, got 1"),
        (lambda: ESDLoss()(LOGITS[None], TARGET), r"logits must have shape \(any, any\)"),
        (lambda: ESDLoss()(LOGITS.long(), TARGET), "logits must be a floating-point"),
        (lambda: ESDLoss()(LOGITS, TARGET[:3]), r"target must have shape \(4\) for one class a sample"),
        (lambda: ESDLoss()(LOGITS, TARGET + 3), r"target must be in 0\.\.2, got values from 3 to 3"),
        (lambda: ESDLoss()(LOGITS, TARGET - 1), r"target must be in 0\.\.2"),
        (lambda: ESDLoss()(LOGITS, TARGET.float()), "class indices, got torch.float32"),
        (lambda: ESDMetric().compute(), "preds must have had at least 3 rows before compute, got 0"),
        (lambda: MMCELoss(bandwidth=0.0), "bandwidth must be greater than 0"),
        (lambda: SBECELoss(temperature=-1.0), "temperature must be greater than 0"),
        (lambda: SBECELoss(n_bins=0), "n_bins must be an integer of at least 1"),
        (lambda: list(interleave([1], [])), "calibration must give at least one batch"),
        (lambda: list(interleave([1, 2], iter([1]))), "pass a DataLoader"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_metric_without_torchmetrics_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"posterity\[uncertainty\]"):
        ESDMetric()


def test_a_pixel_that_only_test_images_vary_in_is_not_blown_up(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((200, 8, 8), dtype=np.float32), np.arange(200) % 2
    _, test = split(200, (30 / 200, 1 - 130 / 200), 0)
    x[:, 0, 0] = 0.0
    x[test, 0, 0] = 1.0
    np.savez(tmp_path / "images.npz", x=x, y=y)
    seen, _, shown, _ = _images(str(tmp_path / "images.npz"), 30, 0.0, 0)
    assert (seen[..., 0, 0] == 0).all() and shown.abs().max() < 10
