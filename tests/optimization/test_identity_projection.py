"""The gradient and its projections against their formulas, the noise, and the layer's manners."""

import math

import numpy as np
import pytest
import torch

from posterity.optimization import (
    CombinatorialLayer,
    assignment,
    grid_shortest_path,
    gumbel,
    project_costs,
    ranking,
    sum_of_gamma,
    top_k,
)


def draw(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the gradient ---


def jacobian(w, kind):
    """The matrix of equation 4 by its formula, at one instance."""
    n = len(w)
    identity, centre = torch.eye(n).double(), torch.eye(n).double() - 1 / n
    if kind == "mean":
        return centre
    v = w if kind == "norm" else centre @ w
    p = v / v.norm()
    outer = (identity - p[:, None] * p) / v.norm()
    return outer if kind == "norm" else outer @ centre


@pytest.mark.parametrize("kind", ["mean", "norm", "std"])
def test_a_projection_and_the_gradient_through_it_are_their_formulas(kind):
    costs, g = (draw(5, 8) - 0.3).requires_grad_(), draw(5, 8, seed=1) - 0.5
    (g * CombinatorialLayer(top_k(3), projection=kind)(costs)).sum().backward()
    for w, one, slope in zip(costs.detach(), g, costs.grad, strict=True):
        torch.testing.assert_close(slope, -jacobian(w, kind).T @ one, rtol=0, atol=1e-12)
    w, p = costs.detach(), project_costs(costs.detach(), kind)
    scale = 1e-12 * costs.grad.norm(dim=1)
    if kind != "mean":
        assert ((w * costs.grad).sum(1).abs() <= scale).all()
        torch.testing.assert_close(p.norm(dim=1), torch.ones(5).double())
        torch.testing.assert_close(p, (w - w.mean(1, keepdim=True) * (kind == "std")) / (
            w - w.mean(1, keepdim=True) * (kind == "std")).norm(dim=1, keepdim=True))  # fmt: skip
    if kind != "norm":
        assert (costs.grad.sum(1).abs() <= scale).all()
        assert (p.sum(1).abs() <= 1e-12).all()
    shaped = project_costs(costs.detach().reshape(5, 2, 4), kind)
    torch.testing.assert_close(shaped.flatten(1), p, rtol=0, atol=0)  # over all of an instance's entries
    assert torch.equal(project_costs(w, "none"), w)


@pytest.mark.parametrize("kind", ["norm", "std"])
def test_where_nothing_is_left_the_projection_and_its_gradient_are_zero(kind):
    costs = torch.full((2, 7), 0.1 if kind == "std" else 0.0).requires_grad_()
    p = project_costs(costs, kind)
    (p * torch.arange(7.0)).sum().backward()
    assert p.abs().max() == 0 and costs.grad.abs().max() == 0


def test_costs_that_all_but_vanish_have_a_finite_gradient():
    costs = torch.tensor([[3e-38, 2e-38, 4e-38], [1e-25, 2e-25, 3e-25]], requires_grad=True)
    (1e6 * project_costs(costs, "norm") * torch.arange(3.0)).sum().backward()
    assert costs.grad.isfinite().all() and (costs.grad != 0).any(1).all()


@pytest.mark.parametrize("unit", [1e-18, 1e37])
def test_a_projection_does_not_see_the_unit(unit):
    costs = draw(4, 6).float()
    for kind in ("norm", "std"):
        torch.testing.assert_close(project_costs(unit * costs, kind), project_costs(costs, kind))
    torch.testing.assert_close(project_costs(unit * costs, "mean") / unit, project_costs(costs, "mean"))


@pytest.mark.parametrize("sense", ["min", "max"])
def test_blackbox_is_its_finite_difference_and_solves_twice(sense):
    sign = 1 if sense == "min" else -1
    solver = top_k(3)
    layer = CombinatorialLayer(solver, sense=sense, gradient="blackbox", strength=2.0)
    costs, g = draw(6, 8).requires_grad_(), draw(6, 8, seed=1) - 0.5
    (g * layer(costs)).sum().backward()
    w = costs.detach()
    expected = (solver(sign * w + 2.0 * g) - solver(sign * w)) / 2.0 * sign
    torch.testing.assert_close(costs.grad, expected)
    assert expected.abs().max() > 0
    assert layer.n_solver_calls == 12
    layer = CombinatorialLayer(solver, sense=sense)
    layer(costs).sum().backward()
    assert layer.n_solver_calls == 6


def test_with_a_squared_loss_and_linear_costs_it_is_the_structured_perceptron():
    features, truth = draw(1, 5, 3), torch.tensor([[1.0, 0, 0, 1, 0]]).double()
    theta = draw(3, seed=2).requires_grad_()
    decision = CombinatorialLayer(top_k(2))(features @ theta)
    (decision - truth).square().sum().backward()
    perceptron = (truth - decision.detach())[0] @ features[0]  # Collins: theta falls by phi(y*) - phi(y)
    torch.testing.assert_close(theta.grad, 2 * perceptron)


# --- noise ---


def test_the_margin_is_half_alpha_up_or_down_in_training_only():
    seen = []

    def spy(costs):
        seen.append(torch.from_numpy(costs))
        return costs

    layer = CombinatorialLayer(spy, projection="std", noise=0.5)
    costs = draw(50, 8)
    layer(costs, generator=torch.Generator().manual_seed(0))
    layer(costs, generator=torch.Generator().manual_seed(0))
    layer.eval()(costs)
    moved = (seen[0] - seen[2]).flatten()
    torch.testing.assert_close(moved.abs(), torch.full((400,), 0.25).double())
    assert 140 < (moved > 0).sum() < 260  # six standard deviations of 400 coins
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], project_costs(costs, "std"))


def test_the_noise_of_a_sampler_comes_before_the_projection():
    layer = CombinatorialLayer(
        lambda costs: costs, projection="norm", noise=lambda shape, generator: torch.ones(shape)
    )
    costs = draw(4, 5)
    torch.testing.assert_close(layer(costs), project_costs(costs + 1, "norm"))
    torch.testing.assert_close(layer.eval()(costs), project_costs(costs, "norm"))


@pytest.mark.parametrize("noise", [sum_of_gamma(1, n_terms=300, scale=1.0), gumbel()])
def test_of_one_the_noise_is_gumbel(noise):
    drawn = noise(torch.Size([50_000]), torch.Generator().manual_seed(0)).double()
    assert float(drawn.mean()) == pytest.approx(np.euler_gamma, abs=0.025)  # four standard errors are 0.023
    assert float(drawn.var()) == pytest.approx(math.pi**2 / 6, rel=0.05)
    below = [(drawn < x).double().mean() for x in (-1.0, 0.0, 1.0, 3.0)]
    assert below == pytest.approx([math.exp(-math.exp(-x)) for x in (-1.0, 0.0, 1.0, 3.0)], abs=0.01)


def test_the_sum_over_a_subset_is_gumbel_of_the_scale():
    drawn = sum_of_gamma(4, n_terms=100, scale=3.0)(torch.Size([20_000, 4]), torch.Generator().manual_seed(0))
    total = drawn.sum(1) / 3.0
    below = [(total < x).double().mean() for x in (-1.0, 0.0, 1.0, 3.0)]
    assert below == pytest.approx([math.exp(-math.exp(-x)) for x in (-1.0, 0.0, 1.0, 3.0)], abs=0.015)


@pytest.mark.parametrize("noise", [0.3, gumbel(), sum_of_gamma(2)])
def test_a_generator_decides_the_noise(noise):
    layer = CombinatorialLayer(top_k(2), sense="max", noise=noise)
    costs = draw(40, 6)
    once, again = (layer(costs, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, layer(costs, generator=torch.Generator().manual_seed(2)))
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(layer(costs))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# --- the layer's manners ---


def test_a_solver_of_ones_own_gets_a_batch_of_float64_its_data_and_a_copy():
    seen = []

    def solver(costs, capacity):
        seen.append((costs.dtype, costs.shape, capacity))
        found = (costs < capacity[0])[:, ::-1]
        costs[:] = 7.0  # what is done to it is not seen
        return found

    costs, capacity = draw(4, 3), [0.5]
    out = CombinatorialLayer(solver)(costs, capacity)
    assert seen[0][:2] == (np.dtype("float64"), (4, 3)) and seen[0][2] is capacity
    assert costs.max() < 1
    assert torch.equal(out, (costs < 0.5).flip(1).double())


def test_a_module_and_a_solver_that_says_so_get_tensors():
    class Cheapest(torch.nn.Module):
        def forward(self, costs):
            assert isinstance(costs, torch.Tensor) and not costs.requires_grad
            return costs == costs.amin(1, keepdim=True)

    costs = draw(4, 3).requires_grad_()
    assert torch.equal(CombinatorialLayer(Cheapest())(costs).detach(), top_k(1)(costs))

    def cheapest(costs):
        return Cheapest()(costs)

    cheapest.accepts = "torch"
    assert torch.equal(CombinatorialLayer(cheapest)(costs).detach(), top_k(1)(costs))


def test_it_works_without_gradients_and_in_inference_mode():
    layer = CombinatorialLayer(assignment(), projection="norm", gradient="blackbox")
    costs = draw(2, 3, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(costs.clone()), assignment()(costs))


def test_whole_numbers_that_a_dtype_cannot_hold_are_refused(as_a_user):
    costs = draw(1, 300)
    assert CombinatorialLayer(ranking())(costs.half()).sort().values.tolist() == [list(range(300))]
    with pytest.raises(ValueError, match="costs must be float32 or wider for this solver: bfloat16"):
        CombinatorialLayer(ranking())(costs.bfloat16())
    with pytest.raises(ValueError, match="at most 257 to be numbered in bfloat16, got 300"):
        ranking()(costs.bfloat16())
    halves = CombinatorialLayer(lambda costs: costs / 3)(torch.ones(1, 2, dtype=torch.bfloat16))
    assert halves.dtype == torch.bfloat16  # a share is rounded, as any number is


ONE = torch.rand(2, 3)
LAYER = CombinatorialLayer(top_k(2), projection="std")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LAYER(torch.ones(2, 3).long()), "costs must be a floating-point tensor, got dtype torch.int64"),
        (lambda: LAYER(torch.ones(3)), r"costs must have a batch axis.* got \(3,\)"),
        (lambda: LAYER(torch.ones(0, 3)), r"costs must have a batch axis.* got \(0, 3\)"),
        (lambda: LAYER(ONE / torch.tensor([1.0, 0.0, 1.0])), "costs must be finite"),
        (lambda: CombinatorialLayer(assignment())(torch.full((1, 2, 2), math.nan)), "costs must be finite"),
        (lambda: CombinatorialLayer(lambda c: c[:, :2])(ONE), r"shape of costs, \(2, 3\), got \(2, 2\)"),
        (lambda: CombinatorialLayer(lambda c: c * math.nan)(ONE), "what solver returns must be finite"),
        (lambda: CombinatorialLayer(lambda c: None)(ONE), "solver must return an array or a tensor of numbers, got NoneType"),
        (lambda: CombinatorialLayer(3), "solver must be callable"),
        (lambda: CombinatorialLayer(top_k(2), sense="least"), "sense must be one of 'min', 'max'"),
        (lambda: CombinatorialLayer(top_k(2), projection="l2"), "projection must be one of"),
        (lambda: CombinatorialLayer(top_k(2), gradient="none"), "gradient must be one of"),
        (lambda: CombinatorialLayer(top_k(2), noise=-0.1), "noise must be at least 0"),
        (lambda: CombinatorialLayer(top_k(2), strength=0), "strength must be greater than 0"),
        (lambda: CombinatorialLayer(top_k(2), n_jobs=0), "n_jobs must be an integer of at least 1"),
        (lambda: CombinatorialLayer(top_k(2), n_jobs=2), "n_jobs must be 1 for this solver, got 2"),
        (lambda: CombinatorialLayer(grid_shortest_path(), projection="mean"), "projection must be 'none' or 'norm'"),
        (lambda: CombinatorialLayer(grid_shortest_path(), projection="std"), "subtracting the mean changes the problem"),
        (lambda: CombinatorialLayer(top_k(2), projection=lambda w: w[:1])(ONE), "projection must return a tensor of the shape"),
        (lambda: CombinatorialLayer(top_k(2), projection=lambda w: w / 0)(ONE), "projection and noise must leave costs finite"),
        (lambda: CombinatorialLayer(top_k(2), noise=lambda s, g: 1.0)(ONE), "noise must return a tensor .* got float"),
        (lambda: project_costs(ONE, "l1"), "kind must be one of"),
        (lambda: project_costs(ONE * math.inf, "norm"), "costs must be finite"),
        (lambda: project_costs(ONE[0], "norm"), "costs must have a batch axis"),
        (lambda: sum_of_gamma(0), "k must be an integer of at least 1"),
        (lambda: sum_of_gamma(1, 0), "n_terms must be an integer of at least 1"),
        (lambda: sum_of_gamma(1, scale=0.0), "scale must be greater than 0"),
        (lambda: gumbel(-1.0), "scale must be greater than 0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gradient_that_is_not_finite_is_refused_where_it_would_be_solved(as_a_user):
    costs = ONE.clone().requires_grad_()
    out = CombinatorialLayer(assignment(), gradient="blackbox")(costs[:, :, None].mT)
    with pytest.raises(ValueError, match="the gradient times strength must be finite"):
        (out * math.nan).sum().backward()
