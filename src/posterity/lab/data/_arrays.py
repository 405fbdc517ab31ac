"""Arrays of an .npz file, or a refusal that names it."""

import zipfile
from pathlib import Path

import numpy as np
from numpy import ndarray

__all__ = ["load_arrays"]


def load_arrays(path: Path) -> dict[str, ndarray]:
    """Return the arrays of a file by name; what holds objects, or is no .npz, is refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is not a readable .npz of plain arrays") from error
