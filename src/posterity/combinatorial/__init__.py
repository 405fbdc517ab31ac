"""Combinatorial problems: routing, search, quality-diversity."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
