"""The regularised loss with its gradients at two weights, and the best linear representation with a ridge and without."""

import torch

from posterity.representation import ContrastiveRegularizer, linear_contrastive_representation

AGAINST = "pytorch-metric-learning 2.9.0's NT-Xent beside cross-entropy, and SciPy's generalised eigenproblem, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for weight, temperature in ((0.1, 0.5), (1.0, 0.1)):
        z = torch.tensor(stored["z"], requires_grad=True)
        logits = torch.tensor(stored["logits"], requires_grad=True)
        loss = ContrastiveRegularizer(weight, temperature=temperature)
        value = loss(logits, torch.tensor(stored["y"]), *z)
        yield f"loss at {weight}", value, stored[f"value_{weight}"], 1e-12
        gradients = torch.autograd.grad(value, (z, logits))
        yield f"gradient of views at {weight}", gradients[0], stored[f"gradz_{weight}"], 1e-12
        yield f"gradient of logits at {weight}", gradients[1], stored[f"gradl_{weight}"], 1e-12
    views = torch.tensor(stored["views"])
    for ridge in (0.0, 0.1):
        found = linear_contrastive_representation(*views, 4, ridge=ridge)
        yield f"invariance, ridge {ridge}", found.invariance, stored[f"lam_{ridge}"], 1e-11
        yield f"W'W, ridge {ridge}", found.weight.T @ found.weight, stored[f"gram_{ridge}"], 1e-10
        yield f"value, ridge {ridge}", found.loss, stored[f"loss_{ridge}"], 1e-11
