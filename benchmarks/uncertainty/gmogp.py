"""Race a fit with gpytorch's exact coregional model, and with the paper's construction in gpytorch.

Run from the repository root: ``python -m benchmarks.uncertainty.gmogp``. Each side takes
20 steps of Adam in float64 on 150 rows of 7 outputs.
"""

from importlib.util import find_spec

import numpy as np
import torch
from torch.nn.functional import leaky_relu

from benchmarks.timing import race
from posterity.uncertainty import GMOGPRegressor

STEPS = 20


def train(model, objective, inputs, targets):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.08, weight_decay=5e-4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (-objective(model(*inputs), targets)).backward()
        optimizer.step()


def coregional(x, y):
    """Train one kernel for inputs times a full covariance of outputs; gpytorch keeps the two apart."""
    import gpytorch

    s = y.shape[1]

    class ICM(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ConstantMean(), s)
            self.covar_module = gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), s, rank=s)

        def forward(self, x):
            normal = gpytorch.distributions.MultitaskMultivariateNormal
            return normal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(s, has_global_noise=False).double()
    model = ICM(likelihood).double()
    train(model, gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model), (x,), y)


def exact_coregional(x, y):
    """Train the same with one Cholesky factor of size n s, as an output with gaps would need it."""
    import gpytorch

    settings = gpytorch.settings
    with settings.max_cholesky_size(10_000), settings.fast_computations(False, False, False):
        coregional(x, y)


def model_list(x, y):
    """Train the official construction, written anew: s models, each with all s kernels and its own attention."""
    import gpytorch

    n, s = y.shape
    kernels = [gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel()) for _ in range(s)]
    means = [gpytorch.means.ConstantMean() for _ in range(s)]
    features = (y / y.norm(dim=0)).T
    bound = 1.414 * (3 / s) ** 0.5

    class Mixed(gpytorch.models.ExactGP):
        def __init__(self, i, likelihood):
            super().__init__(x, y[:, i], likelihood)
            self.i, self.kernels, self.means = i, torch.nn.ModuleList(kernels), torch.nn.ModuleList(means)
            self.weight = torch.nn.Parameter(torch.empty(s, s).uniform_(-bound, bound))
            self.bias = torch.nn.Parameter(torch.randn(s, s))

        def forward(self, x):
            scores = leaky_relu(features @ features.T @ self.weight + self.bias, 0.2).exp()
            scores = scores - scores.diagonal().diag()
            a = (scores / (1 + scores.sum(1, keepdim=True)) + torch.eye(s))[self.i]
            mean = sum(a[j] * self.means[j](x) for j in range(s))
            covariance = sum(a[j].square() * self.kernels[j](x) for j in range(s))
            return gpytorch.distributions.MultivariateNormal(mean, covariance)

    parts = [Mixed(i, gpytorch.likelihoods.GaussianLikelihood()) for i in range(s)]
    model = gpytorch.models.IndependentModelList(*parts).double()
    likelihood = gpytorch.likelihoods.LikelihoodList(*(part.likelihood for part in parts)).double()
    objective = gpytorch.mlls.SumMarginalLogLikelihood(likelihood, model)
    train(model, objective, model.train_inputs, model.train_targets)


def main() -> None:
    if find_spec("gpytorch") is None:
        print("skipped: gpytorch is not installed")
        return
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(0, 5, (150, 1)), 0)
    Y = np.sin(X * np.arange(1, 8)) + 0.1 * rng.normal(size=(150, 7))
    x, y = torch.from_numpy(X), torch.from_numpy((Y - Y.mean(0)) / Y.std(0))

    def ours():
        GMOGPRegressor(n_iter=STEPS, random_state=0).fit(X, Y)

    race("20 steps, against gpytorch's exact ICM, one factor", ours, lambda: exact_coregional(x, y), target=20, rounds=3)  # fmt: skip
    race(
        "20 steps, against gpytorch's exact ICM, Kronecker factors",
        ours,
        lambda: coregional(x, y),
        target=20,
        rounds=3,
    )
    race("20 steps, against the official construction", ours, lambda: model_list(x, y), target=3, rounds=5)


if __name__ == "__main__":
    main()
