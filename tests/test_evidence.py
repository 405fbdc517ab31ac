"""The evidence is that of the code as it is, and the README shows what it says."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from posterity.engine.discovery import claim_outlines
from posterity.engine.fingerprint import fingerprint
from posterity.papers import papers

ROOT = Path(__file__).parent.parent
IMPLEMENTED = [
    paper for paper in papers().values() if paper.implemented and paper.module.startswith("posterity.")
]


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=lambda paper: paper.slug)
def test_evidence_is_current(paper):
    evidence = json.loads((ROOT / "evidence" / f"{paper.slug}.json").read_text())
    outlines = claim_outlines(paper)
    assert [row["claim"] for row in evidence["claims"]] == [outline.name for outline in outlines]
    for row, outline in zip(evidence["claims"], outlines, strict=True):
        data = {"data": row["data"]} if row["data"] is not None else {}
        assert json.loads(json.dumps(outline.defaults)) == {**data, **row["params"]}
        assert row["seeds"] == list(range(outline.facts.get("seeds", 5)))
        assert row["verdict"] != "error"
    same = evidence["libraries"] == {name: version(name) for name in evidence["libraries"]}
    if same and platform.python_version_tuple()[:2] == tuple(evidence["python"].split(".")[:2]):
        stale = [
            row["claim"]
            for row in evidence["claims"]
            if row["code"] != fingerprint(paper.claims, row["claim"])
        ]
        assert not stale, f"run `make evidence SLUGS={paper.slug}`"


def test_the_readme_shows_every_claim_of_the_evidence():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "evidence").glob("*.json"):
        for row in json.loads(path.read_text())["claims"]:
            assert f"| {row['says']} |" in text
