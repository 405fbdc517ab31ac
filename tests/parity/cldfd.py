"""The contrast, and distillation with none, some and all of the target from the old student."""

import torch

from posterity.transfer import CrossLevelDistillation, nt_xent

AGAINST = "the authors' code (github.com/jarucezh/cldfd) in float64, its distillation on four small maps"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    z1, z2 = torch.tensor(stored["z"])
    for temperature in (1.0, 0.3):
        yield "NT-Xent", nt_xent(z1, z2, temperature=temperature), stored[f"ntxent {temperature}"], 1e-12
    student, teacher, old = (
        [torch.tensor(stored[f"{name} {k}"]) for k in range(4)] for name in ("student", "teacher", "old")
    )
    distillation = CrossLevelDistillation([3, 4, 5, 6]).double()
    start = "projection "
    weights = {key.removeprefix(start): torch.tensor(stored[key]) for key in stored if key.startswith(start)}
    distillation.projections.load_state_dict(weights)
    for step in (0, 30, 100):
        loss = distillation(student, teacher, old, momentum=step / 100)
        yield f"distillation, momentum {step / 100}", loss, stored[f"loss {step}"], 1e-12
