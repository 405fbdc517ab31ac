"""Race the cascade with networks on pixels, Haar steps with other transforms, and a batch with single images.

Run from the repository root: ``python -m benchmarks.generative.multiscale_score``.
"""

from importlib.util import find_spec

import torch
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.generative import LocalCNN, MultiscaleDenoiser, ascend, haar


@torch.no_grad()
def denoising() -> None:
    """Time an image of 160 x 160 by the cascade and by networks of the same depth and width on its pixels."""
    torch.manual_seed(0)
    model, y = MultiscaleDenoiser.build(3), torch.rand(1, 1, 160, 160)
    for field, target in ((13, 2.5), (43, 6)):
        net = LocalCNN(1, 1, receptive_field=field).eval()
        race(
            f"denoising, cascade of field 13, against pixels of field {field}",
            lambda: model.denoise(y),
            lambda net=net: y - net(y),
            target=target,
            rounds=7,
        )


def pyramid() -> None:
    """Time one level of (64, 1, 160, 160)."""
    x = torch.rand(64, 1, 160, 160)
    if find_spec("pywt") is None:
        print("haar, against PyWavelets: skipped, PyWavelets is not installed")
    else:
        import pywt

        array = x.numpy()
        race("haar, against PyWavelets", lambda: haar(x), lambda: pywt.dwt2(array, "db1"), target=5)
    pairs = torch.tensor([[0.5, 0.5], [0.5, -0.5]])
    filters = torch.einsum("ai,bj->abij", pairs, pairs).reshape(4, 1, 2, 2)
    race(
        "haar, against a strided convolution",
        lambda: haar(x),
        lambda: F.conv2d(x, filters, stride=2),
        target=1,
    )


def sampling() -> None:
    """Time the ascent of 16 small images at once and one by one."""
    torch.manual_seed(0)
    net = LocalCNN(1, 1, receptive_field=9, n_layers=6, width=16, norm=False, predict="clean").eval()
    y0, options = torch.randn(16, 1, 5, 5), {"beta": 1.0, "max_steps": 100, "sigma_end": 1e-9}

    def together() -> None:
        ascend(net, y0, **options)

    def alone() -> None:
        for y in y0.split(1):
            ascend(net, y, **options)

    race("ascent of 16 images of 5 x 5, against one by one", together, alone, target=5, rounds=7)
    large = LocalCNN(1, 1, receptive_field=43).eval()
    options["max_steps"], y0 = 3, torch.randn(16, 1, 20, 20)

    def together_large() -> None:
        ascend(large, y0, **options)

    def alone_large() -> None:
        for y in y0.split(1):
            ascend(large, y, **options)

    race(
        "ascent of 16 images of 20 x 20, 21 layers, against one by one",
        together_large,
        alone_large,
        target=1,
        rounds=5,
    )


def main() -> None:
    torch.set_num_threads(1)
    denoising()
    pyramid()
    sampling()


if __name__ == "__main__":
    main()
