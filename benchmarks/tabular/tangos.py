"""A penalised step by closed form and by one batched gradient, against row-wise Jacobians; whole fits."""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.neural_network import MLPRegressor
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.tabular import TangosPenalty, TangosRegressor


def row_by_row(latent: nn.Module, x: Tensor, n_pairs: int = 50) -> Tensor:
    """Return the penalty as the official code computes it: vmap(jacrev), and a loop over pairs."""
    a = vmap(jacrev(lambda row: latent(row[None])[0]))(x).movedim(1, 0)  # (units, n, d)
    overlap = x.new_zeros(())
    for _ in range(n_pairs):
        i, j = np.random.choice(len(a), 2, replace=False)
        overlap = overlap + F.cosine_similarity(a[i], a[j], dim=1, eps=1e-6).abs().sum()
    return 10.0 * a.abs().mean() + 0.1 * overlap / (len(x) * n_pairs)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 51), nn.ReLU(), nn.Linear(51, 51), nn.ReLU())
    x = torch.randn(32, 50)
    drawn, every = TangosPenalty(), TangosPenalty(n_pairs=None)
    for name, ours, target in (
        ("closed form, 50 pairs", lambda: drawn(net, x).backward(), 6),
        ("closed form, all 1,275 pairs", lambda: every(net, x).backward(), 5),
        ("any network, 50 pairs", lambda: drawn(lambda x: net(x), x).backward(), 3),
    ):
        race(
            f"{name}, against vmap(jacrev) and a loop over 50 pairs",
            ours,
            lambda: row_by_row(net, x).backward(),
            target=target,
            rounds=101,
        )

    X, y = load_diabetes(return_X_y=True)
    X = np.column_stack([X, np.random.default_rng(0).standard_normal((len(X), 40))]).astype(np.float32)
    y = ((y - y.mean()) / y.std()).astype(np.float32)
    options = {"max_epochs": 30, "patience": 30, "random_state": 0}
    race(
        "a fit of 30 epochs, 442 x 50, against the same network without the regulariser",
        lambda: TangosRegressor(**options).fit(X, y),
        lambda: TangosRegressor(lambda_spec=0, lambda_orth=0, **options).fit(X, y),
        target=1 / 3,
        rounds=7,
        why="Attributions of every unit are differentiated once more, in steps of 32 rows that are small calls.",
    )
    peer = MLPRegressor(hidden_layer_sizes=(51, 51), batch_size=32, max_iter=30, early_stopping=True, validation_fraction=0.2,
                        n_iter_no_change=30, alpha=0.0, random_state=0)  # fmt: skip
    race(
        "the same fit against MLPRegressor at equal epochs",
        lambda: TangosRegressor(**options).fit(X, y),
        lambda: peer.fit(X, y),
        target=1 / 3,
        rounds=7,
        why="The same, and numpy's steps on 32 rows cost less to call than torch's.",
    )


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    main()
