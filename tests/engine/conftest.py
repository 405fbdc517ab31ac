"""Jobs of the trials beside these tests."""

import os
from pathlib import Path

import pytest

from posterity.engine.store import Job


@pytest.fixture
def jobs(monkeypatch):
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", path)

    def make(name, n, time_limit=120.0, **params):
        return [
            Job(
                "plain",
                name,
                f"{'drawn' if name == 'draw' else 'plain'}_trials:{name}",
                params,
                seed,
                "code",
                "cpu",
                time_limit,
            )
            for seed in range(n)
        ]

    return make
