"""Reinforcement learning: agents, world models, games."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
