"""The ODE of a network in time: fixed steps of Euler or Heun, or steps chosen by their error.

From states z at t0 the solution of dz/dt = net(z, t) is followed to t1. Euler's step
z + h net(z, t) calls the network once and errs by O(h) in all, but not at all on straight
paths; Heun's calls it twice and errs by O(h^2); those of Dormand and Prince (RK45) are as
long as the tolerances allow.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from posterity._checks import at_least, integer, one_of, within
from posterity._precision import NARROW, wide
from posterity.generative._network import steps

__all__ = ["Trajectory"]

DIVERGES = "the field must stay finite along its paths for method 'rk45': its steps vanish where it blows up or is NaN"

Method = Literal["euler", "heun", "rk45"]
Field = Callable[[Tensor, Tensor], Tensor]  # (time of no dimension, state) -> slope


class Trajectory(NamedTuple):
    """Solution of the ODE.

    Attributes
    ----------
    x : Tensor
        Where the samples ended, shape ``(n, *shape)``.
    times : Tensor
        Times of the solver's k steps and of the start, shape (k + 1,).
    path : Tensor or None
        States at ``times``, shape ``(k + 1, n, *shape)``, if asked for.
    n_evals : int
        Calls of the network.
    """

    x: Tensor
    times: Tensor
    path: Tensor | None
    n_evals: int


def _solve(
    field: Field, y: Tensor, t0: float, t1: float, *, method: str, n_steps: int, rtol: float, atol: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the end of dy/dt = field(t, y), the times of the steps, and their states.

    All are float32 at least: steps that are small beside the state would be rounded away.
    """
    one_of("method", method, ("euler", "heun", "rk45"))
    integer("n_steps", n_steps, 1)
    at_least("rtol", rtol, 0, strict=True)
    at_least("atol", atol, 0, strict=True)
    within("t0", t0, 0, 1)
    if within("t1", t1, 0, 1) == t0:
        raise ValueError(f"t1 must differ from t0, got {t1} for both")
    if y.dtype in NARROW:  # whose rounding the network adds to its slopes
        rtol, atol = (max(each, torch.finfo(y.dtype).eps) for each in (rtol, atol))
        y = wide(y)
    if method == "rk45":
        times, states = _adaptive(field, y, float(t0), float(t1), rtol, atol)
    else:
        # In float64 and on the device: t_i is i / N to the last bit, and nothing waits for it.
        grid = torch.arange(n_steps + 1, dtype=torch.float64, device=y.device)
        times = (t0 + (t1 - t0) * (grid / n_steps)).to(y.dtype)
        h, states = (t1 - t0) / n_steps, [y]
        for k in steps(n_steps):
            slope = field(times[k], y)
            if method == "heun":
                slope = (slope + field(times[k + 1], torch.add(y, slope, alpha=h))) / 2
            y = torch.add(y, slope, alpha=h)
            if not keep:
                states.clear()
            states.append(y)
    path = torch.stack(states) if keep else None
    return states[-1], times, path


def _adaptive(
    field: Field, y: Tensor, t0: float, t1: float, rtol: float, atol: float
) -> tuple[Tensor, list[Tensor]]:
    """Return times and states of Dormand and Prince's steps, the batch as one system.

    The solver's state is float64, since its estimate of the error drowns in the rounding
    of less; the network sees the dtype of ``y``.
    """
    low, high = min(t0, t1), max(t0, t1)

    def wide(time: Tensor, state: Tensor) -> Tensor:
        time = time.clamp(low, high)  # torchdiffeq's first trial step may overshoot
        return field(time.to(y.dtype), state.to(y.dtype)).double()

    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError:
        from scipy.integrate import solve_ivp

        def flat(time: float, state: Any) -> Any:
            rows = torch.as_tensor(state, device=y.device).reshape(y.shape)
            return wide(torch.tensor(time, device=y.device), rows).detach().flatten().cpu().numpy()

        start = y.detach().flatten().double().cpu().numpy()
        found = solve_ivp(flat, (t0, t1), start, method="RK45", rtol=rtol, atol=atol)
        if not found.success:
            raise ValueError(DIVERGES) from None
        path = torch.as_tensor(found.y.T.copy()).to(y).reshape(-1, *y.shape)
        return torch.as_tensor(found.t).to(y), list(path)

    times: list[Tensor] = []
    states: list[Tensor] = []

    def accepted(time: Tensor, state: Tensor, _: Any = None) -> None:
        times.append(time)
        states.append(state)

    wide.callback_accept_step = accepted
    span = torch.tensor([t0, t1], dtype=torch.float64, device=y.device)
    options = {"step_t": span[1:]}  # land on the end: no look past t1, no interpolation there
    try:
        found: Any = odeint(wide, y.double(), span, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # its way to say that the step has become too small
        raise ValueError(DIVERGES) from error
    accepted(span[1], found[1])
    return torch.stack(times).to(y.dtype), [state.to(y.dtype) for state in states]
