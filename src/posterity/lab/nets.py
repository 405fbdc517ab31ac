"""Backbones: small networks in a few lines, the same initial weights for the same seed.

Larger ones (ResNet, ViT, U-Net, transformers) are built by transformers and diffusers
from a config; they are passed where these are.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["TimeMLP", "cnn", "mlp", "seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under a seed of its own and leave torch's global state as it was.

    Parameters
    ----------
    seed : int

    Yields
    ------
    None
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def mlp(
    n_in: int, n_out: int, *, width: int = 128, depth: int = 2, act: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0, seed: int = 0,
) -> nn.Sequential:  # fmt: skip
    """Return a fully connected network; inputs with more axes are flattened.

    Parameters
    ----------
    n_in, n_out : int
        Features in and out.
    width, depth : int
        Units a hidden layer, and how many hidden layers.
    act : type of nn.Module, default=nn.ReLU
    dropout : float, default=0.0
        After each hidden layer.
    seed : int, default=0
        Decides the initial weights.

    Returns
    -------
    nn.Sequential
    """
    with seeded(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        for k in range(depth):
            layers += [nn.Linear(width if k else n_in, width), act()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        return nn.Sequential(*layers, nn.Linear(width if depth else n_in, n_out))


def cnn(channels: int, n_out: int, *, width: int = 32, depth: int = 3, seed: int = 0) -> nn.Sequential:
    """Return a small convolutional classifier for images of any size.

    Parameters
    ----------
    channels, n_out : int
        Channels of the images, and outputs.
    width, depth : int
        Channels of the first block, doubled by each of ``depth`` blocks.
    seed : int, default=0
        Decides the initial weights.

    Returns
    -------
    nn.Sequential
    """
    with seeded(seed):
        layers: list[nn.Module] = []
        for k in range(depth):
            wide = width * 2**k
            layers += [
                nn.Conv2d(channels, wide, 3, padding=1, stride=1 if k == 0 else 2),
                nn.BatchNorm2d(wide),
            ]
            layers.append(nn.ReLU())
            channels = wide
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, n_out))


class TimeMLP(nn.Module):
    """A network of a point and a time: ``net(x, t)`` with Fourier features of t in [0, 1].

    Parameters
    ----------
    shape : int or tuple of int
        Shape of one sample.
    width, depth : int
        Units a hidden layer, and how many hidden layers.
    n_frequencies : int, default=4
        Sine and cosine of pi t, 2 pi t, 4 pi t, ...
    seed : int, default=0
        Decides the initial weights.
    """

    frequencies: Tensor

    def __init__(
        self, shape: int | tuple[int, ...], *, width: int = 128, depth: int = 3, n_frequencies: int = 4,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(self.shape)
        self.body = mlp(size + 2 * n_frequencies, size, width=width, depth=depth, act=nn.SiLU, seed=seed)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(n_frequencies))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return a tensor like ``x`` of shape (n, *shape); ``t`` has shape (n,)."""
        angles = t[:, None] * self.frequencies.to(t)
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        return self.body(features).view_as(x)


def weights(make: Callable[..., nn.Module], *args: object, seed: int, **options: object) -> nn.Module:
    """Return ``make(*args, **options)`` with the initial weights of a seed."""
    with seeded(seed):
        return make(*args, **options)
