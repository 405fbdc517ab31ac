"""The page "What is my network doing?" says what its code does."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "network.md"


def test_the_page_takes_one_network_through_all_instruments(as_a_user):
    text = re.sub(r"^```.*$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(text, {}, "network", str(PAGE), 0)
    said = []
    failures, tried = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        example, out=said.append
    )
    assert tried > 30
    if failures:
        pytest.fail("".join(said))
