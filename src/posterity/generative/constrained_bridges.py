"""Constrained bridges: diffusion whose outcome lies in your domain, whatever the network says.

Noise dZ = sigma_t dW, of which the variance v_t is still to come at time t, is conditioned on
ending in a domain; that adds a force known in closed form, and a network adds a drift u:

    dZ = [ u(Z, t) + sigma_t^2 (m(Z, v_t) - Z) / v_t ] dt + sigma_t dW,        (1)

with m(z, v) the mean of N(z, v I) restricted to the domain. While u is bounded the force wins as
v_t -> 0, and Z_1 is a category, an integer or a bounded number. u is learned by least squares
on bridges that end at data x, whose own force is known: the target is sigma_t^2 (x - m) / v_t.

A network is any ``net(x, t, **cond)``: x of shape (n, *shape); t of shape (n,), dtype and
device of x, in [0, 1] and never rescaled, 0 at the start and 1 at the data; output as x.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import floating, has_shape, integer, one_of, within
from posterity._precision import rounding, wide, widened
from posterity.generative._network import (
    Cond,
    Net,
    Samples,
    call,
    check_cond,
    check_times,
    from_source,
    normal,
    starts,
    steps,
    uniform,
)
from posterity.generative.intervals import LEAST_VAR, _Domain
from posterity.generative.noise_schedules import _Schedule

__all__ = ["ConstrainedBridge"]

FORMS = ("tilt", "drift", "force")

Times = Float[Tensor, " n"]


class ConstrainedBridge:
    """A diffusion from a source into a domain, learned by regression on bridges to data.

    It holds no network: ``loss`` trains yours, ``sample`` draws with it. Neither touches its
    train or eval mode, and neither holds averaged weights.

    Parameters
    ----------
    domain : Interval, Grid, Points, Categorical or Product
        Where samples must end.
    shape : int or sequence of int
        Shape of one sample; d stands for (d,). The domain's columns are on its last axis.
    schedule : {"exp", "linear", "inverse-exp", "constant"}, default="exp"
        The variance a unit of time: ``a b exp(-a t)``, ``b (1 - t) + c``,
        ``a b (1 - exp(-a (1 - t))) + c`` or ``b``.
    a, b : float, default=3.0 and 1.0
        Rate and scale of the schedule; in (0, 50], beyond which nothing is left of the noise,
        and in [1e-8, 1e16].
    c : float, default=0.1
        Floor of "linear" and "inverse-exp", at least 0.
    source : callable, optional
        ``source(n, generator)`` draws n starts, shape ``(n, *shape)``. Default: all start at 0.
    parametrization : {"tilt", "drift", "force"}, default="tilt"
        What the network gives: l, by which the law of the outcome is tilted as by
        exp(<l, x>), for one-hot vectors the logits of the classes beside z / v; or u itself,
        as in the official code; or u / sigma_t, as in the paper.
    t_max : float, default=0.999
        Training draws times from [0, t_max]; in (0, 1).

    Raises
    ------
    ValueError
        If the domain does not fit the shape, or a setting is out of range.

    Notes
    -----
    Departures from the paper and the official code:

    1. The default form "tilt" is ours: u = sigma^2 (m(z + v l, v) - m(z, v)) / v, bounded with l. The
       sharp function of time near the end is then known and need not be learned. On the whole
       line it is sigma^2 l, the score form.
    2. The default sampler steps by the exact Brownian bridge to the predicted outcome, so that
       the last step is without noise; "euler" is the official one, which needs many more.
    3. The official code bounds intervals only below, at -0.95 for -1, and adds 1e-9 inside a
       logarithm; here both ends count, and the force holds far outside.

    References
    ----------
    .. [1] Liu, Wu, Ye, Liu. Learning Diffusion Bridges on Constrained Domains. ICLR 2023.
       The Omega-bridge and its loss.

    Examples
    --------
    A network that says nothing: outcomes are one-hot all the same, each class as often.

    >>> import torch
    >>> from posterity.generative import Categorical, ConstrainedBridge
    >>> bridge = ConstrainedBridge(Categorical(3), 3)
    >>> z = bridge.sample(lambda x, t: 0 * x, 3000, n_steps=20, generator=torch.Generator().manual_seed(0))
    >>> z.unique().tolist(), z.sum(1).unique().tolist()
    ([0.0, 1.0], [1.0])
    >>> bool((z.mean(0) - 1 / 3).abs().max() < 0.03)
    True
    """

    def __init__(
        self, domain: Any, shape: int | Sequence[int], *,
        schedule: Literal["exp", "linear", "inverse-exp", "inverse_exp", "constant"] = "exp",
        a: float = 3.0, b: float = 1.0, c: float = 0.1,
        source: Callable[[int, torch.Generator | None], Tensor] | None = None,
        parametrization: Literal["tilt", "drift", "force"] = "tilt", t_max: float = 0.999,
    ) -> None:  # fmt: skip
        if not isinstance(domain, _Domain):
            raise ValueError(f"domain must be one such as Interval or Categorical, got {domain!r}")
        sizes = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
        if not sizes:
            raise ValueError(f"shape must have at least one dimension, got {shape!r}")
        self.shape = tuple(integer("shape", size, 1) for size in sizes)
        domain._fits("shape", self.shape)  # pyright: ignore[reportPrivateUsage]
        self.domain = domain
        self._noise = _Schedule(schedule, a, b, c)
        self.schedule, self.a, self.b, self.c = self._noise.name, a, b, c
        if source is not None and not callable(source):
            raise ValueError(f"source must be a callable (n, generator), got {source!r}")
        self.source = source
        self.parametrization = one_of("parametrization", parametrization, FORMS)
        self.t_max = within("t_max", t_max, 0, 1, open_low=True, open_high=True)
        self._looked = False

    @widened
    def sigma2(self, t: Times) -> Times:
        """Return the variance that a unit of time adds.

        Parameters
        ----------
        t : Tensor
            Times in [0, 1], shape (n,).

        Returns
        -------
        Tensor
            Shape (n,).
        """
        return self._noise.clock(self._timely(t))[0]

    @widened
    def beta(self, t: Times) -> Times:
        """Return the variance added since time 0, the integral of ``sigma2``.

        Parameters
        ----------
        t : Tensor
            Times in [0, 1], shape (n,).

        Returns
        -------
        Tensor
            Shape (n,).
        """
        return self._noise.clock(self._timely(t))[1]

    def interpolate(
        self, x0: Samples, x1: Samples, t: Times, *, noise: Samples | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:  # fmt: skip
        """Return a draw, at time t, of the noise that starts at x0 and ends at x1.

        It is normal: with r = beta_t / beta_1, mean ``x0 + r (x1 - x0)`` and variance ``beta_t (1 - r)``.

        Parameters
        ----------
        x0, x1 : Tensor
            Start and data, shape ``(n, *shape)``.
        t : Tensor
            Times in [0, 1], shape (n,).
        noise : Tensor, optional
            Standard normal draws to use, shape ``(n, *shape)``.
        generator : torch.Generator, optional
            Source of randomness where ``noise`` is not given.

        Returns
        -------
        Tensor
            Shape ``(n, *shape)``.

        Raises
        ------
        ValueError
            If shapes, dtypes or times do not fit.
        """
        has_shape("x0", floating("x0", x0, "cast to float first"), self._check("x1", x1).shape, "x1")
        check_times(t, len(x1))
        if noise is None:
            noise = normal(x1.shape, wide(x1).dtype, x1.device, generator)
        has_shape("noise", floating("noise", noise), x1.shape, "x1")
        return self._between(wide(x0), wide(x1), wide(t).to(wide(x1)), noise).to(x1.dtype)

    def _between(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        _, gone, left = (self._spread(part) for part in self._noise.clock(t))
        share = gone / (gone + left)
        return x0 + share * (x1 - x0) + (share * left).sqrt() * noise.to(x1)

    def singular_force(self, z: Samples, t: Times) -> Samples:
        """Return the force that takes the noise into the domain, sigma_t^2 (m(z, v_t) - z) / v_t.

        Parameters
        ----------
        z : Tensor
            States, shape ``(n, *shape)``.
        t : Tensor
            Times in [0, 1), shape (n,): it is infinite at 1.

        Returns
        -------
        Tensor
            Shape ``(n, *shape)``.

        Raises
        ------
        ValueError
            If shapes, dtypes or times do not fit.
        """
        state, sigma2, left = self._state(z, t)
        return (sigma2 / left * (self.domain.endpoint_mean(state, left) - state)).to(z.dtype)

    def target(self, z: Samples, t: Times, x1: Samples) -> Samples:
        """Return what the learned drift is compared with: the force to x1 less that into the domain.

        Parameters
        ----------
        z : Tensor
            States, shape ``(n, *shape)``.
        t : Tensor
            Times in [0, 1), shape (n,).
        x1 : Tensor
            Data, shape ``(n, *shape)``.

        Returns
        -------
        Tensor
            sigma_t^2 (x1 - m(z, v_t)) / v_t, in units of the drift for every parametrization.

        Raises
        ------
        ValueError
            If shapes, dtypes or times do not fit.
        """
        state, sigma2, left = self._state(z, t)
        has_shape("x1", floating("x1", x1, "one-hot or cast to float"), z.shape, "z")
        return (sigma2 / left * (x1.to(state) - self.domain.endpoint_mean(state, left))).to(z.dtype)

    def drift(self, net: Net, z: Samples, t: Times, *, cond: Cond = None) -> Samples:
        """Return the learned part u of the drift.

        Parameters
        ----------
        net : callable
            The network.
        z : Tensor
            States, shape ``(n, *shape)``.
        t : Tensor
            Times in [0, 1), shape (n,).
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.

        Returns
        -------
        Tensor
            Shape ``(n, *shape)``.

        Raises
        ------
        ValueError
            If shapes, dtypes, times or ``cond`` do not fit.
        """
        state, sigma2, left = self._state(z, t)
        said = call(net, state, wide(t).to(state), cond, z.dtype)
        if self.parametrization == "drift":
            return said.to(z.dtype)
        if self.parametrization == "force":
            return (sigma2.sqrt() * said).to(z.dtype)
        tilted = self.domain.endpoint_mean(state + left * said, left)
        return (sigma2 / left * (tilted - self.domain.endpoint_mean(state, left))).to(z.dtype)

    def loss(
        self, net: Net, x1: Samples, x0: Samples | None = None, *, t: Times | None = None, cond: Cond = None,
        reduction: Literal["mean", "sum", "none"] = "mean", generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:  # fmt: skip
        """Return the squared error of the network's drift on bridges to data.

        Parameters
        ----------
        net : callable
            The network.
        x1 : Tensor
            Data in the domain, shape ``(n, *shape)``.
        x0 : Tensor, optional
            Starts paired with ``x1``. Default: drawn from the source.
        t : Tensor, optional
            Times in [0, 1), shape (n,). Default: uniform in [0, t_max].
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        reduction : {"mean", "sum", "none"}, default="mean"
            Over samples and coordinates; "none" keeps each sample's mean over coordinates.
        generator : torch.Generator, optional
            Source of randomness for starts, times and noise.

        Returns
        -------
        Tensor
            A scalar, or shape (n,) for "none". In units of the drift; for "force" of u / sigma_t.

        Raises
        ------
        ValueError
            If shapes, dtypes, times, ``cond`` or ``reduction`` do not fit, or ``x1`` is outside
            the domain by more than 1e-4 (on an accelerator only the first call looks).
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        dtype, n = self._check("x1", x1).dtype, len(x1)
        if not n:
            raise ValueError(f"x1 must have samples, got shape {tuple(x1.shape)}")
        self._inside(x1)
        if x0 is None:
            x0 = self._draw(n, dtype, x1.device, generator)
        has_shape("x0", floating("x0", x0, "one-hot or cast to float"), x1.shape, "x1")
        if t is None:
            t = self.t_max * uniform(n, x1, generator)
        self._before_the_end(t, n)
        x0, x1 = wide(x0), wide(x1)
        t = wide(t).to(x1)
        noise = normal(x1.shape, x1.dtype, x1.device, generator)
        z = self._between(x0.to(x1), x1, t, noise)
        sigma2, _, left = (self._spread(part) for part in self._noise.clock(t))
        outcome = self._outcome(net, z, t, sigma2, left, cond, dtype)
        # For u = sigma^2 (outcome - m) / v the m of drift and target cancels.
        scale = (sigma2.sqrt() if self.parametrization == "force" else sigma2) / left.clamp_min(LEAST_VAR)
        error = (scale * (outcome - x1)).square()
        each = error.flatten(1).mean(1) if reduction == "none" else error.sum()
        return (each / error.numel() if reduction == "mean" else each).to(dtype)

    def _outcome(
        self, net: Net, z: Tensor, t: Tensor, sigma2: Tensor, left: Tensor, cond: Cond, dtype: torch.dtype
    ) -> Tensor:
        """Return where the drift, were it to stay so, would end: m + u v / sigma^2."""
        said = call(net, z, t, cond, dtype)
        if self.parametrization == "tilt":
            return self.domain.endpoint_mean(z + left * said, left)
        per = sigma2 if self.parametrization == "drift" else sigma2.sqrt()
        return self.domain.endpoint_mean(z, left) + left / per * said

    @torch.no_grad()
    def sample(
        self, net: Net, n: int | None = None, *, x0: Samples | None = None, n_steps: int = 200,
        method: Literal["bridge", "euler"] = "bridge", project: bool = True, cond: Cond = None,
        return_path: bool = False, generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:  # fmt: skip
        """Draw samples, without gradients.

        Parameters
        ----------
        net : callable
            The network.
        n : int, optional
            How many, started from the source in the dtype and on the device of the network.
        x0 : Tensor, optional
            Starts to use in place of ``n``, shape ``(n, *shape)``.
        n_steps : int, default=200
            Steps of the even grid, at least 1.
        method : {"bridge", "euler"}, default="bridge"
            Exact steps of the Brownian bridge to the predicted outcome; or those of
            Euler and Maruyama, which end with noise.
        project : bool, default=True
            Whether the nearest member is returned, or the raw outcome.
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        return_path : bool, default=False
            Whether to return all states as well.
        generator : torch.Generator, optional
            Source of randomness for starts and noise.

        Returns
        -------
        Tensor or tuple of Tensor
            Samples, shape ``(n, *shape)``; with ``return_path`` also the states at 0, 1/n_steps, ..., 1
            before any projection, shape ``(n_steps + 1, n, *shape)``.

        Raises
        ------
        ValueError
            If neither or both of ``n`` and ``x0`` are given, or another argument is wrong.
        """
        integer("n_steps", n_steps, 1)
        one_of("method", method, ("bridge", "euler"))
        start = starts(net, n, x0, self._check, self._draw, generator)
        check_cond(cond, len(start))
        dtype, z = start.dtype, wide(start)
        sigma2, _, left = (
            part.to(z.dtype).tolist()
            for part in self._noise.clock(torch.linspace(0, 1, n_steps + 1, dtype=torch.float64))
        )
        path = [start]
        for k in steps(n_steps):
            t, s2, v, rest = z.new_full((len(z),), k / n_steps), sigma2[k], left[k], left[k + 1]
            outcome = self._outcome(net, z, t, self._spread(0 * t + s2), self._spread(0 * t + v), cond, dtype)
            last = k == n_steps - 1
            if method == "euler":
                share, var = s2 / v / n_steps, s2 / n_steps
            else:
                share, var = (v - rest) / v, (v - rest) * rest / v
            if method == "bridge" and last:
                z = outcome
            else:
                z = z + share * (outcome - z) + var**0.5 * normal(z.shape, z.dtype, z.device, generator)
            if return_path:
                path.append(z.to(dtype))
        made = (self.domain.project(z) if project else z).to(dtype)
        return (made, torch.stack(path)) if return_path else made

    def _spread(self, part: Tensor) -> Tensor:
        """Return numbers, one a sample, of shape (n, 1, ..., 1)."""
        return part.reshape(-1, *[1] * len(self.shape))

    def _check(self, name: str, x: Any) -> Tensor:
        return has_shape(name, floating(name, x, "one-hot or cast to float"), (None, *self.shape), "shape")

    def _timely(self, t: Any) -> Tensor:
        check_times(t, len(t) if isinstance(t, Tensor) and t.ndim else 1)
        return t

    def _before_the_end(self, t: Any, n: int) -> None:
        check_times(t, n)
        if t.device.type == "cpu" and bool((t >= 1).any()):
            raise ValueError(f"t must be in [0, 1), got {float(t.max()):g}: the force is infinite at the end")

    def _state(self, z: Any, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return states in float32 at least, and sigma^2 and v_t of shape (n, 1, ..., 1)."""
        self._before_the_end(t, len(self._check("z", z)))
        state = wide(z)
        sigma2, _, left = (self._spread(part) for part in self._noise.clock(wide(t).to(state)))
        return state, sigma2, left.clamp_min(LEAST_VAR)

    def _inside(self, x1: Tensor) -> None:
        """Refuse data outside the domain; an accelerator is asked to wait for this once."""
        if self._looked and x1.device.type != "cpu":
            return
        self._looked = True
        away = (x1 - self.domain.project(x1)).abs()
        wrong = ~(away <= rounding(x1.dtype, 1e-4) * x1.abs().clamp_min(1))  # NaN is outside as well
        if bool(wrong.any()):
            row, *place = wrong.nonzero()[0].tolist()
            column = place[0] if len(place) == 1 else tuple(place)
            value = float(x1[(row, *place)])
            raise ValueError(
                f"x1 must be in the domain {self.domain!r}, got {value:g} in column {column} of row {row}"
            )

    def _draw(
        self, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        if self.source is None:
            return torch.zeros((n, *self.shape), dtype=dtype, device=device)
        return from_source(self.source, (n, *self.shape), dtype, device, generator)
