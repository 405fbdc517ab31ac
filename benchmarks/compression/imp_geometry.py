"""Masks against torch's own pruning, what upkeep and paths add, and spectra against products that start anew."""

import copy
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from benchmarks.timing import race
from posterity.compression import (
    Spectrum,
    error_barrier,
    hessian_spectrum,
    iterative_pruning,
    magnitude_mask,
    prunable_fraction,
)


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def masks() -> None:
    net = mlp(784, 1000, 200, 10)

    def theirs() -> dict[str, Tensor]:
        other = copy.deepcopy(net)
        linear = {
            f"{name}.weight": part for name, part in other.named_children() if isinstance(part, nn.Linear)
        }
        prune.global_unstructured(
            [(part, "weight") for part in linear.values()], pruning_method=prune.L1Unstructured, amount=0.2
        )
        return {name: part.get_buffer("weight_mask").bool() for name, part in linear.items()}

    def ours() -> dict[str, Tensor]:
        return magnitude_mask(copy.deepcopy(net), 0.2)

    expected = theirs()
    assert all(torch.equal(kept, expected[name]) for name, kept in ours().items())
    race("mask of 986,000 weights, against torch.nn.utils.prune.global_unstructured", ours, theirs, target=1)


def upkeep() -> None:
    """Race a training, a cut and a masked training from the start against two plain trainings."""
    net, x, y = mlp(784, 300, 100, 10), torch.randn(128, 784), torch.randint(10, (128,))

    def train(model: nn.Module, start_step: int, after_step: object) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(start_step, 150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if callable(after_step):
                after_step(step + 1)

    def plain() -> None:
        for _ in range(2):
            train(copy.deepcopy(net), 0, None)

    race(
        "two trainings of 150 steps, masked in iterative_pruning, against plain ones",
        lambda: iterative_pruning(net, train, rounds=1), plain, target=0.97, rounds=31,
        why="A mask is one more pass over the weights, beside steps of a small network on 128 rows.",
    )  # fmt: skip


def path() -> None:
    net, x, y = mlp(784, 300, 100, 10), torch.randn(2000, 784), torch.randint(10, (2000,))

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        return float((model(x).argmax(1) != y).float().mean())

    ends = net.state_dict(), {name: torch.randn_like(value) for name, value in net.state_dict().items()}
    race(
        "a path of 11 points, against 11 evaluations",
        lambda: error_barrier(net, *ends, error), lambda: [error(net) for _ in range(11)], target=0.95, rounds=61,
        why="Weights between two ends are two more passes over them, beside evaluations of a small network.",
    )  # fmt: skip


def anew(net: nn.Module, x: Tensor, y: Tensor, n_iter: int) -> Tensor:
    """Return Ritz values of Lanczos whose every step asks ``torch.autograd.functional.hvp``."""
    weights = {name: p.detach() for name, p in net.named_parameters() if p.ndim > 1}

    def loss(*parts: Tensor) -> Tensor:
        tensors = dict(zip(weights, parts, strict=True))
        return F.cross_entropy(torch.func.functional_call(net, tensors, (x,)), y)

    sizes = [w.numel() for w in weights.values()]
    probe = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).double()
    basis, diagonal, beside = [probe / probe.norm()], [], []
    for _ in range(n_iter):
        parts = tuple(
            v.view(w.shape).float() for v, w in zip(basis[-1].split(sizes), weights.values(), strict=True)
        )
        product = torch.autograd.functional.hvp(loss, tuple(weights.values()), parts)[1]
        new = torch.cat([part.flatten() for part in product]).double()
        along = torch.stack(basis) @ new
        diagonal.append(along[-1])
        for _ in range(2):
            new = new - torch.stack(basis).T @ (torch.stack(basis) @ new)
        beside.append(new.norm())
        basis.append(new / new.norm())
    off = torch.stack(beside[:-1])
    return torch.linalg.eigvalsh(torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1))


def spectra() -> None:
    net, x, y = mlp(64, 100, 100, 10).eval(), torch.randn(1000, 64), torch.randint(10, (1000,))

    def ours() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return hessian_spectrum(net, [(x, y)], n_iter=20, n_probes=1, generator=generator).eigenvalues

    torch.testing.assert_close(ours()[[0, -1]], anew(net, x, y, 20)[[0, -1]], rtol=1e-3, atol=1e-5)
    race(
        "20 steps of Lanczos, against torch.autograd.functional.hvp anew for each",
        ours, lambda: anew(net, x, y, 20), target=1.8, rounds=7,
    )  # fmt: skip
    small = mlp(60, 28, 10)
    start = time.perf_counter()
    found = hessian_spectrum(small, [(torch.randn(500, 60), torch.randint(10, (500,)))], method="exact")
    seconds = time.perf_counter() - start
    print(f"exact spectrum of {len(found.weights)} weights: {seconds:.2f} s (target under 10 s)")


def share() -> None:
    """Race against the sort alone that the definition begins with."""
    D = 10**6
    weights, nodes = torch.randn(D), 10 ** (6 * torch.rand(256, dtype=torch.float64) - 6)
    spectrum = Spectrum(nodes, torch.full((256,), D / 256, dtype=torch.float64), 0.0)
    race(
        "share that may be cut of a million weights, against a sort of them",
        lambda: prunable_fraction(weights, spectrum, 0.05),
        lambda: np.sort(weights.abs().double().numpy()), target=1,
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    masks()
    upkeep()
    path()
    spectra()
    share()


if __name__ == "__main__":
    main()
