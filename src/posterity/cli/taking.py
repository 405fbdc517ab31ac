"""Taking away: report, site, citation, the file of a method, and the files of a new paper."""

from pathlib import Path
from typing import Annotated

import typer

from posterity.cli._app import Slug, Slugs, app, say
from posterity.papers import get


@app.command()
def report(
    slugs: Slugs = None,
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path(
        "posterity-report"
    ),
) -> None:
    """Write a page a paper and a gallery of them, self-contained HTML, from stored trials."""
    from posterity.engine.store import Store
    from posterity.engine.verdicts import current
    from posterity.site.report import write_report

    for slug in slugs or []:
        get(slug)
    kept, stale = current(slugs or None, Store())
    if not kept:
        raise ValueError(
            "nothing to report: no stored trials of the current code; `posterity run SLUG` makes them"
        )
    index = write_report(kept, _folder(out))
    if stale:
        say(f"{stale} stored trials were made by other code and are not shown")
    say(f"open {index.resolve().as_uri()} in a browser")
    print(index)


@app.command()
def site(
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path("posterity-site"),
) -> None:
    """Write the gallery of all papers, a page a paper and a page a task, from what came with the package."""
    from posterity.site.gallery import write_site

    index = write_site(_folder(out))
    say(f"open {index.resolve().as_uri()} in a browser")
    print(index)


def _folder(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise ValueError(f"-o must be a folder, got the file {out}")
    return out


@app.command()
def cite(slugs: Annotated[list[str], typer.Argument(help="Slugs of papers.")]) -> None:
    """Print BibTeX."""
    print("\n\n".join(get(slug).bibtex() for slug in slugs))


@app.command()
def vendor(slug: Slug) -> None:
    """Print a method as one file, importable without Posterity, with licence and citation."""
    from posterity.site.vendor import vendored

    paper = get(slug)
    if not paper.implemented:
        raise ValueError(f"{slug} is not implemented yet: `posterity list --implemented` shows what is")
    print(vendored(paper), end="")


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="The new paper's slug: lower case, digits, hyphens.")],
    domain: Annotated[str, typer.Option("--domain", help="Its domain.")],
    root: Annotated[Path, typer.Option("--root", help="A checkout of Posterity.")] = Path(),
) -> None:
    """Write the four files of a new paper into a checkout."""
    from posterity.site.scaffold import scaffold

    for path in scaffold(slug, domain, root):
        print(path)
