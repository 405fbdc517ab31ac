"""An edge-conditioned diffusion model that is 32 pixels wide and ships with the package: objects by their edges."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from posterity._checks import at_least, finite, floating, integer, needs
from posterity._random import draw_device, seed_from, seeded
from posterity.generative._shipped import read_weights, train, write_weights
from posterity.generative.meshes import KINDS, Kind, Mesh, primitive
from posterity.generative.rasteriser import edge_map, render
from posterity.generative.viewpoints import Pose, rotation, sample_poses

__all__ = ["TinyControlNet"]

COLOURS = {
    "red": (0.8, 0.15, 0.15), "orange": (0.9, 0.55, 0.15), "yellow": (0.9, 0.85, 0.2), "green": (0.2, 0.65, 0.25),
    "blue": (0.2, 0.3, 0.8), "purple": (0.55, 0.25, 0.7), "white": (0.92, 0.92, 0.92), "black": (0.1, 0.1, 0.1),
    "grey": (0.5, 0.5, 0.5),
}  # fmt: skip
WORDS = ("", *KINDS, *COLOURS)  # the first is no word
LENGTH, WIDTH = 4, 32  # words of a prompt, and numbers of a word
SIDE = 32
CONTROL_FILE = "tiny_control_net.safetensors"
CONTROL_SHA256 = "20cbd9164ef8e7a79279f3498df72b6db836f7ae5eb9a563391fc2eab6609927"
MESHES, VIEWS = 32, 10  # of each kind, that `train` draws
FOV, NEAR_FAR = 40.0, (2.8, 5.5)  # what `train` sees from where
TRAIN_BATCH = 16


class TinyControlNet:
    """A text-to-image diffusion model and its ControlNet, 0.6 million weights together, for trying out large ones.

    It paints the nine kinds of `primitive`, in patterns and colours before patterned grounds, where the edges of a
    32x32 map are. What a pipeline of diffusers has stands here under the same name: a ``UNet2DConditionModel``, a
    ``ControlNetModel`` that is a trained copy of its encoder, and a DDIM scheduler whose target is the clean image, which
    a network as narrow as this paints better than noise. The latent image is the image with 2x2 pixels in a place. A prompt is the words that it knows: kinds and nine colours.

    Parameters
    ----------
    unet : nn.Module
        The locked denoiser.
    controlnet : nn.Module
        What the edges go through.
    words : nn.Embedding
        A vector for each word known.
    scheduler : diffusers scheduler
        The noises, and how they are taken away.
    n_steps : int, default=10
        Denoising steps of a call.
    guidance_scale : float, default=1.0
        How far the prompt is followed beyond the negative prompt; at 1 that is not looked at, and a step costs half.
    control_scale : float, default=1.0
        By which the controls are multiplied; at 0 edges do not matter.

    Examples
    --------
    >>> import torch
    >>> from posterity.generative import TinyControlNet
    >>> model = TinyControlNet.pretrained()
    >>> edges = torch.zeros(1, 1, 32, 32)
    >>> edges[..., 8, 8:24] = edges[..., 23, 8:24] = edges[..., 8:24, 8] = edges[..., 8:24, 23] = 1
    >>> image = model(edges, ["An image of a red box"], [""], torch.Generator().manual_seed(0))
    >>> image.shape, bool(image.min() >= 0), bool(image.max() <= 1)
    (torch.Size([1, 3, 32, 32]), True, True)
    """

    size = SIDE

    def __init__(
        self, unet: nn.Module, controlnet: nn.Module, words: nn.Embedding, scheduler: Any, *, n_steps: int = 10,
        guidance_scale: float = 1.0, control_scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.unet, self.controlnet, self.words, self.scheduler = unet, controlnet, words, scheduler
        self.n_steps = integer("n_steps", n_steps, 1)
        self.guidance_scale = at_least("guidance_scale", guidance_scale, 0)
        self.control_scale = at_least("control_scale", control_scale, 0)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "controlnet": self.controlnet, "words": self.words}

    def to(self, device: torch.device | str) -> "TinyControlNet":
        """Move the networks.

        Parameters
        ----------
        device : torch.device or str

        Returns
        -------
        TinyControlNet
            Itself.
        """
        for module in self._modules.values():
            module.to(device)
        return self

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "n words"]:
        """Return the first four words of each text that are known, as rows of `words`.

        Parameters
        ----------
        texts : sequence of str

        Returns
        -------
        Tensor
            Of shape (n, 4), int64; 0 stands for no word.
        """
        rows = []
        for text in texts:
            known = [WORDS.index(word) for word in re.findall("[a-z]+", text.lower()) if word in WORDS]
            rows.append((known + [0] * LENGTH)[:LENGTH])
        return torch.tensor(rows, dtype=torch.long).view(-1, LENGTH)

    def predict(
        self, x: Float[Tensor, "n 12 16 16"], t: Tensor, context: Float[Tensor, "n words width"],
        edges: Float[Tensor, "n 1 32 32"] | None,
    ) -> Float[Tensor, "n 12 16 16"]:  # fmt: skip
        """Return what the denoiser says: the latent images without their noise.

        Parameters
        ----------
        x : Tensor
            Of shape (n, 12, 16, 16): noisy latent images.
        t : Tensor
            Steps, one or n of them.
        context : Tensor
            Of shape (n, 4, 32): the vectors of words.
        edges : Tensor, optional
            Of shape (n, 1, 32, 32). None is without the control.

        Returns
        -------
        Tensor
            Of shape (n, 12, 16, 16).
        """
        extra = {}
        if edges is not None:
            down, middle = self.controlnet(
                x, t, encoder_hidden_states=context, controlnet_cond=edges, return_dict=False,
                conditioning_scale=self.control_scale,
            )  # fmt: skip
            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(x, t, encoder_hidden_states=context, **extra).sample

    @torch.no_grad()
    def __call__(
        self,
        edges: Float[Tensor, "n 1 h w"],
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n 3 h w"]:
        """Paint images along edges.

        Parameters
        ----------
        edges : Tensor
            Of shape (n, 1, 32, 32), 1 at edges and 0 elsewhere.
        prompts, negative_prompts : sequence of str
            n of each.
        generator : torch.Generator, optional
            Draws the noise that it starts from.

        Returns
        -------
        Tensor
            Of shape (n, 3, 32, 32), in [0, 1], on the device of the networks.

        Raises
        ------
        ValueError
            If something has another shape or length.
        """
        if floating("edges", edges).ndim != 4 or edges.shape[1:] != (1, SIDE, SIDE):
            raise ValueError(f"edges must have shape (n, 1, {SIDE}, {SIDE}), got {tuple(edges.shape)}")
        finite("edges", edges)
        for name, texts in (("prompts", prompts), ("negative_prompts", negative_prompts)):
            if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) != len(edges):
                came = len(texts) if isinstance(texts, list | tuple) else repr(texts)
                raise ValueError(f"{name} must be {len(edges)} texts, got {came}")
            if any(not isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{name} must be texts, got {[text for text in texts if not isinstance(text, str)]!r}"
                )
        device = self.words.weight.device
        said = self.words(self.tokens(prompts).to(device))
        nothing = self.words(self.tokens(negative_prompts).to(device))
        where = draw_device(generator)
        x = torch.randn(len(edges), 12, SIDE // 2, SIDE // 2, generator=generator, device=where).to(said)
        edges = edges.to(x)
        scheduler = copy.copy(self.scheduler)  # which keeps the steps that it is set to
        scheduler.set_timesteps(self.n_steps)
        for t in scheduler.timesteps:
            clean = self.predict(x, t, said, edges)
            if self.guidance_scale != 1:
                away = self.predict(x, t, nothing, edges)
                clean = away + self.guidance_scale * (clean - away)
            x = scheduler.step(clean, t, x).prev_sample
        return functional.pixel_shuffle(x, 2).add(1).div(2).clamp(0, 1)

    @classmethod
    def pretrained(cls) -> "TinyControlNet":
        """Return the model that ships: what ``train(10_000, torch.Generator().manual_seed(0))`` gave on one CPU core.

        Returns
        -------
        TinyControlNet
            In float32, from weights of 16 bits; in eval mode, no parameter asks for a gradient.

        Raises
        ------
        FileNotFoundError
            If the weights are not beside this file.
        ValueError
            If they are not those that belong to it.
        """
        made = cls._untrained(0)
        read_weights(Path(__file__).with_name(CONTROL_FILE), CONTROL_SHA256, made._modules)
        return made

    def _save(self, path: Path) -> None:
        write_weights(path, self._modules)

    @classmethod
    def _untrained(cls, seed: int) -> "TinyControlNet":
        diffusers = needs("diffusers", "generative")
        with seeded(seed):
            unet = diffusers.UNet2DConditionModel(
                sample_size=SIDE // 2, in_channels=12, out_channels=12, block_out_channels=(24, 32, 32),
                layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8,
                attention_head_dim=2, cross_attention_dim=WIDTH,
            )  # fmt: skip
            words = nn.Embedding(len(WORDS), WIDTH)
            controlnet = cls._copy(unet)
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample",
            timestep_spacing="trailing", clip_sample=True,
        )  # fmt: skip
        return cls(unet, controlnet, words, scheduler)

    @classmethod
    @torch.inference_mode(False)
    def train(cls, n_steps: int = 10_000, generator: torch.Generator | None = None) -> "TinyControlNet":
        """Train a model from nothing, on the CPU: a quarter of an hour of one core at the default.

        The first two fifths of the steps are the denoiser's, on images and prompts. Then it is locked, and the copy of
        its encoder learns from edges, prompts and images. Both by Adam at 2e-3 with warm-up and a cosine, batches of
        16, gradients clipped at norm 1, averaged weights. The images are renders of `primitive`, painted anew each
        time in patterns before patterned grounds; in a tenth of the prompts there is no word, in three tenths no
        colour.

        Parameters
        ----------
        n_steps : int, default=10000
            At least 2.
        generator : torch.Generator, optional
            Draws the initial weights, images, prompts, steps and noise.

        Returns
        -------
        TinyControlNet
            With weights rounded to 16 bits, in eval mode; no parameter asks for a gradient.

        Raises
        ------
        ValueError
            If ``n_steps`` is less than 2.
        """
        integer("n_steps", n_steps, 2)
        seed = seed_from(generator)
        made = cls._untrained(seed)
        # no more meshes than the steps can look at
        views = _views(min(MESHES, -(-n_steps * TRAIN_BATCH // (VIEWS * len(KINDS)))), generator)
        first = max(1, 2 * n_steps // 5)
        made._stage([made.unet, made.words], views, first, generator, controlled=False)
        with seeded(seed):
            made.controlnet = cls._copy(made.unet)
        made.controlnet.requires_grad_(True)
        made._stage([made.controlnet], views, n_steps - first, generator, controlled=True)
        return made

    def _stage(
        self, modules: list[nn.Module], views: "Views", n_steps: int, generator: torch.Generator | None, *,
        controlled: bool,
    ) -> None:  # fmt: skip
        """Train some of the networks, and lock them."""
        where = draw_device(generator)

        def loss() -> Tensor:
            rows = torch.randint(len(views.kind), (TRAIN_BATCH,), generator=generator, device=where).cpu()
            batch = Views(*(part[rows] for part in views))
            images, texts = _painted(batch, generator)
            x = functional.pixel_unshuffle(2 * images - 1, 2)
            noise = torch.randn(x.shape, generator=generator, device=where).cpu()
            t = torch.randint(1000, (TRAIN_BATCH,), generator=generator, device=where).cpu()
            noisy = self.scheduler.add_noise(x, noise, t)
            said = self.predict(noisy, t, self.words(self.tokens(texts)), batch.edges if controlled else None)
            return (said - x).square().mean()

        train(modules, loss, n_steps)

    @staticmethod
    def _copy(unet: nn.Module) -> nn.Module:
        """Return a trainable copy of the encoder, whose last layers are zero."""
        diffusers = needs("diffusers", "generative")
        return diffusers.ControlNetModel.from_unet(
            unet, conditioning_channels=1, conditioning_embedding_out_channels=(16, 24)
        )


class Views(NamedTuple):
    """Renders without their paint: where surfaces are, how they are turned, the edges and which kind it is."""

    points: Tensor
    normals: Tensor
    mask: Tensor
    edges: Tensor
    kind: Tensor


def _views(n_meshes: int, generator: torch.Generator | None) -> Views:
    """Return views of so many meshes of each kind."""
    parts = []
    for kind in KINDS:
        for _ in range(n_meshes):
            mesh, pose = (
                primitive(kind, generator=generator),
                sample_poses(VIEWS, distance=NEAR_FAR, generator=generator),
            )
            parts.append(_seen(kind, mesh, pose))
    return Views(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _seen(kind: Kind, mesh: Mesh, pose: Pose) -> Views:
    """Return views of a mesh; points are in its own coordinates."""
    mesh, pose = mesh._replace(vertices=mesh.vertices.float()), Pose(*(part.cpu().float() for part in pose))
    seen = render(mesh, pose, size=SIDE, fov=FOV)
    depth = torch.where(seen.mask, seen.depth, 0)
    axis = (torch.arange(SIDE) + 0.5) / (SIDE / 2) - 1
    reach = math.tan(math.radians(FOV) / 2)
    camera = torch.cat([depth * reach * axis, -depth * reach * axis[:, None], -depth], 1)
    camera[:, 2] += pose.distance[:, None, None]
    points = torch.einsum("nji,njhw->nihw", rotation(pose), camera)  # back to the object
    number = torch.full((len(depth),), KINDS.index(kind))
    return Views(points, seen.normals, seen.mask, edge_map(seen.image), number)


def _painted(views: Views, generator: torch.Generator | None) -> tuple[Tensor, list[str]]:
    """Return images in [0, 1] of objects in patterns, lit from somewhere, before patterned grounds, and prompts."""
    n, where = len(views.kind), draw_device(generator)

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, device=where).cpu()

    which = (draw() * len(COLOURS)).long()
    named = torch.tensor(list(COLOURS.values()))[which]
    named = (named + 0.2 * (draw(3) - 0.5)).clamp(0, 1)
    other = named + 0.6 * draw(1) * (draw(3) - named)
    surface = _pattern(views.points, named, other, draw, 8.0)
    axis = (torch.arange(SIDE) + 0.5) / (SIDE / 2) - 1
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(n, -1, -1, -1)
    ground = _pattern(plane, draw(3), draw(3), draw, 3.0)
    light = 2 * draw(3) - 1
    light[:, 2] = 0.3 + light[:, 2].abs()
    light = functional.normalize(light, dim=1)[..., None, None]
    ambient = 0.2 + 0.4 * draw(1, 1, 1)
    shade = ambient + (1 - ambient) * (views.normals * light).sum(1, keepdim=True).clamp_min(0)
    images = torch.where(views.mask, shade * surface, ground)
    silent, colours = draw().tolist(), list(COLOURS)
    texts = [
        "" if s < 0.1 else KINDS[kind] if s < 0.4 else f"{colours[colour]} {KINDS[kind]}"
        for s, kind, colour in zip(silent, views.kind.tolist(), which.tolist(), strict=True)
    ]
    return images, texts


def _pattern(
    points: Tensor, one: Tensor, other: Tensor, draw: Callable[..., Tensor], fastest: float
) -> Tensor:
    """Return two colours mixed by three waves over points (n, d, h, w), from soft to sharp; half of them are plain."""
    way = functional.normalize(draw(3, points.shape[1]) - 0.5, dim=2) * (fastest * (0.25 + 0.75 * draw(3, 1)))
    phase = torch.einsum("nkd,ndhw->nkhw", way, points) + 2 * math.pi * draw(3, 1, 1)
    weight = draw(3) ** 3
    weight = (weight / weight.sum(1, keepdim=True))[..., None, None]
    wave = (weight * phase.sin()).sum(1, keepdim=True)
    mix = torch.sigmoid((1 + 4 * draw(1, 1, 1)) * wave) * (draw(1, 1, 1) > 0.5)
    return one[..., None, None] + mix * (other - one)[..., None, None]
