"""Claims about DeepGeoCCA: geodesics find a shared source, an encoder does where samples are few, and on images."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from posterity.claims import Between, Count, Positive, Trial, comparison
from posterity.lab.data import ImageData, Images, load_images
from posterity.lab.nets import seeded
from posterity.lab.selfsup import image_parts, knn_accuracy, require_parts, view_for
from posterity.lab.tasks import entry
from posterity.lab.tasks.self_supervised import Features, learned_features
from posterity.representation import DeepGeoCCA, GeodesicCCA, SPDEncoder, spd_log

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of a baseline, which gets the best in hindsight
Channels = Annotated[int, Between(4)]


def _sources(
    n: int, channels: int, samples: int, spread: float, seed: int
) -> tuple[ndarray, ndarray, ndarray]:
    """Return covariances of two views and the logarithm of the power of the source that they share.

    Each view mixes as many sources as it has channels; their powers are exp(N(0, 1)).
    """
    rng = np.random.default_rng(seed)
    log_power = rng.normal(size=(2, n, channels))
    log_power[1, :, 0] = log_power[0, :, 0]
    views = []
    for view in log_power:
        mix = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
        mix = mix * np.exp(spread * rng.normal(size=channels))
        signal = mix @ (np.exp(view / 2)[..., None] * rng.normal(size=(n, channels, samples)))
        views.append(signal @ signal.transpose(0, 2, 1) / samples)
    return *views, log_power[0, :, 0]


def _entries(s: ndarray) -> ndarray:
    rows, columns = np.triu_indices(s.shape[1])
    return s[:, rows, columns]


def _logarithms(s: ndarray) -> ndarray:
    return _entries(spd_log(torch.from_numpy(s)).numpy())


def _found(x: ndarray, y: ndarray, power: ndarray, n_train: int, ridge: float) -> float:
    """Return the correlation of the first score of a view with the shared source, on the other pairs."""
    model = GeodesicCCA(1, ridge=ridge).fit(x[:n_train], y[:n_train])
    return abs(float(np.corrcoef(model.transform(x[n_train:])[:, 0], power[n_train:])[0, 1]))


def _fits(channels: int, samples: int, **_: Any) -> None:
    if samples <= channels:
        raise ValueError(
            f"samples must be more than channels={channels}, so that covariances are positive definite, got {samples}"
        )


@comparison(
    paper="deepgeocca",
    says="Correlation along geodesics recovers the source that two sensor sets share; that of matrix entries does not.",
    where="Ju et al., the simulation",
    arms=("cca on entries", "cca on logarithms", "geodesic cca"),
    metric="correlation of the first score of a view with the shared log power, other pairs",
    better="higher",
    smallest={"pairs": 60},
    check=_fits,
)
def shared_source(
    trial: Trial,
    pairs: Annotated[int, Between(20)] = 300,
    channels: Channels = 6,
    samples: Annotated[int, Between(8)] = 100,
    spread: Positive = 0.7,
    problems: Count = 5,
) -> dict[str, float]:
    """Mix independent sources of two views of which one has the same power in both, and learn on half of the pairs.

    Entries get the ridge of five that is best in hindsight, the others 0.001. A power enters entries as it is, so that
    few trials decide; its logarithm is a coordinate. Logarithms of the matrices (log-Euclidean) find it as well: they
    lack invariance to the mixing, which here costs little. The correlation between the two scores is in the record.
    A trial is the mean over some problems.
    """
    totals = np.zeros(3)
    held_out = np.zeros(2)
    n_train = pairs // 2
    for problem in range(problems):
        x, y, power = _sources(pairs, channels, samples, spread, problems * trial.seed + problem)
        forms = [(_entries(x), _entries(y)), (_logarithms(x), _logarithms(y)), (x, y)]
        found = [
            [_found(*form, power, n_train, ridge) for ridge in (RIDGES if k == 0 else RIDGES[:1])]
            for k, form in enumerate(forms)
        ]
        totals += [max(each) for each in found]
        for k, form in enumerate((forms[0], forms[2])):
            model = GeodesicCCA(1).fit(*(v[:n_train] for v in form))
            held_out[k] += model.score(*(v[n_train:] for v in form))
    for name, value in zip(("entries", "geodesics"), held_out / problems, strict=True):
        trial.record(f"correlation of the two scores on other pairs, {name}", value)
    return dict(
        zip(
            ("cca on entries", "cca on logarithms", "geodesic cca"), (totals / problems).tolist(), strict=True
        )
    )


def _learned(
    x: Tensor, y: Tensor, latent: int, steps: int, lr: float, starts: int, seed: int
) -> tuple[DeepGeoCCA, float, int]:
    """Return a model trained on three quarters of the pairs at once, its correlation on the others, and its starts.

    It starts anew until the scores of the other pairs correlate by more than three standard errors, then goes on.
    """
    kept, tried = len(x) // 4, []

    def train(model: DeepGeoCCA, opt: torch.optim.Optimizer) -> float:
        for _ in range(steps):
            opt.zero_grad()
            model.loss(x[kept:], y[kept:]).backward()
            opt.step()
        scores = model.fit_directions(x[kept:], y[kept:]).project(x[:kept], y[:kept])
        return float(torch.corrcoef(torch.stack([z[:, 0] for z in scores if z is not None]))[0, 1])

    for start in range(starts):
        with seeded(starts * seed + start):
            sides = [SPDEncoder(v.shape[1], (), latent) for v in (x, y)]
            model = DeepGeoCCA(*sides, ridge=RIDGES[0]).double()
        opt = torch.optim.Adam(model.parameters(), lr=lr)
        tried.append((train(model, opt), model, opt))
        if tried[-1][0] > 3 / kept**0.5:
            break
    _, model, opt = max(tried, key=lambda each: each[0])
    return model, train(model, opt), len(tried)


@comparison(
    paper="deepgeocca",
    says="Where covariances have hardly more samples than channels, encoders that are trained to correlate find the shared source better than the closed form.",
    where="Ju et al., Section 4",
    arms=("geodesic cca", "DeepGeoCCA"),
    metric="correlation of the first score of a view with the shared log power, other pairs",
    better="higher",
    smallest={"steps": 3, "starts": 1, "pairs": 60, "channels": 4, "samples": 8},
    check=_fits,
)
def few_samples(
    trial: Trial,
    pairs: Annotated[int, Between(20)] = 400,
    channels: Channels = 20,
    samples: Annotated[int, Between(8)] = 22,
    spread: Positive = 0.7,
    latent: Annotated[int, Between(1, 4)] = 2,
    steps: Count = 100,
    lr: Positive = 0.1,
    starts: Count = 32,
) -> dict[str, float]:
    """Learn 2 x 2 latents, and test on 200 other pairs.

    Two starts of three end in a poor optimum, where the training correlation is chance; so the encoders start anew
    until the correlation of a quarter of the pairs, kept from training, is not.
    The logarithm of a large covariance of few samples is mostly noise; an encoder projects before it takes one. The
    closed form has the best of five ridges in hindsight. With 100 samples a covariance both are level, and with fewer
    than about 150 pairs encoders overfit, at times altogether.
    """
    x, y, power = _sources(pairs + 200, channels, samples, spread, trial.seed)
    closed = [_found(x, y, power, pairs, ridge) for ridge in RIDGES]
    for ridge, value in zip(RIDGES, closed, strict=True):
        trial.track("geodesic cca by ridge", ridge, value)
    views = torch.from_numpy(x), torch.from_numpy(y)
    model, correlation, tried = _learned(*(v[:pairs] for v in views), latent, steps, lr, starts, trial.seed)
    score, _ = model.project(views[0][pairs:])
    assert score is not None
    trial.record("correlation of the two scores on pairs kept from training, DeepGeoCCA", correlation)
    trial.record("starts, DeepGeoCCA", tried)
    return {
        "geodesic cca": max(closed),
        "DeepGeoCCA": abs(float(np.corrcoef(score[:, 0], power[pairs:])[0, 1])),
    }


def _regions(x: Tensor) -> Tensor:
    """Return covariances (n, 5, 5) over an image of place, intensity and its slopes; a little is added to all."""
    grey = x.mean(1).double()
    down, right = torch.gradient(grey, dim=(1, 2))
    rows, columns = (torch.linspace(-1, 1, size, dtype=grey.dtype) for size in grey.shape[1:])
    parts = [rows[:, None].expand_as(grey), columns.expand_as(grey), grey, down, right]
    z = torch.stack([part.flatten(1) for part in parts], 1)
    z = z - z.mean(2, keepdim=True)
    return z @ z.mT / z.shape[2] + 1e-3 * torch.eye(5, dtype=z.dtype)


def _fits_images(data: ImageData, **_: Any) -> None:
    require_parts(data)
    if min(data.x.shape[2:]) < 3:
        raise ValueError(f"images must have at least 3 x 3 pixels, to have slopes, has {data.x.shape[2:]}")


@comparison(
    paper="deepgeocca",
    says="Of the covariances of two views of an image, geodesic correlation keeps more of its class than correlation of entries.",
    where="Ju et al., Section 4, on other data",
    arms=("cca on entries", "geodesic cca"),
    metric="accuracy of 20 nearest neighbours in canonical scores",
    better="higher",
    smallest={"n_components": 2},
    check=_fits_images,
)
def images(
    trial: Trial, data: Images = "digits", n_components: Annotated[int, Between(1, 15)] = 15
) -> dict[str, float]:
    """Describe an image by the covariance of place, intensity and slopes, and correlate two random views of it.

    Both get the ridge of five that is best in hindsight. All 15 components count by default: of 5 they are level.
    """
    parts = image_parts(load_images(data), trial.seed)
    draws = torch.Generator().manual_seed(trial.seed)
    views = [_regions(view_for(parts.x)(parts.x, draws)).numpy() for _ in range(2)]
    train, test = (_regions(x).numpy() for x in (parts.x, parts.x_test))

    def accuracy(form: Callable[[ndarray], ndarray], ridge: float) -> float:
        model = GeodesicCCA(n_components, ridge=ridge).fit(*map(form, views))
        scores = [torch.from_numpy(model.transform(form(s))) for s in (train, test)]
        return knn_accuracy(scores[0], parts.y, scores[1], parts.y_test)

    return {
        "cca on entries": max(accuracy(_entries, ridge) for ridge in RIDGES),
        "geodesic cca": max(accuracy(lambda s: s, ridge) for ridge in RIDGES),
    }


@entry("self-supervised", "correlation of views", paper="deepgeocca")
def correlation(train: Tensor, seed: int) -> Features:
    """Return features learned by correlating projected views, which as vectors need no geometry."""
    model = DeepGeoCCA(nn.Identity(), nn.Identity(), n_components=32, ridge=1.0)
    return learned_features(train, model.loss, seed, projector=(256, 64), last_norm=True)
