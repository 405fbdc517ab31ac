"""Graph neural networks: layers, encodings, training schemes and analysis."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
