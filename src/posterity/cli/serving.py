"""Serving: the tools for assistants, over standard input and output."""

import sys

from posterity.cli._app import app, say


@app.command()
def mcp() -> None:
    """Serve search, show, run, compare, results and vendor to an assistant, by MCP over stdio."""
    try:
        from posterity.cli.mcp import server
    except ModuleNotFoundError:
        from posterity._checks import needs

        needs("mcp", "mcp")  # says how to install it
        raise
    if sys.stdin.isatty():
        say("an assistant starts this and speaks with it; the manual says how (Use a method). Ctrl-C ends it")
    server.run()
