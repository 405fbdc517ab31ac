"""A fingerprint changes with the code that computes, and with nothing else."""

import ast
from pathlib import Path

import pytest

from posterity.engine import fingerprint as module
from posterity.engine.fingerprint import fingerprint, sources
from posterity.papers import method_modules, papers

implemented = [paper for paper in papers().values() if paper.claims_file]


@pytest.mark.parametrize("paper", implemented, ids=lambda paper: paper.slug)
def test_covers_claim_method_and_the_lab_it_uses_and_of_other_papers_only_rivals_by_name(paper):
    names = sources(paper.claims)
    assert {paper.claims, "posterity._checks"} <= names
    assert names & set(paper.modules)
    assert not any(
        name.startswith(("posterity.engine", "posterity.cli", "posterity.papers")) for name in names
    )
    assert not names & (method_modules() - set(paper.modules) - rivals(paper))


def rivals(paper):
    """Return the modules of other papers of which a claim imports a name, as a user would."""
    tree = ast.parse(Path(paper.claims_file).read_text(encoding="utf-8"))
    imported = {(node.module, name.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}  # fmt: skip
    return {
        module
        for other in implemented
        if any((f"posterity.{other.domain}", name) in imported for name in other.exports)
        for module in other.modules
    }


CLAIM = """from posterity.lab.b import f
@comparison(paper="p")
def claim():
    return f()
@bound(paper="p")
def rival():
    return 1
"""
LAB = '''"""Doc."""
import numpy as np
import os
K = 2
# why
def f():
    """Return K."""
    return np.add(K, 1)
def other():
    return 3
@data("two-moons")
def moons():
    return 4
'''


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return the fingerprint of a claim and a module of the lab after a replacement in either."""

    def make(old="", new="", then=("", ""), claim="claim"):
        assert old in CLAIM + LAB
        files = {name: tmp_path / f"{name}.py" for name in ("posterity.a", "posterity.lab.b")}
        for path, text in zip(files.values(), (CLAIM, LAB), strict=True):
            path.write_text(text.replace(old, new).replace(*then))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_file", files.get)
            module._parsed.cache_clear()
            result = module.fingerprint.__wrapped__("posterity.a", claim)
        module._parsed.cache_clear()
        return result

    return make


def test_comments_layout_and_docstrings_do_not_count(edited):
    plain = edited()
    assert edited("# why", "# because") == plain
    assert edited("Return K.", "Return it.") == plain
    assert edited("    return np.add(K, 1)", "\n    return (np.add(K, 1))") == plain


@pytest.mark.parametrize(
    "edit",
    [
        ("K, 1", "K, 2"),
        ("K = 2", "K = 3"),
        ("numpy", "cupy"),
        ("return f()", "return f() + 1"),
        ("return 4", "return 5"),
    ],
    ids=["a function", "what it refers to", "what it imports", "the claim", "a registered data set"],
)
def test_code_that_is_reached_counts(edited, edit):
    assert edited(*edit) != edited()


def test_the_rest_of_the_lab_does_not_count(edited):
    assert edited("return 3", "return 4") == edited()
    assert edited("import os", "import re") == edited()


def test_a_module_counts_by_the_names_taken_from_it(edited):
    named = CLAIM.replace("from posterity.lab.b import f", "from posterity.lab import b").replace(
        "f()", "b.f()"
    )
    plain = edited(CLAIM, named)
    assert edited(CLAIM, named, ("return 3", "return 4")) == plain
    assert edited(CLAIM, named, ("K, 1", "K, 2")) != plain
    assert edited(CLAIM, named.replace("return b.f()", "return b"), ("return 3", "return 4")) != edited(
        CLAIM, named.replace("return b.f()", "return b")
    )


def test_a_definition_may_move_and_types_of_arguments_do_not_count(edited):
    """`f` and what it uses move from the lab's module to the claim's own file, and back."""
    plain = edited()
    whole = LAB[LAB.index("import numpy") :].replace("def other():\n    return 3\n", "")
    assert edited(CLAIM, CLAIM.replace("from posterity.lab.b import f\n", whole)) == plain
    assert edited("def f():", "def f(x: int = 1) -> float:") == edited("def f():", "def f(x=1):") != plain
    there = edited("    return f()", "    from posterity.lab.b import f\n    return f()")
    assert there == edited("    return f()", "    from posterity.lab import f\n    return f()") != plain


def test_other_claims_of_the_file_count_only_in_the_whole(edited):
    assert edited("return 1\n", "return 2\n") == edited()
    assert edited("return 1\n", "return 2\n", claim="") != edited(claim="")


def test_versions_of_libraries_count(monkeypatch):
    name = implemented[0].claims
    before = fingerprint(name)
    monkeypatch.setattr(module, "version", lambda library: "9")
    module.fingerprint.cache_clear()
    assert fingerprint(name) != before
    module.fingerprint.cache_clear()
    assert Path(module.__file__).exists()
