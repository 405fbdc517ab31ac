"""Claims about pruning in rounds: rewound networks stay one solution, and curvature says how much may be cut."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import one_of
from posterity.claims import Between, Count, Positive, Share, Trial, comparison, trend
from posterity.compression import (
    Level,
    error_barrier,
    hessian_spectrum,
    iterative_pruning,
    magnitude_mask,
    prunable_fraction,
)
from posterity.lab import nets
from posterity.lab.costs import saved_bytes
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.lab.metrics import rank_correlation
from posterity.lab.tasks import entry
from posterity.lab.tasks.image_classification import image_epochs
from posterity.lab.tasks.pruning import TIMES, descend

Fraction = Annotated[float, Between(0.01, 0.9)]
Rounds = Annotated[int, Between(2, 40)]
LR, MOMENTUM, BATCH = 0.1, 0.9, 50
TEST = 100  # images to test on, at least
CUTS = (0.36, 0.5, 0.64, 0.8, 0.9, 0.95, 0.98)


class _Task:
    """Images, a network at its initial weights, and its training by steps: one order and one schedule for all."""

    def __init__(self, trial: Trial, data: str, n_train: int, network: str, width: int, epochs: int) -> None:
        images = load_images(data)
        n = len(images.y)
        train, test = split(n, (n_train / n, 1 - n_train / n), trial.seed)
        x = (images.x - images.x[train].mean()) / (images.x[train].std() or 1.0)
        parts = [
            torch.from_numpy(part[rows]).to(trial.device) for rows in (train, test) for part in (x, images.y)
        ]
        self.x, self.y, self.x_test, self.y_test = parts
        shape, n_out = images.x.shape[1:], len(images.classes)
        make = nets.mlp if network == "mlp" else nets.cnn
        n_in = math.prod(shape) if network == "mlp" else shape[0]
        self.net = make(n_in, n_out, width=width, depth=2, seed=trial.seed).to(trial.device)
        generator = torch.Generator().manual_seed(trial.seed)
        self.batches = [
            rows for _ in range(epochs) for rows in torch.randperm(n_train, generator=generator).split(BATCH)
        ]

    def train(self, model: nn.Module, start_step: int, after_step: Callable[[int], None]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
        model.train()
        for step, rows in enumerate(self.batches[start_step:], start_step):
            optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / len(self.batches))) / 2
            optimizer.zero_grad()
            F.cross_entropy(model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()
            after_step(step + 1)

    @torch.no_grad()
    def error(self, model: nn.Module, *, test: bool = False) -> float:
        """Return the share of images that are misclassified."""
        x, y = (self.x_test, self.y_test) if test else (self.x, self.y)
        return float((model.eval()(x).argmax(1) != y).float().mean())

    def loaded(self, state: Mapping[str, Tensor]) -> nn.Module:
        net = copy.deepcopy(self.net)
        net.load_state_dict(state)
        return net

    def retrained(self, start: Mapping[str, Tensor], mask: Mapping[str, Tensor], step: int) -> nn.Module:
        """Return the network trained from a state of the dense one at this step, under a mask."""
        net = self.loaded(start)
        pairs = [(net.get_parameter(name), kept.to(self.x.device)) for name, kept in mask.items()]

        @torch.no_grad()
        def upkeep(_: int = 0) -> None:
            for weight, kept in pairs:
                weight.mul_(kept)

        upkeep()
        self.train(net, step, upkeep)
        return net

    def barriers(self, levels: list[Level]) -> list[float]:
        """Return the barrier of the training error between each level and the next."""
        return [
            error_barrier(
                self.net, a.state, b.state, self.error, recalibrate=lambda model: model(self.x)
            ).height
            for a, b in zip(levels, levels[1:], strict=False)
        ]


def _fits(data: ImageData, n_train: int, epochs: int, rewind_step: int, network: str, **_: Any) -> None:
    one_of("network", network, ("mlp", "cnn"))
    require_rest(len(data.y), "n_train", n_train, TEST, "images")
    steps = epochs * math.ceil(n_train / BATCH)
    if rewind_step >= steps:
        raise ValueError(
            f"rewind_step must be less than the {steps} steps of the training, got {rewind_step}"
        )


def _pruned(
    task: _Task, restart: Any, rounds: int, fraction: float, rewind_step: int, seed: int
) -> list[Level]:
    return iterative_pruning(
        task.net, task.train, rounds=rounds, fraction=fraction, rewind_step=rewind_step, restart=restart,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


@comparison(
    paper="imp-geometry",
    says="Rewound, sparse networks of successive rounds stay in one linearly connected mode; with new weights under such masks they do not.",
    where="Paul et al., Section 3",
    arms=("reinitialised", "rewound"),
    metric="training-error barrier between successive levels, mean from the second round on",
    better="lower",
    smallest={"n_train": 300, "width": 30, "epochs": 4, "rounds": 2, "rewind_step": 4},
    check=_fits,
)
def one_mode(
    trial: Trial, data: Images = "digits", n_train: Annotated[int, Between(BATCH)] = 1200, network: Literal["mlp", "cnn"] = "mlp",
    width: Count = 100, epochs: Count = 12, rewind_step: Annotated[int, Between(0)] = 30, rounds: Rounds = 6,
    fraction: Fraction = 0.36,
) -> dict[str, float]:  # fmt: skip
    """Prune the same network twice, to the same densities, with the same batches in the same order.

    After each cut one arm goes back to its weights at the rewind step, the other draws new ones. The
    curves have barriers and test errors of each density.
    """
    task = _Task(trial, data, n_train, network, width, epochs)
    height = {}
    for arm, restart in (("reinitialised", "reinitialise"), ("rewound", "rewind")):
        levels = _pruned(task, restart, rounds, fraction, rewind_step, trial.seed)
        barriers = task.barriers(levels)
        for level, barrier in zip(levels[1:], barriers, strict=True):
            trial.track(f"barrier, {arm}", level.density, barrier)
        for level in levels:
            trial.track(f"test error, {arm}", level.density, task.error(task.loaded(level.state), test=True))
        trial.record(f"test error of the sparsest, {arm}", trial.curves[f"test error, {arm}"][-1][1])
        height[arm] = float(np.mean(barriers[1:]))
    return height


@comparison(
    paper="imp-geometry",
    says="Pruning in rounds reaches a lower test error at high sparsity than one cut.",
    where="Paul et al., Section 4",
    arms=("one-shot", "iterative"),
    metric="test error at the last density",
    better="lower",
    smallest={"n_train": 300, "width": 30, "epochs": 4, "rounds": 3, "rewind_step": 4},
    check=_fits,
)
def rounds_beat_one_cut(
    trial: Trial, data: Images = "digits", n_train: Annotated[int, Between(BATCH)] = 1200, network: Literal["mlp", "cnn"] = "mlp",
    width: Count = 100, epochs: Count = 12, rewind_step: Annotated[int, Between(0)] = 30, rounds: Rounds = 10,
    fraction: Fraction = 0.36,
) -> dict[str, float]:  # fmt: skip
    """Prune one network in rounds and at once, to the same density, each time with the same training after.

    Rounds train as often as there are of them: the record has what one cut reaches when its network
    is trained for as many steps as all of them together. It also has the bytes of the states, as
    ``torch.save`` and zlib pack them, dense and sparse.
    """
    task = _Task(trial, data, n_train, network, width, epochs)
    long = _Task(trial, data, n_train, network, width, epochs * rounds)
    levels = _pruned(task, "rewind", rounds, fraction, rewind_step, trial.seed)
    dense = task.loaded(levels[0].state)
    once = magnitude_mask(dense, 1 - levels[-1].density)
    sparse = {
        arm: each.retrained(levels[0].start, once, rewind_step)
        for arm, each in (("once", task), ("long", long))
    }
    trial.record("density", levels[-1].density)
    trial.record("test error, dense", task.error(dense, test=True))
    trial.record("test error, one-shot, as many steps as all rounds", task.error(sparse["long"], test=True))
    trial.record("bytes, dense", saved_bytes(levels[0].state, deflated=True))
    trial.record("bytes, iterative", saved_bytes(levels[-1].state, deflated=True))
    return {
        "one-shot": task.error(sparse["once"], test=True),
        "iterative": task.error(task.loaded(levels[-1].state), test=True),
    }


@trend(
    paper="imp-geometry",
    says="Curvature at the end of training says how much the next round may cut.",
    where="Paul et al., Section 4",
    metric="Spearman correlation over levels of the predicted share with the largest that still trains",
    low=0.8,
    smallest={"n_train": 300, "width": 30, "epochs": 4, "rounds": 2, "rewind_step": 4, "n_iter": 5},
    check=_fits,
)
def curvature_predicts(
    trial: Trial, data: Images = "digits", n_train: Annotated[int, Between(BATCH)] = 1200, network: Literal["mlp", "cnn"] = "mlp",
    width: Count = 100, epochs: Count = 12, rewind_step: Annotated[int, Between(0)] = 30, rounds: Rounds = 6,
    fraction: Fraction = 0.36, epsilon: Positive = 0.05, tolerance: Share = 0.005, n_iter: Count = 40,
) -> float:  # fmt: skip
    """Prune in rounds; at each level predict from weights and Hessian, then try cuts, each rewound and retrained.

    What counts is the largest of seven cuts whose network misclassifies at most ``tolerance`` more of the
    training images than the dense one. The prediction is of a rise of the training loss by ``epsilon``.
    """
    task = _Task(trial, data, n_train, network, width, epochs)
    levels = _pruned(task, "rewind", rounds, fraction, rewind_step, trial.seed)
    allowed = task.error(task.loaded(levels[0].state)) + tolerance
    predicted, measured = [], []
    for level in levels:
        net = task.loaded(level.state)
        left = torch.cat(
            [net.get_parameter(name)[kept.to(trial.device)] for name, kept in level.mask.items()]
        )
        spectrum = hessian_spectrum(
            net, [(task.x, task.y)], mask=level.mask, n_iter=n_iter, n_probes=3,
            generator=torch.Generator().manual_seed(trial.seed),
        )  # fmt: skip
        predicted.append(prunable_fraction(left, spectrum, epsilon))
        best = 0.0
        for cut in CUTS:
            sparse = task.retrained(levels[0].start, magnitude_mask(net, cut, level.mask), rewind_step)
            if task.error(sparse) > allowed:
                break
            best = cut
        measured.append(best)
        trial.track("predicted share", level.density, predicted[-1])
        trial.track("largest share that still trains", level.density, best)
    return rank_correlation(predicted, measured)


@trend(
    paper="imp-geometry",
    says="Sparse networks that match the dense one are joined to the last level without a barrier, those that do not are not.",
    where="Paul et al., Section 3",
    metric="Spearman correlation over levels of the training-error barrier to the last one with the training error",
    low=0.7,
    smallest={"n_train": 300, "width": 30, "epochs": 4, "rounds": 2, "rewind_step": 4},
    check=_fits,
)
def barrier_and_error(
    trial: Trial, data: Images = "digits", n_train: Annotated[int, Between(BATCH)] = 1200, network: Literal["mlp", "cnn"] = "mlp",
    width: Count = 100, epochs: Count = 12, rewind_step: Annotated[int, Between(0)] = 30, rounds: Rounds = 6,
    fraction: Fraction = 0.36,
) -> float:  # fmt: skip
    """Prune rewound and with new weights, and rank all levels of both by barrier and by error.

    Both are of the training images. The record has the correlation with the test error, where a few
    images more or less reorder the levels that match.
    """
    task = _Task(trial, data, n_train, network, width, epochs)
    barriers: list[float] = []
    errors: list[float] = []
    test: list[float] = []
    for restart in ("rewind", "reinitialise"):
        levels = _pruned(task, restart, rounds, fraction, rewind_step, trial.seed)
        barriers += task.barriers(levels)
        errors += [task.error(task.loaded(level.state)) for level in levels[1:]]
        test += [task.error(task.loaded(level.state), test=True) for level in levels[1:]]
    for barrier, error in zip(barriers, errors, strict=True):
        trial.track("barrier over training error", error, barrier)
    trial.record("correlation with the test error", rank_correlation(barriers, test))
    return rank_correlation(barriers, errors)


@entry("pruning", "IMP", paper="imp-geometry", where={"of": "weights"})
def iterated(train: Any, seed: int) -> nn.Module:
    """Return the last of four rounds, each cut, set back to the initial weights and trained again."""
    net, (x, y), share, _ = train
    fresh = nets.cnn(x.shape[1], net[-1].out_features, width=16, seed=seed)

    def again(net: nn.Module, start: int, after_step: Callable[[int], None]) -> None:
        steps = itertools.count(start + 1)
        descend(net, x, y, epochs=image_epochs(len(x)), seed=seed, after=lambda: after_step(next(steps)))

    fraction = 1 - (0.999 * share) ** (1 / TIMES)  # a little more: counts are rounded
    levels = iterative_pruning(fresh, again, rounds=TIMES, fraction=fraction)
    net.load_state_dict(levels[-1].state)
    return net.eval()
