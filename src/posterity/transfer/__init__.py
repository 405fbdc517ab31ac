"""Transfer: adaptation, prompts, few shots, continual learning."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
