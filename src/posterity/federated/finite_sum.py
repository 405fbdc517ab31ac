"""A mean of losses over the rows that honest workers hold: what distributed solvers work on.

Worker i holds rows z_1 .. z_m, the same as all others or its own, and f_i(x) is its mean loss; the
sum that is minimised is the mean of the f_i. The gradients of all workers, on a batch each or on all
rows, come as the rows of one matrix.
"""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import floating, has_shape, integer, one_of
from posterity._random import draw_device

__all__ = ["FiniteSum"]


@runtime_checkable
class Problem(Protocol):
    """What the solvers ask of a sum of losses over the rows of honest workers."""

    n_samples: int
    n_workers: int

    def grad(self, x: Tensor, idx: Tensor) -> Tensor:
        """Return the gradient of each worker's mean loss on a batch of its rows."""
        ...

    def full_grad(self, x: Tensor) -> Tensor:
        """Return the gradient of each worker's mean loss."""
        ...


class FiniteSum:
    """A mean of losses over rows that honest workers hold, with all their gradients at once.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(x, *batch) -> scalar``: the mean over the rows of a batch, with any regulariser, of
        parameters ``x`` of shape (d,), in operations that ``torch.func`` can map.
    data : tuple of Tensor
        Rows, with equal first axes.
    n_workers : int
        Honest ones.
    split : {"shared", "disjoint"}, default="shared"
        Whether each holds all rows, the homogeneous case, or rows are dealt out in equal parts,
        at random; what is left over is not used.
    generator : torch.Generator, optional
        Deals rows out.
    gradient : callable, optional
        ``gradient(x, *batches) -> (k, d)``: the gradient of the loss in closed form, for k batches at once,
        (k, b, ...) each; several times faster than by autograd, as which it is by default computed.
    smoothness : Tensor of shape (rows,), optional
        Smoothness constants of the losses of single rows, positive: for ``sampling="importance"``.

    Attributes
    ----------
    n_samples, n_workers : int
        Rows of a worker, and honest workers.
    smoothness : Tensor of shape (n_workers, n_samples), or None

    Raises
    ------
    ValueError
        If rows differ in number, or are fewer than workers that share them out.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated import FiniteSum
    >>> rows = torch.tensor([[0.0], [2.0], [4.0]])
    >>> problem = FiniteSum(lambda x, a: ((x - a) ** 2).mean() / 2, (rows,), n_workers=2)
    >>> problem.full_grad(torch.zeros(1))
    tensor([[-2.],
            [-2.]])
    >>> problem.grad(torch.zeros(1), torch.tensor([[0, 1], [2, 2]]))
    tensor([[-1.],
            [-4.]])
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        data: tuple[Tensor, ...],
        *,
        n_workers: int,
        split: Literal["shared", "disjoint"] = "shared",
        generator: torch.Generator | None = None,
        gradient: Callable[..., Tensor] | None = None,
        smoothness: Float[Tensor, " rows"] | None = None,
    ) -> None:
        self.n_workers = integer("n_workers", n_workers, 1)
        one_of("split", split, ("shared", "disjoint"))
        rows = {len(part) for part in data}
        if len(rows) != 1 or rows == {0}:
            raise ValueError(f"data must be tensors with equally many rows, got {sorted(rows)}")
        n = rows.pop()
        if smoothness is not None and (smoothness.shape != (n,) or not bool((smoothness > 0).all())):
            raise ValueError(f"smoothness must be {n} positive numbers, got shape {tuple(smoothness.shape)}")
        self.loss_fn, self.gradient, self.shared = loss_fn, gradient, split == "shared"
        if self.shared:
            self.n_samples, self._data = n, tuple(data)
            self.smoothness = None if smoothness is None else smoothness.expand(n_workers, n)
            return
        self.n_samples = n // n_workers
        if self.n_samples == 0:
            raise ValueError(
                f"n_workers must be at most the number of rows {n} for disjoint parts, got {n_workers}"
            )
        order = torch.randperm(n, generator=generator, device=draw_device(generator))
        order = order[: self.n_samples * n_workers].view(n_workers, -1)
        self._data = tuple(part[order.to(part.device)] for part in data)
        self.smoothness = None if smoothness is None else smoothness[order.to(smoothness.device)]

    def _rows(self, idx: Tensor) -> tuple[Tensor, ...]:
        has_shape("idx", idx, (self.n_workers, None), "the workers of FiniteSum")
        worker = torch.arange(self.n_workers, device=idx.device)[:, None]
        try:
            return tuple(part[idx] if self.shared else part[worker, idx] for part in self._data)
        except IndexError as error:
            raise ValueError(f"idx must be in [0, {self.n_samples}): {error}") from error

    @torch.inference_mode(False)
    def grad(
        self,
        x: Float[Tensor, " d"],
        idx: Int[Tensor, "workers b"],
        weights: Float[Tensor, "workers b"] | None = None,
    ) -> Float[Tensor, "workers d"]:
        """Return the gradient of each worker's mean loss on a batch.

        Parameters
        ----------
        x : Tensor of shape (d,)
        idx : Tensor of shape (n_workers, b)
            Rows of each worker, from 0 to ``n_samples - 1``.
        weights : Tensor of shape (n_workers, b), optional
            Of the rows: the mean of weight times gradient, row by row.

        Returns
        -------
        Tensor of shape (n_workers, d)
        """
        return self._of_batch(x, self._rows(idx), weights)

    @torch.inference_mode(False)
    def change(
        self,
        x: Float[Tensor, " d"],
        before: Float[Tensor, " d"],
        idx: Int[Tensor, "workers b"],
        weights: Float[Tensor, "workers b"] | None = None,
    ) -> Float[Tensor, "workers d"]:
        """Return by how much the gradients on a batch differ between two points, in one pass over its rows.

        Parameters
        ----------
        x, before : Tensor of shape (d,)
        idx, weights : Tensor of shape (n_workers, b)
            As for ``grad``.

        Returns
        -------
        Tensor of shape (n_workers, d)
        """
        rows = self._rows(idx)
        if weights is not None or self.gradient is not None:
            return self._of_batch(x, rows, weights) - self._of_batch(before, rows, weights)
        points = torch.stack([x, before]).repeat_interleave(self.n_workers, 0)
        twice = tuple(torch.cat([part, part]) for part in rows)
        return torch.sub(*self._backward(points, twice).chunk(2))

    @torch.inference_mode(False)
    def full_grad(self, x: Float[Tensor, " d"]) -> Float[Tensor, "workers d"]:
        """Return the gradient of each worker's mean loss on all of its rows.

        Parameters
        ----------
        x : Tensor of shape (d,)

        Returns
        -------
        Tensor of shape (n_workers, d)
        """
        if self.shared:
            return self._gradients(x, tuple(part[None] for part in self._data)).expand(self.n_workers, -1)
        return self._gradients(x, self._data)

    def _of_batch(self, x: Tensor, rows: tuple[Tensor, ...], weights: Tensor | None) -> Tensor:
        if weights is None:
            return self._gradients(x, rows)
        single = tuple(part.flatten(0, 1)[:, None] for part in rows)
        grads = self._gradients(x, single).view(*weights.shape, -1)
        return torch.einsum("wb,wbd->wd", weights.to(grads), grads) / weights.shape[1]

    def _gradients(self, x: Tensor, batches: tuple[Tensor, ...]) -> Tensor:
        """Return the gradient at a point on each batch."""
        if self.gradient is not None:
            found = self.gradient(x, *batches)
            if found.shape != (len(batches[0]), *x.shape):
                raise ValueError(
                    f"gradient must return {(len(batches[0]), *x.shape)}, a row a batch, got {tuple(found.shape)}"
                )
            return found
        return self._backward(x.expand(len(batches[0]), -1), batches)

    def _backward(self, points: Tensor, batches: tuple[Tensor, ...]) -> Tensor:
        """Return the gradient at each point on its batch: the loss is mapped, one backward pass has all."""
        floating("x", points)
        with torch.enable_grad():
            each = points.detach().clone().requires_grad_()
            return torch.autograd.grad(torch.func.vmap(self.loss_fn)(each, *batches).sum(), each)[0]
