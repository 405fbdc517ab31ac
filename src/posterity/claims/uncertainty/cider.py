"""Claims about CIDER: prototypes far apart, and unknown inputs that are found by their distance."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Several, Trial, comparison
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_classes, require_rest
from posterity.lab.nets import cnn, mlp, weights
from posterity.lab.tasks import entry, image_epochs
from posterity.lab.training import fit
from posterity.uncertainty import (
    CIDERLoss,
    KNNScore,
    compactness_loss,
    hypersphere_geometry,
    update_prototypes,
)

WIDTH = 64  # of embeddings
NESTEROV = functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)


class _Net(nn.Module):
    """Two convolutions to 128 features, a head to embeddings and one to classes."""

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.classes = nn.Linear(128, n_classes)

    def embed(self, x: Tensor) -> Tensor:
        """Return unit embeddings (n, WIDTH)."""
        return F.normalize(self.head(self.body(x)), dim=1)


def _view(x: Tensor) -> Tensor:
    """Return images moved by at most a pixel, with noise."""
    n, _, height, width = x.shape
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, height, 1).unfold(3, width, 1)
    dy, dx = torch.randint(3, (2, n), device=x.device)
    moved = windows[torch.arange(n, device=x.device), :, dy, dx]
    return moved + 0.1 * torch.randn_like(moved)


def _supcon(z: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020) of embeddings of two views."""
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    cosine = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    log_share = cosine - cosine.logsumexp(1, keepdim=True)
    alike = (y[:, None] == y) & ~own
    return -(log_share.masked_fill(~alike, 0).sum(1) / alike.sum(1)).mean()


def _criterion(arm: str, rows: tuple[Tensor, Tensor], n_classes: int, device: str) -> Callable[..., Tensor]:
    """Return the loss of an arm: ``(net, x, y) -> scalar``."""
    if arm == "cross-entropy":
        return lambda net, x, y: F.cross_entropy(net.classes(net.body(_view(x))), y)
    if arm == "SupCon":
        return lambda net, x, y: _supcon(torch.cat([net.embed(_view(x)), net.embed(_view(x))]), y.repeat(2))
    cider = CIDERLoss(n_classes, WIDTH, compactness_weight=2 / 0.7).to(device)
    begun: list[bool] = []

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not begun:  # once, from the data as they are
            with torch.no_grad():
                net.eval()
                cider.initialize(net.embed(rows[0].to(device)), rows[1].to(device))
                net.train()
            begun.append(True)
        z, both = torch.cat([net.embed(_view(x)), net.embed(_view(x))]), y.repeat(2)
        if arm == "CIDER":
            return cider(z, both)
        with torch.no_grad():
            cider.prototypes.copy_(update_prototypes(cider.prototypes, z, both, cider.momentum))
        return compactness_loss(z, cider.prototypes.clone(), both, cider.temperature)

    return loss


def _fits(data: ImageData, n_known: int, k: int = 1, **_: Any) -> None:
    """Refuse what leaves no class unknown, or fewer training images than neighbours."""
    if n_known >= len(data.classes):
        raise ValueError(f"n_known must be less than the {len(data.classes)} classes, got {n_known}")
    fewest = np.sort(np.bincount(data.y))[:n_known]
    require_rest(int(fewest.sum()), "k", k, -(-int(fewest.sum()) // 4), "images of the smallest classes")
    require_classes(data.y, data.classes, "images", n_known + 1)


def _study(
    trial: Trial, arms: tuple[str, ...], data: str, n_known: int, epochs: int
) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Return, for each arm, its trained network and the tensors: x, y, x_test, x_ood."""
    images = load_images(data)
    n_classes = len(images.classes)
    known = np.random.default_rng(trial.seed).permutation(n_classes)[:n_known]
    code = np.full(n_classes, -1)
    code[known] = np.arange(n_known)
    y = code[images.y]
    rows = np.flatnonzero(y >= 0)
    train, test = (rows[part] for part in split(len(rows), (0.75, 0.25), trial.seed, stratify=y[rows]))
    parts = {
        "x": torch.from_numpy(images.x[train]), "y": torch.from_numpy(y[train]),
        "x_test": torch.from_numpy(images.x[test]), "x_ood": torch.from_numpy(images.x[y < 0]),
    }  # fmt: skip
    found = {}
    for arm in arms:
        net = weights(_Net, images.x.shape[1], n_known, seed=trial.seed)
        fit(net, _criterion(arm, (parts["x"], parts["y"]), n_known, trial.device), (parts["x"], parts["y"]),
            epochs=epochs, batch_size=64, lr=0.05, weight_decay=1e-4, optimizer=NESTEROV, schedule="cosine",
            seed=trial.seed, device=trial.device)  # fmt: skip
        found[arm] = (net.to("cpu").eval(), parts)
    return found


@torch.no_grad()
def _geometry(net: nn.Module, parts: dict[str, Tensor]) -> dict[str, float]:
    """Return the geometry of training embeddings around their class means."""
    z, y = net.embed(parts["x"]), parts["y"]
    sums = z.new_zeros(int(y.max()) + 1, WIDTH).index_add(0, y, z)
    return hypersphere_geometry(z, y, F.normalize(sums, dim=1), net.embed(parts["x_ood"]))


@comparison(
    paper="cider",
    says="The dispersion loss drives class prototypes far apart on the sphere.",
    where="Ming et al., Section 5",
    arms=("SupCon", "compactness only", "CIDER"),
    metric="mean angle between class means of training embeddings, degrees",
    better="higher",
    smallest={"epochs": 1, "n_known": 2},
    check=_fits,
)
def dispersion(
    trial: Trial, data: Images = "digits", n_known: Several = 6, epochs: Count = 60
) -> dict[str, float]:
    """Train the same network with three losses on some of the classes and measure the angles.

    The seed draws the classes; the others are inputs of no known class, whose distance is
    in the records. All arms see two views of each image: moved by a pixel, with noise. The
    largest angle that six classes allow is 101.5 degrees.
    """
    angles = {}
    for arm, (net, parts) in _study(
        trial, ("SupCon", "compactness only", "CIDER"), data, n_known, epochs
    ).items():
        found = _geometry(net, parts)
        angles[arm] = found["dispersion"]
        trial.record(f"compactness, {arm}", found["compactness"])
        trial.record(f"separability, {arm}", found["separability"])
    return angles


@comparison(
    paper="cider",
    says="Nearest neighbours in CIDER's features find unknown classes more surely than in those of SupCon.",
    where="Ming et al., Section 4",
    arms=("SupCon", "cross-entropy", "CIDER"),
    metric="false positive rate at 95 % of known inputs kept",
    better="lower",
    reason="Ten easy classes of 8 x 8 pixels collapse, and unknown digits collapse with them: it belongs to natural images.",
    smallest={"epochs": 1, "n_known": 2},
    check=_fits,
)
def detection(
    trial: Trial,
    data: Images = "digits",
    n_known: Several = 6,
    epochs: Count = 60,
    k: Count = 10,
) -> dict[str, float]:
    """Score test images of known and of unknown classes by the k-th nearest training feature.

    Features are those before the head. On digits of 8 x 8 pixels the statement does not
    show: few and easy classes collapse, and unknown digits, being near them, collapse with
    them. It belongs to natural images (``data="cifar10"``, with other sets as unknown ones).
    """
    rates = {}
    for arm, (net, parts) in _study(
        trial, ("SupCon", "cross-entropy", "CIDER"), data, n_known, epochs
    ).items():
        with torch.no_grad():
            features = {name: net.body(parts[name]) for name in ("x", "x_test", "x_ood")}
        score = KNNScore(k).fit(features["x"])
        limit = score.threshold(features["x_test"])
        rates[arm] = float((score.score(features["x_ood"]) <= limit).float().mean())
    return rates


@entry("ood-detection", "CIDER", paper="cider")
def unknown_score(train: Any, seed: int) -> Any:
    """Return the distance to the tenth nearest training embedding of a network trained by CIDER."""
    x, y = (torch.from_numpy(part) for part in train)
    n_classes = int(y.max()) + 1
    one_pixel = x.shape[2:] == (1, 1)
    net = (mlp(x.shape[1], n_classes, seed=seed) if one_pixel else cnn(x.shape[1], n_classes, seed=seed))[:-1]
    sizes = net(x[:2]).shape[1], WIDTH
    head = mlp(sizes[0], WIDTH, width=128, depth=1, seed=seed)
    both = nn.Sequential(net, head)
    criterion = CIDERLoss(n_classes, WIDTH, compactness_weight=2 / 0.7)
    with torch.no_grad():
        criterion.initialize(F.normalize(both.eval()(x)), y)

    def seen(x: Tensor) -> Tensor:  # features have no neighbours to move to
        return x + 0.1 * torch.randn_like(x) if one_pixel else _view(x)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return criterion(F.normalize(net(torch.cat([seen(x), seen(x)]))), y.repeat(2))

    fit(
        both,
        loss,
        (x, y),
        epochs=image_epochs(len(y)),
        lr=3e-3,
        optimizer="adamw",
        weight_decay=1e-2,
        schedule="cosine",
        seed=seed,
    )
    with torch.no_grad():
        score = KNNScore(k=min(10, len(x))).fit(net(x))
    return torch.no_grad()(lambda x: score.score(net(torch.from_numpy(x))).numpy())
