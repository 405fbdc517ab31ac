"""Models by their folder or name of the hub: one that cannot be loaded is refused by the argument that names it."""

from typing import Any

__all__ = ["load"]


def load(kind: Any, model: str, rule: str, given: str = "") -> Any:
    """Return ``kind.from_pretrained(model)``, or say why there is none.

    Parameters
    ----------
    kind : type
        Of transformers or diffusers.
    model : str
        A folder, or a name of the hub.
    rule : str
        Which argument must be what, for the message.
    given : str, optional
        What came for the argument; by default ``model``.

    Returns
    -------
    Any

    Raises
    ------
    ValueError
        If it is no such model.
    """
    try:
        return kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{rule}, got {given or model!r}: {why}") from error
