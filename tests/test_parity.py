"""Each paper's outputs are those of its authors' code, of a trusted peer or of closed forms."""

import numpy as np
import pytest

from posterity.papers import papers
from posterity.testing import check_parity
from tools.parity import FOLDER, compare

IMPLEMENTED = [
    paper.slug for paper in papers().values() if paper.implemented and paper.module.startswith("posterity.")
]


@pytest.mark.parametrize("slug", IMPLEMENTED)
def test_outputs_are_those_of_other_code(slug, as_a_user):
    facts = compare(slug)
    assert facts["values"] > 0
    assert facts["against"]
    assert (FOLDER / f"{slug}.npz").stat().st_size < 100_000, "a small file: fewer or smaller cases"


def test_a_paper_without_parity_is_told_what_it_lacks():
    with pytest.raises(
        ValueError, match=r"othello-world lacks tests/parity/othello_world\.py: CONTRIBUTING says"
    ):
        compare("othello-world")


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (1.0, 1.1, "differs by 0.1"),
        (np.nan, 1.0, "differs by nan"),
        ([1.0], 1.0, r"shape \(1,\), theirs is \(\)"),
    ],
)
def test_a_difference_a_nan_and_another_shape_are_said(ours, theirs, says):
    with pytest.raises(AssertionError, match=says):
        check_parity([("value", ours, theirs, 0.01)])
    with pytest.raises(AssertionError, match="nothing was compared"):
        check_parity([])


def test_agreement_counts_values_and_keeps_the_largest_difference():
    assert check_parity([("a", [1.0, 2.0], [1.0, 2.5], 1.0), ("b", 3, 3.25, 1.0)]) == (3, 0.5)
