"""The protocol of node classification: one way to train, and a depth that validation chooses.

Every network is trained on full batches by AdamW and tested at the step where validation is
best. Of a kind of network the depth with the best mean validation value over splits is
reported, the same depth for every split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import wide
from posterity.graphs._graph import check_edges, check_index, trains
from posterity.graphs.duplicates import _check_masks

__all__ = ["NodeResult", "ProtocolResult", "fit_node_classifier", "run_protocol"]


@dataclass(frozen=True)
class NodeResult:
    """How a trained node classifier does.

    Attributes
    ----------
    metric : {"roc_auc", "accuracy"}
        For two classes, and for more.
    val : float
        Its best value on validation nodes.
    test : float
        Its value on test nodes at that step.
    best_step : int
        The first step with this value, from 1.
    """

    metric: str
    val: float
    test: float
    best_step: int


@trains
def fit_node_classifier(
    model: nn.Module,
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    y: Int[Tensor, " nodes"],
    train_mask: Bool[Tensor, " nodes"],
    val_mask: Bool[Tensor, " nodes"],
    test_mask: Bool[Tensor, " nodes"],
    *,
    lr: float = 3e-5,
    weight_decay: float = 0.0,
    num_steps: int = 1000,
    warmup_steps: int = 0,
    eval_every: int = 1,
) -> NodeResult:
    """Train a network on one split by AdamW, full batches, and test it where validation is best.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(x, edge_index)``; returns (nodes, 1) for two classes, which are
        ranked, else (nodes, classes). It is trained in float32 at least, and left in eval
        mode with the weights of the best step. Its dropout draws from torch's global generator.
    x : Tensor of shape (nodes, features)
        Features.
    edge_index : Tensor of shape (2, edges)
        Edges.
    y : Tensor of shape (nodes,)
        Labels from 0.
    train_mask, val_mask, test_mask : Tensor of shape (nodes,)
        Disjoint parts, none empty.
    lr : float, default=3e-5
        Learning rate, positive.
    weight_decay : float, default=0.0
        Of weights; biases and normalisations are spared.
    num_steps : int, default=1000
        Steps.
    warmup_steps : int, default=0
        Steps over which the learning rate grows linearly.
    eval_every : int, default=1
        Steps between evaluations; the last step is always evaluated.

    Returns
    -------
    NodeResult
        Area under the ROC curve for two classes, else accuracy.

    Raises
    ------
    ValueError
        If an argument does not fit, masks overlap or are empty, for two classes a part has
        only one, the network was made under ``torch.inference_mode``, or its outputs stop
        being finite.
    """
    edge_index, y = _check_task(x, edge_index, y, train_mask, val_mask, test_mask)
    at_least("lr", lr, 0, strict=True)
    at_least("weight_decay", weight_decay, 0)
    for name, value, low in (("num_steps", num_steps, 1), ("warmup_steps", warmup_steps, 0), ("eval_every", eval_every, 1)):  # fmt: skip
        integer(name, value, low)
    classes = int(y.max()) + 1
    binary = classes <= 2
    learn = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learn if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learn if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / (warmup_steps + 1)))
    train_y = y[train_mask]
    result = NodeResult("roc_auc" if binary else "accuracy", -1.0, -1.0, 0)
    state: dict[str, Tensor] = {}
    for step in range(1, num_steps + 1):
        model.train()
        scores = model(x, edge_index)
        if step == 1:
            wanted = 1 if binary else max(classes, scores.shape[-1])
            has_shape("model(x, edge_index)", scores, (len(x), wanted), f"{classes} classes")
        if binary:
            told = wide(scores[train_mask, 0])  # under autocast scores are narrow
            loss = F.binary_cross_entropy_with_logits(told, train_y.to(told.dtype))
        else:
            loss = F.cross_entropy(wide(scores[train_mask]), train_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        if step % eval_every and step != num_steps:
            continue
        model.eval()
        with torch.no_grad():
            scores = model(x, edge_index)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"model(x, edge_index) must be finite, got NaN or infinity after {step} steps, lr {lr}"
            )
        val = _value(scores[val_mask], y[val_mask])
        if val > result.val:
            result = NodeResult(result.metric, val, _value(scores[test_mask], y[test_mask]), step)
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return result


@dataclass(frozen=True)
class ProtocolResult:
    """How a kind of network does over splits, its depth chosen by validation.

    Attributes
    ----------
    best_num_layers : int
        The depth of the best mean validation value; of equal ones the first.
    mean, std : float
        Of the test values at this depth; std with ddof 1, NaN for one split.
    values : Tensor of shape (splits,)
        The test values at this depth.
    val_means : dict of int to float
        The mean validation value of each depth.
    """

    best_num_layers: int
    mean: float
    std: float
    values: Tensor
    val_means: dict[int, float]


@torch.inference_mode(False)  # so that networks are made to be trained
@torch.enable_grad()
def run_protocol(
    make_model: Callable[[int], nn.Module],
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    y: Int[Tensor, " nodes"],
    train_masks: Bool[Tensor, "splits nodes"],
    val_masks: Bool[Tensor, "splits nodes"],
    test_masks: Bool[Tensor, "splits nodes"],
    *,
    num_layers: Sequence[int] = (1, 2, 3, 4, 5),
    **fit: Any,
) -> ProtocolResult:
    """Train a network of each depth on each split; report the depth that validates best.

    Parameters
    ----------
    make_model : callable
        ``make_model(num_layers)`` returns a fresh network, called once a depth and split.
    x, edge_index, y
        As for `fit_node_classifier`.
    train_masks, val_masks, test_masks : Tensor of shape (splits, nodes)
        The parts of each split.
    num_layers : sequence of int, default=(1, 2, 3, 4, 5)
        Depths.
    **fit
        Options of `fit_node_classifier`.

    Returns
    -------
    ProtocolResult
        Test values at one depth for all splits.

    Raises
    ------
    ValueError
        As for `fit_node_classifier`, with the number of the split.
    """
    has_shape("train_masks", train_masks, (None, len(y)), "y")
    for name, masks in (("val_masks", val_masks), ("test_masks", test_masks)):
        has_shape(name, masks, train_masks.shape, "train_masks")
    if not len(num_layers) or not len(train_masks):
        raise ValueError(
            f"num_layers and train_masks must hold a depth and a split, got {len(num_layers)} and {len(train_masks)}"
        )
    splits = list(zip(train_masks, val_masks, test_masks, strict=True))
    for k, parts in enumerate(splits):
        _check_task(x, edge_index, y, *parts, where=f"s of split {k}")
    results = {
        depth: [fit_node_classifier(make_model(depth), x, edge_index, y, *parts, **fit) for parts in splits]
        for depth in num_layers
    }
    val_means = {depth: float(np.mean([r.val for r in found])) for depth, found in results.items()}
    best = max(val_means, key=lambda depth: val_means[depth])
    values = torch.tensor([r.test for r in results[best]], dtype=torch.float64)
    std = float(values.std()) if len(values) > 1 else float("nan")
    return ProtocolResult(best, float(values.mean()), std, values, val_means)


def _value(scores: Tensor, y: Tensor) -> float:
    """Return accuracy, or for one column of scores the area under the ROC curve by ranks."""
    if scores.shape[1] > 1:
        return float((scores.argmax(1) == y).double().mean())
    _, place, count = torch.unique(scores[:, 0], return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place].double()  # ties share their mean rank
    positive = int(y.sum())
    wins = float(rank[y == 1].sum()) - positive * (positive + 1) / 2
    return wins / (positive * (len(y) - positive))


def _check_task(
    x: Any, edge_index: Any, y: Any, train: Tensor, val: Tensor, test: Tensor, where: str = ""
) -> tuple[Tensor, Tensor]:
    """Return edges and labels; ``where`` ends the names of masks."""
    has_shape("x", floating("x", x), (None, None))
    edge_index = check_edges(edge_index, len(x), source="x", read=True)
    y = check_index("y", y, (len(x),), source="the nodes", read=True)
    _check_masks({"train_mask": train, "val_mask": val, "test_mask": test}, (len(x),), where)
    if int(y.max()) <= 1:
        for name, mask in (("val_mask", val), ("test_mask", test)):
            if len(y[mask].unique()) < 2:
                raise ValueError(f"{name}{where} must hold both classes for the ROC curve, got one")
    return edge_index, y
