"""A training step against the full matrix product and its diagonal; anchors against a loop over training points."""

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import race
from posterity.transfer import BilinearPredictor, pairwise_deltas, select_anchors
from posterity.transfer.bilinear_transduction import _products

BATCH, OUT, EMBED = 1024, 16, 32


def whole_product(model: BilinearPredictor, anchor: Tensor, delta: Tensor) -> Tensor:
    """Return predictions as the official network makes them: all products, of which the diagonal is kept."""
    a = model.anchor_net(anchor).reshape(-1, model.out_features, model.n_embed)
    b = model.delta_net(delta).reshape(-1, model.n_embed, model.out_features)
    return products_and_more(a, b)


def products_and_more(a: Tensor, b: Tensor) -> Tensor:
    """Return the diagonal of the products of all rows with all columns."""
    return torch.diagonal(torch.matmul(a, b), dim1=1, dim2=2)


def loop(x: np.ndarray, x_train: np.ndarray, deltas: np.ndarray) -> list[int]:
    """Return anchors as the official search finds them: for each query a norm for each training point."""
    found = []
    for query in x:
        far = [np.min(np.linalg.norm(step - deltas, axis=1)) for step in query - x_train]
        found.append(int(np.argsort(far)[0]))
    return found


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    for hidden in ((32, 32), (512,)):
        model = BilinearPredictor(12, OUT, n_embed=EMBED, hidden=hidden)
        anchor, delta = torch.randn(2, BATCH, 12, generator=rng)
        race(
            f"forward and backward, 16 outputs, batch 1,024, hidden {hidden}, against all products and their diagonal",
            lambda model=model, a=anchor, d=delta: model(a, d).square().mean().backward(),
            lambda model=model, a=anchor, d=delta: whole_product(model, a, d).square().mean().backward(),
            target=1.5,
            rounds=51,
        )
    a, b = torch.randn(2, BATCH, OUT * EMBED, generator=rng)
    a, b = (each.requires_grad_() for each in (a, b))
    race(
        "forward and backward of the products alone",
        lambda: _products(a.view(-1, OUT, EMBED), b.view(-1, OUT, EMBED)).square().mean().backward(),
        lambda: products_and_more(a.view(-1, OUT, EMBED), b.view(-1, EMBED, OUT)).square().mean().backward(),
        target=1.5,
        rounds=51,
    )
    for d, target in ((3, 50), (12, 10)):
        x_train, x = torch.rand(1000, d, generator=rng), 1.5 * torch.rand(200, d, generator=rng)
        deltas = pairwise_deltas(x_train, 10_000, generator=rng)
        # the loop costs the same for each query: ten of them are timed on either side
        plain = [each.numpy() for each in (x[:10], x_train, deltas)]
        race(
            f"anchors among 1,000 points, 10,000 differences in {d} dimensions, against a loop over the points",
            lambda x=x, x_train=x_train, deltas=deltas: select_anchors(x[:10], x_train, deltas),
            lambda plain=plain: loop(*plain),
            target=target,
            rounds=3,
        )


if __name__ == "__main__":
    main()
