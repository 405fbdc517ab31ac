"""Points: clouds in a few or many dimensions, generated, bundled or a user's own."""

from pathlib import Path
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits, make_moons, make_swiss_roll

from posterity.lab.data import Kind, dataset, resolve

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
    found = resolve(Points, data)
    if not isinstance(found, Path):
        return np.asarray(found(seed), dtype=np.float32)  # type: ignore[operator]
    if found.suffix == ".npy":
        points = np.load(found, allow_pickle=False)
    else:
        from posterity.lab.data.table import read_frame

        frame, _ = read_frame(found)
        if text := [str(name) for name in frame if frame[name].dtype.kind not in "iufb"]:
            raise ValueError(f"{found.name}: points are numbers, column {text[0]!r} is not")
        points = frame.to_numpy()
    if points.ndim < 2 or len(points) < 2:
        raise ValueError(f"{found.name}: points must be (n, d) with at least 2 rows, got {points.shape}")
    points = points.reshape(len(points), -1).astype(np.float32)
    if bad := np.flatnonzero(~np.isfinite(points).all(1)).tolist():
        raise ValueError(f"{found.name}: row {bad[0] + 1} has a missing or infinite value")
    return points


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
