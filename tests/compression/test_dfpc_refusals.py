"""DFPC says by name what it cannot do, before any work, and never returns another network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from posterity.compression import channel_saliencies, data_flow_couplings, latency, prune_channels, shrink

BLOCK = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
X = torch.zeros(2, 3)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = copy.deepcopy(BLOCK)

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else x[:, :2]


class ByNumber(nn.Module):
    """A hook reads channel 3 by its number, behind the back of every torch function."""

    def __init__(self):
        super().__init__()
        self.body = copy.deepcopy(BLOCK)

    def forward(self, x):
        hidden = self.body[1](self.body[0](x))
        return self.body[2](Sneak.apply(hidden))


class Sneak(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        values = np.from_dlpack(x.detach())
        return torch.from_dlpack(np.flip(values, 1) * np.arange(1, 1 + values.shape[1], dtype=np.float32))


@pytest.mark.parametrize(
    ("model", "inputs", "amount", "options", "message"),
    [
        (BLOCK, X, -1, {}, "amount must be an integer of at least 0, got -1"),
        (BLOCK, X, 1.0, {}, r"amount must be in \[0, 1\), got 1.0"),
        (BLOCK, X, float("nan"), {}, "amount must be in"),
        (BLOCK, X, 4, {}, "amount must be at most 3 channels here, of 4, got 4"),
        (BLOCK, X, True, {}, "amount must be an integer"),
        (BLOCK, X, 1, {"n_steps": 0}, "n_steps must be an integer of at least 1, got 0"),
        (BLOCK, X, 1, {"round_to": 0}, "round_to must be an integer of at least 1"),
        (BLOCK, X, 1, {"min_channels": 0}, "min_channels must be an integer of at least 1"),
        (BLOCK, X, 1, {"method": "l2"}, "method must be one of 'dfpc', 'l1', 'random', got 'l2'"),
        (BLOCK, X, 1, {"scope": "none"}, "scope must be one of"),
        (BLOCK, X, 1, {"ignore": ["body"]}, "ignore must name layers of the model, got 'body'"),
        (BLOCK, X, 1, {"ignore": "0"}, "ignore must be a sequence of names of layers"),
        (BLOCK, X, 1, {"finetune": 3}, "finetune must be callable, got int"),
        (BLOCK, X[0], 1, {}, "with a batch axis in front, its first sample gave"),
        (BLOCK, torch.zeros(0, 3), 1, {}, "example_inputs must have a batch axis of at least 1"),
        (BLOCK, "x", 1, {}, "example_inputs must be a tensor or a tuple of tensors with a batch axis, got str"),
        (BLOCK[2], torch.zeros(1, 4), 0, {}, "model must have channels that can be removed"),
        (len, X, 1, {}, "model must be an nn.Module, got builtin_function_or_method"),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), X, 1, {}, "'0.weight' has none yet"),
        (Branch(), X, 1, {}, r"Tensor.__bool__ in the model itself \(.*test_dfpc_refusals.py:\d+: .*x.sum\(\) > 0"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)), X, 1, {},
         "running statistics in every BatchNorm for method='dfpc', '1' has none"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, model, inputs, amount, options, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(model, inputs, amount, **options)


def test_what_was_not_seen_is_refused_or_stays_and_is_never_a_wrong_network(as_a_user):
    net = ByNumber()
    with pytest.raises(ValueError, match=r"model (must|does)"):
        prune_channels(net, torch.rand(1, 3), 2)
    net = copy.deepcopy(BLOCK)
    net[1].register_forward_hook(lambda m, a, out: out * torch.arange(1.0, 1 + out.shape[1]))
    with (
        pytest.warns(UserWarning, match="channels stay"),
        pytest.raises(ValueError, match="model must have channels"),
    ):
        prune_channels(net, torch.rand(1, 3), 2)
    net = copy.deepcopy(BLOCK)
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model must have finite weights, got NaN or infinity around '0'"):
        prune_channels(net, torch.rand(1, 3), 2)

    def widen(model):
        model[0].weight = nn.Parameter(torch.zeros(7, 3))

    with pytest.raises(ValueError, match=r"finetune must not change shapes, '0.weight' is now"):
        prune_channels(BLOCK, X, 1, finetune=widen)
    with pytest.raises(ValueError, match="couplings must be of data_flow_couplings of this model"):
        channel_saliencies(BLOCK, X, data_flow_couplings(nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 2)), X))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"7": {"out": [0]}}, "plan must name layers of the model, got '7'"),
        ({"1": {"out": [0]}}, "plan must name layers with channels, got '1', a ReLU"),
        ({"0": {"off": [0]}}, "plan must give '0' in and out"),
        ({"0": {"out": [0, 4]}}, "ascending indices of the 4 out channels of '0'"),
        ({"0": {"out": [1, 0]}}, "ascending indices of the 4 out channels of '0'"),
        ({"0": {"out": []}}, "ascending indices of the 4 out channels of '0'"),
        ([], "plan must be a dict of layers, got list"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_layer(as_a_user, plan, message):
    with pytest.raises(ValueError, match=message):
        shrink(BLOCK, plan)


def test_latency_is_seconds_of_a_pass_and_leaves_modes():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.rand(5, 3)
    net.train()
    assert 0 < latency(net, x, n_repeats=3, warmup=0) < 1
    assert all(m.training for m in net.modules()) and int(net[1].num_batches_tracked) == 0
