import copy
import math

import mpmath
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.nn import functional as F

from posterity.representation import (
    DINOHead,
    DINOvMFLoss,
    SelfDistillation,
    vmf_log_normalizer,
    vmf_logits,
)
from posterity.testing import check_layer


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def exact(kappa, dim):
    """The constant and its slope with forty digits."""
    with mpmath.workdps(40):
        nu = mpmath.mpf(dim) / 2 - 1
        bessel = mpmath.besseli(nu, kappa)
        value = nu * mpmath.log(kappa) - (nu + 1) * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        return float(value), float(mpmath.besseli(nu + 1, kappa) / bessel)


# The constant.


def test_in_two_and_three_dimensions_the_constant_has_a_closed_form():
    k = torch.tensor([1e-3, 0.1, 1.0, 10.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(
        vmf_log_normalizer(k, 3), (k / (4 * math.pi * k.sinh())).log(), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(
        vmf_log_normalizer(k, 2), -(2 * math.pi * torch.special.i0(k)).log(), rtol=1e-8, atol=1e-8
    )
    zero = torch.zeros(2, dtype=torch.float64)
    for dim in (2, 3, 64):
        area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
        torch.testing.assert_close(vmf_log_normalizer(zero, dim), zero - area, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 16, 65, 66, 256, 512])
def test_value_and_slope_have_the_digits_of_high_precision(dim):
    points = [1e-300, 1e-6, 0.1, 1.0, 7.0, 50.0, 300.0, 1000.0]
    kappa = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    value = vmf_log_normalizer(kappa, dim)
    (slope,) = torch.autograd.grad(value.sum(), kappa)
    for k, v, a in zip(points, value.tolist(), slope.tolist(), strict=True):
        expected = exact(k, dim)
        assert v == pytest.approx(expected[0], rel=1e-12, abs=1e-11)
        assert -a == pytest.approx(expected[1], rel=1e-11, abs=0)
    torch.testing.assert_close(vmf_log_normalizer(kappa.detach(), dim), value.detach(), rtol=0, atol=0)
    low = vmf_log_normalizer(kappa.detach().float(), dim)
    torch.testing.assert_close(low.double(), value.detach(), rtol=1e-5, atol=0)


def test_the_density_integrates_to_one_and_longer_prototypes_have_smaller_constants():
    for k in (0.0, 0.5, 3.0, 20.0):
        log_c = float(vmf_log_normalizer(torch.tensor(k, dtype=torch.float64), 3))
        total = quad(
            lambda a, k=k, c=log_c: 2 * math.pi * math.sin(a) * math.exp(k * math.cos(a) + c), 0, math.pi
        )[0]
        assert total == pytest.approx(1, abs=1e-8)
    kappa = torch.linspace(0, 200, 400, dtype=torch.float64).requires_grad_()
    value = vmf_log_normalizer(kappa, 32)
    (slope,) = torch.autograd.grad(value.sum(), kappa)
    assert (value.diff() < 0).all() and (slope.diff() < 0).all()
    assert slope.min() > -1 and slope.max() <= 0


@pytest.mark.parametrize("dim", [2, 3, 64])
def test_derivatives_are_those_of_differences(dim):
    kappa = torch.tensor([0.05, 0.9, 8.0, 60.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: vmf_log_normalizer(k, dim), kappa)
    assert torch.autograd.gradgradcheck(lambda k: vmf_log_normalizer(k, dim), kappa)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(vmf_log_normalizer(zero, dim).sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), zero)
    assert float(first.detach()) == 0 and float(second) == pytest.approx(-1 / dim)


def test_logits_are_bayes_rule_for_the_mixture():
    y, w, t = F.normalize(randn(6, 4), dim=1), randn(5, 4, seed=1), 0.3
    kappa = w.norm(dim=1) / t
    densities = [
        (kappa[k] * (y @ F.normalize(w[k], dim=0))).exp() * math.exp(exact(float(kappa[k]), 4)[0])
        for k in range(5)
    ]
    joint = torch.stack(densities, 1)
    torch.testing.assert_close(
        vmf_logits(y, w, t).softmax(1), joint / joint.sum(1, keepdim=True), rtol=1e-10, atol=0
    )
    even = 2.5 * F.normalize(w, dim=1)
    shift = vmf_logits(y, even, t) - y @ even.T / t
    torch.testing.assert_close(shift, shift[:1, :1].expand_as(shift))
    assert vmf_logits(y.bfloat16(), w.bfloat16(), t).dtype == torch.float32


# The head.


def test_kinds_of_prototypes_differ_by_their_norms_and_constants():
    x, kinds = randn(7, 6, dtype=torch.float32), {}
    for kind in ("vmf", "unnormalized", "normalized"):
        torch.manual_seed(0)
        kinds[kind] = DINOHead(6, 10, hidden_dim=8, bottleneck_dim=4, prototypes=kind)
    plain = kinds["normalized"](x, 0.1)
    torch.testing.assert_close(kinds["unnormalized"](x, 0.1), plain)
    torch.testing.assert_close(kinds["vmf"](x, 0.1).softmax(1), plain.softmax(1))
    y = kinds["vmf"].embed(x)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(plain, y @ F.normalize(kinds["vmf"].direction, dim=1).T / 0.1)
    for kind in ("vmf", "unnormalized"):
        kinds[kind].direction.data *= 3
        kinds[kind].magnitude.data = torch.rand(10, generator=rng()) + 0.5
        kinds[kind].magnitude.data[0] *= -1
    weight = kinds["vmf"].magnitude[:, None] * F.normalize(kinds["vmf"].direction, dim=1)
    torch.testing.assert_close(kinds["unnormalized"](x, 0.1), y @ weight.T / 0.1)
    torch.testing.assert_close(kinds["vmf"](x, 0.1), vmf_logits(y, weight, 0.1))
    torch.testing.assert_close(kinds["vmf"].precision(0.2), kinds["vmf"].magnitude.detach().abs() / 0.2)
    torch.testing.assert_close(kinds["vmf"].precision(), 2 * kinds["vmf"].precision(0.2))
    kinds["vmf"](x, 0.1).logsumexp(1).sum().backward()
    assert kinds["vmf"].magnitude.grad.abs().min() > 0
    assert "magnitude" not in dict(kinds["normalized"].named_parameters())


@pytest.mark.parametrize("centering", ["probability", "logit", "none"])
def test_of_equal_norms_the_constant_changes_neither_loss_nor_centred_probabilities(centering):
    sizes = {"hidden_dim": 8, "bottleneck_dim": 4}
    plain, vmf = (DINOHead(6, 10, prototypes=kind, **sizes).double() for kind in ("unnormalized", "vmf"))
    losses = [DINOvMFLoss(10, centering=centering).double() for _ in range(2)]
    plain.load_state_dict(vmf.state_dict())
    for head in (plain, vmf):
        head.magnitude.data.fill_(2.5)
    assert (vmf(randn(1, 6), 0.1) - plain(randn(1, 6), 0.1)).abs().min() > 1
    for step in range(3):
        a, b = (randn(7, 6, seed=2 * step + k) for k in range(2))
        values = [
            loss([head(a, 0.1), head(b, 0.1)], [head(a, 0.04), head(b, 0.04)])
            for head, loss in zip((plain, vmf), losses, strict=True)
        ]
        torch.testing.assert_close(*values, rtol=1e-10, atol=0)
        probs = [loss.teacher_probs(head(a, 0.04)) for head, loss in zip((plain, vmf), losses, strict=True)]
        torch.testing.assert_close(*probs, rtol=1e-9, atol=1e-12)


class At(nn.Module):
    """A head at one temperature, its logits in the dtype of its input."""

    def __init__(self):
        super().__init__()
        self.head = DINOHead(6, 5, hidden_dim=8, bottleneck_dim=4)

    def forward(self, x):
        return self.head(x, 0.5).to(x.dtype)


def test_the_head_is_a_layer(as_a_user):
    torch.manual_seed(0)
    check_layer(At(), randn(7, 6, dtype=torch.float32))
    assert [type(m).__name__ for m in DINOHead(6, 5, n_layers=2).mlp] == ["Linear", "GELU", "Linear"]
    assert float(DINOHead(600, 5).mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)


# The loss.


def test_the_loss_is_the_mean_over_pairs_of_different_views():
    student, teacher = [randn(5, 4, seed=k) for k in range(3)], [randn(5, 4, seed=k + 9) for k in range(2)]
    loss = DINOvMFLoss(4).double()
    loss.center = randn(4, seed=77)
    total = []
    for i in range(2):
        p = (teacher[i] - loss.center).softmax(1)
        total += [-(p * student[j].log_softmax(1)).sum(1).mean() for j in range(3) if i != j]
    assert len(total) == 4
    torch.testing.assert_close(loss(student, teacher, update=False), torch.stack(total).mean())
    two = loss(student[:2], teacher, update=False)
    torch.testing.assert_close(two, (total[0] + total[2]) / 2)
    one = loss(student, teacher[:1], update=False)
    torch.testing.assert_close(one, (total[0] + total[1]) / 2)
    order = torch.randperm(4, generator=rng())
    permuted = DINOvMFLoss(4).double()
    permuted.center = loss.center[order]
    value = permuted([s[:, order] for s in student], [t[:, order] for t in teacher])
    by_hand = copy.deepcopy(loss)
    by_hand.update_center(torch.cat(teacher))
    loss(student, teacher)
    torch.testing.assert_close(loss.center, by_hand.center)
    torch.testing.assert_close(value, torch.stack(total).mean())
    torch.testing.assert_close(permuted.center, loss.center[order])
    probs = loss.teacher_probs(teacher[0])
    torch.testing.assert_close(permuted.teacher_probs(teacher[0][:, order]), probs[:, order])


def test_the_centre_averages_log_mean_probabilities_or_logits():
    a, b = randn(6, 4), 3 * randn(4, 4, seed=1)
    for centering, now in (
        ("probability", lambda z: z.softmax(1).mean(0).log()), ("logit", lambda z: z.mean(0)), ("none", lambda z: 0 * z[0])
    ):  # fmt: skip
        loss = DINOvMFLoss(4, center_momentum=0.7, centering=centering).double()
        loss.update_center(a)
        loss.update_center(b)
        torch.testing.assert_close(loss.center, 0.7 * 0.3 * now(a) + 0.3 * now(b))
        expected = b - loss.center if centering != "none" else b
        torch.testing.assert_close(loss.teacher_probs(b), expected.softmax(1))
    far = torch.tensor([[0.0, -1e4, 0.0]])
    loss = DINOvMFLoss(3)
    loss.update_center(far)
    assert loss.center.isfinite().all()


def test_centring_evens_out_what_a_batch_uses():
    logits = 4 * randn(40, 6) + torch.tensor([6.0, 3.0, 0, 0, -3.0, -6.0])
    loss = DINOvMFLoss(6).double()

    def use(z):
        return float(torch.special.entr(loss.teacher_probs(z).mean(0)).sum().exp())

    before = use(logits)
    for _ in range(200):
        loss.update_center(logits)
    assert use(logits) > before + 1
    alone = DINOvMFLoss(6).double()
    for _ in range(300):
        alone.update_center(logits[:1])
    torch.testing.assert_close(
        alone.teacher_probs(logits[:1]), torch.full((1, 6), 1 / 6, dtype=torch.float64)
    )


def test_no_gradient_reaches_the_teacher_and_narrow_logits_are_widened():
    student, teacher = (
        [randn(5, 4, seed=k).requires_grad_() for k in range(2)],
        [randn(5, 4, seed=9).requires_grad_()],
    )
    DINOvMFLoss(4).double()(student, teacher).backward()
    assert teacher[0].grad is None and student[0].grad is None and student[1].grad.norm() > 0
    loss = DINOvMFLoss(4).to(torch.bfloat16)
    assert loss.center.dtype == torch.float32
    low = loss([s.detach().bfloat16() for s in student], [teacher[0].detach().bfloat16()])
    assert low.dtype == torch.bfloat16
    assert torch.autograd.gradcheck(
        lambda *s: DINOvMFLoss(4).double()(s, teacher, update=False), tuple(student)
    )


# Student and teacher.


def trainer(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    head = DINOHead(8, 12, hidden_dim=8, bottleneck_dim=4)
    return SelfDistillation(net, head, **{"total_steps": 10} | options)


def views(count, seed=0):
    return [torch.rand(6, 1, 4, 4, generator=rng(seed + k)) for k in range(count)]


def test_a_step_is_the_loss_of_both_branches_at_their_temperatures():
    model = trainer(teacher_warmup=(0.02, 4), teacher_temperature=0.06)
    global_views, local_views = views(2), views(1, 7)
    model.update_teacher(0)  # one step of four: from 0.02 to 0.06
    student = [model.head(model.backbone(x), 0.1) for x in (*global_views, *local_views)]
    teacher = [model.teacher_head(model.teacher_backbone(x), 0.03) for x in global_views]
    expected = DINOvMFLoss(12)(student, teacher)
    torch.testing.assert_close(model.loss(global_views, local_views), expected)
    assert model.criterion.center.abs().sum() > 0


def test_the_centre_moves_in_training_mode_only_unless_asked():
    model = trainer()

    def moved(**options):
        before = model.criterion.center.clone()
        model.loss(views(2), **options)
        return not torch.equal(model.criterion.center, before)

    assert moved() and moved(update=True) and not moved(update=False)
    model.eval()
    assert not moved() and not moved(update=False) and moved(update=True)


def test_the_teacher_follows_with_a_cosine_and_has_the_students_buffers():
    model = trainer(momentum=0.6)
    for step in (0, 3, 10, 99):
        with torch.no_grad():
            for p in model.trainable_parameters():
                p.add_(1)
        before = [p.clone() for p in model.teacher_head.parameters()]
        model.backbone(views(1)[0])
        model.update_teacher(step)
        share = min(step / 10, 1)
        m = 1 - 0.4 * (math.cos(math.pi * share) + 1) / 2
        for start, now, source in zip(
            before, model.teacher_head.parameters(), model.head.parameters(), strict=True
        ):
            torch.testing.assert_close(now, m * start + (1 - m) * source)
        assert torch.equal(model.teacher_backbone[2].running_mean, model.backbone[2].running_mean)
    assert not any(p.requires_grad for p in model.teacher_backbone.parameters())


@pytest.mark.parametrize("momentum", [0, 1])
def test_a_teacher_of_momentum_one_stays_and_of_zero_is_the_student(momentum):
    model = trainer(momentum=momentum)
    before = [p.clone() for p in (*model.teacher_backbone.parameters(), *model.teacher_head.parameters())]
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(1)
    model.update_teacher(0)
    expected = before if momentum else list(model.trainable_parameters())
    teacher = [*model.teacher_backbone.parameters(), *model.teacher_head.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(teacher, expected, strict=True))


def test_prototypes_learn_after_they_thaw_and_only_the_student_learns():
    model = trainer(freeze_prototypes_steps=2)
    for step in range(3):
        model.zero_grad()
        model.loss(views(2)).backward()
        assert (model.head.direction.grad is None) == (model.head.magnitude.grad is None) == (step < 2)
        assert all(p.grad is None for p in model.teacher_head.parameters())
        model.update_teacher(step)
    resumed = trainer(freeze_prototypes_steps=2)
    resumed.loss(views(2))
    resumed.load_state_dict(model.state_dict())
    resumed.loss(views(2)).backward()
    assert resumed.head.direction.grad is not None
    kept = trainer()
    kept.head.direction.requires_grad_(False)
    kept.loss(views(2)).backward()
    assert kept.head.direction.grad is None
    names = {id(p) for p in model.trainable_parameters()}
    assert names == {id(p) for p in (*model.backbone.parameters(), *model.head.parameters())}


def test_assignments_are_those_of_training_in_eval_mode_and_usage_counts_them():
    model, (x,) = trainer(teacher_warmup=(0.02, 4), center_momentum=0.5), views(1)
    model.loss(views(2, 3))
    model.eval()
    logits = model.teacher_head(model.teacher_backbone(x), 0.02)
    model.train()
    p = model.assignments(x)
    assert model.training and p.shape == (6, 12)
    torch.testing.assert_close(p, (logits - model.criterion.center).softmax(1))
    torch.testing.assert_close(model.assignments(x[:2]), p[:2])  # not of a batch's own statistics
    assert not torch.allclose(p, model.assignments(x, "student"))
    mean = p.double().mean(0)
    assert model.usage(x) == pytest.approx(float(torch.exp(-(mean * mean.log()).sum())))
    again = trainer(teacher_warmup=(0.02, 4))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.assignments(x), p)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vmf_log_normalizer(torch.ones(2), 1), "dim"),
        (lambda: vmf_log_normalizer(torch.tensor([-1.0]), 3), "kappa must not be negative"),
        (lambda: vmf_log_normalizer(torch.ones(2, dtype=torch.int64), 3), "kappa must be a floating"),
        (lambda: vmf_logits(torch.eye(3), torch.eye(3), 0), "temperature"),
        (lambda: vmf_logits(2 * torch.eye(3), torch.eye(3), 1), "y must have rows of norm 1"),
        (lambda: vmf_logits(1.002 * torch.eye(3), torch.eye(3), 1), "y must have rows of norm 1"),
        (lambda: vmf_logits(torch.eye(3), torch.eye(3), -1), "temperature"),
        (lambda: vmf_logits(torch.eye(3), torch.eye(2), 1), "weight must have shape"),
        (lambda: vmf_logits(torch.ones(3, 1), torch.ones(2, 1), 1), "y must have two columns"),
        (lambda: vmf_logits(torch.ones(3), torch.eye(3), 1), "y must have two columns"),
        (lambda: DINOHead(4, bottleneck_dim=1), "bottleneck_dim"),
        (lambda: DINOHead(4, prototypes="free"), "prototypes"),
        (lambda: DINOHead(4)(torch.ones(2, 3), 0.1), "x must have shape"),
        (lambda: DINOHead(4)(torch.ones(2, 4), 0.0), "temperature"),
        (lambda: DINOHead(4).precision(0), "temperature"),
        (lambda: DINOvMFLoss(4, center_momentum=1.5), "center_momentum"),
        (lambda: DINOvMFLoss(4, centering="mean"), "centering"),
        (lambda: DINOvMFLoss(4)([torch.ones(2, 4)], [torch.ones(2, 4)] * 2), "at most as many views"),
        (lambda: DINOvMFLoss(4)([torch.ones(2, 4)], [torch.ones(2, 4)]), "at least two views"),
        (lambda: DINOvMFLoss(4)([torch.ones(2, 4)] * 2, []), "at most as many views"),
        (lambda: DINOvMFLoss(4)([torch.ones(2, 3)] * 2, [torch.ones(2, 4)]), r"student\[0\] must have shape"),
        (lambda: DINOvMFLoss(4)([torch.ones(2, 4)] * 2, [torch.ones(3, 4)]), r"teacher\[0\] must have shape"),
        (lambda: trainer(total_steps=0), "total_steps"),
        (lambda: trainer(momentum=1.2), "momentum"),
        (lambda: DINOvMFLoss(4)([torch.ones(2, 4)] * 2, [torch.ones(2, 3)]), r"teacher\[0\] must have shape"),
        (lambda: DINOvMFLoss(4)([torch.ones(0, 4)] * 2, [torch.ones(0, 4)]), "at least one row"),
        (lambda: DINOvMFLoss(4).teacher_probs(torch.ones(2, 3)), "logits must have shape"),
        (lambda: DINOvMFLoss(4).update_center(torch.ones(2, 3)), "logits must have shape"),
        (lambda: trainer(momentum=-0.1), "momentum"),
        (lambda: trainer(teacher_temperature=0), "teacher_temperature"),
        (lambda: trainer(teacher_warmup=(0, 3)), r"teacher_warmup\[0\]"),
        (lambda: trainer(teacher_warmup=(0.04, -1)), r"teacher_warmup\[1\]"),
        (lambda: trainer(freeze_prototypes_steps=-1), "freeze_prototypes_steps"),
        (lambda: trainer().update_teacher(-1), "step"),
        (lambda: trainer().assignments(views(1)[0], "both"), "branch"),
        (lambda: trainer(teacher_warmup=(0.04,)), "teacher_warmup must be"),
        (lambda: trainer(student_temperature=0), "student_temperature"),
        (lambda: trainer().loss(views(1)), "one view has no pair"),
        (lambda: trainer().loss([], views(2)), "global_views must have"),
        (lambda: SelfDistillation(nn.Linear(2, 2), nn.Linear(2, 2), total_steps=1), "head must be a DINOHead"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
