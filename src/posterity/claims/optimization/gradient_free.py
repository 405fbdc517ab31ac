"""Claims about search without gradients: at equal loss it generalises as SGD does, and its memory is flat in depth."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Several, Trial, bound, comparison, trend
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.memory import checkpointed, peak_bytes
from posterity.lab.metrics import rank_correlation
from posterity.lab.nets import seeded
from posterity.lab.tasks import Training, Walk, entry
from posterity.optimization import (
    GreedyRandomSearch,
    GuessResult,
    PatternSearch,
    guess_and_check,
    population_search,
    stacked_logits,
)

BATCH = 2  # of SGD, as in the paper
AT_ONCE = 4_000_000  # numbers drawn at a time
Few = Annotated[int, Between(2, 64)]
Width = Annotated[int, Between(2, 1024)]


def _usable(data: ImageData, n_train: int) -> list[int]:
    """Return the classes that have examples to learn from and as many to test on."""
    return [k for k, n in enumerate(np.bincount(data.y)) if n >= max(5, 2 * (n_train // 2))]


def _fits(data: ImageData, n_train: int, **more: Any) -> None:
    if n_train % 2:
        raise ValueError(f"n_train must be even, half of it is of each class, got {n_train}")
    if more.get("low", 0.0) >= more.get("high", 1.0):
        raise ValueError(f"low must be less than high={more['high']}, got {more['low']}")
    if len(_usable(data, n_train)) < 2:
        raise ValueError(
            f"two classes with {2 * (n_train // 2)} images each or more are needed: set n_train lower"
        )


def _pair(data: str, n_train: int, trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels of two classes at random, a few of each to learn from and all others."""
    images = load_images(data)
    rng = np.random.default_rng(trial.seed)
    classes = rng.choice(_usable(images, n_train), 2, replace=False)
    parts: list[list[np.ndarray]] = [[], []]
    for k in classes:
        rows = rng.permutation(np.flatnonzero(images.y == k))
        for part, chosen in zip(parts, (rows[: n_train // 2], rows[n_train // 2 :]), strict=True):
            part.append(chosen)
    train, test = (np.concatenate(part) for part in parts)
    return _tensors(images, train, test, trial, classes)


def _tensors(
    images: ImageData, train: np.ndarray, test: np.ndarray, trial: Trial, classes: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images as rows, standardised by one mean and one deviation, and the places of their classes."""
    rows = np.concatenate([train, test])
    mean, deviation = images.x[rows].mean(), images.x[rows].std() + 1e-6
    places = {int(k): place for place, k in enumerate(classes)}
    made = []
    for part in (train, test):
        x = (images.x[part].reshape(len(part), -1) - mean) / deviation
        y = np.array([places[int(k)] for k in images.y[part]])
        made += [torch.from_numpy(x).to(trial.device), torch.from_numpy(y).to(trial.device)]
    x, y, x_test, y_test = made
    return x, y, x_test, y_test


def _perceptron(x: Tensor, width: int, classes: int, trial: Trial, seed: int = 0) -> nn.Sequential:
    with seeded(trial.seed + seed):
        net = nn.Sequential(nn.Linear(x.shape[1], width, bias=False), nn.ReLU(), nn.Linear(width, classes, bias=False))  # fmt: skip
    return net.to(trial.device)


def _guess(
    trial: Trial, net: nn.Module, x: Tensor, y: Tensor, n_models: int, max_tries: int,
    loss_range: tuple[float, float] = (-np.inf, np.inf),
) -> GuessResult:  # fmt: skip
    found = guess_and_check(
        net, x, y, n_models=n_models, loss_range=loss_range, max_tries=max_tries,
        batch_size=max(64, min(4096, AT_ONCE // sum(p.numel() for p in net.parameters()))),
        generator=torch.Generator().manual_seed(trial.seed),
    )  # fmt: skip
    if len(found.losses) < 2:
        raise ValueError(f"n_train must be lower, or the losses wider: {found.n_tried} guesses gave too few")
    trial.record("guesses for one that fits", 1 / found.success_rate)
    return found


def _accuracies(net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return (stacked_logits(net, params, x).argmax(2) == y).float().mean(1)


def _sgd(
    trial: Trial, net: nn.Module, x: Tensor, y: Tensor, n_models: int, low: float, high: float, lr: float, steps: int
) -> dict[str, Tensor]:  # fmt: skip
    """Return networks that SGD trains from uniform draws until they are right on all with at most the loss."""
    draw = torch.Generator().manual_seed(trial.seed + 1)
    first, second = (
        (2 * torch.rand((n_models, *p.shape), generator=draw) - 1).to(p) for p in net.parameters()
    )
    kept: list[tuple[Tensor, Tensor]] = []
    rows = torch.arange(n_models)  # whose order of examples it is
    order = torch.empty(0)
    for step in range(steps):
        at = step % (len(x) // BATCH)
        if at == 0:
            order = torch.rand((n_models, len(x)), generator=draw).argsort(1)
        logits = torch.bmm(second, (first @ x.T).relu())  # (n_models, classes, n)
        scaled = logits / (first.flatten(1).norm(dim=1) * second.flatten(1).norm(dim=1))[:, None, None]
        losses = F.cross_entropy(scaled, y.expand(len(rows), -1), reduction="none").mean(1)
        stopped = (logits.argmax(1) == y).all(1) & (losses <= high)
        if stopped.any():
            inside = stopped & (losses > low)
            kept.append((first[inside], second[inside]))
            first, second, rows = first[~stopped], second[~stopped], rows[~stopped.cpu()]
        if not len(rows):
            break
        batch = order[rows, BATCH * at : BATCH * (at + 1)].to(x.device)
        first, second = first.requires_grad_(), second.requires_grad_()
        out = torch.bmm(torch.bmm(x[batch], first.mT).relu(), second.mT)  # (n_models, BATCH, classes)
        loss = F.cross_entropy(out.flatten(0, 1), y[batch].flatten(), reduction="sum") / BATCH
        slopes = torch.autograd.grad(loss, (first, second))
        first, second = first.detach() - lr * slopes[0], second.detach() - lr * slopes[1]
    found = [torch.cat([pair[k] for pair in kept]) if kept else first[:0] for k in range(2)]
    if len(found[0]) < 2:
        raise ValueError("steps must be more, or the losses wider: too few networks of SGD ended among them")
    return {name: p for (name, _), p in zip(net.named_parameters(), found, strict=True)}


@bound(
    paper="gradient-free",
    says="At equal training loss SGD generalises no better than guessing.",
    where="Chiang et al., Section 3",
    metric="test accuracy of SGD, less that of guess-and-check, at equal loss",
    limit=0.03,
    smallest={"n_train": 4, "n_models": 6, "steps": 300, "high": 0.66},
    check=_fits,
)
def implicit_bias(
    trial: Trial,
    data: Images = "digits",
    n_train: Few = 16,
    width: Width = 16,
    n_models: Annotated[int, Between(4)] = 80,
    low: Positive = 0.60,
    high: Positive = 0.63,
    lr: Positive = 0.003,
    steps: Count = 4_000,
    max_tries: Count = 1_000_000,
) -> float:
    """Fit networks of two layers to two classes, by guesses and by SGD from as many draws, to one range of losses."""
    x, y, x_test, y_test = _pair(data, n_train, trial)
    net = _perceptron(x, width, 2, trial)
    found = _guess(trial, net, x, y, n_models, max_tries, (low, high))
    trained = _sgd(trial, net, x, y, n_models, low, high, lr, steps)
    guessed = float(_accuracies(net, found.params, x_test, y_test).mean())
    descended = float(_accuracies(net, trained, x_test, y_test).mean())
    trial.record("test accuracy of guess-and-check", guessed)
    trial.record("test accuracy of SGD", descended)
    trial.record("networks of SGD in the range", len(next(iter(trained.values()))))
    return descended - guessed


@comparison(
    paper="gradient-free",
    says="Networks that fit by mere guessing generalise.",
    where="Chiang et al., Section 3",
    arms=("chance", "guess-and-check"),
    metric="test accuracy, two classes",
    better="higher",
    smallest={"n_train": 4, "n_models": 4, "n_searched": 12, "steps": 20},
    check=_fits,
)
def guessing(
    trial: Trial,
    data: Images = "digits",
    n_train: Few = 16,
    width: Width = 16,
    n_models: Several = 40,
    n_searched: Annotated[int, Between(4)] = 100,
    steps: Count = 2_000,
    max_tries: Count = 1_000_000,
) -> dict[str, float]:
    """Guess networks that fit two classes; beside it, all classes by pattern search and by SGD, not judged."""
    x, y, x_test, y_test = _pair(data, n_train, trial)
    net = _perceptron(x, width, 2, trial)
    found = _guess(trial, net, x, y, n_models, max_tries)
    _searches(trial, data, n_searched, width, steps)
    chance = float(torch.bincount(y_test, minlength=2).max() / len(y_test))
    trial.record("share of the larger class", chance)
    return {"chance": 0.5, "guess-and-check": float(_accuracies(net, found.params, x_test, y_test).mean())}


def _searches(trial: Trial, data: str, n_train: int, width: int, steps: int) -> None:
    """Record how pattern search and SGD from one start, both until all is right, do on all classes."""
    images = load_images(data)
    order = np.random.default_rng(trial.seed).permutation(len(images.y))
    n_train = min(n_train, len(order) // 2)
    classes = np.arange(len(images.classes))
    x, y, x_test, y_test = _tensors(images, order[:n_train], order[n_train:], trial, classes)
    net = _perceptron(x, width, len(classes), trial)
    result = population_search(
        net, x, y, max_steps=steps, normalize=False, generator=torch.Generator().manual_seed(trial.seed)
    )
    found = {name: p[None] for name, p in result.params.items()}
    trial.record("pattern search, all classes: test accuracy", float(_accuracies(net, found, x_test, y_test)))
    trial.record("pattern search, all classes: training accuracy", result.accuracy)
    optimizer, draw = torch.optim.SGD(net.parameters(), lr=0.1), torch.Generator().manual_seed(trial.seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(16, len(x)),), generator=draw).to(x.device)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if bool((net(x).argmax(1) == y).all()):
            break
    with torch.no_grad():
        for name, (rows, labels) in {"test": (x_test, y_test), "training": (x, y)}.items():
            trial.record(
                f"SGD, all classes: {name} accuracy", float((net(rows).argmax(1) == labels).float().mean())
            )


@trend(
    paper="gradient-free",
    says="Of networks that guessing found, those with the lower loss generalise better.",
    where="Chiang et al., Section 3",
    metric="rank correlation of normalised training loss and test accuracy",
    low=-1.0,
    high=0.0,
    smallest={"n_train": 4, "n_models": 20},
    check=_fits,
)
def loss_predicts(
    trial: Trial,
    data: Images = "digits",
    n_train: Few = 16,
    width: Width = 16,
    n_models: Annotated[int, Between(10)] = 400,
    max_tries: Count = 1_000_000,
) -> float:
    """Guess networks that fit two classes, whatever their loss."""
    x, y, x_test, y_test = _pair(data, n_train, trial)
    net = _perceptron(x, width, 2, trial)
    found = _guess(trial, net, x, y, n_models, max_tries)
    accuracies = _accuracies(net, found.params, x_test, y_test)
    for part in found.losses.argsort().chunk(10):
        trial.track("test accuracy", float(found.losses[part].mean()), float(accuracies[part].mean()))
    return rank_correlation(found.losses.cpu(), accuracies.cpu())


@bound(
    paper="gradient-free",
    says="Memory of a step of search does not grow with depth.",
    where="what a search without gradients does not keep",
    metric="peak bytes of a step of pattern search at four times the depth, over those at the depth",
    limit=1.1,
    smallest={"depth": 2, "batch": 64},
)
def memory(
    trial: Trial, data: Images = "digits", depth: Annotated[int, Between(2, 16)] = 3, batch: Count = 512, width: Annotated[int, Between(10, 2048)] = 64
) -> float:  # fmt: skip
    """Measure a step of pattern search, greedy random search, back-propagation and checkpointing, at depths between.

    Parameters do not count, they were there before the step; what greedy random search copies of them does.
    """
    images = load_images(data)
    rows = np.random.default_rng(trial.seed).integers(len(images.y), size=batch)
    x = torch.from_numpy(images.x[rows]).to(trial.device)
    y = torch.from_numpy(images.y[rows]).to(trial.device)
    depths, peaks = [depth, 2 * depth, 3 * depth, 4 * depth], []
    for layers in depths:
        net = _deep(x[0].numel(), width, layers, len(images.classes), trial)
        closure: Callable[[], Tensor] = lambda net=net: F.cross_entropy(net(x), y)  # noqa: E731
        draw = torch.Generator().manual_seed(trial.seed)
        for name, make in (("pattern search", PatternSearch), ("greedy random search", GreedyRandomSearch)):
            optimizer = make(net.parameters(), radius=0.1, generator=draw)
            peak = peak_bytes(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
            trial.track(f"peak bytes: {name}", layers, peak)
            if make is PatternSearch:
                peaks.append(peak)
        *hidden, read = net
        for name, run in (
            ("back-propagation", nn.Sequential(*hidden)),
            ("checkpointing", partial(checkpointed, hidden)),
        ):
            net.zero_grad()
            peak = peak_bytes(lambda read=read, run=run: F.cross_entropy(read(run(x)), y).backward())
            trial.track(f"peak bytes: {name}", layers, peak)
    return peaks[-1] / peaks[0]


def _deep(n_in: int, width: int, depth: int, classes: int, trial: Trial) -> nn.Sequential:
    with seeded(trial.seed):
        first = nn.Sequential(nn.Flatten(), nn.Linear(n_in, width), nn.ReLU())
        more = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth - 1)]
        net = nn.Sequential(first, *more, nn.Linear(width, classes))
    return net.to(trial.device)


def _searched(train: Training, seed: int, kind: type[PatternSearch] | type[GreedyRandomSearch]) -> Walk:
    """Return the best of four first radii; every evaluation of the loss costs a third of a gradient."""

    def make(net: nn.Module, setting: float) -> Any:
        search = kind(net.parameters(), radius=setting, generator=torch.Generator().manual_seed(seed))

        def step(closure: Callable[[], Tensor], batch: Any) -> float:
            calls = 0

            def counted() -> Tensor:
                nonlocal calls
                calls += 1
                return closure() if calls <= 3 * train.budget else torch.tensor(torch.inf)

            search.step(counted)
            return calls / 3

        return step

    return train.tuned(make, (0.003, 0.01, 0.03, 0.1), gradient=False)


@entry("optimizer", "pattern search", paper="gradient-free")
def compared_pattern(train: Training, seed: int) -> Walk:
    """Return the best of four first radii."""
    return _searched(train, seed, PatternSearch)


@entry("optimizer", "greedy random search", paper="gradient-free")
def compared_random(train: Training, seed: int) -> Walk:
    """Return the best of four first radii."""
    return _searched(train, seed, GreedyRandomSearch)
