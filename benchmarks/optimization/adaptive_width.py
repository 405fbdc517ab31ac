"""Grouped Adam against plain Adam, set-up against Microsoft's mup, and the operator against all pairs of draws.

The peer ``mup`` is raced where it can be imported: ``pip install --no-deps mup``.
"""

import math
import time

import torch
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.optimization import TangentLimit, param_groups, parametrize

try:
    import mup
except ModuleNotFoundError:
    mup = None


def transformer(width: int, readout: type[nn.Module] = nn.Linear, depth: int = 4) -> nn.Sequential:
    layer = [nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(depth)]
    return nn.Sequential(nn.Linear(32, width), *layer, readout(width, 10))


def stepping(net: nn.Module, groups: list) -> torch.optim.Adam:
    adam = torch.optim.Adam(groups, lr=1e-3, foreach=True)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return adam


def set_up_mup(net: nn.Module, base: nn.Module) -> object:
    mup.set_base_shapes(net, base)  # type: ignore[union-attr]
    return mup.MuAdam(net.parameters(), lr=1e-3)  # type: ignore[union-attr]


def set_up(net: nn.Module, base: nn.Module) -> object:
    return torch.optim.Adam(param_groups(parametrize(net, base), 1e-3))


def all_pairs(
    x_train: Tensor, x_test: Tensor, chi: Tensor, n_samples: int, generator: torch.Generator
) -> Tensor:
    """Return the operator of a ReLU MLP of depth 2 under signs, hidden terms by all pairs of draws."""
    x = torch.cat([x_train, x_test])
    n, d = x_train.shape
    forward, backward = TangentLimit(2).covariances(x)

    def process(covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance.double())
        z = torch.randn(n_samples, len(x), generator=generator, dtype=torch.float64)
        return z @ (vectors * values.clamp_min(0).sqrt() @ vectors.T)

    h1 = torch.randn(n_samples, d, generator=generator, dtype=torch.float64) @ x.double().T / math.sqrt(d)
    h2, g1 = process(forward[1]), process(backward[1])
    dh2 = torch.randn(n_samples, 1, generator=generator, dtype=torch.float64) * (h2 > 0)
    dh1, phi1, phi2 = g1 * (h1 > 0), h1.relu(), h2.relu()
    c, points = chi.double(), x.double()
    total = phi2.T @ torch.sign(phi2[:, :n] @ c)
    total = total + (dh1 * (torch.sign((dh1[:, :n] * c) @ points[:n]) @ points.T)).sum(0)
    for row in dh2:
        signs = torch.sign(phi1[:, :n] @ (row[:n] * c))
        total = total + row * (signs @ phi1) / n_samples
    return (total[n:] / n_samples).to(x_train)


def main() -> None:
    net = parametrize(transformer(256), transformer(32))
    plain = transformer(256)
    grouped, single = stepping(net, param_groups(net, 1e-3)), stepping(plain, list(plain.parameters()))
    print(f"{len(grouped.param_groups)} groups")
    race(
        "a step of Adam in groups, against one group",
        grouped.step,
        single.step,
        target=1 / 1.05,
        rounds=201,
        why="torch calls its kernels once for each group.",
    )
    if mup is None:
        print("mup is not installed: its race is left out (pip install --no-deps mup)")
    else:
        rounds = 51
        fresh = iter([transformer(64) for _ in range(rounds + 1)])
        theirs = iter([transformer(64, mup.MuReadout) for _ in range(rounds + 1)])
        base, their_base = transformer(32), transformer(32, mup.MuReadout)
        race(
            "set-up of a transformer, against mup",
            lambda: set_up(next(fresh), base),
            lambda: set_up_mup(next(theirs), their_base),
            target=1, rounds=rounds,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x, x_test = (torch.randn(256, 64, generator=generator) for _ in range(2))
    chi = torch.randn(256, generator=generator)
    limit = TangentLimit(2, generator=generator)
    race(
        "operator, 256 and 256 points, depth 2, 4096 draws, against all pairs",
        lambda: limit.operator(x, x_test, chi),
        lambda: all_pairs(x, x_test, chi, 4096, generator),
        target=4, rounds=1,
    )  # fmt: skip
    start = time.perf_counter()
    limit.operator(x, x_test, chi)
    print(f"operator: {time.perf_counter() - start:.2f} s (target at most 3 s)")


if __name__ == "__main__":
    main()
