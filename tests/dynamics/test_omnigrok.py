"""Omnigrok against loops by hand, ridge regression on a sphere, AdamW at rest and curves drawn by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.dynamics import (
    GrokkingDelay,
    constrain_norm,
    generalization_time,
    grokking_delay,
    reduced_landscape,
    scale_weights_,
    weight_norm,
)
from posterity.testing import check_instrument


def mlp(seed=0, dtype=torch.float64, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(3, 8, bias), nn.ReLU(), nn.Linear(8, 6, bias), nn.ReLU(), nn.Linear(6, 2, bias)
        )
    return net.to(dtype)


def data(n=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def as_vector(net):
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


# --- norm and scale ---


def test_the_norm_is_of_all_trainable_parameters_as_one_vector_once():
    net = mlp()
    torch.testing.assert_close(weight_norm(net), as_vector(net).norm())
    torch.testing.assert_close(weight_norm(net.parameters()), as_vector(net).norm())
    net[2].requires_grad_(False)
    rest = torch.cat([net[0].weight.flatten(), net[0].bias, net[4].weight.flatten(), net[4].bias])
    torch.testing.assert_close(weight_norm(net), rest.detach().norm())
    tied = nn.Linear(4, 4, bias=False)
    torch.testing.assert_close(
        weight_norm(nn.Sequential(tied, nn.ReLU(), tied)), tied.weight.detach().double().norm()
    )


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 1e25), (torch.float16, 300.0), (torch.bfloat16, 1e-30)]
)
def test_the_norm_is_summed_in_float64(dtype, value):
    x = torch.full((10_000,), value, dtype=dtype)
    norm = weight_norm([x])
    assert norm.dtype == torch.float64 and not norm.requires_grad
    assert float(norm) == pytest.approx(100 * float(x[0]), rel=1e-12)


@pytest.mark.parametrize("factor", [0.3, 2.0])
def test_scaling_a_relu_network_of_three_layers_without_biases_cubes_the_factor(factor):
    net, (x, _) = mlp(bias=False), data()
    before = net(x)
    assert scale_weights_(net, factor) is net
    torch.testing.assert_close(net(x), factor**3 * before)


def test_scaling_multiplies_biases_and_leaves_frozen_parameters():
    net = mlp()
    net[2].weight.requires_grad_(False)
    before = copy.deepcopy(net)
    scale_weights_(net, 8.0)
    for (name, p), old in zip(net.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, old if name == "2.weight" else 8 * old)
    scale_weights_(net, 3.0 / weight_norm(net))
    assert float(weight_norm(net)) == pytest.approx(3.0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8)])
def test_a_normalisation_layer_is_named_in_a_warning(layer):
    net = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2))
    x, y = data(dtype=torch.float32)
    for call in (
        lambda: weight_norm(net),
        lambda: scale_weights_(net, 1.0),
        lambda: reduced_landscape(net, x, y, x, y, alphas=[1.0], n_steps=1),
    ):
        with pytest.warns(UserWarning, match=f"{type(layer).__name__} '1'"):
            call()


# --- the norm held ---


@pytest.mark.parametrize("norm", [None, 5.0])
def test_training_is_that_of_a_loop_that_rescales_after_each_step_until_the_handle_is_removed(norm):
    x, y = data()
    net, twin = mlp(), mlp()
    groups = [{"params": net[0].parameters()}, {"params": net[2:].parameters(), "lr": 3e-3}]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    handle = constrain_norm(optimizer, norm)
    target = float(as_vector(net).norm()) if norm is None else norm
    params = list(twin.parameters())
    first, second = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    rates = [1e-2] * 2 + [3e-3] * 4
    for t in range(1, 21):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert float(as_vector(net).norm()) == pytest.approx(target, rel=1e-12)
        grads = torch.autograd.grad(F.cross_entropy(twin(x), y), params)
        with torch.no_grad():
            for p, g, m, v, rate in zip(params, grads, first, second, rates, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            factor = target / as_vector(twin).norm()
            for p in params:
                p *= factor
    torch.testing.assert_close(as_vector(net), as_vector(twin), rtol=1e-9, atol=1e-10)
    handle.remove()
    optimizer.step()
    assert float(as_vector(net).norm()) != pytest.approx(target, rel=1e-9)


def test_the_call_alone_changes_nothing_and_frozen_parameters_stay_out():
    net = mlp()
    net[0].requires_grad_(False)
    before = as_vector(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constrain_norm(optimizer, 2.0)
    assert torch.equal(as_vector(net), before)
    net(data()[0]).sum().backward()
    optimizer.step()
    assert float(weight_norm(net)) == pytest.approx(2.0, rel=1e-12)
    torch.testing.assert_close(as_vector(net)[:32], before[:32])


def test_the_norm_conforms_to_its_kind(as_a_user):
    check_instrument(lambda net: weight_norm(net), mlp(dtype=torch.float32))


# --- when ---


def test_a_delay_is_between_the_first_steps_at_the_threshold():
    steps, train, test = [0, 10, 25, 40], [0.1, 0.95, 0.9, 1.0], [0.0, 0.2, 0.5, 0.96]
    assert grokking_delay(steps, train, test) == GrokkingDelay(10, 40, 30, 4)
    assert grokking_delay(
        torch.tensor(steps), np.array(train), torch.tensor(test), threshold=0.5
    ) == GrokkingDelay(10, 25, 15, 2.5)
    assert grokking_delay(steps, train, [0.1, math.nan, 0.3, 0.94]) == GrokkingDelay(
        10, math.inf, math.inf, math.inf
    )
    assert grokking_delay(steps, test, train) == GrokkingDelay(40, 10, -30, 0.25)
    assert grokking_delay(steps, [1, 1, 1, 1], [1, 1, 1, 1]) == GrokkingDelay(0, 0, 0, 1)
    assert grokking_delay(steps, [1, 1, 1, 1], [0, 1, 1, 1]) == GrokkingDelay(0, 10, 10, math.inf)


def test_a_loss_is_the_mirror_of_an_accuracy():
    steps, train, test = [0, 10, 25, 40], [0.1, 0.95, 0.9, 1.0], [0.0, 0.2, 0.5, 0.96]
    mirrored = [[1 - value for value in curve] for curve in (train, test)]
    for threshold in (0.3, 0.5, 0.93):
        there = grokking_delay(steps, train, test, threshold=threshold)
        assert grokking_delay(steps, *mirrored, threshold=1 - threshold, better="lower") == there


@pytest.mark.parametrize(("optimizer", "decoupled"), [(torch.optim.AdamW, True), (torch.optim.SGD, False)])
def test_with_no_gradients_the_norm_arrives_within_a_step_of_the_time(optimizer, decoupled):
    net = mlp()
    start = float(weight_norm(net))
    target = 0.7 * start
    steps = optimizer(net.parameters(), lr=0.01, weight_decay=0.5)
    expected = generalization_time(
        start, weight_norm(net) * 0.7, lr=0.01, weight_decay=0.5, decoupled=decoupled
    )
    taken = 0
    while float(weight_norm(net)) > target:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        steps.step()
        taken += 1
    assert taken - 1 <= expected <= taken


def test_the_time_is_zero_below_and_infinite_without_decay():
    assert generalization_time(1.0, 1.0, lr=0.1, weight_decay=0.0) == 0
    assert generalization_time(1.0, 2.0, lr=0.1, weight_decay=0.1) == 0
    assert generalization_time(2.0, 1.0, lr=0.1, weight_decay=0.0) == math.inf
    slow, fast = (generalization_time(2.0, 1.0, lr=1e-3, weight_decay=decay) for decay in (0.01, 0.1))
    assert slow / fast == pytest.approx(10, rel=1e-4)


# --- bad input ---

NET, X, Y = mlp(dtype=torch.float32), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
CURVE = [0.0, 1.0, 2.0]


def adam(net):
    return torch.optim.Adam(net.parameters())


def zero():
    return scale_weights_(mlp(), 1.0).apply(
        lambda m: [nn.init.zeros_(p) for p in m.parameters(recurse=False)]
    )


def emptied():
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    optimizer.param_groups[0]["params"].clear()
    return optimizer


@pytest.mark.parametrize(("call", "words"), [
    (lambda: weight_norm([]), "params must have at least one tensor, got none"),
    (lambda: weight_norm(torch.ones(3)), "params must be a model or tensors in a list"),
    (lambda: weight_norm([torch.ones(3).long()]), "params must have real floating-point tensors"),
    (lambda: weight_norm(nn.ReLU()), "model must have at least one trainable parameter, got none"),
    (lambda: scale_weights_(mlp(), 0.0), "alpha must be greater than 0"),
    (lambda: scale_weights_(mlp(), math.inf), "alpha must be greater than 0"),
    (lambda: scale_weights_(mlp(), torch.ones(2)), "alpha must be one real number"),
    (lambda: scale_weights_(X, 1.0), "model must be an nn.Module"),
    (lambda: scale_weights_(mlp().requires_grad_(False), 2.0), "model must have at least one trainable"),
    (lambda: constrain_norm(NET), "optimizer must be a torch.optim.Optimizer, got Sequential"),
    (lambda: constrain_norm(adam(NET), 0.0), "norm must be greater than 0"),
    (lambda: constrain_norm(adam(NET), math.nan), "norm must be greater than 0"),
    (lambda: constrain_norm(emptied()), "optimizer must have at least one trainable parameter"),
    (lambda: constrain_norm(adam(zero())), "not all zero, got norm 0"),
    (lambda: constrain_norm(adam(mlp(dtype=torch.bfloat16))), "float32 or float64, got one in bfloat16"),
    (lambda: grokking_delay([0, 1, 1], CURVE, CURVE), "steps must be finite, at least 0 and strictly increasing"),
    (lambda: grokking_delay(CURVE, CURVE[:2], CURVE), "train_metric must have one value for each of the 3 steps, got 2"),
    (lambda: grokking_delay(CURVE, CURVE, [*CURVE, 1.0]), "test_metric must have one value for each of the 3 steps, got 4"),
    (lambda: grokking_delay([], [], []), "steps must be a sequence of at least one real number"),
    (lambda: grokking_delay(CURVE, ["a"] * 3, CURVE), "train_metric must be a sequence of numbers"),
    (lambda: grokking_delay(CURVE, CURVE, CURVE, better="more"), "better must be one of 'higher', 'lower'"),
    (lambda: grokking_delay(CURVE, CURVE, CURVE, threshold=math.nan), "threshold must be in"),
    (lambda: generalization_time(0.0, 1.0, lr=0.1, weight_decay=0.1), "norm0 must be greater than 0"),
    (lambda: generalization_time(1.0, -1.0, lr=0.1, weight_decay=0.1), "norm_c must be greater than 0"),
    (lambda: generalization_time(1.0, 1.0, lr=0.0, weight_decay=0.1), "lr must be greater than 0"),
    (lambda: generalization_time(1.0, 1.0, lr=0.1, weight_decay=-0.1), "weight_decay must be at least 0"),
    (lambda: generalization_time(1.0, 1.0, lr=0.1, weight_decay=10.0), "weight_decay must be less than 1 / lr, 10, got 10.0"),
])  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_step_that_loses_all_weights_is_refused(as_a_user):
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    constrain_norm(optimizer)
    for p in net.parameters():
        p.grad = p.detach().clone()
    with pytest.raises(ValueError, match="optimizer must leave parameters finite and not all zero"):
        optimizer.step()
