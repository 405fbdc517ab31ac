"""Clustering: groups in data without labels."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
