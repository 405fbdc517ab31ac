"""Densities and draws of a Gaussian process whose one-point predictions alone the chain rule is given."""

import torch
from torch.distributions import Normal

from posterity.uncertainty import ar_log_likelihood, ar_sample

AGAINST = "Gaussian processes in closed form, mean and covariance of 6,000 draws among them"
NOISE = 0.05


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    batch = x_context, y_context, x_target, y_target = [
        torch.tensor(stored[name]) for name in ("x_context", "y_context", "x_target", "y_target")
    ]
    orders = {name: name for name in ("given", "left-to-right", "random")}
    for name, order in (orders | {"explicit": torch.tensor(stored["explicit_order"])}).items():
        value = ar_log_likelihood(gaussian_process, *batch, order=order, generator=seed(3))
        yield f"log-density, order {name}", value, stored["joint"], 1e-7
    value = ar_log_likelihood(gaussian_process, x_context[:, :0], y_context[:, :0], *batch[2:], order="given")
    yield "log-density without context", value, stored["without_context"], 1e-7
    padded = [torch.cat([each, torch.full_like(each[:, :2], 7.0)], 1) for each in batch]
    masks = [torch.arange(each.shape[1]).expand(3, -1) < each.shape[1] - 2 for each in padded[::2]]
    value = ar_log_likelihood(
        gaussian_process, *padded, context_mask=masks[0], target_mask=masks[1], generator=seed(1)
    )
    yield "log-density of padded tasks", value, stored["joint"], 1e-7
    first = [each[:1] for each in (x_context, y_context, x_target[:, :5])]
    draws = ar_sample(gaussian_process, *first, 6000, order="random", generator=seed(2))
    y, smooth = draws.y[:, 0, :, 0], draws.smooth[:, 0, :, 0]
    yield "mean of the draws", y.mean(0), stored["mean"], 0.08
    yield "covariance of the draws", y.T.cov(), stored["covariance"], 0.1
    seen = torch.cat([y_context[0, :, 0].expand(20, -1), y[:20]], 1)
    yield "smooth draws", smooth[:20], seen @ torch.tensor(stored["smoother"]).T, 1e-7


def gaussian_process(x_context, y_context, x_target, *, context_mask=None):
    """Return the exact marginals: a conditional neural process without error."""
    real = x_context.new_ones(x_context.shape[:2]) if context_mask is None else context_mask.to(x_context)
    noise = torch.diag_embed(NOISE * real + 1 - real)
    gram = kernel(x_context, x_context) * real[:, :, None] * real[:, None] + noise
    cross = kernel(x_context, x_target) * real[:, :, None]
    weights = torch.linalg.solve(gram, cross)
    variance = 1 + NOISE - (weights * cross).sum(1)
    return Normal(weights.mT @ y_context, variance.sqrt()[..., None])


def kernel(a, b):
    return torch.exp(-0.5 * (a - b.mT) ** 2 / 0.7**2)


def seed(number):
    return torch.Generator().manual_seed(number)
