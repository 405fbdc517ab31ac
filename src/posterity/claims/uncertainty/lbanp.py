"""Claims about LBANP: a few latents suffice, and queries cost the same whatever the context."""

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from posterity.claims import Between, Count, Positive, Trial, comparison, trend
from posterity.lab import nets
from posterity.lab.data import Functions, load_functions
from posterity.lab.metrics import rank_correlation
from posterity.lab.timing import relative_growth
from posterity.lab.training import fit_functions, per_target
from posterity.uncertainty import LBANP


class Pooled(nn.Module):
    """A conditional neural process: the mean of embedded context points, decoded at each query."""

    def __init__(self, dim_x: int, dim_y: int, width: int = 192) -> None:
        super().__init__()
        self.encoder = _mlp(dim_x + dim_y, width, width, 3)
        self.decoder = _mlp(width + dim_x, width, 2 * dim_y, 4)

    def log_likelihood(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, y_target: Tensor, *, context_mask: Tensor,
        target_mask: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the log-density of the real targets, (tasks,)."""
        each = self.encoder(torch.cat([x_context, y_context], -1)).masked_fill(~context_mask[..., None], 0)
        pooled = each.sum(1) / context_mask.sum(1, keepdim=True).clamp_min(1)
        pooled = pooled[:, None].expand(-1, x_target.shape[1], -1)
        mean, raw = self.decoder(torch.cat([pooled, x_target], -1)).chunk(2, -1)
        return _log_density(mean, raw, y_target, target_mask)


class TNPD(nn.Module):
    """A transformer over context and queries, in which both attend to the context alone (TNP-D)."""

    def __init__(self, dim_x: int, dim_y: int, dim_model: int = 64, n_layers: int = 2) -> None:
        super().__init__()
        self.embed = _mlp(dim_x + dim_y + 1, dim_model, dim_model, 3)
        layer = nn.TransformerEncoderLayer(dim_model, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.head = _mlp(dim_model, 128, 2 * dim_y, 1)

    def forward(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, context_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log scale at the targets."""
        n, m = x_context.shape[1], x_target.shape[1]
        context = torch.cat([x_context, y_context, torch.ones_like(x_context[..., :1])], -1)
        query = torch.cat([x_target, x_target.new_zeros(len(x_target), m, y_context.shape[2] + 1)], -1)
        hidden = torch.zeros(n + m, n + m, dtype=torch.bool)
        hidden[:, n:] = True
        padding = None
        if context_mask is not None:
            padding = torch.cat([~context_mask, context_mask.new_zeros(len(x_target), m)], 1)
        out = self.body(self.embed(torch.cat([context, query], 1)), mask=hidden, src_key_padding_mask=padding)
        mean, raw = self.head(out[:, n:]).chunk(2, -1)
        return mean, raw

    def log_likelihood(
        self, x_context: Tensor, y_context: Tensor, x_target: Tensor, y_target: Tensor, *, context_mask: Tensor,
        target_mask: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the log-density of the real targets, (tasks,)."""
        return _log_density(*self(x_context, y_context, x_target, context_mask), y_target, target_mask)


def _mlp(n_in: int, width: int, n_out: int, depth: int) -> nn.Sequential:
    sizes = [n_in, *[width] * depth]
    layers = [
        each for a, b in zip(sizes[:-1], sizes[1:], strict=True) for each in (nn.Linear(a, b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_out))


def _log_density(mean: Tensor, raw: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return Normal(mean, raw.exp()).log_prob(y).masked_fill(~mask[..., None], 0).sum((1, 2))


def _loss(model: nn.Module, **arguments: Tensor) -> Tensor:
    return -(model.log_likelihood(**arguments) / arguments["target_mask"].sum(1)).mean()  # type: ignore[operator]


def _score(model: nn.Module, trial: Trial, data: str, steps: int, lr: float) -> float:
    """Train a model and return its log-likelihood a target on functions it never saw."""
    source = load_functions(data, seed=trial.seed)
    options = {"n_context": (3, 19), "n_target": 20, "seed": trial.seed}
    fit_functions(
        model, source, steps=steps, loss=_loss, lr=lr, schedule="cosine", device=trial.device, **options
    )
    tasks = source.tasks(512, held_out=True, **options)
    if tasks.marginal is not None:
        trial.record("exact Gaussian process", per_target(tasks.marginal, tasks))
    with torch.no_grad():
        return per_target(model.log_likelihood(**tasks.arguments), tasks)  # type: ignore[operator]


@comparison(
    paper="lbanp",
    says="A few latents predict far better than a neural process that pools its context.",
    where="Feng et al., Section 4",
    arms=("CNP", "LBANP"),
    metric="log-likelihood a target",
    better="higher",
    smallest={"steps": 3, "n_layers": 1, "n_latents": 2},
)
def bottleneck_suffices(
    trial: Trial,
    data: Functions = "gp-smooth",
    steps: Count = 1500,
    lr: Positive = 1e-3,
    n_layers: Count = 2,
    n_latents: Count = 8,
    rivals: bool = False,
) -> dict[str, float]:
    """Train both on the same tasks, for the same steps, and predict unseen functions.

    ``rivals=True`` adds a transformer over context and queries (TNP-D), what the latents are
    to match. The paper's setting is ``data="gp-paper"`` with ``n_layers=6`` and
    ``steps=100_000``: its random hyperparameters need that many.
    """
    source = load_functions(data, seed=trial.seed)
    sizes = (source.dim_x, source.dim_y)
    models: dict[str, nn.Module] = {
        "CNP": nets.weights(Pooled, *sizes, seed=trial.seed),
        "LBANP": nets.weights(LBANP, *sizes, n_layers=n_layers, n_latents=n_latents, seed=trial.seed),
    }
    if rivals:
        models["TNP-D"] = nets.weights(TNPD, *sizes, n_layers=n_layers, seed=trial.seed)
    scores = {arm: _score(model, trial, data, steps, lr) for arm, model in models.items()}
    if rivals:
        trial.record("TNP-D", scores.pop("TNP-D"))
    return scores


@trend(
    paper="lbanp",
    says="More latents predict better.",
    where="Feng et al., Section 4",
    metric="rank correlation of log-likelihood and number of latents",
    low=0.5,
    smallest={"steps": 1},
)
def more_latents(
    trial: Trial, data: Functions = "gp-smooth", steps: Count = 600, lr: Positive = 1e-3, n_layers: Count = 1
) -> float:
    """Train models with 1, 2, 4, 8 and 16 latents on the same tasks."""
    source = load_functions(data, seed=trial.seed)
    counts, values = (1, 2, 4, 8, 16), []
    for count in counts:
        model = nets.weights(
            LBANP, source.dim_x, source.dim_y, n_layers=n_layers, n_latents=count, seed=trial.seed
        )
        values.append(_score(model, trial, data, steps, lr))
        trial.track("log-likelihood a target, by latents", count, values[-1])
    return rank_correlation(counts, values)


@trend(
    paper="lbanp",
    says="The cost of a query does not depend on the size of the context.",
    where="Feng et al., Section 3",
    metric="exponent, in context points, of decoding time over that of matrix products of fixed size",
    high=0.1,
    smallest={"largest": 400, "queries": 50, "repeats": 2},
    timed=True,
)
def flat_queries(
    trial: Trial, largest: Annotated[int, Between(200)] = 6400, queries: Count = 2000, repeats: Count = 9
) -> float:
    """Time 2,000 queries after 100 to 6,400 context points; the record has a layer of TNP-D, 200 queries."""
    sizes = [n for n in (100, 200, 400, 800, 1600, 3200, 6400) if n <= largest]
    generator = torch.Generator().manual_seed(trial.seed)
    model = nets.weights(LBANP, 1, 1, seed=trial.seed).eval()
    rival = nets.weights(TNPD, 1, 1, n_layers=1, seed=trial.seed).eval()
    x_new = torch.randn(1, queries, 1, generator=generator)
    contexts = [torch.randn(2, 1, n, 1, generator=generator) for n in sizes]
    fixed = torch.randn(512, 512, generator=generator)
    yardsticks = [lambda: fixed @ fixed] * len(sizes)
    with torch.no_grad():
        encodings = [model.encode(*pair) for pair in contexts]
        ours = [lambda e=e: model.decode(e, x_new) for e in encodings]
        theirs = [lambda pair=pair: rival(*pair, x_new[:, :200]) for pair in contexts]
        exponent = relative_growth(trial, sizes, ours, yardsticks, rounds=repeats, name="LBANP")
        rivals = relative_growth(Trial(trial.seed), sizes, theirs, yardsticks, rounds=2, name="TNP-D")
    trial.record("exponent of TNP-D", rivals)
    return exponent
