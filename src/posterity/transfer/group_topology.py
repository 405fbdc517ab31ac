"""Where groups of data lie between each other: distances of their clouds, a graph, and who is on the paths.

Groups whose clouds are near are joined by an edge; the prior of a group is its share of the betweenness

    sum over pairs s, t of  (shortest paths from s to t through v) / (shortest paths from s to t),          (1)

the part of what flows between any two groups that must come through it.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array, csr_array, diags_array, eye_array, kron, vstack
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from posterity._checks import (
    at_least,
    class_indices,
    finite,
    floating,
    has_shape,
    integer,
    one_of,
    scalar,
    within,
)
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["Topology", "distance_graph", "group_distances", "learn_topology", "topology_prior"]

Method = Literal["sliced", "wasserstein", "diffusion"]
AT_ONCE = 2**24  # numbers of the distribution functions held at once


class Topology(NamedTuple):
    """What `learn_topology` finds of g groups.

    Attributes
    ----------
    distances : Tensor of shape (g, g)
    adjacency : Tensor of shape (g, g), 0 or 1
    prior : Tensor of shape (g,)
    """

    distances: Tensor
    adjacency: Tensor
    prior: Tensor


def learn_topology(
    features: Float[Tensor, "n d"], groups: Int[Tensor, " n"], *, percentile: float = 40.0,
    method: Method | Callable[..., Any] = "sliced", generator: torch.Generator | None = None, **kwargs: Any,
) -> Topology:  # fmt: skip
    """Return the topology of groups from features of their samples, each feature scaled to [0, 1].

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Such as the last hidden layer of a network trained on all groups alike for a few epochs; finite.
    groups : Tensor of shape (n,), int
        0 .. g - 1, each with a sample, at least two groups.
    percentile : float, default=40.0
        Of `distance_graph`: the official settings are 80 for 15 groups and 40 for 60.
    method : str or callable, default="sliced"
        Of `group_distances`, which also takes ``**kwargs``.
    generator : torch.Generator, optional
        Draws the directions of ``"sliced"``.
    **kwargs
        Further arguments of `group_distances`.

    Returns
    -------
    Topology
        Distances, the graph made of them, and its prior.

    Raises
    ------
    ValueError
        As `group_distances` and `distance_graph` raise.

    References
    ----------
    .. [1] Qiao and Peng. Topology-aware Robust Optimization for Out-of-Distribution Generalization. ICLR 2023.
       Section 3, "Learning the topology".

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import learn_topology
    >>> line = torch.tensor([[0.0], [1.0], [2.0]])
    >>> learn_topology(line, torch.tensor([0, 1, 2]), percentile=80).prior  # the middle lies between
    tensor([0., 1., 0.])
    """
    _clouds(features, groups)
    low, high = features.aminmax(dim=0)
    scaled = (wide(features) - wide(low)) / (wide(high) - wide(low)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    distances = group_distances(scaled, groups, method=method, generator=generator, **kwargs)
    adjacency = distance_graph(distances, percentile=percentile)
    return Topology(distances, adjacency, topology_prior(adjacency))


def group_distances(
    features: Float[Tensor, "n d"], groups: Int[Tensor, " n"], *, method: Method | Callable[..., Any] = "sliced",
    n_projections: int = 200, max_scale: int = 10, alpha: float = 0.5, n_neighbors: int = 15,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "groups groups"]:  # fmt: skip
    """Return the distance of each two groups as clouds of points.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Finite; the unit of the distances is theirs.
    groups : Tensor of shape (n,), int
        0 .. g - 1, each with a sample, at least two groups.
    method : {"sliced", "wasserstein", "diffusion"} or callable, default="sliced"
        The mean over random directions of the 1-Wasserstein distance along them; the exact 1-Wasserstein distance;
        the distance of the groups' heat on a graph of all points, at many scales; or ``method(a, b) -> float`` of
        two clouds (n_a, d) and (n_b, d).
    n_projections : int, default=200
        Directions of ``"sliced"``, at least 1.
    max_scale : int, default=10
        K of ``"diffusion"``: heat after 1, 2, 4, ... 2^K steps; at least 1.
    alpha : float, default=0.5
        Of ``"diffusion"``: scale k counts ``2^(-(K - k - 1) alpha)``; at least 0.
    n_neighbors : int, default=15
        Of the graph of ``"diffusion"``, at least 1; at most n - 1 are there.
    generator : torch.Generator, optional
        Draws the directions.

    Returns
    -------
    Tensor of shape (g, g)
        Symmetric, zero on the diagonal, of the dtype of the features.

    Raises
    ------
    ValueError
        If features are not finite, groups do not fit, a group has no samples or an option is out of range.

    Notes
    -----
    1. The graph of ``"diffusion"`` has Gaussian kernels whose width is the distance to a point's last neighbour; the
       official code calls a package for it. Only the ranks of the distances matter to `distance_graph`.

    References
    ----------
    .. [1] Tong et al. Diffusion Earth Mover's Distance. ICML 2021. Definition 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import group_distances
    >>> x, groups = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([0, 0, 1, 1])
    >>> group_distances(x, groups)  # on a line each direction is the line
    tensor([[0., 3.],
            [3., 0.]])
    """
    n_groups = _clouds(features, groups)
    if not callable(method):
        one_of("method", method, ("sliced", "wasserstein", "diffusion"))
    integer("n_projections", n_projections, 1)
    integer("max_scale", max_scale, 1)
    at_least("alpha", alpha, 0)
    integer("n_neighbors", n_neighbors, 1)
    x, groups = wide(features.detach()), groups.long()
    if method == "sliced":
        found = _sliced(x, groups, n_groups, n_projections, generator)
    elif method == "diffusion":
        heat = _diffused(x.double().cpu().numpy(), groups.cpu().numpy(), max_scale, alpha, n_neighbors)
        found = torch.from_numpy(cdist(heat, heat, "cityblock"))
    else:
        measure = _wasserstein if method == "wasserstein" else method
        clouds = [x[groups == k] for k in range(n_groups)]
        found = torch.zeros(n_groups, n_groups, dtype=torch.float64)
        for i, j in combinations(range(n_groups), 2):
            distance = torch.as_tensor(measure(clouds[i], clouds[j]), dtype=torch.float64)
            found[i, j] = found[j, i] = float(scalar("method", distance))
    return found.fill_diagonal_(0).to(features)


def distance_graph(
    distances: Float[Tensor, "groups groups"], *, percentile: float = 40.0
) -> Float[Tensor, "groups groups"]:
    """Join the groups whose distance is below a percentile of all entries, the zeros of the diagonal among them.

    Parameters
    ----------
    distances : Tensor of shape (g, g)
        Symmetric, non-negative, zero on the diagonal; g at least 2.
    percentile : float, default=40.0
        In (0, 100].

    Returns
    -------
    Tensor of shape (g, g)
        1 for an edge, else 0; symmetric, without loops.

    Raises
    ------
    ValueError
        If distances are none, or the percentile is out of range.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import distance_graph
    >>> distance_graph(torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]), percentile=100)
    tensor([[0., 1., 0.],
            [1., 0., 1.],
            [0., 1., 0.]])
    """
    _square("distances", floating("distances", distances))
    within("percentile", percentile, 0, 100, open_low=True)
    exact = wide(distances.detach()).double()
    if bool(exact.diagonal().any()):
        raise ValueError("distances must be 0 on the diagonal")
    # like numpy's linear percentile, but of an entry of its own dtype: rounding must not move an edge
    cut = torch.quantile(exact.flatten(), percentile / 100)
    return ((exact < cut) & ~torch.eye(len(exact), dtype=torch.bool, device=exact.device)).to(distances)


def topology_prior(
    adjacency: Float[Tensor, "groups groups"] | Int[Tensor, "groups groups"] | Bool[Tensor, "groups groups"],
    *, sources: Sequence[int] | None = None,
) -> Float[Tensor, " some"]:  # fmt: skip
    """Return each group's share of the betweenness (1), its place on shortest paths between others.

    Parameters
    ----------
    adjacency : Tensor of shape (g, g)
        Symmetric, non-negative; what is not 0 is an edge, loops do not count.
    sources : sequence of int, optional
        The groups that are trained on, some but not all: then only paths from one of these to another group count,
        and the shares are those of the sources. By default all paths, and all groups.

    Returns
    -------
    Tensor of shape (g,) or (len(sources),)
        Sums to 1; uniform where no group lies between any two. Of the dtype of a floating adjacency, else the default.

    Raises
    ------
    ValueError
        If the adjacency is not square, symmetric and non-negative, or sources are empty, repeated, out of range or all.

    References
    ----------
    .. [1] Qiao and Peng. ICLR 2023. Equation 5.
    .. [2] Brandes. A Faster Algorithm for Betweenness Centrality. 2001. Theorem 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import topology_prior
    >>> path = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> topology_prior(path), topology_prior(path, sources=[0, 1])  # to the third, all goes through the second
    (tensor([0., 1., 0.]), tensor([0., 1.]))
    """
    if not isinstance(adjacency, Tensor) or adjacency.is_complex():
        raise ValueError(
            f"adjacency must be a tensor of numbers, got {getattr(adjacency, 'dtype', type(adjacency).__name__)}"
        )
    _square("adjacency", adjacency)
    n = len(adjacency)
    starts = torch.arange(n)
    ends = torch.ones(n, dtype=torch.bool)
    if sources is not None:
        chosen = [integer("sources", k, 0) for k in sources]
        if not chosen or len(set(chosen)) != len(chosen) or max(chosen) >= n or len(chosen) == n:
            raise ValueError(f"sources must be some, not all, different groups of 0..{n - 1}, got {chosen}")
        starts = torch.tensor(chosen)
        ends[starts] = False
    edges = (adjacency.detach() != 0).cpu().double().fill_diagonal_(0)
    share = _betweenness(edges, starts, ends.double())[starts]
    total = share.sum()
    share = share / total if total > 0 else torch.full_like(share, 1 / len(share))
    dtype = adjacency.dtype if adjacency.is_floating_point() else torch.get_default_dtype()
    return share.to(adjacency.device, dtype)


def _betweenness(edges: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Return the sum over starts s and ends t of the share of shortest paths through each other node, (g,).

    All starts search at once: a level of the breadth-first search is one product with the edges.
    """
    level = torch.zeros(len(starts), len(edges), dtype=edges.dtype)
    level[torch.arange(len(starts)), starts] = 1  # number of shortest paths to the nodes of this level
    levels, seen = [level], level > 0
    while bool((level := (level @ edges).masked_fill(seen, 0)).any()):
        levels.append(level)
        seen = seen | (level > 0)
    through = torch.zeros_like(levels[0])
    for before, level in zip(levels[-2::-1], levels[:0:-1], strict=True):
        # a node hands on what ends in it and what goes through it, in the shares of the paths by which they came
        share = torch.where(level > 0, (ends + through) / level.clamp_min(1), 0)
        through = through + before * (share @ edges)
    through[torch.arange(len(starts)), starts] = 0
    return through.sum(0)


def _sliced(
    x: Tensor, groups: Tensor, n_groups: int, n_projections: int, generator: torch.Generator | None
) -> Tensor:
    """Return the mean over directions of the area between the groups' distribution functions."""
    drawn = torch.randn(
        x.shape[1], n_projections, generator=generator, device=draw_device(generator, x.device)
    )
    directions = torch.nn.functional.normalize(drawn.to(x), dim=0)
    counts = torch.bincount(groups, minlength=n_groups)
    member = torch.nn.functional.one_hot(groups, n_groups).to(x) / counts
    total = x.new_zeros(n_groups, n_groups)
    for some in directions.split(max(1, AT_ONCE // (len(x) * n_groups)), dim=1):
        along, order = (x @ some).sort(dim=0)  # (n, directions)
        below = member[order].cumsum(0)[:-1]  # (n - 1, directions, groups): share of each group up to here
        steps = below * along.diff(dim=0)[..., None]
        flat = steps.permute(2, 0, 1).reshape(n_groups, -1)
        total += torch.cdist(flat, flat, p=1)
    return total / n_projections


def _wasserstein(a: Tensor, b: Tensor) -> float:
    """Return the exact 1-Wasserstein distance of two clouds: a matching, or a transport of unlike numbers."""
    cost = cdist(a.double().cpu().numpy(), b.double().cpu().numpy())
    n, m = cost.shape
    if n == m:
        return float(cost[linear_sum_assignment(cost)].mean())
    leaves, arrives = kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))
    amounts = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return float(linprog(cost.ravel(), A_eq=vstack([leaves, arrives]), b_eq=amounts, method="highs").fun)


def _diffused(
    x: np.ndarray, groups: np.ndarray, max_scale: int, alpha: float, n_neighbors: int
) -> np.ndarray:
    """Return the embedding (g, scales * n) whose L1 distances are those of the groups' heat at all scales."""
    n = len(x)
    near, index = NearestNeighbors(n_neighbors=min(n_neighbors, n - 1)).fit(x).kneighbors()
    width = np.maximum(near[:, -1:], np.finfo(float).tiny)
    kernel = csr_array(
        (np.exp(-((near / width) ** 2)).ravel(), index.ravel(), np.arange(n + 1) * index.shape[1]),
        shape=(n, n),
    )
    kernel = kernel + kernel.T + diags_array(np.ones(n), format="csr")
    walk = (diags_array(1 / kernel.sum(1)) @ kernel).T.tocsr()  # columns sum to 1: heat is kept
    counts = np.bincount(groups)
    heat = coo_array((1 / counts[groups], (np.arange(n), groups))).toarray()
    parts, done = [], 0
    for k in range(max_scale + 1):
        before = heat
        for _ in range(2**k - done):
            heat = walk @ heat
        done = 2**k
        if k:
            parts.append(2 ** (-(max_scale - k) * alpha) * (heat - before))
    return np.concatenate([*parts, heat]).T


def _clouds(features: Any, groups: Any) -> int:
    """Return how many groups there are; each has points, and all points are finite."""
    floating("features", features)
    has_shape("features", features, (None, None))
    class_indices("groups", groups, len(features))
    if not features.numel():
        raise ValueError(f"features must hold samples and features, got shape {tuple(features.shape)}")
    finite("features", features)
    low, high = (int(end) for end in groups.aminmax())
    if low < 0 or high < 1:
        raise ValueError(f"groups must be at least two, numbered from 0, got values from {low} to {high}")
    counts = torch.bincount(groups)
    if not bool(counts.all()):
        raise ValueError(f"groups must each have samples, group {int((counts == 0).nonzero()[0])} has none")
    return high + 1


def _square(name: str, value: Tensor) -> None:
    """Refuse what is not a square, symmetric, non-negative, finite matrix of at least two rows."""
    if value.ndim != 2 or value.shape[0] != value.shape[1] or len(value) < 2:
        raise ValueError(f"{name} must be square with at least two rows, got shape {tuple(value.shape)}")
    if value.is_floating_point():
        finite(name, value)
        slack = 8 * torch.finfo(value.dtype).eps * float(value.abs().amax())
    else:
        slack = 0.0
    exact = value.detach().double()
    if bool((exact < 0).any()):
        raise ValueError(f"{name} must not be negative")
    if bool(((exact - exact.T).abs() > slack).any()):
        raise ValueError(f"{name} must be symmetric")
