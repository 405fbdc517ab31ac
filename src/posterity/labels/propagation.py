"""Label propagation with a prior: labels spread over a graph, and each node is held to a guess of its own.

With f fixed to the true labels on the labelled nodes, the distributions over classes minimise

    sum_{i<j} W_ij |f_i - f_j|^2 + sum_{i unlabelled} kappa_i |f_i - h_i|^2,       (1)

that is (D + K - W)_UU f_U = W_UL y_L + K h_U, with D the row sums of W and K the confidences kappa
in the prior h. At kappa = 0 it is classical label propagation, at infinity the prior alone. Read
as a random walk from i that stops at j at the rate kappa_j, f_i is what the walk ends at on
average: a label with probability A_ij, a prior with probability B_ij. So

    |f_i - y_i| <= sum_j A_ij |y_j - y_i| + sum_j B_ij |h_j - y_i|.                 (2)
"""

import warnings
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64, Int, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy import linalg, sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import cg, splu
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from posterity._checks import at_least, integer, one_of, within
from posterity.labels._arrays import array, numbers

__all__ = ["absorption_weights", "prior_confidence", "propagate", "smooth_prior"]

Graph = Shaped[ndarray, "n n"] | sparse.sparray | sparse.spmatrix | Shaped[Tensor, "n n"] | ArrayLike
Shares = Float[ndarray, "n c"] | Float[Tensor, "n c"] | ArrayLike
Indices = Int[ndarray, " l"] | Int[Tensor, " l"] | ArrayLike
Rates = float | Float[ndarray, " n"] | Float[Tensor, " n"] | ArrayLike
DIRECT = 3_000  # nodes up to which the system is factorised
FILLED = 1 / 20  # share of entries from which a matrix is no longer sparse
RTOL = 1e-12  # of the residual of conjugate gradients
SLACK = 1e-6  # by how much symmetry, and sums of 1, may be missed
DAMPED = 1e-3  # factor of the score near labels, and its least value


def propagate(
    adjacency: Graph, prior: Shares, labels: Indices, labeled: Indices, *, confidence: Rates = 1.0
) -> Float64[ndarray, "n c"]:
    """Return the distribution over classes of each node, equation 1.

    Parameters
    ----------
    adjacency : array, Tensor or sparse matrix of shape (n, n)
        W, symmetric and non-negative; its diagonal is ignored.
    prior : array or Tensor of shape (n, c)
        h, rows of probabilities over two classes or more, such as `aggregate_votes` gives.
    labels : array or Tensor of shape (l,), integer
        Classes in 0..c-1 of the labelled nodes.
    labeled : array or Tensor of shape (l,), integer
        Which nodes these are, in 0..n-1, none twice. There may be none.
    confidence : float or array of shape (n,), default=1.0
        kappa, at least 0, in the units of ``adjacency``. That of labelled nodes is ignored.

    Returns
    -------
    ndarray of shape (n, c)
        In float64, rows sum to 1. Labelled nodes have one-hot rows. Where a node is connected
        neither to a label nor to a node with confidence, it is its prior.

    Raises
    ------
    ValueError
        If an argument is not as above, or there is neither a label nor confidence.

    Notes
    -----
    1. The authors' "hard" propagation with their alpha is ``confidence=1 / alpha``, the "adaptive"
       with scores r_i is ``0.5 * alpha * r_i``; they form a dense inverse. Here the system is
       factorised up to 3,000 nodes, beyond that solved by conjugate gradients.
    2. One node of each connected part is solved for last, from sums of positive numbers:
       confidences far below rounding still pull a part without labels to its mean prior.

    References
    ----------
    .. [1] Pukdee, Sam, Ravikumar, Balcan. Label Propagation with Weak Supervision. ICLR 2023. Section 3.
    .. [2] Zhu, Ghahramani, Lafferty. Semi-supervised learning using Gaussian fields and
       harmonic functions. ICML 2003.

    Examples
    --------
    A path whose first node has a label; the last is held to its prior:

    >>> from posterity.labels import propagate
    >>> path = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    >>> prior = [[0.5, 0.5], [0.5, 0.5], [0, 1]]
    >>> propagate(path, prior, [0], [0], confidence=[0, 0, 1]).round(4)
    array([[1.    , 0.    ],
           [0.6667, 0.3333],
           [0.3333, 0.6667]])
    """
    graph = _graph(adjacency)
    prior = _shares("prior", prior, graph.shape[0])
    labeled = _labeled(labeled, graph.shape[0])
    labels = _indices("labels", labels, prior.shape[1], "classes of prior")
    if len(labels) != len(labeled):
        raise ValueError(f"labels must have a class for each of labeled, {len(labeled)}, got {len(labels)}")
    kappa = _kappa(confidence, graph, len(labeled))
    known = np.eye(prior.shape[1])[labels]
    return _spread(graph, prior, known, labeled, kappa)


def smooth_prior(adjacency: Graph, prior: Shares, *, alpha: float = 10.0) -> Float64[ndarray, "n c"]:
    """Return the prior smoothed over a graph, without any label: (I + alpha (D - W)) s = h.

    Parameters
    ----------
    adjacency : array, Tensor or sparse matrix of shape (n, n)
        W, symmetric and non-negative, usually denser than the graph of `propagate`.
    prior : array or Tensor of shape (n, c)
        h, rows of probabilities.
    alpha : float, default=10.0
        How far to smooth, at least 0, which changes nothing.

    Returns
    -------
    ndarray of shape (n, c)
        Rows of probabilities. Over each connected part their mean is that of the prior.

    Raises
    ------
    ValueError
        If an argument is not as above.

    References
    ----------
    .. [1] Pukdee et al. Label Propagation with Weak Supervision. ICLR 2023.

    Examples
    --------
    >>> from posterity.labels import smooth_prior
    >>> smooth_prior([[0, 1], [1, 0]], [[1, 0], [0, 1]], alpha=1.0).round(4)
    array([[0.6667, 0.3333],
           [0.3333, 0.6667]])
    """
    graph = _graph(adjacency)
    prior = _shares("prior", prior, graph.shape[0])
    at_least("alpha", alpha, 0)
    nobody = np.zeros(0, dtype=np.int64)
    kappa = np.full(len(prior), 1 / max(alpha, 1.0))
    return _spread(min(alpha, 1.0) * graph, prior, prior[nobody], nobody, kappa)


def prior_confidence(
    smoothed: Shares,
    adjacency: Graph,
    labeled: Indices,
    *,
    n_hops: int = 3,
    kind: Literal["quadratic", "step"] = "quadratic",
    scale: float = 1000.0,
    threshold: float = 0.2,
) -> Float64[ndarray, " n"]:
    """Return a confidence for each node: high where the smoothed prior is decided and no label is near.

    Parameters
    ----------
    smoothed : array or Tensor of shape (n, c)
        Rows of probabilities, from `smooth_prior`.
    adjacency : array, Tensor or sparse matrix of shape (n, n)
        The graph of `propagate`.
    labeled : array or Tensor of shape (l,), integer
        Nodes with a label.
    n_hops : int, default=3
        Nodes so many edges from a labelled one, or fewer, have their score divided by 1,000; at least 0.
    kind : {"quadratic", "step"}, default="quadratic"
        The score r is 0.001 more than how decided a row is, (max s - 1 / c) / (1 - 1 / c), and the
        confidence ``0.5 * scale * r**2``; or r is 1e6 where max s exceeds 1 - threshold, else
        0.001, and the confidence ``0.5 * scale * r``.
    scale : float, default=1000.0
        The authors' alpha, at least 0.
    threshold : float, default=0.2
        For "step", in [0, 1].

    Returns
    -------
    ndarray of shape (n,)
        For ``confidence`` of `propagate`.

    Raises
    ------
    ValueError
        If an argument is not as above.

    Notes
    -----
    1. The paper has two classes, for which how decided a row is is 2 abs(s - 1/2).
    2. The authors' program calls "step" with a threshold of 0.8, at which every node is confident.

    References
    ----------
    .. [1] Pukdee et al. Label Propagation with Weak Supervision. ICLR 2023.

    Examples
    --------
    >>> from posterity.labels import prior_confidence
    >>> prior_confidence([[0.5, 0.5], [0.9, 0.1]], [[0, 0], [0, 0]], [], scale=2.0).round(6)
    array([1.00000e-06, 6.41601e-01])
    """
    graph = _graph(adjacency)
    smoothed = _shares("smoothed", smoothed, graph.shape[0])
    labeled = _labeled(labeled, graph.shape[0])
    integer("n_hops", n_hops, 0)
    one_of("kind", kind, ("quadratic", "step"))
    at_least("scale", scale, 0)
    within("threshold", threshold, 0, 1)
    even, top = 1 / smoothed.shape[1], smoothed.max(1)
    if kind == "quadratic":
        score = (top - even) / (1 - even) + DAMPED
    else:
        score = np.where(top > 1 - threshold, 1e6, DAMPED)
    near = np.zeros(len(smoothed))
    near[labeled] = 1
    for _ in range(min(n_hops, len(near))):
        near = (near + graph @ near > 0).astype(np.float64)
    score = np.where(near > 0, DAMPED, 1.0) * score
    return 0.5 * scale * (score**2 if kind == "quadratic" else score)


def absorption_weights(
    adjacency: Graph, labeled: Indices, *, confidence: Rates = 1.0
) -> tuple[Float64[ndarray, "n l"], Float64[ndarray, "n n"]]:
    """Return what each node's distribution is a mean of: ``propagate`` is A @ one_hot(labels) + B @ prior.

    The weights bound the error of a node by that of the labels and priors that it sees, equation 2.

    Parameters
    ----------
    adjacency : array, Tensor or sparse matrix of shape (n, n)
        W, symmetric and non-negative; its diagonal is ignored.
    labeled : array or Tensor of shape (l,), integer
        Nodes with a label.
    confidence : float or array of shape (n,), default=1.0
        kappa, at least 0.

    Returns
    -------
    A : ndarray of shape (n, l)
        Probability that a random walk from each node ends at each label.
    B : ndarray of shape (n, n)
        Probability that it stops at each node before. Rows of both together sum to 1.

    Raises
    ------
    ValueError
        If an argument is not as above, or there is neither a label nor confidence.

    Notes
    -----
    1. The result is dense, n (n + l) numbers: for graphs of thousands.

    References
    ----------
    .. [1] Pukdee et al. Label Propagation with Weak Supervision. ICLR 2023. The error analysis.

    Examples
    --------
    >>> from posterity.labels import absorption_weights
    >>> A, B = absorption_weights([[0, 1, 0], [1, 0, 1], [0, 1, 0]], [0], confidence=[0, 0, 1])
    >>> A.round(4).tolist(), B[:, 2].round(4).tolist()
    ([[1.0], [0.6667], [0.3333]], [0.0, 0.3333, 0.6667])
    """
    graph = _graph(adjacency)
    n = graph.shape[0]
    labeled = _labeled(labeled, n)
    kappa = _kappa(confidence, graph, len(labeled))
    every = np.eye(n, len(labeled) + n, len(labeled))
    weights = _spread(graph, every, np.eye(len(labeled), len(labeled) + n), labeled, kappa, direct=True)
    return weights[:, : len(labeled)], weights[:, len(labeled) :]


def _spread(
    graph: sparse.csr_matrix, prior: ndarray, known: ndarray, labeled: ndarray, kappa: ndarray,
    direct: bool = False,
) -> ndarray:  # fmt: skip
    """Return rows of probabilities that minimise equation 1; those of ``labeled`` are known."""
    free = np.ones(len(prior), dtype=bool)
    free[labeled] = False
    spread = prior.copy()
    spread[labeled] = known
    rows = graph[free]
    to_labels, kappa = rows[:, labeled], kappa[free]
    pull = kappa + np.asarray(to_labels.sum(1)).ravel()
    targets = to_labels @ known + kappa[:, None] * prior[free]
    found, alive = _solve(rows[:, free], pull, targets, direct)
    at = np.flatnonzero(free)[alive]
    spread[at] = np.clip(found[alive], 0, 1)  # an iteration ends a little beside
    spread[at] /= spread[at].sum(1, keepdims=True)
    return spread


def _solve(
    graph: sparse.csr_matrix, pull: ndarray, targets: ndarray, direct: bool
) -> tuple[ndarray, ndarray]:
    """Solve (D + diag(pull) - W) f = targets, D the row sums of W; return f and where it is decided.

    Where the pull is small beside D, the matrix is singular but for rounding. With one node of
    each connected part, its root, left out, it is not. With x the solution for the targets, and
    y that for their sums, which are the pull, the root's value is (t + w.x) / (p + w.y), all of it
    positive, and f = x + (1 - y) root.
    """
    n = len(targets)
    if n == 0:
        return targets, np.zeros(0, dtype=bool)
    diagonal = np.asarray(graph.sum(1)).ravel() + pull
    n_parts, part = connected_components(graph, directed=False)
    order = np.lexsort((diagonal, part))
    root = order[np.append(np.flatnonzero(np.diff(part[order])), n - 1)]  # the largest of each part
    unit = np.zeros(n_parts)  # each part is solved in units of its strongest pull
    np.maximum.at(unit, part, pull)
    alive = unit[part] > 0
    unit = np.where(unit > 0, unit, 1.0)
    inner = alive.copy()
    inner[root] = False
    size = 1 / np.sqrt(diagonal[inner])
    rhs = targets / unit[part][:, None]
    scaled = sparse.diags(size)
    matrix = sparse.eye_array(len(size)) - scaled @ graph[inner][:, inner] @ scaled
    inside = size[:, None] * _positive(matrix, size[:, None] * rhs[inner], direct or n <= DIRECT)
    flow = rhs[root] + graph[root][:, inner] @ inside
    total = flow.sum(1, keepdims=True)
    value = flow / np.where(total > 0, total, 1)
    inside *= unit[part[inner], None]
    found = np.zeros_like(targets)
    found[root] = value
    found[inner] = inside + (1 - inside.sum(1, keepdims=True)) * value[part[inner]]
    return found, alive


def _positive(matrix: Any, rhs: ndarray, direct: bool) -> ndarray:
    """Solve a positive definite system whose diagonal is 1."""
    n = len(rhs)
    if n == 0:
        return rhs
    if direct and matrix.nnz > FILLED * n * n:
        return linalg.cho_solve(linalg.cho_factor(matrix.toarray(), check_finite=False), rhs)
    if direct:
        ordered = {
            "permc_spec": "MMD_AT_PLUS_A",
            "diag_pivot_thresh": 0.0,
            "options": {"SymmetricMode": True},
        }
        return splu(matrix.tocsc(), **ordered).solve(rhs)
    matrix, found = matrix.tocsr(), np.empty_like(rhs)
    for k, column in enumerate(rhs.T):
        found[:, k], failed = cg(matrix, column, rtol=RTOL, atol=0.0)
        if failed:
            warnings.warn("conjugate gradients end before they converge", ConvergenceWarning, stacklevel=2)
    return found


def _graph(adjacency: Any) -> Any:
    """Return W in float64 as a csr_matrix, its diagonal and its zeros left out."""
    graph: Any
    if sparse.issparse(adjacency):
        graph = adjacency.tocsr().copy()
        graph.sum_duplicates()
        graph.data, eps = numbers("adjacency.data", graph.data)
        graph = sparse.csr_matrix(graph)
    else:
        dense, eps = numbers("adjacency", adjacency)
        if dense.ndim != 2:
            raise ValueError(f"adjacency must have shape (n, n), got {dense.shape}")
        graph = sparse.csr_matrix(dense)
    n = graph.shape[0]
    if graph.shape != (n, n) or n == 0:
        raise ValueError(f"adjacency must have shape (n, n), n at least 1, got {graph.shape}")
    if graph.nnz and graph.data.min() < 0:
        raise ValueError(f"adjacency must not be negative, got {graph.data.min():g}")
    gap = abs(graph - graph.T).tocoo()
    if gap.nnz and gap.data.max() > max(SLACK, 4 * eps) * graph.data.max():
        i, j = gap.row[gap.data.argmax()], gap.col[gap.data.argmax()]
        raise ValueError(
            f"adjacency must be symmetric, got {graph[i, j]:g} at ({i}, {j}) and {graph[j, i]:g} at ({j}, {i})"
        )
    if gap.nnz:
        graph = sparse.csr_matrix(0.5 * graph + 0.5 * graph.T)
    graph.setdiag(0)
    graph.eliminate_zeros()
    with np.errstate(over="ignore"):
        total = graph.sum()
    if not np.isfinite(total):
        raise ValueError("adjacency must have a finite sum, its weights are too large")
    return graph


def _shares(name: str, value: Any, n: int) -> ndarray:
    """Return rows of probabilities, n of them, that sum to 1."""
    shares, eps = numbers(name, value)
    if shares.ndim != 2 or len(shares) != n or shares.shape[1] < 2:
        raise ValueError(f"{name} must have shape ({n}, c) for adjacency, c at least 2, got {shares.shape}")
    if shares.min() < 0:
        raise ValueError(f"{name} must not be negative, got {shares.min():g}")
    total = shares.sum(1, keepdims=True)
    off = np.abs(total[:, 0] - 1)
    if off.max() > max(SLACK, 4 * eps):
        raise ValueError(
            f"{name} must have rows that sum to 1, row {off.argmax()} has {total[off.argmax(), 0]:g}"
        )
    return shares / total


def _indices(name: str, value: Any, n: int, things: str) -> ndarray:
    found, _ = array(name, value)
    if found.ndim == 1 and len(found) == 0:
        return np.zeros(0, dtype=np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of shape (l,), got {found.dtype} of shape {found.shape}")
    if found.min() < 0 or found.max() >= n:
        worst = found.min() if found.min() < 0 else found.max()
        raise ValueError(f"{name} must be in 0..{n - 1}, {things}, got {worst}")
    return found.astype(np.int64)


def _labeled(value: Any, n: int) -> ndarray:
    labeled = _indices("labeled", value, n, "rows of adjacency")
    values, counts = np.unique(labeled, return_counts=True)
    if len(values) < len(labeled):
        raise ValueError(
            f"labeled must name no node twice, got {values[counts.argmax()]} {counts.max()} times"
        )
    return labeled


def _kappa(confidence: Any, graph: Any, n_labels: int) -> ndarray:
    kappa, _ = numbers("confidence", confidence)
    n = graph.shape[0]
    if kappa.shape not in ((), (n,)):
        raise ValueError(f"confidence must be a number or have shape ({n},) for adjacency, got {kappa.shape}")
    if kappa.min() < 0:
        raise ValueError(f"confidence must be at least 0, got {kappa.min():g}")
    if n_labels == 0 and kappa.max() == 0:
        raise ValueError("confidence must be positive somewhere where labeled is empty, got 0")
    if not np.isfinite(np.asarray(graph.sum(1)).max() + kappa.max()):
        raise ValueError(f"confidence must have a finite sum with adjacency, got {kappa.max():g}")
    return np.broadcast_to(kappa, (n,))
