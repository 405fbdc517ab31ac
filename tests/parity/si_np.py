"""Self-normalised weights and baselines with a learned proposal, a sharp likelihood and the prior."""

import torch

from posterity.uncertainty import self_normalized_weights

AGAINST = "the weights and baselines of the authors' code (github.com/hhq123gogogo/SI_NPs)"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("learned", "sharp", "prior"):
        logs = (
            torch.tensor(stored[f"{case}_{name}"]) for name in ("log_likelihood", "log_prior", "log_proposal")
        )
        weights, baseline = self_normalized_weights(*logs)
        yield f"{case} weights", weights, stored[f"{case}_weights"], 1e-9
        yield f"{case} baseline", baseline, stored[f"{case}_baseline"], 1e-9
