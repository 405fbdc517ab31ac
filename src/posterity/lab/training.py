"""The training loop: minibatches or steps, early stopping, checkpoints, devices, precision."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import needs, one_of
from posterity.lab.data.functions import FunctionData, Tasks
from posterity.lab.metrics import node_score
from posterity.lab.nets import seeded

__all__ = ["History", "fit", "fit_functions", "fit_nodes", "per_target"]


@dataclass
class History:
    """What a training run went through.

    Attributes
    ----------
    losses : list of float
        Mean training loss of each epoch.
    validation : list of float
        What ``validate`` returned after each epoch.
    best_epoch : int
        Epoch whose weights the network now has, from 0.
    n_steps : int
        Optimiser steps taken.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = -1
    n_steps: int = 0


def fit(
    net: nn.Module,
    loss: Callable[..., Tensor],
    data: Sequence[Tensor],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam",
    schedule: str = "constant",
    clip: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "32-true",
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    callback: Callable[[int, float], None] | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Train a network in place on tensors of equal first dimension.

    Parameters
    ----------
    net : nn.Module
    loss : callable
        ``loss(net, *batch) -> scalar``; a torch loss is ``lambda net, x, y: criterion(net(x), y)``.
    data : sequence of Tensor
        Each (n, ...); rows are drawn together.
    epochs, steps : int
        How long: exactly one of them. An epoch is one pass in a fresh random order.
    batch_size : int, default=64
    lr, weight_decay : float
    optimizer : {"adam", "adamw", "sgd", "radam"} or callable, default="adam"
        A callable gets ``(parameters, lr=, weight_decay=)``.
    schedule : {"constant", "cosine"}, default="constant"
        Cosine falls to 0 over the whole run.
    clip : float, optional
        Largest gradient norm.
    seed : int, default=0
        Decides batches and dropout; torch's global state is left as it was.
    device, precision : str
        As Lightning Fabric names them; other than ``"cpu"`` and ``"32-true"`` need the
        extra ``scale``.
    validate : callable, optional
        ``validate(net) -> float``, lower is better, after each epoch; the best weights are
        restored at the end.
    patience : int, optional
        Stop after so many epochs without a better one.
    callback : callable, optional
        ``callback(step, loss)`` after each step: progress.
    checkpoint : str or Path, optional
        A file written after each epoch; if it exists the run resumes from it.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If the arguments do not fit, or the loss stops being finite.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"exactly one of epochs and steps must be given, got {epochs} and {steps}")
    n = len(data[0])
    if n == 0 or any(len(part) != n for part in data):
        raise ValueError(f"data must have equal, positive lengths, got {[len(part) for part in data]}")
    if patience is not None and validate is None:
        raise ValueError("patience needs validate")
    one_of("schedule", schedule, ("constant", "cosine"))
    batch_size = min(batch_size, n)
    per_epoch = -(-n // batch_size)
    total = steps if steps is not None else per_epoch * (epochs or 0)
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "radam": torch.optim.RAdam,
    }
    make = kinds[one_of("optimizer", optimizer, tuple(kinds))] if isinstance(optimizer, str) else optimizer
    opt = make([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(total, 1)) if schedule == "cosine" else None

    fabric = None
    model: Any = net
    if device != "cpu" or precision != "32-true":
        fabric = needs("lightning_fabric", "scale").Fabric(
            accelerator=device.split(":")[0],
            devices=[int(device.split(":")[1])] if ":" in device else 1,
            precision=precision,
        )
        fabric.launch()
        model, opt = fabric.setup(net, opt)
        data = [part.to(fabric.device) for part in data]

    history, best, bad = History(), None, 0
    order = torch.Generator().manual_seed(seed)
    start = 0
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["net"])
        opt.load_state_dict(saved["opt"])
        order.set_state(saved["order"])
        history = History(**saved["history"])
        best, bad, start = saved["best"], saved["bad"], saved["epoch"]
        if falling is not None:
            falling.load_state_dict(saved["falling"])
    net.train()
    with seeded(seed + 7919 * (start + 1)):
        for epoch in range(start, -(-total // per_epoch)):
            if patience is not None and bad >= patience:
                break
            torch.manual_seed(
                seed + 7919 * (epoch + 1)
            )  # an epoch's dropout does not depend on where we resumed
            rows = torch.randperm(n, generator=order)
            running, taken = 0.0, 0
            for batch in rows.split(batch_size)[: total - history.n_steps]:
                batch = batch.to(data[0].device)
                value = loss(model, *(part[batch] for part in data))
                opt.zero_grad(set_to_none=True)
                fabric.backward(value) if fabric else value.backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                opt.step()
                if falling is not None:
                    falling.step()
                running, taken = running + float(value.detach()), taken + 1
                history.n_steps += 1
                if callback is not None:
                    callback(history.n_steps, float(value.detach()))
            history.losses.append(running / taken)
            if not torch.isfinite(torch.tensor(running)):
                raise ValueError(f"the loss is {running} after {history.n_steps} steps: lower lr, got {lr}")
            if validate is not None:
                net.eval()
                with torch.no_grad():
                    history.validation.append(float(validate(net)))
                net.train()
                if history.validation[-1] == min(history.validation):
                    history.best_epoch, bad = epoch, 0
                    best = {name: value.detach().clone() for name, value in net.state_dict().items()}
                else:
                    bad += 1
            if path is not None:
                state = {
                    "net": net.state_dict(), "opt": opt.state_dict(), "order": order.get_state(),
                    "history": vars(history), "best": best, "bad": bad, "epoch": epoch + 1,
                    "falling": falling.state_dict() if falling is not None else None,
                }  # fmt: skip
                partial = path.with_suffix(path.suffix + ".part")
                torch.save(state, partial)
                partial.replace(path)
    if best is not None:
        net.load_state_dict(best)
    net.eval()
    return history


def fit_nodes(
    net: nn.Module, train: Any, seed: int, *, epochs: int = 200, lr: float = 1e-2, weight_decay: float = 5e-4,
    optimizer: str = "adam", device: str = "cpu",
) -> float:  # fmt: skip
    """Train a node classifier on full batches and return its best validation score.

    Parameters
    ----------
    net : nn.Module
        ``net(x, edge_index) -> scores``; left with its best validation weights.
    train : tuple
        The graph, its training mask, its validation mask.
    seed, epochs : int
    lr, weight_decay : float
    optimizer, device : str
        As for `fit`.

    Returns
    -------
    float
        As `posterity.lab.metrics.node_score` counts.
    """
    graph, rows, val = train
    inputs = (graph.x[None], graph.edge_index[None], graph.y[None])

    def loss(net: nn.Module, x: Tensor, edges: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x[0], edges[0])[rows], y[0][rows])

    def validate(net: nn.Module) -> float:
        return -node_score(net(graph.x, graph.edge_index), graph.y, val)

    history = fit(net, loss, inputs, epochs=epochs, lr=lr, weight_decay=weight_decay, optimizer=optimizer,
                  seed=seed, device=device, validate=validate)  # fmt: skip
    return -min(history.validation)


def fit_functions(
    model: nn.Module, source: FunctionData, *, steps: int, n_context: tuple[int, int], n_target: int, seed: int,
    loss: Callable[..., Tensor] | None = None, batch_size: int = 16, **options: Any,
) -> None:  # fmt: skip
    """Train a neural process in place: the same tasks, in the same order, for the same seed.

    Parameters
    ----------
    model : nn.Module
    source : FunctionData
    steps : int
    n_context, n_target : tuple of int and int
        As `FunctionData.tasks` takes them.
    seed : int
    loss : callable, optional
        ``loss(model, **arguments)`` in the place of ``model.loss``.
    batch_size : int, default=16
    **options
        Of `fit`: ``lr``, ``schedule``, ``clip``, ``device``.
    """
    tasks = source.tasks(steps * batch_size, n_context=n_context, n_target=n_target, seed=seed)
    names = list(tasks.arguments)

    def value(model: nn.Module, *batch: Tensor) -> Tensor:
        arguments = dict(zip(names, batch, strict=True))
        return model.loss(**arguments) if loss is None else loss(model, **arguments)  # type: ignore[operator]

    fit(
        model, value, list(tasks.arguments.values()), steps=steps, batch_size=batch_size, seed=seed, **options
    )
    model.cpu().eval()


def per_target(log_likelihood: Tensor, tasks: Tasks) -> float:
    """Return the mean log-likelihood a target over the targets of all tasks.

    Parameters
    ----------
    log_likelihood : Tensor of shape (tasks,)
    tasks : Tasks

    Returns
    -------
    float
    """
    return float(log_likelihood.sum() / tasks.target_mask.sum())
