"""Pictures: whole numbers of 8 bits, of any sizes, without labels: what a lossless codec takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_sample_image

from posterity._checks import needs
from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data._arrays import load_arrays
from posterity.lab.data.images import ENDINGS
from posterity.lab.data.needs import require_rows
from posterity.lab.data.photos import BUNDLED

__all__ = ["PictureData", "Pictures", "load_pictures"]

Pictures = Annotated[str, Kind("pictures", (".npz",), folder=True)]
TILE = 64


@dataclass(frozen=True)
class PictureData:
    """Pictures to store without loss.

    Attributes
    ----------
    pictures : list of ndarray of shape (channels, height, width), uint8
        All with 1 channel or all with 3; sizes may differ.
    note : str
        What was read.
    """

    pictures: list[ndarray]
    note: str = ""


def load_pictures(data: str) -> PictureData:
    """Return the pictures of a name, an ``.npz`` file or a folder.

    Parameters
    ----------
    data : str
        A registered name; an ``.npz`` with ``x`` or ``x_train``, (n, height, width[, channels]) of uint8; or a folder
        of image files, at any depth, of any sizes.

    Returns
    -------
    PictureData
    """
    return load(Pictures, data)


def read_pictures(source: Source) -> PictureData:
    """Return the pictures in an .npz file or anywhere in a folder."""
    source.option({})
    (path,) = source.paths
    return _folder(path) if path.is_dir() else _array(path.name, load_arrays(path))


def require_pictures(data: PictureData) -> None:
    """Refuse too few pictures to learn from and to test on."""
    require_rows(len(data.pictures), "pictures")


def _array(name: str, arrays: dict[str, ndarray]) -> PictureData:
    x = arrays.get("x_train", arrays.get("x"))
    if x is None:
        raise ValueError(f"{name} needs an array x of pictures, has {', '.join(sorted(arrays)) or 'none'}")
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: x must be uint8 of shape (n, height, width) or (n, height, width, 1 or 3), got {x.dtype} {x.shape}"
        )
    size = f"{x.shape[1]}x{x.shape[2]}"
    return PictureData(
        list(np.ascontiguousarray(np.moveaxis(x, 3, 1))), f"{name}: {len(x)} pictures of {size}"
    )


def _folder(path: Path) -> PictureData:
    pillow = needs("PIL.Image", "images")
    files = [
        file for file in sorted(path.rglob("*"))
        if file.suffix.lower() in ENDINGS
        and not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
    ]  # fmt: skip
    found = []
    for file in files:
        try:
            with pillow.open(file) as picture:
                if picture.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
                    raise ValueError(f"{file} must have 8 bits a channel, has the mode {picture.mode}")
                grey = picture.mode in ("1", "L", "LA")
                found.append(np.array(picture.convert("L" if grey else "RGB")))
        except (OSError, pillow.DecompressionBombError) as error:
            raise ValueError(f"{file} is not a readable image") from error
    if not found:
        raise ValueError(f"{path} holds no image")
    coloured = any(x.ndim == 3 for x in found)
    made = [np.moveaxis(x, 2, 0) if x.ndim == 3 else x[None] for x in found]
    made = [np.ascontiguousarray(np.broadcast_to(x, (3 if coloured else 1, *x.shape[1:]))) for x in made]
    return PictureData(made, f"{path.name}: {len(made)} pictures, {'in colour' if coloured else 'grey'}")


@dataset(Pictures, "photos")
def photos(seed: int) -> PictureData:
    """Return scikit-learn's two photographs, whole."""
    return PictureData([np.moveaxis(load_sample_image(name), 2, 0) for name in BUNDLED])


@dataset(Pictures, "photo-tiles")
def photo_tiles(seed: int) -> PictureData:
    """Return scikit-learn's two photographs in 120 tiles of 64x64."""
    tiles = []
    for photo in photos(seed).pictures:
        tiles += [
            np.ascontiguousarray(photo[:, top : top + TILE, left : left + TILE])
            for top in range(0, photo.shape[1] - TILE + 1, TILE)
            for left in range(0, photo.shape[2] - TILE + 1, TILE)
        ]
    return PictureData(tiles)
