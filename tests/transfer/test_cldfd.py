"""Cross-level distillation, its contrast, denoised features, and episodes against scikit-learn one at a time."""

import copy
import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn
from torch.nn import functional as F

from posterity.claims.transfer.cldfd import next_level
from posterity.lab.data import load_images
from posterity.testing import check_embedding_loss, check_estimator
from posterity.transfer import (
    CrossLevelDistillation,
    CrossLevelLearner,
    FeatureDenoiser,
    denoise_features,
    few_shot_accuracy,
    nt_xent,
)

CHANNELS = (3, 4, 5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(seed=0, n=2, dtype=torch.float64, sizes=CHANNELS):
    draws = generator(seed)
    return [
        torch.randn(n, c, side, side, generator=draws, dtype=dtype).requires_grad_()
        for c, side in zip(sizes, (8, 4, 2), strict=True)
    ]


class Blocks(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        first = self.one(x)
        second = self.two(first)
        return [first, second], second.mean((2, 3))


def learner(**options):
    torch.manual_seed(1)
    given = {"n_features": 4, "total_steps": 10, "projection_dim": 6, **options}
    return CrossLevelLearner(Blocks(1), Blocks(2), [3, 4], **given)


def views(n=6, k=2):
    return [torch.rand(n, 1, 8, 8, generator=generator(seed)) for seed in range(k)]


# Distillation


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_distillation_by_hand(momentum):
    distillation = CrossLevelDistillation(CHANNELS).double()
    student, teacher, old = maps(0), maps(1), maps(2)
    expected = 0.0
    for level, (projection, ours) in enumerate(zip(distillation.projections, student, strict=False)):
        conv, norm, _ = projection
        out = F.conv2d(ours, conv.weight, conv.bias, stride=2, padding=1)
        mean, var = out.mean((0, 2, 3), keepdim=True), out.var((0, 2, 3), keepdim=True, unbiased=False)
        out = ((out - mean) / (var + norm.eps).sqrt()).clamp_min(0)
        target = (1 - momentum) * teacher[level + 1] + momentum * old[level + 1]
        expected = expected + ((out - target) ** 2).mean()
    got = distillation(student, teacher, old, momentum=momentum)
    torch.testing.assert_close(got, expected)
    got.backward()
    assert all(x.grad.abs().sum() > 0 for x in student[:-1])
    assert student[-1].grad is None
    assert all(x.grad is None for x in (*teacher, *old))
    assert all(p.grad is not None for p in distillation.parameters())


def test_widths_and_strides_may_differ_from_level_to_level():
    teacher = [torch.zeros(2, c, s, s) for c, s in ((7, 8), (6, 8), (9, 3))]
    student = [x.float().detach() for x in maps(sizes=CHANNELS)]
    student = [student[0], F.interpolate(student[1], 8), student[2]]
    distillation = CrossLevelDistillation(CHANNELS, [7, 6, 9], stride=[1, 3])
    assert torch.isfinite(distillation(student, teacher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_maps_give_the_loss_of_their_float64_copies(dtype):
    student, teacher, old = ([x.detach().to(dtype) for x in maps(seed)] for seed in range(3))
    low = CrossLevelDistillation(CHANNELS).eval()
    high = copy.deepcopy(low.to(dtype)).double()
    value = low(student, teacher, old, momentum=0.5)
    assert value.dtype == dtype
    exact = high(*([x.double() for x in part] for part in (student, teacher, old)), momentum=0.5)
    assert value.item() == pytest.approx(exact.item(), rel=8 * torch.finfo(dtype).eps)


# The contrast


class Contrast(nn.Module):
    def forward(self, z1, z2):
        return nt_xent(z1, z2, temperature=0.5)


def test_contrast_conforms_to_its_kind(as_a_user):
    check_embedding_loss(Contrast(), least=1, on_sphere=True)


def test_contrast_is_the_sum_over_rows():
    z1, z2 = (torch.randn(4, 3, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    both = torch.cat([z1, z2])
    total = 0.0
    for i in range(8):
        scores = [float(F.cosine_similarity(both[i], both[j], dim=0)) / 0.3 for j in range(8)]
        others = sum(np.exp(scores[j]) for j in range(8) if j != i)
        total -= np.log(np.exp(scores[(i + 4) % 8]) / others)
    assert float(nt_xent(z1, z2, temperature=0.3)) == pytest.approx(total / 8, abs=1e-12)
    torch.testing.assert_close(nt_xent(z2, z1), nt_xent(z1, z2))
    lengths = torch.rand(4, 1, generator=generator(), dtype=torch.float64) * 10 + 0.1
    torch.testing.assert_close(nt_xent(lengths * z1, z2), nt_xent(z1, z2))
    assert float(nt_xent(z1[:1], z2[:1])) == 0
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(nt_xent(scale * z1.float(), z2.float()), nt_xent(z1.float(), z2.float()))


# The learner


def test_the_loss_is_contrast_and_distillation_of_the_first_view():
    trained = learner(alpha=3.0)
    x1, x2 = views()
    other = copy.deepcopy(trained)
    value = trained(x1, x2)
    s1, f1 = other.student(x1)
    _, f2 = other.student(x2)
    t1, _ = other.teacher(x1)
    expected = nt_xent(other.head(f1), other.head(f2)) + 3 * other.distillation(s1, t1)
    torch.testing.assert_close(value, expected)
    assert learner(alpha=0.0)(x1, x2) < value


def test_the_old_student_is_the_student_a_step_ago_and_does_not_move_with_it():
    trained = learner(total_steps=4, coef=0.8)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5, weight_decay=0.1)
    before = copy.deepcopy(trained.teacher.state_dict())
    momenta = []
    for _ in range(8):
        momenta.append(trained.momentum)
        kept = copy.deepcopy(trained.old_student.state_dict())
        loss = trained(*views())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(torch.equal(kept[k], v) for k, v in trained.old_student.state_dict().items())
        trained.after_step()
        ours, theirs = trained.old_student.state_dict(), trained.student.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert momenta == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert all(torch.equal(before[k], v) for k, v in trained.teacher.state_dict().items())
    assert all(p.grad is None for net in (trained.teacher, trained.old_student) for p in net.parameters())


def test_modes_are_train_for_the_student_and_eval_for_those_it_learns_from():
    trained = learner()
    trained.after_step()
    trained.after_step()
    trained.train()
    trained(*views())
    assert trained.student.modes[-2:] == [True, True]
    assert trained.teacher.modes[-1] is False
    assert trained.old_student.modes[-1] is False


def test_your_teacher_is_left_as_it_was():
    teacher = Blocks(2).train()
    trained = CrossLevelLearner(Blocks(1), teacher, [3, 4], n_features=4, total_steps=5)
    trained(*views()).backward()
    assert teacher.training
    assert not teacher.modes
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_third_view_is_for_the_old_student_alone():
    same, third = learner(), learner(old_view="third")
    x1, x2, x3 = views(k=3)
    for trained in (same, third):
        trained.after_step()
        with torch.no_grad():
            trained.old_student.one[0].weight.add_(1)
    assert same(x1, x2).item() == same(x1, x2, x3).item()
    torch.testing.assert_close(third(x1, x2, x1), same(x1, x2))  # m is still 0
    for trained in (same, third):
        trained.n_steps = 6
    torch.testing.assert_close(third(x1, x2, x1), same(x1, x2))
    assert abs(third(x1, x2, x3).item() - same(x1, x2).item()) > 1e-4


def test_a_state_dict_goes_on_where_it_was():
    one, other = learner(), learner()
    one(*views()).backward()
    one.after_step()
    one.after_step()
    other.load_state_dict(one.state_dict())
    assert other.momentum == one.momentum > 0
    torch.testing.assert_close(other(*views()), one(*views()))


# Denoising


@pytest.mark.parametrize(("top", "power"), [(3, 0.4), (1, 2.0), (7, 0.5), (12, 0.4)])
def test_denoising_is_sorting_and_cutting(top, power):
    x = torch.rand(5, 7, generator=generator(), dtype=torch.float64)
    expected = np.zeros((5, 7))
    for i, row in enumerate(x.numpy()):
        for j in np.argsort(-row)[:top]:
            expected[i, j] = row[j] ** power
    got = denoise_features(x, top=top, power=power)
    assert_allclose(got, expected)
    assert ((got != 0).sum(1) == min(top, 7)).all()
    order = torch.randperm(7, generator=generator())
    torch.testing.assert_close(denoise_features(x[:, order], top=top, power=power), got[:, order])


def test_all_features_to_the_power_one_are_themselves_and_signs_go_with_others():
    x = torch.randn(4, 6, generator=generator())
    assert torch.equal(denoise_features(x, top=6, power=1), x)
    assert torch.equal(denoise_features(x, top=6, power=0.5), x.clamp_min(0).sqrt())
    assert (denoise_features(-x.abs() - 1, top=2, power=1) < 0).sum() == 8


def test_the_gradient_is_finite_where_features_are_zero():
    x = torch.tensor([0.0, 0.0, 4.0, -1.0], dtype=torch.float64, requires_grad=True)
    denoise_features(x, top=3, power=0.5).sum().backward()
    assert x.grad.tolist() == [0, 0, 0.25, 0]


def test_denoiser_conforms_to_its_kind(as_a_user):
    check_estimator(FeatureDenoiser(top=2))


def test_a_pipeline_with_the_denoiser_pickles_and_uses_it():
    x, y = np.abs(np.random.default_rng(0).normal(size=(40, 6))), np.arange(40) % 2
    pipeline = make_pipeline(FeatureDenoiser(top=3), LogisticRegression()).fit(x, y)
    again = pickle.loads(pickle.dumps(pipeline))
    assert_allclose(again.predict_proba(x), pipeline.predict_proba(x))
    by_hand = LogisticRegression().fit(denoise_features(torch.tensor(x), top=3).numpy(), y)
    assert_allclose(by_hand.coef_, pipeline[-1].coef_)


# Episodes


@pytest.mark.parametrize(("d", "n_way", "n_shot"), [(40, 3, 2), (4, 3, 5), (40, 2, 3), (30, 5, 1)])
def test_episodes_are_logistic_regressions_one_at_a_time(d, n_way, n_shot):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(6), 15))
    x = np.maximum(0.6 * rng.normal(size=(6, d))[y] + rng.normal(size=(90, d)), 0)
    told = {"n_way": n_way, "n_shot": n_shot, "n_query": 8, "n_episodes": 12, "random_state": 3}
    ours = few_shot_accuracy(x, y, **told)
    theirs = few_shot_accuracy(x, y, classifier=LogisticRegression(C=1, max_iter=5000, tol=1e-9), **told)
    assert_allclose(ours.accuracies, theirs.accuracies, atol=1e-12)
    assert 1 / n_way < ours.mean < 1


def test_perfect_features_are_right_and_noise_is_chance():
    y = np.repeat(np.arange(8), 25)
    assert few_shot_accuracy(np.eye(8)[y], y, n_episodes=20, random_state=0).mean == 1
    noise = np.random.default_rng(0).normal(size=(200, 20))
    score = few_shot_accuracy(noise, y, n_shot=1, n_query=10, n_episodes=300, random_state=0)
    assert abs(score.mean - 0.2) < 3 * score.half_width
    assert score.half_width == pytest.approx(1.96 * score.accuracies.std(ddof=1) / np.sqrt(300))


def test_the_same_seed_draws_the_same_episodes_for_any_features():
    y = np.array(list("abcde") * 30)
    class_of = few_shot_accuracy(
        np.arange(150)[:, None],
        y,
        classifier=Recorder(max_iter=5000),
        n_shot=2,
        n_query=3,
        n_episodes=4,
        random_state=1,
    )
    first = [r.tolist() for r in Recorder.rows]
    Recorder.rows.clear()
    few_shot_accuracy(np.arange(150)[:, None] * 1.0, torch.tensor(np.arange(150) % 5), classifier=Recorder(max_iter=5000), n_shot=2,
                      n_query=3, n_episodes=4, random_state=1)  # fmt: skip
    assert first == [r.tolist() for r in Recorder.rows]
    assert len(first) == 4
    assert all(len(set(rows)) == 10 for rows in first)
    assert len(class_of.accuracies) == 4


class Recorder(LogisticRegression):
    rows: list = []  # noqa: RUF012  of all episodes

    def fit(self, x, y):
        Recorder.rows.append(x[:, 0].astype(int))
        return super().fit(x, y)


def test_classes_with_too_few_samples_are_never_drawn():
    y = np.r_[np.repeat([0, 1, 2], 20), [3] * 5]
    x = np.eye(4)[y]
    Recorder.rows.clear()
    few_shot_accuracy(
        np.arange(65.0)[:, None],
        y,
        classifier=Recorder(max_iter=5000),
        n_way=3,
        n_shot=2,
        n_query=4,
        n_episodes=9,
        random_state=0,
    )
    assert max(rows.max() for rows in Recorder.rows) < 60
    with pytest.raises(ValueError, match="3 of 4, got 4"):
        few_shot_accuracy(x, y, n_way=4, n_shot=2, n_query=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_features_of_any_dtype_are_taken_for_what_they_are(dtype):
    y = torch.arange(60) % 3
    x = torch.eye(3)[y].to(dtype)
    for labels in (y, y.to(dtype)):
        score = few_shot_accuracy(x, labels, n_way=3, n_shot=2, n_query=3, n_episodes=3, random_state=0)
        assert score.mean == 1


# What is refused

X = torch.zeros(4, 3)
Y = np.arange(60) % 3
BAD = [
    (lambda: CrossLevelDistillation([3]), "must be of as many blocks, at least 2"),
    (lambda: CrossLevelDistillation([3, 4], [3, 4, 5]), "must be of as many blocks"),
    (lambda: CrossLevelDistillation([3, 0]), "student_channels must be an integer of at least 1"),
    (lambda: CrossLevelDistillation("34"), "student_channels must be a sequence of integers"),
    (lambda: CrossLevelDistillation([3, 4, 5], stride=[2]), "stride must be one, or one for each of 2"),
    (lambda: CrossLevelDistillation([3, 4], stride=0), "stride must be an integer of at least 1"),
    (lambda: CrossLevelDistillation(CHANNELS).double()(maps()[:2], maps()), "student_maps must be a list of 3 maps, got 2"),
    (lambda: CrossLevelDistillation(CHANNELS).double()(maps(), maps()[:2]), "teacher_maps must be a list of 3 maps"),
    (lambda: CrossLevelDistillation(CHANNELS)(None, maps()), "student_maps must be a list of 3 maps, got NoneType"),
    (lambda: CrossLevelDistillation((3, 4, 6)).double()(maps(), maps()), r"student_maps\[2\] must have shape"),
    (lambda: CrossLevelDistillation(CHANNELS, stride=1).double()(maps(), maps()),
     r"level 0: the projected map is \(2, 4, 8, 8\), the teacher's next one \(2, 4, 4, 4\).*see stride"),
    (lambda: CrossLevelDistillation(CHANNELS).double()(maps(), maps(), momentum=0.5), "old_maps must be given"),
    (lambda: CrossLevelDistillation(CHANNELS).double()(maps(), maps(), maps(), momentum=1.5), r"momentum must be in \[0, 1\]"),
    (lambda: CrossLevelDistillation(CHANNELS).double()(maps(), maps(n=3)), "level 0: the projected map is"),
    (lambda: nt_xent(X, X[:2]), r"z2 must have shape \(4, 3\) for z1"),
    (lambda: nt_xent(X, X, temperature=0.0), "temperature must be greater than 0"),
    (lambda: nt_xent(X.long(), X), "z1 must be a floating-point tensor"),
    (lambda: nt_xent(X[:0], X[:0]), "z1 must hold vectors"),
    (lambda: learner()(*views(1)), "x1 must hold at least 2 images"),
    (lambda: learner()(views(4)[0], views(3)[0]), "x2 must be a view of the batch of x1"),
    (lambda: learner(old_view="third")(*views()), "x3 must be given"),
    (lambda: learner(old_view="fourth"), "old_view must be one of"),
    (lambda: learner(total_steps=0), "total_steps must be an integer of at least 1"),
    (lambda: learner(coef=2.0), r"coef must be in \[0, 1\]"),
    (lambda: learner(n_features=5)(*views()), r"features of student must have shape \(6, 5\)"),
    (lambda: CrossLevelLearner(nn.Flatten(), Blocks(), [3, 4], n_features=4, total_steps=3)(*views()),
     "student must return a list of maps and features, got Tensor"),
    (lambda: CrossLevelLearner(None, Blocks(), [3, 4], n_features=4, total_steps=3), "student must be an nn.Module"),
    (lambda: CrossLevelLearner(Blocks(), Blocks(), [3], n_features=4, total_steps=3), "channels must be of at least 2 blocks"),
    (lambda: denoise_features(X, top=0), "top must be an integer of at least 1"),
    (lambda: denoise_features(X, power=0.0), "power must be greater than 0"),
    (lambda: denoise_features(X / 0), "features must be numbers, got NaN"),
    (lambda: denoise_features(X[:, :0]), "features must have elements"),
    (lambda: FeatureDenoiser(top=0).fit(X.numpy()), "top must be an integer of at least 1"),
    (lambda: few_shot_accuracy(np.full((60, 2), np.nan), Y), "features must be finite"),
    (lambda: few_shot_accuracy(np.zeros((60, 2)), Y[:50]), "y must have a label for each of 60 rows"),
    (lambda: few_shot_accuracy(np.zeros(60), Y), "features must be numbers of shape"),
    (lambda: few_shot_accuracy(np.zeros((60, 2)), Y), "n_way must be at most .*, 3 of 3, got 5"),
    (lambda: few_shot_accuracy(np.zeros((60, 2)), Y, n_way=1), "n_way must be an integer of at least 2"),
    (lambda: few_shot_accuracy(np.zeros((60, 2)), Y, n_way=3, n_shot=0), "n_shot must be"),
    (lambda: few_shot_accuracy(np.zeros((60, 2)), Y, n_way=3, n_episodes=1), "n_episodes must be"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_claims_refuse_images_that_leave_nothing_for_episodes():
    images = load_images("digits")
    with pytest.raises(ValueError, match="n_unlabelled must be at most half of the"):
        next_level.check(data=images, n_unlabelled=500)
    two = type(images)(images.x[images.y < 8], images.y[images.y < 8], images.classes[:8])
    with pytest.raises(ValueError, match=r"5 of the target's classes .* 4 of 4 have"):
        next_level.check(data=two, n_unlabelled=64)
