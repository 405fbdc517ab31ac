"""Optimisation: optimisers, gradients of discrete solvers, training without backpropagation."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
