"""Photographs: scikit-learn's two, or an image file of the user's."""

from pathlib import Path

import numpy as np
from numpy import ndarray
from sklearn.datasets import load_sample_image

from posterity._checks import needs

__all__ = ["load_photo"]

BUNDLED = ("china.jpg", "flower.jpg")


def load_photo(image: str) -> ndarray:
    """Return a photograph in [0, 1].

    Parameters
    ----------
    image : str
        ``china.jpg`` or ``flower.jpg`` of scikit-learn, or an image file.

    Returns
    -------
    ndarray of shape (height, width, 3)

    Raises
    ------
    ValueError
        If it is neither.
    """
    pillow = needs("PIL.Image", "images")
    if image in BUNDLED and not Path(image).exists():
        return load_sample_image(image) / 255
    try:
        return np.asarray(pillow.open(image).convert("RGB")) / 255
    except OSError as error:
        raise ValueError(f"image must be {' or '.join(BUNDLED)} or an image file: {error}") from error
