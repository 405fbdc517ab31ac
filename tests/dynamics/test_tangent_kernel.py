"""Tangent kernels against Jacobians by loops, arc-cosine kernels and least squares."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from posterity.dynamics import NTKMLP, empirical_ntk, ntk_regression, tangent_kernel, train_ensemble
from posterity.lab.memory import peak_bytes
from posterity.testing import check_instrument, check_layer


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tied(nn.Module):
    """One matrix twice, a frozen one between, a buffer, and a value a sample without an axis."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.a.weight
        self.b.requires_grad_(False)
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x):
        return self.c((self.b(self.a(x).tanh()) + self.shift).sin()).sum(1)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, ids):
        return self.head(self.table(ids).tanh().mean(1))


class TooLarge(nn.Module):
    """Runs out of memory where many samples come at once."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        try:
            float(x.detach().sum())  # which vmap refuses
        except RuntimeError as error:
            raise torch.OutOfMemoryError("out of memory") from error
        return self.net(x)


def frozen():
    inner = nn.Sequential(nn.Linear(5, 3), nn.ReLU(inplace=True))
    net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), inner, nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    inner[0].bias.requires_grad_(False)
    return net


def shared():
    one = nn.Linear(4, 4)
    return nn.Sequential(one, nn.Tanh(), one)


def conv():
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.ReLU(), nn.BatchNorm1d(3), nn.Dropout(), nn.Flatten(), nn.Linear(9, 2)
    )


ROWS = {
    "row of layers": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3, bias=False)
    ),
    "parts of it frozen": frozen,
    "NTKMLP": lambda: NTKMLP(4, 6, depth=3, out_features=2, alpha=1.7),
}
MODELS = {**ROWS, "shared layer": shared, "tied": Tied, "words": Words, "conv": conv}


def points(name, n, seed):
    if name == "words":
        return torch.randint(7, (n, 3), generator=torch.Generator().manual_seed(seed))
    return randn(n, 2, 4, seed=seed) if name == "conv" else randn(n, 4, seed=seed)


def jacobian(model, x):
    """Rows of gradients, one sample and output at a time: (n, k, parameters)."""
    model = copy.deepcopy(model).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for point in x:
        values = model(point[None]).flatten()
        rows.append([torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)])
                     for value in values])  # fmt: skip
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_is_the_product_of_jacobians_in_whatever_blocks(name, monkeypatch):
    model = seeded(MODELS[name])
    x, z = points(name, 3, 1), points(name, 2, 2)
    j, other = jacobian(model, x), jacobian(model, z)
    full, across = (torch.einsum("iap,jbp->ijab", j, each) for each in (j, other))
    for memory, batch_size, n in ((2**28, None, 3), (2**28, 2, 3), (1, None, 2)):
        monkeypatch.setattr(tangent_kernel, "MEMORY", memory)  # at 1 one output of one sample at a time
        x, z, full, across = x[:n], z[:n], full[:n, :n], across[:n, :n]
        for x2, expected in ((None, full), (z, across)):
            got = empirical_ntk(model, x, x2, outputs="full", batch_size=batch_size)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
            mean = expected.diagonal(dim1=2, dim2=3).mean(-1)
            got = empirical_ntk(model, x, x2, batch_size=batch_size)
            torch.testing.assert_close(got, mean, rtol=1e-10, atol=1e-10)
    kernel = empirical_ntk(model, x)
    torch.testing.assert_close(kernel, kernel.T)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12 * kernel.trace()


def test_running_out_of_memory_is_said_and_no_reason_for_the_slow_loop():
    with pytest.raises(torch.OutOfMemoryError):
        empirical_ntk(seeded(lambda: TooLarge(nn.Linear(4, 2))), randn(3, 4))


@pytest.mark.parametrize("name", ROWS)
def test_the_sum_over_layers_is_the_general_route(name):
    model = seeded(ROWS[name])
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)  # which a sum over layers would pass by
    x = points(name, 9, 3)
    for outputs in ("trace", "full"):
        torch.testing.assert_close(
            empirical_ntk(model, x, outputs=outputs), empirical_ntk(hooked, x, outputs=outputs), rtol=1e-10, atol=1e-10
        )  # fmt: skip


def test_hooks_that_change_values_count():
    model, plain = (seeded(ROWS["row of layers"]) for _ in range(2))
    model[-1].register_forward_hook(lambda module, given, out: 3 * out)
    x = points("", 5, 0)
    torch.testing.assert_close(empirical_ntk(model, x), 9 * empirical_ntk(plain, x))


def test_weights_may_be_given_in_place_of_the_models_own():
    one, other = seeded(Tied, 0), seeded(Tied, 1)
    x = points("", 5, 0)
    weights = dict(other.named_parameters())
    got = empirical_ntk(one, x, params=weights)
    torch.testing.assert_close(got, empirical_ntk(other, x))
    assert not torch.allclose(got, empirical_ntk(one, x))
    half = {"a.weight": weights["a.weight"]}
    assert not torch.allclose(empirical_ntk(one, x, params=half), got)


@pytest.mark.parametrize("route", ["row of layers", "conv"])
def test_the_peak_of_memory_does_not_grow_with_the_number_of_samples(route, monkeypatch):
    monkeypatch.setattr(tangent_kernel, "MEMORY", 2**20)
    if route == "conv":
        model = seeded(lambda: nn.Sequential(nn.Conv1d(2, 16, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)))
        few, many = points("conv", 60, 0), points("conv", 120, 0)
    else:
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2)))
        few, many = points("", 50, 0), points("", 100, 0)
    peaks = [peak_bytes(lambda x=x: empirical_ntk(model, x)) - 8 * len(x) ** 2 for x in (few, many)]
    assert peaks[1] < 1.15 * peaks[0]
    assert max(peaks) < 2**20


def test_a_wide_ntkmlp_has_the_arc_cosine_kernel():
    width, d, alpha = 100_000, 3, 1.5
    net = NTKMLP(d, width, depth=2, alpha=alpha, generator=torch.Generator().manual_seed(0)).double()
    x = torch.nn.functional.normalize(randn(4, d), dim=1)
    cosine = (x @ x.T).clamp(-1, 1)
    angle = cosine.acos()
    slope = (math.pi - angle) / (2 * math.pi)  # of relu' relu'
    value = (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)  # of relu relu
    expected = alpha**2 / d * (cosine * slope + value)  # sigma^4 = alpha^2 at depth 2
    w, v = (p.detach() for p in net.parameters())
    u = x @ w.T
    each = u[:, None].relu() * u.relu() + v.square()[0] * cosine[..., None] * (u[:, None] > 0) * (u > 0)
    error = alpha**2 / d * each.std(2) / math.sqrt(width)
    got = empirical_ntk(net, x)
    torch.testing.assert_close(got, alpha**2 / d * each.mean(2), rtol=1e-10, atol=1e-10)
    assert ((got - expected).abs() < 5 * error).all()


def test_ntkmlp_is_a_product_of_scaled_matrices():
    net = seeded(lambda: NTKMLP(4, 6, depth=3, out_features=2, alpha=1.7))
    x, (a, b, c) = randn(5, 4), net.parameters()
    expected = 1.7 * ((x @ a.T / 2).relu() @ b.T / math.sqrt(6)).relu() @ c.T / math.sqrt(6)
    torch.testing.assert_close(net(x), expected)
    generator = torch.Generator().manual_seed(0)
    wide = NTKMLP(100, 1000, generator=generator)
    for p in wide.parameters():
        assert abs(p.mean()) < 5 / math.sqrt(p.numel())
        assert abs(p.var() - 1) < 5 * math.sqrt(2 / p.numel())


def test_ntkmlp_is_a_layer(as_a_user):
    check_layer(NTKMLP(4, 6, generator=torch.Generator().manual_seed(0)), randn(5, 4).float(), shape=(5, 1))


# Regression.


def test_descent_of_a_linear_model_from_zero_ends_where_its_kernel_regresses():
    x, y, x_test = randn(3, 6), randn(3, 2, seed=1), randn(3, 6, seed=2)

    def make(seed):
        return seeded(lambda: nn.Linear(6, 2), seed)

    model = make(0)
    torch.testing.assert_close(empirical_ntk(model, x), x @ x.T + 1)
    found = train_ensemble(make, x, y, x_test, n_models=2, lr=0.4, n_steps=5_000, tol=1e-20)
    assert found.converged.all()
    for member in range(2):
        last = {name: p[member] for name, p in found.params.items()}
        for params in (None, last):  # its features never move
            for outputs in ("trace", "full"):
                got = ntk_regression(model, x, y, x_test, params=params, outputs=outputs)
                torch.testing.assert_close(got, found.predictions[member], rtol=0, atol=1e-6)


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("start", ["zero", "network"])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_is_the_solution_of_the_normal_equations(outputs, start, ridge):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    x, y, x_test = randn(6, 4), randn(6, 2, seed=1), randn(3, 4, seed=2)
    j, other = jacobian(model, x), jacobian(model, x_test)
    f, f_test = (
        model(z).detach() if start == "network" else torch.zeros(len(z), 2).double() for z in (x, x_test)
    )
    if outputs == "full":
        j, other = j.flatten(0, 1).numpy(), other.flatten(0, 1).numpy()
        solved = np.linalg.solve(j @ j.T + ridge * np.eye(12), (y - f).flatten().numpy())
        moved = (other @ (j.T @ solved)).reshape(3, 2)
    else:
        kernel, across = (np.einsum("iap,jap->ij", j, each) / 2 for each in (j, other))
        moved = across.T @ np.linalg.solve(kernel + ridge * np.eye(6), (y - f).numpy())
    got = ntk_regression(model, x, y, x_test, outputs=outputs, start=start, ridge=ridge)
    np.testing.assert_allclose(got, f_test.numpy() + moved, rtol=1e-5, atol=1e-6)


def test_a_network_without_a_residual_predicts_itself_from_the_network_and_not_from_zero():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    x, x_test = randn(6, 4), randn(3, 4, seed=1)
    y, values = model(x).detach(), model(x_test).detach()
    torch.testing.assert_close(ntk_regression(model, x, y, x_test, start="network"), values)
    assert (ntk_regression(model, x, y, x_test) - values).abs().max() > 0.01


def test_more_samples_than_features_end_in_least_squares():
    x, y, x_test = randn(9, 2), randn(9, 1, seed=1), randn(4, 2, seed=2)
    model = seeded(lambda: nn.Linear(2, 1, bias=False))
    weights = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ntk_regression(model, x, y, x_test), x_test.numpy() @ weights, atol=1e-5)


def test_a_kernel_that_rounding_made_indefinite_is_least_squares_too():
    x, y, x_test = randn(200, 2).float(), randn(200, 1, seed=1).float(), randn(20, 2, seed=2).float()
    rounded = (x @ x.T).double()
    assert torch.linalg.eigvalsh(rounded)[0] < -torch.finfo(torch.float32).eps * rounded.diagonal().mean()
    model = seeded(lambda: nn.Linear(2, 1, bias=False)).float()
    weights = torch.linalg.lstsq(x.double(), y.double()).solution
    found = ntk_regression(model, x, y, x_test)
    torch.testing.assert_close(found.double(), x_test.double() @ weights, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_zeros_predicts_zero():
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(
        ntk_regression(model, randn(4, 2), randn(4, 1), randn(3, 2)), torch.zeros(3, 1).double()
    )


def test_equal_points_need_a_ridge():
    x, y = randn(3, 4), randn(3, 1)
    x[2] = x[0]
    model = seeded(lambda: nn.Linear(4, 1))
    with pytest.raises(ValueError, match="rows 0 and 2: leave one out or set ridge"):
        ntk_regression(model, x, y, x)
    y[2] = y[0]
    twice = ntk_regression(model, x, y, x, ridge=1e-6)
    torch.testing.assert_close(
        twice, ntk_regression(model, x[:2], y[:2], x, ridge=5e-7), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["row of layers", "tied"])
def test_kernels_conform_to_their_kind(as_a_user, name):
    check_instrument(empirical_ntk, seeded(MODELS[name]).float(), randn(5, 4).float())


def test_regressions_conform_to_their_kind(as_a_user):
    model = seeded(ROWS["row of layers"]).float()
    x = randn(5, 4).float()
    y = torch.zeros(5, 3)
    y[:, 0] = torch.arange(5)
    check_instrument(lambda model, x, y: ntk_regression(model, x[:4], y[:4], x[4:], ridge=0.5), model, x, y)


X, Y, LINEAR = torch.eye(3), torch.ones(3, 1), nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NTKMLP(0, 3), "in_features must be an integer of at least 1, got 0"),
        (lambda: NTKMLP(2, 3, depth=0), "depth must be an integer of at least 1"),
        (lambda: NTKMLP(2, 3, alpha=0.0), "alpha must be greater than 0, got 0.0"),
        (lambda: NTKMLP(2, 3, alpha=-1.0), "alpha must be greater than 0, got -1.0"),
        (lambda: NTKMLP(2, 3)(torch.ones(4, 3)), r"x must have 2 features, got shape \(4, 3\)"),
        (lambda: empirical_ntk(torch.relu, X), "model must be an nn.Module, got builtin"),
        (lambda: empirical_ntk(nn.ReLU(), X), "model must have a parameter that requires a gradient"),
        (lambda: empirical_ntk(LINEAR, X[:0]), "x1 must be a tensor with at least one row"),
        (lambda: empirical_ntk(LINEAR, X / 0), "x1 must be finite"),
        (lambda: empirical_ntk(LINEAR, X, X[:, :2]), r"x2 must have shape \(any, 3\) for x1, got \(3, 2\)"),
        (lambda: empirical_ntk(LINEAR, X, batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: empirical_ntk(LINEAR, X, outputs="both"), "outputs must be one of 'trace', 'full'"),
        (lambda: empirical_ntk(LINEAR, X, params={"w": X}), "params must have names of model's parameters, got 'w'"),
        (lambda: empirical_ntk(LINEAR, X, params={"weight": X}), r"params must have shape \(1, 3\) at 'weight', got \(3, 3\)"),
        (lambda: empirical_ntk(nn.Sequential(LINEAR, nn.Flatten(0)), torch.eye(3)[None]), "model must return a float tensor"),
        (lambda: ntk_regression(LINEAR, X, Y[:, 0], X), r"give y\[:, None\]\), got \(3,\)"),
        (lambda: ntk_regression(LINEAR, X, Y[:2], X), r"y must have shape \(3, any\) for x"),
        (lambda: ntk_regression(LINEAR, X, Y / 0, X), "y must be finite"),
        (lambda: ntk_regression(LINEAR, X, X, X), "y must have a column for each output of model, got 3 for 1"),
        (lambda: ntk_regression(LINEAR, X, Y, X[:, :2]), "x_test must have shape"),
        (lambda: ntk_regression(LINEAR, X, Y, X, ridge=-1.0), "ridge must be at least 0, got -1.0"),
        (lambda: ntk_regression(LINEAR, X, Y, X, start="end"), "start must be one of 'zero', 'network'"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
