"""FIT's quantised networks: levels, ranges and gradients, training and export, files against what they hold."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from posterity.compression import pack_quantized, quantize, unpack_quantized

FIXTURE = Path(__file__).parent / "fixtures" / "quantized-v1.bin"
WEIGHTS = [0.1999058, -0.142573, -0.142573, 0.1999058]
OUTPUT = [-0.3098355, 0.1582089, 0.0056112]


def test_quantised_weights_have_few_levels_and_move_half_a_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        net[3].weight.fill_(0.3)  # a constant stays
    for bits in (1, 2, 5):
        small = quantize(net, {"0": bits, "3": bits})
        weight, own = small[0].weight, net[0].weight
        step = (own.max() - own.min()) / (2**bits - 1)
        assert len(weight.unique()) <= 2**bits
        assert (weight - own).abs().max() <= step / 2 * (1 + 1e-5)
        assert torch.equal(small[3].weight, net[3].weight)
    assert (quantize(net, 16)(torch.ones(2, 3, 3, 3)) - net(torch.ones(2, 3, 3, 3))).abs().max() < 1e-3


def test_gradients_pass_straight_through():
    torch.manual_seed(0)
    net = quantize(nn.Linear(4, 3), 2, 4, calibration=torch.tensor([[-1.0, 1, 0, 0]]))
    x = torch.tensor([[-2.0, 0.3, 1.0, 5.0]], requires_grad=True)
    net.eval()(x).sum().backward()
    assert torch.equal(x.grad != 0, torch.tensor([[False, True, True, False]]))
    inside = net.weight.sum(0).detach()
    assert torch.allclose(x.grad[0, 1:3], inside[1:3])
    held = torch.round((x.detach().clamp(-1, 1) + 1) / (2 / 15)) * (2 / 15) - 1
    assert torch.allclose(net.parametrizations.weight.original.grad, held.expand(3, 4))


def test_activation_ranges_follow_training_batches():
    net = quantize(nn.Linear(2, 2), 8, 8)
    x = torch.tensor([[0.0, 1.0]])
    assert torch.equal(net.eval()(x), F.linear(x, net.weight, net.bias))  # none seen: as they are
    net.train()(x)
    net(x * 3 - 1)
    seen = net.activation_quantizer
    assert (seen.low.item(), seen.high.item()) == pytest.approx((-0.1, 1.1))
    net.eval()(x * 100)
    assert seen.high.item() == pytest.approx(1.1)
    calibrated = quantize(nn.Linear(2, 2), 8, 8, calibration=x * 7)
    assert calibrated.activation_quantizer.high.item() == 7


def test_quantised_network_trains_saves_and_exports():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    small = quantize(net, 3, 4, calibration=x)
    adam = torch.optim.Adam(small.parameters(), 1e-2)
    first = F.cross_entropy(small(x), y).item()
    for _ in range(30):
        adam.zero_grad()
        F.cross_entropy(small(x), y).backward()
        adam.step()
    assert F.cross_entropy(small(x), y).item() < first
    small.eval()
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    loaded = quantize(net, 3, 4).eval()
    loaded.load_state_dict(torch.load(file))
    exported = torch.export.export(small, (x,)).module()
    for other in (loaded, copy.deepcopy(small), exported):
        assert torch.equal(other(x), small(x))
    plain = torch.export.export(unpack_quantized(net, pack_quantized(quantize(net, 3))), (x,))
    assert torch.equal(plain.module()(x), quantize(net, 3)(x))


def test_transformers_fast_path_is_quantised_too():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False).eval()  # fmt: skip
    x = torch.randn(3, 4, 8)
    small = quantize(net, 8, 3, calibration=x).eval()
    with torch.no_grad():
        fast = small(x)
    assert torch.allclose(fast, small(x).detach(), atol=1e-6)
    assert (fast - net(x)).abs().max() > 1e-3


def test_stored_file_is_read():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    back = unpack_quantized(net, FIXTURE.read_bytes()).eval()
    assert back[0].weight.flatten()[:4].tolist() == pytest.approx(WEIGHTS)
    assert back(torch.arange(16.0).reshape(1, 1, 4, 4) / 16)[0].tolist() == pytest.approx(OUTPUT, abs=1e-6)
    assert len(back[0].weight.unique()) <= 4 and len(back[3].weight.unique()) <= 8


def test_damaged_and_foreign_files_are_refused():
    net = nn.Linear(3, 2)
    data = pack_quantized(quantize(net, 3))
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        for bad in (bytes(broken), data[:place]):
            with pytest.raises(ValueError, match="data must"):
                unpack_quantized(net, bad)
    for other, match in [
        (nn.Linear(4, 2), r"'weight' of shape \(2, 3\) for \(2, 4\)"),
        (nn.Linear(3, 2, bias=False), "'bias', which it does not have"),
        (nn.Sequential(nn.Linear(3, 2)), "none for '0.weight'"),
    ]:
        with pytest.raises(ValueError, match=match):
            unpack_quantized(other, data)
    with_inputs = pack_quantized(quantize(nn.Sequential(net), 3, 4))
    with pytest.raises(ValueError, match="'0'"):
        unpack_quantized(net, with_inputs)
    with pytest.raises(ValueError, match="must not be quantised"):
        unpack_quantized(quantize(net, 3), data)
