"""The losses and their gradients, the measures and the spectral embedding, on two samples."""

import numpy as np
import torch

from posterity.fairness import (
    FairSpectralClustering,
    cluster_balance,
    cluster_group_entropy,
    consensus_contrastive_loss,
    fair_assignment_loss,
    soft_assignment,
    structure_preservation_loss,
)

AGAINST = (
    "the paper's formulas in numpy, sums over pairs written out, with gradients by complex steps, and scipy's null "
    "space for fair spectral clustering"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("two", "three"):
        z, centers, together, reference = (
            torch.tensor(stored[f"{case}_{name}"]) for name in ("z", "centers", "together", "reference")
        )
        groups = torch.tensor(stored[f"{case}_groups"])
        z.requires_grad_()
        q = soft_assignment(z, centers)
        yield f"{case} groups, shares", q, stored[f"{case}_q"], 1e-12
        for order in (1, 2):
            value = consensus_contrastive_loss(z, together, temperature=2.0, order=order)
            yield (
                f"{case} groups, consensus loss of order {order}",
                value,
                stored[f"{case}_con{order}"],
                1e-11,
            )
        for name, value in (
            ("con", consensus_contrastive_loss(z, together)),
            ("fair", fair_assignment_loss(q, groups)),
            ("struct", structure_preservation_loss(q, reference, groups)),
        ):
            if name != "con":
                yield f"{case} groups, {name}", value, stored[f"{case}_{name}"], 1e-10
            gradient = torch.autograd.grad(value, z, retain_graph=True)[0]
            yield f"{case} groups, gradient of {name}", gradient, stored[f"{case}_{name}_grad"], 1e-9
        labels = stored[f"{case}_labels"]
        yield (
            f"{case} groups, balance",
            cluster_balance(labels, groups.numpy()),
            stored[f"{case}_balance"],
            1e-13,
        )
        yield (
            f"{case} groups, entropy", cluster_group_entropy(labels, groups.numpy()), stored[f"{case}_entropy"], 1e-13,
        )  # fmt: skip
        model = FairSpectralClustering(3, n_neighbors=4, random_state=0)
        H = model.fit(stored[f"{case}_X"], sensitive_features=groups.numpy()).embedding_
        yield (
            f"{case} groups, projection on the embedding",
            np.abs(H @ H.T),
            stored[f"{case}_projection"],
            1e-8,
        )
