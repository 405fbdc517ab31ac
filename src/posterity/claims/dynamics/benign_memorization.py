"""Claims about memorising random labels: augmentation keeps features good, and the last layers take the noise."""

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.dynamics import (
    FiniteViews,
    MemorizationRun,
    knn_probe,
    layer_probe,
    memorization_profile,
    memorize,
    randomize_labels,
)
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.lab.metrics import rank_correlation
from posterity.lab.nets import seeded

NEIGHBORS = 10
TESTED = 1000  # pictures to test on, at most
SMALL = 12  # pixels up to which a picture goes through fully connected layers
VIEWS = (1, 4, 16, 64, 256)
LAYERS = ("encoder.0", "encoder.1", "encoder.2", "projector.0", "projector.1")
Rows = Annotated[int, Between(2 * NEIGHBORS, 50_000)]


class _Net(nn.Module):
    """An encoder of three layers, a projector of two, a linear head: batch normalisation and ReLU after each layer."""

    def __init__(self, shape: torch.Size, classes: int, width: int) -> None:
        super().__init__()
        flat = max(shape[1:]) <= SMALL
        sizes = (
            (shape.numel(), width, width, width)
            if flat
            else (shape[0], -(-width // 4), -(-width // 2), width)
        )
        self.flatten = nn.Flatten() if flat else nn.Identity()
        self.encoder = nn.Sequential(*(
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) if flat
            else nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(sizes, sizes[1:], strict=False)
        ))  # fmt: skip
        self.pool = nn.Identity() if flat else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(2))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projector(self.pool(self.encoder(self.flatten(x)))))


def _augment(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return pictures turned by up to 15 degrees, scaled by 15 %, moved by an eighth, noisy; in colour also mirrored."""
    n, channels = x.shape[:2]

    def spread(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator).to(x) - 1

    angle, scale, shift = math.radians(15) * spread(n), 1 + 0.15 * spread(n), spread(n, 2) / 4
    mirror = spread(n).sign() if channels > 1 else torch.ones(n).to(x)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    turn = torch.stack([mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    if channels > 1:
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (1 + 0.4 * spread(n, 1, 1, 1)) * (x - mean)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border" if channels > 1 else "zeros", align_corners=False)
    return moved + 0.1 * torch.randn(x.shape, generator=generator).to(x)


def _fits(data: ImageData, n_train: int, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, 30, "images")


class _Study:
    """Pictures with random labels, others to test on with true ones, and the network to start from."""

    def __init__(self, trial: Trial, data: str, n_train: int, width: int) -> None:
        images = load_images(data)
        n = len(images.y)
        rest = min(TESTED, n - n_train)
        chosen = split(n, (n_train / n, rest / n), trial.seed)
        x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
        self.x, self.y, self.x_test, self.y_test = (
            part[rows].to(trial.device) for rows in chosen for part in (x, y)
        )
        self.trial, self.width, self.n_classes = trial, width, len(images.classes)
        self.noisy = randomize_labels(self.y, n_classes=self.n_classes, generator=self.generator())

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.trial.seed)

    def start(self) -> _Net:
        with seeded(self.trial.seed):
            return _Net(self.x.shape[1:], self.n_classes, self.width).to(self.trial.device)

    def train(self, arm: str, augment: Any, n_steps: int, lr: float) -> tuple[_Net, MemorizationRun]:
        net = self.start()
        run = memorize(
            net, self.x, self.noisy, augment=augment, n_steps=n_steps, lr=lr, eval_every=max(1, n_steps // 8),
            generator=self.generator(),
        )  # fmt: skip
        for step, value in zip(run.steps.tolist(), run.clean_view_accuracy.tolist(), strict=True):
            self.trial.track(f"random labels fitted, {arm}", step, value)
        self.trial.record(f"random labels fitted, {arm}", float(run.clean_view_accuracy[-1]))
        return net, run

    def probe(self, net: nn.Module, layers: tuple[str, ...] = LAYERS) -> dict[str, float]:
        return layer_probe(net, layers, self.x, self.y, self.x_test, self.y_test, k=NEIGHBORS)

    def baselines(self) -> None:
        """Report what the inputs and the untrained network reach."""
        raw = knn_probe(self.x.flatten(1), self.y, self.x_test.flatten(1), self.y_test, k=NEIGHBORS)
        self.trial.record("probe, inputs", float(raw))
        untrained = self.probe(self.start())
        self.trial.record("probe, untrained encoder", untrained[LAYERS[2]])
        self.trial.record("probe, untrained last hidden layer", untrained[LAYERS[-1]])


@comparison(
    paper="benign-memorization",
    says="Trained to fit random labels with augmentation, a network learns good features; without, it destroys them.",
    where="Anagnostidis et al., abstract",
    arms=("no augmentation", "augmentation"),
    metric="accuracy of 10 nearest neighbours with true labels, last hidden layer",
    better="higher",
    smallest={"n_train": 60, "n_steps": 10, "width": 32},
    check=_fits,
)
def benign(
    trial: Trial,
    data: Images = "digits",
    n_train: Rows = 200,
    width: Count = 128,
    n_steps: Count = 2_000,
    lr: Positive = 2e-3,
) -> dict[str, float]:
    """Train twice from one start on one set of random labels, with the same steps, and probe each layer.

    The records have the encoder's output, the untrained network and the inputs, which on easy pictures are good
    already. Pictures of more than 12 pixels go through convolutions. The paper's own setting is CIFAR-10 and a
    ResNet-18, trained for hundreds of epochs.
    """
    study, found = _Study(trial, data, n_train, width), {}
    study.baselines()
    for arm, augment in (("no augmentation", None), ("augmentation", _augment)):
        net, _ = study.train(arm, augment, n_steps, lr)
        profile = memorization_profile(
            net, LAYERS, study.x, study.y, study.noisy, study.x_test, study.y_test, k=NEIGHBORS, augment=_augment,
            generator=study.generator(),
        )  # fmt: skip
        for at, (signal, noise) in enumerate(
            zip(profile.signal.tolist(), profile.noise.tolist(), strict=True), 1
        ):
            trial.track(f"true labels, {arm}", at, signal)
            trial.track(f"noisy labels, {arm}", at, noise)
        trial.record(f"probe, encoder, {arm}", float(profile.signal[2]))
        trial.record(f"layers before the noise exceeds the signal, {arm}", len(_before(profile.split())))
        found[arm] = float(profile.signal[-1])
    return found


def _before(layer: str) -> tuple[str, ...]:
    """Return the layers up to one; none up to the input."""
    return LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else ()


@comparison(
    paper="benign-memorization",
    says="Random labels memorised without augmentation spoil the last layers, the projector, more than the encoder.",
    where="Anagnostidis et al., abstract",
    arms=("last hidden layer", "encoder output"),
    metric="accuracy of 10 nearest neighbours with true labels",
    better="higher",
    smallest={"n_train": 60, "n_steps": 10, "width": 32},
    check=_fits,
)
def projector_takes_noise(
    trial: Trial,
    data: Images = "digits",
    n_train: Rows = 200,
    width: Count = 128,
    n_steps: Count = 600,
    lr: Positive = 2e-3,
) -> dict[str, float]:
    """Train on random labels without augmentation, and probe both layers of the one network."""
    study = _Study(trial, data, n_train, width)
    study.baselines()
    net, _ = study.train("no augmentation", None, n_steps, lr)
    probe = study.probe(net, (LAYERS[-1], LAYERS[2]))
    return {"last hidden layer": probe[LAYERS[-1]], "encoder output": probe[LAYERS[2]]}


@trend(
    paper="benign-memorization",
    says="The more views of each sample have to be memorised, the better the features.",
    where="Anagnostidis et al., abstract",
    metric="rank correlation of the number of views, 1 to 256, with accuracy of 10 nearest neighbours, last hidden layer",
    low=0.7,
    smallest={"n_train": 60, "n_steps": 4, "width": 32},
    check=_fits,
)
def more_views(
    trial: Trial,
    data: Images = "digits",
    n_train: Rows = 200,
    width: Count = 128,
    n_steps: Count = 1_000,
    lr: Positive = 2e-3,
) -> float:
    """Train from one start with 1, 4, 16, 64 and 256 fixed views of each sample, and probe the last hidden layer.

    Up to a few views, all that is stored one by one, the curve is nearly flat. The records have the share of labels
    that a view of the bank, and the sample as it is, which is none of them, get.
    """
    study, probes = _Study(trial, data, n_train, width), []
    study.baselines()
    for n_views in VIEWS:
        views = FiniteViews(study.x, _augment, n_views, generator=study.generator())
        net, run = study.train(f"{n_views} views", views, n_steps, lr)
        trial.record(f"random labels of views fitted, {n_views} views", float(run.augmented_accuracy[-1]))
        probes.append(study.probe(net, LAYERS[-1:])[LAYERS[-1]])
        trial.track("true labels, last hidden layer", n_views, probes[-1])
    return rank_correlation(VIEWS, probes)
