"""Susceptibility: how readily a model gives way to random labels, which tells how much noise it has memorised.

At the start of epoch t a batch of unlabelled inputs gets random labels. With phi its loss under the
weights as they are, and phi~ that after one step of the user's own optimiser on it,

    zeta(t) = (1 / t) sum over tau <= t of (phi_tau - phi~_tau+1),               (1)

and everything is put back. A model that learns random labels in a step (large zeta) is one that
memorises: among models trained on noisy labels, those with a high training accuracy and a low
zeta have learned the clean ones. No label is known to be right, and none of the inputs needs one.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import integer, needs
from posterity._precision import wide
from posterity.labels._arrays import array, numbers

try:
    import torchmetrics
except ModuleNotFoundError:  # the function needs no torchmetrics; the metric says how to install it
    torchmetrics = None
Metric: Any = torchmetrics.Metric if torchmetrics else nn.Module

__all__ = ["Susceptibility", "model_regions", "select_models", "susceptibility_step"]

Values = Shaped[ndarray, " m"] | Shaped[Tensor, " m"] | ArrayLike


def susceptibility_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Shaped[Tensor, "batch ..."],
    y: Shaped[Tensor, "batch ..."],
    *,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
) -> tuple[float, float]:
    """Return the loss of a batch before and after one step of the optimiser on it, and undo the step.

    Parameters
    ----------
    model : nn.Module
        Run in training mode, for both losses.
    optimizer : Optimizer
        Of parameters of the model; its state, learning rate and weight decay are used as they stand.
    x : Tensor of shape (batch, ...)
        Inputs, on the device of the model.
    y : Tensor of shape (batch, ...)
        Targets, for susceptibility random classes.
    loss_fn : callable, default=cross_entropy
        ``loss_fn(model(x), y) -> scalar``; outputs in 16 bits are widened for it.

    Returns
    -------
    tuple of float and float
        Their difference is the susceptibility of this moment.

    Raises
    ------
    ValueError
        If sizes differ, the optimiser has parameters that are not the model's or needs a
        closure, or a loss is not finite.

    Notes
    -----
    Parameters, buffers, gradients, modes, the optimiser's state and torch's random state are
    afterwards what they were, bit by bit, also after an error. What a model keeps elsewhere, as
    numbers of Python, is not seen. Gradients are not scaled.

    References
    ----------
    .. [1] Forouzesh, Sedghi, Thiran. Leveraging Unlabeled Data to Track Memorization. ICLR
       2023. Section 3, Equation 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.labels import susceptibility_step
    >>> net = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> before, after = susceptibility_step(net, optimizer, torch.eye(2), torch.tensor([0, 1]))
    >>> before > after, len(optimizer.state)
    (True, 0)
    """
    return _measure(model, optimizer, x, y, loss_fn, _Copies())


class Susceptibility(Metric):
    """Susceptibility over the epochs of a training, equation 1: call ``update`` at the start of each.

    Parameters
    ----------
    probe : Tensor of shape (n, ...)
        Unlabelled inputs, two or more: held-out ones, or those of training without their labels.
    n_classes : int
        At least 2.
    batch_size : int, default=128
        How many of them are drawn anew each time.
    generator : torch.Generator, optional
        Draws the labels, once, and the batches; by default one of its own, seeded with 0.
    loss_fn : callable, default=cross_entropy
        ``loss_fn(model(x), y) -> scalar``.

    Attributes
    ----------
    labels : Tensor of shape (n,), int64
        The random labels, one for each input.
    history : list of float
        The drop of the loss at each update.

    Raises
    ------
    ValueError
        As `susceptibility_step`; a loss that is not finite is named with its epoch.
    ModuleNotFoundError
        If torchmetrics is not installed.

    Notes
    -----
    Training goes on, bit by bit, as it would without the metric. The official program leaves the
    first epoch out and divides by one more; here all are averaged.

    References
    ----------
    .. [1] Forouzesh, Sedghi, Thiran. Leveraging Unlabeled Data to Track Memorization. ICLR 2023.
       Section 3, Equation 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.labels import Susceptibility
    >>> net = torch.nn.Linear(5, 3)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> metric = Susceptibility(torch.randn(40, 5), n_classes=3)
    >>> for epoch in range(2):
    ...     metric.update(net, optimizer)  # then train for an epoch
    >>> len(metric.history), bool(metric.compute() > 0)
    (2, True)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    drops: Any
    labels: Tensor
    probe: Tensor

    def __init__(
        self,
        probe: Shaped[Tensor, "n ..."],
        n_classes: int,
        *,
        batch_size: int = 128,
        generator: torch.Generator | None = None,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
    ) -> None:
        needs("torchmetrics", "uncertainty")
        super().__init__()
        if not isinstance(probe, Tensor) or probe.ndim == 0 or len(probe) < 2:
            shape = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
            raise ValueError(f"probe must be a tensor of at least 2 inputs, got {shape}")
        self.n_classes = integer("n_classes", n_classes, 2)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.loss_fn = loss_fn
        drawn = torch.randint(
            n_classes, (len(probe),), generator=self.generator, device=self.generator.device
        )
        self.register_buffer("probe", probe.detach(), persistent=False)
        self.register_buffer("labels", drawn.to(probe.device))
        self.add_state("drops", [], dist_reduce_fx="cat", persistent=True)
        self._copies = _Copies()

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Measure the drop of the loss on a fresh batch, and leave model and optimiser as they are."""
        drawn = torch.randperm(len(self.probe), generator=self.generator, device=self.generator.device)
        rows = drawn[: self.batch_size].to(self.probe.device)
        device = next((p.device for p in model.parameters()), self.probe.device)
        batch = self.probe[rows].to(device), self.labels[rows].to(device)
        try:
            before, after = _measure(model, optimizer, *batch, self.loss_fn, self._copies)
        except _NotFinite as error:
            raise ValueError(f"{error} in epoch {len(self.history)}") from error
        precise = torch.float32 if self.probe.device.type == "mps" else torch.float64
        self.drops.append(torch.tensor([before - after], dtype=precise, device=self.probe.device))

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean drop so far."""
        if not self.history:
            raise ValueError("model must have been measured before compute: call update first")
        return self._pooled().mean()

    @property
    def history(self) -> list[float]:
        """The drop of the loss at each update."""
        return self._pooled().tolist()

    def _pooled(self) -> Tensor:
        drops = self.drops  # a tensor once they were reduced over processes
        return torch.cat(list(drops)) if isinstance(drops, list) and drops else torch.as_tensor(drops)


def model_regions(susceptibility: Values, train_accuracy: Values) -> Int[ndarray, " m"]:
    """Return in which of four regions each of several models lies.

    Parameters
    ----------
    susceptibility, train_accuracy : array of shape (m,)
        Of two models or more, measured alike; accuracy is that on the noisy training labels.

    Returns
    -------
    ndarray of shape (m,)
        With the means over the models as thresholds: 1 trainable and resistant (accuracy at
        least, susceptibility at most the mean), 2 trainable and susceptible, 3 hardly
        trainable and resistant, 4 neither.

    Raises
    ------
    ValueError
        If there are fewer than two models, shapes differ, or a value is not finite.

    References
    ----------
    .. [1] Forouzesh, Sedghi, Thiran. Leveraging Unlabeled Data to Track Memorization. ICLR
       2023. Section 5.

    Examples
    --------
    >>> from posterity.labels import model_regions
    >>> model_regions([0.1, 0.9, 0.1, 0.9], [0.9, 0.9, 0.2, 0.2])
    array([1, 2, 3, 4])
    """
    zeta, accuracy = _models(susceptibility, train_accuracy)
    trainable, resistant = accuracy >= _mean(accuracy), zeta <= _mean(zeta)
    return np.where(trainable, np.where(resistant, 1, 2), np.where(resistant, 3, 4))


def select_models(susceptibility: Values, train_accuracy: Values) -> Int[ndarray, " chosen"]:
    """Return the models that are trainable and resistant, the most resistant first.

    Parameters
    ----------
    susceptibility, train_accuracy : array of shape (m,)
        As `model_regions` takes them.

    Returns
    -------
    ndarray
        Indices of region 1, by lower susceptibility and then by higher accuracy. If no model
        is in it, the one whose ranks in both add up to least.

    Raises
    ------
    ValueError
        As `model_regions`.

    References
    ----------
    .. [1] Forouzesh, Sedghi, Thiran. Leveraging Unlabeled Data to Track Memorization. ICLR
       2023. Section 5.

    Examples
    --------
    >>> from posterity.labels import select_models
    >>> select_models([0.3, 0.1, 0.9, 0.9], [0.9, 0.8, 0.9, 0.2])
    array([1, 0])
    """
    zeta, accuracy = _models(susceptibility, train_accuracy)
    order = np.lexsort((-accuracy, zeta))
    first = order[model_regions(zeta, accuracy)[order] == 1]
    if len(first):
        return first
    ranks = sum(np.searchsorted(np.sort(values), values)[order] for values in (zeta, -accuracy))
    return order[[np.argmin(ranks)]]


class _NotFinite(ValueError):
    """A loss is NaN or infinite."""


def _measure(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor,
    loss_fn: Callable[..., Tensor], copies: "_Copies",
) -> tuple[float, float]:  # fmt: skip
    _check(model, optimizer, x, y)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # grad mode too
        stack.enter_context(torch.enable_grad())
        x, y = (each.clone() if each.is_inference() else each.detach() for each in (x, y))
        stack.enter_context(_random_state(x.device))
        stack.enter_context(_undone(model, optimizer, copies))
        model.train()
        before = _loss(model, x, y, loss_fn)
        if not math.isfinite(phi := float(before.detach())):
            raise _NotFinite(f"the loss of model must be finite before the step, got {phi}")
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = float(_loss(model, x, y, loss_fn))
        if not math.isfinite(after):
            raise _NotFinite(f"the loss of model must be finite after the step, got {after}")
    return phi, after


def _loss(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
    out = model(x)
    return loss_fn(wide(out) if isinstance(out, Tensor) and out.is_floating_point() else out, y)


def _check(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise ValueError(f"{name} must be a tensor with a row an input, got {type(value).__name__}")
    if not len(x) or len(x) != len(y):
        raise ValueError(f"x and y must have one length, at least 1, got {len(x)} and {len(y)}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"optimizer must not need a closure, got {type(optimizer).__name__}")
    own = set(model.parameters())
    for g, group in enumerate(optimizer.param_groups):
        for k, parameter in enumerate(group["params"]):
            if parameter not in own:
                raise ValueError(
                    f"optimizer must have parameters of model only, parameter {k} of group {g}, of shape "
                    f"{tuple(parameter.shape)}, is not"
                )


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Put torch's random state back at the end, on the CPU and on the device."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        yield


_copy: Callable[[list[Tensor], list[Tensor]], None] = getattr(torch, "_foreach_copy_")  # noqa: B009


class _Copies:
    """Copies of tensors, whose memory is used again as long as they fit."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> None:
        facts = [[(t.shape, t.dtype, t.device) for t in some] for some in (self._kept, tensors)]
        if facts[0] != facts[1]:
            self._kept = [torch.empty_like(t) for t in tensors]
        if tensors:
            _copy(self._kept, list(tensors))

    def put_back(self, tensors: Sequence[Tensor]) -> None:
        if tensors:
            _copy(list(tensors), self._kept)


@contextmanager
def _undone(model: nn.Module, optimizer: torch.optim.Optimizer, copies: _Copies) -> Iterator[None]:
    """Leave model and optimiser as they were: the same objects with the same values."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    modes = [(module, module.training) for module in model.modules()]
    groups = [dict(group) for group in optimizer.param_groups]
    state = {key: _contents(entry) for key, entry in optimizer.state.items()}
    attributes = dict(vars(optimizer))  # a scheduler notes there that a step was taken
    entries = [
        value for each in (*state.values(), *groups) if isinstance(each, dict) for value in each.values()
    ]
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*stepped, *model.buffers(), *(value for value in entries if isinstance(value, Tensor))]
    with torch.no_grad():
        copies.take(tensors)
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            copies.put_back(tensors)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
        for group, was in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(was)
        for key in [key for key in optimizer.state if key not in state]:
            del optimizer.state[key]
        for key, was in state.items():
            optimizer.state[key] = was
        vars(optimizer).clear()
        vars(optimizer).update(attributes)


def _contents(entry: Any) -> Any:
    """Return what an entry of an optimiser's state holds: tensors themselves, copies of all else."""
    if not isinstance(entry, dict):
        return copy.deepcopy(entry)
    return {
        name: value if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in entry.items()
    }


def _models(susceptibility: Any, train_accuracy: Any) -> tuple[ndarray, ndarray]:
    given = {"susceptibility": susceptibility, "train_accuracy": train_accuracy}
    arrays = []
    for name, value in given.items():
        found, _ = array(name, value)
        if found.ndim != 1 or len(found) < 2 or found.dtype.kind not in "iuf":
            raise ValueError(f"{name} must be numbers of at least 2 models, got {found.dtype} {found.shape}")
        arrays.append(numbers(name, found)[0])
    if len(arrays[0]) != len(arrays[1]):
        raise ValueError(
            f"train_accuracy must have shape {arrays[0].shape} for susceptibility, got {arrays[1].shape}"
        )
    return arrays[0], arrays[1]


def _mean(values: ndarray) -> float:
    """Return the mean, which for equal values is theirs, whatever a sum rounds to."""
    return float(np.clip(np.mean(values / 2) * 2, values.min(), values.max()))
