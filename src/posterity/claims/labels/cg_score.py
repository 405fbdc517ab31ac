"""Claims about the complexity-gap score: it cleans a noisy training set, and for less than nets cost."""

from typing import Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Share, Trial, bound, comparison
from posterity.lab import nets, training
from posterity.lab.costs import seconds_in_turns
from posterity.lab.data import ImageData, Labelled, flip_labels, load_labelled, split
from posterity.lab.data.needs import require_rest
from posterity.lab.tasks import entry
from posterity.labels import cg_scores, prune_by_score

LEAST = 20  # examples to learn from, and to test on
JITTER = 1e-8  # a user's rows may repeat
PART = 5_000  # examples that are scored together: time grows with their cube, memory with their square


def _fits(data: ImageData, n_train: int, **_: Any) -> None:
    if n_train < LEAST:
        raise ValueError(f"n_train must be at least {LEAST}, got {n_train}")
    require_rest(len(data.y), "n_train", n_train, LEAST, "examples")


def _parts(
    data: str, target: str | None, n_train: int, noise: float, seed: int
) -> tuple[Tensor, Tensor, ndarray, Tensor, Tensor]:
    """Return standardised rows and labels to learn from, which labels are wrong, and those to test on."""
    read = load_labelled(data, target=target)
    n = len(read.y)
    train, test = split(n, (n_train / n, 1 - n_train / n), seed, stratify=read.y)
    rows = read.x.reshape(n, -1)
    x = torch.from_numpy(StandardScaler().fit(rows[train]).transform(rows)).float()
    noisy, wrong = flip_labels(read.y[train], noise, seed, n_classes=int(read.y.max()) + 1)
    return x[train], torch.from_numpy(noisy), wrong, x[test], torch.from_numpy(read.y[test])


def _net(x: Tensor, y: Tensor, n_classes: int, epochs: int, seed: int, device: str) -> nn.Module:
    """Return a network trained on examples."""
    net = nets.mlp(x.shape[1], n_classes, width=256, depth=2, seed=seed)
    training.fit(net, lambda net, x, y: F.cross_entropy(net(x), y), (x, y), epochs=epochs, lr=1e-3, seed=seed,
                 device=device)  # fmt: skip
    return net.cpu()


@torch.no_grad()
def _error_norms(trained: list[nn.Module], x: Tensor, y: Tensor) -> ndarray:
    """Return EL2N: the norm of the error of the probabilities, mean over networks."""
    errors = []
    for net in trained:
        probability = net(x).softmax(1)
        errors.append((probability - F.one_hot(y, probability.shape[1])).norm(dim=1))
    return torch.stack(errors).mean(0).numpy()


def _el2n(x: Tensor, y: Tensor, n_classes: int, epochs: int, trial: Trial) -> ndarray:
    seeds = range(1_000 * trial.seed + 1, 1_000 * trial.seed + 4)
    return _error_norms([_net(x, y, n_classes, epochs, seed, trial.device) for seed in seeds], x, y)


@comparison(
    paper="cg-score",
    says="Dropping the examples with the highest training-free score cleans a noisy training set.",
    where="Ki et al., the experiments on mislabelled data",
    arms=("random pruning", "cg-score"),
    metric="test accuracy of a network trained on what is kept",
    better="higher",
    smallest={"n_train": 200, "epochs": 3, "early": 1},
    check=_fits,
)
def cleaning(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n_train: Count = 1200,
    noise: Share = 0.2,
    fraction: Share = 0.3,
    epochs: Count = 30,
    early: Count = 10,
) -> dict[str, float]:
    """Make a share ``noise`` of the training labels wrong, drop ``fraction`` of each class, and train.

    Both arms drop as many of each class, and train one network from the same weights. The
    records have the same for EL2N, the error of three networks after ``early`` epochs, with
    which training is needed, and how well either score finds the wrong labels (area under
    the ROC curve).
    """
    x, y, wrong, x_test, y_test = _parts(data, target, n_train, noise, trial.seed)
    n_classes = int(torch.cat([y, y_test]).max()) + 1
    scores = {
        "random pruning": np.random.default_rng(trial.seed).random(len(y)),
        "cg-score": cg_scores(x, y, jitter=JITTER, random_state=trial.seed),
        "el2n": _el2n(x, y, n_classes, early, trial),
    }
    accuracy = {}
    for arm, score in scores.items():
        kept = prune_by_score(score, y, fraction, drop="high")
        net = _net(x[kept], y[kept], n_classes, epochs, trial.seed, trial.device)
        with torch.no_grad():
            accuracy[arm] = float((net(x_test).argmax(1) == y_test).float().mean())
        trial.record(f"wrong labels kept, {arm}", wrong[kept].mean())
        if arm != "random pruning" and 0 < wrong.sum() < len(wrong):
            trial.record(f"wrong labels found (AUC), {arm}", roc_auc_score(wrong, score))
    trial.record("accuracy, el2n", accuracy.pop("el2n"))
    return accuracy


@entry("label-noise", "CG-score", paper="cg-score")
def suspicious(train: Any, seed: int) -> Any:
    """Return the scores of the examples; of many, in random parts with their share of each class."""
    x, y = train
    scores, n_parts = np.empty(len(y)), -(-len(y) // PART)
    for rows in split(len(y), [1 / n_parts] * n_parts, seed, stratify=y):
        scores[rows] = cg_scores(x[rows], y[rows], jitter=JITTER, random_state=seed)
    return lambda x: scores


@bound(
    paper="cg-score",
    says="The scores cost less time than those of three networks trained for ten epochs (EL2N).",
    where="Ki et al., the comparison with scores that need training",
    metric="seconds of scoring over those of training three networks and scoring with them",
    limit=1.0,
    timed=True,
    smallest={"n_train": 200, "early": 1, "rounds": 1},
    check=_fits,
)
def cost(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n_train: Count = 1200,
    early: Count = 10,
    rounds: Count = 3,
) -> float:
    """Time both in turns, and return the median of their ratios.

    A busy machine slows both. Networks cost time linear in the examples, scores the cube of
    the largest class: the curve has a quarter and a half of the examples too.
    """
    x, y, *_, y_test = _parts(data, target, n_train, 0.2, trial.seed)
    n_classes = int(torch.cat([y, y_test]).max()) + 1
    ratio = 0.0
    for n in (n_train // 4, n_train // 2, n_train):
        rows, labels = x[:n], y[:n]
        works = (
            lambda rows=rows, labels=labels: cg_scores(rows, labels, jitter=JITTER, random_state=trial.seed),
            lambda rows=rows, labels=labels: _el2n(rows, labels, n_classes, early, trial),
        )
        seconds = seconds_in_turns(works, rounds)
        for who, name in enumerate(("cg-score", "el2n")):
            trial.track(f"seconds: {name}", n, np.median(seconds[:, who]))
        ratio = float(np.median(seconds[:, 0] / seconds[:, 1]))
        trial.track("seconds of scoring over those of el2n", n, ratio)
    return ratio
