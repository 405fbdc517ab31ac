"""Clients: partitions deal every row out once, and files say who holds a row, or are refused by name."""

import json

import numpy as np
import pandas as pd
import pytest

from posterity.lab.data import (
    Clients,
    check,
    class_partition,
    dirichlet_partition,
    even_partition,
    load_clients,
)

Y = np.repeat(np.arange(10), 60)
PARTITIONS = {
    "even": lambda n, seed: even_partition(600, n, seed),
    "dirichlet": lambda n, seed: dirichlet_partition(Y, n, seed, alpha=0.1),
    "class": lambda n, seed: class_partition(Y, n, seed),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("n", [5, 12, 100])
def test_every_client_has_rows_and_a_seed_is_a_partition(name, n):
    client = PARTITIONS[name](n, 3)
    assert client.shape == (600,) and client.dtype == np.int64
    assert sorted(np.unique(client)) == list(range(n))
    assert (client == PARTITIONS[name](n, 3)).all()
    assert (client != PARTITIONS[name](n, 4)).any()


def test_an_even_partition_has_equal_parts():
    assert set(np.bincount(even_partition(601, 20, 0))) == {30, 31}


@pytest.mark.parametrize("per_client", [1, 2, 3, 10])
def test_clients_hold_as_many_classes_as_were_asked_and_classes_have_equally_many_clients(per_client):
    client = class_partition(Y, 20, 0, classes_per_client=per_client)
    held = np.array([[((client == k) & (label == Y)).any() for label in range(10)] for k in range(20)])
    assert (held.sum(1) == per_client).all()
    assert (held.sum(0) == 2 * per_client).all()


def test_shares_of_a_class_follow_a_dirichlet_law():
    """Its share of one of n clients has mean 1/n and variance (n - 1) / (n^2 (n alpha + 1))."""
    y, n, alpha = np.zeros(4000, int), 4, 0.7
    shares = np.array(
        [np.bincount(dirichlet_partition(y, n, s, alpha=alpha), minlength=n) / 4000 for s in range(800)]
    )
    assert shares.mean(0) == pytest.approx(np.full(n, 1 / n), abs=0.03)
    assert shares.var(0) == pytest.approx(np.full(n, (n - 1) / (n**2 * (n * alpha + 1))), rel=0.15)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6])
def test_extreme_shares_still_deal_every_row_out(alpha):
    client = dirichlet_partition(Y, 10, 0, alpha=alpha)
    assert np.bincount(client, minlength=10).min() >= 1
    if alpha > 1:
        assert np.ptp(np.bincount(client)) <= 10


@pytest.mark.parametrize(
    ("deal", "said"),
    [
        (lambda: even_partition(3, 4, 0), "n_clients must be in .1, 3. for 3 rows, got 4"),
        (lambda: even_partition(3, 0, 0), "n_clients"),
        (lambda: dirichlet_partition(Y, 5, 0, alpha=0.0), "alpha must be greater than 0"),
        (lambda: dirichlet_partition(Y, 5, 0, alpha=float("nan")), "alpha"),
        (lambda: class_partition(Y, 5, 0, classes_per_client=11), "classes_per_client must be in .1, 10."),
        (lambda: class_partition(Y, 4, 0, classes_per_client=2), "n_clients must be at least 5 for 2 of 10"),
    ],
)
def test_partitions_that_cannot_be_are_refused(as_a_user, deal, said):
    with pytest.raises(ValueError, match=said):
        deal()


def wards(n=60, **columns):
    rng = np.random.default_rng(0)
    whole = {
        "age": rng.integers(20, 60, n),
        "town": rng.choice(list("uvw"), n),
        "ill": rng.choice(["no", "yes"], n),
    }
    return pd.DataFrame({**whole, "ward": np.arange(n) % 3, **columns})


def test_a_column_says_who_holds_a_row_and_is_no_feature(tmp_path):
    frame, path = wards(), tmp_path / "wards.csv"
    frame.to_csv(path, index=False)
    data = load_clients(f"{path}?client=ward", target="ill")
    assert data.names == ("0", "1", "2")
    assert (data.client == frame["ward"]).all()
    assert data.x.shape == (60, 1 + 3, 1, 1)  # age, and the three towns
    assert "3 clients of 20 to 20 rows" in data.note
    named = wards(ward=np.array(["north", "east", "south"])[np.arange(60) % 3])
    named.to_csv(path, index=False)
    assert load_clients(f"{path}?client=ward", target="ill").names == ("east", "north", "south")


@pytest.mark.parametrize(
    ("frame", "query", "said"),
    [
        (wards(), "", "who holds a row is not said; say data.client= and one of age, town, ward"),
        (wards(), "?client=clinic", "no column 'clinic'"),
        (wards(), "?client=ill", "no column 'ill' beside the target"),
        (wards(ward=[np.nan, *range(59)]), "?client=ward", "'ward' is missing in row 1"),
        (wards(), "?client=ward&clients=3", "not both"),
        (wards(), "?clients=3&by=town", "by must be one of even, dirichlet, class"),
        (wards(), "?clients=3&alpha=2", "alpha= goes with by=dirichlet"),
        (wards(), "?clients=many", "are numbers"),
        (wards(), "?clients=61", "n_clients must be in"),
        (wards(ward=np.arange(60)), "?client=ward", "at least 4 rows of each client"),
        (wards(ward=1), "?client=ward", "at least 2 clients"),
    ],
)
def test_a_table_of_which_the_clients_are_not_known_is_refused_by_name(tmp_path, frame, query, said):
    path = tmp_path / "wards.csv"
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"wards.csv.*{said}"):
        check(Clients, f"{path}{query}", target="ill")


def test_rows_without_clients_are_dealt_out(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(600, 4)), y=Y)
    data = load_clients(f"{path}?clients=20&by=class&classes=3", seed=1)
    assert (data.client == class_partition(Y, 20, 1, classes_per_client=3)).all()
    assert len(load_clients("digits").names) == 20
    with pytest.raises(ValueError, match=r"needs an array client.*or \?clients=NUMBER"):
        load_clients(str(path))
    np.savez(path, x=np.zeros((600, 4)), y=Y, client=np.arange(600) % 7)
    assert np.bincount(load_clients(str(path)).client).tolist() == np.bincount(np.arange(600) % 7).tolist()
    np.savez(path, x=np.zeros((600, 4)), y=Y, client=np.arange(599))
    with pytest.raises(ValueError, match="client has 599 values for 600 rows"):
        load_clients(str(path))


def test_a_folder_of_domains_is_a_client_each(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for domain, classes in {"amazon": "ab", "webcam": "ab"}.items():
        for label in classes:
            (tmp_path / domain / label).mkdir(parents=True)
            for k in range(3):
                pixels = np.full((8, 8), 20 * k, np.uint8)
                Image.fromarray(pixels).save(tmp_path / domain / label / f"{k}.png")
    data = load_clients(str(tmp_path))
    assert data.names == ("amazon", "webcam") and data.classes == ("a", "b")
    assert np.bincount(data.client).tolist() == [6, 6]
    assert data.x.shape == (12, 1, 8, 8)
    with pytest.raises(ValueError, match="needs a folder a client with a folder a class in each"):
        load_clients(str(tmp_path / "amazon"))
    dealt = load_clients(f"{tmp_path / 'amazon'}?clients=2")
    assert np.bincount(dealt.client).tolist() == [3, 3]


def test_a_leaf_file_has_its_users(tmp_path):
    path, rng = tmp_path / "femnist.json", np.random.default_rng(0)
    users = {
        f"f{k}": {"x": rng.random((4 + k, 16)).tolist(), "y": rng.integers(0, 2, 4 + k).tolist()}
        for k in range(3)
    }
    path.write_text(json.dumps({"users": list(users), "num_samples": [4, 5, 6], "user_data": users}))
    data = load_clients(str(path))
    assert data.names == ("f0", "f1", "f2") and np.bincount(data.client).tolist() == [4, 5, 6]
    assert data.x.shape == (15, 1, 4, 4)
    assert data.x[4].ravel() == pytest.approx(users["f1"]["x"][0])
    path.write_text(json.dumps({"users": ["a"], "user_data": {"a": {"x": ["words"], "y": [1]}}}))
    with pytest.raises(ValueError, match=r"femnist.json is not LEAF"):
        load_clients(str(path))
