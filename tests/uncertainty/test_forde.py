"""FoRDE against its definition by loops and linear members in closed form; training, conformance, bad input."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity.testing import check_loss
from posterity.uncertainty import FoRDELoss, RepulsiveEnsemble, fit_input_components, input_gradient_repulsion


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def direction(u, components, scales):
    u = u.flatten()
    if components is not None:
        u = u @ components
    u = u / (u @ u + 1e-24).sqrt()
    return u if scales is None else u * scales


def by_loops(moving, still, components=None, scales=None):
    """Equations 1 and 2, entry by entry; ``still`` are the constants of the force."""
    m, batch = moving.shape[:2]
    total = 0.0
    for i in range(m):
        inside = 0.0
        for b in range(batch):
            v = [direction(still[j, b], components, scales) for j in range(m)]
            u = direction(moving[i, b], components, scales)
            for j in range(m):
                around = sorted(float(((v[k] - v[j]) ** 2).sum().detach()) for k in range(m))
                middle = (around[(m - 1) // 2] + around[m // 2]) / 2
                h = middle / math.log(m) + 1e-12
                inside = inside + torch.exp(-((u - v[j]) ** 2).sum() / h)
        total = total + torch.log(inside / batch)
    return total / batch


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("m", [2, 3, 4, 7])
def test_is_the_triple_loop_and_its_gradient_that_of_the_others_held_still(m, projected):
    gradients = normal(m, 5, 2, 3).requires_grad_()
    options = {}
    if projected:
        components, scales = fit_input_components(normal(20, 2, 3, seed=1), rank=4)
        options = {"components": components, "scales": scales}
    value = input_gradient_repulsion(gradients, **options)
    want = by_loops(gradients, gradients.detach(), **options)
    torch.testing.assert_close(value, want, atol=1e-10, rtol=0)
    force, expected = (torch.autograd.grad(v, gradients)[0] for v in (value, want))
    torch.testing.assert_close(force, expected, atol=1e-10, rtol=0)
    both = torch.autograd.grad(by_loops(gradients, gradients, **options), gradients)[0]
    assert not torch.allclose(force, both, rtol=1e-2)


def test_only_directions_count_and_nothing_has_an_order():
    g = normal(4, 6, 5)
    value = input_gradient_repulsion(g)
    lengths = torch.rand(4, 6, 1, dtype=torch.float64, generator=rng(1)) + 0.1
    torch.testing.assert_close(input_gradient_repulsion(100 * lengths * g), value)
    torch.testing.assert_close(input_gradient_repulsion(g[[2, 0, 3, 1]]), value)
    torch.testing.assert_close(input_gradient_repulsion(g[:, [5, 3, 0, 1, 4, 2]]), value)
    turn = torch.linalg.qr(normal(5, 5, seed=2))[0]
    torch.testing.assert_close(input_gradient_repulsion(g @ turn), value)
    torch.testing.assert_close(
        input_gradient_repulsion(g, components=turn, scales=torch.full((5,), 3.0, dtype=torch.float64)),
        value,
    )
    stretched = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    assert not torch.isclose(input_gradient_repulsion(g, components=turn, scales=stretched), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 3, 6, 10])
def test_stays_between_zero_and_identical_members(m, dtype):
    upper = m / 5 * math.log(m)
    for seed in range(50):
        value = float(input_gradient_repulsion(normal(m, 5, 3, seed=seed).to(dtype)))
        assert 0 <= value <= upper + 1e-6
    same = normal(1, 5, 3).to(dtype).repeat(m, 1, 1).requires_grad_()
    value = input_gradient_repulsion(same)
    torch.testing.assert_close(value, torch.tensor(upper, dtype=dtype))
    assert torch.equal(torch.autograd.grad(value, same)[0], torch.zeros_like(same))


def test_orthogonal_pairs_by_hand():
    """For two members D / h is 2 log 2 at any distance, so each sums 1 + 1/4."""
    for d in (2, 9):
        g = torch.eye(d, dtype=torch.float64)[:2, None].expand(2, 3, d)
        torch.testing.assert_close(
            input_gradient_repulsion(g), torch.tensor(2 / 3 * math.log(1.25), dtype=torch.float64)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_stays_zero(dtype):
    g = normal(3, 4, 5).to(dtype)
    g[0, 1] = 0
    g[:, 2] = 0
    g.requires_grad_()
    value = input_gradient_repulsion(g)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, g)[0]).all()
    torch.testing.assert_close(value.double(), by_loops(g, g.detach()).double(), rtol=1e-5, atol=0)


def test_near_members_keep_their_digits_in_float32():
    g = normal(1, 8, 30) + 1e-4 * normal(4, 8, 30, seed=1)
    exact = input_gradient_repulsion(g.float().double())
    torch.testing.assert_close(input_gradient_repulsion(g.float()).double(), exact, rtol=1e-2, atol=0)


# Components.


def test_components_rebuild_the_second_moment():
    x = normal(30, 2, 4) + 1.0
    components, scales = fit_input_components(x)
    flat = x.flatten(1)
    torch.testing.assert_close(components @ scales.square().diag() @ components.T, flat.T @ flat / 29)
    torch.testing.assert_close(components.T @ components, torch.eye(8, dtype=torch.float64))
    assert bool((scales.diff() <= 0).all())
    few, lengths = fit_input_components(x, rank=3)
    assert torch.equal(few, components[:, :3])
    assert torch.equal(lengths, scales[:3])


def test_fewer_inputs_than_entries_leave_directions_of_length_zero():
    components, scales = fit_input_components(normal(3, 6).float())
    assert components.dtype == scales.dtype == torch.float32
    assert components.shape == (6, 6)
    assert float(scales[3:].max()) < 1e-3 < float(scales[2])


# The loss.


def mlp(n_in=4, n_out=3, width=6, act=nn.Tanh):
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, width), act(), nn.Linear(width, n_out)).double()


def several(make, m, seed=0):
    torch.manual_seed(seed)
    return RepulsiveEnsemble(make, m)


def batch(n=7, d=4, c=3, seed=0):
    return normal(n, d, seed=seed), torch.randint(c, (n,), generator=rng(seed))


def grads(value, modules):
    parameters = list(modules.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def slow_loss(members, x, y, repulsion=1.0, components=None, scales=None, still=None):
    """Equation 3 with a gradient for each member and sample."""
    fit, gradients = 0.0, []
    for member in members:
        x = x.detach().requires_grad_()
        logits = member(x)
        fit = fit + F.cross_entropy(logits, y)
        rows = [torch.autograd.grad(logits[b, y[b]], x, create_graph=True)[0][b] for b in range(len(x))]
        gradients.append(torch.stack(rows))
    gradients = torch.stack(gradients)
    still = gradients.detach() if still is None else still
    return fit + repulsion * by_loops(gradients, still, components, scales), gradients.detach()


@pytest.mark.parametrize("projected", [False, True])
def test_the_loss_is_that_of_single_gradients(projected):
    ensemble, (x, y) = several(mlp, 3), batch()
    fitted = fit_input_components(x, rank=3) if projected else (None, None)
    value = FoRDELoss(*fitted, repulsion=0.7)(ensemble, x, y)
    want, _ = slow_loss(ensemble.members, x, y, 0.7, *fitted)
    torch.testing.assert_close(value, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(grads(value, ensemble), grads(want, ensemble), atol=1e-10, rtol=0)


def test_the_force_is_the_difference_quotient_with_the_others_held_still():
    """Gradcheck of the objective whose second arguments are constants; the loss has its gradient."""
    ensemble, (x, y) = several(lambda: mlp(width=3), 2), batch(4)
    _, still = slow_loss(ensemble.members, x, y)
    names = [name for name, _ in ensemble.named_parameters()]

    def objective(*values):
        state = dict(zip(names, values, strict=True))
        members = [
            lambda x, i=i: functional_call(
                ensemble.members[i],
                {k.removeprefix(f"members.{i}."): v for k, v in state.items() if f"members.{i}." in k},
                (x,),
            )
            for i in range(2)
        ]
        return slow_loss(members, x, y, still=still)[0]

    leaves = tuple(p.detach().clone().requires_grad_() for p in ensemble.parameters())
    assert torch.autograd.gradcheck(objective, leaves)
    value = FoRDELoss()(ensemble, x, y)
    want = torch.autograd.grad(objective(*leaves), leaves)
    torch.testing.assert_close(grads(value, ensemble), list(want), atol=1e-10, rtol=0)


def test_linear_members_compare_their_rows():
    ensemble, (x, y) = several(lambda: nn.Linear(4, 3).double(), 5), batch()
    value = FoRDELoss(repulsion=2.0)(ensemble, x, y)
    rows = torch.stack([member.weight[y] for member in ensemble.members])
    want = sum(F.cross_entropy(member(x), y) for member in ensemble.members)
    want = want + 2.0 * input_gradient_repulsion(rows)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grads(value, ensemble), grads(want, ensemble))


def test_without_repulsion_or_with_one_member_it_is_a_deep_ensemble():
    (x, y) = batch()
    for m, repulsion in ((4, 0.0), (1, 1.0)):
        ensemble = several(mlp, m)
        value = FoRDELoss(repulsion=repulsion, label_smoothing=0.2)(ensemble, x, y)
        want = sum(F.cross_entropy(member(x), y, label_smoothing=0.2) for member in ensemble.members)
        torch.testing.assert_close(value, want)


def test_regression_takes_half_the_squared_error_and_the_sum_of_outputs():
    ensemble, x, target = several(lambda: mlp(n_out=2), 3), normal(6, 4), normal(6, 2, seed=1)
    value = FoRDELoss()(ensemble, x, target)
    fit, gradients = 0.0, []
    for member in ensemble.members:
        x = x.detach().requires_grad_()
        out = member(x)
        fit = fit + ((out - target) ** 2).sum(1).mean() / 2
        gradients.append(torch.autograd.grad(out.sum(), x, create_graph=True)[0])
    want = fit + input_gradient_repulsion(torch.stack(gradients))
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grads(value, ensemble), grads(want, ensemble))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.layer(x) if bool(self.layer.weight.sum() > 0) else self.layer(x).tanh()


class Own(nn.Module):
    """Weights of its own, of a size that no attribute tells."""

    def __init__(self, width):
        super().__init__()
        self.low = nn.Parameter(torch.randn(4, width, dtype=torch.float64))
        self.high = nn.Parameter(torch.randn(width, 3, dtype=torch.float64))

    def forward(self, x):
        return x @ self.low @ self.high


@pytest.mark.parametrize(
    "makers",
    [
        [mlp, lambda: mlp(width=9), lambda: mlp(act=nn.ReLU)],
        [mlp, lambda: mlp(act=nn.ReLU)],
        [lambda: nn.Sequential(mlp(), nn.Tanh()), lambda: nn.Sequential(mlp(), mlp(3))],
        [lambda: Own(2), lambda: Own(5)],
        [Branching] * 4,
    ],
)
def test_members_of_any_structure_repel(makers):
    it, (x, y) = iter(makers), batch()
    ensemble = several(lambda: next(it)(), len(makers))
    value = FoRDELoss()(ensemble, x, y)
    want, _ = slow_loss(ensemble.members, x, y)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grads(value, ensemble), grads(want, ensemble))


def input_gradients(ensemble, x, y):
    found = []
    for member in ensemble.members:
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(member(leaf).gather(1, y[:, None]).sum(), leaf)[0])
    return F.normalize(torch.stack(found), dim=2)


def test_a_step_down_the_force_parts_two_members_at_every_sample():
    """The force on u_i is along u_i - u_j, so with equal weights it lengthens each distance."""
    g = F.normalize(normal(2, 6, 5), dim=2).requires_grad_()
    (slope,) = torch.autograd.grad(input_gradient_repulsion(g), g)
    moved = F.normalize(g - 1e-3 * slope, dim=2)
    before, after = ((u[0] * u[1]).sum(1) for u in (g, moved))
    assert bool((after < before).all())


def test_training_parts_the_members():
    x, y = normal(60, 8).float(), torch.arange(60) % 3
    spread = {}
    for repulsion in (0.0, 60.0):  # 60 in the batch: R without its 1/B
        ensemble = several(lambda: mlp(8, width=16, act=nn.ReLU).float(), 4)
        criterion = FoRDELoss(repulsion=repulsion)
        opt = torch.optim.SGD(ensemble.parameters(), lr=0.01, momentum=0.9)
        for _ in range(80):
            opt.zero_grad()
            criterion(ensemble, x, y).backward()
            opt.step()
        unit = input_gradients(ensemble, x, y)
        cosine = torch.einsum("ibd,jbd->ij", unit, unit) / 60
        spread[repulsion] = float(cosine.triu(1).sum() / 6)
    assert spread[60.0] < spread[0.0] - 0.1


# Conformance.


class OfInputs(nn.Module):
    """The loss of x for members that are piecewise linear: R does not move with x.

    The force leaves out what the second argument and the bandwidth do, so differences of
    the value are its gradient only where those are constant.
    """

    def __init__(self, options, make):
        super().__init__()
        self.loss, self.members = FoRDELoss(**options), several(make, 3)

    def forward(self, x, y):
        return self.loss(self.members.to(x.dtype), x, y)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({}, lambda: nn.Linear(4, 3)),
        ({"repulsion": 0.3, "label_smoothing": 0.1}, lambda: mlp(act=nn.ReLU).float()),
    ],
)
def test_the_loss_conforms_to_its_kind(as_a_user, options, make):
    x, y = batch(6)
    check_loss(
        OfInputs(options, make).double(), x.requires_grad_(), y, compiles=bool(options), symmetric=True
    )


def test_components_move_with_the_loss():
    loss = FoRDELoss(*fit_input_components(normal(9, 4)))
    assert set(loss.state_dict()) == {"components", "scales"}
    assert loss.float().components.dtype == torch.float32
    x, y = batch()
    assert loss(several(mlp, 3), x, y).dtype == torch.float64


# Bad input.


class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return self.bias.expand(len(x), 3)


def test_wrong_arguments_are_refused(as_a_user):
    x, y = batch()
    g, ensemble, loss = normal(3, 5, 4), several(mlp, 3), FoRDELoss()
    components, scales = fit_input_components(x)
    for call, message in [
        (lambda: input_gradient_repulsion(g[0, 0]), r"gradients must have shape .*, got \(4,\)"),
        (lambda: input_gradient_repulsion(g[:, :0]), "none of them 0"),
        (lambda: input_gradient_repulsion(g.long()), "gradients must be a floating-point"),
        (lambda: input_gradient_repulsion(g, eps=0.0), "eps must be greater than 0"),
        (lambda: input_gradient_repulsion(g, components=components), "components and scales must be given together, got no scales"),
        (lambda: FoRDELoss(scales=scales), "components and scales must be given together, got no components"),
        (lambda: FoRDELoss(components, scales[:2]), r"scales must have shape \(4\) for the columns of components"),
        (lambda: FoRDELoss(components[0], scales), r"components must have shape \(any, any\)"),
        (lambda: input_gradient_repulsion(g[..., :3], components=components, scales=scales), r"components must have shape \(3, any\)"),
        (lambda: FoRDELoss(repulsion=-1.0), "repulsion must be at least 0"),
        (lambda: FoRDELoss(label_smoothing=1.5), "label_smoothing"),
        (lambda: loss(ensemble, x, y + 3), r"target must be in 0\.\.2 for the members, got values from 3 to 5"),
        (lambda: loss(ensemble, x, y - 3), r"target must be in 0\.\.2"),
        (lambda: loss(ensemble, x, y.int()), "class indices of dtype int64"),
        (lambda: loss(ensemble, x, y[:3]), r"target must have shape \(7\) for x"),
        (lambda: loss(ensemble, x, y.double()), r"target must have shape \(7, 3\) for the members' outputs"),
        (lambda: loss(ensemble, x.long(), y), "x must be a floating-point tensor.*embed or cast"),
        (lambda: loss(ensemble, x[:0], y[:0]), "x must have at least one row"),
        (lambda: loss([], x, y), "at least one module, got none"),
        (lambda: loss([mlp(), mlp(n_out=2)], x, y), r"outputs of one size, got \(7, 3\) of member 0 and \(7, 2\) of member 1"),
        (lambda: loss([mlp(), mlp(), Blind()], x, y), "the output of member 2 does not"),
        (lambda: loss([Blind(), Blind()], x, y), "the output of member 0 does not"),
        (lambda: loss([nn.Unflatten(1, (2, 2))] * 2, x, y), r"members' outputs must have shape \(2, 7, any\)"),
        (lambda: RepulsiveEnsemble(mlp, 0), "n_models must be an integer of at least 1"),
        (lambda: RepulsiveEnsemble(lambda: ensemble, 2), "make_model must return a new module"),
        (lambda: fit_input_components(x[:1]), "n at least 2, got"),
        (lambda: fit_input_components(x, rank=5), "rank must be at most .* 4, got 5"),
        (lambda: fit_input_components(x, rank=0), "rank must be an integer of at least 1"),
        (lambda: fit_input_components(x * math.nan), "inputs must be finite"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
