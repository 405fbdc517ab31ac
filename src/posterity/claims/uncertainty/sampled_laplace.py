"""Claims about sampled Laplace: draws choose what exact algebra would, and tame over-confidence."""

import copy
import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from posterity.claims import Between, Count, Trial, bound, comparison
from posterity.lab import nets, training
from posterity.lab.data import ImageData, Images, load_images, split
from posterity.lab.data.needs import require_rest
from posterity.uncertainty import SampledLaplace


def _fits(data: ImageData, n_train: int, **_: object) -> None:
    require_rest(len(data.y), "n_train", n_train, 1, "images")


def _trained(
    trial: Trial, data: str, net: str, width: int, n_train: int, steps: int
) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Return a network trained on full batches, its data, and all other images and labels."""
    images = load_images(data)
    n, n_classes = len(images.y), len(images.classes)
    rows, rest = split(n, (n_train / n, 1 - n_train / n), trial.seed)
    x, y = torch.from_numpy(images.x).to(trial.device), torch.from_numpy(images.y).to(trial.device)
    if net == "mlp":
        model = nets.mlp(x[0].numel(), n_classes, width=width, depth=1, act=nn.Tanh, seed=trial.seed)
    else:
        model = nets.cnn(x.shape[1], n_classes, width=width, seed=trial.seed)
    training.fit(
        model, lambda net, x, y: F.cross_entropy(net(x), y), (x[rows], y[rows]), steps=steps, batch_size=n_train,
        lr=1e-2, weight_decay=1e-4, seed=trial.seed, device=trial.device,
    )  # fmt: skip
    return model.eval(), x[rows], y[rows], x[rest], y[rest]


def exact_laplace(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[float, float, Tensor, Tensor]:
    """Return precision, effective dimension, scale and covariance (before scaling) by dense algebra.

    The whole J' H J with the g-prior, a Cholesky factor in every step, and the same linear
    mode and updates as the sampled version.
    """
    free = {name: v.detach() for name, v in model.named_parameters()}

    def outputs(values: dict[str, Tensor], point: Tensor) -> Tensor:
        return functional_call(model, values, (point[None],))[0]

    with torch.no_grad():
        parts = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=64)(free, x)
        jac = torch.cat([parts[name].flatten(2) for name in free], 2)
        p = model(x).softmax(1)
        root = p.sqrt()
        factor = root[:, :, None] * (jac - torch.einsum("no,nop->np", p, jac)[:, None])  # R' J
        factor = factor.flatten(0, 1)
        scale = factor.square().sum(0).clamp_min(1e-6).rsqrt()
        factor, jac = factor * scale, jac * scale
        whole = factor.T @ factor
        del factor, parts
        eye = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
        lam, w = 1.0, torch.zeros_like(scale)
        for step in range(steps + 1):
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(whole + lam * eye))
            gamma = len(whole) - lam * float(covariance.diagonal().sum())
            if step < steps:
                w = _mode(jac, y, lam, w)
                lam = gamma / float(w.square().sum())
    return lam, gamma, scale, covariance


def _mode(jac: Tensor, y: Tensor, lam: float, start: Tensor) -> Tensor:
    w = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-4, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        with torch.enable_grad():
            optimiser.zero_grad()
            loss = F.cross_entropy(jac @ w, y, reduction="sum") + lam / 2 * w.square().sum()
            loss.backward()
        return loss

    optimiser.step(step)
    return w.detach()


@bound(
    paper="sampled-laplace",
    says="Sampling finds the regularisation and the effective dimension that exact linear algebra would.",
    where="the paper's experiments",
    metric="larger of the effective dimension's relative error over 0.15 and the precision's log error over 0.2",
    limit=1.0,
    smallest={"width": 1, "n_train": 60, "steps": 10, "n_samples": 4, "n_em_steps": 1},
    check=_fits,
)
def exact_algebra(
    trial: Trial, data: Images = "digits", net: Literal["mlp", "cnn"] = "mlp", width: Count = 32, n_train: Count = 500, steps: Count = 300,
    n_samples: Count = 16, n_em_steps: Count = 6,
) -> float:  # fmt: skip
    """Run EM by draws and by the whole matrix, in float64, on the same trained network.

    At the defaults the network has 2,410 parameters, of which the data decide some seventy.
    """
    model, x, y, _, _ = _trained(trial, data, net, width, n_train, steps)
    found = SampledLaplace(
        model, "classification", n_samples=n_samples, n_em_steps=n_em_steps, batch_size=500,
        generator=torch.Generator().manual_seed(trial.seed),
    ).fit(x, y)  # fmt: skip
    lam, gamma, _, _ = exact_laplace(copy.deepcopy(model).double(), x.double(), y, n_em_steps)
    for step, entry in enumerate(found.history_):
        trial.track("prior precision, sampled", step + 1, entry["prior_precision"])
    trial.record("prior precision, sampled", found.prior_precision_)
    trial.record("prior precision, exact", lam)
    trial.record("effective dimension, sampled", found.effective_dimension_)
    trial.record("effective dimension, exact", gamma)
    dimension = abs(found.effective_dimension_ / gamma - 1)
    return max(dimension / 0.15, abs(math.log(found.prior_precision_ / lam)) / 0.2)


def _rotated(x: Tensor, degrees: float) -> Tensor:
    """Return images turned about their centre, bilinearly, zero outside."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = x.new_tensor([[c, -s, 0], [s, c, 0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)


@comparison(
    paper="sampled-laplace",
    says="The sampled Laplace predictive is far less over-confident away from the training data than the network.",
    where="the paper's experiments",
    arms=("MAP", "sampled Laplace"),
    metric="negative log-likelihood of rotated test images",
    better="lower",
    smallest={"width": 1, "n_train": 1_780, "steps": 5, "n_samples": 2, "n_em_steps": 1},
    check=_fits,
)
def away_from_the_data(
    trial: Trial, data: Images = "digits", net: Literal["mlp", "cnn"] = "mlp", width: Count = 32, n_train: Count = 500, steps: Count = 300,
    degrees: Annotated[float, Between(-360, 360)] = 45.0, n_samples: Count = 16, n_em_steps: Count = 6,
) -> dict[str, float]:  # fmt: skip
    """Predict test images turned by 45 degrees with a trained network, bare and with error bars.

    Both arms are the same network; the posterior sees the training data only, and class
    probabilities are those of the probit link. On images like those trained on the error bars
    cost likelihood: the records say how much. On turned digits the mended predictions come
    near to a guess among all ten, whose NLL is 2.30: "I do not know" and no more. The reason is
    the g-prior: weights of border pixels that no training image reaches, but a turned one does,
    have the largest scale there is, 1,000. Towards the paper's scale:
    ``data="cifar10", net="cnn", n_train=50_000``.
    """
    model, x, y, test, y_test = _trained(trial, data, net, width, n_train, steps)
    found = SampledLaplace(
        model, "classification", n_samples=n_samples, n_em_steps=n_em_steps, batch_size=500,
        generator=torch.Generator().manual_seed(trial.seed),
    ).fit(x, y)  # fmt: skip
    nll = {}
    for where, images in (("rotated", _rotated(test, degrees)), ("as trained on", test)):
        with torch.no_grad():
            bare = float(F.cross_entropy(model(images), y_test))
        probit = found.predict_proba(images, link="probit")
        value = -float(probit.gather(1, y_test[:, None]).clamp_min(1e-30).log().mean())
        trial.record(f"{where}, NLL of MAP", bare)
        trial.record(f"{where}, NLL of sampled Laplace", value)
        trial.record(f"{where}, NLL by Monte Carlo", -float(found.log_likelihood(images, y_test).mean()))
        # In groups of ten: of all points at once the draw that is least wrong would decide.
        groups = zip(images.split(10), y_test.split(10), strict=True)
        joint = sum(float(found.log_likelihood(*group, joint=True)) for group in groups)
        trial.record(f"{where}, joint NLL a point in groups of ten", -joint / len(y_test))
        if where == "rotated":
            nll = {"MAP": bare, "sampled Laplace": value}
    return nll
