"""Tables: prediction and treatment effects on rows and columns."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
