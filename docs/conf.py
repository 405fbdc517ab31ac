"""Sphinx configuration of the manual; the pages of domains are written from records.

The manual is the folder ``manual`` of the site, whose gallery and pages of papers
`posterity.site` writes beside it.
"""

import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import posterity
from posterity._names import files
from posterity.papers import DOMAINS, ROOT, papers, public_modules

project = "Posterity"
author = "The Posterity developers"
copyright = author
version = release = posterity.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "myst_parser", "sphinx_design"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["colon_fence", "dollarmath"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": True,
    "navbar_center": ["navbar-nav", "gallery"],
    "secondary_sidebar_items": ["page-toc"],
}
html_title = "Posterity"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
nitpicky = False
suppress_warnings = ["docutils"]  # method docstrings are plain text with equations, not markup

HERE = Path(__file__).parent


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
    """Write the generated pages, those of the API."""
    (HERE / "api").mkdir(exist_ok=True)
    implemented = [paper for paper in papers().values() if paper.implemented]
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


def paper_links(app, docname, source):
    """Lead what names the page of a paper to the gallery's, one folder up."""
    source[0] = re.sub(
        r"\[([^]]*)\]\(((?:\.\./)*)papers/([\w-]+)\.md\)", r'<a href="\2../papers/\3.html">\1</a>', source[0]
    )


def setup(app):
    app.connect("source-read", paper_links)


write_pages()
