"""Claims about federations: bounds for unseen clients hold, and the error falls with clients as it should."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from posterity.claims import Count, Share, Trial, bound, trend
from posterity.federated import Bounded, estimate_gaps, fast_rate_bound, two_level_bound
from posterity.lab.data import ClientData, Clients, dataset, load_clients, load_images

CLASS = np.linspace(0.5, 3.0, 12)  # a model's risks over clients are Beta(a, 3)
FEATURES, SPREAD = 8, 0.5  # of the linear clients: dimensions, and how far their weights lie apart
WRITERS = 60


@dataset(Clients, "digit-writers")
def digit_writers(seed: int) -> ClientData:
    """Return scikit-learn's digits with a client for each of sixty clusters, as if by hand."""
    digits = load_images("digits")
    x = digits.x.reshape(len(digits.x), -1)
    client = KMeans(WRITERS, n_init=1, random_state=seed).fit_predict(x).astype(np.int64)
    kept = np.bincount(client, minlength=WRITERS)[client] >= 4
    _, client = np.unique(client[kept], return_inverse=True)
    names = tuple(f"hand {k + 1}" for k in range(client.max() + 1))
    return ClientData(digits.x[kept], digits.y[kept], client.astype(np.int64), digits.classes, names)


def _slope(x: Sequence[int], y: Sequence[Any]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@bound(
    paper="federated-bounds",
    says="The error on unseen clients stays below the bound, for every model of the class, but in a share delta of federations.",
    where="Theorems for finite classes and bounded losses",
    metric="share of 400 federations in which a model's true risk passes its bound; delta is 0.1",
    better="lower",
    limit=0.1,
    smallest={"federations": 20},
)
def unseen_error(
    trial: Trial,
    m: Count = 15,
    n: Count = 10,
    federations: Count = 400,
    rate: Literal["slow", "fast"] = "fast",
) -> float:
    """Count failures of twelve models whose risks differ between clients by a Beta law."""
    rng, failures, slack = np.random.default_rng(trial.seed), 0, []
    for _ in range(federations):
        risks = rng.beta(CLASS[:, None], 3.0, size=(len(CLASS), m))
        empirical = rng.binomial(n, risks).sum(1) / (m * n)
        size = math.log(len(CLASS))
        if rate == "fast":
            found = [fast_rate_bound(e, m, n, delta=0.1, log_class_size=size) for e in empirical.tolist()]
        else:
            found = [
                two_level_bound(e, m, n, delta=0.1, tail=Bounded(), log_class_size=size)
                for e in empirical.tolist()
            ]
        room = np.array([each.unparticipating for each in found]) - CLASS / (CLASS + 3)
        failures += bool((room < 0).any())
        slack.append(room.min())
    trial.record("least distance of bound and risk, mean over federations", float(np.mean(slack)))
    return failures / federations


def _pooled(m: int, n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the excess risk of pooled least squares on a new client, and on new rows of those that took part.

    Client i has weights w_i = w + 0.5 N(0, I / d), standard normal features and noise of deviation 1, so
    that the excess risks are squared distances to w and to the mean of the w_i.
    """
    w = SPREAD * rng.standard_normal((m, FEATURES)) / math.sqrt(FEATURES)  # about a common weight of 0
    x = rng.standard_normal((m, n, FEATURES))
    y = np.einsum("mnd,md->mn", x, w) + rng.standard_normal((m, n))
    fitted = np.linalg.lstsq(x.reshape(m * n, FEATURES), y.ravel(), rcond=None)[0]
    return float(fitted @ fitted), float(((fitted - w.mean(0)) ** 2).sum())


@trend(
    paper="federated-bounds",
    says="Excess risk on unseen clients falls like 1/m, not 1/sqrt(m).",
    where="Section on fast rates",
    metric="slope of the logarithm of excess risk on that of the number of clients",
    low=-1.25,
    high=-0.8,
    smallest={"federations": 20},
)
def fast_rate(trial: Trial, n: Count = 20, federations: Count = 60) -> float:
    """Fit pooled least squares to 10 to 160 clients of n rows."""
    rng, clients = np.random.default_rng(trial.seed), (10, 20, 40, 80, 160)
    excess = [np.mean([_pooled(m, n, rng)[0] for _ in range(federations)]) for m in clients]
    for m, value in zip(clients, excess, strict=True):
        trial.track("excess risk on a new client", m, float(value))
    return _slope(clients, excess)


@trend(
    paper="federated-bounds",
    says="With a fixed number of clients, more rows do not help without end: the gap between clients stays.",
    where="Section on unparticipating clients",
    metric="excess risk on a new client at 320 rows each, as a multiple of the variance of the clients' mean, 0.25 / m",
    low=0.5,
    high=2.0,
    smallest={"federations": 20},
)
def rows_alone(trial: Trial, m: Count = 40, federations: Count = 60) -> float:
    """Fit pooled least squares to m clients of 2 to 320 rows."""
    rng = np.random.default_rng(trial.seed)
    for n in (2, 5, 20, 80, 320):
        excess, own = np.mean([_pooled(m, n, rng) for _ in range(federations)], axis=0)
        trial.track("excess risk on a new client", n, excess)
        trial.track("excess risk on those that took part", n, own)
    trial.record("excess risk on those that took part, 320 rows", own)
    return float(excess / (SPREAD**2 / m))


@trend(
    paper="federated-bounds",
    says="With a fixed number of clients, the risk on new rows of those that took part goes on falling like 1/(m n).",
    where="Section on fast rates",
    metric="slope of the logarithm of excess risk on clients that took part on that of their rows",
    low=-1.25,
    high=-0.8,
    smallest={"federations": 20},
)
def own_rows(trial: Trial, m: Count = 40, federations: Count = 60) -> float:
    """Fit pooled least squares to m clients of 5 to 320 rows."""
    rng, rows = np.random.default_rng(trial.seed), (5, 20, 80, 320)
    return _slope(rows, [np.mean([_pooled(m, n, rng)[1] for _ in range(federations)]) for n in rows])


def _client_losses(data: ClientData, seed: int, train: float) -> tuple[ndarray, ndarray, ndarray]:
    """Return zero-one losses of a classifier on all its rows, which of them it learned from, and who holds them."""
    rng = np.random.default_rng(seed)
    learned = np.zeros(len(data.y), bool)
    for k in range(len(data.names)):  # a part of each client, at least a row
        own = rng.permutation(np.flatnonzero(data.client == k))
        learned[own[: max(1, round(train * len(own)))]] = True
    x = data.x.reshape(len(data.x), -1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    if len(np.unique(data.y[learned])) < 2:
        raise ValueError("the rows learned from have one class, say a larger train")
    return (model.fit(x[learned], data.y[learned]).predict(x) != data.y).astype(float), learned, data.client


def _fits(data: ClientData, train: float, **_: Any) -> None:
    if len(data.names) < 5:
        raise ValueError(f"at least 5 clients are needed, has {len(data.names)}")
    losses, learned, client = _client_losses(data, 0, train)
    if not learned.all() and len(np.unique(client[~learned])) < len(data.names):
        raise ValueError("train must leave a row of each client")
    means = (
        [losses[~learned & (client == k)].mean() for k in range(len(data.names))] if not learned.all() else []
    )
    if not means or np.ptp(means) == 0:
        raise ValueError(
            "a linear classifier is as often wrong on every client, so there is no gap to measure"
        )


@trend(
    paper="federated-bounds",
    says="The participation gap of a fixed model falls like 1/sqrt(m).",
    where="Section on unparticipating clients",
    metric="slope of the logarithm of the root mean square of L - L_m on that of m",
    low=-0.6,
    high=-0.4,
    smallest={"draws": 100},
    check=_fits,
)
def participation_gap(
    trial: Trial, data: Clients = "digit-writers", target: str | None = None, train: Share = 0.3, draws: Count = 2000
) -> float:  # fmt: skip
    """Draw 2 to 64 clients, with replacement, from those of the data, whose mean risks are all known."""
    found = load_clients(data, target=target, seed=trial.seed)
    losses, learned, client = _client_losses(found, trial.seed, train)
    risks = np.array([losses[~learned & (client == k)].mean() for k in range(len(found.names))])
    rng, sizes = np.random.default_rng(trial.seed), (2, 4, 8, 16, 32, 64)
    gaps = []
    for m in sizes:
        means = risks[rng.integers(len(risks), size=(draws, m))].mean(1)
        gaps.append(float(np.sqrt(np.mean((means - risks.mean()) ** 2))))
        trial.track("root mean square of the gap", m, gaps[-1])
    held = [losses[~learned & (client == k)] for k in range(len(found.names))]
    seen = [losses[learned & (client == k)] for k in range(len(found.names))]
    half = len(held) // 2
    measured = estimate_gaps(seen[:half], held[:half], held[half:])
    trial.record("out of sample, half of the clients", measured.out_of_sample.value)
    trial.record("participation gap, half against half", measured.participation.value)
    return _slope(sizes, gaps)
