"""Claims about the scheduled data prior: more is kept at any time of a drifting stream, and forgetting is measured."""

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, NotNegative, Positive, Trial, comparison, trend
from posterity.lab.continual import Body, Learner, ReplayLearner, body_for
from posterity.lab.data import Images, load_images, split
from posterity.lab.data.images import ImageData, require_images
from posterity.lab.metrics import rank_correlation
from posterity.lab.nets import weights
from posterity.lab.tasks import entry
from posterity.lab.tasks.continual import Setting
from posterity.lab.training import fit
from posterity.transfer import BalancedMemory, ScheduledDataPrior, gaussian_stream, knowledge_rates

RATES = (1e-3, 3e-3)
HELD = 0.1  # of the stream, to choose the rate
LEAST = 12  # images of a class: to arrive, to choose by, to be tested
INTERVALS = 10
STEPS = tuple(range(0, 51, 5))


class BalancedReplay(ReplayLearner):
    """The rival: steps on batches of a balanced memory, without teacher and schedule."""

    def __init__(self, body: Body, n_classes: int, *, memory_size: int, lr: float, seed: int) -> None:
        super().__init__(body, n_classes, memory_size=memory_size, lr=lr, seed=seed)
        self.memory = BalancedMemory(memory_size, generator=torch.Generator().manual_seed(seed))

    def observe(self, x: Tensor, y: Tensor, task: int | None = None) -> None:
        """Learn from samples, once."""
        self.net.train()
        for row, label in zip(x, y.tolist(), strict=True):
            self.known[label] = True
            self.memory.add(row, label)
            batch, target = self.memory.sample(self.batch_size)
            logits = self.net(batch).masked_fill(~self.known, -torch.inf)
            self.optimizer.zero_grad()
            F.cross_entropy(logits, target).backward()
            self.optimizer.step()


class Drift(NamedTuple):
    """What arrives, in its order, what the rate is chosen by, and what is tested."""

    x: Tensor
    y: Tensor
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _drift(images: ImageData, n_stream: int, sigma: float, repeats: int, seed: int) -> Drift:
    n = len(images.y)
    shares = (n_stream * (1 - HELD) / n, n_stream * HELD / n, 1 - n_stream / n)
    rows = split(n, shares, seed, stratify=images.y)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    stream, held, test = ((x[part], y[part]) for part in rows)
    draws = torch.Generator().manual_seed(seed)
    order = gaussian_stream(stream[1], sigma=sigma, n_repeats=repeats, generator=draws).index
    return Drift(stream[0][order], stream[1][order], held, test)


def _learner(
    arm: str, x: Tensor, n_classes: int, memory: int, prior_mean: float, lr: float, seed: int
) -> Learner:
    body = body_for(x, seed)
    if arm == "replay":
        return ReplayLearner(body, n_classes, memory_size=memory, lr=lr, seed=seed)
    if arm == "balanced replay":
        return BalancedReplay(body, n_classes, memory_size=memory, lr=lr, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    return ScheduledDataPrior(*body, memory_size=memory, lr=lr, prior_mean=prior_mean, generator=draws)


def _queried(learner: Learner, drift: Drift, times: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return the answers for what is held out and what is tested, after so many arrivals."""
    answers, seen = [], 0
    for time in times:
        learner.observe(drift.x[seen:time], drift.y[seen:time])
        seen = time
        answers.append((learner.predict(drift.held[0]), learner.predict(drift.test[0])))
    return answers


def _anytime(drift: Drift, part: int, times: list[int], answers: Any) -> list[float]:
    """Return accuracy on the classes seen, at each time."""
    y, found = drift[2 + part][1], []
    for time, answer in zip(times, answers, strict=True):
        asked = torch.isin(y, drift.y[:time])
        found.append(float((answer[part] == y)[asked].double().mean()))
    return found


def _best(
    arm: str, drift: Drift, n_classes: int, memory: int, prior_mean: float, times: list[int], seed: int
) -> Any:
    """Return the answers at the rate that does best on what is held out of the stream."""
    tried = []
    for lr in RATES:
        answers = _queried(_learner(arm, drift.x, n_classes, memory, prior_mean, lr, seed), drift, times)
        tried.append((float(np.mean(_anytime(drift, 0, times, answers))), answers))
    return max(tried, key=lambda each: each[0])[1]


def _require_stream(data: ImageData, n_stream: int = 1400, name: str = "data", **_: Any) -> None:
    require_images(data)
    n, k = len(data.y), len(data.classes)
    counts = np.bincount(data.y, minlength=k)
    if (low := int(counts.min())) < LEAST:
        raise ValueError(
            f"{name}: each class needs {LEAST} images; {data.classes[int(counts.argmin())]} has {low}"
        )
    most = int(0.9 * n)
    if not 10 * k <= n_stream <= most:
        raise ValueError(
            f"n_stream must be from {10 * k} to {most} for the {n} images of {name}, got {n_stream}"
        )


@comparison(
    paper="scheduled-data-prior",
    says="A scheduled prior over the past keeps more at any time of a drifting stream than replay does.",
    where="Experiments on the Gaussian stream, A_AUC",
    arms=("replay", "balanced replay", "scheduled prior"),
    metric="mean accuracy over the stream, on the classes seen",
    better="higher",
    smallest={"n_stream": 100, "query": 100},
    check=_require_stream,
)
def anytime(
    trial: Trial,
    data: Images = "digits",
    n_stream: Count = 1400,
    sigma: NotNegative = 0.1,
    memory: Count = 100,
    prior_mean: Annotated[float, Between(5)] = 300.0,
    query: Count = 50,
) -> dict[str, float]:
    """Let learners see a stream once in which classes fade in and out, and ask them every so many arrivals.

    The arms share stream, network and its initial weights, memory and batch size, and make one step an arrival; each
    has the better of two rates (0.001 and 0.003) on a tenth of the stream that never arrives. Replay keeps a reservoir
    and steps on the arrival and fifteen others; balanced replay has the memory of the method without teacher and
    schedule. The teacher's mean age is about a fifth of the stream; the paper's is 10,000 of 50,000 updates and more.
    """
    images = load_images(data)
    drift = _drift(images, n_stream, sigma, 1, trial.seed)
    times = [*range(query, len(drift.y), query), len(drift.y)]
    found = {}
    for arm in ("replay", "balanced replay", "scheduled prior"):
        answers = _best(arm, drift, len(images.classes), memory, prior_mean, times, trial.seed)
        accuracy = _anytime(drift, 1, times, answers)
        for time, value in zip(times, accuracy, strict=True):
            trial.track(f"accuracy: {arm}", time, value)
        found[arm] = float(np.mean(accuracy))
        trial.record(f"{arm}, at the end", accuracy[-1])
    return found


@comparison(
    paper="scheduled-data-prior",
    says="Where classes come back in periods, a scheduled prior loses less of what it knew than replay does.",
    where="Experiments on the periodic stream, knowledge loss rate",
    arms=("replay", "balanced replay", "scheduled prior"),
    metric="mean knowledge loss rate over ten intervals",
    better="lower",
    smallest={"n_stream": 100},
    check=_require_stream,
)
def less_lost(
    trial: Trial,
    data: Images = "digits",
    n_stream: Count = 1400,
    sigma: NotNegative = 0.1,
    repeats: Count = 4,
    memory: Count = 100,
    prior_mean: Annotated[float, Between(5)] = 300.0,
) -> dict[str, float]:
    """Let learners see a stream of several periods, and measure what each loses from one of eleven times to the next.

    As for ``anytime``; the rate is chosen by accuracy at these times. Unlike accuracy, the loss rate counts only what
    was known before: a learner that learns more has more to lose.
    """
    images = load_images(data)
    drift = _drift(images, n_stream, sigma, repeats, trial.seed)
    n, n_classes = len(drift.y), len(images.classes)
    times = [round(n * (k + 1) / (INTERVALS + 1)) for k in range(INTERVALS + 1)]
    first = torch.tensor([int((drift.y == c).nonzero()[0]) for c in range(n_classes)])
    turn = first.argsort().argsort()  # place of each class in the order of their first arrival
    known = [int((first < time).sum()) for time in times]
    y, found = turn[drift.test[1]], {}
    for arm in ("replay", "balanced replay", "scheduled prior"):
        answers = _best(arm, drift, n_classes, memory, prior_mean, times, trial.seed)
        rates = [
            knowledge_rates(
                y, turn[answers[k][1]], turn[answers[k + 1][1]], n_classes=n_classes, n_before=known[k],
                n_after=known[k + 1],
            )
            for k in range(INTERVALS)
        ]  # fmt: skip
        for time, rate in zip(times[1:], rates, strict=True):
            trial.track(f"loss rate: {arm}", time, rate.loss_rate)
        found[arm] = float(np.nanmean([rate.loss_rate for rate in rates]))
        trial.record(f"gain rate, {arm}", float(np.nanmean([rate.gain_rate for rate in rates])))
    return found


def _require_classes(data: ImageData, name: str = "data", **_: Any) -> None:
    require_images(data)
    counts = np.bincount(data.y, minlength=len(data.classes))
    if (low := int(counts.min())) < LEAST:
        raise ValueError(
            f"{name}: each class needs {LEAST} images; {data.classes[int(counts.argmin())]} has {low}"
        )


@trend(
    paper="scheduled-data-prior",
    says="The knowledge loss rate grows with the damage that is done to a network.",
    where="The knowledge loss rate",
    metric="rank correlation of steps on one class and loss rate",
    low=0.8,
    smallest={"epochs": 3},
    check=_require_classes,
)
def tracks_damage(trial: Trial, data: Images = "digits", epochs: Count = 20, lr: Positive = 1e-3) -> float:
    """Train a classifier on all classes, go on with one of them alone, and measure what is lost after 0 to 50 steps.

    Measured is against the classifier as it was; the class is drawn by the seed. Steps are of Adam, with batches of
    sixteen at the rate ``lr``. After 0 steps the loss rate is not 0, as classifiers that err are modelled.
    """
    images = load_images(data)
    n_classes = len(images.classes)
    train, test = split(len(images.y), (0.7, 0.3), trial.seed, stratify=images.y)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    body = body_for(x, trial.seed)
    net = nn.Sequential(body.net, weights(nn.Linear, body.n_features, n_classes, seed=trial.seed))
    fit(net, lambda net, x, y: F.cross_entropy(net(x), y), (x[train], y[train]), epochs=epochs, batch_size=32,
        lr=1e-3, seed=trial.seed)  # fmt: skip
    with torch.no_grad():
        before = net(x[test]).argmax(1)
    draws = np.random.default_rng(trial.seed)
    one = int(draws.integers(n_classes))
    alone, label = x[train][y[train] == one], torch.full((16,), one)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    lost = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            with torch.no_grad():
                after = net(x[test]).argmax(1)
            lost.append(knowledge_rates(y[test], before, after, n_classes=n_classes).loss_rate)
            trial.track("loss rate", step, lost[-1])
            trial.track("accuracy", step, float((after == y[test]).double().mean()))
        batch = alone[torch.from_numpy(draws.integers(len(alone), size=16))]
        optimizer.zero_grad()
        F.cross_entropy(net(batch), label).backward()
        optimizer.step()
    return rank_correlation(STEPS, lost)


@entry("continual", "scheduled data prior", paper="scheduled-data-prior")
def learner(train: Setting, seed: int) -> Learner:
    """Return the method for the network and memory of the task."""
    return _learner("scheduled prior", train.x, train.n_classes, train.memory, 300.0, 1e-3, seed)
