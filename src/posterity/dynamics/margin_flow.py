r"""Gradient flow on a loss of exponential type, followed along its path to margins beyond any number of steps.

In time the flow slows down exponentially, and margins grow with the logarithm of time. Its path is
that of the same direction at another speed,

.. math:: \frac{\mathrm d\theta}{\mathrm d\tau} = \frac{g}{\lVert g \rVert_2} \max(1, \lVert\theta\rVert_\infty),
   \qquad g = -\nabla \log L,

so that a unit of path time multiplies the largest parameter by e at most. Losses, e^-margin summed over
samples, underflow soon; their logarithm and its gradient, weights softmax(-margin), do not.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy.integrate import LSODA
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, has_shape, integer, one_of, within
from posterity._models import call, evaluating, state
from posterity._random import draw_device
from posterity.dynamics._plots import axes
from posterity.dynamics.margin_bias import LARGEST, _margins, _outputs

__all__ = ["MarginFlow", "PowerDiagonal", "margin_flow"]

MOST = 3_000  # parameters: the solver keeps a square matrix of them
LONGEST = 0.5  # step in path time
GRADIENTS = 30_000  # the solver stalls at kinks, at a minimum, and where rounding alone decides the direction


class PowerDiagonal(nn.Module):
    """The simplest quasi-homogeneous model: linear, its coefficients powers of parameters.

    f(x) = sum_i theta_i^D_i x_i, so that a parameter of degree D has the rate 1/D. Those of the smallest degree
    are what training keeps small.

    Parameters
    ----------
    degrees : sequence of int
        Odd and positive: an even power would have one sign.
    generator : torch.Generator, optional
        For the parameters, standard normal; torch's own if None. Gradient flow does not carry one of a degree of 3
        or more over 0, so that the signs at the start stay.

    Attributes
    ----------
    theta : nn.Parameter of shape (d,)

    Raises
    ------
    ValueError
        If ``degrees`` is empty or holds what is not odd and positive, or ``x`` has another number of columns.

    References
    ----------
    .. [1] Kunin et al. The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks. ICLR 2023.
       Section 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import PowerDiagonal
    >>> model = PowerDiagonal([1, 3])
    >>> model.theta.data = torch.tensor([2.0, 2.0])
    >>> model(torch.eye(2))
    tensor([2., 8.], grad_fn=<MvBackward0>)
    >>> model.rates()
    {'theta': tensor([1.0000, 0.3333], dtype=torch.float64)}
    """

    degrees: Tensor

    def __init__(self, degrees: Sequence[int], *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not len(degrees):
            raise ValueError("degrees must hold at least one, got none")
        for degree in degrees:
            if integer("degrees", degree, 1) % 2 == 0:
                raise ValueError(f"degrees must be odd, so that coefficients have both signs, got {degree}")
        self.register_buffer("degrees", torch.tensor([int(degree) for degree in degrees]))
        drawn = torch.randn(len(degrees), generator=generator, device=draw_device(generator))
        self.theta = nn.Parameter(drawn.cpu())

    def coefficients(self) -> Float[Tensor, " d"]:
        """Return theta_i^D_i, the coefficients of x."""
        return self.theta**self.degrees

    def rates(self) -> dict[str, Tensor]:
        """Return a rate for each parameter, 1 / D_i."""
        return {"theta": 1 / self.degrees.cpu().double()}

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return a score for each row."""
        has_shape("x", x, (None, len(self.theta)), "degrees")
        return x @ self.coefficients().to(x.dtype)


@dataclass(frozen=True)
class MarginFlow:
    """A path of gradient flow, float64 on the CPU.

    Attributes
    ----------
    times : Tensor of shape (steps,)
        Path time, from 0.
    params : Tensor of shape (steps, p)
        Trainable parameters, flat in the order of ``model.parameters()``.
    log_loss : Tensor of shape (steps,)
        Of the sum of losses over samples.
    min_margin : Tensor of shape (steps,)
        The least y f, or with classes the least difference of the true class's score from another.
    log_margin : Tensor of shape (steps,)
        Its logarithm, NaN until the data are separated.
    model : nn.Module
        A copy at the end, in float64 on the CPU.
    n_evals : int
        Gradients evaluated.
    success : bool
        Whether the end was reached. Else something was not finite, the gradient 0, or 30,000 gradients taken, after
        the last time: data that are not separated end at a minimum, where a path has no direction.
    """

    times: Float[Tensor, " steps"]
    params: Float[Tensor, "steps p"]
    log_loss: Float[Tensor, " steps"]
    min_margin: Float[Tensor, " steps"]
    log_margin: Float[Tensor, " steps"]
    model: nn.Module
    n_evals: int
    success: bool

    def plot(self, ax: Any = None) -> Any:
        """Draw the size of each parameter, the 20 largest at the end, over path time.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Those of a new figure if None.

        Returns
        -------
        matplotlib Axes
        """
        ax = axes(ax)
        largest = self.params[-1].abs().argsort(descending=True)[:20]
        ax.semilogy(self.times.numpy(), self.params[:, largest].abs().clamp_min(1e-300).numpy())
        ax.set_xlabel("path time")
        ax.set_ylabel("size of parameters")
        return ax


class _Stop(Exception):
    """There is no direction to follow, or no end to it."""


@torch.inference_mode(False)
@torch.enable_grad()
def margin_flow(
    model: nn.Module,
    x: Shaped[Tensor, " n *features"],
    y: Shaped[Tensor, " n"],
    *,
    loss: Literal["exponential", "logistic"] = "exponential",
    duration: float = 12.0,
    n_eval: int = 50,
    rtol: float = 1e-6,
    atol: float = 1e-9,
) -> MarginFlow:
    """Follow gradient flow from a model's parameters along its path.

    Parameters
    ----------
    model : nn.Module
        Returns (n,) or (n, 1), one score a sample, or (n, classes); in eval mode. A copy is trained, in float64 on the
        CPU; at most 3,000 parameters are trainable.
    x : Tensor of shape (n, ...)
        Inputs.
    y : Tensor of shape (n,)
        -1 and 1 for a single score, else class indices.
    loss : {"exponential", "logistic"}, default="exponential"
        Sum over samples of e^-margin, with classes over all others too; or of log(1 + that), which is cross-entropy.
    duration : float, default=12.0
        Path time, greater than 0, at most 700: the largest parameter grows by e^duration at most. Samples at the margin are kept
        in balance to one part in the margin, so that beyond 1e15 rounding decides and the solver slows down:
        with a degree D in the parameters more than 35 / D is of little use.
    n_eval : int, default=50
        Points to return, at least 2, evenly spaced.
    rtol, atol : float, default=1e-6 and 1e-9
        Tolerances of the solver, greater than 0.

    Returns
    -------
    MarginFlow
        The path, up to its end or to where it could not be followed on.

    Raises
    ------
    ValueError
        If an argument is out of its range, shapes do not fit, ``y`` has one class alone, too many parameters are trainable or none, or
        the outputs at the start are not finite.

    Notes
    -----
    1. The solver is LSODA, which changes to a stiff method as samples at the margin begin to alternate. There it
       builds Jacobians by differences, a gradient for each parameter.
    2. Real time is the integral of max(1, |theta|) / (L |g|) over path time.

    References
    ----------
    .. [1] Kunin et al. The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks. ICLR 2023.
       Sections 4 and 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import PowerDiagonal, margin_flow
    >>> model = PowerDiagonal([1, 3])
    >>> model.theta.data = torch.tensor([0.5, 0.5])
    >>> x, y = torch.tensor([[1.0, 0.5], [-1.0, -0.5]]), torch.tensor([1, -1])
    >>> flow = margin_flow(model, x, y, duration=8.0)
    >>> flow.success, (flow.params[-1] > 100).tolist()  # the one of degree 1 stays behind
    (True, [False, True])
    """
    one_of("loss", loss, ("exponential", "logistic"))
    within("duration", duration, 0.0, LARGEST, open_low=True)
    integer("n_eval", n_eval, 2)
    at_least("rtol", rtol, 0.0, strict=True)
    at_least("atol", atol, 0.0, strict=True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not 0 < count <= MOST:
        raise ValueError(f"model must have 1 to {MOST} trainable parameters, got {count}")
    if isinstance(x, Tensor) and x.ndim:
        has_shape("y", y, x.shape[:1], "x")
    end = copy.deepcopy(model).cpu().double()
    x, y = (part.detach().cpu().clone() for part in (x, y))
    x = x.double() if x.is_floating_point() else x
    _margins(_outputs(end, x), y)
    if not bool((y != y[0]).any()):
        raise ValueError(f"y must have more than one class, got {int(y[0])} alone")
    params, rest = state(end)
    if not all(bool(p.isfinite().all()) for p in params.values()):
        raise ValueError("model must have finite parameters, got NaN or infinity")
    sizes = [p.numel() for p in params.values()]
    n_evals = 0

    def losses(flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return log L and the least margin."""
        parts = flat.split(sizes)
        named = {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}
        margins = _margins(call(end, {**named, **rest}, x), y)
        each = torch.logsumexp(-margins, 1)
        if loss == "logistic":  # log(1 + e^z) is e^z beyond rounding below -37
            each = torch.where(each < -37, each, F.softplus(each.clamp_min(-37)).log())
        return torch.logsumexp(each, 0), margins.min()

    def direction(_: float, at: np.ndarray) -> np.ndarray:
        nonlocal n_evals
        if n_evals == GRADIENTS:
            raise _Stop
        n_evals += 1
        flat = torch.from_numpy(at.copy()).requires_grad_()
        g = -torch.autograd.grad(losses(flat)[0], flat)[0].numpy()
        big = np.abs(g).max()
        if not (np.isfinite(big) and big > 0):
            raise _Stop
        g = g / big
        return g / np.linalg.norm(g) * max(1.0, np.abs(at).max())

    with evaluating(end), torch.autocast("cpu", enabled=False):
        start = torch.cat([p.flatten() for p in params.values()]).numpy()
        times, path = _integrated(direction, start, np.linspace(0.0, duration, n_eval), rtol, atol)
        found = [losses(torch.from_numpy(at)) for at in path]
        finite = len(path)
        for k, (value, margin) in enumerate(found):
            if not bool(value.isfinite() and margin.isfinite()):
                finite = k
                break
    times, path, found = times[:finite], path[:finite], found[:finite]
    with torch.no_grad():
        trained = [p for p in end.parameters() if p.requires_grad]
        for p, part in zip(trained, torch.from_numpy(path[-1]).split(sizes), strict=True):
            p.copy_(part.view_as(p))
    margins = torch.stack([margin.detach() for _, margin in found])
    return MarginFlow(
        torch.from_numpy(times),
        torch.from_numpy(path),
        torch.stack([value.detach() for value, _ in found]),
        margins,
        torch.where(margins > 0, margins, math.nan).log(),
        end,
        n_evals,
        finite == n_eval,
    )


def _integrated(
    direction: Any, start: np.ndarray, times: np.ndarray, rtol: float, atol: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the times that were reached, and where the path is at each."""
    path = [start]
    try:
        solver = LSODA(direction, times[0], start, times[-1], max_step=LONGEST, rtol=rtol, atol=atol)
        while solver.status == "running" and len(path) < len(times):
            solver.step()
            if solver.status == "failed" or not np.isfinite(solver.y).all():
                break
            between = solver.dense_output()
            while len(path) < len(times) and times[len(path)] <= solver.t:
                path.append(between(times[len(path)]))
    except _Stop:
        pass
    return times[: len(path)], np.stack(path)
