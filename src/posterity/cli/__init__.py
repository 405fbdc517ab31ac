"""The command line: find a method, use it, run its claim, compare, report.

A file a group of commands; nothing heavy is imported before a command needs it, so that
``--help``, ``list``, ``search`` and ``show`` answer at once.
"""

from importlib import import_module

from posterity.cli._app import app, main

__all__ = ["app", "main"]

for _group in ("index", "running", "comparing", "taking", "serving"):  # as ``--help`` lists them
    import_module(f"posterity.cli.{_group}")
