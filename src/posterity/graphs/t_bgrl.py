"""T-BGRL: link prediction without negative samples, repelled by a corrupted graph.

Two augmented views of a graph go through an online encoder with a predictor (q) and a slowly
following target encoder (y). Bootstrapping pulls q of one view to y of the other; a third,
corrupted view n, sent through the target alone, pushes away and needs no pairs:

    loss = lambda (cos(q1, n) + cos(q2, n)) - (1 - lambda) (cos(q1, y2) + cos(q2, y1)),  (1)

cos being the mean cosine over nodes. At lambda = 0 it is BGRL's loss less 2. What it buys is
that embeddings of nodes which come after training can still be told apart.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of, within
from posterity._models import evaluating
from posterity._precision import wide, widened
from posterity.graphs._graph import check_edges, trains
from posterity.graphs.gcn_encoder import GCNEncoder
from posterity.graphs.graph_views import CORRUPTIONS, Corruption, View, _augment, _corrupt, _SparseFeatures

__all__ = ["TBGRL", "bgrl_loss", "cosine_schedule", "fit_tbgrl", "tbgrl_loss"]


@widened
def bgrl_loss(
    q1: Float[Tensor, "nodes d"], y2: Float[Tensor, "nodes d"], q2: Float[Tensor, "nodes d"],
    y1: Float[Tensor, "nodes d"],
) -> Float[Tensor, ""]:  # fmt: skip
    """Return ``2 - cos(q1, y2) - cos(q2, y1)``, BGRL's loss.

    Parameters
    ----------
    q1, y2, q2, y1 : Tensor
        Predictions q and targets y of the two views.

    Returns
    -------
    Tensor
        A scalar in [0, 4].

    References
    ----------
    .. [1] Thakoor et al. Large-scale representation learning on graphs via bootstrapping.
       ICLR 2022.
    """
    _same_shape(q1=q1, y2=y2, q2=q2, y1=y1)
    return 2 - _cosine(q1, y2) - _cosine(q2, y1)


@widened
def tbgrl_loss(
    q1: Float[Tensor, "nodes d"], y2: Float[Tensor, "nodes d"], q2: Float[Tensor, "nodes d"],
    y1: Float[Tensor, "nodes d"], negative: Float[Tensor, "nodes d"], *, neg_lambda: float = 0.12,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the loss (1).

    Parameters
    ----------
    q1, y2, q2, y1 : Tensor
        Predictions q and targets y of the two views.
    negative : Tensor
        Target of the corrupted view.
    neg_lambda : float, default=0.12
        Weight of the repulsion, in [0, 1].

    Returns
    -------
    Tensor
        A scalar in [-2, 2].

    References
    ----------
    .. [1] Shiao et al. Link Prediction with Non-Contrastive Learning. ICLR 2023. Section 5.
    """
    _same_shape(q1=q1, y2=y2, q2=q2, y1=y1, negative=negative)
    within("neg_lambda", neg_lambda, 0, 1)
    apart = _cosine(q1, negative) + _cosine(q2, negative)
    return neg_lambda * apart - (1 - neg_lambda) * (_cosine(q1, y2) + _cosine(q2, y1))


class TBGRL(nn.Module):
    """Online encoder, predictor and target encoder, trained by (1).

    Parameters
    ----------
    encoder : nn.Module
        ``encoder(x, edge_index)`` returns (nodes, out_channels); it or parts of it have
        ``reset_parameters``, by which the target starts from weights of its own.
    out_channels : int
        Width of embeddings.
    predictor_hidden : int, default=512
        Width of the predictor's hidden layer.
    neg_lambda : float, default=0.12
        Weight of the repulsion, in [0, 1].

    Attributes
    ----------
    online_encoder, target_encoder : nn.Module
        The first is trained and embeds; the second follows it, see `update_target`.
    predictor : nn.Sequential
        Linear, PReLU, Linear.

    Raises
    ------
    ValueError
        If nothing in the encoder has ``reset_parameters``, or a parameter is out of range.

    References
    ----------
    .. [1] Shiao et al. Link Prediction with Non-Contrastive Learning. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import GCNEncoder, TBGRL, augment_graph, corrupt_graph
    >>> x, edge_index = torch.rand(4, 5), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    >>> model = TBGRL(GCNEncoder(5, 8, 8), 8)
    >>> views = [augment_graph(x, edge_index, drop_edge=0.5, drop_feature=0.2) for _ in range(2)]
    >>> model.loss(*views, corrupt_graph(x, edge_index)).backward()
    """

    def __init__(
        self, encoder: nn.Module, out_channels: int, *, predictor_hidden: int = 512, neg_lambda: float = 0.12
    ) -> None:
        super().__init__()
        integer("out_channels", out_channels, 1)
        integer("predictor_hidden", predictor_hidden, 1)
        self.neg_lambda = within("neg_lambda", neg_lambda, 0, 1)
        self.online_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder)
        _reset(self.target_encoder)
        self.target_encoder.requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(out_channels, predictor_hidden), nn.PReLU(), nn.Linear(predictor_hidden, out_channels)
        )

    def loss(self, view1: View, view2: View, corrupted: View | None = None) -> Float[Tensor, ""]:
        """Return the loss of two views, repelled by a third.

        Parameters
        ----------
        view1, view2 : tuple of Tensor
            ``(x, edge_index)`` of two augmented graphs.
        corrupted : tuple of Tensor, optional
            A corrupted graph; without it the loss is BGRL's.

        Returns
        -------
        Tensor
            A scalar.
        """
        for name, view in (("view1", view1), ("view2", view2), ("corrupted", corrupted)):
            if view is not None:
                has_shape(f"{name}[0]", floating(f"{name}[0]", view[0]), (None, None))
                check_edges(view[1], len(view[0]), name=f"{name}[1]")
        return self._loss(view1, view2, corrupted)

    def _loss(self, view1: View, view2: View, corrupted: View | None) -> Tensor:
        # wide, so that autocast does not round the loss
        q1, q2 = (wide(self.predictor(self._encoded(view))) for view in (view1, view2))
        with torch.no_grad():
            y1, y2 = wide(self.target_encoder(*view1)), wide(self.target_encoder(*view2))
            negative = None if corrupted is None else wide(self.target_encoder(*corrupted))
        if negative is None:
            return bgrl_loss(q1, y2, q2, y1).to(view1[0].dtype)
        return tbgrl_loss(q1, y2, q2, y1, negative, neg_lambda=self.neg_lambda).to(view1[0].dtype)

    def _encoded(self, view: View) -> Tensor:
        wanted = len(view[0]), self.predictor[0].in_features
        return has_shape("encoder(x, edge_index)", self.online_encoder(*view), wanted, "out_channels")  # type: ignore[arg-type]

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target's parameters: ``momentum * target + (1 - momentum) * online``.

        Buffers, such as the statistics of batch normalisation, are left to the target.

        Parameters
        ----------
        momentum : float
            In [0, 1].
        """
        within("momentum", momentum, 0, 1)
        pairs = zip(self.target_encoder.parameters(), self.online_encoder.parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online, 1 - momentum)

    @torch.no_grad()
    def embed(
        self, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes out"]:
        """Return embeddings of the online encoder, in eval mode, without gradient.

        Parameters
        ----------
        x, edge_index : Tensor
            Any graph, also one with nodes that training has not seen.

        Returns
        -------
        Tensor
        """
        with evaluating(self.online_encoder) as encoder:
            return encoder(x, edge_index)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimiser should train: online encoder and predictor.

        Yields
        ------
        nn.Parameter
        """
        yield from self.online_encoder.parameters()
        yield from self.predictor.parameters()


def cosine_schedule(step: int, max_value: float, warmup_steps: int, total_steps: int) -> float:
    """Return a value that rises linearly to its maximum and falls to 0 along a half cosine.

    Parameters
    ----------
    step : int
        In [0, total_steps].
    max_value : float
        Reached after the warm-up.
    warmup_steps, total_steps : int
        The first may be 0 and is below the second.

    Returns
    -------
    float
        The value at ``step``.

    Examples
    --------
    >>> from posterity.graphs import cosine_schedule
    >>> [round(cosine_schedule(step, 1.0, 2, 6), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    integer("warmup_steps", warmup_steps, 0)
    if not integer("total_steps", total_steps) > warmup_steps:
        raise ValueError(f"total_steps must be above warmup_steps, got {total_steps} and {warmup_steps}")
    if not 0 <= integer("step", step) <= total_steps:
        raise ValueError(f"step must be in [0, {total_steps}], got {step}")
    if step < warmup_steps:
        return max_value * step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return max_value * (1 + math.cos(math.pi * done)) / 2


@trains
def fit_tbgrl(
    model: TBGRL, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 edges"], *,
    max_epochs: int = 10_000, lr: float = 0.015, warmup_steps: int = 1000, momentum: float = 0.91, weight_decay: float = 1e-5,
    drop_edge: tuple[float, float] = (0.8, 0.8), drop_feature: tuple[float, float] = (0.8, 0.1),
    corruption: Corruption | None = "shuffle-features+random-edges", patience: int | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:  # fmt: skip
    """Train a model in place on one graph, in float32 at least, and return its losses.

    Parameters
    ----------
    model : TBGRL
        On the device of the graph.
    x, edge_index : Tensor
        The graph that training sees.
    max_epochs : int, default=10_000
        Steps at most, each on the whole graph.
    lr : float, default=0.015
        Of AdamW; it warms up and falls along a cosine.
    warmup_steps : int, default=1000
        Steps of the warm-up, fewer than ``max_epochs``.
    momentum : float, default=0.91
        Of the target at the start, from where it rises to 1.
    weight_decay : float, default=1e-5
        Of AdamW.
    drop_edge, drop_feature : tuple of float
        Probabilities for the two views, see `augment_graph`.
    corruption : str or None, default="shuffle-features+random-edges"
        See `corrupt_graph`; None is plain BGRL.
    patience : int, optional
        Stop after so many steps without a loss lower by 0.01.
    generator : torch.Generator, optional
        Decides views and corruptions.

    Returns
    -------
    list of float
        One a step.

    Raises
    ------
    ValueError
        If a parameter is out of range, a feature not finite, or the model was made under
        ``torch.inference_mode``.

    Notes
    -----
    The authors' settings for Cora are the defaults; CiteSeer: lr 0.008, momentum 0.94,
    ``neg_lambda=0.24``, edges (0.7, 0.3), features (0.9, 0.4), random features and edges.
    Features should have rows that sum to 1.
    """
    integer("max_epochs", max_epochs, 1)
    at_least("lr", lr, 0, strict=True)
    at_least("weight_decay", weight_decay, 0)
    within("momentum", momentum, 0, 1)
    if not integer("warmup_steps", warmup_steps, 0) < max_epochs:
        raise ValueError(f"warmup_steps must be below max_epochs, got {warmup_steps} and {max_epochs}")
    if corruption is not None:
        one_of("corruption", corruption, CORRUPTIONS)
    if patience is not None:
        integer("patience", patience, 1)
    for name, pair in (("drop_edge", drop_edge), ("drop_feature", drop_feature)):
        for value in pair:
            within(name, value, 0, 1, open_high=True)
    has_shape("x", finite("x", floating("x", x)), (None, None))
    edge_index = check_edges(edge_index, len(x), source="x", read=True)
    features: Any = x
    if (
        isinstance(model.online_encoder, GCNEncoder)
        and x.device.type == "cpu"
        and (x != 0).float().mean() < 0.1
    ):
        features = _SparseFeatures.of(x)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=lr, weight_decay=weight_decay)
    losses, best, idle = [], math.inf, 0
    model.train()
    for step in range(max_epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, lr, warmup_steps, max_epochs)
        first, second = (
            _augment(features, edge_index, edge, feature, generator)
            for edge, feature in zip(drop_edge, drop_feature, strict=True)
        )
        third = None if corruption is None else _corrupt(features, edge_index, corruption, generator)
        loss = model._loss(first, second, third)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(1 - cosine_schedule(step, 1 - momentum, 0, max_epochs))
        losses.append(float(loss.detach()))
        idle = 0 if losses[-1] < best - 0.01 else idle + 1
        best = losses[-1] if idle == 0 else best
        if patience is not None and idle >= patience:
            break
    model.eval()
    return losses


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(_of_unit_size(a), _of_unit_size(b), dim=-1, eps=1e-8).mean()


def _of_unit_size(x: Tensor) -> Tensor:
    """Return rows divided by a power of two, which rounds nothing, so that eps meets rows of zeros alone."""
    top = x.detach().abs().amax(-1, keepdim=True)
    return x * torch.ldexp(torch.ones_like(top), -torch.frexp(top).exponent.clamp_min(-126))


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(floating(name, tensor).shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"predictions and targets must have one shape, got {shapes}")
    if next(iter(shapes.values()))[-1:] == (0,):
        raise ValueError(f"predictions and targets must have at least one feature, got {shapes}")


def _reset(encoder: nn.Module) -> None:
    if hasattr(encoder, "reset_parameters"):
        encoder.reset_parameters()  # type: ignore[operator]
        return
    parts = [part for part in encoder.modules() if hasattr(part, "reset_parameters")]
    if not parts:
        raise ValueError(
            f"encoder must have reset_parameters, or parts that have, so that the target starts apart; got {type(encoder).__name__}"
        )
    for part in parts:
        part.reset_parameters()  # type: ignore[operator]
