"""Write evidence/replication/<slug>.json and docs/replication.md: claims once more, on seeds of no earlier use.

Every claim whose trial takes at most ten seconds, and of the others one in three by a hash of its
name, on as many seeds from 3000 on as it asks for. What is there for the code as it is stays; each paper is written when
it is done.
"""

import hashlib
import json
import sys
from pathlib import Path

from posterity.engine.plan import plan_claims
from posterity.engine.run import execute
from posterity.engine.store import Store
from posterity.engine.verdicts import judge
from posterity.papers import get, papers
from tools.evidence import front, rounded

ROOT = Path(__file__).parent.parent
FIRST_SEED = 3000
LONG = 10.0  # seconds
ONE_IN = 3
MENDED = (
    "multiscale-score enlarges", "robustness-limits order_in_n", "self-ensemble-protection protection",
)  # fmt: skip


def chosen(row) -> bool:
    """Return whether a row of the evidence is run once more."""
    if row["seconds"] / len(row["seeds"]) <= LONG:
        return True
    name = f"{row['paper']}/{row['claim']}".encode()
    return int(hashlib.sha256(name).hexdigest(), 16) % ONE_IN == 0


def stored(path) -> list:
    """Return the rows of a file, none where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))["claims"] if path.is_file() else []


def main() -> None:
    """Run what is missing of some papers, or of all."""
    store = Store()
    for paper in [get(slug) for slug in sys.argv[1:]] or [p for p in papers().values() if p.implemented]:
        path = ROOT / "evidence" / "replication" / f"{paper.slug}.json"
        first = {row["claim"]: row for row in stored(ROOT / "evidence" / f"{paper.slug}.json")}
        known = {row["claim"]: row for row in stored(path)}
        plans, _ = plan_claims(paper, first_seed=FIRST_SEED)
        plans = [plan for plan in plans if chosen(first[plan.outline.name])]
        rows, missing = {}, []
        for plan in plans:
            row = known.get(plan.outline.name)
            same = row and row["code"] == plan.jobs[0].code and len(row["seeds"]) == len(plan.jobs)
            if same and row["verdict"] != "error":
                rows[plan.outline.name] = row
            else:
                missing += plan.jobs
        outcomes = {job.key: outcome for job, outcome, _ in execute(missing, store)}
        for plan in plans:
            if plan.outline.name not in rows:
                row = judge(paper.slug, plan.outline, [(job, outcomes[job.key]) for job in plan.jobs])
                rows[plan.outline.name] = rounded(row)
                print(f"{paper.slug} {row['claim']}: {row['verdict']}, {row['seconds']:.0f} s", flush=True)
        if plans:
            path.parent.mkdir(exist_ok=True)
            claims = [rows[plan.outline.name] for plan in plans]
            text = json.dumps({"paper": paper.slug, "claims": claims}, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
            front()


def both() -> list:
    """Return the rows of evidence and replication of each claim that was run again."""
    pairs = []
    for path in sorted((ROOT / "evidence" / "replication").glob("*.json")):
        first = {row["claim"]: row for row in stored(ROOT / "evidence" / path.name)}
        pairs += [(first[again["claim"]], again) for again in stored(path) if again["claim"] in first]
    return pairs


def page() -> str:
    """Return the table: both verdicts of each claim that was run again, what changed first."""
    pairs = both()
    changed = [pair for pair in pairs if pair[0]["verdict"] != pair[1]["verdict"]]
    held = [pair for pair in pairs if pair[0]["verdict"] == "holds"]
    twice = sum(again["verdict"] == "holds" for _, again in held)
    lines = [
        "# Every verdict, asked again",
        "",
        f"{len(pairs)} claims on five seeds from {FIRST_SEED} on, or ten where they ask for ten: each whose trial",
        f"takes at most {LONG:.0f} s, and of the others one in {ONE_IN}, by a hash of its name.",
        f"Of the {len(held)} that hold in the [evidence](verdicts.md) {twice} hold again. `make replication` writes this",
        "page.",
        "",
        f"{', '.join(f'`{name}`' for name in MENDED)}",
        "did not hold in a first run on these seeds and have new designs since,",
        "chosen on seeds 100 to 107; for them these seeds are no longer new.",
        "",
        "## What changed its verdict",
        "",
        *(table(changed) if changed else ["Nothing."]),
        "",
        "## All",
        "",
        *table(pairs),
    ]
    return "\n".join(lines) + "\n"


def table(pairs) -> list:
    """Return the lines of a table of rows of evidence and replication."""
    head = "| paper | claim | first: effect or value | verdict | again: effect or value | verdict |"
    return [head, "|---|---|---|---|---|---|", *(line(first, again) for first, again in pairs)]


def line(first, again) -> str:
    """Return one line of the table."""
    cells = [f"`{first['paper']}`", f"`{first['claim']}`"]
    for row in (first, again):
        facts = row.get("effect") or row["value"]
        low, high = facts["ci95"]
        mean = "-" if facts["mean"] is None else f"{facts['mean']:.3g}"
        cells += [mean + ("" if low is None else f" ({low:.3g} to {high:.3g})"), row["verdict"]]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
