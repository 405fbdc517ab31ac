"""Every layer and network of the domain that maps nodes and edges to nodes, found by its signature."""

import inspect

import pytest
import torch
from torch import nn

import posterity.graphs

SIZES = {"in_channels": 4, "channels": 4, "hidden_channels": 8, "out_channels": 3, "num_layers": 2}


def of_nodes_and_edges(cls):
    """Whether ``forward`` takes (x, edge_index) and nothing else that must be given or that draws."""
    given = list(inspect.signature(cls.forward).parameters.values())[1:]
    names = [parameter.name for parameter in given]
    optional = all(parameter.default is not inspect.Parameter.empty for parameter in given[2:])
    return names[:2] == ["x", "edge_index"] and optional and "generator" not in names


def found():
    every = [getattr(posterity.graphs, name) for name in dir(posterity.graphs)]
    return [
        cls
        for cls in every
        if isinstance(cls, type) and issubclass(cls, nn.Module) and of_nodes_and_edges(cls)
    ]


def make(cls):
    torch.manual_seed(0)
    required = [
        name
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return cls(*(SIZES[name] for name in required)).double().eval()


@pytest.mark.parametrize("cls", found(), ids=lambda cls: cls.__name__)
def test_permuting_nodes_permutes_the_output(cls):
    generator = torch.Generator().manual_seed(1)
    half = torch.randint(12, (2, 20), generator=generator)
    half = half[:, half[0] != half[1]]
    edge_index = torch.cat([half, half.flip(0)], 1).unique(dim=1)
    x = torch.randn(12, 4, dtype=torch.float64, generator=generator)
    net, order = make(cls), torch.randperm(12, generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(12)
    out = net(x, edge_index)
    assert len(out) == 12 and torch.isfinite(out).all()
    torch.testing.assert_close(net(x[order], place[edge_index]), out[order])
    assert not torch.allclose(net(x, edge_index[:, :0]), out), "the edges do not matter"


def test_the_domain_has_such_layers():
    assert len(found()) > 1
