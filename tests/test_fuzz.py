"""A short fixed part of `make fuzz`: every public name, called with what is drawn from its signature."""

import inspect
from collections import defaultdict

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tools.fuzz import Fuzzed, public_names
from tools.fuzz.judging import misfit, rightly, shown

NAMES = defaultdict(list)
for slug, domain, name in public_names():
    NAMES[slug].append((domain, name))


@pytest.mark.parametrize("slug", NAMES)
def test_calls_end_in_a_right_shape_or_an_error_that_names_an_argument(as_a_user, slug):
    for domain, name in NAMES[slug]:
        fuzzed = Fuzzed(domain, name, patience=1)
        fuzzed.search(rounds=1, examples=3)
        assert not fuzzed.faults, "\n".join(fuzzed.faults.values())


def doubled(x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Return a value of a shape."""


def test_a_wrong_shape_is_a_fault():
    wanted = inspect.signature(doubled).return_annotation
    assert misfit(torch.zeros(3, 2), wanted, {"n": 3, "d": 2}) == ""
    assert "shape (2, 3) for (n d) where {'n': 3, 'd': 2}" in misfit(
        torch.zeros(2, 3), wanted, {"n": 3, "d": 2}
    )
    assert misfit(np.zeros((3, 2)), wanted, {}) == "a ndarray for Float[Tensor, 'n d']"
    assert misfit((torch.zeros(3),), tuple[Float[Tensor, "*batch k k"]], {})
    assert misfit((torch.zeros(5, 3, 3),), tuple[Float[Tensor, "*batch k k"]], {}) == ""
    assert misfit(1, float | None, {}) == "1 for float"
    assert misfit(("a", "b", "c"), tuple[str, ...], {}) == ""
    assert misfit(("a", 1), tuple[str, ...], {}) == "1 for str"


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_only_a_value_error_that_names_an_argument_or_a_listed_error_is_right():
    def documented(x, index):
        """Do.

        Raises
        ------
        RuntimeError
            If it diverges.

        Notes
        -----
        KeyError is not listed.
        """

    assert rightly(raised(ValueError("index must name rows")), [documented])
    assert rightly(raised(RuntimeError("it diverges")), [documented])
    assert not rightly(raised(ValueError("indices must name rows")), [documented])
    assert not rightly(raised(IndexError("index out of range")), [documented])
    assert not rightly(raised(KeyError("x")), [documented])
    assert not rightly(raised(RuntimeError("it diverges")), [doubled])


def test_a_value_is_shown_in_short():
    assert shown(torch.tensor([1.23456, float("nan")])) == "float32 [1.234, nan]"
    assert shown(np.zeros((40, 2))) == "float64 (40, 2)"
    assert shown([torch.full((20,), float("inf")), None]) == "[float32 (20,), not finite, None]"
