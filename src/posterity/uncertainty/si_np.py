"""SI-NP: a latent neural process trained for the likelihood of what it predicts.

A latent neural process says log p(y | context) = log E[ p(y | z) ], z from a prior that
depends on the context. The usual evidence bound also trains a posterior q(z | all data) and
lets it stand in for that prior, whose gap to it remains. Here the likelihood itself is
raised, by expectation maximisation: particles z_k from a proposal q get weights

    w_k  ~  p(y | z_k) p(z_k | context) / q(z_k),        sum_k w_k = 1,              (1)

and, particles and weights held still, the step climbs

    sum_k  w_k log p(y | z_k) + (w_k - b_k) log p(z_k | context)
           + (w_k - 1/K) log q(z_k).                                                 (2)

The b_k, (1) without the likelihood, and 1/K are control variates: of mean zero, they only
calm the gradient. No gradient goes through z_k; if one did, log p(z_k | context) would pay
for a prior that shrinks to a point.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from posterity._checks import floating, integer, one_of, within
from posterity._precision import wide, widened
from posterity.uncertainty._neural_process import Tasks, drawn, log_prob, mlp, predictive_log_density, tasks

__all__ = ["SINP", "self_normalized_weights"]


@widened
def self_normalized_weights(
    log_likelihood: Float[Tensor, "particles tasks"],
    log_prior: Float[Tensor, "particles tasks"],
    log_proposal: Float[Tensor, "particles tasks"],
) -> tuple[Tensor, Tensor]:
    """Return the weights of particles, equation 1, and their baselines.

    Parameters
    ----------
    log_likelihood, log_prior, log_proposal : Tensor of shape (particles, tasks)
        ``log p(y | z_k)``, ``log p(z_k | context)`` and ``log q(z_k)``.

    Returns
    -------
    weights, baseline : Tensor of shape (particles, tasks)
        Each sums to 1 over the particles; without gradients.

    Raises
    ------
    ValueError
        If shapes differ, or all particles of a task have no weight.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import self_normalized_weights
    >>> zero = torch.zeros(2, 1)
    >>> self_normalized_weights(torch.tensor([[0.75], [0.25]]).log(), zero, zero)[0]
    tensor([[0.7500],
            [0.2500]])
    """
    for name, value in (("log_prior", log_prior), ("log_proposal", log_proposal)):
        if floating(name, value).shape != floating("log_likelihood", log_likelihood).shape or value.ndim != 2:
            raise ValueError(
                f"{name} must have the shape (particles, tasks) of log_likelihood, "
                f"got {tuple(value.shape)} and {tuple(log_likelihood.shape)}"
            )
    if not len(log_likelihood):
        raise ValueError("log_likelihood must have at least one particle, got none")
    ratio = (log_prior - log_proposal).detach()
    joint = log_likelihood.detach() + ratio
    for name, value in (
        ("log_likelihood + log_prior - log_proposal", joint),
        ("log_prior - log_proposal", ratio),
    ):
        if value.device.type == "cpu" and bool((lost := ~torch.isfinite(value.amax(0))).any()):
            raise ValueError(
                f"{name} must be finite for some particle, is {float(value.amax(0)[lost][0])} at best "
                f"in task {int(lost.nonzero()[0])}"
            )
    return joint.softmax(0), ratio.softmax(0)


class SINP(nn.Module):
    """Neural process with a latent prior, trained by expectation maximisation.

    Parameters
    ----------
    dim_x, dim_y : int
        Sizes of inputs and outputs of the functions.
    dim_hidden, dim_latent : int, default=128
        Width of every network, and size of z.
    n_particles : int, default=8
        Drawn for each task of a training step.
    proposal : {"learned", "prior"}, default="learned"
        Where they come from: an encoder of its own that sees all points of the task, or
        the prior itself.
    n_encoder_layers, n_decoder_layers : int
        Hidden layers behind the first.
    control_variate : bool, default=True
        Whether the baselines of equation 2 are subtracted.
    min_scale : float, default=0.1
        Smallest scale of a prediction, in (0, 1].

    Attributes
    ----------
    last_ess_ : Tensor of shape (tasks,)
        Effective number of particles of the last call of `loss`: 1 to ``n_particles``.

    Raises
    ------
    ValueError
        If a size is less than 1, ``proposal`` is unknown or ``min_scale`` outside (0, 1].

    Notes
    -----
    1. The published code draws from the prior by default and lets gradients through the
       particles; the prior then shrinks to a point. This follows the paper's derivation.
    2. Predictions draw z from the prior given the context, never from the proposal.
    3. Nothing bounds the scale of z. At a constant learning rate it can grow until training
       breaks (Adam at 2e-3: after some 3,000 steps); let the rate fall in long runs.

    References
    ----------
    .. [1] Wang, Federici, van Hoof. Bridge the Inference Gaps of Neural Processes via
       Expectation Maximization. ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import SINP
    >>> model = SINP(dim_x=1, dim_y=1, dim_hidden=32, dim_latent=16)
    >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)  # 4 functions, 10 points each
    >>> model.loss(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]).backward()
    >>> model(x[:, :6], y[:, :6], torch.rand(4, 50, 1), n_samples=3).loc.shape
    torch.Size([3, 4, 50, 1])
    """

    def __init__(
        self, dim_x: int, dim_y: int, *, dim_hidden: int = 128, dim_latent: int = 128, n_particles: int = 8,
        proposal: Literal["learned", "prior"] = "learned", n_encoder_layers: int = 3, n_decoder_layers: int = 5,
        control_variate: bool = True, min_scale: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (
            ("dim_x", dim_x), ("dim_y", dim_y), ("dim_hidden", dim_hidden), ("dim_latent", dim_latent),
            ("n_particles", n_particles), ("n_encoder_layers", n_encoder_layers),
            ("n_decoder_layers", n_decoder_layers),
        ):  # fmt: skip
            integer(name, size, 1)
        self.dim_x, self.dim_y, self.n_particles = dim_x, dim_y, n_particles
        self.proposal = one_of("proposal", proposal, ("learned", "prior"))
        self.control_variate, self.min_scale = (
            control_variate,
            within("min_scale", min_scale, 0, 1, open_low=True),
        )
        encoder = (dim_x + dim_y, dim_hidden, dim_latent, n_encoder_layers)
        self.prior_encoder = _LatentEncoder(*encoder)
        self.proposal_encoder = _LatentEncoder(*encoder) if proposal == "learned" else None
        self.decoder = _Decoder(dim_x, dim_latent, dim_hidden, dim_y, n_decoder_layers, min_scale)
        self.last_ess_: Tensor | None = None

    def prior(
        self,
        x_context: Float[Tensor, "tasks n dim_x"],
        y_context: Float[Tensor, "tasks n dim_y"],
        context_mask: Bool[Tensor, "tasks n"] | None = None,
    ) -> Normal:
        """Return the distribution of z given a context, of shape (tasks, dim_latent).

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        context_mask : Tensor of shape (tasks, n), bool, optional
            True for a real point.

        Returns
        -------
        Normal
        """
        return self.prior_encoder(*self._set(x_context, y_context, context_mask))

    def propose(
        self,
        x: Float[Tensor, "tasks n dim_x"],
        y: Float[Tensor, "tasks n dim_y"],
        mask: Bool[Tensor, "tasks n"] | None = None,
    ) -> Normal:
        """Return the learned proposal given all points of a task, of shape (tasks, dim_latent).

        Parameters
        ----------
        x, y : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
        mask : Tensor of shape (tasks, n), bool, optional
            True for a real point.

        Returns
        -------
        Normal

        Raises
        ------
        ValueError
            If particles are drawn from the prior.
        """
        if self.proposal_encoder is None:
            raise ValueError(
                'propose needs proposal="learned", got proposal="prior": particles are the prior\'s'
            )
        return self.proposal_encoder(*self._set(x, y, mask))

    def forward(
        self,
        x_context: Float[Tensor, "tasks n dim_x"],
        y_context: Float[Tensor, "tasks n dim_y"],
        x_target: Float[Tensor, "tasks m dim_x"],
        *,
        context_mask: Bool[Tensor, "tasks n"] | None = None,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Normal:
        """Return predictions for draws of z; one z serves all targets of its sample.

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        x_target : Tensor of shape (tasks, m, dim_x)
        context_mask : Tensor of shape (tasks, n), bool, optional
            True for a real point.
        n_samples : int, default=1
        generator : torch.Generator, optional

        Returns
        -------
        Normal
            loc and scale of shape (n_samples, tasks, m, dim_y).
        """
        integer("n_samples", n_samples, 1)
        batch = tasks(x_context, y_context, x_target, None, context_mask, dim_x=self.dim_x, dim_y=self.dim_y)
        return self._predict(batch, n_samples, generator)

    def _predict(self, batch: Tasks, n_samples: int, generator: torch.Generator | None) -> Normal:
        prior = self.prior_encoder(batch.x_context, batch.y_context, batch.context_mask)
        return self.decoder(batch.x_target, self._draw(prior, batch, n_samples, generator))

    def log_likelihood(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, y_target: Tensor, *,
        context_mask: Tensor | None = None, target_mask: Tensor | None = None, n_samples: int = 32,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Return an estimate of the log-density of the real targets of each task.

        The logarithm of the mean over draws of z: it grows with ``n_samples`` on average, so
        compare models at equal numbers.

        Parameters
        ----------
        x_context, y_context : Tensor of shape (tasks, n, dim_x) and (tasks, n, dim_y)
            n may be 0.
        x_target, y_target : Tensor of shape (tasks, m, dim_x) and (tasks, m, dim_y)
        context_mask, target_mask : Tensor of shape (tasks, n) and (tasks, m), bool, optional
            True for a real point; what is padded has no effect.
        n_samples : int, default=32
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape (tasks,)
            Summed over targets and outputs, in nats.
        """
        integer("n_samples", n_samples, 1)
        batch = self._tasks(x_context, y_context, x_target, y_target, context_mask, target_mask)
        predictive = self._predict(batch, n_samples, generator)
        each = predictive_log_density(predictive, batch.y_target, batch.target_mask)
        return (each.logsumexp(0) - torch.log(each.new_tensor(float(n_samples)))).to(y_target.dtype)

    def loss(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, y_target: Tensor, *,
        context_mask: Tensor | None = None, target_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the negative of equation 2 a point, its mean over tasks.

        Its gradient is what counts; the value is no likelihood. The likelihood in it is
        that of all points of a task, context and targets.

        Parameters
        ----------
        x_context, y_context, x_target, y_target : Tensor
            As for `log_likelihood`.
        context_mask, target_mask : Tensor, optional
            As for `log_likelihood`.
        generator : torch.Generator, optional
            Draws the particles.

        Returns
        -------
        Tensor
            A scalar.
        """
        batch = self._tasks(x_context, y_context, x_target, y_target, context_mask, target_mask)
        x = torch.cat([batch.x_context, batch.x_target], dim=1)
        y = torch.cat([batch.y_context, batch.y_target], dim=1)
        mask = torch.cat([batch.context_mask, batch.target_mask], dim=1)
        prior = self.prior_encoder(batch.x_context, batch.y_context, batch.context_mask)
        proposal = prior if self.proposal_encoder is None else self.proposal_encoder(x, y, mask)
        z = self._draw(proposal, batch, self.n_particles, generator).detach()
        log_likelihood = predictive_log_density(self.decoder(x, z), y, mask)
        log_prior, log_proposal = (log_prob(each, z).sum(-1) for each in (prior, proposal))
        weights, baseline = self_normalized_weights(log_likelihood, log_prior, log_proposal)
        self.last_ess_ = 1 / weights.square().sum(0)
        equal = 1 / self.n_particles
        if not self.control_variate:
            baseline, equal = torch.zeros_like(baseline), 0.0
        value = weights * log_likelihood + (weights - baseline) * log_prior
        if self.proposal_encoder is not None:
            value = value + (weights - equal) * log_proposal
        return -(value.sum(0) / mask.sum(1).clamp_min(1)).mean().to(y_target.dtype)

    @staticmethod
    def _draw(normal: Normal, batch: Tasks, n: int, generator: torch.Generator | None) -> Tensor:
        return drawn(normal, (n, *normal.loc.shape), batch.x_context.dtype, generator)

    def _tasks(self, *args: Tensor | None) -> Tasks:
        return tasks(*args, dim_x=self.dim_x, dim_y=self.dim_y)

    def _set(self, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch = self._tasks(x, y, None, None, mask)
        return batch.x_context, batch.y_context, batch.context_mask


class _LatentEncoder(nn.Module):
    """Mean of embedded points, then mean and scale of a diagonal Gaussian."""

    def __init__(self, n_in: int, dim_hidden: int, dim_latent: int, n_layers: int) -> None:
        super().__init__()
        self.embed = mlp(n_in, dim_hidden, dim_hidden, n_layers)
        self.mean, self.log_variance = nn.Linear(dim_hidden, dim_latent), nn.Linear(dim_hidden, dim_latent)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Normal:
        each = wide(self.embed(torch.cat([x, y], dim=-1)).relu())
        pooled = each.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        pooled = pooled.to(x.dtype)
        return Normal(self.mean(pooled), (self.log_variance(pooled) / 2).exp() + 1e-6, validate_args=False)


class _Decoder(nn.Module):
    """Prediction at x for each z: (samples, tasks, m, dim_y)."""

    def __init__(
        self, dim_x: int, dim_latent: int, dim_hidden: int, dim_y: int, n_layers: int, min_scale: float
    ) -> None:
        super().__init__()
        self.from_x, self.from_z = nn.Linear(dim_x, dim_hidden), nn.Linear(dim_latent, dim_hidden, bias=False)
        self.body = mlp(dim_hidden, dim_hidden, 2 * dim_y, n_layers)
        self.min_scale = min_scale

    def forward(self, x: Tensor, z: Tensor) -> Normal:
        # the first layer of [x, z], without writing z beside every x
        mean, raw = self.body((self.from_x(x) + self.from_z(z)[:, :, None]).relu()).chunk(2, dim=-1)
        return Normal(mean, self.min_scale + (1 - self.min_scale) * F.softplus(raw), validate_args=False)
