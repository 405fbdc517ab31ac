"""Images: arrays (n, channels, height, width) in [0, 1] with class labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits

from posterity._checks import needs
from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data._arrays import load_arrays
from posterity.lab.data.needs import require_classes, require_rows

__all__ = ["ImageData", "Images", "load_images"]

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
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
    ids : tuple of str
        Where each comes from: its path in a folder, its row in a table, from 1. Empty where it
        is its place in an array.
    """

    x: ndarray
    y: ndarray
    classes: tuple[str, ...]
    note: str = ""
    ids: tuple[str, ...] = ()


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
    return load(Images, data)


def read_images(source: Source) -> ImageData:
    """Return the images in an .npz file or in a folder with a subfolder a class."""
    source.option({})
    (path,) = source.paths
    return _folder(path) if path.is_dir() else image_arrays(path.name, load_arrays(path))


def require_images(images: ImageData) -> None:
    """Refuse images from which nothing can be learned."""
    require_rows(len(images.y), "images")
    require_classes(images.y, images.classes, "images")
    if (images.x == images.x[0]).all():
        raise ValueError("all images are the same")


def image_arrays(name: str, arrays: dict[str, ndarray]) -> ImageData:
    """Return images of arrays ``x`` and ``y``, or of a training and a test part."""
    parts = [(f"x{end}", f"y{end}") for end in ("", "_train", "_test") if f"x{end}" in arrays]
    if not parts or any(y not in arrays for _, y in parts):
        raise ValueError(f"{name}: needs arrays x and y (or x_train, y_train), has {sorted(arrays)}")
    x = np.concatenate([arrays[x] for x, _ in parts])
    y = np.concatenate([arrays[y].ravel() for _, y in parts])
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or len(x) != len(y) or not x.size:
        raise ValueError(f"{name}: x must be (n, h, w[, c]) with n labels, got {x.shape} and {y.shape}")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError(f"{name}: y has NaN or infinity in row {int(np.flatnonzero(~np.isfinite(y))[0])}")
    last, first = (x.shape[axis] in (1, 3, 4) for axis in (-1, 1))
    if last and first and x.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: x {x.shape} may have its channels first or last: give (n, h, w, c) above 4 pixels"
        )
    if last:
        x = np.moveaxis(x, -1, 1)
    elif not first:
        raise ValueError(f"{name}: x must have 1, 3 or 4 channels, got {x.shape}")
    labels, codes = np.unique(y, return_inverse=True)
    classes = arrays.get("classes", labels)
    kept = tuple(str(c) for c in (classes if len(classes) == len(labels) else labels))
    scaled, depth = _scaled(name, x)
    note = f"{name}: {len(x)} images of {x.shape[2]}x{x.shape[3]}, {depth}, {len(labels)} classes"
    return ImageData(scaled, codes.astype(np.int64), kept, note)


def _scaled(name: str, x: ndarray) -> tuple[ndarray, str]:
    """Return pixels in [0, 1], by the range of their type, and what that is."""
    if x.dtype in (np.uint8, np.uint16):
        top = np.iinfo(x.dtype).max
        return x.astype(np.float32) / np.float32(top), f"{x.dtype.itemsize * 8} bits"
    if x.dtype.kind == "b":
        return x.astype(np.float32), "black and white"
    if x.dtype.kind != "f" or not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
        raise ValueError(f"{name}: images must be uint8, uint16 or floats in [0, 1], got {x.dtype}")
    return x.astype(np.float32), "floats in [0, 1]"


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "__"))


def _folder(path: Path) -> ImageData:
    needs("PIL.Image", "images")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not _hidden(p))
    if len(classes) < 2:
        raise ValueError(f"{path}: needs a subfolder a class, at least two, got {classes}")
    arrays, labels, ids = [], [], []
    for label, name in enumerate(classes):
        inside = (p for p in sorted((path / name).rglob("*")) if p.suffix.lower() in ENDINGS)
        for file in inside:
            if any(_hidden(part) for part in (file, *file.relative_to(path).parents) if part.name):
                continue
            array = _picture(file)
            if arrays and array.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"{file} is {array.shape[1:]}, others are {arrays[0].shape[1:]}: one size, please"
                )
            arrays.append(array)
            labels.append(label)
            ids.append(file.relative_to(path).as_posix())
    if len(set(labels)) < len(classes):
        empty = classes[next(k for k in range(len(classes)) if k not in labels)]
        raise ValueError(f"{path / empty} holds no image")
    channels = max(a.shape[0] for a in arrays)
    x = np.stack([np.broadcast_to(a, (channels, *a.shape[1:])) for a in arrays])
    note = f"{path.name}: {len(x)} images of {x.shape[2]}x{x.shape[3]}, {len(classes)} classes: {', '.join(classes[:5])}"
    note += ", …" if len(classes) > 5 else ""
    if loose := sum(p.suffix.lower() in ENDINGS and not _hidden(p) for p in path.iterdir()):
        note += f"; {loose} images outside a class left out"
    return ImageData(x, np.asarray(labels, dtype=np.int64), tuple(classes), note, tuple(ids))


def _picture(file: Path) -> ndarray:
    """Return a picture (channels, height, width) in [0, 1], upright, by its own bit depth."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                array = np.asarray(picture).astype(np.int64)
                if array.min() < 0 or array.max() > 65535:
                    raise ValueError(f"{file} has values beyond 16 bits")
                array = array.astype(np.uint16)
            elif picture.mode == "F":
                array = np.asarray(picture)
            else:
                grey = picture.mode in ("1", "L", "LA")
                array = np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image") from error
    scaled, _ = _scaled(str(file), array)
    return scaled[None] if scaled.ndim == 2 else np.moveaxis(scaled, -1, 0)


@dataset(Images, "digits")
def digits(seed: int) -> ImageData:
    """Return scikit-learn's 1,797 digits of 8x8 pixels."""
    bunch = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    return ImageData(x, bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)))
