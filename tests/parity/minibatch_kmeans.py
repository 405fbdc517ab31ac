"""Centers and progress over twelve batches, with the rate of the paper and that of scikit-learn."""

import numpy as np

from posterity.clustering import kmeans_batch_update

AGAINST = "scikit-learn 1.9.1 (partial_fit), and for the paper's rate of plain loops"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for rate in ("sqrt", "sklearn"):
        centers, counts, steps = stored["centers"], np.zeros(len(stored["centers"])), []
        for batch in stored["batches"]:
            centers, progress = kmeans_batch_update(
                stored["x"][batch],
                centers,
                learning_rate=rate,
                counts=counts if rate == "sklearn" else None,
            )
            steps.append((centers, progress))
        ours, progress = zip(*steps, strict=True)
        yield f"{rate}, centers", ours, stored[f"{rate}_centers"], 1e-9
        yield f"{rate}, progress", progress, stored[f"{rate}_progress"], 1e-9
    yield "points of each cluster", counts, stored["counts"], 1e-9
