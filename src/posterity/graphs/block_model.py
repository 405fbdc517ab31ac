"""A contextual stochastic block model whose two classes show in the edges, the features or both.

With signs y of the classes, edges (i, j) and features x_i are drawn by

    P(i ~ j) = (degree + sqrt(degree) l y_i y_j) / n,      x_i = sqrt(m / n) y_i u + noise,      (1)

where 1 + epsilon = l^2 + m^2 n_features / n is shared as sin^2 and cos^2 of phi pi / 2. So phi
moves the class between the features and the edges, which join like nodes above 0 and unlike
ones below, while what both tell together stays the same.
"""

import math
from typing import Any

import torch

from posterity._checks import at_least, integer, needs, within
from posterity._random import draw_device

__all__ = ["contextual_sbm"]


def contextual_sbm(
    n: int = 800,
    *,
    degree: float = 5.0,
    n_features: int = 1000,
    phi: float = 0.5,
    epsilon: float = 3.25,
    generator: torch.Generator | None = None,
) -> Any:
    """Draw a contextual stochastic block model: two classes in the edges and in the features.

    Nodes of a class are joined with probability ``(degree + sqrt(degree) l) / n``, others
    with ``(degree - sqrt(degree) l) / n``, where ``l = sqrt(1 + epsilon) sin(phi pi / 2)``;
    features are ``sqrt(m / n) y u + z / sqrt(n_features)`` with normal z, one direction u
    and ``m = sqrt((1 + epsilon) n / n_features) cos(phi pi / 2)``. What edges and features
    tell together is the same for every phi.

    Parameters
    ----------
    n : int, default=800
        Nodes, at least 2; the first half are of class 1, the others of class 0.
    degree : float, default=5.0
        Expected degree, positive.
    n_features : int, default=1000
        Features of a node, at least 1; of the size ``1 / sqrt(n_features)``.
    phi : float, default=0.5
        In [-1, 1]: below 0 unlike nodes are joined, above 0 like ones; at 0 only the
        features tell the class, at -1 and 1 only the edges.
    epsilon : float, default=3.25
        How far above the threshold of detection, at least 0.
    generator : torch.Generator, optional
        Decides the graph.

    Returns
    -------
    torch_geometric.data.Data
        Has ``x``, ``edge_index`` (both directions, no self-loops) and ``y``.

    Raises
    ------
    ValueError
        If a parameter is out of range or a probability would not lie in [0, 1].

    References
    ----------
    .. [1] Deshpande, Montanari, Mossel, Sen. Contextual Stochastic Block Models. NeurIPS 2018.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import contextual_sbm
    >>> graph = contextual_sbm(100, n_features=20, generator=torch.Generator().manual_seed(0))
    >>> graph.x.shape, int(graph.y.sum())
    (torch.Size([100, 20]), 50)
    """
    integer("n", n, 2)
    integer("n_features", n_features, 1)
    at_least("degree", degree, 0, strict=True)
    within("phi", phi, -1, 1)
    at_least("epsilon", epsilon, 0)
    data = needs("torch_geometric.data", "graphs")
    signal = math.sqrt(1 + epsilon) * math.sin(phi * math.pi / 2)
    swing = math.sqrt(degree) * signal
    if abs(swing) > degree or degree + abs(swing) > n:
        low, high = (degree - abs(swing)) / n, (degree + abs(swing)) / n
        raise ValueError(
            f"degree and phi must give edge probabilities in [0, 1], got {low:g} and {high:g} "
            f"for degree={degree}, phi={phi}, epsilon={epsilon}, n={n}"
        )
    device = draw_device(generator)
    y = torch.ones(n, device=device)
    y[n // 2 :] = -1
    # The cells of the adjacency matrix that are hit with the larger probability, by the
    # gaps between them; then the upper triangle, thinned to each cell's own probability.
    p = (degree + abs(swing)) / n
    mean = p * n * n
    u = torch.rand(int(mean + 10 * mean**0.5) + 20, generator=generator, device=device, dtype=torch.float64)
    gaps = (torch.log1p(-u) / math.log1p(-p)).floor() if p < 1 else torch.zeros_like(u)
    cell = (gaps + 1).cumsum(0).long() - 1
    row, column = cell // n, cell % n
    own = (degree + swing * y[row.clamp_max(n - 1)] * y[column]) / n
    hit = torch.rand(len(u), generator=generator, device=device, dtype=torch.float64) * p < own
    edges = torch.stack([row, column])[:, hit & (row < column) & (row < n)]
    strength = math.sqrt((1 + epsilon) * n / n_features) * max(math.cos(phi * math.pi / 2), 0.0)
    direction = torch.randn(n_features, generator=generator, device=device) / math.sqrt(n_features)
    noise = torch.randn(n, n_features, generator=generator, device=device) / math.sqrt(n_features)
    x = math.sqrt(strength / n) * y[:, None] * direction + noise
    return data.Data(x=x, edge_index=torch.cat([edges, edges.flip(0)], 1), y=(y > 0).long())
