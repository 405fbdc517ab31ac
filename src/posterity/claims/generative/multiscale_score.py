"""Claims about local networks over scales: they see what those on pixels cannot, need small fields, and enlarge."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from posterity.claims import Between, Count, Positive, Share, Trial, comparison
from posterity.generative import LocalCNN, MultiscaleDenoiser, haar, inverse_haar, locality_curve
from posterity.lab import nets, training
from posterity.lab.contact_sheet import contact_sheet
from posterity.lab.data import PictureData, Pictures, dataset, load_images, load_pictures

Field = Annotated[int, Between(5, 63)]
Scales = Annotated[int, Between(1, 6)]
Side = Annotated[int, Between(4, 1024)]
Step = Annotated[float, Between(0, 0.99, above=True)]
Options = dict[str, Any]


@dataset(Pictures, "cifar10")
def cifar10(seed: int) -> PictureData:
    """Return the images of CIFAR-10, without their labels."""
    return PictureData(list((255 * load_images("cifar10").x).round().astype(np.uint8)))


def _fits(
    data: Any, side: int, n_layers: int, receptive_field: int, larger: int = 5, n_scales: int = 1, **_: Any
) -> None:
    """Refuse fields that the layers cannot make, and pictures too small or few."""
    for field in (receptive_field, larger):
        if field % 2 == 0 or field > 2 * n_layers + 1:
            raise ValueError(
                f"receptive fields must be odd, at most {2 * n_layers + 1} for n_layers={n_layers}, got {field}"
            )
    if side % 2**n_scales:
        raise ValueError(f"side must be a multiple of {2**n_scales}, for n_scales={n_scales}, got {side}")
    if len(data.pictures) < 2:
        raise ValueError("at least two pictures are needed, to learn from and to test on")
    for x in data.pictures:
        if min(x.shape[1:]) < side:
            raise ValueError(f"pictures must have at least {side} pixels a side, one has {x.shape[1:]}")


def _crops(data: str, seed: int, side: int, n_train: int, n_test: int) -> tuple[Tensor, Tensor]:
    """Return grey crops in units of the range, the mean of the training pictures taken off, of different pictures.

    Of two pictures, an even seed trains on the first and an odd one on the second.
    """
    pictures, rng = load_pictures(data).pictures, np.random.default_rng(seed)
    order = np.roll([0, 1], seed) if len(pictures) == 2 else rng.permutation(len(pictures))
    n_held_out = max(1, len(order) // 5)
    parts = []
    for rows, n in ((order[:-n_held_out], n_train), (order[-n_held_out:], n_test)):
        made = np.empty((n, 1, side, side), np.float32)
        for k in range(n):
            x = pictures[rows[rng.integers(len(rows))]]
            top, left = (rng.integers(size - side + 1) for size in x.shape[1:])
            made[k, 0] = x[:, top : top + side, left : left + side].mean(0) / 255
        parts.append(torch.from_numpy(made))
    mean = parts[0].mean()
    return parts[0] - mean, parts[1] - mean


def _train(
    trial: Trial, model: MultiscaleDenoiser, level: Any, x: Tensor, steps: int, batch: int, lr: float
) -> float:
    """Train the network of a level and return the seconds."""
    net: Any = model.low_net if level == "low" else model.detail_nets[level]
    noisy = torch.Generator().manual_seed(trial.seed)
    start = time.process_time()
    training.fit(net, lambda _, x: model.loss(x, level, generator=noisy), (x,), steps=steps, batch_size=batch, lr=lr,
                 schedule="cosine", clip=1.0, seed=trial.seed, device=trial.device)  # fmt: skip
    return time.process_time() - start


def _pixels(
    trial: Trial, x: Tensor, field: int, options: Options, steps: int, lr: float
) -> MultiscaleDenoiser:
    """Return a local network on pixels: a cascade without details."""
    with nets.seeded(trial.seed):
        model = MultiscaleDenoiser(LocalCNN(1, 1, receptive_field=field, **options), [], rescale=False)
    seconds = _train(trial, model, "low", x, steps, 8, lr)
    trial.record(f"seconds, pixel, field {field}", seconds)
    return model


def _cascade(
    trial: Trial, x: Tensor, n_scales: int, field: int, options: Options, steps: int, lr: float
) -> MultiscaleDenoiser:
    """Return a trained cascade, whose networks see about as many values a step as the one on pixels."""
    with nets.seeded(trial.seed):
        model = MultiscaleDenoiser.build(
            n_scales,
            receptive_field=field,
            low_receptive_field=min(13, 2 * options["n_layers"] + 1),
            **options,
        )
    seconds = _train(trial, model, "low", x, steps, 32, lr)
    for level in range(n_scales):
        seconds += _train(trial, model, level, x, steps, 8 * 4**level, lr)
    trial.record(f"seconds, multiscale, field {field}", seconds)
    return model


def _psnr(trial: Trial, x: Tensor, denoise: Callable[[Tensor], Any], sigma: float) -> float:
    """Return how near the clean images a denoiser comes, in dB; the same noise for all."""
    with torch.no_grad():
        found = denoise(_noisy(trial, x, sigma).to(trial.device)).cpu()
    return -10 * math.log10(float((found - x).square().mean()))


def _noisy(trial: Trial, x: Tensor, sigma: float) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(trial.seed + 1))


@comparison(
    paper="multiscale-score",
    says="Local networks over scales denoise better than a network of the same field on pixels.",
    where="Kadkhodaie et al., Section 3 and the figure of denoising by receptive field (CelebA)",
    arms=("pixel", "multiscale"),
    metric="PSNR of denoised held-out images in dB, noise of half their range",
    better="higher",
    smallest={"steps": 2, "side": 16, "n_train": 64, "n_test": 4, "width": 4},
    check=_fits,
)
def denoises(
    trial: Trial, data: Pictures = "photos", receptive_field: Field = 9, n_scales: Scales = 2, side: Side = 32,
    n_layers: Count = 6, width: Count = 32, steps: Count = 400, lr: Positive = 2e-3, sigma: Positive = 0.5,
    n_train: Count = 4096, n_test: Count = 256,
) -> dict[str, float]:  # fmt: skip
    """Train a network on pixels, and those of a cascade, for as many steps each on about as many values.

    A mean of 9 x 9 pixels leaves noise of at least 0.5 / 9; at the third scale the same field spans the image. Depth,
    width, crops and noise are shared, neither arm is tuned, and the record has the processor seconds of both. Of two
    photographs one is for training and the other for the test, in turns; of more pictures a fifth is held out. The
    curves show other levels of noise: at 0.1 of the range, where a pixel's neighbours say enough, the network on pixels
    is the better one. They also have the control that drops all details. Trained so briefly, it does as well as
    the cascade or better: photographs of this size are smooth, and details are conditioned on means that were denoised,
    where training saw clean ones. With norms and ``predict="noise"``, which take ten times as long to learn, the
    comparison comes out the other way. Towards the paper's scale: ``data=FOLDER`` of CelebA, ``side=160, n_scales=3,
    receptive_field=13, n_layers=21, width=64`` and some 100,000 steps, on a GPU.
    """
    x, clean = _crops(data, trial.seed, side, n_train, n_test)
    options = {"n_layers": n_layers, "width": width, "norm": False, "predict": "clean"}
    pixel = _pixels(trial, x, receptive_field, options, steps, lr)
    cascade = _cascade(trial, x, n_scales, receptive_field, options, steps, lr)
    arms = {"pixel": pixel.denoise, "multiscale": cascade.denoise}
    control = partial(cascade.denoise, use_details=False)
    for level in (0.1, 0.25, 0.5, 1.0):
        for arm, denoise in (arms | {"multiscale, no details": control}).items():
            trial.track(f"PSNR, {arm}", level, _psnr(trial, clean, denoise, level))
    trial.record("PSNR, multiscale, no details", _psnr(trial, clean, control, sigma))
    noisy, black, white = _noisy(trial, clean, sigma), float(clean.min()), float(clean.max())
    shown = {"held-out images": lambda y: clean[: len(y)], "noisy": lambda y: y} | arms
    for name, see in shown.items():
        with torch.no_grad():
            seen = see(noisy[:16].to(trial.device))
        trial.picture(name, contact_sheet(seen, low=black, high=white))
    return {arm: _psnr(trial, clean, denoise, sigma) for arm, denoise in arms.items()}


@comparison(
    paper="multiscale-score",
    says="Over scales a larger receptive field gains less than on pixels: what is left is local.",
    where="Kadkhodaie et al., Section 3, the Markov property by receptive field",
    arms=("pixel", "multiscale"),
    metric="gain in PSNR in dB from the larger field, noise of half the range",
    better="lower",
    smallest={"steps": 2, "side": 16, "n_train": 64, "n_test": 4, "width": 4},
    check=_fits,
)
def locality(
    trial: Trial, data: Pictures = "photos", receptive_field: Field = 9, larger: Field = 23, n_scales: Scales = 2,
    side: Side = 32, n_layers: Count = 11, width: Count = 16, steps: Count = 300, lr: Positive = 2e-3,
    sigma: Positive = 0.5, n_train: Count = 4096, n_test: Count = 256,
) -> dict[str, float]:  # fmt: skip
    """Train both arms of `denoises` with two fields at the same depth, and take the difference.

    The smallest image keeps its network of 13 x 13, which sees all of it. The record has the four values.
    """
    x, clean = _crops(data, trial.seed, side, n_train, n_test)
    options = {"n_layers": n_layers, "width": width, "norm": False, "predict": "clean"}
    makers = {
        "pixel": lambda field: _pixels(trial, x, field, options, steps, lr).denoise,
        "multiscale": lambda field: _cascade(trial, x, n_scales, field, options, steps, lr).denoise,
    }
    gains = {}
    for arm, fit in makers.items():
        noise = torch.Generator().manual_seed(trial.seed + 1)
        curve = locality_curve(
            fit, clean.to(trial.device), [sigma], [receptive_field, larger], generator=noise
        )
        values = [float(psnr) for psnr in curve.values()]
        for field, value in zip(curve, values, strict=True):
            trial.record(f"PSNR, {arm}, field {field}", value)
        gains[arm] = values[1] - values[0]
    return gains


@comparison(
    paper="multiscale-score",
    says="Details that the cascade draws for a small image bring the enlarged one nearer to the true one.",
    where="Kadkhodaie et al., Section 4 and the figure of super-resolution",
    arms=("noiseless-upsampling", "multiscale"),
    metric="PSNR of held-out images of twice the side in dB",
    better="higher",
    smallest={"steps": 2, "side": 16, "n_train": 64, "n_test": 4, "width": 4},
    check=_fits,
)
def enlarges(
    trial: Trial, data: Pictures = "photo-tiles", receptive_field: Field = 9, side: Side = 32, n_layers: Count = 6,
    width: Count = 32, steps: Count = 1_000, batch: Count = 32, lr: Positive = 3e-3, least_noise: Share = 0.3,
    h0: Step = 0.05, sigma_end: Positive = 0.1, n_train: Count = 4096, n_test: Count = 256,
) -> dict[str, float]:  # fmt: skip
    """Train the details of one level, and climb to a mode of them from noise, against details of zero.

    Block means are the same in both arms, and right. Trained on noise from 0.3 of the range up, where details drown,
    the network learns what the means say of them, and the ascent ends near that. Trained on all noise
    (``least_noise=0``) it goes on to a sharper mode, which is no nearer than zero: a typical image errs by up to twice
    the variance that the best guess leaves. So it does where training and held-out pictures differ in sharpness, as
    the two whole photographs do (``data="photos"``).
    """
    x, clean = _crops(data, trial.seed, side, n_train, n_test)
    options = {"n_layers": n_layers, "width": width, "norm": False, "predict": "clean"}
    with nets.seeded(trial.seed):
        net = LocalCNN(4, 3, receptive_field=receptive_field, **options)
    model = MultiscaleDenoiser(torch.zeros_like, [net], noise=(least_noise, 1.0))
    trial.record("seconds", _train(trial, model, 0, x, steps, batch, lr))
    low, details = haar(clean)
    large = model.super_resolve(low.to(trial.device), h0=h0, beta=1.0, sigma_end=sigma_end,
                                generator=torch.Generator().manual_seed(trial.seed))  # fmt: skip
    found = {"noiseless-upsampling": inverse_haar(low, torch.zeros_like(details)), "multiscale": large.cpu()}
    return {arm: -10 * math.log10(float((image - clean).square().mean())) for arm, image in found.items()}
