import torch
from torch import nn

from posterity.lab.memory import checkpointed, peak_bytes


def layers(depth):
    return nn.ModuleList(
        nn.Sequential(nn.Linear(16, 16, bias=False, dtype=torch.float64), nn.Tanh()) for _ in range(depth)
    )


def test_what_is_freed_before_the_peak_does_not_count_and_views_count_once():
    x = torch.zeros(100, dtype=torch.float64)
    assert peak_bytes(lambda: [x + 1, x + 2]) == 1600
    assert peak_bytes(lambda: x.reshape(10, 10).T[:3].sum()) == 8
    assert peak_bytes(lambda: x.add_(1)) == 0
    assert peak_bytes(lambda: None) == 0


def test_back_propagation_keeps_every_activation_checkpointing_only_the_borders():
    x = torch.randn(1000, 16, dtype=torch.float64)
    activation, weight = 1000 * 16 * 8, 16 * 16 * 8

    def growth(run):
        deep, shallow = (peak_bytes(lambda d=depth: run(layers(d))) for depth in (12, 4))
        return (deep - shallow) / 8

    def whole(net):
        h = x
        for layer in net:
            h = layer(h)
        h.sum().backward()

    def halves(net):
        checkpointed(
            [nn.Sequential(*net[: len(net) // 2]), nn.Sequential(*net[len(net) // 2 :])], x
        ).sum().backward()

    # a layer has its weight and what tanh gave; gradients of weights come as activations go, and
    # when the first half is computed again the second half has them
    assert growth(whole) == activation + weight
    assert growth(halves) == activation / 2 + weight + weight / 2
