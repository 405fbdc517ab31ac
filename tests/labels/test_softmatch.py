"""SoftMatch against a step by step copy of its equations in numpy, its limits and its gradient."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from posterity.labels import SoftMatchLoss, SoftMatchWeighting, UniformAlignment, quantity_quality
from posterity.testing import check_loss
from posterity.testing._low_precision import check_low_precision


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(n, c=5, seed=0, scale=2.0):
    return scale * torch.randn(n, c, dtype=torch.float64, generator=rng(seed))


def shares(n, c=5, seed=0, scale=2.0):
    return logits(n, c, seed, scale).softmax(1)


def batch(n=12, m=7, c=5, seed=0):
    """Return labelled logits, classes, weak and strong logits."""
    y = torch.randint(c, (m,), generator=rng(seed))
    labeled, strong = logits(m, c, seed + 1).requires_grad_(), logits(n, c, seed + 3).requires_grad_()
    return labeled, y, logits(n, c, seed + 2), strong


def by_hand(steps, c, m, n_sigma=2.0, per_class=False, align="uniform"):
    """Return the weights of each step of (weak probabilities, labelled probabilities)."""
    model, target = None, np.full(c, 1 / c)
    mu, var = (np.full(c, 1 / c), np.ones(c)) if per_class else (1 / c, 1.0)
    found = []
    for p, labeled in steps:
        model = p.mean(0) if model is None else m * model + (1 - m) * p.mean(0)
        if align == "model":
            target = m * target + (1 - m) * labeled.mean(0)
        q = p
        if align is not None:
            q = p * (target + 1e-6) / (model + 1e-6)
            q = q / q.sum(1, keepdims=True)
        conf, label = q.max(1), q.argmax(1)
        if per_class:
            for k in range(c):
                own = conf[label == k]
                mu[k] = m * mu[k] + (1 - m) * (own.mean() if len(own) > 1 else 0)
                var[k] = m * var[k] + (1 - m) * (own.var(ddof=1) if len(own) > 1 else 1)
            centre, width = mu[label], var[label]
        else:
            mu = m * mu + (1 - m) * conf.mean()
            var = m * var + (1 - m) * conf.var(ddof=1)
            centre, width = mu, var
        below = np.minimum(conf - centre, 0)
        found.append(np.exp(-(below**2) / (2 * width / n_sigma**2)))
    return found


@pytest.mark.parametrize("align", ["uniform", "model", None])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_weights_are_those_of_the_equations_step_by_step(align, per_class, momentum):
    loss = SoftMatchLoss(5, momentum=momentum, align=align, per_class=per_class, n_sigma=1.5).double()
    steps = [batch(seed=10 * k) for k in range(4)]
    shown = [(weak.softmax(1).numpy(), z.detach().softmax(1).numpy()) for z, _, weak, _ in steps]
    for step, want in zip(steps, by_hand(shown, 5, momentum, 1.5, per_class, align), strict=True):
        loss(*step)
        np.testing.assert_allclose(loss.weights.numpy(), want, rtol=1e-5, atol=1e-9)
        assert torch.equal(loss.pseudo_labels, step[2].argmax(1)), "labels come from what is not aligned"


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_divides_by_the_batch_and_its_gradient_is_the_weight_times_that_of_cross_entropy(
    hard, reduction
):
    labeled, y, weak, strong = batch()
    weak.requires_grad_()
    loss = SoftMatchLoss(5, momentum=0.3, lambda_u=0.7, hard_label=hard, temperature=0.4, reduction=reduction)
    value = loss(labeled, y, weak, strong)
    target = F.one_hot(weak.argmax(1), 5).double() if hard else (weak / 0.4).softmax(1).detach()
    nll = -(target * strong.log_softmax(1)).sum(1)
    parts = [7, 12] if reduction == "mean" else [1, 1]
    supervised = F.cross_entropy(labeled, y, reduction="sum") / parts[0]
    unsupervised = (loss.weights * nll).sum() / parts[1]
    torch.testing.assert_close(value, supervised + 0.7 * unsupervised)
    torch.testing.assert_close(loss.supervised, supervised.detach())
    torch.testing.assert_close(loss.unsupervised, unsupervised.detach())
    assert not loss.weights.requires_grad and not loss.unsupervised.requires_grad
    value.backward()
    assert weak.grad is None
    want = 0.7 * loss.weights[:, None] * (strong.softmax(1) - target).detach() / parts[1]
    torch.testing.assert_close(strong.grad, want)
    want = (labeled.softmax(1) - F.one_hot(y, 5)).detach() / parts[0]
    torch.testing.assert_close(labeled.grad, want)


# Weights.


def test_confidence_above_the_mean_counts_in_full_and_less_the_lower_it_is():
    weighting = SoftMatchWeighting(5, momentum=0.9)
    for seed in range(5):
        probs = shares(30, seed=seed)
        weight, confidence = weighting(probs), probs.amax(1)
        assert (weight[confidence >= weighting.mu] == 1).all()
        assert (weight[confidence < weighting.mu - 1e-6] < 1).all()
        assert ((weight > 0) & (weight <= 1)).all()
        assert (weight[confidence.argsort()].diff() >= 0).all()


def test_without_momentum_the_gaussian_is_that_of_the_batch():
    weighting, probs = SoftMatchWeighting(5, momentum=0.0).double(), shares(9)
    weighting(shares(20, seed=4))
    weighting(probs)
    confidence = probs.amax(1)
    torch.testing.assert_close(weighting.mu, confidence.mean())
    torch.testing.assert_close(weighting.var, confidence.var())


def test_the_statistics_start_wide_and_are_moved_before_they_weigh():
    weighting = SoftMatchWeighting(4, momentum=0.5).double()
    assert (weighting.mu, weighting.var) == (0.25, 1)
    weighting(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.9, 0.1, 0.0, 0.0]]).double())
    torch.testing.assert_close(weighting.mu, torch.tensor(0.125 + 0.4).double())
    torch.testing.assert_close(weighting.var, torch.tensor(0.5 + 0.5 * 0.02).double())


@pytest.mark.parametrize("n_sigma", [1e7, 1e200])
def test_a_narrow_tail_is_the_mask_of_what_lies_above_the_mean(n_sigma):
    weighting, probs = SoftMatchWeighting(5, momentum=0.0, n_sigma=n_sigma), shares(40)
    weight = weighting(probs)
    assert torch.equal(weight, (probs.amax(1) >= weighting.mu).double())
    assert 0 < weight.mean() < 1


def test_a_wide_tail_is_plain_pseudo_labelling():
    labeled, y, weak, strong = batch()
    value = SoftMatchLoss(5, n_sigma=1e-9)(labeled, y, weak, strong)
    want = F.cross_entropy(labeled, y) + F.cross_entropy(strong, weak.argmax(1))
    torch.testing.assert_close(value, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_confidences_have_no_variance_and_count_in_full(dtype):
    for n in (1, 3, 7, 1000):
        probs = torch.tensor([0.1, 0.6, 0.3], dtype=dtype).repeat(n, 1)
        assert (SoftMatchWeighting(3, momentum=0.0)(probs) == 1).all()


@pytest.mark.parametrize("per_class", [False, True])
def test_a_batch_of_one_has_no_variance(per_class):
    weighting = SoftMatchWeighting(2, momentum=0.5, per_class=per_class).double()
    weighting(torch.tensor([[0.2, 0.8]]).double())
    mean, var = ([0.25, 0.25], [1.0, 1.0]) if per_class else (0.65, 1.0)  # of each class less than two
    torch.testing.assert_close(weighting.mu, torch.tensor(mean).double())
    torch.testing.assert_close(weighting.var, torch.tensor(var).double())


# Alignment.


def test_without_momentum_the_mean_prediction_becomes_the_target():
    probs = shares(4000, c=3, scale=0.1) * torch.tensor([3.0, 1.0, 1.0])
    probs = probs / probs.sum(1, keepdim=True)
    aligned = UniformAlignment(3, momentum=0.0)(probs)
    torch.testing.assert_close(aligned.sum(1), torch.ones(4000).double())
    assert (probs.mean(0) - 1 / 3).abs().max() > 0.2
    torch.testing.assert_close(aligned.mean(0), torch.full((3,), 1 / 3).double(), atol=2e-3, rtol=0)
    known = torch.tensor([0.2, 0.5, 0.3])
    aligned = UniformAlignment(3, momentum=0.0, target=known)(probs)
    torch.testing.assert_close(aligned.mean(0), known.double(), atol=2e-3, rtol=0)


def test_a_batch_that_is_uniform_on_average_is_left_as_it_is():
    probs = torch.stack([shares(1)[0].roll(k) for k in range(5)])
    torch.testing.assert_close(UniformAlignment(5)(probs), probs, rtol=1e-6, atol=0)


def test_the_first_batch_is_the_mean_so_far():
    alignment, first, second = UniformAlignment(5, momentum=0.9).double(), shares(8), shares(6, seed=1)
    torch.testing.assert_close(alignment.eval()(first), first)  # nothing is known yet
    alignment.train()(first)
    torch.testing.assert_close(alignment.p_model, first.mean(0))
    alignment(second)
    torch.testing.assert_close(alignment.p_model, 0.9 * first.mean(0) + 0.1 * second.mean(0))
    assert torch.equal(alignment.p_target, torch.full((5,), 0.2).double())


# State.


@pytest.mark.parametrize("options", [{}, {"per_class": True}, {"align": "model"}, {"align": None}])
def test_names_of_classes_do_not_matter(options):
    order = torch.tensor([3, 0, 4, 1, 2])
    one, other = SoftMatchLoss(5, momentum=0.6, **options), SoftMatchLoss(5, momentum=0.6, **options)
    for seed in (0, 10):
        labeled, y, weak, strong = batch(n=30, seed=seed)
        value = one(labeled, y, weak, strong)
        torch.testing.assert_close(
            other(labeled[:, order], order.argsort()[y], weak[:, order], strong[:, order]), value
        )
        torch.testing.assert_close(other.weights, one.weights)


@pytest.mark.parametrize("options", [{}, {"per_class": True, "align": "model"}])
def test_a_state_dict_carries_on_and_eval_moves_nothing(options):
    first, second = (SoftMatchLoss(5, momentum=0.6, **options).double() for _ in range(2))
    first(*batch())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*batch(seed=7)), second(*batch(seed=7)))
    assert torch.equal(first.weights, second.weights)
    before = copy.deepcopy(first.eval().state_dict())
    weights = [(first(*batch(seed=9)), first.weights)[1] for _ in range(2)]
    assert torch.equal(*weights)
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_do_not_stand_still_in_a_narrow_module(as_a_user, dtype):
    low, exact = SoftMatchLoss(3).to(dtype), SoftMatchLoss(3)
    step = [x.detach().to(dtype) if x.is_floating_point() else x for x in batch(c=3)]
    for _ in range(100):
        assert low(*step).dtype == dtype
        exact(*(x.float() if x.is_floating_point() else x for x in step))
    assert low.weighting.mu.dtype == low.alignment.p_model.dtype == torch.float32
    for got, want in zip(low.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0.01, atol=1e-3)


class Plain(nn.Module):
    """The loss alone: it reduces two batches, so no values of single examples have it as mean."""

    def __init__(self, **options):
        super().__init__()
        self.loss = SoftMatchLoss(5, momentum=0.0, **options)

    def forward(self, labeled, y, weak, strong):
        return self.loss(labeled, y, weak, strong)


@pytest.mark.parametrize("options", [{}, {"per_class": True}, {"align": None, "hard_label": False}])
def test_conforms_to_its_kind(as_a_user, options):
    """Without momentum, where two calls agree."""
    check_loss(Plain(**options), *batch(n=7), symmetric=True, compiles=False)


def test_compiles_without_a_break_in_its_graph(as_a_user):
    torch._dynamo.reset()  # of many losses compiled in one process the last are not
    plain, compiled = SoftMatchLoss(5), SoftMatchLoss(5)
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    for seed in (0, 10):
        torch.testing.assert_close(run(*batch(seed=seed)), plain(*batch(seed=seed)))
    torch.testing.assert_close(compiled.weights, plain.weights)


@pytest.mark.parametrize("module", [UniformAlignment(5, momentum=0.0), SoftMatchWeighting(5, momentum=0.0)])
def test_low_precision_rounds_the_result_only(as_a_user, module):
    probs = shares(40).requires_grad_()
    check_low_precision(lambda part, x: part(x), module, (probs,), slack=4, gradient=False)


@pytest.mark.parametrize("options", [{}, {"per_class": True, "align": "model"}])
def test_processes_have_the_statistics_of_their_joint_batch(monkeypatch, options):
    """Two threads stand for two processes of 20 and 10 examples: each adds up what both give."""
    alone = SoftMatchLoss(5, momentum=0.3, **options).double()
    ranks = [copy.deepcopy(alone) for _ in range(2)]
    labeled, y, weak, strong = (x.detach() for x in batch(n=30, m=7))
    alone(labeled, y, weak, strong)
    given, barrier = {}, threading.Barrier(2, timeout=30)

    def all_reduce(x):
        given[threading.get_ident()] = x.clone()
        barrier.wait()
        x.copy_(sum(given.values()))
        barrier.wait()

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    parts = (slice(5), slice(20)), (slice(5, 7), slice(20, 30))
    work = [
        threading.Thread(target=rank, args=(labeled[few], y[few], weak[rows], strong[rows]))
        for rank, (few, rows) in zip(ranks, parts, strict=True)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    for rank, (_, rows) in zip(ranks, parts, strict=True):
        torch.testing.assert_close(rank.weights, alone.weights[rows])
        torch.testing.assert_close(rank.state_dict(), alone.state_dict())


# Quantity and quality.


def test_quantity_and_quality_of_a_mask_are_its_share_and_its_accuracy():
    pseudo, target = torch.randint(3, (2, 50), generator=rng())
    mask = torch.rand(50, generator=rng(1)) < 0.6
    quantity, quality = quantity_quality(mask.float(), pseudo, target)
    assert quantity == pytest.approx(float(mask.float().mean()))
    assert quality == pytest.approx(float((pseudo == target)[mask].float().mean()))
    nothing = quantity_quality(torch.zeros(50), pseudo, target)
    assert nothing[0] == 0 and math.isnan(nothing[1])


# Bad input.

Z, Y, P = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.full((4, 3), 1 / 3)
NAN = torch.full((4, 3), math.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SoftMatchLoss(3)(Z, Y, Z, Z[:3]), r"logits_strong must have shape \(4, 3\) for logits_weak, got \(3, 3\)"),
        (lambda: SoftMatchLoss(3)(Z, Y, Z[:, :2], Z[:, :2]), r"logits_weak must have shape \(any, 3\) for n_classes"),
        (lambda: SoftMatchLoss(3)(Z[:, :2], Y, Z, Z), r"logits_labeled must have shape \(any, 3\)"),
        (lambda: SoftMatchLoss(3)(Z, Y + 3, Z, Z), r"y must be in 0\.\.2, got values from 3 to 3"),
        (lambda: SoftMatchLoss(3)(Z, Y - 1, Z, Z), r"y must be in 0\.\.2"),
        (lambda: SoftMatchLoss(3)(Z, Y[:2], Z, Z), r"y must have shape \(4\) for logits_labeled"),
        (lambda: SoftMatchLoss(3)(Z, Y.float(), Z, Z), "y must be a tensor of integers, got torch.float32"),
        (lambda: SoftMatchLoss(3)(Z, Y, Z[:0], Z[:0]), "logits_weak must have at least one row"),
        (lambda: SoftMatchLoss(3)(Z[:0], Y[:0], Z, Z), "logits_labeled must have at least one row"),
        (lambda: SoftMatchLoss(3)(Z, Y, NAN, Z), "logits_weak must be finite: logits are not finite"),
        (lambda: SoftMatchLoss(3)(NAN, Y, Z, Z), "logits_labeled must be finite"),
        (lambda: SoftMatchLoss(3)(Z, Y, Z, Z.long()), "logits_strong must be a floating-point"),
        (lambda: SoftMatchLoss(3, lambda_u=-1.0), "lambda_u must be at least 0"),
        (lambda: SoftMatchLoss(3, temperature=0.0), "temperature must be greater than 0"),
        (lambda: SoftMatchLoss(3, align="labels"), "align must be one of"),
        (lambda: SoftMatchLoss(3, reduction="none"), "reduction must be one of"),
        (lambda: SoftMatchLoss(1), "n_classes must be an integer of at least 2"),
        (lambda: SoftMatchWeighting(3, n_sigma=0.0), "n_sigma must be greater than 0"),
        (lambda: SoftMatchWeighting(3, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: SoftMatchWeighting(3)(P - 0.5), "probs must be probabilities, got -0.16"),
        (lambda: SoftMatchWeighting(3)(1.01 * P), "probs must be rows that sum to 1, got 1.01 in row 0"),
        (lambda: SoftMatchWeighting(3)(NAN), "probs must be probabilities"),
        (lambda: SoftMatchWeighting(3)(P[:0]), "probs must have at least one row"),
        (lambda: UniformAlignment(3)(P[:, :2]), r"probs must have shape \(any, 3\) for n_classes"),
        (lambda: UniformAlignment(3)(2 * P), "probs must be rows that sum to 1"),
        (lambda: UniformAlignment(3, target="model")(P), 'probs_labeled must be given for target="model"'),
        (lambda: UniformAlignment(3, target="model")(P, 2 * P), "probs_labeled must be rows that sum to 1"),
        (lambda: UniformAlignment(3, target="given"), "target must be one of"),
        (lambda: UniformAlignment(3, target=P[0, :2]), r"target must have shape \(3\)"),
        (lambda: UniformAlignment(3, target=2 * P[0]), "target must be rows that sum to 1"),
        (lambda: UniformAlignment(3, momentum=-0.1), r"momentum must be in \[0, 1\)"),
        (lambda: quantity_quality(Z[:0, 0], Y[:0], Y[:0]), "weights must have at least one value"),
        (lambda: quantity_quality(Z[:, 0] + 2, Y, Y), r"weights must be in \[0, 1\]"),
        (lambda: quantity_quality(NAN[:, 0], Y, Y), r"weights must be in \[0, 1\]"),
        (lambda: quantity_quality(Z[:, 0], Y[:3], Y), "pseudo must have shape"),
        (lambda: quantity_quality(Z[:, 0], Y, Y.float()), "target must be a tensor of integers"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_refused_moves_nothing(as_a_user):
    loss = SoftMatchLoss(3)
    before = copy.deepcopy(loss.state_dict())
    bad = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0]])
    for call in [(Z, Y, bad, Z[:2]), (Z, Y, Z, NAN), (Z, Y + 3, Z, Z)]:
        with pytest.raises(ValueError):
            loss(*call)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_where_nothing_is_read_logits_that_are_not_finite_move_nothing(as_a_user):
    """As on an accelerator: under torch.compile no value is looked at either."""
    loss = SoftMatchLoss(3)
    loss(Z, Y, logits(4, 3).float(), Z)
    before = copy.deepcopy(loss.state_dict())
    torch._dynamo.reset()
    run = torch.compile(loss, backend="eager", fullgraph=True)
    assert not torch.isfinite(run(Z, Y, torch.cat([Z[:3], NAN[:1]]), Z))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_sums_that_overflow_are_not_taken_for_infinity(as_a_user):
    huge = torch.full((4, 3), 3e38)
    assert torch.isfinite(SoftMatchLoss(3)(Z, Y, huge, Z))
