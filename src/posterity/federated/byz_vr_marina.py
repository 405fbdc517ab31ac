"""Byz-VR-MARINA: training to the optimum while some workers send what they like, and few numbers.

A robust mean cannot tell an attack from the noise of honest stochastic gradients, so plain robust
training stops at an error as large as that noise. Here noise dies out. In most steps honest
worker i sends only how its gradient on a fresh batch B changed, compressed by Q, and the server
holds for each, from the aggregate g^k that all have,

    g_i^{k+1} = g^k + Q(grad_B(x^{k+1}) - grad_B(x^k)),      x^{k+1} = x^k - lr g^k,           (1)

with the same batch at both points; with a probability p, by a coin that all share, its full gradient.
Then g^{k+1} = ARAgg(g_1, .., g_n), a robust mean. Honest vectors lie as near each other as x^{k+1}
lies to x^k: near the optimum there is no room left to hide a lie in.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, integer, one_of, within
from posterity._precision import NARROW
from posterity._random import draw_device
from posterity.federated._flower import strategy
from posterity.federated.finite_sum import Problem
from posterity.federated.robust_aggregation import bucketing, coordinate_median
from posterity.federated.simulation import update_vectors

__all__ = ["MarinaResult", "byz_sgd", "byz_vr_marina", "robust_strategy", "step_size"]

Aggregator = Callable[[Tensor], Tensor]
Compressor = Callable[[Tensor], Tensor]
Attack = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class MarinaResult:
    """Where a solver ended, and what it cost.

    Attributes
    ----------
    x : Tensor of shape (d,)
    history : list of dict
        For each step ``step``, ``gradient_norm`` (of the aggregate that moved x), ``sample_gradients`` and
        ``sent``: what a worker had computed, and how many numbers it had sent, when x moved.
    n_sample_gradients : int
        Gradients of single rows that each worker computed.
    n_sent : float
        Numbers that each worker sent, in the mean over workers; zeros of a compressed vector are not
        sent.
    """

    x: Tensor
    history: list[dict[str, float]] = field(repr=False)
    n_sample_gradients: int
    n_sent: float


class _Round:
    """What both solvers share: checks, the server's step, the attack, and the counts."""

    def __init__(
        self, problem: Any, x0: Tensor, lr: float, n_steps: int, n_byzantine: int, batch_size: int,
        aggregator: Aggregator | None, attack: Attack | None, sampling: str, generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        if not isinstance(problem, Problem):
            raise ValueError(
                "problem must have grad, full_grad, n_samples and n_workers, as FiniteSum has, "
                f"got {type(problem).__name__}"
            )
        self.lr = at_least("lr", lr, 0.0, strict=True)
        self.n_steps = integer("n_steps", n_steps, 0)
        self.f = integer("n_byzantine", n_byzantine, 0)
        n = problem.n_workers + self.f
        if 2 * self.f >= n:
            raise ValueError(f"n_byzantine must be less than half of {n} workers, got {self.f}")
        if (attack is None) != (self.f == 0):
            raise ValueError(
                "attack goes with n_byzantine: "
                + (f"say what {self.f} workers send" if self.f else "there is nobody to attack")
            )
        if integer("batch_size", batch_size, 1) > problem.n_samples:
            raise ValueError(
                f"batch_size must be at most the {problem.n_samples} rows of a worker, got {batch_size}"
            )
        one_of("sampling", sampling, ("uniform", "importance"))
        if sampling == "importance" and getattr(problem, "smoothness", None) is None:
            raise ValueError("sampling='importance' needs the problem's smoothness, a constant a row")
        if floating("x0", x0).ndim != 1 or not bool(torch.isfinite(x0).all()):
            raise ValueError(f"x0 must be finite, of shape (d,), got shape {tuple(x0.shape)}")
        if x0.dtype in NARROW:
            raise ValueError(f"x0 must be float32 or float64, small steps vanish in {x0.dtype}")
        if aggregator is None and self.f and 4 * self.f >= n:
            warnings.warn(
                f"with {self.f} of {n} workers lying, half of the buckets of two may be bad: nothing is guaranteed",
                stacklevel=4,
            )
        self.problem, self.attack, self.generator = problem, attack, generator
        self.batch, self.sampling = batch_size, sampling
        self.aggregate = aggregator or (_bucketed_median(generator) if self.f else _mean)
        self.history: list[dict[str, Any]] = []
        self.gradients, self.sent = 0, 0.0

    def step(self, x: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
        """Return the aggregate and the next point; the liars see what the honest sent."""
        vectors = good
        if self.attack is not None:
            lies = self.attack(good, self.f)
            if lies.shape != (self.f, good.shape[1]):
                raise ValueError(f"attack must return {(self.f, good.shape[1])}, got {tuple(lies.shape)}")
            vectors = torch.cat([good, lies.to(good)])
        g = self.aggregate(vectors)
        self.history.append(
            {
                "step": len(self.history),
                "gradient_norm": torch.linalg.vector_norm(g),
                "sample_gradients": self.gradients,
                "sent": self.sent,
            }
        )
        return g, x - self.lr * g

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return a batch of rows for each worker, and their weights."""
        workers, m = self.problem.n_workers, self.problem.n_samples
        on = draw_device(self.generator)
        if self.sampling == "importance":
            smoothness: Tensor = self.problem.smoothness  # type: ignore[attr-defined]
            chance = smoothness.to(on or "cpu")
            idx = chance.multinomial(self.batch, replacement=True, generator=self.generator).to(device)
            mean = smoothness.mean(1, keepdim=True).to(device)
            return idx, mean / smoothness.to(device).gather(1, idx)
        if self.batch == m:
            return torch.arange(m, device=device).expand(workers, m), None
        return torch.randint(m, (workers, self.batch), generator=self.generator, device=on).to(device), None

    def grad(self, x: Tensor, idx: Tensor, weights: Tensor | None) -> Tensor:
        """Return gradients on a batch, and count them."""
        self.gradients += self.batch
        if weights is None:
            return self.problem.grad(x, idx)
        return self.problem.grad(x, idx, weights)  # type: ignore[call-arg]

    def change(self, x: Tensor, before: Tensor, idx: Tensor, weights: Tensor | None) -> Tensor:
        """Return changes of gradients on a batch, and count both."""
        at_once = getattr(self.problem, "change", None)
        if at_once is None:
            return self.grad(x, idx, weights) - self.grad(before, idx, weights)
        self.gradients += 2 * self.batch
        return at_once(x, before, idx, weights)

    def full(self, x: Tensor) -> Tensor:
        """Return full gradients, which are sent as they are."""
        self.gradients += self.problem.n_samples
        self.sent += x.numel()
        return self.problem.full_grad(x)

    def compress(self, vectors: Tensor, compressor: Compressor | None) -> Tensor:
        """Return what the server receives of vectors."""
        if compressor is None:
            self.sent += vectors.shape[1]
            return vectors
        sent = compressor(vectors)
        if sent.shape != vectors.shape:
            raise ValueError(
                f"compressor must keep the shape {tuple(vectors.shape)}, got {tuple(sent.shape)}"
            )
        self.sent += float((sent != 0).sum()) / len(sent)
        return sent

    def result(self, x: Tensor) -> MarinaResult:
        """Return the result."""
        history = [{name: float(value) for name, value in row.items()} for row in self.history]
        return MarinaResult(x, history, self.gradients, self.sent)


def _mean(vectors: Tensor) -> Tensor:
    return vectors.mean(0)


def _bucketed_median(generator: torch.Generator | None) -> Aggregator:
    return lambda vectors: coordinate_median(bucketing(vectors, 2, generator=generator))


@torch.inference_mode(False)
def byz_vr_marina(
    problem: Any,
    x0: Float[Tensor, " d"],
    *,
    lr: float,
    n_steps: int,
    n_byzantine: int = 0,
    batch_size: int = 1,
    p: float | None = None,
    aggregator: Aggregator | None = None,
    compressor: Compressor | None = None,
    attack: Attack | None = None,
    sampling: Literal["uniform", "importance"] = "uniform",
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> MarinaResult:
    """Minimise a mean of losses over honest workers, equation (1), whatever the others send.

    Parameters
    ----------
    problem : FiniteSum
        Or any object with ``grad(x, idx)``, ``full_grad(x)``, ``n_samples`` and ``n_workers``, the
        honest ones.
    x0 : Tensor of shape (d,)
        Where to begin, of the dtype of the data, float32 or float64; computed outside autocast.
    lr : float
        Positive; see `step_size`.
    n_steps : int
        How often x moves.
    n_byzantine : int, default=0
        Workers that send what ``attack`` says, beside the honest ones; fewer than half of all.
    batch_size : int, default=1
        b, rows of a batch, drawn with replacement; with as many as a worker has, all of them.
    p : float, optional
        In (0, 1]: how often full gradients are sent. By default the least of b over the rows of a worker and
        the share of numbers that a compressed vector keeps.
    aggregator : callable, optional
        ``aggregator(vectors (n, d)) -> (d,)``, by default the coordinate median of random buckets of
        two, or the mean where nobody lies.
    compressor : callable, optional
        ``compressor(vectors (n, d)) -> (n, d)``, unbiased, such as `rand_k` with its k by
        ``functools.partial``. The rate must fall about as the share of numbers sent.
    attack : callable, optional
        ``attack(good (g, d), n_byzantine) -> (n_byzantine, d)``: the liars see all that honest workers
        sent in this step. Needed where ``n_byzantine`` is not 0.
    sampling : {"uniform", "importance"}, default="uniform"
        Whether rows are drawn alike, or by the problem's ``smoothness`` and weighed by its inverse.
    generator : torch.Generator, optional
        Draws coins, batches and buckets; a compressor has its own.
    callback : callable, optional
        ``callback(step, x)`` after each step.

    Returns
    -------
    MarinaResult
        The last point, and what it cost.

    Raises
    ------
    ValueError
        If half of the workers or more lie, an attack is missing or has nobody, or an argument is out of range.

    Warns
    -----
    UserWarning
        If with the default aggregator half of the buckets may be bad.

    Notes
    -----
    1. Honest workers restart from the aggregate, as in the paper; in the official code each goes on
       from its own last vector.
    2. The coin is drawn in each step; there once an epoch.

    References
    ----------
    Gorbunov, Horváth, Richtárik, Gidel, "Variance Reduction is an Antidote to Byzantines", ICLR
    2023, Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import FiniteSum, alie, byz_vr_marina
    >>> rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> problem = FiniteSum(lambda x, a: ((x - a) ** 2).sum(1).mean() / 2, (rows,), n_workers=9)
    >>> found = byz_vr_marina(
    ...     problem, torch.zeros(2, dtype=torch.float64), lr=0.3, n_steps=200, n_byzantine=2, attack=alie,
    ...     batch_size=5, generator=torch.Generator().manual_seed(0),
    ... )
    >>> bool((found.x - rows.mean(0)).abs().max() < 1e-9)
    True
    """
    run = _Round(problem, x0, lr, n_steps, n_byzantine, batch_size, aggregator, attack, sampling, generator)
    if p is None:
        kept = (
            1.0 if compressor is None else float((compressor(torch.ones_like(x0)[None]) != 0).double().mean())
        )
        p = min(batch_size / problem.n_samples, kept)
    p = within("p", p, 0.0, 1.0, open_low=True)
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        x = x0.detach().clone()
        good = run.full(x)
        _fitting(good, problem, x)
        for now in range(n_steps):
            g, after = run.step(x, good)
            coin = torch.rand((), generator=generator, device=draw_device(generator))
            if float(coin) < p:  # of [0, 1)
                good = run.full(after)
            else:
                idx, weights = run.draw(x.device)
                change = run.change(after, x, idx, weights)
                good = g + run.compress(change, compressor)
            x = after
            if callback is not None:
                callback(now, x)
    return run.result(x)


@torch.inference_mode(False)
def byz_sgd(
    problem: Any,
    x0: Float[Tensor, " d"],
    *,
    lr: float,
    n_steps: int,
    n_byzantine: int = 0,
    batch_size: int = 1,
    momentum: float = 0.0,
    aggregator: Aggregator | None = None,
    compressor: Compressor | None = None,
    attack: Attack | None = None,
    sampling: Literal["uniform", "importance"] = "uniform",
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> MarinaResult:
    """Minimise by stochastic gradients and a robust mean, with momentum at the workers: the baseline.

    Parameters
    ----------
    problem, x0, lr, n_steps, n_byzantine, batch_size
        As for `byz_vr_marina`.
    momentum : float, default=0.0
        In [0, 1): a worker sends ``m <- momentum m + (1 - momentum) gradient``, begun at its first gradient.
    aggregator, compressor, attack, sampling, generator, callback
        As for `byz_vr_marina`.

    Returns
    -------
    MarinaResult
        The same counts.

    Raises
    ------
    ValueError
        As for `byz_vr_marina`.

    References
    ----------
    Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021.
    """
    run = _Round(problem, x0, lr, n_steps, n_byzantine, batch_size, aggregator, attack, sampling, generator)
    within("momentum", momentum, 0.0, 1.0, open_high=True)
    memory: Tensor | None = None
    with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
        x = x0.detach().clone()
        for now in range(n_steps):
            fresh = run.grad(x, *run.draw(x.device))
            _fitting(fresh, problem, x)
            memory = fresh if memory is None else momentum * memory + (1 - momentum) * fresh
            _, x = run.step(x, run.compress(memory, compressor))
            if callback is not None:
                callback(now, x)
    return run.result(x)


def _fitting(gradients: Tensor, problem: Any, x: Tensor) -> None:
    if gradients.dtype != x.dtype:
        raise ValueError(
            f"x0 must have the dtype of the problem's gradients, {gradients.dtype}, got {x.dtype}"
        )
    if gradients.shape != (problem.n_workers, len(x)):
        raise ValueError(
            f"x0 must fit the problem: gradients are {tuple(gradients.shape)} for {problem.n_workers} workers"
        )


def step_size(
    L: float,
    L_pm: float,
    L_batch: float,
    *,
    p: float,
    omega: float = 0.0,
    batch_size: int = 1,
    n_good: int,
    delta: float = 0.0,
    c: float = 0.0,
) -> float:
    """Return the largest rate for which the paper's theorem promises convergence.

    Parameters
    ----------
    L : float
        Smoothness of the mean loss; positive.
    L_pm : float
        Global Hessian variance: how far the workers' gradients change apart; 0 if they share rows.
    L_batch : float
        Local Hessian variance: how far the gradients of single rows of a worker change apart.
    p : float
        Of full gradients, in (0, 1].
    omega : float, default=0.0
        Variance of the compressor, d / k - 1 for `rand_k`.
    batch_size : int, default=1
        b, rows of a batch.
    n_good : int
        Honest workers.
    delta : float, default=0.0
        Share of the others, in [0, 1/2).
    c : float, default=0.0
        Of the (delta, c)-robust aggregator.

    Returns
    -------
    float
        ``1 / (L + sqrt(A))``, with ``A = 6 (1-p)/p (4 c delta / p + 1/(2G)) (omega L^2 + (1 + omega) L_batch^2 / b)
        + 6 (1-p)/p (4 c delta (1 + omega) / p + omega/(2G)) L_pm^2``.

    References
    ----------
    Gorbunov, Horváth, Richtárik, Gidel, ICLR 2023, Theorem 2.1.

    Examples
    --------
    >>> from posterity.federated import step_size
    >>> step_size(2.0, 0.0, 5.0, p=1.0, n_good=10)
    0.5
    """
    at_least("L", L, 0.0, strict=True)
    for name, value in {"L_pm": L_pm, "L_batch": L_batch, "omega": omega, "c": c}.items():
        at_least(name, value, 0.0)
    within("p", p, 0.0, 1.0, open_low=True)
    within("delta", delta, 0.0, 0.5, open_high=True)
    b, good = integer("batch_size", batch_size, 1), integer("n_good", n_good, 1)
    rare, lies = 6 * (1 - p) / p, 4 * c * delta / p
    a = rare * (lies + 1 / (2 * good)) * (omega * L**2 + (1 + omega) * L_batch**2 / b)
    a += rare * (lies * (1 + omega) + omega / (2 * good)) * L_pm**2
    return 1 / (L + math.sqrt(a))


def robust_strategy(
    aggregator: Aggregator, *, s: int = 2, generator: torch.Generator | None = None, **fedavg_kwargs: Any
) -> Any:
    """Return a Flower strategy whose server applies a robust mean to buckets of the clients' models.

    Parameters
    ----------
    aggregator : callable
        ``aggregator(vectors (n, d)) -> (d,)``; here of all floating-point entries of a model, less those of the first.
    s : int, default=2
        Models in a bucket; 1 for none.
    generator : torch.Generator, optional
        For the order of buckets.
    **fedavg_kwargs
        Of ``flwr.serverapp.strategy.FedAvg``.

    Returns
    -------
    flwr.serverapp.strategy.FedAvg
        For a ``ServerApp``; its ``aggregate_train`` is ours. Counts and other whole numbers are the first client's.

    Raises
    ------
    ImportError
        If Flower is not installed, with the command that installs it.
    """
    integer("s", s, 1)
    return strategy(partial(_robust_state, aggregator, s, generator), **fedavg_kwargs)


def _robust_state(
    aggregator: Aggregator,
    s: int,
    generator: torch.Generator | None,
    states: Sequence[dict[str, Tensor]],
    _: Any,
) -> dict[str, Tensor]:
    """Return the state of which the entries are the robust mean."""
    base = states[0]
    change = aggregator(bucketing(update_vectors(states, base), s, generator=generator))
    state, start = {}, 0
    for name, value in base.items():
        if not value.is_floating_point():
            state[name] = value.clone()
            continue
        part = change[start : start + value.numel()].view(value.shape)
        state[name] = (value.to(part) + part).to(value.dtype)
        start += value.numel()
    return state
