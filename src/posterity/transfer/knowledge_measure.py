"""How much a classifier has forgotten, without tasks: what its earlier answers say that its later ones do not.

With G the class, Y1 and Y2 the predictions of one test set before and after, N classes:

    loss = I(G; Y1 | Y2) / log N ,   gain = I(G; Y2 | Y1) / log N ,   before = I(G; Y1) / log N .            (1)

Their joint law has N^3 cells, too many to count. It is modelled: class g is right at both times, before only, after
only or never with the frequencies counted, and a wrong answer at time t is drawn, whatever the other answer, by

    q_t(y) = P(Y_t = y) / (1 - P(Y_t = g)) ,   y != g ,   or P(Y_t = y) where g was not known yet.           (2)

The information in (1) is a sum of entropies, and that of the whole splits over y1 and y2: the N^3 cells are never made.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from posterity._checks import class_indices, integer

__all__ = ["KnowledgeRates", "knowledge_rates"]

NOTHING = 1e-12  # of knowledge or probability, beside rounding


class KnowledgeRates(NamedTuple):
    """What `knowledge_rates` returns.

    Attributes
    ----------
    loss_rate : float
        The share of what was known that is lost: loss / before. NaN where nothing was known.
    gain_rate : float
        The share of what could be learned that was: gain / (log(n_after) / log(n_classes) - before). NaN where
        nothing was left to learn.
    loss, gain, before : float
        Equation 1, in units of log(n_classes).
    """

    loss_rate: float
    gain_rate: float
    loss: float
    gain: float
    before: float


def knowledge_rates(
    y: Int[Tensor, " n"], before: Int[Tensor, " n"], after: Int[Tensor, " n"], *, n_classes: int,
    n_before: int | None = None, n_after: int | None = None,
) -> KnowledgeRates:  # fmt: skip
    """Return how much of its knowledge a classifier lost and gained between two times.

    Parameters
    ----------
    y : Tensor of shape (n,)
        Labels of a test set, in 0..n_classes-1 *in the order in which the model came to know them*; each class
        has a sample.
    before, after : Tensor of shape (n,)
        Predictions at the two times.
    n_classes : int
        All classes, at least 2.
    n_before, n_after : int, optional
        How many classes, the first ones, the model knew at the two times: its predictions are below. By default all.

    Returns
    -------
    KnowledgeRates
        The two rates, and the amounts that they are rates of.

    Raises
    ------
    ValueError
        If an argument is no vector of class indices in range, lengths differ, or a class has no sample.

    Notes
    -----
    1. Wrong answers are modelled as drawn anew. A classifier that errs, and does not change at all, is hence charged a
       loss, the more it errs, and none where it never does; ``loss_rate`` may even exceed 1 where little was known.
    2. The official code adds 1e-10 to each denominator and inside each logarithm, which moves values by about
       n_before * n_after * 1e-10. Nothing is added here: the entropies have no denominators.
    3. Where each sample of a class was right at one time at least, the official code loses those that were right once
       (its frequency of 0 for "never" is a factor of theirs). Here they count, so that the law always sums to 1.

    References
    ----------
    .. [1] Koh et al. Online Boundary-Free Continual Learning by Scheduled Data Prior. ICLR 2023. The
       knowledge loss and gain rates, and the model of their joint law.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import knowledge_rates
    >>> y = torch.tensor([0, 0, 1, 1])
    >>> rates = knowledge_rates(y, y, torch.zeros(4, dtype=torch.long), n_classes=2)  # all of one bit is forgotten
    >>> rates.before, rates.loss, rates.loss_rate
    (1.0, 1.0, 1.0)
    """
    n_classes = integer("n_classes", n_classes, 2)
    knew = []
    for name, number in (("n_before", n_before), ("n_after", n_after)):
        knew.append(n_classes if number is None else integer(name, number, 1))
        if knew[-1] > n_classes:
            raise ValueError(f"{name} must be at most the {n_classes} classes, got {number}")
    n1, n2 = knew
    n = len(y) if isinstance(y, Tensor) and y.ndim else 0
    labels = []
    for name, given, high in (("y", y, n_classes), ("before", before, n1), ("after", after, n2)):
        labels.append(class_indices(name, given, n).cpu().long())
        low, top = (int(end) for end in labels[-1].aminmax()) if n else (0, 0)
        if low < 0 or top >= high:
            raise ValueError(f"{name} must be in 0..{high - 1}, got values from {low} to {top}")
    g, y1, y2 = labels
    count = torch.bincount(g, minlength=n_classes).double()
    if not bool(count.all()):
        scarce = int(count.argmin())
        raise ValueError(f"y must have a sample of each class of {n_classes}, class {scarce} has none")
    share = count / n  # P(g)
    a, b, both = (
        torch.bincount(g[hit], minlength=n_classes) / count
        for hit in (y1 == g, y2 == g, (y1 == g) & (y2 == g))
    )
    q1, q2 = _wrong(y1, n1, n_classes), _wrong(y2, n2, n_classes)
    never, lost, found = share * (1 - (a + b - both)).clamp_min(0), share * (a - both), share * (b - both)
    g_y1, g_y2 = (share * (1 - a))[:, None] * q1, (share * (1 - b))[:, None] * q2
    g_y1.diagonal().add_((share * a)[:n1])
    g_y2.diagonal().add_((share * b)[:n2])
    y1_y2 = q1.T @ (never[:, None] * q2)
    y1_y2 += (lost[:, None] * q2)[:n1]
    y1_y2 += (found[:, None] * q1)[:n2].T
    y1_y2.diagonal().add_((share * both)[: min(n1, n2)])
    own1, own2 = torch.xlogy(q1, q1).sum(1), torch.xlogy(q2, q2).sum(1)
    whole = sum(_negentropy(part) for part in (share * both, never, lost, found))
    whole += float(((never + found) * own1 + (never + lost) * own2).sum())
    h1, h2 = _negentropy(g_y1.sum(0)), _negentropy(g_y2.sum(0))
    h_g1, h_g2, h_12 = (_negentropy(joint) for joint in (g_y1, g_y2, y1_y2))
    unit = math.log(n_classes)
    known = max(h_g1 - h1 - _negentropy(share), 0.0) / unit
    loss, gain = max(whole - h_g2 - h_12 + h2, 0.0) / unit, max(whole - h_g1 - h_12 + h1, 0.0) / unit
    left = math.log(n2) / unit - known
    return KnowledgeRates(
        loss / known if known > NOTHING else math.nan,
        gain / left if left > NOTHING else math.nan,
        loss,
        gain,
        known,
    )


def _wrong(answers: Tensor, n_known: int, n_classes: int) -> Tensor:
    """Return q of (2): a row for each class, over the classes known."""
    every = torch.bincount(answers, minlength=n_known).double() / len(answers)
    q = every.expand(n_classes, n_known).clone()
    q.diagonal().zero_()
    q[:n_known] /= (1 - every).clamp_min(NOTHING)[:, None]  # all answers g: no other answer, no row
    return q


def _negentropy(p: Tensor) -> float:
    return float(torch.xlogy(p, p).sum())
