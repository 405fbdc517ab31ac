"""Is it noise? The gradient of the whole training set, and optimisers raced with it and without.

A batch's gradient is the whole set's plus noise, g_b = g + e_b. If an optimiser wins because it bears
e_b better, its advantage goes when batches grow until e_b = 0, which accumulating gradients over all
batches does on any machine. What stays is geometry. `compare_optimizers` runs that test: each
optimiser with the learning rate that suits it, the same initial weights, the same batches.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, scalar, within
from posterity._precision import wide
from posterity._random import seeded

__all__ = ["OptimizerCurve", "compare_optimizers", "full_batch_closure", "gradient_noise", "tail_index"]

Batches = Iterable[tuple[Tensor, ...]]
Loss = Callable[..., Tensor]


def full_batch_closure(
    model: nn.Module, loss_fn: Loss, batches: Batches, *, weights: Sequence[float] | None = None
) -> Callable[[], Tensor]:
    """Return a closure that gives any optimiser the gradient of all batches together.

    Parameters
    ----------
    model : nn.Module
        Its parameters' ``.grad`` are replaced at each call.
    loss_fn : callable
        ``loss_fn(model, *batch)`` is the mean loss of a batch, a scalar.
    batches : iterable of tuple of Tensor
        A list or a DataLoader: it is gone through at every call.
    weights : sequence of float, optional
        One a batch, by default how many samples it has, ``len(batch[0])``. At least 0, their sum positive.

    Returns
    -------
    callable
        ``closure()`` is the weighted mean of the losses, a detached scalar. It suits
        ``optimizer.step(closure)`` of every optimiser, LBFGS among them.

    Raises
    ------
    ValueError
        If ``weights`` do not fit. The closure raises it if there is no batch, a loss is not a scalar, or
        ``batches`` can be gone through only once and already was.

    Warns
    -----
    UserWarning
        Once, at the first call, if the model is in training mode with dropout or batch normalisation: the gradient is then random,
        or each batch's own.

    Notes
    -----
    Gradients are added up in float32 at least, so that hundreds of batches also add up in bfloat16.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import full_batch_closure
    >>> model = nn.Linear(2, 1)
    >>> rows, y = torch.randn(10, 2), torch.randn(10, 1)
    >>> batches = list(zip(rows.split(4), y.split(4)))  # 4, 4 and 2 rows
    >>> closure = full_batch_closure(model, lambda model, x, y: ((model(x) - y) ** 2).mean(), batches)
    >>> optimizer = torch.optim.LBFGS(model.parameters())
    >>> first = optimizer.step(closure)
    >>> bool(closure() < first)
    True
    """
    if weights is not None:
        weights = [at_least(f"weights[{k}]", weight, 0.0) for k, weight in enumerate(weights)]
        if not sum(weights) > 0:
            raise ValueError(f"weights must have a positive sum, got {sum(weights)}")
    spent = warned = False

    def closure() -> Tensor:
        nonlocal spent, warned
        if spent and iter(batches) is batches:
            raise ValueError("batches can be gone through only once: pass a list or a DataLoader")
        if not warned:
            _warn_of_noise(model)
        spent = warned = True
        params = [p for p in model.parameters() if p.requires_grad]
        loss, sums = _sums(model, loss_fn, batches, params, weights)
        for p, total in zip(params, sums, strict=True):
            p.grad = None if total is None else total.to(p.dtype)
        return loss

    return closure


def _warn_of_noise(model: nn.Module) -> None:
    for name, part in model.named_modules():
        dropout = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
        dropout = dropout or (isinstance(part, nn.MultiheadAttention) and part.dropout > 0)
        norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if part.training and (dropout or norm):
            what = "dropout is active" if dropout else "statistics are each batch's own"
            warnings.warn(
                f"the gradient is not that of the whole set: {what} in {name or 'the model'}; call eval()",
                stacklevel=3,
            )
            return


def _each(model: nn.Module, loss_fn: Loss, batches: Batches, params: list[nn.Parameter]) -> Iterator[Any]:
    """Yield size, loss and gradients of each batch."""
    for batch in batches:
        with torch.enable_grad():
            loss = scalar("loss_fn", loss_fn(model, *batch))
            yield len(batch[0]), loss.detach(), torch.autograd.grad(loss, params, allow_unused=True)


def _sums(
    model: nn.Module, loss_fn: Loss, batches: Batches, params: list[nn.Parameter], weights: Sequence[float] | None
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Return the mean loss and the mean gradients, each batch weighted, in float32 at least."""
    total, loss, n = 0.0, torch.zeros(()), 0
    sums: list[Tensor | None] = [None] * len(params)
    for size, value, grads in _each(model, loss_fn, batches, params):
        if weights is not None and n == len(weights):
            raise ValueError(f"weights must be one a batch, got {len(weights)} for more batches")
        weight = float(size if weights is None else weights[n])
        n, total = n + 1, total + weight
        if not weight:
            continue
        share = weight / total  # of all until now: a running mean, which no number of batches overflows
        loss = torch.lerp(loss.to(wide(value)), wide(value), share)
        for k, grad in enumerate(grads):
            before = sums[k]
            if before is not None:
                before.lerp_(torch.zeros_like(before) if grad is None else wide(grad), share)
            elif grad is not None:
                sums[k] = wide(grad) * share
    if not n:
        raise ValueError("batches must hold a batch, got none")
    if weights is not None and n < len(weights):
        raise ValueError(f"weights must be one a batch, got {len(weights)} for {n} batches")
    if not total > 0:
        raise ValueError("batches must hold samples, got empty ones")
    return loss, sums


def gradient_noise(
    model: nn.Module, loss_fn: Loss, batches: Batches, *, full: Float[Tensor, " parameters"] | None = None
) -> Float[Tensor, " batches"]:
    """Return how far each batch's gradient is from the whole set's, ||g_b - g||.

    Parameters
    ----------
    model : nn.Module
        Its ``.grad`` are not touched.
    loss_fn : callable
        ``loss_fn(model, *batch)`` is the mean loss of a batch, a scalar.
    batches : iterable of tuple of Tensor
        A list or a DataLoader: it is gone through twice without ``full``.
    full : Tensor of shape (parameters,), optional
        g, flat in the order of ``model.parameters()`` that require a gradient; by default the mean over
        the batches, weighted by samples.

    Returns
    -------
    Tensor of shape (batches,)
        In float32 at least.

    Raises
    ------
    ValueError
        If there is no batch, a loss is not a scalar, ``full`` has another length, or ``batches`` can be gone
        through only once and ``full`` is not given.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    size = sum(p.numel() for p in params)
    if full is None:
        if iter(batches) is batches:
            raise ValueError("batches can be gone through only once: pass a list or a DataLoader")
        _, sums = _sums(model, loss_fn, batches, params, None)
        full = _flat(sums, params)
    elif full.shape != (size,):
        raise ValueError(f"full must have shape ({size},), the model's parameters, got {tuple(full.shape)}")
    full = wide(full)
    off = [
        torch.linalg.vector_norm(_flat(grads, params) - full)
        for _, _, grads in _each(model, loss_fn, batches, params)
    ]
    if not off:
        raise ValueError("batches must hold a batch, got none")
    return torch.stack(off)


def _flat(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    return torch.cat([
        wide(torch.zeros_like(p) if g is None else g.detach()).reshape(-1) for g, p in zip(grads, params, strict=True)
    ])  # fmt: skip


def tail_index(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return Hill's estimate of the exponent with which a tail falls, P(X > t) ~ t^-alpha.

    Small ones are heavy tails: below 2 the variance is infinite. It uses the k = floor(sqrt(n)) largest,
    ``1 / mean_i log(x_(i) / x_(k+1))``, and is infinite where these are all the same.

    Parameters
    ----------
    x : Tensor of shape (n,)
        Positive, at least two; norms of gradient noise for instance.

    Returns
    -------
    Tensor of shape ()
        In float32 at least.

    Raises
    ------
    ValueError
        If there are fewer than two, or one of the largest is not a positive finite number.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import tail_index
    >>> u = torch.arange(1, 100_001, dtype=torch.float64) / 100_001
    >>> round(float(tail_index(u**-0.5)), 1)  # exactly Pareto with exponent 2
    2.0
    """
    has_shape("x", floating("x", x), (None,))
    if len(x) < 2:
        raise ValueError(f"x must have at least two entries, got {len(x)}")
    k = math.isqrt(len(x))
    finite("x", x)
    largest = wide(x).topk(k + 1).values
    if not bool(largest[-1] > 0):
        raise ValueError(f"x must be positive, got {float(largest[-1])} among its {k + 1} largest")
    return 1 / (largest[:-1] / largest[-1]).log().mean()


@dataclass
class OptimizerCurve:
    """How an optimiser did with the learning rate of its grid that served it best.

    Attributes
    ----------
    name : str
    lr : float
        The rate of the least final loss.
    losses : Tensor of shape (n_steps + 1,)
        The loss before each step, of the whole set or of the step's batch, and at the end that of the whole
        set. Shorter if it diverged.
    grid : dict of float to float
        Final loss of the whole set with each rate, infinite where it diverged.
    diverged : bool
        Whether it did with every rate.
    """

    name: str
    lr: float
    losses: Tensor
    grid: dict[float, float] = field(default_factory=dict)
    diverged: bool = False


def compare_optimizers(
    make_model: Callable[[], nn.Module],
    loss_fn: Loss,
    data: tuple[Tensor, ...],
    optimizers: Mapping[str, tuple[Callable[..., Any], Sequence[float]]],
    *,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    n_steps: int,
    random_state: int = 0,
) -> dict[str, OptimizerCurve]:
    """Train a network with each optimiser at each of its learning rates, all else the same.

    Parameters
    ----------
    make_model : callable
        ``make_model()`` returns a new network; it is called under ``random_state`` each time.
    loss_fn : callable
        ``loss_fn(model, *batch)`` is the mean loss of a batch, a scalar.
    data : tuple of Tensor
        Samples in their first axis, all of one length.
    optimizers : mapping of str to tuple
        A name to a factory ``make(params, lr)`` and the learning rates to try.
    batch_size : int, optional
        Samples a step, drawn in a random order that is the same for all; all of them by default.
    micro_batch : int, optional
        How many samples are evaluated at once: gradients are added up over a batch. All by default.
    n_steps : int
        At least 1.
    random_state : int, default=0
        Decides weights, batches and dropout; torch's global state is left as it was.

    Returns
    -------
    dict of str to OptimizerCurve
        The rate of each with the least loss of the whole set at the end: tuned on what is minimised.

    Raises
    ------
    ValueError
        If data have different lengths or none, a size is out of range, or there is no optimiser or no rate.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import SignDescent, compare_optimizers
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> curves = compare_optimizers(
    ...     lambda: nn.Linear(4, 1), lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean(), (x,),
    ...     {"SGD": (torch.optim.SGD, (0.01, 0.1)), "sign": (SignDescent, (0.01, 0.1))}, n_steps=20,
    ... )
    >>> {name: curve.lr for name, curve in curves.items()}
    {'SGD': 0.1, 'sign': 0.1}
    """
    if not data or not len(data[0]) or any(len(part) != len(data[0]) for part in data):
        raise ValueError(
            f"data must be tensors of one positive length, got lengths {[len(part) for part in data]}"
        )
    n = len(data[0])
    batch_size = (
        n if batch_size is None else int(within("batch_size", integer("batch_size", batch_size), 1, n))
    )
    micro_batch = n if micro_batch is None else integer("micro_batch", micro_batch, 1)
    integer("n_steps", n_steps, 1)
    if not optimizers:
        raise ValueError("optimizers must name one, got none")
    for name, (_, rates) in optimizers.items():
        if not len(rates):
            raise ValueError(f"optimizers[{name!r}] must have a learning rate to try, got none")
    found = {}
    for name, (make, rates) in optimizers.items():
        runs = {
            lr: _train(
                make_model,
                loss_fn,
                data,
                partial(make, lr=lr),
                batch_size,
                micro_batch,
                n_steps,
                random_state,
            )
            for lr in rates
        }
        grid = {lr: float(losses[-1]) for lr, losses in runs.items()}
        best = min(grid, key=lambda lr: grid[lr])
        found[name] = OptimizerCurve(name, best, torch.tensor(runs[best]), grid, math.isinf(grid[best]))
    return found


def _train(
    make_model: Callable[[], nn.Module], loss_fn: Loss, data: tuple[Tensor, ...], make: Callable[[Any], Any],
    batch_size: int, micro_batch: int, n_steps: int, seed: int,
) -> list[float]:  # fmt: skip
    """Return the losses of a run; the last is infinite if one of them was not finite."""
    with seeded(seed, data[0].device):
        model = make_model().to(data[0].device)
        optimizer = make(model.parameters())
        order = _orders(len(data[0]), batch_size, seed)
        losses = []

        def closure_of(rows: Tensor | None) -> Callable[[], Tensor]:
            part = data if rows is None else tuple(each[rows.to(each.device)] for each in data)
            pieces = list(zip(*(each.split(micro_batch) for each in part), strict=True))
            return full_batch_closure(model, loss_fn, pieces)

        whole = closure_of(None)
        for _ in range(n_steps):
            closure = whole if batch_size == len(data[0]) else closure_of(next(order))
            losses.append(float(optimizer.step(closure)))
            if not math.isfinite(losses[-1]):
                return [*losses[:-1], math.inf]
        losses.append(float(whole()))
    return losses if math.isfinite(losses[-1]) else [*losses[:-1], math.inf]


def _orders(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield rows for a step, a new order after every pass; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % batch_size].split(batch_size)
