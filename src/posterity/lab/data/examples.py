"""What a network may learn from: images or rows with classes, or text, whose next characters are known."""

from typing import Annotated

from posterity.lab.data import Kind, Source, dataset, kind_of, load, names, resolve
from posterity.lab.data.images import ImageData
from posterity.lab.data.labelled import Labelled, load_labelled, read_labelled, require_labelled
from posterity.lab.data.text import Text, TextData, load_text, read_text, require_text

__all__ = ["Examples", "load_examples"]

Examples = Annotated[
    str, Kind("examples", (*kind_of(Labelled).suffixes, *kind_of(Text).suffixes), folder=True)
]


def load_examples(data: str, *, target: str | None = None) -> ImageData | TextData:
    """Return images, features as images of a single pixel, or text.

    Parameters
    ----------
    data : str
        What `posterity.lab.data.labelled.load_labelled` or `posterity.lab.data.text.load_text` takes.
    target : str, optional
        Of a table's file: the column that holds the classes.

    Returns
    -------
    ImageData or TextData
    """
    if target is not None and callable(resolve(Examples, data)):
        raise ValueError(f"{data} has no choice of a target, that is for a file; got {target!r}")
    return load(Examples, data, target=target)


def read_examples(source: Source, *, target: str | None = None) -> ImageData | TextData:
    """Return the words of a text, or what else a file holds with its classes."""
    if not source.paths[0].name.lower().endswith(kind_of(Text).suffixes):
        return read_labelled(source, target=target)
    if target is not None:
        raise ValueError(f"{source.name} is text, target is for a table; got {target!r}")
    return read_text(source)


def require_examples(data: ImageData | TextData) -> None:
    """Refuse what nothing can be learned from."""
    require_text(data) if isinstance(data, TextData) else require_labelled(data)


for _name in names(kind_of(Labelled)):
    dataset(Examples, _name)(lambda seed, name=_name: load_labelled(name))
for _name in names(kind_of(Text)):
    dataset(Examples, _name)(lambda seed, name=_name: load_text(name))
