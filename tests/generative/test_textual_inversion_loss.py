"""The frozen model's loss against its formula by hand, its sampler against the exact solution of a Gaussian."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity._checks import needs
from posterity.generative import DiffusionLoss, TextualInversion, TinyTextToImage, shapes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny():
    return TinyTextToImage.pretrained()


@pytest.fixture(scope="module")
def images():
    return shapes(4, generator=seeded())[0]


class Echo(nn.Module):
    """Says the mean of what it is told times what it is shown."""

    def __init__(self, config=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.config = config or SimpleNamespace(in_channels=3, sample_size=4)

    def forward(self, x, t, encoder_hidden_states):
        return SimpleNamespace(
            sample=self.scale * encoder_hidden_states.mean((1, 2))[:, None, None, None] * x
        )


class Decoder(nn.Module):
    """An autoencoder whose latents are twice the image plus 1, with a little noise."""

    config = SimpleNamespace(in_channels=3, block_out_channels=(1,))

    def encode(self, x):
        def sample(generator=None):
            return 2 * x + 1 + 0.1 * torch.randn(x.shape, generator=generator)

        return SimpleNamespace(latent_dist=SimpleNamespace(sample=sample))

    def decode(self, z):
        return SimpleNamespace(sample=(z - 1) / 2)


def schedule(**options):
    return needs("diffusers", "generative").DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", **options)


def test_loss_is_the_mean_squared_error_of_the_noise(tiny, images):
    t = torch.tensor([0, 30, 500, 999])
    noise, context = (
        torch.randn(images.shape, generator=seeded(1)),
        torch.randn(4, 32, 64, generator=seeded(2)),
    )
    scheduler = tiny.scheduler
    with torch.no_grad():
        said = tiny.unet(
            scheduler.add_noise(2 * images - 1, noise, t), t, encoder_hidden_states=context
        ).sample
        ours = DiffusionLoss(tiny.unet, scheduler, prediction="epsilon")(images, context, t=t, noise=noise)
    torch.testing.assert_close(ours, F.mse_loss(said, noise))


def test_velocities_follow_their_formula():
    scheduler = schedule(prediction_type="v_prediction")
    images, noise = torch.rand(2, 3, 4, 4, generator=seeded()), torch.randn(2, 3, 4, 4, generator=seeded(1))
    t, context = torch.tensor([100, 800]), torch.full((2, 1, 1), 0.3)
    half = torch.pi / 2
    angle = ((torch.tensor([0, *(t + 1)]) / 1000 + 0.008) / 1.008 * half).cos().square()
    a = (angle[1:] / angle[0]).view(2, 1, 1, 1)  # the cosine schedule, in closed form
    x = 2 * images - 1
    velocity = a.sqrt() * noise - (1 - a).sqrt() * x
    said = 0.3 * (a.sqrt() * x + (1 - a).sqrt() * noise)
    ours = DiffusionLoss(Echo(), scheduler)(images, context, t=t, noise=noise)
    torch.testing.assert_close(ours, F.mse_loss(said, velocity), rtol=1e-4, atol=0)


def test_an_autoencoder_samples_its_latents_and_scales_them():
    images, noise = torch.rand(2, 3, 4, 4, generator=seeded()), torch.randn(2, 3, 4, 4, generator=seeded(1))
    t, context = torch.tensor([10, 700]), torch.full((2, 1, 1), 0.3)
    z = 0.5 * (2 * (2 * images - 1) + 1 + 0.1 * torch.randn(images.shape, generator=seeded(2)))
    by_hand = F.mse_loss(0.3 * schedule().add_noise(z, noise, t), noise)
    ours = DiffusionLoss(Echo(), schedule(), Decoder(), scaling_factor=0.5)(
        images, context, t=t, noise=noise, generator=seeded(2)
    )
    torch.testing.assert_close(ours, by_hand)


def test_steps_are_uniform_over_all_of_training():
    seen = []

    class Watching(Echo):
        def forward(self, x, t, encoder_hidden_states):
            seen.append(t)
            return super().forward(x, t, encoder_hidden_states)

    DiffusionLoss(Watching(), schedule())(
        torch.rand(8000, 3, 4, 4), torch.zeros(8000, 1, 1), generator=seeded()
    )
    counts = torch.histc(seen[0].float(), bins=10, min=0, max=1000)
    assert (
        ((counts - 800).abs() < 4 * (800 * 0.9) ** 0.5).all() and seen[0].max() > 990 and seen[0].min() < 10
    )


def test_gradient_reaches_what_the_network_is_told_and_nothing_else(images):
    net = Echo()
    context = torch.ones(4, 2, 2, requires_grad=True)
    loss = DiffusionLoss(net, schedule())(images, context, generator=seeded())
    loss.backward()
    assert context.grad.abs().min() > 0 and net.scale.grad is None and net.scale.requires_grad


def exact(mean, deviation):
    """Return a network that knows the noise in a Gaussian, told its mean."""
    abar = schedule().alphas_cumprod

    class Exact(Echo):
        def forward(self, x, t, encoder_hidden_states):
            a = abar[t].view(-1, 1, 1, 1)
            m = encoder_hidden_states.mean((1, 2))[:, None, None, None] * mean
            noise = (x - a.sqrt() * m) * (1 - a).sqrt() / (a * deviation**2 + 1 - a)
            return SimpleNamespace(sample=self.scale * noise)

    return Exact(SimpleNamespace(in_channels=3, sample_size=8))


def test_samples_have_the_law_of_an_exact_network_without_guidance():
    denoise = DiffusionLoss(exact(0.4, 0.1), schedule(clip_sample=False))
    told = torch.tensor([1.0, -1.0]).repeat_interleave(50).view(100, 1, 1)
    made = denoise.sample(told, torch.zeros(1, 1, 1), n_steps=100, guidance_scale=1.0, generator=seeded())
    for part, centre in ((made[:50], 0.7), (made[50:], 0.3)):  # images are (x + 1) / 2
        assert float(part.mean()) == pytest.approx(centre, abs=2e-3)
        assert float(part.std()) == pytest.approx(0.05, rel=0.1)


def test_guidance_goes_on_along_the_line_from_the_negative_context():
    """Noise that is linear in the mean is guided to the mean m_u + s (m_c - m_u)."""
    denoise = DiffusionLoss(exact(0.2, 0.1), schedule(clip_sample=False))
    negative, told = torch.full((1, 1, 1), 0.5), torch.ones(3, 1, 1)
    guided = denoise.sample(told, negative, n_steps=20, guidance_scale=3.0, generator=seeded())
    direct = denoise.sample(told * 2.0, negative, n_steps=20, guidance_scale=1.0, generator=seeded())
    torch.testing.assert_close(guided, direct, rtol=0, atol=1e-5)


def test_sampling_is_decided_by_its_generator_and_leaves_the_scheduler_alone(tiny):
    denoise = DiffusionLoss(tiny.unet, tiny.scheduler)
    told, nothing = torch.randn(2, 32, 64, generator=seeded()), torch.zeros(1, 32, 64)
    before, rng = copy.deepcopy(tiny.scheduler.__dict__), torch.random.get_rng_state()
    first, again, other = (
        denoise.sample(told, nothing, n_steps=2, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (2, 3, 16, 16) and first.min() >= 0 and first.max() <= 1
    assert tiny.scheduler.__dict__.keys() == before.keys() and torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(tiny.scheduler.timesteps, before["timesteps"])


def test_an_autoencoder_shows_what_was_sampled():
    plain, decoded = (
        DiffusionLoss(exact(0.0, 0.1), schedule(clip_sample=False), vae, scaling_factor=0.5)
        for vae in (None, Decoder())
    )
    told = torch.ones(2, 1, 1)
    x = 2 * plain.sample(told, told, n_steps=5, generator=seeded()) - 1
    z = 2 * decoded.sample(told, told, n_steps=5, generator=seeded()) - 1
    torch.testing.assert_close(z, ((x / 0.5 - 1) / 2).clamp(-1, 1))


def test_a_pipelines_scheduler_that_only_samples_is_replaced_by_one_of_its_noises(tiny):
    pipe = copy.copy(tiny)
    pipe.scheduler = needs("diffusers", "generative").EulerDiscreteScheduler.from_config(
        tiny.scheduler.config
    )
    _, denoise = TextualInversion.from_pipeline(pipe, initializer="ring")
    torch.testing.assert_close(denoise.scheduler.alphas_cumprod, tiny.scheduler.alphas_cumprod)
    x, noise, t = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.tensor([900])
    torch.testing.assert_close(
        denoise.scheduler.add_noise(x, noise, t), tiny.scheduler.add_noise(x, noise, t)
    )


def test_autocast_changes_the_loss_by_rounding_only(tiny, images):
    denoise = DiffusionLoss(tiny.unet, tiny.scheduler)
    context = torch.randn(4, 32, 64, generator=seeded())
    with torch.no_grad():
        plain = denoise(images, context, generator=seeded())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = denoise(images, context, generator=seeded())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": None}, "unet must be an nn.Module, got NoneType"),
        ({"vae": "vae"}, "vae must be an nn.Module with encode, got str"),
        ({"scheduler": None}, "scheduler.config.num_train_timesteps must be an integer"),
        ({"prediction": "sample"}, "prediction must be one of 'epsilon', 'v_prediction', got 'sample'"),
        ({"scaling_factor": 0}, "scaling_factor must be greater than 0, got 0"),
    ],
)
def test_refuses_a_bad_model_by_name(as_a_user, change, message):
    parts = {"unet": Echo(), "scheduler": schedule(), "vae": None, **change}
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(parts.pop("unet"), parts.pop("scheduler"), parts.pop("vae"), **parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(1, 2, 2)}, r"context must have shape \(2, any, any\) for 2 images"),
        ({"t": torch.zeros(2)}, "t must hold class indices"),
        ({"t": torch.tensor([0, 1000])}, r"t must be in 0..999"),
        ({"noise": torch.zeros(2, 3)}, r"noise must have shape \(2, 3, 4, 4\)"),
    ],
)
def test_refuses_what_does_not_fit_by_name(as_a_user, change, message):
    given = {"images": torch.zeros(2, 3, 4, 4), "context": torch.zeros(2, 2, 2), **change}
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(Echo(), schedule())(given.pop("images"), given.pop("context"), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 1001}, "n_steps must be at most the 1000 of training, got 1001"),
        ({"guidance_scale": -1}, "guidance_scale must be at least 0, got -1"),
        (
            {"negative_context": torch.zeros(3, 2, 2)},
            r"negative_context must have shape \(1 or 2, length, d\)",
        ),
    ],
)
def test_refuses_to_sample_out_of_range(as_a_user, options, message):
    negative = options.pop("negative_context", torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(Echo(), schedule()).sample(torch.zeros(2, 2, 2), negative, **options)
