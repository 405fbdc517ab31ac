"""Rates against the definition and Euler's identity, seminorm and margin in closed form, neural collapse by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from posterity.dynamics import (
    PowerDiagonal,
    lambda_seminorm,
    layer_rates,
    neural_collapse,
    normalized_margin,
    quasi_homogeneity_error,
    scale_by_rates_,
)
from posterity.testing import check_instrument


def made(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*[layer() for layer in layers]).double()
        for p in net.parameters():  # biases and gains away from 0 and 1
            nn.init.normal_(p, 0.3, 0.5)
    return net


def relu():
    return nn.LeakyReLU(0.1)


STACKS = {
    "biases": [lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Linear(6, 5), relu, lambda: nn.Linear(5, 1)],
    "no bias": [lambda: nn.Linear(4, 6, bias=False), nn.ReLU, lambda: nn.Linear(6, 3)],
    "layer norm": [lambda: nn.Linear(4, 6), lambda: nn.LayerNorm(6, eps=0.0), nn.ReLU, lambda: nn.Linear(6, 3)],
    "norm without gain": [lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6, affine=False), lambda: nn.Linear(6, 2)],
    "gain without shift": [lambda: nn.LayerNorm(4, bias=False), relu, lambda: nn.Linear(4, 2)],
    "two norms": [lambda: nn.LayerNorm(4), lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), relu, lambda: nn.Linear(6, 5), nn.Identity, lambda: nn.Linear(5, 2)],
    "norm at the end": [lambda: nn.Linear(4, 6), lambda: nn.LayerNorm(6)],
    "stack in a stack": [lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Dropout, lambda: nn.Linear(3, 2)],
    "images": [lambda: nn.Unflatten(1, (1, 2, 2)), lambda: nn.Conv2d(1, 3, 2, padding=1), nn.ReLU, lambda: nn.MaxPool2d(2), lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(3, 2)],
}  # fmt: skip


def rows(n=7, d=4):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rates_of(net):
    """Return rates also of the stack that begins with a view of vectors as images, which the rates do not see."""
    return layer_rates(net[1:] if isinstance(net[0], nn.Unflatten) else net)


@pytest.mark.parametrize("name", STACKS)
def test_the_rates_of_stacks_fulfil_the_definition_and_eulers_identity(name):
    net, x = made(*STACKS[name]).eval(), rows()
    rates = rates_of(net)
    assert quasi_homogeneity_error(net, x, rates) < 1e-10
    outputs = net(x)
    share = torch.randn(outputs.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    slopes = torch.autograd.grad(outputs, list(net.parameters()), share)
    along = sum(
        rates[key] * (p * d).sum() for (key, p), d in zip(net.named_parameters(), slopes, strict=True)
    )
    torch.testing.assert_close(along, (share * outputs).sum(), rtol=1e-10, atol=1e-12)
    before = net(x)
    assert scale_by_rates_(net, 0.7, rates) is net
    torch.testing.assert_close(net(x), math.exp(0.7) * before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["biases", "layer norm", "images"])
def test_equal_rates_are_wrong_where_there_are_biases(name):
    net, x = made(*STACKS[name]), rows()
    weighted = len({key.split(".")[0] for key, _ in net.named_parameters()})
    assert quasi_homogeneity_error(net, x, {key: 1 / weighted for key, _ in net.named_parameters()}) > 1e-3
    free = [key for key, rate in rates_of(net).items() if rate]
    for key in free:  # each rate matters
        wrong = rates_of(net)
        wrong[key] += 0.1
        assert quasi_homogeneity_error(net, x, wrong) > 1e-4, key


def test_the_rates_are_those_of_the_convention():
    third = 1 / 3
    assert layer_rates(made(*STACKS["biases"])) == {
        "0.weight": third, "0.bias": third, "2.weight": third, "2.bias": 2 / 3, "4.weight": third, "4.bias": 1.0,
    }  # fmt: skip
    assert layer_rates(made(*STACKS["two norms"])) == {
        "0.weight": 0.0, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": third, "2.bias": third,
        "4.weight": third, "4.bias": 2 / 3, "6.weight": third, "6.bias": 1.0,
    }  # fmt: skip


def test_frozen_parameters_stay():
    net, x = made(*STACKS["biases"]), rows()
    net[0].requires_grad_(False)  # a fixed first layer, and two on top
    rates = layer_rates(net)
    assert rates == {
        "0.weight": 0.0, "0.bias": 0.0, "2.weight": 0.5, "2.bias": 0.5, "4.weight": 0.5, "4.bias": 1.0,
    }  # fmt: skip
    assert quasi_homogeneity_error(net, x, rates) < 1e-10
    net[4].bias.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"model must be free to scale its bias model\.4\.bias, which is frozen"
    ):
        layer_rates(net)


def test_a_layer_used_twice_has_one_rate_or_is_refused():
    shared = nn.Linear(4, 4, bias=False).double()
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 1).double())
    assert layer_rates(net) == {"0.weight": 1 / 3, "4.weight": 1 / 3, "4.bias": 1.0}
    assert quasi_homogeneity_error(net, rows(), layer_rates(net)) < 1e-10
    assert net[0] is net[2] is shared  # and looking has not replaced its weight
    assert isinstance(shared.weight, nn.Parameter)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)).double()
    tied[2].weight = tied[0].weight
    assert quasi_homogeneity_error(tied, rows(), layer_rates(tied)) < 1e-10
    biased = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"uses 0\.bias in two places, that ask for the rates 0.5 and 1"):
        layer_rates(nn.Sequential(biased, nn.ReLU(), biased))


class Residual(nn.Module):
    """Both branches have the degree of the layer in front: the inner weights have none."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.outer, self.head = (nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x):
        h = self.first(x)
        return self.head(h + self.outer(torch.relu(self.inner(h))))


def test_a_sum_of_branches_has_rates_of_ones_own():
    net = Residual().double()
    rates = {"first.weight": 0.5, "inner.weight": 0.0, "outer.weight": 0.0, "head.weight": 0.5}
    assert quasi_homogeneity_error(net, rows(), rates) < 1e-10
    assert quasi_homogeneity_error(net, rows(), {name: 1 / 4 for name, _ in net.named_parameters()}) > 1e-3


def test_the_error_is_the_largest_of_the_definition():
    """f = theta^2 x with the rate 1 for theta is e^(2 a) instead of e^a."""
    model = nn.Linear(1, 1, bias=False).double()
    square = nn.Sequential(model, model)
    got = quasi_homogeneity_error(
        square, torch.ones(1, 1).double(), {"0.weight": 1.0}, alphas=(-1.0, 0.3, 0.7)
    )
    torch.testing.assert_close(got, torch.tensor(math.exp(0.7) - 1).double())


def test_rates_of_elements_and_of_a_power_model():
    model = PowerDiagonal([1, 3, 5, 3], generator=torch.Generator().manual_seed(0)).double()
    assert quasi_homogeneity_error(model, rows(), model.rates()) < 1e-10
    assert quasi_homogeneity_error(model, rows(), {"theta": 0.5}) > 1e-3
    expected = (model.theta.detach() ** 2 / torch.tensor([1, 3, 5, 3])).sum().sqrt()
    torch.testing.assert_close(lambda_seminorm(model, model.rates()), expected)
    top = lambda_seminorm(model, model.rates(), top_only=True)
    torch.testing.assert_close(top, model.theta[0].detach().abs())
    torch.testing.assert_close(model(rows()), rows() @ model.theta ** torch.tensor([1.0, 3.0, 5.0, 3.0]))


def test_the_seminorm_is_that_of_numpy_over_parameters():
    net = made(*STACKS["biases"])
    rates = layer_rates(net)
    values = [(rates[name], p.detach().numpy()) for name, p in net.named_parameters()]
    assert float(lambda_seminorm(net, rates)) == pytest.approx(
        math.sqrt(sum(r * (p**2).sum() for r, p in values))
    )
    top = float(lambda_seminorm(net, rates, top_only=True))
    assert top == pytest.approx(abs(float(net[4].bias.detach())))
    huge = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(huge.weight, 1e200)  # its square is not finite
    assert float(lambda_seminorm(huge, {"weight": 1.0})) == pytest.approx(1e200)


@pytest.mark.parametrize("top_only", [False, True])
@pytest.mark.parametrize("name", STACKS)
def test_the_normalised_margin_does_not_change_along_the_scaling(name, top_only):
    net, x = made(*STACKS[name]), rows()
    rates = rates_of(net)
    single = net.eval()(x).shape[1] == 1
    y = torch.tensor([1, -1, 1, 1, -1, 1, -1]) if single else torch.tensor([0, 1, 1, 0, 1, 0, 1])
    before = normalized_margin(net, x, y, rates, top_only=top_only)
    for alpha in (-2.0, 0.7, 9.0):
        moved = scale_by_rates_(copy.deepcopy(net), alpha, rates)
        again = normalized_margin(moved, x, y, rates, top_only=top_only)
        torch.testing.assert_close(again, before, rtol=1e-9, atol=0)


def test_the_normalised_margin_is_that_of_the_model_scaled_to_unit_seminorm():
    net, x = made(*STACKS["biases"]), rows()
    rates, y = layer_rates(net), torch.tensor([1, -1, 1, 1, -1, 1, -1])
    got, unit = normalized_margin(net, x, y, rates), copy.deepcopy(net)
    low, high = -10.0, 10.0
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        scaled = scale_by_rates_(copy.deepcopy(net), -middle, rates)
        low, high = (middle, high) if lambda_seminorm(scaled, rates) > 1 else (low, middle)
    scale_by_rates_(unit, -low, rates)
    torch.testing.assert_close(lambda_seminorm(unit, rates), torch.tensor(1.0).double())
    torch.testing.assert_close(got, (y * unit(x)[:, 0]).min().detach())


def test_a_linear_models_normalised_margin_is_euclidean_and_classes_count_the_best_other():
    net = nn.Linear(4, 1, bias=False).double()
    y = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    expected = (y * net(rows())[:, 0]).min() / net.weight.norm()
    torch.testing.assert_close(normalized_margin(net, rows(), y, {"weight": 1.0}), expected.detach())
    net = nn.Linear(4, 3, bias=False).double()
    y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    scores = net(rows()).detach().numpy()
    least = min(s[k] - max(np.delete(s, k)) for s, k in zip(scores, y.tolist(), strict=True))
    got = normalized_margin(net, rows(), y, {"weight": 1.0})
    assert float(got) == pytest.approx(least / float(net.weight.detach().norm()))


def small(norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), *[nn.BatchNorm1d(6)] * norm, nn.ReLU(), nn.Linear(6, 1))


@pytest.mark.parametrize("norm", [False, True])
def test_instruments_conform_to_their_kind(as_a_user, norm):
    y = torch.tensor([1, -1, 1, 1, -1, 1, -1])
    net, x = small(norm), rows().float()
    rates = layer_rates(net)
    check_instrument(lambda model: layer_rates(model), net)
    check_instrument(lambda model: lambda_seminorm(model, rates), net)
    check_instrument(lambda model, x: normalized_margin(model, x, y, rates), net, x)
    wrong = dict.fromkeys(rates, 0.4)  # an error of rounding alone has nothing to agree with
    check_instrument(lambda model, x: quasi_homogeneity_error(model, x, wrong), net, x)


def test_narrow_models_and_autocast_have_errors_of_float32():
    net = small()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert quasi_homogeneity_error(copy.deepcopy(net).to(dtype), rows(), layer_rates(net)) < 1e-5


def test_scaling_in_place_is_exact_in_narrow_dtypes_and_whole_or_not_at_all(as_a_user):
    model = nn.Linear(2, 1).to(torch.float16)
    nn.init.constant_(model.weight, 3.0)
    nn.init.constant_(model.bias, 1.0)
    with torch.inference_mode():
        scale_by_rates_(model, math.log(2.0), {"weight": 1.0, "bias": 0.0})
    assert model.weight.tolist() == [[6.0, 6.0]]
    with pytest.raises(ValueError, match="alpha must leave parameters finite, bias is not for 100"):
        scale_by_rates_(model, 100.0, {"weight": 0.01, "bias": 1.0})
    assert (model.weight.tolist(), model.bias.tolist()) == ([[6.0, 6.0]], [1.0])


# --- neural collapse ---


def test_collapsed_features_and_their_means_as_head_are_zero_in_all_entries():
    y = torch.arange(5).repeat(3)
    simplex = torch.eye(5, dtype=torch.float64) - 1 / 5
    for features in (torch.eye(5).double()[y], 4.0 * simplex[y] + 3.0):
        found = neural_collapse(features, y, 0.1 * simplex)
        assert list(found) == ["nc1", "nc2_norms", "nc2_angles", "nc3"]
        assert all(value.abs() < 1e-12 for value in found.values()), found
    assert "nc3" not in neural_collapse(simplex[y], y)


def by_hand(h, y, weight):
    """Return the four numbers with scatter matrices of d x d, classes weighted alike."""
    classes = int(y.max()) + 1
    means = np.stack([h[y == c].mean(0) for c in range(classes)])
    M = means - means.mean(0)
    between = sum(np.outer(m, m) for m in M) / classes
    within = sum(np.cov(h[y == c].T, bias=True) for c in range(classes)) / classes
    norms = np.linalg.norm(M, axis=1)
    pairs = [(i, j) for i in range(classes) for j in range(classes) if i != j]
    cosines = np.array([M[i] @ M[j] / norms[i] / norms[j] for i, j in pairs])
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / classes,
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": np.abs(cosines + 1 / (classes - 1)).mean(),
        "nc3": np.linalg.norm(weight / np.linalg.norm(weight) - M / np.linalg.norm(M)),
    }


@pytest.mark.parametrize("d", [2, 3, 9])
def test_neural_collapse_is_that_of_scatter_matrices(d):
    generator = torch.Generator().manual_seed(d)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 1, 1, 2, 0, 3, 3])
    features = torch.randn(12, d, dtype=torch.float64, generator=generator) + 5.0
    weight = torch.randn(4, d, dtype=torch.float64, generator=generator)
    found = neural_collapse(features, y, weight)
    expected = by_hand(features.numpy(), y.numpy(), weight.numpy())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(12, generator=generator)
    again = neural_collapse((1e6 * features[order]).float(), y[order], (3 * weight).float())
    assert {name: float(value) for name, value in again.items()} == pytest.approx(expected, rel=1e-4)


def test_narrow_features_are_summed_wide():
    y = torch.arange(2).repeat(3_000)
    features = (
        torch.eye(2)[y] + 100 * torch.randn(6_000, 2, generator=torch.Generator().manual_seed(0))
    ).half()
    exact, got = (neural_collapse(part, y) for part in (features.double(), features))
    assert all(torch.equal(exact[name], got[name]) for name in exact)


LINEAR = nn.Linear(2, 1)
X, Y = torch.ones(3, 2), torch.tensor([1, -1, 1])
ONE = {"weight": 1.0, "bias": 0.0}


@pytest.mark.parametrize(("call", "words"), [
    (lambda: layer_rates(LINEAR), "model must be an nn.Sequential, got Linear"),
    (lambda: layer_rates(nn.Sequential(LINEAR, nn.Sequential(nn.GELU()))), r"model.1 must be made of .* got GELU as '0'"),
    (lambda: layer_rates(nn.Sequential(nn.Linear(2, 2), nn.ReLU6(), LINEAR)), "got ReLU6 as '1'"),
    (lambda: layer_rates(nn.Sequential(nn.ReLU())), "model must have a trainable weight behind its last normalisation"),
    (lambda: layer_rates(nn.Sequential(LINEAR, nn.LayerNorm(1, elementwise_affine=False))), "a trainable weight behind"),
    (lambda: layer_rates(nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))), "got ParametrizedLinear"),
    (lambda: lambda_seminorm(LINEAR, {"wieght": 1.0}), "rates must be of parameters of model, it has none called 'wieght'"),
    (lambda: lambda_seminorm(LINEAR, {"weight": -1.0}), "rates must be finite and at least 0, got -1.0 for weight"),
    (lambda: lambda_seminorm(LINEAR, {"weight": math.nan}), "rates must be finite"),
    (lambda: lambda_seminorm(LINEAR, {"weight": 1.0}), "rates must have one for each trainable parameter, .* none for bias"),
    (lambda: lambda_seminorm(LINEAR, {"weight": 0.0, "bias": 0.0}), "rates must hold one greater than 0, got none"),
    (lambda: lambda_seminorm(LINEAR, {}), "rates must hold one greater than 0"),
    (lambda: lambda_seminorm(LINEAR, {"weight": torch.ones(3)}), r"shapes of the parameters, got \(3,\) for weight"),
    (lambda: lambda_seminorm(LINEAR, {"weight": "fast"}), "rates must be numbers, got 'fast'"),
    (lambda: lambda_seminorm(LINEAR, 1.0), "rates must be a mapping"),
    (lambda: quasi_homogeneity_error(LINEAR, X, ONE, alphas=()), "alphas must hold at least one"),
    (lambda: quasi_homogeneity_error(LINEAR, X, ONE, alphas=(math.inf,)), "alphas must be from -700 to 700, got inf"),
    (lambda: quasi_homogeneity_error(LINEAR, X[:0], ONE), "x must be a tensor of at least one row"),
    (lambda: quasi_homogeneity_error(LINEAR, X * math.nan, ONE), "model must return finite outputs for x"),
    (lambda: scale_by_rates_(LINEAR, math.nan, ONE), "alpha must be finite, got nan"),
    (lambda: normalized_margin(LINEAR, X, Y[:2], ONE), r"y must have shape \(3\) for x"),
    (lambda: normalized_margin(LINEAR, X, Y * 2, ONE), "y must hold -1 and 1"),
    (lambda: normalized_margin(nn.Linear(2, 3), X, Y.float(), ONE), "y must hold class indices"),
    (lambda: normalized_margin(nn.Linear(2, 3), X, Y + 2, ONE), r"y must be in 0\.\.2"),
    (lambda: normalized_margin(nn.Flatten(0), X, Y, ONE), "rates must be of parameters"),
    (lambda: neural_collapse(X, torch.tensor([0, 1])), r"y must have shape \(3\)"),
    (lambda: neural_collapse(X, torch.tensor([0, 0, 0])), "y must have at least 2 classes, got 1"),
    (lambda: neural_collapse(X, torch.tensor([0, 2, 2])), "y must have a sample of each of 3 classes"),
    (lambda: neural_collapse(X, torch.tensor([0, 1, 10**9])), "y must have a sample of each"),
    (lambda: neural_collapse(X, torch.tensor([0, 1, -1])), r"y must be in 0\.\.1"),
    (lambda: neural_collapse(X, torch.tensor([0, 1, 1])), "features must have class means that differ"),
    (lambda: neural_collapse(X * math.inf, torch.tensor([0, 1, 1])), "features must be finite"),
    (lambda: neural_collapse(X[:0], torch.zeros(0).long()), "features must have at least one row and one column, got"),
    (lambda: neural_collapse(torch.eye(3), torch.arange(3), torch.ones(3, 2)), r"weight must have shape \(any, 3\)"),
    (lambda: neural_collapse(torch.eye(3), torch.arange(3), torch.zeros(3, 3)), "weight must not be 0"),
])  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_model_of_zeros_has_no_normalised_margin(as_a_user):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="model must have a parameter of a positive rate that is not 0"):
        normalized_margin(model, X, Y, {"weight": 1.0})
    assert quasi_homogeneity_error(model, X, {"weight": 1.0}) == 0
