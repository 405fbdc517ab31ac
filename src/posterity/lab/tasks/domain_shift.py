"""Domain shift: train is `GroupRows` of the groups that are seen, predict is a network that others are tested on.

The column ``group`` says where a row comes from (`posterity.lab.groups`): a third of its groups, which the seed
draws, is never trained on. The error is that of the worst of these: the share that is classified wrong, or the squared
error as a share of the target's variance. All train the same network for as many steps; what they choose they
choose by the largest mean loss of a group among held-out rows of those that are seen.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity.lab.data import Table, load_table, split
from posterity.lab.data.table import TableData
from posterity.lab.groups import (
    GroupDRO,
    GroupRows,
    encoded_groups,
    fit_groups,
    group_losses,
    group_scores,
    table_groups,
)
from posterity.lab.tasks import Task, entry

__all__ = ["best_of"]

Weigh = Callable[[Tensor], Tensor]


def best_of(
    train: GroupRows, seed: int, choices: Callable[[GroupRows], list[Callable[[], Weigh]]]
) -> nn.Module:
    """Return the network of the choice whose worst group loses least on a fifth of the rows, trained on all of them.

    Parameters
    ----------
    train : GroupRows
    seed : int
    choices : callable
        ``choices(rows)`` gives functions that make a fresh ``weigh`` for `fit_groups`.

    Returns
    -------
    nn.Module
    """
    fitted, held = split(len(train.y), (0.8, 0.2), seed, stratify=train.groups.numpy())
    part, rest = (
        train._replace(x=train.x[r], y=train.y[r], groups=train.groups[r])
        for r in map(torch.as_tensor, (fitted, held))
    )
    worst = [float(group_losses(fit_groups(part, make(), seed), rest).amax()) for make in choices(part)]
    return fit_groups(train, choices(train)[int(np.argmin(worst))](), seed)


def require_groups(data: TableData, group: str = "age", **_: Any) -> None:
    """Refuse a table whose rows are of too few groups."""
    table_groups(data, group)
    if len(data.X.columns) <= len(group.split(",")):
        raise ValueError("nothing is left to predict from beside the group")


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, group: str = "age"
) -> dict[str, float]:
    table = load_table(data, target=target, seed=seed)
    groups = table_groups(table, group)
    order = np.random.default_rng(seed).permutation(len(groups.names)).tolist()
    n_unseen = max(1, len(order) // 3)
    unseen, seen = sorted(order[:n_unseen]), sorted(order[n_unseen:])
    train, test = encoded_groups(table, group, groups, [seen, unseen])
    errors = 1 - group_scores(fit(train, seed), test)
    return {"worst-group error": float(errors.amax()), "mean error of unseen groups": float(errors.mean())}


TASK = Task(
    "domain-shift", Table, "error of the worst unseen group", "lower", "diabetes", _score,
    takes_target=True, needs=require_groups,
)  # fmt: skip


@entry("domain-shift", "ordinary training")
def ordinary(train: GroupRows, seed: int) -> nn.Module:
    """Return a network trained on rows drawn alike."""
    return fit_groups(train, lambda losses: losses, seed, balanced=False)


@entry("domain-shift", "group reweighting")
def reweighted(train: GroupRows, seed: int) -> nn.Module:
    """Return a network trained on groups drawn alike."""
    return fit_groups(train, Tensor.mean, seed)


@entry("domain-shift", "group DRO")
def group_dro(train: GroupRows, seed: int) -> nn.Module:
    """Return a network trained on the worst group."""
    return best_of(
        train, seed, lambda rows: [lambda eta=eta: GroupDRO(rows.n_groups, eta) for eta in (0.01, 0.1, 1.0)]
    )
