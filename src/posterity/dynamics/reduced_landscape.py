r"""The reduced loss landscape: what a network can reach at each norm of its weights.

.. math:: L(w) = \min_\theta \{\ell(\theta) : \lVert\theta\rVert_2 = w\}

A point of it is a training on a sphere: all parameters times alpha, then steps of Adam, each followed by
one factor that brings the norm back. Over w the training loss is like an L and the test loss like a U: at
its bottom the network generalises as it fits, to the right of it only once its norm has shrunk.

The networks of all norms are one stack, trained together: Adam, which is elementwise, is then as many Adams.
The part of a gradient along the weights, which the sphere forbids, is taken out before the step: Adam
divides by the size of gradients, and would else come to rest away from the least loss.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from posterity._checks import at_least, class_indices, finite, floating, integer, one_of, scalar, within
from posterity._models import call, evaluating, not_batched, state
from posterity._precision import wide
from posterity._random import draw_device
from posterity.dynamics._plots import axes
from posterity.dynamics.omnigrok import _curve, _trainable

__all__ = ["ReducedLandscape", "reduced_landscape"]

AT_ONCE = 2**15  # rows evaluated together, over all networks
FLOOR = 1e-12  # of the largest loss: what is below counts as this where the logarithm is taken

Of = Callable[[Tensor, Tensor], Any]  # outputs and targets to a number


@dataclass(frozen=True)
class ReducedLandscape:
    """Losses and metrics of networks that were trained at K norms, float64 on the CPU, in the order of alphas.

    Attributes
    ----------
    alpha : Tensor of shape (K,)
        What the weights were multiplied by.
    norm : Tensor of shape (K,)
        Their norm then, which was held.
    train_loss, test_loss : Tensor of shape (K,)
        NaN or infinity where training diverged.
    train_metric, test_metric : Tensor of shape (K,)
        Higher is better.
    """

    alpha: Float[Tensor, " K"]
    norm: Float[Tensor, " K"]
    train_loss: Float[Tensor, " K"]
    test_loss: Float[Tensor, " K"]
    train_metric: Float[Tensor, " K"]
    test_metric: Float[Tensor, " K"]

    def best_norm(self) -> float:
        """Return the norm of least test loss, the bottom of the U; NaN if every training diverged."""
        loss = self.test_loss.nan_to_num(nan=math.inf)
        return float(self.norm[loss.argmin()]) if bool(loss.isfinite().any()) else math.nan

    def critical_norm(self, threshold: float) -> float:
        """Return the largest norm at which the test metric still reaches a threshold.

        Between the last point that does and the next, the metric is taken as linear in the logarithm
        of the norm.

        Parameters
        ----------
        threshold : float
            Of the test metric.

        Returns
        -------
        float
            NaN if no point reaches it; the last norm if that does.
        """
        order = self.norm.argsort()
        norm, metric = self.norm[order].log().tolist(), self.test_metric[order].tolist()
        reached = [k for k, value in enumerate(metric) if value >= threshold]
        if not reached:
            return math.nan
        last = reached[-1]
        if last + 1 == len(metric) or not math.isfinite(metric[last + 1]):
            return math.exp(norm[last])
        share = (metric[last] - threshold) / (metric[last] - metric[last + 1])
        return math.exp(norm[last] + share * (norm[last + 1] - norm[last]))

    def is_lu(self, tol: float = 0.05) -> bool:
        """Return whether training losses form an L and test losses a U.

        It is an L if the training loss falls up to `best_norm`, and none beyond is above that at
        `best_norm`, by more than ``tol`` of the range of training losses. It is a U if the logarithms of
        the test losses at both ends are above the least by more than ``tol`` of their range. The largest
        norms may fail to train in so few steps, which is not the curve's: points beyond `best_norm`
        whose training metric is more than ``tol`` of its range below that at `best_norm`, or whose
        losses are not finite, are left out.

        Parameters
        ----------
        tol : float, default=0.05
            In [0, 1).

        Returns
        -------
        bool
            False also where the least test loss is at an end.
        """
        within("tol", tol, 0, 1, open_high=True)
        order = self.norm.argsort()
        train, test, metric = (x[order] for x in (self.train_loss, self.test_loss, self.train_metric))
        kept = train.isfinite() & test.isfinite() & metric.isfinite()
        train, test, metric = train[kept], test[kept], metric[kept]
        if not len(test):
            return False
        best = int(test.argmin())
        below = metric[: best + 1]
        fits = metric >= metric[best] - tol * (below.max() - below.min())
        fits[: best + 1] = True
        train, test = train[fits], test[fits]
        test = test.clamp_min(FLOOR * float(test.max())).log()
        slack, depth = tol * (train.max() - train.min()), tol * (test.max() - test.min())
        falls, stays = train[0] > train[best] + slack, (train[best:] <= train[best] + slack).all()
        return bool(falls & stays & (test[0] > test[best] + depth) & (test[-1] > test[best] + depth))

    def plot(self, ax: Any = None) -> Any:
        """Draw both losses over the norm, on logarithmic scales, with the norm of least test loss.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            By default those of a new figure.

        Returns
        -------
        matplotlib Axes
        """
        ax, order = axes(ax), self.norm.argsort()
        for name, loss in (("training loss", self.train_loss), ("test loss", self.test_loss)):
            ax.plot(self.norm[order].numpy(), loss[order].numpy(), marker="o", label=name)
        if math.isfinite(self.best_norm()):
            ax.axvline(self.best_norm(), color="grey", linestyle=":", label=f"norm {self.best_norm():.3g}")
        ax.set(xscale="log", yscale="log", xlabel="weight norm", ylabel="loss")
        ax.legend()
        return ax


@torch.inference_mode(False)  # grad mode too
def reduced_landscape(
    model: nn.Module,
    x: Shaped[Tensor, " n *shape"],
    y: Shaped[Tensor, " n *target"],
    x_test: Shaped[Tensor, " m *shape"],
    y_test: Shaped[Tensor, " m *target"],
    *,
    alphas: Sequence[float] | Float[Tensor, " K"] | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    metric: Callable[[Tensor, Tensor], Any] | None = None,
    n_steps: int = 2_000,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    batch_size: int | None = None,
    eval_every: int = 50,
    select: Literal["last", "best"] = "last",
    vectorize: bool = True,
    generator: torch.Generator | None = None,
) -> ReducedLandscape:
    """Train copies of a model at several norms of its weights and return what each reaches.

    Parameters
    ----------
    model : nn.Module
        The direction to start from; not changed. It runs in eval mode throughout, dropout off and batch
        normalisation with its stored statistics. Only trainable parameters are scaled and trained.
    x : Tensor of shape (n, *shape)
        Training inputs, as ``model(x)`` takes them.
    y : Tensor of shape (n, *target)
        Their classes, or values of the shape of the outputs, or what ``loss_fn`` takes.
    x_test, y_test : Tensor of shape (m, *shape) and (m, *target)
        The same, to test on. To choose a norm by, take validation data.
    alphas : sequence of float, optional
        At least one, each greater than 0: factors of all parameters. By default 11 from 0.1 to 10, evenly
        spaced by their logarithm.
    loss_fn : callable, optional
        ``loss_fn(outputs, y)``, a scalar that torch can differentiate. By default cross-entropy for
        integers, the mean squared error for floats.
    metric : callable, optional
        ``metric(outputs, y)``, a number, higher is better. By default the accuracy for integers, minus
        the loss for floats.
    n_steps : int, default=2_000
        Steps of Adam, at least 0.
    lr : float, default=1e-3
        Its learning rate, greater than 0.
    betas : tuple of float, default=(0.9, 0.999)
        Its decay rates, each in [0, 1).
    batch_size : int, optional
        At least 1; the same batches for all norms, in a new order each epoch. By default all of ``x``.
    eval_every : int, default=50
        Steps between evaluations, at least 1; used by ``select="best"``.
    select : {"last", "best"}, default="last"
        Values after the last step; or the best of each curve for itself, from the start on, as the
        paper has it: optimistic, since the test data choose.
    vectorize : bool, default=True
        Train all together by ``torch.func.vmap``, with the memory of so many networks on a batch; False is one
        after the other, slower and with the memory of one, for models that ``vmap`` does not take.
    generator : torch.Generator, optional
        Draws the batches; by default torch's global one. Without ``batch_size`` nothing is drawn.

    Returns
    -------
    ReducedLandscape
        With the curves, where the best and the critical norm are, and a plot.

    Raises
    ------
    ValueError
        If model, data or a setting are not as said, or the outputs of the model do not fit ``y``.

    Warns
    -----
    UserWarning
        If the model has a normalisation layer, named in the message.

    See Also
    --------
    constrain_norm : Hold a norm in a training loop of your own.

    Notes
    -----
    1. The norm is brought back after each step; one of the official notebooks does so before.
    2. The official code gives Adam the whole gradient. Where the loss still falls outwards, for norms below that
       of its minimum, this ends at points that are not the least on the sphere, as a least-squares fit shows.
    3. Computed in float32 at least, outside autocast.

    References
    ----------
    .. [1] Liu, Michaud, Tegmark. Omnigrok: Grokking Beyond Algorithmic Data. ICLR 2023. Section 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import reduced_landscape
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 1.0)
    >>> x, y = torch.eye(2), torch.tensor([[3.0], [4.0]])
    >>> found = reduced_landscape(net, x, y, x, y, alphas=[2.0, 5 / 2**0.5], lr=0.1, n_steps=120)
    >>> found.norm, found.train_loss.round(decimals=4)  # the nearest to (3, 4) on a circle, and itself
    (tensor([2.8284, 5.0000], dtype=torch.float64), tensor([2.3579, 0.0000], dtype=torch.float64))
    """
    for name, value, low in (("n_steps", n_steps, 0), ("eval_every", eval_every, 1)):
        integer(name, value, low)
    at_least("lr", lr, 0.0, strict=True)
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for beta in betas:
        within("betas", beta, 0, 1, open_high=True)
    if batch_size is not None:
        integer("batch_size", batch_size, 1)
    one_of("select", select, ("last", "best"))
    one_of("vectorize", vectorize, (True, False))
    factors = _alphas(alphas)
    data = _data(x, y, x_test, y_test)
    _trainable(model)
    with torch.autocast(x.device.type, enabled=False), evaluating(model):
        nets = _Nets(model, factors, vectorize)
        task = _Task(loss_fn, metric, *data)
        task.check(nets)
        batches = _batches(len(data[0]), batch_size, generator, data[0].device)
        fused = x.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam([nets.flat], lr=lr, betas=betas, fused=fused)
        found = None
        for step in range(n_steps + 1):
            if step:
                nets.descend(optimizer, task, next(batches))
            if step == n_steps or (select == "best" and step % eval_every == 0):
                now = task.evaluate(nets)
                found = now if found is None else _better(found, now)
        assert found is not None
    return ReducedLandscape(factors, nets.norm.cpu().double(), *(values.cpu().double() for values in found))


class _Nets:
    """Networks of one model, whose parameters are the rows of a matrix."""

    def __init__(self, model: nn.Module, factors: Tensor, vectorize: bool) -> None:
        params, rest = state(model)
        self.model, self.vectorize, self.size = model, vectorize, len(factors)
        self.rest = {name: _as_computed(value) for name, value in rest.items()}
        if len({(wide(p).dtype, p.device) for p in params.values()}) > 1:
            raise ValueError("model must have trainable parameters of one dtype on one device, got several")
        for name, p in params.items():
            finite(f"{name} of model", p)
        self.shapes = {name: p.shape for name, p in params.items()}
        one = torch.cat([wide(p).reshape(-1) for p in params.values()])
        self.flat = torch.outer(factors.to(one), one).requires_grad_()
        exact = torch.float32 if one.device.type == "mps" else torch.float64
        self.norm = self.row_sums(self.flat.detach().to(exact).square()).sqrt()
        if not bool(((self.norm > 0) & self.norm.isfinite()).all()):
            raise ValueError("model must have parameters that are not all zero, nor infinite times alphas")
        # beyond, squares of float32 overflow or vanish
        self.summed = one.dtype if self.norm.min() > 1e-12 and self.norm.max() < 1e12 else exact

    def row_sums(self, flat: Tensor) -> Tensor:
        """Return the sum over the parameters of each network, (networks,), in float64 where there is one."""
        sums = flat.sum(1)
        return sums if sums.device.type == "mps" else sums.double()

    def groups(self, flat: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield, for the networks that are evaluated together, views of a matrix that is as that of the parameters."""
        columns = flat.split([shape.numel() for shape in self.shapes.values()], 1)
        stacks = {
            name: part.view(self.size, *shape)
            for (name, shape), part in zip(self.shapes.items(), columns, strict=True)
        }
        for rows in [slice(None)] if self.vectorize else [slice(k, k + 1) for k in range(self.size)]:
            yield {name: stack[rows] for name, stack in stacks.items()}

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return the outputs of some networks, (networks, n, ...)."""

        def one(params: dict[str, Tensor]) -> Tensor:
            out = call(self.model, {**self.rest, **params}, x)
            if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
                what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(
                    f"model must return a tensor with a row for each of {len(x)} inputs, got {what}"
                )
            return wide(out)

        if not self.vectorize:
            return one({name: p[0] for name, p in params.items()})[None]
        try:
            return vmap(one)(params)
        except RuntimeError as error:
            if not not_batched(error):
                raise
            raise ValueError(
                f"vectorize must be False for a model that vmap does not take: {error}"
            ) from error

    def descend(self, optimizer: torch.optim.Optimizer, task: "_Task", chosen: Tensor | slice) -> None:
        """Take a step with each network along its sphere, and bring its norm back."""
        x, y = task.x[chosen], task.y[chosen]
        grad = torch.empty_like(self.flat)
        for params, slopes in zip(self.groups(self.flat.detach()), self.groups(grad), strict=True):
            leaves = [p.requires_grad_() for p in params.values()]
            loss = task.losses(self(params, x), y).sum()
            if not loss.requires_grad:
                raise ValueError("loss_fn must be differentiable, and depend on the parameters of model")
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            for slope, value in zip(slopes.values(), found, strict=True):
                slope.copy_(value)
        with torch.no_grad():
            outward = self.row_sums(grad.to(self.summed) * self.flat) / self.norm**2
            self.flat.grad = grad.addcmul_(outward.to(grad)[:, None], self.flat, value=-1)
            optimizer.step()
            factor = self.norm / self.row_sums(self.flat.to(self.summed).square()).sqrt()
            self.flat.mul_(factor.to(grad)[:, None])


class _Task:
    """Losses and metrics of outputs, the data with them."""

    def __init__(
        self, loss_fn: Of | None, metric: Of | None, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor
    ) -> None:
        self.loss_fn, self.metric = loss_fn, metric
        self.x, self.y, self.x_test, self.y_test = x, y, x_test, y_test
        self.classes = not y.is_floating_point()

    @torch.no_grad()
    def check(self, nets: _Nets) -> None:
        """Refuse targets that do not fit the outputs, where loss or metric are the usual ones."""
        one = nets({name: p[:1] for name, p in next(nets.groups(nets.flat)).items()}, self.x[:1])[0]
        if self.classes and (self.loss_fn is None or self.metric is None):
            if one.ndim != 2 or one.shape[1] < 2:
                raise ValueError(
                    "model must return two or more columns for y of class indices, "
                    f"got shape {(len(self.x), *one.shape[1:])}: else give loss_fn and metric"
                )
            for name, y in (("y", self.y), ("y_test", self.y_test)):
                class_indices(name, y, len(y), one.shape[1])
        elif self.loss_fn is None:
            for name, y in (("y", self.y), ("y_test", self.y_test)):
                if y.shape[1:] != one.shape[1:]:
                    wanted = (len(y), *one.shape[1:])
                    raise ValueError(
                        f"{name} must have the shape of the outputs, {wanted}, got {tuple(y.shape)}"
                    )

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each network, from (networks, n, ...)."""
        if self.loss_fn is not None:
            losses = [scalar("loss_fn", self.loss_fn(each, y)) for each in out]
            return torch.stack([floating("what loss_fn returns", loss) for loss in losses])
        if self.classes:
            target = y.expand(len(out), -1).flatten()
            return F.cross_entropy(out.flatten(0, 1), target, reduction="none").view(len(out), -1).mean(1)
        return (out - y).square().flatten(1).mean(1)

    def metrics(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the metric of each network."""
        if self.metric is not None:
            values = [_scalar(self.metric(each, y)) for each in out]
            return torch.tensor(values, dtype=torch.float64)
        if self.classes:
            return (out.argmax(2) == y).double().mean(1)
        return -self.losses(out, y)

    @torch.no_grad()
    def evaluate(self, nets: _Nets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return training and test losses, training and test metrics."""
        found = []
        for x, y in ((self.x, self.y), (self.x_test, self.y_test)):
            chunks = x.split(max(1, AT_ONCE // nets.size))
            out = torch.cat(
                [torch.cat([nets(params, part) for part in chunks], 1) for params in nets.groups(nets.flat)]
            )
            found.append((self.losses(out, y), self.metrics(out, y)))
        (train, test), (fit, score) = zip(*found, strict=True)
        return train, test, fit, score


def _scalar(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"metric must return a number, got {value!r}") from None


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the lower of the losses and the higher of the metrics, numbers rather than NaN."""
    pairs = zip((torch.fmin, torch.fmin, torch.fmax, torch.fmax), a, b, strict=True)
    return tuple(pick(old, new) for pick, old, new in pairs)


def _batches(
    n: int, size: int | None, generator: torch.Generator | None, device: torch.device
) -> Iterator[Tensor | slice]:
    """Yield which rows are of a batch, without end."""
    while size is None or size >= n:
        yield slice(None)
    while True:
        order = torch.randperm(n, generator=generator, device=draw_device(generator)).to(device)
        yield from order.split(size)


def _alphas(alphas: Any) -> Tensor:
    if alphas is None:
        return torch.logspace(-1, 1, 11, dtype=torch.float64)
    factors = _curve("alphas", alphas).double()
    if not bool(((factors > 0) & factors.isfinite()).all()):
        raise ValueError(f"alphas must be finite and greater than 0, got {alphas}")
    return factors


def _data(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return checked data, in float32 at least, classes as torch wants them."""
    checked = []
    for inputs, targets, end in ((x, y, ""), (x_test, y_test, "_test")):
        for name, value in ((f"x{end}", inputs), (f"y{end}", targets)):
            if not isinstance(value, Tensor) or not value.ndim or not len(value):
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must be a tensor of at least one row, got {what}")
            if value.is_floating_point():
                finite(name, value)
        if len(targets) != len(inputs):
            raise ValueError(
                f"y{end} must have a row for each of the {len(inputs)} of x{end}, got {len(targets)}"
            )
        if targets.dtype == torch.bool or targets.is_complex():
            raise ValueError(f"y{end} must hold class indices or real values, got dtype {targets.dtype}")
        checked += [inputs, targets if targets.is_floating_point() else targets.long()]
    if y.is_floating_point() != y_test.is_floating_point():
        raise ValueError(f"y_test must hold what y does, got {y_test.dtype} for {y.dtype}")
    x, y, x_test, y_test = (
        value.clone() if value.is_inference() else value.detach() for value in map(_as_computed, checked)
    )
    return x, y, x_test, y_test


def _as_computed(value: Tensor) -> Tensor:
    return wide(value) if value.is_floating_point() else value
