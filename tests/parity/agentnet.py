"""The logarithmic aggregation, and logits of the network on two graphs whose nodes have one way out each."""

import torch

from posterity.graphs import AgentNet, log_aggregate

AGAINST = (
    "the authors' code (github.com/KarolisMart/AgentNet) for the aggregation, "
    "and of plain NumPy loops for the network"
)


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    values, index = torch.tensor(stored["values"]), torch.tensor(stored["index"])
    yield "aggregation", log_aggregate(values, index, 7), stored["gathered"], 1e-9
    net = AgentNet(3, 4, 2, num_agents=3, num_steps=4, edge_dim=2, self_loops=False, mlp_width=1)
    own, names = net.double().eval().state_dict(), stored["names"]
    weights = torch.tensor(stored["weights"]).split([own[name].numel() for name in names])
    net.load_state_dict({name: v.view_as(own[name]) for name, v in zip(names, weights, strict=True)})
    inputs = [torch.tensor(stored[name]) for name in ("x", "edge_index", "batch", "edge_attr", "start")]
    logits, trace = net(*inputs[:4], start=inputs[4], return_trace=True)
    yield "positions", trace.positions, stored["positions"], 0
    yield "logits", logits, stored["logits"], 1e-6
