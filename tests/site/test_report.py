"""The report: self-contained pages that work without a network, by keyboard, dark and narrow."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from posterity.engine.discovery import claim_outlines
from posterity.engine.store import Job, Outcome
from posterity.lab.contact_sheet import contact_sheet
from posterity.papers import papers
from posterity.site.figures import curves, dots, ranking, small
from posterity.site.report import write_report

SHEET = contact_sheet(np.eye(4)[None])
IMPLEMENTED = [paper for paper in papers().values() if paper.implemented and paper.claims_file]


def trials(n=5):
    """Return made-up trials of every claim, the first of which has an error."""
    groups = []
    for paper in IMPLEMENTED:
        for outline in claim_outlines(paper):
            group = []
            for seed in range(n):
                value = 0.1 + 0.01 * seed
                if outline.form == "comparison":
                    value = {arm: 0.1 * k + 0.01 * seed for k, arm in enumerate(outline.facts["arms"])}
                job = Job(paper.slug, outline.name, "m:n", dict(outline.defaults), seed, "code")
                track = {
                    "loss by steps: a <b>": [[1, 2.0], [10, 0.5], [1000, 0.1]],
                    "loss by steps: b": [[1, 1.0]],
                    "error, a": [[0, 1.0], [1, 2.0]],
                    "error, b": [[0, 1.0], [1, 2.0]],
                    "alone, by size": [[0, 1.0], [1, 2.0]],
                }
                group.append(
                    (job, Outcome(value, track, {"accuracy": 0.9}, 1.5, pictures={"a & b": list(SHEET)}))
                )
            if not groups:
                group[0] = (group[0][0], Outcome(error="ValueError: <script>alert(1)</script>"))
            groups.append(group)
    return groups


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(trials(), tmp_path_factory.mktemp("report"))


def test_pages_hold_what_they_promise_and_ask_for_nothing_outside(report):
    for paper in IMPLEMENTED:
        page = (report.parent / "papers" / f"{paper.slug}.html").read_text()
        for outline in claim_outlines(paper):
            assert outline.name in page
        for part in ("<svg", "<desc", "@inproceedings", "Measured with", "parameters, seconds, code", "Parity",
                     "The lines that use it", "API", "loss by steps", "alone, by size"):  # fmt: skip
            assert part in page
        assert page.count("What the trials tracked, error: thin lines") == len(claim_outlines(paper))
        assert "<script>alert" not in page
        assert page.replace('src="data:image/png;base64,', "").count('src="') == 0
        assert page.count("a &amp; b, seed 1: 1 image of 4 x 4 pixels") == len(claim_outlines(paper))
        assert "<link" not in page.replace('<link rel="icon" href="data:,">', "")
    index = report.read_text()
    assert all(f'papers/{paper.slug}.html"' in index for paper in IMPLEMENTED)


COMPARISON = {"claim": "c", "form": "comparison", "metric": "loss & more", "better": "lower",
              "arms": {"a": {"values": [1.0, 2.0]}, "b & c": {"values": [0.5, 1.0]}},
              "effect": {"mean": -0.75, "ci95": [-3.9, 2.4]}, "seeds": [0, 1]}  # fmt: skip
ONE = {"claim": "c", "metric": "error", "better": "lower", "seeds": [0],
       "value": {"mean": 1.0, "ci95": [None, None], "values": [1.0]}}  # fmt: skip
FORMS = [COMPARISON, {**ONE, "form": "bound", "limit": 1.0}, {**ONE, "form": "bound", "limit": 1.0, "better": "higher"},
         {**ONE, "form": "trend", "range": [0.0, 2.0]}, {**ONE, "form": "trend", "range": [None, 2.0]}]  # fmt: skip


def test_a_verdict_shows_seeds_interval_marks_and_the_claimed_side():
    words = "".join(ElementTree.fromstring(dots(COMPARISON, figure=-1.0)).itertext())
    for part in ("mean -0.75", "paper at -1", "loss & more", "b & c less a"):
        assert part in words
    for row in FORMS:
        tree = ElementTree.fromstring(dots(row))
        assert row["metric"] in "".join(text.text for text in tree.iter("text"))
        assert len([each for each in tree.iter("circle") if each.get("class") == "dot"]) == len(row["seeds"])
        side = tree.find("rect[@class='side']")
        inside = float(side.get("x")), float(side.get("x")) + float(side.get("width"))
        mean = float(tree.find("circle[@class='mean']").get("cx"))
        assert inside[0] <= mean <= inside[1], "each of these lies on the claimed side"
        ElementTree.fromstring(small(row))
    nothing = {**FORMS[1], "value": {"mean": None, "ci95": [None, None], "values": []}}
    assert dots(nothing) == small(nothing) == ""


def test_curves_and_rankings_are_well_formed_and_say_what_they_show():
    lines = {"a": [[[1, 1.0], [100, 0.01]]], "b": [[[1, 2.0], [100, float("nan")]]]}
    words = "".join(ElementTree.fromstring(curves("loss", lines, "steps", "loss & all")).itertext())
    for part in ("a from 1 at 1 to 0.01 at 100", "steps", "loss & all"):
        assert part in words
    assert curves("nothing", {"a": [[]]}) == ""
    facts = {"metric": "error", "better": "lower", "tied": False}
    rows = [{**facts, "rank": 1, "entry": "a < b", "paper": "esd", "mean": 1.5, "ci95": [1.0, 2.0], "values": [1.0, 2.0]},
            {**facts, "rank": 2, "entry": "c", "paper": None, "mean": 3.0, "ci95": [None, None], "values": [3.0]},
            {**facts, "rank": None, "entry": "d", "paper": None, "error": "it broke"}]  # fmt: skip
    words = "".join(ElementTree.fromstring(ranking(rows)).itertext())
    assert "1. a < b: 1.5; 2. c: 3" in words and "error; lower is better" in words
    assert ranking(rows[2:]) == ""


def test_a_reader_filters_the_results_and_opens_what_broke(report, reader):
    page = reader(report, scheme="dark", width=390)
    cards = page.locator("#cards li:visible")
    assert cards.count() == len(IMPLEMENTED)
    page.get_by_label("Verdict").select_option("error")
    assert cards.count() == 1
    assert page.locator("#count").inner_text() == f"1 of {len(IMPLEMENTED)} papers"
    cards.locator("a").click()
    assert page.get_by_text("<script>alert(1)</script>").is_visible()
    page.locator("summary").first.click()
    assert page.locator("details[open]").count() == 1
    page.get_by_role("link", name="Results").click()
    assert page.locator("#cards").count() == 1
