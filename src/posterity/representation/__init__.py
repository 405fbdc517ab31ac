"""Representation learning: self-supervision, invariance, embeddings."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
