"""What people's files hold: each is read as meant, or refused by name before any work."""

import numpy as np
import pandas as pd
import pytest

from posterity.lab.data import (
    _apart,
    load_functions,
    load_graph,
    load_images,
    load_labelled,
    load_points,
    load_series,
    load_table,
    read_frame,
    with_options,
)

ROWS = range(1, 41)


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture
def csv(tmp_path):
    return lambda text, name="t.csv": write(tmp_path / name, text)


def test_a_delimiter_that_ends_each_row_moves_no_column(csv):
    whole = "a,b,price,code,\n" + "".join(f"{i},{10 * i},{100 * i},{1000 * i},\n" for i in ROWS)
    table = load_table(csv(whole), target="price", task="regression")
    assert table.y[0] == 100
    assert "the delimiter that ends each row left out" in table.note
    table = load_table(csv(whole.replace("code,", "code")), target="price", task="regression")
    assert table.y[0] == 100


@pytest.mark.parametrize(
    ("cells", "first", "said"),
    [
        (['"1,037"', '"2,074"'], 1037, "thousands comma in 'size'"), (["12%", "7.5%"], 12, "percent, plain, decimal point"),
        (["1 037", "2 074"], 1037, "thousands space"), (["1e3", "2.5e3"], 1000, ""), (["True", "False"], 1, "true and false"),
    ],
)  # fmt: skip
def test_numbers_are_numbers_however_written_and_the_way_is_said(csv, cells, first, said):
    path = csv("size,rooms,price\n" + "".join(f"{cells[i % 2]},{i % 5},{3 * i + 0.5}\n" for i in range(60)))
    table = load_table(path, target="price")
    assert table.X["size"].iloc[0] == first
    assert said in table.note


@pytest.mark.parametrize(
    ("text", "said", "option", "value"),
    [
        ("x;y\n1,234;a\n5,678;b\n", "column 'x' ('1,234') can be read as decimal comma or as thousands comma: say decimal=. or decimal=,",
         "decimal=,", 1.234),
        ("x;y\n1,234;a\n5,678;b\n", "can be read as", "decimal=.", 1234),
        ("x;y\n1.234;a\n5.678;b\n", "as plain or as thousands point", "decimal=,", 1234),
        ("x,y\n02/01/2024,a\n03/02/2024,b\n", "('02/01/2024') can be read as day first or as month first: say dates=day-first",
         "dates=day-first", pd.Timestamp("2024-01-02")),
        ("x,y\n02/01/2024,a\n03/02/2024,b\n", "can be read as", "dates=month-first", pd.Timestamp("2024-02-01")),
        ("x,y\n1,a\nunknown,b\n3,c\n", "column 'x' has numbers and 'unknown'", "missing=unknown", 1),
        ("x,y\n1,a\nunknown,b\n3,c\n", "text=x reads all as categories", "text=x", "1"),
        ("x,y\nu,v\nw,z\n", "its first row (x, y) may name the columns or be data", "header=yes", "u"),
        ("x,y\nu,v\nw,z\n", "say header=yes or header=no", "header=no", "x"),
        ("0,1,2\n5,3.5,7\n", "its first row (0, 1, 2) may name", "header=yes", 5),
        ("a;b,c\nd;e,f\n", "may separate its fields", "delimiter=;&header=no", "a"),
        ("1,500\n2,250\n", "a comma may separate two columns or be a decimal mark", "delimiter=,", 1),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused_and_an_option_settles_it(
    csv, tmp_path, text, said, option, value
):
    csv(text)
    with pytest.raises(ValueError) as refusal:
        read_frame(tmp_path / "t.csv")
    assert said in str(refusal.value)
    options = dict(pair.split("=", 1) for pair in option.split("&"))
    assert read_frame(tmp_path / "t.csv", options=options)[0].iloc[0, 0] == value


def test_an_option_behind_the_file_and_a_target_settle_what_the_file_leaves_open(csv):
    path = csv("0,1,2\n" + "".join(f"{i * 0.5},{i % 3},{i * 2.5}\n" for i in ROWS))
    with pytest.raises(ValueError, match="header=yes or header=no"):
        load_table(path, target="2")
    assert len(load_table(f"{path}?header=yes", target="2").y) == 40
    assert len(load_table(f"{path}?header=no", target="2").y) == 41
    years = csv("country,2019,2020\n" + "".join(f"c{i % 5},{i * 1.5},{i * 2.5}\n" for i in ROWS))
    assert load_table(years, target="2020").y[0] == 2.5
    with pytest.raises(ValueError, match="'colour' is no option of reading it, those are delimiter"):
        load_table(f"{path}?colour=red", target="2")
    with pytest.raises(ValueError, match="header must be one of yes, no, got 'maybe'"):
        load_points(f"{path}?header=maybe")


@pytest.mark.parametrize("order", ["counted", "shuffled"])
@pytest.mark.parametrize("name", ["", "id", "Unnamed: 0"])
def test_a_column_that_numbers_the_rows_is_no_feature(csv, order, name):
    numbers = np.arange(60) if order == "counted" else np.random.default_rng(0).permutation(60)
    path = csv(f"{name},a,y\n" + "".join(f"{k},{k * 0.37},{k / 60}\n" for k in numbers))
    table = load_table(path, target="y", task="regression")
    assert list(table.X) == ["a"]
    assert "index column" in table.note
    assert len(load_table(f"{path}?index=no", target="y", task="regression").X.columns) == 2


def test_a_row_of_another_width_and_leading_zeros_are_not_passed_over(csv):
    with pytest.raises(ValueError, match=r"t\.csv: row 3 has 2 fields, others have 3"):
        load_table(csv("a,b,c\n1,2,3\n4,5\n6,7,8\n"), target="c")
    codes = load_table(csv("zip,x,y\n01234,1,2\n98765,3,4\n"), target="y", task="regression")
    assert codes.X["zip"].tolist() == ["01234", "98765"]
    assert "leading zeros in 'zip'" in codes.note


def test_a_sign_is_a_class_and_among_numbers_it_is_asked_about(csv):
    signs = load_table(csv("x,y\n" + "".join(f"{i / 2},{'+-'[i % 2]}\n" for i in ROWS)), target="y")
    assert (len(signs.y), signs.classes) == (40, ("+", "-"))
    path = csv("x,y\n" + "".join(f"{'-' if i == 7 else i},{i / 4}\n" for i in ROWS))
    with pytest.raises(ValueError, match="column 'x' has numbers and '-': missing=- reads that as missing"):
        load_table(path, target="y", task="regression")
    assert load_table(f"{path}?missing=-", target="y", task="regression").X["x"].isna().sum() == 1


@pytest.mark.parametrize("value", ["a b", "50%", "n/a,?", "x&y", "+", "ü=1"])
def test_an_option_behind_a_file_comes_back_as_it_was_given(csv, value):
    path = csv("x,y\n1,2\n3,4\n")
    assert _apart(with_options(path, {"missing": value, "header": "yes"})) == (
        path,
        {"missing": value, "header": "yes"},
    )


@pytest.mark.parametrize(
    ("cells", "task", "said"),
    [
        (["", ""], None, "target 'price' has no value in any row"), (["", ""], "classification", "has no value in any row"),
        (["inf", "1"], "regression", "target 'price' is infinite in row 1"), (["a", "a"], "classification", "two classes"),
    ],
)  # fmt: skip
def test_a_target_that_cannot_serve_is_refused_before_any_work(csv, cells, task, said):
    path = csv("a,b,price\n" + "".join(f"{i},{i % 7},{cells[i % 2]}\n" for i in range(60)))
    with pytest.raises(ValueError, match=said):
        load_table(path, target="price", task=task)


def test_dates_of_a_table_are_days_whatever_their_unit_and_missing_ones_stay_missing(tmp_path):
    days = pd.to_datetime(["2024-01-02", None, "2024-01-04"])
    for unit in ("s", "ms", "us", "ns"):
        frame = pd.DataFrame({"when": days.astype(f"datetime64[{unit}]"), "y": [1.5, 2.5, 3.5]})
        frame.to_parquet(tmp_path / "t.parquet")
        table = load_table(str(tmp_path / "t.parquet"), target="y", task="regression")
        np.testing.assert_allclose(table.X["when"], [19724.0, np.nan, 19726.0])
    frame = pd.DataFrame(
        {
            "when": pd.to_timedelta([90, 30], unit="s"),
            "n": pd.array([1, None], dtype="Int64"),
            "y": [1.5, 2.5],
        }
    )
    frame.to_parquet(tmp_path / "t.parquet")
    table = load_table(str(tmp_path / "t.parquet"), target="y", task="regression")
    np.testing.assert_allclose(table.X.to_numpy(), [[90, 1], [30, np.nan]])


def test_days_before_months_are_one_order_for_the_whole_column(csv):
    days = pd.date_range("2024-01-01", periods=40)
    path = csv("date,v\n" + "".join(f"{day:%d/%m/%Y},{k}\n" for k, day in enumerate(days)))
    series = load_series(path)
    assert series.values[:, 0].tolist() == list(range(40))
    assert "day first in 'date'" in series.note


def test_a_series_is_ordered_by_day_and_time_of_day_together(csv):
    moments = pd.date_range("2024-03-01", periods=48, freq="h")
    rows = [f"{m:%Y-%m-%d},{m:%H:%M},{k}\n" for k, m in enumerate(moments)]
    series = load_series(csv("date,time,v\n" + "".join(np.random.default_rng(0).permutation(rows))))
    assert series.values[:, 0].tolist() == list(range(48))
    assert "ordered by 'date' and 'time'" in series.note


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date,v\n2024-01-01,1\n,2\n", "column 'date' has no time in row 2"),
        ("d,e,v\n2024-01-01,2024-01-02,1\n2024-01-02,2024-01-01,2\n", "'d' or 'e' may order the rows: say time=d or time=e"),
        ("time,v\n10:00,1\n09:00,2\n", "'time' is a time of day without a day"),
        ("time,variable,value\n1,a,1\n1,,2\n", "row 2 lacks its time or variable"),
    ],
)  # fmt: skip
def test_a_series_whose_order_is_not_known_is_refused(csv, text, said):
    with pytest.raises(ValueError, match=said):
        load_series(csv(text))


def test_the_column_of_time_can_be_named(csv):
    path = csv("d,e,v\n2024-01-01,2024-01-02,1\n2024-01-02,2024-01-01,2\n")
    assert load_series(f"{path}?time=e").values[:, 0].tolist() == [2, 1]
    with pytest.raises(ValueError, match="time must be one of d, e, v, got 'f'"):
        load_series(f"{path}?time=f")


@pytest.mark.parametrize("load", [load_graph, load_images, load_labelled])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_a_file_that_is_no_npz_is_refused_by_name(tmp_path, load, content):
    (tmp_path / "broken.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.npz"):
        load(str(tmp_path / "broken.npz"))


@pytest.fixture
def folder(tmp_path):
    """Return what saves pictures, two a class, into the folder of two classes."""
    image = pytest.importorskip("PIL.Image")

    def make(array, ending="png", **how):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            for k in range(2):
                image.fromarray(array).save(tmp_path / name / f"{k}.{ending}", **how)
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("dtype", "top"),
    [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1.0)],
    ids=["8 bits", "16 bits", "floats"],
)
def test_pixels_are_scaled_by_the_range_of_their_type(folder, tmp_path, dtype, top):
    ramp = np.linspace(0, top, 64).reshape(8, 8).astype(dtype)
    x = load_images(folder(ramp, ending="tif" if dtype == np.float32 else "png")).x
    np.testing.assert_allclose(x[0, 0], ramp / top, atol=1e-6)
    np.savez(tmp_path / "i.npz", x=np.stack([ramp] * 4), y=[0, 1, 0, 1])
    np.testing.assert_allclose(load_images(str(tmp_path / "i.npz")).x[0, 0], ramp / top, atol=1e-6)


def test_a_photograph_stands_upright_and_hidden_files_are_no_class(folder, tmp_path):
    from PIL import Image

    bright = np.zeros((8, 12, 3), np.uint8)
    bright[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    path = folder(bright, ending="jpg", exif=exif, quality=95)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / hidden).mkdir()
    (tmp_path / "cat" / "._0.jpg").write_bytes(b"no picture")
    (tmp_path / "loose.jpg").write_bytes(b"not in a class")
    images = load_images(path)
    assert images.x.shape == (4, 3, 12, 8)
    assert images.x[0, :, :, -2:].mean() > 0.9
    assert images.classes == ("cat", "dog")
    assert "1 images outside a class left out" in images.note


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((4, 3, 8, 3), np.uint8), "y": [0, 1, 0, 1]}, ""),
        ({"x": np.zeros((4, 3, 8, 1), np.uint8), "y": [0, 1, 0, 1]}, "may have its channels first or last"),
        ({"x": np.zeros((4, 5, 8, 7), np.uint8), "y": [0, 1, 0, 1]}, "must have 1, 3 or 4 channels"),
        ({"x": np.full((4, 8, 8), 300, np.int64), "y": [0, 1, 0, 1]}, "must be uint8, uint16 or floats"),
        ({"x": np.zeros((4, 8, 8)), "y": [0, 1, 0, np.nan]}, "y has NaN or infinity in row 3"),
        ({"x": np.zeros((0, 8, 8)), "y": []}, "x must be"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "i.npz", **arrays)
    if not said:
        assert load_images(str(tmp_path / "i.npz")).x.shape == (4, 3, 3, 8)
        return
    with pytest.raises(ValueError, match=said):
        load_images(str(tmp_path / "i.npz"))


@pytest.fixture
def graph(tmp_path):
    """Return what saves a graph of thirty nodes with some arrays changed."""
    rng = np.random.default_rng(0)
    arrays = {"node_features": rng.normal(size=(30, 5)).astype("f"), "node_labels": np.arange(30) % 3,
              "edges": rng.integers(0, 30, (80, 2))}  # fmt: skip

    def make(**changed):
        np.savez(tmp_path / "g.npz", **{**arrays, **changed})
        return str(tmp_path / "g.npz")

    return make


@pytest.mark.parametrize("mark", [-1, np.nan])
def test_a_node_without_a_label_is_no_class_and_in_no_split(graph, mark):
    labels = (np.arange(30) % 3).astype(float if mark != mark else int)
    labels[::5] = mark
    found = load_graph(graph(node_labels=labels))
    counted = (found.train | found.val | found.test).any(0)
    assert not counted[::5].any()
    assert counted.sum() == 24
    assert found.y[counted].unique().tolist() == [0, 1, 2]
    assert "6 nodes without a label" in found.note


HALF = np.arange(30) < 15


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"train_masks": np.stack([HALF, HALF]), "val_masks": ~HALF[None], "test_masks": ~HALF[None]}, "must all be"),
        ({"train_masks": HALF, "val_masks": HALF, "test_masks": ~HALF}, "masks overlap: node 0 is in two parts of split 0"),
        ({"train_masks": HALF & False, "val_masks": HALF, "test_masks": ~HALF}, "train_masks is empty in split 0"),
        ({"train_mask": HALF, "test_mask": ~HALF}, "val_masks is missing beside train_masks, test_masks"),
        ({"train_masks": np.arange(30), "val_masks": HALF, "test_masks": ~HALF}, "must hold true and false"),
        ({"node_labels": np.zeros(30, int)}, "must have two classes, has 1"),
        ({"node_labels": np.where(HALF, -1, np.arange(30) % 2), "train_masks": HALF, "val_masks": ~HALF & (np.arange(30) < 20),
          "test_masks": np.arange(30) >= 20}, "train_masks has nodes without a label"),
    ],
)  # fmt: skip
def test_splits_that_are_none_are_refused(graph, masks, said):
    with pytest.raises(ValueError, match=said):
        load_graph(graph(**masks))


def test_masks_of_one_split_and_the_direction_of_edges_are_kept(graph):
    order = np.arange(30)
    path = graph(train_mask=order < 10, val_mask=(order >= 10) & (order < 20), test_mask=order >= 20)
    found = load_graph(path)
    assert found.train.shape == (1, 30)
    assert found.train.sum() == 10
    assert load_graph(f"{path}?directed=yes").edge_index.shape[1] < found.edge_index.shape[1]


def test_functions_in_a_file_take_the_options_of_tables(csv):
    text = "function;x;y\n" + "".join(f"f{k};{i / 4};{i * k / 8}\n" for k in range(6) for i in range(5))
    assert load_functions(csv(text.replace(".", ","))).dim_y == 1
