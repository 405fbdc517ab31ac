"""Input gradients of many models at once, and how alike they are.

Models of one architecture are stacked, so that one call reads all of them; it is used where that is
faster, and where it was seen to give the same numbers. Nothing is left behind in the models: their
weights enter as copies or constants, and their modes are put back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from posterity._checks import class_indices, floating
from posterity._models import at_rest
from posterity._precision import wide

__all__ = ["gradient_similarity"]

Read = Callable[[nn.Module, Tensor], Tensor]
SMALL = 2**15  # numbers in a batch up to which calls cost more than work, so that all checkpoints go in one
KEPT = 2**26  # weights of all checkpoints together that may be copied for it


@torch.inference_mode(False)
def gradient_similarity(
    checkpoints: Sequence[nn.Module], x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]
) -> Float[Tensor, "M M"]:
    """Return the cosines of the checkpoints' input gradients, averaged over samples.

    What makes an ensemble of one run's checkpoints is that those off the diagonal are small.

    Parameters
    ----------
    checkpoints : sequence of nn.Module
        M models, at least one, as `SelfEnsembleProtector` takes them.
    x : Tensor of shape (n, ...)
        At least one sample.
    y : Tensor of shape (n,), integer
        True labels; the gradients are those of their cross-entropy.

    Returns
    -------
    Tensor of shape (M, M)
        Symmetric, 1 on the diagonal, of the dtype of ``x`` and on its device.

    Raises
    ------
    ValueError
        If ``x`` and ``y`` do not fit, a gradient is not finite, or two checkpoints have no sample
        for which both have a gradient.

    Notes
    -----
    1. Computed in float64 where the device has it. A sample that a checkpoint is so sure of that its
       gradient is 0 has no angle, and is left out of this checkpoint's averages.

    References
    ----------
    .. [1] Chen et al. Self-Ensemble Protection. ICLR 2023. Section 3.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import gradient_similarity
    >>> nets = [torch.nn.Linear(2, 2, bias=False) for _ in range(2)]
    >>> for net, column in zip(nets, ([[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]])):
    ...     _ = net.weight.data.copy_(torch.tensor(column))
    >>> gradient_similarity(nets, torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    tensor([[1., 0.],
            [0., 1.]])
    """
    models = models_of(checkpoints)
    x, y = samples(x, y)
    if not x.numel():
        raise ValueError(f"x must have at least one sample, got shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, got NaN or infinity")
    M = len(models)
    total = torch.zeros(
        M, M, dtype=torch.float32 if x.device.type == "mps" else torch.float64, device=x.device
    )
    count = torch.zeros_like(total)
    with as_they_predict(models):
        ensemble = Ensemble(models, outputs, cross_entropy_sum, x.to(total.dtype))
        in_range(y, min(ensemble.width(m, x) for m in range(M)))
        for part, label in zip(x.split(256), y.split(256), strict=True):
            each = torch.stack(list(ensemble.gradients(part.to(total.dtype), [label] * M))).flatten(2)
            each = each / each.abs().amax(2, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny)
            each = F.normalize(each, dim=2)
            total += torch.einsum("abc,dbc->ad", each, each)
            there = each.any(2).to(total)
            count += there @ there.T
    if not bool(count.all()):
        a, b = (count == 0).nonzero()[0].tolist()
        raise ValueError(
            f"x must have a sample for which checkpoints {a} and {b} have a gradient, both are sure of all"
        )
    return (total / count).to(x.dtype)


class _Reader(nn.Module):
    """A model as what is read of it, so that its weights can be put in from outside."""

    def __init__(self, model: nn.Module, read: Read) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.model, x)


class Ensemble:
    """Gradients of a loss of what is read of each checkpoint, of all in one call where that is faster."""

    def __init__(
        self, models: list[nn.Module], read: Read, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor
    ) -> None:
        self.readers, self.loss = [_Reader(model, read) for model in models], loss
        held = [t.dtype for r in self.readers for t in r.parameters() if t.is_floating_point()]
        self.dtype = wide(x[:0]).dtype
        for dtype in held:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.states = [self._state(reader) for reader in self.readers]
        self.devices = [next((t.device for t in state.values()), x.device) for state in self.states]
        self.stacked = self._stacked(x[:2])

    def _state(self, reader: _Reader) -> dict[str, Tensor]:
        """Return weights and buffers as the gradients need them; what is written into is a copy."""
        state = {}
        for name, tensor in (*reader.named_parameters(), *reader.named_buffers()):
            now = tensor.detach()
            if now.is_floating_point():
                now = now.to(torch.promote_types(now.dtype, self.dtype))
            own = isinstance(tensor, nn.Parameter) and not now.is_inference()
            state[name] = now if own else now.clone()
        return state

    def _stacked(self, x: Tensor) -> dict[str, Tensor] | None:
        """Return all weights in one, or None where the models differ in more than weights."""
        first, *others = self.states
        forms = [{name: (t.shape, t.dtype, t.device) for name, t in state.items()} for state in self.states]
        weights = len(self.states) * sum(t.numel() for t in first.values())
        if not others or not first or forms.count(forms[0]) < len(forms) or weights > KEPT:
            return None
        stacked = {name: torch.stack([state[name] for state in self.states]) for name in first}
        alone = [self.read(m, x) for m in range(len(self.states))]
        try:  # equal weights say little of the code around them: the numbers decide
            self.stacked = stacked
            together = self._all(x.to(self.devices[0], self.dtype).expand(len(alone), *x.shape).clone())
        except Exception:  # whatever vmap does not know
            return None
        same = all(
            a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5)
            for a, b in zip(alone, together, strict=True)
        )
        return stacked if same else None

    def _all(self, each: Tensor) -> Tensor:
        """Return what is read of all checkpoints of inputs (M, batch, ...)."""
        return vmap(lambda state, x: functional_call(self.readers[0], state, (x,)))(self.stacked, each)

    def read(self, m: int, x: Tensor) -> Tensor:
        """Return what is read of checkpoint m, (batch, k)."""
        x = x.to(self.devices[m], self.dtype)
        out = functional_call(self.readers[m], self.states[m], (x,))
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x) or not out.is_floating_point():
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            what = "checkpoints must give logits" if self.loss is cross_entropy_sum else "features must be"
            raise ValueError(
                f"{what} of shape (batch, any) for {len(x)} samples, got {got} of checkpoint {m}"
            )
        return out

    @torch.no_grad()
    def width(self, m: int, x: Tensor) -> int:
        """Return how many numbers are read of a sample."""
        return self.read(m, x[:1]).shape[1]

    def gradient(self, m: int, x: Tensor, goal: Tensor) -> Tensor:
        """Return the gradient of the summed loss of checkpoint m."""
        leaf = x.detach().requires_grad_()
        out = self.read(m, leaf)
        goal = goal.to(out.device)
        if goal.ndim == 2 and goal.shape != out.shape:
            raise ValueError(
                f"features must be as wide as those of means, {goal.shape[1]}, got {out.shape[1]}"
            )
        return self._finite(m, self._slope(self.loss(out, goal), leaf))

    def gradients(self, x: Tensor, goals: list[Tensor]) -> Iterator[Tensor]:
        """Yield the gradient of each checkpoint in turn."""
        if self.stacked is None or x.numel() > SMALL:
            yield from (self.gradient(m, x, goal) for m, goal in enumerate(goals))
            return
        device = self.devices[0]
        leaf = x.to(device).expand(len(goals), *x.shape).clone().requires_grad_()
        value = self.loss(self._all(leaf).flatten(0, 1), torch.cat([goal.to(device) for goal in goals]))
        each = self._slope(value, leaf)
        if not bool(each.isfinite().all()):
            for m, part in enumerate(each):
                self._finite(m, part)
        yield from each.to(x.device)

    @staticmethod
    def _slope(value: Tensor, leaf: Tensor) -> Tensor:
        if not value.requires_grad:
            raise ValueError(
                "checkpoints must have a gradient with respect to x, what is read of one has none"
            )
        return torch.autograd.grad(value, leaf)[0]

    @staticmethod
    def _finite(m: int, gradient: Tensor) -> Tensor:
        if not bool(gradient.isfinite().all()):
            raise ValueError(f"checkpoints must have finite gradients, that of checkpoint {m} is not")
        return gradient

    @torch.no_grad()
    def class_means(self, x: Tensor, y: Tensor, K: int, batch_size: int) -> list[Tensor]:
        """Return the mean of what is read of each class, (K, k), for each checkpoint; NaN for none."""
        means = []
        for m, device in enumerate(self.devices):
            full = self.dtype if device.type == "mps" else torch.float64
            sums: Any = 0
            for part, label in zip(x.split(batch_size), y.split(batch_size), strict=True):
                member = F.one_hot(label.to(device), K).to(full)
                sums = sums + member.T @ self.read(m, part).to(full)
            counts = y.bincount(minlength=K).to(sums)
            means.append((sums / counts[:, None]).to(self.dtype))
        return means


def cross_entropy_sum(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="sum")


def distance(features: Tensor, goal: Tensor) -> Tensor:
    return (features - goal).square().mean(1).sum()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def last_linear_input(model: nn.Module, x: Tensor) -> Tensor:
    """Return the input of the linear layer that is called last, flattened."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
                hooks.callback(handle.remove)
        model(x)
    if not seen:
        raise ValueError("features must be given: a checkpoint calls no nn.Linear whose input could be taken")
    return seen[-1].flatten(1)


@contextmanager
def as_they_predict(models: list[nn.Module]) -> Iterator[None]:
    """Have models in eval mode, outside autocast, and put all modes back."""
    kinds = {"cpu"} | {t.device.type for model in models for t in model.parameters()}
    with at_rest(*models), ExitStack() as stack:
        for kind in kinds - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def models_of(checkpoints: Sequence[nn.Module]) -> list[nn.Module]:
    if isinstance(checkpoints, nn.Module) and not isinstance(checkpoints, nn.ModuleList):
        raise ValueError("checkpoints must be a sequence of models, got one model")
    try:
        models = list(checkpoints)
    except TypeError:
        raise ValueError(f"checkpoints must be models, got {type(checkpoints).__name__}") from None
    if not models or not all(isinstance(model, nn.Module) for model in models):
        kinds = sorted({type(model).__name__ for model in models})
        raise ValueError(f"checkpoints must be at least one model, got {kinds if models else 'none'}")
    return models


def samples(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and labels that fit each other, as ordinary tensors without history."""
    if floating("x", x).ndim < 2:
        raise ValueError(f"x must have shape (n, ...) with an axis for values, got {tuple(x.shape)}")
    class_indices("y", y, len(x))
    x = x.clone() if x.is_inference() else x.detach()
    return x, y.to(x.device, torch.int64, copy=y.is_inference())


def in_range(y: Tensor, K: int) -> None:
    if not bool(((y >= 0) & (y < K)).all()):
        low, high = y.aminmax()
        raise ValueError(f"y must be in 0..{K - 1} for {K} classes, got values from {low} to {high}")
