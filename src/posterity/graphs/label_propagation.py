"""Label propagation: mix a classifier's scores with the labels that are known, along the edges.

With S = D^-1/2 A D^-1/2 and Z0 the scores, in which known rows are replaced by their labels,

    Z <- alpha S Z + (1 - alpha) Z0,                                                     (1)

which tends to (1 - alpha) (I - alpha S)^-1 Z0. So an answer follows the labels around its node,
whatever a network makes of the edges.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import floating, has_shape, integer, within
from posterity._precision import widened
from posterity.graphs._graph import check_edges, check_index, csr
from posterity.graphs._sparse import SparseMatrix, sparse_product

__all__ = ["propagate_labels", "with_label_propagation"]

Predict = Callable[[Tensor, Tensor], Tensor]


def propagate_labels(
    scores: Float[Tensor, "nodes classes"], y_known: Int[Tensor, " known"], known: Int[Tensor, " known"],
    edge_index: Int[Tensor, "2 edges"], *, num_layers: int = 50, alpha: float = 0.7, clamp: bool = False,
    normalize: bool = True,
) -> Float[Tensor, "nodes classes"]:  # fmt: skip
    """Return scores mixed with the labels that are known, by diffusion over the graph.

    ``Z <- alpha S Z + (1 - alpha) Z0`` with ``S = D^-1/2 A D^-1/2``; Z0 is the softmax of the
    scores, with the known rows replaced by their labels.

    Parameters
    ----------
    scores : Tensor
        A classifier's scores, or zeros.
    y_known, known : Tensor
        Labels, and the nodes that have them.
    edge_index : Tensor
        Undirected edges in both directions; self-loops and repetitions are dropped.
    num_layers : int, default=50
        Steps, at least 0.
    alpha : float, default=0.7
        Weight of the neighbours, in [0, 1).
    clamp : bool, default=False
        Whether to cut Z to [0, 1] after each step.
    normalize : bool, default=True
        Whether to take the softmax of the scores first.

    Returns
    -------
    Tensor
        Like ``scores``.

    References
    ----------
    .. [1] Zhou, Bousquet, Lal, Weston, Schoelkopf. Learning with local and global
       consistency. NeurIPS 2003.
    .. [2] Huang, He, Singh, Lim, Benson. Combining label propagation and simple models
       out-performs graph neural networks. ICLR 2021.
    """
    integer("num_layers", num_layers, 0)
    within("alpha", alpha, 0, 1, open_high=True)
    has_shape("scores", floating("scores", scores), (None, None))
    known = check_index("known", known, (None,), len(scores), of="scores", read=True)
    edge_index = check_edges(edge_index, len(scores), source="scores", read=True)
    return _diffuse(scores, y_known, known, edge_index, num_layers, alpha, clamp, normalize)


def with_label_propagation(
    predict: Predict | None, y_known: Int[Tensor, " known"], *, num_classes: int = 2, num_layers: int = 50,
    alpha: float = 0.7,
) -> Predict:  # fmt: skip
    """Return a classifier whose scores are mixed with known labels, see `propagate_labels`.

    Parameters
    ----------
    predict : callable or None
        ``predict(x, edge_index)`` returns scores; None is label propagation alone.
    y_known : Tensor
        Labels of the first ``len(y_known)`` nodes of any graph it is asked about.
    num_classes : int, default=2
        Columns of the scores of label propagation alone.
    num_layers : int, default=50
        Steps.
    alpha : float, default=0.7
        Weight of the neighbours.

    Returns
    -------
    callable
        Like ``predict``; it has ``batched`` where ``predict`` has it or is None.
    """
    integer("num_classes", num_classes, 2)
    integer("num_layers", num_layers, 0)
    within("alpha", alpha, 0, 1, open_high=True)
    y_known = check_index(
        "y_known", y_known, (None,), num_classes if predict is None else None, "classes", read=True
    )
    single = predict is not None and not hasattr(predict, "batched")
    return (_Propagated if single else _BatchPropagated)(predict, y_known, num_classes, num_layers, alpha)


class _Propagated:
    """A classifier followed by label propagation."""

    def __init__(
        self, predict: Predict | None, y_known: Tensor, num_classes: int, num_layers: int, alpha: float
    ) -> None:
        self.predict, self.y_known, self.num_classes = predict, y_known, num_classes
        self.num_layers, self.alpha = num_layers, alpha

    def __call__(self, x: Tensor, edge_index: Tensor) -> Tensor:
        edge_index = check_edges(edge_index, len(x), source="x")
        scores = (
            x.new_zeros(len(x), self.num_classes) if self.predict is None else self.predict(x, edge_index)
        )
        return self._mixed(_rows(scores, len(x)), edge_index, 1)

    def _mixed(self, scores: Tensor, edge_index: Tensor, copies: int) -> Tensor:
        if len(self.y_known) > len(scores) // copies:
            raise ValueError(
                f"y_known must have at most a label a node, got {len(self.y_known)} for {len(scores) // copies}"
            )
        first = torch.arange(copies, device=scores.device)[:, None] * (len(scores) // copies)
        known = (first + torch.arange(len(self.y_known), device=scores.device)).flatten()
        labels, normalize = self.y_known.repeat(copies), self.predict is not None
        return _diffuse(
            scores, labels, known, edge_index, self.num_layers, self.alpha, clamp=False, normalize=normalize
        )


class _BatchPropagated(_Propagated):
    """The same for several graphs on the same nodes at once."""

    def batched(self, x: Tensor, edge_indices: list[Tensor]) -> Tensor:
        """Return scores (graphs, nodes, classes)."""
        n = len(x)
        if self.predict is None:
            scores = x.new_zeros(len(edge_indices), n, self.num_classes)
        else:
            scores = self.predict.batched(x, edge_indices)  # type: ignore[attr-defined]
        edges = torch.cat([edges + k * n for k, edges in enumerate(edge_indices)], 1)
        mixed = self._mixed(scores.flatten(0, 1), edges, len(edge_indices))  # labels go with each copy
        return mixed.view(len(edge_indices), n, -1)


def _start(scores: Tensor, y_known: Tensor, known: Tensor, normalize: bool) -> Tensor:
    classes = scores.shape[1]
    y_known = check_index("y_known", y_known, known.shape, classes, "classes", source="known", read=True)
    if len(known.unique()) < len(known):
        raise ValueError("known must not repeat a node")
    start = scores.softmax(-1) if normalize else scores
    if not len(known):
        return start
    labels = torch.nn.functional.one_hot(y_known, classes).to(scores)
    return start.index_copy(0, known, labels)


def _normalized(edge_index: Tensor, like: Tensor) -> Tensor:
    """Return D^-1/2 A D^-1/2 as CSR, rows receiving; loops and repetitions dropped."""
    n = len(like)
    key = torch.unique((edge_index[1] * n + edge_index[0])[edge_index[0] != edge_index[1]])
    row, col = key // n, key % n
    degree = torch.bincount(row, minlength=n).to(like.dtype)
    scale = degree.clamp_min(1).rsqrt()
    ends = torch.cat([row.new_zeros(1), torch.bincount(row, minlength=n).cumsum(0)])
    return csr(ends, col, scale[row] * scale[col])


@widened
def _diffuse(
    scores: Tensor, y_known: Tensor, known: Tensor, edge_index: Tensor, num_layers: int, alpha: float,
    clamp: bool, normalize: bool,
) -> Tensor:  # fmt: skip
    z = start = _start(scores, y_known, known, normalize)
    smooth = SparseMatrix(_normalized(edge_index, scores))
    for _ in range(num_layers):
        z = alpha * sparse_product(smooth, z) + (1 - alpha) * start
        if clamp:
            z = z.clamp(0, 1)
    return z


def _rows(scores: Tensor, n: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != n:
        came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"predict must return scores ({n}, classes), got {came}")
    return scores
