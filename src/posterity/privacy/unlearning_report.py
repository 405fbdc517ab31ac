"""Four figures of an unlearned model, to be compared with those of one that never saw what it forgot.

    forget_error     1 - accuracy on the forgotten rows
    retain_accuracy  accuracy on the rows that were kept
    test_accuracy    accuracy on rows that no model saw
    mia              share of the forgotten rows that an attack takes for rows never seen

None of them should be high or low as such: forgotten rows that look like the others are still
predicted well. Unlearning is as good as it is close to retraining, in the mean absolute difference.
"""

from dataclasses import astuple, dataclass

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy import ndarray
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.utils.data import Dataset

from posterity.privacy.salun import (
    ROWS,
    Forget,
    Retain,
    _classes,
    _outputs,
    _pair,
    _Rows,
    _rows_of_scores,
    _widened,
)  # fmt: skip

__all__ = ["UnlearningReport", "unlearning_report"]

Test = tuple[Shaped[Tensor, "k ..."], Int[Tensor, " k"]]


@dataclass(frozen=True)
class UnlearningReport:
    """What `unlearning_report` measures; each is a share in [0, 1].

    Attributes
    ----------
    forget_error : float
        1 less the accuracy on the forgotten rows ("unlearning accuracy").
    retain_accuracy, test_accuracy : float
    mia : float
        Share of the forgotten rows that a membership attack takes for never seen.
    """

    forget_error: float
    retain_accuracy: float
    test_accuracy: float
    mia: float

    def gap(self, other: "UnlearningReport") -> float:
        """Return the mean absolute difference of the four figures from those of another model."""
        return float(np.abs(np.subtract(astuple(self), astuple(other))).mean())


@torch.inference_mode(False)
def unlearning_report(
    model: nn.Module, forget: Forget | Dataset, retain: Retain | Dataset, test: Test | Dataset
) -> UnlearningReport:
    """Measure a classifier on what it should have forgotten, on what it kept and on test data.

    The membership attack is a support vector machine on the probability of the true class. It
    learns to tell rows that were kept from test rows, and is asked about the forgotten ones. It is a weak attack
    that shows traces and cannot show their absence.

    Parameters
    ----------
    model : nn.Module
        ``model(x) -> logits (batch, classes)``, measured in eval mode and left as it is.
    forget, retain, test : tuple of Tensor, or Dataset
        Inputs and labels, or map-style datasets of them.

    Returns
    -------
    UnlearningReport
        Shares in [0, 1].

    Raises
    ------
    ValueError
        If a part is empty or does not fit, labels are outside the classes, or an output is not finite.

    Notes
    -----
    The attack learns from equally many rows of ``retain`` and of ``test``, those of the larger
    evenly spaced; the official code takes the first of ``retain``, which may be of one class.

    References
    ----------
    .. [1] Fan et al. SalUn. ICLR 2024. Section 5.1 and Appendix C.3.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import unlearning_report
    >>> net = torch.nn.Identity()  # sure of the larger entry
    >>> x, y = 9 * torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4)
    >>> report = unlearning_report(net, (x[:2], 1 - y[:2]), (x[2:6], y[2:6]), (x[6:], y[6:]))
    >>> report.forget_error, report.retain_accuracy, report.test_accuracy
    (1.0, 1.0, 1.0)
    """
    twin = _widened(model).eval()
    shares = {
        name: _true_class(twin, _Rows(name, data))
        for name, data in (("forget", forget), ("retain", retain), ("test", test))
    }
    right = {name: float(correct.mean()) for name, (_, correct) in shares.items()}
    known, new = (shares[name][0] for name in ("retain", "test"))
    n = min(len(known), len(new))
    known, new = (each[np.linspace(0, len(each) - 1, n).astype(int)] for each in (known, new))
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(np.concatenate([known, new])[:, None], np.repeat([1, 0], n))
    mia = float((attack.predict(shares["forget"][0][:, None]) == 0).mean())
    return UnlearningReport(1 - right["forget"], right["retain"], right["test"], mia)


@torch.no_grad()
def _true_class(model: nn.Module, rows: _Rows) -> tuple[ndarray, ndarray]:
    """Return the probability of each row's class, and whether it is the first of the largest."""
    found: list[tuple[ndarray, ndarray]] = []
    for part in torch.arange(len(rows)).split(ROWS):
        x, y = _pair(rows.name, rows.take(part), model)
        out = _rows_of_scores(_outputs(model, x))
        y = _classes(rows.name, y, out.shape[1])
        if not bool(out.isfinite().all()):
            raise ValueError(f"model must give finite logits, those of {rows.name} have NaN or infinity")
        p = out.cpu().double().softmax(1).gather(1, y.cpu()[:, None])[:, 0]
        found.append((p.numpy(), (out.argmax(1) == y).cpu().numpy()))
    probability, right = zip(*found, strict=True)
    return np.concatenate(probability), np.concatenate(right)
