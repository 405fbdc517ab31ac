"""Claims about susceptibility: it ranks models by the noise they memorised, and picks those that did not."""

from itertools import product
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, comparison, trend
from posterity.lab.data import ImageData, Labelled, flip_labels, load_labelled, split
from posterity.lab.data.needs import require_rest
from posterity.lab.nets import mlp, seeded
from posterity.lab.tasks import entry
from posterity.labels import Susceptibility, model_regions, select_models

Noise = Annotated[float, Between(0, 0.9, above=True)]
Columns = Annotated[int, Between(20)]
RATES, DECAYS, DROPOUTS = (0.01, 0.1), (0.0, 5e-3), (0.0, 0.5)


def _fits(data: ImageData, n_train: int, n_probe: int, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, n_probe + 20, "examples")


def _train(
    x: Tensor, y: Tensor, probe: Tensor, n_classes: int, width: int, lr: float, decay: float, dropout: float,
    epochs: int, seed: int,
) -> tuple[nn.Module, float]:  # fmt: skip
    """Return a network trained by SGD with momentum, and its susceptibility, measured before each epoch."""
    net = mlp(x.shape[1], n_classes, width=width, depth=2, dropout=dropout, seed=seed).to(x.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    metric = Susceptibility(probe, n_classes, generator=torch.Generator().manual_seed(seed))
    order = torch.Generator().manual_seed(seed)
    net.train()
    with seeded(seed):
        for _ in range(epochs):
            metric.update(net, optimizer)
            for rows in torch.randperm(len(x), generator=order).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net.eval(), float(metric.compute())


@torch.no_grad()
def _right(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) == y).float().mean())


def _candidates(
    trial: Trial, data: str, target: str | None, n_train: int, n_probe: int, noise: float, epochs: int, widths: Any
) -> dict[str, ndarray]:  # fmt: skip
    """Return, for each of the networks, susceptibility and accuracy on noisy, wrong and test labels."""
    read = load_labelled(data, target=target)
    n = len(read.y)
    parts = split(n, (n_train / n, n_probe / n, 1 - (n_train + n_probe) / n), trial.seed, stratify=read.y)
    rows = read.x.reshape(n, -1)
    x = torch.from_numpy(StandardScaler().fit(rows[parts[0]]).transform(rows)).float()
    train, probe, test = (x[rows].to(trial.device) for rows in parts)
    noisy, wrong = flip_labels(read.y[parts[0]], noise, trial.seed, n_classes=len(read.classes))
    y, clean = (torch.from_numpy(each).to(trial.device) for each in (noisy, read.y[parts[2]]))
    found: dict[str, list[float]] = {"zeta": [], "train": [], "wrong": [], "test": []}
    for how in product(widths, RATES, DECAYS, DROPOUTS):
        net, zeta = _train(train, y, probe, len(read.classes), *how, epochs=epochs, seed=trial.seed)
        found["zeta"].append(zeta)
        found["train"].append(_right(net, train, y))
        found["wrong"].append(_right(net, train[wrong], y[wrong]))
        found["test"].append(_right(net, test, clean))
    return {name: np.array(values) for name, values in found.items()}


@trend(
    paper="susceptibility",
    says="Across models trained on noisy labels, susceptibility ranks how much of the noise was memorised.",
    where="Forouzesh et al., Section 3",
    metric="correlation over models of susceptibility with the accuracy on wrong labels",
    low=0.6,
    high=1.0,
    smallest={"epochs": 2, "n_train": 200, "widths": [16, 64]},
    check=_fits,
)
def ranks_memorisation(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n_train: Columns = 1_000,
    n_probe: Columns = 300,
    noise: Noise = 0.4,
    epochs: Count = 40,
    widths: list[Count] = [16, 64, 256],  # noqa: B006
) -> float:
    """Train networks that differ in width, rate, weight decay and dropout on labels of which a share is wrong.

    The probe are held-out inputs, whose labels nobody looks at.
    """
    found = _candidates(trial, data, target, n_train, n_probe, noise, epochs, widths)
    for zeta, memorised in sorted(zip(found["zeta"], found["wrong"], strict=True)):
        trial.track("accuracy on wrong labels, by susceptibility", zeta, memorised)
    both = np.stack([found["zeta"], found["wrong"]])
    return float(np.corrcoef(both)[0, 1]) if (np.ptp(both, axis=1) > 0).all() else 0.0


@comparison(
    paper="susceptibility",
    says="Of the models that fit their noisy labels well, those that are resistant are the better ones.",
    where="Forouzesh et al., Section 5",
    arms=("fit well, susceptible", "fit well, resistant"),
    metric="accuracy on clean test labels, mean over models",
    better="higher",
    smallest={"epochs": 2, "n_train": 200, "widths": [16, 64]},
    check=_fits,
)
def selects_models(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n_train: Columns = 1_000,
    n_probe: Columns = 300,
    noise: Noise = 0.4,
    epochs: Count = 40,
    widths: list[Count] = [16, 64, 256],  # noqa: B006
) -> dict[str, float]:
    """Train the models of ``ranks_memorisation``, and compare regions 1 and 2 of `model_regions`.

    Both hold models whose accuracy on the noisy labels is at least the mean: without clean
    labels nothing but susceptibility tells them apart. A region that is empty has the mean of all
    such models. The best by training accuracy, the first of `select_models` and the best
    that there is are in the records.
    """
    found = _candidates(trial, data, target, n_train, n_probe, noise, epochs, widths)
    region, test = model_regions(found["zeta"], found["train"]), found["test"]
    for name, model in (
        ("highest training accuracy", found["train"].argmax()),
        ("first selected", select_models(found["zeta"], found["train"])[0]),
        ("best of all", test.argmax()),
    ):
        trial.record(f"test accuracy, {name}", test[model])
    for k in (1, 2, 3, 4):
        trial.record(f"models in region {k}", (region == k).sum())
    means = [
        float(test[region == k].mean()) if (region == k).any() else float(test[region <= 2].mean())
        for k in (2, 1)
    ]
    return {"fit well, susceptible": means[0], "fit well, resistant": means[1]}


@entry("label-noise", "Susceptibility", paper="susceptibility")
def suspicious(train: Any, seed: int) -> Any:
    """Return the loss of each label under the most resistant of eight networks trained on all of them."""
    x = torch.from_numpy(StandardScaler().fit_transform(train[0].reshape(len(train[1]), -1))).float()
    y = torch.from_numpy(train[1])
    models = [
        _train(x, y, x, int(y.max()) + 1, *how, epochs=40, seed=seed)
        for how in product((256,), RATES, DECAYS, DROPOUTS)
    ]
    best = select_models([zeta for _, zeta in models], [_right(net, x, y) for net, _ in models])[0]
    with torch.no_grad():
        loss = F.cross_entropy(models[best][0](x), y, reduction="none").numpy()
    return lambda x: loss
