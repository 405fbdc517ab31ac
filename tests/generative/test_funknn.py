"""Continuous images against quadratics, padding, differences and other libraries' interpolation."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn
from torch.nn import functional as F

from posterity.generative import (
    FunkNN,
    image_gradient,
    image_laplacian,
    image_patches,
    pixel_grid,
)
from posterity.testing import check_layer
from posterity.testing._low_precision import check_low_precision


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=rng(seed))


def points(*size, reach=1.0, seed=0):
    return reach * (2 * torch.rand(*size, 2, dtype=torch.float64, generator=rng(seed)) - 1)


def trained(channels=1, **options):
    """A small network whose layers all do something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FunkNN(channels, **({"hidden": [7, 6], "patch_size": 5} | options)).double()
        nn.init.normal_(net.layers[-1].weight, std=0.3)
        nn.init.normal_(net.layers[-1].bias, std=0.3)
        with torch.no_grad():
            net.patch_scale.copy_(torch.tensor([1.2, 0.8]))
    return net


def plain(channels=1, kernel="cubic"):
    return FunkNN(channels, hidden=[1], patch_size=1, kernel=kernel).double()


# --- kernels ---


def keys(u):
    """Keys' kernel, a = -1/2, as its paper has it."""
    u = np.abs(u)
    return np.where(
        u < 1, 1.5 * u**3 - 2.5 * u**2 + 1, np.where(u < 2, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2, 0)
    )


def wider(u):
    u = np.abs(u)
    pieces = (
        4 / 3 * u**3 - 7 / 3 * u**2 + 1,
        -7 / 12 * u**3 + 3 * u**2 - 59 / 12 * u + 2.5,
        u**3 / 12 - 2 / 3 * u**2 + 7 / 4 * u - 1.5,
    )
    return np.select([u < 1, u < 2, u < 3], pieces, 0.0)


def hat(u):
    return np.maximum(1 - np.abs(u), 0)


@pytest.mark.parametrize(("kernel", "formula"), [("cubic", keys), ("cubic6", wider), ("bilinear", hat)])
@pytest.mark.parametrize("scale", [None, (1.3, -0.6), (7.0, 0.0)])
def test_a_patch_is_the_sum_over_all_pixels_of_an_image_padded_symmetrically(kernel, formula, scale):
    """Brute force: every pixel of three images a side, mirrored by numpy, weighed by the kernel."""
    p, h, w = 5, 6, 8
    image, coords = normal(2, 3, h, w), points(2, 4, reach=1.4)
    got = image_patches(
        image,
        coords,
        p,
        scale=None if scale is None else torch.tensor(scale, dtype=torch.float64),
        kernel=kernel,
    )
    pad = 3 * h, 3 * w
    large = np.pad(image.numpy(), ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2), mode="symmetric")
    sx, sy = scale or (1.0, 1.0)
    offsets = (np.arange(p) - (p - 1) / 2) * (p - 1) / p
    for n in range(2):
        for m in range(4):
            x, y = ((coords[n, m].numpy() + 1) * (w, h) - 1) / 2
            across = formula(x + offsets[:, None] * sx * w / (w - 1) - (np.arange(large.shape[3]) - pad[1]))
            down = formula(y + offsets[:, None] * sy * h / (h - 1) - (np.arange(large.shape[2]) - pad[0]))
            np.testing.assert_allclose(got[n, m], down @ large[n] @ across.T, atol=1e-10)


def test_values_at_the_centres_of_pixels_are_the_pixels():
    image = normal(2, 3, 5, 7)
    for kernel in ("cubic", "cubic6", "bilinear"):
        got = image_patches(image, pixel_grid(5, 7, dtype=torch.float64), 1, kernel=kernel).flatten(2)
        torch.testing.assert_close(got.transpose(1, 2).reshape(image.shape), image, rtol=0, atol=1e-12)
    with torch.no_grad():
        kept = FunkNN(3, hidden=[4]).double()(image, pixel_grid(5, 7, dtype=torch.float64))
    torch.testing.assert_close(kept.transpose(1, 2).reshape(image.shape), image, rtol=0, atol=1e-12)


def test_linear_interpolation_is_that_of_torch_and_scipy():
    image, coords = normal(2, 3, 6, 9), points(2, 20, reach=1.5)
    got = image_patches(image, coords, 1, kernel="bilinear").flatten(2).transpose(1, 2)
    inside = coords.clamp(-0.8, 0.8)  # torch mirrors, but clips before it interpolates
    ours = image_patches(image, inside, 1, kernel="bilinear").flatten(2).transpose(1, 2)
    theirs = F.grid_sample(image, inside[:, None], mode="bilinear", align_corners=False)[:, :, 0]
    torch.testing.assert_close(ours, theirs)
    for n in range(2):
        x, y = ((coords[n].numpy() + 1) * (9, 6) - 1).T / 2
        for c in range(3):
            expected = map_coordinates(image[n, c].numpy(), [y, x], order=1, mode="reflect")
            np.testing.assert_allclose(got[n, c], expected, atol=1e-12)


def test_the_grid_is_that_of_grid_sample():
    grid = pixel_grid(3, 4, dtype=torch.float64)
    theirs = F.affine_grid(torch.eye(2, 3).double()[None], [1, 1, 3, 4], align_corners=False)
    torch.testing.assert_close(grid, theirs.view(1, 12, 2))
    assert pixel_grid(2).shape == (1, 4, 2)
    assert pixel_grid(2).dtype == torch.float32


# --- derivatives ---


def quadratic(h, w):
    """a + b x + c y + d x^2 + e x y + g y^2 in coordinates, as an image, and what is true of it."""
    a, b, c, d, e, g = 0.3, -1.0, 0.7, 0.9, -0.4, 1.1

    def value(at):
        x, y = at.unbind(-1)
        return a + b * x + c * y + d * x * x + e * x * y + g * y * y

    def slope(at):
        x, y = at.unbind(-1)
        return torch.stack([b + 2 * d * x + e * y, c + e * x + 2 * g * y], -1)

    image = value(pixel_grid(h, w, dtype=torch.float64)).view(1, 1, h, w)
    return image, value, slope, 2 * (d + g)


@pytest.mark.parametrize("kernel", ["cubic", "cubic6"])
def test_quadratics_are_exact_with_their_derivatives_inside(kernel):
    image, value, slope, laplacian = quadratic(16, 20)
    net = FunkNN(1, hidden=[3], kernel=kernel).double()
    inner = pixel_grid(16, 20, dtype=torch.float64).view(16, 20, 2)[4:-4, 4:-4].reshape(1, -1, 2)
    for coords in (points(1, 50, reach=0.6), inner):
        torch.testing.assert_close(net(image, coords)[..., 0], value(coords), rtol=0, atol=1e-10)
        torch.testing.assert_close(
            image_gradient(net, image, coords)[:, :, 0], slope(coords), rtol=0, atol=1e-10
        )
        curved = image_laplacian(net, image, coords)
        torch.testing.assert_close(curved, torch.full_like(curved, laplacian), rtol=0, atol=1e-9)


VARIANTS = [
    {"activation": "sin", "omega0": 3.0},
    {"activation": "relu"},
    {"network": "cnn", "activation": "sin", "omega0": 3.0, "kernel": "cubic6"},
    {"network": "cnn"},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_derivatives_are_those_of_differences_and_of_torch(options):
    net, image = trained(2, **options), normal(2, 2, 9, 11)
    coords = points(2, 3, seed=5)
    gradient, laplacian = image_gradient(net, image, coords), image_laplacian(net, image, coords)
    h = 1e-6  # a maximum of a pool changes its place otherwise
    for d in (0, 1):
        step = torch.zeros(2, dtype=torch.float64)
        step[d] = h
        rise = (net(image, coords + step) - net(image, coords - step)) / (2 * h)
        torch.testing.assert_close(gradient[..., d], rise, rtol=1e-5, atol=1e-5)
    for n, m in ((0, 0), (1, 2)):
        for c in (0, 1):
            hessian = torch.autograd.functional.hessian(
                lambda x, n=n, c=c: net(image[n : n + 1], x.view(1, 1, 2))[0, 0, c], coords[n, m]
            )
            torch.testing.assert_close(laplacian[n, m, c], hessian.trace())
    theirs = image_laplacian(lambda x, at: net(x, at), image, coords)  # not known to be a FunkNN: backward
    torch.testing.assert_close(laplacian, theirs)


def test_gradients_of_all_that_is_learned_or_given():
    net, image, coords = (
        trained(activation="sin", omega0=2.0, hidden=[4, 3], patch_size=3),
        normal(1, 1, 4, 5).requires_grad_(),
        points(1, 2),
    )
    coords.requires_grad_()
    scale = torch.tensor([1.1, 0.7]).double().requires_grad_()
    assert torch.autograd.gradcheck(net, (image, coords))
    assert torch.autograd.gradcheck(
        lambda *x: image_patches(x[0], x[1], 3, scale=x[2]), (image, coords, scale)
    )
    assert torch.autograd.gradcheck(lambda *x: image_gradient(net, *x), (image, coords))
    assert torch.autograd.gradcheck(lambda *x: image_laplacian(net, *x), (image, coords))
    leaves = [p for p in net.parameters() if p.ndim < 2]
    with_net = torch.autograd.grad(image_laplacian(net, image, coords).sum(), leaves, allow_unused=True)
    by_hand = torch.autograd.grad(
        image_laplacian(lambda *x: net(*x), image, coords).sum(), leaves, allow_unused=True
    )
    for ours, theirs in zip(with_net, by_hand, strict=True):
        zero = torch.zeros(()).double()
        torch.testing.assert_close(*((zero if g is None else g).sum() for g in (ours, theirs)))


def test_a_graph_is_made_only_when_asked_for_and_whoever_asks():
    net, image, coords = trained(), normal(2, 1, 6, 6), points(1, 3)
    for derivative in (image_gradient, image_laplacian):
        expected = derivative(net, image, coords)
        assert expected.requires_grad
        assert not derivative(net, image, coords, create_graph=False).requires_grad
        assert not derivative(lambda *x: net(*x), image, coords, create_graph=False).requires_grad
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = derivative(net, image * 1, coords * 1, create_graph=False)
            torch.testing.assert_close(got, expected.detach())


def test_a_plane_has_no_curvature_whatever_computes_it():
    image, coords = normal(1, 1, 4, 4), points(1, 3)
    flat = image_laplacian(lambda x, at: at.sum(-1, keepdim=True) * x.mean(), image, coords)
    torch.testing.assert_close(flat, torch.zeros_like(flat))
    bowl = image_laplacian(lambda x, at: at.square().sum(-1, keepdim=True), image, coords)
    torch.testing.assert_close(bowl, torch.full_like(bowl, 4.0))


# --- symmetries ---


@pytest.mark.parametrize("options", VARIANTS)
def test_what_is_learned_moves_with_the_image(options):
    net, image, coords = trained(**options), normal(1, 1, 32, 32), points(1, 6, reach=0.2)
    moved = image.roll((3, -2), (2, 3))
    shift = torch.tensor([-2 * 2 / 32, 3 * 2 / 32]).double()
    torch.testing.assert_close(net(moved, coords + shift), net(image, coords), rtol=0, atol=1e-10)


def test_a_transposed_network_sees_the_transposed_image():
    net, twin = trained(2), trained(2)
    with torch.no_grad():
        twin.patch_scale.copy_(net.patch_scale.flip(0))
        first = net.layers[0].weight.view(-1, 2, 5, 5)
        twin.layers[0].weight.copy_(first.mT.flatten(1))
    image, coords = normal(2, 2, 7, 9), points(2, 5, reach=1.3)
    torch.testing.assert_close(twin(image.mT, coords.flip(-1)), net(image, coords), rtol=0, atol=1e-10)


def test_coordinates_are_answered_one_by_one():
    net, image, coords = trained(2), normal(3, 2, 8, 8), points(3, 20, reach=2.9)
    parts = torch.cat([net(image, part) for part in coords.split(7, 1)], 1)
    torch.testing.assert_close(parts, net(image, coords), rtol=0, atol=1e-12)
    shared = net(image, coords[:1])
    torch.testing.assert_close(shared, net(image, coords[:1].expand(3, -1, -1)))
    strided = normal(3, 8, 2, 8).transpose(1, 2)
    torch.testing.assert_close(net(strided, coords), net(strided.contiguous(), coords))
    assert net(image, coords[:, :0]).shape == (3, 0, 2)
    assert net(image[:0], coords[:0]).shape == (0, 20, 2)


# --- the network ---


def test_a_convolutional_network_is_the_paper_s(as_a_user):
    """Eight layers of 2 x 2 padded to the same size, skips but at 1, 4 and 8, pooled after 4 and 8."""
    net, image, coords = trained(2, network="cnn", patch_size=9), normal(1, 2, 12, 12), points(1, 3)
    x = image_patches(image, coords, 9, scale=net.patch_scale)[0]
    centre = x[:, :, 4, 4]
    for k, conv in enumerate(net.convs, 1):
        new = F.conv2d(x, conv.weight, conv.bias, padding="same").relu()
        x = new if k in (1, 4, 8) else new + x
        x = F.max_pool2d(x, 2) if k in (4, 8) else x
    x = x.flatten(1)
    assert x.shape[1] == 256
    for layer in net.layers[:-1]:
        x = layer(x).relu()
    torch.testing.assert_close(net(image, coords)[0], net.layers[-1](x) + centre)


def test_sine_layers_start_as_siren():
    net = FunkNN(2, hidden=[300, 200], patch_size=3, activation="sin", omega0=10.0)
    assert net.omega.tolist() == [10.0, 10.0]
    for layer, reach in zip(net.layers, (1 / 18, math.sqrt(6 / 300) / 10), strict=False):
        weight = layer.weight.detach()
        assert weight.abs().max() <= reach
        assert float(weight.std()) == pytest.approx(reach / math.sqrt(3), rel=0.05)
    assert sum(p.numel() for p in FunkNN(3).layers.parameters()) == sum(
        (a + 1) * b
        for a, b in zip((243, 512, 512, 256, 256, 128, 128, 64, 64, 64), (512, 512, 256, 256, 128, 128, 64, 64, 64, 3), strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS)
def test_conforms_to_its_kind(as_a_user, options):
    net = trained(2, **options).float()
    check_layer(net, normal(2, 2, 8, 9).float(), points(1, 6).float(), shape=(2, 6, 2))


@pytest.mark.parametrize("look", [image_gradient, image_laplacian, None])
def test_derivatives_and_patches_hold_in_low_precision(as_a_user, look):
    net = plain().float()
    coords = (points(1, 6, reach=0.7) * 64).round().float() / 64  # the same in every dtype
    image = normal(1, 1, 8, 8).float().requires_grad_()
    check_low_precision(
        lambda x, at: image_patches(x, at, 3) if look is None else look(net, x, at),
        None,
        (image, coords),
        slack=8,
    )


IMAGE, COORDS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 2)
NET = FunkNN(3, hidden=[4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FunkNN(0), "channels must be an integer of at least 1, got 0"),
        (lambda: FunkNN(3, patch_size=4), "patch_size must be odd, at least 1 for network='mlp', got 4"),
        (lambda: FunkNN(3, patch_size=3, network="cnn"), "patch_size must be odd, at least 5 .* got 3"),
        (lambda: FunkNN(3, network="vit"), "network must be one of 'mlp', 'cnn', got 'vit'"),
        (lambda: FunkNN(3, hidden=[]), r"hidden must be a sequence of widths, got \[\]"),
        (lambda: FunkNN(3, hidden=5), "hidden must be a sequence of widths, got 5"),
        (lambda: FunkNN(3, hidden=[0]), "hidden must be an integer of at least 1, got 0"),
        (lambda: FunkNN(3, activation="tanh"), "activation must be one of"),
        (lambda: FunkNN(3, omega0=0.0), "omega0 must be greater than 0, got 0.0"),
        (lambda: FunkNN(3, kernel="lanczos"), "kernel must be one of"),
        (lambda: NET(IMAGE[:, :2], COORDS), r"image must have shape \(any, 3, any, any\) for channels, got \(2, 2, 8, 8\)"),
        (lambda: NET(IMAGE.byte(), COORDS), "image must be a floating-point tensor, got dtype torch.uint8"),
        (lambda: NET(None, COORDS), "image must be a floating-point tensor, got NoneType"),
        (lambda: NET(IMAGE[..., :1], COORDS), "at least 2 pixels a side"),
        (lambda: NET(IMAGE, COORDS[..., :1]), r"coords must have shape \(any, any, 2\)"),
        (lambda: NET(IMAGE, COORDS.long()), "coords must be a floating-point tensor"),
        (lambda: NET(IMAGE, COORDS.repeat(2, 1, 1)), "coords must be of 2 images, or 1 for all, got 4"),
        (lambda: NET(IMAGE, COORDS + 7), r"coords must be in \[-3, 3\], where \[-1, 1\] is the image, .* from 7 to 7: pixel"),
        (lambda: NET(IMAGE, COORDS * torch.nan), r"coords must be in \[-3, 3\].* from nan to nan"),
        (lambda: image_patches(IMAGE, COORDS, 2), "patch_size must be odd, got 2"),
        (lambda: image_patches(IMAGE, COORDS, scale=torch.ones(3)), r"scale must have shape \(2\)|scale must have shape"),
        (lambda: image_patches(IMAGE, COORDS, scale=torch.tensor([1.0, torch.inf])), "scale must be finite"),
        (lambda: image_patches(IMAGE, COORDS, kernel="nearest"), "kernel must be one of"),
        (lambda: pixel_grid(0), "height must be an integer of at least 1, got 0"),
        (lambda: pixel_grid(2, 0), "width must be an integer of at least 1, got 0"),
        (lambda: pixel_grid(2, dtype=torch.long), "dtype must be floating-point, got torch.int64"),
        (lambda: image_gradient(lambda x, at: at.detach(), IMAGE, COORDS), "must depend on coords"),
        (lambda: image_gradient(lambda x, at: x.mean() * NET.layers[0].weight[:1, :5, None].expand(2, 5, 1), IMAGE, COORDS),
         r"net\(image, coords\) must depend on coords"),
        (lambda: image_laplacian(lambda x, at: at.detach(), IMAGE, COORDS), "must depend on coords"),
        (lambda: image_gradient(lambda x, at: at[:1], IMAGE, COORDS), r"net\(image, coords\) must have shape \(2, 5, any\)"),
        (lambda: image_gradient(lambda x, at: None, IMAGE, COORDS), r"net\(image, coords\) must be a floating-point tensor"),
        (lambda: image_laplacian(FunkNN(3, kernel="bilinear"), IMAGE, COORDS), "kernel='cubic' or 'cubic6', got 'bilinear'"),
        (lambda: image_laplacian(NET, IMAGE[:, :1], COORDS), r"image must have shape \(any, 3, any, any\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
