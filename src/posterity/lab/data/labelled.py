"""Inputs with classes: images, rows of a table, or features as a network of yours makes them."""

from typing import Annotated

import numpy as np
from numpy import ndarray

from posterity.lab.data import Kind, Source, dataset, kind_of, load, names, resolve
from posterity.lab.data._arrays import load_arrays
from posterity.lab.data.images import ImageData, Images, image_arrays, load_images, read_images
from posterity.lab.data.needs import require_classes, require_rows
from posterity.lab.data.table import Table, TableData, as_task, load_table, read_table, table_encoder

__all__ = ["Labelled", "load_labelled"]

Labelled = Annotated[str, Kind("labelled", (".npz", *kind_of(Table).suffixes), folder=True)]


def load_labelled(data: str, *, target: str | None = None) -> ImageData:
    """Return images of a name or file, or features as images of a single pixel.

    Parameters
    ----------
    data : str
        What `posterity.lab.data.images.load_images` takes; an ``.npz`` with ``x`` of shape
        (n, d), features of any value, and ``y``; or what `posterity.lab.data.table.load_table`
        takes, whose columns `table_encoder` makes numbers.
    target : str, optional
        Of a table's file: the column that holds the classes.

    Returns
    -------
    ImageData
        Features are channels: ``x`` of shape (n, d, 1, 1).
    """
    if target is not None and callable(resolve(Labelled, data)):
        raise ValueError(f"{data} has its own classes, target is for a file; got {target!r}")
    return load(Labelled, data, target=target)


def read_labelled(source: Source, *, target: str | None = None) -> ImageData:
    """Return rows of a table or of features of an .npz file as images of a single pixel, or images."""
    (path,) = source.paths
    if path.name.lower().endswith(kind_of(Table).suffixes):
        return _encoded(as_task(read_table(source, target=target), "classification"))
    if target is not None:
        raise ValueError(f"{source.name} has its own classes, target is for a table; got {target!r}")
    if path.is_dir():
        return read_images(source)
    source.option({})
    arrays = load_arrays(path)
    if "x" in arrays and "y" in arrays and arrays["x"].ndim == 2:
        return _features(path.name, arrays["x"], arrays["y"].ravel())
    return image_arrays(path.name, arrays)


def require_labelled(data: ImageData) -> None:
    """Refuse inputs from which nothing can be learned."""
    require_rows(len(data.y), "inputs")
    require_classes(data.y, data.classes, "inputs")
    if (data.x == data.x[0]).all():
        raise ValueError("all inputs are the same")


def _features(name: str, x: ndarray, y: ndarray) -> ImageData:
    if len(x) != len(y):
        raise ValueError(f"{name}: x must have a label a row, got {len(x)} rows and {len(y)} labels")
    if not x.size:
        raise ValueError(f"{name}: x holds nothing, it is {x.shape}")
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite, and refused
        x = x.astype(np.float32) if x.dtype.kind == "f" else x
    for label, each in (("x", x), ("y", y)):
        if (each.dtype.kind in "fc" and not np.isfinite(each).all()) or (
            label == "x" and each.dtype.kind not in "iuf"
        ):
            raise ValueError(
                f"{name}: {label} must be finite numbers, got {each.dtype} or NaN or infinity in it"
            )
    labels, codes = np.unique(y, return_inverse=True)
    note = f"{name}: {len(x)} rows of {x.shape[1]} features, {len(labels)} classes"
    classes = tuple(map(str, labels))
    return ImageData(x.astype(np.float32)[:, :, None, None], codes.astype(np.int64), classes, note)


def _encoded(table: TableData) -> ImageData:
    """Return the rows of a table as features, its columns prepared as numbers."""
    x = np.asarray(table_encoder().fit_transform(table.X), dtype=np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{table.note}: a column has values beyond float32")
    ids = tuple(str(row + 1) for row in table.X.index)
    return ImageData(x[:, :, None, None], table.y, table.classes, f"{table.note}; {x.shape[1]} features", ids)


for _name in names(kind_of(Table)):
    dataset(Labelled, _name)(
        lambda seed, name=_name: _encoded(load_table(name, task="classification", seed=seed))
    )
for _name in names(kind_of(Images)):
    dataset(Labelled, _name)(lambda seed, name=_name: load_images(name))
