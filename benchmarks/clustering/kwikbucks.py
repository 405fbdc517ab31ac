"""KwikBucks against per-item loops over dictionaries, and its own work on 20,000 items.

Run from the repository root: ``python -m benchmarks.clustering.kwikbucks``.
"""

import time

import numpy as np

from benchmarks.timing import race
from posterity.clustering import EmbeddingSignal, kwikbucks


def looped(features, kind, budget, candidates, weight=0.1, k=10, depth=100, size=100):
    """Return each item's pivot by loops over items, a dense similarity and full sorts, without merging."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    weak, asked = unit @ unit.T, 0
    pivots, joins, voted = [candidates[0]], {}, {}
    rank = {v: np.argsort(-weak[v]) for v in range(len(weak))}

    def first(item, score):
        nonlocal asked
        for pivot in sorted(score, key=score.get, reverse=True)[:depth]:
            if asked == budget:
                return None
            asked += 1
            if kind[item] == kind[pivot]:
                return pivot
        return None

    for item in candidates[1:]:
        pivot = first(item, {p: weak[item, p] for p in pivots})
        if pivot is None:
            pivots.append(item)
        else:
            joins[item] = pivot
    drawn = set(candidates)
    rest = [v for v in range(len(weak)) if v not in drawn]
    rest.sort(key=lambda v: -max(weak[v, c] for c in candidates))
    for start in range(0, len(rest), size):
        before = dict(voted)
        for v in rest[start : start + size]:
            near = [u for u in rank[v][: k + 1] if u != v]
            score = {p: weak[v, p] + weight * sum(before.get(u) == p for u in near) for p in pivots}
            pivot = first(v, score)
            if pivot is not None:
                joins[v] = voted[v] = pivot
    return joins


def heaps(n, n_kinds, d=64):
    rng = np.random.default_rng(0)
    kind = rng.integers(n_kinds, size=n)
    return (rng.normal(size=(n_kinds, d))[kind] + rng.normal(size=(n, d))).astype(np.float32), kind


def main() -> None:
    features, kind = heaps(3_000, 100)
    candidates = np.random.default_rng(1).permutation(3_000)[:200].tolist()
    race("3,000 items, 200 candidates, without merging, against loops over dictionaries",
         lambda: kwikbucks(EmbeddingSignal(features), lambda p: kind[p[:, 0]] == kind[p[:, 1]], budget=100_000,
                           pivots=candidates, merge=False),
         lambda: looped(features, kind, 100_000, candidates), target=10, rounds=3)  # fmt: skip
    features, kind = heaps(20_000, 200)
    start = time.perf_counter()
    result = kwikbucks(EmbeddingSignal(features), lambda p: kind[p[:, 0]] == kind[p[:, 1]], budget=200_000,
                       n_pivots=200, random_state=0)  # fmt: skip
    print(f"20,000 items, 200 candidates, {result.n_queries + result.n_merge_queries} questions: "
          f"{time.perf_counter() - start:.1f} s (target at most 5)")  # fmt: skip


if __name__ == "__main__":
    main()
