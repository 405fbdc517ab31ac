"""Continual domain-adaptive pre-training with soft masks (DAS): one language model, one corpus after another.

Which units of the model hold what it knows is read from gradients in virtual scales on their outputs
(`unit_importance`): before the first corpus by a proxy for general knowledge (`proxy_loss`), after each corpus by the
pre-training loss on it. A later step moves what belongs to unit i by

    (1 - I_i) * step,     I = elementwise maximum of all earlier importances,                                  (1)

while the forward pass uses every unit; and a contrast (`integration_loss`) between what the full model says of a text
and what the units that were important before say alone makes room for what is new.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from posterity._checks import at_least, integer, scalar
from posterity._models import evaluating
from posterity._precision import NARROW, wide
from posterity._random import seed_from, seeded
from posterity.transfer.integration import (
    dropping,
    integration_loss,
    last_hidden,
    outputs,
    proxy_loss,
    token_batch,
)
from posterity.transfer.soft_masks import (
    importance_of_parameters,
    merge_importance,
    normalize_importance,
    unit_importance,
)
from posterity.transfer.token_masks import NOT_SCORED, hidden_tokens, in_vocabulary
from posterity.transfer.transformer_units import find_units, unit_scales

__all__ = ["ContinualPretrainer"]

MASKED = 0.15  # of all tokens, by masked language modelling
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
Batch = Mapping[str, Tensor]


class ContinualPretrainer:
    """A language model that is pre-trained on one domain after another, and keeps what it knew before.

    Parameters
    ----------
    model : nn.Module
        Trained in place, in float32 or float64: BERT, RoBERTa, DistilBERT or GPT-2 of transformers with a head that
        returns logits, or a module ``(input_ids, attention_mask) -> (logits, last_hidden)`` with layers that
        `find_units` knows. It must have dropout, from which general knowledge is read.
    objective : {"mlm", "causal"} or callable, default="mlm"
        The pre-training loss: of hidden tokens, of next tokens, or ``objective(model, batch) -> scalar``.
    kinds : sequence of {"heads", "intermediate", "output"}
        Which units are weighed; () trains without masks.
    lr : float, default=1e-4
        Of the default optimizer, AdamW, greater than 0.
    weight_decay : float, default=0.0
        Of the default optimizer, decoupled, at least 0.
    contrast : float, default=1.0
        Weight of `integration_loss`, at least 0, where it is left out.
    temperature : float, default=0.05
        Of `integration_loss`, greater than 0.
    importance_batches : int, default=100
        Batches that importance is read from, at least 1.
    optimizer : callable, optional
        ``optimizer(parameters) -> torch.optim.Optimizer``, in the place of AdamW, with its own rates; a new one for
        each domain.
    mask_token_id : int, optional
        Needed for "mlm".
    generator : torch.Generator, optional
        Chooses hidden tokens, and seeds dropout and what ``objective`` draws; by default a new one, seeded by torch's.
    device : str or torch.device, default="cpu"
        Where to train.

    Attributes
    ----------
    units : list of Units
    domain_importances_ : list of dict
        Normalised importance: of general knowledge first, then of each domain that was closed.
    importance_ : dict of str to Tensor
        Their elementwise maximum, by which steps are masked; empty before the first step.
    n_domains_ : int
        Domains that were closed.

    Raises
    ------
    ValueError
        If an argument is out of range, or model or batches do not fit; if the loss stops being finite.

    Notes
    -----
    1. The mask multiplies the step, not the gradient: Adam divides gradients by their size, in which a factor that
       stays the same cancels. For SGD without momentum both are the same; momentum and weight decay do not move a
       unit of importance 1.
    2. Special tokens are those that the model's config names and that ``special_tokens_mask`` of a batch marks;
       padding is where ``attention_mask`` is 0. Neither is hidden or scored.

    References
    ----------
    .. [1] Ke et al. Continual Pre-training of Language Models. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import ContinualPretrainer
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words = torch.nn.Embedding(20, 8)
    ...         self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ...     def forward(self, input_ids, attention_mask):
    ...         hidden = self.layer(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
    ...         return hidden @ self.words.weight.T, hidden
    ...
    >>> trainer = ContinualPretrainer(Model(), mask_token_id=0, generator=torch.Generator().manual_seed(0))
    >>> for low in (1, 10):  # two domains, of words that differ
    ...     batches = [{"input_ids": torch.randint(low, low + 9, (4, 6))} for _ in range(3)]
    ...     losses = trainer.fit_domain(batches, n_steps=5)
    ...
    >>> trainer.n_domains_, len(losses), len(trainer.domain_importances_)  # general knowledge first
    (2, 5, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Literal["mlm", "causal"] | Callable = "mlm",
        kinds: Sequence[str] = ("heads", "intermediate", "output"),
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        contrast: float = 1.0,
        temperature: float = 0.05,
        importance_batches: int = 100,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        mask_token_id: int | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch module, got {type(model).__name__}")
        if not callable(objective) and objective not in ("mlm", "causal"):
            raise ValueError(f"objective must be 'mlm', 'causal' or callable, got {objective!r}")
        self.lr = at_least("lr", lr, 0, strict=True)
        self.weight_decay = at_least("weight_decay", weight_decay, 0)
        self.contrast = at_least("contrast", contrast, 0)
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.importance_batches = integer("importance_batches", importance_batches, 1)
        if optimizer is not None and not callable(optimizer):
            raise ValueError(f"optimizer must be callable, got {type(optimizer).__name__}")
        if mask_token_id is not None:
            integer("mask_token_id", mask_token_id, 0)
        elif objective == "mlm":
            raise ValueError("mask_token_id must be given for objective 'mlm', got None")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if narrow := sorted({str(p.dtype) for p in model.parameters() if p.dtype in NARROW}):
            raise ValueError(
                f"model must be in float32 or float64, got {', '.join(narrow)}: use autocast around fit_domain"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model must have parameters that require a gradient, got none")
        empty = isinstance(kinds, Sequence) and not isinstance(kinds, str) and not len(kinds)
        self.units = [] if empty else find_units(model, kinds)
        self.objective, self.mask_token_id = objective, mask_token_id
        self.device = torch.device(device)
        self.model = model.to(self.device)
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.domain_importances_: list[dict[str, Tensor]] = []
        self.n_domains_ = 0
        self._make = optimizer
        self._optimizer: Optimizer | None = None  # of the domain that is open
        self._masks: list[tuple[nn.Parameter, Tensor]] = []
        self._before: list[Tensor] = []
        self._task: Any = None
        self._recent: deque[dict] = deque(maxlen=self.importance_batches)
        self._vocabulary = 0

    @property
    def importance_(self) -> dict[str, Tensor]:
        """The elementwise maximum of all importances so far."""
        return merge_importance(*self.domain_importances_) if self.domain_importances_ else {}

    @torch.inference_mode(False)  # grad mode too
    def fit_domain(
        self, batches: Iterable[Batch], *, n_steps: int, importance_data: Iterable[Batch] | None = None
    ) -> list[float]:
        """Train on a domain, from its beginning to its end, and read what became important.

        Parameters
        ----------
        batches : iterable of mapping
            With ``input_ids`` (n, L) and, where there is padding, ``attention_mask``; started anew whenever it ends.
            Of an iterator, which cannot be, as many are kept as are needed.
        n_steps : int
            At least 1.
        importance_data : iterable of mapping, optional
            What importance is read from; ``batches`` if None.

        Returns
        -------
        list of float
            The pre-training loss of each step, without the contrast.
        """
        n_steps = integer("n_steps", n_steps, 1)
        batches = self._again("batches", batches, max(n_steps, self.importance_batches))
        source = batches
        if importance_data is not None:
            source = self._again("importance_data", importance_data, self.importance_batches)
        self._check(next(iter(source)))
        if self._optimizer is not None:
            self._close(self._recent)
        self._open(source)
        losses: list[float] = []
        while len(losses) < n_steps:
            before = len(losses)
            for batch in islice(batches, n_steps - len(losses)):
                losses.append(self._step(self._check(batch)))
            if len(losses) == before:
                raise ValueError(f"batches must be started anew after {before} steps: pass a list")
        self._close(source)
        return losses

    @torch.inference_mode(False)  # grad mode too
    def observe(self, x: Batch | Int[Tensor, "n L"], y: Tensor | None = None, task: Any = None) -> float:
        """Make one step inside a domain; a task other than before closes the domain before.

        Parameters
        ----------
        x : mapping or Tensor of shape (n, L)
            A batch, or its ``input_ids``.
        y : Tensor of shape (n, L), optional
            The ``attention_mask`` where ``x`` is a tensor.
        task : Any
            What names the domain, compared by ``==``; None goes on with the one that is open.

        Returns
        -------
        float
            The pre-training loss, without the contrast.

        Notes
        -----
        1. General knowledge is read from the first batch, with other dropout each time; a domain from the last
           ``importance_batches``.
        """
        batch = self._check(x if isinstance(x, Mapping) else {"input_ids": x, "attention_mask": y})
        if self._optimizer is not None and task is not None and self._task is not None and task != self._task:
            self._close(self._recent)
        if self._optimizer is None:
            self._open([batch] * self.importance_batches)
        self._task = self._task if task is None else task
        self._recent.append({name: x.cpu() if isinstance(x, Tensor) else x for name, x in batch.items()})
        return self._step(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that changes, with which another trainer of the same arguments goes on to the bit.

        Returns
        -------
        dict
            Tensors, numbers and lists: it can be saved by ``torch.save``.
        """
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "domain_importances": self.domain_importances_,
                "n_domains": self.n_domains_,
                "task": self._task,
                "recent": list(self._recent),
            }
        )

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Parameters
        ----------
        state : dict
            What `state_dict` of a trainer with the same arguments returned.
        """
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            raise ValueError("state must be what state_dict of a ContinualPretrainer returned")
        state = copy.deepcopy(state)
        for each in state["domain_importances"]:
            if self.units:
                importance_of_parameters(self.units, each)
        self.model.load_state_dict(state["model"])
        self.domain_importances_, self.n_domains_ = state["domain_importances"], state["n_domains"]
        self._optimizer, self._task = None, state["task"]
        self._recent = deque(state["recent"], maxlen=self.importance_batches)
        if state["optimizer"] is not None:
            self._begin()
            assert self._optimizer is not None
            self._optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def _again(self, name: str, batches: Any, most: int) -> Iterable[Batch]:
        """Return batches that can be gone through again, at least one."""
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor | str):
            raise ValueError(f"{name} must be an iterable of batches, got {type(batches).__name__}")
        if iter(batches) is batches:
            batches = list(islice(batches, most))
        if next(iter(batches), None) is None:
            raise ValueError(f"{name} must give at least one batch, got none")
        return batches

    def _check(self, batch: Any) -> dict[str, Any]:
        """Return a batch on the device, if the model can take it."""
        batch = token_batch(batch, self.device)
        if not self._vocabulary:
            none = torch.zeros_like(batch["input_ids"][:1, :1])
            one = {"input_ids": none, "attention_mask": none + 1}
            with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(self.model):
                self._vocabulary = outputs(self.model, one).shape[-1]
        in_vocabulary("input_ids", batch["input_ids"], self._vocabulary)
        if self.objective == "mlm" and int(self.mask_token_id or 0) >= self._vocabulary:
            raise ValueError(f"mask_token_id must be in 0..{self._vocabulary - 1}, got {self.mask_token_id}")
        if self.contrast and self.units and len(batch["input_ids"]) < 2:
            raise ValueError("batches must have at least 2 rows for the contrast, got 1: set contrast=0")
        return batch

    def _open(self, source: Iterable[Batch]) -> None:
        """Read general knowledge before the first domain, and begin with an optimizer of its own."""
        if self.units and not self.domain_importances_:
            self.domain_importances_.append(self._importance(source, proxy_loss))
        self._begin()

    def _begin(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        made: Any = self._make(trained) if self._make is not None else None
        if self._make is None:
            made = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        if not isinstance(made, Optimizer):
            raise ValueError(f"optimizer must return a torch.optim.Optimizer, got {type(made).__name__}")
        self._optimizer = made
        masks = importance_of_parameters(self.units, self.importance_) if self.units else []
        self._masks = [(p, mask) for p, mask in masks if p.requires_grad]
        self._before = [torch.empty_like(p, requires_grad=False) for p, _ in self._masks]

    def _close(self, source: Iterable[Batch]) -> None:
        """End a domain: what it made important is read from the pre-training loss on it."""
        if self.units:
            with evaluating(self.model):
                self.domain_importances_.append(self._importance(source, self._loss))
        self.n_domains_ += 1
        self._optimizer, self._task = None, None
        self._recent.clear()

    def _importance(
        self, source: Iterable[Batch], loss: Callable[[nn.Module, Any], Tensor]
    ) -> dict[str, Tensor]:
        batches = (self._check(batch) for batch in islice(source, self.importance_batches))

        def drawn(model: nn.Module, batch: dict) -> Tensor:
            with self._draws():
                return loss(model, batch)

        return normalize_importance(unit_importance(self.model, self.units, batches, drawn))

    def _step(self, batch: dict[str, Any]) -> float:
        """Make a masked step and return the pre-training loss."""
        assert self._optimizer is not None
        with dropping(self.model), self._draws():
            loss = self._loss(self.model, batch)
            total = loss
            if self.contrast and self.units:
                total = loss + self.contrast * self._contrast(batch)
        if not math.isfinite(float(total.detach())):
            raise ValueError(f"the loss is {float(total.detach())}: lr must be lower, got {self.lr}")
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        with torch.no_grad():
            if self._masks:
                torch._foreach_copy_(self._before, [p for p, _ in self._masks])  # type: ignore[attr-defined]
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            for (p, mask), old in zip(self._masks, self._before, strict=True):
                p.lerp_(old, mask)  # exact at 0 and at 1
        return float(loss.detach())

    def _loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the pre-training loss."""
        if callable(self.objective):
            value = scalar("objective", self.objective(model, batch))
            if not value.requires_grad:
                raise ValueError(f"objective must return a scalar with a gradient, got {value!r}")
            return value
        ids, seen = batch["input_ids"], batch["attention_mask"] != 0
        if self.objective == "causal":
            if ids.shape[1] < 2:
                raise ValueError(f"input_ids must have at least 2 tokens a row, got {ids.shape[1]}")
            logits = outputs(model, batch)[:, :-1]
            labels = ids[:, 1:].masked_fill(~(seen[:, 1:] & seen[:, :-1]), NOT_SCORED)
        else:
            assert self.mask_token_id is not None
            config = getattr(model, "config", None)
            special = [s for name in SPECIAL if isinstance(s := getattr(config, name, None), int)]
            hidden = seen & ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
            if isinstance(marked := batch.get("special_tokens_mask"), Tensor):
                hidden = hidden & (marked == 0)
            inputs, labels = hidden_tokens(ids, hidden, self.mask_token_id, self._vocabulary, MASKED, self.generator)  # fmt: skip
            logits = outputs(model, {**batch, "input_ids": inputs})
        rows = labels != NOT_SCORED
        if not bool(rows.any()):
            raise ValueError("input_ids must have tokens to predict that are no padding, got none")
        with torch.autocast(logits.device.type, enabled=False):
            return F.cross_entropy(wide(logits[rows]), labels[rows].long())

    def _contrast(self, batch: dict[str, Any]) -> Tensor:
        """Return the contrast of the full model with what earlier knowledge says alone, on texts as they are."""
        anchor, positive = (_pooled(last_hidden(self.model, batch), batch["attention_mask"]) for _ in "ap")
        with unit_scales(self.units, self.importance_):
            negative = _pooled(last_hidden(self.model, batch), batch["attention_mask"])
        return integration_loss(anchor, positive, negative, temperature=self.temperature)

    def _draws(self) -> AbstractContextManager[None]:
        """Let dropout, which takes no generator, follow ours, and leave torch's own state as it was."""
        return seeded(seed_from(self.generator), self.device)


def _pooled(hidden: Float[Tensor, "n L h"], mask: Tensor) -> Float[Tensor, "n h"]:
    """Return the mean hidden state of each text, over tokens that are no padding."""
    weight = (mask != 0).to(wide(hidden).dtype)[:, :, None]
    return (wide(hidden) * weight).sum(1) / weight.sum(1).clamp_min(1)
