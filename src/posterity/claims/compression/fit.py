"""Claims about FIT: it ranks assignments of bits by the accuracy that training would find, and picks good ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, comparison
from posterity.compression import (
    Sensitivity,
    allocate_bits,
    fit_score,
    pack_quantized,
    quantize,
    sensitivity,
    unpack_quantized,
)
from posterity.lab import nets, training
from posterity.lab.costs import saved_bytes
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest

CHOICES = (2, 3, 4, 6, 8)
BATCH = 100
RANGES = 200  # images that set the ranges of activations
Bits = Annotated[float, Between(2, 8)]
Configs = Annotated[int, Between(3, 1000)]


def _fits(data: ImageData, n_train: int, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, 1, "images")
    side = min(data.x.shape[2:])
    if side < 4:  # halved twice
        raise ValueError(f"images must be at least 4 x 4, has {data.x.shape[2]} x {data.x.shape[3]}")


@dataclass
class _Start:
    """A trained network, its sensitivity, and what it is trained and tested on."""

    net: nn.Module
    found: Sensitivity
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    trial: Trial

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            return float((net.cpu().eval()(self.x_test).argmax(1) == self.y_test).float().mean())

    def tuned(
        self, weights: Mapping[str, int], activations: Mapping[str, int], epochs: int, lr: float
    ) -> nn.Module:
        """Return the network at these bits, trained on for some epochs."""
        net = quantize(self.net, weights, activations, calibration=self.x[:RANGES])
        if epochs:
            _train(net.train(), self.x, self.y, epochs, lr, self.trial)
        return net


def _train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, trial: Trial) -> None:
    training.fit(
        net, lambda net, x, y: F.cross_entropy(net(x), y), (x, y), epochs=epochs, batch_size=BATCH, lr=lr,
        seed=trial.seed, device=trial.device,
    )  # fmt: skip


def _start(trial: Trial, data: str, n_train: int, width: int, epochs: int, number: int = 0) -> _Start:
    images = load_images(data)
    n, seed = len(images.y), 1000 * number + trial.seed
    train, test = split(n, (n_train / n, 1 - n_train / n), seed)
    x = (images.x - images.x[train].mean()) / (images.x[train].std() + 1e-6)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(images.y)
    channels = [x.shape[1], width, 2 * width, 2 * width, 4 * width]
    side = [-(-size // 4) for size in x.shape[2:]]
    with nets.seeded(seed):
        layers: list[nn.Module] = []
        for k, stride in enumerate((1, 2, 1, 2)):
            layers += [nn.Conv2d(channels[k], channels[k + 1], 3, stride, 1), nn.ReLU()]
        n_out = int(y.max()) + 1
        head = [nn.Flatten(), nn.Linear(4 * width * side[0] * side[1], 32), nn.ReLU(), nn.Linear(32, n_out)]
        net = nn.Sequential(*layers, *head)
    _train(net, x[train], y[train], epochs, 3e-3, trial)
    net = net.cpu()
    batches = zip(x[train].split(BATCH), y[train].split(BATCH), strict=True)
    start = _Start(net, sensitivity(net, batches), x[train], y[train], x[test], y[test], trial)
    trial.record("accuracy of the float network", start.accuracy(net))
    return start


def _without_fisher(found: Sensitivity) -> Sensitivity:
    """Return the same noise with all traces 1: what one knows from the ranges alone."""
    ones = {name: dict.fromkeys(getattr(found, name), 1.0) for name in ("weight_trace", "activation_trace")}
    return Sensitivity(**{**vars(found), **ones})


def _ranking(
    trial: Trial, data: str, n_train: int, width: int, configs: int, epochs: int, tuning: int, lr: float, networks: int
) -> dict[str, float]:  # fmt: skip
    """Return the rank correlation of each score with accuracy over random bits, the mean over networks."""
    found: dict[str, list[float]] = {}
    for number in range(networks):
        start = _start(trial, data, n_train, width, epochs, number)
        rng = np.random.default_rng(1000 * number + trial.seed)
        fisher, plain = start.found, _without_fisher(start.found)
        scores: dict[str, list[float]] = {}
        accuracy = []
        for _ in range(configs):
            weights = {name: int(rng.choice(CHOICES)) for name in fisher.weight_trace}
            activations = {name: int(rng.choice(CHOICES)) for name in fisher.activation_trace}
            accuracy.append(start.accuracy(start.tuned(weights, activations, tuning, lr)))
            of = {
                "fit": fit_score(fisher, weights, activations),
                "weights only": fit_score(fisher, weights),
                "activations only": fit_score(fisher, weights, activations) - fit_score(fisher, weights),
                "quantisation range": fit_score(plain, weights, activations),
                "mean bits": -float(np.mean([*weights.values(), *activations.values()])),
            }
            for name, score in of.items():
                scores.setdefault(name, []).append(-score)
        if len(set(accuracy)) == 1:
            raise ValueError(
                f"all {configs} assignments have the accuracy {accuracy[0]}: nothing is to be ranked"
            )
        for name, values in scores.items():
            found.setdefault(name, []).append(np.corrcoef(rankdata(values), rankdata(accuracy))[0, 1])
    return {name: float(np.mean(values)) for name, values in found.items()}


@comparison(
    paper="fit",
    says="FIT ranks assignments of bits by their accuracy after quantised training better than ranges alone.",
    where="Zandonati et al., Section 5",
    arms=("quantisation range", "fit"),
    metric="rank correlation of minus the score with test accuracy",
    better="higher",
    smallest={"configs": 8, "epochs": 6, "tuning": 1, "n_train": 400, "width": 4, "networks": 1},
    check=_fits,
)
def ranks_bits(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1000,
    width: Count = 8,
    configs: Configs = 60,
    epochs: Count = 12,
    tuning: Count = 1,
    lr: Positive = 1e-4,
    networks: Count = 2,
) -> dict[str, float]:
    """Score random bits for each weight and activation, then train each and test it.

    Both arms score the same assignments, without training; accuracy is that after ``tuning`` epochs of
    straight-through training from one float network. "quantisation range" is the noise alone, with all Fisher
    traces 1. FIT looks at the float network: the further training moves away from it, the less it knows. After two
    epochs at a rate of 5e-4 it is ahead by a third of this, and that is inconclusive on five seeds. The records have
    the correlations of the mean bits, of the weights' part and of the activations' part.
    ``data="cifar10"`` is the paper's; take ``width=32`` and more images for it.
    """
    found = _ranking(trial, data, n_train, width, configs, epochs, tuning, lr, networks)
    for name in ("weights only", "activations only", "mean bits"):
        trial.record(f"rank correlation, {name}", found[name])
    return {name: found[name] for name in ("quantisation range", "fit")}


@comparison(
    paper="fit",
    says="Weights and activations together rank assignments of bits better than weights alone.",
    where="Zandonati et al., Section 5",
    arms=("weights only", "fit"),
    metric="rank correlation of minus the score with test accuracy",
    better="higher",
    smallest={"configs": 8, "epochs": 6, "tuning": 1, "n_train": 400, "width": 4, "networks": 1},
    check=_fits,
)
def needs_both_parts(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1000,
    width: Count = 8,
    configs: Configs = 60,
    epochs: Count = 12,
    tuning: Count = 1,
    lr: Positive = 1e-4,
    networks: Count = 2,
) -> dict[str, float]:
    """Score the same random bits by the weights' part and by the sum of both parts."""
    found = _ranking(trial, data, n_train, width, configs, epochs, tuning, lr, networks)
    trial.record("rank correlation, activations only", found["activations only"])
    return {name: found[name] for name in ("weights only", "fit")}


@comparison(
    paper="fit",
    says="At the same mean bits, the assignment of least FIT is more accurate than a uniform one.",
    where="Zandonati et al., Section 5",
    arms=("uniform", "fit"),
    metric="test accuracy",
    better="higher",
    smallest={"epochs": 1, "tuning": 1, "n_train": 200, "networks": 1},
    check=_fits,
)
def beats_uniform(
    trial: Trial,
    data: Images = "digits",
    n_train: Count = 1000,
    width: Count = 8,
    bits: Bits = 3.0,
    epochs: Count = 12,
    tuning: Count = 2,
    lr: Positive = 5e-4,
    networks: Count = 5,
) -> dict[str, float]:
    """Train each network on at ``bits`` everywhere, and at the assignment of least FIT with that mean.

    Accuracy is the mean over ``networks``, each with its own split. The records have the accuracies before that
    training, and the bytes of both files beside those of the float network's: by ``torch.save``, and packed.
    """
    figures: dict[str, list[float]] = {}
    for number in range(networks):
        start = _start(trial, data, n_train, width, epochs, number)
        least = allocate_bits(start.found, weight_budget=bits, activation_budget=bits)
        arms = {
            "uniform": tuple(dict.fromkeys(layers, int(bits)) for layers in least[:2]),
            "fit": least[:2],
        }
        of: dict[str, float] = {"bytes of the float network's file": saved_bytes(start.net.state_dict())}
        for arm, (weights, activations) in arms.items():
            of[f"accuracy before training, {arm}"] = start.accuracy(start.tuned(weights, activations, 0, lr))
            packed = pack_quantized(start.tuned(weights, activations, tuning, lr).cpu())
            of[f"bytes of the packed file, {arm}"] = len(packed)
            of[arm] = start.accuracy(unpack_quantized(start.net, packed))
        for name, value in of.items():
            figures.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in figures.items()}
    for name in means.keys() - {"uniform", "fit"}:
        trial.record(name, means[name])
    return {arm: means[arm] for arm in ("uniform", "fit")}
