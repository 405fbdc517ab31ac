r"""Neural collapse: how far features have come to one point a class, the points as far apart as they can be.

With normalised features of a fixed budget, the margin problem that training tends to has its optimum
where every sample of a class has the class's mean, centred means M are a simplex (equal lengths, cosines
-1/(K - 1)), and the last layer's rows are those means. Four numbers, each 0 there, say how far a network is:

.. math:: \mathrm{NC1} = \operatorname{tr}(S_W S_B^{+}) / K, \quad
   \mathrm{NC2} = \frac{\operatorname{std} \lVert M_c \rVert}{\operatorname{mean} \lVert M_c \rVert},\
   \operatorname{mean} \lvert \cos(M_i, M_j) + \tfrac{1}{K - 1} \rvert, \quad
   \mathrm{NC3} = \lVert W / \lVert W \rVert - M / \lVert M \rVert \rVert.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import class_indices, finite, floating, has_shape

__all__ = ["neural_collapse"]


def neural_collapse(
    features: Float[Tensor, "n d"], y: Int[Tensor, " n"], weight: Float[Tensor, "classes d"] | None = None
) -> dict[str, Tensor]:
    """Return how far features are from neural collapse.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        What the last layer is given.
    y : Tensor of shape (n,)
        Class indices; every class from 0 to the largest (or, with ``weight``, to its last row) has a sample.
    weight : Tensor of shape (classes, d), optional
        Of the last layer.

    Returns
    -------
    dict of str to Tensor
        Scalars in float64 on the CPU. ``nc1``: scatter within classes relative to that between;
        ``nc2_norms``: spread of the lengths of centred class means; ``nc2_angles``: how far their cosines are from
        -1/(K - 1); ``nc3``, with ``weight``: distance of the last layer from the means, both of unit norm.

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite, there are fewer than two classes, one has no sample, all classes
        have the same mean, or ``weight`` is 0.

    Notes
    -----
    1. Classes count alike, whatever their numbers of samples are; means are centred at the mean of class means.

    References
    ----------
    .. [1] Papyan, Han, Donoho. Prevalence of neural collapse during the terminal phase of deep learning training.
       PNAS 2020.
    .. [2] Kunin et al. The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks. ICLR 2023.
       Section 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import neural_collapse
    >>> y = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> found = neural_collapse(torch.eye(3)[y], y, torch.eye(3) - 1 / 3)
    >>> {name: round(abs(float(value)), 6) for name, value in found.items()}
    {'nc1': 0.0, 'nc2_norms': 0.0, 'nc2_angles': 0.0, 'nc3': 0.0}
    """
    n, d = has_shape("features", floating("features", features), (None, None)).shape
    class_indices("y", y, n)
    if weight is not None:
        has_shape("weight", floating("weight", weight), (None, d), "features")
    if not n or not d:
        raise ValueError(f"features must have at least one row and one column, got {(n, d)}")
    finite("features", features)
    h, y = features.detach().cpu().double(), y.cpu().long()
    classes = int(y.max()) + 1 if weight is None else len(weight)
    class_indices("y", y, n, classes)
    if classes < 2:
        raise ValueError(f"y must have at least 2 classes, got {classes}")
    counts = torch.bincount(y, minlength=classes) if classes <= n else torch.zeros(1)
    if not bool(counts.all()):
        raise ValueError(f"y must have a sample of each of {classes} classes, has not")
    h = h / (h.abs().max() or 1.0)  # squares stay finite
    means = torch.zeros(classes, d, dtype=h.dtype).index_add(0, y, h) / counts[:, None]
    centred = means - means.mean(0)
    norms = centred.norm(dim=1)
    if not bool(norms.max() > 1e-12):
        raise ValueError("features must have class means that differ, all are the same")
    # S_B = M^T M / K, so tr(S_W S_B^+) is K times the mean square of what M^+ makes of a sample's distance
    within = ((h - means[y]) @ torch.linalg.pinv(centred)).square().sum(1)
    directions = centred / norms.clamp_min(1e-300)[:, None]
    cosines = (directions @ directions.T)[~torch.eye(classes, dtype=torch.bool)]
    found = {
        "nc1": (torch.zeros(classes, dtype=h.dtype).index_add(0, y, within) / counts).mean(),
        "nc2_norms": norms.std(correction=0) / norms.mean(),
        "nc2_angles": (cosines + 1 / (classes - 1)).abs().mean(),
    }
    if weight is not None:
        head = finite("weight", weight).detach().cpu().double()
        if not bool(head.any()):
            raise ValueError("weight must not be 0")
        head = head / head.abs().max()
        found["nc3"] = (head / head.norm() - centred / centred.norm()).norm()
    return found
