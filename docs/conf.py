"""Sphinx configuration; pages of papers and domains are written from records and evidence."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import posterity
from posterity._names import files
from posterity.engine.discovery import claim_outlines
from posterity.engine.statistics import describe_range
from posterity.engine.verdicts import agreement, settling
from posterity.papers import DOMAINS, ROOT, papers, public_modules

project = "Posterity"
author = "The Posterity developers"
copyright = author
version = release = posterity.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "myst_parser", "sphinx_design"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["colon_fence", "dollarmath"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": True,
    "secondary_sidebar_items": ["page-toc"],
}
html_title = "Posterity"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
nitpicky = False
suppress_warnings = ["docutils"]  # method docstrings are plain text with equations, not markup

HERE = Path(__file__).parent


def number(value):
    """Return a number in four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def interval(facts):
    """Return mean and interval in one cell."""
    low, high = facts["ci95"]
    return number(facts["mean"]) + ("" if low is None else f" ({number(low)} to {number(high)})")


def paper_page(paper):
    """Return the page of one implemented paper."""
    evidence = paper.evidence()
    rows = {row["claim"]: row for row in evidence["claims"]}
    extra = f'`pip install "posterity[{paper.extra}]"`' if paper.extra else "nothing beyond the core"
    out = [
        f"# {paper.slug}", "", f"**{paper.title}.** {', '.join(paper.authors)}. {paper.venue}. <{paper.url}>", "",
        paper.summary, "", f"*For:* {paper.problem}", "", "```python", paper.lines.strip(), "```", "",
        f"Needs: labels {paper.labels}; GPU {paper.gpu}; install: {extra}.", "",
    ]  # fmt: skip
    for outline in claim_outlines(paper):
        row = rows.get(outline.name)
        out += [f"## {outline.facts['says']}", ""]
        if row is None:
            out += ["Not measured yet.", ""]
        else:
            out += [
                f"**{row['verdict']}** on {len(row['seeds'])} seeds, {row['metric']}, data {row['data']}{settling(row)}.",
                "",
            ]
            out += ["| | mean (95 % interval) |", "|---|---|"]
            out += [f"| {arm} | {interval(facts)} |" for arm, facts in row.get("arms", {}).items()]
            if "effect" in row:
                out.append(f"| paired difference | {interval(row['effect'])} |")
            if "value" in row:
                out.append(f"| value | {interval(row['value'])} |")
                out.append(
                    f"| limit | {row['limit']:g} |"
                    if "limit" in row
                    else f"| range | {describe_range(row['range'])} |"
                )
            out += ["", *(f"- {name}: {number(value)}" for name, value in row.get("records", {}).items()), ""]
        out += [
            outline.doc.replace("``", "`"),
            "",
            "```",
            f"posterity run {paper.slug} --claim {outline.name}",
            "```",
            "",
        ]
    if evidence["parity"]:
        out += ["## Parity", "", f"{agreement(evidence['parity'])}.", ""]
    if paper.departures:
        out += ["## Departures from the paper, and slips of official code not copied", ""]
        out += [f"{number}. {text}" for number, text in enumerate(paper.departures, start=1)]
    out += ["", "## API", ""]
    out += [f"- {{py:obj}}`posterity.{paper.domain}.{name}`" for name in paper.exports]
    out += ["", "## Cite", "", "```bibtex", paper.bibtex(), "```", ""]
    return "\n".join(out)


def domain_page(domain, here):
    """Return the API page of one domain."""
    doc = importlib.import_module(f"posterity.{domain}").__doc__
    out = [f"# posterity.{domain}", "", doc, ""]
    for paper in here:
        out += [f"## {paper.slug}", "", f"[{paper.title}](../papers/{paper.slug}.md)", ""]
        for name in paper.exports:
            thing = getattr(importlib.import_module(paper.home(name)), name)
            kind = "autoclass" if isinstance(thing, type) else "autofunction"
            if not callable(thing) or not (isinstance(thing, type) or hasattr(thing, "__code__")):
                kind = "autodata"
            # what scikit-learn adds to every estimator is documented there
            members = (
                "\n:exclude-members: set_fit_request, set_score_request, set_predict_request, set_decision_function_request, set_transform_request\n:members:\n:show-inheritance:"
                if kind == "autoclass"
                else ""
            )
            out += ["```{eval-rst}", f".. py:currentmodule:: posterity.{domain}",
                    f".. {kind}:: posterity.{domain}.{name}" + members.replace("\n", "\n   "), "```", ""]  # fmt: skip
    for shared in public_modules(domain):
        out += [f"## {shared}", "", "```{eval-rst}", f".. automodule:: {shared}", "   :members:", "```", ""]
    return "\n".join(out)


def write_pages():
    """Write the generated pages: papers, domains, the table of verdicts, the changelog."""
    for folder in ("papers", "api"):
        (HERE / folder).mkdir(exist_ok=True)
    implemented = [paper for paper in papers().values() if paper.implemented]
    for paper in implemented:
        (HERE / "papers" / f"{paper.slug}.md").write_text(paper_page(paper), encoding="utf-8")
    rows = ["# Papers", "", "| paper | domain | what it does | verdicts |", "|---|---|---|---|"]
    for paper in papers().values():
        name = f"[{paper.slug}]({paper.slug}.md)" if paper.implemented else paper.slug
        found = paper.evidence()["claims"]
        rows.append(
            f"| {name} | {paper.domain} | {paper.summary} | {', '.join(r['verdict'] for r in found)} |"
        )
    rows += ["", "```{toctree}", ":hidden:", "", *(paper.slug for paper in implemented), "```", ""]
    (HERE / "papers" / "index.md").write_text("\n".join(rows), encoding="utf-8")
    domains = [d for d in DOMAINS if any(p.domain == d for p in implemented)]
    for domain in domains:
        here = [paper for paper in implemented if paper.domain == domain]
        (HERE / "api" / f"{domain}.md").write_text(domain_page(domain, here), encoding="utf-8")
    index = ["# API by domain", "", "```{toctree}", "", *domains, "testing", "```", ""]
    (HERE / "api" / "index.md").write_text("\n".join(index), encoding="utf-8")
    testing = ["# posterity.testing", "", "```{eval-rst}", ".. automodule:: posterity.testing", ""]
    testing += [f".. autofunction:: posterity.testing.{name}" for name in files(ROOT / "testing")]
    testing = "\n".join([*testing, "```", ""])
    (HERE / "api" / "testing.md").write_text(testing, encoding="utf-8")


write_pages()
