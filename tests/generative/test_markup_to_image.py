"""Scheduled sampling: a network that knows the image, ordinary training at m = 0, and diffusers step by step."""

import math
from functools import cache

import pytest
import torch
from torch import nn

from posterity.generative import ScheduledSamplingDiffusion, sampling_weights
from posterity.testing import check_generative

F64 = torch.float64
SHAPE = (1, 2, 3)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def process(n_steps=50, **options):
    scale = 1000 / n_steps
    return ScheduledSamplingDiffusion(
        options.pop("shape", SHAPE),
        n_steps=n_steps,
        beta_start=1e-4 * scale,
        beta_end=0.02 * scale,
        **options,
    )


@cache
def abar(n_steps=50):
    """Return the products of 1 - beta, in float64 by a loop."""
    left, found = 1.0, []
    for k in range(n_steps):
        beta = 0.1 / n_steps + (20 - 0.1) / n_steps * k / (n_steps - 1)
        left *= 1 - beta
        found.append(left)
    return torch.tensor(found, dtype=F64)


def pictures(n=5, seed=0):
    return 2 * torch.rand(n, *SHAPE, dtype=F64, generator=rng(seed)) - 1


class Oracle:
    """The noise that explains a state by the true image, up to a constant; it counts its calls."""

    def __init__(self, x, delta=0.0, n_steps=50):
        self.x, self.delta, self.n_steps, self.calls = x, delta, n_steps, []

    def __call__(self, y, t):
        k = (self.n_steps * (1 - t) - 1).round().long()
        self.calls.append((k, torch.is_grad_enabled()))
        left = abar(self.n_steps)[k].reshape(-1, 1, 1, 1)
        return (y - left.sqrt() * self.x) / (1 - left).sqrt() + self.delta


class Gaussian(nn.Module):
    """The exact network for independent normal data, as a function of the last dimension."""

    def __init__(self, mean, std, n_steps):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean), std
        self.left = abar(n_steps).float()

    def forward(self, y, t):
        k = (len(self.left) * (1 - t.float()) - 1).round().long()
        left = self.left.to(y.device)[k][:, None]
        var = left * self.std.to(y.device) ** 2 + 1 - left
        return ((1 - left).sqrt() / var * (y - left.sqrt() * self.mean)).to(y.dtype)


def test_conforms_to_its_kind(as_a_user):
    mean, std = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 1.0, 0.2])
    data = mean + std * torch.randn(300, 3, generator=rng())
    check_generative(
        process(100, shape=3, clip=None), Gaussian(mean, std, 100), data, mean=mean, std=std, n=2000, atol=0.1
    )


def test_the_share_of_the_data_is_the_product_of_what_each_step_leaves():
    grid = torch.arange(50)
    torch.testing.assert_close(process().alpha_bar(grid).double(), abar(), rtol=1e-6, atol=0)
    x, noise = pictures(), torch.randn(5, *SHAPE, dtype=F64, generator=rng(1))
    k = torch.tensor([0, 7, 20, 48, 49])
    left = abar()[k].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        process().add_noise(x, k, noise=noise),
        left.sqrt() * x + (1 - left).sqrt() * noise,
        rtol=1e-10,
        atol=1e-10,
    )
    drawn = process().add_noise(torch.zeros(4000, *SHAPE, dtype=F64), torch.full((4000,), 7), generator=rng())
    assert abs(drawn.var() / (1 - abar()[7]) - 1) < 0.05


@pytest.mark.parametrize("rollback", ["renoise", "posterior"])
@pytest.mark.parametrize("m", [0, 1, 4, 49])
def test_an_oracle_has_no_loss_and_a_constant_error_its_square(rollback, m):
    x, diffusion = pictures(20), process(rollback=rollback)
    assert diffusion.loss(Oracle(x), x, m=m, generator=rng()) < 1e-12
    each = diffusion.loss(Oracle(x, 0.3), x, m=m, generator=rng(), reduction="none")
    torch.testing.assert_close(each, torch.full((20,), 0.09, dtype=F64), rtol=0, atol=1e-9)


def test_renoising_keeps_the_error_of_the_image_and_draws_the_noise_anew():
    n, delta, k = 30_000, 0.5, 20
    x = torch.tensor([[[[0.3, -0.7]]]], dtype=F64).expand(n, 1, 1, 2)
    diffusion, left = process(shape=(1, 1, 2)), abar()
    start = diffusion.add_noise(x, torch.full((n,), k + 1), generator=rng())
    y = diffusion.roll_back(Oracle(x, delta), start, torch.full((n,), k), 1, generator=rng(1))
    mean = left[k].sqrt() * (x[0] - delta * ((1 - left[k + 1]) / left[k + 1]).sqrt())
    torch.testing.assert_close(y.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(y.var(0), (1 - left[k]).expand(1, 1, 2), rtol=0.05, atol=0)


def test_a_step_of_the_posterior_keeps_the_law_of_the_noise():
    """With the true image a state at k + m that is Q(. | x) comes down to one at k that is Q(. | x)."""
    n, x = 30_000, torch.tensor([[[[0.3, -0.7]]]], dtype=F64)
    diffusion, left, k = process(shape=(1, 1, 2), rollback="posterior"), abar(), 11
    start = diffusion.add_noise(x.expand(n, 1, 1, 2), torch.full((n,), k + 6), generator=rng())
    y = diffusion.roll_back(Oracle(x), start, torch.full((n,), k), 6, generator=rng(1))
    torch.testing.assert_close(y.mean(0), left[k].sqrt() * x[0], rtol=0, atol=0.02)
    torch.testing.assert_close(y.var(0), (1 - left[k]).expand(1, 1, 2), rtol=0.05, atol=0)


def no_network(y, t):
    raise AssertionError("it is not called")


def test_rolling_back_without_steps_changes_nothing():
    y, k = torch.randn(5, *SHAPE, dtype=F64, generator=rng()), torch.tensor([0, 1, 5, 48, 49])
    for m in (0, torch.zeros(5).long()):
        assert torch.equal(process().roll_back(no_network, y, k, m), y)


def test_images_take_steps_of_their_own_number():
    """Each image comes where it would come by itself, with the noise that is drawn for the batch."""
    x, diffusion = pictures(), process()
    y, k, m = pictures(seed=1), torch.tensor([0, 3, 10, 40, 49]), torch.tensor([4, 3, 1, 2, 0])
    oracle = Oracle(x, 0.2)
    got = diffusion.roll_back(oracle, y, k, m, generator=rng())
    visited = [k for k, _ in oracle.calls]
    assert len(visited) == 4
    for row in range(5):
        assert [int(v[row]) for v in visited[: m[row]]] == list(range(int(k[row] + m[row]), int(k[row]), -1))
        draws, state = rng(), y
        for step in range(int(m[row])):
            left = abar()[k[row] + m[row] - step]
            here = torch.full((5,), 1 - (int(k[row] + m[row]) - step + 1) / 50)
            clean = (state - (1 - left).sqrt() * Oracle(x, 0.2)(state, here)) / left.sqrt()
            lower = abar()[k[row] + m[row] - step - 1]
            state = lower.sqrt() * clean + (1 - lower).sqrt() * torch.randn(
                5, *SHAPE, dtype=F64, generator=draws
            )
        torch.testing.assert_close(got[row], state[row], rtol=0, atol=1e-9)


def test_without_steps_the_loss_is_that_of_ordinary_training():
    x, net = pictures(8), nn.Linear(3, 3).double()
    draws = rng(3)
    k = torch.randint(50, (8,), generator=draws)
    noise = torch.randn(x.shape, dtype=F64, generator=draws)
    left = abar()[k].reshape(-1, 1, 1, 1)
    plain = (net(left.sqrt() * x + (1 - left).sqrt() * noise) - noise).square()
    for options in ({}, {"m": 0}, {"weights": [1.0, 0.0]}):
        got = process().loss(lambda y, t: net(y), x, generator=rng(3), **options)
        torch.testing.assert_close(got, plain.mean(), rtol=1e-9, atol=0)
    total = process().loss(lambda y, t: net(y), x, generator=rng(3), reduction="sum")
    torch.testing.assert_close(total, plain.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("m", [0, 1, 3])
def test_the_network_is_called_m_and_once_more_and_the_last_call_alone_has_a_gradient(m):
    x, oracle, k = pictures(), Oracle(pictures()), torch.tensor([0, 10, 46, 48, 49])
    process().loss(oracle, x, m=m, k=k, generator=rng())
    assert [grad for _, grad in oracle.calls] == [False] * m + [True]
    assert torch.equal(
        oracle.calls[0][0], (k + m).clamp_max(49)
    )  # shortened for the image, not for the batch
    assert torch.equal(oracle.calls[-1][0], k)

    scale, seen = torch.tensor(0.7, dtype=F64, requires_grad=True), []

    def net(y, t):
        seen.append(y.detach())
        return scale * y

    loss = process().loss(net, x, m=m, k=k, generator=rng())
    (slope,) = torch.autograd.grad(loss, scale)
    y, left = seen[-1], abar()[k].reshape(-1, 1, 1, 1)
    noise = (y - left.sqrt() * x) / (1 - left).sqrt()
    torch.testing.assert_close(slope, 2 * ((0.7 * y - noise) * y).mean(), rtol=1e-8, atol=0)


def test_m_is_drawn_for_the_batch_with_its_weights():
    x, counts = pictures(1), torch.zeros(3)
    for seed in range(300):
        oracle = Oracle(x)
        process().loss(oracle, x, weights=[0.5, 0.2, 0.3], k=torch.tensor([5]), generator=rng(seed))
        counts[len(oracle.calls) - 1] += 1
    assert (counts / 300 - torch.tensor([0.5, 0.2, 0.3])).abs().max() < 4 * math.sqrt(0.25 / 300)


def test_weights_rise_along_a_line_and_sum_to_one():
    assert sampling_weights(0, 10) == [1.0, 0.0]
    assert sampling_weights(10, 10) == pytest.approx([0.2, 0.8])
    assert sampling_weights(5, 10, (0.0, 0.4), (0.2, 0.6)) == pytest.approx([0.4, 0.1, 0.5])
    assert sum(sampling_weights(3, 7, (0.1, 0.2, 0.7), (0.3, 0.3, 0.4))) == pytest.approx(1)


@pytest.mark.parametrize("n_steps", [None, 10, 1])
def test_a_sampler_that_knows_the_image_ends_at_it(n_steps):
    x = pictures()
    made, clean = process().sample(
        Oracle(x), x0=pictures(seed=1), n_steps=n_steps, return_clean=True, generator=rng()
    )
    torch.testing.assert_close(made, x, rtol=0, atol=1e-9)
    assert len(clean) == (n_steps or 50)
    for image in clean:
        torch.testing.assert_close(image, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("few", [50, 7])
def test_steps_are_those_of_diffusers(few):
    """Any network, given the same noise; on a part of the grid its scheduler takes the steps as they are named."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        50,
        beta_start=2e-3,
        beta_end=0.4,
        variance_type="fixed_small",
        clip_sample=True,
        clip_sample_range=1.0,
    )
    grid = torch.linspace(49, 0, few).round().long().tolist()
    theirs.set_timesteps(timesteps=grid)
    calls = []

    def net(y, t):
        calls.append(int((50 * (1 - t[0]) - 1).round()))
        return 0.8 * y.sin() + 0.1 * t.reshape(-1, 1, 1, 1)

    x0 = torch.randn(4, *SHAPE, generator=rng(1))
    made, clean = process().sample(net, x0=x0, n_steps=few, return_clean=True, generator=rng())
    assert calls == grid
    y, draws = x0, rng()
    for step, k in enumerate(grid):
        out = theirs.step(net(y, torch.full((4,), 1 - (k + 1) / 50)), k, y, generator=draws)
        torch.testing.assert_close(clean[step], out.pred_original_sample, rtol=0, atol=1e-4)
        y = out.prev_sample
    torch.testing.assert_close(made, y, rtol=0, atol=1e-4)


def test_images_leave_the_range_only_where_they_are_not_clipped():
    def far(y, t):
        return -3 + 0 * y

    assert process().sample(far, 3, generator=rng()).abs().max() <= 1
    assert process(clip=None).sample(far, 3, generator=rng()).abs().max() > 1


def test_markup_reaches_the_network_and_a_unet_of_diffusers_has_its_own_clock():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.clocks = []

        def forward(self, sample, timestep, tokens):
            self.clocks.append(timestep)
            return tokens[:, None, None, None] * sample

    cond = {"tokens": torch.tensor([1.0, 0.0, 2.0])}
    net = UNet()
    diffusion = ScheduledSamplingDiffusion(SHAPE)
    diffusion.loss(net, pictures(3).float(), m=1, k=torch.tensor([0, 499, 998]), cond=cond, generator=rng())
    torch.testing.assert_close(net.clocks[0], torch.tensor([1.0, 500.0, 999.0]), rtol=0, atol=1e-3)


def test_global_randomness_and_mode_are_left_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.Dropout(0.0)).train()
    net[2].eval()
    before = torch.get_rng_state()
    process().loss(lambda y, t: net(y).view_as(y), pictures().float(), m=2, generator=rng())
    process().sample(lambda y, t: net(y).view_as(y), 2, n_steps=3, generator=rng())
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in net] == [True, True, False]


def test_an_empty_batch_and_inference_mode_work():
    assert process().sample(lambda y, t: y, x0=torch.zeros(0, *SHAPE), n_steps=3).shape == (0, *SHAPE)
    assert process().loss(lambda y, t: y, torch.zeros(0, *SHAPE), m=2, reduction="none").shape == (0,)
    diffusion, net = process(), nn.Linear(3, 3)
    with torch.inference_mode():
        diffusion.sample(lambda y, t: net(y), 2, n_steps=3)
    diffusion.loss(lambda y, t: net(y), pictures().float(), m=1).backward()
    assert net.weight.grad is not None


D, X = process(), torch.zeros(2, *SHAPE)


def zero(y, t, **cond):
    return torch.zeros_like(y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScheduledSamplingDiffusion(()), "shape must have at least one dimension"),
        (lambda: ScheduledSamplingDiffusion((3, 0)), "shape must be an integer of at least 1, got 0"),
        (lambda: ScheduledSamplingDiffusion(3, n_steps=0), "n_steps must be an integer of at least 1, got 0"),
        (lambda: ScheduledSamplingDiffusion(3, n_steps=10**9), "n_steps must be at most 100000"),
        (lambda: ScheduledSamplingDiffusion(3, n_steps=50_000), "leave nothing of the data: multiply both by 1000"),
        (lambda: ScheduledSamplingDiffusion(3, beta_start=0.0), r"beta_start must be in \(0, 1\), got 0.0"),
        (lambda: ScheduledSamplingDiffusion(3, beta_end=1.0), r"beta_end must be in \(0, 1\), got 1.0"),
        (lambda: ScheduledSamplingDiffusion(3, clip=(1, -1)), r"clip must be two numbers, the lower first, got \(1, -1\)"),
        (lambda: ScheduledSamplingDiffusion(3, clip=1.0), "clip must be a sequence of numbers, got 1.0"),
        (lambda: ScheduledSamplingDiffusion(3, rollback="both"), "rollback must be one of 'renoise', 'posterior', got 'both'"),
        (lambda: D.loss(zero, X[:, 0]), r"x must have shape \(any, 1, 2, 3\) for shape, got \(2, 2, 3\)"),
        (lambda: D.loss(zero, X.byte()), r"got dtype torch.uint8: scale to \[-1, 1\]"),
        (lambda: D.loss(zero, None), "x must be a floating-point tensor, got NoneType"),
        (lambda: D.loss(zero, X, m=-1), "m must be an integer of at least 0, got -1"),
        (lambda: D.loss(zero, X, m=50), "m must be less than the 50 steps, got 50"),
        (lambda: D.loss(zero, X, m=1, weights=[1.0]), "m and weights exclude each other"),
        (lambda: D.loss(zero, X, weights=[0.5, -0.1, 0.6]), "weights must be at least 0, got -0.1"),
        (lambda: D.loss(zero, X, weights=[0.9, 0.9]), r"weights must sum to 1, .* got \[0.9, 0.9\]"),
        (lambda: D.loss(zero, X, weights=[0.0] * 50 + [1.0]), "the largest m of weights must be less than the 50 steps"),
        (lambda: D.loss(zero, X, k=torch.tensor([0, 50])), r"k must be in 0..49, got values from 0 to 50"),
        (lambda: D.loss(zero, X, k=torch.tensor([0.0, 1.0])), "k must be a tensor of integers, got dtype torch.float32"),
        (lambda: D.loss(zero, X, k=torch.tensor([0])), r"k must have shape \(2\) for one step a sample, got \(1,\)"),
        (lambda: D.loss(zero, X, reduction="max"), "reduction must be one of"),
        (lambda: D.loss(zero, X, m=1, cond={"tokens": torch.zeros(3, 4)}), r"cond\['tokens'\] must have first dimension 2"),
        (lambda: D.loss(lambda y, t: y[:1], X), r"net\(x, t\) must have shape \(2, 1, 2, 3\) for x, got \(1, 1, 2, 3\)"),
        (lambda: D.roll_back(zero, X, torch.tensor([0, 49]), 1), r"k \+ m must be in 0..49, got values from 1 to 50"),
        (lambda: D.roll_back(zero, X, torch.tensor([0, 4]), torch.tensor([1, -1])), r"m must be in 0..49, got values from -1"),
        (lambda: D.roll_back(zero, X, torch.tensor([0, 4]), 0.5), "m must be an integer of at least 0, got 0.5"),
        (lambda: D.add_noise(X, torch.tensor([0, 4]), noise=X[:1]), r"noise must have shape \(2, 1, 2, 3\)"),
        (lambda: D.alpha_bar(torch.tensor([-1])), "k must be in 0..49, got values from -1"),
        (lambda: D.sample(zero), "exactly one of n and x0 must be given, got neither"),
        (lambda: D.sample(zero, 2, x0=X), "exactly one of n and x0 must be given, got both"),
        (lambda: D.sample(zero, 2, n_steps=51), "n_steps must be at most the 50 of the process, got 51"),
        (lambda: D.sample(zero, 2, cond={"mask": torch.ones(1, 4)}), r"cond\['mask'\] must have first dimension 2"),
        (lambda: sampling_weights(11, 10), "step must be in 0..10, which is total, got 11"),
        (lambda: sampling_weights(0, 0), "total must be an integer of at least 1, got 0"),
        (lambda: sampling_weights(1, 10, (0.0,), (0.5, 0.5)), "start and end must be of one length, got 1 and 2"),
        (lambda: sampling_weights(1, 10, (-0.1,)), r"start must be in \[0, 1\], got -0.1"),
        (lambda: sampling_weights(1, 10, (0.0, 0.0), (0.8, 0.8)), r"end must sum to at most 1, got \(0.8, 0.8\)"),
        (lambda: sampling_weights(1, 10, 0.0), "start must be a sequence of numbers, got 0.0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
