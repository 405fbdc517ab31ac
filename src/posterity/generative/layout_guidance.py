"""What holds a generated image to its layout: gates from edges, gates of each class, the layout regained.

A layout is a map of classes, one-hot. Features of an image x are guided by those of its edges e,

    x sigmoid(e) + x,                                                        (1)

which passes all of x and doubles it where there is an edge. Channels are guided by class: the mean
of x over the pixels of a class makes a gate, which is given back to these pixels alone,

    m_c = mean of x(p) over p of class c,    gamma_c = sigmoid(W_2 relu(W_1 m_c)),
    x(p) + gamma_{class(p)} x(p),                                            (2)

so that a small object is gated by what it is and not by the average of the image. And a label map
read back from the image is compared with the layout pixel by pixel and pair by pair.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer
from posterity._precision import widened
from posterity.generative._canny import canny
from posterity.generative.pixel_contrast import _nearest

__all__ = ["ClassSimilarityLoss", "EdgeTransfer", "SemanticPreserving", "edges"]

GRID = 16  # sides of the grid whose cells' affinities are compared
OUTSIDE = 1e-3  # what rounding may leave outside the range of an image


class EdgeTransfer(nn.Module):
    """Guide features of an image by those of its edges, equation 1. It has no parameters.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Section 3, attention guided edge transfer.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import EdgeTransfer
    >>> edge = torch.tensor([-100.0, 0.0, 100.0]).view(1, 1, 1, 3)
    >>> EdgeTransfer()(torch.full((1, 1, 1, 3), 2.0), edge).flatten()
    tensor([2., 3., 4.])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, image_features: Float[Tensor, "n c h w"], edge_features: Float[Tensor, "n _ h w"]
    ) -> Float[Tensor, "n c h w"]:
        """Return the guided features.

        Parameters
        ----------
        image_features : Tensor of shape (n, c, h, w)
            What is guided.
        edge_features : Tensor of shape (n, c, h, w) or (n, 1, h, w)
            Before the sigmoid.

        Returns
        -------
        Tensor of shape (n, c, h, w)
            In the dtype of ``image_features``.

        Raises
        ------
        ValueError
            If shapes do not fit, or a tensor is not floating-point.
        """
        has_shape("image_features", floating("image_features", image_features), (None,) * 4)
        n, c, h, w = image_features.shape
        floating("edge_features", edge_features)
        channels = 1 if edge_features.shape[1:2] == (1,) else c
        has_shape("edge_features", edge_features, (n, channels, h, w), "image_features")
        gate = edge_features.sigmoid().to(image_features.dtype)
        return torch.addcmul(image_features, image_features, gate)


class SemanticPreserving(nn.Module):
    """Gate the channels of features by class, equation 2.

    Weights are shared by the classes, so that none is tied to a channel of the layout; with a
    single class this is a squeeze-and-excitation gate with a residual.

    Parameters
    ----------
    n_classes : int
        Channels of the layout, at least 1.
    channels : int
        Channels of x, at least 1.
    reduction : int, default=4
        By what the hidden layer is narrower than ``channels``, at least 1; it has 1 unit or more.

    Raises
    ------
    ValueError
        If an argument is out of range, or an input does not fit.

    Notes
    -----
    1. How far the paper's gate is one a class is not known; pooling over classes contains the
       global gate as the case of one.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Section 3, the semantic preserving module.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import SemanticPreserving
    >>> gate = SemanticPreserving(2, 1)
    >>> _ = [torch.nn.init.ones_(layer.weight) for layer in (gate.squeeze, gate.excite)]
    >>> _ = [torch.nn.init.zeros_(layer.bias) for layer in (gate.squeeze, gate.excite)]
    >>> x = torch.tensor([[[[-1.0, -3.0, 30.0, 50.0]]]])  # means of the classes: -2 and 40
    >>> gate(x, torch.tensor([[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]])).detach().flatten()
    tensor([ -1.5000,  -4.5000,  60.0000, 100.0000])
    """

    def __init__(self, n_classes: int, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.n_classes = integer("n_classes", n_classes, 1)
        self.channels = integer("channels", channels, 1)
        hidden = max(1, self.channels // integer("reduction", reduction, 1))
        self.squeeze = nn.Linear(self.channels, hidden)
        self.excite = nn.Linear(hidden, self.channels)

    def forward(
        self, x: Float[Tensor, "n c h w"], layout: Shaped[Tensor, "n classes height width"]
    ) -> Float[Tensor, "n c h w"]:
        """Return x, each pixel of a class by one plus the gate of that class.

        Parameters
        ----------
        x : Tensor of shape (n, channels, h, w)
            Features, in the dtype of the weights.
        layout : Tensor of shape (n, n_classes, H, W)
            One-hot, of any dtype; brought to (h, w) by nearest neighbours.

        Returns
        -------
        Tensor of shape (n, channels, h, w)
            Gated features.
        """
        has_shape("x", floating("x", x), (None, self.channels, None, None), "channels")
        if 0 in x.shape:
            raise ValueError(f"x must have images and pixels, got shape {tuple(x.shape)}")
        where = _one_hot(layout, self.n_classes, len(x), "x", x.shape[2:]).to(x)
        means = _class_means(x, where).to(self.squeeze.weight.dtype)
        gates = self.excite(F.relu(self.squeeze(means))).sigmoid().to(x.dtype)
        return torch.addcmul(x, x, _spread(gates, where))


class ClassSimilarityLoss(nn.Module):
    """Compare a label map that was read back from an image with the layout it was made from.

    The cross-entropy of each pixel, plus the mean squared difference of affinities: cosines
    between the class shares of any two cells of a grid of 16 x 16, or of as many as there are
    pixels. So what belonged together stays together, whatever it is taken for.

    Notes
    -----
    1. The paper compares the two maps' similarity; grid, cosine and the plain sum of the two
       terms are choices of this implementation.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Section 3, the similarity loss.

    Examples
    --------
    Two pixels of two classes, of which nothing is known: log 2 for each, and of the four
    affinities two are 1 and should be 0:

    >>> import torch
    >>> from posterity.generative import ClassSimilarityLoss
    >>> layout = torch.eye(2).view(1, 2, 1, 2)
    >>> ClassSimilarityLoss()(torch.zeros(1, 2, 1, 2), layout)
    tensor(1.1931)
    """

    def __init__(self) -> None:
        super().__init__()

    @widened
    def forward(
        self,
        predicted_logits: Float[Tensor, "n classes h w"],
        layout: Shaped[Tensor, "n classes height width"],
    ) -> Float[Tensor, ""]:
        """Return the loss, a scalar.

        Parameters
        ----------
        predicted_logits : Tensor of shape (n, classes, h, w)
            Scores of the classes, before the softmax.
        layout : Tensor of shape (n, classes, H, W)
            One-hot, of any dtype; brought to (h, w) by nearest neighbours.

        Returns
        -------
        Tensor
            A scalar.

        Raises
        ------
        ValueError
            If shapes do not fit, there is no pixel, or the layout is not one-hot.
        """
        has_shape("predicted_logits", floating("predicted_logits", predicted_logits), (None,) * 4)
        if 0 in predicted_logits.shape:
            raise ValueError(f"predicted_logits must have pixels, got shape {tuple(predicted_logits.shape)}")
        n, n_classes, h, w = predicted_logits.shape
        where = _one_hot(layout, n_classes, n, "predicted_logits", (h, w)).to(predicted_logits)
        pixels = F.cross_entropy(predicted_logits, where.argmax(1))
        pairs = F.mse_loss(_affinity(predicted_logits.softmax(1)), _affinity(where))
        return pixels + pairs


def edges(
    image: Float[Tensor, "n c h w"], *, low: float = 0.1, high: float = 0.2, sigma: float = 1.0
) -> Float[Tensor, "n 1 h w"]:
    """Return the edge maps of images by Canny's detector, as `ECGAN` learns to draw them.

    Parameters
    ----------
    image : Tensor of shape (n, c, h, w)
        In [0, 1], with 1 or 3 channels.
    low, high : float, default=0.1 and 0.2
        Thresholds of the gradient: above ``high`` is an edge, above ``low`` one that goes on.
    sigma : float, default=1.0
        Of the Gaussian that smooths the image first.

    Returns
    -------
    Tensor of shape (n, 1, h, w)
        1 on edges and 0 elsewhere, in the dtype of ``image``.

    Raises
    ------
    ValueError
        If an argument is out of range, or ``image`` does not fit.

    References
    ----------
    .. [1] Canny. A Computational Approach to Edge Detection. IEEE PAMI 1986.

    Examples
    --------
    A step has one edge, a pixel wide:

    >>> import torch
    >>> from posterity.generative import edges
    >>> image = (torch.arange(8) > 3).float().expand(1, 1, 8, 8)
    >>> edges(image)[0, 0].sum(1)
    tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """
    return canny(image, low=low, high=high, sigma=sigma)


def _affinity(shares: Float[Tensor, "n classes h w"]) -> Float[Tensor, "n cells cells"]:
    """Return cosines between the class shares of cells; shares sum to 1, so none is zero."""
    h, w = shares.shape[2:]
    cells = F.adaptive_avg_pool2d(shares, (min(h, GRID), min(w, GRID))).flatten(2)
    cells = F.normalize(cells, dim=1)
    return torch.einsum("ncp,ncq->npq", cells, cells)


@widened
def _class_means(
    x: Float[Tensor, "n c h w"], where: Float[Tensor, "n classes h w"]
) -> Float[Tensor, "n classes c"]:
    """Return the mean of x over the pixels of each class, 0 for a class without any."""
    total = torch.einsum("nkp,ncp->nkc", where.flatten(2), x.flatten(2))
    return total / where.flatten(2).sum(2).clamp_min(1)[..., None]


def _spread(
    gates: Float[Tensor, "n classes c"], where: Float[Tensor, "n classes h w"]
) -> Float[Tensor, "n c h w"]:
    """Return to each pixel the gate of its class."""
    return torch.einsum("nkc,nkp->ncp", gates, where.flatten(2)).unflatten(2, where.shape[2:]).to(gates.dtype)


def _one_hot(
    layout: Any, n_classes: int, n: int | None = None, source: str = "n_classes",
    size: Sequence[int] | None = None,
) -> Shaped[Tensor, "n classes h w"]:  # fmt: skip
    """Return a one-hot layout at a size, or say what is wrong; values are read on the CPU only."""
    if not isinstance(layout, Tensor) or layout.is_complex():
        got = layout.dtype if isinstance(layout, Tensor) else type(layout).__name__
        raise ValueError(f"layout must be a one-hot tensor, got {got}")
    has_shape("layout", layout, (n, n_classes, None, None), source)
    if 0 in layout.shape:
        raise ValueError(f"layout must have images and pixels, got shape {tuple(layout.shape)}")
    if layout.device.type == "cpu":
        total = layout.sum(1)
        if not bool((total == 1).all()):
            raise ValueError(
                f"layout must be one-hot: the classes of a pixel sum to 1, got {total[total != 1][0]}"
            )
        if not bool(((layout == 0) | (layout == 1)).all()):
            raise ValueError("layout must be one-hot: 0 or 1, got other values")
    return layout if size is None else _nearest(layout, size)


def _in_range(name: str, values: Tensor, low: float, high: float) -> None:
    """Refuse values outside a range, NaN among them; they are read on the CPU only."""
    if values.device.type == "cpu" and values.numel():
        inside = (values >= low - OUTSIDE) & (values <= high + OUTSIDE)
        if not bool(inside.all()):
            raise ValueError(
                f"{name} must be in [{low}, {high}], got values such as {values[~inside][0].item():g}"
            )
