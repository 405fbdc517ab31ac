"""Scenes: radiance fields and three-dimensional generation."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
