"""What each paper's tests cost, doctests among them: its share is at most `BUDGET` seconds of one core."""

import re
import resource
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from posterity.papers import papers

BUDGET = 8.0  # seconds of one core: tests, smallest claims, doctests, vendored file, parity
HOUSE = "the house"


def _cpu():
    """Return the seconds of this process and of those that it started and that have ended."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Measure a test with its fixtures; what one test makes for many is on the first's account."""
    start = _cpu()
    item.user_properties.append(("began", start))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "teardown":
        began = dict(item.user_properties)["began"]
        report.user_properties = [("cpu", _cpu() - began)]
    return report


def pytest_terminal_summary(terminalreporter):
    """Print the ten dearest papers, and those over budget."""
    owner, spent = _owners(), Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", "") == "teardown":
            spent[owner(report.nodeid)] += dict(report.user_properties).get("cpu", 0.0)
    if len(spent) < 2:
        return
    house = spent.pop(HOUSE, 0.0)
    terminalreporter.section("core-seconds")
    terminalreporter.line(f"{HOUSE} {house:.0f}, {len(spent)} papers {spent.total():.0f}; the dearest:")
    for slug, seconds in spent.most_common(10):
        terminalreporter.line(f"  {slug:<28}{seconds:6.1f}{'  over budget' if seconds > BUDGET else ''}")
    over = [slug for slug, seconds in spent.items() if seconds > BUDGET]
    terminalreporter.line(f"over {BUDGET:g} s: {', '.join(sorted(over)) or 'none'}")


def _owners():
    """Return the function that says of a test's id whose it is: a paper's by its file or parameter."""
    by_file = {}
    for paper in papers().values():
        stems = [module.rpartition(".")[2] for module in paper.modules]
        by_file |= {(paper.domain, stem.removeprefix("test_")): paper.slug for stem in stems}
    slugs = re.compile("|".join(sorted(map(re.escape, papers()), key=len, reverse=True)))

    def owner(nodeid):
        file, _, rest = nodeid.partition("::")
        path = Path(file)
        words = path.stem.removeprefix("test_").split("_")
        for n in range(len(words), 0, -1):  # test_<paper>_<idea>.py is the paper's too
            if slug := by_file.get((path.parent.name, "_".join(words[:n]))):
                return slug
        parameter = rest.partition("[")[2]
        found = slugs.match(parameter) or slugs.match(rest.rpartition("-")[2])
        return found[0] if found else HOUSE

    return owner
