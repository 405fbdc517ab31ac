"""Accuracy on compositions that were seen in training, and on those that were not, over all prices of the unseen.

A model trained on some pairs of attribute and object scores these too high. So a bias b is added to the scores of all
other candidates, from so little that none of them is answered to so much that no other is: each b has an accuracy S(b)
on samples of seen pairs and U(b) on samples of unseen ones. What counts is the curve, its area

    AUC = integral of S over U ,                                                                         (1)

and the largest harmonic mean 2 S U / (S + U) on it. A sample is answered by an unseen pair as soon as b exceeds its
margin, its best seen score less its best unseen one; so margins, sorted once, give the accuracies at all b together.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posterity._checks import class_indices, floating, has_shape, indices, integer
from posterity._precision import wide

__all__ = ["CompositionMetrics", "composition_metrics"]

MOST = 1e3  # the bias that stands for no answer by a seen pair
SHORT = 1e-4  # by how much a bias stays below the margin of the sample that it is made of
BLOCK = 2**20  # scores that are looked at together


class CompositionMetrics(NamedTuple):
    """What `composition_metrics` returns.

    Attributes
    ----------
    auc : float
        Equation 1, in [0, 1].
    best_seen, best_unseen : float
        Largest accuracy on samples of seen and of unseen pairs, at any bias that is looked at.
    best_harmonic : float
        Largest harmonic mean of both at one bias.
    attribute, object : float
        Accuracy of each part of the best candidate, without bias, on all samples.
    seen_curve, unseen_curve : Tensor of shape (biases + 1,)
        The accuracies, in the order of rising bias; float64, on the CPU.
    """

    auc: float
    best_seen: float
    best_unseen: float
    best_harmonic: float
    attribute: float
    object: float
    seen_curve: Float[Tensor, " points"]
    unseen_curve: Float[Tensor, " points"]


@torch.no_grad()
def composition_metrics(
    scores: Float[Tensor, "n m"], target: Int[Tensor, " n"], pairs: Int[Tensor, "m 2"],
    seen: Bool[Tensor, " m"], *, n_biases: int | None = 20,
) -> CompositionMetrics:  # fmt: skip
    """Return the metrics of generalised compositional recognition.

    Parameters
    ----------
    scores : Tensor of shape (n, m)
        Of each sample for each candidate; finite, or -inf for what is ruled out, not a whole row. In the closed world
        the candidates are the pairs of training and test, in the open one all.
    target : Tensor of shape (n,), int
        Index of the true candidate.
    pairs : Tensor of shape (m, 2), int
        Attribute and object of each candidate, none twice.
    seen : Tensor of shape (m,), bool
        Which candidates have training images.
    n_biases : int or None, default=20
        About how many biases to look at, at least 1; up to twice as many are. None: all, and one above them.

    Returns
    -------
    CompositionMetrics
        Area, best accuracies, best harmonic mean, accuracy of each part, and the curve.

    Raises
    ------
    ValueError
        If shapes do not fit, scores are NaN or inf, or there is no candidate or no sample of one side, seen or unseen,
        so that an accuracy is not defined.

    Notes
    -----
    1. Biases are, of samples of unseen pairs that are right at a bias of 1000, the best seen score less their own less
       1e-4; sorted, every max(1, number // n_biases)-th; and 1000, the last. So the curve starts where no sample of an
       unseen pair is right. If none ever is, it is the one point at 1000.
    2. This is the protocol of published figures, and looks at no bias between the largest of these, which its own sample
       fails, and 1000, where seen pairs have no chance: perfect scores get an area near 1, of equal margins even 1/2.
       ``n_biases=None`` looks at one just above, and gives perfect scores 1.
    3. Scores should differ by less than 1000 and more than 1e-4: logits are right, or cosines in float32.
    4. Of equal scores the first candidate counts; between a seen and an unseen one at a bias, the seen one.

    References
    ----------
    .. [1] Nayak, Yu, Bach. CSP. ICLR 2023. Section 5; after Purushwalkam et al. Task-Driven Modular Networks for
       Zero-Shot Compositional Learning. ICCV 2019. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import composition_metrics
    >>> pairs, seen = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]]), torch.tensor([True, True, True, False])
    >>> scores = torch.tensor([[5.0, 1.0, 1.0, 4.0], [1.0, 5.0, 1.0, 3.0], [4.0, 1.0, 1.0, 3.0]])
    >>> metrics = composition_metrics(scores, torch.tensor([0, 1, 3]), pairs, seen)
    >>> metrics.seen_curve.tolist(), metrics.unseen_curve.tolist()  # biases just below 1, and 1000
    ([1.0, 0.0], [0.0, 1.0])
    >>> metrics.auc, metrics.best_harmonic, round(metrics.attribute, 4), round(metrics.object, 4)
    (0.5, 0.0, 1.0, 0.6667)
    """
    n, m = has_shape("scores", floating("scores", scores), (None, None)).shape
    class_indices("target", target, n)
    target, pairs, seen = target.cpu().long(), _candidates(pairs, m), _mask(seen, m)
    class_indices("target", target, n, m)
    every = None if n_biases is None else integer("n_biases", n_biases, 1)
    for side, of in (("seen", seen), ("unseen", ~seen)):
        if not bool(of.any()):
            raise ValueError(f"seen must leave both sides, no candidate is {side}")
        if not bool(of[target].any()):
            raise ValueError(f"target must have samples of both sides, none is of a candidate that is {side}")
    tops, answers = _best(scores, seen)
    margin = tops[0] - tops[1]  # an unseen candidate is answered at biases above
    seen_right, unseen_right = (
        answers[side] == target for side in (0, 1)
    )  # the target is of that side, then
    n_seen = int(seen[target].sum())

    # the own score of a sample whose unseen answer is right is the best unseen one
    biases = (margin[unseen_right & (margin < MOST)] - SHORT).sort().values
    if every is not None:
        biases = biases[:: max(len(biases) // every, 1)]
    elif len(biases):  # where all that can be right are
        biases = torch.cat([biases, biases[-1:] + 2 * SHORT])
    biases = torch.cat([biases, biases.new_tensor([MOST])])
    seen_left = margin[seen_right].sort().values
    unseen_won = margin[unseen_right].sort().values
    still = len(seen_left) - torch.searchsorted(seen_left, biases)  # b <= margin
    won = torch.searchsorted(unseen_won, biases)  # margin < b
    seen_curve, unseen_curve = still.double() / n_seen, won.double() / (n - n_seen)

    total = seen_curve + unseen_curve
    harmonic = 2 * seen_curve * unseen_curve / total.masked_fill(total == 0, 1)
    plain = torch.where((margin > 0) | ((margin == 0) & (answers[0] < answers[1])), answers[0], answers[1])
    attribute, thing = (pairs[plain] == pairs[target]).double().mean(0).tolist()
    return CompositionMetrics(
        float(torch.trapezoid(seen_curve, unseen_curve)), float(seen_curve.max()), float(unseen_curve.max()),
        float(harmonic.max()), attribute, thing, seen_curve, unseen_curve,
    )  # fmt: skip


def _best(scores: Tensor, seen: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the best score of each sample among seen and among unseen candidates, float64, and which they are."""
    sides = [side.nonzero()[:, 0] for side in (seen, ~seen)]
    there = [side.to(scores.device) for side in sides]
    tops, answers = ([], []), ([], [])
    for block in scores.split(max(BLOCK // scores.shape[1], 1)):
        for k, columns in enumerate(there):
            top, place = wide(block[:, columns]).max(1)
            tops[k].append(top.cpu())
            answers[k].append(place.cpu())
    values = tuple(torch.cat(each).double() for each in tops)
    bad = ~(torch.maximum(*values) < float("inf"))  # NaN is the largest, to max
    if bool(bad.any()):
        raise ValueError(f"scores must be finite or -inf, row {int(bad.nonzero()[0])} is not")
    none = torch.maximum(*values) == -float("inf")
    if bool(none.any()):
        raise ValueError(
            f"scores must leave a candidate to each sample, row {int(none.nonzero()[0])} is -inf"
        )
    picked = tuple(side[torch.cat(each)] for side, each in zip(sides, answers, strict=True))
    return (values[0], values[1]), (picked[0], picked[1])


def _candidates(pairs: Any, m: int) -> Tensor:
    pairs = indices("pairs", pairs, (m, 2), source="the candidates of scores").cpu().long()
    _, counts = pairs.unique(dim=0, return_counts=True)
    if bool((counts > 1).any()):
        raise ValueError("pairs must be different, got one twice")
    return pairs


def _mask(seen: Any, m: int) -> Tensor:
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(f"seen must be a bool tensor, got {got}")
    return has_shape("seen", seen, (m,), "the candidates of scores").cpu()
