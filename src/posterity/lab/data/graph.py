"""Graphs: node features, directed edges and splits, from public files or a user's own."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from scipy import sparse
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data._arrays import load_arrays
from posterity.lab.data.needs import require_classes, require_rows

__all__ = ["Graph", "GraphData", "load_graph"]

Graph = Annotated[str, Kind("graph", (".npz",))]


@dataclass(frozen=True)
class GraphData:
    """A graph with labelled nodes.

    Attributes
    ----------
    x : Tensor of shape (nodes, features), float32
    edge_index : Tensor of shape (2, edges), int64
        Row 0 sends, row 1 receives; an undirected edge is listed both ways.
    y : Tensor of shape (nodes,), int64
        -1 where a node has no label; such nodes are in no split.
    train, val, test : Tensor of shape (splits, nodes), bool
    note : str
        What was read and what was done to it.
    """

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    note: str = ""

    def split(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masks of a seed: the data's own splits in turn."""
        k = seed % len(self.train)
        return self.train[k], self.val[k], self.test[k]


def load_graph(data: str, *, seed: int = 0) -> GraphData:
    """Return the graph of a name or an ``.npz`` file.

    Parameters
    ----------
    data : str
        A registered name, or an ``.npz`` with ``node_features``, ``node_labels``,
        ``edges`` (edges, 2) and, if it has splits, ``train_masks``, ``val_masks`` and
        ``test_masks``; without them ten splits of 48/32/20 per cent are drawn. A label of
        -1 or NaN means that a node has none. ``?directed=yes`` behind the file keeps the
        direction of edges.
    seed : int, default=0
        For generated graphs.

    Returns
    -------
    GraphData
    """
    return load(Graph, data, seed=seed)


def require_graph(graph: GraphData) -> None:
    """Refuse a graph from which nothing can be learned, or whose splits cannot tell classes apart."""
    if not (graph.edge_index[0] != graph.edge_index[1]).any():
        raise ValueError("no edge joins two nodes")
    known = graph.y[graph.y >= 0].numpy()
    require_rows(len(known), "nodes with a label")
    n_classes = int(known.max()) + 1
    require_classes(known, [f"class {k}" for k in range(n_classes)], "nodes")
    for part in ("train", "val", "test"):
        for k, mask in enumerate(getattr(graph, part)):
            # of two classes the curve of a part needs both
            if len(graph.y[mask].unique()) < (2 if n_classes == 2 or part == "train" else 1):
                raise ValueError(
                    f"the nodes of {part}_masks, split {k}, have {len(graph.y[mask].unique())} class"
                )


def read_graph(source: Source) -> GraphData:
    """Return the graph in an .npz file, or in the files of a Planetoid set."""
    options = source.option({"directed": ("yes", "no")})
    path, *others = source.paths
    if others:
        return _planetoid(source.name, [path, *others])
    directed = options.get("directed", "yes" if path.stem.endswith("_directed") else "no")
    return _arrays(path, directed == "yes")


def graph_data(
    x: Any,
    edges: ndarray,
    y: Any,
    masks: list[ndarray] | None = None,
    *,
    note: str = "",
    directed: bool = False,
) -> GraphData:
    """Return a graph of arrays: edges (edges, 2) made symmetric, repeats removed."""
    n, y = len(x), np.asarray(y)
    if not directed:
        edges = np.concatenate([edges, edges[:, ::-1]])
    edges = np.unique(edges, axis=0)
    if masks is None:
        masks = [np.zeros((10, n), dtype=bool) for _ in range(3)]
        for k in range(10):
            order = np.random.default_rng(k).permutation(n)
            order = order[y[order] >= 0]
            cuts = np.split(order, [round(0.48 * len(order)), round(0.8 * len(order))])
            for mask, part in zip(masks, cuts, strict=True):
                mask[k, part] = True
    tensors = [torch.from_numpy(np.atleast_2d(mask).astype(bool)) for mask in masks]
    return GraphData(
        torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)),
        torch.from_numpy(np.ascontiguousarray(edges.T, dtype=np.int64)),
        torch.from_numpy(y.astype(np.int64)),
        *tensors,
        note=note,
    )


def _arrays(path: Path, directed: bool) -> GraphData:
    arrays, name = load_arrays(path), path.name
    for each in ("node_features", "node_labels", "edges"):
        if each not in arrays:
            raise ValueError(f"{name}: array {each!r} is missing, has {sorted(arrays)}")
    x, y, edges = arrays["node_features"], arrays["node_labels"], arrays["edges"]
    if x.ndim != 2 or y.shape != (len(x),) or not x.size:
        raise ValueError(f"{name}: node_features (n, d) and node_labels (n,), got {x.shape} and {y.shape}")
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype.kind not in "iu":
        raise ValueError(f"{name}: edges must be integers (edges, 2), got {edges.dtype} {edges.shape}")
    if edges.size and (edges.min() < 0 or edges.max() >= len(x)):
        raise ValueError(f"{name}: edges name nodes outside 0..{len(x) - 1}")
    if x.dtype.kind not in "iufb":
        raise ValueError(f"{name}: node_features must be numbers, got {x.dtype}")
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite, and refused
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(
            f"{name}: node_features has NaN or infinity in row {np.argwhere(~np.isfinite(x))[0][0]}"
        )
    unlabelled = ~np.isfinite(y) if y.dtype.kind == "f" else y == -1 if y.dtype.kind in "iu" else y == ""
    classes, codes = np.unique(y[~unlabelled], return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"{name}: node_labels must have two classes, has {len(classes)}")
    labels = np.full(len(y), -1)
    labels[~unlabelled] = codes
    masks = _masks(arrays, labels, name)
    how = "as directed" if directed else "as undirected"
    note = f"{name}: {len(x):,} nodes, {len(edges):,} edges read {how}, {len(classes)} classes"
    if unlabelled.any():
        note += f"; {int(unlabelled.sum()):,} nodes without a label are in no split"
    if masks is None:
        note += "; no splits, ten of 48/32/20 per cent are drawn"
    return graph_data(x, edges, labels, masks, note=note, directed=directed)


def _masks(arrays: dict[str, ndarray], labels: ndarray, name: str) -> list[ndarray] | None:
    """Return the masks of the data's own splits, or None where it has none."""
    given = {
        part: arrays.get(f"{part}_masks", arrays.get(f"{part}_mask")) for part in ("train", "val", "test")
    }
    found = {part: np.atleast_2d(mask) for part, mask in given.items() if mask is not None}
    if not found:
        return None
    if missing := [part for part in given if part not in found]:
        raise ValueError(
            f"{name}: {missing[0]}_masks is missing beside {', '.join(f'{part}_masks' for part in found)}"
        )
    shapes = [mask.shape for mask in found.values()]
    if len(set(shapes)) > 1 or shapes[0][1] != len(labels):
        raise ValueError(f"{name}: masks must all be (splits, {len(labels)}), got {shapes}")
    if any(not np.isin(mask, (0, 1)).all() for mask in found.values()):
        raise ValueError(f"{name}: masks must hold true and false")
    masks = {part: mask.astype(bool) for part, mask in found.items()}
    for part, mask in masks.items():
        if not mask.any(axis=1).all():
            raise ValueError(
                f"{name}: {part}_masks is empty in split {int(np.flatnonzero(~mask.any(axis=1))[0])}"
            )
        if (lost := mask[:, labels < 0].any(axis=1)).any():
            raise ValueError(
                f"{name}: {part}_masks has nodes without a label in split {int(np.flatnonzero(lost)[0])}"
            )
    total = sum(mask.astype(int) for mask in masks.values())
    if (total > 1).any():
        split, node = np.argwhere(total > 1)[0].tolist()
        raise ValueError(f"{name}: masks overlap: node {node} is in two parts of split {split}")
    return list(masks.values())


class _Planetoid(pickle.Unpickler):
    """Reads Python-2 pickles of arrays, sparse matrices and adjacency lists, and nothing else."""

    allowed = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
        ("scipy.sparse.csr", "csr_matrix"), ("collections", "defaultdict"), ("__builtin__", "list"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise ValueError(f"not a Planetoid file: it asks for {module}.{name}")
        if module == "scipy.sparse.csr":
            return sparse.csr_matrix
        if module == "numpy.core.multiarray":
            module = "numpy._core.multiarray"
        return super().find_class("builtins" if module == "__builtin__" else module, name)


def read_planetoid(path: Path) -> Any:
    """Return the content of one Planetoid pickle, read with a restricted unpickler."""
    try:
        with path.open("rb") as file:
            return _Planetoid(file, encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        UnicodeError,
    ) as error:
        raise ValueError(f"{path.name} is not a Planetoid file: {error}") from error


def _planetoid(name: str, files: list[Path]) -> GraphData:
    by_end = {path.name.split(".", 2)[2]: path for path in files}
    x, tx, allx, y, ty, ally, graph = (read_planetoid(by_end[end]) for end in
                                       ("x", "tx", "allx", "y", "ty", "ally", "graph"))  # fmt: skip
    test = np.loadtxt(by_end["test.index"], dtype=np.int64)
    n = max(test.max() + 1, len(ally) + len(test))
    features, labels = np.zeros((n, allx.shape[1]), np.float32), np.zeros((n, ally.shape[1]), int)
    features[: len(ally)], labels[: len(ally)] = allx.toarray(), ally
    features[test], labels[test] = tx.toarray(), ty  # nodes the file leaves out stay zero, as is usual
    features /= np.maximum(features.sum(1, keepdims=True), 1)
    edges = np.array([(u, v) for u, near in graph.items() for v in near if u != v], dtype=np.int64)
    masks = [np.zeros((1, n), dtype=bool) for _ in range(3)]
    masks[0][0, : len(y)] = True
    masks[1][0, len(y) : len(y) + 500] = True
    masks[2][0, test] = True
    note = f"{name}: {n:,} nodes, rows of features sum to 1, the public split"
    return graph_data(features, edges, labels.argmax(1), masks, note=note)


@dataset(Graph, "digits")
def digits(seed: int) -> GraphData:
    """Return scikit-learn's digits joined to their 10 nearest: 10 labels a class, 300 to validate."""
    bunch = load_digits()
    x, y = bunch.data / 16, bunch.target
    near = kneighbors_graph(x, 10).tocoo()
    masks = [np.zeros((10, len(x)), dtype=bool) for _ in range(3)]
    for k in range(10):
        order = np.random.default_rng(k).permutation(len(x))
        chosen = np.concatenate([order[y[order] == label][:10] for label in range(10)])
        rest = order[~np.isin(order, chosen)]
        masks[0][k, chosen] = masks[1][k, rest[:300]] = masks[2][k, rest[300:]] = True
    return graph_data(x, np.stack([near.row, near.col], 1), y, masks, note="digits: 10 nearest neighbours")
