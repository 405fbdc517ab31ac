"""Probabilities of violation at 35 pairs of ranks, and the choice of thresholds on three samples."""

from posterity.fairness import fair_thresholds, violation_probability

AGAINST = (
    "adaptive quadrature, and of the threshold search of the authors' code (github.com/lphLeo/FaiREE) "
    "given exact probabilities"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    ours = [
        violation_probability(*map(int, ranks), float(alpha))
        for ranks, alpha in zip(stored["ranks_and_sizes"], stored["alpha"], strict=True)
    ]
    yield "probabilities", ours, stored["probability"], 1e-6
    yield "probability at the top ranks", violation_probability(35, 35, 35, 35, 0.1), stored["top"], 1e-6
    for case in range(3):
        sample = [stored[f"{name}{case}"] for name in ("scores", "y", "groups")]
        alpha, delta = map(float, stored[f"limits{case}"])
        chosen = fair_thresholds(*sample, alpha=alpha, delta=delta, constraint="equal_opportunity")
        yield f"case {case} ranks", chosen.ranks, stored[f"ranks{case}"], 0
        yield f"case {case} thresholds", chosen.thresholds, stored[f"thresholds{case}"], 1e-9
        yield f"case {case} error", chosen.error, stored[f"error{case}"], 1e-9
        yield f"case {case} probability", chosen.probability, stored[f"probability{case}"], 1e-6
