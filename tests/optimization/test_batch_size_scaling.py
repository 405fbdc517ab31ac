"""The noise of batch Hessians against dense Hessians and simulated matrices; rules against descent itself."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from posterity.optimization import (
    HessianVariance,
    batch_extremes,
    effective_batch,
    extreme_eigenvalues,
    hessian_variance,
    max_learning_rate,
    scale_learning_rate,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    g = generator(1)
    return model, torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


@functools.cache
def of_samples():
    """Return the Hessian of each sample of the problem, (n, P, P), flat in the order of the parameters."""
    model, x, y = problem()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def of(theta, k):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        free = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, free, (x[k : k + 1],)), y[k : k + 1])

    return torch.stack([hessian(of)(theta, k) for k in range(len(x))])


def test_variances_are_those_of_the_samples_dense_hessians():
    model, x, y = problem()
    each = of_samples()
    noise, (values, vectors) = each - each.mean(0), torch.linalg.eigh(each.mean(0))
    found = hessian_variance(model, loss, (x, y), n_probes=400, generator=generator())
    for ours, where in ((found.top, -1), (found.bottom, 0)):
        moved = noise @ vectors[:, where]
        exact = (moved.square().sum(1) - (moved @ vectors[:, where]).square()).sum() / 11
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.stack([found.bottom_value, found.top_value]), values[[0, -1]])
    squares = torch.einsum("npq,nqr->npr", noise, noise).sum(0) / 11
    exact = squares.trace() / 31
    error = (2 * squares.square().sum()).sqrt() / 31 / math.sqrt(400)  # of v' S v with v normal
    assert abs(found.isotropic - exact) < 4 * error
    assert error < 0.15 * exact


def test_the_variance_over_b_is_that_of_batches_drawn_without_replacement():
    """Over all 66 batches of 2 of 12: what the divisor n - 1 and b = B / (1 - B/N) are for."""
    model, x, y = problem()
    each = of_samples()
    whole = each.mean(0)
    v = torch.linalg.eigh(whole)[1][:, -1]
    found = hessian_variance(model, loss, (x, y), n_probes=1)
    total = []
    for rows in itertools.combinations(range(12), 2):
        moved = (each[list(rows)].mean(0) - whole) @ v
        total.append(moved.square().sum() - (moved @ v).square())
    torch.testing.assert_close(
        torch.stack(total).mean(), found.top / effective_batch(2, 12), rtol=1e-5, atol=0
    )


def test_chunks_and_loops_give_what_one_vmap_gives(monkeypatch):
    model, x, y = problem()
    whole = hessian_variance(model, loss, (x, y), generator=generator())
    monkeypatch.setattr("posterity.optimization.batch_size_scaling._AT_ONCE", 5 * 10 * 31)
    torch.testing.assert_close(hessian_variance(model, loss, (x, y), generator=generator()), whole)

    def of_one(model, x, y):  # reads a value, which vmap refuses
        return loss(model, x, y) if float(x.detach().sum()) < math.inf else x.sum()

    torch.testing.assert_close(hessian_variance(model, of_one, (x, y), generator=generator()), whole)


def test_a_loss_of_one_number_counts_with_dimensions_and_without():
    model, x, y = problem()
    found = [
        hessian_variance(model, lambda *args, s=shape: loss(*args).reshape(s), (x, y), generator=generator())
        for shape in ((), (1,))
    ]
    assert found[0] == found[1]


def test_running_out_of_memory_is_said_and_no_reason_for_the_slow_loop():
    model, x, y = problem()

    def too_large(model, x, y):
        try:
            float(x.detach().sum())  # which vmap refuses
        except RuntimeError as error:
            raise torch.OutOfMemoryError("out of memory") from error
        return loss(model, x, y)

    with pytest.raises(torch.OutOfMemoryError):
        hessian_variance(model, too_large, (x, y), generator=generator())


def test_of_many_samples_some_are_drawn_and_they_stand_for_all():
    model, x, y = problem(60)
    few = hessian_variance(model, loss, (x, y), max_samples=20, generator=generator(4))
    rows = torch.randperm(60, generator=generator(4))[:20]
    exact = hessian_variance(model, loss, (x[rows], y[rows]), generator=generator(5))
    torch.testing.assert_close(few.top, exact.top)
    torch.testing.assert_close(few.top_value, exact.top_value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_network_is_measured_in_float32(dtype):
    model, x, y = problem()
    narrow = model.to(dtype)
    with torch.autocast("cpu", dtype), torch.inference_mode():
        found = hessian_variance(narrow, loss, (x.to(dtype), y), generator=generator())
    exact = hessian_variance(model.double(), loss, (x.to(dtype).double(), y), generator=generator())
    assert found.top.dtype == torch.float32
    torch.testing.assert_close(found.top_value, exact.top_value.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.top, exact.top.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("spikes", "expected"), [((8.0, -6.0), (8.5, -6 - 2 / 3)), ((1.0, 0.0), (4.0, -4.0))]
)
def test_spikes_move_in_a_simulated_random_matrix_as_the_formula_says(spikes, expected):
    n, variance = 1000, 4.0
    a = torch.randn(n, n, generator=generator(1)) * math.sqrt(variance / n / 2)
    a = a + a.T  # entries of variance 4 / n
    a[0, 0] += spikes[0]
    a[1, 1] += spikes[1]
    low, high, _, _ = extreme_eigenvalues(lambda v: a @ v, n, n_iter=80, generator=generator())
    top, bottom = batch_extremes(torch.tensor([spikes[0], -abs(spikes[1]) or -1e-9]), variance, 1.0)
    torch.testing.assert_close(torch.stack([top, bottom]), torch.tensor(expected), rtol=0, atol=1e-3)
    assert abs(high - top) < (0.15 if spikes[0] > 2 else 0.2)
    assert abs(low - bottom) < (0.15 if spikes[0] > 2 else 0.2)


def test_directional_and_isotropic_variance_are_one_for_isotropic_noise():
    """A model with a matrix for each sample as its Hessian: noise alike in all directions."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(60))

        def forward(self, matrices):
            return torch.einsum("p,npq,q->n", self.w, matrices, self.w).mean() / 2

    noise = torch.randn(120, 60, 60, generator=generator()) * math.sqrt(3.0 / 60 / 2)
    matrices = noise + noise.mT + torch.diag(torch.tensor([9.0, *[0.0] * 58, -9.0]))
    found = hessian_variance(
        Quadratic(), lambda model, x: model(x), (matrices,), n_probes=100, generator=generator()
    )
    for variance in (found.isotropic, found.top, found.bottom):
        assert abs(variance - 3.0) < 0.2


def test_a_prediction_meets_its_limits():
    value = torch.tensor([5.0, -5.0, 0.0, 1e-30], dtype=torch.float64, requires_grad=True)
    assert torch.equal(batch_extremes(value, 4.0, effective_batch(9, 9)), value)  # the whole set
    assert torch.equal(batch_extremes(value, 0.0, 3.0), value)
    edge = torch.tensor([2.0, 2.0 + 1e-9], dtype=torch.float64)
    torch.testing.assert_close(*batch_extremes(edge, 4.0, 1.0).split(1), rtol=0, atol=1e-8)
    assert batch_extremes(0.0, 4.0, 1.0) == 4  # the sign of 0 is +
    assert batch_extremes(-1.0, 4.0, 1.0) == -4
    (slope,) = torch.autograd.grad(batch_extremes(value, 4.0, 1.0).sum(), value)
    torch.testing.assert_close(slope, torch.tensor([1 - 4 / 25, 1 - 4 / 25, 0, 0]).double())
    assert batch_extremes(torch.ones(3, 1), torch.ones(4), 2.0).shape == (3, 4)
    assert math.isfinite(batch_extremes(torch.tensor(1e20), torch.tensor(1e38), 0.5))
    assert batch_extremes(torch.tensor(3, dtype=torch.bfloat16), 4.0, 1.0).dtype == torch.float32


def test_rates_go_as_the_batch_then_stay_and_adams_as_its_root():
    found = HessianVariance(*map(torch.tensor, (400.0, 90_000.0, 1.0, 1.0, -0.1)))
    small = [float(max_learning_rate(found, size, momentum=0.5)) for size in (100_000, 200_000)]
    outer = [
        float(max_learning_rate(found._replace(top=torch.tensor(9.0)), size)) for size in (9_000, 18_000)
    ]
    assert 1.25 < small[1] / small[0] < 1.4  # b = B: (1 + .9) / (1 + .45)
    assert abs(outer[1] / outer[0] - 1) < 1e-3
    assert abs(float(max_learning_rate(found, 7, 7, momentum=0.5)) - 3) < 1e-6
    adam = [float(max_learning_rate(found, size, optimizer="adam")) for size in (4, 16)]
    assert abs(adam[0] - 1 / 20) < 1e-6
    assert abs(adam[1] / adam[0] - 2) < 1e-6
    concave = HessianVariance(*map(torch.tensor, (1.0, 4.0, 1.0, -1.0, -3.0)))
    assert float(max_learning_rate(concave, 1)) == 0.5  # the edge 4, above zero
    assert float(max_learning_rate(concave, 5, 5)) == math.inf


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_descent_converges_just_below_the_largest_rate_and_diverges_just_above(momentum):
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator())
    model = nn.Linear(5, 1, bias=False).double()
    squared = lambda model, x: model(x).square().mean()  # noqa: E731
    found = hessian_variance(model, squared, (x,), generator=generator())
    limit = float(max_learning_rate(found, 40, 40, momentum=momentum))
    ends = []
    for factor in (0.99, 1.05):
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * limit, momentum=momentum)
        for _ in range(600):
            optimizer.zero_grad()
            squared(model, x).backward()
            optimizer.step()
        ends.append(float(squared(model, x).detach()))
    assert ends[0] < 1e-8
    assert ends[1] > 1e8


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("threshold", [None, 100.0])
def test_scaling_in_two_steps_is_scaling_in_one(optimizer, threshold):
    options = {"optimizer": optimizer, "threshold": threshold}
    between = scale_learning_rate(0.3, 16, 80, **options)
    assert math.isclose(
        scale_learning_rate(between, 80, 512, **options), scale_learning_rate(0.3, 16, 512, **options)
    )
    assert scale_learning_rate(0.3, 64, 64, **options) == 0.3
    assert math.isclose(scale_learning_rate(between, 80, 16, **options), 0.3)
    grown = scale_learning_rate(1.0, 25, 400, **options)
    batches = 16 if threshold is None else 4
    assert math.isclose(grown, batches if optimizer == "sgd" else math.sqrt(batches))


MODEL, X, Y = problem()
SOME = HessianVariance(*torch.ones(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hessian_variance(MODEL, loss, (X[:1], Y[:1])), r"data must be tensors of one length of at least 2, got lengths \[1\]"),
        (lambda: hessian_variance(MODEL, loss, (X, Y[:3])), r"got lengths \[3, 12\]"),
        (lambda: hessian_variance(MODEL, loss, ()), "data must be a tuple of tensors"),
        (lambda: hessian_variance(MODEL, loss, (X, Y), n_probes=0), "n_probes must be an integer of at least 1"),
        (lambda: hessian_variance(MODEL, loss, (X, Y), max_samples=1), "max_samples must be an integer of at least 2"),
        (lambda: hessian_variance(MODEL, loss, (X, Y), n_iter=0), "n_iter must be an integer of at least 1"),
        (lambda: hessian_variance(MODEL, lambda m, x, y: m(x), (X, Y)), "loss_fn must return a scalar"),
        (lambda: hessian_variance(nn.Tanh(), loss, (X, Y)), "model must have a parameter"),
        (lambda: hessian_variance(MODEL, loss, (X * math.nan, Y)), "matvec must return finite products, got NaN or infinity in iteration 1"),
        (lambda: effective_batch(0), "batch_size must be an integer of at least 1"),
        (lambda: effective_batch(9, 8), "batch_size must be at most n_samples, got 9 for 8"),
        (lambda: batch_extremes(1.0, -1.0, 1.0), "variance must be at least 0"),
        (lambda: batch_extremes(1.0, math.nan, 1.0), "variance must be at least 0 and finite"),
        (lambda: batch_extremes(1.0, 1.0, 0.0), "b must be greater than 0"),
        (lambda: batch_extremes(math.nan, 1.0, 1.0), "value must be finite"),
        (lambda: batch_extremes(torch.ones(2), torch.ones(3), 1.0), "value, variance, b must broadcast"),
        (lambda: max_learning_rate(SOME, 4, optimizer="lion"), "optimizer must be one of 'sgd', 'adam'"),
        (lambda: max_learning_rate(SOME, 4, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: max_learning_rate(SOME, 4, momentum=0.5, optimizer="adam"), "momentum must be 0 with optimizer 'adam'"),
        (lambda: max_learning_rate(SOME, 4, damping=-1.0), "damping must be at least 0"),
        (lambda: max_learning_rate(SOME._replace(top=-torch.ones(())), 4), "variance must be at least 0"),
        (lambda: scale_learning_rate(-0.1, 1, 2), "lr must be at least 0"),
        (lambda: scale_learning_rate(0.1, 0, 2), "old_batch must be greater than 0"),
        (lambda: scale_learning_rate(0.1, 1, -2), "new_batch must be greater than 0"),
        (lambda: scale_learning_rate(0.1, 1, 2, threshold=0.0), "threshold must be greater than 0"),
        (lambda: scale_learning_rate(0.1, 1, 2, optimizer="SGD"), "optimizer must be one of"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
