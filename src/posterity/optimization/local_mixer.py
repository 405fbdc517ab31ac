"""Local mixer: a network that trains by forward gradients, since every loss sees few units.

Each block ends in losses of its own, one for every patch p and channel group g, and gradients stop
between blocks. All copies have the value of one loss, the cross-entropy of the features averaged over
patches, but copy (p, g) is differentiated through patch p and group g alone:

    dl_npg / dx_npg = (softmax - onehot)_n W_g^T / P,    0 for every other patch and group.    (1)

Summed over the copies that is the ordinary gradient. One dual forward pass with noise v on all
pre-activations gives a tangent t_npg for each copy, and

    dl / dz_npg  ~  t_npg v_npg                                                                (2)

is unbiased, with the variance of a group's few units, not of all weights. One normalisation and an
outer product with the layer's input make it the gradient of the weights. A block is done when its
own forward pass is: memory does not grow with depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import class_indices, finite, floating, has_shape, integer, one_of
from posterity._precision import wide, widened
from posterity.optimization.dual_layers import (
    _Block,
    _Channels,
    _Depthwise,
    _Grouped,
    _Layer,
    _Normal,
    _normalized,
    _Patches,
    _perturbed,
)
from posterity.optimization.local_forward_gradient import Distribution, _draw, _options

__all__ = ["LocalMixer", "grouped_cross_entropy"]

Method = Literal["activity", "weight", "local-backprop", "global-activity", "global-weight", "backprop"]
METHODS = ("activity", "weight", "local-backprop", "global-activity", "global-weight", "backprop")


@widened
def grouped_cross_entropy(
    x: Float[Tensor, "batch patches groups channels"],
    weight: Float[Tensor, "features classes"],
    bias: Float[Tensor, " classes"],
    target: Int[Tensor, " batch"],
) -> Float[Tensor, "batch patches groups"]:
    """Return copies of one loss, each differentiated through its own patch and group, equation 1.

    The value of each is the cross-entropy of features that are averaged over patches. The gradient
    of their sum in ``x`` is that of one such loss; in ``weight`` and ``bias`` it is patches times
    groups that of one, so divide by it. First derivatives only, of either mode.

    Parameters
    ----------
    x : Tensor of shape (batch, patches, groups, channels)
        Features, with no empty axis.
    weight : Tensor of shape (groups * channels, classes)
        Of a linear readout; groups follow one another.
    bias : Tensor of shape (classes,)
        Of the readout.
    target : Tensor of shape (batch,)
        Class indices.

    Returns
    -------
    Tensor of shape (batch, patches, groups)
        Of the dtype of ``x``.

    Raises
    ------
    ValueError
        If shapes do not fit, or ``target`` holds no class indices (their range is read on the CPU).

    References
    ----------
    .. [1] Ren, Kornblith, Liao, Hinton. Scaling Forward Gradient With Local Losses. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import grouped_cross_entropy
    >>> x = torch.ones(1, 2, 1, 1, requires_grad=True)
    >>> copies = grouped_cross_entropy(x, torch.tensor([[0.0, 2.0]]), torch.zeros(2), torch.tensor([1]))
    >>> copies.detach()
    tensor([[[0.1269],
             [0.1269]]])
    >>> torch.autograd.grad(copies[0, 0, 0], x)[0].flatten()  # of the first patch alone
    tensor([-0.1192, -0.0000])
    """
    _, patches, groups, channels = has_shape("x", floating("x", x), (None, None, None, None)).shape
    if x.numel() == 0:
        raise ValueError(f"x must have no empty axis, got shape {tuple(x.shape)}")
    has_shape("weight", floating("weight", weight), (groups * channels, None), "x")
    has_shape("bias", floating("bias", bias), (weight.shape[1],), "weight")
    class_indices("target", target, len(x), weight.shape[1])
    fixed = x.detach()
    logits = fixed.mean(1).flatten(1) @ weight + bias
    loss = F.cross_entropy(logits, target.long(), reduction="none")
    slope = (_error(logits, target) @ weight.mT).detach().unflatten(1, (groups, channels)) / patches
    return loss[:, None, None] + ((x - fixed) * slope[:, None]).sum(-1)  # x - fixed: 0, with the slope of x


class LocalMixer(nn.Module):
    """A mixer of patches with local losses, trained with or without backpropagation.

    Activations are (batch, patches, groups, channels). Block 0 embeds patches; each later one mixes
    patches, then channels, then channels within groups, and adds its input. Normalisations have no
    parameters, and each layer is normalise, multiply, normalise, [noise], ReLU. `estimate` writes
    gradients; any optimiser of torch follows it.

    Parameters
    ----------
    image_size : int, default=32
        Of square images.
    in_channels : int, default=3
        Of images.
    n_classes : int, default=10
        At least 2.
    n_patches : int, default=4
        Per side; divides ``image_size``. 1 makes it an MLP.
    width : int, default=256
        Channels of a block's output, two for each group at least.
    hidden : int, optional
        Channels before the layer within groups, two for each group at least; by default ``width``.
    n_groups : int, default=8
        Divides ``width`` and ``hidden``.
    n_blocks : int, default=4
        At least 1, each with a head.
    kernel_size : int, optional
        Odd: patches are mixed by a depthwise convolution; by default by a linear layer that channels
        share.
    residual : bool, default=True
        Whether later blocks add their input.
    generator : torch.Generator, optional
        Draws the initial weights.

    Attributes
    ----------
    blocks : nn.ModuleList
        Each maps features to features.
    heads : nn.ModuleList
        Linear readout of each block, for its local losses.
    readout : nn.Module
        Linear readout of the last block's features.

    Raises
    ------
    ValueError
        If sizes do not divide or an option is out of range.

    Notes
    -----
    Departures from the official code:

    1. With "weight", a layer whose output is normalised over all channels is paired with the losses of
       all groups, which it reaches; the code pairs it with those of its own group, with a small bias.
    2. The readout normalises over all channels, the code within the last axis.
    3. Directional derivatives are written out: the Jacobian of a normalisation without parameters is
       symmetric, so that one fused kernel serves tangents and gradients.
    4. The layer over patches has a bias for each channel: one for each patch would vanish in the
       normalisation that follows.

    References
    ----------
    .. [1] Ren, Kornblith, Liao, Hinton. Scaling Forward Gradient With Local Losses. ICLR 2023. Sections 4
       and 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import LocalMixer
    >>> rng = torch.Generator().manual_seed(0)
    >>> net = LocalMixer(8, 1, 3, n_patches=2, width=16, n_groups=4, n_blocks=2, generator=rng)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> images, target = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    >>> found = net.estimate(images, target, method="activity", generator=rng)
    >>> optimizer.step()
    >>> found["loss"], found["local_losses"].shape  # the readout starts at 0
    (tensor(1.0986), torch.Size([2]))
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        n_classes: int = 10,
        *,
        n_patches: int = 4,
        width: int = 256,
        hidden: int | None = None,
        n_groups: int = 8,
        n_blocks: int = 4,
        kernel_size: int | None = None,
        residual: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.image_size = integer("image_size", image_size, 1)
        self.in_channels = integer("in_channels", in_channels, 1)
        self.n_classes = integer("n_classes", n_classes, 2)
        self.n_patches = integer("n_patches", n_patches, 1)
        self.n_groups = integer("n_groups", n_groups, 1)
        integer("n_blocks", n_blocks, 1)
        if image_size % n_patches:
            raise ValueError(f"image_size must be a multiple of n_patches {n_patches}, got {image_size}")
        hidden = width if hidden is None else hidden
        for name, size in (("width", width), ("hidden", hidden)):
            if integer(name, size, 2 * n_groups) % n_groups:
                raise ValueError(f"{name} must be a multiple of n_groups {n_groups}, got {size}")
        if kernel_size is not None and integer("kernel_size", kernel_size, 1) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        inputs = in_channels * (image_size // n_patches) ** 2
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleList()
        for k in range(n_blocks):
            layers: list[_Layer] = [
                _Channels(width if k else inputs, hidden, n_groups, generator),
                _Grouped(hidden, width, n_groups, generator),
            ]
            if k and kernel_size is None:
                layers.insert(0, _Patches(n_patches**2, n_groups, width // n_groups, generator))
            elif k and kernel_size is not None:
                layers.insert(0, _Depthwise(kernel_size, n_groups, width // n_groups, generator))
            self.blocks.append(_Block(layers, residual=residual and k > 0))
            self.heads.append(_Head(width, n_classes, axes=1))
        self.readout = _Head(width, n_classes, axes=2)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of the readout; gradients flow through all blocks, without stops.

        Parameters
        ----------
        images : Tensor of shape (batch, in_channels, image_size, image_size)

        Returns
        -------
        Tensor of shape (batch, n_classes)

        Raises
        ------
        ValueError
            For images of another shape, or of integers.
        """
        x = self._cut(images)
        for block in self.blocks:
            x = block(x)
        return self.readout(x).to(images.dtype)

    def local_losses(
        self, images: Float[Tensor, "batch channels height width"], target: Int[Tensor, " batch"]
    ) -> list[Float[Tensor, "batch patches groups"]]:
        """Return the copies of each block's loss; gradients stop between blocks.

        Parameters
        ----------
        images : Tensor of shape (batch, in_channels, image_size, image_size)
        target : Tensor of shape (batch,)
            Class indices.

        Returns
        -------
        list of Tensor of shape (batch, patches, groups)
            As `grouped_cross_entropy` has them, in float32 at least.

        Raises
        ------
        ValueError
            For images or a target that do not fit.
        """
        x, found = self._cut(images), []
        class_indices("target", target, len(images), self.n_classes)
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x.detach())
            found.append(grouped_cross_entropy(_normalized(x, 1)[0], head.weight, head.bias, target))
        return found

    @torch.inference_mode(False)
    def estimate(
        self,
        images: Float[Tensor, "batch channels height width"],
        target: Int[Tensor, " batch"],
        *,
        method: Method = "activity",
        n_samples: int = 1,
        distribution: Distribution = "normal",
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Write an estimate of the gradient into ``.grad`` of every parameter; what was there is lost.

        Losses are means over the batch. Heads and readout have their exact gradient, which is that of
        one layer. They start at 0, so the first step moves them alone.

        Parameters
        ----------
        images : Tensor of shape (batch, in_channels, image_size, image_size)
        target : Tensor of shape (batch,)
            Class indices.
        method : str, default="activity"
            "activity" and "weight" perturb pre-activations or weights, a block at a time, under local
            losses; "local-backprop" is what both are on average. "global-activity" and "global-weight"
            estimate the gradient of the readout's loss through all blocks, and store what they draw
            until its end; "backprop" computes it.
        n_samples : int, default=1
            At least 1: draws that are averaged; not used with "backprop" in the name.
        distribution : {"normal", "rademacher"}, default="normal"
            Of the noise.
        generator : torch.Generator, optional
            By default torch's global generator is read. Noise is drawn block by block, in it draw by
            draw, in that layer by layer.

        Returns
        -------
        dict of str to Tensor
            ``"loss"`` of the readout, a scalar, and ``"local_losses"`` (n_blocks,), in float32 at least;
            ``"logits"`` (batch, n_classes). No graph is attached.

        Raises
        ------
        ValueError
            If the input does not fit, an option is out of range, or a loss is not finite: gradients
            then stay as they were.
        """
        one_of("method", method, METHODS)
        _options(n_samples, distribution)
        x = self._cut(images.detach())
        class_indices("target", target, len(images), self.n_classes)
        target = target.long().clone()  # what inference mode made cannot be kept for a backward pass
        draw = partial(_draw, distribution=distribution, generator=generator)
        grads: dict[nn.Parameter, Tensor] = {}
        local: list[Tensor] = []
        pairs = list(zip(self.blocks, self.heads, strict=True))
        whole = method.startswith(("global", "backprop"))  # one loss at the end, not one a block
        for stage in [pairs] if whole else [[pair] for pair in pairs]:
            judge = self.readout if whole else stage[0][1]
            x, losses, own = _stage(stage, judge, x, target, method, n_samples, draw)
            local += losses
            grads |= own
        last = self.readout.score(x, target)
        finite("the loss of images", torch.stack([last.loss, *local]))
        for parameter, grad in (grads | last.grads).items():
            if parameter.requires_grad:
                parameter.grad = grad.to(parameter.dtype)
        return {
            "loss": last.loss,
            "local_losses": torch.stack(local),
            "logits": last.logits.to(images.dtype),
        }

    def _cut(self, images: Tensor) -> Tensor:
        """Return the vectors of patches, (batch, patches, 1, height * width * channels)."""
        shape = (None, self.in_channels, self.image_size, self.image_size)
        has_shape("images", floating("images", images), shape, "LocalMixer")
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")
        n, side = self.n_patches, self.image_size // self.n_patches
        x = wide(images).to(wide(self.readout.bias.detach()).dtype)
        x = x.unflatten(3, (n, side)).unflatten(2, (n, side))  # (batch, channels, n, side, n, side)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2).unsqueeze(2)


class _Score(NamedTuple):
    """A loss at a readout: its mean, what it was made of, and how it moves."""

    loss: Tensor
    logits: Tensor
    grads: dict[nn.Parameter, Tensor]
    tangent: Callable[[Tensor], Tensor]  # of features -> of losses (batch, patches, groups), or (batch, 1, 1)


class _Head(nn.Module):
    """A linear readout of features pooled over patches.

    With ``axes=1`` they are normalised within groups, then pooled, with 2 pooled, then normalised.
    """

    def __init__(self, width: int, n_classes: int, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.weight = nn.Parameter(torch.zeros(width, n_classes))
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float32 at least."""
        return self._read(x)[0]

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, _Normal]:
        y, normal = _normalized(x if self.axes == 1 else x.mean(1), self.axes)
        pooled = (y.mean(1) if self.axes == 1 else y).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return pooled @ wide(self.weight) + wide(self.bias), pooled, normal

    @torch.no_grad()
    def score(self, x: Tensor, target: Tensor) -> _Score:
        """Return the loss with the gradients of weight and bias, and its derivative along a tangent."""
        logits, pooled, normal = self._read(x)
        error = _error(logits, target)
        with torch.autocast(x.device.type, enabled=False):
            slope = (error @ wide(self.weight).mT).unflatten(1, x.shape[2:])
            grads = {self.weight: pooled.mT @ error / len(x), self.bias: error.mean(0)}

        def tangent(d: Tensor) -> Tensor:
            if self.axes == 1:
                return (normal.tangent(d) * slope[:, None]).sum(-1) / x.shape[1]  # equation 1
            return (normal.tangent(d.mean(1)) * slope).sum((1, 2))[:, None, None]

        return _Score(F.cross_entropy(logits, target), logits, grads, tangent)


def _stage(
    stage: list[tuple[Any, Any]],
    judge: Any,
    x: Tensor,
    target: Tensor,
    method: str,
    n_samples: int,
    draw: Callable[..., Tensor],
) -> tuple[Tensor, list[Tensor], dict[nn.Parameter, Tensor]]:
    """Return features behind blocks that share a loss, the losses of their heads, and all gradients."""
    exact, runs = method.endswith("backprop"), []
    grads: dict[nn.Parameter, Tensor] = {}
    scored: dict[nn.Module, _Score] = {}
    with torch.set_grad_enabled(exact):
        for block, head in stage:
            x, run = block.run(x)
            runs.append(run)
            scored[head] = head.score(x.detach(), target)
            grads |= scored[head].grads
        if exact:
            weights = [p for block, _ in stage for p in block.parameters() if p.requires_grad]
            loss = F.cross_entropy(judge(x), target)
            grads |= zip(weights, torch.autograd.grad(loss, weights) if weights else (), strict=True)
        else:
            score = scored[judge] if judge in scored else judge.score(x, target)
            grads |= _perturbed(runs, score.tangent, method.endswith("weight"), n_samples, draw)
    return x.detach(), [each.loss for each in scored.values()], grads


def _error(logits: Tensor, target: Tensor) -> Tensor:
    """Return softmax less one-hot, the gradient of each sample's cross-entropy."""
    return logits.softmax(1) - F.one_hot(target.long(), logits.shape[1])
