"""Generation: train is samples (n, *shape), predict(n, generator) makes more of them.

What is made is laid beside held-out samples: the sliced Wasserstein distance between the two clouds; how many of the
made ones lie where the held-out ones crowd (density) and how many of the held-out ones have a made one near
(coverage), both by balls to the fifth neighbour [1]_; and the seconds that a thousand samples take. Networks are alike
in size and steps: an MLP for points and small images, a U-Net of diffusers from 16 x 16 pixels on.

.. [1] Naeem, Oh, Uh, Choi, Yoo. Reliable Fidelity and Diversity Metrics for Generative Models. ICML 2020. Section 3.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from posterity._checks import needs
from posterity.claims import Count
from posterity.lab.data import load_samples, split
from posterity.lab.data.samples import SampleData, Samples
from posterity.lab.metrics import sliced_wasserstein
from posterity.lab.nets import TimeMLP, seeded
from posterity.lab.tasks import Task, entry
from posterity.lab.training import fit

__all__ = ["STEPS", "density_coverage", "network_for", "trained"]

STEPS = 1_500  # of an entry with a network
NEIGHBOURS = 5

Sampler = Callable[[int, torch.Generator], Tensor]


def network_for(train: Tensor, seed: int) -> nn.Module:
    """Return a network ``net(x, t)`` for samples of a shape, its initial weights decided by the seed.

    Parameters
    ----------
    train : Tensor of shape (n, *shape)
    seed : int

    Returns
    -------
    nn.Module
    """
    shape = tuple(train.shape[1:])
    if len(shape) < 3 or min(shape[1:]) < 16:
        return TimeMLP(shape, width=256, depth=3, seed=seed)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model = needs("diffusers", "generative").UNet2DModel
    with seeded(seed):
        return model(shape[1:], shape[0], shape[0], layers_per_block=1, block_out_channels=(32, 64), **blocks)


def trained(train: Tensor, loss: Callable[..., Tensor], seed: int) -> nn.Module:
    """Return the network, trained on a loss ``loss(net, x)`` of batches.

    Parameters
    ----------
    train : Tensor of shape (n, *shape)
    loss : callable
    seed : int

    Returns
    -------
    nn.Module
        In eval mode.
    """
    net = network_for(train, seed)
    fit(net, loss, (train,), steps=STEPS, batch_size=128, lr=2e-3, schedule="cosine", seed=seed)
    return net.eval()


def density_coverage(real: Tensor, made: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return how many real balls hold a made sample, over k, and the share of real balls that hold one.

    Parameters
    ----------
    real : Tensor of shape (n, ...)
        More than ``k``; around each, a ball to its k-th neighbour.
    made : Tensor of shape (m, ...)
    k : int, default=5

    Returns
    -------
    tuple of float
        Density, 1 for samples of the same law; coverage, in [0, 1].
    """
    real, made = real.flatten(1).double(), made.flatten(1).double()
    radii = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    inside = torch.cdist(real, made) < radii[:, None]
    return float(inside.sum() / (k * len(made))), float(inside.any(1).double().mean())


def require_split(data: SampleData, **_: Any) -> None:
    """Refuse too few samples to hold some out."""
    if len(data.x) < 10 * NEIGHBOURS:
        raise ValueError(f"data must hold at least {10 * NEIGHBOURS} samples, got {len(data.x)}")


def _score(
    fit: Callable[..., Sampler], seed: int, data: str, target: str | None, *, samples: Count = 1_000
) -> dict[str, float]:
    x = torch.from_numpy(load_samples(data, seed=seed).x)
    rows, held = split(len(x), (0.8, 0.2), seed)
    sampler, test = fit(x[rows], seed), x[held]
    start = time.perf_counter()
    made = sampler(samples, torch.Generator().manual_seed(seed)).detach()
    seconds = time.perf_counter() - start
    test = test[: max(samples, NEIGHBOURS + 1)]
    density, coverage = density_coverage(test, made)
    return {
        "sliced Wasserstein distance": sliced_wasserstein(made, test, seed=seed),
        "coverage": coverage,
        "density": density,
        "seconds a thousand samples": seconds * 1_000 / samples,
    }


TASK = Task(
    "generation", Samples, "sliced Wasserstein distance to held-out samples", "lower", "digits", _score,
    needs=require_split, references=("the training samples",),
)  # fmt: skip


@entry("generation", "the training samples")
def again(train: Tensor, seed: int) -> Sampler:
    """Return training samples drawn again: what no sampler is asked to beat."""
    return lambda n, draws: train[torch.randint(len(train), (n,), generator=draws)]


@entry("generation", "Gaussian mixture")
def gaussian_mixture(train: Tensor, seed: int) -> Sampler:
    """Return a mixture of the number of Gaussians with the least BIC, on the principal components that hold 99 %."""
    flat = train.flatten(1).double().numpy()
    pca = PCA(0.99, svd_solver="full").fit(flat) if flat.shape[1] > 2 else None
    points = flat if pca is None else pca.transform(flat)
    tried = [
        GaussianMixture(k, covariance_type="full", reg_covar=1e-4, random_state=seed).fit(points)
        for k in (1, 2, 5, 10, 20)
        if k < len(points)
    ]
    best = min(tried, key=lambda each: each.bic(points))

    def sample(n: int, draws: torch.Generator) -> Tensor:
        best.set_params(random_state=int(torch.randint(2**31, (), generator=draws)))
        made = best.sample(n)[0]
        made = made if pca is None else pca.inverse_transform(made)
        return torch.from_numpy(np.asarray(made, dtype=np.float32)).view(n, *train.shape[1:])

    return sample


def _diffusion(train: Tensor, seed: int, sampler: str, n_steps: int) -> Sampler:
    """Return a network trained by diffusers' noise (v-prediction: its error is as large at every step), and its sampler."""
    schedulers = needs("diffusers", "generative")
    noise = schedulers.DDPMScheduler(1_000, clip_sample=False, prediction_type="v_prediction")
    draws = torch.Generator().manual_seed(seed)

    def clock(k: Tensor) -> Tensor:
        return 1 - (k + 1) / 1_000

    def ask(net: nn.Module, x: Tensor, k: Tensor) -> Tensor:
        said = net(x, clock(k) if isinstance(net, TimeMLP) else k)
        return said if isinstance(said, Tensor) else said.sample

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        k = torch.randint(1_000, (len(x),), generator=draws)
        xi = torch.randn(x.shape, generator=draws)
        return (ask(net, noise.add_noise(x, xi, k), k) - noise.get_velocity(x, xi, k)).square().mean()

    net = trained(train, loss, seed)
    steps = getattr(schedulers, sampler).from_config(noise.config)
    steps.set_timesteps(n_steps)

    @torch.no_grad()
    def sample(n: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(n, *train.shape[1:], generator=generator)
        for k in steps.timesteps:
            x = steps.step(ask(net, x, k.expand(n)), k, x, generator=generator).prev_sample
        return x

    return sample


@entry("generation", "DDPM, 1,000 steps")
def ddpm(train: Tensor, seed: int) -> Sampler:
    """Return diffusion as diffusers has it, sampled step by step."""
    return _diffusion(train, seed, "DDPMScheduler", 1_000)


@entry("generation", "DDIM, 50 steps")
def ddim(train: Tensor, seed: int) -> Sampler:
    """Return the same, sampled in fifty steps."""
    return _diffusion(train, seed, "DDIMScheduler", 50)
