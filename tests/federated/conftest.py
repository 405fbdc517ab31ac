"""Replies of Flower's clients, made by hand: no server, no network."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def replies():
    """Return a function: states of clients as Flower's replies, client k with k + 1 examples."""
    app = pytest.importorskip("flwr.app")

    def make(states):
        contents = [
            app.RecordDict(
                {
                    "arrays": app.ArrayRecord(state),
                    "metrics": app.MetricRecord({"num-examples": k + 1, "loss": 1.0}),
                }
            )
            for k, state in enumerate(states)
        ]
        return [
            SimpleNamespace(content=each, has_error=lambda: False, has_content=lambda: True)
            for each in contents
        ]

    return make
