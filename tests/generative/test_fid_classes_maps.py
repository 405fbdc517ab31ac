"""Maps of what FID looks at, against differences of the distance, and what they leave of the network."""

import pytest
import torch
from torch import nn

from posterity.generative import FeatureStats, add_to_stats, feature_stats, frechet_distance, sensitivity_map


def draw(n, d=4, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


class Small(nn.Module):
    """A convolution whose output is changed in place, and features of it."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 2)
        self.act, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.drop(self.act(self.conv(self.first(x))).flatten(1)))


@pytest.fixture
def small():
    generator = torch.Generator().manual_seed(1)
    net = Small().double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    return net, images, feature_stats(draw(20, 2)), feature_stats(draw(20, 2, seed=1, shift=1.0))


def test_a_map_is_activations_by_the_squared_differences_of_the_distance(small):
    net, images, real, generated = small
    got = sensitivity_map(net, net.conv, images, real, generated, size=(2, 2))
    net.eval()
    for image, ours in zip(images, got, strict=True):
        with torch.no_grad():
            activation = net.conv(net.first(image[None]))

            def distance(activation):
                features = net.head(activation.clamp_min(0).flatten(1))
                return float(frechet_distance(real, add_to_stats(generated, features)))

            slope = torch.zeros(12).double()
            for k in range(12):
                bump = torch.zeros(12).double()
                bump[k] = 1e-5
                ends = [distance(activation + sign * bump.view_as(activation)) for sign in (1, -1)]
                slope[k] = (ends[0] - ends[1]) / 2e-5
            weight = slope.view(3, 4).square().mean(1)
            expected = (weight[:, None, None] * activation[0]).sum(0)
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_map_leaves_the_network_as_it_was_also_after_an_error(small):
    net, images, real, generated = small
    net.first.weight.requires_grad_(False)
    net.drop.eval()
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    with torch.inference_mode():
        found = sensitivity_map(net, net.conv, images.clone(), real, generated)
    assert found.shape == (2, 4, 4) and float(found.amin()) == 0 and float(found.amax()) == 1
    torch.testing.assert_close(found[1:], sensitivity_map(net, net.conv, images[1:], real, generated))
    with pytest.raises(ValueError, match="extractor must return"):
        sensitivity_map(net, net.conv, images, feature_stats(draw(5, 3)), feature_stats(draw(5, 3)))
    with pytest.raises(RuntimeError):
        sensitivity_map(net, net.conv, images.repeat(1, 2, 1, 1), real, generated)
    assert flags == [p.requires_grad for p in net.parameters()]
    assert modes == [m.training for m in net.modules()]
    assert not net.conv._forward_hooks
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_map_in_low_precision_is_that_of_float64_up_to_rounding(as_a_user, small, dtype):
    net, images, real, generated = small
    many = FeatureStats(generated.mean, generated.cov, 1e8)  # each image changes the distance by little
    exact = sensitivity_map(net, net.conv, images, real, many)
    got = sensitivity_map(net.to(dtype), net.conv, images.to(dtype), real, many)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() < 30 * torch.finfo(dtype).eps


def test_a_layer_that_the_features_do_not_need_is_refused(small):
    net, images, real, generated = small
    net.forward = lambda x: net.head(net.conv(net.first(x)).detach().flatten(1)).detach()
    with pytest.raises(ValueError, match="must depend, differentiably, on what layer gives"):
        sensitivity_map(net, net.conv, images, real, generated)
