"""The evidence is that of the code as it is, and the README shows what it says."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from posterity.engine.discovery import claim_outlines
from posterity.engine.fingerprint import is_current
from posterity.engine.plan import plan_claims
from posterity.papers import get, papers
from tools import evidence

ROOT = Path(__file__).parent.parent
IMPLEMENTED = [
    paper for paper in papers().values() if paper.implemented and paper.module.startswith("posterity.")
]


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=lambda paper: paper.slug)
def test_evidence_is_current(paper):
    stored = json.loads((ROOT / "evidence" / f"{paper.slug}.json").read_text())
    outlines = claim_outlines(paper)
    assert [row["claim"] for row in stored["claims"]] == [outline.name for outline in outlines]
    for row, outline in zip(stored["claims"], outlines, strict=True):
        data = {"data": row["data"]} if row["data"] is not None else {}
        assert json.loads(json.dumps(outline.defaults)) == {**data, **row["params"]}
        assert row["seeds"] == list(range(outline.facts.get("seeds", 5)))
        assert row["verdict"] != "error"
    assert stored["parity"]["values"] > 0
    same = stored["libraries"] == {name: version(name) for name in stored["libraries"]}
    if same and platform.python_version_tuple()[:2] == tuple(stored["python"].split(".")[:2]):
        stale = [
            row["claim"]
            for row in stored["claims"]
            if not is_current(row["code"], paper.claims, row["claim"])
        ]
        assert not stale, f"run `make evidence SLUGS={paper.slug}`"


def test_readme_and_manual_say_what_the_evidence_says(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    (tmp_path / "evidence").symlink_to(ROOT / "evidence")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    evidence.front()
    pages = ("verdicts.md", "verdict.svg", "replication.md", "speed.md")
    for name in ("README.md", *(f"docs/{page}" for page in pages)):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), (
            "run `python -m tools.evidence --front`"
        )


def test_what_does_not_hold_has_its_reason():
    for path in (ROOT / "evidence").glob("*.json"):
        for row in json.loads(path.read_text())["claims"]:
            facts = next(o.facts for o in claim_outlines(papers()[row["paper"]]) if o.name == row["claim"])
            assert (row["verdict"] != "holds") == bool(facts.get("reason")), f"{row['paper']} {row['claim']}"


def test_a_row_is_kept_while_the_code_as_it_is_would_make_it_again(tmp_path):
    path = ROOT / "evidence" / "esd.json"
    plans, _ = plan_claims(get("esd"))
    assert set(evidence.current(path, plans)) == {plan.outline.name for plan in plans}
    others, _ = plan_claims(get("esd"), first_seed=1)
    assert not evidence.current(path, others)
    stored = json.loads(path.read_text())
    for change in ({"code": "other"}, {"verdict": "error"}, {"params": {}}):
        changed = tmp_path / "esd.json"
        changed.write_text(json.dumps({**stored, "claims": [{**row, **change} for row in stored["claims"]]}))
        assert not evidence.current(changed, plans)
    assert not evidence.current(tmp_path / "none.json", plans)
