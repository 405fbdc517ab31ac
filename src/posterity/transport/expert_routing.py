"""Routing by transport: which expert sees which token, with a cap on what each takes.

Tokens of mass 1 are carried to experts of mass tokens / experts, at a cost of minus their
similarity, by a sparsity-constrained plan (`posterity.transport.sparse_ot`): a cap on
experts keeps each from overflowing, a cap on tokens sends each to k experts at most. The
weight of a token at an expert is their similarity where the plan joins them, else 0,

    combine = (plan > 0) * softmax(W x),                                      (1)

so the plan decides where tokens go, and the gradient trains the similarity.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer, one_of
from posterity._precision import wide
from posterity.transport.sparse_ot import _adam, _Problem

__all__ = ["SparseTransportRouter"]


class Routing(NamedTuple):
    """Which expert sees which token.

    Attributes
    ----------
    dispatch : Tensor
        Whether a token goes to an expert, shape (batch, tokens, n_experts).
    combine : Tensor
        With what weight the expert's output counts, 0 where it is not sent; it carries
        the gradient.
    plan : Tensor
        The transport plan, without gradient.
    """

    dispatch: Bool[Tensor, "batch tokens experts"]
    combine: Float[Tensor, "batch tokens experts"]
    plan: Float[Tensor, "batch tokens experts"]


class SparseTransportRouter(nn.Module):
    """Router of a mixture of experts: a transport plan with a cap on each expert or token.

    Similarities are the softmax over experts of a linear map of the tokens. Each token
    has mass 1 and each expert mass tokens / experts, and the plan is that of a few Adam
    steps on the semi-dual at cost ``-similarity``.

    Parameters
    ----------
    dim : int
        Features of a token, at least 1.
    n_experts : int
        Number of experts, at least 1.
    k : int, optional
        The cap, at least 1. Default for "tokens": ``ceil(capacity_factor * tokens /
        n_experts)``; for "experts" it must be given.
    capacity_factor : float, default=1.0
        How many times its even share an expert may take, greater than 0; below 1 some
        tokens are left out. Used where ``k`` is not given.
    choose : {"experts", "tokens"}, default="tokens"
        Whether each expert takes at most k tokens, or each token at most k experts.
    reg : float, default=1.0
        Weight of the squared norm of the plan, greater than 0.
    n_steps : int, default=20
        Adam steps, at least 0.
    lr : float, default=1e-2
        Their learning rate, greater than 0.

    Raises
    ------
    ValueError
        If an argument is out of range, or ``x`` does not have ``dim`` features.

    Notes
    -----
    Departures from the official code:

    1. The default cap is not rounded up to a multiple of 4.
    2. Of the Adam steps the best one by dual value counts, not the last.
    3. No noise is added to the logits.

    References
    ----------
    .. [1] Liu, Puigcerver, Blondel. Sparsity-Constrained Optimal Transport. ICLR 2023.
       Official code: google-research/vmoe, projects/sparsity_constrained_ot.

    Examples
    --------
    >>> import torch
    >>> from posterity.transport import SparseTransportRouter
    >>> router = SparseTransportRouter(8, n_experts=4)
    >>> routing = router(torch.randn(2, 12, 8))
    >>> routing.combine.shape
    torch.Size([2, 12, 4])
    >>> bool((routing.dispatch.sum(1) <= 3).all())  # 12 tokens, 4 experts
    True
    """

    def __init__(
        self,
        dim: int,
        n_experts: int,
        *,
        k: int | None = None,
        capacity_factor: float = 1.0,
        choose: Literal["experts", "tokens"] = "tokens",
        reg: float = 1.0,
        n_steps: int = 20,
        lr: float = 1e-2,
    ) -> None:
        super().__init__()
        self.dim, self.n_experts = integer("dim", dim, 1), integer("n_experts", n_experts, 1)
        self.choose = one_of("choose", choose, ("experts", "tokens"))
        if k is None and choose == "experts":
            raise ValueError("k must be given with choose='experts': how many experts a token may have")
        self.k = k if k is None else integer("k", k, 1)
        self.capacity_factor = at_least("capacity_factor", capacity_factor, 0, strict=True)
        self.reg = at_least("reg", reg, 0, strict=True)
        self.n_steps, self.lr = integer("n_steps", n_steps, 0), at_least("lr", lr, 0, strict=True)
        self.gate = nn.Linear(dim, n_experts, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Routing:
        """Route tokens to experts.

        Parameters
        ----------
        x : Tensor
            Tokens, shape (batch, tokens, dim); each of the batch is routed on its own.

        Returns
        -------
        Routing
            Dispatch, combine weights and plan, each of shape (batch, tokens, n_experts).
        """
        has_shape("x", floating("x", x), (None, None, self.dim), f"dim={self.dim}")
        n_tokens = x.shape[1]
        if n_tokens == 0:
            raise ValueError("x must hold at least one token, got none")
        k = self.k or math.ceil(self.capacity_factor * n_tokens / self.n_experts)
        with torch.autocast(x.device.type, enabled=False):  # rounding would send tokens elsewhere
            similarity = F.linear(wide(x), wide(self.gate.weight)).softmax(-1)
        with torch.no_grad():
            cost = -similarity
            token = cost.new_ones(len(x), n_tokens)
            expert = cost.new_full((len(x), self.n_experts), n_tokens / self.n_experts)
            if self.choose == "tokens":
                problem = _Problem(token, expert, cost.mT.contiguous(), k, self.reg, True)
            else:
                problem = _Problem(expert, token, cost, k, self.reg, True)
            prices, _ = _adam(problem, self.n_steps, self.lr)
            plan = problem.plan(problem.evaluate(prices))
            plan = (plan.mT if self.choose == "tokens" else plan).contiguous()
        dispatch = plan > 0
        return Routing(dispatch, (dispatch * similarity).to(x.dtype), plan.to(x.dtype))

    def extra_repr(self) -> str:
        """Return the settings."""
        cap = self.k if self.k is not None else f"{self.capacity_factor:g} * tokens / n_experts"
        return f"n_experts={self.n_experts}, choose={self.choose!r}, k={cap}"
