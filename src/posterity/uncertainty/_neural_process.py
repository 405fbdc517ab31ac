"""What neural processes share: batches of padded tasks, their checks, likelihood and loss."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from posterity._checks import floating
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["NeuralProcess", "Tasks", "drawn", "log_prob", "mlp", "predictive_log_density", "tasks"]


class Tasks(NamedTuple):
    """A checked batch: padding is 0, masks are there. Context, then target."""

    x_context: Tensor
    y_context: Tensor
    x_target: Tensor
    y_target: Tensor
    context_mask: Tensor
    target_mask: Tensor


def tasks(
    x_context: Any, y_context: Any, x_target: Any = None, y_target: Any = None, context_mask: Any = None,
    target_mask: Any = None, *, dim_x: int | None = None, dim_y: int | None = None,
) -> Tasks:  # fmt: skip
    """Return the batch with padded entries set to 0, or say which argument does not fit.

    Without targets there are none, without their outputs they are zeros; without sizes,
    those of the context hold. Real entries are read, for NaN and infinity, on the CPU only.
    """
    n_tasks, n, dim_x = _set("x_context", x_context, None, None, dim_x).shape
    dim_y = _set("y_context", y_context, n_tasks, n, dim_y).shape[2]
    if x_target is None:
        x_target = x_context.new_zeros(n_tasks, 0, dim_x)
    m = _set("x_target", x_target, n_tasks, None, dim_x).shape[1]
    if y_target is None:
        y_target = y_context.new_zeros(n_tasks, m, dim_y)
    _set("y_target", y_target, n_tasks, m, dim_y)
    masks = []
    for name, mask, size in (("context_mask", context_mask, n), ("target_mask", target_mask, m)):
        if mask is None:
            mask = torch.ones(n_tasks, size, dtype=torch.bool, device=x_target.device)
        elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"{name} must be a tensor of bool, True for a real point, got {_kind(mask)}")
        elif mask.shape != (n_tasks, size):
            raise ValueError(f"{name} must have shape {(n_tasks, size)}, got {tuple(mask.shape)}")
        masks.append(mask)
    filled = []
    for name, value, mask, given in (
        ("x_context", x_context, masks[0], context_mask), ("y_context", y_context, masks[0], context_mask),
        ("x_target", x_target, masks[1], target_mask), ("y_target", y_target, masks[1], target_mask),
    ):  # fmt: skip
        value = value if given is None else value.masked_fill(~mask[..., None], 0)
        if value.device.type == "cpu" and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite where its mask is True, got NaN or infinity")
        filled.append(value)
    return Tasks(*filled, *masks)


def predictive_log_density(predictive: Normal | MultivariateNormal, y: Tensor, mask: Tensor) -> Tensor:
    """Return the log-density of the real targets: (..., B) for loc (..., B, M, Dy) or (B, M * Dy).

    It is float32 at least, and so are the others: a sum of many terms.
    """
    y = wide(y)
    if isinstance(predictive, Normal):
        return log_prob(predictive, y).masked_fill(~mask[..., None], 0).sum((-2, -1))
    if y.shape[-2] == 0:
        return y.sum((-2, -1))
    with torch.autocast(y.device.type, enabled=False):
        return _joint_log_density(predictive, y, mask)


def _joint_log_density(predictive: MultivariateNormal, y: Tensor, mask: Tensor) -> Tensor:
    keep = mask[..., None].expand_as(y).flatten(1)
    y = torch.where(keep, y.flatten(1), predictive.loc)
    # A target that is not there becomes an independent standard normal at its mean
    both = keep[:, :, None] & keep[:, None, :]
    covariance = torch.where(both, predictive.covariance_matrix, torch.diag_embed((~keep).to(y)))
    whole = bool(keep.all())
    joint = predictive if whole else MultivariateNormal(predictive.loc, covariance, validate_args=False)
    return joint.log_prob(y) + 0.5 * torch.log(y.new_tensor(2 * torch.pi)) * (~keep).sum(1)


def log_prob(normal: Normal, y: Tensor) -> Tensor:
    """Return the log-density of each value."""
    return Normal(wide(normal.loc), wide(normal.scale), validate_args=False).log_prob(wide(y))


def drawn(
    normal: Normal, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Return draws of a shape and dtype; a generator gives the same in every narrow one."""
    loc, where = wide(normal.loc), draw_device(generator, normal.loc.device)
    noise = torch.randn(shape, dtype=loc.dtype, device=where, generator=generator)
    return (loc + wide(normal.scale) * noise.to(loc.device)).to(dtype)


class NeuralProcess(nn.Module):
    """A conditional model of functions; a subclass has ``dim_x``, ``dim_y`` and ``forward``."""

    dim_x: int
    dim_y: int

    def _tasks(self, *args: Any) -> Tasks:
        return tasks(*args, dim_x=self.dim_x, dim_y=self.dim_y)

    def _predict(self, batch: Tasks) -> Normal | MultivariateNormal:
        raise NotImplementedError

    def log_likelihood(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, y_target: Tensor, *,
        context_mask: Tensor | None = None, target_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the log-density of the real targets of each task.

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        x_target, y_target : Tensor of shape (tasks, m, dim_x) and (tasks, m, dim_y)
        context_mask, target_mask : Tensor of shape (tasks, n) and (tasks, m), bool, optional
            True for a real point; what is padded has no effect.

        Returns
        -------
        Tensor of shape (tasks,)
            Summed over targets and outputs, in nats.

        Raises
        ------
        ValueError
            If sizes, masks or dtypes do not fit, or a real entry is not finite.
        """
        return self._density(x_context, y_context, x_target, y_target, context_mask, target_mask).to(
            y_target.dtype
        )

    def _density(self, *args: Any) -> Tensor:
        batch = self._tasks(*args)
        return predictive_log_density(self._predict(batch), batch.y_target, batch.target_mask)

    def loss(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, y_target: Tensor, *,
        context_mask: Tensor | None = None, target_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the mean over tasks of the negative log-likelihood a target.

        Parameters
        ----------
        x_context, y_context, x_target, y_target : Tensor
            As for `log_likelihood`.
        context_mask, target_mask : Tensor, optional
            As for `log_likelihood`; a task without a target counts as 0.

        Returns
        -------
        Tensor
            A scalar.
        """
        value = self._density(x_context, y_context, x_target, y_target, context_mask, target_mask)
        if target_mask is None:
            value = -value.mean() / max(x_target.shape[1], 1)
        else:
            value = -(value / target_mask.sum(1).clamp_min(1)).mean()
        return value.to(y_target.dtype)


def mlp(n_in: int, width: int, n_out: int, n_hidden: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a network of ``n_hidden`` layers of ``width`` and a linear one."""
    sizes = [n_in, *[width] * n_hidden]
    layers = [each for a, b in zip(sizes[:-1], sizes[1:], strict=True) for each in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_out))


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _set(name: str, value: Any, *sizes: int | None) -> Tensor:
    """Return a set of points of shape (tasks, points, size); None is any number."""
    shape = floating(name, value).shape
    if len(shape) != 3 or any(want not in (None, have) for want, have in zip(sizes, shape, strict=True)):
        words = ("tasks", "points", "size")
        wanted = ", ".join(
            word if want is None else str(want) for word, want in zip(words, sizes, strict=True)
        )
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(shape)}")
    return value
