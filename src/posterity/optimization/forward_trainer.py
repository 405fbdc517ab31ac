"""A stack of layers that learns in the forward pass: each from its own loss, its input cut from the graph.

For l = 1 .. L: h_l = layer_l(detach(h_{l-1})); the loss of `posterity.optimization.DictionaryContrastiveLoss` between h_l and the
shared dictionary; its gradient for layer l and the dictionary. Nothing of layer l is needed once h_l is
known, so memory does not grow with depth, and layers may learn in a pipeline.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, integer, one_of
from posterity._precision import wide
from posterity._random import draw_device
from posterity.optimization.dc_fl import (
    DictionaryContrastiveLoss,
    LabelDictionary,
    SupervisedContrastiveLoss,
    check_target,
    dictionary_logits,
)

__all__ = ["ForwardTrainer"]


class ForwardTrainer(nn.Module):
    """Trains layers one by one in the forward pass against a dictionary of label embeddings.

    Parameters
    ----------
    layers : sequence of nn.Module
        As they are, called one after the other. A layer without trainable parameters (a pooling, a flattening) is
        passed through. Give each its own normalisation before what it learns: the scale of the layer
        before is then of no use to it, and a layer cannot hand on its answer by magnitude alone.
    n_classes : int
        At least 2.
    dim : int, optional
        Length of the embeddings. By default the largest feature dimension of the layers, which is read from the last
        linear or convolutional part of each.
    adaptive : bool, default=True
        Whether the embeddings learn (DCL) or stay as drawn (DCL-S).
    readout : {"linear", "dictionary"}, default="linear"
        What `forward` classifies by: a linear layer trained on the last features, or the last layer's dictionary logits.
    objective : {"dictionary", "feature"}, default="dictionary"
        What layers learn from: label embeddings, or `SupervisedContrastiveLoss` on their features.
    n_patches : int or sequence of int, default=1
        Into how many pieces vectors are cut, for all layers or for each that learns; maps and tokens have positions.
    temperature : float, default=1.0
        Positive; with ``objective="feature"`` it is 0.07.
    normalize : bool, default=False
        Whether features and embeddings have length 1, see `dictionary_logits`; so they have with "feature".
    optimizer : callable, default=torch.optim.AdamW
        ``optimizer(params, lr=lr, **optimizer_kwargs)``.
    lr : float, default=1e-3
        At least 0.
    update : {"asynchronous", "synchronous"}, default="asynchronous"
        Each layer has an optimiser that also holds the dictionary and steps at once, so the dictionary takes
        as many steps a batch as layers learn; or gradients are gathered and one optimiser steps for all.
    generator : torch.Generator, optional
        Of the dictionary's and the readout's initial values.
    **optimizer_kwargs
        For ``optimizer``.

    Attributes
    ----------
    layers : nn.ModuleList
    dictionary : LabelDictionary or None
    optimizers : list of torch.optim.Optimizer
        For schedules; that of the readout, where there is one, comes last.

    Raises
    ------
    ValueError
        If there is no layer or none that learns, an option is out of range, or a size is neither given nor to be read
        from a layer.

    Notes
    -----
    1. On small images without distractors the rival, contrast of features with features, may be the more accurate;
       it is what shares no label between two images that label embeddings bear better.
    2. In synchronous mode gradients are added layer by layer, which is the gradient of the sum of all losses.
       Batch normalisation sees each batch once in either mode.
    3. The state dict holds the optimisers too.

    References
    ----------
    Choi et al., "Dictionary contrastive learning for efficient local supervision without auxiliary networks",
    ICLR 2024, Section 3.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.optimization import ForwardTrainer
    >>> layers = [
    ...     nn.Sequential(nn.Linear(4, 16), nn.ReLU()),
    ...     nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU()),
    ... ]
    >>> trainer = ForwardTrainer(layers, n_classes=2, n_patches=4)
    >>> x = torch.randn(32, 4)
    >>> sorted(trainer.learn(x, (x[:, 0] > 0).long()))  # a step of every layer
    ['0', '1', 'readout']
    >>> trainer.predict(x).shape
    torch.Size([32])
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        n_classes: int,
        *,
        dim: int | None = None,
        adaptive: bool = True,
        readout: Literal["dictionary", "linear"] = "linear",
        objective: Literal["dictionary", "feature"] = "dictionary",
        n_patches: int | Sequence[int] = 1,
        temperature: float = 1.0,
        normalize: bool = False,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        lr: float = 1e-3,
        update: Literal["asynchronous", "synchronous"] = "asynchronous",
        generator: torch.Generator | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.n_classes = integer("n_classes", n_classes, 2)
        self.objective = one_of("objective", objective, ("dictionary", "feature"))
        self.update = one_of("update", update, ("asynchronous", "synchronous"))
        one_of("readout", readout, ("dictionary", "linear"))
        at_least("lr", lr, 0.0)
        if objective == "feature" and readout == "dictionary":
            raise ValueError("readout must be 'linear' with objective 'feature', which learns no dictionary")
        self._learning = [k for k, layer in enumerate(self.layers) if _trainable(layer.parameters())]
        if not self._learning:
            raise ValueError(
                f"layers must hold one that learns, got {len(self.layers)} without trainable parameters"
            )
        many = [n_patches] * len(self._learning) if isinstance(n_patches, int) else list(n_patches)
        if len(many) != len(self._learning):
            raise ValueError(
                f"n_patches must be one number, or one for each of {len(self._learning)} layers that learn, got {len(many)}"
            )
        self.losses = nn.ModuleDict()
        for k, patches in zip(self._learning, many, strict=True):
            integer("n_patches", patches, 1)
            self.losses[str(k)] = (
                DictionaryContrastiveLoss(n_patches=patches, temperature=temperature, normalize=normalize)
                if objective == "dictionary"
                else SupervisedContrastiveLoss()
            )
        self.dictionary = None
        if objective == "dictionary":
            if dim is None:
                sizes = [_features(self.layers[k], k, "dim must be given") for k in self._learning]
                dim = max(
                    size // (n if vectors else 1) for (size, vectors), n in zip(sizes, many, strict=True)
                )
            self.dictionary = LabelDictionary(n_classes, dim, adaptive=adaptive, generator=generator)
        self.readout = None
        if readout == "linear":
            last = self._learning[-1]
            width, _ = _features(self.layers[last], last, "readout must be 'dictionary'")
            self.readout = _linear(width, n_classes, generator)
        self.optimizers = [optimizer(group, lr=lr, **optimizer_kwargs) for group in self._groups()]

    def _groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each optimiser."""
        words = [] if self.dictionary is None else _trainable(self.dictionary.parameters())
        each = [_trainable(self.layers[k].parameters()) for k in self._learning]
        if self.update == "asynchronous":
            groups = [[*layer, *words] for layer in each]
        else:
            groups = [[*(p for layer in each for p in layer), *words]]
        return groups if self.readout is None else [*groups, list(self.readout.parameters())]

    @torch.inference_mode(False)
    def learn(self, x: Tensor, target: Int[Tensor, " batch"]) -> dict[str, float]:
        """Take a step of every layer in one forward pass.

        Parameters
        ----------
        x : Tensor
            What the first layer takes, samples first.
        target : Tensor of shape (batch,)
            Classes from 0.

        Returns
        -------
        dict of str to float
            The loss of each layer that learns, by its place, and of ``"readout"``.

        Raises
        ------
        ValueError
            If the target or a layer's features do not fit, or a loss is not finite: the message names
            the layer, which did not step, nor did those behind it (in synchronous mode none did).
        """
        check_target(target, len(x), self.n_classes)
        at_once = self.update == "asynchronous"
        losses: dict[str, float] = {}
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        h = x.clone() if x.is_inference() else x.detach()
        with torch.enable_grad():
            for k, layer in enumerate(self.layers):
                h = layer(h.detach())
                if k not in self._learning:
                    continue
                loss = self._local(k, h, target)
                losses[str(k)] = self._backward(loss, f"layer {k}")
                if at_once:
                    optimizer = self.optimizers[self._learning.index(k)]
                    optimizer.step()
                    optimizer.zero_grad()
            if self.readout is not None:
                loss = F.cross_entropy(wide(self.readout(_positions_averaged(h.detach()))), target.long())
                losses["readout"] = self._backward(loss, "readout")
        for optimizer in self.optimizers[len(self._learning) if at_once else 0 :]:
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def _local(self, k: int, h: Tensor, target: Tensor) -> Tensor:
        if self.dictionary is None:
            return self.losses[str(k)](h, target)
        return self.losses[str(k)](h, target, self.dictionary())

    @staticmethod
    def _backward(loss: Tensor, name: str) -> float:
        value = float(loss.detach())
        if not abs(value) < float("inf"):
            raise ValueError(f"x and target must give a finite loss, got {value} in {name}: lower lr")
        loss.backward()
        return value

    def forward(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        """Return logits of the readout; nothing learns.

        Parameters
        ----------
        x : Tensor

        Returns
        -------
        Tensor of shape (batch, classes)
        """
        if self.readout is None:
            return self.layer_logits(x, self._learning[-1])
        return self.readout(_positions_averaged(self.features(x, len(self.layers) - 1)))

    def predict(self, x: Tensor) -> Int[Tensor, " batch"]:
        """Return the class of the largest logit.

        Parameters
        ----------
        x : Tensor

        Returns
        -------
        Tensor of shape (batch,)
        """
        with torch.no_grad():
            return self(x).argmax(1)

    def features(self, x: Tensor, layer: int) -> Tensor:
        """Return what a layer makes of x, as its successor gets it.

        Parameters
        ----------
        x : Tensor
        layer : int
            From 0; negative ones count from the end.

        Returns
        -------
        Tensor

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        for part in self.layers[: self._place(layer) + 1]:
            x = part(x)
        return x

    def layer_logits(self, x: Tensor, layer: int) -> Float[Tensor, "batch classes"]:
        """Return the dictionary logits of a layer: its own prediction, for an early exit.

        Parameters
        ----------
        x : Tensor
        layer : int
            One that learns.

        Returns
        -------
        Tensor of shape (batch, classes)

        Raises
        ------
        ValueError
            If the layer learns nothing, or no dictionary is learned.
        """
        place = self._place(layer)
        if self.dictionary is None or place not in self._learning:
            raise ValueError(f"layer must be one that learns from the dictionary, got {layer}")
        loss = self.losses[str(place)]
        return dictionary_logits(
            self.features(x, place), self.dictionary(), n_patches=loss.n_patches, temperature=loss.temperature,
            normalize=loss.normalize,
        )  # fmt: skip

    def _place(self, layer: int) -> int:
        n = len(self.layers)
        if not -n <= integer("layer", layer) < n:
            raise ValueError(f"layer must be in {-n} .. {n - 1}, got {layer}")
        return layer % n

    def get_extra_state(self) -> list[dict[str, Any]]:
        """Return the states of the optimisers, for the state dict."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def set_extra_state(self, state: list[dict[str, Any]]) -> None:
        """Take the states of the optimisers from a state dict."""
        if len(state) != len(self.optimizers):
            raise ValueError(f"state must be of {len(self.optimizers)} optimisers, got {len(state)}")
        for optimizer, each in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(each)


def _trainable(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in params if p.requires_grad]


def _features(layer: nn.Module, place: int, otherwise: str) -> tuple[int, bool]:
    """Return how many features the last linear or convolutional part gives, and whether as a vector."""
    for part in reversed(list(layer.modules())):
        if isinstance(part, nn.Linear):
            return part.out_features, True
        if isinstance(part, nn.modules.conv._ConvNd):
            return part.out_channels, False
    raise ValueError(
        f"{otherwise}: layer {place} has no linear or convolutional part to read its features from"
    )


def _positions_averaged(h: Tensor) -> Tensor:
    if not 2 <= floating("features of the last layer", h).ndim <= 4:
        raise ValueError(
            f"layers must end in vectors, tokens or maps, got features of shape {tuple(h.shape)}"
        )
    return h if h.ndim == 2 else h.flatten(2).mean(2)


def _linear(width: int, n_classes: int, generator: torch.Generator | None) -> nn.Linear:
    """Return a linear layer with torch's usual initial values, drawn by a generator."""
    layer = nn.utils.skip_init(nn.Linear, width, n_classes)
    with torch.no_grad():
        for p in layer.parameters():
            drawn = torch.empty(p.shape, device=draw_device(generator, p.device))
            p.copy_(drawn.uniform_(-1, 1, generator=generator) * width**-0.5)
    return layer
