"""Feedback at a site of ResNet-18 against the network itself, maps by context against a loop, and the contrast.

Run from the repository root: ``python -m benchmarks.transfer.mid_vision_feedback``.
"""

import time
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.timing import race
from posterity.lab.memory import peak_bytes
from posterity.transfer import ContextAffine, MidVisionFeedback, context_contrast


def one_by_one(layer: ContextAffine, x: Tensor, context: Tensor) -> Tensor:
    """Return what the layer does, sample by sample."""
    rows = [
        row if e < 0 else F.conv1d(row[None], layer.weight[e][:, :, None], layer.bias[e])[0]
        for e, row in zip(context.tolist(), x, strict=True)
    ]
    return torch.stack(rows)


def pair_by_pair(features: Tensor, context: Tensor) -> Tensor:
    """Return the contrast by the cosines of all pairs of rows."""
    f = features.flatten(2).mean(2) if features.ndim > 2 else features
    i, j = torch.triu_indices(len(f), len(f), 1)
    apart = context[i] != context[j]
    return F.cosine_similarity(f[i[apart]], f[j[apart]], dim=1, eps=1e-8).abs().mean()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, context = torch.randn(64, 3, 32, 32), torch.randint(2, (64,))
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )  # fmt: skip
    net = ResNetForImageClassification(config).eval()
    model = MidVisionFeedback(net, {"resnet.encoder.stages.1": 128}, n_contexts=2)
    torch.nn.init.normal_(model.affines[0].weight, std=0.1)
    with torch.no_grad():
        site = model(x, context, return_features=True)[1]["resnet.encoder.stages.1"]
        layer = model.affines[0]
        race(f"ResNet-18 with 64 images of 32 x 32, against 20 times the feedback at one site of {tuple(site.shape[1:])}",
             lambda: [layer(site, context) for _ in range(20)], lambda: net(x), target=1)  # fmt: skip
        race("ResNet-18 with feedback, against without", lambda: model(x, context), lambda: net(x), target=0.95,
             why="A product at every place of the site's map is beside few others, of images of 32 x 32.")  # fmt: skip

    for n, channels, positions in ((2_048, 128, 1), (1_024, 256, 4), (512, 128, 16)):
        layer = ContextAffine(5, channels)
        torch.nn.init.normal_(layer.weight, std=0.1)
        h, context = torch.randn(n, channels, positions, requires_grad=True), torch.randint(-1, 5, (n,))
        torch.testing.assert_close(layer(h, context), one_by_one(layer, h, context), rtol=1e-3, atol=1e-4)
        leaves = [h, *layer.parameters()]
        with torch.no_grad():
            size = peak_bytes(lambda: layer(h, context)) / 2**20  # noqa: B023
        race(f"maps of 5 contexts for {n:,} samples of {channels} channels at {positions} positions, forward and backward, against "
             f"a loop over samples ({size:.0f} MiB of tensors alive forward; a map a sample would be {n * channels**2 * 4 / 2**20:.0f})",
             lambda: torch.autograd.grad(layer(h, context).sum(), leaves),  # noqa: B023
             lambda: torch.autograd.grad(one_by_one(layer, h, context).sum(), leaves), target=3, rounds=5)  # noqa: B023  # fmt: skip

    f, context = torch.randn(256, 256, requires_grad=True), torch.randint(2, (256,))
    torch.testing.assert_close(context_contrast(f, context), pair_by_pair(f, context))
    race("contrast of 256 rows of 256 features, against pair by pair",
         lambda: context_contrast(f, context), lambda: pair_by_pair(f, context), target=3)  # fmt: skip
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        context_contrast(f, context)
        seconds.append(time.perf_counter() - start)
    print(f"contrast of 256 rows of 256 features: {1e3 * median(seconds):.2f} ms (target under 1 ms)")


if __name__ == "__main__":
    main()
