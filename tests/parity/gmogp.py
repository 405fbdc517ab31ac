"""Attention of three and five outputs; posterior and evidence of a fit, by a peer given its kernels."""

import sklearn
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from posterity.uncertainty import GMOGPRegressor, attention_coefficients

AGAINST = (
    "the authors' code (github.com/Blspdianna/GMOGP), "
    f"and of scikit-learn {sklearn.__version__} given the fitted kernels"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in ("three", "five"):
        targets, weight, bias = (
            torch.tensor(stored[f"{case}_{name}"]) for name in ("targets", "weight", "bias")
        )
        theirs = stored[f"{case}_attention"]
        yield f"attention of {case}", attention_coefficients(targets, weight, bias), theirs, 1e-10
        scaled = targets * torch.arange(1.0, targets.shape[1] + 1)
        yield f"attention of {case}, rescaled", attention_coefficients(scaled, weight, bias), theirs, 1e-10
    x, y, new = (stored[name] for name in ("x", "y", "new"))
    model = GMOGPRegressor(n_iter=30, normalize_y=False, random_state=0).fit(x, y)
    mean, std = model.predict(new, return_std=True)
    evidence = model.log_marginal_likelihood(x, y)
    for i, weights in enumerate(model.attention_):
        kernel = WhiteKernel(model.noise_[i])
        for weight, scale, length in zip(weights, model.outputscale_, model.lengthscale_, strict=True):
            kernel += ConstantKernel(weight**2 * scale) * RBF(length)
        shift = weights @ model.mean_
        peer = GaussianProcessRegressor(kernel, optimizer=None).fit(x, y[:, i] - shift)
        peer_mean, peer_std = peer.predict(new, return_std=True)
        yield f"mean of output {i}", mean[:, i], peer_mean + shift, 1e-6
        yield f"deviation of output {i}", std[:, i], peer_std, 1e-6
        yield f"evidence of output {i}", evidence[i], peer.log_marginal_likelihood_value_, 1e-5
