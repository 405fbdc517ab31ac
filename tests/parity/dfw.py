"""Rounds of all four kinds, of tasks with unequal rows, and what they come to; distances of subspaces."""

import torch

from posterity.representation import dfw, dfw_step, subspace_distance

AGAINST = (
    "loops over tasks with scipy.linalg.lstsq, scipy.linalg.qr and scipy.linalg.subspace_angles, in float64"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    phi, x, y = (torch.tensor(stored[name]) for name in ("phi", "x", "y"))
    for debias in (True, False):
        for whiten in (True, False):
            case = f"{'split' if debias else 'all rows'}, {'whitened' if whiten else 'gradient'}"
            key = f"{int(debias)}{int(whiten)}"
            found = dfw_step(phi, x, y, lr=0.1, split=0.4, debias=debias, whiten=whiten)
            yield f"{case}: representation", found.phi, stored[f"phi_{key}"], 1e-10
            yield f"{case}: heads", found.weights, stored[f"heads_{key}"], 1e-10
    sizes = stored["sizes"].tolist()
    parts = [[v[k, :n] for k, n in enumerate(sizes)] for v in (x, y)]
    for partition in ("fixed", "blocks"):
        run = dfw(
            *parts,
            len(phi),
            init=phi,
            partition=partition,
            max_iter=25,
            tol=0,
            gap=3 * (partition == "blocks"),
        )
        yield f"{partition}, 25 rounds: representation", run.phi, stored[f"phi_{partition}"], 1e-8
        yield f"{partition}, 25 rounds: heads", run.weights, stored[f"heads_{partition}"], 1e-8
    for k, (a, b) in enumerate(zip(stored["a"], stored["b"], strict=True)):
        yield f"distance {k}", subspace_distance(torch.tensor(a), torch.tensor(b)), stored["sines"][k], 1e-12
