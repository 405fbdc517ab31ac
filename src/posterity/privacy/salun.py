"""Saliency unlearning (SalUn): forget some rows by moving only the weights that they pull at most.

The loss of the rows to be forgotten has a gradient at the trained weights theta_o, and the mask
marks the share ``keep`` of all weights where it is largest,

    m = 1( |grad L(theta_o; forget)| >= gamma ).                                  (1)

Under the mask the network learns random labels y' for these rows, drawn anew each epoch among
all classes, and the right labels for those that it keeps,

    theta_u = theta_o + m delta,    delta lowering  E_forget CE(f(x), y') + alpha E_retain CE(f(x), y),   (2)

so that all other weights stay, to the bit, what they were. Nothing is guaranteed of what is left
of the forgotten rows: `unlearning_report` measures it, best beside a network that never saw them.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from posterity._checks import at_least, class_indices, floating, integer, one_of, scalar, within
from posterity._precision import wide
from posterity._random import draw_device, seed_from, seeded
from posterity.privacy.masked_optimizer import Mask, MaskedOptimizer

__all__ = ["concept_unlearning_loss", "saliency_mask", "salun"]

Forget = tuple[Shaped[Tensor, "n ..."], Int[Tensor, " n"]]
Retain = tuple[Shaped[Tensor, "m ..."], Int[Tensor, " m"]]
Batch = tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]
ROWS = 256  # at once, where no batch size is given


@torch.inference_mode(False)  # grad mode too
def saliency_mask(
    model: nn.Module,
    forget: Batch | Dataset | Iterable[Batch],
    *,
    keep: float = 0.5,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> dict[str, Bool[Tensor, "..."]]:
    """Return which weights may move: those with the largest gradient on what shall be forgotten, equation 1.

    Parameters
    ----------
    model : nn.Module
        Measured in eval mode; left as it is, gradients among it.
    forget : tuple of Tensor, Dataset or iterable of tuple of Tensor
        Inputs and targets of the rows; a dataset of such rows; or batches of them.
    keep : float, default=0.5
        Share of the weights that may move, in (0, 1].
    loss_fn : callable, default=cross_entropy
        ``loss_fn(model(x), y) -> scalar``, the mean over a batch; outputs in 16 bits are widened for it.

    Returns
    -------
    dict of str to Tensor
        For each of ``model.named_parameters()`` a bool tensor of its shape and on its device.
        ``int(N keep)`` of the N weights that require a gradient are True, the first of equals; a
        smaller share marks a part of what a larger one marks.

    Raises
    ------
    ValueError
        If ``keep`` is out of range, ``forget`` is empty or does not fit, no parameter has a
        gradient, or one is not finite.

    Notes
    -----
    1. A batch counts by its rows, so that batching does not matter. The official code adds up
       the gradients of batch means, where the rows of a smaller last batch count more.

    References
    ----------
    .. [1] Fan et al. SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in
       Both Image Classification and Generation. ICLR 2024. Section 4, Equations 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import saliency_mask
    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([0])  # the third feature pulls most
    >>> saliency_mask(net, (x, y), keep=0.34)
    {'weight': tensor([[False, False,  True],
            [False, False,  True]])}
    """
    within("keep", keep, 0, 1, open_low=True)
    if isinstance(forget, tuple | Dataset):
        rows = _Rows("forget", forget)
        batches: Iterable[Any] = (rows.take(part) for part in torch.arange(len(rows)).split(ROWS))
    else:
        batches = forget if isinstance(forget, Iterable) else _refuse("forget", forget)
    model = _widened(model).eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, count = [torch.zeros_like(p) for p in named.values()], 0
    reached = False
    for batch in batches:
        x, y = _pair("forget", batch, model)
        out = _outputs(model, x)
        if loss_fn is F.cross_entropy and not y.is_floating_point():
            y = _classes("forget", y, _rows_of_scores(out).shape[1])
        value = scalar("loss_fn", loss_fn(out, y))
        if named and value.requires_grad:
            parts = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            reached = reached or any(part is not None for part in parts)
            for sum_, part in zip(total, parts, strict=True):
                if part is not None:
                    sum_.add_(part, alpha=len(x))
        count += len(x)
    if not count:
        raise ValueError("forget must have at least one row, got none")
    if not reached:
        raise ValueError("model must have a parameter with a gradient of the loss, has none")
    for name, sum_ in zip(named, total, strict=True):
        if not bool(sum_.isfinite().all()):
            raise ValueError(f"the gradient of model must be finite, that of {name} is not")
    chosen = _largest([sum_.abs_() for sum_ in total], keep)
    marked = dict(zip(named, chosen, strict=True))
    return {
        name: marked[name] if name in marked else torch.zeros_like(p, dtype=torch.bool)
        for name, p in model.named_parameters()
    }


@torch.inference_mode(False)  # grad mode too
def salun(
    model: nn.Module,
    forget: Forget | Dataset,
    retain: Retain | Dataset,
    *,
    n_classes: int,
    mask: Mask | None = None,
    keep: float = 0.5,
    epochs: int = 10,
    lr: float = 0.013,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    order: Literal["sequential", "mixed"] = "sequential",
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Return a new model that has unlearned some rows, by random labels under a mask, equation 2.

    Parameters
    ----------
    model : nn.Module
        A trained classifier, ``model(x) -> logits (batch, n_classes)``; left as it is.
    forget, retain : tuple of Tensor, or Dataset
        Inputs and labels of the rows to forget and of those to keep; or map-style datasets of them.
    n_classes : int
        At least 2; labels are in 0..n_classes-1.
    mask : dict of str to Tensor, optional
        As `saliency_mask` returns it; by default it is computed from ``forget`` and ``keep``.
    keep : float, default=0.5
        As for `saliency_mask`; 1 is random labelling without a mask.
    epochs : int, default=10
        At least 1.
    lr : float, default=0.013
        Learning rate, positive. What suits depends on data and network: choose it by
        `unlearning_report` on rows that need not be forgotten.
    momentum : float, default=0.9
        In [0, 1).
    weight_decay : float, default=5e-4
        At least 0.
    batch_size : int, default=256
        At least 1.
    order : {"sequential", "mixed"}, default="sequential"
        Each epoch first all rows to forget and then all others, or one pass over both, shuffled.
    alpha : float, default=1.0
        Weight of the rows to keep, at least 0.
    generator : torch.Generator, optional
        Draws labels and batches, and seeds what the model draws itself; torch's own where it is None.

    Returns
    -------
    nn.Module
        A copy with other weights, in the mode and dtype of ``model``.

    Raises
    ------
    ValueError
        If an argument is out of range, rows are missing or do not fit, labels are outside the
        classes, the mask has other names or shapes than the parameters, or the loss stops being finite.

    Notes
    -----
    1. The drawn label may be the true one, as in the official code.
    2. Weight decay and momentum would move masked weights: after each step these are put back
       and their momentum is cleared.
    3. The network is in training mode, so statistics of batch normalisation move, mask or not. A last
       batch of a single row joins the one before.
    4. Weights in 16 bits are unlearned in float32 and rounded at the end.

    References
    ----------
    .. [1] Fan et al. SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in
       Both Image Classification and Generation. ICLR 2024. Section 4, Equation 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import salun
    >>> net = torch.nn.Linear(4, 3)
    >>> x, y = torch.randn(30, 4), torch.randint(3, (30,))
    >>> unlearned = salun(net, (x[:5], y[:5]), (x[5:], y[5:]), n_classes=3, keep=0.25)
    >>> int((unlearned.weight != net.weight).sum() + (unlearned.bias != net.bias).sum())  # of 15
    3
    """
    n_classes = integer("n_classes", n_classes, 2)
    epochs, batch_size = integer("epochs", epochs, 1), integer("batch_size", batch_size, 1)
    within("keep", keep, 0, 1, open_low=True)
    at_least("lr", lr, 0, strict=True)
    within("momentum", momentum, 0, 1, open_high=True)
    at_least("weight_decay", weight_decay, 0)
    at_least("alpha", alpha, 0)
    one_of("order", order, ("sequential", "mixed"))
    gone, kept = _Rows("forget", forget, n_classes), _Rows("retain", retain, n_classes)
    if mask is None:
        batches = (gone.take(part) for part in torch.arange(len(gone)).split(batch_size))
        mask = saliency_mask(model, batches, keep=keep)
    twin = _widened(model).train()
    trained = [p for p in twin.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model must have a parameter with a gradient of the loss, has none")
    optimizer = MaskedOptimizer(
        torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay),
        twin.named_parameters(), mask,
    )  # fmt: skip

    def step(rows: Tensor, labels: Tensor) -> Tensor:
        """Descend on rows of both parts, those of ``retain`` numbered after those of ``forget``."""
        x, y, weight = [], [], []
        for part, first, share in ((gone, 0, 1.0), (kept, len(gone), alpha)):
            here = rows[(rows >= first) & (rows < first + len(part))]
            if len(here):
                inputs, target = _pair(part.name, part.take(here - first), twin)
                target = _classes(part.name, target, n_classes)
                x.append(inputs)
                y.append(labels[here].to(target) if part is gone else target)
                weight += [share] * len(here)
        out = _rows_of_scores(_outputs(twin, torch.cat(x)), n_classes)
        losses = F.cross_entropy(out, torch.cat(y), reduction="none")
        total = (losses * torch.tensor(weight, dtype=losses.dtype, device=losses.device)).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.detach()

    drawn = nullcontext() if generator is None else seeded(seed_from(generator), trained[0].device)
    with drawn:  # what a model draws itself, as dropout does, follows the generator
        for epoch in range(epochs):
            labels = _draw(torch.randint, n_classes, (len(gone),), generator=generator)
            if order == "mixed":
                passes = [_draw(torch.randperm, len(gone) + len(kept), generator=generator)]
            else:
                passes = [
                    _draw(torch.randperm, len(gone), generator=generator),
                    _draw(torch.randperm, len(kept), generator=generator) + len(gone),
                ]
            value = torch.zeros(())
            for rows in passes:
                for batch in _split(rows, batch_size):
                    value = step(batch, labels)
            if not bool(value.isfinite()):
                raise ValueError(f"lr must be lower, the loss is {value} after epoch {epoch}: got {lr}")
    return _like(model, twin)


def concept_unlearning_loss(
    net: Callable[..., Tensor], x_t: Float[Tensor, "batch ..."], t: Any, forget_cond: Any, other_cond: Any
) -> Float[Tensor, ""]:
    """Return how far a denoiser is from taking a concept for another: the generative form of equation 2.

    Add it to ``alpha`` times the ordinary diffusion loss on data that is kept, and step with a
    `MaskedOptimizer` whose mask comes from the ordinary loss on the data of the concept.

    Parameters
    ----------
    net : callable
        ``net(x_t, t, cond) -> Tensor``, as noise or velocity is predicted.
    x_t : Tensor of shape (batch, ...)
        Noised data of the concept to forget.
    t : Any
        Times, as the network takes them.
    forget_cond, other_cond : Any
        The concept to forget and the one to put in its place: class, embedding.

    Returns
    -------
    Tensor
        The mean squared difference of ``net(x_t, t, forget_cond)`` and ``net(x_t, t, other_cond)``,
        a scalar of the dtype of ``x_t``; the latter is a constant for the gradient.

    Raises
    ------
    ValueError
        If ``x_t`` is empty or not floating, or the two predictions differ in shape.

    Notes
    -----
    The official settings for a DDPM on CIFAR-10 are Adam with a rate of 1e-4, gradients clipped
    to norm 1, alpha 1e-3, half of the weights in the mask, and the next class in its place.

    References
    ----------
    .. [1] Fan et al. SalUn. ICLR 2024. Section 4, Equation 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import concept_unlearning_loss
    >>> net = lambda x, t, cond: x * cond
    >>> concept_unlearning_loss(net, torch.ones(4, 2), torch.zeros(4), 3.0, 1.0)
    tensor(4.)
    """
    if not floating("x_t", x_t).numel():
        raise ValueError(f"x_t must have at least one row, got shape {tuple(x_t.shape)}")
    with torch.no_grad():
        target = net(x_t, t, other_cond)
    guess = net(x_t, t, forget_cond)
    if guess.shape != target.shape:
        raise ValueError(
            f"net must give one shape for both conditions, got {tuple(guess.shape)} and {tuple(target.shape)}"
        )
    with torch.autocast(x_t.device.type, enabled=False):
        return F.mse_loss(wide(guess), wide(target)).to(x_t.dtype)


class _Rows:
    """Rows of inputs and labels, tensors or a map-style dataset, taken by their number."""

    def __init__(self, name: str, data: Any, n_classes: int | None = None) -> None:
        self.name = name
        if isinstance(data, tuple):
            _pair(name, data)
            if n_classes is not None and len(data[0]):
                _classes(name, data[1], n_classes)
        elif not isinstance(data, Dataset) or not hasattr(data, "__len__"):
            raise ValueError(
                f"{name} must be tensors (x, y) or a dataset with a length, got {type(data).__name__}"
            )
        self.data: Any = data
        if not len(self):
            raise ValueError(f"{name} must have at least one row, got none")

    def __len__(self) -> int:
        return len(self.data[0]) if isinstance(self.data, tuple) else len(self.data)

    def take(self, rows: Tensor) -> Any:
        if isinstance(self.data, tuple):
            return tuple(part[rows.to(part.device)] for part in self.data)
        return default_collate([self.data[i] for i in rows.tolist()])


def _refuse(name: str, data: Any) -> Any:
    raise ValueError(
        f"{name} must be tensors (x, y), a dataset or batches of them, got {type(data).__name__}"
    )


def _pair(name: str, batch: Any, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a batch, as wide as the model and on its device."""
    fits = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(p, Tensor) for p in batch)
    if not fits or any(part.ndim == 0 for part in batch):
        raise ValueError(f"{name} must be tensors (x, y), or give such batches, got {type(batch).__name__}")
    x, y = batch
    if len(x) != len(y):
        raise ValueError(f"{name} must have a label an input, got {len(x)} inputs and {len(y)} labels")
    if model is not None:
        first = next(model.parameters(), x)
        x, y = (each.clone() if each.is_inference() else each.detach() for each in (x, y))
        x, y = wide(x).to(first.device), y.to(first.device)
        if x.is_floating_point() and first.is_floating_point():
            x = x.to(first.dtype)
    return x, y


def _classes(name: str, y: Tensor, n_classes: int) -> Tensor:
    """Return labels as int64 if they are of these classes."""
    class_indices(f"labels of {name}", y.cpu(), len(y), n_classes)  # there values are read
    return y.long()


def _outputs(model: nn.Module, x: Tensor) -> Any:
    """Return what a model gives, widened where it is a narrow tensor."""
    out = model(x)
    return wide(out) if isinstance(out, Tensor) and out.is_floating_point() else out


def _rows_of_scores(out: Any, n_classes: int | None = None) -> Tensor:
    """Return outputs that are scores of classes."""
    wanted = "classes" if n_classes is None else n_classes
    if not isinstance(out, Tensor) or out.ndim != 2 or n_classes not in (None, out.shape[1]):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model must give logits of shape (batch, {wanted}), got {got}")
    return out


def _largest(sizes: list[Tensor], keep: float) -> list[Tensor]:
    """Return masks of the largest share of all sizes together; the first of equals, so that masks nest."""
    flat = torch.cat([part.flatten().to(sizes[0].device) for part in sizes])
    k = int(len(flat) * keep)
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    if k:
        least = flat.kthvalue(len(flat) - k + 1).values
        torch.gt(flat, least, out=chosen)
        ties = (flat == least).nonzero()[:, 0]
        chosen[ties[: k - int(chosen.sum())]] = True
    parts = chosen.split([part.numel() for part in sizes])
    return [mask.view_as(part).to(part.device) for mask, part in zip(parts, sizes, strict=True)]


def _widened(model: nn.Module) -> nn.Module:
    """Return a copy whose weights and buffers have 32 bits at least."""
    twin = copy.deepcopy(model)
    for part in (*twin.parameters(), *twin.buffers()):
        part.data = wide(part.data)
    return twin


def _like(model: nn.Module, twin: nn.Module) -> nn.Module:
    """Return the twin, its weights, buffers and modes in the form of those of the model."""
    pairs = [*zip(model.parameters(), twin.parameters(), strict=True)]
    pairs += [*zip(model.buffers(), twin.buffers(), strict=True)]
    for was, now in pairs:
        now.grad = None
        now.data = now.data.to(was.dtype)
    for was, now in zip(model.modules(), twin.modules(), strict=True):
        now.training = was.training
    return twin


def _draw(how: Callable[..., Tensor], *args: Any, generator: torch.Generator | None) -> Tensor:
    """Return integers on the CPU, drawn on the device of the generator."""
    return how(*args, generator=generator, device=draw_device(generator)).cpu()


def _split(rows: Tensor, size: int) -> list[Tensor]:
    """Return batches of rows; a single last row joins the batch before, as it cannot be normalised."""
    parts = list(rows.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1 and size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
