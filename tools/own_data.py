"""Write docs/own-data.md: what each paper takes of a user's data, claim by claim."""

from pathlib import Path

from posterity.engine.discovery import load_claims
from posterity.lab.data import kind_of
from posterity.papers import papers

ROOT = Path(__file__).parent.parent
HEAD = """# What each paper takes

By `posterity run SLUG --data FILE`; the kinds are those of [your own data](data.md). `make stubs` writes this page.

| paper | kind | claims |
|---|---|---|
"""


def kinds(paper) -> dict[str, list[str]]:
    """Return the claims that take each kind of data."""
    found: dict[str, list[str]] = {}
    for name, claim in load_claims(paper).items():
        if "data" in claim.parameters:
            found.setdefault(kind_of(claim.parameters["data"].annotation).name, []).append(name)
    return found


def page() -> str:
    """Return the page."""
    lines = []
    for paper in papers().values():
        if not (paper.implemented and paper.module.startswith("posterity.")):
            continue
        for kind, claims in kinds(paper).items():
            lines.append(f"| `{paper.slug}` | {kind} | {', '.join(f'`{claim}`' for claim in claims)} |")
        if paper.own_data:
            lines.append(f"| `{paper.slug}` | | {paper.own_data} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "own-data.md").write_text(page(), encoding="utf-8")
