"""An optimiser under a mask: what may not move stays, to the bit, where it is.

Masking the gradient is not enough. Weight decay shrinks every weight, and momentum goes on
moving one that was masked; so after each step of the optimiser inside

    theta = m theta + (1 - m) theta_o,

and what it has gathered for the masked weights is cleared.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = ["MaskedOptimizer", "masked_step"]

Mask = Mapping[str, Bool[Tensor, "..."]]


def masked_step(
    optimizer: torch.optim.Optimizer,
    mask: Mapping[Tensor, Bool[Tensor, "..."]],
    anchors: Mapping[Tensor, Tensor],
    *,
    closure: Callable[[], Any] | None = None,
) -> Any:
    """Take a step of an optimiser in which weights outside a mask stay exactly where they were.

    Parameters
    ----------
    optimizer : Optimizer
        With gradients in place, or a closure that makes them.
    mask, anchors : dict of Tensor to Tensor
        For each parameter of the optimiser, keyed by the parameter itself: True where it may move, and
        where it shall stay elsewhere.
    closure : callable, optional
        As ``optimizer.step`` takes it.

    Returns
    -------
    Any
        What the step returns: None, or the loss of the closure.

    Raises
    ------
    ValueError
        If a parameter has no mask or anchor of its shape.

    Notes
    -----
    Outside the mask gradients are set to 0 before the step; after it weights are put back, which
    weight decay would have moved, and entries of the state that have the parameter's shape, such as
    momentum, are set to 0.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import masked_step
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.sum().backward()
    >>> sgd = torch.optim.SGD([w], lr=0.5, weight_decay=0.1)
    >>> masked_step(sgd, {w: torch.tensor([True, False])}, {w: torch.ones(2)})
    >>> w.data
    tensor([0.4500, 1.0000])
    """
    held = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        for name, given in (("mask", mask), ("anchors", anchors)):
            if p not in given or given[p].shape != p.shape:
                raise ValueError(
                    f"{name} must have a tensor of shape {tuple(p.shape)} for that parameter of optimizer"
                )
        held.append(_Held(p, mask[p], anchors[p]))
    return _step(optimizer, held, closure)


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimiser that moves only what a mask allows; all else stays where it is now, to the bit.

    Parameters
    ----------
    optimizer : Optimizer
        Any of torch. Its groups and its state are shared, so learning rates set on either count.
    named_parameters : iterable of tuple of str and Parameter
        As ``model.named_parameters()``; all parameters of the optimiser are among them.
    mask : dict of str to Tensor
        As `saliency_mask` returns it: the same names, bool, True where a weight may move.

    Attributes
    ----------
    optimizer : Optimizer
        The one given.

    Raises
    ------
    ValueError
        If names, shapes or dtypes of the mask do not match, or the optimiser has other parameters.

    Notes
    -----
    Each step is a `masked_step`. The official code masked gradients alone at first, which weight
    decay and momentum undo.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import MaskedOptimizer, saliency_mask
    >>> net, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 1])
    >>> mask, before = saliency_mask(net, (x, y), keep=0.5), net.weight.detach().clone()
    >>> adam = torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1)
    >>> optimizer = MaskedOptimizer(adam, net.named_parameters(), mask)
    >>> torch.nn.functional.cross_entropy(net(x), y).backward()
    >>> optimizer.step()
    >>> torch.equal(net.weight != before, mask["weight"])
    True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        mask: Mask,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        named = dict(named_parameters)
        _fits(mask, named)
        masks = {p: mask[name] for name, p in named.items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            if p not in masks:
                raise ValueError(
                    f"named_parameters must have every parameter of optimizer, one of shape {tuple(p.shape)} is missing"
                )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._held = [_Held(p, masks[p], p) for p in parameters]
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step under the mask; return the loss of the closure, if there is one."""
        return _step(self.optimizer, self._held, closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimiser; mask and anchors are not in it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the optimiser."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer, "_held": self._held}

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


class _Held:
    """What of a parameter may move, and the rest of it, as bits: exact, and faster than choosing."""

    def __init__(self, parameter: Tensor, mask: Tensor, anchor: Tensor) -> None:
        self.parameter = parameter
        self.free = _bits(mask.to(parameter.device), parameter.dtype)  # ones where it may move
        self.rest = anchor.detach().to(parameter).view(self.free.dtype) & ~self.free

    def clear(self, values: Tensor) -> None:
        """Set values of the parameter's shape to 0 where it may not move, NaN and infinity too."""
        free = self.free
        if values.element_size() != free.element_size():
            free = _bits(free != 0, values.dtype)
        values.view(free.dtype).bitwise_and_(free)

    def put_back(self) -> None:
        self.clear(self.parameter)
        self.parameter.view(self.rest.dtype).bitwise_or_(self.rest)


def _bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if dtype.itemsize not in whole:
        raise ValueError(f"named_parameters must have 16, 32 or 64 bits, got {dtype}")
    return -mask.to(whole[dtype.itemsize])


def _step(optimizer: torch.optim.Optimizer, held: list[_Held], closure: Callable[[], Any] | None) -> Any:
    @torch.no_grad()
    def clear_gradients() -> None:
        for each in held:
            if each.parameter.grad is not None:
                each.clear(each.parameter.grad)

    def masked(closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            value = closure()
        clear_gradients()
        return value

    if closure is None:
        clear_gradients()
        value = optimizer.step()
    else:
        value = optimizer.step(lambda: masked(closure))
    with torch.no_grad():
        for each in held:
            each.put_back()
            for entry in optimizer.state.get(each.parameter, {}).values():
                # of a number alone it may be the count of steps
                if isinstance(entry, Tensor) and entry.shape == each.parameter.shape and entry.ndim:
                    each.clear(entry)
    return value


def _fits(mask: Any, named: Mapping[str, Tensor]) -> None:
    """Refuse a mask of other names, shapes or dtypes than the parameters have."""
    if not isinstance(mask, Mapping) or set(mask) != set(named):
        odd = (
            sorted(set(mask) ^ set(named), key=str)[:1] if isinstance(mask, Mapping) else type(mask).__name__
        )
        raise ValueError(f"mask must have the names of the parameters, they differ in {odd}")
    for name, p in named.items():
        if mask[name].shape != p.shape or mask[name].dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(p.shape)} for {name}, "
                f"got {mask[name].dtype} {tuple(mask[name].shape)}"
            )
