from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from posterity.optimization import NormalizedGD, SignDescent
from posterity.testing import check_optimizer

INF = float("inf")


def drive(make, gradients, start, n_groups=1):
    """Return parameters after each of the given gradients, one list of tensors a step."""
    params = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in start]
    groups = [{"params": params}] if n_groups == 1 else [{"params": [p]} for p in params]
    optimizer, path = make(groups), []
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


START = [[1.0, -2.0], [[0.5, 3.0, -1.0]]]
GRADS = [
    [[3.0, -4.0], [[0.0, 12.0, 0.0]]], [[0.1, 0.0], [[-2.0, 0.0, 1.0]]], [[0.0, 0.0], [[0.0, 0.0, 0.0]]],
    [[-1e-8, 5.0], [[1e3, -1.0, 0.0]]], [[2.0, 2.0], [[2.0, 2.0, 2.0]]], [[-1.0, 1e-3], [[0.25, 0.0, -7.0]]],
]  # fmt: skip


def by_hand(direction, momentum, lr, decay=0.0, averaged=False):
    """Return the path of numpy: all entries as one vector."""
    x, b, path = np.concatenate([np.ravel(each) for each in START]), np.zeros(5), []
    for grads in GRADS:
        g = np.concatenate([np.ravel(each) for each in grads])
        x = x * (1 - lr * decay)
        if averaged:
            b = momentum * b + (1 - momentum) * g
            x = x - lr * np.sign(b)
        else:
            b = momentum * b + direction(g)
            x = x - lr * b
        path.append(x.copy())
    return path


def lengths(order):
    return lambda g: g / max(np.linalg.norm(g, order), 1e-300)


def blocks(order):
    return lambda g: np.concatenate([lengths(order)(g[:2]), lengths(order)(g[2:])])


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(("make", "hand"), [
    (partial(SignDescent, lr=0.1), partial(by_hand, np.sign, 0.0, 0.1)),
    (partial(SignDescent, lr=0.1, momentum=0.9, weight_decay=0.2), partial(by_hand, np.sign, 0.9, 0.1, 0.2)),
    (partial(SignDescent, lr=0.1, momentum=0.9, order="momentum-then-sign"), partial(by_hand, None, 0.9, 0.1, averaged=True)),
    (partial(SignDescent, lr=0.1, momentum=0.9, rescale=True), partial(by_hand, lambda g: np.sign(g) * abs(g).sum(), 0.9, 0.1)),
    (partial(NormalizedGD, lr=0.1, momentum=0.9), partial(by_hand, lengths(2), 0.9, 0.1)),
    (partial(NormalizedGD, lr=0.1, norm=1), partial(by_hand, lengths(1), 0.0, 0.1)),
    (partial(NormalizedGD, lr=0.1, norm=INF, momentum=0.5), partial(by_hand, lengths(np.inf), 0.5, 0.1)),
    (partial(NormalizedGD, lr=0.1, norm=3, momentum=0.5, weight_decay=0.1), partial(by_hand, lengths(3), 0.5, 0.1, 0.1)),
    (partial(NormalizedGD, lr=0.1, momentum=0.9, scope="tensor"), partial(by_hand, blocks(2), 0.9, 0.1)),
    (partial(NormalizedGD, lr=0.1, scope="tensor", norm=INF), partial(by_hand, blocks(np.inf), 0.0, 0.1)),
])  # fmt: skip
def test_six_steps_along_given_gradients_are_those_of_the_formula(make, hand, foreach, n_groups):
    path = drive(partial(make, foreach=foreach), GRADS, START, n_groups)
    for ours, theirs in zip(path, hand(), strict=True):
        flat = torch.cat([p.reshape(-1) for p in ours]).numpy()
        np.testing.assert_allclose(flat, theirs, rtol=1e-13, atol=1e-13)
    assert torch.equal(drive(partial(make, maximize=True), [[np.negative(g).tolist() for g in grads] for grads in GRADS],
                             START)[-1][0], path[-1][0])  # fmt: skip


def test_adam_without_memory_is_sign_descent():
    def train(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        x = torch.randn(32, 4, dtype=torch.float64)
        optimizer = make(net.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            (net(x) - x.prod(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(net.parameters())

    adam = train(partial(torch.optim.Adam, betas=(0.0, 0.0), eps=1e-30))
    torch.testing.assert_close(train(SignDescent), adam, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(train(partial(SignDescent, momentum=0.1)), adam, rtol=1e-3)


@pytest.mark.parametrize("make", [
    partial(SignDescent, momentum=0.9), *(partial(NormalizedGD, norm=p, scope=scope) for p in (1, 2, INF) for scope in ("all", "tensor")),
])  # fmt: skip
@pytest.mark.parametrize("scale", [1e-30, 7.0, 1e25])
def test_the_size_of_the_loss_does_not_matter_even_where_squares_leave_float32(make, scale):
    def train(scale):
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        y = torch.tensor([0.5], requires_grad=True)
        optimizer = make([x, y], lr=0.05)
        for _ in range(8):
            optimizer.zero_grad()
            (scale * ((x**2).sum() + (y - x.sum()) ** 2)).backward()
            optimizer.step()
        return torch.cat([x, y]).detach()

    torch.testing.assert_close(train(scale), train(1.0), rtol=1e-5, atol=1e-6)


def test_a_step_has_the_length_that_lr_says():
    x, y = torch.randn(5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    grads = [[torch.randn(5).tolist(), torch.randn(2, 3).tolist()]]

    def moved(make):
        after = drive(make, grads, [x.tolist(), y.tolist()])[0]
        return [(after[0] - x).reshape(-1), (after[1] - y).reshape(-1)]

    assert float(torch.cat(moved(partial(NormalizedGD, lr=0.3))).norm()) == pytest.approx(0.3, rel=1e-12)
    for part in moved(partial(NormalizedGD, lr=0.3, scope="tensor")):
        assert float(part.norm()) == pytest.approx(0.3, rel=1e-12)
    for part in moved(partial(SignDescent, lr=0.3)):
        torch.testing.assert_close(part.abs(), torch.full_like(part, 0.3))


def test_a_gradient_of_zero_an_empty_and_a_single_parameter():
    for make in (
        partial(SignDescent, rescale=True),
        NormalizedGD,
        partial(NormalizedGD, scope="tensor", norm=INF),
    ):
        params = [
            torch.ones(3, requires_grad=True),
            torch.ones(0, 2, requires_grad=True),
            torch.ones((), requires_grad=True),
        ]
        for p in params:
            p.grad = torch.zeros_like(p)
        make(params).step()
        assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in params)
        params[2].grad = torch.tensor(-2.0)
        make(params, lr=0.5).step()
        assert params[2].item() == 1.5 + 0.5 * (make is not NormalizedGD and "rescale" in make.keywords)


@pytest.mark.parametrize("options", [
    {"lr": 0.02, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.9, "order": "momentum-then-sign"},
    {"lr": 2e-3, "momentum": 0.8, "rescale": True},
])  # fmt: skip
def test_sign_descent_keeps_every_promise_of_an_optimiser(options):
    check_optimizer(partial(SignDescent, **options), steps=300, tol=0.05)


@pytest.mark.parametrize(
    "options", [{"lr": 0.03, "momentum": 0.9}, {"lr": 0.2, "scope": "tensor", "norm": 1}]
)
def test_normalised_descent_keeps_every_promise_of_an_optimiser(options):
    check_optimizer(partial(NormalizedGD, **options), steps=300, tol=0.05)


def test_gradients_add_up_beyond_the_range_of_float16():
    p = torch.zeros(1000, dtype=torch.float16, requires_grad=True)
    p.grad = torch.full((1000,), 1000.0, dtype=torch.float16)  # a norm of 31,623, and 1e6 in the 1-norm
    NormalizedGD([p], lr=1000.0, norm=1).step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -1.0))
    with pytest.raises(ValueError, match="rescale must be False for parameters in float16"):
        SignDescent([p], rescale=True).step()
    q = torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)
    q.grad = torch.full((1000,), 1024.0, dtype=torch.bfloat16)
    SignDescent([q], lr=2.0**-20, rescale=True).step()
    torch.testing.assert_close(q.detach(), torch.full_like(q, -1000 / 1024))


def test_only_momentum_needs_memory():
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    for make in (SignDescent, NormalizedGD):
        optimizer = make([p])
        optimizer.step()
        assert not optimizer.state[p]
        optimizer = make([p], momentum=0.5)
        optimizer.step()
        assert list(optimizer.state[p]) == ["momentum_buffer"]


@pytest.mark.parametrize(("make", "words"), [
    (partial(SignDescent, lr=-1.0), "lr must be at least 0"), (partial(SignDescent, lr=float("nan")), "lr must be at least 0"),
    (partial(SignDescent, momentum=1.0), "momentum must be in"), (partial(SignDescent, momentum=-0.1), "momentum must be in"),
    (partial(SignDescent, weight_decay=-1e-4), "weight_decay must be"), (partial(SignDescent, order="both"), "order must be one of"),
    (partial(SignDescent, rescale=True, order="momentum-then-sign"), "rescale must be False"),
    (partial(NormalizedGD, norm=0.0), "norm must be in"), (partial(NormalizedGD, norm=-1.0), "norm must be in"),
    (partial(NormalizedGD, scope="row"), "scope must be one of"), (partial(NormalizedGD, momentum=1.5), "momentum must be in"),
])  # fmt: skip
def test_bad_settings_are_refused_of_the_optimiser_and_of_a_group(make, words, as_a_user):
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=words):
        make([p])
    with pytest.raises(ValueError, match=words):
        make.func([{"params": [p], **make.keywords}])


def test_complex_and_sparse_ones_are_refused_by_name(as_a_user):
    for make in (SignDescent, NormalizedGD):
        with pytest.raises(ValueError, match="params must be real, got a complex one"):
            make([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
        p = torch.ones(3, 2, requires_grad=True)
        nn.functional.embedding(torch.tensor([0]), p, sparse=True).sum().backward()
        with pytest.raises(ValueError, match="gradients must be dense, got a sparse one"):
            make([p]).step()
        assert torch.equal(p.detach(), torch.ones(3, 2))
