"""Searches on drawn graphs, in three orders and with three settings of the verifier; a chain rule over tokens."""

import torch

from posterity.combinatorial import TokenSubgoals, adaptive_subgoal_search

AGAINST = "a plain search over sorted lists, one state and one walk at a time, and the chain rule with one-hot vectors in float64"


class _Tabulated:
    """A graph with its components, all read from tables."""

    def __init__(self, edges, actions, values, odds):
        self.edges, self.actions, self.values, self.odds = edges, actions, values, odds
        self.n_actions = edges.shape[1]

    def step(self, state, action):
        return int(self.edges[state, action])

    def is_solved(self, state):
        return state == 0

    def policy(self, states, goals):
        chosen = torch.tensor([int(self.actions[s, g]) for s, g in zip(states, goals, strict=True)])
        return torch.nn.functional.one_hot(chosen, self.n_actions).float()

    def value(self, states):
        return torch.tensor([float(self.values[s]) for s in states])

    def verifier(self, states, goals):
        return torch.tensor([float(self.odds[s, g]) for s, g in zip(states, goals, strict=True)])


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in range(len(stored["edges"])):
        graph = _Tabulated(*(stored[name][case] for name in ("edges", "actions", "values", "odds")))
        generators = {
            k: (lambda s, n, at=at, case=case: stored["proposals"][case, at, s, :n].tolist())
            for at, k in enumerate(stored["distances"].tolist())
        }
        for o, order in enumerate(("longest", "best", "mixed")):
            for v, (accept, reject) in enumerate(stored["thresholds"].tolist()):
                found = adaptive_subgoal_search(
                    graph, 5, generators=generators, policy=graph.policy, value=graph.value,
                    verifier=graph.verifier, accept=accept, reject=reject, n_subgoals=2, slack=1, order=order,
                    budget=120,
                )  # fmt: skip
                ours = [
                    found.solved,
                    found.n_expanded,
                    found.n_visited,
                    len(found.actions),
                    *found.distances[:8],
                ]
                ours = torch.tensor([int(x) for x in ours] + [-1] * (12 - len(ours)))
                yield (
                    f"graph {case}, {order}, thresholds {accept:g} and {reject:g}",
                    ours,
                    stored["found"][case, o, v],
                    0,
                )
    net = TokenSubgoals(4, 3, width=5).double()
    net.load_state_dict({name[4:]: torch.tensor(stored[name]) for name in stored if name.startswith("net.")})
    got = net.log_prob(torch.tensor(stored["tokens"]), torch.tensor(stored["targets"]))
    yield "log-probabilities of states", got, stored["log_prob"], 1e-12
