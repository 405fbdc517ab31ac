"""Posterity: methods from conference papers, each with its claim as a program."""

__version__ = "0.1.0"
