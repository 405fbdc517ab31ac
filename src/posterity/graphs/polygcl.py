"""PolyGCL: contrastive learning of nodes with a low-pass and a high-pass filter, both learned.

Of a graph's nodes there are two views, through a high-pass and a low-pass filter H and G,

    h_1 = act(H x W + b),      h_2 = act(G x W + b),      Z = alpha h_1 + beta h_2.        (1)

Both views of a node should agree with a summary of the graph, the mean of Z, and the views of
shuffled features should not. Where neighbours are alike the low frequencies carry the class,
where they differ the high ones do, and both are there without a label having said which.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._models import evaluating
from posterity._precision import wide
from posterity._random import draw_device
from posterity._stopping import Best
from posterity.graphs._graph import trains
from posterity.graphs.polynomial_filter import PolynomialFilter, _check_weighted, _Laplacian

__all__ = ["PolyGCL", "fit_polygcl"]


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
        with evaluating(self):
            return self._mixed(*self.views(x, edge_index))

    def _graph(self, x: Tensor, edge_index: Tensor) -> "_Laplacian":
        has_shape("x", floating("x", x), (None, self.in_channels), "this model")
        return _Laplacian(x, _check_weighted(x, edge_index, None), None)

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
        real, false = wide(self._scores(x, x[order], graph, generator)).chunk(2)
        return (-(F.logsigmoid(real).mean() + F.logsigmoid(-false).mean()) / 2).to(x.dtype)


@trains
def fit_polygcl(
    model: PolyGCL,
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    *,
    max_epochs: int = 500,
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
        Trained in place, in float32 at least; afterwards in evaluation mode.
    x : Tensor of shape (nodes, in_channels)
        Features.
    edge_index : Tensor of shape (2, edges)
        Edges.
    max_epochs : int, default=500
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
        If a parameter is out of range, the graph does not fit, the model was made under
        ``torch.inference_mode``, or the loss is not finite.

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
    >>> len(fit_polygcl(model, 20**0.5 * graph.x, graph.edge_index, max_epochs=3))
    3
    """
    integer("max_epochs", max_epochs, 1)
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
    best = Best(model, patience)
    model.train()
    for _ in range(max_epochs):
        optimizer.zero_grad(set_to_none=True)
        loss = model._loss(x, graph, generator)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {len(losses) - 1} steps: lower lr, got {lr}")
        if best.stop(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    best.restore()
    model.eval()
    return losses


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
        dtype = torch.promote_types(x.dtype, torch.float32)
        keep = torch.empty(x.shape, dtype=dtype, device=draw_device(generator, x.device))
        return x * keep.bernoulli_(1 - p, generator=generator).to(x) / (1 - p)


class _Discriminator(nn.Module):
    """The score h^T W c + b of views h with a summary c."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fn = nn.Bilinear(width, width, 1)

    def forward(
        self, views: Float[Tensor, "*sets width"], c: Float[Tensor, " width"]
    ) -> Float[Tensor, "*sets"]:
        return views @ (self.fn.weight[0] @ c) + self.fn.bias
