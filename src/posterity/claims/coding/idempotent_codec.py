"""Claims about idempotent decoding: images like real ones at the same bytes, at twice the error at most."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posterity._checks import needs
from posterity.claims import Count, NotNegative, Positive, Trial, bound, comparison
from posterity.coding import GaussianMixturePrior, IdempotentCodec, NetPrior, TransformCodec, linear_betas
from posterity.lab import metrics, pretrained
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest

MOST = 1024  # numbers of an image, of which a mixture has full covariances


def _fits(data: ImageData, n_train: int, components: int, latents: int, prior: str, **_: Any) -> None:
    size = data.x[0].size
    if not prior and size > MOST:
        raise ValueError(f"images must have at most {MOST} numbers for a mixture, has {size}: give prior=, a model of diffusers")  # fmt: skip
    if n_train < max(2, components):
        raise ValueError(f"n_train must be at least {max(2, components)}, got {n_train}")
    if latents > size:
        raise ValueError(f"latents must be at most the {size} numbers of an image, got {latents}")
    require_rest(len(data.y), "n_train", n_train, 2, "images")


@dataclass
class _Decoded:
    """Held-out images, what the codec makes of them, and what the idempotent decoder does with the same bytes."""

    real: Tensor
    mse: Tensor
    sharp: Tensor
    data: bytes
    decoder: IdempotentCodec


def _prior(name: str, x: Tensor, components: int, seed: int) -> Any:
    """Return a mixture fitted to images, or a diffusion model of diffusers by its name."""
    if not name:
        return GaussianMixturePrior.fit(x, components, random_state=seed)
    kind = needs("diffusers", "bench").UNet2DModel
    net = pretrained.load(kind, name, "prior must be a folder or name of a UNet2DModel of diffusers").eval()
    schedule = (1 - linear_betas()).cumprod(0).flip(0)  # from noise to data

    def alpha_bar(t: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(t.numpy(), np.linspace(0, 1, len(schedule)), schedule.numpy()))

    return NetPrior(lambda x, t: net(x, (1 - t) * (len(schedule) - 1)).sample, alpha_bar=alpha_bar)


def _decode(
    trial: Trial, data: str, n_train: int, latents: int, step: float, components: int, scale: float, steps: int, training: int,
    prior: str,
) -> _Decoded:  # fmt: skip
    images = load_images(data)
    n = len(images.y)
    train, test = split(n, (n_train / n, 1 - n_train / n), trial.seed)
    x = torch.from_numpy(images.x).float() * 2 - 1
    rng = torch.Generator().manual_seed(trial.seed)
    codec = TransformCodec(x.shape[1:], latents, step=step).fit(x[train], training, generator=rng)
    decoder = IdempotentCodec(
        codec.to(trial.device),
        _prior(prior, x[train], components, trial.seed),
        scale=scale,
        betas=linear_betas(steps),
    )
    if isinstance(decoder.prior, torch.nn.Module):
        decoder.prior.to(trial.device)
    real = x[test].to(trial.device)
    packed = decoder.compress(real)
    sharp = decoder.decompress(packed, generator=rng).cpu()
    codec.cpu()
    mse = decoder.decompress_mse(packed)
    trial.record("bits an image", 8 * len(packed) / len(real))
    trial.record("share of equal symbols", decoder.code_agreement(sharp, packed))
    trial.record("ratio of mean squared errors", _error(sharp, real) / _error(mse, real))
    return _Decoded(real.cpu(), mse, sharp, packed, decoder)


def _error(x: Tensor, real: Tensor) -> float:
    return float((x.cpu() - real.cpu()).square().mean())


def frechet(x: Tensor, y: Tensor) -> float:
    """Return the Fréchet distance of two sets of rows, taken for Gaussian."""
    a, b = (rows.flatten(1).double() for rows in (x, y))
    means = (a.mean(0) - b.mean(0)).square().sum()
    one, two = torch.cov(a.mT), torch.cov(b.mT)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float(means + one.trace() + two.trace() - 2 * cross)


@comparison(
    paper="idempotent-codec",
    says="At the same bits the idempotent decoder gives images far more like real ones than the decoder of least error.",
    where="Xu et al., Section 5 and abstract",
    arms=("mse", "idempotent"),
    metric="Fréchet distance of pixels between held-out images and their reconstructions",
    better="lower",
    smallest={"steps": 5, "components": 2, "n_train": 1600, "training": 20},
    check=_fits,
)
def realism(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_300,
    latents: Count = 6,
    step: Positive = 1.5,
    components: Count = 20,
    scale: NotNegative = 0.6,
    steps: Count = 200,
    training: Count = 800,
    prior: str = "",
) -> dict[str, float]:
    """Decode the same bytes twice: by the network trained on the squared error, and by a sample under them.

    Codec and prior, a mixture of Gaussians on the pixels, are fitted to the same images, which are not those that are
    coded. The prior has to be good: a small network trained for a few thousand steps in its place can lose what the
    constraint gains. The records have the distance between two halves of real images, which is the floor, sliced
    Wasserstein distances, the bits, the share of symbols that come back, and the ratio of squared errors.
    For images of more numbers ``prior="google/ddpm-cifar10-32"``, or any model of diffusers, takes the mixture's place.
    """
    found = _decode(trial, data, n_train, latents, step, components, scale, steps, training, prior)
    half = len(found.real) // 2
    trial.record(
        "Fréchet distance, two halves of the real images", frechet(found.real[:half], found.real[half:])
    )
    distances = {}
    for arm, x in (("mse", found.mse), ("idempotent", found.sharp)):
        trial.record(
            f"sliced Wasserstein distance, {arm}",
            metrics.sliced_wasserstein(x.flatten(1), found.real.flatten(1), seed=trial.seed),
        )
        distances[arm] = frechet(x, found.real)
    return distances


@bound(
    paper="idempotent-codec",
    says="Realism at the same bits costs at most twice the mean squared error.",
    where="Xu et al., Section 3, after Blau and Michaeli",
    metric="mean squared error of idempotent decoding over that of the decoder of least error",
    limit=2.0,
    smallest={"steps": 5, "components": 2, "n_train": 1600, "training": 20},
    check=_fits,
)
def price(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_300,
    latents: Count = 6,
    step: Positive = 1.5,
    components: Count = 20,
    scale: NotNegative = 0.6,
    steps: Count = 200,
    training: Count = 800,
    prior: str = "",
) -> float:
    """Compare the squared errors of both decoders: exact samples under the constraint would have exactly twice."""
    found = _decode(trial, data, n_train, latents, step, components, scale, steps, training, prior)
    return _error(found.sharp, found.real) / _error(found.mse, found.real)


@comparison(
    paper="idempotent-codec",
    says="Compressed again, idempotent images come back as they were, images roughened by noise do not.",
    where="Xu et al., Section 3.1, Theorem 1",
    arms=("noise-added mse", "idempotent"),
    metric="mean squared difference of the codec's images of the reconstruction and of the first bytes",
    better="lower",
    smallest={"steps": 5, "components": 2, "n_train": 1600, "training": 20},
    check=_fits,
)
def idempotence(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1_300,
    latents: Count = 6,
    step: Positive = 1.5,
    components: Count = 20,
    scale: NotNegative = 0.6,
    steps: Count = 200,
    training: Count = 800,
    prior: str = "",
) -> dict[str, float]:
    """Compress both reconstructions once more.

    The first is the image of least error with Gaussian noise that gives it the variance of idempotent ones: detail
    that is not there, without regard to the bytes.
    """
    found = _decode(trial, data, n_train, latents, step, components, scale, steps, training, prior)
    missing = float(found.sharp.var(0).mean() - found.mse.var(0).mean())
    noise = torch.randn(found.mse.shape, generator=torch.Generator().manual_seed(trial.seed + 1))
    rough = (found.mse + math.sqrt(max(missing, 0.0)) * noise).clamp(-1, 1)
    error = {}
    for arm, x in (("noise-added mse", rough), ("idempotent", found.sharp)):
        error[arm] = float(found.decoder.idempotence_error(x, found.data).mean())
        trial.record(f"share of equal symbols, {arm}", found.decoder.code_agreement(x, found.data))
        trial.record(f"Fréchet distance, {arm}", frechet(x, found.real))
    return error
