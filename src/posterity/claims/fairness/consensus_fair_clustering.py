"""Claims about consensus fair clustering: it mixes groups that lie apart, and false group labels do not undo it."""

from typing import Annotated

import numpy as np
import pandas as pd
from numpy import ndarray
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from posterity.claims import Between, Count, NotNegative, PartOfAll, Several, Trial, comparison
from posterity.fairness import (
    ConsensusFairClustering,
    FairSpectralClustering,
    cluster_balance,
    coassociation_matrix,
    fairness_attack,
)
from posterity.lab.data import Table, TableData, dataset, load_table, split, table_encoder

CLASSES = {"two-groups": "class", "digits-and-negatives": "digit"}  # columns that are no feature
Rows = Annotated[int, Between(8)]


@dataset(Table, "two-groups")
def _two_groups(seed: int, n: int = 240, n_features: int = 8, n_classes: int = 4) -> TableData:
    """Return Gaussian classes, centers N(0, 2^2) and unit noise, which two groups of one size share."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 2, (n_classes, n_features))
    classes = rng.integers(0, n_classes, n)
    frame = pd.DataFrame(rng.normal(centers[classes]), columns=[f"x{k}" for k in range(n_features)])
    frame["class"] = [f"class {c}" for c in classes]
    return TableData(frame, np.arange(n) % 2, "classification", ("a", "b"))


@dataset(Table, "digits-and-negatives")
def _digits_and_negatives(seed: int) -> TableData:
    """Return scikit-learn's digits and their negatives: the group is the polarity."""
    digits = load_digits()
    X = np.concatenate([digits.data, 16 - digits.data])
    frame = pd.DataFrame(X, columns=[f"pixel{k}" for k in range(X.shape[1])])
    frame["digit"] = [str(y) for y in np.tile(digits.target, 2)]
    y = np.repeat(np.arange(2), len(digits.target))
    return TableData(frame, y, "classification", ("digit", "negative"))


def _features(table: TableData, classes: str | None) -> tuple[pd.DataFrame, ndarray | None]:
    """Return what is clustered, and the known classes where a column holds them."""
    if classes is None:
        return table.X, None
    if classes not in table.X:
        raise ValueError(f"classes must be one of {', '.join(map(str, table.X))}, got {classes!r}")
    return table.X.drop(columns=classes), table.X[classes].astype(str).to_numpy()


def _rows(groups: ndarray, n_rows: int | None, seed: int) -> ndarray:
    """Return rows of which each group has its share."""
    n = len(groups)
    return split(n, (min(1.0, (n_rows or n) / n),), seed, stratify=groups)[0]


def _attacked(groups: ndarray, share: float, seed: int) -> tuple[ndarray, ndarray]:
    """Return the samples whose groups the adversary sets, and all others."""
    attacked = max(1, round(share * len(groups))) / len(groups)
    return split(len(groups), (attacked, 1 - attacked), seed, stratify=groups)  # type: ignore[return-value]


def _fits(
    data: TableData,
    name: str,
    classes: str | None,
    n_rows: int | None,
    n_clusters: int,
    n_neighbors: int,
    attacked: float = 0.0,
    **_: object,
) -> None:
    """Refuse groups that cannot hold the clusters, whatever the adversary does."""
    X, _known = _features(data, classes or CLASSES.get(name))
    if X.empty or not X.notna().to_numpy().any():
        raise ValueError("no column beside the target and the classes has a value")
    if attacked and len(data.classes) != 2:
        raise ValueError(f"target must have two groups to be attacked, got {', '.join(data.classes[:5])}")
    groups = data.y[_rows(data.y, n_rows, 0)]
    if n_neighbors >= len(groups):
        raise ValueError(f"n_neighbors must be less than the {len(groups)} rows, got {n_neighbors}")
    left = groups[_attacked(groups, attacked, 0)[1]] if attacked else groups
    sizes = np.bincount(left, minlength=len(data.classes))
    if sizes.min() <= n_clusters:  # a row more, since other seeds divide the rows otherwise
        shown = ", ".join(f"{c} {size}" for c, size in zip(data.classes[:5], sizes, strict=False))
        raise ValueError(f"each group needs more than n_clusters={n_clusters} rows of its own, has {shown}")


def _drawn(
    data: str, target: str | None, classes: str | None, n_rows: int | None, shift: float, seed: int
) -> tuple[ndarray, ndarray | None, ndarray]:
    """Return features, known classes and groups; the second group moved in a random direction."""
    table = load_table(data, target=target, task="classification", seed=seed)
    X, known = _features(table, classes or CLASSES.get(data))
    rows = _rows(table.y, n_rows, seed)
    groups = table.y[rows]
    features = np.asarray(table_encoder().fit_transform(X.iloc[rows]), dtype=np.float64)
    direction = np.random.default_rng((seed, 1)).normal(size=features.shape[1])
    features[groups == 1] += shift * direction / np.linalg.norm(direction)
    return features, None if known is None else known[rows], groups


@comparison(
    paper="consensus-fair-clustering",
    says="When the groups are shifted apart, consensus fair clustering still mixes them where fair spectral clustering does not.",
    where="Chhabra et al., Section 4",
    arms=("fair spectral clustering", "k-means", "CFC"),
    metric="balance of the clusters",
    better="higher",
    smallest={"epochs": 3, "n_rows": 48, "n_runs": 5},
    check=_fits,
)
def fair_across_shift(
    trial: Trial,
    data: Table = "two-groups",
    target: str | None = None,
    classes: str | None = None,
    shift: NotNegative | None = None,
    n_rows: Rows | None = None,
    n_clusters: Several = 4,
    n_neighbors: Count = 10,
    alpha: NotNegative = 10.0,
    beta: NotNegative = 5.0,
    order: Count = 2,
    hidden: Count = 36,
    epochs: Count = 150,
    n_init: Count = 3,
    n_runs: Count = 100,
) -> dict[str, float]:
    """Cluster samples of two groups, one of which was moved in a random direction.

    The target is the protected group; ``classes`` is a column of known classes, which is not
    clustered but compared with the clusters: their mutual information is in the records.
    Columns are standardised, then the second group is moved by ``shift`` standard deviations:
    unless it is given 4 for the generated data, and 0 for any other, which is left as it is.
    At a shift of 2 all methods mix the groups. Fair spectral clustering has the neighbours with
    which it stays fair the longest, of 3 (official), 10 and 30. Real options:
    ``data="digits-and-negatives", n_clusters=10, beta=50, epochs=400, n_rows=800``, and with all
    rows and ``epochs=3_000``, hours on a CPU, the paper's; ``data="adult", target="sex",
    classes="income", n_rows=1_000``. The paper's other sets are a table of features with the
    group as target.
    """
    moved = (4.0 if data == "two-groups" else 0.0) if shift is None else shift
    X, known, groups = _drawn(data, target, classes, n_rows, moved, trial.seed)
    models = {
        "fair spectral clustering": FairSpectralClustering(
            n_clusters, n_neighbors=n_neighbors, random_state=trial.seed
        ),
        "k-means": KMeans(n_clusters, n_init=10, random_state=trial.seed),
        "CFC": ConsensusFairClustering(
            n_clusters, alpha=alpha, beta=beta, order=order, hidden=hidden, epochs=epochs, n_init=n_init,
            n_runs=n_runs, random_state=trial.seed, device=trial.device,
        ),
    }  # fmt: skip
    balance = {}
    for arm, model in models.items():
        seen = {} if arm == "k-means" else {"sensitive_features": groups}
        labels = model.fit(X, **seen).labels_
        balance[arm] = cluster_balance(labels, groups)
        if known is not None:
            trial.record(
                f"mutual information with the classes: {arm}", normalized_mutual_info_score(known, labels)
            )
    return balance


@comparison(
    paper="consensus-fair-clustering",
    says="After an attack on 30 % of the group labels consensus fair clustering is fairer than fair spectral clustering.",
    where="Chhabra et al., Section 4",
    arms=("fair spectral clustering", "CFC"),
    metric="balance of the samples not attacked, after the attack, mean over shifts",
    better="higher",
    smallest={"epochs": 3, "n_rows": 48, "n_runs": 5, "budget": 2, "n_init": 1, "shifts": (3.0,)},
    check=_fits,
    reason="An attack undoes consensus fair clustering on some draws and leaves it on others, which five seeds do not average out.",
)
def after_attack(
    trial: Trial,
    data: Table = "two-groups",
    target: str | None = None,
    classes: str | None = None,
    shifts: tuple[NotNegative, ...] | None = None,
    attacked: PartOfAll = 0.3,
    budget: Count = 6,
    n_rows: Rows | None = None,
    n_clusters: Several = 4,
    n_neighbors: Count = 10,
    alpha: NotNegative = 10.0,
    beta: NotNegative = 5.0,
    order: Count = 2,
    hidden: Count = 36,
    epochs: Count = 150,
    n_init: Count = 3,
    n_runs: Count = 100,
) -> dict[str, float]:
    """Attack both methods with one budget, and look at the samples whose groups are true.

    Data are those of ``fair_across_shift``, the generated ones at shifts of 2.5, 3 and 3.5:
    over them fair spectral clustering goes from mostly fair to never fair, without an attack.
    Nearer together both methods withstand it; at a shift of 4, and on 800 rows of the digits and
    their negatives, the attack undoes consensus fair clustering too. It loses more to the attack
    than the other method, which has less to lose: the figures before the attack are in the
    records, and both are drawn over the shifts. The co-association is computed once, since no
    group label has a part in it.
    """
    found: dict[str, list[tuple[float, float]]] = {"fair spectral clustering": [], "CFC": []}
    grid = ((2.5, 3.0, 3.5) if data == "two-groups" else (0.0,)) if shifts is None else shifts
    for shift in grid:
        X, _, groups = _drawn(data, target, classes, n_rows, shift, trial.seed)
        owned, judged = _attacked(groups, attacked, trial.seed)
        consensus = coassociation_matrix(X, n_clusters, n_runs=n_runs, random_state=trial.seed)
        models = {
            "fair spectral clustering": FairSpectralClustering(
                n_clusters, n_neighbors=n_neighbors, random_state=trial.seed
            ),
            "CFC": ConsensusFairClustering(
                n_clusters, alpha=alpha, beta=beta, order=order, hidden=hidden, epochs=epochs, n_init=n_init,
                coassociation=consensus, random_state=trial.seed, device=trial.device,
            ),
        }  # fmt: skip
        for arm, model in models.items():
            result = fairness_attack(
                lambda given, model=model, X=X: model.fit(X, sensitive_features=given).labels_,
                groups, owned, judged, budget=budget, random_state=trial.seed,
            )  # fmt: skip
            found[arm].append((result.clean_value, result.value))
            trial.track(f"before the attack: {arm}", shift, result.clean_value)
            trial.track(f"after the attack: {arm}", shift, result.value)
    mean = {arm: np.mean(pairs, axis=0) for arm, pairs in found.items()}
    for arm, (clean, _) in mean.items():
        trial.record(f"balance before the attack: {arm}", clean)
    return {arm: float(value) for arm, (_, value) in mean.items()}
