"""A diffusion model as a fixed yardstick: its own denoising error as a loss for what it is told, and its samples."""

import copy
import inspect
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posterity._checks import at_least, class_indices, floating, has_shape, integer, one_of
from posterity._models import held
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["DiffusionLoss"]

Scalar = Float[Tensor, ""]


class DiffusionLoss:
    """The denoising error of a frozen text-to-image model, as a function of the text's encoding.

    ``E | target - unet(x_t, t, context) |^2`` with x_t by the scheduler's own noising; the target is the noise, or the
    velocity ``sqrt(ab) noise - sqrt(1 - ab) x``. The gradient runs through the network to ``context`` and stops there:
    the network is in eval mode while it is asked, its parameters are constants, and all flags are afterwards as they
    were. Where memory is short, call its ``enable_gradient_checkpointing()`` first.

    Parameters
    ----------
    unet : nn.Module
        ``unet(x, t, encoder_hidden_states=context).sample``, as ``diffusers.UNet2DConditionModel``.
    scheduler : object
        Of diffusers, or with ``config.num_train_timesteps``, ``add_noise(x, noise, t)`` and, for velocities,
        ``get_velocity(x, noise, t)``; for ``sample`` also ``set_timesteps`` and ``step``.
    vae : nn.Module, optional
        ``encode(x).latent_dist.sample(generator)`` and ``decode(z).sample``: images are diffused as its latents.
    scaling_factor : float, default=0.18215
        By which latents are multiplied, greater than 0; not used without ``vae``.
    prediction : {"epsilon", "v_prediction"}, optional
        What the network says. Default: ``scheduler.config.prediction_type``.

    Raises
    ------
    ValueError
        If a part lacks what is asked of it, or the network predicts something else.

    References
    ----------
    .. [1] Gal et al. An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion.
       ICLR 2023. Equations 1 and 2.

    Examples
    --------
    A network that always says 0 errs by the noise itself:

    >>> import torch
    >>> from types import SimpleNamespace
    >>> from posterity.generative import DiffusionLoss
    >>> class Silent(torch.nn.Module):
    ...     def forward(self, x, t, encoder_hidden_states):
    ...         return SimpleNamespace(sample=0 * x)
    >>> scheduler = SimpleNamespace(
    ...     config=SimpleNamespace(num_train_timesteps=10, prediction_type="epsilon"),
    ...     add_noise=lambda x, noise, t: x + noise,
    ... )
    >>> loss = DiffusionLoss(Silent(), scheduler)
    >>> loss(torch.rand(2, 3, 4, 4), torch.zeros(2, 5, 8), noise=torch.full((2, 3, 4, 4), 3.0))
    tensor(9.)
    """

    def __init__(
        self, unet: nn.Module, scheduler: Any, vae: nn.Module | None = None, *, scaling_factor: float = 0.18215,
        prediction: Literal["epsilon", "v_prediction"] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(unet, nn.Module):
            raise ValueError(f"unet must be an nn.Module, got {type(unet).__name__}")
        if vae is not None and not (isinstance(vae, nn.Module) and hasattr(vae, "encode")):
            raise ValueError(f"vae must be an nn.Module with encode, got {type(vae).__name__}")
        config = getattr(scheduler, "config", None)
        self._n_times = integer(
            "scheduler.config.num_train_timesteps", getattr(config, "num_train_timesteps", None), 1
        )
        if prediction is None:
            prediction = getattr(config, "prediction_type", "epsilon")
        self.prediction = one_of("prediction", prediction, ("epsilon", "v_prediction"))
        for name in ("add_noise", *(["get_velocity"] if prediction == "v_prediction" else [])):
            if not hasattr(scheduler, name):
                raise ValueError(f"scheduler must have {name}, {type(scheduler).__name__} does not")
        self.scaling_factor = at_least("scaling_factor", scaling_factor, 0, strict=True)
        self.unet: Any = unet
        self.vae: Any = vae
        self.scheduler: Any = scheduler

    def __call__(
        self, images: Float[Tensor, "n channels height width"], context: Float[Tensor, "n length d"], *,
        t: Int[Tensor, " n"] | None = None, noise: Float[Tensor, "n ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Scalar:  # fmt: skip
        """Return the mean squared error over all elements.

        Parameters
        ----------
        images : Tensor of shape (n, channels, height, width)
            In [0, 1].
        context : Tensor of shape (n, length, d)
            What the network is told: encoded texts.
        t : Tensor of shape (n,), optional
            Steps of the scheduler's training range. Default: uniform.
        noise : Tensor, optional
            As the images, or as their latents. Default: standard normal.
        generator : torch.Generator, optional
            Draws the steps, latents and noise.

        Returns
        -------
        Tensor
            A scalar, float32 at least, on the network's device.

        Raises
        ------
        ValueError
            If shapes or channels do not fit, or images are no numbers in [0, 1].
        """
        self._check(images)
        has_shape("context", floating("context", context), (len(images), None, None), f"{len(images)} images")
        with self._held():
            return self._error(images, context, t, noise, generator)

    @torch.no_grad()
    def sample(
        self, context: Float[Tensor, "n length d"], negative_context: Float[Tensor, "m length d"], *,
        n_steps: int = 50, guidance_scale: float = 7.5, generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n channels height width"]:  # fmt: skip
        """Draw images with guidance: each step follows ``e_u + s (e_c - e_u)``.

        Parameters
        ----------
        context : Tensor of shape (n, length, d)
            What each image is of.
        negative_context : Tensor of shape (n, length, d) or (1, length, d)
            What to go away from: the encoding of the empty text.
        n_steps : int, default=50
            From 1 to the steps of training.
        guidance_scale : float, default=7.5
            s, at least 0; at 1 the negative context plays no part.
        generator : torch.Generator, optional
            Draws the starts, and what noise the scheduler adds.

        Returns
        -------
        Tensor of shape (n, channels, height, width)
            In [0, 1], as large as the network was trained on, in its dtype.

        Raises
        ------
        ValueError
            If shapes do not fit, a number is out of range, or the network does not say how large its images are.
        """
        n = len(has_shape("context", floating("context", context), (None, None, None)))
        floating("negative_context", negative_context)
        if negative_context.ndim != 3 or len(negative_context) not in (1, n):
            shown = tuple(negative_context.shape)
            raise ValueError(f"negative_context must have shape (1 or {n}, length, d), got {shown}")
        has_shape("negative_context", negative_context, (None, *context.shape[1:]), "context")
        if not n:
            raise ValueError("context must hold at least one text, got none")
        if integer("n_steps", n_steps, 1) > self._n_times:
            raise ValueError(f"n_steps must be at most the {self._n_times} of training, got {n_steps}")
        at_least("guidance_scale", guidance_scale, 0)
        config = getattr(self.unet, "config", None)
        channels, side = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        if channels is None or side is None:
            raise ValueError("unet must have config.in_channels and config.sample_size to draw images")
        sides = (side, side) if isinstance(side, int) else tuple(side)
        scheduler, dtype, device = self._solver(), self._dtype(), self._device()
        scheduler.set_timesteps(n_steps, device=device)
        takes = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if takes else {}
        told = context.to(device, dtype)
        if guidance_scale != 1:
            told = torch.cat([negative_context.to(told).expand(n, -1, -1), told])
        x = _normal((n, channels, *sides), device, generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        with self._held():
            for t in scheduler.timesteps:
                shown = scheduler.scale_model_input(x, t).to(dtype)
                twice = torch.cat([shown, shown]) if guidance_scale != 1 else shown
                said = wide(self.unet(twice, t, encoder_hidden_states=told).sample)
                if guidance_scale != 1:
                    without, with_text = said.chunk(2)
                    said = without + guidance_scale * (with_text - without)
                x = scheduler.step(said, t, x, **options).prev_sample
            if self.vae is not None:
                first = next(self.vae.parameters(), x)
                x = wide(self.vae.decode((x / self.scaling_factor).to(first)).sample)
        return (x / 2 + 0.5).clamp(0, 1).to(dtype)

    def _error(
        self, images: Tensor, context: Tensor, t: Tensor | None = None, noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Scalar:  # fmt: skip
        """Return the loss of what was checked, within `_held`."""
        device, dtype = self._device(), self._dtype()
        x = 2 * wide(images).to(device) - 1
        n = len(x)
        if t is None:
            where = draw_device(generator, device)
            t = torch.randint(self._n_times, (n,), generator=generator, device=where).to(device)
        else:
            t = class_indices("t", t, n, self._n_times).to(device)
        if self.vae is not None:
            first = next(self.vae.parameters(), x)
            with torch.no_grad():
                x = self.scaling_factor * wide(self.vae.encode(x.to(first)).latent_dist.sample(generator)).to(
                    device
                )
        if noise is None:
            noise = _normal(tuple(x.shape), device, generator)
        else:
            noise = wide(has_shape("noise", floating("noise", noise), x.shape, "what is diffused")).to(device)
        noisy = self.scheduler.add_noise(x, noise, t).to(dtype)
        said = self.unet(noisy, t, encoder_hidden_states=context.to(device, dtype)).sample
        velocity = self.prediction == "v_prediction"
        target = self.scheduler.get_velocity(x, noise, t) if velocity else noise
        return (wide(has_shape("unet(x, t)", said, x.shape, "x")) - target).square().mean()

    def _check(self, images: Any) -> None:
        """Refuse what are no images for this model; values are read on the CPU, where that is free."""
        floating("images", images, "divide bytes by 255")
        if images.ndim != 4 or not images.numel():
            shown = tuple(images.shape)
            raise ValueError(
                f"images must have shape (n, channels, height, width), none of them 0, got {shown}"
            )
        first = self.unet if self.vae is None else self.vae
        wanted = getattr(getattr(first, "config", None), "in_channels", images.shape[1])
        if images.shape[1] != wanted:
            raise ValueError(f"images must have {wanted} channels for this model, got {images.shape[1]}")
        if images.device.type == "cpu" and not bool(((images >= 0) & (images <= 1)).all()):  # NaN is neither
            raise ValueError(
                f"images must be in [0, 1], got values from {images.min():g} to {images.max():g}"
            )

    def _held(self) -> Any:
        return held(self.unet, self.vae)

    def _first(self) -> Tensor:
        found = (p for p in self.unet.parameters() if p.is_floating_point())
        return next(found, torch.empty(0))

    def _dtype(self) -> torch.dtype:
        return self._first().dtype

    def _device(self) -> torch.device:
        return self._first().device

    def _solver(self) -> Any:
        """Return a scheduler of one's own: its state is changed while sampling."""
        scheduler = copy.deepcopy(self.scheduler)
        if getattr(scheduler.config, "prediction_type", self.prediction) != self.prediction:
            scheduler.register_to_config(prediction_type=self.prediction)
        return scheduler


def _normal(size: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randn(size, generator=generator, device=draw_device(generator, device)).to(device)
