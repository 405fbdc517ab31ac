"""Claims about the rarity score: it finds the rare among the real, and truncation makes samples less rare."""

from typing import Annotated, Any

import numpy as np
import torch
from numpy import ndarray
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from posterity._checks import needs
from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.generative import RarityManifold, rarity_score, realism_score
from posterity.lab import pretrained
from posterity.lab.data import ImageData, Labelled, Points, load_labelled, load_points
from posterity.lab.data.needs import require_rows
from posterity.lab.metrics import rank_correlation

TRUNCATIONS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EXTRACTORS = "pixels, pca, or transformers: and a model's folder or name"
COMPONENTS = 50  # of the principal components, at most


def _loaded(extractor: str, what: str) -> Any:
    """Return the configuration or the model that an extractor names, None for pixels and components."""
    if extractor in ("pixels", "pca"):
        return None
    kind, _, model = extractor.partition(":")
    if kind != "transformers" or not model:
        raise ValueError(f"extractor must be {EXTRACTORS}, got {extractor!r}")
    made = getattr(needs("transformers", "transfer"), what)
    return pretrained.load(made, model, f"extractor must be {EXTRACTORS}", extractor)


def _fits(
    data: ImageData, rare: int, n_rare: int, n_common: int, queries: int, k: int, extractor: str,
    corrupted: int, **_: object,
) -> None:  # fmt: skip
    if _loaded(extractor, "AutoConfig") is not None and data.x.shape[1] not in (1, 3):
        raise ValueError(
            f"extractor {extractor!r} needs images of 1 or 3 channels, data have {data.x.shape[1]}"
        )
    if n_rare >= n_common:
        raise ValueError(f"n_rare must be less than n_common={n_common}, got {n_rare}")
    large = _large(data.y, n_common + queries)
    if len(large) <= rare:
        raise ValueError(
            f"{rare + 1} classes of n_common + queries = {n_common + queries} examples are needed, has {len(large)}"
        )
    if k >= rare * n_rare + (len(large) - rare) * n_common:
        raise ValueError(f"k must be less than the number of reference samples, got {k}")
    if corrupted > queries * len(large):
        raise ValueError(
            f"corrupted must be at most the {queries * len(large)} held-out examples, got {corrupted}"
        )


def _large(y: ndarray, least: int) -> ndarray:
    """Return the classes that have enough examples."""
    return np.flatnonzero(np.bincount(y) >= least)


def _features(extractor: str, parts: tuple[ndarray, ...], device: str) -> list[torch.Tensor]:
    """Return the features of images (n, c, h, w); what is fitted is fitted to the first part, the reference."""
    net = _loaded(extractor, "AutoModel")
    if net is None:
        flat = [x.reshape(len(x), -1).astype(np.float64) for x in parts]
        if extractor == "pca":
            pca = PCA(min(COMPONENTS, *flat[0].shape), svd_solver="full").fit(flat[0])
            flat = [pca.transform(x) for x in flat]
        return [torch.from_numpy(x).to(device) for x in flat]
    config = getattr(net.config, "vision_config", net.config)
    net = getattr(net, "vision_model", net).eval().to(device)
    size = config.image_size if hasattr(config, "image_size") else 224
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # of ImageNet
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)
    found = []
    for part in parts:
        rows = []
        for x in torch.from_numpy(part).float().split(64):
            x = F.interpolate(
                x.to(device).clamp(0, 1).expand(-1, 3, -1, -1), size, mode="bilinear", antialias=True
            )
            with torch.no_grad():
                made = net(pixel_values=(x - mean) / std)
            pooled = getattr(made, "pooler_output", None)
            rows.append((made.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1).float())
        found.append(torch.cat(rows))
    return found


@comparison(
    paper="rarity-score",
    says="The score finds samples that are rare but real, where distance to the data finds artefacts.",
    where="Han et al., Section 3 and the comparison with realism",
    arms=("nearest-distance", "negative-realism", "rarity"),
    metric="average precision of ranking held-out examples of rare classes above common and corrupted ones",
    better="higher",
    smallest={"queries": 20, "corrupted": 40},
    check=_fits,
)
def finds_rare(
    trial: Trial,
    data: Labelled = "digits",
    target: str | None = None,
    rare: Count = 2,
    n_rare: Count = 15,
    n_common: Count = 110,
    queries: Count = 60,
    corrupted: Count = 150,
    noise: Positive = 0.25,
    k: Count = 5,
    extractor: str = "pixels",
) -> dict[str, float]:
    """Rank held-out examples by three scores against a reference in which some classes are rare.

    Of ``rare`` classes, drawn by the seed, the reference has ``n_rare`` examples each, of the
    others ``n_common``; classes of fewer than ``n_common + queries`` examples are left out. Ranked
    are ``queries`` held-out examples a class, and ``corrupted`` copies of some of them with normal
    noise of ``noise`` times the range of the reference. The arms share reference, features, and k;
    nothing is tuned. A sample outside every ball has the rank of a score of 0.

    ``extractor`` is "pixels", "pca" (up to 50 components of the reference), or "transformers:" and
    the folder or name of a vision model, which gets pixels in [0, 1] normalised as ImageNet's; for
    cifar10 take one. The score fails where noise leaves samples inside the balls, and where a rare
    class is as dense, in these features, as a common one.
    """
    read = load_labelled(data, target=target)
    rng = np.random.default_rng(trial.seed)
    classes = rng.permutation(_large(read.y, n_common + queries))
    reference, held, is_rare = [], [], []
    for place, label in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(read.y == label))
        reference.append(rows[: n_rare if place < rare else n_common])
        held.append(rows[n_common : n_common + queries])
        is_rare.append(np.full(queries, place < rare))
    held, is_rare = np.concatenate(held), np.concatenate(is_rare)
    real = read.x[np.concatenate(reference)]
    spoilt = read.x[rng.choice(held, corrupted, replace=False)]
    spoilt = spoilt + noise * np.ptp(real) * rng.standard_normal(spoilt.shape)
    shown = np.concatenate([read.x[held], spoilt])
    positive = np.concatenate([is_rare, np.zeros(corrupted, dtype=bool)])
    ref, made = _features(extractor, (real, shown), trial.device)
    found = rarity_score(ref, made, k)
    nearest = NearestNeighbors(n_neighbors=1).fit(ref.cpu().numpy()).kneighbors(made.cpu().numpy())[0][:, 0]
    scores = {
        "nearest-distance": nearest,
        "negative-realism": -realism_score(ref, made, k).cpu().numpy(),
        "rarity": found.score.nan_to_num(0.0).cpu().numpy(),
    }
    inside = found.inside.cpu().numpy()
    trial.record("inside, rare", inside[positive].mean())
    trial.record("inside, common", inside[: len(held)][~is_rare].mean())
    trial.record("inside, corrupted", inside[len(held) :].mean())
    for arm, score in scores.items():
        trial.record(f"area under the ROC curve, {arm}", roc_auc_score(positive, score))
    return {arm: float(average_precision_score(positive, score)) for arm, score in scores.items()}


def _truncatable(data: ndarray, n_reference: int, components: int, dims: int, **_: object) -> None:
    require_rows(len(data), "points", 4 * components)
    if n_reference > len(data):
        raise ValueError(f"n_reference must be at most the {len(data)} points, got {n_reference}")
    if n_reference < 2 * components:
        raise ValueError(
            f"n_reference must be at least twice components, {2 * components}, got {n_reference}"
        )


@trend(
    paper="rarity-score",
    says="Truncating a generator makes its samples less rare.",
    where="Han et al., the truncation study",
    metric="rank correlation of truncation, 0.4 to 1, and the mean rarity of the samples inside",
    low=0.95,
    smallest={"n_samples": 300, "n_reference": 600},
    check=_truncatable,
)
def truncation(
    trial: Trial,
    data: Points = "digits",
    n_reference: Annotated[int, Between(20)] = 1_797,
    n_samples: Annotated[int, Between(10)] = 2_000,
    components: Count = 10,
    dims: Count = 24,
    k: Annotated[int, Between(1, 10)] = 3,
) -> float:
    """Sample a mixture of full-covariance Gaussians with deviations scaled by the truncation.

    The mixture is fitted to principal components of the points, as many as ``dims`` or as there
    are, and scored in them against these points. Every truncation has the same components and the
    same normal draws. The fraction inside falls as the mean rises: curves and records have both.
    """
    points = load_points(data, seed=trial.seed)
    rng = np.random.default_rng(trial.seed)
    x = points[rng.permutation(len(points))[:n_reference]].astype(np.float64)
    x = PCA(min(dims, *x.shape), svd_solver="full").fit_transform(x)
    mixture: Any = GaussianMixture(components, reg_covar=1e-6 * x.var(), random_state=trial.seed).fit(x)
    which = rng.choice(components, n_samples, p=mixture.weights_ / mixture.weights_.sum())
    noise = rng.standard_normal((n_samples, x.shape[1]))
    noise = np.einsum("nij,nj->ni", np.linalg.cholesky(mixture.covariances_)[which], noise)
    manifold = RarityManifold(torch.from_numpy(x).to(trial.device), k_max=k)
    means = []
    for psi in TRUNCATIONS:
        found = manifold(torch.from_numpy(mixture.means_[which] + psi * noise), k)
        means.append(float(found.mean()))
        trial.track("mean rarity", psi, means[-1])
        trial.track("fraction inside", psi, float(found.rate()))
        if psi in (TRUNCATIONS[0], TRUNCATIONS[-1]):
            trial.record(f"mean rarity at {psi}", means[-1])
            trial.record(f"fraction inside at {psi}", float(found.rate()))
    return rank_correlation(TRUNCATIONS, means)
