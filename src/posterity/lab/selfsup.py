"""Self-supervision: views, a small encoder, pre-training with any loss of two views, and what its features are worth.

A loss is ``loss(z1, z2) -> scalar`` of two projected views (batch, dim); a view is ``view(x, generator) -> x``;
an encoder is any module from images (n, channels, height, width) to features (n, dim). Arms of a seed start at
the same weights and see the same batches and views, so that they differ in the loss alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._branches import projection_head
from posterity.lab.data.images import ImageData, require_images
from posterity.lab.data.splits import split
from posterity.lab.nets import seeded

__all__ = [
    "Parts",
    "Pretrained",
    "descend",
    "effective_rank",
    "embedded",
    "encoder_for",
    "feature_dim",
    "few_of_each",
    "image_parts",
    "knn_accuracy",
    "photo_view",
    "pretrain",
    "probe",
    "require_parts",
    "small_view",
    "view_for",
    "worth",
]

View = Callable[[Tensor, torch.Generator], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
TEST = 400  # images to test on
DRAWS = 10  # of the labels of a probe: one draw of few adds more spread than training does


class Parts(NamedTuple):
    """Images to learn from, whose labels only a probe sees, and images to test on; torch tensors."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    n_classes: int


def image_parts(images: ImageData, seed: int, n_test: int = TEST) -> Parts:
    """Return images split by the trial's seed, colours standardised by the first part.

    Parameters
    ----------
    images : ImageData
    seed : int
    n_test : int, default=400
        At most a third of all are kept to test on.

    Returns
    -------
    Parts
    """
    n = len(images.y)
    share = min(n_test, n // 3) / n
    train, test = split(n, (1 - share, share), seed, stratify=images.y)
    x = torch.from_numpy(images.x)
    if x.shape[1] == 3:
        mean, std = (f(x[train], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        x = (x - mean) / std.clamp_min(1e-6)
    y = torch.from_numpy(images.y)
    return Parts(x[train], y[train], x[test], y[test], len(images.classes))


def require_parts(data: ImageData, labels_per_class: int = 10, **_: Any) -> None:
    """Refuse images too few to learn from, to give some labels a class of, and to test on.

    Parameters
    ----------
    data : ImageData
    labels_per_class : int, default=10
    **_
        Other parameters of the claim.
    """
    require_images(data)
    least = max(60, 3 * len(data.classes) * labels_per_class)
    if len(data.y) < least:
        raise ValueError(
            f"at least {least} images are needed for {labels_per_class} labels of each of {len(data.classes)} "
            f"classes, to leave some to test on; has {len(data.y)}"
        )


def small_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return digits and other small grey images turned, moved, scaled, brighter or darker, with noise.

    Turned by up to 20 degrees, moved by up to a tenth of their size, scaled by 0.8 to 1.2, multiplied by 0.7
    to 1.3, with noise of standard deviation 0.1. Never flipped.

    Parameters
    ----------
    x : Tensor of shape (n, channels, height, width)
    generator : torch.Generator
        On any device; what it draws is moved to the data.

    Returns
    -------
    Tensor
    """
    n = len(x)
    angle = math.radians(20) * (2 * _uniform((n,), x, generator) - 1)
    move = 0.2 * (2 * _uniform((n, 2), x, generator) - 1)  # of half the side
    scale = 0.8 + 0.4 * _uniform((n,), x, generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    moved = _warped(x, turn / scale[:, None, None], move)
    bright = 0.7 + 0.6 * _uniform((n, 1, 1, 1), x, generator)
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    return bright * moved + 0.1 * noise


def photo_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return photographs cropped to a fifth or more of their area, mirrored half the time, colours changed.

    Brightness, contrast and saturation are multiplied by 0.6 to 1.4 and the hue turned by up to 0.1 of the
    circle in four of five; one of five becomes grey (Chen et al. 2020).

    Parameters
    ----------
    x : Tensor of shape (n, 3, height, width)
        Colours standardised, or in [0, 1].
    generator : torch.Generator
        On any device; what it draws is moved to the data.

    Returns
    -------
    Tensor
    """
    n = len(x)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * _uniform((n,), x, generator)

    side, ratio = between(0.2, 1).sqrt(), (between(math.log(3 / 4), math.log(4 / 3)) / 2).exp()
    width, height = (side * ratio).clamp_max(1), (side / ratio).clamp_max(1)
    flip = torch.where(_uniform((n,), x, generator) < 0.5, -1.0, 1.0).to(x)
    zero = torch.zeros_like(side)
    matrix = torch.stack([width * flip, zero, zero, height], 1).view(n, 2, 2)
    room = torch.stack([1 - width, 1 - height], 1)
    z = _warped(x, matrix, room * (2 * _uniform((n, 2), x, generator) - 1))
    jitter = _uniform((n,), x, generator) < 0.8
    bright, contrast, colour = (torch.where(jitter, between(0.6, 1.4), 1.0) for _ in range(3))
    turn = torch.where(jitter, between(-0.1, 0.1), 0.0) * 2 * math.pi
    colour = torch.where(_uniform((n,), x, generator) < 0.2, 0.0, colour)
    # luma and two axes of colour (YIQ): saturation scales these, the hue turns them
    luma = x.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    y, i, q = torch.einsum("kc,nchw->knhw", luma, z)
    mean = y.mean((1, 2), keepdim=True)
    y = bright[:, None, None] * (mean + contrast[:, None, None] * (y - mean))
    cos, sin = ((f(turn) * colour)[:, None, None] for f in (torch.cos, torch.sin))
    return torch.einsum(
        "ck,knhw->nchw", torch.linalg.inv(luma), torch.stack([y, cos * i - sin * q, sin * i + cos * q])
    )


def view_for(x: Tensor) -> View:
    """Return the view for images: `photo_view` where they have three channels, else `small_view`.

    Parameters
    ----------
    x : Tensor of shape (n, channels, height, width)

    Returns
    -------
    callable
    """
    return photo_view if x.shape[1] == 3 else small_view


def encoder_for(x: Tensor, seed: int, *, width: int | None = None, dim: int | None = None) -> nn.Sequential:
    """Return a small convolutional encoder with random weights of a seed.

    Parameters
    ----------
    x : Tensor of shape (n, channels, height, width)
        Images to come: photographs of 16 pixels or more get a stage more, and twice the width.
    seed : int
    width, dim : int, optional
        Channels of the first and of all later stages: 16 and 64, of photographs 32 and 128.

    Returns
    -------
    nn.Sequential
    """
    large = min(x.shape[2:]) >= 16
    width, dim = width or (32 if large else 16), dim or (128 if large else 64)
    with seeded(seed):
        layers: list[nn.Module] = []
        for k, (n_in, n_out) in enumerate([(x.shape[1], width), (width, dim), *[(dim, dim)] * (1 + large)]):
            layers += [
                nn.Conv2d(n_in, n_out, 3, stride=2 if k else 1, padding=1),
                nn.BatchNorm2d(n_out),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Pretrained(NamedTuple):
    """An encoder, its projector, both in eval mode on the CPU; the loss of each step; seconds of training."""

    encoder: nn.Module
    projector: nn.Module
    losses: np.ndarray
    seconds: float


def pretrain(
    loss: Loss, x: Tensor, *, steps: int = 300, batch_size: int = 128, lr: float = 2e-3, weight_decay: float = 1e-4,
    projector: Sequence[int] = (256, 128), last_norm: bool = False, seed: int = 0, device: str = "cpu",
    view: View | None = None, encoder: nn.Module | None = None,
    on_step: Callable[[int, nn.Module], object] | None = None,
) -> Pretrained:  # fmt: skip
    """Train an encoder and a projector on two views of each image.

    AdamW at a rate that rises over a tenth of the steps and falls to 0; batches are drawn with replacement.

    Parameters
    ----------
    loss : callable
        ``loss(z1, z2) -> scalar``. A module is trained along, and ends in eval mode on the CPU.
    x : Tensor of shape (n, channels, height, width)
    steps, batch_size : int
    lr, weight_decay : float
    projector : sequence of int
        Sizes of the layers after the features.
    last_norm : bool, default=False
        Whether the projector ends in a BatchNorm without scale and shift.
    seed : int
        Decides weights, batches and views.
    device : str
    view : callable, optional
        ``view(x, generator) -> x``; that of `view_for`.
    encoder : nn.Module, optional
        That of `encoder_for`; trained in place.
    on_step : callable, optional
        ``on_step(step, net)`` after each step, from 1; ``net`` maps images to projected views.

    Returns
    -------
    Pretrained
    """
    start = time.perf_counter()
    encoder = encoder or encoder_for(x, seed)
    dim = feature_dim(encoder, x)
    with seeded(seed + 1):
        head = projection_head([dim, *projector], last_norm=last_norm)
    net = nn.Sequential(encoder, head).to(device).train()
    trained = [*net.parameters()]
    if isinstance(loss, nn.Module):
        loss.to(device).train()
        trained += [p for p in loss.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    losses = descend(
        lambda rows, see: loss(net(see()), net(see())), opt, x, steps=steps, batch_size=batch_size, seed=seed,
        device=device, view=view, on_step=None if on_step is None else lambda step: on_step(step + 1, net),
    )  # fmt: skip
    net.cpu().eval()
    if isinstance(loss, nn.Module):
        loss.cpu().eval()
    return Pretrained(encoder, head, losses, time.perf_counter() - start)


def descend(
    value: Callable[[Tensor, Callable[[], Tensor]], Tensor], opt: torch.optim.Optimizer, x: Tensor, *, steps: int,
    batch_size: int = 128, seed: int = 0, device: str = "cpu", view: View | None = None,
    on_step: Callable[[int], object] | None = None,
) -> np.ndarray:  # fmt: skip
    """Train on views of batches drawn with replacement, at rates that rise over a tenth of the steps and fall to 0.

    Parameters
    ----------
    value : callable
        ``value(rows, see) -> scalar``: the loss of images ``x[rows]``, of which ``see()`` gives a new view.
    opt : torch.optim.Optimizer
        Whose rates are the highest.
    x : Tensor of shape (n, channels, height, width)
    steps, batch_size : int
    seed : int
        Decides batches and views.
    device : str
    view : callable, optional
        ``view(x, generator) -> x``; that of `view_for`.
    on_step : callable, optional
        ``on_step(step)`` after each step, from 0.

    Returns
    -------
    ndarray of shape (steps,)
        The losses.
    """
    draws, view = torch.Generator().manual_seed(seed), view or view_for(x)
    highest = [group["lr"] for group in opt.param_groups]
    rising = 0.15 if steps == 10 else 0.1  # OneCycleLR divides by the steps of a tenth less one
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, highest, total_steps=max(steps, 2), pct_start=rising)
    losses = []
    with seeded(seed + 2):
        for step in range(steps):
            rows = torch.randint(len(x), (batch_size,), generator=draws)
            batch = x[rows].to(device)
            found = value(rows, lambda batch=batch: view(batch, draws))
            if not torch.isfinite(found):
                raise ValueError(f"the loss is {float(found)} at step {step + 1}: lower lr, got {highest[0]}")
            opt.zero_grad()
            found.backward()
            opt.step()
            rate.step()
            losses.append(float(found.detach()))
            if on_step is not None:
                on_step(step)
    return np.asarray(losses)


def feature_dim(encoder: nn.Module, x: Tensor) -> int:
    """Return how many features an encoder gives.

    Parameters
    ----------
    encoder : nn.Module
    x : Tensor of shape (n, channels, height, width)

    Returns
    -------
    int
    """
    return embedded(encoder, x[:1]).shape[1]


@torch.no_grad()
def embedded(net: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Return the features of images in eval mode; modes are left as they were.

    Parameters
    ----------
    net : nn.Module
    x : Tensor of shape (n, channels, height, width)
    batch_size : int, default=512

    Returns
    -------
    Tensor of shape (n, dim)
        On the CPU.
    """
    modes = [(module, module.training) for module in net.modules()]
    device = next((p.device for p in net.parameters()), x.device)
    try:
        net.eval()
        return torch.cat([net(part.to(device)).flatten(1).cpu() for part in x.split(batch_size)])
    finally:
        for module, training in modes:
            module.training = training


def few_of_each(y: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Return rows of so many labels a class, or of all; fewer are the first of more.

    Parameters
    ----------
    y : Tensor of shape (n,)
    per_class : int or None
    seed : int

    Returns
    -------
    Tensor of shape (rows,)
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    if per_class is None:
        return order
    return torch.cat([order[y[order] == k][:per_class] for k in y.unique()])


def probe(train: Tensor, y: Tensor, test: Tensor, y_test: Tensor, rows: Tensor) -> float:
    """Return the test accuracy of a logistic regression on the labels of ``rows``.

    Features are standardised by all of ``train``.

    Parameters
    ----------
    train : Tensor of shape (n, dim)
    y : Tensor of shape (n,)
    test : Tensor of shape (n_test, dim)
    y_test : Tensor of shape (n_test,)
    rows : Tensor of shape (labels,)

    Returns
    -------
    float
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    model = LogisticRegression(C=1, max_iter=500).fit(((train - mean) / std)[rows].numpy(), y[rows].numpy())
    return float(model.score(((test - mean) / std).numpy(), y_test.numpy()))


def knn_accuracy(train: Tensor, y: Tensor, test: Tensor, y_test: Tensor, k: int = 20) -> float:
    """Return the test accuracy of the vote of the k nearest training features, by cosine.

    Parameters
    ----------
    train : Tensor of shape (n, dim)
    y : Tensor of shape (n,)
    test : Tensor of shape (n_test, dim)
    y_test : Tensor of shape (n_test,)
    k : int, default=20

    Returns
    -------
    float
    """
    unit = [F.normalize(z, dim=1).numpy() for z in (train, test)]
    model = KNeighborsClassifier(min(k, len(train))).fit(unit[0], y.numpy())
    return float(model.score(unit[1], y_test.numpy()))


def worth(net: nn.Module, parts: Parts, seed: int, labels_per_class: int | None = 10) -> dict[str, float]:
    """Return what the features of an encoder are worth: test accuracies of a linear probe and of neighbours.

    Parameters
    ----------
    net : nn.Module
        Of images to features.
    parts : Parts
    seed : int
        Decides which labels the probe gets.
    labels_per_class : int, optional
        Of the probe, whose accuracy is a mean over ten draws of them; None gives it all. Neighbours have all.

    Returns
    -------
    dict
        ``"linear"`` and ``"knn"``.
    """
    train, test = (embedded(net, x) for x in (parts.x, parts.x_test))
    given = train, parts.y, test, parts.y_test
    draws = range(seed, seed + (1 if labels_per_class is None else DRAWS))
    linear = [probe(*given, few_of_each(parts.y, labels_per_class, draw)) for draw in draws]
    return {"linear": float(np.mean(linear)), "knn": knn_accuracy(*given)}


def effective_rank(z: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of rows of norm 1.

    Parameters
    ----------
    z : Tensor of shape (n, dim)

    Returns
    -------
    float
    """
    s = torch.linalg.svdvals(F.normalize(z.double(), dim=1))
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def _warped(x: Tensor, matrix: Tensor, move: Tensor) -> Tensor:
    """Return images read at ``matrix`` times the place plus ``move``; zero outside."""
    grid = F.affine_grid(torch.cat([matrix, move[:, :, None]], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def _uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(x)
