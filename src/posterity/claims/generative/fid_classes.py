"""Claims about what FID measures: it falls by drawing to the extractor's taste, and by its class histogram alone."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, comparison
from posterity.generative import (
    class_indicators,
    feature_stats,
    frechet_distance,
    match_class_histogram,
    resample_weights,
)
from posterity.lab import nets, training
from posterity.lab.data import ImageData, Labelled, load_labelled, split
from posterity.lab.data.needs import require_rest

Rows = Annotated[int, Between(50)]
DRAWS = 3  # of which the mean counts
LEAST = 100  # real samples, of which statistics are made


class Setting(NamedTuple):
    """An extractor, real samples that it has not seen, and principal components that a generator works in."""

    net: nn.Sequential
    real: ndarray
    y: ndarray
    shape: tuple[int, ...]
    pca: PCA
    scaler: StandardScaler | None
    trial: Trial

    @torch.no_grad()
    def seen(self, x: ndarray) -> tuple[Tensor, Tensor]:
        """Return the extractor's pre-logits and logits."""
        images = torch.from_numpy(x.astype(np.float32)).view(-1, *self.shape)
        pre = torch.cat([self.net[:-1](part.to(self.trial.device)) for part in images.split(1000)])
        return pre.cpu(), self.net[-1](pre).cpu()

    def unrelated(self, x: ndarray) -> Tensor:
        """Return features that no label shaped: a rectified random projection."""
        weight = np.random.default_rng(0).standard_normal((x.shape[1], 32)) / x.shape[1] ** 0.5
        return torch.from_numpy(np.maximum(x @ weight, 0))

    def distance(self, real: Tensor, candidates: Tensor, log_weights: Tensor) -> float:
        """Return the mean distance of sets as large as the real one, drawn by weights."""
        rng = torch.Generator().manual_seed(self.trial.seed)
        target = feature_stats(real)
        rows = [
            torch.multinomial(log_weights.exp(), len(real), replacement=True, generator=rng)
            for _ in range(DRAWS)
        ]
        return float(np.mean([float(frechet_distance(target, feature_stats(candidates[r]))) for r in rows]))


def _fits(data: ImageData, n_train: int, generated: str | None = None, **_: Any) -> None:
    require_rest(len(data.y), "n_train", n_train, LEAST, "samples")
    if generated is not None:
        _own(generated, data.x.shape[1:])


def _own(generated: str, shape: tuple[int, ...]) -> ndarray:
    """Return the rows of a user's samples, which have the shape and the range of the data."""
    try:
        x = np.load(generated, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"generated must be a .npy file of samples, got {generated}") from error
    if x.ndim in (2, 3):
        x = x[:, :, None, None] if x.ndim == 2 else x[:, None]
    if x.ndim == 4 and x.shape[1:] != shape:
        x = np.moveaxis(x, -1, 1)
    if x.dtype.kind not in "iuf" or x.shape[1:] != shape or len(x) < LEAST or not np.isfinite(x).all():
        raise ValueError(
            f"generated must hold at least {LEAST} finite samples of the shape of the data, {shape}, got {x.shape} of {x.dtype}"
        )
    return x.reshape(len(x), -1) / (255 if x.dtype == np.uint8 else 1)


def _setting(
    trial: Trial, data: str, target: str | None, n_train: int, width: int, network: str, epochs: int
) -> Setting:
    """Train an extractor on a part, and keep the rest as the real samples."""
    read = load_labelled(data, target=target)
    n = len(read.y)
    parts = split(n, (n_train / n, 1 - n_train / n), trial.seed, stratify=read.y)
    x = read.x.reshape(n, -1)
    # features may be of any unit; pixels are in [0, 1]
    scaler = StandardScaler().fit(x[parts[0]]) if read.x.shape[2:] == (1, 1) else None
    x = x if scaler is None else scaler.transform(x)
    n_classes, shape = len(read.classes), read.x.shape[1:]
    net = (
        nets.mlp(x.shape[1], n_classes, width=width, depth=1, seed=trial.seed)
        if network == "mlp"
        else nets.cnn(shape[0], n_classes, width=width, seed=trial.seed)
    )
    images = torch.from_numpy(x[parts[0]].astype(np.float32)).view(-1, *shape)
    training.fit(net, lambda net, x, y: F.cross_entropy(net(x), y), (images, torch.from_numpy(read.y[parts[0]])),
                 epochs=epochs, lr=3e-3, seed=trial.seed, device=trial.device)  # fmt: skip
    real = x[parts[1]]
    pca = PCA(min(24, real.shape[1], len(real) // 4), random_state=trial.seed).fit(real)
    return Setting(net, real, read.y[parts[1]], shape, pca, scaler, trial)


@comparison(
    paper="fid-classes",
    says="Drawing generated samples by the extractor's own features cuts FID; in unrelated features the same draw gains little.",
    where="Kynkäänniemi et al., Section 3 (FID against the FID of CLIP's features)",
    arms=("unrelated features", "extractor features"),
    metric="FID after resampling, divided by FID before",
    better="lower",
    smallest={"n_train": 300, "n_candidates": 300, "max_iter": 5, "epochs": 2},
    check=_fits,
)
def resampling(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n_train: Rows = 900,
    n_candidates: Rows = 5_000,
    max_iter: Count = 200,
    width: Count = 32,
    epochs: Count = 60,
    network: Literal["mlp", "cnn"] = "mlp",
    covariance: Literal["spherical", "diag", "full"] = "spherical",
    generated: str | None = None,
) -> dict[str, float]:
    """Resample what a generator made by the pre-logits of a classifier, and look at the same set twice.

    The extractor is trained on ``n_train`` samples; the others are real. The generator, a mixture of five Gaussians on
    their principal components, makes ``n_candidates``. One set of weights is found, for the pre-logits; both arms
    measure sets drawn by it against sets drawn uniformly, as many as there are real samples, with replacement, three
    times: one in the pre-logits, the other in a rectified random projection that no label shaped. No sample changes,
    so what the first gains over the second is the metric's. The record has the distances themselves, those in principal
    components of the samples too, and what as many draws from the real set itself are away from it: no draw gets
    below that, so that for a better generator (``covariance="full"``) there is less to gain, a half here.
    ``generated`` takes the samples of a generator of yours, an ``.npy`` of the shape and range of the data.
    At the paper's scale: 50,000 photographs, 250,000 candidates by StyleGAN2, Inception and CLIP. Nearer to it
    here: ``data="cifar10", n_train=6_000, n_candidates=30_000, network="cnn"``.
    """
    setting = _setting(trial, data, target, n_train, width, network, epochs)
    if generated is not None:
        made = _own(generated, setting.shape)
        made = made if setting.scaler is None else setting.scaler.transform(made)
    else:
        codes = setting.pca.transform(setting.real).astype(float)
        mixture = GaussianMixture(5, covariance_type=covariance, reg_covar=1e-4, random_state=trial.seed)
        made = setting.pca.inverse_transform(mixture.fit(codes).sample(n_candidates)[0])
    spaces: dict[str, Callable[[ndarray], Tensor]] = {
        "unrelated features": setting.unrelated,
        "extractor features": lambda x: setting.seen(x)[0],
        "principal components": lambda x: torch.from_numpy(setting.pca.transform(x)),
    }
    found = resample_weights(
        *(spaces["extractor features"](x) for x in (setting.real, made)), max_iter=max_iter
    )
    for k, value in enumerate(found.history.tolist()):
        trial.track("distance of the weighted candidates", k, value)
    ratio = {}
    for name, space in spaces.items():
        real, candidates = space(setting.real), space(made)
        before, after = (
            setting.distance(real, candidates, logs)
            for logs in (torch.zeros_like(found.log_weights), found.log_weights)
        )
        trial.record(f"FID of real draws, {name}", setting.distance(real, real, torch.zeros(len(real))))
        trial.record(f"FID before, {name}", before)
        trial.record(f"FID after, {name}", after)
        ratio[name] = after / before
    trial.record("ratio, principal components", ratio.pop("principal components"))
    return ratio


def _conditional(setting: Setting, shares: ndarray, n: int, rng: np.random.Generator) -> ndarray:
    """Return samples of a generator with a Gaussian a class, of the covariance of the class's real samples."""
    made = []
    for label, count in enumerate(rng.multinomial(n, shares)):
        rows = setting.pca.transform(setting.real[setting.y == label])
        if count:
            centre = rows.mean(0)
            mix = rng.standard_normal((count, len(rows))) / max(len(rows) - 1, 1) ** 0.5
            made.append(centre + mix @ (rows - centre))
    return setting.pca.inverse_transform(np.concatenate(made))


@comparison(
    paper="fid-classes",
    says="Where a generator's classes are skewed, aligning the histogram of top-1 classes alone lowers FID.",
    where="Kynkäänniemi et al., Section 3 (Top-N histograms)",
    arms=("random", "top-1 aligned"),
    metric="FID in the extractor's features of as many drawn as real samples",
    better="lower",
    smallest={"n_train": 300, "n_candidates": 300, "max_iter": 5, "epochs": 2},
    check=_fits,
)
def top1_alignment(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    n_train: Rows = 900,
    n_candidates: Rows = 5_000,
    max_iter: Count = 200,
    width: Count = 32,
    epochs: Count = 60,
    network: Literal["mlp", "cnn"] = "mlp",
) -> dict[str, float]:
    """Draw from candidates of skewed classes uniformly, and so that predicted classes are as frequent as real ones.

    The generator has a Gaussian for each class; how often it makes which is drawn from a symmetric Dirichlet
    distribution. Extractor, real samples and draws are those of ``resampling``. The weights look at the class of a
    sample and at nothing else. The controls are in the record: a generator with the real shares of classes, where there
    is nothing to align, and both generators resampled by the class in the middle of the logits, ``max_iter`` steps.
    """
    setting = _setting(trial, data, target, n_train, width, network, epochs)
    rng = np.random.default_rng(trial.seed)
    real, logits = setting.seen(setting.real)
    counts = np.bincount(setting.y, minlength=logits.shape[1])
    skewed = rng.dirichlet(np.ones((counts > 0).sum()))
    shares = {"skewed": np.zeros(len(counts)), "real shares": counts / counts.sum()}
    shares["skewed"][counts > 0] = skewed
    distance: dict[str, dict[str, float]] = {}
    for generator, share in shares.items():
        candidates, gen_logits = setting.seen(_conditional(setting, share, n_candidates, rng))
        middle = resample_weights(*class_indicators(logits, gen_logits, which="middle"), max_iter=max_iter)
        aligned = match_class_histogram(logits.argmax(1), gen_logits.argmax(1), n_classes=len(counts))
        ways = {"random": torch.zeros_like(aligned), "middle-1": middle.log_weights, "top-1 aligned": aligned}
        distance[generator] = {way: setting.distance(real, candidates, logs) for way, logs in ways.items()}
        for way, value in distance[generator].items():
            trial.record(f"FID, {generator}, {way}", value)
    return {way: distance["skewed"][way] for way in ("random", "top-1 aligned")}
