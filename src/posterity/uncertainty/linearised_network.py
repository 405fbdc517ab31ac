"""A trained network as a linear model: products with its Jacobian, and the weights that fit best.

Around its trained weights theta the outputs of a network are linear in a change v of them,

    f(x; theta + v) = f(x; theta) + J(x) v,                                                 (1)

and J is never formed: u -> J' u is one backward pass, and v -> J v its transpose, both for a whole
stack of vectors. Parameters that are frozen or belong to a normalisation layer do not move.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from posterity._models import by_sample, evaluating
from posterity._precision import NARROW, wide
from posterity.uncertainty.block_solvers import Product, _warn

__all__: list[str] = []

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class _Batch(NamedTuple):
    """A batch, its outputs, and the products V -> J V and U -> J' U for stacks of vectors."""

    x: Tensor
    y: Any  # Tensor, or None where there are no labels
    f: Tensor
    push: Product
    pull: Product


class _Tangent:
    """The outputs of a network as a function of its free parameters, as one vector theta.

    A network of narrow weights is read in float32: in its own dtype no system could be solved.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, free = model, _parameters(model)
        self.names, self.shapes = list(free), [v.shape for v in free.values()]
        self.sizes = [v.numel() for v in free.values()]
        self.theta = torch.cat([wide(v.detach()).flatten() for v in free.values()])
        named = [*model.named_parameters(), *model.named_buffers()]
        self.fixed = {name: wide(v) for name, v in named if name not in free and v.dtype in NARROW}

    def to(self, x: Tensor) -> Tensor:
        x = wide(x) if x.is_floating_point() else x
        return (x.clone() if x.is_inference() else x).to(self.theta.device)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        free = {name: v.view(shape) for name, v, shape in parts}
        return functional_call(self.model, {**self.fixed, **free}, (x,))

    def measure(self, x: Tensor) -> tuple[int, int]:
        """Return the number of outputs, and the bytes that linearising at x keeps."""
        saved = 0

        def pack(value: Tensor) -> Tensor:
            nonlocal saved
            saved += value.numel() * value.element_size()
            return value

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            f = self(self.theta.clone().requires_grad_(), x)
        if f.ndim != 2 or len(f) != len(x):
            raise ValueError(f"model must map n inputs to (n, outputs), got {tuple(f.shape)} for {len(x)}")
        return f.shape[1], saved

    def at(self, x: Tensor, y: Tensor | None) -> _Batch:
        f, pull = vjp(lambda theta: self(theta, x), self.theta)[:2]
        # u -> J' u is linear, so its own transpose is v -> J v: no second pass through the network
        push = vjp(lambda u: pull(u)[0], torch.zeros_like(f))[1]
        y = None if y is None else y.to(f.device)
        return _Batch(x, y, f, lambda v: vmap(push)(v)[0], lambda u: vmap(pull)(u)[0])

    def squares(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the sum over points n and columns c of (J_n' u_cn)^2."""

        def one(point: Tensor, columns: Tensor) -> Tensor:
            pull = vjp(lambda theta: self(theta, point[None])[0], self.theta)[1]
            return vmap(pull)(columns)[0].square().sum(0)

        total, u = torch.zeros_like(self.theta), u.transpose(0, 1)  # (points, columns, outputs)
        rows = max(1, 2**24 // (u.shape[1] * len(total)))
        for xs, us in zip(x.split(rows), u.split(rows), strict=True):
            total += by_sample(one, xs, us).sum(0)
        return total


def _linear_mode(
    batches: Callable[[], Iterator[_Batch]], s: Tensor, lam: float, start: Tensor, tol: float, max_iter: int
) -> Tensor:
    """Return the weights at which the linear classifier, without offset, fits best."""
    w = start.clone().requires_grad_()

    @torch.no_grad()  # L-BFGS calls it with gradients on
    def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = lam / 2 * point.double().square().sum(), lam * point
        for batch in batches():
            logits, target = batch.push((s * point)[None])[0], batch.y.long()
            loss = loss + F.cross_entropy(logits.double(), target, reduction="sum")
            gap = logits.softmax(1) - F.one_hot(target, logits.shape[1])
            grad = grad + s * batch.pull(gap[None])[0]
        return loss, grad

    def step() -> Tensor:
        loss, w.grad = evaluate(w.detach())
        return loss

    steepest = float(evaluate(torch.zeros_like(start))[1].abs().max())
    torch.optim.LBFGS(
        [w], max_iter=max_iter, tolerance_grad=tol * steepest, tolerance_change=0,
        line_search_fn="strong_wolfe",
    ).step(step)  # fmt: skip
    slope = float(evaluate(w.detach())[1].abs().max())
    _warn(slope / max(steepest, 1e-30), tol, max_iter, "L-BFGS")
    return w.detach()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the free parameters by name: trainable, not of a normalisation layer."""
    fixed = {id(v) for m in model.modules() if isinstance(m, _NORMS) for v in m.parameters(recurse=False)}
    free = {name: v for name, v in model.named_parameters() if v.requires_grad and id(v) not in fixed}
    if not sum(v.numel() for v in free.values()):
        raise ValueError("model must have a trainable parameter outside normalisation layers, has none")
    return free


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode, with attention that can be differentiated twice; then undo both.

    Inside there is no autocast, as solvers need each digit, no gradient and no inference mode.
    """
    device = next(model.parameters()).device.type
    with (
        evaluating(model), sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False),
        torch.inference_mode(False), torch.no_grad(),
    ):  # fmt: skip
        yield
