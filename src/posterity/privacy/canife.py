"""Crafted canaries (CANIFE): measure how much of one client a federated round gives away, noise and all.

An auditor adds a client whose only row is a canary, and looks for it in the noisy sum of what the
clients of a round send. That of a row from the data drowns in what the others send. Crafted, the
canary's gradient g is orthogonal to it: with updates u_i of mock clients, kept for the purpose,
gradient descent on the row x, through the model's gradient, lowers

    mean_i <C g / |g|, u_i>^2 + max(0, floor - |g|)^2,                                       (1)

C the norm to which updates are clipped. In rounds with the model frozen, the score

    s = <g / |g|, sum of updates + N(0, (sigma C)^2 I)> / C                                  (2)

is then N(1, sigma^2) with the canary, and N(0, sigma^2) without, as well told apart as anybody can
at this noise in the direction g. How well bounds epsilon from below (`empirical_epsilon`).

For audits of one's own training: the canary is the auditor's own row, and no client's data is read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, interval
from posterity._precision import wide, widened
from posterity._random import draw_device
from posterity.privacy.client_updates import Loss, frozen, like, plain_kernels, sample_loss

__all__ = ["Canary", "canary_loss", "craft_canary", "craft_text_canary"]

Updates = Float[Tensor, "clients numbers"]


@dataclass(frozen=True, eq=False)
class Canary:
    """A row crafted for an audit.

    Attributes
    ----------
    x, y : Tensor of shape (1, ...)
        The row and its target.
    grad : Tensor of shape (numbers,)
        Gradient of its loss, not clipped: the parameters that require one, in their order.
    initial_x : Tensor of shape (1, ...)
    initial_grad : Tensor of shape (numbers,)
        The row before it was crafted, and its gradient.
    losses : Tensor of shape (n_steps,)
        Equation 1 before each step.
    """

    x: Shaped[Tensor, "1 ..."]
    y: Shaped[Tensor, "1 ..."]
    grad: Float[Tensor, " numbers"]
    initial_x: Shaped[Tensor, "1 ..."]
    initial_grad: Float[Tensor, " numbers"]
    losses: Float[Tensor, " n_steps"]

    @property
    def health(self) -> float:
        """1 less the last loss as a share of the first: near 1 where crafting went well."""
        first, last = float(self.losses[0]), float(self.losses[-1])
        return 1 - last / first if first > 0 else 1.0


@torch.inference_mode(False)  # grad mode too
def craft_canary(
    model: nn.Module,
    design_updates: Updates,
    x: Float[Tensor, "1 ..."],
    y: Shaped[Tensor, "1 ..."],
    *,
    loss_fn: Loss = F.cross_entropy,
    clip: float = 1.0,
    norm_floor: float | None = None,
    n_steps: int = 2000,
    lr: float = 1.0,
    batch_size: int | None = None,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Canary:
    """Return a row whose gradient is orthogonal to what clients send, by Adam on equation 1.

    Parameters
    ----------
    model : nn.Module
        With the server's weights, in eval mode; left as it is. What is in it must have second derivatives.
    design_updates : Tensor of shape (clients, numbers)
        Clipped updates of mock clients (`client_updates`), **other than those that are
        audited with**: public data of the same kind, or a pool kept for it.
    x : Tensor of shape (1, ...)
        Where to begin: random numbers in [0, 1], or a row.
    y : Tensor of shape (1, ...)
        Its target, which stays: a random class, as a rule.
    loss_fn : callable, default=cross_entropy
        ``loss_fn(model(x), y) -> scalar``, as for `client_updates`.
    clip : float, default=1.0
        Norm to which updates are clipped, positive.
    norm_floor : float, optional
        Norm that the gradient should have, at least 0; by default ``clip``. So that the canary's update is
        clipped, and counts in full, it must be at least ``clip`` divided by the clients' rate.
    n_steps : int, default=2000
        At least 1.
    lr : float, default=1.0
        Rate of Adam, positive. 0.05 to 1 for numbers in [0, 1].
    batch_size : int, optional
        How many of ``design_updates`` to draw for each step; by default all.
    bounds : tuple of float, optional
        Least and largest number that x may have.
    generator : torch.Generator, optional
        For the draws of ``batch_size``; torch's own where it is None.

    Returns
    -------
    Canary
        The row, its gradient, both as they were at first, and the loss on the way.

    Raises
    ------
    ValueError
        If a parameter is out of range, shapes do not fit, the gradient is zero (the row is already fitted),
        does not depend on x or has no derivative, or the loss stops being finite.

    Notes
    -----
    1. The official code multiplies equation 1 by the number of parameters, which Adam does not see.
    2. Attention and recurrent layers are computed by their plain kernels meanwhile, since the
       fast ones have no second derivative.

    References
    ----------
    .. [1] Maddock, Sablayrolles, Stock. CANIFE: Crafting Canaries for Empirical Privacy Measurement
       in Federated Learning. ICLR 2023. Section 3, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import client_updates, craft_canary
    >>> rng = torch.Generator().manual_seed(0)
    >>> net = torch.nn.Linear(6, 3)
    >>> mock = [(torch.rand(4, 6, generator=rng), torch.tensor([0, 0, 1, 1])) for _ in range(8)]
    >>> updates = client_updates(net, mock)
    >>> canary = craft_canary(net, updates, torch.rand(1, 6, generator=rng), torch.tensor([2]), n_steps=100, lr=0.1)
    >>> canary.health > 0.5
    True
    """
    twin = frozen(model)
    first = next(p for p in twin.parameters() if p.requires_grad)
    updates = _updates("design_updates", design_updates, first, twin)
    has_row = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0 and len(x) == 1
    if not has_row or not x.isfinite().all():
        raise ValueError(f"x must be one row (1, ...) of finite floating-point numbers, got {_what(x)}")
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != 1:
        raise ValueError(f"y must be the target of one row (1, ...), got {_what(y)}")
    if bounds is not None:
        interval("bounds", bounds)
    start, y = like(x, first), like(y, first)
    leaf = start.clone().requires_grad_()

    def gradient(at: Tensor, create_graph: bool = False) -> Tensor:
        return _gradient(twin, sample_loss(lambda: twin(at), loss_fn, y), create_graph)

    def project() -> None:
        if bounds is not None:
            leaf.clamp_(*bounds)

    with plain_kernels(twin):
        losses = _descend(
            leaf, lambda: gradient(leaf, True), updates, project, model=twin, clip=clip, norm_floor=norm_floor,
            n_steps=n_steps, lr=lr, batch_size=batch_size, generator=generator,
        )  # fmt: skip
        end = leaf.detach()
        return Canary(end, y, gradient(end), start, gradient(start), losses)


@torch.inference_mode(False)
def craft_text_canary(
    model: nn.Module,
    design_updates: Updates,
    length: int,
    vocab_size: int,
    y: Shaped[Tensor, "1 ..."],
    *,
    embedding: str,
    loss_fn: Loss = F.cross_entropy,
    clip: float = 1.0,
    norm_floor: float | None = None,
    n_steps: int = 2000,
    lr: float = 0.1,
    temperature: float = 1.0,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Canary:
    """Return a sequence of tokens crafted as `craft_canary` crafts numbers, over logits of each token.

    At each step the tokens are mixtures, softmax((logits + Gumbel noise) / temperature), and go
    through the model as mixtures of its embeddings. The result is a sequence drawn from the logits.

    Parameters
    ----------
    model : nn.Module
        Takes token ids (1, length); else as for `craft_canary`.
    design_updates : Tensor of shape (clients, numbers)
        As for `craft_canary`.
    length : int
        Tokens, at least 1.
    vocab_size : int
        Ids are in 0..vocab_size-1; at least 2, at most what the embedding has.
    y : Tensor of shape (1, ...)
        Target of the sequence.
    embedding : str
        Name of the ``nn.Embedding`` that takes the ids, as in ``model.named_modules()``.
    loss_fn, clip, norm_floor, n_steps
        As for `craft_canary`.
    lr : float, default=0.1
        Rate of Adam on the logits, positive.
    temperature : float, default=1.0
        Positive; the smaller, the nearer a mixture is to one token.
    batch_size : int, optional
        As for `craft_canary`.
    generator : torch.Generator, optional
        Draws first logits, noise, batches and the result.

    Returns
    -------
    Canary
        ``x`` and ``initial_x`` are ids (1, length), int64, their gradients exact. ``losses`` are of
        mixtures, so what the sequence is worth only ``canary_loss(canary.grad, design_updates)`` says.

    Raises
    ------
    ValueError
        As `craft_canary`, or if the model has no such embedding, or does not use it.

    References
    ----------
    .. [1] Maddock et al. CANIFE. ICLR 2023. Section 3.
    .. [2] Jang, Gu, Poole. Categorical Reparameterization with Gumbel-Softmax. ICLR 2017.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import craft_text_canary
    >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(20, 2))
    >>> updates = torch.nn.functional.normalize(torch.randn(6, 78))  # of 9 * 4 + 20 * 2 + 2 parameters
    >>> canary = craft_text_canary(net, updates, 5, 9, torch.tensor([1]), embedding="0", n_steps=10)
    >>> canary.x.shape, canary.grad.shape
    (torch.Size([1, 5]), torch.Size([78]))
    """
    length, vocab_size = integer("length", length, 1), integer("vocab_size", vocab_size, 2)
    at_least("temperature", temperature, 0, strict=True)
    twin = frozen(model)
    first = next(p for p in twin.parameters() if p.requires_grad)
    updates = _updates("design_updates", design_updates, first, twin)
    table = dict(twin.named_modules()).get(embedding)
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"embedding must be the name of an nn.Embedding of model, got {embedding!r}")
    if vocab_size > table.num_embeddings:
        raise ValueError(
            f"vocab_size must be at most {table.num_embeddings}, as embedding has, got {vocab_size}"
        )
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != 1:
        raise ValueError(f"y must be the target of one row (1, ...), got {_what(y)}")
    y = like(y, first)

    def noise() -> Tensor:
        made = torch.empty(1, length, vocab_size, device=draw_device(generator), dtype=first.dtype)
        return -made.exponential_(generator=generator).clamp_min(1e-30).log().to(first.device)

    def drawn(logits: Tensor) -> Tensor:
        return (logits + noise()).argmax(-1)

    def gradient(ids: Tensor, create_graph: bool = False) -> Tensor:
        return _gradient(twin, sample_loss(lambda: twin(ids), loss_fn, y), create_graph)

    def soft_gradient() -> Tensor:
        mixed, used = ((leaf + noise()) / temperature).softmax(-1), []

        def mix(module: nn.Module, given: object, out: Tensor) -> Tensor:
            used.append(module)
            return (mixed @ table.weight[:vocab_size]).reshape(out.shape)

        with table.register_forward_hook(mix):
            g = gradient(mixed.argmax(-1).detach(), True)
        if not used:
            raise ValueError(f"embedding must be one that model uses, {embedding!r} is not")
        return g

    start = torch.randn(1, length, vocab_size, generator=generator, device=draw_device(generator)).to(first)
    leaf = start.clone().requires_grad_()
    with plain_kernels(twin):
        losses = _descend(
            leaf, soft_gradient, updates, lambda: None, model=twin, clip=clip, norm_floor=norm_floor,
            n_steps=n_steps, lr=lr, batch_size=batch_size, generator=generator,
        )  # fmt: skip
        begun, ended = drawn(start), drawn(leaf.detach())
        return Canary(ended, y, gradient(ended), begun, gradient(begun), losses)


@widened
def canary_loss(
    canary_grad: Float[Tensor, " numbers"], updates: Updates, *, clip: float = 1.0, norm_floor: float = 1.0
) -> Float[Tensor, ""]:
    """Return how far a gradient is from being orthogonal to updates and long enough, equation 1.

    Parameters
    ----------
    canary_grad : Tensor of shape (numbers,)
        Not zero; gradients go through it. Its length matters for the second term alone.
    updates : Tensor of shape (clients, numbers)
        Clipped, at least one.
    clip : float, default=1.0
        Positive.
    norm_floor : float, default=1.0
        At least 0.

    Returns
    -------
    Tensor
        A scalar, in the dtype of ``canary_grad``.

    Raises
    ------
    ValueError
        If a parameter is out of range, shapes do not fit, or the gradient is zero or not finite.

    References
    ----------
    .. [1] Maddock et al. CANIFE. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import canary_loss
    >>> updates = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> canary_loss(torch.tensor([0.0, 0.5]), updates)  # (0 + 0.64) / 2 + (1 - 0.5)^2
    tensor(0.5700)
    """
    at_least("clip", clip, 0, strict=True)
    at_least("norm_floor", norm_floor, 0)
    direction, size = direction_of(canary_grad)
    has_shape("updates", floating("updates", updates), (None, len(direction)), "canary_grad")
    if not len(updates):
        raise ValueError("updates must have at least one row, got none")
    along = clip * (updates.to(direction) @ direction)
    return along.square().mean() + (norm_floor - size).clamp_min(0).square()


def direction_of(canary_grad: Tensor, name: str = "canary_grad") -> tuple[Tensor, Tensor]:
    """Return a gradient's direction and norm, in float32 at least; its squares may overflow."""
    g = wide(has_shape(name, floating(name, canary_grad), (None,)))
    largest = g.detach().abs().max() if len(g) else g.new_zeros(())
    if not bool(largest.isfinite()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if not bool(largest > 0):
        raise ValueError(f"{name} must not be zero: the model already fits the canary, choose another y")
    size = (g / largest).norm()
    return g / largest / size, largest * size


def _updates(name: str, updates: Tensor, parameter: Tensor, model: nn.Module) -> Tensor:
    """Return updates as wide as the model, if they are of its numbers."""
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not isinstance(updates, Tensor) or updates.ndim != 2 or updates.shape[1] != numbers:
        raise ValueError(
            f"{name} must have shape (clients, {numbers}), as model has parameters, got {_what(updates)}"
        )
    if not len(updates):
        raise ValueError(f"{name} must have at least one row, got none")
    return like(finite(name, floating(name, updates)), parameter)


def _gradient(model: nn.Module, value: Tensor, create_graph: bool) -> Tensor:
    """Return the gradient of a loss as a vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not value.requires_grad:
        raise ValueError("model must have a gradient of the loss, has none")
    found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def _descend(
    leaf: Tensor, gradient: Callable[[], Tensor], updates: Tensor, project: Callable[[], None], *, model: nn.Module,
    clip: float, norm_floor: float | None, n_steps: int, lr: float, batch_size: int | None,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Lower equation 1 by Adam, and return it before each step."""
    at_least("lr", lr, 0, strict=True)
    at_least("clip", clip, 0, strict=True)
    floor = clip if norm_floor is None else at_least("norm_floor", norm_floor, 0)
    losses = leaf.new_empty(integer("n_steps", n_steps, 1))
    if batch_size is not None and integer("batch_size", batch_size, 1) > len(updates):
        raise ValueError(
            f"batch_size must be at most {len(updates)}, as design_updates has rows, got {batch_size}"
        )
    adam = torch.optim.Adam([leaf], lr=lr)
    for step in range(n_steps):
        rows = updates
        if batch_size is not None:
            order = torch.randperm(len(updates), generator=generator, device=draw_device(generator))
            rows = updates[order[:batch_size].to(updates.device)]
        value = canary_loss(gradient(), rows, clip=clip, norm_floor=floor)
        if step == 0:
            _require_second_derivatives(value, model)
        slope = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            raise ValueError("model must have a gradient that depends on x, it does not")
        losses[step] = value.detach()
        if not bool(slope.isfinite().all()):
            raise ValueError(f"lr must be lower, a slope is not finite at step {step}: got {lr}")
        leaf.grad = slope
        adam.step()
        with torch.no_grad():
            project()
    return losses


def _require_second_derivatives(value: Tensor, model: nn.Module) -> None:
    """Go back through all of the graph: on the way to x alone, a part without a derivative is passed over."""
    if not value.requires_grad:
        return
    try:
        value.backward(retain_graph=True)
    except RuntimeError as error:
        raise ValueError(f"model must have second derivatives: {error}") from error
    for p in model.parameters():
        p.grad = None


def _what(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
