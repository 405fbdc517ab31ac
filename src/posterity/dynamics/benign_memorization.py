r"""Benign memorization: a network that fits random labels under augmentation still learns good features.

Each sample keeps its random label in all of its augmented views,

.. math:: \min_\theta \frac{1}{n} \sum_i \mathbb{E}_{T}\, \ell\bigl(f_\theta(T(x_i)), \tilde y_i\bigr),

so there are more inputs than the network can store one by one. It must become invariant to the augmentation,
which is what good features are; only its last layers tie each sample to its label. With few views a sample
(`FiniteViews`), or none, inputs are stored as they are, and features are lost on the way. `layer_probe` and
`memorization_profile` say at which layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, finite, integer, one_of, within
from posterity._models import evaluating
from posterity._precision import NARROW
from posterity._random import draw_device
from posterity.dynamics._plots import axes

__all__ = ["FiniteViews", "MemorizationRun", "memorize", "randomize_labels"]

BATCH = 1024  # rows that go through an augmentation or a network at once, where there is no gradient
LARGEST = 2**31  # bytes of a bank of views
FITTED = 0.95  # accuracy on the labels from which they count as memorised

Augment = Callable[..., Tensor]


def randomize_labels(
    y: Int[Tensor, " n"],
    *,
    n_classes: int,
    fraction: float = 1.0,
    mode: Literal["uniform", "permute", "unique"] = "uniform",
    generator: torch.Generator | None = None,
) -> Int[Tensor, " n"]:
    """Return labels of which a share is random: drawn once, then to be kept for all views of a sample.

    Parameters
    ----------
    y : Tensor of shape (n,)
        Class indices; left as they are.
    n_classes : int
        Number of classes, at least 1.
    fraction : float, default=1.0
        In [0, 1]: ``round(fraction * n)`` samples, drawn at random, get a new label.
    mode : {"uniform", "permute", "unique"}, default="uniform"
        A new label is any class, the old one among them; or the labels of those samples change places,
        which keeps the counts of classes; or sample i has label i, of all samples, so that a head needs n outputs.
    generator : torch.Generator, optional
        By default torch's global one. ``"unique"`` draws nothing.

    Returns
    -------
    Tensor of shape (n,), int64
        On the device of ``y``.

    Raises
    ------
    ValueError
        If ``y`` or a setting is not as said, or ``fraction`` is not 1 for ``"unique"``.

    Notes
    -----
    1. Uniform labels agree with the old ones in a share 1 - fraction (1 - 1 / n_classes), in expectation.

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import randomize_labels
    >>> y = torch.tensor([0, 0, 0, 1, 1, 2])
    >>> randomize_labels(y, n_classes=3, mode="permute", generator=torch.Generator().manual_seed(0)).bincount()
    tensor([3, 2, 1])
    """
    integer("n_classes", n_classes, 1)
    within("fraction", fraction, 0, 1)
    one_of("mode", mode, ("uniform", "permute", "unique"))
    n = _length("y", y)
    labels = class_indices("y", y, n, n_classes).detach().to(torch.int64, copy=True)
    if mode == "unique":
        if fraction != 1:
            raise ValueError(f"fraction must be 1 for mode 'unique', got {fraction}")
        return torch.arange(n, device=y.device)
    device = draw_device(generator, y.device)
    chosen = torch.randperm(n, generator=generator, device=device)[: round(fraction * n)]
    if mode == "uniform":
        new = torch.randint(n_classes, chosen.shape, generator=generator, device=device).to(y.device)
    else:  # the order of the chosen is random already: each takes the label of another of them
        new = labels[chosen.sort().values.to(y.device)]
    labels[chosen.to(y.device)] = new
    return labels


class FiniteViews:
    """A fixed bank of augmented views, so many of each sample, to find how much can be memorised.

    One view is an ordinary training set, transformed once. The more there are, the more inputs have to be
    stored, and the more it pays to become invariant.

    Parameters
    ----------
    x : Tensor of shape (n, *shape)
        Samples.
    augment : callable
        ``augment(batch, generator=generator)`` returns a batch of the same shape.
    n_views : int
        Views of each sample, at least 1.
    generator : torch.Generator, optional
        Passed to ``augment``.

    Attributes
    ----------
    bank : Tensor of shape (n, n_views, *shape)
        In the dtype of ``x`` and on its device.

    Raises
    ------
    ValueError
        If an argument is not as said, ``augment`` returns another shape, or the bank would take more than 2 GiB.

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import FiniteViews
    >>> def shift(x, generator=None):
    ...     return x + torch.randint(100, x.shape, generator=generator)
    >>> views = FiniteViews(torch.zeros(3, 1), shift, 2, generator=torch.Generator().manual_seed(0))
    >>> views(torch.tensor([1, 1, 2])).shape
    torch.Size([3, 1])
    """

    def __init__(
        self,
        x: Shaped[Tensor, " n *shape"],
        augment: Callable[..., Tensor],
        n_views: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        n = _length("x", x)
        _callable(augment)
        size = integer("n_views", n_views, 1) * x.numel() * x.element_size()
        if size > LARGEST:
            raise ValueError(
                f"n_views must be less: {n_views} views of {n} samples take {size / 2**30:.1f} GiB, at most 2 are allowed"
            )
        self.bank = torch.empty((n, n_views, *x.shape[1:]), dtype=x.dtype, device=x.device)
        with torch.no_grad():
            for rows in torch.arange(n, device=x.device).split(BATCH):
                for view in range(n_views):
                    self.bank[rows, view] = _augmented(augment, x, rows, generator)

    def __call__(
        self, index: Int[Tensor, " batch"], *, generator: torch.Generator | None = None
    ) -> Shaped[Tensor, " batch *shape"]:
        """Return a view of each sample, drawn at random.

        Parameters
        ----------
        index : Tensor of shape (batch,)
            Rows of ``x``.
        generator : torch.Generator, optional
            By default torch's global one.

        Returns
        -------
        Tensor of shape (batch, *shape)
        """
        n, n_views = self.bank.shape[:2]
        index = class_indices("index", index, _length("index", index), n).to(self.bank.device, torch.int64)
        device = draw_device(generator, self.bank.device)
        view = torch.randint(n_views, index.shape, generator=generator, device=device)
        return self.bank[index, view.to(self.bank.device)]


@dataclass(frozen=True)
class MemorizationRun:
    """What a training on noisy labels went through, at each evaluation: tensors on the CPU.

    Attributes
    ----------
    steps : Tensor of shape (E,), int64
        Steps taken.
    loss : Tensor of shape (E,), float64
        Mean training loss since the evaluation before, in nats.
    clean_view_accuracy : Tensor of shape (E,), float64
        Share of samples, as they are, that get their noisy label: how much is memorised.
    augmented_accuracy : Tensor of shape (E,), float64
        The same of a view of each sample, which is less. Without augmentation the two are equal.
    memorized : bool
        Whether the last ``clean_view_accuracy`` is at least ``stop_at``, by default 0.95.
    """

    steps: Int[Tensor, " E"]
    loss: Float[Tensor, " E"]
    clean_view_accuracy: Float[Tensor, " E"]
    augmented_accuracy: Float[Tensor, " E"]
    memorized: bool

    def plot(self, ax: Any = None) -> Any:
        """Draw both accuracies over steps.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default of a new figure.

        Returns
        -------
        matplotlib.axes.Axes
        """
        ax = axes(ax)
        ax.plot(self.steps, self.clean_view_accuracy, "o-", label="samples as they are")
        ax.plot(self.steps, self.augmented_accuracy, "o-", label="augmented")
        ax.set(xlabel="steps", ylabel="accuracy on the noisy labels", ylim=(0, 1.02))
        ax.legend()
        return ax


@torch.inference_mode(False)  # grad mode too
def memorize(
    model: nn.Module,
    x: Shaped[Tensor, " n *shape"],
    y_noisy: Int[Tensor, " n"],
    *,
    augment: Callable[..., Tensor] | FiniteViews | None,
    n_steps: int = 4_000,
    batch_size: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    schedule: Literal["cosine", "constant"] = "cosine",
    eval_every: int = 200,
    stop_at: float | None = None,
    generator: torch.Generator | None = None,
) -> MemorizationRun:
    """Train a model in place on noisy labels, each of which all views of its sample carry.

    Parameters
    ----------
    model : nn.Module
        ``model(x)`` has shape (n, classes), more classes than the largest label; the paper's is an encoder, a
        projector of fully connected layers and a linear head. Its trainable parameters are in float32 or float64. It is
        trained in train mode; afterwards each submodule has the mode that it had, and gradients are None.
    x : Tensor of shape (n, *shape)
        At least 2 samples.
    y_noisy : Tensor of shape (n,)
        Class indices, as of `randomize_labels`.
    augment : callable, FiniteViews or None
        ``augment(batch, generator=generator)`` returns a batch of the same shape, drawn anew in each step; a bank of
        views of ``x``; or no augmentation.
    n_steps : int, default=4_000
        Steps of Adam, at least 1.
    batch_size : int, default=128
        At least 1; batches are in a new order each epoch. A last one of a single sample is left out.
    lr : float, default=2e-3
        Learning rate, greater than 0.
    weight_decay : float, default=0.0
        Of Adam, at least 0.
    schedule : {"cosine", "constant"}, default="cosine"
        Cosine falls to 0 at ``n_steps``.
    eval_every : int, default=200
        Steps between evaluations, at least 1; one is after the last step.
    stop_at : float, optional
        In (0, 1]: the end, once an evaluation finds so much of the samples as they are fitted.
    generator : torch.Generator, optional
        Draws the batches, and is passed to ``augment``; by default torch's global one, which dropout reads anyway.

    Returns
    -------
    MemorizationRun
        Loss and accuracies on the noisy labels.

    Raises
    ------
    ValueError
        If model, data or a setting are not as said, ``augment`` returns another shape, or the loss is not finite.

    See Also
    --------
    layer_probe : Whether the features are still good, layer by layer.

    Notes
    -----
    1. Optimiser and its settings are Adam's with a cosine; the paper's were not taken over.
    2. Computed outside autocast.

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import memorize, randomize_labels
    >>> rng = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(32, 8, generator=rng), torch.zeros(32, dtype=torch.int64)
    >>> noisy = randomize_labels(y, n_classes=4, generator=rng)
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> run = memorize(net, x, noisy, augment=None, n_steps=400, lr=1e-2, stop_at=1.0, generator=rng)
    >>> run.memorized, run.clean_view_accuracy[-1]
    (True, tensor(1., dtype=torch.float64))
    """
    for name, value in (("n_steps", n_steps), ("batch_size", batch_size), ("eval_every", eval_every)):
        integer(name, value, 1)
    at_least("lr", lr, 0.0, strict=True)
    at_least("weight_decay", weight_decay, 0.0)
    one_of("schedule", schedule, ("cosine", "constant"))
    if stop_at is not None:
        within("stop_at", stop_at, 0, 1, open_low=True)
    y = _labelled("x", x, "y_noisy", y_noisy).to(x.device, torch.int64)
    _augments(augment, x)
    params = [p for p in model.parameters() if p.requires_grad]
    narrow = [str(p.dtype).removeprefix("torch.") for p in params if p.dtype in NARROW]
    if not params or narrow:
        raise ValueError(
            f"model must have trainable parameters in float32 or float64, got {narrow[0] if narrow else 'none'}"
        )
    fused = all(p.device.type in ("cpu", "cuda") for p in params)
    optimizer = torch.optim.Adam(params, lr=lr, weight_decay=weight_decay, fused=fused)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    found: list[tuple[float, ...]] = []
    total, since = torch.zeros((), dtype=torch.float64, device="cpu"), 0
    with torch.autocast(x.device.type, enabled=False), evaluating(model):
        with torch.no_grad():
            _check_head(model(x[:2]), int(y.max()))
        model.train()
        batches = _batches(len(x), batch_size, x.device, generator)
        for step in range(1, n_steps + 1):
            rows = next(batches)
            loss = F.cross_entropy(model(_augmented(augment, x, rows, generator)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule == "cosine":
                falling.step()
            total, since = total.to(loss.device) + loss.detach(), since + 1
            if step % eval_every and step != n_steps:
                continue
            if not bool(total.isfinite()):
                raise ValueError(f"lr must be less, or x: the loss is not finite at step {step}, lr={lr}")
            clean = _accuracy(model, None, x, y, generator)
            seen = clean if augment is None else _accuracy(model, augment, x, y, generator)
            found.append((step, float(total) / since, clean, seen))
            total, since = torch.zeros_like(total), 0
            if stop_at is not None and clean >= stop_at:
                break
    optimizer.zero_grad()
    steps, loss, clean_view, augmented = torch.tensor(found, dtype=torch.float64).T
    memorized = found[-1][2] >= (FITTED if stop_at is None else stop_at)
    return MemorizationRun(steps.long(), loss, clean_view, augmented, memorized)


def _accuracy(
    model: nn.Module,
    augment: Augment | FiniteViews | None,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None,
) -> float:
    """Return the share of samples, or of a view of each, that the model at rest gives their label."""
    right = 0
    with torch.no_grad(), evaluating(model):
        for rows in torch.arange(len(x), device=x.device).split(BATCH):
            right += int((model(_augmented(augment, x, rows, generator)).argmax(1) == y[rows]).sum())
    return right / len(x)


def _batches(
    n: int, batch_size: int, device: torch.device, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield rows without end; one row alone, which batch normalisation cannot do with, is left out."""
    while True:
        order = torch.randperm(n, generator=generator, device=draw_device(generator, device)).to(device)
        parts = order.split(batch_size)
        yield from parts[:-1] if len(parts) > 1 and batch_size > 1 == len(parts[-1]) else parts


def _augmented(
    augment: Augment | FiniteViews | None, x: Tensor, rows: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return views of some samples: the samples themselves, of a bank, or drawn."""
    if isinstance(augment, FiniteViews):
        return augment(rows, generator=generator)
    batch = x[rows]  # a copy: what changes it in place does not reach x
    if augment is None:
        return batch
    views = augment(batch, generator=generator)
    if not isinstance(views, Tensor) or views.shape != (len(rows), *x.shape[1:]):
        what = tuple(views.shape) if isinstance(views, Tensor) else type(views).__name__
        raise ValueError(
            f"augment must return the shape that it is given, {(len(rows), *x.shape[1:])}, got {what}"
        )
    return views.to(x.dtype)


def _augments(augment: Any, x: Tensor) -> None:
    """Refuse what is neither a callable nor a bank of views of these samples."""
    if isinstance(augment, FiniteViews):
        n, _, *shape = augment.bank.shape
        if (n, *shape) != tuple(x.shape) or augment.bank.device != x.device:
            raise ValueError(
                f"augment must have views of x, of shape {tuple(x.shape)} on {x.device}, "
                f"got of shape {(n, *shape)} on {augment.bank.device}"
            )
    elif augment is not None:
        _callable(augment)


def _callable(augment: Any) -> None:
    if not callable(augment):
        raise ValueError(f"augment must be a function of a batch, got {type(augment).__name__}")


def _labelled(name: str, x: Any, label: str, y: Any, least: int = 2) -> Tensor:
    """Return the labels of samples: finite ones, with a class index each, at least so many."""
    n = _length(name, x)
    labels = class_indices(label, y, n).detach()
    if n < least:
        raise ValueError(f"{name} must have at least {least} samples, got {n}")
    if x.is_floating_point():
        finite(name, x)
    if int(labels.min()) < 0:
        raise ValueError(f"{label} must be at least 0, got {int(labels.min())}")
    return labels


def _length(name: str, x: Any) -> int:
    """Return the number of samples."""
    if not isinstance(x, Tensor) or not x.ndim:
        what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of samples, got {what}")
    return len(x)


def _check_head(out: Any, largest: int) -> None:
    """Refuse outputs that have no column for a label."""
    if not isinstance(out, Tensor) or out.ndim != 2:
        what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model must return a row of scores for each sample, got {what}")
    if out.shape[1] <= largest:
        raise ValueError(
            f"model must have an output for each label of y_noisy, 0..{largest}, got {out.shape[1]} outputs"
        )
