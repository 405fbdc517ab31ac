"""Forward gradients: unbiased, with the variance of their closed form, and without a stored graph."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import posterity.optimization.local_forward_gradient as module
from posterity.claims import Trial
from posterity.claims.optimization import local_forward_gradient as claims
from posterity.lab.data import split
from posterity.optimization import activity_gradient, estimator_variance, forward_gradient

D = 3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic():
    """A loss of two parameters that together have D entries, and its gradient."""
    point = torch.randn(D, dtype=torch.float64, generator=rng(1))
    matrix = torch.randn(D, D, dtype=torch.float64, generator=rng(2))

    def loss(p):
        y = matrix @ torch.cat([p["a"].flatten(), p["b"]])
        return y @ y / 2

    return loss, {"a": point[:2].reshape(2, 1).clone(), "b": point[2:].clone()}, matrix.T @ (matrix @ point)


@pytest.fixture
def expectation(as_a_user, monkeypatch):
    """Expectation over the noise, exactly: over all signs, or by quadrature for polynomials of degree 5."""
    left = []

    def given(like, shape, *_):
        return torch.stack([left.pop(0) for _ in range(math.prod(shape))]).reshape(shape)

    def expect(estimate, distribution, dim=4):
        monkeypatch.setattr(module, "_draw", given)
        points = (
            {-1.0: 1 / 2, 1.0: 1 / 2}
            if distribution == "rademacher"
            else {0.0: 2 / 3, 3**0.5: 1 / 6, -(3**0.5): 1 / 6}
        )
        total = 0.0
        for v in itertools.product(points, repeat=dim):
            left[:] = torch.tensor(v, dtype=torch.float64)
            total = total + math.prod(points[each] for each in v) * estimate()
            assert not left
        return total

    return expect


ONE = [("normal", 1), ("rademacher", -1)]


@pytest.mark.parametrize(("distribution", "one"), ONE)
def test_is_unbiased_and_has_the_variance_of_its_dimension(expectation, distribution, one):
    loss, params, true = quadratic()

    def estimate():
        grads = forward_gradient(loss, params, distribution=distribution)[1]
        return torch.cat([grads["a"].flatten(), grads["b"]])

    torch.testing.assert_close(expectation(estimate, distribution, D), true)
    squares = expectation(lambda: (estimate() - true).square().sum(), distribution, D)
    torch.testing.assert_close(squares, (D + one) * true.square().sum())


@pytest.mark.parametrize("m", [1, 4])
def test_draws_are_unbiased_and_samples_divide_their_variance(as_a_user, m):
    loss, params, true = quadratic()
    found = estimator_variance(
        lambda generator: torch.cat([g.flatten() for g in forward_gradient(loss, params, n_samples=m, generator=generator)[1].values()]),
        true, n_draws=400 // m, generator=rng(),
    )  # fmt: skip
    assert float(found["variance"]) == pytest.approx(float((D + 1) * true.square().sum() / m), rel=0.2)
    assert found["bias"] < 2 * (found["variance"] / (400 // m)).sqrt()


def test_noise_is_normal_or_signs():
    z = torch.zeros(200_000)
    squares = activity_gradient(lambda z: z * 1, z, generator=rng())[1]  # v^2
    for power, moment in ((1, 1), (2, 3), (3, 15)):
        assert float((squares**power).mean()) == pytest.approx(moment, rel=0.05)
    assert (activity_gradient(lambda z: z * 1, z, distribution="rademacher", generator=rng())[1] == 1).all()
    _, half = activity_gradient(
        lambda z: z[:, 0] * 1, z.view(-1, 2), distribution="rademacher", generator=rng()
    )
    assert abs(half[:, 1].mean()) < 0.02  # v_0 v_1


def test_samples_are_averaged_and_the_generator_decides():
    loss, params, _ = quadratic()
    together = forward_gradient(loss, params, n_samples=5, generator=rng())[1]
    generator = rng()
    apart = [forward_gradient(loss, params, generator=generator)[1] for _ in range(5)]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in apart]).mean(0))


def test_one_dimension_and_signs_are_exact():
    loss, grads = forward_gradient(
        lambda p: p["w"].exp().sum(), {"w": torch.tensor([0.5])}, distribution="rademacher"
    )
    torch.testing.assert_close(grads["w"], torch.tensor([0.5]).exp())
    torch.testing.assert_close(loss, torch.tensor(0.5).exp())


def test_trains_a_module_by_functional_call_without_storing_a_graph():
    net, x, y = nn.Linear(3, 2), torch.randn(8, 3, generator=rng()), torch.arange(8) % 2
    params = dict(net.named_parameters())
    seen = []

    def loss_fn(p):
        loss = F.cross_entropy(functional_call(net, p, x), y)
        seen.append(loss.requires_grad)
        return loss

    loss, grads = forward_gradient(loss_fn, params, n_samples=3, generator=rng())
    assert not any([loss.requires_grad, *seen, *(g.requires_grad for g in grads.values())])
    assert all(p.grad is None for p in net.parameters())
    assert {n: g.shape for n, g in grads.items()} == {n: p.shape for n, p in params.items()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_both_work_where_gradients_are_off(mode):
    loss, params, _ = quadratic()
    with mode():
        got = forward_gradient(loss, params, generator=rng())[1]["a"]
        z = torch.ones(2, 3)
        grad = activity_gradient(lambda z: z.square().sum(1), z, generator=rng())[1]
    assert torch.equal(got, forward_gradient(loss, params, generator=rng())[1]["a"])
    assert torch.equal(
        grad, activity_gradient(lambda z: z.square().sum(1), torch.ones(2, 3), generator=rng())[1]
    )


def test_the_global_generator_is_read_and_nothing_else_changes():
    loss, params, _ = quadratic()
    torch.manual_seed(5)
    first, state = forward_gradient(loss, params)[1]["a"], torch.get_rng_state()
    assert not torch.equal(forward_gradient(loss, params)[1]["a"], first)
    forward_gradient(loss, params, generator=rng())
    torch.manual_seed(5)
    assert torch.equal(forward_gradient(loss, params)[1]["a"], first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("distribution", "one"), ONE)
@pytest.mark.parametrize("lead", [0, 1, 2])
def test_activities_have_the_variance_of_their_own_slice(expectation, lead, distribution, one):
    z = torch.randn(1, 2, 2, dtype=torch.float64, generator=rng(1))

    def loss(z):
        return (z.sin() * 2).sum(tuple(range(1 + lead, 3))) if lead < 2 else z.sin() * 2

    true = 2 * z.cos()
    size = math.prod(z.shape[1 + lead :])

    def estimate():
        return activity_gradient(loss, z, distribution=distribution)[1]

    torch.testing.assert_close(expectation(estimate, distribution), true)
    own = tuple(range(1 + lead, 3)) or 0
    squares = expectation(lambda: (estimate() - true).square(), distribution).sum(own)
    expected = (size + one) * true.square().sum(own)
    torch.testing.assert_close(squares, expected)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_loss_is_paired_with_its_own_slice_whatever_else_it_sees(expectation, distribution):
    """Each sample's loss is that of the whole batch: the sample gets its own part of it, once."""
    z = torch.randn(2, 2, dtype=torch.float64, generator=rng(1))

    def estimate():
        return activity_gradient(lambda z: (z * z).sum().expand(2), z, distribution=distribution)[1]

    torch.testing.assert_close(expectation(estimate, distribution), 2 * z)


def test_the_weight_gradient_of_a_linear_layer_has_the_variance_of_its_samples(expectation):
    """(1 / B^2) sum_n ||x_n||^2 (q + 1) ||g_n||^2."""
    n, q = 2, 2
    x = torch.randn(n, 7, dtype=torch.float64, generator=rng(1))
    w = torch.randn(7, q, dtype=torch.float64, generator=rng(2))
    g = (x @ w).cos()

    def error():
        _, grad = activity_gradient(lambda z: z.sin().sum(1), x @ w)
        return (x.T @ (grad - g) / n).square().sum()

    expected = (x.square().sum(1) * (q + 1) * g.square().sum(1)).sum() / n**2
    torch.testing.assert_close(expectation(error, "normal"), expected)


def test_the_measured_variance_and_bias_are_those_of_the_draws():
    draws = list(torch.randn(50, 2, 3, dtype=torch.float64, generator=rng()))
    stack, true = torch.stack(draws), torch.ones(2, 3, dtype=torch.float64)
    found = estimator_variance(lambda _: draws.pop(0), true, n_draws=50)
    torch.testing.assert_close(found["variance"], stack.var(0).sum())
    torch.testing.assert_close(found["bias"], (stack.mean(0) - 1).norm())
    torch.testing.assert_close(
        found["cosine"], F.cosine_similarity(stack.mean(0).flatten(), true.flatten(), 0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_right_up_to_its_rounding(as_a_user, dtype):
    z = torch.randn(4, 64, generator=rng(1)).to(dtype)
    losses, low = activity_gradient(lambda z: z.square().sum(1), z, n_samples=64, generator=rng(2))
    _, exact = activity_gradient(lambda z: z.square().sum(1), z.float(), n_samples=64, generator=rng(2))
    assert low.dtype == losses.dtype == dtype
    assert (low - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()
    _, low = forward_gradient(lambda p: p["z"].square().sum(), {"z": z}, n_samples=64, generator=rng(2))
    _, exact = forward_gradient(
        lambda p: p["z"].square().sum(), {"z": z.float()}, n_samples=64, generator=rng(2)
    )
    assert low["z"].dtype == dtype
    assert (low["z"] - exact["z"]).norm() < 8 * torch.finfo(dtype).eps * exact["z"].norm()


def test_a_loss_of_one_number_counts_with_dimensions_and_without():
    found = [
        forward_gradient(lambda p, s=shape: p["w"].square().sum().reshape(s), W, generator=rng())
        for shape in ((), (1,))
    ]
    torch.testing.assert_close(found[0], found[1])


W, Z = {"w": torch.ones(2)}, torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward_gradient(lambda p: p["w"].sum(), {}), "params must be a dictionary with at least one tensor"),
        (lambda: forward_gradient(lambda p: p["w"].sum(), {"w": torch.arange(3)}), r"params\['w'\] must be a floating-point tensor"),
        (lambda: forward_gradient(lambda p: p["w"], W), "loss_fn must return a scalar tensor, got .*2"),
        (lambda: forward_gradient(lambda p: 1.0, W), "loss_fn must return a scalar tensor, got float"),
        (lambda: forward_gradient(lambda p: p["w"].sum() / 0 * 0, W), r"loss_fn\(params\) must be finite"),
        (lambda: forward_gradient(lambda p: p["w"].sum(), W, n_samples=0), "n_samples must be an integer of at least 1"),
        (lambda: forward_gradient(lambda p: p["w"].sum(), W, distribution="uniform"), "distribution must be one of"),
        (lambda: activity_gradient(lambda z: z.sum(0), Z), r"losses whose shape begins that of z, \(3, 2\), got torch.float32 \(2,\)"),
        (lambda: activity_gradient(lambda z: z.sum(), Z), "loss_fn must return floating-point losses"),
        (lambda: activity_gradient(lambda z: z.log().log().sum(1) * 0, Z - 1), r"loss_fn\(z\) must be finite"),
        (lambda: activity_gradient(lambda z: z.sum(1), Z.long()), "z must be a floating-point tensor"),
        (lambda: activity_gradient(lambda z: z.sum(1), Z[:0]), "z must have a batch axis and at least one value"),
        (lambda: activity_gradient(lambda z: z, torch.tensor(1.0)), "z must have a batch axis"),
        (lambda: activity_gradient(lambda z: z.sum(1), Z, n_samples=1.5), "n_samples must be an integer"),
        (lambda: activity_gradient(lambda z: z.sum(1), Z, distribution=None), "distribution must be one of"),
        (lambda: estimator_variance(lambda g: Z[0], Z), r"estimate\(generator\) must have shape \(3, 2\) for true"),
        (lambda: estimator_variance(lambda g: Z, Z, n_draws=1), "n_draws must be an integer of at least 2"),
        (lambda: estimator_variance(lambda g: Z, Z.long()), "true must be a floating-point tensor"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_training_images_without_spread_give_no_nan(monkeypatch, tmp_path):
    x = np.zeros((300, 8, 8), np.uint8)
    x[split(300, (64 / 300, 200 / 300, 36 / 300), 0)[2]] = 255  # the test images alone
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(300) % 2)
    seen = []
    monkeypatch.setattr(claims, "_train", lambda trial, method, lr, x, *_: seen.append(x) or (0.0, [0.0]))
    claims.activity(Trial(0), data=str(tmp_path / "images.npz"), n_train=64)
    assert all(each.isfinite().all() for each in seen)
