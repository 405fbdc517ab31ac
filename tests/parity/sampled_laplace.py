"""Draws, predictions, EM updates and links of linear models and two networks; what is drawn, by its error.

Quantities estimated from draws enter by their relative error in the Frobenius norm.
"""

import torch
from torch import nn

from posterity.uncertainty import SampledLaplace, sample_posterior

AGAINST = "dense linear algebra, quantities of draws by their relative error"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    jacobian, curvature = torch.tensor(stored["jacobian"]), torch.tensor(stored["curvature"])
    for k, precision in enumerate(torch.tensor(stored["precisions"])):
        theirs = stored["covariances"][k]
        for objective in ("low-variance", "standard"):
            draws = sample_posterior(
                jacobian, curvature, precision, 20_000, objective=objective, generator=seed(2)
            )
            yield f"covariance {k}, {objective}", error(draws.T.cov(), theirs), 0, 0.06
            deviation = torch.tensor(theirs).diagonal().sqrt()
            yield f"mean {k}, {objective}, in deviations", draws.mean(0) / deviation, [0.0] * 10, 0.03

    x, y, new = (torch.tensor(stored[name]) for name in ("x", "y", "new"))
    options = {"noise_variance": 0.05, "n_samples": 2000}
    net = network(stored, "regression")
    fixed = {"prior_precision": 2.0, "g_prior": False, "n_em_steps": 0}
    fit = SampledLaplace(net, "regression", **fixed, **options, generator=seed(0)).fit(x, y)
    mean, covariance = fit.predict(new)
    yield "regression mean", mean, stored["outputs"], 1e-6
    yield "regression variance", error(covariance[:, 0, 0], stored["variance"]), 0, 0.08
    joint = (fit.sample(new) - mean)[:, :, 0].T.cov()
    yield "regression covariance", error(joint, stored["joint"]), 0, 0.12
    for case, g_prior in {"plain": False, "scaled": True}.items():
        updated = {"g_prior": g_prior, "n_em_steps": 8}
        fit = SampledLaplace(net, "regression", **updated, **options, generator=seed(0)).fit(x, y)
        yield f"{case} scale", fit.scale_, stored[f"{case}_scale"], 1e-9
        yield f"{case} precision", error(fit.prior_precision_, stored[f"{case}_precision"]), 0, 0.05
        yield f"{case} dimension", error(fit.effective_dimension_, stored[f"{case}_dimension"]), 0, 0.05
        variance = fit.predict(new)[1][:, 0, 0]
        yield f"{case} variance", error(variance, stored[f"{case}_variance"]), 0, 0.15

    net = network(stored, "classification")
    fixed |= {"prior_precision": 4.0, "n_samples": 2000}
    fit = SampledLaplace(net, "classification", **fixed, generator=seed(0)).fit(x)
    mean, covariance = fit.predict(new)
    yield "logits", mean, stored["logits"], 1e-6
    yield "logit covariance", error(covariance, stored["logit_covariance"]), 0, 0.1
    yield "probit link", error(fit.predict_proba(new, link="probit"), stored["probit"]), 0, 0.03


def network(stored, likelihood):
    prefix = f"{likelihood} "
    state = {k.removeprefix(prefix): torch.tensor(v) for k, v in stored.items() if k.startswith(prefix)}
    hidden, n_outputs = len(state["0.bias"]), len(state["2.bias"])
    net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs)).double()
    net.load_state_dict(state)
    return net


def error(ours, theirs):
    ours, theirs = (torch.as_tensor(each, dtype=torch.float64) for each in (ours, theirs))
    return torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)


def seed(number):
    return torch.Generator().manual_seed(number)
