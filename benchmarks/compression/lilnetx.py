"""A training step against the plain network's, the coder against one distribution a weight, sizes against lzma."""

import lzma
import time
from collections.abc import Callable

import constriction
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.compression import FactorizedPrior, LatentNet


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.BatchNorm2d(4 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def stepper(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters())

    def step() -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def by_rows(prior: FactorizedPrior, rows: Tensor) -> int:
    """Code with a distribution for each weight, float32 made 16-bit integers, as torchac takes them; return the bytes."""
    low, high = int(rows.min()), int(rows.max())
    with torch.no_grad():
        cdf = prior.cdf((torch.arange(low, high + 2.0) - 0.5)[:, None].expand(-1, rows.shape[1]))
    family, size, steps = (
        constriction.stream.model.Categorical(perfect=False),
        0,
        torch.arange(high - low + 2),
    )
    for j in range(rows.shape[1]):
        each = cdf[:, j].expand(len(rows), -1).contiguous()
        whole = (each * (2**16 - len(steps) + 1)).round().int() + steps.int()
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse((rows[:, j] - low).int().numpy(), family, whole.diff(dim=1).float().numpy())
        size += 4 * len(coder.get_compressed())
    return size


def main() -> None:
    torch.set_num_threads(1)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    for width in (8, 16):
        plain, lat = network(width), LatentNet(network(width))
        race(
            f"a training step with both penalties, width {width}, batch 64, against the plain network's",
            stepper(lat, lambda: F.cross_entropy(lat(x), y) + 1e-4 * lat.rate_loss() + 1e-6 * lat.slice_loss()),  # noqa: B023
            stepper(plain, lambda: F.cross_entropy(plain(x), y)),  # noqa: B023
            target=0.625, rounds=9,
        )  # fmt: skip
    net = network(128)
    lat = LatentNet(net, start="weights", boundary=6)
    with torch.no_grad():  # as a trained one: most weights near zero
        for latent in lat.latents().values():
            latent.mul_(torch.rand_like(latent).square())
    data = lat.compress()
    megabytes = sum(latent.numel() for latent in lat.latents().values()) * 4e-6
    for name, work in (
        ("compress", lat.compress),
        ("decompress", lambda: LatentNet.decompress(net, data)),
    ):
        race(
            f"{name}, {megabytes:.1f} MB of weights, against 5 MB a second",
            work,
            lambda: time.sleep(megabytes / 5),
            target=1, rounds=3,
        )  # fmt: skip
    for boundary in (6, 60):
        single = LatentNet(nn.Conv2d(256, 512, 3), start="weights", boundary=boundary)
        with torch.no_grad():
            single.latents()[""].mul_(torch.rand(512, 256, 3, 3).square())
        rows = single.latents()[""].detach().round().reshape(-1, 9)
        race(
            f"compress, {len(rows.unique())} different integers, against a distribution for each weight",
            single.compress,
            lambda: by_rows(single.priors["3x3"], rows),  # type: ignore[arg-type]  # noqa: B023
            target=10, rounds=3,
        )  # fmt: skip
    integers = np.concatenate([latent.detach().round().numpy().ravel() for latent in lat.latents().values()])
    theirs = len(lzma.compress(integers.astype(np.int8).tobytes(), preset=9 | lzma.PRESET_EXTREME))
    sizes = lat.sizes()
    ours = sizes["latents"] + sizes["tables"]
    print(f"the same integers: lzma {theirs} bytes, ours {ours}, ratio {theirs / ours:.2f} (target 1.05)")


if __name__ == "__main__":
    main()
