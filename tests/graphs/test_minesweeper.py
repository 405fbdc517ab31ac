"""Boards of Minesweeper against the rule, field by field."""

import itertools
from collections import defaultdict

import pytest
import torch

from posterity.graphs import minesweeper


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width", "mine_rate"), [(7, 9, 0.2), (1, 6, 0.5), (8, 8, 0.9)])
def test_a_board_follows_its_rule_field_by_field(height, width, mine_rate):
    board = minesweeper(height, width, mine_rate=mine_rate, unknown_rate=0.3, generator=seeded(5))
    n, mines = height * width, board.y.view(height, width)
    assert int(mines.sum()) == round(mine_rate * n)
    assert int(board.x[:, 0].sum()) == round(0.3 * n)
    assert torch.equal(board.x.sum(1), torch.ones(n))
    near = defaultdict(set)
    for u, v in board.edge_index.T.tolist():
        near[u].add(v)
    assert board.edge_index.shape[1] == sum(map(len, near.values()))
    for row, column in itertools.product(range(height), range(width)):
        around = {
            (r, c)
            for r, c in itertools.product((row - 1, row, row + 1), (column - 1, column, column + 1))
            if 0 <= r < height and 0 <= c < width and (r, c) != (row, column)
        }
        field = row * width + column
        assert near[field] == {r * width + c for r, c in around}
        if board.x[field, 0] == 0:
            assert int(board.x[field].argmax()) == 1 + min(5, sum(int(mines[place]) for place in around))


def test_the_default_board_has_the_published_size():
    board = minesweeper(generator=seeded())
    assert board.edge_index.shape == (2, 2 * 39_402)
    assert (int(board.y.sum()), int(board.x[:, 0].sum())) == (2000, 5000)
    assert torch.equal(board.x, minesweeper(generator=seeded()).x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: minesweeper(0), "height must be"), (lambda: minesweeper(2, 0), "width must be"),
        (lambda: minesweeper(mine_rate=1.1), r"mine_rate must be in \[0, 1\], got 1.1"), (lambda: minesweeper(unknown_rate=-0.1), "unknown_rate must be"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
