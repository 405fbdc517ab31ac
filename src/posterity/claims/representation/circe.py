"""Claims about CIRCE: a predictor ignores the distractor where it shifts, and a step costs less than with HSCIC."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from posterity.claims import Between, Count, NotNegative, Trial, comparison
from posterity.lab import nets, training
from posterity.lab.costs import seconds_in_turns
from posterity.lab.data import ImageData, Images, dataset, load_images
from posterity.lab.data.images import require_images
from posterity.lab.data.splits import split
from posterity.lab.memory import peak_bytes
from posterity.representation import CIRCE, hscic

Batch = Annotated[int, Between(4)]
HeldOut = Annotated[int, Between(10)]
NOISE = 0.3  # of the distractor, and of the place that tells the target
REACH = 1 + 3 * NOISE  # places beyond it are put there
SIDE = 8  # pixels of the largest image that is placed; the canvas has three times its side


@dataset(Images, "blobs")
def blobs(seed: int) -> ImageData:
    """Return 200 round blobs of 4x4 pixels, narrow and wide, of different brightness."""
    rng = np.random.default_rng(seed)
    wide = np.arange(200) % 2
    width = rng.uniform(0.7, 0.9, 200) + 0.4 * wide
    place = np.arange(4) - 1.5
    apart = place[:, None] ** 2 + place**2
    x = rng.uniform(0.8, 1.0, (200, 1, 1)) * np.exp(-apart / (2 * width[:, None, None] ** 2))
    return ImageData(
        x[:, None].astype(np.float32), wide, ("narrow", "wide"), "blobs: 200 of 4x4, narrow and wide"
    )


def _placed(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Return canvases of three times the side, an image of each at a place in [-1, 1] x [-1, 1]."""
    n, channels, *side = images.shape
    theta = 3 * torch.eye(2, 3).repeat(n, 1, 1)
    theta[:, :, 2] = -2 * torch.stack([across, down], 1)
    grid = F.affine_grid(theta, [n, channels, *(3 * s for s in side)], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _sample(images: Tensor, n: int, rng: torch.Generator, *, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return canvases, targets and distractors; ``shifted``: the distractor says nothing of the target."""
    y = 2 * torch.rand(n, generator=rng) - 1
    z, down = (y + NOISE * torch.randn(n, generator=rng) for _ in range(2))
    if shifted:
        z = z[torch.randperm(n, generator=rng)]
    drawn = images[torch.randint(len(images), (n,), generator=rng)]
    return _placed(drawn, (z / REACH).clamp(-1, 1), (down / REACH).clamp(-1, 1)), y, z


def _image_parts(data: str, seed: int) -> Sequence[Tensor]:
    """Return images to train and to test with, of at most eight pixels a side."""
    images = load_images(data)
    rows = split(len(images.y), (0.6, 0.4), seed)
    parts = [torch.from_numpy(images.x[each]).float() for each in rows]
    height, width = (min(s, SIDE) for s in parts[0].shape[2:])
    return [F.adaptive_avg_pool2d(part, (height, width)) for part in parts]


def _require(data: ImageData, **_: Any) -> None:
    require_images(data)


@comparison(
    paper="circe",
    says="A predictor trained with CIRCE ignores the distractor: where that is shifted, its error is lower.",
    where="Pogodin et al., Section 4",
    arms=("erm", "circe"),
    metric="mean squared error on images whose distractor was permuted",
    better="lower",
    smallest={"steps": 3, "n_train": 60, "held_out": 20, "n_test": 40},
    check=_require,
)
def shift(
    trial: Trial,
    data: Images = "blobs",
    n_train: Batch = 1500,
    held_out: HeldOut = 300,
    n_test: Count = 1000,
    steps: Count = 300,
    batch_size: Batch = 256,
    weight: NotNegative = 100.0,
) -> dict[str, float]:
    """Train a network to tell y of an image that lies at (z, y + noise), where z is y + noise too.

    The best prediction uses both places, CIRCE forbids the first; in the test z belongs to another image. The
    penalty is on the prediction itself; its weight was fixed in advance, and neither arm sees the shift. The curves
    have a tenth of the weight too, and what the penalty costs where nothing shifts. Of other images (``data``) each
    example places one, drawn anew, on a canvas of three times its side.
    """
    parts, rng = _image_parts(data, trial.seed), torch.Generator().manual_seed(trial.seed)
    train = _sample(parts[0], n_train, rng, shifted=False)
    _, *held = _sample(parts[0], held_out, rng, shifted=False)
    tests = {
        name: _sample(parts[1], n_test, rng, shifted=name == "shifted") for name in ("as trained", "shifted")
    }
    found = {}
    for strength in (0.0, weight / 10, weight):
        net = nets.mlp(train[0][0].numel(), 1, width=64, depth=2, seed=trial.seed)
        penalty = CIRCE(sigma2_x=1.0, sigma2_z=0.5, sigma2_y=(1.0, 0.1, 0.01)).to(trial.device)
        penalty.fit(*(part.to(trial.device) for part in held))

        def loss(net: Any, x: Tensor, y: Tensor, z: Tensor, weight=strength, penalty=penalty) -> Tensor:
            found = net(x)[:, 0]
            fit = F.mse_loss(found, y)
            return fit + weight * penalty(found, y, z) if weight else fit

        training.fit(
            net, loss, train, steps=steps, batch_size=batch_size, lr=1e-3, weight_decay=0.01, optimizer="adamw",
            seed=trial.seed, device=trial.device,
        )  # fmt: skip
        for name, (x, y, _) in tests.items():
            with torch.no_grad():
                error = float(F.mse_loss(net.cpu()(x)[:, 0], y))
            trial.track(f"squared error by weight, {name}", strength, error)
            if name == "shifted":
                found[strength] = error
            elif strength != weight / 10:
                trial.record(f"squared error without a shift, {'circe' if strength else 'erm'}", error)
    return {"erm": found[0.0], "circe": found[weight]}


@comparison(
    paper="circe",
    says="One regression in advance makes a step cheaper than HSCIC, which regresses in every batch.",
    where="Pogodin et al., Section 2.3",
    arms=("hscic", "circe"),
    metric="seconds of the penalty and its gradient, over those of a product of matrices timed in turn",
    better="lower",
    timed=True,
    smallest={"batch_size": 64, "held_out": 64, "rounds": 1},
)
def cheap(
    trial: Trial,
    batch_size: Annotated[int, Between(32)] = 1024,
    held_out: HeldOut = 1000,
    dim: Count = 64,
    rounds: Count = 3,
) -> dict[str, float]:
    """Run both penalties in turns on random features; curves have seconds and the most bytes of tensors alive.

    They are drawn against the rows of a batch and the features' dimension. The record has the seconds of the
    regression, which is made once.
    """
    rng = torch.Generator().manual_seed(trial.seed)
    y = 2 * torch.rand(batch_size + held_out, generator=rng) - 1
    z = y + NOISE * torch.randn(len(y), generator=rng)
    penalty = CIRCE(sigma2_x=float(dim), sigma2_z=0.5, sigma2_y=(1.0, 0.1, 0.01))

    def works(n: int, d: int) -> list[Callable[[], object]]:
        x = torch.randn(n, d, generator=rng).requires_grad_()
        rows = y[:n], z[:n]
        options = {
            "ridge": penalty.ridge_,
            "sigma2_x": float(dim),
            "sigma2_z": 0.5,
            "sigma2_y": penalty.sigma2_y_,
        }
        return [
            lambda: torch.autograd.grad(hscic(x, rows[1], rows[0], **options), x),
            lambda: torch.autograd.grad(penalty(x, *rows), x),
        ]  # fmt: skip

    advance = seconds_in_turns([lambda: penalty.fit(y[batch_size:], z[batch_size:])], 1)
    trial.record("seconds of the regression in advance", float(advance.min()))
    factors = [torch.randn(1024, 1024, generator=rng) for _ in range(2)]
    found = {}
    for n, d in (
        *((batch_size // part, dim) for part in (8, 4, 2, 1)),
        *((batch_size // 4, dim * part) for part in (4, 16)),
    ):
        steps = works(n, d)
        seconds = seconds_in_turns([*steps, lambda: factors[0] @ factors[1]], rounds)
        for k, name in enumerate(("hscic", "circe")):
            for across, at, drawn in (
                ("rows of a batch", n, d == dim),
                ("dimension", d, n == batch_size // 4),
            ):
                if drawn:
                    trial.track(f"seconds by {across}: {name}", at, float(np.median(seconds[:, k])))
                    trial.track(f"MiB alive by {across}: {name}", at, peak_bytes(steps[k]) / 2**20)
            if n == batch_size:
                found[name] = float(np.median(seconds[:, k] / seconds[:, -1]))
    return found
