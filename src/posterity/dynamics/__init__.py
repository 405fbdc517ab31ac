"""Learning dynamics: what training does, measured."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
