"""Generated images that come with 3D annotations: shapes from viewpoints, their edges, and a model that keeps them.

    mesh, pose -> render -> edges -> edge-conditioned diffusion model, prompt -> image

The model paints what the prompt says where the edges are. So the image has the pose, the mask, the depth and the box of
the render, which are known exactly and cost nothing, while its looks are as varied as the model and the prompts are.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, integer, needs
from posterity._models import evaluating
from posterity._precision import NARROW
from posterity._random import draw_device, seed_from
from posterity.generative._sizes import height_width
from posterity.generative.meshes import Mesh, require_mesh
from posterity.generative.rasteriser import edge_map, render
from posterity.generative.viewpoints import Pose, require_pose, sample_poses

__all__ = ["AnnotatedImages", "GeometryControl", "prompts"]

NEGATIVE = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)
PAINTS = ("", "red", "orange", "yellow", "green", "blue", "purple", "white", "black", "grey")
SETTINGS = (
    "", "on a street", "in a forest", "on a beach", "in a desert", "in a studio", "before a brick wall", "by a lake",
    "in a city", "on a meadow", "in a room", "in the mountains",
)  # fmt: skip
WEATHERS = (
    "", "in bright sunlight", "under an overcast sky", "in the rain", "in fog", "at dusk", "at night", "in snow",
)  # fmt: skip

CONTROLLED = {
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
}


class AnnotatedImages(NamedTuple):
    """Generated images and what is known of them.

    Attributes
    ----------
    images : Tensor
        Of shape (n, 3, h, w), in [0, 1].
    edges : Tensor
        Of shape (n, 1, h, w): what the generator was given.
    pose : Pose
        Of n views.
    mask : Tensor
        Of shape (n, 1, h, w), bool: where the object is.
    depth : Tensor
        Of shape (n, 1, h, w): along the camera's axis, inf outside the object.
    boxes : Tensor
        Of shape (n, 4): left, top, right and bottom end of the object in pixels, so that the width is right - left;
        zeros where no pixel is the object's.
    prompts : list of str
        A prompt an image.
    class_name : str
        Of all.
    """

    images: Float[Tensor, "n 3 h w"]
    edges: Float[Tensor, "n 1 h w"]
    pose: Pose
    mask: Bool[Tensor, "n 1 h w"]
    depth: Float[Tensor, "n 1 h w"]
    boxes: Float[Tensor, "n 4"]
    prompts: list[str]
    class_name: str


def prompts(
    class_name: str,
    n: int,
    *,
    extra: str = "best quality, extremely detailed",
    writer: Callable[[str], str] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[str], list[str]]:
    """Write prompts for images of a class: "An image of {description}, {extra}".

    Parameters
    ----------
    class_name : str
        Such as "car".
    n : int
        How many, at least 0.
    extra : str, default="best quality, extremely detailed"
        What ends them all; empty for nothing.
    writer : callable, optional
        ``writer(class_name)`` describes the object, once a prompt: a language model may. ``str`` leaves the class name
        alone, as the official simple prompts do. Default: a colour, a place and a weather are drawn; the viewpoint,
        which the pose decides, is not spoken of.
    generator : torch.Generator, optional
        Draws what is drawn.

    Returns
    -------
    tuple of list of str
        n prompts, and n negative prompts, which are the official one.

    Raises
    ------
    ValueError
        If the class name is empty, or ``writer`` writes something other than text.

    Examples
    --------
    >>> from posterity.generative import prompts
    >>> prompts("car", 1, writer=str)[0]
    ['An image of car, best quality, extremely detailed']
    >>> import torch
    >>> written, _ = prompts("car", 100, generator=torch.Generator().manual_seed(0))
    >>> all("car" in text for text in written), len(set(written)) > 50
    (True, True)
    """
    _named(class_name)
    count = integer("n", n, 0)
    if not isinstance(extra, str):
        raise ValueError(f"extra must be text, got {extra!r}")
    if writer is None:
        drawn = torch.rand(count, 3, generator=generator, device=draw_device(generator)).tolist()
        said = [_described(class_name, row) for row in drawn]
    elif callable(writer):
        said = [writer(class_name) for _ in range(count)]
        for text in said:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"writer must return text, got {text!r}")
    else:
        raise ValueError(f"writer must be a function of a class name, got {writer!r}")
    tail = f", {extra}" if extra else ""
    return [f"An image of {text}{tail}" for text in said], [NEGATIVE] * count


def _described(class_name: str, row: Sequence[float]) -> str:
    paint, setting, weather = (
        words[int(u * len(words))] for u, words in zip(row, (PAINTS, SETTINGS, WEATHERS), strict=True)
    )
    where = ", ".join(text for text in (setting, weather) if text)
    return f"{paint} {class_name}".strip() + (f" {where}" if where else "")


def _named(class_name: str) -> str:
    if not isinstance(class_name, str) or not class_name.strip():
        raise ValueError(f"class_name must be a name, got {class_name!r}")
    return class_name


class GeometryControl:
    """A line from 3D shapes to images with annotations, around any generator that keeps edges.

    Parameters
    ----------
    generator : callable
        ``generator(edges, prompts, negative_prompts, rng)`` returns images (n, 3, h, w) in [0, 1] for edge maps
        (n, 1, h, w) of 0 and 1, two lists of n texts, and a ``torch.Generator``: a `TinyControlNet`, one of
        `from_diffusers`, or your own.
    size : int or tuple of int, optional
        Height and width of the edge maps, at least 8. Default: what ``generator.size`` says, else 64.
    writer : callable, optional
        As `prompts` takes it.

    Raises
    ------
    ValueError
        If ``generator`` cannot be called, or the size is too small.

    Notes
    -----
    Departures from the paper: the renderer is a small one of flat shades, and prompts are drawn from a grammar; the
    paper renders textured CAD models in Blender and has descriptions written by a language model, which may be
    ``writer``.

    References
    ----------
    .. [1] Ma, Liu, Wang, et al. Generating Images with 3D Annotations Using Diffusion Models. ICLR 2024. Section 3.

    Examples
    --------
    A generator that makes white lines on red:

    >>> import torch
    >>> from posterity.generative import GeometryControl, primitive
    >>> def generator(edges, prompts, negative_prompts, rng):
    ...     return torch.cat([torch.ones_like(edges), edges, edges], dim=1)
    >>> control = GeometryControl(generator, size=32)
    >>> made = control.generate(primitive("chair"), "chair", 5, generator=torch.Generator().manual_seed(0))
    >>> made.images.shape, made.boxes.shape, made.pose.azimuth.shape
    (torch.Size([5, 3, 32, 32]), torch.Size([5, 4]), torch.Size([5]))
    >>> bool((made.boxes[:, 2:] > made.boxes[:, :2]).all())
    True
    """

    def __init__(
        self,
        generator: Callable[..., Tensor],
        *,
        size: int | tuple[int, int] | None = None,
        writer: Callable[[str], str] | None = None,
    ) -> None:
        if not callable(generator):
            raise ValueError(
                f"generator must be a function of edges and prompts, got {type(generator).__name__}"
            )
        if writer is not None and not callable(writer):
            raise ValueError(f"writer must be a function of a class name, got {writer!r}")
        self.generator, self.writer = generator, writer
        self.size = height_width(getattr(generator, "size", 64) if size is None else size, 8)

    @classmethod
    def from_diffusers(
        cls,
        model: Any,
        controlnet: Any,
        *,
        n_steps: int = 20,
        guidance_scale: float = 9.0,
        strength: float = 1.0,
        size: int = 512,
    ) -> "GeometryControl":
        """Generate by a text-to-image pipeline of diffusers with a ControlNet for Canny edges, of SD 1.5 or XL.

        Parameters
        ----------
        model : str, Path or pipeline
            A name such as "stable-diffusion-v1-5/stable-diffusion-v1-5", a folder, or a pipeline, on whose device it
            is generated.
        controlnet : str, Path or ControlNetModel
            A name such as "lllyasviel/control_v11p_sd15_canny" or "diffusers/controlnet-canny-sdxl-1.0", a folder, or
            a network.
        n_steps : int, default=20
            DDIM steps of eta 1, at least 1.
        guidance_scale : float, default=9.0
            At least 0: 1 or less goes without.
        strength : float, default=1.0
            By which the controls are multiplied, at least 0.
        size : int, default=512
            Pixels a side, a multiple of 8.

        Returns
        -------
        GeometryControl

        Raises
        ------
        ValueError
            If a number is out of range, or nothing is found under a name.
        """
        integer("n_steps", n_steps, 1)
        at_least("guidance_scale", guidance_scale, 0)
        at_least("strength", strength, 0)
        if integer("size", size, 8) % 8:
            raise ValueError(f"size must be a multiple of 8, got {size}")
        return cls(_Pipeline(model, controlnet, n_steps, guidance_scale, strength, size))

    @torch.no_grad()
    def generate(
        self,
        mesh: Mesh,
        class_name: str,
        n: int,
        *,
        pose: Pose | None = None,
        batch_size: int = 8,
        generator: torch.Generator | None = None,
    ) -> AnnotatedImages:
        """Generate images of a mesh from many sides.

        Parameters
        ----------
        mesh : Mesh
        class_name : str
            What the prompts call it.
        n : int
            How many, at least 1.
        pose : Pose, optional
            Of n views. Default: `sample_poses` draws them.
        batch_size : int, default=8
            Images that the generator makes at once, at least 1.
        generator : torch.Generator, optional
            Draws poses, prompts and what the generator draws.

        Returns
        -------
        AnnotatedImages
            On the device of the mesh.

        Raises
        ------
        ValueError
            If an argument does not fit, or the generator returns images of another size or range.
        """
        require_mesh("mesh", mesh)
        _named(class_name)
        integer("n", n, 1)
        integer("batch_size", batch_size, 1)
        if pose is None:
            pose = sample_poses(n, generator=generator)
        elif len(require_pose("pose", pose).azimuth) != n:
            raise ValueError(f"pose must have n = {n} views, got {len(pose.azimuth)}")
        vertices = mesh.vertices
        # viewpoints keep their digits where vertices are narrow
        dtype = torch.float32 if vertices.dtype in NARROW else vertices.dtype
        pose = Pose(*(part.to(vertices.device, dtype) for part in pose))
        seen = render(mesh, pose, size=self.size)
        edges = edge_map(seen.image)
        positive, negative = prompts(class_name, n, writer=self.writer, generator=generator)
        if generator is None:  # torch's own draws decide, as everywhere
            generator = torch.Generator().manual_seed(seed_from(None))
        parts = []
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            given = edges[rows]
            made = self.generator(given, positive[rows], negative[rows], generator)
            parts.append(_image_batch(made, given).to(vertices))
        return AnnotatedImages(
            torch.cat(parts),
            edges,
            pose,
            seen.mask,
            seen.depth,
            _boxes(seen.mask).to(vertices),
            positive,
            class_name,
        )


def _image_batch(made: Tensor, edges: Tensor) -> Tensor:
    """Return what a generator made, if these are images."""
    n, _, height, width = edges.shape
    floating("what the generator returns", made)
    if made.shape != (n, 3, height, width):
        raise ValueError(
            f"generator must return images of shape {(n, 3, height, width)}, as its edges are, got {tuple(made.shape)}"
        )
    low, high = (float(end) for end in finite("what the generator returns", made).aminmax())
    if low < -1e-3 or high > 1.001:
        raise ValueError(f"generator must return images in [0, 1], got values in [{low:g}, {high:g}]")
    return made.clamp(0, 1)


def _boxes(mask: Bool[Tensor, "n 1 h w"]) -> Float[Tensor, "n 4"]:
    ends = []
    for axis in (2, 3):  # what is left of an image when its rows go, and its columns
        line = mask.any(axis).flatten(1)
        size = line.shape[1]
        at = torch.arange(size, device=mask.device)
        ends += [torch.where(line, at, size).amin(1), torch.where(line, at + 1, 0).amax(1)]
    left, right, top, bottom = ends
    seen = mask.flatten(1).any(1)
    return torch.where(seen[:, None], torch.stack([left, top, right, bottom], 1), 0).float()


class _Pipeline:
    """A pipeline of diffusers as a function of edges."""

    def __init__(
        self, model: Any, controlnet: Any, n_steps: int, guidance_scale: float, strength: float, size: int
    ) -> None:
        diffusers = needs("diffusers", "generative")
        named = isinstance(model, str | Path)
        if not named and not (hasattr(model, "unet") and hasattr(model, "scheduler")):
            raise ValueError(f"model must be a name, a folder or a pipeline, got {type(model).__name__}")
        if isinstance(controlnet, str | Path):
            controlnet = _found("controlnet", diffusers.ControlNetModel.from_pretrained, controlnet)
            if not named:
                controlnet = controlnet.to(model.device, model.unet.dtype)
        name = type(model).__name__
        if named:
            name = _found("model", diffusers.DiffusionPipeline.load_config, model)["_class_name"]
        if name not in CONTROLLED and name not in CONTROLLED.values():
            raise ValueError(f"model must be one of {', '.join(CONTROLLED)}, got {name}")
        kind = getattr(diffusers, CONTROLLED.get(name, name))
        if named:
            self.pipe = _found("model", kind.from_pretrained, model, controlnet=controlnet)
        else:
            self.pipe = kind.from_pipe(model, controlnet=controlnet)
        self.pipe.scheduler = diffusers.DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.n_steps, self.guidance_scale, self.strength, self.size = n_steps, guidance_scale, strength, size

    def __call__(
        self, edges: Tensor, positive: list[str], negative: list[str], rng: torch.Generator
    ) -> Tensor:
        with evaluating(self.pipe.unet), evaluating(self.pipe.controlnet):
            return self.pipe(
                prompt=positive, negative_prompt=negative, image=edges.expand(-1, 3, -1, -1), height=self.size,
                width=self.size, num_inference_steps=self.n_steps, guidance_scale=self.guidance_scale,
                controlnet_conditioning_scale=float(self.strength), eta=1.0, generator=rng, output_type="pt",
            ).images  # fmt: skip


def _found(name: str, load: Callable[..., Any], where: str | Path, **options: Any) -> Any:
    try:
        return load(str(where), **options)
    except (OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} must be a folder or a name of diffusers, got {str(where)!r}: {why}"
        ) from error
