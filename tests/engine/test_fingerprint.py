"""A fingerprint changes with the code that computes, and with nothing else."""

import shutil
from pathlib import Path

import pytest

from posterity.engine import fingerprint as module
from posterity.engine.fingerprint import fingerprint, sources
from posterity.papers import papers

implemented = [paper for paper in papers().values() if paper.claims_file]


@pytest.mark.parametrize("paper", implemented, ids=lambda paper: paper.slug)
def test_covers_claim_method_and_the_lab_it_uses_but_no_other_paper(paper):
    names = set(sources(paper.claims))
    assert {paper.claims, paper.module, "posterity._checks"} <= names
    assert not any(
        name.startswith(("posterity.engine", "posterity.cli", "posterity.papers")) for name in names
    )
    others = {other.module for other in papers().values() if other.slug != paper.slug}
    assert not names & others


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return the fingerprint of two modules after a replacement in the second."""

    def make(old="", new=""):
        package = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        package.mkdir()
        (package / "a.py").write_text("from posterity.b import f\nx = f()\n")
        text = '"""Doc."""\n# why\ndef f():\n    """Return 1."""\n    return 1\n'
        assert old in text
        (package / "b.py").write_text(text.replace(old, new))
        files = {f"posterity.{name}": package / f"{name}.py" for name in ("a", "b")}
        monkeypatch.setattr(module, "_file", lambda name: files.get(name))
        for cached in (module.fingerprint, module._imports, module._meaning):
            cached.cache_clear()
        result = fingerprint("posterity.a")
        for cached in (module.fingerprint, module._imports, module._meaning):
            cached.cache_clear()
        shutil.rmtree(package)
        return result

    return make


def test_comments_layout_and_docstrings_do_not_count(edited):
    plain = edited()
    assert edited("# why", "# because") == plain
    assert edited("Return 1.", "Return one.") == plain
    assert edited("    return 1", "\n    return (1)") == plain


def test_code_counts_through_imports(edited):
    assert edited("return 1", "return 2") != edited()


def test_versions_of_libraries_count(monkeypatch):
    name = implemented[0].claims
    before = fingerprint(name)
    monkeypatch.setattr(module, "version", lambda library: "9")
    module.fingerprint.cache_clear()
    assert fingerprint(name) != before
    module.fingerprint.cache_clear()
    assert Path(module.__file__).exists()
