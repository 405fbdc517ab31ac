"""Race the best fixed kernel against a loop over pairs, and print what the bound takes.

Run from the repository root: ``python -m benchmarks.dynamics.long_tail_features``.
"""

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.timing import race
from posterity.dynamics import equipartition_kernel, success_bound

N_WORDS, N_CONCEPTS, LENGTH = 150, 5, 9


def shares(n: int, places: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to share n alike things among places."""
    if places == 1:
        yield (n,)
        return
    for first in range(n + 1):
        for rest in shares(n - first, places - 1):
            yield (first, *rest)


def partitions(sizes: list[int]) -> int:
    """Count partitions by walking through all assignments of components to concepts, those of a size as alike."""
    room, total = N_WORDS // N_CONCEPTS, 0
    kinds = [(size, sizes.count(size)) for size in sorted(set(sizes))]
    free = math.factorial(N_WORDS - sum(sizes))

    def walk(at: int, loads: tuple[int, ...], ways: int) -> None:
        nonlocal total
        if at == len(kinds):
            total += ways * free // math.prod(math.factorial(room - load) for load in loads)
            return
        size, times = kinds[at]
        for share in shares(times, N_CONCEPTS):
            after = tuple(load + size * k for load, k in zip(loads, share, strict=True))
            if max(after) <= room:
                walk(at + 1, after, ways * math.factorial(times) // math.prod(map(math.factorial, share)))

    walk(0, (0,) * N_CONCEPTS, 1)
    return total


def by_pairs(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel pair by pair: components by merging sets, then a walk through assignments."""
    room = N_WORDS // N_CONCEPTS
    every = math.factorial(N_WORDS) // math.factorial(room) ** N_CONCEPTS
    rows = []
    for one in x.tolist():
        row = []
        for other in y.tolist():
            parts = [{word} for word in {*one, *other}]
            for a, b in zip(one, other, strict=True):
                mine, theirs = (next(part for part in parts if word in part) for word in (a, b))
                if mine is not theirs:
                    parts.remove(theirs)
                    mine |= theirs
            row.append(
                N_CONCEPTS**LENGTH * partitions([len(part) for part in parts if len(part) > 1]) / every
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.randint(N_WORDS, (100, LENGTH)), torch.randint(N_WORDS, (800, LENGTH))
    options = {"n_words": N_WORDS, "n_concepts": N_CONCEPTS}
    start = time.perf_counter()
    equipartition_kernel(x, y, **options)
    print(f"100 x 800 pairs of length 9: {time.perf_counter() - start:.2f} s (target 2)")
    start = time.perf_counter()
    success_bound(LENGTH, N_WORDS, N_CONCEPTS, 1000)
    print(f"the bound for all ell: {time.perf_counter() - start:.3f} s (target 3)")
    x, y = x[:40], y[:50]
    torch.testing.assert_close(equipartition_kernel(x, y, **options), by_pairs(x, y))
    race(
        "2,000 pairs of length 9, against components and assignments pair by pair",
        lambda: equipartition_kernel(x, y, **options), lambda: by_pairs(x, y), target=500, rounds=3,
    )  # fmt: skip


if __name__ == "__main__":
    main()
