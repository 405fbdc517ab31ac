"""Race the Bayes count with a loop over edges and nodes, and blocks of graphs with one at a time.

Run from the repository root: ``python -m benchmarks.graphs.semantic_robustness``.
"""

import math

import torch

from benchmarks.timing import race
from posterity.claims.graphs.semantic_robustness import _Predict, _train
from posterity.graphs import CSBM, attack_candidates, bayes_robustness, model_robustness


def naive(csbm, x, edge_index, y, node, candidates):
    """Add edges one at a time; each time multiply the probabilities of all pairs of the node."""
    label = int(y[node])
    near = set(edge_index[1][edge_index[0] == node].tolist())
    sides = []
    for c in (0, 1):
        gap = x[node].double() - (2 * c - 1) * csbm.mean
        sides.append(float(-(gap @ gap) / (2 * csbm.sigma**2)))
    for count in range(len(candidates) + 1):
        total = list(sides)
        for other in range(len(y)):
            if other != node:
                for c in (0, 1):
                    share = csbm.p if y[other] == c else csbm.q
                    total[c] += math.log(share if other in near else 1 - share)
        if (total[1] > total[0]) != bool(label):
            return count - 1
        near.add(int(candidates[count]) if count < len(candidates) else -1)
    return len(candidates)


def main() -> None:
    csbm = CSBM(1000)
    generator = torch.Generator().manual_seed(0)
    graph = csbm.sample(generator)
    nodes = [csbm.sample_node(graph, generator) for _ in range(100)]
    cases = [
        (csbm, g.x, g.edge_index, g.y, 1000, attack_candidates(g.x, g.y, g.edge_index, 1000)) for g in nodes
    ]
    assert [naive(*case) for case in cases[:10]] == [bayes_robustness(*case) for case in cases[:10]]
    race("Bayes counts of 100 nodes, n = 1,000, against loops over edges and nodes",
         lambda: [bayes_robustness(*case) for case in cases], lambda: [naive(*case) for case in cases],
         target=1000, rounds=1)  # fmt: skip
    predict = _Predict(_train(graph, 400, 200, seed=0))
    counted = [
        (model_robustness(predict, x, edges, 1000, int(y[1000]), candidates, 200), k)
        for k, (_, x, edges, y, _, candidates) in enumerate(cases)
    ]
    robust = [cases[k] for _, k in sorted(counted)[-5:]]

    def counts(classify) -> list[int]:
        return [
            model_robustness(classify, x, edges, 1000, int(y[1000]), candidates, 200)
            for _, x, edges, y, _, candidates in robust
        ]

    race("counts of a 2-layer GCN in blocks, five robust nodes, against one graph at a time",
         lambda: counts(predict), lambda: counts(lambda x, edges: predict(x, edges)), target=3, rounds=5)  # fmt: skip


if __name__ == "__main__":
    main()
