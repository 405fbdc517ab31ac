"""Optimisers: train is a `Training`, predict maps the test part's inputs to logits.

A network is trained for a budget of gradient evaluations of one batch, whichever way they are spent:
an optimiser that takes two a step takes half as many steps. Every entry tries as many settings, and
keeps the one of the least loss on a validation part, of 500 inputs at most. The network is a small convolutional one for
images, a fully connected one for rows, and for text a causal transformer that predicts the next character.

Rates fall linearly to 0 over the budget, for every entry that has them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from posterity.claims import Count
from posterity.lab.data import Examples, ImageData, TextData, load_examples, split
from posterity.lab.nets import mlp, seeded
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import standardised

__all__ = ["SETTINGS", "Training", "Walk"]

Measure = Literal["loss", "evaluations", "seconds"]
Part = tuple[Tensor, Tensor]

SETTINGS = 4  # that each entry tries
BATCH, LENGTH, LOOKS = 64, 32, 25  # samples a step, characters a sequence, looks at the validation part
SEEN = 500  # of it at a look, at most
MOST = 1000  # classes


class CharacterModel(nn.Module):
    """Predicts the next character at each place: one causal transformer layer of two heads."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.read = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        h = self.letters(tokens) + self.places(torch.arange(n, device=tokens.device))
        q, k, v = (
            part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.attend(self.before(h)).chunk(3, 2)
        )
        later = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        weight = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(later, -torch.inf).softmax(3)
        h = h + self.join((weight @ v).transpose(1, 2).flatten(2))
        h = h + self.narrow(F.gelu(self.widen(self.between(h))))
        return self.read(h).transpose(1, 2)  # classes second, as cross-entropy wants them


@dataclass
class Walk:
    """How a network was trained with one setting.

    Attributes
    ----------
    net : nn.Module
    losses : list of (float, float, float)
        Gradient evaluations until then, seconds, and the loss on the validation part.
    """

    net: nn.Module
    losses: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass
class Training:
    """What an entry trains on, and how long it may.

    Attributes
    ----------
    parts : tuple of (Tensor, Tensor)
        Inputs and labels to learn from, and those to choose by.
    make : callable
        ``make()`` returns the network, with the same initial weights each time.
    budget : float
        Gradient evaluations of one batch.
    seed : int
        Decides the order of the batches.
    """

    parts: tuple[Part, Part]
    make: Callable[[], nn.Module]
    budget: float
    seed: int

    def tuned(
        self, make: Callable[[nn.Module, float], Any], settings: Sequence[float], *, cost: float = 1.0,
        gradient: bool = True,
    ) -> Walk:  # fmt: skip
        """Return the best of the walks with each setting.

        Parameters
        ----------
        make : callable
            ``make(net, setting)`` returns an optimiser, whose ``step`` gets a closure, or a function of a closure
            and a batch that takes a step and returns what it cost.
        settings : sequence of float
            As many as every entry tries.
        cost : float, default=1.0
            Of an optimiser's step, in gradient evaluations; a forward pass alone is a third.
        gradient : bool, default=True
            Whether the closure calls ``backward``.

        Returns
        -------
        Walk
        """
        if len(settings) != SETTINGS:
            raise ValueError(
                f"settings must be {SETTINGS}, as many as every entry tries, got {len(settings)}"
            )
        walks = [
            self._walk(lambda net, setting=setting: make(net, setting), cost, gradient)
            for setting in settings
        ]
        return min(walks, key=lambda walk: walk.losses[-1][2])

    def _walk(self, make: Callable[[nn.Module], Any], cost: float, gradient: bool) -> Walk:
        walk = Walk(self.make())
        with seeded(self.seed + 1):
            stepper = make(walk.net)
        schedule = None
        if isinstance(stepper, Optimizer) and "lr" in stepper.param_groups[0]:
            n = max(1, round(self.budget / cost))
            schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: max(0.0, 1 - step / n))
        batches, spent, seconds, look = self._batches(), 0.0, 0.0, 0
        params = list(walk.net.parameters())
        while spent < self.budget - 1e-9:  # thirds add up to a little less
            x, y = next(batches)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                if not gradient:
                    return _loss(walk.net, x, y)
                for p in params:
                    p.grad = None
                loss = _loss(walk.net, x, y)
                loss.backward()
                return loss.detach()

            start = time.perf_counter()
            if isinstance(stepper, Optimizer):
                stepper.step(closure)  # type: ignore[arg-type]
                spent += cost
            else:
                spent += stepper(closure, (x, y))
            if schedule is not None:
                schedule.step()
            seconds += time.perf_counter() - start
            if spent >= min(look + 1, LOOKS) * self.budget / LOOKS - 1e-9:
                look += 1
                walk.losses.append((spent, seconds, self.loss(walk.net)))
                if not math.isfinite(walk.losses[-1][2]):
                    walk.losses[-1] = (spent, seconds, math.inf)
                    break
        return walk

    def loss(self, net: nn.Module) -> float:
        """Return the mean loss of a network on the part to choose by."""
        return _mean_loss(net, *self.parts[1])

    def _batches(self):
        x, y = self.parts[0]
        order = torch.Generator().manual_seed(self.seed)
        while True:
            for rows in torch.randperm(len(y), generator=order).split(BATCH):
                yield x[rows], y[rows]


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


@torch.no_grad()
def _mean_loss(net: nn.Module, x: Tensor, y: Tensor) -> float:
    each = [
        F.cross_entropy(net(a), b, reduction="sum") for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(torch.stack(each).sum() / y.numel())


def _characters(text: TextData, seed: int) -> tuple[list[Part], int, float]:
    """Return sequences of the first four fifths, of the next and the last tenth, and what two letters alone tell."""
    written = " ".join(text.vocabulary[k] for k in text.tokens)
    known, codes = np.unique(np.array(list(written)), return_inverse=True)
    codes, n = torch.from_numpy(codes), len(written)
    first, last = n * 8 // 10, n * 9 // 10
    pieces = codes[:first], codes[first : min(last, first + SEEN * LENGTH + 1)], codes[last:]
    parts = []
    for piece in pieces:
        rows = piece[: (len(piece) - 1) // LENGTH * LENGTH].reshape(-1, LENGTH)
        parts.append((rows, piece[1 : rows.numel() + 1].reshape(-1, LENGTH)))
    counts = torch.ones(len(known), len(known), dtype=torch.float64)
    counts.index_put_(
        (pieces[0][:-1], pieces[0][1:]), torch.ones(len(pieces[0]) - 1, dtype=torch.float64), accumulate=True
    )
    pairs = (counts / counts.sum(1, keepdim=True)).log()
    x, y = parts[1]
    return parts, len(known), -float(pairs[x, y].mean())


def _classes(images: ImageData, seed: int) -> tuple[list[Part], int, float]:
    """Return inputs and labels in three parts, and the loss of a linear model on the second."""
    train, choose, test = split(len(images.y), (0.6, 0.2, 0.2), seed, stratify=images.y)
    chosen = train, choose[:SEEN], test
    x = standardised(images.x, train)
    (a, ya), (b, yb) = [(x[rows].reshape(len(rows), -1), images.y[rows]) for rows in chosen[:2]]
    linear = LogisticRegression(C=0.1, max_iter=300).fit(a, ya)
    sure = np.full((len(b), len(images.classes)), 1e-12)
    sure[:, linear.classes_] = linear.predict_proba(b)
    target = -float(np.log(np.maximum(sure[np.arange(len(b)), yb], 1e-12)).mean())
    parts = [(torch.from_numpy(x[rows]), torch.from_numpy(images.y[rows])) for rows in chosen]
    return parts, len(images.classes), target


def _network(data: ImageData | TextData, n_out: int, seed: int) -> nn.Module:
    if isinstance(data, TextData):
        with seeded(seed):
            return CharacterModel(n_out)
    if data.x.shape[2:] == (1, 1):
        return mlp(data.x.shape[1], n_out, seed=seed)
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(data.x.shape[1], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, n_out),
        )  # fmt: skip


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, measure: Measure = "loss",
    budget: Count = 300,
) -> float:  # fmt: skip
    examples = load_examples(data, target=target)
    parts, n_out, linear = (_characters if isinstance(examples, TextData) else _classes)(examples, seed)  # type: ignore[operator]
    train = Training((parts[0], parts[1]), partial(_network, examples, n_out, seed), float(budget), seed)
    walk = fit(train, seed)
    if measure == "loss":
        return min(_mean_loss(walk.net, *parts[2]), 1e6)
    reached = next((look for look in walk.losses if look[2] <= linear), walk.losses[-1])
    return reached[0] if measure == "evaluations" else reached[1]


def _needs(examples: ImageData | TextData, **_: Any) -> None:
    if isinstance(examples, TextData):
        n = sum(len(examples.vocabulary[k]) + 1 for k in examples.tokens)
        if n < 20 * LENGTH:
            raise ValueError(f"at least {20 * LENGTH} characters are needed, has {n}")
    elif len(examples.y) < 20:
        raise ValueError(f"at least 20 inputs are needed, has {len(examples.y)}")
    elif len(examples.classes) > MOST:
        raise ValueError(
            f"at most {MOST} classes are told apart, has {len(examples.classes)}: is the target a number?"
        )


TASK = Task(
    "optimizer",
    Examples,
    "test loss after the budget, nats",
    "lower",
    "digits",
    _score,
    takes_target=True,
    needs=_needs,
)


@entry("optimizer", "SGD with momentum")
def momentum(train: Training, seed: int) -> Walk:
    """Return the best of four rates, momentum 0.9."""
    return train.tuned(
        lambda net, setting: SGD(net.parameters(), lr=setting, momentum=0.9), (0.03, 0.1, 0.3, 1.0)
    )


@entry("optimizer", "AdamW")
def adamw(train: Training, seed: int) -> Walk:
    """Return the best of four rates, torch's other defaults."""
    return train.tuned(lambda net, setting: AdamW(net.parameters(), lr=setting), (3e-4, 1e-3, 3e-3, 1e-2))


@entry("optimizer", "Muon")
def muon(train: Training, seed: int) -> Walk:
    """Return the best of four rates: Muon for weights inside, kernels as matrices; AdamW at a tenth for the rest."""

    def make(net: nn.Module, setting: float) -> Any:
        tables = {id(part.weight) for part in net.modules() if isinstance(part, nn.Embedding)}
        inside = [p for p in net.parameters() if p.ndim >= 2 and id(p) not in tables][
            :-1
        ]  # the last one reads out
        matrices = [p.detach().view(len(p), -1).requires_grad_() for p in inside]  # of the same storage
        others = [p for p in net.parameters() if all(p is not each for each in inside)]
        steppers = [AdamW(others, lr=setting / 10), torch.optim.Muon(matrices, lr=setting)]
        falling = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda n: max(0.0, 1 - n / train.budget))
            for each in steppers
        ]

        def step(closure: Callable[[], Tensor], batch: Part) -> float:
            closure()
            for p, matrix in zip(inside, matrices, strict=True):
                matrix.grad = p.grad.view_as(matrix)  # type: ignore[union-attr]
            for each, fall in zip(steppers, falling, strict=True):
                each.step()
                fall.step()
            return 1.0

        return step

    return train.tuned(make, (0.003, 0.01, 0.03, 0.1))
