"""The kernel of stored sentences, the bound at stored settings, and neighbours with ties."""

import torch

from posterity.dynamics import equipartition_kernel, nearest_neighbor_accuracy, success_bound

AGAINST = "counts over all 2,520 partitions of eight words one by one, the bound as the authors' program gives it to seven digits, and a loop over neighbours"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, y = torch.tensor(stored["x"]), torch.tensor(stored["y"])
    count = equipartition_kernel(x, y, n_words=8, n_concepts=4, normalize=False)
    yield "partitions that make sentences alike", count, stored["count"], 0.0
    found = [
        success_bound(*map(int, setting[:4]), ell=int(setting[4])).coefficient
        for setting in stored["settings"]
    ]
    yield "the bound", torch.tensor(found), stored["bounds"], 1e-7
    accuracy = nearest_neighbor_accuracy(
        torch.tensor(stored["similarity"]), torch.tensor(stored["y_train"]), torch.tensor(stored["y_test"])
    )
    yield "accuracy of neighbours", accuracy, stored["accuracy"], 1e-12
