"""Claims about diffusion of fields: context makes points agree, on any space, and at other resolutions."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, comparison
from posterity.generative import (
    FieldDiffusion,
    FieldNet,
    field_image,
    image_field,
    sphere_field,
    volume_field,
)
from posterity.lab import metrics, nets, training
from posterity.lab.contact_sheet import contact_sheet
from posterity.lab.data import dataset, load_functions, load_samples, split
from posterity.lab.data.functions import FunctionData, Functions
from posterity.lab.data.samples import SampleData, Samples
from posterity.lab.tasks import entry
from posterity.lab.tasks.generation import STEPS

Width = Annotated[int, Between(4)]  # a multiple of the four heads
Octaves = Annotated[int, Between(0, 12)]

MOST = 2**16  # points of a function


def _globe(points: Tensor, degree: int) -> FunctionData:
    """Return Gaussian fields on unit vectors: harmonics to a degree, deviations of whose weights fall as 1 / (l + 1).

    By the addition theorem the harmonics of degree l add up to (2 l + 1) P_l of the cosine between two points.
    """
    x = points.double()
    weights = [(2 * each + 1) / (each + 1) ** 2 for each in range(degree + 1)]
    covariance = np.polynomial.legendre.legval((x @ x.T).clamp(-1, 1).numpy(), weights) / sum(weights)
    values, axes = np.linalg.eigh(covariance)
    root = torch.from_numpy(axes * np.sqrt(values.clip(0))).float()

    def draw(
        n: int, n_points: int, held_out: bool, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        return _shuffled(points, torch.randn(n, len(points), generator=rng) @ root.T, n_points, rng)

    return FunctionData(3, 1, draw)


def _shuffled(
    points: Tensor, y: Tensor, n_points: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return functions seen at the same points in random order, as a source of functions draws them."""
    order = torch.rand(y.shape, generator=rng).argsort(1)[:, :n_points]
    return points[order], y.gather(1, order)[..., None], torch.ones(order.shape, dtype=torch.bool), None


@dataset(Functions, "globe")
def globe(seed: int) -> FunctionData:
    """Return random fields of degree 2 at 64 Fibonacci points of the sphere."""
    k = torch.arange(64, dtype=torch.float64)
    z, angle = 1 - (2 * k + 1) / 64, k * np.pi * (3 - 5**0.5)
    around = torch.stack([angle.cos(), angle.sin()], 1) * (1 - z**2).sqrt()[:, None]
    return _globe(torch.cat([around, z[:, None]], 1).float(), 2)


@dataset(Functions, "globe-6")
def globe_6(seed: int) -> FunctionData:
    """Return random fields of degree 6 on the sphere, on a grid of 16 latitudes and 32 longitudes."""
    return _globe(sphere_field(torch.zeros(1, 1, 16, 32))[1][0], 6)


@dataset(Functions, "occupancy")
def occupancy(seed: int) -> FunctionData:
    """Return unions of three random ellipsoids in space, 1 inside and -1 outside, on 16 x 16 x 16 voxels."""
    points = volume_field(torch.zeros(1, 1, 16, 16, 16))[1][0]

    def draw(
        n: int, n_points: int, held_out: bool, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        centres = torch.rand(n, 3, 1, 3, generator=rng) - 0.5
        radii = 0.2 + 0.4 * torch.rand(n, 3, 1, 3, generator=rng)
        turns = torch.linalg.qr(torch.randn(n, 3, 3, 3, generator=rng))[0]
        y = torch.empty(n, len(points))
        for rows in torch.arange(n).split(50):
            away = (points - centres[rows]) @ turns[rows] / radii[rows]
            y[rows] = 2.0 * (away.square().sum(-1) < 1).any(1) - 1
        return _shuffled(points, y, n_points, rng)

    return FunctionData(3, 1, draw)


@dataset(Samples, "waves")
def waves(seed: int) -> SampleData:
    """Return 4,000 smooth images of 12 x 12 pixels: sums of nine products of cosines, up to one period a side."""
    at = image_field(torch.zeros(1, 1, 12, 12))[1][0]
    phases = (at[..., None] + 1) * torch.arange(3) * (torch.pi / 2)
    products = (phases[:, 0].cos()[..., None] * phases[:, 1].cos()[:, None]).flatten(1)
    weights = torch.randn(4_000, 9, generator=torch.Generator().manual_seed(seed))
    images = torch.tanh(weights / (1 + torch.arange(3.0)[:, None] + torch.arange(3.0)).flatten() @ products.T)
    return SampleData(images.view(-1, 1, 12, 12).numpy())


def _drawn(source: FunctionData, n: int, held_out: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Return coordinates (1, m, d) and values (n, m, c) of fields, their points in one order."""
    x, y, real, _ = source.draw(n, MOST, held_out, torch.Generator().manual_seed(2 * seed + held_out))
    order = torch.from_numpy(np.lexsort([each.numpy() for each in x.unbind(2)], axis=1))
    x, y = (each.take_along_dim(order[..., None], 1) for each in (x, y))
    if not real.all() or (x != x[:1]).any():
        raise ValueError("functions must all be seen at the same points")
    return x[:1], y


def _same_points(data: FunctionData, **_: Any) -> None:
    """Refuse functions that are not seen at the same points, of which correlations could not be taken."""
    if data.exact is not None:
        raise ValueError(
            "functions must all be seen at the same points, those of a process are seen anywhere"
        )
    _drawn(data, 20, False, 0)


class Pointwise(nn.Module):
    """The same network without context."""

    def __init__(self, net: FieldNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, x: Tensor, t: Tensor, *, coords: Tensor, context: Tensor, context_coords: Tensor
    ) -> Tensor:
        """Return the noise in each value on its own."""
        return self.net(x, t, coords=coords, context=context[:, :0], context_coords=context_coords[:, :0])


def _process(values: Tensor) -> FieldDiffusion:
    return FieldDiffusion(n_steps=100, clip=(float(values.min()), float(values.max())))


def _trained(
    trial: Trial, process: FieldDiffusion, values: Tensor, coords: Tensor, *, blind: bool = False, dim: int,
    n_context: int, n_query: int, steps: int, lr: float, n_frequencies: int = 3,
) -> nn.Module:  # fmt: skip
    """Return a network trained on random points of fields; both arms begin with the same weights."""
    with nets.seeded(trial.seed):
        net: Any = FieldNet(
            coords.shape[2], values.shape[2], dim=dim, n_latents=16, n_blocks=2, n_frequencies=n_frequencies
        )
    net = Pointwise(net) if blind else net
    m, draws = values.shape[1], torch.Generator().manual_seed(trial.seed)

    def loss(net: nn.Module, values: Tensor) -> Tensor:
        return process.loss(
            net, values, coords, n_context=min(n_context, m), n_query=min(n_query, m), generator=draws
        )

    history = training.fit(net, loss, (values,), steps=steps, batch_size=32, lr=lr, schedule="cosine", clip=1.0,
                           seed=trial.seed, device=trial.device)  # fmt: skip
    last = history.losses[-5:]
    trial.record(f"noise loss, {'pointwise' if blind else 'dpf'}", sum(last) / len(last))
    return net


def _correlations(y: Tensor, varies: Tensor) -> Tensor:
    return y.flatten(1)[:, varies].double().T.corrcoef().nan_to_num(0)


@comparison(
    paper="diffusion-fields",
    says="With context a model of fields draws points that agree; without it each is drawn on its own.",
    where="Zhuang et al., Section 4, score field networks with and without context pairs",
    arms=("pointwise", "dpf"),
    metric="mean absolute error of the correlations between points",
    better="lower",
    smallest={"steps": 2, "n_train": 50, "n_test": 50, "n_samples": 20, "dim": 16, "n_points": 64},
    check=_same_points,
)
def context(
    trial: Trial, data: Functions = "globe", n_context: Count = 32, n_query: Count = 32, steps: Count = 500,
    lr: Positive = 4e-3, dim: Width = 64, n_points: Count = 256, n_train: Count = 3_000, n_test: Count = 2_000,
    n_samples: Count = 400,
) -> dict[str, float]:  # fmt: skip
    """Train one network twice, with context and without, and draw fields at the points of the data.

    Arms share initial weights, batches, settings and the noise that samples start from; neither is tuned apart. The
    pointwise arm keeps its latents, which have nothing to read: it can learn the law of each point, and its error is
    the size of the correlations themselves. The record has the sliced Wasserstein distances, the losses on noise, and
    the error of the training data. On the digits (``data="digits"``) 500 steps are too few for the network to find
    any use of the context: the arms are then alike. Of ``data="occupancy"`` and ``data="globe-6"`` 256 points are
    drawn; fields of one's own are a table of functions, all seen at the same points. With the schedule "cosine" and
    few deterministic steps, samples spread too far. Towards the paper's scale: ``dim=512, n_context=1024,
    n_query=1024`` and some 100,000 steps, on a GPU.
    """
    source = load_functions(data, seed=trial.seed)
    coords, train = _drawn(source, n_train, False, trial.seed)
    _, test = _drawn(source, n_test, True, trial.seed)
    train, test = ((y - train.mean((0, 1))) / train.std((0, 1)) for y in (train, test))
    process, m = _process(train), coords.shape[1]
    asked = torch.randperm(m, generator=torch.Generator().manual_seed(trial.seed))[:n_points].sort().values
    test = test[:, asked]
    varies = test.flatten(1).std(0) > 0
    truth = _correlations(test, varies)
    known = train[:, asked]
    trial.record("training data", float((_correlations(known, varies) - truth).abs().mean()))
    error = {}
    for arm in ("pointwise", "dpf"):
        net = _trained(trial, process, train, coords, blind=arm == "pointwise", dim=dim, n_context=n_context,
                       n_query=n_query, steps=steps, lr=lr)  # fmt: skip
        made = process.sample(
            net, coords[:, asked], train.shape[2], n_samples, n_context=min(n_context, len(asked)), n_steps=25,
            sampler="ddim", generator=torch.Generator().manual_seed(trial.seed),
        ).cpu()  # fmt: skip
        error[arm] = float((_correlations(made, varies) - truth).abs().mean())
        trial.record(
            f"sliced W2, {arm}", metrics.sliced_wasserstein(made, test, n_directions=300, seed=trial.seed)
        )
    return error


def _images(data: SampleData, **_: Any) -> None:
    """Refuse points, which have no resolution."""
    if data.x.ndim != 4:
        raise ValueError(f"samples must be images, got points of {data.x.shape[1]} coordinates")


@comparison(
    paper="diffusion-fields",
    says="Asked at twice the resolution it was trained at, a model of fields is as good as its samples enlarged.",
    where="Zhuang et al., Section 4, fields are sampled at any points",
    arms=("bicubic", "dpf"),
    metric="sliced W2 to held-out images, of samples of twice the size averaged back",
    better="lower",
    reason="Trained briefly on one grid, the network errs more between its pixels than an enlargement does.",
    smallest={"steps": 2, "n_samples": 20, "dim": 16},
    check=_images,
)
def resolution(
    trial: Trial, data: Samples = "waves", n_context: Count = 32, n_query: Count = 32, steps: Count = 500,
    lr: Positive = 4e-3, dim: Width = 64, n_frequencies: Octaves = 2,
    n_samples: Count = 200,
) -> dict[str, float]:  # fmt: skip
    """Train on random points of images, and draw images of their size and of twice their size, from one network.

    Means of 2 x 2 pixels are compared with held-out images. An enlargement of the smaller samples, averaged back, is
    nearly what it was, so this baseline is what the model can do where it was trained; a draw is what to hope for.
    The record has the smaller samples and the training images. As many points are context as in training: with 128
    in place of 32 the distance about doubles. Few octaves (``n_frequencies``) keep a field smooth between its
    pixels. Images of one's own are an ``.npz`` or a folder, such as ``data="digits", n_frequencies=3``.
    """
    x = torch.from_numpy(load_samples(data, seed=trial.seed).x)
    rows, held = split(len(x), (0.8, 0.2), trial.seed)
    (values, coords), test = image_field(x[rows]), x[held]
    process = _process(values)
    net = _trained(
        trial, process, values, coords, dim=dim, n_context=n_context, n_query=n_query, steps=steps, lr=lr,
        n_frequencies=n_frequencies,
    )  # fmt: skip
    h, w = x.shape[2:]
    made = {}
    for times in (1, 2):
        size = times * h, times * w
        _, asked = image_field(torch.zeros(1, 1, *size))
        fields = process.sample(
            net,
            asked,
            x.shape[1],
            n_samples,
            n_context=min(n_context, h * w),
            n_steps=25,
            sampler="ddim",
            chunk_size=256,
            generator=torch.Generator().manual_seed(trial.seed),
        )
        made[times] = field_image(fields.cpu(), *size)
    enlarged = F.interpolate(made[1], scale_factor=2, mode="bicubic", align_corners=False)

    def away(images: Tensor) -> float:
        return metrics.sliced_wasserstein(images, test, n_directions=300, seed=trial.seed)

    trial.record("sliced W2, training images", away(x[rows]))
    trial.record("sliced W2, samples of the trained size", away(made[1]))
    arms = {"bicubic": enlarged, "dpf": made[2]}
    for arm, images in arms.items():
        trial.picture(arm, contact_sheet(images, low=-1.0))
    return {arm: away(F.avg_pool2d(images, 2)) for arm, images in arms.items()}


@entry("generation", "field diffusion, 25 steps", paper="diffusion-fields")
def fields(train: Tensor, seed: int) -> Callable[[int, torch.Generator], Tensor]:
    """Return a model of images as fields in the plane, or of points as fields on a line, trained on 64 points a step."""
    shape = tuple(train.shape[1:])
    if len(shape) == 3:
        values, coords = image_field(train)
    else:
        values, coords = train[..., None], torch.linspace(-1, 1, shape[0])[None, :, None]
    process, draws = _process(values), torch.Generator().manual_seed(seed)
    some = min(32, values.shape[1])
    with nets.seeded(seed):
        net = FieldNet(coords.shape[2], values.shape[2], dim=64, n_latents=16, n_blocks=1, n_frequencies=4)

    def loss(net: nn.Module, values: Tensor) -> Tensor:
        return process.loss(net, values, coords, n_context=some, n_query=some, generator=draws)

    training.fit(
        net, loss, (values,), steps=STEPS, batch_size=16, lr=3e-3, schedule="cosine", clip=1.0, seed=seed
    )

    def sample(n: int, generator: torch.Generator) -> Tensor:
        made = process.sample(
            net,
            coords,
            values.shape[2],
            n,
            n_context=some,
            n_steps=25,
            sampler="ddim",
            chunk_size=256,
            generator=generator,
        )
        return field_image(made, *shape[1:]) if len(shape) == 3 else made[..., 0]

    return sample
