"""Continual learning: tasks arrive one after another, and a learner is asked about all of them after each.

A learner has ``observe(x, y, task=None)``, which sees images (n, c, h, w) and labels (n,) once, in the order of their
arrival, and ``predict(x)``, which may be asked at any time and returns labels (n,). Three streams: classes that come
in turn (``classes``), the same with a share of each class spread over all tasks, so that no boundary is sharp
(``blurry``), and the same classes seen under another angle in each task (``domains``).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.lab.data.images import ImageData, require_images
from posterity.lab.data.splits import split
from posterity.lab.nets import cnn, mlp, weights

__all__ = [
    "Body", "Experience", "Kept", "Learner", "ReplayLearner", "Scenario", "body_for", "experiences", "kept", "learn",
    "require_experiences",
]  # fmt: skip

Scenario = Literal["classes", "blurry", "domains"]
ARRIVE = 16  # samples that arrive together


@runtime_checkable
class Learner(Protocol):
    """What learns from a stream."""

    def observe(self, x: Tensor, y: Tensor, task: int | None = None) -> Any:
        """Learn from samples, once."""
        ...

    def predict(self, x: Tensor) -> Tensor:
        """Return labels."""
        ...


class Experience(NamedTuple):
    """One task of a stream: what arrives, and what it is tested on."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Kept(NamedTuple):
    """What a learner knows after a stream, from the scores (T, T) of each task (column) after each (row)."""

    average: float
    forgetting: float
    backward: float
    forward: float


class Body(NamedTuple):
    """A network to features, and how many there are."""

    net: nn.Module
    n_features: int


def experiences(
    images: ImageData, scenario: Scenario, n_tasks: int, seed: int, *, blur: float = 0.3, n_test: int = 400
) -> list[Experience]:
    """Return the tasks of a stream in the order in which they come.

    Parameters
    ----------
    images : ImageData
    scenario : {"classes", "blurry", "domains"}
    n_tasks : int
        At most the number of classes, but for domains.
    seed : int
        Decides split, order of classes and order of arrival.
    blur : float, default=0.3
        The share of each class that comes at a random task, where the stream is blurry.
    n_test : int, default=400
        At most a third of all are kept to test on.

    Returns
    -------
    list of Experience
    """
    share = min(n_test, len(images.y) // 3) / len(images.y)
    train, test = split(len(images.y), (1 - share, share), seed, stratify=images.y)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    rng = np.random.default_rng(seed)
    if scenario == "domains":
        of_train, of_test = np.arange(len(train)) % n_tasks, None
    else:
        turn = np.empty(len(images.classes), dtype=int)
        turn[rng.permutation(len(turn))] = np.arange(len(turn)) * n_tasks // len(turn)
        of_train, of_test = turn[images.y[train]], turn[images.y[test]]
        if scenario == "blurry":
            moved = rng.random(len(train)) < blur
            of_train = np.where(moved, rng.integers(n_tasks, size=len(train)), of_train)
    found = []
    for task in range(n_tasks):
        rows, held = train[of_train == task], test if of_test is None else test[of_test == task]
        angle = 90 * task / max(n_tasks - 1, 1) if scenario == "domains" else 0.0
        found.append(Experience(_turned(x[rows], angle), y[rows], _turned(x[held], angle), y[held]))
    return found


def require_experiences(data: ImageData, scenario: Scenario = "classes", n_tasks: int = 5, **_: Any) -> None:
    """Refuse images that cannot be dealt out to tasks.

    Parameters
    ----------
    data : ImageData
    scenario : {"classes", "blurry", "domains"}
    n_tasks : int
    **_
        Other settings.
    """
    require_images(data)
    if scenario != "domains" and len(data.classes) < n_tasks:
        raise ValueError(f"n_tasks must be at most the {len(data.classes)} classes, got {n_tasks}")
    counts = np.bincount(data.y, minlength=len(data.classes))
    if (low := int(counts.min())) < 6:
        scarce = data.classes[int(counts.argmin())]
        raise ValueError(f"each class needs 6 images, to learn from and to test on; {scarce} has {low}")
    if len(data.y) < 12 * n_tasks:
        raise ValueError(f"{n_tasks} tasks need {12 * n_tasks} images, has {len(data.y)}")


def learn(
    learner: Learner, stream: Sequence[Experience], *, after: Callable[[int], None] | None = None
) -> ndarray:
    """Let a learner see a stream, sixteen samples at a time, and test it on every task after each.

    Parameters
    ----------
    learner : Learner
    stream : sequence of Experience
    after : callable, optional
        ``after(task)`` when a task has been learned.

    Returns
    -------
    ndarray of shape (T, T)
        Accuracy on task j after task i in row i, column j.
    """
    accuracy = np.zeros((len(stream), len(stream)))
    for task, part in enumerate(stream):
        for x, y in zip(part.x.split(ARRIVE), part.y.split(ARRIVE), strict=True):
            learner.observe(x, y, task=task)
        for other, asked in enumerate(stream):
            found = torch.as_tensor(learner.predict(asked.x_test))
            accuracy[task, other] = float((found == asked.y_test).double().mean())
        if after is not None:
            after(task)
    return accuracy


def kept(scores: ndarray, chance: float | ndarray = 0.0) -> Kept:
    """Return the measures of the field from the score of each task after each.

    With R[i, j] the score on task j after task i of T, higher better: average, mean of R[T, j]; forgetting, mean
    over j < T of the best of R[i, j], i < T, less R[T, j]; backward transfer, mean over j < T of R[T, j] - R[j, j];
    forward transfer, mean over j > 1 of R[j - 1, j] - chance (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018).

    Parameters
    ----------
    scores : ndarray of shape (T, T)
    chance : float or ndarray of shape (T,), default=0.0
        The score of each task before anything is learned.

    Returns
    -------
    Kept
        With one task nothing can be forgotten or transferred: zeros.
    """
    last, n = scores[-1], len(scores)
    if n == 1:
        return Kept(float(last.mean()), 0.0, 0.0, 0.0)
    before = np.broadcast_to(chance, n)[1:]
    return Kept(
        float(last.mean()),
        float((scores[:-1, :-1].max(0) - last[:-1]).mean()),
        float((last - scores.diagonal())[:-1].mean()),
        float((scores.diagonal(1) - before).mean()),
    )


def body_for(x: Tensor, seed: int) -> Body:
    """Return a small network to 64 features: fully connected below 16 pixels, else convolutional.

    Parameters
    ----------
    x : Tensor of shape (n, channels, height, width)
    seed : int

    Returns
    -------
    Body
    """
    if min(x.shape[-2:]) < 16:
        net = mlp(math.prod(x.shape[1:]), 64, width=128, depth=1, seed=seed)
    else:
        net = cnn(x.shape[1], 64, width=16, seed=seed)
    return Body(nn.Sequential(net, nn.ReLU()), 64)


class ReplayLearner:
    """Experience replay: each arriving sample makes one step, with others drawn from a reservoir of the past.

    Parameters
    ----------
    body : Body
        Trained in place.
    n_classes : int
        The head's; classes that have not come are neither learned nor predicted.
    memory_size : int, default=100
        0 is fine-tuning alone: steps on what arrives together.
    batch_size : int, default=16
    lr : float, default=1e-3
        Of Adam.
    seed : int, default=0
        Decides head, memory and batches.
    """

    def __init__(
        self, body: Body, n_classes: int, *, memory_size: int = 100, batch_size: int = 16, lr: float = 1e-3,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.net = nn.Sequential(body.net, weights(nn.Linear, body.n_features, n_classes, seed=seed))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.memory_size, self.batch_size, self.n_seen = memory_size, batch_size, 0
        self.known = torch.zeros(n_classes, dtype=torch.bool)
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []
        self.rng = np.random.default_rng(seed)

    def observe(self, x: Tensor, y: Tensor, task: int | None = None) -> None:
        """Learn from samples, once."""
        self.known[y] = True
        self.net.train()
        for k in range(len(y)):
            if self.memory_size:
                past = self.rng.permutation(len(self.x))[: self.batch_size - 1]
                batch = torch.stack([x[k], *(self.x[i] for i in past)])
                target = torch.stack([y[k], *(self.y[i] for i in past)])
            else:
                batch, target = x, y
            logits = self.net(batch).masked_fill(~self.known, -math.inf)
            self.optimizer.zero_grad()
            F.cross_entropy(logits, target).backward()
            self.optimizer.step()
            self._remember(x[k], y[k])

    def _remember(self, x: Tensor, y: Tensor) -> None:
        """Keep each sample of the past with the same probability (reservoir sampling)."""
        self.n_seen += 1
        if len(self.x) < self.memory_size:
            self.x.append(x)
            self.y.append(y)
        elif self.memory_size and (place := int(self.rng.integers(self.n_seen))) < self.memory_size:
            self.x[place], self.y[place] = x, y

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return labels among the classes that have come."""
        self.net.eval()
        return self.net(x).masked_fill(~self.known, -math.inf).argmax(1)


def _turned(x: Tensor, degrees: float) -> Tensor:
    """Return images turned about their middle."""
    if not degrees:
        return x
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = x.new_tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)
