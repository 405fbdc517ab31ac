"""Race the margin problem with SLSQP, and the flow with an explicit solver on the same path, and with descent.

Run from the repository root: ``python -m benchmarks.dynamics.margin_bias``.
"""

import time

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.dynamics import PowerDiagonal, margin_flow, seminorm_max_margin, two_balls


def points(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Return points that no half of the coordinates separates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    y = torch.where(x @ w > 0, 1.0, -1.0).double()
    return x + 0.3 * y[:, None] * w / w.norm(), y


def by_slsqp(x: Tensor, y: Tensor, penalized: Tensor) -> np.ndarray:
    """Return the coefficients by a solver for any smooth problem."""
    A, p = (x * y[:, None]).numpy(), penalized.numpy().astype(float)
    return minimize(
        lambda b: p @ b**2 / 2, np.zeros(x.shape[1]), jac=lambda b: p * b, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda b: A @ b - 1, "jac": lambda b: A},
        options={"ftol": 1e-12, "maxiter": 1_000},
    ).x  # fmt: skip


def explicit(x: Tensor, y: Tensor, degrees: Tensor, duration: float) -> np.ndarray:
    """Return the end of the same path by Runge-Kutta of order 5, its gradient by hand."""
    data, powers = (x * y[:, None]).numpy(), degrees.numpy()

    def direction(_: float, theta: np.ndarray) -> np.ndarray:
        z = -data @ theta**powers
        share = np.exp(z - z.max())
        g = (share / share.sum()) @ data * powers * theta ** (powers - 1)
        return g / np.linalg.norm(g) * max(1.0, np.abs(theta).max())

    start = np.full(x.shape[1], 0.5)
    return solve_ivp(direction, (0, duration), start, rtol=1e-6, atol=1e-9, max_step=0.5).y[:, -1]


def descent(x: Tensor, y: Tensor, goal: float, lr: float = 0.1) -> tuple[int, np.ndarray]:
    """Return the gradients that descent on log L takes to a least margin, and where it is: all degrees 1."""
    data = (x * y[:, None]).numpy()
    theta, n = np.full(x.shape[1], 0.5), 0
    while (data @ theta).min() < goal:
        z = -data @ theta
        share = np.exp(z - z.max())
        theta = theta + lr * (share / share.sum()) @ data
        n += 1
    return n, theta


def main() -> None:
    torch.set_num_threads(1)
    for n, d, target in ((1_000, 20, 1), (2_000, 50, 1)):
        x, y = points(n, d)
        penalized = torch.arange(d) < 3 * d // 4
        ours = seminorm_max_margin(x, y, penalized).coef[penalized]
        torch.testing.assert_close(
            ours, torch.from_numpy(by_slsqp(x, y, penalized))[penalized], rtol=1e-3, atol=1e-3
        )
        race(
            f"the margin problem, n = {n}, d = {d}, against SLSQP",
            lambda: seminorm_max_margin(x, y, penalized),  # noqa: B023
            lambda: by_slsqp(x, y, penalized),  # noqa: B023
            target=target, rounds=3,
        )  # fmt: skip
    x, y = points(200_000, 20)
    begin = time.perf_counter()
    seminorm_max_margin(x, y, torch.arange(20) < 15)
    print(f"the margin problem, n = 200000, d = 20: {time.perf_counter() - begin:.2f} s")

    degrees = torch.tensor([1, 3])
    x, y = two_balls(24, torch.tensor([2.0, 0.95]).double(), generator=torch.Generator().manual_seed(0))
    model = PowerDiagonal(degrees.tolist())
    nn.init.constant_(model.theta, 0.5)
    for duration, target in ((7.0, 1), (8.0, 3)):
        race(
            f"the flow to path time {duration:g}, against an explicit solver with a gradient by hand",
            lambda: margin_flow(model, x, y, duration=duration),  # noqa: B023
            lambda: explicit(x, y, degrees, duration),  # noqa: B023
            target=target, rounds=3,
        )  # fmt: skip

    model = PowerDiagonal([1, 1])
    nn.init.constant_(model.theta, 0.5)
    best = seminorm_max_margin(x, y, [True, True]).coef
    for height in (2, 6, 10):
        flow = margin_flow(model, x, y, duration=height + 3.0, n_eval=400)
        reached = int((flow.log_margin >= height).nonzero()[0])
        n_evals = margin_flow(model, x, y, duration=float(flow.times[reached])).n_evals
        n, theta = descent(x, y, float(np.exp(height)))
        cosines = [
            float(torch.cosine_similarity(at, best, dim=0))
            for at in (flow.params[reached], torch.from_numpy(theta))
        ]
        print(
            f"gradients to a margin of e^{height}: flow {n_evals}, descent on log L {n}, ratio {n / n_evals:.2g}; "
            f"1 - cosine {1 - cosines[0]:.1e} and {1 - cosines[1]:.1e}"
        )


if __name__ == "__main__":
    main()
