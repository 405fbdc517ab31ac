"""Clusters, pivots and numbers of questions for twelve settings of one problem of 60 items."""

from posterity.clustering import kwikbucks

AGAINST = "the algorithm as the paper writes it, in plain loops, one question at a time"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for k, (budget, max_neighbors, batch_size) in enumerate(stored["settings"].tolist()):
        result = kwikbucks(
            stored["weak"], stored["strong"], budget=budget, pivots=stored["candidates"], max_neighbors=max_neighbors,
            batch_size=batch_size, boost_weight=0.5, n_boost_neighbors=5, merge=False,
        )  # fmt: skip
        yield f"labels, {budget} questions", result.labels, stored["labels"][k], 0
        yield f"questions, {budget} questions", result.n_queries, stored["asked"][k], 0
        yield f"pivots, {budget} questions", result.pivots, stored["pivots"][k][: len(result.pivots)], 0
