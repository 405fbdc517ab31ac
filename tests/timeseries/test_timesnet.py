"""TimesNet against a literal reference with the authors' parameter names, and its invariances."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.testing import check_layer
from posterity.timeseries import TimesNet

SMALL = {"d_model": 4, "d_ff": 6, "n_kernels": 3, "top_k": 3}
TASKS = {
    "forecast": {"horizon": 12},
    "impute": {},
    "detect": {},
    "classify": {"n_classes": 3},
}


def normal(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rhythms(n=5, time=48, channels=3, dtype=torch.float64):
    """Series whose strongest periods differ from one to the next."""
    t = torch.arange(time, dtype=dtype)[None, :, None]
    period = torch.tensor([24.0, 12.0, 8.0, 6.0, 16.0], dtype=dtype)[:n, None, None]
    return (2 * math.pi * t / period).sin() + 0.3 * normal(n, time, channels, dtype=dtype)


def network(task, dtype=torch.float64, time=48, channels=3, **options):
    torch.manual_seed(0)
    net = TimesNet(channels, time, task, **{**SMALL, **TASKS[task], **options})
    for parameter in net.parameters():  # biases and norms are not at their neutral start
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval().to(dtype)


# network


class Inception(nn.Module):
    def __init__(self, n_in, n_out, m):
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(n_in, n_out, 2 * i + 1, padding=i) for i in range(m))

    def forward(self, x):
        return torch.stack([kernel(x) for kernel in self.kernels]).mean(0)


class Reference(nn.Module):
    """The network as the paper writes it, under the authors' parameter names."""

    def __init__(self, task, channels, time, *, horizon=0, n_classes=0, calendar=0, layers=2):
        super().__init__()
        d, ff, m = SMALL["d_model"], SMALL["d_ff"], SMALL["n_kernels"]
        self.task, self.k, self.horizon, self.calendar = task, SMALL["top_k"], horizon, calendar
        self.enc_embedding = nn.Module()
        self.enc_embedding.value_embedding = nn.Module()
        self.enc_embedding.value_embedding.tokenConv = nn.Conv1d(channels, d, 3, bias=False)
        self.enc_embedding.temporal_embedding = nn.Module()
        self.enc_embedding.temporal_embedding.embed = nn.Linear(calendar or 4, d, bias=False)
        self.enc_embedding.position_embedding = nn.Module()
        pe = torch.zeros(1, 5000, d)
        for i in range(d):
            rate = 10_000 ** (-(i - i % 2) / d)
            wave = torch.cos if i % 2 else torch.sin
            pe[0, :, i] = wave(torch.arange(5000) * rate)
        self.enc_embedding.position_embedding.register_buffer("pe", pe)
        self.model = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.model:
            layer.conv = nn.Sequential(Inception(d, ff, m), nn.GELU(), Inception(ff, d, m))
        self.layer_norm = nn.LayerNorm(d)
        if task == "forecast":
            self.predict_linear = nn.Linear(time, time + horizon)
        self.projection = nn.Linear(d * time, n_classes) if task == "classify" else nn.Linear(d, channels)

    def forward(self, x, mask=None, calendar=None, padding_mask=None):
        if self.task != "classify":
            seen = torch.ones_like(x) if mask is None else mask
            mean = (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
            var = ((x - mean) ** 2 * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
            std = (var + 1e-5) ** 0.5
            x = (x - mean) / std * seen
        weight = self.enc_embedding.value_embedding.tokenConv.weight
        x = sum(x.roll(1 - j, 1) @ weight[:, :, j].T for j in range(3))  # circular in time
        x = x + self.enc_embedding.position_embedding.pe[:, : x.shape[1]]
        if self.calendar:
            x = x + self.enc_embedding.temporal_embedding.embed(calendar)
        if self.task == "forecast":
            x = torch.einsum("ntd,st->nsd", x, self.predict_linear.weight)
            x = x + self.predict_linear.bias[:, None]
        for layer in self.model:
            n, time, d = x.shape
            amplitude = torch.fft.rfft(x, dim=1).abs()
            best = amplitude.mean((0, 2))
            best[0] = 0
            top = best.topk(self.k).indices
            out = []
            for f in top.tolist():
                p = time // f
                rows = math.ceil(time / p)
                image = torch.cat([x, x.new_zeros(n, rows * p - time, d)], 1).reshape(n, rows, p, d)
                image = layer.conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                out.append(image.reshape(n, -1, d)[:, :time])
            share = amplitude.mean(2)[:, top].softmax(1)
            x = x + (torch.stack(out, 3) * share[:, None, None]).sum(3)
            x = self.layer_norm(x)
        if self.task == "classify":
            x = F.gelu(x)
            x = x if padding_mask is None else x * padding_mask[:, :, None]
            return self.projection(x.flatten(1))
        x = self.projection(x) * std + mean
        return x[:, -self.horizon :] if self.task == "forecast" else x


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("calendar", [0, 4])
def test_agrees_with_the_authors_model_for_the_same_weights(task, calendar):
    torch.manual_seed(1)
    theirs = Reference(task, 3, 48, calendar=calendar, **TASKS[task])
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours = TimesNet(3, 48, task, **SMALL, **TASKS[task], n_time_features=calendar).eval()
    ours.load_tslib(theirs.state_dict())
    x, inputs, same = 4 + 2 * rhythms(dtype=torch.float32), {}, {}
    if calendar:
        inputs["calendar"] = same["time_features"] = normal(5, 48, 4, dtype=torch.float32)
    if task == "impute":
        inputs["mask"] = same["mask"] = (torch.rand_like(x) < 0.7).float()
    if task == "classify":
        inputs["padding_mask"] = same["padding_mask"] = (torch.arange(48) < 40).float().expand(5, 48)
    expected = theirs(x, **inputs)
    error = (ours(x, **same) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_weights_of_other_sizes_are_refused(as_a_user):
    state = Reference("impute", 3, 48).state_dict()
    net = TimesNet(3, 48, "impute", **SMALL)
    with pytest.raises(ValueError, match="has surplus, which"):
        net.load_tslib({**state, "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"norm\.other"):
        net.load_tslib({**state, "layer_norm.other": torch.zeros(1)})
    missing = {name: value for name, value in state.items() if name != "projection.bias"}
    with pytest.raises(ValueError, match=r"head\.bias"):
        net.load_tslib(missing)
    with pytest.raises(ValueError, match=r"blocks\.2\.up"):
        net.load_tslib(Reference("impute", 3, 48, layers=3).state_dict())
    with pytest.raises(ValueError, match="size mismatch"):
        TimesNet(4, 48, "impute", **SMALL).load_tslib(state)
    with pytest.raises(ValueError, match=r"embed_time\.weight"):
        TimesNet(3, 48, "impute", **SMALL, n_time_features=7).load_tslib(state)


@pytest.mark.parametrize(
    ("task", "periods"), [*((task, "batch") for task in TASKS), ("classify", "sample"), ("impute", [24, 5])]
)
def test_conforms_to_its_kind(as_a_user, task, periods):
    net = network(task, torch.float32, periods=periods, n_layers=1)
    options = {"mask": torch.rand(5, 48, 3) < 0.7} if task == "impute" else {}
    shape = {"forecast": (5, 12, 3), "classify": (5, 3)}.get(task, (5, 48, 3))
    check_layer(net, rhythms(dtype=torch.float32), shape=shape, **options)


@pytest.mark.parametrize("task", ["forecast", "impute", "detect"])
def test_squares_of_a_narrow_series_do_not_overflow(as_a_user, task):
    net, x = network(task, torch.float32, periods=[24, 5]), 2000 * rhythms(dtype=torch.float32).half()
    options = {"mask": torch.ones(5, 48, 3)} if task == "impute" else {}
    low, exact = copy.deepcopy(net).half()(x, **options), net.float()(x.float(), **options)
    assert low.dtype == torch.float16
    torch.testing.assert_close(low.float(), exact, rtol=0, atol=0.02 * float(exact.detach().abs().max()))


def test_what_lies_under_the_mask_does_not_matter():
    net, x = network("impute"), rhythms()
    mask = torch.rand(5, 48, 3, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, :, 1] = False  # nothing observed at all
    expected = net(x.masked_fill(~mask, 0), mask=mask)
    assert torch.isfinite(expected).all()
    for filling in (1e6, math.nan, math.inf):
        torch.testing.assert_close(net(x.masked_fill(~mask, filling), mask=mask), expected, rtol=0, atol=0)
    torch.testing.assert_close(net(x, mask=mask.double()), expected, rtol=0, atol=0)
    assert not torch.allclose(net(x + mask * (torch.arange(48) == 9)[:, None], mask=mask), expected)
    assert expected[0, :, 1].abs().max() < 20 * math.sqrt(1e-5)  # mean 0, deviation that of the stabiliser


def test_gradients_are_finite_with_nan_under_the_mask():
    net, mask = network("impute"), torch.rand(5, 48, 3) < 0.6
    mask[0, :, 1] = False
    x = rhythms().masked_fill(~mask, math.nan).requires_grad_()
    net(x, mask=mask).square().sum().backward()
    for parameter in [x, *net.parameters()]:
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("task", ["forecast", "impute", "detect"])
def test_output_follows_level_and_scale_of_each_channel(task):
    net, x = network(task), 100 * rhythms()
    options = {"mask": torch.rand(5, 48, 3) < 0.7} if task == "impute" else {}
    a, b = torch.tensor([0.5, 3.0, 40.0]).double(), torch.tensor([-1e3, 0.0, 7.0]).double()
    moved = net(a * x + b, **options)
    torch.testing.assert_close((moved - b) / a, net(x, **options), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_each_row_is_that_of_the_row_alone_if_periods_are_a_samples(task):
    net, x = network(task, periods="sample"), rhythms()
    mask = torch.rand(5, 48, 3) < 0.7

    def run(rows):
        return net(x[rows], **({"mask": mask[rows]} if task == "impute" else {}))

    alone = torch.cat([run([i]) for i in range(5)])
    torch.testing.assert_close(run(list(range(5))), alone, rtol=1e-10, atol=1e-10)
    for block in net.blocks:
        block.periods = "batch"
    torch.testing.assert_close(run([2, 2, 2]), alone[2:3].expand(3, *alone.shape[1:]), rtol=1e-10, atol=1e-10)


def test_outputs_may_be_the_last_channels_only():
    net, x = network("forecast", n_outputs=1), rhythms()
    a, b = torch.tensor([1.0, 1.0, 5.0]).double(), torch.tensor([0.0, 9.0, 50.0]).double()
    assert net(x).shape == (5, 12, 1)
    torch.testing.assert_close((net(a * x + b) - 50) / 5, net(x), rtol=1e-3, atol=1e-3)


def test_classes_ignore_what_is_padded_only_if_it_is_zero():
    net, x = network("classify"), rhythms()
    real = (torch.arange(48) < 40).expand(5, 48)
    zeroed = x * real[..., None]
    kept = net(zeroed, padding_mask=real)
    assert not torch.allclose(net(x, padding_mask=real), kept)  # the embedding reads its neighbours
    grad = torch.autograd.grad(kept.sum(), net.head.weight)[0].view(3, 48, 4)
    assert (grad[:, 40:] == 0).all()
    assert (grad[:, :40] != 0).any()
    torch.testing.assert_close(net(zeroed, padding_mask=real.double()), kept, rtol=0, atol=0)


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regress"}, "task must be one of 'forecast'"),
        ({"task": "forecast"}, "horizon for forecast must be an integer of at least 1, got 0"),
        ({"horizon": 3}, "horizon must be 0 for detect, got 3"),
        (
            {"task": "classify", "n_classes": 1},
            "n_classes for classify must be an integer of at least 2, got 1",
        ),
        ({"n_classes": 2}, "n_classes must be 0 for detect, got 2"),
        ({"task": "classify", "n_classes": 2, "n_outputs": 1}, "n_outputs must be None for classify"),
        ({"n_outputs": 4}, "n_outputs must be at most n_channels = 3, got 4"),
        ({"top_k": 7}, "top_k must be at most half of the 12 time steps, got 7"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"periods": "day"}, "periods must be one of 'batch', 'sample', got 'day'"),
        ({"periods": [13]}, "periods must be at most the 12 time steps, got 13"),
        ({"periods": [1]}, "periods must be an integer of at least 2, got 1"),
        ({"periods": []}, "periods must not be empty"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"d_model": 0}, "d_model must be an integer of at least 1"),
        ({"n_kernels": 0}, "n_kernels must be an integer of at least 1"),
        ({"n_layers": 0}, "n_layers must be an integer of at least 1"),
        ({"seq_len": 1}, "seq_len must be an integer of at least 2"),
        ({"n_channels": 2.5}, "n_channels must be an integer of at least 1, got 2.5"),
    ],
)
def test_network_refuses_bad_sizes_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        TimesNet(**{"n_channels": 3, "seq_len": 12, "task": "detect", **options})


X0 = torch.zeros(2, 12, 3)
NAN = X0.clone()
NAN[1, 3, 2] = math.nan


@pytest.mark.parametrize(
    ("task", "x", "options", "message"),
    [
        (
            "detect",
            torch.zeros(12, 3),
            {},
            r"x must have shape \(any, 12, 3\) for this network, got \(12, 3\)",
        ),
        ("detect", torch.zeros(2, 11, 3), {}, r"got \(2, 11, 3\)"),
        ("detect", torch.zeros(2, 12, 4), {}, r"got \(2, 12, 4\)"),
        ("detect", X0.long(), {}, "x must be a floating-point tensor"),
        ("detect", NAN, {}, "x must be finite"),
        ("classify", NAN, {}, "x must be finite"),
        ("impute", X0, {}, "mask must be given for impute"),
        ("impute", X0, {"mask": X0 + 0.5}, "mask must be 0 or 1 everywhere"),
        (
            "impute",
            X0,
            {"mask": torch.ones(2, 12)},
            r"mask must have shape \(2, 12, 3\) for this x, got \(2, 12\)",
        ),
        ("impute", NAN, {"mask": X0 + 1}, "observed x must be finite"),
        ("detect", X0, {"mask": X0 + 1}, "mask is for impute, got one for detect"),
        ("detect", X0, {"padding_mask": torch.ones(2, 12)}, "padding_mask is for classify"),
        ("classify", X0, {"padding_mask": torch.ones(2, 3)}, r"padding_mask must have shape \(2, 12\)"),
        ("detect", X0, {"time_features": X0}, r"n_time_features=0, got shape \(2, 12, 3\)"),
    ],
)
def test_network_refuses_bad_input_by_name(as_a_user, task, x, options, message):
    net = TimesNet(3, 12, task, n_classes=2 * (task == "classify"), **SMALL)
    with pytest.raises(ValueError, match=message):
        net(x, **options)


def test_time_features_must_be_those_announced(as_a_user):
    net = TimesNet(3, 12, "detect", n_time_features=2, **SMALL)
    with pytest.raises(ValueError, match="n_time_features=2, got none"):
        net(X0)
    with pytest.raises(ValueError, match=r"time_features must have shape \(2, 12, 2\)"):
        net(X0, time_features=X0)
