"""FIT: what is averaged over batches and how, when it stops, and budgets of activations apart from those of weights."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posterity.compression import (
    Sensitivity,
    allocate_bits,
    fit_score,
    pack_quantized,
    quantize,
    sensitivity,
    unpack_quantized,
)


def case() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a network and batches of 2 and of 5 samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, [(torch.randn(n, 3, dtype=torch.float64), torch.randint(3, (n,))) for n in (2, 5)]


def test_ranges_are_means_over_batches_and_the_batch_estimator_too():
    net, batches = case()
    found = sensitivity(net, batches, estimator="batch")
    spans, traces = [], []
    for x, y in batches:
        hidden = net[:2](x).detach()
        spans.append(float(hidden.max() - hidden.min()))
        (g,) = torch.autograd.grad(F.cross_entropy(net(x), y), net[2].weight)
        traces.append(len(x) * float(g.square().sum()))
    assert found.activation_range["2"] == pytest.approx(np.mean(spans), rel=1e-12)
    assert found.weight_trace["2"] == pytest.approx(np.mean(traces), rel=1e-12)


def test_stops_only_when_every_layer_is_known_well_enough():
    """Inputs of layer 1 are 0, its trace 0 without an error; that of layer 0 follows the size of the input."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.zeros(2, 2)), net[1].weight.copy_(torch.eye(2))
    small, large = (torch.tensor([[1.0, 0.0]], dtype=torch.float64) * size for size in (1, 2))
    batches = [(small, torch.tensor([0])), (large, torch.tensor([0]))] * 5
    found = sensitivity(net, batches)
    assert found.weight_error["1"] == 0 and found.weight_error["0"] > 0.1  # inputs of layer 1 are 0
    assert sensitivity(net, batches, tol=0.1).n_samples == 10
    assert sensitivity(net, batches, tol=0.9).n_samples == 2


def test_a_layer_in_a_part_without_gradients_has_a_trace_of_zero():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    torch.manual_seed(0)
    found = sensitivity(Part(), [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))])
    assert found.weight_trace["body"] == 0 and found.weight_trace["head"] > 0
    assert found.activation_trace == {}


@pytest.mark.parametrize("seed", range(2))
def test_activations_have_a_budget_of_their_own(seed: int):
    rng = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(4)]

    def drawn(values: np.ndarray) -> dict:
        return dict(zip(names, values.tolist(), strict=True))

    traces, spans, sizes = (
        [drawn(make()) for _ in range(2)]
        for make in (
            lambda: np.exp(rng.normal(0, 3, 4)),
            lambda: rng.uniform(0.5, 2, 4),
            lambda: rng.integers(5, 500, 4),
        )
    )
    s = Sensitivity(*traces, *spans, *sizes, 10, *traces)
    choices = (2, 3, 4, 8)
    every = [dict(zip(names, bits, strict=True)) for bits in itertools.product(choices, repeat=4)]
    for budget in (2, 3.3, 5.9):
        found = allocate_bits(s, weight_budget=4, activation_budget=budget, choices=choices)
        room = budget * sum(s.n_activations.values())
        fitting = [bits for bits in every if sum(s.n_activations[n] * b for n, b in bits.items()) <= room]
        assert found.activation_bits in fitting
        best = min(fit_score(s, found.weight_bits, bits) for bits in fitting)
        assert found.score == pytest.approx(best, rel=1e-9)


def test_activations_are_rounded_to_levels_between_the_ends_of_calibration():
    net = quantize(nn.Linear(1, 1), 16, 2, calibration=torch.tensor([[-1.0], [2.0]])).eval()
    seen = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(torch.tensor([[-5.0], [-0.6], [-0.4], [0.6], [1.4], [9.0]]))
    assert seen[0].flatten().tolist() == pytest.approx([-1, -1, 0, 1, 1, 2])
    assert math.isfinite(float(net(torch.zeros(1, 1))))


def test_calibration_covers_every_call_of_a_layer():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(-3 * x) + self.a(x)

    seen = quantize(Two(), 8, 8, calibration=torch.tensor([[0.0, 1.0]])).a.activation_quantizer
    assert (seen.low.item(), seen.high.item()) == (-3, 1)


class ByName(nn.Module):
    """Two layers of one weight, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=torch.tanh(self.a(input=x)))


def test_layers_called_by_keyword_and_all_that_share_a_weight_are_quantised():
    torch.manual_seed(0)
    net, x, y = ByName(), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    (g,) = torch.func.vmap(
        torch.func.grad(lambda w, x, y: F.cross_entropy(torch.tanh(x @ w.T) @ w.T, y), argnums=(0,)),
        (None, 0, 0),
    )(net.a.weight.detach(), x, y)
    found = sensitivity(net, [(x, y)])
    assert found.weight_trace == pytest.approx({"a": float(g.square().sum()) / 6}, rel=1e-5)
    small = quantize(net, 16, 1, calibration=x)
    assert small.b.weight is small.a.weight or torch.equal(small.b.weight, small.a.weight)
    seen = []
    for layer in (small.a, small.b):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    small.eval()(x)
    assert [len(inputs.unique()) for inputs in seen] == [2, 2]
    assert torch.equal(unpack_quantized(net, pack_quantized(small)).eval()(x), small(x))
