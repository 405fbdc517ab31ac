"""Networks in time: those of diffusers as they are, and loops that show where they are."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from posterity.generative import RectifiedFlow
from posterity.generative._network import call, steps


class UNet(nn.Module):
    """What diffusers' U-Nets are like: a clock of their own, and an output that wraps the tensor."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, sample, timestep, class_labels=None):
        self.seen.append((timestep, class_labels))
        return SimpleNamespace(sample=self.scale * sample)


def test_a_unet_of_diffusers_gets_its_own_clock_and_is_unpacked():
    net, x, t = UNet(), torch.randn(3, 1, 4, 4), torch.tensor([0.0, 0.5, 1.0])
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(call(net, x, t, {"class_labels": labels}, x.dtype), x)
    (clock, seen) = net.seen[0]
    torch.testing.assert_close(
        clock, torch.tensor([999.0, 499.0, 0.0])
    )  # its clock runs from noise to data downward
    assert seen is labels


def test_the_thousand_steps_of_a_chain_are_its_integers():
    net, k = UNet(), torch.arange(1000)
    call(net, torch.zeros(1000, 1), 1 - (k + 1) / 1000, None, torch.float32)
    torch.testing.assert_close(net.seen[0][0], k.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.DataParallel(net, device_ids=[])])
def test_a_wrapped_unet_is_known_too(wrap):
    net = UNet()
    call(wrap(net), torch.zeros(2, 1), torch.zeros(2), None, torch.float32)
    assert net.seen[0][0].tolist() == [999, 999]


def test_other_networks_see_the_time_as_it_is():
    seen = []
    call(lambda x, t: seen.append(t) or x, torch.zeros(2, 1), torch.tensor([0.0, 0.25]), None, torch.float32)
    assert seen[0].tolist() == [0, 0.25]


def test_a_unet_of_diffusers_trains_and_samples():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = diffusers.UNet2DModel(
        8, 1, 1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, **blocks
    )
    flow = RectifiedFlow((1, 8, 8))
    flow.loss(net, torch.randn(2, 1, 8, 8)).backward()
    assert flow.sample(net, 2, n_steps=2).shape == (2, 1, 8, 8)


def test_a_bar_is_shown_only_where_somebody_looks_and_only_for_long_runs(monkeypatch, capsys):
    tqdm = pytest.importorskip("tqdm")
    assert steps(3) == range(3)  # a test has no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = steps(3)
    assert isinstance(bar, tqdm.tqdm)
    assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("posterity.generative._network.PATIENCE", 0.0)
    assert list(steps(3)) == [0, 1, 2]
    assert "0/3" in capsys.readouterr().err
