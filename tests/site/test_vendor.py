"""A vendored method is one file that needs nothing of Posterity."""

import importlib.util
import re
import sys
from dataclasses import replace

import pytest

from posterity.cli import main
from posterity.papers import get, papers
from posterity.site.vendor import vendored

IMPLEMENTED = [paper for paper in papers().values() if paper.implemented]


def forbid(monkeypatch):
    """Make Posterity a package that cannot be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "posterity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "posterity", None)


@pytest.mark.parametrize("paper", IMPLEMENTED, ids=lambda paper: paper.slug)
def test_a_vendored_method_runs_where_posterity_cannot_be_imported(paper, tmp_path, monkeypatch):
    path = tmp_path / f"vendored_{paper.slug.replace('-', '_')}.py"
    path.write_text(vendored(paper))
    lines = re.sub(r"from posterity\.\w+(\.\w+)? import", f"from {path.stem} import", paper.lines)
    forbid(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    assert sorted(module.__all__) == sorted(paper.exports)
    assert all(hasattr(module, name) for name in module.__all__)
    exec(compile(lines, paper.slug, "exec"), {})


def test_the_command_prints_the_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["posterity", "vendor", "esd"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out == vendored(get("esd"))
    assert "Apache License" in out
    assert "@inproceedings" in out


def test_two_things_of_one_name_in_the_files_of_a_paper_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("posterity.__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "one.py").write_text(
        '"""One."""\nfrom posterity.graphs.two import g\ndef f():\n    return g\n'
    )
    (tmp_path / "graphs" / "two.py").write_text(
        '"""Two."""\ndef g():\n    return f\ndef f():\n    return 1\n'
    )
    paper = replace(get("esd"), module="posterity.graphs.one", parts=("two",))
    with pytest.raises(ValueError, match=r"f is defined in posterity.graphs.two and in posterity.graphs.one"):
        vendored(paper)
    (tmp_path / "graphs" / "two.py").write_text('"""Two."""\nk, f = 1, 2\ndef g():\n    return f\n')
    with pytest.raises(ValueError, match=r"f is defined in posterity.graphs.two and in posterity.graphs.one"):
        vendored(paper)
