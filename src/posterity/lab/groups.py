"""Groups: rows of a table from different places, some seen in training, others only when tested.

A column says where a row comes from: text and numbers of few values as they are, other numbers cut at their
quantiles; several columns of numbers, ``longitude,latitude``, are cut into cells. Groups have a place in an order,
and one in space where their columns are numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.lab.data.table import TableData, table_encoder
from posterity.lab.nets import mlp

__all__ = [
    "GroupDRO",
    "GroupRows",
    "Groups",
    "encoded_groups",
    "fit_groups",
    "group_losses",
    "group_scores",
    "table_groups",
]

LEAST = 10  # rows of a group; those of smaller ones are left out
AS_THEY_ARE = 20  # values of a column of numbers up to which each is a group
CUT = 10  # groups of a column, or of several, with more


class Groups(NamedTuple):
    """Which group each row is of, -1 for rows left out; names, and places (g, k) where groups are numbers."""

    codes: ndarray
    names: tuple[str, ...]
    places: ndarray | None


class GroupRows(NamedTuple):
    """Rows of some groups: inputs (n, d), codes or standardised values (n,), groups 0 .. n_groups - 1 (n,)."""

    x: Tensor
    y: Tensor
    groups: Tensor
    n_groups: int
    n_out: int


def table_groups(table: TableData, column: str) -> Groups:
    """Return the groups of a table's rows, in order.

    Parameters
    ----------
    table : TableData
    column : str
        A column, or several of numbers with commas between.

    Returns
    -------
    Groups
        Of at least ten rows each.

    Raises
    ------
    ValueError
        If a column is not there, or fewer than four groups are left.
    """
    columns = column.split(",")
    for name in columns:
        if name not in table.X.columns:
            known = ", ".join(map(str, table.X.columns))
            raise ValueError(f"group must be one or more of the columns {known}, got {name!r}")
    numbers = table.X[columns].select_dtypes("number")
    if len(columns) > 1 and numbers.shape[1] < len(columns):
        raise ValueError(
            f"group: several columns must be numbers, {set(columns) - set(numbers.columns)} are not"
        )
    values = table.X[columns[0]]
    places = numbers.to_numpy(float) if numbers.shape[1] == len(columns) else None
    known = table.X[columns].notna().all(axis=1).to_numpy()
    codes = np.full(len(table.y), -1)
    if places is None:
        codes[known], names = pd.factorize(values[known].astype(str), sort=True)
    elif len(columns) > 1:
        scaled = (places[known] - places[known].mean(0)) / np.maximum(places[known].std(0), 1e-12)
        codes[known] = KMeans(CUT, n_init=3, random_state=0).fit_predict(scaled)
        names = np.arange(CUT)
    elif len(np.unique(places[known])) <= AS_THEY_ARE:
        codes[known], names = pd.factorize(places[known, 0], sort=True)
    else:
        cuts = np.unique(np.quantile(places[known, 0], np.linspace(0, 1, CUT + 1)[1:-1]))
        codes[known], names = np.searchsorted(cuts, places[known, 0], side="right"), np.arange(len(cuts) + 1)
    large = [k for k in range(len(names)) if (codes == k).sum() >= LEAST]
    if len(large) < 4:
        raise ValueError(f"at least four groups of {LEAST} rows are needed, {column!r} has {len(large)}")
    where = None if places is None else np.stack([places[codes == k].mean(0) for k in large])
    order = np.arange(len(large)) if where is None else np.lexsort(where.T[::-1])
    new = np.full(len(names) + 1, -1)
    new[np.asarray(large)[order]] = np.arange(len(large))
    title = [
        f"{names[large[k]]:g}" if isinstance(names[large[k]], float) else str(names[large[k]]) for k in order
    ]
    return Groups(new[codes], tuple(title), None if where is None else where[order])


def encoded_groups(table: TableData, column: str, groups: Groups, chosen: list[list[int]]) -> list[GroupRows]:
    """Return the rows of several lists of groups, prepared as the first list's rows say.

    Parameters
    ----------
    table : TableData
    column : str
        What made the groups: no input.
    groups : Groups
    chosen : list of list of int
        Groups to train on, then others; in each their order is that of the new codes.

    Returns
    -------
    list of GroupRows
    """
    X = table.X.drop(columns=column.split(","))
    own = np.isin(groups.codes, chosen[0])
    encoder = table_encoder().fit(X[own])
    centre, spread = (
        (0.0, 1.0) if table.classes else (table.y[own].mean(), max(float(table.y[own].std()), 1e-12))
    )
    found = []
    for members in chosen:
        rows = np.isin(groups.codes, members)
        new = np.full(len(groups.names), -1)
        new[members] = np.arange(len(members))
        y = torch.as_tensor((table.y[rows] - centre) / spread if not table.classes else table.y[rows])
        x = torch.as_tensor(np.asarray(encoder.transform(X[rows])), dtype=torch.float32)
        y = y if table.classes else y.float()
        codes = torch.as_tensor(new[groups.codes[rows]])
        found.append(GroupRows(x, y, codes, len(members), max(len(table.classes), 1)))
    return found


def fit_groups(
    rows: GroupRows, weigh: Callable[[Tensor], Tensor], seed: int, *, steps: int = 400, per_group: int = 10,
    lr: float = 1e-3, balanced: bool = True,
) -> nn.Sequential:  # fmt: skip
    """Return a network of three hidden layers of 64, trained on what ``weigh`` makes of the groups' mean losses.

    Parameters
    ----------
    rows : GroupRows
    weigh : callable
        ``weigh(losses) -> scalar``, losses (g,) in order.
    seed : int
        Decides initial weights and batches.
    steps, per_group : int
        Each step sees so many rows of each group.
    lr : float, default=1e-3
        Of Adam.
    balanced : bool, default=True
        False draws from all rows alike, and gives ``weigh`` the mean loss of the batch.

    Returns
    -------
    nn.Sequential
    """
    net = mlp(rows.x.shape[1], rows.n_out, width=64, depth=3, seed=seed)
    optimizer, draws = torch.optim.Adam(net.parameters(), lr=lr), torch.Generator().manual_seed(seed)
    members = [(rows.groups == k).nonzero()[:, 0] for k in range(rows.n_groups)]
    every = torch.arange(len(rows.y))
    for _ in range(steps):
        if balanced:
            batch = torch.cat([m[torch.randint(len(m), (per_group,), generator=draws)] for m in members])
        else:
            batch = every[torch.randint(len(every), (per_group * rows.n_groups,), generator=draws)]
        losses = _losses(net(rows.x[batch]), rows.y[batch])
        losses = losses.view(rows.n_groups, per_group).mean(1) if balanced else losses.mean()
        optimizer.zero_grad()
        weigh(losses).backward()
        optimizer.step()
    return net.eval()


class GroupDRO:
    """Worst-group training: weights grow with exp(eta * loss) from step to step (Sagawa et al. 2020).

    Parameters
    ----------
    n_groups : int
    eta : float
    """

    def __init__(self, n_groups: int, eta: float) -> None:
        self.logits, self.eta = torch.zeros(n_groups), eta

    def __call__(self, losses: Tensor) -> Tensor:
        """Return the weighted loss."""
        self.logits = (self.logits + self.eta * losses.detach()).log_softmax(0)
        return self.logits.exp() @ losses


@torch.no_grad()
def group_scores(net: nn.Module, rows: GroupRows) -> Tensor:
    """Return how well each group is predicted, (g,): accuracy, or the share of the training variance explained.

    Parameters
    ----------
    net : nn.Module
    rows : GroupRows

    Returns
    -------
    Tensor
    """
    out = net(rows.x)
    return _means((out.argmax(1) == rows.y).float() if rows.n_out > 1 else 1 - _losses(out, rows.y), rows)


@torch.no_grad()
def group_losses(net: nn.Module, rows: GroupRows) -> Tensor:
    """Return the mean loss of each group, (g,): cross-entropy, or squared error; to choose by.

    Parameters
    ----------
    net : nn.Module
    rows : GroupRows

    Returns
    -------
    Tensor
    """
    return _means(_losses(net(rows.x), rows.y), rows)


def _means(values: Tensor, rows: GroupRows) -> Tensor:
    total = values.new_zeros(rows.n_groups).index_add(0, rows.groups, values)
    return total / torch.bincount(rows.groups, minlength=rows.n_groups)


def _losses(out: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return (out[:, 0] - y) ** 2
    return F.cross_entropy(out, y, reduction="none")
