r"""Sign and normalised descent: one buffer, and most of what Adam gains over SGD.

With the full batch there is no gradient noise left, and Adam still beats SGD on transformers. Adam
without its memory is sign descent: betas = (0, 0) and eps -> 0 make its step

.. math:: d_t = g_t / \sqrt{g_t^2} = \operatorname{sign}(g_t).

Both optimisers here average a direction d_t that has lost the gradient's size, entry by entry or as a whole,

.. math:: d_t = \operatorname{sign}(g_t) \quad\text{or}\quad g_t / \lVert g_t \rVert_p,
          \qquad b_t = \beta b_{t-1} + d_t, \qquad x_t = x_{t-1} - \eta\, b_t,

so the length of a step is said by the learning rate alone, and no loss can be too steep or too flat.
The first keeps what Adam wins at full batch; the second, which changes the size and not the
direction, does not. `posterity.optimization.compare_optimizers` asks the same of a network of yours.
"""

# pyright: reportPrivateImportUsage=false

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from posterity._checks import at_least, one_of, within
from posterity.optimization._gradients import moving, norms, real, total_norm

__all__ = ["NormalizedGD", "SignDescent"]

Gradients = list[list[Tensor]]


class _Descent(Optimizer):
    """Steps along an average of directions; what a direction is, the two optimisers say."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, checked as the optimiser's are.

        Parameters
        ----------
        param_group : dict
            ``"params"``, and what differs from the defaults.
        """
        settings = {**self.defaults, **param_group}
        at_least("lr", settings["lr"], 0.0)
        within("momentum", settings["momentum"], 0.0, 1.0, open_high=True)
        at_least("weight_decay", settings["weight_decay"], 0.0)
        self._check(settings)
        super().add_param_group(param_group)
        try:
            real(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Parameters
        ----------
        closure : callable, optional
            Zeroes gradients, evaluates the loss, calls ``backward`` and returns the loss.

        Returns
        -------
        Tensor or None
            What ``closure`` returned.

        Raises
        ------
        ValueError
            If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [moving(group["params"]) for group in self.param_groups]
        gradients = [grads for _, grads in found]
        if any(gradients):
            sizes = self._sizes(gradients)
            for group, (params, grads), size in zip(self.param_groups, found, sizes, strict=True):
                if params:
                    self._move(group, params, grads, size)
        return loss

    def _move(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], size: Tensor | None
    ) -> None:
        if group["foreach"] is False:
            for k, (p, g) in enumerate(zip(params, grads, strict=True)):
                self._together(group, [p], [g], size[k : k + 1] if size is not None and size.ndim else size)
        else:
            self._together(group, params, grads, size)

    def _together(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], size: Tensor | None
    ) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        step, scale = self._direction(group, grads, size)
        if momentum:
            buffers = []
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, step, alpha=scale)
            step, scale = self._after(group, buffers), 1.0
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_add_(params, step, alpha=(lr if group["maximize"] else -lr) * scale)

    def _check(self, settings: dict[str, Any]) -> None:
        """Check what only one of the optimisers has."""

    @abstractmethod
    def _sizes(self, gradients: Gradients) -> list[Tensor | None]:
        """Return, for each group, what all gradients together say about a step."""

    @abstractmethod
    def _direction(
        self, group: dict[str, Any], grads: list[Tensor], size: Tensor | None
    ) -> tuple[list[Tensor], float]:
        """Return what times a number is d_t for each gradient, and the number."""

    def _after(self, group: dict[str, Any], buffers: list[Tensor]) -> list[Tensor]:
        """Return the step that buffers say."""
        return buffers


class SignDescent(_Descent):
    """Descent along the signs of the gradient, with momentum.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        What to optimise; each group may have settings of its own. Real.
    lr : float, default=1e-3
        How far each entry moves in a step without momentum; at least 0. With momentum the steps add up
        to ``lr / (1 - momentum)`` where the sign stays.
    momentum : float, default=0.0
        In [0, 1).
    order : {"sign-then-momentum", "momentum-then-sign"}, default="sign-then-momentum"
        Whether signs are averaged, or the sign is that of averaged gradients (Signum).
    rescale : bool, default=False
        Multiply the signs by the sum of absolute values over all gradients: the gradient's size is
        kept and its direction changed, the opposite of normalising. With "sign-then-momentum" only.
    weight_decay : float, default=0.0
        Decoupled, as AdamW's: parameters are multiplied by ``1 - lr * weight_decay`` before the step.
    maximize : bool, default=False
        Step up the objective.
    foreach : bool, optional
        False goes through the parameters one by one.

    Raises
    ------
    ValueError
        If a setting is out of its range, a parameter is complex, or ``rescale`` goes with "momentum-then-sign" or
        parameters in float16.

    See Also
    --------
    NormalizedGD : Changes the size of the gradient and keeps its direction.
    compare_optimizers : Asks on your network what signs are worth.

    Notes
    -----
    1. In "momentum-then-sign" the buffer holds the sum of the gradients, m / (1 - momentum) of the usual
       average m: its sign is the same, and in float16 small gradients do not vanish.

    References
    ----------
    Kunstner, Chen, Lavington, Schmidt, "Noise is not the main factor behind the gap between SGD and Adam on
    transformers, but sign descent might be", ICLR 2023, Sections 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import SignDescent
    >>> x = torch.tensor([3.0, -0.001], requires_grad=True)
    >>> optimizer = SignDescent([x], lr=0.5)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()  # each entry by lr, however flat its direction is
    tensor([2.5000, 0.4990])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        order: Literal["sign-then-momentum", "momentum-then-sign"] = "sign-then-momentum",
        rescale: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "order": order, "rescale": rescale, "weight_decay": weight_decay,
            "maximize": maximize, "foreach": foreach,
        })  # fmt: skip

    def _check(self, settings: dict[str, Any]) -> None:
        order = one_of("order", settings["order"], ("sign-then-momentum", "momentum-then-sign"))
        if settings["rescale"] and order == "momentum-then-sign":
            raise ValueError("rescale must be False with order 'momentum-then-sign', got True")

    def _sizes(self, gradients: Gradients) -> list[Tensor | None]:
        wanted = [bool(group["rescale"]) for group in self.param_groups]
        if not any(wanted):
            return [None] * len(wanted)
        for grads, each in zip(gradients, wanted, strict=True):
            if each and any(g.dtype == torch.float16 for g in grads):
                raise ValueError(
                    "rescale must be False for parameters in float16, whose range the sum leaves"
                )
        total = total_norm([g for grads in gradients for g in grads], 1.0)
        return [total if each else None for each in wanted]

    def _direction(
        self, group: dict[str, Any], grads: list[Tensor], size: Tensor | None
    ) -> tuple[list[Tensor], float]:
        if group["order"] == "momentum-then-sign" and group["momentum"]:
            return grads, 1.0
        signs = list(torch._foreach_sign(grads))
        if size is not None:
            for sign in signs:
                sign.mul_(size.to(sign.device))
        return signs, 1.0

    def _after(self, group: dict[str, Any], buffers: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_sign(buffers)) if group["order"] == "momentum-then-sign" else buffers


class NormalizedGD(_Descent):
    """Gradient descent with steps of one length, with momentum.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        What to optimise; each group may have settings of its own. Real.
    lr : float, default=1e-2
        The length of a step without momentum, in the norm; at least 0.
    momentum : float, default=0.0
        In [0, 1).
    norm : float, default=2.0
        p of the p-norm; greater than 0, may be infinite.
    scope : {"all", "tensor"}, default="all"
        Whether the norm is that of all gradients of all groups as one vector, or of each tensor.
    weight_decay : float, default=0.0
        Decoupled, as AdamW's: parameters are multiplied by ``1 - lr * weight_decay`` before the step.
    maximize : bool, default=False
        Step up the objective.
    foreach : bool, optional
        False goes through the parameters one by one.

    Raises
    ------
    ValueError
        If a setting is out of its range, or a parameter is complex.

    See Also
    --------
    SignDescent : Changes the direction of the gradient too.

    Notes
    -----
    1. A gradient of zero makes no step; the official code divides by its norm and has NaN.
    2. ``scope="tensor"`` divides by the 2-norm unless told otherwise; the official code's default there is p = 1.

    References
    ----------
    Kunstner, Chen, Lavington, Schmidt, "Noise is not the main factor behind the gap between SGD and Adam on
    transformers, but sign descent might be", ICLR 2023, Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import NormalizedGD
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optimizer = NormalizedGD([x], lr=0.5)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.detach()
    tensor([2.7000, 3.6000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        momentum: float = 0.0,
        norm: float = 2.0,
        scope: Literal["all", "tensor"] = "all",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "norm": norm, "scope": scope, "weight_decay": weight_decay,
            "maximize": maximize, "foreach": foreach,
        })  # fmt: skip

    def _check(self, settings: dict[str, Any]) -> None:
        one_of("scope", settings["scope"], ("all", "tensor"))
        within("norm", settings["norm"], 0.0, float("inf"), open_low=True)

    def _sizes(self, gradients: Gradients) -> list[Tensor | None]:
        every = [g for grads in gradients for g in grads]
        whole = {}  # one norm for all groups that ask for the same
        sizes: list[Tensor | None] = []
        for group, grads in zip(self.param_groups, gradients, strict=True):
            order = group["norm"]
            if group["scope"] == "tensor":
                sizes.append(norms(grads, order) if grads else None)
            else:
                whole[order] = whole[order] if order in whole else total_norm(every, order)
                sizes.append(whole[order])
        return sizes

    def _direction(
        self, group: dict[str, Any], grads: list[Tensor], size: Tensor | None
    ) -> tuple[list[Tensor], float]:
        assert size is not None
        if size.device.type == "cpu" and not size.ndim and 1e-30 < float(size) < 1e30:
            return grads, 1 / float(size)  # no tensors in between, and a CPU need not wait for the number
        length = torch.where(size > 0, size, 1.0)  # no gradient, no step
        each = list(length) if length.ndim else [length] * len(grads)
        return [g / part.to(g.device) for g, part in zip(grads, each, strict=True)], 1.0
