"""Matchings: pairs of graphs whose nodes belong together, as features of the pairs and the true permutations."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_digits

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data._arrays import load_arrays
from posterity.lab.data.needs import require_rows

__all__ = ["MatchingData", "Matchings", "load_matchings"]

Matchings = Annotated[str, Kind("matchings", (".npz",))]

PAIRS, NODES = 7000, 4  # of the made sets


@dataclass(frozen=True)
class MatchingData:
    """Pairs of graphs.

    Attributes
    ----------
    features : ndarray of shape (n, k**4), float32
        Row ``i k + a``, column ``j k + b`` of a pair's matrix says by how much the length from i to j differs from that
        from a to b.
    permutations : ndarray of shape (n, k), int64
        Which node of the first graph each node of the second is.
    note : str
        What was read.
    """

    features: ndarray
    permutations: ndarray
    note: str = ""


def load_matchings(data: str, *, seed: int = 0) -> MatchingData:
    """Return the pairs of a name or an ``.npz`` file.

    Parameters
    ----------
    data : str
        A registered name, or an ``.npz`` with ``features`` (n, k^4) and ``permutations`` (n, k).
    seed : int, default=0
        For made pairs.

    Returns
    -------
    MatchingData

    Raises
    ------
    ValueError
        If the file is not what it must be; the message names it.
    """
    return load(Matchings, data, seed=seed)


def require_matchings(data: MatchingData) -> None:
    """Refuse pairs from which nothing can be learned."""
    require_rows(len(data.features), "pairs of graphs")
    if (data.permutations == data.permutations[0]).all():
        raise ValueError("all permutations are the same")


def read_matchings(source: Source) -> MatchingData:
    """Return the pairs in a file."""
    (path,) = source.paths
    source.option({})
    arrays = load_arrays(path)
    for each in ("features", "permutations"):
        if each not in arrays:
            raise ValueError(f"{path.name}: array {each!r} is missing, has {sorted(arrays)}")
    features, permutations = arrays["features"], arrays["permutations"]
    if permutations.ndim != 2 or permutations.dtype.kind not in "iu" or permutations.shape[1] < 2:
        raise ValueError(
            f"{path.name}: permutations must be integers (n, k), got {permutations.dtype} {permutations.shape}"
        )
    n, k = permutations.shape
    odd = np.flatnonzero((np.sort(permutations, 1) != np.arange(k)).any(1))
    if len(odd):
        raise ValueError(f"{path.name}: row {odd[0]} of permutations is {permutations[odd[0]].tolist()}")
    if features.shape != (n, k**4) or features.dtype.kind not in "iuf":
        raise ValueError(
            f"{path.name}: features must be numbers ({n}, {k**4}), got {features.dtype} {features.shape}"
        )
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(
            f"{path.name}: features has NaN or infinity in row {np.argwhere(~np.isfinite(features))[0][0]}"
        )
    return MatchingData(features, permutations.astype(np.int64), f"{path.name}: {n:,} pairs of {k} nodes")


def _pairs(lengths: ndarray, rng: np.random.Generator) -> MatchingData:
    """Return graphs (n, k, k), each beside itself with its nodes renumbered."""
    n, k, _ = lengths.shape
    which = np.argsort(rng.random((n, k)), 1)
    other = lengths[np.arange(n)[:, None, None], which[:, :, None], which[:, None, :]]
    features = np.abs(lengths[:, :, None, :, None] - other[:, None, :, None, :])
    return MatchingData(features.reshape(n, -1).astype(np.float32), which)


@dataset(Matchings, "random")
def random(seed: int) -> MatchingData:
    """Return seven thousand graphs of four nodes whose lengths, also from a node to itself, are uniform on [0, 1]."""
    rng = np.random.default_rng(seed)
    return _pairs(rng.random((PAIRS, NODES, NODES)), rng)


@dataset(Matchings, "digits")
def digits(seed: int) -> MatchingData:
    """Return as many graphs of four images of digits, with their Euclidean distances over the largest."""
    rng, images = np.random.default_rng(seed), load_digits().data
    chosen = images[np.argpartition(rng.random((PAIRS, len(images))), NODES, 1)[:, :NODES]]
    apart = np.linalg.norm(chosen[:, :, None] - chosen[:, None], axis=-1)
    return _pairs(apart / apart.max((1, 2), keepdims=True), rng)
