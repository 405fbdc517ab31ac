"""Race products with the Hessian, Lanczos and the variance over samples with how each is done by hand.

Run from the repository root: ``python -m benchmarks.optimization.batch_size_scaling``.
"""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.optimization import extreme_eigenvalues, hessian_matvec, hessian_variance, spectral_density


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def network(n_in: int, width: int, n: int) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Return a network with two hidden layers, data and the number of parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(n_in, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )
    x, y = torch.randn(n, n_in), torch.randint(10, (n,))
    return model, x, y, sum(p.numel() for p in model.parameters())


def by_lists(model: nn.Module, x: Tensor, y: Tensor, n_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights by double backward, lists of tensors and a loop over earlier vectors."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(model, x, y), params, create_graph=True)

    def inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum((p * q).sum() for p, q in zip(a, b, strict=True))

    def unit(a: list[Tensor]) -> list[Tensor]:
        size = inner(a, a).sqrt()
        return [p / (size + 1e-6) for p in a]

    v = unit([torch.randn_like(p) for p in params])
    basis, alpha, beta, w = [v], [], [], []
    for k in range(n_iter):
        if k:
            beta.append(float(inner(w, w).sqrt()))
            for known in basis:
                share = inner(w, known)
                w = [p - share * q for p, q in zip(w, known, strict=True)]
            v = unit(w)
            basis.append(v)
        w = torch.autograd.grad(grads, params, v, retain_graph=True)
        alpha.append(float(inner(w, v)))
        w = [p - alpha[-1] * q for p, q in zip(w, v, strict=True)]
        if k:
            w = [p - beta[-1] * q for p, q in zip(w, basis[-2], strict=True)]
    values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    return values, vectors[0] ** 2


def by_samples(model: nn.Module, x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Return the variances over samples of H_i v by a loop over them."""
    images = []
    for k in range(len(x)):
        product = hessian_matvec(model, loss, (x[k : k + 1], y[k : k + 1]))
        images.append(torch.stack([product(v) for v in directions]))
    return torch.stack(images).var(0).sum(1)


def main() -> None:
    torch.set_num_threads(1)
    large = torch.zeros(4_000_000)  # as larger models do: once it is freed the allocator keeps what it gets
    del large
    for n in (32, 128, 512):
        model, x, y, dim = network(64, 275, n)
        params, matvec, v = list(model.parameters()), hessian_matvec(model, loss, (x, y)), torch.randn(dim)
        race(
            f"a product with the Hessian of {dim} parameters, {n} samples, against a gradient",
            lambda: matvec(v),  # noqa: B023
            lambda: torch.autograd.grad(loss(model, x, y), params),  # noqa: B023
            target=1 / 3.5,
        )
    model, x, y, dim = network(64, 275, 32)  # few samples, so that it is Lanczos' own work that counts
    race(
        f"80 Lanczos steps with {dim} parameters, against lists of tensors and a loop over vectors",
        lambda: spectral_density(hessian_matvec(model, loss, (x, y)), dim, n_iter=80),
        lambda: by_lists(model, x, y, 80), target=2, rounds=7,
    )  # fmt: skip

    model, x, y, dim = network(64, 60, 256)
    matvec = hessian_matvec(model, loss, (x, y))
    operator = LinearOperator(
        (dim, dim), matvec=lambda v: matvec(torch.from_numpy(v)).numpy(), dtype=np.float32
    )

    start = np.random.default_rng(0).standard_normal(dim).astype(np.float32)

    def scipys(tol: float) -> np.ndarray:
        return np.asarray(eigsh(operator, 2, which="BE", tol=tol, v0=start)[0])  # pyright: ignore[reportArgumentType]

    def ours(n_iter: int) -> np.ndarray:
        ends = extreme_eigenvalues(matvec, dim, n_iter=n_iter, generator=torch.Generator().manual_seed(1))
        return np.array([float(part) for part in ends[:2]])

    exact = scipys(1e-7)
    error = max(abs(scipys(1e-3) / exact - 1).max(), 1e-6)  # float32 has no more
    n_iter = next(n for n in range(10, 100) if abs(ours(n) / exact - 1).max() <= error)
    race(
        f"both ends of a spectrum to {error:.0e} ({n_iter} steps), against scipy's eigsh", lambda: ours(n_iter),
        lambda: scipys(1e-3), target=1, rounds=15,
    )  # fmt: skip

    model, x, y, dim = network(32, 16, 256)
    directions = torch.randn(10, dim)
    race(
        "the variance over 256 samples, against a loop over them",
        lambda: hessian_variance(model, loss, (x, y), n_iter=20), lambda: by_samples(model, x, y, directions),
        target=10, rounds=5,
    )  # fmt: skip


if __name__ == "__main__":
    main()
