"""Pairs whose answer is known, sizes, and inverse problems with a solution in closed form."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.generative import (
    FunkNN,
    funknn_pairs,
    pixel_grid,
    solve_continuous,
    upsample,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*size, seed=0):
    return torch.rand(*size, dtype=torch.float64, generator=rng(seed))


def plain(channels=1, kernel="cubic"):
    return FunkNN(channels, hidden=[1], patch_size=1, kernel=kernel).double()


def bent(channels=1):
    """A small network that does something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FunkNN(channels, hidden=[5], patch_size=3).double()
        nn.init.normal_(net.layers[-1].weight, std=0.3)
        return net


def differ(a, b):
    """Return whether two things have numbers of which one differs, by however little."""
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- pairs ---


@pytest.mark.parametrize("mode", ["factor", "continuous", "single"])
def test_targets_are_pixels_of_the_larger_image_at_their_centres(mode):
    images, sides = rand(3, 2, 24, 32), set()
    for seed in range(40):
        low, coords, target = funknn_pairs(images, mode=mode, n_coords=6, generator=rng(seed))
        high = images
        if mode == "factor":
            size = [2 * side for side in low.shape[2:]]
            high = F.interpolate(images, size, mode="bilinear", antialias=True)
        torch.testing.assert_close(low, F.interpolate(images, low.shape[2:], mode="bilinear", antialias=True))
        found = F.grid_sample(high, coords[:, None], mode="nearest", align_corners=False)[:, :, 0]
        torch.testing.assert_close(target, found.transpose(1, 2))
        sides.add(low.shape[2])
    expected = {"factor": range(3, 12), "continuous": range(6, 12), "single": [12]}[mode]
    assert sides == set(expected)


def test_pairs_are_drawn_from_the_generator_and_for_each_image():
    images = rand(2, 1, 16, 16).float()
    before = torch.random.get_rng_state()
    first, again = (funknn_pairs(images, n_coords=9, generator=rng(1)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not differ(first, again)
    assert differ(first[1:2], funknn_pairs(images, n_coords=9, generator=rng(2))[1:2])
    assert not torch.equal(first[1][0], first[1][1])
    low, coords, target = funknn_pairs(images.bfloat16(), factor=4, n_coords=3)
    assert (low.dtype, coords.dtype, target.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


# --- sizes ---


def test_an_image_of_the_same_size_is_itself_and_parts_make_the_whole():
    image = rand(2, 3, 6, 8)
    torch.testing.assert_close(upsample(plain(3), image, (6, 8)), image, rtol=0, atol=1e-12)
    net = bent(3)
    whole = upsample(net, image, (9, 20))
    torch.testing.assert_close(upsample(net, image, (9, 20), chunk_size=7), whole)
    direct = net(image, pixel_grid(9, 20, dtype=torch.float64))
    torch.testing.assert_close(whole, direct.transpose(1, 2).reshape(2, 3, 9, 20).detach())
    assert not whole.requires_grad


def test_recursion_is_calls_one_after_another():
    net, image = bent(), rand(1, 1, 4, 5)
    twice = upsample(net, upsample(net, image, (8, 10)), (16, 20))
    torch.testing.assert_close(upsample(net, image, (16, 20), recursive=True), twice)
    torch.testing.assert_close(upsample(net, image, (19, 23), recursive=True), upsample(net, twice, (19, 23)))
    thrice = upsample(net, image, (12, 15), recursive=True, factor=3)
    torch.testing.assert_close(thrice, upsample(net, image, (12, 15)))
    assert (thrice - upsample(net, image, (12, 15), recursive=True)).abs().max() > 1e-3


def test_a_network_ends_in_the_mode_it_had():
    net = bent().train()
    upsample(net, rand(1, 1, 4, 4), 5)
    assert net.training
    with pytest.raises(ValueError, match="image must have shape"):
        upsample(net, rand(1, 2, 4, 4), 5)
    assert net.training


# --- inverse problems ---


def test_pixels_come_back_from_values_at_their_centres():
    true, at = rand(1, 2, 5, 6), pixel_grid(5, 6, dtype=torch.float64)
    net = plain(2)
    found = solve_continuous(
        net, lambda f: f(at), net(true, at).detach(), latent=torch.zeros_like(true), n_steps=200, lr=5e-2
    )
    assert (found.latent - true).abs().max() < 1e-3
    assert torch.equal(found.latent, found.coarse)
    torch.testing.assert_close(found.image, found.coarse, rtol=0, atol=1e-12)
    assert found.losses.shape == (200,)
    assert inspect.signature(solve_continuous).parameters["n_steps"].default == 500
    assert found.losses[-1] < 1e-6 * found.losses[0]


def matrix_of(function, n):
    return torch.stack([function(row).flatten() for row in torch.eye(n, dtype=torch.float64)], 1)


def test_a_linear_problem_with_a_linear_decoder_has_its_least_squares_solution():
    """Values, gradients, Laplacians and pixels of f are linear in the latent: numpy solves the same."""
    decoder, net = nn.Linear(3, 16).double(), plain()
    with torch.no_grad():
        decoder.weight.copy_(rand(16, 3) - 0.5)
        decoder.bias.zero_()
    at = 0.8 * (2 * rand(1, 9, 2, seed=3) - 1)

    def decode(z):
        return decoder(z).view(1, 1, 4, 4)

    def measure(f):
        parts = [f(at), f.gradient(at) / 4, f.laplacian(at) / 30, f.image((3, 5))]
        return torch.cat([part.flatten() for part in parts])

    def view(z):
        from posterity.generative.continuous_solver import ContinuousImage

        return measure(ContinuousImage(net, decode(z)))

    matrix = matrix_of(lambda z: view(z).detach(), 3)
    y = rand(len(matrix), seed=5)
    expected = np.linalg.lstsq(matrix.numpy(), y.numpy(), rcond=None)[0]
    start = torch.from_numpy(expected) + 0.02 * (rand(3, seed=9) - 0.5)  # off by far more than allowed
    flags = [p.requires_grad for p in (*net.parameters(), *decoder.parameters())]
    state = copy.deepcopy(net.state_dict())
    found = solve_continuous(net, measure, y, latent=start, decoder=decode, size=7, n_steps=100, lr=2e-3)
    np.testing.assert_allclose(found.latent, expected, atol=1e-4)
    assert found.image.shape == (1, 1, 7, 7)
    torch.testing.assert_close(found.image, upsample(net, found.coarse, 7))
    residual = matrix.numpy() @ expected - y.numpy()
    assert float(found.losses[-1]) == pytest.approx(np.square(residual).mean(), rel=1e-4)
    assert [p.requires_grad for p in (*net.parameters(), *decoder.parameters())] == flags
    assert not differ(net.state_dict().values(), state.values())


def test_priors_weigh_as_they_say():
    """mean (z - y)^2 + w |z|^2 over 4 pixels is least at y / (1 + 4 w)."""
    at, y = pixel_grid(2, dtype=torch.float64), rand(1, 4, 1)
    found = solve_continuous(
        plain(), lambda f: f(at), y, latent=torch.zeros(1, 1, 2, 2).double(), n_steps=200, lr=5e-2,
        prior=lambda z: z.square().sum(), prior_weight=0.25,
    )  # fmt: skip
    torch.testing.assert_close(found.latent.flatten(), y.flatten() / 2, rtol=0, atol=1e-4)


def test_total_variation_is_the_mean_size_of_the_gradient():
    """Of a ramp of 1 a pixel along x, in coordinates: w / 2, at points inside."""
    ramp = torch.arange(8.0).double().expand(1, 1, 8, 8)
    at, inner = pixel_grid(8, dtype=torch.float64), 0.2 * (2 * rand(1, 5, 2) - 1)
    found = solve_continuous(
        plain(), lambda f: f(at), ramp.reshape(1, 64, 1), latent=ramp, coords=inner, n_steps=1, tv=0.5
    )
    assert found.losses.tolist() == pytest.approx([0.5 * 4])


def test_refining_trains_a_copy_of_the_decoder():
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4))).double().train()
    decoder[0].bias.requires_grad_(False)
    net, at, y = plain().train(), pixel_grid(4, dtype=torch.float64), rand(1, 16, 1)
    state = copy.deepcopy(decoder.state_dict())
    options = {"latent": torch.zeros(1, 2).double(), "decoder": decoder, "n_steps": 20}
    without = solve_continuous(net, lambda f: f(at), y, **options)
    found = solve_continuous(net, lambda f: f(at), y, **options, refine_steps=150, refine_lr=3e-2)
    torch.testing.assert_close(found.latent, without.latent)
    assert found.losses.shape == (170,)
    torch.testing.assert_close(found.coarse.flatten(), y.flatten(), rtol=0, atol=1e-3)
    assert not differ(decoder.state_dict().values(), state.values())
    assert (decoder.training, net.training, decoder[0].bias.requires_grad) == (True, True, False)


def test_a_failing_measurement_leaves_all_as_it_was():
    net, latent = plain().train(), rand(1, 1, 4, 4)

    def fail(f):
        assert not net.training
        raise KeyError("user")

    with pytest.raises(KeyError):
        solve_continuous(net, fail, rand(3), latent=latent)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    at = pixel_grid(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the objective is nan at step 1: lower lr"):
        solve_continuous(net, lambda f: f(at) * torch.nan, rand(1, 16, 1), latent=latent)


def test_it_runs_where_gradients_are_switched_off():
    at = pixel_grid(3, dtype=torch.float64)
    options = {"latent": torch.zeros(1, 1, 3, 3).double(), "n_steps": 5}
    expected = solve_continuous(plain(), lambda f: f(at), torch.ones(1, 9, 1), **options)
    for mode in (torch.no_grad, torch.inference_mode):
        net = plain()
        with mode():
            found = solve_continuous(net, lambda f: f(at), torch.ones(1, 9, 1), **options)
        torch.testing.assert_close(found, expected)


IMAGES, Y, Z = torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, 3), torch.zeros(2, 3, 4, 4)
NET, AT = FunkNN(3, hidden=[2], patch_size=1), pixel_grid(2)


def solve(measure=lambda f: f(AT), y=Y, net=NET, **options):
    return solve_continuous(net, measure, y, **({"latent": Z, "n_steps": 1} | options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: funknn_pairs(IMAGES[..., :15]), "images must have channels and at least 16 pixels a side, got shape"),
        (lambda: funknn_pairs(IMAGES.byte()), "images must be a floating-point tensor, got dtype torch.uint8: scale"),
        (lambda: funknn_pairs(IMAGES[0]), r"images must have shape \(any, any, any, any\)"),
        (lambda: funknn_pairs(IMAGES, mode="both"), "mode must be one of 'factor', 'continuous', 'single', got 'both'"),
        (lambda: funknn_pairs(IMAGES, factor=1), "factor must be an integer of at least 2, got 1"),
        (lambda: funknn_pairs(IMAGES, factor=8), "factor must be less than half the shorter side, 16, got 8"),
        (lambda: funknn_pairs(IMAGES, n_coords=0), "n_coords must be an integer of at least 1, got 0"),
        (lambda: upsample(NET, IMAGES, 0), "size must be an integer of at least 1, got 0"),
        (lambda: upsample(NET, IMAGES, (3, 0)), "size must be an integer of at least 1, got 0"),
        (lambda: upsample(NET, IMAGES, (3,)), r"size must be height and width or an integer, got \(3,\)"),
        (lambda: upsample(NET, IMAGES, None), "size must be height and width or an integer, got None"),
        (lambda: upsample(NET, IMAGES[:, :, :0], 4, recursive=True), r"image must have pixels, got shape \(2, "),
        (lambda: upsample(NET, IMAGES, 4, factor=1), "factor must be an integer of at least 2, got 1"),
        (lambda: upsample(NET, IMAGES, 4, chunk_size=0), "chunk_size must be an integer of at least 1, got 0"),
        (lambda: upsample(lambda x, at: at[:, :1], IMAGES, 4), r"net\(image, coords\) must have shape \(2, 16, any\)"),
        (lambda: solve(y=None), "y must be a floating-point tensor, got NoneType"),
        (lambda: solve(y=Y * torch.nan), "y must be finite"),
        (lambda: solve(y=Y[:1]), r"measure\(f\) must have shape \(1, 4, 3\) for y, got \(2, 4, 3\)"),
        (lambda: solve(lambda f: None), r"measure\(f\) must be a floating-point tensor, got NoneType"),
        (lambda: solve(lambda f: Y), r"measure\(f\) must depend on f"),
        (lambda: solve(latent=Z[0]), r"latent must have shape .* for an image, without decoder, got \(3, 4, 4\)"),
        (lambda: solve(latent=Z.bfloat16()), "latent must be float32 or float64, got torch.bfloat16"),
        (lambda: solve(latent=Z * torch.inf), "latent must be finite"),
        (lambda: solve(decoder=lambda z: z[0]), r"decoder\(latent\) must have shape"),
        (lambda: solve(tv=1.0), "coords or size must be given with tv, got neither"),
        (lambda: solve(tv=-1.0), "tv must be at least 0, got -1.0"),
        (lambda: solve(size=0), "size must be an integer of at least 1, got 0"),
        (lambda: solve(coords=AT[0]), r"coords must have shape \(any, any, 2\)"),
        (lambda: solve(n_steps=-1), "n_steps must be an integer of at least 0, got -1"),
        (lambda: solve(lr=0.0), "lr must be greater than 0, got 0.0"),
        (lambda: solve(prior_weight=-1.0), "prior_weight must be at least 0, got -1.0"),
        (lambda: solve(refine_steps=1), "decoder must be a module for refine_steps, got NoneType"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
