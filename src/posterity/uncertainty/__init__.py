"""Uncertainty: calibration, out-of-distribution scores, Bayesian networks, neural processes."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
