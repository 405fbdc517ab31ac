"""Race cluster discrimination on random classes and features with the full softmax and with ArcFace; and retrieval.

Run from the repository root: ``python -m benchmarks.representation.unicom``.
"""

import faiss
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.lab.memory import peak_bytes
from posterity.representation import ClusterDiscrimination, recall_at_k


class FullSoftmax(nn.Module):
    """Margin softmax over all classes and features, as the equation says."""

    def __init__(self, dim, n_classes, angular_margin=0.3, scale=32.0):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(n_classes, dim))
        self.angular_margin, self.scale = angular_margin, scale

    def forward(self, z, labels):
        cosine = (F.normalize(z, dim=1) @ F.normalize(self.weight, dim=1).T).clamp(-1, 1)
        with torch.no_grad():
            own = cosine.gather(1, labels[:, None])
            shifted = (own.acos() + self.angular_margin).cos()
        cosine = cosine.scatter_add(1, labels[:, None], shifted - own)
        return F.cross_entropy(self.scale * cosine, labels)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n, n_classes, dim = 256, 100_000, 512
    z, labels = torch.randn(n, dim, requires_grad=True), torch.randint(n_classes, (n,))
    full = FullSoftmax(dim, n_classes)
    ours = ClusterDiscrimination(dim, n_classes, class_rate=0.1, n_features=256, sparse=True)

    def step(loss, labels=labels):
        def work():
            loss.zero_grad()
            z.grad = None
            loss(z, labels).backward()

        return work

    # sparse gradients have no storage to count: a loss of the rows that are seen has as large a dense one
    few = ClusterDiscrimination(dim, n_classes // 10, n_features=256)
    sizes = [peak_bytes(work) / 2**20 for work in (step(full), step(few, labels % few.n_classes))]
    whole = ClusterDiscrimination(dim, n_classes)
    whole.weight.data = full.weight.data
    torch.testing.assert_close(whole(z, labels), full(z, labels))
    del whole
    race(f"step of 256 rows, 100,000 classes, 512 dimensions, a tenth of the classes and half of the dimensions, against "
         f"all ({sizes[1]:.0f} MiB of tensors alive instead of {sizes[0]:.0f})",
         step(ours), step(full), target=8, rounds=3)  # fmt: skip
    race("drawing classes and dimensions, against a tenth of that step",
         lambda: [(ours.sample_classes(labels), ours.sample_features()) for _ in range(10)], step(ours),
         target=1, rounds=3)  # fmt: skip
    arcface, few = ArcFaceLoss(n_classes // 10, dim), ClusterDiscrimination(dim, n_classes // 10)
    few_labels = labels % few.n_classes
    race("step of 256 rows, all of 10,000 classes, 512 dimensions, against pytorch-metric-learning's ArcFaceLoss",
         step(few, few_labels), step(arcface, few_labels), target=1, rounds=15,
         why="Half of both is the same product, the rest the same passes over the prototypes.")  # fmt: skip

    x, y = torch.randn(20_000, 512), torch.arange(20_000) % 2000

    def by_faiss():
        index = faiss.IndexFlatIP(512)
        unit = F.normalize(x, dim=1).numpy()
        index.add(unit)
        found = index.search(unit, 2)[1]
        return float((y[torch.from_numpy(found[:, 1])] == y).float().mean())

    faiss.omp_set_num_threads(1)
    assert abs(by_faiss() - float(recall_at_k(x, y))) < 1e-3
    race("recall at 1 of 20,000 in 512 dimensions, against faiss's flat index",
         lambda: recall_at_k(x, y), by_faiss, target=0.5, rounds=1)  # fmt: skip


if __name__ == "__main__":
    main()
