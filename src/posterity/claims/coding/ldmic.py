"""Claims about views that are coded alone and decoded together: less loss at the same bytes, less so with less overlap."""

import math
import time
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.coding import LDMIC
from posterity.lab import nets, training
from posterity.lab.data import Pictures, load_pictures, split
from posterity.lab.metrics import rank_correlation

DOWN = 4  # rows of pixels by which views lie apart, at most: half of what is horizontal
Offset = Annotated[int, Between(0, 64)]
Side = Annotated[int, Between(4, 256)]
Width = Annotated[int, Between(16, 512)]


def _fits(data: Any, side: int, offset: int, width: int, farthest: int = 0, **_: Any) -> None:
    offset = max(offset, farthest)
    if width % 16:
        raise ValueError(f"width must be a multiple of 16, got {width}")
    for x in data.pictures:
        if min(x.shape[1:]) < side + offset:
            raise ValueError(f"pictures must have at least {side + offset} pixels a side for two views, one has {x.shape[1:]}")  # fmt: skip


def _views(
    pictures: list[np.ndarray], n: int, side: int, offsets: np.ndarray, noise: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return what two noisy cameras see (n, 2, c, side, side) and the scenes without noise.

    The second camera stands so many pixels to the right, and up to a quarter of that lower; each has a gain of its own.
    """
    clean = np.empty((n, 2, len(pictures[0]), side, side), np.float32)
    for i, right in enumerate(offsets):
        x, down = pictures[rng.integers(len(pictures))], rng.integers(right // DOWN + 1)
        top, left = (rng.integers(size - side - far + 1) for size, far in zip(x.shape[1:], (down, right), strict=True))  # fmt: skip
        clean[i, 0] = x[:, top : top + side, left : left + side]
        clean[i, 1] = x[:, top + down : top + down + side, left + right : left + right + side]
    scenes = np.clip(clean / 255 * rng.uniform(0.9, 1.1, (n, 2, 1, 1, 1)), 0, 1)
    seen = np.clip(scenes + rng.normal(0, noise, scenes.shape), 0, 1)
    return torch.from_numpy(seen).float(), torch.from_numpy(scenes).float()


class _Study:
    """One codec, trained on single views, and two decoders that begin as its own: each view by itself, or with the other.

    The first gets the same modules, the view itself in the other's place. Both see the same latents.
    """

    def __init__(
        self, trial: Trial, data: str, side: int, offset: int, noise: float, lmbda: float, width: int,
        steps: int, finetuning: int, lr: float,
    ) -> None:  # fmt: skip
        pictures, rng = load_pictures(data).pictures, np.random.default_rng(trial.seed)
        train, test = split(len(pictures), (2 / 3, 1 / 3), trial.seed)
        self.held_out = [pictures[i] for i in test]
        self.side, self.noise, self.lmbda, self.rng = side, noise, lmbda, rng
        n = 16 * max(steps, finetuning)
        x, scenes = _views(
            [pictures[i] for i in train], n, side, rng.integers(offset + 1, size=n), noise, rng
        )
        made = {"in_channels": x.shape[2], "hidden": width, "latent": width, "downsample": 4, "context": "none"}  # fmt: skip
        with nets.seeded(trial.seed):
            self.codec = LDMIC(**made, joint=False)
            start = LDMIC(**made)
        noisy = torch.Generator().manual_seed(trial.seed) if trial.device == "cpu" else None
        options = {"batch_size": 16, "schedule": "cosine", "clip": 1.0, "seed": trial.seed, "device": trial.device}  # fmt: skip
        training.fit(self.codec, lambda net, x: net(x, lmbda, generator=noisy).loss, (x,), steps=steps, lr=lr, **options)  # fmt: skip
        self.codec.cpu().eval().freeze()
        start.load_state_dict(self.codec.state_dict(), strict=False)
        for name, value in start.named_parameters():  # transfer begins as the identity
            if "refine.0.skip" in name or ("refine" in name and "conv2" in name):
                nn.init.zeros_(value)
        latents, state = self.codec.latents(x), start.state_dict()
        self.decoders = {}
        for arm in ("independent", "joint"):
            net = LDMIC(**made)
            net.load_state_dict(state)
            for part in (net.encoder, net.hyper_encoder, net.hyper_decoder):
                part.requires_grad_(False)
            net.mixture.requires_grad_(False)

            def error(net: Any, y: Tensor, scene: Tensor, arm: str = arm) -> Tensor:
                return (_decoded(net, y, arm) - scene).square().mean()

            training.fit(net, error, (latents, scenes), steps=finetuning, lr=lr, **options)
            self.decoders[arm] = net.cpu().eval()

    @torch.no_grad()
    def measure(self, trial: Trial, offsets: np.ndarray) -> tuple[float, dict[str, float]]:
        """Return bits a pixel of the streams of held-out views, and the squared error of each decoder."""
        x, scenes = _views(self.held_out, len(offsets), self.side, offsets, self.noise, self.rng)
        started = time.perf_counter()
        streams = self.codec.compress(x)
        trial.record("encoding, MB/s", x.numel() / 1e6 / (time.perf_counter() - started))
        started = time.perf_counter()
        y = self.codec.decode_latents(streams)
        trial.record("decoding of latents, MB/s", x.numel() / 1e6 / (time.perf_counter() - started))
        bpp = 8 * sum(map(len, streams)) / (x.numel() / x.shape[2])
        trial.record("bits a pixel", bpp)
        errors = {}
        for arm, net in self.decoders.items():
            errors[arm] = float((_decoded(net, y, arm).clamp(0, 1) - scenes).square().mean())
            trial.record(f"PSNR, {arm}", -10 * math.log10(errors[arm]))
        return bpp, errors


def _decoded(net: LDMIC, y: Tensor, arm: str) -> Tensor:
    """Return the images of latents, of views together or of each with itself."""
    if arm == "joint":
        return net.reconstruct(y)
    twice = y.flatten(0, 1)[:, None].expand(-1, 2, *y.shape[2:])
    return net.reconstruct(twice)[:, 0].unflatten(0, y.shape[:2])


@comparison(
    paper="ldmic",
    says="Views that are encoded independently are decoded better together than each alone, at the same bytes.",
    where="Zhang, Shao, Zhang, Section 4.2 and Figure 3 (InStereo2K, Cityscapes, WildTrack)",
    arms=("independent", "joint"),
    metric="bits a pixel of the streams plus lmbda times the mean squared error, held-out noisy views against clean scenes",
    better="lower",
    smallest={"steps": 2, "finetuning": 2, "width": 16, "n_test": 20},
    check=_fits,
)
def together(
    trial: Trial, data: Pictures = "photo-tiles", side: Side = 8, offset: Offset = 2, noise: Positive = 0.2,
    lmbda: Positive = 256.0, width: Width = 64, steps: Count = 150, finetuning: Count = 150, lr: Positive = 3e-3,
    n_test: Count = 512,
) -> dict[str, float]:  # fmt: skip
    """Decode the same streams twice, by decoders that were trained further from one codec, with the other view and without.

    A pair is two overlapping crops of a picture with gains and noise of their own. The codec learns to keep what its
    camera sees, the decoders what was there: two looks at a scene halve the noise. The attention hands over few numbers a
    view, as many as keys times values, so that small views have most of it; in views of 32 x 32 pixels, trained as
    briefly, the difference is under a hundredth. Training both arms from nothing for a minute shows none either.
    """
    study = _Study(trial, data, side, offset, noise, lmbda, width, steps, finetuning, lr)
    bpp, errors = study.measure(trial, study.rng.integers(offset + 1, size=n_test))
    return {arm: bpp + lmbda * error for arm, error in errors.items()}


@trend(
    paper="ldmic",
    says="The gain of joint decoding falls as views overlap less.",
    where="Zhang, Shao, Zhang, Section 4.2",
    metric="Spearman correlation of the views' distance in pixels with the share of the squared error that joint decoding saves",
    high=-0.7,
    seeds=10,
    smallest={"steps": 2, "finetuning": 2, "width": 16, "n_test": 20},
    check=_fits,
)
def overlap(
    trial: Trial, data: Pictures = "photo-tiles", side: Side = 8, offset: Offset = 2, noise: Positive = 0.2,
    lmbda: Positive = 256.0, width: Width = 64, steps: Count = 150, finetuning: Count = 150, lr: Positive = 3e-3,
    n_test: Count = 512, farthest: Offset = 32,
) -> float:  # fmt: skip
    """Train both decoders on views up to ``offset`` pixels apart, and compare them at five distances up to ``farthest``.

    From ``side`` pixels on views do not overlap at all. Trained on distances up to 32, the joint decoder learns to take
    no more of the other view than light and colour, which tell as much from afar: the gain is small then at all of them.
    """
    study = _Study(trial, data, side, offset, noise, lmbda, width, steps, finetuning, lr)
    distances = np.linspace(0, farthest, 5).round().astype(int)
    gains = []
    for distance in distances:
        _, errors = study.measure(trial, np.full(n_test, distance))
        gains.append(1 - errors["joint"] / errors["independent"])
        trial.track("share of the squared error saved, by distance", distance, gains[-1])
    return rank_correlation(distances, gains)
