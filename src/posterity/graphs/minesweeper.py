"""Minesweeper as a graph: heterophilous nodes whose labels their neighbours' features give away."""

from typing import Any

import torch
from torch.nn import functional as F

from posterity._checks import integer, needs, within
from posterity._random import draw_device

__all__ = ["minesweeper"]


def minesweeper(
    height: int = 100,
    width: int = 100,
    *,
    mine_rate: float = 0.2,
    unknown_rate: float = 0.5,
    generator: torch.Generator | None = None,
) -> Any:
    """Return a board of Minesweeper as a graph: find the mines from the numbers.

    Parameters
    ----------
    height, width : int, default=100
        Size of the board.
    mine_rate : float, default=0.2
        Share of fields that are mines.
    unknown_rate : float, default=0.5
        Share of fields whose number is hidden.
    generator : torch.Generator, optional
        Decides both.

    Returns
    -------
    torch_geometric.data.Data
        ``x`` of shape (nodes, 7): one-hot, column 0 for a hidden number, column 1 + k for
        k mines around, 5 for more than 5. ``edge_index`` joins a field to its up to eight
        neighbours, both ways; ``y`` is 1 for a mine. Fields are counted row by row.

    Raises
    ------
    ValueError
        If a size or rate is out of range.

    Examples
    --------
    >>> from posterity.graphs import minesweeper
    >>> board = minesweeper(10, 10)
    >>> int(board.y.sum()), int(board.x[:, 0].sum()), board.edge_index.shape
    (20, 50, torch.Size([2, 684]))
    """
    n = integer("height", height, 1) * integer("width", width, 1)
    mines = round(within("mine_rate", mine_rate, 0, 1) * n)
    hidden = round(within("unknown_rate", unknown_rate, 0, 1) * n)
    data = needs("torch_geometric.data", "graphs").Data
    order, again = (
        torch.randperm(n, generator=generator, device=draw_device(generator)).cpu() for _ in range(2)
    )
    y = torch.zeros(n, dtype=torch.long)
    y[order[:mines]] = 1
    field = torch.arange(n).view(height, width)
    ways = [
        (field[:, :-1], field[:, 1:]), (field[:-1], field[1:]),
        (field[:-1, :-1], field[1:, 1:]), (field[:-1, 1:], field[1:, :-1]),
    ]  # fmt: skip
    half = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in ways], 1)
    edge_index = torch.cat([half, half.flip(0)], 1)
    around = y.new_zeros(n).index_add_(0, edge_index[1], y[edge_index[0]])
    column = 1 + around.clamp_max(5)
    column[again[:hidden]] = 0
    return data(x=F.one_hot(column, 7).to(torch.get_default_dtype()), edge_index=edge_index, y=y)
