"""Race sparsity-constrained transport with POT and with a loop over routers.

Run from the repository root: ``python -m benchmarks.transport.sparse_ot``.
"""

import io
from contextlib import redirect_stdout
from importlib.util import find_spec

import torch

from benchmarks.timing import race
from posterity.transport import SparseTransportRouter, project_sparse_simplex, sparse_transport

SIZE, CAP, REG = 512, 8, 1.0


def against_pot() -> None:
    """Time one projection of every column, and whole solves that reach the same dual value."""
    if find_spec("ot") is None:
        print("projection and solve, against POT: skipped, POT is not installed")
        return
    import ot

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.full((SIZE,), 1 / SIZE, dtype=torch.float64) for _ in range(2))
    x, y = (torch.rand(SIZE, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    cost = torch.cdist(x, y).square()
    numbers = [part.numpy() for part in (a, b, cost)]
    points = -SIZE * cost

    def pots_projection() -> object:
        with redirect_stdout(io.StringIO()):  # it prints a shape at each call
            return ot.utils.projection_sparse_simplex(points.numpy(), CAP, axis=0)

    race(
        f"projection of {SIZE} columns of {SIZE}, k={CAP}, against POT",
        lambda: project_sparse_simplex(points, CAP, dim=0),
        pots_projection,
        target=2,
        rounds=51,
    )

    def pots_solve(max_iter: int) -> float:
        with redirect_stdout(io.StringIO()):
            options = {"reg": REG, "reg_type": "sparsity_constrained", "max_nz": CAP}
            _, log = ot.smooth.smooth_ot_semi_dual(*numbers, **options, numItermax=max_iter, log=True)
        return -float(log["res"].fun)

    def our_solve(max_iter: int) -> float:
        return float(sparse_transport(a, b, cost, k=CAP, reg=REG, max_iter=max_iter).value)

    reached = min(pots_solve(1000), our_solve(1000)) * (1 - 1e-5)
    ours, theirs = (
        next(n for n in range(5, 1001, 5) if solve(n) >= reached) for solve in (our_solve, pots_solve)
    )
    race(
        f"solve of {SIZE} x {SIZE}, k={CAP}, to one value ({ours} iterations) against POT ({theirs})",
        lambda: our_solve(ours),
        lambda: pots_solve(theirs),
        target=1,
        rounds=5,
    )


@torch.no_grad()
def batched_routing() -> None:
    """Time 64 groups of tokens routed at once, against the same router called for each."""
    router, x = SparseTransportRouter(64, 8), torch.randn(64, 64, 64)
    race(
        "64 groups of 64 tokens to 8 experts, against a loop",
        lambda: router(x),
        lambda: [router(group[None]) for group in x],
        target=10,
    )


def main() -> None:
    torch.set_num_threads(1)
    against_pot()
    batched_routing()


if __name__ == "__main__":
    main()
