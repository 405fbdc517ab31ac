"""The low-norm effect: shrink one vector of a learned prompt, and accuracy often rises.

Each position in turn is multiplied by a number, or replaced by noise, and the accuracy of the changed prompt is
measured. Where smaller is better, `NemesisLoss` has something to do.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least
from posterity._random import draw_device
from posterity.transfer.nemesis import _batch
from posterity.transfer.prompt_learner import PromptLearner

__all__ = ["LowNormEffect", "low_norm_effect"]

AT_ONCE = 16  # contexts in a pass of the text tower


class LowNormEffect(NamedTuple):
    """What `low_norm_effect` measures.

    Attributes
    ----------
    accuracy : float
        Of the prompts as they are.
    scaled : Tensor of shape (M, len(scales))
        With one position multiplied.
    replaced : Tensor of shape (M, len(sigmas))
        With one position replaced by noise.
    frequency : float
        The share of positions and scales below 1 with an accuracy strictly above; NaN where no scale is.
    """

    accuracy: float
    scaled: Tensor
    replaced: Tensor
    frequency: float


@torch.no_grad()
def low_norm_effect(
    prompts: PromptLearner, image_features: Float[Tensor, "n d"], y: Int[Tensor, " n"], *,
    scales: Sequence[float] = (0.001, 0.01, 0.1, 0.5, 2.0), sigmas: Sequence[float] = (0.0, 0.001, 0.01, 0.1, 0.5),
    generator: torch.Generator | None = None,
) -> LowNormEffect:  # fmt: skip
    """Measure what becomes of accuracy when a vector of a prompt is shortened, lengthened or replaced.

    Parameters
    ----------
    prompts : PromptLearner
        Trained; not changed.
    image_features : Tensor of shape (n, d)
        Of images to test on, made by the prompts' model.
    y : Tensor of shape (n,)
        Their classes.
    scales : sequence of float, default=(0.001, 0.01, 0.1, 0.5, 2.0)
        By what a position is multiplied, each at least 0.
    sigmas : sequence of float, default=(0.0, 0.001, 0.01, 0.1, 0.5)
        Deviations of the noise that replaces it, each at least 0.
    generator : torch.Generator, optional
        Draws the noise.

    Returns
    -------
    LowNormEffect
        Accuracies as it is, scaled and replaced, and how often less is more.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit the prompts.

    References
    ----------
    .. [1] Fu, Wang, Huang and Zhang. Nemesis: Normalizing the Soft-prompt Vectors of Vision-Language Models.
       ICLR 2024. Section 3.2, figure 2.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import PromptLearner, low_norm_effect
    >>> model = nn.Module()  # in the place of transformers.CLIPModel
    >>> model.token_embedding, model.logit_scale = nn.Embedding(32, 4), nn.Parameter(torch.tensor(0.0))
    >>> model.encode_text = lambda ids, inputs_embeds: inputs_embeds.cumsum(1)[torch.arange(len(ids)), ids.argmax(1)]
    >>> model.encode_image = lambda images: images
    >>> def tokenizer(texts):  # a token a letter
    ...     rows = [[28, *(ord(c) % 32 for c in text if c.isalpha()), 31] for text in texts]
    ...     return torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    >>> prompts = PromptLearner(model, tokenizer, ["cat", "dog"], n_context=3)
    >>> found = low_norm_effect(prompts, torch.randn(6, 4), torch.arange(6) % 2, scales=(0.5, 1.0))
    >>> found.scaled.shape, bool((found.scaled[:, 1] == found.accuracy).all())
    (torch.Size([3, 2]), True)
    """
    _batch(prompts, image_features, y, None)
    scales, sigmas = _numbers("scales", scales), _numbers("sigmas", sigmas)
    context = prompts.context.detach()
    m = context.shape[-2]
    # every context to be tried: as it is, (position, scale) in order, (position, sigma) in order
    contexts = context.repeat(1 + m * (len(scales) + len(sigmas)), *[1] * context.ndim)
    noise = torch.randn(m, len(sigmas), *context.transpose(-2, 0)[0].shape, generator=generator,
                        device=draw_device(generator)).to(context)  # fmt: skip
    for i in range(m):
        for k, scale in enumerate(scales):
            contexts[1 + i * len(scales) + k, ..., i, :] *= scale
        for k, sigma in enumerate(sigmas):
            contexts[1 + m * len(scales) + i * len(sigmas) + k, ..., i, :] = sigma * noise[i, k]
    parts = [prompts._tried(some, image_features).argmax(2) == y for some in contexts.split(AT_ONCE)]
    accuracy = torch.cat(parts).double().mean(1).cpu()
    scaled, replaced = accuracy[1:].split([m * len(scales), m * len(sigmas)])
    scaled = scaled.view(m, len(scales))
    below = scaled[:, torch.tensor(scales) < 1]
    frequency = float((below > accuracy[0]).double().mean()) if below.numel() else float("nan")
    return LowNormEffect(float(accuracy[0]), scaled, replaced.view(m, len(sigmas)), frequency)


def _numbers(name: str, values: Any) -> list[float]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
    return [at_least(name, value, 0) for value in values]
