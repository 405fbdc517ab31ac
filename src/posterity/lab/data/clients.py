"""Clients: inputs with classes, each row held by one of several clients.

Who holds a row is a column of a user's table, a folder above the folders of classes (a domain:
a scanner, a camera), or an array; where nothing says it, rows are dealt out at random, by
Dirichlet shares of the classes, or by few classes a client.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from numpy import ndarray

from posterity.lab.data import Kind, Source, dataset, kind_of, load, names
from posterity.lab.data._arrays import load_arrays
from posterity.lab.data.frames import READING
from posterity.lab.data.images import ImageData, read_images
from posterity.lab.data.labelled import Labelled, load_labelled, read_labelled
from posterity.lab.data.partitions import class_partition, dirichlet_partition, even_partition
from posterity.lab.data.table import Table, TableData, as_task, read_table, table_encoder

__all__ = ["ClientData", "Clients", "load_clients"]

Clients = Annotated[str, Kind("clients", (".npz", ".json", *kind_of(Table).suffixes), folder=True)]
DEALING = {"clients": None, "by": ("even", "dirichlet", "class"), "alpha": None, "classes": None}
TWO, OF_A_CLIENT = 2, 4  # clients, and rows of each: half to learn from, and two classes


@dataclass(frozen=True)
class ClientData:
    """Labelled inputs of several clients.

    Attributes
    ----------
    x : ndarray of shape (n, channels, height, width), float32
        Images in [0, 1]; features of tables are channels of a single pixel.
    y : ndarray of shape (n,), int64
    client : ndarray of shape (n,), int64
        Who holds the row: codes from 0, of which none is empty.
    classes, names : tuple of str
        Of the codes of ``y`` and of ``client``.
    note : str
        What was read and what was done to it.
    """

    x: ndarray
    y: ndarray
    client: ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...]
    note: str = ""


def load_clients(data: str, *, target: str | None = None, seed: int = 0) -> ClientData:
    """Return the rows of a name or file, and who holds each.

    Parameters
    ----------
    data : str
        A registered name; a folder of domains, each with a folder a class
        (``cameras/amazon/mug/1.png``); an ``.npz`` with ``x``, ``y`` and ``client``; a LEAF
        ``.json`` with ``users`` and ``user_data``; or a table with the column that names the
        client, ``wards.csv?client=hospital``. What `load_labelled` takes, without clients of its
        own, is dealt out: ``data.npz?clients=10`` evenly, with ``&by=dirichlet&alpha=0.5`` or
        ``&by=class&classes=2``.
    target : str, optional
        Of a table: the column that holds the classes.
    seed : int, default=0
        For what is made or dealt out.

    Returns
    -------
    ClientData

    Raises
    ------
    ValueError
        If file, column or row is not what it must be; the message names it.
    """
    return load(Clients, data, seed=seed, target=target, dealt_by=seed)


def read_clients(source: Source, *, target: str | None = None, dealt_by: int = 0) -> ClientData:
    """Return the clients of a file or folder, or its rows dealt out."""
    (path,) = source.paths
    dealing = {name: value for name, value in source.options.items() if name in DEALING}
    source.option({**READING, "client": None, **DEALING})
    rest = replace(source, options={k: v for k, v in source.options.items() if k in READING})
    if "client" in source.options and not path.name.lower().endswith(kind_of(Table).suffixes):
        raise ValueError(f"{source.name}: client= names a column of a table, and this is none")
    if dealing:
        if "client" in source.options:
            raise ValueError(f"{source.name}: say client= or clients=, not both")
        return _dealt(read_labelled(rest, target=target), dealing, dealt_by, source.name)
    if path.name.lower().endswith(kind_of(Table).suffixes):
        return _of_table(rest, target, source.options.get("client"))
    if target is not None:
        raise ValueError(f"{source.name} has its own classes, target is for a table; got {target!r}")
    if path.is_dir():
        return _domains(path)
    if path.suffix.lower() == ".json":
        return _leaf(path)
    arrays = load_arrays(path)
    if "client" not in arrays:
        raise ValueError(f"{source.name}: needs an array client of who holds each row, or ?clients=NUMBER")
    client = arrays["client"].ravel()
    data = read_labelled(rest)
    if len(client) != len(data.y):
        raise ValueError(f"{source.name}: client has {len(client)} values for {len(data.y)} rows")
    return _held(data, client, data.note)


def require_clients(data: ClientData) -> None:
    """Refuse clients from which nothing can be learned together."""
    counts = np.bincount(data.client)
    if len(counts) < TWO:
        raise ValueError(f"at least {TWO} clients are needed, has {len(counts)}")
    if counts.min() < OF_A_CLIENT:
        raise ValueError(
            f"at least {OF_A_CLIENT} rows of each client are needed, {data.names[counts.argmin()]} has {counts.min()}"
        )
    if len(np.unique(data.y)) < 2:
        raise ValueError("at least 2 classes are needed, has 1")
    if (data.x == data.x[0]).all():
        raise ValueError("all inputs are the same")


def _held(data: ImageData, holders: ndarray, note: str) -> ClientData:
    """Return rows with the clients that hold them, in the order of their names."""
    labels, client = np.unique(holders, return_inverse=True)
    note = f"{note}; {len(labels)} clients of {np.bincount(client).min()} to {np.bincount(client).max()} rows"
    labels = tuple(f"{each:g}" if labels.dtype.kind == "f" else str(each) for each in labels)
    return ClientData(data.x, data.y, client.astype(np.int64), data.classes, labels, note)


def _dealt(data: ImageData, options: dict[str, str], seed: int, name: str) -> ClientData:
    """Return rows dealt out as options say."""
    by = options.get("by", "even")
    for option, of in (("alpha", "dirichlet"), ("classes", "class")):
        if option in options and by != of:
            raise ValueError(f"{name}: {option}= goes with by={of}, got by={by}")
    try:
        n = int(options.get("clients", "20"))
        alpha, classes = float(options.get("alpha", "0.5")), int(options.get("classes", "2"))
    except ValueError as error:
        raise ValueError(f"{name}: clients, alpha and classes are numbers: {error}") from error
    try:
        if by == "dirichlet":
            client = dirichlet_partition(data.y, n, seed, alpha=alpha)
        elif by == "class":
            client = class_partition(data.y, n, seed, classes_per_client=classes)
        else:
            client = even_partition(len(data.y), n, seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return _held(data, client, f"{data.note}; dealt out, {by}")


def _of_table(source: Source, target: str | None, column: str | None) -> ClientData:
    """Return the rows of a table that name their client; a row without one is refused."""
    table = read_table(source, target=target)
    columns = list(table.X.columns)
    if column not in columns:
        said = f"no column {column!r} beside the target" if column else "who holds a row is not said"
        raise ValueError(
            f"{source.name}: {said}; say data.client= and one of {', '.join(columns)}, or data.clients=NUMBER"
        )
    holders = pd.Series(table.X[column])
    if len(lost := np.flatnonzero(holders.isna())):
        raise ValueError(f"{source.name}: {column!r} is missing in row {holders.index[lost[0]] + 1}")
    table = as_task(replace(table, X=table.X.drop(columns=column)), "classification")
    return _held(_features(table), holders.to_numpy(), f"{table.note}; clients by {column!r}")


def _features(table: TableData) -> ImageData:
    if table.X.shape[1] == 0:
        raise ValueError(f"{table.note}: no column beside target and client")
    x = np.asarray(table_encoder().fit_transform(table.X), dtype=np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{table.note}: a column has values beyond float32")
    return ImageData(x[:, :, None, None], table.y, table.classes)


def _domains(path: Path) -> ClientData:
    """Return the images of a folder of domains, each a folder of classes."""
    domains = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    nested = [p for p in domains if any(q.is_dir() for q in p.iterdir())]
    if not nested or nested != domains:
        flat = next((p.name for p in domains if p not in nested), "nothing")
        raise ValueError(
            f"{path}: needs a folder a client with a folder a class in each, {flat} is none; "
            "or data.clients=NUMBER to deal images by class out"
        )
    parts = [read_images(Source(f"{path.name}/{domain.name}", (domain,))) for domain in domains]
    sizes = {domain.name: part.x.shape[1:] for domain, part in zip(domains, parts, strict=True)}
    if len({size[1:] for size in sizes.values()}) > 1:
        raise ValueError(f"{path}: images of all clients must have one size, got {sizes}")
    channels = max(size[0] for size in sizes.values())
    x = np.concatenate([np.broadcast_to(p.x, (len(p.x), channels, *p.x.shape[2:])) for p in parts])
    labels = [np.asarray(part.classes)[part.y] for part in parts]
    classes, y = np.unique(np.concatenate(labels), return_inverse=True)
    holders = np.concatenate(
        [np.full(len(part.y), domain.name) for domain, part in zip(domains, parts, strict=True)]
    )
    data = ImageData(np.ascontiguousarray(x), y.astype(np.int64), tuple(map(str, classes)))
    return _held(data, holders, f"{path.name}: {len(y)} images, {len(classes)} classes")


def _leaf(path: Path) -> ClientData:
    """Return the users of a LEAF file, whose rows are lists of numbers; squares are images."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        users = [str(user) for user in content["users"]]
        rows = [np.asarray(content["user_data"][user]["x"], dtype=np.float32) for user in users]
        labels = [np.asarray(content["user_data"][user]["y"]).ravel() for user in users]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.name} is not LEAF: users, and x (rows of numbers) and y of each in user_data ({error!r})"
        ) from error
    if not users:
        raise ValueError(f"{path.name}: has no users")
    for user, x, y in zip(users, rows, labels, strict=True):
        if x.ndim != 2 or x.shape[1] != rows[0].shape[-1] or len(x) != len(y) or not x.size:
            raise ValueError(f"{path.name}: user {user} must have rows of one length with a label each")
        if not np.isfinite(x).all():
            raise ValueError(f"{path.name}: user {user} has NaN or infinity")
    x, d = np.concatenate(rows), rows[0].shape[1]
    side = round(d**0.5)
    square = side > 1 and side * side == d and x.min() >= 0 and x.max() <= 1
    classes, y = np.unique(np.concatenate(labels), return_inverse=True)
    data = ImageData(
        x.reshape(len(x), *((1, side, side) if square else (d, 1, 1))),
        y.astype(np.int64),
        tuple(map(str, classes)),
    )
    what = f"images of {side}x{side}" if square else f"rows of {d} features"
    holders = np.repeat(users, [len(part) for part in rows])
    return _held(data, holders, f"{path.name}: {len(x)} {what}, {len(classes)} classes")


for _name in names(kind_of(Labelled)):
    dataset(Clients, _name)(
        lambda seed, name=_name: _dealt(load_labelled(name), {"by": "dirichlet"}, seed, name)
    )
