r"""Networks that differ in their initial weights alone, trained at once by gradient descent on squared error.

Each is trained as the difference from its own first function, times an output scale,

.. math:: f(x) = s\, (g(x; \theta) - g(x; \theta_0)),

so that what it was before training adds nothing to how the networks differ after it. They are one
stacked network; one that has converged stands still while the others go on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.func import vmap

from posterity._checks import at_least, finite, floating, has_shape, integer, one_of, within
from posterity._models import call, not_batched, state
from posterity.dynamics.ntk_mlp import NTKMLP, row_of_layers, run_row
from posterity.dynamics.tangent_kernel import at_work, ordinary

__all__ = ["RegressionEnsemble", "train_ensemble"]


@dataclass(frozen=True)
class RegressionEnsemble:
    """Networks trained on the same data from different initial weights; tensors are on the CPU.

    Attributes
    ----------
    predictions : Tensor of shape (E, n_test, k)
    train_loss : Tensor of shape (E,)
        Mean squared error over samples and outputs, at the last weights.
    n_steps : Tensor of shape (E,)
        Steps that each took, those taken back among them.
    params0, params : dict of str to Tensor
        First and last trainable weights, stacked: ``{name: p[0] for name, p in params.items()}`` is one network's.
    converged : Tensor of shape (E,)
        Whether the loss fell below ``tol``.
    """

    predictions: Float[Tensor, "members n_test k"]
    train_loss: Float[Tensor, " members"]
    n_steps: Int[Tensor, " members"]
    params0: dict[str, Tensor]
    params: dict[str, Tensor]
    converged: Bool[Tensor, " members"]


def train_ensemble(
    make_model: Callable[[int], nn.Module],
    x: Shaped[Tensor, " n *features"],
    y: Float[Tensor, "n k"],
    x_test: Shaped[Tensor, " n_test *features"],
    *,
    n_models: int = 10,
    center: bool = True,
    output_scale: float = 1.0,
    lr: float | None = None,
    n_steps: int = 30_000,
    tol: float = 1e-6,
    momentum: float = 0.0,
    vectorize: bool = True,
) -> RegressionEnsemble:
    """Train copies of a network by full-batch gradient descent on squared error, all at once.

    Parameters
    ----------
    make_model : callable
        ``make_model(seed)`` returns the network of seed 0, 1, ...: of one architecture, evaluated in
        eval mode, and left as it was made.
    x : Tensor of shape (n, ...)
        Training points.
    y : Tensor of shape (n, k)
        Their targets.
    x_test : Tensor of shape (n_test, ...)
        Where to predict.
    n_models : int, default=10
        At least 1.
    center : bool, default=True
        Whether a network counts from its own first value: f - f_0 is trained and predicts.
    output_scale : float, default=1.0
        What multiplies the function, positive; large is lazy.
    lr : float, optional
        Positive. None, for `NTKMLP`, is the step of the official code, which a network halves
        whenever its loss rises, taking the step back.
    n_steps : int, default=30_000
        At most, at least 1.
    tol : float, default=1e-6
        Loss below which a network stops, at least 0.
    momentum : float, default=0.0
        In [0, 1).
    vectorize : bool, default=True
        Whether to stack the networks under ``torch.func.vmap``; if not, each is trained alone.

    Returns
    -------
    RegressionEnsemble
        In float32 at least: weights that were rounded would not be those that predict.

    Raises
    ------
    ValueError
        If an argument does not fit, networks differ in shape or do not return y's, a given
        ``lr`` is too high, or none is given for a model other than `NTKMLP`.

    Notes
    -----
    1. The step is sqrt(N) / (0.09 + max(depth - 3, 0) 10 / N + alpha^2) with N the width and alpha
       that of the model times ``output_scale``.

    References
    ----------
    .. [1] Atanasov et al. The Onset of Variance-Limited Behavior for Networks in the Lazy and
       Rich Regimes. ICLR 2023. Section 2, and the official code.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import NTKMLP, sphere_polynomial, train_ensemble
    >>> x, y = sphere_polynomial(30, dim=4, degree=1, generator=torch.Generator().manual_seed(0))
    >>> def make(seed):
    ...     return NTKMLP(4, width=16, depth=2, generator=torch.Generator().manual_seed(seed))
    >>> found = train_ensemble(make, x[:20], y[:20], x[20:], n_models=3, n_steps=500, tol=1e-2)
    >>> found.predictions.shape, found.converged
    (torch.Size([3, 10, 1]), tensor([True, True, True]))
    """
    n, k = _pair(x, y)
    if not isinstance(x_test, Tensor) or x_test.ndim == 0 or x_test.numel() == 0:
        raise ValueError("x_test must be a tensor with at least one row and one feature")
    finite("x_test", has_shape("x_test", x_test, (None, *x.shape[1:]), "x"))
    integer("n_models", n_models, 1)
    for name, flag in (("center", center), ("vectorize", vectorize)):
        one_of(name, flag, (False, True))
    at_least("output_scale", output_scale, 0, strict=True)
    if lr is not None:
        at_least("lr", lr, 0, strict=True)
    integer("n_steps", n_steps, 1)
    at_least("tol", tol, 0)
    within("momentum", momentum, 0, 1, open_high=True)

    models, states = [], []
    for seed in range(n_models):
        model = make_model(seed)
        if not isinstance(model, nn.Module):
            raise ValueError(f"make_model must return an nn.Module, got {type(model).__name__}")
        with torch.inference_mode(False):  # copies: the next model may be this one, drawn anew
            states.append([{name: ordinary(p).clone() for name, p in part.items()} for part in state(model)])
        models.append(model)
    if not any(p.numel() for p in states[0][0].values()):
        raise ValueError("make_model must return models with something to train, got none")
    rate = _default_rate(models[0], output_scale) if lr is None else lr
    groups = [range(n_models)] if vectorize else [range(e, e + 1) for e in range(n_models)]
    with at_work(*models, device=x.device):
        points, targets, test = ordinary(x), ordinary(y), ordinary(x_test)
        parts = []
        for group in groups:
            params, rest = (_stacked([states[e][which] for e in group]) for which in (0, 1))
            member = _Members(models[group[0]], rest, vectorize)
            first, first_test = (
                member.first(params, part) if center else torch.zeros(()) for part in (points, test)
            )
            _fits(member(params, points[:1]), k)
            run = partial(_loss, member, points, targets / output_scale + first, output_scale)
            last, loss, steps = _descend(run, params, rate, lr is None, n_steps, tol, momentum)
            with torch.no_grad():
                predictions = output_scale * (member(last, test) - first_test)
            parts.append((predictions, loss, steps, params, last))
    kept = [[part[which] for part in parts] for which in range(5)]
    predictions, loss, steps = (torch.cat(part).cpu() for part in kept[:3])
    before, after = (
        {name: torch.cat([part[name] for part in which]).detach().cpu() for name in which[0]}
        for which in kept[3:]
    )
    return RegressionEnsemble(predictions, loss, steps, before, after, loss < tol)


class _Members:
    """Networks as one function of their stacked weights: (E, ...) and points to (E, n, k)."""

    def __init__(self, model: nn.Module, rest: dict[str, Tensor], vectorize: bool) -> None:
        self.model, self.rest, self.vectorize = model, rest, vectorize
        self.layers = row_of_layers(model)

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        every = {**params, **self.rest}
        if self.vectorize and self.layers is not None and x.ndim == 2:  # without the overhead of vmap
            return run_row(self.layers, every, x)
        if self.vectorize:
            try:
                return vmap(lambda each: call(self.model, each, x))(every)
            except RuntimeError as error:
                if not not_batched(error):
                    raise
                raise ValueError(
                    f"vectorize must be False for a model that vmap does not take: {error}"
                ) from error
        return call(self.model, {name: p[0] for name, p in every.items()}, x)[None]

    def first(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            return self(params, x)


def _loss(
    member: _Members, x: Tensor, target: Tensor, scale: float, params: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses and their gradients at stacked weights."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = (member(leaves, x) - target).square().mean((1, 2)) * scale**2
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, grads, strict=True))


def _descend(
    run: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]], params: dict[str, Tensor], lr: float,
    halve: bool, n_steps: int, tol: float, momentum: float,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    """Return weights, losses and numbers of steps; who is below ``tol`` stands still, whatever others do."""
    loss, grads = run(params)
    if not bool(loss.isfinite().all()):
        raise ValueError("make_model must return models of finite values at x, the first loss is not finite")
    rate = torch.full_like(loss, lr)
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    steps = torch.zeros(len(loss), dtype=torch.int64, device=loss.device)
    for step in range(1, n_steps + 1):
        moving = ~(loss < tol)
        if not bool(moving.any()):
            break
        if momentum:
            velocity = {name: momentum * velocity[name] + g for name, g in grads.items()}
        else:
            velocity = grads
        ahead = {
            name: torch.addcmul(p, _over(rate, p), velocity[name], value=-1) for name, p in params.items()
        }
        new_loss, new_grads = run(ahead)
        steps += moving
        better = moving
        if halve:
            better = moving & (new_loss <= loss)
            taken_back = moving & ~better
            if bool(taken_back.any()):
                rate = torch.where(taken_back, rate / 2, rate)
                velocity = {name: torch.where(_over(taken_back, v), 0.0, v) for name, v in velocity.items()}
        elif not bool(new_loss[moving].isfinite().all()):
            raise ValueError(f"lr must be lower than {lr:g}: training diverged at step {step}")
        if bool(better.all()):
            params, grads, loss = ahead, new_grads, new_loss
        else:
            params = {name: torch.where(_over(better, p), ahead[name], p) for name, p in params.items()}
            grads = {name: torch.where(_over(better, g), new_grads[name], g) for name, g in grads.items()}
            loss = torch.where(better, new_loss, loss)
    return params, loss, steps


def _over(one_each: Tensor, p: Tensor) -> Tensor:
    """Return a number for each member in the rank of its weights."""
    return one_each.reshape(-1, *[1] * (p.ndim - 1))


def _default_rate(model: nn.Module, output_scale: float) -> float:
    if not isinstance(model, NTKMLP):
        raise ValueError(
            f"lr must be given for a model other than NTKMLP, got None for {type(model).__name__}"
        )
    n, alpha = model.width, model.alpha * output_scale
    return n**0.5 / (0.09 + max(model.depth - 3, 0) * 10 / n + alpha**2)


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shapes = [{name: (p.shape, p.dtype) for name, p in part.items()} for part in parts]
    for seed, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"make_model must return models of one architecture, that of seed {seed} differs"
            )
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _fits(out: Tensor, k: int) -> None:
    if out.shape[1:] != (1, k):
        raise ValueError(
            f"y must have the shape of the models' values: (n, {k}) came for {tuple(out.shape[1:])} of one row"
        )


def _pair(x: Any, y: Any) -> tuple[int, int]:
    """Return numbers of samples and outputs."""
    if not isinstance(x, Tensor) or x.ndim == 0 or x.numel() == 0:
        raise ValueError("x must be a tensor with at least one row and one feature")
    finite("x", x)
    has_shape("y", floating("y", y), (len(x), None), "x (if it has one value a sample, give y[:, None])")
    if not y.numel():
        raise ValueError(f"y must have at least one column, got {tuple(y.shape)}")
    finite("y", y)
    return len(y), y.shape[1]
