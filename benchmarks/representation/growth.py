"""What `benchmarks.growth` draws of losses over batches: each beside its naive form, against batch and dimension."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.representation.circe import all_grams
from benchmarks.representation.dino_vmf import pairwise
from benchmarks.representation.psco import pot_shots
from benchmarks.representation.rank_differential import by_matrices
from benchmarks.representation.sfrik import each_degree
from benchmarks.representation.ssl_duality import both_gram_matrices, covariances, reshaped
from benchmarks.representation.unicom import FullSoftmax
from posterity.representation import (
    CIRCE,
    ClusterDiscrimination,
    ContrastiveCriterion,
    DINOvMFLoss,
    NTXentLoss,
    PsCoLoss,
    RDMLoss,
    SFRIKLoss,
    VICRegLoss,
    gaussian_kernel,
)

__all__ = ["FIGURES"]

Work = Callable[[], object]
PAIRS, DIM = (64, 128, 256, 512, 1024), (128, 256, 512, 1024, 2048, 4096)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def of_views(loss: Callable[..., torch.Tensor]) -> Callable[[int, int], Work]:
    """Return what makes a call of a loss of two views, forward and backward, from pairs and dimensions."""

    def prepare(n: int, dim: int) -> Work:
        draws = rng()
        z = [torch.randn(n, dim, generator=draws).requires_grad_() for _ in range(2)]
        return lambda: torch.autograd.grad(loss(*z), z)

    return prepare


def by_gram_matrices(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Return the criterion of samples, each of the pair from its own Gram matrix."""
    u = [F.normalize(z, dim=1) for z in (z1, z2)]
    n = len(z1)
    both = sum(both_gram_matrices(z)[0] for z in u) / (2 * n * (n - 1))
    return (u[0] - u[1]).square().sum(1).mean() + both


def distilled(loss: str) -> Callable[[int, int], Work]:
    """Return what makes a call of DINO's loss of four views from rows and prototypes."""

    def prepare(n: int, k: int) -> Work:
        draws = rng()
        student = [torch.randn(n, k, generator=draws).requires_grad_() for _ in range(4)]
        teacher = [torch.randn(n, k, generator=draws) for _ in range(2)]
        works = DINOvMFLoss(k, centering="none") if loss == "ours" else pairwise
        return lambda: torch.autograd.grad(works(student, teacher), student)

    return prepare


def pseudo_task(loss: str) -> Callable[[int, int], Work]:
    """Return what makes a call of PsCo's loss, or of its shots by POT alone, from rows and the length of the queue."""

    def prepare(n: int, m: int) -> Work:
        torch.manual_seed(0)
        ours = PsCoLoss(128, queue_size=m)
        query, key = torch.randn(2, n, 128, generator=rng()).unbind()
        query.requires_grad_()
        if loss == "ours":
            return lambda: torch.autograd.grad(ours(query, key, update=False), query)
        return lambda: pot_shots(key, ours.queue)

    return prepare


def clusters(loss: str) -> Callable[[int, int], Work]:
    """Return what makes a call of cluster discrimination from rows and classes."""

    def prepare(n: int, k: int) -> Work:
        torch.manual_seed(0)
        ours = (
            ClusterDiscrimination(256, k, class_rate=0.1, n_features=128)
            if loss == "ours"
            else FullSoftmax(256, k)
        )
        z = torch.randn(n, 256, generator=rng(), requires_grad=True)
        labels = torch.randint(k, (n,), generator=rng())
        return lambda: torch.autograd.grad(ours(z, labels), (z, ours.weight))

    return prepare


def independence(loss: str) -> Callable[[int, int], Work]:
    """Return what makes a call of CIRCE from rows and held-out pairs."""

    def prepare(n: int, m: int) -> Work:
        draws = rng()
        y = 2 * torch.rand(n + m, 1, generator=draws) - 1
        z = y + 0.3 * torch.randn(n + m, 1, generator=draws)
        x = torch.randn(n, 1, generator=draws).requires_grad_()
        circe = CIRCE(sigma2_x=1.0, sigma2_z=0.5, sigma2_y=0.1, ridge=0.01).fit(y[n:], z[n:])
        if loss == "ours":
            return lambda: torch.autograd.grad(circe(x, y[:n], z[:n]), x)
        inverse = torch.linalg.inv(gaussian_kernel(y[n:], y[n:], 0.1) + 0.01 * torch.eye(m))
        return lambda: torch.autograd.grad(all_grams(x, y[:n], z[:n], y[n:], z[n:], inverse, 0.1), x)

    return prepare


CONTRAST = {
    "NT-Xent": of_views(NTXentLoss()), "NT-Xent, masks": of_views(reshaped),
    "VICReg": of_views(VICRegLoss()), "VICReg, covariances": of_views(covariances),
    "criterion": of_views(ContrastiveCriterion()), "criterion, Gram matrices": of_views(by_gram_matrices),
}  # fmt: skip
SPECTRA = {
    "SFRIK": of_views(SFRIKLoss()), "SFRIK, degree by degree": of_views(each_degree),
    "RDM": of_views(RDMLoss()), "RDM, full decomposition": of_views(by_matrices),
}  # fmt: skip
TABLES = {
    "DINO-vMF": distilled("ours"), "DINO-vMF, pair by pair": distilled("naive"),
    "PsCo": pseudo_task("ours"), "PsCo's shots, POT": pseudo_task("naive"),
    "clusters, a tenth": clusters("ours"), "clusters, all": clusters("naive"),
}  # fmt: skip
HELD = {"CIRCE": independence("ours"), "CIRCE, all Gram matrices": independence("naive")}


def _figures() -> dict[str, tuple[str, dict[str, Callable[[int], Work]], tuple[int, ...]]]:
    found = {}
    for name, group, rows, (across, wide, sizes) in (
        ("contrast", CONTRAST, PAIRS, ("dimensions", 512, DIM)),
        ("spectra", SPECTRA, PAIRS, ("dimensions", 512, DIM)),
        ("tables", TABLES, PAIRS, ("prototypes, keys or classes", 4096, (1024, 2048, 4096, 8192, 16384))),
        ("held-out", HELD, PAIRS, ("held-out pairs", 512, (128, 256, 512, 1024, 2048))),
    ):
        pairs: dict[str, Callable[[int], Work]] = {
            name: (lambda n, make=make, wide=wide: make(n, wide)) for name, make in group.items()
        }
        dims: dict[str, Callable[[int], Work]] = {
            name: (lambda d, make=make: make(256, d)) for name, make in group.items()
        }
        for unit, end in (("seconds", ""), ("MiB", "-memory")):
            found[f"{name}-batch{end}"] = f"{unit} against rows, {wide:,} {across}", pairs, rows
            found[f"{name}-dim{end}"] = f"{unit} against {across}, 256 rows", dims, sizes
    return found


FIGURES = _figures()
