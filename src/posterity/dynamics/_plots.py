"""Where results are drawn."""

from typing import Any

from posterity._checks import needs

__all__ = ["axes"]


def axes(ax: Any = None) -> Any:
    """Return the given matplotlib Axes, or those of a new figure."""
    return ax if ax is not None else needs("matplotlib.pyplot", "plot").subplots()[1]
