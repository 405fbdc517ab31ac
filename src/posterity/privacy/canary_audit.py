"""How much of one client a federated round gives away: rounds with and without a canary, told apart.

The canary's client sends its gradient g, clipped to norm C, and what it sends is looked for in
what the server releases:

    s = <g / |g|, sum of clipped updates + N(0, (sigma C)^2 I)> / C.                         (1)

Without the canary the score has mean 0 where g is orthogonal to all updates, with it mean 1, and
either way a standard deviation of sigma at least. Only projections of updates on g matter, so a
round costs as many additions as it has clients, however many numbers the model has.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import rounding, wide
from posterity._random import draw_device
from posterity.privacy.canife import Canary, Updates, direction_of
from posterity.privacy.empirical_epsilon import EpsilonEstimate, empirical_epsilon, gaussian_epsilon

__all__ = ["CanaryAudit", "audit_round", "canary_score"]

DRAWN_AT_ONCE = 2**22  # random numbers, where rounds draw their clients


@dataclass(frozen=True, eq=False)
class CanaryAudit:
    """What `audit_round` measures.

    Attributes
    ----------
    scores_with, scores_without : Tensor of shape (n_tests / 2,)
        Equation 1 of rounds with and without the canary, in float64.
    epsilon : EpsilonEstimate
        What they show.
    theoretical : float
        `gaussian_epsilon` at the noise of the round: what it promises.
    """

    scores_with: Float[Tensor, " half"]
    scores_without: Float[Tensor, " half"]
    epsilon: EpsilonEstimate
    theoretical: float


def canary_score(
    canary_grad: Float[Tensor, " numbers"], aggregate: Float[Tensor, " numbers"], *, clip: float = 1.0
) -> float:
    """Return how much of the canary there is in what the server releases, equation 1.

    Parameters
    ----------
    canary_grad : Tensor of shape (numbers,)
        Not zero.
    aggregate : Tensor of shape (numbers,)
        **Sum** of clipped updates, theta_before - theta_after, and noise: of a mean, multiply by the number
        of clients first.
    clip : float, default=1.0
        Positive.

    Returns
    -------
    float
        About 1 with a good canary, about 0 without.

    Raises
    ------
    ValueError
        If ``clip`` is out of range, shapes do not fit, or the gradient is zero or not finite.

    References
    ----------
    .. [1] Maddock et al. CANIFE. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import canary_score
    >>> canary_score(torch.tensor([0.0, 3.0]), torch.tensor([7.0, 0.5]))
    0.5
    """
    at_least("clip", clip, 0, strict=True)
    direction, _ = direction_of(canary_grad)
    has_shape("aggregate", floating("aggregate", aggregate), (len(direction),), "canary_grad")
    return float(direction.double() @ aggregate.detach().to(direction.device).double()) / clip


def audit_round(
    updates: Updates,
    canary: Canary | Float[Tensor, " numbers"],
    *,
    clip: float,
    noise_multiplier: float,
    clients_per_round: int,
    n_tests: int = 100,
    delta: float | None = None,
    lr: float = 1.0,
    threshold: float | Literal["max"] = 0.5,
    confidence: float = 0.95,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> CanaryAudit:
    """Return how well the canary is seen in rounds under noise, and what epsilon that shows.

    Rounds with and without the canary take turns, the model frozen: clients are drawn, their
    updates summed up, the canary's is added to every other sum, and noise to all. The canary's client
    takes one step on the canary alone. Noise is simulated here, and protects nobody.

    Parameters
    ----------
    updates : Tensor of shape (clients, numbers)
        Of clients from which a round draws (`client_updates`), clipped; **other than those
        that the canary was crafted with**.
    canary : Canary or Tensor of shape (numbers,)
        Or the gradient of any row, to be compared.
    clip : float
        Norm to which updates were clipped, positive.
    noise_multiplier : float
        Standard deviation of the noise in each number of the sum, divided by ``clip``; at least 0.
    clients_per_round : int
        Drawn without replacement; from 1 to all. The canary's client comes on top.
    n_tests : int, default=100
        Rounds, an even number; half with the canary.
    delta : float, optional
        In [0, 1); by default 1 / n_tests.
    lr : float, default=1.0
        The clients' rate: the canary sends ``lr * canary.grad``, clipped. Positive.
    threshold, confidence
        As for `empirical_epsilon`, but that the threshold is 0.5, so that ``epsilon.lower`` is valid.
    exact : bool, default=False
        Whether to form each sum in all its numbers. By default all that the score sees is drawn,
        projections of updates and one number of noise: the same distribution, and the same rounds
        under one seed.
    generator : torch.Generator, optional
        Draws clients and noise; torch's own where it is None.

    Returns
    -------
    CanaryAudit
        Scores, what they show and what theory promises.

    Raises
    ------
    ValueError
        If a parameter is out of range, shapes do not fit, an update is longer than ``clip``, or the canary's
        gradient is zero.

    Notes
    -----
    1. The bound is of one round for a client that always takes part, added or removed. Epsilon of a training is that
       of its rounds together, less what random participation saves.
    2. A low figure shows that this canary is not seen. It is no proof that nothing is.

    References
    ----------
    .. [1] Maddock et al. CANIFE. ICLR 2023. Section 3, Algorithm 2.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import audit_round
    >>> updates = torch.zeros(20, 3)
    >>> updates[:, :2] = 0.5  # nobody moves the third number
    >>> audit = audit_round(updates, torch.tensor([0.0, 0.0, 2.0]), clip=1.0, noise_multiplier=0.1, clients_per_round=8,
    ...                     generator=torch.Generator().manual_seed(0))
    >>> audit.epsilon.value, round(audit.epsilon.lower, 3), round(audit.theoretical, 1)
    (inf, 2.559, 72.4)
    """
    at_least("clip", clip, 0, strict=True)
    at_least("noise_multiplier", noise_multiplier, 0)
    at_least("lr", lr, 0, strict=True)
    if integer("n_tests", n_tests, 2) % 2:
        raise ValueError(f"n_tests must be even, got {n_tests}")
    direction, size = direction_of(canary.grad if isinstance(canary, Canary) else canary, "canary")
    sent = wide(floating("updates", updates).detach())
    k, _ = has_shape("updates", sent, (None, len(direction)), "canary").shape
    if integer("clients_per_round", clients_per_round, 1) > k:
        raise ValueError(
            f"clients_per_round must be at most {k}, as updates has rows, got {clients_per_round}"
        )
    longest = float(torch.linalg.vector_norm(sent, dim=1).max())
    if not longest <= clip * (1 + 4 * rounding(updates.dtype, 1e-5)):  # NaN is not
        raise ValueError(f"updates must be clipped to clip={clip}, the longest has norm {longest:.6g}")
    direction = direction.to(sent)
    share = min(1.0, lr * float(size) / clip)  # of the canary's update, in clips
    present = torch.arange(n_tests) % 2 == 0
    drawn = _rounds(n_tests, k, clients_per_round, generator)
    if exact:
        scores = torch.empty(n_tests, dtype=torch.float64)
        for turn, rows in enumerate(row for some in drawn for row in some):
            total = sent[rows.to(sent.device)].sum(0)
            noise = torch.randn(
                total.shape, generator=generator, device=draw_device(generator), dtype=total.dtype
            )
            total = total + clip * (
                share * float(present[turn]) * direction + noise_multiplier * noise.to(total)
            )
            scores[turn] = canary_score(direction, total, clip=clip)
    else:
        with torch.autocast(sent.device.type, enabled=False):
            along = (sent @ direction).double().cpu() / clip
        scores = torch.cat([along[some].sum(1) for some in drawn])
        noise = torch.randn(n_tests, generator=generator, device=draw_device(generator), dtype=torch.float64)
        scores = scores + share * present + noise_multiplier * noise.cpu()
    seen, unseen = scores[present], scores[~present]
    delta = 1 / n_tests if delta is None else delta
    epsilon = empirical_epsilon(seen, unseen, delta=delta, confidence=confidence, threshold=threshold)
    return CanaryAudit(seen, unseen, epsilon, gaussian_epsilon(noise_multiplier, delta))


def _rounds(n_tests: int, k: int, size: int, generator: torch.Generator | None) -> list[Tensor]:
    """Return the clients of each round, drawn without replacement: parts of shape (rounds, size)."""
    parts, at_once = [], max(1, DRAWN_AT_ONCE // k)
    for first in range(0, n_tests, at_once):
        some = min(at_once, n_tests - first)
        keys = torch.rand(some, k, generator=generator, device=draw_device(generator))
        parts.append(keys.topk(size, dim=1, sorted=False).indices.cpu())
    return parts
