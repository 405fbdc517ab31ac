"""Write evidence/<slug>.json: each claim at its defaults, seeds 0 to 4, by the code as it is."""

import json
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from posterity.engine.discovery import claim_outlines
from posterity.engine.plan import plan_claims
from posterity.engine.run import execute
from posterity.engine.store import Outcome, Store
from posterity.engine.verdicts import judge, settling
from posterity.papers import DOMAINS, get, papers
from posterity.site.figures import alone, dots
from tools.parity import compare

ROOT = Path(__file__).parent.parent
DIGITS = 6
LIBRARIES = ("torch", "numpy", "scikit-learn", "scipy")


def thin(curve):
    """Return at most 50 points of a curve, its last among them."""
    return curve[:: -max(1, len(curve) // 50)][::-1]


def rounded(value):
    """Return JSON values with numbers in six digits, so that files are small and stable."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def current(path, plans):
    """Return the rows of a file that the code as it is would make again, by claim."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["libraries"] != {name: version(name) for name in LIBRARIES}:
        return {}
    rows = {row["claim"]: row for row in stored["claims"] if row["verdict"] != "error"}
    kept = {}
    for plan in plans:
        row, first = rows.get(plan.outline.name), plan.jobs[0]
        if row is None or row["code"] != first.code or row["seeds"] != [job.seed for job in plan.jobs]:
            continue
        data = {"data": row["data"]} if row["data"] is not None else {}
        if {**data, **row["params"]} == json.loads(json.dumps(plan.params)):
            kept[row["claim"]] = judged_again(row, plan)
    return kept


def judged_again(row, plan):
    """Return a row as its values in six digits give it, the same however often it is judged."""
    aside = {name: row[name] for name in ("seconds", "records", "curves", "pictures") if name in row}
    return {**judge(plan.paper.slug, plan.outline, outcomes_of(row, plan.jobs)), **aside}


def outcomes_of(row, jobs):
    """Return the trials of a row, so that it can be judged again."""
    if "arms" in row:
        by_seed = zip(*(facts["values"] for facts in row["arms"].values()), strict=True)
        values = [dict(zip(row["arms"], each, strict=True)) for each in by_seed]
    else:
        values = row["value"]["values"]
    return [(job, Outcome(value=value)) for job, value in zip(jobs, values, strict=True)]


def main() -> None:
    """Run what is missing of some papers, or of all; with ``--front`` only write what is made of it."""
    if sys.argv[1:] == ["--front"]:
        front()
        return
    chosen = [get(slug) for slug in sys.argv[1:]] or [p for p in papers().values() if p.implemented]
    store = Store()
    for paper in chosen:
        plans, _ = plan_claims(paper)
        path = ROOT / "evidence" / f"{paper.slug}.json"
        kept = current(path, plans)
        outcomes = {}
        missing = [job for plan in plans if plan.outline.name not in kept for job in plan.jobs]
        for job, outcome, _ in execute(missing, store):
            outcomes[job.key] = outcome
        claims = []
        for plan in plans:
            if plan.outline.name in kept:
                claims.append(kept[plan.outline.name])
                continue
            pairs = [(job, outcomes[job.key]) for job in plan.jobs]
            row = judge(paper.slug, plan.outline, pairs)
            good = [outcome for _, outcome in pairs if not outcome.error]
            names = dict.fromkeys(name for outcome in good for name in outcome.records)
            row["records"] = {
                name: sum(values) / len(values)
                for name in names
                if (values := [outcome.records[name] for outcome in good if name in outcome.records])
            }
            row["curves"] = {name: thin(curve) for name, curve in good[0].curves.items()} if good else {}
            if good and good[0].pictures:
                row["pictures"] = dict(good[0].pictures)
            claims.append(row if "errors" in row else judged_again(rounded(row), plan))
            print(f"{paper.slug} {row['claim']}: {row['verdict']}, {row['seconds']:.0f} s")
        facts = {
            "paper": paper.slug,
            "python": platform.python_version(),
            "libraries": {name: version(name) for name in LIBRARIES},
            "parity": {**(agreed := compare(paper.slug)), "largest": float(f"{agreed['largest']:.2g}")},
            "claims": claims,
        }
        if speed := paper.evidence().get("speed"):  # `tools.bench` measures it
            facts["speed"] = speed
        path.write_text(json.dumps(rounded(facts), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    front()


def front() -> None:
    """Write what README and manual say of the evidence: verdicts by domain, all of them, a picture, twice asked, speed."""
    from tools import bench, replication  # which call this

    for name, text in (("replication", replication.page()), ("speed", bench.page())):
        (ROOT / "docs" / f"{name}.md").write_text(text, encoding="utf-8")
    rows = [
        row
        for path in sorted((ROOT / "evidence").glob("*.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))["claims"]
    ]
    first = next(row for row in rows if row["paper"] == "rectified-flow")
    (ROOT / "docs" / "verdict.svg").write_text(alone(dots(first)), encoding="utf-8")
    (ROOT / "docs" / "verdicts.md").write_text(VERDICTS + every(rows), encoding="utf-8")
    path = ROOT / "README.md"
    head, mark, rest = path.read_text(encoding="utf-8").partition("<!-- verdicts -->\n")
    _, end, tail = rest.partition("<!-- end of verdicts -->")
    path.write_text(
        head + mark + by_domain(rows) + "\n" + open_questions(rows) + end + tail, encoding="utf-8"
    )


VERDICTS = """# Every verdict

Effect or value with its 95 % interval, and what follows. `make evidence` writes this page.

"""


def every(rows) -> str:
    """Return the table of all claims."""
    lines = ["| paper | claim | effect or value (95 % interval) | seeds | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        facts = row.get("effect") or row["value"]
        low, high = facts["ci95"]
        interval = "" if low is None else f" ({low:.3g} to {high:.3g})"
        mean = "-" if facts["mean"] is None else f"{facts['mean']:.3g}"
        verdict = row["verdict"] + settling(row)
        lines.append(
            f"| `{row['paper']}` | {row['says']} | {mean}{interval} | {len(row['seeds'])} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def by_domain(rows) -> str:
    """Return the table of counts, a domain a line."""
    lines = ["| domain | papers | claims | hold | fail | inconclusive |", "|---|---|---|---|---|---|"]
    domains = {row["paper"]: get(row["paper"]).domain for row in rows}
    for domain in [*(domain for domain in DOMAINS if domain in domains.values()), "all"]:
        here = [row for row in rows if domain in ("all", domains[row["paper"]])]
        verdicts = Counter(row["verdict"] for row in here)
        counts = [len({row["paper"] for row in here}), len(here)]
        counts += [verdicts[verdict] for verdict in ("holds", "fails", "inconclusive")]
        lines.append(f"| {domain} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def open_questions(rows) -> str:
    """Return the claims that do not hold, each with its reason."""
    lines = []
    for row in rows:
        if row["verdict"] != "holds":
            facts = next(o.facts for o in claim_outlines(get(row["paper"])) if o.name == row["claim"])
            said = f"{row['verdict']}{settling(row)}"
            lines.append(f"- `{row['paper']}`: {row['says']} *{said}.* {facts.get('reason', '')}".rstrip())
    return "\n".join(["What does not hold:", "", *lines, ""]) if lines else ""


if __name__ == "__main__":
    main()
