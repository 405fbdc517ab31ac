"""DFPC's scores term by term: slopes, what lies between layers, norms, ties, and what a forward pass costs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from posterity.compression import channel_saliencies, data_flow_couplings, prune_channels


def bounds(middle: nn.Module) -> torch.Tensor:
    """Return by how much each channel's bound grows between two layers of ones."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), middle, nn.Linear(2, 1, bias=False))
    for layer in (net[0], net[2]):
        nn.init.ones_(layer.weight)
    return channel_saliencies(net.eval(), torch.zeros(1, 1))[0]


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Tanh(), nn.Softsign(), nn.Softplus(2.0), nn.Tanhshrink(), nn.LogSigmoid(),
        nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Sigmoid(), nn.Hardsigmoid(), nn.SELU(), nn.CELU(0.5),
        nn.LeakyReLU(0.1), nn.LeakyReLU(-3.0), nn.ELU(0.5), nn.ELU(2.0), nn.Softshrink(), nn.Dropout(), nn.Identity(),
    ],
)  # fmt: skip
def test_an_activation_counts_with_its_largest_slope(act):
    z = torch.linspace(-12, 12, 24001, dtype=torch.float64).requires_grad_()
    (slopes,) = torch.autograd.grad(copy.deepcopy(act).eval()(z).sum(), z)
    steepest = float(slopes.abs().max())
    assert bounds(act).tolist() == pytest.approx([steepest] * 2, rel=1e-3)
    assert bounds(act)[0] >= steepest * (1 - 1e-6)


def test_a_prelu_counts_with_its_channels_slope():
    act = nn.PReLU(2)
    act.weight.data.copy_(torch.tensor([-3.0, 0.5]))
    assert bounds(act).tolist() == [3.0, 1.0]


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """Return the absolute matrix of a layer without bias, (outputs, inputs), column by column."""
    layer = copy.deepcopy(layer).double().eval()
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    basis = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    return layer(basis).detach().flatten(1).T.abs().numpy()


@pytest.mark.parametrize(
    ("between", "reader"),
    [
        (nn.AvgPool2d(3, 2, 1), nn.Conv2d(3, 2, 3, dilation=2, padding=2)),
        (nn.AvgPool2d(2, 1, ceil_mode=True), nn.Conv2d(3, 2, 3, padding=1, padding_mode="zeros")),
        (nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3, stride=2)),
        (nn.ZeroPad2d((1, 0, 2, 1)), nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)),
        (nn.AdaptiveAvgPool2d((2, 3)), nn.Sequential(nn.Flatten(), nn.Linear(18, 5))),
    ],
)
def test_what_lies_between_counts_as_its_matrix(between, reader):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), between, reader).eval()
    (scores,) = channel_saliencies(net, torch.zeros(1, 2, 5, 6))
    one, two = matrix(net[0], (2, 5, 6)), matrix(between, (3, 5, 6))
    shape = tuple(between(torch.zeros(1, 3, 5, 6)).shape[1:])
    three = matrix(reader, shape)
    n = shape[1] * shape[2]
    want = [(three[:, c * n : (c + 1) * n] @ (two @ _only(one, c, 30))[c * n : (c + 1) * n]).sum() for c in range(3)]  # fmt: skip
    np.testing.assert_allclose(scores, want, rtol=1e-10)


def _only(rows: np.ndarray, channel: int, n: int) -> np.ndarray:
    kept = np.zeros_like(rows)
    kept[channel * n : (channel + 1) * n] = rows[channel * n : (channel + 1) * n]
    return kept


def test_a_depthwise_convolution_counts_as_its_matrix_and_carries_its_inputs_along():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 2, 3)).eval()  # fmt: skip
    x = torch.zeros(1, 2, 4, 4)
    (coupling,) = data_flow_couplings(net, x)
    assert (coupling.feeds, coupling.reads, coupling.between, coupling.n_channels) == (
        ("0",),
        ("2",),
        ("1",),
        3,
    )
    (scores,) = channel_saliencies(net, x)
    one, two, three = (
        matrix(layer, shape) for layer, shape in zip(net, ((2, 4, 4), (3, 4, 4), (6, 4, 4)), strict=True)
    )
    want = [(three @ two @ _only(one, c, 16)).sum() for c in range(3)]
    np.testing.assert_allclose(scores, want, rtol=1e-10)


def test_a_token_is_one_row_of_an_embedding_and_halves_and_means_count_as_such():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head((self.embed(x) / 2).mean(1))

    torch.manual_seed(0)
    net = Mean()
    (scores,) = channel_saliencies(net, torch.zeros(1, 4, dtype=torch.long))
    want = net.embed.weight.detach().abs().amax(0) / 2 * net.head.weight.detach().abs().sum(0)
    torch.testing.assert_close(scores, want.double(), rtol=1e-6, atol=0)


def test_norms_are_sums_of_absolute_filters_over_all_that_feed():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(2, 4, 1)
            self.c = nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    torch.manual_seed(0)
    net = Sum()
    (scores,) = channel_saliencies(net, torch.zeros(1, 2, 3, 3), method="l1")
    want = net.a.weight.detach().abs().sum((1, 2, 3)) + net.b.weight.detach().abs().sum((0, 2, 3))
    torch.testing.assert_close(scores, want.double(), rtol=1e-6, atol=0)


def test_ties_go_by_coupling_then_index_and_steps_remove_as_many_as_one_would():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in net[::2]:
        nn.init.ones_(layer.weight)
    x = torch.zeros(1, 2)  # scores: 2 * 4 in the first, 4 * 2 in the second
    assert [kept.tolist() for kept in prune_channels(net, x, 2).kept] == [[2, 3], [0, 1, 2, 3]]
    assert [kept.tolist() for kept in prune_channels(net, x, 4).kept] == [[3], [1, 2, 3]]
    for steps in (1, 2, 3, 5):
        assert sum(len(kept) for kept in prune_channels(net, x, 0.7, n_steps=steps).kept) == 8 - 5
    # after the first channel is gone the second coupling is worth 3 * 2 a channel, less than 2 * 4
    assert [len(kept) for kept in prune_channels(net, x, 2, n_steps=2).kept] == [3, 3]


def test_what_comes_back_to_a_multiple_is_the_best_of_what_went():
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.data.copy_(torch.tensor([[1.0], [4.0], [2.0], [3.0]]))
    nn.init.ones_(net[2].weight)
    assert prune_channels(net, torch.zeros(1, 1), 3, round_to=2).kept[0].tolist() == [1, 3]


@pytest.mark.filterwarnings("ignore:channels stay")
def test_attention_is_counted_before_and_after():
    net = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    small = prune_channels(net, torch.rand(1, 5, 8), 3)
    fixed = 5 * (8 * 24 + 8 * 8) + 2 * 5 * 5 * 8  # projections; scores and their products with values
    assert small.macs == (fixed + 5 * 2 * 8 * 12, fixed + 5 * 2 * 8 * 9)
    assert torch.backends.mha.get_fastpath_enabled()
