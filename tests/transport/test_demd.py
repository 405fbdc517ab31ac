"""The multi-marginal distance against a linear program, scipy, its dual and its symmetries."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from torch import nn

from posterity.testing import check_loss
from posterity.transport import DEMDLoss, DEMDRegularizer, multimarginal_emd, soft_histogram


def rows(d, n, *batch, seed=0, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(*batch, d, n, generator=generator, dtype=torch.float64)).softmax(-1)


def spread(indices):
    return (indices.amax(-1) - indices.amin(-1)).double()


def squares(indices):
    x = indices.double()
    return (x - x.mean(-1, keepdim=True)).square().sum(-1)


def linear_program(p, cost):
    """The least cost over all joint arrays with these marginals."""
    d, n = p.shape
    cells = np.array(list(itertools.product(range(n), repeat=d)))
    marginals = np.concatenate([(cells[:, r] == np.arange(n)[:, None]).astype(float) for r in range(d)])
    cost = cost(torch.as_tensor(cells)).numpy()
    return linprog(cost, A_eq=marginals, b_eq=p.numpy().ravel(), method="highs").fun


# The solver.


@pytest.mark.parametrize("cost", [spread, squares])
@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_the_linear_programs(cost, seed):
    p = rows(3, 5, seed=seed, sharp=2)
    assert float(multimarginal_emd(p, cost=cost).value) == pytest.approx(linear_program(p, cost), abs=1e-9)


@pytest.mark.parametrize("d", [1, 2, 4, 7])
def test_closed_form_and_coupling_agree_on_the_range(d):
    p = rows(d, 23, seed=d)
    torch.testing.assert_close(multimarginal_emd(p).value, multimarginal_emd(p, cost=spread).value)


def test_two_histograms_are_wasserstein_1_in_bins():
    p = rows(2, 40)
    bins = np.arange(40)
    expected = wasserstein_distance(bins, bins, p[0].numpy(), p[1].numpy())
    assert float(multimarginal_emd(p).value) == pytest.approx(expected, abs=1e-12)


def test_potentials_are_feasible_for_every_tuple_and_reach_the_value():
    p = rows(3, 6, seed=4, sharp=2)
    result = multimarginal_emd(p)
    assert float((p * result.potentials).sum()) == pytest.approx(float(result.value), abs=1e-12)
    assert torch.equal(result.potentials[:, 0], torch.zeros(3, dtype=torch.float64))
    cells = torch.tensor(list(itertools.product(range(6), repeat=3)))
    prices = torch.stack([result.potentials[r, cells[:, r]] for r in range(3)]).sum(0)
    assert bool((prices <= spread(cells) + 1e-12).all())


@pytest.mark.parametrize("d", [2, 5])
def test_the_coupling_has_the_rows_as_marginals_and_few_tuples(d):
    p = rows(d, 12, seed=d)
    result = multimarginal_emd(p)
    assert result.masses.min() > 0 and len(result.masses) <= d * 11 + 1
    for r in range(d):
        marginal = torch.zeros(12, dtype=torch.float64).index_add(0, result.indices[:, r], result.masses)
        torch.testing.assert_close(marginal, p[r], atol=1e-12, rtol=0)
    assert bool((result.indices.diff(dim=0) >= 0).all()), "the coupling is monotone"


def test_point_masses_give_their_range():
    p = torch.eye(9, dtype=torch.float64)[[3, 7, 4, 7]]
    result = multimarginal_emd(p)
    assert float(result.value) == 4 and result.indices.tolist() == [[3, 7, 4, 7]]


def test_zero_exactly_for_equal_rows():
    p = rows(1, 8).expand(4, 8)
    result = multimarginal_emd(p)
    assert float(result.value) == 0 and not result.potentials.any()
    other = p.clone()
    other[2, :2] += torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    assert float(multimarginal_emd(other).value) > 0


def test_order_reversal_and_doubling_of_groups_change_nothing_and_more_groups_cost_more():
    p = rows(5, 10, seed=2)
    value = multimarginal_emd(p).value
    for same in (p[torch.tensor([3, 1, 4, 0, 2])], p.flip(-1), torch.cat([p, p[1:2]])):
        torch.testing.assert_close(multimarginal_emd(same).value, value)
    for kept in itertools.combinations(range(5), 3):
        assert multimarginal_emd(p[list(kept)]).value <= value + 1e-12


def test_a_batch_is_its_problems_one_by_one():
    p = rows(3, 7, 2, 4)
    for cost in (None, squares):
        result = multimarginal_emd(p, cost=cost)
        assert result.indices is None and result.masses is None
        for k in itertools.product(range(2), range(4)):
            alone = multimarginal_emd(p[k], cost=cost)
            torch.testing.assert_close(result.value[k], alone.value)
            torch.testing.assert_close(result.potentials[k], alone.potentials)


@pytest.mark.parametrize("cost", [None, squares])
def test_values_are_differentiable_through_a_softmax(cost):
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: multimarginal_emd(x.softmax(-1), cost=cost).value, (x,))


def test_masses_other_than_one_scale_the_value():
    p = rows(3, 6)
    torch.testing.assert_close(multimarginal_emd(3 * p).value, 3 * multimarginal_emd(p).value)
    torch.testing.assert_close(
        multimarginal_emd(3 * p, cost=spread).value, 3 * multimarginal_emd(p, cost=spread).value
    )


def test_long_float32_rows_are_summed_in_float64():
    p = rows(4, 20_000).float()
    exact = multimarginal_emd(p.double()).value
    value = multimarginal_emd(p).value
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)


# The loss.


def test_the_gradient_is_the_potentials():
    p = rows(4, 9).requires_grad_()
    (grad,) = torch.autograd.grad(2.5 * DEMDLoss()(p), p)
    torch.testing.assert_close(grad, 2.5 * multimarginal_emd(p.detach()).potentials)


class OfLogits(nn.Module):
    """Histograms are a softmax, so that every perturbation keeps their sums."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x):
        return self.loss(x.softmax(-1))


def test_conformance_of_the_loss(as_a_user):
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_loss(OfLogits(DEMDLoss()), x, symmetric=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_of_a_batch(reduction):
    p = rows(3, 5, 6)
    each = multimarginal_emd(p).value
    want = each if reduction == "none" else getattr(each, reduction)()
    torch.testing.assert_close(DEMDLoss(reduction=reduction)(p), want)


# Histograms and the regulariser.


@pytest.mark.parametrize("n_bins", [2, 3, 10, 49])
def test_soft_histogram_is_the_sum_of_hats(n_bins):
    x = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(n_bins))
    places = torch.arange(n_bins, dtype=torch.float64) / n_bins
    hats = (1 / n_bins - (x[:, None] - places).abs()).relu().sum(0) + 1e-4
    torch.testing.assert_close(soft_histogram(x, n_bins), hats / hats.sum())


def test_soft_histogram_is_differentiable():
    x = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_histogram(x, 7), (x,))


def test_the_regularizer_is_the_distance_of_the_groups_histograms():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(80, dtype=torch.float64, generator=generator)
    groups = torch.randint(0, 3, (80,), generator=generator) * 5 - 2
    parts = [soft_histogram((scores[groups == k].sigmoid() - 1e-4).clamp_min(0)) for k in (-2, 3, 8)]
    torch.testing.assert_close(DEMDRegularizer()(scores, groups), multimarginal_emd(torch.stack(parts)).value)
    inside = scores.sigmoid()
    parts = [soft_histogram(inside[groups == k], 6) for k in (-2, 3, 8)]
    torch.testing.assert_close(
        DEMDRegularizer(n_bins=6, activation="identity")(inside, groups),
        multimarginal_emd(torch.stack(parts)).value,
    )


def test_one_group_has_no_penalty_and_no_gradient():
    scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
    value = DEMDRegularizer()(scores, torch.full((5,), 7))
    (grad,) = torch.autograd.grad(value, scores)
    assert float(value.detach()) == 0 and not grad.any()


def test_conformance_of_the_regularizer(as_a_user):
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(12, dtype=torch.float64, generator=generator).requires_grad_()
    check_loss(DEMDRegularizer(), scores, torch.arange(12) % 3, symmetric=True)


def test_descent_on_the_regularizer_brings_groups_together():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(90) % 3
    scores = (torch.randn(90, generator=generator) + groups).requires_grad_()
    start = DEMDRegularizer()(scores, groups).item()
    opt = torch.optim.Adam([scores], lr=0.05)
    for _ in range(150):
        opt.zero_grad()
        DEMDRegularizer()(scores, groups).backward()
        opt.step()
    assert DEMDRegularizer()(scores, groups).item() < 0.15 * start


# Bad input.


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.tensor([[0.5, 0.5], [-0.1, 1.1]]), "nonnegative and finite"),
        (torch.tensor([[0.5, 0.5], [float("nan"), 1.0]]), "nonnegative and finite"),
        (torch.tensor([[0.5, 0.5], [float("inf"), 1.0]]), "nonnegative and finite"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.6]]), "row 2 sums to 1.1, row 0 to 1; normalise"),
        (torch.ones(2, 0), "at least 1"),
        (torch.ones(0, 3), "at least 1"),
        (torch.ones(3), "shape"),
        (torch.ones(2, 3, dtype=torch.int64), "floating"),
    ],
)
def test_wrong_histograms_are_refused(p, message, as_a_user):
    for call in (multimarginal_emd, DEMDLoss()):
        with pytest.raises(ValueError, match=message):
            call(p)


def test_wrong_arguments_are_refused(as_a_user):
    x = torch.rand(4)
    for call, message in [
        (lambda: DEMDLoss(reduction="max"), "reduction"),
        (lambda: DEMDRegularizer(n_bins=1), "n_bins"),
        (lambda: DEMDRegularizer(activation="tanh"), "activation"),
        (lambda: DEMDRegularizer()(x, torch.arange(5)), "groups must have shape"),
        (lambda: DEMDRegularizer()(x, torch.rand(4)), "integers"),
        (lambda: DEMDRegularizer()(x[:0], torch.arange(0)), "empty"),
        (lambda: DEMDRegularizer()(x * float("nan"), torch.arange(4)), "finite"),
        (lambda: DEMDRegularizer(activation="identity")(x + 1, torch.arange(4)), r"in \[0, 1\)"),
        (lambda: soft_histogram(x - 2), r"in \[0, 1\)"),
        (lambda: soft_histogram(x, 1), "n_bins"),
        (lambda: soft_histogram(x, smoothing=-1), "smoothing"),
        (lambda: soft_histogram(x[:0]), "empty"),
        (lambda: multimarginal_emd(rows(2, 4), cost=lambda i: i), "one number a tuple"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
