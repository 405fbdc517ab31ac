"""Generative models: flows, diffusion, and measures of what they make."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
