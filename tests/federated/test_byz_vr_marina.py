"""The sum's gradients; the solver's limits, counts, and that it reaches the optimum under attack; what is refused."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from posterity.federated import (
    FiniteSum,
    alie,
    bit_flip,
    bucketing,
    byz_sgd,
    byz_vr_marina,
    coordinate_median,
    geometric_median,
    ipm,
    krum,
    mimic,
    quantize_l2,
    rand_k,
    robust_strategy,
    step_size,
    trimmed_mean,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(n=11, d=4, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=rng(seed), dtype=dtype) + 3


# the sum


def logistic(n=60, d=5, workers=4, seed=0, **options):
    X, g = vectors(n, d, seed) - 3, rng(seed + 1)
    y = (X @ torch.ones(d, dtype=X.dtype) + torch.randn(n, generator=g, dtype=X.dtype) > 0).to(X)

    def loss(w, X, y):
        return F.binary_cross_entropy_with_logits(X @ w, y) + 0.05 * (w @ w)

    def gradient(w, X, y):
        residual = torch.sigmoid(X @ w) - y
        return torch.einsum("kb,kbd->kd", residual, X) / X.shape[1] + 0.1 * w

    options = {"gradient": gradient, **options}
    return FiniteSum(loss, (X, y), n_workers=workers, **options), loss, (X, y)


def optimum(loss, data, d=5):
    w = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-15, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        value = loss(w, *data)
        value.backward()
        return value

    solver.step(closure)
    return w.detach(), loss(w, *data).item()


@pytest.mark.parametrize("split", ["shared", "disjoint"])
@pytest.mark.parametrize("closed", [True, False])
def test_gradients_of_workers_are_those_of_autograd(split, closed):
    options = {} if closed else {"gradient": None}
    problem, loss, _ = logistic(split=split, generator=rng(2), **options)
    w = vectors(1, 5)[0].requires_grad_()
    idx = torch.randint(problem.n_samples, (4, 7), generator=rng())
    weights = torch.rand(4, 7, generator=rng(), dtype=torch.float64)
    with torch.no_grad():
        found = problem.grad(w, idx), problem.full_grad(w), problem.grad(w, idx, weights)
        before = vectors(1, 5, 8)[0]
        for options in ((idx,), (idx, weights)):
            change = problem.change(w, before, *options)
            assert torch.allclose(change, problem.grad(w, *options) - problem.grad(before, *options))
    for k in range(4):
        rows = problem._data if split == "shared" else tuple(part[k] for part in problem._data)
        batch = tuple(part[idx[k]] for part in rows)
        assert torch.allclose(found[0][k], torch.autograd.grad(loss(w, *batch), w)[0])
        assert torch.allclose(found[1][k], torch.autograd.grad(loss(w, *rows), w)[0])
        single = [torch.autograd.grad(loss(w, *(part[j : j + 1] for part in batch)), w)[0] for j in range(7)]
        assert torch.allclose(found[2][k], sum(c * s for c, s in zip(weights[k], single, strict=True)) / 7)


def test_disjoint_parts_hold_every_row_once():
    rows = torch.arange(22.0)
    problem = FiniteSum(
        lambda x, a: (x[0] - a).mean(), (rows,), n_workers=4, split="disjoint", generator=rng()
    )
    held = problem._data[0].flatten().tolist()
    assert problem.n_samples == 5 and len(set(held)) == 20 and set(held) <= set(rows.tolist())


# the solver


@pytest.mark.parametrize("options", [{"p": 1.0}, {"batch_size": 60}, {"batch_size": 60, "p": 0.3}])
def test_without_liars_full_gradients_or_batches_are_gradient_descent(options):
    problem, loss, data = logistic()
    found = byz_vr_marina(
        problem, torch.zeros(5, dtype=torch.float64), lr=0.5, n_steps=25, generator=rng(), **options
    )
    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(25):
        w = w - 0.5 * torch.func.grad(loss)(w, *data)
    assert torch.allclose(found.x, w, atol=1e-12)


@pytest.mark.parametrize(
    ("attack", "median"),
    [*((attack, coordinate_median) for attack in (alie, ipm, bit_flip, mimic)), (bit_flip, geometric_median)],
)
def test_it_converges_linearly_to_the_optimum_under_attack(attack, median):
    problem, loss, data = logistic(workers=9)
    _, least = optimum(loss, data)
    gaps, g = [], rng(7)

    def watch(step, x):
        if step % 30 == 29:
            gaps.append(loss(x, *data).item() - least)

    found = byz_vr_marina(
        problem, torch.zeros(5, dtype=torch.float64), lr=2.0, n_steps=150, n_byzantine=2, batch_size=12,
        attack=attack, aggregator=lambda v: median(bucketing(v, 2, generator=g)), generator=rng(), callback=watch,
    )  # fmt: skip
    assert gaps[-1] < 1e-12
    assert all(later < max(earlier / 3, 1e-12) for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert found.history[-1]["gradient_norm"] < 1e-5


def test_sgd_stops_at_a_floor_where_it_does_not():
    problem, loss, data = logistic(workers=9)
    _, least = optimum(loss, data)
    options = {"n_steps": 200, "n_byzantine": 2, "attack": alie, "batch_size": 12, "lr": 1.0}
    start = torch.zeros(5, dtype=torch.float64)
    marina = byz_vr_marina(problem, start, generator=rng(), **options)
    for momentum in (0.0, 0.9):
        sgd = byz_sgd(problem, start, generator=rng(), momentum=momentum, **options)
        assert loss(sgd.x, *data) - least > 1e3 * abs(loss(marina.x, *data) - least) + 1e-7


def test_honest_vectors_are_as_near_each_other_as_the_point_moved():
    """The heart of the method: two changes of a gradient differ by twice the smoothness of a row times the step."""
    problem, _, (X, _) = logistic(workers=9)
    smoothness = float((X**2).sum(1).max()) / 4 + 0.1
    seen = []

    def spread(good, f):
        seen.append((good - good.mean(0)).norm(dim=1).max().item())
        return alie(good, f)

    found = byz_vr_marina(
        problem, torch.zeros(5, dtype=torch.float64), lr=1.0, n_steps=200, n_byzantine=2, batch_size=12,
        attack=spread, generator=rng(),
    )  # fmt: skip
    moved = [row["gradient_norm"] for row in found.history]  # lr is 1
    near = [2 * smoothness * step + 1e-12 for step in moved]
    assert all(spread <= most for spread, most in zip(seen[1:], near, strict=False))
    assert seen[0] < 1e-12 < max(seen) and seen[-1] < 1e-6


def test_compressed_and_importance_sampled_messages_reach_the_optimum_too():
    problem, loss, data = logistic(workers=9)
    x, _ = data
    smooth, _, _ = logistic(workers=9, smoothness=(x**2).sum(1) / 4 + 0.1)
    _, least = optimum(loss, data)
    start = torch.zeros(5, dtype=torch.float64)
    compressed = byz_vr_marina(
        problem, start, lr=0.6, n_steps=300, n_byzantine=2, attack=ipm, batch_size=12, generator=rng(),
        compressor=functools.partial(rand_k, k=2, generator=rng(1)),
    )  # fmt: skip
    weighed = byz_vr_marina(
        smooth, start, lr=1.0, n_steps=150, n_byzantine=2, attack=alie, batch_size=12, sampling="importance",
        generator=rng(),
    )  # fmt: skip
    for found in (compressed, weighed):
        assert loss(found.x, *data).item() - least < 1e-12


def test_importance_sampling_is_right_in_the_mean():
    rows = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    problem = FiniteSum(lambda x, a: (a * x).sum() / len(a), (rows,), n_workers=1, smoothness=rows)
    found = byz_sgd(
        problem,
        torch.zeros(1, dtype=torch.float64),
        lr=1.0,
        n_steps=300,
        sampling="importance",
        generator=rng(),
    )
    # every draw is the mean: weight (mean L) / L times the gradient L
    assert found.x.item() == pytest.approx(-300 * 37.0)


def test_counts_are_their_closed_forms():
    problem, _, _ = logistic(workers=6)
    start, k, steps = torch.zeros(5, dtype=torch.float64), 2, 200
    coins = rng(4)
    found = byz_vr_marina(
        problem, start, lr=0.05, n_steps=steps, p=0.25, batch_size=3, generator=coins,
        compressor=functools.partial(rand_k, k=k, generator=rng(1)),
    )  # fmt: skip
    full = (found.n_sample_gradients - 60 - 6 * steps) / (60 - 6)
    assert full == int(full) and 20 < full < 80
    assert found.n_sample_gradients == 60 * (1 + full) + 2 * 3 * (steps - full)
    assert found.n_sent == pytest.approx(5 * (1 + full) + k * (steps - full))
    assert [row["step"] for row in found.history] == list(range(steps))
    assert found.history[0]["sample_gradients"] == 60 and found.history[0]["sent"] == 5
    sgd = byz_sgd(problem, start, lr=0.05, n_steps=50, batch_size=3, generator=rng())
    assert (sgd.n_sample_gradients, sgd.n_sent) == (150, 250)


def test_the_chance_of_full_gradients_is_the_least_of_two_shares():
    problem, _, _ = logistic(workers=6)
    run = functools.partial(
        byz_vr_marina, problem, torch.zeros(5, dtype=torch.float64), lr=0.01, n_steps=400, generator=rng()
    )
    plain, sparse = (
        run(batch_size=12),
        run(batch_size=60, compressor=functools.partial(rand_k, k=1, generator=rng())),
    )
    assert (plain.n_sample_gradients - 60 - 24 * 400) / (60 - 24) == pytest.approx(80, rel=0.3)
    assert (sparse.n_sent - 5 - 400) / 4 == pytest.approx(80, rel=0.3)


def test_the_rate_of_the_theorem_is_its_closed_form_and_converges():
    a = (
        6
        * 0.8
        / 0.2
        * ((4 * 3 * 0.1 / 0.2 + 1 / 20) * (2 * 4 + 3 * 25 / 5) + (4 * 3 * 0.1 * 3 / 0.2 + 2 / 20) * 49)
    )
    found = step_size(2.0, 7.0, 5.0, p=0.2, omega=2.0, batch_size=5, n_good=10, delta=0.1, c=3.0)
    assert found == pytest.approx(1 / (2 + math.sqrt(a)))
    assert step_size(2.0, 7.0, 5.0, p=1.0, omega=2.0, batch_size=5, n_good=10, delta=0.1, c=3.0) == 0.5
    problem, loss, data = logistic(workers=9)
    x = data[0]
    L = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1] / 4 + 0.1)
    rate = step_size(L, 0.0, float((x**2).sum(1).max() / 4), p=0.2, batch_size=12, n_good=9)
    start, (_, least) = torch.zeros(5, dtype=torch.float64), optimum(loss, data)
    gaps = []
    for seed in range(3):
        found = byz_vr_marina(problem, start, lr=rate, n_steps=300, batch_size=12, p=0.2, generator=rng(seed))
        gaps.append(loss(found.x, *data).item() - least)
    # the theorem: in the mean at most (1 - lr mu)^steps of the first gap, with mu = 0.1 of the regulariser
    assert np.mean(gaps) <= (1 - 0.1 * rate) ** 200 * (loss(start, *data).item() - least)


def test_flower_applies_the_aggregator_to_buckets_of_models(replies):
    states = [
        {"w": torch.full((2, 2), float(k)), "b": torch.tensor([float(k)]), "n": torch.tensor(7)}
        for k in (1, 2, 300)
    ]
    arrays, _ = robust_strategy(coordinate_median, s=1, fraction_evaluate=0.0).aggregate_train(
        1, replies(states)
    )
    back = arrays.to_torch_state_dict()
    assert back["w"].tolist() == [[2, 2], [2, 2]] and back["b"].tolist() == [2] and back["n"] == 7


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: coordinate_median(torch.ones(0, 2)), "n at least 1"),
        (lambda: coordinate_median(torch.ones(3)), r"shape \(n, d\)"),
        (lambda: coordinate_median(torch.ones(3, 2, dtype=torch.long)), "floating-point"),
        (lambda: coordinate_median(vectors(), nonfinite="keep"), "nonfinite must be one of"),
        (lambda: geometric_median(vectors(), max_iter=0), "max_iter"),
        (lambda: geometric_median(vectors(), start=torch.ones(3)), r"start must have shape \(4,\)"),
        (lambda: trimmed_mean(vectors(), 6), "n_trim must be less than half of 11"),
        (lambda: krum(vectors(), 9), "n_byzantine must be at most 8"),
        (lambda: krum(vectors(), 2, 10), "n_selected must be at most 9"),
        (lambda: bucketing(vectors(), 0), "s must be an integer of at least 1"),
        (lambda: bucketing(vectors(), 2, permutation=torch.zeros(11, dtype=torch.long)), "permutation must be an order"),
        (lambda: rand_k(vectors(), 5), r"k must be in \[1, 4\]"),
        (lambda: rand_k(vectors(), 0), "k must be"),
        (lambda: quantize_l2(vectors(), 0), "levels"),
        (lambda: alie(vectors(1), 1), "at least two vectors"),
        (lambda: mimic(vectors(), 1, index=11), "index must be in"),
        (lambda: ipm(vectors(), 0), "n_byzantine"),
        (lambda: FiniteSum(torch.sum, (torch.ones(3), torch.ones(4)), n_workers=2), r"equally many rows, got \[3, 4\]"),
        (lambda: FiniteSum(torch.sum, (torch.ones(3),), n_workers=4, split="disjoint"), "n_workers must be at most"),
        (lambda: FiniteSum(torch.sum, (torch.ones(3),), n_workers=1, smoothness=torch.zeros(3)), "smoothness must be 3 positive"),
        (lambda: logistic()[0].grad(torch.zeros(5), torch.zeros(3, 2, dtype=torch.long)), r"idx must have shape \(4, any\)"),
        (lambda: logistic()[0].grad(torch.zeros(5), torch.full((4, 2), 60)), r"idx must be in \[0, 60\)"),
        (lambda: logistic(gradient=lambda w, X, y: w)[0].full_grad(torch.zeros(5)), r"gradient must return \(1, 5\)"),
        (lambda: byz_sgd(3, torch.zeros(2), lr=0.1, n_steps=1), "problem must have grad, full_grad"),
        (lambda: step_size(1.0, 0.0, 1.0, p=0.0, n_good=3), "p must be in"),
        (lambda: step_size(1.0, 0.0, 1.0, p=0.1, n_good=3, delta=0.5), "delta must be in"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("solve", [byz_vr_marina, byz_sgd])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_byzantine": 4, "attack": alie}, "n_byzantine must be less than half of 8"),
        ({"n_byzantine": 1}, "attack goes with n_byzantine: say what 1 workers send"),
        ({"attack": alie}, "there is nobody to attack"),
        ({"batch_size": 61}, "batch_size must be at most the 60 rows"),
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"sampling": "importance"}, "needs the problem's smoothness"),
        ({"x0": torch.zeros(5, 1)}, r"x0 must be finite, of shape \(d,\)"),
        ({"x0": torch.full((5,), math.nan)}, "x0 must be finite"),
        (
            {"x0": torch.zeros(5, dtype=torch.bfloat16)},
            "x0 must be float32 or float64, small steps vanish in torch.bfloat16",
        ),
        ({"n_byzantine": 1, "attack": lambda good, f: good}, r"attack must return \(1, 5\)"),
        ({"compressor": lambda v: v[:, :2]}, "compressor must keep the shape"),
    ],
)
def test_a_run_that_cannot_be_is_refused(as_a_user, solve, options, said):
    problem, _, _ = logistic()
    with pytest.raises(ValueError, match=said):
        solve(problem, **{"x0": torch.zeros(5, dtype=torch.float64), "lr": 0.1, "n_steps": 3, **options})


def test_a_start_in_another_dtype_than_the_data_is_refused(as_a_user):
    X = torch.ones(4, 2, dtype=torch.float64)
    problem = FiniteSum(lambda w, X: (X @ w.to(X)).mean(), (X,), n_workers=2)
    with pytest.raises(ValueError, match="p must be in"):
        byz_vr_marina(problem, torch.zeros(2, dtype=torch.float64), lr=0.1, n_steps=1, p=1.5)
    float32 = FiniteSum(lambda w, X: (X.float() @ w.float()).mean(), (X,), n_workers=2)
    with pytest.raises(ValueError, match="x0 must fit the problem"):
        byz_vr_marina(_Lying(float32), torch.zeros(2), lr=0.1, n_steps=1)


class _Lying:
    """A problem whose gradients have one number too many."""

    def __init__(self, problem):
        self.problem, self.n_samples, self.n_workers = problem, problem.n_samples, problem.n_workers

    def full_grad(self, x):
        return torch.zeros(self.n_workers, len(x) + 1)

    grad = full_grad


def test_autocast_inference_mode_and_float32_change_nothing_but_rounding():
    problem, loss, (X, y) = logistic(gradient=None)
    narrow = FiniteSum(loss, (X.float(), y.float()), n_workers=4)
    plain = byz_vr_marina(narrow, torch.zeros(5), lr=0.5, n_steps=50, batch_size=20, generator=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = byz_vr_marina(narrow, torch.zeros(5), lr=0.5, n_steps=50, batch_size=20, generator=rng())
    assert torch.equal(plain.x, mixed.x) and plain.x.dtype == torch.float32
    with torch.inference_mode():
        still = byz_vr_marina(narrow, torch.zeros(5), lr=0.5, n_steps=50, batch_size=20, generator=rng())
    assert torch.equal(plain.x, still.x)
    exact = byz_vr_marina(
        problem, torch.zeros(5, dtype=torch.float64), lr=0.5, n_steps=50, batch_size=20, generator=rng()
    )
    assert torch.allclose(plain.x.double(), exact.x, atol=1e-5)


def test_too_many_liars_for_the_buckets_are_warned_about():
    problem, _, _ = logistic(workers=15)
    with pytest.warns(UserWarning, match="half of the buckets of two may be bad"):
        byz_vr_marina(
            problem, torch.zeros(5, dtype=torch.float64), lr=0.1, n_steps=1, n_byzantine=5, attack=alie
        )
