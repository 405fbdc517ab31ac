"""Predictions and gradients of three sizes of network under the norm loss, and the anchors of points and goals."""

import torch

from posterity.transfer import BilinearPredictor, select_anchors

AGAINST = "the authors' code (github.com/avivne/bilinear-transduction): BilinearPolicy and both transducers, in float64"
NAMES = {"anchor_net": "obs_trunk", "delta_net": "delta_trunk"}


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("deep", "shallow", "linear"):
        d, out, width, n_embed, depth = stored[f"{case}_sizes"].tolist()
        model = BilinearPredictor(d, out, n_embed=n_embed, hidden=(width,) * depth).double()
        theirs = {name: name.replace(*next(pair for pair in NAMES.items() if name.startswith(pair[0])))
                  for name, _ in model.named_parameters()}  # fmt: skip
        model.load_state_dict(
            {name: torch.tensor(stored[f"{case}_weight_{their}"]) for name, their in theirs.items()}
        )
        predicted = model(torch.tensor(stored[f"{case}_anchor"]), torch.tensor(stored[f"{case}_delta"]))
        yield f"{case}: predictions", predicted, stored[f"{case}_predicted"], 1e-12
        torch.linalg.vector_norm(predicted, dim=1).mean().backward()
        for name, parameter in model.named_parameters():
            yield f"{case}: gradient of {name}", parameter.grad, stored[f"{case}_grad_{theirs[name]}"], 1e-12
    for name, names in {
        "anchors of points": ("queries", "x_train", "deltas", "anchors"),
        "demonstrations of goals": ("goal_queries", "goals", "goal_deltas", "demos"),
    }.items():
        x, x_train, deltas, found = (torch.tensor(stored[each]) for each in names)
        yield name, select_anchors(x, x_train, deltas)[:, 0], found, 0
