"""Seven networks by their published parameter names, homophily, and the duplicates of directed Chameleon."""

import numpy as np
import torch

from posterity.graphs import (
    HeterophilyGNN,
    adjusted_homophily,
    edge_homophily,
    find_duplicate_nodes,
    label_informativeness,
    minesweeper,
    node_homophily,
    remove_duplicate_nodes,
)

AGAINST = (
    "the authors' code and figures (github.com/yandex-research/heterophilous-graphs, on DGL 1.1.3), "
    "and for homophily and duplicates of brute force"
)
MEASURES = (edge_homophily, node_homophily, adjusted_homophily, label_informativeness)


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, edge_index, labels = (torch.tensor(stored[name]) for name in ("x", "edge_index", "labels"))
    edge_index, labels = edge_index.long(), labels.long()
    for model in ("ResNet", "GCN", "SAGE", "GAT", "GAT-sep", "GT", "GT-sep"):
        net = HeterophilyGNN(
            6, 8, 3, model=model, num_layers=2, hidden_multiplier=1.5, num_heads=4, norm="layer"
        ).eval()
        own, names = net.state_dict(), stored[f"{model} names"]
        values = torch.tensor(stored[f"{model} weights"]).split([own[name].numel() for name in names])
        net.load_state_dict({name: v.view_as(own[name]) for name, v in zip(names, values, strict=True)})
        yield model, net(x, edge_index), stored[f"{model} output"], 2e-5

    once = edge_index[:, edge_index[0] < edge_index[1]]
    for name, edges in {"listed": edge_index, "doubled": edge_index.repeat(1, 2), "once": once}.items():
        yield f"homophily, edges {name}", [of(edges, labels) for of in MEASURES], stored["measures"], 1e-6
    board = minesweeper(100, 100).edge_index
    mines = torch.tensor(np.unpackbits(stored["mines"])).long()
    ours = [round(of(board, mines), 2) for of in MEASURES if of is not node_homophily]
    yield "homophily of Minesweeper, two digits", ours, stored["published"], 0

    edges, y = (torch.tensor(stored[f"chameleon_{name}"]).long() for name in ("edges", "labels"))
    yield "groups", find_duplicate_nodes(edges, len(y), y=y, direction="out"), stored["groups"], 0
    kept, left = remove_duplicate_nodes(edges, len(y), y=y, direction="out")
    yield "nodes kept", kept, stored["kept"], 0
    yield "edges left", left.shape[1], stored["n_edges_left"], 0
