"""Points: clouds in a few or many dimensions, generated, bundled or a user's own."""

from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits, make_moons, make_swiss_roll

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data.frames import READING, read_frame
from posterity.lab.data.needs import require_rows

__all__ = ["Points", "load_points"]

Points = Annotated[str, Kind("points", (".csv", ".parquet", ".npy"))]


def load_points(data: str, *, seed: int = 0) -> ndarray:
    """Return points of a name or file; a generator draws anew for each seed.

    Parameters
    ----------
    data : str
        A registered name, a CSV or Parquet file of numbers, or a ``.npy`` array.
    seed : int, default=0

    Returns
    -------
    ndarray of shape (n, d), float32
    """
    return np.asarray(load(Points, data, seed=seed), dtype=np.float32)


def read_points(source: Source) -> ndarray:
    """Return the points in a file, refusing what is no finite number."""
    (path,) = source.paths
    if path.suffix == ".npy":
        source.option({})
        try:
            points = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path.name} is not a readable .npy of numbers") from error
        if points.dtype.kind not in "iufb":
            raise ValueError(f"{path.name}: points are numbers, got {points.dtype}")
    else:
        frame, _ = read_frame(path, options=source.option(READING))
        if text := [str(name) for name in frame if frame[name].dtype.kind not in "iufb"]:
            raise ValueError(f"{path.name}: points are numbers, column {text[0]!r} is not")
        points = frame.to_numpy(dtype=float)
    if points.ndim < 2 or len(points) < 2 or not points.size:
        raise ValueError(f"{path.name}: points must be (n, d) with at least 2 rows, got {points.shape}")
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite, and refused
        points = points.reshape(len(points), -1).astype(np.float32)
    if bad := np.flatnonzero(~np.isfinite(points).all(1)).tolist():
        raise ValueError(f"{path.name}: row {bad[0] + 1} has a missing or infinite value")
    return points


def require_points(points: ndarray) -> None:
    """Refuse points of which nothing can be said."""
    require_rows(len(points), "points")
    if (points == points[0]).all():
        raise ValueError("all points are the same")


@dataset(Points, "two-moons")
def two_moons(seed: int) -> ndarray:
    """Return two interleaved half circles, standardised: 10,000 points of the plane."""
    points, _ = make_moons(10_000, noise=0.05, random_state=seed)
    return (points - points.mean(0)) / points.std(0)


@dataset(Points, "swiss-roll")
def swiss_roll(seed: int) -> ndarray:
    """Return the roll's spiral in the plane, standardised: 10,000 points."""
    points, _ = make_swiss_roll(10_000, noise=0.3, random_state=seed)
    points = points[:, [0, 2]]
    return (points - points.mean(0)) / points.std(0)


@dataset(Points, "digits")
def digits(seed: int) -> ndarray:
    """Return scikit-learn's 1,797 digits of 8x8 pixels in [-1, 1], shuffled by the seed."""
    return np.random.default_rng(seed).permutation(load_digits().data / 8 - 1)
