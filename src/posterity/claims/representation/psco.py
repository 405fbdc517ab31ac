"""Claims about PsCo: the pseudo task adds to momentum contrast for few labels, and its labels become better."""

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from posterity._checks import needs
from posterity.claims import Between, Count, Positive, Several, Trial, comparison, trend
from posterity.lab.data import ImageData, Images, dataset, load_images
from posterity.lab.data.images import require_images
from posterity.lab.metrics import rank_correlation
from posterity.lab.nets import seeded
from posterity.lab.selfsup import descend, encoder_for, feature_dim
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import STEPS, Features, features_of
from posterity.representation import PsCo, evaluate_few_shot

WAYS, QUERIES = 5, 15  # of a task: classes, and images of each to classify
OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
PARTS = {
    "images_background_small1.zip": "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "images_background_small2.zip": "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
}


@dataset(Images, "omniglot")
def omniglot(seed: int) -> ImageData:
    """Return the two small background sets of Omniglot, 20 drawings of 292 characters at 28x28, ink 1.

    Classes are named set/alphabet/character; Pillow reads them (extra ``images``).
    """
    import pooch

    folder = Path(os.environ.get("POSTERITY_DATA") or pooch.os_cache("posterity"), "images", "omniglot")
    try:
        keeper = pooch.create(path=folder, base_url=OMNIGLOT, registry=PARTS)
        keeper.logger = None
        return read_characters([keeper.fetch(name) for name in PARTS])
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"omniglot is not in {folder} and could not be downloaded from {OMNIGLOT}: put its files there "
            "or set POSTERITY_DATA to a folder that holds them"
        ) from error


@cache
def _drawings(path: str, size: int) -> tuple[list[str], np.ndarray]:
    """Return where each drawing of a zip lies, and all drawings (n, 1, size, size)."""
    picture = needs("PIL.Image", "images")
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        drawn = [picture.open(io.BytesIO(file.read(name))).convert("L") for name in names]
    shrunk = [np.asarray(each.resize((size, size), picture.Resampling.BOX)) for each in drawn]
    return names, 1 - np.stack(shrunk)[:, None].astype(np.float32) / 255


def read_characters(paths: Sequence[str | Path], size: int = 28) -> ImageData:
    """Return drawings of zips ``set/alphabet/character/drawing.png``, a class a character."""
    parts = [_drawings(str(path), size) for path in paths]
    ids = [name for names, _ in parts for name in names]
    classes = [name.rpartition("/")[0] for name in ids]
    kept = tuple(dict.fromkeys(classes))
    x = np.concatenate([drawings for _, drawings in parts])
    note = f"omniglot: {len(x)} drawings of {len(kept)} characters, {size}x{size}"
    place = {name: k for k, name in enumerate(kept)}
    return ImageData(x, np.asarray([place[name] for name in classes]), kept, note, tuple(ids))


def _first_new(data: ImageData) -> int:
    """Return the first class that training does not see: the second set's, or the second half's."""
    sets = [name.partition("/")[0] for name in data.classes]
    return sets.index(sets[-1]) if len(set(sets)) == 2 else len(sets) // 2


def trained(
    x: Tensor, seed: int, *, steps: int, meta_weight: float = 1.0, n_shots: int = 4, batch_size: int = 128,
    queue_size: int = 1024, momentum: float = 0.99, lr: float = 2e-3, width: int | None = None,
    dim: int | None = None, device: str = "cpu", on_step: Callable[[int, PsCo, Tensor, Tensor], Any] | None = None,
) -> PsCo:  # fmt: skip
    """Return PsCo trained on two views of images, as `posterity.lab.selfsup.pretrain` trains: the rate rises, then falls.

    ``on_step(step, model, rows, view)`` comes before each step, from 0, with what is to be its keys.
    """
    encoder = encoder_for(x, seed, width=width, dim=dim)
    with seeded(seed + 1):
        model = PsCo(encoder, feature_dim(encoder, x), hidden_dim=256, dim=128, momentum=momentum, queue_size=queue_size,
                     n_shots=n_shots, meta_weight=meta_weight).to(device)  # fmt: skip
    done = count()

    def value(rows: Tensor, see: Callable[[], Tensor]) -> Tensor:
        query, key = see(), see()
        if on_step is not None:
            on_step(next(done), model, rows, key)
        return model.loss(query, key)

    opt = torch.optim.AdamW(model.trainable_parameters(), lr=lr, weight_decay=1e-4)
    descend(value, opt, x, steps=steps, batch_size=batch_size, seed=seed, device=device)
    return model.eval()


def _parts(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels of the classes to learn from, without their labels, and of new ones."""
    images = load_images(data)
    x, y, first = torch.from_numpy(images.x), torch.from_numpy(images.y), _first_new(images)
    old = y < first
    if x.shape[1] == 3:
        mean, std = (f(x[old], (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        x = (x - mean) / std.clamp_min(1e-6)
    return x[old], y[old], x[~old], y[~old] - first


def _fits(data: ImageData, k_shot: int = 1, **_: Any) -> None:
    require_images(data)
    first = _first_new(data)
    counts = np.bincount(data.y, minlength=len(data.classes))[first:]
    if len(counts) < WAYS or counts.min() < k_shot + QUERIES:
        raise ValueError(
            f"at least {WAYS} classes to test on, the later half, of {k_shot + QUERIES} images are needed; "
            f"has {len(counts)}, the smallest of {min(counts, default=0)}"
        )


def _batches_fit(data: ImageData, batch_size: int, queue_size: int, steps: int, **_: Any) -> None:
    require_images(data)
    if _first_new(data) < 2:
        raise ValueError(
            f"at least 4 classes are needed, half of them to learn from; has {len(data.classes)}"
        )
    if steps * batch_size < queue_size + 3 * batch_size:
        raise ValueError(
            f"steps must fill queue_size={queue_size} and be 3 more, got {steps} of {batch_size} images"
        )


@comparison(
    paper="psco",
    says="Pseudo-supervised tasks add to plain momentum contrast for few-shot classification.",
    where="Section 4",
    arms=("MoCo", "PsCo"),
    metric="accuracy on 5-way tasks of classes that training did not see",
    better="higher",
    smallest={"steps": 3, "n_tasks": 20},
    reason="in hundreds of steps on few classes the pseudo task adds nothing to contrast; the paper trains for many thousands, on many classes",
    check=_fits,
)
def few_labels(
    trial: Trial, data: Images = "digits", steps: Several = 250, n_shots: Annotated[int, Between(1, 1024)] = 4,
    meta_weight: Positive = 1.0, k_shot: Count = 1, n_tasks: Several = 400,
    width: Count = 16, dim: Count = 64,
) -> dict[str, float]:  # fmt: skip
    """Train with and without the pseudo task, all else equal, on the first half of the classes without their labels.

    Tasks are of the other half. The paper's setting is many classes of few images each and very many steps:
    ``data="omniglot"``, of whose sets the first is learned from, with ``n_shots=1``.
    """
    x, _, x_new, y_new = _parts(data)
    found = {}
    for arm, weight in (("MoCo", 0.0), ("PsCo", meta_weight)):
        model = trained(x, trial.seed, steps=steps, meta_weight=weight, n_shots=n_shots, width=width, dim=dim,
                        device=trial.device)  # fmt: skip
        tasks = torch.Generator().manual_seed(trial.seed)
        score = evaluate_few_shot(
            model.cpu(), x_new, y_new, n_way=WAYS, k_shot=k_shot, n_query=QUERIES, n_tasks=n_tasks, generator=tasks
        )  # fmt: skip
        found[arm] = score.accuracy
        trial.record(f"95 % half-width over tasks, {arm}", score.interval)
    return found


@trend(
    paper="psco",
    says="The pseudo-labels become better while the network trains.",
    where="Section 4",
    metric="rank correlation of the share of shots of the right class with the step",
    low=0.0,
    smallest={"steps": 12, "queue_size": 128, "batch_size": 32, "every": 1},
    check=_batches_fit,
)
def labels_improve(
    trial: Trial, data: Images = "digits", steps: Several = 250, n_shots: Annotated[int, Between(1, 128)] = 4,
    queue_size: Annotated[int, Between(128)] = 1024, batch_size: Annotated[int, Between(2, 128)] = 128,
    every: Count = 10, width: Count = 16, dim: Count = 64,
) -> float:  # fmt: skip
    """Compare the class of each shot with that of its image, once the queue holds images only."""
    x, y, *_ = _parts(data)
    held, where, shares = torch.full((queue_size,), -1), torch.full((queue_size,), -1), []

    @torch.no_grad()
    def look(step: int, model: PsCo, rows: Tensor, view: Tensor) -> None:
        loss = model.criterion
        if step * batch_size >= queue_size:
            shots = loss.shots(model.target_projector(model.target_backbone(view))).cpu()
            right, other = held[shots] == y[rows][:, None], where[shots] != rows[:, None]
            shares.append((step, float(right.float().mean()), float(right[other].float().mean())))
        place = (int(loss.pointer) + torch.arange(len(rows))) % queue_size
        held[place], where[place] = y[rows], rows

    trained(x, trial.seed, steps=steps, n_shots=n_shots, queue_size=queue_size, batch_size=batch_size, width=width,
            dim=dim, device=trial.device, on_step=look)  # fmt: skip
    means = [np.mean(shares[k : k + every], 0) for k in range(0, len(shares), every)]
    for step, share, others in means:
        trial.track("share of shots of the right class by step: all", step, share)
        trial.track("share of shots of the right class by step: of other images", step, others)
    trial.record("share of shots of the right class, at the end", means[-1][1])
    trial.record("by chance", float((torch.bincount(y) / len(y)).square().sum()))
    return rank_correlation([m[0] for m in means], [m[1] for m in means])


@entry("self-supervised", "PsCo", paper="psco")
def self_supervised(train: Tensor, seed: int) -> Features:
    """Return the features of the same encoder, trained with PsCo."""
    return features_of(trained(train, seed, steps=STEPS).backbone)
