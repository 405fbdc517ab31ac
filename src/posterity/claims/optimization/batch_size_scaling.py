"""Claims about batch sizes: a batch is sharper than the data by 1/b, predictably, and so rates grow with it."""

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.lab import nets, training
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.data.needs import require_rest
from posterity.lab.tasks import Training, Walk, entry
from posterity.optimization import (
    LanczosLearner,
    batch_extremes,
    effective_batch,
    extreme_eigenvalues,
    hessian_matvec,
    hessian_variance,
    max_learning_rate,
)

Samples = Annotated[int, Between(64)]


def _fits(data: ImageData, n_samples: int, **_: object) -> None:
    require_rest(len(data.y), "n_samples", n_samples, 0, "images")


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _drawn(trial: Trial, data: str, n_samples: int) -> tuple[Tensor, Tensor, int, torch.Generator]:
    """Return images, labels, the number of classes, and what draws from here on."""
    images, generator = load_images(data), torch.Generator().manual_seed(trial.seed)
    rows = torch.randperm(len(images.y), generator=generator)[:n_samples].numpy()
    x, y = torch.from_numpy(images.x[rows]), torch.from_numpy(images.y[rows])
    return x.to(trial.device), y.to(trial.device), len(images.classes), generator


def _spectra(
    trial: Trial, data: str, n_samples: int, net: str, width: int, steps: int, lr: float, n_batches: int
) -> dict[str, Any]:
    """Train, then measure the largest eigenvalue of batches of 8, 16, ... up to an eighth of the samples.

    The mean over batches leaves out v' (H_B - H) v at the whole set's own eigenvector v: on average over
    batches it is 0, and it is most of what single batches differ by.
    """
    x, y, n_classes, generator = _drawn(trial, data, n_samples)
    if net == "mlp":
        model = nets.mlp(x[0].numel(), n_classes, width=width, depth=1, act=nn.Tanh, seed=trial.seed)
    else:
        model = nets.cnn(x.shape[1], n_classes, width=width, seed=trial.seed)
    training.fit(model, _loss, (x, y), steps=steps, lr=lr, seed=trial.seed, device=trial.device)
    model.eval()
    dim, place = sum(p.numel() for p in model.parameters()), {"device": x.device, "generator": generator}
    bottom, top, _, vector = extreme_eigenvalues(hessian_matvec(model, _loss, (x, y)), dim, **place)
    found = hessian_variance(model, _loss, (x, y), max_samples=n_samples, generator=generator)
    sizes = [2**k for k in range(3, int(math.log2(n_samples)) - 2)]
    lows, excesses = [], []
    for size in sizes:
        low, excess = 0.0, 0.0
        for _ in range(n_batches):
            rows = torch.randperm(n_samples, generator=generator)[:size].to(x.device)
            matvec = hessian_matvec(model, _loss, (x[rows], y[rows]))
            ends = extreme_eigenvalues(matvec, dim, n_iter=30, **place)
            low += float(ends[0]) / n_batches
            excess += float(ends[1] - vector @ matvec(vector)) / n_batches
        lows.append(low)
        excesses.append(max(excess, 1e-6 * abs(float(top))))
    b = [effective_batch(size, n_samples) for size in sizes]
    predicted = [float(batch_extremes(top, found.top, each)) for each in b]
    for k, size in enumerate(sizes):
        trial.track("observed", size, float(top) + excesses[k])
        trial.track("predicted", size, predicted[k])
        trial.track("smallest, observed", size, lows[k])
        trial.track("smallest, noise's edge", size, float(batch_extremes(bottom, found.isotropic, b[k])))
    trial.record("training loss", float(_loss(model, x, y).detach()))
    trial.record("largest eigenvalue of the whole set", float(top))
    trial.record("variance along the top over the isotropic", float(found.top / found.isotropic))
    return {"b": b, "excess": excesses, "top": float(top), "predicted": predicted}


def _exponent(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@trend(
    paper="batch-size-scaling",
    says="The largest eigenvalue of a batch's Hessian exceeds the whole set's by an amount proportional to 1/b.",
    where="the perturbation of outliers in the batch Hessian",
    metric="exponent of the excess in b = B / (1 - B/N)",
    low=-1.5,
    high=-0.6,
    smallest={"n_samples": 128, "steps": 20, "n_batches": 2},
    check=_fits,
)
def excess(
    trial: Trial, data: Images = "digits", n_samples: Samples = 1024, net: Literal["mlp", "cnn"] = "mlp", width: Count = 8,
    steps: Count = 100, lr: Positive = 0.001, n_batches: Count = 20,
) -> float:  # fmt: skip
    """Fit a power law to batches of 8 to 128 images, drawn without replacement.

    Early in training, as here, one eigenvalue stands apart as the theory has it; after 400 steps at ten
    times the rate several are close, and the exponent is about -0.8.
    """
    found = _spectra(trial, data, n_samples, net, width, steps, lr, n_batches)
    return _exponent(found["b"], found["excess"])


@comparison(
    paper="batch-size-scaling",
    says="The spiked prediction of a batch's largest eigenvalue is closer than the whole set's own.",
    where="the perturbation of outliers in the batch Hessian",
    arms=("full Hessian", "prediction"),
    metric="mean |log(predicted / observed)| over batch sizes",
    better="lower",
    smallest={"n_samples": 128, "steps": 20, "n_batches": 2},
    check=_fits,
)
def prediction(
    trial: Trial, data: Images = "digits", n_samples: Samples = 1024, net: Literal["mlp", "cnn"] = "mlp", width: Count = 8,
    steps: Count = 100, lr: Positive = 0.001, n_batches: Count = 20,
) -> dict[str, float]:  # fmt: skip
    """Predict from the variance of samples' Hessians at the top eigenvector, with nothing fitted.

    The isotropic variance of the same Hessians predicts next to no excess.
    """
    found = _spectra(trial, data, n_samples, net, width, steps, lr, n_batches)
    observed = found["top"] + np.array(found["excess"])
    arms = {"full Hessian": np.full(len(observed), found["top"]), "prediction": np.array(found["predicted"])}
    return {arm: float(np.abs(np.log(value / observed)).mean()) for arm, value in arms.items()}


@trend(
    paper="batch-size-scaling",
    says="While noise rules, the largest stable learning rate of SGD grows with the batch size as a power near 1.",
    where="the linear scaling rule",
    metric="exponent of the largest stable rate in the batch size",
    low=0.5,
    high=1.2,
    smallest={"n_samples": 64, "steps": 8},
    check=_fits,
)
def largest_rate(
    trial: Trial, data: Images = "digits", n_samples: Samples = 1024, width: Count = 8, steps: Count = 200
) -> float:
    """Bisect the rate at which training from the start still lowers the loss, for batches of 4 to 32.

    Images are whitened: then the Hessian's largest eigenvalue is small beside a single sample's, and batches
    below about 28 have only noise. Batches are drawn with replacement, the same for all rates.
    """
    x, y, n_classes, generator = _drawn(trial, data, n_samples)
    centred = x.flatten(1) - x.flatten(1).mean(0)
    left, scale, _ = torch.linalg.svd(centred, full_matrices=False)
    x = left[:, scale > 1e-3 * scale[0]] * math.sqrt(n_samples)
    model = nets.mlp(x.shape[1], n_classes, width=width, depth=1, act=nn.Tanh, seed=trial.seed).to(x.device)
    params = list(model.parameters())
    start, loss = [p.detach().clone() for p in params], float(_loss(model, x, y).detach())
    found = hessian_variance(model, _loss, (x, y), max_samples=n_samples, generator=generator)
    trial.record("batch size below which noise rules", float(found.top / found.top_value**2))

    def stable(size: int, rate: float) -> bool:
        order = torch.Generator().manual_seed(trial.seed)
        optimizer = torch.optim.SGD(params, lr=rate)
        with torch.no_grad():
            for p, value in zip(params, start, strict=True):
                p.copy_(value)
        for _ in range(steps):
            rows = torch.randint(n_samples, (size,), generator=order).to(x.device)
            optimizer.zero_grad()
            _loss(model, x[rows], y[rows]).backward()
            optimizer.step()
        return float(_loss(model, x, y).detach()) < loss  # NaN is not

    sizes, rates = [4, 8, 16, 32], []
    for size in sizes:
        low, high = math.log(1e-4), math.log(1e3)
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (middle, high) if stable(size, math.exp(middle)) else (low, middle)
        rates.append(math.exp(low))
        trial.track("observed", size, rates[-1])
        trial.track("2 / l'", size, float(max_learning_rate(found, size)))
    return _exponent([float(size) for size in sizes], rates)


MEASURE = {"every": 50, "n_iter": 8}  # a product costs two gradients


@entry("optimizer", "SGD with rates by Lanczos", paper="batch-size-scaling")
def compared(train: Training, seed: int) -> Walk:
    """Return the best of four safety factors of rates that the curvature of batches gives, momentum 0.9."""

    def make(net: nn.Module, setting: float) -> Any:
        steps = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        learner = LanczosLearner(
            steps, net, lambda net, x, y: F.cross_entropy(net(x), y), safety=setting, learn_momentum=False,
            generator=torch.Generator().manual_seed(seed), **MEASURE,
        )  # fmt: skip
        done = 0

        def step(closure: Any, batch: Any) -> float:
            nonlocal done
            closure()
            steps.step()
            learner.observe(batch)
            learner.step()
            done += 1
            return 1.0 + (2.0 * MEASURE["n_iter"] if done % MEASURE["every"] == 1 else 0.0)

        return step

    return train.tuned(make, (0.01, 0.03, 0.1, 0.3))
