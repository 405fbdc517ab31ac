"""AR-CNP: likelihoods by prefix sums, samples by running sums, each against the loop of calls."""

import torch
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.uncertainty import CNP, ConvCNP, ar_log_likelihood, ar_sample


def _races(
    name: str, model: nn.Module, target: float, x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor
) -> None:
    def called(*args, **options):  # a plain callable is walked through, target by target
        return model(*args, **options)

    with torch.no_grad():
        race(f"likelihood, {name}, 16 tasks of 10 + 50 points, against the loop",
             lambda: ar_log_likelihood(model, x, y, x_new, y_new, order="given"),
             lambda: ar_log_likelihood(called, x, y, x_new, y_new, order="given"), target=target, rounds=5,
             why="Each context goes through the network by itself, in any way: the convolutions are the same.")  # fmt: skip
        race(f"8 samples, {name}, against the loop", lambda: ar_sample(model, x, y, x_new, 8, order="given"),
             lambda: ar_sample(called, x, y, x_new, 8, order="given"), target=1.0, rounds=3)  # fmt: skip


def main() -> None:
    """Run the races; the loop calls the model once a target, as the official code does."""
    torch.manual_seed(0)
    x, y, x_new, y_new = (torch.rand(16, size, 1) * 4 - 2 for size in (10, 10, 50, 50))
    models = {
        "CNP": (CNP(1, 1), 10.0),
        "ConvCNP": (
            ConvCNP(1, points_per_unit=16, channels=(32,) * 5, kernel_size=9, architecture="conv"),
            1.5,
        ),
        "ConvCNP, U-Net at 64 a unit": (ConvCNP(1), 1.5),
    }
    for name, (model, target) in models.items():
        _races(name, model, target, x, y, x_new, y_new)
    model = models["CNP"][0]
    with torch.no_grad():
        race("likelihood, CNP, against a padded batch of every (task, target) pair",
             lambda: ar_log_likelihood(model, x, y, x_new, y_new, order="given"),
             lambda: ar_log_likelihood(lambda *a, **o: model(*a, **o), x, y, x_new, y_new, order="given", chunk_size=800),
             target=10, rounds=5)  # fmt: skip


if __name__ == "__main__":
    main()
