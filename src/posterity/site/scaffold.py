"""The four files of a new paper: they pass the linters, and their tests say what is missing."""

import json
import re
from pathlib import Path

from posterity.papers import DOMAINS, papers

__all__ = ["scaffold"]

METHOD = '''"""{title}: the idea in one sentence.

    equation                                                                 (1)

What it does to the numbers.
"""

__all__: list[str] = []
'''

CLAIMS = '''"""Claims about {slug}: say what the paper says, before it is run."""

from posterity.claims import Trial, comparison


@comparison(
    paper="{slug}",
    says="The paper's statement in one sentence.",
    where="Section and table",
    arms=("baseline", "method"),
    metric="what is measured, with its unit",
    better="lower",
)
def main(trial: Trial) -> dict[str, float]:
    """Say what is compared, on what, and where it fails."""
    raise NotImplementedError("train both arms on the same split and return their metrics")
'''

TEST = '''"""{slug}: the sentences that its mathematics promises."""

import importlib

from posterity.papers import get


def test_has_public_names():
    module = importlib.import_module(get("{slug}").module)
    assert module.__all__, "write the method and list its public names"


def test_record_exports_them():
    paper = get("{slug}")
    needed = ("summary", "tags", "kind", "exports", "problem", "lines")
    missing = [name for name in needed if not getattr(paper, name)]
    assert not missing, f"the record {slug}.toml lacks {{missing}}"


def test_promises_of_the_mathematics():
    raise AssertionError("test each exact check: a limit, a closed form, a bound, an invariance, bad input")
'''


def scaffold(slug: str, domain: str, root: Path) -> list[Path]:
    """Write a new paper's files into a checkout and return their paths.

    Parameters
    ----------
    slug : str
        Lower case, digits and hyphens. A known paper's record is kept.
    domain : str
        One of the 25.
    root : Path
        The checkout.

    Returns
    -------
    list of Path

    Raises
    ------
    ValueError
        If an argument is not allowed, a file is there already, or ``root`` is no checkout.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise ValueError(f"slug must be lower-case words and digits joined by hyphens, got {slug!r}")
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    source = root / "src" / "posterity"
    if not (source / "papers").is_dir():
        raise ValueError(
            f"--root must be a checkout of Posterity, {root.resolve()} has no src/posterity/papers"
        )
    paper = papers().get(slug)
    if paper is not None and paper.domain != domain:
        raise ValueError(f"{slug} belongs to {paper.domain}, and a domain never changes; got {domain!r}")
    stem = slug.replace("-", "_")
    stem = f"_{stem}" if stem[0].isdigit() else stem
    title = paper.title if paper else slug
    facts = {"slug": slug, "title": title}
    files = {
        source / domain / f"{stem}.py": METHOD.format(**facts),
        source / "claims" / domain / f"{stem}.py": CLAIMS.format(**facts),
        root / "tests" / domain / f"test_{stem}.py": TEST.format(**facts),
    }
    record = source / "papers" / f"{slug}.toml"
    if paper is None:
        empty = {
            "slug": slug,
            "domain": domain,
            "title": slug,
            "authors": ["?"],
            "venue": "ICLR 2024",
            "track": "?",
        }
        rows = {**empty, "summary": "?", "tags": ["?"]}
        files[record] = "".join(f"{name} = {json.dumps(value)}\n" for name, value in rows.items())
    if there := [path for path in files if path.exists()]:
        raise ValueError(f"{there[0]} is there already")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [*files] if record in files else [*files, record]
