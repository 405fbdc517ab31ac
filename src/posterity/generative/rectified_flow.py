"""Rectified flow: learn the straight lines from noise to data, then straighten once more.

Pairs (X0, X1) are joined by lines X_t = t X1 + (1 - t) X0, and a network learns their
mean slope by least squares,

    min_v  E || v(X_t, t) - (X1 - X0) ||^2,   t ~ U[0, 1],                    (1)

whose solution is v(x, t) = E[X1 - X0 | X_t = x]. The ODE dZ = v(Z, t) dt started at X0
has the law of X_t at every t, so it turns source into data; and since its paths cannot
cross, the pairs (Z_0, Z_1) that it makes cost no more to transport than (X0, X1), for
every convex cost. Training again on those pairs (reflow) straightens the paths: where
lines do not cross, v is constant along them and one Euler step Z_0 + v(Z_0, 0) is exact.

A network is any ``net(x, t, **cond)``: x of shape (n, *shape); t of shape (n,), dtype and
device of x, in [0, 1] and never rescaled, 0 at the source and 1 at the data; output as x.
Whatever its dtype, lines, errors and the steps of the ODE are computed in float32 at least.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import finite, floating, has_shape, integer, one_of
from posterity._precision import wide
from posterity.generative._network import (
    Cond,
    Net,
    Samples,
    call,
    check_cond,
    check_times,
    from_source,
    home,
    normal,
    starts,
    uniform,
)
from posterity.generative.flow_ode import Method, Trajectory, _solve

__all__ = ["RectifiedFlow"]

Scalar = Float[Tensor, ""]


class RectifiedFlow:
    """An ODE from a source to data, learned by regression on straight lines.

    It holds no network: ``loss`` trains yours, ``sample`` draws with it, ``couple`` makes
    the pairs on which to train the next one. Neither touches its train or eval mode, and
    neither holds averaged weights; pass the averaged network to ``sample`` if you keep one.

    Parameters
    ----------
    shape : int or sequence of int
        Shape of one sample; d stands for (d,).
    source : callable, optional
        ``source(n, generator)`` draws n starts, shape ``(n, *shape)``. Default: standard normal.
    path : {"linear", "vp", "sub-vp"}, default="linear"
        How pairs are joined. The two curved paths are those of diffusion models [1]_, here
        to compare with; they start at 0.0066 of the data rather than at the source itself.

    Raises
    ------
    ValueError
        If ``shape`` is not of positive integers, ``source`` is not callable, or ``path`` is unknown.

    Notes
    -----
    Departures from the official code:

    1. Time runs over [0, 1]. Official image code starts it at 0.001 and hands the network
       999 t; a network that wants either does it inside.
    2. The optional stochastic sampler is left out: its drift does not keep the marginals.
    3. On the "vp" path, whose velocity is infinite at 1, ``loss`` draws t from [0, 0.999].
    4. Distillation joins its pairs by lines on every path: Euler steps follow lines.

    References
    ----------
    .. [1] Liu, Gong, Liu. Flow Straight and Fast: Learning to Generate and Transfer Data
       with Rectified Flow. ICLR 2023. Equation 1 and Algorithm 1.

    Examples
    --------
    Noise to the normal law with mean 3 and deviation 1/2, whose slope is known:

    >>> import torch
    >>> from posterity.generative import RectifiedFlow
    >>> def net(x, t):
    ...     t = t[:, None]
    ...     return 3 + (t / 4 - (1 - t)) / ((1 - t) ** 2 + t**2 / 4) * (x - 3 * t)
    >>> flow, x0 = RectifiedFlow(1), torch.tensor([[-2.0], [0.0], [2.0]])
    >>> flow.sample(net, x0=x0, method="rk45").squeeze()
    tensor([2.0000, 3.0000, 4.0000])
    >>> flow.sample(net, x0=x0, n_steps=1).squeeze()  # one step goes to the mean
    tensor([3., 3., 3.])
    """

    def __init__(
        self, shape: int | Sequence[int], *,
        source: Callable[[int, torch.Generator | None], Tensor] | None = None,
        path: Literal["linear", "vp", "sub-vp"] = "linear",
    ) -> None:  # fmt: skip
        sizes = shape if isinstance(shape, Sequence) else (shape,)
        if not sizes:
            raise ValueError(f"shape must have at least one dimension, got {shape!r}")
        self.shape = tuple(integer("shape", size, 1) for size in sizes)
        if source is not None and not callable(source):
            raise ValueError(f"source must be a callable (n, generator), got {source!r}")
        self.source = source
        self.path = one_of("path", path, ("linear", "vp", "sub-vp"))

    def interpolate(self, x0: Samples, x1: Samples, t: Float[Tensor, " n"]) -> tuple[Samples, Samples]:
        """Return the point at time t between two ends, and its velocity.

        Parameters
        ----------
        x0, x1 : Tensor
            Source and data, shape ``(n, *shape)``.
        t : Tensor
            Times in [0, 1], shape (n,). On the "vp" path the velocity is infinite at 1.

        Returns
        -------
        tuple of Tensor
            x_t and dx_t / dt, each of shape ``(n, *shape)``.
        """
        self._check_pair(x1, x0)
        check_times(t, len(x1))
        x, slope = self._between(x0, x1, t)
        return x.to(x1.dtype), slope.to(x1.dtype)

    def _between(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0, x1 = wide(x0), wide(x1)
        t = t.to(x1.dtype).reshape(-1, *[1] * len(self.shape))
        if self.path == "linear":
            slope = x1 - x0
            return torch.addcmul(x0, t, slope), slope
        # a = exp(-19.9 (1 - t)^2 / 4 - 0.1 (1 - t) / 2), the schedule of Score SDE
        log_a = -(1 - t) * (19.9 * (1 - t) / 4 + 0.05)
        a = log_a.exp()
        da = a * (19.9 * (1 - t) / 2 + 0.05)
        if self.path == "vp":
            b = (-torch.expm1(2 * log_a)).sqrt()  # sqrt(1 - a^2), without cancellation at t = 1
            db = -a * da / b
        else:
            b, db = -torch.expm1(2 * log_a), -2 * a * da
        return torch.addcmul(a * x1, b, x0), torch.addcmul(da * x1, db, x0)

    def loss(
        self, net: Net, x1: Samples, x0: Samples | None = None, *, t: Float[Tensor, " n"] | None = None,
        cond: Cond = None, reduction: Literal["mean", "sum", "none"] = "mean",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:  # fmt: skip
        """Return the squared error of the network's velocity, equation 1.

        Parameters
        ----------
        net : callable
            The network.
        x1 : Tensor
            Data, shape ``(n, *shape)``.
        x0 : Tensor, optional
            Starts paired with ``x1`` (another data set, or pairs of ``couple``). Default:
            drawn from the source, independent of ``x1``.
        t : Tensor, optional
            Times in [0, 1], shape (n,). Default: uniform (on the "vp" path up to 0.999).
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        reduction : {"mean", "sum", "none"}, default="mean"
            Over samples and coordinates; "none" keeps each sample's mean over coordinates.
        generator : torch.Generator, optional
            Source of randomness for starts and times.

        Returns
        -------
        Tensor
            A scalar, or shape (n,) for "none".

        Raises
        ------
        ValueError
            If there are no samples, or shapes, dtypes, times, ``cond`` or ``reduction`` do not fit.
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        self._check_some(x1)
        if x0 is None:
            x0 = self._draw(len(x1), x1.dtype, x1.device, generator)
        self._check_pair(x1, x0)
        if t is not None:
            check_times(t, len(x1))
        else:
            t = uniform(len(x1), x1, generator)
            t = t * (1 - 1e-3) if self.path == "vp" else t  # its velocity is infinite at 1
        x, slope = self._between(x0, x1, t)
        velocity = call(net, x, t, cond, x1.dtype)
        if reduction == "none":
            return (velocity - slope).square().flatten(1).mean(1).to(x1.dtype)
        return F.mse_loss(velocity, slope, reduction=reduction).to(x1.dtype)

    def integrate(
        self, net: Net, x: Samples, *, t0: float = 0.0, t1: float = 1.0, method: Method = "rk45",
        n_steps: int = 100, rtol: float = 1e-5, atol: float = 1e-5, cond: Cond = None,
        return_path: bool = False,
    ) -> Trajectory:  # fmt: skip
        """Follow the ODE from time t0 to t1.

        Parameters
        ----------
        net : callable
            The network.
        x : Tensor
            States at ``t0``, shape ``(n, *shape)``.
        t0, t1 : float, default=0.0 and 1.0
            From when to when, in [0, 1]; from 1 to 0 encodes data.
        method : {"euler", "heun", "rk45"}, default="rk45"
            Euler calls the network once a step and Heun twice, on an even grid; "rk45"
            chooses its steps for the batch as one system, by torchdiffeq where that is
            installed, else by scipy. Gradients follow the ambient mode, except that none
            pass through scipy.
        n_steps : int, default=100
            Steps of the even grid, at least 1; "rk45" ignores it.
        rtol, atol : float, default=1e-5
            Tolerances of "rk45", positive; not below the rounding of a narrow ``x``.
        cond : mapping of str to Tensor, optional
            Keyword arguments of the network, each with first dimension n.
        return_path : bool, default=False
            Whether to keep the state at every step.

        Returns
        -------
        Trajectory
            End, times (in float32 at least), path and number of network calls.

        Raises
        ------
        ValueError
            If an argument is out of range or does not fit ``shape``.
        """
        self._check("x", x)
        n_evals = 0

        def field(time: Tensor, state: Tensor) -> Tensor:
            nonlocal n_evals
            n_evals += 1
            return call(net, state, time.repeat(len(x)), cond, x.dtype)

        end, times, path = _solve(
            field, x, t0, t1, method=method, n_steps=n_steps, rtol=rtol, atol=atol, keep=return_path
        )
        return Trajectory(end.to(x.dtype), times, None if path is None else path.to(x.dtype), n_evals)

    @torch.no_grad()
    def sample(
        self, net: Net, n: int | None = None, *, x0: Samples | None = None, method: Method = "euler",
        n_steps: int = 100, rtol: float = 1e-5, atol: float = 1e-5, cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:  # fmt: skip
        """Draw samples, without gradients.

        Parameters
        ----------
        net : callable
            The network.
        n : int, optional
            How many, started from the source in the dtype and on the device of the network.
        x0 : Tensor, optional
            Starts to use in place of ``n``, shape ``(n, *shape)``.
        method : {"euler", "heun", "rk45"}, default="euler"
            As in ``integrate``.
        n_steps : int, default=100
            Steps of the even grid, at least 1; 1 is ``x0 + net(x0, 0)``.
        rtol, atol, cond
            As in ``integrate``.
        generator : torch.Generator, optional
            Source of randomness for the starts.

        Returns
        -------
        Tensor
            Samples, shape ``(n, *shape)``.

        Raises
        ------
        ValueError
            If neither or both of ``n`` and ``x0`` are given, or another argument is wrong.
        """
        x0 = self._starts(net, n, x0, generator)
        return self.integrate(net, x0, method=method, n_steps=n_steps, rtol=rtol, atol=atol, cond=cond).x

    @torch.inference_mode(False)  # the pairs are there to be trained on
    @torch.no_grad()
    def couple(
        self, net: Net, n: int | None = None, *, x0: Samples | None = None, batch_size: int = 1024,
        method: Method = "rk45", n_steps: int = 100, rtol: float = 1e-5, atol: float = 1e-5,
        cond: Cond = None, generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:  # fmt: skip
        """Make the pairs that reflow trains on: starts, and where the ODE takes each.

        Train on them as they come, ``flow.loss(net, z1, z0)``: shuffling one against the
        other destroys the method.

        Parameters
        ----------
        net : callable
            The network.
        n : int, optional
            How many pairs, started from the source.
        x0 : Tensor, optional
            Starts to use in place of ``n``, shape ``(n, *shape)``. They may lie on another
            device than the network, batches then travel and the pairs lie where ``x0`` does.
        batch_size : int, default=1024
            Samples that are integrated at once, at least 1.
        method, n_steps, rtol, atol, cond
            As in ``integrate``.
        generator : torch.Generator, optional
            Source of randomness for the starts.

        Returns
        -------
        tuple of Tensor
            z0 and z1, each of shape ``(n, *shape)``, row by row a pair.

        Raises
        ------
        ValueError
            If ``x0`` is not finite, or another argument is wrong.
        """
        integer("batch_size", batch_size, 1)
        z0 = finite("x0", self._starts(net, n, x0, generator))
        z0 = z0.clone() if z0.is_inference() else z0
        check_cond(cond, len(z0))
        _, device = home(net, z0)
        ends = []
        for start in range(0, len(z0), batch_size):
            rows = slice(start, start + batch_size)
            part = {name: value[rows].to(device) for name, value in (cond or {}).items()}
            end = self.integrate(
                net, z0[rows].to(device), method=method, n_steps=n_steps, rtol=rtol, atol=atol, cond=part
            )
            ends.append(end.x.to(z0.device))
        return z0, torch.cat(ends)

    def distill_loss(
        self, net: Net, x1: Samples, x0: Samples, *, n_steps: int = 1,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None, cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Scalar:  # fmt: skip
        """Return the loss that fits a network to pairs at the times of few Euler steps only.

        Parameters
        ----------
        net : callable
            The network.
        x1, x0 : Tensor
            Pairs made by ``couple``, shape ``(n, *shape)``, joined by lines on every ``path``.
        n_steps : int, default=1
            Euler steps k that sampling will take, at least 1: times are drawn from
            0, 1/k, ..., (k - 1)/k.
        distance : callable, optional
            ``distance(pred, target)`` of shape (n,), between ``x0 + net(x0, 0)`` and
            ``x1``, for one step only. Default: squared error, the mean over coordinates.
        cond, generator
            As in ``loss``.

        Returns
        -------
        Tensor
            A scalar; for one step and the default distance equal to ``loss`` at t = 0.

        Raises
        ------
        ValueError
            If there are no samples, a distance is given for several steps, or another argument is wrong.
        """
        if distance is not None and n_steps != 1:
            raise ValueError(f"n_steps must be 1 where distance is given, got {n_steps}")
        integer("n_steps", n_steps, 1)
        self._check_some(x1)
        self._check_pair(x1, x0)
        dtype, x0, x1 = x1.dtype, wide(x0), wide(x1)
        t = torch.floor(uniform(len(x1), x1, generator) * n_steps) / n_steps
        slope = x1 - x0
        x = torch.addcmul(x0, t.reshape(-1, *[1] * len(self.shape)), slope)
        velocity = call(net, x, t, cond, dtype)
        if distance is None:
            return F.mse_loss(velocity, slope).to(dtype)
        return has_shape("distance", distance(x0 + velocity, x1), (len(x1),), "x1").mean().to(dtype)

    def log_prob(
        self, net: Net, x1: Samples, *, method: Method = "rk45", n_steps: int = 100, rtol: float = 1e-5,
        atol: float = 1e-5, divergence: Literal["exact", "hutchinson"] = "exact",
        source_log_prob: Callable[[Tensor], Tensor] | None = None, cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " n"]:  # fmt: skip
        """Return the log density that the ODE gives to data, in nats.

        log p(x1) = log p_source(z0) - int_0^1 div v(z_t, t) dt, along the ODE back from x1.

        Parameters
        ----------
        net : callable
            The network; samples must not act on each other (no batch norm in train mode).
        x1 : Tensor
            Data, shape ``(n, *shape)``.
        method, n_steps, rtol, atol, cond
            As in ``integrate``.
        divergence : {"exact", "hutchinson"}, default="exact"
            The trace of the Jacobian by as many backward passes as a sample has coordinates,
            or an unbiased estimate by one, along random signs held over the whole path.
        source_log_prob : callable, optional
            Log density of the source, ``(n, *shape)`` to (n,); needed with a ``source`` of
            your own. Default: standard normal.
        generator : torch.Generator, optional
            Source of the random signs.

        Returns
        -------
        Tensor
            Log densities, shape (n,).

        Raises
        ------
        ValueError
            If ``x1`` is not finite, ``source_log_prob`` is missing, or another argument is
            wrong.
        """
        one_of("divergence", divergence, ("exact", "hutchinson"))
        finite("x1", self._check("x1", x1))
        if self.source is not None and source_log_prob is None:
            raise ValueError("source_log_prob must be given with a source of your own, got None")
        n, d, dtype, x1 = len(x1), math.prod(self.shape), x1.dtype, wide(x1)
        if divergence == "exact":
            probes = torch.eye(d, dtype=x1.dtype, device=x1.device)
            probes = probes.reshape(d, 1, *self.shape).expand(d, *x1.shape)
        else:
            signs = torch.where(uniform(x1.shape, x1, generator) < 0.5, -1.0, 1.0)
            probes = signs.to(x1.dtype)[None]

        def field(time: Tensor, state: Tensor) -> Tensor:
            t, z = time.repeat(n), state[:, :d].reshape(x1.shape)
            velocity, pull, *_ = torch.func.vjp(lambda z: call(net, z, t, cond, dtype), z)

            def along(probe):
                return (probe * pull(probe)[0]).flatten(1).sum(1)

            # 2^24 numbers at once: all the rows of a small Jacobian, few of an image's
            rows = torch.func.vmap(along, chunk_size=max(1, 2**24 // x1.numel()))(probes)
            return torch.cat([velocity.flatten(1), rows.sum(0)[:, None]], 1)

        state = torch.cat([x1.flatten(1), x1.new_zeros(n, 1)], 1)
        end, _, _ = _solve(
            field, state, 1.0, 0.0, method=method, n_steps=n_steps, rtol=rtol, atol=atol, keep=False
        )
        z0, gain = end[:, :d].reshape(x1.shape), end[:, d]
        if source_log_prob is not None:
            return (has_shape("source_log_prob", source_log_prob(z0), (n,), "x1") + gain).to(dtype)
        return (gain - 0.5 * (z0.square().flatten(1).sum(1) + d * math.log(2 * math.pi))).to(dtype)

    def _check(self, name: str, x: Any) -> Tensor:
        return has_shape(name, floating(name, x, "scale to floats first"), (None, *self.shape), "shape")

    def _check_some(self, x1: Any) -> None:
        if not len(self._check("x1", x1)):
            raise ValueError(f"x1 must have samples, got shape {tuple(x1.shape)}")

    def _check_pair(self, x1: Any, x0: Any) -> None:
        has_shape("x0", floating("x0", x0, "scale to floats first"), self._check("x1", x1).shape, "x1")

    def _draw(
        self, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        if self.source is not None:
            return from_source(self.source, (n, *self.shape), dtype, device, generator)
        return normal((n, *self.shape), dtype, device, generator)

    def _starts(
        self, net: Net, n: int | None, x0: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        return starts(net, n, x0, self._check, self._draw, generator)
