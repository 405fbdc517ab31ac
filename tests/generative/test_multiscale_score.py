"""The cascade where everything is known: Haar matrices, Gaussian images, images on a line; and what a network may see."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.generative import (
    LocalCNN,
    MultiscaleDenoiser,
    ascend,
    haar,
    inverse_haar,
    locality_curve,
)
from posterity.testing._low_precision import check_low_precision


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=rng(seed))


def small(**options):
    """A cascade of two levels that takes a millisecond."""
    options = {"receptive_field": 5, "low_receptive_field": 7, "n_layers": 4, "width": 6} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiscaleDenoiser.build(2, **options)


# --- pyramid ---


def haar_matrix(size):
    """Rows that make block means, and details in the order of the columns of `haar`, of a flattened image."""
    pairs = np.kron(np.eye(size // 2), [[0.5, 0.5]])
    gaps = np.kron(np.eye(size // 2), [[0.5, -0.5]])
    return np.kron(pairs, pairs), np.concatenate(
        [np.kron(gaps, pairs), np.kron(pairs, gaps), np.kron(gaps, gaps)]
    )


def test_haar_is_the_product_with_its_matrix_and_is_inverted():
    x = normal(5, 3, 6, 6)
    low, detail = haar(x)
    means, gaps = haar_matrix(6)
    flat = x.flatten(2).numpy()
    np.testing.assert_allclose(low.flatten(2), flat @ means.T, atol=1e-14)
    bands = detail.unflatten(1, (3, 3)).flatten(3)  # band, channel
    expected = (flat @ gaps.T).reshape(5, 3, 3, 9).swapaxes(1, 2)
    np.testing.assert_allclose(bands, expected, atol=1e-14)
    torch.testing.assert_close(inverse_haar(low, detail), x, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(haar, normal(1, 1, 2, 4).requires_grad_())


def test_haar_is_half_of_pywavelets():
    pywt = pytest.importorskip("pywt")
    x = normal(2, 1, 8, 10)
    low, (across, along, diagonal) = pywt.dwt2(x.numpy(), "db1")
    ours, detail = haar(x)
    np.testing.assert_allclose(ours, low / 2, atol=1e-12)
    np.testing.assert_allclose(detail, np.concatenate([across, along, diagonal], 1) / 2, atol=1e-12)


def test_white_noise_stays_white_at_half_its_deviation():
    low, detail = haar(normal(20_000, 1, 4, 4))
    rows = torch.cat([low, detail], 1).flatten(1)
    torch.testing.assert_close(rows.T.cov(), torch.eye(16).double() / 4, rtol=0, atol=0.012)
    flat, nothing = haar(torch.full((1, 2, 4, 4), 0.3))
    assert torch.equal(flat, torch.full((1, 2, 2, 2), 0.3))
    assert not nothing.any()


def test_haar_of_strided_huge_and_narrow_images_is_right():
    x = normal(2, 6, 4, 3).permute(0, 3, 2, 1)
    torch.testing.assert_close(haar(x)[0], F.avg_pool2d(x, 2))
    top = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).max)
    assert torch.equal(haar(top)[0], top[..., :1, :1])
    assert haar(torch.empty(0, 1, 4, 4))[1].shape == (0, 3, 2, 2)
    images = normal(2, 1, 8, 8).requires_grad_()
    check_low_precision(haar, None, (images,), slack=4)
    check_low_precision(inverse_haar, None, (images, normal(2, 3, 8, 8, seed=1).requires_grad_()), slack=4)


# --- network ---


@pytest.mark.parametrize("predict", ["noise", "clean"])
@pytest.mark.parametrize("field", [5, 9, 13, 23, 43])
def test_one_output_depends_on_the_whole_of_its_field_and_nothing_else(field, predict):
    net = LocalCNN(2, 1, receptive_field=field, width=2, norm=False, predict=predict).double()
    for parameter in net.parameters():
        parameter.data.abs_()  # nothing cancels, and no ReLU is off
    v = normal(1, 2, 51, 51).abs().requires_grad_()
    (gradient,) = torch.autograd.grad(net(v)[0, 0, 25, 25], v)
    reach = (field - 1) // 2
    expected = torch.zeros(51, 51, dtype=torch.bool)
    expected[25 - reach : 26 + reach, 25 - reach : 26 + reach] = True
    assert torch.equal(gradient[0, 0] != 0, expected)
    assert torch.equal(gradient[0, 1] != 0, expected)


def test_layers_of_3x3_are_spread_evenly_as_in_the_official_network():
    def places(field):
        net = LocalCNN(1, 1, receptive_field=field, width=1)
        return [k for k, conv in enumerate(net.convs) if conv.kernel_size == (3, 3)]

    for field in (5, 13, 23, 43):
        step = 20 // ((field - 1) // 2 - 1)
        assert places(field) == list(range(0, 21, step))
    assert len(places(9)) == 4
    assert not [name for name, _ in LocalCNN(1, 1).named_parameters() if "bias" in name]


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"predict": "clean"}], ids=str)
def test_at_rest_the_network_has_no_scale_and_no_place(options):
    net = LocalCNN(4, 3, receptive_field=9, n_layers=6, width=8, **options).double()
    v = normal(3, 4, 30, 30)
    net(5 * v)  # deviations of a batch
    net.eval()
    for scale in (1e-3, 7.0, 1e6):
        torch.testing.assert_close(net(scale * v) / scale, net(v), rtol=1e-6, atol=1e-12)
    moved = net(v.roll((1, 2), (2, 3)))[..., 7:-5, 8:-5]  # zeros at the border do not reach there
    torch.testing.assert_close(moved, net(v)[..., 6:-6, 6:-7], rtol=0, atol=1e-12)


def test_norm_divides_by_deviations_of_the_batch_then_by_their_average():
    net = LocalCNN(1, 2, receptive_field=5, n_layers=3, width=7).double()
    norm, before = net.norms[0], net.convs[1](net.convs[0](normal(4, 1, 6, 6)))
    std = before.var((0, 2, 3), correction=0).add(1e-5).sqrt()
    gain = norm.gain[:, None, None]
    torch.testing.assert_close(norm(before), before / std[:, None, None] * gain)
    norm(before)
    average = 1 + (1 - 0.9**2) * (std - 1)
    torch.testing.assert_close(norm.running_std, average.detach())
    torch.testing.assert_close(norm.eval()(before), before / average[:, None, None] * gain)
    assert norm.gain.abs().max() <= 0.025 + 1e-8
    assert norm.gain.abs().max() > 0


def test_network_is_a_layer(as_a_user):
    net = LocalCNN(2, 1, receptive_field=5, n_layers=3, width=4, predict="clean")
    check_low_precision(lambda net, v: net(v), net, (normal(4, 2, 8, 8),), slack=16, follows=False)
    check_low_precision(lambda net, v: net.eval()(v), net, (normal(4, 2, 8, 8),), slack=16, follows=False)


# --- denoising ---


def gaussian(size):
    """The covariance of a stationary image, of a flattened square."""
    place = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    far = np.abs(place[:, None] - place[None]).sum(2)
    return 0.8**far


def linear(matrix, shape):
    matrix = torch.from_numpy(matrix)
    return lambda v: (v.flatten(1) @ matrix.T).reshape(len(v), *shape)


def test_exact_conditional_denoisers_make_the_wiener_filter_and_the_conditional_mean():
    """Low: C (C + s^2 I)^-1 y. Details: their mean given clean means, corrected by what is seen of them."""
    s, cov = 0.7, gaussian(4)
    means, gaps = haar_matrix(4)
    c_low, c_cross, c_detail = means @ cov @ means.T, gaps @ cov @ means.T, gaps @ cov @ gaps.T
    noise = s**2 / 4
    wiener = c_low @ np.linalg.inv(c_low + noise * np.eye(4))
    guess = c_cross @ np.linalg.inv(c_low)
    rest = c_detail - guess @ c_cross.T
    gain = rest @ np.linalg.inv(rest + noise * np.eye(12))
    # noise in d given l: d - (G l + K (d - G l)) = (I - K)(d - G l)
    seen = (np.eye(12) - gain) @ np.concatenate([-guess, np.eye(12)], 1)
    model = MultiscaleDenoiser(linear(np.eye(4) - wiener, (1, 2, 2)), [linear(seen, (3, 2, 2))])
    y = normal(6, 1, 4, 4)
    flat = y.flatten(1).numpy()
    low = flat @ means.T @ wiener.T
    detail = low @ guess.T + (flat @ gaps.T - low @ guess.T) @ gain.T
    clean, smallest = model.denoise(y, return_scales=True)
    np.testing.assert_allclose(smallest.flatten(1), low, atol=1e-12)
    back = np.linalg.inv(np.concatenate([means, gaps]))
    np.testing.assert_allclose(clean.flatten(1), np.concatenate([low, detail], 1) @ back.T, atol=1e-12)
    bare = model.denoise(y, use_details=False)
    torch.testing.assert_close(bare, smallest.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_score_of_a_plain_denoiser_is_the_gradient_of_the_log_density():
    s, cov = 0.3, gaussian(4)
    total = cov + s**2 * np.eye(16)
    model = MultiscaleDenoiser(linear(s**2 * np.linalg.inv(total), (1, 4, 4)), [])
    y = normal(3, 1, 4, 4).requires_grad_()
    law = torch.distributions.MultivariateNormal(torch.zeros(16).double(), torch.from_numpy(total))
    (expected,) = torch.autograd.grad(law.log_prob(y.flatten(1)).sum(), y)
    torch.testing.assert_close(model.score(y, s), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_denoising_folds_the_norms_exactly_and_leaves_the_networks_as_they_were(channels):
    model = small(channels=channels)
    nets = [net.double() for net in (model.low_net, *model.detail_nets)]
    y = normal(2, channels, 8, 12)
    for net in nets:
        for norm in net.norms:
            norm.gain.data.mul_(100)
        net(normal(3, net.in_channels, 6, 6))
    model.detail_nets[0].eval()
    modes = [module.training for net in nets for module in net.modules()]
    found = model.denoise(y, return_scales=True)
    assert modes == [module.training for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    low1, detail0 = haar(y)
    low2, detail1 = haar(low1)
    x2 = low2 - nets[0](low2)
    x1 = inverse_haar(x2, detail1 - nets[2](torch.cat([x2, detail1], 1)))
    x0 = inverse_haar(x1, detail0 - nets[1](torch.cat([x1, detail0], 1)))
    for ours, expected in zip(found, (x0, x1, x2), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_networks_with_hooks_or_other_layers_are_called_as_they_are():
    model, calls = small(norm=True), []
    handle = model.low_net.norms[0].register_forward_hook(lambda *_: calls.append(1))
    y = normal(1, 1, 8, 8).float()
    model.denoise(y)
    assert calls
    handle.remove()
    model.low_net.convs[1] = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.Dropout(0.9))
    torch.testing.assert_close(model.denoise(y), model.denoise(y))  # at rest


def test_gradients_pass_through_denoising_to_image_and_networks():
    model = small(norm=True)
    y = normal(1, 1, 8, 8).float().requires_grad_()
    model.denoise(y).square().sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


# --- loss ---


@pytest.mark.parametrize("level", ["low", 0, 1])
def test_loss_reaches_the_network_of_its_level_only(level):
    model = small()
    model.loss(normal(4, 1, 8, 8).float(), level, generator=rng()).backward()
    mine = model.low_net if level == "low" else model.detail_nets[level]
    for net in (model.low_net, *model.detail_nets):
        assert all((p.grad is not None) == (net is mine) for p in net.parameters())


def test_loss_corrupts_details_only_and_is_zero_for_a_network_that_knows_them():
    x = normal(5, 2, 8, 8)
    low1, detail0 = haar(x)
    low2, detail1 = haar(low1)
    seen = []

    def knows(detail):
        def net(v):
            seen.append(v)
            return v[:, 2:] - detail

        return net

    model = MultiscaleDenoiser(
        lambda v: v - low2, [knows(detail0), knows(detail1)], channels=2, rescale=False
    )
    for level in (0, 1, "low"):
        assert float(model.loss(x, level, generator=rng())) < 1e-28
    torch.testing.assert_close(seen[0][:, :2], low1)
    torch.testing.assert_close(seen[1][:, :2], low2)


@pytest.mark.parametrize(("level", "depth"), [(0, 1), (1, 2), ("low", 2)])
def test_noise_is_a_square_of_uniform_numbers_in_units_of_the_image(level, depth):
    """For a network that sees none, the loss is E s^2 = E (1/4 + u^2 / 2)^2 = 1/16 + 1/12 + 1/20, by 4^depth."""

    def none(v):
        return torch.zeros(len(v), 1 if level == "low" else 3, *v.shape[2:])

    model = MultiscaleDenoiser(none, [none, none], noise=(0.25, 0.75))
    each = model.loss(torch.zeros(20_000, 1, 8, 8), level, reduction="none", generator=rng())
    assert abs(float(each.mean()) * 4**depth - (1 / 16 + 1 / 12 + 1 / 20)) < 0.004
    size = 4 if level == "low" else 3 * (8 // 2**depth) ** 2
    total = model.loss(torch.zeros(20_000, 1, 8, 8), level, reduction="sum", generator=rng())
    torch.testing.assert_close(total, each.sum() * size)
    same = model.loss(torch.zeros(20_000, 1, 8, 8), level, generator=rng())
    torch.testing.assert_close(same, each.mean())


def test_rescaling_multiplies_whole_images_of_the_low_pass_by_uniform_numbers():
    seen = []
    model = MultiscaleDenoiser(lambda v: seen.append(v) or v, [], noise=(0.0, 0.0))
    x = normal(4000, 1, 2, 2)
    model.loss(x, "low", generator=rng())
    factor = (seen[0] / x).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand(-1, 4))
    assert abs(float(factor.mean()) - 0.5) < 0.02
    assert abs(float(factor[:, 0].var()) - 1 / 12) < 0.005
    model.rescale = False
    model.loss(x, "low", generator=rng())
    assert torch.equal(seen[1], x)


def test_parameters_of_a_shared_network_come_once():
    net, low = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Conv2d(1, 1, 1)
    assert len(list(MultiscaleDenoiser(low, [net, net]).parameters())) == 3
    assert not list(MultiscaleDenoiser(torch.zeros_like, []).parameters())


@pytest.mark.parametrize("level", ["low", 0, 1])
def test_a_narrow_cascade_is_its_float32_twin_rounded(as_a_user, level):
    model, x = small(norm=False), normal(6, 1, 8, 8)
    nets = nn.ModuleList([model.low_net, *model.detail_nets])

    def cascade(nets):
        return MultiscaleDenoiser(nets[0], nets[1:])

    options = {"reduction": "none", "generator": None}
    check_low_precision(
        lambda nets, x: cascade(nets).loss(x, level, **options | {"generator": rng()}), nets, (x,), slack=8
    )
    if level == "low":
        check_low_precision(lambda nets, y: cascade(nets).denoise(y), nets, (x,), slack=8)
        check_low_precision(lambda nets, y: cascade(nets).score(y, 0.5), nets, (x,), slack=64)


# --- locality ---


def test_locality_curve_is_the_psnr_of_means_in_a_flat_image():
    """A mean of r x r pixels leaves sigma^2 / r^2, away from the border."""

    def fit(field):
        assert torch.is_grad_enabled()

        def denoise(y):
            return F.avg_pool2d(F.pad(y, [field // 2] * 4, mode="circular"), field, stride=1)

        return denoise

    with torch.inference_mode():
        curve = locality_curve(fit, torch.full((4, 1, 64, 64), 0.5), [0.1, 0.5], [1, 3, 5], generator=rng())
    for field, psnr in curve.items():
        expected = -20 * torch.tensor([0.1, 0.5]).log10() + 20 * math.log10(field)
        torch.testing.assert_close(psnr, expected, rtol=0, atol=0.3)
    torch.testing.assert_close(
        curve[1][0] - curve[1][1], torch.tensor(20 * math.log10(5))
    )  # one noise for all


# --- bad input ---

Y = torch.zeros(2, 1, 8, 8)
MODEL = MultiscaleDenoiser(torch.zeros_like, [lambda v: 0 * v[:, 1:], lambda v: 0 * v[:, 1:]])
NARROW = MultiscaleDenoiser(torch.zeros_like, [lambda v: v[:, :2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: haar(Y[..., :7]), r"x must have even height and width, got \(2, 1, 8, 7\)"),
        (lambda: haar(Y.long()), "x must be .* got dtype torch.int64: scale images to floats in"),
        (lambda: haar(Y[0]), r"x must have shape \(any, any, any, any\) for images .* got \(1, 8, 8\)"),
        (lambda: haar(None), "x must be a floating-point tensor, got NoneType"),
        (lambda: inverse_haar(Y, Y), r"detail must have shape \(2, 3, 8, 8\) for low, got \(2, 1, 8, 8\)"),
        (lambda: haar(Y[:, :0]), r"x must have channels and pixels, got shape \(2, 0, 8, 8\)"),
        (lambda: LocalCNN(1, 1)(Y[..., :0]), r"v must have images and pixels, got shape \(2, 1, 8, 0\)"),
        (lambda: LocalCNN(1, 1, receptive_field=8), "receptive_field must be odd, from 5 to 43 .* got 8"),
        (lambda: LocalCNN(1, 1, receptive_field=3), "receptive_field must be odd, from 5 .* got 3"),
        (lambda: LocalCNN(1, 1, n_layers=5), "receptive_field must be odd, from 5 to 11 .* got 13"),
        (lambda: LocalCNN(1, 3, predict="clean"), "out_channels must be at most in_channels, 1, .* got 3"),
        (lambda: LocalCNN(1, 1, predict="x"), "predict must be one of 'noise', 'clean', got 'x'"),
        (lambda: LocalCNN(1, 1)(Y.expand(2, 2, 8, 8)), r"v must have shape \(any, 1, any, any\) for in_channels"),
        (lambda: MultiscaleDenoiser(None, []), "low_net must be callable, got NoneType"),
        (lambda: MultiscaleDenoiser(len, [3]), r"detail_nets\[0\] must be callable, got int"),
        (lambda: MultiscaleDenoiser(len, len), "detail_nets must be a sequence of networks, got builtin"),
        (lambda: MultiscaleDenoiser(len, [], noise=(1.0, 0.5)), r"noise\[1\] must be at least 1.0, got 0.5"),
        (lambda: MultiscaleDenoiser(len, [], noise=1.0), "noise must be two standard deviations, got 1.0"),
        (lambda: MultiscaleDenoiser.build(-1), "n_scales must be an integer of at least 0, got -1"),
        (lambda: MODEL.loss(Y, 2), r"level must be 'low' or in 0..1, got 2"),
        (lambda: MODEL.loss(Y, -1), r"level must be 'low' or in 0..1, got -1"),
        (lambda: MODEL.loss(Y, "high"), "level must be 'low' or in 0..1, got 'high'"),
        (lambda: MODEL.loss(Y, 0, reduction="max"), "reduction must be one of"),
        (lambda: MODEL.loss(Y[..., :6], 1), r"x must have even .* got \(8, 6\), odd at level 1: .* of 4"),
        (lambda: MODEL.denoise(Y[..., :7]), r"y must have even .* got \(8, 7\), odd at level 0: .* of 4"),
        (lambda: MODEL.denoise(Y.expand(2, 3, 8, 8)), r"y must have shape \(any, 1, any, any\) for channels"),
        (lambda: MODEL.denoise(Y * torch.nan), "y must be finite"),
        (lambda: MODEL.denoise(Y.byte()), "y must be .* got dtype torch.uint8: scale images to floats in"),
        (lambda: NARROW.denoise(Y), r"detail_nets\[0\]\(v\) must have shape \(2, 3, 4, 4\) for .* got \(2, 2, 4, 4\)"),
        (lambda: NARROW.loss(Y, 0), r"detail_nets\[0\]\(v\) must have shape \(2, 3, 4, 4\)"),
        (lambda: MODEL.score(Y, 0.0), "sigma must be greater than 0, got 0.0"),
        (lambda: MODEL.super_resolve(Y, levels=3), "levels must be at most 2, that of detail_nets, got 3"),
        (lambda: MODEL.super_resolve(Y, levels=0), "levels must be an integer of at least 1, got 0"),
        (lambda: MODEL.super_resolve(Y, sigma_start=0.0), "sigma_start must be greater than 0"),
        (lambda: MODEL.super_resolve(Y, beta=0.0), r"beta must be in \(0, 1\], got 0.0"),
        (lambda: MODEL.super_resolve(Y * torch.nan), "low must be finite"),
        (lambda: MODEL.sample(0, (8, 8)), "n must be an integer of at least 1, got 0"),
        (lambda: MODEL.sample(1, (8, 6)), r"shape must be of multiples of 4, for 2 levels, got \(8, 6\)"),
        (lambda: MODEL.sample(1, 8), "shape must be height and width, got 8"),
        (lambda: MODEL.sample(1, (8, 8), beta_low=1.5), r"beta_low must be in \(0, 1\], got 1.5"),
        (lambda: MODEL.sample(1, (8, 8), sigma_end_low=0.0), "sigma_end_low must be greater than 0"),
        (lambda: ascend(len, Y, h0=1.0), r"h0 must be in \(0, 1\), got 1.0"),
        (lambda: ascend(len, Y, beta=1.1), r"beta must be in \(0, 1\], got 1.1"),
        (lambda: ascend(len, Y, sigma_end=0.0), "sigma_end must be greater than 0, got 0.0"),
        (lambda: ascend(len, Y, max_steps=0), "max_steps must be an integer of at least 1, got 0"),
        (lambda: ascend(len, Y[:, 0, 0, :1]), r"y0 must have shape .* two values a sample .* got \(2, 1\)"),
        (lambda: ascend(len, Y, cond=Y[:1]), r"cond must have shape \(2, any, 8, 8\) for y0, got \(1, 1, 8, 8\)"),
        (lambda: ascend(lambda y: y[:1], Y), r"net\(v\) must have shape \(2, 1, 8, 8\)"),
        (lambda: ascend(lambda y: None, Y), r"net\(v\) must be a floating-point tensor, got NoneType"),
        (lambda: locality_curve(len, Y, [0.0], [3]), r"sigmas\[0\] must be greater than 0, got 0.0"),
        (lambda: locality_curve(len, Y, [1.0], [0]), "receptive_fields must be an integer of at least 1, got 0"),
        (lambda: locality_curve(lambda r: haar, Y, [1.0], [3]), r"fit\(3\)\(y\) must be a .* tensor, got tuple"),
        (lambda: locality_curve(lambda r: lambda y: y[:1], Y, [1.0], [3]), r"fit\(3\)\(y\) must have shape \(2, 1, 8, 8\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
