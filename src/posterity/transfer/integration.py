"""Two losses on the hidden states of a language model: what it knew, and what a new domain adds to it.

``proxy_loss`` compares two passes of a text that differ in dropout alone: units by which this robustness falls or
rises are those that general knowledge is in, and no data of the pre-training are needed to see it. ``integration_loss``
pulls two such passes of the same text together, and apart from a pass in which only what was important before speaks,

    - mean_i log  e^{<a_i, p_i> / t} / sum_j (e^{<a_i, p_j> / t} + e^{<a_i, n_j> / t}),                        (1)

<,> the cosine; so that what the full model says of a text is more than earlier knowledge alone would say.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape
from posterity._precision import unit_rows, wide, widened

__all__ = ["integration_loss", "proxy_loss"]


def proxy_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, teacher: nn.Module | None = None, temperature: float = 1.0
) -> Float[Tensor, ""]:  # fmt: skip
    """Return how far two passes of a batch with different dropout are apart.

    KL(softmax(v / T) || softmax(u / T)) T^2, over the channels of the last hidden states v of the model and u of the
    teacher, summed over tokens that are no padding and divided by the texts.

    Parameters
    ----------
    model : nn.Module
        A language model of transformers, or a module ``(input_ids, attention_mask) -> (logits, last_hidden)``.
    batch : mapping of str to Tensor
        ``input_ids`` (n, L), and ``attention_mask`` (n, L), all ones if it is left out.
    teacher : nn.Module, optional
        A frozen copy; the model itself if None. No gradient goes through it.
    temperature : float, default=1.0
        T, greater than 0.

    Returns
    -------
    Tensor
        A scalar, in float32 at least, at least 0.

    Raises
    ------
    ValueError
        If the batch does not fit, or both passes agree, as those of a model without dropout do.

    Notes
    -----
    1. The softmax is over channels; the official code takes it over dimension 1, which is that of the tokens.
    2. Model and teacher run in train mode, batch normalisation excepted, and are left in the modes that they had.
       Dropout draws from torch's own generator, as in any forward pass.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Section 3.1, proxy KL-divergence loss.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import proxy_loss
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words, self.drop = torch.nn.Embedding(9, 4), torch.nn.Dropout(0.5)
    ...     def forward(self, input_ids, attention_mask):
    ...         hidden = self.drop(self.words(input_ids))
    ...         return hidden @ self.words.weight.T, hidden
    ...
    >>> bool(proxy_loss(Model(), {"input_ids": torch.ones(2, 3, dtype=torch.long)}) > 0)
    True
    """
    at_least("temperature", temperature, 0, strict=True)
    for name, each in (("model", model), ("teacher", model if teacher is None else teacher)):
        if not isinstance(each, nn.Module):
            raise ValueError(f"{name} must be a torch module, got {type(each).__name__}")
    batch = token_batch(batch)
    teacher = model if teacher is None else teacher
    with dropping(teacher), torch.no_grad():
        u = last_hidden(teacher, batch)
    with dropping(model):
        v = last_hidden(model, batch)
    if u.shape != v.shape:
        raise ValueError(
            f"teacher must have hidden states {tuple(v.shape)} as the model, got {tuple(u.shape)}"
        )
    if teacher is model and torch.equal(u, v.detach()):
        raise ValueError("model must have dropout: two passes of it agree, which says nothing of its units")
    with torch.autocast(v.device.type, enabled=False):
        log_v, log_u = (F.log_softmax(wide(x) / temperature, dim=-1) for x in (v, u))
        apart = (log_v.exp() * (log_v - log_u)).sum(-1)  # (n, L)
        return (apart * batch["attention_mask"]).sum() * temperature**2 / len(v)


@widened
def integration_loss(
    anchor: Float[Tensor, "n d"],
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"] | None = None,
    *,
    temperature: float = 0.05,
) -> Float[Tensor, ""]:
    """Return the contrast of two views of texts with each other and with what was known before, equation 1.

    Parameters
    ----------
    anchor, positive : Tensor of shape (n, d)
        Two views of the same texts, row by row; n at least 2.
    negative : Tensor of shape (n, d), optional
        What earlier knowledge alone says of them; without it the usual contrast within a batch.
    temperature : float, default=0.05
        By which cosines are divided, greater than 0.

    Returns
    -------
    Tensor
        A scalar of the dtype of ``anchor``.

    Raises
    ------
    ValueError
        If shapes differ, there are fewer than 2 rows, or ``temperature`` is not positive.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Section 3.3, contrastive loss.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import integration_loss
    >>> x = torch.eye(2)
    >>> integration_loss(x, x, temperature=1.0)  # -log of e / (e + 1)
    tensor(0.3133)
    >>> integration_loss(x, x, x, temperature=1.0)  # log 2 more
    tensor(1.0064)
    """
    at_least("temperature", temperature, 0, strict=True)
    n, d = has_shape("anchor", floating("anchor", anchor), (None, None)).shape
    if n < 2 or not d:
        raise ValueError(f"anchor must have at least 2 rows to contrast, and columns, got shape {(n, d)}")
    against = [has_shape("positive", floating("positive", positive), (n, d), "anchor")]
    if negative is not None:
        against.append(has_shape("negative", floating("negative", negative), (n, d), "anchor"))
    a, others = unit_rows(anchor), unit_rows(torch.cat(against).to(anchor))
    return F.cross_entropy(a @ others.T / temperature, torch.arange(n, device=a.device))


def token_batch(batch: Any, device: torch.device | None = None) -> dict[str, Any]:
    """Return a batch with its mask, if it is one; tensors of inference mode are copied, all are moved to a device."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids, got {list(batch) if isinstance(batch, Mapping) else type(batch).__name__}")  # fmt: skip
    found = {
        name: (x.clone() if x.is_inference() else x).to(device) if isinstance(x, Tensor) else x
        for name, x in batch.items()
    }
    ids = found["input_ids"]
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers, got {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}")  # fmt: skip
    has_shape("input_ids", ids, (None, None))
    if not ids.numel():
        raise ValueError(f"input_ids must have a token, got shape {tuple(ids.shape)}")
    mask = found.get("attention_mask")
    if mask is None:
        found["attention_mask"] = torch.ones_like(ids)
    elif not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    else:
        has_shape("attention_mask", mask, tuple(ids.shape), "input_ids")
    return found


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (n, L, vocabulary)."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = (
        model(input_ids=ids, attention_mask=mask).logits if _of_transformers(model) else _pair(model(ids, mask))[0]
    )  # fmt: skip
    if not isinstance(out, Tensor) or out.ndim != 3 or out.shape[:2] != ids.shape:
        raise ValueError(
            f"model must return logits (n, L, vocabulary), got {getattr(out, 'shape', type(out))}"
        )
    return out


def last_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "n L h"]:
    """Return the last hidden states, without the work of the head where the model can leave it out."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if _of_transformers(model):
        body: Any = getattr(model, "base_model", model)
        out = body(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.hidden_states[-1]
    else:
        hidden = _pair(model(ids, mask))[1]
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
        raise ValueError(
            f"model must return hidden states (n, L, h), got {getattr(hidden, 'shape', type(hidden))}"
        )
    return hidden


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Put a model into train mode, batch normalisation excepted, and afterwards back into what it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield
    finally:
        for module, training in modes:
            module.training = training


def _of_transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "model_type")


def _pair(out: Any) -> tuple[Any, Any]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise ValueError(f"model must return (logits, last_hidden), got {type(out).__name__}")
    return out[0], out[1]
