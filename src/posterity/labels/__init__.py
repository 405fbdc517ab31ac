"""Labels: few, weak, noisy or missing."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
