"""Claims about SignNet and BasisNet: filters learnt in spite of signs, answers that no basis changes."""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from scipy.io import loadmat
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Several, Trial, comparison, trend
from posterity.graphs import BasisNet, SignNet, eigenspaces, laplacian_eigs
from posterity.lab.data import load_photo
from posterity.lab.nets import seeded

Filter = Literal["low", "high", "band", "rejection", "comb"]


class _DeepSets(nn.Module):
    """Layers that add to each node's linear map one of the mean over nodes (first axis).

    Between layers ReLU and, where asked for, batch norm, of the batch's own statistics.
    """

    def __init__(self, *widths: int, norm: bool = False) -> None:
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.own = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.mean = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, track_running_stats=False) if norm else nn.Identity()
            for width in widths[1:-1]
        )

    def pairs(self) -> Iterator[tuple[nn.Linear, nn.Linear]]:
        """Give the maps of a node and of the mean, layer by layer."""
        return zip(self.own, self.mean, strict=True)  # type: ignore[return-value]

    def forward(self, h: Tensor, *_: Tensor | None) -> Tensor:
        for i, (own, mean) in enumerate(self.pairs()):
            if i:
                h = self.norms[i - 1](h.relu().flatten(0, -2)).view_as(h)
            if own.out_features < own.in_features:  # the mean of what is narrower
                both = F.linear(h, torch.cat([own.weight, mean.weight]))
                here, near = both.split(own.out_features, -1)
                h = here + (near.mean(0, keepdim=True) + own.bias)
            else:
                shift = mean(h.mean(0, keepdim=True)) + own.bias
                one = own.in_features == 1
                h = torch.addcmul(shift, h, own.weight[:, 0]) if one else F.linear(h, own.weight) + shift
        return h


class _Filter(nn.Module):
    """A DeepSets network over nodes on the signal and an encoding, itself learnt or not."""

    def __init__(self, width: int, n_encoding: int, encoder: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.body = _DeepSets(1 + n_encoding, width, width, 1)

    def forward(self, x: Tensor, eigvecs: Tensor, eigvals: Tensor, edge_index: Tensor) -> Tensor:
        if self.encoder is None:
            encoding = torch.cat([eigvecs, eigvals.expand_as(eigvecs)], 1)
        else:
            encoding = self.encoder(eigvecs, eigvals, edge_index)
        return self.body(torch.cat([x, encoding], 1))


def _grid(height: int, width: int) -> Tensor:
    """Return the edges of a grid of 4 neighbours, both directions."""
    node = torch.arange(height * width).view(height, width)
    pairs = [(node[:-1], node[1:]), (node[:, :-1], node[:, 1:])]
    one_way = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in pairs], 1)
    return torch.cat([one_way, one_way.flip(0)], 1)


def _signals(image: str, n_patches: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return edges, signals (patches, nodes), and the nodes whose error counts.

    Patches are ``size`` x ``size`` of every second pixel, grey, at random places; of a
    ``.mat`` file with A, F and mask, its graph and random ones of its signals.
    """
    rng = np.random.default_rng(seed)
    if image.endswith(".mat"):
        file = loadmat(image)
        edges = torch.from_numpy(np.stack(np.nonzero(np.asarray(file["A"])))).long()
        signals = np.asarray(file["F"], dtype=np.float32).T
        chosen = signals[rng.choice(len(signals), n_patches, replace=False)]
        return edges, torch.from_numpy(chosen), torch.from_numpy(file["mask"].ravel() > 0)
    grey = load_photo(image).mean(2)
    parts = []
    for _ in range(n_patches):
        top, left = (int(rng.integers(side - 2 * size + 1)) for side in grey.shape)
        parts.append(grey[top : top + 2 * size : 2, left : left + 2 * size : 2].ravel())
    everywhere = torch.ones(size * size, dtype=torch.bool)
    return _grid(size, size), torch.tensor(np.stack(parts), dtype=torch.float32), everywhere


def _response(kind: Filter, eigvals: Tensor) -> Tensor:
    """Return a filter's factor on each frequency."""
    low, band = torch.exp(-10 * eigvals**2), torch.exp(-10 * (eigvals - 1) ** 2)
    responses = {
        "low": low, "high": 1 - low, "band": band, "rejection": 1 - band,
        "comb": (math.pi * eigvals).sin().abs(),
    }  # fmt: skip
    return responses[kind]


@comparison(
    paper="signnet",
    says="On SignNet's encoding a network learns a spectral filter; on eigenvectors of random sign it cannot.",
    where="Lim et al., the experiments on spectral graph convolutions",
    arms=("sign-flip", "signnet"),
    metric="log10 of the squared training error a node, targets of unit variance",
    better="lower",
    smallest={"n_patches": 1, "size": 6, "steps": 30},
)
def spectral_filter(
    trial: Trial,
    image: str = "china.jpg",
    filter: Filter = "band",
    n_patches: Count = 1,
    size: Several = 16,
    steps: Count = 300,
    width: Count = 32,
) -> dict[str, float]:
    """Fit one filtered image at a time by networks over the pixels, as the paper does.

    The arms share the signal, the network on top and the steps; none is tuned. "sign-flip"
    sees the eigenvectors with new random signs at every step, and is judged on five more
    draws. As in the paper, phi and rho have batch norm, the network on top has not; phi is
    narrower here (16 for 32, two layers for three). Reported beside them: absolute values of
    the eigenvectors, which no sign changes but which lose what the entries' signs say to
    each other. The paper fits 50 images of 32x32 pixels for more steps:
    ``image="2Dgrid.mat", n_patches=50, steps=2_000``.
    """
    edges, signals, counted = _signals(image, n_patches, size, trial.seed)
    edges, signals, counted = (part.to(trial.device) for part in (edges, signals, counted))
    n = signals.shape[1]
    eigvals, eigvecs = laplacian_eigs(edges, n)
    draws = torch.Generator().manual_seed(trial.seed)

    def flip() -> Tensor:
        return (torch.randint(0, 2, (n,), generator=draws) * 2.0 - 1).to(trial.device)

    errors: dict[str, list[float]] = {"sign-flip": [], "absolute": [], "signnet": []}
    for patch, x in enumerate(signals):
        y = eigvecs @ (_response(filter, eigvals) * (eigvecs.T @ x))
        y = (y / y[counted].std(correction=0))[:, None]
        for arm, values in errors.items():
            with seeded(1000 * trial.seed + patch):
                encoder = None
                if arm == "signnet":
                    encoder = SignNet(
                        n,
                        1,
                        width,
                        phi=_DeepSets(1, 16, 1, norm=True),
                        rho=_DeepSets(2 * n, 10, 10, width, norm=True),
                    )
                net = _Filter(width, 2 * n if encoder is None else width, encoder).to(trial.device)
            scaled = eigvecs * n**0.5

            def loss(net: nn.Module = net, arm: str = arm, x: Tensor = x, y: Tensor = y) -> Tensor:
                v = scaled.abs() if arm == "absolute" else scaled * flip()  # noqa: B023
                error = net(x[:, None], v, eigvals, edges) - y
                return error[counted].square().mean()

            opt = torch.optim.Adam(net.parameters(), lr=0.01)
            for step in range(steps):
                opt.zero_grad()
                value = loss()
                value.backward()
                opt.step()
                if patch == 0 and step % 10 == 0:
                    trial.track(arm, step, float(value.detach()))
            with torch.no_grad():
                values.append(float(np.mean([math.log10(float(loss()) + 1e-12) for _ in range(5)])))
    trial.record("absolute values", float(np.mean(errors["absolute"])))
    return {arm: float(np.mean(errors[arm])) for arm in ("sign-flip", "signnet")}


@trend(
    paper="signnet",
    says="Another basis of the repeated eigenvalues' spaces changes SignNet's answer, and not BasisNet's.",
    where="Lim et al., the section on basis invariance",
    metric="log10 of SignNet's relative change over BasisNet's",
    low=2.0,
    smallest={"size": 4},
)
def random_bases(trial: Trial, size: Several = 8, width: Count = 32, n_draws: Count = 5) -> float:
    """Turn each eigenspace of a square grid at random, under random networks, untrained.

    The change is relative to how much the answers vary over the nodes, and batch statistics
    keep signals of order one. On a torus more eigenvalues repeat; but all nodes look alike
    there, so BasisNet's answers, rightly, do not vary at all.
    """
    edges = _grid(size, size).to(trial.device)
    eigvals, eigvecs = laplacian_eigs(edges, size**2)
    group = eigenspaces(eigvals)
    sizes = torch.bincount(group).tolist()
    draws = torch.Generator().manual_seed(trial.seed)
    with seeded(trial.seed):
        sign = SignNet(size**2, width, width).to(trial.device)
        basis = BasisNet(sizes, width, width).to(trial.device)
    changes: dict[str, list[float]] = {"SignNet": [], "BasisNet": []}
    for _ in range(n_draws):
        turned = eigvecs.clone()
        for j, d in enumerate(sizes):
            turn = torch.linalg.qr(torch.randn(d, d, generator=draws))[0]
            turned[:, group == j] = eigvecs[:, group == j] @ turn.to(trial.device)
        with torch.no_grad():
            for name, before, after in (
                ("SignNet", sign(eigvecs, eigvals, edges), sign(turned, eigvals, edges)),
                ("BasisNet", basis(eigvecs, eigvals), basis(turned, eigvals)),
            ):
                change = float((after - before).norm() / (before - before.mean(0)).norm())
                changes[name].append(math.log10(change + 1e-12))
    for name, values in changes.items():
        trial.record(f"{name}'s change, log10", float(np.mean(values)))
    return float(np.mean(changes["SignNet"])) - float(np.mean(changes["BasisNet"]))
