"""Claims about sparsity-constrained transport: what a cap on columns costs, inside and after."""

import numpy as np
import torch
from numpy import ndarray
from sklearn.cluster import KMeans
from torch import Tensor

from posterity._checks import integer
from posterity.claims import Count, Positive, Several, Trial, comparison, trend
from posterity.lab.data import load_photo
from posterity.lab.metrics import rank_correlation
from posterity.transport import sparse_transport


def _palette(pixels: ndarray, n_colors: int, n_pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return k-means colours of sampled pixels and their shares, colours without pixels dropped."""
    rows = np.random.default_rng(seed).choice(len(pixels), min(n_pixels, len(pixels)), replace=False)
    means = KMeans(min(n_colors, len(rows)), n_init=1, random_state=seed).fit(pixels[rows])
    share = np.bincount(means.labels_, minlength=len(means.cluster_centers_)) / len(rows)
    kept = share > 0
    return torch.from_numpy(means.cluster_centers_[kept]), torch.from_numpy(share[kept])


def _color_transfer(
    trial: Trial, source: str, target: str, n_colors: int, n_pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both histograms and the squared distances of their colours."""
    integer("n_colors", n_colors, 2)
    integer("n_pixels", n_pixels, n_colors)
    sides = [
        _palette(load_photo(image).reshape(-1, 3), n_colors, n_pixels, trial.seed)
        for image in (source, target)
    ]
    (x, a), (y, b) = ((colors.to(trial.device), share.to(trial.device)) for colors, share in sides)
    return a, b, torch.cdist(x, y).square()


@comparison(
    paper="sparse-ot",
    says="A cap built into transport respects the marginals better than cutting a plan to its top k.",
    where="Liu et al., the experiment of color transfer",
    arms=("quadratic, top-k, renormalised columns", "sparsity-constrained"),
    metric="total variation of row sums from their marginal",
    better="lower",
    smallest={"n_colors": 16, "n_pixels": 500, "max_iter": 50},
)
def capped_columns(
    trial: Trial,
    source: str = "china.jpg",
    target: str = "flower.jpg",
    k: Count = 4,
    reg: Positive = 10.0,
    n_colors: Several = 64,
    n_pixels: Count = 5_000,
    max_iter: Count = 300,
) -> dict[str, float]:
    """Move the colours of one photograph to another, each colour of the target from k at most.

    Both arms have the same regularisation and exact column sums. The baseline is solved
    to convergence without a cap, then keeps the k largest entries of each column and
    scales them to its mass; the method stops after ``max_iter`` iterations. Neither
    meets the row sums exactly, which is what is measured. The records have the cost
    <T, C> + reg/2 ||T||^2 of both plans and the lower bound that the method proves. The
    seed draws pixels and colours. Images of one's own are two file names; the paper's
    setting is ``n_colors=256``.
    """
    a, b, cost = _color_transfer(trial, source, target, n_colors, n_pixels)
    full = sparse_transport(a, b, cost, k=len(a), reg=reg, max_iter=10_000)
    kept, rows = full.plan.topk(min(k, len(a)), dim=0)
    cut = torch.zeros_like(cost).scatter(0, rows, kept * (b / kept.sum(0)))
    capped = sparse_transport(a, b, cost, k=k, reg=reg, max_iter=max_iter)
    plans = {"quadratic, top-k, renormalised columns": cut, "sparsity-constrained": capped.plan}
    for arm, plan in plans.items():
        trial.record(f"cost, {arm}", (plan * cost).sum() + reg / 2 * plan.square().sum())
    trial.record("lower bound of a feasible plan's cost", capped.value)
    trial.record("marginal error of the quadratic plan", full.marginal_error)
    return {arm: float((plan.sum(1) - a).abs().sum() / 2) for arm, plan in plans.items()}


@trend(
    paper="sparse-ot",
    says="The objective is easier to optimise as k grows.",
    where="Liu et al., abstract",
    metric="Spearman correlation of k with the row-marginal error left after 100 iterations",
    high=-0.8,
    smallest={"n_colors": 16, "n_pixels": 500, "max_iter": 10},
)
def smoother_with_k(
    trial: Trial,
    source: str = "china.jpg",
    target: str = "flower.jpg",
    reg: Positive = 10.0,
    n_colors: Several = 64,
    n_pixels: Count = 5_000,
    max_iter: Count = 100,
) -> float:
    """Solve one colour transfer for k from 1 to 64, with the same iterations for each.

    The error is that of the best dual value, in units of mass; its curve over k is kept.
    Where k exceeds the support of the quadratic plan the objective is smooth and all
    caps are the same problem, so further ones only add ties. Some colours may be out of
    reach at small k where the target has fewer of them; such k are left out.
    """
    a, b, cost = _color_transfer(trial, source, target, n_colors, n_pixels)
    caps, errors = [], []
    for k in (1, 2, 3, 4, 6, 8, 16, 64):
        if k * len(b) >= len(a):
            result = sparse_transport(a, b, cost, k=k, reg=reg, max_iter=max_iter)
            caps.append(k)
            errors.append(float(result.marginal_error))
            trial.track("row-marginal error", k, errors[-1])
    return rank_correlation(caps, errors)
