"""AR-CNP: joint predictions from a neural process that was trained to predict one at a time.

A conditional neural process gives each target its own marginal, so its samples are noise
around the mean. The chain rule turns the same trained model into a joint one: predict the
targets one after the other, in an order pi, each with the earlier ones in the context,

    q(y | D) = prod_m p( y_pi(m) | x_pi(m), D + {(x_pi(l), y_pi(l)) : l < m} ).      (1)

Nothing is retrained. A likelihood needs no sampling: with y known all factors are
predictions from growing contexts, and where the context enters as a sum (`CNP`, `ConvCNP`)
the growing sums are prefix sums, so that one call evaluates every factor.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F

from posterity._checks import at_least, integer, one_of
from posterity._random import draw_device
from posterity.uncertainty._neural_process import NeuralProcess, Tasks, mlp, predictive_log_density, tasks

__all__ = ["CNP", "ARSample", "ConvCNP", "ar_log_likelihood", "ar_sample"]

Order = Literal["random", "given", "left-to-right"] | Tensor
MAX_GRID = 100_000
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
    return terms.masked_fill(~batch.target_mask, 0).sum(1)


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
    drawn, means, variances = [], [], []
    steps = walk(many)
    predictive = next(steps)
    for _ in range(m):
        loc, where = predictive.loc, draw_device(generator, predictive.loc.device)
        noise = torch.randn(loc.shape, dtype=loc.dtype, device=where, generator=generator)
        drawn.append(loc + predictive.scale * noise.to(loc.device))
        means.append(predictive.loc)
        variances.append(predictive.scale.square())
        predictive = steps.send(drawn[-1])
    parts = (_joined(each, many) for each in (drawn, means, variances))
    y, mean, variance = (_reordered(part, back.repeat(n_samples, 1)) for part in parts)
    smooth = _reordered(predictive.loc, back.repeat(n_samples, 1))
    y, smooth, mean, variance = (
        part.view(n_samples, n_tasks, m, dim_y) for part in (y, smooth, mean, variance)
    )
    # E[var + mean^2] - E[mean]^2, by deviations: no cancellation
    spread = variance.mean(0) + (mean - mean.mean(0)).square().mean(0)
    return ARSample(y, smooth, mean.mean(0), spread)


class _Sums(NeuralProcess):
    """A neural process into which the context enters as a sum over its points.

    A subclass says where sums live (`_place`, a grid or nothing), what a point adds
    (`_points`) and what a sum predicts (`_at`).
    """

    def _place(self, batch: Tasks) -> Tensor | None:
        return None

    def _points(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _sum(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        return self._points(x, y, mask, place).sum(1)

    def _at(self, total: Tensor, x: Tensor, place: Tensor | None) -> Normal:
        raise NotImplementedError

    def _predict(self, batch: Tasks) -> Normal:
        place = self._place(batch)
        total = self._sum(batch.x_context, batch.y_context, batch.context_mask, place)
        return self._at(total, batch.x_target, place)

    def forward(
        self,
        x_context: Float[Tensor, "tasks n dim_x"],
        y_context: Float[Tensor, "tasks n dim_y"],
        x_target: Float[Tensor, "tasks m dim_x"],
        *,
        context_mask: Bool[Tensor, "tasks n"] | None = None,
    ) -> Normal:
        """Return the marginal predictions at the targets.

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        x_target : Tensor of shape (tasks, m, dim_x)
        context_mask : Tensor of shape (tasks, n), bool, optional
            True for a real point.

        Returns
        -------
        Normal
            loc and scale of shape (tasks, m, dim_y).
        """
        return self._predict(self._tasks(x_context, y_context, x_target, None, context_mask))

    def _factors(self, batch: Tasks, chunk_size: int) -> Tensor:
        """Return the log-density of each target given those before it: (tasks, m)."""
        place = self._place(batch)
        start = self._sum(batch.x_context, batch.y_context, batch.context_mask, place)
        m = batch.x_target.shape[1]
        terms, size = [], max(1, chunk_size // max(m, 1))
        for rows in torch.arange(len(start)).split(size):  # some tasks with all their targets
            one = Tasks(*(part[rows] for part in batch))
            added = self._points(one.x_target, one.y_target, one.target_mask, place)
            before = start[rows, None] + added.cumsum(1) - added
            predictive = self._at(before.flatten(0, 1), one.x_target.reshape(-1, 1, self.dim_x), place)
            terms.append(
                predictive.log_prob(one.y_target.reshape(-1, 1, self.dim_y)).sum((1, 2)).view(len(rows), m)
            )
        return torch.cat(terms)

    def _walk(self, batch: Tasks) -> Generator[Normal, Tensor, None]:
        """Yield the prediction of each target, taking its draw; then of all, given all draws."""
        place = self._place(batch)
        total = self._sum(batch.x_context, batch.y_context, batch.context_mask, place)
        for k in range(batch.x_target.shape[1]):
            x = batch.x_target[:, k : k + 1]
            y = yield self._at(total, x, place)
            total = total + self._sum(x, y, batch.target_mask[:, k : k + 1], place)
        yield self._at(total, batch.x_target, place)


class CNP(_Sums):
    """Conditional neural process: a sum of embedded points, decoded at each target.

    Parameters
    ----------
    dim_x, dim_y : int
        Sizes of inputs and outputs of the functions.
    dim_hidden : int, default=256
        Width, and size of the sum.
    n_encoder_layers, n_decoder_layers : int
        Hidden layers.

    Raises
    ------
    ValueError
        If a size is less than 1.

    References
    ----------
    .. [1] Garnelo et al. Conditional Neural Processes. ICML 2018.
    .. [2] Bruinsma et al. Autoregressive Conditional Neural Processes. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import CNP
    >>> model = CNP(dim_x=1, dim_y=1)
    >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)  # 4 functions, 10 points each
    >>> model(x[:, :6], y[:, :6], x[:, 6:]).scale.shape
    torch.Size([4, 4, 1])
    """

    def __init__(
        self, dim_x: int, dim_y: int, *, dim_hidden: int = 256, n_encoder_layers: int = 3, n_decoder_layers: int = 6
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim_x, self.dim_y = integer("dim_x", dim_x, 1), integer("dim_y", dim_y, 1)
        integer("dim_hidden", dim_hidden, 1)
        integer("n_encoder_layers", n_encoder_layers, 1)
        integer("n_decoder_layers", n_decoder_layers, 1)
        self.encoder = mlp(dim_x + dim_y, dim_hidden, dim_hidden, n_encoder_layers)
        self.decoder = mlp(dim_hidden + dim_x, dim_hidden, 2 * dim_y, n_decoder_layers)

    def _points(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        return self.encoder(torch.cat([x, y], dim=-1)).masked_fill(~mask[..., None], 0)

    def _at(self, total: Tensor, x: Tensor, place: Tensor | None) -> Normal:
        total = total[:, None].expand(-1, x.shape[1], -1)
        return _normal(*self.decoder(torch.cat([total, x], dim=-1)).chunk(2, dim=-1))


class ConvCNP(_Sums):
    """Convolutional conditional neural process on the line: equivariant to shifts of x.

    Points are spread on a grid by a Gaussian kernel, as a density and a data channel for
    each output; a convolutional network maps the grid, and the kernel reads it at targets.

    Parameters
    ----------
    dim_y : int
        Outputs of the functions; inputs have one dimension.
    points_per_unit : int, default=64
        Of the grid. It should resolve the functions' finest detail.
    channels : sequence of int, default=(64, 64, 64, 64, 64, 64)
        Of each level or layer.
    kernel_size : int, default=5
        Odd.
    margin : float, default=0.1
        By which the grid reaches beyond the points, in units of x.
    architecture : {"unet", "conv"}, default="unet"
        Levels of stride 2 with skips, or residual layers at full resolution.

    Raises
    ------
    ValueError
        If a size does not fit, inputs have another dimension than 1, there is no point, or
        the points' range needs more than 100,000 grid points.

    Notes
    -----
    1. The grid covers the real points of a call, context and target of all its tasks. Its
       border is seen by the network, so a prediction near it depends a little on the call.

    References
    ----------
    .. [1] Gordon et al. Convolutional Conditional Neural Processes. ICLR 2020.
    .. [2] Bruinsma et al. Autoregressive Conditional Neural Processes. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import ConvCNP
    >>> model = ConvCNP(dim_y=1, points_per_unit=16, channels=(32, 32), architecture="conv")
    >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)
    >>> model(x[:, :6], y[:, :6], x[:, 6:]).loc.shape
    torch.Size([4, 4, 1])
    """

    def __init__(
        self, dim_y: int, *, points_per_unit: int = 64, channels: Sequence[int] = (64,) * 6, kernel_size: int = 5,
        margin: float = 0.1, architecture: Literal["unet", "conv"] = "unet",
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim_x, self.dim_y = 1, integer("dim_y", dim_y, 1)
        self.points_per_unit = integer("points_per_unit", points_per_unit, 1)
        self.margin = at_least("margin", margin, 0)
        channels = [integer("each of channels", each, 1) for each in channels]
        if integer("kernel_size", kernel_size, 1) % 2 == 0 or not channels:
            raise ValueError(
                f"kernel_size must be odd and channels not empty, got {kernel_size} and {channels}"
            )
        make = {"unet": _UNet, "conv": _Residual}[one_of("architecture", architecture, ("unet", "conv"))]
        self.network = make(1 + dim_y, 2 * dim_y, channels, kernel_size)
        self.stride = 2 ** len(channels) if architecture == "unet" else 1
        start = -torch.log(torch.tensor(float(points_per_unit)))
        self.encoder_log_scale, self.decoder_log_scale = (
            nn.Parameter(start.clone()),
            nn.Parameter(start.clone()),
        )

    def _place(self, batch: Tasks) -> Tensor:
        """Return the grid of a call, of shape (points,)."""
        x = torch.cat([batch.x_context[batch.context_mask], batch.x_target[batch.target_mask]])
        if len(x) == 0:
            raise ValueError("x_context and x_target must have a real point, got none: there is no grid")
        low, high = (float(end) for end in x.aminmax())
        step = 1 / self.points_per_unit
        need = (high - low + 2 * (self.margin + step)) / step + 1
        if need > MAX_GRID:
            raise ValueError(
                f"x must span few units: from {low:g} to {high:g} the grid needs {need:,.0f} points "
                f"at {self.points_per_unit} a unit, more than {MAX_GRID:,}: rescale x"
            )
        count = -(-int(need + 1) // self.stride) * self.stride
        start = (low - self.margin - step) * self.points_per_unit - (count - need) / 2
        first = torch.floor(x.new_tensor(start, dtype=torch.float64) + 0.5)
        return ((first + torch.arange(count, device=x.device)) * step).to(x.dtype)

    def _kernel(self, x: Tensor, place: Tensor, log_scale: Tensor) -> Tensor:
        """Return weights between points and grid: (tasks, points, grid)."""
        return torch.exp(-0.5 * ((x - place) / log_scale.exp()).square())

    def _weights(self, x: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        return self._kernel(x, place, self.encoder_log_scale) * mask[..., None]

    def _points(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        assert place is not None
        return self._weights(x, mask, place)[:, :, None] * F.pad(y, (1, 0), value=1.0)[..., None]

    def _sum(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        assert place is not None
        return F.pad(y, (1, 0), value=1.0).mT @ self._weights(x, mask, place)

    def _at(self, total: Tensor, x: Tensor, place: Tensor | None) -> Normal:
        assert place is not None
        density, data = total[:, :1], total[:, 1:]
        grid = self.network(torch.cat([density, data / (density + 1e-4)], dim=1))
        read = self._kernel(x, place, self.decoder_log_scale) @ grid.mT
        return _normal(*read.chunk(2, dim=-1))


class _Residual(nn.Module):
    """Residual convolutions at full resolution."""

    def __init__(self, n_in: int, n_out: int, channels: Sequence[int], kernel_size: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(n_in, channels[0], 1), nn.Conv1d(channels[-1], n_out, 1)
        pairs = list(zip([channels[0], *channels[:-1]], channels, strict=True))
        self.convs = nn.ModuleList(nn.Conv1d(a, b, kernel_size, padding=kernel_size // 2) for a, b in pairs)
        self.skips = nn.ModuleList(nn.Identity() if a == b else nn.Conv1d(a, b, 1) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv, skip in zip(self.convs, self.skips, strict=True):
            x = skip(x) + conv(x.relu())
        return self.last(x.relu())


class _UNet(nn.Module):
    """Levels of stride 2, down and up again, with skips by concatenation."""

    def __init__(self, n_in: int, n_out: int, channels: Sequence[int], kernel_size: int) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.first, self.last = nn.Conv1d(n_in, channels[0], 1), nn.Conv1d(2 * channels[0], n_out, 1)
        wide = [channels[0], *channels]
        pairs = list(zip(wide[:-1], wide[1:], strict=True))
        self.down = nn.ModuleList(nn.Conv1d(a, b, kernel_size, stride=2, padding=pad) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(b if k == len(pairs) - 1 else 2 * b, a, kernel_size, stride=2, padding=pad,
                               output_padding=1)
            for k, (a, b) in enumerate(pairs)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        kept = []
        for conv in self.down:
            kept.append(x)
            x = conv(x).relu()
        for conv in reversed(self.up):
            x = torch.cat([conv(x).relu(), kept.pop()], dim=1)
        return self.last(x)


def _normal(mean: Tensor, raw: Tensor) -> Normal:
    return Normal(mean, (1e-6 + F.softplus(raw)).sqrt(), validate_args=False)


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
