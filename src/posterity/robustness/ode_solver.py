"""A controlled adaptive solver: an ODE solver whose step sizes are few enough to follow them all.

An ordinary adaptive solver sets its next step by a continuous function of its error estimate, so
that a small change of the input reaches infinitely many step sizes. Here a step that was tried
is multiplied or divided by one factor f, or kept. With an embedded Runge-Kutta step of order p
and its error e in units of the tolerance,

    e <= f^-p: accept, h <- f h;      e <= 1: accept;      e > 1: reject, h <- h / f.     (1)

From the first step size only a discrete set of (t, h) can be reached. All of them are kept as
fractions, so that two ways to the same place are seen to meet.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, integer, one_of, within
from posterity._precision import wide

__all__ = ["ODESolution", "controlled_adaptive_solve"]

Method = Literal["dopri5", "bosh3"]
REJECT, KEEP, GROW = 0, 1, 2
TINY = Fraction(1, 10**8)  # what remains below it counts as the end


class Tableau(NamedTuple):
    """An embedded Runge-Kutta method whose last stage is the first of the next step.

    ``a[i]`` are the weights of stage i + 1; the last row gives the new state.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]


TABLEAUS = {
    "dopri5": Tableau(
        order=5,
        c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        error=(
            35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
            -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60,
        ),
    ),
    "bosh3": Tableau(
        order=3,
        c=(0, 1 / 2, 3 / 4, 1),
        a=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        error=(2 / 9 - 7 / 24, 1 / 12, 1 / 9, -1 / 8),
    ),
}  # fmt: skip


class Step(NamedTuple):
    """A step that is about to be tried.

    Attributes
    ----------
    t, h : Fraction
        Its start and its size, exact.
    clips : int
        0 until a step was clipped to the end, then 1 plus the rejections since; 0 where forced.
    forced : bool
        Whether it will be accepted whatever its error.
    """

    t: Fraction
    h: Fraction
    clips: int = 0
    forced: bool = False


@dataclass(frozen=True)
class Control:
    """The rules of (1) and of the end: what follows a step and an action."""

    t1: Fraction
    factor: Fraction
    min_step: Fraction
    order: int

    @property
    def easy(self) -> float:
        """The error up to which a step grows."""
        return float(self.factor) ** -self.order

    def action(self, step: Step, error: float) -> int:
        """Return what the error of a step asks for."""
        if step.forced:
            return KEEP
        return GROW if error <= self.easy else KEEP if error <= 1 else REJECT

    def after(self, step: Step, action: int) -> Step | None:
        """Return the step that follows, or None at the end."""
        t, h, clips, forced = step
        if action == REJECT:
            smaller = h / self.factor
            clips += clips > 0
            if clips > 2 if clips else smaller < self.min_step * self.t1:
                return Step(t, h, 0, True)
            return Step(t, smaller, clips, False)
        t += h
        if self.t1 - t < TINY:
            return None
        if action == GROW:
            h *= self.factor
        if t + h > self.t1:
            h, clips = self.t1 - t, 0 if forced else max(clips, 1)
        return Step(t, h, clips, forced)


def control_of(
    t1: float, factor: float, min_step: float, method: Method, h0: float
) -> tuple[Control, Tableau, Step]:
    """Return the checked rules, the method's weights and the first step."""
    at_least("t1", t1, 0, strict=True)
    at_least("factor", factor, 1, strict=True)
    within("min_step", min_step, 0, 1, open_low=True)
    tableau = TABLEAUS[one_of("method", method, tuple(TABLEAUS))]
    if not t1 > TINY:
        raise ValueError(f"t1 must be greater than {float(TINY):g}, got {t1}")
    within("h0", h0, 0, t1, open_low=True)
    control = Control(Fraction(t1), Fraction(factor), Fraction(min_step), tableau.order)
    return control, tableau, Step(Fraction(0), Fraction(h0))


Field = Callable[[float, Tensor], Tensor]


def runge_kutta(
    field: Field, step: Step, y: Tensor, k: Tensor, tableau: Tableau
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after a step, its error estimate, and the slope there."""
    t, h = float(step.t), float(step.h)
    slopes, state = [k], y
    for c, row in zip(tableau.c[1:], tableau.a, strict=True):
        state = y
        for weight, slope in zip(row, slopes, strict=True):
            if weight:
                state = torch.add(state, slope, alpha=h * weight)
        slopes.append(field(t + c * h, state))
    error = (h * tableau.error[0]) * slopes[0]
    for weight, slope in zip(tableau.error[1:], slopes[1:], strict=True):
        if weight:
            error = torch.add(error, slope, alpha=h * weight)
    return state, error, slopes[-1]


@dataclass
class ODESolution:
    """The end of a trajectory, and the steps that led there.

    Attributes
    ----------
    y : Tensor of shape (B, ...)
        The state at t1.
    times, step_sizes : tuple of float
        Start and size of each step that was tried.
    actions : tuple of int
        0 rejected, 1 accepted, 2 accepted and the next step longer.
    n_evaluations : int
        Calls of ``func``.
    forced : bool
        Whether steps had to be accepted whatever their error.
    """

    y: Float[Tensor, " batch *shape"]
    times: tuple[float, ...]
    step_sizes: tuple[float, ...]
    actions: tuple[int, ...]
    n_evaluations: int
    forced: bool


def controlled_adaptive_solve(
    func: Callable[[Float[Tensor, ""], Float[Tensor, " batch *shape"]], Float[Tensor, " batch *shape"]],
    y0: Float[Tensor, " batch *shape"],
    *,
    t1: float = 1.0,
    h0: float,
    atol: float = 5e-3,
    factor: float = 2.0,
    method: Method = "dopri5",
    min_step: float = 0.02,
    max_steps: int = 1000,
) -> ODESolution:
    """Solve dy/dt = func(t, y) from time 0 to ``t1`` by the rules of (1).

    Parameters
    ----------
    func : callable
        ``func(t, y)`` with a scalar tensor and the state; returns the state's shape.
    y0 : Tensor of shape (B, ...)
        Start. The error that decides is the mean over the batch of the sum over the rest.
    t1 : float, default=1.0
        End, above 1e-8.
    h0 : float
        First step size, in (0, t1].
    atol : float, default=5e-3
        Tolerance: the absolute error, summed over a sample, of one step; positive.
    factor : float, default=2.0
        Ratio of step sizes, greater than 1. At 2 or 3/2 trajectories meet often.
    method : {"dopri5", "bosh3"}, default="dopri5"
        Dormand and Prince's method of order 5 (weights of the error by Shampine), or that of
        Bogacki and Shampine of order 3.
    min_step : float, default=0.02
        Smallest step that a rejection may lead to, as a share of t1, in (0, 1]. A rejection that
        would pass it, and the second one after a step was clipped to the end, force: all
        further steps are accepted.
    max_steps : int, default=1000
        Most steps tried.

    Returns
    -------
    ODESolution
        The state at ``t1`` and the steps that were tried.

    Raises
    ------
    ValueError
        If an argument is out of range, ``func`` changes the shape, a state is not finite, or
        ``max_steps`` are not enough.

    Notes
    -----
    1. The state is float32 at least, also under autocast; ``func`` is called in the dtype of ``y0``.
    2. The last step ends at t1: nothing is interpolated.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4.1.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import controlled_adaptive_solve
    >>> solution = controlled_adaptive_solve(lambda t, y: -y, torch.ones(1, 1), h0=0.25)
    >>> solution.y
    tensor([[0.3679]])
    >>> solution.step_sizes, solution.actions
    ((0.25, 0.5, 0.25), (2, 1, 1))
    """
    floating("y0", y0)
    if y0.ndim == 0 or not y0.numel():
        raise ValueError(f"y0 must have at least one sample and one feature, got shape {tuple(y0.shape)}")
    at_least("atol", atol, 0, strict=True)
    integer("max_steps", max_steps, 1)
    control, tableau, step = control_of(t1, factor, min_step, method, h0)
    field = CountedField(func, y0)
    y = wide(y0)
    k = field(0.0, y)
    tried, forced = [], False
    following: Step | None = step
    while following is not None:
        step = following
        if len(tried) == max_steps:
            raise ValueError(
                f"max_steps must be larger: at t = {float(step.t):g} {max_steps} steps were tried"
            )
        new, error, slope = runge_kutta(field, step, y, k, tableau)
        size = float(error_size(error, atol).mean())
        check_finite(size, step)
        action = control.action(step, size)
        following = control.after(step, action)
        forced |= step.forced
        if action != REJECT:
            y, k = new, slope
        if action == GROW and (following is None or following.h <= step.h):
            action = KEEP  # clipped to the end, it is no longer than before
        tried.append((float(step.t), float(step.h), action))
    times, sizes, actions = zip(*tried, strict=True)
    return ODESolution(y.to(y0.dtype), times, sizes, actions, field.calls, forced)


class CountedField:
    """A user's function with its checks, called with a wide state."""

    def __init__(self, func: Callable[[Tensor, Tensor], Tensor], y0: Tensor) -> None:
        self.func, self.dtype, self.calls = func, y0.dtype, 0

    def __call__(self, t: float, y: Tensor) -> Tensor:
        self.calls += 1
        slope = self.func(torch.tensor(t, dtype=self.dtype, device=y.device), y.to(self.dtype))
        if not isinstance(slope, Tensor) or slope.shape != y.shape:
            came = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
            raise ValueError(f"func must return the shape of its state, {tuple(y.shape)}, got {came}")
        return slope.to(y.dtype)


def error_size(error: Tensor, atol: float) -> Tensor:
    """Return the error of each sample in units of the tolerance."""
    return error.detach().abs().flatten(1).sum(1) / atol


def check_finite(size: float, step: Step) -> None:
    if not abs(size) < float("inf"):  # NaN is not either
        raise ValueError(f"func must keep the state finite, but from t = {float(step.t):g} on it is not")


def in_order(waiting: dict[Step, list]) -> Iterator[Step]:
    """Yield the steps of a dictionary that grows meanwhile, each after all that can lead to it.

    A step leads to a later time, else to a shorter step, else to a forced one.
    """

    def rank(step: Step) -> tuple:
        return step.t, -step.h, step.forced, step.clips

    heap = [(rank(step), step) for step in waiting]
    seen = set(waiting)
    while heap:
        _, step = heapq.heappop(heap)
        yield step
        for new in waiting.keys() - seen:
            seen.add(new)
            heapq.heappush(heap, (rank(new), new))
