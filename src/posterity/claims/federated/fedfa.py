"""Claims about FedFA: where clients' images differ in style, its global model serves them, and others, better."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from posterity.claims import Between, Count, Positive, Trial, comparison
from posterity.federated import fedfa_aggregate, insert_ffa
from posterity.federated.simulation import aggregate, federate, local_sgd
from posterity.lab.data import ClientData, Clients, dataset, load_clients, load_images
from posterity.lab.nets import seeded

ARMS = ("fedavg", "fedfa")
BATCH, REST = 20, 5  # images a step; of a client, beside those it trains on


@dataset(Clients, "digit-scanners")
def digit_scanners(seed: int) -> ClientData:
    """Return scikit-learn's digits dealt out to six imaging devices, each with changes of its own."""
    digits, rng = load_images("digits"), np.random.default_rng(seed)
    x = digits.x.copy()
    client = rng.permutation(np.arange(len(x)) % 6)

    def noise(scale: float, like: np.ndarray) -> np.ndarray:
        return scale * rng.standard_normal(like.shape, dtype=np.float32)

    def blurred(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 0, 0.8, 0.8))

    changes = (
        ("as is", lambda x: x),
        ("inverted", lambda x: 1 - x),
        ("faint", lambda x: 0.6 + 0.3 * x + noise(0.1, x)),
        ("blurred", lambda x: 1.5 * blurred(x) + noise(0.2, x)),
        ("overexposed", lambda x: 2 * x**0.3 + noise(0.3, x)),
        ("lit from a side", lambda x: 0.5 * x + np.linspace(0, 1, 8, dtype=np.float32)),
    )
    for k, (_, change) in enumerate(changes):
        x[client == k] = change(x[client == k])
    names = tuple(name for name, _ in changes)
    return ClientData(x, digits.y, client, digits.classes, names)


def _net(channels: int, size: int, classes: int, seed: int) -> nn.Sequential:
    """Return three blocks of convolution, batch norm and ReLU, with pooling from 16 pixels on."""
    with seeded(seed):
        blocks: list[nn.Module] = []
        for n_in, width in ((channels, 16), (16, 32), (32, 32)):
            block = [nn.Conv2d(n_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            if size >= 16:
                block.append(nn.MaxPool2d(2))
                size //= 2
            blocks.append(nn.Sequential(*block))
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 32, classes))


def _accuracy(net: nn.Module, parts: Sequence[Sequence[Tensor]]) -> float:
    """Return the mean over clients of the share of their rows that is right."""
    with torch.no_grad():
        return float(np.mean([(net(x).argmax(1) == y).float().mean().item() for x, y in parts]))


def _federations(
    trial: Trial, data: str, unseen: int, n_train: int, rounds: int, lr: float, *, strangers: bool
) -> dict[str, float]:
    """Return the accuracy of each arm's global model on clients that took part, or on those that did not."""
    found = load_clients(data, seed=trial.seed)
    x, y = torch.from_numpy(found.x).to(trial.device), torch.from_numpy(found.y).to(trial.device)
    rng = np.random.default_rng(trial.seed)
    rows = [rng.permutation(np.flatnonzero(found.client == k)) for k in range(len(found.names))]
    seen, others = rows[: len(rows) - unseen], rows[len(rows) - unseen :]
    train = [(x[own[:n_train]], y[own[:n_train]]) for own in seen]
    test = [(x[own], y[own]) for own in (others if strangers else (own[n_train:] for own in seen))]
    results = {}
    for arm in ARMS:
        net = _net(x.shape[1], min(x.shape[2:]), len(found.classes), trial.seed).to(trial.device)
        if arm == "fedfa":
            net = insert_ffa(net, ["0", "1", "2"], sample_input=x[:2])

        def watch(now: int, server: nn.Module, arm: str = arm) -> None:
            if now % 10 == 9:
                trial.track(arm, now + 1, _accuracy(server, test))

        server = federate(
            net, train, rounds=rounds, train=partial(local_sgd, lr=lr, batch_size=BATCH),
            aggregate=fedfa_aggregate if arm == "fedfa" else aggregate, weights=[1.0] * len(train),
            generator=torch.Generator().manual_seed(trial.seed), callback=watch,
        )  # fmt: skip
        results[arm] = _accuracy(server, test)
    return results


def _fits(data: ClientData, unseen: int, n_train: int, **_: Any) -> None:
    if len(data.names) < unseen + 2:
        raise ValueError(
            f"unseen must leave two of the {len(data.names)} clients, so be at most {len(data.names) - 2}, got {unseen}"
        )
    counts = np.bincount(data.client)[: len(data.names) - unseen]
    if n_train < 2 or n_train > counts.min() - REST:
        raise ValueError(
            f"n_train must be from 2 to {max(counts.min() - REST, 2)}, to leave {REST} rows of each client, got {n_train}"
        )
    if data.x.shape[2] < 2 or data.x.shape[3] < 2:
        raise ValueError("images of 2 by 2 pixels or more are needed, features of tables have no style")


@comparison(
    paper="fedfa",
    says="Where clients' images differ in style, FedFA's global model serves the clients that took part better than FedAvg's.",
    where="Section 4, Tables 1 to 3",
    arms=("fedavg", "fedfa"),
    metric="accuracy of the global model, mean over clients that took part",
    better="higher",
    smallest={"rounds": 2},
    seeds=10,
    check=_fits,
)
def feature_shift(
    trial: Trial, data: Clients = "digit-scanners", unseen: Annotated[int, Between(0)] = 2, n_train: Count = 60,
    rounds: Count = 120, lr: Positive = 0.2,
) -> dict[str, float]:  # fmt: skip
    """Compare global models where each client has its own imaging device; the last ``unseen`` take no part.

    Both arms share initial weights, batches and the rate, which of 0.05, 0.1 and 0.2 is the better for each.
    """
    return _federations(trial, data, unseen, n_train, rounds, lr, strangers=False)


@comparison(
    paper="fedfa",
    says="It also serves clients with another style that took no part better.",
    where="Section 4",
    arms=("fedavg", "fedfa"),
    metric="accuracy of the global model, mean over clients that took no part",
    better="higher",
    smallest={"rounds": 2},
    check=_fits,
)
def unseen_clients(
    trial: Trial,
    data: Clients = "digit-scanners",
    unseen: Count = 2,
    n_train: Count = 60,
    rounds: Count = 120,
    lr: Positive = 0.2,
) -> dict[str, float]:
    """Compare the same federations on the clients that took no part."""
    return _federations(trial, data, unseen, n_train, rounds, lr, strangers=True)
