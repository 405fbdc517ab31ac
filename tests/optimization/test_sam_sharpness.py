import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.claims.optimization.sam_sharpness import _Diagonal
from posterity.optimization import SAM, sam_gradient
from posterity.testing import check_optimizer

A = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 0.25]], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def quadratic(x):
    return x @ A @ x / 2


def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return closure


def by_hand(x, steps, rho, lr, momentum=0.0, decay=0.0, adaptive=False):
    """Return the path of numpy on the quadratic; decay and momentum are SGD's."""
    a, x, b = A.numpy(), x.numpy().copy(), 0.0
    for _ in range(steps):
        size = np.abs(x) if adaptive else np.ones(3)
        along = size * (a @ x)
        g = a @ (x + rho * size * along / np.linalg.norm(along)) + decay * x
        b = momentum * b + g
        x = x - lr * b
    return x


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("options", [
    {"rho": 0.3}, {"rho": 0.3, "momentum": 0.9, "decay": 0.1}, {"rho": 0.5, "adaptive": True}, {"rho": 0.0, "momentum": 0.5},
])  # fmt: skip
def test_steps_on_a_quadratic_are_those_of_the_formula_over_all_groups_together(options, split):
    parts = [START[:1].clone().requires_grad_(), START[1:].clone().requires_grad_()]
    names = {"rho": "rho", "momentum": "momentum", "decay": "weight_decay", "adaptive": "adaptive"}
    settings = {names[key]: value for key, value in options.items()}
    optimizer = SAM([{"params": [p]} for p in parts] if split else parts, lr=0.05, **settings)
    first = START @ A @ START / 2
    for k in range(6):
        value = optimizer.step(closure_of(optimizer, lambda: quadratic(torch.cat(parts))))
        if not k:
            torch.testing.assert_close(value, first)
    got = torch.cat(parts).detach().numpy()
    np.testing.assert_allclose(got, by_hand(START, 6, lr=0.05, **options), rtol=1e-12, atol=1e-12)


def test_a_group_has_its_own_rho_along_the_common_direction():
    parts = [START[:1].clone().requires_grad_(), START[1:].clone().requires_grad_()]
    optimizer = SAM([{"params": parts[:1], "rho": 0.4}, {"params": parts[1:]}], lr=0.1, rho=0.1)
    optimizer.step(closure_of(optimizer, lambda: quadratic(torch.cat(parts))))
    g = A @ START
    moved = START + torch.tensor([0.4, 0.1, 0.1]) * g / g.norm()
    torch.testing.assert_close(torch.cat(parts).detach(), START - 0.1 * (A @ moved))


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return net, torch.randn(32, 4), torch.randint(3, (32,))


@pytest.mark.parametrize(("base", "options"), [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}), (torch.optim.AdamW, {"lr": 0.01}),
])  # fmt: skip
def test_without_rho_it_is_the_base_optimiser_bit_for_bit(base, options):
    results = []
    for make in (partial(base, **options), partial(SAM, base_optimizer=base, rho=0.0, **options)):
        net, x, y = network()
        optimizer = make(net.parameters())
        for _ in range(10):
            optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(net(x), y)))  # noqa: B023
        results.append(nn.utils.parameters_to_vector(net.parameters()))
    assert torch.equal(*results)


def test_ascend_then_descend_is_a_step_and_the_perturbation_is_undone_exactly():
    one, x, y = network()
    two = copy.deepcopy(one)
    step, halves = (SAM(net.parameters(), lr=0.1, rho=0.7, momentum=0.9) for net in (one, two))
    for _ in range(3):
        step.step(closure_of(step, lambda: F.cross_entropy(one(x), y)))
        for half in (halves.ascend, halves.descend):
            closure_of(halves, lambda: F.cross_entropy(two(x), y))()
            half()
    flat = nn.utils.parameters_to_vector
    assert torch.equal(flat(one.parameters()), flat(two.parameters()))
    still = SAM(one.parameters(), lr=0.0, rho=0.123)
    before = flat(one.parameters()).clone()
    for _ in range(5):
        still.step(closure_of(still, lambda: F.cross_entropy(one(x), y)))
    assert torch.equal(flat(one.parameters()), before)


def test_it_comes_to_within_rho_of_a_minimum():
    for rho in (0.1, 0.01):
        x = (rho * A @ A @ START).requires_grad_()
        optimizer = SAM([x], lr=0.15, rho=rho)
        for _ in range(100):
            optimizer.step(closure_of(optimizer, lambda: quadratic(x)))  # noqa: B023
        assert 0.3 * rho < x.norm() < rho  # where the base optimiser comes nearer


def test_directions_are_those_of_large_and_small_gradients_alike():
    for scale in (1e-30, 1e25):
        x = START.float().requires_grad_()
        optimizer = SAM([x], lr=0.0, rho=0.5, eps=0.0)
        (scale * quadratic(x.double())).backward()
        optimizer.ascend()
        g = A @ START
        torch.testing.assert_close(x.detach(), (START + 0.5 * g / g.norm()).float())


def test_a_gradient_of_zero_makes_no_perturbation():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for eps in (1e-12, 0.0):
        optimizer = SAM([x], lr=0.1, eps=eps)
        optimizer.step(closure_of(optimizer, lambda: quadratic(x)))
        assert torch.equal(x.detach(), torch.zeros_like(x))


@pytest.mark.parametrize(("make", "steps"), [
    (partial(SAM, lr=0.02, momentum=0.8, rho=0.02), 40), (partial(SAM, base_optimizer=torch.optim.Adam, lr=0.2, rho=0.02), 80),
])  # fmt: skip
def test_it_keeps_every_promise_of_an_optimiser(make, steps):
    check_optimizer(make, closure=True, steps=steps, tol=0.05)


def test_it_keeps_every_promise_of_an_optimiser_when_adaptive():
    check_optimizer(
        partial(SAM, lr=0.02, momentum=0.8, rho=0.02, adaptive=True), closure=True, setting=("rho", 0.5), steps=40, tol=0.05
    )  # fmt: skip


def test_a_copy_and_what_was_pickled_go_on_the_same():
    def five(net, optimizer):
        for _ in range(5):
            optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(net(x), y)))
        return nn.utils.parameters_to_vector(net.parameters())

    net, x, y = network()
    optimizer = SAM(net.parameters(), torch.optim.Adam, lr=0.05, rho=0.1, eps=1e-3)
    five(net, optimizer)
    copied = copy.deepcopy((net, optimizer))
    file = io.BytesIO()
    torch.save((net, optimizer), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = five(net, optimizer)
    for twin in (copied, loaded):
        assert twin[1].base_optimizer.param_groups is twin[1].param_groups
        assert torch.equal(five(*twin), expected)


def test_training_with_a_gradient_scaler_is_training_without():
    def train(scaler, overflow=()):
        net, x, y = network()
        optimizer = SAM(net.parameters(), lr=0.1, rho=0.2, momentum=0.9)
        for k in range(6):
            before = nn.utils.parameters_to_vector(net.parameters()).clone()
            for half in (0, 1):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y) * (float("inf") if (k, half) in overflow else 1.0)
                scaler.scale(loss).backward()
                if half == 0:
                    optimizer.ascend()
                else:
                    if k == 1:  # to clip, as its users do
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
            if any(when == k for when, _ in overflow):
                assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), before)
            scaler.update()
        return nn.utils.parameters_to_vector(net.parameters())

    plain = train(torch.amp.GradScaler("cpu", enabled=False))
    torch.testing.assert_close(
        train(torch.amp.GradScaler("cpu", init_scale=1024.0)), plain, rtol=1e-5, atol=1e-6
    )
    train(torch.amp.GradScaler("cpu", init_scale=1024.0), overflow={(2, 0), (4, 1)})


def regression():
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return draw(4), draw(7, 4), draw(7)


def sample_loss(params, x, y):
    return (torch.tanh(x @ params) - y) ** 2


@pytest.mark.parametrize("group_size", [None, 1, 3, 7, 100])
def test_the_gradient_is_the_mean_over_groups_of_a_loop(group_size):
    params, x, y = regression()
    size, total = min(group_size or 7, 7), torch.zeros(4, dtype=torch.float64)
    for start in range(0, 7, size):  # 3 leaves a last group of one
        rows = range(start, min(start + size, 7))

        def gradient(at, rows=rows):
            at = at.detach().requires_grad_()
            loss = sum(sample_loss(at, x[k], y[k]) for k in rows) / len(rows)
            return torch.autograd.grad(loss, at)[0]

        g = gradient(params)
        total += len(rows) * gradient(params + 0.3 * g / g.norm())
    got = sam_gradient(sample_loss, params, x, y, rho=0.3, group_size=group_size, eps=0.0)
    torch.testing.assert_close(got, total / 7, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_whole_batch_is_the_optimisers():
    params, x, y = regression()
    p = params.clone().requires_grad_()
    optimizer = SAM([p], lr=1.0, rho=0.3)
    optimizer.step(closure_of(optimizer, lambda: torch.vmap(sample_loss, (None, 0, 0))(p, x, y).mean()))
    torch.testing.assert_close(params - p.detach(), sam_gradient(sample_loss, params, x, y, rho=0.3))


def test_the_claims_net_has_the_gradients_and_the_hessian_of_autograd():
    generator = torch.Generator().manual_seed(0)
    X, at = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((5, 7), (14,)))

    def sample(z, x, y):
        return (x @ (z[:7] ** 2 - z[7:] ** 2) - y) ** 2

    for fitted in (False, True):  # the largest eigenvalue is asked of interpolators alone
        y = X @ (at[:7] ** 2 - at[7:] ** 2) + (0.0 if fitted else 1.0)
        net = _Diagonal(X.numpy(), y.numpy())
        hessian = torch.func.hessian(lambda z: torch.vmap(sample, (None, 0, 0))(z, X, y).mean())(at)  # noqa: B023
        assert net.trace(at.numpy()) == pytest.approx(float(hessian.trace()), rel=1e-12)
        if fitted:
            assert net.loss(at.numpy()) < 1e-24
            assert net.top(at.numpy()) == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-12)
            continue
        whole = sam_gradient(sample, at, X, y, rho=0.3)
        np.testing.assert_allclose(net.gradient(at.numpy(), 0.3), whole, rtol=1e-12)
        parts = [_Diagonal(net.X[k : k + 1], net.y[k : k + 1]).gradient(at.numpy(), 0.3) for k in range(5)]
        alone = sam_gradient(sample, at, X, y, rho=0.3, group_size=1)
        np.testing.assert_allclose(np.mean(parts, axis=0), alone, rtol=1e-12)


def test_the_order_of_samples_matters_to_groups_between_one_and_all_alone():
    params, x, y = regression()
    order = torch.tensor([3, 1, 0, 6, 5, 2, 4])
    for group_size, same in ((None, True), (1, True), (3, False)):
        ours, other = (
            sam_gradient(sample_loss, params, x[rows], y[rows], rho=0.5, group_size=group_size)
            for rows in (torch.arange(7), order)
        )
        assert torch.allclose(ours, other, rtol=1e-12, atol=1e-14) == same


def test_gradients_of_many_parameters_are_added_up_in_parts(monkeypatch):
    import posterity.optimization.sam_sharpness as module

    params, x, y = regression()
    whole = sam_gradient(sample_loss, params, x, y, rho=0.3, group_size=2)
    monkeypatch.setattr(module, "GRADIENTS_AT_ONCE", 8)
    torch.testing.assert_close(sam_gradient(sample_loss, params, x, y, rho=0.3, group_size=2), whole)


def test_low_precision_gradients_scales_and_inference_mode():
    params, x, y = regression()
    exact = sam_gradient(sample_loss, params, x, y, rho=0.3, group_size=2)
    narrow = sam_gradient(sample_loss, params.bfloat16(), x.bfloat16(), y.bfloat16(), rho=0.3, group_size=2)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - exact).norm() < 0.03 * exact.norm()
    with torch.inference_mode():
        given = [part.clone() for part in (params, x, y)]
        torch.testing.assert_close(sam_gradient(sample_loss, *given, rho=0.3, group_size=2), exact)
    small = sam_gradient(
        lambda p, x, y: 1e-25 * sample_loss(p, x, y), params.float(), x.float(), y.float(), rho=0.3, eps=0.0
    )
    torch.testing.assert_close(1e25 * small.double(), sam_gradient(sample_loss, params, x, y, rho=0.3), rtol=1e-4, atol=1e-5)  # fmt: skip


P = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: SAM([P], rho=-0.1), "rho must be at least 0"), (lambda: SAM([P], rho=float("inf")), "rho must be at least 0"),
    (lambda: SAM([{"params": [P], "rho": float("nan")}]), "rho must be at least 0"),
    (lambda: SAM([P], eps=-1.0), "eps must be at least 0"), (lambda: SAM([P], adaptive=2), "adaptive must be one of"),
    (lambda: SAM([P], lambda params: nn.Linear(1, 1)), "base_optimizer must make a torch.optim.Optimizer, got one of Linear"),
    (lambda: SAM([P.detach().bfloat16()]), "float32 or float64, got one in bfloat16"),
    (lambda: SAM([P.detach().half()]), "float32 or float64, got one in float16"),
    (lambda: SAM([torch.ones(1, dtype=torch.complex64)]), "params must be real"),
    (lambda: SAM([P]).step(), "closure must be given"), (lambda: SAM([P]).descend(), "params must be perturbed by ascend"),
    (lambda: SAM([P]).step(lambda: None), "closure must call backward"),
    (lambda: sam_gradient(sample_loss, torch.ones(2), torch.ones(3, 2), torch.ones(3), rho=-1.0), "rho must be at least 0"),
    (lambda: sam_gradient(sample_loss, torch.ones(2), torch.ones(3, 2), torch.ones(3), rho=1.0, group_size=0), "group_size must be an integer of at least 1"),
    (lambda: sam_gradient(sample_loss, torch.ones(2), torch.ones(3, 2), torch.ones(4), rho=1.0), r"one positive length, got \[3, 4\]"),
    (lambda: sam_gradient(sample_loss, torch.ones(2), torch.ones(0, 2), torch.ones(0), rho=1.0), "one positive length"),
    (lambda: sam_gradient(sample_loss, torch.ones(2), rho=1.0), "batch must hold at least one tensor"),
    (lambda: sam_gradient(sample_loss, torch.ones(2, 1), torch.ones(3, 2), rho=1.0), "params must have shape"),
    (lambda: sam_gradient(sample_loss, torch.ones(2).long(), torch.ones(3, 2), rho=1.0), "params must be a floating-point"),
    (lambda: sam_gradient(lambda p, x: p * x, torch.ones(2), torch.ones(3, 2), rho=1.0), "sample_loss must return a scalar"),
])  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, words):
    P.grad = None
    with pytest.raises(ValueError, match=words):
        call()


def test_the_base_optimiser_refuses_its_settings_itself():
    with pytest.raises(TypeError, match="betas"):
        SAM([P], torch.optim.SGD, betas=(0.9, 0.99))


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("how", ["gradient", "error", "sparse"])
def test_a_broken_half_leaves_the_parameters_where_they_were(how, broken, as_a_user):
    weight = torch.arange(1.0, 9.0).reshape(4, 2).requires_grad_()
    optimizer = SAM([weight], lr=0.1, rho=0.5)
    calls = []

    def closure():
        optimizer.zero_grad()
        bad = len(calls) == broken
        calls.append(1)
        loss = F.embedding(torch.tensor([0, 2]), weight, sparse=bad and how == "sparse").square().sum()
        (loss * float("nan") if bad and how == "gradient" else loss).backward()
        if bad and how == "error":
            raise KeyError("theirs")

    words = {"gradient": "finite gradients", "error": "theirs", "sparse": "sparse"}[how]
    with pytest.raises(KeyError if how == "error" else ValueError, match=words):
        optimizer.step(closure)
    assert torch.equal(weight.detach(), torch.arange(1.0, 9.0).reshape(4, 2))
    calls.extend([1, 1])
    optimizer.step(closure)  # and the optimiser goes on
    assert not torch.equal(weight.detach(), torch.arange(1.0, 9.0).reshape(4, 2))


def test_halves_in_the_wrong_order_are_refused(as_a_user):
    x = START.clone().requires_grad_()
    optimizer = SAM([x], lr=0.1)
    quadratic(x).backward()
    optimizer.ascend()
    with pytest.raises(ValueError, match="descend must be called between"):
        optimizer.ascend()
    x.grad = torch.full_like(x, float("inf"))
    with pytest.raises(ValueError, match="finite gradients"):
        optimizer.descend()
    assert torch.equal(x.detach(), START)
    with pytest.raises(ValueError, match="params must be perturbed by ascend"):
        optimizer.descend()
