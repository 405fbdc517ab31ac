"""The loss and both gradients in four settings, recall at k and mAP@R, and clusters of directions."""

import torch

from posterity.representation import (
    ClusterDiscrimination,
    cluster_labels,
    mean_average_precision_at_r,
    recall_at_k,
)

AGAINST = (
    "loops over samples and classes in numpy with differences for gradients, Lloyd's iteration, in float64; "
    "faiss for recall, pytorch-metric-learning for mAP@R"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    t = {name: torch.tensor(value) for name, value in stored.items()}
    for case in ("all", "parts", "additive", "exact"):
        angular, additive, scale, threshold, exact = t[f"{case}_options"].tolist()
        z, w = t[f"{case}_z"].requires_grad_(), t[f"{case}_w"]
        loss = ClusterDiscrimination(
            w.shape[1], len(w), angular_margin=angular, additive_margin=additive, scale=scale, filter_threshold=threshold,
            margin_gradient="exact" if exact else "straight-through",
        ).double()  # fmt: skip
        loss.weight.data = w
        value = loss(z, t[f"{case}_y"], classes=t[f"{case}_classes"], features=t[f"{case}_features"])
        yield f"{case}: value", value, t[f"{case}_value"], 1e-12
        for name, grad in zip(("z", "w"), torch.autograd.grad(value, (z, loss.weight)), strict=True):
            yield f"{case}: gradient of {name}", grad, t[f"{case}_grad_{name}"], 1e-7
    for k in (1, 5):
        yield f"recall at {k}", recall_at_k(t["x"], t["labels"], k=k), t[f"recall_{k}"], 1e-6
    yield "mAP@R", mean_average_precision_at_r(t["x"], t["labels"]), t["map_r"], 1e-6
    labels, centres = cluster_labels(t["points"], 6, max_iter=100, random_state=3)
    yield "clusters", labels, t["cluster_of"], 0
    yield "centres", centres, t["centres"], 1e-12
