"""The ascent against its plain loop and on known densities, and what is enlarged and drawn by it."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.generative import LocalCNN, MultiscaleDenoiser, ascend
from posterity.testing import check_generative


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=rng(seed))


def small(channels=1):
    """A cascade of two levels that takes a millisecond."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiscaleDenoiser.build(2, channels=channels, receptive_field=5, low_receptive_field=7, n_layers=4, width=6,
                                        predict="clean", norm=False)  # fmt: skip


def by_loop(net, y, h0, beta, sigma_end, fixed_step, generator):
    """Equation 1 for one image, number by number."""
    steps, t = [], 0
    while True:
        t += 1
        h = h0 if fixed_step else h0 * t / (1 + h0 * (t - 1))
        f = net(y)
        sigma = math.sqrt(sum(float(v) ** 2 for v in f.flatten()) / f.numel())
        gamma = sigma * math.sqrt(max((1 - beta * h) ** 2 - (1 - h) ** 2, 0))
        fresh = torch.randn(y.shape, dtype=y.dtype, generator=generator) if beta < 1 else 0
        y = y - h * f + gamma * fresh
        steps.append(sigma)
        if np.std(y.numpy(), ddof=1) / sigma >= 1 / sigma_end:
            return y - net(y), steps


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("fixed_step", [False, True])
def test_ascent_is_its_plain_loop(beta, fixed_step):
    image = normal(1, 2, 3, 3, seed=5)

    def net(y):
        return torch.tanh(y - image)

    y0, options = 0.8 * normal(1, 2, 3, 3), {"h0": 0.1, "beta": beta, "sigma_end": 0.05}
    found = ascend(net, y0, **options, fixed_step=fixed_step, generator=rng(3))
    sample, sigmas = by_loop(net, y0, **options, fixed_step=fixed_step, generator=rng(3))
    torch.testing.assert_close(found.sample, sample, rtol=0, atol=1e-10)
    assert found.n_steps.tolist() == [len(sigmas)]
    np.testing.assert_allclose(found.sigmas[0], sigmas, atol=1e-10)


def test_without_noise_the_ascent_goes_to_the_only_image():
    image = normal(1, 1, 4, 4)
    found = ascend(lambda y: y - image, normal(3, 1, 4, 4, seed=1), h0=0.2, beta=1.0, sigma_end=1e-6)
    torch.testing.assert_close(found.sample, image.expand(3, -1, -1, -1), rtol=0, atol=1e-12)


def test_a_batch_is_its_images_one_by_one():
    image, cond = normal(1, 1, 4, 4), normal(5, 1, 4, 4, seed=2)

    def net(v):
        return torch.tanh(v[:, 1:] - image * v[:, :1])

    y0 = normal(5, 1, 4, 4, seed=1) * torch.tensor([0.1, 0.5, 1.0, 0.3, 0.7]).double().view(5, 1, 1, 1)
    together = ascend(net, y0, cond=cond, h0=0.1, beta=1.0)
    assert len(together.n_steps.unique()) > 1
    for i in range(5):
        alone = ascend(net, y0[i : i + 1], cond=cond[i : i + 1], h0=0.1, beta=1.0)
        torch.testing.assert_close(together.sample[i], alone.sample[0], rtol=0, atol=1e-12)
        assert together.n_steps[i] == alone.n_steps[0] == len(together.sigmas[i])


def test_with_the_true_noise_level_samples_of_a_white_prior_have_its_variance():
    """The residual is y sigma^2 / (sigma^2 + s^2), and the variance of y is followed in closed form."""
    s, h, beta = 0.4, 0.1, 0.5
    now = [1.0 + s**2]

    def net(y):
        v = now[0]
        gain = (v - s**2) / v
        extra = gain**2 * v * ((1 - beta * h) ** 2 - (1 - h) ** 2)
        now[0] = (1 - h * gain) ** 2 * v + extra
        return gain * y

    y0 = math.sqrt(now[0]) * normal(50, 1, 8, 8)
    found = ascend(net, y0, h0=h, beta=beta, fixed_step=True, generator=rng(1))
    assert abs(float(found.sample.var()) / s**2 - 1) < 0.1


class OnALine(nn.Module):
    """The exact blind denoiser of images mean + u a, u standard normal: what is off the line tells the noise."""

    def __init__(self, mean, a):
        super().__init__()
        self.mean, self.a = nn.Parameter(mean.clone()), a

    def forward(self, y):
        a = self.a.to(y)
        off = (y - self.mean).flatten(1)
        u = off @ a.flatten() / a.square().sum()
        noise = (off - u[:, None] * a.flatten()).square().sum(1) / (a.numel() - 1)
        u = u * a.square().sum() / (a.square().sum() + noise)
        return y - self.mean - u.view(-1, *[1] * (y.ndim - 1)) * a


class Plain:
    """A cascade without details, as the conformance check calls a process."""

    def loss(self, net, x, generator):
        return MultiscaleDenoiser(net, [], rescale=False).loss(x, "low", generator=generator)

    def sample(self, net, n, generator):
        model = MultiscaleDenoiser(net, [], rescale=False)
        return model.sample(
            n, (8, 8), h0=0.3, beta_low=0.2, sigma_start=0.5, sigma_end_low=0.1, generator=generator
        )


def test_conforms_to_its_kind(as_a_user):
    mean, a = torch.linspace(-0.5, 0.5, 64).view(1, 8, 8), 0.0625 * torch.ones(1, 8, 8)
    target = mean + a * torch.randn(50, 1, 1, 1, generator=rng(1))
    check_generative(Plain(), OnALine(mean, a), target, mean=mean, std=a, n=400, atol=0.012)


@pytest.mark.parametrize("channels", [1, 3])
def test_block_means_of_enlarged_images_are_the_images(channels):
    model = small(channels)
    low = normal(2, channels, 3, 5).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for levels in (1, 2, None):
            large = model.super_resolve(low, levels=levels, max_steps=5, generator=rng())
            times = 2 ** (levels or 2)
            assert large.shape == (2, channels, 3 * times, 5 * times)
            torch.testing.assert_close(F.avg_pool2d(large, times), low, rtol=0, atol=2e-6)
            assert not large.requires_grad


def test_details_start_from_the_same_noise_in_units_of_the_image():
    seen = []

    def net(v):
        seen.append(v[:, 1:])
        return v[:, 1:]

    model = MultiscaleDenoiser(torch.zeros_like, [net, net])
    with pytest.warns(RuntimeWarning, match="2 of 2 samples are unfinished after max_steps=1"):
        model.super_resolve(torch.zeros(2, 1, 64, 64), sigma_start=0.8, max_steps=1, generator=rng())
    assert abs(float(seen[0].std()) - 0.2) < 0.005
    assert abs(float(seen[2].std()) - 0.4) < 0.005


def test_sample_is_reproducible_from_its_generator_and_touches_no_other():
    model = small()
    state = torch.random.get_rng_state()
    options = {"h0": 0.2, "beta": 0.5, "beta_low": 0.5, "max_steps": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        first, again, other = (model.sample(3, (8, 16), **options, generator=rng(k)) for k in (0, 0, 1))
    assert first.shape == (3, 1, 8, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_interrupted_ascent_leaves_the_network_as_it_was():
    net = LocalCNN(1, 1, receptive_field=5, n_layers=3, width=2)
    net.norms.eval()
    modes = [module.training for module in net.modules()]

    def interrupt(*_):
        raise KeyboardInterrupt

    net.convs[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ascend(net, normal(2, 1, 4, 4).float())
    assert modes == [module.training for module in net.modules()]


@pytest.mark.parametrize("field", [lambda y: -y, lambda y: y * torch.nan], ids=["grows", "NaN"])
def test_divergence_is_an_error(field):
    with pytest.raises(RuntimeError, match="the ascent diverges at step"):
        ascend(field, normal(2, 1, 4, 4), h0=0.5, generator=rng())


def test_no_images_and_the_end_of_steps():
    found = ascend(lambda y: y, torch.zeros(0, 1, 4, 4))
    assert found.sample.shape == (0, 1, 4, 4)
    assert not found.sigmas
    with pytest.warns(RuntimeWarning, match="3 of 3 samples are unfinished after max_steps=4"):
        found = ascend(lambda y: 0.5 * y, normal(3, 1, 4, 4), max_steps=4)
    assert found.n_steps.tolist() == [4, 4, 4]
