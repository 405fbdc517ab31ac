"""Losses, gradients and pooled embeddings of stored features, and the contrast of all pairs."""

import torch

from posterity.optimization import (
    DictionaryContrastiveLoss,
    SupervisedContrastiveLoss,
    dictionary_logits,
    pool_labels,
)

AGAINST = "loops in numpy over samples, positions and classes, written from the paper's equations, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    words, y = torch.tensor(stored["words"]), torch.tensor(stored["y"])
    yield "pooled embeddings", pool_labels(words, 8), stored["pooled 8"], 1e-14
    yield "stretched embeddings", pool_labels(words, 20), stored["pooled 20"], 1e-14
    for name, options in (("maps", {}), ("maps, normalised", {"normalize": True, "temperature": 0.07}), ("vectors", {"n_patches": 4})):  # fmt: skip
        x = torch.tensor(stored["x of " + name.split(",")[0]]).requires_grad_()
        logits = dictionary_logits(x, words, **options)
        yield f"logits of {name}", logits.detach(), stored[f"logits of {name}"], 1e-12
        loss = DictionaryContrastiveLoss(**options)(x, y, words)
        yield f"loss of {name}", loss.detach(), stored[f"loss of {name}"], 1e-12
    rival = SupervisedContrastiveLoss(0.1)(torch.tensor(stored["x of vectors"]), y)
    yield "contrast of all pairs", rival, stored["rival"], 1e-12
