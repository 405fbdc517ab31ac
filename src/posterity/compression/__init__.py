"""Compression of networks: pruning, quantisation, sparse experts."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
