"""Federated learning: training over clients that keep their data."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
