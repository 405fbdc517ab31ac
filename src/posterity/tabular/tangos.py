"""TANGOS: a tabular network whose hidden units each look at few inputs, and at different ones.

With h_i(x) the activations of the last hidden layer and a_i(x) = dh_i / dx the attribution
of unit i to the d inputs, training adds to the loss

    lambda_spec  * mean over rows, units and inputs of |a_ij|                  (1)
    lambda_orth  * mean over rows and pairs i < j of |cos(a_i, a_j)|.          (2)

The first lets a unit ignore an input that it can do without, the second keeps two units
from being one. What is left is an ensemble of specialists, which overfits a small table
with many useless columns less than weight decay or dropout lets it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import at_least, integer
from posterity._precision import widened
from posterity._random import draw_device
from posterity.tabular.attributions import _attributions

__all__ = ["TangosPenalty", "TangosTerms", "tangos_terms"]

SHORTEST = 1e-6  # norms below this share of the largest count as it: no gradient has cosine 0, not NaN


class TangosTerms(NamedTuple):
    """The two means of equations 1 and 2, before their lambdas.

    Attributes
    ----------
    specialization, orthogonalization : Tensor
        Scalars; the second lies in [0, 1].
    """

    specialization: Tensor
    orthogonalization: Tensor


def tangos_terms(
    latent: Callable[[Tensor], Tensor],
    x: Float[Tensor, " n *shape"],
    *,
    n_pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> TangosTerms:
    """Return the specialisation and the orthogonalisation of a batch.

    Parameters
    ----------
    latent : callable
        See `latent_attributions`.
    x : Tensor of shape (n, ...)
        Inputs.
    n_pairs : int, optional
        How many pairs of units to draw, the same for all rows, repeats allowed: at least 1.
        None, or no fewer than there are: every pair once, and nothing is drawn.
    generator : torch.Generator, optional
        Draws the pairs; torch's own where it is None.

    Returns
    -------
    TangosTerms
        Two scalars that can be differentiated. One unit alone is orthogonal: 0.

    Raises
    ------
    ValueError
        If ``n_pairs`` is less than 1, or as `latent_attributions` says.

    References
    ----------
    .. [1] Jeffares et al. TANGOS: Regularizing Tabular Neural Networks through Gradient
       Orthogonalization and Specialization. ICLR 2023. Section 3.

    Examples
    --------
    Two units that share one of two inputs:

    >>> import torch
    >>> from posterity.tabular import tangos_terms
    >>> w = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    >>> terms = tangos_terms(lambda x: x @ w.T, torch.zeros(5, 2))
    >>> round(float(terms.specialization), 4), round(float(terms.orthogonalization), 4)
    (2.0, 0.6)
    """
    if n_pairs is not None:
        integer("n_pairs", n_pairs, 1)
    terms = _terms(latent, x, n_pairs, generator)
    return TangosTerms(*(term.to(x.dtype) for term in terms))


def _terms(
    latent: Callable[[Tensor], Tensor], x: Tensor, n_pairs: int | None, generator: torch.Generator | None
) -> TangosTerms:
    """Return both terms in float32 at least."""
    return _means(_attributions(latent, x, create_graph=True), n_pairs, generator)


@widened
def _means(
    a: Float[Tensor, "n units inputs"], n_pairs: int | None, generator: torch.Generator | None
) -> TangosTerms:
    units = a.shape[1]
    pairs = units * (units - 1) // 2
    specialization = a.abs().mean()
    if pairs == 0:
        return TangosTerms(specialization, a.new_zeros(()))
    norm = torch.linalg.vector_norm(a, dim=2)
    least = torch.finfo(a.dtype).tiny ** 0.5  # whose square is not 0
    norm = norm.clamp_min((SHORTEST * norm.detach().amax()).clamp_min(least))
    if n_pairs is None or n_pairs >= pairs:
        unit = a / norm[:, :, None]
        cosines = (unit @ unit.mT).tril(-1)
        return TangosTerms(specialization, cosines.abs().sum() / (len(a) * pairs))
    device = draw_device(generator, a.device)
    first = torch.randint(units, (n_pairs,), generator=generator, device=device)
    step = torch.randint(1, units, (n_pairs,), generator=generator, device=device)
    i, j = first.to(a.device), ((first + step) % units).to(a.device)  # i != j, uniform over pairs
    # index_select: the backward pass of a[:, i] is several times slower
    dots = (a.index_select(1, i) * a.index_select(1, j)).sum(2)
    cosines = dots / (norm.index_select(1, i) * norm.index_select(1, j))
    return TangosTerms(specialization, cosines.abs().mean())


class TangosPenalty(nn.Module):
    """The TANGOS regulariser, one more term of any training loop.

    ``loss = criterion(model(x), y) + penalty(model.body, x)``, where ``model.body`` is the
    module or function up to the activations of the last hidden layer.

    Parameters
    ----------
    lambda_spec : float, default=10.0
        Weight of equation 1, at least 0; the paper searches 1, 10 and 100.
    lambda_orth : float, default=0.1
        Weight of equation 2, at least 0; the paper searches 0.1 and 1.
    n_pairs : int, optional
        Pairs of units drawn at each call, at least 1, default 50. None takes all.

    Raises
    ------
    ValueError
        If a parameter is out of range or the input does not fit.

    Notes
    -----
    1. Equation 1 divides by the number of inputs too, as the official code does and its
       values of lambda presume.
    2. Equation 1 can be dodged by small activations and a large last layer; add weight
       decay where that matters.

    References
    ----------
    .. [1] Jeffares et al. TANGOS. ICLR 2023. Equations 1 to 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.tabular import TangosPenalty
    >>> body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    >>> loss = TangosPenalty()(body, torch.randn(32, 4))
    >>> loss.backward()
    >>> body[0].weight.grad.shape
    torch.Size([8, 4])
    """

    def __init__(self, lambda_spec: float = 10.0, lambda_orth: float = 0.1, n_pairs: int | None = 50) -> None:
        super().__init__()
        self.lambda_spec = at_least("lambda_spec", lambda_spec, 0)
        self.lambda_orth = at_least("lambda_orth", lambda_orth, 0)
        self.n_pairs = None if n_pairs is None else integer("n_pairs", n_pairs, 1)

    def forward(
        self,
        latent: Callable[[Tensor], Tensor],
        x: Float[Tensor, " n *shape"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum of both terms, a scalar; arguments as for `tangos_terms`."""
        terms = _terms(latent, x, self.n_pairs, generator)
        value = self.lambda_spec * terms.specialization + self.lambda_orth * terms.orthogonalization
        return value.to(x.dtype)
