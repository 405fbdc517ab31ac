"""HARP: prune a robust network hard, learning against the attacker how much to keep in each layer, and what.

Each layer l has a rate of its own and each weight a score; the weights of largest |score| are kept,

    k_l = k_min + (1 - k_min) sigmoid(r_l),    k_min = alpha * rate,                              (1)
    loss(W * mask) + gamma_e * max( sum_l n_l k_l / (rate sum_l n_l) - 1, 0 ).                    (2)

Only scores and rates learn, by gradients that pass straight through the mask: with g = d loss / d mask, a
score gets g sign(score), a rate the sum of g over its layer. gamma_e grows epoch by epoch until the budget
is met, so that robustness rules first, then the budget, then both in balance. At a few percent of the
weights, small layers keep relatively much and large ones almost nothing; a uniform rate starves the former.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posterity._checks import at_least, integer, scalar, within
from posterity.compression.masked_network import HARP
from posterity.compression.robust_loss import robust_loss

__all__ = ["HarpResult", "harp_prune", "step_up"]

MET = 1e-4 / 2  # a compression loss that is 0 to four decimals


class HarpResult(NamedTuple):
    """A pruned network, and how it came about.

    Attributes
    ----------
    model : nn.Module
        Of the class that was given, in its modes, with zeros where weights were dropped.
    masks : dict of str to Tensor
        1 for what each layer kept, in the shape of the weight, or of its input channels.
    rates : dict of str to float
        The learned share of each layer.
    history : dict of str to list of float
        Of each pruning epoch "robust loss" (mean of its steps), "compression loss", "keep rate" and "gamma" (at its
        end); of each fine-tuning epoch "finetune loss".
    """

    model: nn.Module
    masks: dict[str, Tensor]
    rates: dict[str, float]
    history: dict[str, list[float]]


def step_up(gamma: float, epoch: int) -> float:
    """Return the weight of the compression loss in an epoch, while the budget is not met.

    Parameters
    ----------
    gamma : float
        Growth an epoch, at least 0.
    epoch : int
        From 0.

    Returns
    -------
    float
        ``(epoch + 1) * gamma``.

    Raises
    ------
    ValueError
        If an argument is negative.

    Examples
    --------
    >>> from posterity.compression import step_up
    >>> [step_up(0.5, epoch) for epoch in range(3)]
    [0.5, 1.0, 1.5]
    """
    return (integer("epoch", epoch, 0) + 1) * at_least("gamma", gamma, 0)


@torch.inference_mode(False)
@torch.enable_grad()
def harp_prune(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    rate: float,
    *,
    loss_fn: Callable[..., Tensor] = robust_loss,
    prune_epochs: int = 20,
    finetune_epochs: int = 100,
    gamma: float = 0.01,
    lr: float = 0.1,
    finetune_lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
    **harp_options: Any,
) -> HarpResult:
    """Prune a robustly trained network to a budget, learning rates and masks, and fine-tune what is left.

    Parameters
    ----------
    model : nn.Module
        Robustly trained; not changed.
    batches : callable
        ``batches()`` starts a pass over the training data, pairs of inputs and labels: ``lambda: loader``.
    rate : float
        Share of the weights to keep, in (0, 1].
    loss_fn : callable, default=robust_loss
        ``loss_fn(model, x, y)`` is a scalar; ``functools.partial(robust_loss, epsilon=0.1)`` sets an attack.
    prune_epochs, finetune_epochs : int
        At least 1 and 0.
    gamma : float, default=0.01
        Growth an epoch of the weight of the compression loss, at least 0; 0.1 for few, large epochs.
    lr, finetune_lr : float, default=0.1
        Of SGD in either stage, positive; they fall to 0 as a cosine, epoch by epoch.
    momentum, weight_decay : float
        Of SGD, momentum in [0, 1), decay at least 0.
    device : str or torch.device, default="cpu"
        Where to train, and where the result lies.
    generator : torch.Generator, optional
        Given to a ``loss_fn`` that takes one.
    **harp_options
        Of `HARP`: ``alpha``, ``start``, ``granularity``, ``learn_rates``, ``learn_scores``, ``layers``.

    Returns
    -------
    HarpResult
        Of the best pruning epoch, by its mean robust loss, of those within the budget from first step to last.

    Raises
    ------
    ValueError
        If an argument is out of range, ``batches`` cannot be called or gives none, or the loss is not finite.

    Warns
    -----
    UserWarning
        If no epoch met the budget: all rates are then lowered by one shift of their logits until it is.

    Notes
    -----
    1. Weight decay does not act on rates: it would draw each to one half.
    2. Dropped weights stay zero in fine-tuning since they get no gradient, and a zero does not decay.

    References
    ----------
    .. [1] Zhao, Wressnegger. Holistic Adversarially Robust Pruning. ICLR 2023. Section 3.3 and Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import harp_prune
    >>> _ = torch.manual_seed(0)
    >>> x = torch.rand(64, 10)
    >>> net = torch.nn.Sequential(torch.nn.Linear(10, 30), torch.nn.ReLU(), torch.nn.Linear(30, 2))
    >>> data = [(x, (x[:, 0] > 0.5).long())]
    >>> result = harp_prune(net, lambda: data, 0.2, prune_epochs=30, finetune_epochs=5, gamma=0.3)
    >>> int((result.model[0].weight != 0).sum() + (result.model[2].weight != 0).sum()) <= 0.2 * 360 + 2
    True
    """
    if not callable(batches):
        raise ValueError(
            f"batches must be a callable that starts a pass over the data, as lambda: loader, got {type(batches).__name__}"
        )
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    integer("prune_epochs", prune_epochs, 1)
    integer("finetune_epochs", finetune_epochs, 0)
    at_least("gamma", gamma, 0)
    at_least("lr", lr, 0, strict=True)
    at_least("finetune_lr", finetune_lr, 0, strict=True)
    within("momentum", momentum, 0, 1, open_high=True)
    at_least("weight_decay", weight_decay, 0)
    harp = HARP(model, rate, **harp_options).to(device)
    run = _Run(batches, loss_fn, generator, torch.device(device))
    history: dict[str, list[float]] = {
        n: [] for n in ("robust loss", "compression loss", "keep rate", "gamma")
    }

    rates = list(harp.rate_logits().values())
    others = [p for p in harp.parameters() if p.requires_grad and not any(p is r for r in rates)]
    groups = [{"params": others}, {"params": [r for r in rates if r.requires_grad], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, prune_epochs)
    learns = any(group["params"] for group in groups)  # scores, rates or norms: or masks are as they start
    weight, best, met = 0.0, None, False
    # multiply-adds are not known before the first pass
    within_budget = harp.granularity == "weight" and float(harp.compression_loss().detach()) < MET
    for epoch in range(prune_epochs):
        weight = weight if met else step_up(gamma, epoch)
        losses = []
        for robust in run.epoch(harp.train(), f"pruning epoch {epoch}"):
            value = robust + weight * harp.compression_loss().to(robust)
            if learns:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            losses.append(float(robust.detach()))
        if learns:
            falling.step()
        over = float(harp.compression_loss().detach())
        mean = sum(losses) / len(losses)
        for name, value in zip(history, (mean, over, float(harp.keep_rate().detach()), weight), strict=True):
            history[name].append(value)
        began, within_budget = within_budget, over < MET
        met = met or within_budget
        # the first epoch within budget spent its steps above it: its loss is that of a larger network
        rank = (not began, mean)
        if within_budget and (best is None or rank < best[0]):
            best = (rank, copy.deepcopy(harp.state_dict()))
    if best is None:
        warnings.warn(
            f"no epoch met the budget, rate = {rate}: the nearest kept {min(history['keep rate']):.4g}; all rates are "
            "lowered until it is met, a larger gamma or more prune_epochs would learn them",
            stacklevel=3,
        )
    else:
        harp.load_state_dict(best[1])
    _lower(harp)

    masks = harp.masks()
    net = harp.to_plain()
    kept = dict(zip((places[0] for places in harp.places), masks.values(), strict=True))
    history["finetune loss"] = _finetune(net, kept, run, finetune_epochs, finetune_lr, momentum, weight_decay)
    for ours, theirs in zip(net.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    return HarpResult(net, masks, {name: float(k.detach()) for name, k in harp.rates().items()}, history)


def _finetune(
    net: nn.Module,
    masks: Mapping[str, Tensor],
    run: "_Run",
    epochs: int,
    lr: float,
    momentum: float,
    decay: float,
) -> list[float]:
    """Train what is left, masks fixed; return the mean loss of each epoch."""
    for p in net.parameters():
        p.grad = None
    learning = [p for p in net.parameters() if p.requires_grad]
    if not learning or not epochs:
        return []
    optimizer = torch.optim.SGD(learning, lr=lr, momentum=momentum, weight_decay=decay)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    means = []
    for epoch in range(epochs):
        losses = []
        for value in run.epoch(net.train(), f"fine-tuning epoch {epoch}"):
            optimizer.zero_grad()
            value.backward()
            for place, mask in masks.items():
                grad = net.get_parameter(place).grad
                if grad is not None:
                    grad.mul_(mask)
            optimizer.step()
            losses.append(float(value.detach()))
        falling.step()
        means.append(sum(losses) / len(losses))
    optimizer.zero_grad()
    return means


class _Run:
    """Passes over the data, each batch with its loss, checked."""

    def __init__(
        self, batches: Callable[[], Iterable[Any]], loss_fn: Callable[..., Tensor], generator: torch.Generator | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.batches, self.loss_fn, self.device = batches, loss_fn, device
        takes = generator is not None and "generator" in inspect.signature(loss_fn).parameters
        self.options = {"generator": generator} if takes else {}

    def epoch(self, net: nn.Module, when: str) -> Iterable[Tensor]:
        step = -1
        data = self.batches()
        if not isinstance(data, Iterable):
            raise ValueError(f"batches must give an iterable of pairs (x, y), got {type(data).__name__}")
        for step, pair in enumerate(data):
            if (
                not isinstance(pair, tuple | list)
                or len(pair) != 2
                or not all(isinstance(p, Tensor) for p in pair)
            ):
                raise ValueError(
                    f"batches must give pairs of tensors (x, y), got {type(pair).__name__} in {when}"
                )
            # what was made in inference mode has no derivative
            x, y = ((part.clone() if part.is_inference() else part).to(self.device) for part in pair)
            value = scalar("loss_fn", self.loss_fn(net, x, y, **self.options))
            if not math.isfinite(value.detach()):
                raise ValueError(
                    f"loss_fn must be finite, got {float(value.detach())} in {when}, step {step}: lower lr"
                )
            yield value
        if step < 0:
            raise ValueError(
                f"batches must give at least one batch a pass, got none in {when}: an iterator runs once"
            )


@torch.no_grad()
def _lower(harp: HARP) -> None:
    """Shift the logits of all rates alike, which multiplies their odds, until the budget is met."""
    if float(harp.keep_rate()) <= harp.rate:
        return
    logits = list(harp.rate_logits().values())
    before = [r.clone() for r in logits]
    low, high = -100.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        for r, own in zip(logits, before, strict=True):
            r.copy_(own + middle)
        low, high = (middle, high) if float(harp.keep_rate()) <= harp.rate else (low, middle)
    for r, own in zip(logits, before, strict=True):
        r.copy_(own + low)
