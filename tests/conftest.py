"""Shared fixtures: the user's view without shape hooks, a store of one's own, a command line in this process."""

import sys

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def as_a_user():
    """Switch the shape checks of the test hook off, so that our own messages are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Keep each test's stored trials to itself."""
    monkeypatch.setenv("POSTERITY_HOME", str(tmp_path / "home"))


@pytest.fixture
def command(as_a_user, monkeypatch, capsys):
    """Return what runs a command line in this process: words to exit code, stdout, stderr."""
    from posterity.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["posterity", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return run
