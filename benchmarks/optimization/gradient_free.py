"""Race guesses and moves evaluated together with loops over ``functional_call``, one by one.

Run from the repository root: ``python -m benchmarks.optimization.gradient_free``.
"""

import time

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.optimization import guess_and_check, population_search


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 2, bias=False))


def normalised(net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised loss and whether all is right."""
    logits = functional_call(net, params, (x,))
    right = (logits.argmax(1) == y).all()
    for p in params.values():
        logits = logits / p.norm()
    return F.cross_entropy(logits, y), right


@torch.no_grad()
def guess_in_a_loop(net: nn.Module, x: Tensor, y: Tensor, tries: int) -> int:
    """Draw one network after another, and return how many fit."""
    found = 0
    for _ in range(tries):
        params = {name: torch.empty_like(p).uniform_(-1, 1) for name, p in net.named_parameters()}
        found += bool(normalised(net, params, x, y)[1])
    return found


@torch.no_grad()
def search_in_a_loop(net: nn.Module, x: Tensor, y: Tensor, steps: int, population: int = 512) -> None:
    """Evaluate one move after another, and take the best of each population."""
    here = {name: p.clone() for name, p in net.named_parameters()}
    names = [(name, k) for name, p in here.items() for k in range(p.numel())]
    for _ in range(steps):
        best, lowest = here, float(normalised(net, here, x, y)[0])
        for move in torch.randperm(2 * len(names))[:population].tolist():
            name, k = names[move // 2]
            there = {**here, name: here[name].clone()}
            there[name].view(-1)[k] += -1.0 if move % 2 else 1.0
            loss = float(normalised(net, there, x, y)[0])
            if loss < lowest:
                best, lowest = there, loss
        here = best


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, x = network(), torch.randn(16, 64)
    y = (x[:, 0] > 0).long()
    few, many = 1_000, 40_000
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        guess_and_check(net, x, y, n_models=10**6, max_tries=many, batch_size=4096)
        best = min(best, time.perf_counter() - start)
    print(f"guesses a second, 64-16-2 and 16 examples: {many / best:.0f} (target 60000)")
    race(
        f"{few} guesses of 64-16-2 on 16 examples, against a loop over functional_call",
        lambda: guess_and_check(net, x, y, n_models=10**6, max_tries=few),
        lambda: guess_in_a_loop(net, x, y, few), target=10, rounds=7,
    )  # fmt: skip

    steps = 8
    n_evals = population_search(net, x, y, max_steps=steps, stop_accuracy=None).n_evals
    race(
        f"{n_evals} moves of pattern search, 512 at a time, against a loop over functional_call",
        lambda: population_search(net, x, y, max_steps=steps, stop_accuracy=None),
        lambda: search_in_a_loop(net, x, y, steps), target=50, rounds=5,
    )  # fmt: skip


if __name__ == "__main__":
    main()
