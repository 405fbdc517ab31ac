"""Posterior sampling and the idempotent decoder: closed forms, one step by autograd, statistics, refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

from posterity.coding import (
    GaussianMixturePrior,
    IdempotentCodec,
    NetPrior,
    TransformCodec,
    idempotent_codec,
    linear_betas,
    posterior_sample,
)
from posterity.lab.memory import peak_bytes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, GaussianMixturePrior]:
    a = torch.randn(d, d, dtype=torch.float64, generator=rng(seed))
    mean, cov = torch.randn(d, dtype=torch.float64, generator=rng(seed + 1)), a @ a.mT / d
    return mean, cov, GaussianMixturePrior(mean[None], cov[None], torch.ones(1))


def mixture(d: int = 4, k: int = 3) -> GaussianMixturePrior:
    a = torch.randn(k, d, d, dtype=torch.float64, generator=rng(3))
    return GaussianMixturePrior(2 * torch.randn(k, d, dtype=torch.float64, generator=rng(4)), a @ a.mT / d, torch.tensor([1.0, 2, 3]))  # fmt: skip


def codec(dtype: torch.dtype = torch.float32) -> tuple[TransformCodec, Tensor]:
    x = torch.randn(60, 2, 3, 3, generator=rng()).mul(0.4).clamp(-1, 1).to(dtype)
    return TransformCodec((2, 3, 3), 4, step=0.5, hidden=16).to(dtype).fit(x, 30, generator=rng()), x


# Priors


def test_one_gaussian_is_the_wiener_filter():
    mean, cov, prior = gaussian()
    x = torch.randn(7, 5, dtype=torch.float64, generator=rng(9))
    for ab in (0.05, 0.5, 0.95):
        s = ab**0.5
        gain = s * cov @ torch.linalg.inv(ab * cov + (1 - ab) * torch.eye(5, dtype=torch.float64))
        want = mean + (x - s * mean) @ gain.mT
        torch.testing.assert_close(prior.denoise(x, torch.tensor(ab)), want, rtol=1e-6, atol=1e-8)


def test_many_components_follow_tweedie():
    prior = mixture()
    x = torch.randn(6, 4, dtype=torch.float64, generator=rng(9)).requires_grad_()
    for value in (0.1, 0.6, 0.99):
        ab = torch.tensor(value, dtype=torch.float64)
        means = ab.sqrt() * prior.mean
        covs = ab * prior.bases @ torch.diag_embed(prior.spreads) @ prior.bases.mT + (1 - ab) * torch.eye(
            4, dtype=torch.float64
        )
        parts = torch.distributions.MultivariateNormal(means, covs).log_prob(x[:, None])
        (score,) = torch.autograd.grad((parts + prior.log_weights).logsumexp(1).sum(), x)
        want = (x.detach() + (1 - ab) * score) / ab.sqrt()
        torch.testing.assert_close(prior.denoise(x, ab).detach(), want, rtol=1e-9, atol=1e-9)


def test_ends_of_the_schedule():
    prior = mixture()
    x = torch.randn(6, 4, dtype=torch.float64, generator=rng(9))
    torch.testing.assert_close(prior.denoise(x, torch.tensor(1.0)), x)
    mean = (prior.log_weights.exp()[:, None] * prior.mean).sum(0)
    torch.testing.assert_close(prior.denoise(x, torch.tensor(0.0)), mean.expand(6, 4))
    flat = GaussianMixturePrior(torch.zeros(1, 2), torch.diag(torch.tensor([1.0, 0.0]))[None], torch.ones(1))
    assert torch.isfinite(flat.denoise(torch.ones(1, 2), torch.tensor(1.0))).all()


def test_log_prob_samples_and_fit():
    prior = mixture()
    x = prior.sample(20_000, rng())
    parts = torch.distributions.MultivariateNormal(
        prior.mean, prior.bases @ torch.diag_embed(prior.spreads) @ prior.bases.mT
    )
    want = (parts.log_prob(x[:9, None]) + prior.log_weights).logsumexp(1)
    torch.testing.assert_close(prior.log_prob(x[:9]), want)
    mean = (prior.log_weights.exp()[:, None] * prior.mean).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.08, rtol=0)
    torch.testing.assert_close(prior.log_weights.exp(), torch.tensor([1, 2, 3]).double() / 6)
    spread = prior.bases @ torch.diag_embed(prior.spreads) @ prior.bases.mT + torch.einsum(
        "ki,kj->kij", prior.mean, prior.mean
    )
    cov = torch.einsum("k,kij->ij", prior.log_weights.exp(), spread) - torch.outer(mean, mean)
    assert (torch.cov(x.mT) - cov).abs().max() < 0.05 * cov.abs().max()
    again = GaussianMixturePrior.fit(x.reshape(-1, 2, 2)[:4000].float(), 3, reg=1e-6, random_state=0)
    assert again.shape == (2, 2)
    order = [int((again.mean - m).norm(dim=1).argmin()) for m in prior.mean]
    torch.testing.assert_close(again.mean[order], prior.mean, atol=0.25, rtol=0)
    assert torch.equal(prior.sample(5, rng(2)), prior.sample(5, rng(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_that_was_cast_is_sampled_and_judged_as_it_is_now(dtype):
    low, exact = mixture().to(dtype), mixture()
    for name, buffer in low.named_buffers():
        setattr(exact, name, buffer.double())
    x = low.sample(7, rng())
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, exact.sample(7, rng()))
    torch.testing.assert_close(low.log_prob(x), exact.log_prob(x))
    torch.testing.assert_close(low.denoise(x, torch.tensor(0.5)), exact.denoise(x, torch.tensor(0.5)))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_a_network_that_knows_gives_the_same_as_the_closed_form(prediction):
    prior, seen = mixture(), []
    schedule = lambda t: t**2  # noqa: E731

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        ab = schedule(t[0].double())
        x0 = prior.denoise(x, ab)
        noise = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return {"x0": x0, "epsilon": noise, "v": ab.sqrt() * noise - (1 - ab).sqrt() * x0}[prediction]

    x, ab = torch.randn(3, 4, dtype=torch.float64, generator=rng()), torch.tensor(0.3, dtype=torch.float64)
    found = NetPrior(net, prediction=prediction, alpha_bar=schedule).denoise(x, ab)
    torch.testing.assert_close(found, prior.denoise(x, ab), rtol=1e-6, atol=1e-8)
    assert seen[0].shape == (3,) and seen[0].dtype == x.dtype
    assert seen[0][0].item() == pytest.approx(0.3**0.5, abs=1e-9)


def test_default_schedule_of_networks():
    seen = []
    prior = NetPrior(lambda x, t: seen.append(float(t[0])) or x)
    for ab in (1e-4, 0.5, 0.9999):
        prior.denoise(torch.ones(1, 1), torch.tensor(ab))
        s = 1 - seen[-1]
        assert torch.exp(torch.tensor(-0.1 * s - 19.9 * s * s / 2)).item() == pytest.approx(ab, rel=1e-2)


# Sampling


def test_without_a_pull_samples_are_of_the_prior():
    mean, cov, prior = gaussian(3)
    found = posterior_sample(
        prior, lambda x: x, torch.zeros(4000, 3, dtype=torch.float64), (4000, 3), scale=0, betas=linear_betas(200),
        clip=None, generator=rng(),
    )  # fmt: skip
    assert found.n_evals == 200
    size = cov.diag().sqrt()
    assert ((found.x.mean(0) - mean).abs() < 0.05 * size + 0.05 * mean.abs()).all()
    assert torch.linalg.norm(torch.cov(found.x.mT) - cov) < 0.07 * torch.linalg.norm(cov)


def test_one_step_is_the_gradient_of_the_norm():
    prior = mixture()
    x = torch.randn(6, 4, generator=rng(1)).requires_grad_()
    target = torch.randn(6, 2, generator=rng(2))
    x0 = prior.denoise(x, torch.tensor(0.7)).clamp(-1, 1)
    norm = (target - x0[:, :2].sin()).square().sum(1).sqrt()
    (grad,) = torch.autograd.grad(norm.sum(), x)
    found = posterior_sample(
        prior, lambda x: x[:, :2].sin(), target, (6, 4), scale=0.4, betas=torch.tensor([0.3]), x_init=x
    )
    torch.testing.assert_close(found.x, (x0 - 0.4 * grad).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.residual, (target - found.x[:, :2].sin()).norm(dim=1))


@pytest.mark.parametrize("method", ["dps", "dsg"])
def test_a_batch_is_its_samples(method, monkeypatch):
    prior, target, start = mixture(), torch.randn(3, 4, generator=rng(2)), torch.randn(3, 4, generator=rng(5))
    options = {"betas": linear_betas(12), "method": method, "x_init": start}
    monkeypatch.setattr(idempotent_codec.torch, "randn", lambda shape, **_: torch.full(shape, 0.3))
    whole = posterior_sample(prior, torch.tanh, target, (3, 4), **options).x
    for i in range(3):
        one = posterior_sample(prior, torch.tanh, target[i : i + 1], (1, 4), **{**options, "x_init": start[i : i + 1]})  # fmt: skip
        torch.testing.assert_close(one.x[0], whole[i], rtol=1e-5, atol=1e-6)


def test_spherical_steps_stay_on_the_sphere(monkeypatch):
    """Each step but the last is as long as the noise would be, a tenth of the way turned to the steepest point."""
    prior = mixture()
    betas = torch.tensor([0.1, 0.2], dtype=torch.float64)
    x, target = torch.randn(5, 4, generator=rng(5)), torch.randn(5, 4, generator=rng(2))
    noise = torch.randn(5, 4, generator=rng(7))
    draws = iter([noise])
    monkeypatch.setattr(idempotent_codec.torch, "randn", lambda shape, **_: next(draws))
    found = posterior_sample(
        prior, lambda x: x, target, (5, 4), betas=betas, method="dsg", x_init=x, clip=None
    ).x
    ab = (1 - betas).cumprod(0).float()
    z = x.clone().requires_grad_()
    x0 = prior.denoise(z, ab[1])
    (g,) = torch.autograd.grad((target - x0).norm(dim=1).sum(), z)
    mean = ab[0].sqrt() * 0.2 / (1 - ab[1]) * x0 + 0.8**0.5 * (1 - ab[0]) / (1 - ab[1]) * x
    sigma = (0.2 * (1 - ab[0]) / (1 - ab[1])).sqrt()
    radius = 2 * sigma
    steepest = -radius * g / g.norm(dim=1, keepdim=True)
    mixed = 0.9 * sigma * noise + 0.1 * steepest
    middle = (mean + radius * mixed / mixed.norm(dim=1, keepdim=True)).detach()
    torch.testing.assert_close((middle - mean).norm(dim=1), radius.expand(5))
    torch.testing.assert_close(found, prior.denoise(middle, ab[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dps", "dsg"])
def test_what_is_seen_holds_and_what_is_not_varies_as_before(method):
    spread = torch.tensor([0.5, 1.0, 2.0, 0.7, 1.5])
    prior = GaussianMixturePrior(torch.zeros(1, 5), torch.diag(spread**2)[None], torch.ones(1))
    target = torch.tensor([[0.3, -0.8]]).expand(1500, 2)
    found = posterior_sample(
        prior, lambda x: x[:, :2], target, (1500, 5), method=method, scale=0.6, betas=linear_betas(200), clip=None,
        generator=rng(),
    )  # fmt: skip
    assert (found.x[:, :2] - target).abs().mean() < 0.3
    if method == "dps":
        torch.testing.assert_close(found.x[:, 2:].var(0), spread[2:] ** 2, rtol=0.15, atol=0)


def test_only_what_missed_the_tolerance_is_drawn_again():
    prior = mixture()
    target = torch.randn(8, 4, generator=rng(2))
    options = {"betas": linear_betas(15), "scale": 0.05, "clip": None}
    once = posterior_sample(prior, lambda x: x, target, (8, 4), **options, generator=rng())
    level = once.residual.median()
    more = posterior_sample(prior, lambda x: x, target, (8, 4), **options, max_tries=4, tol=float(level), generator=rng())  # fmt: skip
    good = once.residual <= level
    assert torch.equal(more.x[good], once.x[good])
    assert (more.residual <= once.residual).all() and (more.residual < once.residual).any()
    assert 15 < more.n_evals <= 60
    torch.testing.assert_close(more.residual, (target - more.x).norm(dim=1))


def test_each_new_try_pulls_half_as_much_again():
    prior, start, target = mixture(), torch.randn(8, 4, generator=rng(1)), torch.randn(8, 4, generator=rng(2))
    options = {"betas": torch.tensor([0.3]), "x_init": start, "clip": None}

    def sample(scale, **more):
        return posterior_sample(prior, lambda x: x, target, (8, 4), scale=scale, **options, **more)

    tries = [sample(0.1 * 1.5**k) for k in range(3)]
    assert (tries[2].residual < tries[0].residual).all()
    for n in (1, 2, 3):
        torch.testing.assert_close(sample(0.1, max_tries=n, tol=0.0).x, tries[n - 1].x)
    assert torch.equal(sample(50.0, max_tries=3, tol=0.0).x, sample(50.0).x)  # the first was nearest


def test_schedule():
    betas = linear_betas()
    assert (betas[0], betas[-1], len(betas)) == (1e-4, 0.02, 1000)
    assert linear_betas(200)[[0, -1]].tolist() == pytest.approx([5e-4, 0.1])
    assert linear_betas(5).max() == 0.999


def test_memory_does_not_grow_with_steps():
    prior, target = mixture(), torch.zeros(64, 4)
    few, many = (
        peak_bytes(lambda n=n: posterior_sample(prior, torch.tanh, target, (64, 4), betas=linear_betas(n)))
        for n in (3, 12)
    )
    assert many <= 1.05 * few


# The codec and its decoder


def test_bytes_are_the_codecs_and_the_plain_image_too():
    base, x = codec()
    sharp = IdempotentCodec(base, GaussianMixturePrior.fit(x, 2, random_state=0), betas=linear_betas(20))  # fmt: skip
    data = sharp.compress(x[:9])
    assert data == base.compress(x[:9])
    assert torch.equal(sharp.decompress_mse(data), base.decompress(data))
    assert torch.equal(sharp.decompress(data, realism=0), base.decompress(data))
    assert sharp.decompress(data, realism=0, n_samples=2).shape == (2, 9, 2, 3, 3)
    one, two = (sharp.decompress(data, generator=rng()) for _ in range(2))
    assert torch.equal(one, two) and one.abs().max() <= 1
    wild = IdempotentCodec(base, sharp.prior, betas=torch.tensor([0.3]), scale=50)
    assert wild.decompress(data, generator=rng()).abs().max() == 1  # clipped
    half = sharp.decompress(data, realism=0.5, generator=rng())
    torch.testing.assert_close(half, 0.5 * one + 0.5 * base.decompress(data))
    many = sharp.decompress(data, n_samples=3, generator=rng())
    assert many.shape == (3, 9, 2, 3, 3) and not torch.equal(many[0], many[1])
    assert sharp.idempotence_error(x[:9], data).max() == 0
    assert sharp.code_agreement(x[:9], data) == 1
    moved = -x[:9]
    assert sharp.idempotence_error(moved, data).min() > 0 and sharp.code_agreement(moved, data) < 0.5


def test_samples_keep_the_symbols():
    base, x = codec()
    sharp = IdempotentCodec(base, GaussianMixturePrior.fit(x, 2, random_state=0), betas=linear_betas(100))
    free = IdempotentCodec(base, sharp.prior, betas=linear_betas(100), scale=0)
    data = sharp.compress(x)
    bound, unbound = (each.decompress(data, generator=rng()) for each in (sharp, free))
    assert sharp.idempotence_error(bound, data).mean() < 0.3 * sharp.idempotence_error(unbound, data).mean()
    assert sharp.code_agreement(bound, data) > sharp.code_agreement(unbound, data) + 0.2


def test_networks_are_left_as_they_were():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(18, 18), nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert not self.training
            return self.drop(self.layer(x.flatten(1))).reshape(x.shape)

    base, x = codec()
    net = Net().train()
    net.drop.eval()
    before = copy.deepcopy(net.state_dict())
    sharp = IdempotentCodec(base.train(), NetPrior(net), betas=linear_betas(5))
    data = sharp.compress(x[:4])
    with torch.inference_mode():
        inside = sharp.decompress(data, generator=rng())
    with torch.no_grad():
        assert torch.equal(sharp.decompress(data, generator=rng()), inside)
    assert (net.training, net.drop.training, base.training) == (True, False, True)
    assert all(p.grad is None for p in [*net.parameters(), *base.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    prior = mixture()
    x, ab = torch.randn(6, 4, generator=rng(9)), torch.tensor(0.4)
    got = prior.denoise(x.to(dtype), ab)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), prior.denoise(x, ab), rtol=0, atol=8 * torch.finfo(dtype).eps)
    target = torch.zeros(5, 4, dtype=dtype)
    found = posterior_sample(prior, lambda x: x, target, (5, 4), betas=linear_betas(10), generator=rng())
    wide = posterior_sample(
        prior, lambda x: x, target.float(), (5, 4), betas=linear_betas(10), generator=rng()
    )
    assert found.x.dtype == found.residual.dtype == dtype
    torch.testing.assert_close(found.x.float(), wide.x, rtol=0, atol=4 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            prior.denoise(x, ab), prior.denoise(x.double(), ab).float(), rtol=1e-2, atol=2e-2
        )


def test_no_samples():
    found = posterior_sample(mixture(), torch.tanh, torch.zeros(0, 4), (0, 4))
    assert found.x.shape == (0, 4) and found.residual.shape == (0,) and found.n_evals == 0


class Hard:
    """A codec whose rounding has no gradient."""

    def compress(self, x: Tensor) -> bytes:
        return bytes(x.round().to(torch.int8).flatten().tolist())

    def decompress(self, data: bytes) -> Tensor:
        if not data:
            raise ValueError("nothing there")
        return torch.tensor(list(data), dtype=torch.float32).reshape(-1, 4)

    def reconstruct(self, x: Tensor) -> Tensor:
        return x.detach().round()


def test_bad_input(as_a_user: None):
    prior, zero = mixture(), torch.zeros(2, 4)
    base, x = codec()
    sharp = IdempotentCodec(base, GaussianMixturePrior.fit(x, 1))
    data = sharp.compress(x[:2])

    def sample(prior=prior, forward=torch.tanh, target=zero, shape=(2, 4), **options):
        return posterior_sample(prior, forward, target, shape, **{"betas": linear_betas(3), **options})

    class Small:
        def denoise(self, x, alpha_bar):
            return x[:, :1]

    class Broken:
        def denoise(self, x, alpha_bar):
            return x / 0

    for match, look in [
        ("without it", lambda: IdempotentCodec(object(), prior)),
        ("prior must have denoise", lambda: IdempotentCodec(base, object())),
        ("reconstruct must be differentiable", lambda: IdempotentCodec(Hard(), prior).decompress(b"\1\0\0\1")),
        ("data must be of Hard: nothing there", lambda: IdempotentCodec(Hard(), prior).decompress(b"")),
        ("data must be of TransformCodec", lambda: sharp.decompress(data[:-1])),
        ("return the shape that it gets", lambda: sample(Small())),
        ("NaN or infinity at step 3 of 3", lambda: sample(Broken())),
        ("forward must be differentiable", lambda: sample(forward=lambda x: x.detach())),
        (r"forward\(x\) must have shape", lambda: sample(forward=lambda x: x[:, :1])),
        (r"x must be in \[-1, 1\], got values from 1 to 2", lambda: sharp.compress(torch.linspace(1, 2, 18).reshape(1, 2, 3, 3))),
        ("x must be in", lambda: sharp.compress(torch.full((1, 2, 3, 3), torch.nan))),
        ("floating-point", lambda: sharp.compress(torch.zeros(1, 2, 3, 3, dtype=torch.int64))),
        ("scale", lambda: sample(scale=-1)),
        ("scale", lambda: IdempotentCodec(base, prior, scale=-0.1)),
        ("betas must lie", lambda: sample(betas=torch.tensor([0.0, 0.1]))),
        ("betas must lie", lambda: sample(betas=torch.tensor([0.5, 1.0]))),
        ("betas must have shape", lambda: sample(betas=torch.zeros(0))),
        ("n_samples", lambda: sharp.decompress(data, n_samples=0)),
        ("realism", lambda: sharp.decompress(data, realism=1.1)),
        ("method", lambda: sample(method="ddim")),
        ("max_tries", lambda: sample(max_tries=0)),
        ("tol", lambda: sample(tol=-1.0)),
        ("clip", lambda: sample(clip=(1.0, -1.0))),
        (r"clip must be two numbers \(low, high\), got 5", lambda: sample(clip=5)),
        (r"shape must be \(n, \*shape\) for n = 2", lambda: sample(shape=(3, 4))),
        ("x_init must have shape", lambda: sample(x_init=torch.zeros(2, 3))),
        ("x_hat must have shape", lambda: sharp.idempotence_error(x[:3], data)),
        ("n_steps", lambda: linear_betas(0)),
        ("prediction", lambda: NetPrior(torch.sin, prediction="score")),
        ("net must be callable", lambda: NetPrior(3)),
        ("alpha_bar must rise", lambda: NetPrior(lambda x, t: x, alpha_bar=lambda t: 1 - t).denoise(zero, torch.tensor(0.5))),
        ("net must return the shape", lambda: NetPrior(lambda x, t: x[:, :1]).denoise(zero, torch.tensor(0.5))),
        ("weights must be positive", lambda: GaussianMixturePrior(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3), torch.tensor([1.0, 0]))),
        ("positive semi-definite", lambda: GaussianMixturePrior(torch.zeros(1, 3), -torch.eye(3)[None], torch.ones(1))),
        ("covariances must have shape", lambda: GaussianMixturePrior(torch.zeros(1, 3), torch.eye(2)[None], torch.ones(1))),
        ("x must have at least 20 samples", lambda: GaussianMixturePrior.fit(torch.zeros(3, 2))),
        ("x must have shape", lambda: prior.denoise(torch.zeros(2, 3), torch.tensor(0.5))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            look()
