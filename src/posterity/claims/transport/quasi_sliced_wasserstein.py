"""Claims about quasi-Monte Carlo directions: less error a projection, and better fits by gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from posterity.claims import Count, Positive, Several, Trial, comparison
from posterity.lab.data import load_photo
from posterity.transport import QuasiSlicedWasserstein, sliced_wasserstein, sphere_points

LAST = 100  # steps at the end of a flow, over which its distance is averaged


def _clouds(source: str, target: str, shapes: str | None, n_points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two clouds: pixels of two photographs, or two shapes of an array file."""
    rng = np.random.default_rng(seed)
    if shapes is None:
        both: list[ndarray] = [load_photo(image).reshape(-1, 3) for image in (source, target)]
    else:
        if not Path(shapes).is_file():
            raise ValueError(f"shapes must be an .npy file, got {shapes}")
        try:
            stock = np.load(shapes, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"shapes must be an .npy file of numbers: {error}") from error
        if stock.ndim != 3 or len(stock) < 2 or stock.shape[2] != 3:
            raise ValueError(f"shapes must be (count of at least 2, points, 3), got {stock.shape}")
        both = [stock[k] for k in rng.choice(len(stock), 2, replace=False)]
    chosen = [cloud[rng.choice(len(cloud), min(n_points, len(cloud)), replace=False)] for cloud in both]
    x, y = (torch.as_tensor(np.asarray(cloud, dtype=float)) for cloud in chosen)
    return x, y


@comparison(
    paper="quasi-sliced-wasserstein",
    says="For the same number of projections, quasi-Monte Carlo directions err less than random ones.",
    where="Nguyen et al., the experiment on approximation errors",
    arms=("random", "gaussian", "equal-area", "distance", "spiral"),
    metric="absolute error of SW_2 against 20,000 directions",
    better="lower",
    smallest={"n_points": 100, "n_reference": 1000, "n_draws": 3},
)
def direction_error(
    trial: Trial,
    source: str = "china.jpg",
    target: str = "flower.jpg",
    shapes: str | None = None,
    n_points: Several = 2_000,
    n_directions: Count = 100,
    n_reference: Count = 20_000,
    n_draws: Count = 30,
) -> dict[str, float]:
    """Measure SW_2 of the colours of two photographs with each set of directions.

    The seed draws the pixels; the random arm is the mean absolute error of ``n_draws``
    draws. The reference is a spiral of 20,000 points. The errors over 10 to 300
    directions are tracked. ``shapes`` is an .npy of shape (count, points, 3), such as the
    paper's ShapeNet clouds, of which the seed draws two.
    """
    x, y = (cloud.to(trial.device) for cloud in _clouds(source, target, shapes, n_points, trial.seed))
    parts = sphere_points(n_reference, dtype=torch.float64, device=trial.device).split(1_000)
    squares = [len(part) * sliced_wasserstein(x, y, part).square() for part in parts]
    truth = (torch.stack(squares).sum() / n_reference).sqrt()
    generator = torch.Generator().manual_seed(trial.seed)
    trial.record("reference", truth)

    def error(method: str, n: int) -> float:
        draws = [
            sphere_points(n, method, generator=generator, dtype=torch.float64)  # type: ignore[arg-type]
            for _ in range(n_draws if method == "random" else 1)
        ]
        values = [sliced_wasserstein(x, y, draw.to(trial.device)) for draw in draws]
        return float((torch.stack(values) - truth).abs().mean())

    errors = {}
    for arm in ("random", "gaussian", "equal-area", "distance", "spiral"):
        for n in {10, 30, n_directions, 300}:
            errors[arm, n] = error(arm, n)
        for n in sorted(n for name, n in errors if name == arm):
            trial.track(f"error over directions, {arm}", n, errors[arm, n])
    return {arm: value for (arm, n), value in errors.items() if n == n_directions}


@comparison(
    paper="quasi-sliced-wasserstein",
    says="Gradient flows along randomly rotated spirals end nearer to their target than along random directions.",
    where="Nguyen et al., the experiment on point-cloud interpolation",
    arms=("random", "rotated spiral"),
    metric="exact W_2 to the target, the target's radius being 1, mean over flows and their last 100 steps",
    better="lower",
    smallest={"n_points": 40, "steps": 10, "n_flows": 2},
)
def flow(
    trial: Trial,
    target: str = "china.jpg",
    shapes: str | None = None,
    n_points: Several = 300,
    n_directions: Count = 10,
    steps: Count = 300,
    lr: Positive = 0.1,
    n_flows: Count = 24,
) -> dict[str, float]:
    """Move points of a sphere to the colours of a photograph, a fresh draw of directions each step.

    Both arms have the same starts, targets, number of directions and steps; a step is ``lr``
    times the gradient of ``n_points * SW_2``, as the official script takes it. The seed
    draws pixels, start and directions of each of ``n_flows`` flows. With ``shapes`` each target is one
    of them. Where a flow ends is a balance of step and noise: at the script's ``lr=0.01`` most
    of what is left after 300 steps is the way still to go, and the arms are near each other,
    as they are with 50 directions, whose noise is small in both.
    """
    arms: dict[str, dict[str, Any]] = {
        "random": {"method": "random"},
        "rotated spiral": {"method": "spiral", "randomize": "rotate"},
    }
    reached: dict[str, dict[int, list[float]]] = {arm: {} for arm in arms}
    for draw in np.random.default_rng(trial.seed).integers(2**31, size=n_flows).tolist():
        _, end = _clouds(target, target, shapes, n_points, draw)
        end = end - end.mean(0)
        end = (end / end.norm(dim=1).max()).to(trial.device)
        start = torch.randn(end.shape, generator=torch.Generator().manual_seed(draw), dtype=end.dtype)
        start = F.normalize(start).to(end)
        for arm, options in arms.items():
            directions = torch.Generator().manual_seed(draw)
            distance = QuasiSlicedWasserstein(n_directions, generator=directions, **options)
            cloud = start.clone().requires_grad_()
            for step in range(1, steps + 1):
                (grad,) = torch.autograd.grad(len(end) * distance(cloud, end), cloud)
                with torch.no_grad():
                    cloud -= lr * grad
                if (steps - step) % 10 == 0 and (step % 50 == 0 or steps - step < LAST):
                    reached[arm].setdefault(step, []).append(_exact(cloud.detach(), end))
    ended = {}
    for arm, errors in reached.items():
        for step, values in errors.items():
            trial.track(f"exact W_2, {arm}", step, float(np.mean(values)))
        ended[arm] = float(np.mean([values for step, values in errors.items() if steps - step < LAST]))
    return ended


def _exact(x: Tensor, y: Tensor) -> float:
    """Return W_2 of clouds of equal size by the assignment problem."""
    cost = torch.cdist(x, y).square().cpu().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))
