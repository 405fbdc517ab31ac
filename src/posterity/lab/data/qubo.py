"""QUBO: a symmetric matrix whose quadratic form is minimised over bits, from a user's matrix or graph."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy import ndarray

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data._arrays import load_arrays

__all__ = ["QUBO", "QUBOData", "load_qubo"]

QUBO = Annotated[str, Kind("qubo", (".npz",))]

BITS = 16  # of the made set


@dataclass(frozen=True)
class QUBOData:
    """Couplings between bits.

    Attributes
    ----------
    matrix : ndarray of shape (n, n), float64
        Symmetric; the energy of bits x is ``x @ matrix @ x``, the diagonal is the linear part.
    note : str
        What was read and what was done to it.
    """

    matrix: ndarray
    note: str = ""


def load_qubo(data: str, *, seed: int = 0) -> QUBOData:
    """Return the couplings of a name or file.

    Parameters
    ----------
    data : str
        A registered name, or an ``.npz`` with ``matrix`` (n, n), which is made symmetric, or with the ``edges``
        (m, 2) of a graph and, where they have any, their ``weights`` (m,): then the bits of least energy are a
        maximum cut, and the energy is minus its weight.
    seed : int, default=0
        For made couplings.

    Returns
    -------
    QUBOData

    Raises
    ------
    ValueError
        If the file is not what it must be; the message names it.
    """
    return load(QUBO, data, seed=seed)


def require_qubo(data: QUBOData) -> None:
    """Refuse couplings among which there is nothing to choose."""
    if len(data.matrix) < 2 or not data.matrix.any():
        raise ValueError(f"at least 2 bits and one coupling are needed, has {len(data.matrix)} bits")


def read_qubo(source: Source) -> QUBOData:
    """Return the couplings in a file of a matrix or of a graph."""
    (path,) = source.paths
    source.option({})
    arrays = load_arrays(path)
    if "matrix" in arrays:
        return _matrix(path, arrays["matrix"])
    if "edges" in arrays:
        return _cut(path, arrays["edges"], arrays.get("weights"))
    raise ValueError(f"{path.name}: array 'matrix' or 'edges' is missing, has {sorted(arrays)}")


def _matrix(path: Path, matrix: ndarray) -> QUBOData:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"{path.name}: matrix must be (n, n), got {matrix.shape}")
    if matrix.dtype.kind not in "iufb":
        raise ValueError(f"{path.name}: matrix must be numbers, got {matrix.dtype}")
    matrix = matrix.astype(float)
    if not np.isfinite(matrix).all():
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"{path.name}: matrix has NaN or infinity at [{i}, {j}]")
    note = f"{path.name}: {len(matrix):,} bits"
    if not np.array_equal(matrix, matrix.T):
        note += "; not symmetric, halved onto both sides of the diagonal"
    return QUBOData((matrix + matrix.T) / 2, note)


def _cut(path: Path, edges: ndarray, weights: ndarray | None) -> QUBOData:
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu" or not edges.size:
        raise ValueError(f"{path.name}: edges must be integers (m, 2), got {edges.dtype} {edges.shape}")
    if edges.min() < 0:
        raise ValueError(f"{path.name}: edges name node {edges.min()}, nodes count from 0")
    weights = np.ones(len(edges)) if weights is None else weights
    if weights.shape != (len(edges),) or weights.dtype.kind not in "iuf" or not np.isfinite(weights).all():
        raise ValueError(f"{path.name}: weights must be {len(edges)} finite numbers, got {weights.shape}")
    apart = edges[:, 0] != edges[:, 1]
    n = int(edges.max()) + 1
    matrix = np.zeros((n, n))
    for i, j in (edges[apart].T, edges[apart, ::-1].T):
        np.add.at(matrix, (i, j), weights[apart] / 1.0)
    matrix[np.diag_indices(n)] = -matrix.sum(1)
    note = f"{path.name}: the cut of {n:,} nodes by {int(apart.sum()):,} edges"
    return QUBOData(matrix, note + ("" if apart.all() else f"; {int((~apart).sum()):,} loops left out"))


@dataset(QUBO, "spin-glass")
def spin_glass(seed: int) -> QUBOData:
    """Return sixteen bits that are all coupled, with normal couplings."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(BITS, BITS)))
    return QUBOData((upper + upper.T) / 2)
