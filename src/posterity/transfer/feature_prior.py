"""Cross-entropy and the pull of a teacher's features, made equally strong before they are weighed.

With f the features of sample n, f' those of a teacher, and g the gradient of the cross-entropy by f,

    loss = mean over n of  (1 - C) CE_n + beta C ||f_n - f'_n||^2 ,                                         (1)
    beta = mean over n of  ||g_n|| / (2 ||f_n - f'_n||) ,                                                  (2)

where 2 beta ||f - f'|| is how hard the second term would pull at the features, and ||g|| how hard the first does: C
is the share of the teacher, whatever the scale of the features and however far training has come.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import class_indices, floating, has_shape, within
from posterity._precision import wide, widened

__all__ = ["prior_loss"]


def prior_loss(
    features: Float[Tensor, "n d"],
    teacher_features: Float[Tensor, "n d"],
    head: nn.Linear,
    y: Int[Tensor, " n"],
    *,
    weight: float,
    y_mix: Int[Tensor, " n"] | None = None,
    lam: float = 1.0,
) -> Float[Tensor, ""]:
    """Return cross-entropy and pull towards a teacher, balanced at the features: the mean over a batch of (1).

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Of the network that learns.
    teacher_features : Tensor of shape (n, d)
        Constants for the gradient.
    head : nn.Linear
        From features to logits of the classes.
    y : Tensor of shape (n,)
        Classes, in 0..classes-1.
    weight : float
        C of (1), in [0, 1]: 0 is cross-entropy.
    y_mix : Tensor of shape (n,), optional
        The classes of what was mixed into the inputs.
    lam : float, default=1.0
        In [0, 1]: the share of ``y`` where ``y_mix`` is given, which counts 1 - ``lam``.

    Returns
    -------
    Tensor of shape ()
        Of the dtype of ``features``; gradients reach them and the head, beta is a constant.

    Raises
    ------
    ValueError
        If tensors are empty or do not fit, or a number is out of range.

    Notes
    -----
    beta is the mean of sqrt(||g||^2 / (4 ||f - f'||^2 + 1e-8)), so that it is finite where both agree.

    References
    ----------
    .. [1] Koh et al. Online Boundary-Free Continual Learning by Scheduled Data Prior. ICLR 2023. The loss with
       its balancing coefficient; `SDP.model_forward` of the official code.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import prior_loss
    >>> head = torch.nn.Linear(1, 2, bias=False)
    >>> _ = head.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> f, y = torch.zeros(1, 1, requires_grad=True), torch.tensor([0])  # gradient of the cross-entropy: -1
    >>> prior_loss(f, torch.full((1, 1), 2.0), head, y, weight=0.5).backward()  # and the teacher pulls as hard
    >>> f.grad
    tensor([[-1.]])
    """
    if not isinstance(head, nn.Linear):
        raise ValueError(f"head must be a Linear, got {type(head).__name__}")
    floating("features", features)
    n, d = has_shape("features", features, (None, head.in_features), "head").shape
    if not n or not d:
        raise ValueError(f"features must have at least one row and column, got shape {(n, d)}")
    has_shape("teacher_features", floating("teacher_features", teacher_features), (n, d), "features")
    within("weight", weight, 0, 1)
    within("lam", lam, 0, 1)
    class_indices("y", y, n, head.out_features)
    if y_mix is not None:
        class_indices("y_mix", y_mix, n, head.out_features)
    return _loss(features, teacher_features, head, y, y_mix, weight=weight, lam=1.0 if y_mix is None else lam)


@widened
def _loss(
    f: Tensor, target: Tensor, head: nn.Linear, y: Tensor, y_mix: Tensor | None, *, weight: float, lam: float
) -> Tensor:
    """Return (1) for what was checked."""
    matrix, y, target = wide(head.weight).to(f.dtype), y.long(), target.detach().to(f.dtype)
    logits = F.linear(f, matrix, None if head.bias is None else wide(head.bias).to(f.dtype))
    parts = [(lam, y)] if y_mix is None else [(lam, y), (1 - lam, y_mix.long())]
    entropy = sum((share * F.cross_entropy(logits, label) for share, label in parts), logits.new_zeros(()))
    if weight == 0:
        return entropy
    with torch.no_grad():
        g = logits.softmax(1)
        for share, label in parts:
            g.scatter_add_(1, label[:, None], g.new_full((len(y), 1), -share))
        g = g @ matrix
        beta = (g.square().sum(1) / (4 * (f - target).square().sum(1) + 1e-8)).sqrt().mean()
    return (1 - weight) * entropy + weight * beta / len(y) * F.mse_loss(f, target, reduction="sum")
