import math
import warnings
from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from posterity.optimization import (
    SignDescent,
    compare_optimizers,
    full_batch_closure,
    gradient_noise,
    tail_index,
)


def problem(n=37):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, dtype=torch.float64, generator=g)
    y = torch.randn(n, 1, dtype=torch.float64, generator=g)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), x, y


def mse(model, x, y):
    return (model(x) - y).square().mean()


def whole(model, x, y):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(mse(model, x, y), list(model.parameters()))])


def test_batches_of_unequal_size_give_the_gradient_of_the_mean_over_all_samples():
    model, x, y = problem()
    batches = list(zip(x.split(10), y.split(10), strict=True))  # the last has 7
    loss = full_batch_closure(model, mse, batches)()
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(got, whole(model, x, y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, mse(model, x, y).detach(), rtol=1e-12, atol=1e-12)
    full_batch_closure(model, mse, batches, weights=[0.0, 0.0, 2.5, 0.0])()
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(got, whole(model, x[20:30], y[20:30]), rtol=1e-12, atol=1e-12)


def test_a_loss_of_one_number_counts_with_dimensions_and_without():
    model, x, y = problem()
    plain = full_batch_closure(model, mse, [(x, y)])()
    assert torch.equal(full_batch_closure(model, lambda *args: mse(*args).reshape(1), [(x, y)])(), plain)


def test_a_loader_and_lbfgs_reach_the_least_squares_solution():
    _, x, y = problem()
    model = nn.Linear(3, 1).double()
    loader = DataLoader(
        TensorDataset(x, y), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, tolerance_grad=1e-12, tolerance_change=0)
    optimizer.step(full_batch_closure(model, mse, loader))
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    exact = torch.linalg.lstsq(rows, y).solution.reshape(-1)
    got = torch.cat([model.weight.reshape(-1), model.bias]).detach()
    torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-7)


def test_parameters_without_gradient_have_none_and_one_batch_may_lack_some():
    a, b, idle = (nn.Parameter(torch.tensor(v)) for v in (1.0, 2.0, 3.0))
    model = nn.ParameterList([a, b, idle])
    frozen = nn.Parameter(torch.tensor(0.0), requires_grad=False)
    model.append(frozen)

    def loss(model, x):
        return (model[0] * x).mean() if bool(x[0] > 0) else (model[1] * x).mean()

    full_batch_closure(
        model,
        loss,
        [(torch.tensor([1.0]),), (torch.tensor([-1.0, -1.0, -1.0]),), (torch.tensor([4.0, 4.0]),)],
    )()
    assert float(a.grad) == pytest.approx(9 / 6) and float(b.grad) == pytest.approx(-3 / 6)
    assert idle.grad is None and frozen.grad is None


def test_hundreds_of_batches_add_up_in_bfloat16():
    p = nn.Parameter(torch.tensor(0.0, dtype=torch.bfloat16))
    model = nn.ParameterList([p])
    batches = [(torch.tensor([1.0], dtype=torch.bfloat16),)] * 999 + [
        (torch.tensor([-999.0], dtype=torch.bfloat16),)
    ]
    loss = full_batch_closure(model, lambda model, x: (model[0] * x).mean(), batches)()
    assert p.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert float(p.grad) == pytest.approx((999 - 1000) / 1000, abs=1e-5)  # -999 is -1000 in bfloat16


def test_deviations_of_equal_batches_add_up_to_nothing_and_their_lengths_are_returned():
    model, x, y = problem(40)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    g = whole(model, x, y)
    off = torch.stack([whole(model, *batch) - g for batch in batches])
    torch.testing.assert_close(off.sum(0), torch.zeros_like(g), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_noise(model, mse, batches), off.norm(dim=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradient_noise(model, mse, iter(batches), full=torch.zeros_like(g)),
        torch.stack([whole(model, *batch).norm() for batch in batches]),
    )
    uneven = list(zip(x.split(30), y.split(30), strict=True))
    torch.testing.assert_close(
        gradient_noise(model, mse, uneven),
        torch.stack([(whole(model, *batch) - g).norm() for batch in uneven]), rtol=1e-10, atol=1e-12,
    )  # fmt: skip
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
def test_the_tail_of_pareto_draws_is_found(alpha):
    u = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = u ** (-1 / alpha)
    k = math.isqrt(len(x))
    assert float(tail_index(x)) == pytest.approx(alpha, rel=4 / math.sqrt(k))
    assert float(tail_index(1000 * x)) == pytest.approx(float(tail_index(x)), rel=1e-12)
    by_hand = x.sort(descending=True).values[: k + 1]
    assert float(tail_index(x)) == pytest.approx(1 / float((by_hand[:-1] / by_hand[-1]).log().mean()))
    assert math.isinf(float(tail_index(torch.ones(9))))


def test_a_race_takes_the_same_batches_reseeds_no_gpu_keeps_the_best_rate_and_reports_divergence(monkeypatch):
    _, x, y = problem(64)
    seen = []

    def loss(model, x, y):
        seen.append(len(x))
        return mse(model, x, y)

    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    state = torch.get_rng_state()
    race = compare_optimizers(
        lambda: nn.Linear(3, 1).double(), loss, (x, y),
        {"SGD": (torch.optim.SGD, (1e-3, 0.1, 1e6)), "sign": (SignDescent, (0.01,)), "hopeless": (torch.optim.SGD, (1e30,))},
        n_steps=60,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    sgd = race["SGD"]
    assert sgd.lr == 0.1 and not sgd.diverged and sgd.grid[1e6] == math.inf
    assert sgd.losses.shape == (61,) and float(sgd.losses[-1]) == pytest.approx(sgd.grid[0.1])
    assert float(race["sign"].losses[0]) == float(sgd.losses[0])  # the same weights
    assert race["hopeless"].diverged and race["hopeless"].grid == {1e30: math.inf}
    # by hand: the same full-batch gradient descent
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
    for _ in range(60):
        g = whole(model, x, y)
        with torch.no_grad():
            model.weight -= 0.1 * g[:3].reshape(1, 3)
            model.bias -= 0.1 * g[3:]
    assert sgd.grid[0.1] == pytest.approx(mse(model, x, y).item(), rel=1e-10)


def test_micro_batches_change_nothing_and_batches_are_whole_and_in_one_order():
    _, x, y = problem(50)
    rows = torch.arange(50.0)[:, None].double()

    def run(**options):
        seen = []

        def loss(model, x, y, row):
            seen.append(row[:, 0].tolist())
            return mse(model, x, y)

        race = compare_optimizers(
            lambda: nn.Linear(3, 1).double(), loss, (x, y, rows), {"a": (torch.optim.SGD, (0.1,)), "b": (torch.optim.SGD, (0.1,))},
            n_steps=8, **options,
        )  # fmt: skip
        return race, seen

    whole_batch, _ = run()
    small, _ = run(micro_batch=7)
    torch.testing.assert_close(small["a"].losses, whole_batch["a"].losses)
    race, seen = run(batch_size=16)
    assert torch.equal(race["a"].losses, race["b"].losses)
    assert [len(batch) for batch in seen[:9]] == [16] * 8 + [50]
    assert seen[:9] == seen[9:]
    assert len(set(chain(*seen[:3]))) == 48  # three batches of a pass share no row
    again, _ = run(batch_size=16, micro_batch=5)
    torch.testing.assert_close(again["a"].losses, race["a"].losses, rtol=1e-6, atol=0)


def test_noise_that_is_left_is_warned_of_once():
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    for layer, words in ((nn.Dropout(0.5), "dropout is active"), (nn.BatchNorm1d(3), "each batch's own")):
        model = nn.Sequential(layer, nn.Linear(3, 1))
        closure = full_batch_closure(model, mse, [(x, y)])
        with pytest.warns(UserWarning, match=words):
            closure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closure()
        full_batch_closure(model.eval(), mse, [(x, y)])()
        full_batch_closure(nn.Sequential(nn.Dropout(0.0), nn.Linear(3, 1)), mse, [(x, y)])()


def test_bad_input_of_closures_and_noise(as_a_user):
    model, x, y = problem()
    batches = [(x, y)]
    for weights, words in (
        ([-1.0], r"weights\[0\] must be at least 0"),
        ([0.0], "positive sum"),
        ([float("nan")], r"weights\[0\]"),
    ):
        with pytest.raises(ValueError, match=words):
            full_batch_closure(model, mse, batches, weights=weights)
    for weights in ([1.0, 1.0], []):
        with pytest.raises(ValueError, match="weights must"):
            full_batch_closure(
                model, mse, [*batches, *batches, *batches][: 1 if weights else 0] or batches, weights=weights
            )()
    with pytest.raises(ValueError, match="one a batch, got 1 for more"):
        full_batch_closure(model, mse, batches * 2, weights=[1.0])()
    for each in (full_batch_closure(model, mse, []), lambda: gradient_noise(model, mse, [])):
        with pytest.raises(ValueError, match="batches must hold a batch"):
            each()
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor, got .*37, 1"):
        full_batch_closure(model, lambda model, x, y: model(x) - y, batches)()
    closure = full_batch_closure(model, mse, iter(batches))
    closure()
    with pytest.raises(ValueError, match="pass a list or a DataLoader"):
        closure()
    with pytest.raises(ValueError, match="pass a list or a DataLoader"):
        gradient_noise(model, mse, iter(batches))
    with pytest.raises(ValueError, match=r"full must have shape \(21,\)"):
        gradient_noise(model, mse, batches, full=torch.zeros(3))
    with pytest.raises(ValueError, match="requires a gradient"):
        gradient_noise(nn.ReLU(), mse, batches)
    for bad, words in ((torch.ones(1), "two entries"), (-torch.ones(4), "positive"), (torch.tensor([1.0, math.nan]), "finite"),
                       (torch.ones(2, 2), "shape"), (torch.arange(4), "floating-point")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            tail_index(bad)


@pytest.mark.parametrize(("options", "words"), [
    ({"batch_size": 38}, "batch_size must be in"), ({"batch_size": 0}, "batch_size"), ({"micro_batch": 0}, "micro_batch"),
    ({"n_steps": 0}, "n_steps"), ({"optimizers": {}}, "optimizers must name one"),
    ({"optimizers": {"SGD": (torch.optim.SGD, ())}}, "must have a learning rate"), ({"data": ()}, "one positive length"),
    ({"data": (torch.ones(3), torch.ones(2))}, "one positive length"),
])  # fmt: skip
def test_bad_input_of_a_race(options, words, as_a_user):
    _, x, y = problem()
    given = {"data": (x, y), "optimizers": {"SGD": (torch.optim.SGD, (0.1,))}, "n_steps": 2} | options
    with pytest.raises(ValueError, match=words):
        compare_optimizers(lambda: nn.Linear(3, 1).double(), mse, **given)
