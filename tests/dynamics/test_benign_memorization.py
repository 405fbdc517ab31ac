"""Random labels, banks of views and training on noisy labels: counts, distributions, a loop by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.dynamics import FiniteViews, knn_probe, layer_probe, memorize, randomize_labels


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def labels(n=3000, n_classes=5, seed=1):
    return torch.randint(n_classes, (n,), generator=rng(seed))


def jitter(x, generator=None):
    return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def mlp(d=4, width=64, classes=3, seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(d, width),
            *([nn.BatchNorm1d(width)] if norm else []),
            nn.ReLU(),
            nn.Linear(width, classes),
        )


def points(n=64, d=4, classes=3, seed=0):
    return torch.randn(n, d, generator=rng(seed)), torch.randint(classes, (n,), generator=rng(seed + 1))


# --- labels ---


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_uniform_labels_agree_with_the_truth_as_often_as_chance_has_it(fraction):
    y, k = labels(20_000), 5
    new = randomize_labels(y, n_classes=k, fraction=fraction, generator=rng())
    expected = 1 - fraction * (1 - 1 / k)
    assert float((new == y).double().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(y)))
    assert (fraction == 0) == torch.equal(new, y)
    if fraction == 1:  # any class, the old one among them, whatever the old one was
        for old in range(k):
            counts = new[y == old].bincount(minlength=k) / (y == old).sum()
            assert float((counts - 1 / k).abs().max()) < 0.03


@pytest.mark.parametrize("mode", ["uniform", "permute"])
def test_at_most_the_rounded_share_changes_and_who_it_is_is_drawn(mode):
    y = torch.arange(10)
    changed = torch.zeros(10)
    for seed in range(100):
        new = randomize_labels(y, n_classes=10, fraction=0.26, mode=mode, generator=rng(seed))
        assert int((new != y).sum()) <= 3
        changed += new != y
    assert (changed > 8).all()  # each of ten is one of three in 0.3 of the draws


def test_permuted_labels_keep_the_counts_and_are_a_uniform_permutation():
    y = labels()
    for fraction in (0.5, 1.0):
        new = randomize_labels(y, n_classes=5, fraction=fraction, mode="permute", generator=rng())
        assert torch.equal(new.bincount(), y.bincount()) and not torch.equal(new, y)
    draws = rng()
    seen = torch.stack([
        randomize_labels(torch.arange(3), n_classes=3, mode="permute", generator=draws) for _ in range(1200)
    ])  # fmt: skip
    counts = (seen @ torch.tensor([9, 3, 1])).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 6 and float((counts / 200 - 1).abs().max()) < 0.25


def test_unique_labels_are_the_samples_own():
    assert torch.equal(randomize_labels(labels(7), n_classes=5, mode="unique"), torch.arange(7))


@pytest.mark.parametrize(("mode", "n_classes"), [("uniform", 300), ("permute", 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_the_input_stays_and_a_generator_decides(as_a_user, mode, n_classes, dtype):
    y = labels(50).to(dtype)
    kept, state = y.clone(), torch.get_rng_state()
    one, same, other = (
        randomize_labels(y, n_classes=n_classes, mode=mode, generator=rng(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(y, kept) and torch.equal(torch.get_rng_state(), state)
    assert one.dtype == torch.int64 and torch.equal(one, same) and not torch.equal(one, other)
    assert mode == "permute" or int(one.max()) > 255  # which the narrower dtype does not hold


# --- views ---


def test_a_bank_has_exactly_so_many_different_views_of_each_sample_and_none_of_another():
    x = 10.0 * torch.arange(6.0)[:, None].expand(6, 2)
    views = FiniteViews(x, jitter, 3, generator=rng())
    assert views.bank.shape == (6, 3, 2)
    index = torch.arange(6).repeat(200)
    drawn = views(index, generator=rng(1))
    assert (drawn - x[index]).abs().max() < 1
    for i in range(6):
        kinds, counts = drawn[index == i].unique(dim=0, return_counts=True)
        assert len(kinds) == 3 and counts.min() > 40
        assert torch.equal(kinds, views.bank[i].unique(dim=0))


def test_one_view_is_one_transformed_training_set():
    x = torch.randn(5, 2, 3, generator=rng())
    views = FiniteViews(x, jitter, 1, generator=rng(1))
    torch.testing.assert_close(views.bank[:, 0], jitter(x, generator=rng(1)))
    index = torch.tensor([4, 0, 0])
    assert torch.equal(views(index), views.bank[index, 0]) and torch.equal(views(index), views(index))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8])
def test_a_bank_keeps_the_dtype_and_a_careless_augmentation_does_not_reach_the_samples(dtype):
    x = torch.ones(3, 2, dtype=dtype)
    views = FiniteViews(x, lambda batch, generator=None: batch.mul_(2).double(), 2)
    assert views.bank.dtype == dtype and (views.bank == 2).all() and (x == 1).all()


# --- training ---


@pytest.mark.parametrize("augment", [None, jitter])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_training_is_adam_on_batches_of_views_with_the_samples_labels(augment, schedule):
    x, y = points(13)
    net, twin = mlp(norm=True), mlp(norm=True)
    run = memorize(
        net, x, y, augment=augment, n_steps=7, batch_size=4, lr=1e-2, weight_decay=0.1, schedule=schedule,
        eval_every=3, generator=rng(),
    )  # fmt: skip
    draws, rows = rng(), []
    params = list(twin.parameters())
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    losses, found = [], []
    for t in range(1, 8):
        if not rows:  # the thirteenth sample would be alone in its batch
            rows = [part for part in torch.randperm(13, generator=draws).split(4) if len(part) > 1]
        batch, rows = rows[0], rows[1:]
        views = x[batch] if augment is None else augment(x[batch], generator=draws)
        loss = F.cross_entropy(twin(views), y[batch])
        losses.append(loss.item())
        rate = 1e-2 * (0.5 * (1 + math.cos(math.pi * (t - 1) / 7)) if schedule == "cosine" else 1)
        with torch.no_grad():
            for p, g, m, v in zip(params, torch.autograd.grad(loss, params), first, second, strict=True):
                g = g + 0.1 * p
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        if t in (3, 6, 7):
            twin.eval()
            clean = float((twin(x).argmax(1) == y).double().mean())
            seen = (
                clean
                if augment is None
                else float((twin(augment(x, generator=draws)).argmax(1) == y).double().mean())
            )
            found.append((sum(losses) / len(losses), clean, seen))
            losses = []
            twin.train()
    for p, q in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert run.steps.tolist() == [3, 6, 7]
    curves = torch.stack([run.loss, run.clean_view_accuracy, run.augmented_accuracy], 1)
    torch.testing.assert_close(curves, torch.tensor(found, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in net.parameters())


def test_an_over_parameterised_network_memorises_random_points_and_stops_when_told():
    x, y = points(64)
    net = mlp(width=256)
    run = memorize(
        net, x, y, augment=None, n_steps=2000, lr=5e-3, eval_every=50, stop_at=1.0, generator=rng()
    )
    assert run.memorized and run.clean_view_accuracy[-1] == 1 and run.steps[-1] < 2000
    assert (run.clean_view_accuracy[:-1] < 1).all()
    assert torch.equal(net(x).argmax(1), y)
    short = memorize(mlp(), x, y, augment=None, n_steps=2, generator=rng())
    assert not short.memorized and short.steps.tolist() == [2]
    assert memorize(mlp(), x, y, augment=None, n_steps=2, stop_at=0.01, generator=rng()).memorized


def test_with_true_labels_features_are_as_good_as_the_inputs():
    y = torch.arange(60) % 3
    x = 4 * torch.eye(3)[y] + torch.randn(60, 3, generator=rng())
    net = mlp(d=3)
    memorize(net, x[:30], y[:30], augment=jitter, n_steps=200, generator=rng())
    probe = layer_probe(net, ["1"], x[:30], y[:30], x[30:], y[30:], k=5)["1"]
    assert probe >= float(knn_probe(x[:30], y[:30], x[30:], y[30:], k=5)) > 0.8


def test_a_bank_of_views_is_what_the_network_is_trained_on():
    """Labels are the parity of the view's first entry in the bank, which the samples themselves do not show."""
    x, y = torch.zeros(32, 4), torch.arange(32) % 2
    views = FiniteViews(x, lambda batch, generator=None: batch + (2 * y - 1)[:, None], 2)
    run = memorize(mlp(classes=2), x, y, augment=views, n_steps=30, lr=1e-2, generator=rng())
    assert run.augmented_accuracy[-1] == 1 and run.clean_view_accuracy[-1] == 0.5


def test_modes_are_restored_and_nothing_global_is_drawn_under_any_grad_mode():
    x, y = points(12)
    results = []
    for setting in (
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ):
        net = mlp(norm=True).train()
        net[1].eval()
        state = torch.get_rng_state()
        with setting():
            run = memorize(net, x.clone(), y, augment=jitter, n_steps=5, generator=rng())
        assert torch.equal(torch.get_rng_state(), state)
        assert net.training and not net[1].training and net[1].num_batches_tracked == 5
        results.append((run.loss, net[0].weight.detach().clone()))
    for loss, weight in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(weight, results[0][1])


def test_frozen_parameters_stay_and_float64_is_kept():
    x, y = points(12)
    net = mlp().double()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    run = memorize(net, x.double(), y, augment=None, n_steps=3, generator=rng())
    assert torch.equal(net[0].weight, before) and net[2].weight.dtype == torch.float64
    assert not run.loss.requires_grad


def test_a_run_draws_itself():
    from matplotlib import pyplot

    run = memorize(mlp(), *points(8), augment=None, n_steps=2)
    ax = pyplot.subplots()[1]
    assert run.plot(ax) is ax and ax.has_data() and run.plot() is not ax
    pyplot.close("all")


# --- bad input ---


X, Y = points(6)


def bad(x=X, y=Y, net=None, augment=None, **options):
    return memorize(net or mlp(), x, y, augment=augment, n_steps=options.pop("n_steps", 2), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: randomize_labels(Y.float(), n_classes=3), "y must hold class indices, got torch.float32"),
        (lambda: randomize_labels(Y, n_classes=2), "y must be in 0..1, got values from 0 to 2"),
        (lambda: randomize_labels(Y - 1, n_classes=3), "y must be in 0..2, got values from -1"),
        (lambda: randomize_labels(Y, n_classes=0), "n_classes must be an integer of at least 1"),
        (lambda: randomize_labels(Y, n_classes=3, fraction=1.5), r"fraction must be in \[0, 1\], got 1.5"),
        (lambda: randomize_labels(Y, n_classes=3, mode="flip"), "mode must be one of 'uniform', 'permute', 'unique'"),
        (lambda: randomize_labels(Y, n_classes=3, fraction=0.5, mode="unique"), "fraction must be 1 for mode 'unique'"),
        (lambda: randomize_labels(Y[0], n_classes=3), "y must be a tensor of samples"),
        (lambda: FiniteViews(X, jitter, 0), "n_views must be an integer of at least 1, got 0"),
        (lambda: FiniteViews(X, jitter, 2**26), r"n_views must be less: 67108864 views of 6 samples take 6.0 GiB"),
        (lambda: FiniteViews(X, lambda b, generator: b[:, 1:], 1), r"augment must return .* \(6, 4\), got \(6, 3\)"),
        (lambda: FiniteViews(X, lambda b, generator: b[1:], 1), r"augment must return .* \(6, 4\), got \(5, 4\)"),
        (lambda: FiniteViews(X, None, 1), "augment must be a function of a batch, got NoneType"),
        (lambda: FiniteViews(X, jitter, 1)(torch.tensor([6])), "index must be in 0..5, got values from 6"),
        (lambda: FiniteViews(X, jitter, 1)(torch.tensor([-1])), "index must be in 0..5, got values from -1"),
        (lambda: FiniteViews(X, jitter, 1)(X[:, 0]), "index must hold class indices"),
        (lambda: bad(augment=lambda b, generator: b[:, 1:]), r"augment must return the shape that it is given"),
        (lambda: bad(augment=3), "augment must be a function of a batch, got int"),
        (lambda: bad(augment=FiniteViews(X[:5], jitter, 1)), r"augment must have views of x, of shape \(6, 4\)"),
        (lambda: bad(stop_at=0.0), r"stop_at must be in \(0, 1\], got 0"),
        (lambda: bad(stop_at=1.5), r"stop_at must be in \(0, 1\]"),
        (lambda: bad(X[:1], Y[:1]), "x must have at least 2 samples, got 1"),
        (lambda: bad(y=Y[:5]), r"y_noisy must have shape \(6\)"),
        (lambda: bad(y=Y.float()), "y_noisy must hold class indices"),
        (lambda: bad(y=Y - 1), "y_noisy must be at least 0, got -1"),
        (lambda: bad(X / 0), "x must be finite"),
        (lambda: bad(net=mlp(classes=2)), r"an output for each label of y_noisy, 0..2, got 2 outputs"),
        (lambda: bad(net=nn.Flatten(0)), "model must have trainable parameters in float32 or float64, got none"),
        (lambda: bad(net=mlp().bfloat16()), "model must have .* float32 or float64, got bfloat16"),
        (lambda: bad(net=nn.Sequential(mlp(), nn.Flatten(0))), "model must return a row of scores for each sample"),
        (lambda: bad(n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: bad(batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: bad(eval_every=0), "eval_every must be an integer of at least 1"),
        (lambda: bad(lr=0.0), "lr must be greater than 0"),
        (lambda: bad(lr=1e30, n_steps=9), "lr must be less, or x: the loss is not finite"),
        (lambda: bad(weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: bad(schedule="linear"), "schedule must be one of 'cosine', 'constant'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
