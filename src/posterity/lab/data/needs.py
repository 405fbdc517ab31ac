"""What every run needs of its data, whatever the kind: rows enough to split, classes to tell apart."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

__all__ = ["require_classes", "require_rest", "require_rows", "require_task"]

LEAST = 10  # rows of which a fifth, and a fourth of the others, are still a few
OF_A_CLASS = 5  # rows of which a fifth is one


def require_rows(n: int, noun: str, least: int = LEAST) -> None:
    """Refuse fewer examples than the parts of a split can share.

    Parameters
    ----------
    n : int
        How many there are.
    noun : str
        What they are.
    least : int, default=10

    Raises
    ------
    ValueError
        If there are fewer than ``least``.
    """
    if n < least:
        raise ValueError(f"at least {least} {noun} are needed, to learn from and to test on; has {n}")


def require_classes(y: ndarray, classes: Sequence[str], noun: str, least: int = 2) -> None:
    """Refuse labels of which too few classes can be split.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Codes from 0.
    classes : sequence of str
        Their names.
    noun : str
        What has the labels.
    least : int, default=2

    Raises
    ------
    ValueError
        If fewer than ``least`` classes have five examples.
    """
    counts = np.bincount(y, minlength=len(classes))
    if (counts >= OF_A_CLASS).sum() < least:
        shown = ", ".join(f"{classes[k]} {counts[k]}" for k in np.argsort(-counts, kind="stable")[:4])
        more = ", …" if len(classes) > 4 else ""
        raise ValueError(
            f"at least {least} classes of {OF_A_CLASS} {noun} or more are needed, has {shown}{more}"
        )


def require_rest(n: int, name: str, n_train: int, rest: int, noun: str) -> None:
    """Refuse a part to learn from that leaves too little.

    Parameters
    ----------
    n : int
        How many examples there are.
    name : str
        The parameter that says how many are learned from.
    n_train : int
        Its value.
    rest : int
        How many must be left.
    noun : str
        What they are.

    Raises
    ------
    ValueError
        If fewer are left.
    """
    if n <= rest:
        raise ValueError(f"more than {rest} {noun} are needed, has {n}")
    if n_train > n - rest:
        raise ValueError(
            f"{name} must leave {rest} of the {n} {noun}, so be at most {n - rest}, got {n_train}"
        )


def require_task(task: str, wanted: str) -> None:
    """Refuse a table whose target is of the other kind.

    Parameters
    ----------
    task : {"regression", "classification"}
        Of the table.
    wanted : {"regression", "classification"}

    Raises
    ------
    ValueError
        If they differ.
    """
    if task != wanted:
        numbers = "numbers to regress on, got classes"
        raise ValueError(f"target must be {numbers if wanted == 'regression' else 'classes, got numbers'}")
