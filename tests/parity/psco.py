"""Assignments, both parts of the loss, its gradient and the queue after it, and prototype scores."""

import torch

from posterity.representation import PsCoLoss, prototype_scores, sinkhorn_assign

AGAINST = "POT's Sinkhorn at convergence, and loops over images in numpy with differences for the gradient, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    t = {name: torch.tensor(value) for name, value in stored.items()}
    yield "assignments", sinkhorn_assign(t["cosines"], epsilon=0.2, n_iter=500), t["plan"], 1e-10
    for case in ("few", "many"):
        n_shots, temperature, meta_temperature, meta_weight = t[f"{case} options"].tolist()
        query, key = t[f"{case} query"].requires_grad_(), t[f"{case} key"]
        loss = PsCoLoss(
            query.shape[1], queue_size=len(t[f"{case} queue"]), n_shots=int(n_shots), temperature=temperature,
            meta_temperature=meta_temperature, meta_weight=meta_weight,
        ).double()  # fmt: skip
        loss.load_state_dict({"queue": t[f"{case} queue"], "pointer": t[f"{case} start"]})
        terms = loss.terms(query, key)
        yield f"{case} shots: contrast", terms.moco, t[f"{case} moco"], 1e-12
        yield f"{case} shots: pseudo task", terms.meta, t[f"{case} meta"], 1e-12
        (gradient,) = torch.autograd.grad(loss(query, key), query)
        yield f"{case} shots: gradient", gradient, t[f"{case} gradient"], 1e-8
        yield f"{case} shots: queue", loss.queue, t[f"{case} entered"], 1e-14
    yield "prototypes", prototype_scores(t["asked"], t["support"], t["labels"]), t["scores"], 1e-14
