"""Claims about geometry control: generated images teach the poses they came with, and held-out folds find wrong labels."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Several, Trial, comparison
from posterity.generative import (
    GeometryControl,
    Mesh,
    Pose,
    Rendering,
    TinyControlNet,
    consistency_filter,
    load_obj,
    pose_error,
    primitive,
    render,
    sample_poses,
)
from posterity.generative.meshes import KINDS
from posterity.lab import nets, training
from posterity.lab.contact_sheet import contact_sheet

Many = Annotated[int, Between(8)]
Wrong = Annotated[float, Between(0.05, 0.5)]
Look = Literal["familiar", "strange"]
SIDE, FOV, MESHES = 32, 40.0, 8
RANGES = {"elevation": (0.0, 0.7), "theta": (0.0, 0.0), "distance": (2.8, 3.8)}


class Labelled(NamedTuple):
    """Images and their poses."""

    x: Tensor
    pose: Pose


def _fits(shape: str, **_: object) -> None:
    _objects(shape, 0, 1)


def _folds_fit(shape: str, n_images: int, n_folds: int, wrong: float, **_: object) -> None:
    _fits(shape)
    if n_images < 4 * n_folds:
        raise ValueError(f"n_images must be at least {4 * n_folds}, four a fold, got {n_images}")
    if round(wrong * n_images) < 1:
        raise ValueError(f"wrong must be at least {1 / n_images:g}, an image of {n_images}, got {wrong}")


def _objects(shape: str, seed: int, n: int) -> list[Mesh]:
    """Return n meshes of a kind of primitive, or of an OBJ file or a folder of them, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    if shape in KINDS:
        return [primitive(shape, generator=generator) for _ in range(n)]
    path = Path(shape)
    files = sorted(path.rglob("*.obj")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(
            f"shape must be one of {', '.join(KINDS)}, an OBJ file or a folder of them, got {shape!r}"
        )
    rows = torch.randperm(len(files), generator=generator).repeat(-(-n // len(files)))[:n]
    upright = torch.tensor([1.0, -1.0, 1.0])  # in files y is up
    meshes = [load_obj(files[row]) for row in rows.tolist()]
    return [mesh._replace(vertices=mesh.vertices[:, [0, 2, 1]] * upright) for mesh in meshes]


def _views(meshes: list[Mesh], n: int, generator: torch.Generator) -> list[tuple[Mesh, Pose]]:
    """Return n poses, spread over the meshes."""
    share = [n // len(meshes) + (k < n % len(meshes)) for k in range(len(meshes))]
    return [
        (mesh, sample_poses(m, generator=generator, **RANGES))
        for mesh, m in zip(meshes, share, strict=True)
        if m
    ]


def _joined(poses: list[Pose]) -> Pose:
    return Pose(*(torch.cat(part) for part in zip(*poses, strict=True)))


def _shaded(seen: Rendering, albedo: Tensor, ground: Tensor, light: Tensor, ambient: Tensor) -> Tensor:
    """Return images of surfaces of (n, f, 3) albedo before grounds (n, 3, h, w), each lit in its own way."""
    n = len(seen.faces)
    surface = albedo[torch.arange(n)[:, None, None], seen.faces[:, 0].clamp_min(0)].movedim(3, 1)
    direction = F.normalize(light, dim=1)[..., None, None]
    lit = (seen.normals * direction).sum(1, keepdim=True).clamp_min(0)
    ambient = ambient[:, None, None, None]
    return torch.where(seen.mask, surface * (ambient + (1 - ambient) * lit), ground)


def _familiar(seen: Rendering, n_faces: int, generator: torch.Generator) -> Tensor:
    """Return objects of one colour each before a plain ground, lit from where all are."""
    n = len(seen.faces)
    albedo = (0.2 + 0.6 * torch.rand(n, 1, 3, generator=generator)).expand(-1, n_faces, -1)
    ground = (0.75 + 0.25 * torch.rand(n, 1, 1, 1, generator=generator)).expand(-1, 3, SIDE, SIDE)
    light = torch.tensor([[0.3, 0.5, 1.0]]).expand(n, -1)
    return _shaded(seen, albedo, ground, light, torch.full((n,), 0.35))


def _strange(seen: Rendering, n_faces: int, generator: torch.Generator) -> Tensor:
    """Return objects of patches before clouds of colour, lit from anywhere in front, and noise."""
    n = len(seen.faces)
    base = torch.rand(n, 1, 3, generator=generator)
    patches = torch.rand(n, n_faces, 3, generator=generator)
    spread = 0.5 * torch.rand(n, 1, 1, generator=generator)
    frequency = torch.hypot(
        torch.fft.fftfreq(SIDE, 1 / SIDE)[:, None], torch.fft.rfftfreq(SIDE, 1 / SIDE)[None]
    )
    noise = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    clouds = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp_min(1), s=(SIDE, SIDE))
    clouds = torch.sigmoid(1.5 * clouds / clouds.std((1, 2, 3), keepdim=True))
    light = 2 * torch.rand(n, 3, generator=generator) - 1
    light[:, 2] = 0.3 + light[:, 2].abs()
    ambient = 0.2 + 0.3 * torch.rand(n, generator=generator)
    images = _shaded(seen, base + spread * (patches - base), clouds, light, ambient)
    return (images + 0.03 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _pictures(views: list[tuple[Mesh, Pose]], look: str, generator: torch.Generator) -> Labelled:
    """Return images of views in a look."""
    paint = {"familiar": _familiar, "strange": _strange}[look]
    x = [paint(render(mesh, pose, size=SIDE, fov=FOV), len(mesh.faces), generator) for mesh, pose in views]
    return Labelled(torch.cat(x), _joined([pose for _, pose in views]))


def _target(pose: Pose) -> Tensor:
    return torch.stack([pose.azimuth.sin(), pose.azimuth.cos(), pose.elevation], 1)


def _network(width: int, seed: int) -> nn.Module:
    """Return a small network from 32 x 32 pixels to sine and cosine of the azimuth and the elevation."""
    layers: list[nn.Module] = []
    channels = 3
    with nets.seeded(seed):
        for k in range(3):
            layers += [
                nn.Conv2d(channels, width * 2**k, 3, stride=2, padding=1),
                nn.BatchNorm2d(width * 2**k),
                nn.ReLU(),
            ]
            channels = width * 2**k
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 64), nn.ReLU(), nn.Linear(64, 3))


@torch.no_grad()
def _read(net: nn.Module, x: Tensor) -> Tensor:
    """Return azimuth, elevation and no in-plane rotation, (n, 3)."""
    device = next(net.parameters()).device
    said = torch.cat([net(part.to(device)).cpu() for part in x.split(256)])
    return torch.stack([torch.atan2(said[:, 0], said[:, 1]), said[:, 2], 0 * said[:, 2]], 1)


def _degrees(net: nn.Module, test: Labelled) -> float:
    """Return the median pose error."""
    said = _read(net, test.x)
    read = Pose(said[:, 0], said[:, 1], said[:, 2], test.pose.distance)
    return float(pose_error(read, test.pose).rad2deg().median())


@comparison(
    paper="geometry-control",
    says="Images generated along edges of renders, labelled for free, improve pose estimation out of distribution.",
    where="Ma et al., Section 4, pose estimation on PASCAL3D+ and OOD-CV",
    arms=("real", "real + renders", "real + controlled"),
    metric="median pose error out of distribution, degrees",
    better="lower",
    seeds=10,
    smallest={"steps": 2, "n_real": 8, "n_extra": 8, "n_test": 8, "sampling_steps": 1, "width": 4},
    check=_fits,
)
def labels_for_free(
    trial: Trial, shape: str = "car", n_real: Many = 64, n_extra: Many = 1_000, n_test: Many = 300,
    steps: Count = 600, batch: Count = 64, width: Count = 16, lr: Positive = 2e-3, sampling_steps: Count = 8,
) -> dict[str, float]:  # fmt: skip
    """Train one network three times, with or without more images of known pose.

    "Real" images are of one colour each before a plain ground; out of distribution, objects are patchwork before
    clouds, lit from elsewhere: neither the looks of the real images nor those that the small generator was trained on.
    The real, the extra and the test images are of different objects of one kind. The plain renders and the generated
    images have the same poses, and with either half of each batch is real; the arms share initial weights, steps and
    learning rate. The small generator's images are blurred: out of distribution they are little better than plain
    renders, and worse in distribution, of which the record has the errors. Your own shapes: ``shape="<OBJ file, or
    folder of them, y up>"``, which the small generator paints as it paints what it knows.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    objects = _objects(shape, trial.seed, 3 * MESHES)
    real = _pictures(_views(objects[:MESHES], n_real, generator), "familiar", generator)
    held_out = objects[MESHES : 2 * MESHES]
    tests = {
        look: _pictures(_views(held_out, n_test, generator), look, generator)
        for look in ("familiar", "strange")
    }
    name = shape if shape in KINDS else Path(shape).stem
    model = TinyControlNet.pretrained().to(trial.device)
    model.n_steps = sampling_steps
    control = GeometryControl(model)
    views = _views(objects[2 * MESHES :], n_extra, generator)
    made = [
        control.generate(mesh, name, len(pose.azimuth), pose=pose, batch_size=64, generator=generator)
        for mesh, pose in views
    ]
    extra = _joined([pose for _, pose in views])
    renders = Labelled(torch.cat([render(mesh, pose, size=SIDE).image for mesh, pose in views]), extra)
    controlled = Labelled(torch.cat([part.images for part in made]).cpu(), extra)
    trial.picture("out of distribution", contact_sheet(tests["strange"].x[:: max(1, n_test // 16)]))
    outcome = {}
    for arm, more in (("real", None), ("real + renders", renders), ("real + controlled", controlled)):
        net = _network(width, trial.seed)
        pool = (real.x if more is None else torch.cat([real.x, more.x])).to(trial.device)
        goal = torch.cat([_target(part.pose) for part in (real, more) if part is not None]).to(trial.device)
        rows = torch.Generator().manual_seed(trial.seed)
        half = batch if more is None else (batch + 1) // 2
        picked = torch.randint(n_real, (steps, half), generator=rows)
        if more is not None:
            others = torch.randint(n_extra, (steps, batch - half), generator=rows) + n_real
            picked = torch.cat([picked, others], 1)

        def loss(net: nn.Module, batches: Tensor, pool: Tensor = pool, goal: Tensor = goal) -> Tensor:
            return F.mse_loss(net(pool[batches[0]]), goal[batches[0]])

        # a row of what is drawn is a batch, whose first half are real images
        training.fit(net, loss, (picked,), steps=steps, batch_size=1, lr=lr, schedule="cosine", seed=trial.seed,
                     device=trial.device)  # fmt: skip
        outcome[arm] = _degrees(net, tests["strange"])
        trial.record(f"in distribution, {arm}", _degrees(net, tests["familiar"]))
        shown = (real if more is None else more).x
        trial.picture(arm, contact_sheet(shown[:: max(1, len(shown) // 16)]))
    return outcome


@comparison(
    paper="geometry-control",
    says="The loss on held-out folds finds images whose pose label is wrong, better than the training loss does.",
    where="Ma et al., Section 3, K-fold consistency filter",
    arms=("training loss", "k-fold loss"),
    metric="AUROC of the loss for labels replaced at random",
    better="higher",
    smallest={"n_images": 20, "epochs": 1, "width": 4, "n_folds": 2},
    check=_folds_fit,
)
def filter_finds(
    trial: Trial, shape: str = "car", n_images: Many = 400, n_objects: Count = 1, look: Look = "familiar",
    wrong: Wrong = 0.2, n_folds: Several = 5, epochs: Count = 30, batch: Count = 32, width: Count = 16,
    lr: Positive = 2e-3,
) -> dict[str, float]:  # fmt: skip
    """Replace a fifth of the poses at random, and rank the images by the loss of a network, smallest first.

    The images are of one object, of a colour each before a plain ground. The baseline is the loss of a network that
    was trained on all of them, for as many steps as each of the filter's networks. It learns the wrong labels by heart
    as it goes on, which a network that has not seen them cannot: at 15 epochs the two are close. Where the pose is too
    hard to learn from so few images both are near chance, as with ``look="strange"``, patches before clouds. Your own
    shapes: ``shape="<OBJ file, or folder of them, y up>", n_objects=8``.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    data = _pictures(_views(_objects(shape, trial.seed, n_objects), n_images, generator), look, generator)
    replaced = torch.randperm(n_images, generator=generator) < round(wrong * n_images)
    other = sample_poses(n_images, generator=generator, **RANGES)
    pose = Pose(*(torch.where(replaced, b, a) for a, b in zip(data.pose, other, strict=True)))
    steps = epochs * -(-n_images // batch)

    def fit(x: Tensor, labels: Pose) -> nn.Module:
        net = _network(width, trial.seed)
        training.fit(net, lambda net, a, b: F.mse_loss(net(a), b), (x, _target(labels)), steps=steps,
                     batch_size=batch, lr=lr, schedule="cosine", seed=trial.seed, device=trial.device)  # fmt: skip
        return net

    whole = fit(data.x, pose)
    said = _read(whole, data.x)
    plain = pose_error(Pose(said[:, 0], said[:, 1], said[:, 2], pose.distance), pose)

    def folded(x: Tensor, labels: Pose):
        net = fit(x, labels)
        return lambda held_out: _read(net, held_out)

    found = consistency_filter(data.x, pose, folded, n_folds=n_folds, keep=1 - wrong / 2, generator=generator)
    trial.record(
        "share wrong of those dropped",
        float(replaced[~found.keep].float().mean()) if (~found.keep).any() else 0.0,
    )
    trial.picture("images", contact_sheet(data.x[:: max(1, n_images // 16)]))
    losses = {"training loss": plain, "k-fold loss": found.loss}
    return {arm: float(roc_auc_score(replaced, loss)) for arm, loss in losses.items()}
