"""PolyGCL: contrastive learning of nodes with a low-pass and a high-pass filter, both learned.

A filter is a polynomial of the graph's Laplacian L = I - D^-1/2 A D^-1/2, whose
frequencies lie in [0, 2],

    H x = sum_k c_k T_k(L - I) x,   c_k = 2 / (K + 1) sum_j v_j T_k(t_j)   (c_0 halved),   (1)

the Chebyshev interpolant through the values v_j at the K + 1 Chebyshev nodes t_j. Values
that only rise make a high-pass filter, values that only fall a low-pass one; what is
trained is by how much. Both views of a node should agree with a summary of the graph and
the views of shuffled features should not. Where neighbours are alike the low frequencies
carry the class, where they differ the high ones do, and both are there without a label
having said which.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, needs, one_of, within
from posterity._random import draw_device
from posterity.graphs._graph import adjacency, check_graph

__all__ = ["PolyGCL", "PolynomialFilter", "contextual_sbm", "fit_polygcl"]


class PolynomialFilter(nn.Module):
    """A high-pass and a low-pass filter of a graph's frequencies, equation 1.

    Parameters
    ----------
    K : int, default=10
        Degree, at least 1: how many hops a filter sees.
    init_low : float, default=2.0
        Value of the low-pass filter at the lowest node, at least 0.
    init_high : float, default=0.0
        Value of the high-pass filter at the lowest node, at least 0.
    value_range : float, default=2.0
        By how much the high-pass values rise and the low-pass values fall at the start,
        at least 0.
    learn_ends : bool, default=False
        Whether the two values at the lowest node are trained, and passed through relu.
    nonnegative : bool, default=False
        Whether low-pass values are passed through relu; if not, they may fall below 0.
    max_elements : int, default=2**27
        The K + 1 terms of equation 1 are kept while they have at most so many numbers;
        beyond that they are summed one by one, and computed again for the gradient.

    Attributes
    ----------
    initial_val_low, initial_val_high : nn.Parameter
        Scalars; without a gradient unless ``learn_ends``.
    temp_low, temp_high : nn.Parameter
        Shape (K,): the steps from value to value before relu.

    Raises
    ------
    ValueError
        If a parameter is out of range or the graph does not fit.

    Notes
    -----
    1. The steps start equal in the angle of the nodes, so the high-pass filter starts near
       1 + (2 / pi) arcsin(lambda - 1), which is within 0.22 of lambda; high and low sum to
       ``init_low + init_high`` where nothing was trained.
    2. A step that relu has cut to 0 gets no gradient and stays, as published; so does
       ``init_high=0`` with ``learn_ends``.
    3. Self-loops are removed, as from PyG's Laplacian, and an isolated node has the middle
       frequency 1. Edge weights get no gradient.

    References
    ----------
    .. [1] Chen, Lei, Wei. PolyGCL: Graph Contrastive Learning via Learnable Spectral
       Polynomial Filters. ICLR 2024.

    Examples
    --------
    Two joined nodes have the frequencies 0 (their mean) and 2 (their difference):

    >>> import torch
    >>> from posterity.graphs import PolynomialFilter
    >>> edge_index = torch.tensor([[0, 1], [1, 0]])
    >>> filters = PolynomialFilter(K=1)
    >>> filters.values(highpass=True).detach()
    tensor([0., 2.])
    >>> high, low = filters.both(torch.tensor([[1.0], [1.0]]), edge_index)
    >>> high.detach().flatten() + low.detach().flatten()
    tensor([2., 2.])
    """

    table: Tensor

    def __init__(
        self,
        K: int = 10,
        *,
        init_low: float = 2.0,
        init_high: float = 0.0,
        value_range: float = 2.0,
        learn_ends: bool = False,
        nonnegative: bool = False,
        max_elements: int = 2**27,
    ) -> None:
        super().__init__()
        self.K = integer("K", K, 1)
        at_least("init_low", init_low, 0)
        at_least("init_high", init_high, 0)
        at_least("value_range", value_range, 0)
        self.learn_ends, self.nonnegative = learn_ends, nonnegative
        self.max_elements = integer("max_elements", max_elements, 0)
        self.initial_val_low = nn.Parameter(torch.tensor(float(init_low)), requires_grad=learn_ends)
        self.temp_low = nn.Parameter(torch.full((K,), value_range / K))
        self.temp_high = nn.Parameter(torch.full((K,), value_range / K))
        self.initial_val_high = nn.Parameter(torch.tensor(float(init_high)), requires_grad=learn_ends)
        self.register_buffer("table", _interpolation(K).to(self.temp_low), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "PolynomialFilter":
        super()._apply(fn, recurse)
        self.table = _interpolation(self.K).to(self.temp_low)  # a table cast up would keep its rounding
        return self

    def values(self, *, highpass: bool) -> Float[Tensor, " points"]:
        """Return the filter's values at the nodes, in ascending frequency.

        Parameters
        ----------
        highpass : bool
            Which of the two filters.

        Returns
        -------
        Tensor
            Shape (K + 1,), at the frequencies ``1 + cos((K - j + 1/2) pi / (K + 1))``.
        """
        start, temp = (
            (self.initial_val_high, self.temp_high) if highpass else (self.initial_val_low, self.temp_low)
        )
        if self.learn_ends:
            start = start.relu()
        steps = F.pad(temp.relu().cumsum(0), (1, 0))
        values = start + steps if highpass else start - steps
        return values.relu() if self.nonnegative and not highpass else values

    def coefficients(self, *, highpass: bool) -> Float[Tensor, " points"]:
        """Return the Chebyshev coefficients c_k of equation 1.

        Parameters
        ----------
        highpass : bool
            Which of the two filters.

        Returns
        -------
        Tensor
            Shape (K + 1,), as ``numpy.polynomial.chebyshev.chebval`` takes them.
        """
        return self.table @ self.values(highpass=highpass)

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        *,
        highpass: bool = True,
    ) -> Float[Tensor, "nodes features"]:
        """Return the features after one of the filters."""
        _check_weighted(x, edge_index, edge_weight)
        return self._filter(x, _Laplacian(x, edge_index, edge_weight), (highpass,))[0]

    def both(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> tuple[Float[Tensor, "nodes features"], Float[Tensor, "nodes features"]]:
        """Return the features after either filter, for the work of one.

        Parameters
        ----------
        x : Tensor of shape (nodes, features)
            Features.
        edge_index : Tensor of shape (2, edges)
            Edges.
        edge_weight : Tensor of shape (edges,), optional
            Their weights, at least 0.

        Returns
        -------
        high, low : Tensor
            Of the shape of ``x``.
        """
        _check_weighted(x, edge_index, edge_weight)
        high, low = self._filter(x, _Laplacian(x, edge_index, edge_weight), (True, False))
        return high, low

    def _filter(self, x: Tensor, graph: "_Laplacian", which: Sequence[bool]) -> Tensor:
        rows = torch.stack([self.coefficients(highpass=highpass) for highpass in which])
        return _ChebyshevSeries.apply(x, rows.to(x.dtype), graph, self.max_elements)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        return f"K={self.K}, learn_ends={self.learn_ends}, nonnegative={self.nonnegative}"


class PolyGCL(nn.Module):
    """Embeds nodes without labels, by contrasting two learned filters with shuffled features.

    A view of the nodes is ``act(Linear(filter(x)))``, h1 through the high-pass filter and
    h2 through the low-pass one, h3 and h4 alike from features whose rows are shuffled. The
    embedding is ``Z = alpha h1 + beta h2``, the summary ``c = relu(mean over nodes of Z)``;
    the score h^T W c + b should be high for h1 and h2 and low for h3 and h4.

    Scale features to unit order before: the Linear layer does not see features of 1e-2.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int, default=512
        Width of the embedding.
    K : int, default=10
        Degree of the filters.
    dropout : float, default=0.5
        Of filtered features, in [0, 1).
    feature_dropout : float, default=0.5
        Of features before the filter, in [0, 1).
    act : {"relu", "prelu"}, default="relu"
        Activation of the views.
    batch_norm : bool, default=False
        Whether to normalise filtered features over the nodes.
    mix : {"free", "convex"}, default="free"
        Whether alpha and beta are free numbers that start at 1/2, or sigmoid(a) and
        1 - sigmoid(a), where a (named ``alpha`` as well) starts at 0.
    **filter_options : Any
        Passed to `PolynomialFilter`. The authors use ``learn_ends=True,
        nonnegative=True`` and ``mix="convex"`` on contextual stochastic block models, the
        defaults on other graphs.

    Attributes
    ----------
    encoder : nn.Module
        Has ``prop1`` (the filters), ``bn``, ``lin1`` and ``act_fn``, as the published
        code names them.
    disc : nn.Module
        Has ``fn``, the bilinear score.
    alpha, beta : nn.Parameter
        Scalars; no ``beta`` with "convex".

    Raises
    ------
    ValueError
        If a parameter is out of range or the input does not fit.

    Notes
    -----
    1. High-pass and low-pass view share one mask of feature dropout for each input; the
       official code draws one for each of the four. So one recurrence serves all.

    References
    ----------
    .. [1] Chen, Lei, Wei. PolyGCL: Graph Contrastive Learning via Learnable Spectral
       Polynomial Filters. ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import PolyGCL
    >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> x = torch.randn(3, 4)
    >>> model = PolyGCL(4, 16, K=3)
    >>> model.loss(x, edge_index).backward()
    >>> model.embed(x, edge_index).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 512,
        *,
        K: int = 10,
        dropout: float = 0.5,
        feature_dropout: float = 0.5,
        act: Literal["relu", "prelu"] = "relu",
        batch_norm: bool = False,
        mix: Literal["free", "convex"] = "free",
        **filter_options: Any,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        integer("hidden_channels", hidden_channels, 1)
        self.mix = one_of("mix", mix, ("free", "convex"))
        self.encoder = _Encoder(
            PolynomialFilter(K, **filter_options),
            nn.Linear(in_channels, hidden_channels),
            nn.BatchNorm1d(in_channels, momentum=0.01),
            nn.PReLU() if one_of("act", act, ("relu", "prelu")) == "prelu" else nn.ReLU(),
            batch_norm,
            within("dropout", dropout, 0, 1, open_high=True),
            within("feature_dropout", feature_dropout, 0, 1, open_high=True),
        )
        self.disc = _Discriminator(hidden_channels)
        if mix == "free":
            self.alpha, self.beta = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))
        else:
            self.alpha = nn.Parameter(torch.tensor(0.0))

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        shuffled: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
    ) -> Float[Tensor, " scores"]:
        """Return the scores of h2, h1, h4 and h3, those of the nodes one after the other."""
        graph = self._graph(x, edge_index)
        has_shape("shuffled", floating("shuffled", shuffled), x.shape, "x")
        return self._scores(x, shuffled, graph)

    def loss(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the cross-entropy of telling the nodes' views from those of shuffled features.

        Parameters
        ----------
        x : Tensor of shape (nodes, in_channels)
            Features.
        edge_index : Tensor of shape (2, edges)
            Edges.
        generator : torch.Generator, optional
            Decides the shuffle and, in training mode, the dropout.

        Returns
        -------
        Tensor
            A scalar, log 2 for scores that tell nothing.
        """
        return self._loss(x, self._graph(x, edge_index), generator)

    def views(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"]
    ) -> tuple[Float[Tensor, "nodes hidden"], Float[Tensor, "nodes hidden"]]:
        """Return the views through the high-pass and the low-pass filter.

        Parameters
        ----------
        x : Tensor of shape (nodes, in_channels)
            Features.
        edge_index : Tensor of shape (2, edges)
            Edges.

        Returns
        -------
        high, low : Tensor
            Shape (nodes, hidden_channels).
        """
        high, low = self.encoder((x,), self._graph(x, edge_index), None)[0]
        return high, low

    @torch.no_grad()
    def embed(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes hidden"]:
        """Return the embedding Z of each node, in evaluation mode and without a gradient.

        Parameters
        ----------
        x : Tensor of shape (nodes, in_channels)
            Features.
        edge_index : Tensor of shape (2, edges)
            Edges.

        Returns
        -------
        Tensor
            Shape (nodes, hidden_channels).
        """
        training = self.training
        self.eval()
        try:
            return self._mixed(*self.views(x, edge_index))
        finally:
            self.train(training)

    def _graph(self, x: Tensor, edge_index: Tensor) -> "_Laplacian":
        has_shape("x", floating("x", x), (None, self.in_channels), "this model")
        _check_weighted(x, edge_index, None)
        return _Laplacian(x, edge_index, None)

    def _mixed(self, high: Tensor, low: Tensor) -> Tensor:
        if self.mix == "free":
            return self.alpha * high + self.beta * low
        return torch.lerp(low, high, self.alpha.sigmoid())

    def _scores(
        self, x: Tensor, shuffled: Tensor, graph: "_Laplacian", generator: torch.Generator | None = None
    ) -> Tensor:
        views = self.encoder((x, shuffled), graph, generator)  # (2, 2, nodes, hidden)
        summary = self._mixed(*views[0]).mean(0).relu()
        return self.disc(views, summary).flip(1).flatten()  # low before high

    def _loss(self, x: Tensor, graph: "_Laplacian", generator: torch.Generator | None) -> Tensor:
        order = torch.randperm(len(x), generator=generator, device=draw_device(generator, x.device)).to(
            x.device
        )
        real, false = self._scores(x, x[order], graph, generator).chunk(2)
        return -(F.logsigmoid(real).mean() + F.logsigmoid(-false).mean()) / 2


def fit_polygcl(
    model: PolyGCL,
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    *,
    epochs: int = 500,
    patience: int = 20,
    lr: float = 1e-3,
    filter_lr: float = 1e-2,
    weight_decay: float = 0.0,
    filter_weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train a model by Adam on one graph, and leave it with the weights of the lowest loss.

    Parameters
    ----------
    model : PolyGCL
        Trained in place; afterwards in evaluation mode.
    x : Tensor of shape (nodes, in_channels)
        Features.
    edge_index : Tensor of shape (2, edges)
        Edges.
    epochs : int, default=500
        Steps at most, each on the whole graph; at least 1.
    patience : int, default=20
        Steps without a lower loss after which training stops, at least 1.
    lr : float, default=1e-3
        Learning rate, positive.
    filter_lr : float, default=1e-2
        That of the filters, alpha and beta, positive.
    weight_decay : float, default=0.0
        Weight decay, at least 0.
    filter_weight_decay : float, default=0.0
        That of the filters, alpha and beta, at least 0.
    generator : torch.Generator, optional
        Decides shuffles and dropout.

    Returns
    -------
    list of float
        The loss before each step.

    Raises
    ------
    ValueError
        If a parameter is out of range, the graph does not fit, or the loss is not finite.

    Notes
    -----
    1. The weights kept are those that had the lowest loss; the official code keeps those
       one step later.

    References
    ----------
    .. [1] Chen, Lei, Wei. PolyGCL: Graph Contrastive Learning via Learnable Spectral
       Polynomial Filters. ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import PolyGCL, contextual_sbm, fit_polygcl
    >>> graph = contextual_sbm(60, n_features=20, generator=torch.Generator().manual_seed(0))
    >>> model = PolyGCL(20, 8, K=2)
    >>> len(fit_polygcl(model, 20**0.5 * graph.x, graph.edge_index, epochs=3))
    3
    """
    integer("epochs", epochs, 1)
    integer("patience", patience, 1)
    at_least("weight_decay", weight_decay, 0)
    at_least("filter_weight_decay", filter_weight_decay, 0)
    graph = model._graph(x, edge_index)
    slow: list[nn.Parameter] = []
    own: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (own if name in ("alpha", "beta") or name.startswith("encoder.prop1.") else slow).append(parameter)
    optimizer = torch.optim.Adam(
        [
            {"params": slow, "lr": at_least("lr", lr, 0, strict=True), "weight_decay": weight_decay},
            {
                "params": own,
                "lr": at_least("filter_lr", filter_lr, 0, strict=True),
                "weight_decay": filter_weight_decay,
            },
        ]
    )
    losses: list[float] = []
    best, since, kept = math.inf, 0, model.state_dict()
    model.train()
    for _ in range(epochs):
        optimizer.zero_grad(set_to_none=True)
        loss = model._loss(x, graph, generator)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {len(losses) - 1} steps: lower lr, got {lr}")
        if losses[-1] < best:
            best, since = losses[-1], 0
            kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        else:
            since += 1
            if since == patience:
                break
        loss.backward()
        optimizer.step()
    model.load_state_dict(kept)
    model.eval()
    return losses


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


class _Encoder(nn.Module):
    """The views of several inputs, with one recurrence for all; the weights are shared."""

    def __init__(
        self, prop1: PolynomialFilter, lin1: nn.Linear, bn: nn.BatchNorm1d, act_fn: nn.Module,
        batch_norm: bool, dropout: float, feature_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lin1, self.prop1, self.bn, self.act_fn = lin1, prop1, bn, act_fn
        self.batch_norm, self.dropout, self.feature_dropout = batch_norm, dropout, feature_dropout

    def forward(
        self, inputs: Sequence[Tensor], graph: "_Laplacian", generator: torch.Generator | None
    ) -> Float[Tensor, "inputs 2 nodes hidden"]:
        x = self._drop(torch.stack(list(inputs), 1), self.feature_dropout, generator)
        narrows = self.lin1.out_features < self.lin1.in_features
        first = narrows and not self.batch_norm and not (self.training and self.dropout > 0)
        if first:  # a filter acts on nodes and a linear map on features, so the cheaper order will do
            x = F.linear(x, self.lin1.weight)
        z = self.prop1._filter(x.flatten(1), graph, (True, False))  # (2, nodes, inputs * features)
        z = z.unflatten(2, (len(inputs), -1)).permute(2, 0, 1, 3)  # (inputs, 2, nodes, features)
        if first:
            return self.act_fn(z + self.lin1.bias)
        z = self._drop(z, self.dropout, generator)
        if self.batch_norm:  # each view by its own statistics
            z = torch.stack([torch.stack([self.bn(view) for view in views]) for views in z])
        return self.act_fn(self.lin1(z))

    def _drop(self, x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
        if generator is None or not self.training or p == 0:
            return F.dropout(x, p, self.training)
        keep = torch.empty(x.shape, dtype=x.dtype, device=draw_device(generator, x.device))
        return x * keep.bernoulli_(1 - p, generator=generator).to(x.device) / (1 - p)


class _Discriminator(nn.Module):
    """The score h^T W c + b of views h with a summary c."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fn = nn.Bilinear(width, width, 1)

    def forward(
        self, views: Float[Tensor, "*sets width"], c: Float[Tensor, " width"]
    ) -> Float[Tensor, "*sets"]:
        return views @ (self.fn.weight[0] @ c) + self.fn.bias


class _Laplacian:
    """M = L - I = -D^-1/2 A D^-1/2, sparse by receiver; by sender once a gradient asks for it."""

    def __init__(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None) -> None:
        self.n = len(x)
        self.sender, self.receiver = edge_index
        weight = x.new_ones(edge_index.shape[1]) if edge_weight is None else edge_weight.detach().to(x.dtype)
        weight = torch.where(self.sender == self.receiver, 0.0, weight)  # self-loops do not count
        degree = x.new_zeros(self.n).index_add(0, self.sender, weight)
        scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
        self.weight = -scale[self.sender] * weight * scale[self.receiver]
        self.matrix = adjacency(self.sender, self.receiver, self.weight, self.n)

    @cached_property
    def transposed(self) -> Tensor:
        return adjacency(self.receiver, self.sender, self.weight, self.n)


class _ChebyshevSeries(torch.autograd.Function):
    """Sums over k of c_k T_k(M) x for several rows of coefficients c: (rows, nodes, features).

    The terms do not depend on c, so they are computed once for all rows. The gradient to c
    is their product with the gradient; that to x is a series in the transposed M, by
    Clenshaw's recurrence.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, graph: _Laplacian, max_elements: int) -> Tensor:
        x = x.detach().contiguous()
        K = rows.shape[1] - 1
        ctx.graph, ctx.stacked = graph, x.numel() * (K + 1) <= max_elements
        if ctx.stacked:
            terms = x.new_empty(K + 1, *x.shape)
            for _ in _terms(x, graph.matrix, K, out=terms):
                pass
            ctx.save_for_backward(rows, terms)
            return (rows @ terms.flatten(1)).unflatten(1, x.shape)
        ctx.save_for_backward(rows, x)
        total = x.new_zeros(len(rows), *x.shape)
        for k, term in enumerate(_terms(x, graph.matrix, K)):
            for row, sum_ in zip(rows, total, strict=True):
                sum_.addcmul_(row[k], term)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, kept = ctx.saved_tensors
        K = rows.shape[1] - 1
        to_x, to_rows = None, None
        flat = gradient.flatten(1)
        if ctx.needs_input_grad[1]:
            if ctx.stacked:
                to_rows = flat @ kept.flatten(1).T
            else:
                to_rows = torch.stack([flat @ t.flatten() for t in _terms(kept, ctx.graph.matrix, K)], 1)
        if ctx.needs_input_grad[0]:
            M = ctx.graph.transposed
            after, now = torch.zeros_like(gradient[0]), torch.zeros_like(gradient[0])
            for k in range(K, 0, -1):
                own = torch.tensordot(rows[:, k], gradient, 1) - after
                after, now = now, torch.addmm(own, M, now, alpha=2)
            to_x = torch.addmm(torch.tensordot(rows[:, 0], gradient, 1) - after, M, now)
        return to_x, to_rows, None, None


def _terms(x: Tensor, M: Tensor, K: int, out: Tensor | None = None) -> Iterator[Tensor]:
    """Yield T_0(M) x to T_K(M) x, written to ``out`` where that is given."""
    place: Any = [None] * (K + 1) if out is None else out
    before = x if out is None else out[0].copy_(x)
    yield before
    now = torch.mm(M, x, out=place[1])
    yield now
    for k in range(2, K + 1):
        before, now = now, torch.addmm(before, M, now, beta=-1, alpha=2, out=place[k])
        yield now


def _interpolation(K: int) -> Tensor:
    """Return what maps values at ascending Chebyshev nodes to coefficients, in float64."""
    k = torch.arange(K + 1, dtype=torch.float64)
    table = 2 / (K + 1) * torch.cos(k[:, None] * (K - k + 0.5) * math.pi / (K + 1))  # T_k(cos a) = cos k a
    table[0] /= 2
    return table


def _check_weighted(x: Any, edge_index: Any, edge_weight: Any) -> None:
    check_graph(x, edge_index, edge_weight)
    if edge_weight is None:
        return
    if edge_weight.requires_grad:
        raise ValueError("edge_weight must not require a gradient, which this filter does not give it")
    if edge_weight.device.type == "cpu" and edge_weight.numel() and not bool((edge_weight >= 0).all()):
        raise ValueError(f"edge_weight must be at least 0, got {float(edge_weight.min()):g}")
