"""TimesNet against a literal reference, its periods on known sines, and its invariances."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.testing import check_estimator, check_layer
from posterity.timeseries import (
    TimesBlock,
    TimesNet,
    TimesNetClassifier,
    TimesNetDetector,
    TimesNetForecaster,
    TimesNetImputer,
    dominant_periods,
)

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


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("periods", ["batch", "sample", [24, 5]])
def test_conforms_to_its_kind(as_a_user, task, periods):
    net = network(task, torch.float32, periods=periods)
    options = {"mask": torch.rand(5, 48, 3) < 0.7} if task == "impute" else {}
    shape = {"forecast": (5, 12, 3), "classify": (5, 3)}.get(task, (5, 48, 3))
    check_layer(net, rhythms(dtype=torch.float32), shape=shape, **options)


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


# estimators

QUICK = {"d_model": 4, "d_ff": 4, "n_layers": 1, "n_kernels": 2, "top_k": 2}


def daily(time=260, channels=2, noise=0.05):
    t = np.arange(time)[:, None]
    clean = (
        np.sin(2 * np.pi * (t / 12 + np.arange(channels) / 5)) * [1.0, 20.0][:channels]
        + [0.0, 100.0][:channels]
    )
    return clean + noise * np.random.default_rng(0).normal(size=clean.shape)


def test_forecasts_follow_a_rhythm_and_fall_back_on_the_training_series():
    X = daily()
    model = TimesNetForecaster(
        horizon=6, seq_len=24, d_model=8, d_ff=8, n_kernels=2, top_k=2, lr=1e-2, dropout=0.0, random_state=0
    ).fit(X[:240])
    forecast = model.predict()
    assert forecast.shape == (6, 2)
    assert (
        np.abs((forecast - X[240:246]) / X.std(0)).mean()
        < 0.5 * np.abs((X[239] - X[240:246]) / X.std(0)).mean()
    )
    np.testing.assert_allclose(model.predict(X[:240]), forecast)
    windows = np.stack([X[s : s + 24] for s in range(0, 200, 7)])
    many = model.predict(windows)
    assert many.shape == (len(windows), 6, 2)
    np.testing.assert_allclose(many[3], model.predict(windows[3]), rtol=1e-4, atol=1e-4)


def test_imputer_fills_gaps_only_and_beats_the_mean():
    X = daily()
    gaps = np.random.default_rng(1).random(X.shape) < 0.2
    model = TimesNetImputer(
        seq_len=24, d_model=8, d_ff=8, n_kernels=2, top_k=2, lr=1e-2, dropout=0.0, random_state=0
    )
    filled = model.fit_transform(np.where(gaps, np.nan, X))
    np.testing.assert_array_equal(filled[~gaps], X[~gaps])
    assert np.isfinite(filled).all()
    assert (((filled - X) / X.std(0))[gaps] ** 2).mean() < 0.3
    np.testing.assert_array_equal(model.transform(X), X)


def test_imputer_averages_overlapping_windows():
    X = daily(time=31)
    gaps = np.random.default_rng(1).random(X.shape) < 0.3
    broken = np.where(gaps, np.nan, X)
    model = TimesNetImputer(seq_len=12, max_epochs=1, random_state=0, **QUICK).fit(daily())
    total, count = np.zeros_like(X), np.zeros_like(X)
    for s in (0, 6, 12, 18, 19):  # stride 6, the last one ends with the series
        scaled = torch.as_tensor((broken[s : s + 12] - model.mean_) / model.scale_).float()[None]
        with torch.no_grad():
            total[s : s + 12] += model.net_(scaled, mask=~scaled.isnan())[0].numpy()
        count[s : s + 12] += 1
    expected = np.where(gaps, total / count * model.scale_ + model.mean_, X)
    np.testing.assert_allclose(model.transform(broken), expected, rtol=1e-4, atol=1e-4)


def test_detector_finds_spikes_and_its_threshold_is_the_training_quantile():
    X = daily(time=500)
    model = TimesNetDetector(
        seq_len=24, contamination=0.05, d_model=8, d_ff=8, n_kernels=2, top_k=2, lr=1e-2, random_state=0
    ).fit(X)
    scores = model.score_samples(X)
    assert (model.predict(X) == -1).mean() == pytest.approx(0.05, abs=0.002)
    assert model.offset_ == pytest.approx(np.quantile(scores, 0.05))
    np.testing.assert_allclose(model.decision_function(X), scores - model.offset_)
    spiked = X.copy()
    spiked[[100, 333, 495], [0, 1, 0]] += 5 * X.std(0)[[0, 1, 0]]
    assert set(model.score_samples(spiked).argsort()[:3]) == {100, 333, 495}


def test_detector_scores_are_minus_errors_of_windows_one_after_another():
    X = daily(time=29)
    model = TimesNetDetector(seq_len=12, max_epochs=1, random_state=0, **QUICK).fit(daily())
    expected = np.empty(29)
    for s, new in ((0, 0), (12, 0), (17, 7)):  # the last one ends with the series, and adds five steps
        window = (X[s : s + 12] - model.mean_) / model.scale_
        with torch.no_grad():
            error = (model.net_(torch.as_tensor(window).float()[None])[0].numpy() - window) ** 2
        expected[s + new : s + 12] = -error.mean(1)[new:]
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-3, atol=1e-5)


def test_classifier_reads_shapes_and_shorter_series():
    rng = np.random.default_rng(0)
    t, y = np.arange(24), np.array(["early", "late"])[np.arange(60) % 2]
    X = np.sin(2 * np.pi * (t / 12 + 0.25 * (y == "late")[:, None])) + 0.1 * rng.normal(size=(60, 24))
    length = rng.integers(16, 25, size=60)
    X[t >= length[:, None]] = np.nan
    model = TimesNetClassifier(d_model=8, d_ff=8, n_kernels=2, lr=1e-2, random_state=0).fit(X[:40], y[:40])
    assert model.score(X[40:], y[40:]) == 1.0
    shares = model.predict_proba(X[40:])
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(model.predict_proba(X[43:44]), shares[3:4], atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X[40:, :, None]), shares, atol=1e-5)


@pytest.mark.parametrize("kind", [TimesNetForecaster, TimesNetImputer, TimesNetDetector])
def test_a_seed_decides_everything_and_global_states_stay(kind):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    make = {"seq_len": 12, "max_epochs": 2, "random_state": 3, "lr": 1e-2, **QUICK}
    make |= {"horizon": 4} if kind is TimesNetForecaster else {}
    first, second = kind(**make).fit(daily(120)), kind(**make).fit(daily(120))
    other = kind(**{**make, "random_state": 4}).fit(daily(120))
    for name, value in first.net_.state_dict().items():
        torch.testing.assert_close(second.net_.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(other.net_.head.weight, first.net_.head.weight)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_training_never_sees_the_part_held_out():
    X = np.random.default_rng(0).normal(size=(200, 2))
    turned = np.concatenate([X[:180], X[:179:-1]])  # mean and deviation stay
    make = {"horizon": 4, "seq_len": 12, "random_state": 0, "max_epochs": 1, **QUICK}
    losses = [TimesNetForecaster(**make).fit(series).losses_ for series in (X, turned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    earlier = np.concatenate([X[:170], X[179:169:-1], X[180:]])
    assert TimesNetForecaster(**make).fit(earlier).losses_ != pytest.approx(losses[0], rel=1e-4)


def test_training_stops_when_patience_ends_and_keeps_the_best_weights():
    make = {"horizon": 4, "seq_len": 12, "random_state": 0, "patience": 2, "lr": 0.3, **QUICK}
    stopped = TimesNetForecaster(max_epochs=30, **make).fit(daily(200))
    assert 2 < len(stopped.losses_) < 30
    best = TimesNetForecaster(max_epochs=len(stopped.losses_) - 2, **make).fit(daily(200))
    for name, value in best.net_.state_dict().items():
        torch.testing.assert_close(stopped.net_.state_dict()[name], value, rtol=0, atol=0)


def test_without_early_stopping_a_prediction_is_still_that_of_the_series_alone():
    make = {"horizon": 4, "seq_len": 24, "random_state": 0, "max_epochs": 1, "validation_fraction": 0.0}
    model = TimesNetForecaster(**make, **QUICK).fit(daily(100))
    windows = rhythms(time=24, channels=2).numpy() * [1.0, 20.0] + [0.0, 100.0]
    alone = np.stack([model.predict(window) for window in windows])
    np.testing.assert_allclose(model.predict(windows), alone, rtol=1e-4, atol=1e-4)


def test_imputer_learns_from_hidden_entries_that_were_observed():
    """Signs cannot be guessed: their squared error is about their variance, 1, or more."""
    rng = np.random.default_rng(0)
    X = rng.choice([-1.0, 1.0], size=(300, 2))
    X[rng.random(X.shape) < 0.8] = np.nan
    model = TimesNetImputer(seq_len=24, max_epochs=2, random_state=0, **QUICK).fit(X)
    assert min(model.losses_) > 0.8  # with missing entries among them, taken for 0, it would be near 0.2


def test_classifier_learns_nothing_from_what_is_padded():
    X = normal(40, 24, seed=4).numpy()
    X[:, 16:] = np.nan
    heads = [
        TimesNetClassifier(max_epochs=n, random_state=0, **QUICK).fit(X, np.arange(40) % 2).net_.head.weight
        for n in (1, 3)
    ]
    before, after = (head.detach().view(2, 24, 4) for head in heads)
    torch.testing.assert_close(after[:, 16:], before[:, 16:], rtol=0, atol=0)
    assert (after[:, :16] != before[:, :16]).all()


ROWS_ARE_TIME = "rows are consecutive steps of time, not exchangeable samples"
TOO_SHORT = "batches of one step are shorter than a window"


def test_estimators_pass_scikit_learns_checks(as_a_user):
    tiny = {"d_model": 2, "d_ff": 2, "n_layers": 1, "n_kernels": 1, "top_k": 1, "max_epochs": 1}
    imputer = {"check_methods_subset_invariance": TOO_SHORT}
    detector = imputer | {"check_methods_sample_order_invariance": ROWS_ARE_TIME}
    check_estimator(TimesNetImputer(seq_len=4, random_state=0, **tiny), expected_failures=imputer)
    check_estimator(TimesNetDetector(seq_len=4, random_state=0, **tiny), expected_failures=detector)
    check_estimator(
        TimesNetForecaster(seq_len=4, horizon=2, random_state=0, **tiny),
        expected_failures={
            "check_methods_subset_invariance": TOO_SHORT,
            "check_methods_sample_order_invariance": "a forecast has horizon rows, none of them a row of X",
        },
    )
    tiny |= {"max_epochs": 20, "batch_size": 64, "lr": 0.1, "d_model": 4, "validation_fraction": 0.0}
    check_estimator(
        TimesNetClassifier(random_state=0, **tiny),
        expected_failures={
            "check_estimators_pickle": "it puts NaN in the middle of series, which has no meaning"
        },
    )


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
    net = TimesNet(3, 12, task, n_classes=2 * (task == "classify"), **QUICK)
    with pytest.raises(ValueError, match=message):
        net(x, **options)


def test_time_features_must_be_those_announced(as_a_user):
    net = TimesNet(3, 12, "detect", n_time_features=2, **QUICK)
    with pytest.raises(ValueError, match="n_time_features=2, got none"):
        net(X0)
    with pytest.raises(ValueError, match=r"time_features must have shape \(2, 12, 2\)"):
        net(X0, time_features=X0)


def test_block_and_periods_refuse_what_does_not_fit(as_a_user):
    with pytest.raises(ValueError, match="k must be at most half of the 12 time steps, got 7"):
        dominant_periods(X0, 7)
    with pytest.raises(ValueError, match=r"x must have shape \(any, any, any\)"):
        dominant_periods(X0[0], 1)
    for periods in ("batch", "sample"):
        with pytest.raises(ValueError, match="top_k must be at most half"):
            TimesBlock(3, 3, top_k=7, periods=periods)(X0)
    with pytest.raises(ValueError, match="periods must be at most the 12 time steps, got 13"):
        TimesBlock(3, 3, periods=[13])(X0)
    with pytest.raises(ValueError, match="for this d_model"):
        TimesBlock(4, 3)(X0)


GAP = daily(40)
GAP[:, 1] = np.nan
INNER = daily(40).T.copy()
INNER[1, 3] = np.nan


@pytest.mark.parametrize(
    ("model", "X", "message"),
    [
        (TimesNetForecaster(seq_len=30, horizon=11), daily(40), "at least 41 rows .* n_samples = 40"),
        (TimesNetForecaster(seq_len=12, horizon=0), daily(40), "horizon must be an integer of at least 1"),
        (TimesNetForecaster(seq_len=12, horizon=2), GAP, "contains NaN"),
        (TimesNetImputer(seq_len=41), daily(40), "at least 41 rows"),
        (TimesNetImputer(seq_len=12), GAP, "observed value in each column, got none in 1"),
        (TimesNetImputer(seq_len=12, mask_rate=0.0), daily(40), r"mask_rate must be in \(0, 1\), got 0.0"),
        (TimesNetImputer(seq_len=12, mask_rate=1.0), daily(40), r"mask_rate must be in \(0, 1\), got 1.0"),
        (TimesNetDetector(seq_len=12, contamination=0.6), daily(40), r"contamination must be in \(0, 0.5\]"),
        (TimesNetDetector(seq_len=12, contamination=0.0), daily(40), r"contamination must be in \(0, 0.5\]"),
        (TimesNetDetector(seq_len=12, top_k=7), daily(40), "top_k must be at most half of the 12"),
        (TimesNetDetector(seq_len=12, lr=0.0), daily(40), "lr must be greater than 0"),
        (
            TimesNetDetector(seq_len=12, max_epochs=0),
            daily(40),
            "max_epochs must be an integer of at least 1",
        ),
        (
            TimesNetDetector(seq_len=12, validation_fraction=1.0),
            daily(40),
            r"validation_fraction must be in \[0, 1\)",
        ),
        (TimesNetClassifier(), INNER, "NaN at the end of a series only, got others in series 1"),
    ],
)
def test_estimators_refuse_bad_input_by_name(as_a_user, model, X, message):
    with pytest.raises(ValueError, match=message):
        model.fit(X, np.arange(len(X)) % 2)


def test_columns_are_named_where_they_have_names(as_a_user):
    import pandas as pd

    frame = pd.DataFrame(GAP, columns=["load", "empty"])
    with pytest.raises(ValueError, match="got none in 'empty'"):
        TimesNetImputer(seq_len=12).fit(frame)


def test_fitted_estimators_refuse_other_series(as_a_user):
    quick = {"seq_len": 12, "max_epochs": 1, **QUICK}
    forecaster = TimesNetForecaster(horizon=2, **quick).fit(daily(40))
    with pytest.raises(ValueError, match="at least 12 rows"):
        forecaster.predict(daily(11))
    with pytest.raises(ValueError, match=r"X must be \(n, 12, 2\) or a series, got \(3, 11, 2\)"):
        forecaster.predict(np.zeros((3, 11, 2)))
    with pytest.raises(ValueError, match="X must be finite"):
        forecaster.predict(np.full((3, 12, 2), np.nan))
    with pytest.raises(ValueError, match="at least 12 rows"):
        TimesNetImputer(**quick).fit(daily(40)).transform(daily(11))
    with pytest.raises(ValueError, match="features"):
        TimesNetDetector(**quick).fit(daily(40)).score_samples(daily(40, channels=1))
    classes = TimesNetClassifier(max_epochs=1, **QUICK)
    with pytest.raises(ValueError, match="at least 2 classes, got 1 class"):
        classes.fit(np.zeros((4, 12)), np.zeros(4))
    classes.fit(normal(4, 12, 2).numpy(), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="must have the 2 variables of fit, got 1"):
        classes.predict(np.zeros((4, 12)))


def test_a_rate_that_diverges_is_named(as_a_user):
    with pytest.raises(ValueError, match="lr must be lower"):
        TimesNetForecaster(horizon=2, seq_len=12, lr=1e30, **QUICK).fit(daily(120))


def test_a_copy_keeps_its_periods():
    assert copy.deepcopy(TimesBlock(2, 2, periods=(4, 6))).periods == [4, 6]
