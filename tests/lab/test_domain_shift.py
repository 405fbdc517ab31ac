"""Domain shift: some groups are never trained on, and a choice is made by the worst of those that are."""

import numpy as np
import pytest
import torch

from posterity.lab.data import load_table
from posterity.lab.groups import GroupRows
from posterity.lab.tasks import domain_shift as task


def test_a_third_of_the_groups_is_tested_and_never_seen():
    table, seen = load_table("diabetes"), {}

    def fit(train, seed):
        seen["train"] = train
        zero = torch.nn.Linear(train.x.shape[1], 1)  # says the mean of what is trained on
        torch.nn.init.zeros_(zero.weight)
        torch.nn.init.zeros_(zero.bias)
        return zero

    found = task._score(fit, 3, "diabetes", None, group="age")
    assert seen["train"].n_groups == 7
    assert len(seen["train"].y) < len(table.y)
    assert seen["train"].x.shape[1] == table.X.shape[1] - 1  # where a row comes from is no input
    assert found["worst-group error"] >= found["mean error of unseen groups"] > 0


def test_the_choice_is_the_one_whose_worst_group_loses_least():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    groups = torch.arange(400) % 4
    y = ((x[:, 0] > 0) ^ (groups == 3)).long()  # the last group says the opposite
    x = torch.cat([x, (groups == 3).float()[:, None]], 1)
    rows = GroupRows(x, y, groups, 4, 2)
    without_last = torch.tensor([1.0, 1.0, 1.0, 0.0])
    asked = []

    def choices(rows):
        asked.append(len(rows.y))
        return [lambda: lambda losses: losses @ without_last, lambda: torch.Tensor.sum]

    net = task.best_of(rows, 0, choices)
    with torch.no_grad():
        right = (net(x).argmax(1) == y).float()
    assert right[groups == 3].mean() > 0.8
    assert asked == [320, 400]


def test_refuses_a_table_without_groups_or_without_anything_else():
    table = load_table("diabetes")
    with pytest.raises(ValueError, match="group must be one or more of the columns"):
        task.require_groups(table, "town")
    alone = type(table)(table.X[["age"]], table.y, table.task)
    with pytest.raises(ValueError, match="nothing is left to predict from"):
        task.require_groups(alone, "age")
    assert np.isfinite(table.y).all()
