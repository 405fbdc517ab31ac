"""Inputs with classes: images, or rows of features as a network of yours makes them."""

from pathlib import Path
from typing import Annotated

import numpy as np

from posterity.lab.data import Kind, dataset, kind_of, names, resolve
from posterity.lab.data.images import ImageData, Images, load_images

__all__ = ["Labelled", "load_labelled"]

Labelled = Annotated[str, Kind("labelled", (".npz",), folder=True)]


def load_labelled(data: str, *, min_classes: int = 2) -> ImageData:
    """Return images of a name or file, or features as images of a single pixel.

    Parameters
    ----------
    data : str
        What `posterity.lab.data.images.load_images` takes; or an ``.npz`` with ``x`` of shape
        (n, d), features of any value, and ``y``.
    min_classes : int, default=2
        Fewer are refused.

    Returns
    -------
    ImageData
        Features are channels: ``x`` of shape (n, d, 1, 1).
    """
    loaded = _load(data)
    if len(loaded.classes) < min_classes:
        raise ValueError(f"{data}: {min_classes} classes are needed here, has {len(loaded.classes)}")
    return loaded


def _load(data: str) -> ImageData:
    found = resolve(Labelled, data)
    if not isinstance(found, Path):
        return found(0)  # type: ignore[operator]
    if found.is_file():
        with np.load(found, allow_pickle=False) as file:
            if "x" in file and "y" in file and file["x"].ndim == 2:
                return _features(found.name, file["x"], file["y"].ravel())
    return load_images(data)


def _features(name: str, x: np.ndarray, y: np.ndarray) -> ImageData:
    if len(x) != len(y):
        raise ValueError(f"{name}: x must have a label a row, got {len(x)} rows and {len(y)} labels")
    if x.dtype.kind not in "iuf" or not np.isfinite(x).all():
        raise ValueError(f"{name}: x must be finite numbers, got {x.dtype} or NaN or infinity in it")
    labels, codes = np.unique(y, return_inverse=True)
    note = f"{name}: {len(x)} rows of {x.shape[1]} features, {len(labels)} classes"
    classes = tuple(map(str, labels))
    return ImageData(x.astype(np.float32)[:, :, None, None], codes.astype(np.int64), classes, note)


for _name in names(kind_of(Images)):
    dataset(Labelled, _name)(lambda seed, name=_name: load_images(name))
