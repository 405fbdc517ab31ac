"""Claims about the multi-marginal earth mover's distance: it brings groups together, in linear time."""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from posterity.claims import Between, Count, NotNegative, Several, Trial, comparison, trend
from posterity.lab.data import Table, TableData, load_table, split, table_encoder
from posterity.lab.data.needs import require_classes
from posterity.lab.nets import mlp
from posterity.lab.timing import relative_growth
from posterity.lab.training import fit
from posterity.transport import DEMDLoss, DEMDRegularizer

QUARTILES = 4


def _groups(column: pd.Series, name: str) -> ndarray:
    """Return a group a row: the column's values, or its quartiles where they are many numbers."""
    if column.dtype.kind in "iuf" and column.nunique() > 2 * QUARTILES:
        column = pd.Series(pd.qcut(column, QUARTILES, labels=False, duplicates="drop"))
    codes, names = pd.factorize(column, sort=True, use_na_sentinel=False)
    if len(names) < 2:
        raise ValueError(f"group {name!r} must have at least two values, got {names.tolist()}")
    return codes


def _halves(table: TableData, group: str) -> tuple[ndarray, ndarray]:
    """Return who is above the median, or in the second class, and the group of each row."""
    if group not in table.X:
        raise ValueError(f"group must be one of {', '.join(map(str, table.X))}, got {group!r}")
    if table.classes and len(table.classes) != 2:
        raise ValueError(f"target must have two classes, got {', '.join(table.classes[:5])}")
    return table.y if table.classes else table.y > np.median(table.y), _groups(table.X[group], group)


def _fits(data: TableData, group: str, **_: object) -> None:
    """Refuse a target that is on one side of its median, and groups that cannot be cut in halves."""
    y, groups = _halves(data, group)
    require_classes(
        y.astype(int), ("at most the median", "above it") if not data.classes else data.classes, "rows"
    )
    if (counts := np.bincount(groups)).min() < 2:
        raise ValueError(
            f"each value of group {group!r} needs 2 rows or more, the {len(counts)} have {counts.min()} at least"
        )


def _pairwise(scores: Tensor, groups: Tensor, n_bins: int) -> Tensor:
    """Return the mean distance of two groups over all pairs."""
    distance = DEMDRegularizer(n_bins=n_bins)
    names = groups.unique()
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    each = [
        distance(scores[here], groups[here]) for a, b in pairs for here in [(groups == a) | (groups == b)]
    ]
    return torch.stack(each).mean()


@comparison(
    paper="demd",
    says="Penalising the multi-marginal distance brings the groups' score distributions together.",
    where="Mehta et al., the experiments on fairness",
    arms=("no regulariser", "mean of pairwise distances", "DEMD"),
    metric="largest less smallest mean test probability of a group",
    better="lower",
    smallest={"steps": 20},
    check=_fits,
)
def fair_scores(
    trial: Trial,
    data: Table = "diabetes",
    target: str | None = None,
    group: str = "age",
    weight: NotNegative = 1.0,
    n_bins: Several = 10,
    steps: Count = 200,
) -> dict[str, float]:
    """Train a small network to tell who is above the median, with and without the penalty.

    ``group`` is a column, which stays a feature: its values are the groups, its quartiles
    where it is a number. All arms start from the same weights and see all training rows at
    every step. The records have each arm's accuracy, the price, and the distance of the
    test histograms. Tables with two classes are taken as they are, numbers are cut at
    their median.
    """
    table = load_table(data, target=target, seed=trial.seed)
    y, groups = _halves(table, group)
    train, test = split(len(y), (0.5, 0.5), trial.seed, stratify=groups)
    encoder = table_encoder().fit(table.X.iloc[train])

    def part(rows: ndarray) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.as_tensor(encoder.transform(table.X.iloc[rows]), dtype=torch.float32)
        return x, torch.as_tensor(y[rows], dtype=torch.float32), torch.as_tensor(groups[rows])

    rows, held = part(train), part(test)
    penalties: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "no regulariser": lambda scores, groups: scores.new_zeros(()),
        "mean of pairwise distances": lambda scores, groups: _pairwise(scores, groups, n_bins),
        "DEMD": DEMDRegularizer(n_bins=n_bins),
    }
    gaps = {}
    for arm, penalty in penalties.items():
        net = mlp(rows[0].shape[1], 1, width=32, depth=1, seed=trial.seed)

        def loss(net: torch.nn.Module, x: Tensor, y: Tensor, groups: Tensor, penalty=penalty) -> Tensor:
            scores = net(x)[:, 0]
            return F.binary_cross_entropy_with_logits(scores, y) + weight * penalty(scores, groups)

        fit(net, loss, rows, steps=steps, batch_size=len(train), lr=1e-2, weight_decay=1e-3,
            seed=trial.seed, device=trial.device)  # fmt: skip
        with torch.no_grad():
            scores = net.to("cpu")(held[0])[:, 0]
            apart = DEMDRegularizer(n_bins=n_bins)(scores, held[2])
        means = [float(scores[held[2] == k].sigmoid().mean()) for k in held[2].unique()]
        gaps[arm] = max(means) - min(means)
        trial.record(f"accuracy, {arm}", ((scores > 0) == (held[1] > 0.5)).float().mean())
        trial.record(f"test DEMD, {arm}", apart)
    return gaps


@trend(
    paper="demd",
    says="Value and gradient cost time linear in the number of groups and of bins.",
    where="Mehta et al., the analysis of the complexity",
    metric="exponent, in groups x bins, of seconds over those of a cumulative sum of the same entries",
    high=0.1,
    timed=True,
    smallest={"largest": 100_000, "repeats": 2},
)
def cost_linear(
    trial: Trial, largest: Annotated[int, Between(100_000)] = 3_000_000, repeats: Count = 9
) -> float:
    """Time value and gradient of random histograms, from 30,000 entries to ``largest``.

    A cumulative sum is linear in the entries. They grow by about three, groups and bins alike.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    sizes, works, yardsticks = [], [], []
    size = 30_000
    while size <= largest:
        d = round(size**0.5 / 4)
        p = torch.rand(d, size // d, generator=generator).to(trial.device).softmax(-1).requires_grad_()
        works.append(lambda p=p: torch.autograd.grad(DEMDLoss()(p), p)[0].flatten()[0].item())
        yardsticks.append(lambda p=p: p.detach().cumsum(1).flatten()[0].item())
        sizes.append(p.numel())
        size = round(size * 10**0.5)
    return relative_growth(trial, sizes, works, yardsticks, rounds=repeats, name="value and gradient")
