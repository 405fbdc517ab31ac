"""BridgeTable: columns come back with their names, dtypes, categories and ranges; and the claims' distances."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from posterity.claims.generative.constrained_bridges import Rows
from posterity.generative import BridgeTable, Categorical, Interval, Product

QUICK = {"hidden": (8,), "max_iter": 3, "n_steps": 3, "random_state": 0}
N = 80


@pytest.fixture
def frame():
    draw = np.random.default_rng(0)
    return pd.DataFrame({
        "age": draw.integers(17, 400, N), "height": draw.normal(size=N).astype("float32"),
        "colour": np.array(["red", "blue", None], dtype=object)[draw.integers(0, 3, N)],
        "size": pd.Categorical(np.array(list("SML"))[draw.integers(0, 3, N)], categories=list("SMLX")),
        "member": draw.random(N) < 0.3, "same": 7, "rooms": pd.array(draw.integers(0, 3, N), dtype="Int64"),
        "code": pd.array(np.array(["q", "w"])[draw.integers(0, 2, N)], dtype="string"),
        "id": 2**60 + draw.integers(0, 5, N), "tiny": draw.random(N) * 1e-300, "vast": (draw.random(N) - 0.5) * 1.5e308 * 2,
    })  # fmt: skip


def test_frames_come_back_as_they_were(frame):
    model = BridgeTable(**QUICK).fit(frame)
    made = model.sample(300)
    assert list(made.columns) == list(frame.columns)
    assert made.dtypes.to_dict() == frame.dtypes.to_dict()
    kinds = {column.name: column.kind for column in model.columns_}
    assert kinds == {
        "age": "integer", "height": "continuous", "colour": "categorical", "size": "categorical",
        "member": "categorical", "same": "constant", "rooms": "integer", "code": "categorical",
        "id": "integer", "tiny": "continuous", "vast": "continuous",
    }  # fmt: skip
    for name in ("colour", "size", "member", "code", "rooms", "same"):
        assert set(made[name].dropna()) == set(frame[name].dropna())
        assert made[name].isna().any() == frame[name].isna().any()
    for name in ("age", "height", "rooms", "id", "tiny", "vast"):
        assert frame[name].min() <= made[name].min()
        assert made[name].max() <= frame[name].max()
    assert made["age"].nunique() > 40  # between the values seen as well
    assert model.feature_names_in_.tolist() == list(frame.columns)
    assert len(model.loss_curve_) == 3
    assert not model.net_.training


def test_order_of_columns_is_that_of_the_table(frame):
    made = BridgeTable(**QUICK).fit(frame[["size", "age", "code"]]).sample(20)
    assert list(made.columns) == ["size", "age", "code"]
    assert set(made["size"]) <= set("SML")


@pytest.mark.parametrize("kind", ["float", "int", "text", "objects", "bool"])
def test_arrays_come_back_as_they_were(kind):
    draw = np.random.default_rng(0)
    X = {
        "float": draw.normal(size=(30, 2)).astype("float32"), "int": draw.integers(0, 3, (30, 2)),
        "text": np.array([["a", "bb"], ["c", "bb"]] * 15), "bool": draw.random((30, 2)) < 0.5,
        "objects": np.array([["a", 1, 0.5], [None, 3, 0.75]] * 15, dtype=object),
    }[kind]  # fmt: skip
    made = BridgeTable(**QUICK).fit(X).sample(10)
    assert made.dtype == X.dtype
    assert made.shape == (10, X.shape[1])
    if kind != "float":
        for j in range(2):
            assert set(made[:, j]) <= set(X[:, j])


def test_y_is_one_more_column(frame):
    y = pd.Series(np.array(["no", "yes"])[np.arange(N) % 2], name="bought")
    made = BridgeTable(**QUICK).fit(frame, y).sample(20)
    assert list(made.columns) == [*frame.columns, "bought"]
    assert set(made["bought"]) == {"no", "yes"}
    X, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 3
    made = BridgeTable(**QUICK).fit(X, y).sample(20)
    assert made.shape == (20, 3)
    assert set(made[:, 2]) <= {0, 1, 2}


def test_a_user_says_what_columns_are():
    X = np.array([[1.0, 2.0, 5.0], [2.0, 100.0, 7.0], [1.0, 4.0, 9.0]])
    model = BridgeTable([0], [1], **QUICK).fit(X)
    assert [column.kind for column in model.columns_] == ["categorical", "integer", "continuous"]
    made = model.sample(50)
    assert set(made[:, 0]) <= {1.0, 2.0}
    assert set(made[:, 1]) <= {2.0, 4.0, 100.0}
    frame = pd.DataFrame({"a": [1, 2, 3]})
    assert BridgeTable(integer=[], **QUICK).fit(frame).columns_[0].kind == "continuous"


def test_a_dependence_is_learned():
    """Two columns that are always alike, and a number that says which."""
    which = np.random.default_rng(3).integers(0, 2, 400)
    frame = pd.DataFrame(
        {"a": np.array(["x", "y"])[which], "b": which, "c": which + 0.1 * np.linspace(-1, 1, 400)}
    )
    model = BridgeTable(hidden=(32,), max_iter=100, n_steps=20, lr=2e-2, ema=0.9, random_state=3).fit(frame)
    made = model.sample(400)
    assert ((made["a"] == "y") == (made["b"] == 1)).mean() > 0.9
    assert ((made["c"] > 0.5) == (made["b"] == 1)).mean() > 0.9
    assert 0.35 < made["b"].mean() < 0.65


def test_same_seed_same_rows_and_no_global_state(frame):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (BridgeTable(**QUICK).fit(frame[["age", "colour"]]) for _ in range(2))
    pd.testing.assert_frame_equal(first.sample(9), second.sample(9))
    pd.testing.assert_frame_equal(first.sample(9, random_state=3), second.sample(9, random_state=3))
    assert not first.sample(9).equals(first.sample(9, random_state=3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_fits_in_modes_without_gradients(frame):
    plain = BridgeTable(**QUICK).fit(frame[["age", "colour"]]).sample(9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            pd.testing.assert_frame_equal(BridgeTable(**QUICK).fit(frame[["age", "colour"]]).sample(9), plain)


def test_a_constant_table_is_given_back():
    made = BridgeTable(**QUICK).fit(pd.DataFrame({"a": ["x", "x"], "b": [1.5, 1.5]})).sample(3)
    assert made.to_dict("list") == {"a": ["x"] * 3, "b": [1.5] * 3}


def test_conforms_to_scikit_learn(as_a_user):
    results = check_estimator(BridgeTable(**{**QUICK, "max_iter": 1}), on_fail=None, on_skip=None)
    assert not [r["check_name"] for r in results if r["status"] == "failed"]


def fit(X, y=None, **options):
    return BridgeTable(**{**QUICK, **options}).fit(X, y)


A = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(np.where(A == 3, np.nan, A)), "column 0 must hold finite numbers .* got NaN, .* in row 1"),
        (lambda: fit(pd.DataFrame({"a": [1.0, np.inf]})), "column 'a' must hold finite numbers .* got infinity"),
        (lambda: fit(pd.DataFrame({"a": ["x", "y"]}), categorical=[]), "column 'a' must hold finite numbers .* got 'x'"),
        (lambda: fit(pd.DataFrame({"d": pd.to_datetime(["2020", "2021"])})), "column 'd' must hold .* datetime64"),
        (lambda: fit(A + 0.5, integer=[1]), "column 1 must hold whole numbers, got 2.5 in row 0"),
        (lambda: fit(A, categorical=["b"]), r"categorical must name columns of the table, 'b' is none of \[0, 1\]"),
        (lambda: fit(A, categorical=[0], integer=[0]), "integer must not name what is categorical, got 0"),
        (lambda: fit(A, integer="all"), "integer must be a sequence of columns or \"auto\", got 'all'"),
        (lambda: fit(A[:1]), "X must have at least 2 rows, got 1"),
        (lambda: fit(A, A[:2, 0]), r"y must have shape \(3,\) for X, got \(2,\)"),
        (lambda: fit(pd.DataFrame({"a": [1, 2]}), pd.Series([1, 2], name="a")), "y must have a name that no column"),
        (lambda: fit(A, hidden=(0,)), "hidden must be an integer of at least 1, got 0"),
        (lambda: fit(A, hidden=8), "hidden must be a sequence of integers, got 8"),
        (lambda: fit(A, max_iter=0), "max_iter must be an integer of at least 1, got 0"),
        (lambda: fit(A, batch_size=1), "batch_size must be an integer of at least 2, got 1"),
        (lambda: fit(A, n_steps=0), "n_steps must be an integer of at least 1, got 0"),
        (lambda: fit(A, lr=0.0), "lr must be greater than 0, got 0.0"),
        (lambda: fit(A, ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        (lambda: fit(A, schedule="cosine"), "schedule must be one of"),
        (lambda: fit(A).sample(0), "n_samples must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sampling_before_fitting_is_refused():
    with pytest.raises(NotFittedError):
        clone(BridgeTable()).sample()


def test_distances_of_the_claims_are_their_definitions():
    domain = Product([Categorical(2), Interval(-1.0, 1.0), Categorical(3)])
    train = torch.tensor([[1.0, 0.0, -1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]] * 5)
    rows = Rows((train,), domain, (slice(0, 2), slice(2, 3), slice(3, 6)))
    z = torch.tensor([[1.0, 0.0, 3.0, 0.0, 0.5, 0.5]])
    torch.testing.assert_close(rows.distance(z), torch.tensor([[0.0, 2.0, 0.5**0.5]]))
    assert rows.variation(train, train) == 0
    # The same margins, but no dependence: over the four joint cells of a pair half of the mass lies elsewhere.
    a, b = train[0], train[1]
    free = torch.stack([
        torch.cat([(a, b)[i][:2], (a, b)[j][2:3], (a, b)[k][3:]]) for i in (0, 1) for j in (0, 1) for k in (0, 1)
    ])  # fmt: skip
    assert rows.variation(free, train) == pytest.approx(0.5)
