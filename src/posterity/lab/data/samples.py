"""Samples: what a generative model is to make more of: images of one size, or points."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits

from posterity.lab.data import Kind, Source, dataset, kind_of, load
from posterity.lab.data.images import load_images
from posterity.lab.data.needs import require_rows
from posterity.lab.data.pictures import read_pictures
from posterity.lab.data.points import Points, load_points, read_points

__all__ = ["SampleData", "Samples", "load_samples"]

Samples = Annotated[str, Kind("samples", (".npz", *kind_of(Points).suffixes), folder=True)]


@dataclass(frozen=True)
class SampleData:
    """Samples of one shape.

    Attributes
    ----------
    x : ndarray of shape (n, channels, height, width) or (n, d), float32
        Images in [-1, 1]; points, each coordinate with mean 0 and deviation 1 where it varies.
    note : str
        What was read.
    """

    x: ndarray
    note: str = ""


def load_samples(data: str, *, seed: int = 0) -> SampleData:
    """Return the samples of a name, a file or a folder.

    Parameters
    ----------
    data : str
        A registered name; an ``.npz`` of images or a folder of them, at any depth, all of one size; or points as a
        CSV or Parquet file of numbers, or a ``.npy`` array.
    seed : int, default=0
        Of sets that are generated.

    Returns
    -------
    SampleData
    """
    return load(Samples, data, seed=seed)


def read_samples(source: Source) -> SampleData:
    """Return the images of an .npz file or a folder, or the points of a table."""
    (path,) = source.paths
    if not path.is_dir() and path.suffix.lower() != ".npz":
        x = _standard(read_points(source))
        return SampleData(x, f"{path.name}: {len(x)} points of {x.shape[1]} coordinates")
    found = read_pictures(source)
    if len(sizes := {picture.shape for picture in found.pictures}) > 1:
        some = " and ".join(f"{h}x{w}" for _, h, w in sorted(sizes)[:2])
        raise ValueError(f"{path.name}: images must be of one size, got {some}")
    return SampleData(np.stack(found.pictures).astype(np.float32) / 127.5 - 1, found.note)


def require_samples(data: SampleData) -> None:
    """Refuse samples from which no law can be learned."""
    require_rows(len(data.x), "samples")
    if (data.x == data.x[0]).all():
        raise ValueError("all samples are the same")


def _standard(x: ndarray) -> ndarray:
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1)


@dataset(Samples, "digits")
def digits(seed: int) -> SampleData:
    """Return scikit-learn's 1,797 digits of 8x8 pixels."""
    return SampleData(load_digits(return_X_y=True)[0].reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1)


@dataset(Samples, "two-moons")
def two_moons(seed: int) -> SampleData:
    """Return two interleaved half circles, 10,000 points of the plane."""
    return SampleData(load_points("two-moons", seed=seed))


@dataset(Samples, "cifar10")
def cifar10(seed: int) -> SampleData:
    """Return 12,000 images of CIFAR-10."""
    return SampleData(load_images("cifar10").x * 2 - 1)
