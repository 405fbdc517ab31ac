"""Claims about the limits of robustness: no classifier escapes them, and sizes have the orders that the theory gives."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy import ndarray
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.neural_network import MLPClassifier
from torch.nn import functional as F

from posterity.claims import Between, Count, Several, Share, Trial, bound, trend
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.metrics import rank_correlation
from posterity.robustness import (
    MajorityClass,
    boundary_distance,
    perturbation_for_fraction,
    robust_fraction_bound,
)

Classifier = Literal["by seed", "network", "centroid", "forest"]
ORDERS = (0, 1, 2, 4)


def _binary(data: ImageData, side: int) -> ndarray:
    """Return images of one channel averaged to side x side and cut at each pixel's mean: rows of 0 and 1."""
    grey = torch.from_numpy(data.x).mean(1, keepdim=True)
    small = F.adaptive_avg_pool2d(grey, side).flatten(1).numpy()
    return (small > small.mean(0)).astype(np.float64)


def _fits(data: ImageData, side: int, n_classes: int, **_: Any) -> None:
    x = _binary(data, side)
    if (x == x[0]).all():
        raise ValueError(f"all images are the same once averaged to {side} x {side}")
    if n_classes > len(data.classes):
        raise ValueError(f"n_classes must be at most {len(data.classes)}, got {n_classes}")


@bound(
    paper="robustness-limits",
    says="No classifier escapes: the exact robust share of every class of at most half the images stays below the limit.",
    where="Dai and Gifford, the theorem on classes of at most half of the images",
    metric="largest excess of the exact robust share over the limit, over classes and numbers of changed values from 1 on",
    better="lower",
    limit=0.0,
    smallest={"side": 3},
    check=_fits,
)
def no_classifier_escapes(
    trial: Trial,
    data: Images = "digits",
    side: Annotated[int, Between(2, 4)] = 4,
    n_classes: Several = 10,
    classifier: Classifier = "by seed",
) -> float:
    """Train on images averaged to 4 x 4 and cut to black and white, and evaluate on all 65,536 of them.

    The classifier is a network, nearest centroids or a random forest, by the seed. The record has what share of
    all images four changed pixels move, beside the least that the limit says.
    """
    images = load_images(data)
    rng = np.random.default_rng(trial.seed)
    kinds = ("network", "centroid", "forest")
    kind = kinds[trial.seed % 3] if classifier == "by seed" else classifier
    x, y = _binary(images, side), images.y % n_classes
    (rows,) = split(len(y), (0.8,), trial.seed)
    if len(np.unique(y[rows])) < 2:
        rows = rng.permutation(len(y))
    model: Any = {
        "network": lambda: MLPClassifier((32,), max_iter=200, random_state=trial.seed),
        "centroid": NearestCentroid,
        "forest": lambda: RandomForestClassifier(30, random_state=trial.seed),
    }[kind]()
    every = (np.arange(2 ** (side * side))[:, None] >> np.arange(side * side - 1, -1, -1)) & 1
    labels = model.fit(x[rows], y[rows]).predict(every.astype(np.float64))
    if len(np.unique(labels)) < 2:
        trial.record("classes that the classifier ever says", 1)
        return 0.0
    distance = boundary_distance(labels)
    worst, moved, least = -1.0, 0.0, 0.0
    for label in np.unique(labels):
        own = distance[labels == label]
        share = len(own) / len(labels)
        moved += float((own <= 4).mean()) * share
        if share > 0.5:
            continue
        for t in range(1, side * side + 1):
            limit = robust_fraction_bound(t, side, class_fraction=share)
            if limit:  # where it is 0 nothing can be below
                worst = max(worst, float((own > t).mean()) - limit)
            if t == 4:
                least += (1 - limit) * share
    trial.record("share of all images that four changes move", moved)
    trial.record("least share by the limit", least)
    return worst


@trend(
    paper="robustness-limits",
    says="The size that breaks every classifier grows like n^(1 / max(p, 1)), and that order is the best there is.",
    where="Dai and Gifford, the theorems on the limit and on its optimality",
    metric="largest distance of an exponent in n from 1 / max(p, 1), for p = 0, 1, 2, 4, of the limit and of the majority",
    high=0.1,
    smallest={"largest": 32, "n_images": 50},
)
def order_in_n(
    trial: Trial, smallest_n: Count = 8, largest: Annotated[int, Between(16, 256)] = 128, n_images: Count = 2_000,
    fraction: Share = 0.01,
) -> float:  # fmt: skip
    """Fit exponents on sides that double, for black and white images.

    Of the limit: the size beyond which at most a hundredth of a class is robust. Of the classifier that
    asks whether most pixels are bright: the median distance of random images, so many that its own error moves
    an exponent by 0.01; of 300 it moved some by 0.1.
    """
    sides = [n for n in 2 ** np.arange(3, 9) if smallest_n <= n <= largest]
    rng, worst = np.random.default_rng(trial.seed), 0.0
    images = {n: rng.integers(0, 2, (n_images, n * n)) for n in sides}
    for p in ORDERS:
        limits = [perturbation_for_fraction(fraction, int(n), p=p) for n in sides]
        medians = [float(np.median(MajorityClass(int(n)).distance(images[n], p))) for n in sides]
        for name, values in (("limit", limits), ("majority", medians)):
            exponent = float(np.polyfit(np.log(sides), np.log(np.maximum(values, 1e-9)), 1)[0])
            trial.record(f"exponent of the {name}, p = {p}", exponent)
            worst = max(worst, abs(exponent - 1 / max(p, 1)))
    return worst


@trend(
    paper="robustness-limits",
    says="With more bits a value, even the best class is less robust.",
    where="Dai and Gifford, the section on bit depth",
    metric="rank correlation of bits with the median distance, p = 2, of random images from the other class of the majority",
    high=-0.9,
    smallest={"n_images": 30},
)
def depth_costs(trial: Trial, n: Count = 9, n_images: Count = 300) -> float:
    """Draw images of 1, 2, 4 and 8 bits; the record has the limit's size for a hundredth at 1 and at 8 bits."""
    rng, bits, medians = np.random.default_rng(trial.seed), (1, 2, 4, 8), []
    for depth in bits:
        images = rng.integers(0, 2**depth, (n_images, n * n)) / (2**depth - 1)
        medians.append(float(np.median(MajorityClass(n, bit_depth=depth).distance(images, 2))))
        trial.track("median distance, p = 2", depth, medians[-1])
    for depth in (1, 8):
        trial.record(
            f"size for a hundredth, {depth} bits", perturbation_for_fraction(0.01, n, bit_depth=depth, p=2)
        )
    return rank_correlation(bits, medians)
