"""Fairness: decisions and clusterings that treat groups alike."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
