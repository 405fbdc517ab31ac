"""ECGAN: images from label maps, guided by their own edges and by contrast between pixels of classes.

A generator draws edges and image together, the edges gating the image (`EdgeTransfer`), refines
the image under gates of each class (`SemanticPreserving`), and is trained on

    w_gan GAN + w_feature FM + w_perceptual VGG + w_edge BCE(edges, Canny of the real image)
      + w_similarity S(label map read back, layout) + w_contrastive L(pixel features, layout),  (1)

where GAN is the hinge loss of one discriminator for pairs (layout, image) and (layout, edges), and
L draws together pixels of a class over all layouts of the batch (`PixelContrastiveLoss`): small
objects, of which a single layout has few pixels, are seen against all others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer
from posterity._models import evaluating, frozen
from posterity._precision import NARROW, wide
from posterity.generative.layout_generator import ECGANOutput
from posterity.generative.layout_guidance import ClassSimilarityLoss, _in_range, _one_hot, edges
from posterity.generative.pixel_contrast import PixelContrastiveLoss

__all__ = ["ECGAN"]

WEIGHTS = {
    "gan": 1.0,
    "feature": 10.0,
    "perceptual": 10.0,
    "edge": 1.0,
    "similarity": 1.0,
    "contrastive": 1.0,
}

Images = Float[Tensor, "n c h w"]
Layout = Shaped[Tensor, "n classes h w"]
Edge = Float[Tensor, "n 1 h w"] | None


class ECGAN:
    """Train a generator of images from layouts against a discriminator, equation 1.

    Parameters
    ----------
    generator : nn.Module
        ``generator(layout, generator=)`` returns an `ECGANOutput`, as `ECGANGenerator` does.
    discriminator : nn.Module
        ``discriminator(layout, image, edge)`` returns, for each scale, a list of features and last
        of scores, as `MultiModalDiscriminator` does. ``edge`` is None where the edge weight is 0.
    weights : mapping of str to float, optional
        What the terms count for, at least 0: "gan" 1, "feature" 10, "perceptual" 10, "edge" 1,
        "similarity" 1, "contrastive" 1, unless given. At 0 a term is not computed; without
        "edge", edges are not judged either.
    features : callable, optional
        ``features(images)`` returns a tensor or a sequence of them, such as layers of a VGG
        network, of images in [-1, 1]. Without it the perceptual term is 0.

    Raises
    ------
    ValueError
        If an argument is of the wrong kind, a weight is unknown or negative, or input does not fit.

    Notes
    -----
    1. Temperature and sampling of pixels are those of `PixelContrastiveLoss` by default, the loss
       of edges is the binary cross-entropy: the paper's are not known.
    2. The coarse and the refined image count alike wherever images are judged.

    References
    ----------
    .. [1] Tang et al. Edge Guided GANs with Contrastive Learning for Semantic Image Synthesis.
       ICLR 2023. Sections 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import ECGAN, ECGANGenerator, MultiModalDiscriminator
    >>> layout = torch.eye(2)[torch.arange(8) // 4].T.view(1, 2, 1, 8).expand(2, 2, 8, 8)
    >>> image = layout[:, :1] * 2 - 1  # white, then black
    >>> gan = ECGAN(ECGANGenerator(2, width=4, image_channels=1),
    ...             MultiModalDiscriminator(2, width=4, image_channels=1))
    >>> gan.fit([(layout, image)], n_steps=2).sample(layout).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, *, weights: Mapping[str, float] | None = None,
        features: Callable[[Tensor], Any] | None = None,
    ) -> None:  # fmt: skip
        for name, net in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(net, nn.Module):
                raise ValueError(f"{name} must be a torch.nn.Module, got {type(net).__name__}")
        if features is not None and not callable(features):
            raise ValueError(f"features must be callable, got {type(features).__name__}")
        if weights is not None and not isinstance(weights, Mapping):
            raise ValueError(f"weights must be a mapping of names to numbers, got {type(weights).__name__}")
        for name, weight in (weights or {}).items():
            if name not in WEIGHTS:
                raise ValueError(f"weights must be of {', '.join(WEIGHTS)}, got {name!r}")
            at_least(f"weights[{name!r}]", weight, 0)
        self.generator, self.discriminator, self.features = generator, discriminator, features
        self.weights = WEIGHTS | dict(weights or {})
        self.similarity = ClassSimilarityLoss()
        self.contrast = PixelContrastiveLoss()

    def generator_loss(
        self, layout: Layout, image: Images, *, edge: Edge = None, generator: torch.Generator | None = None
    ) -> dict[str, Float[Tensor, ""]]:  # fmt: skip
        """Return the terms of equation 1 before they are weighted, and their weighted sum, "total".

        No gradient enters the discriminator.

        Parameters
        ----------
        layout : Tensor of shape (n, n_classes, h, w)
            One-hot, of any dtype.
        image : Tensor of shape (n, c, h, w)
            The real images, in [-1, 1].
        edge : Tensor of shape (n, 1, h, w), optional
            Their edge maps, in [0, 1]. Default: those of `edges`.
        generator : torch.Generator, optional
            Source of randomness for noise and the choice of pixels.

        Returns
        -------
        dict of str to Tensor
            Scalars.
        """
        edge = self._checked(layout, image, edge)
        return self._terms(self._made(layout, image, generator), layout, image, edge, generator)

    def discriminator_loss(
        self, layout: Layout, image: Images, *, edge: Edge = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the hinge loss of real against generated pairs; no gradient enters the generator.

        Parameters
        ----------
        layout, image, edge, generator
            As in `generator_loss`.

        Returns
        -------
        Tensor
            A scalar.
        """
        edge = self._checked(layout, image, edge)
        with torch.no_grad():
            made = self._made(layout, image, generator)
        return self._hinge(made, layout, image, edge)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(
        self, batches: Iterable[Sequence[Tensor]], n_steps: int, *, lr_g: float = 1e-4, lr_d: float = 4e-4,
        betas: tuple[float, float] = (0.0, 0.9), generator: torch.Generator | None = None,
    ) -> "ECGAN":  # fmt: skip
        """Train both networks by Adam, a step of the discriminator before each of the generator.

        Optimisers begin anew at each call; the networks' modes are afterwards as they were.

        Parameters
        ----------
        batches : iterable of (layout, image) or (layout, image, edge)
            Begun again when it ends, as a ``DataLoader`` or a list can be.
        n_steps : int
            Steps of the generator, at least 1.
        lr_g, lr_d : float, default=1e-4 and 4e-4
            Learning rates of generator and discriminator, positive.
        betas : tuple of float, default=(0.0, 0.9)
            Of Adam, each in [0, 1).
        generator : torch.Generator, optional
            Source of randomness for noise and the choice of pixels.

        Returns
        -------
        ECGAN
            Itself.

        Raises
        ------
        ValueError
            If an argument is out of range, a batch does not fit, ``batches`` ends too early and
            cannot be begun again, weights are in half precision, or a loss stops being finite.
        """
        integer("n_steps", n_steps, 1)
        at_least("lr_g", lr_g, 0, strict=True)
        at_least("lr_d", lr_d, 0, strict=True)
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        for k, beta in enumerate(betas):
            if at_least(f"betas[{k}]", beta, 0) >= 1:
                raise ValueError(f"betas[{k}] must be less than 1, got {beta}")
        nets = {"generator": self.generator, "discriminator": self.discriminator}
        learned = {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items()}
        for name, parameters in learned.items():
            if not parameters:
                raise ValueError(f"{name} must have parameters to train, has none that require a gradient")
            for p in parameters:
                if p.dtype in NARROW:
                    raise ValueError(
                        f"{name} must have weights in float32 or float64 to be trained, got {p.dtype}"
                    )
        step_g, step_d = (
            torch.optim.Adam(learned[name], lr=lr, betas=(betas[0], betas[1]))
            for name, lr in (("generator", lr_g), ("discriminator", lr_d))
        )
        modes = [(module, module.training) for net in nets.values() for module in net.modules()]
        try:
            for net in nets.values():
                net.train()
            for number, batch in enumerate(_repeated(batches, n_steps)):
                layout, image, edge = _three(batch)
                edge = self._checked(layout, image, edge)
                made = self._made(
                    layout, image, generator
                )  # for both: the first step leaves the generator alone
                still = ECGANOutput(*(part.detach() for part in made))
                for step, loss in (
                    (step_d, lambda: self._hinge(still, layout, image, edge)),  # noqa: B023
                    (step_g, lambda: self._terms(made, layout, image, edge, generator)["total"]),  # noqa: B023
                ):
                    step.zero_grad(set_to_none=True)
                    value = loss()
                    if not bool(value.isfinite()):
                        raise ValueError(
                            f"the loss is {value.item()} after {number} steps: lower lr_g or lr_d, got {lr_g} and {lr_d}"
                        )
                    value.backward()
                    step.step()
        finally:
            step_g.zero_grad(set_to_none=True)
            step_d.zero_grad(set_to_none=True)
            for module, training in modes:
                module.training = training
        return self

    @torch.no_grad()
    def sample(self, layout: Layout, generator: torch.Generator | None = None) -> Images:
        """Return the refined images of layouts, in [-1, 1], with the generator in eval mode.

        Parameters
        ----------
        layout : Tensor of shape (n, n_classes, h, w)
            One-hot, of any dtype.
        generator : torch.Generator, optional
            Source of randomness for the noise.

        Returns
        -------
        Tensor of shape (n, c, h, w)
            Images.
        """
        _one_hot(layout, _any_classes(layout))
        with evaluating(self.generator) as net:
            return _output(net(layout, generator=generator)).image

    def _checked(self, layout: Any, image: Any, edge: Any) -> Edge:
        """Refuse a batch that does not fit; return its edges, None where they do not count."""
        _one_hot(layout, _any_classes(layout))
        n, _, h, w = layout.shape
        has_shape("image", floating("image", image), (n, None, h, w), "layout")
        _in_range("image", image, -1, 1)
        if edge is not None:
            has_shape("edge", floating("edge", edge), (n, 1, h, w), "layout")
            _in_range("edge", edge, 0, 1)
            edge = edge.clamp(0, 1)
        if not self.weights["edge"]:
            return None
        return edges(wide(image).clamp(-1, 1) / 2 + 0.5).to(image) if edge is None else edge

    def _made(self, layout: Tensor, image: Tensor, generator: torch.Generator | None) -> ECGANOutput:
        made = _output(self.generator(layout, generator=generator))
        has_shape("generator(layout).image", made.image, image.shape, "image")
        return made

    def _terms(
        self, made: ECGANOutput, layout: Tensor, image: Tensor, edge: Edge, generator: torch.Generator | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the terms of the generator's loss and their weighted sum."""
        terms = {name: made.image.new_zeros((), dtype=wide(made.image).dtype) for name in WEIGHTS}
        weights, tries = self.weights, (made.coarse, made.image)
        if weights["gan"] or weights["feature"]:
            with frozen(self.discriminator):
                fake = [self._judged(layout, seen, made.edge) for seen in tries]
                if weights["gan"]:
                    terms["gan"] = _mean([-wide(scale[-1]).mean() for judged in fake for scale in judged])
                if weights["feature"]:
                    with torch.no_grad():
                        real = self._judged(layout, image, edge)
                    if any(len(scale) < 2 for scale in real):
                        raise ValueError(
                            "discriminator must return features before its scores, returns scores alone"
                        )
                    terms["feature"] = _mean([
                        F.l1_loss(wide(ours), wide(theirs)) for judged in fake
                        for mine, other in zip(judged, real, strict=True)
                        for ours, theirs in zip(mine[:-1], other[:-1], strict=True)
                    ])  # fmt: skip
        if weights["perceptual"] and self.features is not None:
            with torch.no_grad():
                wanted = _listed(self.features(image))
            terms["perceptual"] = _mean([
                F.l1_loss(wide(ours), wide(theirs)) for seen in tries
                for ours, theirs in zip(_listed(self.features(seen)), wanted, strict=True)
            ])  # fmt: skip
        if edge is not None:
            with torch.autocast(image.device.type, enabled=False):  # it refuses probabilities
                terms["edge"] = F.binary_cross_entropy(wide(made.edge), edge.to(wide(made.edge)))
        if weights["similarity"]:
            terms["similarity"] = self.similarity(wide(made.label_logits), layout)
        if weights["contrastive"]:
            terms["contrastive"] = self.contrast(
                wide(made.features), layout.int().argmax(1), generator=generator
            )
        total = torch.stack(
            [weights[name] * term.to(terms["gan"].dtype) for name, term in terms.items()]
        ).sum()
        return {**terms, "total": total}

    def _hinge(self, made: ECGANOutput, layout: Tensor, image: Tensor, edge: Edge) -> Tensor:
        """Return the discriminator's loss."""
        real = [F.relu(1 - wide(scale[-1])).mean() for scale in self._judged(layout, image, edge)]
        fake = [
            F.relu(1 + wide(scale[-1])).mean()
            for seen in (made.coarse, made.image)
            for scale in self._judged(layout, seen, made.edge)
        ]
        return _mean(real) + _mean(fake)

    def _judged(self, layout: Tensor, image: Tensor, edge: Tensor | None) -> list[list[Tensor]]:
        return self.discriminator(layout, image, edge if self.weights["edge"] else None)


def _any_classes(layout: Any) -> int:
    return layout.shape[1] if isinstance(layout, Tensor) and layout.ndim == 4 else 2


def _output(made: Any) -> ECGANOutput:
    if not isinstance(made, ECGANOutput):
        raise ValueError(f"generator must return an ECGANOutput, got {type(made).__name__}")
    return made


def _listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _three(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return layout, image and edges, if there are any, of a batch."""
    if isinstance(batch, (str, Tensor)) or not isinstance(batch, Sequence) or len(batch) not in (2, 3):
        raise ValueError(
            f"batches must give (layout, image) or (layout, image, edge), got {type(batch).__name__}"
        )
    # a tensor of inference mode cannot be trained on
    parts = [part.clone() if isinstance(part, Tensor) and part.is_inference() else part for part in batch]
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def _repeated(batches: Any, n_steps: int) -> Iterator[Any]:
    """Yield so many batches, from the start again when they end."""
    if isinstance(batches, (str, Tensor)) or not isinstance(batches, Iterable):
        raise ValueError(f"batches must be an iterable of batches, got {type(batches).__name__}")
    source, given = iter(batches), 0
    once = source is batches
    while given < n_steps:
        before = given
        for batch in source:
            yield batch
            given += 1
            if given == n_steps:
                return
        if given == before or once:
            tail = ": pass a DataLoader or a list" if once else ""
            raise ValueError(f"batches must give {n_steps} batches, ended after {given}{tail}")
        source = iter(batches)
