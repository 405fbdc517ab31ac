"""AR-CNP: joint predictions from a neural process that was trained to predict one at a time.

A conditional neural process gives each target its own marginal, so its samples are noise
around the mean. The chain rule turns the same trained model into a joint one: predict the
targets one after the other, in an order pi, each with the earlier ones in the context,

    q(y | D) = prod_m p( y_pi(m) | x_pi(m), D + {(x_pi(l), y_pi(l)) : l < m} ).      (1)

Nothing is retrained. A likelihood needs no sampling: with y known all factors are
predictions from growing contexts, and where the context enters as a sum (`CNP`, `ConvCNP`)
the growing sums are prefix sums, so that one call evaluates every factor.
"""

from collections.abc import Callable, Generator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from posterity._checks import integer, one_of
from posterity._precision import wide
from posterity._random import draw_device
from posterity.uncertainty._neural_process import NeuralProcess, Tasks, drawn, predictive_log_density, tasks
from posterity.uncertainty.cnp import _Sums

__all__ = ["ARSample", "ar_log_likelihood", "ar_sample"]

Order = Literal["random", "given", "left-to-right"] | Tensor
CHUNK = 128  # grids that go through the network together: more leave the cache


class ARSample(NamedTuple):
    """Joint samples at M targets, in the order the targets were given in.

    Attributes
    ----------
    y : Tensor of shape (samples, tasks, M, dim_y)
        With observation noise.
    smooth : Tensor of shape (samples, tasks, M, dim_y)
        The model's mean with the whole noisy sample in the context: without the noise.
    mean, variance : Tensor of shape (tasks, M, dim_y)
        Of each target: moments of the mixture of one-point predictions over the samples.
    """

    y: Tensor
    smooth: Tensor
    mean: Tensor
    variance: Tensor


def ar_log_likelihood(
    model: Callable[..., Any],
    x_context: Float[Tensor, "tasks n dim_x"],
    y_context: Float[Tensor, "tasks n dim_y"],
    x_target: Float[Tensor, "tasks m dim_x"],
    y_target: Float[Tensor, "tasks m dim_y"],
    *,
    context_mask: Bool[Tensor, "tasks n"] | None = None,
    target_mask: Bool[Tensor, "tasks m"] | None = None,
    order: Order = "random",
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " tasks"]:
    """Return the joint log-density of the targets by the chain rule, equation 1.

    Parameters
    ----------
    model : callable
        ``model(x_context, y_context, x_target, context_mask=mask)`` returns a ``Normal`` of
        shape (tasks, m, dim_y): any conditional neural process.
    x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
        n may be 0.
    x_target, y_target : Tensor of shape (tasks, m, dim_x) and (tasks, m, dim_y)
        Where to predict, and what came.
    context_mask, target_mask : Tensor of shape (tasks, n) and (tasks, m), bool, optional
        True for a real point. A masked target adds 0 and is never put into the context.
    order : {"random", "given", "left-to-right"} or Tensor, default="random"
        In which the targets are predicted. "random" is one permutation for all tasks;
        "left-to-right" sorts each task by x, by its first coordinate first; a tensor is a
        permutation of shape (m,) or (tasks, m). The value depends on it: a conditional
        neural process is not consistent.
    chunk_size : int, optional
        Predict so many (task, target) pairs together, as a padded batch, in the place of a
        loop over targets; for `ConvCNP`, how many grids go through its network together.
    generator : torch.Generator, optional
        Draws the random order.

    Returns
    -------
    Tensor of shape (tasks,)
        In nats; the outputs of one target are independent given the context.

    Raises
    ------
    ValueError
        If sizes or masks do not fit, ``order`` is no permutation, or the model returns
        anything but a ``Normal`` of shape (tasks, 1, dim_y) for one target.

    Notes
    -----
    1. `CNP` and `ConvCNP` are evaluated by prefix sums, with the values of the loop;
       the grid of a `ConvCNP` covers the points of the whole call in every step.

    References
    ----------
    .. [1] Bruinsma et al. Autoregressive Conditional Neural Processes. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import CNP, ar_log_likelihood
    >>> model = CNP(1, 1)
    >>> x, y = torch.rand(2, 9, 1), torch.rand(2, 9, 1)
    >>> ar_log_likelihood(model, x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]).shape
    torch.Size([2])
    """
    if chunk_size is not None:
        integer("chunk_size", chunk_size, 1)
    batch = tasks(x_context, y_context, x_target, y_target, context_mask, target_mask, **_sizes(model))
    turns = _permutation(order, batch, generator)
    x, y = (_reordered(part, turns) for part in (batch.x_target, batch.y_target))
    batch = batch._replace(x_target=x, y_target=y, target_mask=batch.target_mask.gather(1, turns))
    if _by_sums(model):
        terms = model._factors(batch, chunk_size or CHUNK)
    elif chunk_size is None:
        terms = _loop(model, batch)
    else:
        terms = _padded(model, batch, chunk_size)
    return terms.masked_fill(~batch.target_mask, 0).sum(1).to(y.dtype)


@torch.no_grad()
def ar_sample(
    model: Callable[..., Any],
    x_context: Float[Tensor, "tasks n dim_x"],
    y_context: Float[Tensor, "tasks n dim_y"],
    x_target: Float[Tensor, "tasks m dim_x"],
    n_samples: int,
    *,
    context_mask: Bool[Tensor, "tasks n"] | None = None,
    order: Order = "random",
    generator: torch.Generator | None = None,
) -> ARSample:
    """Draw joint samples of the targets: predict, draw, put the draw into the context, go on.

    Parameters
    ----------
    model, x_context, y_context, x_target : Any
        As for `ar_log_likelihood`.
    n_samples : int
        All samples of all tasks go through the model as one batch, a call a target.
    context_mask, order : Any
        As for `ar_log_likelihood`.
    generator : torch.Generator, optional
        Draws the order and the noise.

    Returns
    -------
    ARSample
        Without gradients.

    Raises
    ------
    ValueError
        As for `ar_log_likelihood`, or if ``n_samples`` is less than 1.

    References
    ----------
    .. [1] Bruinsma et al. Autoregressive Conditional Neural Processes. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import CNP, ar_sample
    >>> model = CNP(1, 1)
    >>> x, y = torch.rand(2, 4, 1), torch.rand(2, 4, 1)
    >>> ar_sample(model, x, y, torch.rand(2, 30, 1), n_samples=5).smooth.shape
    torch.Size([5, 2, 30, 1])
    """
    integer("n_samples", n_samples, 1)
    batch = tasks(x_context, y_context, x_target, None, context_mask, None, **_sizes(model))
    turns = _permutation(order, batch, generator)
    back = turns.argsort(1)
    n_tasks, m, dim_y = batch.y_target.shape
    many = Tasks(*(part.repeat(n_samples, *[1] * (part.ndim - 1)) for part in batch))
    many = many._replace(x_target=_reordered(many.x_target, turns.repeat(n_samples, 1)))
    walk = model._walk if _by_sums(model) else lambda many: _walk(model, many)
    draws, means, variances = [], [], []
    steps = walk(many)
    predictive = next(steps)
    for _ in range(m):
        draws.append(drawn(predictive, predictive.loc.shape, many.y_target.dtype, generator))
        means.append(wide(predictive.loc))
        variances.append(wide(predictive.scale).square())
        predictive = steps.send(draws[-1])
    parts = (_joined(each, many) for each in (draws, means, variances))
    y, mean, variance = (_reordered(part, back.repeat(n_samples, 1)) for part in parts)
    smooth = _reordered(predictive.loc, back.repeat(n_samples, 1))
    y, smooth, mean, variance = (
        part.view(n_samples, n_tasks, m, dim_y) for part in (y, smooth, mean, variance)
    )
    # E[var + mean^2] - E[mean]^2, by deviations: no cancellation
    spread = variance.mean(0) + (mean - mean.mean(0)).square().mean(0)
    smooth, mean, spread = (part.to(y.dtype) for part in (smooth, mean.mean(0), spread))
    return ARSample(y, smooth, mean, spread)


def _by_sums(model: Any) -> bool:
    """Return whether prefix sums give what calling the model would."""
    return isinstance(model, _Sums) and type(model).forward is _Sums.forward


def _sizes(model: Any) -> dict[str, int]:
    return {"dim_x": model.dim_x, "dim_y": model.dim_y} if isinstance(model, NeuralProcess) else {}


def _reordered(points: Tensor, turns: Tensor) -> Tensor:
    return points.gather(1, turns[..., None].expand_as(points))


def _joined(steps: list[Tensor], batch: Tasks) -> Tensor:
    return torch.cat(steps, dim=1) if steps else batch.y_target


def _permutation(order: Order, batch: Tasks, generator: torch.Generator | None) -> Tensor:
    """Return the order as indices of shape (tasks, m)."""
    n, m = batch.x_target.shape[:2]
    device = batch.x_target.device
    if isinstance(order, Tensor):
        if order.dtype != torch.long or order.shape not in ((m,), (n, m)):
            raise ValueError(
                f"order must be a permutation of shape ({m},) or ({n}, {m}) of dtype int64, "
                f"got {tuple(order.shape)} of {order.dtype}"
            )
        turns = order.to(device).expand(n, m)
        wrong = turns.sort(1).values != torch.arange(m, device=device)
        if bool(wrong.any()):
            row = turns[int(wrong.any(1).nonzero()[0])].tolist()
            outside = [k for k in row if not 0 <= k < m]
            said = f"{outside[0]} is outside" if outside else f"{max(row, key=row.count)} repeats"
            raise ValueError(f"order must be a permutation of 0 to {m - 1}, got one in which {said}")
        return turns
    if one_of("order", order, ("random", "given", "left-to-right")) == "left-to-right":
        turns = torch.arange(m, device=device).expand(n, m)
        for k in reversed(range(batch.x_target.shape[2])):  # stable sorts: the first coordinate decides
            key = batch.x_target[..., k].gather(1, turns)
            turns = turns.gather(1, key.argsort(dim=1, stable=True))
        return turns
    if order == "given":
        return torch.arange(m, device=device).expand(n, m)
    return torch.randperm(m, generator=generator, device=draw_device(generator)).to(device).expand(n, m)


def _one_point(predictive: Any, shape: tuple[int, ...]) -> Normal:
    if isinstance(predictive, MultivariateNormal):
        raise ValueError(
            "model must predict targets one by one, got a MultivariateNormal: it is joint already, "
            "use its log_prob and sample"
        )
    if not isinstance(predictive, Normal) or tuple(predictive.loc.shape) != shape:
        got = type(predictive).__name__
        tail = f" of shape {tuple(predictive.loc.shape)}" if isinstance(predictive, Normal) else ""
        raise ValueError(f"model must return a Normal of shape {shape}, got {got}{tail}")
    return predictive


def _walk(model: Callable[..., Any], batch: Tasks) -> Generator[Normal, Tensor, None]:
    """Yield the prediction of each target, taking what it became; then of all, given all."""
    x, y, mask = batch.x_context, batch.y_context, batch.context_mask
    n, m, dim_y = batch.y_target.shape
    for k in range(m):
        at = batch.x_target[:, k : k + 1]
        drawn = yield _one_point(model(x, y, at, context_mask=mask), (n, 1, dim_y))
        x, y = torch.cat([x, at], dim=1), torch.cat([y, drawn], dim=1)
        mask = torch.cat([mask, batch.target_mask[:, k : k + 1]], dim=1)
    yield _one_point(model(x, y, batch.x_target, context_mask=mask), (n, m, dim_y))


def _loop(model: Callable[..., Any], batch: Tasks) -> Tensor:
    terms = []
    x = torch.cat([batch.x_context, batch.x_target], dim=1)
    y = torch.cat([batch.y_context, batch.y_target], dim=1)
    mask = torch.cat([batch.context_mask, batch.target_mask], dim=1)
    n, m, dim_y = batch.y_target.shape
    for k, end in enumerate(range(x.shape[1] - m, x.shape[1])):
        at, now = batch.x_target[:, k : k + 1], batch.y_target[:, k : k + 1]
        predictive = _one_point(model(x[:, :end], y[:, :end], at, context_mask=mask[:, :end]), (n, 1, dim_y))
        terms.append(predictive_log_density(predictive, now, mask[:, end : end + 1]))
    return torch.stack(terms, dim=1) if terms else batch.y_target.new_zeros(n, 0)


def _padded(model: Callable[..., Any], batch: Tasks, chunk_size: int) -> Tensor:
    """Return the factors from one padded task a (task, target) pair."""
    n, m, dim_y = batch.y_target.shape
    x = torch.cat([batch.x_context, batch.x_target], dim=1)
    y = torch.cat([batch.y_context, batch.y_target], dim=1)
    mask = torch.cat([batch.context_mask, batch.target_mask], dim=1)
    before = torch.ones(m, m, dtype=torch.bool, device=x.device).tril(-1)
    before = torch.cat([before.new_ones(m, x.shape[1] - m), before], dim=1)
    terms = []
    for pairs in torch.arange(n * m, device=x.device).split(chunk_size):
        row, k = pairs // m, pairs % m
        at, now = batch.x_target[row, k][:, None], batch.y_target[row, k][:, None]
        predictive = model(x[row], y[row], at, context_mask=mask[row] & before[k])
        predictive = _one_point(predictive, (len(pairs), 1, dim_y))
        terms.append(predictive_log_density(predictive, now, batch.target_mask[row, k][:, None]))
    return torch.cat(terms).view(n, m) if terms else batch.y_target.new_zeros(n, 0)
