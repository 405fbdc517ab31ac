"""Depth, volumes, distance, chances and density of three collections, and the models of twelve batches."""

import numpy as np

from posterity.privacy import TukeyMechanism, tukey_depth
from posterity.privacy.tukey_em import _batch_models

AGAINST = (
    "loops in numpy by definition: each point counted, each pair (k, g) of the test tried, volumes as "
    "products, models by the normal equations"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("one", "two", "odd"):
        models, points = stored[f"{case}_models"], stored[f"{case}_points"]
        yield f"{case}, depth", tukey_depth(points, models), stored[f"{case}_depth"], 0
        for neighbours in ("replace", "add-remove"):
            epsilon, delta = stored[f"{case}_budget"]
            made = TukeyMechanism(
                models, epsilon=float(epsilon), delta=float(delta), neighbors=neighbours, jitter=0.0
            )
            probs, density = (stored[f"{case}_{neighbours}_{name}"] for name in ("probs", "density"))
            yield f"{case}, {neighbours}, chances of depths", np.exp(made.depth_log_probs), probs, 1e-12
            yield f"{case}, {neighbours}, density", np.exp(made.log_density(points)), density, 1e-12
        share = np.exp(made.log_volumes) / stored[f"{case}_volumes"]
        yield f"{case}, volumes over theirs", share, np.ones(len(share)), 1e-10
        yield f"{case}, distance", made.distance, stored[f"{case}_distance"], 0
        yield f"{case}, chance to pass", made.pass_probability, stored[f"{case}_passes"], 1e-12
    yield "models of batches", _batch_models(stored["X"], stored["y"], True)[0], stored["coef"], 1e-9
