"""Functions: many small regression tasks, for models that learn from tasks how to predict.

A source draws functions, each seen at a few points; a batch of tasks splits the points of
each into context and target. Gaussian processes also say how likely their targets are, the
ceiling of every model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data.frames import READING, read_frame
from posterity.lab.data.splits import split

__all__ = ["FunctionData", "Functions", "Tasks", "load_functions"]

Functions = Annotated[str, Kind("functions", (".csv", ".parquet"))]


@dataclass(frozen=True)
class Tasks:
    """A batch of tasks, padded; masks are True for real points.

    Attributes
    ----------
    x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
    x_target, y_target : Tensor of shape (tasks, m, dim_x) and (tasks, m, dim_y)
    context_mask, target_mask : Tensor of shape (tasks, n) and (tasks, m), bool
    joint, marginal : Tensor of shape (tasks,), optional
        Exact log-density of the targets given the context: of all together, and the sum of
        each alone; where the functions' distribution is known.
    """

    x_context: Tensor
    y_context: Tensor
    x_target: Tensor
    y_target: Tensor
    context_mask: Tensor
    target_mask: Tensor
    joint: Tensor | None = None
    marginal: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The six tensors, as a model's ``loss`` and ``log_likelihood`` take them."""
        names = ("x_context", "y_context", "x_target", "y_target", "context_mask", "target_mask")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class FunctionData:
    """A source of functions.

    Attributes
    ----------
    dim_x, dim_y : int
    draw : callable
        ``draw(n_functions, n_points, held_out, generator) -> x, y, real, extra``: points in
        random order, real ones first, ``real`` of shape (functions, points); ``extra`` is
        what ``exact`` needs.
    exact : callable, optional
        ``exact(x, y, context mask, target mask, extra) -> joint, marginal``.
    note : str
        What was read and what was done to it.
    """

    dim_x: int
    dim_y: int
    draw: Callable[..., tuple[Tensor, Tensor, Tensor, Any]]
    exact: Callable[..., tuple[Tensor, Tensor]] | None = None
    note: str = ""

    def tasks(
        self, n_tasks: int, *, n_context: tuple[int, int], n_target: int, seed: int, held_out: bool = False
    ) -> Tasks:
        """Return tasks with a random number of context points each.

        Parameters
        ----------
        n_tasks : int
        n_context : tuple of int
            Smallest and largest number of context points; a function with few points gives
            fewer, and keeps at least one as a target.
        n_target : int
            Targets of a task, fewer where points run out.
        seed : int
        held_out : bool, default=False
            Whether to draw functions that training never sees, with the exact densities
            where they are known.

        Returns
        -------
        Tasks
        """
        low, high = n_context
        rng = torch.Generator().manual_seed(2 * seed + held_out)
        x, y, real, extra = self.draw(n_tasks, high + n_target, held_out, rng)
        counts = torch.randint(low, high + 1, (n_tasks, 1), generator=rng)
        counts = torch.minimum(counts, real.sum(1, keepdim=True) - 1)
        place = torch.arange(x.shape[1])
        context, later = place < counts, counts + torch.arange(n_target)
        rows = torch.arange(n_tasks)[:, None]
        inside = later.clamp_max(x.shape[1] - 1)
        target = (later < x.shape[1]) & real[rows, inside]
        joint = marginal = None
        if held_out and self.exact is not None:
            chosen = (place >= counts) & (place < counts + n_target)
            joint, marginal = self.exact(x, y, context, chosen, extra)
        return Tasks(
            x[:, :high], y[:, :high], x[rows, inside], y[rows, inside], context[:, :high], target,
            joint, marginal,
        )  # fmt: skip


def load_functions(data: str, *, seed: int = 0) -> FunctionData:
    """Return the functions of a name or file.

    Parameters
    ----------
    data : str
        A registered name, or a CSV or Parquet file with a row a point: the column
        ``function``, inputs ``x…`` and outputs ``y…`` (``x``, or ``x1``, ``x2`` and so on).
    seed : int, default=0
        Decides which functions of a finite set are held out.

    Returns
    -------
    FunctionData
    """
    return load(Functions, data, seed=seed, held_out_by=seed)


def read_functions(source: Source, *, held_out_by: int) -> FunctionData:
    """Return the functions in a long table, a fifth of them held out."""
    (path,), seed = source.paths, held_out_by
    frame, note = read_frame(path, wanted=["function"], options=source.option(READING))
    inputs = [name for name in frame if name.lower().startswith("x")]
    outputs = [name for name in frame if name.lower().startswith("y")]
    names = {name.lower(): name for name in frame}
    if "function" not in names or not inputs or not outputs:
        raise ValueError(
            f"{path.name}: functions need the columns function, x… and y…, has {', '.join(map(str, frame))}"
        )
    for name in (*inputs, *outputs):
        if frame[name].dtype.kind not in "iufb":
            raise ValueError(f"{path.name}: column {name!r} must hold numbers")
        if infinite := np.flatnonzero(np.isinf(frame[name].to_numpy(float))).tolist():
            raise ValueError(f"{path.name}: column {name!r} is infinite in row {infinite[0] + 1}")
    whole = frame[[names["function"], *inputs, *outputs]].notna().all(axis=1)
    frame = frame[whole]
    sets = [
        (group[inputs].to_numpy(np.float32), group[outputs].to_numpy(np.float32))
        for _, group in frame.groupby(names["function"], sort=False)
    ]
    many = [each for each in sets if len(each[0]) > 1]
    if len(many) < 5:
        raise ValueError(f"{path.name}: needs at least 5 functions of 2 points or more, has {len(many)}")
    done = [
        f"{len(many):,} functions of {min(len(x) for x, _ in many)} to {max(len(x) for x, _ in many)} points"
    ]
    if dropped := int((~whole).sum()):
        done.append(f"{dropped:,} incomplete rows left out")
    if single := len(sets) - len(many):
        done.append(f"{single:,} functions of a single point left out")
    train, test = split(len(many), (0.8, 0.2), seed)
    x_seen, y_seen = (np.concatenate([many[k][part] for k in train]) for part in (0, 1))
    low, high = x_seen.min(0), x_seen.max(0)
    middle, half = (low + high) / 2, np.where(high > low, (high - low) / 2, 1)
    if (low == high).all() or (np.ptp(y_seen, axis=0) == 0).all():
        raise ValueError(f"{path.name}: all {'inputs' if (low == high).all() else 'outputs'} are the same")
    scale = np.where(y_seen.std(0) > 0, y_seen.std(0), 1)
    scaled = [((x - middle) / half, (y - y_seen.mean(0)) / scale) for x, y in many]
    return _finite(scaled, train, test, "; ".join([note, *done, "x scaled to [-1, 1], y standardised"]))


def _finite(sets: list[tuple[Any, Any]], train: Any, test: Any, note: str = "") -> FunctionData:
    """Return the source that draws from given functions, without replacement while they last."""
    size = max(len(x) for x, _ in sets)
    x, y = (torch.zeros(len(sets), size, each.shape[1]) for each in sets[0])
    counts = torch.tensor([len(each) for each, _ in sets])
    for k, (inputs, outputs) in enumerate(sets):
        x[k, : len(inputs)], y[k, : len(inputs)] = torch.as_tensor(inputs), torch.as_tensor(outputs)
    parts = torch.as_tensor(np.asarray(train)), torch.as_tensor(np.asarray(test))

    def draw(
        n: int, n_points: int, held_out: bool, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        part = parts[held_out]
        turns = [torch.randperm(len(part), generator=rng) for _ in range(-(-n // len(part)))]
        chosen = part[torch.cat(turns)[:n]]
        real = torch.arange(size) < counts[chosen, None]
        order = torch.rand(n, size, generator=rng).masked_fill(~real, 2).argsort(1)[:, :n_points]
        rows = chosen[:, None]
        return x[rows, order], y[rows, order], real.gather(1, order), None

    return FunctionData(x.shape[2], y.shape[2], draw, note=note)


Covariance = Callable[[Tensor, Tensor], Tensor]  # squared distances (…, n, n), lengthscale -> (…, n, n)


def _gaussian_process(
    kernel: Covariance,
    noise: float,
    lengthscale: tuple[float, float],
    scale: tuple[float, float] = (1.0, 1.0),
) -> FunctionData:
    """Return functions on [-2, 2] of a Gaussian process, its hyperparameters uniform in ranges."""

    def covariance(x: Tensor, extra: Tensor) -> Tensor:
        gram = kernel((x - x.mT).square(), extra[:, :1, None])
        return extra[:, 1, None, None].square() * gram + noise * torch.eye(x.shape[1], dtype=x.dtype)

    def draw(
        n: int, n_points: int, held_out: bool, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = torch.tensor([lengthscale[0], scale[0]]), torch.tensor([lengthscale[1], scale[1]])
        extra = (low + (high - low) * torch.rand(n, 2, generator=rng)).double()
        x = 4 * torch.rand(n, n_points, 1, generator=rng) - 2
        noise_of = torch.randn(n, n_points, 1, generator=rng)
        y = torch.empty_like(x)
        for rows in torch.arange(n).split(1024):
            factor = torch.linalg.cholesky(covariance(x[rows].double(), extra[rows]))
            y[rows] = (factor @ noise_of[rows].double()).float()
        return x, y, torch.ones(n, n_points, dtype=torch.bool), extra

    def exact(x: Tensor, y: Tensor, context: Tensor, target: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        whole, y = covariance(x.double(), extra), y.double()[..., 0]

        def evidence(rows: Tensor) -> Tensor:
            both = rows[:, :, None] & rows[:, None, :]  # a point left out is an independent standard normal
            gram = torch.where(both, whole, torch.diag_embed((~rows).double()))
            normal = torch.distributions.MultivariateNormal(torch.zeros_like(y), gram)
            return normal.log_prob(torch.where(rows, y, 0)) + 0.5 * np.log(2 * np.pi) * (~rows).sum(1)

        seen = evidence(context)
        joint = evidence(context | target) - seen
        both = context[:, :, None] & context[:, None, :]
        known = torch.where(both, whole, torch.diag_embed((~context).double()))
        cross = whole * context[:, None, :]
        weights = torch.linalg.solve(known, cross.mT).mT
        mean = (weights @ torch.where(context, y, 0)[..., None])[..., 0]
        variance = whole.diagonal(dim1=-2, dim2=-1) - (weights * cross).sum(-1)
        each = torch.distributions.Normal(mean, variance.clamp_min(1e-12).sqrt()).log_prob(y)
        return joint, each.masked_fill(~target, 0).sum(1)

    return FunctionData(1, 1, draw, exact)


def _eq(squared: Tensor, lengthscale: Tensor) -> Tensor:
    return torch.exp(-0.5 * squared / lengthscale**2)


def _matern(squared: Tensor, lengthscale: Tensor) -> Tensor:
    scaled = (5 * squared).clamp_min(1e-24).sqrt() / lengthscale
    return (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)


def _periodic(squared: Tensor, lengthscale: Tensor) -> Tensor:
    """Return a kernel of period 1; the lengthscale is that of the sine and cosine of x."""
    return torch.exp(
        -2 * (torch.pi * squared.clamp_min(1e-24).sqrt()).sin().square() / (4 * lengthscale) ** 2
    )


def _weakly_periodic(squared: Tensor, lengthscale: Tensor) -> Tensor:
    return _periodic(squared, lengthscale) * _eq(squared, 4 * lengthscale)


PROCESSES: dict[str, tuple[Any, ...]] = {
    "gp": (_eq, 0.05, (0.25, 0.25)),
    "gp-smooth": (_eq, 1e-3, (0.4, 0.4)),
    "gp-paper": (_eq, 4e-4, (0.1, 0.6), (0.1, 1.0)),
    "gp-matern": (_matern, 0.05, (0.25, 0.25)),
    "gp-periodic": (_periodic, 0.05, (0.25, 0.25)),
    "gp-weakly-periodic": (_weakly_periodic, 0.05, (0.25, 0.25)),
}
for _name in PROCESSES:
    dataset(Functions, _name)(lambda seed, name=_name: _gaussian_process(*PROCESSES[name]))


@dataset(Functions, "sawtooth")
def sawtooth(seed: int) -> FunctionData:
    """Return sawtooth waves on [-2, 2]: frequency 2 to 4, random direction and phase, no noise."""

    def draw(
        n: int, n_points: int, held_out: bool, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        frequency, direction, phase = torch.rand(3, n, 1, 1, generator=rng)
        x = 4 * torch.rand(n, n_points, 1, generator=rng) - 2
        sign = torch.where(direction < 0.5, -1.0, 1.0)
        y = ((2 + 2 * frequency) * (sign * x - phase)) % 1
        return x, y, torch.ones(n, n_points, dtype=torch.bool), None

    return FunctionData(1, 1, draw)


@dataset(Functions, "digits")
def digits(seed: int) -> FunctionData:
    """Return 8 x 8 images as functions from position in [-1, 1]^2 to intensity in [-0.5, 0.5]."""
    images = load_digits().images.astype(np.float32) / 16 - 0.5
    at = np.linspace(-1, 1, 8, dtype=np.float32)
    x = np.stack(np.meshgrid(at, at, indexing="ij"), axis=-1).reshape(-1, 2)
    train, test = split(len(images), (0.8, 0.2), seed)
    return _finite([(x, image.reshape(-1, 1)) for image in images], train, test)
