"""Robust training over groups, anchored to where each group lies between the others.

    min over theta, max over q in the simplex of  sum_e q_e R_e(theta) - (lambda / 2) ||q - p||^2       (1)

R_e is the mean loss of group e and p the topology prior: groups through which the shortest paths of a graph of
groups run count more. Worst-group training (lambda -> 0) spends itself on the hardest group, which may be an
outlier; lambda -> infinity weights the groups by p for good. In between q leaves p as far as the losses pull.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posterity._checks import at_least, class_indices, floating, has_shape, one_of
from posterity._precision import NARROW, wide, widened

__all__ = ["TopologyAwareDRO", "project_simplex", "worst_case_weights"]


class TopologyAwareDRO(nn.Module):
    """The loss of (1): group losses times weights that follow them, near a prior.

    Parameters
    ----------
    prior : Tensor of shape (g,)
        The topology prior p, on the simplex: `topology_prior`, or any other weights of the groups 0 .. g - 1.
    eta : float, default=0.1
        Step of the weights, greater than 0; only of ``update="gradient"``.
    strength : float, default=1.0
        lambda of (1), greater than 0: how strongly the weights are held to the prior.
    update : {"gradient", "exact"}, default="gradient"
        One projected gradient step of the weights a call, or the maximiser of (1) for the losses of the call.

    Attributes
    ----------
    prior, weights : Tensor of shape (g,)
        Buffers, float32 at least. The weights start uniform, and stay in eval mode.

    Raises
    ------
    ValueError
        If an argument is out of range, or losses are not finite (looked at on the CPU, where that is free).

    Notes
    -----
    1. With ``eta * strength`` above 2 a gradient step overshoots the maximiser and the weights jump between
       vertices of the simplex; the official settings have (eta, lambda) = (1, 100) and (0.1, 0.001). Prefer
       ``"exact"``, or ``eta * strength`` of at most 1.
    2. A group without samples in a batch keeps its weight and adds no loss; the others share the rest.

    References
    ----------
    .. [1] Qiao and Peng. Topology-aware Robust Optimization for Out-of-Distribution Generalization. ICLR 2023.
       Section 3, equations 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import TopologyAwareDRO
    >>> loss = TopologyAwareDRO(torch.tensor([0.5, 0.25, 0.25]), strength=4.0, update="exact")
    >>> loss(torch.tensor([1.0, 1.0, 3.0])), loss.weights  # 2 / 4, less a third for each, goes to the third
    (tensor(2.1667), tensor([0.3333, 0.0833, 0.5833]))
    """

    prior: Tensor
    weights: Tensor

    def __init__(
        self, prior: Float[Tensor, " groups"], *, eta: float = 0.1, strength: float = 1.0,
        update: Literal["gradient", "exact"] = "gradient",
    ) -> None:  # fmt: skip
        super().__init__()
        prior = wide(_simplex("prior", prior)).detach().clone()
        self.eta = at_least("eta", eta, 0, strict=True)
        self.strength = at_least("strength", strength, 0, strict=True)
        self.update = one_of("update", update, ("gradient", "exact"))
        self.register_buffer("prior", prior)
        self.register_buffer("weights", torch.full_like(prior, 1 / len(prior)))

    def forward(
        self, losses: Float[Tensor, " n"], groups: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the weighted loss.

        Parameters
        ----------
        losses : Tensor of shape (g,) or (n,)
            The mean loss of each group; or with ``groups`` of each sample.
        groups : Tensor of shape (n,), int, optional
            The group of each sample.

        Returns
        -------
        Tensor
            Scalar. Its gradient with respect to the group losses is ``weights``, as updated by this call.
        """
        floating("losses", losses)
        n = len(self.prior)
        if groups is None:
            has_shape("losses", losses, (n,), "mean losses of the groups of prior")
        else:
            has_shape("losses", losses, (None,), "losses of samples with their groups")
            groups = class_indices("groups", groups, len(losses), n).long()
        if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
            raise ValueError("losses must be finite, got NaN or infinity")
        with torch.autocast(losses.device.type, enabled=False):
            means, present = wide(losses), None
            if groups is not None:
                counts = means.new_zeros(n).index_add(0, groups, torch.ones_like(means))
                present = counts > 0
                means = means.new_zeros(n).index_add(0, groups, means) / counts.clamp_min(1)
            if self.weights.dtype in NARROW:  # after .half(): in which small steps would be lost
                self.prior, self.weights = wide(self.prior), wide(self.weights)
            if self.training:
                self._follow(means.detach(), present)
            value = means @ self.weights.to(means)
        return value.to(losses.dtype)

    def reset(self) -> None:
        """Make the weights uniform again."""
        self.weights = torch.full_like(self.prior, 1 / len(self.prior))

    @torch.no_grad()
    def _follow(self, losses: Tensor, present: Tensor | None) -> None:
        """Update the weights of the groups that are present; what the others hold is not shared out."""
        prior, weights = self.prior.to(losses), self.weights.to(losses)
        if self.update == "exact":
            moved = prior + losses / self.strength
        else:
            moved = weights + self.eta * (losses - self.strength * (weights - prior))
        if present is None:
            updated = _projected(moved, moved.new_ones(()))
        else:
            room = weights.where(present, 0).sum()
            updated = _projected(moved.where(present, -torch.inf), room).where(present, weights)
        self.weights = updated.to(self.weights)


@widened
def worst_case_weights(
    losses: Float[Tensor, " groups"], prior: Float[Tensor, " groups"], *, strength: float
) -> Float[Tensor, " groups"]:
    """Return the weights that maximise ``q @ losses - strength / 2 * ||q - prior||^2`` over the simplex.

    Parameters
    ----------
    losses : Tensor of shape (g,)
        Finite.
    prior : Tensor of shape (g,)
        On the simplex.
    strength : float
        lambda of (1), greater than 0.

    Returns
    -------
    Tensor of shape (g,)
        ``project_simplex(prior + losses / strength)``.

    Raises
    ------
    ValueError
        If shapes differ, losses are not finite or the prior is not on the simplex.

    References
    ----------
    .. [1] Qiao and Peng. ICLR 2023. Equation 4: its fixed point.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import worst_case_weights
    >>> worst_case_weights(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), strength=2.0)
    tensor([0.2500, 0.7500])
    """
    at_least("strength", strength, 0, strict=True)
    _simplex("prior", prior)
    has_shape("losses", floating("losses", losses), tuple(prior.shape), "prior")
    if not bool(torch.isfinite(losses).all()):
        raise ValueError("losses must be finite, got NaN or infinity")
    # what all have in common changes nothing; without it a small strength does not overflow
    return project_simplex(prior.to(losses) + (losses - losses.amax()) / strength)


@widened
def project_simplex(v: Float[Tensor, "*batch n"], *, total: float = 1.0) -> Float[Tensor, "*batch n"]:
    """Return the nearest point of the simplex, ``max(v - theta, 0)`` with the theta that makes the sum right.

    Parameters
    ----------
    v : Tensor of shape (..., n)
        Each vector of the last dimension is projected; at least one element. An element of minus infinity gets 0,
        as long as one is finite.
    total : float, default=1.0
        What the parts sum to, greater than 0.

    Returns
    -------
    Tensor of shape (..., n)
        Differentiable, where no element is about to become 0.

    Raises
    ------
    ValueError
        If ``v`` is not floating point or empty, or ``total`` not positive.

    References
    ----------
    .. [1] Duchi et al. Efficient Projections onto the l1-Ball. ICML 2008. Figure 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import project_simplex
    >>> project_simplex(torch.tensor([0.9, 0.5, -1.0]))
    tensor([0.7000, 0.3000, 0.0000])
    """
    floating("v", v)
    at_least("total", total, 0, strict=True)
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ValueError(f"v must have elements in its last dimension, got shape {tuple(v.shape)}")
    return _projected(v, v.new_tensor(total))


def _projected(v: Tensor, total: Tensor) -> Tensor:
    """Return the projection on the simplex whose parts sum to ``total``, 0-d."""
    v = v - v.amax(-1, keepdim=True)  # shifts do not matter, and large numbers would cancel
    largest = v.sort(dim=-1, descending=True).values
    k = torch.arange(1, v.shape[-1] + 1, device=v.device)
    # theta is right for the k largest, if they are what is left; for fewer or more it is too small
    theta = ((largest.cumsum(-1) - total) / k).amax(-1, keepdim=True)
    return (v - theta).clamp_min(0)


def _simplex(name: str, value: Any) -> Tensor:
    """Return weights that are not negative and sum to 1."""
    floating(name, value)
    has_shape(name, value, (None,))
    total = float(value.double().sum()) if len(value) else 0.0
    slack = 1e-4 if value.dtype not in NARROW else 1e-4 + len(value) * torch.finfo(value.dtype).eps
    if not (bool((value >= 0).all()) and abs(total - 1) <= slack):  # NaN is neither
        raise ValueError(f"{name} must be non-negative and sum to 1, got a sum of {total:g}")
    return value
