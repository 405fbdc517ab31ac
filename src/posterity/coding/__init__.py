"""Coding: compressing images and signals to bytes and back."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
