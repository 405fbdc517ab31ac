"""Race patches with gathers pixel by pixel, derivatives with a pass forward, and enlargement with a clock.

Run from the repository root: ``python -m benchmarks.generative.funknn``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.generative import FunkNN, image_gradient, image_laplacian, image_patches, upsample


def gathered(image: Tensor, coords: Tensor, p: int) -> Tensor:
    """Return patches as an ordinary program makes them: 16 pixels for each entry, the index copied for each channel."""
    n, c, h, w = image.shape
    m = coords.shape[1]
    offsets = torch.arange(p) - (p - 1) / 2
    x = ((coords[..., :1] + 1) * w - 1) / 2 + offsets * (p - 1) / p * w / (w - 1)
    y = ((coords[..., 1:] + 1) * h - 1) / 2 + offsets * (p - 1) / p * h / (h - 1)
    x, y = x[:, :, None, :].expand(n, m, p, p), y[:, :, :, None].expand(n, m, p, p)
    reach = torch.arange(-1, 3)
    columns = x.detach().floor()[..., None] + reach
    rows = y.detach().floor()[..., None] + reach

    def weight(u: Tensor) -> Tensor:
        u = u.abs()
        near, far = (1.5 * u - 2.5) * u * u + 1, ((-0.5 * u + 2.5) * u - 4) * u + 2
        return torch.where(u < 1, near, torch.where(u < 2, far, torch.zeros_like(u)))

    def mirrored(index: Tensor, size: int) -> Tensor:
        index = torch.where(index < 0, -1 - index, index)
        return torch.where(index >= size, 2 * size - 1 - index, index).long()

    wx, wy = weight(x[..., None] - columns), weight(y[..., None] - rows)
    at = mirrored(rows, h)[..., :, None] * w + mirrored(columns, w)[..., None, :]
    values = image.flatten(2).gather(2, at.reshape(n, 1, -1).repeat(1, c, 1)).view(n, c, m, p, p, 4, 4)
    return (values * (wy[..., :, None] * wx[..., None, :])[:, None]).sum((-1, -2)).transpose(1, 2)


def patches() -> None:
    """Time 16 images, 512 coordinates each, with the pass backward to images and coordinates."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(16, 3, 64, 64, generator=generator, requires_grad=True)
    coords = (1.6 * torch.rand(16, 512, 2, generator=generator) - 0.8).requires_grad_()
    torch.testing.assert_close(image_patches(image, coords), gathered(image, coords, 9), rtol=1e-3, atol=1e-3)
    race(
        "patches of 9 x 9 and backward, against gathers of 16 pixels an entry",
        lambda: image_patches(image, coords).sum().backward(),
        lambda: gathered(image, coords, 9).sum().backward(),
        target=5,
        rounds=3,
    )


def derivatives() -> None:
    """Time gradient and Laplacian of three channels by the time of values alone."""
    torch.manual_seed(0)
    net, image, coords = FunkNN(3), torch.rand(2, 3, 64, 64), 2 * torch.rand(2, 512, 2) - 1

    @torch.no_grad()
    def value() -> Tensor:
        return net(image, coords)

    for name, derivative in (("gradient", image_gradient), ("Laplacian", image_laplacian)):
        race(
            f"{name} of three channels, against values",
            lambda derivative=derivative: derivative(net, image, coords, create_graph=False),
            value,
            target=1 / 6,
            rounds=7,
        )
    race(
        "Laplacian forward, against two passes backward",
        lambda: image_laplacian(net, image, coords, create_graph=False),
        lambda: image_laplacian(lambda *x: net(*x), image, coords, create_graph=False),
        target=1,
        rounds=3,
    )


def enlargement() -> None:
    """Time 64 x 64 to 128 x 128 of one image in colour, by the products of the network's layers alone."""
    torch.manual_seed(0)
    net, image = FunkNN(3), torch.rand(1, 3, 64, 64)
    flat = torch.rand(128 * 128, 243)

    @torch.no_grad()
    def layers() -> Tensor:
        x = flat
        for layer in net.layers:
            x = F.relu(layer(x))
        return x

    race(
        "enlargement from 64 to 128 with the paper's network, against its layers alone",
        lambda: upsample(net, image, 128),
        layers,
        target=0.5,
        rounds=3,
    )


def main() -> None:
    torch.set_num_threads(1)
    patches()
    derivatives()
    enlargement()


if __name__ == "__main__":
    main()
