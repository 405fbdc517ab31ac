import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity.optimization import GreedyRandomSearch, PatternSearch, population_search
from posterity.optimization import gradient_free as module
from posterity.optimization.batched_search import _Judge, _moved, _Trace
from posterity.optimization.direct_search import _order, _place
from posterity.testing import check_optimizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("make", "steps"), [(partial(PatternSearch, radius=0.5), 100), (partial(GreedyRandomSearch, radius=0.5, patience=10), 300)])  # fmt: skip
def test_the_optimisers_keep_every_promise_of_an_optimiser(make, steps):
    check_optimizer(
        lambda params: make(params, generator=seeded()),
        gradient=False,
        setting=("radius", 0.25),
        steps=steps,
        tol=0.05,
    )


def bowl():
    """A distance to a point on the grid of eighths, with a leaf that is not contiguous and a scalar."""
    generator = seeded(1)
    aims = [torch.randint(-40, 40, shape, generator=generator) / 8.0 for shape in ((3,), (4, 2), ())]
    params = [torch.zeros(3), torch.zeros(2, 4).T, torch.zeros(())]
    return params, lambda: sum(((p - a) ** 2).sum() for p, a in zip(params, aims, strict=True)), aims


def test_pattern_search_moves_one_entry_by_the_radius_and_ends_where_no_move_helps():
    params, closure, aims = bowl()
    optimizer = PatternSearch(params, generator=seeded())
    shrunk = 0
    for _ in range(400):
        before, radius = torch.cat([p.reshape(-1) for p in params]), optimizer.param_groups[0]["radius"]
        start = closure()
        loss = optimizer.step(closure)
        after = torch.cat([p.reshape(-1) for p in params])
        assert loss == closure() <= start
        if torch.equal(before, after):
            shrunk += 1
            assert optimizer.param_groups[0]["radius"] == radius / 2
            for p in params:
                for k in range(p.numel()):
                    place = _place(k, p.shape)
                    for sign in (1, -1):
                        held = p[place].clone()
                        p[place] += sign * radius
                        assert closure() >= loss
                        p[place] = held
        else:
            moved = (after - before).abs()
            assert moved.count_nonzero() == 1
            assert moved.max() == radius
            assert loss < start
        if loss == 0:
            break
    assert all(torch.equal(p, a) for p, a in zip(params, aims, strict=True))
    assert shrunk == 3


def test_the_first_move_that_helps_is_taken_in_an_order_that_is_fair():
    """On a slope of two entries half of the moves help: each of them is the first equally often."""
    counts = torch.zeros(2)
    for seed in range(600):
        p = torch.zeros(2)
        PatternSearch([p], generator=seeded(seed)).step(p.sum)
        counts += p == -1
    assert counts.sum() == 600
    assert abs(float(counts[0]) - 300) < 5 * math.sqrt(150)


def test_an_order_holds_each_move_once_and_all_orders_are_equally_likely():
    assert sorted(_order(1000, 7)) == list(range(1000))
    assert list(_order(50, 1)) != list(_order(50, 2))
    seen = [tuple(_order(3, seed)) for seed in range(6000)]
    assert len(set(seen)) == 6
    assert max(abs(seen.count(order) - 1000) for order in set(seen)) < 5 * math.sqrt(6000 * 5 / 36)


def test_greedy_search_moves_all_entries_by_normal_noise_of_the_radius_and_shrinks_after_its_patience():
    p, moves = torch.zeros(20_000), []
    GreedyRandomSearch([p], radius=0.3, generator=seeded()).step(
        lambda: -float(len(moves.append(1) or moves))
    )
    assert abs(float(p.mean())) < 5 * 0.3 / math.sqrt(20_000)
    assert float(p.std()) == pytest.approx(0.3, rel=0.03)
    assert float((p.abs() < 0.3).double().mean()) == pytest.approx(0.6827, abs=0.02)  # of a normal
    q = torch.zeros(3)
    optimizer = GreedyRandomSearch([q], patience=4, shrink=0.1, generator=seeded())
    radii = [
        optimizer.step(lambda: q.square().sum()) or optimizer.param_groups[0]["radius"] for _ in range(12)
    ]
    assert radii == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001])
    assert torch.equal(q, torch.zeros(3))
    r = torch.full((3,), 5.0)
    optimizer = GreedyRandomSearch([r], patience=4, generator=seeded())
    for _ in range(40):  # what succeeds begins the patience anew
        before = float(r.square().sum())
        assert optimizer.step(lambda: r.square().sum()) == float(r.square().sum()) <= before
    assert before < 75


@pytest.mark.parametrize("make", [PatternSearch, GreedyRandomSearch])
def test_a_copy_and_a_saved_state_go_on_alike_and_the_global_generator_is_read_once(make):
    x, y = torch.randn(12, 4), torch.arange(12) % 2
    nets = [nn.Linear(4, 2)]
    torch.manual_seed(3)
    optimizer = make(nets[0].parameters())
    state = torch.get_rng_state()
    closure = lambda net: F.cross_entropy(net(x), y)  # noqa: E731
    for _ in range(5):
        optimizer.step(lambda: closure(nets[0]))
    nets.append(copy.deepcopy(nets[0]))
    again = make(nets[1].parameters(), generator=seeded(9))
    again.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        assert optimizer.step(lambda: closure(nets[0])) == again.step(lambda: closure(nets[1]))
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [PatternSearch, GreedyRandomSearch])
def test_a_move_whose_loss_is_nan_or_raises_is_undone(make):
    p = torch.ones(3)
    calls = []

    def closure(then):
        calls.append(1)
        return 1.0 if len(calls) == 1 else then()

    loss = make([p], generator=seeded()).step(partial(closure, lambda: math.nan))
    assert loss == 1.0
    assert torch.equal(p, torch.ones(3))
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        make([p], generator=seeded()).step(partial(closure, lambda: 1 / 0))
    assert torch.equal(p, torch.ones(3))


def task(n=12, classes=2, dtype=torch.float64):
    return torch.randn(n, 6, generator=seeded(3)).to(dtype), torch.arange(n) % classes


def perceptron(dtype=torch.float64, classes=2, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, classes, bias=bias)).to(dtype)  # fmt: skip


class Wrapped(nn.Module):
    """The same network, as one that is no sequence of layers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("wrap", [nn.Identity(), Wrapped])
def test_a_population_of_one_is_the_optimiser(wrap, normalize):
    (x, y), net = task(), perceptron()
    model = net if isinstance(wrap, nn.Identity) else wrap(net)
    options = {"population": 1, "max_steps": 40, "stop_accuracy": None, "normalize": normalize, "unit": 2.0}
    result = population_search(model, x, y, generator=seeded(5), **options)
    optimizer, losses = PatternSearch(net.parameters(), generator=seeded(5)), []

    def closure():
        logits = net(x)
        for p in net.parameters():
            logits = logits / (p.norm() / 2) if normalize and p.ndim > 1 else logits
        return F.cross_entropy(logits, y)

    losses = [optimizer.step(closure) for _ in range(40)]
    torch.testing.assert_close(result.history, torch.tensor(losses, dtype=torch.float64), rtol=1e-10, atol=0)
    for theirs, ours in zip(net.parameters(), result.params.values(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
    assert result.radius == optimizer.param_groups[0]["radius"]


@pytest.mark.parametrize("at_once", [20_000_000, 900])
@pytest.mark.parametrize("make", [
    perceptron, partial(perceptron, bias=False), lambda: nn.Linear(6, 2).double(),
    lambda: nn.Sequential(nn.Sigmoid(), nn.Linear(6, 3), nn.Linear(3, 2), nn.Tanh()).double(),
])  # fmt: skip
def test_the_loss_of_a_move_from_the_layers_at_hand_is_that_of_a_forward_pass(make, at_once, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    (x, y), model = task(), make()
    net = module._Population(model, x)
    assert _Trace.fits(net)
    judge, moves = _Judge(net, x, y, 1.5, None), list(range(2 * sum(p.numel() for p in net.params.values())))
    tried = _moved(net.params, moves, 0.75)
    expected = []
    for k in moves:
        logits = functional_call(model, {name: p[k] for name, p in tried.items()}, (x,))
        for p in tried.values():
            logits = logits / (p[k].norm() / 1.5) if p[k].ndim > 1 else logits
        expected.append(F.cross_entropy(logits, y).detach())
    torch.testing.assert_close(_Trace(judge, net.params)(moves, 0.75), torch.stack(expected), rtol=1e-10, atol=1e-12)  # fmt: skip
    torch.testing.assert_close(judge(tried), torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_layers_that_share_weights_are_not_traced():
    layer = nn.Linear(6, 6).double()
    model, (x, y) = nn.Sequential(layer, nn.ReLU(), layer), task()
    assert not _Trace.fits(module._Population(model, x))
    result = population_search(model, x, y, max_steps=20, stop_accuracy=None, generator=seeded())
    assert result.loss == pytest.approx(recomputed(model, result, x, y), rel=1e-12)


def recomputed(model, result, x, y, normalize=True):
    logits = functional_call(model, result.params, (x,))
    for p in result.params.values():
        logits = logits / p.norm() if normalize and p.ndim > 1 else logits
    return float(F.cross_entropy(logits, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["pattern", "random"])
def test_a_search_never_rises_ends_where_it_says_and_touches_nothing(method, dtype):
    (x, y), net = task(20, 3, dtype), perceptron(dtype, 3)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    options = {"method": method, "population": 64, "patience": 5, "max_steps": 25, "stop_accuracy": None}
    one, two = (population_search(net, x, y, generator=seeded(), **options) for _ in range(2))
    assert len(one.history) == 25
    assert (one.history.diff() <= 0).all()
    assert one.loss == one.history[-1] < one.history[0]
    tol = 1e-6 if dtype != torch.bfloat16 else 0.02
    assert one.loss == pytest.approx(recomputed(net, one, x, y), rel=tol)
    accuracy = (functional_call(net, one.params, (x,)).argmax(1) == y).double().mean()
    assert one.accuracy == pytest.approx(float(accuracy))
    for name, p in one.params.items():
        assert p.dtype == dtype
        assert torch.equal(p, two.params[name])
        assert torch.equal(before[name], net.state_dict()[name])
    assert one.history.tolist() == two.history.tolist()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["pattern", "random"])
def test_a_search_stops_at_an_accuracy_at_a_radius_and_at_its_steps(method):
    (x, _), net = task(), perceptron()
    y = (x[:, 0] > 0).long()
    run = partial(
        population_search,
        net,
        x,
        y,
        method=method,
        population=100,
        patience=2,
        max_steps=300,
        normalize=False,
    )
    solved = run(generator=seeded())
    assert solved.accuracy == 1.0
    part = run(generator=seeded(), stop_accuracy=0.75)
    assert part.accuracy >= 0.75
    assert len(part.history) <= len(solved.history)
    assert len(run(max_steps=3, stop_accuracy=None).history) == 3
    start = run(stop_accuracy=0.0)
    assert start.n_evals == len(start.history) == 0
    assert start.loss == pytest.approx(recomputed(net, start, x, y, normalize=False), rel=1e-12)
    ended = run(min_radius=0.25, stop_accuracy=None, generator=seeded())
    assert ended.radius == 0.125
    if method == "pattern":  # no move of the last radius helps
        with torch.no_grad():
            for p, found in zip(net.parameters(), ended.params.values(), strict=True):
                p.copy_(found)
        options = {"radius": 0.25, "max_steps": 1, "stop_accuracy": None, "normalize": False}
        again = population_search(net, x, y, **options)
        assert again.loss == ended.loss
        assert again.n_evals == 2 * sum(p.numel() for p in net.parameters())


def test_any_function_of_logits_is_a_loss():
    """The number of errors has no gradient, and numpy no trace of one."""
    (x, y), net = task(), perceptron()
    errors = lambda logits, y: int((logits.numpy().argmax(1) != y.numpy()).sum())  # noqa: E731
    result = population_search(net, x, y, loss_fn=errors, population=64, max_steps=200, generator=seeded())
    assert result.loss == round(12 * (1 - result.accuracy))
    assert result.loss < errors(net(x).detach(), y) or result.loss == 0
    plain, same = (
        population_search(net, x, y, loss_fn=loss, population=64, max_steps=15, stop_accuracy=None, generator=seeded())
        for loss in (None, F.cross_entropy)
    )  # fmt: skip
    torch.testing.assert_close(plain.history, same.history, rtol=1e-10, atol=0)


P = torch.ones(2)
NET, (X, Y) = perceptron(), task()


@pytest.mark.parametrize(("options", "words"), [
    ({"method": "simplex"}, "method must be one of"), ({"population": 0}, "population must be an integer of at least 1"), ({"patience": 0}, "patience must be an integer"),
    ({"max_steps": 0}, "max_steps must be an integer"), ({"radius": 0.0}, "radius must be greater than 0"), ({"shrink": 1.0}, r"shrink must be in \(0, 1\)"),
    ({"min_radius": -1.0}, "min_radius must be at least 0"), ({"stop_accuracy": 1.1}, "stop_accuracy must be in"), ({"unit": 0.0}, "unit must be greater than 0"), ({"loss_fn": 3}, "loss_fn must be a function"),
    ({"loss_fn": lambda logits, y: logits[0]}, "loss_fn must return a scalar"), ({"loss_fn": lambda logits, y: math.nan}, "loss_fn must be a number at the start, got NaN"),
    ({"y": Y.double()}, "y must hold class indices"), ({"x": X * math.inf}, "x must be finite"), ({"y": Y + 1}, r"y must be in 0\.\.1"), ({"model": nn.Dropout()}, "model must have parameters"),
])  # fmt: skip
def test_bad_settings_of_a_search_are_refused_by_name(options, words, as_a_user):
    with pytest.raises(ValueError, match=words):
        population_search(**{"model": NET, "x": X, "y": Y, **options})


@pytest.mark.parametrize("make", [PatternSearch, GreedyRandomSearch])
def test_bad_settings_and_closures_of_an_optimiser_are_refused_by_name(make, as_a_user):
    for options, words in (
        ({"radius": 0.0}, "radius must be greater than 0"),
        ({"radius": math.nan}, "radius must be"),
        ({"shrink": 1.0}, "shrink must be in"),
        ({"shrink": 0.0}, "shrink must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            make([P], **options)
        with pytest.raises(ValueError, match=words):
            make([{"params": [P], **options}])
    for bad in (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="params must be real floating-point"):
            make([bad])
    optimizer = make([P])
    for closure, words in (
        (None, "closure must be a function that returns the loss"),
        (lambda: P, r"closure must return a scalar loss, got shape \(2,\)"),
        (lambda: None, "closure must return a scalar loss, got NoneType"),
        (lambda: P.sum() * math.nan, "closure must return a number before a move, got NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.step(closure)
    assert torch.equal(P, torch.ones(2))
    if make is GreedyRandomSearch:
        with pytest.raises(ValueError, match="patience must be an integer of at least 1"):
            make([P], patience=0)
