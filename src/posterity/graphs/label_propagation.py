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

from posterity._checks import has_shape, integer, within
from posterity.graphs._graph import csr

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
    start = _start(scores, y_known, known, normalize)
    return _diffuse(start, _normalized(edge_index, scores), num_layers, alpha, clamp)


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
        scores = (
            x.new_zeros(len(x), self.num_classes) if self.predict is None else self.predict(x, edge_index)
        )
        _rows(scores, len(x))
        return _diffuse(
            self._start(scores), _normalized(edge_index, scores), self.num_layers, self.alpha, False
        )

    def _start(self, scores: Tensor) -> Tensor:
        known = torch.arange(len(self.y_known), device=scores.device)
        return _start(scores, self.y_known, known, normalize=self.predict is not None)


class _BatchPropagated(_Propagated):
    """The same for several graphs on the same nodes at once."""

    def batched(self, x: Tensor, edge_indices: list[Tensor]) -> Tensor:
        """Return scores (graphs, nodes, classes)."""
        n = len(x)
        if self.predict is None:
            scores = x.new_zeros(len(edge_indices), n, self.num_classes)
        else:
            scores = self.predict.batched(x, edge_indices)  # type: ignore[attr-defined]
        start = torch.cat([self._start(each) for each in scores])
        edges = torch.cat(
            [edges + k * n for k, edges in enumerate(edge_indices)], 1
        )  # labels go with each copy
        mixed = _diffuse(start, _normalized(edges, start), self.num_layers, self.alpha, False)
        return mixed.view(len(edge_indices), n, -1)


def _start(scores: Tensor, y_known: Tensor, known: Tensor, normalize: bool) -> Tensor:
    n, classes = scores.shape
    has_shape("y_known", y_known, known.shape, "known")
    if len(known) and (int(known.min()) < 0 or int(known.max()) >= n):
        raise ValueError(f"known must be nodes below {n}, got {int(known.min())} to {int(known.max())}")
    if len(known.unique()) < len(known):
        raise ValueError("known must not repeat a node")
    if len(y_known) and (int(y_known.min()) < 0 or int(y_known.max()) >= classes):
        raise ValueError(
            f"y_known must be classes below {classes}, got {int(y_known.min())} to {int(y_known.max())}"
        )
    start = scores.softmax(-1) if normalize else scores
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


def _diffuse(start: Tensor, smooth: Tensor, num_layers: int, alpha: float, clamp: bool) -> Tensor:
    z = start
    for _ in range(num_layers):
        z = alpha * (smooth @ z) + (1 - alpha) * start
        if clamp:
            z = z.clamp(0, 1)
    return z


def _rows(scores: Tensor, n: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != n:
        came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"predict must return scores ({n}, classes), got {came}")
    return scores
