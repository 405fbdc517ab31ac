"""Decoding 64 images at once against one by one, 100 spherical steps against 1,000, eigenbases against solves."""

import torch
from torch import Tensor

from benchmarks.timing import race
from posterity.claims.coding.idempotent_codec import frechet
from posterity.coding import GaussianMixturePrior, IdempotentCodec, TransformCodec, linear_betas
from posterity.lab.data import load_images


def solved(prior: GaussianMixturePrior, x: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the expected images as one writes it: a linear system a component and call."""
    flat, s = x.flatten(1), alpha_bar.sqrt().float()
    mean, covariance = prior.mean.float(), (prior.bases * prior.spreads[:, None] @ prior.bases.mT).float()
    eye = torch.eye(flat.shape[1])
    logs, parts = [], []
    for mu, c, w in zip(mean, covariance, prior.log_weights.float(), strict=True):
        noisy = torch.distributions.MultivariateNormal(s * mu, s**2 * c + (1 - s**2) * eye)
        logs.append(w + noisy.log_prob(flat))
        parts.append(mu + (s * c @ torch.linalg.solve(noisy.covariance_matrix, (flat - s * mu).mT)).mT)
    share = torch.stack(logs, 1).softmax(1)
    return (share[..., None] * torch.stack(parts, 1)).sum(1).reshape(x.shape)


def main() -> None:
    images = load_images("digits")
    x = torch.from_numpy(images.x) * 2 - 1
    rng = torch.Generator().manual_seed(0)
    codec = TransformCodec((1, 8, 8), 6).fit(x[:1300], generator=rng)
    prior = GaussianMixturePrior.fit(x[:1300], 20, random_state=0)

    decoder = IdempotentCodec(codec, prior, betas=linear_betas(20))
    together = decoder.compress(x[1300:1364])
    single = [decoder.compress(x[k : k + 1]) for k in range(1300, 1364)]
    race(
        "64 images in one batch, 20 steps, against batches of 1, as the official code has them",
        lambda: decoder.decompress(together, generator=rng),
        lambda: [decoder.decompress(data, generator=rng) for data in single],
        target=10, rounds=3,
    )  # fmt: skip

    slow = IdempotentCodec(codec, prior, betas=linear_betas(1000))
    fast = IdempotentCodec(codec, prior, betas=linear_betas(100), method="dsg")
    data = slow.compress(x[1300:])
    distances = [frechet(each.decompress(data, generator=rng), x[1300:]) for each in (slow, fast)]
    print(f"Fréchet distance: 1,000 steps of DPS {distances[0]:.3f}, 100 steps of DSG {distances[1]:.3f}")
    few = slow.compress(x[1300:1364])
    race(
        "100 spherical steps against 1,000 of DPS, 64 images",
        lambda: fast.decompress(few, generator=rng),
        lambda: slow.decompress(few, generator=rng),
        target=9, rounds=3,
    )  # fmt: skip

    noisy, ab = torch.randn(64, 1, 8, 8, generator=rng), torch.tensor(0.5)
    torch.testing.assert_close(prior.denoise(noisy, ab), solved(prior, noisy, ab), rtol=1e-3, atol=1e-3)
    race(
        "denoising 64 images by 20 components, against a solve each",
        lambda: prior.denoise(noisy, ab),
        lambda: solved(prior, noisy, ab),
        target=1, rounds=9,
    )  # fmt: skip


if __name__ == "__main__":
    main()
