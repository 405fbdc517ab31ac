"""Few-shot classification: episodes, prototypes by cosine, and accuracy over many tasks at once."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import class_indices, floating, has_shape, integer
from posterity._models import at_rest
from posterity._precision import unit_rows, wide, widened
from posterity._random import draw_device

__all__ = ["Episode", "FewShotScore", "evaluate_few_shot", "prototype_scores", "sample_episode"]

AT_ONCE = 512  # samples embedded, and tasks scored


class Episode(NamedTuple):
    """A task: which samples are shown with labels, and which are to be classified.

    Attributes
    ----------
    support : Tensor of shape (n_way * k_shot,)
        Indices, class after class.
    query : Tensor of shape (n_way * n_query,)
        Indices, class after class; none is in the support.
    classes : Tensor of shape (n_way,)
        Labels of the classes, in that order.
    """

    support: Tensor
    query: Tensor
    classes: Tensor


class FewShotScore(NamedTuple):
    """Accuracy over tasks.

    Attributes
    ----------
    accuracy, interval : float
        Mean over tasks, and 1.96 standard errors of it.
    per_task : Tensor of shape (n_tasks,)
    """

    accuracy: float
    interval: float
    per_task: Tensor


def sample_episode(
    labels: Int[Tensor, " n"], *, n_way: int = 5, k_shot: int = 1, n_query: int = 15,
    generator: torch.Generator | None = None,
) -> Episode:  # fmt: skip
    """Draw a task: some classes, and different samples of each to show and to ask for.

    Parameters
    ----------
    labels : Tensor of shape (n,)
        Classes of the samples.
    n_way, k_shot, n_query : int, default=5, 1, 15
        Classes, and samples of each.
    generator : torch.Generator, optional
        Decides classes and samples.

    Returns
    -------
    Episode
        On the device of the labels.

    Raises
    ------
    ValueError
        If there are fewer classes, or a class has too few samples.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import sample_episode
    >>> episode = sample_episode(torch.arange(60) % 6, n_way=3, k_shot=2, n_query=4)
    >>> episode.support.shape, episode.query.shape
    (torch.Size([6]), torch.Size([12]))
    """
    return _drawn(_members(labels, n_way, k_shot, n_query), n_way, k_shot, n_query, generator)


@widened
def prototype_scores(
    query: Float[Tensor, "q dim"], support: Float[Tensor, "s dim"], labels: Int[Tensor, " s"]
) -> Float[Tensor, "q classes"]:
    """Return cosines of queries with the mean direction of each class.

    Parameters
    ----------
    query, support : Tensor of shape (n_query, dim), (n_support, dim)
        Embeddings, of any length.
    labels : Tensor of shape (n_support,)
        Classes of the support, any integers.

    Returns
    -------
    Tensor of shape (n_query, n_classes)
        Classes in sorted order; differentiable.

    Raises
    ------
    ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import prototype_scores
    >>> prototype_scores(torch.eye(2), torch.eye(2), torch.tensor([1, 0])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    has_shape("query", floating("query", query), (None, None))
    has_shape("support", floating("support", support), (None, query.shape[1]), "query")
    class_indices("labels", labels, len(support))
    if len(support) == 0:
        raise ValueError("support must have at least one row, got none")
    classes, place = labels.unique(return_inverse=True)
    sums = query.new_zeros(len(classes), query.shape[1]).index_add(
        0, place, unit_rows(support).to(query.dtype)
    )
    return unit_rows(query) @ F.normalize(sums, dim=1).T  # of a class of n the mean is the sum over n


@torch.no_grad()
def evaluate_few_shot(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, labels: Int[Tensor, " n"], *, n_way: int = 5,
    k_shot: int = 1, n_query: int = 15, n_tasks: int = 600, adapt: bool | Callable[[Any, Tensor, Tensor], Any] = False,
    generator: torch.Generator | None = None,
) -> FewShotScore:  # fmt: skip
    """Return the accuracy of nearest prototypes over many tasks.

    Parameters
    ----------
    model : PsCo, or callable
        With ``embed(x, role="support" or "query")``; or ``model(x) -> (n, dim)``, as any network is, for both.
    x : Tensor of shape (n, ...)
        Samples, of classes that training did not see.
    labels : Tensor of shape (n,)
        Classes of the samples.
    n_way, k_shot, n_query : int, default=5, 1, 15
        As for `sample_episode`.
    n_tasks : int, default=600
        Over which accuracy is a mean.
    adapt : bool or callable, default=False
        Whether a copy of the model is adapted to each task, by its ``adapt(support, labels)``, or by
        ``adapt(model, support, labels) -> model``.
    generator : torch.Generator, optional
        Decides the tasks.

    Returns
    -------
    FewShotScore
        Accuracy, its interval, and the accuracy of each task.

    Raises
    ------
    ValueError
        If there are too few classes, or samples of a class, or embeddings do not fit.

    Notes
    -----
    Departs from the official code: without ``adapt`` each sample is embedded once for all tasks, in
    the role of support and of query where a model tells them apart.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import evaluate_few_shot
    >>> labels = torch.arange(200) % 10
    >>> evaluate_few_shot(torch.nn.Identity(), torch.eye(10)[labels], labels, n_query=5, n_tasks=50).accuracy
    1.0
    """
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise ValueError(
            f"x must be a tensor of samples, got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        )
    integer("n_tasks", n_tasks, 1)
    class_indices("labels", labels, len(x))
    members = _members(labels, n_way, k_shot, n_query)
    episodes = [_drawn(members, n_way, k_shot, n_query, generator) for _ in range(n_tasks)]
    truth = torch.arange(n_way, device=x.device).repeat_interleave(n_query)
    if adapt:
        shown = torch.arange(n_way, device=x.device).repeat_interleave(k_shot)
        change = adapt if callable(adapt) else (lambda model, support, labels: model.adapt(support, labels))
        found = []
        for episode in episodes:
            own = change(model, x[episode.support], shown)
            scores = prototype_scores(
                _embedded(own, x[episode.query], "query"),
                _embedded(own, x[episode.support], "support"),
                shown,
            )
            found.append((scores.argmax(1) == truth).double().mean())
        per_task = torch.stack(found)
    else:
        roles = ("support", "query") if _by_role(model) else ("either",)
        parts = [unit_rows(_embedded(model, x, role)) for role in roles]
        support, query = parts[0], parts[-1]
        per_task = torch.cat([
            _accuracies(support, query, episodes[k : k + AT_ONCE], n_way, truth) for k in range(0, n_tasks, AT_ONCE)
        ])  # fmt: skip
    spread = float(per_task.std()) / math.sqrt(n_tasks) if n_tasks > 1 else math.nan
    return FewShotScore(float(per_task.mean()), 1.96 * spread, per_task.cpu())


def _accuracies(support: Tensor, query: Tensor, episodes: list[Episode], n_way: int, truth: Tensor) -> Tensor:
    """Return the accuracy on each task, from embeddings of norm 1 of all samples."""
    shown, asked = (
        torch.stack([getattr(e, side) for e in episodes]).to(support.device) for side in ("support", "query")
    )
    prototypes = F.normalize(support[shown].unflatten(1, (n_way, -1)).mean(2), dim=2)
    return ((query[asked] @ prototypes.mT).argmax(2) == truth).double().mean(1)


def _embedded(model: Any, x: Tensor, role: str) -> Tensor:
    embed = _by_role(model)
    with at_rest(model):
        out = torch.cat([embed(part, role=role) if embed else model(part) for part in x.split(AT_ONCE)])
    if out.ndim != 2 or len(out) != len(x):
        raise ValueError(f"model must return embeddings of shape ({len(x)}, dim), got {tuple(out.shape)}")
    return wide(out)


def _by_role(model: Any) -> Any:
    """Return a model's ``embed(x, role=...)``; None where it has none, or what has the name is something else."""
    embed: Any = getattr(model, "embed", None)
    try:
        return embed if "role" in inspect.signature(getattr(embed, "forward", embed)).parameters else None
    except (TypeError, ValueError):  # not callable, or without a signature
        return None


def _members(labels: Tensor, n_way: int, k_shot: int, n_query: int) -> list[tuple[Tensor, Tensor]]:
    """Return each class with the places of its samples."""
    class_indices("labels", labels, len(labels))
    integer("n_way", n_way, 1)
    integer("k_shot", k_shot, 1)
    integer("n_query", n_query, 1)
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < n_way:
        raise ValueError(f"labels must have at least n_way={n_way} classes, got {len(classes)}")
    few = (counts < k_shot + n_query).nonzero()[:, 0]
    if len(few):
        raise ValueError(
            f"labels must have at least {k_shot + n_query} samples of every class, class {int(classes[few[0]])} has "
            f"{int(counts[few[0]])}"
        )
    return [(c, (labels == c).nonzero()[:, 0]) for c in classes]


def _drawn(
    members: list[tuple[Tensor, Tensor]],
    n_way: int,
    k_shot: int,
    n_query: int,
    generator: torch.Generator | None,
) -> Episode:
    device = members[0][1].device
    where = draw_device(generator, device)

    def order(n: int) -> Tensor:
        return torch.randperm(n, generator=generator, device=where).to(device)

    chosen = [members[k] for k in order(len(members))[:n_way].tolist()]
    picked = [places[order(len(places))[: k_shot + n_query]] for _, places in chosen]
    support, query = (torch.cat([p[part] for p in picked]) for part in (slice(k_shot), slice(k_shot, None)))
    return Episode(support, query, torch.stack([c for c, _ in chosen]))
