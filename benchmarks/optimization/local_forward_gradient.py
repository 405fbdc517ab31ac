"""An estimate against a step of backpropagation, bare forward passes, and a loop over all local losses."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.optimization import LocalMixer, grouped_cross_entropy

BATCH, WIDTH, GROUPS, BLOCKS = 64, 512, 8, 4


def made(n_patches: int) -> tuple[LocalMixer, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    net = LocalMixer(32, n_patches=n_patches, width=WIDTH, n_groups=GROUPS, n_blocks=BLOCKS, generator=rng)
    for head in [*net.heads, net.readout]:
        torch.nn.init.normal_(head.weight, std=0.1, generator=rng)
    return (
        net,
        torch.randn(BATCH, 3, 32, 32, generator=rng),
        torch.randint(10, (BATCH,), generator=rng),
    )


def backpropagation(net: LocalMixer, images: Tensor, target: Tensor) -> None:
    net.zero_grad()
    F.cross_entropy(net(images), target).backward()


@torch.no_grad()
def forward_and_products(net: LocalMixer, images: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Pass forward, and multiply what the gradients of weights are products of."""
    net(images)
    for left, right in pairs:
        left.mT @ right


def products(net: LocalMixer, n_patches: int) -> list[tuple[Tensor, Tensor]]:
    rows, pairs = BATCH * n_patches**2, []
    for name, weight in net.blocks.named_parameters():
        if name.endswith("weight"):
            *groups, left, right = weight.shape
            if left == right == n_patches**2:  # over patches
                pairs.append((torch.randn(BATCH * WIDTH, left), torch.randn(BATCH * WIDTH, right)))
            else:
                pairs.append((torch.randn(*groups, rows, left), torch.randn(*groups, rows, right)))
    return pairs


def copy_of(
    block: Any, head: Any, x: Tensor, target: Tensor, p: int, g: int, params: dict[str, Tensor]
) -> Tensor:
    """Return one patch's and group's local loss."""
    features = functional_call(block, params, x)
    y = F.layer_norm(features, features.shape[-1:])
    return grouped_cross_entropy(y, head.weight, head.bias, target)[:, p, g].mean()


@torch.no_grad()
def loop(net: LocalMixer, x: Tensor, target: Tensor, n_patches: int) -> None:
    """Pass a block forward once for each of its local losses."""
    for block, head in zip(net.blocks, net.heads, strict=True):
        params = {name: value.detach() for name, value in block.named_parameters()}
        for p in range(n_patches**2):
            for g in range(GROUPS):
                v = {name: torch.randn_like(value) for name, value in params.items()}
                jvp(partial(copy_of, block, head, x, target, p, g), (params,), (v,))
        x = block(x)


def main() -> None:
    torch.set_num_threads(1)
    net, images, target = made(4)
    estimate = partial(net.estimate, images, target, method="activity")
    race("activity estimate, width 512, against a step of backpropagation", estimate,
         partial(backpropagation, net, images, target), target=1 / 1.3)  # fmt: skip
    race("activity estimate, width 512, against a forward pass and the outer products", estimate,
         partial(forward_and_products, net, images, products(net, 4)), target=1 / 2.2)  # fmt: skip
    net, images, target = made(2)
    x = images.unflatten(3, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 3, 5, 1).reshape(BATCH, 4, 1, -1)
    race("weight estimate, 4 patches and 8 groups, against a dual pass a local loss",
         partial(net.estimate, images, target, method="weight"), partial(loop, net, x, target, 2),
         target=4 * GROUPS / 4, rounds=3)  # fmt: skip


if __name__ == "__main__":
    main()
