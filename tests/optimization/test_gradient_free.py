import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from posterity.optimization import gradient_free as module
from posterity.optimization import guess_and_check, stacked_logits, weight_norm_product

INF = math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(bias=True, dtype=torch.float32, inputs=6, classes=3):
    layers = [nn.Linear(inputs, 8, bias=bias), nn.ReLU(), nn.Linear(8, 5, bias=bias), nn.Tanh(), nn.Linear(5, classes, bias=bias)]  # fmt: skip
    return nn.Sequential(*layers).to(dtype)


class Pair(nn.Module):
    """No sequence of layers, and a weight used twice."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.read = nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 3, dtype=dtype)

    def forward(self, x):
        return self.read(self.first(self.first(x).relu()) + x)


def shared(dtype):
    layer = nn.Linear(6, 6, dtype=dtype)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.GELU(), nn.Linear(6, 2, dtype=dtype))


def convolution(dtype):
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).to(dtype).eval()  # fmt: skip


MODELS = {
    "perceptron": lambda dtype: perceptron(dtype=dtype), "without biases": lambda dtype: perceptron(False, dtype),
    "linear": lambda dtype: nn.Linear(6, 3, dtype=dtype), "shared": shared, "convolution": convolution, "pair": Pair,
    "activation first": lambda dtype: nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Linear(6, 3, dtype=dtype), nn.ReLU()),
}  # fmt: skip


def population(model, size, seed=0):
    generator = seeded(seed)
    return {name: torch.randn((size, *p.shape), generator=generator, dtype=torch.float64).to(p) for name, p in model.named_parameters()}  # fmt: skip


@pytest.mark.parametrize("at_once", [20_000_000, 700])  # in one go, and in several
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_stacked_logits_are_those_of_a_loop(make, dtype, tol, at_once, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    model, x = make(dtype), torch.randn(7, 6, generator=seeded(1)).to(dtype)
    params = population(model, 9)
    loop = torch.stack([functional_call(model, {name: p[k] for name, p in params.items()}, (x,)) for k in range(9)])  # fmt: skip
    torch.testing.assert_close(stacked_logits(model, params, x), loop, rtol=tol, atol=tol * float(loop.detach().abs().max()))  # fmt: skip


def test_gradients_go_through_stacked_logits():
    for make in (MODELS["perceptron"], Pair):
        model, x = make(torch.float64), torch.randn(4, 6, dtype=torch.float64)
        params = {name: p.requires_grad_() for name, p in population(model, 3).items()}
        stacked_logits(model, params, x).square().sum().backward()
        for k in range(3):
            one = {name: p[k].detach().requires_grad_() for name, p in params.items()}
            functional_call(model, one, (x,)).square().sum().backward()
            for name, p in one.items():
                torch.testing.assert_close(params[name].grad[k], p.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("x", "y", "rate"), [
    ([[1.0, 2.0]], [1], 1 / 2), ([[1.0, 0.0], [0.0, 1.0]], [0, 0], 1 / 4), ([[1.0, 0.0], [0.0, 1.0]], [0, 1], 1 / 4),
    ([[0.3, -2.0], [-0.3, 2.0]], [0, 1], 1 / 2), ([[0.3, -2.0], [-0.3, 2.0]], [1, 1], 0.0),
])  # fmt: skip
@pytest.mark.parametrize("init", ["uniform", "sphere", lambda name, shape, generator: torch.randn(shape, generator=generator)])  # fmt: skip
def test_success_rates_are_those_of_symmetry(x, y, rate, init):
    """Without biases the two rows of weights are alike and their signs are too."""
    net, tries = nn.Linear(2, 2, bias=False), 10_000
    found = guess_and_check(net, torch.tensor(x), torch.tensor(y), n_models=10**6, max_tries=tries, init=init, generator=seeded())  # fmt: skip
    assert found.n_tried == tries
    assert abs(found.success_rate - rate) <= 5 * math.sqrt(rate * (1 - rate) / tries)
    assert len(found.losses) == len(found.params["weight"]) == round(found.success_rate * tries)
    assert found.params["weight"].shape[1:] == (2, 2)


def task(n=10, dtype=torch.float32):
    x = torch.randn(n, 6, generator=seeded(3)).to(dtype)
    return x, torch.arange(n) % 2


def plain_loss(net, params, x, y, unit=1.0, normalize=True):
    logits = functional_call(net, params, (x,))
    for p in params.values():
        logits = logits / (p.norm() / unit) if normalize and p.ndim > 1 else logits
    return float(F.cross_entropy(logits, y))


@pytest.mark.parametrize(("bias", "unit", "normalize", "low", "high"), [
    (False, 1.0, True, 0.66, 0.68), (True, 3.0, True, -INF, 0.6), (True, 1.0, False, 0.3, INF), (False, 1.0, True, 0.0, 1.0),
])  # fmt: skip
def test_what_is_kept_is_right_on_all_and_in_the_range(bias, unit, normalize, low, high):
    net, (x, y) = perceptron(bias, classes=2), task(6)
    found = guess_and_check(net, x, y, n_models=12, loss_range=(low, high), unit=unit, normalize=normalize, batch_size=4096, generator=seeded())  # fmt: skip
    assert len(found.losses) == 12
    for k, loss in enumerate(found.losses.tolist()):
        params = {name: p[k] for name, p in found.params.items()}
        assert (functional_call(net, params, (x,)).argmax(1) == y).all()
        assert loss == pytest.approx(plain_loss(net, params, x, y, unit, normalize), abs=1e-6)
        assert low < loss <= high
        assert all(float(p.abs().max()) <= 1 for p in params.values())


def test_a_draw_is_kept_exactly_if_it_solves_the_task_and_no_later_one_is_counted():
    net, (x, y) = perceptron(False, classes=2), task(5)
    every = []

    def init(name, shape, generator):
        every.append((name, torch.rand(shape, generator=generator) * 2 - 1))
        return every[-1][1]

    found = guess_and_check(net, x, y, n_models=7, init=init, loss_range=(0.6, 0.69), batch_size=100, generator=seeded())  # fmt: skip
    names = list(found.params)
    drawn = {name: torch.cat([p for other, p in every if other == name]) for name in names}
    kept = []
    for k in range(len(drawn[names[0]])):
        params = {name: p[k] for name, p in drawn.items()}
        if (functional_call(net, params, (x,)).argmax(1) == y).all() and 0.6 < plain_loss(net, params, x, y) <= 0.69:  # fmt: skip
            kept.append(k)
    assert len(kept) >= 7
    for name in names:
        assert torch.equal(found.params[name], drawn[name][kept[:7]])
    assert found.n_tried == kept[6] + 1
    assert found.success_rate == 7 / found.n_tried


def test_uniform_draws_fill_the_cube_and_the_sphere_has_one_radius():
    net, x, y = nn.Linear(2, 1), torch.ones(1, 2), torch.tensor([0])  # one class: all fit
    options = {"n_models": 4000, "scale": 2.5, "batch_size": 4000, "normalize": False, "generator": seeded()}
    drawn = guess_and_check(net, x, y, **options).params
    flat = torch.cat([p.reshape(4000, -1) for p in drawn.values()], dim=1)
    assert flat.shape == (4000, 3)
    assert -2.5 <= float(flat.min()) < -2.49 < 2.49 < float(flat.max()) <= 2.5
    torch.testing.assert_close(flat.var(0), torch.full((3,), 2.5**2 / 3), rtol=0.06, atol=0)
    drawn = guess_and_check(net, x, y, init="sphere", **options).params
    flat = torch.cat([p.reshape(4000, -1) for p in drawn.values()], dim=1)
    torch.testing.assert_close(flat.norm(dim=1), torch.full((4000,), 2.5))
    torch.testing.assert_close(flat[:, 0].sort().values, torch.linspace(-2.5, 2.5, 4000), rtol=0, atol=0.1)  # Archimedes  # fmt: skip


def test_scaling_a_layer_leaves_the_normalised_loss():
    net, (x, y) = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).double(), task(dtype=torch.float64)  # fmt: skip
    params, losses = population(net, 1), []
    for factor in (1.0, 7.0, 1e-3):
        for name in params:
            scaled = {**params, name: factor * params[name]}
            logits = stacked_logits(net, scaled, x) / weight_norm_product(scaled)[:, None, None]
            losses.append(F.cross_entropy(logits[0], y))
            init = lambda name, shape, _, scaled=scaled: scaled[name].expand(shape)  # noqa: E731
            right = logits[0].argmax(1)
            if right.unique().numel() == 2:
                kept = guess_and_check(net, x, right, init=init, batch_size=1)
                assert float(kept.losses) == pytest.approx(
                    float(F.cross_entropy(logits[0], right)), rel=1e-12
                )
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-12, atol=0)


def test_the_product_of_norms_is_over_weights_and_units():
    params = {
        "a": torch.randn(5, 3, 2),
        "b": torch.randn(5, 3),
        "c": torch.randn(5, 4, 3, 2, 2),
        "d": torch.randn(5),
    }
    expected = [float(params["a"][k].norm() * params["c"][k].norm()) / 9 for k in range(5)]
    torch.testing.assert_close(weight_norm_product(params, unit=3.0), torch.tensor(expected))
    narrow = {"a": torch.full((1, 300, 300), 300.0, dtype=torch.float16)}  # the squares leave float16
    assert float(weight_norm_product(narrow)) == pytest.approx(9e4, rel=1e-4)


def test_the_same_generator_gives_the_same_and_nothing_else_is_touched():
    net, (x, y) = perceptron(classes=2), task(6)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (guess_and_check(net, x, y, n_models=9, generator=seeded(4)) for _ in range(2))
    for name in before:
        assert torch.equal(one.params[name], two.params[name])
        assert torch.equal(net.state_dict()[name], before[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in net.modules())
    torch.manual_seed(4)
    other = guess_and_check(net, x, y, n_models=9)
    assert torch.equal(other.params["0.weight"], one.params["0.weight"])
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_networks_are_drawn_in_their_dtype_with_a_loss_in_float32(dtype):
    net, (x, y) = perceptron(classes=2, dtype=dtype), task(6, dtype)
    found = guess_and_check(net, x, y, n_models=10, generator=seeded())
    assert found.losses.dtype == torch.float32
    wide = perceptron(classes=2)
    for k, loss in enumerate(found.losses.tolist()):
        params = {name: p[k] for name, p in found.params.items()}
        assert all(p.dtype == dtype for p in params.values())
        exact = plain_loss(wide, {name: p.float() for name, p in params.items()}, x.float(), y)
        assert loss == pytest.approx(exact, abs=8 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        same = guess_and_check(net.float(), x.float(), y, n_models=3, generator=seeded())
    plain = guess_and_check(net, x.float(), y, n_models=3, generator=seeded())
    assert torch.equal(same.losses, plain.losses)


def test_weights_that_all_are_zero_and_losses_that_overflow_are_not_kept():
    net, x, y = nn.Linear(2, 2, bias=False), torch.ones(1, 2), torch.tensor([0])
    zero = guess_and_check(net, x, y, init=lambda name, shape, _: torch.zeros(shape), max_tries=10)
    assert len(zero.losses) == 0
    assert zero.n_tried == 10
    huge = guess_and_check(net, 1e38 * x, y, scale=1e30, normalize=False, max_tries=10)
    assert len(huge.losses) == 0


NET, (X, Y) = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), task(4)


@pytest.mark.parametrize(("options", "words"), [
    ({"y": Y.float()}, "y must hold class indices, got dtype torch.float32"), ({"y": Y + 1}, r"y must be in 0\.\.1 for the model, got values from 1 to 2"),
    ({"y": Y[:3]}, r"y must have shape \(4\) for x, got \(3,\)"), ({"x": X * math.nan}, "x must be finite"), ({"x": X[:0], "y": Y[:0]}, "x must have at least one row"),
    ({"x": X[:, :3]}, "x must be what model takes"), ({"x": X.double()}, "x must be what model takes"),
    ({"loss_range": (0.5, 0.5)}, "loss_range must be two increasing"), ({"loss_range": (math.nan, 1.0)}, "loss_range must be two increasing"), ({"loss_range": 1.0}, "loss_range must be two increasing"),
    ({"n_models": 0}, "n_models must be an integer of at least 1"), ({"batch_size": 0}, "batch_size must be an integer of at least 1"), ({"max_tries": 0}, "max_tries must be an integer of at least 1"),
    ({"unit": 0.0}, "unit must be greater than 0"), ({"scale": -1.0}, "scale must be greater than 0"), ({"init": "normal"}, "init must be one of"),
    ({"init": lambda name, shape, generator: torch.zeros(3)}, r"init must return a tensor of shape \(1024, 4, 6\) for 0.weight, got \(3,\)"),
    ({"model": nn.ReLU()}, "model must have parameters, got none"), ({"model": nn.PReLU(6)}, "normalize must be False"),
    ({"model": nn.Sequential(nn.Linear(6, 2), nn.Dropout())}, "got Dropout '1' in training mode"), ({"model": nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))}, "call model.eval"),
    ({"model": nn.Sequential(nn.Linear(6, 2), nn.Unflatten(1, (1, 2)))}, r"model must return logits of shape \(n, classes\), got \(1, 1, 2\)"),
    ({"model": nn.LSTM(6, 2)}, "model must return logits"), ({"model": nn.ParameterList([torch.ones(2, dtype=torch.complex64)])}, "model must have floating-point parameters, got dtype torch.complex64"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(options, words, as_a_user):
    with pytest.raises(ValueError, match=words):
        guess_and_check(**{"model": NET, "x": X, "y": Y, **options})


def test_bad_stacks_are_refused_by_name(as_a_user):
    params = population(NET, 3)
    for bad in (
        {},
        {**params, "0.bias": params["0.bias"][:, :2]},
        {**params, "0.bias": params["0.bias"][:2]},
        {**params, "other": params["0.bias"]},
    ):
        with pytest.raises(ValueError, match="params must have"):
            stacked_logits(NET, bad, X)
    with pytest.raises(ValueError, match="call model"):
        stacked_logits(nn.Sequential(nn.Linear(6, 2), nn.Dropout()), params, X)
    with pytest.raises(ValueError, match="params must have a weight of two axes"):
        weight_norm_product({"bias": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="unit must be greater than 0"):
        weight_norm_product(params, unit=0.0)
    assert stacked_logits(NET, population(NET, 0), X).shape == (0, 4, 2)
