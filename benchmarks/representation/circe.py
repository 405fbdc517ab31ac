"""Race a step of CIRCE with one that forms all Gram matrices of batch and held-out rows, and with HSCIC; print memory.

Run from the repository root: ``python -m benchmarks.representation.circe``.
"""

import torch

from benchmarks.timing import race
from posterity.lab.memory import peak_bytes
from posterity.representation import CIRCE, gaussian_kernel, hscic, hsic


def all_grams(x, y, z, held_y, held_z, inverse, sigma2_y):
    """Return the penalty from the Gram matrices of batch and held-out rows together and two (m, m) products."""
    n = len(x)
    with torch.no_grad():
        both_y, both_z = torch.cat([y, held_y]), torch.cat([z, held_z])
        ky, kz = gaussian_kernel(both_y, both_y, sigma2_y), gaussian_kernel(both_z, both_z, 0.5)
        half = (0.5 * ky[:n, n:] @ inverse @ kz[n:, n:] - kz[:n, n:]) @ inverse @ ky[n:, :n]
        other = (kz[:n, :n] + half + half.T) * ky[:n, :n]
    return hsic(gaussian_kernel(x, x, 1.0), other)


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    m = 1000
    for n in (256, 1024):
        y = 2 * torch.rand(n + m, 1, generator=rng) - 1
        z = y + 0.3 * torch.randn(n + m, 1, generator=rng)
        x = torch.randn(n, 1, generator=rng).requires_grad_()
        circe = CIRCE(sigma2_x=1.0, sigma2_z=0.5, sigma2_y=0.1, ridge=0.01).fit(y[n:], z[n:])
        gram = gaussian_kernel(y[n:].double(), y[n:].double(), 0.1)
        inverse = torch.linalg.inv(gram + 0.01 * torch.eye(m, dtype=torch.float64))
        exact = all_grams(*(part.double() for part in (x, y[:n], z[:n], y[n:], z[n:])), inverse, 0.1)
        torch.testing.assert_close(circe(x, y[:n], z[:n]).double(), exact, rtol=0, atol=1e-6)
        given = (x, y[:n], z[:n], y[n:], z[n:], inverse.float(), 0.1)
        works = {
            "ours": lambda: torch.autograd.grad(circe(x, y[:n], z[:n]), x),  # noqa: B023
            "Gram matrices of all rows": lambda: torch.autograd.grad(all_grams(*given), x),  # noqa: B023
            "HSCIC": lambda: torch.autograd.grad(
                hscic(x, z[:n], y[:n], ridge=0.01, sigma2_x=1.0, sigma2_z=0.5, sigma2_y=0.1),  # noqa: B023
                x,  # noqa: B023
            ),
        }
        ours = works.pop("ours")
        mine = peak_bytes(ours) / 2**20
        for peer, target in (
            ("Gram matrices of all rows", 3 if n == 256 else 2),
            ("HSCIC", 5 if n == 1024 else 1),
        ):
            theirs = peak_bytes(works[peer]) / 2**20
            race(f"{n} rows, {m} held out, forward and backward, against {peer} ({mine:.0f} MiB instead of {theirs:.0f})",
                 ours, works[peer], target=target, rounds=9)  # fmt: skip


if __name__ == "__main__":
    main()
