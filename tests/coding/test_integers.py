"""Integer networks: exact in any order, near the float network, refused where they would not be exact."""

import pytest
import torch
from torch import nn

from posterity.coding._integers import UNIT, integer_network, to_units


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.LeakyReLU(0.01), nn.Dropout(0.5),
        nn.ConvTranspose2d(8, 6, 5, stride=2, padding=2, output_padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(6, 8, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), nn.PixelShuffle(2), nn.Upsample(scale_factor=2),
        nn.Conv2d(2, 4, 1),
    )  # fmt: skip


def test_near_the_float_network():
    net = network().double().eval()
    x = torch.rand(3, 3, 7, 10, dtype=torch.float64)
    want = net(x)
    got = integer_network(net)(to_units(x)) / UNIT
    assert got.shape == want.shape
    assert (got - want).abs().max() < 20 / UNIT


def test_batches_layouts_and_threads_change_nothing():
    net = integer_network(network())
    x = to_units(4 * torch.randn(5, 3, 17, 9))
    whole = net(x)
    assert torch.equal(whole, torch.cat([net(x[i : i + 1]) for i in range(5)]))
    assert torch.equal(whole, net(x.to(memory_format=torch.channels_last)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + before % 2)
        assert torch.equal(whole, net(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, whole.floor())


def test_equals_python_integers():
    conv = nn.Conv2d(2, 1, 2)
    x = to_units(torch.randn(1, 2, 2, 2))
    terms = zip(conv.weight.flatten().tolist(), x.flatten().tolist(), strict=True)
    total = sum(int((w * 4096 + 0.5) // 1) * int(v) for w, v in terms)
    total += int((conv.bias.item() * 4096**2 + 0.5) // 1)
    assert integer_network([conv])(x).item() == total // 4096


def test_refuses_what_is_not_exact():
    with pytest.raises(ValueError, match="GELU"):
        integer_network([nn.GELU()])
    with pytest.raises(ValueError, match="one group"):
        integer_network([nn.Conv2d(4, 4, 3, groups=2)])
    big = nn.Conv2d(1, 1, 1)
    for value in (1e9, float("nan")):
        nn.init.constant_(big.weight, value)
        with pytest.raises(ValueError, match="moderate size"):
            integer_network([big])
