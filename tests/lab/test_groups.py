"""Groups of a table's rows: how they are made, who is trained on, and what they are trained with."""

import numpy as np
import pandas as pd
import pytest
import torch

from posterity.lab.data import load_table
from posterity.lab.data.table import TableData
from posterity.lab.groups import (
    GroupDRO,
    encoded_groups,
    fit_groups,
    group_losses,
    group_scores,
    table_groups,
)

rng = np.random.default_rng(0)


def table(n=240, classes=("0", "1"), **columns):
    X = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n), **columns})
    y = (X["a"] > 0).to_numpy().astype(np.int64)
    return TableData(X, y if classes else y * 3.0, "classification" if classes else "regression", classes)


def test_text_and_few_numbers_are_groups_as_they_are_and_small_groups_are_left_out():
    towns = np.array(["w", "z", "u", "v"] * 58 + ["x"] * 8)
    groups = table_groups(table(town=towns), "town")
    assert groups.names == ("u", "v", "w", "z")
    assert groups.places is None
    assert (groups.codes[towns == "x"] == -1).all()
    assert set(groups.codes[towns == "w"]) == {2}
    years = np.tile([2000.0, 1990.0, 1995.0, np.nan, 2010.0], 48)
    groups = table_groups(table(year=years), "year")
    assert groups.names == ("1990", "1995", "2000", "2010")
    assert groups.places[:, 0].tolist() == [1990, 1995, 2000, 2010]
    assert (groups.codes[np.isnan(years)] == -1).all()


def test_many_numbers_are_cut_at_quantiles_and_several_columns_into_cells():
    groups = table_groups(table(), "a")
    assert np.bincount(groups.codes).tolist() == [24] * 10
    assert (np.diff(groups.places[:, 0]) > 0).all()
    cells = table_groups(table(n=600), "a,b")
    assert cells.places.shape == (10, 2)
    assert (np.diff(cells.places[:, 0]) >= 0).all()


def test_inputs_are_prepared_by_the_groups_that_are_trained_on_alone():
    data = table(place=np.arange(240) % 4, classes=())
    data.X.loc[data.X["place"] == 3, "a"] += 100
    groups = table_groups(data, "place")
    train, test = encoded_groups(data, "place", groups, [[0, 1, 2], [3]])
    assert train.x.shape == (180, 2)
    torch.testing.assert_close(train.x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    assert test.x[:, 0].min() > 50
    assert train.groups.bincount().tolist() == [60, 60, 60]
    assert test.groups.unique().tolist() == [0]
    assert float(train.y.mean()) == pytest.approx(0, abs=1e-5)
    assert float(train.y.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_scores_are_accuracies_or_the_share_of_variance_explained():
    data = table(place=np.arange(240) % 4)
    (rows,) = encoded_groups(data, "place", table_groups(data, "place"), [[0, 1, 2, 3]])
    net = fit_groups(rows, torch.Tensor.mean, 0, steps=100)
    right = (net(rows.x).argmax(1) == rows.y).double()
    for k in range(4):
        assert float(group_scores(net, rows)[k]) == pytest.approx(float(right[rows.groups == k].mean()))
    loss = torch.nn.functional.cross_entropy(net(rows.x).detach(), rows.y, reduction="none")
    assert float(group_losses(net, rows)[2]) == pytest.approx(float(loss[rows.groups == 2].mean()))
    numbers = table(place=np.arange(240) % 4, classes=())
    (rows,) = encoded_groups(numbers, "place", table_groups(numbers, "place"), [[0, 1, 2, 3]])
    mean = torch.nn.Sequential(torch.nn.Linear(2, 1))
    torch.nn.init.zeros_(mean[0].weight)
    torch.nn.init.zeros_(mean[0].bias)
    assert float(group_scores(mean, rows).mean()) == pytest.approx(0, abs=1e-5)


def test_group_dro_follows_the_exponential_of_the_losses():
    dro = GroupDRO(2, eta=0.5)
    value = dro(torch.tensor([1.0, 3.0]))
    share = 1 / (1 + np.exp(0.5 * 2))
    assert float(value) == pytest.approx(share + 3 * (1 - share))
    dro(torch.tensor([0.0, 4.0]))
    assert float(dro.logits.exp()[0]) == pytest.approx(1 / (1 + np.exp(0.5 * 6)))


def test_the_same_seed_trains_the_same_network():
    data = table(place=np.arange(240) % 4)
    (rows,) = encoded_groups(data, "place", table_groups(data, "place"), [[0, 1, 2, 3]])
    one, other = (fit_groups(rows, lambda x: x, 3, steps=5, balanced=False) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_refuses_groups_that_are_none():
    with pytest.raises(ValueError, match="group must be one or more of the columns a, b, got 'c'"):
        table_groups(table(), "c")
    with pytest.raises(ValueError, match="at least four groups of 10 rows are needed, 'town' has 2"):
        table_groups(table(town=np.array(["u", "v"] * 120)), "town")
    with pytest.raises(ValueError, match="several columns must be numbers"):
        table_groups(table(town=np.array(["u", "v"] * 120)), "a,town")
    assert len(table_groups(load_table("diabetes"), "age").names) == 10
