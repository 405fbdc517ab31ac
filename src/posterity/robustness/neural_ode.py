"""A neural ODE as a layer: its field sees the time, its solver takes few enough step sizes.

The field of dx/dt = f(t, x) is a small network; the time is one more input of its linear maps,

    W x + t w + b,                                                           (1)

or one more channel of its convolutions. In training a batch decides its steps together, and
the first step size follows the batches; afterwards that is fixed, and every sample decides alone:
what is proved of a sample must not depend on its neighbours.
"""

from collections.abc import Callable
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, integer
from posterity._precision import wide
from posterity.robustness.ode_solver import (
    REJECT,
    TABLEAUS,
    Control,
    CountedField,
    Method,
    ODESolution,
    Step,
    Tableau,
    check_finite,
    control_of,
    controlled_adaptive_solve,
    error_size,
    in_order,
    runge_kutta,
)

__all__ = ["NeuralODEBlock", "TimeConv2d", "TimeLinear"]

MIN_STEP = 0.02  # of t1, to which rejections may lead


class TimeLinear(nn.Module):
    """A linear map of the state and the time: ``W x + t w + b``.

    Parameters
    ----------
    in_features, out_features : int
        Widths, at least 1.

    Attributes
    ----------
    weight : nn.Parameter
        Shape (out_features, in_features + 1), the time last.
    bias : nn.Parameter
        Shape (out_features,).

    Raises
    ------
    ValueError
        If a width is below 1 or ``x`` does not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import TimeLinear
    >>> TimeLinear(3, 2)(torch.tensor(0.5), torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        drawn = nn.Linear(in_features + 1, out_features)
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(
        self, t: Float[Tensor, ""] | float, x: Float[Tensor, "batch {self.in_features}"]
    ) -> Float[Tensor, "batch {self.out_features}"]:
        """Return the map at time ``t``."""
        floating("x", x)
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must have shape (batch, {self.in_features}), got {tuple(x.shape)}")
        return F.linear(x, self.weight[:, :-1], self.bias + t * self.weight[:, -1])


class TimeConv2d(nn.Module):
    """A convolution of the state and, as one more channel, the time.

    Parameters
    ----------
    in_channels, out_channels : int
        At least 1.
    kernel_size : int, default=3
        At least 1.
    padding : int, default=1
        With zeros, also of the time; at least 0.

    Attributes
    ----------
    weight : nn.Parameter
        Shape (out_channels, in_channels + 1, kernel_size, kernel_size), the time last.
    bias : nn.Parameter
        Shape (out_channels,).

    Raises
    ------
    ValueError
        If a parameter is out of range or ``x`` does not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import TimeConv2d
    >>> TimeConv2d(3, 2)(torch.tensor(0.5), torch.zeros(4, 3, 8, 8)).shape
    torch.Size([4, 2, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, padding: int = 1) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.kernel_size = integer("kernel_size", kernel_size, 1)
        self.padding = integer("padding", padding, 0)
        drawn = nn.Conv2d(in_channels + 1, out_channels, kernel_size)
        assert drawn.bias is not None
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(
        self, t: Float[Tensor, ""] | float, x: Float[Tensor, "batch {self.in_channels} height width"]
    ) -> Float[Tensor, "batch {self.out_channels} rows columns"]:
        """Return the convolution at time ``t``."""
        floating("x", x)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have shape (batch, {self.in_channels}, height, width), got {tuple(x.shape)}"
            )
        least = max(1, self.kernel_size - 2 * self.padding)
        if min(x.shape[2:]) < least:
            raise ValueError(f"x must be at least {least} pixels high and wide, got {tuple(x.shape)}")
        time = torch.ones_like(x[:, :1]) * t
        return F.conv2d(torch.cat([x, time], 1), self.weight, self.bias, padding=self.padding)


class NeuralODEBlock(nn.Module):
    """The state at t1 of dx/dt = func(t, x) as a layer, by the controlled adaptive solver.

    In training, each batch moves the first step size h0 a little towards what suits it, and the
    batch's mean error decides its steps. In eval mode h0 is fixed and every sample goes its own
    way (those that stand at the same step go together), so that what is proved of a sample
    does not depend on its neighbours.

    Parameters
    ----------
    func : nn.Sequential
        Of `TimeLinear`, `TimeConv2d`, ``nn.Linear``, ``nn.Conv2d`` and ``nn.ReLU``; keeps the shape.
    t1, atol, factor, method
        As for `controlled_adaptive_solve`.

    Attributes
    ----------
    h0 : Tensor of shape ()
        First step size: a buffer, 0 until a batch in training mode, or you, has set it.

    Raises
    ------
    ValueError
        If a layer of ``func`` is none of those, a parameter is out of range, the shape changes,
        or h0 is not in (0, t1] in eval mode.

    References
    ----------
    .. [1] Zeqiri, Mueller, Fischer, Vechev. Efficient Certified Training and Robustness
       Verification of Neural ODEs. ICLR 2023. Section 4 and Appendix.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.robustness import NeuralODEBlock, TimeLinear
    >>> block = NeuralODEBlock(nn.Sequential(TimeLinear(4, 4), nn.ReLU()))
    >>> block(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    >>> bool(0 < block.h0 <= 1)
    True
    """

    h0: Tensor

    def __init__(
        self, func: nn.Sequential, *, t1: float = 1.0, atol: float = 5e-3, factor: float = 2.0,
        method: Method = "dopri5",
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(func, nn.Sequential):
            raise ValueError(f"func must be an nn.Sequential, got {type(func).__name__}")
        for index, layer in enumerate(func):
            if type(layer) not in (TimeLinear, TimeConv2d, nn.Linear, nn.Conv2d, nn.ReLU):
                raise ValueError(
                    "func must be of TimeLinear, TimeConv2d, Linear, Conv2d and ReLU, "
                    f"got {type(layer).__name__} at {index}"
                )
        self.atol = at_least("atol", atol, 0, strict=True)
        control_of(t1, factor, MIN_STEP, method, t1)
        self.func, self.t1, self.factor = func, t1, factor
        self.method: Method = method
        self.register_buffer("h0", torch.tensor(0.0))

    def forward(self, x: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        """Return the state at t1."""
        return self._solve(x).y if self.training else self._solve_each(x)

    def _field(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the slope."""
        for layer in self.func:
            x = layer(t, x) if isinstance(layer, (TimeLinear, TimeConv2d)) else layer(x)
        return x

    def _control(self) -> tuple[Control, Tableau, Step]:
        h0 = float(self.h0)
        if not 0 < h0 <= self.t1:
            raise ValueError(
                f"h0 must be in (0, {self.t1}], got {h0}: pass a batch through the block in training mode, or set it"
            )
        return control_of(self.t1, self.factor, MIN_STEP, self.method, h0)

    def _solve(self, x: Tensor) -> ODESolution:
        """Return the solution of a batch, by its mean error; in training h0 follows the batch."""
        if self.training:
            with torch.no_grad():
                new = _first_step(self._field, x, self.t1, self.atol, TABLEAUS[self.method])
                old = float(self.h0)
                self.h0.fill_(0.9 * old + 0.1 * new if old > 0 else new).clamp_(max=self.t1)
        self._control()
        return controlled_adaptive_solve(
            self._field, x, t1=self.t1, h0=float(self.h0), atol=self.atol, factor=self.factor, method=self.method, min_step=MIN_STEP,
        )  # fmt: skip

    def _solve_each(self, x: Tensor) -> Tensor:
        """Return the states of samples that each choose their own steps."""
        floating("x", x)
        if x.ndim < 2 or not x.numel():
            raise ValueError(f"x must have samples and features, got shape {tuple(x.shape)}")
        control, tableau, first = self._control()
        field = CountedField(self._field, x)
        y = wide(x)
        waiting = {first: [(torch.arange(len(x), device=x.device), y, field(0.0, y))]}
        done = []
        for step in in_order(waiting):
            rows, y, k = (torch.cat(part) for part in zip(*waiting.pop(step), strict=True))
            new, error, slope = runge_kutta(field, step, y, k, tableau)
            size = error_size(error, self.atol)
            check_finite(float(size.max()), step)
            actions = torch.tensor([control.action(step, e) for e in size.tolist()], device=x.device)
            for action in actions.unique().tolist():
                chosen = actions == action
                after = control.after(step, action)
                state = (
                    rows[chosen],
                    *((y[chosen], k[chosen]) if action == REJECT else (new[chosen], slope[chosen])),
                )
                (done if after is None else waiting.setdefault(after, [])).append(state)
        rows, y = (torch.cat(part) for part in zip(*[state[:2] for state in done], strict=True))
        return y[rows.argsort()].to(x.dtype)


def _first_step(
    field: Callable[[Tensor, Tensor], Tensor], y: Tensor, t1: float, atol: float, tableau: Tableau
) -> float:
    """Return the step size at which a trial step of a batch would just be accepted."""
    call = CountedField(field, y)
    y = wide(y)
    k = call(0.0, y)
    size, speed = (float(part.abs().sum()) / (atol * max(1, len(y))) for part in (y, k))
    h = 1e-5 if min(size, speed) < 1e-5 else 0.01 * size / speed
    _, error, _ = runge_kutta(call, Step(Fraction(0), Fraction(min(h, t1))), y, k, tableau)
    worst = float(error_size(error, atol).max())
    check_finite(worst, Step(Fraction(0), Fraction(0)))
    growth = 10.0 if worst == 0 else max(0.9 * worst ** (-1 / (tableau.order - 1)), 1.0 if worst < 1 else 0.2)
    return min(t1, min(h, t1) * min(10.0, growth))
