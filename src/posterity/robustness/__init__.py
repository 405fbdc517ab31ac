"""Robustness: attacks, defences and the limits of both."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
