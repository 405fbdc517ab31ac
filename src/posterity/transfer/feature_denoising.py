"""Feature denoising: of the pooled features of an image only the largest are kept, brought nearer to each other.

    x_i  ->  x_i^power  if x_i is among the ``top`` largest of x, else 0                                 (1)

In another domain many small activations tell little of the class; a power below 1 keeps the few large ones from
drowning each other.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import validate_data
from torch import Tensor

from posterity._checks import at_least, floating, integer
from posterity._precision import widened

__all__ = ["FeatureDenoiser", "denoise_features"]


@widened
def denoise_features(
    features: Float[Tensor, "*batch d"], *, top: int = 64, power: float = 0.4
) -> Float[Tensor, "*batch d"]:
    """Return features of which all but the largest are 0 (equation 1).

    Parameters
    ----------
    features : Tensor of shape (..., d)
        Non-negative, as behind a ReLU; what is negative becomes 0 where ``power`` is not 1.
    top : int, default=64
        How many of each vector are kept, at least 1; d or more keeps all.
    power : float, default=0.4
        Greater than 0.

    Returns
    -------
    Tensor of shape (..., d)
        Of the dtype of ``features``.

    Raises
    ------
    ValueError
        If a parameter is out of range, or (on the CPU) a feature is NaN.

    References
    ----------
    .. [1] Zheng, Wang, Liu and Kanezaki. Cross-Level Distillation and Feature Denoising for Cross-Domain Few-Shot
       Classification. ICLR 2023. Section 3.3, equation 8.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import denoise_features
    >>> denoise_features(torch.tensor([4.0, 1.0, 9.0]), top=2, power=0.5)
    tensor([2., 0., 3.])
    """
    floating("features", features)
    integer("top", top, 1)
    at_least("power", power, 0, strict=True)
    if features.ndim == 0 or features.shape[-1] == 0:
        raise ValueError(f"features must have elements in the last dimension, got {tuple(features.shape)}")
    if features.device.type == "cpu" and bool(features.isnan().any()):
        raise ValueError("features must be numbers, got NaN")
    kept = features
    if top < features.shape[-1]:
        rows = features.topk(top, dim=-1).indices
        kept = torch.zeros_like(features).scatter(-1, rows, features.gather(-1, rows))
    if power == 1:
        return kept
    positive = kept > 0
    return torch.where(positive, kept.where(positive, 1) ** power, 0)  # 0^power has no gradient


class FeatureDenoiser(TransformerMixin, BaseEstimator):
    """`denoise_features` before a classifier: ``make_pipeline(FeatureDenoiser(), LogisticRegression())``.

    Parameters
    ----------
    top : int, default=64
        How many features of a row are kept, at least 1.
    power : float, default=0.4
        Greater than 0.

    Attributes
    ----------
    n_features_in_ : int

    Raises
    ------
    ValueError
        If a parameter is out of range, or ``X`` has NaN or infinity.

    References
    ----------
    .. [1] Zheng et al. ICLR 2023. Section 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.transfer import FeatureDenoiser
    >>> FeatureDenoiser(top=1, power=0.5).fit_transform(np.array([[4.0, 1.0], [0.0, 9.0]]))
    array([[2., 0.],
           [0., 3.]])
    """

    def __init__(self, top: int = 64, power: float = 0.4) -> None:
        self.top = top
        self.power = power

    def fit(self, X: ndarray, y: object = None) -> "FeatureDenoiser":
        """Check the parameters; nothing is learned.

        Parameters
        ----------
        X : ndarray of shape (n, d)
        y : None
            Ignored.

        Returns
        -------
        FeatureDenoiser
        """
        integer("top", self.top, 1)
        at_least("power", self.power, 0, strict=True)
        validate_data(self, X, dtype=[np.float64, np.float32])
        return self

    def transform(self, X: ndarray) -> ndarray:
        """Return the denoised features.

        Parameters
        ----------
        X : ndarray of shape (n, d)

        Returns
        -------
        ndarray of shape (n, d)
        """
        x: Any = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)  # pyright: ignore[reportArgumentType]
        return denoise_features(torch.tensor(x), top=self.top, power=self.power).numpy()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags
