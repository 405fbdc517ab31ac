"""Imitation and rewards: learning from demonstrations and preferences."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
