"""Graph networks: permutations, batches of graphs, isolated nodes."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from posterity.testing._agreement import alike, same
from posterity.testing.layer import check_layer

__all__ = ["check_graph_network"]


def check_graph_network(
    network: nn.Module, x: Tensor, edge_index: Tensor, *, level: str = "node", local: bool = True,
    dead: Iterable[str] = (), chooses: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Check a graph layer or network: what `check_layer` checks, and what graphs demand.

    Permuting nodes permutes (or, for ``level="graph"``, keeps) the output; the order of
    edges does not matter; graphs in a batch do not see each other; isolated nodes, no
    edges and a single node work.

    Parameters
    ----------
    network : nn.Module
        Called as ``network(x, edge_index)``, for ``level="graph"`` also with ``batch=``.
    x : Tensor of shape (nodes, features)
    edge_index : Tensor of shape (2, edges)
    level : {"node", "graph"}, default="node"
    local : bool, default=True
        Whether a node sees only what edges lead to; where all nodes of a graph see each
        other, graphs are kept apart by ``batch=``.
    dead : iterable of str
    chooses : bool, default=False
        As for `check_layer`.
    **options
        Of the call.
    """
    check_layer(network, x, edge_index, dead=dead, chooses=chooses, **options)
    network = copy.deepcopy(network).eval()
    n = len(x)
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        out = network(x, edge_index, **options)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        moved = network(x[order], place[edge_index], **options)
        same(moved, out if level == "graph" else out[order], "permuting the nodes", **close)
        shuffle = torch.randperm(edge_index.shape[1], generator=torch.Generator().manual_seed(2))
        same(network(x, edge_index[:, shuffle], **options), out, "the order of the edges matters", **close)
        assert not alike(network(x, edge_index[:, :0], **options), out), "the edges do not matter"

        two = torch.cat([x, x.flip(0)]), torch.cat([edge_index, n - 1 - edge_index + n], 1)
        if level == "graph" or not local:
            options["batch"] = torch.arange(2).repeat_interleave(n)
        both = network(*two, **options)
        options.pop("batch", None)
        alone = torch.cat([out, network(x.flip(0), n - 1 - edge_index, **options)])
        same(both, alone, "graphs of a batch see each other", **close)

        isolated = network(torch.cat([x, x[:1]]), edge_index, **options)
        assert torch.isfinite(isolated).all(), "an isolated node is finite"
        if level == "node" and local:
            same(isolated[:n], out, "an isolated node changes the others", **close)
        for size in (1, 3):
            bare = network(x[:size], edge_index[:, :0], **options)
            assert torch.isfinite(bare).all(), f"{size} nodes without edges are finite"
