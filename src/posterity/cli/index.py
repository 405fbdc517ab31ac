"""The index on the command line: list, search, show."""

from typing import Annotated, Any

import typer

from posterity.cli._app import AsJson, Domain, Slug, app, dump, say
from posterity.papers import DOMAINS, Paper, get, papers


def _index_row(paper: Paper) -> dict[str, Any]:
    return {
        "slug": paper.slug, "domain": paper.domain, "title": paper.title, "summary": paper.summary,
        "tags": list(paper.tags), "venue": paper.venue, "implemented": paper.implemented,
    }  # fmt: skip


def _print_index(found: list[Paper]) -> None:
    width = max((len(paper.slug) for paper in found), default=0)
    for paper in found:
        mark = "*" if paper.implemented else " "
        print(f"{mark} {paper.slug:<{width}}  {paper.domain:<14}  {paper.summary}")


@app.command("list")
def list_(
    domain: Domain = None,
    implemented: Annotated[bool, typer.Option("--implemented", help="Only what can be used now.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the papers; a star marks those that are implemented."""
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    found = [
        p for p in papers().values() if domain in (None, p.domain) and (p.implemented or not implemented)
    ]
    found.sort(key=lambda p: (DOMAINS.index(p.domain) if p.domain in DOMAINS else len(DOMAINS), p.slug))
    if as_json:
        dump([_index_row(paper) for paper in found])
    else:
        _print_index(found)


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="What you look for: a problem, a method, a name.")],
    as_json: AsJson = False,
) -> None:
    """Search the papers by problem, method or name; typos are forgiven."""
    from posterity.papers.search import find

    found = find(" ".join(words))
    if as_json:
        dump([_index_row(paper) for paper in found])
    elif found:
        _print_index(found)
    else:
        say(f"nothing found for {' '.join(words)}; `posterity list` shows all")


@app.command()
def show(slug: Slug, as_json: AsJson = False) -> None:
    """Show what a paper's method is for, the lines that use it, its claims and verdicts."""
    from posterity.engine.discovery import claim_outlines
    from posterity.engine.verdicts import agreement, settling

    paper = get(slug)
    shipped = paper.evidence()
    facts: dict[str, Any] = {
        **_index_row(paper), "authors": list(paper.authors), "track": paper.track, "url": paper.url,
        "for": paper.problem, "kind": paper.kind, "lines": paper.lines, "module": paper.module,
        "exports": list(paper.exports),
        "needs": {"labels": paper.labels, "gpu": paper.gpu, "extra": paper.extra},
        "departures": list(paper.departures), "parity": shipped["parity"], "claims": [], "cite": paper.bibtex(),
    }  # fmt: skip
    last = {row["claim"]: row for row in shipped["claims"]}
    last |= {row["claim"]: row for row in _remembered(slug)}
    for outline in claim_outlines(paper):
        row = last.get(outline.name)
        per_trial = row["seconds"] / max(1, len(row["seeds"])) if row else None
        facts["claims"].append({
            "name": outline.name, "says": outline.facts["says"], "form": outline.form, "params": outline.defaults,
            "verdict": row["verdict"] if row else None, "effect": (row.get("effect") or row.get("value")) if row else None,
            "settling": settling(row) if row else "",
            "seconds_per_trial": round(per_trial, 2) if per_trial is not None else None,
        })  # fmt: skip
    if as_json:
        dump(facts)
        return
    print(f"{paper.title}\n{', '.join(paper.authors)}. {paper.venue} ({paper.track}).\n")
    print(paper.summary)
    if not paper.implemented:
        print(f"\nNot implemented yet.\n\n{paper.bibtex()}")
        return
    extra = f'pip install "posterity[{paper.extra}]"' if paper.extra else "nothing beyond the core"
    print(f"\nFor: {paper.problem}\n\nUse it ({paper.kind}):\n")
    print("\n".join("    " + line for line in paper.lines.strip().splitlines()))
    print(f"\nNeeds: labels {paper.labels}; GPU {paper.gpu}; install: {extra}")
    print("\nClaims:")
    for claim in facts["claims"]:
        cost = f", {claim['seconds_per_trial']:g} s a seed" if claim["seconds_per_trial"] is not None else ""
        print(
            f"  {claim['name']}: {claim['says']}\n    {claim['verdict'] or 'not run yet'}{claim['settling']}{cost}"
        )
    if facts["parity"]:
        print(f"\nParity: {agreement(facts['parity'])}.")
    if paper.departures:
        print("\nDepartures from the paper and slips of official code not copied:")
        for number, text in enumerate(paper.departures, start=1):
            print(f"  {number}. {text}")
    print(f"\nCite:\n{paper.bibtex()}")


def _remembered(slug: str) -> list[dict[str, Any]]:
    """Return this machine's rows at the default parameters; the store is read only if it is there."""
    from posterity.engine.store import Store, home

    if not (home() / "trials.sqlite").is_file():
        return []
    from posterity.engine.discovery import claim_outlines
    from posterity.engine.verdicts import stored_rows

    defaults = {outline.name: outline.defaults for outline in claim_outlines(get(slug))}
    rows, _ = stored_rows([slug], Store())
    return [row for row in rows if _params(row) == defaults[row["claim"]]]


def _params(row: dict[str, Any]) -> dict[str, Any]:
    data = {"data": row["data"]} if row["data"] is not None else {}
    return {**data, **row["params"]}
