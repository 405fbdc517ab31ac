"""Images: arrays (n, channels, height, width) in [0, 1] with class labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits

from posterity._checks import needs
from posterity.lab.data import Kind, dataset, fetch, resolve

__all__ = ["ImageData", "Images", "load_images"]

Images = Annotated[str, Kind("images", (".npz",), folder=True)]


@dataclass(frozen=True)
class ImageData:
    """Labelled images.

    Attributes
    ----------
    x : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    y : ndarray of shape (n,), int64
    classes : tuple of str
    note : str
        What was read.
    """

    x: ndarray
    y: ndarray
    classes: tuple[str, ...]
    note: str = ""


def load_images(data: str) -> ImageData:
    """Return images of a name, an ``.npz`` file or a folder with a subfolder a class.

    Parameters
    ----------
    data : str
        A registered name; an ``.npz`` with ``x_train`` or ``x``, (n, h, w[, c]), and
        ``y_train`` or ``y``; or a folder of images by class, all of one size.

    Returns
    -------
    ImageData
    """
    found = resolve(Images, data)
    if isinstance(found, Path):
        return _folder(found) if found.is_dir() else _arrays(found)
    if isinstance(found, str):
        return _arrays(fetch(found)[0])
    return found(0)


def _arrays(path: Path) -> ImageData:
    with np.load(path, allow_pickle=False) as file:
        parts = [(f"x{end}", f"y{end}") for end in ("", "_train", "_test") if f"x{end}" in file]
        if not parts or any(y not in file for _, y in parts):
            raise ValueError(f"{path.name}: needs arrays x and y (or x_train, y_train), has {file.files}")
        x = np.concatenate([file[x] for x, _ in parts])
        y = np.concatenate([file[y].ravel() for _, y in parts])
        classes = file["classes"] if "classes" in file else np.unique(y)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or len(x) != len(y):
        raise ValueError(f"{path.name}: x must be (n, h, w[, c]) with n labels, got {x.shape} and {y.shape}")
    if x.shape[-1] in (1, 3, 4):
        x = np.moveaxis(x, -1, 1)
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    x = x.astype(np.float32) / scale
    if not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
        raise ValueError(f"{path.name}: images must be uint8 or floats in [0, 1]")
    labels, codes = np.unique(y, return_inverse=True)
    kept = tuple(str(c) for c in (classes if len(classes) == len(labels) else labels))
    return ImageData(x, codes.astype(np.int64), kept, f"{path.name}: {len(x)} images, {len(labels)} classes")


def _folder(path: Path) -> ImageData:
    image = needs("PIL.Image", "images")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir())
    if len(classes) < 2:
        raise ValueError(f"{path}: needs a subfolder a class, at least two, got {classes}")
    endings = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
    arrays, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted(p for p in (path / name).rglob("*") if p.suffix.lower() in endings):
            try:
                with image.open(file) as picture:
                    mode = "L" if picture.mode in ("1", "L", "I;16", "I") else "RGB"
                    array = np.asarray(picture.convert(mode), dtype=np.float32) / 255
            except OSError as error:
                raise ValueError(f"{file} is not a readable image") from error
            array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
            if arrays and array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"{file} is {array.shape[1:]}, others are {arrays[0].shape[1:]}: one size, please"
                )
            arrays.append(array)
            labels.append(label)
    if len(set(labels)) < len(classes):
        empty = classes[next(k for k in range(len(classes)) if k not in labels)]
        raise ValueError(f"{path / empty} holds no image")
    channels = max(a.shape[0] for a in arrays)
    x = np.stack([np.broadcast_to(a, (channels, *a.shape[1:])) for a in arrays])
    note = f"{path.name}: {len(x)} images of {x.shape[2]}x{x.shape[3]}, {len(classes)} classes"
    return ImageData(x, np.asarray(labels, dtype=np.int64), tuple(classes), note)


@dataset(Images, "digits")
def digits(seed: int) -> ImageData:
    """Return scikit-learn's 1,797 digits of 8x8 pixels."""
    bunch = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    return ImageData(x, bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)))
