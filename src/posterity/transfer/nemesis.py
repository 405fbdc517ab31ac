"""Nemesis: a penalty on the norms of soft prompts, which grow while accuracy falls.

    loss = cross-entropy + omega(E) (beta PUN + (1 - beta) PAN) ,                                        (1)
    N(w) = sum_i w_i ||v_i||_p / number of i with w_i != 0 .                                             (2)

PUN weighs all M vectors alike, N(alpha, ..., alpha). PAN weighs those whose norm is too large *now*: position i counts
if multiplying v_i by a number below 1 makes more predictions of the batch right. omega falls from 1 to 0 over the
epochs E: norms are kept small first, accuracy decides last.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, floating, has_shape, integer, one_of, within
from posterity._precision import widened
from posterity._random import draw_device
from posterity.transfer.prompt_learner import PromptLearner

__all__ = ["NemesisLoss", "low_norm_positions", "normalization_schedule", "prompt_norm"]


class NemesisLoss(nn.Module):
    """Cross-entropy of soft prompts and the penalty (1) on their norms.

    Parameters
    ----------
    alpha : float, default=1.0
        Weight of a vector that counts, at least 0.
    beta : float, default=1.0
        Share of PUN, in [0, 1]: 1 needs no further pass of the text tower, 0 is PAN alone.
    p : {1, 2, inf}, default=2.0
        Of the norms.
    corruption : float, default=0.5
        By what PAN multiplies a vector to see whether it counts, at least 0.
    n_positions : int or None, default=1
        How many positions PAN draws and looks at, at least 1 and at most M; None is all.
    schedule : bool, default=True
        Whether omega falls over the epochs; False is 1 throughout.
    rate : float, default=0.2
        How steeply it falls, at least 0.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit the prompts.

    Notes
    -----
    1. With contexts of their own the norms of all classes add up, while the count in (2) is that of positions: the
       penalty grows with the number of classes, as in the official code.

    References
    ----------
    .. [1] Fu, Wang, Huang and Zhang. Nemesis: Normalizing the Soft-prompt Vectors of Vision-Language Models.
       ICLR 2024. Section 3.3, equations 4 to 6.

    Examples
    --------
    >>> from posterity.transfer import NemesisLoss
    >>> NemesisLoss(alpha=0.1, beta=0.3)
    NemesisLoss(alpha=0.1, beta=0.3, p=2.0, corruption=0.5, n_positions=1)
    """

    def __init__(
        self, *, alpha: float = 1.0, beta: float = 1.0, p: float = 2.0, corruption: float = 0.5,
        n_positions: int | None = 1, schedule: bool = True, rate: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.alpha = at_least("alpha", alpha, 0)
        self.beta = within("beta", beta, 0, 1)
        self.p = _order(p)
        self.corruption = at_least("corruption", corruption, 0)
        self.n_positions = None if n_positions is None else integer("n_positions", n_positions, 1)
        self.schedule = one_of("schedule", schedule, (True, False))
        self.rate = at_least("rate", rate, 0)

    def forward(
        self, prompts: PromptLearner, image_features: Float[Tensor, "n d"], y: Int[Tensor, " n"], *, epoch: int = 0,
        max_epoch: int = 1, generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the loss of a batch.

        Parameters
        ----------
        prompts : PromptLearner
        image_features : Tensor of shape (n, d)
            Of the batch, made by the prompts' model.
        y : Tensor of shape (n,)
            Classes, indices into ``prompts.class_names``.
        epoch, max_epoch : int
            From 0, and how many: what omega is computed from.
        generator : torch.Generator, optional
            Draws the positions.

        Returns
        -------
        Tensor
            Scalar.
        """
        omega = normalization_schedule(epoch, max_epoch, rate=self.rate) if self.schedule else 1.0
        _batch(prompts, image_features, y, self.n_positions)
        logits = prompts(image_features=image_features)
        loss = F.cross_entropy(logits, y)
        if not self.alpha or not omega:
            return loss
        context = prompts.context
        if self.beta:
            uniform = context.new_full((context.shape[-2],), self.alpha)
            loss = loss + omega * self.beta * prompt_norm(context, uniform, p=self.p)
        if self.beta < 1:
            right = (logits.detach().argmax(1) == y).sum()
            found = _better(prompts, image_features, y, self.n_positions, self.corruption, generator, right)
            loss = loss + omega * (1 - self.beta) * prompt_norm(
                context, self.alpha * found.to(context), p=self.p
            )
        return loss

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)}" for name in ("alpha", "beta", "p", "corruption", "n_positions")
        )


@widened
def prompt_norm(
    context: Float[Tensor, "*classes m w"], weights: Float[Tensor, " m"] | None = None, *, p: float = 2.0
) -> Float[Tensor, ""]:
    """Return the weighted norms of prompt vectors over how many count, equation 2.

    Parameters
    ----------
    context : Tensor of shape (M, w) or (C, M, w)
        Shared by all classes, or one for each.
    weights : Tensor of shape (M,), optional
        Of the positions; by default 1.
    p : {1, 2, inf}, default=2.0

    Returns
    -------
    Tensor
        Scalar; the norms of all classes add up, the count is that of positions (1 where none counts).

    Raises
    ------
    ValueError
        If ``weights`` has not a number a position, or ``p`` is another.

    References
    ----------
    .. [1] Fu, Wang, Huang and Zhang. ICLR 2024. Equation 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import prompt_norm
    >>> context = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    >>> prompt_norm(context), prompt_norm(context, torch.tensor([1.0, 0.0, 0.0]))
    (tensor(5.), tensor(5.))
    """
    p = _order(p)
    if floating("context", context).ndim < 2:
        raise ValueError(f"context must have shape (M, w) or (C, M, w), got {tuple(context.shape)}")
    if not context.numel():
        raise ValueError(f"context must hold vectors, got shape {tuple(context.shape)}")
    largest = context.detach().abs().amax(-1, keepdim=True)
    unit = torch.exp2(
        torch.frexp(largest).exponent.to(context).clamp(-120, 120)
    )  # squares overflow, a power of two rounds nothing
    norms = torch.linalg.vector_norm(context / unit, ord=p, dim=-1) * unit[..., 0]
    if weights is None:
        weights = context.new_ones(context.shape[-2])
    has_shape("weights", floating("weights", weights), (context.shape[-2],), "a weight a position of context")
    return (norms * weights.to(norms)).sum() / (weights != 0).sum().clamp_min(1)


def normalization_schedule(epoch: int, max_epoch: int, *, rate: float = 0.2) -> float:
    """Return omega of (1): near 1 at first, 1/2 halfway, near 0 at the end.

    Parameters
    ----------
    epoch : int
        From 0.
    max_epoch : int
        At least 1.
    rate : float, default=0.2
        At least 0.

    Returns
    -------
    float
        ``1 - 1 / (1 + exp(-rate (epoch - max_epoch / 2)))``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    .. [1] Fu, Wang, Huang and Zhang. ICLR 2024. Section 3.3.

    Examples
    --------
    >>> from posterity.transfer import normalization_schedule
    >>> [round(normalization_schedule(epoch, 50), 3) for epoch in (0, 25, 50)]
    [0.993, 0.5, 0.007]
    """
    late = at_least("rate", rate, 0) * (integer("epoch", epoch, 0) - integer("max_epoch", max_epoch, 1) / 2)
    return 0.5 * (1 - math.tanh(late / 2))  # the same, and no overflow


@torch.no_grad()
def low_norm_positions(
    prompts: PromptLearner, image_features: Float[Tensor, "n d"], y: Int[Tensor, " n"], *,
    n_positions: int | None = None, scale: float = 0.5, generator: torch.Generator | None = None,
) -> Bool[Tensor, " m"]:  # fmt: skip
    """Return the positions whose vectors, multiplied by ``scale``, make more predictions right.

    Parameters
    ----------
    prompts : PromptLearner
        Not changed.
    image_features : Tensor of shape (n, d)
        Made by the prompts' model.
    y : Tensor of shape (n,)
        Classes.
    n_positions : int, optional
        How many positions to draw and look at, at least 1 and at most M; by default all.
    scale : float, default=0.5
        At least 0.
    generator : torch.Generator, optional
        Draws the positions.

    Returns
    -------
    Tensor of shape (M,), bool
        False where not drawn. All are tried in one pass of the text tower.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit the prompts.

    References
    ----------
    .. [1] Fu, Wang, Huang and Zhang. ICLR 2024. Equation 5.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import PromptLearner, low_norm_positions
    >>> model = nn.Module()  # in the place of transformers.CLIPModel
    >>> model.token_embedding, model.logit_scale = nn.Embedding(32, 4), nn.Parameter(torch.tensor(0.0))
    >>> model.encode_text = lambda ids, inputs_embeds: inputs_embeds.cumsum(1)[torch.arange(len(ids)), ids.argmax(1)]
    >>> model.encode_image = lambda images: images
    >>> def tokenizer(texts):  # a token a letter
    ...     rows = [[28, *(ord(c) % 32 for c in text if c.isalpha()), 31] for text in texts]
    ...     return torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    >>> prompts = PromptLearner(model, tokenizer, ["cat", "dog"], n_context=3)
    >>> features, y = torch.randn(6, 4), torch.arange(6) % 2
    >>> low_norm_positions(prompts, features, y, scale=1.0)  # nothing changes, so nothing becomes better
    tensor([False, False, False])
    """
    _batch(prompts, image_features, y, n_positions)
    at_least("scale", scale, 0)
    right = (prompts(image_features=image_features).argmax(1) == y).sum()
    return _better(prompts, image_features, y, n_positions, scale, generator, right)


@torch.no_grad()
def _better(
    prompts: PromptLearner, image_features: Tensor, y: Tensor, n_positions: int | None, scale: float,
    generator: torch.Generator | None, right: Tensor,
) -> Tensor:  # fmt: skip
    """Return the drawn positions that, scaled, give more than ``right`` right predictions, (M,)."""
    context, m = prompts.context.detach(), prompts.context.shape[-2]
    drawn = torch.randperm(m, generator=generator, device=draw_device(generator)).to(context.device)
    drawn = drawn[: m if n_positions is None else n_positions]
    factors = context.new_ones(len(drawn), m)
    factors[torch.arange(len(drawn), device=context.device), drawn] = scale
    contexts = factors.view(-1, *[1] * (context.ndim - 2), m, 1) * context
    found = torch.zeros(m, dtype=torch.bool, device=context.device)
    found[drawn] = (prompts._tried(contexts, image_features).argmax(2) == y).sum(1) > right
    return found


def _order(p: Any) -> float:
    if isinstance(p, bool) or p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf, got {p!r}")
    return float(p)


def _batch(prompts: Any, image_features: Any, y: Any, n_positions: int | None) -> None:
    """Refuse features and classes that do not fit the prompts."""
    if not isinstance(prompts, PromptLearner):
        raise ValueError(f"prompts must be a PromptLearner, got {type(prompts).__name__}")
    has_shape("image_features", floating("image_features", image_features), (None, None))
    class_indices("y", y, len(image_features), len(prompts.class_names))
    if not len(y):
        raise ValueError("y must hold at least one class, got none")
    m = prompts.context.shape[-2]
    if n_positions is not None and integer("n_positions", n_positions, 1) > m:
        raise ValueError(f"n_positions must be at most the {m} positions of the context, got {n_positions}")
