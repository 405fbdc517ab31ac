"""Periods of known sines, and the folding block against each kernel and each period one by one."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.testing import check_layer
from posterity.testing._low_precision import check_low_precision
from posterity.timeseries import TimesBlock, dominant_periods


def normal(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rhythms(n=5, time=48, channels=3, dtype=torch.float64):
    """Series whose strongest periods differ from one to the next."""
    t = torch.arange(time, dtype=dtype)[None, :, None]
    period = torch.tensor([24.0, 12.0, 8.0, 6.0, 16.0], dtype=dtype)[:n, None, None]
    return (2 * math.pi * t / period).sin() + 0.3 * normal(n, time, channels, dtype=dtype)


def sines(time=96, dtype=torch.float64):
    t = 2 * math.pi * torch.arange(time, dtype=dtype)
    return (3 * torch.sin(t / 24) + torch.sin(t / 8))[None, :, None]


# periods


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (1e3, 1), (0, 7.5), (-20, 0.1)])
def test_periods_of_two_sines_are_theirs_whatever_level_and_scale(shift, scale):
    periods, amplitudes = dominant_periods(shift + scale * sines(), 2)
    assert periods.tolist() == [24, 8]
    assert periods.dtype == torch.int64
    torch.testing.assert_close(
        amplitudes, scale * torch.tensor([[3 * 48.0, 48.0]]).double(), atol=1e-8, rtol=0
    )


def test_amplitudes_are_means_over_channels_and_periods_are_the_batchs():
    slow, fast = sines().roll(3, 1), torch.sin(2 * math.pi * torch.arange(96).double() / 6)[None, :, None]
    x = torch.cat([torch.cat([slow, 0 * slow], 2), torch.cat([2 * fast, 4 * fast], 2)])
    periods, amplitudes = dominant_periods(x, 2)
    assert periods.tolist() == [6, 24]  # mean amplitudes over the batch 72 and 36
    torch.testing.assert_close(
        amplitudes, torch.tensor([[0.0, 72.0], [144.0, 0.0]]).double(), atol=1e-8, rtol=0
    )


def test_a_constant_series_has_periods_of_at_least_two_steps():
    periods, amplitudes = dominant_periods(torch.full((1, 20, 2), 5.0), 10)
    assert sorted(periods.tolist()) == sorted(20 // f for f in range(1, 11))
    assert torch.isfinite(TimesBlock(2, 3, top_k=10)(torch.full((1, 20, 2), 5.0))).all()
    assert amplitudes.abs().max() < 1e-4


def test_period_is_rounded_down_and_half_precision_is_read():
    t = torch.arange(50)
    x = torch.sin(2 * math.pi * t * 3 / 50)[None, :, None]
    assert dominant_periods(x, 1)[0].tolist() == [50 // 3]
    assert dominant_periods(x.bfloat16(), 1)[0].tolist() == [50 // 3]


# block


def literal_block(block, x, periods, share):
    """Fold, convolve with each kernel, take the mean, unfold, add, all one by one."""

    def inception(image, kernels):
        return sum(F.conv2d(image, c.weight, c.bias, padding=c.weight.shape[-1] // 2) for c in kernels) / len(
            kernels
        )

    n, time, d = x.shape
    out = x.clone()
    for j, p in enumerate(periods):
        rows = math.ceil(time / p)
        image = x.new_zeros(n, d, rows, p)
        for t in range(time):
            image[:, :, t // p, t % p] = x[:, t]
        image = inception(F.gelu(inception(image, block.up.kernels)), block.down.kernels)
        for t in range(time):
            out[:, t] += share[:, j, None] * image[:, :, t // p, t % p]
    return out


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_merged_convolution_is_the_mean_of_the_parallel_ones_with_its_gradients(top_k):
    torch.manual_seed(0)
    block = TimesBlock(3, 5, top_k=top_k, n_kernels=4).double()
    for parameter in block.parameters():
        parameter.data = torch.randn_like(parameter)
    x, probe = rhythms(time=26), normal(5, 26, 3, seed=2)  # 26 is no multiple of most periods
    x.requires_grad_()
    spectrum = torch.stack([torch.fft.rfft(x[..., c], dim=1).abs() for c in range(3)]).mean(0)
    top = spectrum.mean(0)[1:].argsort(descending=True)[:top_k] + 1
    share = spectrum[:, top].exp() / spectrum[:, top].exp().sum(1, keepdim=True)
    expected = literal_block(block, x, [26 // int(f) for f in top], share)
    wanted = torch.autograd.grad((expected * probe).sum(), [x, *block.parameters()])
    got = block(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad((got * probe).sum(), [x, *block.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_given_periods_are_weighted_by_the_amplitude_at_their_frequency():
    block = TimesBlock(3, 5, n_kernels=2, periods=[24, 7, 48]).double()
    x = rhythms()
    spectrum = torch.fft.rfft(x, dim=1).abs().mean(2)
    share = spectrum[:, [2, 7, 1]].softmax(1)  # 48 / 24, 48 / 7 = 6.86, 48 / 48
    torch.testing.assert_close(block(x), literal_block(block, x, [24, 7, 48], share))


def test_one_period_as_long_as_the_series_is_a_one_dimensional_network():
    block = TimesBlock(3, 5, n_kernels=4, periods=[48]).double()
    x = rhythms()
    y = x.transpose(1, 2)
    for part in (block.up, block.down):  # the middle rows of the kernels, in one dimension
        y = sum(
            F.conv1d(y, c.weight[:, :, c.weight.shape[2] // 2], c.bias, padding=c.weight.shape[2] // 2) / 4
            for c in part.kernels
        )
        y = F.gelu(y) if part is block.up else y
    torch.testing.assert_close(block(x), x + y.transpose(1, 2))


def test_zero_convolutions_leave_the_series_as_it_is():
    for periods in ("batch", "sample", [5]):
        block = TimesBlock(3, 5, top_k=3, periods=periods).double()
        nn.init.zeros_(block.down.kernels[0].weight)
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(block(rhythms()), rhythms(), rtol=0, atol=0)


def test_periods_of_a_sample_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    block, x = TimesBlock(3, 5, top_k=4, n_kernels=3, periods="sample").double(), rhythms()
    alone = torch.cat([block(row[None]) for row in x])
    torch.testing.assert_close(block(x), alone, rtol=1e-12, atol=1e-12)
    block.periods = "batch"
    torch.testing.assert_close(torch.cat([block(row[None]) for row in x]), alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(block(x), alone, rtol=1e-3)  # rows have different rhythms
    same = x[:1].expand(4, -1, -1)
    torch.testing.assert_close(block(same), alone[:1].expand(4, -1, -1), rtol=1e-12, atol=1e-12)


def test_a_sample_run_passes_the_same_gradients():
    torch.manual_seed(0)
    block, x = TimesBlock(3, 5, top_k=4, n_kernels=3, periods="sample").double(), rhythms()
    together = torch.autograd.grad(block(x).square().sum(), block.parameters())
    alone = torch.autograd.grad(sum(block(row[None]).square().sum() for row in x), block.parameters())
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


def test_block_and_periods_refuse_what_does_not_fit(as_a_user):
    x = torch.zeros(2, 12, 3)
    with pytest.raises(ValueError, match="k must be at most half of the 12 time steps, got 7"):
        dominant_periods(x, 7)
    with pytest.raises(ValueError, match=r"x must have shape \(any, any, any\)"):
        dominant_periods(x[0], 1)
    for empty in (x[:0], x[:, :, :0]):
        with pytest.raises(ValueError, match="x must hold at least one series, step and channel"):
            dominant_periods(empty, 1)
    for periods in ("batch", "sample"):
        with pytest.raises(ValueError, match="top_k must be at most half"):
            TimesBlock(3, 3, top_k=7, periods=periods)(x)
    with pytest.raises(ValueError, match="periods must be at most the 12 time steps, got 13"):
        TimesBlock(3, 3, periods=[13])(x)
    with pytest.raises(ValueError, match="for this d_model"):
        TimesBlock(4, 3)(x)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_periods_are_those_of_the_series_in_any_precision_and_unit(as_a_user, scale):
    x = rhythms().requires_grad_()
    check_low_precision(lambda x: dominant_periods(x, 3), None, (x,), slack=2)
    periods, amplitudes = dominant_periods(x, 3)
    found, moved = dominant_periods(scale * x, 3)
    assert torch.equal(found, periods)
    torch.testing.assert_close(moved / scale, amplitudes)


@pytest.mark.parametrize("periods", ["batch", "sample", [24, 8]])
def test_shares_are_those_of_amplitudes_before_rounding(as_a_user, periods):
    torch.manual_seed(0)
    x = (
        rhythms(n=1, time=480, channels=3, dtype=torch.float32)
        + rhythms(n=2, time=480, dtype=torch.float32)[1:]
    )
    check_layer(TimesBlock(3, 4, top_k=2, n_kernels=2, periods=periods), x, shape=x.shape)


def test_a_copy_keeps_its_periods():
    assert copy.deepcopy(TimesBlock(2, 2, periods=(4, 6))).periods == [4, 6]
