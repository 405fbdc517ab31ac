"""Products with Hessians against torch.func's dense ones, Lanczos against numpy's eigenvalues, the scheduler on quadratics."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from posterity.optimization import (
    LanczosLearner,
    extreme_eigenvalues,
    ggn_matvec,
    hessian_matvec,
    lanczos,
    spectral_density,
)
from posterity.optimization._krylov import ritz


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(n=9, seed=1, dtype=torch.float64):
    g = generator(seed)
    return torch.randn(n, 3, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


def dense(function, model):
    """Return the Hessian of a function of the model, and what its outputs' Jacobian needs, flat."""
    free = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in free.values()]
    theta = torch.cat([p.reshape(-1) for p in free.values()])

    def flat(theta):
        parts = zip(free.items(), theta.split(sizes), strict=True)
        return function({name: part.view(p.shape) for (name, p), part in parts})

    return flat, theta


def columns(matvec, dim, dtype=torch.float64):
    return torch.stack([matvec(v) for v in torch.eye(dim, dtype=dtype)], 1)


def test_the_product_is_that_of_the_dense_hessian():
    model, (x, y) = network(), batch()
    flat, theta = dense(lambda free: F.cross_entropy(functional_call(model, free, (x,)), y), model)
    found = columns(hessian_matvec(model, cross_entropy, (x, y)), len(theta))
    torch.testing.assert_close(found, hessian(flat)(theta), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_and_tied_parameters_count_once_or_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    model, (x, y) = Tied().double(), batch()

    def loss(weight):
        return F.cross_entropy((x @ weight.view(3, 3).T).tanh() @ weight.view(3, 3).T + model.second.bias, y)

    found = columns(hessian_matvec(model, cross_entropy, (x, y)), 9)
    expected = hessian(loss)(model.first.weight.detach().reshape(-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_gauss_newton_product_is_that_of_the_dense_matrix_and_has_no_negative_eigenvalue():
    model, (x, y) = network(), batch()
    flat, theta = dense(lambda free: functional_call(model, free, (x,)).reshape(-1), model)
    J, outputs = jacrev(flat)(theta), flat(theta)
    inner = hessian(lambda f: F.cross_entropy(f.view(9, 3), y))(outputs)
    found = columns(ggn_matvec(model, F.cross_entropy, (x, y)), len(theta))
    torch.testing.assert_close(found, J.T @ inner @ J, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(found)[0] > -1e-12
    whole = columns(hessian_matvec(model, cross_entropy, (x, y)), len(theta))
    assert (found - whole).abs().max() > 0.01  # the network bends


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_where_squared_loss_is_zero():
    x, y = batch()
    linear = nn.Linear(3, 3).double()
    both = [ggn_matvec(linear, F.cross_entropy, (x, y)), hessian_matvec(linear, cross_entropy, (x, y))]
    torch.testing.assert_close(columns(both[0], 12), columns(both[1], 12), rtol=0, atol=1e-12)
    model = network()
    fit = model(x).detach()
    both = [
        ggn_matvec(model, F.mse_loss, (x, fit)),
        hessian_matvec(model, lambda m, x, y: F.mse_loss(m(x), y), (x, fit)),
    ]
    torch.testing.assert_close(columns(both[0], 31), columns(both[1], 31), rtol=0, atol=1e-12)
    flat = ggn_matvec(model, lambda f, y: f.sum(), (x, y))
    assert not columns(flat, 31).any()


def test_the_product_stays_that_of_the_weights_it_was_made_at():
    model, data = network(), batch()
    matvec, v = hessian_matvec(model, cross_entropy, data), torch.randn(31, dtype=torch.float64)
    before = matvec(v)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(matvec(v), before)
    assert not torch.allclose(hessian_matvec(model, cross_entropy, data)(v), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_read_in_float32_and_autocast_changes_nothing(as_a_user, dtype):
    narrow, data = network(dtype), batch(dtype=dtype)
    wide = network(torch.float32)
    wide.load_state_dict(narrow.state_dict())
    v = torch.randn(31, generator=generator())
    expected = hessian_matvec(wide, cross_entropy, (data[0].float(), data[1]))(v)
    torch.testing.assert_close(hessian_matvec(narrow, cross_entropy, data)(v), expected)
    assert hessian_matvec(narrow, cross_entropy, data)(v.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype), torch.no_grad():
        matvec = hessian_matvec(wide, cross_entropy, (data[0].float(), data[1]))
        torch.testing.assert_close(matvec(v), expected)
        ends = extreme_eigenvalues(matvec, 31, generator=generator())
    torch.testing.assert_close(ends, extreme_eigenvalues(matvec, 31, generator=generator()))
    with torch.inference_mode():
        matvec = hessian_matvec(wide, cross_entropy, (data[0].float(), data[1]))
        torch.testing.assert_close(matvec(v.clone()), expected)
        assert len(lanczos(matvec, v, 5)[0]) == 5


def test_a_transformer_has_a_hessian_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    loss = lambda model, x: model(x)[..., 0].square().mean()  # noqa: E731
    with pytest.raises(ValueError, match="model must be in eval mode, got active dropout in self_attn"):
        hessian_matvec(layer, loss, (x,))
    matvec = hessian_matvec(layer.eval(), loss, (x,))
    dim = sum(p.numel() for p in layer.parameters())
    u, v = torch.randn(2, dim, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(u @ matvec(v), v @ matvec(u))  # symmetric, through attention
    # and the second difference of the loss along v
    h, start = 1e-4, [p.detach().clone() for p in layer.parameters()]
    values = []
    with torch.no_grad():
        for step in (-h, 0.0, h):
            parts = v.split([p.numel() for p in start])
            for p, s, part in zip(layer.parameters(), start, parts, strict=True):
                p.copy_(s + step * part.view(s.shape))
            values.append(loss(layer, x))
    torch.testing.assert_close(
        v @ matvec(v), (values[0] - 2 * values[1] + values[2]) / h**2, rtol=1e-4, atol=0
    )


def symmetric(n=30, seed=0):
    a = torch.randn(n, n, dtype=torch.float64, generator=generator(seed))
    return a + a.T


def test_as_many_steps_as_dimensions_recover_the_spectrum():
    a = symmetric()
    v0 = torch.randn(30, dtype=torch.float64, generator=generator(1))
    alpha, beta, V = lanczos(lambda v: a @ v, 1e30 * v0, 99)  # cut to 30
    assert (len(alpha), len(beta), V.shape) == (30, 29, (30, 30))
    np.testing.assert_allclose(ritz(alpha, beta)[0], np.linalg.eigvalsh(a.numpy()), atol=1e-8)
    torch.testing.assert_close(V @ V.T, torch.eye(30).double(), rtol=0, atol=1e-12)
    T = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    torch.testing.assert_close(V @ a @ V.T, T, rtol=0, atol=1e-11)
    torch.testing.assert_close(V[0], v0 / v0.norm())


def test_reorthogonalisation_keeps_the_basis_orthogonal_where_rounding_would_not():
    values = torch.cat([torch.linspace(0, 1, 199), torch.tensor([100.0])])
    v0 = torch.ones(200)
    V = lanczos(lambda v: values * v, v0, 60)[2]
    assert (V @ V.T - torch.eye(60)).abs().max() < 1e-5
    V = lanczos(lambda v: values * v, v0, 60, reorthogonalize=False)[2]
    assert (V @ V.T - torch.eye(60)).abs().max() > 0.1


def test_the_quadrature_has_the_first_2m_moments_and_one_more_is_off():
    a, m = symmetric(20) / 5, 4
    v = torch.randn(20, dtype=torch.float64, generator=generator(7))
    found = spectral_density(lambda v: a @ v, 20, n_iter=m, dtype=torch.float64, generator=generator(7))
    v = v / v.norm()  # the same draw
    power, off = v, []
    for k in range(2 * m + 1):
        off.append(float(found.moment(k) - v @ power) / float(v @ power))
        power = a @ power
    assert max(map(abs, off[: 2 * m])) < 1e-10
    assert abs(off[2 * m]) > 1e-3


def test_density_moments_and_ends_are_means_over_probes_of_the_matrix():
    a = symmetric(40, 2)
    exact = torch.linalg.eigvalsh(a)
    found = spectral_density(
        lambda v: a @ v, 40, n_iter=40, n_probes=80, dtype=torch.float64, generator=generator()
    )
    torch.testing.assert_close(found.weights.sum(1), torch.ones(80).double())
    torch.testing.assert_close(torch.stack([found.smallest, found.largest]), exact[[0, -1]])
    second = exact.square().mean()
    assert abs(found.moment(2) - second) < 4 * second * math.sqrt(2 / 40 / 80)
    grid = torch.linspace(-60, 60, 2001).double()
    density = found.density(grid, 1.5)
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.tensor(1.0).double())
    smooth = torch.distributions.Normal(exact, 1.5).log_prob(grid[:, None]).exp().mean(1)
    assert (density - smooth).abs().max() < 0.2 * smooth.max()


def test_an_exhausted_space_ends_the_iteration_and_a_probe_that_ends_earlier_is_filled_up():
    low = torch.randn(30, 3, dtype=torch.float64, generator=generator())
    alpha, beta, _ = lanczos(lambda v: low @ (low.T @ v), torch.ones(30).double(), 20)
    assert len(alpha) <= 4
    values, exact = ritz(alpha, beta)[0], torch.linalg.eigvalsh(low.T @ low)
    torch.testing.assert_close(values[-3:], exact)
    assert len(lanczos(lambda v: 0 * v, torch.ones(5), 5)[0]) == 1
    calls = iter(range(100))

    def another_matrix(v):  # one eigenvalue for the first probe, more for the second
        return v if next(calls) == 0 else torch.arange(5.0) * v

    found = spectral_density(another_matrix, 5, n_iter=5, n_probes=2, generator=generator())
    assert found.nodes.shape == (2, 5)
    assert found.weights[0].tolist() == [1, 0, 0, 0, 0]
    assert (found.smallest.round(decimals=3), found.largest.round(decimals=3)) == (0, 4)


def test_degeneracy_is_the_share_of_eigenvalues_near_zero():
    values = torch.zeros(400)
    values[:100] = torch.linspace(1, 2, 100)
    found = spectral_density(
        lambda v: values * v, 400, n_iter=30, n_probes=20, dtype=torch.float32, generator=generator()
    )
    assert abs(found.degeneracy - 0.75) < 0.03


def test_extreme_eigenvalues_are_the_ends_with_their_vectors():
    a = symmetric(60, 3)
    low, high, v_low, v_high = extreme_eigenvalues(
        lambda v: a @ v, 60, n_iter=60, dtype=torch.float64, generator=generator()
    )
    exact = torch.linalg.eigvalsh(a)
    torch.testing.assert_close(torch.stack([low, high]), exact[[0, -1]])
    for value, vector in ((low, v_low), (high, v_high)):
        torch.testing.assert_close(a @ vector, value * vector, rtol=0, atol=1e-7)
        torch.testing.assert_close(vector.norm(), torch.tensor(1.0).double())


class Quadratic(nn.Module):
    def __init__(self, curvature):
        super().__init__()
        self.w = nn.Parameter(torch.ones(len(curvature), dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)  # the scheduler measures in eval mode

    def forward(self, curvature):
        return (curvature * self.w.square()).sum() / 2


def quadratic(model, curvature):
    return model(curvature)


def descend(curvature, steps, **options):
    model = Quadratic(curvature)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=0.5 if options.get("learn_momentum", True) else 0.0
    )
    learner = LanczosLearner(optimizer, model, quadratic, every=10**6, generator=generator(), **options)
    optimizer.step()  # without a gradient: nothing moves
    learner.observe((curvature,))
    learner.step()
    assert model.dropout.training
    sizes = []
    for _ in range(steps):
        optimizer.zero_grad()
        quadratic(model, curvature).backward()
        optimizer.step()
        learner.step()
        sizes.append(float(model.w.detach().norm()))
    return sizes, optimizer.param_groups[0], learner


def test_the_scheduler_reaches_the_rate_of_the_heavy_ball_and_without_momentum_that_of_descent():
    curvature = torch.tensor([1.0, 3.0, 30.0, 100.0], dtype=torch.float64)
    sizes, group, learner = descend(curvature, 200)
    assert (round(learner.smallest, 6), round(learner.largest, 6)) == (1, 100)
    rate = (math.sqrt(100) - 1) / (math.sqrt(100) + 1)
    assert abs(group["momentum"] - rate**2) < 1e-6
    assert abs(group["lr"] - (2 / 11) ** 2) < 1e-6
    assert abs((sizes[-1] / sizes[99]) ** 0.01 - rate) < 0.1 * (1 - rate)
    sizes, group, _ = descend(curvature, 200, learn_momentum=False)
    assert abs((sizes[-1] / sizes[99]) ** 0.01 - 99 / 101) < 1e-6
    assert group["momentum"] == 0


def test_safety_and_limits_bound_the_rate():
    curvature = torch.tensor([1.0, 9.0], dtype=torch.float64)
    assert abs(descend(curvature, 0, safety=0.5)[1]["lr"] - 0.125) < 1e-8
    assert descend(curvature, 0, max_lr=0.1)[1]["lr"] == 0.1
    assert descend(curvature, 0, min_lr=0.4)[1]["lr"] == 0.4


def test_the_scheduler_measures_when_it_is_time_and_averages_what_falls_but_not_what_rises():
    model = Quadratic(torch.ones(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    learner = LanczosLearner(optimizer, model, quadratic, every=3, average=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.3  # nothing is measured yet
    seen = []
    for value in (4.0, 9.9, 9.9, 2.0, 9.9, 9.9, 8.0, 9.9, 9.9, -5.0):
        learner.observe((torch.tensor([value], dtype=torch.float64),))
        optimizer.step()
        learner.step()
        seen.append((learner.largest, optimizer.param_groups[0]["lr"]))
    assert [largest for largest, _ in seen] == [4, 4, 4, 3, 3, 3, 8, 8, 8, 8]  # means 4, 3, 5.5
    assert abs(seen[0][1] - 0.25) < 1e-12  # one curvature: 1 / L
    assert seen[-1][1] == seen[-2][1]  # a negative one changes nothing


def test_the_state_of_the_scheduler_goes_round(tmp_path):
    def make():
        model = Quadratic(torch.ones(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
        return LanczosLearner(optimizer, model, quadratic, every=2, average=0.5), optimizer

    def advance(learner, optimizer, value):
        learner.observe((torch.tensor([value], dtype=torch.float64),))
        optimizer.step()
        learner.step()

    first, second = make(), make()
    for value in (4.0, 3.0, 2.0):
        advance(*first, value)
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    for value in (9.0, 1.0, 9.0):
        advance(*first, value)
        advance(*second, value)
    assert first[0].largest == second[0].largest == 2.0  # means 4, 3, 2
    assert first[1].param_groups[0]["lr"] == second[1].param_groups[0]["lr"]


MODEL, DATA = nn.Linear(3, 3), batch(dtype=torch.float32)
IDENTITY = lambda v: v  # noqa: E731


def learner(**options):
    return LanczosLearner(torch.optim.SGD(MODEL.parameters(), lr=0.1), MODEL, cross_entropy, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hessian_matvec(MODEL, cross_entropy, ()), "batch must be a tuple of tensors"),
        (lambda: hessian_matvec(MODEL, cross_entropy, (DATA[0][:0], DATA[1][:0])), r"batch must hold samples, got shapes \[\(0, 3"),
        (lambda: hessian_matvec(MODEL, cross_entropy, (DATA[0], None)), "batch must hold tensors"),
        (lambda: hessian_matvec(MODEL, lambda m, x, y: m(x), DATA), r"loss_fn must return a scalar tensor, got .*9, 3"),
        (lambda: hessian_matvec(MODEL, lambda m, x, y: 1.0, DATA), "loss_fn must return a scalar tensor, got float"),
        (lambda: hessian_matvec(MODEL, lambda m, x, y: x.sum(), DATA), "loss_fn must depend on the model's parameters"),
        (lambda: hessian_matvec(nn.Tanh(), cross_entropy, DATA), "model must have a parameter that requires a gradient"),
        (lambda: hessian_matvec(torch.tanh, cross_entropy, DATA), "model must be an nn.Module"),
        (lambda: hessian_matvec(nn.Sequential(MODEL, nn.Dropout()), cross_entropy, DATA), "active dropout in 1"),
        (lambda: hessian_matvec(nn.Sequential(MODEL, nn.BatchNorm1d(3)), cross_entropy, DATA), "active batch statistics in 1"),
        (lambda: hessian_matvec(MODEL, cross_entropy, DATA)(torch.ones(11)), r"matvec takes shape \(12,\)"),
        (lambda: ggn_matvec(MODEL, F.cross_entropy, DATA[:1]), "batch must hold inputs and y, got 1"),
        (lambda: ggn_matvec(MODEL, lambda f, y: f, DATA), "output_loss must return a scalar"),
        (lambda: lanczos(IDENTITY, torch.zeros(3), 2), "v0 must not be zero"),
        (lambda: lanczos(IDENTITY, torch.zeros(0), 2), "v0 must not be zero"),
        (lambda: lanczos(IDENTITY, torch.tensor([1.0, math.nan]), 2), "v0 must be finite"),
        (lambda: lanczos(IDENTITY, torch.ones(3).long(), 2), "v0 must be a floating-point tensor"),
        (lambda: lanczos(IDENTITY, torch.ones(3), 0), "n_iter must be an integer of at least 1"),
        (lambda: lanczos(lambda v: v[:2], torch.ones(3), 2), r"matvec must return shape \(3,\)"),
        (lambda: lanczos(lambda v: None, torch.ones(3), 2), "matvec must return a real tensor, got NoneType"),
        (lambda: lanczos(lambda v: torch.where(v == 0, v, math.nan), torch.tensor([0.0, 1.0]), 2), "matvec must return finite products, got NaN or infinity in iteration 1"),
        (lambda: spectral_density(IDENTITY, 3, n_probes=0), "n_probes must be an integer of at least 1"),
        (lambda: spectral_density(IDENTITY, 0), "dim must be an integer of at least 1"),
        (lambda: spectral_density(IDENTITY, 3, dtype=torch.bfloat16), "dtype must be one of torch.float32, torch.float64"),
        (lambda: extreme_eigenvalues(IDENTITY, 3, n_iter=0), "n_iter must be an integer of at least 1"),
        (lambda: spectral_density(IDENTITY, 3).density(torch.ones(2), 0.0), "width must be greater than 0"),
        (lambda: spectral_density(IDENTITY, 3).moment(-1), "k must be an integer of at least 0"),
        (lambda: learner(every=0), "every must be an integer of at least 1"),
        (lambda: learner(n_iter=0), "n_iter must be an integer of at least 1"),
        (lambda: learner(safety=0.0), "safety must be greater than 0"),
        (lambda: learner(average=1.0), r"average must be in \[0, 1\)"),
        (lambda: learner(min_lr=-1.0), "min_lr must be at least 0"),
        (lambda: learner(min_lr=1.0, max_lr=0.5), "max_lr must be at least min_lr"),
        (lambda: learner(last_epoch=4), "last_epoch must be -1 where an optimizer's groups have no 'initial_lr', got 4"),
        (lambda: learner().step(), "batch must be given to observe"),
        (lambda: LanczosLearner(torch.optim.Adam(MODEL.parameters()), MODEL, cross_entropy), "optimizer must have a momentum, got Adam"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_drawn_comes_from_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = symmetric(8)
    first, second = (
        extreme_eigenvalues(lambda v: a.float() @ v, 8, n_iter=3, generator=generator(5)) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), before)
