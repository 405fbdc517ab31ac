"""Losses of adversarial training: what a network loses on inputs that an attacker has moved.

For each input the attack climbs, by projected steps, to a point of the ball |x' - x| <= epsilon where the
loss is high; the network then learns on that point:

    pgd:     CE(f(x'), y)
    trades:  CE(f(x), y) + beta KL(f(x) || f(x')),                       x' climbs that KL
    mart:    -log p'_y - log(1 - max over k != y of p'_k) + beta (1 - p_y) KL(f(x) || f(x')),

with p the probabilities at x and p' those at x'.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, floating, integer, interval, one_of
from posterity._models import held
from posterity._precision import rounding, wide
from posterity._random import draw_device

__all__ = ["robust_loss"]

KINDS = ("natural", "pgd", "trades", "mart")
NEAR = 1e-3  # deviation of the start of trades, whose KL has no gradient at x itself


def robust_loss(
    model: nn.Module,
    x: Float[Tensor, " n *shape"],
    y: Int[Tensor, " n"],
    *,
    kind: Literal["natural", "pgd", "trades", "mart"] = "pgd",
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    n_steps: int = 10,
    beta: float = 6.0,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return the loss of a classifier on adversarial inputs, for training and for pruning.

    The attack sees the model in eval mode and leaves modes and gradients of parameters as they are; the
    loss itself is that of the model in the mode it has.

    Parameters
    ----------
    model : nn.Module
        ``model(x)`` are logits of shape (n, n_classes).
    x : Tensor of shape (n, *shape)
        Floating-point inputs on the scale of ``epsilon``: put a normalisation into the model.
    y : Tensor of shape (n,)
        Class indices.
    kind : {"natural", "pgd", "trades", "mart"}, default="pgd"
        "natural" is cross-entropy without an attack.
    epsilon : float, default=8/255
        Radius of the ball, at least 0.
    step_size : float, default=2/255
        Of a step of the attack, at least 0.
    n_steps : int, default=10
        At least 1.
    beta : float, default=6.0
        Weight of the KL term of "trades" and "mart", at least 0.
    norm : {"linf", "l2"}, default="linf"
        Of the ball: of each entry, or of a whole input.
    bounds : tuple of float or None, default=(0.0, 1.0)
        Range of inputs, which the attack keeps.
    generator : torch.Generator, optional
        Draws the start: uniform in the ball, or 1e-3 Gaussian for "trades"; torch's own by default.

    Returns
    -------
    Tensor
        The mean over inputs, a scalar of the dtype of ``x``.

    Raises
    ------
    ValueError
        If an option is out of range, ``x`` is empty, lies outside ``bounds`` or is not floating-point,
        ``y`` does not fit, or the logits do not.

    References
    ----------
    .. [1] Madry et al. Towards Deep Learning Models Resistant to Adversarial Attacks. ICLR 2018.
    .. [2] Zhang et al. Theoretically Principled Trade-off between Robustness and Accuracy. ICML 2019.
    .. [3] Wang et al. Improving Adversarial Robustness Requires Revisiting Misclassified Examples. ICLR 2020.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import robust_loss
    >>> net = torch.nn.Linear(1, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> x, y = torch.tensor([[0.5]]), torch.tensor([0])
    >>> robust_loss(net, x, y, kind="natural").item()  # log(1 + exp(-1))
    0.31326...
    >>> robust_loss(net, x, y, epsilon=0.5, step_size=0.5).item()  # moved to 0: log 2
    0.69314...
    """
    one_of("kind", kind, KINDS)
    one_of("norm", norm, ("linf", "l2"))
    at_least("epsilon", epsilon, 0)
    at_least("step_size", step_size, 0)
    at_least("beta", beta, 0)
    integer("n_steps", n_steps, 1)
    if floating("x", x).ndim == 0 or len(x) == 0:
        raise ValueError(f"x must have at least one sample, got shape {tuple(x.shape)}")
    class_indices("y", y, len(x))
    y = y.to(x.device, torch.long)
    if bounds is not None:
        _within_range(x, bounds)
    if kind == "natural":
        return F.cross_entropy(_logits(model, x, y), y).to(x.dtype)

    moved = _attack(model, x, y, kind, epsilon, step_size, n_steps, norm, bounds, generator)
    return _objective(model, x, y, moved, kind, beta).to(x.dtype)


def _objective(model: nn.Module, x: Tensor, y: Tensor, moved: Tensor, kind: str, beta: float) -> Tensor:
    """Return the loss at the points that the attack found."""
    if kind == "pgd":
        return F.cross_entropy(_logits(model, moved, y), y)
    still = _logits(model, x, y)
    adversarial = _logits(model, moved, y)
    apart = _divergence(still.log_softmax(1), adversarial)
    if kind == "trades":
        return F.cross_entropy(still, y) + beta * apart.mean()
    if still.shape[1] < 2:
        raise ValueError(f"model must give at least 2 classes for mart, got {still.shape[1]}")
    log_p = adversarial.log_softmax(1)
    own = F.one_hot(y, log_p.shape[1]).bool()
    rival = F.one_hot(log_p.masked_fill(own, -torch.inf).argmax(1), log_p.shape[1]).bool()
    # log(1 - p) of the rival is the log of all that the others have: exact where p is 1
    boosted = -log_p[own] - log_p.masked_fill(rival, -torch.inf).logsumexp(1)
    unsure = 1 - still.softmax(1)[own]
    return (boosted + beta * unsure * apart).mean()


@torch.inference_mode(False)
@torch.enable_grad()
def _attack(
    model: nn.Module, x: Tensor, y: Tensor, kind: str, epsilon: float, step_size: float, n_steps: int, norm: str,
    bounds: tuple[float, float] | None, generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Return points of the ball where the loss that is climbed is high, by projected steps."""
    x, y = x.detach().clone(), y.clone()  # of inference mode, what comes in has no derivative
    centre = wide(x)

    def project(delta: Tensor) -> Tensor:
        if norm == "linf":
            delta = delta.clamp(-epsilon, epsilon)
        else:
            size = _rows(delta).norm(dim=1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
            delta = (_rows(delta) * (epsilon / size).clamp(max=1)).view_as(delta)
        return delta if bounds is None else (centre + delta).clamp(*bounds) - centre

    with held(model):  # which spares what only gradients of parameters need
        if kind == "trades":
            delta = project(NEAR * _drawn(torch.randn, x, generator))
            with torch.no_grad():
                still = _logits(model, x, y).log_softmax(1)
        else:
            delta = project(_start(x, epsilon, norm, generator))
        for _ in range(n_steps):
            point = (centre + delta).to(x.dtype).requires_grad_()
            logits = _logits(model, point, y)
            if not logits.requires_grad:
                raise ValueError("model must be differentiable by x, got logits that do not depend on it")
            loss = (
                _divergence(still, logits).sum()
                if kind == "trades"
                else F.cross_entropy(logits, y, reduction="sum")
            )
            slope = wide(torch.autograd.grad(loss, point)[0])
            if norm == "linf":
                step = slope.sign()
            else:  # by the largest entry first: squares of small gradients would vanish
                rows = _rows(slope)
                top = rows.abs().amax(1, keepdim=True) if rows.numel() else rows
                step = F.normalize(rows / top.clamp_min(torch.finfo(rows.dtype).tiny), dim=1).view_as(slope)
            delta = project(delta + step_size * step)
    return (centre + delta).to(x.dtype)


def _start(x: Tensor, epsilon: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """Return where the attack begins, uniform in the ball."""
    if norm == "linf":
        return epsilon * (2 * _drawn(torch.rand, x, generator) - 1)
    way = _rows(_drawn(torch.randn, x, generator))
    radius = epsilon * _drawn(torch.rand, way.new_empty(len(way), 1), generator) ** (1 / max(way.shape[1], 1))
    return (radius * F.normalize(way, dim=1)).view_as(x)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def _drawn(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return numbers drawn in float32 for every dtype, so that a seed means the same in each."""
    device = draw_device(generator, like.device)
    drawn = draw(like.shape, generator=generator, device=device, dtype=torch.float32)
    return drawn.to(like.device, wide(like).dtype)


def _logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return logits in float32 at least, in which losses are computed."""
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.shape[1]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must give logits of shape ({len(x)}, n_classes), got {got}")
    class_indices("y", y, len(x), logits.shape[1])
    return wide(logits)


def _divergence(still: Tensor, logits: Tensor) -> Tensor:
    """Return KL of each row from fixed or learned log-probabilities to those of logits."""
    return F.kl_div(logits.log_softmax(1), still, reduction="none", log_target=True).sum(1)


def _within_range(x: Tensor, bounds: tuple[float, float]) -> None:
    """Refuse inputs outside the range; on an accelerator too, where the attack costs more than this read."""
    low, high = interval("bounds", bounds)
    slack = rounding(x.dtype, 1e-6) * max(abs(low), abs(high))
    if x.numel() and not bool(((x >= low - slack) & (x <= high + slack)).all()):
        least, most = (float(end) for end in x.aminmax())
        raise ValueError(
            f"x must be in bounds = ({low:g}, {high:g}), got values from {least:g} to {most:g}: "
            "put the normalisation of inputs into the model"
        )
