import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from posterity.representation import (
    ContrastiveRegularizer,
    fine_tune,
    linear_contrastive_representation,
    measure_tradeoff,
)
from posterity.testing import check_loss


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


# The regulariser.


def nt_xent(z1, z2, t):
    """The contrastive loss by loops."""
    z, n = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    total = 0.0
    for i in range(2 * n):
        others = torch.stack([z[i] @ z[j] / t for j in range(2 * n) if j != i])
        total = total + others.logsumexp(0) - z[i] @ z[(i + n) % (2 * n)] / t
    return total / (2 * n)


def test_the_loss_is_the_criterion_plus_a_weight_times_nt_xent():
    logits, y, z1, z2 = randn(5, 3), torch.tensor([0, 2, 1, 1, 0]), randn(5, 4, seed=1), randn(5, 4, seed=2)
    plain, contrast = F.cross_entropy(logits, y), nt_xent(z1, z2, 0.5)
    for weight in (0.1, 2.0):
        found = ContrastiveRegularizer(weight)(logits, y, z1, z2)
        torch.testing.assert_close(found, plain + weight * contrast, rtol=1e-12, atol=0)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    masked = (z @ z.T / 0.5).masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    other = torch.cat([torch.arange(5, 10), torch.arange(5)])
    torch.testing.assert_close(F.cross_entropy(masked, other), contrast, rtol=1e-12, atol=0)
    assert torch.equal(ContrastiveRegularizer(0)(logits, y, z1, z2), plain)
    assert torch.equal(ContrastiveRegularizer(0)(logits, y, torch.full_like(z1, torch.nan), z2), plain)


def test_views_may_be_of_a_length_whose_square_overflows():
    logits, y = randn(5, 3).float(), torch.tensor([0, 2, 1, 1, 0])
    z1, z2 = (randn(5, 4, seed=k).float() for k in (1, 2))
    loss = ContrastiveRegularizer(1.0)
    torch.testing.assert_close(loss(logits, y, 1e25 * z1, 1e25 * z2), loss(logits, y, z1, z2))


def test_the_gradient_of_logits_is_the_criterions_and_both_parts_may_be_the_users():
    logits, y = randn(5, 3).requires_grad_(), torch.tensor([0, 2, 1, 1, 0])
    z1, z2 = (randn(5, 4, seed=k).requires_grad_() for k in (1, 2))
    grads = [
        torch.autograd.grad(ContrastiveRegularizer(w)(logits, y, scale * z1, z2), logits)[0]
        for w, scale in ((0, 1), (1, 1), (1, 3))
    ]
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
    loss = ContrastiveRegularizer(2.0, contrastive=lambda a, b: (a - b).square().sum(), criterion=F.mse_loss)
    target = randn(5, 3, seed=9)
    expected = F.mse_loss(logits, target) + 2 * (z1 - z2).square().sum()
    torch.testing.assert_close(loss(logits, target, z1, z2), expected)


def test_it_is_a_loss(as_a_user):
    logits, z1, z2 = (randn(5, 3, seed=k).requires_grad_() for k in range(3))
    check_loss(ContrastiveRegularizer(), logits, torch.arange(5) % 3, z1, z2, batch_of_one=False, symmetric=True, compiles=False)  # fmt: skip


# The linear representation.


def spectral_loss(w, x1, x2):
    """The definition, over all pairs of the pooled views."""
    a, b, pooled = x1 @ w.T, x2 @ w.T, torch.cat([x1, x2]) @ w.T
    return -2 * (a * b).sum(1).mean() + (pooled @ pooled.T).square().mean()


def pairs(n=60, p=5, seed=0):
    x = randn(n, p, seed=seed) @ torch.diag(torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5][:p], dtype=torch.float64))
    x1, x2 = (x + 0.7 * randn(n, p, seed=seed + k) for k in (50, 60))
    middle = torch.cat([x1, x2]).mean(0)
    return x1 - middle, x2 - middle


def test_the_solution_has_the_loss_that_it_says_and_nothing_is_below():
    x1, x2 = pairs()
    found = linear_contrastive_representation(x1, x2, 3)
    torch.testing.assert_close(spectral_loss(found.weight, x1, x2), found.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.loss, -found.invariance.square().sum())
    for seed in range(200):
        assert spectral_loss(found.weight + 0.3 * randn(3, 5, seed=seed), x1, x2) >= found.loss - 1e-10
    for seed in range(10):
        w = (0.3 * randn(3, 5, seed=seed)).requires_grad_()
        opt = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure(w=w, opt=opt):
            opt.zero_grad()
            value = spectral_loss(w, x1, x2)
            value.backward()
            return value

        opt.step(closure)
        assert float(spectral_loss(w.detach(), x1, x2)) >= float(found.loss) - 1e-8


def test_swapped_views_and_changed_coordinates_give_the_same_representation():
    x1, x2 = pairs()
    found, swapped = (linear_contrastive_representation(a, b, 3) for a, b in ((x1, x2), (x2, x1)))
    torch.testing.assert_close(swapped.weight.T @ swapped.weight, found.weight.T @ found.weight)
    b = randn(5, 5, seed=3)
    moved = linear_contrastive_representation(x1 @ b.T, x2 @ b.T, 3)
    a, c = x1 @ found.weight.T, x1 @ b.T @ moved.weight.T
    torch.testing.assert_close(a @ a.T, c @ c.T)
    torch.testing.assert_close(moved.invariance, found.invariance)


def test_invariance_is_signal_over_signal_and_noise_in_the_mix():
    n, sigma, share = 40000, 0.6, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    active = torch.rand(n, 3, dtype=torch.float64, generator=rng()) < share
    z = randn(n, 3, seed=1) * active
    x1, x2 = (z + sigma * randn(n, 3, seed=k) for k in (2, 3))
    found = linear_contrastive_representation(x1, x2, 3).invariance
    torch.testing.assert_close(found, share / (share + sigma**2), rtol=0.03, atol=0)
    clean = linear_contrastive_representation(z, z, 3).invariance
    torch.testing.assert_close(clean, torch.ones(3, dtype=torch.float64))


def test_features_that_views_turn_around_get_no_place():
    x1, _ = pairs()
    x1 = x1 - x1.mean(0)
    x2 = x1 * torch.tensor([1.0, -1, 1, 1, 1], dtype=torch.float64)
    found = linear_contrastive_representation(x1, x2, 5)
    assert found.invariance.min() == 0 and found.weight.isfinite().all()
    assert (found.invariance.diff() <= 1e-12).all()


def test_a_ridge_serves_singular_views_and_means_are_warned_of(as_a_user):
    x = randn(30, 3) @ randn(3, 5, seed=1)
    with pytest.raises(ValueError, match="singular matrix of second moments: set ridge"):
        linear_contrastive_representation(x - x.mean(0), x - x.mean(0), 2)
    assert (
        linear_contrastive_representation(x - x.mean(0), x - x.mean(0), 2, ridge=1e-3).weight.isfinite().all()
    )
    x1, x2 = pairs()
    c = torch.cat([x1, x2]).T @ torch.cat([x1, x2]) / (2 * len(x1))
    c += 0.2 * c.diagonal().mean() * torch.eye(5, dtype=c.dtype)
    d = (x1.T @ x2 + x2.T @ x1) / (2 * len(x1))
    found = linear_contrastive_representation(x1, x2, 3, ridge=0.2)
    expected = torch.linalg.eigvals(torch.linalg.solve(c, d)).real.sort(descending=True).values[:3]
    torch.testing.assert_close(found.invariance, expected)
    torch.testing.assert_close(found.weight @ c @ found.weight.T, expected.diag())
    with pytest.warns(UserWarning, match="should be centred"):
        linear_contrastive_representation(x1 + 1, x2 + 1, 2)


# Fine-tuning.


def noise(x, generator):
    return x + 0.2 * torch.randn(x.shape, generator=generator)


def task(n=40, seed=0):
    y = torch.arange(n) % 2
    x = randn(n, 6, seed=seed, dtype=torch.float32)
    x[:, 0] += 2.0 * (2 * y - 1)
    return x, y


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())


@pytest.mark.parametrize("mode", ["linear", "fine-tune", "contrastive"])
def test_fine_tuning_learns_a_copy_and_leaves_the_rest(mode):
    net, (x, y) = encoder().eval(), task()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    found = fine_tune(net, x, y, augment=noise, n_classes=2, mode=mode, epochs=30, batch_size=16)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not net.training
    assert found.losses.shape == (90,) and found.losses[-9:].mean() < found.losses[:9].mean()
    assert float((found.predict(x) == y).float().mean()) > 0.9
    same = all(torch.equal(before[name], value) for name, value in found.encoder.state_dict().items())
    assert same == (mode == "linear")
    again = fine_tune(net, x, y, augment=noise, n_classes=2, mode=mode, epochs=30, batch_size=16)
    assert np.array_equal(again.losses, found.losses)


@pytest.mark.parametrize("mode", ["linear", "fine-tune", "contrastive"])
def test_an_encoder_in_double_precision_is_fine_tuned_in_it(mode):
    net, (x, y) = encoder(), task()
    options = {"augment": lambda x, generator: x, "n_classes": 2, "mode": mode, "epochs": 3, "batch_size": 16}
    found = fine_tune(copy.deepcopy(net).double(), x.double(), y, **options)
    assert found.classifier.weight.dtype == torch.float64
    np.testing.assert_allclose(found.losses, fine_tune(net, x, y, **options).losses, rtol=1e-4)


def test_a_step_is_sgd_on_the_regularised_loss_of_the_first_view():
    """One full batch: the loss by hand from the same views, and steps of both rates."""
    net, (x, y) = nn.Linear(6, 4), task(8)
    seen = []

    def views(x, generator):
        seen.append(noise(x, generator))
        return seen[-1]

    class Doubled(nn.Module):
        def forward(self, z):
            return 2 * z

    found = fine_tune(net, x, y, augment=views, n_classes=2, projector=Doubled(), weight=0.7, temperature=0.3,
                      epochs=2, batch_size=8, lr=0.1, weight_decay=0.05)  # fmt: skip
    assert len(seen) == 4
    w = net.weight.detach().clone().requires_grad_(), net.bias.detach().clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Linear(4, 2)
    order = rng()
    speed = [torch.zeros_like(p) for p in (*w, *classifier.parameters())]
    for step in range(2):
        rows = torch.randperm(8, generator=order)
        for _ in range(2):
            torch.randn(x.shape, generator=order)
        first, second = (F.linear(seen[2 * step + k], *w) for k in (0, 1))
        value = F.cross_entropy(classifier(first), y[rows]) + 0.7 * nt_xent(2 * first, 2 * second, 0.3)
        assert float(value.detach()) == pytest.approx(found.losses[step], rel=1e-5)
        params = [*w, *classifier.parameters()]
        grads = torch.autograd.grad(value, params)
        rates = [0.1 * (1 + np.cos(np.pi * step / 2)) / 2] * 2 + [0.1] * 2
        with torch.no_grad():
            for p, g, v, rate in zip(params, grads, speed, rates, strict=True):
                v.mul_(0.9).add_(g + 0.05 * p)
                p.sub_(rate * v)
    torch.testing.assert_close(found.encoder.weight.detach(), w[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.classifier.weight, classifier.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "passes"), [("linear", 0), ("fine-tune", 1), ("contrastive", 2)])
def test_each_view_is_a_pass_in_train_mode_and_a_lone_sample_is_left_out(mode, passes):
    found = fine_tune(encoder(), *task(9), augment=noise, n_classes=2, mode=mode, epochs=3, batch_size=4)
    assert found.losses.shape == (6,)
    assert int(found.encoder[1].num_batches_tracked) == 6 * passes
    assert not found.encoder.training and not found.classifier.training


def test_a_loss_that_stops_being_finite_is_said():
    with pytest.raises(ValueError, match="steps: lower lr, got 1e"):
        fine_tune(nn.Linear(6, 4), *task(8), augment=noise, n_classes=2, lr=1e30, epochs=20)


# The measure.


def probes(seed=0, n=160, signal=3.0):
    gen = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = gen.normal(size=(n, 4))
    x[:, seed % 4] += signal * (2 * y - 1)
    return x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :]


def test_probes_are_means_over_draws_and_the_largest_budget_is_universality():
    tasks = [probes(k) for k in range(3)]
    found = measure_tradeoff(lambda x: x, tasks[0], tasks[1:], n_labels=(2, 10), n_repeats=4, random_state=0)
    assert (
        found.per_task.shape == (2, 2) and found.label_efficiency.shape == (2,) and found.n_labels == (2, 10)
    )
    assert found.universality == pytest.approx(found.per_task[:, 1].mean())
    assert found.label_efficiency[1] > 0.95 and found.label_efficiency[0] < found.label_efficiency[1]
    again = measure_tradeoff(lambda x: torch.from_numpy(x), tasks[0], tasks[1:], n_labels=(2, 10), n_repeats=4, random_state=0)  # fmt: skip
    assert np.array_equal(again.per_task, found.per_task)
    other = measure_tradeoff(lambda x: x, tasks[0], tasks[1:], n_labels=(2, 10), n_repeats=4, random_state=1)
    assert not np.array_equal(other.per_task, found.per_task)


def test_with_all_labels_a_probe_is_logistic_regression_on_standardised_features():
    tasks = [probes(k, signal=0.7) for k in range(3)]
    found = measure_tradeoff(lambda x: x, tasks[0], tasks[1:], n_labels=(40,), n_repeats=1)
    expected = []
    for x, y, x_test, y_test in tasks:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
        expected.append(model.score(x_test, y_test))
    assert max(expected) < 0.95
    assert found.label_efficiency.tolist() == pytest.approx(expected[:1])
    assert found.per_task[:, 0].tolist() == pytest.approx(expected[1:])


def test_scales_of_features_do_not_matter_and_a_constant_is_worth_a_guess():
    tasks = [probes(k, signal=1.0) for k in range(2)]
    options = {"n_labels": (5,), "n_repeats": 3, "random_state": 1}
    plain = measure_tradeoff(lambda x: x, tasks[0], tasks[1:], **options)
    scaled = measure_tradeoff(
        lambda x: 7 * x * np.array([1, 1e6, 1e-6, 3]) + 5, tasks[0], tasks[1:], **options
    )
    np.testing.assert_allclose(scaled.per_task, plain.per_task, rtol=1e-12)
    widened = measure_tradeoff(
        lambda x: np.concatenate([x, np.full((len(x), 1), 0.1)], 1), tasks[0], tasks[1:], **options
    )
    np.testing.assert_allclose(widened.per_task, plain.per_task, rtol=1e-12)
    turned = measure_tradeoff(lambda x: 3 * x @ -np.eye(4)[[2, 0, 3, 1]], tasks[0], tasks[1:], **options)
    np.testing.assert_allclose(turned.per_task, plain.per_task, rtol=1e-12)
    nothing = measure_tradeoff(lambda x: np.full((len(x), 3), 0.1), tasks[0], tasks[1:], **options)
    assert nothing.universality == pytest.approx(0.5)


X, Y = torch.randn(6, 3), torch.arange(6) % 2
TASK = probes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["linear", "fine-tune", "contrastive"])
def test_half_precision_learns_as_float32_does(dtype, mode):
    x, y = randn(40, 3).float().to(dtype), torch.arange(40) % 2
    x[:, 0] += 2 * y.to(dtype)
    torch.manual_seed(0)
    net = nn.Linear(3, 4).to(dtype)
    options = {"augment": lambda x, generator: x, "n_classes": 2, "epochs": 20, "mode": mode}
    ours, plain = (
        fine_tune(net, x, y, **options),
        fine_tune(copy.deepcopy(net).float(), x.float(), y, **options),
    )
    np.testing.assert_array_equal(ours.losses, plain.losses)
    assert {p.dtype for m in (ours.encoder, ours.classifier) for p in m.parameters()} == {dtype}
    assert (ours.predict(x) == plain.predict(x.float())).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ContrastiveRegularizer(-0.1), "weight"),
        (lambda: ContrastiveRegularizer(temperature=0), "temperature"),
        (lambda: ContrastiveRegularizer()(X, Y, torch.randn(5, 2), torch.randn(6, 2)), "z1 must have as many rows"),
        (lambda: ContrastiveRegularizer()(X, Y, torch.randn(6, 2), torch.randn(5, 2)), "z2 must have as many rows"),
        (lambda: ContrastiveRegularizer()(X, Y + 2, X, X), "target must be in 0..2"),
        (lambda: ContrastiveRegularizer(criterion=torch.add)(X, X, X, X), "criterion must return a scalar"),
        (lambda: ContrastiveRegularizer(contrastive=torch.add)(X, Y, X, X), "contrastive must return a scalar"),
        (lambda: ContrastiveRegularizer()(X, Y.float(), X, X), "target must hold class indices"),
        (lambda: linear_contrastive_representation(X, X[:5], 2), "x2 must have shape"),
        (lambda: linear_contrastive_representation(X, X, 4), "dim must be at most the 3"),
        (lambda: linear_contrastive_representation(X, X / 0, 2), "x2 must be finite"),
        (lambda: linear_contrastive_representation(X, X, 2, ridge=-1.0), "ridge"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y, augment=noise, n_classes=2, mode="full"), "mode must be one of"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y, augment=noise, n_classes=1), "n_classes"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y + 1, augment=noise, n_classes=2), "y must be in 0..1"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y, augment=noise, n_classes=2, lr=0), "lr"),
        (lambda: fine_tune(nn.Linear(3, 2), X[:1], Y[:1], augment=noise, n_classes=2), "x must be a tensor of at least two"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y, augment=noise, n_classes=2, epochs=0), "epochs"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y, augment=noise, n_classes=2, batch_size=1), "batch_size"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y, augment=noise, n_classes=2, weight=-1), "weight"),
        (lambda: fine_tune(nn.Linear(3, 2), X, Y[:5], augment=noise, n_classes=2), "y must have shape"),
        (lambda: linear_contrastive_representation(X[:1], X[:1], 1), "x1 must have at least 2 rows"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [TASK], n_labels=(10, 5)), "n_labels must be ascending"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [TASK], n_labels=(5,), n_repeats=0), "n_repeats"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [(TASK[0], 0 * TASK[1], *TASK[2:])], n_labels=(5,)), "two classes in training"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [(TASK[0], TASK[1][:9], *TASK[2:])], n_labels=(5,)), "a label a sample"),
        (lambda: measure_tradeoff(lambda x: x, TASK, []), "tasks must have at least one"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [TASK], n_labels=(5, 41)), "n_labels must be at most the 40 samples"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [TASK], n_labels=()), "n_labels must be ascending"),
        (lambda: measure_tradeoff(lambda x: x, TASK, [(*TASK[:3], TASK[3] + 1)], n_labels=(5,)), "it lacks 2"),
        (lambda: measure_tradeoff(lambda x: x[:3], TASK, [TASK], n_labels=(5,)), "represent must return features"),
        (lambda: measure_tradeoff(lambda x: x * np.nan, TASK, [TASK], n_labels=(5,)), "represent must return finite"),
        (lambda: measure_tradeoff(lambda x: x, TASK[:3], [TASK]), "target must be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
