r"""SAM: the gradient of a point uphill, taken as the step from here, finds flat minima.

A minimum is flat where the loss stays low around it. SAM goes uphill by a fixed length rho, along the
gradient, and descends with the gradient that it meets there:

.. math:: x \leftarrow x - \eta\, \nabla L\!\left(x + \rho\, \frac{\nabla L(x)}{\lVert\nabla L(x)\rVert}\right).

The length of the perturbation does not fall with the gradient, so that close to a minimum curvature is
all that a step sees. With the whole data's gradient in both places (n-SAM) the directions align with the
top eigenvector of the Hessian H, and along the minimisers SAM drifts as

.. math:: \mathrm dX/\mathrm d\tau = -\tfrac12 P\, \nabla \lambda_1(H(X)), \qquad \tau = \eta \rho^2 \times \text{steps},

the worst direction's sharpness, although it only ever looks along the gradient. With one sample's gradient
in both (1-SAM) it drifts along the gradient of Tr H instead: the average direction's. Which of them a
run of yours lowers, `posterity.optimization.limiting_sharpness` measures and `posterity.optimization.limit_flow` predicts.
"""

# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.optim import Optimizer

from posterity._checks import at_least, floating, has_shape, integer, one_of
from posterity._precision import NARROW, widened
from posterity.optimization._gradients import moving, real, total_norm

__all__ = ["SAM", "sam_gradient"]

Tensors = list[Tensor] | tuple[Tensor, ...]
GRADIENTS_AT_ONCE = 2**24  # numbers in gradients held together


class SAM(Optimizer):
    """Sharpness-aware minimisation around an optimiser of your choice.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor), or of dict
        What to optimise, in float32 or float64; each group may have ``rho``, ``adaptive`` and settings of
        the base optimiser of its own.
    base_optimizer : callable, default=torch.optim.SGD
        ``base_optimizer(params, **base_kwargs)`` makes the optimiser that takes the step. It sees the
        perturbed gradient only; momentum and weight decay are its.
    rho : float, default=0.05
        Length of the perturbation, at least 0; 0 is the base optimiser. 0.05 suits batches, 0.1 small groups.
        With groups, each one's own multiplies its share of the one direction.
    eps : float, default=1e-12
        Added to the norm of the gradient; at least 0. (One for the base optimiser goes into its group or
        into ``functools.partial``.)
    adaptive : bool, default=False
        ASAM: perturb by ``rho |x|^2 g / || |x| g ||``, which rescaling a layer does not change.
    **base_kwargs
        Settings of the base optimiser, such as ``lr``.

    Attributes
    ----------
    base_optimizer : Optimizer
        Has the groups and the state in common with this one.

    Raises
    ------
    ValueError
        If ``rho`` or ``eps`` is negative or not finite, a parameter is complex or in bfloat16 or float16,
        or ``base_optimizer`` makes no optimiser.

    See Also
    --------
    sam_gradient : The gradient alone, with a perturbation for each group of samples.

    Notes
    -----
    1. The norm is over all parameters of all groups together, and the gradient is not differentiated
       through the perturbation.
    2. A perturbation is smaller than the spacing of numbers in bfloat16 and float16, where SAM would
       be its base optimiser: keep the parameters in float32 under autocast.
    3. Of gradients that are not finite only a CPU tells without waiting. Elsewhere they make no perturbation,
       and reach the base optimiser.

    References
    ----------
    .. [1] Wen, Ma, Li. How Sharpness-Aware Minimization Minimizes Sharpness? ICLR 2023. Sections 3 and 4.
    .. [2] Foret et al. Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021.
    .. [3] Kwon et al. ASAM: Adaptive Sharpness-Aware Minimization. ICML 2021. Equation 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import SAM
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> optimizer = SAM([x], torch.optim.SGD, lr=0.1, rho=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**2).sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure)  # called twice; the loss of the first
    tensor(12.5000, grad_fn=<DivBackward0>)
    >>> x.detach()  # less a tenth of (3.3, 4.4)
    tensor([2.6700, 3.5600])

    In a loop of one's own, as with gradients in several parts or a ``torch.amp.GradScaler``, ``step``
    without a closure is the second half:

    >>> scaler = torch.amp.GradScaler("cpu")
    >>> scaler.scale((x**2).sum() / 2).backward()
    >>> optimizer.ascend()  # the length of the gradient does not matter: no unscaling
    >>> optimizer.zero_grad()
    >>> scaler.scale((x**2).sum() / 2).backward()
    >>> scaler.step(optimizer)  # parameters return to where they were, and step
    >>> scaler.update()
    """

    _step_supports_amp_scaling = (
        True  # a scaler calls `step` also where it overflowed: parameters must return
    )
    _held: tuple[list[Tensor], Tensors] | None = None  # those perturbed, and what they were
    _finite = True

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.05,
        eps: float = 1e-12,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        at_least("rho", rho, 0.0)
        self.eps = at_least("eps", eps, 0.0)
        self._copies: dict[Tensor, Tensor] = {}
        one_of("adaptive", adaptive, (False, True))
        made = base_optimizer(params, **base_kwargs)
        if not isinstance(made, Optimizer):
            raise ValueError(
                f"base_optimizer must make a torch.optim.Optimizer, got one of {type(made).__name__}"
            )
        self.base_optimizer = made
        super().__init__(made.param_groups, {**made.defaults, "rho": rho, "adaptive": adaptive})
        self.param_groups, self.state = made.param_groups, made.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, checked as the optimiser's are.

        Parameters
        ----------
        param_group : dict
            ``"params"``, and what differs from the defaults.
        """
        settings = {name: param_group.get(name, self.defaults[name]) for name in ("rho", "adaptive")}
        at_least("rho", settings["rho"], 0.0)
        one_of("adaptive", settings["adaptive"], (False, True))
        if self.param_groups is self.base_optimizer.param_groups:
            self.base_optimizer.add_param_group({**param_group, **settings})
        else:  # while it is made
            super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        real(params)
        for p in params:
            if p.dtype in NARROW:
                raise ValueError(
                    f"params must be in float32 or float64, got one in {str(p.dtype).removeprefix('torch.')}, "
                    "whose spacing is wider than the perturbation: keep float32 parameters under autocast"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Parameters
        ----------
        closure : callable, optional
            Zeroes gradients, evaluates the loss, calls ``backward`` and returns the loss. It is called twice.
            Left out after `ascend`, where the step is `descend`.

        Returns
        -------
        Tensor or None
            What ``closure`` returned the first time.

        Raises
        ------
        ValueError
            If there is no ``closure`` and no `ascend` before, or for the reasons of `ascend` and `descend`.
            Parameters are then where they were.
        """
        if closure is None:
            if self._held is None:
                raise ValueError("closure must be given where ascend was not called before, got None")
            return self.descend()
        with torch.enable_grad():
            loss = closure()
        self.ascend()
        try:
            if not self._finite:
                raise ValueError("closure must leave finite gradients of params, got NaN or infinity")
            with torch.enable_grad():
                closure()
        except BaseException:
            self._return()
            raise
        self.descend()
        return loss

    @torch.no_grad()
    def ascend(self) -> None:
        """Perturb the parameters along their gradients; those without one stay.

        Raises
        ------
        ValueError
            If `descend` did not follow the last call, no parameter has a gradient, or one is sparse.
        """
        if self._held is not None:
            raise ValueError(
                "params are perturbed already: descend must be called between one ascend and the next"
            )
        found = [moving(group["params"]) for group in self.param_groups]
        sizes: list[Tensors] = []
        directions: list[Tensors] = []
        for group, (params, grads) in zip(self.param_groups, found, strict=True):
            bent = bool(group["adaptive"] and params)
            sizes.append(torch._foreach_abs(params) if bent else [])
            directions.append(torch._foreach_mul(grads, sizes[-1]) if bent else grads)
        every = [each for part in directions for each in part]
        if not every:
            raise ValueError("closure must call backward, none of params has a gradient")
        norm = total_norm(every)
        held = [p for params, _ in found for p in params]
        before = [self._kept(p) for p in held]
        torch._foreach_copy_(before, held)
        self._held = held, before
        share = _share(norm, self.eps)
        self._finite = isinstance(share, Tensor) or math.isfinite(float(norm))
        for group, (params, _), part, size in zip(self.param_groups, found, directions, sizes, strict=True):
            if params:
                part = torch._foreach_mul(part, size) if size else part
                _add(params, part, share, -group["rho"] if group.get("maximize") else group["rho"])

    @torch.no_grad()
    def descend(self) -> None:
        """Return the parameters to where they were, and let the base optimiser step with the gradients of now.

        Raises
        ------
        ValueError
            If `ascend` was not called before, no parameter has a gradient, or (on the CPU) one of either
            half is not finite. Parameters have then returned. Within ``GradScaler.step`` there is
            no step instead.
        """
        if self._held is None:
            raise ValueError("params must be perturbed by ascend before descend")
        self._return()
        grads = [g for group in self.param_groups for g in moving(group["params"])[1]]
        if not grads:
            raise ValueError("closure must call backward, none of params has a gradient")
        overflow, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if overflow is not None:  # a GradScaler's step
            if float(overflow) or not self._finite:
                return
            if scale is not None:
                torch._foreach_mul_(grads, 1 / float(scale))
        elif not self._finite or ({g.device.type for g in grads} == {"cpu"} and not _all_finite(grads)):
            raise ValueError("closure must leave finite gradients of params, got NaN or infinity")
        self.base_optimizer.step()

    def _kept(self, p: Tensor) -> Tensor:
        """Return room for a copy, kept from step to step."""
        room = self._copies.get(p)
        if room is None or (room.shape, room.dtype, room.device) != (p.shape, p.dtype, p.device):
            self._copies[p] = room = torch.empty_like(p, requires_grad=False)
        return room

    def _return(self) -> None:
        assert self._held is not None
        (held, before), self._held = self._held, None
        torch._foreach_copy_(held, before)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer, "eps": self.eps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copies, self._held = {}, None
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})


def _share(norm: Tensor, eps: float) -> Tensor | float:
    """Return 1 / (norm + eps), 0 for 0 and what is not finite: a number on a CPU, where reading is free."""
    if norm.device.type != "cpu":
        return torch.where(norm.isfinite() & (norm > 0), 1 / (norm + eps), 0.0)
    length = float(norm)
    return 1 / (length + eps) if 0 < length < math.inf else 0.0


def _all_finite(grads: Tensors) -> bool:
    if len({g.dtype for g in grads}) > 1:
        return bool(total_norm(grads).isfinite())
    found = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones(()))  # one pass; times 1
    return not bool(found)


def _add(params: Tensors, part: Tensors, share: Tensor | float, rho: float) -> None:
    """Add rho * share * part to the parameters, without waiting for the number but on a CPU."""
    if not isinstance(share, Tensor):
        if {p.device.type for p in params} == {"cpu"}:
            torch._foreach_add_(params, part, alpha=min(max(rho * share, -3e38), 3e38))
            return
        share = torch.tensor(share)
    scale = (rho * share).to(part[0].dtype)
    if {p.device for p in part} == {scale.device}:
        torch._foreach_add_(params, torch._foreach_mul(part, scale))
    else:
        torch._foreach_add_(params, [each * scale.to(each.device) for each in part])


@torch.inference_mode(False)  # grad mode too
@widened
def sam_gradient(
    sample_loss: Callable[..., Tensor],
    params: Float[Tensor, " d"],
    *batch: Shaped[Tensor, "..."],
    rho: float,
    group_size: int | None = None,
    eps: float = 1e-12,
) -> Float[Tensor, " d"]:
    r"""Return the gradient of a SAM step, with one perturbation for each group of samples.

    .. math:: \sum_j \frac{|G_j|}{n} \nabla L_j\!\left(x + \rho\, \frac{\nabla L_j(x)}{\lVert\nabla L_j(x)\rVert}\right),

    L_j the mean loss of the group G_j.

    Parameters
    ----------
    sample_loss : callable
        ``sample_loss(params, *sample)`` is the loss of one sample, a scalar, made of operations that
        ``torch.func.vmap`` takes. For a module: ``torch.func.functional_call`` with the parts of ``params``.
    params : Tensor of shape (d,)
        x, a flat vector.
    *batch : Tensor
        At least one; the samples are in the first axis of each.
    rho : float
        Length of each perturbation, at least 0.
    group_size : int, optional
        Samples that share a perturbation, in the order given; the last group may be smaller. By default all
        of them (n-SAM); 1 perturbs for each sample (1-SAM, its mean over the batch).
    eps : float, default=1e-12
        Added to the norm, at least 0.

    Returns
    -------
    Tensor of shape (d,)
        The mean of the groups' gradients, each at its perturbed parameters, weighted by samples.

    Raises
    ------
    ValueError
        If a number is out of its range, ``params`` is not a floating-point vector, the tensors of ``batch``
        have no samples or numbers of them that differ, or ``sample_loss`` returns no scalar.

    References
    ----------
    Wen, Ma, Li. How Sharpness-Aware Minimization Minimizes Sharpness? ICLR 2023. Sections 4 and 5.

    Examples
    --------
    >>> import torch
    >>> from torch.func import functional_call
    >>> from torch.nn.utils import parameters_to_vector
    >>> from posterity.optimization import sam_gradient
    >>> model = torch.nn.Linear(3, 1)
    >>> named = dict(model.named_parameters())
    >>> def sample_loss(flat, x, y):
    ...     parts = flat.split([p.numel() for p in named.values()])
    ...     state = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
    ...     return (functional_call(model, state, (x,)).squeeze() - y) ** 2
    >>> flat = parameters_to_vector(model.parameters())
    >>> sam_gradient(sample_loss, flat, torch.randn(8, 3), torch.randn(8), rho=0.1, group_size=1).shape
    torch.Size([4])
    """
    at_least("rho", rho, 0.0)
    at_least("eps", eps, 0.0)
    has_shape("params", floating("params", params), (None,))
    n = _samples(batch)
    size = n if group_size is None else min(n, integer("group_size", group_size, 1))
    x = _plain(params)

    def gradient(x: Tensor, *group: Tensor) -> Tensor:
        def mean(x: Tensor) -> Tensor:
            losses = torch.vmap(sample_loss, in_dims=(None, *(0 for _ in group)))(x, *group)
            if losses.ndim != 1:
                raise ValueError(f"sample_loss must return a scalar, got shape {tuple(losses.shape[1:])}")
            return losses.mean()

        return torch.func.grad(mean)(x)

    def perturbed(*group: Tensor) -> Tensor:
        g = gradient(x, *group)
        return gradient(x + rho * _direction(g, eps), *group)

    whole = n // size
    groups = [_plain(part[: whole * size]).reshape(whole, size, *part.shape[1:]) for part in batch]
    total = torch.zeros_like(x)
    at_once = max(1, GRADIENTS_AT_ONCE // max(1, len(x)))
    for start in range(0, whole, at_once):
        some = [part[start : start + at_once] for part in groups]
        total += size * torch.vmap(perturbed)(*some).sum(0)
    if n % size:
        total += (n % size) * perturbed(*[_plain(part[whole * size :]) for part in batch])
    return (total / n).detach()


def _samples(batch: Sequence[Tensor]) -> int:
    """Return how many samples all tensors of a batch have."""
    if not batch:
        raise ValueError("batch must hold at least one tensor, got none")
    for part in batch:
        if not isinstance(part, Tensor) or not part.ndim:
            raise ValueError("batch must hold tensors with the samples in their first axis")
    lengths = {len(part) for part in batch}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(
            f"batch must hold tensors of one positive length, got {[len(part) for part in batch]}"
        )
    return lengths.pop()


def _plain(x: Tensor) -> Tensor:
    """Return a tensor without history, that autograd may keep."""
    return x.detach().clone() if x.is_inference() else x.detach()


def _direction(g: Tensor, eps: float) -> Tensor:
    """Return g / (||g|| + eps), 0 for 0, also where squares leave the range of the dtype."""
    top = g.abs().amax() if g.numel() else g.sum()
    top = torch.where(top > 0, top, 1.0)
    unit = g / top
    norm = torch.linalg.vector_norm(unit) + eps / top
    return unit / torch.where(norm > 0, norm, 1.0)
