"""FIT: traces against a loop over samples, the knapsack against enumeration, networks through files; bad input."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posterity.compression import (
    BitConfig,
    Sensitivity,
    allocate_bits,
    fit_score,
    pack_quantized,
    quantize,
    sensitivity,
    unpack_quantized,
)
from posterity.testing import check_instrument


class Twice(nn.Module):
    """A layer called twice, one tied to an embedding, attention, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.shared = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.embed(x))
        x = self.shared(self.act(self.shared(x))) + x
        return self.head(self.attention(x, x, x)[0].mean(1))


class TimeFirst(nn.Module):
    """As many times as samples, and times first: the first axis is not that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.embed(x.transpose(0, 1)))).mean(0))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Conv2d(4, 8, (3, 2), groups=2, padding="same", dilation=2, padding_mode="circular"), nn.GELU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip


CASES = {
    "conv": (conv, (3, 9, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)), (2, 6)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), nn.Flatten(), nn.Linear(24, 4)), (1, 3, 4, 4)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), (5,)),
    "positions": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2), nn.Flatten(), nn.Linear(6, 4)), (3, 5)),
    "shared": (Twice, None),
    "time first": (TimeFirst, (5, 3)),
}  # fmt: skip


def case(name: str, n: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    net = make().double()
    x = torch.randint(7, (n, 3)) if shape is None else torch.randn(n, *shape, dtype=torch.float64)
    return net, x, torch.randint(4, (n,))


def loop(net: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Return both traces from single samples, each layer's input made a leaf of its own."""
    net = copy.deepcopy(net).eval().requires_grad_(True)
    names = {id(p): name for name, p in net.named_parameters()}
    layers: dict[str, nn.Module] = {}
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            layers.setdefault(names[id(module.weight)], module)
    of = {id(m): name for name, m in net.named_modules()}
    weights = {of[id(module)]: 0.0 for module in layers.values()}
    activations: dict[str, float] = {}
    seen: list[tuple[str, Tensor]] = []

    def enter(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        if not args[0].requires_grad:
            return args
        extra = torch.zeros_like(args[0], requires_grad=True)
        seen.append((of[id(layers[names[id(module.weight)]])], extra))
        return (args[0] + extra,)

    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.register_forward_pre_hook(enter)
    torch.backends.mha.set_fastpath_enabled(False)
    for i in range(len(x)):
        seen.clear()
        value = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        leaves = [extra for _, extra in seen]
        grads = torch.autograd.grad(value, [m.weight for m in layers.values()] + leaves)
        for module, g in zip(layers.values(), grads, strict=False):
            weights[of[id(module)]] += float(g.square().sum()) / len(x)
        for (name, _), g in zip(seen, grads[len(layers) :], strict=True):
            activations[name] = activations.get(name, 0.0) + float(g.square().sum()) / len(x)
    torch.backends.mha.set_fastpath_enabled(True)
    return weights, activations


@pytest.mark.parametrize("name", CASES)
def test_traces_equal_a_loop_over_samples(name: str):
    net, x, y = case(name)
    want, want_inputs = loop(net, x, y)
    found = sensitivity(net, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert list(found.weight_trace) == list(want)
    assert found.weight_trace == pytest.approx(want, rel=1e-9)
    assert found.activation_trace == pytest.approx(want_inputs, rel=1e-9)
    whole = sensitivity(net, [(x, y)])
    assert whole.weight_trace == pytest.approx(want, rel=1e-9)
    assert all(math.isnan(error) for error in whole.weight_error.values())
    single = sensitivity(net, [(x[i : i + 1], y[i : i + 1]) for i in range(5)], estimator="batch")
    assert single.weight_trace == pytest.approx(want, rel=1e-9)
    assert single.activation_trace == pytest.approx(want_inputs, rel=1e-9)
    assert found.n_samples == single.n_samples == 5


def test_model_with_control_flow_is_looped():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.linear(row, self.a.weight) if row.sum() > 0 else F.linear(row, self.b.weight) for row in x[:, None]])  # fmt: skip

    torch.manual_seed(0)
    net, x, y = Branch().double(), torch.randn(5, 3, dtype=torch.float64), torch.randint(4, (5,))
    want = {"a": 0.0, "b": 0.0}
    for i in range(5):
        for name, part in (("a", net.a), ("b", net.b)):
            (g,) = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), part.weight, allow_unused=True)  # fmt: skip
            want[name] += 0 if g is None else float(g.square().sum()) / 5
    found = sensitivity(net, [(x, y)])
    assert found.weight_trace == pytest.approx(want, rel=1e-9)
    assert found.activation_trace == {}


def test_logistic_regression():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3).double(), torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    want = ((net(x).softmax(1) - F.one_hot(y, 3)).square().sum(1) * x.square().sum(1)).mean()
    found = sensitivity(net, zip(x.split(7), y.split(7), strict=True))
    assert found.weight_trace[""] == pytest.approx(float(want), rel=1e-12)
    assert found.activation_trace == found.activation_range == found.n_activations == {}
    assert found.weight_range[""] == pytest.approx(float(net.weight.max() - net.weight.min()))
    per_batch = [sensitivity(net, [pair]).weight_trace[""] for pair in zip(x.split(8), y.split(8), strict=True)]  # fmt: skip
    error = np.std(per_batch, ddof=1) / math.sqrt(5) / np.mean(per_batch)
    found = sensitivity(net, zip(x.split(8), y.split(8), strict=True))
    assert found.weight_error[""] == pytest.approx(error)


def test_batch_estimator_is_n_times_the_squared_mean_gradient():
    net, x, y = case("linear")
    found = sensitivity(net, [(x, y)], estimator="batch")
    (g,) = torch.autograd.grad(F.cross_entropy(net(x), y), net[0].weight)
    assert found.weight_trace["0"] == pytest.approx(5 * float(g.square().sum()), rel=1e-9)


def test_stopping_and_ranges():
    net, _, _ = case("linear")
    x = torch.randn(3, 5, dtype=torch.float64)
    same = [(x, torch.tensor([0, 1, 2]))] * 10
    assert sensitivity(net, same, tol=1e-6).n_samples == 6
    assert sensitivity(net, same, tol=1e-6, min_batches=4).n_samples == 12
    assert sensitivity(net, same, max_batches=3).n_samples == 9
    hidden = net[:2](x)
    found = sensitivity(net, same[:1])
    assert found.activation_range["2"] == pytest.approx(float(hidden.max() - hidden.min()))
    assert (found.n_weights, found.n_activations) == ({"0": 30, "2": 24}, {"2": 6})
    assert list(sensitivity(net, same, layers=["2"]).weight_trace) == ["2"]


@pytest.mark.parametrize("name", ["conv", "shared"])
def test_model_is_only_looked_at(name: str):
    net, x, y = case(name)
    check_instrument(lambda net, x: list(sensitivity(net, [(x, y)]).weight_trace.values()), net, x)


def made(traces: list[float], seed: int = 0) -> Sensitivity:
    rng = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(len(traces))]
    span, size = rng.uniform(0.5, 2, len(traces)), rng.integers(5, 500, len(traces))
    by = lambda values: dict(zip(names, values, strict=True))  # noqa: E731
    n = by([int(s) for s in size])
    return Sensitivity(by(traces), by(traces[::-1]), by(span.tolist()), by(span.tolist()), n, n, 10, by(traces), by(traces))  # fmt: skip


def test_score_is_additive_decreasing_and_vanishes():
    s = made([3.0, 0.5, 7.0])
    bits = {"l0": 2, "l1": 5, "l2": 3}
    parts = [s.weight_trace[n] * (s.weight_range[n] / (2**b - 1)) ** 2 for n, b in bits.items()]
    inputs = [s.activation_trace[n] * (s.activation_range[n] / 15) ** 2 for n in bits]
    assert fit_score(s, bits) == pytest.approx(sum(parts))
    assert fit_score(s, bits, 4) == pytest.approx(sum(parts) + sum(inputs))
    scores = [fit_score(s, {**bits, "l1": b}) for b in range(1, 17)]
    assert scores == sorted(scores, reverse=True)
    assert fit_score(s, 16) < 1e-7 * fit_score(s, 1)


def test_score_does_not_see_a_rescaling_that_changes_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight *= 3
        other[0].bias *= 3
        other[2].weight /= 3
    one, two = (fit_score(sensitivity(m, [(x, y)]), {"0": 3, "2": 5}, 4) for m in (net, other))
    assert one == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_allocation_equals_enumeration(seed: int):
    rng = np.random.default_rng(seed)
    s = made(np.exp(rng.normal(0, 3, 5)).tolist(), seed)
    choices = (2, 3, 4, 8)
    every = [dict(zip(s.n_weights, bits, strict=True)) for bits in itertools.product(choices, repeat=5)]
    total = sum(s.n_weights.values())
    cost = np.array([sum(s.n_weights[n] * b for n, b in bits.items()) for bits in every])
    scores = np.array([fit_score(s, bits) for bits in every])
    for budget in (2, *rng.uniform(2, 8, 12), 8):
        found = allocate_bits(s, weight_budget=float(budget), choices=choices)
        used = sum(s.n_weights[n] * b for n, b in found.weight_bits.items())
        assert used <= budget * total * (1 + 1e-12)
        assert fit_score(s, found.weight_bits) == pytest.approx(
            scores[cost <= budget * total].min(), rel=1e-9
        )
        assert found.score == pytest.approx(fit_score(s, found.weight_bits))
        assert found.weight_bytes == sum(
            math.ceil(s.n_weights[n] * b / 8) for n, b in found.weight_bits.items()
        )
    assert set(allocate_bits(s, weight_budget=8, choices=choices).weight_bits.values()) == {8}
    assert set(allocate_bits(s, weight_budget=99).weight_bits.values()) == {8}


@pytest.mark.parametrize("name", CASES)
def test_file_gives_the_same_network_in_its_bits(name: str):
    net, x, _ = case(name)
    net = net.float().eval()
    x = x.float() if x.is_floating_point() else x
    before = copy.deepcopy(net.state_dict())
    bits = {
        layer: 2 + i % 4
        for i, layer in enumerate(sensitivity(net, [(x, torch.zeros(5).long())]).weight_trace)
    }
    for activations in (None, 6):
        small = quantize(net, bits, activations, calibration=None if activations is None else x).eval()
        data = pack_quantized(small)
        back = unpack_quantized(net, data).eval()
        with torch.no_grad():
            assert torch.equal(back(x), small(x))
        assert type(back) is type(net)
        payload = sum(-(-small.get_submodule(n).weight.numel() * b // 8) for n, b in bits.items())
        state = net.state_dict(keep_vars=True)
        quantised = {id(net.get_submodule(n).weight) for n in bits}
        other = sum(v.numel() * v.element_size() for v in state.values() if id(v) not in quantised)
        assert len(data) <= payload + other + 100 * len(state)
        assert data == pack_quantized(copy.deepcopy(small))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_divergence_is_proportional_to_the_score():
    """Uniform noise of power p in a trained softmax regression: the mean divergence is half the trace times p."""
    torch.manual_seed(0)
    centres = torch.randn(3, 5, dtype=torch.float64)
    y = torch.randint(3, (600,))
    x = centres[y] + torch.randn(600, 5, dtype=torch.float64)
    net = nn.Linear(5, 3).double()
    lbfgs = torch.optim.LBFGS(net.parameters(), max_iter=100)
    lbfgs.step(lambda: _closure(net, x, y))
    trace = sensitivity(net, [(x, y)]).weight_trace[""]
    p = net(x).log_softmax(1).detach()
    powers, kl = [1e-4, 4e-4, 1.6e-3], []
    for power in powers:
        noise = (torch.rand(400, 3, 5, dtype=torch.float64) - 0.5) * math.sqrt(12 * power)
        moved = torch.einsum("ni,soi->sno", x, net.weight.detach() + noise) + net.bias.detach()
        kl.append(float((p.exp() * (p - moved.log_softmax(2))).sum(2).mean()))
    slope = np.polyfit(np.log(powers), np.log(kl), 1)[0]
    assert slope == pytest.approx(1, abs=0.05)
    assert np.array(kl) == pytest.approx(0.5 * trace * np.array(powers), rel=0.2)


def _closure(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype):
    net, x, y = case("linear")
    want = sensitivity(net, [(x, y)])
    got = sensitivity(net.to(dtype), [(x.to(dtype), y)])
    eps = torch.finfo(dtype).eps
    assert got.weight_trace == pytest.approx(want.weight_trace, rel=20 * eps)
    assert got.activation_trace == pytest.approx(want.activation_trace, rel=20 * eps)
    small = quantize(net, 3, 4, calibration=x.to(dtype)).eval()
    assert small(x.to(dtype)).dtype == dtype
    back = unpack_quantized(net, pack_quantized(small)).eval()
    assert back[0].weight.dtype == dtype and torch.equal(back(x.to(dtype)), small(x.to(dtype)))
    assert len(small[0].weight.unique()) <= 8


def test_inference_mode_and_no_grad():
    net, x, y = case("linear")
    want = sensitivity(net, [(x, y)])
    with torch.no_grad():
        assert sensitivity(net, [(x, y)]).weight_trace == want.weight_trace
    with torch.inference_mode():
        assert sensitivity(net, [(x.clone(), y.clone())]).weight_trace == want.weight_trace
        assert torch.isfinite(quantize(net, 3, 4, calibration=x)(x)).all()


def test_a_loss_of_one_number_counts_with_dimensions_and_without() -> None:
    net, x, y = case("linear")
    found = [
        sensitivity(net, [(x, y)], loss_fn=lambda out, y, s=shape: F.cross_entropy(out, y).reshape(s))
        for shape in ((), (1,))
    ]
    assert found[0] == found[1]


def test_bad_input(as_a_user: None):
    net, x, y = case("linear")
    s = sensitivity(net, [(x, y)])
    lone = sensitivity(nn.Linear(5, 4).double(), [(x, y)])
    frozen = (net, [(x, y)])
    for match, look in [
        (r"'9', no module: the layers are '0', '2'", lambda: sensitivity(*frozen, layers=["9"])),
        (r"'1', a Tanh", lambda: sensitivity(*frozen, layers=["1"])),
        ("batches", lambda: sensitivity(net, [])),
        ("batches", lambda: sensitivity(net, [(x[:0], y[:0])])),
        ("batches must be floating-point", lambda: sensitivity(net, [(torch.ones(2, 5).long(), y[:2])])),
        ("scalar", lambda: sensitivity(*frozen, loss_fn=lambda out, y: out)),
        ("finite", lambda: sensitivity(*frozen, loss_fn=lambda out, y: out.sum() * math.inf)),
        ("depend", lambda: sensitivity(*frozen, loss_fn=lambda out, y: torch.tensor(1.0))),
        ("2 with tol", lambda: sensitivity(*frozen, tol=0.1)),
        ("max_batches", lambda: sensitivity(*frozen, tol=0.1, max_batches=1)),
        ("tol", lambda: sensitivity(*frozen, tol=0)),
        ("estimator", lambda: sensitivity(*frozen, estimator="exact")),
        ("Linear, Conv1d", lambda: sensitivity(nn.Sequential(nn.ReLU()), [(x, y)])),
        (r"1..16, got 0 for '0'", lambda: fit_score(s, 0)),
        ("1..16, got 17", lambda: fit_score(s, {"0": 17, "2": 3})),
        ("1..16, got 2.5", lambda: fit_score(s, 2.5)),
        ("none for '2'", lambda: fit_score(s, {"0": 3})),
        ("unknown 'x'", lambda: fit_score(s, {"0": 3, "2": 3, "x": 3})),
        ("activation_bits", lambda: fit_score(lone, 3, 3)),
        ("smallest of choices, 2 bits", lambda: allocate_bits(s, weight_budget=1.9)),
        ("activation_budget", lambda: allocate_bits(s, weight_budget=3, activation_budget=1.0)),
        ("activation_budget", lambda: allocate_bits(lone, weight_budget=3, activation_budget=4.0)),
        ("choices", lambda: allocate_bits(s, weight_budget=3, choices=())),
        ("choices", lambda: allocate_bits(s, weight_budget=3, choices=(0, 2))),
        ("weight_bits must be integers in 1..16, got 33", lambda: quantize(net, 33)),
        ("'y', no module", lambda: quantize(net, {"y": 3})),
        ("activation_bits", lambda: quantize(net, 3, 0)),
        ("calibration", lambda: quantize(net, 3, calibration=x)),
        ("already|not be quantised", lambda: quantize(quantize(net, 3), 3)),
        ("must be quantised", lambda: pack_quantized(net)),
    ]:
        with pytest.raises(ValueError, match=match):
            look()
    broken = quantize(net, 3)
    with torch.no_grad():
        broken[0].parametrizations.weight.original[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        pack_quantized(broken)
    assert isinstance(allocate_bits(s, weight_budget=3), BitConfig)
