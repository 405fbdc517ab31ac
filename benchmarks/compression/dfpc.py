"""DFPC's scores against sparse matrices of every layer, pruning against torch-pruning, small against dense."""

import copy
import time

import numpy as np
import torch
import torch_pruning
from scipy import sparse
from torch import nn

from benchmarks.timing import race
from posterity.claims.compression.dfpc import BottleneckNet
from posterity.compression import channel_saliencies, latency, prune_channels


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> sparse.csr_matrix:
    """Return the absolute matrix of a convolution on a map, entry by entry of its kernel."""
    weight, stride, pad = layer.weight.detach().abs().double().numpy(), layer.stride[0], layer.padding[0]
    c_out, c_in, k, _ = weight.shape
    _, height, width = shape
    h, w = (height + 2 * pad - k) // stride + 1, (width + 2 * pad - k) // stride + 1
    rows, columns, values = [], [], []
    i, j = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    for a in range(k):
        for b in range(k):
            y, x = i * stride + a - pad, j * stride + b - pad
            inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).ravel()
            for o in range(c_out):
                for c in range(c_in):
                    rows.append((o * h * w + (i * w + j).ravel())[inside])
                    columns.append((c * height * width + (y * width + x).ravel())[inside])
                    values.append(np.full(inside.sum(), weight[o, c, a, b]))
    place = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_matrix((np.concatenate(values), place), (c_out * h * w, c_in * height * width))


def by_matrices(net: BottleneckNet, size: int) -> list[np.ndarray]:
    """Return the scores inside the blocks as the definition has them: matrices of layers, multiplied."""
    scores = []
    for block in net.blocks:
        small = -(-size // block.conv2.stride[0])
        shapes = [(block.conv1.in_channels, size, size), (block.conv2.in_channels, size, size),
                  (block.conv3.in_channels, small, small)]  # fmt: skip
        one, two, three = (matrix(layer, shape) for layer, shape in
                           zip((block.conv1, block.conv2, block.conv3), shapes, strict=True))  # fmt: skip
        for a, b, norm, shape in ((one, two, block.bn1, shapes[1]), (two, three, block.bn2, shapes[2])):
            scale = (norm.weight.abs() / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
            b, n = (b @ sparse.diags(np.repeat(scale, shape[1] * shape[2]))).tocsc(), shape[1] * shape[2]
            scores.append(
                np.array([(b[:, c * n : c * n + n] @ a[c * n : c * n + n]).sum() for c in range(shape[0])])
            )
        size = small
    return scores


def by_torch_pruning(net: nn.Module, x: torch.Tensor) -> nn.Module:
    net = copy.deepcopy(net)
    pruner = torch_pruning.pruner.MagnitudePruner(
        net, x, importance=torch_pruning.importance.MagnitudeImportance(p=1), global_pruning=True,
        pruning_ratio=0.3, ignored_layers=[net.head],
    )  # fmt: skip
    pruner.step()
    return net


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width, side in ((4, 12), (8, 16)):  # half of our time on the smaller one is the copy of the network
        net, x = BottleneckNet(1, 10, width).eval(), torch.rand(1, 1, side, side)
        inner = [s for s in channel_saliencies(net, x) if len(s) < 5 * width]
        assert all(any(np.allclose(s, t) for t in inner if len(t) == len(s)) for s in by_matrices(net, side))
        race(
            f"scores of {sum(p.numel() for p in net.parameters())} parameters at {side} x {side}, sparse matrices of the blocks alone",
            lambda: channel_saliencies(net, x), lambda: by_matrices(net, side), target=20, rounds=3,  # noqa: B023
        )  # fmt: skip

    net, x = BottleneckNet(3, 10, 16).eval(), torch.rand(1, 3, 32, 32)
    race(
        "prune_channels, a ResNet of width 16 at 32 x 32, torch-pruning's MagnitudePruner",
        lambda: prune_channels(net, x, 0.3), lambda: by_torch_pruning(net, x), target=1, rounds=5,
        why="Bounds of all channels are computed, where the peer sorts norms of weights.",
    )  # fmt: skip

    start = time.perf_counter()
    channel_saliencies(BottleneckNet(3, 10, 64).eval(), x)
    print(
        f"scores of a ResNet of width 64 at 32 x 32: {time.perf_counter() - start:.2f} s (target under 1 s)"
    )
    net, batch = BottleneckNet(3, 10, 64).eval(), torch.rand(4, 3, 32, 32)
    most = next(s for s in (prune_channels(net, x, share, round_to=8) for share in np.arange(0.2, 0.9, 0.05).tolist())
                if s.macs[1] <= s.macs[0] / 2)  # fmt: skip
    race(
        f"forward pass at {most.macs[1] / most.macs[0]:.2f} of the multiplications, the dense network",
        lambda: latency(most.model, batch, n_repeats=1, warmup=0),
        lambda: latency(net, batch, n_repeats=1, warmup=0), target=1.3, rounds=9,
    )  # fmt: skip


if __name__ == "__main__":
    main()
