"""SI-NP: a training step against one decoder call and one dense normal a particle."""

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from benchmarks.timing import race
from posterity.uncertainty import SINP, self_normalized_weights


def by_loops(model: SINP, x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> Tensor:
    """Return the loss with particles one by one and log-densities of full covariance."""
    points, values = torch.cat([x, x_new], 1), torch.cat([y, y_new], 1)
    prior, proposal = model.prior(x, y), model.propose(points, values)
    z = proposal.sample((model.n_particles,))
    fits, priors, proposals = [], [], []
    for particle in z:
        seen = model.decoder(points, particle[None])
        fits.append(seen.log_prob(values).sum((0, 2, 3)))
        for normal, kept in ((prior, priors), (proposal, proposals)):
            kept.append(
                MultivariateNormal(normal.loc, scale_tril=torch.diag_embed(normal.scale)).log_prob(particle)
            )
    fit, log_prior, log_proposal = torch.stack(fits), torch.stack(priors), torch.stack(proposals)
    weights, baseline = self_normalized_weights(fit, log_prior, log_proposal)
    value = weights * fit + (weights - baseline) * log_prior + (weights - 1 / len(z)) * log_proposal
    return -(value.sum(0) / points.shape[1]).mean()


def main() -> None:
    """Run the race at the paper's sizes and at the claim's."""
    torch.manual_seed(0)
    for width, latent in ((128, 128), (64, 32)):
        _race(SINP(1, 1, dim_hidden=width, dim_latent=latent), f"width {width}, latent {latent}")


def _race(model: SINP, sizes: str) -> None:
    batch = [torch.rand(16, 20, 1) for _ in range(4)]

    def step(loss: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        loss.backward()

    race(f"training step, 8 particles, 16 tasks of 40 points, {sizes}, against loops",
         lambda: step(model.loss(*batch)), lambda: step(by_loops(model, *batch)), target=3, rounds=15)  # fmt: skip


if __name__ == "__main__":
    main()
