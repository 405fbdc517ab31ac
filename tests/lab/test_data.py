"""Data by name or file: tables as users have them, and refusals that name what is wrong."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from posterity.lab import data as registry
from posterity.lab.data import (
    Functions,
    Graph,
    Images,
    Points,
    Series,
    Table,
    check,
    fetch,
    flip_labels,
    kind_of,
    load_graph,
    load_images,
    load_labelled,
    load_points,
    load_series,
    load_table,
    names,
    read_frame,
    split,
    table_encoder,
)  # fmt: skip
from posterity.lab.data.graph import read_planetoid

PUBLIC = Path(os.environ.get("POSTERITY_DATA") or "../shared/data")
public = pytest.mark.skipif(not (PUBLIC / "tables").is_dir(), reason="the public files are not here")
KINDS = {
    "points": Points,
    "table": Table,
    "images": Images,
    "graph": Graph,
    "series": Series,
    "functions": Functions,
}


def write(path, text):
    path.write_text(text)
    return str(path)


ROWS = "\n".join(f"{k},{k * 1.5},{'ab'[k % 2]},{k * 2}" for k in range(30))


@pytest.mark.parametrize(
    ("text", "target", "numeric", "categorical", "said"),
    [
        ("x,z,town,price\n" + ROWS, "price", 2, 1, "30 rows"),
        (ROWS, "3", 2, 1, "no header"),
        (ROWS, "-1", 2, 1, "no header"),
        ("x;z;town;price\n" + ROWS.replace(",", ";"), "price", 2, 1, "separator ';'"),
        ("x;z;town;price\n" + ROWS.replace(",", ";").replace(".", ","), "price", 2, 1, "separator ';'"),
        ("x\tz\ttown\tprice\n" + ROWS.replace(",", "\t"), "price", 2, 1, "separator '\\t'"),
        (
            ",x,town,price\n" + "\n".join(f"{k},{k / 3},u,{k * 2}" for k in range(30)),
            "price",
            1,
            1,
            "index column",
        ),
        ("x,z,town,price\n?,1,a,3\nNA,2,b,4\n5,,a,\n6,7,,9\n", "price", 2, 1, "rows without a target"),
        ("\ufeffx,z,town,price\r\n" + ROWS.replace("\n", "\r\n"), "price", 2, 1, "30 rows"),
        ('"x, really","z","town","price"\n' + ROWS, "price", 2, 1, "30 rows"),
    ],
    ids=[
        "header",
        "number",
        "last",
        "semicolons",
        "decimal commas",
        "tabs",
        "index",
        "missing",
        "windows",
        "quotes",
    ],
)
def test_a_table_is_read_as_its_owner_expects(tmp_path, text, target, numeric, categorical, said):
    table = load_table(write(tmp_path / "t.csv", text), target=target, task="regression")
    kinds = [dtype.kind in "iuf" for dtype in table.X.dtypes]
    assert (sum(kinds), len(kinds) - sum(kinds)) == (numeric, categorical)
    assert said in table.note
    assert "\n" not in table.note
    assert np.isfinite(table.y).all()
    assert np.isfinite(table_encoder().fit_transform(table.X)).all()


def test_values_survive_reading(tmp_path):
    table = load_table(
        write(tmp_path / "t.csv", "x;price\n1,5;2,25\n3;4\n"), target="price", task="regression"
    )
    assert table.X["x"].tolist() == [1.5, 3.0]
    assert table.y.tolist() == [2.25, 4.0]


def test_a_text_target_becomes_classes_and_a_gzip_or_parquet_file_is_read(tmp_path):
    table = load_table(write(tmp_path / "t.csv", "x,who\n1,b\n2,a\n3,b\n"), target="who")
    assert (table.task, table.classes, table.y.tolist()) == ("classification", ("a", "b"), [1, 0, 1])
    frame = pd.DataFrame({"x": [1.0, 2.0], "town": ["u", "v"], "y": [0.5, 1.5]})
    frame.to_parquet(tmp_path / "t.parquet")
    assert load_table(str(tmp_path / "t.parquet"), target="y").task == "regression"
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("a,b\n1,2\n3,4\n")
    assert read_frame(tmp_path / "t.csv.gz")[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {"target": "y"}, "t.csv is empty"),
        ("x,y\n", {"target": "y"}, "t.csv has no rows"),
        ("x,y\n1,2\n3,4\n", {}, "say which column is the target: x, y"),
        ("x,y\n1,2\n3,4\n", {"target": "z"}, "target must be one of x, y, got 'z'"),
        ("x,y\n1,2\n3,4\n", {"target": "-1"}, "target must be one of x, y, got '-1'"),
        ("1,2\n3,4\n", {"target": "7"}, "target must be one of 0, 1, got '7'"),
        ("y\n1\n2\n", {"target": "y"}, "nothing is left to predict 'y' from"),
        ("x,x\n1,2\n3,4\n", {"target": "x"}, "twice|target must be one of"),
        ("x,y\n1,a\n2,b\n", {"target": "y", "task": "regression"}, "needs a target of numbers, got 'a'"),
        ("x,y\n1,a\n2,a\n", {"target": "y", "task": "classification"}, "two classes"),
        ("x,y\ninf,1\n2,2.5\n", {"target": "y", "task": "regression"}, "column 'x' is infinite in row 1"),
        ("x,y\n1,2\n1,2,3\n", {"target": "y"}, "row 3 has 3 fields, others have 2"),
        ("x,y\n" + "\n".join(f"{k},{k}.25" for k in range(99)), {"target": "y", "task": "classification"}, "no classes"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_by_name(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        load_table(write(tmp_path / "t.csv", text), **options)


def test_bytes_that_are_no_table_are_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "t.parquet").write_bytes(b"nonsense")
    for name, message in (("t.csv", "is not a text table"), ("t.parquet", "is not a Parquet file")):
        with pytest.raises(ValueError, match=message):
            load_table(str(tmp_path / name), target="x")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_name_is_refused_with_the_right_ones(kind):
    with pytest.raises(ValueError, match=f"data must be {kind}: a name .* which is no name and no file"):
        check(KINDS[kind], "nope")
    own = set(names(kind_of(KINDS[kind])))
    others = {name: other for other in KINDS for name in names(kind_of(KINDS[other])) if name not in own}
    with pytest.raises(ValueError, match=f"which is .*({'|'.join(KINDS)})"):
        check(KINDS[kind], next(iter(others)))


@public
@pytest.mark.parametrize("kind", KINDS)
def test_every_public_set_loads(kind, monkeypatch):
    monkeypatch.setenv("POSTERITY_DATA", str(PUBLIC))
    for name in names(kind_of(KINDS[kind])):
        if registry.public_sets().get(name, {}).get("kind") == kind:
            assert check(KINDS[kind], name)


def test_a_public_file_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "sonar.csv").write_text("not the published bytes")
    with pytest.raises(ValueError, match="SHA-256 differs"):
        fetch("sonar")


def test_a_public_file_that_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    import pooch

    def refuse(*words, **options):
        raise OSError("no network")

    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path))
    monkeypatch.setattr(pooch.core, "stream_download", refuse)
    with pytest.raises(ValueError, match="set POSTERITY_DATA"):
        fetch("sonar")


def test_points_come_from_generators_arrays_and_tables(tmp_path):
    assert load_points("two-moons", seed=1).shape == (10_000, 2)
    assert not np.array_equal(load_points("two-moons", seed=1), load_points("two-moons", seed=2))
    assert load_points("digits").shape == (1797, 64)
    np.save(tmp_path / "p.npy", np.ones((5, 2, 2)))
    assert load_points(str(tmp_path / "p.npy")).shape == (5, 4)
    assert load_points(write(tmp_path / "p.csv", "a,b\n1,2\n3,4\n")).tolist() == [[1, 2], [3, 4]]
    for text, message in (
        ("a,b\n1,u\n2,v\n", "column 'b' is not"),
        ("a,b\n1,2\n,4\n", "row 2 has a missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_points(write(tmp_path / "bad.csv", text))


def test_images_come_from_folders_and_arrays(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / "f" / label).mkdir(parents=True)
        for k in range(2):
            image.fromarray(np.full((4, 5, 3), 40 * k, np.uint8)).save(tmp_path / "f" / label / f"{k}.png")
    images = load_images(str(tmp_path / "f"))
    assert images.x.shape == (4, 3, 4, 5)
    assert images.classes == ("cat", "dog")
    assert images.x.max() == pytest.approx(40 / 255)
    image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "f" / "cat" / "odd.png")
    with pytest.raises(ValueError, match="one size"):
        load_images(str(tmp_path / "f"))
    (tmp_path / "f" / "cat" / "odd.png").write_text("no image")
    with pytest.raises(ValueError, match=r"odd\.png is not a readable image"):
        load_images(str(tmp_path / "f"))
    np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 8, 8), np.uint8), y_train=[0, 1, 1])
    assert load_images(str(tmp_path / "a.npz")).x.shape == (3, 1, 8, 8)
    np.savez(tmp_path / "b.npz", pictures=np.zeros(3))
    with pytest.raises(ValueError, match="needs arrays x and y"):
        load_images(str(tmp_path / "b.npz"))


def test_a_graph_of_a_user_is_symmetric_and_split(tmp_path):
    x, y, edges = np.eye(6), np.array([0, 1, 0, 1, 0, 1]), np.array([[0, 1], [1, 2], [0, 1]])
    np.savez(tmp_path / "g.npz", node_features=x, node_labels=y, edges=edges)
    graph = load_graph(str(tmp_path / "g.npz"))
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    train, val, test = graph.split(13)
    assert (train.int() + val.int() + test.int()).eq(1).all()
    for change, message in (
        ({"edges": np.array([[0, 9]])}, "nodes outside 0..5"), ({"edges": edges.T[:1]}, r"edges must be integers"),
        ({"node_labels": y[:3]}, r"node_labels \(n,\)"), ({"node_features": x * np.nan}, "NaN or infinity in row 0"),
        ({"train_masks": np.ones((2, 5)), "val_masks": np.ones((2, 5)), "test_masks": np.ones((2, 5))}, "masks must all be"),
    ):  # fmt: skip
        np.savez(tmp_path / "bad.npz", **{"node_features": x, "node_labels": y, "edges": edges, **change})
        with pytest.raises(ValueError, match=message):
            load_graph(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "bad.npz", node_features=x, node_labels=y)
    with pytest.raises(ValueError, match="'edges' is missing"):
        load_graph(str(tmp_path / "bad.npz"))
    (tmp_path / "bad.npz").write_text("nonsense")
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        load_graph(str(tmp_path / "bad.npz"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "harm"),)

    path = tmp_path / "ind.cora.x"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="asks for"):
        read_planetoid(path)
    assert not (tmp_path / "harm").exists()
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a Planetoid file"):
        read_planetoid(path)


def test_series_are_ordered_long_or_wide(tmp_path):
    wide = "date,a,b,note\n2020-01-02,2,5,u\n2020-01-01,1,,v\n"
    series = load_series(write(tmp_path / "w.csv", wide))
    assert series.columns == ("a", "b")
    assert series.values[:, 0].tolist() == [1, 2]
    assert np.isnan(series.values[0, 1])
    assert "ordered by 'date'" in series.note
    assert "'note' left out" in series.note
    long = "time,variable,value\n1,a,1\n1,b,2\n2,a,3\n"
    series = load_series(write(tmp_path / "l.csv", long))
    assert series.columns[-2:] == ("a", "b")
    for text, message in (
        (long + "2,a,4\n", "a at 2 appears twice"), ("x,y\nx,y\nu,y\n", "no column of numbers"),
        ("a,b\n1,\n2,\n", "column 'b' has no observed value"), ("a,b\n1,inf\n2,3\n", "row 1, column 'b' is infinite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_series(write(tmp_path / "bad.csv", text))


def test_a_split_is_disjoint_random_by_seed_and_stratified():
    labels = np.repeat([0, 1], [90, 10])
    parts = split(100, (0.6, 0.2, 0.2), 3, stratify=labels)
    assert [len(part) for part in parts] == [60, 20, 20]
    assert sorted(np.concatenate(parts)) == list(range(100))
    assert [labels[part].sum() for part in parts] == [6, 2, 2]
    assert not np.array_equal(parts[0], split(100, (0.6, 0.2, 0.2), 4)[0])
    with pytest.raises(ValueError, match="sum to at most 1"):
        split(10, (0.9, 0.2), 0)


def test_the_share_of_labels_that_are_flipped_is_exact_and_each_becomes_any_other_class():
    y = np.repeat(np.arange(4, dtype=np.uint8), 3_000)
    noisy, wrong = flip_labels(y, 0.25, 3)
    assert wrong.sum() == 3_000 and noisy.dtype == y.dtype
    np.testing.assert_array_equal(noisy != y, wrong)
    # of each class a quarter, to each of the three others a twelfth: 250, within 4 deviations
    counts = np.histogram2d(y[wrong], noisy[wrong], bins=4)[0]
    assert (np.diag(counts) == 0).all() and (abs(counts[~np.eye(4, dtype=bool)] - 250) < 64).all()
    np.testing.assert_array_equal(flip_labels(y, 0.25, 3)[0], noisy)
    assert (flip_labels(y, 0.25, 4)[0] != noisy).any()
    np.testing.assert_array_equal(flip_labels(y, 0, 0)[0], y)
    np.testing.assert_array_equal(flip_labels(y[:6_000], 1, 0)[0], 1 - y[:6_000])
    assert set(flip_labels(y[:100], 1, 0, n_classes=3)[0]) == {1, 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flip_labels(np.zeros(3), 0.1, 0), "y must be codes from 0 of shape .* got float64"),
        (lambda: flip_labels(np.array([0, -1]), 0.1, 0), "y must be codes from 0"),
        (lambda: flip_labels(np.array([0, 1]), 1.1, 0), r"share must be in \[0, 1\], got 1.1"),
        (lambda: flip_labels(np.array([0, 0]), 0.1, 0), "n_classes must be at least 2 for y, got 1"),
        (lambda: flip_labels(np.array([0, 3]), 0.1, 0, n_classes=3), "n_classes must be at least 4 for y, got 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_flipped_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_features_are_images_of_a_pixel(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(12, 5)), np.arange(12) % 3
    np.savez(tmp_path / "f.npz", x=x, y=y)
    images = load_labelled(str(tmp_path / "f.npz"))
    assert images.x.shape == (12, 5, 1, 1) and images.x.dtype == np.float32
    np.testing.assert_allclose(images.x[:, :, 0, 0], x, rtol=1e-6)
    assert images.note == "f.npz: 12 rows of 5 features, 3 classes"
    np.savez(tmp_path / "g.npz", x=np.where(x > 1, np.nan, x), y=y)
    with pytest.raises(ValueError, match=r"g.npz: x must be finite numbers"):
        load_labelled(str(tmp_path / "g.npz"))
    np.savez(tmp_path / "h.npz", x=x, y=y[:5])
    with pytest.raises(ValueError, match="got 12 rows and 5 labels"):
        load_labelled(str(tmp_path / "h.npz"))
    assert load_labelled("digits").x.shape == (1797, 1, 8, 8)


def test_rows_of_a_table_are_features_that_know_their_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("size,colour,kind\n1.5,red,b\n2,blue,\n,red,a\n4,blue,b\n5,red,a\n")
    rows = load_labelled(str(path), target="kind")
    assert rows.ids == ("1", "3", "4", "5") and rows.classes == ("a", "b") and rows.y.tolist() == [1, 0, 1, 0]
    sizes = np.array([1.5, 4, 4, 5])  # the missing one is the median of the others
    np.testing.assert_allclose(rows.x[:, 0, 0, 0], (sizes - sizes.mean()) / sizes.std(), rtol=1e-6)
    assert rows.x.shape == (4, 3, 1, 1) and np.ptp(rows.x[:, 1:], axis=0).min() == 1
    with pytest.raises(ValueError, match="say which column is the target"):
        load_labelled(str(path))
    np.savez(tmp_path / "f.npz", x=np.eye(4), y=np.arange(4) % 2)
    with pytest.raises(ValueError, match=r"f.npz has its own classes, target is for a table; got 'kind'"):
        load_labelled(str(tmp_path / "f.npz"), target="kind")
    assert load_labelled("wine").x.shape == (178, 13, 1, 1)


def test_a_set_has_one_maker():
    def make(seed):
        return None

    make.__module__ = "mine"
    with pytest.raises(
        ValueError, match=r"series 'two-rhythms' must have one maker, is made by .*series and mine"
    ):
        registry.dataset(Series, "two-rhythms")(make)
    assert load_series("two-rhythms").values.shape == (6_000, 7)
