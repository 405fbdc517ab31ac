"""Science: molecules, proteins, circuits, brains."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
