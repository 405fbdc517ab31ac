"""Shared fixtures: the user's view without shape hooks, and a store of one's own."""

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
