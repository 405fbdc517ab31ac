"""Kernel and scores of three classes, of positive data, of nearly equal and opposite rows, and of twins with a jitter."""

from posterity.labels import cg_scores, relu_ntk_gram

AGAINST = "the definition, removal of one example after the other, in arithmetic of 50 digits"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("three", "binary", "close", "twins"):
        X, y, jitter = stored[f"{case}_x"], stored[f"{case}_y"], 1e-3 if case == "twins" else 0.0
        yield f"{case}, kernel", relu_ntk_gram(X, jitter=jitter), stored[f"{case}_gram"], 1e-15
        scores, theirs = cg_scores(X, y, ratio=None, jitter=jitter), stored[f"{case}_scores"]
        # two rows 1e-6 apart have scores of 1e6, to nine digits
        yield f"{case}, scores over the largest", scores / theirs.max(), theirs / theirs.max(), 1e-9
        if case != "close":
            yield f"{case}, scores", scores, theirs, 1e-9
