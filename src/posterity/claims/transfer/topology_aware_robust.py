"""Claims about topology-aware robust optimisation: groups that lie between others say what a new group needs."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import rotate
from torch import Tensor, nn

from posterity.claims import Between, Count, Trial, bound, comparison
from posterity.lab.data import Table, dataset, load_images, load_table
from posterity.lab.data.table import TableData
from posterity.lab.groups import (
    GroupDRO,
    GroupRows,
    Groups,
    encoded_groups,
    fit_groups,
    group_losses,
    group_scores,
    table_groups,
)
from posterity.lab.metrics import rank_correlation
from posterity.lab.tasks import entry
from posterity.lab.tasks.domain_shift import best_of
from posterity.transfer import TopologyAwareDRO, learn_topology, topology_prior

STRENGTHS = (1.0, 10.0, 100.0)
ETAS = (0.01, 0.1, 1.0)
Weigh = Callable[[Tensor], Tensor]


def _spiral(n_groups: int, seed: int) -> TableData:
    """Return groups of two clouds each, opposite to one another, that turn and move outwards from group to group."""
    rng = np.random.default_rng(seed)
    degrees = np.linspace(0, 190, n_groups).repeat(100)
    sign = np.tile(np.repeat([1.0, -1.0], 50), n_groups)
    radius, angle = 1 + 1.8 * degrees / 190, np.radians(degrees)
    centre = (sign * radius)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    points = centre + 0.2 * rng.standard_normal(centre.shape)
    columns = {"x": points[:, 0], "y": points[:, 1], "group": np.round(degrees, 3)}
    return TableData(pd.DataFrame(columns), (sign < 0).astype(np.int64), "classification", ("0", "1"))


@dataset(Table, "spiral")
def spiral(seed: int) -> TableData:
    """Return 15 groups along a spiral."""
    return _spiral(15, seed)


@dataset(Table, "spiral-60")
def spiral_60(seed: int) -> TableData:
    """Return 60 groups along a spiral."""
    return _spiral(60, seed)


@dataset(Table, "digits-rotated")
def digits_rotated(seed: int) -> TableData:
    """Return the digits in 12 groups, turned by 0 to 60 degrees."""
    images = load_images("digits")
    degrees = np.linspace(0, 60, 12)[np.random.default_rng(seed).permutation(len(images.y)) % 12]
    turned = [rotate(x[0], by, reshape=False, order=1) for x, by in zip(images.x, degrees, strict=True)]
    pixels = pd.DataFrame(np.stack(turned).reshape(len(turned), -1).astype(float)).add_prefix("pixel ")
    return TableData(pixels.assign(group=np.round(degrees, 2)), images.y, "classification", images.classes)


def _known_graph(places: np.ndarray, seed: int) -> Tensor:
    """Return a graph of groups with places: nearest neighbours, and other pairs the likelier the nearer they are."""
    apart = np.linalg.norm((places[:, None] - places) / np.maximum(places.std(0), 1e-12), axis=2)
    near = np.sort(apart, axis=1)[:, 1].mean()
    drawn = np.random.default_rng(seed).random(apart.shape) < np.exp(-((apart / (2 * near)) ** 2))
    nearest = np.eye(len(apart), dtype=bool)[np.argsort(apart, axis=1)[:, 1]]
    edges = np.triu(drawn, 1) | np.triu(nearest | nearest.T, 1)
    return torch.from_numpy((edges | edges.T).astype(np.float32))


def _hidden(net: nn.Sequential, rows: GroupRows) -> Tensor:
    with torch.no_grad():
        return net[:-1](rows.x)


def _learned_prior(rows: GroupRows, seed: int) -> Tensor:
    """Return the prior of groups as a network sees them that was trained on all alike."""
    features = _hidden(fit_groups(rows, Tensor.mean, seed, steps=200), rows)
    generator = torch.Generator().manual_seed(seed)
    return learn_topology(features, rows.groups, percentile=60, generator=generator).prior


def _topologies(prior: Tensor) -> list[Callable[[], Weigh]]:
    return [lambda s=s: TopologyAwareDRO(prior, strength=s, update="exact") for s in STRENGTHS]


def _require_sources(
    data: TableData, group: str = "group", n_sources: int = 6, topology: str = "known", **_: Any
) -> None:
    groups = table_groups(data, group)
    if n_sources >= len(groups.names):
        raise ValueError(
            f"n_sources must leave some of the {len(groups.names)} groups unseen, got {n_sources}"
        )
    if topology == "known" and groups.places is None:
        raise ValueError(
            f"topology of {group!r} is not known, its groups are no numbers: use topology=learned"
        )


@comparison(
    paper="topology-aware-robust",
    says="Where unseen groups lie beyond some of the seen ones, weights anchored to the topology predict them better "
    "than ordinary or worst-group training.",
    where="Section 5.1, DG-15 and DG-60",
    arms=("best of the others", "ordinary", "worst-group", "euclidean worst-group", "topology"),
    metric="mean accuracy, of numbers explained variance, over unseen groups",
    better="higher",
    smallest={"steps": 4},
    seeds=10,
    check=_require_sources,
)
def unseen_groups(
    trial: Trial,
    data: Table = "spiral",
    target: str | None = None,
    group: str = "group",
    n_sources: Annotated[int, Between(3)] = 6,
    topology: Literal["known", "learned"] = "known",
    steps: Count = 400,
) -> dict[str, float]:
    """Train on the first groups and test on all that come after them.

    The arms share network, initial weights and batches of ten rows of each group. Each of worst-group training, its
    Euclidean form (no prior) and the method takes the best of three settings by the seen group next to the unseen ones,
    held out, and is then trained on all that are seen. The known graph joins pairs of groups the likelier the nearer
    they are; the prior counts paths from seen to unseen groups, so it knows where the unseen ones are, and
    nothing of what is in them. With ``topology="learned"`` it knows only the seen ones: the gain is then a third as large.
    The first arm is the best of the three others on the unseen groups themselves, which no user could choose.

    It is the spiral's kind of shift that the prior helps with: what is asked lies further along where the groups lead. On
    ``digits-rotated`` (five of twelve angles seen) it makes no difference, and on ``california`` in cells
    of ``group="longitude,latitude"`` ordinary training explains 0.02 more of the variance.
    """
    table = load_table(data, target=target, seed=trial.seed)
    groups = table_groups(table, group)
    seen, unseen = list(range(n_sources)), list(range(n_sources, len(groups.names)))
    fitted, held = encoded_groups(table, group, groups, [seen[:-1], seen[-1:]])
    train, test = encoded_groups(table, group, groups, [seen, unseen])

    def prior(rows: GroupRows) -> Tensor:
        if topology == "learned" or groups.places is None:
            return _learned_prior(rows, trial.seed)
        graph = _known_graph(groups.places, trial.seed)
        return topology_prior(graph, sources=range(rows.n_groups))

    def dro(rows: GroupRows) -> list[Callable[[], Weigh]]:
        return [lambda eta=eta: GroupDRO(rows.n_groups, eta) for eta in ETAS]

    def euclidean(rows: GroupRows) -> list[Callable[[], Weigh]]:
        uniform = torch.full((rows.n_groups,), 1 / rows.n_groups)
        return [lambda eta=eta: TopologyAwareDRO(uniform, eta=eta, strength=1e-9) for eta in ETAS]

    found = {}
    for arm, choices in {
        "ordinary": lambda rows: [lambda: Tensor.mean],
        "worst-group": dro,
        "euclidean worst-group": euclidean,
        "topology": lambda rows: _topologies(prior(rows)),
    }.items():
        each = [make() for make in choices(fitted)]
        losses = [
            float(group_losses(fit_groups(fitted, weigh, trial.seed, steps=steps), held)) for weigh in each
        ]
        best = choices(train)[int(np.argmin(losses))]()
        found[arm] = float(group_scores(fit_groups(train, best, trial.seed, steps=steps), test).mean())
        if arm == "topology":
            trial.record("strength", STRENGTHS[int(np.argmin(losses))])
    return {"best of the others": max(list(found.values())[:-1]), **found}


@bound(
    paper="topology-aware-robust",
    says="Distances of groups in the features of a network agree with where the groups are.",
    where="Section 4.1",
    metric="rank correlation of learned and true distances of seen groups",
    limit=0.7,
    better="higher",
    smallest={"steps": 60},
    reason="Six groups are fifteen pairs, and on one seed of five their rank correlation is 0.63.",
    check=_require_sources,
)
def learned_topology(
    trial: Trial,
    data: Table = "spiral",
    target: str | None = None,
    group: str = "group",
    n_sources: Annotated[int, Between(3)] = 6,
    steps: Count = 200,
) -> float:
    """Compare `learn_topology` with the places of the groups, over pairs of seen groups.

    The features are the last hidden layer of a network trained on all seen groups alike for twenty epochs, as in the
    official code; it is never told where they are. Trained much longer, it forgets what does not separate the classes.
    """
    table = load_table(data, target=target, seed=trial.seed)
    groups = table_groups(table, group)
    (rows,) = encoded_groups(table, group, groups, [list(range(n_sources))])
    features = _hidden(fit_groups(rows, Tensor.mean, trial.seed, steps=steps), rows)
    found = learn_topology(
        features, rows.groups, generator=torch.Generator().manual_seed(trial.seed)
    ).distances
    places = torch.from_numpy(_places(groups)[:n_sources])
    upper = torch.triu_indices(n_sources, n_sources, 1)
    true = torch.cdist(places, places)
    return rank_correlation(found[*upper], true[*upper])


def _places(groups: Groups) -> np.ndarray:
    assert groups.places is not None  # asked by _require_sources
    return groups.places


@entry("domain-shift", "topology-aware", paper="topology-aware-robust")
def topology_aware(train: GroupRows, seed: int) -> nn.Module:
    """Return a network trained near the prior of the groups as a network sees them."""
    return best_of(train, seed, lambda rows: _topologies(_learned_prior(rows, seed)))
