"""What the claims of bilinear transduction are made on: the ranges of their sets, rows of a table, the point mass."""

import numpy as np
import pandas as pd
import pytest

from posterity.claims.transfer import bilinear_transduction as claims
from posterity.lab.data import load_table
from posterity.lab.data.table import TableData


@pytest.mark.parametrize(
    ("name", "inputs", "inside", "beyond", "truth"),
    [
        ("growth", 2, (0, 1.5), (0.5, 2.5), lambda X: np.exp(X[:, 0] + X[:, 1] / 2)),
        ("quadratic", 3, (0, 1), (0.8, 1.8), None),
    ],
)
def test_boxes_are_trained_inside_and_tested_outside(name, inputs, inside, beyond, truth):
    table = load_table(name, seed=100)
    X, outside = table.X[[f"x{k + 1}" for k in range(inputs)]].to_numpy(), table.X["outside"].to_numpy()
    train, test, far = claims._rows(table, "outside", 0.5)
    assert train.sum() == 500 and test.sum() == 1000 and not (train & test).any()
    assert X[train].min() >= inside[0] and X[train].max() <= inside[1]
    assert X[test].min() >= beyond[0] and X[test].max() <= beyond[1]
    np.testing.assert_allclose(outside[test], X[test].max(1) - inside[1])
    assert (far[test] > 0).all()
    if truth is not None:
        assert abs(table.y - truth(X)).std() < 0.02
    else:  # both targets are quadratic forms, which are even and of degree 2
        products = np.stack([X[:, i] * X[:, j] for i in range(3) for j in range(i + 1)], 1)
        for y in (table.y, table.X["also y2"].to_numpy()):
            left = y - products @ np.linalg.lstsq(products, y, rcond=None)[0]
            assert abs(left).std() < 0.02


def test_a_grasp_turns_moves_and_scales_with_the_shape():
    table = load_table("grasping", seed=100)
    train, test, _ = claims._rows(table, "outside", 0.5)
    assert train.sum() == 1000 and test.sum() == 200
    x = table.X[[f"x{k + 1}" for k in range(12)]].to_numpy()
    grasp = np.column_stack([table.y, table.X["also y2"], table.X["also y3"]])
    lengths = np.linalg.norm(x[:, 3:].reshape(-1, 3, 3), axis=2)
    arm = np.linalg.norm(grasp - x[:, :3], axis=1) / lengths[:, 0]  # of no unit: the same in every pose
    assert arm.std() / arm.mean() < 0.05
    assert lengths[test, 0].min() > lengths[train, 0].max() * 0.95  # scales from 1.3 on
    moves = x[test, :2] / lengths[test, :1] * lengths[train, 0].max() / 1.3
    assert moves.min() > 0.45 and moves.max() < 0.75


def test_a_table_of_ones_own_is_split_with_a_gap_and_ends_one_width_on():
    frame = pd.DataFrame({"a": np.arange(100.0), "b": 1.0})
    train, test, far = claims._rows(TableData(frame, np.arange(100.0), "regression"), "a", 0.4)
    edge = 0.4 * 99
    assert np.array_equal(np.flatnonzero(train), np.arange(40))
    assert np.array_equal(np.flatnonzero(test), np.arange(np.ceil(1.2 * edge), np.floor(2 * edge) + 1))
    np.testing.assert_allclose(far, np.arange(100) - edge)


TABLE = TableData(
    pd.DataFrame({"a": np.arange(200.0), "also c": np.arange(200.0), "kind": ["x", "y"] * 100}),
    np.arange(200.0),
    "regression",
)
ASKED = {"name": "mine.csv", "split_column": "a", "quantile": 0.5, "inputs": (), "outputs": "also "}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_column": None}, "split_column must name a column of numbers: a, also c; got None"),
        ({"split_column": "kind"}, "split_column must name a column of numbers: a, also c; got 'kind'"),
        ({"inputs": ("b",)}, "inputs must name columns: a, also c, kind; got 'b'"),
        ({"inputs": ("also c",)}, "outputs='also ' leaves no column to predict from"),
        ({"outputs": "ki"}, "outputs='ki' must begin columns of numbers without gaps, got 'kind'"),
        ({"quantile": 0.1}, "quantile=0.1 of 'a' leaves 20 rows to train on"),
        ({"quantile": 0.95}, "to test on, up to one further width of the training range"),
    ],
    ids="abcdefg",
)
def test_refuses_what_cannot_be_split(options, message):
    claims._fits(TABLE, **ASKED)
    with pytest.raises(ValueError, match=message):
        claims._fits(TABLE, **{**ASKED, **options})


def test_the_expert_brings_the_mass_to_its_goal_and_drag_slows_it():
    mass = claims._Mass(0.3, 50)
    goals = np.random.default_rng(0).uniform(-0.3, 0.3, (20, 3))
    obs, action, final = mass.run(goals, mass.expert)
    assert obs.shape == (20, 51, 9) and action.shape == (20, 50, 3)
    assert final < 0.005
    np.testing.assert_allclose(final, np.linalg.norm(obs[:, -1, :3] - goals, axis=1).mean())
    push = action - 0.3 * (np.exp(obs[:, :-1, :3] / 0.15) - 1)
    assert abs(push).max() <= 1
    free = claims._Mass(0.0, 40)
    speed = free.run(np.zeros((1, 3)), lambda obs, t: np.full((1, 3), float(t == 0)))[0][0, :, 3]
    np.testing.assert_allclose(speed[1:], 0.1 * 0.95 ** np.arange(40.0))
