"""Propagation with labels, with priors and with both, confidences far below rounding, graphs, and votes of two and three classes."""

from posterity.labels import (
    absorption_weights,
    aggregate_votes,
    distance_graph,
    prior_confidence,
    propagate,
    smooth_prior,
    vote_graph,
)

AGAINST = (
    "scikit-learn 1.9.1 (LabelPropagation) where confidence is 0, and else of loops and inverses in 50 digits"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    W, prior, known = stored["graph"], stored["prior"], (stored["labels"], stored["labeled"])
    yield "no confidence", propagate(W, prior, *known, confidence=0.0), stored["harmonic"], 1e-9
    for case in ("some", "tiny"):
        kappa = stored[f"{case}_confidence"]
        yield f"{case} confidence", propagate(W, prior, *known, confidence=kappa), stored[case], 1e-12
        alone = propagate(W, prior, [], [], confidence=kappa)
        yield f"{case} confidence, no label", alone, stored[f"{case}_alone"], 1e-12
    weights = absorption_weights(W, stored["labeled"], confidence=stored["some_confidence"])
    for name, ours in zip(("label", "prior"), weights, strict=True):
        yield f"weights of each {name}", ours, stored[f"{name}_weights"], 1e-12
    smoothed = smooth_prior(W, prior)
    yield "smoothed prior", smoothed, stored["smoothed"], 1e-12
    for kind in ("quadratic", "step"):
        kappa = prior_confidence(smoothed, W, stored["labeled"], n_hops=1, kind=kind, threshold=0.55)
        theirs = stored[f"{kind}_confidence"]
        yield f"{kind} confidence over the largest", kappa / theirs.max(), theirs / theirs.max(), 1e-9
    yield "graph of points", distance_graph(stored["points"], 6.5).toarray(), stored["near"], 0
    for c in (2, 3):
        votes = stored[f"votes{c}"]
        yield f"{c} classes, EM", aggregate_votes(votes, c), stored[f"em{c}"], 1e-10
        yield (
            f"{c} classes, majority",
            aggregate_votes(votes, c, method="majority"),
            stored[f"majority{c}"],
            1e-15,
        )
        yield f"{c} classes, graph of votes", vote_graph(votes).toarray(), stored[f"alike{c}"], 0
