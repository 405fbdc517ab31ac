"""Conditional neural process: a network of the sum of embedded points, read at each target.

With an embedding h of a point and a decoder g, both learned,

    (mean, raw)(x) = g( sum_n h(x_n, y_n), x ),       variance = softplus(raw) + 1e-6.      (1)

A sum forgets the order of its points and takes any number of them, none included. And one more
point is one more term: predictions from a context that grows point by point are prefix sums.
"""

from collections.abc import Generator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F

from posterity._checks import integer
from posterity._precision import wide
from posterity.uncertainty._neural_process import NeuralProcess, Tasks, log_prob, mlp

__all__ = ["CNP"]


class _Sums(NeuralProcess):
    """A neural process into which the context enters as a sum over its points.

    A subclass says where sums live (`_place`, a grid or nothing), what a point adds
    (`_points`, float32 at least, as sums are) and what a sum predicts (`_at`).
    """

    def _place(self, batch: Tasks) -> Tensor | None:
        return None

    def _points(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _sum(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        return self._points(x, y, mask, place).sum(1)

    def _at(self, total: Tensor, x: Tensor, place: Tensor | None) -> Normal:
        raise NotImplementedError

    def _predict(self, batch: Tasks) -> Normal:
        place = self._place(batch)
        total = self._sum(batch.x_context, batch.y_context, batch.context_mask, place)
        return self._at(total, batch.x_target, place)

    def forward(
        self,
        x_context: Float[Tensor, "tasks n dim_x"],
        y_context: Float[Tensor, "tasks n dim_y"],
        x_target: Float[Tensor, "tasks m dim_x"],
        *,
        context_mask: Bool[Tensor, "tasks n"] | None = None,
    ) -> Normal:
        """Return the marginal predictions at the targets.

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        x_target : Tensor of shape (tasks, m, dim_x)
        context_mask : Tensor of shape (tasks, n), bool, optional
            True for a real point.

        Returns
        -------
        Normal
            loc and scale of shape (tasks, m, dim_y).
        """
        return self._predict(self._tasks(x_context, y_context, x_target, None, context_mask))

    def _factors(self, batch: Tasks, chunk_size: int) -> Tensor:
        """Return the log-density of each target given those before it: (tasks, m)."""
        place = self._place(batch)
        start = self._sum(batch.x_context, batch.y_context, batch.context_mask, place)
        m = batch.x_target.shape[1]
        terms, size = [], max(1, chunk_size // max(m, 1))
        for rows in torch.arange(len(start)).split(size):  # some tasks with all their targets
            one = Tasks(*(part[rows] for part in batch))
            added = self._points(one.x_target, one.y_target, one.target_mask, place)
            before = start[rows, None] + added.cumsum(1) - added
            predictive = self._at(before.flatten(0, 1), one.x_target.reshape(-1, 1, self.dim_x), place)
            each = log_prob(predictive, one.y_target.reshape(-1, 1, self.dim_y))
            terms.append(each.sum((1, 2)).view(len(rows), m))
        return torch.cat(terms)

    def _walk(self, batch: Tasks) -> Generator[Normal, Tensor, None]:
        """Yield the prediction of each target, taking its draw; then of all, given all draws."""
        place = self._place(batch)
        total = self._sum(batch.x_context, batch.y_context, batch.context_mask, place)
        for k in range(batch.x_target.shape[1]):
            x = batch.x_target[:, k : k + 1]
            y = yield self._at(total, x, place)
            total = total + self._sum(x, y, batch.target_mask[:, k : k + 1], place)
        yield self._at(total, batch.x_target, place)


class CNP(_Sums):
    """Conditional neural process: a sum of embedded points, decoded at each target.

    Parameters
    ----------
    dim_x, dim_y : int
        Sizes of inputs and outputs of the functions.
    dim_hidden : int, default=256
        Width, and size of the sum.
    n_encoder_layers, n_decoder_layers : int
        Hidden layers.

    Raises
    ------
    ValueError
        If a size is less than 1.

    References
    ----------
    .. [1] Garnelo et al. Conditional Neural Processes. ICML 2018.
    .. [2] Bruinsma et al. Autoregressive Conditional Neural Processes. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import CNP
    >>> model = CNP(dim_x=1, dim_y=1)
    >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)  # 4 functions, 10 points each
    >>> model(x[:, :6], y[:, :6], x[:, 6:]).scale.shape
    torch.Size([4, 4, 1])
    """

    def __init__(
        self, dim_x: int, dim_y: int, *, dim_hidden: int = 256, n_encoder_layers: int = 3, n_decoder_layers: int = 6
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim_x, self.dim_y = integer("dim_x", dim_x, 1), integer("dim_y", dim_y, 1)
        integer("dim_hidden", dim_hidden, 1)
        integer("n_encoder_layers", n_encoder_layers, 1)
        integer("n_decoder_layers", n_decoder_layers, 1)
        self.encoder = mlp(dim_x + dim_y, dim_hidden, dim_hidden, n_encoder_layers)
        self.decoder = mlp(dim_hidden + dim_x, dim_hidden, 2 * dim_y, n_decoder_layers)

    def _points(self, x: Tensor, y: Tensor, mask: Tensor, place: Tensor | None) -> Tensor:
        return wide(self.encoder(torch.cat([x, y], dim=-1))).masked_fill(~mask[..., None], 0)

    def _at(self, total: Tensor, x: Tensor, place: Tensor | None) -> Normal:
        total = total.to(x.dtype)[:, None].expand(-1, x.shape[1], -1)
        return _normal(*self.decoder(torch.cat([total, x], dim=-1)).chunk(2, dim=-1))


def _normal(mean: Tensor, raw: Tensor) -> Normal:
    scale = (1e-6 + F.softplus(wide(raw))).sqrt()
    return Normal(mean, scale.to(mean.dtype), validate_args=False)
