"""A graph-convolutional encoder: normalised sums over neighbours, batch normalisation, PReLU.

    X <- PReLU( BatchNorm( D^(-1/2) (A + I) D^(-1/2) X W + b ) )                        (1)

It maps any graph with the same features, also one whose nodes training has not seen.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer, within
from posterity.graphs._graph import check_edges
from posterity.graphs._sparse import gcn_adjacency, sparse_product
from posterity.graphs.graph_views import _SparseFeatures

__all__ = ["GCNEncoder"]


class GCNEncoder(nn.Module):
    """Graph convolutions, each with batch normalisation and a PReLU.

    Parameters
    ----------
    in_channels : int
        Features of a node.
    hidden_channels : int, default=256
        Width between layers.
    out_channels : int, default=128
        Width of embeddings.
    num_layers : int, default=2
        Layers.
    norm_momentum : float, default=0.99
        Of the running statistics, as torch means it: near 1 they are those of the last batch.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int = 256, out_channels: int = 128, *, num_layers: int = 2,
        norm_momentum: float = 0.99,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("in_channels", in_channels), ("hidden_channels", hidden_channels),
                            ("out_channels", out_channels), ("num_layers", num_layers)):  # fmt: skip
            integer(name, value, 1)
        within("norm_momentum", norm_momentum, 0, 1)
        self.in_channels = in_channels
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(a, b)) for a, b in pairs)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(b)) for _, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b, momentum=norm_momentum) for _, b in pairs)
        self.acts = nn.ModuleList(nn.PReLU() for _ in pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight, bias, norm, act in zip(self.weights, self.biases, self.norms, self.acts, strict=True):
            nn.init.xavier_uniform_(weight)
            nn.init.zeros_(bias)
            norm.reset_parameters()  # type: ignore[operator]
            nn.init.constant_(act.weight, 0.25)  # type: ignore[arg-type]

    def forward(
        self, x: "Float[Tensor, 'nodes features'] | _SparseFeatures", edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes out"]:
        """Return embeddings.

        Parameters
        ----------
        x : Tensor
            Features.
        edge_index : Tensor
            Row 0 sends, row 1 receives.

        Returns
        -------
        Tensor
        """
        if not isinstance(x, _SparseFeatures):
            has_shape("x", floating("x", x), (None, self.in_channels), "this network")
        adjacency = gcn_adjacency(check_edges(edge_index, len(x)), len(x), x.dtype)
        states: Any = x
        for weight, bias, norm, act in zip(self.weights, self.biases, self.norms, self.acts, strict=True):
            sparse = isinstance(states, _SparseFeatures)
            states = states.times(weight) if sparse else states @ weight
            states = act(norm(sparse_product(adjacency, states) + bias))
        return states
