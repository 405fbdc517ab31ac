"""Which outputs learn from which: attention over outputs, by the directions of what was observed.

The weight of latent process j in output i is

    a_ij = exp(e_ij) / (1 + sum_{l != i} exp(e_il)),  e_i = LeakyReLU(F F' W_i + B_i)_i,   (1)

where row j of F is output j's observations at unit length, so that F F' holds the cosines of the
outputs. W_i and B_i are learned. Each output has its own process with weight a_ii = 1; the 1 in the
denominator lets it have no parents beside.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape
from posterity._precision import widened

__all__ = ["attention_coefficients"]


@widened
def attention_coefficients(
    targets: Float[Tensor, "n s"],
    weight: Float[Tensor, "s s s"],
    bias: Float[Tensor, "s s s"],
    negative_slope: float = 0.2,
) -> Float[Tensor, "s s"]:
    """Return the weight of each latent process in each output, equation 1.

    Parameters
    ----------
    targets : Tensor of shape (n, s)
        Observations, a column an output; only their directions count.
    weight, bias : Tensor of shape (s, s, s)
        W and B; the first index is the output whose graph it is. Of graph i only row i of
        the scores is used, so other rows of ``bias`` get no gradient.
    negative_slope : float, default=0.2
        Slope of LeakyReLU below 0, at least 0.

    Returns
    -------
    Tensor
        Of shape (s, s): row i holds the parents of output i, the diagonal 1, and the rest of
        a row sums to less than 1.

    Raises
    ------
    ValueError
        If shapes do not fit, ``targets`` are not finite, or ``negative_slope`` is negative.

    References
    ----------
    .. [1] Dai, Yan, Yin. Graphical Multioutput Gaussian Process with Attention. ICLR 2024.

    Examples
    --------
    Without scores two parents have exp(0) / (1 + 2 exp(0)) each:

    >>> import torch
    >>> from posterity.uncertainty import attention_coefficients
    >>> attention_coefficients(torch.eye(3), torch.zeros(3, 3, 3), torch.zeros(3, 3, 3))
    tensor([[1.0000, 0.3333, 0.3333],
            [0.3333, 1.0000, 0.3333],
            [0.3333, 0.3333, 1.0000]])
    """
    at_least("negative_slope", negative_slope, 0)
    s = has_shape("targets", floating("targets", targets), (None, None)).shape[1]
    if s == 0:
        raise ValueError("targets must have at least one output, got none")
    for name, value in (("weight", weight), ("bias", bias)):
        has_shape(name, floating(name, value), (s, s, s), f"targets of {s} outputs")
    return _attention(_gram(finite("targets", targets)), weight, bias, negative_slope)


def _gram(targets: Float[Tensor, "n s"]) -> Float[Tensor, "s s"]:
    """Return the cosines of outputs; one that is 0 throughout has none."""
    features = targets / torch.linalg.vector_norm(targets, dim=0).clamp_min(torch.finfo(targets.dtype).tiny)
    return features.T @ features


def _attention(
    gram: Float[Tensor, "s s"], weight: Float[Tensor, "s s s"], bias: Float[Tensor, "s s s"], slope: float
) -> Float[Tensor, "s s"]:
    own = torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    # row i of (F F') W_i + B_i, the only one that is used
    scores = (gram[:, None] @ weight)[:, 0] + bias.diagonal().T
    scores = F.leaky_relu(scores, slope).masked_fill(own, -math.inf)
    peak = scores.detach().amax(1, keepdim=True).clamp_min(0)
    parents = (scores - peak).exp()
    return parents / ((-peak).exp() + parents.sum(1, keepdim=True)) + own
