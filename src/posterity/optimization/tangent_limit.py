"""Tangent limit: what an infinitely wide MLP does when it is trained by signs of gradients.

In the NTK parametrisation features stand still as width grows and training becomes a
differential equation of the network's values f alone. With plain gradients it is linear, by the
neural tangent kernel K. With an optimiser that puts each gradient entry through Q it is not:
for chi_b = dloss/df(x_b) on the training points,

    f(x) <- f(x) - lr Omega(x),                                                        (1)
    Omega(x) = E[phi(h^L(x)) Q(sum_b chi_b phi(h^L_b))]
             + sum_{l=2..L} E[dh^l(x) phi(h^{l-1}(x)) Q(sum_b chi_b dh^l_b phi(h^{l-1}_b))]
             + E[dh^1(x) sum_j x_j Q(sum_b chi_b dh^1_b x_bj)],

over Gaussian processes of preactivations h and of backward fields dh. Under Q = sign twice the
errors move f no faster, and no kernel says what happens; Q = identity gives Omega = K chi.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of
from posterity._precision import widened
from posterity._random import draw_device

__all__ = ["TangentLimit"]

_PAIRINGS = 8  # random ways to pair independent draws of dh and phi
_CHUNK = 2**22  # entries of the first layer that are worked on at once
_TERMS = 200  # of the series for tanh


class TangentLimit:
    """The infinite-width limit of an MLP in the NTK parametrisation, under any memoryless optimiser.

    The MLP has ``depth`` hidden layers and one output, no biases, first weights from N(0, 1/d)
    for d inputs, and later weights ``n^-1/2 w`` with w from N(0, 1). One step of (1) is a step
    of the rates of ``exponents("ntk")``.

    Parameters
    ----------
    depth : int, default=1
        Hidden layers L, at least 1.
    activation : {"relu", "erf", "tanh"}, default="relu"
        phi.
    rule : {"gradient", "sign"} or callable, default="sign"
        Q: the identity; the sign; or an entrywise function of a tensor, such as
        ``lambda g: g / (g.abs() + 1e-3)``, a first step of Adam.
    n_samples : int, default=4096
        Draws of the Gaussian processes, at least 1; the error falls with its root. Unused
        under "gradient", which has closed forms (a series for tanh).
    generator : torch.Generator, optional
        Decides the draws.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Notes
    -----
    1. Draws of dh^l and phi(h^{l-1}), which are independent, are paired in 8 random orders,
       not all with all.
    2. The limit under muP has no such closed form: its features move. Networks wide enough that
       `coordinate_check` is flat show it.

    References
    ----------
    .. [1] Littwin, Yang. Adaptive Optimization in the infinite-Width Limit. ICLR 2023.
       On the neural tangent limit.
    .. [2] Cho, Saul. Kernel Methods for Deep Learning. NeurIPS 2009. The arc-cosine kernels.
    .. [3] Williams. Computing with Infinite Networks. NeurIPS 1996. The kernel of erf.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import TangentLimit
    >>> x, chi = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    >>> TangentLimit(rule="gradient").operator(x, x, chi)  # 25 / 2 / 2 + 25 / 2
    tensor([18.7500])
    >>> limit = TangentLimit(rule="sign", generator=torch.Generator().manual_seed(0))
    >>> value = limit.operator(x, x, 100 * chi)  # (5 / sqrt 2 + 7) / sqrt(2 pi) = 4.2 for any positive chi
    >>> bool(abs(value - 4.2) < 0.2)
    True
    """

    def __init__(
        self,
        depth: int = 1,
        *,
        activation: Literal["relu", "erf", "tanh"] = "relu",
        rule: Literal["gradient", "sign"] | Callable[[Tensor], Tensor] = "sign",
        n_samples: int = 4096,
        generator: torch.Generator | None = None,
    ) -> None:
        self.depth = integer("depth", depth, 1)
        self.activation = one_of("activation", activation, tuple(_ACTIVATIONS))
        self.rule = rule if callable(rule) else one_of("rule", rule, ("gradient", "sign"))
        self.n_samples = integer("n_samples", n_samples, 1)
        self.generator = generator

    @widened
    def covariances(
        self, x: Float[Tensor, "n d"], x2: Float[Tensor, "m d"] | None = None
    ) -> tuple[Float[Tensor, "layers n m"], Float[Tensor, "backward n m"]]:
        """Return the kernels of preactivations and of backward fields.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        x2 : Tensor of shape (m, d), optional
            By default ``x``.

        Returns
        -------
        forward : Tensor of shape (depth + 1, n, m)
            ``S^0 = x x2' / d`` and ``S^l = E[phi(h^l) phi(h^l)']``.
        backward : Tensor of shape (depth, n, m)
            ``P^l = E[dh^l dh^l']`` of layers l = 1, ..., depth.

        Raises
        ------
        ValueError
            If shapes or dtypes do not fit, or a value is not finite.
        """
        x = _points("x", x)
        other = x if x2 is None else _points("x2", x2, x)
        forward, backward = self._kernels(_double(x), _double(other))
        return forward.to(x.dtype), backward.to(x.dtype)

    @widened
    def operator(
        self, x_train: Float[Tensor, "n d"], x_test: Float[Tensor, "m d"], chi: Float[Tensor, " n"]
    ) -> Float[Tensor, " m"]:
        """Return Omega of (1): minus the change of f, per unit of learning rate.

        Parameters
        ----------
        x_train : Tensor of shape (n, d)
        x_test : Tensor of shape (m, d)
        chi : Tensor of shape (n,)
            Derivative of the loss with respect to f at each training point.

        Returns
        -------
        Tensor of shape (m,)
            Other draws in each call.

        Raises
        ------
        ValueError
            If shapes or dtypes do not fit, or a value is not finite.
        """
        x_train, x_test = _points("x_train", x_train), _points("x_test", x_test, x_train, "x_train")
        chi = _values("chi", chi, len(x_train))
        omega = self._operator(_double(torch.cat([x_train, x_test])), len(x_train))
        return omega(_double(chi))[len(x_train) :].to(x_train.dtype)

    @widened
    def evolve(
        self,
        x_train: Float[Tensor, "n d"],
        x_test: Float[Tensor, "m d"],
        loss_grad: Callable[[Tensor], Tensor],
        *,
        lr: float,
        n_steps: int,
        f0_train: Float[Tensor, " n"] | None = None,
        f0_test: Float[Tensor, " m"] | None = None,
    ) -> tuple[Float[Tensor, "steps n"], Float[Tensor, "steps m"]]:
        """Train on all points for some steps of (1), with the same draws in all of them.

        Parameters
        ----------
        x_train : Tensor of shape (n, d)
        x_test : Tensor of shape (m, d)
        loss_grad : callable
            ``loss_grad(f) -> chi``, both of shape (n,); of the mean square error to targets y it
            is ``lambda f: 2 * (f - y) / len(y)``.
        lr : float
            Positive.
        n_steps : int
            At least 0.
        f0_train, f0_test : Tensor, optional
            Values before training; by default 0, the mean over networks.

        Returns
        -------
        tuple of Tensor
            Of shapes (n_steps + 1, n) and (n_steps + 1, m): f at the training and test points.

        Raises
        ------
        ValueError
            If an argument does not fit, or ``loss_grad`` stops being finite.
        """
        x_train, x_test = _points("x_train", x_train), _points("x_test", x_test, x_train, "x_train")
        at_least("lr", lr, 0, strict=True)
        integer("n_steps", n_steps, 0)
        n = len(x_train)
        x = _double(torch.cat([x_train, x_test]))
        starts = (("f0_train", f0_train, n), ("f0_test", f0_test, len(x_test)))
        f = torch.cat(
            [x.new_zeros(size) if f0 is None else _values(name, f0, size).to(x) for name, f0, size in starts]
        )
        omega = self._operator(x, n)
        path = [f]
        for step in range(n_steps):
            chi = loss_grad(f[:n].to(x_train.dtype))
            has_shape("the value of loss_grad", floating("the value of loss_grad", chi), (n,), "x_train")
            if not bool(torch.isfinite(chi).all()):
                raise ValueError(
                    f"loss_grad must stay finite, got NaN or infinity in step {step}: lower lr {lr}"
                )
            f = f - lr * omega(chi.to(x))
            path.append(f)
        values = torch.stack(path).to(x_train.dtype)
        return values[:, :n], values[:, n:]

    def _kernels(self, x: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Return forward and backward kernels; variances of each point go along."""
        kernels = _ACTIVATIONS[self.activation].kernels
        d = x.shape[1]
        cross, one, two = x @ x2.T / d, x.square().sum(1) / d, x2.square().sum(1) / d
        forward, slopes = [cross], []
        for _ in range(self.depth):
            value, slope = kernels(cross, one[:, None], two[None])
            one, two = (kernels(v, v, v)[0] for v in (one, two))
            cross = value
            forward.append(value)
            slopes.append(slope)  # E[phi'(h) phi'(h')] of this layer
        backward = [slopes[-1]]
        for slope in reversed(slopes[:-1]):
            backward.append(backward[-1] * slope)
        return torch.stack(forward), torch.stack(backward[::-1])

    def _operator(self, x: Tensor, n: int) -> Callable[[Tensor], Tensor]:
        """Return chi -> Omega at all points, with draws made once; the first n points train."""
        if self.rule == "gradient":
            forward, backward = self._kernels(x, x[:n])
            tangent = forward[-1] + (forward[1:-1] * backward[1:]).sum(0) + backward[0] * (x @ x[:n].T)
            return lambda chi: tangent @ chi
        rule = torch.sign if self.rule == "sign" else self.rule
        features, fields = self._draws(x)
        pairings = [torch.randperm(self.n_samples, generator=self.generator, device=draw_device(self.generator, x.device))
                    .to(x.device) for _ in range(_PAIRINGS)]  # fmt: skip
        rows = max(1, _CHUNK // x.shape[1])

        def processed(g: Tensor) -> Tensor:
            out = rule(g)
            if not isinstance(out, Tensor) or out.shape != g.shape:
                raise ValueError("rule must return a tensor of the shape of its argument")
            return out.to(g)

        def omega(chi: Tensor) -> Tensor:
            total = features[-1].T @ processed(features[-1][:, :n] @ chi)
            for dh, phi in zip(fields[1:], features[:-1], strict=True):
                for order in pairings:
                    product = dh * phi[order]
                    total = total + product.T @ processed(product[:, :n] @ chi) / _PAIRINGS
            for dh in fields[0].split(rows):
                total = total + (dh * (processed((dh[:, :n] * chi) @ x[:n]) @ x.T)).sum(0)
            return total / self.n_samples

        return omega

    def _draws(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Draw phi(h^l) and dh^l of all layers at all points, each (n_samples, points)."""
        phi, slope = _ACTIVATIONS[self.activation][:2]
        forward, backward = self._kernels(x, x)
        # the first layer by its weights: exact where S^0 has no full rank
        h = [self._normal(x.shape[1], x) @ x.T / math.sqrt(x.shape[1])]
        h += [self._normal(len(x), x) @ _root(covariance) for covariance in forward[1:-1]]
        above = [self._normal(len(x), x) @ _root(covariance) for covariance in backward[1:]]
        above.append(self._normal(1, x))  # the output weights
        return [phi(each) for each in h], [g * slope(each) for g, each in zip(above, h, strict=True)]

    def _normal(self, size: int, x: Tensor) -> Tensor:
        where = draw_device(self.generator, x.device)
        drawn = torch.randn(self.n_samples, size, generator=self.generator, device=where, dtype=x.dtype)
        return drawn.to(x.device)


def _root(covariance: Tensor) -> Tensor:
    """Return a square root of a covariance that may be singular, as of points given twice."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _relu_kernels(cross: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Arc-cosine kernels of degree one and zero, over 2: of relu and of its slope."""
    size = (one * two).sqrt()
    cosine = (cross / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(-1, 1)
    angle = torch.pi - cosine.acos()
    value = size * ((1 - cosine.square()).sqrt() + angle * cosine) / (2 * torch.pi)
    return value, angle / (2 * torch.pi)


def _erf_kernels(cross: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    size = (1 + 2 * one) * (1 + 2 * two)
    value = 2 / torch.pi * (2 * cross / size.sqrt()).clamp(-1, 1).asin()
    return value, 4 / torch.pi / (size - 4 * cross.square()).sqrt()


def _tanh_kernels(cross: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Hermite series, sum_k rho^k c_k(one) c_k(two), for want of closed forms.

    What the series leaves of a variance, next to nothing unless inputs are large, goes to the
    next power: exact at rho = 1.
    """
    z = torch.arange(-600, 601, dtype=cross.dtype, device=cross.device) / 50
    basis = [(-z.square() / 4).exp() / (2 * torch.pi) ** 0.25]  # Hermite functions, orthonormal
    basis.append(z * basis[0])
    for k in range(1, _TERMS - 1):
        basis.append((z * basis[k] - math.sqrt(k) * basis[k - 1]) / math.sqrt(k + 1))
    functions = torch.stack(basis)

    def series(variance: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        values = function(variance.sqrt()[..., None] * z) * functions[0]
        known = values @ functions.T / 50
        rest = values.square().sum(-1) / 50 - known.square().sum(-1)
        return torch.cat([known, rest.clamp_min(0).sqrt()[..., None]], -1)

    rho = (cross / (one * two).sqrt().clamp_min(torch.finfo(cross.dtype).tiny)).clamp(-1, 1)
    results = []
    for function in (torch.tanh, _tanh_slope):
        first, second = series(one, function), series(two, function)
        total = torch.zeros_like(rho)
        for k in reversed(range(_TERMS + 1)):
            total = total * rho + first[..., k] * second[..., k]
        results.append(total)
    return results[0], results[1]


def _tanh_slope(h: Tensor) -> Tensor:
    return 1 - h.tanh().square()


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    kernels: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


_ACTIVATIONS = {
    "relu": _Activation(torch.relu, lambda h: (h > 0).to(h.dtype), _relu_kernels),
    "erf": _Activation(torch.erf, lambda h: 2 / math.sqrt(math.pi) * (-h.square()).exp(), _erf_kernels),
    "tanh": _Activation(torch.tanh, _tanh_slope, _tanh_kernels),
}


def _double(x: Tensor) -> Tensor:
    """Return float64 where the device has it: kernels cancel, and their roots lose half the digits."""
    return x if x.device.type == "mps" else x.double()


def _points(name: str, x: Tensor, like: Tensor | None = None, source: str = "x") -> Tensor:
    n, d = has_shape(name, floating(name, x), (None, None)).shape
    if n == 0 or d == 0:
        raise ValueError(f"{name} must have at least one row and one column, got {tuple(x.shape)}")
    if like is not None:
        has_shape(name, x, (None, like.shape[1]), source)
        if x.device != like.device:
            raise ValueError(f"{name} must be on the device of {source}, got {x.device} for {like.device}")
    return finite(name, x)


def _values(name: str, value: Tensor, n: int) -> Tensor:
    return finite(
        name, has_shape(name, floating(name, value), (n,), "x_" + ("test" if "test" in name else "train"))
    )
