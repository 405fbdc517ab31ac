"""Optimal transport: matchings, distances between distributions, gradients through them."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
