"""The report: self-contained pages that work without a network, by keyboard, dark and narrow."""

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from posterity.engine.discovery import claim_outlines
from posterity.engine.store import Job, Outcome
from posterity.papers import papers
from posterity.site.figures import curves, dots
from posterity.site.pages import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
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
                    "loss: a <b>": [[1, 2.0], [10, 0.5], [1000, 0.1]],
                    "loss: b": [[1, 1.0]],
                    "alone": [[0, 1.0], [1, 2.0]],
                }
                group.append((job, Outcome(value, track, {"accuracy": 0.9}, 1.5)))
            if not groups:
                group[0] = (group[0][0], Outcome(error="ValueError: <script>alert(1)</script>"))
            groups.append(group)
    return groups


@pytest.fixture
def report(tmp_path):
    return write_report(trials(), tmp_path / "report")


def test_pages_hold_what_they_promise_and_ask_for_nothing_outside(report):
    for paper in IMPLEMENTED:
        page = (report.parent / f"{paper.slug}.html").read_text()
        for outline in claim_outlines(paper):
            assert outline.name in page
        for part in (
            "Verdict:",
            "<svg",
            "<desc",
            "@inproceedings",
            "Use it",
            "Environment",
            "Parameters",
            "Parity",
        ):
            assert part in page
        assert "<script>alert" not in page
        assert 'src="' not in page
        assert "<link" not in page.replace('<link rel="icon" href="data:,">', "")
    index = report.read_text()
    assert all(f'{paper.slug}.html"' in index for paper in IMPLEMENTED)


def test_figures_are_well_formed_and_say_what_they_show():
    row = {"claim": "c", "form": "comparison", "arms": {"a": {"values": [1.0, 2.0]}, "b & c": {"values": [0.5, 1.0]}},
           "effect": {"mean": -0.75, "ci95": [-3.9, 2.4]}, "seeds": [0, 1]}  # fmt: skip
    tree = ElementTree.fromstring(dots(row, figure=-1.0))
    words = "".join(tree.itertext())
    assert "mean -0.75" in words
    assert "paper at -1" in words
    for form in (
        {"form": "bound", "limit": 1.0},
        {"form": "trend", "range": [0.0, 2.0]},
        {"form": "trend", "range": [None, 2.0]},
    ):
        one = {
            "claim": "c",
            "value": {"mean": 1.0, "ci95": [None, None], "values": [1.0]},
            "seeds": [0],
            **form,
        }
        ElementTree.fromstring(dots(one))
    drawn = ElementTree.fromstring(
        curves("loss", {"a": [[[1, 1.0], [100, 0.01]]], "b": [[[1, 2.0], [100, float("nan")]]]})
    )
    assert "a from 1 at 1 to 0.01 at 100" in "".join(drawn.itertext())
    assert curves("nothing", {"a": [[]]}) == ""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_clicks_and_types_through_it_without_an_error(report, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    said = []
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
            ],
        )
        context = browser.new_context(
            viewport={"width": 390, "height": 800}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(Path(report).as_uri())
        rows = page.locator("#rows tr:visible")
        total = rows.count()
        assert total == sum(len(claim_outlines(paper)) for paper in IMPLEMENTED)
        page.get_by_label("Search").fill("rectified straight")
        assert 0 < rows.count() < total
        assert page.locator("#count").inner_text() == f"{rows.count()} shown"
        page.get_by_label("Search").fill("")
        page.get_by_label("Verdict").select_option("error")
        assert rows.count() == 1
        page.get_by_label("Verdict").select_option("")
        assert rows.count() == total
        colours = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert colours == (
            ["rgb(28, 30, 33)", "rgb(255, 255, 255)"]
            if scheme == "light"
            else ["rgb(230, 232, 235)", "rgb(20, 22, 26)"]
        )

        page.reload()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(4):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "A"
        page.keyboard.press("Enter")
        page.wait_for_url(lambda url: not url.endswith("index.html"))
        assert page.locator("h1").count() == 1
        assert page.locator("svg[role=img] title").count() >= 1
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "no sideways scrolling"
        )
        page.locator("summary").first.click()
        assert page.locator("details[open]").count() == 1
        page.get_by_role("link", name="All results").click()
        page.wait_for_url("**/index.html")
        assert page.locator("#rows").count() == 1
        browser.close()
    assert said == []
