"""Privacy: learning with a differential privacy guarantee, attacks, unlearning."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
