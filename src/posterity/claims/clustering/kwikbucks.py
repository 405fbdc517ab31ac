"""Claims about KwikBucks: at the same number of expensive questions, a cheap signal gives far better clusters."""

from typing import Annotated, Any

import numpy as np
from numpy import ndarray

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.clustering import (
    EmbeddingSignal,
    correlation_clustering_cost,
    kwik_cluster,
    kwikbucks,
    pairwise_f1,
)
from posterity.lab.data import Labelled, load_labelled
from posterity.lab.data.needs import require_rest
from posterity.lab.metrics import rank_correlation

Size = Annotated[int, Between(20)]


def _few(data: Any, n_pivots: int, n: int = 800, **_: Any) -> None:
    """Refuse fewer items than candidates for pivots."""
    items = min(n, len(data.y))
    require_rest(items, "n_pivots", n_pivots, 1, "items")


def _items(data: str, target: str | None, n: int, seed: int) -> tuple[ndarray, ndarray]:
    """Return centred rows, n drawn at random, and which of them are of one class."""
    examples = load_labelled(data, target=target)
    rows = np.random.default_rng(seed).permutation(len(examples.y))[:n]
    x = examples.x[rows].reshape(len(rows), -1).astype(float)
    y = examples.y[rows]
    return x - x.mean(0), y[:, None] == y


def _projected(x: ndarray, dim: int, rng: np.random.Generator) -> EmbeddingSignal:
    return EmbeddingSignal(x @ rng.normal(size=(x.shape[1], dim)))


@comparison(
    paper="kwikbucks",
    says="At the same number of expensive questions, ranking by the cheap signal gives far better clusters than asking without it.",
    where="Silwal et al., Section 5 and Table 1",
    arms=("KwikCluster, strong only", "random order", "KwikBucks"),
    metric="F1 of pairs that are joined",
    better="higher",
    smallest={"n": 100, "n_pivots": 20},
    check=_few,
)
def same_budget(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n: Size = 800,
    questions: Positive = 4.0,
    dim: Count = 8,
    n_pivots: Count = 60,
) -> dict[str, float]:
    """Cluster items of known classes with ``questions`` questions an item about whether two are of one class.

    The cheap signal is the cosine of a random projection of the centred features to ``dim``
    dimensions. In "random order" the same algorithm asks about pivots in an order drawn at
    random, without votes of neighbours. All of the budget goes to pivots and assignment: nothing is merged.
    """
    x, together = _items(data, target, n, trial.seed)
    rng = np.random.default_rng(trial.seed)
    signal, blind = _projected(x, dim, rng), rng.random(together.shape)
    shared: dict[str, Any] = {"n_pivots": n_pivots, "merge": False, "random_state": trial.seed}
    unled = {"boost_neighbors": False, "order_points": False}
    found = {}
    for each in (questions / 4, questions / 2, questions):
        budget = round(each * len(x))
        found = {
            "KwikCluster, strong only": kwik_cluster(
                together, len(x), budget=budget, random_state=trial.seed
            ),
            "random order": kwikbucks(blind, together, budget=budget, **shared, **unled),
            "KwikBucks": kwikbucks(signal, together, budget=budget, **shared),
        }
        for arm, result in found.items():
            trial.track(f"{arm}: F1 over questions an item", each, pairwise_f1(result.labels, together))
    for arm, result in found.items():
        trial.record(f"wrong pairs, {arm}", correlation_clustering_cost(result.labels, together))
        trial.record(f"questions, {arm}", result.n_queries)
    return {arm: pairwise_f1(result.labels, together) for arm, result in found.items()}


@trend(
    paper="kwikbucks",
    says="The better the cheap signal, the fewer expensive questions are needed for the same clusters.",
    where="Silwal et al., Section 5",
    metric="rank correlation of dimensions of the signal with questions needed for an F1 of 0.9",
    high=-0.8,
    smallest={"n": 200, "n_pivots": 40, "draws": 1},
    check=_few,
)
def better_signal(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n: Size = 800,
    dims: list[Count] = [2, 4, 8, 16, 32],  # noqa: B006
    n_pivots: Count = 60,
    draws: Count = 5,
) -> float:
    """Find the smallest budget that reaches an F1 of 0.9, to a hundredth of itself, by halving.

    For each number of dimensions it is the mean over ``draws`` projections. What asking about
    every pivot does not reach counts as that many questions.
    """
    x, together = _items(data, target, n, trial.seed)
    rng = np.random.default_rng(trial.seed)
    needed = []
    for dim in dims:
        budgets = []
        for _ in range(draws):
            signal = _projected(x, dim, rng)

            def good(budget: int, signal: EmbeddingSignal = signal) -> bool:
                found = kwikbucks(
                    signal, together, budget=budget, n_pivots=n_pivots, merge=False, random_state=trial.seed
                )
                return pairwise_f1(found.labels, together) >= 0.9

            low, high = 0, len(x) * n_pivots
            while high - low > max(1, high // 100):
                middle = (low + high) // 2
                low, high = (low, middle) if good(middle) else (middle, high)
            budgets.append(high)
        needed.append(float(np.mean(budgets)))
        trial.track("questions needed, by dimensions", dim, needed[-1])
    return rank_correlation(dims, needed)
