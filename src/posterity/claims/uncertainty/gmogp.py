"""Claims about GMOGP: outputs that share latent processes are predicted better, at the price of separate ones."""

import math
import time
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.datasets import load_digits
from torch import Tensor

from posterity._checks import needs
from posterity.claims import Between, Count, Trial, comparison
from posterity.lab.data import Series, SeriesData, dataset, load_series
from posterity.lab.data.needs import require_rows
from posterity.lab.nets import seeded
from posterity.uncertainty import GMOGPRegressor

LR, DECAY = 0.08, 5e-4  # of all arms, with the rate times 0.9 after every 100 steps


@dataset(Series, "two-scales")
def two_scales(seed: int) -> SeriesData:
    """Return 200 times of five variables that mix two fast and two slow Gaussian processes.

    On [0, 5] the lengthscales are 0.08, 0.08, 1.5 and 1.5; weights are of random sign in
    [0.5, 1.5], those of fast processes times 0.4; noise has deviation 0.05.
    """
    rng, x = np.random.default_rng(seed), np.linspace(0, 5, 200)
    latent = []
    for scale in (0.08, 0.08, 1.5, 1.5):
        covariance = np.exp(-0.5 * np.square((x[:, None] - x) / scale))
        latent.append(np.linalg.cholesky(covariance + 1e-8 * np.eye(200)) @ rng.normal(size=200))
    weights = rng.uniform(0.5, 1.5, (4, 5)) * rng.choice([-1, 1], (4, 5)) * [[0.4], [0.4], [1], [1]]
    values = np.column_stack(latent) @ weights + 0.05 * rng.normal(size=(200, 5))
    return SeriesData(values, tuple(f"y{k}" for k in range(5)))


@dataset(Series, "five-digits")
def five_digits(seed: int) -> SeriesData:
    """Return the 64 pixels of five digits: row and column, in [0, 5], then the five images."""
    images = load_digits().images
    chosen = np.random.default_rng(seed).choice(len(images), 5, replace=False)
    place = np.indices((8, 8)).reshape(2, 64).T * 5 / 7
    values = np.column_stack([place, images[chosen].reshape(5, 64).T])
    return SeriesData(values, ("row", "column", *(f"image {k}" for k in chosen)))


def _fits(data: SeriesData, n_inputs: int, **_: Any) -> None:
    whole = int(np.isfinite(data.values).all(1).sum())
    require_rows(whole, "rows with all values", 8)
    if data.values.shape[1] <= n_inputs:
        raise ValueError(
            f"n_inputs must leave one of the {data.values.shape[1]} columns to predict, got {n_inputs}"
        )


def _window(data: str, window: int, n_inputs: int, seed: int) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Return inputs and outputs of a random half of a window, then of the other half."""
    values = load_series(data, seed=seed).values
    values = values[np.isfinite(values).all(1)]
    rng, n = np.random.default_rng(seed), min(window, len(values))
    if n_inputs:
        rows = rng.permutation(len(values))[:n]
        x, y = values[rows, :n_inputs], values[rows, n_inputs:]
    else:  # time: the window is [0, 5)
        first = rng.integers(len(values) - n + 1)
        x, y = np.arange(n)[:, None] * 5 / n, values[first : first + n]
    order = rng.permutation(n)
    train, test = np.sort(order[: n // 2]), np.sort(order[n // 2 :])
    mean, scale = y[train].mean(0), y[train].std(0)
    y = (y - mean) / np.where(scale > 0, scale, 1.0)
    return x[train], y[train], x[test], y[test]


def _separate(x: ndarray, y: ndarray, new: ndarray, steps: int, trial: Trial) -> tuple[ndarray, ndarray]:
    """Return mean and deviation of a Gaussian process an output, one kernel each."""
    parts = []
    for column in y.T:
        model = GMOGPRegressor(n_iter=steps, normalize_y=False, device=trial.device, random_state=trial.seed)
        parts.append(model.fit(x, column).predict(new, return_std=True))
    return np.column_stack([mean for mean, _ in parts]), np.column_stack([std for _, std in parts])


def _shared(x: ndarray, y: ndarray, new: ndarray, steps: int, trial: Trial) -> tuple[ndarray, ndarray]:
    model = GMOGPRegressor(n_iter=steps, normalize_y=False, device=trial.device, random_state=trial.seed)
    mean, std = model.fit(x, y).predict(new, return_std=True)
    off = model.attention_[~np.eye(y.shape[1], dtype=bool)]
    trial.record("largest attention on another output", off.max() if len(off) else 0.0)
    return mean, std


def _gpytorch(
    x: ndarray, y: ndarray, new: ndarray, steps: int, trial: Trial, kind: str
) -> tuple[ndarray, ndarray]:
    """Return mean and deviation of one of two exact models of gpytorch.

    "each": every output has a sum of s scaled kernels of its own, with random lengthscales to
    begin with, since equal kernels would stay equal. "ICM": one kernel for inputs times a
    full covariance of outputs, over all n s observations; gpytorch factorises the two apart,
    as it may where every output is observed in every row.
    """
    gpytorch: Any = needs("gpytorch", "uncertainty")
    s, device = y.shape[1], trial.device
    inputs, targets, queries = (
        torch.tensor(part, dtype=torch.float64, device=device) for part in (x, y, new)
    )
    joint = kind == "ICM"
    batch = torch.Size([] if joint else [s])

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood: Any) -> None:
            super().__init__(inputs, targets if joint else targets.T, likelihood)
            mean = gpytorch.means.ConstantMean(batch_shape=batch)
            if joint:
                self.mean_module = gpytorch.means.MultitaskMean(mean, s)
                self.covar_module = gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), s, rank=s)
                return
            generator = torch.Generator().manual_seed(trial.seed)
            parts = []
            for _ in range(s):
                kernel = gpytorch.kernels.RBFKernel(batch_shape=batch)
                start = torch.randn(kernel.raw_lengthscale.shape, generator=generator)
                kernel.raw_lengthscale = torch.nn.Parameter(start)
                parts.append(gpytorch.kernels.ScaleKernel(kernel, batch_shape=batch))
            self.mean_module, self.covar_module = mean, gpytorch.kernels.AdditiveKernel(*parts)

        def forward(self, x: Tensor) -> Any:
            normal = gpytorch.distributions.MultivariateNormal
            normal = gpytorch.distributions.MultitaskMultivariateNormal if joint else normal
            return normal(self.mean_module(x), self.covar_module(x))

    noise = gpytorch.likelihoods.MultitaskGaussianLikelihood(s, has_global_noise=False) if joint else None
    likelihood = (noise or gpytorch.likelihoods.GaussianLikelihood(batch_shape=batch)).double().to(device)
    with seeded(trial.seed):
        model = Model(likelihood).double().to(device)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.9)
    with gpytorch.settings.max_cholesky_size(len(x)):  # exact throughout, ICM's two factors taken apart
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -objective(model(inputs), targets if joint else targets.T).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        likelihood.eval()
        with torch.no_grad():
            found = likelihood(model(queries))
            mean, std = (part.cpu().numpy() for part in (found.mean, found.variance.sqrt()))
    return (mean, std) if joint else (mean.T, std.T)


@comparison(
    paper="gmogp",
    says="Outputs that share latent processes through attention are predicted better than by separate Gaussian processes.",
    where="the paper's experiments",
    arms=("independent GPs", "independent GPs, s kernels each", "ICM", "GMOGP"),
    metric="root mean squared error, mean over outputs, in training deviations",
    better="lower",
    smallest={"steps": 3, "window": 40, "n_draws": 1},
    check=_fits,
)
def sharing(
    trial: Trial,
    data: Series = "two-scales",
    n_inputs: Annotated[int, Between(0)] = 0,
    window: Annotated[int, Between(8)] = 300,
    steps: Count = 150,
    n_draws: Count = 3,
) -> dict[str, float]:
    """Fit half of a window's rows in four ways and predict the other half; a trial is a mean over three windows.

    All arms have Adam with one rate, decay and number of steps. The second arm asks whether a
    richer kernel alone would do: every output has s kernels, none of them shared. The third is
    the exact coregional model, which also conditions on all outputs. Negative log-density and
    seconds are reported beside. The first ``n_inputs`` columns of ``data`` are inputs (2 for
    ``"five-digits"``, 21 for a CSV of KUKA's arm); with 0 it is time, and ``window`` rows of
    ``"etth1"`` are consecutive hours.

    A single kernel that settles on the slow scale takes the fast one for noise, and then the gap
    is wide; where it does not, all arms are close. Kernels that are not shared gain most of
    what shared ones gain here, and more when these settle on the slow scale too.
    """
    arms = {
        "independent GPs": _separate,
        "independent GPs, s kernels each": lambda *given: _gpytorch(*given, kind="each"),
        "ICM": lambda *given: _gpytorch(*given, kind="ICM"),
        "GMOGP": _shared,
    }
    errors: dict[str, list[float]] = {arm: [] for arm in arms}
    spent, densities = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
    for draw in range(n_draws):
        x, y, new, truth = _window(data, window, n_inputs, n_draws * trial.seed + draw)
        _separate(x, y, new, 1, trial)  # what a process does once is nobody's seconds
        for arm, predict in arms.items():
            start = time.perf_counter()
            mean, std = predict(x, y, new, steps, trial)
            spent[arm] += time.perf_counter() - start
            density = 0.5 * np.square((truth - mean) / std) + np.log(std) + 0.5 * math.log(2 * math.pi)
            densities[arm] += float(density.mean()) / n_draws
            errors[arm].append(float(np.sqrt(np.square(truth - mean).mean(0)).mean()))
    for arm in arms:
        trial.record(f"seconds, {arm}", spent[arm])
        trial.record(f"negative log-density, {arm}", densities[arm])
    return {arm: float(np.mean(each)) for arm, each in errors.items()}
