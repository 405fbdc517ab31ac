"""The index: 160 records, each whole, each domain served from them."""

import importlib
import subprocess
import sys

import pytest

import posterity
from posterity.papers import DOMAINS, ROOT, Paper, _parsed, get, papers, read, record
from posterity.stubs import stubs

EVERY = list(papers().values())
IMPLEMENTED = [paper for paper in EVERY if paper.implemented]


def by_slug(paper):
    return paper.slug


def test_there_are_160_papers_in_25_domains():
    assert len(EVERY) == 160
    assert {paper.domain for paper in EVERY} == set(DOMAINS)
    assert len(DOMAINS) == 25
    assert len({paper.title for paper in EVERY}) == 160


@pytest.mark.parametrize("paper", EVERY, ids=by_slug)
def test_a_record_says_what_the_method_does(paper):
    assert paper.venue in ("ICLR 2023", "ICLR 2024")
    assert paper.authors
    assert paper.track
    assert 40 <= len(paper.summary) <= 140
    assert paper.summary.endswith(".")
    assert paper.summary.rstrip(".") != paper.title
    assert len(paper.tags) == len(set(paper.tags)) >= 4
    assert all(tag == tag.lower() for tag in paper.tags)
    assert (ROOT / "papers" / f"{paper.slug}.toml").is_file()
    assert (ROOT / paper.domain).is_dir()


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=by_slug)
def test_an_implemented_record_is_whole(paper):
    for name in ("kind", "exports", "problem", "lines", "labels", "gpu", "url", "since"):
        assert getattr(paper, name), f"{paper.slug}.toml lacks {name}"
    listed = [name for module in paper.modules for name in importlib.import_module(module).__all__]
    assert sorted(listed) == sorted(paper.exports), "exports are the __all__ of the method files together"
    domain = importlib.import_module(f"posterity.{paper.domain}")
    for name in paper.exports:
        assert getattr(domain, name) is getattr(importlib.import_module(paper.home(name)), name)
        assert name in dir(domain)
    assert paper.claims_file is not None


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=by_slug)
def test_the_lines_that_use_it_run(paper, as_a_user):
    exec(compile(paper.lines, paper.slug, "exec"), {})


@pytest.mark.parametrize("paper", EVERY, ids=by_slug)
def test_a_citation_is_made_from_the_record(paper):
    entry = paper.bibtex()
    assert entry.startswith("@inproceedings{")
    assert paper.title in entry
    assert entry.count("{") == entry.count("}")


def test_citation_keys_are_unique():
    assert len({paper.bibtex().splitlines()[0] for paper in EVERY}) == 160


def test_stubs_are_those_of_the_records():
    for path, text in stubs().items():
        assert path.read_text() == text, "run `make stubs`"


def test_a_name_that_is_not_there_is_an_attribute_error():
    domain = importlib.import_module("posterity.transport")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = domain.nothing


def test_nothing_heavy_is_imported():
    code = "import sys, posterity, posterity.cli, posterity.transport; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert posterity.__version__


def test_an_unknown_paper_is_answered_with_its_neighbours():
    with pytest.raises(ValueError, match="did you mean rectified-flow"):
        get("rectifeid-flow")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('colour = "red"', "unknown field 'colour'"),
        ('tags = "one"', "tags must be a list of strings"),
        ("title = 3", "title must be a string"),
        ('slug = "x"', "missing"),
    ],
)
def test_a_record_with_a_wrong_field_is_refused(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_method_of_several_files_is_one_paper(tmp_path):
    """Each name is found in the file that lists it, and one that no file lists is said."""
    package = tmp_path / "posterity" / "graphs"
    package.mkdir(parents=True)
    (package / "one.py").write_text("__all__ = ['first']\n")
    (package / "two.py").write_text("__all__: list[str] = ['second']\n")
    facts = {"slug": "one", "domain": "graphs", "title": "T", "authors": ["A"], "venue": "ICLR 2024", "track": "p",
             "summary": "S.", "tags": [], "exports": ["first", "second", "third"], "parts": ["two"]}  # fmt: skip
    paper = record(tmp_path / "one.toml", facts, tmp_path / "posterity")
    assert paper.modules == ("posterity.graphs.one", "posterity.graphs.two")
    assert [paper.home(name) for name in paper.exports[:2]] == list(paper.modules)
    with pytest.raises(ValueError, match="no method file has 'third'"):
        paper.home("third")


def test_a_public_module_of_a_domain_is_served_by_its_name(tmp_path, monkeypatch):
    """It is found by its file, and is in the stub; files of papers and private ones are no public modules."""
    import posterity.papers as index

    package = tmp_path / "language"
    package.mkdir()
    for name in ("__init__", "_private", "sandbox"):
        (package / f"{name}.py").write_text("")
    monkeypatch.setattr(index, "ROOT", tmp_path)
    assert index.public_modules("language") == ["posterity.language.sandbox"]
    monkeypatch.setattr("posterity.stubs.ROOT", tmp_path)
    assert stubs()[package / "__init__.pyi"] == "from posterity.language import sandbox as sandbox\n"


@pytest.mark.parametrize("first", ["posterity.graphs.semantic_robustness", "posterity.graphs"])
def test_a_function_named_as_its_file_is_served_whatever_is_imported_first(first):
    code = (
        f"import {first}; from posterity.graphs import semantic_robustness, CSBM; import posterity.graphs as g;"
        "assert callable(semantic_robustness) and g.semantic_robustness is semantic_robustness"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_are_parsed_again_when_a_file_changes_and_only_then(tmp_path, monkeypatch):
    (tmp_path / "x.toml").write_text('slug = "x"')
    assert _parsed(tmp_path) == {"x.toml": {"slug": "x"}}
    with monkeypatch.context() as patched:
        patched.setattr("tomllib.loads", None)
        assert _parsed(tmp_path) == {"x.toml": {"slug": "x"}}
    (tmp_path / "x.toml").write_text('slug = "longer"')
    (tmp_path / "y.toml").write_text('slug = "y"')
    assert _parsed(tmp_path) == {"x.toml": {"slug": "longer"}, "y.toml": {"slug": "y"}}


def test_a_broken_cache_of_records_is_made_again(tmp_path):
    (tmp_path / "x.toml").write_text('slug = "x"')
    _parsed(tmp_path)
    (tmp_path / "__pycache__" / "records.json").write_text("{")
    assert _parsed(tmp_path) == {"x.toml": {"slug": "x"}}


def test_a_paper_of_another_package_is_found(tmp_path, monkeypatch):
    """Records come from a package named by an entry point; their files from its modules."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text("__all__ = ['answer']\nanswer = 42\n")
    facts = {"slug": "theirs", "domain": "tabular", "title": "T", "venue": "ICLR 2024", "track": "poster",
             "summary": "S.", "module": "elsewhere.method", "claims": "elsewhere.claims"}  # fmt: skip
    lists = 'authors = ["A B"]\ntags = ["a"]\nexports = ["answer"]\n'
    (package / "theirs.toml").write_text(lists + "".join(f'{k} = "{v}"\n' for k, v in facts.items()))
    info = tmp_path / "elsewhere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[posterity.papers]\nelsewhere = elsewhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    papers.cache_clear()
    try:
        paper = get("theirs")
        assert isinstance(paper, Paper)
        assert paper.implemented
        assert paper.claims_file is None
    finally:
        papers.cache_clear()


def test_the_extra_of_every_domain_is_part_of_all():
    tomllib = pytest.importorskip("tomllib")
    text = (ROOT.parent.parent / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    inside = extras["all"][0].removeprefix("posterity[").removesuffix("]").split(",")
    development = {"all", "test", "lint", "docs", "bench"}
    apart = {"federated"}  # Flower does not fit beside the others
    assert set(inside) == set(extras) - development - apart
    assert {paper.extra for paper in IMPLEMENTED} - {""} <= set(inside)
