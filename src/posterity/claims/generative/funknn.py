"""Claims about images as functions: learned interpolation, sparse gradients, and how exact derivatives are."""

import math
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from posterity.claims import Between, Count, PartOfAll, Positive, Share, Trial, comparison
from posterity.generative import (
    FunkNN,
    funknn_pairs,
    image_gradient,
    image_patches,
    pixel_grid,
    solve_continuous,
    upsample,
)
from posterity.lab import nets
from posterity.lab.contact_sheet import contact_sheet
from posterity.lab.data import Pictures, load_pictures

Patch = Annotated[int, Between(1, 31)]
Side = Annotated[int, Between(32, 1024)]
Small = Annotated[int, Between(8, 256)]


def _fits(data: Any, side: int, patch_size: int = 1, reduce: int = 1, **_: Any) -> None:
    """Refuse pictures too small or few, and settings that no network takes."""
    if patch_size % 2 == 0:
        raise ValueError(f"patch_size must be odd, got {patch_size}")
    if side % 4:
        raise ValueError(f"side must be a multiple of 4, got {side}")
    if len(data.pictures) < 2:
        raise ValueError("at least two pictures are needed, to learn from and to test on")
    for x in data.pictures:
        if min(x.shape[1:]) < reduce * side:
            raise ValueError(
                f"pictures must have at least {reduce * side} pixels a side, one has {x.shape[1:]}"
            )


def _parts(data: str, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return pictures to learn from, and a fifth to test on; of two, an even seed learns from the first."""
    pictures, rng = load_pictures(data).pictures, np.random.default_rng(seed)
    order = np.roll([0, 1], seed) if len(pictures) == 2 else rng.permutation(len(pictures))
    n_held_out = max(1, len(order) // 5)
    return [pictures[k] for k in order[:-n_held_out]], [pictures[k] for k in order[-n_held_out:]]


def _crops(pictures: list[np.ndarray], n: int, side: int, rng: np.random.Generator) -> Tensor:
    """Return square crops at random places, in [0, 1]."""
    found = []
    for _ in range(n):
        x = pictures[rng.integers(len(pictures))]
        top, left = (rng.integers(size - side + 1) for size in x.shape[1:])
        found.append(x[:, top : top + side, left : left + side])
    return torch.from_numpy(np.stack(found)).float() / 255


def _psnr(found: Tensor, true: Tensor) -> float:
    return -10 * math.log10(float((found - true).square().mean()))


def _smaller(images: Tensor, factor: int) -> Tensor:
    return F.interpolate(images, scale_factor=1 / factor, mode="bilinear", antialias=True)


@comparison(
    paper="funknn",
    says="Learned interpolation beats classical interpolation, also on images unlike those of training.",
    where="Khorashadizadeh et al., Sections 3.1 and 4, super-resolution and out-of-distribution tables",
    arms=("bicubic", "funknn"),
    metric="PSNR at random pixels of images enlarged to twice their side, in dB",
    better="higher",
    seeds=10,
    smallest={"steps": 3, "side": 32, "n_test": 2, "batch": 2, "n_coords": 16},
    check=_fits,
)
def beats_bicubic(
    trial: Trial, data: Pictures = "photos", side: Side = 128, patch_size: Patch = 9, steps: Count = 1_200,
    batch: Count = 8, n_coords: Count = 128, lr: Positive = 1e-3, n_test: Count = 24,
) -> dict[str, float]:  # fmt: skip
    """Train on crops of one photograph, reduced at random, and enlarge crops of the other, reduced by 2.

    The baseline is the interpolation that the network starts from, and has nothing to tune; neither has the network's
    training, Adam with a cosine on an L1 loss. Of two photographs one is for training and the other for the test, in
    turns, so that what is tested is unlike what was learned from; of more pictures a fifth is held out. The record has
    torch's own bicubic (a = -3/4) beside Keys', and enlargement by 4, which was not trained for. A third to
    half of the steps pass before the last layer, which starts at zero, has found a direction; at a rate of 3e-3 there is no
    difference after 400. Towards the paper's scale: ``data=FOLDER`` of CelebA-HQ, ``batch=64, n_coords=512`` and 100,000 steps.
    """
    learn, held_out = _parts(data, trial.seed)
    rng, generator = np.random.default_rng(trial.seed), torch.Generator().manual_seed(trial.seed)
    test = _crops(held_out, n_test, side, rng)
    channels = test.shape[1]
    with nets.seeded(trial.seed):
        net = FunkNN(channels, patch_size=patch_size, hidden=(256, 128, 64)).to(trial.device)
    plain = FunkNN(channels, patch_size=1, hidden=(1,))  # untrained: the kernel alone

    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        crops = _crops(learn, batch, side, rng)
        low, coords, target = (
            x.to(trial.device) for x in funknn_pairs(crops, n_coords=n_coords, generator=generator)
        )
        loss = F.l1_loss(net(low, coords), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        if step % 100 == 99:
            trial.track("training loss", step + 1, float(loss.detach()))
    net.cpu()

    picked = torch.randint(side**2, (n_test, 1024), generator=generator)
    coords = pixel_grid(side)[0][picked]
    true = test.flatten(2).gather(2, picked[:, None].expand(-1, channels, -1)).transpose(1, 2)
    found = {}
    for factor in (4, 2):
        low = _smaller(test, factor)
        with torch.no_grad():
            found = {"bicubic": _psnr(plain(low, coords), true), "funknn": _psnr(net(low, coords), true)}
        torchs = F.interpolate(low, size=(side, side), mode="bicubic")
        for arm, value in (found | {"torch's bicubic": _psnr(torchs, test)}).items():
            trial.record(f"PSNR, {factor} times the side, {arm}", value)
    shown = test[:8, :, :64, :64]
    low = _smaller(shown, 2)
    views = {"reduced": low, "held-out images": shown}
    views |= {"bicubic": upsample(plain, low, shown.shape[2]), "funknn": upsample(net, low, shown.shape[2])}
    for name, images in views.items():
        trial.picture(name, contact_sheet(images[:, : 3 if channels == 3 else 1]))
    return found


@comparison(
    paper="funknn",
    says="From gradients at a fifth of the points an image is recovered better by exact derivatives than by differences.",
    where="Khorashadizadeh et al., Section 4, images from sparse derivatives",
    arms=("finite-differences", "exact"),
    metric="PSNR of the images after the best affine map of their greys, in dB",
    better="higher",
    reason="Which of the two is better depends on the crops and the weight chosen for them, by up to 2 dB either way.",
    smallest={"steps": 1, "n_validation": 1, "n_test": 1, "side": 8},
    check=_fits,
)
def sparse_gradients(
    trial: Trial, data: Pictures = "photos", side: Small = 32, reduce: Count = 4, part: PartOfAll = 0.2,
    steps: Count = 400, lr: Positive = 1e-2, n_validation: Count = 2, n_test: Count = 4,
) -> dict[str, float]:  # fmt: skip
    """Recover pixels of crops from gradients where these are largest, with as many steps of the same optimiser.

    The gradients are those of the crops' interpolation by a kernel of higher order than either arm has, at points of a
    grid twice as fine. The baseline differentiates by differences over one pixel of linear interpolation. The weight of
    the total variation, of 0.1, 0.3 and 1, is chosen for each arm on crops of another picture.

    Crops are reduced by ``reduce`` first, which makes them as sharp as their pixels allow: differences err by the
    square of the frequency. At full size (``reduce=1``) photographs are smooth and the differences are good enough; with
    hardly any total variation what decides is how the few points hang together, which favours the differences, that
    reach further.
    """
    learn, held_out = _parts(data, trial.seed)
    rng = np.random.default_rng(trial.seed)
    validation, test = (
        _smaller(_crops(pictures, n, reduce * side, rng), reduce).mean(1, keepdim=True).to(trial.device)
        for pictures, n in ((learn, n_validation), (held_out, n_test))
    )
    found = {}
    for arm in ("finite-differences", "exact"):
        scores = {
            tv: _psnr(_recovered(validation, arm, part, steps, lr, tv), validation) for tv in (0.1, 0.3, 1.0)
        }
        tv = max(scores, key=lambda tv: scores[tv])
        trial.record(f"total variation, {arm}", tv)
        images = _recovered(test, arm, part, steps, lr, tv)
        found[arm] = _psnr(images, test)
        trial.picture(arm, contact_sheet(images))
    trial.picture("true images", contact_sheet(test))
    return found


def _recovered(true: Tensor, arm: str, part: float, steps: int, lr: float, tv: float) -> Tensor:
    """Return images recovered from the largest gradients of true ones, their greys mapped to those."""
    side, device = true.shape[2], true.device
    grid = pixel_grid(2 * side, device=device)
    sharp = FunkNN(1, patch_size=1, hidden=(1,), kernel="cubic6").to(device)  # untrained: the kernel alone
    slopes = image_gradient(sharp, true, grid, create_graph=False)
    rows = slopes.square().sum((2, 3)).topk(max(1, round(part * grid.shape[1]))).indices
    coords, y = grid[0][rows], slopes.gather(1, rows[..., None, None].expand(-1, -1, 1, 2))
    step = torch.eye(2, device=device) / side  # half a pixel

    def differences(f: Any) -> Tensor:
        return torch.stack([(f(coords + h) - f(coords - h)) / (2 / side) for h in step], -1)

    measure = differences if arm == "finite-differences" else lambda f: f.gradient(coords)
    kernel: Any = "bilinear" if arm == "finite-differences" else "cubic"
    net = FunkNN(1, patch_size=1, hidden=(1,), kernel=kernel).to(device)
    at = pixel_grid(side, device=device)
    start = torch.full_like(true, 0.5)
    return _mapped(
        solve_continuous(net, measure, y, latent=start, coords=at, n_steps=steps, lr=lr, tv=tv).image, true
    )


def _mapped(found: Tensor, true: Tensor) -> Tensor:
    """Return images with the greys, shifted and stretched, that are nearest to the true ones."""
    x, y = found.flatten(1), true.flatten(1)
    x0, y0 = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    slope = ((x - x0) * (y - y0)).sum(1, keepdim=True) / (x - x0).square().sum(1, keepdim=True).clamp_min(
        1e-12
    )
    return (y0 + slope * (x - x0)).view(true.shape)


@comparison(
    paper="funknn",
    says="The gradient of interpolated samples is nearer to the true one by differentiation than by differences.",
    where="Khorashadizadeh et al., Section 2, differentiable interpolation",
    arms=("finite-differences", "cubic"),
    metric="relative L2 error of the gradient at random points",
    better="lower",
    smallest={"n_points": 16},
)
def exact_gradient(
    trial: Trial, side: Small = 32, n_waves: Count = 6, band: Share = 0.5, n_points: Count = 4096
) -> dict[str, float]:
    """Sample a sum of random cosines, of frequencies below ``band`` of Nyquist, and differentiate it between samples.

    Differences are over one pixel, of linear interpolation. Points are three pixels or more from the border, where the
    image is mirrored and the wave is not. The record has the kernel of 6 x 6. Towards ``band=1`` all three fail.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    reach = band * math.pi * side / 2  # radians a unit of [-1, 1]; Nyquist is pi a pixel

    def uniform(*size: int) -> Tensor:
        return 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1

    waves, phases = reach * uniform(n_waves, 2), math.pi * uniform(n_waves)
    image = (pixel_grid(side, dtype=torch.float64) @ waves.T + phases).cos().sum(2).view(1, 1, side, side)
    coords = uniform(1, n_points, 2) * (1 - 6 / side)
    true = -((coords @ waves.T + phases).sin() @ waves)

    def value(at: Tensor) -> Tensor:
        return image_patches(image, at, 1, kernel="bilinear").flatten(2)

    step = torch.eye(2, dtype=torch.float64) / side  # half a pixel
    found = {
        "finite-differences": torch.cat([(value(coords + h) - value(coords - h)) * side / 2 for h in step], 2)
    }
    for arm, kernel in (("cubic6", "cubic6"), ("cubic", "cubic")):
        net = FunkNN(1, patch_size=1, hidden=(1,), kernel=kernel).double()
        found[arm] = image_gradient(net, image, coords, create_graph=False)[:, :, 0]
    errors = {arm: float((slope - true).norm() / true.norm()) for arm, slope in found.items()}
    trial.record("relative error, cubic6", errors.pop("cubic6"))
    return errors
