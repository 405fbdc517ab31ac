"""Claims about Unicom: random classes and features resist clusters that contradict each other, and shorten embeddings."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from posterity.claims import Between, PartOfAll, Several, Trial, comparison
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.nets import seeded
from posterity.lab.selfsup import (
    TEST,
    descend,
    embedded,
    encoder_for,
    feature_dim,
    image_parts,
    require_parts,
)
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import STEPS, Features, features_of
from posterity.representation import (
    ClusterDiscrimination,
    cluster_labels,
    mean_average_precision_at_r,
    recall_at_k,
)

ARMS = ("full softmax", "partial classes", "partial classes and features")
DIM, SHORT = 128, 16  # of embeddings, and of cuts of them


def pixel_clusters(x: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Return clusters of images by the directions of their pixels from the mean image."""
    pixels = x.flatten(1)
    return cluster_labels(pixels - pixels.mean(0), n_clusters, random_state=seed)[0]


def trained(
    x: Tensor, labels: Tensor, seed: int, *, steps: int, n_clusters: int, class_rate: float = 1.0,
    n_features: int | None = None, batch_size: int = 128, dim: int | None = None, device: str = "cpu",
) -> nn.Module:  # fmt: skip
    """Return an encoder trained to tell clusters apart, as `posterity.lab.selfsup.pretrain` trains.

    Prototypes learn at five times the network's rate and are not decayed.
    """
    parts = torch.Generator().manual_seed(seed)  # its own, so that all arms see the same batches and views
    encoder = encoder_for(x, seed, dim=dim).to(device).train()
    with seeded(seed + 1):
        loss = ClusterDiscrimination(
            feature_dim(encoder, x), n_clusters, class_rate=class_rate, n_features=n_features
        ).to(device)
    opt = torch.optim.AdamW([
        {"params": encoder.parameters(), "lr": 2e-3, "weight_decay": 1e-4},
        {"params": loss.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ])  # fmt: skip
    descend(
        lambda rows, see: loss(encoder(see()), labels[rows].to(device), generator=parts), opt, x, steps=steps,
        batch_size=batch_size, seed=seed, device=device,
    )  # fmt: skip
    return encoder.cpu().eval()


def _fits(data: ImageData, n_clusters: int, **_: Any) -> None:
    require_parts(data)
    learned = len(data.y) - min(TEST, len(data.y) // 3)
    if learned < n_clusters:
        raise ValueError(
            f"n_clusters must be at most the images to learn from, {learned} of {len(data.y)}, got {n_clusters}"
        )


def _found(
    trial: Trial, data: str, n_clusters: int, class_rate: float, n_features: int, steps: int, batch_size: int
) -> dict[str, dict[str, float]]:
    """Return what embeddings of test images find, of each arm: at full length, and at an eighth of it."""
    parts = image_parts(load_images(data), trial.seed)
    labels = pixel_clusters(parts.x, n_clusters, trial.seed)
    found: dict[str, dict[str, float]] = {"whole": {}, "short": {}}
    for arm in ARMS:
        encoder = trained(
            parts.x, labels, trial.seed, steps=steps, n_clusters=n_clusters, batch_size=batch_size, dim=DIM,
            class_rate=class_rate if "classes" in arm else 1.0, n_features=n_features if "features" in arm else None,
            device=trial.device,
        )  # fmt: skip
        z = embedded(encoder, parts.x_test)
        cuts = [mean_average_precision_at_r(cut, parts.y_test) for cut in z.split(SHORT, dim=1)]
        found["whole"][arm] = float(mean_average_precision_at_r(z, parts.y_test))
        found["short"][arm] = float(torch.stack(cuts).mean())
        trial.record(f"recall at 1, {arm}", float(recall_at_k(z, parts.y_test)))
    return found


@comparison(
    paper="unicom",
    says="A random part of the classes resists the conflict among clusters that show the same.",
    where="An et al., Section 3",
    arms=("full softmax", "partial classes and features", "partial classes"),
    metric="mean average precision at R of new images, by their true classes",
    better="higher",
    smallest={"steps": 3, "n_clusters": 20},
    seeds=10,
    check=_fits,
)
def conflict(
    trial: Trial, data: Images = "digits", n_clusters: Several = 300, class_rate: PartOfAll = 0.1,
    n_features: Annotated[int, Between(1, 128)] = 64, steps: Several = 500, batch_size: Several = 32,
) -> dict[str, float]:  # fmt: skip
    """Cluster pixels, thirty clusters a digit, and train to tell the clusters apart, all arms alike.

    The batch is about as large as the part of the classes: a larger one brings more classes of its own, and with
    them the conflict. Random features as well cost half of what is gained at full length; `compact` has what they
    are for.
    """
    found = _found(trial, data, n_clusters, class_rate, n_features, steps, batch_size)["whole"]
    return {arm: found[arm] for arm in ("full softmax", "partial classes and features", "partial classes")}


@comparison(
    paper="unicom",
    says="Trained on random parts of classes and features, an eighth of an embedding serves better.",
    where="An et al., Section 3",
    arms=("full softmax", "partial classes", "partial classes and features"),
    metric="mean average precision at R of new images in 16 of 128 dimensions, a mean over eight parts",
    better="higher",
    smallest={"steps": 3, "n_clusters": 20},
    check=_fits,
)
def compact(
    trial: Trial, data: Images = "digits", n_clusters: Several = 300, class_rate: PartOfAll = 0.1,
    n_features: Annotated[int, Between(1, 128)] = 64, steps: Several = 500, batch_size: Several = 32,
) -> dict[str, float]:  # fmt: skip
    """Train as `conflict` does, and cut the embeddings of test images into parts."""
    return _found(trial, data, n_clusters, class_rate, n_features, steps, batch_size)["short"]


@entry("self-supervised", "Unicom", paper="unicom")
def self_supervised(train: Tensor, seed: int) -> Features:
    """Return the features of the same encoder, trained to tell clusters of pixels apart, five images each."""
    n_clusters = max(2, len(train) // 5)
    labels = pixel_clusters(train, n_clusters, seed)
    return features_of(trained(train, labels, seed, steps=STEPS, n_clusters=n_clusters, class_rate=0.1))
