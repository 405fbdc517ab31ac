"""Diffusion of fields: one model of samples that are functions, asked at any points of any space.

A sample is a function, known as pairs of a coordinate and a value. Only values are diffused,

    y_k = sqrt(abar_k) y_0 + sqrt(1 - abar_k) eps,   k = 0 (data) ... T (noise),          (1)

and a network is asked for the noise at query points, given the noisy values at some context
points of the same field. Both are drawn anew at each step of training, since a field has more
points than any step can hold; to sample, the context is a subset of the points asked for,

    min_net  E || eps_Q - net(y_Q, t; coordinates of Q, context C_t) ||^2,   t = 1 - k/T.  (2)

Without context every point is denoised alone and what comes out is uncorrelated; with it, the
points agree on one function. Nothing in this knows a grid: other resolutions, irregular points
and other spaces need no change.

A network is any ``net(x, t, *, coords, context, context_coords, **cond)``: x of shape (n, q, c);
t of shape (n,), in [0, 1), 0 at noise; coords (n, q, d), context (n, k, c) and context_coords
(n, k, d), all in the dtype of x; it returns the noise, as x.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import finite, floating, has_shape, integer, one_of, within
from posterity._precision import wide
from posterity.generative._network import Cond, Net, check_cond, check_times, normal, starts, steps, uniform
from posterity.generative.field_net import FieldNet

__all__ = ["FieldDiffusion"]


class FieldDiffusion:
    """Diffusion of functions, learned from and asked at points.

    It holds no network: ``loss`` trains yours, ``sample`` draws with it; neither touches its mode.

    Parameters
    ----------
    n_steps : int, default=1000
        Steps T of the diffusion, at least 1.
    schedule : {"linear", "cosine"}, default="linear"
        Variances beta of the steps: from 1e-4 to 0.02 for T = 1000 and as much in all for
        other T, or by ``abar = cos^2((k/T + 0.008) / 1.008 pi/2)``; each at most 0.999.
    clip : tuple of float, optional
        Lowest and highest value of data, which predictions of it are clipped to in sampling.
        Give it where the first step of sampling multiplies the network's
        error: "cosine", by 31.

    Raises
    ------
    ValueError
        If ``n_steps`` is less than 1, ``schedule`` unknown, or ``clip`` no interval.

    Notes
    -----
    1. No official code was found: schedules and variances are those usual in diffusion models.
    2. Where data are clipped, "ddim" goes on with the noise that belongs to the clipped data.

    References
    ----------
    .. [1] Zhuang, Abnar, Gu, Schwing, Susskind, Bautista. Diffusion Probabilistic Fields.
       ICLR 2023. Section 4 and Algorithms 1 and 2.
    .. [2] Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. NeurIPS 2020. Equation 7.
    .. [3] Song, Meng, Ermon. Denoising Diffusion Implicit Models. ICLR 2021. Equation 12.

    Examples
    --------
    Constant functions of a standard normal height, whose best guess of the noise is known:

    >>> import torch
    >>> from posterity.generative import FieldDiffusion
    >>> process = FieldDiffusion(n_steps=50)
    >>> def net(x, t, *, coords, context, context_coords):
    ...     abar, k = process.alpha_bar(t)[:, None, None], context.shape[1]
    ...     height = abar.sqrt() * context.sum(1, keepdim=True) / (k * abar + 1 - abar)
    ...     return (x - abar.sqrt() * height) / (1 - abar).sqrt()
    >>> coords = torch.linspace(-1, 1, 6)[None, :, None]
    >>> fields = process.sample(net, coords, 1, n=4)
    >>> fields.shape, bool(fields.std(1).max() < 1e-3)
    (torch.Size([4, 6, 1]), True)
    """

    def __init__(
        self, *, n_steps: int = 1000, schedule: Literal["linear", "cosine"] = "linear",
        clip: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        self.n_steps = integer("n_steps", n_steps, 1)
        self.schedule = one_of("schedule", schedule, ("linear", "cosine"))
        self.clip = None if clip is None else _interval(clip)
        if schedule == "linear":
            betas = torch.linspace(1e-4, 0.02, n_steps, dtype=torch.float64) * (1000 / n_steps)
        else:
            k = torch.arange(n_steps + 1, dtype=torch.float64) / n_steps
            kept = ((k + 0.008) / 1.008 * (math.pi / 2)).cos().square()
            betas = 1 - kept[1:] / kept[:-1]
        log_kept = torch.log1p(-betas.clamp_max(0.999)).cumsum(0)
        self._log_abar = torch.cat([log_kept.new_zeros(1), log_kept])  # k = 0 ... T

    def alpha_bar(self, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the share of a value's variance that is data at time t, equation 1.

        Parameters
        ----------
        t : Tensor
            Times in [0, 1], shape (n,): 1 - k/T, and between two of them by the line of the logarithms.

        Returns
        -------
        Tensor
            Shares, shape (n,); 1 at time 1.

        Raises
        ------
        ValueError
            If ``t`` is no vector of floats in [0, 1].
        """
        has_shape("t", floating("t", t), (None,))
        check_times(t if len(t) else t.new_zeros(1), max(len(t), 1))
        return self._log_share((1 - wide(t)) * self.n_steps).exp().to(t.dtype)

    def _log_share(self, k: Tensor) -> Tensor:
        """Return log abar at steps that need not be whole, in the dtype of ``k``."""
        table = self._log_abar.to(k)
        below = k.long().clamp(0, self.n_steps - 1)
        return torch.lerp(table[below], table[below + 1], k - below)

    def loss(
        self, net: Net, values: Float[Tensor, "n m c"], coords: Float[Tensor, "#n m d"], *,
        n_context: int | float = 0.5, n_query: int | float = 1.0, t: Float[Tensor, " n"] | None = None,
        cond: Cond = None, reduction: Literal["mean", "sum", "none"] = "mean",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:  # fmt: skip
        """Return the squared error of the network's noise, equation 2.

        Parameters
        ----------
        net : callable
            The network.
        values : Tensor
            What is known of n fields at m points each, shape (n, m, c).
        coords : Tensor
            Where, shape (n, m, d), or (1, m, d) where all fields are known at the same points:
            these then share the random subsets, which is faster.
        n_context, n_query : int or float, default=0.5 and 1.0
            How many of the points are drawn as context and as queries: a number from 1 to m,
            or a share in (0, 1] of them. A point in both has one noisy value.
        t : Tensor, optional
            Times in [0, 1], shape (n,). Default: 1 - k/T for k uniform in 1 ... T.
        cond : mapping of str to Tensor, optional
            Passed on to the network as keyword arguments, each with first dimension n.
        reduction : {"mean", "sum", "none"}, default="mean"
            Over fields, queries and channels; "none" keeps each field's mean.
        generator : torch.Generator, optional
            Source of randomness for times, noise and subsets.

        Returns
        -------
        Tensor
            A scalar, or shape (n,) for "none".

        Raises
        ------
        ValueError
            If shapes, dtypes, numbers of points, times, ``cond``, ``reduction`` or the
            network's output do not fit, or values or coordinates on the CPU are not finite.
        """
        one_of("reduction", reduction, ("mean", "sum", "none"))
        has_shape("values", floating("values", values, "scale to floats first"), (None, None, None))
        if 0 in values.shape:
            raise ValueError(f"values must have fields, points and channels, got shape {tuple(values.shape)}")
        # Values are read on the CPU only, where that is free: an accelerator would have to wait.
        if values.device.type == "cpu":
            finite("values", values)
        n, m, _ = values.shape
        coords = _places(coords, n, m, values)
        k_context, k_query = _count("n_context", n_context, m), _count("n_query", n_query, m)
        _check_names(cond, n)
        clean = wide(values)
        if t is None:
            k = (uniform(n, clean, generator) * self.n_steps).floor() + 1
            t = 1 - k / self.n_steps
        else:
            check_times(t, n)
            k = (1 - t.to(clean)) * self.n_steps
        log_share = self._log_share(k)[:, None, None]
        noise = normal(values.shape, clean.dtype, clean.device, generator)
        noisy = torch.addcmul((0.5 * log_share).exp() * clean, (-torch.expm1(log_share)).sqrt(), noise)
        chosen, asked = (_subset(len(coords), m, count, clean, generator) for count in (k_context, k_query))
        said = _ask(
            net, _take(noisy, asked), t, _take(coords, asked), _take(noisy, chosen), _take(coords, chosen), cond,
            values.dtype,
        )  # fmt: skip
        error = (said - _take(noise, asked)).square()
        if reduction == "none":
            return error.mean((1, 2)).to(values.dtype)
        return (error.mean() if reduction == "mean" else error.sum()).to(values.dtype)

    @torch.no_grad()
    def sample(
        self, net: Net, coords: Float[Tensor, "rows m d"], n_values: int, n: int | None = None, *,
        n_context: int | float = 0.5, context_index: Int[Tensor, " k"] | None = None,
        n_steps: int | None = None, sampler: Literal["ddpm", "ddim"] = "ddpm",
        x0: Float[Tensor, "n m c"] | None = None, chunk_size: int | None = None, cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n m c"]:  # fmt: skip
        """Draw fields and return their values at given points, without gradients.

        Parameters
        ----------
        net : callable
            The network.
        coords : Tensor
            Where fields are asked for, shape (1, m, d), or (n, m, d) for points of each one's own.
        n_values : int
            Numbers c in a value, at least 1.
        n : int, optional
            How many fields, in the dtype and on the device of the network.
        n_context : int or float, default=0.5
            How many of the points, drawn once, are context in all steps: a number from 1 to m,
            or a share in (0, 1]. Best as many as in training: a network that only knows 32
            points takes what 128 say for less sure than it is.
        context_index : Tensor, optional
            Indices of the context in place of ``n_context``, shape (k,), each once.
        n_steps : int, optional
            Steps of "ddim", from 1 to T, at equal distances. Default: T, which "ddpm" needs.
        sampler : {"ddpm", "ddim"}, default="ddpm"
            Steps that draw from the posterior, equation 7 of [2]_, or follow its means without
            noise, equation 12 of [3]_ at eta = 0.
        x0 : Tensor, optional
            Noise to start from in place of ``n``, shape (n, m, c).
        chunk_size : int, optional
            Points of a field that are asked for at once, at least 1: less memory, the same
            values. A ``FieldNet`` reads the context once for all of them. Default: all.
        cond : mapping of str to Tensor, optional
            Keyword arguments of the network, each with first dimension n.
        generator : torch.Generator, optional
            Source of randomness.

        Returns
        -------
        Tensor
            Values, shape (n, m, n_values).

        Raises
        ------
        ValueError
            If neither or both of ``n`` and ``x0`` are given, or another argument is wrong.
        """
        one_of("sampler", sampler, ("ddpm", "ddim"))
        has_shape("coords", finite("coords", floating("coords", coords)), (None, None, None))
        if 0 in coords.shape[1:]:
            raise ValueError(f"coords must have points and numbers, got shape {tuple(coords.shape)}")
        m, n_values = coords.shape[1], integer("n_values", n_values, 1)
        k_context = _count("n_context", n_context, m)
        if context_index is not None:
            _check_index(context_index, m)
        if chunk_size is not None:
            integer("chunk_size", chunk_size, 1)
        path = self._path(sampler, n_steps)

        def check(name: str, x: Any) -> Tensor:
            return has_shape(name, floating(name, x), (None, m, n_values), "coords and n_values")

        def draw(
            n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
        ) -> Tensor:
            return normal((n, m, n_values), dtype, device, generator)

        x0 = starts(net, n, x0, check, draw, generator)
        coords = _places(coords, len(x0), m, x0)
        _check_names(cond, len(x0))
        if context_index is not None:
            chosen = context_index.to(coords.device)[None]
        else:
            chosen = _subset(1, m, k_context, wide(x0), generator)
        y, around = wide(x0), _take(coords, chosen)
        for step in steps(len(path)):
            k, after = path[step]
            t = torch.full((len(y),), 1 - k / self.n_steps, dtype=y.dtype, device=y.device)
            noise = _ask(net, y, t, coords, _take(y, chosen), around, cond, x0.dtype, chunk_size)
            y = self._step(y, noise, k, after, sampler, generator)
        return y.to(x0.dtype)

    def _path(self, sampler: str, n_steps: int | None) -> list[tuple[int, int]]:
        """Return the steps of a sampler: from where to where."""
        total = self.n_steps
        n_steps = total if n_steps is None else integer("n_steps", n_steps, 1)
        if n_steps > total or (sampler == "ddpm" and n_steps != total):
            rule = f"{total}, that of the process, for" if sampler == "ddpm" else f"at most {total} for"
            raise ValueError(f"n_steps must be {rule} sampler {sampler!r}, got {n_steps}")
        stops = [round(total * (1 - step / n_steps)) for step in range(n_steps + 1)]
        return list(zip(stops[:-1], stops[1:], strict=True))

    def _step(
        self, y: Tensor, noise: Tensor, k: int, after: int, sampler: str, generator: torch.Generator | None
    ) -> Tensor:
        """Return the state at step ``after`` from that at step k."""
        log_share, log_after = (float(self._log_abar[step]) for step in (k, after))
        rest, rest_after = -math.expm1(log_share), -math.expm1(log_after)  # 1 - abar, without cancellation
        clean = (y - math.sqrt(rest) * noise) / math.exp(0.5 * log_share)
        if self.clip is not None:
            clean = clean.clamp(*self.clip)
            noise = (y - math.exp(0.5 * log_share) * clean) / math.sqrt(rest)
        if sampler == "ddim":
            return math.exp(0.5 * log_after) * clean + math.sqrt(rest_after) * noise
        beta = -math.expm1(log_share - log_after)
        of_data = math.exp(0.5 * log_after) * beta / rest
        of_state = math.exp(0.5 * (log_share - log_after)) * rest_after / rest
        y = of_data * clean + of_state * y
        if after == 0:
            return y
        return y + math.sqrt(rest_after / rest * beta) * normal(y.shape, y.dtype, y.device, generator)


def _ask(
    net: Net, x: Tensor, t: Tensor, coords: Tensor, context: Tensor, context_coords: Tensor, cond: Cond,
    dtype: torch.dtype, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Return what a network of this dtype says of the queries, in the dtype of x."""
    (n, m, c), d = x.shape, coords.shape[2]
    if isinstance(net, FieldNet) and (net.coord_dim, net.value_dim) != (d, c):
        raise ValueError(f"net must be for coords of {d} and values of {c} numbers, got one for {net.coord_dim} and {net.value_dim}")  # fmt: skip
    narrow, t, context = x.to(dtype), t.to(dtype), context.to(dtype)
    coords, around = coords.expand(n, -1, -1), context_coords.expand(n, -1, -1)
    parts = [slice(0, m)] if chunk is None else [slice(start, start + chunk) for start in range(0, m, chunk)]
    given, said = {"context": context, "context_coords": around, **(cond or {})}, []
    plain = type(net) is FieldNet and not (net._forward_hooks or net._forward_pre_hooks or cond)
    latents = net.encode(context, t, context_coords=around) if plain and len(parts) > 1 else None
    for part in parts:
        at, where = narrow[:, part], coords[:, part]
        found = (
            net(at, t, coords=where, **given) if latents is None else net.decode(latents, at, t, coords=where)
        )
        said.append(
            has_shape("net(x, t)", floating("net(x, t)", found), at.shape, "the values of the queries")
        )
    return (said[0] if len(said) == 1 else torch.cat(said, 1)).to(x.dtype)


def _interval(clip: Any) -> tuple[float, float]:
    if not isinstance(clip, tuple | list) or len(clip) != 2:
        raise ValueError(f"clip must be two numbers, the lower first, got {clip!r}")
    low, high = (within("clip", end, -math.inf, math.inf) for end in clip)
    if not low < high:
        raise ValueError(f"clip must be two numbers, the lower first, got {clip!r}")
    return low, high


def _places(coords: Any, n: int, m: int, like: Tensor) -> Tensor:
    """Return coordinates of m points for n fields, in the dtype and on the device of what lies there."""
    floating("coords", coords)
    rows = 1 if coords.shape[:1] == (1,) else n
    has_shape("coords", coords, (rows, m, None), f"{n} fields (or one for all) at {m} points")
    if not coords.shape[2]:
        raise ValueError(f"coords must have numbers, got shape {tuple(coords.shape)}")
    # Values are read on the CPU only, where that is free: an accelerator would have to wait.
    if coords.device.type == "cpu":
        finite("coords", coords)
    return coords.to(like.device, like.dtype)


def _count(name: str, value: Any, m: int) -> int:
    """Return how many of m points a number or a share of them is."""
    if isinstance(value, float):
        return max(1, round(within(name, value, 0, 1, open_low=True) * m))
    if integer(name, value, 1) > m:
        raise ValueError(f"{name} must be at most the number of points, {m}, got {value}")
    return int(value)


def _check_names(cond: Cond, n: int) -> None:
    check_cond(cond, n)
    if taken := sorted({"x", "t", "coords", "context", "context_coords"}.intersection(cond or {})):
        raise ValueError(f"cond must not name what the network is given anyway, got {', '.join(taken)}")


def _check_index(index: Any, m: int) -> None:
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not whole or index.ndim != 1:
        came = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ValueError(f"context_index must be a vector of whole numbers, got {came}")
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= m or len(index.unique()) < len(index):
        came = index.tolist()
        raise ValueError(f"context_index must name some of the points 0 to {m - 1}, each once, got {came}")


def _subset(rows: int, m: int, size: int, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Return random indices for each row, shape (rows, size), or None for all points as they are."""
    return None if size == m else uniform((rows, m), like, generator).argsort(1)[:, :size]


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    """Return some points of each field; one row of indices, or one field, serves all."""
    if index is None:
        return x
    if len(index) == 1:
        return x[:, index[0]]
    return x.take_along_dim(index[..., None], 1)
