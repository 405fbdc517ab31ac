"""Language: models of text, their evaluation and their reasoning."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
