"""A measurement against a training step and a forward pass, and against restoring from a checkpoint on disk.

Run from the repository root: ``python -m benchmarks.labels.susceptibility``.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.labels import Susceptibility
from posterity.labels.susceptibility import _Copies, _undone


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    metric = Susceptibility(x, 10)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    def step_and_forward() -> None:
        step()
        with torch.no_grad():
            float(F.cross_entropy(net(x), y))

    copies = _Copies()

    def in_memory() -> None:
        with _undone(net, optimizer, copies):
            pass

    def on_disk() -> None:
        path = Path(folder) / "checkpoint.pt"
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
        stored = torch.load(path)
        net.load_state_dict(stored["net"])
        optimizer.load_state_dict(stored["optimizer"])

    step()
    size = sum(p.numel() for p in net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        race(f"a measurement of {size:,} parameters, against a step and a forward pass (within 15 %)",
             lambda: metric.update(net, optimizer), step_and_forward, target=1 / 1.15, rounds=31,
             why="Weights and moments are kept and put back, a pass over memory.")  # fmt: skip
        race(
            "keeping and putting back, against a checkpoint on disk", in_memory, on_disk, target=5, rounds=31
        )


if __name__ == "__main__":
    main()
